"""The SQL functions that maintain partitions: a pair for each table, and a shared pair that does the work.

A table's pair belongs to the table's owner. The shared pair serves all tables of the schema;
sql/shared_functions_check.sql says who may own it.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from chronos import commands
from chronos.agreement import require_agreement
from chronos.catalog.ddl import revoke_execute, script
from chronos.catalog.locate import require_located
from chronos.catalog.shape import TableShape, read
from chronos.db import Statement, execute, joined, name, one_line, opened, sqlstate, statement, transaction
from chronos.errors import RefusedError
from chronos.migration import state as states
from chronos.table import TableSpec, in_quotes, quoted

VERSION = 5

_INSUFFICIENT_PRIVILEGE = "42501"


def function_statements(shape: TableShape) -> list[Statement]:
    """Create the functions, or replace them. Raises insufficient_privilege, see ``distrusted``."""
    table = shape.spec
    return [
        *installation(table, shape.owner),
        *(
            statement(
                "ALTER FUNCTION {function}(integer) OWNER TO {owner}",
                function=name(table.home, function),
                owner=name(shape.owner),
            )
            for function in table.functions
        ),
        *(
            query
            for function in table.functions
            for query in revoke_execute(shape, name(table.home, function), "integer")
        ),
    ]


def installation(table: TableSpec, owner: str) -> list[Statement]:
    """The functions for a table of ``owner``; its own pair still belongs to the current user."""
    return [_script(file, table, owner) for file in ("shared_functions_check.sql", "partition_functions.sql")]


def _script(file: str, table: TableSpec, owner: str) -> Statement:
    home = in_quotes(table.home)
    return script(
        file,
        table,
        owner=owner,
        version=str(VERSION),
        grace_days=str(table.grace_days),
        create_shared=f"{home}.chronos_create_partitions(text, text, text, integer, timestamptz)",
        drop_shared=f"{home}.chronos_drop_partitions(text, text, integer, timestamptz, integer)",
    )


def distrusted(conn: Connection, shape: TableShape) -> str | None:
    """Why the current user cannot install the functions for a table of this owner; None if they can.

    Changes nothing. In a transaction; other installations in the schema wait until it ends.
    """
    try:
        with conn.begin_nested():
            execute(conn, _script("shared_functions_check.sql", shape.spec, shape.owner))
    except DBAPIError as error:
        if sqlstate(error) != _INSUFFICIENT_PRIVILEGE:
            raise
        return one_line(error)
    return None


def upgrade(engine: Engine, *tables: TableSpec, listed_in: Path | None = None) -> list[str]:
    """Install this version's functions for all of ``tables``, or for none; safe to call again.

    A plain table that is not being migrated gets none: nothing would remove them again. Returns a sentence
    for each table. No lock on the tables. Raises RefusedError when a table does not exist, all of them are
    plain, one lacks its time column or disagrees with ``listed_in``, or the current user must not or cannot
    install them.
    """
    with opened(engine) as conn:
        located = [require_located(conn, table, listed_in) for table in tables]
        for table in located:
            require_agreement(conn, table, listed_in)
        done: list[str] = []
        with transaction(conn):
            plain = [table for table in located if _is_plain(conn, table)]
            without = [
                f"{table.typed} is a plain table, and gets its functions when it is migrated:"
                f" {commands.start(table)}"
                for table in plain
            ]
            if plain and len(plain) == len(located):
                raise RefusedError("; ".join((*without, "nothing was changed")))
            for table in [table for table in located if table not in plain]:
                shape = read(conn, table, table.name)
                if table.column not in shape.columns_by_name:
                    raise RefusedError(f"{table.typed} has no column {table.column}; nothing was changed")
                if reason := distrusted(conn, shape):
                    raise RefusedError(f"{reason}; nothing was changed")
                before = definitions(conn, table)
                execute(conn, joined(function_statements(shape), ";\n"))
                functions = " and ".join(f"{quoted(table.home)}.{quoted(f)}" for f in table.functions)
                changed = definitions(conn, table) != before
                done.append(f"Installed {functions}" if changed else f"{functions} are already current")
    return [*done, *without]


def _is_plain(conn: Connection, table: TableSpec) -> bool:
    return states.relkind(conn, table.home, table.name) == "r" and states.read(conn, table) is None


# pg_get_functiondef includes neither owner nor privileges nor comment.
_DEFINITIONS = r"""
SELECT f.signature, concat(
    pg_get_functiondef(p.oid),
    format(E';\nALTER ROUTINE %1$s OWNER TO %2$I;\nREVOKE ALL ON ROUTINE %1$s FROM PUBLIC',
           f.signature, f.owner),
    (SELECT string_agg(format(E';\nGRANT EXECUTE ON ROUTINE %s TO %s%s', f.signature,
                              CASE WHEN x.grantee = 0 THEN 'PUBLIC'
                                   ELSE quote_ident(pg_get_userbyid(x.grantee)) END,
                              CASE WHEN x.is_grantable THEN ' WITH GRANT OPTION' END), '')
     FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) x
     WHERE x.grantee <> p.proowner),
    format(E';\nCOMMENT ON ROUTINE %s IS %L', f.signature, obj_description(p.oid, 'pg_proc')))
