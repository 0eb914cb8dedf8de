"""The lease that lets one worker at a time run a nightly job, kept in Redis under the job's own name.

Its rules:

1. The key is the job's name. Who creates it (SET NX) holds the lease; its value says who that is, for
   people (`GET create_future_partitions_job`), and ends with a token that nobody else has.
2. It expires TTL_S seconds after it was last renewed. A thread renews it three times in that time for
   as long as the holder's process lives, so a worker that is killed leaves a lease that is gone soon.
3. It is renewed and released only while the key still holds this very value. A lease that somebody
   else holds, or that a person has put there by hand, is never touched.
4. The holder may find that it has lost the lease: the key is gone or another's, or Redis has not
   confirmed a renewal for TTL_S. That is final. It then starts nothing new, and says so in its report.
5. What is under way when the lease is lost is safe all the same. Redis can fail over and forget, so
   the SQL functions also take an advisory lock of PostgreSQL: the lease saves work and the report from
   being done twice, that lock keeps the table safe.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from chronos.errors import ChronosError, RefusedError
from chronos.settings import Settings

TTL_S = 20.0

_RENEW = """
if redis.call('get', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('pexpire', KEYS[1], ARGV[2])
"""
_RELEASE = """
if redis.call('get', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('del', KEYS[1])
"""


class LeaseHeldError(ChronosError):
    """Somebody else holds the lease; the message says who."""


def connect(settings: Settings) -> redis.Redis:
    """A client of the Redis in ``settings`` that gives up after 3 s; nothing is sent yet.

    Raises RefusedError, which never quotes the URL.
    """
    try:
        return redis.Redis.from_url(
            settings.redis_url.get_secret_value(),
            decode_responses=True,
            socket_timeout=3,
            socket_connect_timeout=3,
            retry=Retry(NoBackoff(), 1),
        )
    except ValueError:
        raise RefusedError(
            "REDIS_URL cannot be read as a URL. It looks like redis://:password@host:6379/0"
            " (a password with special characters must be percent-encoded)."
        ) from None


def holder(client: redis.Redis, key: str) -> str | None:
    """Who holds the lease, for people: `host=web1 pid=4242 since=...`, without the token; None if nobody.

    Raises redis.RedisError.
    """
    value = client.get(key)
    if value is None:
        return None
    shown = str(value).partition(" token=")[0][:200]
    return shown if client.pttl(key) != -1 else f"{shown} and it never expires (DEL {key} frees it)"


class Lease:
    """A lease on ``key``; ``clock`` (seconds, monotonic) tells how old the last renewal is.

    ``keep_lease`` is the usual way to have one.
    """

    def __init__(
        self,
        client: redis.Redis,
        key: str,
        *,
        ttl_s: float = TTL_S,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.key = key
        self.ttl_s = ttl_s
        self.value = (
            f"host={socket.gethostname()} pid={os.getpid()}"
            f" since={now():%Y-%m-%dT%H:%M:%SZ} token={secrets.token_hex(8)}"
        )
        self._client = client
        self._clock = clock
        self._expires = clock()
        self._lost: str | None = None

    @property
    def lost(self) -> str | None:
        """Why this lease is no longer held, or None; once lost it stays so."""
        if self._lost is None and self._clock() >= self._expires:
            self._lost = f"Redis has not confirmed it for {self.ttl_s:g} s"
        return self._lost

    def acquire(self) -> None:
        """Take the lease. Raises LeaseHeldError when it is another's, redis.RedisError without an answer."""
        asked = self._clock()
        if not self._client.set(self.key, self.value, nx=True, px=int(self.ttl_s * 1000)):
            who = holder(self._client, self.key) or "a run that has just ended"
            raise LeaseHeldError(f"{self.key} is running already: {who}")
        self._expires = asked + self.ttl_s

    def renew(self) -> None:
        """Make the lease last ``ttl_s`` from now; without an answer from Redis, nothing changes."""
        asked = self._clock()
        if self.lost:
            return
        with suppress(redis.RedisError):
            if self._client.eval(_RENEW, 1, self.key, self.value, str(int(self.ttl_s * 1000))):
                self._expires = asked + self.ttl_s
            else:
                self._lost = f"the key is {holder(self._client, self.key) or 'gone'}"

    def release(self) -> None:
        """Give the lease back, if it is still this one; without an answer from Redis it expires by itself."""
        with suppress(redis.RedisError):
            if not self._client.eval(_RELEASE, 1, self.key, self.value) and self._lost is None:
                self._lost = f"the key is {holder(self._client, self.key) or 'gone'}"


@contextmanager
def keep_lease(client: redis.Redis, key: str, *, ttl_s: float = TTL_S) -> Iterator[Lease]:
    """Hold the lease on ``key`` while the block runs, renewed by a thread every third of ``ttl_s``.

    Raises LeaseHeldError, or redis.RedisError when Redis does not answer, before the block is entered.
    """
    lease = Lease(client, key, ttl_s=ttl_s)
    lease.acquire()
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(ttl_s / 3) and not lease.lost:
            lease.renew()

    thread = threading.Thread(target=renew, name=f"lease of {key}", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        ended.set()
        thread.join()
        lease.release()
