"""Any table from the command line: by chronos.toml, by options, by the state of its migration."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis
from pydantic import SecretStr

from chronos import commands
from chronos.agreement import as_it_is
from chronos.db import connect_engine, execute, statement, transaction
from chronos.errors import RefusedError
from chronos.jobs import CREATE, DROP, Job, JobFailedError, Message, Report, TryAgainError, attempt
from chronos.migration.console import for_reading
from chronos.settings import Settings, get_settings, postgres_url
from chronos.table import Interval, TableSpec
from tests.command import Run, chronos
from tests.partitioned import install_functions
from tests.tables import connected, exists, holding, query, relations, value
from tests.test_jobs import history, last
from tests.waiting import wait_until

ORDERS = '"Sales"."Order Events"'
_ORDERS = f"""
CREATE SCHEMA "Sales";
CREATE TABLE {ORDERS} (
    "Order No" uuid PRIMARY KEY DEFAULT gen_random_uuid(), "placed at" timestamptz NOT NULL
);
CREATE INDEX ON {ORDERS} ("placed at");
INSERT INTO {ORDERS} ("placed at") SELECT now() - n * interval '1 hour' FROM generate_series(1, 400) n;
"""
DESCRIBED = ("--column", "placed at", "--every", "week", "--ahead-days", "14")

Configure = Callable[..., dict[str, str]]


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Write the file; returns the environment that names it."""

    def write(text: str) -> dict[str, str]:
        file = tmp_path / "tables.toml"
        file.write_text(text, "utf-8")
        return {"CHRONOS_CONFIG": str(file)}

    return write


def listed(*tables: TableSpec) -> str:
    return "\n\n".join(table.as_toml() for table in tables)


def create(url: str, *tables: str) -> None:
    for table in tables:
        query(
            url,
            f"CREATE TABLE {table} (id bigserial PRIMARY KEY, at timestamptz NOT NULL);"
            f" CREATE INDEX ON {table} (at);"
            f" INSERT INTO {table} (at) SELECT now() - n * interval '6 hours' FROM generate_series(1, 100) n",
        )


def refused(url: str, *arguments: str, env: dict[str, str] | None = None) -> str:
    """The one line that a command prints when it changes nothing."""
    before = relations(url)
    done = chronos(url, *arguments, env=env)
    assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert relations(url) == before
    return line


# The file


def test_the_file_lists_tables_and_the_environment_does_not_apply(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = configure(
        """
[[tables]]
name = "webhook_log"
column = "timestamp"
every = "day"

[[tables]]
name = '"Sales"."Order Events"'
column = "placed at"
every = "week"
retention_days = 90
ahead_days = 14
"""
    )
    monkeypatch.setenv("CHRONOS_CONFIG", env["CHRONOS_CONFIG"])
    orders = TableSpec("Order Events", "placed at", Interval.WEEK, 90, 14, schema="Sales")
    settings = Settings()
    assert settings.tables == (TableSpec("webhook_log"), orders)
    assert settings.listed_in == Path(env["CHRONOS_CONFIG"])
    [block] = tomllib.loads(orders.as_toml())["tables"]
    assert block["name"] == ORDERS


def test_a_file_in_the_working_directory_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [table.name for table in Settings().tables] == ["webhook_log"]
    (tmp_path / "chronos.toml").write_text(listed(TableSpec("events", column="at")))
    assert [table.name for table in Settings().tables] == ["events"]


EVENTS = '[[tables]]\nname = "events"\ncolumn = "at"\n'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            EVENTS + 'evry = "day"',
            "events: there is no key evry; the keys are name, column, every, retention_days, ahead_days",
        ),
        ('table = "events"\n' + EVENTS, "there is no key table outside the [[tables]] blocks"),
        (
            EVENTS + 'every = "year"',
            "events, every: Input should be 'hour', 'day', 'week' or 'month'",
        ),
        (
            EVENTS + 'retention_days = "15"',
            "events, retention_days: Input should be a valid integer",
        ),
        (
            EVENTS + "ahead_days = -1",
            "events, ahead_days: Input should be greater than or equal to 0",
        ),
        ('[[tables]]\nname = "events"', "events lacks the key column"),
        ('[[tables]]\ncolumn = "at"', "table number 1 lacks the key name"),
        (EVENTS + EVENTS, "events is listed twice"),
        (EVENTS + EVENTS.replace("events", "public.events"), "may be the same table; name both schemas"),
        (EVENTS.replace('"events"', "'Order Events'"), "Order Events is not a table name in SQL syntax"),
        ("", "it lists no table: write [[tables]] above each"),
        (
            EVENTS.replace("[[tables]]", "[[table]]"),
            "there is no key table; it lists no table: write [[tables]]",
        ),
        (EVENTS.replace("[[tables]]", "[tables]"), "write [[tables]], in double brackets"),
        ("tables = [1]", "one block for each table, with [[tables]] above it"),
        ("[[tables", "cannot be read as TOML"),
    ],
)
def test_an_error_in_the_file_is_reported_in_one_line(
    database: str, configure: Configure, text: str, complaint: str
) -> None:
    env = configure(text)
    for verb in ("migrate", "status"):
        line = refused(database, verb, env=env)
        assert line.startswith(f"Error: {env['CHRONOS_CONFIG']}")
        assert complaint in line


