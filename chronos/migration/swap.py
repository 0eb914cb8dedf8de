"""Build the partitioned table beside the plain one, then let the two change names in one short transaction.

Everything that takes time is built beforehand under names that nobody uses. What is left for the
moment in which writers wait is renaming: a few catalog rows, and one round trip to the server.
"""

from __future__ import annotations

from datetime import date, timedelta
from importlib.resources import files

from psycopg2 import sql

from chronos.db import Statement, name, statement
from chronos.migration.state import STATE_TABLE, Phase, State
from chronos.migration.table_shape import Index, TableShape, derived_name
from chronos.partitions import OLD_TABLE, TABLE, days, midnight, partition_name

NEW_TABLE = "webhook_log_new"
DEFAULT_PARTITION = "webhook_log_default"
CHANGES_TABLE = "webhook_log_migration_changes"
CHANGES_FUNCTION = "webhook_log_note_change"
COPYING_FLAG = "chronos.copying"

# How far the old table's own identity sequence is put ahead. Should somebody drop the new table by
# hand and rename the old one back, its next ids are none that the new table has given out.
_IDENTITY_GAP = 1_000_000_000


def script(file: str) -> Statement:
    """A file of ``chronos/sql``, as it is."""
    return sql.SQL((files("chronos") / "sql" / file).read_text("utf-8"))


def in_schema(schema: str, body: Statement) -> Statement:
    """``body`` with ``schema`` first in the search path, and the path of ``db.transaction`` after it."""
    return statement(
        "SET LOCAL search_path = {schema}, pg_temp;\n{body}\n;SET LOCAL search_path = pg_catalog, pg_temp",
        schema=name(schema),
        body=body,
    )


def bounds(shape: TableShape, day: date) -> Statement:
    """The FOR VALUES clause of ``day``."""
    return statement(
        "FOR VALUES FROM ({lower}) TO ({upper})",
        lower=shape.instant(midnight(day)),
        upper=shape.instant(midnight(day + timedelta(days=1))),
    )


def bound_check(leaf: str) -> str:
    """The name of the CHECK that spares ATTACH a scan, and goes once the partition is attached."""
    return derived_name(leaf, "_bound")


def _bound_check(shape: TableShape, leaf: str, first: date, end: date) -> Statement:
    return statement(
        'ALTER TABLE {leaf} ADD CONSTRAINT {check} CHECK ("timestamp" >= {lower} AND "timestamp" < {upper})',
        leaf=name(shape.schema, leaf),
        check=name(bound_check(leaf)),
        lower=shape.instant(midnight(first)),
        upper=shape.instant(midnight(end)),
    )


def primary_key_name(shape: TableShape) -> str:
    """The name of the primary key: the old one's, if it has one."""
    return next((i.name for i in shape.indexes if i.primary), f"{TABLE}_pkey")


def secondary_indexes(shape: TableShape) -> list[Index]:
    """Every index but the primary key's."""
    return [i for i in shape.indexes if not i.primary]


def index_statement(index: Index, table: Statement, as_name: str | None = None) -> Statement:
    """``index`` made again on ``table``; PostgreSQL picks the name when none is given."""
    if index.constraint:
        return statement(
            "ALTER TABLE {table} ADD {named}{constraint}",
            table=table,
            named=statement("CONSTRAINT {n} ", n=name(as_name)) if as_name else sql.SQL(""),
            constraint=sql.SQL(index.constraint),
        )
    return statement(
        "CREATE {unique}INDEX {named}ON {table} {body}",
        unique=sql.SQL("UNIQUE " if index.unique else ""),
        named=statement("{n} ", n=name(as_name)) if as_name else sql.SQL(""),
        table=table,
        body=sql.SQL(index.body),
    )


def foreign_key_statements(
    shape: TableShape, table: Statement, *, not_valid: bool = False
) -> list[Statement]:
    """The old table's foreign keys on ``table``: SHARE ROW EXCLUSIVE on it and on what they refer to."""
    return [
        statement(
            "ALTER TABLE {table} ADD CONSTRAINT {key} {definition}{not_valid}",
            table=table,
            key=name(key.name),
            definition=sql.SQL(key.definition),
            not_valid=sql.SQL(" NOT VALID" if not_valid else ""),
        )
        for key in shape.foreign_keys
    ]


def renames(shape: TableShape) -> list[tuple[str, str, str, str]]:
    """The names that pass from the old table's indexes to the new one's: (kind, name, aside, built as)."""
    names = [primary_key_name(shape), *(i.name for i in secondary_indexes(shape))]
    return [("INDEX", n, derived_name(n, "_old"), derived_name(n, "_new")) for n in names]


def history_days(state: State) -> list[date]:
    """The days before today: their partitions are filled beside the table, then attached."""
    return days(state.first_day, state.today - timedelta(days=1))


def live_days(state: State) -> list[date]:
    """Today and the days ahead: their partitions take the application's rows from the swap on."""
    return days(state.today, state.last_day)


