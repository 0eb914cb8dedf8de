"""The dry run changes nothing, says everything, and its SQL does what the migration does."""

from __future__ import annotations

import re
import subprocess
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sqlalchemy.engine import make_url

from chronos.db import connect_engine, opened, transaction
from chronos.demo.rows import create_webhook_log
from chronos.errors import RefusedError
from chronos.migration import estimate, plan, queries
from chronos.migration import state as states
from chronos.migration.console import Output
from chronos.migration.operator import Operator
from chronos.migration.rollback import undo
from chronos.settings import postgres_url
from chronos.table import WEBHOOK_LOG, Interval, TableSpec
from tests.command import chronos
from tests.conftest import MakeDatabase
from tests.kitchen_sink import forget, kitchen_sink
from tests.tables import dump, exists, query, value

_PLAIN = (
    "CREATE TABLE webhook_log (id bigserial PRIMARY KEY, timestamp timestamptz NOT NULL, status text);"
    " CREATE INDEX ON webhook_log (timestamp);"
    " INSERT INTO webhook_log (timestamp) SELECT now() - n * interval '1 hour' FROM generate_series(0, 99) n;"
)
_ANOTHER_TABLE = """
CREATE SCHEMA "Shop";
CREATE TABLE "Shop".customer (name text PRIMARY KEY);
INSERT INTO "Shop".customer VALUES ('Anne'), ('Bob');
CREATE TABLE "Shop"."Order %" (
    "customer's" text NOT NULL REFERENCES "Shop".customer,
    nr uuid NOT NULL DEFAULT gen_random_uuid(),
    "placed on" date NOT NULL,
    PRIMARY KEY ("customer's", nr)
);
CREATE INDEX ON "Shop"."Order %" ("placed on");
INSERT INTO "Shop"."Order %" ("customer's", "placed on")
SELECT (ARRAY['Anne', 'Bob'])[1 + n % 2], (now() AT TIME ZONE 'UTC')::date - n FROM generate_series(0, 199) n;
"""
_ANOTHER = TableSpec("Order %", "placed on", Interval.MONTH, retention_days=90, schema="Shop")


def psql(url: str, pg_bin: Path, script: str) -> subprocess.CompletedProcess[str]:
    dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return subprocess.run(
        [pg_bin / "psql", "--no-psqlrc", "--quiet", dsn],
        input=script,
        capture_output=True,
        text=True,
        check=False,
    )


def dump_without_fence(url: str, pg_bin: Path) -> str:
    """The dump without the instant of the swap."""
    return re.sub(r"(RETURN \(written <= )'[^']*'", r"\1...", dump(url, pg_bin))


def script_of_plan(url: str, *options: str) -> str:
    found = chronos(url, "migrate", "--dry-run", *options)
    assert (found.returncode, found.stderr) == (0, "")
    return found.stdout


def test_the_sql_gives_the_same_catalog_as_the_migration(make_database: MakeDatabase, pg_bin: Path) -> None:
    by_program, by_hand = make_database(), make_database()
    for url in (by_program, by_hand):
        kitchen_sink(url, identity="bigserial")
    try:
        before = dump(by_hand, pg_bin)
        script = script_of_plan(by_hand)
        assert dump(by_hand, pg_bin) == before, "a dry run changes nothing"

        done = psql(by_hand, pg_bin, script)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        migrated = chronos(by_program, "migrate", "--yes")
        assert migrated.returncode == 0, migrated.stdout + migrated.stderr

        assert dump_without_fence(by_hand, pg_bin) == dump_without_fence(by_program, pg_bin)
        state = (
            "SELECT phase, verified, fence IS NOT NULL, compared, (SELECT count(*) FROM {changes}),"
            " (SELECT count(*) FROM {replayed}), (SELECT count(*) FROM {table}) FROM {state}"
        ).format(
            table='"Hooks".webhook_log',
            state='"Hooks".webhook_log_migration',
            changes='"Hooks".webhook_log_migration_changes',
            replayed='"Hooks".webhook_log_migration_replayed',
        )
        [by_hand_state], [by_program_state] = query(by_hand, state), query(by_program, state)
        assert by_hand_state[:3] == by_program_state[:3] == ("migrated", True, True)
        assert by_hand_state[3].keys() == by_program_state[3].keys()
        assert by_hand_state[4:6] == by_program_state[4:6] == (0, 0)
        assert by_hand_state[6] == sum(found["new_rows"] for found in by_hand_state[3].values())
        # What was migrated by hand can be rolled back by chronos.
        back = chronos(by_hand, "rollback", "--yes")
        assert back.returncode == 0, back.stdout + back.stderr
        assert dump(by_hand, pg_bin) == before
    finally:
        forget(by_program, by_hand)


