"""What a nightly job does, from request to report; Celery is in worker.py.

Attempts repeat until everything is done, an hour has passed, or something fails that waiting cannot fix. An
attempt takes every table in the settings in turn, even if the one before failed: it calls the table's SQL
function in transactions of bounded size. The outcome is the result of the task, a line in the log and, for
each table, a report in the database (reports.py), which `status` shows.

`upkeep` does both jobs in the same way, once, for cron and without Celery or Redis. It is safe alongside them
and itself: the functions take a lock in PostgreSQL, and the second caller tries again.

A night is done once, however many messages ask for it: two beats send two, a worker that was down finds one
for each night it missed, and a broker may deliver one again. The reports say for which tables the night is
done, and a scheduled message skips those. What a person or cron asks for always runs.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, time, timedelta
from time import monotonic
from typing import Any, NoReturn
from zoneinfo import ZoneInfo

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from chronos import commands, reports, telemetry
from chronos.agreement import require_agreement
from chronos.catalog.locate import locate
from chronos.catalog.partitions import Partition, attached, detached, droppable, missing, runway
from chronos.db import (
    connect_engine,
    execute,
    is_disconnect,
    is_lock_failure,
    name,
    one_line,
    opened,
    sqlstate,
    statement,
    transaction,
)
from chronos.errors import ChronosError, InterruptedRunError, RefusedError
from chronos.functions import grace_days, grace_disagrees
from chronos.job_lock import LeaseHeldError, connect, keep_lease
from chronos.locks import lock_holders
from chronos.reports import Report as Report
from chronos.settings import Settings
from chronos.table import Interval, Period, TableSpec

logger = logging.getLogger(__name__)

# Seconds between two attempts: 18 attempts in 54 minutes, so that a job is finished before the next starts.
PAUSES_S = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, *[300.0] * 9)

# Days created in one transaction: until it ends, the table that a foreign key refers to accepts no writes.
_STEP_DAYS = {Interval.HOUR: 1, Interval.DAY: 7, Interval.WEEK: 49, Interval.MONTH: 210}

# A worker's clock may be behind that of the beat whose message it answers.
_CLOCK_SLACK = timedelta(minutes=5)

_LOCK_TIMEOUT_MS = 500


@dataclass(frozen=True)
class Job:
    """A nightly job: its name (task, lease), its hour in BEAT_TIMEZONE, the SQL function it calls per table.

    ``did`` is what the function has done to the partitions whose names it returns.
    """

    name: str
    hour: int
    function: Callable[[TableSpec], str]
    did: str


CREATE = Job("create_future_partitions_job", 1, lambda table: table.create_function, "created")
DROP = Job("drop_old_partitions_job", 2, lambda table: table.drop_function, "dropped")
JOBS = (CREATE, DROP)


@dataclass(frozen=True)
class Message:
    """The request for an attempt: ``nightly`` when the schedule sends it, ``earlier`` is the report so far.

    ``writer`` is the program that reports: `celery` or `upkeep`.
    """

    task_id: str
    nightly: bool = False
    attempt: int = 1
    earlier: Mapping[str, Any] | None = None
    writer: str = "celery"


class JobFailedError(ChronosError):
    """The job could not be done, and waiting longer would not help; the message is one line."""

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report: Report = report or {"status": "failed", "error": message, "tables": {}}


class TryAgainError(ChronosError):
    """The attempt did nothing, or did not finish; ``report`` is for the next one."""

    def __init__(self, reason: str, report: Report) -> None:
        super().__init__(reason)
        self.report = report


@dataclass
class _Turn:
    """The outcome for one table in an attempt: ``table`` is its name in the configuration.

    ``undone`` names the partitions still to do, None when they are not known. ``located`` is the table once
    found, and only then is its report stored; ``refused`` says that nothing was begun.
    """

    table: str
    names: list[str]
    status: str = "done"
    reason: str | None = None
    undone: list[str] | None = field(default_factory=list)
    located: TableSpec | None = None
    refused: bool = False


class _NotReadyError(Exception):
    """The table is not migrated, so there is nothing to do yet."""


class _AlreadyHandledError(Exception):
    """The night is done, or another message is working on it: nothing to do, and nothing to report."""


class _UnfinishedError(Exception):
    """Something is in the way but may clear later; ``undone`` names the partitions still to do."""

    def __init__(self, reason: str, undone: list[str]) -> None:
        super().__init__(reason)
        self.undone = undone


def last_due(job: Job, settings: Settings, now: datetime) -> datetime:
    """When the schedule last asked for the job: the latest of its hours up to ``now``."""
    today = now.astimezone(ZoneInfo(settings.beat_timezone)).date()
    due = _due(job, settings, today)
    return due if due <= now else _due(job, settings, today - timedelta(days=1))


def next_due(job: Job, settings: Settings, now: datetime) -> datetime:
    """When the schedule will next ask for the job, after ``now``."""
    today = now.astimezone(ZoneInfo(settings.beat_timezone)).date()
    due = _due(job, settings, today)
    return due if due > now else _due(job, settings, today + timedelta(days=1))


def _due(job: Job, settings: Settings, day: date) -> datetime:
    # In UTC, because Python compares two times of the same zone by wall-clock time.
    return datetime.combine(day, time(job.hour), ZoneInfo(settings.beat_timezone)).astimezone(UTC)


def night_of(job: Job, settings: Settings, now: datetime) -> date:
    """Which night a run at ``now`` counts for, in BEAT_TIMEZONE."""
    due = last_due(job, settings, now + _CLOCK_SLACK)
    return due.astimezone(ZoneInfo(settings.beat_timezone)).date()


def attempt(job: Job, settings: Settings, message: Message, pause_s: float | None) -> Report:
    """One attempt at ``job`` under its lease; ``pause_s``: seconds until the next, None: this is the last.

    Returns the report: its ``status`` is `done`, `skipped` (with the ``reason``), or `incomplete` when the
    last attempt has left something undone (``contended`` names it); ``tables`` has the same for each table.
    Raises TryAgainError when there should be another attempt, else JobFailedError. Locks: those of the SQL
    function, each with a wait of at most 200 ms and held for one transaction.
    """
    try:
        with connect(settings) as client, keep_lease(client, job.name):
            return _attempt(job, settings, message, pause_s)
    except LeaseHeldError as error:
        logger.info("%s skipped: %s", job.name, error)
        return {"status": "skipped", "reason": str(error)}
    except RefusedError as error:
        logger.error("%s failed: %s", job.name, error)
        raise JobFailedError(f"{job.name} failed: {error}") from None


def upkeep(settings: Settings, retry_for_s: float, pause: Callable[[float], bool]) -> dict[str, Report]:
    """Do both jobs for every table, once, without a lease. Returns each job's report by its name.

    Anything in use is retried until ``retry_for_s`` seconds have passed; ``pause`` waits for the given
    seconds and returns True to stop. Locks as ``attempt``. Raises InterruptedRunError when ``pause`` returns
    True.
    """
    run, ends = str(uuid.uuid4()), monotonic() + retry_for_s
    found = {}
    for job in JOBS:
        message = Message(run, writer="upkeep")
        for following in (*PAUSES_S, 0.0):
            left = min(following, ends - monotonic())
            try:
                found[job.name] = _attempt(job, settings, message, left if left > 0 else None)
                break
            except JobFailedError as error:
                found[job.name] = error.report
                break
            except TryAgainError as error:
                message = replace(message, attempt=message.attempt + 1, earlier=error.report)
                if pause(left):
                    raise InterruptedRunError(
                        f"stopped while {job.name} waited: {error}. What is done stays done;"
                        " the next run does the rest"
                    ) from None
    return found


def _attempt(job: Job, settings: Settings, message: Message, pause_s: float | None) -> Report:
    with telemetry.span("{job}, attempt {attempt}", job=job.name, attempt=message.attempt):
        report = _Attempt(job, settings, message, pause_s).run()
        with telemetry.span("{job}: {status}", job=job.name, **report):
            return report


def _already_handled(earlier: list[Report], night: date) -> str | None:
    """Why a scheduled message may skip a table, by the reports of other runs; None: it may not."""
    for report in earlier:
        if report["status"] == "done":
            return f"already done for the night of {night}, at {report['started']}"
    if earlier and earlier[0]["status"] == "retrying":
        late = datetime.now(UTC) - datetime.fromisoformat(earlier[0]["next_attempt"])
        if late < timedelta(minutes=10):
            following = earlier[0]["next_attempt"]
            return f"another message is working on the night of {night}; next attempt {following}"
    return None


# It runs with its caller's privileges.
_FUNCTION = """
SELECT pg_get_userbyid(p.proowner), pg_has_role(p.proowner, c.relowner, 'MEMBER')
FROM pg_proc p, pg_class c
WHERE p.oid = to_regprocedure(format('%I.%I(integer)', {schema}, {function}))
  AND c.oid = to_regclass(format('%I.%I', {schema}, {table}))
