"""The tools you might pick for this, each used as its own documentation says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

PAST_DAYS = 15
AHEAD_DAYS = 30

_PATIENCE_S = 1_800


class ToolError(Exception):
    """A tool failed; the message is the tool's own."""


@dataclass(frozen=True)
class Tool:
    """One way to partition webhook_log.

    ``missing`` says in one line how to install what the tool lacks, None if it lacks nothing; ``prepare``
    runs once per database; ``migrate`` does the work and returns what it had to do twice, if anything. Tools
    with ``swaps`` have every row in place when the partitioned table takes the name, others when they finish.
    """

    name: str
    migrate: Callable[[Engine], str | None]
    missing: Callable[[Engine], str | None] = lambda engine: None
    prepare: Callable[[Engine], None] = lambda engine: None
    swaps: bool = False


# pgslice (README, "Steps")


def _pgslice_program() -> list[str] | None:
    """The command, from PGSLICE (a checkout or a program) or from PATH; None if there is none."""
    chosen = os.environ.get("PGSLICE") or shutil.which("pgslice")
    if not chosen:
        return None
    checkout = Path(chosen)
    if checkout.is_dir():
        return ["ruby", "-I", str(checkout / "lib"), str(checkout / "exe" / "pgslice")]
    return [chosen]


def _pgslice_missing(engine: Engine) -> str | None:
    how = (
        "`gem install pgslice`; or PGSLICE=folder of a checkout of github.com/ankane/pgslice, with ruby,"
        " ruby-pg and ruby-thor installed"
    )
    program = _pgslice_program()
    if program is None:
        return how
    try:
        _run([*program, "version"], {})
    except ToolError as error:
        return f"{how} ({error})"
    return None


def _pgslice(engine: Engine) -> None:
    program = _pgslice_program()
    assert program
    environment = {"PGSLICE_URL": _url(engine)}
    for arguments in (
        "prep webhook_log timestamp day",
        f"add_partitions webhook_log --intermediate --past {PAST_DAYS} --future {AHEAD_DAYS}",
        "fill webhook_log",
        "analyze webhook_log",
        "swap webhook_log",
        "fill webhook_log --swapped",
    ):
        _run([*program, *arguments.split()], environment)


# pg_partman 4 (pg_partman_howto_native.md, "Online Partitioning")

_PARTMAN_PARENT = """
CREATE TABLE webhook_log_new (LIKE webhook_log INCLUDING DEFAULTS) PARTITION BY RANGE ("timestamp");
CREATE INDEX ON webhook_log_new ("timestamp");
CREATE INDEX ON webhook_log_new (webhook_endpoint_id);
ALTER TABLE webhook_log_new ADD FOREIGN KEY (webhook_endpoint_id) REFERENCES webhook_endpoint (id);
CREATE TABLE webhook_log_template (LIKE webhook_log);
ALTER TABLE webhook_log_template ADD PRIMARY KEY (id);
SELECT partman.create_parent('public.webhook_log_new', 'timestamp', 'native', 'daily',
    p_template_table := 'public.webhook_log_template', p_premake := 1,
    p_start_partition := (current_timestamp + '2 days'::interval)::text);
DROP TABLE webhook_log_new_default;
UPDATE partman.part_config SET parent_table = 'public.webhook_log', premake = {ahead}
WHERE parent_table = 'public.webhook_log_new'
"""
_PARTMAN_EXCHANGE = """
LOCK TABLE webhook_log IN ACCESS EXCLUSIVE MODE;
LOCK TABLE webhook_log_new IN ACCESS EXCLUSIVE MODE;
ALTER TABLE webhook_log RENAME TO webhook_log_default;
ALTER TABLE webhook_log_new RENAME TO webhook_log;
DO $$
DECLARE
    child name;
BEGIN
    FOR child IN SELECT relname FROM pg_class WHERE relname ^@ 'webhook_log_new_p' AND relkind = 'r' LOOP
        EXECUTE format('ALTER TABLE %I RENAME TO %I', child, replace(child, '_new_', '_'));
    END LOOP;
END
$$;
ALTER TABLE webhook_log ATTACH PARTITION webhook_log_default DEFAULT
"""
_PARTMAN_MOVE = "CALL partman.partition_data_proc('public.webhook_log', p_batch := 1000, p_wait := 0)"
# The procedure fails if the application inserts into the day being moved, and its rows go back where they
# were. After this many failures that day is moved while writers wait.
_PARTMAN_CALLS = 3
_PARTMAN_LOCKED = """
BEGIN;
LOCK TABLE webhook_log IN SHARE ROW EXCLUSIVE MODE;
SELECT partman.partition_data_time('public.webhook_log', p_batch_count := 10);
COMMIT
"""
_PARTMAN_END = (
    "VACUUM ANALYZE webhook_log",
    "SELECT partman.run_maintenance('public.webhook_log')",
)


def _partman_missing(engine: Engine) -> str | None:
    with _autocommit(engine) as conn:
        version = conn.exec_driver_sql(
            "SELECT default_version FROM pg_available_extensions WHERE name = 'pg_partman'"
        ).scalar()
    if version and version.startswith("4."):
        return None
    return (
        "Debian's postgresql-15-partman, and PG_BIN=/usr/lib/postgresql/15/bin"
        f" (this server has {f'version {version}' if version else 'none'}; the bench needs version 4)"
    )


def _partman_prepare(engine: Engine) -> None:
    with _autocommit(engine) as conn:
        conn.exec_driver_sql("CREATE SCHEMA partman")
        conn.exec_driver_sql("CREATE EXTENSION pg_partman SCHEMA partman")


