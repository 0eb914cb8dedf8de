"""The lease that keeps two workers from doing the same night's work, in Redis under the job's own name.

It saves work and nothing else: the SQL functions take an advisory lock of PostgreSQL, and that one keeps the
tables safe. A lease that is lost, or a Redis that does not answer, therefore stops no job. Its rules:

1. The key is the job's name. Its value says who holds it, for people (`GET create_future_partitions_job`).
2. It expires TTL_S seconds after it was last renewed. A thread renews it three times in that time for as long
   as the holder's process lives, so a worker that is killed leaves a lease that is gone soon.
3. It is renewed and released only while the key still holds this very value (redis-py's Lock). A lease that
   somebody else holds, or that a person has put there by hand, is never touched.
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

    Raises RefusedError when none is set or its URL cannot be read, which is never quoted.
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
    """Who holds the lease, for people: `host=web1 pid=4242 since=...`, without the token; None if nobody.

    Raises redis.RedisError.
    """
    value = client.get(key)
    if value is None:
        return None
    shown = str(value).partition(" token=")[0][:200]
    return shown if client.pttl(key) != -1 else f"{shown} and it never expires (DEL {key} frees it)"


@contextmanager
def keep_lease(client: redis.Redis, key: str, *, ttl_s: float = TTL_S) -> Iterator[None]:
    """Hold the lease on ``key`` while the block runs, renewed by a thread every third of ``ttl_s``.

    Raises LeaseHeldError, before the block is entered. Without an answer from Redis the block runs all the
    same.
    """
    lock = Lock(client, key, timeout=ttl_s, thread_local=False)
    value = f"{this_process()} since={datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} token={secrets.token_hex(8)}"
    try:
        if not lock.acquire(blocking=False, token=value):
            who = holder(client, key) or "a run that has just ended"
            raise LeaseHeldError(f"{key} is running already: {who}")
    except redis.RedisError as error:
        logger.warning("no lease on %s, it runs without: Redis does not answer: %s", key, error)
        yield
        return
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(ttl_s / 3):
            try:
                lock.reacquire()
            except LockError:
                return  # it is gone or another's, for good
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