def test_the_sql_of_attach_gives_the_same_catalog_as_the_migration(
    make_database: MakeDatabase, pg_bin: Path
) -> None:
    by_program, by_hand = make_database(), make_database()
    for url in (by_program, by_hand):
        kitchen_sink(url, identity="bigserial")
        # Attached as it is, so every row must have been checked.
        for [check] in query(
            url,
            "SELECT format('ALTER TABLE %s VALIDATE CONSTRAINT %I', conrelid::regclass, conname)"
            " FROM pg_constraint WHERE NOT convalidated AND contype = 'c'",
        ):
            query(url, check)
    try:
        before = dump(by_hand, pg_bin)
        script = script_of_plan(by_hand, "--strategy", "attach")
        assert dump(by_hand, pg_bin) == before, "a dry run changes nothing"

        done = psql(by_hand, pg_bin, script)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        migrated = chronos(by_program, "migrate", "--strategy", "attach", "--yes")
        assert migrated.returncode == 0, migrated.stdout + migrated.stderr

        assert dump_without_fence(by_hand, pg_bin) == dump_without_fence(by_program, pg_bin)
        state = (
            'SELECT phase, verified, fence IS NOT NULL, compared, (SELECT count(*) FROM "Hooks".webhook_log)'
            ' FROM "Hooks".webhook_log_migration'
        )
        assert query(by_hand, state) == query(by_program, state)
        # What was migrated by hand can be rolled back by chronos.
        back = chronos(by_hand, "rollback", "--yes")
        assert back.returncode == 0, back.stdout + back.stderr
        assert dump(by_hand, pg_bin) == before
    finally:
        forget(by_program, by_hand)


_ATTACH = ("--strategy", "attach")


@pytest.mark.parametrize("command", ["migrate --resume", "rollback"])
def test_an_attach_script_interrupted_anywhere_is_resumed_or_undone(
    make_database: MakeDatabase, pg_bin: Path, command: str
) -> None:
    content = (
        _PLAIN + "CREATE TABLE endpoint (id bigint PRIMARY KEY); INSERT INTO endpoint VALUES (1);"
        " ALTER TABLE webhook_log ADD COLUMN endpoint bigint DEFAULT 1 REFERENCES endpoint"
    )
    plain = make_database()
    query(plain, content)
    before = dump(plain, pg_bin)
    script = script_of_plan(plain, *_ATTACH)
    parts = re.split(r"(?=\n-- (?:Step|It is complete|Statistics))", script)
    assert len(parts) > 10, "one for each transaction, and what comes before"
    for cut in (2, 3, 4, 5, 7, len(parts) - 3, len(parts) - 2):
        url = make_database()
        query(url, content)
        done = psql(url, pg_bin, "".join(parts[:cut]))
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        query(url, "INSERT INTO webhook_log (timestamp, status) VALUES (now(), 'meanwhile')")
        went_on = chronos(url, *command.split(), "--yes")
        assert went_on.returncode == 0, f"{parts[cut]}{went_on.stdout}{went_on.stderr}"
        assert value(url, "SELECT count(*) FROM webhook_log") == 101
        assert exists(url, "webhook_log_history") == (command != "rollback")
        if command == "rollback":
            assert dump(url, pg_bin) == before


@pytest.mark.parametrize("days", [7, 8])
def test_the_attach_script_refuses_rows_beyond_its_bound(database: str, pg_bin: Path, days: int) -> None:
    query(database, _PLAIN)
    before = dump(database, pg_bin)
    script = script_of_plan(database, *_ATTACH)
    query(
        database,
        "INSERT INTO webhook_log (timestamp) SELECT date_trunc('day', now(), 'UTC') + %s * interval '1 day'",
        days,
    )
    done = psql(database, pg_bin, script)
    assert done.returncode != 0
    assert "which this plan does not cover; make a new one" in done.stderr
    assert dump(database, pg_bin) == before


def test_the_attach_script_refuses_to_start_when_its_bound_is_near(database: str, pg_bin: Path) -> None:
    query(database, _PLAIN)
    before = dump(database, pg_bin)
    script = script_of_plan(database, *_ATTACH)
    later, guards = re.subn(r"now\(\) >= '[^']+'", "now() >= '-infinity'", script)
    assert guards == 1
    done = psql(database, pg_bin, later)
    assert done.returncode != 0
    assert "is less than a day away; make a new one" in done.stderr
    assert dump(database, pg_bin) == before


