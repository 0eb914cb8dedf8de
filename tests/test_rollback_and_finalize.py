"""The ways out of a migration: back to the plain table, or on to the partitioned one alone."""

from __future__ import annotations

import re
from contextlib import ExitStack
from datetime import UTC

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from chronos.demo.rows import KeyType, create_webhook_log
from chronos.demo.writer import LiveWriter
from tests.command import chronos, started, stop_a_rollback
from tests.tables import (
    closed_gate,
    connected,
    digest,
    exists,
    gate_in_the_copy,
    holding,
    pid_at_the_gate,
    planned,
    query,
    relations,
    value,
)
from tests.waiting import wait_until

ROWS = 2_000
INSERT = "INSERT INTO webhook_log (status, timestamp) VALUES ('new', now()) RETURNING id"
KEY_TYPES: list[KeyType] = ["serial", "identity by default", "identity always"]


def fill(url: str, key_type: KeyType = "serial") -> None:
    engine = create_engine(url, poolclass=NullPool)
    create_webhook_log(engine, ROWS, days=20, key_type=key_type)


def migrate(url: str) -> None:
    result = chronos(url, "migrate", "--yes")
    assert result.returncode == 0, result.stdout + result.stderr


def shape(url: str) -> list[tuple[object, ...]]:
    """Columns, defaults, indexes, constraints and owner of the plain table and its sequence."""
    return query(
        url,
        "SELECT attname::text, format_type(atttypid, atttypmod), attnotnull::text, attidentity::text,"
        " pg_get_expr(adbin, adrelid), pg_get_serial_sequence('webhook_log', attname) FROM pg_attribute"
        " LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum"
        " WHERE attrelid = 'webhook_log'::regclass AND attnum > 0"
        " UNION ALL SELECT indexname, indexdef, tablename, '', '', ''"
        " FROM pg_indexes WHERE tablename = 'webhook_log'"
        " UNION ALL SELECT conname, pg_get_constraintdef(oid), convalidated::text, '', '', ''"
        " FROM pg_constraint WHERE conrelid = 'webhook_log'::regclass ORDER BY 1, 2",
    )


def kill_when_built(url: str) -> None:
    """Leave behind a migration whose process was killed before the swap."""
    with holding(url, "SELECT FROM webhook_log LIMIT 1"), started(url, "migrate", "--yes"):
        wait_until(lambda: exists(url, "webhook_log_migration"), 30, "the new table is built")
    wait_until(lambda: operator_pid(url) is None, 30, "its sessions are gone")


@pytest.mark.parametrize("key_type", KEY_TYPES)
def test_rollback_brings_every_row_back(database: str, key_type: KeyType) -> None:
    """Old and new rows, explicit ids, changed, moved and deleted rows are as they were left."""
    fill(database, key_type)
    before = relations(database), shape(database)
    with LiveWriter(database, threads=2, rate=200, past_share=0.3) as writer:
        migrate(database)
        seen = len(writer.commits)
        wait_until(lambda: len(writer.commits) > seen + 50, 20, "the writer keeps writing")
        explicit = "INSERT INTO webhook_log (id, status, timestamp) OVERRIDING SYSTEM VALUE VALUES "
        query(database, explicit + "(-7, 'explicit', now()), (-8, 'explicit', now() - interval '3 days')")
        query(database, "UPDATE webhook_log SET status = 'changed' WHERE id % 10 = 0 AND id > 500")
        query(database, f"DELETE FROM webhook_log WHERE id % 100 = 1 AND id > 500 AND id <= {ROWS}")
        query(
            database,
            "UPDATE webhook_log SET timestamp = timestamp + interval '1 day' WHERE id = %s",
            ROWS - 5,
        )
        moved = query(database, "SELECT id, timestamp FROM webhook_log WHERE id = %s", ROWS - 5)
        cutoff = planned(database, "cutoff")

        result = chronos(database, "rollback", answer="ROLLBACK\n")
        seen = len(writer.commits)
        wait_until(lambda: len(writer.commits) > seen + 20, 20, "the writer keeps writing")

    assert result.returncode == 0, result.stdout + result.stderr
    assert (relations(database), shape(database)) == before
    with create_engine(database, poolclass=NullPool).connect() as conn:
        presence = writer.check(conn)
    assert (writer.errors, presence.lost, presence.twice, presence.repeated_ids) == ([], [], [], [])
    assert (
        value(database, "SELECT count(*) FROM webhook_log WHERE status = 'explicit' AND id IN (-7, -8)") == 2
    )
    recent = f"id > 500 AND id <= {ROWS} AND timestamp >= '{cutoff}'"
    assert value(database, f"SELECT count(*) FROM webhook_log WHERE {recent} AND id % 100 = 1") == 0
    assert value(
        database, f"SELECT bool_and(status = 'changed') FROM webhook_log WHERE {recent} AND id % 10 = 0"
    )
    assert query(database, "SELECT id, timestamp FROM webhook_log WHERE id = %s", ROWS - 5) == moved
    highest = value(database, "SELECT max(id) FROM webhook_log")
    assert value(database, INSERT) > highest


