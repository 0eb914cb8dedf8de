"""The two SQL functions, as a DBA calls them by hand.

Each test takes today from the transaction that calls the function, or uses days so far from today that
midnight makes no difference.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import psycopg2
import pytest
from psycopg2 import errors, sql
from psycopg2.extensions import connection, cursor
from sqlalchemy.engine import make_url

from chronos.db import name, statement
from chronos.demo.embedded import create_database
from chronos.functions import VERSION
from chronos.table import Interval, TableSpec, midnight
from tests.conftest import MakeDatabase
from tests.partitioned import (
    add_partition,
    add_partitions,
    attached,
    column,
    create,
    create_tables,
    drop,
    install_functions,
    leaf,
    leaves,
    run,
    today,
)
from tests.tables import connected, holding, query, value
from tests.waiting import wait_until

Call = Callable[[cursor, int | None], list[str]]


@pytest.fixture
def role(postgres: str) -> Iterator[str]:
    """A role that owns nothing when the test ends."""
    name = f"chronos_test_{uuid.uuid4().hex}"
    query(postgres, f"CREATE ROLE {name}")
    yield name
    query(postgres, f"DROP ROLE {name}")


@pytest.fixture(scope="module")
def scratch(postgres: str) -> Iterator[str]:
    """The URL of an empty database, for tests that commit nothing."""
    name = f"chronos_test_{uuid.uuid4().hex}"
    create_database(postgres, name)
    yield make_url(postgres).set(database=name).render_as_string(hide_password=False)
    query(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def conn(scratch: str) -> Iterator[connection]:
    """A transaction on an empty database, rolled back at the end."""
    with connected(scratch, autocommit=False) as conn:
        yield conn


@pytest.fixture
def own(database: str) -> Iterator[connection]:
    """A connection to the test's own database."""
    with connected(database, autocommit=False) as conn:
        yield conn


@pytest.fixture
def cur(conn: connection) -> cursor:
    """A partitioned table without partitions, and the functions."""
    cur = conn.cursor()
    create_tables(cur)
    return cur


# Creating


def test_create_creates_today_and_the_days_ahead(cur: cursor) -> None:
    assert create(cur, 3) == leaves(cur, 0, 3) == attached(cur)
    assert create(cur, 3) == []
    assert create(cur, 4) == leaves(cur, 4, 4)


def test_create_fills_gaps(cur: cursor) -> None:
    for day in (-2, 0, 3):
        add_partitions(cur, day, day)
    assert create(cur, 4) == leaves(cur, 1, 2) + leaves(cur, 4, 4)
    assert attached(cur) == leaves(cur, -2, -2) + leaves(cur, 0, 4)


def test_create_goes_by_bounds_not_names(cur: cursor) -> None:
    day = today(cur)
    add_partition(cur, "wide", -20, 2)
    add_partition(cur, "another_name", 3, 4)
    for half, hours in (("forenoon", ("00:00", "12:00")), ("afternoon", ("12:00", "24:00"))):
        first, end = (f"{day + timedelta(days=5)} {hour}+00" for hour in hours)
        run(cur, f"CREATE TABLE {half} PARTITION OF webhook_log FOR VALUES FROM ('{first}') TO ('{end}')")
    run(
        cur,
        "CREATE TABLE endless PARTITION OF webhook_log FOR VALUES"
        f" FROM ('{day + timedelta(days=8)} 00:00+00') TO (MAXVALUE)",
    )
    assert create(cur, 10) == leaves(cur, 2, 2) + leaves(cur, 4, 4) + leaves(cur, 6, 7)


@pytest.mark.parametrize("kind", ["TABLE {} ()", "VIEW {} AS SELECT 1", "SEQUENCE {}"])
def test_create_refuses_a_name_that_is_taken(cur: cursor, kind: str) -> None:
    [taken] = leaves(cur, 2, 2)
    run(cur, f"CREATE {kind.format(taken)}; SAVEPOINT before")
    with pytest.raises(errors.DuplicateTable, match=f"the name {taken} is taken") as refused:
        create(cur, 5)
    assert "Rename or drop" in str(refused.value.diag.message_hint)
    run(cur, "ROLLBACK TO before")
    assert attached(cur) == []


