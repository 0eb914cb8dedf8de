"""What a program that imports chronos gets: typed results and errors, and nothing it did not ask for."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url

import chronos
from chronos import (
    CannotTellError,
    ChronosError,
    ExitCode,
    InterruptedRunError,
    RefusedError,
    Status,
    finalize,
    migrate,
    overview,
    rollback,
    status,
    upkeep,
)
from chronos.demo.rows import create_webhook_log
from chronos.migration.state import Phase, Strategy
from docs import make_api
from tests.tables import closed_gate, exists, gate_in_the_copy, pid_at_the_gate, query, relations, value

ROWS = 1_500


@pytest.fixture
def url(database: str) -> str:
    """A database with a webhook_log of a few days, all within retention."""
    create_webhook_log(create_engine(database), ROWS, days=5)
    return database


def kind(url: str) -> str:
    return str(value(url, "SELECT relkind::text FROM pg_class WHERE oid = 'webhook_log'::regclass"))


# The import


def test_importing_chronos_imports_nothing_else() -> None:
    loaded = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; before = {*sys.modules}; import chronos; assert chronos.__version__;"
            " print(*sorted(name.split('.')[0] for name in {*sys.modules} - before))",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert set(loaded) - sys.stdlib_module_names == {"chronos"}


def test_exactly_the_public_names_exist() -> None:
    for name in chronos.__all__:
        assert getattr(chronos, name).__module__.startswith("chronos.")
        assert name in dir(chronos)
    with pytest.raises(AttributeError, match="Migrate"):
        chronos.Migrate  # type: ignore[attr-defined]  # noqa: B018


def test_the_api_page_matches_the_docstrings() -> None:
    assert make_api.PAGE.read_text("utf-8") == make_api.page(), "run: make docs"


# Migrate and roll back


def test_in_a_thread_it_migrates_silently_and_leaves_signals_alone(
    url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    before = relations(url)
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(migrate, "webhook_log", url=url).result()
        assert (done.phase, done.strategy) == (Phase.MIGRATED, Strategy.COPY)
        assert done.table.typed == "public.webhook_log"
        assert done.former == "public.webhook_log_old"
        assert done.rows_copied == ROWS == sum(result.new_rows for result in done.periods.values())
        assert all(result.alike for result in done.periods.values())
        assert len(done.steps) == 6
        assert 0 < sum(seconds for _, seconds in done.steps) <= done.seconds
        assert done.swap_seconds is not None
        assert done.swap_seconds <= done.longest_lock_seconds
        assert done.wal_bytes
        assert done.report is None
        assert done.listed
        assert kind(url) == "p"
        query(url, "INSERT INTO webhook_log (status, timestamp) SELECT 'x', now() FROM generate_series(1, 3)")
        back = thread.submit(rollback, "webhook_log", url=url).result()
    assert (back.rows_carried, back.by_hand) == (3, False)
    assert back.seconds > 0
    assert kind(url) == "r"
    assert relations(url) == before
    assert value(url, "SELECT count(*) FROM webhook_log") == ROWS + 3
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    assert capfd.readouterr() == ("", "")


def test_a_held_migration_is_ready_and_resume_finishes_it_with_its_options(url: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    held = migrate(url=url, hold=True, batch_size=100, workers=1, verify="counts", report=report)
    assert (held.phase, held.former, held.swap_seconds) == (Phase.READY, None, None)
    assert held.report == report
    assert json.loads(report.read_text("utf-8"))["outcome"] == "held"
    assert {result.alike for result in held.periods.values()} == {None}
    shown: list[str] = []

    def agree(text: str) -> bool:
        shown.append(text)
        return True

    done = migrate(url=make_url(url), resume=True, confirm=agree)
    assert "Options: --batch-size 100 --verify counts --report" in shown[0]
    assert (done.phase, done.rows_copied) == (Phase.MIGRATED, ROWS)
    assert json.loads(report.read_text("utf-8"))["outcome"] == "complete"
    assert query(url, "SELECT options FROM webhook_log_migration") == [
        ({"batch_size": 100, "workers": 1, "content": False, "report": str(report)},)
    ]
    ended = finalize(url=url)
    assert ended.dropped == "public.webhook_log_old"
    assert not exists(url, "webhook_log_old")


def test_attach_copies_nothing_and_drops_nothing(url: str) -> None:
    done = migrate(url=url, strategy="attach")
    assert (done.strategy, done.phase, done.rows_copied) == (Strategy.ATTACH, Phase.MIGRATED, None)
    assert done.former == "public.webhook_log_history"
    assert finalize(url=url).dropped is None
    assert exists(url, "webhook_log_history")


def test_a_table_that_no_file_lists_is_described_by_arguments(database: str) -> None:
    query(
        database,
        "CREATE SCHEMA audit; CREATE TABLE audit.event (id bigserial PRIMARY KEY, at timestamptz NOT NULL);"
        " CREATE INDEX ON audit.event (at);"
        " INSERT INTO audit.event (at) SELECT now() - n * interval '1 hour' FROM generate_series(1, 400) n",
    )
    with pytest.raises(RefusedError, match="--column is missing"):
        migrate("audit.event", url=database)
    done = migrate("audit.event", url=database, column="at", every="week", ahead_days=10)
    assert (done.listed, done.rows_copied, done.table.every.value) == (False, 400, "week")
    found = status("audit.event", url=database)
    assert (found.state, found.listed, found.missing) == ("migrated", False, [])


def test_a_stopped_migration_is_half_done_and_can_be_resumed(url: str) -> None:
    gate_in_the_copy(url, days=2)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as thread, closed_gate(url) as opens:
        running = thread.submit(migrate, url=url, workers=1, batch_size=50, stop=stop)
        pid_at_the_gate(url)
        stop.set()
        opens()
        with pytest.raises(
            InterruptedRunError, match="stopped as asked in step 3; nothing is lost"
        ) as stopped:
            running.result()
    assert stopped.value.exit_code is ExitCode.INTERRUPTED
    assert kind(url) == "r"
    assert status(url=url).state == "migrating"
    assert migrate(url=url, resume=True).rows_copied == ROWS


_PROGRAM = """
import sys
import chronos

