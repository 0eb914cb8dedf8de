"""A migration can be resumed where its dump was restored, and on a later day than it began."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy.engine import Connection, make_url

from chronos.db import connect_engine
from chronos.demo.rows import create_webhook_log
from chronos.migration import run as migration_run
from chronos.migration.checks import Survey, survey
from chronos.migration.console import Output
from chronos.migration.operator import Operator
from chronos.migration.run import Options, migrate
from chronos.migration.state import Strategy
from chronos.table import WEBHOOK_LOG, TableSpec
from tests.command import Run, chronos
from tests.conftest import MakeDatabase
from tests.live import Application, load, phase
from tests.tables import digest, query, relations, value
from tests.waiting import wait_until

ROWS = 3_000


def plain_url(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


@pytest.fixture
def restored(make_database: MakeDatabase, pg_bin: Path, tmp_path: Path) -> Callable[[str], str]:
    """A factory: the URL of a new database, restored from a dump of the given one."""

    def restore(url: str) -> str:
        file, target = tmp_path / "dump.sql", make_database()
        subprocess.run([pg_bin / "pg_dump", "-f", file, plain_url(url)], check=True)
        subprocess.run(
            [pg_bin / "psql", "-qX", "-v", "ON_ERROR_STOP=1", "-f", file, plain_url(target)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return target

    return restore


def stopped_while_copying(url: str) -> None:
    """A migration stopped with some partitions filled."""
    run = Run(url, "migrate", "--yes", "--rate-limit", "3000", "--workers", "1", "--batch-size", "50")
    wait_until(
        lambda: phase(url) == "copying" and value(url, "SELECT compared <> '{}' FROM webhook_log_migration"),
        30,
        "a partition is compared",
    )
    os.kill(run.pid, signal.SIGTERM)
    assert run.finish().returncode == 3


def held(url: str) -> None:
    assert chronos(url, "migrate", "--yes", "--hold").returncode == 0


def migrated(url: str) -> None:
    assert chronos(url, "migrate", "--yes").returncode == 0


def write(url: str) -> None:
    """Rows written after the restore must be noted there as in the original database."""
    query(url, "INSERT INTO webhook_log (status, timestamp) VALUES ('restored', now())")
    query(url, "UPDATE webhook_log SET status = 'changed' WHERE id = (SELECT max(id) - 20 FROM webhook_log)")
    query(
        url,
        "DELETE FROM webhook_log WHERE id IN"
        " (SELECT id FROM webhook_log WHERE timestamp > now() - interval '5 days' LIMIT 7)",
    )


@pytest.mark.parametrize("stop", [stopped_while_copying, held, migrated])
def test_a_restored_dump_resumes_and_rolls_back_in_each_phase(
    database: str, restored: Callable[[str], str], stop: Callable[[str], None]
) -> None:
    create_webhook_log(connect_engine(make_url(database)), ROWS, days=12)
    stop(database)
    there = restored(database)
    write(there)
    expected = digest(there)
    if stop is not migrated:
        result = chronos(there, "migrate", "--yes", "--resume")
        assert result.returncode == 0, result.stderr
        assert digest(there) == expected
        write(there)
        expected = digest(there)
    status = chronos(there, "status")
    assert "retention" not in status.stdout.lower()
    result = chronos(there, "rollback", "--yes")
    assert result.returncode == 0, result.stderr
    assert digest(there) == expected
    assert phase(there) is None

    again = restored(database)
    write(again)
    expected = digest(again)
    result = chronos(again, "finalize" if stop is migrated else "rollback", "--yes")
    assert result.returncode == 0, result.stderr
    assert digest(again) == expected
    assert {name for _, name in relations(again) if "migration" in name} == set()


def begun_yesterday(
    conn: Connection, table: TableSpec, strategy: Strategy, accepted: frozenset[str]
) -> Survey:
    """What the survey would have found a day ago."""
    found = survey(conn, table, strategy, accepted)
    return replace(found, now=found.now - timedelta(days=1))


@pytest.mark.parametrize("strategy", Strategy)
@pytest.mark.parametrize("hold", [False, True], ids=["during the work", "while held"])
def test_no_row_is_missing_after_midnight_passes(
    database: str, monkeypatch: pytest.MonkeyPatch, hold: bool, strategy: Strategy
) -> None:
    """A day that was ahead when the partitions were planned is now today, and rows are written to it."""
    loaded = load(database, ROWS, days=13)
    monkeypatch.setattr(migration_run, "survey", begun_yesterday)
    engine = connect_engine(make_url(database))
    with Application(database, loaded, threads=2, rate=100) as application:
        application.go_on(20)
        migrate(
            engine, WEBHOOK_LOG, Options(strategy=strategy, hold=hold), Operator(Output()), lambda found: None
        )
        application.go_on(20)
        if hold:
            result = chronos(database, "migrate", "--yes", "--resume")
            assert result.returncode == 0, result.stderr
        application.go_on(20)
    assert application.errors == []
    assert not application.compare(database)
    begun = "SELECT (plan ->> 'started_at')::timestamptz < now() - interval '23 h' FROM webhook_log_migration"
    assert value(database, begun)
    today = "SELECT count(*) FROM webhook_log WHERE timestamp >= date_trunc('day', now(), 'UTC')"
    assert value(database, today) > 0
    assert chronos(database, "rollback", "--yes").returncode == 0
    assert not application.compare(database)
