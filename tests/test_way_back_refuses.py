"""A rollback looks first at what it would undo, and begins only when nothing of it would be lost."""

from __future__ import annotations

import pytest
from sqlalchemy.engine import make_url

from chronos.db import connect_engine
from chronos.demo.rows import create_webhook_log
from tests.command import chronos
from tests.live import phase
from tests.tables import digest, query, value


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("CREATE TABLE webhook_log_rest PARTITION OF webhook_log DEFAULT", "webhook_log_rest"),
        ("ALTER TABLE webhook_log ADD COLUMN note text", "note"),
        ("CREATE INDEX by_status ON webhook_log (status)", "by_status"),
    ],
    ids=["a partition of somebody's", "a new column", "a new index"],
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
