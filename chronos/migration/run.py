"""The migration from start to finish: the six steps in order, and the way back from each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote
from typing import Any
from uuid import uuid4

from psycopg2 import errorcodes
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from chronos.catalog.ddl import autovacuum_as_before_statements
from chronos.commands import migrate as migrate_command
from chronos.commands import rollback as rollback_command
from chronos.commands import start as start_command
from chronos.commands import status as status_command
from chronos.db import (
    discard,
    execute,
    is_disconnect,
    joined,
    may_pass,
    one_line,
    opened,
    sqlstate,
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
    ShapeError,
    StrayRowError,
    SupersededError,
)
from chronos.functions import definitions, function_statements
from chronos.migration import attach
from chronos.migration import state as states
from chronos.migration.build import begin_notes, build_parent, build_partitions, pending_periods
from chronos.migration.changes import replay_most, verified_statements
from chronos.migration.checks import Survey, first_plan, sent_again, survey
from chronos.migration.compare import VerificationError, compare_replayed
from chronos.migration.console import RowCount, Summary
from chronos.migration.context import Direction, Migration, read_plain
from chronos.migration.copy import Copying, copy_periods, rows_per_period
from chronos.migration.estimate import expected
from chronos.migration.foreign_keys import add_foreign_keys, drop_keys
from chronos.migration.obstacles import require_no_citus, require_nothing_kept
from chronos.migration.operator import (
    Operator,
    StopRequestedError,
    asking,
    resumable_with,
    sole_operator,
)
from chronos.migration.report import Ended, facts, require_writable, write_report
from chronos.migration.rollback import roll_back, stay, tidy_up
from chronos.migration.state import Phase, State, Strategy, phase_statement
from chronos.migration.statistics import gather_statistics
from chronos.migration.swap import swap
from chronos.migration.throttle import Lag, ReplicaLag, Throttle
from chronos.results import MigrationResult
from chronos.table import Period, TableSpec
from chronos.telemetry import span


@dataclass(frozen=True)
class Options:
    """What the operator asked for. ``workers`` periods are copied at a time; ``content`` false counts only.

    ``rate_limit`` is in rows per second over all workers, ``max_replica_lag`` and ``max_lock_wait`` in
    seconds; None: no limit. ``hold`` stops before the swap, with all else done. ``accept_duplicates`` are the
    replication slots whose readers may get rows twice. ``given`` names the options that the operator gave:
    they are kept with the migration, and a resumed run reuses them unless they are given again.
    """

    strategy: Strategy = Strategy.COPY
    resume: bool = False
    hold: bool = False
    batch_size: int = 1_000
    workers: int = 2
    content: bool = True
    rate_limit: int | None = None
    max_replica_lag: float | None = None
    report: Path | None = None
    max_lock_wait: float = 1.0
    reconnect_s: float = 30.0
    accept_duplicates: frozenset[str] = frozenset()
    given: frozenset[str] = frozenset()

    def kept(self) -> dict[str, Any]:
        """The options that a resumed run reuses, for the state."""
        found = {option: getattr(self, option) for option in sorted(self.given & _REPEATED.keys())}
        return {o: _as_json(v) for o, v in found.items()}

    def repeating(self, kept: dict[str, Any]) -> Options:
        """These options, plus those kept from an earlier run that were not given again."""
        before = {o: v for o, v in kept.items() if o in _REPEATED and o not in self.given}
        if "report" in before:
            before["report"] = Path(before["report"])
        if "accept_duplicates" in before:
            before["accept_duplicates"] = frozenset(before["accept_duplicates"])
        return replace(self, **before, given=self.given | before.keys())

    def __str__(self) -> str:
        """The given options, as typed."""
        return " ".join(
            f"{_REPEATED[option]} {quote(_as_typed(one))}"
            for option, value in self.kept().items()
            for one in (value if isinstance(value, list) else [value])
        )


# Least and most (None: no limit) of the options, and of settings given for a table that no file lists.
LIMITS: dict[str, tuple[float, float | None]] = {
    "retention_days": (0, 36_500),
    "ahead_days": (0, 3_650),
    "batch_size": (1, 1_000_000),
    "workers": (1, 16),
    "rate_limit": (1, None),
    "max_replica_lag": (0, None),
    "max_lock_wait": (0.05, 60),
}

_REPEATED = {
    "batch_size": "--batch-size",
    "workers": "--workers",
    "content": "--verify",
    "rate_limit": "--rate-limit",
    "max_replica_lag": "--max-replica-lag",
    "max_lock_wait": "--max-lock-wait",
    "accept_duplicates": "--accept-duplicates",
    "report": "--report",
}


def _as_json(value: Any) -> Any:
    if isinstance(value, frozenset):
        return sorted(value)
    return str(value.absolute()) if isinstance(value, Path) else value


def _as_typed(value: Any) -> str:
    if isinstance(value, bool):
        return "full" if value else "counts"
    return f"{value:g}" if isinstance(value, float) else str(value)


def step_titles(table: TableSpec, strategy: Strategy = Strategy.COPY) -> dict[int, str]:
    """What the six steps are called."""
    rows = "all data" if table.retention_days is None else f"data from last {table.retention_days} days"
    return {
        1: "Creating new partitioned table",
        2: "Creating partitions",
        3: "Adopting the existing rows" if strategy is Strategy.ATTACH else f"Migrating {rows}",
        4: "Creating partition management functions",
        5: "Verifying migration",
        6: f"Renaming existing {table} table",
    }


@dataclass
class Timings:
    """Seconds spent in each step, over all its parts."""

    titles: dict[int, str]
    seconds: dict[int, float] = field(default_factory=dict)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Add the duration of the block to the step, and put a span around it."""
        started = time.monotonic()
        try:
            with span("migration step {number}: {step}", number=number, step=self.titles[number]):
                yield
        finally:
            spent = time.monotonic() - started
            self.seconds[number] = self.seconds.get(number, 0.0) + spent


