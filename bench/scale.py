"""``python -m bench.scale --rows N``: the whole migration of the largest table that chronos is for.

The rows are narrow, about 200 bytes with their indexes: their number matters here, not their width. It can be
stopped at any time, with Ctrl-C or kill: the next call resumes where this one stopped, on the same server,
and ``--discard`` throws away what is there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import click
from psycopg2 import OperationalError as DriverError
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.exc import OperationalError

from bench.report import RESULTS, say, table, write_part
from bench.stage import SETTINGS, Stage, live_application
from bench.tools import ToolError, chronos
from chronos.db import connect_engine, execute
from chronos.demo.embedded import EmbeddedPostgres
from chronos.demo.rows import tables_statement

TITLE = "At the largest size"
PLACE = Path(".run") / "bench-scale.json"

_DAYS = 14  # all of them within retention
_ROWS_A_STATEMENT = 250_000
_ROW_B = 210  # of the table with its indexes, as measured
_WAL_B = 16 * 2**30  # max_wal_size

# {first} to {last} of {rows}, spread evenly over the days before {now}.
_FILL = """
INSERT INTO webhook_log (id, request_body, status, status_code, "timestamp", webhook_endpoint_id)
SELECT n, jsonb_build_object('event', md5(n::text)), 'success', 200,
       '{now}'::timestamptz - ({rows} - n) * interval '{days} days' / {rows}, 1 + n % 40
FROM generate_series({first}, {last}) AS n
"""
_INDEXES = """
CREATE UNIQUE INDEX IF NOT EXISTS webhook_log_pkey ON webhook_log (id);
CREATE INDEX IF NOT EXISTS ix_webhook_log_timestamp ON webhook_log ("timestamp");
CREATE INDEX IF NOT EXISTS ix_webhook_log_webhook_endpoint_id ON webhook_log (webhook_endpoint_id);
SELECT setval('webhook_log_id_seq', {rows})
"""
_CONSTRAINTS = """
ALTER TABLE webhook_log ADD PRIMARY KEY USING INDEX webhook_log_pkey;
ALTER TABLE webhook_log ADD CONSTRAINT webhook_log_webhook_endpoint_id_fkey
    FOREIGN KEY (webhook_endpoint_id) REFERENCES webhook_endpoint (id)
