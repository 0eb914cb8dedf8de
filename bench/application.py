"""A live application that keeps a ledger of its commits, and readers that rely on it.

Writers insert, update by id and delete, one transaction each. One reader counts the rows of a past day that
has no inserts or deletes, the other looks for the newest committed rows that are never deleted. At the end
the table must hold what was there before, as changed by the ledger.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection as Pipe
from typing import Any

import psycopg2
from psycopg2.extensions import connection
from psycopg2.extras import execute_values
from sqlalchemy.engine import Engine, make_url

from bench.stage import WRITERS, WRITES_A_SECOND

# Ages of rows, in whole days: those counted by day, those that may be deleted, all those compared at the end.
COUNTED_DAYS = range(1, 10)
DELETED_DAYS = range(10, 13)
COMPARED_DAYS = 13

_STOCK = 4_000  # existing rows that the application updates and deletes
_NEWEST = 20  # rows that a reader looks for
_READER_PAUSE_S = 0.02
_RECONNECT_PAUSE_S = 0.05

# A row as the application knows it: when, status, status code. None: deleted.
Known = tuple[datetime, str, int] | None

_INSERT = """
INSERT INTO webhook_log (request_headers, request_body, response_headers, status, status_code, "timestamp",
                         webhook_endpoint_id)
VALUES (%s::jsonb, %s::jsonb, %s::jsonb, %s, %s, %s, %s) RETURNING id
"""
_PAYLOAD = (
    '{"Content-Type": "application/json", "User-Agent": "webhooks/2.4"}',
    '{"type": "order.paid", "text": "' + "0123456789abcdef" * 40 + '"}',
    '{"Content-Type": "application/json", "Server": "nginx"}',
)

# The rows to compare, as they are at the start; created once, in the template.
_REMEMBER = """
CREATE TABLE bench_before AS
SELECT id, "timestamp", status, status_code, hashtextextended(w::text, 0) AS hash
FROM webhook_log AS w WHERE "timestamp" >= {since};
ALTER TABLE bench_before ADD PRIMARY KEY (id);
VACUUM ANALYZE bench_before
"""

# A row that the application wrote must be as it wrote it, any other unchanged; each exactly once.
_COMPARE = """
WITH expected AS (
    SELECT b.id, b.hash, NULL::timestamptz AS "timestamp", NULL AS status, NULL::integer AS status_code
    FROM bench_before AS b WHERE NOT EXISTS (SELECT FROM ledger AS l WHERE l.id = b.id)
    UNION ALL
    SELECT id, NULL, "timestamp", status, status_code FROM ledger WHERE status IS NOT NULL
), found AS (
    SELECT id, count(*) AS times, min(hashtextextended(w::text, 0)) AS hash, min("timestamp") AS "timestamp",
           min(status) AS status, min(status_code) AS status_code
    FROM webhook_log AS w WHERE "timestamp" >= %s GROUP BY id
)
SELECT count(*) FROM expected AS e FULL JOIN found AS f ON f.id = e.id
WHERE e.id IS NULL OR f.id IS NULL OR f.times > 1 OR f.hash <> e.hash
   OR e.hash IS NULL AND (f."timestamp", f.status, f.status_code)
                         IS DISTINCT FROM (e."timestamp", e.status, e.status_code)
"""


@dataclass
class Account:
    """What the application saw; waits and times in seconds.

    Of all ``reads``, ``short`` found fewer rows than are committed; ``gap_s`` is the time from the first of
    those to the last. ``missed`` are updates and deletes that hit no row. ``ledger`` has each written row by
    id.
    """

    reads: int = 0
    short: int = 0
    gap_s: float = 0.0
    missed: int = 0
    errors: list[str] = field(default_factory=list)
    writer_s: float = 0.0
    reader_s: float = 0.0
    ledger: dict[int, Known] = field(default_factory=dict)


def today() -> datetime:
    """The last midnight, UTC."""
    return datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def remember(engine: Engine, since: datetime) -> None:
    """Record what webhook_log holds from ``since`` on, for ``differing`` to compare with."""
    with engine.connect() as conn:
        conn.execution_options(isolation_level="AUTOCOMMIT", no_parameters=True)
        for text in _REMEMBER.format(since=f"'{since.isoformat()}'").split(";"):
            conn.exec_driver_sql(text)


def differing(engine: Engine, account: Account, since: datetime) -> int:
    """How many rows from ``since`` on are missing, extra, duplicated, or not what was written last."""
    rows = [(key, *(row or (None, None, None))) for key, row in account.ledger.items()]
    session = _connect(engine.url.render_as_string(hide_password=False))
    with session.cursor() as cur:
        cur.execute(
            'CREATE TEMP TABLE ledger (id bigint PRIMARY KEY, "timestamp" timestamptz, status text,'
            " status_code integer)"
        )
        if rows:
            execute_values(cur, "INSERT INTO ledger VALUES %s", rows, page_size=1_000)
        cur.execute("ANALYZE ledger")
        cur.execute(_COMPARE, (since,))
        [found] = cur.fetchone() or (0,)
    session.close()
    return int(found)


@contextmanager
def watched(engine: Engine, day: datetime) -> Iterator[Account]:
    """The application and its readers, in their own process, while the block runs.

    ``day`` is today's midnight, from which the days are counted. The account is filled in when the block
    ends.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    url = engine.url.render_as_string(hide_password=False)
    process = context.Process(target=_live, args=(url, day, theirs), daemon=True)
    process.start()
    theirs.close()
    account = Account()
    try:
        ours.recv()
        yield account
        ours.send(None)
        vars(account).update(vars(ours.recv()))
    finally:
        ours.close()
        process.join()


