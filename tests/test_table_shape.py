"""A table with everything on it, migrated and rolled back: what came along, what came back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from chronos.catalog.shape import TableShape, differences, read
from chronos.db import connect_engine, transaction
from chronos.demo.rows import create_webhook_log
from chronos.table import WEBHOOK_LOG, quoted
from tests.command import chronos, started
from tests.conftest import MakeDatabase
from tests.kitchen_sink import SCHEMA, forget, kitchen_sink
from tests.tables import connected, dump, holding, query, value, waiting_pid

# Only what the plan announces may be missing from the dump of the migrated database.
ANNOUNCED = (
    r'CREATE TABLE "Hooks"\.webhook_log \(',
    r'CREATE (UNIQUE )?INDEX \S.* ON "Hooks"\.webhook_log ',  # ON ONLY from now on
    r'ALTER TABLE ONLY "Hooks"\.webhook_log\s+ADD CONSTRAINT webhook_log_pkey PRIMARY KEY \(id\)',
    r'ALTER TABLE ONLY "Hooks"\.webhook_log\s+ADD CONSTRAINT endpoint_fk ',  # not ONLY from now on
    r'ALTER TABLE "Hooks"\.webhook_log\s+ADD CONSTRAINT "late check" .* NOT VALID',  # valid from now on
    r'ALTER SEQUENCE "Hooks"\.webhook_log_id_seq OWNED BY ',  # by neither table
)


def statements(text: str) -> set[str]:
    """The statements of a dump, without comments."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("--"))
    return {part.strip() for part in re.split(r";\n", lines) if part.strip()}


def shape(url: str, table: str = "webhook_log", schema: str = SCHEMA) -> TableShape:
    engine = connect_engine(make_url(url))
    with engine.connect() as conn, transaction(conn):
        return read(conn, WEBHOOK_LOG.located(schema), table)


@pytest.fixture
def sink(make_database: MakeDatabase, postgres: str) -> Iterator[str]:
    """A database with the table; the roles are dropped after the database."""
    url = make_database()
    kitchen_sink(url)
    yield url
    forget(url)


def test_everything_on_the_table_is_migrated_and_rolled_back(sink: str, pg_bin: Path) -> None:
    before = dump(sink, pg_bin)
    noted = query(sink, 'SELECT what, count(*) FROM "Hooks".audit GROUP BY 1 ORDER BY 1')
    was = shape(sink)

    result = chronos(sink, "migrate", "--yes")
    assert result.returncode == 0, result.stdout + result.stderr

    after = statements(dump(sink, pg_bin))
    lost = [s for s in statements(before) - after if not any(re.match(a, s) for a in ANNOUNCED)]
    assert lost == []
    assert any(
        re.match(
            r'ALTER TABLE ONLY "Hooks"\.webhook_log\s+ADD CONSTRAINT webhook_log_pkey'
            r" PRIMARY KEY \(id, \"timestamp\"\) WITH \(fillfactor='90'\)",
            s,
        )
        for s in after
    )
    new = shape(sink)
    assert [c.name for c in new.columns] == [c.name for c in was.columns]
    assert new.foreign_keys == was.foreign_keys
    assert [t.name for t in new.triggers] == [t.name for t in was.triggers]
    # The table that went out of use does not block deletes of what its rows reference.
    assert shape(sink, "webhook_log_old").foreign_keys == ()
    assert "chronos.copying" not in str(
        query(
            sink,
            "SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgname NOT LIKE 'webhook_log_note_%%'",
        )
    )

    # No trigger fired for a copied row.
    assert query(sink, 'SELECT what, count(*) FROM "Hooks".audit GROUP BY 1 ORDER BY 1') == noted

    # The partitions have what they need, and no privilege for roles that had none.
    leaves = query(
        sink,
        "SELECT DISTINCT pg_get_userbyid(c.relowner), c.reloptions, t.reloptions, c.relreplident::text,"
        " (SELECT count(*) FROM aclexplode(c.relacl) x WHERE x.grantee <> c.relowner)"
        " FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_class t ON t.oid = c.reltoastrelid"
        " WHERE i.inhparent = '\"Hooks\".webhook_log'::regclass",
    )
    assert leaves == [
        (
            "Chronos Owner",
            ["autovacuum_enabled=no", "fillfactor=80", "autovacuum_vacuum_scale_factor=0.05"],
            ["autovacuum_enabled=false"],
            "f",
            0,
        )
    ]
    leaked = query(
        sink,
        "SELECT relname FROM pg_class, aclexplode(relacl) x WHERE relnamespace = '\"Hooks\"'::regnamespace"
        " AND relname LIKE 'webhook_log%%' AND x.grantee = 'chronos_leak'::regrole"
        " UNION ALL SELECT proname FROM pg_proc, aclexplode(proacl) x"
        " WHERE x.grantee = 'chronos_leak'::regrole AND proname LIKE '%%webhook_log%%'",
    )
    assert leaked == []

    # Views, functions and rules work on the new table.
    with connected(sink) as conn, conn.cursor() as cursor:
        cursor.execute(
            'SET search_path = "Hooks"; TRUNCATE audit;'
            " INSERT INTO inbox VALUES ('failed', now());"
            " SELECT (SELECT tableoid::regclass::text FROM webhook_log WHERE id = -1),"
            ' (SELECT count(*) FROM "Failed Log" WHERE id = -1),'
            " how_many() = (SELECT count(*) FROM webhook_log)"
        )
        [where, seen, same] = cursor.fetchone() or ()
        assert (where.startswith("webhook_log_y"), seen, same) == (True, 1, True)
        cursor.execute("SELECT what FROM audit ORDER BY 1")
        assert [row[0] for row in cursor.fetchall()] == [
            "Always There INSERT",
            "at_commit INSERT",
            "by_statement INSERT",
            "on_write INSERT",
        ]
        cursor.execute("DELETE FROM webhook_log WHERE id = -1")

    result = chronos(sink, "rollback", "--yes")
    assert result.returncode == 0, result.stdout + result.stderr
    assert dump(sink, pg_bin) == before
    assert value(sink, 'SELECT "Hooks".how_many() = (SELECT count(*) FROM "Hooks".webhook_log)')


