"""After strategy attach: what is known of the table that became a partition, and the ways to roll back."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from psycopg2 import errors
from pydantic import SecretStr
from sqlalchemy.engine import make_url

from chronos.db import connect_engine
from chronos.health import Status, collect
from chronos.migration import run as migration_run
from chronos.migration.checks import Survey, survey
from chronos.migration.rollback import undo
from chronos.migration.run import Options, migrate
from chronos.migration.state import Strategy
from chronos.settings import Settings
from chronos.table import Interval, TableSpec
from tests.command import chronos, started
from tests.live import DAYS, Application, KeyType, Readers, load, phase
from tests.partitioned import attached
from tests.tables import connected, digest, dump, exists, holding, planned, query, relations, value
from tests.test_attach import AS_A_WRITER, MIGRATE, building
from tests.test_complete_at_every_instant import RESUME, ROLLBACK
from tests.test_schemas_of_real_projects import operator
from tests.waiting import wait_until

ROWS = 1_000
FINALIZE = ("finalize", "--yes")
INSERT = (
    "INSERT INTO webhook_log (status, timestamp) SELECT 'new', now() + %s * interval '1 day' RETURNING id"
)


def attach(url: str, *, key_type: KeyType = "serial", rows: int = ROWS) -> None:
    """Make the table a partition."""
    load(url, rows, key_type=key_type)
    result = chronos(url, *MIGRATE)
    assert result.returncode == 0, result.stdout + result.stderr


def status(url: str, redis_url: str) -> Status:
    return collect(Settings(database_url=SecretStr(url), redis_url=SecretStr(redis_url)))


def drop(url: str, as_of: datetime, grace_days: int = 0) -> list[str]:
    """The partitions that the drop function, called at that time, drops."""
    rows = query(
        url, "SELECT chronos_drop_partitions('public', 'webhook_log', 15, %s, %s)", as_of, grace_days
    )
    return [row[0] for row in rows]


# The bound


@pytest.mark.parametrize("hold", [False, True], ids=["at once", "held"])
def test_rows_more_than_a_week_ahead_move_the_bound_past_them(
    database: str, pg_bin: Path, hold: bool
) -> None:
    """An application host whose clock is nine days ahead."""
    load(database, ROWS)
    far = value(database, INSERT, 9)
    before, rows = dump(database, pg_bin), digest(database)
    result = chronos(database, *MIGRATE, *(["--hold"] if hold else []))
    assert result.returncode == 0, result.stdout + result.stderr
    newest = value(database, "SELECT timestamp FROM webhook_log WHERE id = %s", far)
    assert newest < planned(database, "first") <= newest + timedelta(days=1)
    if hold:
        resumed = chronos(database, *RESUME)
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert value(database, "SELECT tableoid::regclass::text FROM webhook_log WHERE id = %s", far) == (
        "webhook_log_history"
    )
    assert digest(database) == rows
    assert chronos(database, *ROLLBACK).returncode == 0
    assert digest(database) == rows
    assert dump(database, pg_bin) == before


def test_rollback_keeps_rows_written_nine_days_ahead(database: str, pg_bin: Path) -> None:
    loaded = load(database, ROWS)
    before = dump(database, pg_bin)
    assert chronos(database, *MIGRATE).returncode == 0
    ahead = replace(loaded, schema=replace(loaded.schema, days=DAYS._replace(ahead=9)))
    beyond = "SELECT count(*) FROM webhook_log WHERE tableoid <> 'webhook_log_history'::regclass"
    with (
        Application(database, ahead) as application,
        Readers(database, ahead, application, kinds=("count", "key", "newest")) as readers,
    ):
        wait_until(lambda: value(database, beyond) > 5, 60, "rows beyond the bound")
        assert not application.compare()
        result = chronos(database, *ROLLBACK)
        application.go_on()
        readers.go_on()
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 newer rows" not in result.stdout
    assert not application.errors, application.errors[:3]
    assert not readers.short, readers.short[:3]
    assert not readers.errors, readers.errors[:3]
    assert not application.compare()
    assert dump(database, pg_bin) == before


def test_a_row_beyond_the_bound_of_a_held_migration_fails_naming_the_check(
    database: str, redis_url: str
) -> None:
    load(database, ROWS)
    held = chronos(database, *MIGRATE, "--hold")
    bound = f"{planned(database, 'first'):%Y-%m-%d}"
    assert f"Inserts of rows from {bound} 00:00 UTC on fail until the swap" in held.stdout
    with pytest.raises(errors.CheckViolation, match="webhook_log_history_bound"):
        query(database, INSERT, 9)
    found = status(database, redis_url)
    [told] = [*found.notices, *found.problems]
    assert f"inserts into webhook_log fail from {bound} 00:00 UTC on" in told
    assert "--resume" in told
    assert chronos(database, *ROLLBACK).returncode == 0
    query(database, INSERT, 9)


def test_a_row_beyond_the_bound_before_the_check_stops_the_run_and_is_reported(
    database: str, redis_url: str
) -> None:
    """Written between the first survey and the check constraint."""
    load(database, ROWS)
    writer = ExitStack()
    writer.enter_context(holding(database, AS_A_WRITER))
    with writer, started(database, *MIGRATE) as migration:
        wait_until(lambda: building(database), 30, "the index waits")
        far = value(database, INSERT, 9)
        writer.close()
        output, error = migration.communicate(timeout=60)
    assert migration.returncode == 3, output + error
    bound = f"{planned(database, 'first'):%Y-%m-%d}"
    assert f"not before {bound} 00:00 UTC" in error
    assert "--resume" in error
    [told] = status(database, redis_url).problems
    assert f"inserts into webhook_log fail from {bound} 00:00 UTC on" in told
    query(database, "DELETE FROM webhook_log WHERE id = %s", far)
    resumed = chronos(database, *RESUME)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert phase(database) == "migrated"


@pytest.mark.parametrize("days", [5, 6, 9])
def test_a_migration_held_until_its_bound_is_near_can_only_be_rolled_back(
    database: str, redis_url: str, pg_bin: Path, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    load(database, ROWS)
    if days == 9:  # when nothing was written for two days, as nothing could be
        query(database, "DELETE FROM webhook_log WHERE timestamp > now() - interval '3 days'")
    before, rows = dump(database, pg_bin), digest(database)

    def earlier(*arguments: object) -> Survey:
        found = survey(*arguments)  # type: ignore[arg-type]
        return replace(found, now=found.now - timedelta(days=days), newest=None)

    monkeypatch.setattr(migration_run, "survey", earlier)
    engine = connect_engine(make_url(database))
    held = Options(strategy=Strategy.ATTACH, hold=True)
    spec = TableSpec("webhook_log", retention_days=15, ahead_days=30)
    migrate(engine, spec, held, operator(), lambda found: None)

    result = chronos(database, *RESUME)
    if days == 5:
        assert result.returncode == 0, result.stdout + result.stderr
    else:
        [problem] = status(database, redis_url).problems
        assert "inserts into webhook_log fail" in problem
        assert result.returncode == 2, result.stdout + result.stderr
        assert "the bound of this migration" in result.stderr
        assert "rollback" in result.stderr
        assert phase(database) == "ready"
    assert chronos(database, *ROLLBACK).returncode == 0
    assert digest(database) == rows
    assert dump(database, pg_bin) == before
    query(database, INSERT, 9)


# What is known about it


def test_status_shows_its_size_and_when_it_will_be_dropped(database: str, redis_url: str) -> None:
    attach(database)
    found = status(database, redis_url)
    assert found.problems == ()
    assert found.state == "migrated"
    assert found.missing == []
    assert found.runway_days == 30
    assert found.next_drops() == []
    [history] = [p for p in found.partitions if p.name == "webhook_log_history"]
    assert history.bytes > ROWS * 100
    assert history.rows_estimate == ROWS
    assert (history.lower, history.upper) == (None, planned(database, "first"))
    goes = planned(database, "first") + timedelta(days=15)
    [told] = found.notices
    assert f"when its last row has expired, on {goes:%Y-%m-%d}" in told
    assert "DROP TABLE webhook_log" in told
    shown = chronos(database, "status", env={"REDIS_URL": redis_url})
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "webhook_log_history" in shown.stdout
    as_json = json.loads(chronos(database, "status", "--json", env={"REDIS_URL": redis_url}).stdout)
    assert as_json["healthy"]
    assert as_json["partition_list"][-1]["name"] == "webhook_log_history"


def test_rollback_of_a_detached_history_names_the_attach_and_works_after_it(database: str) -> None:
    attach(database)
    kept = digest(database)
    query(database, "SELECT create_future_webhook_log_partitions(60)")
    assert drop(database, planned_bound(database) + timedelta(days=15), grace_days=7) == []
    assert digest(database)[0] == 0

    refused = chronos(database, *ROLLBACK)

    assert refused.returncode == 2
    assert "[history-gone]" in refused.stderr
    query(database, refused.stderr.partition("attach it first: ")[2].partition(";")[0])
    assert digest(database) == kept
    done = chronos(database, *ROLLBACK)
    assert done.returncode == 0, done.stderr
    assert digest(database) == kept
    foreign_keys = (
        "SELECT count(*) FROM pg_constraint WHERE conrelid = 'webhook_log'::regclass AND contype = 'f'"
    )
    assert value(database, foreign_keys) == 1


@pytest.mark.parametrize("finalized", [False, True])
def test_retention_drops_it_when_its_last_row_has_expired(
    database: str, redis_url: str, finalized: bool
) -> None:
    attach(database)
    if finalized:
        assert chronos(database, *FINALIZE).returncode == 0
    goes = planned_bound(database) + timedelta(days=15)
    query(database, "SELECT create_future_webhook_log_partitions(60)")
    last = value(database, INSERT, 6)  # the last row that it accepts
    assert drop(database, goes - timedelta(microseconds=1)) == []
    assert value(database, "SELECT count(*) FROM webhook_log WHERE id = %s", last) == 1
    assert drop(database, goes) == ["webhook_log_history"]
    assert not exists(database, "webhook_log_history")
    query(database, INSERT, 30)
    if finalized:
        return
    refused = chronos(database, *ROLLBACK)
    assert refused.returncode == 2
    assert "[history-gone]" in refused.stderr
    assert "finalize" in refused.stderr
    found = status(database, redis_url)
    assert not any("webhook_log_old" in problem for problem in found.problems)
    done = chronos(database, *FINALIZE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stays a partition" not in done.stdout
    assert phase(database) is None


def planned_bound(url: str) -> datetime:
    """Where the old table ends, according to the catalog."""
    found = value(
        url,
        "SELECT substring(pg_get_expr(relpartbound, oid) FROM 'TO \\(''([^'']+)''\\)')::timestamptz"
        " FROM pg_class WHERE relname = 'webhook_log_history'",
    )
    assert isinstance(found, datetime)
    return found


@pytest.mark.parametrize("every", Interval)
def test_new_partitions_never_overlap_it(database: str, every: Interval) -> None:
    query(
        database,
        'CREATE TABLE "Events" (key uuid PRIMARY KEY DEFAULT gen_random_uuid(), at timestamptz NOT NULL);'
        ' CREATE INDEX ON "Events" (at);'
        " INSERT INTO \"Events\" (at) SELECT now() - n * interval '7 hours' FROM generate_series(1, 200) n",
    )
    spec = TableSpec("Events", column="at", every=every, ahead_days=20)
    engine = connect_engine(make_url(database))
    migrate(engine, spec, Options(strategy=Strategy.ATTACH), operator(), lambda found: None)
    with connected(database) as conn, conn.cursor() as cursor:
        before = attached(cursor, '"Events"')
        # Far enough for every interval to need more partitions, near enough for hours.
        last = 70 if every in (Interval.WEEK, Interval.MONTH) else 30
        for days in range(0, last, 9):
            cursor.execute(
                "SELECT chronos_create_partitions('public', 'Events', %s, 20, now() + %s * interval '1 day')",
                (every.value, days),
            )
        cursor.execute(
            "INSERT INTO \"Events\" (at) SELECT now() + n * interval '1 hour'"
            " FROM generate_series(0, 24 * %s) n",
            (last + 10,),
        )
        assert attached(cursor, '"Events"') > before
    undo(engine, spec, operator(), lambda found, by_hand: None)
    assert value(database, 'SELECT count(*) FROM "Events"') == 200 + 24 * (last + 10) + 1


@pytest.mark.parametrize("key_type", ["serial", "identity"])
def test_finalize_drops_nothing_and_says_so(database: str, redis_url: str, key_type: KeyType) -> None:
    attach(database, key_type=key_type)
    before = digest(database)
    asked = chronos(database, "finalize", answer="FINALIZE\n")
    assert asked.returncode == 0, asked.stdout + asked.stderr
    goes = planned_bound(database) + timedelta(days=15)
    assert "Nothing is dropped" in asked.stdout
    assert f"on {goes:%Y-%m-%d}" in asked.stdout
    assert "webhook_log_history stays a partition" in asked.stdout
    assert digest(database) == before
    assert exists(database, "webhook_log_history")
    assert not [name for _, name in relations(database) if "migration" in name]
    assert (
        value(database, "SELECT pg_get_serial_sequence('webhook_log', 'id')") == "public.webhook_log_id_seq"
    )
    highest = value(database, "SELECT max(id) FROM webhook_log")
    assert value(database, INSERT, 0) > highest
    found = status(database, redis_url)
    assert found.state == "finalized"
    # The jobs have not run yet, and nothing shows any more that they have not had a night to do so.
    assert all("has not succeeded yet" in problem for problem in found.problems)
    assert chronos(database, *ROLLBACK).returncode == 2
    # What belongs to the partition is dropped with it.
    assert drop(database, goes) == ["webhook_log_history"]
    assert value(database, INSERT, 8) > highest


# Rollback


def test_a_rollback_with_many_rows_beyond_the_bound_is_refused_without_force(
    database: str, pg_bin: Path
) -> None:
    load(database, ROWS)
    before = dump(database, pg_bin)
    assert chronos(database, *MIGRATE).returncode == 0
    query(
        database,
        "INSERT INTO webhook_log (status, timestamp) SELECT 'far', now() + interval '9 days'"
        " FROM generate_series(1, 5001)",
    )
    rows = digest(database)
    migrated = dump(database, pg_bin)
    refused = chronos(database, *ROLLBACK)
    assert refused.returncode == 2
    assert "5,001 rows lie at or beyond" in refused.stderr
    assert "[rows-beyond-the-bound]" in refused.stderr
    assert "rollback --force" in refused.stderr
    assert dump(database, pg_bin) == migrated
    forced = chronos(database, *ROLLBACK, "--force")
    assert forced.returncode == 0, forced.stdout + forced.stderr
    assert "it has everything written since the swap, including 5,001 newer rows" in forced.stdout
    assert digest(database) == rows
    assert dump(database, pg_bin) == before


@pytest.mark.parametrize(
    ("where", "times"),
    [
        ("in it twice", "now() - interval '1 hour'"),
        ("in it and beyond", "now() + interval '9 days'"),
    ],
)
def test_a_rollback_with_a_repeated_key_names_it_and_changes_nothing(
    database: str, pg_bin: Path, where: str, times: str
) -> None:
    attach(database)
    query(database, f"INSERT INTO webhook_log (id, status, timestamp) SELECT 500, 'again', {times}")
    rows, migrated = digest(database), dump(database, pg_bin)
    result = chronos(database, *ROLLBACK)
    assert result.returncode in (1, 2, 3), result.stdout + result.stderr
    print(where, result.returncode, result.stderr)
    assert "the plain table allows only one" in result.stderr
    assert "500" in result.stderr
    assert phase(database) == "migrated"
    assert digest(database) == rows
    assert dump(database, pg_bin) == migrated
    query(database, "DELETE FROM webhook_log WHERE status = 'again'")
    result = chronos(database, *ROLLBACK)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_rollback_is_refused_when_someone_else_attached_a_partition(database: str) -> None:
    attach(database)
    query(
        database,
        "CREATE TABLE theirs PARTITION OF webhook_log FOR VALUES FROM ('2100-01-01') TO ('2101-01-01')",
    )
    refused = chronos(database, *ROLLBACK)
    assert refused.returncode == 2
    assert "theirs" in refused.stderr
    assert "[foreign-partition]" in refused.stderr


BY_HAND = (
    "ALTER TABLE webhook_log DETACH PARTITION webhook_log_history",
    "DROP TABLE webhook_log",
    "ALTER TABLE webhook_log_history RENAME TO webhook_log",
)


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("key_type", ["serial", "identity", "identity always", "uuid"])
def test_a_rollback_by_hand_is_cleaned_up(
    database: str, pg_bin: Path, redis_url: str, key_type: KeyType, steps: int
) -> None:
    load(database, ROWS, key_type=key_type)
    query(
        database,
        "CREATE TABLE audit (what text); CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO public.audit VALUES (TG_OP); RETURN NULL; END $$;"
        " CREATE TRIGGER note AFTER INSERT ON webhook_log FOR EACH ROW EXECUTE FUNCTION note();"
        " ALTER TABLE webhook_log ENABLE ALWAYS TRIGGER note",
    )
    before = dump(database, pg_bin)
    assert chronos(database, *MIGRATE).returncode == 0
    query(database, INSERT, 0)
    rows = digest(database)
    for statement in BY_HAND[:steps]:
        query(database, statement)
    [problem] = status(database, redis_url).problems if steps == 3 else ["rollback"]
    assert "rollback" in problem
    assert "webhook_log_old" not in problem
    result = chronos(database, *ROLLBACK)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "put back by hand" in result.stdout
    assert digest(database) == rows
    assert dump(database, pg_bin) == before
    highest = value(database, "SELECT max(id::text) FROM webhook_log")
    new = value(database, INSERT, 0)
    assert key_type == "uuid" or new > int(highest)
    assert value(database, "SELECT count(*) FROM audit") == 2


def test_a_table_detached_by_hand_is_refused_until_it_is_attached_again(database: str) -> None:
    attach(database)
    query(database, BY_HAND[0])
    refused = chronos(database, *ROLLBACK)
    assert refused.returncode == 2
    assert "[history-gone]" in refused.stderr


def test_the_manual_rollback_of_a_copy_is_refused_by_the_server(database: str) -> None:
    """DROP TABLE would drop the rows too: without CASCADE it must not."""
    attach(database)
    with pytest.raises(errors.UndefinedTable):
        query(
            database,
            "BEGIN; DROP TABLE webhook_log CASCADE; ALTER TABLE webhook_log_old RENAME TO webhook_log",
        )
    assert value(database, "SELECT count(*) FROM webhook_log") == ROWS
