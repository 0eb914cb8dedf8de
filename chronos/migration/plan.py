"""The dry run: what a migration would do, without doing it, as a report and as SQL that psql can run.

The statements come from the functions that the migration itself runs. Everything else is printed behind
``--``, so that the whole output is a script. A terminal gets one screen instead, and the script goes into a
file.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from uuid import uuid4

from rich.console import Console
from rich.table import Table
from sqlalchemy.engine import URL, Connection, Engine

from chronos.catalog.ddl import (
    attach_statements,
    autovacuum_as_before_statements,
    final_statistics,
    index_statements,
    statistics_statement,
    validate_statement,
)
from chronos.catalog.dependents import Dependent, dependents, redirect_statements
from chronos.catalog.locate import require_located
from chronos.catalog.partitions import expires_on
from chronos.catalog.shape import TableShape
from chronos.commands import migrate as migrate_command
from chronos.commands import rollback as rollback_command
from chronos.db import (
    Statement,
    application_path,
    execute,
    name,
    opened,
    our_path,
    render,
    session_settings,
    statement,
    transaction,
)
from chronos.errors import RefusedError
from chronos.functions import definitions, function_statements
from chronos.locks import Patience, lock_table
from chronos.migration import attach
from chronos.migration import state as states
from chronos.migration.build import begin_notes_statements, leaves_statements, parent_and_log_statements
from chronos.migration.changes import (
    replay_settings,
    replay_statement,
    verified_statements,
    waiting_notes_query,
    which_notes,
)
from chronos.migration.checks import Finding, Survey, first_plan, survey, warnings
from chronos.migration.compare import (
    compare_and_note_statement,
    replayed_comparison,
    side_by_side_statement,
    within,
)
from chronos.migration.console import Output, counted, for_reading, in_bytes
from chronos.migration.context import Direction, Migration
from chronos.migration.copy import put_statement, rows_per_period
from chronos.migration.estimate import (
    Pace,
    Way,
    by_attaching,
    by_copying,
    expected_rows,
    measure,
    recommended,
    row_bytes,
)
from chronos.migration.foreign_keys import (
    AT_ONCE,
    adopt_statements,
    at_once,
    begin_unlinking_statements,
    drop_keys_statements,
    leaf_statements,
)
from chronos.migration.operator import Operator
from chronos.migration.queries import Statistic, Workload, workload
from chronos.migration.state import Phase, Plan, State, Strategy, phase_statement, verified_statement
from chronos.migration.swap import forward_statements
from chronos.table import Period, TableSpec

_WIDTH = 80
# Up to this many rows each period is counted; beyond it the planner estimates.
_COUNTABLE = 5_000_000
# How many findings and statements the screen has room for.
_ON_SCREEN = {"blockers": 8, "warnings": 8, "queries": 3, "width": 120}
_IN_REPORT = 10
# More notes than a script can ever find.
_EVERY_NOTE = 1_000_000_000


@dataclass(frozen=True)
class Section:
    """Some statements of the script: one transaction, or each on its own.

    ``locks``: they ask for locks that the application can feel. They then wait as long as the longest attempt
    of the program, and the script stops if that is not enough.
    """

    title: str
    statements: Sequence[Statement]
    in_transaction: bool = True
    locks: bool = False


@dataclass(frozen=True)
class Outlook:
    """Everything that a plan says about a table that can be migrated, read in one transaction."""

    plan: Plan
    rows: dict[Period, int]
    exact: bool
    pace: Pace | None
    copying: Way
    attaching: Way
    carried: list[tuple[str, str]]
    warnings: list[Finding]


def dry_run(
    engine: Engine,
    table: TableSpec,
    console: Console,
    patience: Patience | None = None,
    strategy: Strategy = Strategy.COPY,
    accepted: frozenset[str] = frozenset(),
    *,
    sql_file: Path | None = None,
    verbose: bool = False,
) -> None:
    """Print the plan of a migration; nothing is changed, and nothing can be.

    One screen on a terminal, or the full report if ``verbose``; elsewhere the full report and the SQL as a
    script, which goes to ``sql_file`` if that is given. One read-only transaction: ACCESS SHARE on the table,
    like a query. Raises RefusedError when something blocks the migration, after printing it all, or when the
    file cannot be written.
    """
    patience = patience or Patience()
    with opened(engine) as conn:
        table = require_located(conn, table)
        with transaction(conn):
            execute(conn, statement("SET TRANSACTION READ ONLY"))
            earlier = states.read(conn, table)
            if earlier is not None and states.undone_by_hand(conn, earlier):
                raise RefusedError(
                    f"an earlier migration of {table} was undone by hand; nothing was changed. A migration"
                    f" removes its remains first; for a plan, remove them with: {rollback_command(table)}"
                )
            found = survey(conn, table, strategy, accepted)
            queries = _queries(conn, found, earlier)
            outlook, script = None, io.StringIO()
            if not found.blockers:
                migration = _migration(engine, conn, found)
                following = dependents(conn, migration.shape.oid)
                outlook = _outlook(conn, found, migration, following)
                whole = _Report(Console(file=script, width=console.width), patience)
                whole.all(found, queries, outlook)
                whole.script(conn, migration, following, max(outlook.rows, default=None))
    if sql_file is not None and not found.blockers:
        _write(sql_file, script.getvalue())
    if console.is_terminal or sql_file is not None:
        report = _Report(console, patience, script=False)
        if verbose:
            report.all(found, queries, outlook)
        else:
            report.screen(engine.url, found, queries, outlook)
        report.where_the_sql_is(found, sql_file, verbose=verbose)
    elif found.blockers:
        _Report(console, patience).all(found, queries, None)
    else:
        console.out(script.getvalue(), highlight=False, end="")
    if found.blockers:
        raise RefusedError("; ".join((*map(str, found.blockers), "nothing was changed")))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise RefusedError(
            f"the SQL cannot be written to {path}: {error.strerror}; nothing was changed. Name a file in a"
            " folder that you may write to"
        ) from error


def _migration(engine: Engine, conn: Connection, found: Survey) -> Migration:
    """The migration as it would begin; it prints nothing."""
    assert found.shape is not None
    plan = replace(first_plan(found), functions=tuple(definitions(conn, found.spec).values()))
    silent = Operator(Output(Console(file=io.StringIO())))
    return Migration(engine, conn, silent, State(uuid4(), Phase.BUILT, plan), found.shape)


def _outlook(conn: Connection, found: Survey, migration: Migration, following: list[Dependent]) -> Outlook:
    shape, plan = migration.shape, migration.plan
    exact = found.rows_estimate <= _COUNTABLE
    by_copy = found if not found.attaches else survey(conn, found.spec, Strategy.COPY, found.accepted)
    by_attach = found if found.attaches else survey(conn, found.spec, Strategy.ATTACH)
    rows: dict[Period, int] = {}
    if not by_copy.blockers:
        window = replace(migration, state=replace(migration.state, plan=first_plan(by_copy)))
        rows = rows_per_period(window) if exact else expected_rows(window)
    pace = measure(migration)
    copied = sum(rows.values())
    return Outlook(
        plan,
        rows,
        exact,
        pace,
        by_copying(conn, by_copy, copied, pace),
        by_attaching(conn, by_attach, copied, pace),
        carried(conn, shape, plan, following),
        [*warnings(conn, found), *_of_the_shape(shape, plan, following)],
    )


def _queries(conn: Connection, found: Survey, earlier: State | None) -> Workload | None:
    """The statements that will suffer, planned on the partitioned table if it exists already."""
    beside = partitioned_beside(earlier)
    if earlier is not None and beside is not None:
        return workload(conn, found.spec, len(earlier.plan.periods), beside)
    if found.shape is None:
        return None
    return workload(conn, found.spec, found.partitions + found.attaches)


def partitioned_beside(earlier: State | None) -> str | None:
    """The name of the partitioned table that an earlier run built, None when there is none."""
    if earlier is None or earlier.phase not in (Phase.COPYING, Phase.READY, Phase.MIGRATED):
        return None
    return earlier.table.name if earlier.phase.swapped else earlier.table.new


def sections(
    conn: Connection, migration: Migration, following: list[Dependent], newest: Period | None
) -> Iterator[Section]:
    """The statements of a migration in order; ``following`` is what refers to the table.

    ``newest`` is the period of the newest row. Periods after it and after the current one are assumed to be
    empty, and the script checks that they are.
    """
    shape, plan, state = migration.shape, migration.plan, migration.state
    if plan.attaches:
        yield from _attach_sections(conn, migration, following)
        return
    table, home = plan.table, plan.table.home
    present = table.period(plan.started_at)
    filled = [p for p in plan.periods if p <= present or (newest is not None and p <= newest)]
    empty = next((p for p in plan.periods if p not in filled), None)
    up_to_date = [_require_nothing_newer(migration, empty.start if empty else plan.end)]

    yield Section(
        "Step 1: the partitioned table beside the one in use, and the state of the migration",
        [*up_to_date, *parent_and_log_statements(shape, state)],
    )
    yield Section(
        "Step 1: note what is written from now on; writers wait for a moment",
        begin_notes_statements(shape),
        locks=True,
    )
    yield Section("Step 2: the partitions", [*up_to_date, *leaves_statements(shape, plan.periods, empty)])
    for period in reversed(filled):
        yield from _period_sections(migration, period)
    if plan.foreign_keys:
        yield from _foreign_key_sections(migration)
    yield Section("Step 4: the functions that maintain the partitions", function_statements(shape))
    yield Section("Step 5: replay the notes", _replay(migration))
    yield Section(
        "Step 5: every period was found equal",
        [
            _require_equal_periods(migration),
            *autovacuum_as_before_statements(shape, plan.periods),
            phase_statement(table, Phase.READY),
        ],
    )
    yield Section(
        "Step 6: the last notes, then the renames. Reads and writes wait, for milliseconds. The program does"
        " this with two sessions, so that even a REPEATABLE READ transaction that began before misses no"
        " row, and compares the definitions of the two tables again",
        [
            lock_table(home, table.name, "SHARE ROW EXCLUSIVE"),
            *_replay(migration),
            our_path(),
            lock_table(home, table.name, "ACCESS EXCLUSIVE"),
            lock_table(home, table.new, "ACCESS EXCLUSIVE"),
            *forward_statements(shape, plan),
            *redirect_statements(following, name(home, table.name), name(home, table.old)),
        ],
        locks=True,
    )
    if plan.foreign_keys:
        yield Section(
            f"Step 6: drop the foreign keys of {table.old}, which is no longer in use",
            drop_keys_statements(migration),
            locks=True,
        )
    yield Section(
        "Step 6: compare what was written during the migration; it is complete",
        [
            _require_equal_keys(migration),
            *verified_statements(shape, plan),
        ],
    )
    yield Section("Statistics", [final_statistics(conn, shape, [present])], in_transaction=False)


def _attach_sections(conn: Connection, migration: Migration, following: list[Dependent]) -> Iterator[Section]:
    """The same for the strategy that copies nothing."""
    shape, plan, table = migration.shape, migration.plan, migration.table
    yield Section(
        "Step 1: the partitioned table beside the one in use, and the state of the migration",
        [
            _require_far(plan),
            _require_nothing_newer(migration, plan.first),
            *attach.build_statements(migration),
        ],
    )
    yield Section(
        "Step 2: the partitions from the bound on",
        leaves_statements(shape, plan.periods, plan.periods[0] if plan.periods else None),
    )
    if not attach.has_its_key(plan):
        yield Section(
            "Step 3: the index of the future primary key; reads and writes go on",
            [attach.index_statement(migration)],
            in_transaction=False,
        )
    yield Section(
        "Step 3: from now on no row may lie beyond the bound; reads and writes wait for a moment",
        [attach.check_statement(migration)],
        locks=True,
    )
    yield Section(
        "Step 3: check every row; reads and writes go on",
        [attach.validate_check_statement(migration)],
    )
    for group in at_once([table.partition(period) for period in plan.periods]) if plan.foreign_keys else ():
        yield Section(
            f"Step 3: the foreign keys of {group[0]} to {group[-1]}; writes to the tables they refer to"
            " wait, for milliseconds",
            leaf_statements(migration, group),
            locks=True,
        )
    yield Section("Step 4: the functions that maintain the partitions", function_statements(shape))
    yield Section("Step 5: it is ready", [phase_statement(table, Phase.READY)])
    yield Section(
        "Step 6: the renames, the primary key, ATTACH. Reads and writes wait, for milliseconds",
        [
            lock_table(table.home, table.name, "ACCESS EXCLUSIVE"),
            *attach.forward_statements(shape, plan),
            *redirect_statements(following, name(table.home, table.name), name(table.home, table.history)),
        ],
        locks=True,
    )
    if plan.foreign_keys:
        yield Section(
            "Step 6: the foreign keys of the partitioned table adopt those of the partitions",
            adopt_statements(migration, table.name),
            locks=True,
        )
    yield Section("It is complete", [verified_statement(table)])
    yield Section("Statistics", [final_statistics(conn, shape, [])], in_transaction=False)


def _period_sections(migration: Migration, period: Period) -> Iterator[Section]:
    shape, table = migration.shape, migration.table
    leaf = migration.relation(table.partition(period))
    rows = statement(
        "{source} WHERE {within}", source=migration.relation(table.name), within=within(migration, period)
    )
    yield Section(
        f"Step 3: the rows of {period}, then their indexes. The program does it in batches",
        [application_path(), put_statement(shape, leaf, rows), *index_statements(shape, leaf)],
    )
    yield Section(
        f"Step 3: compare {period}, and attach it",
        [
            statistics_statement(shape, leaf),
            side_by_side_statement(),
            compare_and_note_statement(migration, period),
            *attach_statements(shape, period, checked=True),
        ],
    )


def _foreign_key_sections(migration: Migration) -> Iterator[Section]:
    plan = migration.plan
    leaves = [plan.table.partition(period) for period in plan.periods]
    yield Section(
        "Step 3: before the foreign keys: from now on a DELETE also deletes the copy of the row; writers wait"
        " for a moment",
        begin_unlinking_statements(migration),
        locks=True,
    )
    yield Section("Step 3: replay the notes", _replay(migration))
    for group in at_once(leaves):
        yield Section(
            f"Step 3: the foreign keys of {group[0]} to {group[-1]}, not validated; writes to the tables they"
            " refer to wait, for milliseconds",
            leaf_statements(migration, group, not_valid=True),
            locks=True,
        )
    yield Section(
        "Step 3: validate them; reads and writes go on",
        [validate_statement(migration.relation(leaf), key) for leaf in leaves for key in plan.foreign_keys],
    )
    yield Section(
        "Step 3: the foreign keys of the partitioned table adopt those of the partitions",
        adopt_statements(migration, migration.table.new),
        locks=True,
    )


def _replay(migration: Migration) -> list[Statement]:
    return [
        _refuse_if(
            statement(
                "(SELECT truncated OR timeless FROM ({notes}) AS w (notes, truncated, timeless))",
                notes=waiting_notes_query(migration, Direction.FORWARD, 1),
            ),
            f"{migration.table} was emptied by TRUNCATE during the copy, or has a row without a time;"
            f" undo the migration with: {rollback_command(migration.table)}",
        ),
        *replay_settings(migration),
        replay_statement(
            migration,
            Direction.FORWARD,
            statement("ARRAY({which})", which=which_notes(migration, Direction.FORWARD, _EVERY_NOTE)),
        ),
    ]


_REFUSE = """DO $chronos$
BEGIN
    IF {condition} THEN
        RAISE EXCEPTION USING MESSAGE = {message};
    END IF;
