"""Every block of the DOCUMENTS is run, in order.

The rules:

- ``bash``: each line is run by bash, in the environment left by the lines before it. It must succeed.
- ``sql``: run by psql; must succeed. ``toml``: becomes chronos.toml.
- ``text``: what the block before it printed. Dates and numbers may differ; ``...`` stands for anything.
- ``<!-- database: STATE -->``: from here on, a fresh database in this state is used, see ``STATES``.
- An ``export`` with ``your-`` in it is not run: the tests have their own servers.
- Not run: what follows ``<!-- database: none -->``, lines in NOT_RUN, which says why, other languages.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import redis
from sqlalchemy import NullPool, create_engine
from sqlalchemy.engine import make_url

from chronos.demo.rows import create_webhook_log
from chronos.jobs import JOBS
from tests.command import chronos, started
from tests.conftest import MakeDatabase
from tests.tables import exists, query, value
from tests.waiting import wait_until

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "PARTITION_MIGRATION_GUIDE.md"]
DOCUMENTS += [ROOT / "docs" / f"{page}.md" for page in ("OPERATIONS", "UPKEEP", "PLAN")]
LANGUAGES = {"bash", "sql", "toml", "text"}
ROWS = 1_200

NOT_RUN = {
    "make setup": "it made the environment that the tests run in",
    "source .venv/bin/activate": "the tests run in that environment",
    "make demo": "tests/test_demo.py runs it",
    "make test": "it would run this test",
    "git pull origin master": "it needs the operator's repository",
    "pip install -r requirements.txt": "it goes to the package index",
    "make restart-server": "it runs the operator's own command",
    "make restart-worker": "it runs the operator's own command",
    "tail -n 100 /var/log/chronos/worker.log | grep partition": "it reads the operator's log file",
}

# What holds after the walk that begins under a heading. `late` and `new` are written after the swap, and
# after the walk the next row must get a new id.
_KEPT = "SELECT count(*) = 2 FROM webhook_log WHERE status IN ('late', 'new')"
_PLAIN = "SELECT relkind = 'r' FROM pg_class WHERE oid = 'webhook_log'::regclass"
_PARTITIONED = _PLAIN.replace("'r'", "'p'")
_NO_OLD = "SELECT to_regclass('webhook_log_old') IS NULL"
_NO_STATE = "SELECT to_regclass('webhook_log_migration') IS NULL"
PROMISES = {
    "Pre-Migration Checklist": (_NO_OLD, _NO_STATE, _PARTITIONED),
    "Step 7: Cleanup (After 7+ Days of Stability)": (_KEPT, _PARTITIONED, _NO_OLD, _NO_STATE),
    "If Migration Fails During Execution": (_KEPT,),
    "Manual Rollback (If Needed)": (
        *(_KEPT, _PLAIN, _NO_OLD, _NO_STATE),
        "SELECT count(*) = 1 FROM pg_constraint WHERE conrelid = 'webhook_log'::regclass AND contype = 'f'"
        " AND convalidated",
        "SELECT pg_get_serial_sequence('webhook_log', 'id') = 'public.webhook_log_id_seq'",
        "SELECT count(*) = 0 FROM pg_trigger WHERE tgrelid = 'webhook_log'::regclass AND NOT tgisinternal",
    ),
}


@dataclass(frozen=True)
class Block:
    """A fenced block; ``language`` is the word after the fence."""

    language: str
    text: str
    where: str


@dataclass
class Walk:
    """Blocks that are run in order on one database, and the heading under which they begin."""

    state: str
    heading: str
    blocks: list[Block] = field(default_factory=list)


def walks(document: Path) -> list[Walk]:
    """The blocks of a document, split by database."""
    found = [Walk("plain", "")]
    heading, language, text = "", "", [""]
    inside = False
    for number, line in enumerate(document.read_text("utf-8").splitlines(), 1):
        if line.startswith("```"):
            if inside:
                found[-1].blocks.append(Block(language, "\n".join(text), f"{document.name}, {number}"))
            inside, language, text = not inside, line[3:], []
        elif inside:
            text.append(line)
        elif state := re.fullmatch(r"<!-- database: (.+) -->", line):
            found.append(Walk(state[1], heading))
        elif line.startswith("#"):
            heading = line.lstrip("# ")
    assert not inside
    return [walk for walk in found if any(block.language in LANGUAGES for block in walk.blocks)]


WALKS = [(document.name, walk) for document in DOCUMENTS for walk in walks(document) if walk.state != "none"]


@pytest.mark.parametrize(("name", "walk"), WALKS, ids=[f"{n}-{w.heading}-{w.state}" for n, w in WALKS])
def test_documented_commands_work_and_print_what_is_shown(name: str, walk: Walk, shell: Shell) -> None:
    shell.start(walk.state)
    shown = ""
    for block in walk.blocks:
        if block.language == "text":
            assert_shown(block, shown)
        elif block.language in LANGUAGES:
            shown = shell.run(block) or shown
    url = shell.env["DATABASE_URL"]
    if promises := PROMISES.get(walk.heading, ()):
        for promise in promises:
            assert value(url, promise), promise
        write(url)  # the sequence continues where it was


def write(url: str) -> None:
    """Write rows as the application does, one of them late."""
    query(
        url,
        "INSERT INTO webhook_log (status, timestamp)"
        " VALUES ('late', now() - interval '3 days'), ('new', now())",
    )


# --- What it runs on ---


def stop_half_way(url: str) -> None:
    """Press Ctrl-C while a migration copies."""
    with started(url, "migrate", "--yes", "--batch-size", "5", "--rate-limit", "50") as process:
        assert process.stdout is not None
        assert any(line.startswith("Migrated") for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 3, errors
    write(url)


def migrated(url: str) -> None:
    done = chronos(url, "migrate", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    write(url)


STATES: dict[str, Callable[[str], None]] = {
    "plain": lambda url: None,
    "migrated": migrated,
    "half done": stop_half_way,
}


@dataclass
class Shell:
    """The operator's terminal."""

    make: MakeDatabase
    env: dict[str, str]
    here: Path
    worker: subprocess.Popen[bytes] | None = None

    def start(self, state: str) -> None:
        """Work on a fresh database in this state; a second one is for the rehearsal."""
        for variable in ("DATABASE_URL", "TEST_DATABASE_URL"):
            url = self.make()
            create_webhook_log(create_engine(url, poolclass=NullPool), ROWS)
            self.env[variable] = as_for_psql(url)
        STATES[state](self.env["DATABASE_URL"])

    def run(self, block: Block) -> str | None:
        """Run a block; returns what it printed, None if there was nothing to run."""
        if block.language == "toml":
            (self.here / "chronos.toml").write_text(block.text, "utf-8")
            return None
        if block.language == "sql":
            psql = ["psql", "-X", "-v", "ON_ERROR_STOP=1", self.env["DATABASE_URL"]]
            return self.process(psql, block.text, block.where)
        lines = [line.partition("   #")[0] for line in block.text.splitlines() if line]
        lines = [line for line in lines if line.strip() not in NOT_RUN and "your-" not in line]
        return "".join(self.line(line, block.where) for line in lines) if lines else None

    def line(self, line: str, where: str) -> str:
        """Run one line and keep the environment it leaves; prompts are answered."""
        word = re.search(r"(rollback|finalize|migrat)", line)
        answer = {"rollback": "ROLLBACK", "finalize": "FINALIZE"}.get(word[1], "MIGRATE") if word else ""
        if line.startswith("celery"):
            self.have_a_worker()
        bash = ["bash", "-c", f"set -eo pipefail; {line}\nenv -0 >environment"]
        shown = self.process(bash, f"{answer}\n", where)
        left = (self.here / "environment").read_text("utf-8").split("\0")
        self.env = dict(pair.split("=", 1) for pair in left if "=" in pair)
        if line.startswith("celery"):
            self.wait_for_the_job(shlex.split(line)[-1])
        return shown

    def process(self, command: list[str], answer: str, where: str) -> str:
        done = subprocess.run(
            command, env=self.env, cwd=self.here, input=answer, capture_output=True, text=True, check=False
        )
        accepted = (0, 1) if "chronos status" in command[-1] else (0,)
        assert done.returncode in accepted, f"{where}: {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def have_a_worker(self) -> None:
        if self.worker is None:
            worker = [sys.executable, "-W", "ignore", "-m", "celery", "-A", "chronos.worker", "worker"]
            self.worker = subprocess.Popen(
                [*worker, "--pool=solo", "--without-mingle", "--loglevel=CRITICAL"],
                env=self.env,
                cwd=self.here,
            )

    def wait_for_the_job(self, job: str) -> None:
        url, done = self.env["DATABASE_URL"], "SELECT count(*) FROM chronos_reports WHERE job = %s"
        wait_until(lambda: exists(url, "chronos_reports") and value(url, done, job), 60, f"{job} has run")
        with redis.Redis.from_url(self.env["REDIS_URL"]) as client:
            wait_until(lambda: not client.exists(job), 60, f"{job} has released its lock")


