"""The command line: verbs, and the one place that turns an error into a line on stderr and an exit code."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from shlex import quote
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource
from rich.console import Console
from sqlalchemy.engine import URL

from chronos import __version__, api, commands, prompts, telemetry
from chronos.db import one_line
from chronos.errors import CannotTellError, ChronosError, ExitCode, RefusedError, UndescribedError
from chronos.explain import explain as explanation_of
from chronos.explain import id_of
from chronos.locks import Patience
from chronos.migration.checks import Survey
from chronos.migration.console import Output, for_reading
from chronos.migration.operator import handled
from chronos.migration.plan import dry_run as print_plan
from chronos.migration.run import LIMITS, Options
from chronos.migration.state import Strategy
from chronos.results import MigrationResult
from chronos.settings import CONFIGURATION, get_settings
from chronos.table import Interval, quoted
from chronos.which_table import Description, Verb, no_job_maintains

if TYPE_CHECKING:
    from chronos.health import Other, Status, Unknown

_Command = TypeVar("_Command", bound=Callable[..., None])


def _say(error: str) -> None:
    """Print one line on stderr; on a terminal, break it between words, because the terminal would not."""
    text = f"Error: {error}"
    if sys.stderr is not None and sys.stderr.isatty():
        text = for_reading(text, max(20, shutil.get_terminal_size().columns - 1))
    _to_stderr(text)


def _to_stderr(text: str) -> None:
    """Print on stderr if possible; if not, the exit code still counts and the work goes on."""
    with suppress(OSError, ValueError):
        click.echo(text, err=True)


@contextmanager
def _errors_as_lines() -> Iterator[None]:
    """Turn every error into one line on stderr and an exit code; a traceback helps nobody at 2 AM."""
    try:
        with api.typed_errors():
            yield
    except ChronosError as error:
        words = [str(error)]
        if isinstance(error, UndescribedError):
            words += _other_options()
        if id_ := id_of(error):
            words.append(f"[{id_}]")
        _say(" ".join(words))
        sys.exit(error.exit_code)
    except Exception as error:  # our bug: still one line
        _say(
            f"unexpected {type(error).__name__}: {one_line(error)}."
            f" To see the state of the tables: {commands.status()}"
        )
        sys.exit(ExitCode.FAILED)


@contextmanager
def _verb() -> Iterator[tuple[Output, threading.Event]]:
    """Yield the output on stdout, and an event that Ctrl-C, SIGTERM and the loss of the terminal set for a
    clean stop; a second signal does no harm. Errors become lines.
    """
    with _errors_as_lines():
        telemetry.configure(get_settings())
        output, stop = Output(), threading.Event()

        def on_signal(number: int, frame: FrameType | None) -> None:
            first = not stop.is_set()
            stop.set()
            if first:
                stopping = "Stopping at the next batch..."
                if output.console.is_terminal:
                    output.line(stopping)  # above the bar, not in it
                else:
                    _to_stderr(stopping)

        with handled(on_signal):
            yield output, stop


def _other_options() -> list[str]:
    """The options typed to start a migration, except those that describe the table."""
    apart = {"resume", *(field.name for field in fields(Description))}
    context = click.get_current_context()
    words: list[str] = []
    for option in context.command.params:
        if not isinstance(option, click.Option) or option.name in apart or option.name not in _typed():
            continue
        given = context.params[option.name]
        values = given if option.multiple else (given,)
        words += [
            option.opts[0] if option.is_flag else f"{option.opts[0]} {quote(str(value))}" for value in values
        ]
    return words


def _typed() -> dict[str, Any]:
    """The options that were typed, by their names in Python."""
    context = click.get_current_context()
    return {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }


def _whole(option: str) -> click.IntRange:
    lowest, highest = LIMITS[option]
    return click.IntRange(int(lowest), None if highest is None else int(highest))


def _decimal(option: str) -> click.FloatRange:
    return click.FloatRange(*LIMITS[option])


def _takes_a_table(command: _Command) -> _Command:
    """The argument of every verb that works on a table."""
    return click.argument("table", required=False, metavar="[TABLE]")(command)


def _ask(word: str) -> bool:
    """Ask for exactly this word. Raises RefusedError for anything else, including end of input and Ctrl-C."""
    try:
        with handled(signal.default_int_handler):
            click.echo(f"Type {word} to continue: ", nl=False)
            answer = sys.stdin.readline()
            not_echoed = not sys.stdin.isatty()  # the input and its newline are not on the screen
    except (KeyboardInterrupt, OSError):  # OSError: the terminal is gone
        answer, not_echoed = "", True
    if not_echoed:
        with suppress(OSError):
            click.echo()
    if answer.rstrip("\r\n") != word:
        raise RefusedError(f"{word} was not typed; nothing was changed")
    return True


def _confirmed_by(word: str, *, yes: bool) -> Callable[[str], bool] | None:
    """A function that asks for consent to what is then on the screen; None with --yes."""
    return None if yes else lambda _: _ask(word)


def _next(done: MigrationResult) -> str:
    """What to type once the migration is done."""
    table, settings = done.table, get_settings()
    attaches = done.strategy is Strategy.ATTACH
    finalizing = "ends the way back" if attaches else f"drops {quoted(table.old)}"
    steps = {
        commands.status(table): "check it now and every day",
        commands.finalize(table): f"after some days: {finalizing}",
        commands.rollback(table): "until then: back to the plain table, with every row",
    }
    width = max(map(len, steps))
    lines = "\n".join(f"  {command:<{width}}   {what}" for command, what in steps.items())
    if attaches:
        lines += (
            f"\n\n{table.history} is a partition of {table} now, and DROP TABLE {table} would drop all rows:"
            f" to go back by hand, DETACH {table.history} first; better: {commands.rollback(table)}"
        )
    if done.listed:
        jobs = "make restart-worker, for the jobs at 01:00 and 02:00"
        if not settings.redis_url:
            jobs = f"let cron run {commands.upkeep()} every night, because REDIS_URL is not set"
        return f"\nNext: {jobs}; then\n{lines}"
    listed_by = settings.listed_in
    alone = f" Once that file exists, only it counts: list {settings.tables[0]} there too, if you have it."
    return (
        f"\nNext: put this into {listed_by or CONFIGURATION}, and restart the worker: the jobs at 01:00 and"
        f" 02:00 maintain only the tables that are listed.{'' if listed_by else alone}\n\n"
        f"{table.as_toml()}\n\nThen\n{lines}"
    )


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="chronos", message="%(prog)s %(version)s")
def cli() -> None:
    """Native partitions for big live tables: migrate, check, roll back, clean up.

    \b
    The usual order:
      python -m chronos demo                try it all on a throwaway server
      python -m chronos migrate --dry-run   the plan; --sql FILE: every statement of it
      python -m chronos migrate             asks for the word MIGRATE
      python -m chronos status              now, and every day
      python -m chronos finalize            after some days; until then: rollback

    chronos.toml, or the file that CHRONOS_CONFIG names, lists the tables; without it there is one,
    webhook_log. Write TABLE as in SQL; leave it out when only one is listed.

    DATABASE_URL and REDIS_URL come from the environment or from .env. Exit codes: 0 done; 1 failed,
    the database is as it was (or unhealthy); 2 refused, nothing was changed; 3 stopped half-way,
    nothing is lost; 4 needs a person.
    """


@cli.command()
@_takes_a_table
@click.option("--column", metavar="NAME", help="The time column of an unlisted table.")
@click.option(
    "--every",
    type=click.Choice([interval.value for interval in Interval]),
    help="The time span of one partition of an unlisted table.  [default: day]",
)
@click.option(
    "--retention-days",
    type=_whole("retention_days"),
    metavar="DAYS",
    help="How many days of an unlisted table to copy and keep.  [default: all]",
)
@click.option(
    "--ahead-days",
    type=_whole("ahead_days"),
    metavar="DAYS",
    help="For how many days ahead an unlisted table gets partitions.  [default: 30]",
)
@click.option("--dry-run", is_flag=True, help="Print the plan, change nothing; exit 2 on a blocker.")
@click.option(
    "--sql",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="With --dry-run: write the plan's SQL to this file, for psql.",
)
@click.option("--verbose", is_flag=True, help="With --dry-run: print the whole plan, not one screen.")
@click.option(
    "--strategy",
    type=click.Choice([strategy.value for strategy in Strategy]),
    default=Strategy.COPY.value,
    show_default=True,
    help="Copy the rows into partitions, or attach the table itself as one partition with all its rows.",
)
@click.option("--yes", is_flag=True, help="Do not ask for the word MIGRATE.")
@click.option(
    "--resume",
    is_flag=True,
    help="Continue an interrupted or held migration, with its earlier options unless given again.",
)
@click.option(
    "--hold",
    is_flag=True,
    help="Stop before the names change, with all else done; --resume does the rest, minutes or days later.",
)
@click.option(
    "--max-lock-wait",
    type=_decimal("max_lock_wait"),
    default=Options.max_lock_wait,
    show_default=True,
    metavar="SECONDS",
    help="The longest that others may have to wait behind one of our lock attempts.",
)
@click.option(
    "--batch-size",
    type=_whole("batch_size"),
    default=Options.batch_size,
    show_default=True,
    help="Rows per transaction of the copy.",
)
@click.option(
    "--workers",
    type=_whole("workers"),
    default=Options.workers,
    show_default=True,
    help="Partitions filled at the same time.",
)
@click.option(
    "--verify",
    type=click.Choice(["full", "counts"]),
    default="full",
    show_default=True,
    help="Compare contents, or only row counts.",
)
@click.option(
    "--rate-limit",
    type=_whole("rate_limit"),
    metavar="ROWS_PER_SECOND",
    help="Copy no faster than this, all workers together.",
)
@click.option(
    "--max-replica-lag",
    type=_decimal("max_replica_lag"),
    metavar="SECONDS",
    help="Pause while any replica is further behind.",
)
@click.option(
    "--accept-duplicates",
    multiple=True,
    metavar="SLOT",
    help="Migrate even if readers of this replication slot get copied rows twice; may be repeated.",
)
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.html|FILE.json",
    help="Write what was done and measured to this file, even when the run fails.",
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
    """Partition a table under live writes.

    The rows within retention are copied into partitions and compared while the table stays in use;
    then the names change, in milliseconds, and the original table is kept as TABLE_old. With
    --strategy attach nothing is copied: the table itself becomes one partition with all its rows,
    TABLE_history. To compare the two, use --dry-run. Asks for the word MIGRATE first. On failure
    everything is put back as it was.

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
    with _verb() as (output, stop):
        if (sql is not None or verbose) and not dry_run:
            raise RefusedError("--sql and --verbose are for --dry-run; nothing was changed")
        if dry_run:
            described = Description(column, Interval(every) if every else None, retention_days, ahead_days)
            work = api.session(Verb.RESUME if resume else Verb.MIGRATE, table, described=described)
            work.require_agreement()
            print_plan(
                work.engine,
                work.table,
                Console(),
                Patience(longest_s=max_lock_wait),
                Strategy(strategy),
                frozenset(accept_duplicates),
                sql_file=sql,
                verbose=verbose,
            )
            return
        typed = _typed()
        for option in ("yes", "dry_run", "sql", "verbose"):
            typed.pop(option, None)
        done = api.migrate(**typed, confirm=_confirmed_by("MIGRATE", yes=yes), output=output, stop=stop)
        if not hold:
            output.line(_next(done))


