"""Copy the rows of the last days, newest day first, in small batches, while the application writes on.

A day of the past is filled into a partition that is not yet attached, without indexes and foreign
keys; it gets those, is compared with its origin, and only then takes its place: readers see a day
whole or not at all. Its progress needs no bookkeeping, for it can be read off the partition itself.
Today's rows go straight into the partition that the application writes.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any, NamedTuple

from psycopg2 import errorcodes, sql
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from chronos.db import (
    ShortTransactions,
    Statement,
    application_path,
    autocommit,
    execute,
    joined,
    name,
    opened,
    our_path,
    render,
    sqlstate,
    statement,
    transaction,
)
from chronos.errors import ChronosError, CutShortError, SupersededError
from chronos.migration.operator import StopRequestedError
from chronos.migration.pace import Pacer
from chronos.migration.state import STATE_TABLE, DayResult, State, claim, record_day
from chronos.migration.swap import (
    DEFAULT_PARTITION,
    LIVE_TABLE,
    bound_check,
    bounds,
    foreign_key_statements,
    index_statement,
    lock_table,
    primary_key_statement,
    secondary_indexes,
    triggers_as_before,
)
from chronos.migration.table_shape import COPYING_FLAG, ForeignKey, TableShape
from chronos.migration.verify import compare_history_day, compare_live_day, matches
from chronos.partitions import OLD_TABLE, TABLE, days, midnight, partition_name

_ATTEMPTS = 60  # of a round that the server cuts short, with a pause after each


class VerificationError(ChronosError):
    """A day's copy differs from its origin."""


@dataclass(frozen=True)
class Manner:
    """How the copy goes about it.

    ``pacer`` times the batches, ``content`` false compares counts only, ``check_stop`` raises to stop,
    and ``copied`` is told of each batch: its day and its rows.
    """

    pacer: Pacer
    content: bool = True
    check_stop: Callable[[], None] = lambda: None
    copied: Callable[[date, int], None] = lambda day, rows: None


def rows_per_day(conn: Connection, shape: TableShape, state: State) -> dict[date, int]:
    """How many rows each day of the window has in the old table, oldest first.

    Raises ChronosError when rows lie outside every partition: NULL, infinite, or too far ahead.
    """
    end = shape.instant(midnight(state.last_day + timedelta(days=1)))
    old = name(shape.schema, OLD_TABLE)
    stray = execute(
        conn,
        statement(
            'SELECT count(*), min(id), min("timestamp")::text FROM {old}'
            ' WHERE "timestamp" >= {end} OR "timestamp" IS NULL',
            old=old,
            end=end,
        ),
    ).one()
    if stray[0]:
        raise ChronosError(
            f"{stray[0]:,} rows have a timestamp that no partition takes"
            f" (id {stray[1]}: {stray[2] or 'NULL'}); correct them and migrate again"
        )
    # Day by day along the index, and nothing but the index: to group all rows by their day would sort
    # them, and to ask for their ids would read the table.
    window = [
        statement(
            "({day}, {lower}, {upper})",
            day=day,
            lower=shape.instant(max(state.cutoff, midnight(day))),
            upper=shape.instant(midnight(day + timedelta(days=1))),
        )
        for day in days(state.first_day, state.last_day)
    ]
    rows = execute(
        conn,
        statement(
            "SELECT d.day, c.rows FROM (VALUES {window}) AS d (day, lower, upper)"
            " CROSS JOIN LATERAL (SELECT count(*) FROM {old} AS o"
            ' WHERE o."timestamp" >= d.lower AND o."timestamp" < d.upper) AS c (rows)'
            " WHERE c.rows > 0 ORDER BY d.day",
            window=joined(window),
            old=old,
        ),
    ).all()
    return dict(rows)