def test_create_refuses_a_name_that_another_day_uses(cur: cursor) -> None:
    [taken] = leaves(cur, 2, 2)
    add_partition(cur, taken, 7, 8)
    with pytest.raises(errors.DuplicateTable, match=f"the name {taken} is taken"):
        create(cur, 5)


def test_create_creates_all_or_nothing(cur: cursor) -> None:
    """The morning of the third day already has a partition, so the fourth day is not reached."""
    day = today(cur) + timedelta(days=2)
    run(
        cur,
        "CREATE TABLE morning PARTITION OF webhook_log"
        f" FOR VALUES FROM ('{day} 00:00+00') TO ('{day} 12:00+00'); SAVEPOINT before",
    )
    with pytest.raises(errors.InvalidObjectDefinition, match='would overlap partition "morning"'):
        create(cur, 3)
    run(cur, "ROLLBACK TO before")
    assert attached(cur) == ["morning"]
    assert column(cur, "SELECT count(*) FROM pg_class WHERE relname LIKE 'webhook_log_y%%'") == [0]


def test_create_fails_only_when_the_default_partition_has_rows_of_the_period(cur: cursor) -> None:
    run(cur, "CREATE TABLE rest PARTITION OF webhook_log DEFAULT")
    assert create(cur, 1) == leaves(cur, 0, 1)
    run(cur, "INSERT INTO webhook_log (status, timestamp) VALUES ('ok', now() + interval '3 days')")
    run(cur, "SAVEPOINT before")
    with pytest.raises(errors.CheckViolation, match='default partition "rest" would be violated'):
        create(cur, 5)
    run(cur, "ROLLBACK TO before")
    assert attached(cur) == ["rest", *leaves(cur, 0, 1)]


def test_a_new_partition_matches_its_siblings(role: str, conn: connection) -> None:
    cur = conn.cursor()
    create_tables(cur)
    add_partitions(cur, -1, 0)
    [yesterday], [newest] = leaves(cur, -1, -1), leaves(cur, 0, 0)
    run(
        cur,
        f"ALTER TABLE {yesterday} SET (fillfactor = 50);"
        f"ALTER TABLE {newest} SET (autovacuum_vacuum_scale_factor = 0.3, toast.autovacuum_enabled = false);"
        f"GRANT SELECT ON {newest} TO {role} WITH GRANT OPTION; GRANT INSERT ON {newest} TO PUBLIC;"
        f"ALTER TABLE {newest} REPLICA IDENTITY FULL;"
        f"GRANT CREATE ON SCHEMA public TO {role}; ALTER TABLE webhook_log OWNER TO {role};"
        "CREATE TABLE lowest PARTITION OF webhook_log FOR VALUES FROM (MINVALUE) TO ('2000-01-01 00:00+00')",
    )
    [made] = create(cur, 1)
    likeness = (
        "SELECT pg_get_userbyid(c.relowner), c.reloptions, t.reloptions, c.relreplident,"
        " has_table_privilege(%s, c.oid, 'SELECT WITH GRANT OPTION'),"
        " EXISTS (SELECT FROM aclexplode(c.relacl) a WHERE a.grantee = 0 AND a.privilege_type = 'INSERT')"
        " FROM pg_class c JOIN pg_class t ON t.oid = c.reltoastrelid WHERE c.oid = %s::regclass"
    )
    options = ["autovacuum_vacuum_scale_factor=0.3"]
    assert run(cur, likeness, role, made) == [(role, options, ["autovacuum_enabled=false"], "f", True, True)]
    shape = (
        "SELECT array_agg(replace(indexdef, tablename, 'leaf') ORDER BY indexdef),"
        " (SELECT array_agg(pg_get_constraintdef(k.oid) ORDER BY 1) FROM pg_constraint k"
        "  WHERE k.conrelid = %s::regclass AND k.contype IN ('f', 'p')) FROM pg_indexes WHERE tablename = %s"
    )
    assert run(cur, shape, made, made) == run(cur, shape, newest, newest)
    assert "FOREIGN KEY" in str(run(cur, shape, made, made))


# Dropping


