"""What living with the table costs: inserts and queries, before, during and after."""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg2
from psycopg2.extensions import connection
from sqlalchemy.engine import Engine

from chronos.demo.binaries import EmbeddedServerError, find_postgres

CLIENTS = 2

# The application's own row: all columns, about 300 bytes. For pgbench and for psycopg2.
_INSERT = """
INSERT INTO webhook_log (request_headers, request_body, status, status_code, "timestamp",
                         webhook_endpoint_id)
VALUES ('{{"User-Agent": "webhooks/2.4"}}', '{{"type": "order.paid", "id": "evt_0123456789abcdef"}}',
        'success', 200, now(), {endpoint})
"""

# The server's share alone: no round trips, no waiting for the disk.
_LOOP = """
DO $$
BEGIN
    FOR n IN 1..{rows} LOOP
        INSERT INTO webhook_log (status, status_code, "timestamp", webhook_endpoint_id)
        VALUES ('measured', 200, clock_timestamp(), 1);
    END LOOP;
END
$$
"""
_LOOP_ROWS = 20_000

# Run repeatedly, with new values each time; those with a time condition need few partitions.
QUERIES = {
    "pruned: today's newest 50": (
        "SELECT * FROM webhook_log WHERE \"timestamp\" >= date_trunc('day', now(), 'UTC')"
        ' ORDER BY "timestamp" DESC LIMIT 50'
    ),
    "pruned: an hour of a past day, counted": (
        "SELECT count(*) FROM webhook_log WHERE \"timestamp\" >= date_trunc('day', now(), 'UTC')"
        " - interval '{day} days' AND \"timestamp\" < date_trunc('day', now(), 'UTC')"
        " - interval '{day} days' + interval '1 hour'"
    ),
    "pruned: one row by id and time": (
        "SELECT * FROM webhook_log WHERE id = {key} AND \"timestamp\" >= now() - interval '2 days'"
    ),
    "not pruned: one row by id": "SELECT * FROM webhook_log WHERE id = {key}",
    "not pruned: the newest 50 of an endpoint": (
        'SELECT * FROM webhook_log WHERE webhook_endpoint_id = {endpoint} ORDER BY "timestamp" DESC LIMIT 50'
    ),
}
_ASKED = 60


@dataclass(frozen=True)
class Inserts:
    """Latencies in seconds, inserts a second over all connections, and the server's share of one insert."""

    median_s: float
    late_s: float  # 99th percentile
    rate: float
    server_s: float


def pgbench() -> Path | None:
    """The path of pgbench, beside the server's programs or on PATH; None if it is not installed."""
    try:
        beside = find_postgres() / "pgbench"
    except EmbeddedServerError:
        beside = Path("pgbench")
    found = shutil.which(beside) or shutil.which("pgbench")
    return Path(found) if found else None


def inserts(engine: Engine, seconds: float) -> Inserts:
    """What an insert costs, each in its own transaction that waits for the disk."""
    program = pgbench()
    took = _by_pgbench(program, engine, seconds) if program else _by_psycopg2(engine, seconds)
    took.sort()
    return Inserts(
        statistics.median(took), took[len(took) * 99 // 100], len(took) / seconds, _server_seconds(engine)
    )


def _by_pgbench(program: Path, engine: Engine, seconds: float) -> list[float]:
    url = engine.url
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "insert.sql"
        text = " ".join(_INSERT.format(endpoint=":endpoint").split())
        script.write_text(f"\\set endpoint random(1, 40)\n{text};\n", "utf-8")
        subprocess.run(
            [
                *(str(program), "--no-vacuum", "--protocol=prepared", f"--file={script}", "--log"),
                *(f"--client={CLIENTS}", f"--time={seconds:.0f}", f"--log-prefix={folder}/log"),
                *(f"--host={url.host}", f"--port={url.port or 5432}", f"--username={url.username}"),
                str(url.database),
            ],
            env=os.environ | {"PGPASSWORD": str(url.password or "")},
            capture_output=True,
            check=True,
        )
        lines = [line for log in Path(folder).glob("log*") for line in log.read_text().splitlines()]
    return [int(line.split()[2]) / 1e6 for line in lines]


def _by_psycopg2(engine: Engine, seconds: float) -> list[float]:
    took: list[list[float]] = [[] for _ in range(CLIENTS)]

    def work(mine: list[float]) -> None:
        with _session(engine) as session, session.cursor() as cur:
            cur.execute(f"PREPARE put AS {_INSERT.format(endpoint='$1')}")
            ends = time.monotonic() + seconds
            while (began := time.monotonic()) < ends:
                cur.execute("EXECUTE put (%s)", (random.randint(1, 40),))
                mine.append(time.monotonic() - began)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in took]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [one for mine in took for one in mine]


def _server_seconds(engine: Engine) -> float:
    """The median of three runs: ``_LOOP_ROWS`` single-row inserts, in one transaction."""
    costs = []
    with _session(engine) as session, session.cursor() as cur:
        for _ in range(3):
            started = time.monotonic()
            cur.execute(_LOOP.format(rows=_LOOP_ROWS))
            costs.append((time.monotonic() - started) / _LOOP_ROWS)
    return statistics.median(costs)


def queries(engine: Engine) -> dict[str, float]:
    """The median latency, in seconds, of each of QUERIES, planning included."""
    chance = random.Random(1)
    found = {}
    with _session(engine) as session, session.cursor() as cur:
        cur.execute("SELECT max(id) FROM webhook_log")
        [last] = cur.fetchone() or (1,)
        for what, text in QUERIES.items():
            took = []
            for _ in range(_ASKED):
                key = chance.randint(last * 3 // 4, last)
                asked = text.format(key=key, day=chance.randint(1, 13), endpoint=chance.randint(1, 40))
                started = time.monotonic()
                cur.execute(asked)
                cur.fetchall()
                took.append(time.monotonic() - started)
            found[what] = statistics.median(took)
    return found


@contextmanager
def _session(engine: Engine) -> Iterator[connection]:
    dsn = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    session: connection = psycopg2.connect(dsn)
    session.autocommit = True
    try:
        yield session
    finally:
        session.close()
