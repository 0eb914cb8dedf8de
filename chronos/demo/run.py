"""The demo: a server of its own, a busy webhook_log, its migration, and what the application noticed."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text
from sqlalchemy.engine import URL, Connection, Engine, make_url

from chronos import telemetry
from chronos.catalog.partitions import attached
from chronos.db import connect_engine, execute, name, statement, transaction
from chronos.demo.embedded import EmbeddedPostgres
from chronos.demo.reader import CountingReader
from chronos.demo.rows import create_webhook_log
from chronos.demo.writer import LiveWriter
from chronos.errors import ChronosError, InterruptedRunError
from chronos.locks import Locks
from chronos.migration import state as states
from chronos.migration.checks import Survey
from chronos.migration.console import Output, Summary, for_reading
from chronos.migration.operator import Operator, handled
from chronos.migration.run import Options, migrate
from chronos.migration.state import Strategy
from chronos.settings import Settings
from chronos.table import WEBHOOK_LOG

_TABLE = WEBHOOK_LOG.located("public")
_DAYS = 20
_CONNECTIONS = 4
_INSERTS_PER_SECOND = 300
_LATE_SHARE = 0.02
_DAYS_AHEAD = 60
_RETENTION_DAYS = 10
_COUNTED_DAYS = 14  # within retention: rows that are there before and after
_BAR_WIDTH = 22
_WIDTH = 80

Confirm = Callable[[URL, Survey], None]


class DemoOutput(Output):
    """The demo has a summary of its own, and must fit on two screens."""

    def summary(self, found: Summary) -> None:
        """Only what the migration cost the server."""
        self.line()
        self.cost(found)


def demo(
    rows: int, *, keep: bool, confirm: Confirm, output: Output, strategy: Strategy = Strategy.COPY
) -> None:
    """Migrate a webhook_log of ``rows`` rows on an embedded PostgreSQL while an application uses it.

    ``confirm`` gets the server's URL and what preflight found, and raises RefusedError to cancel. With
    ``keep`` the server keeps running at the end, and the last lines say how to use it and how to stop it.
    Otherwise, and whenever something goes wrong, no process and no file is left behind. Raises
    InterruptedRunError when stopped by a signal, ChronosError when the application hit an error or a row is
    not where it should be.
    """
    telemetry.configure(Settings.model_construct(logfire_token=None))  # nothing here is worth sending
    try:
        with handled(signal.default_int_handler), _server(keep, output) as server:
            url = make_url(server.url)
            engine = connect_engine(url, application_name="chronos demo")
            _make_table(engine, rows, output)
            with LiveWriter(
                url, threads=_CONNECTIONS, rate=_INSERTS_PER_SECOND, past_share=_LATE_SHARE
            ) as writer:
                writer.catch_up()
                output.ok(f"An application inserts {_INSERTS_PER_SECOND} more a second, and will count them")
                output.line()
                run = _migrate(engine, writer, confirm, output, strategy)
                _summarize(engine, writer, run, output)
                _create_partitions(engine, writer, output)
                if strategy is Strategy.ATTACH:
                    _say_what_becomes_of_the_table(engine, output)
                else:
                    _drop_partitions(engine, writer, output)
            _require_every_row(engine, writer, run, output)
            if keep:
                _say_how_to_go_on(server, output, strategy)
    except KeyboardInterrupt:
        # If the signal came while a library was running code with exec, Python would die of the signal and
        # ignore the exit code, unless exec has run again since.
        exec("")
        if output.console.is_terminal:
            output.line()  # the cursor is after a ^C
        raise InterruptedRunError("the demo was stopped; its server is gone, and everything in it") from None


@contextmanager
def _server(keep: bool, output: Output) -> Iterator[EmbeddedPostgres]:
    """An embedded PostgreSQL; it outlives the block only with ``keep``, and only if all went well."""
    output.line("Starting PostgreSQL in a temporary directory...")
    with EmbeddedPostgres(keep=keep) as server:
        output.ok(f"PostgreSQL {server.version} listens on port {server.port}")
        try:
            yield server
        except BaseException:
            if keep:
                subprocess.run(server.stop_command, shell=True, check=False)
            raise


def _make_table(engine: Engine, rows: int, output: Output) -> None:
    with Progress(
        TextColumn("Making sample rows"),
        BarColumn(),
        TaskProgressColumn(),
        console=output.console,
        transient=True,
        disable=not output.console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=rows)
        create_webhook_log(
            engine, rows, days=_DAYS, on_progress=lambda done: progress.update(task, completed=done)
        )
    output.ok(f"{_TABLE} is a plain table with {rows:,} deliveries of the last {_DAYS} days")


@dataclass(frozen=True)
class _Run:
    """A migration as the application saw it: its duration, the wait of each insert, and the reads."""

    seconds: float
    waits: list[float]
    reader: CountingReader


def _migrate(
    engine: Engine, writer: LiveWriter, confirm: Confirm, output: Output, strategy: Strategy
) -> _Run:
    stop = threading.Event()
    first, started = 0, 0.0
    reader = CountingReader(engine.url, datetime.now(UTC) - timedelta(days=_COUNTED_DAYS))
    with ExitStack() as stack:

        def confirmed(found: Survey) -> None:
            nonlocal first, started
            confirm(engine.url, found)
            # From here on a signal takes effect between two batches, not in the middle of one.
            stack.enter_context(handled(lambda *_: stop.set()))
            stack.enter_context(reader)
            first, started = len(writer.commits), time.monotonic()

        try:
            options = Options(strategy=strategy)
            migrate(engine, _TABLE, options, Operator(output, stop), confirmed)
        except InterruptedRunError:
            if not stop.is_set():
                raise
        finally:
            output.close()
        seconds = time.monotonic() - started
    if stop.is_set():
        raise KeyboardInterrupt
    writer.catch_up()
    return _Run(seconds, [commit.seconds for commit in writer.commits[first:]], reader)


def _summarize(engine: Engine, writer: LiveWriter, run: _Run, output: Output) -> None:
    with engine.connect() as conn:
        presence = writer.check(conn)
        with transaction(conn):
            days = execute(conn, statement(_ROWS_A_DAY, log=name(_TABLE.home, _TABLE.name))).all()
    waits, reader = run.waits or [0.0], run.reader
    output.line()
    output.line(f"What the application noticed in these {run.seconds:.1f} s:")
    for label, value in (
        ("Rows written", f"{len(run.waits):,}, {len(run.waits) / run.seconds:,.0f} a second"),
        ("Errors", f"{len(writer.errors) + len(reader.errors)}"),
        ("Rows lost, duplicated", f"{len(presence.lost)}, {len(presence.twice)}"),
        ("Reads that missed rows", f"{reader.short} of {reader.reads:,}"),
        ("Longest wait of a writer", f"{_ms(max(waits))}, median {_ms(statistics.median(waits))}"),
        ("Longest read", _ms(reader.longest_s)),
    ):
        output.line(f"  {label:<26}{value}")
    output.line()
    output.line("Rows a day:")
    _chart([(day, rows) for day, rows in days], output)


_ROWS_A_DAY = """
SELECT ("timestamp" AT TIME ZONE 'UTC')::date, count(*) FROM {log} GROUP BY 1 ORDER BY 1
"""


@dataclass(frozen=True)
class _Partition:
    """What is in one partition."""

    day: date
    rows: int
    bytes: int


def _partitions(conn: Connection) -> dict[str, _Partition]:
    """The partitions of webhook_log by name, oldest first."""
    with transaction(conn):
        counts = execute(
            conn,
            statement(
                "SELECT c.relname, count(*) FROM {log} AS l JOIN pg_class AS c ON c.oid = l.tableoid"
                " GROUP BY 1",
                log=name(_TABLE.home, _TABLE.name),
            ),
        )
        rows = {row[0]: row[1] for row in counts}
        return {
            partition.name: _Partition(partition.lower.date(), rows.get(partition.name, 0), partition.bytes)
            for partition in attached(conn, _TABLE)
            if partition.lower
        }


def _chart(days: list[tuple[date, int]], output: Output) -> None:
    """A bar for each day, in two columns; # where the terminal's encoding has no block characters."""
    block = "█" if output.console.encoding.startswith("utf") else "#"
    most = max(rows for _, rows in days)
    half = (len(days) + 1) // 2
    for place in range(half):
        line = Text()
        for day, rows in days[place::half]:
            bar = block * max(1, round(_BAR_WIDTH * rows / most))
            line.append(f"{day:%m-%d} {rows:>9,} ").append(f"{bar:<{_BAR_WIDTH}}  ", "cyan")
        line.rstrip()
        output.console.print(line)