def test_drop_keeps_the_day_exactly_as_old_as_the_retention(cur: cursor) -> None:
    add_partitions(cur, -17, 1)
    assert drop(cur, 15) == leaves(cur, -17, -16)
    assert drop(cur, 15) == []
    assert attached(cur) == leaves(cur, -15, 1)
    assert drop(cur, 0) == leaves(cur, -15, -1)
    assert attached(cur) == leaves(cur, 0, 1)


def test_drop_drops_only_real_partitions_of_this_table(cur: cursor) -> None:
    """By their bounds: a table whose name only looks like an expired partition is user data."""
    add_partitions(cur, -40, -38)
    add_partition(cur, "webhook_log_yearly", -365, -40)
    add_partition(cur, "wide_and_still_needed", -37, -10)
    run(
        cur,
        "CREATE TABLE rest PARTITION OF webhook_log DEFAULT;"
        "CREATE TABLE webhook_log_y2020m01d01 (LIKE webhook_log);"
        "CREATE TABLE another (LIKE webhook_log) PARTITION BY RANGE (timestamp);"
        "CREATE TABLE webhook_log_y2020m01d02 PARTITION OF another"
        " FOR VALUES FROM ('2020-01-02') TO ('2020-01-03');"
        "CREATE TABLE webhook_log_y2020m01d03 () INHERITS (webhook_log_y2020m01d01)",
    )
    add_partitions(cur, 0, 0)
    expected = ["webhook_log_yearly", *leaves(cur, -40, -38)]
    assert drop(cur, 15) == expected
    assert attached(cur) == ["rest", "wide_and_still_needed", *leaves(cur, 0, 0)]
    for spared in ("webhook_log_y2020m01d01", "webhook_log_y2020m01d02", "webhook_log_y2020m01d03"):
        assert column(cur, "SELECT to_regclass(%s) IS NOT NULL", spared) == [True]


def test_drop_keeps_an_unattached_yearly_table(cur: cursor) -> None:
    add_partitions(cur, -20, 0)
    run(cur, "CREATE TABLE webhook_log_yearly (LIKE webhook_log)")
    assert drop(cur, 15) == leaves(cur, -20, -16)
    assert column(cur, "SELECT to_regclass('webhook_log_yearly') IS NOT NULL") == [True]


@pytest.mark.parametrize("with_default", [False, True])
def test_drop_keeps_the_newest_partition(cur: cursor, with_default: bool) -> None:
    add_partitions(cur, -40, -30)
    if with_default:
        run(cur, "CREATE TABLE rest PARTITION OF webhook_log DEFAULT")
    assert drop(cur, 15) == leaves(cur, -40, -31)
    assert drop(cur, 15) == []


def test_drop_handles_minvalue_and_maxvalue_bounds(cur: cursor) -> None:
    run(
        cur,
        "CREATE TABLE lowest PARTITION OF webhook_log FOR VALUES FROM (MINVALUE) TO ('2020-01-01 00:00+00');"
        "CREATE TABLE highest PARTITION OF webhook_log FOR VALUES FROM ('2020-01-02 00:00+00') TO (MAXVALUE)",
    )
    add_partition_2020 = "FROM ('2020-01-01 00:00+00') TO ('2020-01-02 00:00+00')"
    run(cur, f"CREATE TABLE between_them PARTITION OF webhook_log FOR VALUES {add_partition_2020}")
    assert drop(cur, 15) == ["lowest", "between_them"]
    assert drop(cur, 0) == []


def test_a_day_that_is_itself_partitioned_is_dropped_whole(cur: cursor) -> None:
    day = today(cur) - timedelta(days=20)
    run(
        cur,
        f"CREATE TABLE expired PARTITION OF webhook_log FOR VALUES FROM ('{day} 00:00+00')"
        f" TO ('{day} 24:00+00') PARTITION BY RANGE (timestamp);"
        f"CREATE TABLE morning PARTITION OF expired FOR VALUES FROM ('{day} 00:00+00') TO ('{day} 12:00+00')",
    )
    add_partitions(cur, 0, 0)
    assert drop(cur, 15) == ["expired"]
    assert column(cur, "SELECT to_regclass('morning')") == [None]


