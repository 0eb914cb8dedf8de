"""Strategy attach: nothing is copied, the table itself becomes the partition of all before a bound."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from tests.command import Run
from tests.live import KeyType, TimestampType, phase
from tests.tables import dump, exists, holding, query, value
from tests.test_complete_at_every_instant import RESUME, ROLLBACK, is_plain, live
from tests.test_migration import REFUSE
from tests.waiting import wait_until

MIGRATE = ("migrate", "--yes", "--strategy", "attach")

# Whoever holds it keeps the index waiting, and no writer and no reader.
AS_A_WRITER = "LOCK TABLE webhook_log IN ROW EXCLUSIVE MODE"

TABLES: list[tuple[KeyType, TimestampType]] = [
    ("serial", "timestamptz"),
    ("identity", "timestamp"),
    ("identity always", "timestamptz"),
    ("uuid", "timestamp"),
]


def building(url: str) -> int | None:
    """The pid of the session that builds an index and waits for writers; None when there is none."""
    rows = query(url, "SELECT pid FROM pg_stat_progress_create_index WHERE phase LIKE 'waiting for writers%%'")
    return int(rows[0][0]) if rows else None


def valid(url: str, index: str) -> bool | None:
    """Whether an index is valid; None when there is none."""
    rows = query(url, "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(%s)", index)
    return rows[0][0] if rows else None


@pytest.mark.parametrize(("key_type", "timestamp_type"), TABLES)
def test_there_and_back(
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
def test_held_before_the_swap_and_resumed(
    database: str, pg_bin: Path, key_type: KeyType, timestamp_type: TimestampType
) -> None:
    with live(database, key_type, timestamp_type) as table:
        before = dump(database, pg_bin)
        output = table.run(*MIGRATE, "--hold")
        assert "[Step 6/6]" not in output
        assert "inserts fail until it has" in output
        assert phase(database) == "ready"
        assert is_plain(database)
        output = table.run(*RESUME, swaps=1)
        assert "[Step 6/6]" in output
        assert phase(database) == "migrated"
        table.run(*ROLLBACK, swaps=1)
        assert dump(database, pg_bin) == before


@pytest.mark.parametrize("way_out", ["resume", "rollback"])
@pytest.mark.parametrize(("key_type", "timestamp_type"), TABLES[:2])
def test_killed_while_the_index_is_built(
    database: str, pg_bin: Path, key_type: KeyType, timestamp_type: TimestampType, way_out: str
) -> None:
    with live(database, key_type, timestamp_type) as table:
        before = dump(database, pg_bin)
        with holding(database, AS_A_WRITER):
            migration = Run(database, *MIGRATE)
            try:
                wait_until(lambda: building(database), 30, "the index waits")
            finally:
                with suppress(ProcessLookupError):
                    os.kill(migration.pid, signal.SIGKILL)
                killed = migration.finish()
        assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
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
def test_a_failing_swap_is_put_back(
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
        refuse = REFUSE.format(pattern="'%ALTER TABLE \"public\".\"webhook_log\" ADD CONSTRAINT%FOREIGN KEY%'")
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