def test_rollback_after_nights_of_retention_keeps_later_rows(database: str) -> None:
    """Expired days of history may have been dropped, days written after the swap may not."""
    fill(database)
    before = digest(database, where=f"id <= {ROWS}")
    migrate(database)
    query(database, INSERT)
    assert query(database, "SELECT drop_old_webhook_log_partitions(10)")

    result = chronos(database, "rollback", "--yes")

    assert result.returncode == 0, result.stderr
    assert digest(database, where=f"id <= {ROWS}") == before
    assert digest(database)[0] == ROWS + 1


def test_rollback_refuses_when_rows_would_be_lost(database: str) -> None:
    fill(database)
    migrate(database)
    new = value(database, INSERT)
    today = planned(database, "started_at").astimezone(UTC).date()
    query(database, f"DROP TABLE webhook_log_y{today:%Y}m{today:%m}d{today:%d}")

    result = chronos(database, "rollback", "--yes")

    assert result.returncode == 2
    assert f"{today}" in result.stderr
    assert "rollback --force" in result.stderr
    assert exists(database, "webhook_log_old")
    forced = chronos(database, "rollback", "--yes", "--force")
    assert forced.returncode == 0, forced.stderr
    assert value(database, "SELECT count(*) FROM webhook_log WHERE id = %s", new) == 0
    assert value(database, "SELECT count(*) FROM webhook_log") == ROWS


def test_rollback_repeated_after_a_stop_carries_later_changes(database: str) -> None:
    """Rows that an earlier attempt carried back are brought up to date."""
    fill(database)
    migrate(database)
    moved, changed, gone = (value(database, INSERT) for _ in range(3))
    stop_a_rollback(database)
    query(database, "UPDATE webhook_log SET timestamp = timestamp + interval '1 ms' WHERE id = %s", moved)
    query(database, "UPDATE webhook_log SET status = 'changed' WHERE id = %s", changed)
    query(database, "DELETE FROM webhook_log WHERE id = %s", gone)
    expected = query(
        database, "SELECT id, timestamp, status FROM webhook_log WHERE id > %s ORDER BY id", ROWS
    )

    result = chronos(database, "rollback", "--yes")

    assert result.returncode == 0, result.stdout + result.stderr
    assert (
        query(database, "SELECT id, timestamp, status FROM webhook_log WHERE id > %s ORDER BY id", ROWS)
        == expected
    )
    assert {row[0] for row in expected} == {moved, changed}


def test_rollback_replays_rows_written_while_it_waited(database: str) -> None:
    """A reader blocks it for long while thousands of rows are written: all are carried back."""
    fill(database)
    migrate(database)
    with ExitStack() as reader:
        reader.enter_context(holding(database, "SELECT FROM webhook_log LIMIT 1"))
        with started(database, "rollback", "--yes") as process:
            assert process.stdout is not None
            next(line for line in process.stdout if "waiting for a lock on webhook_log" in line)
            many = "INSERT INTO webhook_log (status, timestamp) SELECT 'meanwhile', now()"
            query(database, f"{many} FROM generate_series(1, 7000)")
            query(database, "UPDATE webhook_log SET status = 'changed' WHERE id = %s", ROWS)
            reader.close()
            _, errors = process.communicate(timeout=60)

    assert process.returncode == 0, errors
    assert value(database, "SELECT count(*) FROM webhook_log WHERE status = 'meanwhile'") == 7000
    assert value(database, "SELECT status FROM webhook_log WHERE id = %s", ROWS) == "changed"
    assert digest(database)[:2] == (ROWS + 7000, ROWS + 7000)


@pytest.mark.parametrize(("verb", "word"), [("rollback", "ROLLBACK"), ("finalize", "FINALIZE")])
def test_each_verb_asks_for_its_word(database: str, verb: str, word: str) -> None:
    fill(database)
    migrate(database)
    before = relations(database)

    result = chronos(database, verb, answer=f"{word.lower()}\n")

    assert result.returncode == 2
    assert f"Type {word}" in result.stdout
    assert "nothing was changed" in result.stderr
    assert relations(database) == before


