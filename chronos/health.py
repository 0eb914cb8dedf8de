"""The state of a table, its partitions and the nightly jobs, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import redis
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from chronos import commands, reports
from chronos.agreement import as_it_is, contradictions
from chronos.catalog import citus
from chronos.catalog.locate import locate, require_located
from chronos.catalog.partitions import (
    Detached,
    Partition,
    attached,
    detached,
    droppable,
    expired,
    expires_on,
    missing,
    runway,
)
from chronos.db import connect_engine, execute, is_lock_failure, joined, name, render, statement, transaction
from chronos.errors import ChronosError, ExitCode, RefusedError
from chronos.functions import VERSION, grace_days, grace_disagrees
from chronos.job_lock import connect, holder
from chronos.jobs import CREATE, DROP, JOBS, Job, last_due, next_due
from chronos.migration import state as migration_state
from chronos.migration.attach import check_is_valid
from chronos.migration.console import counted, for_reading, in_bytes
from chronos.migration.old_and_new import renamed_by_hand
from chronos.migration.operator import at_work
from chronos.migration.state import Phase, State, describe, not_to_be_dropped, what_becomes_of
from chronos.reports import History, UntrustedError
from chronos.settings import CONFIGURATION, Settings
from chronos.table import Interval, Period, TableSpec, midnight, quoted

_LOCK_TIMEOUT_MS = 1_000
_SHORT_RUNWAY_DAYS = 7
_JOB_OVERDUE = timedelta(hours=26)
# A job retries for nearly an hour; its work is not overdue before that.
_JOB_TAKES = timedelta(hours=1)
_CLOCK_TOLERANCE_S = 60
_BAR_WIDTH = 30
# A table that is ready works as before, but its notes pile up until somebody swaps it or rolls back.
_READY_LONG = timedelta(days=7)
_MANY_NOTES = 1_000_000
# Phases in which a migration may stay while nobody is working on it.
_AT_REST = (Phase.READY, Phase.MIGRATED)
# A table that will become a partition rejects rows at and past its bound. With less than a day left, it is
# too late to resume.
_BOUND_SOON = timedelta(days=3)
_TOO_LATE = timedelta(days=1)


@dataclass(frozen=True)
class JobStatus:
    """What a job did with a table, and which Celery worker is running it now."""

    history: History
    running: str | None = None

    @property
    def report(self) -> dict[str, Any]:
        """The report of its last run; empty before the first."""
        return self.history.last

    @property
    def succeeded(self) -> datetime | None:
        """When it last did everything it had to do."""
        return self.history.succeeded


@dataclass(frozen=True)
class TableSize:
    """A table's size: rows as the planner estimates them, bytes with indexes and TOAST."""

    rows_estimate: int
    bytes: int