def test_a_rollback_before_the_swap_leaves_nothing(sink: str, pg_bin: Path) -> None:
    before = dump(sink, pg_bin)
    held = chronos(sink, "migrate", "--yes", "--hold")
    assert held.returncode == 0, held.stdout + held.stderr
    assert dump(sink, pg_bin) != before

    result = chronos(sink, "rollback", "--yes")

    assert result.returncode == 0, result.stdout + result.stderr
    assert dump(sink, pg_bin) == before


def test_new_partitions_match_the_others(sink: str) -> None:
    assert chronos(sink, "migrate", "--yes").returncode == 0
    made = query(sink, 'SELECT "Hooks".create_future_webhook_log_partitions(32)')
    assert len(made) == 2
    traits = query(
        sink,
        "SELECT DISTINCT pg_get_userbyid(c.relowner), c.reloptions, t.reloptions, c.relreplident::text,"
        " (SELECT count(*) FROM aclexplode(c.relacl) x WHERE x.grantee <> c.relowner),"
        " (SELECT array_agg((tgname::text, tgenabled::text) ORDER BY tgname) FROM pg_trigger"
        "  WHERE tgrelid = c.oid AND tgparentid <> 0 AND tgname NOT LIKE 'RI_%%')::text,"
        " (SELECT array_agg((attname::text, attstorage, attcompression, coalesce(attstattarget, -1),"
        "                    ARRAY(SELECT o FROM unnest(attoptions) o WHERE o LIKE 'n_d%%')) ORDER BY attnum)"
        "  FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped)::text,"
        " (SELECT count(*) FROM pg_index WHERE indrelid = c.oid),"
        " (SELECT count(*) FROM pg_statistic_ext WHERE stxrelid = c.oid)"
        " FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_class t ON t.oid = c.reltoastrelid"
        " WHERE i.inhparent = '\"Hooks\".webhook_log'::regclass",
    )
    assert len(traits) == 1

    # Nothing that belongs to the old table itself blocks dropping it.
    result = chronos(sink, "finalize", "--yes")
    assert result.returncode == 0, result.stdout + result.stderr
    left = query(sink, "SELECT relname FROM pg_class WHERE relname ~ '(_old|_new|_migration.*)$'")
    assert left == []