def test_finalize_works_after_the_sql(database: str, pg_bin: Path) -> None:
    query(database, _PLAIN)
    done = psql(database, pg_bin, script_of_plan(database))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    query(database, "INSERT INTO webhook_log (timestamp, status) VALUES (now(), 'later')")
    finished = chronos(database, "finalize", "--yes")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert value(database, "SELECT count(*) FROM webhook_log") == 101
    assert not exists(database, "webhook_log_old")
    assert not exists(database, "webhook_log_migration")


def half_of_the_script(url: str, pg_bin: Path) -> str:
    """Run the script up to the first foreign keys; returns the rest."""
    query(
        url,
        _PLAIN + "CREATE TABLE endpoint (id bigint PRIMARY KEY); INSERT INTO endpoint VALUES (1), (2);"
        " ALTER TABLE webhook_log ADD COLUMN endpoint bigint DEFAULT 1 REFERENCES endpoint ON DELETE CASCADE;"
        " UPDATE webhook_log SET endpoint = 2 WHERE id % 10 = 0",
    )
    before, after = re.split(r"(?=\n-- Step 3: validate them)", script_of_plan(url))
    done = psql(url, pg_bin, before)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return "\\set ON_ERROR_STOP on\n" + after


_WRITES = (
    "UPDATE webhook_log SET status = 'changed' WHERE id = 1; DELETE FROM webhook_log WHERE id = 2;"
    " UPDATE webhook_log SET timestamp = timestamp - interval '2 days', status = 'moved' WHERE id = 3;"
    " INSERT INTO webhook_log (timestamp, status) VALUES (now() - interval '3 days', 'late');"
    " DELETE FROM endpoint WHERE id = 2"
)


def check_writes(url: str) -> None:
    assert value(url, "SELECT count(*) FROM webhook_log") == 100 - 1 + 1 - 10
    assert query(url, "SELECT id, status FROM webhook_log WHERE status IS NOT NULL ORDER BY 1") == [
        (1, "changed"),
        (3, "moved"),
        (101, "late"),
    ]


@pytest.mark.parametrize("command", ["migrate --resume", "rollback"])
def test_an_interrupted_script_is_resumed_or_undone(database: str, pg_bin: Path, command: str) -> None:
    half_of_the_script(database, pg_bin)
    query(database, _WRITES)
    went_on = chronos(database, *command.split(), "--yes")
    assert went_on.returncode == 0, went_on.stdout + went_on.stderr
    check_writes(database)
    assert exists(database, "webhook_log_old") == (command != "rollback")
    assert exists(database, "webhook_log_migration") == (command != "rollback")


def test_the_script_replays_rows_written_meanwhile(database: str, pg_bin: Path) -> None:
    rest = half_of_the_script(database, pg_bin)
    query(database, _WRITES)
    done = psql(database, pg_bin, rest)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    check_writes(database)
    assert chronos(database, "rollback", "--yes").returncode == 0
    check_writes(database)


def test_the_script_refuses_to_continue_after_a_truncate(database: str, pg_bin: Path) -> None:
    rest = half_of_the_script(database, pg_bin)
    query(database, "TRUNCATE webhook_log")
    done = psql(database, pg_bin, rest)
    assert done.returncode != 0
    assert "webhook_log was emptied by TRUNCATE during the copy" in done.stderr
    assert chronos(database, "rollback", "--yes").returncode == 0
    assert value(database, "SELECT count(*) FROM webhook_log") == 0


def test_the_script_refuses_rows_outside_its_plan(database: str, pg_bin: Path) -> None:
    query(database, _PLAIN)
    before = dump(database, pg_bin)
    script = script_of_plan(database)
    query(database, "INSERT INTO webhook_log (timestamp) VALUES (now() + interval '3 days')")
    done = psql(database, pg_bin, script)
    assert done.returncode != 0
    assert "which this plan does not cover; make a new one" in done.stderr
    assert dump(database, pg_bin) == before


