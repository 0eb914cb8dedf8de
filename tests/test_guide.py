"""The guide is true: its SQL and its commands are run in order, its messages held against the code.

A `text` block is what the block before it printed, or, where nothing was run, a message that an operator
can meet. Dates, numbers and sizes may differ, `...` stands for anything.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import click
import psycopg2
import pytest
import redis
from pydantic import SecretStr
from sqlalchemy import create_engine
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.pool import NullPool
from sqlmodel import Session

from chronos.cli import cli
from chronos.db import connect_engine, execute, opened
from chronos.demo.embedded import create_database
from chronos.demo.rows import create_webhook_log
from chronos.errors import LockUnavailableError
from chronos.jobs import JOBS, Message, attempt
from chronos.locks import Locks, Patience, lock_table
from chronos.migration.checks import CHECKS
from chronos.settings import Settings, get_settings
from chronos.sql_models import WebhookLog
from tests.command import started
from tests.tables import holding, query, value
from tests.waiting import wait_until

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "PARTITION_MIGRATION_GUIDE.md"
README = ROOT / "README.md"
DOCUMENTS = [
    GUIDE,
    README,
    *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY", "docs/ARCHITECTURE")),
]
ROWS = 1_200

# Lines of a bash block that no test can run, and why. Everything else is run.
NOT_RUN = {
    "source .venv/bin/activate": "the tests run in the environment that it makes",
    "git pull origin master": "it needs the operator's repository",
    "git revert your-commit-hash": "it needs the operator's repository",
    "pip install -r requirements.txt": "it goes to the package index",
    "make restart-server": "it runs the operator's own command",
    "make restart-worker": "it runs the operator's own command",
    "tail -n 100 /var/log/chronos/worker.log | grep partition": "it reads the operator's log file",
}

# What an operator has before the first section, and the sections that are gone through from there, in order.
WALKS: list[tuple[str, list[str]]] = [
    (
        "plain",
        [
            "Pre-Migration Checklist",
            "1. Test in Development/Staging First",
            "3. Backup Production Database",
            "5. Make a dry run on production",
            "6. Last look",
        ],
    ),
    ("plain", ["Copy by day, swap at night"]),
    ("plain", ["Without copying: --strategy attach"]),
    (
        "plain",
        [
            "Step 2: Deploy Code Changes",
            "Step 3: Run Migration Script",
            "Step 4: Monitor Migration Progress",
            "Step 5: Verify Migration Success",
            "Step 6: Monitor for 24 Hours",
            "Step 7: Cleanup (After 7+ Days of Stability)",
        ],
    ),
    ("migrated", ["Cleanup by hand"]),
    ("half done", ["It was stopped or cut off"]),
    ("migrated", ["With the command"]),
    ("migrated", ["Manual Rollback (If Needed)"]),
    ("migrated", ["Manual rollback with the rows inserted since", "After a manual rollback"]),
    ("migrated", ["Rollback Code Changes"]),
    (
        "migrated",
        [
            "Troubleshooting",
            "New Jobs Failing",
            "Application Errors",
            "Monitoring Commands",
            "Check Partition Count",
            "View Partition Sizes",
            "Check Oldest and Newest Partitions",
            "Verify Data Distribution",
            "Monitor Job Execution",
            "How do I manually create/drop partitions?",
        ],
    ),
    ("foreign old table", ["Refused before anything was changed"]),
]

# What people look for by the name that it has always had.
HEADINGS = """
# PostgreSQL Partitioning Migration Guide
## Overview
## Pre-Migration Checklist
### 1. Test in Development/Staging First
### 2. Verify Application Compatibility
### 3. Backup Production Database
### 4. Review Changes
## Migration Procedure
### Step 1: Choose Migration Window
### Step 2: Deploy Code Changes
### Step 3: Run Migration Script
### Step 4: Monitor Migration Progress
### Step 5: Verify Migration Success
### Step 6: Monitor for 24 Hours
### Step 7: Cleanup (After 7+ Days of Stability)
## Rollback Procedure
### If Migration Fails During Execution
### Manual Rollback (If Needed)
### Rollback Code Changes
## Post-Migration Benefits
### Performance Improvements
### Operational Benefits
### Expected Metrics
## Troubleshooting
### Migration Script Fails
### New Jobs Failing
### Application Errors
## Monitoring Commands
### Check Partition Count
### View Partition Sizes
### Check Oldest and Newest Partitions
### Verify Data Distribution
### Monitor Job Execution
## FAQs
## Support
## Summary
"""

# Before each of these the application writes a row; after it this must hold, and the next row find its id.
SINCE_THE_SWAP = (
    "WITH late AS (INSERT INTO webhook_log (status, timestamp) VALUES ('late', now() - interval '3 days'))"
    " INSERT INTO webhook_log (status, timestamp) VALUES ('since the swap', now()) RETURNING id"
)
_CAME_ALONG = "SELECT count(*) = 1 FROM webhook_log WHERE status = 'since the swap'"
_CAME_ALONG_LATE = "SELECT count(*) = 1 FROM webhook_log WHERE status = 'late'"
_GONE = "SELECT to_regclass('webhook_log_old') IS NULL"
PROMISES = {
    "Copy by day, swap at night": (_CAME_ALONG,),
    "Without copying: --strategy attach": (
        _CAME_ALONG,
        "SELECT relkind = 'r' AND to_regclass('webhook_log_history') IS NULL FROM pg_class"
        " WHERE oid = 'webhook_log'::regclass",
        "SELECT pg_get_serial_sequence('webhook_log', 'id') = 'public.webhook_log_id_seq'",
    ),
    "Step 7: Cleanup (After 7+ Days of Stability)": (_CAME_ALONG, _GONE),
    "Cleanup by hand": (_CAME_ALONG, _GONE),
    "It was stopped or cut off": (_CAME_ALONG,),
    "With the command": (_CAME_ALONG, _GONE),
    "Manual Rollback (If Needed)": (
        "SELECT count(*) = 0 FROM webhook_log WHERE status = 'since the swap'",
        _GONE,
    ),
    "Manual rollback with the rows inserted since": (_CAME_ALONG, _CAME_ALONG_LATE, _GONE),
    "After a manual rollback": (
        "SELECT count(*) = 1 FROM pg_constraint WHERE conrelid = 'webhook_log'::regclass AND contype = 'f'"
        " AND convalidated",
        "SELECT pg_get_serial_sequence('webhook_log', 'id') = 'public.webhook_log_id_seq'",
        "SELECT to_regclass('webhook_log_pkey') IS NOT NULL AND to_regclass('webhook_log_migration') IS NULL",
        "SELECT count(*) = 0 FROM pg_trigger WHERE tgrelid = 'webhook_log'::regclass AND NOT tgisinternal",
    ),
}


# The guide as data


@dataclass(frozen=True)
class Block:
    """A fenced block: ``language`` is what stands behind the fence, ``line`` where it begins."""

    section: str
    language: str
    text: str
    line: int


def blocks_of(document: Path) -> list[Block]:
    """Every fenced block, under the nearest heading above it."""
    found: list[Block] = []
    section = language = ""
    start, text = 0, [""]
    inside = False
    for number, line in enumerate(document.read_text("utf-8").splitlines(), 1):
        if line.startswith("```"):
            if inside:
                found.append(Block(section, language, "\n".join(text), start))
            else:
                language, start, text = line[3:], number, []
            inside = not inside
        elif inside:
            text.append(line)
        elif heading := re.match(r"#+ (.+)", line):
            section = heading[1]
    assert not inside
    return found


def sections() -> dict[str, list[Block]]:
    """The blocks of the guide by section, in order."""
    found: dict[str, list[Block]] = {}
    for block in blocks_of(GUIDE):
        found.setdefault(block.section, []).append(block)
    return found


def test_every_block_belongs_to_a_walk() -> None:
    """A new section with something to run, or a block in a language that nobody runs, has to be placed."""
    walked = [section for _, names in WALKS for section in names]
    assert len(walked) == len(set(walked))
    for block in blocks_of(GUIDE):
        assert block.language in ("bash", "sql", "text"), f"line {block.line}: {block.language!r}"
        if block.language != "text":
            assert block.section in walked, f"line {block.line}: {block.section!r} is in no walk"
    assert set(walked) <= set(sections())
    lines = {line.strip() for block in blocks_of(GUIDE) for line in block.text.splitlines()}
    assert set(NOT_RUN) <= lines, "a reason for a line that is not there any more"


# What it is run on


@pytest.fixture(scope="module")
def complaints() -> list[str]:
    """What the migration that is stopped half-way says on stderr."""
    return []


@pytest.fixture(scope="module")
def databases(
    postgres: str, complaints: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], str]]:
    """A factory of databases in one of the states that the guide speaks of; copies of a few."""
    made: list[str] = []

    def copy_of(template: str | None) -> str:
        database = f"chronos_guide_{os.getpid()}_{len(made)}"
        create_database(postgres, database, template)
        made.append(database)
        return make_url(postgres).set(database=database).render_as_string(hide_password=False)

    @cache
    def template(state: str) -> str:
        url = copy_of(None if state == "plain" else make_url(template("plain")).database)
        if state == "plain":
            create_webhook_log(create_engine(url, poolclass=NullPool), ROWS)
        elif state == "migrated":
            here = tmp_path_factory.mktemp("guide")
            code, shown = run_module(["chronos", "migrate", "--yes"], {"DATABASE_URL": url}, here)
            assert code == 0, shown
        elif state == "half done":
            complaints.append(stop_half_way(url))
        else:
            query(url, "CREATE TABLE webhook_log_old ()")
        return url

    try:
        yield lambda state: copy_of(make_url(template(state)).database)
    finally:
        server = create_engine(postgres, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with server.connect() as conn:
            for database in made:
                conn.exec_driver_sql(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")


def stop_half_way(url: str) -> str:
    """Start a migration, press Ctrl-C while it copies, and return what it complained of."""
    with started(url, "migrate", "--yes", "--batch-size", "5", "--rate-limit", "5") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert any(line.startswith("Migrated") for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=60)
        assert process.returncode == 3, complaints
        return complaints


@dataclass
class Shell:
    """The operator's terminal: runs a block and returns what it showed."""

    env: dict[str, str]
    here: Path
    placeholders: dict[str, str]
    background: contextlib.ExitStack
    worker: subprocess.Popen[bytes] | None = field(default=None)

    def run(self, block: Block) -> str | None:
        """What the block printed; None when no line of it was run. Raises when a command fails."""
        if block.language == "sql":
            return self.sql(block.text)
        shown = [self.line(line) for line in block.text.splitlines() if line.strip() not in NOT_RUN]
        return "\n".join(shown) if shown else None

    def sql(self, text: str) -> str:
        psql = ["psql", "-X", "-v", "ON_ERROR_STOP=1", self.env["DATABASE_URL"]]
        return self.process(psql, input=text)

    def line(self, line: str) -> str:
        words = shlex.split(line)
        if words[0] == "export":
            variable, _, text = words[1].partition("=")
            self.env[variable] = self.placeholders[variable] if "your-" in text else text
            return ""
        if words[0] == "unset":
            del self.env[words[1]]
            return ""
        if words[:2] == ["python", "-m"]:
            return self.module(words[2:])
        if words[0] == "celery":
            return self.job(words)
        if words[0] == "redis-cli":
            return self.redis(words[words.index("your-redis-host") + 1 :])
        return self.process(["bash", "-c", line])

    def process(self, command: list[str], **more: Any) -> str:
        done: subprocess.CompletedProcess[str] = subprocess.run(
            command, env=self.env, cwd=self.here, capture_output=True, text=True, check=False, **more
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def module(self, words: list[str]) -> str:
        into = self.here / words[words.index(">") + 1] if ">" in words else None
        words = words[: words.index(">")] if into else words
        code, shown = run_module(words, self.env, self.here)
        accepted = {0, 1} if "status" in words else {0}
        assert code in accepted, f"{words}: {code}: {shown}"
        if into:
            into.write_text(shown)
            return ""
        return shown

    def job(self, words: list[str]) -> str:
        """Call a job as the guide says; a worker does it."""
        celery = [sys.executable, "-W", "ignore", "-m", "celery"]
        if self.worker is None:
            log = self.background.enter_context((self.here / "worker.log").open("wb"))
            self.worker = subprocess.Popen(
                [
                    *celery,
                    "-A",
                    "chronos.worker",
                    "worker",
                    "--pool=solo",
                    "--without-mingle",
                    "--loglevel=INFO",
                ],
                env=self.env,
                cwd=self.here,
                stdout=log,
                stderr=log,
            )
            self.background.callback(self.worker.wait)
            self.background.callback(self.worker.terminate)
        shown = self.process([*celery, *words[1:]])
        with redis.Redis.from_url(self.env["REDIS_URL"]) as client:
            task = f"[{shown.strip()}] succeeded"
            wait_until(lambda: task in (self.here / "worker.log").read_text(), 60, f"{words[-1]} has run")
            wait_until(lambda: not client.exists(words[-1]), 60, f"{words[-1]} has given its lock back")
        return shown

    def redis(self, words: list[str]) -> str:
        """As redis-cli prints it on a terminal; the tests have no redis-cli."""
        with redis.Redis.from_url(self.env["REDIS_URL"], decode_responses=True) as client:
            answer = client.execute_command(*[word for word in words if word != "--raw"])
        return "(nil)" if answer is None else f"{answer}"


class Answers(io.StringIO):
    """A person who types the word that is asked for, and the newline that the terminal shows for it."""

    def __init__(self, screen: io.StringIO) -> None:
        super().__init__()
        self.screen = screen

    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
        asked = re.findall(r"Type (\w+) to go on: $", self.screen.getvalue())
        self.screen.write("\n")
        return f"{asked[0]}\n"


def run_module(words: list[str], env: dict[str, str], here: Path) -> tuple[int, str]:
    """``python -m WORDS`` in this process, which spares its start: exit code, and what it printed."""
    screen = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(here):
        for variable in [
            name for name in os.environ if name.upper() in map(str.upper, Settings.model_fields)
        ]:
            patch.delenv(variable)
        for variable, text in env.items():
            patch.setenv(variable, text)
        patch.setattr(sys, "argv", words)
        patch.setattr(sys, "stdin", Answers(screen))
        patch.setattr(sys, "stdout", screen)
        patch.setattr(sys, "stderr", screen)
        get_settings.cache_clear()
        try:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return int(end.code or 0), screen.getvalue()
        finally:
            get_settings.cache_clear()
    return 0, screen.getvalue()


@pytest.fixture
def shell(redis_url: str, pg_bin: Path, tmp_path: Path) -> Iterator[Shell]:
    (tmp_path / "chronos").symlink_to(ROOT / "chronos")
    keys = [job.name for job in JOBS]
    with redis.Redis.from_url(redis_url) as client, contextlib.ExitStack() as background:
        client.delete(*keys)
        env = {
            **os.environ,
            "REDIS_URL": redis_url,
            "COLUMNS": "80",
            "PYTHONUTF8": "1",
            "PYTHONPATH": str(ROOT),
        }
        env["PATH"] = f"{pg_bin}:{env['PATH']}"
        del env["TEST_DATABASE_URL"]
        yield Shell(env, tmp_path, {"REDIS_URL": redis_url}, background)
        background.close()
        client.delete(*keys)


def as_for_psql(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


# What was printed, and what the guide says

_DIFFERS = [
    (r"Host: .*", "Host"),
    (r"User: .*", "User"),
    (r"next drop .*", "next drop"),
    (r"database    .*", "database"),
    (r"y\d{4}m\d\dd\d\d", "DAY"),
    (r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d(\.\d+)?)?)?(\+\d\d(:\d\d)?)?", "TIME"),
    (r"\d[\d,]*(\.\d+)?", "N"),
    (r"N (bytes|B|kB|MB|GB|TB)\b", "SIZE"),
    (r"about N (s|min|h)\b", "about N s"),
    (r"-{3,}(\+-+)*", "---"),
    (r"\s+", " "),
]


def normal(line: str) -> str:
    """The line without what differs from run to run."""
    for pattern, replacement in _DIFFERS:
        line = re.sub(pattern, replacement, line)
    return line.strip()


def normal_lines(text: str) -> list[str]:
    """The lines that are not empty; in the comments of a plan, where a line breaks depends on its numbers."""
    return [line for line in map(normal, re.sub(r"\n--    +", " ", text).splitlines()) if line]


def pattern_of(expected: str) -> re.Pattern[str]:
    """The lines of ``expected`` one after another; a line that is but `...` stands for any number of them."""
    lines = [
        "(?:.*\\n)*?" if line.strip() == "..." else ".*".join(map(re.escape, line.split("..."))) + "\\n"
        for line in normal_lines(expected)
    ]
    return re.compile("^" + "".join(lines), re.MULTILINE)


def assert_shown(expected: str, shown: str, where: str) -> None:
    """What the guide shows is what was printed."""
    found = pattern_of(expected).search("".join(f"{line}\n" for line in normal_lines(shown)))
    assert found, f"{where} is not what is printed here, which is:\n{shown[-6000:]}"


@pytest.mark.parametrize(("state", "names"), WALKS, ids=[names[0] for _, names in WALKS])
def test_the_guide_can_be_followed(
    shell: Shell, databases: Callable[[str], str], state: str, names: list[str]
) -> None:
    url = as_for_psql(databases(state))
    shell.env["DATABASE_URL"] = url
    shell.placeholders["DATABASE_URL"] = url
    if "1. Test in Development/Staging First" in names:
        shell.placeholders["TEST_DATABASE_URL"] = as_for_psql(databases("plain"))
    shown: str | None = None
    for section in names:
        written = value(url, SINCE_THE_SWAP) if section in PROMISES else 0
        for block in sections()[section]:
            where = f"{GUIDE.name}, line {block.line}"
            if block.language != "text":
                shown = shell.run(block)
            elif shown is not None and not is_message(block):
                assert_shown(block.text, shown, where)
        for promise in PROMISES.get(section, ()):
            assert value(url, promise), f"{section}: {promise}"
        if written:
            assert value(url, SINCE_THE_SWAP) > written


# Messages


MESSAGES = (
    "If Migration Fails During Execution",
    "Step 2: Deploy Code Changes",
    "Refused before anything was changed",
    "The checks",
    "Migration Script Fails",
    "Rollback or finalize refuses",
    "New Jobs Failing",
    "Application Errors",
)


def is_message(block: Block) -> bool:
    """Whether it is a text that an operator may meet, and not what the block before has just printed."""
    return block.section in MESSAGES


def messages() -> list[str]:
    return [
        line
        for block in blocks_of(GUIDE)
        if block.language == "text" and is_message(block)
        for line in block.text.splitlines()
    ]


A_FAILURE = (
    "CREATE FUNCTION sound(bigint) RETURNS boolean LANGUAGE plpgsql AS"
    " 'BEGIN RETURN $1 <> (SELECT min(id) + 700 FROM public.broken); END';"
    " CREATE TABLE broken (id bigint);"
    " ALTER TABLE webhook_log ADD CONSTRAINT sound CHECK (sound(id) IS NOT false);"
    " INSERT INTO broken VALUES (1)"
)

# What a full disk makes the server say, in the midst of the copy.
A_FULL_DISK = (
    "CREATE FUNCTION fits(bigint) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN"
    " IF $1 = (SELECT min(id) + 700 FROM public.disk) THEN RAISE disk_full USING MESSAGE ="
    " 'could not extend file \"base/5/16399\": No space left on device'; END IF; RETURN true; END $$;"
    " CREATE TABLE disk (id bigint);"
    " ALTER TABLE webhook_log ADD CONSTRAINT fits CHECK (fits(id));"
    " INSERT INTO disk VALUES (1)"
)

# Messages that are made to appear: the state, what is done to it, and the command or the SQL that complains.
PROVOKED: dict[str, tuple[str, str, str]] = {
    "Error: step 3 (Migrating": ("plain", A_FAILURE, "chronos migrate --yes"),
    "... failed: could not extend file": ("plain", A_FULL_DISK, "chronos migrate --yes"),
    "Error: MIGRATE was not typed": ("plain", "SELECT 1", "chronos migrate"),
    "Table webhook_log_old already exists": ("foreign old table", "SELECT 1", "chronos migrate --yes"),
    "a migration begun at": ("half done", "SELECT 1", "chronos migrate --yes"),
    "webhook_log is migrated already": ("migrated", "SELECT 1", "chronos migrate --yes"),
    "no index begins with timestamp": (
        "plain", "DROP INDEX ix_webhook_log_timestamp", "chronos migrate --yes"),
    "table ... has a foreign key": (
        "plain", "CREATE TABLE retry (log bigint REFERENCES webhook_log)", "chronos migrate --yes"),
    "the unique index": (
        "plain", "CREATE UNIQUE INDEX ON webhook_log (id, status)", "chronos migrate --yes"),
    "materialized view": (
        "plain", "CREATE MATERIALIZED VIEW report AS SELECT id FROM webhook_log", "chronos migrate --yes"),
    "the timestamp of ... is infinite": (
        "plain", "UPDATE webhook_log SET timestamp = 'infinity' WHERE id = 1", "chronos migrate --yes"),
    "the timestamp of ... is NULL": (
        "plain", "ALTER TABLE webhook_log ALTER timestamp DROP NOT NULL;"
        " UPDATE webhook_log SET timestamp = NULL WHERE id = 1", "chronos migrate --yes"),
    "the timestamp of ... lies after": (
        "plain", "UPDATE webhook_log SET timestamp = now() + interval '1 year' WHERE id = 1",
        "chronos migrate --yes"),
    "... rows of ... were written after the swap": (
        "migrated", "UPDATE webhook_log_old SET status = 'by hand' WHERE id = 1", "chronos finalize --yes"),
    "... rows were written to ... after the swap under": (
        "migrated", "UPDATE webhook_log_old SET status = 'by hand'"
        " WHERE timestamp = (SELECT max(timestamp) FROM webhook_log_old)",
        "chronos rollback --yes"),
    "there is nothing to resume": ("plain", "SELECT 1", "chronos migrate --resume"),
    "... rows of webhook_log_old within retention": (
        "migrated", "DELETE FROM webhook_log_migration_changes;"
        " DELETE FROM webhook_log WHERE timestamp < now() - interval '1 day';"
        " DELETE FROM webhook_log_migration_changes", "chronos finalize --yes"),
    "no partition of relation": (
        "migrated", "SELECT 1",
        "INSERT INTO webhook_log (status, timestamp) VALUES ('x', now() + interval '40 days')"),
    "there is no unique or exclusion constraint": (
        "migrated", "SELECT 1",
        "INSERT INTO webhook_log (id, status, timestamp) VALUES (1, 'x', now()) ON CONFLICT (id) DO NOTHING"),
    "function create_future_webhook_log_partitions(integer)": (
        "plain", "SELECT 1", "SELECT create_future_webhook_log_partitions(30)"),
    "webhook_log is not a partitioned table": (
        "migrated", "DROP TABLE webhook_log; ALTER TABLE webhook_log_old RENAME TO webhook_log",
        "SELECT create_future_webhook_log_partitions(30)"),
}  # fmt: skip

# Said by others, in a test of its own.
NOT_OURS = {
    "Incorrect number of values in identifier to formulate primary key for session.get()": "SQLAlchemy",
}


@pytest.mark.parametrize("beginning", PROVOKED)
def test_a_message_is_what_the_operator_reads(
    databases: Callable[[str], str], tmp_path: Path, shell: Shell, beginning: str
) -> None:
    [message] = [line for line in messages() if line.startswith(beginning)]
    state, change, command = PROVOKED[beginning]
    url = databases(state)
    query(url, change)
    if command.startswith("chronos "):
        env = {**shell.env, "DATABASE_URL": url}
        patch_answer = "no\n" if "--yes" not in command else ""
        code, shown = complain(command.split(), env, tmp_path, patch_answer)
        assert code in (1, 2), shown
    else:
        with pytest.raises(psycopg2.Error) as complaint:
            query(url, command)
        shown = str(complaint.value)
    assert re.search(".+".join(map(re.escape, message.split("..."))), shown), shown


def complain(words: list[str], env: dict[str, str], here: Path, answer: str) -> tuple[int, str]:
    with pytest.MonkeyPatch.context() as patch:
        if answer:
            patch.setattr(Answers, "readline", lambda self, size=-1: answer)
        return run_module(words, env, here)


WAITING = ("waiting for a lock on", "gave up waiting for a lock on")


def lock_within(locks: Locks, conn: Connection) -> None:
    for attempt_at_lock in locks.attempts(conn, [("public", "webhook_log")]):
        with attempt_at_lock:
            execute(conn, lock_table("public", "webhook_log", "ACCESS EXCLUSIVE"))


def test_whom_it_waits_for(databases: Callable[[str], str]) -> None:
    url = databases("plain")
    told: list[str] = []
    patience = Patience(attempts=2, sleep=lambda seconds: None)
    locks = Locks(patience, lambda obstacle, attempt: told.append(str(obstacle)))
    with (
        holding(url, "LOCK TABLE webhook_log"),
        opened(connect_engine(make_url(url))) as conn,
        pytest.raises(LockUnavailableError) as given_up,
    ):
        lock_within(locks, conn)
    for beginning, said in zip(WAITING, [*told, str(given_up.value)], strict=True):
        [message] = [line for line in messages() if line.startswith(beginning)]
        assert re.match(".+".join(map(re.escape, message.split("..."))), said)


WITHOUT_A_DATABASE = {
    "Error: DATABASE_URL is not set": "",
    "Error: DATABASE_URL cannot be read": "your-host/chronos",
}


@pytest.mark.parametrize("beginning", WITHOUT_A_DATABASE)
def test_a_database_that_cannot_be_found(shell: Shell, beginning: str) -> None:
    [message] = [line for line in messages() if line.startswith(beginning)]
    env = {**shell.env, "DATABASE_URL": WITHOUT_A_DATABASE[beginning]}
    code, shown = run_module(["chronos", "migrate"], env, shell.here)
    assert code == 2
    assert message in shown


def test_a_session_that_asks_for_the_id_alone(databases: Callable[[str], str]) -> None:
    engine = create_engine(databases("migrated"), poolclass=NullPool)
    [message] = [line for line in messages() if NOT_OURS.get(line) == "SQLAlchemy"]
    with Session(engine) as session, pytest.raises(InvalidRequestError, match=re.escape(message)):
        session.get(WebhookLog, 1)


def test_ctrl_c_says_how_to_go_on(databases: Callable[[str], str], complaints: list[str]) -> None:
    [block, *_] = sections()["It was stopped or cut off"]
    databases("half done")
    assert_shown(block.text, complaints[0], "after Ctrl-C")


def test_a_job_before_the_migration_says_why_it_does_nothing(
    databases: Callable[[str], str], shell: Shell, caplog: pytest.LogCaptureFixture
) -> None:
    [block] = [block for block in sections()["Step 2: Deploy Code Changes"] if block.language == "text"]
    settings = Settings(
        database_url=SecretStr(databases("plain")), redis_url=SecretStr(shell.env["REDIS_URL"])
    )
    assert attempt(JOBS[0], settings, Message("by hand"), 1.0)["status"] == "skipped"
    assert caplog.messages == [block.text]


# What only a run can tell: any text, names of tables, the key, commands; and the id behind a check's message.
FILLED_IN = re.compile(
    r"\.\.\.|webhook_log(?:_old|_new)?|\(id\)|timestamp|python -m chronos[\w. -]*|\[[a-z-]+\]"
)


def test_no_message_without_a_source() -> None:
    """Whatever is not provoked above stands, word for word, in the code."""
    said = re.sub(r"'\s*\n\s*'", "", "\n".join(templates()))  # SQL's way to go on in the next line
    provoked = tuple(PROVOKED)
    for message in messages():
        elsewhere = (f"{JOBS[0].name} skipped", *WITHOUT_A_DATABASE, *WAITING)
        if message.startswith((*provoked, *elsewhere)) or message in NOT_OURS:
            continue
        text = re.sub(r"^Error: ", "", message)
        for part in filter(None, (part.strip(" :;,.()") for part in FILLED_IN.split(text))):
            assert part in said, f"{part!r} of {message!r} is in no message of the code"


def templates() -> Iterator[str]:
    """Every string of the code, names of constants filled in, `\\0` for what only a run can tell."""
    for file in sorted((ROOT / "chronos").rglob("*.py")):
        module = (
            importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
            if file.name != "__main__.py"
            and "scripts" not in file.parts
            and file.name not in ("keeper.py", "worker.py")
            else None
        )
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%\d?\$?[sIL]", "\0", node.value)
            elif isinstance(node, ast.JoinedStr):
                yield "".join(_part(part, module) for part in node.values)
    for script in sorted((ROOT / "chronos" / "sql").glob("*.sql")):
        yield script.read_text("utf-8")


def _part(part: ast.expr, module: object) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    assert isinstance(part, ast.FormattedValue)
    known = getattr(module, part.value.id, None) if isinstance(part.value, ast.Name) else None
    return known if isinstance(known, str) else "\0"


# What is mentioned exists


def text_of(document: Path) -> str:
    return document.read_text("utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_is_mentioned_exists(document: Path) -> None:
    text = text_of(document)
    ours = {option for command in cli.commands.values() for p in command.params for option in p.opts}
    assert isinstance(cli, click.Group)
    for line in re.findall(r"python -m chronos[\w.]*([^`\n]*)", text):
        words = line.split("#")[0].split()
        assert set(re.findall(r"--[a-z-]+", line.split("#")[0])) <= ours, line
        if words and words[0].isalpha():
            assert words[0] in cli.commands, line
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, target
    for path in re.findall(r"`((?:chronos|tests|docs|bench)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
    known = text_of(ROOT / ".env.example") + "LOGFIRE_TOKEN OTEL_EXPORTER_OTLP_ENDPOINT REDISCLI_AUTH PG_BIN"
    known += " REDIS_SERVER NO_COLOR ON_ERROR_STOP ROWS_PER_SECOND PARTITION_MIGRATION_GUIDE"
    for variable in re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", text):
        assert variable in known, variable


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = text_of(document)
    anchors = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (document.parent / target.split("#")[0]).exists(), target


def test_each_option_of_migrate_is_explained() -> None:
    text = text_of(GUIDE)
    for param in cli.commands["migrate"].params:
        if isinstance(param, click.Argument):
            continue
        assert f"`{param.opts[0]}" in text, param.opts[0]


def test_the_headings_that_people_know_are_there() -> None:
    found = re.findall(r"^#+ .+$", text_of(GUIDE), re.MULTILINE)
    assert [heading for heading in found if heading in HEADINGS.split("\n")] == HEADINGS.split("\n")[1:-1]


def test_each_check_is_explained() -> None:
    text = text_of(GUIDE)
    for check in CHECKS:
        assert f"`{check.id}`" in text, check.id
    for module in ("plan", "obstacles"):
        printed = (ROOT / "chronos" / "migration" / f"{module}.py").read_text("utf-8")
        found = re.findall(r'(?:Finding|Obstacle)\(\s*"([a-z-]+)"', printed)
        assert found
        for one in found:
            assert f"`{one}`" in text, one
