"""What blocks a migration is named, with its id and a remedy, before anything is changed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner
from sqlalchemy.engine import make_url

from chronos.catalog.shape import TableShape, differences
from chronos.catalog.shape import read as read_shape
from chronos.cli import cli
from chronos.db import connect_engine, transaction
from chronos.migration.checks import CHECKS, Finding, Survey, first_plan, survey, warnings
from chronos.migration.state import Strategy
from chronos.settings import get_settings
from chronos.table import WEBHOOK_LOG, Interval, TableSpec, midnight
from tests.command import chronos
from tests.conftest import MakeDatabase
from tests.tables import connected, holding, query, relations, value

SPEC = WEBHOOK_LOG.located("public")

_TABLE = """
CREATE TABLE webhook_endpoint (id bigint PRIMARY KEY);
CREATE TABLE webhook_log (
    id bigserial, timestamp timestamptz NOT NULL, status text, webhook_endpoint_id bigint,
    CONSTRAINT webhook_log_pkey PRIMARY KEY (id)
);
CREATE INDEX by_time ON webhook_log (timestamp);
INSERT INTO webhook_log (timestamp, status) SELECT now() - n * interval '1 hour', 'ok'
FROM generate_series(1, 50) n;
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
"""

# The id, the change to the table, and how the message begins.
REFUSED = [
    (
        "old-table-exists",
        "CREATE TABLE webhook_log_old ()",
        "Table webhook_log_old already exists",
    ),
    (
        "no-table",
        "DROP TABLE webhook_log",
        "there is no table webhook_log in schema public",
    ),
    (
        "already-partitioned",
        "DROP TABLE webhook_log; CREATE TABLE webhook_log (id int) PARTITION BY RANGE (id)",
        "webhook_log is partitioned already; see python -m chronos status",
    ),
    (
        "not-ordinary-table",
        "ALTER TABLE webhook_log SET UNLOGGED",
        "webhook_log is not an ordinary table",
    ),
    (
        "names-taken",
        "CREATE TABLE webhook_log_new ()",
        "the name webhook_log_new is taken and the migration needs it",
    ),
    (
        "names-taken",
        "CREATE TYPE webhook_log_migration AS ENUM ('x')",
        "the name webhook_log_migration is taken",
    ),
    (
        "names-taken",
        "CREATE FUNCTION webhook_log_note_change() RETURNS int LANGUAGE sql RETURN 1; CREATE"
        " TRIGGER webhook_log_note_insert AFTER INSERT ON webhook_log EXECUTE FUNCTION note();"
        " CREATE STATISTICS pair ON id, status FROM webhook_log; CREATE STATISTICS pair_new ON"
        " id, timestamp FROM webhook_log",
        "the names pair_new, webhook_log_note_change, webhook_log_note_insert are taken",
    ),
    (
        "no-time-column",
        "ALTER TABLE webhook_log RENAME timestamp TO at",
        "webhook_log has no column timestamp",
    ),
    (
        "time-column-type",
        "ALTER TABLE webhook_log ALTER timestamp TYPE bigint USING 1",
        "the column timestamp is bigint; it must be timestamptz, timestamp or date",
    ),
    (
        "no-key",
        "ALTER TABLE webhook_log DROP CONSTRAINT webhook_log_pkey",
        "webhook_log has no key to find a changed row by",
    ),
    (
        "no-key",
        "ALTER TABLE webhook_log DROP CONSTRAINT webhook_log_pkey, ALTER id DROP NOT NULL;"
        " CREATE UNIQUE INDEX nullable ON webhook_log (id, timestamp)",
        "webhook_log has no key to find a changed row by",
    ),
    (
        "no-time-index",
        "DROP INDEX by_time; CREATE INDEX by_time ON webhook_log USING brin (timestamp)",
        "no index begins with timestamp, and the migration needs one to find the rows of a period;"
        ' CREATE INDEX CONCURRENTLY ON public.webhook_log ("timestamp")',
    ),
    (
        "no-time-index",
        "DROP INDEX by_time; CREATE INDEX ON webhook_log (timestamp) WHERE status = 'ok'",
        "no index begins with timestamp",
    ),
    (
        "unique-without-time",
        "CREATE UNIQUE INDEX only_id ON webhook_log (id, status)",
        "the unique index only_id does not include timestamp",
    ),
    (
        "exclusion-constraint",
        "ALTER TABLE webhook_log ADD CONSTRAINT ex EXCLUDE (id WITH =, timestamp WITH =)",
        "the exclusion constraint of ex cannot be partitioned",
    ),
    (
        "foreign-key-not-validated",
        "ALTER TABLE webhook_log ADD CONSTRAINT fk FOREIGN KEY (webhook_endpoint_id) REFERENCES"
        " webhook_endpoint NOT VALID",
        'the foreign key fk is not validated; ALTER TABLE public.webhook_log VALIDATE CONSTRAINT "fk"',
    ),
    (
        "no-inherit",
        "ALTER TABLE webhook_log ADD CONSTRAINT mine CHECK (id > 0) NO INHERIT",
        "the check constraint mine is NO INHERIT",
    ),
    (
        "inbound-fk",
        "CREATE TABLE retry (log_id bigint REFERENCES webhook_log)",
        "table public.retry has a foreign key (retry_log_id_fkey) to webhook_log, where (id)"
        " alone will not be unique; drop it first",
    ),
    (
        "inbound-fk",
        "CREATE UNIQUE INDEX pair ON webhook_log (id, timestamp); CREATE TABLE retry (id bigint,"
        " at timestamptz, FOREIGN KEY (id, at) REFERENCES webhook_log (id, timestamp))",
        "table public.retry has a foreign key (retry_id_at_fkey) to webhook_log, and would keep"
        " referring to webhook_log_old; drop it first",
    ),
    (
        "self-fk",
        "ALTER TABLE webhook_log ADD parent bigint CONSTRAINT own REFERENCES webhook_log",
        "the foreign key own of webhook_log refers to webhook_log itself",
    ),
    (
        "materialized-view",
        "CREATE MATERIALIZED VIEW stale AS SELECT id FROM webhook_log",
        "materialized view public.stale reads webhook_log",
    ),
    (
        "groups-by-key",
        "CREATE VIEW grouped AS SELECT id, status FROM webhook_log GROUP BY id",
        "view public.grouped groups by the primary key of webhook_log alone, which will be (id, timestamp)",
    ),
    (
        "row-type",
        "CREATE FUNCTION f(webhook_log) RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "function public.f(public.webhook_log) uses the row type of webhook_log",
    ),
    (
        "row-type",
        "CREATE VIEW whole AS SELECT w FROM webhook_log w",
        "column w of view public.whole uses the row type of webhook_log",
    ),
    (
        "policy-reads-table",
        "CREATE POLICY own ON webhook_log USING (id IN (SELECT id FROM webhook_log))",
        "policy own reads webhook_log itself",
    ),
    (
        "transition-tables",
        "CREATE TRIGGER t AFTER UPDATE ON webhook_log REFERENCING NEW TABLE AS n FOR EACH ROW"
        " EXECUTE FUNCTION note()",
        "row trigger t has transition tables",
    ),
    (
        "unknown-dependent",
        "CREATE CONSTRAINT TRIGGER far AFTER INSERT ON webhook_endpoint FROM webhook_log FOR"
        " EACH ROW EXECUTE FUNCTION note()",
        "trigger far on table public.webhook_endpoint depends on webhook_log in a way",
    ),
    (
        "publication-of-a-part",
        "CREATE PUBLICATION part FOR TABLE webhook_log WHERE (id > 0)",
        "publication part publishes some columns or rows of webhook_log",
    ),
    (
        "replica-identity-index",
        "CREATE UNIQUE INDEX u ON webhook_log (id, timestamp); ALTER TABLE webhook_log REPLICA"
        " IDENTITY USING INDEX u",
        "the replica identity of webhook_log is an index, which its partitions do not inherit",
    ),
    (
        "typed-table",
        'CREATE TYPE entry AS (id bigint, "timestamp" timestamptz, status text,'
        " webhook_endpoint_id bigint); ALTER TABLE webhook_log OF entry",
        "webhook_log is a table of the composite type public.entry",
    ),
    (
        "extension-member",
        "ALTER EXTENSION plpgsql ADD TABLE webhook_log",
        "table public.webhook_log belongs to or depends on an extension",
    ),
    (
        "statistics-elsewhere",
        "CREATE SCHEMA away; CREATE STATISTICS away.pair ON id, status FROM webhook_log",
        "extended statistics pair are in another schema",
    ),
    (
        "rows-without-a-place",
        "INSERT INTO webhook_log (timestamp) VALUES ('infinity')",
        "the timestamp of 1 row is infinite (for example id 51, infinity); correct or delete them",
    ),
    (
        "rows-without-a-place",
        "ALTER TABLE webhook_log ALTER timestamp DROP NOT NULL; INSERT INTO webhook_log"
        " (timestamp) VALUES (NULL), (NULL)",
        "the timestamp of 2 rows is NULL (for example id 51); correct or delete them",
    ),
    (
        "rows-against-check",
        "ALTER TABLE webhook_log ADD CONSTRAINT late CHECK (status <> 'ok') NOT VALID",
        "50 rows to be copied (for example id 1) would fail the check constraint late",
    ),
]


def surveyed(url: str, spec: TableSpec = SPEC, strategy: Strategy = Strategy.COPY) -> Survey:
    """What ``survey`` finds, in a read-only transaction."""
    with connect_engine(make_url(url)).connect() as conn, transaction(conn):
        conn.exec_driver_sql("SET TRANSACTION READ ONLY")
        return survey(conn, spec, strategy)


def warned(url: str, spec: TableSpec = SPEC) -> list[Finding]:
    """The warnings about a table without blockers."""
    with connect_engine(make_url(url)).connect() as conn, transaction(conn):
        found = survey(conn, spec)
        assert found.blockers == ()
        return warnings(conn, found)


def shape(url: str) -> TableShape:
    with connect_engine(make_url(url)).connect() as conn, transaction(conn):
        return read_shape(conn, SPEC, "webhook_log")


def test_ids_are_unique_and_in_kebab_case() -> None:
    assert [i for i, n in Counter(check.id for check in CHECKS).items() if n > 1] == []
    assert [c.id for c in CHECKS if not re.fullmatch(r"[a-z]+(-[a-z]+)*", c.id)] == []


def test_an_ordinary_table_passes(database: str) -> None:
    query(database, _TABLE)
    assert surveyed(database).blockers == ()


@pytest.mark.parametrize(("id_", "hindrance", "message"), REFUSED)
def test_an_obstacle_is_refused_with_its_id_and_remedy(
    id_: str, hindrance: str, message: str, database: str
) -> None:
    query(database, _TABLE)
    query(database, hindrance)
    [found] = surveyed(database).blockers
    assert str(found).startswith(message)
    assert str(found).endswith(f" [{id_}]")


def test_a_refused_migration_changes_nothing(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query(database, _TABLE + "CREATE TABLE retry (log_id bigint REFERENCES webhook_log);")
    query(database, "CREATE UNIQUE INDEX only_id ON webhook_log (id, status)")
    was, there = shape(database), relations(database)

    monkeypatch.setenv("DATABASE_URL", database)
    get_settings.cache_clear()
    result = CliRunner().invoke(cli, ["migrate", "--yes"])
    get_settings.cache_clear()

    assert result.exit_code == 2, result.output
    for part in ("[inbound-fk]", "[unique-without-time]", "was not changed"):
        assert part in result.output
    assert differences(was, shape(database)) == []
    assert relations(database) == there


def test_rows_beyond_the_last_partition_are_named_with_the_last_day(database: str) -> None:
    query(database, _TABLE + "INSERT INTO webhook_log (timestamp) SELECT now() + '31 days'")
    found = surveyed(database)
    day = f"{found.now + timedelta(days=30):%Y-%m-%d}"
    assert [b.id for b in found.blockers] == ["rows-without-a-place"]
    assert f"of 1 row lies after {day}, the last day with a partition" in found.blockers[0].text


def test_many_partitions_are_a_warning_that_names_the_next_wider_interval(database: str) -> None:
    query(database, _TABLE)
    hourly = replace(SPEC, every=Interval.HOUR)
    found = surveyed(database, hourly)
    assert found.blockers == ()
    with connect_engine(make_url(database)).connect() as conn, transaction(conn):
        [warning] = [w for w in warnings(conn, found) if w.id == "many-partitions"]
    assert re.match(
        r"about 1,1\d\d partitions, one per hour, .*; with one per day there would be 46$", warning.text
    )


@pytest.mark.parametrize(
    ("change", "sql"),
    [
        (
            "ALTER TABLE webhook_log DROP CONSTRAINT webhook_log_pkey",
            "CREATE UNIQUE INDEX CONCURRENTLY webhook_log_key ON public.webhook_log (id);"
            " ALTER TABLE public.webhook_log ADD PRIMARY KEY USING INDEX webhook_log_key",
        ),
        (
            'CREATE UNIQUE INDEX "Only" ON webhook_log (id, status)',
            'DROP INDEX CONCURRENTLY public."Only"',
        ),
        (
            "ALTER TABLE webhook_log ADD CONSTRAINT only_id UNIQUE (id, status)",
            "ALTER TABLE public.webhook_log DROP CONSTRAINT only_id",
        ),
        (
            "CREATE TABLE retry (log_id bigint REFERENCES webhook_log)",
            "ALTER TABLE public.retry DROP CONSTRAINT retry_log_id_fkey",
        ),
        (
            "ALTER TABLE webhook_log ADD parent bigint CONSTRAINT mine REFERENCES webhook_log",
            "ALTER TABLE public.webhook_log DROP CONSTRAINT mine",
        ),
        (
            "DROP INDEX by_time",
            'CREATE INDEX CONCURRENTLY ON public.webhook_log ("timestamp")',
        ),
    ],
)
def test_running_the_sql_of_a_message_removes_the_blocker(database: str, change: str, sql: str) -> None:
    query(database, _TABLE + change)
    [blocker] = surveyed(database).blockers
    assert sql in blocker.text
    assert len(str(blocker)) < 500
    for statement in sql.split(";"):
        query(database, statement)
    assert surveyed(database).blockers == ()


def test_checks_work_for_any_table_and_column_name(database: str) -> None:
    spec = TableSpec("Event % Log", column="At", retention_days=2, ahead_days=3, schema="Odd Place")
    query(
        database,
        'CREATE SCHEMA "Odd Place"; CREATE TABLE "Odd Place"."Event % Log"'
        ' (tenant uuid, "No" text, "At" date, n int CONSTRAINT few CHECK (n < 5) NO INHERIT,'
        '  PRIMARY KEY (tenant, "No"));'
        " CREATE TABLE child (tenant uuid, no text,"
        '  FOREIGN KEY (tenant, no) REFERENCES "Odd Place"."Event % Log");'
        ' CREATE POLICY own ON "Odd Place"."Event % Log"'
        '  USING (n IN (SELECT count(*) FROM "Odd Place"."Event % Log"));',
    )
    assert [str(b) for b in surveyed(database, spec).blockers] == [
        "no index begins with At, and the migration needs one to find the rows of a period;"
        ' CREATE INDEX CONCURRENTLY ON "Odd Place"."Event % Log" ("At"); [no-time-index]',
        "the check constraint few is NO INHERIT, which a partitioned table cannot have; drop it and add it"
        " again without NO INHERIT [no-inherit]",
        "table public.child has a foreign key (child_tenant_no_fkey) to Event % Log, where (tenant, No) alone"
        " will not be unique; drop it first: ALTER TABLE public.child DROP CONSTRAINT child_tenant_no_fkey;"
        " afterwards refer to a lookup table, a plain table of these keys that a trigger fills; or make it"
        " composite, which stops retention from dropping partitions: ALTER TABLE public.child ADD FOREIGN"
        ' KEY ("tenant", "no", ...) REFERENCES "Odd Place"."Event % Log" ("tenant", "No", "At");'
        " [inbound-fk]",
        "policy own reads Event % Log itself, and would keep reading Event % Log_old; drop it first"
        " [policy-reads-table]",
    ]
    query(
        database,
        'DROP TABLE child; DROP POLICY own ON "Odd Place"."Event % Log";'
        ' ALTER TABLE "Odd Place"."Event % Log" DROP CONSTRAINT few;'
        ' CREATE INDEX ON "Odd Place"."Event % Log" ("At");'
        ' INSERT INTO "Odd Place"."Event % Log" SELECT'
        "  (repeat('0', 31) || n)::uuid, 'b', '2999-12-31' FROM generate_series(1, 2) n;",
    )
    found = surveyed(database, spec)
    [beyond] = found.blockers
    assert beyond.id == "rows-without-a-place"
    assert "(for example tenant 00000000-0000-0000-0000-000000000001, No b, 2999-12-31)" in beyond.text
    assert surveyed(database, replace(spec, every=Interval.HOUR)).blockers[0].id == "time-column-type"


@pytest.mark.parametrize(
    ("key", "hindrance"),
    [
        ("PRIMARY KEY (id, timestamp)", ""),
        ("PRIMARY KEY (timestamp, id)", ""),
        ("PRIMARY KEY (timestamp)", ""),
        ("PRIMARY KEY (id) DEFERRABLE", ""),
        ("UNIQUE (status, id)", "ALTER TABLE webhook_log ALTER status SET NOT NULL"),
    ],
)
def test_every_kind_of_key_passes(key: str, hindrance: str, database: str) -> None:
    query(
        database, _TABLE + f"ALTER TABLE webhook_log DROP CONSTRAINT webhook_log_pkey, ADD {key};{hindrance}"
    )
    assert surveyed(database).blockers == ()


def test_a_name_that_is_too_long_is_refused(database: str) -> None:
    spec = TableSpec("é" * 20, retention_days=15, schema="public")
    query(database, _TABLE.replace("webhook_log", spec.name))
    [found] = surveyed(database, spec).blockers
    assert found.id == "name-too-long"
    assert "rename the table, to at most 38 bytes" in found.text


def test_without_retention_everything_since_the_oldest_row_is_kept(database: str) -> None:
    query(database, _TABLE)
    spec = replace(SPEC, retention_days=None, every=Interval.WEEK)
    assert surveyed(database, spec).oldest == value(database, "SELECT min(timestamp) FROM webhook_log")
    query(database, "INSERT INTO webhook_log (timestamp) VALUES ('2025-01-01 12:00+00')")
    found = surveyed(database, spec)
    assert found.blockers == ()
    assert found.cutoff == datetime(2024, 12, 30, tzinfo=UTC)
    plan = first_plan(found)
    assert (plan.cutoff, plan.first) == (found.cutoff, found.cutoff)
    assert plan.periods[-1].start <= midnight(found.today + timedelta(days=30)) < plan.end

    query(database, "INSERT INTO webhook_log (timestamp) VALUES ('0044-03-15 12:00+00 BC')")
    [found_] = surveyed(database, spec).blockers
    assert found_.id == "too-many-partitions"


def test_the_plan_of_a_table_with_retention(database: str) -> None:
    query(database, _TABLE)
    found = surveyed(database)
    plan = first_plan(found)
    assert (plan.started_at, plan.cutoff) == (found.now, found.now - timedelta(days=15))
    assert plan.periods == SPEC.wanted(found.now)
    assert (plan.old_key, plan.new_key) == (("id",), ("id", "timestamp"))
    assert ("INDEX", "webhook_log_pkey", "webhook_log_pkey_old", "webhook_log_pkey_new") in plan.renames


def test_more_partitions_than_locks_are_refused(database: str) -> None:
    query(database, _TABLE)
    locks = value(
        database,
        "SELECT current_setting('max_locks_per_transaction')::int"
        " * (current_setting('max_connections')::int + current_setting('max_prepared_transactions')::int)",
    )
    days = locks // 5  # a table, its TOAST table and that one's index, and two indexes
    [found] = surveyed(database, replace(SPEC, ahead_days=days)).blockers
    assert found.id == "lock-table-too-small"
    assert [w.id for w in warned(database, replace(SPEC, ahead_days=days * 3 // 5))] == [
        "lock-table-nearly-full"
    ]


def test_a_temporary_view_of_another_session_is_named_with_its_session(database: str) -> None:
    query(database, _TABLE)
    with holding(database, "CREATE TEMP VIEW mine AS SELECT id FROM webhook_log") as other:
        assert surveyed(database).blockers == ()
        other.commit()
        [found] = surveyed(database).blockers
        assert found.id == "temp-view"
        assert re.search(r"temporary view pg_temp_\d+\.mine of another session reads webhook_log", found.text)
        assert f"SELECT pg_terminate_backend({other.info.backend_pid})" in found.text
        with other.cursor() as cursor:
            cursor.execute("SELECT 1")
        assert found in surveyed(database).blockers
    assert surveyed(database).blockers == ()


_VIA_ROOT = "WITH (publish_via_partition_root = true)"


@contextmanager
def slot(url: str, plugin: str) -> Iterator[str]:
    """A logical replication slot in the database."""
    name: str = value(url, "SELECT 'chronos_' || oid FROM pg_database WHERE datname = current_database()")
    # Newer minor versions only accept the plugin libraries on a list.
    allowed = "SELECT set_config(name, %s, false) FROM pg_settings WHERE name = 'output_plugin_libraries';"
    create = "SELECT pg_create_logical_replication_slot(%s, %s)"
    query(url, f"{allowed} {create}", f'"{plugin}"', name, plugin)
    try:
        yield name
    finally:
        query(url, "SELECT pg_drop_replication_slot(%s)", name)


def test_a_slot_for_a_publication_by_table_sends_no_copied_row(database: str) -> None:
    query(database, _TABLE + f"CREATE PUBLICATION sent FOR TABLE webhook_log {_VIA_ROOT}")
    with slot(database, "pgoutput"):
        assert surveyed(database).blockers == ()


@pytest.mark.parametrize(
    ("tables", "remedy"),
    [
        ("ALL TABLES", "create the publication again, FOR TABLE"),
        ("TABLES IN SCHEMA public", "ALTER PUBLICATION sent DROP TABLES IN SCHEMA public, and ADD TABLE"),
    ],
)
def test_a_slot_for_a_publication_of_all_tables_is_refused(tables: str, remedy: str, database: str) -> None:
    query(database, _TABLE + f"CREATE PUBLICATION sent FOR {tables} {_VIA_ROOT}")
    assert "publication-of-all-tables" in [w.id for w in warned(database)]
    with slot(database, "pgoutput") as name:
        [found] = surveyed(database).blockers
    assert found.id == "slot-sends-all-tables"
    assert f"replication slot {name} (pgoutput) may be sending publication sent" in found.text
    assert remedy in found.text
    assert f"SELECT pg_drop_replication_slot('{name}')" in found.text


def test_a_slot_of_another_plugin_is_refused_unless_duplicates_are_accepted(database: str) -> None:
    query(database, _TABLE)
    # By its path the server takes it for another plugin, so every server has one. No consumer reads it.
    with slot(database, "$libdir/pgoutput") as name:
        [found] = surveyed(database).blockers
        assert found.id == "slot-sends-everything"
        assert f"replication slot {name} sends everything written in this database" in found.text
        assert f"SELECT pg_drop_replication_slot('{name}')" in found.text
        assert found.text.endswith(f"--accept-duplicates {name}")
        assert chronos(database, "migrate", "--yes", "--hold").returncode == 2
        other = chronos(database, "migrate", "--yes", "--accept-duplicates", name, "--accept-duplicates", "x")
        assert other.returncode == 2
        assert "there is no logical replication slot x in this database" in other.stderr
        assert chronos(database, "migrate", "--yes", "--accept-duplicates", name).returncode == 0
        back = chronos(database, "rollback", "--yes")
        assert (back.returncode, "[slot-sends-again]" in back.stderr) == (2, True)
        assert chronos(database, "rollback", "--yes", "--force").returncode == 0


def test_a_slot_created_while_a_migration_is_held_stops_resume_unless_accepted(
    database: str,
) -> None:
    """What is replayed after that would be sent twice."""
    query(database, _TABLE + f"CREATE PUBLICATION sent FOR ALL TABLES {_VIA_ROOT}")
    assert chronos(database, "migrate", "--yes", "--hold").returncode == 0
    with slot(database, "pgoutput") as name:
        refused = chronos(database, "migrate", "--yes", "--resume")
        assert (refused.returncode, "[slot-sends-all-tables]" in refused.stderr) == (2, True), refused.stderr
        accepted = ("--accept-duplicates", name)
        assert chronos(database, "migrate", "--yes", "--resume", "--hold", *accepted).returncode == 0
        resumed = chronos(database, "migrate", "--yes", "--resume")
        assert resumed.returncode == 0, resumed.stderr
        assert f"Options: --accept-duplicates {name}" in resumed.stdout


def test_a_slot_does_not_block_attach_until_rows_have_to_be_carried_back(
    database: str,
) -> None:
    query(database, _TABLE + f"CREATE PUBLICATION sent FOR ALL TABLES {_VIA_ROOT}")
    with slot(database, "pgoutput") as name:
        assert surveyed(database, strategy=Strategy.ATTACH).blockers == ()
        there = ("migrate", "--yes", "--strategy", "attach")
        assert chronos(database, *there).returncode == 0
        assert chronos(database, "rollback", "--yes").returncode == 0
        assert chronos(database, *there).returncode == 0
        query(database, "INSERT INTO webhook_log (id, timestamp) VALUES (-1, now() + interval '9 days')")
        refused = chronos(database, "rollback", "--yes")
        assert (refused.returncode, "[slot-sends-again]" in refused.stderr) == (2, True), refused.stderr
        assert f"pg_drop_replication_slot('{name}')" in refused.stderr
        assert chronos(database, "rollback", "--yes", "--force").returncode == 0


def test_missing_privileges_are_named(make_database: MakeDatabase) -> None:
    database = make_database()
    oid = value(database, "SELECT oid FROM pg_database WHERE datname = current_database()")
    role, owner = f"chronos_other_{oid}", f"chronos_owner_{oid}"
    query(
        database,
        _TABLE + f"CREATE ROLE {owner}; CREATE ROLE {role} LOGIN PASSWORD 'x';"
        " REVOKE EXECUTE ON FUNCTION note FROM PUBLIC;"
        " CREATE TRIGGER t AFTER INSERT ON webhook_log FOR EACH ROW EXECUTE FUNCTION note();"
        " ALTER TABLE webhook_log ADD FOREIGN KEY (webhook_endpoint_id) REFERENCES webhook_endpoint;"
        " ALTER TABLE webhook_log ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;"
        " CREATE VIEW seen AS SELECT id FROM webhook_log;"
        f" ALTER TABLE webhook_log OWNER TO {owner}; REVOKE CREATE ON SCHEMA public FROM PUBLIC",
    )
    url = make_url(database).set(username=role, password="x").render_as_string(hide_password=False)
    try:
        found = surveyed(url, replace(SPEC, retention_days=None))
        assert [b.id for b in found.blockers] == [
            "not-owner",
            "no-create-on-schema",
            "owner-cannot-create",
            "no-references",
            "other-roles",
            "dependent-not-owned",
            "dependent-schema",
            "trigger-function",
            "forced-row-security",
        ]
    finally:
        query(database, f"DROP OWNED BY {role}, {owner} CASCADE; DROP ROLE {role}, {owner}")


def test_warnings_do_not_block_the_migration(database: str) -> None:
    query(
        database,
        _TABLE + "CREATE FUNCTION where_am_i() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM TG_TABLE_NAME; RETURN NULL; END';"
        " CREATE TRIGGER t AFTER INSERT ON webhook_log FOR EACH ROW EXECUTE FUNCTION where_am_i()",
    )
    with connected(database) as conn, conn.cursor() as cursor:
        cursor.execute("BEGIN; DELETE FROM webhook_log WHERE id = 1; PREPARE TRANSACTION 'held over'")
    try:
        found = warned(database)
    finally:
        query(database, "ROLLBACK PREPARED 'held over'")
    assert {w.id for w in found} >= {"prepared-transaction", "trigger-sees-partition"}


def test_statements_the_application_must_change_are_found_in_functions_and_settings(database: str) -> None:
    role = make_url(database).database
    query(
        database,
        _TABLE
        + """
