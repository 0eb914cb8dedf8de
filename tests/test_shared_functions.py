"""The pair of functions that all tables of a schema share: who owns it, when it is created and dropped."""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from psycopg2 import errors
from psycopg2.extensions import cursor
from rich.console import Console
from sqlalchemy.engine import Engine, make_url

from chronos.catalog.shape import read
from chronos.db import connect_engine, execute, statement, transaction
from chronos.errors import RefusedError
from chronos.functions import VERSION, definitions, distrusted, installation, upgrade
from chronos.migration.console import Output
from chronos.migration.finalize import finish
from chronos.migration.operator import Operator
from chronos.migration.rollback import undo
from chronos.migration.run import Options, migrate
from chronos.table import WEBHOOK_LOG, Interval, TableSpec
from tests.partitioned import (
    add_partitions,
    attached,
    create,
    create_tables,
    drop,
    install_functions,
    leaves,
    run,
)
from tests.tables import connected, dump, query, value
from tests.waiting import wait_until

EVENTS = TableSpec("events", column="at", every=Interval.HOUR, retention_days=2, ahead_days=1)
METRICS = TableSpec("metrics", column="at", retention_days=2, ahead_days=1)

SHARED = (
    "SELECT p.proname, pg_get_userbyid(p.proowner) FROM pg_proc p WHERE p.proname LIKE 'chronos_%' ORDER BY 1"
)

# As version 2 installed them: all code in the table's own pair.
VERSION_2 = """
CREATE FUNCTION create_future_{table}_partitions(days_ahead integer) RETURNS SETOF text LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET lock_timeout = '200ms' SET timezone = 'UTC'
    AS $$ BEGIN RAISE EXCEPTION 'version 2'; END $$;
CREATE FUNCTION drop_old_{table}_partitions(retention_days integer) RETURNS SETOF text LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET lock_timeout = '200ms' SET timezone = 'UTC'
    AS $$ BEGIN RAISE EXCEPTION 'version 2'; END $$;
REVOKE ALL ON FUNCTION create_future_{table}_partitions, drop_old_{table}_partitions FROM PUBLIC;
COMMENT ON FUNCTION create_future_{table}_partitions(integer) IS 'chronos 2: creates';
COMMENT ON FUNCTION drop_old_{table}_partitions(integer) IS 'chronos 2: drops';
"""


@pytest.fixture
def roles(postgres: str) -> Iterator[tuple[str, str, str]]:
    """The owner of a schema, and two roles that own tables in it."""
    names = tuple(f"chronos_{who}_{uuid.uuid4().hex[:8]}" for who in ("home", "alice", "bob"))
    query(postgres, "; ".join(f"CREATE ROLE {name}" for name in names))
    yield names[0], names[1], names[2]
    query(postgres, f"DROP ROLE {', '.join(names)}")


@pytest.fixture
def shop(roles: tuple[str, str, str], database: str) -> str:
    """The URL of a database with the schema ``shop``, in which both have a partitioned table."""
    home, alice, bob = roles
    query(
        database,
        f"CREATE SCHEMA shop AUTHORIZATION {home}; GRANT USAGE, CREATE ON SCHEMA shop TO {alice}, {bob};"
        "CREATE TABLE shop.events (at timestamptz) PARTITION BY RANGE (at);"
        "CREATE TABLE shop.metrics (at timestamptz) PARTITION BY RANGE (at);"
        f"ALTER TABLE shop.events OWNER TO {alice}; ALTER TABLE shop.metrics OWNER TO {bob}",
    )
    return database


def install(url: str, spec: TableSpec, owner: str, *, by: str | None = None) -> None:
    """Install the functions of a table in ``shop``, as the role ``by`` or, by default, a superuser."""
    spec = spec.located("shop")
    with connected(url, autocommit=False) as conn, conn.cursor() as cur:
        if by:
            run(cur, f"SET LOCAL ROLE {by}")
        for part in installation(spec, owner):
            run(cur, part)
        for function in spec.functions:
            run(cur, f"ALTER FUNCTION shop.{function}(integer) OWNER TO {owner}")
        conn.commit()