def test_a_dependent_of_a_partition_is_named_and_the_others_are_dropped(
    conn: connection, cur: cursor
) -> None:
    add_partitions(cur, -22, 0)
    run(cur, f"CREATE VIEW report AS SELECT count(*) FROM {leaves(cur, -20, -20)[0]}")
    needed = leaves(cur, -20, -20)
    assert drop(cur, 15) == [name for name in leaves(cur, -22, -16) if name not in needed]
    assert f"view public.report depends on table public.{needed[0]}" in conn.notices[-1]
    with pytest.raises(
        errors.DependentObjectsStillExist, match=rf"view public\.report depends on .*{needed[0]}"
    ):
        drop(cur, 15)


def test_a_backlog_is_dropped_31_at_a_time(own: connection) -> None:
    cur = own.cursor()
    run(cur, "CREATE TABLE webhook_log (id bigint, timestamp timestamptz) PARTITION BY RANGE (timestamp)")
    install_functions(cur)
    add_partitions(cur, -420, -21)
    add_partitions(cur, 0, 0)
    own.commit()
    calls = []
    while dropped := drop(cur, 15):
        calls.append(dropped)
        [locks] = column(cur, "SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid()")
        assert locks < 250
        own.commit()
    assert [len(names) for names in calls] == [31] * 12 + [28]
    assert len(attached(cur)) == 1


# Arguments, zones, types, schemas


@pytest.mark.parametrize("argument", [-1, None, -(2**31)])
@pytest.mark.parametrize("function", [create, drop])
def test_negative_and_null_are_refused(cur: cursor, function: Call, argument: int | None) -> None:
    add_partitions(cur, -20, 0)
    run(cur, "SAVEPOINT before")
    with pytest.raises(errors.InvalidParameterValue, match=r"must be 0 or more, not (NULL|-\d+)"):
        function(cur, argument)
    run(cur, "ROLLBACK TO before")
    assert attached(cur) == leaves(cur, -20, 0)


def test_too_many_days_ahead_are_refused(cur: cursor) -> None:
    with pytest.raises(errors.InvalidParameterValue, match="must be 3650 or less"):
        create(cur, 3651)


@pytest.mark.parametrize("function", [create, drop])
def test_a_table_that_is_not_migrated_is_refused(conn: connection, function: Call) -> None:
    cur = conn.cursor()
    install_functions(cur)
    run(cur, "SAVEPOINT before")
    with pytest.raises(
        errors.ObjectNotInPrerequisiteState, match="not a partitioned table; migrate it first"
    ):
        function(cur, 1)
    run(cur, "ROLLBACK TO before; CREATE TABLE webhook_log (id bigint, timestamp timestamptz)")
    with pytest.raises(
        errors.ObjectNotInPrerequisiteState, match="not a partitioned table; migrate it first"
    ):
        function(cur, 1)


@pytest.mark.parametrize("type_", ["timestamp", "timestamptz"])
@pytest.mark.parametrize("zone", ["Asia/Kolkata", "America/New_York"])
def test_a_day_is_a_utc_day_wherever_the_server_is(
    make_database: MakeDatabase, zone: str, type_: str
) -> None:
    with connected(make_database(zone), autocommit=False) as conn:
        cur = conn.cursor()
        assert column(cur, "SHOW timezone") == [zone]
        create_tables(cur, type_)
        made = create(cur, 1)
        assert made == leaves(cur, 0, 1)
        day = today(cur)
        offset = "" if type_ == "timestamp" else "+00"
        for instant, place in (
            (f"{day} 00:00:00{offset}", made[0]),
            (f"{day} 23:59:59.999999{offset}", made[0]),
            (f"{day + timedelta(days=1)} 00:00:00{offset}", made[1]),
        ):
            insert = (
                "INSERT INTO webhook_log (status, timestamp) VALUES ('ok', %s)"
                " RETURNING tableoid::regclass::text"
            )
            assert column(cur, insert, instant) == [place]
        run(cur, "SAVEPOINT before")
        with pytest.raises(errors.CheckViolation, match="no partition"):
            column(cur, insert, f"{day - timedelta(days=1)} 23:59:59.999999{offset}")
        run(cur, "ROLLBACK TO before")
        run(cur, "SET datestyle = 'German'")
        made = create(cur, 2)
        run(cur, "RESET datestyle")
        assert made == leaves(cur, 2, 2)
        add_old = "CREATE TABLE {} PARTITION OF webhook_log FOR VALUES FROM ('{} 00:00{}') TO ('{} 00:00{}')"
        for n in (15, 16):
            old = day - timedelta(days=n)
            run(cur, add_old.format(leaf(old), old, offset, old + timedelta(days=1), offset))
        assert drop(cur, 15) == leaves(cur, -16, -16)
        assert column(cur, "SHOW timezone") == [zone]


