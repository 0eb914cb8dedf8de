"""The second strategy: nothing is copied. The table itself becomes the partition for all rows before a bound.

The bound is some days ahead: until then, writes go into the old table as before, and the way back is as quick
as the way there. First, while the application reads and writes: a unique index that includes the time column,
and a CHECK that every row lies before the bound, so that nothing is scanned under a lock. Then the swap, in
milliseconds: names, primary key, ATTACH. The rows never move, so there is nothing to note, replay or compare,
and no snapshot can miss a row.

The old table is then called T_history, never T_old: the manual rollback of a copy (DROP TABLE T CASCADE) must
not find that name.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from dataclasses import replace
from datetime import datetime, timedelta

from psycopg2 import errorcodes, sql
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from chronos.catalog.ddl import (
    continue_identity,
    enable_statements,
    identity_statements,
    key_body,
    parent_statements,
    partition_differences,
    rename,
    rule_statements,
    sequences_back_statements,
    state_grants,
    trigger_state,
    trigger_statements,
)
from chronos.catalog.dependents import dependents, oid_of, redirect_statements, require_dependents
from chronos.catalog.partitions import attached
from chronos.catalog.shape import Index, TableShape, differences
from chronos.catalog.shape import read as read_shape
from chronos.db import Statement, execute, joined, name, opened, sqlstate, statement, transaction
from chronos.errors import ChronosError, ShapeError, StrayRowError
from chronos.locks import lock_table
from chronos.migration import state as states
from chronos.migration.build import leaves_statements
from chronos.migration.context import Migration
from chronos.migration.foreign_keys import add_to_leaves, adopt_keys
from chronos.migration.operator import StopRequestedError
from chronos.migration.state import (
    Heap,
    Phase,
    Plan,
    create_statement,
    fence_statement,
    phase_statement,
    verified_statement,
)
from chronos.migration.swap import changed_meanwhile
from chronos.migration.workers import CheckStop
from chronos.table import TableSpec, derived_name, midnight

BOUND_DAYS = 7
_POLL_S = 0.25
_TELL_S = 1.0


def bound_after(table: TableSpec, now: datetime, newest: datetime | None) -> datetime:
    """The bound: every row before it stays in the old table. A week from today, and after the newest row."""
    week = midnight(now.date()) + timedelta(days=BOUND_DAYS)
    period = table.period(week)
    bound = period.start if period.start == week else period.end
    return bound if newest is None or newest < bound else table.period(newest).end


def heap_of(shape: TableShape) -> Heap:
    """What the plain table gets back on a rollback."""
    assert shape.key_index is not None
    return Heap(
        key=shape.key_index,
        identities=shape.identities,
        triggers=tuple(t for t in shape.triggers if t.by_row),
        nullable=not shape.columns_by_name[shape.spec.column].not_null,
    )


def key_name(table: TableSpec) -> str:
    """The primary key of the partition that the old table becomes, and its index before that."""
    return derived_name(table.history, "_pkey")


def check_name(table: TableSpec) -> str:
    """The CHECK that every row of the old table lies before the bound."""
    return derived_name(table.history, "_bound")


def build_statements(migration: Migration) -> list[Statement]:
    """The partitioned table without partitions, and the state. No notes, as nothing is copied."""
    shape = migration.shape
    return [
        *parent_statements(shape, migration.plan.renames),
        create_statement(replace(migration.state, phase=Phase.COPYING)),
        *state_grants(shape),
    ]


def build(migration: Migration) -> None:
    """Step 1. No lock on the table in use."""
    with transaction(migration.conn) as conn:
        execute(conn, joined(build_statements(migration), ";\n"))
        states.read(conn, migration.table)  # as in build.py
    migration.refresh()


def build_partitions(migration: Migration) -> bool:
    """Step 2: the partitions from the bound on, attached. Returns whether any had to be built."""
    with transaction(migration.conn) as conn:
        migration.claim(conn)
        existing = {p.name for p in attached(conn, migration.table, migration.table.new)}
        missing = [p for p in migration.plan.periods if migration.table.partition(p) not in existing]
        if missing:
            execute(conn, joined(leaves_statements(migration.shape, missing, missing[0]), ";\n"))
    return bool(missing)


def adopt(migration: Migration, check_stop: CheckStop) -> None:
    """Step 3: everything slow, while the application reads and writes. Safe to call again.

    SHARE UPDATE EXCLUSIVE on the table in use for the index and the validation, ACCESS EXCLUSIVE for a moment
    for the CHECK; SHARE ROW EXCLUSIVE for moments on the tables that foreign keys refer to. Raises
    StrayRowError when a row lies at or beyond the bound, LockUnavailableError.
    """
    if not has_its_key(migration.plan):
        _build_index(migration, key_name(migration.table), index_statement(migration), check_stop)
    _add_check(migration)
    _validate(migration, check_stop)
    if migration.plan.foreign_keys:
        # On the new partitions. After the swap the partitioned table's keys adopt these and the old table's.
        add_to_leaves(migration, check_stop)


def has_its_key(plan: Plan) -> bool:
    """Whether the old table's primary key includes the time column already."""
    assert plan.heap is not None
    return plan.heap.key.primary and plan.table.column in plan.heap.key.columns