END
$chronos$"""


def _refuse_if(condition: Statement, message: str) -> Statement:
    """A check that the program makes between two statements, made by the server in the script."""
    return statement(_REFUSE, condition=condition, message=message)


def _require_nothing_newer(migration: Migration, end: datetime) -> Statement:
    return _refuse_if(
        statement(
            "EXISTS (SELECT FROM {table} WHERE {c} >= {end})",
            table=migration.relation(migration.table.name),
            c=migration.shape.time_column,
            end=migration.shape.instant(end),
        ),
        f"there are rows from {end:%Y-%m-%d %H:%M} UTC on, which this plan does not cover; make a new one",
    )


def _require_far(plan: Plan) -> Statement:
    """A bound that is too near would make inserts fail before anybody notices."""
    return _refuse_if(
        statement("now() >= {last}", last=plan.first - timedelta(days=1)),
        f"the bound of this plan, {plan.first:%Y-%m-%d %H:%M} UTC, is less than a day away; make a new one",
    )


def _require_equal_periods(migration: Migration) -> Statement:
    return _refuse_if(
        statement(
            "EXISTS (SELECT FROM {state}, jsonb_each(compared) AS c\n"
            "               WHERE c.value -> 'old_rows' <> c.value -> 'new_rows'"
            " OR c.value -> 'alike' <> 'true')",
            state=migration.relation(migration.table.state),
        ),
        f"a period differs from its copy, see the column compared of {migration.table.state};"
        f" undo the migration with: {rollback_command(migration.table)}",
    )


def _require_equal_keys(migration: Migration) -> Statement:
    table = migration.table
    return _refuse_if(
        statement(
            "(SELECT differing > 0 FROM ({comparison}) AS c (keys, differing, example))",
            comparison=replayed_comparison(migration, table.old, table.name),
        ),
        f"rows that were written during the migration differ between {table.old} and {table.name};"
        f" undo it with: {rollback_command(table)}",
    )


# Functions whose body is text find the new table by its name.
_NAMED_BY = """
SELECT p.oid::regprocedure::text FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname <> 'information_schema' AND n.nspname !~ '^pg_' AND p.prosqlbody IS NULL
  AND p.prosrc ~* {pattern}