def test_verbs_refuse_when_there_is_nothing_to_undo_or_finish(database: str) -> None:
    fill(database)
    for verb in ("rollback", "finalize"):
        result = chronos(database, verb, "--yes")
        assert result.returncode == 2
        assert "there is no migration" in result.stderr
    resumed = chronos(database, "migrate", "--yes", "--resume")
    assert resumed.returncode == 2
    assert "nothing to resume" in resumed.stderr


@pytest.mark.parametrize("key_type", KEY_TYPES)
def test_finalize_drops_the_old_table(database: str, key_type: KeyType) -> None:
    fill(database, key_type)
    migrate(database)
    kept = digest(database)
    last = value(database, INSERT)

    result = chronos(database, "finalize", answer="FINALIZE\n")

    assert result.returncode == 0, result.stderr
    for line in (
        r"webhook_log_old: [\d,]+ rows \(estimate\), [\d.]+ [kM]B",
        r"webhook_log: [\d,]+ rows \(estimate\), [\d.]+ [kM]B",
        r"swapped (less than a|1|2) minutes? ago",
    ):
        assert re.search(f"^{line}$", result.stdout, re.MULTILINE), result.stdout
    assert digest(database, where=f"id < {last}") == kept
    left = {name for kind, name in relations(database) if "_y2" not in name and kind in "rpS"}
    assert left == {
        "public.webhook_log",
        "public.webhook_log_id_seq",
        "public.webhook_endpoint",
        "public.webhook_endpoint_id_seq",
    }
    assert (
        value(database, "SELECT pg_get_serial_sequence('webhook_log', 'id')") == "public.webhook_log_id_seq"
    )
    assert value(database, "SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal") == 0
    assert value(database, INSERT) == last + 1
    for verb in ("finalize", "rollback"):
        again = chronos(database, verb, "--yes")
        assert again.returncode == 2
        assert "there is no migration of webhook_log" in again.stderr


@pytest.mark.parametrize("reason", ["a row is missing", "a view", "not complete", "not compared"])
def test_finalize_refuses_when_it_is_not_safe(database: str, reason: str) -> None:
    fill(database)
    if reason == "not complete":
        kill_when_built(database)
        expected = "not complete"
    else:
        migrate(database)
        if reason == "not compared":
            query(database, "UPDATE webhook_log_migration SET verified = false")
            expected = "were not compared yet"
        elif reason == "a view":
            query(database, "CREATE VIEW still_reads AS SELECT id FROM webhook_log_old")
            expected = "still_reads"
        else:
            # TRUNCATE of a single partition is not noted.
            leaf = value(
                database, "SELECT tableoid::regclass::text FROM webhook_log WHERE id = %s", ROWS - 300
            )
            rows = value(database, f"SELECT count(*) FROM {leaf}")
            query(database, f"TRUNCATE {leaf}")
            expected = f"{rows:,} rows of webhook_log_old within retention are not in webhook_log"
    before = relations(database)

    result = chronos(database, "finalize", "--yes")

    assert result.returncode == 2
    assert expected in result.stderr
    assert relations(database) == before


def test_finalize_refuses_when_the_old_table_has_another_name(database: str) -> None:
    fill(database)
    migrate(database)
    query(database, "CREATE SCHEMA attic; ALTER TABLE webhook_log_old SET SCHEMA attic")
    query(database, 'ALTER TABLE attic.webhook_log_old RENAME TO "Old Log"')
    before = relations(database)
    line = 'webhook_log_old was renamed to attic."Old Log"'
    back = 'ALTER TABLE attic."Old Log" RENAME TO webhook_log_old;'

    result = chronos(database, "finalize", "--yes")

    assert result.returncode == 2
    assert line in result.stderr
    assert back in result.stderr
    assert "ALTER TABLE attic.webhook_log_old SET SCHEMA public;" in result.stderr
    assert relations(database) == before
    status = chronos(database, "status")
    assert status.returncode == 1
    assert line in status.stdout


