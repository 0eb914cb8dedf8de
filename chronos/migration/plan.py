"""The dry run: what a migration would do, without doing it, as a report and as SQL that psql can run.

The statements come from the functions that the migration itself runs. All that is printed besides them
is behind ``--``, so that the output as a whole is a script.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date, timedelta

from psycopg2 import sql
from rich.console import Console
from rich.table import Table
from sqlalchemy.engine import Connection, Engine

from chronos.db import Statement, execute, joined, name, render, session_settings, statement, transaction
from chronos.errors import RefusedError
from chronos.migration import state as migration_state
from chronos.migration.copy import (
    adopt_statements,
    attach_statements,
    autovacuum_as_before,
    drop_default_statements,
    final_statistics,
    index_statements,
    silence,
    statistics_statement,
    validate_statement,
    without_autovacuum,
)
from chronos.migration.followers import Follower, followers
from chronos.migration.output import in_bytes
from chronos.migration.preflight import Survey, first_state, locate, survey
from chronos.migration.rollback import UNDO, definitions
from chronos.migration.state import STATE_TABLE, Phase, State, record_statement
from chronos.migration.surroundings import warnings
from chronos.migration.swap import (
    change_log_statements,
    foreign_key_statements,
    function_statements,
    history_days,
    lock_table,
    parent_statements,
    partition_statements,
    state_statements,
    swap_statements,
)
from chronos.migration.table_shape import Column, TableShape
from chronos.migration.verify import history_comparison, live_comparison, old_rows
from chronos.partitions import DAYS_AHEAD, DAYS_BACK, TABLE, days, midnight, partition_name

_WIDTH = 80
_SAMPLE = 20_000
# How much longer it takes to write, index, check and compare a row than to read and hash it. A guess that
# held on the machines it was tried on; the report says that it is one.
_COPY_FACTOR = 6
# Up to here the rows of each day are counted, beyond it the planner is asked.
_COUNTABLE = 5_000_000


@dataclass(frozen=True)
class Section:
    """Some statements of the script: a transaction, or each one by itself."""

    title: str
    statements: list[Statement]
    in_transaction: bool = True


@dataclass(frozen=True)
class Day:
    """A day of the window: its rows, counted or as the planner expects them."""

    day: date
    rows: int


def dry_run(engine: Engine, console: Console) -> None:
    """Print the plan of a migration, and then its SQL; nothing is changed, and nothing can be.

    One read-only transaction: ACCESS SHARE on webhook_log, as a query would take it. Raises RefusedError
    when something stands in the way of the migration, after all of it has been printed.
    """
    with engine.connect() as conn:
        schema = locate(conn)
        if schema is None:
            raise RefusedError(
                f"there is no table {TABLE} in this database, or one in several schemas and none on the"
                " search path; nothing was changed. Check the database and its search_path"
            )
        with transaction(conn):
            execute(conn, statement("SET TRANSACTION READ ONLY"))
            found = survey(conn, schema)
            earlier = migration_state.read(conn, schema)
            if earlier is not None and migration_state.undone_by_hand(conn, schema, earlier):
                raise RefusedError(
                    f"an earlier migration of {TABLE} was undone by hand; nothing was changed. To migrate"
                    f" removes its remains first; for a plan, remove them with: {UNDO}"
                )
            report = _Report(console)
            report.head(found)
            if found.shape is not None and not found.blockers:
                _plan(conn, found, found.shape, report)
    for blocker in found.blockers:
        report.item("BLOCKER", blocker)
    if found.blockers:
        raise RefusedError(f"{'; '.join(found.blockers)}; nothing was changed")


def _plan(conn: Connection, found: Survey, shape: TableShape, report: _Report) -> None:
    state = replace(first_state(found), functions=list(definitions(conn, shape.schema).values()))
    following = followers(conn, shape.oid)
    exact, found_days = _rows_per_day(conn, found, shape)
    report.days(found_days, found, exact=exact)
    report.effort(sum(d.rows for d in found_days), found, _reading_rate(conn, shape))
    report.title("What comes along, and how")
    for what, how in carried(conn, shape, following):
        report.item(what, how)
    report.title("Warnings")
    for warning in [*warnings(conn, shape), *_of_the_shape(shape, following)]:
        report.item("warning", warning)
    report.title("The SQL, to be run on the same day (UTC), by psql as it is")
    report.raw("\\set ON_ERROR_STOP on")
    later = [d.day for d in found_days if d.day > state.today and d.rows]
    for section in sections(conn, shape, state, following, later):
        report.section(section, lambda query: render(conn, query))


def sections(
    conn: Connection, shape: TableShape, state: State, following: list[Follower], later: list[date]
) -> Iterator[Section]:
    """The statements of a migration in their order; ``later`` are the days after today that have rows.

    ``following`` is what refers to the table. What only the server can know by then, it looks up itself.
    """
    yield Section(
        "Build the new table beside the old one; nobody sees it yet",
        [
            *parent_statements(shape, state),
            *partition_statements(shape, state),
            *change_log_statements(shape),
            *state_statements(shape, state),
        ],
    )
    yield Section(
        "The swap: under this lock everybody waits, for some milliseconds. The program waits for the"
        " lock 100 ms at most, again and again, and compares the two tables first",
        [
            lock_table(shape.schema, TABLE, "ACCESS EXCLUSIVE"),
            *swap_statements(shape, state, following),
        ],
    )
    yield Section("Autovacuum stays away until all is in its place", without_autovacuum(shape, state))
    for day in sorted([state.today, *later], reverse=True):
        yield Section(
            f"The rows of {day} into the partition that the application writes. The program does it in"
            " batches",
            [silence(), _copy_statement(shape, state, day, live=True)],
        )
    for day in reversed(history_days(state)):
        yield from _history_day(shape, state, day)
    yield Section(
        "Every day is in its place",
        [lock_table(shape.schema, TABLE, "ACCESS EXCLUSIVE"), *drop_default_statements(shape)],
    )
    if shape.foreign_keys:
        yield Section("The foreign keys of the parent adopt those of the partitions", adopt_statements(shape))
    yield Section("Autovacuum may come", autovacuum_as_before(shape, state))
    yield Section("The functions for the nightly jobs", function_statements(shape))
    yield Section(
        "Compare what the application writes too; the migration is complete", _end(shape, state, later)
    )
    yield Section("Statistics", [final_statistics(conn, shape, [state.today, *later])], in_transaction=False)


def _copy_statement(shape: TableShape, state: State, day: date, *, live: bool) -> Statement:
    columns = shape.copied_columns()
    return statement(
        "INSERT INTO {leaf} ({columns}) OVERRIDING SYSTEM VALUE\nSELECT {columns} {old_rows}{conflict}",
        leaf=name(shape.schema, partition_name(day)),
        columns=joined(columns),
        old_rows=old_rows(shape, state, day, "o"),
        conflict=sql.SQL('\nON CONFLICT (id, "timestamp") DO NOTHING' if live else ""),
    )


def _history_day(shape: TableShape, state: State, day: date) -> Iterator[Section]:
    leaf = name(shape.schema, partition_name(day))
    yield Section(
        f"The rows of {day}, beside the table. The program does it in batches",
        [silence(), _copy_statement(shape, state, day, live=False)],
    )
    yield Section(f"Indexes of {day}", index_statements(shape, leaf))
    if shape.foreign_keys:
        yield Section(
            f"Foreign keys of {day}, unchecked", foreign_key_statements(shape, leaf, not_valid=True)
        )
        yield Section("...and checked", [validate_statement(leaf, key) for key in shape.foreign_keys])
    comparison = history_comparison(shape, state, day, content=True)
    yield Section(
        f"Compare {day}, and note the result",
        [statistics_statement(shape, leaf), record_statement(shape.schema, day, _result(comparison))],
    )
    yield Section(
        f"Put {day} into its place, with what was written for it meanwhile; milliseconds under the lock",
        [lock_table(shape.schema, TABLE, "ACCESS EXCLUSIVE"), *attach_statements(shape, day)],
    )


def _result(comparison: Statement) -> Statement:
    return statement(
        "(SELECT jsonb_build_object('old_rows', old_rows, 'new_rows', new_rows,"
        " 'hash_equal', equal)\n FROM ({comparison}) c)",
        comparison=comparison,
    )


_COMPLETE = """
DO $do$
BEGIN
    IF EXISTS (SELECT FROM {state}, jsonb_each(days) d
               WHERE d.value -> 'old_rows' <> d.value -> 'new_rows'
                  OR d.value -> 'hash_equal' <> 'true'::jsonb) THEN
        RAISE EXCEPTION 'a day differs from its origin; look into the column days of {state}';
    END IF;