def _live(url: str, day: datetime, orders: Pipe) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the measuring process handles Ctrl-C and ends the pipe
    application = _Application(url, day)
    application.start()
    orders.send(None)
    with suppress(EOFError):
        orders.recv()
        orders.send(application.stop())


def _connect(url: str) -> connection:
    dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    session: connection = psycopg2.connect(dsn, connect_timeout=10)
    session.autocommit = True
    with session.cursor() as cur:
        cur.execute("SET TIME ZONE 'UTC'")
    return session


class _Application:
    """All threads, and what they share."""

    def __init__(self, url: str, day: datetime) -> None:
        self.url = url
        self.day = day
        self.stopping = threading.Event()
        self.kept: deque[int] = deque(maxlen=_NEWEST)
        with _connect(url).cursor() as cur:
            cur.execute(
                'SELECT id, "timestamp", status, status_code FROM webhook_log TABLESAMPLE SYSTEM (20)'
                ' WHERE "timestamp" >= %s ORDER BY random() LIMIT %s',
                (day - timedelta(days=DELETED_DAYS[-1]), _STOCK),
            )
            stock = {row[0]: row[1:] for row in cur.fetchall()}
            cur.execute(
                "SELECT date_trunc('day', \"timestamp\", 'UTC') AS day, count(*) FROM webhook_log"
                ' WHERE "timestamp" >= %s AND "timestamp" < %s GROUP BY 1',
                (day - timedelta(days=COUNTED_DAYS[-1]), day),
            )
            self.days: dict[datetime, int] = dict(cur.fetchall())
        self.writers = [
            _Writer(self, number, dict(list(stock.items())[number::WRITERS])) for number in range(WRITERS)
        ]
        self.readers = [
            _Reader(self, name, read) for name, read in (("day", _count_day), ("newest", _newest))
        ]

    def start(self) -> None:
        """Start; returns once every session has done some work and measuring begins."""
        everybody: list[_Session] = [*self.writers, *self.readers]
        for one in everybody:
            one.thread.start()
        for one in everybody:
            while one.done < 3 and one.thread.is_alive():
                time.sleep(0.001)
            one.longest_s = 0.0

    def stop(self) -> Account:
        """Stop all sessions; returns what they saw."""
        self.stopping.set()
        everybody: list[_Session] = [*self.writers, *self.readers]
        for one in everybody:
            one.thread.join()
        short = sorted(at for reader in self.readers for at in reader.short)
        return Account(
            reads=sum(reader.done for reader in self.readers),
            short=len(short),
            gap_s=short[-1] - short[0] if short else 0.0,
            missed=sum(writer.missed for writer in self.writers),
            errors=[error for one in everybody for error in one.errors],
            writer_s=max(writer.longest_s for writer in self.writers),
            reader_s=max(reader.longest_s for reader in self.readers),
            ledger={key: row for writer in self.writers for key, row in writer.ledger.items()},
        )


