"""The dry run: what a migration would do, without doing it, as a report and as SQL that psql can run.

The statements come from the functions that the migration itself runs. All that is printed besides them
is behind ``--``, so that the output as a whole is a script.
"""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from uuid import uuid4

from rich.console import Console
from rich.table import Table
from sqlalchemy.engine import Connection, Engine

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
from chronos.migration.foreign_keys import (
    AT_ONCE,
    adopt_statements,
    at_once,
    begin_unlinking_statements,
    given_up_statements,
    leaf_statements,
)
from chronos.migration.operator import Operator
from chronos.migration.state import Phase, Plan, State, Strategy, phase_statement, verified_statement
from chronos.migration.swap import forward_statements
from chronos.table import Period, TableSpec

_WIDTH = 80
_SAMPLE = 20_000
# How much longer it takes to write, index, check and compare a row than to read and hash it. A guess that
# held on the machines it was tried on; the report says that it is one.
_COPY_FACTOR = 2
# The same for a row that only gets into one more index and is checked.
_ATTACH_FACTOR = 0.3
# An entry of the new index is that of the old key and the time, aligned.
_TIME_BYTES = 8
# From here on a copy is more than a disk or a night should be asked for without need.
_LARGE_BYTES = 100 * 2**30
_LONG_S = 3 * 3600
# Up to here the rows of each period are counted, beyond it the planner is asked.
_COUNTABLE = 5_000_000
# More notes than a script can meet.
_EVERY_NOTE = 1_000_000_000


@dataclass(frozen=True)
class Section:
    """Some statements of the script: a transaction, or each one by itself.

    ``locks`` tells that they ask for locks which the application can feel: then they wait for them as long
    as an attempt of the program does at most, and the script ends when that is not enough.
    """

    title: str
    statements: Sequence[Statement]
    in_transaction: bool = True
    locks: bool = False


def dry_run(
    engine: Engine,
    table: TableSpec,
    console: Console,
    patience: Patience | None = None,
    strategy: Strategy = Strategy.COPY,
    accepted: frozenset[str] = frozenset(),
) -> None:
    """Print the plan of a migration, and then its SQL; nothing is changed, and nothing can be.

    One read-only transaction: ACCESS SHARE on the table, as a query would take it. Raises RefusedError
    when something stands in the way of the migration, after all of it has been printed.
    """
    report = _Report(console, patience or Patience())
    with opened(engine) as conn:
        table = require_located(conn, table)
        with transaction(conn):
            execute(conn, statement("SET TRANSACTION READ ONLY"))
            earlier = states.read(conn, table)
            if earlier is not None and states.undone_by_hand(conn, earlier):
                raise RefusedError(
                    f"an earlier migration of {table} was undone by hand; nothing was changed. To migrate"
                    f" removes its remains first; for a plan, remove them with: {rollback_command(table)}"
                )
            found = survey(conn, table, strategy, accepted)
            report.head(found)
            if not found.blockers:
                _plan(engine, conn, found, report)
    for blocker in found.blockers:
        report.finding("BLOCKER", blocker)
    if found.blockers:
        raise RefusedError("; ".join((*map(str, found.blockers), "nothing was changed")))


def _plan(engine: Engine, conn: Connection, found: Survey, report: _Report) -> None:
    shape = found.shape
    assert shape is not None
    plan = replace(first_plan(found), functions=tuple(definitions(conn, found.spec).values()))
    migration = Migration(
        engine, conn, Operator(Output(report.console)), State(uuid4(), Phase.BUILT, plan), shape
    )
    following = dependents(conn, shape.oid)
    exact = found.rows_estimate <= _COUNTABLE
    by_copy = found if not found.attaches else survey(conn, found.spec, Strategy.COPY, found.accepted)
    by_attach = found if found.attaches else survey(conn, found.spec, Strategy.ATTACH)
    rows: dict[Period, int] = {}
    if not by_copy.blockers:
        window = replace(migration, state=replace(migration.state, plan=first_plan(by_copy)))
        rows = rows_per_period(window) if exact else _expected_rows(window)
    if plan.attaches:
        report.history(plan)
    else:
        report.window(plan)
        report.periods(plan, rows, found, exact=exact)
    rate = _reading_rate(migration)
    copied = sum(rows.values())
    report.ways(_copying(by_copy, copied, rate), _attaching(conn, by_attach, copied, rate))
    report.effort(plan, rate)
    report.title("What comes along, and how")
    for what, how in carried(conn, shape, plan, following):
        report.item(what, how)
    report.title("Warnings")
    for warning in [*warnings(conn, found), *_of_the_shape(shape, plan, following)]:
        report.finding("warning", warning)
    report.title("The SQL, for psql to run as it is while nobody writes")
    report.say_with_commands(
        "It can be cut off anywhere: each part of it is a transaction. To carry on where it ended, type:"
        f" {migrate_command(plan.table)} --resume; to undo what it did: {rollback_command(plan.table)}"
    )
    report.raw("\\set ON_ERROR_STOP on")
    for section in sections(conn, migration, following, max(rows, default=None)):
        report.section(section, conn)


