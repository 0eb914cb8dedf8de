"""Give the partitioned table its foreign keys before it is in use; drop them from a table no longer in use.

While the table not in use has foreign keys, it could still hold a row that the application has deleted, and
keep the application from deleting what that row refers to. So from before the first key exists until the last
is gone, a trigger on the table in use deletes the copy of a deleted row in the same transaction
(unlink_copy.sql). The swap itself then needs no lock on the referenced tables.

What this does not cover: rows of the plain table from before the window, and a TRUNCATE, between the swap and
the moment the keys are dropped; and, under REPEATABLE READ, a copy made after the snapshot. Deleting what
these refer to then fails with the foreign key's own error.
"""

from __future__ import annotations

from psycopg2 import errorcodes
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from chronos.catalog.ddl import (
    force_statements,
    foreign_key_statements,
    restore_statements,
    validate_statement,
)
from chronos.db import Statement, execute, joined, name, sqlstate, statement, transaction
from chronos.locks import Tables, lock_table
from chronos.migration.changes import forget_cascades_statement, replay_most, unlink_function_statement
from chronos.migration.context import Direction, Migration
from chronos.migration.copy import need_not_wait_for_the_disk
from chronos.migration.state import quieted_statement
from chronos.migration.workers import CheckStop, work_through

# Partitions that get theirs in one transaction: until it ends, the referenced tables cannot be written.
AT_ONCE = 7
_ATTEMPTS = 20


def add_foreign_keys(migration: Migration, check_stop: CheckStop, workers: int = 1) -> None:
    """Add each partition's keys, NOT VALID; validate them; add the parent's, which adopt them.

    Safe to call again. SHARE ROW EXCLUSIVE for moments on the table in use, and on the referenced tables,
    seven partitions at a time; ROW SHARE on these during validation; finally ACCESS EXCLUSIVE on them for a
    moment. Raises LockUnavailableError.
    """
    plan = migration.plan
    if not plan.foreign_keys or _keys(migration, migration.table.new):
        return
    replay_most(migration, Direction.FORWARD, check_stop)
    _begin_unlinking(migration)
    replay_most(migration, Direction.FORWARD, check_stop)
    add_to_leaves(migration, check_stop, not_valid=True)
    replay_most(migration, Direction.FORWARD, check_stop)
    _validate(migration, _leaves(migration, "EXISTS"), check_stop, workers)
    adopt_keys(migration, migration.table.new)


def drop_keys(migration: Migration, table: str) -> None:
    """Drop the foreign keys of ``table``, which is no longer in use, or never was. Safe to call again.

    ACCESS EXCLUSIVE on it, its partitions and the referenced tables, for moments, in short attempts. Raises
    LockUnavailableError.
    """
    spec = migration.table
    if not migration.plan.foreign_keys:
        return
    # Partitions have keys of their own until the partitioned table's have adopted them.
    for relation in [*(_leaves(migration, "EXISTS") if table == spec.new else []), table]:
        keys = _keys(migration, relation)
        # Once they are gone there is nothing left to do, except to finish what an earlier run began.
        if not keys and (relation != spec.old or migration.state.verified):
            continue
        referred = migration.referred() if keys else []
        locks = migration.locks()
        for attempt in locks.attempts(migration.conn, [(spec.home, relation), *referred]):
            with attempt as conn:
                migration.claim(conn)
                statements = _drop_statements(migration, relation, keys, referred)
                if relation == table:
                    statements += _unlinked_statements(migration, table)
                execute(conn, joined(statements, ";\n"))
        migration.note(locks)


def drop_keys_statements(migration: Migration) -> list[Statement]:
    """After the swap: drop the keys of the plain table, with the locks that takes."""
    spec = migration.table
    keys = [key.name for key in migration.plan.foreign_keys]
    return [
        *_drop_statements(migration, spec.old, keys, migration.referred()),
        *_unlinked_statements(migration, spec.old),
    ]


def _drop_statements(
    migration: Migration, relation: str, keys: list[str], referred: Tables
) -> list[Statement]:
    """The locks, then the statements that drop ``keys`` of a table.

    Locks in the order in which the application takes them: the referenced table, then, through the unlink
    trigger, the table that is not in use.
    """
    return [
        *(lock_table(schema, table, "ACCESS EXCLUSIVE") for schema, table in referred),
        lock_table(migration.table.home, relation, "ACCESS EXCLUSIVE", partitions=True),
        *(
            statement("ALTER TABLE {t} DROP CONSTRAINT {key}", t=migration.relation(relation), key=name(key))
            for key in keys
        ),
    ]


def _unlinked_statements(migration: Migration, table: str) -> list[Statement]:
    """Once the keys of ``table`` are gone: stop deleting copies from it, and restore its own triggers."""
    spec, shape = migration.table, migration.shape
    if migration.plan.attaches:
        return []
    return [
        unlink_function_statement(shape, migration.plan, linked=None),
        *(
            [
                *restore_statements(shape, migration.relation(table)),
                *force_statements(shape, migration.relation(table)),
                forget_cascades_statement(migration),
            ]
            if table == spec.old
            else []
        ),
        quieted_statement(spec, {}),
    ]