def parent_statements(shape: TableShape, state: State) -> list[Statement]:
    """The partitioned table under its building name, without partitions."""
    new = name(shape.schema, NEW_TABLE)
    built_as = {original: temporary for _, original, _, temporary in state.renames}
    statements: list[Statement] = [
        statement(
            "CREATE TABLE {new} (LIKE {old} INCLUDING ALL EXCLUDING INDEXES EXCLUDING STATISTICS)"
            ' PARTITION BY RANGE ("timestamp")',
            new=new,
            old=name(shape.schema, TABLE),
        ),
        statement("ALTER TABLE {new} OWNER TO {owner}", new=new, owner=name(shape.owner)),
        statement(
            'ALTER TABLE {new} ADD CONSTRAINT {key} PRIMARY KEY (id, "timestamp")',
            new=new,
            key=name(built_as[primary_key_name(shape)]),
        ),
    ]
    for index in secondary_indexes(shape):
        statements.append(index_statement(index, new, built_as[index.name]))
        if index.comment:
            statements.append(
                statement(
                    "COMMENT ON INDEX {index} IS {comment}",
                    index=name(shape.schema, built_as[index.name]),
                    comment=index.comment,
                )
            )
    if shape.comment:
        statements.append(statement("COMMENT ON TABLE {new} IS {comment}", new=new, comment=shape.comment))
    return statements + _grant_statements(shape, new)


def _grant_statements(shape: TableShape, table: Statement) -> list[Statement]:
    """The old table's privileges, the owner's own included, on ``table``."""
    return [
        statement(
            "GRANT {privilege}{column} ON {table} TO {grantee}{option}",
            privilege=sql.SQL(grant.privilege),
            column=statement(" ({c})", c=name(grant.column)) if grant.column else sql.SQL(""),
            table=table,
            grantee=name(grant.grantee) if grant.grantee else sql.SQL("PUBLIC"),
            option=sql.SQL(" WITH GRANT OPTION" if grant.grantable else ""),
        )
        for grant in shape.grants
    ]


def _leaf_settings(shape: TableShape, leaf: Statement) -> list[Statement]:
    """What a partition does not get from its parent: the owner, the storage parameters."""
    return [
        statement("ALTER TABLE {leaf} OWNER TO {owner}", leaf=leaf, owner=name(shape.owner)),
        *(
            statement("ALTER TABLE {leaf} SET ({option})", leaf=leaf, option=sql.SQL(option))
            for option in shape.options
        ),
    ]


def partition_statements(shape: TableShape, state: State) -> list[Statement]:
    """The partitions: today's and the future's attached, those of the past bare beside the table.

    Until a day of the past is filled and attached, the default partition takes what the application
    writes for it, and only that: a CHECK keeps everything else out, as no partition would.
    """
    new = name(shape.schema, NEW_TABLE)
    statements: list[Statement] = []
    for day in live_days(state):
        leaf = name(shape.schema, partition_name(day))
        statements.append(
            statement(
                "CREATE TABLE {leaf} PARTITION OF {new} {bounds}",
                leaf=leaf,
                new=new,
                bounds=bounds(shape, day),
            )
        )
        statements += _leaf_settings(shape, leaf)
    for day in history_days(state):
        leaf = name(shape.schema, partition_name(day))
        statements.append(
            statement(
                "CREATE TABLE {leaf} (LIKE {new} INCLUDING ALL EXCLUDING INDEXES EXCLUDING IDENTITY)",
                leaf=leaf,
                new=new,
            )
        )
        statements.append(_bound_check(shape, partition_name(day), day, day + timedelta(days=1)))
        statements += _leaf_settings(shape, leaf)
    default = name(shape.schema, DEFAULT_PARTITION)
    statements.append(statement("CREATE TABLE {leaf} PARTITION OF {new} DEFAULT", leaf=default, new=new))
    statements.append(_bound_check(shape, DEFAULT_PARTITION, state.first_day, state.today))
    statements += _leaf_settings(shape, default)
    # Last, because they lock what they refer to. The parent gets its own when all is copied, and
    # adopts these: a foreign key on the parent now would lock that table once more for every day.
    for leaf_name in [DEFAULT_PARTITION, *map(partition_name, live_days(state))]:
        statements += foreign_key_statements(shape, name(shape.schema, leaf_name))
    return statements


def change_log_statements(shape: TableShape) -> list[Statement]:
    """The table and the trigger function that remember which migrated rows were written again."""
    return [
        in_schema(shape.schema, script("change_log.sql")),
        statement(
            "ALTER TABLE {table} OWNER TO {owner}",
            table=name(shape.schema, CHANGES_TABLE),
            owner=name(shape.owner),
        ),
        statement(
            "ALTER FUNCTION {function}() OWNER TO {owner}",
            function=name(shape.schema, CHANGES_FUNCTION),
            owner=name(shape.owner),
        ),
    ]


