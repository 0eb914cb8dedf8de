"""Where extensions keep statements: those that the application sent, and scheduled ones."""

from __future__ import annotations

from psycopg2 import sql
from sqlalchemy.engine import Connection

from chronos.db import execute, name, statement

# The relation that the extension owns, in any schema: another one of that name could be anybody's.
_OWNED = """
SELECT n.nspname::text, c.relname::text,
       has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')
FROM pg_extension e
JOIN pg_depend d ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid
                AND d.classid = 'pg_class'::regclass AND d.deptype = 'e'
JOIN pg_class c ON c.oid = d.objid AND c.relname = {relation}
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE e.extname = {extension}
"""


def statistics_view(conn: Connection) -> sql.Identifier | None:
    """The view of pg_stat_statements with its schema; None if that is not installed. No lock."""
    found = _owned(conn, "pg_stat_statements", "pg_stat_statements")
    return found[0] if found else None


def readable_statistics(conn: Connection) -> sql.Identifier | None:
    """The same view; None if the current user may not read it, or the server has not loaded the library."""
    found = _owned(conn, "pg_stat_statements", "pg_stat_statements")
    loaded = statement("SELECT current_setting('pg_stat_statements.max', true) IS NOT NULL")
    return found[0] if found and found[1] and execute(conn, loaded).scalar_one() else None


def scheduled_jobs(conn: Connection) -> sql.Identifier | None:
    """The table of pg_cron's jobs with its schema; None if there is none that may be read. No lock."""
    found = _owned(conn, "pg_cron", "job")
    return found[0] if found and found[1] else None


def _owned(conn: Connection, extension: str, relation: str) -> tuple[sql.Identifier, bool] | None:
    """A relation of an extension, and whether the current user may read it."""
    found = execute(conn, statement(_OWNED, extension=extension, relation=relation)).one_or_none()
    return (name(found[0], found[1]), found[2]) if found else None