@pytest.mark.parametrize("key_type", KEY_TYPES)
def test_manual_rollback_from_the_guide_works(database: str, key_type: KeyType) -> None:
    fill(database, key_type)
    before = relations(database), shape(database)
    migrate(database)
    given_out = [value(database, INSERT) for _ in range(3)]

    query(database, "DROP TABLE IF EXISTS webhook_log CASCADE")
    query(database, "ALTER TABLE webhook_log_old RENAME TO webhook_log")

    assert value(database, INSERT) not in given_out
    status = chronos(database, "status")
    assert status.returncode == 1
    assert "by hand" in status.stdout
    plan = chronos(database, "migrate", "--dry-run")
    assert plan.returncode == 2
    assert "for a plan, remove them with: python -m chronos rollback" in plan.stderr
    migrate(database)
    assert value(database, INSERT) not in given_out
    rolled_back = chronos(database, "rollback", "--yes")
    assert rolled_back.returncode == 0, rolled_back.stderr
    assert (relations(database), shape(database)) == before


def test_rollback_after_a_manual_one_reports_and_removes_what_is_left(database: str) -> None:
    fill(database)
    before = relations(database), shape(database)
    migrate(database)
    query(database, "DROP TABLE webhook_log CASCADE; ALTER TABLE webhook_log_old RENAME TO webhook_log")

    asked = chronos(database, "rollback", answer="no\n")
    assert asked.returncode == 2
    assert "webhook_log was put back by hand" in asked.stdout
    assert "partitioned" not in asked.stdout
    result = chronos(database, "rollback", "--yes")

    assert result.returncode == 0, result.stderr
    assert "webhook_log had been put back by hand; the remains are removed" in result.stdout
    assert (relations(database), shape(database)) == before
    again = chronos(database, "rollback", "--yes")
    assert again.returncode == 2
    assert "there is no migration of webhook_log" in again.stderr


@pytest.mark.parametrize("key_type", KEY_TYPES)
def test_manual_clean_up_from_the_guide_works(database: str, key_type: KeyType) -> None:
    fill(database, key_type)
    migrate(database)
    last = value(database, INSERT)

    query(database, "DROP TABLE webhook_log_old CASCADE")

    assert value(database, INSERT) == last + 1
    status = chronos(database, "status")
    assert "python -m chronos finalize" in status.stdout
    result = chronos(database, "finalize", "--yes")
    assert result.returncode == 0, result.stderr
    assert value(database, INSERT) == last + 2
    assert not exists(database, "webhook_log_migration")


def test_a_second_operator_is_told_who_is_running(database: str) -> None:
    fill(database)
    with ExitStack() as lock:
        lock.enter_context(holding(database, "LOCK TABLE webhook_endpoint IN ACCESS EXCLUSIVE MODE"))
        with started(database, "migrate", "--yes") as first:
            pid = wait_until(lambda: operator_pid(database), 30, "the first operator has the lock")
            for verb in (
                ["migrate", "--yes"],
                ["migrate", "--yes", "--resume"],
                ["rollback", "--yes"],
                ["finalize", "--yes"],
            ):
                second = chronos(database, *verb)
                assert second.returncode == 2
                assert f"pid {pid}" in second.stderr
                assert "nothing was changed" in second.stderr
            lock.close()
            first.communicate(timeout=60)
    assert first.returncode == 0


def operator_pid(url: str) -> int | None:
    """The backend that holds the operator lock."""
    found = query(
        url,
        "SELECT pid FROM pg_locks JOIN pg_database d ON d.oid = database"
        " WHERE locktype = 'advisory' AND granted AND datname = current_database()"
        " AND classid::bigint << 32 | objid::bigint"
        "     = hashtextextended('chronos migration of public.webhook_log', 0)",
    )
    return found[0][0] if found else None


def test_a_half_done_migration_is_refused_with_both_commands(database: str) -> None:
    fill(database)
    kill_when_built(database)

    result = chronos(database, "migrate", "--yes")

    assert result.returncode == 2
    assert "--resume" in result.stderr
    assert "python -m chronos rollback" in result.stderr
    assert chronos(database, "migrate", "--yes", "--resume").returncode == 0


def phase(url: str) -> str | None:
    found = (
        query(url, "SELECT phase FROM webhook_log_migration") if exists(url, "webhook_log_migration") else []
    )
    return found[0][0] if found else None


def test_rollback_carries_rows_written_by_a_replication_role(database: str) -> None:
    """As a logical subscriber or a restore writes: no ordinary trigger fires for it."""
    fill(database)
    migrate(database)
    query(
        database,
        "SET session_replication_role = replica;"
        " INSERT INTO webhook_log (id, status, timestamp) VALUES (-1, 'late', now() - interval '2 days'),"
        f" (-2, 'new', now()); UPDATE webhook_log SET status = 'changed' WHERE id = {ROWS - 1};"
        f" DELETE FROM webhook_log WHERE id = {ROWS}",
    )
    expected = digest(database, where=f"id < 0 OR id > {ROWS - 10}")
    assert expected[0] == 11

    result = chronos(database, "rollback", "--yes")

    assert result.returncode == 0, result.stdout + result.stderr
    assert digest(database, where=f"id < 0 OR id > {ROWS - 10}") == expected