@dataclass(frozen=True)
class _Call:
    """A call of one of the SQL functions: what it returned, how long it took, and a writer's longest wait."""

    names: list[str]
    seconds: float
    longest_wait: float


def _call(engine: Engine, writer: LiveWriter, function: str, argument: int, output: Output) -> _Call:
    output.line()
    output.line(f"SELECT {function}({argument});")
    query = statement("SELECT {function}({n})", function=name(_TABLE.home, function), n=argument)
    first = len(writer.commits)
    with engine.connect() as conn:
        for attempt in Locks().attempts(conn, [(_TABLE.home, _TABLE.name)]):
            with attempt:
                started = time.monotonic()
                names = [row[0] for row in execute(conn, query)]
    seconds = time.monotonic() - started
    writer.catch_up()
    return _Call(names, seconds, writer.longest_wait(first))


def _create_partitions(engine: Engine, writer: LiveWriter, output: Output) -> None:
    call = _call(engine, writer, _TABLE.create_function, _DAYS_AHEAD, output)
    output.ok(
        f"{len(call.names)} partitions created in {_ms(call.seconds)};"
        f" longest wait of a writer {_ms(call.longest_wait)}"
    )


def _drop_partitions(engine: Engine, writer: LiveWriter, output: Output) -> None:
    with engine.connect() as conn:
        before = _partitions(conn)
    call = _call(engine, writer, _TABLE.drop_function, _RETENTION_DAYS, output)
    rows = sum(before[partition].rows for partition in call.names)
    size = sum(before[partition].bytes for partition in call.names)
    output.ok(
        f"{len(call.names)} partitions with {rows:,} rows, {size / 1024**2:,.0f} MB,"
        f" dropped in {_ms(call.seconds)};\n  longest wait of a writer {_ms(call.longest_wait)}"
    )


