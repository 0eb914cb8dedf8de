"""`status`: what it says about each state, and that it finds each problem once it really exists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
import redis
from pydantic import SecretStr
from sqlalchemy.engine import make_url

from chronos.catalog.partitions import droppable
from chronos.commands import SCRIPT
from chronos.db import connect_engine, execute, transaction
from chronos.demo.embedded import create_database
from chronos.demo.rows import create_webhook_log
from chronos.errors import ChronosError
from chronos.functions import VERSION, upgrade
from chronos.health import Status, collect, judge
from chronos.job_lock import keep_lease
from chronos.jobs import CREATE, DROP, JOBS, Job, JobFailedError, Message, attempt, upkeep
from chronos.migration.state import Phase, Plan, State, Strategy, create_statement
from chronos.settings import Settings
from chronos.table import WEBHOOK_LOG, Period, midnight
from tests.command import chronos, chronos_environment, started
from tests.conftest import MakeDatabase
from tests.partitioned import add_partition, leaves
from tests.tables import connected, holding, query, value
from tests.test_jobs import add_days, migrate, names
from tests.test_partition_functions import detach_half_way

MIGRATE = "python -m chronos.scripts.migrate_to_partitioned_webhook_log"
OPERATORS_LOCK = (
    "SELECT pg_advisory_xact_lock(hashtextextended('chronos migration of public.webhook_log', 0))"
)


@pytest.fixture(scope="module")
def migrated_once(postgres: str) -> Iterator[str]:
    """The name of a database with a few rows that was really migrated, to be cloned."""
    name = f"chronos_test_{uuid.uuid4().hex}"
    create_database(postgres, name)
    url = make_url(postgres).set(database=name).render_as_string(hide_password=False)
    create_webhook_log(connect_engine(make_url(url)), 500)
    result = chronos(url, "migrate", "--yes")
    assert result.returncode == 0, result.stderr
    yield name
    query(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def migrated(migrated_once: str, postgres: str) -> Iterator[str]:
    """The URL of the test's own migrated database."""
    name = f"chronos_test_{uuid.uuid4().hex}"
    create_database(postgres, name, migrated_once)
    yield make_url(postgres).set(database=name).render_as_string(hide_password=False)
    query(postgres, f"DROP DATABASE {name} WITH (FORCE)")


Look = Callable[[str], Status]


@pytest.fixture
def look(redis_url: str, client: redis.Redis) -> Look:
    """The status of a database."""
    return lambda url: collect(settings_for(url, redis_url))


def settings_for(url: str, redis_url: str) -> Settings:
    return Settings(database_url=SecretStr(url), redis_url=SecretStr(redis_url))


def the_problem(status: Status, pattern: str) -> str:
    """The only problem, which matches ``pattern``."""
    assert not status.healthy
    [problem] = status.problems
    assert re.search(pattern, problem), problem
    return problem


def today(url: str) -> date:
    found = value(url, "SELECT (now() AT TIME ZONE 'UTC')::date")
    assert isinstance(found, date)
    return found


# States


def test_after_the_migration_status_is_healthy(migrated: str, redis_url: str, look: Look) -> None:
    status = look(migrated)
    assert status.problems == ()
    assert (status.state, status.healthy, status.runway_days, status.missing) == ("migrated", True, 30, [])
    assert status.old_table
    assert status.old_table.rows_estimate == 500
    assert status.jobs
    assert status.jobs[CREATE.name].report == {}
    for job in JOBS:
        attempt(job, settings_for(migrated, redis_url), Message("a task"), None)
    found = look(migrated).as_json()
    assert found["healthy"], found["problems"]
    day = today(migrated)
    assert found["partitions"] == len(found["partition_list"]) == 46
    assert (found["oldest"], found["newest"]) == tuple(
        (day + timedelta(days=n)).isoformat() for n in (-15, 30)
    )
    assert found["functions_installed"] is True
    assert found["jobs"][DROP.name]["result"] == "done"
    assert found["jobs"][DROP.name]["running"] is None
    assert datetime.fromisoformat(found["jobs"][CREATE.name]["last_run"]) <= datetime.now(UTC)
    assert found["next_drop"]["partitions"] in ([], names(migrated, -15, -15))
    newest = found["partition_list"][-1]
    assert newest["name"] == names(migrated, 30, 30)[0]
    assert newest["from"] == f"{day + timedelta(days=30)}T00:00:00+00:00"
    assert newest["to"] == f"{day + timedelta(days=31)}T00:00:00+00:00"
    assert sum(p["rows_estimate"] for p in found["partition_list"]) == value(
        migrated, "SELECT count(*) FROM webhook_log"
    )


