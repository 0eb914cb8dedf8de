"""An application that repeatedly counts rows that never change, and records what it saw."""

from __future__ import annotations

import threading
import time
from datetime import datetime
from typing import Any, Self

import psycopg2
from sqlalchemy.engine import URL

from chronos.db import one_line
from chronos.demo.writer import APPLICATION_NAME
from chronos.table import WEBHOOK_LOG

_PAUSE_S = 0.05


class CountingReader:
    """While a ``with`` block runs, counts the rows from ``since`` on that existed when it began.

    ``reads`` is the number of counts, ``short`` how many of them missed a row, ``longest_s`` the longest in
    seconds, ``errors`` what the server refused. These rows must not change, and every row added must have a
    higher id.
    """

    def __init__(self, url: URL, since: datetime, schema: str = "public") -> None:
        self._parameters: dict[str, Any] = {
            "application_name": APPLICATION_NAME,
            **url.translate_connect_args(username="user", database="dbname"),
            **url.query,
        }
        table = f'"{schema}"."{WEBHOOK_LOG.name}"'
        self._newest = f"SELECT coalesce(max(id), 0) FROM {table}"
        self._count = f'SELECT count(*) FROM {table} WHERE "timestamp" >= %s AND id <= %s'
        self._since = since
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="reader", daemon=True)
        self.reads = 0
        self.short = 0
        self.longest_s = 0.0
        self.errors: list[str] = []

    def __enter__(self) -> Self:
        self._session = psycopg2.connect(**self._parameters)
        self._session.autocommit = True
        with self._session.cursor() as cursor:
            cursor.execute(self._newest)
            self._values = (self._since, cursor.fetchone()[0])
            cursor.execute(self._count, self._values)
            self._expected = cursor.fetchone()[0]
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._session.close()

    def _work(self) -> None:
        while not self._stopping.wait(_PAUSE_S):
            began = time.monotonic()
            try:
                with self._session.cursor() as cursor:
                    cursor.execute(self._count, self._values)
                    [found] = cursor.fetchone()
            except psycopg2.Error as error:
                self.errors.append(one_line(error))
                return
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            self.reads += 1
            self.short += found != self._expected
