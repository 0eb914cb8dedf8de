"""Transactions that are open across a swap: none blocks it for good, and none misses a row."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg2
import pytest
from psycopg2.errorcodes import SERIALIZATION_FAILURE
from rich.console import Console
from sqlalchemy import event
from sqlalchemy.engine import Engine, make_url

from chronos.db import connect_engine
from chronos.demo.rows import create_webhook_log
from chronos.locks import Patience
from chronos.migration.console import Output
from chronos.migration.operator import Operator
from chronos.migration.rollback import undo
from chronos.migration.run import Options, migrate
from chronos.table import WEBHOOK_LOG
from tests.command import chronos
from tests.live import phase
from tests.tables import connected, query, value
from tests.waiting import wait_until

ROWS = 1_000
THINKS_S = 0.15


class Deliveries(threading.Thread):
    """Reads its endpoint, thinks, then writes the result of the delivery, all in one transaction."""

    def __init__(self, url: str, number: int) -> None:
        super().__init__(daemon=True)
        self.stopping = threading.Event()
        self.ids: list[int] = []
        self.errors: list[str] = []
        self._url = url
        self._begins_after_s = THINKS_S * number / 4

    def run(self) -> None:
        self.stopping.wait(self._begins_after_s)
        with connected(self._url, autocommit=False) as conn, conn.cursor() as cursor:
            while not self.stopping.is_set():
                try:
                    self.ids.append(self._deliver(cursor))
                    conn.commit()
                except psycopg2.Error as error:
                    self.errors.append(str(error))
                    conn.rollback()

    def _deliver(self, cursor: Any) -> int:
        cursor.execute("SELECT id FROM webhook_endpoint ORDER BY random() LIMIT 1")
        [[endpoint]] = cursor.fetchall()
        self.stopping.wait(THINKS_S)
        cursor.execute(
            "INSERT INTO webhook_log (status, timestamp, webhook_endpoint_id) VALUES ('sent', now(), %s)"
            " RETURNING id",
            (endpoint,),
        )
        [[key]] = cursor.fetchall()
        assert isinstance(key, int)
        return key


@contextmanager
def delivering(url: str, workers: int = 4) -> Iterator[list[Deliveries]]:
    """At any moment, some transaction has read an endpoint and not yet written the result."""
    threads = [Deliveries(url, number) for number in range(workers)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: all(thread.ids for thread in threads), 30, "every thread delivers")
        yield threads
    finally:
        for thread in threads:
            thread.stopping.set()
        for thread in threads:
            thread.join()


def test_transactions_that_have_read_an_endpoint_do_not_delay_the_swap(database: str) -> None:
    """The swap takes no lock that conflicts with theirs, so it need not wait for a moment without them."""
    create_webhook_log(connect_engine(make_url(database)), ROWS)
    with delivering(database) as threads:
        for verb in ("migrate", "rollback"):
            done = chronos(database, verb, "--yes")
            assert done.returncode == 0, done.stdout + done.stderr
    assert [error for thread in threads for error in thread.errors] == []
    ids = [key for thread in threads for key in thread.ids]
    assert value(database, "SELECT count(*) FROM webhook_log WHERE id = ANY (%s)", ids) == len(ids)


def engine_that_waits(url: str) -> Engine:
    """An engine with a long deadlock_timeout, so that an attempt can last."""
    return connect_engine(make_url(url).update_query_dict({"options": "-c deadlock_timeout=20s"}))


def patient() -> Operator:
    return Operator(
        Output(Console(file=io.StringIO(), soft_wrap=True)), patience=Patience(shortest_s=15, longest_s=15)
    )


class AtTheLastReplay:
    """Watches what the swap sends and does two things: the last write before the lock that blocks writers
    (the ``number``th of the run), and ``act`` while writers wait and the notes are not yet replayed.
    """

    def __init__(self, engine: Engine, url: str, number: int, act: Callable[[int], None]) -> None:
        self._engine = engine
        self._url = url
        self._left = number
        self._act = act
        self._key = 0

    def __enter__(self) -> None:
        event.listen(self._engine, "before_cursor_execute", self._on_statement)

    def __exit__(self, *_: object) -> None:
        event.remove(self._engine, "before_cursor_execute", self._on_statement)

    def _on_statement(self, conn: Any, cursor: Any, text: str, *_: Any) -> None:
        if '"webhook_log" IN SHARE ROW EXCLUSIVE MODE' in text:
            self._left -= 1
            if not self._left:
                self._key = value(
                    self._url,
                    "INSERT INTO webhook_log (status, timestamp) VALUES ('sent', now()) RETURNING id",
                )
        elif self._key and "SELECT ARRAY(SELECT ctid" in text:
            key, self._key = self._key, 0
            self._act(key)


@pytest.mark.parametrize("way", ["there", "back"])
def test_a_repeatable_read_writer_that_waited_for_the_swap_is_told_to_retry(database: str, way: str) -> None:
    """It would not see the rows replayed last: its UPDATE must not miss one silently."""
    engine = engine_that_waits(database)
    create_webhook_log(engine, ROWS)
    migrate(engine, WEBHOOK_LOG, Options(hold=way == "there"), patient(), lambda found: None)
    told: list[str | None] = []
    with connected(database, autocommit=False) as conn:
        conn.set_session(isolation_level="REPEATABLE READ")

        def update(key: int) -> None:
            try:
                with conn.cursor() as cursor:
                    cursor.execute("UPDATE webhook_log SET status = 'changed' WHERE id = %s", (key,))
                    told.append(f"{cursor.rowcount} rows")
            except psycopg2.Error as error:
                told.append(error.pgcode)

        writers: list[threading.Thread] = []

        def write(key: int) -> None:
            writers.append(threading.Thread(target=update, args=(key,), daemon=True))
            writers[0].start()
            waits = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND cardinality(pg_blocking_pids(pid)) > 0"
            wait_until(lambda: query(database, waits, conn.info.backend_pid), 20, "the writer waits")

        # A rollback takes one such lock earlier, when it starts to note everything.
        with AtTheLastReplay(engine, database, 1 if way == "there" else 2, write):
            if way == "there":
                migrate(engine, WEBHOOK_LOG, Options(resume=True), patient(), lambda found: None)
            else:
                undo(engine, WEBHOOK_LOG, patient(), lambda found, by_hand: None)
        writers[0].join(30)
    assert told == [SERIALIZATION_FAILURE]
    assert phase(database) == ("migrated" if way == "there" else None)
