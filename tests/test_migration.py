"""The migration through its command line: what it prints, what it leaves behind, what it refuses."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from psycopg2.extensions import connection
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.pool import NullPool
from sqlmodel import Session, select

from chronos.db import connect_engine
from chronos.demo.rows import KeyType, TimestampType, create_webhook_log
from chronos.demo.writer import LiveWriter
from chronos.migration.console import Output
from chronos.migration.context import Migration
from chronos.migration.operator import Operator
from chronos.migration.run import Options
from chronos.migration.run import migrate as run_migration
from chronos.sql_models import WebhookEndpoint, WebhookLog
from chronos.table import WEBHOOK_LOG
from tests.command import chronos, chronos_environment, started
from tests.conftest import MakeDatabase
from tests.tables import (
    closed_gate,
    connected,
    digest,
    exists,
    gate_before_the_last_word,
    gate_in_the_copy,
    holding,
    pid_at_the_gate,
    planned,
    query,
    relations,
    value,
)
from tests.waiting import wait_until

ROWS = 4_000


def fill(
    url: str, rows: int = ROWS, timestamp_type: TimestampType = "timestamptz", key_type: KeyType = "serial"
) -> None:
    engine = create_engine(url, poolclass=NullPool)
    create_webhook_log(engine, rows, timestamp_type=timestamp_type, key_type=key_type)


def window(url: str) -> str:
    """The condition for the rows of the window, from the stored cutoff."""
    cutoff = planned(url, "cutoff").astimezone(UTC).replace(tzinfo=None)
    return f"extract(epoch FROM timestamp) >= extract(epoch FROM timestamp '{cutoff}')"


def state(url: str) -> tuple[str, bool] | None:
    """The phase of the migration, and whether the noted rows were compared after the swap."""
    if not exists(url, "webhook_log_migration"):
        return None
    [[phase, verified]] = query(url, "SELECT phase, verified FROM webhook_log_migration")
    return phase, verified


AWKWARD_ROWS = """
INSERT INTO webhook_log (status, timestamp, webhook_endpoint_id, request_body)
SELECT status, {utc_as_column}, 1, body
FROM (SELECT now() AT TIME ZONE 'UTC' AS now, date_trunc('day', now() AT TIME ZONE 'UTC') AS today) AS clock
CROSS JOIN LATERAL (
    SELECT 'tie' AS status, today - interval '3 days' + interval '5 hours' AS utc, to_jsonb(n) AS body
    FROM generate_series(5000, 1, -1) n
    UNION ALL SELECT 'midnight', today - n * interval '1 day', 'null' FROM generate_series(0, 15) n
    UNION ALL SELECT 'end', today - n * interval '1 day' - interval '1 us', NULL FROM generate_series(0, 13) n
    UNION ALL SELECT 'large', now - interval '2 days', to_jsonb(string_agg(md5(n::text), ''))
    FROM generate_series(1, 163840) n
    UNION ALL SELECT 'ahead', now + interval '29 days', NULL
) AS awkward
"""


def add_awkward_rows(url: str, timestamp_type: TimestampType) -> None:
    """5,000 rows at one instant, rows at each midnight and just before it, 5 MB of JSON, a day far ahead."""
    utc = "utc" if timestamp_type == "timestamp" else "utc AT TIME ZONE 'UTC'"
    query(url, AWKWARD_ROWS.format(utc_as_column=utc))


@pytest.mark.parametrize(
    ("timestamp_type", "timezone"),
    [("timestamptz", "Asia/Kolkata"), ("timestamp", "America/New_York"), ("timestamptz", None)],
)
def test_a_live_table_with_awkward_rows_is_migrated_whole(
    make_database: MakeDatabase, tmp_path: Path, timestamp_type: TimestampType, timezone: str | None
) -> None:
    url = make_database(timezone)
    fill(url, timestamp_type=timestamp_type)
    add_awkward_rows(url, timestamp_type)
    report_file = tmp_path / "report.json"

    with LiveWriter(url, threads=4, rate=300, past_share=0.2) as writer:
        wait_until(lambda: len(writer.commits) > 20, 20, "the writer writes")
        result = chronos(url, "migrate", "--report", str(report_file), answer="MIGRATE\n")
        seen = len(writer.commits)
        wait_until(lambda: len(writer.commits) > seen + 20, 20, "the writer keeps writing")

    assert result.returncode == 0, result.stdout + result.stderr
    assert_nothing_lost(url, writer)
    fence = value(url, "SELECT fence FROM webhook_log_migration")
    old = digest(url, "webhook_log_old", window(url))
    assert old == digest(url, "webhook_log", "id IN (SELECT id FROM webhook_log_old)")
    assert value(url, "SELECT count(*) FROM pg_tables WHERE tablename LIKE 'webhook_log_y%'") == 46
    report = json.loads(report_file.read_text())
    assert datetime.fromisoformat(report["fence"]) == fence
    assert old[0] >= report["happened"]["rows"] >= ROWS // 2
    assert report["happened"]["rows"] == sum(period["new_rows"] for period in report["periods"])
    assert all(period["alike"] and period["old_rows"] == period["new_rows"] for period in report["periods"])
    assert [step["step"] for step in report["steps"]] == [1, 2, 3, 4, 5, 6]
    assert (report["table"], report["strategy"]) == ("public.webhook_log", "copy")
    assert report["happened"]["wal_bytes"] > 0
    # Each bound is a UTC midnight, whatever the server's time zone.
    with connected(url) as conn, conn.cursor() as cursor:
        cursor.execute("SET timezone = 'UTC'")
        cursor.execute(
            "SELECT c.relname, pg_get_expr(c.relpartbound, c.oid) FROM pg_inherits JOIN pg_class c"
            " ON c.oid = inhrelid WHERE inhparent = 'webhook_log'::regclass"
        )
        for name, bound in cursor.fetchall():
            year, month, day = re.findall(r"\d+", name)
            assert f"FROM ('{year}-{month}-{day} 00:00:00" in bound


def test_migrate_prints_what_the_guide_shows(database: str) -> None:
    fill(database)

    result = chronos(database, "migrate", "--yes")

    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    rows = digest(database, "webhook_log_old", window(database))[0]
    first, today, end = (planned(database, what).astimezone(UTC) for what in ("first", "started_at", "end"))
    lines = result.stdout.splitlines()
    expected = [
        "=" * 80,
        "Starting PostgreSQL Partitioning Migration",
        "=" * 80,
        "",
        "[Step 1/6] Creating new partitioned table...",
        "✓ Partitioned table created",
        "",
        "[Step 2/6] Creating partitions...",
        f"Created partition: webhook_log_{first:y%Ym%md%d} ({first:%Y-%m-%d} to ",
        "✓ All partitions created",
        "",
        "[Step 3/6] Migrating data from last 15 days...",
        f"Total rows to migrate: {rows:,}",
        f"Migrated {rows:,} / {rows:,} rows (100.0%)",
        "✓ Data migration complete",
        "",
        "[Step 4/6] Creating partition management functions...",
        "✓ Management functions created",
        "",
        "[Step 5/6] Verifying migration...",
        f"Old table (last 15 days): {rows:,} rows",
        f"New table: {rows:,} rows",
        "✓ Verification passed: row counts and contents match",
        "",
        "[Step 6/6] Renaming existing webhook_log table...",
        "✓ Table renamed: webhook_log -> webhook_log_old",
        "",
        "=" * 80,
        "MIGRATION COMPLETED SUCCESSFULLY!",
        "=" * 80,
        "",
        "Period",
        f"{today:%Y-%m-%d}",
        "",
        "Step",
        "3 Migrating data from last 15 days",
        "",
        f"{rows:,} rows copied; ",
        "",
        "Next: make restart-worker",
    ]
    position = 0
    for line in expected:
        position = next(n for n in range(position, len(lines)) if lines[n].startswith(line)) + 1
    assert sum(line.startswith("Created partition: ") for line in lines) == 46
    assert (end - today).days == 30
    assert (today - first).days == 15


def test_migrate_keeps_names_constraints_and_sequence(database: str) -> None:
    fill(database)
    shape = (
        "SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,"
        " pg_get_expr(d.adbin, d.adrelid) FROM pg_attribute a"
        " LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum"
        " WHERE attrelid = 'webhook_log'::regclass AND attnum > 0 ORDER BY attnum"
    )
    indexes = (
        "SELECT indexname, replace(indexdef, ' ONLY ', ' ') FROM pg_indexes WHERE tablename = 'webhook_log'"
    )
    keys = (
        "SELECT conname, contype::text, pg_get_constraintdef(oid), convalidated FROM pg_constraint"
        " WHERE conrelid = 'webhook_log'::regclass AND contype IN ('f', 'c')"
    )
    before = query(database, shape), sorted(query(database, indexes)), query(database, keys)

    assert chronos(database, "migrate", "--yes").returncode == 0

    after = query(database, shape), sorted(query(database, indexes)), query(database, keys)
    assert after[0] == before[0]
    assert after[2] == before[2]
    assert [name for name, _ in after[1]] == [name for name, _ in before[1]]
    assert dict(after[1])["webhook_log_pkey"].endswith('(id, "timestamp")')
    assert dict(after[1])["ix_webhook_log_timestamp"] == dict(before[1])["ix_webhook_log_timestamp"]
    assert value(
        database, "SELECT bool_and(indisvalid) FROM pg_index WHERE indrelid = 'webhook_log'::regclass"
    )
    # The parent's foreign key has adopted each partition's; none stands alone.
    assert (
        value(
            database,
            "SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND conparentid = 0"
            " AND conrelid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = 'webhook_log'::regclass)",
        )
        == 0
    )
    highest = value(database, "SELECT max(id) FROM webhook_log_old")
    assert (
        value(database, "INSERT INTO webhook_log (status, timestamp) VALUES ('new', now()) RETURNING id")
        > highest
    )


def test_retention_of_ninety_days_copies_ninety_days(database: str) -> None:
    create_webhook_log(connect_engine(make_url(database)), 2_000, days=100)

    result = chronos(database, "migrate", "--yes", env={"WEBHOOK_LOG_RETENTION_DAYS": "90"})

    assert result.returncode == 0, result.stderr
    assert "Migrating data from last 90 days..." in result.stdout
    assert result.stdout.count("Created partition: ") == 90 + 1 + 30
    rows, kept = (
        value(database, f"SELECT count(*) FROM {table} WHERE timestamp >= %s", planned(database, "cutoff"))
        for table in ("webhook_log", "webhook_log_old")
    )
    assert rows == kept > 1_700


@pytest.mark.parametrize("rows_are", ["none", "all too old"])
def test_a_table_with_nothing_to_copy_is_migrated(database: str, rows_are: str) -> None:
    fill(database, 0)
    if rows_are == "all too old":
        query(
            database, "INSERT INTO webhook_log (status, timestamp) SELECT 'old', now() - interval '16 days'"
        )

    result = chronos(database, "migrate", "--yes")

    assert result.returncode == 0, result.stderr
    assert "Total rows to migrate: 0" in result.stdout
    assert digest(database)[0] == 0
    assert value(database, "INSERT INTO webhook_log (status, timestamp) VALUES ('x', now()) RETURNING id") > 0


@pytest.mark.parametrize("answer", ["", "migrate\n", "MIGRATE please\n", " MIGRATE\n", "yes\n", "\n"])
def test_only_the_exact_word_confirms(database: str, answer: str) -> None:
    fill(database, 10)
    before = relations(database)

    result = chronos(database, "migrate", answer=answer)

    assert result.returncode == 2
    assert "nothing was changed" in result.stderr
    assert relations(database) == before


def test_prompt_shows_where_without_the_password(database: str) -> None:
    fill(database, 10)
    password = "Pa55-in-the-URL"
    role = f"chronos_prompt_{value(database, 'SELECT pg_backend_pid()')}"
    query(database, f"CREATE ROLE {role} LOGIN SUPERUSER PASSWORD '{password}'")
    try:
        engine = create_engine(database)
        url = engine.url.set(username=role, password=password).render_as_string(hide_password=False)

        result = chronos(url, "migrate", answer="no\n")
    finally:
        query(database, f"DROP ROLE {role}")

    shown = result.stdout + result.stderr
    assert f"Host: {engine.url.host}" in shown
    assert f"Port: {engine.url.port}" in shown
    assert f"Database: {engine.url.database}" in shown
    assert f"User: {role}   TESTING: false" in shown
    assert "wait for a lock at most 1 s at a time (--max-lock-wait)" in shown
    assert "public.webhook_log" in shown
    assert re.search(r"Rows \(estimate\): 10\b", shown)
    assert "Type MIGRATE" in shown
    assert password not in shown


REFUSE = """
CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
    IF current_query() LIKE {pattern} THEN
        RAISE EXCEPTION 'refused';
    END IF;