try:
    chronos.migrate(url=sys.argv[1], workers=2, batch_size=50)
except chronos.InterruptedRunError as error:
    sys.exit(f"stopped: {error}")
"""


def test_ctrl_c_in_a_program_that_does_not_handle_it_ends_every_worker(url: str) -> None:
    gate_in_the_copy(url, days=1)
    command = [sys.executable, "-c", _PROGRAM, url]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program,
        closed_gate(url) as opens,
    ):
        pid_at_the_gate(url)
        program.send_signal(signal.SIGINT)
        opens()
        _, said = program.communicate(timeout=60)
    assert program.returncode == 1
    assert said.startswith("stopped: stopped as asked in step 3; nothing is lost")
    [[phase, compared]] = query(url, "SELECT phase, compared FROM webhook_log_migration")
    assert phase == "copying"
    assert len(compared) < 6, "the oldest days are left"
    assert rollback(url=url).rows_carried == 0
    assert value(url, "SELECT count(*) FROM webhook_log") == ROWS


# Callbacks that are told, or asked


def test_each_line_is_passed_to_the_callback(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the environment asks for colours: a callback is not a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    lines: list[str] = []
    migrate(url=url, output=lines.append)
    assert "[Step 3/6] Migrating data from last 15 days..." in lines
    assert f"Migrated {ROWS:,} / {ROWS:,} rows (100.0%)" in lines
    assert "MIGRATION COMPLETED SUCCESSFULLY!" in lines
    assert not [line for line in lines if "\n" in line or "\x1b" in line]


def test_a_failing_callback_does_not_end_the_migration(url: str, caplog: pytest.LogCaptureFixture) -> None:
    lines: list[str] = []

    def listen(line: str) -> None:
        lines.append(line)
        if "Step 3" in line:
            raise ZeroDivisionError(line)

    assert migrate(url=url, output=listen).phase is Phase.MIGRATED
    assert "Step 3" in lines[-1]
    assert [record.levelno for record in caplog.records if record.name == "chronos.api"] == [logging.ERROR]


@pytest.mark.parametrize("answer", [False, None])
def test_nothing_changes_unless_it_is_confirmed(url: str, answer: Any) -> None:
    before, shown = relations(url), []

    def confirm(text: str) -> bool:
        shown.append(text)
        return answer  # type: ignore[no-any-return]

    with pytest.raises(RefusedError, match="not confirmed; nothing was changed"):
        migrate(url=url, confirm=confirm)
    assert f"Database: {make_url(url).database}" in shown[0]
    assert "The rows since" in shown[0]
    assert relations(url) == before


# Refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size must be from 1 to 1,000,000, not 0"),
        ({"workers": 17}, "workers must be from 1 to 16, not 17"),
        ({"rate_limit": 0}, "rate_limit must be at least 1, not 0"),
        ({"max_replica_lag": -1}, "max_replica_lag must be at least 0, not -1"),
        ({"max_lock_wait": 0.01}, "max_lock_wait must be from 0.05 to 60, not 0.01"),
        ({"max_lock_wait": float("nan")}, "max_lock_wait must be from 0.05 to 60, not nan"),
        ({"strategy": "move"}, "strategy must be copy or attach, not 'move'"),
        ({"verify": "some"}, "verify must be full or counts, not 'some'"),
        ({"every": "year"}, "every must be hour or day or week or month, not 'year'"),
        ({"retention_days": -1}, "retention_days must be from 0 to 36,500, not -1"),
        ({"retention_days": 3}, "--retention-days 3 contradicts the environment"),
        ({"report": "report.txt"}, "does not end in .json or .html"),
        ({"resume": True}, "there is nothing to resume"),
        ({"table": "nothing"}, "there is no table nothing"),
        ({"url": "mysql://host/db"}, "url must start with postgresql://"),
    ],
)
def test_an_impossible_request_is_refused_and_changes_nothing(
    url: str, options: dict[str, Any], says: str
) -> None:
    before = relations(url)
    with pytest.raises(RefusedError) as refused:
        migrate(**{"url": url, **options})
    assert says in str(refused.value)
    assert "nothing was changed" in str(refused.value)
    assert relations(url) == before


def test_a_blocker_is_a_refusal(url: str) -> None:
    query(url, "CREATE TABLE child (log bigint REFERENCES webhook_log)")
    with pytest.raises(RefusedError, match=r"\[inbound-fk\]"):
        migrate(url=url)
    for undone in (rollback, finalize):
        with pytest.raises(RefusedError, match="there is no migration of webhook_log"):
            undone(url=url)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (migrate, ChronosError),
        (rollback, ChronosError),
        (status, CannotTellError),
        (overview, CannotTellError),
    ],
)
def test_an_unreachable_server_raises_our_error_without_the_password(
    call: Callable[..., object], error: type[ChronosError]
) -> None:
    with pytest.raises(ChronosError, match="Check the server and the database URL") as raised:
        call(url="postgresql://somebody:s3cret-w0rd@127.0.0.1:1/none")
    assert type(raised.value) is error
    assert "s3cret" not in f"{raised.value!r} {raised.value.__cause__!r}"


# Status and upkeep


def test_status_and_overview_are_values(url: str) -> None:
    before = status(url=url)
    assert isinstance(before, Status)
    assert (before.state, before.healthy, before.runway_days) == ("plain", False, 0)
    migrate(url=url, hold=True)
    found = overview(url=url)
    [one] = found.tables
    assert isinstance(one, Status)
    assert (one.state, one.notes_waiting, found.others) == ("ready", 0, ())
    assert found.as_json()["state"] == "ready"
    rollback(url=url)
    query(url, "ALTER TABLE webhook_log RENAME TO elsewhere")
    [unknown] = overview(url=url).tables
    assert "there is no table webhook_log" in unknown.problems[0]
    assert overview(url=url).exit_code is ExitCode.REFUSED
    assert finalize.__doc__


def test_upkeep_returns_the_outcome_of_each_job(url: str) -> None:
    skipped = upkeep(url=url, retry_for=0)
    assert [job.status for job in skipped.jobs] == ["skipped", "skipped"]
    assert skipped.ok
    migrate(url=url)
    query(url, f"DROP TABLE {status(url=url).partitions[-1].name}")
    create, drop = upkeep(url=url, retry_for=0).jobs
    assert (create.status, len(create.names), create.left, create.error) == ("done", 1, (), None)
    assert (drop.status, drop.names) == ("done", ())
    assert list(create.reports) == ["webhook_log"]
    query(
        url,
        "CREATE OR REPLACE FUNCTION drop_old_webhook_log_partitions(retention_days integer)"
        " RETURNS SETOF text LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''broken''; END'",
    )
    failed = upkeep(url=url, retry_for=0)
    assert failed.exit_code is ExitCode.FAILED
    assert "broken" in str(failed.jobs[1].error)