def index_statement(migration: Migration) -> Statement:
    """The index of the future primary key; building it blocks no reads or writes."""
    table = migration.table
    return _unique_index_statement(key_name(table), migration.relation(table.name), key_body(migration.shape))


def _unique_index_statement(index: str, table: Statement, body: Statement) -> Statement:
    return statement(
        "CREATE UNIQUE INDEX CONCURRENTLY {index} ON {table} {body}",
        index=name(index),
        table=table,
        body=body,
    )


def _build_index(migration: Migration, index: str, query: Statement, check_stop: CheckStop) -> None:
    """Build ``index`` by ``query``, unless it is there. Safe to call again."""
    valid = _index_is_valid(migration, index)
    if valid:
        return
    if valid is not None:
        # Left behind by an interrupted build: useless.
        _drop_index(migration, index, check_stop)
    _in_the_background(migration, query, "building index", check_stop)


def _index_is_valid(migration: Migration, index: str) -> bool | None:
    """Whether the index is there and usable; None when there is none."""
    with transaction(migration.conn):
        found: bool | None = execute(
            migration.conn,
            statement(
                "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(format('%I.%I', {s}, {i}))",
                s=migration.table.home,
                i=index,
            ),
        ).scalar()
    return found


def _drop_index(migration: Migration, index: str, check_stop: CheckStop) -> None:
    drop = statement("DROP INDEX CONCURRENTLY IF EXISTS {i}", i=name(migration.table.home, index))
    _in_the_background(migration, drop, "dropping index", check_stop)


def check_statement(migration: Migration) -> Statement:
    """Every row lies before the bound: enforced for new writes now; existing rows are validated later."""
    return statement(
        "ALTER TABLE {table} ADD CONSTRAINT {check} CHECK ({c} IS NOT NULL AND {c} < {bound}) NOT VALID",
        table=migration.relation(migration.table.name),
        check=name(check_name(migration.table)),
        c=migration.shape.time_column,
        bound=migration.shape.instant(migration.plan.first),
    )


def check_is_valid(conn: Connection, table: TableSpec, relation: str) -> bool | None:
    """Whether the CHECK is there and validated; None when there is none."""
    found: bool | None = execute(
        conn,
        statement(
            "SELECT convalidated FROM pg_constraint WHERE conname = {check}"
            " AND conrelid = to_regclass(format('%I.%I', {schema}, {relation}))",
            check=check_name(table),
            schema=table.home,
            relation=relation,
        ),
    ).scalar()
    return found


def _add_check(migration: Migration) -> None:
    table, conn = migration.table, migration.conn
    with transaction(conn):
        if check_is_valid(conn, table, table.name) is not None:
            return
    locks = migration.locks()
    for attempt in locks.attempts(conn, [(table.home, table.name)]):
        with attempt:
            migration.claim(conn)
            attempt.asks_now()
            execute(conn, check_statement(migration))
    migration.note(locks)


