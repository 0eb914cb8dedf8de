"""In which schema a table is."""

from __future__ import annotations

from psycopg2 import sql
from sqlalchemy.engine import Connection

from chronos.db import execute, joined, statement
from chronos.errors import RefusedError
from chronos.table import TableSpec

# The session's own path decides where to look, so nothing of it may decide which function is called here.
_PATH = "SELECT pg_catalog.current_schemas(false)::pg_catalog.text[]"

_SCHEMAS = """
SELECT DISTINCT n.nspname
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relname IN ({tables}) AND c.relkind IN ('r', 'p') AND n.nspname !~ '^pg_'
ORDER BY 1
"""


def locate(conn: Connection, table: TableSpec) -> TableSpec | None:
    """``table`` with its schema: the one it names, else the first on the connection's own search path that
    has it, else the only one that has it.

    The state of a half-done migration counts like the table. None when there is no such table, or when it
    is in several schemas and none of them is on the search path. In a transaction of its own.
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


def require_located(conn: Connection, table: TableSpec) -> TableSpec:
    """The table with its schema. Raises RefusedError when there is no such table, or more than one."""
    located = locate(conn, table)
    if located is None:
        raise RefusedError(
            f"there is no table {table} in this database, or one in several schemas and none on the"
            " search path; nothing was changed. Check the database and its search_path"
        )
    return located