CREATE FUNCTION prune() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM webhook_log WHERE ctid IN (SELECT ctid FROM webhook_log LIMIT 100);
    DELETE FROM webhook_endpoint WHERE ctid = '(0,1)';
END $$;
CREATE FUNCTION upsert(bigint) RETURNS void LANGUAGE sql AS $$
    INSERT INTO webhook_log (id, timestamp) VALUES ($1, now()) ON CONFLICT (id) DO NOTHING $$;
CREATE FUNCTION upsert_again(bigint) RETURNS void LANGUAGE sql AS $$
    INSERT INTO public.webhook_log (id, timestamp) VALUES ($1, now())
    ON CONFLICT ON CONSTRAINT webhook_log_pkey DO NOTHING $$;
CREATE FUNCTION last_id() RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN RETURN currval(pg_get_serial_sequence('webhook_log', 'id')); END $$;
-- None of these counts.
CREATE TABLE webhook_log_notes (id int UNIQUE, ctid_seen text);
CREATE FUNCTION other() RETURNS void LANGUAGE sql AS $$
    DELETE FROM webhook_log_notes WHERE ctid IN (SELECT ctid FROM webhook_log_notes);
    INSERT INTO webhook_log_notes (id) SELECT 1 ON CONFLICT (id) DO NOTHING;
    SELECT pg_get_serial_sequence('webhook_endpoint', 'id') FROM webhook_log -- ctid
$$;
CREATE FUNCTION fine() RETURNS void LANGUAGE sql AS $$
    INSERT INTO webhook_log (timestamp) VALUES (now()) ON CONFLICT (id, timestamp) DO NOTHING $$;
"""
        + f"ALTER DATABASE {role} SET default_transaction_isolation = 'repeatable read'",
    )
    found = warned(database)
    named = [
        (w.id, w.text.partition(" ")[2].partition("(")[0]) for w in found if w.text.startswith("function")
    ]
    assert [n for n in named if n[0] != "trigger-sees-partition"] == [
        ("ctid-idiom", "public.prune"),
        ("on-conflict", "public.upsert"),
        ("on-conflict", "public.upsert_again"),
        ("serial-sequence", "public.last_id"),
    ]
    [isolation] = [w for w in found if w.id == "repeatable-read"]
    assert isolation.text.startswith("this database defaults to REPEATABLE READ")
    assert "currval('public.webhook_log_id_seq')" in next(w.text for w in found if w.id == "serial-sequence")