def validate_check_statement(migration: Migration) -> Statement:
    """Check every existing row, while the application reads and writes."""
    return statement(
        "ALTER TABLE {table} VALIDATE CONSTRAINT {check}",
        table=migration.relation(migration.table.name),
        check=name(check_name(migration.table)),
    )


def _validate(migration: Migration, check_stop: CheckStop) -> None:
    table = migration.table
    with transaction(migration.conn) as conn:
        if check_is_valid(conn, table, table.name):
            return
    try:
        what = f"checking that every row lies before {migration.plan.first:%Y-%m-%d %H:%M} UTC"
        _in_the_background(migration, validate_check_statement(migration), what, check_stop)
    except DBAPIError as error:
        if sqlstate(error) != errorcodes.CHECK_VIOLATION:
            raise
        raise StrayRowError(
            f"rows of {table} have a {table.column} that is NULL, or not before"
            f" {migration.plan.first:%Y-%m-%d %H:%M} UTC; correct or delete them"
        ) from error


# The index is nearly all the WAL of an attach, and its pages compress to less than half. Not with pglz, which
# takes longer than building the index.
COMPRESSION = """
SELECT CASE WHEN 'zstd' = ANY(enumvals) THEN 'zstd' WHEN 'lz4' = ANY(enumvals) THEN 'lz4' END
FROM pg_settings
WHERE name = 'wal_compression' AND setting = 'off' AND has_parameter_privilege(name, 'SET')
"""


def _in_the_background(migration: Migration, query: Statement, what: str, check_stop: CheckStop) -> None:
    """Run a slow statement over a connection of its own, and report its progress.

    A stop cancels it. Its settings are set for the session, as it runs outside any transaction of ours.
    """
    output = migration.operator.output
    with opened(migration.engine) as running, opened(migration.engine) as watching:
        running = running.execution_options(isolation_level="AUTOCOMMIT")
        pid = int(execute(running, statement("SELECT pg_catalog.pg_backend_pid()")).scalar_one())
        with transaction(watching):
            compression = execute(watching, statement(COMPRESSION)).scalar()
        settings = {"statement_timeout": "0", "lock_timeout": "0"}
        if compression:
            settings["wal_compression"] = compression
        for setting, value in settings.items():
            execute(running, statement("SET {s} = {v}", s=name(setting), v=value))
        try:
            with ThreadPoolExecutor(1, "chronos") as pool:
                future = pool.submit(execute, running, query)
                told, said = time.monotonic() - _TELL_S, ""
                while True:
                    try:
                        future.result(_POLL_S)
                        return
                    except StillRunning:
                        pass
                    try:
                        check_stop()
                    except StopRequestedError:
                        with transaction(watching):
                            execute(watching, statement("SELECT pg_cancel_backend({pid})", pid=pid))
                        future.exception()
                        raise
                    if time.monotonic() - told >= _TELL_S:
                        told = time.monotonic()
                        progress = f"{what}... {_progress(watching, pid)}".rstrip()
                        if progress != said:
                            said = progress
                            output.line(f"  {progress}")
        finally:
            if not running.closed:
                for setting in settings:
                    execute(running, statement("RESET {s}", s=name(setting)))


_PROGRESS = """
SELECT CASE WHEN p.phase LIKE 'waiting%' AND p.current_locker_pid <> 0
            THEN format('%s: pid %s', p.phase, p.current_locker_pid)
            WHEN p.blocks_total > 0 THEN format('%s%%', p.blocks_done * 100 / p.blocks_total)
            WHEN p.tuples_total > 0 THEN format('%s%%', p.tuples_done * 100 / p.tuples_total)
            ELSE p.phase END
FROM pg_stat_progress_create_index p WHERE p.pid = {pid}
"""


def _progress(conn: Connection, pid: int) -> str:
    with transaction(conn):
        found = execute(conn, statement(_PROGRESS, pid=pid)).scalar()
    return str(found or "")


