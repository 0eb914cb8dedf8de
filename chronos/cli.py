"""The command line: verbs, and the one place that turns an error into a line on stderr and an exit code."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from chronos import telemetry
from chronos.db import connect_engine, one_line
from chronos.errors import ChronosError, ExitCode, RefusedError
from chronos.functions import upgrade
from chronos.locks import Patience
from chronos.migration.checks import Survey
from chronos.migration.console import Output, for_reading, in_bytes
from chronos.migration.finalize import finish
from chronos.migration.operator import Operator
from chronos.migration.plan import dry_run as print_plan
from chronos.migration.rollback import undo
from chronos.migration.run import Options
from chronos.migration.run import migrate as run_migration
from chronos.migration.state import State, describe
from chronos.settings import Settings, get_settings
from chronos.table import TableSpec

_NEXT = """
Next: make restart-worker, for the jobs at 01:00 and 02:00; then
  python -m chronos status     how it is, now and every day
  python -m chronos finalize   after some days: drops {old}
  python -m chronos rollback   until then: the plain table again, with every row"""


def _say(error: str) -> None:
    """One line on stderr; on a terminal as many as it takes, for it would break them within words."""
    text = f"Error: {error}"
    if sys.stderr is not None and sys.stderr.isatty():
        text = for_reading(text, max(20, shutil.get_terminal_size().columns - 1))
    _to_stderr(text)


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
        _say(str(error))
        sys.exit(error.exit_code)
    except DBAPIError as error:
        _say(f"{one_line(error)}; nothing was changed. Check the server and the database URL")
        sys.exit(ExitCode.FAILED)
    except Exception as error:  # a defect of ours: still one line, for nobody reads a traceback at 2 AM
        _say(
            f"unexpected {type(error).__name__}: {one_line(error)}."
            " What state the tables are in: python -m chronos status"
        )
        sys.exit(ExitCode.FAILED)


@contextmanager
def _operator(max_lock_wait: float = 1.0) -> Iterator[Operator]:
    """Somebody who is told things on stdout, and whom Ctrl-C and SIGTERM stop, the second no worse."""
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

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield operator
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _table(settings: Settings) -> TableSpec:
    """The table to work on: the only one that is configured."""
    return settings.tables[0]


def _ask(word: str) -> None:
    """Have the word typed, exactly. Raises RefusedError otherwise, end of input and Ctrl-C included."""
    click.echo(f"Type {word} to go on: ", nl=False)
    asking = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        answer = sys.stdin.readline()
    except KeyboardInterrupt:
        click.echo()
        answer = ""
    finally:
        signal.signal(signal.SIGINT, asking)
    if not sys.stdin.isatty():
        click.echo()  # what was typed was not shown, nor its end of line
    if answer.rstrip("\r\n") != word:
        raise RefusedError(f"{word} was not typed; nothing was changed")


def _target(url: URL, settings: Settings | None) -> str:
    """Where a verb is about to work; never the password."""
    testing = "" if settings is None else f"   TESTING: {str(settings.testing).lower()}"
    return (
        f"Host: {url.host or 'local socket'}   Port: {url.port or 5432}   Database: {url.database}\n"
        f"User: {url.username or 'of this system'}{testing}"
    )


def _confirm_migration(
    url: URL, found: Survey, *, ask: bool, settings: Settings | None = None, max_lock_wait: float = 1.0
) -> None:
    table = found.spec
    click.echo(
        f"{_target(url, settings)}\n"
        f"Table: {found.spec.schema}.{table}   Rows (estimate): {found.rows_estimate:,}"
        f"   Size: {in_bytes(found.bytes)}\n"
        f"The rows since {found.cutoff:%Y-%m-%d %H:%M} UTC are copied into partitions beside it\n"
        f"and compared; then {table} is renamed to {table.old},\n"
        f"and the partitioned table takes its name.\n"
        f"Writers wait for a lock at most {max_lock_wait:g} s at a time (--max-lock-wait)."
    )
    if ask:
        _ask("MIGRATE")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Daily partitions for webhook_log: migrate, look, go back, tidy up.

    \b
    The usual order:
      python -m chronos demo                see it all on a server of its own
      python -m chronos migrate --dry-run   the plan and every statement of it
      python -m chronos migrate             asks for the word MIGRATE
      python -m chronos status              now, and every day
      python -m chronos finalize            after some days; until then: rollback

    DATABASE_URL and REDIS_URL come from the environment or from .env. Exit codes: 0 done; 1 failed,
    the database is as it was (or unhealthy); 2 refused, nothing was changed; 3 stopped half-way,
    nothing is lost; 4 needs a person.
    """