def migrate(
    engine: Engine,
    table: TableSpec,
    options: Options,
    operator: Operator,
    confirm: Callable[[Survey], None],
    confirm_resume: Callable[[State, Options], None] = lambda found, options: None,
) -> MigrationResult:
    """Turn the table into partitions, or carry on where an earlier run was interrupted.

    ``confirm`` gets what was found, ``confirm_resume`` how far the earlier run came and the options to carry
    on with; either raises RefusedError to call it off. Each error raised is a ChronosError whose message says
    what state the tables are in.
    """
    _require_possible(options)
    with sole_operator(engine, table) as (conn, table):
        if options.resume:
            migration, options = _take_over(engine, conn, table, options, operator, confirm_resume)
            if migration.state.phase is Phase.RETURNING:
                with resumable_with(
                    f"{migrate_command(table)} --resume", "end of the rollback", engine, table
                ):
                    stay(migration)
                operator.output.ok(f"Rollback called off; {table} stays partitioned")
                return _Run(migration, options).result()
        else:
            _require_lag_is_seen(conn, options)
            found = _look(engine, conn, table, operator, options, confirm)
            migration = _begin(engine, conn, operator, found, options)
        run = _Adoption if migration.plan.attaches else _Run
        return run(migration, options).forward()


def _require_possible(options: Options) -> None:
    """Raise RefusedError if the report could not be written, before anything is changed."""
    if options.report is not None:
        require_writable(options.report)


def _require_lag_is_seen(conn: Connection, options: Options) -> None:
    if options.max_replica_lag is not None:
        ReplicaLag(conn)()  # refuses now, before anything is changed, if it cannot see the lag


