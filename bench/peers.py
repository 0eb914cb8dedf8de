"""``python -m bench.peers --rows N``: chronos beside the tools you might pick instead.

Each runs its own commands on a copy of the same database, under the same live application.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError

from bench import tools
from bench.application import COMPARED_DAYS, Account, differing, remember, today, watched
from bench.chart import draw
from bench.report import RESULTS, goal, goals, rotated, say, table, write_part
from bench.stage import WRITES_A_SECOND, Stage, opened_stage

TITLE = "Beside the tools you might pick instead"
CHART = Path(__file__).resolve().parents[1] / "docs" / "peers.svg"
IDLE = "no migration"

_DAYS = 20
_IDLE_S = 10.0
_LOOK_PAUSE_S = 0.1
_LOOK = """
SELECT pg_database_size(current_database()),
       EXISTS (SELECT FROM pg_class WHERE relname = 'webhook_log' AND relkind = 'p')
"""


@dataclass(frozen=True)
class Run:
    """One run of a tool: its rows, the bytes it wrote, and what the application saw.

    ``seconds`` is for all its commands, ``whole_s`` until the partitioned table was in use with every row in
    place.
    """

    rows: int
    seconds: float
    whole_s: float
    wal: int
    disk: int
    differ: int
    account: Account
    twice: str | None

    @property
    def rate(self) -> float:
        """Rows a second, from the start of the first command to the end of the last."""
        return self.rows / self.seconds


@dataclass
class Found:
    """All runs of one way, and the errors of those that failed."""

    runs: list[Run] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def middle(self, of: Callable[[Run], float]) -> float:
        """The median."""
        return statistics.median(map(of, self.runs))

    def most(self, of: Callable[[Run], float]) -> float:
        """The worst."""
        return max(map(of, self.runs))

    def total(self, of: Callable[[Run], int]) -> int:
        """The sum."""
        return sum(map(of, self.runs))


@click.command()
@click.option("--rows", type=click.IntRange(10_000), default=500_000, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS)
@click.option("--chart", type=click.Path(dir_okay=False, path_type=Path), default=CHART)
def main(rows: int, rounds: int, output: Path, chart: Path) -> None:
    """Migrate ROWS rows of about 1.1 kB with each tool that is installed, and write the results."""
    started = time.monotonic()
    found: dict[str, Found] = {IDLE: Found()}
    with opened_stage() as stage:
        about = stage.describe()
        say(f"making {rows:,} rows")
        template = stage.template(rows, _DAYS)
        day = today()
        since = day - timedelta(days=COMPARED_DAYS)
        remember(stage.engine(template), since)
        missing = {tool.name: how for tool in tools.TOOLS if (how := tool.missing(stage.engine(template)))}
        for name, how in missing.items():
            say(f"{name} is not installed: {how}")
        there = [tools.Tool(IDLE, _idle), *(tool for tool in tools.TOOLS if tool.name not in missing)]
        for turn, (name, tool) in rotated([(tool.name, tool) for tool in there], rounds):
            mine = found.setdefault(name, Found())
            with stage.clone(template) as engine:
                try:
                    run = _measured(stage, engine, tool, day, since)
                except (tools.ToolError, DBAPIError) as error:
                    mine.failed.append(str(error).partition("\n")[0])
                    say(f"{turn + 1}  {name} failed: {mine.failed[-1]}")
                    continue
            mine.runs.append(run)
            say(
                f"{turn + 1}  {name}: {run.rows:,} rows in {run.seconds:.1f} s; {run.account.short} reads"
                f" short, {run.account.missed} misses, {len(run.account.errors)} errors,"
                f" {run.differ} rows differ"
            )
    minutes = (time.monotonic() - started) / 60
    about += [
        f"`make bench-peers ROWS={rows}`; measured {datetime.now(UTC):%Y-%m-%d} in {minutes:.0f} minutes;"
        f" {f'{rounds} runs each, in rotating order' if rounds > 1 else 'one run each'}",
    ]
    write_part(output, TITLE, report(about, found, missing))
    draw(chart, f"{rows:,} rows of 1.1 kB made partitioned under a live application", _drawn(found))


def _idle(engine: Engine) -> None:
    time.sleep(_IDLE_S)


@dataclass
class _Watch:
    """What was seen of the database: its sizes in bytes, and when webhook_log became partitioned."""

    sizes: list[int] = field(default_factory=list)
    partitioned: float | None = None


def _measured(stage: Stage, engine: Engine, tool: tools.Tool, day: datetime, since: datetime) -> Run:
    tool.prepare(engine)
    with watched(engine, day) as account, _looking(engine) as seen:
        before = stage.wal()
        started = time.monotonic()
        twice = tool.migrate(engine)
        seconds = time.monotonic() - started
        wal = stage.wal() - before
    whole = seen.partitioned - started if tool.swaps and seen.partitioned else seconds
    with engine.connect() as conn:
        rows = int(conn.exec_driver_sql("SELECT count(*) FROM webhook_log").scalar_one())
    differ = differing(engine, account, since)
    return Run(rows, seconds, whole, wal, max(seen.sizes) - seen.sizes[0], differ, account, twice)


@contextmanager
def _looking(engine: Engine) -> Iterator[_Watch]:
    """Poll the database during the block; takes no lock on the table."""
    seen = _Watch()
    done = threading.Event()

    def look() -> None:
        with engine.connect() as conn:
            conn.execution_options(isolation_level="AUTOCOMMIT")
            while True:
                size, partitioned = conn.exec_driver_sql(_LOOK).one()
                seen.sizes.append(int(size))
                if partitioned and seen.partitioned is None:
                    seen.partitioned = time.monotonic()
                if done.wait(_LOOK_PAUSE_S):
                    return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def report(about: list[str], found: dict[str, Found], missing: dict[str, str]) -> list[str]:
    """The lines of this part of the results."""
    head = (
        *("way", "rows", "seconds", "rows/s", "all rows in partitions after, s"),
        *("reads short of rows", "first to last of them, s"),
        *("updates and deletes that hit no row", "errors", "writer waited, ms", "reader waited, ms"),
        *("WAL a row", "extra disk at the peak", "rows that differ at the end"),
    )
    lines = [
        *(f"- {line}" for line in about),
        f"- During each run, an application with 4 connections made {WRITES_A_SECOND} transactions a second"
        " (50% inserts, 40% updates by id, 10% deletes) and kept a ledger; one reader kept counting the rows"
        " of a past day, one kept looking for the 20 newest rows. A row differs at the end if it is missing,"
        " extra, duplicated, or not what the ledger says.",
        "- Seconds run from the start of the first command to the end of the last, statistics included. WAL"
        " includes the application's, disk excludes WAL. Times are medians, waits are medians of the longest"
        " (the worst of all in brackets), counts are sums over all runs.",
        "",
        *table(head, [_row(name, mine) for name, mine in found.items() if mine.runs]),
    ]
    notes = [f"- {name} is not installed: {how}" for name, how in missing.items()]
    notes += [f"- {name} failed: {error}" for name, mine in found.items() for error in mine.failed]
    notes += [f"- {name}: {run.twice}" for name, mine in found.items() for run in mine.runs if run.twice]
    notes += [
        f"- {name}, {number} times: {error}"
        for name, mine in found.items()
        for error, number in _errors(mine).items()
    ]
    if notes:
        lines += ["", *notes]
    return [*lines, *goals(_goals(found))]


def _row(name: str, mine: Found) -> list[str]:
    rows = mine.middle(lambda run: run.rows)
    work = [""] * 4
    written = [""] * 2
    if name != IDLE:
        work = [
            f"{rows:,.0f}",
            f"{mine.middle(lambda run: run.seconds):.1f}",
            f"{mine.middle(lambda run: run.rate):,.0f}",
            f"{mine.middle(lambda run: run.whole_s):.1f}",
        ]
        written = [
            f"{mine.middle(lambda run: run.wal) / rows:,.0f} B",
            f"{mine.most(lambda run: run.disk) / 1e6:,.0f} MB",
        ]
    short = mine.total(lambda run: run.account.short)
    return [
        name,
        *work,
        f"{short:,} of {mine.total(lambda run: run.account.reads):,}",
        f"{mine.most(lambda run: run.account.gap_s):.1f}",
        f"{mine.total(lambda run: run.account.missed):,}",
        f"{mine.total(lambda run: len(run.account.errors)):,}",
        _wait(mine, lambda run: run.account.writer_s),
        _wait(mine, lambda run: run.account.reader_s),
        *written,
        f"{mine.total(lambda run: run.differ):,}",
    ]


def _wait(mine: Found, of: Callable[[Run], float]) -> str:
    return f"{mine.middle(of) * 1000:,.0f} ({mine.most(of) * 1000:,.0f})"


def _errors(mine: Found) -> dict[str, int]:
    errors = [error for run in mine.runs for error in run.account.errors]
    return {error: errors.count(error) for error in dict.fromkeys(errors)}


def _goals(found: dict[str, Found]) -> Iterator[tuple[str, str, str]]:
    copy, attach, idle = (found[name] for name in (tools.COPY.name, tools.ATTACH.name, IDLE))
    rate = copy.middle(lambda run: run.rate)
    for tool, ratio in ((tools.PGSLICE, 2), (tools.PARTMAN, 10)):
        if (other := found.get(tool.name)) and other.runs:
            yield goal(
                f"rate of chronos migrate / {tool.name}",
                rate / other.middle(lambda run: run.rate),
                at_least=ratio,
            )
    for name, mine in ((tools.COPY.name, copy), (tools.ATTACH.name, attach)):
        beyond = mine.middle(lambda run: run.account.writer_s) - idle.middle(lambda run: run.account.writer_s)
        yield goal(f"{name}: reads short of rows", mine.total(lambda run: run.account.short), at_most=0)
        yield goal(f"{name}: rows that differ", mine.total(lambda run: run.differ), at_most=0)
        yield goal(f"{name}: longest writer wait above the baseline", beyond * 1000, at_most=25, unit=" ms")


def _drawn(found: dict[str, Found]) -> dict[str, tuple[float, int, int]]:
    """By way: rows a second, reads that missed rows, and rows that differ at the end."""
    return {
        name: (
            mine.middle(lambda run: run.rate),
            mine.total(lambda run: run.account.short),
            mine.total(lambda run: run.differ),
        )
        for name, mine in found.items()
        if name != IDLE and mine.runs
    }


if __name__ == "__main__":
    main()
