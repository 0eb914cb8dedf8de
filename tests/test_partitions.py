"""Which partitions are attached, missing and expired, and where a table is."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta

import pytest
from sqlalchemy.engine import Connection, make_url

from chronos.catalog.locate import locate
from chronos.catalog.partitions import (
    Partition,
    attached,
    droppable,
    expired,
    expires_on,
    missing,
    runway,
)
from chronos.db import connect_engine, transaction
from chronos.table import WEBHOOK_LOG, Interval, TableSpec, midnight
from tests.partitioned import add_partitions, create_tables, leaves
from tests.tables import connected, query

TODAY = date(2026, 3, 10)
NOON = midnight(TODAY) + timedelta(hours=12)
HOURLY = TableSpec("events", every=Interval.HOUR)


def partition(lower: float | None, upper: float | None, *, detach_pending: bool = False) -> Partition:
    """A partition from the day ``lower`` up to the day ``upper``, relative to today."""
    start, end = (n if n is None else midnight(TODAY) + timedelta(days=n) for n in (lower, upper))
    return Partition(f"from {lower} to {upper}", start, end, detach_pending, 0, 0, "public")


@pytest.fixture
def conn(database: str) -> Iterator[Connection]:
    with connect_engine(make_url(database)).connect() as conn:
        yield conn


def test_a_period_is_missing_unless_it_is_fully_covered() -> None:
    existing = [
        partition(0, 1),
        partition(1, 1.5),
        partition(1.5, 2),
        partition(2.5, 3),
        partition(3, 4, detach_pending=True),
        partition(4, 8),
        partition(None, None),
        partition(9, None),
    ]
    wanted = WEBHOOK_LOG.periods(NOON, NOON + timedelta(days=12))
    assert [(p.start - midnight(TODAY)).days for p in missing(existing, wanted)] == [2, 3, 8]
    assert missing([partition(None, 2), partition(2, None)], wanted) == []


@pytest.mark.parametrize(
    ("existing", "days"),
    [
        ([], 0),
        ([partition(1, 9)], 0),
        ([partition(0, 1)], 0),
        ([partition(-3, 3), partition(3, 5), partition(6, 9)], 4),
        ([partition(0, None)], 3650),
    ],
)
def test_the_runway_ends_at_the_first_gap(existing: list[Partition], days: int) -> None:
    assert runway(existing, WEBHOOK_LOG, NOON) == days


def test_the_runway_of_an_hourly_table_begins_with_the_current_hour() -> None:
    assert runway([partition(0.5, 3)], HOURLY, NOON) == 2
    assert runway([partition(0.6, 3)], HOURLY, NOON) == 0


def test_a_partition_that_ends_before_the_oldest_day_to_keep_has_expired() -> None:
    existing = [partition(None, -20), partition(-16, -15), partition(-15, -14), partition(None, None)]
    assert expired(existing, TODAY, 15) == existing[:2]
    assert expired(existing, TODAY, None) == []


@pytest.mark.parametrize("hours", [0, 1, 23])
def test_the_day_a_partition_expires_is_known_in_advance(hours: int) -> None:
    found = partition(None, hours / 24)
    assert found.upper is not None
    day = expires_on(found.upper, 15)
    assert day is not None
    assert expired([found], day, 15) == [found]
    assert expired([found], day - timedelta(days=1), 15) == []
    assert expires_on(found.upper, None) is None


def test_neither_the_newest_nor_a_half_detached_partition_is_droppable() -> None:
    existing = [partition(-22, -21), partition(-21, -20, detach_pending=True), partition(-17, -16)]
    assert droppable(existing, TODAY, 15) == existing[:1]
    assert droppable([*existing, partition(0, None)], TODAY, 15) == [existing[0], existing[2]]


def test_the_partitions_of_any_table_are_listed(database: str, conn: Connection) -> None:
    with connected(database, autocommit=False) as other:
        cur = other.cursor()
        create_tables(cur, "timestamp")
        add_partitions(cur, -1, 1)
        cur.execute(
            "CREATE TABLE rest PARTITION OF webhook_log DEFAULT; ALTER TABLE webhook_log RENAME TO odd"
        )
        expected = leaves(cur, -1, 1)
        other.commit()
    with transaction(conn):
        assert attached(conn, WEBHOOK_LOG.located("public")) == []
        found = attached(conn, WEBHOOK_LOG.located("public"), "odd")
    assert [p.name for p in found] == [*expected, "rest"]
    assert (found[-1].lower, found[-1].upper) == (None, None)
    now = datetime.now(UTC)
    assert runway(found, WEBHOOK_LOG, found[1].lower or now) == 1


def test_a_table_is_found_on_the_search_path_or_where_it_is_unique(database: str, conn: Connection) -> None:
    spec = TableSpec("events")
    assert locate(conn, spec) is None
    query(database, "CREATE SCHEMA one; CREATE SCHEMA two; CREATE VIEW events AS SELECT 1")
    assert locate(conn, spec) is None
    query(database, "CREATE TABLE two.events (n int)")
    assert locate(conn, spec) == spec.located("two")
    query(database, "CREATE TABLE one.events_migration (n int)")
    assert locate(conn, spec) is None
    for path in ("one, two", "two, one"):
        conn.exec_driver_sql(f"SET search_path = {path}")
        conn.commit()
        assert locate(conn, spec) == spec.located(path[:3])
    assert conn.exec_driver_sql("SHOW search_path").scalar_one() == "two, one"


def test_a_table_with_a_schema_is_only_found_there(database: str, conn: Connection) -> None:
    query(database, "CREATE SCHEMA one; CREATE TABLE one.events (n int)")
    assert locate(conn, TableSpec("events", schema="one")) == TableSpec("events", schema="one")
    assert locate(conn, TableSpec("events", schema="public")) is None
