"""How things stand with the table, its partitions and the nightly jobs, and what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from importlib.resources import files
from typing import Any

import redis
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from chronos.db import connect_engine, execute, is_lock_failure, joined, name, render, statement, transaction
from chronos.errors import ChronosError
from chronos.job_lock import connect, holder
from chronos.jobs import CREATE, DROP, JOBS, Job, last_due, next_due, read_last
from chronos.migration import state as migration_state
from chronos.migration.output import for_reading, in_bytes
from chronos.migration.preflight import COMMAND, locate
from chronos.migration.state import DESCRIPTIONS, Phase, State
from chronos.partitions import (
    FUNCTIONS,
    OLD_TABLE,
    TABLE,
    Partition,
    attached,
    days,
    droppable,
    expired,
    midnight,
    missing,
    partition_name,
    runway,
)
from chronos.settings import Settings

_LOCK_TIMEOUT_MS = 1_000
_SHORT_RUNWAY_DAYS = 7
_JOB_OVERDUE = timedelta(hours=26)
# A job retries for nearly an hour; what it was to do is not overdue before that.
_JOB_TAKES = timedelta(hours=1)
_CLOCK_TOLERANCE_S = 60
_BAR_WIDTH = 30

_CARRY_ON = {
    Phase.BUILT: f"Carry on with: {COMMAND} --resume; or undo it with: python -m chronos rollback",
    Phase.COPYING: f"Carry on with: {COMMAND} --resume; or undo it with: python -m chronos rollback",
    Phase.UNDOING: "Finish with: python -m chronos rollback",
    Phase.UNDONE: "Finish with: python -m chronos rollback",
    Phase.FINALIZING: "Finish with: python -m chronos finalize",
}


@dataclass(frozen=True)
class JobStatus:
    """What is known of a job: the report of its last run, and who runs it at this moment."""

    report: dict[str, Any]
    running: str | None

    @property
    def succeeded(self) -> datetime | None:
        """When it last did all that it had to do."""
        at = self.report.get("succeeded")
        return datetime.fromisoformat(at) if at else None


@dataclass(frozen=True)
class TableSize:
    """A table's size: rows as the planner estimates them, bytes with indexes and TOAST."""

    rows_estimate: int
    bytes: int


