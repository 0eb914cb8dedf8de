"""The notes: which rows were written in the table in use, and their replay into the other one.

Triggers note keys, not contents. A replay removes some notes and makes those rows in the target what they are
in the source, in one statement and so in one snapshot: later commits have notes of their own. Replaying twice
does no harm. The triggers are ENABLE ALWAYS, so that writes under a replication role are noted too.
"""

from __future__ import annotations

from psycopg2 import errorcodes, sql
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from chronos.catalog.ddl import literal, owner_only, revoke_execute, script
from chronos.catalog.shape import TableShape
from chronos.db import (
    Statement,
    application_path,
    execute,
    is_lock_failure,
    joined,
    name,
    one_line,
    sqlstate,
    statement,
    transaction,
)
from chronos.errors import ChronosError, LockUnavailableError, StrayRowError
from chronos.migration.context import Direction, Migration, match, names
from chronos.migration.state import Phase, Plan, verified_statement
from chronos.migration.workers import CheckStop
from chronos.table import TableSpec, in_quotes

_BATCH = 2_000
# Few enough to be replayed while writers wait.
FEW = 200
# A batch that conflicts with a row that a later note removes is retried with more notes, up to all of them.
_GROWTH = 10
_ATTEMPTS = 100
_PAUSE_S = 0.1
# Shorter than the server's deadlock_timeout: if we and a transaction of the application wait for each other,
# ours is the one that gives up.
_LOCK_TIMEOUT_MS = 200


class TruncatedError(ChronosError):
    """The table was emptied by TRUNCATE during the copy."""

    id = "truncated"


def change_log_statements(shape: TableShape, plan: Plan) -> list[Statement]:
    """The tables and functions of the notes, and inactive triggers on the new table."""
    table = shape.spec
    key = plan.new_key
    owner, home = name(shape.owner), table.home
    functions = (
        (table.note_function, ""),
        (table.unlink_function, ""),
        (table.snapshot_function, ""),
        (table.noted_function, shape.time_type),
    )
    statements: list[Statement] = [
        script(
            "change_log.sql",
            table,
            columns=_text(key),
            old_values=_text(key, "OLD"),
            new_values=_text(key, "NEW"),
            time_type=shape.time_type,
        ),
        unlink_function_statement(shape, plan, linked=None),
        statement("REVOKE ALL ON FUNCTION {f}() FROM PUBLIC", f=name(home, table.unlink_function)),
    ]
    for kept in (table.changes, table.replayed):
        statements += [
            statement("ALTER TABLE {t} OWNER TO {owner}", t=name(home, kept), owner=owner),
            *owner_only(shape, name(home, kept)),
        ]
    for function, arguments in functions:
        statements += [
            statement(
                "ALTER FUNCTION {f}({a}) OWNER TO {owner}",
                f=name(home, function),
                a=sql.SQL(arguments),
                owner=owner,
            ),
            *revoke_execute(shape, name(home, function), arguments),
        ]
    # Every role that writes to the table evaluates it in the triggers' conditions.
    statements.append(
        statement(
            "GRANT EXECUTE ON FUNCTION {f}({a}) TO PUBLIC",
            f=name(home, table.noted_function),
            a=sql.SQL(shape.time_type),
        )
    )
    return [
        *statements,
        *note_trigger_statements(shape, table.new, Direction.BACK),
        _snapshot_trigger(shape, table.new, Direction.BACK),
    ]


# EXECUTE plans it each time, so that it touches only that row's partition.
_UNLINK = """
    IF TG_ARGV[0] = '{origin}' AND (TG_OP = 'DELETE' OR record_image_ne(ROW({old}), ROW({new})))
       AND to_regclass({target_text}) IS NOT NULL THEN
        INSERT INTO {changes} ({columns}, chronos_origin) VALUES ({old_key}, '{origin}');
        EXECUTE {delete} USING OLD;
    END IF;
"""


