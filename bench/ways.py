"""The ways compared: how to fill the partitions, and how to remove a day."""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from sqlalchemy.engine import Connection, Engine

from bench.stage import Work
from chronos.migration.console import Output
from chronos.migration.operator import Operator
from chronos.migration.run import Options, migrate
from chronos.migration.state import Strategy
from chronos.table import WEBHOOK_LOG

DELETE_BATCH = 10_000

_OFFSET_BATCH = 1_000
_OFFSET_ROWS = 50_000
_PGSLICE_BATCH = 10_000

_WINDOW = "\"timestamp\" >= now() - interval '15 days'"

_REWRITE = (
    f"CREATE TABLE rewritten AS SELECT * FROM webhook_log WHERE {_WINDOW}",
    'ALTER TABLE rewritten ADD PRIMARY KEY (id, "timestamp")',
    'CREATE INDEX ON rewritten ("timestamp")',
    "CREATE INDEX ON rewritten (webhook_endpoint_id)",
    "ALTER TABLE rewritten ADD FOREIGN KEY (webhook_endpoint_id) REFERENCES webhook_endpoint (id)",
)

# The finished partitioned table: its keys and indexes exist before the first row.
_FINISHED = """
CREATE TABLE finished (LIKE webhook_log INCLUDING DEFAULTS, PRIMARY KEY (id, "timestamp"))
    PARTITION BY RANGE ("timestamp");
CREATE INDEX ON finished ("timestamp");
CREATE INDEX ON finished (webhook_endpoint_id);
ALTER TABLE finished ADD FOREIGN KEY (webhook_endpoint_id) REFERENCES webhook_endpoint (id);
SET TIME ZONE 'UTC';
DO $$
DECLARE
    day date;
BEGIN
    FOR day IN SELECT current_date + n FROM generate_series(-15, 30) AS n LOOP
        EXECUTE format('CREATE TABLE %I PARTITION OF finished FOR VALUES FROM (%L) TO (%L)',
                       'finished_' || day, day, day + 1);
    END LOOP;
END
$$
"""


def plain_rewrite(engine: Engine) -> tuple[int, float]:
    """The same end state without partitions: the rows, then key, indexes and foreign key."""
    with _autocommit(engine) as conn:
        started = time.monotonic()
        for statement in _REWRITE:
            conn.exec_driver_sql(statement)
        seconds = time.monotonic() - started
        return _count(conn, "rewritten"), seconds


def one_insert(engine: Engine) -> tuple[int, float]:
    """Everything in one statement into the finished table."""

    def fill(conn: Connection) -> None:
        conn.exec_driver_sql(f"INSERT INTO finished SELECT * FROM webhook_log WHERE {_WINDOW}")

    return _into_finished(engine, fill)


def pgslice(engine: Engine) -> tuple[int, float]:
    """Batches of 10,000 ids, as pgslice fills its partitions."""

    def fill(conn: Connection) -> None:
        after, last = conn.exec_driver_sql(
            f"SELECT min(id) - 1, max(id) FROM webhook_log WHERE {_WINDOW}"
        ).one()
        while after < last:
            conn.exec_driver_sql(
                "INSERT INTO finished SELECT * FROM webhook_log"
                f" WHERE id > {after} AND id <= {after + _PGSLICE_BATCH} AND {_WINDOW}"
            )
            after += _PGSLICE_BATCH

    return _into_finished(engine, fill)


def limit_offset(engine: Engine) -> tuple[int, float]:
    """Batches of 1,000 with LIMIT and OFFSET; only the first of them, as it gets slower and slower."""

    def fill(conn: Connection) -> None:
        for offset in range(0, _OFFSET_ROWS, _OFFSET_BATCH):
            conn.exec_driver_sql(
                f"INSERT INTO finished SELECT * FROM webhook_log WHERE {_WINDOW}"
                f" ORDER BY id LIMIT {_OFFSET_BATCH} OFFSET {offset}"
            )

    return _into_finished(engine, fill)


