"""From the swap until the table that went out of use has lost its foreign keys: nothing breaks.

A reader of the referenced table keeps the keys in place for as long as the test wants.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from psycopg2.extensions import connection
from sqlalchemy.engine import make_url

from chronos.db import connect_engine
from chronos.demo.rows import create_webhook_log
from tests.command import chronos, started
from tests.live import phase
from tests.tables import connected, digest, holding, query, relations, value
from tests.waiting import wait_until

ROWS = 1_500
# Within the window that every migration in these tests copies, so that no older row refers to an endpoint.
DAYS = 10


def fill(url: str, action: str = "") -> None:
    create_webhook_log(connect_engine(make_url(url)), ROWS, days=DAYS)
    if action:
        query(
            url,
            "ALTER TABLE webhook_log DROP CONSTRAINT webhook_log_webhook_endpoint_id_fkey, ADD CONSTRAINT"
            " webhook_log_webhook_endpoint_id_fkey FOREIGN KEY (webhook_endpoint_id)"
            f" REFERENCES webhook_endpoint (id) {action}",
        )


@contextmanager
def bridge(url: str, way: str) -> Iterator[None]:
    """Run the block once the names have changed, ``there`` or ``back``, but the keys remain; then finish."""
    verb = ["migrate", "--yes"] if way == "there" else ["rollback", "--yes"]
    if way == "there":
        assert chronos(url, *verb, "--hold").returncode == 0
        verb.append("--resume")
    else:
        assert chronos(url, "migrate", "--yes").returncode == 0
    with ExitStack() as reader:
        reader.enter_context(holding(url, "SELECT FROM webhook_endpoint LIMIT 1"))
        with started(url, *verb) as process:
            swapped = "migrated" if way == "there" else "undone"
            wait_until(lambda: phase(url) == swapped, 60, "the names have changed")
            yield
            reader.close()
            _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors


def endpoints(url: str, number: int) -> list[int]:
    """Endpoints that have rows."""
    rows = query(
        url,
        "SELECT webhook_endpoint_id FROM webhook_log GROUP BY 1 HAVING count(*) > 5 ORDER BY 1 LIMIT %s",
        number,
    )
    return [row[0] for row in rows]


DELETE_BOTH = """
WITH gone AS (DELETE FROM webhook_log WHERE webhook_endpoint_id = %s)
DELETE FROM webhook_endpoint WHERE id = %s
"""


@pytest.mark.parametrize("way", ["there", "back"])
def test_an_endpoint_and_its_rows_can_be_deleted_in_one_statement(database: str, way: str) -> None:
    fill(database)
    one, other, third = endpoints(database, 3)
    with bridge(database, way):
        query(database, DELETE_BOTH, one, one)
        with connected(database, autocommit=False) as conn, conn.cursor() as cursor:
            cursor.execute(
                "UPDATE webhook_log SET webhook_endpoint_id = NULL WHERE webhook_endpoint_id = %s", (other,)
            )
            cursor.execute("DELETE FROM webhook_endpoint WHERE id = %s", (other,))
            conn.commit()
    kept = digest(database)
    assert value(database, "SELECT count(*) FROM webhook_log WHERE webhook_endpoint_id = %s", one) == 0
    query(database, DELETE_BOTH, third, third)
    if way == "there":
        kept = digest(database)
        done = chronos(database, "rollback", "--yes")
        assert done.returncode == 0, done.stderr
        assert digest(database) == kept


def test_an_endpoint_can_be_deleted_in_one_statement_while_the_migration_is_held(database: str) -> None:
    fill(database)
    [one] = endpoints(database, 1)
    assert chronos(database, "migrate", "--yes", "--hold").returncode == 0
    query(database, DELETE_BOTH, one, one)
    done = chronos(database, "migrate", "--yes", "--resume")
    assert done.returncode == 0, done.stderr
    assert value(database, "SELECT count(*) FROM webhook_log WHERE webhook_endpoint_id = %s", one) == 0


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("way", ["there", "back"])
def test_transactions_begun_after_the_swap_change_rows_at_every_isolation_level(
    database: str, way: str, level: str
) -> None:
    fill(database)
    [one] = endpoints(database, 1)

    def act(conn: connection) -> None:
        with conn.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM webhook_log")
            cursor.execute("DELETE FROM webhook_log WHERE webhook_endpoint_id = %s", (one,))
            assert cursor.rowcount > 5
            cursor.execute(
                "UPDATE webhook_log SET timestamp = timestamp - interval '1 hour' WHERE id = %s", (ROWS,)
            )
            assert cursor.rowcount <= 1
        conn.commit()

    with bridge(database, way), connected(database, autocommit=False) as conn:
        conn.set_session(isolation_level=level)
        act(conn)


@pytest.mark.parametrize("action", ["ON DELETE CASCADE", "ON DELETE SET NULL"])
def test_foreign_key_actions_on_the_old_table_do_not_count_as_writes_by_hand(
    database: str, action: str
) -> None:
    fill(database, action)
    one, other = endpoints(database, 2)
    with bridge(database, "there"):
        query(database, "DELETE FROM webhook_endpoint WHERE id = %s", one)
    query(database, "DELETE FROM webhook_endpoint WHERE id = %s", other)
    kept = digest(database)
    by_hand = "SELECT count(*) FROM webhook_log_migration_changes WHERE chronos_origin = 'o'"
    assert value(database, by_hand) == 0
    done = chronos(database, "rollback", "--yes")
    assert done.returncode == 0, done.stderr
    assert digest(database) == kept
    assert chronos(database, "migrate", "--yes").returncode == 0
    finished = chronos(database, "finalize", "--yes")
    assert finished.returncode == 0, finished.stderr
    assert digest(database) == kept


def test_forced_row_security_leaves_no_copy_behind(database: str) -> None:
    """Copies are deleted as the table's owner, to whom the policies apply."""
    fill(database)
    query(
        database,
        "CREATE POLICY everything ON webhook_log TO CURRENT_USER USING (status <> 'never');"
        " ALTER TABLE webhook_log ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
    )
    forced = "SELECT relforcerowsecurity FROM pg_class WHERE oid = to_regclass(%s)"
    [one] = endpoints(database, 1)
    with bridge(database, "there"):
        query(database, DELETE_BOTH, one, one)
    assert value(database, forced, "webhook_log")
    assert value(database, forced, "webhook_log_old")
    assert chronos(database, "rollback", "--yes").returncode == 0
    assert value(database, forced, "webhook_log")