# A round of batches, each a transaction of its own. Its lock on the state waits its turn behind a run that
# wants to write there, and a run that has been taken over stops before its next batch. No batch need wait
# for the disk: after a crash the partition ends where its last surviving batch does, and the copy goes on
# there. Rows that share a timestamp go together, so the last timestamp alone says how far the copy is, and
# a hundred thousand rows with the same one are read once. The planner is left no choice but to follow the
# index: statistics that are out of date must not make it sort the rest of the day for every batch.
_ROUND = """
#variable_conflict use_column
<<copying>>
DECLARE
    after {instant} := {after};
    last {instant};
    mine boolean;
    taken bigint;
    rows bigint := 0;
    batches integer := 0;
    ends timestamptz := clock_timestamp() + least(
        {seconds} * interval '1 second', nullif(current_setting('statement_timeout'), '0')::interval / 2);
BEGIN
    LOOP
        COMMIT; -- of nothing but the snapshot that the isolation level must be set before
        SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
        EXECUTE {settings};
        LOCK TABLE {state} IN ROW EXCLUSIVE MODE;
        SELECT EXISTS (SELECT FROM {state} WHERE run_id = {run_id}::uuid) INTO copying.mine;
        EXIT WHEN NOT copying.mine;
        WITH batch AS (
            SELECT {columns} FROM {old}
            WHERE "timestamp" > copying.after AND "timestamp" < {upper} AND id <= {fence}
            ORDER BY "timestamp"
            FETCH FIRST {batch_size} ROWS WITH TIES
        ), put AS (
            INSERT INTO {leaf} ({columns}) OVERRIDING SYSTEM VALUE
            SELECT {columns} FROM batch {on_conflict} RETURNING "timestamp"
        ){progress}
        SELECT max("timestamp"), count(*) FROM {source} INTO copying.last, copying.taken;
        COMMIT;
        batches := batches + 1;
        rows := rows + taken;
        after := coalesce(last, after);
        EXIT WHEN taken < {batch_size} OR clock_timestamp() >= ends;
    END LOOP;
    -- Of all levels this one is always sent to the client, and never written to the log by default.
    RAISE INFO 'chronos %', json_build_object(
        'mine', mine, 'last', after, 'rows', rows, 'batches', batches, 'more', taken >= {batch_size});
END
"""

_BATCH_SETTINGS = """
SELECT set_config('synchronous_commit', 'off', true), set_config({flag}, 'on', true),
       set_config('row_security', 'off', true), set_config('lock_timeout', '0', true),
       set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true),
       set_config('jit', 'off', true)
"""

# Today's progress cannot be read off the partition, which the application writes as well.
_PROGRESS = """, progress AS (
    INSERT INTO {live} (day, "timestamp") SELECT {day}, max("timestamp") FROM batch HAVING count(*) > 0
    ON CONFLICT (day) DO UPDATE SET "timestamp" = EXCLUDED."timestamp"
)"""


class _Round(NamedTuple):
    """What a round did: whether the migration is still ours, the last timestamp taken, rows and batches,
    and whether there may be more rows.
    """

    mine: bool
    last: datetime
    rows: int
    batches: int
    more: bool


class _Inbox:
    """Takes what the server tells besides results; no list, for SQLAlchemy would empty that."""

    def __init__(self) -> None:
        self.report: str | None = None

    def append(self, text: str) -> None:
        """Called by the driver for each message; a log may come along as well, the statement in it."""
        if found := re.match(r"[^:\n]*:\s*chronos (\{.*\})", text):
            self.report = found[1]