def unlink_function_statement(shape: TableShape, plan: Plan, linked: Direction | None) -> Statement:
    """The function of the unlink triggers; replacing it waits for no lock.

    ``linked`` is the direction whose target is not in use and has foreign keys; None if there is none.
    """
    spec, key = shape.spec, plan.new_key
    unlink = ""
    if linked is not None:
        ties = tuple(dict.fromkeys([*key, *(c for k in plan.foreign_keys for c in k.columns)]))
        target = f"{in_quotes(spec.home)}.{in_quotes(linked.target(spec))}"
        same = " AND ".join(f"t.{in_quotes(c)} = ($1).{in_quotes(c)}" for c in key)
        unlink = _UNLINK.format(
            old=_text(ties, "OLD"),
            new=_text(ties, "NEW"),
            target_text=literal(target),
            changes=f"{in_quotes(spec.home)}.{in_quotes(spec.changes)}",
            columns=_text(key),
            old_key=_text(key, "OLD"),
            origin=linked.origin,
            delete=literal(f"DELETE FROM {target} AS t WHERE {same}"),
        )
    return script(
        "unlink_copy.sql",
        spec,
        linked=linked.target(spec) if linked is not None else "now: none",
        unlink=unlink.strip(),
    )


def _text(columns: tuple[str, ...], alias: str = "") -> str:
    return ", ".join((f"{alias}." if alias else "") + in_quotes(c) for c in columns)


def note_trigger_statements(shape: TableShape, on_table: str, direction: Direction) -> list[Statement]:
    """The triggers on ``on_table`` that note what is written there for a replay in ``direction``.

    SHARE ROW EXCLUSIVE on it. On the partitioned table they first ask whether the time is to be noted.
    """
    spec = shape.spec
    table = name(spec.home, on_table)
    insert, update, delete, truncate, _, unlink = spec.note_triggers
    function = name(spec.home, spec.note_function)

    def when(*rows: str) -> Statement:
        if direction is Direction.FORWARD:
            return sql.SQL("")
        asked = [
            statement(
                "{f}({row}.{c})",
                f=name(spec.home, spec.noted_function),
                row=sql.SQL(row),
                c=shape.time_column,
            )
            for row in rows
        ]
        return statement(" WHEN ({asked})", asked=joined(asked, " OR "))

    def trigger(name_: str, event: str, scope: str, when_: Statement) -> Statement:
        what = statement("AFTER {e} ON {t} {s}{w}", e=sql.SQL(event), t=table, s=sql.SQL(scope), w=when_)
        return _always(table, name_, what, function, direction.origin)

    return [
        trigger(insert, "INSERT", "FOR EACH ROW", when("NEW")),
        trigger(update, "UPDATE", "FOR EACH ROW", when("OLD", "NEW")),
        trigger(delete, "DELETE", "FOR EACH ROW", when("OLD")),
        trigger(truncate, "TRUNCATE", "FOR EACH STATEMENT", sql.SQL("")),
        _always(
            table,
            unlink,
            statement(
                "BEFORE UPDATE OR DELETE ON {t} FOR EACH ROW{w}",
                t=table,
                w=when("OLD"),
            ),
            name(spec.home, spec.unlink_function),
            direction.origin,
        ),
    ]


def _always(table: Statement, trigger: str, what: Statement, function: Statement, *texts: str) -> Statement:
    """A trigger that also fires under replication roles."""
    return statement(
        "CREATE TRIGGER {t} {what} EXECUTE FUNCTION {f}({texts});\n"
        "ALTER TABLE {table} ENABLE ALWAYS TRIGGER {t}",
        t=name(trigger),
        what=what,
        f=function,
        texts=joined([sql.Literal(text) for text in texts]),
        table=table,
    )


def _snapshot_trigger(shape: TableShape, on_table: str, direction: Direction) -> Statement:
    """The trigger that rejects a snapshot from before the swap, on the table noted for ``direction``.

    On the partitioned table it is active only while every write is noted.
    """
    spec = shape.spec
    table = name(spec.home, on_table)
    when: Statement = sql.SQL("")
    phases = [Phase.UNDONE]
    if direction is Direction.BACK:
        # After a way back, until it is dropped, rows are still deleted from it.
        phases = [Phase.MIGRATED, Phase.RETURNING, Phase.FINALIZING, Phase.UNDONE]
        when = statement(
            " WHEN ({f}('infinity'::{type}))",
            f=name(spec.home, spec.noted_function),
            type=sql.SQL(shape.time_type),
        )
    what = statement("BEFORE UPDATE OR DELETE ON {table} FOR EACH STATEMENT{when}", table=table, when=when)
    function = name(spec.home, spec.snapshot_function)
    *_, snapshot, _ = spec.note_triggers
    return _always(table, snapshot, what, function, *(phase.value for phase in phases))


def triggers_after_the_way_back(shape: TableShape) -> list[Statement]:
    """In the swap back: triggers on the plain table, until the partitioned one is dropped."""
    table = shape.spec.name
    return [
        *note_trigger_statements(shape, table, Direction.FORWARD),
        _snapshot_trigger(shape, table, Direction.FORWARD),
    ]