def require_ready(migration: Migration) -> None:
    """Step 5: check that everything the swap relies on is there. Raises ShapeError."""
    table, plan = migration.table, migration.plan
    with transaction(migration.conn) as conn:
        checked = check_is_valid(conn, table, table.name)
        there = {p.name for p in attached(conn, table, table.new)}
    if not checked:
        raise ShapeError(f"the constraint {check_name(table)} of {table} is missing or not validated")
    if not has_its_key(plan) and not _index_is_valid(migration, key_name(table)):
        raise ShapeError(f"the index {key_name(table)} of {table} is missing or invalid")
    if missing := [p for p in plan.periods if table.partition(p) not in there]:
        raise ShapeError(f"the partition of {missing[0]} is missing")


def swap(migration: Migration) -> None:
    """Step 6: give the partitioned table the name, with the old table as its first partition.

    ACCESS EXCLUSIVE on the table in use, in short attempts. Raises LockUnavailableError, ShapeError.
    """
    table, conn, plan = migration.table, migration.conn, migration.plan
    locks = migration.locks()
    for attempt in locks.attempts(conn, [(table.home, table.name)]):
        with attempt:
            migration.claim(conn)
            # No DDL on the table in use while the two are compared; the application reads and writes.
            execute(conn, lock_table(table.home, table.name, "SHARE UPDATE EXCLUSIVE"))
            _require_alike(migration)
            attempt.asks_now()
            execute(conn, lock_table(table.home, table.name, "ACCESS EXCLUSIVE"))
            following = dependents(conn, oid_of(conn, table.home, table.name))
            redirects = redirect_statements(
                following, name(table.home, table.name), name(table.home, table.history)
            )
            execute(conn, joined([*forward_statements(migration.shape, plan), *redirects], ";\n"))
            require_dependents(conn, following, oid_of(conn, table.home, table.name))
    migration.note(locks)
    migration.swap_s = locks.last_s
    migration.refresh()


def without_ours(shape: TableShape) -> TableShape:
    """The shape of the plain table without the index and the CHECK that step 3 added."""
    spec = shape.spec
    return replace(
        shape,
        indexes=tuple(i for i in shape.indexes if i.name != key_name(spec)),
        checks=tuple(c for c in shape.checks if c.name != check_name(spec)),
    )


def _require_alike(migration: Migration) -> None:
    """Raise ShapeError unless the partitioned table matches the plain one, but for announced differences."""
    plan, conn = migration.plan, migration.conn
    was = without_ours(read_shape(conn, migration.table, migration.table.name))
    built = read_shape(conn, migration.table, migration.table.new)
    names = [(temporary, original) for _, original, _, temporary in plan.renames]
    # Its foreign keys are added after the swap.
    like = replace(built, rules=was.rules, foreign_keys=was.foreign_keys)
    found = differences(was, like, names, announced=True)
    found += partition_differences(conn, was, built.oid)
    if found:
        raise ShapeError(changed_meanwhile(plan, found))
    migration.shape = was


def _kept(plan: Plan, key: Index) -> list[tuple[str, str, str, str]]:
    """The renames of objects that stay with the old table: undone on the way back."""
    gone = key.name if key.primary and not has_its_key(plan) else None
    return [r for r in plan.renames if r[0] != "SEQUENCE" and r[1] != gone]