def test_an_ordinary_owner_can_migrate_and_roll_back(database: str, pg_bin: Path) -> None:
    """No superuser; with triggers, a view, a publication of all tables, and writes in between."""
    owner = f"owner_{value(database, 'SELECT oid FROM pg_database WHERE datname = current_database()')}"
    query(
        database,
        f"CREATE ROLE {owner} LOGIN PASSWORD 'secret'; CREATE SCHEMA app AUTHORIZATION {owner};"
        f" SET ROLE {owner}; SET search_path = app;"
        " CREATE TABLE audit (what text);"
        " CREATE TABLE webhook_log (id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,"
        "  timestamp timestamptz NOT NULL DEFAULT now(), status text);"
        " CREATE INDEX ON webhook_log (timestamp);"
        " INSERT INTO webhook_log (timestamp) SELECT now() - n * interval '1 hour'"
        "  FROM generate_series(0, 99) n;"
        " CREATE VIEW latest AS SELECT max(id) AS id FROM webhook_log;"
        " CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS"
        "  'BEGIN INSERT INTO app.audit VALUES (TG_OP); RETURN NULL; END';"
        " CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON webhook_log"
        "  FOR EACH ROW EXECUTE FUNCTION note();"
        " RESET ROLE; CREATE PUBLICATION everything FOR ALL TABLES",
    )
    url = make_url(database).set(username=owner, password="secret").render_as_string(hide_password=False)
    before = dump(database, pg_bin)
    try:
        result = chronos(url, "migrate", "--yes")
        assert result.returncode == 0, result.stdout + result.stderr
        query(
            url,
            "SET search_path = app; INSERT INTO webhook_log (status) VALUES ('new');"
            " UPDATE webhook_log SET status = 'seen' WHERE id = 100; DELETE FROM webhook_log WHERE id = 99;"
            " CREATE VIEW later AS SELECT count(*) FROM webhook_log",
        )
        assert value(url, "SELECT id FROM app.latest") == 101
        result = chronos(url, "rollback", "--yes")
        assert result.returncode == 0, result.stdout + result.stderr
        assert query(url, "SELECT what FROM app.audit") == [("INSERT",), ("UPDATE",), ("DELETE",)]
        assert query(url, "SELECT id FROM app.latest") == [(101,)]
        assert value(url, "SELECT count(*) FROM app.later") == 1
        assert value(url, "SELECT count(*) FROM app.webhook_log") == 100
        query(url, "DROP VIEW app.later")
        assert dump(database, pg_bin) == before
    finally:
        query(database, f"DROP OWNED BY {owner} CASCADE; DROP ROLE {owner}")


def test_a_change_of_the_table_before_the_swap_is_not_lost(sink: str, pg_bin: Path) -> None:
    """A privilege is granted while the swap waits: the new table does not have it, so there is no swap.

    The copy is kept until the grant is undone.
    """
    before = dump(sink, pg_bin)
    reader = ExitStack()
    reader.enter_context(holding(sink, 'SELECT FROM "Hooks".webhook_log'))
    with reader, started(sink, "migrate", "--yes") as run:
        waiting_pid(sink, '"Hooks".webhook_log')
        query(sink, 'GRANT DELETE ON "Hooks".webhook_log TO chronos_auditor')
        reader.close()
        out, err = run.communicate(timeout=60)
    assert run.returncode == 3, out + err
    assert "was changed after webhook_log_new was built, and now differs from it: grants" in err
    query(sink, 'REVOKE DELETE ON "Hooks".webhook_log FROM chronos_auditor')
    resumed = chronos(sink, "migrate", "--yes", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert chronos(sink, "rollback", "--yes").returncode == 0
    assert dump(sink, pg_bin) == before


def test_a_view_created_while_the_swap_waits_reads_the_new_table(database: str) -> None:
    """The swap waits for its transaction, which changes nothing in the table's own catalog row."""
    create_webhook_log(connect_engine(make_url(database)), 500)
    with ExitStack() as open_yet:
        maker = open_yet.enter_context(connected(database, autocommit=False))
        with maker.cursor() as cursor:
            cursor.execute("CREATE VIEW late AS SELECT count(*) FROM webhook_log")
        run = open_yet.enter_context(started(database, "migrate", "--yes"))
        waiting_pid(database, "webhook_log")
        maker.commit()
        out, err = run.communicate(timeout=60)
    assert run.returncode == 0, out + err
    query(database, "DROP TABLE webhook_log_old CASCADE")
    insert = "INSERT INTO webhook_log (status, timestamp) VALUES ('new', now())"
    before = value(database, "TABLE late")
    query(database, insert)
    assert value(database, "TABLE late") == before + 1


def test_differences_name_what_differs(database: str) -> None:
    query(
        database,
        "CREATE TABLE webhook_log (id bigint PRIMARY KEY, timestamp timestamptz NOT NULL, status text);"
        " CREATE INDEX by_status ON webhook_log (status)",
    )
    was = shape(database, schema="public")
    assert differences(was, was) == []
    query(
        database,
        "COMMENT ON TABLE webhook_log IS 'x'; DROP INDEX by_status; CREATE INDEX other ON webhook_log (id);"
        " ALTER TABLE webhook_log ALTER status SET DEFAULT 'new', REPLICA IDENTITY FULL, ADD note text;"
        " GRANT SELECT, UPDATE ON webhook_log TO PUBLIC",
    )
    owner = quoted(value(database, "SELECT current_user::text"))
    assert differences(was, shape(database, schema="public")) == [
        "columns: default of status: nothing became 'new'::text",
        "columns: note is new",
        "comment: nothing became x",
        f"grants: SELECT to PUBLIC by {owner} is new",
        f"grants: UPDATE to PUBLIC by {owner} is new",
        "indexes: by_status is missing",
        "indexes: other is new",
        "replica identity: d became f",
    ]
    renamed = replace(was, indexes=tuple(replace(i, name=f"{i.name}_new") for i in was.indexes))
    assert differences(was, renamed, [(f"{i.name}_new", i.name) for i in was.indexes]) == []