def notes_are_taken(conn: Connection, spec: TableSpec) -> bool:
    """Whether the note triggers of the table in use and of its partitions exist and are ENABLE ALWAYS.

    Somebody may have dropped or disabled them; ENABLE TRIGGER ALL does not restore ENABLE ALWAYS.
    """
    insert, update, delete, truncate, *_ = (sql.Literal(trigger) for trigger in spec.note_triggers)
    found: bool = execute(
        conn,
        statement(
            "SELECT (SELECT count(*) FROM pg_trigger t WHERE t.tgrelid = p.oid AND t.tgenabled = 'A'"
            "  AND t.tgname::text IN ({row_triggers}, {truncate})) = 4"
            " AND NOT EXISTS (SELECT FROM pg_inherits i WHERE i.inhparent = p.oid"
            "  AND (SELECT count(*) FROM pg_trigger t WHERE t.tgrelid = i.inhrelid AND t.tgenabled = 'A'"
            "       AND t.tgname::text IN ({row_triggers})) < 3)"
            " FROM pg_class p WHERE p.oid = to_regclass(format('%I.%I', {schema}, {table}))",
            row_triggers=joined([insert, update, delete]),
            truncate=truncate,
            schema=spec.home,
            table=spec.name,
        ),
    ).scalar_one()
    return found


def drop_trigger_statements(spec: TableSpec, on_table: str, *triggers: str) -> list[Statement]:
    """Drop our ``triggers`` (all of them if none are named) from a table. ACCESS EXCLUSIVE on it."""
    return [
        statement("DROP TRIGGER IF EXISTS {t} ON {table}", t=name(trigger), table=name(spec.home, on_table))
        for trigger in triggers or spec.note_triggers
    ]


def drop_log_statement(plan: Plan) -> Statement:
    """Drop the notes, their functions and the state: all that a finished migration leaves behind."""
    spec = plan.table
    home = spec.home
    if plan.attaches:
        return statement("DROP TABLE {state}", state=name(home, spec.state))
    return statement(
        "DROP TABLE {changes}, {replayed};\nDROP FUNCTION {note}(), {unlink}(), {snapshot}(), {noted};\n"
        "DROP TABLE {state}",
        changes=name(home, spec.changes),
        replayed=name(home, spec.replayed),
        note=name(home, spec.note_function),
        unlink=name(home, spec.unlink_function),
        snapshot=name(home, spec.snapshot_function),
        noted=name(home, spec.noted_function),
        state=name(home, spec.state),
    )


_NOTED = """
CREATE OR REPLACE FUNCTION {function}(written {type}) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN {condition}
"""


def note_everything_statement(shape: TableShape) -> Statement:
    """From now on, note every key written in the partitioned table."""
    return _noted(shape, sql.SQL("true"))


# The fence is known only under the lock, so the server puts it into the function.
_NOTED_UP_TO_THE_FENCE = """
DO $do$
BEGIN
    EXECUTE format('CREATE OR REPLACE FUNCTION %I.%I(written %s) RETURNS boolean'
                   ' LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN written <= %L::%s', {schema}, {function},
                   {type}, (SELECT {fence} FROM {state}), {type});
END
$do$"""


def note_up_to_the_fence_statement(shape: TableShape) -> Statement:
    """From now on, note only keys written at or below the fence in the partitioned table."""
    spec = shape.spec
    return statement(
        _NOTED_UP_TO_THE_FENCE,
        schema=spec.home,
        function=spec.noted_function,
        type=shape.time_type,
        fence=fence_value(shape),
        state=name(spec.home, spec.state),
    )


def fence_value(shape: TableShape) -> Statement:
    """The fence, a column of the state, in the type of the time column."""
    return sql.SQL(
        {
            "timestamptz": "fence",
            "timestamp": "(fence AT TIME ZONE 'UTC')",
            "date": "(fence AT TIME ZONE 'UTC')::date",
        }[shape.time_type]
    )


def _noted(shape: TableShape, condition: Statement) -> Statement:
    spec = shape.spec
    return statement(
        _NOTED,
        function=name(spec.home, spec.noted_function),
        type=sql.SQL(shape.time_type),
        condition=condition,
    )


