"""Which schema a table is in, or why there is no such table."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from psycopg2 import sql
from sqlalchemy.engine import Connection

from chronos.db import execute, joined, statement
from chronos.errors import RefusedError
from chronos.table import TableSpec

# The session's own path decides where to look, but must not decide which function is called here.
_PATH = "SELECT pg_catalog.current_schemas(false)::pg_catalog.text[]"

_SCHEMAS = """
SELECT DISTINCT n.nspname
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relname IN ({tables}) AND c.relkind IN ('r', 'p') AND n.nspname !~ '^pg_'
ORDER BY 1
"""

_RELATIONS = """
SELECT n.nspname, c.relname, c.relkind::text
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND NOT c.relispartition
  AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
ORDER BY 1, 2
"""
_KINDS = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}


def locate(conn: Connection, table: TableSpec) -> TableSpec | None:
    """``table`` with its schema: the one it names, else the first on the connection's own search path that
    has it, else the only one that has it.

    The state of a half-done migration counts as the table. None when there is no such table, or when it is in
    several schemas, none of them on the search path. In a transaction of its own.
    """
    with conn.begin():
        path: list[str] = execute(conn, sql.SQL(_PATH)).scalar_one()
        execute(conn, sql.SQL("SET LOCAL search_path = pg_catalog, pg_temp"))
        tables = joined([sql.Literal(name) for name in (table.name, table.state)])
        schemas = [row[0] for row in execute(conn, statement(_SCHEMAS, tables=tables))]
    if table.schema is not None:
        return table if table.schema in schemas else None
    visible = next((schema for schema in path if schema in schemas), None)
    if visible is None and len(schemas) == 1:
        [visible] = schemas
    return table.located(visible) if visible is not None else None


def require_located(conn: Connection, table: TableSpec, listed_in: Path | None = None) -> TableSpec:
    """The table with its schema. Raises RefusedError when there is no such table, or more than one; its text
    says what exists instead, and names ``listed_in`` as the file that lists the table.
    """
    located = locate(conn, table)
    if located is None:
        listed = f"{listed_in} lists {table.typed}, and " if listed_in else ""
        raise RefusedError(f"{listed}{_instead(conn, table)}")
    return located


def _instead(conn: Connection, table: TableSpec) -> str:
    """Why there is no such table, and which one may be meant."""
    with conn.begin():
        execute(conn, sql.SQL("SET LOCAL search_path = pg_catalog, pg_temp"))
        database = execute(conn, sql.SQL("SELECT current_database()")).scalar_one()
        relations = [
            (TableSpec(relation, schema=schema), kind)
            for schema, relation, kind in execute(conn, sql.SQL(_RELATIONS))
        ]
    of_its_name = [
        (found, kind)
        for found, kind in relations
        if found.name == table.name and table.schema in (None, found.schema)
    ]
    for found, kind in of_its_name:
        if kind in _KINDS:
            return f"{found.typed} is {_KINDS[kind]}, not a table; nothing was changed. Name a table"
    if of_its_name:
        names = ", ".join(found.typed for found, _ in of_its_name)
        return (
            f"{table.typed} is in several schemas, none of them on the search path; nothing was changed."
            f" Name one of {names}"
        )
    tables = {found.typed: found for found, kind in relations if kind not in _KINDS}
    # By spelling, ignoring case and quotes, with the schema if one was typed.
    spelled = {
        ".".join((*((found.home,) if table.schema else ()), found.name)).lower(): typed
        for typed, found in tables.items()
    }
    wanted = ".".join(part for part in (table.schema, table.name) if part).lower()
    near = get_close_matches(wanted, spelled, n=1, cutoff=0.7)
    meant = spelled[near[0]] if near else None
    elsewhere = next((typed for typed, found in tables.items() if found.name == table.name), meant)
    instead = f"Is it {elsewhere}?" if elsewhere else "Check its name, the database URL and the search_path"
    return f"there is no table {table.typed} in database {database}; nothing was changed. {instead}"