def test_a_plain_table_is_shown_with_the_next_command(database: str, look: Look) -> None:
    query(database, "CREATE TABLE webhook_log (id bigint, timestamp timestamptz)")
    status = look(database)
    the_problem(status, r"plain table.*migrate_to_partitioned_webhook_log$")
    found = status.as_json()
    assert (found["state"], found["partitions"], found["missing"]) == ("plain", 0, [])
    assert found["oldest"] is found["newest"] is found["old_table"] is None
    assert found["functions_installed"] is False


def test_after_finalize_only_the_jobs_are_a_problem(migrated: str, look: Look) -> None:
    result = chronos(migrated, "finalize", "--yes")
    assert result.returncode == 0, result.stderr
    status = look(migrated)
    assert (status.state, status.old_table) == ("finalized", None)
    assert len(status.problems) == 2  # the jobs, which have never run
    assert all("has not succeeded yet" in problem for problem in status.problems)


@pytest.mark.parametrize(
    ("phase", "state", "command"),
    [
        ("built", "migrating", "--resume; or undo it with: python -m chronos rollback"),
        ("copying", "migrating", "--resume; or undo it with: python -m chronos rollback"),
        ("returning", "rolling back", "or call it off, and stay partitioned: " + SCRIPT + " --resume"),
        ("undone", "rolling back", "Finish with: python -m chronos rollback"),
        ("finalizing", "finalizing", "Finish with: python -m chronos finalize"),
    ],
)
def test_an_abandoned_migration_is_a_problem(
    migrated: str, look: Look, phase: str, state: str, command: str
) -> None:
    query(migrated, f"UPDATE webhook_log_migration SET phase = '{phase}'")
    status = look(migrated)
    assert status.state == state
    assert the_problem(status, "is half done, and nobody is working on it").endswith(command)
    with holding(migrated, OPERATORS_LOCK):
        assert look(migrated).healthy


@pytest.mark.parametrize(
    ("phase", "verb"),
    [
        (Phase.RETURNING, ("migrate", "--resume")),
        (Phase.RETURNING, ("rollback",)),
        (Phase.FINALIZING, ("finalize",)),
    ],
)
def test_a_half_done_migration_is_a_problem_while_an_operator_sits_at_a_prompt(
    migrated: str, look: Look, phase: Phase, verb: tuple[str, ...]
) -> None:
    query(migrated, f"UPDATE webhook_log_migration SET phase = '{phase.value}'")
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "chronos", *verb],
        env=chronos_environment(migrated),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout
        asked = b""
        while not asked.endswith(b" to continue: "):
            more = process.stdout.read(1)
            assert more, process.communicate()
            asked += more
        the_problem(look(migrated), "is half done, and nobody is working on it")
        process.communicate(b"no\n", timeout=60)
    assert process.returncode == 2


def test_rows_not_compared_after_the_swap_are_a_problem(migrated: str, look: Look) -> None:
    query(migrated, "UPDATE webhook_log_migration SET verified = false")
    status = look(migrated)
    assert status.state == "migrated"
    assert the_problem(status, "were not compared again").endswith(f"{MIGRATE} --resume")
    with holding(migrated, OPERATORS_LOCK):
        assert look(migrated).healthy


def begin(url: str, phase: Phase) -> Plan:
    """Create a plain table, and with it the state and the notes of a migration in ``phase``."""
    query(url, "CREATE TABLE webhook_log (id bigint, timestamp timestamptz)")
    table = WEBHOOK_LOG.located("public")
    now = datetime.now(UTC)
    wanted = table.wanted(now)
    plan = Plan(
        table,
        Strategy.COPY,
        now,
        now - timedelta(days=15),
        wanted[0].start,
        wanted[-1].end,
        old_key=("id",),
        new_key=("id", "timestamp"),
    )
    with connect_engine(make_url(url)).connect() as conn, transaction(conn):
        execute(conn, create_statement(State(uuid.uuid4(), phase, plan)))
    query(
        url,
        "CREATE TABLE webhook_log_migration_changes"
        ' (id bigint, timestamp timestamptz, chronos_origin "char", chronos_truncated boolean)',
    )
    return plan


# A table that becomes a partition


@pytest.fixture
def held(database: str) -> str:
    """A database in which ``migrate --strategy attach`` stopped before the swap."""
    create_webhook_log(connect_engine(make_url(database)), 200)
    result = chronos(database, "migrate", "--strategy", "attach", "--hold", "--yes")
    assert result.returncode == 0, result.stderr
    return database


