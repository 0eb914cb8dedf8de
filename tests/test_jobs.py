"""What a nightly job does: its attempts, its reports, and what stops it. For Celery see test_worker.py."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
import redis
from psycopg2.extensions import cursor
from pydantic import SecretStr
from sqlalchemy.engine import make_url

from chronos import reports
from chronos.db import connect_engine, transaction
from chronos.demo.embedded import EmbeddedRedis
from chronos.jobs import (
    CREATE,
    DROP,
    JOBS,
    Job,
    JobFailedError,
    Message,
    Report,
    TryAgainError,
    attempt,
    last_due,
    next_due,
)
from chronos.reports import History
from chronos.settings import Settings
from chronos.table import WEBHOOK_LOG, Interval, TableSpec
from tests.conftest import OwnPostgres
from tests.partitioned import add_partitions, attached, create_tables, install_functions, leaves
from tests.tables import connected, exists, holding, query
from tests.waiting import wait_until

NIGHTLY = Message("a task", nightly=True)

# The real function behind a gate that the test opens.
GATE = """
ALTER FUNCTION {function}(int) RENAME TO behind_the_gate_{function};
CREATE TABLE IF NOT EXISTS gate (opened boolean);
CREATE FUNCTION {function}(n int) RETURNS SETOF text LANGUAGE plpgsql AS $$
BEGIN
    WHILE NOT EXISTS (SELECT FROM public.gate) LOOP
        PERFORM pg_sleep(0.02);
    END LOOP;
    RETURN QUERY SELECT * FROM public.behind_the_gate_{function}(n);