@pytest.mark.parametrize("schema", ["logs", 'It\'s "My" Schema', "webhook_log"])
def test_the_functions_use_their_own_schema(conn: connection, schema: str) -> None:
    """Any caller, with any search path, gets the table in the functions' own schema."""
    cur = conn.cursor()
    create_tables(cur)
    add_partitions(cur, -20, -15)
    here = sql.Identifier(schema)
    run(cur, sql.SQL("CREATE SCHEMA {}").format(here))
    create_tables(cur, schema=schema)
    add_partitions(cur, -18, -17)
    install_functions(cur, schema=schema)
    in_public = attached(cur, "public.webhook_log")
    run(cur, "SET LOCAL search_path = pg_temp; CREATE TEMP TABLE webhook_log (n int)")
    call = sql.SQL("SELECT * FROM {}.{}(%s)")
    creating = call.format(here, sql.Identifier("create_future_webhook_log_partitions"))
    dropping = call.format(here, sql.Identifier("drop_old_webhook_log_partitions"))
    assert column(cur, creating, 1) == leaves(cur, 0, 1)
    assert column(cur, creating, 1) == []
    assert column(cur, dropping, 15) == leaves(cur, -18, -17)
    assert attached(cur, "public.webhook_log") == in_public
    assert attached(cur, f'"{schema.replace(chr(34), chr(34) * 2)}".webhook_log') == leaves(cur, 0, 1)


@pytest.mark.parametrize(
    ("every", "type_"),
    [
        (Interval.HOUR, "timestamptz"),
        (Interval.HOUR, "timestamp"),
        (Interval.DAY, "date"),
        (Interval.WEEK, "timestamptz"),
        (Interval.WEEK, "date"),
        (Interval.MONTH, "timestamp"),
    ],
)
def test_any_interval_and_any_name_work(conn: connection, every: Interval, type_: str) -> None:
    """What the functions create and drop matches what Python says should exist."""
    cur = conn.cursor()
    ahead, retention, back = (3, 2, 4) if every is Interval.HOUR else (40, 60, 95)
    spec = TableSpec('It\'s 100% "Odd"', column="at time", every=every, ahead_days=ahead).located("public")
    table, column_name, type_name = name(spec.home, spec.name), name(spec.column), sql.SQL(type_)
    run(cur, "SET LOCAL timezone = 'Asia/Kolkata'")
    run(
        cur,
        statement(
            "CREATE TABLE {table} (id bigint, {at} {type}, UNIQUE (id, {at})) PARTITION BY RANGE ({at})",
            table=table,
            at=column_name,
            type=type_name,
        ),
    )
    install_functions(cur, spec)
    creating, dropping = (
        statement("SELECT * FROM {function}({days})", function=name(spec.home, function), days=days)
        for function, days in zip(spec.functions, (ahead, retention), strict=True)
    )
    [now] = column(cur, "SELECT now()")
    wanted = spec.wanted(now, back=False)
    assert column(cur, creating) == [spec.partition(period) for period in wanted]
    assert column(cur, creating) == []
    past = spec.periods(wanted[0].start - timedelta(days=back), wanted[0].start)
    run(cur, "SET LOCAL timezone = 'UTC'")
    run(cur, statement("INSERT INTO {table} VALUES (1, now())", table=table))
    for period in past:
        make = statement(
            "CREATE TABLE {partition} PARTITION OF {table} FOR VALUES FROM ({start}) TO ({end})",
            partition=name(spec.home, spec.partition(period)),
            table=table,
            start=f"{period.start:%Y-%m-%d %H:%M:%S}+00",
            end=f"{period.end:%Y-%m-%d %H:%M:%S}+00",
        )
        run(cur, make)
    dropped = []
    while names := column(cur, dropping):
        dropped += names
    cutoff = midnight(today(cur)) - timedelta(days=retention)
    assert dropped == [spec.partition(period) for period in past if period.end <= cutoff]