"""


@dataclass
class Progress:
    """What is kept in a file between calls."""

    rows: int
    strategy: str
    now: str
    url: str = ""
    stop: str = ""
    filled: int = 0
    indexed: bool = False
    calls: int = 0
    migrating_s: float = 0.0
    wal: int = 0
    writer_s: float = 0.0
    reader_s: float = 0.0
    steps: dict[str, float] = field(default_factory=dict)

    def save(self, place: Path) -> None:
        """Replace the file ``place``, all or nothing."""
        place.parent.mkdir(parents=True, exist_ok=True)
        new = place.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_text(json.dumps(asdict(self), indent=1), "utf-8")
        new.replace(place)


@click.command()
@click.option("--rows", type=click.IntRange(100_000), default=72_000_000, show_default=True)
@click.option("--strategy", type=click.Choice(["copy", "attach"]), default="copy", show_default=True)
@click.option("--discard", is_flag=True, help="Stop the server of an interrupted run, and forget the run.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS)
def main(rows: int, strategy: str, discard: bool, output: Path) -> None:
    """Make ROWS narrow rows and migrate them under a live application; first says how much disk it needs."""
    progress = _found(PLACE)
    if discard:
        if progress:
            _end(progress)
        return
    if progress and (progress.rows, progress.strategy) != (rows, strategy):
        click.echo(
            f"a run with {progress.rows:,} rows and --strategy {progress.strategy} is unfinished: resume it"
            f" (ROWS={progress.rows}), or discard it: python -m bench.scale --discard",
            err=True,
        )
        sys.exit(2)
    if progress is None:
        _require_disk(rows, strategy)
        progress = Progress(rows, strategy, datetime.now(UTC).isoformat())
        with EmbeddedPostgres(SETTINGS, keep=True) as server:
            progress.url, progress.stop = server.url, server.stop_command
            progress.save(PLACE)
    else:
        say(f"resuming with {rows:,} rows where the last run stopped")
    engine = connect_engine(make_url(progress.url))
    with engine.connect() as conn:
        conn.execution_options(isolation_level="AUTOCOMMIT", no_parameters=True)
        _make(conn, progress)
        before = _size(conn)
    _migrate(engine, progress)
    with engine.connect() as conn:
        after = _size(conn)
        migrated = int(conn.exec_driver_sql("SELECT count(*) FROM webhook_log").scalar_one())
    _write(output, Stage(progress.url).describe(), progress, migrated, before, after)
    _end(progress)


def _found(place: Path) -> Progress | None:
    """The interrupted run, if its server is still running."""
    if not place.exists():
        return None
    progress = Progress(**json.loads(place.read_text("utf-8")))
    try:
        with connect_engine(make_url(progress.url)).connect():
            return progress
    except (OperationalError, DriverError):
        say("the server of the last run is gone, and its rows with it: starting over")
        place.unlink()
        return None


def _end(progress: Progress) -> None:
    subprocess.run(progress.stop, shell=True, check=False)
    PLACE.unlink(missing_ok=True)


def _require_disk(rows: int, strategy: str) -> None:
    """Say how much disk is needed; exit 2 if that much is not free."""
    table_b = rows * _ROW_B
    copy_b = table_b if strategy == "copy" else rows * 31
    need = table_b + copy_b + _WAL_B
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    say(
        f"{rows:,} rows need about {need / 1e9:.0f} GB in {folder}: {table_b / 1e9:.1f} GB for the table,"
        f" {copy_b / 1e9:.1f} GB for its {strategy}, at most {_WAL_B / 1e9:.0f} GB for WAL;"
        f" {free / 1e9:.0f} GB are free"
    )
    if need > free:
        say("that is too little: set TMPDIR to a larger disk, or use fewer ROWS; nothing was done")
        sys.exit(2)


def _make(conn: Connection, progress: Progress) -> None:
    """Make the table with its rows and indexes, from where the last call stopped."""
    rows = progress.rows
    if progress.indexed:
        return
    if conn.exec_driver_sql("SELECT to_regclass('webhook_log') IS NULL").scalar_one():
        execute(conn, tables_statement())
    last = int(conn.exec_driver_sql("SELECT coalesce(max(id), 0) FROM webhook_log").scalar_one())
    progress.filled = max(progress.filled, last)
    while progress.filled < rows:
        first, progress.filled = progress.filled + 1, min(progress.filled + _ROWS_A_STATEMENT, rows)
        conn.exec_driver_sql(
            _FILL.format(now=progress.now, rows=rows, days=_DAYS, first=first, last=progress.filled)
        )
        progress.save(PLACE)
        if progress.filled % (20 * _ROWS_A_STATEMENT) == 0:
            say(f"made {progress.filled:,} of {rows:,} rows")
    say("creating indexes")
    _each(conn, _INDEXES.format(rows=rows))
    keyed = (
        "SELECT EXISTS (SELECT FROM pg_constraint WHERE conrelid = 'webhook_log'::regclass AND contype = 'f')"
    )
    if not conn.exec_driver_sql(keyed).scalar_one():
        conn.exec_driver_sql(f"BEGIN; {_CONSTRAINTS}; COMMIT")
    conn.exec_driver_sql("VACUUM ANALYZE webhook_log")
    conn.exec_driver_sql("CHECKPOINT")
    progress.indexed = True
    progress.save(PLACE)


def _each(conn: Connection, script: str) -> None:
    for text in script.split(";\n"):
        conn.exec_driver_sql(text)


def _migrate(engine: Engine, progress: Progress) -> None:
    """Migrate, or finish migrating; the time is the total of all calls."""
    with engine.connect() as conn:
        state = "SELECT to_regclass('webhook_log_migration') IS NOT NULL"
        resumed = bool(conn.exec_driver_sql(state).scalar_one())
        wal = _wal(conn)
    say("resuming the migration" if resumed else "migrating")
    report = PLACE.with_name("bench-scale-report.json").absolute()
    words = ["migrate", *(["--resume"] if resumed else ["--strategy", progress.strategy])]
    progress.calls += 1
    progress.save(PLACE)
    started = time.monotonic()
    try:
        with live_application(engine) as waits:
            chronos(engine, *words, "--report", str(report))
    except ToolError as error:
        say(f"{error}; to resume, run the same command again")
        sys.exit(3)
    finally:
        progress.migrating_s += time.monotonic() - started
        with engine.connect() as conn:
            progress.wal += _wal(conn) - wal
        progress.save(PLACE)
    progress.writer_s, progress.reader_s = waits.writer_s, waits.reader_s
    found = json.loads(report.read_text("utf-8"))
    progress.steps = {str(step["step"]): step["seconds"] for step in found["steps"]}
    report.unlink()


def _number(text: str) -> Callable[[Connection], int]:
    return lambda conn: int(conn.exec_driver_sql(text).scalar_one())


_size = _number("SELECT pg_database_size(current_database())")
_wal = _number("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint")


def _write(
    output: Path, about: list[str], progress: Progress, migrated: int, before: int, after: int
) -> None:
    """Write the newest run, below a line for each earlier one."""
    head = (
        *("run", "rows", "minutes", "rows/s", "steps 3 and 5, s", "WAL", "disk before", "disk after"),
        *("writer waited, ms", "reader waited, ms", "calls"),
    )
    run = (
        f"{datetime.now(UTC):%Y-%m-%d}, {progress.strategy}",
        f"{migrated:,}",
        f"{progress.migrating_s / 60:.1f}",
        f"{migrated / progress.migrating_s:,.0f}",
        # An interrupted call leaves no times.
        f"{progress.steps['3'] + progress.steps['5']:.0f}" if progress.calls == 1 else "",
        f"{progress.wal / 1e9:.1f} GB",
        f"{before / 1e9:.1f} GB",
        f"{after / 1e9:.1f} GB",
        f"{progress.writer_s * 1000:.0f}",
        f"{progress.reader_s * 1000:.0f}",
        f"{progress.calls}",
    )
    lines = [
        *(f"- {line}" for line in about),
        f"- `make bench-scale ROWS=72000000`: narrow rows over {_DAYS} days, all within retention, under the"
        " same live application as above; minutes are those of the whole migration, startup and statistics"
        " included. More than one call: the run was stopped and resumed.",
        "",
    ]
    write_part(output, TITLE, [*lines, *table(head, [*_earlier(output, head), run])])


def _earlier(output: Path, head: tuple[str, ...]) -> list[list[str]]:
    """The runs that the part already lists."""
    text = output.read_text("utf-8") if output.exists() else ""
    part = text.partition(f"# {TITLE}\n")[2].partition("\n# ")[0]
    rows = [line.strip("| \n").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    return [row for row in rows if len(row) == len(head) and row[0] != head[0]]


if __name__ == "__main__":
    main()
