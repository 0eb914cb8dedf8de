"""Tables other than webhook_log, through the Python interface: their keys, time columns, periods."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import pytest
from rich.console import Console
from sqlalchemy.engine import make_url

from chronos.db import connect_engine
from chronos.migration.console import Output
from chronos.migration.finalize import finish
from chronos.migration.operator import Operator
from chronos.migration.rollback import undo
from chronos.migration.run import Options, migrate
from chronos.table import Interval, TableSpec
from tests.tables import exists, query, relations, value

# The key's columns, and expressions for those of row n.
KEYS = {
    "uuid": ("key uuid DEFAULT gen_random_uuid(), PRIMARY KEY (key)", "md5(n::text)::uuid"),
    "text": ('key text COLLATE "C", PRIMARY KEY (key)', "'evt_' || md5(n::text)"),
    "two columns": (
        'tenant int, "Event No" bigint, PRIMARY KEY (tenant, "Event No")',
        "mod(n, 7), n",
    ),
    "time within": (
        "sensor text, PRIMARY KEY (sensor, at)",
        "'s' || mod(n, 7)",
    ),
    "unique index": ("key varchar(40) NOT NULL, UNIQUE (key)", "md5(n::text)"),
}
ROWS = 400


def operator() -> Operator:
    return Operator(Output(Console(file=io.StringIO(), soft_wrap=True)))


def create(url: str, key: str, time_type: str = "timestamptz") -> None:
    columns, values = KEYS[key]
    query(
        url,
        f'CREATE TABLE "Events" (at {time_type} NOT NULL, what text, {columns});'
        ' CREATE INDEX ON "Events" (at);'
        f" INSERT INTO \"Events\" SELECT now() - n * interval '1 hour', 'event ' || n, {values}"
        f" FROM generate_series(1, {ROWS}) n",
    )


def contents(url: str, table: str = '"Events"') -> list[str]:
    return sorted(row[0] for row in query(url, f"SELECT t::text FROM {table} t"))


@pytest.mark.parametrize("key", KEYS)
def test_any_key_migrates_and_rolls_back(database: str, key: str) -> None:
    """Rows are written before and after the swap, with times below and beyond it: none is lost."""
    create(database, key)
    before = relations(database)
    engine = connect_engine(make_url(database))
    table = TableSpec("Events", column="at", retention_days=10, ahead_days=5)
    columns = KEYS[key][1]

    def write(number: int) -> None:
        insert = (
            f'INSERT INTO "Events" SELECT now() - %s::interval, %s, {columns} FROM (SELECT %s::int) x (n)'
        )
        query(database, insert, "0", "new", 10_000 + number)
        query(database, insert, "50 hours", "late", 20_000 + number)
        of = 'SELECT ctid, tableoid FROM "Events" WHERE what = %s'
        query(
            database,
            f"UPDATE \"Events\" SET what = 'changed' WHERE (ctid, tableoid) IN ({of})",
            f"event {10 + number}",
        )
        query(
            database,
            f"UPDATE \"Events\" SET at = at - interval '1 day' WHERE (ctid, tableoid) IN ({of})",
            f"event {20 + number}",
        )
        query(database, f'DELETE FROM "Events" WHERE (ctid, tableoid) IN ({of})', f"event {30 + number}")

    migrate(engine, table, Options(hold=True), operator(), lambda found: None)
    write(1)
    kept = contents(database)
    migrate(engine, table, Options(resume=True), operator(), lambda found: None)
    assert value(database, "SELECT relkind::text FROM pg_class WHERE relname = 'Events'") == "p"
    cutoff = value(database, "SELECT (plan ->> 'cutoff')::timestamptz FROM \"Events_migration\"")
    older = contents(database, f"(SELECT * FROM \"Events_old\" WHERE at < '{cutoff}')")
    assert older
    assert sorted([*contents(database), *older]) == kept
    write(2)
    kept = sorted([*contents(database), *older])

    undo(engine, table, operator(), lambda found, by_hand: None)

    assert contents(database) == kept
    assert relations(database) == before


@pytest.mark.parametrize("time_type", ["timestamp", "date"])
@pytest.mark.parametrize("every", [Interval.WEEK, Interval.MONTH])
def test_weeks_and_months_without_retention_copy_every_row(
    database: str, time_type: str, every: Interval
) -> None:
    """Everything is copied, into partitions that start on week or month boundaries."""
    create(database, "uuid", time_type)
    kept = contents(database)
    engine = connect_engine(make_url(database))
    table = TableSpec("Events", column="at", every=every)

    migrate(engine, table, Options(), operator(), lambda found: None)

    assert contents(database) == kept
    now = table.every.floor(datetime.now(UTC))
    assert exists(database, f'"{table.partition(table.period(now))}"')
    assert query(database, 'SELECT "create_future_Events_partitions"(90)')
    query(database, "INSERT INTO \"Events\" SELECT now() + interval '80 days', 'ahead', gen_random_uuid()")
    finish(engine, table, operator(), lambda found, there: None)
    assert len(contents(database)) == ROWS + 1
    assert not exists(database, '"Events_old"')
