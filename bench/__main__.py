"""``python -m bench --rows N``: measure the migration and what comes after it; see bench/results.md."""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import click
from sqlalchemy.engine import Engine

from bench import living, tools, ways
from bench.report import RESULTS, goal, goals, rotated, say, table, write_part
from bench.stage import WRITERS, WRITES_A_SECOND, Sample, Stage, Work, opened_stage

K = TypeVar("K")

TITLE = "What the migration costs"
DAYS = 20
IDLE = "no migration"
REWRITE = "plain rewrite: CREATE TABLE AS, key, indexes, foreign key"
PGSLICE = "batches of 10,000 ids, as pgslice does it"
OURS = "chronos, 2 workers (the default)"
COUNTS = "chronos, 2 workers, --verify counts"
ATTACH = "chronos, --strategy attach"

WAYS: dict[str, Work] = {
    REWRITE: ways.plain_rewrite,
    "one INSERT .. SELECT into the finished table": ways.one_insert,
    PGSLICE: ways.pgslice,
    "LIMIT/OFFSET, batches of 1,000, the first 50,000 rows": ways.limit_offset,
    "chronos, 1 worker": ways.our_copy(1),
    OURS: ways.our_copy(),
    "chronos, 4 workers": ways.our_copy(4),
    COUNTS: ways.our_copy(content=False),
    ATTACH: ways.Adoption(),
}
COPY = "chronos, copy"
DELETE = f"DELETE in batches of {ways.DELETE_BATCH:,}"
DROP = "drop_old_webhook_log_partitions"
PLAIN = "the plain table"
NOTED = "the plain table with notes"
MIGRATED = "the partitioned table with notes, before finalize"
FINALIZED = "the partitioned table, after finalize"
SIZES = (0.25, 0.5, 1, 2)


@dataclass
class Results:
    """All samples, grouped by what was measured."""

    copies: dict[str, list[Sample]] = field(default_factory=dict)
    strategies: dict[str, list[Sample]] = field(default_factory=dict)
    adoption: ways.Adoption = field(default_factory=ways.Adoption)
    retention: dict[str, list[Sample]] = field(default_factory=dict)
    growth: dict[int, list[Sample]] = field(default_factory=dict)
    inserts: dict[str, list[living.Inserts]] = field(default_factory=dict)
    queries: dict[str, list[dict[str, float]]] = field(default_factory=dict)


@click.command()
@click.option("--rows", type=click.IntRange(10_000), default=2_000_000, show_default=True)
@click.option("--quick", is_flag=True, help="Run each once instead of taking the median of three.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS)
def main(rows: int, quick: bool, output: Path) -> None:
    """Measure the copy, retention and growth on ROWS rows of about 1.1 kB; takes a while.

    Copy and attach are compared on the same number of rows of about 200 bytes.
    """
    started, load = time.monotonic(), os.getloadavg()[0]
    rounds = 1 if quick else 3
    results = Results()
    with opened_stage() as stage:
        about = stage.describe()
        say(f"making {rows:,} rows")
        _copies(stage, rows, rounds, results, idle_s=2.0 if quick else 10.0)
        _strategies(stage, rows, results)
        _retention(stage, rows, rounds, results)
        _living(stage, int(rows * SIZES[0]), results)
        _growth(stage, [int(rows * size) for size in SIZES], rounds, results)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )
    minutes = (time.monotonic() - started) / 60
    about += [
        f"`python -m bench --rows {rows}{' --quick' if quick else ''}`",
        f"{rows:,} rows over {DAYS} days; measured {datetime.now(UTC):%Y-%m-%d} in {minutes:.0f} minutes;"
        f" {'one run each' if quick else f'medians of {rounds}, in rotating order'}",
        f"Load average over one minute: {load:.1f} before, {os.getloadavg()[0]:.1f} after",
        f"Peak memory of the migrating process: {memory:.0f} MB",
    ]
    write_part(output, TITLE, report(about, results))