def _look(
    engine: Engine,
    conn: Connection,
    table: TableSpec,
    operator: Operator,
    options: Options,
    confirm: Callable[[Survey], None],
) -> Survey:
    """Survey the table and have the operator confirm; first remove what a manual rollback left behind."""

    def look() -> Survey:
        with transaction(conn):
            execute(conn, statement("SET TRANSACTION READ ONLY"))
            return survey(conn, table, options.strategy, options.accept_duplicates)

    found = look()
    with transaction(conn):
        earlier = states.read(conn, table)
        by_hand = earlier is not None and states.undone_by_hand(conn, earlier)
    if earlier is not None and by_hand:
        with transaction(conn):
            require_nothing_kept(conn, table)
        operator.output.line(
            f"An earlier migration of {table} was undone by hand; its remains are removed first."
        )
        confirm(found)
        with transaction(conn):
            earlier = states.take_over(conn, earlier)
        tidy_up(engine, conn, earlier, operator)
        found = look()
    if found.blockers:
        raise RefusedError("; ".join((*map(str, found.blockers), f"{table} was not changed")))
    if not by_hand:
        confirm(found)
    return found


def _begin(
    engine: Engine, conn: Connection, operator: Operator, found: Survey, options: Options
) -> Migration:
    """Fix the plan once, by the server's clock."""
    assert found.shape is not None
    with transaction(conn):
        functions = tuple(definitions(conn, found.spec).values())
    plan = replace(first_plan(found), functions=functions)
    state = State(uuid4(), Phase.BUILT, plan, options=options.kept())
    migration = Migration(engine, conn, operator, state, found.shape)
    if options.report:
        plan = replace(plan, expected=expected(migration, found))
        migration.state = replace(state, plan=plan)
    return migration


def _take_over(
    engine: Engine,
    conn: Connection,
    table: TableSpec,
    options: Options,
    operator: Operator,
    confirm: Callable[[State, Options], None],
) -> tuple[Migration, Options]:
    """Take over an interrupted migration once the operator confirms; with its options."""
    with transaction(conn):
        found = states.read(conn, table)
        if found is None:
            partitioned = states.relkind(conn, table.home, table.name) == "p"
            then = (
                f"{table} is partitioned already: {status_command(table)}"
                if partitioned
                else f"Start with: {start_command(table)}"
            )
            raise RefusedError(f"there is nothing to resume; nothing was changed. {then}")
        require_no_citus(conn, table)
        if (found.phase is Phase.MIGRATED and found.verified) or found.phase is Phase.FINALIZING:
            raise RefusedError(
                f"{table} is migrated already; nothing was changed. See {status_command(table)}"
            )
        if found.phase is Phase.UNDONE or (found.phase is Phase.RETURNING and not found.verified):
            raise RefusedError(
                f"this migration is being undone; nothing was changed. Finish with: {rollback_command(table)}"
            )
        now = execute(conn, statement("SELECT now()")).scalar_one()
        if found.plan.attaches and not found.phase.swapped and (found.plan.first - now).days < 1:
            raise RefusedError(
                f"the bound of this migration, {found.plan.first:%Y-%m-%d} UTC, is less than a day away;"
                f" nothing was changed. Undo it with: {rollback_command(table)} --yes; then start again with:"
                f" {start_command(table)} --strategy attach"
            )
        if not found.phase.swapped and (found.plan.end - now).days < min(7, table.ahead_days):
            raise RefusedError(
                f"the partitions built on {found.plan.started_at:%Y-%m-%d} end at {found.plan.end:%Y-%m-%d};"
                f" nothing was changed. Undo it with: {rollback_command(table)} --yes; then start again"
                f" with: {start_command(table)}"
            )
    options = options.repeating(found.options)
    _require_possible(options)
    _require_lag_is_seen(conn, options)
    if not found.phase.swapped and not found.plan.attaches:
        with transaction(conn):
            sent = sent_again(conn, table, now, options.accept_duplicates)
        if sent:
            raise RefusedError("; ".join((*map(str, sent), "nothing was changed")))
    with asking(conn, found.table):
        confirm(found, options)
    operator.patience = replace(operator.patience, longest_s=options.max_lock_wait)
    with transaction(conn):
        found = replace(states.take_over(conn, found), options=options.kept())
        execute(conn, states.options_statement(table, found.options))
        return Migration(engine, conn, operator, found, read_plain(conn, found)), options