def forward_statements(shape: TableShape, plan: Plan) -> list[Statement]:
    """What runs under the lock when the partitioned table takes the name."""
    table, heap = plan.table, plan.heap
    assert heap is not None
    home = table.home
    old, new = name(home, table.history), name(home, table.name)
    statements = [
        rename(home, "TABLE", table.name, table.history),
        *(rename(home, kind, original, aside) for kind, original, aside, _ in _kept(plan, heap.key)),
    ]
    if not has_its_key(plan):
        if heap.key.primary:
            statements.append(
                statement("ALTER TABLE {t} DROP CONSTRAINT {key}", t=old, key=name(heap.key.name))
            )
        statements.append(_key_using_index(old, key_name(table), key_name(table), heap.key))
    for identity in heap.identities:
        statements += [
            continue_identity(home, table.history, table.new, identity.column),
            statement("ALTER TABLE {t} ALTER COLUMN {c} DROP IDENTITY", t=old, c=name(identity.column)),
        ]
    # The partition gets the partitioned table's triggers, which cannot coexist with ones of the same name.
    statements += [statement("DROP TRIGGER {n} ON {t}", n=name(t.name), t=old) for t in heap.triggers]
    return [
        *statements,
        rename(home, "TABLE", table.new, table.name),
        *(rename(home, kind, built, original) for kind, original, _, built in plan.renames),
        statement(
            "ALTER TABLE {new} ATTACH PARTITION {old} FOR VALUES FROM (MINVALUE) TO ({bound})",
            new=new,
            old=old,
            bound=shape.instant(plan.first),
        ),
        statement("ALTER TABLE {old} DROP CONSTRAINT {check}", old=old, check=name(check_name(table))),
        *enable_statements(shape, new),
        # Both tables use it, and dropping either must not drop it.
        *(
            statement("ALTER SEQUENCE {sequence} OWNED BY NONE", sequence=name(s.schema, s.name))
            for s in plan.sequences
            if not s.identity
        ),
        *rule_statements(shape, new),
        fence_statement(table),
        phase_statement(table, Phase.MIGRATED),
    ]


def _key_using_index(table: Statement, constraint: str, index: str, like: Index) -> Statement:
    """Make a unique index the primary key; deferrable as ``like`` is."""
    definition = like.constraint or ""
    deferrable = " DEFERRABLE" if like.deferrable else ""
    if definition.endswith("INITIALLY DEFERRED"):
        deferrable += " INITIALLY DEFERRED"
    return statement(
        "ALTER TABLE {t} ADD CONSTRAINT {c} PRIMARY KEY USING INDEX {i}" + deferrable,
        t=table,
        c=name(constraint),
        i=name(index),
    )


def adopt_foreign_keys(migration: Migration) -> None:
    """Step 6, after the swap: the foreign keys of the partitioned table, which adopt those of all partitions.

    Completes the migration. Safe to call again. SHARE ROW EXCLUSIVE on the table in use, ACCESS EXCLUSIVE on
    the referenced tables, in short attempts. Raises LockUnavailableError.
    """
    adopt_keys(migration, migration.table.name)
    with transaction(migration.conn) as conn:
        migration.claim(conn)
        execute(conn, verified_statement(migration.table))
    migration.refresh()


# --- The way back ---


def go_back(migration: Migration, check_stop: CheckStop, *, by_hand: bool = False) -> int:
    """Give the old table its name back; returns how many rows beyond the bound were moved into it.

    ``by_hand``: somebody has already detached and renamed it. Everything but the last step runs while the
    application reads and writes. ACCESS EXCLUSIVE on the table in use and its partitions,
    SHARE ROW EXCLUSIVE on the tables that foreign keys refer to, in short attempts. Raises
    LockUnavailableError, ShapeError.
    """
    table, conn, plan = migration.table, migration.conn, migration.plan
    heap = plan.heap
    assert heap is not None
    if heap.key.primary and not has_its_key(plan):
        _build_old_key(migration, heap.key, table.name if by_hand else table.history, check_stop)
    carried = 0
    locks = migration.locks()
    tables = [(table.home, table.name), (table.home, table.history), *migration.referred()]
    for attempt in locks.attempts(conn, tables):
        with attempt:
            migration.claim(conn)
            attempt.asks_now()
            execute(conn, lock_table(table.home, table.name, "ACCESS EXCLUSIVE", partitions=True))
            if by_hand:
                execute(conn, joined(_restore_plain(migration, [], by_hand=True), ";\n"))
                continue
            for schema, referred in migration.referred():
                execute(conn, lock_table(schema, referred, "SHARE ROW EXCLUSIVE"))
            following = dependents(conn, oid_of(conn, table.home, table.name))
            carried = rows_beyond(conn, table, migration.shape.instant(plan.first))
            filled = _filled(conn, migration) if carried else []
            redirects = redirect_statements(
                following, name(table.home, table.name), name(table.home, table.new)
            )
            execute(conn, joined([*back_statements(migration, filled), *redirects], ";\n"))
            require_dependents(conn, following, oid_of(conn, table.home, table.name))
    migration.note(locks)
    migration.refresh()
    return carried


