"""The lease in Redis: one holder at a time, renewed while it lives, never taken from another."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterator

import pytest
import redis
from pydantic import SecretStr

from chronos.demo.embedded import EmbeddedRedis
from chronos.errors import RefusedError
from chronos.job_lock import LeaseHeldError, connect, holder, keep_lease
from chronos.settings import Settings
from tests.waiting import wait_until

KEY = "create_future_partitions_job"


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with connect(Settings(redis_url=SecretStr(redis_url))) as client:
        yield client
        client.delete(KEY)


def test_the_lease_shows_its_holder(client: redis.Redis) -> None:
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


def test_the_lease_is_renewed_while_the_block_runs(client: redis.Redis) -> None:
    with keep_lease(client, KEY, ttl_s=0.6):
        before = int(client.pttl(KEY))
        # Without renewal it can only fall.
        for _ in range(2):
            wait_until(lambda: int(client.pttl(KEY)) < before, 5, "time passes")
            wait_until(lambda: int(client.pttl(KEY)) > 400, 5, "it is renewed")


def test_the_lease_is_released_when_the_block_fails(client: redis.Redis) -> None:
    with pytest.raises(ZeroDivisionError), keep_lease(client, KEY):
        raise ZeroDivisionError
    assert client.get(KEY) is None


def test_a_lease_of_another_holder_is_left_alone(client: redis.Redis) -> None:
    client.set(KEY, "put here by hand")
    with (
        pytest.raises(LeaseHeldError, match="put here by hand and it never expires"),
        keep_lease(client, KEY),
    ):
        pass
    assert client.get(KEY) == "put here by hand"
    assert client.pttl(KEY) == -1


def test_a_lease_taken_by_another_holder_is_neither_renewed_nor_released(client: redis.Redis) -> None:
    with keep_lease(client, KEY, ttl_s=0.3):
        client.set(KEY, "host=other pid=1 since=now token=0", px=5_000)
        wait_until(lambda: not renewing(), 5, "its thread has given it up")
    assert client.get(KEY) == "host=other pid=1 since=now token=0"
    assert int(client.pttl(KEY)) <= 5_000


def test_a_deleted_lease_is_not_created_again(client: redis.Redis) -> None:
    with keep_lease(client, KEY, ttl_s=0.3):
        client.delete(KEY)
        wait_until(lambda: not renewing(), 5, "its thread has given it up")
    assert client.get(KEY) is None


def renewing() -> bool:
    return any(thread.name == f"lease of {KEY}" for thread in threading.enumerate())


def test_the_block_runs_without_a_lease_when_redis_does_not_answer(caplog: pytest.LogCaptureFixture) -> None:
    with EmbeddedRedis() as server, connect(Settings(redis_url=SecretStr(server.url))) as client:
        with keep_lease(client, KEY, ttl_s=0.3):
            server.stop()
        assert caplog.text == ""
        ran = False
        with keep_lease(client, KEY):
            ran = True
        assert ran
        assert f"no lease on {KEY}, running without it: Redis does not answer" in caplog.text


def test_without_a_url_the_error_says_what_to_do_instead() -> None:
    with pytest.raises(RefusedError, match=r"REDIS_URL is not set.*let cron run: python -m chronos upkeep"):
        connect(Settings(redis_url=SecretStr("")))


@pytest.mark.parametrize("url", ["localhost:6379", "redis://:hush/hush@localhost:6379/0", "http://:hush@h"])
def test_an_invalid_url_is_not_repeated_in_the_error(url: str) -> None:
    with pytest.raises(RefusedError, match="REDIS_URL cannot be read") as refused:
        connect(Settings(redis_url=SecretStr(url)))
    assert "hush" not in str(refused.value)
    assert refused.value.__suppress_context__