END
$$;
CREATE EVENT TRIGGER refuse ON ddl_command_start EXECUTE FUNCTION refuse()
"""


# Ways to make each step really fail.
@pytest.mark.parametrize(
    ("step", "conflict"),
    [
        (1, REFUSE.format(pattern="'%PARTITION BY RANGE%'")),
        (2, REFUSE.format(pattern="'%FOR VALUES FROM%'")),
        (
            3,
            "CREATE TABLE broken (id bigint); CREATE FUNCTION sound(bigint) RETURNS boolean LANGUAGE sql"
            " AS 'SELECT NOT EXISTS (SELECT FROM public.broken WHERE id = $1)';"
            " ALTER TABLE webhook_log ADD CONSTRAINT sound CHECK (sound(id));"
            " INSERT INTO broken SELECT max(id) - 50 FROM webhook_log",
        ),
        (
            4,
            "CREATE FUNCTION drop_old_webhook_log_partitions(days int) RETURNS int"
            " LANGUAGE sql AS 'SELECT 1';"
            " CREATE VIEW depends AS SELECT drop_old_webhook_log_partitions(1)",
        ),
        (5, REFUSE.format(pattern="'%RESET (autovacuum_enabled%'")),
        (6, REFUSE.format(pattern="'%RENAME TO \"webhook_log_old\"%'")),
    ],
)
def test_a_failing_step_is_rolled_back(database: str, step: int, conflict: str) -> None:
    fill(database)
    query(database, conflict)
    before = relations(database)

    with LiveWriter(database, threads=2, rate=200, past_share=0.2) as writer:
        wait_until(lambda: len(writer.commits) > 20, 20, "the writer writes")
        result = chronos(database, "migrate", "--yes")
        seen = len(writer.commits)
        wait_until(lambda: len(writer.commits) > seen + 20, 20, "the writer keeps writing")

    assert result.returncode == 1, result.stdout + result.stderr
    assert f"step {step} " in result.stderr
    assert "rolled back: webhook_log is the plain table it was" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert_plain_again(database, before, writer)


def test_a_full_disk_during_the_copy_is_rolled_back_with_a_remedy(database: str) -> None:
    """The server is made to raise the error: no test can fill a disk that others use."""
    fill(database)
    query(
        database,
        "CREATE TABLE disk (full_from bigint);"
        " CREATE FUNCTION room(bigint) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN"
        " IF $1 = (SELECT full_from FROM public.disk) THEN RAISE disk_full USING MESSAGE ="
        " 'could not extend file \"base/5/16399\": No space left on device'; END IF; RETURN true; END $$;"
        " ALTER TABLE webhook_log ADD CONSTRAINT disk CHECK (room(id));"
        " INSERT INTO disk SELECT max(id) - 100 FROM webhook_log",
    )
    before, rows = relations(database), digest(database)

    result = chronos(database, "migrate", "--yes")

    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert "step 3 " in line
    assert "could not extend file" in line
    assert "rolled back: webhook_log is the plain table it was before, with every row. Make room" in line
    assert line.endswith(" --strategy attach [disk-full]"), line
    assert (relations(database), digest(database)) == (before, rows)


def test_the_model_is_looked_up_by_both_parts_of_its_key(database: str) -> None:
    fill(database, 100)
    assert chronos(database, "migrate", "--yes").returncode == 0
    with Session(connect_engine(make_url(database))) as session:
        row = session.exec(select(WebhookLog)).first()
        assert row is not None
        found = session.get(WebhookLog, (row.id, row.timestamp))
        assert found is row
        with pytest.raises(InvalidRequestError, match="Incorrect number of values in identifier"):
            session.get(WebhookLog, row.id)


def test_a_backend_killed_during_the_copy_keeps_what_is_copied(database: str) -> None:
    """A lost connection does not cost the hours that a copy took."""
    fill(database)
    before = {*relations(database), ("function", "passes_gate(bigint)"), ("function", "at_the_gate()")}
    with LiveWriter(database, threads=2, rate=200, past_share=0.2) as writer:
        with stopped_in_the_copy(database) as migration:
            query(database, "SELECT pg_terminate_backend(%s)", pid_at_the_gate(database))
            migration.release()
            output, errors = migration.process.communicate(timeout=60)
        assert migration.process.returncode == 3, output + errors
        assert "in step 3; nothing is lost" in errors
        assert "--resume" in errors
        assert state(database) == ("copying", False)
        resumed = chronos(database, "migrate", "--yes", "--resume")
        assert resumed.returncode == 0, resumed.stderr
        assert chronos(database, "rollback", "--yes").returncode == 0
    assert_plain_again(database, before, writer)


def test_a_backend_killed_while_it_waits_for_the_swap_keeps_the_copy(database: str) -> None:
    """What is copied and compared is not discarded because a connection was lost."""
    fill(database)
    with LiveWriter(database, threads=2, rate=200, past_share=0.2) as writer:
        with (
            holding(database, "SELECT FROM webhook_log LIMIT 1"),
            started(database, "migrate", "--yes") as process,
        ):
            query(database, "SELECT pg_terminate_backend(%s)", waiting_for_the_swap(database))
            output, errors = process.communicate(timeout=60)
        assert process.returncode == 3, output + errors
        assert "in step 6; nothing is lost" in errors
        assert "--resume" in errors
        assert value(database, "SELECT phase FROM webhook_log_migration") == "ready"
        resumed = chronos(database, "migrate", "--yes", "--resume")
        assert resumed.returncode == 0, resumed.stderr
        seen = len(writer.commits)
        wait_until(lambda: len(writer.commits) > seen + 20, 20, "the writer keeps writing")
    assert writer.errors == []
    assert state(database) == ("migrated", True)


def waiting_for_the_swap(url: str) -> int:
    """The pid of the session that waits for ACCESS EXCLUSIVE on the table in use, for the swap."""
    [[pid]] = wait_until(
        lambda: query(
            url,
            "SELECT pid FROM pg_locks WHERE relation = 'webhook_log'::regclass AND NOT granted"
            " AND mode = 'AccessExclusiveLock'",
        ),
        30,
        "the swap is waiting",
    )
    assert isinstance(pid, int)
    return pid


class Stopped(NamedTuple):
    """A running migration that waits at a gate, and how to release it."""

    process: subprocess.Popen[str]
    release: Callable[[], None]


@contextmanager
def stopped_in_the_copy(url: str, *options: str) -> Iterator[Stopped]:
    """A migration that has copied the newer days and waits before a row of an older one."""
    gate_in_the_copy(url)
    small = ("--workers", "1", "--batch-size", "50")
    with closed_gate(url) as release, started(url, "migrate", "--yes", *small, *options) as process:
        pid_at_the_gate(url)
        yield Stopped(process, release)


def assert_nothing_lost(url: str, writer: LiveWriter) -> None:
    """Every commit acknowledged to the writer is there once, and it got no error."""
    assert writer.errors == []
    with create_engine(url, poolclass=NullPool).connect() as conn:
        presence = writer.check(conn)
    assert (presence.lost, presence.twice, presence.repeated_ids) == ([], [], [])


def assert_plain_again(url: str, before: set[tuple[str, str]], writer: LiveWriter) -> None:
    """The table, its rows and the writer's are as if no migration had been tried."""
    assert relations(url) == before
    assert_nothing_lost(url, writer)
    ids = [row[0] for row in query(url, "SELECT id FROM webhook_log")]
    assert {commit.id for commit in writer.commits} | set(range(1, ROWS + 1)) == set(ids)
    assert value(url, "SELECT pg_get_serial_sequence('webhook_log', 'id')") == "public.webhook_log_id_seq"


