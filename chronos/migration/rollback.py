"""Undo a migration, from whatever phase it is in: the plain table comes back with every row written since.

What takes time is done while the application writes on: its new rows are carried into the old table,
which nobody sees, and a trigger notes whatever changes meanwhile. Under the lock only those notes are
replayed and the names change back; the partitions are dropped afterwards, one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import date

from psycopg2 import sql
from sqlalchemy.engine import Connection, Engine

from chronos.db import (
    ShortTransactions,
    Statement,
    application_path,
    execute,
    joined,
    name,
    our_path,
    statement,
    transaction,
)
from chronos.errors import ChronosError, RefusedError
from chronos.migration import state as migration_state
from chronos.migration.followers import follow_statements, followers
from chronos.migration.operator import AN_HOUR, Operator, going_on_with, sole_operator
from chronos.migration.state import STATE_TABLE, Phase, State, claim, take_over, undone_by_hand
from chronos.migration.swap import (
    CHANGES_FUNCTION,
    CHANGES_TABLE,
    LIVE_TABLE,
    NEW_TABLE,
    NOTED_FUNCTION,
    ShapeError,
    bound_check,
    heard_again,
    history_days,
    lock_table,
    note_everything,
    rename,
    require_followers,
    unheard,
)
from chronos.migration.table_shape import TableShape, differences
from chronos.migration.table_shape import read as read_shape
from chronos.migration.verify import beyond_the_fence
from chronos.partitions import FUNCTIONS, OLD_TABLE, TABLE, attached, days, missing, partition_name

UNDO = "python -m chronos rollback"

_BATCH = 5_000
_FEW = 500


def undo(
    engine: Engine, operator: Operator, confirm: Callable[[State], None], *, force: bool = False
) -> None:
    """Back to the plain table, from whatever phase the migration is in, with the rows written since.

    ``confirm`` is shown the state and raises RefusedError to call it off. Refuses, unless ``force``,
    when retention has already dropped days that were written after the swap: their rows are gone.
    """
    with sole_operator(engine) as (conn, schema):
        with transaction(conn):
            found = migration_state.read(conn, schema)
            if found is None:
                raise RefusedError("there is no migration to undo; nothing was changed")
            if found.phase is Phase.FINALIZING:
                raise RefusedError(
                    f"{OLD_TABLE} is being dropped, there is no way back; nothing was changed."
                    " Finish with: python -m chronos finalize"
                )
            by_hand = undone_by_hand(conn, schema, found)
            gone = [] if by_hand else dropped_since(conn, schema, found)
        if gone and not force:
            raise RefusedError(
                f"retention has dropped {gone[0]} to {gone[-1]}, which were written after the swap and are"
                f" in no other table; nothing was changed. To go back without them: {UNDO} --force"
            )
        confirm(found)
        with transaction(conn):
            found = take_over(conn, schema, found)
        with going_on_with(UNDO, "rollback", engine, schema):
            if by_hand:
                tidy_up(conn, schema, found, operator.short(AN_HOUR))
                operator.output.ok(f"{TABLE} was put back by hand before; what was left over is gone")
                return
            with transaction(conn):
                plain = found.phase in (Phase.BUILT, Phase.UNDONE)
                shape = read_shape(conn, schema, TABLE if plain else OLD_TABLE)
            carried = roll_back(conn, shape, found, operator.short(AN_HOUR), before_batch=operator.check_stop)
        operator.output.ok(
            f"{TABLE} is the plain table again; {carried:,} rows written since the swap came along"
        )


def tidy_up(conn: Connection, schema: str, found: State, short: ShortTransactions) -> None:
    """After somebody has put the plain table back by hand: give it its names and sequences, drop the rest."""

    def rename_back(conn: Connection) -> None:
        claim(conn, schema, found.run_id)
        if (
            execute(
                conn, statement("SELECT to_regclass(format('%I.%I', {s}, {t}))", s=schema, t=TABLE)
            ).scalar_one()
            is None
        ):
            execute(conn, rename(schema, "TABLE", OLD_TABLE, TABLE))
        execute(conn, lock_table(schema, TABLE, "ACCESS EXCLUSIVE"))
        queries = [rename(schema, kind, aside, original) for kind, original, aside, _ in found.renames]
        for query in queries + _owned_again(schema, found):
            execute(conn, query)
        migration_state.update(conn, schema, phase=Phase.UNDONE.value)

    short.run(conn, rename_back, tables=[(schema, TABLE), (schema, OLD_TABLE)])
    with transaction(conn):
        shape = read_shape(conn, schema, TABLE)
    _clean_up(conn, shape, found, short)


def dropped_since(conn: Connection, schema: str, found: State) -> list[date]:
    """The days that took rows after the swap and have no partition any more."""
    if found.phase in (Phase.BUILT, Phase.UNDONE):
        return []
    now = execute(conn, statement("SELECT now()")).scalar_one().date()
    written = days(found.today, min(now, found.last_day))
    return missing(attached(conn, schema), written)


def roll_back(
    conn: Connection,
    shape: TableShape,
    state: State,
    short: ShortTransactions,
    *,
    before_batch: Callable[[], None] = lambda: None,
) -> int:
    """Bring the plain table back; returns how many rows were carried into it. Safe to call again.

    ``shape`` is that of the old table, ``state`` this run's own. ACCESS EXCLUSIVE on both tables for
    the renames, on the tables that foreign keys refer to for each drop, each within the patience of
    ``short``. Raises what the server raises; the state in the database then tells how far it came.
    """
    carried = 0
    if state.phase in (Phase.COPYING, Phase.MIGRATED):
        _note_every_change(conn, shape, state, short)
    if state.phase in (Phase.COPYING, Phase.MIGRATED, Phase.UNDOING):
        carried = _carry_rows(conn, shape, state, before_batch)
        _swap_back(conn, shape, state, short, before_batch)
    _clean_up(conn, shape, state, short)
    return carried


def _note_every_change(conn: Connection, shape: TableShape, state: State, short: ShortTransactions) -> None:
    """From now on note the key of every row written, whatever its id.

    SHARE ROW EXCLUSIVE on webhook_log waits for the writers under way: what they wrote is in the
    table before the first note, what comes later is noted.
    """
    schema = shape.schema

    def widen(conn: Connection) -> None:
        claim(conn, schema, state.run_id)
        execute(conn, lock_table(schema, TABLE, "SHARE ROW EXCLUSIVE"))
        _require_no_rivals(conn, schema, state)
        execute(conn, note_everything(schema))
        migration_state.update(conn, schema, phase=Phase.UNDOING.value)

    short.run(conn, widen, tables=[(schema, TABLE)])


def _require_no_rivals(conn: Connection, schema: str, state: State) -> None:
    """Raise ChronosError when somebody has given the frozen table rows with ids of the new one's.

    Later on such a row would pass for one that an earlier attempt has carried over. There are none as a
    rule, and then the new table is not looked at: writers wait meanwhile.
    """
    if not beyond_the_fence(conn, schema, state):
        return
    rivals = execute(
        conn,
        statement(
            "SELECT count(*), min(id) FROM {old} AS o"
            " WHERE id > {fence} AND EXISTS (SELECT FROM {new} AS n WHERE n.id = o.id)",
            old=name(schema, OLD_TABLE),
            new=name(schema, TABLE),
            fence=state.fence,
        ),
    ).one()
    if rivals[0]:
        raise ChronosError(
            f"{rivals[0]:,} rows were written to {OLD_TABLE} after the swap with ids that {TABLE} has as well"
            f" ({rivals[1]} the first); delete them there, or give them others"
        )


def _columns(shape: TableShape, alias: str) -> Statement:
    return sql.SQL(", ").join(
        statement("{a}.{c}", a=name(alias), c=column) for column in shape.copied_columns()
    )


def _carry_rows(
    conn: Connection,
    shape: TableShape,
    state: State,
    before_batch: Callable[[], None],
) -> int:
    """Copy the rows beyond the fence into the old table, which the application does not see yet."""
    new, old = name(shape.schema, TABLE), name(shape.schema, OLD_TABLE)
    after = state.fence
    carried: int = 0
    while True:
        before_batch()
        with transaction(conn):
            claim(conn, shape.schema, state.run_id)
            execute(conn, joined([*unheard(shape, old), application_path()], ";\n"))
            last, rows, ids, put = execute(
                conn,
                statement(
                    "WITH batch AS MATERIALIZED (SELECT {columns} FROM {new} AS n WHERE n.id > {after}"
                    " ORDER BY n.id FETCH FIRST {limit} ROWS WITH TIES"
                    "), put AS (INSERT INTO {old} ({names}) OVERRIDING SYSTEM VALUE"
                    " SELECT {names} FROM batch AS b"
                    " WHERE NOT EXISTS (SELECT FROM {old} AS o WHERE o.id = b.id) RETURNING 1)"
                    " SELECT max(b.id), count(*), count(DISTINCT b.id), (SELECT count(*) FROM put)"
                    " FROM batch AS b",
                    columns=_columns(shape, "n"),
                    names=sql.SQL(", ").join(shape.copied_columns()),
                    new=new,
                    old=old,
                    after=after,
                    limit=_BATCH,
                ),
            ).one()
            execute(conn, joined([our_path(), *heard_again(shape, old)], ";\n"))
            if rows != ids:
                raise ChronosError(
                    f"rows written since the swap share an id, up to {last}, and the plain table's key is the"
                    " id alone; give one of each another id"
                )
        carried += int(put)
        # What the application writes meanwhile is noted, so this need not catch up with it. Nor does it
        # matter that a row is in the old table from an earlier attempt: if it has changed, that is noted.
        if rows < _BATCH:
            return carried
        after = last


def _replay(conn: Connection, shape: TableShape) -> int:
    """Bring noted rows, of up to ``_BATCH`` ids, in the old table to what they are now; strike the notes.

    Returns how many notes there were. All notes of an id are taken together: a row that was given
    another timestamp leaves its old place before it takes the new one. The rows are read after the
    notes, so however a row was changed, it is replayed as it stands.
    """
    schema = shape.schema
    old, new = name(schema, OLD_TABLE), name(schema, TABLE)
    notes = execute(
        conn,
        statement(
            "DELETE FROM {changes} WHERE id IN (SELECT id FROM {changes} LIMIT {limit})"
            ' RETURNING id, "timestamp"',
            changes=name(schema, CHANGES_TABLE),
            limit=_BATCH,
        ),
    ).all()
    if not notes:
        return 0
    keys = sql.SQL(", ").join(statement("({id}, {ts})", id=key, ts=instant) for key, instant in set(notes))
    execute(conn, joined([*unheard(shape, old), application_path()], ";\n"))
    execute(
        conn,
        statement(
            'DELETE FROM {old} AS o USING (VALUES {keys}) AS k (id, "timestamp")'
            ' WHERE o.id = k.id AND o."timestamp" = k."timestamp"',
            old=old,
            keys=keys,
        ),
    )
    execute(
        conn,
        statement(
            "INSERT INTO {old} ({names}) OVERRIDING SYSTEM VALUE SELECT {columns} FROM {new} AS n"
            ' JOIN (VALUES {keys}) AS k (id, "timestamp")'
            ' ON n.id = k.id AND n."timestamp" = k."timestamp"',
            old=old,
            new=new,
            keys=keys,
            names=sql.SQL(", ").join(shape.copied_columns()),
            columns=_columns(shape, "n"),
        ),
    )
    execute(conn, joined([our_path(), *heard_again(shape, old)], ";\n"))
    return len(notes)


def _replay_most(
    conn: Connection,
    shape: TableShape,
    state: State,
    before_batch: Callable[[], None],
) -> None:
    """Replay while there is much of it, so that little is left for the moment under the lock."""
    notes = _BATCH
    while notes >= _FEW:
        before_batch()
        with transaction(conn):
            claim(conn, shape.schema, state.run_id)
            notes = _replay(conn, shape)


class _TooMuchToReplayError(Exception):
    """More was noted while the lock was waited for than may be replayed under it."""


def _swap_back(
    conn: Connection,
    shape: TableShape,
    state: State,
    short: ShortTransactions,
    before_batch: Callable[[], None],
) -> None:
    """Replay the last noted changes and give every name back, in one transaction.

    Little is replayed under the lock: when much was noted while it was waited for, the attempt is
    given up, the notes are replayed while the application writes on, and the lock is asked for again.
    """
    schema = shape.schema

    def swap_back(conn: Connection) -> None:
        claim(conn, schema, state.run_id)
        execute(conn, lock_table(schema, OLD_TABLE, "ACCESS EXCLUSIVE"))
        execute(conn, lock_table(schema, TABLE, "SHARE UPDATE EXCLUSIVE"))
        was = read_shape(conn, schema, OLD_TABLE)
        following = followers(conn, read_shape(conn, schema, TABLE).oid)
        short.asks_now()
        execute(conn, lock_table(schema, TABLE, "ACCESS EXCLUSIVE"))
        noted = execute(
            conn,
            statement(
                "SELECT count(*) FROM (SELECT FROM {changes} LIMIT {limit}) AS n",
                changes=name(schema, CHANGES_TABLE),
                limit=2 * _FEW,
            ),
        ).scalar_one()
        if noted == 2 * _FEW:
            raise _TooMuchToReplayError
        while _replay(conn, shape):
            pass
        execute(
            conn,
            joined(
                [
                    *_names_back(schema, state),
                    *_sequences_back(schema, state),
                    *follow_statements(following, name(schema, TABLE), name(schema, NEW_TABLE)),
                ],
                ";\n",
            ),
        )
        require_followers(conn, following, was.oid)
        _require_shape(was, read_shape(conn, schema, TABLE), state)
        migration_state.update(conn, schema, phase=Phase.UNDONE.value)

    while True:
        _replay_most(conn, shape, state, before_batch)
        try:
            return short.run(conn, swap_back, tables=[(schema, TABLE), (schema, OLD_TABLE)])
        except _TooMuchToReplayError:
            continue


def _require_shape(was: TableShape, now: TableShape, state: State) -> None:
    """Raise ShapeError unless the plain table has its names and sequences back and is otherwise untouched."""
    names = [(original, aside) for _, original, aside, _ in state.renames]
    found = differences(replace(was, rules=(), sequences=()), replace(now, rules=(), sequences=()), names)
    if set(now.sequences) != set(state.sequences):
        found.append(f"sequences: {state.sequences} became {now.sequences}")
    if [r.enabled for r in was.rules] != [r.enabled for r in now.rules]:
        found.append("rules: one has changed its state")
    if found:
        raise ShapeError(f"{TABLE} would not be the table that it was: {'; '.join(found)}")


def _names_back(schema: str, state: State) -> list[Statement]:
    return [
        rename(schema, "TABLE", TABLE, NEW_TABLE),
        *(rename(schema, kind, original, built) for kind, original, _, built in state.renames),
        rename(schema, "TABLE", OLD_TABLE, TABLE),
        *(rename(schema, kind, aside, original) for kind, original, aside, _ in state.renames),
    ]


_IDENTITY_BACK = """
DO $do$
DECLARE
    ahead bigint;