def call(url: str, function: str, days: int, *, by: str) -> list[str]:
    """What a function in ``shop`` returns to the role ``by``."""
    with connected(url, autocommit=False) as conn, conn.cursor() as cur:
        run(cur, f"SET LOCAL ROLE {by}")
        return [row[0] for row in run(cur, f"SELECT shop.{function}({days})")]


def engine_for(url: str) -> Engine:
    return connect_engine(make_url(url))


# Who owns the shared pair


def test_a_shared_pair_installed_by_a_superuser_belongs_to_the_schema_owner(
    shop: str, roles: tuple[str, str, str]
) -> None:
    home, alice, bob = roles
    install(shop, EVENTS, alice)
    install(shop, METRICS, bob)
    assert query(shop, SHARED) == [("chronos_create_partitions", home), ("chronos_drop_partitions", home)]
    assert len(call(shop, EVENTS.create_function, 0, by=alice)) >= 1
    assert len(call(shop, METRICS.create_function, 1, by=bob)) == 2
    with pytest.raises(errors.InsufficientPrivilege, match=f"for function {EVENTS.drop_function}"):
        call(shop, EVENTS.drop_function, 1, by=bob)


def test_the_shared_pair_gives_no_privilege_on_other_owners_tables(
    shop: str, roles: tuple[str, str, str]
) -> None:
    _, alice, bob = roles
    install(shop, EVENTS, alice)
    shared = "chronos_{}_partitions('shop', 'events', {}now() - interval '1 day') --"
    for function in (shared.format("create", "'hour', 0, "), shared.format("drop", "0, ")):
        with pytest.raises(errors.InsufficientPrivilege, match="permission denied for table events"):
            call(shop, function, 0, by=bob)


def test_a_pair_of_another_tables_owner_is_refused_until_a_superuser_takes_it_over(
    shop: str, roles: tuple[str, str, str]
) -> None:
    home, alice, bob = roles
    install(shop, EVENTS, alice, by=alice)
    assert query(shop, SHARED) == [("chronos_create_partitions", alice), ("chronos_drop_partitions", alice)]
    with pytest.raises(
        errors.InsufficientPrivilege, match=f"belong to {alice}, who could make {bob} run any"
    ):
        install(shop, METRICS, bob, by=bob)
    assert not value(shop, "SELECT to_regproc(%s)", f"shop.{METRICS.drop_function}")

    install(shop, EVENTS, alice)

    assert query(shop, SHARED) == [("chronos_create_partitions", home), ("chronos_drop_partitions", home)]
    install(shop, METRICS, bob, by=bob)
    assert len(call(shop, METRICS.create_function, 1, by=bob)) == 2
    assert len(call(shop, EVENTS.create_function, 0, by=alice)) >= 1


def test_an_existing_function_with_the_name_is_replaced_or_refused(
    shop: str, roles: tuple[str, str, str]
) -> None:
    home, alice, bob = roles
    query(
        shop,
        f"SET ROLE {bob}; CREATE FUNCTION shop.chronos_create_partitions(schema_name text, table_name text,"
        " every text, days_ahead integer, as_of timestamptz) RETURNS SETOF text LANGUAGE plpgsql AS"
        " 'BEGIN RAISE EXCEPTION ''trapped''; END'",
    )
    with pytest.raises(errors.InsufficientPrivilege, match=f"belong to {bob}, who could make {alice} run"):
        install(shop, EVENTS, alice, by=alice)
    install(shop, EVENTS, alice)
    assert query(shop, SHARED) == [("chronos_create_partitions", home), ("chronos_drop_partitions", home)]
    assert len(call(shop, EVENTS.create_function, 0, by=alice)) >= 1