@cli.command()
@click.option(
    "--dry-run", is_flag=True, help="Print the plan and its SQL, change nothing; exit 2 on a blocker."
)
@click.option("--yes", is_flag=True, help="Do not ask for the word MIGRATE.")
@click.option("--resume", is_flag=True, help="Carry on an interrupted or held migration.")
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
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.json",
    help="Write what was done and measured to this file.",
)
def migrate(
    dry_run: bool,
    yes: bool,
    resume: bool,
    hold: bool,
    max_lock_wait: float,
    batch_size: int,
    workers: int,
    verify: str,
    rate_limit: int | None,
    max_replica_lag: float | None,
    report: Path | None,
) -> None:
    """Turn webhook_log into daily partitions under live writes.

    The rows of the last 15 days are copied into partitions beside the table and compared, while the
    table stays in use; then the names change, in milliseconds, and the table that was is kept as
    webhook_log_old. Asks for the word MIGRATE first. On failure all is put back as it was.

    \b
    Examples:
      python -m chronos migrate --dry-run > plan.sql
      python -m chronos migrate --rate-limit 20000 --max-replica-lag 5
      python -m chronos migrate --yes --report report.json
      python -m chronos migrate --hold
      python -m chronos migrate --resume
    """
    with _errors_as_lines(), _operator(max_lock_wait) as operator:
        settings = get_settings()
        url = settings.database
        telemetry.configure(settings)

        def confirm(found: Survey) -> None:
            _confirm_migration(url, found, ask=not yes, settings=settings, max_lock_wait=max_lock_wait)

        table = _table(settings)
        engine = connect_engine(url, application_name="chronos migrate")
        if dry_run:
            print_plan(engine, table, Console(), operator.patience)
            return
        run_migration(
            engine,
            table,
            Options(
                resume=resume,
                hold=hold,
                batch_size=batch_size,
                workers=workers,
                content=verify == "full",
                rate_limit=rate_limit,
                max_replica_lag=max_replica_lag,
                report=report,
            ),
            operator,
            confirm,
        )
        if not hold:
            operator.output.line(_NEXT.format(old=table.old))


@cli.command()
@click.option("--yes", is_flag=True, help="Do not ask for the word ROLLBACK.")
@click.option("--force", is_flag=True, help="Give up rows that retention has already dropped.")
def rollback(yes: bool, force: bool) -> None:
    """Go back to the plain table, with every row written since.

    Works from every phase of a migration, cut off or complete, until finalize. Asks for the word
    ROLLBACK first. Cut off, it goes on where it was when it is called again.

    \b
    Examples:
      python -m chronos rollback
      python -m chronos rollback --yes
    """
    with _errors_as_lines(), _operator() as operator:
        settings = get_settings()
        url = settings.database
        telemetry.configure(settings)

        def confirm(found: State) -> None:
            click.echo(
                f"{_target(url, settings)}\n"
                f"{describe(found.table, found.phase)}\n"
                f"{found.table} will be the plain table again"
                f"{', with every row written since the swap' if found.phase.swapped else ''}."
            )
            if not yes:
                _ask("ROLLBACK")

        engine = connect_engine(url, application_name="chronos rollback")
        undo(engine, _table(settings), operator, confirm, force=force)


@cli.command()
@click.option("--yes", is_flag=True, help="Do not ask for the word FINALIZE.")
def finalize(yes: bool) -> None:
    """Drop webhook_log_old, once the migrated table has proven itself.

    Checks first that the migration is complete, that no row within retention is in the old table
    alone, and that nothing depends on it. Asks for the word FINALIZE. There is no way back from here.

    \b
    Examples:
      python -m chronos finalize
      python -m chronos finalize --yes
    """
    with _errors_as_lines(), _operator() as operator:
        settings = get_settings()
        url = settings.database
        telemetry.configure(settings)

        def confirm(found: State, old_is_there: bool) -> None:
            what = (
                f"{describe(found.table, found.phase)}\n{found.table.old} will be dropped for good,"
                f" and with it all from\nbefore {found.plan.cutoff:%Y-%m-%d %H:%M} UTC."
                if old_is_there
                else f"{found.table.old} was dropped by hand; what is left of the migration will be removed."
            )
            click.echo(f"{_target(url, settings)}\n{what}")
            if not yes:
                _ask("FINALIZE")

        engine = connect_engine(url, application_name="chronos finalize")
        finish(engine, _table(settings), operator, confirm)


@cli.command()
def upgrade_functions() -> None:
    """Install the two SQL functions of this version; safe to run at any time.

    They keep the partitions of webhook_log and can be called by hand. Asks nothing.
    """
    with _errors_as_lines():
        settings = get_settings()
        engine = connect_engine(settings.database, application_name="chronos upgrade-functions")
        for table in settings.tables:
            upgrade(engine, table)
            click.echo(f"Installed {' and '.join(table.functions)}")


@cli.command()
@click.option(
    "--rows",
    type=click.IntRange(1, 100_000_000),
    default=200_000,
    show_default=True,
    help="Sample rows to begin with.",
)
@click.option("--keep", is_flag=True, help="Leave the server up, and say how to reach and to stop it.")
def demo(rows: int, keep: bool) -> None:
    """Watch a migration on a PostgreSQL of its own, removed again.

    Sample rows, an application that keeps writing, the migration, and what the application noticed.
    Asks for the word MIGRATE when run on a terminal. Your own databases are not touched.

    \b
    Examples:
      python -m chronos demo
      python -m chronos demo --rows 1000000 --keep
    """
    from chronos.demo.run import demo as run_demo  # here, for no other verb needs what it imports

    def confirm(url: URL, found: Survey) -> None:
        _confirm_migration(url, found, ask=sys.stdin.isatty() and sys.stdout.isatty())

    with _errors_as_lines():
        run_demo(rows, keep=keep, confirm=confirm, output=Output())


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print it for programs.")
def status(as_json: bool) -> None:
    """Say how table, partitions and jobs are; exit 1 on a problem.

    Each problem comes with what to type about it. Changes nothing.

    \b
    Examples:
      python -m chronos status
      python -m chronos status --json | jq -r '.problems[]'
    """
    from chronos.status import collect, show  # here, for no other verb needs what it imports

    with _errors_as_lines():
        found = collect(get_settings())
        if as_json:
            click.echo(json.dumps(found.as_json(), indent=2))
        else:
            show(found)
        if not found.healthy:
            sys.exit(ExitCode.FAILED)


def main(arguments: list[str] | None = None, **extra: Any) -> None:
    """Run the command line; returns only by SystemExit."""
    cli.main(args=arguments, prog_name="python -m chronos", **extra)