class _Run:
    """One run: the migration that it owns, and what it reports."""

    def __init__(self, migration: Migration, options: Options) -> None:
        self.migration = migration
        self.options = options
        self.operator = migration.operator
        self.output = migration.operator.output
        self.table = migration.table
        self.titles = step_titles(self.table, migration.plan.strategy)
        self.timings = Timings(self.titles)
        self.step = 1
        self.wal_start: str | None = None
        self.held = False
        self.statistics_s: float | None = None
        self.written: Path | None = None
        self.began = datetime.now(UTC)
        self._started = time.monotonic()

    @property
    def phase(self) -> Phase:
        """How far the migration is, as far as this run knows."""
        return self.migration.state.phase

    def forward(self) -> MigrationResult:
        """The six steps; on failure, the way back. Once they are done, no failure undoes them.

        The report is written however it ends.
        """
        try:
            return self._there_or_back()
        except ChronosError as error:
            self._report_partly(error)
            raise

    def _there_or_back(self) -> MigrationResult:
        try:
            self._forward()
        except (StopRequestedError, KeyboardInterrupt) as error:
            raise InterruptedRunError(self._cut_off("stopped as asked")) from error
        except SupersededError as error:
            raise InterruptedRunError(f"{error}; that run continues") from error
        except (LockUnavailableError, CutShortError, StrayRowError) as error:
            # The copy is worth keeping: all it needs is a lock, or a corrected row.
            if self.phase is not Phase.BUILT:
                raise InterruptedRunError(self._cut_off(str(error))) from error
            discard(self.migration.conn)
            self._undo(error)
            return self._finish_again()
        except Exception as error:
            lost = self.phase is Phase.COPYING and is_disconnect(error)
            if lost or (self.phase is Phase.READY and (may_pass(error) or isinstance(error, ShapeError))):
                # No reason to throw the copy away.
                raise InterruptedRunError(self._cut_off(one_line(error))) from error
            discard(self.migration.conn)
            self._undo(error)
            return self._finish_again()
        return self._finish()

    def _finish_again(self) -> MigrationResult:
        """``_finish`` over a new connection."""
        with opened(self.migration.engine) as again:
            self.migration.conn = again
            return self._finish()

    def _forward(self) -> None:
        with transaction(self.migration.conn) as conn:
            self.wal_start = execute(conn, statement("SELECT pg_current_wal_lsn()::text")).scalar_one()
        self.output.banner("Starting PostgreSQL Partitioning Migration")
        if self.options.resume:
            self.output.line(f"Resuming: {states.describe(self.migration.state)}")
        if not self.phase.swapped:
            self._build()
            self._copy()
            self._install_functions()
            self._verify()
            if self.options.hold:
                self.held = True
                return
        self._swap()

    @contextmanager
    def _step(self, number: int, done: str, *, earlier: bool = False) -> Iterator[None]:
        """Print the step's line, time it unless it was done ``earlier``, print that it is done."""
        self.step = number
        self.output.step(number, self.titles[number])
        with nullcontext() if earlier else self.timings.step(number):
            yield
        self.output.ok(done)

    def _build(self) -> None:
        """Steps 1 and 2."""
        migration = self.migration
        with transaction(migration.conn) as conn:
            built = states.read(conn, self.table) is not None
        begun = built and self.phase is not Phase.BUILT
        with self._step(1, "Partitioned table created", earlier=begun):
            if not built:
                build_parent(migration)
            elif self.phase is Phase.BUILT:
                begin_notes(migration)
        self.operator.check_stop()
        with self._step(2, "All partitions created", earlier=self.phase is Phase.READY):
            built = build_partitions(migration)
            if built:
                self.output.partitions(self.table, migration.plan.periods)

    def _copy(self) -> None:
        """Step 3: every period, and the foreign keys."""
        migration = self.migration
        with self._step(3, "Data migration complete", earlier=self.phase is Phase.READY):
            if self.phase is Phase.COPYING:
                with transaction(migration.conn):
                    rows = rows_per_period(migration)
                compared = migration.state.compared
                done = sum(result.new_rows for result in compared.values())
                total = max(sum(rows.values()), done)
                self.output.line(f"Total rows to migrate: {total:,}")
                begun = [self.table.period(start) for start, result in compared.items() if result.new_rows]
                bar = self.output.copying(total, done, periods=len(rows), begun=begun)
                with bar as count, self._copying(count) as copying:
                    copy_periods(migration, pending_periods(migration), copying, self.options.workers)
                migration.refresh()
            replay_most(migration, Direction.FORWARD, self.operator.check_stop)
            add_foreign_keys(migration, self.operator.check_stop, self.options.workers)

    @contextmanager
    def _copying(self, count: RowCount) -> Iterator[Copying]:
        """How to copy and what to report; replicas are watched over a separate connection."""
        options = self.options
        with ExitStack() as watching:
            lag: Callable[[], Lag | None] = lambda: None  # noqa: E731
            if options.max_replica_lag is not None:
                lag = ReplicaLag(watching.enter_context(opened(self.migration.engine)))
            throttle = Throttle(
                options.batch_size,
                rate_limit=options.rate_limit,
                max_lag=options.max_replica_lag,
                lag=lag,
                on_pause=count.pause,
            )
            yield Copying(
                throttle=throttle,
                content=options.content,
                check_stop=self.operator.check_stop,
                copied=lambda period, rows: count.add(period, rows, throttle.lag),
            )

    def _install_functions(self) -> None:
        """Step 4."""
        migration = self.migration
        with self._step(4, "Management functions created"), transaction(migration.conn) as conn:
            migration.claim(conn)
            execute(conn, joined(function_statements(migration.shape), ";\n"))

    def _verify(self) -> None:
        """Step 5: each period was compared when it was filled; replay what was written meanwhile."""
        migration = self.migration
        what = "row counts and contents match" if self.options.content else "row counts match"
        with self._step(5, f"Verification passed: {what}"):
            replay_most(migration, Direction.FORWARD, self.operator.check_stop)
            migration.refresh()
            if pending := pending_periods(migration):
                raise ChronosError(f"verification failed for {pending[0]}: its rows were never compared")
            results = migration.state.compared.values()
            old, new = sum(r.old_rows for r in results), sum(r.new_rows for r in results)
            days = self.table.retention_days
            window = "all rows" if days is None else f"last {days} days"
            self.output.line(f"Old table ({window}): {old:,} rows")
            self.output.line(f"New table: {new:,} rows")
            with transaction(migration.conn) as conn:
                migration.claim(conn)
                periods = migration.plan.periods
                execute(conn, joined(autovacuum_as_before_statements(migration.shape, periods), ";\n"))
                if self.phase is Phase.COPYING:
                    execute(conn, phase_statement(self.table, Phase.READY))
            migration.refresh()

    def _swap(self) -> None:
        """Step 6: the names change; compare again what was written during the migration."""
        migration = self.migration
        with self._step(6, f"Table renamed: {self.table} -> {self.table.old}"):
            if not self.phase.swapped:
                swap(migration, Direction.FORWARD, self.operator.check_stop)
            drop_keys(migration, self.table.old)
            with transaction(migration.conn) as conn:
                rows = compare_replayed(conn, migration, self.table.old, self.table.name)
            with transaction(migration.conn) as conn:
                migration.claim(conn)
                execute(conn, joined(verified_statements(migration.shape, migration.plan), ";\n"))
            migration.refresh()
            if rows:
                self.output.line(f"Rows written during the migration: {rows:,}, compared and equal")

    def _finish(self) -> MigrationResult:
        """Statistics, the report, the last lines; the migration is complete even if these fail."""
        if not self.held:
            self._gather_statistics()
        found = self._report()
        self.output.line()
        if self.held:
            self._end_held()
        else:
            self.output.banner("MIGRATION COMPLETED SUCCESSFULLY!")
            self.output.summary(found)
        return self.result(found)

    def _report_partly(self, error: ChronosError) -> None:
        """The report of a run that did not finish, over a new connection if one can be opened."""
        if self.options.report is None:
            return
        migration = self.migration
        with ExitStack() as stack:
            with suppress(DBAPIError, ChronosError):
                migration.conn = stack.enter_context(opened(migration.engine))
                with transaction(migration.conn):
                    found = states.read(migration.conn, self.table)
                if found is not None and found.run_id == migration.state.run_id:
                    migration.state = found
            self._report(error)

    def result(self, found: Summary | None = None) -> MigrationResult:
        """What the caller gets."""
        migration, found = self.migration, found or self._summary()
        former = TableSpec(migration.plan.former, schema=self.table.home).typed
        return MigrationResult(
            table=self.table,
            strategy=migration.plan.strategy,
            phase=self.phase,
            former=former if self.phase.swapped else None,
            rows_copied=found.copied,
            notes_replayed=migration.notes_replayed,
            periods=found.periods,
            seconds=time.monotonic() - self._started,
            steps=tuple(found.steps),
            swap_seconds=migration.swap_s,
            longest_lock_seconds=found.lock_s,
            wal_bytes=found.wal_bytes,
            report=self.written,
        )

    def _summary(self) -> Summary:
        migration = self.migration
        compared = migration.state.compared
        return Summary(
            steps=[(title, self.timings.seconds.get(number, 0.0)) for number, title in self.titles.items()],
            periods={self.table.period(start): result for start, result in compared.items()},
            copied=None if migration.plan.attaches else sum(result.new_rows for result in compared.values()),
            wal_bytes=self._wal_bytes(),
            lock_s=migration.longest_lock_s,
            statistics_s=self.statistics_s,
        )

    def _report(self, error: ChronosError | None = None) -> Summary:
        """The summary, also written to the report file if one is wanted; ``error`` ended the run."""
        migration, found = self.migration, self._summary()
        if self.options.report:
            ended = Ended(self.began, error, self.held, self.step, str(self.options))
            try:
                write_report(self.options.report, facts(migration, found, ended))
                self.written = self.options.report
            except OSError as failed:
                self.output.line(
                    f"The report could not be written to {self.options.report}: {failed.strerror}"
                )
        return found

    def _gather_statistics(self) -> None:
        migration, began = self.migration, time.monotonic()
        try:
            with self.output.timed("Gathering statistics", "Statistics gathered"):
                gather_statistics(migration, self._live_periods())
            self.statistics_s = time.monotonic() - began
        except DBAPIError as error:
            self.output.line(
                f"Statistics could not be gathered ({one_line(error)}); run: ANALYZE {self.table};"
            )

    def _end_held(self) -> None:
        command = migrate_command(self.table)
        if self.migration.plan.attaches:
            self.output.banner("READY: THE TABLE CAN BECOME A PARTITION; NO NAME HAS CHANGED YET")
            self.output.line(
                f"Inserts of rows from {self.migration.plan.first:%Y-%m-%d %H:%M} UTC on fail until the swap."
                f" Swap with: {command} --resume; undo it with: {rollback_command(self.table)}"
            )
            return
        self.output.banner("READY: EVERYTHING IS COPIED AND COMPARED; NO NAME HAS CHANGED YET")
        self.output.line(
            f"{self.table} is still the plain table; what is written to it is noted. Swap with:"
            f" {command} --resume; replay the notes that accumulate with: {command} --resume --hold;"
            f" undo it with: {rollback_command(self.table)}"
        )

    def _live_periods(self) -> list[Period]:
        if self.migration.plan.attaches:
            return []
        fence = self.migration.state.fence or self.migration.plan.started_at
        return [self.table.period(fence)]

    def _wal_bytes(self) -> int | None:
        with suppress(SQLAlchemyError), transaction(self.migration.conn) as conn:
            found: int = execute(
                conn,
                statement(
                    "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), {start}::pg_lsn)::bigint",
                    start=self.wal_start,
                ),
            ).scalar_one()
            return found
        return None

    def _cut_off(self, why: str) -> str:
        return (
            f"{why} in step {self.step}; nothing is lost, and the application can keep writing."
            f" Carry on with: {migrate_command(self.table)} --resume;"
            f" or undo it with: {rollback_command(self.table)}"
        )

    def _undo(self, error: Exception) -> None:
        """Roll everything back after a failure, over a new connection, and raise.

        Returns only if the migration turns out to be complete: its last commit may have succeeded without
        our knowing.
        """
        migration, table = self.migration, self.table
        what = f"step {self.step} ({self.titles[self.step]}) failed: {one_line(error)}"
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
                found = states.own(conn, table, migration.state.run_id)
                if found is not None and found.phase is Phase.MIGRATED and found.verified:
                    migration.state = found
                    self.output.line("The migration was already complete; nothing is undone.")
                    return
                if (
                    found is not None
                    and found.phase is Phase.MIGRATED
                    and not isinstance(error, VerificationError)
                ):
                    raise InterruptedRunError(self._cut_off(what)) from error
                if found is not None:
                    self.output.line("Rolling back...")
                    with transaction(conn):
                        shape = read_plain(conn, found)
                    roll_back(Migration(migration.engine, conn, self.operator, found, shape, may_stop=False))
            finally:
                discard(conn)
        except SupersededError as other:
            raise InterruptedRunError(f"{what}; {other}, and that run continues") from error
        except InterruptedRunError:
            raise
        except Exception as second:
            why = f"{what}, and so did the rollback: {one_line(second)}"
            if is_disconnect(second):
                raise InterruptedRunError(self._cut_off(why)) from error
            raise NeedsPersonError(
                f"{why}. {states.where(migration.engine, table)} No row is lost."
                f" Fix the cause, then type: {rollback_command(table)}"
            ) from error
        cure = "Fix the cause and start again"
        if sqlstate(error) == errorcodes.DISK_FULL and not migration.plan.attaches:
            cure = (
                "Make room and start again; or, if there is room for only one more index:"
                f" {start_command(table)} --strategy attach"
            )
        cause = error
        if sqlstate(error) in (errorcodes.UNDEFINED_COLUMN, errorcodes.DATATYPE_MISMATCH):
            cause = ShapeError(one_line(error))
            cure = (
                "Somebody changed its columns during the migration: start again, and leave them alone until"
                " the swap"
            )
        raise ChronosError(
            f"{what}; rolled back: {table} is the plain table it was before, with every row. {cure}"
        ) from cause

    def _reconnect(self) -> Connection:
        """A new connection; a restarting server gets ``reconnect_s`` seconds to come back."""
        deadline = time.monotonic() + self.options.reconnect_s
        while True:
            try:
                return self.migration.engine.connect()
            except DBAPIError:
                if time.monotonic() >= deadline:
                    raise
                self.operator.patience.sleep(0.5)