def test_a_superusers_table_calls_no_function_of_the_schema_owner(
    shop: str, roles: tuple[str, str, str]
) -> None:
    """The wrapper runs as the owner of the table, so the schema owner would become a superuser."""
    home, alice, _ = roles
    install(shop, EVENTS, alice)
    [(_, before), _] = query(shop, SHARED)
    assert before == home
    me = value(shop, "SELECT current_user::text")
    query(shop, f"ALTER TABLE shop.metrics OWNER TO {me}")
    install(shop, METRICS, me)
    kept = [("chronos_create_partitions", me), ("chronos_drop_partitions", me)]
    assert query(shop, SHARED) == kept
    install(shop, EVENTS, alice)
    assert query(shop, SHARED) == kept
    assert len(call(shop, EVENTS.create_function, 0, by=alice)) >= 1
    with pytest.raises(errors.InsufficientPrivilege, match="must be owner of function"):
        query(shop, f"SET ROLE {home}; ALTER FUNCTION shop.chronos_drop_partitions RENAME TO mine")


def test_a_replaced_function_of_another_role_leaves_no_execute_privilege(
    shop: str, roles: tuple[str, str, str]
) -> None:
    home, alice, bob = roles
    query(
        shop,
        f"SET ROLE {bob}; CREATE FUNCTION shop.{EVENTS.drop_function}(retention_days integer)"
        " RETURNS SETOF text LANGUAGE sql AS 'SELECT NULL::text';"
        f" GRANT EXECUTE ON FUNCTION shop.{EVENTS.drop_function} TO {home}",
    )
    install(shop, EVENTS, alice)
    with pytest.raises(errors.InsufficientPrivilege, match=f"for function {EVENTS.drop_function}"):
        call(shop, EVENTS.drop_function, 0, by=home)


def test_no_overload_is_called_instead_of_the_shared_function(shop: str, roles: tuple[str, str, str]) -> None:
    _, alice, bob = roles
    trap = (
        f"SET ROLE {bob}; CREATE FUNCTION shop.chronos_drop_partitions({{}}) RETURNS SETOF text"
        " LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''trapped''; END'"
    )
    query(shop, trap.format("varchar, varchar, integer, timestamptz, grace_days integer"))
    query(shop, trap.format("VARIADIC text[]"))
    install(shop, EVENTS, alice)
    query(shop, trap.format("text, text, integer, timestamptz, grace_days integer, integer DEFAULT 0"))
    assert call(shop, EVENTS.drop_function, 1, by=alice) == []
    with pytest.raises(errors.AmbiguousFunction):
        install(shop, METRICS, bob)


def test_an_older_pair_that_cannot_be_replaced_is_refused_and_a_newer_one_stays(
    shop: str, roles: tuple[str, str, str]
) -> None:
    _, alice, bob = roles
    install(shop, EVENTS, alice)
    comment = "COMMENT ON FUNCTION shop.chronos_drop_partitions IS 'chronos {}: of another version'"
    query(shop, comment.format(VERSION - 1))
    with pytest.raises(errors.InsufficientPrivilege, match=f"are version {VERSION - 1} and belong to"):
        install(shop, METRICS, bob, by=bob)
    query(shop, comment.format(VERSION + 1))
    for by in (bob, None):
        install(shop, METRICS, bob, by=by)
        assert value(
            shop, "SELECT obj_description('shop.chronos_drop_partitions'::regproc, 'pg_proc')"
        ).startswith(f"chronos {VERSION + 1}: ")
    assert len(call(shop, METRICS.create_function, 1, by=bob)) == 2


