"""How fast the copy goes: the rate limit, shrinking batches, and replicas that fall behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

from chronos.demo.embedded import EmbeddedPostgres
from chronos.demo.rows import create_webhook_log
from chronos.migration.operator import StopRequestedError
from chronos.migration.throttle import Lag, Throttle
from tests.command import chronos, started
from tests.conftest import OwnPostgres
from tests.tables import query, value

ROWS = 3_000


class Time:
    """A clock that moves only during sleep."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def copy(
    throttle: Throttle,
    time: Time,
    *,
    batches: int,
    seconds: float = 0.0,
    rows: int | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> list[int]:
    """The sizes of this many batches, each of which takes ``seconds``."""
    sizes = []
    for _ in range(batches):
        size = throttle.begin(check_stop)
        time.now += seconds
        throttle.end(size, size if rows is None else rows, seconds)
        sizes.append(size)
    return sizes


def test_without_limits_the_copy_never_waits() -> None:
    time = Time()
    throttle = Throttle(1_000, clock=time.clock, sleep=time.sleep)

    assert copy(throttle, time, batches=50) == [1_000] * 50
    assert time.now == 1_000.0


@pytest.mark.parametrize(("batch_size", "rate"), [(1_000, 5_000), (1_000, 300), (7, 10), (1_000, 1)])
@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_the_rate_is_kept(batch_size: int, rate: int, seconds: float) -> None:
    time = Time()
    throttle = Throttle(batch_size, rate_limit=rate, clock=time.clock, sleep=time.sleep)

    began = time.now
    rows = sum(copy(throttle, time, batches=200, seconds=min(seconds, batch_size / rate / 2)))

    # The first batch need not wait, so there is one wait less.
    assert rows / rate * 0.98 <= time.now - began + min(batch_size, rate) / rate <= rows / rate * 1.02


def test_batches_above_or_below_the_allowed_size_count_with_their_rows() -> None:
    time = Time()
    throttle = Throttle(1_000, rate_limit=1_000, clock=time.clock, sleep=time.sleep)

    copy(throttle, time, batches=10, rows=100)
    assert time.now == pytest.approx(1_000.9)
    copy(throttle, time, batches=1, rows=5_000)
    copy(throttle, time, batches=1)
    assert time.now == pytest.approx(1_006.0)


def test_unused_time_is_not_caught_up() -> None:
    time = Time()
    throttle = Throttle(100, rate_limit=100, clock=time.clock, sleep=time.sleep)
    copy(throttle, time, batches=1)
    time.now += 3_600

    began = time.now
    copy(throttle, time, batches=11)
    assert time.now - began == pytest.approx(10.0)


def test_batches_shrink_while_the_database_is_slow_and_grow_again() -> None:
    time = Time()
    throttle = Throttle(1_000, clock=time.clock, sleep=time.sleep)

    assert copy(throttle, time, batches=7, seconds=1.5) == [1_000, 500, 250, 125, 62, 50, 50]
    assert copy(throttle, time, batches=2, seconds=0.5) == [50, 50]
    assert copy(throttle, time, batches=7, seconds=0.1) == [50, 100, 200, 400, 800, 1_000, 1_000]
    assert copy(Throttle(10), time, batches=3, seconds=2) == [10, 10, 10]


def test_the_copy_waits_for_a_lagging_replica() -> None:
    time = Time()
    lags = iter([Lag("a", 1), Lag("a", 9), Lag("b", 12), Lag("b", 5), None, None])
    pauses: list[str | None] = []
    throttle = Throttle(
        10, max_lag=5, lag=lambda: next(lags), on_pause=pauses.append, clock=time.clock, sleep=time.sleep
    )

    copy(throttle, time, batches=2)
    assert (time.now, pauses) == (1_000.0, [])
    time.now += 1
    copy(throttle, time, batches=1)
    assert pauses == ["replica a lags 9 s (at most 5 s)", "replica b lags 12 s (at most 5 s)", None]
    assert time.now == 1_003.0