def test_a_missing_file_is_refused(database: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.toml")
    line = refused(database, "status", env={"CHRONOS_CONFIG": missing})
    assert line == f"Error: CHRONOS_CONFIG names {missing}, but there is no such file; nothing was changed"
    line = refused(database, "status", env={"CHRONOS_CONFIG": str(tmp_path)})
    assert "that is a directory" in line


def test_a_column_that_does_not_exist_is_reported(database: str, configure: Configure) -> None:
    create(database, "events")
    env = configure(listed(TableSpec("events", column="when")))
    for verb in ("migrate", "status"):
        assert "events has no column when" in refused(database, verb, env=env)
    assert "[no-time-column]" in refused(database, "migrate", "--yes", env=env)


# Which table


def test_several_tables_are_listed_when_none_is_named(database: str, configure: Configure) -> None:
    create(database, "events", "audit")
    env = configure(listed(TableSpec("events", column="at"), TableSpec("audit", column="at")))
    for verb in ("migrate", "rollback", "finalize"):
        assert "name a table: " in (line := refused(database, verb, env=env))
        assert "lists events, audit; nothing was changed" in line
        assert line.endswith(f"For example: python -m chronos {verb} events")
    assert chronos(database, "migrate", "audit", "--yes", env=env).returncode == 0
    shown = chronos(database, "status", "--json", env=env)
    assert shown.returncode == 1
    found = json.loads(shown.stdout)
    assert found["healthy"] is False
    assert [(t["table"], t["state"]) for t in found["tables"]] == [
        ("public.events", "plain"),
        ("public.audit", "migrated"),
    ]
    assert "python -m chronos migrate public.events" in found["tables"][0]["problems"][0]
    page = chronos(database, "status", env=env).stdout
    assert page.index("public.events: plain") < page.index("public.audit: migrated")
    one = json.loads(chronos(database, "status", "public.audit", "--json", env=env).stdout)
    assert one["table"] == "public.audit"
    upgraded = chronos(database, "upgrade-functions", env=env)
    assert upgraded.returncode == 0
    assert (
        "public.create_future_audit_partitions and public.drop_old_audit_partitions are already current"
        in upgraded.stdout
    )
    assert "public.events is a plain table, and gets its functions when it is migrated" in upgraded.stdout
    assert not query(database, "SELECT FROM pg_proc WHERE proname = 'create_future_events_partitions'")


def test_a_table_that_is_gone_does_not_hide_the_others(database: str, configure: Configure) -> None:
    create(database, "events")
    env = configure(listed(TableSpec("gone", column="at"), TableSpec("events", column="at")))
    shown = chronos(database, "status", "--json", env=env)
    gone, events = json.loads(shown.stdout)["tables"]
    assert (shown.returncode, gone["healthy"], events["state"]) == (2, False, "plain")
    assert f"{env['CHRONOS_CONFIG']} lists gone, and there is no table gone" in gone["problems"][0]
    page = chronos(database, "status", env=env).stdout
    assert "gone: unknown" in page
    assert "public.events: plain" in page


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--column", "id"), "--column id contradicts {file}, which says at for events"),
        (("--every", "hour"), "--every hour contradicts {file}, which says day for events"),
        (("--retention-days", "3"), "--retention-days 3 contradicts {file}, which says nothing for events"),
        (("--ahead-days", "3"), "--ahead-days 3 contradicts {file}, which says 30 for events"),
    ],
)
def test_options_that_contradict_the_file_are_refused(
    database: str, configure: Configure, options: tuple[str, str], complaint: str
) -> None:
    create(database, "events")
    env = configure(listed(TableSpec("events", column="at")))
    expected = complaint.format(file=env["CHRONOS_CONFIG"])
    for named in ((), ("events",), ("public.events",)):
        line = refused(database, "migrate", *named, "--yes", *options, env=env)
        assert expected.split(" for ")[0] in line
        assert re.search(r"Leave the option out, or write \w+ = (3|\"\w+\") there$", line)