def _say_what_becomes_of_the_table(engine: Engine, output: Output) -> None:
    with engine.connect() as conn, transaction(conn):
        state = states.read(conn, _TABLE)
    assert state is not None
    output.line()
    output.line(for_reading(f"{states.what_becomes_of(state.plan)}.", _WIDTH))


def _require_every_row(engine: Engine, writer: LiveWriter, run: _Run, output: Output) -> None:
    """Check again that every row the server reported as stored is there."""
    with engine.connect() as conn:
        presence = writer.check(conn)
    problems: dict[str, list[Any]] = {
        "errors of the writer": writer.errors,
        "errors of the reader": run.reader.errors,
        "reads that missed a row": [f"of {run.reader.reads}"] * run.reader.short,
        "rows lost": presence.lost,
        "rows stored twice": presence.twice,
        "ids used twice": presence.repeated_ids,
    }
    found = [f"{len(what)} {problem} (the first: {what[0]})" for problem, what in problems.items() if what]
    if found:
        raise ChronosError("; ".join(found))
    output.line()
    output.ok(f"All {len(writer.commits):,} rows that the application wrote are there, each exactly once")


def _say_how_to_go_on(server: EmbeddedPostgres, output: Output, strategy: Strategy) -> None:
    python = os.path.relpath(sys.executable)
    url = make_url(server.url).set(drivername="postgresql").render_as_string(hide_password=False)
    output.line()
    output.line("The server keeps running. To look around in it:")
    output.line()
    output.line(f"export DATABASE_URL={url}")
    if strategy is Strategy.COPY:  # its days were dropped
        output.line(f"export WEBHOOK_LOG_RETENTION_DAYS={_RETENTION_DAYS}")
    for verb, effect in (
        ("status", "partitions, gaps, sizes"),
        ("rollback", "back to the plain table, or:"),
        ("finalize", "end the way back" if strategy is Strategy.ATTACH else "drop webhook_log_old"),
    ):
        output.line(f"{f'{python} -m chronos {verb}':<44}# {effect}")
    output.line()
    output.line("To stop it and remove everything:")
    output.line()
    output.line(server.stop_command)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"
