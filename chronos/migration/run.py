"""The migration from its first look to its last line: the six steps in order, and the way back from each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from chronos.db import (
    ShortTransactions,
    discard,
    execute,
    is_disconnect,
    joined,
    one_line,
    opened,
    statement,
    transaction,
)
from chronos.errors import (
    ChronosError,
    CutShortError,
    InterruptedRunError,
    LockUnavailableError,
    NeedsPersonError,
    RefusedError,
    SupersededError,
)
from chronos.migration import state as migration_state
from chronos.migration.copy import (
    Copy,
    Manner,
    close_history,
    final_statistics,
    open_history,
    rows_per_day,
    verify_live_day,
)
from chronos.migration.operator import AN_HOUR, Operator, StopRequestedError, sole_operator
from chronos.migration.output import RowCount, Summary
from chronos.migration.pace import Lag, Pacer, ReplicaLag
from chronos.migration.preflight import COMMAND, Survey, first_state, survey
from chronos.migration.rollback import UNDO, definitions, roll_back, tidy_up
from chronos.migration.state import Phase, State
from chronos.migration.swap import (
    change_log_statements,
    function_statements,
    parent_statements,
    partition_statements,
    state_statements,
    swap_tables,
)
from chronos.migration.table_shape import TableShape
from chronos.migration.table_shape import read as read_shape
from chronos.migration.verify import beyond_the_fence
from chronos.partitions import (
    DAYS_BACK,
    OLD_TABLE,
    TABLE,
    days,
    partition_name,
)
from chronos.telemetry import span

_STEPS = {
    1: "Renaming existing webhook_log table",
    2: "Creating new partitioned table",
    3: "Creating partitions",
    4: f"Migrating data from last {DAYS_BACK} days",
    5: "Creating partition management functions",
    6: "Verifying migration",
}


@dataclass(frozen=True)
class Options:
    """What the operator asked for. ``workers`` days are copied at a time; ``content`` false counts only.

    ``rate_limit`` is in rows a second over all workers, ``max_replica_lag`` in seconds; None: no limit.
    """

    resume: bool = False
    batch_size: int = 1_000
    workers: int = 2
    content: bool = True
    rate_limit: int | None = None
    max_replica_lag: float | None = None
    report: Path | None = None
    reconnect_s: float = 30.0


@dataclass
class Timings:
    """Seconds spent in each step, over everything that belongs to it."""

    seconds: dict[int, float] = field(default_factory=dict)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Add the duration of the block to the step, and put a span around it."""
        started = time.monotonic()
        try:
            with span("migration step {number}: {step}", number=number, step=_STEPS[number]):
                yield
        finally:
            spent = time.monotonic() - started
            self.seconds[number] = self.seconds.get(number, 0.0) + spent


def migrate(engine: Engine, options: Options, operator: Operator, confirm: Callable[[Survey], None]) -> None:
    """Turn webhook_log into daily partitions, or carry on where an earlier run was cut off.

    ``confirm`` is shown what was found and raises RefusedError to call it off. Each error raised is
    a ChronosError whose message says what state the tables are in.
    """
    with sole_operator(engine) as (conn, schema):
        run = _Run(engine, schema, options, operator)
        if options.max_replica_lag is not None:
            ReplicaLag(conn)()  # refuses here, before anything is changed, what it cannot see
        if options.resume:
            run.take_over(conn)
        else:
            run.prepare(_look(conn, schema, operator, confirm))
        operator.output.banner("Starting PostgreSQL Partitioning Migration")
        run.forward(conn)


def _look(conn: Connection, schema: str, operator: Operator, confirm: Callable[[Survey], None]) -> Survey:
    """Survey the table and have the operator confirm; what a manual rollback left over goes first."""

    def look() -> Survey:
        with transaction(conn):
            execute(conn, statement("SET TRANSACTION READ ONLY"))
            return survey(conn, schema)

    found = look()
    with transaction(conn):
        earlier = migration_state.read(conn, schema)
        by_hand = earlier is not None and migration_state.undone_by_hand(conn, schema, earlier)
    if earlier is not None and by_hand:
        operator.output.line(f"An earlier migration of {TABLE} was undone by hand; its remains go first.")
        confirm(found)
        with transaction(conn):
            earlier = migration_state.take_over(conn, schema, earlier)
        tidy_up(conn, schema, earlier, operator.short())
        found = look()
    if found.blockers:
        raise RefusedError("; ".join((*found.blockers, f"{TABLE} was not changed")))
    if not by_hand:
        confirm(found)
    return found