ORDER BY 1
"""


def carried(
    conn: Connection, shape: TableShape, plan: Plan, following: list[Dependent]
) -> list[tuple[str, str]]:
    """Everything that belongs to the table or refers to it, and what becomes of it."""
    table, same = plan.table, "the same"
    key = f"({', '.join(plan.new_key)})"
    not_null = next(column.not_null for column in shape.columns if column.name == table.column)
    found = [
        (
            f"{len(shape.columns)} columns",
            "the same, with defaults, storage, statistics targets and comments",
        ),
        (table.column, same if not_null else "becomes NOT NULL, as part of the key"),
    ]
    for index in shape.indexes:
        how = same
        if index == shape.key_index and not index.primary:
            how = f"becomes the primary key, over {key}"
        elif index == shape.key_index and plan.old_key != plan.new_key:
            how = f"over {key} from the swap on"
        found.append((f"{'primary key' if index.primary else 'index'} {index.name}", how))
    for check in shape.checks:
        if check.kind == "c":
            how = same if check.validated else "validated, as every copied row is checked"
            found.append((f"check {check.name}", how))
    found += [
        (
            f"foreign key {k.name}",
            f"the same; dropped from {table.old} after the swap, restored by rollback",
        )
        for k in shape.foreign_keys
    ]
    for sequence in shape.sequences:
        how = (
            "a sequence of its own that continues from the current value"
            if sequence.identity
            else "used by both tables, owned by neither, until rollback or finalize"
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
    found += [(f"trigger {t.name}", "the same; does not fire for copied rows") for t in shape.triggers]
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
        found.append((f"tablespace {shape.tablespace}", "also that of the partitions"))
    if shape.replica_identity != "d":
        how = {"f": "FULL", "n": "NOTHING"}[shape.replica_identity]
        found.append(("replica identity", f"{how}, also of the partitions"))
    found += [
        (
            f"{f.kind} {f.name}",
            "publishes the new table instead of the old one"
            if f.kind == "publication"
            else "refers to the new table from the swap on; keeps its grants and options",
        )
        for f in following
    ]
    named_by = statement(_NAMED_BY, pattern=rf"\m{re.escape(table.name)}\M")
    found += [
        (f"function {row[0]}", "names the table in its text, so it finds the new one")
        for row in execute(conn, named_by).all()
    ]
    return found


def _of_the_shape(shape: TableShape, plan: Plan, following: list[Dependent]) -> Iterator[Finding]:
    """What is inherently different afterwards, and can matter to an application."""
    if any(dependent.kind != "publication" for dependent in following):
        yield Finding(
            "dependents-go-with-the-table",
            f"going back by hand with DROP TABLE {plan.table} CASCADE would drop views and everything else"
            f" that refers to it; {rollback_command(plan.table)} makes them refer to the plain table again",
        )
    if plan.old_key != plan.new_key:
        yield Finding(
            "on-conflict",
            f"ON CONFLICT ({', '.join(plan.old_key)}) will no longer match a unique key; it must be"
            f" ON CONFLICT ({', '.join(plan.new_key)})",
        )
    if any(t.by_row for t in shape.triggers):
        yield Finding(
            "update-moves-a-row",
            "an UPDATE that moves a row to another partition fires the triggers of DELETE and INSERT; a"
            " BEFORE trigger may not move a row to another partition",
        )
    for index in shape.indexes:
        if index.clustered:
            yield Finding(
                "cluster-mark",
                f"index {index.name} loses its CLUSTER mark, which partitioned tables do not support",
            )
        if index.statistics:
            yield Finding(
                "index-statistics", f"index {index.name} loses the statistics target of its expressions"
            )


class _Report:
    """Prints the plan, in full or on one screen; in a ``script`` everything but SQL is behind ``--``."""

    def __init__(self, console: Console, patience: Patience, *, script: bool = True) -> None:
        self.console = console
        self.patience = patience
        self.mark = "-- " if script else ""
        self.width = _WIDTH - 3 if script else max(60, min(console.width, _ON_SCREEN["width"]) - 1)

    def raw(self, text: str) -> None:
        """A line as it is."""
        self.console.out(text, highlight=False)

    def say(self, text: str, indent: str = "") -> None:
        """Some sentences."""
        for line in textwrap.wrap(text, self.width, subsequent_indent=indent, break_on_hyphens=False) or [""]:
            self.raw(f"{self.mark}{line}".rstrip())

    def say_with_commands(self, text: str, indent: str = "") -> None:
        """Some sentences; commands and statements in them get lines of their own, for copying."""
        for line in for_reading(text, self.width, indent).splitlines():
            self.raw(f"{self.mark}{line}".rstrip())

    def all(self, found: Survey, queries: Workload | None, outlook: Outlook | None) -> None:
        """Everything but the SQL."""
        self.head(found)
        if outlook is not None:
            plan = outlook.plan
            if plan.attaches:
                self.history(plan)
            else:
                self.window(plan)
                self.periods(plan, outlook.rows, found, exact=outlook.exact)
            self.ways(outlook.copying, outlook.attaching)
            self.effort(plan, outlook.pace)
        if queries is not None:
            self.queries(queries)
        if outlook is not None:
            self.title("What is carried over, and how")
            for what, how in outlook.carried:
                self.item(what, how)
            self.title("Warnings")
            for warning in outlook.warnings:
                self.finding("warning", warning)
        for blocker in found.blockers:
            self.finding("BLOCKER", blocker)

    def script(
        self, conn: Connection, migration: Migration, following: list[Dependent], newest: Period | None
    ) -> None:
        """The SQL."""
        table = migration.table
        self.title("The SQL, ready for psql, to be run while nobody writes")
        self.say_with_commands(
            "It may stop anywhere: each part of it is a transaction. To carry on where it stopped, type:"
            f" {migrate_command(table)} --resume; to undo what it did: {rollback_command(table)}"
        )
        self.raw("\\set ON_ERROR_STOP on")
        for section in sections(conn, migration, following, newest):
            self.section(section, conn)

    def screen(self, url: URL, found: Survey, queries: Workload | None, outlook: Outlook | None) -> None:
        """What to know before you type MIGRATE, in 80 columns and about 40 lines."""
        self._fact("Plan", f"to migrate {found.spec.typed}; nothing was changed")
        self._fact("Server", _target(url))
        rows = f"about {counted(found.rows_estimate, 'row')}, {in_bytes(found.bytes)} with indexes"
        self._fact("Table", f"{rows}; {found.now:%Y-%m-%d %H:%M} UTC by the server's clock")
        if outlook is not None:
            self._fact("Partitions", _span(outlook.plan))
        self._findings("Blockers", found.blockers, _ON_SCREEN["blockers"])
        if outlook is not None:
            self._findings("Warnings", outlook.warnings, _ON_SCREEN["warnings"])
            self.raw("")
            self.table(_both(outlook.copying, outlook.attaching))
            self._fact("Recommended", recommended(outlook.copying, outlook.attaching))
            self._fact(
                "Lock wait",
                f"{self.patience.shortest_s * 1000:.0f} ms an attempt, up to {self.patience.longest_s:g} s"
                " (--max-lock-wait)",
            )
        if queries is not None:
            self._fact("Queries", _in_short(queries))
            for found_one in queries.suffering[: _ON_SCREEN["queries"]]:
                self.raw(_cut(f"  {_weight(found_one)}  {_one_line(found_one.text)}", self.width))
                self.raw(_cut(f"      {_advice(found_one, queries)[0]}", self.width))

    def _fact(self, what: str, text: str) -> None:
        self.say(f"{what:<12}{text}", indent=" " * 12)

    def _findings(self, what: str, found: Sequence[Finding], most: int) -> None:
        count = len(found)
        more = f"{count}; --verbose shows them in full" if count else "none"
        self._fact(what, more)
        wide = max((len(one.id) for one in found[:most]), default=0)
        for one in found[:most]:
            self.raw(_cut(f"  {one.id:<{wide}}  {_one_line(one.text)}", self.width))
        if count > most:
            self.raw(f"  and {count - most} more")

    def where_the_sql_is(self, found: Survey, path: Path | None, *, verbose: bool) -> None:
        """The last lines of a plan that is printed without its SQL."""
        if found.blockers:
            if path is not None:
                self._fact("SQL", f"none was written to {path}, as there is a blocker")
            return
        # Not wrapped: a path must stay copyable.
        self.raw(f"{'SQL':<12}{f'in {path}' if path else '--sql FILE writes every statement to a file'}")
        if not verbose:
            self._fact("", "--verbose prints the full report")

    def queries(self, found: Workload) -> None:
        """The statements that will suffer, and what to do about each."""
        self.title("Which queries will suffer")
        self.say(_in_short(found))
        for one in found.suffering[:_IN_REPORT]:
            self.say(f"{_weight(one)}: {_cut(_one_line(one.text), 300)}", indent="    ")
            for line in _advice(one, found):
                self.say(f"    {line}", indent="    ")
        more = len(found.suffering) - _IN_REPORT
        if more > 0:
            self.say(f"and {more} more")
        for kind, fact in list(_facts(found))[:_IN_REPORT]:
            self.say(f"{kind}: {_cut(_one_line(fact.text), 200)}", indent="    ")
        if found.statements:
            for note in found.notes:
                self.say_with_commands(note)

    def title(self, text: str) -> None:
        """A heading."""
        self.raw(self.mark.rstrip())
        self.say(text)
        self.say("-" * min(len(text), self.width))

    def item(self, what: str, how: str) -> None:
        """One thing and what there is to say about it."""
        self.say(f"{what}: {how}", indent="    ")

    def finding(self, what: str, found: Finding) -> None:
        """A blocker or a warning, with the id to look it up in the guide."""
        self.say_with_commands(f"{what}: {found}", indent="    ")

    def head(self, found: Survey) -> None:
        """Which table, and how large."""
        self.title("Plan of a migration; nothing was changed")
        self.item("table", found.spec.typed)
        self.item(
            "size", f"about {counted(found.rows_estimate, 'row')}, {in_bytes(found.bytes)} with indexes"
        )
        self.item("now", f"{found.now:%Y-%m-%d %H:%M} UTC, by the server's clock")

    def history(self, plan: Plan) -> None:
        """What becomes of the rows when nothing is copied."""
        table, bound = plan.table, f"{plan.first:%Y-%m-%d %H:%M} UTC"
        self.item(
            "strategy", f"attach: no row is copied; {table} itself becomes the partition {table.history}"
        )
        self.item(
            "bound", f"all rows before {bound} are in {table.history}; then one partition per {table.every}"
        )
        goes = expires_on(plan.first, table.retention_days)
        self.item(
            f"{table.history} is dropped",
            f"on {goes}, when its last row has expired" if goes else "never, as every row is kept",
        )

    def window(self, plan: Plan) -> None:
        """Which rows are copied."""
        if plan.table.retention_days is None:
            self.item("window", "every row is copied")
        else:
            self.item(
                "window", f"rows since {plan.cutoff:%Y-%m-%d %H:%M} UTC are copied; older ones stay behind"
            )

    def periods(self, plan: Plan, rows: dict[Period, int], found: Survey, *, exact: bool) -> None:
        """Rows and bytes of each period."""
        partitions = plan.periods
        first, last = plan.table.partition(partitions[0]), plan.table.partition(partitions[-1])
        self.title(f"{len(partitions)} partitions, {first} to {last}")
        size = row_bytes(found, sum(rows.values()))
        table = Table(plan.table.every.value, box=None, pad_edge=False)
        table.add_column("rows" if exact else "rows (planner's estimate)", justify="right")
        table.add_column("size", justify="right")
        for period in partitions:
            if period in rows or period.start <= plan.started_at:
                count = rows.get(period, 0)
                table.add_row(f"{period}", f"{count:,}", in_bytes(count * size))
        self.table(table)

    def table(self, table: Table) -> None:
        """A table within the width."""
        lines = Console(width=self.width, color_system=None)
        with lines.capture() as text:
            lines.print(table)
        for line in text.get().splitlines():
            self.raw(f"{self.mark}{line}".rstrip())

    def ways(self, copying: Way, attaching: Way) -> None:
        """Both strategies side by side, and which one suits this table."""
        self.title("What each strategy takes (estimates)")
        self.table(_both(copying, attaching))
        self.item("recommended", recommended(copying, attaching))

    def effort(self, plan: Plan, pace: Pace | None) -> None:
        """Where the durations come from, and who has to wait."""
        if pace is not None:
            self.item(
                "duration",
                f"from a sample, read here at {1 / pace.read_s:,.0f} rows/s and sorted at"
                f" {1 / pace.sort_s:,.0f} rows/s, from memory, with two workers and no other load; gathering"
                f" statistics at the end comes on top; {plan.table} is complete and in use all the time",
            )
        locks = _locks_of_attach(plan) if plan.attaches else _locks_of_copy(plan)
        self.item(
            "locks",
            f"{locks}. An attempt at a lock waits {self.patience.shortest_s * 1000:.0f} ms, and up to"
            f" {self.patience.longest_s:g} s when attempts"
            " keep failing (--max-lock-wait); then it gives up its place in the queue and retries",
        )

    def section(self, section: Section, conn: Connection) -> None:
        """Some statements of the script."""
        self.raw("")
        self.say(section.title)
        if section.in_transaction:
            self.raw("BEGIN;")
            wait_ms = round(self.patience.longest_s * 1000) if section.locks else 0
            self.raw(render(conn, session_settings(wait_ms)) + ";")
        for query in section.statements:
            self.raw(render(conn, query).strip().rstrip(";") + ";")
        if section.in_transaction:
            self.raw("COMMIT;")


def _locks_of_copy(plan: Plan) -> str:
    more = ""
    if plan.foreign_keys:
        referred = _referred(plan)
        more = (
            f", again before the foreign keys, and writers of {referred} whenever"
            f" {_in_a_group(plan)} partitions get theirs; {referred} is locked for a"
            f" moment when {plan.table.new} adopts them and when they are dropped from {plan.table.old}"
        )
    return (
        f"writers wait for a moment when the note triggers are created{more}; readers and writers wait once,"
        " for milliseconds, when the names change"
    )


def _locks_of_attach(plan: Plan) -> str:
    more = ""
    if plan.foreign_keys:
        more = (
            f"; writers of {_referred(plan)} wait whenever {_in_a_group(plan)} partitions get their foreign"
            f" keys, and its readers too when {plan.table} adopts them"
        )
    return f"readers and writers wait twice, for milliseconds: for the CHECK, and when the names change{more}"


def _in_a_group(plan: Plan) -> int:
    """How many partitions get their foreign keys in one transaction."""
    return min(AT_ONCE, len(plan.periods))


def _referred(plan: Plan) -> str:
    return " and ".join(dict.fromkeys(key.table for key in plan.foreign_keys))


def _both(copying: Way, attaching: Way) -> Table:
    """The two strategies side by side."""
    table = Table("", "copy", "attach", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for what in copying.facts or attaching.facts:
        table.add_row(what, copying.facts.get(what, "refused"), attaching.facts.get(what, "refused"))
    return table


def _target(url: URL) -> str:
    """The server, without the password."""
    user = url.username or "of this system"
    return f"{url.host or 'local socket'}, port {url.port or 5432}, database {url.database}, user {user}"


def _span(plan: Plan) -> str:
    table, periods = plan.table, plan.periods
    span = f"{len(periods)}, {table.partition(periods[0])} to {table.partition(periods[-1])}"
    if plan.attaches:
        return f"{span}, and {table.history} for all rows before {plan.first:%Y-%m-%d %H:%M} UTC"
    if table.retention_days is None:
        return f"{span}; every row is copied"
    return f"{span}; rows since {plan.cutoff:%Y-%m-%d %H:%M} UTC are copied"


# --- Queries ---


def _in_short(found: Workload) -> str:
    """In a sentence: how many suffer, or why that is unknown."""
    if not found.statements:
        return found.notes[0] if found.notes else "pg_stat_statements has none on this table yet"
    count, suffering = len(found.statements), [one for one in found.statements if one.why is not None]
    changed = sum(bool(one.facts) for one in found.statements)
    share = sum(one.share for one in suffering)
    text = f"each of the {count} on this table allows partition pruning"
    if suffering:
        text = (
            f"{len(suffering)} of {count} on this table prune no partition: {share:.0%} of the"
            f" database's time, {found.locks:,} locks per call"
        )
    compiled = sum(one.planned is not None and one.planned.jit for one in found.statements)
    if compiled:
        text += f"; {compiled} would trigger JIT"
    return text + (f"; {changed} will fail or mean something else" if changed else "")


def _weight(one: Statistic) -> str:
    return f"{counted(one.calls, 'call')}, {one.share:.1%} of time"


def _advice(one: Statistic, found: Workload) -> list[str]:
    """What to do about a statement, and what the planner made of it."""
    lines = [] if one.why is None else [one.why.advice(found.subject.column)]
    if one.planned is None:
        return lines
    planned = one.planned
    if planned.scanned == planned.partitions:
        lines.append(f"planned: it scans all {planned.partitions} partitions")
    else:
        lines.append(f"planned: it scans {planned.scanned} of {planned.partitions} partitions")
    if planned.jit:
        lines.append(
            f"planned: its cost of {planned.cost:,.0f} triggers JIT; set jit = off for the role that runs it"
        )
    return lines


def _facts(found: Workload) -> Iterator[tuple[str, Statistic]]:
    """Statements that mean something else on a partitioned table, or fail."""
    for one in found.statements:
        for fact in one.facts:
            yield f"{_weight(one)}, {fact.value}", one


def _one_line(text: str) -> str:
    """Text from somebody else, without characters that would move the cursor or end a comment."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3].rstrip() + "..."