def _old_key(plan: Plan) -> str:
    """The index that becomes the old primary key again."""
    assert plan.heap is not None
    return derived_name(plan.heap.key.name, "_old")


def _build_old_key(migration: Migration, key: Index, on_table: str, check_stop: CheckStop) -> None:
    table, index = migration.table, _old_key(migration.plan)
    query = _unique_index_statement(index, migration.relation(on_table), sql.SQL(key.body))
    try:
        _build_index(migration, index, query, check_stop)
    except DBAPIError as error:
        if sqlstate(error) != errorcodes.UNIQUE_VIOLATION:
            raise
        _drop_index(migration, index, check_stop)
        raise ChronosError(
            f"{table} has rows with the same ({', '.join(migration.plan.old_key)}) at different times, and"
            f" the plain table allows only one; delete one, or give it another key ({_detail(error)})"
        ) from error


def _detail(error: DBAPIError) -> str:
    diagnostics = getattr(error.orig, "diag", None)
    return str(getattr(diagnostics, "message_detail", "") or "")


def rows_beyond(conn: Connection, table: TableSpec, bound: Statement) -> int:
    """How many rows lie at or beyond the bound, in partitions other than the old table. ACCESS SHARE."""
    found: int = execute(
        conn,
        statement(
            "SELECT count(*) FROM {t} WHERE {c} >= {bound}",
            t=name(table.home, table.name),
            c=name(table.column),
            bound=bound,
        ),
    ).scalar_one()
    return found


def _filled(conn: Connection, migration: Migration) -> list[Statement]:
    """The partitions beyond the bound that hold rows."""
    leaves = [name(p.schema, p.name) for p in attached(conn, migration.table) if p.lower is not None]
    return [
        leaf
        for leaf in leaves
        if execute(conn, statement("SELECT EXISTS (SELECT FROM {leaf})", leaf=leaf)).scalar_one()
    ]


def back_statements(migration: Migration, filled: list[Statement]) -> list[Statement]:
    """What runs under the locks when the old table takes its name back; ``filled`` partitions hold rows."""
    plan, table = migration.plan, migration.table
    home = table.home
    return [
        statement(
            "ALTER TABLE {t} DETACH PARTITION {old}", t=name(home, table.name), old=name(home, table.history)
        ),
        rename(home, "TABLE", table.name, table.new),
        *(rename(home, kind, original, built) for kind, original, _, built in plan.renames),
        rename(home, "TABLE", table.history, table.name),
        *_restore_plain(migration, filled),
    ]


