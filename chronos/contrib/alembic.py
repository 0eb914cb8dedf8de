"""Keep Alembic's autogenerate away from what chronos created: partitions, the old table, migration tables.

In ``env.py``, where the connection is open::

    from chronos.contrib.alembic import include_name, include_object

    context.configure(
        connection=connection,
        target_metadata=target_metadata,
        include_name=include_name,
        include_object=include_object,
    )

Either is enough. ``include_name`` also saves reflecting hundreds of partitions; ``include_object`` is for an
``env.py`` that already has an ``include_name``. Outside ``env.py``: ``Filter(connection)``.

What to leave out is found in the catalog, not by name: partitions because they are partitions, the old table
by the note triggers that the migration put on it, everything else by the comment on it or by the state of the
migration. An application's own ``webhook_log_yearly`` stays, and so does everything that its models name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from alembic import context
from alembic.runtime.migration import MigrationContext
from sqlalchemy import MetaData, text
from sqlalchemy.engine import Connection
from sqlalchemy.schema import SchemaItem

from chronos.errors import RefusedError
from chronos.migration.attach import key_name
from chronos.migration.state import COMMENT, Plan
from chronos.table import TableSpec

if TYPE_CHECKING:
    from alembic.runtime.environment import NameFilterParentNames, NameFilterType

# PostgreSQL's own tables, functions and operators, whatever the role's search path is.
_MADE = """
SELECT n.nspname, c.relname
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace
WHERE c.relkind OPERATOR(pg_catalog.=) ANY ('{r,p,f}')
  AND (c.relispartition
       OR pg_catalog.starts_with(pg_catalog.obj_description(c.oid, 'pg_class'), 'chronos: '))
"""

_STATES = """
SELECT n.nspname, c.relname, pg_catalog.format('%I.%I', n.nspname, c.relname),
       pg_catalog.has_table_privilege(c.oid, 'SELECT') AND pg_catalog.has_schema_privilege(n.oid, 'USAGE')
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace
WHERE c.relkind OPERATOR(pg_catalog.=) 'r'
  AND pg_catalog.starts_with(pg_catalog.obj_description(c.oid, 'pg_class'), :comment)
"""

# The old table, even if somebody has moved it.
_NOTED = """
SELECT n.nspname, c.relname
FROM pg_catalog.pg_trigger t
JOIN pg_catalog.pg_proc p ON p.oid OPERATOR(pg_catalog.=) t.tgfoid
JOIN pg_catalog.pg_namespace pn ON pn.oid OPERATOR(pg_catalog.=) p.pronamespace
JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) t.tgrelid
JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace
WHERE pn.nspname OPERATOR(pg_catalog.=) :schema AND p.proname OPERATOR(pg_catalog.=) :function
  AND (n.nspname, c.relname) OPERATOR(pg_catalog.<>) (:schema, :table)
"""


def made_by_chronos(connection: Connection) -> set[tuple[str, str]]:
    """Schema and name of each partition, of the old tables, and of what migrations under way have created.

    That includes an index that becomes a key later. ACCESS SHARE on the catalog and on the states of the
    migrations, in the current transaction; the session is not changed. Raises DBAPIError.
    """
    found = {(schema, relation) for schema, relation in connection.execute(text(_MADE))}
    suffix = TableSpec("").state
    for schema, relation, qualified, may_read in connection.execute(
        text(_STATES), {"comment": COMMENT}
    ).all():
        table = TableSpec(relation.removesuffix(suffix), schema=schema)
        found.add((schema, key_name(table)))
        values = {"schema": schema, "table": table.name, "function": table.note_function}
        found |= {(where, name) for where, name in connection.execute(text(_NOTED), values)}
        plan = None
        if may_read:
            query = f"SELECT plan::pg_catalog.text FROM {qualified}"
            plan = connection.exec_driver_sql(query, execution_options={"no_parameters": True}).scalar()
        # While rows are copied, the future partitions are separate tables that only the plan knows.
        periods = Plan.from_json(json.loads(plan)).periods if plan else []
        found |= {(schema, name) for name in (table.new, *map(table.partition, periods))}
    return found


class Filter:
    """What autogenerate should look at over ``connection``; the catalog is read once, at the first call.

    ``metadata`` are the application's models: everything that they name is looked at.
    """

    def __init__(self, connection: Connection, *metadata: MetaData) -> None:
        self._connection = connection
        self._default_schema = connection.dialect.default_schema_name
        self._models = {
            self._qualified(table.schema, table.name) for one in metadata for table in one.tables.values()
        }
        self._made: set[tuple[str | None, str]] | None = None

    def _qualified(self, schema: str | None, name: str) -> tuple[str | None, str]:
        return schema or self._default_schema, name

    def _includes(self, type_: str, schema: str | None, name: str | None) -> bool:
        if type_ not in ("table", "index", "unique_constraint") or name is None:
            return True
        qualified = self._qualified(schema, name)
        if type_ == "table" and qualified in self._models:
            return True
        if self._made is None:
            self._made = {*made_by_chronos(self._connection)}
        return qualified not in self._made

    def include_name(
        self, name: str | None, type_: NameFilterType, parent_names: NameFilterParentNames
    ) -> bool:
        """Alembic's ``include_name``: whether to reflect this name."""
        return self._includes(type_, parent_names.get("schema_name"), name)

    def include_object(
        self,
        object_: SchemaItem,
        name: str | None,
        type_: NameFilterType,
        reflected: bool,
        compare_to: SchemaItem | None,
    ) -> bool:
        """Alembic's ``include_object``: whether to compare what was reflected or is in the models."""
        if not reflected or compare_to is not None:
            return True
        table: Any = object_ if type_ == "table" else getattr(object_, "table", None)
        return self._includes(type_, getattr(table, "schema", None), name)


_filters: WeakKeyDictionary[MigrationContext, Filter] = WeakKeyDictionary()


def _current() -> Filter:
    """The filter of the current run of Alembic."""
    try:
        run = context.get_context()
    except (AttributeError, NameError):  # Alembic's way of saying it is not running
        run = None
    if run is None or run.connection is None:
        raise RefusedError(
            "chronos.contrib.alembic reads the database, but no env.py with a connection is running;"
            " nothing was changed. Use chronos.contrib.alembic.Filter(connection) instead"
        )
    if run not in _filters:
        target: MetaData | Iterable[MetaData] = run.opts.get("target_metadata") or ()
        _filters[run] = Filter(run.connection, *([target] if isinstance(target, MetaData) else target))
    return _filters[run]


def include_name(name: str | None, type_: NameFilterType, parent_names: NameFilterParentNames) -> bool:
    """For ``context.configure(include_name=...)``: whether Alembic should reflect this name.

    Locks and errors as in ``made_by_chronos``; raises RefusedError outside ``env.py``.
    """
    return _current().include_name(name, type_, parent_names)


def include_object(
    object_: SchemaItem,
    name: str | None,
    type_: NameFilterType,
    reflected: bool,
    compare_to: SchemaItem | None,
) -> bool:
    """For ``context.configure(include_object=...)``: whether Alembic should compare it.

    Locks and errors as in ``made_by_chronos``; raises RefusedError outside ``env.py``.
    """
    return _current().include_object(object_, name, type_, reflected, compare_to)
