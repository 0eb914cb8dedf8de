"""How fast the copy may go: batches that shrink under load, a limit on rows per second, a limit on lag."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from sqlalchemy.engine import Connection

from chronos.db import execute, statement, transaction
from chronos.errors import RefusedError

_ROUND_S = 0.2  # longest delay before a stop is noticed while batches run
_SLOW_BATCH_S = 1.0
_SMALLEST_BATCH = 50
_POLL_S = 1.0
_NAP_S = 0.25  # longest delay before a stop is noticed while nothing is copied


class Lag(NamedTuple):
    """A replica, and how far it is behind in seconds."""

    replica: str
    seconds: float


class Throttle:
    """Says when the next batch may begin and how many rows it may have; shared by all workers.

    ``batch_size`` is the maximum; a batch that takes longer than a second halves it, quick ones double it
    again. ``rate_limit`` is in rows per second over all workers. ``lag`` returns the replica that is furthest
    behind, None without replicas; it is called once a second, and while the lag exceeds ``max_lag`` seconds
    no batch begins. ``on_pause`` is called with the reason for a pause, again whenever that changes, and with
    None when it ends. ``clock`` and ``sleep`` stand in for time.
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
        # At most a second's worth at once, so that the limit also holds over short spans.
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
        # How long batches may follow each other before ``begin`` must be called again.
        self.round_s = 0.0 if rate_limit else _ROUND_S

    def begin(self, check_stop: Callable[[], None]) -> int:
        """Wait until a batch may begin; returns the maximum rows for it.

        ``check_stop`` is called repeatedly while waiting and raises to end it.
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
        """Record that the batch that was allowed ``size`` rows had ``rows`` and took ``seconds``."""
        with self._turn:
            self._free_at += self._seconds(rows - size)
            if seconds > _SLOW_BATCH_S:
                self._size = max(min(_SMALLEST_BATCH, self._most), self._size // 2)
            elif seconds < _SLOW_BATCH_S / 4:
                self._size = min(self._most, self._size * 2)

    def cut_short(self, size: int, check_stop: Callable[[], None]) -> None:
        """Record that the server cancelled a batch of ``size`` rows: later ones are smaller.

        Waits a second, as the cause may be a lock.
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

    The server's ``replay_lag`` is that of the last replayed change: it stays the same on a replica that has
    stopped replaying. So we also remember how much WAL the server had written at what time, and a replica is
    as far behind as the first of these marks that it has not reached.
    """

    def __init__(self, conn: Connection, clock: Callable[[], float] = time.monotonic) -> None:
        self._conn = conn
        self._clock = clock
        self._marks: deque[tuple[int, float]] = deque()

    def __call__(self) -> Lag | None:
        """The replica that is furthest behind; None when there is none.

        Raises RefusedError when this role may not see how far they are.
        """
        with transaction(self._conn):
            replicas = execute(self._conn, statement(_REPLICAS)).all()
        now = self._clock()
        if not replicas:
            return None
        if any(replayed is None for _, _, replayed, _, _ in replicas):
            raise RefusedError(
                "this role may not see how far the replicas are behind; nothing was changed."
                " GRANT pg_read_all_stats to it, or omit --max-replica-lag"
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
