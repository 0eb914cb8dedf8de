"""Give the partitioned table its foreign keys, before it is in use.

While it has them and lags behind, a row that the application has deleted could still be in it, and keep the
application from deleting what the row refers to. So from before the first key until the swap, a trigger on
the table in use takes the copy of a changed or deleted row away in the same transaction (change_log.sql).
"""

from __future__ import annotations

from psycopg2 import errorcodes
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from chronos.catalog.ddl import foreign_key_statements, validate_statement
from chronos.db import Statement, execute, joined, sqlstate, statement, transaction
from chronos.locks import lock_table
from chronos.migration.changes import replay_most, unlink_trigger_statements
from chronos.migration.context import Direction, Migration
from chronos.migration.copy import need_not_wait_for_the_disk
from chronos.migration.workers import CheckStop, work_through

# Partitions that get theirs in one transaction: until it ends, nobody can write what they refer to.
_AT_ONCE = 7
_ATTEMPTS = 20


def add_foreign_keys(migration: Migration, check_stop: CheckStop, workers: int = 1) -> None:
    """Each partition's, unchecked; then checked; then the parent's, which adopt them. Safe to call again.

    SHARE ROW EXCLUSIVE for moments on the table in use, and on the tables referred to, seven partitions at
    a time; ROW SHARE on these while rows are checked; at last ACCESS EXCLUSIVE on them for a moment. Raises
    LockUnavailableError.
    """
    plan = migration.plan
    if not plan.foreign_keys or _parent_has_keys(migration):
        return
    replay_most(migration, Direction.FORWARD, check_stop)
    _begin_unlinking(migration)
    replay_most(migration, Direction.FORWARD, check_stop)
    lacking = _leaves(migration, "NOT EXISTS")
    for leaves in at_once(lacking):
        check_stop()
        _add_unchecked(migration, leaves)
    replay_most(migration, Direction.FORWARD, check_stop)
    _validate(migration, _leaves(migration, "EXISTS"), check_stop, workers)
    _adopt(migration)


def _parent_has_keys(migration: Migration) -> bool:
    with transaction(migration.conn):
        found: bool = execute(
            migration.conn,
            statement(
                "SELECT EXISTS (SELECT FROM pg_constraint WHERE contype = 'f'"
                " AND conrelid = to_regclass(format('%I.%I', {schema}, {new})))",
                schema=migration.table.home,
                new=migration.table.new,
            ),
        ).scalar_one()
    return found


def _begin_unlinking(migration: Migration) -> None:
    table = migration.table
    locks = migration.locks()
    for attempt in locks.attempts(migration.conn, [(table.home, table.name)]):
        with attempt as conn:
            migration.claim(conn)
            there = execute(
                conn,
                statement(
                    "SELECT EXISTS (SELECT FROM pg_trigger WHERE tgname = {t}"
                    " AND tgrelid = to_regclass(format('%I.%I', {schema}, {table})))",
                    t=table.note_triggers[4],
                    schema=table.home,
                    table=table.name,
                ),
            ).scalar_one()
            if not there:
                execute(conn, joined(begin_unlinking_statements(migration), ";\n"))
    migration.note(locks)


def begin_unlinking_statements(migration: Migration) -> list[Statement]:
    """The trigger on the table in use, under SHARE ROW EXCLUSIVE."""
    table = migration.table
    return [
        lock_table(table.home, table.name, "SHARE ROW EXCLUSIVE"),
        *unlink_trigger_statements(migration.shape),
    ]


def at_once(leaves: list[str]) -> list[list[str]]:
    """The partitions in groups, each of which gets its keys in one transaction."""
    return [leaves[first : first + _AT_ONCE] for first in range(0, len(leaves), _AT_ONCE)]


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


def _add_unchecked(migration: Migration, leaves: list[str]) -> None:
    locks = migration.locks()
    for attempt in locks.attempts(migration.conn, migration.referred()):
        with attempt as conn:
            migration.claim(conn)
            for query in unchecked_statements(migration, leaves):
                execute(conn, query)


def unchecked_statements(migration: Migration, leaves: list[str]) -> list[Statement]:
    """The keys of ``leaves``, which hold from now on; their rows are checked later."""
    return [
        query
        for leaf in leaves
        for query in foreign_key_statements(
            migration.plan.foreign_keys, migration.relation(leaf), not_valid=True
        )
    ]


def _validate(migration: Migration, leaves: list[str], check_stop: CheckStop, workers: int) -> None:
    """Check the rows of the partitions, ``workers`` at a time.

    A row whose counterpart was deleted meanwhile has a note: it is replayed, and the partition checked again.
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


def _adopt(migration: Migration) -> None:
    """The parent's keys. The locks are taken in the order in which an insert takes them."""
    table = migration.table
    locks = migration.locks()
    for attempt in locks.attempts(migration.conn, [(table.home, table.new), *migration.referred()]):
        with attempt as conn:
            migration.claim(conn)
            execute(conn, joined(adopt_statements(migration), ";\n"))
    migration.note(locks)


def adopt_statements(migration: Migration) -> list[Statement]:
    """The locks, then the parent's keys, which adopt those of the partitions."""
    table = migration.table
    return [
        lock_table(table.home, table.new, "SHARE ROW EXCLUSIVE"),
        *(lock_table(schema, referred, "ACCESS EXCLUSIVE") for schema, referred in migration.referred()),
        *foreign_key_statements(migration.plan.foreign_keys, migration.relation(table.new)),
    ]
