"""What a nightly job does, from the message that starts it to the report it leaves; Celery is in worker.py.

One attempt follows another until all is done, an hour is over, or something fails that waiting does not
mend. An attempt holds the lease (job_lock.py) and takes every table of the settings in turn, whatever has
become of the one before: it calls the table's SQL function in transactions of a bounded size. What it came
to is the result of the task, a line in the log, and a report in Redis under `{job}:last`, which `status`
shows.

A night counts once, however many messages ask for it: two beats send two, a worker that was off finds
one for each night it missed, and a broker may deliver one again. The report says which night was done,
and for a message of the schedule that is reason enough to do nothing. A message sent by hand always runs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, NoReturn
from zoneinfo import ZoneInfo

import redis
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from chronos import commands, telemetry
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
    sqlstate,
    statement,
    transaction,
)
from chronos.errors import ChronosError, RefusedError
from chronos.functions import grace_days, grace_disagrees
from chronos.job_lock import Lease, LeaseHeldError, connect, keep_lease
from chronos.locks import lock_holders
from chronos.settings import Settings
from chronos.table import Interval, Period, TableSpec

logger = logging.getLogger(__name__)

Report = dict[str, Any]

# Seconds between two attempts: 18 attempts in 54 minutes, so that a job is through before the next.
PAUSES_S = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, *[300.0] * 9)

# Days made in one transaction: until it ends, nobody can write the table that the foreign key refers to.
_STEP_DAYS = {Interval.HOUR: 1, Interval.DAY: 7, Interval.WEEK: 49, Interval.MONTH: 210}

# Clocks differ, and a worker's may be behind that of the beat whose message it answers.
_CLOCK_SLACK = timedelta(minutes=5)

_LOOK_LOCK_TIMEOUT_MS = 500


@dataclass(frozen=True)
class Job:
    """A nightly job: its name (task, lease), its hour in BEAT_TIMEZONE, a table's SQL function that it calls.

    ``did`` is what the function has done to the partitions whose names it returns.
    """

    name: str
    hour: int
    function: Callable[[TableSpec], str]
    did: str

    @property
    def last_key(self) -> str:
        """Where in Redis the report of the last run is."""
        return f"{self.name}:last"


CREATE = Job("create_future_partitions_job", 1, lambda table: table.create_function, "created")
DROP = Job("drop_old_partitions_job", 2, lambda table: table.drop_function, "dropped")
JOBS = (CREATE, DROP)


@dataclass(frozen=True)
class Message:
    """What asks for an attempt: ``nightly`` when the schedule does, ``earlier`` the report so far."""

    task_id: str
    nightly: bool = False
    attempt: int = 1
    earlier: Mapping[str, Any] | None = None


class JobFailedError(ChronosError):
    """The job could not be done, and waiting longer would not help; the message is one line."""


class TryAgainError(ChronosError):
    """The attempt came to nothing, or not to the end; ``report`` is for the next one."""

    def __init__(self, reason: str, report: Report) -> None:
        super().__init__(reason)
        self.report = report


@dataclass
class _Turn:
    """What became of one table in an attempt: ``table`` is its name as the configuration has it.

    ``undone`` names what is left of it, None when nobody could look.
    """

    table: str
    names: list[str]
    status: str = "done"
    reason: str | None = None
    undone: list[str] | None = field(default_factory=list)


class _NotReadyError(Exception):
    """The table is not migrated, so there is nothing to do yet."""


class _UnfinishedError(Exception):
    """Something is in the way that may be gone later; ``undone`` names what is left."""

    def __init__(self, reason: str, undone: list[str]) -> None:
        super().__init__(reason)
        self.undone = undone


def last_due(job: Job, settings: Settings, now: datetime) -> datetime:
    """When the schedule last asked for the job: the latest of its hours that is not after ``now``."""
    today = now.astimezone(ZoneInfo(settings.beat_timezone)).date()
    due = _due(job, settings, today)
    return due if due <= now else _due(job, settings, today - timedelta(days=1))


def next_due(job: Job, settings: Settings, now: datetime) -> datetime:
    """When the schedule will next ask for the job, after ``now``."""
    today = now.astimezone(ZoneInfo(settings.beat_timezone)).date()
    due = _due(job, settings, today)
    return due if due > now else _due(job, settings, today + timedelta(days=1))


def _due(job: Job, settings: Settings, day: date) -> datetime:
    # In UTC, because two times of one zone are compared by what the clock on the wall shows.
    return datetime.combine(day, time(job.hour), ZoneInfo(settings.beat_timezone)).astimezone(UTC)


def read_last(client: redis.Redis, job: Job) -> Report | None:
    """The report of the last run, None when there is none to be read. Raises redis.RedisError."""
    text = client.get(job.last_key)
    try:
        report = json.loads(str(text)) if text is not None else None
    except ValueError:
        return None
    return report if isinstance(report, dict) else None


def attempt(job: Job, settings: Settings, message: Message, pause_s: float | None) -> Report:
    """One attempt at ``job``; ``pause_s`` is how long until the next, None when this is the last.

    Returns the report: its ``status`` is `done`, `skipped` (with the ``reason``), or `incomplete` when
    the last attempt has left something undone (``contended`` names it). Raises TryAgainError for
    another attempt, JobFailedError for none. Locks: those of the SQL function, each waited for 200 ms
    at the most and held for one transaction.
    """
    with telemetry.span("{job}, attempt {attempt}", job=job.name, attempt=message.attempt):
        report = _leased(job, settings, message, pause_s)
        with telemetry.span("{job}: {status}", job=job.name, **report):
            return report


def _leased(job: Job, settings: Settings, message: Message, pause_s: float | None) -> Report:
    try:
        with connect(settings) as client, keep_lease(client, job.name) as lease:
            due = last_due(job, settings, datetime.now(UTC) + _CLOCK_SLACK)
            night = due.astimezone(ZoneInfo(settings.beat_timezone)).date()
            last = read_last(client, job) or {}
            if reason := _taken_care_of(last, night, message):
                return _skipped(job, reason)
            return _Attempt(job, settings, message, pause_s, lease, client, night, last).run()
    except LeaseHeldError as error:
        return _skipped(job, str(error))
    except RefusedError as error:
        logger.error("%s failed: %s", job.name, error)
        raise JobFailedError(f"{job.name} failed: {error}") from None
    except redis.RedisError as error:
        reason = f"Redis does not answer: {error}"
        if pause_s is None:
            logger.error("%s failed: %s", job.name, reason)
            raise JobFailedError(f"{job.name} failed: {reason}") from None
        raise TryAgainError(reason, dict(message.earlier or {})) from None


def _skipped(job: Job, reason: str) -> Report:
    logger.info("%s skipped: %s", job.name, reason)
    return {"status": "skipped", "reason": reason}


def _taken_care_of(last: Report, night: date, message: Message) -> str | None:
    """Why a message of the schedule needs no run of its own, None if it does."""
    if not message.nightly or last.get("night") != night.isoformat() or last.get("task") == message.task_id:
        return None
    if last.get("status") == "done":
        return f"already done for the night of {night}, at {last.get('started')}"
    if last.get("status") == "retrying":
        late = datetime.now(UTC) - datetime.fromisoformat(last["next_attempt"])
        if late < timedelta(minutes=10):
            return f"another message of the night of {night} is at it; next attempt {last['next_attempt']}"
    return None


# It runs with the rights of whoever calls it.
_FUNCTION = """
SELECT pg_get_userbyid(p.proowner), pg_has_role(p.proowner, c.relowner, 'MEMBER')
FROM pg_proc p, pg_class c
WHERE p.oid = to_regprocedure(format('%I.%I(integer)', {schema}, {function}))
  AND c.oid = to_regclass(format('%I.%I', {schema}, {table}))