@dataclass
class DayCopy:
    """The copying of one day by one worker over its own connection."""

    conn: Connection
    shape: TableShape
    state: State
    day: date
    manner: Manner
    short: ShortTransactions
    counted: int = 0

    @property
    def _leaf(self) -> str:
        return partition_name(self.day)

    def history(self) -> DayResult:
        """Fill, index, compare and attach a day of the past; carries on where an earlier run stopped."""
        with transaction(self.conn):
            filled = self._has_primary_key()
        if filled:
            self._history_copied()
        else:
            self._fill(self._history_copied, live=False)
            self._index()
        self._refer()
        with transaction(self.conn):
            need_not_wait_for_the_disk(self.conn)
            execute(self.conn, statistics_statement(self.shape, self._qualified()))
            result = compare_history_day(
                self.conn, self.shape, self.state, self.day, content=self.manner.content
            )
        _require_match(self.day, result)
        self._attach(result)
        return result

    def live(self) -> None:
        """Copy a day that the application writes at the same time; carries on where an earlier run stopped.

        A row is copied once: one that the application has deleted since, or given another timestamp,
        does not come back. A row that it has written under the same key is left alone.
        """
        self._fill(self._live_copied, live=True)
        with transaction(self.conn):
            execute(self.conn, statistics_statement(self.shape, self._qualified()))

    def _history_copied(self) -> datetime:
        """How far the filling came before: batches are taken in the order of the timestamps."""
        with transaction(self.conn):
            found, last = execute(
                self.conn, statement('SELECT count(*), max("timestamp") FROM {leaf}', leaf=self._qualified())
            ).one()
        self._count(found - self.counted)
        return _utc(last) if found else self._start()

    def _live_copied(self) -> datetime:
        live = name(self.shape.schema, LIVE_TABLE)
        with transaction(self.conn):
            last = execute(
                self.conn,
                statement('SELECT "timestamp" FROM {live} WHERE day = {day}', live=live, day=self.day),
            ).scalar()
        return _utc(last) if last else self._start()

    def _count(self, rows: int) -> None:
        self.counted += rows
        if rows:
            self.manner.copied(self.day, rows)

    def _start(self) -> datetime:
        """The last instant that is not copied; the server's clock knows none between it and the first."""
        return max(self.state.cutoff, midnight(self.day)) - timedelta(microseconds=1)

    def _qualified(self) -> sql.Identifier:
        return name(self.shape.schema, self._leaf)

    def _has_primary_key(self) -> bool:
        return bool(
            execute(
                self.conn,
                statement(
                    "SELECT count(*) FROM pg_index WHERE indisprimary"
                    " AND indrelid = format('%I.%I', {schema}, {leaf})::regclass",
                    schema=self.shape.schema,
                    leaf=self._leaf,
                ),
            ).scalar_one()
        )

    def _fill(self, copied: Callable[[], datetime], *, live: bool) -> None:
        """Rounds of batches until no row is left, from where ``copied`` says that the copy is.

        Raises CutShortError when one is cut short again and again and nothing is gained.
        """
        attempts, reached = 0, None
        while not self._rounds(after := copied(), live=live):
            attempts, reached = (attempts + 1 if after == reached else 1), after
            if attempts == _ATTEMPTS:
                raise CutShortError(
                    f"the server cancelled the copy of {self.day} {attempts} times in a row;"
                    " look at statement_timeout, and at who locks the tables"
                )

    def _rounds(self, after: datetime, *, live: bool) -> bool:
        """Whether the end was reached; false when a round was cut short, and where it ended is to be seen."""
        pacer = self.manner.pacer
        with autocommit(self.conn):
            while True:
                size = pacer.begin(self.manner.check_stop)
                began = time.monotonic()
                try:
                    done = self._round(after, size, live=live)
                except DBAPIError as error:
                    if sqlstate(error) != errorcodes.QUERY_CANCELED:
                        raise
                    done = None
                if done is None:
                    pacer.cut_short(size, self.manner.check_stop)
                    return False
                if not done.mine:
                    raise SupersededError("another run has taken this migration over")
                pacer.end(size, done.rows, (time.monotonic() - began) / done.batches)
                self._count(done.rows)
                if not done.more:
                    return True
                after = done.last

    def _round(self, after: datetime, size: int, *, live: bool) -> _Round | None:
        """As many batches as fit into a moment, over one round trip; None when the report got lost."""
        body = statement(
            _ROUND,
            instant=sql.SQL("timestamptz" if self.shape.time_zoned else "timestamp"),
            settings=render(self.conn, statement(_BATCH_SETTINGS, flag=COPYING_FLAG)),
            seconds=self.manner.pacer.round_s,
            state=name(self.shape.schema, STATE_TABLE),
            run_id=str(self.state.run_id),
            columns=joined(self.shape.copied_columns()),
            old=name(self.shape.schema, OLD_TABLE),
            after=self.shape.instant(after),
            upper=self.shape.instant(midnight(self.day + timedelta(days=1))),
            fence=self.state.fence,
            batch_size=size,
            leaf=self._qualified(),
            # What is there already is taken too, though not put in again.
            on_conflict=sql.SQL('ON CONFLICT (id, "timestamp") DO NOTHING' if live else ""),
            source=sql.SQL("batch" if live else "put"),
            progress=statement(_PROGRESS, live=name(self.shape.schema, LIVE_TABLE), day=self.day)
            if live
            else sql.SQL(""),
        )
        inbox = _Inbox()
        driver: Any = self.conn.connection.dbapi_connection
        driver.notices = inbox
        execute(self.conn, statement("DO {body}", body=render(self.conn, body)))
        if inbox.report is None:
            return None
        found = json.loads(inbox.report)
        return _Round(**{**found, "last": _utc(datetime.fromisoformat(found["last"]))})

    def _index(self) -> None:
        """Primary key and indexes, all or none: a partition that has them is filled.

        ACCESS EXCLUSIVE on the partition, which nobody else knows yet. No claim on the state, which
        would hold up the other workers: whoever comes second finds the work done.
        """
        with transaction(self.conn):
            need_not_wait_for_the_disk(self.conn)
            execute(self.conn, lock_table(self.shape.schema, self._leaf, "ACCESS EXCLUSIVE"))
            if self._has_primary_key():
                return
            execute(self.conn, application_path())
            for query in index_statements(self.shape, self._qualified()):
                execute(self.conn, query)

    def _foreign_keys(self) -> dict[str, bool]:
        """The names of the partition's foreign keys, and whether each has been checked."""
        rows = execute(
            self.conn,
            statement(
                "SELECT conname, convalidated FROM pg_constraint WHERE contype = 'f'"
                " AND conrelid = format('%I.%I', {schema}, {leaf})::regclass",
                schema=self.shape.schema,
                leaf=self._leaf,
            ),
        ).all()
        return dict(rows)

    def _refer(self) -> None:
        """The foreign keys: first unchecked, in a moment, then checked without stopping anybody.

        SHARE ROW EXCLUSIVE, briefly, on the tables referred to; ROW SHARE while checking.
        """
        keys = self.shape.foreign_keys

        def add(conn: Connection) -> None:
            execute(conn, lock_table(self.shape.schema, self._leaf, "ACCESS EXCLUSIVE"))
            if not self._foreign_keys():
                for query in foreign_key_statements(self.shape, self._qualified(), not_valid=True):
                    execute(conn, query)

        if keys:
            self.short.run(self.conn, add, tables=[(key.schema, key.table) for key in keys])
        for key in keys:
            with transaction(self.conn):
                need_not_wait_for_the_disk(self.conn)
                execute(self.conn, validate_statement(self._qualified(), key))

    def _attach(self, result: DayResult) -> None:
        """Put the finished partition into its place, with what was written for its day meanwhile.

        ACCESS EXCLUSIVE on webhook_log for milliseconds. ATTACH itself asks for less, but then an
        insert that had just been routed to the default partition would fail: the server checks it
        against the bounds as they are by the time it gets the partition's lock.
        """
        schema = self.shape.schema

        def attach(conn: Connection) -> None:
            claim(conn, schema, self.state.run_id)
            # The partition first, alone: autovacuum may be at it, and then nobody else need wait with us.
            execute(conn, lock_table(schema, self._leaf, "ACCESS EXCLUSIVE"))
            self.short.asks_now()
            execute(conn, lock_table(schema, TABLE, "ACCESS EXCLUSIVE"))
            execute(conn, joined(attach_statements(self.shape, self.day), ";\n"))
            record_day(conn, schema, self.day, result)

        tables = [(schema, self._leaf), (schema, TABLE), (schema, DEFAULT_PARTITION)]
        self.short.run(self.conn, attach, tables=tables)


