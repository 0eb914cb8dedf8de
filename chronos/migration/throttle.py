"""How fast the copy may go: batches that shrink under load, a limit of rows a second, a limit of lag."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from sqlalchemy.engine import Connection

from chronos.db import execute, statement, transaction
from chronos.errors import RefusedError

_ROUND_S = 0.2  # how long a request to stop may go unnoticed while batches run
_SLOW_BATCH_S = 1.0
_SMALLEST_BATCH = 50
_POLL_S = 1.0
_NAP_S = 0.25  # how long a request to stop may go unnoticed while nothing is copied


class Lag(NamedTuple):
    """How far a replica is behind, in seconds, and what it is called."""

    replica: str
    seconds: float


class Throttle:
    """Says when the next batch may begin and how many rows it may have; shared by all workers.

    ``batch_size`` is the most; a batch that lasts longer than a second halves it, quick ones double it
    again. ``rate_limit`` is in rows a second over all workers. ``lag`` returns the replica that is
    furthest behind, None without replicas; it is asked once a second, and while it is more than
    ``max_lag`` seconds no batch begins. ``on_pause`` is told why the copy stands still, again whenever
    that changes, and then None. Time passes by ``clock`` and ``sleep``.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        rate_limit: float | None = None,
        max_lag: float | None = None,
        lag: Callable[[], Lag | None] = lambda: None,
        on_pause: Callable[[str | None], None] = lambda why: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        # Not more at once than a second's worth, so that the limit also holds within seconds.
        self._most = batch_size if rate_limit is None else max(1, min(batch_size, round(rate_limit)))
        self._size = self._most
        self._rate_limit = rate_limit
        self._max_lag = max_lag
        self._ask_lag = lag
        self._on_pause = on_pause
        self._clock = clock
        self._sleep = sleep
        self._turn = threading.Lock()
        self._free_at = clock()
        self._asked_at = float("-inf")
        self.lag: Lag | None = None
        # Batches that begin by themselves, one after another, before ``begin`` is to be asked again.
        self.round_s = 0.0 if rate_limit else _ROUND_S

    def begin(self, check_stop: Callable[[], None]) -> int:
        """Wait until a batch may begin; returns the most rows that it may have.

        ``check_stop`` is called again and again while waiting and raises to end it.
        """
        check_stop()
        while not self._replicas_keep_up():
            self._nap(_NAP_S, check_stop)
        with self._turn:
            size = self._size
            begins = max(self._free_at, self._clock())
            self._free_at = begins + self._seconds(size)
        while (early := begins - self._clock()) > 0:
            self._nap(min(early, _NAP_S), check_stop)
        return size

    def end(self, size: int, rows: int, seconds: float) -> None:
        """Note that the batch which was allowed ``size`` rows had ``rows`` and lasted ``seconds``."""
        with self._turn:
            self._free_at += self._seconds(rows - size)
            if seconds > _SLOW_BATCH_S:
                self._size = max(min(_SMALLEST_BATCH, self._most), self._size // 2)
            elif seconds < _SLOW_BATCH_S / 4:
                self._size = min(self._most, self._size * 2)

    def cut_short(self, size: int, check_stop: Callable[[], None]) -> None:
        """Note that the server has cancelled a batch of ``size`` rows: none gets as large again.

        Waits a second, for it may be a lock that was waited for in vain.
        """
        with self._turn:
            self._free_at -= self._seconds(size)
            self._most = min(self._most, max(_SMALLEST_BATCH, size // 2))
            self._size = min(self._size, self._most)
        for _ in range(round(_POLL_S / _NAP_S)):
            self._nap(_NAP_S, check_stop)

    def _seconds(self, rows: int) -> float:
        return rows / self._rate_limit if self._rate_limit else 0.0

    def _nap(self, seconds: float, check_stop: Callable[[], None]) -> None:
        self._sleep(seconds)
        check_stop()

    def _replicas_keep_up(self) -> bool:
        if self._max_lag is None:
            return True
        with self._turn:
            was_behind = self._behind()
            if self._clock() - self._asked_at >= _POLL_S:
                self.lag = self._ask_lag()
                self._asked_at = self._clock()
                if self.lag is not None and self._behind():
                    self._on_pause(
                        f"replica {self.lag.replica} lags {self.lag.seconds:.0f} s"
                        f" (at most {self._max_lag:g} s)"
                    )
                elif was_behind:
                    self._on_pause(None)
            return not self._behind()

    def _behind(self) -> bool:
        return self.lag is not None and self._max_lag is not None and self.lag.seconds > self._max_lag


_REPLICAS = """
SELECT pid, coalesce(nullif(application_name, ''), host(client_addr), 'pid ' || pid),
       pg_wal_lsn_diff(replay_lsn, '0/0')::bigint, coalesce(extract(epoch FROM replay_lag), 0)::float8,
       pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint
FROM pg_stat_replication
WHERE state IS NULL OR state IN ('streaming', 'catchup')
"""


class ReplicaLag:
    """Asks the server how far its replicas are behind, over a connection of its own.

    The server's ``replay_lag`` is that of the last change that was replayed: it stands still on a
    replica that has stopped replaying. So we also remember when the server had written how much, and
    a replica is as old as the first of these marks that it has not reached.
    """

    def __init__(self, conn: Connection, clock: Callable[[], float] = time.monotonic) -> None:
        self._conn = conn
        self._clock = clock
        self._marks: deque[tuple[int, float]] = deque()

    def __call__(self) -> Lag | None:
        """The replica that is furthest behind; None when there is none.

        Raises RefusedError when the server does not tell this role how far they are.
        """
        with transaction(self._conn):
            replicas = execute(self._conn, statement(_REPLICAS)).all()
        now = self._clock()
        if not replicas:
            return None
        if any(replayed is None for _, _, replayed, _, _ in replicas):
            raise RefusedError(
                "the server does not tell this role how far its replicas are; nothing was changed."
                " GRANT pg_read_all_stats to it, or leave --max-replica-lag out"
            )
        written, slowest = replicas[0][4], min(replayed for _, _, replayed, _, _ in replicas)
        while self._marks and self._marks[0][0] <= slowest:
            self._marks.popleft()
        if not self._marks or self._marks[-1][0] < written:
            self._marks.append((written, now))
        return max(
            (
                Lag(replica, self._seconds(replayed, reported, written, now))
                for _, replica, replayed, reported, written in replicas
            ),
            key=lambda lag: lag.seconds,
        )

    def _seconds(self, replayed: int, reported: float, written: int, now: float) -> float:
        if replayed >= written:
            return 0.0
        unreached = next((at for position, at in self._marks if position > replayed), now)
        return max(reported, now - unreached)
