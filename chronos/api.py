"""The verbs as functions, for programs; the command line calls these same functions.

Nothing is printed, no signal handler is installed, and there is no prompt: the call is the consent. Failures
are raised as the errors in errors.py. Each function may be called from any thread.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from psycopg2 import errorcodes
from pydantic import SecretStr
from rich.console import Console
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import DBAPIError

from chronos import commands, prompts
from chronos.agreement import require_agreement
from chronos.catalog.locate import require_located
from chronos.db import connect_engine, one_line, opened, sqlstate
from chronos.errors import CannotTellError, ChronosError, RefusedError
from chronos.functions import upgrade
from chronos.locks import Patience
from chronos.migration.checks import Survey
from chronos.migration.console import Output
from chronos.migration.finalize import finish
from chronos.migration.operator import Operator
from chronos.migration.rollback import undo
from chronos.migration.run import LIMITS, Options
from chronos.migration.run import migrate as run_migration
from chronos.migration.state import State, Strategy
from chronos.results import FinalizeResult, JobResult, MigrationResult, RollbackResult, UpkeepResult
from chronos.settings import Settings, get_settings, postgres_url
from chronos.table import Interval, TableSpec
from chronos.which_table import Description, Verb, no_job_maintains, which_table

if TYPE_CHECKING:
    from chronos.health import Overview, Status

logger = logging.getLogger(__name__)

_Word = TypeVar("_Word", bound=StrEnum)
_Number = TypeVar("_Number", int, float)


def migrate(
    table: str | None = None,
    *,
    url: str | URL | None = None,
    column: str | None = None,
    every: Literal["hour", "day", "week", "month"] | Interval | None = None,
    retention_days: int | None = None,
    ahead_days: int | None = None,
    strategy: Literal["copy", "attach"] | Strategy = "copy",
    resume: bool = False,
    hold: bool = False,
    batch_size: int | None = None,
    workers: int | None = None,
    verify: Literal["full", "counts"] | None = None,
    rate_limit: int | None = None,
    max_replica_lag: float | None = None,
    max_lock_wait: float | None = None,
    accept_duplicates: Collection[str] = (),
    report: str | Path | None = None,
    confirm: Callable[[str], bool] | None = None,
    output: Callable[[str], object] | Output | None = None,
    stop: threading.Event | None = None,
) -> MigrationResult:
    """Partition a table under live writes, or continue where an earlier run stopped.

    Returns after the swap, once every row has been compared; with ``hold``, just before the swap. Takes as
    long as the copy.

    - ``table``: as written in SQL, ``webhook_log`` or ``audit."Order Events"``; None: the only one that
      ``chronos.toml`` lists.
    - ``url``: ``postgresql://...``; None: ``DATABASE_URL``.
    - ``column``, ``every``, ``retention_days``, ``ahead_days``: the time column, the partition interval, the
      days to keep and the days to create ahead, for a table that no configuration lists. Defaults: every row
      is kept, in daily partitions, created 30 days ahead. They cannot contradict a configuration.
    - ``strategy``: ``copy`` the rows into partitions, or ``attach`` the table as one partition with all rows.
    - ``resume``: continue what was stopped or held; options below that are None keep their earlier values.
    - ``hold``: stop before the swap, with everything else done.
    - ``batch_size``: rows per copy transaction, 1,000. ``workers``: partitions filled at a time, 2.
    - ``verify``: compare contents (``full``, the default) or only row ``counts``.
    - ``rate_limit``: the most rows to copy per second, all workers together.
    - ``max_replica_lag``: seconds; the copy pauses while any replica is further behind.
    - ``max_lock_wait``: seconds that others may wait behind one of our lock attempts, 1.
    - ``accept_duplicates``: replication slots whose readers may get copied rows twice.
    - ``report``: a file, ``.json`` or ``.html``, that records what was done, even when the run fails.
    - ``confirm``: called with a text that says what will be done, before anything is changed; unless it
      returns True, the call raises RefusedError. None: the call is the consent.
    - ``output``: called with each line that the command line would print, from any thread. If it raises, the
      error is logged and it is not called again; the migration goes on.
    - ``stop``: set it, from any thread, to stop at the next batch.

    Locks on the table: ACCESS SHARE while rows are copied, SHARE ROW EXCLUSIVE for an instant at the start,
    ACCESS EXCLUSIVE for milliseconds at the swap; the strong ones wait 0.1 s per try, later up to
    ``max_lock_wait``.

    Raises RefusedError (a blocker or a wrong option: nothing was changed), InterruptedRunError (stopped or
    cut off; nothing is lost, call again with ``resume``, or call ``rollback``), ChronosError (failed, and the
    table is as it was; a difference between copy and original is the ``__cause__``) or NeedsPersonError.
    """
    described = Description(
        column,
        _word(Interval, "every", every) if every is not None else None,
        _within("retention_days", retention_days),
        _within("ahead_days", ahead_days),
    )
    asked: dict[str, Any] = {
        "batch_size": _within("batch_size", batch_size),
        "workers": _within("workers", workers),
        "content": None if verify is None else _one_of("verify", verify, ("full", "counts")) == "full",
        "rate_limit": _within("rate_limit", rate_limit),
        "max_replica_lag": _within("max_replica_lag", max_replica_lag),
        "max_lock_wait": _within("max_lock_wait", max_lock_wait),
        "accept_duplicates": frozenset(accept_duplicates) or None,
        "report": None if report is None else Path(report),
    }
    given = {option: value for option, value in asked.items() if value is not None}
    options = replace(
        Options(
            strategy=_word(Strategy, "strategy", strategy),
            resume=resume,
            hold=hold,
            given=frozenset(given),
        ),
        **given,
    )
    with typed_errors():
        work = session(Verb.RESUME if resume else Verb.MIGRATE, table, url, described)
        work.require_agreement()

        def begins(found: Survey) -> None:
            lock_wait = options.max_lock_wait
            _ask(operator, confirm, prompts.beginning(work.url, found, lock_wait, work.settings, hold=hold))

        def goes_on(found: State, with_options: Options) -> None:
            _ask(operator, confirm, prompts.resuming(work.engine, found, with_options, work.settings))

        with _operator(output, stop, Patience(longest_s=options.max_lock_wait)) as operator:
            done = run_migration(work.engine, work.table, options, operator, begins, goes_on)
    return replace(done, listed=work.listed)


def rollback(
    table: str | None = None,
    *,
    url: str | URL | None = None,
    force: bool = False,
    confirm: Callable[[str], bool] | None = None,
    output: Callable[[str], object] | Output | None = None,
    stop: threading.Event | None = None,
) -> RollbackResult:
    """Go back to the plain table, from any phase of a migration until ``finalize``.

    Every insert, update, delete and TRUNCATE since the swap is carried over. ``force`` gives up what the
    refusal says can be given up. ``table``, ``url``, ``confirm``, ``output`` and ``stop`` are as in
    ``migrate``.

    Locks: ACCESS EXCLUSIVE on both tables for milliseconds, when they swap names, and briefly on the tables
    that foreign keys refer to; each waits 0.1 to 1 s per try.

    Raises RefusedError (no migration, or something blocks it: nothing was changed), InterruptedRunError (cut
    off; call it again) or NeedsPersonError.
    """
    with typed_errors():
        work = session(Verb.ROLLBACK, table, url)

        def goes_back(found: State, by_hand: bool) -> None:
            _ask(operator, confirm, prompts.going_back(work.url, found, work.settings, by_hand=by_hand))

        with _operator(output, stop) as operator:
            return undo(work.engine, work.table, operator, goes_back, force=force)


def finalize(
    table: str | None = None,
    *,
    url: str | URL | None = None,
    confirm: Callable[[str], bool] | None = None,
    output: Callable[[str], object] | Output | None = None,
    stop: threading.Event | None = None,
) -> FinalizeResult:
    """Drop the old table for good, once nothing needs it any more; after this there is no way back.

    Checks first that the migration is complete, that no row within retention is only in the old table, and
    that nothing depends on that table. After ``attach`` nothing is dropped. ``table``, ``url``, ``confirm``,
    ``output`` and ``stop`` are as in ``migrate``.

    Locks: ACCESS EXCLUSIVE briefly on the table in use, waiting 0.1 to 1 s per try, and on the old one.

    Raises RefusedError (nothing was changed) or InterruptedRunError (cut off; call it again).
    """
    with typed_errors():
        work = session(Verb.FINALIZE, table, url)

        def confirmed(found: State, old_is_there: bool) -> None:
            text = prompts.finalizing(work.engine, found, work.settings, old_is_there=old_is_there)
            _ask(operator, confirm, text)

        with _operator(output, stop) as operator:
            done = finish(work.engine, work.table, operator, confirmed)
    return replace(done, listed=work.listed)


def status(table: str | None = None, *, url: str | URL | None = None) -> Status:
    """Report on one table: its state, partitions, gaps, runway, sizes, jobs and problems.

    ``table`` and ``url`` are as in ``migrate``. Locks: ACCESS SHARE, waiting at most 1 s. Changes nothing.

    Raises CannotTellError (the server does not answer), RefusedError (there is no such table) or
    ChronosError (it is locked).
    """
    from chronos.health import collect  # imported here, as below: no other verb needs it

    with typed_errors(CannotTellError, "cannot tell: {}"):
        work = session(Verb.STATUS, table, url)
        return collect(work.settings, work.table, listed=work.listed)


def overview(*, url: str | URL | None = None) -> Overview:
    """Report on every table that a configuration lists, and on all others with a migration under way.

    A table that cannot be examined becomes an Unknown and does not hide the others. Locks as ``status``.

    Raises CannotTellError (the server does not answer) or RefusedError (the configuration cannot be read).
    """
    from chronos.health import Overview, collect_all, collect_others

    with typed_errors(CannotTellError, "cannot tell: {}"):
        settings = settings_for(url)
        others = collect_others(settings)
        return Overview(tuple(collect_all(settings)), tuple(others))


def upkeep(
    *, url: str | URL | None = None, retry_for: float = 300.0, stop: threading.Event | None = None
) -> UpkeepResult:
    """Create the partitions for the days ahead and drop expired ones, once, for every listed table.

    Does what the two nightly jobs do, without Celery or Redis; safe to run alongside them and itself.
    Anything in use is retried for ``retry_for`` seconds, both jobs together; set ``stop`` to end that. Logs
    what it did to ``chronos.jobs``, and runs ``CHRONOS_ALERT_COMMAND`` if a problem has appeared or is gone.

    Locks: ACCESS EXCLUSIVE on an expired partition and on its table, each with a wait of at most 0.2 s and
    held for one short transaction.

    Per-table failures are in the result. Raises RefusedError (the configuration cannot be read) or
    InterruptedRunError (``stop`` was set; finished work stays).
    """
    from chronos import alerts, jobs

    with typed_errors():
        settings = settings_for(url)
        found = jobs.upkeep(settings, retry_for, (stop or threading.Event()).wait)
        errors = [str(report["error"]) for report in found.values() if report["status"] == "failed"]
        alerts.tell(settings, "; ".join(errors) or None)
    did = {job.name: job.did for job in jobs.JOBS}
    return UpkeepResult(
        tuple(
            JobResult(
                job=name,
                status=report["status"],
                names=tuple(report.get(did[name]) or ()),
                left=tuple(report.get("contended") or ()),
                error=report.get("error") or report.get("reason"),
                reports=report["tables"],
            )
            for name, report in found.items()
        )
    )


def upgrade_functions(table: str | None = None, *, url: str | URL | None = None) -> list[str]:
    """Install this version's two SQL functions, for one table or for every listed one.

    Safe at any time. Returns one line per table. Locks: none on a table. Raises RefusedError.
    """
    with typed_errors():
        settings = settings_for(url)
        if table is not None:
            work = session(Verb.UPGRADE_FUNCTIONS, table, url)
            done = upgrade(work.engine, work.table, listed_in=settings.listed_in)
            return done if work.listed else [*done, f"\n{no_job_maintains(settings, work.table)}"]
        engine = connect_engine(settings.database, application_name=f"chronos {Verb.UPGRADE_FUNCTIONS}")
        return upgrade(engine, *settings.tables, listed_in=settings.listed_in)


@dataclass(frozen=True)
class Session:
    """What a verb works with; ``listed`` says whether a configuration lists the table."""

    settings: Settings
    engine: Engine
    table: TableSpec
    listed: bool

    @property
    def url(self) -> URL:
        """The database it works on."""
        return self.engine.url

    def require_agreement(self) -> None:
        """Raise RefusedError when the configuration is wrong about the table."""
        with opened(self.engine) as conn:
            require_agreement(conn, require_located(conn, self.table), self.settings.listed_in)


def session(
    verb: Verb, table: str | None, url: str | URL | None = None, described: Description | None = None
) -> Session:
    """What ``verb`` works with. Raises RefusedError, see ``which_table``."""
    settings = settings_for(url)
    engine = connect_engine(settings.database, application_name=f"chronos {verb.split()[0]}")
    return Session(settings, engine, *which_table(engine, settings, verb, table, described))


def settings_for(url: str | URL | None) -> Settings:
    """The settings of this process, with ``url`` as the database if one is given. Raises RefusedError."""
    settings = get_settings()
    if url is None:
        return settings
    text = url if isinstance(url, str) else url.render_as_string(hide_password=False)
    postgres_url(text, "url")  # refused here, and never quoted
    return settings.model_copy(update={"database_url": SecretStr(text), "testing": False})


@contextmanager
def typed_errors(
    kind: type[ChronosError] = ChronosError,
    text: str = "{}; nothing was changed",
) -> Iterator[None]:
    """Turn a driver error raised before anything has begun into a ``kind``."""
    try:
        yield
    except DBAPIError as error:
        raise kind(f"{text.format(one_line(error))}. {_what_to_check(error)}") from error


def _what_to_check(error: DBAPIError) -> str:
    """Where to look for the cause of a server or driver error."""
    if sqlstate(error) == errorcodes.INSUFFICIENT_PRIVILEGE:
        return f"What a role needs: {commands.PROGRAM} explain {errorcodes.INSUFFICIENT_PRIVILEGE}"
    return "Check the server and the database URL"


def _ask(operator: Operator, confirm: Callable[[str], bool] | None, text: str) -> None:
    operator.output.line(text)
    if confirm is not None and not confirm(text):
        raise RefusedError("it was not confirmed; nothing was changed")


@contextmanager
def _operator(
    output: Callable[[str], object] | Output | None,
    stop: threading.Event | None,
    patience: Patience | None = None,
) -> Iterator[Operator]:
    if not isinstance(output, Output):
        file = io.StringIO() if output is None else _Lines(output)
        # This is not a terminal, whatever the environment says about terminals and colours.
        console = Console(
            file=file, quiet=output is None, force_terminal=False, no_color=True, highlight=False,
            soft_wrap=True, width=100, emoji=False,
        )  # fmt: skip
        output = Output(console)
    try:
        yield Operator(output, stop or threading.Event(), patience or Patience())
    finally:
        output.close()


class _Lines(io.StringIO):
    """A file that passes each line on as soon as it is complete."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        super().__init__()
        self._tell: Callable[[str], object] | None = tell
        self._rest = ""
        self._turn = threading.Lock()

    def write(self, text: str) -> int:
        """Called by Rich, from any thread."""
        with self._turn:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._hand_on(line.rstrip())
        return len(text)

    def _hand_on(self, line: str) -> None:
        if self._tell is None:
            return
        try:
            self._tell(line)
        except Exception:  # a listener must not end a migration
            self._tell = None
            logger.exception("the output function has failed and is not called again")


def _within(option: str, value: _Number | None) -> _Number | None:
    """``value``, or RefusedError when it is not within the limits of ``option``."""
    lowest, highest = LIMITS[option]
    if value is None or (lowest <= value and (highest is None or value <= highest)):
        return value
    bounds = f"at least {lowest:,}" if highest is None else f"from {lowest:,} to {highest:,}"
    raise RefusedError(f"{option} must be {bounds}, not {value!r}; nothing was changed")


def _one_of(option: str, value: str, words: Collection[str]) -> str:
    if value not in words:
        raise RefusedError(f"{option} must be {' or '.join(words)}, not {value!r}; nothing was changed")
    return value


def _word(kind: type[_Word], option: str, value: str) -> _Word:
    return kind(_one_of(option, value, [word.value for word in kind]))