def index_statements(shape: TableShape, leaf: Statement) -> list[Statement]:
    """Primary key and indexes of a partition that is filled."""
    return [
        primary_key_statement(shape, leaf),
        *(index_statement(index, leaf) for index in secondary_indexes(shape)),
    ]


def statistics_statement(shape: TableShape, leaf: Statement) -> Statement:
    """Statistics of the indexed columns, so that readers find a partition that is attached quickly.

    Those of the others, large documents above all, would cost as much as copying 100,000 rows; they
    are gathered, all of them from larger samples, when everything is in its place.
    """
    indexed = {column for index in shape.indexes for column in index.columns} | {"id", "timestamp"}
    columns = [name(column.name) for column in shape.columns if column.name in indexed]
    return statement(
        "SET LOCAL default_statistics_target = 10; ANALYZE {leaf} ({columns})",
        leaf=leaf,
        columns=joined(columns),
    )


def final_statistics(conn: Connection, shape: TableShape, live: Iterable[date]) -> Statement:
    """Statistics of the table as a whole, which autovacuum never gathers, and of the ``live`` days.

    The other partitions have some, and autovacuum will do better, unless it is off for the table; but
    only a server of version 18 or newer can leave them out.
    """
    table = name(shape.schema, TABLE)
    if (conn.dialect.server_version_info or (0,)) < (18,) or _own_autovacuum(shape):
        return statement("ANALYZE {table}", table=table)
    leaves = [name(shape.schema, partition_name(day)) for day in sorted(live)]
    return statement("ANALYZE ONLY {tables}", tables=joined([table, *leaves]))


