"""The demo, from its first line until its server is gone; its sample rows and its writer."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta

import psutil
import pytest
from rich.console import Console
from sqlalchemy.engine import Engine, make_url

from chronos.cli import main
from chronos.db import connect_engine
from chronos.demo import binaries, run
from chronos.demo.rows import KeyType, TimestampType, create_webhook_log
from chronos.demo.writer import APPLICATION_NAME, LiveWriter, Presence
from chronos.migration.console import Output
from chronos.sql_models import WebhookLog
from tests.conftest import MakeDatabase, OwnPostgres
from tests.screen import lines_on_the_screen
from tests.tables import digest, query, value
from tests.waiting import wait_until

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
ALL_WELL = Presence(lost=[], twice=[], repeated_ids=[])
TIMEOUT = 60.0
STOPPED = "Error: the demo was stopped; its server is gone, and everything in it"


def engine(url: str) -> Engine:
    return connect_engine(make_url(url))


@pytest.fixture
def table(database: str) -> str:
    """The URL of a database with a small webhook_log in it."""
    create_webhook_log(engine(database), 100)
    return database


# The sample rows


@pytest.mark.parametrize(
    ("timestamp_type", "key_type"),
    [("timestamptz", "serial"), ("timestamp", "identity by default"), ("timestamp", "identity always")],
)
def test_the_table_looks_like_that_of_an_application(
    make_database: MakeDatabase, timestamp_type: TimestampType, key_type: KeyType
) -> None:
    url = make_database(timezone="Asia/Kolkata")
    told: list[int] = []
    create_webhook_log(
        engine(url),
        6_000,
        days=20,
        now=NOW,
        timestamp_type=timestamp_type,
        key_type=key_type,
        on_progress=told.append,
    )
    columns = query(
        url, "SELECT attname FROM pg_attribute WHERE attrelid = 'webhook_log'::regclass AND attnum > 0"
    )
    assert {name for (name,) in columns} == set(WebhookLog.model_fields)
    indexes = query(
        url, "SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = 'webhook_log'::regclass"
    )
    assert {definition.split("USING ")[1] for (definition,) in indexes} == {
        "btree (id)",
        'btree ("timestamp")',
        "btree (webhook_endpoint_id)",
    }
    constraints = query(
        url, "SELECT contype FROM pg_constraint WHERE conrelid = 'webhook_log'::regclass AND contype <> 'n'"
    )
    assert sorted(kind for (kind,) in constraints) == ["f", "p"]
    assert told == [5_000, 6_000]

    [(rows, first, last, oldest, newest)] = query(
        url,
        "SELECT count(*), min(id), max(id), to_timestamp(extract(epoch FROM min(timestamp))),"
        " to_timestamp(extract(epoch FROM max(timestamp))) FROM webhook_log",
    )
    assert (rows, first, last) == (6_000, 1, 6_000)
    assert NOW - timedelta(days=20, minutes=1) <= oldest < newest <= NOW
    assert value(url, "SELECT count(DISTINCT timestamp::date) FROM webhook_log") in (20, 21)
    assert 1_000 < value(url, "SELECT pg_relation_size('webhook_log')") / rows < 1_300
    assert (
        value(url, "INSERT INTO webhook_log (status, timestamp) VALUES ('success', now()) RETURNING id")
        == 6_001
    )


def test_the_same_seed_gives_the_same_rows(make_database: MakeDatabase) -> None:
    hashes = []
    kinds: list[tuple[int, TimestampType]] = [(1, "timestamptz"), (1, "timestamp"), (2, "timestamptz")]
    for seed, timestamp_type in kinds:
        url = make_database()
        create_webhook_log(engine(url), 300, now=NOW, timestamp_type=timestamp_type, seed=seed)
        hashes.append(digest(url))
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]


def test_a_table_can_have_no_rows(database: str) -> None:
    create_webhook_log(engine(database), 0)
    assert digest(database) == (0, 0, 0)
    with LiveWriter(database, threads=1) as writer:
        writer.catch_up()
    assert writer.commits[0].id == 1


# The writer


def test_the_writer_remembers_every_row(table: str) -> None:
    with LiveWriter(table, threads=2, past_share=0.5, past_days=3) as writer:
        wait_until(lambda: len(writer.commits) >= 100, TIMEOUT, "the writer has written 100 rows")
    assert value(table, "SELECT count(*) FROM webhook_log") == 100 + len(writer.commits)
    ages = [datetime.now(UTC) - commit.timestamp for commit in writer.commits]
    assert any(age > timedelta(days=1) for age in ages)
    assert any(age < timedelta(days=1) for age in ages)
    assert max(ages) < timedelta(days=3, minutes=5)
    assert writer.longest_wait() == max(commit.seconds for commit in writer.commits) > 0
    assert writer.longest_wait(len(writer.commits)) == 0
    with engine(table).connect() as conn:
        assert writer.check(conn) == ALL_WELL


def test_the_check_finds_lost_and_duplicated_rows(table: str) -> None:
    with LiveWriter(table, threads=1) as writer:
        wait_until(lambda: len(writer.commits) >= 3, TIMEOUT, "the writer has written 3 rows")
    lost, twice, repeated = writer.commits[:3]
    query(table, "DELETE FROM webhook_log WHERE id = %s", lost.id)
    query(
        table,
        "INSERT INTO webhook_log (request_headers, status, timestamp)"
        " SELECT request_headers, status, timestamp FROM webhook_log WHERE id = %s",
        twice.id,
    )
    query(table, "ALTER TABLE webhook_log DROP CONSTRAINT webhook_log_pkey")
    query(
        table,
        "INSERT INTO webhook_log (id, status, timestamp) VALUES (%s, 'success', now())",
        repeated.id,
    )
    with engine(table).connect() as conn:
        assert writer.check(conn) == Presence([lost], [twice.marker], [repeated.id])


def test_a_slow_writer_stops_at_once(table: str) -> None:
    with LiveWriter(table, threads=1, rate=0.001) as writer:
        wait_until(lambda: writer.commits, TIMEOUT, "the writer has written its first row")
    assert len(writer.commits) == 1


def test_a_rejected_insert_is_an_error(table: str) -> None:
    with LiveWriter(table, threads=2) as writer:
        query(table, "ALTER TABLE webhook_log RENAME TO elsewhere")
        wait_until(lambda: len(writer.errors) >= 10, TIMEOUT, "inserts fail")
        query(table, "ALTER TABLE elsewhere RENAME TO webhook_log")
        writer.catch_up()
        errors = len(writer.errors)
        writer.catch_up()
        assert len(writer.errors) == errors
    assert {error.sqlstate for error in writer.errors} == {"42P01"}
    assert 'relation "public.webhook_log" does not exist' in writer.errors[0].message
    with engine(table).connect() as conn:
        assert writer.check(conn) == ALL_WELL


def cut_connections(url: str) -> None:
    query(
        url,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"
        " AND datname = current_database()",
        APPLICATION_NAME,
    )


def test_a_lost_connection_is_an_error(table: str) -> None:
    with LiveWriter(table, threads=2) as writer:
        writer.catch_up()
        cut_connections(table)
        wait_until(lambda: len(writer.errors) == 2, TIMEOUT, "both connections are cut")
        writer.catch_up()
    assert {error.sqlstate for error in writer.errors} <= {"57P01", None}
    assert not writer.in_doubt
    assert not writer.cut_off


def test_the_writer_outlives_its_server(own_postgres: OwnPostgres) -> None:
    server = own_postgres()
    create_webhook_log(engine(server.url), 100)
    with LiveWriter(server.url, threads=2, reconnect=True) as writer:
        writer.catch_up()
        server.stop("immediate")
        written = len(writer.commits)
        server.start()
        wait_until(lambda: len(writer.commits) >= written + 10, TIMEOUT, "it writes again")
    assert writer.errors == []
    assert len(writer.in_doubt) + len(writer.cut_off) == 2
    with engine(server.url).connect() as conn:
        assert writer.check(conn) == ALL_WELL


def test_an_unanswered_commit_is_in_doubt(table: str) -> None:
    query(
        table,
        "CREATE FUNCTION cut() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END';"
        " CREATE CONSTRAINT TRIGGER cut AFTER INSERT ON webhook_log"
        " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION cut()",
    )
    with LiveWriter(table, threads=2, reconnect=True) as writer:
        wait_until(lambda: len(writer.in_doubt) >= 4, TIMEOUT, "COMMIT is cut off")
    assert [*writer.commits, *writer.errors, *writer.cut_off] == []
    assert value(table, "SELECT count(*) FROM webhook_log WHERE id > 100") == 0
    with engine(table).connect() as conn:
        assert writer.check(conn) == ALL_WELL


# The demo


def run_in_a_pipe(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the verb in this process: its exit code, its stdout, its stderr."""
    with pytest.raises(SystemExit) as end:
        main(["demo", *arguments])
    printed, complaints = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, printed, complaints


