"""What a stopped run leaves to the next: its options, and a prompt that says what will be resumed."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from tests.command import chronos, chronos_environment
from tests.screen import lines_on_the_screen
from tests.tables import closed_gate, gate_in_the_copy, holding, pid_at_the_gate, query, value
from tests.test_migration import fill, state, stopped_in_the_copy


def test_resume_keeps_the_options_unless_overridden_and_names_them_in_its_prompt(
    database: str, tmp_path: Path
) -> None:
    fill(database)
    path = tmp_path / "ticket.json"
    given = ("--rate-limit", "90000", "--verify", "counts", "--max-lock-wait", "0.7", "--report", str(path))
    assert chronos(database, "migrate", "--yes", "--hold", *given).returncode == 0
    assert json.loads(path.read_text())["outcome"] == "held"

    asked = chronos(database, "migrate", "--resume", answer="no\n")

    assert asked.returncode == 2
    url = make_url(database)
    for fact in (
        f"Host: {url.host}   Port: {url.port}   Database: {url.database}",
        f"User: {url.username}   TESTING: false",
        "Table: public.webhook_log   Rows (estimate): ",
        "   Size: ",
        f"Options: --verify counts --max-lock-wait 0.7 --rate-limit 90000 --report {path}",
        "Writers wait for a lock at most 0.7 s at a time",
        "Type MIGRATE to continue",
    ):
        assert " ".join(fact.split()) in " ".join(asked.stdout.split()), fact

    path.unlink()
    result = chronos(database, "migrate", "--yes", "--resume", "--rate-limit", "80000")

    assert result.returncode == 0, result.stderr
    report = json.loads(path.read_text())
    assert report["outcome"] == "complete"
    assert report["options"] == (f"--verify counts --max-lock-wait 0.7 --rate-limit 80000 --report {path}")
    assert value(database, "SELECT options ->> 'rate_limit' FROM webhook_log_migration") == "80000"


def test_resume_refuses_when_the_first_runs_report_can_no_longer_be_written(
    database: str, tmp_path: Path
) -> None:
    fill(database, 100)
    folder = tmp_path / "tickets"
    folder.mkdir()
    path = folder / "ticket.html"
    assert chronos(database, "migrate", "--yes", "--hold", "--report", str(path)).returncode == 0
    path.unlink()
    folder.rmdir()

    refused = chronos(database, "migrate", "--yes", "--resume")

    assert refused.returncode == 2
    assert "nothing was changed. Name a writable file with --report" in refused.stderr
    assert state(database) == ("ready", False)
    other = chronos(database, "migrate", "--yes", "--resume", "--report", str(tmp_path / "other.html"))
    assert other.returncode == 0, other.stderr


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_termination_signal_stops_the_copy_and_says_how_to_resume(
    database: str, number: signal.Signals
) -> None:
    fill(database)
    with stopped_in_the_copy(database) as migration:
        migration.process.send_signal(number)
        migration.release()
        output, errors = migration.process.communicate(timeout=60)
    assert migration.process.returncode == 3, output + errors
    assert "nothing is lost" in errors
    assert "--resume" in errors
    assert state(database) == ("copying", False)


def test_a_column_that_is_added_while_rows_are_copied_undoes_the_migration_and_is_named(
    database: str,
) -> None:
    fill(database)
    with stopped_in_the_copy(database) as migration:
        migration.process.send_signal(signal.SIGINT)
        migration.release()
        migration.process.communicate(timeout=60)
    query(database, "ALTER TABLE webhook_log ADD COLUMN note text")
    result = chronos(database, "migrate", "--yes", "--resume")
    assert result.returncode == 1, result.stdout
    assert (
        "webhook_log is the plain table it was before, with every row. Somebody changed its columns"
        in result.stderr
    )
    assert result.stderr.rstrip().endswith("[table-changed]")
    assert state(database) is None
    assert value(database, "SELECT count(note) FROM webhook_log") == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_termination_signal_at_the_prompt_changes_nothing(database: str, number: signal.Signals) -> None:
    fill(database, 10)
    with on_a_terminal(database, "migrate") as (process, master):
        shown = read_until(master, "Type MIGRATE")
        process.send_signal(number)
        shown += read_to_the_end(master)
        assert process.wait(60) == 2
    assert "MIGRATE was not typed; nothing was changed" in shown
    assert state(database) is None


def test_an_ignored_hangup_stops_nothing(database: str) -> None:
    """As with nohup."""
    fill(database)
    gate_in_the_copy(database)
    command = """trap '' HUP; exec "$0" -u -m chronos migrate --yes --workers 1 --batch-size 50"""
    with (
        closed_gate(database) as release,
        subprocess.Popen(
            ["sh", "-c", command, sys.executable],
            env=chronos_environment(database),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        pid_at_the_gate(database)
        process.send_signal(signal.SIGHUP)
        release()
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, output + errors


class on_a_terminal:  # noqa: N801
    """chronos on an 80-column terminal: its process, and the file to read from."""

    def __init__(self, url: str, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "chronos", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**chronos_environment(url), "TERM": "xterm", "COLUMNS": "80"},
        )
        os.close(slave)

    def __enter__(self) -> tuple[subprocess.Popen[bytes], int]:
        return self.process, self.master

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def read_until(master: int, text: str) -> str:
    shown = b""
    while text.encode() not in shown:
        shown += os.read(master, 65_536)
    return shown.decode()


def read_to_the_end(master: int) -> str:
    shown = b""
    while True:
        try:
            shown += os.read(master, 65_536)
        except OSError:  # Linux's way to say that no process has the terminal open any more
            return shown.decode()


def test_on_a_terminal_a_wait_for_a_lock_leaves_one_line(database: str) -> None:
    fill(database, 200)
    with (
        holding(database, "SELECT FROM webhook_log LIMIT 1") as reader,
        on_a_terminal(database, "migrate", "--yes") as (process, master),
    ):
        pid = reader.get_backend_pid()
        remedy = f"SELECT pg_terminate_backend({pid});"
        shown = ""
        while shown.count(remedy) < 3:
            shown += read_until(master, remedy)
        reader.rollback()
        shown += read_to_the_end(master)
        assert process.wait(60) == 0
    ended = lines_on_the_screen(shown)
    about_it = [line for line in ended if f"pid {pid}" in line]
    assert len(about_it) == 1
    assert re.match(r"  waited \d+:\d\d for pid \d+", about_it[0])
    assert "Created 46 partitions, one per day: " in shown
    assert len(ended) <= 60


def test_status_says_since_when_and_by_whom_a_copy_runs_and_that_readers_see_every_row(database: str) -> None:
    fill(database)
    with stopped_in_the_copy(database) as migration:
        running = chronos(database, "status").stdout
        user = value(database, "SELECT current_user")
        migration.process.send_signal(signal.SIGTERM)
        migration.release()
        migration.process.communicate(timeout=60)
    begun = value(
        database,
        "SELECT to_char((plan ->> 'started_at')::timestamptz AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI')"
        " FROM webhook_log_migration",
    )
    assert f"migration   started {begun} UTC; readers see every row all the time" in running.splitlines()
    assert re.search(
        rf"^operator    pid \d+, user {user}, from \S+ since {begun[:10]} .* UTC$", running, re.M
    )
    assert "operator    none: it was cut off" in chronos(database, "status").stdout.splitlines()