def verified_statements(shape: TableShape, plan: Plan) -> list[Statement]:
    """Once the replayed keys are compared: from now on a row beyond the fence is new by its time alone."""
    spec = shape.spec
    return [
        note_up_to_the_fence_statement(shape),
        note_skewed_rows_statement(shape, plan),
        verified_statement(spec),
        statement("DELETE FROM {replayed}", replayed=name(spec.home, spec.replayed)),
    ]


def note_skewed_rows_statement(shape: TableShape, plan: Plan) -> Statement:
    """Note rows of the frozen table beyond the fence: their keys, not their times, say that they are old."""
    spec = shape.spec
    return statement(
        "INSERT INTO {changes} ({key}, chronos_origin)"
        " SELECT {key}, 'n' FROM {old} WHERE {c} > (SELECT {fence} FROM {state})",
        changes=name(spec.home, spec.changes),
        key=names(plan.new_key),
        old=name(spec.home, spec.old),
        c=shape.time_column,
        fence=fence_value(shape),
        state=name(spec.home, spec.state),
    )


def waiting_notes(conn: Connection, migration: Migration, direction: Direction, limit: int) -> int:
    """How many notes await replay in ``direction``, at most ``limit``.

    Raises TruncatedError when a TRUNCATE is among them, StrayRowError when a row has no time.
    """
    notes, truncated, timeless = execute(conn, waiting_notes_query(migration, direction, limit)).one()
    if truncated:
        raise TruncatedError(f"{migration.table} was emptied by TRUNCATE during the copy")
    if timeless:
        _require_times(conn, migration)
    return int(notes)


def waiting_notes_query(migration: Migration, direction: Direction, limit: int) -> Statement:
    """One row: how many notes await replay, at most ``limit``; whether a TRUNCATE is among them; whether a
    row without a time is.
    """
    return statement(
        "SELECT (SELECT count(*) FROM (SELECT FROM {changes} WHERE chronos_origin = {origin}"
        " AND NOT chronos_truncated LIMIT {limit}) AS n),"
        " EXISTS (SELECT FROM {changes} WHERE {c} IS NULL AND chronos_truncated"
        "  AND chronos_origin = {origin}),"
        " EXISTS (SELECT FROM {changes} WHERE {c} IS NULL AND NOT chronos_truncated)",
        changes=migration.relation(migration.table.changes),
        c=migration.shape.time_column,
        origin=direction.origin,
        limit=limit,
    )


def _require_times(conn: Connection, migration: Migration) -> None:
    table = migration.table
    rows = execute(
        conn,
        statement(
            "SELECT count(*) FROM {t} WHERE {c} IS NULL",
            t=migration.relation(table.name),
            c=migration.shape.time_column,
        ),
    ).scalar_one()
    if rows:
        raise StrayRowError(
            f"{rows:,} rows were written during the copy with a {table.column} that is NULL, which fits no"
            " partition; correct or delete them"
        )


# Notes are read in physical order, which is nearly the order of the writes: a row that gives up a unique
# value comes before the one that takes it.
_WHICH = "SELECT ctid FROM {changes} WHERE chronos_origin = {origin} AND NOT chronos_truncated LIMIT {limit}"

# A statement of its own, before the replay: the replay's snapshot then includes every change waited for here,
# and no row changes while it runs, which would make the server re-evaluate the statement for that row.
_LOCK = """
SELECT count(*) FROM (
    SELECT 1 FROM (SELECT DISTINCT {key} FROM {changes} WHERE ctid = ANY ({which})) AS k
    JOIN {source} AS s ON {source_same} FOR SHARE OF s
) AS locked
"""

# Every delete finishes before the first insert, because the insert asks for their count.
_REPLAY = """
WITH notes AS MATERIALIZED (
    DELETE FROM {changes} WHERE ctid = ANY ({which}) RETURNING {new_key}
), kept AS (
    INSERT INTO {replayed} ({new_key}) SELECT DISTINCT {new_key} FROM notes WHERE {column} >= {since}
), keys AS MATERIALIZED (
    SELECT DISTINCT {key} FROM notes WHERE {column} >= {since}
), gone AS (
    DELETE FROM {target} AS t USING keys AS k WHERE {target_same} RETURNING 1
), put AS (
    INSERT INTO {target} ({columns}) OVERRIDING SYSTEM VALUE
    SELECT {source_columns} FROM keys AS k JOIN {source} AS s ON {source_same}
    WHERE (SELECT count(*) FROM gone) >= 0 AND s.{column} >= {since}
    RETURNING 1
)
SELECT (SELECT count(*) FROM notes), (SELECT count(*) FROM put)
"""

