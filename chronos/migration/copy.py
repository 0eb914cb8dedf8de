"""Copy rows from the table in use into the one beside it, in small batches, while the application writes.

Forward, each period is copied into a bare table, which is then indexed, compared with its source and attached
to the partitioned table. Nobody uses that yet, so no lock is felt. A period's table shows how far its copy
got, so an interrupted run carries on there. What the application writes meanwhile is noted (changes.py), so
a batch need not see it.

Back, rows newer than the swap go straight into the plain table.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any, NamedTuple

from psycopg2 import errorcodes, sql
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from chronos.catalog.ddl import attach_statements, index_statements, statistics_statement
from chronos.catalog.shape import TableShape
from chronos.db import (
    Statement,
    application_path,
    application_path_setting,
    autocommit,
    execute,
    joined,
    render,
    sqlstate,
    statement,
    transaction,
)
from chronos.errors import ChronosError, CutShortError, SupersededError
from chronos.locks import lock_table
from chronos.migration.changes import waiting_notes
from chronos.migration.compare import compare_period, require_equal
from chronos.migration.context import Direction, Migration, match
from chronos.migration.state import compared_statement
from chronos.migration.throttle import Throttle
from chronos.migration.workers import CheckStop, work_through
from chronos.table import Period, midnight

_ATTEMPTS = 60  # at a round that the server cancels, with a pause after each


@dataclass(frozen=True)
class Copying:
    """How to copy.

    ``throttle`` times the batches, ``content`` false compares only counts, ``check_stop`` raises to stop, and
    ``copied`` is called with the period and rows of each batch.
    """

    throttle: Throttle
    content: bool = True
    check_stop: Callable[[], None] = lambda: None
    copied: Callable[[Period, int], None] = lambda period, rows: None


def rows_per_period(migration: Migration) -> dict[Period, int]:
    """How many rows each period of the window has in the plain table, oldest first; ACCESS SHARE.

    Raises ChronosError when rows lie outside every partition: NULL, infinite, or too far ahead.
    """
    plan, shape, conn = migration.plan, migration.shape, migration.conn
    source, column = migration.relation(plan.table.name), shape.time_column
    stray = execute(
        conn,
        statement(
            "SELECT count(*), min({column}::text) FROM {source} WHERE {column} >= {end} OR {column} IS NULL",
            source=source,
            column=column,
            end=shape.instant(plan.end),
        ),
    ).one()
    if stray[0]:
        raise ChronosError(
            f"{stray[0]:,} rows have a {plan.table.column} that fits no partition"
            f" ({stray[1] or 'NULL'}); correct them and migrate again"
        )
    # Period by period with index-only scans: grouping all rows by day would sort them, and reading their keys
    # would read the table.
    window = [
        statement(
            "({n}, {lower}, {upper})",
            n=number,
            lower=shape.instant(max(plan.cutoff, period.start)),
            upper=shape.instant(period.end),
        )
        for number, period in enumerate(plan.periods)
    ]
    rows = execute(
        conn,
        statement(
            "SELECT d.n, c.rows FROM (VALUES {window}) AS d (n, lower, upper)"
            " CROSS JOIN LATERAL (SELECT count(*) FROM {source} AS o"
            " WHERE o.{column} >= d.lower AND o.{column} < d.upper) AS c (rows)"
            " WHERE c.rows > 0 ORDER BY d.n",
            window=joined(window),
            source=source,
            column=column,
        ),
    ).all()
    return {plan.periods[number]: count for number, count in rows}


# A round of batches, each a transaction of its own. Its lock on the state queues behind a run that wants to
# write there, so a run that has been taken over stops before its next batch. No batch waits for the disk:
# after a crash the table ends with its last surviving batch, and the copy carries on there. Rows with the
# same timestamp are copied together, so the last timestamp alone says how far the copy is, and a hundred
# thousand rows with the same one are read once. The planner is forced to follow the index: outdated
# statistics must not make it sort the rest of the day for every batch.
_ROUND = """
#variable_conflict use_column
<<copying>>
DECLARE
    after {instant} := {after};
    last {instant};
    mine boolean;
    more boolean;
    over boolean;
    report json;
    taken bigint;
    put_in bigint;
    rows bigint := 0;
    batches integer := 0;
    ends timestamptz;
