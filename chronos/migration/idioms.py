"""What in the application's functions and statements goes wrong on a partitioned table.

Functions are read from pg_proc, statements from pg_stat_statements if that is installed; only a superuser and
members of pg_read_all_stats see those of other roles.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy.engine import Connection

from chronos.catalog.shape import TableShape
from chronos.catalog.statements import readable_statistics
from chronos.db import execute, statement

_SHOWN = 60

# A SQL-standard function body (BEGIN ATOMIC) refers to its tables by OID, and its prosrc is empty.
_FUNCTIONS = """
SELECT p.oid::regprocedure::text, p.prosrc
FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace JOIN pg_language l ON l.oid = p.prolang
WHERE n.nspname NOT IN ('pg_catalog', 'information_schema') AND l.lanname NOT IN ('internal', 'c')
  AND position(lower({table}) IN lower(p.prosrc)) > 0
ORDER BY 1
"""

_STATEMENTS = """
SELECT DISTINCT query FROM {view}
WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND (position(lower({table}) IN lower(query)) > 0 OR query ~* 'pg_get_serial_sequence')
  AND query !~* '^\\s*(CREATE|ALTER|DROP|COPY|EXPLAIN)'
ORDER BY 1
"""


@dataclass(frozen=True)
class Text:
    """One statement, and where it was found: a function, or "a statement" with its beginning."""

    where: str
    sql: str


def texts(conn: Connection, shape: TableShape) -> list[Text]:
    """The statements that name the table. ACCESS SHARE on catalogs; in a transaction with our search path."""
    table = shape.spec.name
    found = [
        Text(f"function {function}", part)
        for function, source in execute(conn, statement(_FUNCTIONS, table=table)).all()
        for part in _without_comments(source).split(";")
    ]
    view = readable_statistics(conn)
    if view is not None:
        for (query,) in execute(conn, statement(_STATEMENTS, view=view, table=table)).all():
            text = " ".join(_without_comments(query).split())
            shown = text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
            found.append(Text(f"a statement ({shown})", text))
    return found


def _without_comments(text: str) -> str:
    return re.sub(r"--[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)


def names_table(text: Text, shape: TableShape) -> bool:
    """Whether a statement names the table itself, not just one whose name contains it."""
    return (
        re.search(rf'(?<![\w$])"?{re.escape(shape.spec.name)}"?(?![\w$])', text.sql, re.IGNORECASE)
        is not None
    )


def uses_ctid(text: Text, shape: TableShape) -> bool:
    """Whether a statement finds rows by ctid, which is unique only within a partition."""
    return (
        names_table(text, shape)
        and re.search(r"(?<![\w$])ctid(?![\w$])", text.sql, re.IGNORECASE) is not None
    )


def conflict_target(text: Text, shape: TableShape) -> str | None:
    """The target of an ON CONFLICT that no index of the partitioned table matches; None when there is none.

    All its unique indexes include the time column, and the target is without it, or names the old key.
    """
    if not re.search(r"\bINSERT\s+INTO\b", text.sql, re.IGNORECASE) or not names_table(text, shape):
        return None
    keys = {shape.key_index.name} if shape.key_index and shape.key_index.constraint else set()
    if found := re.search(
        r"\bON\s+CONFLICT\s+ON\s+CONSTRAINT\s+(\"[^\"]+\"|[\w$]+)", text.sql, re.IGNORECASE
    ):
        # The new primary key has the name of the old one and one more column: such a statement still works,
        # but a row with the same key and another time is no conflict.
        return f"ON CONSTRAINT {found[1]}" if found[1].strip('"') in keys else None
    if found := re.search(r"\bON\s+CONFLICT\s*\(([^)]*)\)", text.sql, re.IGNORECASE):
        columns = {column.strip().strip('"') for column in found[1].split(",")}
        return None if shape.spec.column in columns else f"({found[1].strip()})"
    return None


def asks_for_sequence(text: Text, shape: TableShape) -> bool:
    """Whether a statement asks which sequence the table owns: none, while two tables use it."""
    asks = re.search(r"pg_get_serial_sequence\s*\(\s*('[^']*'|\$\d+)", text.sql, re.IGNORECASE)
    return asks is not None and (asks[1].startswith("$") or shape.spec.name in asks[1])


_REPEATABLE = """
SELECT concat_ws(' in ', CASE WHEN s.setrole <> 0 THEN format('role %s', pg_get_userbyid(s.setrole)) END,
                 CASE WHEN s.setdatabase <> 0 THEN 'this database' END)
FROM pg_db_role_setting s CROSS JOIN LATERAL unnest(s.setconfig) AS c (setting)
WHERE s.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
  AND c.setting ~ '^default_transaction_isolation=(repeatable read|serializable)$'
UNION
SELECT 'this server' FROM pg_settings
WHERE name = 'default_transaction_isolation' AND reset_val IN ('repeatable read', 'serializable')
  AND source IN ('configuration file', 'command line', 'environment variable')
ORDER BY 1
"""


def repeatable_read(conn: Connection) -> Iterator[str]:
    """Whose transactions are REPEATABLE READ or SERIALIZABLE by default."""
    for (whose,) in execute(conn, statement(_REPEATABLE)).all():
        yield whose
