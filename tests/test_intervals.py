"""Hours, days, weeks and months, in the SQL functions and in Python alike, at any time of any year.

The shared SQL functions take the time as an argument, so each test picks its own instant.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from psycopg2 import errors
from psycopg2.extensions import cursor
from sqlalchemy.engine import Connection, make_url

from chronos.catalog.partitions import Partition, attached, droppable, missing, runway
from chronos.db import connect_engine
from chronos.demo.embedded import create_database
from chronos.table import Interval, Period, TableSpec
from tests.partitioned import column, install_functions, run
from tests.tables import query

ZONES = ("Europe/Madrid", "America/New_York")
TYPES = ("date", "timestamp(0)", "timestamptz(3)")
# A date cannot have periods shorter than a day.
KINDS = [(every, type_) for every in Interval for type_ in TYPES if (every, type_) != (Interval.HOUR, "date")]


@pytest.fixture(scope="module", params=ZONES)
def scratch(postgres: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of an empty database whose time zone has daylight saving; nothing is committed there."""
    name = f"chronos_test_{uuid.uuid4().hex}"
    create_database(postgres, name)
    query(postgres, f"ALTER DATABASE {name} SET timezone = '{request.param}'")
    yield make_url(postgres).set(database=name).render_as_string(hide_password=False)
    query(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def conn(scratch: str) -> Iterator[Connection]:
    """A transaction that is rolled back at the end."""
    with connect_engine(make_url(scratch)).connect() as conn:
        yield conn


@pytest.fixture
def cur(conn: Connection) -> cursor:
    """The driver's cursor in that transaction."""
    return conn.connection.cursor()  # type: ignore[return-value]


def existing(conn: Connection, spec: TableSpec) -> list[Partition]:
    """The partitions as the Python code sees them."""
    conn.exec_driver_sql("SET LOCAL timezone = 'UTC'")
    found = attached(conn, spec)
    conn.exec_driver_sql("SET LOCAL timezone TO DEFAULT")
    return found


def table(cur: cursor, every: Interval, type_: str = "timestamptz") -> TableSpec:
    """Create a partitioned table without partitions, and its functions."""
    spec = TableSpec("events", column="at", every=every, retention_days=10, ahead_days=3).located("public")
    run(cur, f"CREATE TABLE events (at {type_} NOT NULL) PARTITION BY RANGE (at)")
    install_functions(cur, spec)
    return spec


def create(cur: cursor, spec: TableSpec, now: datetime, days_ahead: int) -> list[str]:
    """Call the create function at the instant ``now``."""
    call = "SELECT chronos_create_partitions('public', 'events', %s, %s, %s)"
    return column(cur, call, spec.every.value, days_ahead, now)


def drop(cur: cursor, now: datetime, retention_days: int) -> list[str]:
    """Call the drop function at the instant ``now``, until nothing is left to drop."""
    call = "SELECT chronos_drop_partitions('public', 'events', %s, %s)"
    dropped: list[str] = []
    while names := column(cur, call, retention_days, now):
        dropped += names
    return dropped


def bounds(cur: cursor) -> list[tuple[str, datetime, datetime]]:
    """Name and bounds (UTC) of each partition, in order."""
    found = run(
        cur,
        "SELECT set_config('timezone', 'UTC', true);"
        "SELECT c.relname, b[1]::timestamp, b[2]::timestamp FROM pg_inherits i"
        " JOIN pg_class c ON c.oid = i.inhrelid CROSS JOIN LATERAL regexp_match("
        "  pg_get_expr(c.relpartbound, c.oid), $$FROM \\('(.+)'\\) TO \\('(.+)'\\)$$) b"
        " WHERE i.inhparent = 'events'::regclass ORDER BY 2",
    )
    run(cur, "RESET timezone")
    return [(leaf, lower.replace(tzinfo=UTC), upper.replace(tzinfo=UTC)) for leaf, lower, upper in found]


def expected(spec: TableSpec, periods: list[Period]) -> list[tuple[str, datetime, datetime]]:
    return [(spec.partition(period), period.start, period.end) for period in periods]


def place(cur: cursor, instant: str) -> str:
    """The name of the partition that a row of this instant goes into."""
    [found] = column(cur, "INSERT INTO events VALUES (%s) RETURNING tableoid::regclass::text", instant)
    return str(found)


# Names and bounds


@pytest.mark.parametrize(
    ("every", "start", "days"),
    [
        (Interval.HOUR, datetime(2026, 3, 28, tzinfo=UTC), 2),
        (Interval.HOUR, datetime(2027, 10, 30, tzinfo=UTC), 9),
        (Interval.HOUR, datetime(2027, 12, 31, tzinfo=UTC), 1),
        (Interval.DAY, datetime(2027, 12, 15, tzinfo=UTC), 90),
        (Interval.WEEK, datetime(2024, 12, 1, tzinfo=UTC), 3650),
        (Interval.MONTH, datetime(2023, 11, 1, tzinfo=UTC), 3650),
    ],
)
def test_sql_and_python_agree_on_names_and_bounds(
    cur: cursor, every: Interval, start: datetime, days: int
) -> None:
    """Across clock changes, leap days, ends of years, weeks 52, 53 and 1."""
    spec = table(cur, every)
    made = create(cur, spec, start, days)
    periods = spec.periods(start, start + timedelta(days=days + 1))
    assert bounds(cur) == expected(spec, periods)
    assert made == [spec.partition(period) for period in periods]


@pytest.mark.parametrize(
    ("every", "now", "first", "second"),
    [
        # The hour that Madrid skips, and the one that it has twice; then those of New York.
        (Interval.HOUR, "2026-03-29 01:30", "y2026m03d29h01", "y2026m03d29h02"),
        (Interval.HOUR, "2026-10-25 00:59:59.999999", "y2026m10d25h00", "y2026m10d25h01"),
        (Interval.HOUR, "2026-03-08 06:59", "y2026m03d08h06", "y2026m03d08h07"),
        (Interval.HOUR, "2026-11-01 05:00", "y2026m11d01h05", "y2026m11d01h06"),
        (Interval.HOUR, "2026-12-31 23:00", "y2026m12d31h23", "y2027m01d01h00"),
        (Interval.DAY, "2026-03-28 23:30", "y2026m03d28", "y2026m03d29"),
        (Interval.DAY, "2026-10-24 23:30", "y2026m10d24", "y2026m10d25"),
        (Interval.DAY, "2028-02-28 12:00", "y2028m02d28", "y2028m02d29"),
        (Interval.DAY, "2028-02-29 23:59", "y2028m02d29", "y2028m03d01"),
        (Interval.DAY, "2027-02-28 00:00", "y2027m02d28", "y2027m03d01"),
        (Interval.DAY, "2026-12-31 23:59:59", "y2026m12d31", "y2027m01d01"),
        (Interval.WEEK, "2026-12-27 23:59:59", "y2026w52", "y2026w53"),
        (Interval.WEEK, "2026-12-28 00:00", "y2026w53", "y2027w01"),
        (Interval.WEEK, "2027-01-03 23:59:59", "y2026w53", "y2027w01"),
        (Interval.WEEK, "2024-12-30 00:00", "y2025w01", "y2025w02"),
        (Interval.WEEK, "2028-02-29 12:00", "y2028w09", "y2028w10"),
        (Interval.MONTH, "2026-03-29 01:30", "y2026m03", "y2026m04"),
        (Interval.MONTH, "2028-02-29 23:59", "y2028m02", "y2028m03"),
        (Interval.MONTH, "2026-12-31 23:59:59", "y2026m12", "y2027m01"),
    ],
)
def test_the_servers_time_zone_moves_no_bound(
    cur: cursor, every: Interval, now: str, first: str, second: str
) -> None:
    spec = table(cur, every)
    instant = datetime.fromisoformat(f"{now}+00:00")
    names = [f"events_{first}", f"events_{second}"]
    days = 1 if every is Interval.HOUR else 40
    assert create(cur, spec, instant, days)[:2] == names
    assert [leaf for leaf, *_ in bounds(cur)][:2] == names
    assert place(cur, f"{now}+00") == names[0]
    (_, start, end), *_ = bounds(cur)
    assert (start, end) == (spec.period(instant).start, spec.period(instant).end)
    assert place(cur, f"{start}") == place(cur, f"{end - timedelta(microseconds=1)}") == names[0]
    assert place(cur, f"{end}") == names[1]


@pytest.mark.parametrize(("every", "type_"), KINDS)
def test_days_ahead_are_whole_days_for_every_interval(cur: cursor, every: Interval, type_: str) -> None:
    """For any column type: its precision does not matter, as bounds are whole seconds."""
    spec = table(cur, every, type_)
    now = datetime(2026, 12, 30, 22, 59, 59, 999999, tzinfo=UTC)
    wanted = spec.wanted(now, back=False)
    assert create(cur, spec, now, spec.ahead_days) == [spec.partition(period) for period in wanted]
    assert create(cur, spec, now, spec.ahead_days) == []
    assert bounds(cur) == expected(spec, wanted)
    assert wanted[-1].end >= datetime(2027, 1, 3, tzinfo=UTC)
    assert place(cur, "2027-01-02 23:59:59+00") == spec.partition(wanted[-1])


def test_a_time_is_rounded_to_its_columns_precision_before_it_is_routed(cur: cursor) -> None:
    spec = table(cur, Interval.WEEK, "timestamptz(3)")
    create(cur, spec, datetime(2026, 12, 28, tzinfo=UTC), 10)
    assert place(cur, "2027-01-03 23:59:59.9994+00") == "events_y2026w53"
    assert place(cur, "2027-01-03 23:59:59.9995+00") == "events_y2027w01"


@pytest.mark.parametrize("every", ["year", "2 days", None])
def test_an_unknown_interval_is_refused(cur: cursor, every: str | None) -> None:
    table(cur, Interval.DAY)
    call = "SELECT chronos_create_partitions('public', 'events', %s, 3, now())"
    with pytest.raises(errors.InvalidParameterValue, match=f"not {every or 'NULL'}"):
        run(cur, call, every)


# Gaps


@pytest.mark.parametrize(("every", "type_"), KINDS)
def test_a_gap_is_filled_and_nothing_else(conn: Connection, cur: cursor, every: Interval, type_: str) -> None:
    spec = table(cur, every, type_)
    now = datetime(2026, 12, 20, 12, tzinfo=UTC)
    days = 3 if every is Interval.HOUR else 100
    everything = create(cur, spec, now, days)
    gap = everything[1:3]
    run(cur, f"DROP TABLE {', '.join(gap)}")
    found = existing(conn, spec)
    lacking = missing(found, spec.periods(now, now + timedelta(days=days)))
    assert [spec.partition(period) for period in lacking] == gap
    assert runway(found, spec, now) == max((lacking[0].start.date() - now.date()).days - 1, 0)
    assert create(cur, spec, now, days) == gap


# Expiry


@pytest.mark.parametrize(
    ("every", "start", "end", "last_kept"),
    [
        (Interval.HOUR, "2026-12-31 23:00", "2027-01-01 00:00", "2027-01-10 23:59:59"),
        (Interval.DAY, "2028-02-29 00:00", "2028-03-01 00:00", "2028-03-10 23:59:59"),
        (Interval.DAY, "2026-03-29 00:00", "2026-03-30 00:00", "2026-04-08 23:59:59"),
        (Interval.WEEK, "2026-12-28 00:00", "2027-01-04 00:00", "2027-01-13 23:59:59"),
        (Interval.MONTH, "2028-02-01 00:00", "2028-03-01 00:00", "2028-03-10 23:59:59"),
        (Interval.MONTH, "2026-12-01 00:00", "2027-01-01 00:00", "2027-01-10 23:59:59"),
    ],
)
def test_a_partition_is_dropped_when_its_last_instant_is_older_than_the_retention(
    cur: cursor, every: Interval, start: str, end: str, last_kept: str
) -> None:
    """Ten days: the last moment at which the partition is kept, and the first at which it is dropped."""
    spec = table(cur, every)
    period = spec.period(datetime.fromisoformat(f"{start}+00:00"))
    assert period.end == datetime.fromisoformat(f"{end}+00:00")
    create(cur, spec, period.start, 40 if every is not Interval.HOUR else 1)
    at = datetime.fromisoformat(f"{last_kept}+00:00")
    assert drop(cur, at, 10) == []
    assert drop(cur, at + timedelta(seconds=1), 10) == [spec.partition(period)]


@pytest.mark.parametrize(("every", "type_"), KINDS)
def test_sql_and_python_agree_on_what_has_expired(
    conn: Connection, cur: cursor, every: Interval, type_: str
) -> None:
    spec = table(cur, every, type_)
    start = datetime(2026, 12, 10, tzinfo=UTC)
    create(cur, spec, start, 3 if every is Interval.HOUR else 200)
    days = [12, 13, 14, 15] if every is Interval.HOUR else [10, 11, 32, 33, 42, 43, 60, 95, 400]
    for n in days:
        now = start + timedelta(days=n, hours=23)
        names = [p.name for p in droppable(existing(conn, spec), now.date(), 10)]
        assert drop(cur, now, 10) == names, n
    assert len(bounds(cur)) == 1, "the newest stays"


def test_a_wrapper_passes_the_time_of_the_transaction_to_the_shared_function(cur: cursor) -> None:
    spec = table(cur, Interval.WEEK)
    [now] = column(cur, "SELECT now()")
    wanted = replace(spec, ahead_days=20).wanted(now, back=False)
    assert column(cur, f"SELECT {spec.create_function}(20)") == [spec.partition(p) for p in wanted]