BEGIN
    LOOP
        COMMIT; -- only to drop the snapshot: the isolation level must be set before one is taken
        SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
        EXECUTE {settings};
        ends := coalesce(ends, clock_timestamp() + least(
            make_interval(secs => {seconds}::float8),
            nullif(current_setting('statement_timeout'), '0')::interval / 2::float8));
        LOCK TABLE {state} IN ROW EXCLUSIVE MODE;
        SELECT EXISTS (SELECT FROM {state} WHERE run_id = {run_id}::uuid) INTO copying.mine;
        IF NOT copying.mine THEN
            report := pg_catalog.json_build_object(
                'mine', false, 'last', after, 'rows', rows, 'batches', 1, 'more', false);
            EXIT;
        END IF;
        WITH batch AS MATERIALIZED (
            SELECT {columns} FROM {source}
            WHERE {column} > copying.after{upper}
            ORDER BY {column}
            FETCH FIRST {batch_size} ROWS WITH TIES
        ), put AS (
            {put} RETURNING 1
        )
        SELECT max({column}), count(*), (SELECT count(*) FROM put) FROM batch
        INTO copying.last, copying.taken, copying.put_in;
        batches := batches + 1;
        rows := rows + put_in;
        after := coalesce(last, after);
        more := taken >= {batch_size};
        over := NOT more OR clock_timestamp() >= ends;
        report := pg_catalog.json_build_object(
            'mine', mine, 'last', after, 'rows', rows, 'batches', batches, 'more', more);
        COMMIT;
        EXIT WHEN over;
    END LOOP;
    -- INFO is always sent to the client, and by default never written to the log.
    RAISE INFO 'chronos %', report;
END
"""

# The first statement of each transaction of a round: until it has run, the role's own search path applies,
# where somebody else's operators may come first.
_BATCH_SETTINGS = """
SELECT {path}, pg_catalog.set_config('synchronous_commit', 'off', true),
       pg_catalog.set_config('row_security', 'off', true), pg_catalog.set_config('lock_timeout', '0', true),
       pg_catalog.set_config('enable_seqscan', 'off', true),
       pg_catalog.set_config('enable_bitmapscan', 'off', true), pg_catalog.set_config('jit', 'off', true)
"""


class _Round(NamedTuple):
    """What a round did: whether the migration is still ours, the last timestamp copied, rows and batches,
    and whether there may be more rows.
    """

    mine: bool
    last: datetime
    rows: int
    batches: int
    more: bool


class _Inbox:
    """Collects the server's messages; not a list, because SQLAlchemy would empty that."""

    def __init__(self) -> None:
        self.report: str | None = None

    def append(self, text: str) -> None:
        """Called by the driver for each message; log lines may come too, with the statement in them."""
        if found := re.match(r"[^:\n]*:\s*chronos (\{.*\})", text):
            self.report = found[1]