def test_a_plan_for_an_unusual_table_runs(database: str, pg_bin: Path) -> None:
    query(database, _ANOTHER_TABLE)
    before = dump(database, pg_bin)
    engine, printed = connect_engine(postgres_url(database)), StringIO()
    plan.dry_run(engine, _ANOTHER, Console(file=printed))
    assert "primary key Order %_pkey: over (customer's, nr, placed on) from the swap on" in printed.getvalue()
    said = [line for line in printed.getvalue().splitlines() if "webhook_log" in line]
    assert all(line.startswith("--") for line in said), (
        "only a comment of the SQL functions gives it as an example"
    )

    done = psql(database, pg_bin, printed.getvalue())
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert value(database, 'SELECT count(*) FROM "Shop"."Order %_old"') == 200
    assert value(database, 'SELECT count(*) FROM "Shop"."Order %"') in (90, 91)
    undo(engine, _ANOTHER, Operator(Output(Console(file=StringIO()))), lambda found, by_hand: None)
    assert dump(database, pg_bin) == before


def test_the_plan_says_what_it_found(database: str) -> None:
    query(
        database,
        _PLAIN + "CREATE FUNCTION tidy() RETURNS void LANGUAGE sql AS 'DELETE FROM webhook_log';"
        " CREATE VIEW latest AS SELECT max(timestamp) FROM webhook_log;"
        " CREATE PUBLICATION everything FOR ALL TABLES",
    )
    report = script_of_plan(database).split("\\set")[0]
    assert all(line.startswith("--") and len(line) <= 80 for line in report.splitlines())
    text = re.sub(r" +", " ", re.sub(r"\n--\s+", " ", report))
    for said in (
        "46 partitions, webhook_log_y",
        "rows copied 100 none",
        "primary key webhook_log_pkey: over (id, timestamp) from the swap on",
        "view public.latest: refers to the new table",
        "function public.tidy(): names the table in its text",
        "warning: publication everything publishes all tables",
        "[publication-of-all-tables]",
        "it must be ON CONFLICT (id, timestamp) [on-conflict]",
        "duration: from a sample",
        "webhook_log is complete and in use all the time",
        "An attempt at a lock waits 100 ms, and up to 1 s",
        "--max-lock-wait",
    ):
        assert said in text, said


def test_the_plan_compares_both_strategies_in_the_same_words(database: str) -> None:
    query(database, _PLAIN + "ANALYZE webhook_log")
    of_copy, of_attach = (
        script_of_plan(database, "--strategy", strategy).split("\\set")[0] for strategy in ("copy", "attach")
    )
    for report in (of_copy, of_attach):
        assert all(line.startswith("--") and len(line) <= 80 for line in report.splitlines())
        text = re.sub(r" +", " ", report)
        bound = value(database, "SELECT (date_trunc('day', now(), 'UTC') AT TIME ZONE 'UTC')::date + 7")
        for said in (
            "-- copy attach\n",
            "-- rows copied 100 none\n",
            "-- duration about 1 s about 1 s\n",
            "-- until finalize the swap\n",
            f"-- by day at once from {bound} on\n",
            f"-- one partition none all before, until {bound + timedelta(days=15)}\n",
            "-- recommended: copy, as it puts every period into a partition of its own at\n",
            "--strategy attach\n",
        ):
            assert said in text, said
    assert "webhook_log itself becomes the partition\n--     webhook_log_history" in of_attach