@cli.command()
@_takes_a_table
@click.option("--yes", is_flag=True, help="Do not ask for the word ROLLBACK.")
@click.option("--force", is_flag=True, help="Go back without what the refusal says can be given up.")
def rollback(table: str | None, yes: bool, force: bool) -> None:
    """Go back to the plain table with every row.

    Rows written since the swap are carried over. Works from any phase of a migration, cut off or
    complete, until finalize. Asks for the word ROLLBACK first. If it is cut off, call it again: it
    continues where it was.

    \b
    Examples:
      python -m chronos rollback
      python -m chronos rollback --yes
      python -m chronos rollback '"Sales"."Order Events"'
    """
    with _verb() as (output, stop):
        confirm = _confirmed_by("ROLLBACK", yes=yes)
        api.rollback(table, force=force, confirm=confirm, output=output, stop=stop)


@cli.command()
@_takes_a_table
@click.option("--yes", is_flag=True, help="Do not ask for the word FINALIZE.")
def finalize(table: str | None, yes: bool) -> None:
    """Drop TABLE_old and end the way back.

    For when the migrated table has proven itself. Checks first that the migration is complete, that no
    row within retention is only in the old table, and that nothing depends on that table. After
    --strategy attach it drops nothing of the table. Asks for the word FINALIZE.

    \b
    Examples:
      python -m chronos finalize
      python -m chronos finalize --yes
    """
    with _verb() as (output, stop):
        done = api.finalize(table, confirm=_confirmed_by("FINALIZE", yes=yes), output=output, stop=stop)
        if not done.listed:
            output.line(no_job_maintains(get_settings(), done.table))