def sections(
    conn: Connection, migration: Migration, following: list[Dependent], newest: Period | None
) -> Iterator[Section]:
    """The statements of a migration in their order; ``following`` is what refers to the table.

    ``newest`` is the period of the newest row. Periods after it and after the present one are taken to be
    empty, and the script makes sure that they are.
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
        "Step 1: note what is written from now on; writers wait for an instant",
        begin_notes_statements(shape),
        locks=True,
    )
    yield Section("Step 2: the partitions", [*up_to_date, *leaves_statements(shape, plan.periods, empty)])
    for period in reversed(filled):
        yield from _period_sections(migration, period)
    if plan.foreign_keys:
        yield from _foreign_key_sections(migration)
    yield Section("Step 4: the functions that keep the partitions", function_statements(shape))
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
        "Step 6: the last notes, then the names. Nobody reads or writes meanwhile, for milliseconds. The"
        " program does it with two sessions, so that even a REPEATABLE READ transaction begun before"
        " misses no row, and compares the two tables' definitions once more",
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
            f"Step 6: the foreign keys off {table.old}, for it is not in use any more",
            given_up_statements(migration),
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
    """The same where nothing is copied."""
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
            "Step 3: the index of the primary key to be; everybody reads and writes on",
            [attach.index_statement(migration)],
            in_transaction=False,
        )
    yield Section(
        "Step 3: from now on no row may lie beyond the bound; everybody waits for an instant",
        [attach.check_statement(migration)],
        locks=True,
    )
    yield Section(
        "Step 3: look at every row; everybody reads and writes on",
        [attach.validate_check_statement(migration)],
    )
    for group in at_once([table.partition(period) for period in plan.periods]) if plan.foreign_keys else ():
        yield Section(
            f"Step 3: the foreign keys of {group[0]} to {group[-1]}; nobody writes what they refer to"
            " meanwhile, for milliseconds",
            leaf_statements(migration, group),
            locks=True,
        )
    yield Section("Step 4: the functions that keep the partitions", function_statements(shape))
    yield Section("Step 5: it is ready", [phase_statement(table, Phase.READY)])
    yield Section(
        "Step 6: the names, the primary key, ATTACH. Nobody reads or writes meanwhile, for milliseconds",
        [
            lock_table(table.home, table.name, "ACCESS EXCLUSIVE"),
            *attach.forward_statements(shape, plan),
            *redirect_statements(following, name(table.home, table.name), name(table.home, table.history)),
        ],
        locks=True,
    )
    if plan.foreign_keys:
        yield Section(
            "Step 6: the foreign keys of the whole adopt those of the partitions",
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
        f"Step 3: compare {period}, and put it into its place",
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
        "Step 3: before the foreign keys, whoever deletes a row takes its copy away as well; writers wait"
        " for an instant",
        begin_unlinking_statements(migration),
        locks=True,
    )
    yield Section("Step 3: replay the notes", _replay(migration))
    for group in at_once(leaves):
        yield Section(
            f"Step 3: the foreign keys of {group[0]} to {group[-1]}, unchecked; nobody writes what they"
            " refer to meanwhile, for milliseconds",
            leaf_statements(migration, group, not_valid=True),
            locks=True,
        )
    yield Section(
        "Step 3: check them; everybody reads and writes on",
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
            f"{migration.table} was emptied by TRUNCATE meanwhile, or has a row without a time;"
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
    """What the program looks at between two statements, the script has the server look at."""
    return statement(_REFUSE, condition=condition, message=message)


def _require_nothing_newer(migration: Migration, end: datetime) -> Statement:
    return _refuse_if(
        statement(
            "EXISTS (SELECT FROM {table} WHERE {c} >= {end})",
            table=migration.relation(migration.table.name),
            c=migration.shape.time_column,
            end=migration.shape.instant(end),
        ),
        f"there are rows from {end:%Y-%m-%d %H:%M} UTC on, which this plan does not know; make a new one",
    )


def _require_far(plan: Plan) -> Statement:
    """A bound that comes too soon would make inserts fail before anybody has looked."""
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


# Functions that mention the table in a body of text find the new one by its name, as far as they go.
_NAMED_BY = """
SELECT p.oid::regprocedure::text FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname <> 'information_schema' AND n.nspname !~ '^pg_' AND p.prosqlbody IS NULL
  AND p.prosrc ~* {pattern}