# Few keys and large tables: always use the index, whatever the statistics say.
_REPLAY_SETTINGS = """
SET CONSTRAINTS ALL IMMEDIATE;
SELECT set_config(setting, 'off', true)
FROM unnest(ARRAY['enable_hashjoin', 'enable_mergejoin', 'enable_seqscan', 'jit']) AS setting
"""


def replay(conn: Connection, migration: Migration, direction: Direction, limit: int = _BATCH) -> int:
    """Replay up to ``limit`` notes as the last thing in the open transaction; returns how many there were.

    ROW EXCLUSIVE on the target. If the target gets foreign keys, the rows are also locked in the source
    (FOR SHARE): this waits for any transaction that has changed one, so that no copy of its row appears
    unseen by it.
    """
    which = statement(
        "SELECT ARRAY({which})::text",
        which=which_notes(migration, direction, limit),
    )
    tids = execute(conn, joined([*replay_settings(migration), which], ";\n")).scalar_one()
    if tids == "{}":
        return 0
    notes = statement("{tids}::tid[]", tids=tids)
    statements = [replay_statement(migration, direction, notes)]
    if direction is Direction.FORWARD and migration.plan.foreign_keys:
        statements.insert(0, _lock_statement(migration, direction, notes))
    return int(execute(conn, joined(statements, ";\n")).one()[0])


def replay_settings(migration: Migration) -> list[Statement]:
    """What ``replay_statement`` needs for its transaction."""
    settings = [statement(_REPLAY_SETTINGS), application_path()]
    if not all(key.passive for key in migration.plan.foreign_keys):
        # A row of the target may then change while it runs, and PostgreSQL 18 may crash when it re-evaluates
        # a statement for such a row with run-time partition pruning.
        settings.insert(0, statement("SET LOCAL enable_partition_pruning = off"))
    return settings


def which_notes(migration: Migration, direction: Direction, limit: int) -> Statement:
    """A query for the ctids of up to ``limit`` notes."""
    return statement(
        _WHICH,
        changes=migration.relation(migration.table.changes),
        origin=direction.origin,
        limit=limit,
    )


def _lock_statement(migration: Migration, direction: Direction, which: Statement) -> Statement:
    plan, key = migration.plan, direction.key(migration.plan)
    return statement(
        _LOCK,
        key=names(key),
        changes=migration.relation(plan.table.changes),
        which=which,
        source=migration.relation(direction.source(plan.table)),
        source_same=match(key, "s", "k"),
    )


def replay_statement(migration: Migration, direction: Direction, which: Statement) -> Statement:
    """The statement of ``replay``: one row, the number of notes and of rows inserted.

    ``which`` is the array of the notes' ctids.
    """
    plan, shape = migration.plan, migration.shape
    source, target = direction.source(plan.table), direction.target(plan.table)
    key = direction.key(plan)
    return statement(
        _REPLAY,
        changes=migration.relation(plan.table.changes),
        replayed=migration.relation(plan.table.replayed),
        which=which,
        new_key=names(plan.new_key),
        key=names(key),
        column=shape.time_column,
        since=shape.instant(migration.since(direction)),
        target=migration.relation(target),
        target_same=match(key, "t", "k"),
        source=migration.relation(source),
        source_same=match(key, "s", "k"),
        columns=joined(shape.copied_columns()),
        source_columns=joined([statement("s.{c}", c=c) for c in shape.copied_columns()]),
    )


def replay_most(
    migration: Migration, direction: Direction, check_stop: CheckStop, conn: Connection | None = None
) -> int:
    """Replay in rounds, each in its own transaction, until a round is small; returns how many notes.

    The rest is few enough to be replayed while writers wait. Raises TruncatedError, StrayRowError, and
    LockUnavailableError when a row stays locked.
    """
    conn = conn or migration.conn
    done, attempts, limit = 0, 0, _BATCH
    while True:
        check_stop()
        try:
            with transaction(conn, lock_timeout_ms=_LOCK_TIMEOUT_MS):
                migration.claim(conn)
                waiting_notes(conn, migration, direction, 1)
                notes = replay(conn, migration, direction, limit)
        except DBAPIError as error:
            # A transaction of the application holds one of the rows, or a later note removes the row that
            # this batch conflicts with.
            attempts += 1
            if sqlstate(error) == errorcodes.CHECK_VIOLATION and "no partition of relation" in str(error):
                raise StrayRowError(
                    f"a row was written during the copy with a time that fits no partition"
                    f" ({one_line(error)}); correct or delete it"
                ) from error
            if sqlstate(error) not in _PASSING:
                raise
            if attempts == _ATTEMPTS:
                if not is_lock_failure(error):
                    raise
                raise LockUnavailableError(
                    f"recently written rows of {migration.table} stay locked by another"
                    f" transaction ({one_line(error)})"
                ) from error
            if sqlstate(error) == errorcodes.UNIQUE_VIOLATION:
                limit *= _GROWTH
            migration.operator.patience.sleep(_PAUSE_S)
            continue
        done += notes
        migration.notes_replayed += notes
        if notes < FEW:
            return done
        attempts, limit = 0, _BATCH