@dataclass(frozen=True)
class Status:
    """Everything known about a table; times are UTC, ``now`` is the database server's.

    ``functions`` maps the installed SQL functions to their version, ``stray`` locates rows that no drop will
    remove. ``notes_waiting`` counts the notes of a migration that is ready, up to a million. ``detached`` are
    the former partitions waiting to be dropped, ``grace_days`` is how long the function leaves a partition
    detached. ``in_citus`` is the kind of Citus table it is; sizes then include all nodes. ``at_work`` is who
    is running the migration now. ``refused_from`` is the time from which a table that will become a partition
    rejects rows. ``jobs`` is what the nightly jobs did with this table, None when that is unknown; ``listed``
    says whether they maintain it, ``by_celery`` whether Celery runs them, or cron with `upkeep`.
    ``contradictions`` are what the configuration gets wrong; ``table`` has the real column and interval.
    ``notices`` say what you may type next, ``problems`` what you must (empty when all is well).
    """

    server: str
    table: TableSpec
    now: datetime
    clock_ahead_s: float
    partitioned: bool
    migration: State | None
    at_work: str | None
    by_hand: str | None
    partitions: tuple[Partition, ...]
    functions: dict[str, int]
    old_table: TableSize | None
    stray: tuple[str, ...]
    next_drop: datetime
    notes_waiting: int | None = None
    refused_from: datetime | None = None
    detached: tuple[Detached, ...] = ()
    grace_days: int = 0
    in_citus: str | None = None
    jobs: dict[str, JobStatus] | None = None
    listed: bool = True
    by_celery: bool = True
    contradictions: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    problems: tuple[str, ...] = field(default=())

    @property
    def today(self) -> date:
        """The UTC day of the server's clock."""
        return self.now.date()

    @property
    def healthy(self) -> bool:
        """Whether nothing needs to be done."""
        return not self.problems

    @property
    def state(self) -> str:
        """`plain`, `migrating`, `ready`, `migrated`, `rolling back`, `finalizing` or `finalized`."""
        if self.migration is not None and self.migration.phase is not Phase.MIGRATED:
            phases = {
                Phase.READY: "ready",
                Phase.RETURNING: "rolling back",
                Phase.UNDONE: "rolling back",
                Phase.FINALIZING: "finalizing",
            }
            return phases.get(self.migration.phase, "migrating")
        if not self.partitioned:
            return "plain"
        return "finalized" if self.migration is None and self.old_table is None else "migrated"

    @property
    def oldest(self) -> date | None:
        """The first day that has a partition."""
        return min((p.lower.date() for p in self.partitions if p.lower), default=None)

    @property
    def newest(self) -> date | None:
        """The last day that has a partition."""
        last = max((p.upper for p in self.partitions if p.upper), default=None)
        return (last - timedelta(microseconds=1)).date() if last else None

    @property
    def history(self) -> Partition | None:
        """The partition that the original table has become."""
        return next((p for p in self.partitions if p.name == self.table.history and p.lower is None), None)

    @property
    def missing(self) -> list[Period]:
        """Periods without a partition: within retention, between oldest and newest, and in the days ahead."""
        if not self.partitioned:
            return []
        lowers = [p.lower for p in self.partitions if p.lower]
        uppers = [p.upper for p in self.partitions if p.upper]
        ahead = self.table.wanted(self.now, back=False)
        first, end = min([*lowers, ahead[0].start]), max([*uppers, ahead[-1].end])
        if self.table.retention_days is not None:  # a drop may leave behind one that is still being read
            first = max(first, midnight(self.today - timedelta(days=self.table.retention_days)))
        return missing(self.partitions, self.table.periods(first, end))

    @property
    def runway_days(self) -> int:
        """How many days after today have a partition for inserts."""
        return runway(self.partitions, self.table, self.now)

    @property
    def copied(self) -> tuple[int, int] | None:
        """How many periods are copied and compared, out of how many; None when no migration is copying."""
        migration = self.migration
        if migration is None or migration.phase not in (Phase.BUILT, Phase.COPYING):
            return None
        past = [p for p in migration.plan.periods if p.start <= migration.plan.started_at]
        return sum(p.start in migration.compared for p in past), len(past)

    def next_drops(self) -> list[str]:
        """The partitions that the next run of the drop job will drop."""
        return [p.name for p in droppable(self.partitions, self.next_drop.date(), self.table.retention_days)]

    def as_json(self) -> dict[str, Any]:
        """What ``status --json`` prints."""
        return {
            "table": self.table.typed,
            "state": self.state,
            "healthy": self.healthy,
            "problems": list(self.problems),
            "notices": list(self.notices),
            "migration": self._migration_as_json(),
            "partitions": len(self.partitions),
            "oldest": self.oldest and self.oldest.isoformat(),
            "newest": self.newest and self.newest.isoformat(),
            "missing": [str(period) for period in self.missing],
            "runway_days": self.runway_days,
            "functions_installed": set(self.functions) == set(self.table.functions),
            "old_table": vars(self.old_table) if self.old_table else None,
            "history": self._history_as_json(),
            "citus": self.in_citus,
            "detached": [
                {"name": d.name, "bytes": d.bytes, "drop_on": d.drop_on and d.drop_on.isoformat()}
                for d in self.detached
            ],
            "next_drop": {"at": self.next_drop.isoformat(), "partitions": self.next_drops()},
            "jobs": None
            if self.jobs is None
            else {
                name: {
                    "last_run": job.report.get("started"),
                    "result": job.report.get("status"),
                    "last_success": job.succeeded and job.succeeded.isoformat(timespec="seconds"),
                    "contended_nights": job.history.contended_nights,
                    "running": job.running,
                    "report": job.report or None,
                }
                for name, job in self.jobs.items()
            },
            "partition_list": [
                {
                    "name": p.name,
                    "from": p.lower and p.lower.isoformat(),
                    "to": p.upper and p.upper.isoformat(),
                    "rows_estimate": p.rows_estimate,
                    "bytes": p.bytes,
                }
                for p in self.partitions
            ],
            "checked_at": self.now.isoformat(timespec="seconds"),
        }

    def _migration_as_json(self) -> dict[str, Any] | None:
        if self.migration is None:
            return None
        changed = self.migration.changed_at
        return {
            "phase": self.migration.phase.value,
            "since": changed and changed.astimezone(UTC).isoformat(timespec="seconds"),
            "running": self.at_work is not None,
            "by": self.at_work,
            "periods_copied": self.copied and self.copied[0],
            "periods": self.copied and self.copied[1],
            "notes_waiting": self.notes_waiting,
            "inserts_fail_from": self.refused_from and self.refused_from.isoformat(timespec="seconds"),
            "verified": self.migration.verified,
        }

    def _history_as_json(self) -> dict[str, Any] | None:
        if self.history is None or self.history.upper is None:
            return None
        goes = expires_on(self.history.upper, self.table.retention_days)
        return {
            "name": self.history.name,
            "until": self.history.upper.isoformat(),
            "rows_estimate": self.history.rows_estimate,
            "bytes": self.history.bytes,
            "goes_on": goes and goes.isoformat(),
        }


@dataclass(frozen=True)
class Unknown:
    """A table that could not be examined, and why."""

    table: TableSpec
    error: ChronosError
    healthy: bool = False

    @property
    def problems(self) -> tuple[str, ...]:
        """The error, as the only problem."""
        return (str(self.error),)

    def as_json(self) -> dict[str, Any]:
        """What ``status --json`` prints."""
        return {"table": self.table.typed, "state": None, "healthy": False, "problems": list(self.problems)}


@dataclass(frozen=True)
class Other:
    """A table with a migration that no file lists. ``phase`` None: this role may not read it; ``healthy``
    false: it is half done, and nobody is working on it.
    """

    table: TableSpec
    phase: Phase | None
    healthy: bool

    def __str__(self) -> str:
        phase = self.phase.value if self.phase else "unknown"
        return (
            f"also under way, not listed in {CONFIGURATION}: {self.table.typed} ({phase});"
            f" {commands.status(self.table)}"
        )

    def as_json(self) -> dict[str, Any]:
        """What ``status --json`` prints."""
        return {"table": self.table.typed, "phase": self.phase and self.phase.value, "healthy": self.healthy}