def test_a_closed_output_pipe_does_not_stop_the_migration(database: str) -> None:
    """As with ``| head``: a migration that has begun runs to its end."""
    fill(database)
    with stopped_in_the_copy(database) as migration:
        assert migration.process.stdout is not None
        migration.process.stdout.close()
        migration.release()
        assert migration.process.wait(60) == 0
    assert state(database) == ("migrated", True)


def test_a_cancelled_round_neither_loses_nor_duplicates_rows(database: str) -> None:
    """By an administrator, or by a statement_timeout of the role: the round is retried."""
    fill(database)
    at_it = "SELECT query_start FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"
    with stopped_in_the_copy(database) as migration:
        pid = pid_at_the_gate(database)
        first = query(database, at_it, pid)
        query(database, "SELECT pg_cancel_backend(%s)", pid)
        wait_until(lambda: query(database, at_it, pid) not in ([], first), 20, "the round is retried")
        migration.release()
        output, errors = migration.process.communicate(timeout=60)

    assert migration.process.returncode == 0, output + errors
    assert digest(database, "webhook_log_old", window(database)) == digest(database)


CHECKED_BY_HELPERS = """
CREATE FUNCTION fine(what text) RETURNS boolean IMMUTABLE LANGUAGE sql AS $$ SELECT what <> 'bad' $$;
CREATE FUNCTION checked(what text) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS $$
BEGIN
    RETURN fine(what);
END
$$;
ALTER TABLE webhook_log ADD CHECK (checked(status));
"""