def _copies(stage: Stage, rows: int, rounds: int, results: Results, idle_s: float) -> None:
    template = stage.template(rows, DAYS)
    for turn, (name, way) in rotated([(IDLE, _idle(idle_s)), *WAYS.items()], rounds):
        with stage.clone(template) as engine:
            sample = stage.measure(engine, way)
        _note(results.copies, turn, name, sample)


def _idle(seconds: float) -> Work:
    def idle(engine: Engine) -> tuple[int, float]:
        time.sleep(seconds)
        return 0, seconds

    return idle


def _strategies(stage: Stage, rows: int, results: Results) -> None:
    """The same rows, all within retention, by copy and by attach; three times, as it is quick."""
    template = stage.template(rows, DAYS - 6, narrow=True)
    both: list[tuple[str, Work]] = [(IDLE, _idle(5)), (COPY, ways.whole_copy), (ATTACH, results.adoption)]
    for turn, (name, way) in rotated(both, 3):
        with stage.clone(template) as engine:
            sample = stage.measure(engine, way)
        _note(results.strategies, turn, name, sample)


def _retention(stage: Stage, rows: int, rounds: int, results: Results) -> None:
    """Remove two full days: one with no other load, for its WAL, one under the live application."""
    plain = stage.template(rows, DAYS)
    migrated = stage.keep(plain, "migrated")
    ways.our_copy()(stage.engine(migrated))
    ways.drop_day(stage.engine(migrated), 15)  # cut off by the window, so not a full day
    both = [(DELETE, (plain, ways.delete_day)), (DROP, (migrated, ways.drop_day))]
    for turn, (name, (template, remove)) in rotated(both, rounds):
        with stage.clone(template) as engine:
            alone = stage.measure_alone(engine, partial(remove, age=14))
            live = stage.measure(engine, partial(remove, age=13))
        sample = Sample(alone.rows, alone.seconds, alone.wal, live.writer_s, live.reader_s)
        _note(results.retention, turn, name, sample)


def _living(stage: Stage, rows: int, results: Results) -> None:
    """Inserts and queries before, during and after, with no other load; three times, as it is quick."""
    states = {PLAIN: stage.template(rows, DAYS)}
    for what, command in (
        (NOTED, ("migrate", "--hold")),
        (MIGRATED, ("migrate", "--resume")),
        (FINALIZED, ("finalize",)),
    ):
        states[what] = stage.keep(list(states.values())[-1], command[-1].strip("-"))
        tools.chronos(stage.engine(states[what]), *command)
        stage.vacuum(states[what])
    for turn, (what, template) in rotated(list(states.items()), 3):
        with stage.clone(template) as engine:
            cost = living.inserts(engine, seconds=2)
            asked = living.queries(engine)
        results.inserts.setdefault(what, []).append(cost)
        results.queries.setdefault(what, []).append(asked)
        say(
            f"{turn + 1}  {what}: an insert takes {cost.median_s * 1000:.2f} ms,"
            f" {cost.server_s * 1e6:.0f} microseconds of it in the server; {cost.rate:,.0f} a second"
        )


def _growth(stage: Stage, sizes: list[int], rounds: int, results: Results) -> None:
    for turn, (rows, _) in rotated([(rows, None) for rows in sizes], rounds):
        with stage.clone(stage.template(rows, DAYS)) as engine:
            sample = stage.measure(engine, ways.our_copy())
        _note(results.growth, turn, rows, sample)


def _note(samples: dict[K, list[Sample]], turn: int, what: K, sample: Sample) -> None:
    samples.setdefault(what, []).append(sample)
    say(
        f"{turn + 1}  {what}: {sample.rows:,} rows in {sample.seconds:.2f} s,"
        f" longest wait {sample.writer_s * 1000:.0f} ms"
    )