FROM pg_proc p
JOIN pg_namespace n ON n.oid = p.pronamespace
CROSS JOIN LATERAL (SELECT p.oid::regprocedure::text, pg_get_userbyid(p.proowner)) f (signature, owner)
WHERE n.nspname = {schema} AND p.proname IN ({names}) AND p.prokind IN ('f', 'p')
  AND p.proargtypes::text = 'integer'::regtype::oid::text
ORDER BY 1
"""


def definitions(conn: Connection, table: TableSpec) -> dict[str, str]:
    """The functions that have the names of the table's own pair: signature -> statements that recreate it.

    Call it inside ``db.transaction``, whose search path makes the server print each name in full.
    """
    names = joined([statement("{f}", f=function) for function in table.functions])
    rows = execute(conn, statement(_DEFINITIONS, schema=table.home, names=names)).all()
    return dict(rows)


_GRACE = r"""
SELECT coalesce(max(substring(pg_get_function_sqlbody(p.oid) FROM '\mgrace_days => (\d+)')::integer), 0)
FROM pg_proc p
WHERE p.oid = to_regprocedure(format('%I.%I(integer)', {schema}, {function}))
"""


def grace_days(conn: Connection, table: TableSpec) -> int:
    """For how many days the drop function leaves a partition detached. No lock."""
    query = statement(_GRACE, schema=table.home, function=table.drop_function)
    found: int = execute(conn, query).scalar_one()
    return found


def grace_disagrees(table: TableSpec, installed: int) -> str | None:
    """What to do if the function's ``grace_days`` differs from the configuration; None if it does not."""
    if installed == table.grace_days:
        return None
    return (
        f"{quoted(table.drop_function)} was installed with grace_days = {installed}, and the configuration"
        f" says {table.grace_days}; as the owner of {table.typed}, run: {commands.upgrade_functions(table)}"
    )


_DROP_UNUSED = """
DO $do$
DECLARE
    shared text;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('chronos functions of ' || {schema}, 0));
    FOR shared IN
        SELECT p.oid::regprocedure::text
        FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
        WHERE n.nspname = {schema} AND p.proname IN ('chronos_create_partitions', 'chronos_drop_partitions')
          AND (pg_has_role(p.proowner, 'USAGE') OR pg_has_role(n.nspowner, 'USAGE'))
          AND NOT EXISTS (SELECT FROM pg_depend d
                          WHERE d.refclassid = 'pg_proc'::regclass AND d.refobjid = p.oid)
    LOOP
        EXECUTE format('DROP FUNCTION %s', shared);
    END LOOP;
END
$do$"""


def drop_unused_statement(table: TableSpec) -> Statement:
    """Drop the pair that all tables of the schema share, unless a table's own pair still calls it."""
    return statement(_DROP_UNUSED, schema=table.home)