def test_the_whole_demo_runs_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    others = descendants(os.getpid())
    code, printed, complaints = run_in_a_pipe(capsys, "--rows", "3000", "--keep")
    lines = printed.splitlines()
    servers = [process for process in descendants(os.getpid()) if process not in others]
    try:
        assert (code, complaints) == (0, "")
        for line in (
            r"✓ webhook_log is a plain table with 3,000 deliveries of the last 20 days",
            r"Created partition: webhook_log_y\d{4}m\d\dd\d\d \(.*\)",
            r"MIGRATION COMPLETED SUCCESSFULLY!",
            r"2,\d\d\d rows copied; .*",
            r"What the application noticed in these [\d.]+ s:",
            r"  Rows written +[\d,]+, [\d,]+ a second",
            r"  Errors +0",
            r"  Rows lost, duplicated +0, 0",
            r"  Reads that missed rows +0 of [1-9][\d,]*",
            r"  Longest wait of a writer +[\d.]+ m?s, median [\d.]+ m?s",
            r"\d\d-\d\d +[\d,]+ █+ +\d\d-\d\d +[\d,]+ █+",
            r"SELECT create_future_webhook_log_partitions\(60\);",
            r"✓ 30 partitions created in [\d.]+ m?s; longest wait of a writer [\d.]+ ms",
            r"SELECT drop_old_webhook_log_partitions\(10\);",
            r"✓ 5 partitions with [\d,]+ rows, \d+ MB, dropped in [\d.]+ m?s;",
            r"✓ All [\d,]+ rows that the application wrote are there, each exactly once",
        ):
            assert any(re.fullmatch(line, found) for found in lines), line
        assert "Type MIGRATE" not in printed
        assert [line for line in lines if len(line) > 80 and "DATABASE_URL" not in line] == []

        [url] = re.findall("^export DATABASE_URL=(.*)$", printed, re.MULTILINE)
        assert value(url, "SELECT count(*) FROM webhook_log_old") >= 3_000
        [python] = set(re.findall("^([^ ]*) -m chronos ", printed, re.MULTILINE))
        assert os.path.samefile(python, sys.executable)
    finally:
        subprocess.run(lines[-1], shell=True, check=True)
    wait_for_the_end_of(servers)


