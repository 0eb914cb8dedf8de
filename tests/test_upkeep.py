"""`upkeep`: nights without Celery or Redis, its exit codes, and the alerts that follow a run."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from shlex import quote
from typing import Any

import psutil
import pytest
from pydantic import SecretStr
from sqlalchemy.engine import make_url

from chronos import alerts
from chronos.alerts import kind_of, tell
from chronos.jobs import CREATE, DROP, Message, attempt
from chronos.settings import Settings
from chronos.table import Interval, TableSpec
from tests.command import Run, chronos, started
from tests.partitioned import install_functions
from tests.tables import connected, exists, holding, query, value
from tests.test_jobs import add_days, history, last, migrate, names, partitions
from tests.waiting import wait_until

# No Redis is set: cron runs it.
CRON = {"REDIS_URL": "", "WEBHOOK_LOG_DAYS_AHEAD": "3", "WEBHOOK_LOG_RETENTION_DAYS": "5"}
FIVE = [
    TableSpec(f"table_{n}", column="at", every=Interval.DAY, retention_days=5, ahead_days=2, schema="public")
    for n in range(5)
]


@pytest.fixture
def url(database: str) -> str:
    """A table with the days -7 to 0, two of which have expired."""
    migrate(database, -7, 0)
    return database


def create_five(url: str, configuration: Path) -> dict[str, str]:
    """Five tables, each with no partition ahead and one expired; returns the environment that lists them."""
    with connected(url, autocommit=False) as conn:
        cur = conn.cursor()
        for table in FIVE:
            cur.execute(f"CREATE TABLE {table} (at timestamptz) PARTITION BY RANGE (at)")
            install_functions(cur, table)
            for period in (period_of(table, 0), period_of(table, -9)):
                cur.execute(
                    f"CREATE TABLE {table.partition(period)} PARTITION OF {table}"
                    f" FOR VALUES FROM ('{period.start}') TO ('{period.end}')"
                )
        conn.commit()
    configuration.write_text("\n".join(table.as_toml() for table in FIVE))
    return {"CHRONOS_CONFIG": str(configuration), "REDIS_URL": ""}


def period_of(table: TableSpec, day: int) -> Any:
    return table.period(datetime.now(UTC) + timedelta(days=day))


def old(table: TableSpec) -> str:
    return table.partition(period_of(table, -9))


# The nights


def test_upkeep_creates_and_drops_and_status_is_healthy_without_redis(url: str) -> None:
    done = chronos(url, "upkeep", env=CRON)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"{CREATE.name} created {', '.join(names(url, 1, 3))}",
        f"{DROP.name} dropped {', '.join(names(url, -7, -6))}",
    ]
    assert partitions(url) == names(url, -5, 3)
    shown = chronos(url, "status", "--json", env=CRON)
    assert shown.returncode == 0, shown.stdout
    report = json.loads(shown.stdout)["jobs"][DROP.name]["report"]
    assert report["dropped"] == names(url, -7, -6)
    assert report["writer"].startswith("upkeep host=")
    again = chronos(url, "upkeep", env=CRON)
    assert (again.returncode, again.stdout) == (
        0,
        f"{CREATE.name} created nothing\n{DROP.name} dropped nothing\n",
    )


def test_celery_does_not_repeat_a_night_that_upkeep_has_done(
    url: str, redis_url: str, client: object
) -> None:
    assert chronos(url, "upkeep", env=CRON).returncode == 0
    settings = Settings(database_url=SecretStr(url), redis_url=SecretStr(redis_url))
    found = attempt(CREATE, settings, Message("tonight", nightly=True), None)
    assert found["status"] == "skipped"
    assert "already done for the night of" in found["reason"]
    assert last(url, CREATE)["writer"].startswith("upkeep")


def test_of_five_tables_three_are_done_and_the_busy_and_the_broken_one_are_reported(
    database: str, tmp_path: Path
) -> None:
    env = create_five(database, tmp_path / "chronos.toml")
    query(database, f"CREATE VIEW needs AS SELECT * FROM {old(FIVE[3])}")
    with holding(database, f"SELECT FROM {FIVE[1]}") as reader:
        done = chronos(database, "upkeep", "--retry-for", "0", env=env)
        pid = reader.info.backend_pid
    assert done.returncode == 1
    assert f"public.table_1: cannot drop expired partitions, they are in use: {old(FIVE[1])}" in done.stderr
    assert f"is in use by pid {pid}" in done.stderr
    assert "public.table_3: cannot drop expired partitions: view public.needs depends on" in done.stderr
    results = {table.name: last(database, DROP, table.name)["status"] for table in FIVE}
    assert results == {f"table_{n}": "done" for n in (0, 2, 4)} | {
        "table_1": "incomplete",
        "table_3": "failed",
    }
    assert all(last(database, CREATE, table.name)["status"] == "done" for table in FIVE)
    query(database, "DROP VIEW needs")
    assert chronos(database, "upkeep", env=env).returncode == 0
    assert not any(exists(database, old(table)) for table in FIVE)


def test_a_partition_in_use_is_left_to_the_next_run_with_exit_code_3(url: str) -> None:
    [used] = names(url, -7, -7)
    for night in range(3):
        with holding(url, f"SELECT FROM {used}"):
            done = chronos(url, "upkeep", "--retry-for", "0", env=CRON)
        assert done.returncode == 3
        assert f"{DROP.name} gave up, undone: {used}" in done.stderr
        query(url, "UPDATE chronos_reports SET night = night - 1")
        assert history(url, DROP).contended_nights == night + 1
    assert chronos(url, "upkeep", env=CRON).returncode == 0
    assert history(url, DROP).contended_nights == 0
    assert partitions(url) == names(url, -5, 3)


def test_a_reader_that_ends_in_time_is_waited_for(url: str) -> None:
    with holding(url, "SELECT FROM webhook_log"):
        run = Run(url, "upkeep", "--retry-for", "60", env=CRON)
        wait_until(
            lambda: exists(url, "chronos_reports") and last(url, DROP).get("status") == "retrying",
            30,
            "it has met the reader",
        )
    done = run.finish()
    assert done.returncode == 0, done.stderr
    assert f"{DROP.name} tries again in 2 s: cannot drop expired partitions" in done.stderr
    assert last(url, DROP)["attempts"] == 2


def test_a_run_stopped_while_it_waits_says_so_and_exits_with_3(url: str) -> None:
    with holding(url, "SELECT FROM webhook_log"), started(url, "upkeep", env=CRON) as process:
        wait_until(
            lambda: exists(url, "chronos_reports") and last(url, DROP).get("status") == "retrying",
            30,
            "it waits",
        )
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 3, errors
    assert f"Error: stopped while {DROP.name} waited" in errors
    assert partitions(url) == names(url, -7, 3)


def test_two_concurrent_runs_share_the_work_and_both_succeed(url: str) -> None:
    query(url, f"DROP TABLE {', '.join(names(url, -5, 0))}")
    add_days(url, -60, -8)
    runs = [Run(url, "upkeep", "--retry-for", "60", env=CRON) for _ in range(2)]
    for done in [run.finish() for run in runs]:
        assert done.returncode == 0, done.stderr
    assert partitions(url) == names(url, 0, 3)
    created = query(
        url,
        "SELECT jsonb_array_elements_text(report -> 'created') FROM chronos_reports WHERE job = %s",
        CREATE.name,
    )
    dropped = query(
        url,
        "SELECT jsonb_array_elements_text(report -> 'dropped') FROM chronos_reports WHERE job = %s",
        DROP.name,
    )
    assert sorted(row[0] for row in created) == names(url, 0, 3)
    assert sorted(row[0] for row in dropped) == names(url, -60, -6)


def test_a_contradicted_configuration_is_refused_with_exit_code_2(url: str, tmp_path: Path) -> None:
    wrong = tmp_path / "chronos.toml"
    wrong.write_text('[[tables]]\nname = "webhook_log"\ncolumn = "id"\n')
    done = chronos(url, "upkeep", env={**CRON, "CHRONOS_CONFIG": str(wrong)})
    assert done.returncode == 2
    assert "it is partitioned by" in done.stderr
    assert partitions(url) == names(url, -7, 0)


def test_an_unreachable_server_fails_without_showing_its_password() -> None:
    done = chronos("postgresql://somebody:hush@127.0.0.1:1/none", "upkeep", "--retry-for", "0", env=CRON)
    assert done.returncode == 1
    assert f"{CREATE.name} failed: PostgreSQL does not answer" in done.stderr
    assert "hush" not in done.stderr + done.stdout


def test_a_role_that_cannot_store_the_report_still_does_the_work(url: str) -> None:
    """Another role has created a table there that the owner of ours need not trust."""
    role = f"stranger_{os.getpid()}_{time.monotonic_ns()}"
    query(
        url,
        f"CREATE ROLE {role}; CREATE TABLE chronos_reports (); ALTER TABLE chronos_reports OWNER TO {role}",
    )
    try:
        done = chronos(url, "upkeep", env=CRON)
    finally:
        query(url, f"DROP TABLE chronos_reports; DROP ROLE {role}")
    assert done.returncode == 0
    assert f"was not stored: public.chronos_reports belongs to {role}" in done.stderr
    assert partitions(url) == names(url, -5, 3)


def test_an_ordinary_owner_stores_reports_that_another_role_reads_once_granted(url: str) -> None:
    number = f"{os.getpid()}_{time.monotonic_ns()}"
    owner, monitor = f"owner_{number}", f"monitor_{number}"
    query(
        url,
        f"CREATE ROLE {owner} LOGIN PASSWORD 'x'; CREATE ROLE {monitor} LOGIN PASSWORD 'x';"
        f"GRANT CREATE ON SCHEMA public TO {owner};"
        f"ALTER TABLE webhook_log OWNER TO {owner}; ALTER TABLE webhook_endpoint OWNER TO {owner};"
        f"ALTER FUNCTION create_future_webhook_log_partitions OWNER TO {owner};"
        f"ALTER FUNCTION drop_old_webhook_log_partitions OWNER TO {owner};"
        f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {monitor}",
    )
    for leaf in partitions(url):
        query(url, f"ALTER TABLE {leaf} OWNER TO {owner}")
    as_owner, as_monitor = (
        make_url(url).set(username=role, password="x").render_as_string(hide_password=False)
        for role in (owner, monitor)
    )
    try:
        done = chronos(as_owner, "upkeep", env=CRON)
        assert (done.returncode, done.stderr) == (0, "")
        by = "SELECT pg_get_userbyid(relowner) FROM pg_class WHERE relname = 'chronos_reports'"
        assert value(url, by) == owner
        unread = json.loads(chronos(as_monitor, "status", "--json", env=CRON).stdout)
        [problem] = (p for p in unread["problems"] if "chronos_reports" in p)
        assert f"{monitor} may not read public.chronos_reports; as {owner}, run: GRANT SELECT" in problem
        assert unread["jobs"] is None
        query(as_owner, problem.partition("run: ")[2])
        read = json.loads(chronos(as_monitor, "status", "--json", env=CRON).stdout)
        assert read["jobs"][CREATE.name]["result"] == "done"
    finally:
        query(url, f"DROP OWNED BY {owner}, {monitor} CASCADE; DROP ROLE {owner}, {monitor}")


def test_the_reports_are_dropped_with_the_last_partitioned_table(url: str) -> None:
    """After a rollback, what the migration created is gone, and so is what the nightly jobs left."""
    query(
        url,
        "DROP TABLE webhook_log, webhook_endpoint;"
        "DROP FUNCTION create_future_webhook_log_partitions, drop_old_webhook_log_partitions",
    )
    query(
        url,
        "CREATE TABLE webhook_log (id bigserial PRIMARY KEY, timestamp timestamptz NOT NULL);"
        "CREATE INDEX ON webhook_log (timestamp)",
    )
    for verb in ("migrate", "rollback"):
        assert chronos(url, verb, "--yes", env=CRON).returncode == 0
        if verb == "migrate":
            assert chronos(url, "upkeep", env=CRON).returncode == 0
            assert exists(url, "chronos_reports")
    assert not exists(url, "chronos_reports")


# Alerts

Told = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    """A folder that gets a file for each alert."""
    (tmp_path / "inbox").mkdir()
    return tmp_path / "inbox"


def into(inbox: Path) -> str:
    return f"cat > {quote(str(inbox))}/$(ls {quote(str(inbox))} | wc -l)"


def told(inbox: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(inbox.iterdir())]


def test_a_problem_is_alerted_once_when_it_appears_and_once_when_it_is_gone(url: str, inbox: Path) -> None:
    env = {**CRON, "CHRONOS_ALERT_COMMAND": into(inbox)}
    assert chronos(url, "upkeep", env=env).returncode == 0
    assert told(inbox) == []
    [taken] = names(url, 4, 4)
    query(url, f"CREATE VIEW {taken} AS SELECT 1")
    more = {**env, "WEBHOOK_LOG_DAYS_AHEAD": "4"}
    assert chronos(url, "upkeep", env=more).returncode == 1
    assert chronos(url, "upkeep", env=more).returncode == 1
    [first] = told(inbox)
    assert not first["healthy"]
    assert first["gone"] == []
    assert first["appeared"] == first["problems"]
    [problem] = first["problems"]
    assert problem["table"] == "public.webhook_log"
    assert f"the name {taken} is taken" in problem["problem"]
    query(url, f"DROP VIEW {taken}")
    for _ in range(2):
        assert chronos(url, "upkeep", env=more).returncode == 0
    _, second = told(inbox)
    assert (second["healthy"], second["appeared"], second["problems"]) == (True, [], [])
    assert second["gone"] == first["appeared"]


def test_an_unreachable_database_is_alerted(inbox: Path) -> None:
    env = {**CRON, "CHRONOS_ALERT_COMMAND": into(inbox)}
    chronos("postgresql://somebody:hush@127.0.0.1:1/none", "upkeep", "--retry-for", "0", env=env)
    [alert] = told(inbox)
    assert "PostgreSQL does not answer" in alert["problems"][0]["problem"]
    assert "hush" not in json.dumps(alert)


def settings_that_alert(url: str, command: str) -> Settings:
    return Settings(
        database_url=SecretStr(url), redis_url=SecretStr(""), chronos_alert_command=SecretStr(command)
    )


def test_a_failing_alert_command_harms_nothing_and_is_run_again(url: str, inbox: Path) -> None:
    failing = {**CRON, "CHRONOS_ALERT_COMMAND": "echo hush >&2; exit 7", "WEBHOOK_LOG_DAYS_AHEAD": "4"}
    query(url, f"CREATE VIEW {names(url, 4, 4)[0]} AS SELECT 1")
    done = chronos(url, "upkeep", env=failing)
    assert done.returncode == 1
    assert "CHRONOS_ALERT_COMMAND ended with exit code 7; the alert is sent again" in done.stderr
    assert "hush" not in done.stderr + done.stdout
    assert last(url, DROP)["status"] == "done"
    chronos(url, "upkeep", env={**failing, "CHRONOS_ALERT_COMMAND": into(inbox)})
    assert len(told(inbox)) == 1


def test_a_hanging_alert_command_is_killed_with_its_children(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(alerts, "TIMEOUT_S", 1.0)
    pid = tmp_path / "pid"
    tell(settings_that_alert(url, f"sleep 600 & echo $! > {quote(str(pid))}; wait"))
    assert "CHRONOS_ALERT_COMMAND did not finish within 1 s and was killed" in caplog.text
    wait_until(
        lambda: (
            not psutil.pid_exists(int(pid.read_text()))
            or psutil.Process(int(pid.read_text())).status() == psutil.STATUS_ZOMBIE
        ),
        10,
        "what it started is gone",
    )


def test_the_alert_command_gets_no_database_url_and_no_password(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "seen"
    monkeypatch.setenv("MY_WEBHOOK", "for the command")
    monkeypatch.setenv("PGPASSWORD", "of the database")
    tell(settings_that_alert(url, f"env > {quote(str(seen))}"))
    text = seen.read_text()
    assert "MY_WEBHOOK=for the command" in text
    kept_back = ("DATABASE_URL", "PGPASSWORD", "REDIS_URL", "CHRONOS_ALERT_COMMAND")
    assert not any(f"{name}=" in text for name in kept_back)


def test_of_two_concurrent_runs_only_one_sends_the_alert(
    url: str, inbox: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with holding(url, "SELECT pg_advisory_xact_lock(hashtextextended('chronos alert', 0))"):
        tell(settings_that_alert(url, into(inbox)))
    assert told(inbox) == []
    assert "another run is sending the alert" in caplog.text


@pytest.mark.parametrize(
    ("one", "same"),
    [
        ("the runway is 5 days, less than 7: x", "the runway is 4 days, less than 7: x"),
        (
            "no partition for 2026-11-27: an insert",
            "no partition for 2026-11-27, 2026-11-28 and 3 more: an insert",
        ),
        (
            "expired and still there: t_y2026m11d03. Drop them: x",
            "expired and still there: t_y2026m11d03, t_y2026m11d04. Drop them: x",
        ),
        ("j has not succeeded yet (in use by pid 1 (app)); x", "j has not succeeded yet (gone); x"),
    ],
)
def test_a_problem_whose_numbers_change_is_not_alerted_again(one: str, same: str) -> None:
    assert kind_of(one) == kind_of(same)
    assert kind_of(one) != kind_of("another problem")