"""


class _Attempt:
    """One attempt: the work, a report for each table, and one for all."""

    def __init__(self, job: Job, settings: Settings, message: Message, pause_s: float | None) -> None:
        earlier = message.earlier or {}
        self.job = job
        self.settings = settings
        self.message = message
        self.pause_s = pause_s
        self.night = night_of(job, settings, datetime.now(UTC))
        self.earlier: Mapping[str, Report] = earlier.get("tables") or {}
        self.started = datetime.fromisoformat(earlier.get("started") or datetime.now(UTC).isoformat())
        self.turns: list[_Turn] = []
        self.tables: dict[str, Report] = {}

    def run(self) -> Report:
        """Do the work and store the reports. Returns the one for all tables, or raises as ``attempt``."""
        for spec in self.settings.tables:
            turn = self._turn(spec)
            self.turns.append(turn)
            self.tables[turn.table] = self._keep(turn)
        unfinished, failed = self._with("unfinished"), self._with("failed")
        if unfinished and (self.pause_s is not None or not failed):
            unknown = any(turn.undone is None for turn in unfinished)
            undone = [name for turn in unfinished for name in turn.undone or []]
            return self._later(self._reasons(*unfinished, *failed), None if unknown else undone)
        if failed:
            self._fail(self._reasons(*failed, *unfinished))
        not_ready = self._with("skipped")
        status = "skipped" if len(not_ready) == len(self.turns) else "done"
        return self._report(status, **({"reason": self._reasons(*not_ready)} if not_ready else {}))

    def _with(self, status: str) -> list[_Turn]:
        return [turn for turn in self.turns if turn.status == status]

    def _reasons(self, *turns: _Turn) -> str:
        """Each reason once, with its table if there are several."""
        several = len(self.turns) > 1
        return "; ".join(
            dict.fromkeys(f"{turn.table}: {turn.reason}" if several else str(turn.reason) for turn in turns)
        )

    def _turn(self, spec: TableSpec) -> _Turn:
        """Do the job for one table. Even if it fails, the next table gets its turn."""
        before = self.earlier.get(spec.typed) or {}
        turn = _Turn(spec.typed, list(before.get(self.job.did) or []))
        if before.get("status") == "done":  # by an earlier attempt of this run, which has reported it
            return turn
        try:
            self._upkeep(spec, turn)
            done = ", ".join(turn.names) or "nothing"
            several = f" in {turn.table}" if len(self.settings.tables) > 1 else ""
            logger.info("%s %s %s%s", self.job.name, self.job.did, done, several)
        except (_NotReadyError, _AlreadyHandledError) as error:
            turn.status, turn.reason = "skipped", str(error)
            if isinstance(error, _AlreadyHandledError):
                turn.located = None
            level = logging.WARNING if isinstance(error, _NotReadyError) else logging.INFO
            logger.log(level, "%s skipped: %s", self.job.name, error)
        except _UnfinishedError as error:
            turn.status, turn.reason, turn.undone = "unfinished", str(error), error.undone
        except DBAPIError as error:
            turn.status, turn.reason = "failed", one_line(error)
            if is_disconnect(error):
                turn.status, turn.undone = "unfinished", None
                turn.reason = f"PostgreSQL does not answer: {turn.reason}"
        except RefusedError as error:
            turn.status, turn.reason, turn.refused = "failed", str(error), True
        except Exception as error:
            logger.exception("%s failed for %s", self.job.name, turn.table)
            turn.status, turn.reason = "failed", f"unexpected {type(error).__name__}: {one_line(error)}"
        return turn

    def _upkeep(self, spec: TableSpec, turn: _Turn) -> None:
        url = self.settings.database
        with opened(connect_engine(url, application_name=f"chronos {self.job.name}")) as conn:
            table = turn.located = locate(conn, spec)
            if table is None:
                raise _NotReadyError(f"there is no table {spec} in this database; see {commands.status()}")
            require_agreement(conn, table, self.settings.listed_in)
            if self.message.nightly:
                self._require_a_night_not_done(conn, table)
            try:
                for names in self._calls(conn, table):
                    turn.names += names
                self._look(conn, table)
            except DBAPIError as error:
                if sqlstate(error) == "55000":  # raised by the functions for a plain table
                    raise _NotReadyError(one_line(error)) from None
                if not is_lock_failure(error):
                    raise
                undone = self._look(conn, table)
                with transaction(conn):
                    holders = lock_holders(conn, [(table.home, name) for name in (table.name, *undone)])
                users = "; ".join(map(str, holders[:3]))
                use = f"is in use by {users}" if users else "is no longer in use"
                raise _UnfinishedError(f"{one_line(error)}; {table} {use}", undone) from None

    def _require_a_night_not_done(self, conn: Connection, table: TableSpec) -> None:
        run = self.message.task_id
        try:
            with transaction(conn, lock_timeout_ms=_LOCK_TIMEOUT_MS):
                found = reports.of_night(conn, table, self.job.name, self.night, run)
            reason = _already_handled(found, self.night)
        except (DBAPIError, reports.UntrustedError, LookupError, TypeError, ValueError):
            return  # the report cannot be read: doing the night twice does no harm
        if reason:
            raise _AlreadyHandledError(reason)

    def _calls(self, conn: Connection, table: TableSpec) -> Iterator[list[str]]:
        """The names that each call of the function returned; one transaction per call."""
        function = self.job.function(table)
        with transaction(conn):
            owner, trusted = execute(
                conn, statement(_FUNCTION, schema=table.home, function=function, table=table.name)
            ).one_or_none() or (None, False)
        if owner is None:
            raise _NotReadyError(
                f"the function {function} is not installed; migrate first: {commands.migrate(table)}; if a"
                f" migration is under way already: {commands.status(table)}"
            )
        if not trusted:
            raise RefusedError(
                f"the function {function} belongs to {owner}, not to the owner of {table.typed}; nothing was"
                f" called. Look at it, drop it, then: {commands.upgrade_functions(table)}"
            )
        if self.job is CREATE:
            step = _STEP_DAYS[table.every]
            for days in [*range(step, table.ahead_days, step), table.ahead_days]:
                yield self._call(conn, table, days)
        elif table.retention_days is not None:
            with transaction(conn):
                if reason := grace_disagrees(table, grace_days(conn, table)):
                    raise RefusedError(f"{reason}; nothing was dropped")
            yield from self._drops(conn, table, table.retention_days)

    def _drops(self, conn: Connection, table: TableSpec, days: int) -> Iterator[list[str]]:
        """Repeat while a call drops something, or detaches something to be dropped later."""
        waiting: list[str] | None = None if table.grace_days else []
        while True:
            names, before = self._call(conn, table, days), waiting
            if table.grace_days:
                with transaction(conn, lock_timeout_ms=_LOCK_TIMEOUT_MS):
                    waiting = [d.name for d in detached(conn, table)]
            if not names and waiting == before:
                return
            yield names

    def _call(self, conn: Connection, table: TableSpec, days: int) -> list[str]:
        with transaction(conn):
            rows = execute(
                conn,
                statement(
                    "SELECT * FROM {function}({days})",
                    function=name(table.home, self.job.function(table)),
                    days=days,
                ),
            ).all()
        return [str(row[0]) for row in rows]

    def _look(self, conn: Connection, table: TableSpec) -> list[str]:
        """Measure the partitions, and return the names of those that this job still has to create or drop.

        ACCESS SHARE on the partitions; if the lock is not granted soon, nothing is measured.
        """
        try:
            with transaction(conn, lock_timeout_ms=_LOCK_TIMEOUT_MS):
                now: datetime = execute(conn, statement("SELECT now()")).scalar_one()
                existing, waiting = attached(conn, table), detached(conn, table)
        except DBAPIError as error:
            if is_lock_failure(error):
                return []
            raise
        lacking = missing(existing, table.wanted(now, back=False))
        self._measure(table, existing, now, lacking)
        if self.job is CREATE:
            return [table.partition(period) for period in lacking]
        today = now.astimezone(UTC).date()
        due = [d.name for d in waiting if d.drop_on and d.drop_on <= today]
        return due + [p.name for p in droppable(existing, today, table.retention_days)]

    def _measure(
        self, table: TableSpec, existing: list[Partition], now: datetime, lacking: list[Period]
    ) -> None:
        """Set three gauges to alert on; they go where the spans go."""
        measured = {"ahead": runway(existing, table, now), "missing": len(lacking)}
        if lowest := min((p.lower for p in existing if p.lower), default=None):
            measured["oldest_age"] = (now.astimezone(UTC).date() - lowest.date()).days
        for gauge, value in measured.items():
            unit = "{partition}" if gauge == "missing" else "d"
            telemetry.gauge(f"chronos.partitions.{gauge}", unit, value, table=table.name)

    def _later(self, reason: str, undone: list[str] | None) -> Report:
        """Ask for another attempt; after the last, report what is undone, or fail if that is not known."""
        if self.pause_s is not None:
            logger.warning("%s tries again in %.0f s: %s", self.job.name, self.pause_s, reason)
            following = datetime.now(UTC) + timedelta(seconds=self.pause_s)
            report = self._report(
                "retrying",
                contended=undone or [],
                error=reason,
                next_attempt=following.isoformat(timespec="seconds"),
            )
            raise TryAgainError(reason, report)
        reason += f" ({self.message.attempt} attempts)"
        if undone is None:
            self._fail(reason)
        logger.error("%s gave up, undone: %s; %s", self.job.name, ", ".join(undone) or "unknown", reason)
        return self._report("incomplete", contended=undone, error=reason)

    def _fail(self, reason: str) -> NoReturn:
        logger.error("%s failed: %s", self.job.name, reason)
        raise JobFailedError(f"{self.job.name} failed: {reason}", self._report("failed", error=reason))

    def _report(self, status: str, **more: Any) -> Report:
        """The report of all tables, and of each."""
        return {
            "status": status,
            self.job.did: [name for turn in self.turns for name in turn.names],
            "contended": [],
            "error": None,
            **self._when(),
            **more,
            "tables": self.tables,
        }

    def _when(self) -> Report:
        return {
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round((datetime.now(UTC) - self.started).total_seconds(), 3),
            "attempts": self.message.attempt,
        }

    def _keep(self, turn: _Turn) -> Report:
        """The report of one table, stored in the database; a failure to store it does not fail the job."""
        before = self.earlier.get(turn.table) or {}
        if before.get("status") == "done":
            return before
        unfinished = turn.status == "unfinished"
        status = ("retrying" if self.pause_s is not None else "incomplete") if unfinished else turn.status
        report: Report = {
            "status": status,
            self.job.did: turn.names,
            "contended": turn.undone or [],
            "error": turn.reason if turn.status in ("unfinished", "failed") else None,
            "reason": turn.reason if turn.status == "skipped" else None,
            **self._when(),
            "night": self.night.isoformat(),
            "writer": f"{self.message.writer} {telemetry.this_process()}",
        }
        if turn.refused:
            report["refused"] = True
        if status == "retrying":
            following = datetime.now(UTC) + timedelta(seconds=self.pause_s or 0)
            report["next_attempt"] = following.isoformat(timespec="seconds")
        if turn.located is None:
            return report
        kept = reports.Kept(
            job=self.job.name,
            run=self.message.task_id,
            night=self.night,
            writer=str(report["writer"]),
            started=self.started,
            result=status,
            report=report,
        )
        engine = connect_engine(self.settings.database, application_name=f"chronos {self.job.name}")
        try:
            with opened(engine) as conn, transaction(conn, lock_timeout_ms=_LOCK_TIMEOUT_MS):
                # A plain table is not ours yet, so nothing is created in its schema.
                reports.keep(conn, turn.located, kept, make=turn.status != "skipped")
        except (DBAPIError, reports.UntrustedError) as error:
            why = one_line(error)
            logger.warning("the report of %s for %s was not stored: %s", self.job.name, turn.table, why)
        return report