@cli.command()
@_takes_a_table
def upgrade_functions(table: str | None) -> None:
    """Install this version's two SQL functions.

    They create and drop the partitions of a table and can be called by hand. Without TABLE: those of
    every listed table. Safe to run at any time; does not ask for confirmation.
    """
    with _verb():
        for line in api.upgrade_functions(table):
            click.echo(line)


@cli.command()
@click.option(
    "--rows",
    type=click.IntRange(1, 100_000_000),
    default=200_000,
    show_default=True,
    help="Sample rows to start with.",
)
@click.option(
    "--strategy",
    type=click.Choice([strategy.value for strategy in Strategy]),
    default=Strategy.COPY.value,
    show_default=True,
    help="Copy the rows, or attach the table itself; see migrate.",
)
@click.option("--keep", is_flag=True, help="Leave the server running, and say how to reach and stop it.")
def demo(rows: int, strategy: str, keep: bool) -> None:
    """Watch a migration on a throwaway PostgreSQL.

    Sample rows, an application that keeps writing, the migration, and what the application noticed.
    Asks for the word MIGRATE when run on a terminal. Your own databases are not touched.

    \b
    Examples:
      python -m chronos demo
      python -m chronos demo --rows 1000000 --keep
      python -m chronos demo --strategy attach
    """
    # Imported here: no other verb needs it.
    from chronos.demo.run import DemoOutput
    from chronos.demo.run import demo as run_demo

    def confirm(url: URL, found: Survey) -> None:
        click.echo(prompts.beginning(url, found, Patience().longest_s))
        if sys.stdin.isatty() and sys.stdout.isatty():
            _ask("MIGRATE")

    with _errors_as_lines():
        run_demo(rows, keep=keep, confirm=confirm, output=DemoOutput(), strategy=Strategy(strategy))


