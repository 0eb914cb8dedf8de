"""Roles with the least privileges they need: the owner of a table, a worker for the nightly upkeep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import redis
from psycopg2 import errors
from pydantic import SecretStr
from sqlalchemy.engine import make_url

from chronos.commands import upkeep as upkeep_command
from chronos.jobs import CREATE, DROP, Message, attempt
from chronos.settings import Settings
from chronos.table import TableSpec
from tests.command import Run, chronos
from tests.conftest import MakeDatabase
from tests.tables import connected, dump, holding, query, value
from tests.waiting import wait_until


@dataclass(frozen=True)
class Roles:
    """URLs of a database for three roles; the table is app.webhook_log, and app is on their search path."""

    superuser: str
    owner: str
    worker: str
    names: tuple[str, str, str]


# What surrounds a table in a production database: default privileges, an event trigger, row security that
# applies to the owner too, a view.
_AROUND = """
CREATE ROLE {owner} LOGIN PASSWORD 'x' BYPASSRLS;
CREATE ROLE {worker} LOGIN PASSWORD 'x';
CREATE ROLE {other};
CREATE SCHEMA app;
GRANT USAGE, CREATE ON SCHEMA app TO {owner};
GRANT USAGE ON SCHEMA app TO {worker};
ALTER DEFAULT PRIVILEGES FOR ROLE {owner} GRANT SELECT ON TABLES TO {other};
ALTER DEFAULT PRIVILEGES FOR ROLE {owner} GRANT EXECUTE ON FUNCTIONS TO {other};
CREATE TABLE ddl (tag text, who name DEFAULT current_user);
GRANT INSERT ON ddl TO PUBLIC;
CREATE FUNCTION keep_ddl() RETURNS event_trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO public.ddl (tag) VALUES (TG_TAG); END $$;
CREATE EVENT TRIGGER kept ON ddl_command_end EXECUTE FUNCTION keep_ddl();
SET ROLE {owner};
CREATE TABLE app.webhook_log (
    id bigserial PRIMARY KEY,
    timestamp timestamptz NOT NULL DEFAULT now(),
    tenant name NOT NULL DEFAULT current_user
);
CREATE INDEX ON app.webhook_log (timestamp);
INSERT INTO app.webhook_log (timestamp) SELECT now() - n * interval '1 hour' FROM generate_series(1, 100) n;
ALTER TABLE app.webhook_log ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY own ON app.webhook_log USING (tenant = current_user);
CREATE VIEW app.latest AS SELECT max(id) AS id FROM app.webhook_log;
RESET ROLE;
"""


@pytest.fixture
def roles(make_database: MakeDatabase) -> Iterator[Roles]:
    superuser = make_database()
    oid = value(superuser, "SELECT oid FROM pg_database WHERE datname = current_database()")
    owner, worker, other = names = (f"owner_{oid}", f"worker_{oid}", f"other_{oid}")
    query(superuser, _AROUND.format(owner=owner, worker=worker, other=other))

    def by(role: str) -> str:
        return make_url(superuser).set(username=role, password="x").render_as_string(hide_password=False)

    yield Roles(superuser, by(owner), by(worker), names)
    query(superuser, "DROP EVENT TRIGGER kept")
    for name in names:  # one at a time: a default privilege involves two of them
        query(superuser, f"DROP OWNED BY {name} CASCADE")
    query(superuser, f"DROP ROLE {', '.join(names)}")


@pytest.mark.parametrize("strategy", ["copy", "attach"])
def test_an_owner_without_superuser_can_migrate_roll_back_and_finalize(
    roles: Roles, pg_bin: Path, strategy: str
) -> None:
    before = dump(roles.superuser, pg_bin)
    migrate = ("migrate", "app.webhook_log", "--yes", "--strategy", strategy)
    for arguments in (migrate, ("rollback", "app.webhook_log", "--yes"), migrate):
        result = chronos(roles.owner, *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        if arguments[0] == "rollback":
            assert dump(roles.superuser, pg_bin) == before
    given = query(
        roles.superuser,
        "SELECT relname FROM pg_class WHERE relnamespace = 'app'::regnamespace AND relacl::text ~ %s"
        " ORDER BY 1",
        roles.names[2],
    )
    kept = "webhook_log_old" if strategy == "copy" else "webhook_log_history"
    assert given == [("latest",), ("webhook_log",), (kept,)]  # no partition, and nothing of chronos
    assert value(roles.owner, "SELECT count(*) FROM app.webhook_log") == 100
    result = chronos(roles.owner, "finalize", "app.webhook_log", "--yes")
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_owner_without_superuser_can_use_grace_days(
    roles: Roles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    listed = tmp_path / "chronos.toml"
    monkeypatch.setenv("CHRONOS_CONFIG", str(listed))
    table = TableSpec("webhook_log", retention_days=15, schema="app", grace_days=7)
    listed.write_text(table.as_toml())
    migrated = chronos(roles.owner, "migrate", "--yes")
    assert migrated.returncode == 0, migrated.stdout + migrated.stderr
    assert query(roles.owner, f"SELECT app.{table.drop_function}(3)") == []
    detached = "SELECT count(*) FROM pg_description WHERE description LIKE 'chronos: detached from%'"
    assert value(roles.superuser, detached) > 0
    listed.write_text(replace(table, grace_days=30).as_toml())
    upgraded = chronos(roles.owner, "upgrade-functions")
    assert upgraded.returncode == 0, upgraded.stdout + upgraded.stderr
    assert "Installed" in upgraded.stdout
    assert "grace_days" not in chronos(roles.owner, "status").stdout


def test_a_lock_holder_whose_query_is_hidden_is_named_by_its_pid(roles: Roles) -> None:
    with holding(roles.superuser, "SELECT FROM app.webhook_log LIMIT 1") as other:
        run = Run(roles.owner, "migrate", "app.webhook_log", "--yes")
        pid = other.info.backend_pid
        wait_until(lambda: f"pid {pid}" in run.printed, 60, "the holder is named")
        other.rollback()
        result = run.finish()
    assert result.returncode == 0, result.stdout + result.stderr
    [named, *_] = [line for line in result.stdout.splitlines() if f"pid {pid}" in line]
    assert "pg_monitor" in named


def test_a_worker_that_can_only_call_the_functions_does_the_nightly_upkeep(
    roles: Roles, redis_url: str, client: redis.Redis, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert chronos(roles.owner, "migrate", "app.webhook_log", "--yes").returncode == 0
    create, drop = TableSpec("webhook_log").functions
    query(roles.owner, f"GRANT EXECUTE ON FUNCTION app.{create}, app.{drop} TO {roles.names[1]}")
    # An upgrade keeps the grants.
    assert chronos(roles.owner, "upgrade-functions", "app.webhook_log").returncode == 0
    listed = tmp_path / "chronos.toml"
    spec = TableSpec("webhook_log", retention_days=2, ahead_days=35, schema="app")
    listed.write_text(spec.as_toml())
    monkeypatch.setenv("CHRONOS_CONFIG", str(listed))
    settings = Settings(database_url=SecretStr(roles.worker), redis_url=SecretStr(redis_url))

    created = attempt(CREATE, settings, Message("by hand"), None)
    dropped = attempt(DROP, settings, Message("by hand"), None)

    assert (created["status"], len(created["created"])) == ("done", 5)
    assert (dropped["status"], len(dropped["dropped"])) == ("done", 13)
    owners = query(
        roles.superuser,
        "SELECT DISTINCT pg_get_userbyid(relowner) FROM pg_class WHERE relnamespace = 'app'::regnamespace",
    )
    assert owners == [(roles.names[0],)]
    with connected(roles.worker) as conn, conn.cursor() as cur, pytest.raises(errors.InsufficientPrivilege):
        cur.execute("SELECT FROM app.webhook_log")


def test_a_worker_is_told_which_grant_its_reports_need_and_that_is_enough(
    roles: Roles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    listed = tmp_path / "chronos.toml"
    monkeypatch.setenv("CHRONOS_CONFIG", str(listed))
    monkeypatch.setenv("REDIS_URL", "")
    table = TableSpec("webhook_log", retention_days=15, schema="app")
    listed.write_text(table.as_toml())
    migrated = chronos(roles.owner, "migrate", "--yes")
    assert f"let cron run {upkeep_command()} every night" in migrated.stdout, migrated.stderr
    create, drop = table.functions
    query(roles.owner, f"GRANT EXECUTE ON FUNCTION app.{create}, app.{drop} TO {roles.names[1]}")
    alone = chronos(roles.worker, "upkeep")
    assert alone.returncode == 0
    assert f"let {roles.names[0]} run {upkeep_command()} once" in alone.stderr
    assert chronos(roles.owner, "upkeep").returncode == 0
    query(roles.owner, alone.stderr.splitlines()[0].partition("then: ")[2])
    again = chronos(roles.worker, "upkeep")
    assert (again.returncode, again.stderr) == (0, "")
    cannot = chronos(roles.worker, "status")
    assert cannot.returncode == 2
    assert "denied for table webhook_log_migration. What a role needs: python -m chronos explain 42501" in (
        cannot.stderr
    )
    tables = "app.webhook_log_migration, app.webhook_log_migration_changes"
    query(roles.owner, f"GRANT SELECT ON {tables} TO {roles.names[1]}")
    assert chronos(roles.worker, "status").returncode == 0