END
$do$"""


def _end(shape: TableShape, state: State, later: list[date]) -> list[Statement]:
    table = name(shape.schema, STATE_TABLE)
    return [
        *(
            record_statement(shape.schema, day, _result(live_comparison(shape, state, day, content=True)))
            for day in [state.today, *later]
        ),
        statement(_COMPLETE, state=table),
        statement(
            "UPDATE {state} SET phase = {phase},"
            " window_rows = (SELECT sum((value ->> 'old_rows')::bigint) FROM jsonb_each(days))",
            state=table,
            phase=Phase.MIGRATED.value,
        ),
    ]


_NAMED_BY = r"""
SELECT p.oid::regprocedure::text FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname <> 'information_schema' AND n.nspname !~ '^pg_' AND p.prosqlbody IS NULL
  AND p.prosrc ~* '\mwebhook_log\M'
ORDER BY 1
"""


def carried(conn: Connection, shape: TableShape, following: list[Follower]) -> list[tuple[str, str]]:
    """Everything that hangs on the table: what it is, and what becomes of it."""
    same = "the same"
    found = [
        (
            f"{len(shape.columns)} columns",
            "the same, with defaults, storage, statistics targets and comments",
        ),
        ("timestamp", same if _timestamp(shape).not_null else "becomes NOT NULL, as part of the key"),
    ]
    for index in shape.indexes:
        how = same if not index.primary or len(index.columns) > 1 else "over (id, timestamp) from now on"
        found.append((f"{'primary key' if index.primary else 'index'} {index.name}", how))
    if not any(index.primary for index in shape.indexes):
        found.append(("primary key", "there is none; (id, timestamp) becomes one"))
    for check in shape.checks:
        if check.kind == "c":
            how = same if check.validated else "valid from now on, as every copied row is checked"
            found.append((f"check {check.name}", how))
    found += [
        (f"foreign key {k.name}", "the same; on the parent when every day is in its place")
        for k in shape.foreign_keys
    ]
    for sequence in shape.sequences:
        how = (
            "a sequence of its own that goes on counting"
            if sequence.identity
            else "used by both tables, owned by neither; rollback and finalize give it an owner again"
        )
        found.append((f"sequence {sequence.name}", how))
    found.append((f"owner {shape.owner}", "of the new table and its partitions"))
    found += [
        (
            f"grant to {grant.grantee or 'PUBLIC'}",
            f"{', '.join(grant.privileges)}{f' ({grant.column})' if grant.column else ''}"
            f"{' with grant option' if grant.grantable else ''}; none on the partitions",
        )
        for grant in shape.grants
        if grant.grantee != shape.owner
    ]
    found += [
        (
            f"trigger {t.name}",
            "the same; does not fire for rows that are copied" if t.fires_on_copy else same,
        )
        for t in shape.triggers
    ]
    if shape.row_security:
        found.append(("row security", "on" + (", forced" if shape.force_row_security else "")))
    found += [(f"policy {p.name}", same) for p in shape.policies]
    found += [(f"rule {r.name}", same) for r in shape.rules]
    found += [
        (f"statistics {s.name}", "on the table as a whole, and on each partition") for s in shape.statistics
    ]
    if shape.options:
        found.append(("storage parameters", f"go to the partitions: {', '.join(shape.options)}"))
    if shape.tablespace:
        found.append((f"tablespace {shape.tablespace}", "that of the partitions, too"))
    if shape.replica_identity != "d":
        how = {"f": "FULL", "n": "NOTHING"}[shape.replica_identity]
        found.append(("replica identity", f"{how}, of the partitions, too"))
    found += [
        (
            f"{f.kind} {f.name}",
            "publishes the new table instead of the old one"
            if f.publication
            else "refers to the new table from the swap on, keeps its grants and options",
        )
        for f in following
    ]
    found += [
        (f"function {row[0]}", "names the table in its text, and so finds the new one")
        for row in execute(conn, statement(_NAMED_BY)).all()
    ]
    return found


def _timestamp(shape: TableShape) -> Column:
    return next(column for column in shape.columns if column.name == "timestamp")


def _of_the_shape(shape: TableShape, following: list[Follower]) -> Iterator[str]:
    """What will be different by nature, and can matter to an application."""
    if any(follower.kind in ("view", "function", "rule", "policy") for follower in following):
        yield (
            f"to go back by hand with DROP TABLE {TABLE} CASCADE would drop the views and all else that"
            " refers to it; python -m chronos rollback lets them refer to the plain table again"
        )
    yield "ON CONFLICT (id) no longer finds a unique key; it has to be ON CONFLICT (id, timestamp)"
    if any(t.by_row for t in shape.triggers):
        yield (
            "an UPDATE that moves a row to another day fires the triggers of DELETE and INSERT; a BEFORE"
            " trigger may not move a row to another day"
        )
    for key in shape.foreign_keys:
        if not key.passive:
            yield (
                f"the foreign key {key.name} acts on deletes or updates in {key.table}: should that touch"
                " rows of a day while it is copied, the migration may find a difference and put all back"
            )
    for index in shape.indexes:
        if index.clustered:
            yield f"index {index.name} is no longer marked for CLUSTER, partitioned tables know no such mark"
        if index.statistics:
            yield f"index {index.name} loses the statistics target of its expressions"


def _rows_per_day(conn: Connection, found: Survey, shape: TableShape) -> tuple[bool, list[Day]]:
    """The days of the window, oldest first, with their rows, and whether these were counted."""
    exact = found.rows_estimate <= _COUNTABLE
    result = []
    for day in days(found.today - timedelta(days=DAYS_BACK), found.today + timedelta(days=DAYS_AHEAD)):
        rows = statement(
            'FROM {table} WHERE "timestamp" >= {lower} AND "timestamp" < {upper}',
            table=name(shape.schema, TABLE),
            lower=shape.instant(max(found.cutoff, midnight(day))),
            upper=shape.instant(midnight(day + timedelta(days=1))),
        )
        if exact:
            count = execute(conn, statement("SELECT count(*) {rows}", rows=rows)).scalar_one()
        else:
            explained = execute(
                conn, statement("EXPLAIN (FORMAT JSON) SELECT {rows}", rows=rows)
            ).scalar_one()
            count = int(explained[0]["Plan"]["Plan Rows"])
            if day > found.today and count:
                some = execute(conn, statement("SELECT EXISTS (SELECT {rows})", rows=rows)).scalar_one()
                count = count if some else 0
        if day <= found.today or count:
            result.append(Day(day, count))
    return exact, result


def _reading_rate(conn: Connection, shape: TableShape) -> float | None:
    """Rows a second that this server reads and hashes, from a sample of the newest; None without rows."""
    started = time.monotonic()
    rows = execute(
        conn,
        statement(
            'SELECT count(*), {hash} FROM (SELECT * FROM {table} ORDER BY "timestamp" DESC LIMIT {limit}) s',
            hash=shape.content_hash("s"),
            table=name(shape.schema, TABLE),
            limit=_SAMPLE,
        ),
    ).one()[0]
    spent = max(time.monotonic() - started, 1e-3)
    return rows / spent if rows else None


class _Report:
    """Prints within 80 columns, all but SQL behind ``--``."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def raw(self, text: str) -> None:
        """A line as it is."""
        self._console.out(text, highlight=False)

    def _say(self, text: str, indent: str = "") -> None:
        for line in textwrap.wrap(text, _WIDTH - 3, subsequent_indent=indent) or [""]:
            self.raw(f"-- {line}".rstrip())

    def title(self, text: str) -> None:
        """A heading."""
        self.raw("--")
        self._say(text)
        self._say("-" * min(len(text), _WIDTH - 3))

    def item(self, what: str, how: str) -> None:
        """One thing and what is to be said of it."""
        self._say(f"{what}: {how}", indent="    ")

    def head(self, found: Survey) -> None:
        """Which table, how large, and the window."""
        self.title("Plan of a migration; nothing was changed")
        self.item("table", f"{found.schema}.{TABLE}")
        self.item("size", f"about {found.rows_estimate:,} rows, {in_bytes(found.bytes)} with indexes")
        self.item("now", f"{found.now:%Y-%m-%d %H:%M} UTC, by the server's clock")
        self.item(
            "window", f"rows since {found.cutoff:%Y-%m-%d %H:%M} UTC are copied, the others stay behind"
        )

    def days(self, found_days: list[Day], found: Survey, *, exact: bool) -> None:
        """Rows and bytes a day."""
        first = partition_name(found.today - timedelta(days=DAYS_BACK))
        last = partition_name(found.today + timedelta(days=DAYS_AHEAD))
        self.title(f"{DAYS_BACK + 1 + DAYS_AHEAD} partitions, {first} to {last}")
        counted = sum(day.rows for day in found_days)
        table = Table("day", box=None, pad_edge=False)
        table.add_column("rows" if exact else "rows (planner's estimate)", justify="right")
        table.add_column("size", justify="right")
        for day in found_days:
            table.add_row(f"{day.day}", f"{day.rows:,}", in_bytes(day.rows * _row_bytes(found, counted)))
        lines = Console(width=_WIDTH - 3, color_system=None)
        with lines.capture() as text:
            lines.print(table)
        for line in text.get().splitlines():
            self.raw(f"-- {line}".rstrip())

    def effort(self, rows: int, found: Survey, rate: float | None) -> None:
        """Space and time, as far as can be told."""
        size = rows * _row_bytes(found, rows)
        self.title("What it takes (estimates)")
        self.item("rows to copy", f"{rows:,}")
        self.item("disk", f"about {in_bytes(size)}, until finalize drops the old table")
        self.item("WAL", f"about {in_bytes(size)}")
        if rate is None:
            self.item("duration", "there are no rows")
        else:
            seconds = rows / rate * _COPY_FACTOR
            self.item(
                "duration",
                f"about {_duration(seconds)}, going by a sample read here at {rate:,.0f} rows/s;"
                " history is out of sight of readers until its day is copied, newest day first",
            )

    def section(self, section: Section, text_of: Callable[[Statement], str]) -> None:
        """Some statements of the script."""
        self.raw("")
        self._say(section.title)
        if section.in_transaction:
            self.raw("BEGIN;")
            self.raw(text_of(session_settings()) + ";")
        for query in section.statements:
            self.raw(text_of(query).rstrip().rstrip(";") + ";")
        if section.in_transaction:
            self.raw("COMMIT;")


def _row_bytes(found: Survey, counted: int) -> float:
    """Bytes a row, indexes included; a table never analyzed has no estimate of its rows."""
    return found.bytes / max(found.rows_estimate, counted, 1)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
