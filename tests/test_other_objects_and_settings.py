"""Objects and settings that are not chronos' own: tables with its names, views, event triggers, locks."""

from __future__ import annotations

import pytest
import redis
from pydantic import SecretStr
from sqlalchemy.engine import make_url

from chronos.jobs import CREATE, Message, attempt
from chronos.settings import Settings
from tests.command import chronos
from tests.live import load
from tests.partitioned import add_partitions, create, create_tables, drop, leaves
from tests.tables import connected, exists, query, relations, value

BY_CRON = {"REDIS_URL": "", "WEBHOOK_LOG_DAYS_AHEAD": "3"}


@pytest.fixture
def partitioned(database: str) -> str:
    """The URL of a table with the days -18 to 3."""
    with connected(database, autocommit=False) as conn:
        create_tables(conn.cursor())
        add_partitions(conn.cursor(), -18, 3)
        conn.commit()
    return database


def three_have_expired(url: str) -> list[str]:
    with connected(url) as conn:
        return leaves(conn.cursor(), -18, -16)


def test_an_application_table_called_chronos_reports_survives_a_rollback(database: str) -> None:
    load(database, 100)
    query(
        database,
        "CREATE TABLE chronos_reports (table_name text, reported timestamptz);"
        "INSERT INTO chronos_reports VALUES ('webhook_log', 'epoch')",
    )
    assert chronos(database, "migrate", "--yes").returncode == 0
    done = chronos(database, "upkeep", env=BY_CRON)
    assert (done.returncode, "is not the plain table that chronos created" in done.stderr) == (0, True)
    shown = chronos(database, "status", env=BY_CRON)
    assert "what the nightly jobs did is unknown: public.chronos_reports" in shown.stdout
    assert chronos(database, "rollback", "--yes").returncode == 0
    assert value(database, "SELECT count(*) FROM chronos_reports") == 1


def test_a_view_on_the_reports_does_not_block_a_rollback(database: str) -> None:
    load(database, 100)
    assert chronos(database, "migrate", "--yes").returncode == 0
    assert chronos(database, "upkeep", env=BY_CRON).returncode == 0
    query(database, "CREATE VIEW nights AS SELECT night, job, result FROM chronos_reports")
    back = chronos(database, "rollback", "--yes")
    assert back.returncode == 0, back.stderr
    assert value(database, "SELECT count(*) FROM nights") == 0
    assert not [name for _, name in relations(database) if "_migration" in name]


def test_the_reports_of_a_superusers_table_belong_to_the_superuser(
    partitioned: str,
) -> None:
    """The triggers of the schema owner would run as the superuser."""
    role = f"owner_{make_url(partitioned).database}"
    query(partitioned, f"CREATE ROLE {role}; ALTER SCHEMA public OWNER TO {role}")
    try:
        done = chronos(partitioned, "upkeep", env=BY_CRON)
        assert (done.returncode, done.stderr) == (0, "")
        owner = (
            "SELECT pg_get_userbyid(relowner) = current_user FROM pg_class WHERE relname = 'chronos_reports'"
        )
        assert value(partitioned, owner)
        query(partitioned, f"ALTER TABLE chronos_reports OWNER TO {role}")
        done = chronos(partitioned, "upkeep", env=BY_CRON)
        assert (done.returncode, f"chronos_reports belongs to {role}, not to" in done.stderr) == (0, True)
    finally:
        query(
            partitioned, f"REASSIGN OWNED BY {role} TO CURRENT_USER; DROP OWNED BY {role}; DROP ROLE {role}"
        )


def test_an_application_table_with_the_states_name_is_left_alone(partitioned: str) -> None:
    query(partitioned, "CREATE TABLE webhook_log_migration (version integer)")
    done = chronos(partitioned, "upkeep", env=BY_CRON)
    assert done.returncode == 0, done.stderr
    assert not [name for name in three_have_expired(partitioned) if exists(partitioned, name)]
    shown = chronos(partitioned, "status", env=BY_CRON)
    assert (shown.returncode, "public.webhook_log: finalized" in shown.stdout) == (0, True), shown.stdout
    refused = chronos(partitioned, "rollback", "--yes")
    assert (refused.returncode, "there is no migration" in refused.stderr) == (2, True)


