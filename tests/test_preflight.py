"""What stands in the way of a migration is named before anything is changed."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from chronos.cli import cli
from chronos.migration.table_shape import differences
from chronos.settings import get_settings
from tests.tables import query, relations, value
from tests.test_table_shape import shape

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

REFUSED = {
    "inbound foreign key": (
        "CREATE TABLE retry (log_id bigint REFERENCES webhook_log)",
        "table public.retry has a foreign key (retry_log_id_fkey) to webhook_log",
    ),
    "foreign key to itself": (
        "ALTER TABLE webhook_log ADD parent bigint CONSTRAINT own REFERENCES webhook_log",
        "the foreign key own of webhook_log refers to webhook_log itself",
    ),
    "materialized view": (
        "CREATE MATERIALIZED VIEW stale AS SELECT id FROM webhook_log",
        "materialized view public.stale reads webhook_log",
    ),
    "view grouped by the key": (
        "CREATE VIEW grouped AS SELECT id, status FROM webhook_log GROUP BY id",
        "view public.grouped groups by the primary key of webhook_log alone",
    ),
    "row type in a function": (
        "CREATE FUNCTION f(webhook_log) RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "function public.f(public.webhook_log) uses the row type of webhook_log",
    ),
    "row type in a view": (
        "CREATE VIEW whole AS SELECT w FROM webhook_log w",
        "column w of view public.whole uses the row type of webhook_log",
    ),
    "row trigger with transition tables": (
        "CREATE TRIGGER t AFTER UPDATE ON webhook_log REFERENCING NEW TABLE AS n FOR EACH ROW"
        " EXECUTE FUNCTION note()",
        "trigger t has transition tables for each row",
    ),
    "publication of some rows, not through the root": (
        "CREATE PUBLICATION part FOR TABLE webhook_log WHERE (id > 0)",
        "publication part publishes some columns or rows of webhook_log",
    ),
    "replica identity by an index": (
        "CREATE UNIQUE INDEX u ON webhook_log (id, timestamp);"
        " ALTER TABLE webhook_log REPLICA IDENTITY USING INDEX u",
        "the replica identity of webhook_log is an index of its own",
    ),
    "unique without the timestamp": (
        "CREATE UNIQUE INDEX only_id ON webhook_log (id, status)",
        "the unique index only_id does not hold the timestamp",
    ),
    "exclusion constraint": (
        "ALTER TABLE webhook_log ADD CONSTRAINT ex EXCLUDE (id WITH =, timestamp WITH =)",
        "the exclusion constraint of ex cannot be partitioned",
    ),
    "deferrable key": (
        "ALTER TABLE webhook_log DROP CONSTRAINT webhook_log_pkey,"
        " ADD CONSTRAINT webhook_log_pkey PRIMARY KEY (id) DEFERRABLE",
        "the primary key webhook_log_pkey is deferrable",
    ),
    "check that is not inherited": (
        "ALTER TABLE webhook_log ADD CONSTRAINT mine CHECK (id > 0) NO INHERIT",
        "the check constraint mine is NO INHERIT",
    ),
    "rows against a check": (
        "ALTER TABLE webhook_log ADD CONSTRAINT late CHECK (status <> 'ok') NOT VALID",
        "50 rows to be copied (for example id 1) would fail the check constraint late",
    ),
    "unchecked foreign key": (
        "ALTER TABLE webhook_log ADD CONSTRAINT fk FOREIGN KEY (webhook_endpoint_id)"
        " REFERENCES webhook_endpoint NOT VALID",
        "the foreign key fk is not validated",
    ),
    "policy that reads the table": (
        "CREATE POLICY own ON webhook_log USING (id IN (SELECT id FROM webhook_log))",
        "policy own reads webhook_log itself",
    ),
    "statistics elsewhere": (
        "CREATE SCHEMA away; CREATE STATISTICS away.pair ON id, status FROM webhook_log",
        "extended statistics pair stand in another schema",
    ),
    "table of a type": (
        'CREATE TYPE entry AS (id bigint, "timestamp" timestamptz, status text, webhook_endpoint_id bigint);'
        " ALTER TABLE webhook_log OF entry",
        "webhook_log is a table of the composite type public.entry",
    ),
    "part of an extension": (
        "ALTER EXTENSION plpgsql ADD TABLE webhook_log",
        "table public.webhook_log belongs to or depends on an extension",
    ),
    "constraint trigger of another table": (
        "CREATE CONSTRAINT TRIGGER far AFTER INSERT ON webhook_endpoint FROM webhook_log FOR EACH ROW"
        " EXECUTE FUNCTION note()",
        "trigger far on table public.webhook_endpoint depends on webhook_log in a way",
    ),
    "a name that is needed": (
        "CREATE TABLE webhook_log_new ()",
        "the name webhook_log_new is taken",
    ),
    "no index to copy by": (
        "DROP INDEX by_time; CREATE INDEX by_time ON webhook_log USING brin (timestamp)",
        "no index begins with timestamp",
    ),
    "infinite timestamp": (
        "INSERT INTO webhook_log (timestamp) VALUES ('infinity')",
        "the timestamp of 1 row is infinite (for example id 51, infinity)",
    ),
}


def migrate(url: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """The verb as the shell calls it, without the cost of a process: exit code and what it printed."""
    monkeypatch.setenv("DATABASE_URL", url)
    get_settings.cache_clear()
    result = CliRunner().invoke(cli, ["migrate", "--yes"])
    get_settings.cache_clear()
    return result.exit_code, result.output


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name_and_nothing_changed(
    kind: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hindrance, message = REFUSED[kind]
    query(database, _TABLE)
    query(database, hindrance)
    was, there = shape(database, schema="public"), relations(database)

    code, output = migrate(database, monkeypatch)

    assert message in output
    assert code == 2
    assert "was not changed" in output
    assert differences(was, shape(database, schema="public")) == []
    assert relations(database) == there


def test_a_slot_that_would_send_the_copy_is_refused(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query(database, _TABLE + "CREATE PUBLICATION sent FOR TABLE webhook_log")
    slot = value(database, "SELECT 'chronos_' || oid FROM pg_database WHERE datname = current_database()")
    query(database, "SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", slot)
    try:
        code, output = migrate(database, monkeypatch)
        assert code == 2
        assert f"replication slot {slot} may be sending publication sent" in output
    finally:
        query(database, "SELECT pg_drop_replication_slot(%s)", slot)
