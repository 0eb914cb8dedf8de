"""Undo a migration, from whatever phase it is in: the plain table is back, with every row written since.

Before the swap that means dropping what nobody uses. After it, the migration runs the other way: the newer
rows go into the plain table while the application writes, the notes are replayed, both tables are compared,
and the names change. What was built is dropped afterwards, partition by partition.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from psycopg2 import errorcodes, sql
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from chronos import reports
from chronos.catalog.ddl import (
    bound_check,
    disable_statements,
    foreign_key_statements,
    rename,
    restore_statements,
    sequences_back_statements,
    validate_statement,
)
from chronos.catalog.partitions import attached, detached
from chronos.catalog.shape import read as read_shape
from chronos.commands import finalize as finalize_command
from chronos.commands import migrate as migrate_command
from chronos.commands import rollback as rollback_command
from chronos.db import Statement, execute, joined, name, render, sqlstate, statement, transaction
from chronos.errors import NeedsPersonError, RefusedError
from chronos.functions import definitions, drop_unused_statement
from chronos.locks import lock_table
from chronos.migration import attach
from chronos.migration import state as states
from chronos.migration.changes import (
    TruncatedError,
    drop_log_statement,
    drop_trigger_statements,
    emptied_by_hand,
    empty_after_truncate,
    note_everything_statement,
    note_skewed_rows_statement,
    note_trigger_statements,
    note_up_to_the_fence_statement,
    replay_most,
)
from chronos.migration.compare import compare_newer_rows, compare_replayed, require_equal
from chronos.migration.console import counted
from chronos.migration.context import (
    Direction,
    Migration,
    match,
    read_plain,
    states_of,
    with_states,
)
from chronos.migration.copy import Copying, carry_newer_rows
from chronos.migration.foreign_keys import drop_keys
from chronos.migration.obstacles import (
    Obstacle,
    foreign_partitions,
    not_ours,
    obstacles,
    old_table_emptied,
    require_no_citus,
    require_nothing_kept,
)
from chronos.migration.operator import Operator, asking, resumable_with, sole_operator
from chronos.migration.state import (
    Phase,
    State,
    phase_statement,
    quieted_statement,
    take_over,
    undone_by_hand,
)
from chronos.migration.swap import swap
from chronos.migration.throttle import Throttle
from chronos.migration.workers import CheckStop
from chronos.results import RollbackResult
from chronos.table import Period, TableSpec, quoted

_BATCH = 5_000


def undo(
    engine: Engine,
    table: TableSpec,
    operator: Operator,
    confirm: Callable[[State, bool], None],
    *,
    force: bool = False,
) -> RollbackResult:
    """Go back to the plain table, from whatever phase the migration is in, with the rows written since.

    ``confirm`` gets the state and whether somebody has put the plain table back by hand; it raises
    RefusedError to call it off. Refuses, with nothing changed, when something stands in the way
    (obstacles.py); ``force`` accepts the obstacles that are forcible.
    """
    began = time.monotonic()
    with sole_operator(engine, table) as (conn, table):
        with transaction(conn):
            found = states.read(conn, table)
            if found is None:
                raise RefusedError(f"there is no migration of {table} to undo; nothing was changed")
            if found.phase is Phase.FINALIZING:
                raise RefusedError(
                    f"{table.old} is being dropped, so there is no way back; nothing was changed."
                    f" Finish with: {finalize_command(table)}"
                )
            require_no_citus(conn, table)
            by_hand = undone_by_hand(conn, found)
            if by_hand:
                require_nothing_kept(conn, table)
            in_the_way = obstacles(conn, found) if found.phase.swapped and not by_hand else []
        _require_none(table, in_the_way, force=force)
        with asking(conn, table):
            confirm(found, by_hand)
        with transaction(conn):
            found = take_over(conn, found)
        command = rollback_command(table)
        if found.phase.swapped and found.verified and not found.plan.attaches:
            command += f"; or call it off and keep the partitioned table: {migrate_command(table)} --resume"
        with resumable_with(command, "rollback", engine, table):
            if by_hand:
                tidy_up(engine, conn, found, operator)
                operator.output.ok(f"{table} had been put back by hand; the remains are removed")
                return RollbackResult(table, 0, by_hand=True, seconds=time.monotonic() - began)
            with transaction(conn):
                shape = read_plain(conn, found)
            migration = Migration(engine, conn, operator, found, shape, needs_notes=not force)
            carried = roll_back(migration, check_stop=operator.check_stop)
        came = ""
        if found.phase.swapped:  # newer rows are counted; late, updated and deleted ones are not
            came = f"; it has everything written since the swap, including {counted(carried, 'newer row')}"
        operator.output.ok(f"{table} is the plain table again{came}")
        if left := _still_detached(migration.conn, table):
            operator.output.line(left)
        return RollbackResult(table, carried, by_hand=False, seconds=time.monotonic() - began)


def _still_detached(conn: Connection, table: TableSpec) -> str | None:
    """What to do about former partitions that wait to be dropped, which nothing will drop any more."""
    with transaction(conn):
        left = [f"{quoted(one.schema)}.{quoted(one.name)}" for one in detached(conn, table)]
    if not left:
        return None
    return (
        f"Retention had detached {', '.join(left)}. Nothing will drop them now, and another migration needs"
        f" their names. If nobody needs them: DROP TABLE {', '.join(left)};"
    )


def _require_none(table: TableSpec, in_the_way: list[Obstacle], *, force: bool) -> None:
    """Raise RefusedError with everything that stands in the way, except what ``force`` accepts."""
    if force:
        in_the_way = [obstacle for obstacle in in_the_way if not obstacle.forcible]
    if not in_the_way:
        return
    text = f"{'; '.join(map(str, in_the_way))}; nothing was changed"
    if all(obstacle.forcible for obstacle in in_the_way):
        text += f". To go back anyway, and accept that: {rollback_command(table)} --force"
    raise RefusedError(text)


def roll_back(migration: Migration, *, check_stop: CheckStop = lambda: None) -> int:
    """Bring the plain table back; returns how many rows were carried into it. Safe to call again.

    ACCESS EXCLUSIVE on both tables for the renames, on the one in use to drop the triggers, and on the tables
    that foreign keys refer to when these are dropped; each in short attempts. Raises what the server raises;
    the state then says how far it came.
    """
    carried = 0
    if migration.plan.attaches:
        return _detach(migration, check_stop)
    if migration.state.phase is Phase.MIGRATED:
        drop_keys(migration, migration.table.old)
        _begin_return(migration)
    if migration.state.phase is Phase.RETURNING:
        carried = _return(migration, check_stop)
    elif migration.state.phase in (Phase.BUILT, Phase.COPYING, Phase.READY):
        _mark_undone(migration)
    _validate(migration)
    _clean_up(migration)
    return carried


def _detach(migration: Migration, check_stop: CheckStop) -> int:
    """The way back of the strategy ATTACH, from whatever phase."""
    carried = 0
    if migration.state.phase is Phase.MIGRATED:
        carried = attach.go_back(migration, check_stop)
    elif migration.state.phase is not Phase.UNDONE:
        _mark_undone(migration)
    attach.clean_up(migration, check_stop)
    _clean_up(migration)
    return carried


def _begin_return(migration: Migration) -> None:
    """From now on note the key of every row written, and keep triggers of the plain table from firing.

    SHARE ROW EXCLUSIVE on the table in use waits for open writers: what they wrote is in the table before the
    first note, and what comes later is noted.
    """
    table, shape = migration.table, migration.shape
    locks = migration.locks()
    for attempt in locks.attempts(migration.conn, [(table.home, table.name), (table.home, table.old)]):
        with attempt as conn:
            migration.claim(conn)
            execute(conn, lock_table(table.home, table.old, "ACCESS EXCLUSIVE"))
            if emptied_by_hand(conn, table):
                raise NeedsPersonError(old_table_emptied(table))
            attempt.asks_now()
            execute(conn, lock_table(table.home, table.name, "SHARE ROW EXCLUSIVE", partitions=True))
            statements = [
                note_everything_statement(shape),
                *([] if migration.state.verified else [note_skewed_rows_statement(shape, migration.plan)]),
                _take_hand_written_notes(migration),
                *drop_trigger_statements(table, table.old),
                quieted_statement(table, states_of(shape)),
                *disable_statements(shape, migration.relation(table.old)),
                phase_statement(table, Phase.RETURNING),
            ]
            execute(conn, joined(statements, ";\n"))
    migration.note(locks)
    migration.refresh()


def _take_hand_written_notes(migration: Migration) -> Statement:
    """Rows written by hand into the frozen table stay, unless the partitioned one has their keys.

    Notes of those that stay are kept: the comparison leaves these rows out.
    """
    table, key = migration.table, migration.plan.old_key
    return statement(
        "UPDATE {changes} AS k SET chronos_origin = 'n' WHERE chronos_origin = 'o'"
        " AND EXISTS (SELECT FROM {new} AS n WHERE {same});\n"
        "DELETE FROM {replayed}",
        changes=migration.relation(table.changes),
        replayed=migration.relation(table.replayed),
        new=migration.relation(table.name),
        same=match(key, "n", "k"),
    )


def _return(migration: Migration, check_stop: CheckStop) -> int:
    """Fill, replay, compare, swap: the way back while the application writes."""
    table, conn = migration.table, migration.conn
    with transaction(conn):
        bounds = [p.lower for p in attached(conn, table) if p.lower]
    migration.oldest = min(bounds, default=migration.plan.first)
    carried = 0
    while migration.state.phase is Phase.RETURNING:
        empty_after_truncate(migration)
        with migration.operator.output.copying(_newer_rows(migration), did="Carried") as count:
            carry_newer_rows(migration, Copying(Throttle(_BATCH), check_stop=check_stop, copied=count.add))
        with suppress(TruncatedError):  # what was carried is removed too
            replay_most(migration, Direction.BACK, check_stop)
            _drop_what_is_gone(migration)
            with transaction(conn):
                carried = _compare(conn, migration)
            swap(migration, Direction.BACK, check_stop)
    return carried


def _newer_rows(migration: Migration) -> int:
    """How many rows the partitioned table has beyond the fence."""
    fence = migration.state.fence
    assert fence is not None
    query = statement(
        "SELECT count(*) FROM {t} WHERE {c} > {fence}",
        t=migration.relation(migration.table.name),
        c=migration.shape.time_column,
        fence=migration.shape.instant(fence),
    )
    with transaction(migration.conn) as conn:
        return int(execute(conn, query).scalar_one())


def _drop_what_is_gone(migration: Migration) -> None:
    """Delete carried rows beyond the fence whose partition was truncated or dropped since.

    Neither is noted. Rows that somebody wrote into the plain table by hand stay.
    """
    table, plan, fence = migration.table, migration.plan, migration.state.fence
    assert fence is not None
    with transaction(migration.conn) as conn:
        migration.claim(conn)
        execute(
            conn,
            statement(
                "DELETE FROM {old} AS t WHERE t.{c} > {fence}"
                " AND NOT EXISTS (SELECT FROM {new} AS s WHERE {same})"
                " AND NOT EXISTS (SELECT FROM {changes} AS k WHERE k.chronos_origin = 'o' AND {noted})",
                old=migration.relation(table.old),
                new=migration.relation(table.name),
                changes=migration.relation(table.changes),
                c=migration.shape.time_column,
                fence=migration.shape.instant(fence),
                same=match(plan.new_key, "s", "t"),
                noted=match(plan.new_key, "k", "t"),
            ),
        )


def _compare(conn: Connection, migration: Migration) -> int:
    """Check that the plain table got what the partitioned one has, pending notes aside.

    Returns how many rows lie beyond the fence.
    """
    table, fence = migration.table, migration.state.fence
    newer = Period(fence or migration.plan.first, migration.plan.end)
    result = compare_newer_rows(conn, migration)
    require_equal(migration, newer, result)
    compare_replayed(conn, migration, table.name, table.old)
    return result.new_rows


def stay(migration: Migration) -> None:
    """Call off a way back in the phase RETURNING: the partitioned table stays in use, as after its swap.

    Carried rows are deleted, to be carried again by a later rollback; replayed ones stay, as both tables
    agree on them. SHARE ROW EXCLUSIVE on the table in use for a moment. Raises LockUnavailableError.
    """
    table, shape, conn = migration.table, migration.shape, migration.conn
    _drop_carried(migration)
    locks = migration.locks()
    for attempt in locks.attempts(conn, [(table.home, table.name), (table.home, table.old)]):
        with attempt:
            migration.claim(conn)
            execute(conn, lock_table(table.home, table.old, "ACCESS EXCLUSIVE"))
            attempt.asks_now()
            execute(conn, lock_table(table.home, table.name, "SHARE ROW EXCLUSIVE", partitions=True))
            statements = [
                note_up_to_the_fence_statement(shape),
                *note_trigger_statements(shape, table.old, Direction.FORWARD),
                *restore_statements(shape, migration.relation(table.old)),
                quieted_statement(table, {}),
                statement("DELETE FROM {replayed}", replayed=migration.relation(table.replayed)),
                phase_statement(table, Phase.MIGRATED),
            ]
            execute(conn, joined(statements, ";\n"))
    migration.note(locks)
    migration.refresh()


def _drop_carried(migration: Migration) -> None:
    """Delete the rows beyond the fence from the plain table, except those written there by hand."""
    table, fence, done = migration.table, migration.state.fence, _BATCH
    assert fence is not None
    query = statement(
        "DELETE FROM {old} WHERE ctid = ANY (ARRAY(SELECT t.ctid FROM {old} AS t WHERE t.{c} > {fence}"
        " AND NOT EXISTS (SELECT FROM {changes} AS k WHERE k.chronos_origin = 'o' AND {noted})"
        " LIMIT {batch}))",
        old=migration.relation(table.old),
        c=migration.shape.time_column,
        fence=migration.shape.instant(fence),
        changes=migration.relation(table.changes),
        noted=match(migration.plan.new_key, "k", "t"),
        batch=_BATCH,
    )
    while done == _BATCH:
        migration.operator.check_stop()
        with transaction(migration.conn) as conn:
            migration.claim(conn)
            done = execute(conn, query).rowcount


def _mark_undone(migration: Migration) -> None:
    """Before the swap: from here on, what was built is only dropped."""
    with transaction(migration.conn) as conn:
        migration.claim(conn)
        execute(conn, phase_statement(migration.table, Phase.UNDONE))
    migration.refresh()


def _validate(migration: Migration) -> None:
    """Validate the plain table's foreign keys, which came back NOT VALID, while reads and writes go on.

    The application may have deleted what rows from before the window refer to. It could not see those rows,
    and they stay; their key then stays NOT VALID, and the operator is told.
    """
    table, conn = migration.table, migration.conn
    for key in migration.plan.foreign_keys:
        try:
            with transaction(conn):
                unchecked = execute(
                    conn,
                    statement(
                        "SELECT EXISTS (SELECT FROM pg_constraint WHERE conname = {key} AND NOT convalidated"
                        " AND conrelid = to_regclass(format('%I.%I', {schema}, {table})))",
                        key=key.name,
                        schema=table.home,
                        table=table.name,
                    ),
                ).scalar_one()
                if unchecked:
                    execute(conn, validate_statement(migration.relation(table.name), key))
        except DBAPIError as error:
            if sqlstate(error) != errorcodes.FOREIGN_KEY_VIOLATION:
                raise
            migration.operator.output.line(
                f"Rows of {table} from before {migration.plan.cutoff:%Y-%m-%d %H:%M} UTC refer to rows of"
                f" {key.table} that were deleted since the swap. The foreign key {key.name} applies to new"
                f" writes. Delete or correct those rows, then:"
                f" {render(conn, validate_statement(migration.relation(table.name), key))};"
            )


def tidy_up(engine: Engine, conn: Connection, found: State, operator: Operator) -> None:
    """After somebody put the plain table back by hand: restore what it had lost, drop the rest."""
    table, former = found.table, found.plan.former
    home = table.home
    locks = operator.locks()
    for attempt in locks.attempts(conn, [(home, table.name), (home, former)]):
        with attempt:
            states.claim(conn, table, found.run_id)
            if states.relkind(conn, home, table.name) is None:
                execute(conn, rename(home, "TABLE", former, table.name))
            if found.plan.attaches:
                continue
            execute(conn, lock_table(home, table.name, "ACCESS EXCLUSIVE"))
            plain = with_states(read_shape(conn, table, table.name), found.quieted)
            existing = {key.name for key in plain.foreign_keys}
            missing = [key for key in found.plan.foreign_keys if key.name not in existing]
            statements = [
                *(rename(home, kind, aside, original) for kind, original, aside, _ in found.plan.renames),
                *drop_trigger_statements(table, table.name),
                *restore_statements(plain, name(home, table.name)),
                *foreign_key_statements(missing, name(home, table.name), not_valid=True),
                *sequences_back_statements(table, [s for s in found.plan.sequences if not s.identity]),
                phase_statement(table, Phase.UNDONE),
            ]
            execute(conn, joined(statements, ";\n"))
    with transaction(conn):
        after = states.read(conn, table)
        assert after is not None
        shape = read_shape(conn, table, table.name)
    migration = Migration(engine, conn, operator, after, shape)
    if found.plan.attaches:
        attach.go_back(migration, operator.check_stop, by_hand=True)
        attach.clean_up(migration)
    _validate(migration)
    _clean_up(migration)


def _clean_up(migration: Migration) -> None:
    """Drop what the migration made: its foreign keys, the triggers, each partition by itself, then the rest.

    ACCESS EXCLUSIVE for moments on the tables that the foreign keys refer to, and on the plain table for our
    triggers. These stay until the last key is gone: no deleted row may be left in a table that has one.
    """
    table, conn = migration.table, migration.conn
    home = table.home
    with transaction(conn):
        kind = states.relkind(conn, home, table.name)
        built = states.relkind(conn, home, table.new) is not None
        foreign = foreign_partitions(conn, migration.state, table.new)
    if kind == "p":
        raise NeedsPersonError(f"{table} is partitioned, and nothing of it was dropped")
    if foreign:
        raise NeedsPersonError(not_ours(table, foreign))
    if built:
        drop_keys(migration, table.new)
    _drop_triggers(migration)
    for leaf in _leaves(migration):
        for attempt in migration.locks().attempts(conn, [(home, leaf)]):
            with attempt:
                migration.claim(conn)
                execute(conn, statement("DROP TABLE {leaf}", leaf=name(home, leaf)))
    for attempt in migration.locks().attempts(conn, [(home, table.new)]):
        with attempt:
            migration.claim(conn)
            _functions_back(migration)
            execute(conn, statement("DROP TABLE IF EXISTS {new}", new=name(home, table.new)))
            execute(conn, drop_log_statement(migration.plan))


def _drop_triggers(migration: Migration) -> None:
    """Drop our triggers from the plain table, those that exist."""
    table, conn = migration.table, migration.conn
    with transaction(conn):
        triggers = _our_triggers(migration)
    locks = migration.locks()
    for attempt in locks.attempts(conn, [(table.home, table.name)]) if triggers else ():
        with attempt:
            migration.claim(conn)
            attempt.asks_now()
            lock = lock_table(table.home, table.name, "ACCESS EXCLUSIVE")
            execute(conn, joined([lock, *drop_trigger_statements(table, table.name, *triggers)], ";\n"))
    migration.note(locks)


def _our_triggers(migration: Migration) -> list[str]:
    """The note triggers that are still on the plain table."""
    table = migration.table
    rows = execute(
        migration.conn,
        statement(
            "SELECT tgname FROM pg_trigger WHERE tgrelid = to_regclass(format('%I.%I', {s}, {t}))"
            " AND tgname::text IN ({ours}) ORDER BY tgname",
            s=table.home,
            t=table.name,
            ours=joined([sql.Literal(trigger) for trigger in table.note_triggers]),
        ),
    ).all()
    return [row[0] for row in rows]


def _functions_back(migration: Migration) -> None:
    """Drop the functions that the migration made, and restore those that existed before."""
    conn, before = migration.conn, migration.plan.functions
    existing = definitions(conn, migration.table)
    for signature, definition in existing.items():
        if definition not in before:
            execute(conn, statement("DROP ROUTINE {function}", function=sql.SQL(signature)))
    for definition in before:
        if definition not in existing.values():
            execute(conn, sql.SQL(definition))
    execute(conn, drop_unused_statement(migration.table))
    execute(conn, reports.drop_unused_statement(migration.table))


def _leaves(migration: Migration) -> list[str]:
    """The partitions of the table being dropped, and those never attached to it."""
    table = migration.table
    pairs = [
        statement("({leaf}, {check})", leaf=leaf, check=bound_check(leaf))
        for leaf in map(table.partition, migration.plan.periods)
    ]
    with transaction(migration.conn):
        rows = execute(
            migration.conn,
            statement(
                "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
                " WHERE i.inhparent = to_regclass(format('%I.%I', {schema}, {new}))"
                " UNION SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
                " JOIN pg_constraint k ON k.conrelid = c.oid"
                " WHERE n.nspname = {schema} AND NOT c.relispartition"
                " AND (c.relname::text, k.conname::text) IN ({pairs}) ORDER BY 1",
                schema=table.home,
                new=table.new,
                pairs=joined(pairs),
            ),
        ).all()
    return [row[0] for row in rows]