END $$
"""
ASLEEP = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"


@pytest.fixture
def settings(database: str, redis_url: str, client: redis.Redis) -> Settings:
    """Three days ahead, five days back, and a table with the days -2 to 0 and both functions."""
    migrate(database, -2, 0)
    return make_settings(database, redis_url)


def make_settings(database: str, redis_url: str, *, ahead: int = 3, retention: int = 5) -> Settings:
    return Settings(
        database_url=SecretStr(database),
        redis_url=SecretStr(redis_url),
        webhook_log_days_ahead=ahead,
        webhook_log_retention_days=retention,
    )


def migrate(url: str, first: int, last: int) -> None:
    with connected(url, autocommit=False) as conn:
        create_tables(conn.cursor())
        add_partitions(conn.cursor(), first, last)
        conn.commit()


def add_days(url: str, first: int, last: int) -> None:
    with connected(url, autocommit=False) as conn:
        add_partitions(conn.cursor(), first, last)
        conn.commit()


def names(url: str, first: int, last: int) -> list[str]:
    with connected(url) as conn:
        return leaves(conn.cursor(), first, last)


def partitions(url: str) -> list[str]:
    with connected(url) as conn:
        return attached(conn.cursor())


def url_of(settings: Settings) -> str:
    return settings.database.render_as_string(hide_password=False)


def history(url: str, job: Job, table: str = "webhook_log") -> History:
    """The reports in the database for a job and a table in the schema public."""
    with connect_engine(make_url(url)).connect() as conn, transaction(conn):
        return reports.read(conn, TableSpec(table, schema="public"), [job.name])[job.name]


def last(url: str, job: Job, table: str = "webhook_log") -> Report:
    """Its last report; empty if there is none."""
    return history(url, job, table).last


@contextmanager
def gated(settings: Settings, job: Job) -> Iterator[Future[Report]]:
    """Run the job, held in the middle of its call while the block runs; its report follows afterwards."""
    url = url_of(settings)
    query(url, GATE.format(function=job.function(WEBHOOK_LOG)))
    with ThreadPoolExecutor() as pool:
        running = pool.submit(attempt, job, settings, NIGHTLY, 1.0)
        try:
            wait_until(lambda: query(url, ASLEEP), 10, "it runs")
            yield running
        finally:
            query(url, "INSERT INTO gate VALUES (true)")


# What the jobs do


def test_the_days_ahead_are_created_and_reported(settings: Settings, client: redis.Redis) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    report = attempt(CREATE, settings, NIGHTLY, 1.0)
    made = names(url_of(settings), 1, 3)
    assert report["status"] == "done"
    assert report["created"] == made
    assert partitions(url_of(settings))[-3:] == made
    assert report["tables"] == {"webhook_log": last(url_of(settings), CREATE)}
    kept = report["tables"]["webhook_log"]
    assert (kept["status"], kept["created"], kept["contended"], kept["error"]) == ("done", made, [], None)
    assert re.fullmatch(rf"celery host=\S+ pid={os.getpid()}", kept["writer"])
    assert 0 <= kept["seconds"] < 60
    assert before <= datetime.fromisoformat(kept["started"]) <= datetime.now(UTC)
    assert (history(url_of(settings), CREATE).succeeded or before) > before
    assert client.get(CREATE.name) is None


def test_the_expired_day_is_dropped(settings: Settings, client: redis.Redis) -> None:
    add_days(url_of(settings), -7, -3)
    report = attempt(DROP, settings, NIGHTLY, 1.0)
    assert (report["status"], report["dropped"]) == ("done", names(url_of(settings), -7, -6))
    assert last(url_of(settings), DROP)["dropped"] == report["dropped"]
    assert attempt(DROP, settings, Message("by hand"), 1.0)["dropped"] == []


def test_during_a_rollback_nothing_is_dropped_and_the_job_is_done(settings: Settings) -> None:
    url = url_of(settings)
    add_days(url, -7, -3)
    query(url, "CREATE TABLE webhook_log_migration AS SELECT 'returning' AS phase, true AS verified")
    report = attempt(DROP, settings, NIGHTLY, 1.0)
    assert (report["status"], report["dropped"]) == ("done", [])
    assert partitions(url) == names(url, -7, 0)


def test_both_jobs_catch_up_in_small_transactions(settings: Settings) -> None:
    url = url_of(settings)
    many = make_settings(url, settings.redis_url.get_secret_value(), ahead=20, retention=2)
    transactions = (
        "SELECT count(*) FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
        " WHERE inhparent = 'webhook_log'::regclass GROUP BY c.xmin::text ORDER BY 1"
    )
    query(url, f"DROP TABLE {', '.join(partitions(url))}")
    assert len(attempt(CREATE, many, NIGHTLY, 1.0)["created"]) == 21
    assert query(url, transactions) == [(6,), (7,), (8,)]

    add_days(url, -72, -3)
    dropped = attempt(DROP, many, NIGHTLY, 1.0)["dropped"]
    assert dropped == names(url, -72, -3)
    assert len(partitions(url)) == 21


# Once a night


def test_a_job_runs_once_a_night_however_many_messages_arrive(
    settings: Settings, client: redis.Redis
) -> None:
    attempt(CREATE, settings, NIGHTLY, 1.0)
    before = last(url_of(settings), CREATE)
    again = attempt(CREATE, settings, Message("the other beat's", nightly=True), 1.0)
    assert again["status"] == "skipped"
    assert "already done for the night of" in again["reason"]
    assert last(url_of(settings), CREATE) == before
    by_hand = attempt(CREATE, settings, Message("by hand"), 1.0)
    assert (by_hand["status"], by_hand["created"]) == ("done", [])


def test_a_run_of_the_night_before_does_not_count(settings: Settings, client: redis.Redis) -> None:
    attempt(CREATE, settings, NIGHTLY, 1.0)
    query(url_of(settings), "UPDATE chronos_reports SET night = night - 1")
    assert attempt(CREATE, settings, Message("tonight", nightly=True), 1.0)["status"] == "done"


def test_a_message_leaves_the_job_to_another_that_is_retrying(
    settings: Settings, client: redis.Redis
) -> None:
    url = url_of(settings)
    with holding(url, "LOCK TABLE webhook_log IN SHARE UPDATE EXCLUSIVE MODE"):
        with pytest.raises(TryAgainError) as stopped:
            attempt(CREATE, settings, NIGHTLY, 60.0)
        other = attempt(CREATE, settings, Message("the other beat's", nightly=True), 60.0)
    assert other["status"] == "skipped"
    assert "another message is working on the night" in other["reason"]
    same = Message(NIGHTLY.task_id, nightly=True, attempt=2, earlier=stopped.value.report)
    assert attempt(CREATE, settings, same, 60.0)["status"] == "done"


def test_a_message_that_died_does_not_block_the_night(settings: Settings, client: redis.Redis) -> None:
    """The message that should have retried never did: its worker is gone."""
    with (
        holding(url_of(settings), "LOCK TABLE webhook_log IN SHARE UPDATE EXCLUSIVE MODE"),
        pytest.raises(TryAgainError),
    ):
        attempt(CREATE, settings, NIGHTLY, -3600.0)
    assert attempt(CREATE, settings, Message("another", nightly=True), 1.0)["status"] == "done"


def test_a_lease_of_another_holder_is_left_alone(settings: Settings, client: redis.Redis) -> None:
    client.set(DROP.name, "host=elsewhere pid=1 since=2026-01-01T00:00:00Z token=0", px=60_000)
    report = attempt(DROP, settings, NIGHTLY, 1.0)
    assert report == {
        "status": "skipped",
        "reason": f"{DROP.name} is running already: host=elsewhere pid=1 since=2026-01-01T00:00:00Z",
    }
    assert "elsewhere" in str(client.get(DROP.name))
    assert last(url_of(settings), DROP) == {}


def test_of_two_concurrent_attempts_one_runs(settings: Settings, client: redis.Redis) -> None:
    with gated(settings, CREATE) as running:
        other = attempt(CREATE, settings, Message("the other", nightly=True), 1.0)
        assert other["status"] == "skipped"
        assert "running already: host=" in other["reason"]
    assert running.result()["status"] == "done"


# Not migrated


def test_without_the_functions_the_job_is_skipped(
    database: str, redis_url: str, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    settings = make_settings(database, redis_url)
    plain = "CREATE TABLE webhook_log (timestamp timestamptz)"
    states: list[tuple[Callable[[cursor], object], str]] = [
        (lambda cur: None, "there is no table webhook_log"),
        (lambda cur: cur.execute(plain), "is not installed; migrate first"),
        (install_functions, "not a partitioned table; migrate it first"),
    ]
    for change, reason in states:
        with connected(database, autocommit=False) as conn:
            change(conn.cursor())
            conn.commit()
        for job in JOBS:
            caplog.clear()
            report = attempt(job, settings, NIGHTLY, 1.0)
            assert report["status"] == "skipped"
            assert reason in report["reason"]
            [record] = [r for r in caplog.records if r.levelno >= logging.WARNING]
            assert record.levelno == logging.WARNING
            assert record.exc_info is None
            assert not exists(database, "chronos_reports")  # nothing is created beside a plain table


# Several tables


class TwoTables(Settings):
    """First an hourly table called events, with two days ahead and one day back."""

    @property
    def tables(self) -> tuple[TableSpec, ...]:
        events = TableSpec("events", column="at", every=Interval.HOUR, retention_days=1, ahead_days=2)
        return (events, *super().tables)


@pytest.fixture
def two_tables(settings: Settings) -> TwoTables:
    return TwoTables(**settings.model_dump())


def create_events(url: str) -> None:
    with connected(url, autocommit=False) as conn:
        conn.cursor().execute("CREATE TABLE events (at timestamp) PARTITION BY RANGE (at)")
        install_functions(conn.cursor(), TableSpec("events", column="at", every=Interval.HOUR))
        conn.commit()


def test_each_table_has_its_turn(two_tables: TwoTables) -> None:
    url = url_of(two_tables)
    create_events(url)
    [events, _] = two_tables.tables
    wanted = events.wanted(datetime.now(UTC), back=False)
    report = attempt(CREATE, two_tables, NIGHTLY, 1.0)
    assert report["status"] == "done"
    assert set(report["created"]) >= {events.partition(period) for period in wanted[2:]}
    assert report["created"][-3:] == names(url, 1, 3)
    old = events.period(datetime.now(UTC) - timedelta(days=3))
    query(
        url,
        f"CREATE TABLE {events.partition(old)} PARTITION OF events"
        f" FOR VALUES FROM ('{old.start:%Y-%m-%d %H:%M}') TO ('{old.end:%Y-%m-%d %H:%M}')",
    )
    assert attempt(DROP, two_tables, NIGHTLY, 1.0)["dropped"] == [events.partition(old)]


def test_a_table_that_is_not_migrated_does_not_block_the_others(two_tables: TwoTables) -> None:
    report = attempt(CREATE, two_tables, NIGHTLY, 1.0)
    assert (report["status"], report["created"]) == ("done", names(url_of(two_tables), 1, 3))
    assert "there is no table events" in report["reason"]


def test_a_failing_table_does_not_block_the_others(two_tables: TwoTables, client: redis.Redis) -> None:
    url = url_of(two_tables)
    create_events(url)
    [events, _] = two_tables.tables
    taken = events.partition(events.period(datetime.now(UTC) + timedelta(days=1)))
    query(url, f"CREATE VIEW {taken} AS SELECT 1")
    with pytest.raises(JobFailedError, match=f"the name {taken} is taken"):
        attempt(CREATE, two_tables, NIGHTLY, 1.0)
    assert last(url, CREATE, "events")["status"] == "failed"
    assert last(url, CREATE)["created"] == names(url, 1, 3)


def test_a_table_in_use_does_not_block_the_others(two_tables: TwoTables) -> None:
    url = url_of(two_tables)
    create_events(url)
    with (
        holding(url, "LOCK TABLE events IN SHARE UPDATE EXCLUSIVE MODE"),
        pytest.raises(TryAgainError, match="events is in use by pid") as stopped,
    ):
        attempt(CREATE, two_tables, NIGHTLY, 1.0)
    assert stopped.value.report["created"] == names(url, 1, 3)
    assert all(name.startswith("events_y") for name in stopped.value.report["contended"])


# Lock conflicts


def test_a_reader_is_waited_for_and_named(
    settings: Settings, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    url = url_of(settings)
    add_days(url, -8, -3)
    [used] = names(url, -7, -7)
    earlier: Report = {}
    with holding(url, f"SELECT pg_backend_pid() FROM {used} UNION SELECT pg_backend_pid()") as reader:
        pid = reader.info.backend_pid
        for number in (1, 2):
            message = Message("a task", True, number, earlier)
            with pytest.raises(TryAgainError, match=f"webhook_log is in use by pid {pid}") as stopped:
                attempt(DROP, settings, message, 1.0)
            earlier = stopped.value.report
            assert earlier["status"] == last(url_of(settings), DROP)["status"] == "retrying"
            assert earlier["contended"] == [used]
            assert earlier["dropped"] == names(url, -8, -8) + names(url, -6, -6)
            assert earlier["attempts"] == number
        given_up = attempt(DROP, settings, Message("a task", True, 3, earlier), None)
        assert given_up["status"] == last(url_of(settings), DROP)["status"] == "incomplete"
        assert given_up["contended"] == [used]
        assert len(given_up["dropped"]) == 2
        assert f"pid {pid}" in given_up["error"]
        assert caplog.records[-1].levelno == logging.ERROR
        assert used in caplog.text
        assert history(url, DROP).succeeded is None
        assert history(url, DROP).contended_nights == 1
    report = attempt(DROP, settings, Message("a task", True, 4, earlier), None)
    assert report["status"] == "done"
    assert report["dropped"] == [*names(url, -8, -8), *names(url, -6, -6), used]
    assert report["started"] == earlier["started"]


def test_what_could_not_be_created_is_named(settings: Settings) -> None:
    with holding(url_of(settings), "LOCK TABLE webhook_log IN SHARE UPDATE EXCLUSIVE MODE"):
        report = attempt(CREATE, settings, NIGHTLY, None)
    assert report["status"] == "incomplete"
    assert report["contended"] == names(url_of(settings), 1, 3)


def test_the_job_gives_way_to_a_call_by_hand(settings: Settings) -> None:
    with (
        holding(url_of(settings), "SELECT create_future_webhook_log_partitions(1)"),
        pytest.raises(TryAgainError, match="another session is creating or dropping"),
    ):
        attempt(DROP, settings, NIGHTLY, 1.0)


# Failures


def test_an_unreachable_server_is_retried_and_then_the_job_fails(
    redis_url: str, client: redis.Redis, own_postgres: OwnPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    server = own_postgres()
    migrate(server.url, 0, 0)
    settings = make_settings(server.url, redis_url)
    server.stop()
    with pytest.raises(TryAgainError, match=r"^PostgreSQL does not answer: .*refused") as stopped:
        attempt(CREATE, settings, NIGHTLY, 1.0)
    second = Message("a task", True, 2, stopped.value.report)
    with pytest.raises(JobFailedError) as failed:
        attempt(CREATE, settings, second, None)
    assert str(failed.value).startswith(f"{CREATE.name} failed: PostgreSQL does not answer: connection to")
    assert str(failed.value).endswith("(2 attempts)")
    assert "\n" not in str(failed.value)
    assert failed.value.__cause__ is None
    assert "Traceback" not in caplog.text
    password = make_url(server.url).password
    assert password
    assert password not in caplog.text + json.dumps(failed.value.report) + str(failed.value)

    server.start()
    assert attempt(CREATE, settings, Message("another", nightly=True), 1.0)["status"] == "done"


def test_a_server_that_stops_during_the_call_is_retried(redis_url: str, own_postgres: OwnPostgres) -> None:
    server = own_postgres()
    migrate(server.url, 0, 0)
    settings = make_settings(server.url, redis_url)
    query(server.url, GATE.format(function=CREATE.function(WEBHOOK_LOG)))

    def stop_in_the_middle() -> None:
        wait_until(lambda: query(server.url, ASLEEP), 10, "it runs")
        server.stop("immediate")

    stopping = threading.Thread(target=stop_in_the_middle)
    stopping.start()
    with pytest.raises(TryAgainError, match="PostgreSQL does not answer"):
        attempt(CREATE, settings, NIGHTLY, 1.0)
    stopping.join()


def test_an_error_that_waiting_cannot_fix_fails_at_once(settings: Settings, client: redis.Redis) -> None:
    url = url_of(settings)
    query(url, f"CREATE VIEW {names(url, 2, 2)[0]} AS SELECT 1")
    with pytest.raises(JobFailedError, match=r"the name webhook_log_y\w+ is taken"):
        attempt(CREATE, settings, NIGHTLY, 1.0)
    report = last(url_of(settings), CREATE)
    assert report["status"] == "failed"
    assert "is taken" in report["error"]


def test_a_success_is_remembered_through_failures(settings: Settings, client: redis.Redis) -> None:
    attempt(CREATE, settings, NIGHTLY, 1.0)
    succeeded = history(url_of(settings), CREATE).succeeded
    assert succeeded
    query(url_of(settings), "DROP FUNCTION create_future_webhook_log_partitions(int)")
    attempt(CREATE, settings, Message("by hand"), 1.0)
    assert last(url_of(settings), CREATE)["status"] == "skipped"
    assert history(url_of(settings), CREATE).succeeded == succeeded


def test_without_a_database_url_the_job_fails(redis_url: str, client: redis.Redis) -> None:
    with pytest.raises(JobFailedError, match="DATABASE_URL is not set"):
        attempt(CREATE, Settings(database_url=None, redis_url=SecretStr(redis_url)), NIGHTLY, 1.0)


# The lease


def test_a_lease_lost_during_the_call_stops_nothing_and_is_not_touched(
    settings: Settings, client: redis.Redis
) -> None:
    more = make_settings(url_of(settings), settings.redis_url.get_secret_value(), ahead=20)
    with gated(more, CREATE) as running:
        client.set(CREATE.name, "somebody else")
    assert running.result()["created"] == names(url_of(settings), 1, 20)
    assert client.get(CREATE.name) == "somebody else"


def test_the_job_runs_when_redis_does_not_answer(database: str, caplog: pytest.LogCaptureFixture) -> None:
    """A PostgreSQL lock guards the table, and the database remembers the night."""
    migrate(database, 0, 0)
    with EmbeddedRedis() as server:
        settings = make_settings(database, server.url)
        with gated(settings, CREATE) as running:
            server.stop(kill=True)
        assert running.result()["created"] == names(database, 1, 3)
        other = attempt(CREATE, settings, Message("the other beat's", nightly=True), 1.0)
        assert "already done for the night of" in other["reason"]
        assert attempt(DROP, settings, NIGHTLY, 1.0)["status"] == "done"
    assert "running without it: Redis does not answer" in caplog.text
    password = make_url(server.url).password
    assert password
    assert password not in caplog.text


# The clock


@pytest.mark.parametrize(
    ("zone", "job", "now", "last", "following"),
    [
        ("UTC", CREATE, "2026-11-22T00:59:59", "2026-11-21T01:00", "2026-11-22T01:00"),
        ("UTC", CREATE, "2026-11-22T01:00:00", "2026-11-22T01:00", "2026-11-23T01:00"),
        ("Asia/Kolkata", DROP, "2026-11-22T00:00:00", "2026-11-21T20:30", "2026-11-22T20:30"),
        # The clocks go forward from 02:00 to 03:00, and back from 03:00 to 02:00.
        ("Europe/Madrid", DROP, "2026-03-29T00:59:59", "2026-03-28T01:00", "2026-03-29T01:00"),
        ("Europe/Madrid", DROP, "2026-03-29T01:00:00", "2026-03-29T01:00", "2026-03-30T00:00"),
        ("Europe/Madrid", DROP, "2026-10-25T00:30:00", "2026-10-25T00:00", "2026-10-26T01:00"),
        ("Europe/Madrid", DROP, "2026-10-25T01:30:00", "2026-10-25T00:00", "2026-10-26T01:00"),
    ],
)
def test_last_and_next_due_times_follow_the_time_zone(
    zone: str, job: Job, now: str, last: str, following: str
) -> None:
    settings = Settings(beat_timezone=zone)
    at = datetime.fromisoformat(f"{now}+00:00")
    assert last_due(job, settings, at) == datetime.fromisoformat(f"{last}+00:00")
    assert next_due(job, settings, at) == datetime.fromisoformat(f"{following}+00:00")