def test_a_table_without_a_description_is_refused(database: str) -> None:
    create(database, "events")
    migrate = "python -m chronos migrate public.events --column at --every day"
    for arguments, says, then in (
        (("rollback",), "there is no migration of events to undo; nothing was changed", ""),
        (("finalize",), "there is no migration of events to finalize; nothing was changed", ""),
        (("migrate",), "--column is missing, the time column of public.events", migrate),
        (
            ("migrate", "--dry-run", "--every", "week", "--batch-size", "10"),
            "--column is missing",
            migrate.replace("day", "week --dry-run --batch-size 10"),
        ),
        (
            ("migrate", "--resume"),
            "there is no migration of public.events to resume",
            migrate,
        ),
        (("status",), "public.events is a plain table that no chronos.toml lists", migrate),
        (("upgrade-functions",), "public.events is a plain table that no chronos.toml lists", migrate),
    ):
        line = refused(database, arguments[0], "events", *arguments[1:])
        assert line.startswith(f"Error: {says}")
        assert line.endswith(then)
    query(database, "ALTER TABLE events ADD until date")
    assert "migrate public.events --column COLUMN --every day" in refused(database, "migrate", "events")
    assert "there is no table nothing" in refused(database, "migrate", "nothing", "--column", "at")
    assert "is not a table name in SQL syntax" in refused(database, "status", "Order Events")


def test_webhook_log_missing_from_the_file_is_refused_with_what_to_add(
    database: str, configure: Configure
) -> None:
    create(database, "events", "webhook_log")
    env = configure(listed(TableSpec("events", column="at")))
    found = chronos(database, "migrate", "webhook_log", env=env)
    assert found.returncode == 2
    assert f"{env['CHRONOS_CONFIG']} does not list webhook_log; nothing was changed" in found.stderr
    [block] = tomllib.loads(found.stderr.split("\n\n")[1])["tables"]
    assert (block["name"], block["retention_days"]) == ("public.webhook_log", 15)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("shop.v", "shop.v is a view, not a table"),
        ("v", "shop.v is a view, not a table"),
        ("shop.event", "there is no table shop.event in database"),
        ("shop.event", "Is it shop.events?"),
        ("orders", 'Is it shop."Orders"?'),
        ("other.events", "Is it shop.events?"),
        ("twice", "Name one of other.twice, shop.twice"),
        ("nothing", "Check its name, the database URL and the search_path"),
    ],
)
def test_a_name_that_is_no_table_is_refused(database: str, name: str, says: str) -> None:
    query(
        database,
        "CREATE SCHEMA shop; CREATE SCHEMA other; CREATE TABLE shop.events (at date);"
        ' CREATE TABLE shop."Orders" (at date); CREATE VIEW shop.v AS SELECT 1;'
        " CREATE TABLE shop.twice (at date); CREATE TABLE other.twice (at date)",
    )
    for verb in ("migrate", "status", "rollback"):
        assert says in refused(database, verb, name)


def test_a_table_misspelt_in_the_file_names_the_file(database: str, configure: Configure) -> None:
    create(database, "events")
    env = configure(listed(TableSpec("evnts", column="at")))
    for verb in ("migrate", "status", "rollback", "upgrade-functions"):
        line = refused(database, verb, env=env)
        assert line.startswith(f"Error: {env['CHRONOS_CONFIG']} lists evnts, and there is no table evnts")
        assert line.endswith("Is it public.events?")