def bound_in(url: str, away: timedelta) -> datetime:
    """Set the bound of a half-done migration to ``away`` from now; returns it."""
    bound = value(url, "SELECT now()").astimezone(UTC) + away
    query(
        url,
        "UPDATE webhook_log_migration SET plan = jsonb_set(plan, '{first}', to_jsonb(%s::text))",
        bound.isoformat(),
    )
    assert isinstance(bound, datetime)
    return bound


def test_an_attached_table_is_shown_with_its_range_and_drop_date(database: str, look: Look) -> None:
    create_webhook_log(connect_engine(make_url(database)), 200)
    result = chronos(database, "migrate", "--strategy", "attach", "--yes")
    assert result.returncode == 0, result.stderr
    assert (
        "DROP TABLE webhook_log would drop all rows: to go back by hand, DETACH webhook_log_history first;"
        " better: python -m chronos rollback\n" in result.stdout
    )
    bound = today(database) + timedelta(days=7)
    size = value(database, "SELECT pg_total_relation_size('webhook_log_history')")
    expected = {
        "name": "webhook_log_history",
        "until": f"{bound}T00:00:00+00:00",
        "rows_estimate": 200,
        "bytes": size,
        "goes_on": f"{bound + timedelta(days=15)}",
    }
    for state, command in (("migrated", None), ("finalized", "finalize")):
        if command:
            assert chronos(database, command, "--yes").returncode == 0
        status = look(database)
        assert status.state == state
        assert status.as_json()["history"] == expected
        assert all("has not succeeded yet" in problem for problem in status.problems)
        shown = chronos(database, "status").stdout
        [line] = [line for line in shown.splitlines() if line.startswith("history ")]
        assert re.fullmatch(
            rf"history     webhook_log_history: before {bound}, \d+ kB,"
            rf" drop on {bound + timedelta(days=15)}",
            line,
        ), line
        assert len(line) <= 80
    # It is dropped on that day, and not the day before.
    [history] = [p for p in status.partitions if p.name == "webhook_log_history"]
    goes = bound + timedelta(days=15)
    assert droppable(status.partitions, goes, 15) == [history]
    assert droppable(status.partitions, goes - timedelta(days=1), 15) == []


def test_a_table_without_retention_keeps_its_history(database: str, redis_url: str) -> None:
    query(
        database,
        "CREATE TABLE event (id bigserial PRIMARY KEY, at timestamptz NOT NULL); CREATE INDEX ON event (at);"
        " INSERT INTO event (at) VALUES (now())",
    )
    described = ("--column", "at", "--every", "day", "--ahead-days", "30")
    result = chronos(database, "migrate", "event", *described, "--strategy", "attach", "--yes")
    assert result.returncode == 0, result.stderr
    shown = chronos(database, "status", "event").stdout
    assert re.search(r"^history     event_history: before .*, never dropped$", shown, re.MULTILINE)


def test_a_held_attach_is_a_notice_that_names_its_bound(held: str, look: Look) -> None:
    status = look(held)
    assert (status.state, status.healthy) == ("ready", True)
    bound = today(held) + timedelta(days=7)
    [notice] = status.notices
    assert (
        f", inserts into webhook_log fail from {bound} 00:00 UTC on; swap with: {MIGRATE} --resume" in notice
    )
    assert status.as_json()["migration"]["inserts_fail_from"] == f"{bound}T00:00:00+00:00"
    assert f"inserts into webhook_log fail from {bound}" in chronos(held, "status").stdout


def test_a_half_done_attach_says_when_inserts_will_start_to_fail(held: str, look: Look) -> None:
    query(held, "UPDATE webhook_log_migration SET phase = 'copying'")
    problem = the_problem(look(held), "is half done, and nobody is working on it")
    bound = today(held) + timedelta(days=7)
    assert f"In this state, inserts into webhook_log fail from {bound} 00:00 UTC on. Carry on with" in problem
    with holding(held, OPERATORS_LOCK):
        assert look(held).healthy
    query(held, "ALTER TABLE webhook_log DROP CONSTRAINT webhook_log_history_bound")
    status = look(held)
    assert "inserts" not in the_problem(status, "is half done, and nobody is working on it")
    assert status.as_json()["migration"]["inserts_fail_from"] is None