@dataclass(frozen=True)
class Overview:
    """What ``overview`` found: the ``tables`` that a configuration lists, in its order, and the ``others``
    that have a migration under way.
    """

    tables: tuple[Status | Unknown, ...]
    others: tuple[Other, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether nothing needs to be done."""
        return all(one.healthy for one in (*self.tables, *self.others))

    @property
    def exit_code(self) -> ExitCode:
        """What ``chronos status`` returns to the shell."""
        if self.healthy:
            return ExitCode.DONE
        unknown = [one.error.exit_code for one in self.tables if isinstance(one, Unknown)]
        return max(unknown, default=ExitCode.FAILED)

    def as_json(self) -> dict[str, Any]:
        """What ``status --json`` prints; for a single table, as ``Status.as_json``."""
        shown = [one.as_json() for one in self.tables]
        whole: dict[str, Any] = shown[0] if len(shown) == 1 else {"tables": shown}
        return {**whole, "healthy": self.healthy, "also_under_way": [one.as_json() for one in self.others]}


@dataclass(frozen=True)
class _Leases:
    """Which Celery worker runs which job; ``unreachable`` says why that is unknown."""

    holders: dict[str, str | None] = field(default_factory=dict)
    unreachable: str | None = None


def collect(
    settings: Settings,
    table: TableSpec | None = None,
    *,
    listed: bool = True,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Status:
    """Inspect the database, and Redis if there is one, for problems; ``clock`` is this machine's.

    ``table`` defaults to the first in the settings; ``listed`` says whether the jobs maintain it. Takes only
    ACCESS SHARE on the tables, waiting at most 1 s. Redis may be down. Raises ChronosError when the table is
    locked, RefusedError when it does not exist, lacks its time column or no database is set, DBAPIError when
    the server cannot be reached.
    """
    return _collect(settings, table or settings.tables[0], listed, clock, _leases(settings))


def collect_all(settings: Settings) -> list[Status | Unknown]:
    """``collect`` for every table in the settings; trouble with one does not hide the others.

    Raises DBAPIError when the server cannot be reached.
    """
    leases = _leases(settings)
    found: list[Status | Unknown] = []
    for table in settings.tables:
        try:
            found.append(_collect(settings, table, True, lambda: datetime.now(UTC), leases))
        except ChronosError as error:
            found.append(Unknown(table, error))
    return found


# The comment distinguishes the state of a migration from another table with such a name.
_STATES = """
SELECT n.nspname, c.relname, has_table_privilege(c.oid, 'SELECT') AND has_schema_privilege(n.oid, 'USAGE')
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND right(c.relname, length({suffix})) = {suffix}
  AND starts_with(obj_description(c.oid, 'pg_class'), {comment})
ORDER BY 1, 2
"""


def collect_others(settings: Settings) -> list[Other]:
    """The tables with a migration that the settings do not list.

    ACCESS SHARE on the states of the migrations. Raises DBAPIError when the server cannot be reached.
    """
    with connect_engine(settings.database, application_name="chronos status").connect() as conn:
        known = {(table.schema, table.name) for spec in settings.tables if (table := locate(conn, spec))}
        suffix = TableSpec("").state
        others = []
        with transaction(conn, lock_timeout_ms=_LOCK_TIMEOUT_MS):
            execute(conn, statement("SET TRANSACTION READ ONLY"))
            query = statement(_STATES, suffix=suffix, comment=migration_state.COMMENT)
            for schema, relation, readable in execute(conn, query).all():
                table = TableSpec(relation.removesuffix(suffix), schema=schema)
                if (table.schema, table.name) in known:
                    continue
                found = migration_state.read(conn, table) if readable else None
                healthy = found is None or found.phase in _AT_REST or at_work(conn, table) is not None
                others.append(Other(table, found.phase if found else None, healthy))
    return others


def _leases(settings: Settings) -> _Leases:
    if not settings.redis_url:
        return _Leases()
    try:
        with closing(connect(settings)) as client:
            return _Leases({job.name: holder(client, job.name) for job in JOBS})
    except (redis.RedisError, ChronosError) as error:
        return _Leases(unreachable=f"Celery cannot run the nightly jobs: Redis does not answer ({error})")


def _collect(
    settings: Settings, wanted: TableSpec, listed: bool, clock: Callable[[], datetime], leases: _Leases
) -> Status:
    with connect_engine(settings.database, application_name="chronos status").connect() as conn:
        located = require_located(conn, wanted, settings.listed_in if wanted in settings.tables else None)
        try:
            with transaction(conn, lock_timeout_ms=_LOCK_TIMEOUT_MS):
                found = _look(conn, located, settings, clock)
                jobs, unknown = _jobs(conn, located, leases) if listed else (None, None)
        except DBAPIError as error:
            if not is_lock_failure(error):
                raise
            raise ChronosError(
                f"somebody has locked {located.typed} or one of its partitions for more than"
                f" {_LOCK_TIMEOUT_MS // 1000} s; look at pg_locks, or try again"
            ) from error
    found = replace(found, listed=listed, jobs=jobs)
    problems = [*found.contradictions, *judge(found, settings)]
    if listed:
        problems += filter(None, (unknown, leases.unreachable))
    return replace(found, notices=tuple(_notices(found)), problems=tuple(problems))


def _jobs(
    conn: Connection, table: TableSpec, leases: _Leases
) -> tuple[dict[str, JobStatus] | None, str | None]:
    """What the jobs did with a table, or why that is unknown."""
    try:
        histories = reports.read(conn, table, [job.name for job in JOBS])
    except UntrustedError as error:
        return None, f"what the nightly jobs did is unknown: {error}"
    return {job: JobStatus(history, leases.holders.get(job)) for job, history in histories.items()}, None


def _look(conn: Connection, table: TableSpec, settings: Settings, clock: Callable[[], datetime]) -> Status:
    execute(conn, statement("SET TRANSACTION READ ONLY; SET LOCAL statement_timeout = '10s'"))
    said, table = table, as_it_is(conn, table)
    _require_time_column(conn, table)
    before = clock()
    now: datetime = execute(conn, statement("SELECT clock_timestamp()")).scalar_one().astimezone(UTC)
    ours = before + (clock() - before) / 2
    migration = migration_state.read(conn, table, only_to_show=True)
    partitions = tuple(attached(conn, table))
    if in_citus := citus.manages(conn, table.home, table.name):
        sizes = citus.sizes(conn, table.home, table.name)
        partitions = tuple(replace(p, bytes=sizes.get(p.name, p.bytes)) for p in partitions)
    return Status(
        server=f"{settings.database.database} on {settings.database.host or 'a local socket'}",
        table=table,
        now=now,
        clock_ahead_s=(now - ours).total_seconds(),
        partitioned=_table(conn, table.home, table.name, "p") is not None,
        migration=migration,
        at_work=at_work(conn, table),
        by_hand=_by_hand(conn, migration) if migration else None,
        partitions=partitions,
        functions=_functions(conn, table),
        old_table=_table(conn, table.home, table.old, "r"),
        stray=tuple(_stray(conn, table, partitions, now.date())),
        next_drop=next_due(DROP, settings, now) if settings.redis_url else now,
        by_celery=bool(settings.redis_url),
        notes_waiting=_notes_waiting(conn, table, migration) if migration else None,
        contradictions=tuple(contradictions(said, table, settings.listed_in)),
        refused_from=_refused_from(conn, migration) if migration else None,
        detached=tuple(detached(conn, table)),
        grace_days=grace_days(conn, table),
        in_citus=in_citus,
    )


def _require_time_column(conn: Connection, table: TableSpec) -> None:
    lacking = execute(
        conn,
        statement(
            "SELECT to_regclass(t) IS NOT NULL AND NOT EXISTS (SELECT FROM pg_attribute"
            " WHERE attrelid = to_regclass(t) AND attname = {column} AND attnum > 0 AND NOT attisdropped)"
            " FROM format('%I.%I', {schema}, {table}) AS t",
            schema=table.home,
            table=table.name,
            column=table.column,
        ),
    ).scalar_one()
    if lacking:
        raise RefusedError(
            f"{table.typed} has no column {table.column}; name the time column in the configuration"
            " [no-time-column]"
        )


def _table(conn: Connection, schema: str, table: str, kind: str) -> TableSize | None:
    row = execute(
        conn,
        statement(
            "SELECT greatest(c.reltuples, 0)::bigint, coalesce(pg_total_relation_size(c.oid), 0)"
            " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname = {schema} AND c.relname = {table} AND c.relkind = {kind}",
            schema=schema,
            table=table,
            kind=kind,
        ),
    ).one_or_none()
    return TableSize(*row) if row else None


def _functions(conn: Connection, table: TableSpec) -> dict[str, int]:
    """The installed functions with the version that their comment gives; 0 when it gives none."""
    rows = execute(
        conn,
        statement(
            "SELECT p.proname,"
            " coalesce(substring(obj_description(p.oid, 'pg_proc') FROM '^chronos (\\d+):'), '0')"
            " FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace"
            " WHERE n.nspname = {schema} AND p.proname IN ({functions})"
            " AND p.proargtypes::text = 'integer'::regtype::oid::text",
            schema=table.home,
            functions=joined([statement("{f}", f=function) for function in table.functions]),
        ),
    ).all()
    return {function: int(version) for function, version in rows}


def _by_hand(conn: Connection, migration: State) -> str | None:
    table = migration.table
    if migration_state.undone_by_hand(conn, migration):
        return (
            f"{quoted(migration.plan.former)} was renamed back to {quoted(table.name)} by hand; remove what"
            f" is left of the migration with: {commands.rollback(table)}"
        )
    if migration_state.finalized_by_hand(conn, migration):
        who = "by retention, or by hand" if migration.plan.attaches else "by hand"
        return renamed_by_hand(conn, table) or (
            f"{quoted(migration.plan.former)} was dropped {who}; remove what is left of the migration with:"
            f" {commands.finalize(table)}"
        )
    return None


def _notes_waiting(conn: Connection, table: TableSpec, migration: State) -> int | None:
    """How many notes must be replayed before the swap, at most a million; None in other phases."""
    if migration.phase is not Phase.READY or migration.plan.attaches:
        return None
    query = statement(
        "SELECT count(*) FROM (SELECT FROM {changes} WHERE chronos_origin = 'o' LIMIT {most}) n",
        changes=name(table.home, table.changes),
        most=_MANY_NOTES,
    )
    found: int = execute(conn, query).scalar_one()
    return found


def _refused_from(conn: Connection, migration: State) -> datetime | None:
    """When the CHECK of a table that will become a partition starts rejecting rows; None without one."""
    if not migration.plan.attaches or check_is_valid(conn, migration.table, migration.table.name) is None:
        return None
    return migration.plan.first


def _stray(conn: Connection, table: TableSpec, partitions: Iterable[Partition], today: date) -> Iterator[str]:
    """Locate rows that retention should have removed, or that no period's partition has. ACCESS SHARE."""
    partitions = list(partitions)
    going = {p.name for p in expired(partitions, today, table.retention_days)}
    for partition in partitions:
        if partition.detach_pending or partition.name in going:
            continue
        if partition.name == table.history and partition.lower is None:
            continue  # dropped whole, once its last row has expired
        leaf = name(partition.schema, partition.name)
        is_default = partition.lower is None and partition.upper is None
        if table.retention_days is not None:
            cutoff = midnight(today - timedelta(days=table.retention_days))
            if not is_default and partition.lower is not None and partition.lower >= cutoff:
                continue
            old = statement(
                "{column} < {cutoff}", column=name(table.column), cutoff=f"{cutoff:%Y-%m-%d %H:%M:%S}+00"
            )
            if _any(conn, statement("SELECT FROM {leaf} WHERE {old}", leaf=leaf, old=old)):
                delete = render(conn, statement("DELETE FROM {leaf} WHERE {old};", leaf=leaf, old=old))
                yield (
                    f"{partition.name} holds rows older than {cutoff:%Y-%m-%d} that no drop will remove:"
                    f" {delete}"
                )
                continue
        if is_default and _any(conn, statement("SELECT FROM {leaf}", leaf=leaf)):
            yield (
                f"the default partition {partition.name} holds rows: partitions for their time cannot be"
                " created while they are there; move or delete them"
            )


def _any(conn: Connection, query: Any) -> bool:
    found: bool = execute(conn, statement("SELECT EXISTS ({query})", query=query)).scalar_one()
    return found


def judge(status: Status, settings: Settings) -> list[str]:
    """The problems in ``status``, most urgent first; each line says what to type."""
    problems = [*_migration_problems(status)]
    if status.partitioned and (status.migration is None or status.migration.phase is Phase.MIGRATED):
        problems += _function_problems(status)
        problems += _partition_problems(status, settings)
        problems += _job_problems(status) if status.listed else _not_listed(status)
    if abs(status.clock_ahead_s) > _CLOCK_TOLERANCE_S:
        direction = "ahead of" if status.clock_ahead_s > 0 else "behind"
        problems.append(
            f"the clock of the database server is {abs(status.clock_ahead_s):.0f} s {direction}"
            " this machine's; correct one of them"
        )
    return problems


def _migration_problems(status: Status) -> Iterator[str]:
    table, migration = status.table, status.migration
    if status.by_hand:
        yield status.by_hand
    elif migration is not None:
        yield from _half_done(status, migration)
    elif not status.partitioned:
        yield (
            f"{table.typed} is a plain table, and nothing limits its size; migrate it with:"
            f" {commands.start(table)}"
        )
    elif status.old_table is not None:
        yield (
            f"{quoted(table.old)} exists, but there is no record of its migration; if it is not needed:"
            f" DROP TABLE {_qualified(table, table.old)};"
        )


def _half_done(status: Status, migration: State) -> Iterator[str]:
    table, phase, attaches = migration.table, migration.phase, migration.plan.attaches
    resume, undo = f"{commands.migrate(table)} --resume", commands.rollback(table)
    refused_from = status.refused_from
    if refused_from is not None and refused_from - status.now < _BOUND_SOON:
        late = phase is Phase.UNDONE or refused_from - status.now < _TOO_LATE
        yield f"{_refusal(status)}, because its migration is half done; " + (
            f"undo it with: {undo}; then start again"
            if late
            else f"finish it with: {resume}; or undo it with: {undo}"
        )
    elif phase is Phase.READY:
        since = migration.changed_at
        if (since and status.now - since > _READY_LONG) or (status.notes_waiting or 0) >= _MANY_NOTES:
            more = "" if attaches else ", and more every hour"
            yield f"{_ready(status)}{more}; swap with: {resume}; or undo it with: {undo}"
    elif status.at_work:
        return
    elif phase is Phase.MIGRATED:
        if not migration.verified:
            yield f"{describe(migration)} " + (
                f"Its foreign keys are not yet those of the whole table; carry on with: {resume}"
                if attaches
                else "The rows written shortly before the swap were not compared again; compare them with:"
                f" {resume}"
            )
    else:
        carry_on = {
            Phase.BUILT: f"Carry on with: {resume}; or undo it with: {undo}",
            Phase.COPYING: f"Carry on with: {resume}; or undo it with: {undo}",
            Phase.RETURNING: f"Finish with: {undo}; or call it off, and stay partitioned: {resume}",
            Phase.UNDONE: f"Finish with: {undo}",
            Phase.FINALIZING: f"Finish with: {commands.finalize(table)}",
        }[phase]
        if refused_from is not None:
            carry_on = f"In this state, {_refusal(status)}. {carry_on}"
        what = "the rollback of " if phase in (Phase.RETURNING, Phase.UNDONE) else ""
        yield (
            f"{what}a migration started at {migration.plan.started_at:%Y-%m-%d %H:%M} UTC is half done, and"
            f" nobody is working on it. {describe(migration)} {carry_on}"
        )


def _refusal(status: Status) -> str:
    """When a table that will become a partition starts rejecting rows."""
    assert status.refused_from is not None
    when = f"{status.refused_from:%Y-%m-%d %H:%M} UTC"
    since = f"since {when}" if status.refused_from <= status.now else f"from {when} on"
    return f"inserts into {status.table} fail {since}"


def _ready(status: Status) -> str:
    """`ready since 2025-10-22 13:05 UTC, 1,234 notes to replay`, for a migration that waits for its swap."""
    assert status.migration is not None
    since = status.migration.changed_at
    when = f" since {since.astimezone(UTC):%Y-%m-%d %H:%M} UTC" if since else ""
    if status.migration.plan.attaches:
        return f"ready{when}, {_refusal(status)}" if status.refused_from else f"ready{when}"
    count = status.notes_waiting or 0
    notes = f"{count:,}{' or more' if count >= _MANY_NOTES else ''}"
    return f"ready{when}, {notes} {'note' if count == 1 else 'notes'} to replay"


def _notices(status: Status) -> Iterator[str]:
    """What you may type next, although nothing is wrong."""
    migration = status.migration
    for kept in (d for d in status.detached if d.drop_on is None):
        yield (
            f"retention detached {kept.name}, and somebody has changed it or its comment since, so it"
            f" stays; if nobody needs it: DROP TABLE {quoted(kept.schema)}.{quoted(kept.name)};"
        )
    if migration is not None and migration.plan.attaches and migration.phase is Phase.MIGRATED:
        if not status.by_hand:
            yield f"{what_becomes_of(migration.plan)}. {not_to_be_dropped(migration.table)}"
        return
    if migration is None or migration.phase is not Phase.READY or status.at_work:
        return
    if any(_half_done(status, migration)):
        return
    table = migration.table
    yield (
        f"{_ready(status)}; swap with: {commands.migrate(table)} --resume;"
        f" undo with: {commands.rollback(table)}"
    )


def _function_problems(status: Status) -> Iterator[str]:
    table = status.table
    lacking = [function for function in table.functions if function not in status.functions]
    older = [function for function, version in status.functions.items() if version < VERSION]
    for what, functions in (("missing", lacking), (f"older than version {VERSION}", older)):
        if functions:
            yield (
                f"{' and '.join(map(quoted, functions))}: {what}; as the owner of {table.typed}, run:"
                f" {commands.upgrade_functions(table)}"
            )
    if not lacking and (disagreement := grace_disagrees(table, status.grace_days)):
        yield disagreement


def _detached_problems(status: Status, last_drop: date) -> Iterator[str]:
    if late := [d for d in status.detached if d.drop_on and d.drop_on <= last_drop]:
        tables = ", ".join(f"{quoted(d.schema)}.{quoted(d.name)}" for d in late)
        names = _some([d.name for d in late])
        yield f"detached, but the drop is overdue: {names}. Drop them: DROP TABLE {tables};"


def _detached_too_early(status: Status) -> Iterator[str]:
    """What an earlier, shorter retention has detached: its rows are missing."""
    table = status.table
    early = [
        d
        for d in status.detached
        if d.drop_on
        and d.upper
        and (expires_on(d.upper, table.retention_days) or status.today) > status.today
    ]
    for one in early[:1]:
        assert one.upper is not None
        period = table.period(one.upper - timedelta(microseconds=1))
        lower, upper = (f"{at:%Y-%m-%d %H:%M:%S}+00" for at in (period.start, one.upper))
        yield (
            f"detached, but still within retention: {_some([d.name for d in early])}. Attach it: ALTER TABLE"
            f" {_qualified(table, table.name)} ATTACH PARTITION {quoted(one.schema)}.{quoted(one.name)}"
            f" FOR VALUES FROM ('{lower}') TO ('{upper}'); or, to silence this message, change its comment"
        )


def _partition_problems(status: Status, settings: Settings) -> Iterator[str]:
    table = status.table
    create = f"SELECT {_qualified(table, table.create_function)}({table.ahead_days});"
    # The last day becomes due at midnight; its partition comes with the next run of the job.
    settled = _has_run(CREATE, status, settings) >= midnight(status.today)
    ahead_due = table.ahead_days if settled else table.ahead_days - 1
    due = midnight(status.today + timedelta(days=ahead_due + 1))
    newest = max((p.upper for p in status.partitions if p.upper), default=due)
    gaps = [period for period in status.missing if period.start < max(due, newest)]
    ahead = [period for period in gaps if period.end > status.now]
    if ahead:
        what = "days" if table.every is Interval.DAY else "times"
        yield f"no partition for {_some(ahead)}: inserts for such {what} fail. Create them: {create}"
    yield from _detached_too_early(status)
    there = {(d.schema, d.name) for d in status.detached}
    past = [p for p in gaps if p.end <= status.now and (table.home, table.partition(p)) not in there]
    if past:
        leaf = _qualified(table, table.partition(past[0]))
        lower, upper = (f"{at:%Y-%m-%d %H:%M:%S}+00" for at in (past[0].start, past[0].end))
        yield (
            f"no partition for {_some(past)}, within retention. Create it: CREATE TABLE {leaf}"
            f" PARTITION OF {_qualified(table, table.name)} FOR VALUES FROM ('{lower}') TO ('{upper}');"
        )
    if status.runway_days < min(_SHORT_RUNWAY_DAYS, ahead_due):
        yield f"the runway is {counted(status.runway_days, 'day')}, less than {_SHORT_RUNWAY_DAYS}: {create}"
    last_drop = _has_run(DROP, status, settings)
    overdue = droppable(status.partitions, last_drop.date(), table.retention_days)
    if overdue:
        drop = f"Drop them: SELECT {_qualified(table, table.drop_function)}({table.retention_days});"
        if grace_disagrees(table, status.grace_days):  # it would drop instead of detach, or vice versa
            drop = "Bring the function up to date first"
        yield f"expired and still there: {_some([p.name for p in overdue])}. {drop}"
    yield from _dropped_too_early(status)
    yield from _detached_problems(status, last_drop.date())
    for partition in status.partitions:
        if partition.detach_pending:
            yield (
                f"the DETACH of {partition.name} was cut off; finish it: ALTER TABLE"
                f" {_qualified(table, table.name)} DETACH PARTITION"
                f" {quoted(partition.schema)}.{quoted(partition.name)} FINALIZE;"
            )
    yield from status.stray


def _dropped_too_early(status: Status) -> Iterator[str]:
    """Periods within retention that only the old table still has."""
    table, migration = status.table, status.migration
    begins = min((p.lower for p in status.partitions if p.lower), default=None)
    endless = any(p.lower is None and p.upper for p in status.partitions)
    if migration is None or migration.plan.attaches or status.old_table is None or begins is None or endless:
        return
    kept_from = migration.plan.first
    if table.retention_days is not None:
        kept_from = max(kept_from, midnight(status.today - timedelta(days=table.retention_days)))
    if begins > kept_from:
        yield (
            f"{table.typed} begins at {table.period(begins)}, but retention begins at"
            f" {table.period(kept_from)}; the rows in between are only in {quoted(table.old)}. Bring them"
            f" back with: {commands.rollback(table)}; or, if they were meant to go, lower retention_days"
        )


def _has_run(job: Job, status: Status, settings: Settings) -> datetime:
    """The last start of ``job`` that must have finished by now; cron gets a day."""
    if status.by_celery:
        return last_due(job, settings, status.now - _JOB_TAKES)
    return status.now - _JOB_OVERDUE


def _not_listed(status: Status) -> Iterator[str]:
    table = status.table
    yield (
        f"no {CONFIGURATION} lists {table.typed}, so the nightly jobs do not maintain it; add to the file:"
        f"\n\n{table.as_toml()}"
    )


def _job_problems(status: Status) -> Iterator[str]:
    who = (
        "are a worker and a beat running? (make run-worker, make run-beat)"
        if status.by_celery
        else f"does cron run it? ({commands.upkeep()})"
    )
    for job_name, job in (status.jobs or {}).items():
        since = job.succeeded or (status.migration.fence if status.migration else None)
        why = job.report.get("error") or job.report.get("reason")
        if since is None or status.now - since > _JOB_OVERDUE:
            when = f"since {job.succeeded:%Y-%m-%d %H:%M} UTC" if job.succeeded else "yet"
            yield f"{job_name} has not succeeded {when}{f' ({why})' if why else ''}; {who}"
        elif job.report.get("status") == "failed":
            yield f"{job_name} failed in its last run ({why}); run it again with: {commands.upkeep()}"
        if job.running and "never expires" in job.running:
            yield f"{job_name} is locked for good: {job.running}"


def _some(things: list[Any]) -> str:
    shown = ", ".join(map(str, things[:3]))
    return shown if len(things) <= 3 else f"{shown} and {len(things) - 3} more"


def _qualified(table: TableSpec, relation: str) -> str:
    """A name in the schema of ``table``, quoted for SQL."""
    return f"{quoted(table.home)}.{quoted(relation)}"


def show(status: Status | Unknown, console: Console | None = None) -> None:
    """Print the status for people, in 80 columns, and in colour only where wanted."""
    console = console or Console(highlight=False, soft_wrap=False)
    if isinstance(status, Status):
        _Page(console, status).print()
    else:
        console.print(Text(f"{status.table.typed}: unknown", "bold"))
        console.print(Text(f"\nproblem\n- {status.error}", "red"), soft_wrap=True)


class _Page:
    """The status on a console, in characters that its encoding has."""

    def __init__(self, console: Console, status: Status) -> None:
        self.console = console
        self.status = status
        encoding = (console.encoding or "ascii").lower().replace("-", "")
        unicode = encoding.startswith("utf")
        self.blocks = " ▏▎▍▌▋▊▉█" if unicode else " #"
        self.box = box.SIMPLE_HEAD if unicode else None

    def copy_progress(self, copied: int, periods: int) -> None:
        """The copy's progress, its start, who is working on it, and what readers see meanwhile."""
        assert self.status.migration is not None
        since = self.status.migration.plan.started_at
        by = self.status.at_work
        self.line(f"copied      {copied} of {periods} periods")
        self.line(f"migration   started {since:%Y-%m-%d %H:%M} UTC; readers see every row all the time")
        self.line(f"operator    {by or 'none: it was cut off'}")

    def print(self) -> None:
        """The page from top to bottom."""
        status = self.status
        self.line(f"{status.table.typed}: {status.state}", "bold")
        self.line(f"database    {status.server}")
        if status.in_citus:
            self.line(f"citus       the table is {status.in_citus}; sizes include all nodes")
        if status.copied:
            self.copy_progress(*status.copied)
        if status.state == "ready":
            self.line(f"migration   {_ready(status)}")
        if status.partitioned:
            drops = _some(status.next_drops()) or "nothing"
            self.line(f"partitions  {len(status.partitions)}, {status.oldest} to {status.newest}")
            self.line(f"runway      {counted(status.runway_days, 'day')}")
            self.line(f"missing     {_some(status.missing) or 'none'}")
            when = f"{status.next_drop:%Y-%m-%d %H:%M} UTC" if status.by_celery else "at the next upkeep"
            self.line(f"next drop   {when}: {drops}")
        if waiting := [f"{d.name} (drop on {d.drop_on})" for d in status.detached if d.drop_on]:
            self.line(f"detached    {_some(waiting)}")
        if status.old_table:
            rows, size = status.old_table.rows_estimate, status.old_table.bytes
            old = quoted(status.table.old)
            self.line(f"old table   {old}: {counted(rows, 'row')} (estimate), {in_bytes(size)}")
        if status.history and status.history.upper:
            goes = expires_on(status.history.upper, status.table.retention_days)
            self.line(
                f"history     {status.history.name}: before {status.history.upper:%Y-%m-%d},"
                f" {in_bytes(status.history.bytes)}, {f'drop on {goes}' if goes else 'never dropped'}"
            )
        if status.partitions:
            self.partitions()
        if status.jobs is not None and status.partitioned:
            self.jobs(status.jobs)
        if status.notices:
            self.line("\nnotice", "bold")
            self.items(status.notices)
        if status.problems:
            self.line("\nproblems" if len(status.problems) > 1 else "\nproblem", "bold red")
            self.items(status.problems, "red")
        else:
            self.line("\nhealthy", "bold green")

    def items(self, texts: tuple[str, ...], style: str = "") -> None:
        """A dash before each; on a terminal each command on its own line."""
        for item in texts:
            text = f"- {item}"
            if self.console.is_terminal:
                text = for_reading(text, self.console.width - 1)
            self.line(text, style)

    def line(self, text: str, style: str = "") -> None:
        """One paragraph of plain text; characters that the console lacks are escaped."""
        self.console.print(Text(self.safe(text), style), soft_wrap=True)

    def safe(self, text: str) -> str:
        """``text`` in the console's own characters."""
        encoding = self.console.encoding or "ascii"
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def table(self, table: Table) -> None:
        """A table after a blank line."""
        if table.box is None:
            self.line("")
        self.console.print(table)

    def partitions(self) -> None:
        """A row for each partition; the empty ones for the days ahead share one."""
        largest = max(p.bytes for p in self.status.partitions) or 1
        table = Table(box=self.box, pad_edge=False, padding=(0, 1))
        table.add_column(self.status.table.every.value, no_wrap=True)
        table.add_column("rows (estimate)", justify="right", no_wrap=True)
        table.add_column("size", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        ahead = [p for p in self.status.partitions if self.is_empty_and_ahead(p)]
        for p in self.status.partitions:
            if p not in ahead:
                table.add_row(
                    self.safe(self.label(p)),
                    f"{p.rows_estimate:,}",
                    in_bytes(p.bytes),
                    Text(self.bar(p.bytes / largest) if p.rows_estimate else "", "cyan"),
                )
        if ahead:
            table.add_row(
                f"{counted(len(ahead), self.status.table.every)} ahead",
                "0",
                in_bytes(sum(p.bytes for p in ahead)),
                "",
            )
        self.table(table)

    def is_empty_and_ahead(self, p: Partition) -> bool:
        """Whether this partition needs no row of its own."""
        return p.lower is not None and p.lower.date() > self.status.today and p.rows_estimate == 0

    def label(self, p: Partition) -> str:
        """The period, or the name of a partition that does not hold exactly one."""
        if p.lower and not p.detach_pending:
            period = self.status.table.period(p.lower)
            if (p.lower, p.upper) == (period.start, period.end):
                return str(period)
        return p.name if p.lower or p.upper else "(default)"

    def bar(self, share: float) -> str:
        """A bar for a share from 0 to 1."""
        steps = len(self.blocks) - 1
        filled = max(1, round(share * _BAR_WIDTH * steps))
        whole, rest = divmod(filled, steps)
        return self.blocks[-1] * whole + (self.blocks[rest] if rest else "")

    def jobs(self, jobs: dict[str, JobStatus]) -> None:
        """A row for each job."""
        table = Table(box=self.box, pad_edge=False, padding=(0, 1))
        for column in ("job", "last run", "result"):
            table.add_column(column, overflow="fold", no_wrap=column != "result")
        for job_name, job in jobs.items():
            started = job.report.get("started")
            when = (
                f"{datetime.fromisoformat(started).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
                if started
                else "never"
            )
            table.add_row(job_name, when, self.safe(self.result(job)))
        self.table(table)

    def result(self, job: JobStatus) -> str:
        """The outcome of the last run, in a few words."""
        report = job.report
        words = [str(report.get("status", "unknown"))] if report else []
        words += [
            f"{did} {len(report[did])} in {report['seconds']:.1f} s"
            for did in ("created", "dropped")
            if did in report
        ]
        if report.get("contended"):
            words.append(f"{len(report['contended'])} left")
        if str(report.get("writer")).startswith("upkeep"):
            words.append("by upkeep")
        if job.running:
            words.append(f"running: {job.running}")
        return ", ".join(words) or "-"
