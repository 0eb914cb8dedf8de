"""An application that logs webhooks while its table is migrated, and records what the server confirmed."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, Self

import psycopg2
from psycopg2.extensions import connection
from sqlalchemy.engine import URL, Connection, make_url

from chronos.db import connect_engine, execute, name, one_line, render, statement, transaction
from chronos.demo.rows import ENDPOINT_TABLE, payloads
from chronos.table import WEBHOOK_LOG

APPLICATION_NAME = "webhook application"

_PAYLOADS_IN_USE = 100
_RECONNECT_PAUSE_S = 0.05


class Commit(NamedTuple):
    """A row that the server confirmed as stored.

    ``timestamp`` is aware; ``marker`` is its X-Request-Id, which is unique; ``seconds`` is how long the
    application waited, from BEGIN to the confirmation.
    """

    id: int
    timestamp: datetime
    marker: str
    seconds: float


@dataclass(frozen=True)
class Failure:
    """An insert that failed after ``seconds``; ``sqlstate`` None: the server was gone."""

    marker: str
    sqlstate: str | None
    message: str
    seconds: float


@dataclass(frozen=True)
class Presence:
    """How a table differs from what the server confirmed: all is well when the three are empty.

    ``lost`` are commits that are not in the table, ``twice`` the markers of those that are in it more than
    once, ``repeated_ids`` the ids that more than one row has, whoever wrote them.
    """

    lost: list[Commit]
    twice: list[str]
    repeated_ids: list[int]


class LiveWriter:
    """Connections that insert row after row, each in its own transaction, while a ``with`` block runs.

    ``rate`` is the number of inserts a second over all ``threads`` connections (None: as fast as possible);
    inserts missed during a stall are not made up for. ``past_share`` of the rows (0 to 1) are from one day to
    ``past_days`` days old. Every other connection uses a prepared statement, as some drivers do by
    themselves. A connection that the server cuts counts as an error and stays closed; with ``reconnect`` it
    is reopened instead, however long that takes.

    The records can be read at any time: ``commits``; ``errors``; and, with ``reconnect``, ``in_doubt``
    (cut off during COMMIT: the row may be stored or not) and ``cut_off`` (before COMMIT: not stored).
    """

    def __init__(
        self,
        url: URL | str,
        *,
        threads: int = 4,
        rate: float | None = None,
        past_share: float = 0.0,
        past_days: float = 10.0,
        reconnect: bool = False,
        schema: str = "public",
        seed: int = 1,
    ) -> None:
        self.commits: list[Commit] = []
        self.errors: list[Failure] = []
        self.in_doubt: list[Commit] = []
        self.cut_off: list[Failure] = []
        self._url = make_url(url)
        self._pause_s = threads / rate if rate else 0.0
        self._past_share = past_share
        self._past_days = past_days
        self._reconnect = reconnect
        self._schema = schema
        self._seed = seed
        self._run_id = uuid.uuid4().hex[:12]
        self._turns = [0] * threads
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()

    def start(self) -> None:
        """Connect and begin to insert; raises the driver's error if it cannot."""
        with connect_engine(self._url).connect() as conn, transaction(conn):
            self._payloads = execute(
                conn,
                statement(
                    "SELECT request_headers::text, request_body::text, response_headers::text,"
                    " response_body::text, status, status_code"
                    " FROM ({payloads}) AS p WHERE payload <= {limit}",
                    payloads=payloads(self._seed),
                    limit=_PAYLOADS_IN_USE,
                ),
            ).all()
            ids = execute(conn, statement("SELECT id FROM {t}", t=name(self._schema, ENDPOINT_TABLE)))
            self._endpoints = [row[0] for row in ids] or [None]
            self._log = render(conn, name(self._schema, WEBHOOK_LOG.name))
        sessions = [self._connect(number) for number in range(len(self._turns))]
        self._threads = [
            threading.Thread(target=self._work, args=(number, session), name=f"writer {number}", daemon=True)
            for number, session in enumerate(sessions)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let each connection finish its current insert, and close it; a second call does nothing."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def catch_up(self) -> None:
        """Return when each connection has finished one more insert: earlier waits are then all recorded."""
        before = list(self._turns)
        for number, thread in enumerate(self._threads):
            while thread.is_alive() and self._turns[number] == before[number]:
                time.sleep(0.001)

    def longest_wait(self, since: int = 0) -> float:
        """The longest wait, in seconds, among the commits from index ``since`` on."""
        return max((commit.seconds for commit in self.commits[since:]), default=0.0)

    def check(self, conn: Connection) -> Presence:
        """Look up every recorded commit in the table, which is read in full; locks: ACCESS SHARE."""
        recorded = list(self.commits)
        log = name(self._schema, WEBHOOK_LOG.name)
        with transaction(conn):
            rows = execute(
                conn,
                statement(
                    "SELECT request_headers ->> 'X-Request-Id', id, \"timestamp\" FROM {log}"
                    " WHERE request_headers ->> 'X-Request-Id' ^@ {run}",
                    log=log,
                    run=self._run_id,
                ),
            ).all()
            repeated = execute(
                conn, statement("SELECT id FROM {log} GROUP BY id HAVING count(*) > 1", log=log)
            ).all()
        found = {(marker, key, _utc(timestamp)) for marker, key, timestamp in rows}
        times = Counter(row[0] for row in rows)
        return Presence(
            lost=[c for c in recorded if (c.marker, c.id, c.timestamp) not in found],
            twice=[marker for marker, number in times.items() if number > 1],
            repeated_ids=[row[0] for row in repeated],
        )

    def _insert(self, slots: Sequence[str]) -> str:
        headers, marker, *others = slots
        return (
            f"INSERT INTO {self._log} (request_headers, request_body, response_headers, response_body,"
            ' status, status_code, "timestamp", webhook_endpoint_id)'
            f" VALUES ({headers}::jsonb || jsonb_build_object('X-Request-Id', {marker}::text),"
            f" {', '.join(others)}) RETURNING id"
        )

    def _connect(self, number: int) -> connection:
        parameters: dict[str, Any] = {
            "application_name": APPLICATION_NAME,
            "connect_timeout": 10,
            **self._url.translate_connect_args(username="user", database="dbname"),
            **self._url.query,
        }
        session: connection = psycopg2.connect(**parameters)
        with session, session.cursor() as cursor:
            # Values in a `timestamp` column are UTC, whatever the server's time zone.
            cursor.execute("SET TIME ZONE 'UTC'")
            if _prepares(number):
                cursor.execute(f"PREPARE log_delivery AS {self._insert([f'${n}' for n in range(1, 10)])}")
        return session

    def _connect_again(self, number: int) -> connection | None:
        while self._reconnect and not self._stopping.wait(_RECONNECT_PAUSE_S):
            try:
                return self._connect(number)
            except psycopg2.Error:
                continue  # not up yet
        return None

    def _work(self, number: int, session: connection | None) -> None:
        """The life of one connection, or of several in a row."""
        slots = ["%s"] * 9
        query = f"EXECUTE log_delivery ({', '.join(slots)})" if _prepares(number) else self._insert(slots)
        chance = random.Random(self._seed * 1_000 + number)
        due = time.monotonic() + self._pause_s * number / len(self._turns)
        while session is not None and not self._stopping.wait(max(0.0, due - time.monotonic())):
            due = max(due + self._pause_s, time.monotonic())
            marker = f"{self._run_id}-{number}-{self._turns[number]}"
            if not self._log_delivery(session, query, marker, chance):
                session = self._connect_again(number)
            self._turns[number] += 1
        if session is not None:
            session.close()

    def _log_delivery(self, session: connection, query: str, marker: str, chance: random.Random) -> bool:
        """Insert one row and record the outcome; returns whether the connection is still usable."""
        timestamp = datetime.now(UTC)
        if chance.random() < self._past_share:
            timestamp -= timedelta(days=chance.uniform(1, self._past_days))
        headers, *payload = chance.choice(self._payloads)
        values = (headers, marker, *payload, timestamp, chance.choice(self._endpoints))
        row = None
        started = time.monotonic()
        try:
            with session.cursor() as cursor:
                cursor.execute(query, values)
                row = cursor.fetchone()
            session.commit()
        except psycopg2.Error as error:
            seconds = time.monotonic() - started
            usable = _roll_back(session)
            if usable or not self._reconnect:
                self.errors.append(Failure(marker, error.pgcode, one_line(error), seconds))
            elif row:
                self.in_doubt.append(Commit(row[0], timestamp, marker, seconds))
            else:
                self.cut_off.append(Failure(marker, error.pgcode, one_line(error), seconds))
            return usable
        assert row is not None
        self.commits.append(Commit(row[0], timestamp, marker, time.monotonic() - started))
        return True


def _prepares(number: int) -> bool:
    """Whether the connection with this number, from 0, uses a prepared statement."""
    return number % 2 == 1


def _roll_back(session: connection) -> bool:
    """End a failed transaction; returns whether the connection is still there."""
    try:
        session.rollback()
    except psycopg2.Error:
        return False
    return not session.closed


def _utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