ORDER BY 1
"""


def carried(
    conn: Connection, shape: TableShape, plan: Plan, following: list[Dependent]
) -> list[tuple[str, str]]:
    """Everything that hangs on the table: what it is, and what becomes of it."""
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
            how = f"over {key} from now on"
        found.append((f"{'primary key' if index.primary else 'index'} {index.name}", how))
    for check in shape.checks:
        if check.kind == "c":
            how = same if check.validated else "valid from now on, as every copied row is checked"
            found.append((f"check {check.name}", how))
    found += [
        (
            f"foreign key {k.name}",
            f"the same; {table.old} gives it up after the swap, and gets it back from rollback",
        )
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
        (f"trigger {t.name}", "the same; does not fire for rows that are copied") for t in shape.triggers
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
            if f.kind == "publication"
            else "refers to the new table from the swap on, keeps its grants and options",
        )
        for f in following
    ]
    named_by = statement(_NAMED_BY, pattern=rf"\m{re.escape(table.name)}\M")
    found += [
        (f"function {row[0]}", "names the table in its text, and so finds the new one")
        for row in execute(conn, named_by).all()
    ]
    return found


def _of_the_shape(shape: TableShape, plan: Plan, following: list[Dependent]) -> Iterator[Finding]:
    """What will be different by nature, and can matter to an application."""
    if any(dependent.kind != "publication" for dependent in following):
        yield Finding(
            "dependents-go-with-the-table",
            f"to go back by hand with DROP TABLE {plan.table} CASCADE would drop the views and all else that"
            f" refers to it; {rollback_command(plan.table)} lets them refer to the plain table again",
        )
    if plan.old_key != plan.new_key:
        yield Finding(
            "on-conflict",
            f"ON CONFLICT ({', '.join(plan.old_key)}) no longer finds a unique key; it has to be"
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
                f"index {index.name} is no longer marked for CLUSTER, partitioned tables know no such mark",
            )
        if index.statistics:
            yield Finding(
                "index-statistics", f"index {index.name} loses the statistics target of its expressions"
            )


def _expected_rows(migration: Migration) -> dict[Period, int]:
    """What the planner expects of each period; a period ahead only if it has any row at all."""
    plan, conn = migration.plan, migration.conn
    found: dict[Period, int] = {}
    for period in plan.periods:
        rows = statement(
            "FROM {table} WHERE {within}",
            table=migration.relation(plan.table.name),
            within=within(migration, period),
        )
        explained = execute(conn, statement("EXPLAIN (FORMAT JSON) SELECT {rows}", rows=rows)).scalar_one()
        count = int(explained[0]["Plan"]["Plan Rows"])
        if period.start > plan.started_at:
            some = execute(conn, statement("SELECT EXISTS (SELECT {rows})", rows=rows)).scalar_one()
            count = max(count, 1) if some else 0
        if count:
            found[period] = count
    return found


def _reading_rate(migration: Migration) -> float | None:
    """Rows a second that this server reads and hashes, from a sample of the newest; None without rows."""
    started = time.monotonic()
    rows = execute(
        migration.conn,
        statement(
            "SELECT count(md5(s::text)) FROM (SELECT * FROM {table} ORDER BY {c} DESC LIMIT {limit}) AS s",
            table=migration.relation(migration.table.name),
            c=migration.shape.time_column,
            limit=_SAMPLE,
        ),
    ).scalar_one()
    spent = max(time.monotonic() - started, 1e-3)
    return rows / spent if rows else None


class _Report:
    """Prints within 80 columns, all but SQL behind ``--``."""

    def __init__(self, console: Console, patience: Patience) -> None:
        self.console = console
        self.patience = patience

    def raw(self, text: str) -> None:
        """A line as it is."""
        self.console.out(text, highlight=False)

    def say(self, text: str, indent: str = "") -> None:
        """Some sentences."""
        for line in textwrap.wrap(text, _WIDTH - 3, subsequent_indent=indent, break_on_hyphens=False) or [""]:
            self.raw(f"-- {line}".rstrip())

    def say_with_commands(self, text: str, indent: str = "") -> None:
        """Some sentences; each command and each statement in them is on a line of its own, to be copied."""
        for line in for_reading(text, _WIDTH - 3, indent).splitlines():
            self.raw(f"-- {line}".rstrip())

    def title(self, text: str) -> None:
        """A heading."""
        self.raw("--")
        self.say(text)
        self.say("-" * min(len(text), _WIDTH - 3))

    def item(self, what: str, how: str) -> None:
        """One thing and what is to be said of it."""
        self.say(f"{what}: {how}", indent="    ")

    def finding(self, what: str, found: Finding) -> None:
        """A blocker or a warning, and the id under which the guide has it."""
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
            "strategy", f"attach: no row is copied, {table} itself becomes the partition {table.history}"
        )
        self.item(
            "bound", f"all before {bound} is {table.history}; {table.every} by {table.every} from there on"
        )
        goes = expires_on(plan.first, table.retention_days)
        self.item(
            f"{table.history} goes",
            f"on {goes}, when its last row has expired" if goes else "never, for every row is kept",
        )

    def window(self, plan: Plan) -> None:
        """Which rows are copied."""
        if plan.table.retention_days is None:
            self.item("window", "every row is copied")
        else:
            self.item(
                "window", f"rows since {plan.cutoff:%Y-%m-%d %H:%M} UTC are copied, the others stay behind"
            )

    def periods(self, plan: Plan, rows: dict[Period, int], found: Survey, *, exact: bool) -> None:
        """Rows and bytes of each period."""
        partitions = plan.periods
        first, last = plan.table.partition(partitions[0]), plan.table.partition(partitions[-1])
        self.title(f"{len(partitions)} partitions, {first} to {last}")
        size = _row_bytes(found, sum(rows.values()))
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
        lines = Console(width=_WIDTH - 3, color_system=None)
        with lines.capture() as text:
            lines.print(table)
        for line in text.get().splitlines():
            self.raw(f"-- {line}".rstrip())

    def ways(self, copying: _Way, attaching: _Way) -> None:
        """Both strategies side by side, and which is the better one here."""
        self.title("What it takes, one way and the other (estimates)")
        table = Table("", "copy", "attach", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for what in copying.facts or attaching.facts:
            table.add_row(what, copying.facts.get(what, "refused"), attaching.facts.get(what, "refused"))
        self.table(table)
        self.item("recommended", _recommended(copying, attaching))

    def effort(self, plan: Plan, rate: float | None) -> None:
        """Where the durations come from, and who has to wait."""
        if rate is not None:
            self.item(
                "duration",
                f"going by a sample read here at {rate:,.0f} rows/s, from memory; a copy takes about"
                f" {_COPY_FACTOR} times as long a row, an index and a check {_ATTACH_FACTOR} times;"
                f" {plan.table} is complete and in use all the time",
            )
        locks = _locks_of_attach(plan) if plan.attaches else _locks_of_copy(plan)
        self.item(
            "locks",
            f"{locks}. An attempt at a lock waits {self.patience.shortest_s * 1000:.0f} ms, and up to"
            f" {self.patience.longest_s:g} s when attempts"
            " fail for long (--max-lock-wait); then it lets go and tries again",
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
            f", once more before the foreign keys, and those of {referred} when each"
            f" {_in_a_group(plan)} partitions get theirs; {referred} is locked for an"
            f" instant when {plan.table.new} adopts them and when {plan.table.old} gives them up"
        )
    return (
        f"writers wait for an instant when the notes begin{more}; everybody waits for milliseconds when the"
        " names change, once"
    )


def _locks_of_attach(plan: Plan) -> str:
    more = ""
    if plan.foreign_keys:
        more = (
            f"; writers of {_referred(plan)} wait when each {_in_a_group(plan)} partitions get their foreign"
            f" keys, everybody there when {plan.table} adopts them"
        )
    return f"everybody waits for milliseconds, twice: for the check, and when the names change{more}"


def _in_a_group(plan: Plan) -> int:
    """How many partitions get their foreign keys in one transaction."""
    return min(AT_ONCE, len(plan.periods))


def _referred(plan: Plan) -> str:
    return " and ".join(dict.fromkeys(key.table for key in plan.foreign_keys))


@dataclass(frozen=True)
class _Way:
    """What one strategy takes: ``seconds``, ``bytes`` of disk, and the ``facts`` that are shown of it."""

    seconds: float
    bytes: float
    facts: dict[str, str]
    blockers: tuple[Finding, ...] = ()


def _copying(found: Survey, rows: int, rate: float | None) -> _Way:
    if found.blockers:
        return _Way(0, 0, {}, found.blockers)
    table = found.spec
    seconds = rows / rate * _COPY_FACTOR if rate else 0
    size = rows * _row_bytes(found, rows)
    facts = {
        "rows copied": f"{rows:,}",
        "duration": f"about {_duration(seconds)}",
        "WAL": f"about {in_bytes(size)}, and notes",
        "disk now": f"about {in_bytes(size)} more",
        "until": "finalize",
        "then": f"about {in_bytes(found.bytes - size)} less than today",
        f"by {table.every}": "at once",
        "one partition": "none",
        "locks before": "writers: the notes begin",
        "cut-over, ms": "last notes, names",
    }
    return _Way(seconds, size, facts)


def _attaching(conn: Connection, found: Survey, counted: int, rate: float | None) -> _Way:
    if found.blockers:
        return _Way(0, 0, {}, found.blockers)
    table, rows, shape = found.spec, max(found.rows_estimate, counted), found.shape
    assert shape is not None
    assert shape.key_index is not None
    before = after = 0.0
    until = "nothing is added"
    if not attach.has_its_key(first_plan(found)):
        old, fill_factor = _size_of_index(conn, shape)
        before = after = old + rows * _TIME_BYTES * 100 / fill_factor
        until = f"{table.history} goes"
        if shape.key_index.primary:
            after, until = before - old, "the swap"
    seconds = rows / rate * _ATTACH_FACTOR if rate else 0
    goes = expires_on(found.first, table.retention_days)
    facts = {
        "rows copied": "none",
        "duration": f"about {_duration(seconds)}",
        "WAL": f"about {in_bytes(before)}",
        "disk now": f"about {in_bytes(before)} more",
        "until": until,
        "then": f"about {in_bytes(after)} more",
        f"by {table.every}": f"from {found.first:%Y-%m-%d} on",
        "one partition": f"all before, {f'until {goes}' if goes else 'for good'}",
        "locks before": "everybody: the check",
        "cut-over, ms": "names, primary key, ATTACH",
    }
    return _Way(seconds, before, facts)


def _size_of_index(conn: Connection, shape: TableShape) -> tuple[int, int]:
    """Bytes of the index of the key, and its fill factor in percent."""
    assert shape.key_index is not None
    size, fill_factor = execute(
        conn,
        statement(
            "SELECT pg_relation_size(oid), coalesce((SELECT option_value::int"
            " FROM pg_options_to_table(reloptions) WHERE option_name = 'fillfactor'), 90)"
            " FROM pg_class WHERE oid = to_regclass(format('%I.%I', {schema}, {index}))",
            schema=shape.schema,
            index=shape.key_index.name,
        ),
    ).one()
    return size, fill_factor


def _recommended(copying: _Way, attaching: _Way) -> str:
    """Which strategy, and why; how much room the disk has is known to the operator alone."""
    if copying.blockers:
        return f"attach; a copy would be refused: {copying.blockers[0]}"
    if attaching.blockers:
        return f"copy; to attach it would be refused: {attaching.blockers[0]}"
    room, takes = in_bytes(copying.bytes), _duration(copying.seconds)
    if copying.bytes > _LARGE_BYTES or copying.seconds > _LONG_S:
        return (
            f"attach, for a copy takes {room} of disk and about {takes}; where there is room and time, a copy"
            " has every period in a partition of its own at once: --strategy copy"
        )
    return (
        "copy, for it has every period in a partition of its own at once; if there is no room for"
        f" {room}: --strategy attach"
    )


def _row_bytes(found: Survey, counted: int) -> float:
    """Bytes a row, indexes included; a table never analyzed has no estimate of its rows."""
    return found.bytes / max(found.rows_estimate, counted, 1)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
