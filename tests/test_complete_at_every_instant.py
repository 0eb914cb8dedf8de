"""Whatever happens to the table, no reader misses a row, and the application hits its rows every time.

The application with its model and the four kinds of readers come from tests/live.py.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.command import Run, chronos
from tests.live import Application, KeyType, Readers, TimestampType, load, oldest, phase
from tests.tables import connected, query, relations, value
from tests.waiting import wait_until

ROWS = 4_000

MIGRATE = ("migrate", "--yes")
RESUME = ("migrate", "--yes", "--resume")
ROLLBACK = ("rollback", "--yes")
# Slow enough to be interrupted in the middle of the copy.
SLOWLY = ("--workers", "1", "--batch-size", "25", "--rate-limit", "1000")


@dataclass
class Live:
    """A table in use. ``swaps`` counts how often its name went to another table."""

    url: str
    application: Application
    readers: Readers
    swaps: int = 0

    def run(self, *arguments: str, code: int = 0, swaps: int = 0) -> str:
        """Run a command to its end; returns everything it printed."""
        result = chronos(self.url, *arguments)
        output = result.stdout + result.stderr
        assert result.returncode == code, output
        self.swaps += swaps
        self.check()
        return output

    def check(self) -> None:
        """All sessions carry on, none has missed anything so far, and each row matches the model."""
        self.application.go_on()
        self.readers.go_on()
        assert not self.application.errors, self.application.errors[:3]
        assert not self.readers.short, self.readers.short[:3]
        assert not self.readers.errors, self.readers.errors[:3]
        assert self.readers.replanned <= self.swaps
        difference = self.application.compare(since=oldest(self.url))
        assert not difference, difference


@contextmanager
def live(
    url: str, key_type: KeyType = "serial", timestamp_type: TimestampType = "timestamptz", rows: int = ROWS
) -> Iterator[Live]:
    """A table with an application and readers at work."""
    loaded = load(url, rows, key_type=key_type, timestamp_type=timestamp_type)
    with Application(url, loaded) as application, Readers(url, loaded, application) as readers:
        yield Live(url, application, readers)


def is_plain(url: str) -> bool:
    return bool(value(url, "SELECT relkind = 'r' FROM pg_class WHERE oid = 'webhook_log'::regclass"))


def partition_with_rows(url: str) -> str | None:
    """A partition that has rows while the table in use is still the plain one."""
    names = query(url, "SELECT relname FROM pg_class WHERE relkind = 'r' AND relname LIKE 'webhook_log_y%%'")
    leaves = [name for (name,) in names if re.fullmatch(r"webhook_log_y\d{4}m\d\dd\d\d", name)]
    if phase(url) != "copying" or not leaves:
        return None
    parts = [f"(SELECT '{leaf}' FROM {leaf} LIMIT 1)" for leaf in leaves]
    found = query(url, " UNION ALL ".join(parts) + " LIMIT 1")
    return found[0][0] if found else None


def notes(url: str) -> int:
    waiting: int = value(url, "SELECT count(*) FROM webhook_log_migration_changes")
    return waiting


def test_hidden_rows_are_noticed(database: str) -> None:
    """A test of the readers and the application: they must notice what they are there for."""
    loaded = load(database, ROWS)
    with Application(database, loaded) as application, Readers(database, loaded, application) as readers:
        wait_until(lambda: len(application.newest()) > 5, 20, "there are new rows")
        assert not readers.short, readers.short[:3]
        hidden = loaded.counted()[::2]
        with connected(database, autocommit=False) as conn, conn.cursor() as cursor:
            cursor.execute("LOCK TABLE webhook_log")
            newest = application.newest()
            cursor.execute("ALTER TABLE webhook_log RENAME TO webhook_log_before")
            cursor.execute("CREATE TABLE webhook_log (LIKE webhook_log_before INCLUDING ALL)")
            cursor.execute(
                "INSERT INTO webhook_log SELECT * FROM webhook_log_before WHERE id <> ALL (%s)",
                (hidden + newest,),
            )
            conn.commit()
        wait_until(
            lambda: {short.kind for short in readers.short} == {"count", "key", "newest", "repeatable"},
            20,
            "readers of each kind miss rows",
        )
        difference = application.compare()
        assert set(difference.missing) == {*hidden, *newest}
        assert not difference.extra
        assert not difference.different
        assert not application.errors, application.errors[:3]
        query(database, "UPDATE webhook_log SET status_code = 0 WHERE id = %s", loaded.counted()[1])
        query(database, "INSERT INTO webhook_log (id, status, timestamp) VALUES (-1, 'sent', now())")
        difference = application.compare()
        assert difference.extra == [-1]
        assert difference.different == {loaded.counted()[1]: {"status_code": (200, 0)}}
        query(database, "DELETE FROM webhook_log WHERE status <> 'untouched'")
        wait_until(lambda: application.errors, 20, "the application misses its rows")
    assert not readers.errors, readers.errors[:3]
    assert readers.replanned == 1


@pytest.mark.parametrize(
    ("key_type", "timestamp_type"),
    [("serial", "timestamptz"), ("identity", "timestamp"), ("uuid", "timestamptz")],
)
def test_migrate_and_rollback_hide_no_row(
    database: str, key_type: KeyType, timestamp_type: TimestampType
) -> None:
    with live(database, key_type, timestamp_type) as table:
        before = relations(database)
        table.run(*MIGRATE, swaps=1)
        assert phase(database) == "migrated"
        table.run(*ROLLBACK, swaps=1)
        assert phase(database) is None
        assert relations(database) == before
        assert min(table.readers.reads.values()) > 10


@pytest.mark.parametrize(
    ("way_out", "key_type", "timestamp_type"),
    [("resume", "uuid", "timestamp"), ("rollback", "serial", "timestamptz")],
)
def test_killed_during_the_copy_it_resumes_or_rolls_back(
    database: str, way_out: str, key_type: KeyType, timestamp_type: TimestampType
) -> None:
    with live(database, key_type, timestamp_type) as table:
        migration = Run(database, *MIGRATE, *SLOWLY)
        migration.kill_when(lambda: partition_with_rows(database), "some rows are copied")
        assert phase(database) == "copying"
        table.check()
        if way_out == "resume":
            table.run(*RESUME, swaps=1)
            assert phase(database) == "migrated"
        else:
            table.run(*ROLLBACK)
            assert phase(database) is None


def test_held_before_the_swap_later_changes_are_replayed(database: str) -> None:
    """Everything but the swap; what piles up meanwhile is replayed on request, and before the swap."""
    with live(database, "identity always", "timestamptz") as table:
        output = table.run(*MIGRATE, "--hold")
        assert "[Step 5/6]" in output
        assert "[Step 6/6]" not in output
        assert phase(database) == "ready"
        wait_until(lambda: notes(database) > 500, 30, "notes pile up")
        # Far fewer come in while it replays, or while this checks.
        table.run(*RESUME, "--hold")
        assert phase(database) == "ready"
        assert notes(database) < 500
        assert is_plain(database)
        table.application.go_on(20)
        output = table.run(*RESUME, swaps=1)
        assert "[Step 6/6]" in output
        assert phase(database) == "migrated"


def test_a_failed_copy_is_rolled_back(database: str) -> None:
    """A check constraint that an old row no longer satisfies: copying that row fails."""
    with live(database) as table:
        key = table.application.loaded.counted()[-1]
        query(
            database,
            "CREATE TABLE broken (id bigint); CREATE FUNCTION sound(bigint) RETURNS boolean LANGUAGE sql"
            " AS 'SELECT NOT EXISTS (SELECT FROM public.broken WHERE id = $1)';"
            " ALTER TABLE webhook_log ADD CONSTRAINT sound CHECK (sound(id));"
            " INSERT INTO broken VALUES (%s)",
            key,
        )
        output = table.run(*MIGRATE, code=1)
        assert "sound" in output
        assert phase(database) is None
        assert is_plain(database)


def test_a_difference_after_the_swap_is_rolled_back(database: str) -> None:
    """Someone changes a row of the new table by hand, after it was compared: it rolls back by itself."""
    with live(database) as table:
        table.run(*MIGRATE, "--hold")
        table.application.go_on(20)
        table.run(*RESUME, "--hold")
        replayed = query(
            database,
            "SELECT r.id FROM webhook_log_migration_replayed r JOIN webhook_log w USING (id)"
            " WHERE w.status = 'kept' AND w.timestamp < now()"
            " AND r.id NOT IN (SELECT id FROM webhook_log_migration_changes)",
        )
        assert replayed
        assert query(
            database,
            "UPDATE webhook_log_new SET status_code = -1 WHERE id = %s RETURNING id",
            replayed[0][0],
        )
        # There and back again, or never there at all.
        table.run(*RESUME, code=1, swaps=2)
        assert phase(database) is None
        assert is_plain(database)


EXCLUSIVE_LOCKS = """
SELECT l.pid, l.virtualtransaction, (SELECT application_name FROM pg_stat_activity a WHERE a.pid = l.pid)
FROM pg_locks l
WHERE l.relation = to_regclass('webhook_log') AND l.mode = 'AccessExclusiveLock' AND l.granted
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  -- The number is 0 while a finished transaction is still releasing its locks.
  AND l.virtualtransaction !~ '/0$'