def test_rollback_carries_a_truncate(database: str) -> None:
    """The window then holds only rows written afterwards; rows that were not copied are still there."""
    fill(database)
    migrate(database)
    cutoff = planned(database, "cutoff")
    older = value(database, "SELECT count(*) FROM webhook_log_old WHERE timestamp < %s", cutoff)
    assert older > 0
    gone = value(database, INSERT)
    query(database, "TRUNCATE webhook_log")
    kept = value(database, INSERT)

    result = chronos(database, "rollback", "--yes")

    assert result.returncode == 0, result.stdout + result.stderr
    assert digest(database, where=f"id <= {ROWS}")[0] == older
    assert query(database, "SELECT id FROM webhook_log WHERE id IN (%s, %s)", gone, kept) == [(kept,)]
    assert digest(database)[0] == older + 1


def test_rollback_carries_a_truncate_while_it_waits(database: str) -> None:
    fill(database)
    migrate(database)
    older = value(
        database, "SELECT count(*) FROM webhook_log_old WHERE timestamp < %s", planned(database, "cutoff")
    )
    with ExitStack() as reader:
        # A reader of only the old table: TRUNCATE need not wait for it, but the swap must.
        reader.enter_context(holding(database, "SELECT FROM webhook_log_old LIMIT 1"))
        with started(database, "rollback", "--yes") as process:
            assert process.stdout is not None
            next(line for line in process.stdout if "waiting for a lock" in line)
            reader.close()
            reader.enter_context(holding(database, "SELECT FROM webhook_log LIMIT 1"))
            next(line for line in process.stdout if "waiting for" in line)
            reader.close()
            query(database, "TRUNCATE webhook_log")
            kept = value(database, INSERT)
            _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert query(database, "SELECT id FROM webhook_log WHERE id > %s", ROWS) == [(kept,)]
    assert digest(database)[0] == older + 1


BY_HAND = "INSERT INTO webhook_log_old (status, timestamp) VALUES ('by hand', now()) RETURNING id"


def test_finalize_refuses_when_the_old_table_was_written_to(database: str) -> None:
    fill(database)
    migrate(database)
    late = value(database, BY_HAND)
    before = relations(database)

    result = chronos(database, "finalize", "--yes")

    assert result.returncode == 2
    assert (
        "1 rows of webhook_log_old were written after the swap. Check whether webhook_log has them"
        in result.stderr
    )
    assert relations(database) == before
    # What the message says.
    query(database, "INSERT INTO webhook_log SELECT * FROM webhook_log_old WHERE id = %s", late)
    assert "DELETE FROM webhook_log_migration_changes WHERE chronos_origin = 'o'" in result.stderr
    query(database, "DELETE FROM webhook_log_migration_changes WHERE chronos_origin = 'o'")
    again = chronos(database, "finalize", "--yes")
    assert again.returncode == 0, again.stderr
    assert value(database, "SELECT count(*) FROM webhook_log WHERE id = %s", late) == 1


def test_rollback_keeps_a_row_written_by_hand(database: str) -> None:
    fill(database)
    migrate(database)
    new, late = value(database, INSERT), value(database, BY_HAND)

    result = chronos(database, "rollback", "--yes")

    assert result.returncode == 0, result.stdout + result.stderr
    assert query(database, "SELECT id, status FROM webhook_log WHERE id > %s ORDER BY id", ROWS) == [
        (new, "new"),
        (late, "by hand"),
    ]