@contextmanager
def terminal(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The demo on an 80-column terminal: its process, and the file to read from and type into."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "chronos", "demo", "--rows", "2000", *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", **environment},
    ) as process:
        os.close(slave)
        try:
            yield process, master
        finally:
            process.kill()
            os.close(master)


def read(master: int, until: str | None = None) -> str:
    """What the terminal shows, until this text appears or the program ends."""
    shown = b""
    while until is None or until.encode() not in shown:
        try:
            shown += os.read(master, 65_536)
        except OSError:  # Linux's way to say that no process has the terminal open any more
            break
    return shown.decode().replace("\r\n", "\n")


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def is_over(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for_the_end_of(servers: list[psutil.Process]) -> None:
    assert servers
    wait_until(lambda: all(map(is_over, servers)), TIMEOUT, "no process is left")


def test_without_the_word_the_demo_leaves_nothing() -> None:
    with terminal("--keep", NO_COLOR="1") as (process, master):
        shown = read(master, until="Type MIGRATE to continue: ")
        servers = descendants(process.pid)
        os.write(master, b"migrate\n")
        shown += read(master)
        assert process.wait(TIMEOUT) == 2
    assert "Error: MIGRATE was not typed; nothing was changed" in shown
    assert "\x1b[3" not in shown
    wait_for_the_end_of(servers)


@pytest.mark.parametrize("strategy", ["copy", "attach"])
def test_the_demo_fits_on_two_screens_of_forty_lines(strategy: str) -> None:
    with terminal("--strategy", strategy, NO_COLOR="1") as (process, master):
        shown = read(master, until="Type MIGRATE to continue: ")
        os.write(master, b"MIGRATE\n")
        shown += read(master)
        assert process.wait(TIMEOUT) == 0, shown
    lines = lines_on_the_screen(shown)
    assert len(lines) <= 80
    assert [line for line in lines if len(line) > 80] == []
    for title in [f"[Step {number}/6]" for number in range(1, 7)]:
        assert any(line.startswith(title) for line in lines), title
    assert any(re.fullmatch(r"  Reads that missed rows +0 of [1-9]\d*", line) for line in lines)
    history = "webhook_log_history, all rows before "
    assert any(line.startswith(history) for line in lines) == (strategy == "attach")


def test_ctrl_c_during_the_migration_leaves_nothing() -> None:
    with terminal("--keep") as (process, master):
        read(master, until="Type MIGRATE to continue: ")
        servers = descendants(process.pid)
        os.write(master, b"MIGRATE\n")
        read(master, until="Total rows to migrate")
        process.send_signal(signal.SIGINT)
        assert STOPPED in read(master)
        assert process.wait(TIMEOUT) == 3
    wait_for_the_end_of(servers)


@pytest.mark.parametrize("moment", ["Starting PostgreSQL", "listens on port"])
def test_ctrl_c_before_the_migration_leaves_nothing(moment: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "chronos", "demo"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        next(line for line in process.stdout if moment in line)
        servers = wait_until(lambda: descendants(process.pid), TIMEOUT, "there is something to leave behind")
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=TIMEOUT)
        assert (process.returncode, complaints) == (3, f"{STOPPED}\n")
    wait_for_the_end_of(servers)


def test_a_terminal_without_block_characters_gets_ascii_bars() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    day = date(2026, 7, 1)
    run._chart([(day, 1_000), (day, 500)], Output(Console(file=file)))
    file.seek(0)
    assert file.read() == f"07-01     1,000 {'#' * 22}  07-01       500 {'#' * 11}\n"


def test_without_the_wheels_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PG_BIN", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(binaries, "_POSTGRES_WHEELS", ())
    monkeypatch.setattr(binaries, "_POSTGRES_FOLDERS", ())
    code, _, complaints = run_in_a_pipe(capsys)
    assert code == 2
    [complaint] = complaints.splitlines()
    assert "`make setup`" in complaint
    assert "`pip install -r requirements-dev.txt`" in complaint