@pytest.mark.parametrize("phase", ["copying", "ready"])
@pytest.mark.parametrize("running", [False, True])
def test_an_approaching_bound_is_a_problem(held: str, look: Look, phase: str, running: bool) -> None:
    query(held, f"UPDATE webhook_log_migration SET phase = '{phase}'")
    with holding(held, OPERATORS_LOCK if running else "SELECT 1"):
        bound = bound_in(held, timedelta(days=2, hours=23))
        assert the_problem(look(held), "").endswith(
            f"inserts into webhook_log fail from {bound:%Y-%m-%d %H:%M} UTC on, because its migration is half"
            f" done; finish it with: {MIGRATE} --resume; or undo it with: python -m chronos rollback"
        )
        for away, when in ((timedelta(hours=23), "from {} UTC on"), (timedelta(hours=-1), "since {} UTC")):
            bound = bound_in(held, away)
            assert the_problem(look(held), "").endswith(
                f"inserts into webhook_log fail {when.format(f'{bound:%Y-%m-%d %H:%M}')}, because its"
                " migration is half done; undo it with: python -m chronos rollback; then start again"
            )


def test_the_remedy_for_a_passed_bound_works(held: str, look: Look) -> None:
    bound_in(held, timedelta(hours=-1))
    refused = chronos(held, "migrate", "--resume", "--yes")
    assert refused.returncode == 2, "so it is not named"
    assert "--resume" not in the_problem(look(held), "undo it with")
    undone = chronos(held, "rollback", "--yes")
    assert undone.returncode == 0, undone.stderr
    query(held, "INSERT INTO webhook_log (status, timestamp) VALUES ('later', now() + interval '8 days')")
    the_problem(look(held), "is a plain table")


def test_foreign_keys_that_the_parent_has_not_adopted_are_a_problem(database: str, look: Look) -> None:
    create_webhook_log(connect_engine(make_url(database)), 200)
    result = chronos(database, "migrate", "--strategy", "attach", "--yes")
    assert result.returncode == 0, result.stderr
    query(database, "UPDATE webhook_log_migration SET verified = false")
    problems = look(database).problems
    assert any(
        problem.endswith(
            f"Its foreign keys are not yet those of the whole table; carry on with: {MIGRATE} --resume"
        )
        for problem in problems
    ), problems


def add_notes(url: str, number: int, origin: str) -> None:
    notes = "INSERT INTO webhook_log_migration_changes SELECT n, now(), %s FROM generate_series(1, %s) n"
    query(url, notes, origin, number)


def test_status_shows_how_far_the_copy_has_come(database: str, look: Look) -> None:
    plan = begin(database, Phase.COPYING)
    filled = {p.start.isoformat(): {"old_rows": 1, "new_rows": 1, "alike": True} for p in plan.periods[:3]}
    query(database, "UPDATE webhook_log_migration SET compared = %s", json.dumps(filled))
    status = look(database)
    assert (status.state, status.copied) == ("migrating", (3, 16))
    the_problem(status, r"webhook_log is the plain table, complete and in use; .* --resume; or undo it with")
    found = status.as_json()["migration"]
    assert (found["phase"], found["periods_copied"], found["periods"]) == ("copying", 3, 16)
    assert (found["running"], found["by"]) == (False, None)


def test_a_table_that_waits_for_its_swap_is_healthy(database: str, look: Look) -> None:
    begin(database, Phase.READY)
    add_notes(database, 1234, "o")
    add_notes(database, 10, "n")
    status = look(database)
    assert (status.state, status.healthy, status.notes_waiting) == ("ready", True, 1234)
    [notice] = status.notices
    since = value(database, "SELECT to_char(changed_at, 'YYYY-MM-DD HH24:MI') FROM webhook_log_migration")
    assert notice == (
        f"ready since {since} UTC, 1,234 notes to replay; swap with: {MIGRATE} --resume;"
        " undo with: python -m chronos rollback"
    )
    assert status.as_json()["notices"] == [notice]
    with holding(database, OPERATORS_LOCK):
        assert look(database).notices == ()


def test_a_table_that_has_waited_for_a_week_is_a_problem(database: str, look: Look) -> None:
    begin(database, Phase.READY)
    query(database, "UPDATE webhook_log_migration SET changed_at = now() - interval '167 hours'")
    assert look(database).healthy
    query(database, "UPDATE webhook_log_migration SET changed_at = now() - interval '169 hours'")
    status = look(database)
    the_problem(
        status, r"^ready since .* swap with: .* --resume; or undo it with: python -m chronos rollback$"
    )
    assert status.notices == ()
    with holding(database, OPERATORS_LOCK):
        assert not look(database).healthy


