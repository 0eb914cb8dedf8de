"""Strategy attach: nothing is copied, the table itself becomes the partition for all rows below a bound."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from chronos.db import connect_engine
from chronos.migration.rollback import undo
from chronos.migration.run import Options, migrate
from chronos.migration.state import Strategy
from tests.command import Run, chronos, started
from tests.conftest import MakeDatabase
from tests.kitchen_sink import forget, kitchen_sink
from tests.live import Application, KeyType, Readers, TimestampType, fill, load, phase
from tests.real_schemas import ALL, OBAN, Real
from tests.tables import dump, holding, query, value
from tests.test_complete_at_every_instant import RESUME, ROLLBACK, is_plain, live
from tests.test_migration import REFUSE
from tests.test_schemas_of_real_projects import check, create, operator, untouched
from tests.waiting import wait_until

MIGRATE = ("migrate", "--yes", "--strategy", "attach")

# While a session holds it, the index build waits, but no writer or reader does.
AS_A_WRITER = "LOCK TABLE webhook_log IN ROW EXCLUSIVE MODE"

TABLES: list[tuple[KeyType, TimestampType]] = [
    ("serial", "timestamptz"),
    ("identity", "timestamp"),
    ("identity always", "timestamptz"),
    ("uuid", "timestamp"),
]


def building(url: str) -> int | None:
    """The pid of the session that builds an index and waits for writers; None if there is none."""
    rows = query(
        url, "SELECT pid FROM pg_stat_progress_create_index WHERE phase LIKE 'waiting for writers%%'"
    )
    return int(rows[0][0]) if rows else None


def valid(url: str, index: str) -> bool | None:
    """Whether an index is valid; None if there is no such index."""
    rows = query(url, "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(%s)", index)
    return rows[0][0] if rows else None


@pytest.mark.parametrize(("key_type", "timestamp_type"), TABLES)
def test_migrate_and_rollback_keep_the_file_and_the_schema(
    database: str, pg_bin: Path, key_type: KeyType, timestamp_type: TimestampType
) -> None:
    with live(database, key_type, timestamp_type) as table:
        before = dump(database, pg_bin)
        node = value(database, "SELECT pg_relation_filenode('webhook_log')")
        table.run(*MIGRATE, swaps=1)
        assert phase(database) == "migrated"
        assert value(database, "SELECT pg_relation_filenode('webhook_log_history')") == node
        table.run(*ROLLBACK, swaps=1)
        assert phase(database) is None
        assert value(database, "SELECT pg_relation_filenode('webhook_log')") == node
        assert dump(database, pg_bin) == before
        assert min(table.readers.reads.values()) > 10


@pytest.mark.parametrize(("key_type", "timestamp_type"), TABLES[2:])
def test_held_before_the_swap_it_can_be_resumed(
    database: str, pg_bin: Path, key_type: KeyType, timestamp_type: TimestampType
) -> None:
    with live(database, key_type, timestamp_type) as table:
        before = dump(database, pg_bin)
        output = table.run(*MIGRATE, "--hold")
        assert "[Step 6/6]" not in output
        assert "UTC on fail until the swap" in output
        assert phase(database) == "ready"
        assert is_plain(database)
        output = table.run(*RESUME, swaps=1)
        assert "[Step 6/6]" in output
        assert phase(database) == "migrated"
        table.run(*ROLLBACK, swaps=1)
        assert dump(database, pg_bin) == before


@pytest.mark.parametrize("way_out", ["resume", "rollback"])
@pytest.mark.parametrize(("key_type", "timestamp_type"), TABLES[:2])
def test_killed_while_the_index_is_built_it_resumes_or_rolls_back(
    database: str, pg_bin: Path, key_type: KeyType, timestamp_type: TimestampType, way_out: str
) -> None:
    with live(database, key_type, timestamp_type) as table:
        before = dump(database, pg_bin)
        with holding(database, AS_A_WRITER):
            Run(database, *MIGRATE).kill_when(lambda: building(database), "the index waits")
        assert phase(database) == "copying"
        table.check()
        if way_out == "resume":
            table.run(*RESUME, swaps=1)
            assert phase(database) == "migrated"
            table.run(*ROLLBACK, swaps=1)
        else:
            table.run(*ROLLBACK)
        assert phase(database) is None
        assert dump(database, pg_bin) == before


@pytest.mark.parametrize(("key_type", "timestamp_type"), TABLES)
def test_a_failed_swap_is_rolled_back(
    database: str, pg_bin: Path, key_type: KeyType, timestamp_type: TimestampType
) -> None:
    with live(database, key_type, timestamp_type) as table:
        query(database, REFUSE.format(pattern="'%RENAME TO \"webhook_log_history\"%'"))
        before = dump(database, pg_bin)
        output = table.run(*MIGRATE, code=1)
        assert "step 6 " in output
        assert "rolled back: webhook_log is the plain table it was" in output
        assert phase(database) is None
        assert dump(database, pg_bin) == before


def test_foreign_keys_that_fail_after_the_swap_are_adopted_by_resume(database: str, pg_bin: Path) -> None:
    with live(database) as table:
        refuse = REFUSE.format(pattern='\'%ALTER TABLE "public"."webhook_log" ADD CONSTRAINT%FOREIGN KEY%\'')
        before = dump(database, pg_bin)
        query(database, refuse)
        output = table.run(*MIGRATE, code=3, swaps=1)
        assert "--resume" in output
        assert phase(database) == "migrated"
        query(database, "DROP EVENT TRIGGER refuse; DROP FUNCTION refuse")
        table.run(*RESUME)
        key = "SELECT count(*) FROM pg_constraint WHERE conrelid = 'webhook_log'::regclass AND contype = 'f'"
        assert value(database, key) == 1
        table.run(*ROLLBACK, swaps=1)
        assert dump(database, pg_bin) == before


# Everything that a table can have


@pytest.mark.parametrize(
    "identity", ["bigserial", "bigint GENERATED ALWAYS AS IDENTITY (START WITH 7 CACHE 2)"]
)
def test_everything_on_the_table_is_migrated_and_rolled_back(
    make_database: MakeDatabase, pg_bin: Path, identity: str
) -> None:
    url = make_database()
    kitchen_sink(url, identity=identity)
    try:
        refused = chronos(url, *MIGRATE)
        assert refused.returncode == 2
        assert "late check" in refused.stderr
        assert "[check-not-validated]" in refused.stderr
        query(url, 'ALTER TABLE "Hooks".webhook_log VALIDATE CONSTRAINT "late check"')
        before = dump(url, pg_bin)
        noted = query(url, 'SELECT what, count(*) FROM "Hooks".audit GROUP BY 1 ORDER BY 1')

        result = chronos(url, *MIGRATE)
        assert result.returncode == 0, result.stdout + result.stderr
        assert value(url, 'SELECT "Hooks".how_many()') == 2600
        assert query(url, 'SELECT what, count(*) FROM "Hooks".audit GROUP BY 1 ORDER BY 1') == noted
        # A current row and one beyond the bound, as the application writes them.
        query(url, 'TRUNCATE "Hooks".audit')
        for day in (0, 9):
            query(url, "INSERT INTO \"Hooks\".inbox VALUES ('failed', now() + %s * interval '1 day')", day)
            assert [row[0] for row in query(url, 'SELECT what FROM "Hooks".audit ORDER BY 1')] == [
                "Always There INSERT",
                "at_commit INSERT",
                "by_statement INSERT",
                "on_write INSERT",
            ]
            query(url, 'DELETE FROM "Hooks".webhook_log WHERE id = -1; TRUNCATE "Hooks".audit')

        result = chronos(url, *ROLLBACK)
        assert result.returncode == 0, result.stdout + result.stderr
        assert dump(url, pg_bin) == before
        assert value(url, 'SELECT count(*) FROM "Hooks".audit') == 0
        assert value(url, 'SELECT "Hooks".how_many()') == 2600
    finally:
        forget(url)


@pytest.mark.parametrize("table", [table for table in ALL if table.live], ids=str)
def test_tables_of_real_projects_migrate_and_roll_back(database: str, pg_bin: Path, table: Real) -> None:
    schema, spec = create(database, table), table.spec
    if table is OBAN:  # as the refusal says; see the kitchen sink
        query(database, "ALTER TABLE oban_jobs VALIDATE CONSTRAINT non_negative_priority")
    loaded = fill(database, schema, 1_000)
    before, rows = dump(database, pg_bin), untouched(database, schema)
    engine = connect_engine(make_url(database))
    with (
        Application(database, loaded, threads=2, rate=80) as application,
        Readers(database, loaded, application, pause_s=0.02) as readers,
    ):
        migrate(engine, spec, Options(strategy=Strategy.ATTACH), operator(), lambda found: None)
        kind = value(database, "SELECT relkind::text FROM pg_class WHERE oid = %s::regclass", schema.name)
        assert kind == "p"
        check(application, readers)
        undo(engine, spec, operator(), lambda found, by_hand: None)
        check(application, readers)
    assert not application.compare()
    assert untouched(database, schema) == rows
    assert dump(database, pg_bin) == before


# Interruptions


@pytest.mark.parametrize("stopped", ["the backend is ended", "Ctrl-C"])
def test_an_interrupted_index_build_is_repeated(database: str, pg_bin: Path, stopped: str) -> None:
    load(database, 1_000)
    before = dump(database, pg_bin)
    with holding(database, AS_A_WRITER), started(database, *MIGRATE) as migration:
        pid = wait_until(lambda: building(database), 30, "the index waits")
        if stopped == "Ctrl-C":
            migration.send_signal(signal.SIGINT)
            output, errors = migration.communicate(timeout=30)
            assert migration.returncode == 3, output + errors
            assert "--resume" in errors
        else:
            migration.send_signal(signal.SIGSTOP)  # it must not clean up what the backend leaves behind
            query(database, "SELECT pg_terminate_backend(%s)", pid)
            wait_until(lambda: building(database) is None, 30, "the backend is gone")
            os.kill(migration.pid, signal.SIGKILL)
    wait_until(lambda: not sessions(database), 30, "its sessions are gone")
    assert valid(database, "webhook_log_history_pkey") is False
    assert phase(database) == "copying"
    resumed = chronos(database, *RESUME)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert phase(database) == "migrated"
    assert chronos(database, *ROLLBACK).returncode == 0
    assert dump(database, pg_bin) == before


def test_a_rollback_killed_while_it_builds_the_old_key_can_be_repeated(database: str, pg_bin: Path) -> None:
    with live(database) as table:
        before = dump(database, pg_bin)
        table.run(*MIGRATE, swaps=1)
        with holding(database, AS_A_WRITER), started(database, *ROLLBACK) as rollback:
            pid = wait_until(lambda: building(database), 30, "the index waits")
            os.kill(rollback.pid, signal.SIGKILL)
            rollback.wait(30)
            query(database, "SELECT pg_terminate_backend(%s)", pid)
        wait_until(lambda: not sessions(database), 30, "its sessions are gone")
        assert valid(database, "webhook_log_pkey_old") is False
        assert phase(database) == "migrated"
        table.check()
        table.run(*ROLLBACK, swaps=1)
        assert dump(database, pg_bin) == before


def sessions(url: str) -> list[tuple[object, ...]]:
    """The chronos sessions that are still connected."""
    return query(
        url,
        "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'chronos%%'"
        " AND datname = current_database()",
    )
