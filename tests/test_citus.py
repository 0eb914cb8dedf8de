"""Tables that Citus manages are refused, and only those. The catalogs have only Citus' names and columns.

A superuser can create them where Citus does, in pg_catalog; no other role can.
"""

from __future__ import annotations

import pytest
from psycopg2 import errors
from sqlalchemy.engine import make_url

from chronos.db import connect_engine
from chronos.demo.rows import create_webhook_log
from tests.command import chronos
from tests.partitioned import add_partitions, create_tables, drop, leaves
from tests.tables import connected, holding, query, relations, value

CATALOGS = (
    'CREATE TABLE {schema}.pg_dist_partition (logicalrelid regclass, partmethod "char");'
    "CREATE TABLE {schema}.pg_dist_object (classid oid, objid oid)"
)
IN_PG_CATALOG = "SET allow_system_table_mods = on; " + CATALOGS.format(schema="pg_catalog")
KNOWN = "INSERT INTO pg_catalog.pg_dist_partition VALUES ('public.webhook_log', 'h')"
FORGOTTEN = "DELETE FROM pg_catalog.pg_dist_partition"


def test_a_table_that_citus_manages_is_not_migrated_rolled_back_or_finalized(database: str) -> None:
    create_webhook_log(connect_engine(make_url(database)), 300)
    query(database, IN_PG_CATALOG)
    query(database, KNOWN)
    before = relations(database)
    refused = chronos(database, "migrate", "--yes")
    assert refused.returncode == 2
    assert "SELECT undistribute_table('public.webhook_log', cascade" in refused.stderr.replace("\n", " ")
    assert "[citus-table]" in refused.stderr
    query(database, FORGOTTEN)
    query(
        database,
        "INSERT INTO pg_catalog.pg_dist_object VALUES ('pg_class'::regclass, 'webhook_log_id_seq'::regclass)",
    )
    refused = chronos(database, "migrate", "--yes")
    assert refused.returncode == 2
    assert "citus_unmark_object_distributed" in refused.stderr
    query(database, "DELETE FROM pg_catalog.pg_dist_object")
    assert relations(database) == before
    assert chronos(database, "migrate", "--yes").returncode == 0
    query(database, KNOWN)
    for verb in (("rollback", "--yes", "--force"), ("finalize", "--yes")):
        refused = chronos(database, *verb)
        assert (refused.returncode, "[citus-table]" in refused.stderr) == (2, True), refused.stderr
        assert value(database, "SELECT phase FROM webhook_log_migration") == "migrated"
    query(database, FORGOTTEN)
    assert chronos(database, "rollback", "--yes").returncode == 0


def test_catalogs_with_these_names_in_another_schema_are_not_citus(database: str) -> None:
    create_webhook_log(connect_engine(make_url(database)), 100)
    query(database, CATALOGS.format(schema="public"))
    query(database, "INSERT INTO public.pg_dist_partition VALUES ('public.webhook_log', 'h')")
    assert chronos(database, "migrate", "--yes").returncode == 0


def test_with_citus_the_parent_is_locked_first_and_partitions_in_use_are_skipped(database: str) -> None:
    with connected(database, autocommit=False) as own:
        cur = own.cursor()
        create_tables(cur)
        add_partitions(cur, -18, 0)
        own.commit()
        query(database, IN_PG_CATALOG)
        [used, *others] = leaves(cur, -18, -16)
        with holding(database, f"SELECT count(*) FROM {used}"):
            assert drop(cur, 15) == others
            own.commit()
        with (
            holding(database, "LOCK TABLE ONLY webhook_log IN ACCESS SHARE MODE"),
            pytest.raises(errors.LockNotAvailable, match="canceling statement due to lock timeout"),
        ):
            drop(cur, 15)
        own.rollback()
        assert drop(cur, 15) == [used]