def test_a_migration_is_refused_when_the_application_has_a_table_with_the_states_name(database: str) -> None:
    load(database, 10)
    query(database, "CREATE TABLE webhook_log_migration (version integer)")
    refused = chronos(database, "migrate", "--yes")
    assert (refused.returncode, "[names-taken]" in refused.stderr) == (2, True)


# Gives each new table to one role, as on servers where several people create tables.
_GIVES_AWAY = """
CREATE FUNCTION give_away() RETURNS event_trigger LANGUAGE plpgsql AS $$
DECLARE made record;
BEGIN
    FOR made IN SELECT object_identity FROM pg_event_trigger_ddl_commands() WHERE object_type = 'table' LOOP
        EXECUTE format('ALTER TABLE %s OWNER TO {role}', made.object_identity);
    END LOOP;
END $$;
CREATE EVENT TRIGGER gives_away ON ddl_command_end WHEN TAG IN ('CREATE TABLE', 'CREATE TABLE AS')
    EXECUTE FUNCTION give_away();
"""


@pytest.mark.parametrize("strategy", ["copy", "attach"])
def test_an_event_trigger_that_changes_owners_does_not_leave_a_migration_half_done(
    database: str, strategy: str
) -> None:
    role = f"owner_{make_url(database).database}"
    load(database, 100)
    query(
        database,
        f"CREATE ROLE {role}; GRANT USAGE, CREATE ON SCHEMA public TO {role};"
        f"ALTER TABLE webhook_log OWNER TO {role}; ALTER TABLE webhook_endpoint OWNER TO {role};"
        + _GIVES_AWAY.format(role=role),
    )
    try:
        for verb in (("migrate", "--strategy", strategy), ("rollback",)):
            done = chronos(database, *verb, "--yes")
            assert done.returncode == 0, done.stdout + done.stderr
        assert value(database, "SELECT count(*) FROM webhook_log") == 100
    finally:
        query(database, f"DROP EVENT TRIGGER gives_away; DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


def test_an_unreadable_report_does_not_block_the_nightly_job(
    partitioned: str, redis_url: str, client: redis.Redis
) -> None:
    settings = Settings(database_url=SecretStr(partitioned), redis_url=SecretStr(redis_url))
    assert attempt(CREATE, settings, Message("one"), None)["status"] == "done"
    for report in ("{}", "[]", '{"status": "retrying", "next_attempt": "soon"}'):
        query(partitioned, "UPDATE chronos_reports SET report = %s", report)
        assert attempt(CREATE, settings, Message("two", nightly=True), None)["status"] == "done"


@pytest.fixture
def old_strings(partitioned: str) -> str:
    """A database in which a backslash in a string literal is an escape character."""
    name = make_url(partitioned).database
    query(partitioned, f"ALTER DATABASE {name} SET standard_conforming_strings = off")
    return partitioned


def test_a_role_with_standard_conforming_strings_off_is_refused(old_strings: str) -> None:
    for verb in ("status", "upkeep", "migrate"):
        refused = chronos(old_strings, verb, env=BY_CRON)
        assert (refused.returncode, "standard_conforming_strings is off" in refused.stderr) == (2, True), verb


def test_the_functions_work_with_standard_conforming_strings_off(old_strings: str) -> None:
    with connected(old_strings) as conn:
        cur = conn.cursor()
        assert create(cur, 4) == leaves(cur, 4, 4)
        assert drop(cur, 15) == three_have_expired(old_strings)


def test_a_lock_on_one_partition_does_not_block_the_others(partitioned: str) -> None:
    with connected(partitioned, autocommit=False) as own, connected(partitioned, autocommit=False) as other:
        cur = own.cursor()
        [locked] = leaves(cur, -10, -10)
        other.cursor().execute(f"LOCK TABLE {locked} IN ACCESS EXCLUSIVE MODE")
        assert create(cur, 4) == leaves(cur, 4, 4)
        assert drop(cur, 15) == leaves(cur, -18, -16)