def validate_statement(leaf: Statement, key: ForeignKey) -> Statement:
    """Check the rows of a filled partition against a foreign key. ROW SHARE on what it refers to."""
    return statement("ALTER TABLE {leaf} VALIDATE CONSTRAINT {key}", leaf=leaf, key=name(key.name))


def attach_statements(shape: TableShape, day: date) -> list[Statement]:
    """What puts the finished partition of ``day`` into its place, under the lock on webhook_log."""
    leaf = name(shape.schema, partition_name(day))
    return [
        silence(),
        statement(
            "WITH moved AS (DELETE FROM {default}"
            ' WHERE "timestamp" >= {lower} AND "timestamp" < {upper} RETURNING *)'
            " INSERT INTO {leaf} ({columns}) OVERRIDING SYSTEM VALUE"
            " SELECT {columns} FROM moved",
            default=name(shape.schema, DEFAULT_PARTITION),
            leaf=leaf,
            columns=joined(shape.copied_columns()),
            lower=shape.instant(midnight(day)),
            upper=shape.instant(midnight(day + timedelta(days=1))),
        ),
        our_path(),
        statement(
            "ALTER TABLE {table} ATTACH PARTITION {leaf} {bounds}",
            table=name(shape.schema, TABLE),
            leaf=leaf,
            bounds=bounds(shape, day),
        ),
        statement(
            "ALTER TABLE {leaf} DROP CONSTRAINT {check}",
            leaf=leaf,
            check=name(bound_check(partition_name(day))),
        ),
    ]


def without_autovacuum(shape: TableShape, state: State) -> list[Statement]:
    """Keep autovacuum away from the partitions while days are copied; SHARE UPDATE EXCLUSIVE on each.

    Not from those that retention has dropped since, in a migration that is resumed late; nor is it off
    on days ahead, from which those made later take their settings.

    It would come to those that have just been filled, and hold a lock for minutes that the next step
    needs for a moment: the server calls it off for whoever waits a second, and so long we let nobody wait.
    """
    return [
        statement("ALTER TABLE IF EXISTS {leaf} SET (autovacuum_enabled = off)", leaf=leaf)
        for leaf in _leaves(shape, state.first_day, state.today)
    ]