class _Lines(logging.Handler):
    """Prints what the jobs log: warnings and errors on stderr, the rest on stdout."""

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
    help="How long to retry what is in use; both jobs together.",
)
def upkeep(retry_for: float) -> None:
    """Create and drop partitions once, for cron.

    Creates the partitions for the days ahead and drops expired ones, for every listed table. Does what the
    two nightly jobs do, without Celery or Redis: for cron, systemd timers and Kubernetes CronJobs. It is
    safe alongside the jobs and itself, at any hour, as often as you like. What was done is on stdout, what
    was not is on stderr, and status shows both. Exit codes: 0 all is done; 1 something failed; 2 refused,
    nothing was begun; 3 something is in use and left to the next run.

    \b
    Examples:
      python -m chronos upkeep
      python -m chronos upkeep --retry-for 3000 >/dev/null
    """
    with _verb() as (_, stop), _Lines():
        try:
            done = api.upkeep(retry_for=retry_for, stop=stop)
        finally:
            telemetry.flush()
        if not done.ok:
            sys.exit(done.exit_code)


@cli.command()
@_takes_a_table
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option(
    "--prometheus",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.prom",
    help="Also write it to this file, for the textfile collector of node_exporter.",
)
def status(table: str | None, as_json: bool, prometheus: Path | None) -> None:
    """Show tables, partitions, jobs and problems.

    Without TABLE: those of every listed table. Each problem comes with what to type. Changes nothing.
    Exit codes: 0 healthy; 1 there is a problem; 2 it cannot tell, because the server does not answer.

    \b
    Examples:
      python -m chronos status
      python -m chronos status --json | jq -r '.problems[]'
      python -m chronos status --prometheus /var/lib/node_exporter/textfile/chronos.prom
    """
    # Imported here: no other verb needs it.
    from chronos.health import Overview, Unknown, show

    with _errors_as_lines():
        telemetry.configure(get_settings())
        try:
            found = api.overview() if table is None else Overview((api.status(table),))
        except CannotTellError:
            _write_metrics(prometheus, None)
            raise
        if len(found.tables) == 1 and isinstance(unknown := found.tables[0], Unknown):
            if not as_json:
                _say_others(found.others)
            raise unknown.error
        _write_metrics(prometheus, found.tables)
        if as_json:
            click.echo(json.dumps(found.as_json() if table is None else found.tables[0].as_json(), indent=2))
        else:
            for place, one in enumerate(found.tables):
                click.echo("\n" * 2 if place else "", nl=False)
                show(one)
            _say_others(found.others)
        if not found.healthy:
            sys.exit(found.exit_code)


def _write_metrics(file: Path | None, found: Sequence[Status | Unknown] | None) -> None:
    if file is not None:
        from chronos import metrics

        metrics.write(file, found)


@cli.command()
@click.argument("id_", metavar="ID")
def explain(id_: str) -> None:
    """Explain a message id, exit code or SQLSTATE.

    Prints its paragraph of docs/TROUBLESHOOTING.md. Needs no server.

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
    """Run the command line; always ends in SystemExit."""
    cli.main(args=arguments, prog_name=commands.PROGRAM, **extra)
