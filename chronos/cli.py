"""The command line: verbs, and the one place that turns an error into a line on stderr and an exit code."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from shlex import quote
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource
from psycopg2 import errorcodes
from rich.console import Console
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import DBAPIError

from chronos import __version__, commands, telemetry
from chronos.agreement import require_agreement
from chronos.catalog.locate import require_located
from chronos.db import connect_engine, is_lock_failure, one_line, opened, sqlstate, transaction
from chronos.errors import ChronosError, ExitCode, RefusedError
from chronos.explain import explain as explanation_of
from chronos.explain import id_of
from chronos.functions import upgrade
from chronos.locks import Patience
from chronos.migration.checks import Survey
from chronos.migration.console import Output, ago, counted, for_reading, in_bytes
from chronos.migration.finalize import finish
from chronos.migration.old_and_new import weigh
from chronos.migration.operator import Operator, handled
from chronos.migration.plan import dry_run as print_plan
from chronos.migration.rollback import undo
from chronos.migration.run import Options
from chronos.migration.run import migrate as run_migration
from chronos.migration.state import Phase, State, Strategy, describe, what_becomes_of
from chronos.settings import CONFIGURATION, Settings, get_settings
from chronos.table import Interval, TableSpec, quoted
from chronos.which_table import Description, Verb, to_be_listed, which_table

if TYPE_CHECKING:
    from chronos.status import Other, Status, Unknown

_Command = TypeVar("_Command", bound=Callable[..., None])


def _say(error: str) -> None:
    """One line on stderr; on a terminal as many as it takes, for it would break them within words."""
    text = f"Error: {error}"
    if sys.stderr is not None and sys.stderr.isatty():
        text = for_reading(text, max(20, shutil.get_terminal_size().columns - 1))
    _to_stderr(text)


def _what_to_check(error: DBAPIError) -> str:
    """Where to look for the cause of what the server, or the driver, has said."""
    if sqlstate(error) == errorcodes.INSUFFICIENT_PRIVILEGE:
        return f"What a role needs: {commands.PROGRAM} explain {errorcodes.INSUFFICIENT_PRIVILEGE}"
    return "Check the server and the database URL"


def _to_stderr(text: str) -> None:
    """Whether anybody can read it or not: the exit code counts, and what was begun goes on."""
    with suppress(OSError, ValueError):
        click.echo(text, err=True)


@contextmanager
def _errors_as_lines() -> Iterator[None]:
    """Every error becomes one line on stderr and its exit code; a traceback helps nobody at 2 AM."""
    try:
        yield
    except ChronosError as error:
        id_ = id_of(error)
        _say(f"{error} [{id_}]" if id_ else str(error))
        sys.exit(error.exit_code)
    except DBAPIError as error:
        _say(f"{one_line(error)}; nothing was changed. {_what_to_check(error)}")
        sys.exit(ExitCode.FAILED)
    except Exception as error:  # a defect of ours: still one line, for nobody reads a traceback at 2 AM
        _say(
            f"unexpected {type(error).__name__}: {one_line(error)}."
            f" What state the tables are in: {commands.status()}"
        )
        sys.exit(ExitCode.FAILED)


@contextmanager
def _operator(max_lock_wait: float = 1.0) -> Iterator[Operator]:
    """Somebody who is told things on stdout, and whom Ctrl-C, SIGTERM and a terminal that goes stop cleanly,
    the second signal no worse than the first.
    """
    operator = Operator(Output(), patience=Patience(longest_s=max_lock_wait))
    stop = operator.stop

    def on_signal(number: int, frame: FrameType | None) -> None:
        first = not stop.is_set()
        stop.set()
        if first:
            stopping = "Stopping at the next batch..."
            if operator.output.console.is_terminal:
                operator.output.line(stopping)  # above the bar, not into it
            else:
                _to_stderr(stopping)

    with handled(on_signal):
        try:
            yield operator
        finally:
            operator.output.close()


@dataclass(frozen=True)
class _Context:
    """What a verb works with; ``listed`` tells whether a configuration lists the table."""

    settings: Settings
    engine: Engine
    table: TableSpec
    listed: bool

    def head(self, table: TableSpec, facts: str = "") -> str:
        """Where a verb is about to work, and on what."""
        return _head(self.engine.url, table, facts, self.settings)


def _settings_and_engine(verb: str) -> tuple[Settings, Engine]:
    settings = get_settings()
    telemetry.configure(settings)
    return settings, connect_engine(settings.database, application_name=f"chronos {verb}")


def _context(
    verb: Verb, table: str | None, described: Description | None = None, options: str = ""
) -> _Context:
    """What ``verb`` works with. Raises RefusedError, see ``which_table``."""
    settings, engine = _settings_and_engine(verb.split()[0])
    return _Context(settings, engine, *which_table(engine, settings, verb, table, described, options))


def _other_options() -> str:
    """The options that were typed, for a migration to begin with, but for those that describe the table."""
    apart = {"resume", *(field.name for field in fields(Description))}
    context = click.get_current_context()
    words: list[str] = []
    for option in context.command.params:
        if (
            not isinstance(option, click.Option)
            or option.name is None
            or option.name in apart
            or context.get_parameter_source(option.name) is not ParameterSource.COMMANDLINE
        ):
            continue
        given = context.params[option.name]
        values = given if option.multiple else (given,)
        words += [
            option.opts[0] if option.is_flag else f"{option.opts[0]} {quote(str(value))}" for value in values
        ]
    return " ".join(words)


def _takes_a_table(command: _Command) -> _Command:
    """The argument of every verb that works on a table."""
    return click.argument("table", required=False, metavar="[TABLE]")(command)


def _ask(word: str) -> None:
    """Have the word typed, exactly. Raises RefusedError otherwise, end of input and Ctrl-C included."""
    try:
        with handled(signal.default_int_handler):
            click.echo(f"Type {word} to go on: ", nl=False)
            answer = sys.stdin.readline()
            typed_unseen = not sys.stdin.isatty()  # what was typed was not shown, nor its end of line
    except (KeyboardInterrupt, OSError):  # OSError: the terminal is gone
        answer, typed_unseen = "", True
    if typed_unseen:
        with suppress(OSError):
            click.echo()
    if answer.rstrip("\r\n") != word:
        raise RefusedError(f"{word} was not typed; nothing was changed")


def _given() -> frozenset[str]:
    """The options of ``Options`` that were typed."""
    context = click.get_current_context()
    typed = {o for o in context.params if context.get_parameter_source(o) is ParameterSource.COMMANDLINE}
    return frozenset("content" if option == "verify" else option for option in typed)


def _weighed(engine: Engine, table: TableSpec) -> tuple[datetime, dict[str, tuple[int, int]]] | None:
    """What ``weigh`` finds, by ACCESS SHARE that is waited for 1 s at most; None: somebody has locked it."""
    with opened(engine) as conn:
        try:
            with transaction(conn, lock_timeout_ms=1_000):
                return weigh(conn, table)
        except DBAPIError as error:
            if not is_lock_failure(error):
                raise
            return None


def _weight(engine: Engine, table: TableSpec) -> str:
    """Rows and bytes of the table in use."""
    found = _weighed(engine, table)
    if found is None:
        return "Size: unknown, for somebody has locked it"
    rows, size = found[1][table.name]
    return f"Rows (estimate): {rows:,}   Size: {in_bytes(size)}"


def _head(url: URL, table: TableSpec, facts: str = "", settings: Settings | None = None) -> str:
    """Where a verb is about to work, and on what; never the password."""
    testing = "" if settings is None else f"   TESTING: {str(settings.testing).lower()}"
    return (
        f"Host: {url.host or 'local socket'}   Port: {url.port or 5432}   Database: {url.database}\n"
        f"User: {url.username or 'of this system'}{testing}\n"
        f"Table: {table.typed}{f'   {facts}' if facts else ''}"
    )


def _lock_wait(seconds: float) -> str:
    return f"Writers wait for a lock at most {seconds:g} s at a time (--max-lock-wait)."


def _announcement(found: Survey, *, hold: bool = False) -> tuple[str, str]:
    """What is known of a table that is to be migrated, and what will be done to it."""
    table, since = found.spec, f"{found.cutoff:%Y-%m-%d %H:%M} UTC"
    at_last = _at_last(table, hold, attaches=found.attaches)
    if found.attaches:
        what = (
            f"Nothing is copied: partitions are built from {since} on;\n"
            f"{quoted(table.name)} gets an index and a check;\n{at_last}"
        )
    else:
        rows = "Every row is" if table.retention_days is None else f"The rows since {since} are"
        what = f"{rows} copied into partitions beside it\nand compared; {at_last}"
    return f"Rows (estimate): {found.rows_estimate:,}   Size: {in_bytes(found.bytes)}", what


def _at_last(table: TableSpec, hold: bool, *, attaches: bool = False) -> str:
    if hold:
        return "no name changes yet."
    if attaches:
        return (
            f"then it is renamed to {quoted(table.history)},\nand is the partition of all rows before that."
        )
    return (
        f"then {quoted(table.name)} is renamed to {quoted(table.old)},\n"
        "and the partitioned table takes its name."
    )


def _what_is_left(found: State, *, hold: bool) -> str:
    """What ``migrate --resume`` will do."""
    table = found.table
    if found.phase is Phase.RETURNING:
        return f"The rollback is called off: {table} stays partitioned, with all that was written."
    if found.plan.attaches:
        if found.phase.swapped:
            return "The foreign keys of the whole adopt those of the partitions."
        left = "It is ready" if found.phase is Phase.READY else "It gets an index and a check"
        return f"{left}." if hold else f"{left}; then it becomes the partition {quoted(table.history)}."
    if found.phase.swapped:
        return "The rows written during the migration are compared once more."
    ready = found.phase is Phase.READY
    left = "What was written meanwhile is replayed" if ready else "The rest is copied and compared"
    return f"{left}; {_at_last(table, hold)}"


def _next(context: _Context, strategy: Strategy) -> str:
    """What to type once the migration is done."""
    table = context.table
    attaches = strategy is Strategy.ATTACH
    finalizing = "gives the way back up" if attaches else f"drops {quoted(table.old)}"
    steps = {
        commands.status(table): "how it is, now and every day",
        commands.finalize(table): f"after some days: {finalizing}",
        commands.rollback(table): "until then: the plain table again, with every row",
    }
    width = max(map(len, steps))
    lines = "\n".join(f"  {command:<{width}}   {what}" for command, what in steps.items())
    if attaches:
        lines += (
            f"\n\n{table.history} is a partition of {table} now, and DROP TABLE {table} would drop all rows:"
            f" to go back by hand, DETACH {table.history} first; better: {commands.rollback(table)}"
        )
    by_celery = bool(context.settings.redis_url)
    if context.listed:
        jobs = "make restart-worker, for the jobs at 01:00 and 02:00"
        if not by_celery:
            jobs = f"let cron run {commands.upkeep()} every night, as there is no REDIS_URL"
        return f"\nNext: {jobs}; then\n{lines}"
    listed_by = context.settings.listed_in
    alone = (
        f" Once there is such a file it alone counts: list {context.settings.tables[0]}, too, if you have it."
    )
    return (
        f"\nNext: put this into {listed_by or CONFIGURATION}, and restart the worker: the jobs at 01:00 and"
        f" 02:00 keep only the tables that are listed.{'' if listed_by else alone}\n\n"
        f"{table.as_toml()}\n\nThen\n{lines}"
    )


def _no_job_keeps(table: TableSpec, settings: Settings) -> str:
    return f"No {CONFIGURATION} lists {table.typed}, so no job keeps it: {to_be_listed(settings, table)}"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="chronos", message="%(prog)s %(version)s")
def cli() -> None:
    """Native partitions for big live tables: migrate, look, go back, tidy up.

    \b
    The usual order:
      python -m chronos demo                see it all on a server of its own
      python -m chronos migrate --dry-run   the plan; --sql FILE: every statement of it
      python -m chronos migrate             asks for the word MIGRATE
      python -m chronos status              now, and every day
      python -m chronos finalize            after some days; until then: rollback

    chronos.toml, or the file that CHRONOS_CONFIG names, lists the tables; without it there is one,
    webhook_log. TABLE is written as in SQL, and may be left out when only one is listed.

    DATABASE_URL and REDIS_URL come from the environment or from .env. Exit codes: 0 done; 1 failed,
    the database is as it was (or unhealthy); 2 refused, nothing was changed; 3 stopped half-way,
    nothing is lost; 4 needs a person.
    """


@cli.command()
@_takes_a_table
@click.option("--column", metavar="NAME", help="The time column of a table that no file lists.")
@click.option(
    "--every",
    type=click.Choice([interval.value for interval in Interval]),
    help="How much time one partition of such a table holds.  [default: day]",
)
@click.option(
    "--retention-days",
    type=click.IntRange(0, 36_500),
    metavar="DAYS",
    help="How many days of such a table are copied and kept.  [default: all]",
)
@click.option(
    "--ahead-days",
    type=click.IntRange(0, 3_650),
    metavar="DAYS",
    help="How many days ahead such a table has partitions.  [default: 30]",
)
@click.option("--dry-run", is_flag=True, help="Print the plan, change nothing; exit 2 on a blocker.")
@click.option(
    "--sql",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="With --dry-run: write the plan's SQL to this file, for psql.",
)
@click.option("--verbose", is_flag=True, help="With --dry-run: all of the plan, not one screen.")
@click.option(
    "--strategy",
    type=click.Choice([strategy.value for strategy in Strategy]),
    default=Strategy.COPY.value,
    show_default=True,
    help="Copy the rows into partitions, or attach the table itself as the partition of all its rows.",
)
@click.option("--yes", is_flag=True, help="Do not ask for the word MIGRATE.")
@click.option(
    "--resume",
    is_flag=True,
    help="Carry on an interrupted or held migration, with the options it had unless given anew.",
)
@click.option(
    "--hold",
    is_flag=True,
    help="End before the names change, with all else done; --resume does the rest, minutes or days later.",
)
@click.option(
    "--max-lock-wait",
    type=click.FloatRange(0.05, 60),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="The longest that anybody may have to wait behind an attempt at a lock.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1, 1_000_000),
    default=1_000,
    show_default=True,
    help="Rows in a transaction of the copy.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 16),
    default=2,
    show_default=True,
    help="Partitions filled at the same time.",
)
@click.option(
    "--verify",
    type=click.Choice(["full", "counts"]),
    default="full",
    show_default=True,
    help="Compare contents as well, or the counts of rows alone.",
)
@click.option(
    "--rate-limit",
    type=click.IntRange(1),
    metavar="ROWS_PER_SECOND",
    help="Copy no faster than this, all workers together.",
)
@click.option(
    "--max-replica-lag",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="Pause while any replica is further behind.",
)
@click.option(
    "--accept-duplicates",
    multiple=True,
    metavar="SLOT",
    help="Migrate though the reader of this replication slot gets copied rows twice; may be repeated.",
)
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.html|FILE.json",
    help="Write what was done and measured to this file, whatever becomes of the run.",
)
def migrate(
    table: str | None,
    column: str | None,
    every: str | None,
    retention_days: int | None,
    ahead_days: int | None,
    strategy: str,
    dry_run: bool,
    sql: Path | None,
    verbose: bool,
    yes: bool,
    resume: bool,
    hold: bool,
    max_lock_wait: float,
    batch_size: int,
    workers: int,
    verify: str,
    rate_limit: int | None,
    max_replica_lag: float | None,
    accept_duplicates: tuple[str, ...],
    report: Path | None,
) -> None:
    """Turn a table into partitions under live writes.

    The rows within retention are copied into partitions beside the table and compared, while the
    table stays in use; then the names change, in milliseconds, and the table that was is kept as
    TABLE_old. With --strategy attach nothing is copied: the table itself becomes the partition of all
    its rows, TABLE_history. --dry-run compares the two. Asks for the word MIGRATE first. On failure all
    is put back as it was.

    \b
    Examples:
      python -m chronos migrate --dry-run
      python -m chronos migrate --dry-run --sql plan.sql
      python -m chronos migrate --rate-limit 20000 --max-replica-lag 5
      python -m chronos migrate --yes --report ticket-4711.html
      python -m chronos migrate --hold
      python -m chronos migrate --strategy attach
      python -m chronos migrate --resume
      python -m chronos migrate sales.events --column created_at --every week
    """
    with _errors_as_lines(), _operator(max_lock_wait) as operator:
        if (sql is not None or verbose) and not dry_run:
            raise RefusedError("--sql and --verbose are for --dry-run; nothing was changed")
        described = Description(column, Interval(every) if every else None, retention_days, ahead_days)
        context = _context(Verb.RESUME if resume else Verb.MIGRATE, table, described, _other_options())
        with opened(context.engine) as conn:
            require_agreement(conn, require_located(conn, context.table), context.settings.listed_in)
        if dry_run:
            print_plan(
                context.engine,
                context.table,
                Console(),
                operator.patience,
                Strategy(strategy),
                frozenset(accept_duplicates),
                sql_file=sql,
                verbose=verbose,
            )
            return

        def announce(table: TableSpec, facts: str, what: str, lock_wait: float) -> None:
            click.echo(f"{context.head(table, facts)}\n{what}\n{_lock_wait(lock_wait)}")
            if not yes:
                _ask("MIGRATE")

        done = run_migration(
            context.engine,
            context.table,
            Options(
                strategy=Strategy(strategy),
                resume=resume,
                hold=hold,
                batch_size=batch_size,
                workers=workers,
                content=verify == "full",
                rate_limit=rate_limit,
                max_replica_lag=max_replica_lag,
                accept_duplicates=frozenset(accept_duplicates),
                report=report,
                max_lock_wait=max_lock_wait,
                given=_given(),
            ),
            operator,
            lambda found: announce(found.spec, *_announcement(found, hold=hold), max_lock_wait),
            lambda found, options: announce(
                found.table,
                f"{_weight(context.engine, found.table)}\n"
                f"Begun: {found.plan.started_at:%Y-%m-%d %H:%M} UTC   Phase: {found.phase}"
                f"{f'   Options: {options}' if str(options) else ''}",
                f"{describe(found)}\n{_what_is_left(found, hold=hold)}",
                options.max_lock_wait,
            ),
        )
        if not hold:
            operator.output.line(_next(context, done))


@cli.command()
@_takes_a_table
@click.option("--yes", is_flag=True, help="Do not ask for the word ROLLBACK.")
@click.option("--force", is_flag=True, help="Give up what stands in the way and can be given up.")
def rollback(table: str | None, yes: bool, force: bool) -> None:
    """Go back to the plain table, with every row written since.

    Works from every phase of a migration, cut off or complete, until finalize. Asks for the word
    ROLLBACK first. Cut off, it goes on where it was when it is called again.

    \b
    Examples:
      python -m chronos rollback
      python -m chronos rollback --yes
      python -m chronos rollback '"Sales"."Order Events"'
    """
    with _errors_as_lines(), _operator() as operator:
        context = _context(Verb.ROLLBACK, table)

        def confirm(found: State) -> None:
            click.echo(
                f"{context.head(found.table)}\n"
                f"{describe(found)}"
                + (
                    ""
                    if found.phase is Phase.UNDONE
                    else f"\n{quoted(found.table.name)} will be the plain table again"
                    f"{', with every row written since the swap' if found.phase.swapped else ''}."
                )
            )
            if not yes:
                _ask("ROLLBACK")

        undo(context.engine, context.table, operator, confirm, force=force)


def _what_finalize_drops(engine: Engine, found: State, *, old_is_there: bool) -> str:
    if not old_is_there:
        return (
            f"{quoted(found.plan.former)} was dropped before; what is left of the migration will be removed."
        )
    if found.plan.attaches:
        return (
            f"{describe(found)}\nNothing is dropped, and there is no way back afterwards.\n"
            f"{what_becomes_of(found.plan)}."
        )
    with_it = ""
    if found.table.retention_days is not None:
        with_it = f", and with it all from\nbefore {found.plan.cutoff:%Y-%m-%d %H:%M} UTC"
    return (
        f"{describe(found)}\n{_old_and_new(engine, found)}\n"
        f"{quoted(found.table.old)} will be dropped for good{with_it}."
    )


def _old_and_new(engine: Engine, found: State) -> str:
    """How much both tables hold, and how long ago the names changed."""
    weighed = _weighed(engine, found.table)
    if weighed is None:
        return "How large they are is unknown: somebody has locked one of them."
    now, sizes = weighed
    lines = [
        f"{quoted(relation)}: {counted(rows, 'row')} (estimate), {in_bytes(size)}"
        for relation, (rows, size) in sizes.items()
    ]
    if found.fence is not None:
        lines.append(f"swapped {ago(now - found.fence)}")
    return "\n".join(lines)


@cli.command()
@_takes_a_table
@click.option("--yes", is_flag=True, help="Do not ask for the word FINALIZE.")
def finalize(table: str | None, yes: bool) -> None:
    """Drop TABLE_old, once the migrated table has proven itself; end the way back.

    Checks first that the migration is complete, that no row within retention is in the old table
    alone, and that nothing depends on it. After --strategy attach it drops nothing of the table. Asks for
    the word FINALIZE. There is no way back from here.

    \b
    Examples:
      python -m chronos finalize
      python -m chronos finalize --yes
    """
    with _errors_as_lines(), _operator() as operator:
        context = _context(Verb.FINALIZE, table)

        def confirm(found: State, old_is_there: bool) -> None:
            what = _what_finalize_drops(context.engine, found, old_is_there=old_is_there)
            click.echo(f"{context.head(found.table)}\n{what}")
            if not yes:
                _ask("FINALIZE")

        finish(context.engine, context.table, operator, confirm)
        if not context.listed:
            operator.output.line(_no_job_keeps(context.table, context.settings))


@cli.command()
@_takes_a_table
def upgrade_functions(table: str | None) -> None:
    """Install the two SQL functions of this version; safe to run at any time.

    They keep the partitions of a table and can be called by hand. Without TABLE: those of every table
    that is listed. Asks nothing.
    """
    with _errors_as_lines():
        settings, engine = _settings_and_engine(Verb.UPGRADE_FUNCTIONS)
        found, listed = settings.tables, True
        if table is not None:
            one, listed = which_table(engine, settings, Verb.UPGRADE_FUNCTIONS, table)
            found = (one,)
        for line in upgrade(engine, *found, listed_in=settings.listed_in):
            click.echo(line)
        if not listed:
            click.echo(f"\n{_no_job_keeps(found[0], settings)}")


@cli.command()
@click.option(
    "--rows",
    type=click.IntRange(1, 100_000_000),
    default=200_000,
    show_default=True,
    help="Sample rows to begin with.",
)
@click.option(
    "--strategy",
    type=click.Choice([strategy.value for strategy in Strategy]),
    default=Strategy.COPY.value,
    show_default=True,
    help="Copy the rows, or attach the table itself; see migrate.",
)
@click.option("--keep", is_flag=True, help="Leave the server up, and say how to reach and to stop it.")
def demo(rows: int, strategy: str, keep: bool) -> None:
    """Watch a migration on a PostgreSQL of its own, removed again.

    Sample rows, an application that keeps writing, the migration, and what the application noticed.
    Asks for the word MIGRATE when run on a terminal. Your own databases are not touched.

    \b
    Examples:
      python -m chronos demo
      python -m chronos demo --rows 1000000 --keep
      python -m chronos demo --strategy attach
    """
    # Here, for no other verb needs what it imports.
    from chronos.demo.run import DemoOutput
    from chronos.demo.run import demo as run_demo

    def confirm(url: URL, found: Survey) -> None:
        facts, what = _announcement(found)
        click.echo(f"{_head(url, found.spec, facts)}\n{what}\n{_lock_wait(Patience().longest_s)}")
        if sys.stdin.isatty() and sys.stdout.isatty():
            _ask("MIGRATE")

    with _errors_as_lines():
        run_demo(rows, keep=keep, confirm=confirm, output=DemoOutput(), strategy=Strategy(strategy))


class _Lines(logging.Handler):
    """What the jobs log, as lines: on stderr what somebody should read, the rest on stdout."""

    def __enter__(self) -> None:
        log = logging.getLogger("chronos")
        log.setLevel(logging.INFO)
        log.addHandler(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("chronos").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        with suppress(OSError, ValueError):
            click.echo(record.getMessage(), err=record.levelno >= logging.WARNING)


@cli.command()
@click.option(
    "--retry-for",
    type=click.FloatRange(0, 3_600),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="How long what is in use is tried again; both jobs together.",
)
def upkeep(retry_for: float) -> None:
    """Create the partitions of the days ahead and drop expired ones, for every listed table, once.

    What the two nightly jobs do, without Celery or Redis: for cron, systemd timers and Kubernetes CronJobs.
    It is safe beside the jobs and beside itself, at any hour, as often as you like. What was done is on
    stdout, what was not is on stderr, and status shows both. Exit codes: 0 all is done; 1 something failed; 2
    refused, nothing was begun; 3 something is in use and left to the next run.

    \b
    Examples:
      python -m chronos upkeep
      python -m chronos upkeep --retry-for 3000 >/dev/null
    """
    # Here, for no other verb needs what they import.
    from chronos import alerts, jobs

    with _errors_as_lines(), _operator() as operator, _Lines():
        settings, _ = _settings_and_engine("upkeep")
        try:
            found = jobs.upkeep(settings, retry_for, operator.stop.wait)
        finally:
            telemetry.flush()
        errors = [str(report["error"]) for report in found.values() if report["status"] == "failed"]
        alerts.tell(settings, "; ".join(errors) or None)
        tables = [table for report in found.values() for table in report["tables"].values()]
        results = {report["status"] for report in found.values()}
        if tables and all(table.get("refused") for table in tables):
            sys.exit(ExitCode.REFUSED)
        if "failed" in results:
            sys.exit(ExitCode.FAILED)
        if "incomplete" in results:
            sys.exit(ExitCode.INTERRUPTED)


@cli.command()
@_takes_a_table
@click.option("--json", "as_json", is_flag=True, help="Print it for programs.")
@click.option(
    "--prometheus",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.prom",
    help="Also write it to this file, for the textfile collector of node_exporter.",
)
def status(table: str | None, as_json: bool, prometheus: Path | None) -> None:
    """Say how tables, partitions and jobs are; exit 1 on a problem.

    Without TABLE: of every table that is listed. Each problem comes with what to type about it.
    Changes nothing. Exit 2 when it cannot tell, because the server does not answer.

    \b
    Examples:
      python -m chronos status
      python -m chronos status --json | jq -r '.problems[]'
      python -m chronos status --prometheus /var/lib/node_exporter/textfile/chronos.prom
    """
    # Here, for no other verb needs what it imports.
    from chronos.status import Unknown, collect, collect_all, collect_others, show

    with _errors_as_lines():
        try:
            settings, engine = _settings_and_engine(Verb.STATUS)
            others: list[Other] = []
            if table is None:
                others = collect_others(settings)
                try:
                    found = collect_all(settings) if len(settings.tables) > 1 else [collect(settings)]
                except ChronosError:
                    if not as_json:
                        _say_others(others)
                    raise
            else:
                spec, listed = which_table(engine, settings, Verb.STATUS, table)
                found = [collect(settings, spec, listed=listed)]
        except DBAPIError as error:
            _write_metrics(prometheus, None)
            raise RefusedError(f"cannot tell: {one_line(error)}. {_what_to_check(error)}") from error
        _write_metrics(prometheus, found)
        healthy = all(one.healthy for one in (*found, *others))
        if as_json:
            shown = [one.as_json() for one in found]
            whole: dict[str, Any] = shown[0] if len(shown) == 1 else {"tables": shown}
            whole["healthy"] = healthy
            if table is None:
                whole["also_under_way"] = [other.as_json() for other in others]
            click.echo(json.dumps(whole, indent=2))
        else:
            for place, one in enumerate(found):
                click.echo("\n" * 2 if place else "", nl=False)
                show(one)
            _say_others(others)
        if not healthy:
            sys.exit(
                max((one.exit_code for one in found if isinstance(one, Unknown)), default=ExitCode.FAILED)
            )


def _write_metrics(file: Path | None, found: Sequence[Status | Unknown] | None) -> None:
    if file is not None:
        from chronos import metrics

        metrics.write(file, found)


@cli.command()
@click.argument("id_", metavar="ID")
def explain(id_: str) -> None:
    """Say more about the id of a message, an exit code or an SQLSTATE.

    Prints its paragraph of docs/TROUBLESHOOTING.md. Asks no server.

    \b
    Examples:
      python -m chronos explain inbound-fk
      python -m chronos explain 3
    """
    with _errors_as_lines():
        click.echo(explanation_of(id_))


def _say_others(others: Sequence[Other]) -> None:
    for other in others:
        text = str(other)
        if sys.stdout.isatty():
            text = for_reading(text, max(20, shutil.get_terminal_size().columns - 1))
        click.echo(f"\n{text}")


def main(arguments: list[str] | None = None, **extra: Any) -> None:
    """Run the command line; returns only by SystemExit."""
    cli.main(args=arguments, prog_name=commands.PROGRAM, **extra)