class _Session:
    """One connection that repeats the same work, and records what it saw."""

    def __init__(self, owner: _Application, name: str, pause_s: float) -> None:
        self.owner = owner
        self.thread = threading.Thread(target=self._work, name=name, daemon=True)
        self.chance = random.Random(name)
        self.errors: list[str] = []
        self.longest_s = 0.0
        self.done = 0
        self._pause_s = pause_s

    def act(self, session: connection) -> None:
        raise NotImplementedError

    def _work(self) -> None:
        session = _connect(self.owner.url)
        while not self.owner.stopping.wait(self._pause_s):
            started = time.monotonic()
            try:
                self.act(session)
            except psycopg2.Error as error:
                self.errors.append(str(error).partition("\n")[0])
                if session.closed:
                    self.owner.stopping.wait(_RECONNECT_PAUSE_S)
                    with suppress(psycopg2.Error):
                        session = _connect(self.owner.url)
            self.longest_s = max(self.longest_s, time.monotonic() - started)
            self.done += 1
        session.close()


class _Writer(_Session):
    """Inserts, updates and deletes rows that no other writer touches."""

    def __init__(self, owner: _Application, number: int, stock: dict[int, Known]) -> None:
        super().__init__(owner, f"writer {number}", WRITERS / WRITES_A_SECOND)
        self.rows = stock
        self.ledger: dict[int, Known] = {}
        self.missed = 0
        oldest, youngest = (
            owner.day - timedelta(days=age) for age in (DELETED_DAYS[-1], DELETED_DAYS[0] - 1)
        )
        self._deletable = [key for key, row in stock.items() if row and oldest <= row[0] < youngest]
        self.chance.shuffle(self._deletable)

    def act(self, session: connection) -> None:
        """One transaction: 50% are inserts, 40% updates, 10% deletes."""
        which = self.chance.random()
        if which < 0.5:
            self._insert(session)
        elif which < 0.9 or not self._deletable:
            self._update(session)
        else:
            self._delete(session)

    def _insert(self, session: connection) -> None:
        row = (datetime.now(UTC), "sent", self.chance.randint(200, 599))
        with session.cursor() as cur:
            cur.execute(_INSERT, (*_PAYLOAD, row[1], row[2], row[0], self.chance.randint(1, 40)))
            [key] = cur.fetchone() or (0,)
        self._note(key, row)
        if self.chance.random() < 0.3:
            self._deletable.append(key)
        else:
            self.owner.kept.append(key)

    def _update(self, session: connection) -> None:
        key, row = self.chance.choice(list(self.rows.items()))
        assert row is not None
        new = (row[0], "updated", self.chance.randint(200, 599))
        if self._hit(
            session, "UPDATE webhook_log SET status = %s, status_code = %s WHERE id = %s", *new[1:], key
        ):
            self._note(key, new)

    def _delete(self, session: connection) -> None:
        key = self._deletable.pop(self.chance.randrange(len(self._deletable)))
        if self._hit(session, "DELETE FROM webhook_log WHERE id = %s", key):
            self._note(key, None)

    def _hit(self, session: connection, text: str, *values: Any) -> bool:
        with session.cursor() as cur:
            cur.execute(text, values)
            if cur.rowcount == 0:
                self.missed += 1
            return cur.rowcount > 0

    def _note(self, key: int, row: Known) -> None:
        self.ledger[key] = row
        if row is None:
            del self.rows[key]
        else:
            self.rows[key] = row


class _Reader(_Session):
    """Reads what must be there, and records when it is not."""

    def __init__(
        self,
        owner: _Application,
        name: str,
        read: Callable[[_Application, connection, random.Random], tuple[int, int]],
    ) -> None:
        super().__init__(owner, f"reader {name}", _READER_PAUSE_S)
        self.short: list[float] = []
        self._read = read

    def act(self, session: connection) -> None:
        """One read."""
        expected, found = self._read(self.owner, session, self.chance)
        if found < expected:
            self.short.append(time.monotonic())


def _count_day(owner: _Application, session: connection, chance: random.Random) -> tuple[int, int]:
    """How many rows a day must have, and how many it has."""
    day, rows = chance.choice(list(owner.days.items()))
    with session.cursor() as cur:
        cur.execute(
            'SELECT count(*) FROM webhook_log WHERE "timestamp" >= %s AND "timestamp" < %s',
            (day, day + timedelta(days=1)),
        )
        [found] = cur.fetchone() or (0,)
    return rows, found


def _newest(owner: _Application, session: connection, chance: random.Random) -> tuple[int, int]:
    """How many of the newest rows must be there, and how many are."""
    keys = list(owner.kept.copy())
    with session.cursor() as cur:
        cur.execute("SELECT count(*) FROM webhook_log WHERE id = ANY(%s)", (keys,))
        [found] = cur.fetchone() or (0,)
    return len(keys), found
