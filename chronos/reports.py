"""What the nightly jobs did, stored in the database: one small table in each schema, see sql/reports.sql.

The Celery worker and `upkeep` write the same reports, `status` reads them, and they say which nights are
done. A row counts only in the database where it was written: rows restored from a dump are not shown. The
owner of the table can put triggers on it, so it is used only when it belongs to a role whose functions the
jobs call anyway.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any

from psycopg2 import sql
from sqlalchemy.engine import Connection

from chronos import commands
from chronos.catalog.ddl import script
from chronos.db import Statement, execute, joined, name, statement
from chronos.errors import ChronosError
from chronos.table import TableSpec, quoted

Report = dict[str, Any]

NAME = "chronos_reports"
KEPT_DAYS = 35
# The comment on it begins with this: the application may have a table of that name.
_COMMENT = "chronos: "


class UntrustedError(ChronosError):
    """The reports can be neither read nor stored: the table is not ours, or the role may not use it."""


@dataclass(frozen=True)
class Kept:
    """One report: ``run`` is the task or the process, ``writer`` who wrote it."""

    job: str
    run: str
    night: date
    writer: str
    started: datetime
    result: str
    report: Report


@dataclass(frozen=True)
class History:
    """What a job did with one table: its last report, when it last did everything, and on how many nights
    since then it did not.
    """

    last: Report = field(default_factory=dict)
    succeeded: datetime | None = None
    contended_nights: int = 0


# Only an owner the table's owner must trust, and no view or policy: any other could call anything.
_STANDING = """
SELECT pg_get_userbyid(c.relowner),
       c.relkind = 'r' AND NOT c.relrowsecurity AND starts_with(obj_description(c.oid, 'pg_class'), {ours})
       AND (o.rolsuper OR o.rolname = current_user OR pg_has_role(c.relowner, t.relowner, 'MEMBER')
            OR pg_has_role(c.relowner, n.nspowner, 'MEMBER') AND w.rolsuper IS NOT TRUE),
       has_table_privilege(c.oid, 'SELECT'),
       has_table_privilege(c.oid, 'INSERT') AND has_table_privilege(c.oid, 'UPDATE')
       AND has_table_privilege(c.oid, 'DELETE'),
       t.oid IS NULL OR has_table_privilege(t.relowner, c.oid, 'SELECT')
FROM pg_class c
JOIN pg_roles o ON o.oid = c.relowner
JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_class t ON t.relnamespace = n.oid AND t.relname = {table}
LEFT JOIN pg_roles w ON w.oid = t.relowner
WHERE n.nspname = {schema} AND c.relname = {reports}
"""


def _standing(conn: Connection, table: TableSpec) -> tuple[str, bool, bool, bool, bool] | None:
    """The owner of the reports, and whether they are trusted, readable, writable, and readable by the owner
    of the table.
    """
    query = statement(_STANDING, schema=table.home, table=table.name, reports=NAME, ours=_COMMENT)
    found = execute(conn, query).one_or_none()
    return tuple(found) if found else None


def _is_there(conn: Connection, table: TableSpec, *, to_write: bool = False) -> bool:
    found = _standing(conn, table)
    if found is None:
        return False
    owner, trusted, readable, writable, _ = found
    reports = f"{quoted(table.home)}.{NAME}"
    if not trusted:
        raise UntrustedError(
            f"{reports} belongs to {owner}, not to the owner of {table.typed} or of its schema, or is not the"
            " plain table that chronos created, whose comment says so; look at it, then rename it or drop it:"
            " the next run creates it again"
        )
    if not (writable if to_write else readable):
        grant = "SELECT, INSERT, UPDATE, DELETE" if to_write else "SELECT"
        user = quoted(execute(conn, statement("SELECT current_user::text")).scalar_one())
        raise UntrustedError(
            f"{user} may not {'write' if to_write else 'read'} {reports}; as {owner}, run:"
            f" GRANT {grant} ON {reports} TO {user};"
        )
    return True


def _require_create(conn: Connection, table: TableSpec, owner: str) -> None:
    query = statement("SELECT has_schema_privilege({s}, 'CREATE'), current_user::text", s=table.home)
    may, user = execute(conn, query).one()
    if not may:
        reports = f"{quoted(table.home)}.{NAME}"
        raise UntrustedError(
            f"{quoted(user)} may not create {reports}; let {owner} run {commands.upkeep()} once to create"
            f" it, then: GRANT SELECT, INSERT, UPDATE, DELETE ON {reports} TO {quoted(user)};"
        )


def _name(table: TableSpec) -> sql.Identifier:
    return name(table.home, NAME)


def _origin(conn: Connection) -> str:
    """What distinguishes this database from every other: the server's identifier and its own.

    If the role may not read the server's, the name of the database takes its place.
    """
    query = statement("SELECT has_function_privilege('pg_control_system()', 'EXECUTE')")
    server = "(SELECT system_identifier::text FROM pg_control_system())"
    who = sql.SQL(server if execute(conn, query).scalar_one() else "current_database()")
    query = statement(
        "SELECT concat({who}, '/', oid) FROM pg_database WHERE datname = current_database()", who=who
    )
    found: str = execute(conn, query).scalar_one()
    return found


_READ = """
SELECT DISTINCT ON (job)
       job, report, s.succeeded,
       (SELECT count(DISTINCT n.night) FROM {reports} n
        WHERE n.job = r.job AND n.table_name = {table} AND n.origin = {origin} AND n.result = 'incomplete'
          AND n.night > coalesce(s.night, '-infinity'))