def test_the_plan_recommends_attach_where_a_copy_takes_too_much(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    query(database, _PLAIN)
    monkeypatch.setattr(estimate, "_LARGE_BYTES", 1_000)
    printed = StringIO()
    plan.dry_run(connect_engine(postgres_url(database)), WEBHOOK_LOG, Console(file=printed))
    assert re.search(r"-- recommended: attach, as a copy takes \d+ kB of disk", printed.getvalue())


def test_the_plan_recommends_the_strategy_that_is_not_refused(database: str) -> None:
    query(
        database,
        _PLAIN + "ALTER TABLE webhook_log ADD CONSTRAINT usual CHECK (status IS NULL) NOT VALID",
    )
    text = re.sub(r"\n--\s+", " ", script_of_plan(database))
    assert "recommended: copy; an attach would be refused: the check constraint usual is not" in text
    assert re.search(r"rows copied +100 +refused", text)
    refused = chronos(database, "migrate", "--dry-run", "--strategy", "attach")
    assert refused.returncode == 2
    assert "[check-not-validated]" in refused.stderr


@pytest.mark.parametrize("fill_factor", [90, 60])
def test_the_size_of_the_new_index_is_estimated_before_it_is_built(database: str, fill_factor: int) -> None:
    query(
        database,
        "CREATE TABLE webhook_log (id bigserial, timestamp timestamptz NOT NULL, status text);"
        " INSERT INTO webhook_log (timestamp)"
        " SELECT now() - n * interval '1 second' FROM generate_series(0, 99999) n;"
        f" ALTER TABLE webhook_log ADD PRIMARY KEY (id) WITH (fillfactor = {fill_factor});"
        " CREATE INDEX ON webhook_log (timestamp); ANALYZE webhook_log",
    )
    [told] = re.findall(r"-- disk now .* about (\d+) MB more", script_of_plan(database))
    done = chronos(database, "migrate", "--strategy", "attach", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    found = value(database, "SELECT pg_relation_size('webhook_log_history_pkey') / 2.0 ^ 20")
    assert abs(int(told) - found) < 1


def test_a_large_table_is_not_counted(database: str, pg_bin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_COUNTABLE", -1)
    query(database, _PLAIN + "INSERT INTO webhook_log (timestamp) VALUES (now() + interval '5 days')")
    query(database, "ANALYZE webhook_log")
    printed = StringIO()
    plan.dry_run(connect_engine(postgres_url(database)), WEBHOOK_LOG, Console(file=printed))
    assert "rows (planner's estimate)" in printed.getvalue()
    done = psql(database, pg_bin, printed.getvalue())
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert value(database, "SELECT count(*) FROM webhook_log") == 101


def test_a_blocker_is_named_and_nothing_is_run(database: str, pg_bin: Path) -> None:
    query(database, _PLAIN + "CREATE MATERIALIZED VIEW stale AS SELECT id FROM webhook_log")
    before = dump(database, pg_bin)
    refused = chronos(database, "migrate", "--dry-run")
    assert refused.returncode == 2
    assert "materialized view public.stale reads webhook_log" in refused.stderr
    assert "BLOCKER" in refused.stdout
    assert "CREATE TABLE" not in refused.stdout
    assert dump(database, pg_bin) == before
    assert value(database, "SELECT count(*) FROM webhook_log") == 100


def test_a_blocker_gives_commands_and_statements_whole(database: str) -> None:
    query(
        database,
        'CREATE SCHEMA "A Shop With A Long Name";'
        ' CREATE TABLE "A Shop With A Long Name"."Order Events" (nr int PRIMARY KEY, "placed at" date);'
        ' CREATE UNIQUE INDEX "One Of Each" ON "A Shop With A Long Name"."Order Events" (nr) WHERE nr > 0',
    )
    table = '"A Shop With A Long Name"."Order Events"'
    found = chronos(database, "migrate", table, "--column", "placed at", "--dry-run")
    assert found.returncode == 2
    lines = [line.removeprefix("--").strip() for line in found.stdout.splitlines()]
    assert f"table: {table}" in lines
    assert f'CREATE INDEX CONCURRENTLY ON {table} ("placed at");' in lines
    assert 'DROP INDEX CONCURRENTLY "A Shop With A Long Name"."One Of Each";' in lines
    assert f'CREATE UNIQUE INDEX CONCURRENTLY ON {table} ("nr", "placed at");' in lines


def on_a_terminal(url: str, **more: Any) -> list[str]:
    """The lines of a dry run on an 80-column terminal."""
    printed = StringIO()
    terminal = Console(file=printed, force_terminal=True, width=80, color_system=None)
    plan.dry_run(connect_engine(postgres_url(url)), WEBHOOK_LOG, terminal, **more)
    return printed.getvalue().splitlines()


def test_on_a_terminal_the_plan_is_one_screen_without_sql(database: str) -> None:
    query(
        database,
        _PLAIN + "CREATE VIEW latest AS SELECT max(timestamp) FROM webhook_log;"
        " CREATE PUBLICATION everything FOR ALL TABLES",
    )
    lines = on_a_terminal(database)
    assert len(lines) <= 40
    assert all(len(line) < 80 for line in lines)
    text = "\n".join(lines)
    url = make_url(database)
    for said in (
        f"Server      {url.host}, port {url.port}, database",
        "Blockers    none",
        "; --verbose shows them in full",
        "\n  publication-of-all-tables ",
        "\n  on-conflict ",
        " copy    ",
        " attach\n",
        "WAL            about",
        "Recommended copy",
        "Lock wait   100 ms an attempt, up to 1 s",
        "Queries     pg_stat_statements is not installed",
        "--sql FILE",
    ):
        assert said in text, said
    assert "CREATE TABLE" not in text
    assert str(url.password) not in text

    whole = "\n".join(on_a_terminal(database, verbose=True))
    assert "What is carried over, and how" in whole
    assert "[publication-of-all-tables]" in whole
    assert "--" not in {line[:2] for line in whole.splitlines() if not line.startswith("---")}
    assert "CREATE TABLE" not in whole


def test_on_a_terminal_a_blocker_is_a_line_of_its_own(database: str) -> None:
    query(database, _PLAIN + "CREATE MATERIALIZED VIEW stale AS SELECT id FROM webhook_log")
    printed = StringIO()
    terminal = Console(file=printed, force_terminal=True, width=80, color_system=None)
    with pytest.raises(RefusedError, match=r"materialized view public\.stale reads webhook_log"):
        plan.dry_run(connect_engine(postgres_url(database)), WEBHOOK_LOG, terminal)
    assert re.search(r"Blockers    1; .*\n  [a-z-]+  materialized view public.stale", printed.getvalue())


def test_the_sql_is_written_to_a_file_and_runs_from_it(database: str, pg_bin: Path, tmp_path: Path) -> None:
    query(database, _PLAIN)
    file = tmp_path / "plan.sql"
    found = chronos(database, "migrate", "--dry-run", "--sql", str(file))
    assert (found.returncode, found.stderr) == (0, "")
    assert "CREATE TABLE" not in found.stdout
    assert f"SQL         in {file}" in found.stdout
    done = psql(database, pg_bin, file.read_text("utf-8"))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert value(database, "SELECT count(*) FROM webhook_log") == 100


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--dry-run", "--sql", "{folder}/no/plan.sql"), "the SQL cannot be written to"),
        (("--sql", "{folder}/plan.sql", "--yes"), "--sql and --verbose are for --dry-run"),
        (("--verbose", "--yes"), "--sql and --verbose are for --dry-run"),
    ],
)
def test_sql_without_a_dry_run_or_a_writable_file_is_refused(
    database: str, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    query(database, _PLAIN)
    found = chronos(database, "migrate", *(option.format(folder=tmp_path) for option in options))
    assert found.returncode == 2
    assert said in found.stderr
    assert "nothing was changed" in found.stderr
    assert not exists(database, "webhook_log_old")
    assert not list(tmp_path.iterdir())


def test_no_sql_is_written_when_there_is_a_blocker(database: str, tmp_path: Path) -> None:
    query(database, _PLAIN + "CREATE MATERIALIZED VIEW stale AS SELECT id FROM webhook_log")
    found = chronos(database, "migrate", "--dry-run", "--sql", str(tmp_path / "plan.sql"))
    assert found.returncode == 2
    assert "none was written" in found.stdout
    assert not list(tmp_path.iterdir())


def test_the_wal_is_estimated_before_it_is_written(database: str) -> None:
    engine = connect_engine(postgres_url(database))
    create_webhook_log(engine, 40_000)
    found = script_of_plan(database)
    [told] = re.findall(r"-- WAL +about (\d+) MB", found)
    before = value(database, "SELECT pg_current_wal_insert_lsn()")
    assert chronos(database, "migrate", "--yes").returncode == 0
    written = value(database, "SELECT (pg_current_wal_insert_lsn() - %s::pg_lsn) / 2 ^ 20", before)
    assert abs(int(told) / float(written) - 1) < 0.25


def test_a_held_migration_has_its_queries_planned_on_the_new_table(database: str) -> None:
    query(database, _PLAIN)
    held = chronos(database, "migrate", "--hold", "--yes")
    assert held.returncode == 0, held.stdout + held.stderr
    engine = connect_engine(postgres_url(database))
    with opened(engine) as conn, transaction(conn):
        located = WEBHOOK_LOG.located("public")
        earlier = states.read(conn, located)
        subject, _ = queries._subject(conn, located)
        assert earlier is not None
        texts = ("SELECT * FROM webhook_log WHERE id = $1", "SELECT * FROM webhook_log WHERE timestamp > $1")
        found = queries.read_workload(
            conn, subject, [(text, 1, 1.0, 0.5) for text in texts], 92, plan.partitioned_beside(earlier)
        )
    by_id, by_time = (one.planned for one in found.statements)
    assert by_id is not None
    assert by_time is not None
    assert by_id.scanned == by_id.partitions == 46
    assert by_time.scanned < 46


def test_without_a_server_there_is_no_plan_but_a_line() -> None:
    found = chronos("postgresql://nobody@127.0.0.1:1/none", "migrate", "--dry-run")
    assert found.returncode == 1
    assert found.stderr.endswith("nothing was changed. Check the server and the database URL\n")