def test_a_million_notes_are_a_problem(database: str, look: Look) -> None:
    begin(database, Phase.READY)
    add_notes(database, 1_000_001, "o")
    the_problem(look(database), "^ready since .* UTC, 1,000,000 or more notes to replay")


def test_an_old_table_renamed_back_by_hand_is_a_problem(migrated: str, look: Look) -> None:
    query(migrated, "DROP TABLE webhook_log CASCADE")
    the_problem(look(migrated), "was renamed back .* by hand.*python -m chronos rollback")
    query(migrated, "ALTER TABLE webhook_log_old RENAME TO webhook_log")
    status = look(migrated)
    assert status.state == "plain"
    the_problem(status, "was renamed back .* by hand.*python -m chronos rollback")


def test_an_old_table_dropped_by_hand_is_a_problem(migrated: str, look: Look) -> None:
    query(migrated, "DROP TABLE webhook_log_old CASCADE")
    status = look(migrated)
    assert (status.state, status.old_table) == ("migrated", None)
    the_problem(status, "was dropped by hand.*python -m chronos finalize")


def test_a_missing_table_is_an_error(database: str, look: Look) -> None:
    with pytest.raises(ChronosError, match="there is no table webhook_log in database chronos_test_"):
        look(database)


# Problems


def drop_days(url: str, first: int, last: int) -> list[Period]:
    query(url, f"DROP TABLE {', '.join(names(url, first, last))}")
    start = midnight(today(url))
    return WEBHOOK_LOG.periods(start + timedelta(days=first), start + timedelta(days=last + 1))


def test_a_short_runway_is_a_problem(migrated: str, redis_url: str, look: Look) -> None:
    gone = drop_days(migrated, 7, 30)
    status = look(migrated)
    assert (status.runway_days, status.missing) == (6, gone)
    at_noon = replace(status, now=midnight(status.today) + timedelta(hours=12))
    lacking, short = judge(at_noon, settings_for(migrated, redis_url))
    assert f"no partition for {gone[0]}, {gone[1]}, {gone[2]} and 21 more" in lacking
    assert "the runway is 6 days, less than 7" in short
    query(migrated, short.partition(": ")[2])
    assert look(migrated).healthy


def test_a_missing_day_ahead_is_a_problem(migrated: str, look: Look) -> None:
    gone = drop_days(migrated, 10, 10)
    status = look(migrated)
    assert (status.runway_days, status.missing) == (9, gone)
    problem = the_problem(status, f"no partition for {gone[0]}: inserts for such days fail")
    query(migrated, problem.partition("Create them: ")[2])
    assert look(migrated).healthy


def test_days_covered_by_an_open_ended_partition_are_not_missing(migrated: str, look: Look) -> None:
    [first, *_] = drop_days(migrated, 10, 30)
    endless = f"FOR VALUES FROM ('{first} 00:00+00') TO (MAXVALUE)"
    query(migrated, f"CREATE TABLE endless PARTITION OF webhook_log {endless}")
    status = look(migrated)
    assert status.healthy, status.problems
    assert status.missing == []


def test_a_missing_today_is_a_problem(migrated: str, look: Look) -> None:
    gone = drop_days(migrated, 0, 0)
    status = look(migrated)
    assert (status.runway_days, status.missing) == (0, gone)
    assert len(status.problems) == 2


def test_a_missing_past_day_is_a_problem(migrated: str, look: Look) -> None:
    gone = drop_days(migrated, -9, -9)
    status = look(migrated)
    assert status.missing == gone
    problem = the_problem(status, f"no partition for {gone[0]}, within retention")
    query(migrated, problem.partition("Create it: ")[2])
    assert look(migrated).healthy


def test_work_due_since_midnight_is_no_problem_before_the_jobs_have_run(
    migrated: str, look: Look, redis_url: str
) -> None:
    """At 00:30 one day has expired and another must be created: both wait for the jobs at 01:00 and 02:00."""
    settings = settings_for(migrated, redis_url)
    status = look(migrated)
    tomorrow = midnight(status.today + timedelta(days=1))
    assert status.migration
    status = replace(status, migration=replace(status.migration, fence=tomorrow))
    for hours, problems in ((0.5, 0), (1.9, 0), (2.1, 1), (2.9, 1), (3.1, 2)):
        later = replace(status, now=tomorrow + timedelta(hours=hours))
        assert [str(period) for period in later.missing] == [str(later.today + timedelta(days=30))]
        assert len(judge(later, settings)) == problems, hours