def test_options_that_contradict_the_environment_name_the_variable(database: str) -> None:
    create(database, "webhook_log")
    for option, what, instead in (
        ("--retention-days", "30", "set WEBHOOK_LOG_RETENTION_DAYS=30"),
        ("--ahead-days", "7", "set WEBHOOK_LOG_DAYS_AHEAD=7"),
        ("--every", "week", "list it in chronos.toml"),
        ("--column", "at", "list it in chronos.toml"),
    ):
        assert refused(database, "migrate", option, what).endswith(f"Leave the option out, or {instead}")


def test_testing_without_a_test_database_url_is_refused(database: str) -> None:
    line = refused(database, "status", env={"TESTING": "true", "TEST_DATABASE_URL": ""})
    assert "TEST_DATABASE_URL is not set, and is needed because TESTING is true" in line
    assert line.endswith("/chronos_test")


# When the file is wrong


def test_a_wrong_interval_or_column_is_refused_by_every_verb_that_needs_it(
    database: str, redis_url: str, client: redis.Redis, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(database, "events")
    query(database, "ALTER TABLE events ADD until timestamptz NOT NULL DEFAULT now()")
    right = TableSpec("events", column="at", every=Interval.MONTH)
    env = configure(listed(right))
    assert chronos(database, "migrate", "--hold", "--yes", env=env).returncode == 0

    def is_refused(*verbs: tuple[str, ...]) -> None:
        for wrong, line in (
            (
                replace(right, every=Interval.WEEK),
                'says week for public.events, but its partitions are months; put every = "month" there',
            ),
            (
                replace(right, column="until"),
                'says until for public.events, but it is partitioned by at; put column = "at" there',
            ),
        ):
            env = configure(listed(wrong))
            for verb in verbs:
                assert line in refused(database, *verb, env=env)
            found = json.loads(chronos(database, "status", "--json", env=env).stdout)
            assert found["problems"][0] == f"{env['CHRONOS_CONFIG']} {line}"
            assert not found["missing"]
            assert not any("no partition for" in problem for problem in found["problems"])

    resume = ("migrate", "--resume", "--yes")
    is_refused(("migrate", "--yes"), resume, ("upgrade-functions",))
    assert chronos(database, *resume, env=configure(listed(right))).returncode == 0
    is_refused(("upgrade-functions",), resume)
    assert chronos(database, "finalize", "--yes", env=configure(listed(right))).returncode == 0
    is_refused(("upgrade-functions",))
    env = configure(listed(replace(right, every=Interval.WEEK)))
    monkeypatch.setenv("CHRONOS_CONFIG", env["CHRONOS_CONFIG"])
    settings = Settings(database_url=SecretStr(database), redis_url=SecretStr(redis_url))
    for job in (CREATE, DROP):
        with pytest.raises(
            JobFailedError, match=r"says week for public\.events, but its partitions are months"
        ):
            attempt(job, settings, Message("by hand"), None)


def test_a_role_that_cannot_read_the_state_relies_on_the_partitions(
    database: str, configure: Configure
) -> None:
    create(database, "events")
    env = configure(listed(TableSpec("events", column="at", every=Interval.WEEK)))
    events = TableSpec("events", column="at", every=Interval.MONTH, schema="public")
    for option, found in (("--hold", Interval.MONTH), ("--resume", Interval.WEEK)):
        assert chronos(database, "migrate", option, "--yes", env=env).returncode == 0
        with connect_engine(postgres_url(database)).connect() as conn, transaction(conn):
            assert as_it_is(conn, events).every is Interval.WEEK
            execute(conn, statement("SET LOCAL ROLE pg_monitor"))
            assert as_it_is(conn, events).every is found


def test_hand_made_partitions_of_other_widths_do_not_contradict_the_interval(
    database: str, configure: Configure
) -> None:
    query(
        database,
        "CREATE TABLE events (at timestamptz NOT NULL) PARTITION BY RANGE (at);"
        " CREATE TABLE history PARTITION OF events FOR VALUES FROM (MINVALUE) TO ('2025-01-01+00');"
        " CREATE TABLE odd PARTITION OF events FOR VALUES FROM ('2026-01-01+00') TO ('2026-02-11+00')",
    )
    env = configure(listed(TableSpec("events", column="at", every=Interval.WEEK)))
    assert "are already current" not in (done := chronos(database, "upgrade-functions", env=env)).stdout
    assert done.returncode == 0, done.stderr
    query(
        database, "CREATE TABLE w PARTITION OF events FOR VALUES FROM ('2025-10-06+00') TO ('2025-10-13+00')"
    )
    assert chronos(database, "upgrade-functions", env=env).returncode == 0
    query(
        database, "CREATE TABLE m PARTITION OF events FOR VALUES FROM ('2025-11-01+00') TO ('2025-12-01+00')"
    )
    assert chronos(database, "upgrade-functions", env=env).returncode == 0, "one of the newest is a week"
    env = configure(listed(TableSpec("events", column="at")))
    assert "its partitions are months" in refused(database, "upgrade-functions", env=env)


def test_functions_are_not_installed_on_a_plain_table(database: str, configure: Configure) -> None:
    create(database, "events")
    env = configure(listed(TableSpec("events", column="at")))
    line = refused(database, "upgrade-functions", env=env)
    assert "public.events is a plain table, and gets its functions when it is migrated: python -m" in line
    assert chronos(database, "migrate", "--hold", "--yes", env=env).returncode == 0
    assert chronos(database, "upgrade-functions", env=env).returncode == 0


def test_a_half_done_migration_of_an_unlisted_table_is_a_problem(database: str, configure: Configure) -> None:
    create(database, "events", "audit")
    query(database, "CREATE TABLE not_a_migration (only_row int)")
    assert chronos(database, "migrate", "audit", "--column", "at", "--yes").returncode == 0
    query(database, "UPDATE audit_migration SET phase = 'finalizing'")
    env = configure(listed(TableSpec("events", column="at")))
    found = json.loads(chronos(database, "status", "--json", env=env).stdout)
    assert found["also_under_way"] == [{"table": "public.audit", "phase": "finalizing", "healthy": False}]
    page = chronos(database, "status", env=env)
    assert page.returncode == 1
    assert page.stdout.endswith(
        "also under way, not listed in chronos.toml: public.audit (finalizing);"
        " python -m chronos status public.audit\n"
    )


def test_a_table_with_the_same_name_in_another_schema_is_not_the_configured_one(
    database: str, configure: Configure
) -> None:
    create(database, "events")
    query(database, "CREATE SCHEMA other")
    create(database, "other.events")
    env = configure(listed(TableSpec("events", column="at")))
    line = refused(database, "migrate", "other.events", "--column", "at", env=env)
    assert "lists events without a schema, which is not other.events here" in line


# A table that no file lists, from its first plan to its end


def test_a_quoted_table_in_another_schema_goes_through_every_verb(
    database: str, configure: Configure
) -> None:
    query(database, _ORDERS)
    plan = chronos(database, "migrate", ORDERS, *DESCRIBED, "--dry-run")
    assert (plan.returncode, plan.stderr) == (0, "")
    assert "every row is copied" in plan.stdout

    held = chronos(database, "migrate", ORDERS, *DESCRIBED, "--hold", answer="MIGRATE\n")
    assert held.returncode == 0, held.stderr
    assert f"Table: {ORDERS}   Rows (estimate): " in held.stdout
    assert "Every row is copied" in held.stdout
    command = f"python -m chronos migrate {shlex.quote(ORDERS)} --resume"
    assert f"Swap with: {command};" in held.stdout

    for verb in ("migrate", "rollback"):
        line = refused(database, verb, '"Sales"."Order Events_migration"')
        assert "--column is missing" in line or "there is no migration of" in line
    page = chronos(database, "status")
    assert page.returncode == 2
    assert page.stdout == (
        f"\nalso under way, not listed in chronos.toml: {ORDERS} (ready);"
        f" python -m chronos status {shlex.quote(ORDERS)}\n"
    )
    line = refused(database, "migrate", ORDERS, "--every", "day", "--resume", "--yes")
    assert "--every day contradicts the migration begun on" in line
    assert "which says week" in line

    unsure = chronos(database, "migrate", ORDERS, "--resume", answer="no\n")
    assert unsure.returncode == 2
    assert "Phase: ready" in unsure.stdout
    assert 'What was written meanwhile is replayed; then "Order Events" is renamed to' in unsure.stdout
    assert not exists(database, '"Sales"."Order Events_old"')

    done = chronos(database, *shlex.split(command)[3:], answer="MIGRATE\n")
    assert done.returncode == 0, done.stderr
    assert "maintain only the tables that are listed" in done.stdout.replace("\n", " ")
    orders = TableSpec("Order Events", "placed at", Interval.WEEK, None, 14, schema="Sales")
    assert orders.as_toml() in done.stdout
    assert f"python -m chronos finalize {shlex.quote(ORDERS)}" in done.stdout

    status = chronos(database, "status", ORDERS)
    assert status.returncode == 1
    assert f"{ORDERS}: migrated" in status.stdout
    unlisted = 'no chronos.toml lists "Sales"."Order Events", so the nightly jobs do not maintain it'
    assert unlisted in status.stdout
    env = configure(orders.as_toml())
    jobs = json.loads(chronos(database, "status", "--json", env=env).stdout)["jobs"]
    assert {job["last_run"] for job in jobs.values()} == {None}
    assert orders.as_toml() in status.stdout
    assert "are already current" in chronos(database, "upgrade-functions", ORDERS).stdout

    back = chronos(database, "rollback", ORDERS, answer="ROLLBACK\n")
    assert back.returncode == 0, back.stderr
    assert value(database, f"SELECT count(*) FROM {ORDERS}") == 400

    assert chronos(database, "migrate", ORDERS, *DESCRIBED, "--yes").returncode == 0
    final = chronos(database, "finalize", ORDERS, answer="FINALIZE\n")
    assert final.returncode == 0, final.stderr
    assert orders.as_toml() in final.stdout
    assert value(database, f"SELECT count(*) FROM {ORDERS}") == 400
    kept = replace(orders, ahead_days=30)  # the one thing that is in no catalog
    for verb, code in (("status", 1), ("upgrade-functions", 0)):
        found = chronos(database, verb, ORDERS)
        assert found.returncode == code
        assert kept.as_toml() in found.stdout
    assert f"{ORDERS} is partitioned already" in (again := chronos(database, "migrate", ORDERS)).stderr
    assert again.stderr.endswith(f"add to chronos.toml:\n\n{kept.as_toml()}\n")
    assert chronos(database, "upgrade-functions", env=env).returncode == 0


def test_the_documented_command_migrates_webhook_log(database: str, configure: Configure) -> None:
    create(database, "events")
    env = configure(listed(TableSpec("events", column="at")))
    assert "there is no table webhook_log" in refused(database, "migrate", "webhook_log", env=env)


def test_two_operators_can_migrate_two_tables_at_once(database: str, configure: Configure) -> None:
    create(database, "events", "audit")
    env = configure(listed(TableSpec("events", column="at"), TableSpec("audit", column="at")))
    with holding(database, "LOCK TABLE events, audit IN ROW EXCLUSIVE MODE"):
        runs = [Run(database, "migrate", table, "--yes", env=env) for table in ("events", "audit")]
        wait_until(
            lambda: query(
                database,
                "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND database ="
                " (SELECT oid FROM pg_database WHERE datname = current_database()) OFFSET 1",
            ),
            30,
            "both are running",
        )
        busy = chronos(database, "rollback", "events", env=env)
        assert busy.returncode == 2
        assert "somebody else is working on events" in busy.stderr
    for run in runs:
        done = run.finish()
        assert done.returncode == 0, done.stderr
    for table in ("events", "audit"):
        assert value(database, f"SELECT count(*) FROM {table}") == 100
        assert chronos(database, "rollback", table, "--yes", env=env).returncode == 0


def test_without_retention_every_row_is_copied_and_nothing_is_dropped(
    database: str, redis_url: str, client: redis.Redis, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(database, "events")
    query(database, "INSERT INTO events (at) VALUES (now() - interval '100 days')")
    env = configure(listed(TableSpec("events", column="at", every=Interval.MONTH)))
    done = chronos(database, "migrate", "--yes", env=env)
    assert done.returncode == 0, done.stderr
    assert "[Step 3/6] Migrating all data..." in done.stdout
    assert value(database, "SELECT count(*) FROM events") == 101
    monkeypatch.setenv("CHRONOS_CONFIG", env["CHRONOS_CONFIG"])
    settings = Settings(database_url=SecretStr(database), redis_url=SecretStr(redis_url))
    assert attempt(DROP, settings, Message("by hand"), None)["dropped"] == []
    assert value(database, "SELECT count(*) FROM events") == 101
    [oldest] = value(database, "SELECT array_agg(d) FROM drop_old_events_partitions(60) d")
    assert oldest.startswith("events_y")


# One night with five tables

FIVE = [
    TableSpec(f"table_{n}", column="at", retention_days=5, ahead_days=2, schema="public") for n in range(5)
]


@pytest.fixture
def five(
    database: str, redis_url: str, client: redis.Redis, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> Settings:
    """Five partitioned tables, each with no partition ahead and one that has expired."""
    with connected(database, autocommit=False) as conn:
        cur = conn.cursor()
        for table in FIVE:
            cur.execute(f"CREATE TABLE {table} (at timestamptz) PARTITION BY RANGE (at)")
            install_functions(cur, table)
            for days in (0, -9):
                period = table.period(datetime.now(UTC) + timedelta(days=days))
                cur.execute(
                    f"CREATE TABLE {table.partition(period)} PARTITION OF {table}"
                    f" FOR VALUES FROM ('{period.start}') TO ('{period.end}')"
                )
        conn.commit()
    monkeypatch.setenv("CHRONOS_CONFIG", configure(listed(*FIVE))["CHRONOS_CONFIG"])
    return Settings(database_url=SecretStr(database), redis_url=SecretStr(redis_url))


def kept(report: Report, job: Job) -> dict[str, tuple[str, int]]:
    return {name: (table["status"], len(table[job.did])) for name, table in report["tables"].items()}


def others(count: int) -> dict[str, tuple[str, int]]:
    return {f"public.table_{n}": ("done", count) for n in (0, 1, 3, 4)}


def test_a_broken_table_does_not_block_the_other_four(
    five: Settings, database: str, client: redis.Redis
) -> None:
    tomorrow = FIVE[2].partition(FIVE[2].period(datetime.now(UTC) + timedelta(days=1)))
    query(
        database,
        f"CREATE VIEW {tomorrow} AS SELECT 1; CREATE VIEW needs AS SELECT * FROM"
        f" {FIVE[2].partition(FIVE[2].period(datetime.now(UTC) - timedelta(days=9)))}",
    )
    for job, count in ((CREATE, 2), (DROP, 1)):
        with pytest.raises(JobFailedError, match=r"failed: public\.table_2: cannot ") as failed:
            attempt(job, five, Message("tonight", nightly=True), 1.0)
        report = failed.value.report
        assert report["status"] == "failed"
        assert len(report[job.did]) == 4 * count
        assert kept(report, job) == {**others(count), "public.table_2": ("failed", 0)}
        assert last(database, job, "table_1") == report["tables"]["public.table_1"]
        assert history(database, job, "table_2").succeeded is None
    found = json.loads(
        chronos(database, "status", "--json", env={"REDIS_URL": five.redis_url.get_secret_value()}).stdout
    )
    healthy = {table["table"]: table["healthy"] for table in found["tables"]}
    assert healthy == {table.typed: table is not FIVE[2] for table in FIVE}
    assert found["tables"][2]["jobs"][CREATE.name]["result"] == "failed"
    assert found["tables"][1]["jobs"][CREATE.name]["result"] == "done"


def test_a_lost_connection_delays_only_one_table(five: Settings, database: str, client: redis.Redis) -> None:
    """The function of one table ends its own session; the next attempt succeeds."""
    query(
        database,
        "ALTER FUNCTION create_future_table_2_partitions(int) RENAME TO sound;"
        " CREATE FUNCTION create_future_table_2_partitions(int) RETURNS SETOF text LANGUAGE sql AS"
        " 'SELECT pg_terminate_backend(pg_backend_pid())::text'",
    )
    with pytest.raises(TryAgainError, match=r"public\.table_2: PostgreSQL does not answer") as stopped:
        attempt(CREATE, five, Message("tonight", nightly=True), 1.0)
    assert kept(stopped.value.report, CREATE) == {**others(2), "public.table_2": ("retrying", 0)}
    query(
        database,
        "DROP FUNCTION create_future_table_2_partitions(int);"
        " ALTER FUNCTION sound(int) RENAME TO create_future_table_2_partitions",
    )
    message = Message("tonight", True, 2, stopped.value.report)
    report = attempt(CREATE, five, message, None)
    assert kept(report, CREATE) == {**others(2), "public.table_2": ("done", 2)}
    assert (report["status"], len(report["created"])) == ("done", 10)


def test_a_table_in_use_is_the_only_one_left_undone(
    five: Settings, database: str, client: redis.Redis
) -> None:
    with holding(database, "LOCK TABLE table_2 IN SHARE UPDATE EXCLUSIVE MODE"):
        report = attempt(CREATE, five, Message("tonight", nightly=True), None)
    assert report["status"] == "incomplete"
    assert kept(report, CREATE) == {**others(2), "public.table_2": ("incomplete", 0)}
    assert "public.table_2: " in report["error"]


# Names in messages


def test_a_command_names_its_table_where_it_is_needed(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = TableSpec("Order Events", "placed at", Interval.WEEK, 90, schema="Sales")
    webhook_log = TableSpec("webhook_log", schema="public")
    assert commands.rollback(webhook_log) == "python -m chronos rollback"
    assert commands.status(webhook_log) == "python -m chronos status"
    assert commands.migrate(orders) == 'python -m chronos migrate \'"Sales"."Order Events"\''
    assert commands.start(orders).endswith(
        "' --column 'placed at' --every week --retention-days 90 --ahead-days 30"
    )
    monkeypatch.setenv("CHRONOS_CONFIG", configure(listed(orders, webhook_log))["CHRONOS_CONFIG"])
    get_settings.cache_clear()
    try:
        assert commands.rollback(webhook_log) == "python -m chronos rollback public.webhook_log"
        assert commands.start(orders) == commands.migrate(orders)
        assert commands.status(orders) == "python -m chronos status"
    finally:
        get_settings.cache_clear()


def test_a_terminal_shows_a_command_with_its_table_on_a_line_of_its_own() -> None:
    orders = TableSpec("Order's Events", "placed at", schema="Sales")
    events = TableSpec("events", schema="public")
    text = (
        f"Carry on with: {commands.migrate(orders)} --resume; or undo it with: {commands.rollback(events)}"
        f" --force. Begin with: {commands.start(orders)}"
    )
    assert [line.strip() for line in for_reading(text, 79).splitlines() if line.startswith("  ")] == [
        f"{commands.migrate(orders)} --resume",
        f"{commands.rollback(events)} --force",
        commands.start(orders),
    ]


@pytest.mark.parametrize(
    ("text", "schema", "name"),
    [
        ("events", None, "events"),
        ("Sales.Events", "sales", "events"),
        ('"Sales"."Order.Events"', "Sales", "Order.Events"),
        ('public."say ""hi"""', "public", 'say "hi"'),
    ],
)
def test_a_name_is_parsed_as_sql_parses_it(text: str, schema: str | None, name: str) -> None:
    found = TableSpec.named(text)
    assert (found.schema, found.name) == (schema, name)
    assert TableSpec.named(found.typed) == found


@pytest.mark.parametrize("text", ["", "a.b.c", 'a"b', "1st", "a b", '""'])
def test_an_invalid_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a table name"):
        TableSpec.named(text)


def test_settings_of_a_broken_file_are_refused(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHRONOS_CONFIG", configure("tables = 1")["CHRONOS_CONFIG"])
    get_settings.cache_clear()
    with pytest.raises(RefusedError, match="one block for each table"):
        get_settings()