def test_the_owner_of_the_database_shares_the_pair_of_the_public_schema(
    roles: tuple[str, str, str], database: str
) -> None:
    _, owner, _ = roles
    name = make_url(database).database
    query(
        database,
        f"ALTER DATABASE {name} OWNER TO {owner}; ALTER SCHEMA public OWNER TO pg_database_owner;"
        f" SET ROLE {owner}; CREATE TABLE events (at timestamptz) PARTITION BY RANGE (at)",
    )
    with connected(database) as conn, conn.cursor() as cur:
        run(cur, f"SET ROLE {owner}")
        install_functions(cur, EVENTS)
        assert len(run(cur, "SELECT create_future_events_partitions(0)")) >= 1
    assert {row[1] for row in query(database, SHARED)} == {"pg_database_owner"}
    query(database, f"ALTER DATABASE {name} OWNER TO CURRENT_USER; DROP OWNED BY {owner}")


def test_concurrent_installations_in_one_schema_wait_for_each_other(
    shop: str, roles: tuple[str, str, str]
) -> None:
    _, alice, bob = roles
    waiting = (
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = %s::oid"
    )
    here = value(shop, "SELECT oid FROM pg_database WHERE datname = current_database()")
    with connected(shop, autocommit=False) as conn, conn.cursor() as cur, ThreadPoolExecutor() as pool:
        for part in installation(EVENTS.located("shop"), alice):
            run(cur, part)
        second = pool.submit(install, shop, METRICS, bob)
        wait_until(lambda: value(shop, waiting, here), 10, "the second waits")
        conn.commit()
        second.result(timeout=30)
    assert len(call(shop, METRICS.create_function, 1, by=bob)) == 2


# Upgrades


def test_an_upgrade_from_version_2_says_what_it_did(database: str) -> None:
    with connected(database, autocommit=False) as conn, conn.cursor() as cur:
        create_tables(cur)
        for function in WEBHOOK_LOG.functions:
            run(cur, f"DROP FUNCTION {function}(integer)")
        run(cur, "DROP FUNCTION chronos_create_partitions, chronos_drop_partitions")
        run(cur, VERSION_2.format(table="webhook_log"))
        add_partitions(cur, -16, -15)
        conn.commit()
    functions = " and ".join(f"public.{function}" for function in WEBHOOK_LOG.functions)
    assert upgrade(engine_for(database), WEBHOOK_LOG) == [f"Installed {functions}"]
    assert upgrade(engine_for(database), WEBHOOK_LOG) == [f"{functions} are already current"]
    with connected(database, autocommit=False) as conn, conn.cursor() as cur:
        assert create(cur, 1) == leaves(cur, 0, 1)
        assert drop(cur, 15) == leaves(cur, -16, -16)
    query(database, f"COMMENT ON FUNCTION {WEBHOOK_LOG.drop_function}(integer) IS 'chronos 2: drops'")
    assert upgrade(engine_for(database), WEBHOOK_LOG) == [f"Installed {functions}"]


def test_a_refused_upgrade_changes_nothing(shop: str, roles: tuple[str, str, str]) -> None:
    _, alice, bob = roles
    install(shop, EVENTS, alice, by=alice)
    metrics = METRICS.located("shop")
    password = uuid.uuid4().hex
    query(shop, f"ALTER ROLE {bob} LOGIN PASSWORD '{password}'")
    url = make_url(shop).set(username=bob, password=password)
    with pytest.raises(RefusedError, match=r"let a superuser install them: .*; nothing was changed$"):
        upgrade(connect_engine(url), metrics)
    with connect_engine(url).connect() as conn, transaction(conn):
        assert definitions(conn, metrics) == {}
        execute(conn, statement("SET TRANSACTION READ ONLY"))
        assert "let a superuser install them" in str(distrusted(conn, read(conn, metrics, "metrics")))


# Migrate and roll back


def plain_tables(url: str) -> None:
    for table in ("events", "metrics"):
        query(
            url,
            f"CREATE TABLE {table} (id bigserial PRIMARY KEY, at timestamptz NOT NULL);"
            f"CREATE INDEX ON {table} (at); INSERT INTO {table} (at) SELECT now() - n * interval '1 hour'"
            " FROM generate_series(1, 30) n",
        )