_PASSING = (
    errorcodes.LOCK_NOT_AVAILABLE,
    errorcodes.DEADLOCK_DETECTED,
    errorcodes.UNIQUE_VIOLATION,
    errorcodes.FOREIGN_KEY_VIOLATION,
    errorcodes.QUERY_CANCELED,
)


def empty_after_truncate(migration: Migration) -> bool:
    """On the way back: empty the window of the plain table if the partitioned one was truncated.

    Rows older than the window were not in the truncated table and stay, unless they were written since the
    swap and replayed. Returns whether it was truncated.
    """
    plan, conn = migration.plan, migration.conn
    with transaction(conn):
        migration.claim(conn)
        truncated = execute(
            conn,
            statement(
                "WITH notes AS (DELETE FROM {changes} WHERE chronos_origin = 'n' AND chronos_truncated"
                " RETURNING 1) SELECT count(*) FROM notes",
                changes=migration.relation(plan.table.changes),
            ),
        ).scalar_one()
        if truncated:
            execute(
                conn,
                statement(
                    "DELETE FROM {old} AS t WHERE t.{c} >= {cutoff}"
                    " OR EXISTS (SELECT FROM {replayed} AS r WHERE {same})",
                    old=migration.relation(plan.table.old),
                    c=migration.shape.time_column,
                    cutoff=migration.shape.instant(plan.cutoff),
                    replayed=migration.relation(plan.table.replayed),
                    same=match(plan.new_key, "r", "t"),
                ),
            )
    return bool(truncated)


def truncated(conn: Connection, table: TableSpec, *directions: Direction) -> bool:
    """Whether there is a note of a TRUNCATE for one of ``directions`` (for any, if none are given)."""
    found: bool = execute(
        conn,
        statement(
            "SELECT EXISTS (SELECT FROM {changes} WHERE chronos_truncated AND chronos_origin IN ({origins}))",
            changes=name(table.home, table.changes),
            origins=joined([sql.Literal(direction.origin) for direction in directions or Direction]),
        ),
    ).scalar_one()
    return found


def emptied_by_hand(conn: Connection, table: TableSpec) -> bool:
    """Whether the frozen table was emptied by TRUNCATE since the swap."""
    return truncated(conn, table, Direction.FORWARD)


def forget_cascades_statement(migration: Migration) -> Statement:
    """When its foreign keys are dropped: what their cascades did to the plain table was not written by hand.

    They did the same to the partitioned table, which noted it; or the row is gone, or older than the window.
    """
    table, key = migration.table, migration.plan.new_key
    return statement(
        "DELETE FROM {changes} AS o WHERE o.chronos_origin = 'o' AND (CASE WHEN o.chronos_truncated"
        " THEN EXISTS (SELECT FROM {changes} AS n WHERE n.chronos_origin = 'n' AND n.chronos_truncated)"
        " ELSE o.{c} < {cutoff}"
        " OR EXISTS (SELECT FROM {changes} AS n WHERE n.chronos_origin = 'n' AND {noted})"
        " OR NOT EXISTS (SELECT FROM {old} AS t WHERE {there}) END)",
        changes=migration.relation(table.changes),
        old=migration.relation(table.old),
        c=migration.shape.time_column,
        cutoff=migration.shape.instant(migration.plan.cutoff),
        noted=match(key, "n", "o"),
        there=match(key, "t", "o"),
    )


def written_by_hand(conn: Connection, table: TableSpec) -> int:
    """How many rows of the frozen table were written by hand since the swap."""
    query = statement(
        "SELECT count(*) FROM {changes} WHERE chronos_origin = 'o'", changes=name(table.home, table.changes)
    )
    return int(execute(conn, query).scalar_one())