def _keys(migration: Migration, relation: str) -> list[str]:
    """The names of the foreign keys that a table has."""
    with transaction(migration.conn):
        rows = execute(
            migration.conn,
            statement(
                "SELECT conname FROM pg_constraint WHERE contype = 'f' AND conparentid = 0"
                " AND conrelid = to_regclass(format('%I.%I', {schema}, {relation})) ORDER BY 1",
                schema=migration.table.home,
                relation=relation,
            ),
        ).all()
    return [row[0] for row in rows]


def _begin_unlinking(migration: Migration) -> None:
    table = migration.table
    locks = migration.locks()
    for attempt in locks.attempts(migration.conn, [(table.home, table.name)]):
        with attempt as conn:
            migration.claim(conn)
            execute(conn, joined(begin_unlinking_statements(migration), ";\n"))
    migration.note(locks)


def begin_unlinking_statements(migration: Migration) -> list[Statement]:
    """Under SHARE ROW EXCLUSIVE on the table in use: from now on its writers also delete copies."""
    table = migration.table
    return [
        lock_table(table.home, table.name, "SHARE ROW EXCLUSIVE"),
        unlink_function_statement(migration.shape, migration.plan, linked=Direction.FORWARD),
    ]


def at_once(leaves: list[str]) -> list[list[str]]:
    """The partitions in groups, each of which gets its keys in one transaction."""
    return [leaves[first : first + AT_ONCE] for first in range(0, len(leaves), AT_ONCE)]


def _leaves(migration: Migration, with_key: str) -> list[str]:
    """The partitions that have a foreign key (EXISTS), or none (NOT EXISTS)."""
    with transaction(migration.conn):
        rows = execute(
            migration.conn,
            statement(
                "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
                " WHERE i.inhparent = to_regclass(format('%I.%I', {schema}, {new}))"
                f" AND {with_key} (SELECT FROM pg_constraint k WHERE k.contype = 'f' AND k.conrelid = c.oid)"
                " ORDER BY c.relname",
                schema=migration.table.home,
                new=migration.table.new,
            ),
        ).all()
    return [row[0] for row in rows]


def add_to_leaves(migration: Migration, check_stop: CheckStop, *, not_valid: bool = False) -> None:
    """Give each partition that has no foreign key its own. Safe to call again.

    SHARE ROW EXCLUSIVE on the referenced tables, seven partitions at a time. Raises LockUnavailableError.
    """
    for leaves in at_once(_leaves(migration, "NOT EXISTS")):
        check_stop()
        locks = migration.locks()
        for attempt in locks.attempts(migration.conn, migration.referred()):
            with attempt as conn:
                migration.claim(conn)
                execute(conn, joined(leaf_statements(migration, leaves, not_valid=not_valid), ";\n"))
        migration.note(locks)


def leaf_statements(migration: Migration, leaves: list[str], *, not_valid: bool = False) -> list[Statement]:
    """The keys of ``leaves``, enforced from now on; ``not_valid``: existing rows are checked later."""
    return [
        query
        for leaf in leaves
        for query in foreign_key_statements(
            migration.plan.foreign_keys, migration.relation(leaf), not_valid=not_valid
        )
    ]


def _validate(migration: Migration, leaves: list[str], check_stop: CheckStop, workers: int) -> None:
    """Check the rows of the partitions, ``workers`` at a time.

    A row whose referenced row was deleted meanwhile has a note: it is replayed, and the partition rechecked.
    """
    failed: list[tuple[str, DBAPIError]] = []

    def validate(conn: Connection, leaf: str, stop: CheckStop) -> None:
        for key in migration.plan.foreign_keys:
            stop()
            try:
                with transaction(conn):
                    need_not_wait_for_the_disk(conn)
                    execute(conn, validate_statement(migration.relation(leaf), key))
            except DBAPIError as error:
                if sqlstate(error) != errorcodes.FOREIGN_KEY_VIOLATION:
                    raise
                failed.append((leaf, error))
                return

    for _ in range(_ATTEMPTS):
        failed.clear()
        work_through(migration.engine, leaves, workers, validate, check_stop)
        if not failed:
            return
        replay_most(migration, Direction.FORWARD, check_stop)
        leaves = [leaf for leaf, _ in failed]
    raise failed[0][1]


def adopt_keys(migration: Migration, parent: str) -> None:
    """Add the partitioned table's own keys, which adopt those of its partitions. Safe to call again.

    SHARE ROW EXCLUSIVE on it, ACCESS EXCLUSIVE on the referenced tables, in short attempts. Raises
    LockUnavailableError.
    """
    if not migration.plan.foreign_keys or _keys(migration, parent):
        return
    locks = migration.locks()
    for attempt in locks.attempts(migration.conn, [(migration.table.home, parent), *migration.referred()]):
        with attempt as conn:
            migration.claim(conn)
            attempt.asks_now()
            execute(conn, joined(adopt_statements(migration, parent), ";\n"))
    migration.note(locks)


def adopt_statements(migration: Migration, parent: str) -> list[Statement]:
    """The locks, then the keys of the table ``parent``, which adopt those of the partitions.

    An insert locks a table in use first, and then what its keys refer to; a table not in use is locked last,
    through the unlink trigger.
    """
    own = lock_table(migration.table.home, parent, "SHARE ROW EXCLUSIVE")
    referred = [lock_table(schema, table, "ACCESS EXCLUSIVE") for schema, table in migration.referred()]
    return [
        *([own, *referred] if parent == migration.table.name else [*referred, own]),
        *foreign_key_statements(migration.plan.foreign_keys, migration.relation(parent)),
    ]
