"""A rollback first checks what it would undo, and starts only if nothing would be lost."""

from __future__ import annotations

import pytest
from sqlalchemy.engine import make_url

from chronos.db import connect_engine
from chronos.demo.rows import create_webhook_log
from tests.command import chronos, stop_a_rollback
from tests.live import phase
from tests.tables import digest, planned, query, relations, value


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("CREATE TABLE webhook_log_rest PARTITION OF webhook_log DEFAULT", "webhook_log_rest"),
        ("ALTER TABLE webhook_log ADD COLUMN note text", "note"),
        ("CREATE INDEX by_status ON webhook_log (status)", "by_status"),
        (
            "INSERT INTO webhook_log (id, status, timestamp) SELECT 500, 'again', now()",
            "allows only one: 500; delete one, or give it another key [repeated-key]",
        ),
        (
            "INSERT INTO webhook_log (id, status, timestamp) VALUES (900, 'once', now()),"
            " (900, 'twice', now() - interval '1 day')",
            "allows only one: 900",
        ),
        (
            "DO $$ BEGIN EXECUTE format('TRUNCATE %s',"
            " (SELECT tableoid::regclass FROM webhook_log WHERE id = 480)); END $$",
            "were emptied by TRUNCATE, which is not noted for single partitions",
        ),
        (
            "ALTER TABLE webhook_log DISABLE TRIGGER webhook_log_note_update",
            "note triggers on webhook_log were dropped or disabled",
        ),
    ],
    ids=[
        "a partition added by someone else",
        "a new column",
        "a new index",
        "the key of a migrated row repeated",
        "a new key repeated",
        "one partition truncated",
        "notes disabled",
    ],
)
def test_what_a_rollback_would_destroy_is_named_and_nothing_changes(
    database: str, change: str, named: str
) -> None:
    create_webhook_log(connect_engine(make_url(database)), 500)
    assert chronos(database, "migrate", "--yes").returncode == 0
    query(database, change)
    before = digest(database)

    refused = chronos(database, "rollback", "--yes")

    assert refused.returncode == 2, refused.stderr
    assert named in refused.stderr
    assert phase(database) == "migrated"
    assert digest(database) == before


def test_several_obstacles_are_named_at_once(database: str) -> None:
    create_webhook_log(connect_engine(make_url(database)), 500)
    assert chronos(database, "migrate", "--yes").returncode == 0
    query(database, "ALTER TABLE webhook_log ADD COLUMN note text")
    query(database, "CREATE INDEX by_status ON webhook_log (status)")
    query(database, "ALTER TABLE webhook_log DISABLE TRIGGER webhook_log_note_update")

    refused = chronos(database, "rollback", "--yes")

    assert refused.returncode == 2
    for named in ("note", "by_status", "[changed-since-the-swap]", "[notes-disabled]", "rollback --force"):
        assert named in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert chronos(database, "rollback", "--yes", "--force").returncode == 0
    assert phase(database) is None


def test_a_deleted_row_whose_key_is_reused_is_carried_back(database: str) -> None:
    create_webhook_log(connect_engine(make_url(database)), 500)
    assert chronos(database, "migrate", "--yes").returncode == 0
    query(database, "DELETE FROM webhook_log WHERE id IN (480, 500)")
    query(
        database,
        "INSERT INTO webhook_log (id, status, timestamp) VALUES (500, 'new', now()),"
        " (480, 'late', now() - interval '2 days')",
    )

    done = chronos(database, "rollback", "--yes")

    assert done.returncode == 0, done.stderr
    assert query(database, "SELECT id, status FROM webhook_log WHERE id IN (480, 500) ORDER BY 1") == [
        (480, "late"),
        (500, "new"),
    ]


def stop_on_the_way_back(url: str) -> None:
    """Leave behind a rollback that was stopped while waiting for its swap."""
    errors = stop_a_rollback(url)
    assert "or call it off and keep the partitioned table: python -m chronos.scripts" in errors
    assert phase(url) == "returning"


