"""The lease in Redis: one holder at a time, renewed while he lives, never another's."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator

import pytest
import redis
from pydantic import SecretStr

from chronos.demo.embedded import EmbeddedRedis
from chronos.errors import RefusedError
from chronos.job_lock import Lease, LeaseHeldError, connect, holder, keep_lease
from chronos.settings import Settings
from tests.waiting import wait_until

KEY = "create_future_partitions_job"


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def lost(lease: Lease) -> str | None:
    """Why the lease is lost, as it is now."""
    return lease.lost


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with connect(Settings(redis_url=SecretStr(redis_url))) as client:
        yield client
        client.delete(KEY)


def test_who_looks_sees_who_holds_it(client: redis.Redis) -> None:
    with keep_lease(client, KEY):
        value = str(client.get(KEY))
        assert re.fullmatch(
            rf"host={re.escape(socket.gethostname())} pid={os.getpid()}"
            r" since=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ token=[0-9a-f]{16}",
            value,
        )
        assert f"{holder(client, KEY)} token=" in value
        assert 0 < int(client.pttl(KEY)) <= 20_000
    assert client.get(KEY) is None
    assert holder(client, KEY) is None


def test_a_second_holder_is_told_of_the_first(client: redis.Redis) -> None:
    with (
        keep_lease(client, KEY),
        pytest.raises(LeaseHeldError, match=rf"running already: host=.* pid={os.getpid()} since=\S+$"),
        keep_lease(client, KEY),
    ):
        pass
    with keep_lease(client, KEY):
        pass


def test_it_is_renewed_while_the_block_runs(client: redis.Redis) -> None:
    with keep_lease(client, KEY, ttl_s=0.6) as lease:
        before = int(client.pttl(KEY))
        # Left alone, it can only fall.
        for _ in range(2):
            wait_until(lambda: int(client.pttl(KEY)) < before, 5, "time passes")
            wait_until(lambda: int(client.pttl(KEY)) > 400, 5, "it is renewed")
        assert lease.lost is None


def test_it_is_released_when_the_block_fails(client: redis.Redis) -> None:
    with pytest.raises(ZeroDivisionError), keep_lease(client, KEY):
        raise ZeroDivisionError
    assert client.get(KEY) is None


def test_a_foreign_lease_is_left_alone(client: redis.Redis) -> None:
    client.set(KEY, "put here by hand")
    with (
        pytest.raises(LeaseHeldError, match="put here by hand and it never expires"),
        keep_lease(client, KEY),
    ):
        pass
    assert client.get(KEY) == "put here by hand"
    assert client.pttl(KEY) == -1


@pytest.mark.parametrize("taken", [True, False])
def test_a_lease_that_was_taken_is_noticed_and_not_touched(client: redis.Redis, taken: bool) -> None:
    lease = Lease(client, KEY)
    lease.acquire()
    client.delete(KEY)
    if taken:
        client.set(KEY, "host=other pid=1 since=now token=0", px=5_000)
    lease.renew()
    assert lease.lost == ("the key is host=other pid=1 since=now" if taken else "the key is gone")
    lease.renew()
    lease.release()
    if taken:
        assert client.get(KEY) == "host=other pid=1 since=now token=0"
        assert int(client.pttl(KEY)) <= 5_000


def test_a_loss_that_only_the_release_meets_is_noticed(client: redis.Redis) -> None:
    with keep_lease(client, KEY) as lease:
        client.set(KEY, "another")
    assert lease.lost == "the key is another and it never expires (DEL create_future_partitions_job frees it)"
    assert client.get(KEY) == "another"


def test_the_thread_notices_a_loss(client: redis.Redis) -> None:
    with keep_lease(client, KEY, ttl_s=0.3) as lease:
        client.delete(KEY)
        wait_until(lambda: lease.lost, 5, "the loss is noticed")


def test_it_lasts_as_long_as_redis_has_confirmed() -> None:
    clock = Clock()
    with EmbeddedRedis() as server, connect(Settings(redis_url=SecretStr(server.url))) as client:
        lease = Lease(client, KEY, ttl_s=30, clock=clock)
        lease.acquire()
        clock.seconds = 20
        lease.renew()
        clock.seconds = 45
        assert lost(lease) is None
        server.stop()
        lease.renew()
        assert lost(lease) is None
        clock.seconds = 50
        assert lost(lease) == "Redis has not confirmed it for 30 s"
        server.start()
        clock.seconds = 51
        lease.renew()
        assert lost(lease)
        lease.release()
        with pytest.raises(LeaseHeldError), keep_lease(client, KEY):
            Lease(client, KEY).acquire()
        server.stop()
        with pytest.raises(redis.ConnectionError), keep_lease(client, KEY):
            pass


@pytest.mark.parametrize("url", ["localhost:6379", "redis://:hush/hush@localhost:6379/0", "http://:hush@h"])
def test_a_url_that_is_none_is_not_repeated(url: str) -> None:
    with pytest.raises(RefusedError, match="REDIS_URL cannot be read") as refused:
        connect(Settings(redis_url=SecretStr(url)))
    assert "hush" not in str(refused.value)
    assert refused.value.__suppress_context__