@dataclass(frozen=True)
class Status:
    """Everything that ``collect`` has found; times are UTC, ``now`` is the database server's.

    ``functions`` maps those that are installed to their version, ``stray`` says where rows lie that
    no drop will take, ``problems`` is empty when all is well.
    """

    server: str
    schema: str
    now: datetime
    clock_ahead_s: float
    partitioned: bool
    migration: State | None
    migration_runs: bool
    by_hand: str | None
    partitions: tuple[Partition, ...]
    functions: dict[str, int]
    old_table: TableSize | None
    stray: tuple[str, ...]
    days_ahead: int
    retention_days: int
    next_drop: datetime
    jobs: dict[str, JobStatus] | None = None
    problems: tuple[str, ...] = field(default=())

    @property
    def today(self) -> date:
        """The UTC day of the server's clock."""
        return self.now.date()

    @property
    def healthy(self) -> bool:
        """Whether there is nothing that somebody should do."""
        return not self.problems

    @property
    def state(self) -> str:
        """`plain`, `migrating`, `migrated` or `finalized`."""
        if self.migration is not None and self.migration.phase is not Phase.MIGRATED:
            return "migrating"
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
    def missing(self) -> list[date]:
        """Days without a partition: between the oldest and the newest, and today through ``days_ahead``."""
        if not self.partitioned:
            return []
        end = self.today + timedelta(days=self.days_ahead)
        first, last = min(self.oldest or self.today, self.today), max(self.newest or end, end)
        return missing(self.partitions, days(first, last))

    @property
    def runway_days(self) -> int:
        """For how many days after today inserts will find a partition."""
        return runway(self.partitions, self.today)

    def next_drops(self) -> list[str]:
        """The partitions that the next run of the drop job takes."""
        return [p.name for p in droppable(self.partitions, self.next_drop.date(), self.retention_days)]

    def as_json(self) -> dict[str, Any]:
        """What ``status --json`` prints."""
        return {
            "state": self.state,
            "healthy": self.healthy,
            "problems": list(self.problems),
            "partitions": len(self.partitions),
            "oldest": self.oldest and self.oldest.isoformat(),
            "newest": self.newest and self.newest.isoformat(),
            "missing": [day.isoformat() for day in self.missing],
            "runway_days": self.runway_days,
            "functions_installed": set(self.functions) == set(FUNCTIONS),
            "old_table": vars(self.old_table) if self.old_table else None,
            "next_drop": {"at": self.next_drop.isoformat(), "partitions": self.next_drops()},
            "jobs": None
            if self.jobs is None
            else {
                name: {
                    "last_run": job.report.get("started"),
                    "result": job.report.get("status"),
                    "last_success": job.report.get("succeeded"),
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


def collect(settings: Settings, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> Status:
    """Look at the database and at Redis, and judge; ``clock`` is this machine's.

    ACCESS SHARE on the tables and nothing more, waited for no longer than 1 s. Redis may be away.
    Raises ChronosError when there is no webhook_log or it is locked, RefusedError when no database is
    set, DBAPIError when the server cannot be reached.
    """
    with connect_engine(settings.database, application_name="chronos status").connect() as conn:
        schema = locate(conn)
        if schema is None:
            raise ChronosError(
                f"there is no table {TABLE} in database {settings.database.database}, or one in several"
                " schemas and none on the search path. Check the database URL and the search_path"
            )
        try:
            with transaction(conn, lock_timeout_ms=_LOCK_TIMEOUT_MS):
                found = _look(conn, schema, settings, clock)
        except DBAPIError as error:
            if not is_lock_failure(error):
                raise
            raise ChronosError(
                f"somebody has locked {TABLE} or one of its partitions for more than"
                f" {_LOCK_TIMEOUT_MS // 1000} s; look at pg_locks, or try again"
            ) from error
    unreachable = None
    try:
        with closing(connect(settings)) as client:
            found = replace(found, jobs={job.name: _job_status(client, job) for job in JOBS})
    except (redis.RedisError, ChronosError) as error:
        unreachable = f"what the nightly jobs did is unknown: Redis does not answer ({error})"
    problems = [*judge(found, settings), *([unreachable] if unreachable else [])]
    return replace(found, problems=tuple(problems))


def _look(conn: Connection, schema: str, settings: Settings, clock: Callable[[], datetime]) -> Status:
    execute(conn, statement("SET TRANSACTION READ ONLY; SET LOCAL statement_timeout = '10s'"))
    before = clock()
    now: datetime = execute(conn, statement("SELECT clock_timestamp()")).scalar_one().astimezone(UTC)
    ours = before + (clock() - before) / 2
    migration = migration_state.read(conn, schema)
    partitions = tuple(attached(conn, schema))
    return Status(
        server=f"{settings.database.database} on {settings.database.host or 'a local socket'}",
        schema=schema,
        now=now,
        clock_ahead_s=(now - ours).total_seconds(),
        partitioned=_table(conn, schema, TABLE, "p") is not None,
        migration=migration,
        migration_runs=_migration_runs(conn, schema),
        by_hand=_by_hand(conn, schema, migration) if migration else None,
        partitions=partitions,
        functions=_functions(conn, schema),
        old_table=_table(conn, schema, OLD_TABLE, "r"),
        stray=tuple(_stray(conn, partitions, now.date(), settings.webhook_log_retention_days)),
        days_ahead=settings.webhook_log_days_ahead,
        retention_days=settings.webhook_log_retention_days,
        next_drop=next_due(DROP, settings, now),
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


def _functions(conn: Connection, schema: str) -> dict[str, int]:
    """The functions that are there, with the version that their comment tells; 0 when it tells none."""
    rows = execute(
        conn,
        statement(
            "SELECT p.proname,"
            " coalesce(substring(obj_description(p.oid, 'pg_proc') FROM '^chronos (\\d+):'), '0')"
            " FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace"
            " WHERE n.nspname = {schema} AND p.proname IN ({functions})"
            " AND p.proargtypes::text = 'integer'::regtype::oid::text",
            schema=schema,
            functions=joined([statement("{f}", f=function) for function in FUNCTIONS]),
        ),
    ).all()
    return {function: int(version) for function, version in rows}


def _current_version() -> int:
    """The version of the functions that this program would install."""
    script = (files("chronos") / "sql" / "partition_functions.sql").read_text("utf-8")
    return max(int(version) for version in re.findall(r"'chronos (\d+):", script))


def _migration_runs(conn: Connection, schema: str) -> bool:
    """Whether somebody holds the operator's lock at this moment; looks, and takes no lock."""
    found: bool = execute(
        conn,
        statement(
            "SELECT EXISTS (SELECT FROM pg_locks, hashtextextended({text}, 0) AS key"
            " WHERE locktype = 'advisory' AND granted AND objsubid = 1"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            " AND classid::bigint = (key >> 32) & 4294967295 AND objid::bigint = key & 4294967295)",
            text=f"chronos migration of {schema}.{TABLE}",
        ),
    ).scalar_one()
    return found


def _by_hand(conn: Connection, schema: str, migration: State) -> str | None:
    if migration_state.undone_by_hand(conn, schema, migration):
        return (
            f"{OLD_TABLE} was renamed back to {TABLE} by hand; remove what is left of the migration with:"
            " python -m chronos rollback"
        )
    if migration_state.finalized_by_hand(conn, schema, migration):
        return (
            f"{OLD_TABLE} was dropped by hand; remove what is left of the migration with:"
            " python -m chronos finalize"
        )
    return None


def _stray(
    conn: Connection, partitions: Iterable[Partition], today: date, retention_days: int
) -> Iterator[str]:
    """Where rows lie that retention should have taken, or that have no day's partition. ACCESS SHARE."""
    partitions = list(partitions)
    cutoff = midnight(today - timedelta(days=retention_days))
    old = statement('"timestamp" < {cutoff}', cutoff=f"{cutoff:%Y-%m-%d %H:%M:%S}+00")
    going = {p.name for p in expired(partitions, today, retention_days)}
    for partition in partitions:
        if partition.detach_pending or partition.name in going:
            continue
        is_default = partition.lower is None and partition.upper is None
        if not is_default and partition.lower is not None and partition.lower >= cutoff:
            continue
        leaf = name(partition.schema, partition.name)
        query = statement("SELECT FROM {leaf} WHERE {old}", leaf=leaf, old=old)
        if _any(conn, query):
            delete = render(conn, statement("DELETE FROM {leaf} WHERE {old};", leaf=leaf, old=old))
            yield (
                f"{partition.name} holds rows older than {cutoff:%Y-%m-%d}, and is never dropped for these"
                f" alone: {delete}"
            )
        elif is_default and _any(conn, statement("SELECT FROM {leaf}", leaf=leaf)):
            yield (
                f"the default partition {partition.name} holds rows: the partitions of their days cannot be"
                " made while they are there; move or delete them"
            )


def _any(conn: Connection, query: Any) -> bool:
    found: bool = execute(conn, statement("SELECT EXISTS ({query})", query=query)).scalar_one()
    return found


def _job_status(client: redis.Redis, job: Job) -> JobStatus:
    return JobStatus(read_last(client, job) or {}, holder(client, job.name))


def judge(status: Status, settings: Settings) -> list[str]:
    """What is wrong with ``status``, most urgent first; each line says what to type about it."""
    problems = [*_migration_problems(status)]
    if status.partitioned and (status.migration is None or status.migration.phase is Phase.MIGRATED):
        problems += _function_problems(status)
        problems += _partition_problems(status, settings)
        problems += _job_problems(status)
    if abs(status.clock_ahead_s) > _CLOCK_TOLERANCE_S:
        direction = "ahead of" if status.clock_ahead_s > 0 else "behind"
        problems.append(
            f"the clock of the database server is {abs(status.clock_ahead_s):.0f} s {direction}"
            " this machine's; set one of them right"
        )
    return problems


def _migration_problems(status: Status) -> Iterator[str]:
    migration = status.migration
    if status.by_hand:
        yield status.by_hand
    elif migration is not None and migration.phase is not Phase.MIGRATED and not status.migration_runs:
        yield (
            f"a migration begun at {migration.started_at:%Y-%m-%d %H:%M} UTC is half done, and nobody is at"
            f" it. {DESCRIPTIONS[migration.phase]} {_CARRY_ON[migration.phase]}"
        )
    elif migration is None and not status.partitioned:
        yield f"{TABLE} is a plain table, nothing keeps it small; migrate it with: {COMMAND}"
    elif migration is None and status.old_table is not None:
        yield (
            f"{OLD_TABLE} is there, but nothing tells of its migration; if it is not needed, drop it:"
            f" DROP TABLE {OLD_TABLE}"
        )


def _function_problems(status: Status) -> Iterator[str]:
    current = _current_version()
    lacking = [function for function in FUNCTIONS if function not in status.functions]
    older = [function for function, version in status.functions.items() if version < current]
    for what, functions in (("missing", lacking), (f"older than version {current}", older)):
        if functions:
            yield (
                f"{' and '.join(functions)}: {what}; as the owner of {TABLE}, run: psql"
                f" -c 'SET search_path = {_quoted(status.schema)}, pg_temp'"
                " -f chronos/sql/partition_functions.sql"
            )


def _partition_problems(status: Status, settings: Settings) -> Iterator[str]:
    create = f"SELECT {_quoted(status.schema)}.{CREATE.function}({status.days_ahead});"
    # The outermost day comes due at midnight, and its partition with the next run of the job.
    settled = last_due(CREATE, settings, status.now - _JOB_TAKES) >= midnight(status.today)
    ahead_due = status.days_ahead if settled else status.days_ahead - 1
    due = status.today + timedelta(days=ahead_due)
    gaps = [day for day in status.missing if day <= due or (status.newest and day < status.newest)]
    ahead = [day for day in gaps if day >= status.today]
    if ahead:
        yield f"no partition for {_some(ahead)}: an insert of such a day fails. Create them: {create}"
    past = [day for day in gaps if day < status.today]
    if past:
        leaf = f"{_quoted(status.schema)}.{partition_name(past[0])}"
        bounds = f"FROM ('{past[0]} 00:00:00+00') TO ('{past[0] + timedelta(days=1)} 00:00:00+00')"
        yield (
            f"no partition for {_some(past)}, among the days that are kept. Create it: CREATE TABLE {leaf}"
            f" PARTITION OF {_quoted(status.schema)}.{TABLE} FOR VALUES {bounds};"
        )
    if status.runway_days < min(_SHORT_RUNWAY_DAYS, ahead_due):
        yield f"the runway is {status.runway_days} days, less than {_SHORT_RUNWAY_DAYS}: {create}"
    last_drop = last_due(DROP, settings, status.now - _JOB_TAKES)
    overdue = droppable(status.partitions, last_drop.date(), status.retention_days)
    if overdue:
        yield (
            f"expired and still there: {_some([p.name for p in overdue])}."
            f" Drop them: SELECT {_quoted(status.schema)}.{DROP.function}({status.retention_days});"
        )
    for partition in status.partitions:
        if partition.detach_pending:
            yield (
                f"{partition.name} was detached half-way; finish it: ALTER TABLE"
                f" {_quoted(status.schema)}.{TABLE} DETACH PARTITION"
                f" {_quoted(partition.schema)}.{_quoted(partition.name)} FINALIZE;"
            )
    yield from status.stray


def _job_problems(status: Status) -> Iterator[str]:
    for job_name, job in (status.jobs or {}).items():
        since = job.succeeded or (status.migration.started_at if status.migration else None)
        if since is None or status.now - since > _JOB_OVERDUE:
            when = f"since {job.succeeded:%Y-%m-%d %H:%M} UTC" if job.succeeded else "yet"
            why = job.report.get("error") or job.report.get("reason")
            yield (
                f"{job_name} has not succeeded {when}{f' ({why})' if why else ''};"
                " are a worker and a beat running? (make run-worker, make run-beat)"
            )
        if job.running and "never expires" in job.running:
            yield f"{job_name} is locked for good: {job.running}"


def _some(things: list[Any]) -> str:
    shown = ", ".join(map(str, things[:3]))
    return shown if len(things) <= 3 else f"{shown} and {len(things) - 3} more"


def _quoted(identifier: str) -> str:
    """The identifier as SQL wants it written."""
    if re.fullmatch("[a-z_][a-z0-9_]*", identifier):
        return identifier
    return '"' + identifier.replace('"', '""') + '"'


def show(status: Status, console: Console | None = None) -> None:
    """Print the status for people: 80 columns are enough, without colours where none are wanted."""
    _Page(console or Console(highlight=False, soft_wrap=False), status).print()


class _Page:
    """The status on a console, in characters that it has."""

    def __init__(self, console: Console, status: Status) -> None:
        self.console = console
        self.status = status
        encoding = (console.encoding or "ascii").lower().replace("-", "")
        unicode = encoding.startswith("utf")
        self.blocks = " ▏▎▍▌▋▊▉█" if unicode else " #"
        self.box = box.SIMPLE_HEAD if unicode else None

    def print(self) -> None:
        """The page from top to bottom."""
        status = self.status
        self.line(f"{status.schema}.{TABLE}: {status.state}", "bold")
        self.line(f"database    {status.server}")
        if status.partitioned:
            drops = _some(status.next_drops()) or "nothing"
            self.line(f"partitions  {len(status.partitions)}, {status.oldest} to {status.newest}")
            self.line(f"runway      {status.runway_days} days")
            self.line(f"missing     {_some(status.missing) or 'none'}")
            if status.migration and status.migration.phase is Phase.COPYING:
                back = (status.migration.today - status.migration.first_day).days + 1
                self.line(f"copied      {len(status.migration.days)} of {back} days")
            self.line(f"next drop   {status.next_drop:%Y-%m-%d %H:%M} UTC: {drops}")
        if status.old_table:
            old = status.old_table
            self.line(
                f"old table   {OLD_TABLE}: {old.rows_estimate:,} rows (estimate), {in_bytes(old.bytes)}"
            )
        if status.partitions:
            self.partitions()
        if status.jobs is not None and status.partitioned:
            self.jobs(status.jobs)
        if status.problems:
            self.line("\nproblems" if len(status.problems) > 1 else "\nproblem", "bold red")
            for problem in status.problems:
                text = f"- {problem}"
                if self.console.is_terminal:
                    text = for_reading(text, self.console.width - 1)
                self.line(text, "red")
        else:
            self.line("\nhealthy", "bold green")

    def line(self, text: str, style: str = "") -> None:
        """One paragraph of plain text; a character that the console lacks is spelled out."""
        self.console.print(Text(self.safe(text), style), soft_wrap=True)

    def safe(self, text: str) -> str:
        """``text`` in the console's own characters."""
        encoding = self.console.encoding or "ascii"
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def table(self, table: Table) -> None:
        """A table below an empty line."""
        if table.box is None:
            self.line("")
        self.console.print(table)

    def partitions(self) -> None:
        """A row for each partition; days ahead that are empty share one."""
        largest = max(p.bytes for p in self.status.partitions) or 1
        table = Table(box=self.box, pad_edge=False, padding=(0, 1))
        table.add_column("day", no_wrap=True)
        table.add_column("rows (estimate)", justify="right", no_wrap=True)
        table.add_column("size", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        ahead = [p for p in self.status.partitions if self.is_empty_day_ahead(p)]
        for p in self.status.partitions:
            if p not in ahead:
                table.add_row(
                    self.safe(self.label(p)),
                    f"{p.rows_estimate:,}",
                    in_bytes(p.bytes),
                    Text(self.bar(p.bytes / largest), "cyan"),
                )
        if ahead:
            table.add_row(f"{len(ahead)} days ahead", "0", in_bytes(sum(p.bytes for p in ahead)), "")
        self.table(table)

    def is_empty_day_ahead(self, p: Partition) -> bool:
        """Whether nothing is lost when this partition has no row of its own."""
        return p.lower is not None and p.lower.date() > self.status.today and p.rows_estimate == 0

    def label(self, p: Partition) -> str:
        """The day, or the name of a partition that is not one day's."""
        if p.lower and p.upper == p.lower + timedelta(days=1) and not p.detach_pending:
            return f"{p.lower:%Y-%m-%d}"
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
            table.add_column(column, overflow="fold")
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
        """What the last run came to, in a few words."""
        report = job.report
        words = [str(report.get("status", "unknown"))] if report else []
        words += [
            f"{did} {len(report[did])} in {report['seconds']:.1f} s"
            for did in ("created", "dropped")
            if did in report
        ]
        if report.get("contended"):
            words.append(f"{len(report['contended'])} left")
        if job.running:
            words.append(f"running: {job.running}")
        return ", ".join(words) or "-"
