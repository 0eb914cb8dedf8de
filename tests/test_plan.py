"""The dry run: changes nothing, says all, and its SQL does what the migration does."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from sqlalchemy.engine import make_url

from tests.command import chronos
from tests.conftest import MakeDatabase
from tests.kitchen_sink import forget, kitchen_sink
from tests.tables import query, value
from tests.test_table_shape import dump

_PLAIN = (
    "CREATE TABLE webhook_log (id bigserial PRIMARY KEY, timestamp timestamptz NOT NULL, status text);"
    " CREATE INDEX ON webhook_log (timestamp);"
    " INSERT INTO webhook_log (timestamp) SELECT now() - n * interval '1 hour' FROM generate_series(0, 99) n;"
)


def psql(url: str, pg_bin: Path, script: str) -> subprocess.CompletedProcess[str]:
    dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return subprocess.run(
        [pg_bin / "psql", "--no-psqlrc", "--quiet", dsn],
        input=script,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_sql_gives_the_same_catalog_as_the_migration(make_database: MakeDatabase, pg_bin: Path) -> None:
    by_program, by_hand = make_database(), make_database()
    for url in (by_program, by_hand):
        kitchen_sink(url, identity="bigserial")
    try:
        before = dump(by_hand, pg_bin)
        plan = chronos(by_hand, "migrate", "--dry-run")
        assert plan.returncode == 0, plan.stderr
        assert dump(by_hand, pg_bin) == before, "a dry run changes nothing"

        done = psql(by_hand, pg_bin, plan.stdout)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert chronos(by_program, "migrate", "--yes").returncode == 0

        assert dump(by_hand, pg_bin) == dump(by_program, pg_bin)
        state = (
            "SELECT phase, fence, window_rows, (SELECT count(*) FROM jsonb_object_keys(days)),"
            ' (SELECT count(*) FROM "Hooks".webhook_log) FROM "Hooks".webhook_log_migration'
        )
        [[phase, *_]] = query(by_hand, state)
        assert phase == "migrated"
        # What was migrated by hand goes back by the program.
        assert chronos(by_hand, "rollback", "--yes").returncode == 0
        assert dump(by_hand, pg_bin) == before
    finally:
        forget(by_program, by_hand)


def test_the_plan_says_what_it_found(database: str) -> None:
    query(
        database,
        _PLAIN + "CREATE FUNCTION tidy() RETURNS void LANGUAGE sql AS 'DELETE FROM webhook_log';"
        " CREATE VIEW latest AS SELECT max(timestamp) FROM webhook_log;"
        " CREATE PUBLICATION everything FOR ALL TABLES",
    )
    plan = chronos(database, "migrate", "--dry-run")
    assert (plan.returncode, plan.stderr) == (0, "")
    report = plan.stdout.split("\\set")[0]
    assert all(line.startswith("--") and len(line) <= 80 for line in report.splitlines())
    text = re.sub(r"\n--\s+", " ", report)
    for said in (
        "46 partitions, webhook_log_y",
        "rows to copy: 100",
        "primary key webhook_log_pkey: over (id, timestamp) from now on",
        "view public.latest: refers to the new table",
        "function public.tidy(): names the table in its text",
        "publication everything publishes all tables",
        "duration: about",
    ):
        assert said in text, said


def test_a_blocker_is_named_and_nothing_is_run(database: str, pg_bin: Path) -> None:
    query(database, _PLAIN + "CREATE MATERIALIZED VIEW stale AS SELECT id FROM webhook_log")
    before = dump(database, pg_bin)
    plan = chronos(database, "migrate", "--dry-run")
    assert plan.returncode == 2
    assert "materialized view public.stale reads webhook_log" in plan.stderr
    assert "BLOCKER" in plan.stdout
    assert "CREATE TABLE" not in plan.stdout
    assert dump(database, pg_bin) == before
    assert value(database, "SELECT count(*) FROM webhook_log") == 100