# redis-cli is in no wheel; this does what the documents need of it.
REDIS_CLI = """#!{python}
import sys, redis
answer = redis.Redis.from_url(sys.argv[2], decode_responses=True).execute_command(*sys.argv[3:])
print("(nil)" if answer is None else "\\n".join(answer) if isinstance(answer, list) else answer)
"""


@pytest.fixture
def shell(make_database: MakeDatabase, redis_url: str, pg_bin: Path, tmp_path: Path) -> Iterator[Shell]:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "redis-cli").write_text(REDIS_CLI.format(python=sys.executable))
    (tools / "redis-cli").chmod(0o755)
    (tmp_path / "chronos").symlink_to(ROOT / "chronos")
    path = [tools, Path(sys.executable).parent, pg_bin, os.environ["PATH"]]
    env = {
        **os.environ,
        "PATH": ":".join(map(str, path)),
        "REDIS_URL": redis_url,
        "COLUMNS": "80",
        "PYTHONUTF8": "1",
    }
    keys = [job.name for job in JOBS]
    with redis.Redis.from_url(redis_url) as client:
        client.delete(*keys)
        made = Shell(make_database, env, tmp_path)
        yield made
        if made.worker is not None:
            made.worker.terminate()
            made.worker.wait()
        client.delete(*keys)