def report(about: list[str], results: Results) -> list[str]:
    """The lines of this part of the results."""
    copies = {name: _median(samples) for name, samples in results.copies.items()}
    rewrite, idle = copies[REWRITE], copies[IDLE]
    order = [IDLE, *WAYS]
    lines = [
        *(f"- {line}" for line in about),
        f"- During each run, {WRITERS} connections inserted {WRITES_A_SECOND} rows a second and one kept"
        " reading today's newest 50 rows; the longest wait of a writer and of the reader is shown, with the"
        " worst of all runs in brackets.",
        "",
        "## The copy",
        "",
        "For chronos, the time is that of steps 3 and 5: copy, indexes, comparison, foreign keys, notes; for"
        " --strategy attach, which takes every row, it is that of all six steps.",
        "",
        "| way | rows | seconds | rows/s | ratio | WAL a row | writer waited, ms | reader waited, ms |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in order:
        median, all_of_it = copies[name], results.copies[name]
        speed = (
            f"{median.rows:,} | {median.seconds:.2f} | {median.rate:,.0f} | {median.rate / rewrite.rate:.2f}"
            f" | {median.wal / median.rows:,.0f} B"
            if median.rows
            else " | | | |"
        )
        lines.append(f"| {name} | {speed} | {_waits(median, all_of_it)} |")
    lines += _beside_each_other(results)
    lines += [
        "",
        "## Removing a day",
        "",
        "| way | rows | seconds | WAL | writer waited, ms | reader waited, ms |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    chosen = {name: _median(samples) for name, samples in results.strategies.items()}
    removals = {name: _median(samples) for name, samples in results.retention.items()}
    for name in (DELETE, DROP):
        median = removals[name]
        lines.append(
            f"| {name} | {median.rows:,} | {median.seconds:.3f} | {median.wal / 1000:,.0f} kB"
            f" | {_waits(median, results.retention[name])} |"
        )
    lines += _living_with_it(results)
    lines += [
        "",
        "## Growth",
        "",
        "| rows in the table | rows copied | seconds | rows/s |",
        "|--:|--:|--:|--:|",
    ]
    growth = {rows: _median(samples) for rows, samples in sorted(results.growth.items())}
    for rows, median in growth.items():
        lines.append(f"| {rows:,} | {median.rows:,} | {median.seconds:.2f} | {median.rate:,.0f} |")
    ours, counted = copies[OURS], copies[COUNTS]
    smallest, largest = growth[min(growth)], growth[max(growth)]
    beyond = (ours.writer_s - idle.writer_s) * 1000
    insert_s = {what: _middle(costs, lambda c: c.median_s) for what, costs in results.inserts.items()}
    server_s = {what: _middle(costs, lambda c: c.server_s) for what, costs in results.inserts.items()}
    slower = (server_s[NOTED] - server_s[PLAIN]) * 1e6
    waited = (chosen[ATTACH].writer_s - chosen[IDLE].writer_s) * 1000
    measured = [
        goal("rate of the copy / plain rewrite", ours.rate / rewrite.rate, at_least=1.0),
        goal("rate of the copy / pgslice's batches", ours.rate / copies[PGSLICE].rate, at_least=2),
        goal("longest writer wait above the baseline", beyond, at_most=25, unit=" ms"),
        goal("a live insert while notes are taken, extra microseconds", slower, at_most=60),
        goal(
            "comparing contents / the rest of steps 3 and 5", ours.seconds / counted.seconds - 1, at_most=0.5
        ),
        goal("time of attach / of the copy", chosen[ATTACH].seconds / chosen[COPY].seconds, at_most=0.25),
        goal("WAL of attach / of the copy", chosen[ATTACH].wal / chosen[COPY].wal, at_most=0.05),
        goal("longest writer wait during attach above the baseline", waited, at_most=50, unit=" ms"),
        goal(
            "an insert after finalize / into the plain table",
            insert_s[FINALIZED] / insert_s[PLAIN],
            at_most=1.15,
        ),
        goal("rate at the largest size / at the smallest", largest.rate / smallest.rate, at_least=0.9),
        goal("WAL of DELETE / of the drop", removals[DELETE].wal / removals[DROP].wal, at_least=100),
        goal("longest writer wait during the drop", removals[DROP].writer_s * 1000, at_most=50, unit=" ms"),
    ]
    return [*lines, *goals(measured)]


def _middle(costs: list[living.Inserts], of: Callable[[living.Inserts], float]) -> float:
    return statistics.median(map(of, costs))


def _living_with_it(results: Results) -> list[str]:
    """What an insert and a query cost in each state of the table."""
    by = "pgbench" if living.pgbench() else "psycopg2"
    states = list(results.inserts)
    return [
        "",
        "## Living with it",
        "",
        f"{min(results.growth):,} rows, vacuumed and analyzed, with no other load; medians of 3. Each insert"
        f" is its own transaction and waits for the disk ({by}, {living.CLIENTS} connections); the server's"
        " share is measured with 20,000 inserts in a loop on the server.",
        "",
        *table(
            (
                "an insert into",
                "median, ms",
                "99th percentile, ms",
                "inserts/s",
                "server's share, microseconds",
            ),
            [
                (
                    what,
                    f"{_middle(costs, lambda c: c.median_s) * 1000:.2f}",
                    f"{_middle(costs, lambda c: c.late_s) * 1000:.2f}",
                    f"{_middle(costs, lambda c: c.rate):,.0f}",
                    f"{_middle(costs, lambda c: c.server_s) * 1e6:.0f}",
                )
                for what, costs in results.inserts.items()
            ],
        ),
        "",
        *table(
            ("a query, planning included, median in ms", *states),
            [
                (
                    query,
                    *(
                        f"{statistics.median(run[query] for run in results.queries[what]) * 1000:.2f}"
                        for what in states
                    ),
                )
                for query in living.QUERIES
            ],
        ),
    ]


def _beside_each_other(results: Results) -> list[str]:
    """What each strategy costs for the same rows, and where attach spends it."""
    adoption = results.adoption
    lines = [
        "",
        "## Copy and attach",
        "",
        "Rows of about 200 bytes (240 with their headers), all within retention, and all six steps of each"
        " migration; medians of 3.",
        "",
        "| way | rows | seconds | WAL | WAL a row | writer waited, ms | reader waited, ms |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in (IDLE, COPY, ATTACH):
        samples = results.strategies[name]
        found = _median(samples)
        took = " | | |"
        if found.rows:
            a_row = found.wal / found.rows
            took = f"{found.rows:,} | {found.seconds:.2f} | {found.wal / 1e6:,.1f} MB | {a_row:,.0f} B"
        lines.append(f"| {name} | {took} | {_waits(found, samples)} |")
    spent = ", ".join(f"step {number} {seconds:.2f} s" for number, seconds in adoption.steps.items())
    return [
        *lines,
        "",
        f"The last attach took: {spent}. Its WAL is that of the new index ({adoption.index / 1e6:,.1f} MB):"
        " the same bytes a row however wide the row, 24 for the entry, 4 for the pointer, a tenth free."
        " Relative to the WAL of a copy it shrinks as rows get wider: the first table shows it at 1.1 kB.",
    ]


def _median(samples: list[Sample]) -> Sample:
    """The median of each figure separately."""

    def middle(of: Callable[[Sample], float]) -> float:
        return statistics.median(map(of, samples))

    return Sample(
        rows=round(middle(lambda s: s.rows)),
        seconds=middle(lambda s: s.seconds),
        wal=round(middle(lambda s: s.wal)),
        writer_s=middle(lambda s: s.writer_s),
        reader_s=middle(lambda s: s.reader_s),
    )


def _waits(median: Sample, samples: list[Sample]) -> str:
    worst_writer, worst_reader = (max(s.writer_s for s in samples), max(s.reader_s for s in samples))
    return (
        f"{median.writer_s * 1000:.0f} ({worst_writer * 1000:.0f})"
        f" | {median.reader_s * 1000:.0f} ({worst_reader * 1000:.0f})"
    )


if __name__ == "__main__":
    main()
