"""The lease in Redis, under the job's name, that keeps two workers from doing the same night's work.

It only saves work: what keeps the tables safe is an advisory lock that the SQL functions take in PostgreSQL.
So a job goes on when its lease is lost or Redis does not answer. The rules of the lease:

1. The key is the job's name. Its value says who holds it, for people (`GET create_future_partitions_job`).
2. It expires TTL_S seconds after it was last renewed. A thread renews it three times in that time while the
   holder's process is alive, so a killed worker's lease soon expires.
3. It is renewed and released only while the key still has this exact value (redis-py's Lock). A lease that
   somebody else holds, or that was set by hand, is never touched.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

import redis
from redis.backoff import NoBackoff
from redis.exceptions import LockError
from redis.lock import Lock
from redis.retry import Retry

from chronos.errors import ChronosError, RefusedError
from chronos.settings import Settings
from chronos.telemetry import this_process

logger = logging.getLogger(__name__)

TTL_S = 20.0


class LeaseHeldError(ChronosError):
    """Somebody else holds the lease; the message says who."""


def connect(settings: Settings) -> redis.Redis:
    """A client of the Redis in ``settings`` that gives up after 3 s; nothing is sent yet.

    Raises RefusedError when its URL is not set or cannot be read; the URL is never quoted.
    """
    if not settings.redis_url:
        raise RefusedError(
            "REDIS_URL is not set, and Celery needs it, for example REDIS_URL=redis://127.0.0.1:6379/0."
            " Without Celery, let cron run: python -m chronos upkeep"
        )
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
    """Who holds the lease, for people: `host=web1 pid=4242 since=...`, without the token; None: nobody.

    Raises redis.RedisError.
    """
    value = client.get(key)
    if value is None:
        return None
    shown = str(value).partition(" token=")[0][:200]
    return shown if client.pttl(key) != -1 else f"{shown} and it never expires (DEL {key} frees it)"


@contextmanager
def keep_lease(client: redis.Redis, key: str, *, ttl_s: float = TTL_S) -> Iterator[None]:
    """Hold the lease on ``key`` while the block runs; a thread renews it every third of ``ttl_s`` seconds.

    Raises LeaseHeldError before the block is entered. If Redis does not answer, the block runs anyway.
    """
    lock = Lock(client, key, timeout=ttl_s, thread_local=False)
    value = f"{this_process()} since={datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} token={secrets.token_hex(8)}"
    try:
        if not lock.acquire(blocking=False, token=value):
            who = holder(client, key) or "a run that has just ended"
            raise LeaseHeldError(f"{key} is running already: {who}")
    except redis.RedisError as error:
        logger.warning("no lease on %s, running without it: Redis does not answer: %s", key, error)
        yield
        return
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(ttl_s / 3):
            try:
                lock.reacquire()
            except LockError:
                return  # gone or another's, for good
            except redis.RedisError:
                continue  # Redis may be back before it has expired

    thread = threading.Thread(target=renew, name=f"lease of {key}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(redis.RedisError):
            lock.release()
