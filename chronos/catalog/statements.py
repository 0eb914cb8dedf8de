"""Where the statements are kept that the application has sent: the view of pg_stat_statements."""

from __future__ import annotations

from psycopg2 import sql
from sqlalchemy.engine import Connection

from chronos.db import execute, name, statement

# The view that the extension owns, wherever it was put: another of that name is anybody's.
_VIEW = """
SELECT n.nspname::text, c.relname::text
FROM pg_extension e
JOIN pg_depend d ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid
                AND d.classid = 'pg_class'::regclass AND d.deptype = 'e'
JOIN pg_class c ON c.oid = d.objid AND c.relname = 'pg_stat_statements'
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE e.extname = 'pg_stat_statements'
"""


def statistics_view(conn: Connection) -> sql.Identifier | None:
    """The view with its schema; None where the extension is not installed. No lock."""
    found = execute(conn, statement(_VIEW)).one_or_none()
    return name(*found) if found else None