"""


class _Attempt:
    """One attempt under the lease: the work, then the report."""

    def __init__(
        self,
        job: Job,
        settings: Settings,
        message: Message,
        pause_s: float | None,
        lease: Lease,
        client: redis.Redis,
        night: date,
        last: Report,
    ) -> None:
        earlier = message.earlier or {}
        self.job = job
        self.settings = settings
        self.message = message
        self.pause_s = pause_s
        self.lease = lease
        self.client = client
        self.night = night
        self.last = last
        self.earlier = earlier
        self.succeeded: str | None = last.get("succeeded")
        self.started = datetime.fromisoformat(earlier.get("started") or datetime.now(UTC).isoformat())
        self.names: list[str] = list(earlier.get(job.did) or [])
        self.turns: list[_Turn] = []

    def run(self) -> Report:
        """Do the work and leave the report. Returns it, or raises as ``attempt`` does."""
        for table in self.settings.tables:
            self.turns.append(self._turn(table))
        unfinished, failed = self._with("unfinished"), self._with("failed")
        if unfinished and (self.pause_s is not None or not failed):
            unknown = any(turn.undone is None for turn in unfinished)
            undone = [name for turn in unfinished for name in turn.undone or []]
            return self._later(self._reasons(*unfinished, *failed), None if unknown else undone)
        if failed:
            self._fail(self._reasons(*failed, *unfinished))
        not_ready = self._with("skipped")
        if len(not_ready) == len(self.turns):
            return self._report("skipped", reason=self._reasons(*not_ready))
        logger.info("%s %s %s", self.job.name, self.job.did, ", ".join(self.names) or "nothing")
        return self._report("done", **({"reason": self._reasons(*not_ready)} if not_ready else {}))

    def _with(self, status: str) -> list[_Turn]:
        return [turn for turn in self.turns if turn.status == status]

    def _reasons(self, *turns: _Turn) -> str:
        """Each reason once, with its table where there are several."""
        several = len(self.turns) > 1
        return "; ".join(
            dict.fromkeys(f"{turn.table}: {turn.reason}" if several else str(turn.reason) for turn in turns)
        )

    def _turn(self, spec: TableSpec) -> _Turn:
        """The job for one table. Whatever becomes of it, the next has its turn."""
        turn = _Turn(spec.typed, [])
        try:
            self._upkeep(spec, turn)
        except _NotReadyError as error:
            turn.status, turn.reason = "skipped", str(error)
            logger.warning("%s skipped: %s", self.job.name, error)
        except _UnfinishedError as error:
            turn.status, turn.reason, turn.undone = "unfinished", str(error), error.undone
        except DBAPIError as error:
            turn.status, turn.reason = "failed", one_line(error)
            if is_disconnect(error):
                turn.status, turn.undone = "unfinished", None
                turn.reason = f"PostgreSQL does not answer: {turn.reason}"
        except RefusedError as error:
            turn.status, turn.reason = "failed", str(error)
        except Exception as error:
            logger.exception("%s failed for %s", self.job.name, turn.table)
            turn.status, turn.reason = "failed", f"unexpected {type(error).__name__}: {one_line(error)}"
        return turn

    def _upkeep(self, spec: TableSpec, turn: _Turn) -> None:
        url = self.settings.database
        with connect_engine(url, application_name=f"chronos {self.job.name}").connect() as conn:
            table = locate(conn, spec)
            if table is None:
                raise _NotReadyError(f"there is no table {spec} in this database; see {commands.status()}")
            require_agreement(conn, table, self.settings.listed_in)
            turn.names += self._known(self.earlier, turn.table).get(self.job.did) or []
            try:
                for names in self._calls(conn, table):
                    self.names += names
                    turn.names += names
                self._look(conn, table)
            except DBAPIError as error:
                if sqlstate(error) == "55000":  # what the functions say of a table that is plain
                    raise _NotReadyError(one_line(error)) from None
                if not is_lock_failure(error):
                    raise
                undone = self._look(conn, table)
                with transaction(conn):
                    holders = lock_holders(conn, [(table.home, name) for name in (table.name, *undone)])
                reason = f"{one_line(error)}; {table} is in use by "
                reason += "; ".join(map(str, holders[:3])) or "nobody any more"
                raise _UnfinishedError(reason, undone) from None

    @staticmethod
    def _known(report: Mapping[str, Any], table: str) -> Mapping[str, Any]:
        """What ``report`` says of one table."""
        return (report.get("tables") or {}).get(table) or {}

    def _calls(self, conn: Connection, table: TableSpec) -> Iterator[list[str]]:
        """The names that each call of the function returned; one transaction a call."""
        function = self.job.function(table)
        with transaction(conn):
            owner, trusted = execute(
                conn, statement(_FUNCTION, schema=table.home, function=function, table=table.name)
            ).one_or_none() or (None, False)
        if owner is None:
            raise _NotReadyError(
                f"the function {function} is not installed; migrate first: {commands.migrate(table)}"
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
        """Call again for as long as a call drops something, or detaches something to be dropped later."""
        waiting: list[str] | None = None if table.grace_days else []
        while True:
            names, before = self._call(conn, table, days), waiting
            if table.grace_days:
                with transaction(conn, lock_timeout_ms=_LOOK_LOCK_TIMEOUT_MS):
                    waiting = [d.name for d in detached(conn, table)]
            if not names and waiting == before:
                return
            yield names

    def _call(self, conn: Connection, table: TableSpec, days: int) -> list[str]:
        self.lease.renew()
        if self.lease.lost:
            raise _UnfinishedError("the lease was lost", [])
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
        """Measure what there is, and return the names of what this job has still to do.

        ACCESS SHARE on the partitions; where that cannot be had soon, nothing is measured.
        """
        try:
            with transaction(conn, lock_timeout_ms=_LOOK_LOCK_TIMEOUT_MS):
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
        """Three gauges to be alerted on; they go where the spans go."""
        import logfire  # here, because it takes long to load and only a worker gets here

        measured = {"ahead": runway(existing, table, now), "missing": len(lacking)}
        if lowest := min((p.lower for p in existing if p.lower), default=None):
            measured["oldest_age"] = (now.astimezone(UTC).date() - lowest.date()).days
        for gauge, value in measured.items():
            unit = "{partition}" if gauge == "missing" else "d"
            logfire.metric_gauge(f"chronos.partitions.{gauge}", unit=unit).set(value, {"table": table.name})

    def _later(self, reason: str, undone: list[str] | None) -> Report:
        """Ask for another attempt; after the last, report what is undone, or fail if nobody could look."""
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
        self._report("failed", error=reason)
        raise JobFailedError(f"{self.job.name} failed: {reason}")

    def _report(self, status: str, **more: Any) -> Report:
        """The report, kept in Redis as well; a Redis that does not answer is no reason to fail."""
        report: Report = {
            "status": status,
            self.job.did: self.names,
            "contended": [],
            "error": None,
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round((datetime.now(UTC) - self.started).total_seconds(), 3),
            "attempts": self.message.attempt,
            **more,
        }
        self.lease.renew()
        if self.lease.lost:
            logger.warning("%s lost its lease while it ran: %s", self.job.name, self.lease.lost)
            report["lease_lost"] = self.lease.lost
        now = datetime.now(UTC).isoformat(timespec="seconds")
        if status == "done":
            self.succeeded = now
        if len(self.turns) > 1:
            report["tables"] = {turn.table: self._of(turn, status, now) for turn in self.turns}
        kept = {
            **report,
            "night": self.night.isoformat(),
            "task": self.message.task_id,
            "succeeded": self.succeeded,
        }
        try:
            self.client.set(self.job.last_key, json.dumps(kept))
        except redis.RedisError as error:
            logger.warning("the report of %s could not be kept in Redis: %s", self.job.name, error)
        return report

    def _of(self, turn: _Turn, status: str, now: str) -> Report:
        """What the report says of one table."""
        unfinished = turn.status == "unfinished"
        before = self._known(self.last, turn.table) if "tables" in self.last else self.last
        return {
            "status": ("retrying" if status == "retrying" else "incomplete") if unfinished else turn.status,
            self.job.did: turn.names,
            "contended": turn.undone or [],
            "error": turn.reason if turn.status in ("unfinished", "failed") else None,
            "reason": turn.reason if turn.status == "skipped" else None,
            "succeeded": now if turn.status == "done" else before.get("succeeded"),
        }
