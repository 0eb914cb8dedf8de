"""What the operator reads, on a terminal of 80 columns and in a file."""

from __future__ import annotations

import io
from datetime import date, timedelta

import pytest
from rich.console import Console

from chronos.migration.console import Output, Summary, ago, counted, for_reading
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


ORDER = (
    'CREATE UNIQUE INDEX CONCURRENTLY "a;b" ON shop."Order\'s Events"'
    """ ("Order No", lower('x; y'), "placed at");"""
)
CREATE = (
    "CREATE TABLE public.events_y2025m10 PARTITION OF public.events"
    " FOR VALUES FROM ('2025-10-01 00:00:00+00') TO ('2025-11-01 00:00:00+00');"
)
BLOCK = TableSpec("Order Events", "placed at", Interval.MONTH, schema="shop").as_toml()


def test_a_statement_and_a_block_stand_on_lines_of_their_own_however_long() -> None:
    text = (
        f"no index is unique; {ORDER} where not, look. Create it: {CREATE} Or SELECT f(30); or DELETE FROM t"
        f" WHERE at < '2025-01-01 00:00:00+00'; [gaps]; add to the file:\n\n{BLOCK}"
    )
    shown = for_reading(text, 50).splitlines()
    copied = [line.strip() for line in shown if line.startswith("  ")]
    assert copied[:4] == [
        *(ORDER, CREATE, "SELECT f(30);"),
        "DELETE FROM t WHERE at < '2025-01-01 00:00:00+00';",
    ]
    assert copied[4:] == BLOCK.splitlines()
    assert all(len(line) <= 50 for line in shown if not line.startswith("  "))


@pytest.mark.parametrize(
    "text",
    [
        "to go back by hand with DROP TABLE events CASCADE would drop all else that refers to it; beware",
        "Detach them first (ALTER TABLE events DETACH PARTITION ...), and move what is left; then go on",
        "a SELECT of an old snapshot, or a DELETE FROM it, waits; so",
    ],
)
def test_what_is_only_spoken_of_stays_in_its_sentence(text: str) -> None:
    assert for_reading(text, 200) == text


@pytest.mark.parametrize(
    ("age", "said"),
    [
        (timedelta(seconds=59), "less than a minute ago"),
        (timedelta(minutes=3, seconds=5), "3 minutes ago"),
        (timedelta(hours=1, minutes=59), "1 hour ago"),
        (timedelta(days=8), "8 days ago"),
    ],
)
def test_an_age_is_told_in_its_largest_unit(age: timedelta, said: str) -> None:
    assert ago(age) == said
    assert (counted(1, "row"), counted(1234, "row")) == ("1 row", "1,234 rows")


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