@pytest.mark.parametrize("key", ["new", "old"])
def test_rollback_refuses_when_both_tables_have_a_row_with_the_same_key(database: str, key: str) -> None:
    """One was written by hand, the other by the application: only a person knows which is right."""
    fill(database)
    migrate(database)
    if key == "new":
        mine = value(database, INSERT)
        query(database, "INSERT INTO webhook_log_old SELECT * FROM webhook_log WHERE id = %s", mine)
        query(database, "UPDATE webhook_log SET status = 'changed' WHERE id = %s", mine)
    else:
        mine = ROWS - 1
        query(database, "UPDATE webhook_log SET status = 'changed' WHERE id = %s", mine)
        query(database, "UPDATE webhook_log_old SET status = 'by hand' WHERE id = %s", mine)
    before = relations(database)

    refused = chronos(database, "rollback", "--yes")

    assert refused.returncode == 2
    assert "1 rows were written to webhook_log_old after the swap with keys that webhook_log also has" in (
        refused.stderr
    )
    assert (relations(database), phase(database)) == (before, "migrated")
    query(database, "DELETE FROM webhook_log_old WHERE id = %s", mine)
    result = chronos(database, "rollback", "--yes")
    assert result.returncode == 0, result.stdout + result.stderr
    assert value(database, "SELECT status FROM webhook_log WHERE id = %s", mine) == "changed"
    assert digest(database)[0] == ROWS + (key == "new")


def test_a_row_deleted_from_the_old_table_by_hand_is_restored(database: str) -> None:
    fill(database)
    before = digest(database)
    migrate(database)
    query(database, "DELETE FROM webhook_log_old WHERE id IN (%s, %s)", ROWS, ROWS - 1)

    result = chronos(database, "rollback", "--yes")

    assert result.returncode == 0, result.stdout + result.stderr
    assert digest(database) == before


def test_rollback_after_the_old_table_was_emptied_by_hand_loses_no_row(database: str) -> None:
    """The partitioned table has the only copies: they must not be dropped with it."""
    fill(database)
    migrate(database)
    query(database, "TRUNCATE webhook_log_old")
    kept = digest(database)

    result = chronos(database, "rollback", "--yes")

    assert result.returncode == 2, result.stdout + result.stderr
    assert "webhook_log_old was emptied by TRUNCATE" in result.stderr
    assert (digest(database), phase(database)) == (kept, "migrated")


def delete_endpoint(url: str) -> int:
    """Delete an endpoint that has rows of every day, as the application does: in one transaction."""
    with connected(url, autocommit=False) as conn, conn.cursor() as cursor:
        cursor.execute("SET lock_timeout = '5s'")
        cursor.execute(
            "SELECT e.id FROM webhook_endpoint e JOIN webhook_log l ON l.webhook_endpoint_id = e.id"
            " GROUP BY 1 HAVING count(*) > 10 ORDER BY 1"
        )
        [endpoint] = cursor.fetchone() or ()
        cursor.execute("DELETE FROM webhook_log WHERE webhook_endpoint_id = %s", (endpoint,))
        assert cursor.rowcount > 10
        cursor.execute("DELETE FROM webhook_endpoint WHERE id = %s", (endpoint,))
        assert cursor.rowcount == 1
        conn.commit()
    assert isinstance(endpoint, int)
    return endpoint


def test_the_application_can_delete_an_endpoint_in_every_phase(database: str) -> None:
    fill(database)
    gated = gate_in_the_copy(database)
    query(database, "UPDATE webhook_log SET webhook_endpoint_id = NULL WHERE id = %s", gated)
    gone: list[int] = []
    before = relations(database), shape(database)

    with (
        closed_gate(database) as release,
        started(database, "migrate", "--yes", "--workers", "1", "--hold") as process,
    ):
        pid_at_the_gate(database)
        assert phase(database) == "copying"
        gone.append(delete_endpoint(database))
        release()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert phase(database) == "ready"
    gone.append(delete_endpoint(database))

    result = chronos(database, "migrate", "--yes", "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    assert phase(database) == "migrated"
    cutoff = planned(database, "cutoff")
    gone.append(delete_endpoint(database))

    stop_a_rollback(database)
    assert phase(database) == "returning"
    gone.append(delete_endpoint(database))

    result = chronos(database, "rollback", "--yes")
    assert result.returncode == 0, result.stdout + result.stderr
    assert phase(database) is None
    gone.append(delete_endpoint(database))
    assert len(set(gone)) == 5
    left = query(database, "SELECT timestamp FROM webhook_log WHERE webhook_endpoint_id = ANY (%s)", gone)
    # The application did not see rows from before the window, and so did not delete them; only they are left,
    # and the rollback says so.
    assert left
    assert max(left)[0] < cutoff
    assert "refer to rows of webhook_endpoint that were deleted since the swap" in result.stdout
    [validate] = re.findall(r"ALTER TABLE \S+ VALIDATE CONSTRAINT \S+;", result.stdout)
    query(database, "DELETE FROM webhook_log WHERE webhook_endpoint_id = ANY (%s)", gone)
    query(database, validate)
    assert (relations(database), shape(database)) == before