def _has_committed(writer: LiveWriter, enough: int) -> bool:
    return len(writer.commits) >= enough


@pytest.mark.parametrize(
    "setting",
    [
        "ALTER DATABASE {} SET default_transaction_isolation = 'repeatable read'",
        "ALTER DATABASE {} SET client_min_messages = debug5",
        "ALTER DATABASE {0} SET client_min_messages = log;"
        " ALTER DATABASE {0} SET log_min_duration_statement = 0",
        CHECKED_BY_HELPERS,
    ],
    ids=["isolation", "messages", "log", "search path"],
)
def test_migrate_and_rollback_work_with_any_database_defaults(database: str, setting: str) -> None:
    """The application writes meanwhile; a check constraint may call functions by unqualified names."""
    fill(database)
    query(database, setting.format(make_url(database).database))

    with LiveWriter(database, threads=2, rate=200, past_share=0.3) as writer:
        for verb in ("migrate", "rollback"):
            enough = len(writer.commits) + 20
            wait_until(partial(_has_committed, writer, enough), 20, "the writer writes")
            result = chronos(database, verb, "--yes")
            assert result.returncode == 0, result.stdout + result.stderr

    assert_nothing_lost(database, writer)
    rows, ids, _ = digest(database)
    assert rows == ids == ROWS + len(writer.commits)