def our_copy(workers: int = 2, *, content: bool = True) -> Work:
    """The whole migration, timed by its steps 3 and 5: from counting the rows to the comparison."""

    def way(engine: Engine) -> tuple[int, float]:
        rows, steps = _migrated(engine, Options(workers=workers, content=content))
        return rows, steps[3] + steps[5]

    return way


def whole_copy(engine: Engine) -> tuple[int, float]:
    """The whole migration, all six steps."""
    rows, steps = _migrated(engine, Options())
    return rows, sum(steps.values())


@dataclass
class Adoption:
    """The same without copying; then ``steps`` has the seconds of each step, ``index`` the index's bytes."""

    steps: dict[int, float] = field(default_factory=dict)
    index: int = 0

    def __call__(self, engine: Engine) -> tuple[int, float]:
        """Migrate; returns rows and seconds like the other ways."""
        _, self.steps = _migrated(engine, Options(strategy=Strategy.ATTACH))
        with _autocommit(engine) as conn:
            self.index = conn.exec_driver_sql(
                "SELECT pg_relation_size('webhook_log_history_pkey')"
            ).scalar_one()
            return _count(conn, "webhook_log_history"), sum(self.steps.values())


def _migrated(engine: Engine, options: Options) -> tuple[int, dict[int, float]]:
    """How many rows were copied, and how many seconds each step took."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        migrate(
            engine,
            WEBHOOK_LOG,
            replace(options, report=report),
            Operator(Output(Console(file=io.StringIO()))),
            lambda found: None,
        )
        found = json.loads(report.read_text("utf-8"))
    return found["happened"]["rows"] or 0, {step["step"]: step["seconds"] for step in found["steps"]}


def _into_finished(engine: Engine, fill: Callable[[Connection], None]) -> tuple[int, float]:
    with _autocommit(engine) as conn:
        conn.exec_driver_sql(_FINISHED)
        started = time.monotonic()
        fill(conn)
        seconds = time.monotonic() - started
        return _count(conn, "finished"), seconds


@contextmanager
def _autocommit(engine: Engine) -> Iterator[Connection]:
    with engine.connect() as conn:
        yield conn.execution_options(isolation_level="AUTOCOMMIT", no_parameters=True)


def _count(conn: Connection, table: str) -> int:
    return int(conn.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one())


def delete_day(engine: Engine, age: int) -> tuple[int, float]:
    """DELETE, in batches, the rows logged ``age`` days ago."""
    rows = 0
    with _autocommit(engine) as conn:
        conn.exec_driver_sql("SET TIME ZONE 'UTC'")
        started = time.monotonic()
        while True:
            batch = conn.exec_driver_sql(
                "DELETE FROM webhook_log WHERE id IN (SELECT id FROM webhook_log"
                f' WHERE "timestamp" >= current_date - {age} AND "timestamp" < current_date - {age - 1}'
                f" LIMIT {DELETE_BATCH})"
            ).rowcount
            if not batch:
                return rows, time.monotonic() - started
            rows += batch


def drop_day(engine: Engine, age: int) -> tuple[int, float]:
    """Drop the partition of ``age`` days ago, which must be the oldest."""
    with _autocommit(engine) as conn:
        conn.exec_driver_sql("SET TIME ZONE 'UTC'")
        leaf = conn.exec_driver_sql(
            f"""SELECT 'webhook_log_y' || to_char(current_date - {age}, 'YYYY"m"MM"d"DD')"""
        ).scalar_one()
        rows = _count(conn, leaf)
        started = time.monotonic()
        dropped = conn.exec_driver_sql(f"SELECT drop_old_webhook_log_partitions({age - 1})").scalars().all()
        seconds = time.monotonic() - started
        if dropped != [leaf]:
            raise RuntimeError(f"dropped {dropped}, not {leaf}")
        return rows, seconds
