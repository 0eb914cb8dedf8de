"""The command line: verbs, and the one place that turns an error into a line on stderr and an exit code."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
from chronos.migration.finalize import finish
from chronos.migration.operator import Operator
from chronos.migration.output import Output
from chronos.migration.plan import dry_run as print_plan
from chronos.migration.preflight import Survey
from chronos.migration.rollback import undo
from chronos.migration.run import Options
from chronos.migration.run import migrate as run_migration
from chronos.migration.state import DESCRIPTIONS, State
from chronos.partitions import OLD_TABLE, TABLE
from chronos.settings import get_settings


@contextmanager
def _errors_as_lines() -> Iterator[None]:
    """Every error becomes one line on stderr and its exit code; a traceback helps nobody at 2 AM."""
    try:
        yield
    except ChronosError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except DBAPIError as error:
        click.echo(
            f"Error: {one_line(error)}; nothing was changed. Check the server and the database URL",
            err=True,
        )
        sys.exit(ExitCode.FAILED)
    except Exception as error:  # a defect of ours: still one line, for nobody reads a traceback at 2 AM
        click.echo(
            f"Error: unexpected {type(error).__name__}: {one_line(error)}."
            " What state the tables are in: python -m chronos status",
            err=True,
        )
        sys.exit(ExitCode.FAILED)


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; the second one sets it again and does nothing worse."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if not stop.is_set():
            click.echo("Stopping at the next batch...", err=True)
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} TB"


def _confirm_migration(url: URL, found: Survey, *, ask: bool) -> None:
    click.echo(
        f"Host: {url.host or 'local socket'}   Database: {url.database}\n"
        f"Table: {found.schema}.{TABLE}   Rows (estimate): {found.rows_estimate:,}"
        f"   Size: {_bytes(found.bytes)}\n"
        f"It will be renamed to {OLD_TABLE}; the rows since {found.cutoff:%Y-%m-%d %H:%M} UTC\n"
        "are copied into daily partitions."
    )
    if ask:
        _ask("MIGRATE")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Daily partitions for webhook_log: migrate, look, go back, tidy up."""


@cli.command()
@click.option(
    "--dry-run", is_flag=True, help="Print the plan and its SQL, change nothing; exit 2 on a blocker."
)
@click.option("--yes", is_flag=True, help="Do not ask for the word MIGRATE.")
@click.option("--resume", is_flag=True, help="Carry on an interrupted migration.")
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
    help="Days copied at the same time.",
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
    batch_size: int,
    workers: int,
    verify: str,
    rate_limit: int | None,
    max_replica_lag: float | None,
    report: Path | None,
) -> None:
    """Turn webhook_log into daily partitions while the application writes on.

    The table is renamed to webhook_log_old, a partitioned webhook_log takes its place, the rows of
    the last 15 days are copied, compared, and two functions for its upkeep installed. Asks for the
    word MIGRATE first. On failure all is put back as it was.
    """
    with _errors_as_lines(), _stop_on_signals() as stop:
        settings = get_settings()
        url = settings.database
        telemetry.configure(settings)

        def confirm(found: Survey) -> None:
            _confirm_migration(url, found, ask=not yes)

        engine = connect_engine(url, application_name="chronos migrate")
        if dry_run:
            print_plan(engine, Console())
            return
        run_migration(
            engine,
            Options(
                resume=resume,
                batch_size=batch_size,
                workers=workers,
                content=verify == "full",
                rate_limit=rate_limit,
                max_replica_lag=max_replica_lag,
                report=report,
            ),
            Operator(Output(), stop),
            confirm,
        )


@cli.command()
@click.option("--yes", is_flag=True, help="Do not ask for the word ROLLBACK.")
@click.option("--force", is_flag=True, help="Give up rows that retention has already dropped.")
def rollback(yes: bool, force: bool) -> None:
    """Go back to the plain table; the rows written since the swap come along.

    Works from every phase of a migration, cut off or complete, until finalize. Asks for the word
    ROLLBACK first. Cut off, it goes on where it was when it is called again.
    """
    with _errors_as_lines(), _stop_on_signals() as stop:
        settings = get_settings()
        url = settings.database
        telemetry.configure(settings)

        def confirm(found: State) -> None:
            click.echo(
                f"Host: {url.host or 'local socket'}   Database: {url.database}\n"
                f"{DESCRIPTIONS[found.phase]}\n"
                f"{TABLE} will be the plain table again, with the rows written since the swap."
            )
            if not yes:
                _ask("ROLLBACK")

        engine = connect_engine(url, application_name="chronos rollback")
        undo(engine, Operator(Output(), stop), confirm, force=force)


@cli.command()
@click.option("--yes", is_flag=True, help="Do not ask for the word FINALIZE.")
def finalize(yes: bool) -> None:
    """Drop webhook_log_old, once the migrated table has proven itself.

    Checks first that the migration is complete, that no row within retention is in the old table
    alone, and that nothing depends on it. Asks for the word FINALIZE. There is no way back from here.
    """
    with _errors_as_lines(), _stop_on_signals() as stop:
        settings = get_settings()
        url = settings.database
        telemetry.configure(settings)

        def confirm(found: State) -> None:
            click.echo(
                f"Host: {url.host or 'local socket'}   Database: {url.database}\n"
                f"{DESCRIPTIONS[found.phase]}\n"
                f"{OLD_TABLE} will be dropped for good, and with it all from before"
                f" {found.cutoff:%Y-%m-%d %H:%M} UTC."
            )
            if not yes:
                _ask("FINALIZE")

        engine = connect_engine(url, application_name="chronos finalize")
        finish(engine, Operator(Output(), stop), confirm, settings.webhook_log_retention_days)


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
    """Watch a migration on a PostgreSQL that is started for it and removed again.

    Sample rows, an application that keeps writing, the migration, and what the application noticed.
    Asks for the word MIGRATE when run on a terminal. Your own databases are not touched.
    """
    from chronos.demo.run import demo as run_demo  # here, for no other verb needs what it imports

    def confirm(url: URL, found: Survey) -> None:
        _confirm_migration(url, found, ask=sys.stdin.isatty() and sys.stdout.isatty())

    with _errors_as_lines():
        run_demo(rows, keep=keep, confirm=confirm, output=Output())


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print it for programs.")
def status(as_json: bool) -> None:
    """Say how the table, its partitions and the nightly jobs are; exit 1 when something is wrong.

    Each problem comes with what to type about it. Changes nothing.
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