FROM {reports} r
CROSS JOIN LATERAL (SELECT max(d.reported) AS succeeded, max(d.night) AS night FROM {reports} d
                    WHERE d.job = r.job AND d.table_name = {table} AND d.origin = {origin}
                      AND d.result = 'done') s
WHERE table_name = {table} AND origin = {origin} AND job IN ({jobs})
ORDER BY job, reported DESC
"""


def read(conn: Connection, table: TableSpec, jobs: Collection[str]) -> dict[str, History]:
    """What each of ``jobs`` did with a located ``table`` in this very database.

    Call it inside ``db.transaction``; ACCESS SHARE on the reports. Raises UntrustedError.
    """
    found = dict.fromkeys(jobs, History())
    if _is_there(conn, table):
        query = statement(
            _READ,
            reports=_name(table),
            table=table.name,
            origin=_origin(conn),
            jobs=joined([sql.Literal(job) for job in jobs]),
        )
        for job, report, succeeded, nights in execute(conn, query):
            found[job] = History(report, succeeded, nights)
    return found


def find(conn: Connection, table: TableSpec, job: str, run: str) -> Report:
    """What ``run`` reported for ``job``, or an empty report; locks and errors as ``read``."""
    return next(iter(_reports(conn, table, job, statement("run = {run}", run=run))), {})


def of_night(conn: Connection, table: TableSpec, job: str, night: date, run: str) -> list[Report]:
    """What runs other than ``run`` reported for ``job`` and ``night``, newest first; else as ``read``."""
    which = statement("night = {night}::date AND run <> {run}", night=night.isoformat(), run=run)
    return _reports(conn, table, job, which)


def _reports(conn: Connection, table: TableSpec, job: str, which: Statement) -> list[Report]:
    if not _is_there(conn, table):
        return []
    query = statement(
        "SELECT report FROM {reports} WHERE job = {job} AND table_name = {table} AND origin = {origin}"
        " AND {which} ORDER BY reported DESC",
        reports=_name(table),
        job=job,
        table=table.name,
        which=which,
        origin=_origin(conn),
    )
    return [row[0] for row in execute(conn, query)]


def keep(conn: Connection, table: TableSpec, kept: Kept, *, make: bool = True) -> None:
    """Store a report of a located ``table``, replace that of the same run, and delete those a month old.

    ``make``: create the table of reports if there is none. Call it inside ``db.transaction``; ROW EXCLUSIVE
    on the reports. Raises UntrustedError, or DBAPIError when the role may not write.
    """
    standing = _standing(conn, table)
    if standing is None and not make:
        return
    if standing is None or not standing[-1]:
        owner = statement(
            "SELECT pg_get_userbyid(c.relowner) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname = {s} AND c.relname = {t}",
            s=table.home,
            t=table.name,
        )
        owner_name = execute(conn, owner).scalar_one()
        if standing is None:
            _require_create(conn, table, owner_name)
        execute(conn, script("reports.sql", table, owner=owner_name))
    _is_there(conn, table, to_write=True)
    query = statement(
        "DELETE FROM {reports} WHERE table_name = {table} AND reported < now() - {days} * interval '1 day';"
        "INSERT INTO {reports} (job, table_name, run, night, origin, writer, started, result, report)"
        " VALUES ({job}, {table}, {run}, {night}::date, {origin}, {writer}, {started}::timestamptz, {result},"
        " {report}::jsonb)"
        " ON CONFLICT (job, table_name, run) DO UPDATE SET reported = clock_timestamp(),"
        " (night, origin, writer, started, result, report)"
        " = (excluded.night, excluded.origin, excluded.writer, excluded.started, excluded.result,"
        " excluded.report)",
        reports=_name(table),
        table=table.name,
        days=KEPT_DAYS,
        job=kept.job,
        run=kept.run,
        night=kept.night.isoformat(),
        origin=_origin(conn),
        writer=kept.writer,
        started=kept.started.isoformat(),
        result=kept.result,
        report=json.dumps(kept.report),
    )
    execute(conn, query)


_DROP_UNUSED = """
DO $do$
DECLARE
    reports CONSTANT regclass := to_regclass(format('%I.%I', {schema}, {reports}));
BEGIN
    IF reports IS NULL OR NOT (SELECT c.relkind = 'r' AND pg_has_role(c.relowner, 'USAGE')
                                      AND starts_with(obj_description(c.oid, 'pg_class'), {ours})
                               FROM pg_class c WHERE c.oid = reports) IS TRUE THEN
        RETURN;
    END IF;
    IF EXISTS (SELECT FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
               WHERE n.nspname = {schema} AND p.proname = 'chronos_drop_partitions') THEN
        EXECUTE format('DELETE FROM %s WHERE table_name = %L', reports, {table});
    ELSE
        BEGIN
            EXECUTE format('DROP TABLE %s', reports);
        EXCEPTION WHEN dependent_objects_still_exist THEN  -- for example a view that reads it
            EXECUTE format('DELETE FROM %s', reports);
        END;
    END IF;
END
$do$"""


def drop_unused_statement(table: TableSpec) -> Statement:
    """Delete the reports of a table that is plain again; drop them all if it was the last in its schema."""
    return statement(_DROP_UNUSED, schema=table.home, reports=NAME, table=table.name, ours=_COMMENT)