def autovacuum_as_before(shape: TableShape, state: State) -> list[Statement]:
    """The partitions' setting for autovacuum is that of the old table again."""
    change: Statement = sql.SQL("RESET (autovacuum_enabled)")
    if _own_autovacuum(shape):
        # All of them, so that they also stand in their old order.
        options = joined([sql.SQL(option) for option in shape.options])
        change = statement("SET ({options})", options=options)
    return [
        statement("ALTER TABLE IF EXISTS {leaf} {change}", leaf=leaf, change=change)
        for leaf in _leaves(shape, state.first_day, state.last_day)
    ]


def _own_autovacuum(shape: TableShape) -> bool:
    return any(option.startswith("autovacuum_enabled ") for option in shape.options)


def _leaves(shape: TableShape, first: date, last: date) -> list[sql.Identifier]:
    return [name(shape.schema, partition_name(day)) for day in days(first, last)]


def drop_default_statements(shape: TableShape) -> list[Statement]:
    """Under the lock on webhook_log: the default partition goes, the triggers are what they were."""
    return [
        statement("DROP TABLE {default}", default=name(shape.schema, DEFAULT_PARTITION)),
        *triggers_as_before(shape, name(shape.schema, TABLE)),
    ]


def adopt_statements(shape: TableShape) -> list[Statement]:
    """The parent's foreign keys, which adopt the partitions' own: all locks first, then the keys.

    The locks are taken in the order in which an insert takes them, or the two would wait for each other.
    """
    return [
        lock_table(shape.schema, TABLE, "SHARE ROW EXCLUSIVE"),
        *(lock_table(key.schema, key.table, "ACCESS EXCLUSIVE") for key in shape.foreign_keys),
        *foreign_key_statements(shape, name(shape.schema, TABLE)),
    ]


def verify_live_day(conn: Connection, shape: TableShape, state: State, day: date, *, content: bool) -> None:
    """Compare a day that the application writes too, when all of it is copied, and note the result.

    Raises VerificationError, with the day, when it differs.
    """
    with transaction(conn):
        result = compare_live_day(conn, shape, state, day, content=content)
        _require_match(day, result)
        claim(conn, shape.schema, state.run_id)
        record_day(conn, shape.schema, day, result)


def _require_match(day: date, result: DayResult) -> None:
    if not matches(result):
        what = "the rows differ" if result.old_rows == result.new_rows else "rows are missing"
        raise VerificationError(
            f"verification failed for {day}: {what}"
            f" ({result.old_rows:,} in {OLD_TABLE}, {result.new_rows:,} in {partition_name(day)})"
        )


def need_not_wait_for_the_disk(conn: Connection) -> None:
    """For this transaction: its locks are let go before its commit, and all WAL before it, is on the disk.

    Nothing is lost by that: a crash takes away the last of our transactions, in their order, and the
    copy goes on where the tables then are. What ends the migration does wait, for all of them.
    """
    execute(conn, statement("SELECT set_config('synchronous_commit', 'off', true)"))


def silence() -> sql.Composed:
    """For this transaction: what we write is no change of the application's, and fires no trigger of its.

    Foreign keys are checked at once: a check that is still to come would bar ATTACH. Other checks find
    the functions that they call as they do when the application writes.
    """
    return statement(
        "SELECT set_config({flag}, 'on', true); SET CONSTRAINTS ALL IMMEDIATE; {path}",
        flag=COPYING_FLAG,
        path=application_path(),
    )


def _utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def open_history(conn: Connection, shape: TableShape, state: State, short: ShortTransactions) -> None:
    """Before the first day: send autovacuum elsewhere. SHARE UPDATE EXCLUSIVE on the partitions."""

    def send_away(conn: Connection) -> None:
        claim(conn, shape.schema, state.run_id)
        execute(conn, joined(without_autovacuum(shape, state), ";\n"))

    short.run(conn, send_away, tables=[(shape.schema, TABLE)])