def operator() -> Operator:
    return Operator(Output(Console(file=io.StringIO(), soft_wrap=True)))


def go(url: str, spec: TableSpec) -> None:
    migrate(engine_for(url), spec, Options(), operator(), lambda found: None)


def back(url: str, spec: TableSpec) -> None:
    undo(engine_for(url), spec, operator(), lambda found, by_hand: None)


def test_the_shared_pair_stays_until_the_last_table_is_rolled_back(database: str, pg_bin: Path) -> None:
    plain_tables(database)
    before = dump(database, pg_bin)
    go(database, METRICS)
    with_one = value(database, f"SELECT array_agg(x) FROM ({SHARED}) x")
    go(database, EVENTS)
    back(database, METRICS)
    assert value(database, f"SELECT array_agg(x) FROM ({SHARED}) x") == with_one
    assert query(database, "SELECT create_future_events_partitions(2)")
    back(database, EVENTS)
    assert query(database, SHARED) == []
    assert dump(database, pg_bin) == before


def test_rollback_restores_earlier_functions_with_owner_privileges_and_comment(
    roles: tuple[str, str, str], database: str, pg_bin: Path
) -> None:
    _, alice, bob = roles
    plain_tables(database)
    query(
        database,
        VERSION_2.format(table="metrics") + f"GRANT CREATE ON SCHEMA public TO {alice};"
        f"ALTER FUNCTION {METRICS.drop_function} OWNER TO {alice};"
        f"GRANT EXECUTE ON FUNCTION {METRICS.drop_function} TO {bob} WITH GRANT OPTION",
    )
    before = dump(database, pg_bin)
    go(database, METRICS)
    assert len(query(database, "SELECT create_future_metrics_partitions(2)")) == 1
    back(database, METRICS)
    assert dump(database, pg_bin) == before


def test_a_table_migrates_and_rolls_back_beside_another_that_uses_the_shared_pair(
    database: str, pg_bin: Path
) -> None:
    plain_tables(database)
    go(database, EVENTS)
    finish(engine_for(database), EVENTS, operator(), lambda found, there: None)
    before = dump(database, pg_bin)
    go(database, METRICS)
    back(database, METRICS)
    assert dump(database, pg_bin) == before


# While a migration is open


@pytest.fixture
def cur(database: str) -> Iterator[cursor]:
    """A table with expired partitions, whose migration is over except for what is left of its state."""
    with connected(database) as conn, conn.cursor() as cur:
        create_tables(cur)
        add_partitions(cur, -17, 1)
        run(
            cur,
            "CREATE TABLE webhook_log_migration (phase text, verified boolean);"
            "INSERT INTO webhook_log_migration VALUES ('migrated', true)",
        )
        yield cur


def set_phase(cur: cursor, phase: str, *, verified: bool = True) -> None:
    run(cur, "UPDATE webhook_log_migration SET phase = %s, verified = %s", phase, verified)


@pytest.mark.parametrize(
    ("phase", "verified", "notice"),
    [
        ("returning", True, "webhook_log is on its way back to the plain table; no partition was dropped"),
        ("returning", False, "webhook_log is on its way back to the plain table; no partition was dropped"),
        ("migrated", False, "shortly before the swap are not compared yet; no partition was dropped"),
    ],
)
def test_nothing_is_dropped_while_rows_are_still_to_be_compared(
    cur: cursor, phase: str, verified: bool, notice: str
) -> None:
    set_phase(cur, phase, verified=verified)
    assert drop(cur, 15) == []
    assert notice in cur.connection.notices[-1]
    assert attached(cur) == leaves(cur, -17, 1)
    assert create(cur, 2) == leaves(cur, 2, 2)


@pytest.mark.parametrize("phase", ["migrated", "finalizing"])
def test_expired_partitions_are_dropped_once_every_row_is_compared(cur: cursor, phase: str) -> None:
    set_phase(cur, phase)
    assert drop(cur, 15) == leaves(cur, -17, -16)


