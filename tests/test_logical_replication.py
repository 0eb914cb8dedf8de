"""A real subscriber: whatever happens to the table, it gets each row once, and every change to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy.engine import make_url

from tests.command import chronos
from tests.conftest import MakeDatabase
from tests.live import load
from tests.tables import connected, query, value
from tests.test_complete_at_every_instant import MIGRATE, RESUME, ROLLBACK, Live, live
from tests.waiting import wait_until


@contextmanager
def subscribed(publisher: str, subscriber: str, publication: str) -> Iterator[None]:
    """A subscriber whose tables follow the publisher's, in two databases on one server."""
    url = make_url(publisher)
    slot = f"chronos_{url.database}"
    query(publisher, "SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", slot)
    address = f"host={url.host} port={url.port} dbname={url.database} user={url.username}"
    query(
        subscriber,
        f"CREATE SUBSCRIPTION {publication} CONNECTION '{address} password={url.password}'"
        f" PUBLICATION {publication} WITH (create_slot = false, slot_name = {slot})",
    )
    try:
        yield
    finally:
        with connected(subscriber) as conn, conn.cursor() as cur:
            cur.execute(f"ALTER SUBSCRIPTION {publication} DISABLE")
            cur.execute(f"ALTER SUBSCRIPTION {publication} SET (slot_name = NONE)")
            cur.execute(f"DROP SUBSCRIPTION {publication}")
        wait_until(
            lambda: (
                not value(publisher, "SELECT active FROM pg_replication_slots WHERE slot_name = %s", slot)
            ),
            30,
            "the slot is free",
        )
        query(publisher, "SELECT pg_drop_replication_slot(%s)", slot)


def follows(table: Live, subscriber: str) -> None:
    """Wait until the subscriber has what the application's model has, no row twice and none missing."""
    wait_until(
        lambda: not table.application.compare(subscriber),
        60,
        "the subscriber has every row",
    )


@pytest.mark.parametrize("strategy", ["copy", "attach"])
def test_a_subscriber_of_a_publication_by_table_follows_migration_and_rollback(
    make_database: MakeDatabase, strategy: str
) -> None:
    publisher, subscriber = make_database(), make_database()
    with live(publisher, rows=500) as table:
        load(subscriber, 0)
        query(subscriber, "DELETE FROM webhook_endpoint")
        query(
            publisher,
            "CREATE PUBLICATION sent FOR TABLE webhook_log, webhook_endpoint"
            " WITH (publish_via_partition_root = true)",
        )
        with subscribed(publisher, subscriber, "sent"):
            follows(table, subscriber)
            table.run(*MIGRATE, "--strategy", strategy, "--hold")
            follows(table, subscriber)
            table.run(*RESUME, swaps=1)
            follows(table, subscriber)
            table.run(*ROLLBACK, swaps=1)
            follows(table, subscriber)
            table.run(*MIGRATE, "--strategy", strategy, swaps=1)
            assert chronos(publisher, "finalize", "--yes").returncode == 0
            follows(table, subscriber)


def test_a_subscribed_publication_that_would_send_rows_of_partitions_is_refused(
    make_database: MakeDatabase,
) -> None:
    publisher, subscriber = make_database(), make_database()
    load(publisher, 10)
    load(subscriber, 0)
    query(subscriber, "DELETE FROM webhook_endpoint")
    query(publisher, "CREATE PUBLICATION sent FOR TABLE webhook_log, webhook_endpoint")
    with subscribed(publisher, subscriber, "sent"):
        refused = chronos(publisher, "migrate", "--yes")
        assert refused.returncode == 2
        assert "ALTER PUBLICATION sent SET (publish_via_partition_root = true)" in refused.stderr
        assert "[publication-of-partitions]" in refused.stderr
        query(publisher, "ALTER PUBLICATION sent SET (publish_via_partition_root = true)")
        assert chronos(publisher, "migrate", "--yes").returncode == 0