BEGIN
    EXECUTE format('SELECT q.last_value + CASE WHEN q.is_called THEN s.seqincrement ELSE 0 END'
                   ' FROM %s q, pg_sequence s WHERE s.seqrelid = %L::regclass',
                   pg_get_serial_sequence(format('%I.%I', {schema}, {new}), {column}),
                   pg_get_serial_sequence(format('%I.%I', {schema}, {new}), {column}))
    INTO ahead;
    EXECUTE format('ALTER TABLE %I.%I ALTER COLUMN %I RESTART WITH %s', {schema}, {table}, {column}, ahead);
END
$do$"""


def _sequences_back(schema: str, found: State) -> list[Statement]:
    """After the renames: the old table's ids go on where the new one's stopped."""
    identities = [
        statement(_IDENTITY_BACK, schema=schema, table=TABLE, new=NEW_TABLE, column=sequence.column)
        for sequence in found.sequences
        if sequence.identity
    ]
    return [*identities, *_owned_again(schema, found)]


def _owned_again(schema: str, found: State) -> list[Statement]:
    return [
        statement(
            "ALTER SEQUENCE {sequence} OWNED BY {column}",
            sequence=name(sequence.schema, sequence.name),
            column=name(schema, TABLE, sequence.column),
        )
        for sequence in found.sequences
        if not sequence.identity
    ]


def _clean_up(conn: Connection, shape: TableShape, state: State, short: ShortTransactions) -> None:
    """Drop what the migration made: each partition by itself, then the rest, the state last."""
    schema = shape.schema
    referred = [(key.schema, key.table) for key in shape.foreign_keys]

    def lock_referred(conn: Connection) -> None:
        for referred_schema, table in referred:
            execute(conn, lock_table(referred_schema, table, "ACCESS EXCLUSIVE"))

    for leaf in _leaves(conn, schema, state):

        def drop(conn: Connection, leaf: str = leaf) -> None:
            claim(conn, schema, state.run_id)
            # What is ours first: should autovacuum be at it, nobody else need wait with us.
            execute(conn, lock_table(schema, leaf, "ACCESS EXCLUSIVE"))
            lock_referred(conn)
            execute(conn, statement("DROP TABLE {leaf}", leaf=name(schema, leaf)))

        short.run(conn, drop, tables=[(schema, leaf), *referred])

    def drop_rest(conn: Connection) -> None:
        claim(conn, schema, state.run_id)
        lock_referred(conn)
        _functions_back(conn, schema, state)
        execute(
            conn,
            statement(
                "DROP TABLE IF EXISTS {new};"
                " DROP TABLE IF EXISTS {changes}, {live};"
                " DROP FUNCTION IF EXISTS {noting}(), {noted}(bigint);"
                " DROP TABLE {state}",
                new=name(schema, NEW_TABLE),
                changes=name(schema, CHANGES_TABLE),
                live=name(schema, LIVE_TABLE),
                noting=name(schema, CHANGES_FUNCTION),
                noted=name(schema, NOTED_FUNCTION),
                state=name(schema, STATE_TABLE),
            ),
        )

    short.run(conn, drop_rest, tables=[(schema, NEW_TABLE), *referred])


def _functions_back(conn: Connection, schema: str, state: State) -> None:
    """Drop the two functions, unless they are still the ones that stood there before."""
    standing = definitions(conn, schema)
    for signature, definition in standing.items():
        if definition not in state.functions:
            execute(conn, statement("DROP FUNCTION {function}", function=sql.SQL(signature)))
    for definition in state.functions:
        if definition not in standing.values():
            execute(conn, sql.SQL(definition))


def definitions(conn: Connection, schema: str) -> dict[str, str]:
    """The functions under the names of ours: signature -> definition."""
    rows = execute(
        conn,
        statement(
            "SELECT p.oid::regprocedure::text, pg_get_functiondef(p.oid) FROM pg_proc p"
            " JOIN pg_namespace n ON n.oid = p.pronamespace"
            " WHERE n.nspname = {schema} AND p.proname IN ({names}) AND p.prokind = 'f'"
            " AND p.proargtypes::text = 'integer'::regtype::oid::text ORDER BY 1",
            schema=schema,
            names=joined([sql.Literal(function) for function in FUNCTIONS]),
        ),
    ).all()
    return dict(rows)


def _leaves(conn: Connection, schema: str, state: State) -> list[str]:
    """The partitions of the table that goes, and those of the past that were never attached to it."""
    bare = history_days(state)
    with transaction(conn):
        rows = execute(
            conn,
            statement(
                "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
                " WHERE i.inhparent = to_regclass(format('%I.%I', {schema}, {new}))"
                " UNION SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
                " JOIN pg_constraint k ON k.conrelid = c.oid"
                " WHERE n.nspname = {schema} AND NOT c.relispartition"
                " AND (c.relname::text, k.conname::text) IN ({bare}) ORDER BY 1",
                schema=schema,
                new=NEW_TABLE,
                bare=sql.SQL(", ").join(_pair(day) for day in bare),
            ),
        ).all()
    return [row[0] for row in rows]


def _pair(day: date) -> Statement:
    leaf = partition_name(day)
    return statement("({leaf}, {check})", leaf=leaf, check=bound_check(leaf))