"""


@contextmanager
def exclusive_locks(url: str) -> Iterator[set[tuple[str, str]]]:
    """The transactions that hold ACCESS EXCLUSIVE on the table in use during the block.

    Each is identified by its application name and virtual transaction. Autovacuum, which takes such a lock to
    truncate empty pages at the end, has no name and is left out.
    """
    found: set[tuple[str, str]] = set()
    looking, ended = threading.Event(), threading.Event()

    def sample() -> None:
        with connected(url) as conn, conn.cursor() as cursor:
            while not ended.is_set():
                cursor.execute(EXCLUSIVE_LOCKS)
                found.update((name, f"{pid} {number}") for pid, number, name in cursor.fetchall() if name)
                looking.set()

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        assert looking.wait(20)
        yield found
    finally:
        ended.set()
        sampler.join()


def test_access_exclusive_is_taken_once_to_migrate_and_at_most_twice_to_roll_back(database: str) -> None:
    """On the table in use: one to migrate; to roll back, one for the names and one to drop the triggers.

    No other session holds a lock, so none is tried twice.
    """
    load(database, ROWS)
    with exclusive_locks(database) as there:
        result = chronos(database, *MIGRATE)
    assert result.returncode == 0, result.stdout + result.stderr
    with exclusive_locks(database) as back:
        result = chronos(database, *ROLLBACK)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [name for name, _ in there] == ["chronos migrate"]
    assert {name for name, _ in back} == {"chronos rollback"}
    assert len(back) <= 2


DASHBOARD_S = 3


class Dashboard(threading.Thread):
    """A reader that keeps running a three-second query; ``counts`` is what it found."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.stopping = threading.Event()
        self.counts: list[int] = []
        self._url = url

    def run(self) -> None:
        with connected(self._url) as conn, conn.cursor() as cursor:
            while not self.stopping.wait(0.2):
                cursor.execute(
                    f"SELECT pg_sleep({DASHBOARD_S}), count(*) FROM webhook_log WHERE status = 'untouched'"
                )
                self.counts += [number for _, number in cursor.fetchall()]