def test_no_look_alike_operator_is_called(cur: cursor) -> None:
    """It matches better than any built-in operator, and is on the caller's search path."""
    run(
        cur,
        "CREATE FUNCTION public.trap(integer, interval) RETURNS interval LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'trapped'; END $$;"
        "CREATE OPERATOR public.* (leftarg = integer, rightarg = interval, function = public.trap)",
    )
    with pytest.raises(errors.RaiseException, match="trapped"):
        run(cur, "SAVEPOINT before; SELECT 2 * interval '1 day'")
    run(cur, "ROLLBACK TO before")
    add_partitions(cur, -17, -16)
    assert create(cur, 1) == leaves(cur, 0, 1)
    assert drop(cur, 15) == leaves(cur, -17, -16)


def test_a_partition_in_another_schema_is_dropped_there(cur: cursor) -> None:
    run(cur, "CREATE SCHEMA archive; CREATE TABLE webhook_log_other (LIKE webhook_log)")
    add_partition(cur, "archive.webhook_log_other", -20, -19)
    add_partitions(cur, 0, 0)
    assert drop(cur, 15) == ["webhook_log_other"]
    found = "SELECT to_regclass('archive.webhook_log_other'), to_regclass('public.webhook_log_other')::text"
    assert run(cur, found) == [(None, "webhook_log_other")]


# Installing


def test_only_the_owner_can_call_the_functions(role: str, conn: connection) -> None:
    cur = conn.cursor()
    create_tables(cur)
    run(cur, "SAVEPOINT before")
    for function in ("create_future_webhook_log_partitions", "drop_old_webhook_log_partitions"):
        run(cur, f"SET LOCAL ROLE {role}")
        with pytest.raises(errors.InsufficientPrivilege, match=f"permission denied for function {function}"):
            run(cur, f"SELECT public.{function}(1)")
        run(cur, "ROLLBACK TO before")


def test_the_functions_have_the_documented_signatures_and_settings(cur: cursor) -> None:
    found = run(
        cur,
        "SELECT proname, pg_get_function_result(oid), proargnames, proconfig,"
        " obj_description(oid, 'pg_proc'), prosecdef FROM pg_proc"
        " WHERE pronamespace = 'public'::regnamespace ORDER BY 1",
    )
    assert [(row[0], row[1], row[2]) for row in found] == [
        (
            "chronos_create_partitions",
            "SETOF text",
            ["schema_name", "table_name", "every", "days_ahead", "as_of"],
        ),
        (
            "chronos_drop_partitions",
            "SETOF text",
            ["schema_name", "table_name", "retention_days", "as_of", "grace_days"],
        ),
        ("create_future_webhook_log_partitions", "SETOF text", ["days_ahead"]),
        ("drop_old_webhook_log_partitions", "SETOF text", ["retention_days"]),
    ]
    for function, *_, settings, comment, runs_as_owner in found:
        assert "search_path=pg_catalog, pg_temp" in settings
        if function.startswith("chronos_"):
            assert {"search_path=pg_catalog, pg_temp", "lock_timeout=200ms", "TimeZone=UTC"} <= set(settings)
        assert comment.startswith(f"chronos {VERSION}: ")
        # A table's functions run as its owner, whoever calls them; the shared pair runs as the caller.
        assert runs_as_owner is not function.startswith("chronos_")


def test_installing_again_changes_nothing(role: str, conn: connection) -> None:
    cur = conn.cursor()
    create_tables(cur)
    run(cur, f"GRANT EXECUTE ON FUNCTION drop_old_webhook_log_partitions(int) TO {role}")
    catalog = (
        "SELECT oid, prosrc, proacl::text, proconfig FROM pg_proc"
        " WHERE pronamespace = 'public'::regnamespace ORDER BY oid"
    )
    before = run(cur, catalog)
    install_functions(cur)
    assert run(cur, catalog) == before


