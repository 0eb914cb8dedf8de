"""What the benchmark reports about a tool: its ledger and readers find what went wrong, and nothing else."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import create_engine

from bench.application import COMPARED_DAYS, COUNTED_DAYS, Account, differing, remember, today, watched
from chronos.demo.rows import create_webhook_log
from tests.conftest import MakeDatabase
from tests.tables import value
from tests.waiting import wait_until

# The days that are counted: the application must notice what is deleted here.
_COUNTED = (
    f"\"timestamp\" >= '{{day}}'::timestamptz - interval '{COUNTED_DAYS[-1]} days'"
    " AND \"timestamp\" < '{day}'::timestamptz"
)


def _watched(make_database: MakeDatabase, statement: str) -> tuple[Account, int, int]:
    """What the application saw while ``statement`` ran, how many rows it hit, and how many differ."""
    url = make_database()
    engine = create_engine(url)
    create_webhook_log(engine, 4_000)
    day = today()
    since = day - timedelta(days=COMPARED_DAYS)
    remember(engine, since)
    with watched(engine, day) as account:
        hit = value(url, f"WITH hit AS ({statement.format(day=day)} RETURNING 1) SELECT count(*) FROM hit")
        last = value(url, "SELECT max(id) FROM webhook_log")
        wait_until(
            lambda: value(url, "SELECT max(id) FROM webhook_log") > last + 40,
            30,
            "the application keeps writing",
        )
    try:
        return account, hit, differing(engine, account, since)
    finally:
        engine.dispose()


def test_an_untouched_table_has_no_short_read_and_no_differing_row(
    make_database: MakeDatabase,
) -> None:
    account, _, differ = _watched(make_database, "UPDATE webhook_endpoint SET url = url")
    assert (account.short, account.missed, account.errors, differ) == (0, 0, [], 0)
    assert account.reads > 0
    assert account.ledger


def test_lost_rows_are_counted_with_the_reads_and_writes_that_miss_them(
    make_database: MakeDatabase,
) -> None:
    account, lost, differ = _watched(make_database, f"DELETE FROM webhook_log WHERE {_COUNTED}")
    assert differ == lost > 0
    assert account.short > 0
    assert account.missed > 0


def test_rows_changed_by_someone_else_differ_but_no_read_misses_them(make_database: MakeDatabase) -> None:
    account, changed, differ = _watched(
        make_database, f"UPDATE webhook_log SET response_body = '{{{{}}}}' WHERE {_COUNTED}"
    )
    assert 0 < differ <= changed
    assert (account.short, account.missed) == (0, 0)