def test_days_dropped_too_early_are_a_problem_while_the_old_table_has_them(
    migrated: str, redis_url: str, look: Look
) -> None:
    first = today(migrated) - timedelta(days=15)
    query(migrated, "SELECT drop_old_webhook_log_partitions(3)")
    problem = the_problem(look(migrated), "the rows in between are only in webhook_log_old")
    assert f"begins at {first + timedelta(days=12)}, but retention begins at {first};" in problem
    assert "Bring them back with: python -m chronos rollback" in problem
    # An operator who wants those days gone shortens the retention.
    shorter = settings_for(migrated, redis_url).model_copy(update={"webhook_log_retention_days": 3})
    assert not [p for p in collect(shorter).problems if "webhook_log_old" in p]


def test_expired_partitions_are_a_problem(migrated: str, look: Look) -> None:
    add_days(migrated, -19, -16)
    end = today(migrated) - timedelta(days=19)
    bounds = f"FOR VALUES FROM (MINVALUE) TO ('{end} 00:00+00')"
    query(migrated, f"CREATE TABLE lowest PARTITION OF webhook_log {bounds}")
    problem = the_problem(look(migrated), f"expired and still there: {names(migrated, -19, -19)[0]}")
    query(migrated, problem.partition("Drop them: ")[2])
    assert look(migrated).healthy


@pytest.mark.parametrize("function", WEBHOOK_LOG.functions)
def test_a_missing_function_is_a_problem(migrated: str, redis_url: str, look: Look, function: str) -> None:
    query(migrated, f"DROP FUNCTION {function}(int)")
    status = look(migrated)
    the_problem(status, rf"^{function}: missing; .*upgrade-functions$")
    assert status.as_json()["functions_installed"] is False
    upgrade(connect_engine(settings_for(migrated, redis_url).database), WEBHOOK_LOG)
    assert look(migrated).healthy


@pytest.mark.parametrize("comment", ["'chronos 0: older'", "NULL"])
def test_a_function_of_an_older_version_is_a_problem(migrated: str, look: Look, comment: str) -> None:
    function = WEBHOOK_LOG.drop_function
    query(migrated, f"COMMENT ON FUNCTION {function}(int) IS {comment}")
    status = look(migrated)
    the_problem(status, f"^{function}: older than version {VERSION}; ")
    assert status.as_json()["functions_installed"] is True


def test_a_half_detached_partition_is_a_problem(migrated: str, look: Look) -> None:
    [pending] = names(migrated, -3, -3)
    detach_half_way(migrated, pending)
    status = look(migrated)
    assert [str(period) for period in status.missing] == [str(today(migrated) - timedelta(days=3))]
    finish = next(p for p in status.problems if f"the DETACH of {pending} was cut off" in p)
    query(migrated, finish.partition("finish it: ")[2])
    assert not any("half-way" in problem for problem in look(migrated).problems)


def test_rows_outside_the_retention_are_a_problem(migrated: str, look: Look) -> None:
    with connected(migrated, autocommit=False) as conn:
        cur = conn.cursor()
        cur.execute(f"DROP TABLE {', '.join(leaves(cur, -15, -14))}")
        add_partition(cur, '"Wide"', -40, -13)
        conn.commit()
    assert look(migrated).healthy
    insert = "INSERT INTO webhook_log (status, timestamp) VALUES ('ok', now() - interval '30 days')"
    query(migrated, insert)
    problem = the_problem(look(migrated), "^Wide holds rows older than")
    query(migrated, problem.partition("remove: ")[2])
    assert look(migrated).healthy


def test_rows_in_a_default_partition_are_a_problem(migrated: str, look: Look) -> None:
    query(migrated, "CREATE TABLE rest PARTITION OF webhook_log DEFAULT")
    assert look(migrated).healthy
    query(migrated, "INSERT INTO webhook_log (status, timestamp) VALUES ('ok', now() + interval '99 days')")
    the_problem(look(migrated), "^the default partition rest holds rows")
    query(migrated, "INSERT INTO webhook_log (status, timestamp) VALUES ('ok', now() - interval '99 days')")
    the_problem(look(migrated), "^rest holds rows older than .*: DELETE FROM")


@pytest.mark.parametrize(("seconds", "direction"), [(90, "behind"), (-90, "ahead of")])
def test_clocks_that_differ_are_a_problem(
    migrated: str, redis_url: str, client: redis.Redis, seconds: int, direction: str
) -> None:
    settings = settings_for(migrated, redis_url)
    status = collect(settings, clock=lambda: datetime.now(UTC) + timedelta(seconds=seconds))
    the_problem(status, f"the database server is (89|90|91) s {direction} this machine's")
    assert collect(settings, clock=lambda: datetime.now(UTC) + timedelta(seconds=50)).healthy