@pytest.mark.parametrize("precision", [0, 3])
def test_coarse_timestamps_fall_into_the_right_day(database: str, precision: int) -> None:
    """A day starts with the rows at its midnight, whatever the precision of the column."""
    fill(database)
    add_awkward_rows(database, "timestamptz")
    query(database, f"ALTER TABLE webhook_log ALTER timestamp TYPE timestamptz({precision})")

    result = chronos(database, "migrate", "--yes")

    assert result.returncode == 0, result.stdout + result.stderr
    assert digest(database, "webhook_log_old", window(database)) == digest(database)


def test_a_stop_works_when_the_output_is_closed(database: str) -> None:
    """As with ``2>&1 | tee`` when tee ends first."""
    fill(database)
    with stopped_in_the_copy(database) as migration:
        assert migration.process.stdout is not None
        assert migration.process.stderr is not None
        migration.process.stdout.close()
        migration.process.stderr.close()
        migration.process.send_signal(signal.SIGTERM)
        migration.release()
        assert migration.process.wait(60) == 3
    assert state(database) == ("copying", False)
    assert chronos(database, "migrate", "--yes", "--resume").returncode == 0


def test_unwritable_output_does_not_stop_the_migration(database: str, tmp_path: Path) -> None:
    """As on a full disk: the file takes the first lines and no more."""
    fill(database)
    command = 'ulimit -f 2; exec "$0" -m chronos migrate --yes > "$1"'
    migration = subprocess.run(
        ["sh", "-c", command, sys.executable, str(tmp_path / "log")],
        env=chronos_environment(database),
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert migration.returncode == 0, migration.stderr
    assert "COMPLETED" not in (tmp_path / "log").read_text("utf-8")
    assert state(database) == ("migrated", True)


def test_a_completed_migration_is_not_undone_by_a_lost_connection(
    database: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its last commit succeeded, and the connection was lost before the answer came."""
    fill(database)
    refresh = Migration.refresh

    def cut(migration: Migration) -> None:
        if state(database) == ("migrated", True):
            query(
                database,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()",
            )
        refresh(migration)

    monkeypatch.setattr(Migration, "refresh", cut)
    run_migration(
        connect_engine(make_url(database)), WEBHOOK_LOG, Options(), Operator(Output()), lambda found: None
    )
    assert "nothing is undone" in capsys.readouterr().out
    assert state(database) == ("migrated", True)


def test_autovacuum_is_off_until_the_partitions_are_in_place(database: str) -> None:
    """It would hold a lock that the migration needs; afterwards it is allowed again."""
    fill(database)
    kept_away = (
        "SELECT count(*) FROM pg_class"
        " WHERE relname LIKE 'webhook_log_y%' AND reloptions = '{autovacuum_enabled=off}'"
    )
    with stopped_in_the_copy(database) as migration:
        assert value(database, kept_away) == 16
        migration.release()
        _, errors = migration.process.communicate(timeout=60)
    assert migration.process.returncode == 0, errors
    assert value(database, kept_away) == 0


def test_a_mismatch_is_reported_with_its_period(database: str) -> None:
    """A row whose copy was changed before the comparison is found and reported with its day."""
    fill(database)
    with stopped_in_the_copy(database) as migration:
        [[leaf]] = wait_until(
            lambda: query(
                database,
                "SELECT relation::regclass::text FROM pg_locks WHERE pid = %s AND granted"
                " AND mode = 'RowExclusiveLock' AND relation::regclass::text LIKE 'webhook_log_y%%'"
                " AND relation IN (SELECT oid FROM pg_class WHERE relkind = 'r')",
                pid_at_the_gate(database),
            ),
            20,
            "a partition is being filled",
        )
        assert query(
            database,
            f"UPDATE {leaf} SET status = 'tampered' WHERE id = (SELECT min(id) FROM {leaf}) RETURNING id",
        )
        day = value(database, f"SELECT min(timestamp AT TIME ZONE 'UTC')::date FROM {leaf}")
        migration.release()
        _, errors = migration.process.communicate(timeout=60)

    assert migration.process.returncode == 1
    assert f"verification failed for {day}: the rows differ" in errors
    assert state(database) is None
    assert value(database, "SELECT count(*) FROM webhook_log WHERE status = 'tampered'") == 0


@pytest.mark.parametrize("then", ["go on", "stop and resume", "stop and roll back"])
def test_changes_to_rows_already_copied_are_kept(database: str, then: str) -> None:
    """Rows changed, moved and deleted while other days are copied stay so, however the migration ends."""
    fill(database)
    with stopped_in_the_copy(database) as migration:  # newest day first: today's rows are copied
        today = planned(database, "started_at").astimezone(UTC).date()
        mine = f"SELECT id FROM webhook_log WHERE timestamp >= '{today} 00:00+00' ORDER BY id LIMIT 3"
        changed, moved, deleted = (row[0] for row in query(database, mine))
        query(database, "UPDATE webhook_log SET status = 'changed' WHERE id = %s", changed)
        query(database, "UPDATE webhook_log SET timestamp = timestamp + interval '1 us' WHERE id = %s", moved)
        query(database, "DELETE FROM webhook_log WHERE id = %s", deleted)
        kept = query(
            database, "SELECT id, timestamp, status FROM webhook_log WHERE id IN (%s, %s)", changed, moved
        )
        if then != "go on":
            migration.process.send_signal(signal.SIGINT)
        migration.release()
        output, errors = migration.process.communicate(timeout=60)
    if then == "go on":
        assert migration.process.returncode == 0, output + errors
    else:
        assert migration.process.returncode == 3, output + errors
        verb = ["migrate", "--yes", "--resume"] if then == "stop and resume" else ["rollback", "--yes"]
        again = chronos(database, *verb)
        assert again.returncode == 0, again.stdout + again.stderr

    of_them = "SELECT id, timestamp, status FROM webhook_log WHERE id IN (%s, %s, %s)"
    assert sorted(query(database, of_them, changed, moved, deleted)) == sorted(kept)
    rows, ids, _ = digest(database)
    assert rows == ids


def test_a_long_reader_is_named_and_blocks_nobody(database: str) -> None:
    fill(database, 100)
    with (
        LiveWriter(database, threads=2, rate=200, past_share=0.2) as writer,
        connected(database, autocommit=False) as reader,
        ExitStack() as stack,
    ):
        with reader.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM webhook_log")
        process = stack.enter_context(started(database, "migrate", "--yes"))
        assert process.stdout is not None
        attempts: list[str] = []
        for line in process.stdout:
            if "waiting for a lock on webhook_log" in line:
                attempts.append(line)
                writer.catch_up()
            if len(attempts) == 3:
                break
        assert all(f"pid {reader.get_backend_pid()}" in line for line in attempts)
        # No attempt waits in the lock queue for longer than its lock_timeout.
        assert value(
            database,
            "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - waitstart)), 0) < 1 FROM pg_locks"
            " WHERE NOT granted",
        )
        reader.rollback()
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert_nothing_lost(database, writer)


def test_held_before_the_swap_later_writes_are_replayed(database: str) -> None:
    """Prepared at noon, swapped at night: what piles up is replayed on request."""
    fill(database)
    with LiveWriter(database, threads=2, rate=200, past_share=0.3) as writer:
        held = chronos(database, "migrate", "--yes", "--hold")
        assert held.returncode == 0, held.stdout + held.stderr
        assert "READY: EVERYTHING IS COPIED AND COMPARED; NO NAME HAS CHANGED YET" in held.stdout
        assert "[Step 6/6]" not in held.stdout
        assert "Next:" not in held.stdout
        assert state(database) == ("ready", False)
        assert value(database, "SELECT relkind = 'r' FROM pg_class WHERE relname = 'webhook_log'")

        query(database, "UPDATE webhook_log SET status = 'held' WHERE id % 10 = 0")
        query(database, f"DELETE FROM webhook_log WHERE id % 10 = 1 AND id <= {ROWS}")
        noted = "SELECT count(*) FROM webhook_log_migration_changes"
        assert value(database, noted) >= ROWS // 5
        again = chronos(database, "migrate", "--yes", "--resume", "--hold")
        assert again.returncode == 0, again.stdout + again.stderr
        assert state(database) == ("ready", False)
        assert value(database, noted) < ROWS // 5
        assert value(database, "SELECT count(*) FROM webhook_log_new WHERE status = 'held'") > 0

        resumed = chronos(database, "migrate", "--yes", "--resume")
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr
        assert "[Step 6/6]" in resumed.stdout
        assert state(database) == ("migrated", True)
        seen = len(writer.commits)
        wait_until(lambda: len(writer.commits) > seen + 20, 20, "the writer keeps writing")
    assert_nothing_lost(database, writer)
    assert value(database, "SELECT count(*) FROM webhook_log WHERE id <= %s AND id %% 10 = 1", ROWS) == 0
    assert digest(database, "webhook_log_old", window(database)) == digest(
        database, where="id IN (SELECT id FROM webhook_log_old)"
    )


def test_a_held_migration_can_be_rolled_back(database: str) -> None:
    fill(database)
    before = relations(database), digest(database)
    assert chronos(database, "migrate", "--yes", "--hold").returncode == 0

    refused = chronos(database, "migrate", "--yes")
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    result = chronos(database, "rollback", "--yes")

    assert result.returncode == 0, result.stdout + result.stderr
    assert (relations(database), digest(database)) == before


@pytest.mark.parametrize("when", ["during the copy", "while it is held", "while the swap waits"])
def test_a_truncate_before_the_swap_ends_the_migration(database: str, when: str) -> None:
    """Nothing is left to migrate, and what was copied must not come back."""
    fill(database)
    if when == "during the copy":
        with stopped_in_the_copy(database) as migration:
            # TRUNCATE itself waits for the running batch.
            with connected(database) as conn, conn.cursor() as cursor:
                pid = conn.get_backend_pid()
                truncating = threading.Thread(
                    target=cursor.execute, args=("TRUNCATE webhook_log",), daemon=True
                )
                truncating.start()
                wait_until(
                    lambda: query(
                        database,
                        "SELECT 1 FROM pg_locks WHERE NOT granted AND pid = %s AND locktype = 'relation'",
                        pid,
                    ),
                    20,
                    "TRUNCATE waits",
                )
                migration.release()
                truncating.join()
            output, errors = migration.process.communicate(timeout=60)
            code = migration.process.returncode
    elif when == "while it is held":
        assert chronos(database, "migrate", "--yes", "--hold").returncode == 0
        query(database, "TRUNCATE webhook_log")
        result = chronos(database, "migrate", "--yes", "--resume")
        code, output, errors = result.returncode, result.stdout, result.stderr
    else:
        with ExitStack() as reader:
            # The swap waits for this old snapshot, which holds no lock on the table.
            reader.enter_context(connected_repeatable(database))
            process = reader.enter_context(started(database, "migrate", "--yes"))
            assert process.stdout is not None
            next(line for line in process.stdout if "waiting for pid" in line)
            query(database, "TRUNCATE webhook_log")
            output, errors = process.communicate(timeout=60)
            code = process.returncode

    assert code == 1, output + errors
    assert "webhook_log was emptied by TRUNCATE during the copy" in errors
    assert "rolled back: webhook_log is the plain table it was" in errors
    assert state(database) is None
    assert digest(database)[0] == 0
    assert {name for kind, name in relations(database) if kind in "rp"} == {
        "public.webhook_log",
        "public.webhook_endpoint",
    }


@contextmanager
def connected_repeatable(url: str) -> Iterator[connection]:
    """A transaction with a snapshot from its start, and no lock on any table of the application."""
    with connected(url, autocommit=False) as conn:
        conn.set_session(isolation_level="REPEATABLE READ")
        with conn.cursor() as cursor:
            cursor.execute("SET application_name = 'nightly report'")
            cursor.execute("SELECT 1")
        yield conn
        conn.rollback()


@pytest.mark.parametrize("verb", ["migrate", "rollback"])
def test_an_old_snapshot_delays_the_swap_and_misses_no_row(database: str, verb: str) -> None:
    fill(database)
    if verb == "rollback":
        assert chronos(database, "migrate", "--yes").returncode == 0
    with ExitStack() as stack:
        reader = stack.enter_context(connected_repeatable(database))
        expected = digest(database)
        process = stack.enter_context(started(database, verb, "--yes"))
        assert process.stdout is not None
        waiting = next(line for line in process.stdout if "waiting for pid" in line)
        pid = reader.get_backend_pid()
        assert f"pid {pid} (nightly report)" in waiting
        assert f"SELECT pg_terminate_backend({pid}) would end it" in waiting
        # No session queues behind us meanwhile.
        written = query(
            database,
            "SET lock_timeout = '2s'; INSERT INTO webhook_log (status, timestamp)"
            " SELECT 'after', now() FROM generate_series(1, 500) RETURNING id",
        )
        with reader.cursor() as cursor:
            cursor.execute("SELECT count(*), count(*) FILTER (WHERE status = 'after') FROM webhook_log")
            assert cursor.fetchall() == [(expected[0], 0)]
        reader.rollback()
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, output + errors
    assert len(written) == 500
    assert value(database, "SELECT count(*) FROM webhook_log WHERE status = 'after'") == 500


@pytest.mark.parametrize("end", ["killed", "cut off"])
def test_a_run_that_ends_before_the_last_comparison_is_resumed(database: str, end: str) -> None:
    """The partitioned table is in use by then, and complete; --resume makes the remaining comparisons."""
    fill(database)
    assert chronos(database, "migrate", "--yes", "--hold").returncode == 0
    gate_before_the_last_word(database)
    query(database, "UPDATE webhook_log SET status = 'noted' WHERE id % 10 = 0")
    with closed_gate(database) as release, started(database, "migrate", "--yes", "--resume") as process:
        pid = pid_at_the_gate(database)
        if end == "killed":
            process.kill()
            process.wait()
            release()
        else:
            query(database, "SELECT pg_terminate_backend(%s)", pid)
            release()
        _, errors = process.communicate(timeout=60)
    if end == "cut off":
        assert process.returncode == 3, errors
        assert "--resume" in errors
    wait_until(
        lambda: not query(database, "SELECT 1 FROM pg_stat_activity WHERE pid = %s", pid), 20, "it is gone"
    )
    assert state(database) == ("migrated", False)
    assert chronos(database, "finalize", "--yes").returncode == 2
    query(database, "UPDATE webhook_log SET status = 'later' WHERE id % 20 = 0")

    result = chronos(database, "migrate", "--yes", "--resume")

    assert result.returncode == 0, result.stdout + result.stderr
    assert "compared and equal" in result.stdout
    assert state(database) == ("migrated", True)
    assert chronos(database, "finalize", "--yes").returncode == 0


def test_a_difference_after_the_swap_causes_a_rollback(database: str) -> None:
    """A replayed row is changed by hand in the new table: it is found, and the swap is undone."""
    fill(database)
    before = relations(database)
    assert chronos(database, "migrate", "--yes", "--hold").returncode == 0
    query(database, "UPDATE webhook_log SET status = 'noted' WHERE id > %s", ROWS - 10)
    assert chronos(database, "migrate", "--yes", "--resume", "--hold").returncode == 0
    query(database, "UPDATE webhook_log_new SET status = 'tampered' WHERE id = %s", ROWS - 1)

    with LiveWriter(database, threads=2, rate=200, past_share=0.2) as writer:
        result = chronos(database, "migrate", "--yes", "--resume")
        seen = len(writer.commits)
        wait_until(lambda: len(writer.commits) > seen + 20, 20, "the writer keeps writing")

    assert result.returncode == 1, result.stdout + result.stderr
    assert "step 6 " in result.stderr
    assert re.search(r" 1 of \d+ rows that were written during the migration differ", result.stderr)
    assert f"({ROWS - 1}," in result.stderr
    assert "rolled back: webhook_log is the plain table it was" in result.stderr
    assert_plain_again(database, before, writer)
    assert value(database, "SELECT count(*) FROM webhook_log WHERE status = 'noted'") == 10


def test_models_work_before_and_after_the_migration(database: str) -> None:
    engine = create_engine(database, poolclass=NullPool)
    WebhookLog.metadata.create_all(engine)
    written = []

    def write_and_read() -> None:
        with Session(engine) as session:
            endpoint = WebhookEndpoint(url="https://example.org/hook")
            session.add(endpoint)
            session.commit()
            entry = WebhookLog(
                status="success",
                status_code=200,
                request_body={"type": "order.paid", "items": [1, 2]},
                webhook_endpoint_id=endpoint.id,
                timestamp=datetime.now(UTC),
            )
            session.add(entry)
            session.commit()
            written.append(entry.id)
        with Session(engine) as session:
            found = session.exec(select(WebhookLog).where(WebhookLog.id == written[-1])).one()
            assert found.request_body == {"type": "order.paid", "items": [1, 2]}
            assert found.timestamp.utcoffset() is not None
            found.status = "seen"
            session.add(found)
            session.commit()

    write_and_read()
    result = chronos(database, "migrate", "--yes")
    assert result.returncode == 0, result.stderr
    write_and_read()

    with engine.connect() as conn:
        assert conn.execute(text("SELECT array_agg(id ORDER BY id) FROM webhook_log")).scalar() == written
    assert len(set(written)) == 2