@dataclass
class Fill:
    """Rounds of batches from ``source`` into ``target``, rows up to ``upper`` (None: to the last).

    ``known_by`` are the columns that identify rows the target may already have, which are left as they are;
    None when it can have none.
    """

    migration: Migration
    conn: Connection
    copying: Copying
    period: Period
    source: Statement
    target: Statement
    upper: datetime | None
    known_by: tuple[str, ...] | None = None

    def run(self, reached: Callable[[], datetime]) -> None:
        """Copy from where ``reached`` says the copy is until no row is left.

        Raises CutShortError when the server keeps cancelling rounds without progress, SupersededError when
        another run has taken over.
        """
        attempts, before = 0, None
        while not self._rounds(after := reached()):
            attempts, before = (attempts + 1 if after == before else 1), after
            if attempts == _ATTEMPTS:
                raise CutShortError(
                    f"the server cancelled the copy of {self.period} {attempts} times in a row;"
                    " check statement_timeout, and who locks the tables"
                )

    def _rounds(self, after: datetime) -> bool:
        """Whether the end was reached; false if a round was cancelled and its progress must be looked up."""
        throttle, check_stop = self.copying.throttle, self.copying.check_stop
        with autocommit(self.conn):
            while True:
                size = throttle.begin(check_stop)
                began = time.monotonic()
                try:
                    done = self._round(after, size)
                except DBAPIError as error:
                    if sqlstate(error) != errorcodes.QUERY_CANCELED:
                        raise
                    done = None
                if done is None:
                    throttle.cut_short(size, check_stop)
                    return False
                if not done.mine:
                    raise SupersededError("another run has taken this migration over")
                throttle.end(size, done.rows, (time.monotonic() - began) / done.batches)
                if done.rows:
                    self.copying.copied(self.period, done.rows)
                if not done.more:
                    return True
                after = done.last

    def _round(self, after: datetime, size: int) -> _Round | None:
        """As many batches as fit into a moment, in one round trip; None when the report got lost."""
        migration, shape = self.migration, self.migration.shape
        column = shape.time_column
        body = statement(
            _ROUND,
            instant=sql.SQL(shape.time_type),
            settings=render(self.conn, statement(_BATCH_SETTINGS, path=application_path_setting())),
            seconds=self.copying.throttle.round_s,
            state=migration.relation(migration.table.state),
            run_id=str(migration.state.run_id),
            columns=joined(shape.copied_columns()),
            column=column,
            source=self.source,
            after=shape.instant(after),
            upper=statement(" AND {c} < {upper}", c=column, upper=shape.instant(self.upper))
            if self.upper
            else sql.SQL(""),
            batch_size=size,
            put=put_statement(shape, self.target, self._missing()),
        )
        inbox = _Inbox()
        driver: Any = self.conn.connection.dbapi_connection
        driver.notices = inbox
        execute(self.conn, statement("DO {body}", body=render(self.conn, body)))
        if inbox.report is None:
            return None
        found = json.loads(inbox.report)
        return _Round(**{**found, "last": as_utc(datetime.fromisoformat(found["last"]))})

    def _missing(self) -> Statement:
        """The rows of the batch that the target does not have."""
        if not self.known_by:
            return sql.SQL("batch AS b")
        return statement(
            "batch AS b WHERE NOT EXISTS (SELECT FROM {target} AS t WHERE {same})",
            target=self.target,
            same=match(self.known_by, "t", "b"),
        )


def put_statement(shape: TableShape, target: Statement, rows: Statement) -> Statement:
    """Insert ``rows`` (what follows FROM) into ``target`` as they are. ROW EXCLUSIVE on it."""
    return statement(
        "INSERT INTO {target} ({columns}) OVERRIDING SYSTEM VALUE\nSELECT {columns} FROM {rows}",
        target=target,
        columns=joined(shape.copied_columns()),
        rows=rows,
    )


def as_utc(value: datetime | date) -> datetime:
    """The instant, UTC, that a value of the time column means."""
    if not isinstance(value, datetime):
        return midnight(value)
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