@pytest.mark.parametrize(
    "older",
    [
        "FUNCTION {}(days_ahead int) RETURNS void LANGUAGE sql AS ''",
        "FUNCTION {}(n int) RETURNS int LANGUAGE sql AS 'SELECT n'",
        "FUNCTION {}(n int) RETURNS TABLE (name text) LANGUAGE sql AS 'SELECT NULL::text'",
        "PROCEDURE {}(n int) LANGUAGE sql AS ''",
    ],
)
def test_an_older_version_is_replaced(conn: connection, older: str) -> None:
    cur = conn.cursor()
    for function in ("create_future_webhook_log_partitions", "drop_old_webhook_log_partitions"):
        run(cur, f"CREATE {older.format(function)}")
        run(cur, f"CREATE FUNCTION {function}(text) RETURNS int LANGUAGE sql AS 'SELECT 1'")
    create_tables(cur)
    assert create(cur, 0) == leaves(cur, 0, 0)
    assert drop(cur, 15) == []
    assert column(cur, "SELECT drop_old_webhook_log_partitions('somebody''s own'::text)") == [1]


# Concurrent sessions


def committed(own: connection, first: int, last: int) -> cursor:
    """Commit a table with the partitions of these days and of today."""
    cur = own.cursor()
    create_tables(cur)
    add_partitions(cur, first, last)
    add_partitions(cur, 0, 0)
    own.commit()
    return cur


def test_a_partition_being_read_is_kept_and_the_others_are_dropped(database: str, own: connection) -> None:
    cur = committed(own, -40, -31)
    [used] = leaves(cur, -35, -35)
    with holding(database, f"SELECT count(*) FROM {used}"):
        assert drop(cur, 15) == [name for name in leaves(cur, -40, -31) if name != used]
        assert used in own.notices[-1]
        own.commit()
        with pytest.raises(errors.LockNotAvailable, match=f"they are in use: {used}"):
            drop(cur, 15)
        own.rollback()
    assert drop(cur, 15) == [used]


def test_a_table_that_takes_an_awaited_partitions_name_is_not_dropped(database: str, own: connection) -> None:
    cur = committed(own, -33, -31)
    [name, *others] = leaves(cur, -33, -31)
    own.commit()
    with (
        connected(database, autocommit=False) as using,
        connected(database) as looking,
        ThreadPoolExecutor() as pool,
    ):
        other = using.cursor()
        run(other, f"SELECT FROM {name} LIMIT 1")
        dropped = pool.submit(drop, cur, 15)
        waits = "SELECT pid FROM pg_locks WHERE NOT granted AND relation = %s::regclass"
        wait_until(lambda: run(looking.cursor(), waits, name), 10, "the partition is waited for")
        run(other, f"ALTER TABLE {name} RENAME TO kept; CREATE TABLE {name} (n int)")
        using.commit()
        assert dropped.result(timeout=10) == others
    own.commit()
    assert column(cur, "SELECT to_regclass(%s) IS NOT NULL", name) == [True]
    assert drop(cur, 15) == ["kept"]


def test_a_partition_of_another_owner_is_named_and_the_others_are_dropped(
    database: str, own: connection, role: str
) -> None:
    """Such as one that a superuser created by hand."""
    cur = committed(own, -33, -31)
    [theirs, *others] = leaves(cur, -33, -31)
    run(cur, f"GRANT USAGE, CREATE ON SCHEMA public TO {role}")
    owned = ["webhook_endpoint", "webhook_log", *others, *leaves(cur, 0, 0)]
    run(cur, "; ".join(f"ALTER TABLE {table} OWNER TO {role}" for table in owned))
    run(cur, f"ALTER FUNCTION drop_old_webhook_log_partitions OWNER TO {role}")
    own.commit()
    assert drop(cur, 15) == others
    own.commit()
    remedy = f"belongs to .*: ALTER TABLE public.{theirs} OWNER TO {role}"
    with pytest.raises(errors.DependentObjectsStillExist, match=remedy):
        drop(cur, 15)
    own.rollback()
    run(cur, f"DROP OWNED BY {role} CASCADE")
    own.commit()