def test_a_job_that_has_not_succeeded_for_long_is_a_problem(
    migrated: str, redis_url: str, look: Look
) -> None:
    for job in JOBS:
        attempt(job, settings_for(migrated, redis_url), Message("a task"), None)

    def age(job: Job, hours: float) -> None:
        query(
            migrated,
            "UPDATE chronos_reports SET reported = now() - %s * interval '1 hour' WHERE job = %s",
            hours,
            job.name,
        )

    age(CREATE, 25.9)
    age(DROP, 26.1)
    with holding(migrated, f"LOCK TABLE {WEBHOOK_LOG} IN SHARE UPDATE EXCLUSIVE MODE"):
        attempt(DROP, settings_for(migrated, redis_url), Message("another"), None)
        the_problem(look(migrated), rf"^{DROP.name} has not succeeded since .* UTC \(.* in use by pid .*\);")
    query(migrated, "DELETE FROM chronos_reports WHERE job = %s", DROP.name)
    assert look(migrated).healthy  # not yet overdue, as the swap was a minute ago
    query(migrated, "UPDATE webhook_log_migration SET fence = now() - interval '27 hours'")
    the_problem(look(migrated), f"^{DROP.name} has not succeeded yet;")


def test_a_lease_that_never_expires_is_a_problem(migrated: str, client: redis.Redis, look: Look) -> None:
    with keep_lease(client, CREATE.name):
        status = look(migrated)
        assert status.healthy
        assert status.jobs
        assert str(status.jobs[CREATE.name].running).startswith("host=")
    client.set(CREATE.name, "from another time")
    the_problem(look(migrated), f"is locked for good: from another time .*DEL {CREATE.name}")


def test_an_unreachable_redis_is_a_problem_and_hides_no_report(migrated: str, redis_url: str) -> None:
    attempt(DROP, settings_for(migrated, redis_url), Message("a task"), None)
    status = collect(settings_for(migrated, "redis://:hush@127.0.0.1:1/0"))
    assert "hush" not in the_problem(status, "Celery cannot run the nightly jobs: Redis does not answer")
    found = status.as_json()
    assert found["jobs"][DROP.name]["result"] == "done"
    assert found["partitions"] == 46


def test_without_redis_status_relies_on_the_reports_and_is_healthy(migrated: str) -> None:
    cron = settings_for(migrated, "")
    assert collect(cron).healthy
    query(migrated, "UPDATE webhook_log_migration SET fence = now() - interval '27 hours'")
    create, drop = collect(cron).problems
    for job, problem in ((CREATE, create), (DROP, drop)):
        assert problem.startswith(f"{job.name} has not succeeded yet; does cron run it?")
    assert upkeep(cron, 0, lambda _: False)[DROP.name]["status"] == "done"
    status = collect(cron)
    assert status.healthy, status.problems
    assert status.jobs
    assert status.jobs[DROP.name].report["writer"].startswith("upkeep host=")


def test_a_job_that_failed_last_night_is_a_problem_at_once(migrated: str, redis_url: str, look: Look) -> None:
    settings = settings_for(migrated, redis_url)
    attempt(DROP, settings, Message("a task"), None)
    query(migrated, f"CREATE VIEW {names(migrated, 31, 31)[0]} AS SELECT 1")
    with pytest.raises(JobFailedError):
        attempt(
            CREATE, Settings(**{**settings.model_dump(), "webhook_log_days_ahead": 31}), Message("x"), None
        )
    the_problem(look(migrated), rf"^{CREATE.name} failed in its last run \(.*: the name .* is taken")


def test_reports_copied_from_another_database_do_not_count(
    database: str, redis_url: str, make_database: MakeDatabase, pg_bin: Path
) -> None:
    """A rehearsal on a dump of production: the reports are in the dump, but do not count."""
    migrate(database, -2, 30)
    production = settings_for(database, redis_url)
    for job in JOBS:
        attempt(job, production, Message("a task"), None)
    rehearsal = make_database()
    text = subprocess.run([pg_bin / "pg_dump", as_libpq(database)], capture_output=True, check=True).stdout
    subprocess.run(
        [pg_bin / "psql", "-qX", "-v", "ON_ERROR_STOP=1", as_libpq(rehearsal)], input=text, check=True
    )
    assert value(rehearsal, "SELECT count(*) FROM chronos_reports") == 2
    status = collect(settings_for(rehearsal, redis_url))
    assert status.jobs
    assert {name: job.report for name, job in status.jobs.items()} == {job.name: {} for job in JOBS}
    assert [problem.partition(" has")[0] for problem in status.problems] == [job.name for job in JOBS]
    nightly = Message("tonight", nightly=True)
    assert attempt(CREATE, settings_for(rehearsal, redis_url), nightly, None)["status"] == "done"
    assert collect(production).healthy