@pytest.mark.faults
def test_long_queries_delay_neither_the_copy_nor_writers(database: str) -> None:
    """Two dashboards, one of which is always reading: 60,000 rows in two minutes, and no writer stuck."""
    loaded = load(database, 60_000, days=13, width=1)
    dashboards = [Dashboard(database), Dashboard(database)]
    with Application(database, loaded) as application:
        dashboards[0].start()
        dashboards[1].stopping.wait(DASHBOARD_S / 2)
        dashboards[1].start()
        began = time.monotonic()
        result = chronos(database, *MIGRATE)
        seconds = time.monotonic() - began
        seen = [len(dashboard.counts) for dashboard in dashboards]
        for dashboard, number in zip(dashboards, seen, strict=True):
            wait_until(
                lambda dashboard=dashboard, number=number: len(dashboard.counts) > number + 1,  # type: ignore[misc]
                20,
                "the dashboards keep reading",
            )
            dashboard.stopping.set()
        for dashboard in dashboards:
            dashboard.join()
    assert result.returncode == 0, result.stdout + result.stderr
    assert seconds < 120
    assert not application.errors, application.errors[:3]
    assert application.longest_s < 2.5, application.slowest
    assert not application.compare(since=oldest(database))
    for dashboard in dashboards:
        assert set(dashboard.counts) == {len(loaded.untouched)}