def test_many_partitions_in_use_cause_only_one_wait(database: str, own: connection) -> None:
    cur = committed(own, -60, -31)
    with holding(database, "SELECT count(*) FROM webhook_log"):
        started = time.monotonic()
        with pytest.raises(errors.LockNotAvailable, match="they are in use"):
            drop(cur, 15)
        assert time.monotonic() - started < 2  # 30 waits of 200 ms would be 6 s
    own.rollback()
    assert len(drop(cur, 15)) == 30


def test_a_long_writing_transaction_blocks_drop_but_not_create(database: str, own: connection) -> None:
    cur = committed(own, -33, -31)
    with holding(database, "INSERT INTO webhook_log (status, timestamp) VALUES ('ok', now())"):
        with pytest.raises(errors.LockNotAvailable):
            drop(cur, 15)
        own.rollback()
        assert create(cur, 2) == leaves(cur, 1, 2)
        own.commit()
    assert len(drop(cur, 15)) == 3


def test_inserts_continue_while_partitions_are_created(database: str, own: connection) -> None:
    """With a foreign key, the creator locks the referenced table, but not against inserts that use it."""
    cur = committed(own, -1, -1)
    create(cur, 3)
    query(
        database,
        "SET statement_timeout = '5s'; INSERT INTO webhook_log (status, timestamp, webhook_endpoint_id)"
        " VALUES ('ok', now(), 1); SELECT count(*) FROM webhook_log JOIN webhook_endpoint e ON e.id = 1",
    )


def test_dropping_does_not_lock_the_referenced_table(own: connection) -> None:
    cur = committed(own, -33, -31)
    assert len(drop(cur, 15)) == 3
    locked = column(cur, "SELECT relation::regclass::text FROM pg_locks WHERE pid = pg_backend_pid()")
    assert "webhook_endpoint" not in locked


@pytest.mark.parametrize("first", [create, drop])
@pytest.mark.parametrize("second", [create, drop])
def test_of_two_concurrent_callers_the_second_is_refused(
    database: str, own: connection, first: Call, second: Call
) -> None:
    cur = committed(own, -33, -31)
    assert first(cur, 3)
    with connected(database, autocommit=False) as other:
        with pytest.raises(errors.LockNotAvailable, match="another session is creating or dropping"):
            second(other.cursor(), 5)
        other.rollback()
        own.commit()
        assert second(other.cursor(), 5) or (first, second) == (drop, drop)


def test_a_half_detached_partition_is_skipped_by_drop_and_blocks_create(
    database: str, own: connection
) -> None:
    """DETACH CONCURRENTLY, cut off while it waits for a reader, leaves the partition half detached."""
    cur = committed(own, -33, -31)
    [pending], [coming] = leaves(cur, -32, -32), leaves(cur, 2, 2)
    add_partitions(cur, 2, 2)
    own.commit()
    detach_half_way(database, pending)
    assert drop(cur, 15) == leaves(cur, -33, -33) + leaves(cur, -31, -31)
    own.commit()
    query(database, f"ALTER TABLE webhook_log DETACH PARTITION {pending} FINALIZE")
    detach_half_way(database, coming)
    with pytest.raises(errors.DuplicateTable, match=f"{coming} was detached half-way") as refused:
        create(cur, 3)
    own.rollback()
    query(database, str(refused.value.diag.message_hint))
    query(database, f"DROP TABLE {coming}")
    assert create(cur, 3) == leaves(cur, 1, 3)
    assert drop(cur, 15) == []
    assert value(database, "SELECT to_regclass(%s)::text", pending) == pending


def detach_half_way(url: str, name: str) -> None:
    """Begin to detach ``name``, and be cut off after the first of the two transactions."""
    with holding(url, f"SELECT count(*) FROM {name}"), connected(url) as detaching:
        detaching.cursor().execute("SET lock_timeout = '50ms'")
        with pytest.raises(psycopg2.Error):
            detaching.cursor().execute(f"ALTER TABLE webhook_log DETACH PARTITION {name} CONCURRENTLY")
    pending = "SELECT inhdetachpending FROM pg_inherits WHERE inhrelid = %s::regclass"
    wait_until(lambda: value(url, pending, name), 5, "the detach is pending")