def as_libpq(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


@pytest.mark.parametrize(
    "kind", ["TABLE chronos_reports (job text)", "VIEW chronos_reports AS SELECT 1 AS job"]
)
def test_another_roles_table_with_that_name_is_neither_read_nor_written(
    migrated: str, redis_url: str, look: Look, kind: str
) -> None:
    stranger = f"stranger_{uuid.uuid4().hex}"
    query(migrated, f"CREATE ROLE {stranger}; GRANT CREATE ON SCHEMA public TO {stranger}")
    try:
        query(migrated, f"SET ROLE {stranger}; CREATE {kind}")
        assert attempt(CREATE, settings_for(migrated, redis_url), Message("a task"), None)["status"] == "done"
        the_problem(
            look(migrated), rf"^what the nightly jobs did is unknown: \S+ belongs to {stranger}, not to"
        )
        assert look(migrated).as_json()["jobs"] is None
    finally:
        query(migrated, f"DROP OWNED BY {stranger}; DROP ROLE {stranger}")
    attempt(CREATE, settings_for(migrated, redis_url), Message("a task"), None)
    assert look(migrated).healthy


def test_remedies_work_in_a_quoted_schema(migrated: str, look: Look) -> None:
    """What the messages say to type works as written."""
    query(migrated, 'ALTER SCHEMA public RENAME TO "It\'s ""here"""')
    query(migrated, f'DROP TABLE "It\'s ""here""".{names(migrated, 12, 12)[0]}')
    query(migrated, f'DROP TABLE "It\'s ""here""".{names(migrated, -12, -12)[0]}')
    ahead, past = look(migrated).problems
    query(migrated, past.partition("Create it: ")[2])
    assert "inserts for such days fail" in ahead
    assert '"It\'s ""here""".create_future_webhook_log_partitions(30)' in ahead


# Locks


def test_status_does_not_wait_for_locks_that_allow_reads(migrated: str, look: Look) -> None:
    with holding(migrated, "LOCK TABLE webhook_log IN EXCLUSIVE MODE"):
        assert look(migrated).healthy


def test_status_does_not_wait_for_a_locked_table(migrated: str, look: Look) -> None:
    with (
        holding(migrated, f"LOCK TABLE {names(migrated, 1, 1)[0]} IN ACCESS EXCLUSIVE MODE"),
        pytest.raises(ChronosError, match=r"has locked public\.webhook_log or one of its partitions"),
    ):
        look(migrated)


# The command


def test_the_command_prints_the_status_and_exits_accordingly(
    migrated: str, redis_url: str, client: redis.Redis, tmp_path: Path
) -> None:
    well = chronos(migrated, "status", "--json", env={"REDIS_URL": redis_url})
    assert (well.returncode, well.stderr) == (0, "")
    assert json.loads(well.stdout)["state"] == "migrated"

    drop_days(migrated, 3, 3)
    page = chronos(migrated, "status", env={"REDIS_URL": redis_url})
    assert (page.returncode, page.stderr) == (1, "")
    head, _, problems = page.stdout.partition("\nproblem")
    assert max(map(len, head.splitlines())) <= 80
    day = today(migrated)
    assert re.search(rf"^ {day - timedelta(days=3)} +[\d,]+ +\d+ kB +[█▏▎▍▌▋▊▉]+ *$", head, re.M)
    assert re.search(r"^ 29 days ahead ", head, re.M)
    assert f"- no partition for {day + timedelta(days=3)}" in problems
    assert "\x1b" not in page.stdout

    ascii_only = {"REDIS_URL": redis_url, "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    with started(migrated, "status", env=ascii_only) as plain:
        stdout, _ = plain.communicate(timeout=60)
    assert stdout.isascii()
    assert re.search(rf"^{day - timedelta(days=3)} +[\d,]+ +\d+ kB +#+ *$", stdout, re.M)


def test_the_command_without_a_server_exits_with_2() -> None:
    away = chronos("postgresql://somebody:hush@127.0.0.1:1/none", "status", "--json")
    assert (away.returncode, away.stdout) == (2, "")
    assert re.fullmatch(r"Error: cannot tell: connection to server at .*\n", away.stderr)
    assert "hush" not in away.stderr
