"""`grace_days`: an expired partition is detached first, and dropped later unless someone has changed it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import redis
from psycopg2 import errors
from psycopg2.extensions import connection, cursor
from pydantic import SecretStr
from sqlalchemy.engine import make_url

from chronos.db import connect_engine
from chronos.demo.rows import create_webhook_log
from chronos.errors import RefusedError
from chronos.functions import upgrade
from chronos.health import Status, collect
from chronos.jobs import DROP, JobFailedError, Message, TryAgainError, attempt
from chronos.settings import Settings
from chronos.table import WEBHOOK_LOG
from tests.command import chronos
from tests.partitioned import (
    add_partitions,
    attached,
    column,
    create_tables,
    drop,
    install_functions,
    leaves,
    run,
    today,
)
from tests.tables import connected, exists, holding, query, value

GRACE = 7
# The call that the wrapper makes, on another day.
ON_DAY = "SELECT chronos_drop_partitions('public', 'webhook_log', 15, now() + %s * interval '1 day', 7)"


@pytest.fixture
def own(database: str) -> Iterator[connection]:
    """A connection to a table with the partitions -18 to 0 and a grace of seven days."""
    with connected(database, autocommit=False) as conn:
        cur = conn.cursor()
        create_tables(cur)
        install_functions(cur, replace(WEBHOOK_LOG, grace_days=GRACE))
        add_partitions(cur, -18, 0)
        run(
            cur,
            "INSERT INTO webhook_log (status, timestamp, webhook_endpoint_id)"
            " SELECT 'ok', now() - n * interval '1 day', 1 FROM generate_series(0, 18) n",
        )
        conn.commit()
        yield conn


def later(own: connection, days: int) -> list[str]:
    """The names that a call ``days`` from now drops, committed."""
    names = column(own.cursor(), ON_DAY, days)
    own.commit()
    return names


def detach(own: connection) -> list[str]:
    """Have -18 to -16 detached; returns their names."""
    assert drop(own.cursor(), 15) == []
    own.commit()
    return leaves(own.cursor(), -18, -16)


def test_an_expired_partition_is_detached_today_and_dropped_after_the_grace_days(own: connection) -> None:
    cur = own.cursor()
    gone = detach(own)
    due = today(cur) + timedelta(days=GRACE)
    assert f"{gone[0]} is detached, and will be dropped on {due}" in "".join(own.notices)
    assert attached(cur) == leaves(cur, -15, 0)
    assert column(cur, "SELECT count(*) FROM webhook_log") == [16]
    assert [column(cur, f"SELECT count(*) FROM {name}") for name in gone] == [[1], [1], [1]]
    assert drop(cur, 15) == []
    own.commit()
    assert not set(later(own, GRACE - 1)) & set(gone)
    assert later(own, GRACE) == gone
    assert later(own, GRACE) == []


def test_a_table_attached_again_is_unchanged_and_is_never_dropped(own: connection) -> None:
    """Attached again and then detached by hand, it belongs to the user, whatever its comment says."""
    cur = own.cursor()
    [back, *others] = detach(own)
    day = today(cur) - timedelta(days=18)
    run(
        cur,
        f"ALTER TABLE webhook_log ATTACH PARTITION {back}"
        f" FOR VALUES FROM ('{day} 00:00+00') TO ('{day + timedelta(days=1)} 00:00+00')",
    )
    own.commit()
    assert column(cur, "SELECT count(*) FROM webhook_log") == [17]
    keys = "SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND conrelid = %s::regclass"
    assert column(cur, keys, back) == column(cur, keys, leaves(cur, 0, 0)[0]) == [1]
    run(cur, f"ALTER TABLE webhook_log DETACH PARTITION {back}")
    own.commit()
    assert later(own, 100)[:2] == others
    assert column(cur, "SELECT to_regclass(%s) IS NOT NULL", back) == [True]


@pytest.mark.parametrize(
    "change",
    [
        "COMMENT ON TABLE {} IS NULL",
        "COMMENT ON TABLE {} IS 'kept for the auditors'",
        "GRANT SELECT ON {} TO PUBLIC",
        "ALTER TABLE {} SET SCHEMA kept",
        "ALTER TABLE {} RENAME TO kept",
        "CREATE TABLE kept (LIKE {0}); ALTER TABLE {0} INHERIT kept",
    ],
)
def test_a_detached_table_is_kept_once_it_or_its_comment_changes(own: connection, change: str) -> None:
    cur = own.cursor()
    [kept, *others] = detach(own)
    [oid] = column(cur, "SELECT %s::regclass::oid", kept)
    run(cur, f"CREATE SCHEMA kept; {change.format(kept)}")
    own.commit()
    assert later(own, GRACE) == others
    assert column(cur, "SELECT count(*) FROM pg_class WHERE oid = %s", oid) == [1]


def test_vacuum_and_analyze_do_not_keep_a_detached_table(database: str, own: connection) -> None:
    gone = detach(own)
    for statement in ("VACUUM (FREEZE, ANALYZE) {0}", "VACUUM FULL pg_class", "VACUUM FULL pg_description"):
        query(database, statement.format(gone[0]))
    assert later(own, GRACE) == gone


def test_a_table_with_only_the_name_or_comment_of_a_detached_one_is_kept(own: connection) -> None:
    """The comment is copied from a real one, but was written after the table was created."""
    cur = own.cursor()
    gone = detach(own)
    [comment] = column(cur, "SELECT obj_description(%s::regclass)", gone[0])
    run(cur, "CREATE TABLE webhook_log_y2020m01d01 (n int); CREATE TABLE forged (n int)")
    own.commit()
    run(cur, "COMMENT ON TABLE forged IS %s", comment)
    own.commit()
    assert later(own, GRACE) == gone
    for spared in ("webhook_log_y2020m01d01", "forged"):
        assert column(cur, "SELECT to_regclass(%s) IS NOT NULL", spared) == [True]


def test_a_detached_table_restored_from_a_dump_is_kept(database: str, own: connection, pg_bin: Path) -> None:
    """Someone restored it from a backup: its comment says that it is due, but it is wanted."""
    [back, *others] = detach(own)
    url = make_url(database).set(drivername="postgresql").render_as_string(hide_password=False)
    dumped = subprocess.run([pg_bin / "pg_dump", "-t", back, url], capture_output=True, text=True, check=True)
    query(database, f"DROP TABLE {back}")
    restore = [str(pg_bin / "psql"), "--quiet", "--single-transaction", "--set=ON_ERROR_STOP=1", url]
    subprocess.run(restore, input=dumped.stdout, capture_output=True, text=True, check=True)
    assert later(own, 100)[:2] == others
    assert value(database, f"SELECT count(*) FROM {back}") == 1


def test_a_detached_table_is_kept_while_a_longer_retention_covers_its_rows(own: connection) -> None:
    cur = own.cursor()
    gone = detach(own)
    assert column(cur, ON_DAY.replace(" 15,", " 23,"), GRACE) == gone[:2]
    own.rollback()
    assert column(cur, ON_DAY.replace(" 15,", " 90,"), GRACE) == []
    own.commit()
    assert later(own, GRACE) == gone


def test_detached_tables_that_a_view_needs_do_not_block_the_others(own: connection) -> None:
    """There are more of them than one call drops."""
    cur = own.cursor()
    add_partitions(cur, -60, -19)
    for _ in range(2):
        drop(cur, 15)
        own.commit()
    needed = leaves(cur, -60, -20)
    run(cur, "CREATE VIEW needing AS " + " UNION ALL ".join(f"SELECT id FROM {name}" for name in needed))
    own.commit()
    assert later(own, GRACE) == leaves(cur, -19, -16)


def test_a_detached_table_does_not_block_deletes_of_referenced_rows(database: str, own: connection) -> None:
    detach(own)
    query(database, "DELETE FROM webhook_log; DELETE FROM webhook_endpoint")


def test_a_partition_being_read_is_detached_by_a_later_call(database: str, own: connection) -> None:
    cur = own.cursor()
    [used, *others] = leaves(cur, -18, -16)
    with holding(database, f"SELECT count(*) FROM {used}"):
        assert drop(cur, 15) == []
        own.commit()
        assert attached(cur) == [used, *leaves(cur, -15, 0)]
        with pytest.raises(errors.LockNotAvailable, match=f"they are in use: {used}"):
            drop(cur, 15)
        own.rollback()
    detach(own)
    with holding(database, f"SELECT count(*) FROM {used}"):
        assert later(own, GRACE) == others


def test_a_call_with_an_old_snapshot_drops_no_detached_table(database: str, own: connection) -> None:
    """It does not see that the comment was removed."""
    gone = detach(own)
    with connected(database, autocommit=False) as old:
        run(old.cursor(), "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT 1")
        query(database, f"COMMENT ON TABLE {gone[0]} IS NULL")
        assert not set(column(old.cursor(), ON_DAY, GRACE)) & set(gone)


# The job, the status, the configuration


@pytest.fixture
def settings(database: str, redis_url: str, client: redis.Redis, own: connection) -> Settings:
    return Settings(
        database_url=SecretStr(database),
        redis_url=SecretStr(redis_url),
        webhook_log_days_ahead=0,
        webhook_log_grace_days=GRACE,
    )


def test_the_job_detaches_a_backlog_and_status_says_when_it_will_be_dropped(
    settings: Settings, database: str, own: connection
) -> None:
    add_partitions(own.cursor(), -60, -19)
    own.commit()
    report = attempt(DROP, settings, Message("a task"), 1.0)
    assert (report["status"], report["dropped"]) == ("done", [])
    cur: cursor = own.cursor()
    assert attached(cur) == leaves(cur, -15, 0)
    found = look(settings)
    assert [d.name for d in found.detached] == leaves(cur, -60, -16)
    assert {d.drop_on for d in found.detached} == {today(cur) + timedelta(days=GRACE)}
    assert not [p for p in found.problems if "detached" in p]
    first = found.as_json()["detached"][0]
    assert first["name"] == leaves(cur, -60, -60)[0]
    assert first["drop_on"] == f"{today(cur) + timedelta(days=GRACE)}"


def look(settings: Settings) -> Status:
    return collect(settings)


def overdue(url: str, table: str) -> None:
    """Make it look as if it had been detached a week and a day earlier."""
    query(
        url,
        f"DROP TABLE {table}; BEGIN; CREATE TABLE {table} (n int);"
        f" DO $$ BEGIN EXECUTE format('COMMENT ON TABLE {table} IS %L', format("
        "'chronos: detached from public.webhook_log, to be dropped on 2025-01-01 with all before"
        f" 2024-12-25 00:00:00 UTC (table %s); to keep it', '{table}'::regclass::oid)); END $$; COMMIT",
    )


def test_the_job_drops_what_is_due_and_retries_a_table_being_read(
    settings: Settings, database: str, own: connection
) -> None:
    gone = detach(own)
    overdue(database, gone[0])
    assert f"the drop is overdue: {gone[0]}" in "".join(look(settings).problems)
    with holding(database, f"SELECT count(*) FROM {gone[0]}"):
        with pytest.raises(TryAgainError) as again:
            attempt(DROP, settings, Message("a task"), 1.0)
        assert again.value.report["contended"] == gone[:1]
    assert attempt(DROP, settings, Message("a task"), 1.0)["dropped"] == gone[:1]
    assert not exists(database, gone[0])


def test_status_says_a_detached_table_is_dropped_after_a_longer_retention(
    settings: Settings, own: connection
) -> None:
    detach(own)
    longer = settings.model_copy(update={"webhook_log_retention_days": 90})
    day = today(own.cursor())
    assert [d.drop_on for d in look(longer).detached] == [day + timedelta(days=n) for n in (73, 74, 75)]


def test_status_names_the_attach_for_partitions_detached_too_early(
    settings: Settings, database: str, own: connection
) -> None:
    cur = own.cursor()
    drop(cur, 14)
    own.commit()
    assert attached(cur) == leaves(cur, -14, 0)
    own.commit()
    [problem] = [p for p in look(settings).problems if "within retention" in p]
    assert problem.startswith(
        f"detached, but still within retention: {leaves(cur, -15, -15)[0]}. Attach it: "
    )
    own.commit()
    query(database, problem.partition("Attach it: ")[2].partition("; or")[0])
    assert attached(cur) == leaves(cur, -15, 0)
    assert not [p for p in look(settings).problems if "within retention" in p]


def test_status_names_a_detached_table_that_is_kept_because_it_changed(
    settings: Settings, database: str, own: connection
) -> None:
    gone = detach(own)
    query(database, f"GRANT SELECT ON {gone[0]} TO PUBLIC")
    found = look(settings)
    assert [d.name for d in found.detached if d.drop_on is None] == gone[:1]
    assert [n for n in found.notices if f"DROP TABLE public.{gone[0]};" in n]


def test_a_function_whose_grace_differs_from_the_configuration_drops_nothing(
    settings: Settings, database: str, own: connection
) -> None:
    longer = settings.model_copy(update={"webhook_log_grace_days": 30})
    with pytest.raises(
        JobFailedError, match=r"installed with grace_days = 7, and .* says 30; .* nothing was"
    ):
        attempt(DROP, longer, Message("a task"), 1.0)
    assert attached(own.cursor()) == leaves(own.cursor(), -18, 0)
    own.rollback()
    assert [p for p in look(longer).problems if "upgrade-functions" in p]
    upgrade(connect_engine(make_url(database)), longer.webhook_log)
    assert attempt(DROP, longer, Message("a task"), 1.0)["status"] == "done"
    due = value(database, "SELECT (now() AT TIME ZONE 'UTC')::date + 30")
    assert {d.drop_on for d in look(longer).detached} == {due}


def test_a_rollback_names_days_since_the_swap_that_are_only_detached(database: str) -> None:
    create_webhook_log(connect_engine(make_url(database)), 100)
    assert chronos(database, "migrate", "--yes").returncode == 0
    with connected(database, autocommit=False) as conn:
        [written_since] = leaves(conn.cursor(), 0, 0)
    query(
        database,
        "SELECT chronos_drop_partitions('public', 'webhook_log', 0, now() + interval '1 day', 7)",
    )
    refused = chronos(database, "rollback", "--yes")
    assert refused.returncode == 2
    said = " ".join(refused.stderr.split())
    assert f"no other table than those still waiting detached; attach them first: {written_since}" in said


def test_a_rollback_names_the_detached_tables_that_nobody_drops_any_more(database: str) -> None:
    create_webhook_log(connect_engine(make_url(database)), 100)
    assert chronos(database, "migrate", "--yes").returncode == 0
    query(database, "SELECT chronos_drop_partitions('public', 'webhook_log', 13, now(), 7)")
    went_back = chronos(database, "rollback", "--yes")
    assert went_back.returncode == 0, went_back.stderr
    [said] = [line for line in went_back.stdout.splitlines() if "If nobody needs them: " in line]
    assert chronos(database, "migrate", "--yes").returncode == 2
    query(database, said.partition("If nobody needs them: ")[2])
    again = chronos(database, "migrate", "--yes")
    assert again.returncode == 0, again.stderr


def test_the_configuration_sets_the_grace_of_each_table_and_refuses_a_negative_one(tmp_path: Path) -> None:
    file = tmp_path / "chronos.toml"
    file.write_text('[[tables]]\nname = "events"\ncolumn = "at"\ngrace_days = 7\n')
    [events] = Settings(chronos_config=file).tables
    assert events.grace_days == GRACE
    file.write_text(events.as_toml())
    assert Settings(chronos_config=file).tables == (events,)
    file.write_text('[[tables]]\nname = "events"\ncolumn = "at"\ngrace_days = -1\n')
    with pytest.raises(RefusedError, match="events, grace_days: Input should be greater than or equal to 0"):
        _ = Settings(chronos_config=file).tables