def test_a_rollback_that_starts_meanwhile_is_noticed(database: str, cur: cursor) -> None:
    with connected(database, autocommit=False) as other, other.cursor() as operating:
        run(operating, "LOCK TABLE webhook_log IN SHARE ROW EXCLUSIVE MODE")
        set_phase(operating, "returning")
        with pytest.raises(errors.LockNotAvailable):
            drop(cur, 15)
        other.commit()
    assert drop(cur, 15) == []
    assert attached(cur) == leaves(cur, -17, 1)


def test_a_snapshot_that_may_be_older_than_the_rollback_is_refused(cur: cursor) -> None:
    run(cur, "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT now()")
    with pytest.raises(errors.InvalidTransactionState, match="only in READ COMMITTED transactions"):
        drop(cur, 15)
    run(cur, "ROLLBACK; DROP TABLE webhook_log_migration")
    run(cur, "BEGIN ISOLATION LEVEL REPEATABLE READ")
    assert drop(cur, 15) == leaves(cur, -17, -16)


@pytest.mark.parametrize(
    "trap",
    [
        "CREATE VIEW webhook_log_migration AS SELECT trap() AS phase, true AS verified",
        "CREATE TABLE webhook_log_migration AS SELECT 'returning' AS phase, true AS verified;"
        "ALTER TABLE webhook_log_migration ENABLE ROW LEVEL SECURITY;"
        "CREATE POLICY trap ON webhook_log_migration USING (trap() = '');"
        "GRANT SELECT ON webhook_log_migration TO PUBLIC",
    ],
)
def test_another_roles_object_with_the_states_name_is_not_read(
    roles: tuple[str, str, str], database: str, trap: str
) -> None:
    _, alice, bob = roles
    with connected(database, autocommit=False) as conn, conn.cursor() as cur:
        create_tables(cur)
        add_partitions(cur, -17, 1)
        run(cur, f"GRANT CREATE ON SCHEMA public TO {alice}, {bob}; ALTER TABLE webhook_log OWNER TO {alice}")
        for leaf in attached(cur):
            run(cur, f"ALTER TABLE {leaf} OWNER TO {alice}")
        run(
            cur,
            f"GRANT EXECUTE ON FUNCTION {WEBHOOK_LOG.drop_function} TO {alice}; SET LOCAL ROLE {bob};"
            "CREATE FUNCTION trap() RETURNS text LANGUAGE plpgsql AS"
            " 'BEGIN RAISE EXCEPTION ''trapped''; END';"
            f"{trap}; SET LOCAL ROLE {alice}",
        )
        assert drop(cur, 15) == leaves(cur, -17, -16)


def test_the_owner_can_call_while_the_state_belongs_to_the_operator(
    roles: tuple[str, str, str], database: str
) -> None:
    """A superuser migrates, and the owner of the table drops partitions before finalize."""
    _, alice, _ = roles
    plain_tables(database)
    query(
        database,
        f"GRANT CREATE ON SCHEMA public TO {alice}; ALTER TABLE metrics OWNER TO {alice};"
        "UPDATE metrics SET at = at - interval '1 day'",
    )
    go(database, METRICS)
    assert value(
        database,
        "SELECT pg_get_userbyid(relowner) = current_user FROM pg_class WHERE relname = 'metrics_migration'",
    )
    with connected(database) as conn, conn.cursor() as cur:
        run(cur, f"SET ROLE {alice}")
        assert len(run(cur, "SELECT drop_old_metrics_partitions(1)")) == 1
        run(cur, "RESET ROLE; UPDATE metrics_migration SET phase = 'returning'")
        run(cur, f"SET ROLE {alice}")
        assert run(cur, "SELECT drop_old_metrics_partitions(0)") == []
        assert "on its way back" in conn.notices[-1]
