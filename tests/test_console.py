"""What the operator reads, on an 80-column terminal and in a file."""

from __future__ import annotations

import io
from datetime import date, timedelta

import pytest
from rich.console import Console

from chronos.locks import LockConflict
from chronos.migration.console import Output, Summary, ago, clock_time, counted, for_reading, short
from chronos.migration.state import PeriodResult
from chronos.migration.throttle import Lag
from chronos.table import WEBHOOK_LOG, Interval, Period, TableSpec, midnight

STOPPED = (
    "Error: stopped as asked in step 3; nothing is lost, and the application can keep writing. Carry on"
    " with: python -m chronos.scripts.migrate_to_partitioned_webhook_log --resume; or undo it with:"
    " python -m chronos rollback"
)


def test_a_terminal_gets_whole_words_and_commands_to_copy() -> None:
    assert for_reading(STOPPED, 79).splitlines() == [
        "Error: stopped as asked in step 3; nothing is lost, and the application can",
        "keep writing. Carry on with:",
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


def test_statements_and_blocks_get_lines_of_their_own_at_any_length() -> None:
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
        "going back with DROP TABLE events CASCADE would drop everything else that refers to it; beware",
        "Detach them first (ALTER TABLE events DETACH PARTITION ...), and move any rows that belong there",
        "a SELECT of an old snapshot, or a DELETE FROM it, waits; so",
    ],
)
def test_a_statement_that_is_only_mentioned_stays_in_its_sentence(text: str) -> None:
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
def test_an_age_is_given_in_its_largest_unit(age: timedelta, said: str) -> None:
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


def test_the_summary_lists_periods_and_steps() -> None:
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
    """With the numbers of the largest table that chronos is for, and a lagging replica."""
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system=None, highlight=False)
    now = 0.0
    output = Output(console, clock=lambda: now)
    with output.copying(72_000_000, periods=16, begun=[day(2026, 11, 26)]) as count:
        now = 1_000.0
        count.add(day(2026, 11, 21), 60_000_000, Lag("replica", 12))
        assert count._progress is not None
        [line] = console.render_lines(count._progress.get_renderable(), console.options, pad=False)
    text = "".join(segment.text for segment in line)
    assert len(text) <= 80
    assert text.startswith("copying ━")
    assert text.rstrip().endswith(" 83%  60,000,000/72,000,000  60k/s  left 3:20  day 2/16  lag 12 s")


def test_a_partition_is_named_with_its_bounds() -> None:
    file = io.StringIO()
    output = Output(Console(file=file, width=80, color_system=None, soft_wrap=True))
    hourly = TableSpec("events", every=Interval.HOUR)
    for table, period in (
        (WEBHOOK_LOG, day(2025, 10, 22)),
        (hourly, hourly.period(midnight(date(2025, 10, 22)))),
    ):
        output.partitions(table, [period])
    assert file.getvalue().splitlines() == [
        "Created partition: webhook_log_y2025m10d22 (2025-10-22 to 2025-10-23)",
        "Created partition: events_y2025m10d22h00 (2025-10-22 to 2025-10-22 01:00)",
    ]


def on_a_terminal(width: int) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(
        file=file, width=width, force_terminal=True, color_system=None, highlight=False, soft_wrap=True
    ), file


def test_on_a_terminal_the_partitions_are_one_line() -> None:
    console, file = on_a_terminal(80)
    Output(console).partitions(WEBHOOK_LOG, [day(2026, 11, 11 + n) for n in range(16)])
    assert file.getvalue() == "Created 16 partitions, one per day: 2026-11-11 to 2026-11-26\n"


def test_on_a_terminal_the_summary_has_one_line_for_all_periods() -> None:
    console, file = on_a_terminal(80)
    lines = printed(console, file)
    assert lines[1] == "9,600,000 rows from 2026-11-07 to 2026-11-09: 2 partitions, each counted, equal"
    assert "Period           Rows  Compared" not in lines
    assert lines[3] == "Step         Seconds"


HELD = LockConflict(
    "waiting for a lock on webhook_log, held by pid 471123 (webhook application), idle in transaction for"
    " 12 s, query: SELECT 1; SELECT pg_terminate_backend(471123) would end it",
    "a lock on webhook_log",
    "pid 471123 (webhook application)",
    "SELECT pg_terminate_backend(471123)",
)


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (80, "  0:06 waiting for pid 471123 (webhook...: SELECT pg_terminate_backend(471123);"),
        (100, "  0:06 waiting for pid 471123 (webhook application): SELECT pg_terminate_backend(471123);"),
        (200, f"  0:06 {HELD.text}"),
    ],
)
def test_on_a_terminal_waiting_for_a_lock_is_one_rewritten_line(width: int, shown: str) -> None:
    console, file = on_a_terminal(width)
    now = 0.0
    output = Output(console, clock=lambda: now)
    for attempt in range(1, 4):
        now = attempt * 3.0
        output.waiting(HELD, attempt)
    assert "\n" not in file.getvalue()
    assert file.getvalue().count("waiting for") == 3
    assert file.getvalue().split("\x1b[2K")[-1] == shown
    output.ok("done")
    lines = [line.split("\x1b[2K")[-1] for line in file.getvalue().splitlines()]
    assert lines[-2:] == ["  waited 0:06 for pid 471123 (webhook application)", "✓ done"]


def test_in_a_pipe_each_attempt_at_a_lock_is_a_line() -> None:
    file = io.StringIO()
    output = Output(Console(file=file, width=80, color_system=None, soft_wrap=True))
    output.waiting(HELD, 1)
    output.close()
    assert file.getvalue() == f"  {HELD.text} (attempt 1, retrying)\n"


def test_a_terminal_that_cannot_rewrite_a_line_gets_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console, file = on_a_terminal(80)
    output = Output(console)
    output.waiting(HELD, 1)
    with output.copying(1_000) as count:
        count.add(day(2026, 11, 21), 1_000)
    assert "\x1b" not in file.getvalue()
    assert file.getvalue().count("\n") == 2


def test_times_and_rates_are_short() -> None:
    assert [clock_time(s) for s in (0, 13.4, 200, 3_723)] == ["0:00", "0:13", "3:20", "1:02:03"]
    assert [short(n) for n in (0, 870, 999.7, 9_160, 56_300, 1_250_000)] == [
        *("0", "870", "1.0k", "9.2k", "56k", "1.2M"),
    ]