def _partman(engine: Engine) -> str | None:
    with _autocommit(engine) as conn:
        conn.exec_driver_sql("SET TIME ZONE 'UTC'")
        for text in _PARTMAN_PARENT.format(ahead=AHEAD_DAYS).split(";\n"):
            conn.exec_driver_sql(text)
        conn.exec_driver_sql(f"BEGIN; {_PARTMAN_EXCHANGE}; COMMIT")
        said = ""
        for _ in range(_PARTMAN_CALLS):
            try:
                conn.exec_driver_sql(_PARTMAN_MOVE)
            except DBAPIError as error:
                said = str(error.orig).partition("\n")[0]
            else:
                said = ""
                break
        if said:
            conn.exec_driver_sql(_PARTMAN_LOCKED)
        for text in _PARTMAN_END:
            conn.exec_driver_sql(text)
    if not said:
        return None
    return (
        f"the day in use was moved under a lock, as the procedure had failed {_PARTMAN_CALLS} times ({said})"
    )


# pg-partsmith drains a DEFAULT partition, so the table is first turned into one.

_PARTSMITH_EXCHANGE = """
CREATE TABLE webhook_log_new (LIKE webhook_log INCLUDING DEFAULTS, PRIMARY KEY (id, "timestamp"))
    PARTITION BY RANGE ("timestamp");
CREATE INDEX ON webhook_log_new ("timestamp");
CREATE INDEX ON webhook_log_new (webhook_endpoint_id);
ALTER TABLE webhook_log_new ADD FOREIGN KEY (webhook_endpoint_id) REFERENCES webhook_endpoint (id);
LOCK TABLE webhook_log IN ACCESS EXCLUSIVE MODE;
ALTER TABLE webhook_log DROP CONSTRAINT webhook_log_pkey;
ALTER TABLE webhook_log ADD PRIMARY KEY USING INDEX webhook_log_key;
ALTER TABLE webhook_log RENAME TO webhook_log_default;
ALTER TABLE webhook_log_new RENAME TO webhook_log;
ALTER TABLE webhook_log ATTACH PARTITION webhook_log_default DEFAULT
"""
_PARTSMITH_TABLE = {
    "table_name": "webhook_log",
    "partition_column": "timestamp",
    "granularity": "day",
    "create_ahead_count": AHEAD_DAYS + 1,
    "retention_count": 400,
}


def _partsmith_program() -> str | None:
    beside = Path(sys.executable).with_name("pg-partsmith")
    return str(beside) if beside.exists() else shutil.which("pg-partsmith")


def _partsmith_missing(engine: Engine) -> str | None:
    return None if _partsmith_program() else "`pip install -r requirements-bench.txt`"


def _partsmith(engine: Engine) -> None:
    program = _partsmith_program()
    assert program
    with _autocommit(engine) as conn:
        conn.exec_driver_sql(
            'CREATE UNIQUE INDEX CONCURRENTLY webhook_log_key ON webhook_log (id, "timestamp")'
        )
        conn.exec_driver_sql(f"BEGIN; {_PARTSMITH_EXCHANGE}; COMMIT")
    with tempfile.TemporaryDirectory() as folder:
        document = Path(folder) / "partitions.json"
        document.write_text(json.dumps({"tables": [_PARTSMITH_TABLE]}), "utf-8")
        for verb in ("backfill", "apply"):
            _run([program, verb, "--config", str(document)], {"PG_PARTSMITH_DSN": _url(engine)})
    with _autocommit(engine) as conn:
        conn.exec_driver_sql("VACUUM ANALYZE webhook_log")


# chronos


def chronos(engine: Engine, *words: str) -> None:
    """Run a command of this project on webhook_log."""
    root = str(Path(__file__).resolve().parents[1])
    environment = {"DATABASE_URL": _url(engine), "TESTING": "false", "PYTHONPATH": root}
    _run([sys.executable, "-m", "chronos", words[0], "webhook_log", "--yes", *words[1:]], environment)


def _copy(engine: Engine) -> None:
    chronos(engine, "migrate")


def _attach(engine: Engine) -> None:
    chronos(engine, "migrate", "--strategy", "attach")


COPY = Tool("chronos migrate", _copy, swaps=True)
ATTACH = Tool("chronos migrate --strategy attach", _attach, swaps=True)
PGSLICE = Tool("pgslice", _pgslice, _pgslice_missing)
PARTMAN = Tool("pg_partman, partition_data_proc", _partman, _partman_missing, _partman_prepare)
PARTSMITH = Tool("pg-partsmith backfill", _partsmith, _partsmith_missing)

TOOLS = (COPY, ATTACH, PGSLICE, PARTMAN, PARTSMITH)


def _run(command: list[str], environment: dict[str, str]) -> None:
    """Run a command in an empty folder, where it finds no settings of this project."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=os.environ | environment,
                capture_output=True,
                text=True,
                timeout=_PATIENCE_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ToolError(str(error).partition("\n")[0]) from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["said nothing"]
        raise ToolError(f"exit {done.returncode}: {said[-1]}")


def _url(engine: Engine) -> str:
    """The URL as tools not written in Python read it."""
    return engine.url.set(drivername="postgresql").render_as_string(hide_password=False)


@contextmanager
def _autocommit(engine: Engine) -> Iterator[Connection]:
    with engine.connect() as conn:
        yield conn.execution_options(isolation_level="AUTOCOMMIT", no_parameters=True)