def _restore_plain(
    migration: Migration, filled: list[Statement], *, by_hand: bool = False
) -> list[Statement]:
    """Give the plain table, under its name again, what it had before, and the rows of ``filled`` partitions.

    ``by_hand``: the partitioned table is gone, and its identity sequence with it, so the new one starts after
    the highest existing id.
    """
    plan, shape, table = migration.plan, migration.shape, migration.table
    heap, home = plan.heap, plan.table.home
    assert heap is not None
    plain = name(home, table.name)
    statements = [rename(home, kind, aside, original) for kind, original, aside, _ in _kept(plan, heap.key)]
    if not has_its_key(plan):
        statements.append(
            statement("ALTER TABLE {t} DROP CONSTRAINT {key}", t=plain, key=name(key_name(table)))
        )
        if heap.key.primary:
            statements += [
                _key_using_index(plain, heap.key.name, _old_key(plan), heap.key),
                *_remarks(plan, heap.key),
            ]
    if heap.nullable:
        statements.append(
            statement("ALTER TABLE {t} ALTER COLUMN {c} DROP NOT NULL", t=plain, c=shape.time_column)
        )
    identities = replace(shape, identities=heap.identities)
    statements += identity_statements(identities, plain, {i.name: i.name for i in heap.identities})
    if by_hand:
        statements += [
            statement(
                "SELECT setval(to_regclass(format('%I.%I', {schema}, {sequence})), max({column}))"
                " FROM {plain} HAVING max({column}) > 0",
                schema=home,
                sequence=identity.name,
                column=name(identity.column),
                plain=plain,
            )
            for identity in heap.identities
        ]
    # Its triggers come afterwards: they must not fire for rows that only move back.
    if filled:
        statements.append(
            statement(
                "INSERT INTO {plain} ({columns}) OVERRIDING SYSTEM VALUE SELECT {columns} FROM {new}",
                plain=plain,
                columns=joined(shape.copied_columns()),
                new=name(home, table.new),
            )
        )
        statements += [statement("TRUNCATE {leaf}", leaf=leaf) for leaf in filled]
    for trigger in heap.triggers:
        statements += [
            *trigger_statements(trigger, plain),
            trigger_state(trigger.name, plain, trigger.enabled),
        ]
    return [
        *statements,
        *sequences_back_statements(table, [s for s in plan.sequences if not s.identity or not by_hand]),
        phase_statement(table, Phase.UNDONE),
    ]


def _remarks(plan: Plan, key: Index) -> list[Statement]:
    """What else the old primary key had: comments, the CLUSTER mark."""
    home, plain = plan.table.home, name(plan.table.home, plan.table.name)
    statements: list[Statement] = []
    if key.comment:
        statements.append(
            statement("COMMENT ON INDEX {i} IS {text}", i=name(home, key.name), text=key.comment)
        )
    if key.constraint_comment:
        statements.append(
            statement(
                "COMMENT ON CONSTRAINT {c} ON {t} IS {text}",
                c=name(key.name),
                t=plain,
                text=key.constraint_comment,
            )
        )
    if key.clustered:
        statements.append(statement("ALTER TABLE {t} CLUSTER ON {i}", t=plain, i=name(key.name)))
    return statements


def clean_up(migration: Migration, check_stop: CheckStop = lambda: None) -> None:
    """Once the old table has its name back, or never lost it: drop what was added to it, except the state.

    ACCESS EXCLUSIVE on it for a moment, for the CHECK.
    """
    table, conn = migration.table, migration.conn
    with transaction(conn):
        checked = check_is_valid(conn, table, table.name) is not None
    locks = migration.locks()
    for attempt in locks.attempts(conn, [(table.home, table.name)]) if checked else ():
        with attempt:
            migration.claim(conn)
            attempt.asks_now()
            execute(
                conn,
                statement(
                    "ALTER TABLE {t} DROP CONSTRAINT {check}",
                    t=migration.relation(table.name),
                    check=name(check_name(table)),
                ),
            )
    migration.note(locks)
    drop_leftover(migration, check_stop)


def drop_leftover(migration: Migration, check_stop: CheckStop = lambda: None) -> None:
    """Drop unused indexes that were built for the swap or the way back. Blocks no reads or writes."""
    for index in (key_name(migration.table), _old_key(migration.plan)):
        if _index_is_valid(migration, index) is not None and _is_ours(migration, index):
            _drop_index(migration, index, check_stop)


def _is_ours(migration: Migration, index: str) -> bool:
    """Whether an index is on the plain table and backs no constraint."""
    with transaction(migration.conn) as conn:
        found: bool = execute(
            conn,
            statement(
                "SELECT EXISTS (SELECT FROM pg_index i"
                " WHERE i.indexrelid = to_regclass(format('%I.%I', {s}, {i}))"
                " AND i.indrelid IN (to_regclass(format('%I.%I', {s}, {t})),"
                "                    to_regclass(format('%I.%I', {s}, {h})))"
                " AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid))",
                s=migration.table.home,
                i=index,
                t=migration.table.name,
                h=migration.table.history,
            ),
        ).scalar_one()
    return found