class _Run:
    """One run: its connection, its state in the database, and what it has to report."""

    def __init__(self, engine: Engine, schema: str, options: Options, operator: Operator) -> None:
        self.engine = engine
        self.schema = schema
        self.options = options
        self.operator = operator
        self.output = operator.output
        self.timings = Timings()
        self.step = 1
        self.shape: TableShape
        self.state: State
        self.longest_lock_s = 0.0
        self.wal_start: str | None = None
        self.rows: dict[date, int] = {}

    def prepare(self, found: Survey) -> None:
        """Fix the window, from the server's clock, once."""
        assert found.shape is not None
        self.shape = found.shape
        self.state = first_state(found)

    def take_over(self, conn: Connection) -> None:
        """Make an interrupted migration this run's own."""
        with transaction(conn):
            found = migration_state.read(conn, self.schema)
            if found is None:
                raise RefusedError(f"there is nothing to resume; nothing was changed. Start with: {COMMAND}")
            if found.phase is Phase.MIGRATED:
                raise RefusedError(
                    f"{TABLE} is migrated already; nothing was changed. See python -m chronos status"
                )
            if found.phase in (Phase.UNDOING, Phase.UNDONE):
                raise RefusedError(
                    f"this migration is being undone; nothing was changed. Finish with: {UNDO}"
                )
            now: date = execute(conn, statement("SELECT now()")).scalar_one().date()
            if found.phase is Phase.BUILT and now > found.last_day - timedelta(days=7):
                raise RefusedError(
                    f"what was built on {found.today} reaches to {found.last_day} only; nothing was changed."
                    f" Undo it with: {UNDO} --yes; then start again with: {COMMAND}"
                )
            self.state = migration_state.take_over(conn, self.schema, found)
            self.shape = read_shape(conn, self.schema, TABLE if found.phase is Phase.BUILT else OLD_TABLE)

    def forward(self, conn: Connection) -> None:
        """The six steps; on failure, the way back. Once they are done, no failure leads back."""
        try:
            self._forward(conn)
        except (StopRequestedError, KeyboardInterrupt) as error:
            raise InterruptedRunError(self._cut_off("stopped as asked")) from error
        except SupersededError as error:
            raise InterruptedRunError(f"{error}; that run goes on") from error
        except (LockUnavailableError, CutShortError) as error:
            # After the swap the way back needs the same locks; what is copied is worth waiting for.
            if self.state.phase is not Phase.BUILT:
                raise InterruptedRunError(self._cut_off(str(error))) from error
            discard(conn)
            self._undo(error)
        except Exception as error:
            discard(conn)
            self._undo(error)
            with opened(self.engine) as again:
                self._finish(again)
        else:
            self._finish(conn)

    def _forward(self, conn: Connection) -> None:
        with transaction(conn):
            self.wal_start = execute(conn, statement("SELECT pg_current_wal_lsn()::text")).scalar_one()
        if self.state.phase is Phase.BUILT:
            self._swap(conn)
        else:
            self.output.line(f"Resuming: {TABLE} was renamed before, copying goes on")
        self._copy(conn)
        self._install_functions(conn)
        self._verify(conn)

    def _short(self) -> ShortTransactions:
        return self.operator.short(None if self.state.phase is Phase.BUILT else AN_HOUR)

    def _swap(self, conn: Connection) -> None:
        """Steps 1 to 3: all is built beforehand and takes effect in one transaction of renames."""
        self._open(1)
        schema = self.schema
        short = self._short()
        referred = [(key.schema, key.table) for key in self.shape.foreign_keys]

        def build(conn: Connection) -> None:
            with self._timed(2):
                execute(conn, joined(parent_statements(self.shape, self.state), ";\n"))
            with self._timed(3):
                execute(conn, joined(partition_statements(self.shape, self.state), ";\n"))
            with self._timed(1):
                execute(conn, joined(change_log_statements(self.shape), ";\n"))
                before = list(definitions(conn, schema).values())
                first = replace(self.state, functions=before)
                execute(conn, joined(state_statements(self.shape, first), ";\n"))

        def swap(conn: Connection) -> None:
            migration_state.claim(conn, schema, self.state.run_id)
            swap_tables(conn, self.shape, self.state, short)

        with transaction(conn):
            built = migration_state.read(conn, schema) is not None
        if not built:
            self._short().run(conn, build, tables=[(schema, TABLE), *referred])
        self.operator.check_stop()
        with self._timed(1):
            short.run(conn, swap, tables=[(schema, TABLE)])
        self.longest_lock_s = max(self.longest_lock_s, short.longest_s)
        self._refresh(conn)

        self.output.ok(f"Table renamed: {TABLE} -> {OLD_TABLE}")
        self._open(2)
        self.output.ok("Partitioned table created")
        self._open(3)
        for day in days(self.state.first_day, self.state.last_day):
            self.output.line(f"Created partition: {partition_name(day)} ({day} to {day + timedelta(days=1)})")
        self.output.ok("All partitions created")

    def _copy(self, conn: Connection) -> None:
        """Step 4."""
        self._open(4)
        with self._timed(4):
            with transaction(conn):
                rows = rows_per_day(conn, self.shape, self.state)
            self.rows = rows
            total = sum(rows.values())
            self.output.line(f"Total rows to migrate: {total:,}")
            short = self._short()
            open_history(conn, self.shape, self.state, short)
            history = days(self.state.first_day, self.state.today - timedelta(days=1))
            pending = sorted({*history, *rows} - set(self.state.days))
            done = sum(result.new_rows for result in self.state.days.values())
            with self.output.copying(total, done) as count, self._manner(count) as manner:
                copy = Copy(self.engine, self.shape, self.state, manner, self._short)
                self.longest_lock_s = max(self.longest_lock_s, copy.run(pending, self.options.workers))
            close_history(conn, self.shape, self.state, short)
            self.longest_lock_s = max(self.longest_lock_s, short.longest_s)
            self._refresh(conn)
        self.output.ok("Data migration complete")

    @contextmanager
    def _manner(self, count: RowCount) -> Iterator[Manner]:
        """How to copy, and whom to tell; replicas are watched over a connection of their own."""
        options = self.options
        with ExitStack() as watching:
            lag: Callable[[], Lag | None] = lambda: None  # noqa: E731
            if options.max_replica_lag is not None:
                lag = ReplicaLag(watching.enter_context(opened(self.engine)))
            pacer = Pacer(
                options.batch_size,
                rate_limit=options.rate_limit,
                max_lag=options.max_replica_lag,
                lag=lag,
                on_pause=count.pause,
            )
            yield Manner(
                pacer=pacer,
                content=options.content,
                check_stop=self.operator.check_stop,
                copied=lambda day, rows: count.add(day, rows, pacer.lag),
            )

    def _install_functions(self, conn: Connection) -> None:
        """Step 5."""
        self._open(5)
        with self._timed(5), transaction(conn):
            migration_state.claim(conn, self.schema, self.state.run_id)
            execute(conn, joined(function_statements(self.shape), ";\n"))
        self.output.ok("Management functions created")

    def _verify(self, conn: Connection) -> None:
        """Step 6. The days of the past were compared before they took their place; today is compared now."""
        self._open(6)
        with self._timed(6):
            for day in sorted(self.rows):
                if day >= self.state.today and day not in self.state.days:
                    verify_live_day(conn, self.shape, self.state, day, content=self.options.content)
            self._refresh(conn)
            # Without the rows that the application has changed or deleted itself before they were compared.
            old = sum(result.old_rows for result in self.state.days.values())
            new = sum(result.new_rows for result in self.state.days.values())
            self.output.line(f"Old table (last {DAYS_BACK} days): {old:,} rows")
            self.output.line(f"New table: {new:,} rows")
            for day in sorted(self.rows.keys() - self.state.days.keys()):
                raise ChronosError(f"verification failed for {day}: its rows were not compared")
            with transaction(conn):
                migration_state.claim(conn, self.schema, self.state.run_id)
                late = beyond_the_fence(conn, self.schema, self.state)
                if late:
                    raise ChronosError(f"{late:,} rows were written to {OLD_TABLE} after the swap")
                migration_state.update(conn, self.schema, phase=Phase.MIGRATED.value, window_rows=old)
            self._refresh(conn)
        what = "row counts and contents match" if self.options.content else "row counts match"
        self.output.ok(f"Verification passed: {what}")

    def _finish(self, conn: Connection) -> None:
        """Statistics, the report, the last lines; the migration is done whatever becomes of these."""
        try:
            with opened(self.engine) as analyzing:
                analyzing = analyzing.execution_options(isolation_level="AUTOCOMMIT")
                live = [day for day in self.rows if day >= self.state.today]
                execute(analyzing, final_statistics(analyzing, self.shape, live))
        except DBAPIError as error:
            self.output.line(f"Statistics could not be gathered ({one_line(error)}); run: ANALYZE {TABLE};")
        wal_bytes = None
        with suppress(DBAPIError), transaction(conn):
            wal_bytes = execute(
                conn,
                statement(
                    "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), {start}::pg_lsn)::bigint",
                    start=self.wal_start,
                ),
            ).scalar_one()
        found = Summary(
            steps=[(step, self.timings.seconds.get(number, 0.0)) for number, step in _STEPS.items()],
            days=self.state.days,
            copied=sum(result.new_rows for result in self.state.days.values()),
            wal_bytes=wal_bytes,
            lock_s=self.longest_lock_s,
        )
        if self.options.report:
            self._write_report(found, self.options.report)
        self.output.line()
        self.output.banner("MIGRATION COMPLETED SUCCESSFULLY!")
        self.output.summary(found)

    def _write_report(self, found: Summary, path: Path) -> None:
        report: dict[str, Any] = {
            "strategy": self.state.strategy,
            "cutoff": self.state.cutoff.isoformat(),
            "fence": self.state.fence,
            "steps": [
                {"step": number, "name": step, "seconds": round(seconds, 3)}
                for number, (step, seconds) in enumerate(found.steps, 1)
            ],
            "rows_copied": found.copied,
            "wal_bytes": found.wal_bytes,
            "longest_lock_wait_seconds": round(found.lock_s, 4),
            "days": [
                {"day": day.isoformat(), **asdict(result)} for day, result in sorted(found.days.items())
            ],
        }
        try:
            path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            self.output.line(f"The report could not be written to {path}: {error.strerror}")

    def _refresh(self, conn: Connection) -> None:
        with transaction(conn):
            found = migration_state.read(conn, self.schema)
        if found is None or found.run_id != self.state.run_id:
            raise SupersededError("another run has taken this migration over")
        self.state = found

    def _open(self, number: int) -> None:
        self.step = number
        self.output.step(number, _STEPS[number])

    @contextmanager
    def _timed(self, number: int) -> Iterator[None]:
        self.step = number
        with self.timings.step(number):
            yield

    def _cut_off(self, why: str) -> str:
        return (
            f"{why} in step {self.step}; nothing is lost, and the application can go on writing."
            f" Carry on with: {COMMAND} --resume; or undo it with: {UNDO}"
        )

    def _undo(self, error: Exception) -> None:
        """Bring everything back after a failure, over a new connection, and raise.

        Returns only if the migration turns out to be complete: its last commit may have been made
        though we were never told.
        """
        what = f"step {self.step} ({_STEPS[self.step]}) failed: {one_line(error)}"
        self.output.line()
        self.output.line(f"{what}.")
        try:
            conn = self._reconnect()
        except DBAPIError as gone:
            raise InterruptedRunError(
                self._cut_off(f"{what}, and the server cannot be reached ({one_line(gone)})")
            ) from error
        try:
            try:
                found = migration_state.own(conn, self.schema, self.state.run_id)
                if found is not None and found.phase is Phase.MIGRATED:
                    self.state = found
                    self.output.line("All was in its place by then; nothing is undone.")
                    return
                if found is not None:
                    self.output.line("Rolling back...")
                    short = self.operator.short(may_stop=False)
                    roll_back(conn, self.shape, found, short)
            finally:
                discard(conn)
        except SupersededError as other:
            raise InterruptedRunError(f"{what}; {other}, and that run goes on") from error
        except Exception as second:
            why = f"{what}, and so did the rollback: {one_line(second)}"
            if is_disconnect(second):
                raise InterruptedRunError(self._cut_off(why)) from error
            raise NeedsPersonError(
                f"{why}. {migration_state.where(self.engine, self.schema)} No row is lost."
                f" Remove the cause, then type: {UNDO}"
            ) from error
        raise ChronosError(
            f"{what}; rolled back: {TABLE} is the plain table it was, with every row. Remove the"
            " cause and start again"
        ) from error

    def _reconnect(self) -> Connection:
        """A new connection; a server that restarts gets ``reconnect_s`` seconds to come back."""
        deadline = time.monotonic() + self.options.reconnect_s
        while True:
            try:
                return self.engine.connect()
            except DBAPIError:
                if time.monotonic() >= deadline:
                    raise
                self.operator.patience.sleep(0.5)