@dataclass
class _PeriodCopy:
    """The copy of one period into its partition, by one worker over its own connection."""

    migration: Migration
    conn: Connection
    period: Period
    copying: Copying

    @property
    def _leaf(self) -> str:
        return self.migration.table.partition(self.period)

    def run(self) -> None:
        """Fill, index, compare and attach; carries on where an earlier run stopped."""
        migration, conn, leaf = self.migration, self.conn, self.migration.relation(self._leaf)
        counted = 0

        def copied(period: Period, rows: int) -> None:
            nonlocal counted
            counted += rows
            self.copying.copied(period, rows)

        def reached() -> datetime:
            """Batches are copied in time order, so the last row tells."""
            with transaction(conn):
                found, last = execute(
                    conn,
                    statement(
                        "SELECT count(*), max({column}) FROM {leaf}",
                        column=migration.shape.time_column,
                        leaf=leaf,
                    ),
                ).one()
            copied(self.period, found - counted)
            # The server has no instant between this one and the start of the period.
            start = max(migration.plan.cutoff, self.period.start) - timedelta(microseconds=1)
            return as_utc(last) if found else start

        if self._has_key():
            reached()
        else:
            fill = Fill(
                migration,
                conn,
                replace(self.copying, copied=copied),
                self.period,
                source=migration.relation(migration.table.name),
                target=leaf,
                upper=self.period.end,
            )
            fill.run(reached)
            self._index()
        self._compare_and_attach()

    def _has_key(self) -> bool:
        """Whether the partition has its primary key, which means it is filled."""
        with transaction(self.conn):
            return self._look_for_key()

    def _look_for_key(self) -> bool:
        found: bool = execute(
            self.conn,
            statement(
                "SELECT EXISTS (SELECT FROM pg_index WHERE indisprimary"
                " AND indrelid = to_regclass(format('%I.%I', {schema}, {leaf})))",
                schema=self.migration.table.home,
                leaf=self._leaf,
            ),
        ).scalar_one()
        return found

    def _index(self) -> None:
        """Primary key and indexes, all or none: a partition that has them is filled.

        ACCESS EXCLUSIVE on the partition, which nobody else uses yet. No claim on the state, which would
        hold up the other workers: a second run finds the work done.
        """
        with transaction(self.conn):
            need_not_wait_for_the_disk(self.conn)
            execute(self.conn, lock_table(self.migration.table.home, self._leaf, "ACCESS EXCLUSIVE"))
            if self._look_for_key():
                return
            execute(self.conn, application_path())
            for query in index_statements(self.migration.shape, self.migration.relation(self._leaf)):
                execute(self.conn, query)

    def _compare_and_attach(self) -> None:
        """Compare in one snapshot, then attach the partition and record the result, both or neither.

        ACCESS EXCLUSIVE on the partition, SHARE UPDATE EXCLUSIVE on its parent: nobody uses either.
        """
        migration, conn = self.migration, self.conn
        with transaction(conn):
            need_not_wait_for_the_disk(conn)
            execute(conn, statistics_statement(migration.shape, migration.relation(self._leaf)))
            result = compare_period(conn, migration, self.period, content=self.copying.content)
        if not result.equal:
            with transaction(conn):
                waiting_notes(conn, migration, Direction.FORWARD, 1)  # a TRUNCATE is not a mismatch
        require_equal(migration, self.period, result)
        with transaction(conn):
            need_not_wait_for_the_disk(conn)
            migration.claim(conn)
            execute(
                conn,
                joined(
                    [
                        *attach_statements(migration.shape, self.period, checked=True),
                        compared_statement(migration.table, self.period, result),
                    ],
                    ";\n",
                ),
            )


def need_not_wait_for_the_disk(conn: Connection) -> None:
    """For this transaction: release its locks before its commit, and all WAL before it, is on disk.

    Nothing is lost by that: a crash undoes the last of our transactions, in order, and the copy carries on
    from there. The commit that ends the migration does wait, for all of them.
    """
    execute(conn, statement("SELECT set_config('synchronous_commit', 'off', true)"))


def copy_periods(migration: Migration, periods: list[Period], copying: Copying, workers: int) -> None:
    """Copy ``periods``, newest first, ``workers`` at a time; see ``work_through`` for failures."""

    def copy(conn: Connection, period: Period, check_stop: CheckStop) -> None:
        _PeriodCopy(migration, conn, period, replace(copying, check_stop=check_stop)).run()

    work_through(migration.engine, sorted(periods, reverse=True), workers, copy, copying.check_stop)


def carry_newer_rows(migration: Migration, copying: Copying) -> None:
    """On the way back: copy the rows beyond the fence into the plain table, which nobody reads yet.

    A row that is already there is left alone: if it has changed since, that is noted.
    """
    fence = migration.state.fence
    assert fence is not None
    fill = Fill(
        migration,
        migration.conn,
        copying,
        Period(fence, migration.plan.end),
        source=migration.relation(Direction.BACK.source(migration.table)),
        target=migration.relation(Direction.BACK.target(migration.table)),
        upper=None,
        known_by=Direction.BACK.key(migration.plan),
    )
    fill.run(lambda: fence)