class _Adoption(_Run):
    """The same six steps without a copy: the table itself becomes a partition."""

    def _build(self) -> None:
        migration = self.migration
        with transaction(migration.conn) as conn:
            built = states.read(conn, self.table) is not None
        with self._step(1, "Partitioned table created", earlier=built):
            if not built:
                attach.build(migration)
        self.operator.check_stop()
        with self._step(2, "All partitions created", earlier=self.phase is Phase.READY):
            if attach.build_partitions(migration):
                self.output.partitions(self.table, migration.plan.periods)

    def _copy(self) -> None:
        migration, bound = self.migration, self.migration.plan.first
        with self._step(3, "Existing rows adopted, none copied", earlier=self.phase is Phase.READY):
            self.output.line(
                f"All rows before {bound:%Y-%m-%d %H:%M} UTC stay where they are; nothing is copied"
            )
            attach.adopt(migration, self.operator.check_stop)

    def _verify(self) -> None:
        migration = self.migration
        with self._step(5, "Verification passed: the rows are the same, and each lies before the bound"):
            attach.require_ready(migration)
            with transaction(migration.conn) as conn:
                migration.claim(conn)
                if self.phase is Phase.COPYING:
                    execute(conn, phase_statement(self.table, Phase.READY))
            migration.refresh()

    def _swap(self) -> None:
        migration = self.migration
        with self._step(6, f"Table renamed: {self.table} -> {self.table.history}, now a partition"):
            if not self.phase.swapped:
                attach.swap(migration)
            attach.adopt_foreign_keys(migration)
