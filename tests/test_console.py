"""What the operator reads, on a terminal of 80 columns and in a file."""

from __future__ import annotations

import io
from datetime import date

from rich.console import Console

from chronos.migration.console import Output, Summary, for_reading
from chronos.migration.state import PeriodResult
from chronos.table import WEBHOOK_LOG, Interval, Period, TableSpec, midnight

STOPPED = (
    "Error: stopped as asked in step 3; nothing is lost, and the application can go on writing. Carry on"
    " with: python -m chronos.scripts.migrate_to_partitioned_webhook_log --resume; or undo it with:"
    " python -m chronos rollback"
)


def test_a_terminal_gets_whole_words_and_commands_to_copy() -> None:
    assert for_reading(STOPPED, 79).splitlines() == [
        "Error: stopped as asked in step 3; nothing is lost, and the application can go",
        "on writing. Carry on with:",
        "  python -m chronos.scripts.migrate_to_partitioned_webhook_log --resume",
        "or undo it with:",
        "  python -m chronos rollback",
    ]


def day(year: int, month: int, number: int) -> Period:
    return WEBHOOK_LOG.period(midnight(date(year, month, number)))


def printed(console: Console, file: io.StringIO) -> list[str]:
    periods = {
        day(2026, 11, 7 + n): PeriodResult(4_800_000, 4_800_000, alike=None if n else True) for n in range(2)
    }
    Output(console).summary(
        Summary([("Creating", 0.0), ("Migrating", 12.345)], periods, 9_600_000, None, 0.0215)
    )
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_the_summary() -> None:
    file = io.StringIO()
    assert printed(Console(file=file, width=80, color_system=None), file) == [
        "",
        "Period           Rows  Compared",
        "2026-11-07  4,800,000  equal",
        "2026-11-08  4,800,000  counted",
        "",
        "Step         Seconds",
        "1 Creating   earlier",
        "2 Migrating    12.35",
        "",
        "9,600,000 rows copied; longest lock 22 ms",
    ]


def test_the_bar_fits_into_80_columns() -> None:
    """With the numbers of the largest table that this is for, and a replica that lags."""
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system=None, highlight=False)
    now = 0.0
    output = Output(console, clock=lambda: now)
    with output.copying(72_000_000) as count:
        now = 1_000.0
        count.add(day(2026, 11, 21), 60_000_000)
        assert count._progress is not None
        [line] = console.render_lines(count._progress.get_renderable(), console.options, pad=False)
    text = "".join(segment.text for segment in line)
    assert len(text) <= 80
    assert text.startswith("60,000,000 / 72,000,000 rows ")
    assert " 83.3% 60,000/s " in text
    assert text.rstrip().endswith("2026-11-21")


def test_a_partition_is_named_with_its_bounds() -> None:
    file = io.StringIO()
    output = Output(Console(file=file, width=80, color_system=None, soft_wrap=True))
    hourly = TableSpec("events", every=Interval.HOUR)
    for table, period in (
        (WEBHOOK_LOG, day(2025, 10, 22)),
        (hourly, hourly.period(midnight(date(2025, 10, 22)))),
    ):
        output.partition(table.partition(period), period)
    assert file.getvalue().splitlines() == [
        "Created partition: webhook_log_y2025m10d22 (2025-10-22 to 2025-10-23)",
        "Created partition: events_y2025m10d22h00 (2025-10-22 to 2025-10-22 01:00)",
    ]