def as_for_psql(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


# --- What was printed and what the document shows ---

_DIFFERS = [
    (r"y\d{4}m\d\dd\d\d", "DAY"),
    (r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d(\.\d+)?)?)?(\+\d\d(:\d\d)?)?", "TIME"),
    (r"\d[\d,]*(\.\d+)?", "N"),
    (r"N (bytes|B|kB|MB|GB|TB)\b", "SIZE"),
    (r"-{3,}(\+-+)*", "---"),
    (r"\s+", " "),
]


def lines_of(text: str) -> list[str]:
    """The non-empty lines, without what differs between runs."""
    for pattern, replacement in _DIFFERS:
        text = "\n".join(re.sub(pattern, replacement, line) for line in text.splitlines())
    return [line.strip() for line in text.splitlines() if line.strip()]


def assert_shown(block: Block, shown: str) -> None:
    """The lines of the block appear, one right after another, in what was printed."""
    pattern = "".join(
        "(?:.*\n)*?" if line == "..." else ".*".join(map(re.escape, line.split("..."))) + "\n"
        for line in lines_of(block.text)
    )
    printed = "".join(f"{line}\n" for line in lines_of(shown))
    assert re.search("^" + pattern, printed, re.MULTILINE), f"{block.where} does not show:\n{shown[-6000:]}"