def test_application_triggers_fire_only_for_what_the_application_does(database: str) -> None:
    fill(database)
    query(
        database,
        "CREATE TABLE audit (id bigint); CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO public.audit VALUES (OLD.id); RETURN NULL; END $$;"
        " CREATE TRIGGER audit AFTER DELETE ON webhook_log FOR EACH ROW EXECUTE FUNCTION audit()",
    )
    one, other = endpoints(database, 2)
    deleted = []
    for way, endpoint in (("there", one), ("back", other)):
        if way == "back":
            assert chronos(database, "rollback", "--yes").returncode == 0
        of = query(database, "SELECT id FROM webhook_log WHERE webhook_endpoint_id = %s", endpoint)
        deleted += [row[0] for row in of]
        with bridge(database, way):
            query(database, DELETE_BOTH, endpoint, endpoint)
    assert sorted(row[0] for row in query(database, "SELECT id FROM audit")) == sorted(deleted)
    assert value(database, "SELECT tgenabled::text FROM pg_trigger WHERE tgname = 'audit'") == "O"


def test_a_run_killed_before_the_keys_are_dropped_resumes_or_rolls_back(database: str) -> None:
    fill(database)
    before = relations(database)
    assert chronos(database, "migrate", "--yes", "--hold").returncode == 0
    with ExitStack() as reader:
        reader.enter_context(holding(database, "SELECT FROM webhook_endpoint LIMIT 1"))
        with started(database, "migrate", "--yes", "--resume") as process:
            wait_until(lambda: phase(database) == "migrated", 60, "the names have changed")
            process.send_signal(signal.SIGKILL)
            process.wait(30)
        reader.close()
    refused = chronos(database, "finalize", "--yes")
    assert refused.returncode == 2
    assert "were not compared yet" in refused.stderr
    query(database, "INSERT INTO webhook_log (status, timestamp) VALUES ('new', now())")
    kept = digest(database)
    resumed = chronos(database, "migrate", "--yes", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    keys = "SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND conrelid = 'webhook_log_old'::regclass"
    assert value(database, keys) == 0
    assert chronos(database, "rollback", "--yes").returncode == 0
    assert (digest(database), relations(database)) == (kept, before)


def test_the_application_carries_on_when_the_unused_table_is_dropped_by_hand(database: str) -> None:
    fill(database)
    [one] = endpoints(database, 1)
    assert chronos(database, "migrate", "--yes", "--hold").returncode == 0
    query(database, "DROP TABLE webhook_log_new CASCADE")
    query(database, DELETE_BOTH, one, one)
    kept = digest(database)
    done = chronos(database, "rollback", "--yes")
    assert done.returncode == 0, done.stderr
    assert digest(database) == kept


def test_a_row_written_by_hand_survives_a_cancelled_rollback(database: str) -> None:
    fill(database)
    assert chronos(database, "migrate", "--yes").returncode == 0
    query(database, "INSERT INTO webhook_log_old (id, status, timestamp) VALUES (7000, 'by hand', now())")
    query(database, "INSERT INTO webhook_log (id, status, timestamp) VALUES (8000, 'new', now())")
    reader = holding(database, "SELECT FROM webhook_log LIMIT 1")
    with reader, started(database, "rollback", "--yes") as process:
        assert process.stdout is not None
        next(line for line in process.stdout if "waiting for a lock on webhook_log" in line)
        query(database, "INSERT INTO webhook_log (id, status, timestamp) VALUES (8001, 'meanwhile', now())")
        query(database, "UPDATE webhook_log SET status = 'changed' WHERE id = 8000")
        next(line for line in process.stdout if "waiting for" in line)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 3
    stayed = chronos(database, "migrate", "--yes", "--resume")
    assert stayed.returncode == 0, stayed.stderr
    assert "failed" not in stayed.stdout + stayed.stderr
    done = chronos(database, "rollback", "--yes")
    assert done.returncode == 0, done.stderr
    assert query(database, "SELECT id, status FROM webhook_log WHERE id >= 7000 ORDER BY 1") == [
        (7000, "by hand"),
        (8000, "changed"),
        (8001, "meanwhile"),
    ]


def test_a_state_created_by_another_role_is_not_trusted(database: str) -> None:
    """Its contents would be run with the privileges of the role that resumes the migration."""
    fill(database)
    role = f"stranger_{make_url(database).database}"
    query(database, f"CREATE ROLE {role}; GRANT CREATE ON SCHEMA public TO {role}")
    try:
        for made in (
            "CREATE TABLE webhook_log_migration (phase text)",
            "CREATE VIEW webhook_log_migration AS SELECT 'undone'::text AS phase",
        ):
            query(database, f"SET ROLE {role}; {made}")
            for verb in (
                ["migrate", "--yes"],
                ["migrate", "--dry-run"],
                ["rollback", "--yes"],
                ["finalize", "--yes"],
            ):
                refused = chronos(database, *verb)
                assert refused.returncode == 2, refused.stdout + refused.stderr
                assert "where a migration of webhook_log keeps its state" in refused.stderr
                assert f"belongs to {role}" in refused.stderr
            kind = "VIEW" if "VIEW" in made else "TABLE"
            query(database, f"DROP {kind} webhook_log_migration")
    finally:
        query(database, f"DROP OWNED BY {role}; DROP ROLE {role}")
