"""What the operator reads, on a terminal of 80 columns and in a file."""

from __future__ import annotations

import io
from datetime import date, timedelta

from rich.console import Console

from chronos.migration.output import Output, Summary, for_reading
from chronos.migration.state import DayResult

STOPPED = (
    "Error: stopped as asked in step 4; nothing is lost, and the application can go on writing. Carry on"
    " with: python -m chronos.scripts.migrate_to_partitioned_webhook_log --resume; or undo it with:"
    " python -m chronos rollback"
)


def test_a_terminal_gets_whole_words_and_commands_to_copy() -> None:
    assert for_reading(STOPPED, 79).splitlines() == [
        "Error: stopped as asked in step 4; nothing is lost, and the application can go",
        "on writing. Carry on with:",
        "  python -m chronos.scripts.migrate_to_partitioned_webhook_log --resume",
        "or undo it with:",
        "  python -m chronos rollback",
    ]


def printed(console: Console, file: io.StringIO) -> list[str]:
    day = date(2026, 11, 7)
    days = {
        day + timedelta(days=n): DayResult(4_800_000, 4_800_000, hash_equal=None if n else True)
        for n in range(2)
    }
    Output(console).summary(
        Summary([("Renaming", 0.0), ("Migrating", 12.345)], days, 9_600_000, None, 0.0215)
    )
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_the_summary() -> None:
    file = io.StringIO()
    assert printed(Console(file=file, width=80, color_system=None), file) == [
        "",
        "Day              Rows  Compared",
        "2026-11-07  4,800,000  equal",
        "2026-11-08  4,800,000  counted",
        "",
        "Step         Seconds",
        "1 Renaming   earlier",
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
        count.add(date(2026, 11, 21), 60_000_000)
        assert count._progress is not None
        [line] = console.render_lines(count._progress.get_renderable(), console.options, pad=False)
    text = "".join(segment.text for segment in line)
    assert len(text) <= 80
    assert text.startswith("60,000,000 / 72,000,000 rows ")
    assert " 83.3% 60,000/s " in text
    assert text.rstrip().endswith("2026-11-21")