@pytest.mark.parametrize("limits", [{"rate_limit": 1.0}, {"max_lag": 1.0, "lag": lambda: Lag("a", 60)}])
def test_a_pause_ends_when_asked_to_stop(limits: dict[str, object]) -> None:
    time = Time()
    throttle = Throttle(10, clock=time.clock, sleep=time.sleep, **limits)  # type: ignore[arg-type]

    def stop_later() -> None:
        if time.now >= 1_000.5:
            raise StopRequestedError

    with pytest.raises(StopRequestedError):
        copy(throttle, time, batches=2, check_stop=stop_later)
    assert time.now < 1_001


def test_the_command_keeps_its_rate_limit(database: str, tmp_path: Path) -> None:
    create_webhook_log(create_engine(database, poolclass=NullPool), ROWS)
    report = tmp_path / "report.json"

    result = chronos(database, "migrate", "--yes", "--rate-limit", "700", "--report", str(report))

    assert result.returncode == 0, result.stderr
    found = json.loads(report.read_text())
    assert found["steps"][2]["seconds"] > (found["happened"]["rows"] - 700) / 700


def test_a_cancelled_batch_is_retried_smaller() -> None:
    time = Time()
    throttle = Throttle(1_000, clock=time.clock, sleep=time.sleep)
    sizes = []
    for _ in range(7):
        sizes.append(throttle.begin(lambda: None))
        throttle.cut_short(sizes[-1], lambda: None)
    assert sizes == [1_000, 500, 250, 125, 62, 50, 50]
    assert time.now == 1_007.0
    throttle.end(50, 50, 0.001)
    assert throttle.begin(lambda: None) == 50

    small = Throttle(10, clock=time.clock, sleep=time.sleep)
    small.cut_short(10, lambda: None)
    assert small.begin(lambda: None) == 10


def test_a_pause_after_a_cancelled_batch_can_be_stopped() -> None:
    time = Time()
    throttle = Throttle(1_000, clock=time.clock, sleep=time.sleep)

    def stop() -> None:
        raise StopRequestedError

    with pytest.raises(StopRequestedError):
        throttle.cut_short(1_000, stop)
    assert time.now < 1_001.0


class Standby(EmbeddedPostgres):
    """A standby of another server."""

    def __init__(self, primary: EmbeddedPostgres) -> None:
        super().__init__()
        self._primary = make_url(primary.url)
        self._password = str(self._primary.password)

    def _prepare(self) -> None:
        super()._prepare()
        shutil.rmtree(self.data_dir)
        source = self._primary.set(drivername="postgresql").render_as_string(hide_password=False)
        self._run(
            *(self._bin / "pg_basebackup", "--pgdata", self.data_dir, "--write-recovery-conf"),
            *("--checkpoint", "fast", "--no-sync", "--dbname", source),
        )


def test_the_command_waits_for_a_standby(own_postgres: OwnPostgres) -> None:
    server = own_postgres()
    create_webhook_log(create_engine(server.url, poolclass=NullPool), ROWS)
    options = ("--rate-limit", "500", "--max-replica-lag", "2")

    with Standby(server) as standby:
        query(standby.url, "SELECT pg_wal_replay_pause()")
        with started(server.url, "migrate", "--yes", *options) as migration:
            assert migration.stdout is not None
            lines = iter(migration.stdout.readline, "")
            assert any(line.startswith("  paused: replica walreceiver lags") for line in lines)
            query(standby.url, "SELECT pg_wal_replay_resume()")
            assert any(line == "  continuing\n" for line in lines)
            rest, errors = migration.communicate(timeout=60)
        assert migration.returncode == 0, errors
        assert "  paused" not in rest


def test_max_replica_lag_is_refused_when_the_role_cannot_see_replicas(own_postgres: OwnPostgres) -> None:
    server = own_postgres()
    create_webhook_log(create_engine(server.url, poolclass=NullPool), 10)
    query(
        server.url,
        "CREATE ROLE plain LOGIN PASSWORD 'secret'; GRANT CREATE ON SCHEMA public TO plain;"
        " ALTER TABLE webhook_log OWNER TO plain; ALTER TABLE webhook_endpoint OWNER TO plain",
    )
    url = make_url(server.url).set(username="plain", password="secret").render_as_string(hide_password=False)

    with Standby(server):
        refused = chronos(url, "migrate", "--yes", "--max-replica-lag", "5")
        assert refused.returncode == 2
        assert "GRANT pg_read_all_stats" in refused.stderr
    assert not value(server.url, "SELECT to_regclass('webhook_log_migration') IS NOT NULL")