def close_history(conn: Connection, shape: TableShape, state: State, short: ShortTransactions) -> None:
    """When every day is in its place: drop the default partition, give the parent its foreign keys.

    With the default partition goes the condition that kept the application's triggers from our rows.
    Then autovacuum may come.

    ACCESS EXCLUSIVE on webhook_log for the drop of an empty table; then SHARE ROW EXCLUSIVE on it and
    ACCESS EXCLUSIVE on the tables referred to, while the partitions' keys are adopted unchecked.
    """
    schema = shape.schema

    def drop_default(conn: Connection) -> None:
        claim(conn, schema, state.run_id)
        execute(conn, lock_table(schema, TABLE, "ACCESS EXCLUSIVE"))
        left = execute(
            conn,
            statement("SELECT count(*) FROM {default}", default=name(schema, DEFAULT_PARTITION)),
        ).scalar_one()
        if left:
            raise ChronosError(f"{left} rows are left in {DEFAULT_PARTITION}")
        execute(conn, joined(drop_default_statements(shape), ";\n"))

    def adopt(conn: Connection) -> None:
        claim(conn, schema, state.run_id)
        execute(conn, joined(adopt_statements(shape), ";\n"))

    def call_back(conn: Connection) -> None:
        claim(conn, schema, state.run_id)
        execute(conn, joined(autovacuum_as_before(shape, state), ";\n"))

    with transaction(conn):
        default_exists, keys = execute(
            conn,
            statement(
                "SELECT to_regclass(format('%I.%I', {schema}, {default})) IS NOT NULL,"
                " (SELECT count(*) FROM pg_constraint WHERE contype = 'f'"
                "  AND conrelid = format('%I.%I', {schema}, {table})::regclass)",
                schema=schema,
                default=DEFAULT_PARTITION,
                table=TABLE,
            ),
        ).one()
    if default_exists:
        short.run(conn, drop_default, tables=[(schema, TABLE), (schema, DEFAULT_PARTITION)])
    if shape.foreign_keys and not keys:
        referred = [(key.schema, key.table) for key in shape.foreign_keys]
        short.run(conn, adopt, tables=[(schema, TABLE), *referred])
    short.run(conn, call_back, tables=[(schema, TABLE)])


class Copy:
    """Copies all days, newest first, ``workers`` of them at a time."""

    def __init__(
        self,
        engine: Engine,
        shape: TableShape,
        state: State,
        manner: Manner,
        new_short: Callable[[], ShortTransactions],
    ) -> None:
        self._engine = engine
        self._shape = shape
        self._state = state
        self._manner = manner
        self._new_short = new_short
        self._failed = threading.Event()

    def run(self, days: list[date], workers: int) -> float:
        """Copy ``days``; returns the longest time, in seconds, that one of its locks was waited for or held.

        The first failure stops every worker at its next batch, and is raised when all have stopped.
        """
        queue = sorted(days, reverse=True)
        turn = threading.Lock()
        shorts: list[ShortTransactions] = []

        def work() -> None:
            short = self._new_short()
            shorts.append(short)
            with opened(self._engine) as conn:
                while not self._failed.is_set():
                    with turn:
                        if not queue:
                            return
                        day = queue.pop(0)
                    self._one_day(conn, day, short)

        with ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="copy") as pool:
            futures = [pool.submit(self._watched, work) for _ in range(max(1, workers))]
        # All have ended here. What one of them met first is why the others stopped.
        errors = [error for future in futures if (error := future.exception())]
        errors.sort(key=lambda error: isinstance(error, StopRequestedError))
        if errors:
            raise errors[0]
        return max((short.longest_s for short in shorts), default=0.0)

    def _watched(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException:
            self._failed.set()
            raise

    def _one_day(self, conn: Connection, day: date, short: ShortTransactions) -> None:
        def check_stop() -> None:
            if self._failed.is_set():
                raise StopRequestedError
            self._manner.check_stop()

        manner = replace(self._manner, check_stop=check_stop)
        copy = DayCopy(conn, self._shape, self._state, day, manner, short)
        if day < self._state.today:
            copy.history()
        else:
            copy.live()