# The fence is known only under the lock, so the server puts it into the triggers itself.
_NOTE_CHANGES = """
DO $do$
BEGIN
    EXECUTE format($sql$
        CREATE TRIGGER %1$I AFTER INSERT ON %4$s FOR EACH ROW
            WHEN (NEW.id <= %6$s AND %7$s) EXECUTE FUNCTION %5$s();
        CREATE TRIGGER %2$I AFTER UPDATE ON %4$s FOR EACH ROW
            WHEN ((OLD.id <= %6$s OR NEW.id <= %6$s) AND %7$s) EXECUTE FUNCTION %5$s();
        CREATE TRIGGER %3$I AFTER DELETE ON %4$s FOR EACH ROW
            WHEN (OLD.id <= %6$s AND %7$s) EXECUTE FUNCTION %5$s()
        $sql$, {on_insert}, {on_update}, {on_delete},
        format('%I.%I', {schema}, {table}), format('%I.%I', {schema}, {function}),
        {highest},
        format('current_setting(%L, true) IS DISTINCT FROM %L', {flag}, 'on'));
END
$do$"""

CHANGE_TRIGGERS = tuple(f"{CHANGES_FUNCTION}_{event}" for event in ("insert", "update", "delete"))


def note_changes(schema: str, table: str, highest: int | None = None) -> Statement:
    """From now on, note the keys up to ``highest``, else up to the fence, that are written in ``table``."""
    on_insert, on_update, on_delete = CHANGE_TRIGGERS
    return statement(
        _NOTE_CHANGES,
        highest=statement("(SELECT fence FROM {state})", state=name(schema, STATE_TABLE))
        if highest is None
        else highest,
        schema=schema,
        table=table,
        function=CHANGES_FUNCTION,
        on_insert=on_insert,
        on_update=on_update,
        on_delete=on_delete,
        flag=COPYING_FLAG,
    )


_GO_ON_COUNTING = """
DO $do$
DECLARE
    ahead bigint;
    highest bigint;
BEGIN
    SELECT q.last_value + CASE WHEN q.is_called THEN s.seqincrement ELSE 0 END, s.seqmax
    INTO ahead, highest
    FROM {sequence} q, pg_sequence s
    WHERE s.seqrelid = format('%I.%I', {sequence_schema}, {sequence_name})::regclass;
    EXECUTE format('ALTER TABLE %I.%I ALTER COLUMN %I RESTART WITH %s', {schema}, {new}, {column}, ahead);
    EXECUTE format('ALTER TABLE %I.%I ALTER COLUMN %I RESTART WITH %s', {schema}, {old}, {column},
                   ahead + least({gap}, greatest((highest - ahead) / 2, 0)));
END
$do$"""


def sequence_statements(shape: TableShape) -> list[Statement]:
    """Let ids go on counting, whichever of the two tables is dropped one day, and by whom.

    A serial's sequence serves both tables and belongs to neither. An identity's cannot be shared:
    the new table's goes on where the old one's stands, the old one's leaps ahead.
    """
    return [
        statement(
            _GO_ON_COUNTING,
            sequence=name(sequence.schema, sequence.name),
            sequence_schema=sequence.schema,
            sequence_name=sequence.name,
            schema=shape.schema,
            new=TABLE,
            old=OLD_TABLE,
            column=sequence.column,
            gap=_IDENTITY_GAP,
        )
        if sequence.identity
        else statement(
            "ALTER SEQUENCE {sequence} OWNED BY NONE",
            sequence=name(sequence.schema, sequence.name),
        )
        for sequence in shape.sequences
    ]


def rename(schema: str, kind: str, old: str, new: str) -> Statement:
    """ALTER TABLE or ALTER INDEX ... RENAME; an index takes its constraint's name along."""
    return statement(
        "ALTER {kind} {old} RENAME TO {new}",
        kind=sql.SQL(kind),
        old=name(schema, old),
        new=name(new),
    )


def swap_statements(shape: TableShape, state: State) -> list[Statement]:
    """What happens under the lock, once webhook_log is locked in ACCESS EXCLUSIVE mode."""
    schema = shape.schema
    return [
        rename(schema, "TABLE", TABLE, OLD_TABLE),
        *(rename(schema, kind, original, aside) for kind, original, aside, _ in state.renames),
        rename(schema, "TABLE", NEW_TABLE, TABLE),
        *(rename(schema, kind, built, original) for kind, original, _, built in state.renames),
        *sequence_statements(shape),
        statement(
            "UPDATE {state} SET phase = {phase}, fence = coalesce((SELECT max(id) FROM {old}), 0)",
            state=name(schema, STATE_TABLE),
            phase=Phase.COPYING.value,
            old=name(schema, OLD_TABLE),
        ),
        note_changes(schema, TABLE),
    ]


def lock_table(schema: str, table: str, mode: str) -> Statement:
    """LOCK TABLE for this table alone, not for its partitions."""
    return statement("LOCK TABLE ONLY {table} IN {mode} MODE", table=name(schema, table), mode=sql.SQL(mode))