def test_a_rollback_that_cannot_finish_can_be_cancelled_and_repeated(database: str) -> None:
    """Rows written before, meanwhile and afterwards are all carried back."""
    create_webhook_log(connect_engine(make_url(database)), 500)
    before = relations(database)
    assert chronos(database, "migrate", "--yes").returncode == 0
    query(database, "INSERT INTO webhook_log (id, status, timestamp) VALUES (600, 'new', now())")
    query(database, "UPDATE webhook_log SET status = 'changed' WHERE id = 490")
    stop_on_the_way_back(database)
    query(database, "UPDATE webhook_log SET timestamp = now() WHERE id IN (491, 600)")
    query(database, "DELETE FROM webhook_log WHERE id = 492")
    query(database, "INSERT INTO webhook_log (id, status, timestamp) VALUES (495, 'in the way', now())")

    refused = chronos(database, "rollback", "--yes")
    assert refused.returncode == 2
    assert "[repeated-key]" in refused.stderr
    stayed = chronos(database, "migrate", "--yes", "--resume")

    assert stayed.returncode == 0, stayed.stderr
    assert "Rollback called off; webhook_log stays partitioned" in stayed.stdout
    assert phase(database) == "migrated"
    assert chronos(database, "status", env={"REDIS_URL": ""}).stdout.startswith(
        "public.webhook_log: migrated"
    )
    query(database, "DELETE FROM webhook_log WHERE id = 495 AND status = 'in the way'")
    query(database, "INSERT INTO webhook_log (id, status, timestamp) VALUES (601, 'newer', now())")
    query(database, "UPDATE webhook_log SET status = 'changed' WHERE id IN (493, 600)")
    cutoff = planned(database, "cutoff")
    kept = digest(database, where=f"timestamp >= '{cutoff}'")
    done = chronos(database, "rollback", "--yes")
    assert done.returncode == 0, done.stderr
    assert digest(database, where=f"timestamp >= '{cutoff}'") == kept
    assert relations(database) == before


def test_after_a_cancelled_rollback_the_migration_can_be_finalized(database: str) -> None:
    create_webhook_log(connect_engine(make_url(database)), 500)
    assert chronos(database, "migrate", "--yes").returncode == 0
    query(database, "INSERT INTO webhook_log (id, status, timestamp) VALUES (600, 'new', now())")
    stop_on_the_way_back(database)
    query(database, "DELETE FROM webhook_log WHERE id = 600 OR id = 499")
    assert chronos(database, "migrate", "--yes", "--resume").returncode == 0
    kept = digest(database)

    done = chronos(database, "finalize", "--yes")

    assert done.returncode == 0, done.stderr
    assert digest(database) == kept


def test_notes_disabled_during_a_rollback_are_noticed(database: str) -> None:
    create_webhook_log(connect_engine(make_url(database)), 500)
    assert chronos(database, "migrate", "--yes").returncode == 0
    stop_on_the_way_back(database)
    leaf = value(database, "SELECT tableoid::regclass::text FROM webhook_log WHERE id = 480")
    query(database, f"ALTER TABLE {leaf} DISABLE TRIGGER webhook_log_note_delete")
    query(database, "DELETE FROM webhook_log WHERE id = 480")

    refused = chronos(database, "rollback", "--yes")

    assert refused.returncode == 2
    assert "[notes-disabled]" in refused.stderr
    assert phase(database) == "returning"


def test_a_partitioned_table_kept_by_hand_is_not_dropped(database: str) -> None:
    create_webhook_log(connect_engine(make_url(database)), 500)
    assert chronos(database, "migrate", "--yes").returncode == 0
    query(database, "ALTER TABLE webhook_log RENAME TO webhook_log_new")
    query(database, "ALTER TABLE webhook_log_old RENAME TO webhook_log")

    for verb in ("rollback", "migrate"):
        refused = chronos(database, verb, "--yes")
        assert refused.returncode == 2, refused.stderr
        assert "only copy" in refused.stderr
    assert value(database, "SELECT count(*) FROM webhook_log_new") > 0
