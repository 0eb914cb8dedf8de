"""Build the partitioned table beside the plain one, then let the two change names in one short transaction.

Everything that takes time is built beforehand under names that nobody uses. What is left for the
moment in which writers wait is renaming: a few catalog rows, and one round trip to the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import date, timedelta
from importlib.resources import files

from psycopg2 import sql
from sqlalchemy.engine import Connection

from chronos.db import ShortTransactions, Statement, execute, joined, name, statement
from chronos.errors import ChronosError
from chronos.migration.followers import Follower, follow_statements, followers
from chronos.migration.state import STATE_TABLE, Phase, State, create_statement
from chronos.migration.table_shape import (
    NOT_COPYING,
    Grant,
    Index,
    TableShape,
    Trigger,
    derived_name,
    differences,
)
from chronos.migration.table_shape import read as read_shape
from chronos.partitions import FUNCTIONS, OLD_TABLE, TABLE, days, midnight, partition_name

NEW_TABLE = "webhook_log_new"
DEFAULT_PARTITION = "webhook_log_default"
CHANGES_TABLE = "webhook_log_migration_changes"
LIVE_TABLE = "webhook_log_migration_live"
CHANGES_FUNCTION = "webhook_log_note_change"
NOTED_FUNCTION = "webhook_log_is_noted"

# How far the old table's own identity sequence is put ahead. Should somebody drop the new table by
# hand and rename the old one back, its next ids are none that the new table has given out.
_IDENTITY_GAP = 1_000_000_000


class ShapeError(ChronosError):
    """A table that is to take another's place is not what that one was."""


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


def primary_key_statement(shape: TableShape, table: Statement, as_name: str | None = None) -> Statement:
    """The primary key on ``table``: the old one's, with the timestamp in it."""
    old = next((i for i in shape.indexes if i.primary), None)
    constraint = (old and old.constraint) or "PRIMARY KEY (id)"
    if old is None or old.columns == ["id"]:
        constraint = constraint.replace("PRIMARY KEY (id)", 'PRIMARY KEY (id, "timestamp")', 1)
    return statement(
        "ALTER TABLE {table} ADD {named}{constraint}",
        table=table,
        named=statement("CONSTRAINT {n} ", n=name(as_name)) if as_name else sql.SQL(""),
        constraint=sql.SQL(constraint),
    )


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
    statements = [
        statement(
            "ALTER TABLE {table} ADD CONSTRAINT {key} {definition}{not_valid}",
            table=table,
            key=name(key.name),
            definition=sql.SQL(key.definition),
            not_valid=sql.SQL(" NOT VALID" if not_valid else ""),
        )
        for key in shape.foreign_keys
    ]
    return statements + [
        _comment("CONSTRAINT", name(key.name), key.comment, table)
        for key in shape.foreign_keys
        if key.comment
    ]


def _comment(kind: str, what: Statement, text: str, table: Statement | None = None) -> Statement:
    return statement(
        "COMMENT ON {kind} {what}{on_table} IS {text}",
        kind=sql.SQL(kind),
        what=what,
        on_table=statement(" ON {table}", table=table) if table else sql.SQL(""),
        text=text,
    )


def renames(shape: TableShape) -> list[tuple[str, str, str, str]]:
    """The names that pass from what the old table has to the new one's: (kind, name, aside, built as)."""
    names = [
        ("INDEX", primary_key_name(shape)),
        *(("INDEX", i.name) for i in secondary_indexes(shape)),
        *(("SEQUENCE", i.name) for i in shape.identities),
        *(("STATISTICS", s.name) for s in shape.statistics),
    ]
    return [(kind, n, derived_name(n, "_old"), derived_name(n, "_new")) for kind, n in names]


def history_days(state: State) -> list[date]:
    """The days before today: their partitions are filled beside the table, then attached."""
    return days(state.first_day, state.today - timedelta(days=1))


def live_days(state: State) -> list[date]:
    """Today and the days ahead: their partitions take the application's rows from the swap on."""
    return days(state.today, state.last_day)


def ordinary_settings() -> list[Statement]:
    """For this transaction: no setting of the session's decides where a table goes or how it is kept."""
    return [
        statement(
            "SELECT set_config('default_tablespace', '', true),"
            " set_config('default_table_access_method', 'heap', true)"
        )
    ]


def parent_statements(shape: TableShape, state: State) -> list[Statement]:
    """The partitioned table under its building name, without partitions."""
    new = name(shape.schema, NEW_TABLE)
    built_as = {original: temporary for _, original, _, temporary in state.renames}
    statements: list[Statement] = [
        *ordinary_settings(),
        statement(
            "CREATE TABLE {new} (LIKE {old} INCLUDING ALL"
            " EXCLUDING INDEXES EXCLUDING STATISTICS EXCLUDING IDENTITY)"
            ' PARTITION BY RANGE ("timestamp"){tablespace}',
            new=new,
            old=name(shape.schema, TABLE),
            tablespace=_tablespace(shape),
        ),
        statement("ALTER TABLE {new} OWNER TO {owner}", new=new, owner=name(shape.owner)),
        *_not_null_statements(shape, new),
        primary_key_statement(shape, new, built_as[primary_key_name(shape)]),
    ]
    statements += _column_statements(shape, new)
    statements += _identity_statements(shape, new, built_as)
    for index in secondary_indexes(shape):
        statements.append(index_statement(index, new, built_as[index.name]))
    for index in shape.indexes:
        built = built_as[index.name]
        if index.comment:
            statements.append(_comment("INDEX", name(shape.schema, built), index.comment))
        if index.constraint_comment:
            statements.append(_comment("CONSTRAINT", name(built), index.constraint_comment, new))
    statements += _statistics_statements(shape, new, built_as)
    statements += [
        _comment("CONSTRAINT", name(check.name), check.comment, new)
        for check in shape.checks
        if check.comment
    ]
    if shape.comment:
        statements.append(_comment("TABLE", new, shape.comment))
    statements += _replica_identity(shape, new)
    statements += _row_security_statements(shape, new)
    for trigger in shape.triggers:
        statements += trigger_statements(trigger, new, quiet_while_copying=True)
    return statements + grant_statements(shape, new)


def _not_null_statements(shape: TableShape, table: Statement) -> list[Statement]:
    """From PostgreSQL 18 on NOT NULL bears a name: a good one, before the primary key makes one up."""
    named = any(check.kind == "n" for check in shape.checks)
    nullable = any(column.name == "timestamp" and not column.not_null for column in shape.columns)
    if not (named and nullable):
        return []
    return [
        statement(
            'ALTER TABLE {table} ADD CONSTRAINT {constraint} NOT NULL "timestamp"',
            table=table,
            constraint=name(f"{TABLE}_timestamp_not_null"),
        )
    ]


def _tablespace(shape: TableShape) -> Statement:
    return statement(" TABLESPACE {t}", t=name(shape.tablespace)) if shape.tablespace else sql.SQL("")


def _column_statements(shape: TableShape, table: Statement) -> list[Statement]:
    """What a column does not hand down: its statistics target and options."""
    statements: list[Statement] = []
    for column in shape.columns:
        alter = statement("ALTER TABLE {table} ALTER COLUMN {c} ", table=table, c=name(column.name))
        if column.statistics is not None:
            statements.append(
                statement("{alter}SET STATISTICS {target}", alter=alter, target=column.statistics)
            )
        if column.options:
            statements.append(
                statement("{alter}SET ({options})", alter=alter, options=sql.SQL(column.options))
            )
    return statements


def _identity_statements(shape: TableShape, table: Statement, built_as: dict[str, str]) -> list[Statement]:
    statements: list[Statement] = []
    for identity in shape.identities:
        sequence = name(shape.schema, built_as[identity.name])
        statements.append(
            statement(
                "ALTER TABLE {table} ALTER COLUMN {column} ADD GENERATED {when} AS IDENTITY"
                " (SEQUENCE NAME {sequence} {options})",
                table=table,
                column=name(identity.column),
                when=sql.SQL("ALWAYS" if identity.always else "BY DEFAULT"),
                sequence=sequence,
                options=sql.SQL(identity.options),
            )
        )
        if identity.comment:
            statements.append(_comment("SEQUENCE", sequence, identity.comment))
        statements += _grants(shape, "SEQUENCE", sequence, identity.grants)
    return statements


def _statistics_statements(shape: TableShape, table: Statement, built_as: dict[str, str]) -> list[Statement]:
    statements: list[Statement] = []
    for found in shape.statistics:
        built = name(shape.schema, built_as[found.name])
        statements.append(
            statement(
                "CREATE STATISTICS {built} {kinds}ON {columns} FROM {table}",
                built=built,
                kinds=sql.SQL(found.kinds),
                columns=sql.SQL(found.columns),
                table=table,
            )
        )
        if found.target is not None:
            statements.append(
                statement("ALTER STATISTICS {built} SET STATISTICS {n}", built=built, n=found.target)
            )
        if found.comment:
            statements.append(_comment("STATISTICS", built, found.comment))
        statements.append(
            statement("ALTER STATISTICS {built} OWNER TO {owner}", built=built, owner=name(found.owner))
        )
    return statements


def _replica_identity(shape: TableShape, table: Statement) -> list[Statement]:
    kinds = {"f": "FULL", "n": "NOTHING"}
    if shape.replica_identity not in kinds:
        return []
    kind = sql.SQL(kinds[shape.replica_identity])
    return [statement("ALTER TABLE {table} REPLICA IDENTITY {kind}", table=table, kind=kind)]


def _row_security_statements(shape: TableShape, table: Statement) -> list[Statement]:
    statements: list[Statement] = []
    if shape.row_security:
        statements.append(statement("ALTER TABLE {table} ENABLE ROW LEVEL SECURITY", table=table))
    if shape.force_row_security:
        statements.append(statement("ALTER TABLE {table} FORCE ROW LEVEL SECURITY", table=table))
    for policy in shape.policies:
        statements.append(
            statement(
                "CREATE POLICY {policy} ON {table} {definition}",
                policy=name(policy.name),
                table=table,
                definition=sql.SQL(policy.definition),
            )
        )
        if policy.comment:
            statements.append(_comment("POLICY", name(policy.name), policy.comment, table))
    return statements


def trigger_statements(
    trigger: Trigger, table: Statement, *, quiet_while_copying: bool = False, again: bool = False
) -> list[Statement]:
    """``trigger`` made on ``table``, with its state and comment; ``again`` replaces the one that is there.

    ``quiet_while_copying``: with a condition that keeps it from firing for the rows that we move. The
    server's own way to silence triggers, session_replication_role, is for superusers, silences foreign
    keys too, and makes other triggers fire.
    """
    conditions = [c for c in (trigger.condition,) if c]
    if quiet_while_copying and trigger.fires_on_copy:
        conditions.insert(0, NOT_COPYING)
    trigger_name = name(trigger.name)
    statements: list[Statement] = []
    if again and trigger.constraint:
        statements.append(statement("DROP TRIGGER {t} ON {table}", t=trigger_name, table=table))
    statements.append(
        statement(
            "CREATE {replace}{constraint}TRIGGER {trigger} {events} ON {table} {scope}{when} {call}",
            replace=sql.SQL("OR REPLACE " if again and not trigger.constraint else ""),
            constraint=sql.SQL("CONSTRAINT " if trigger.constraint else ""),
            trigger=trigger_name,
            events=sql.SQL(trigger.events),
            table=table,
            scope=sql.SQL(trigger.scope),
            when=sql.SQL(f" WHEN ({' AND '.join(conditions)})" if conditions else ""),
            call=sql.SQL(trigger.call),
        )
    )
    if trigger.enabled != "O":
        statements.append(trigger_state(trigger, table))
    if trigger.comment:
        statements.append(_comment("TRIGGER", trigger_name, trigger.comment, table))
    return statements


_STATES = {"O": "ENABLE", "D": "DISABLE", "R": "ENABLE REPLICA", "A": "ENABLE ALWAYS"}


def trigger_state(trigger: Trigger, table: Statement) -> Statement:
    """Put the trigger of this name on ``table``, and on its partitions, into the state of ``trigger``."""
    return statement(
        "ALTER TABLE {table} {state} TRIGGER {trigger}",
        table=table,
        state=sql.SQL(_STATES[trigger.enabled]),
        trigger=name(trigger.name),
    )


def triggers_as_before(shape: TableShape, table: Statement) -> list[Statement]:
    """When all is copied: the triggers without our condition. ACCESS EXCLUSIVE on ``table``."""
    return [
        query
        for trigger in shape.triggers
        if trigger.fires_on_copy
        for query in trigger_statements(trigger, table, again=True)
    ]


def unheard(shape: TableShape, table: Statement) -> list[Statement]:
    """For this transaction: rows can be moved into the plain ``table`` and no trigger or rule takes notice.

    For a table that the application does not see; ``heard_again`` belongs before the commit. Foreign
    keys are checked as usual, but at once: a check that is still to come would bar ``heard_again``.
    """
    return [
        statement("SET CONSTRAINTS ALL IMMEDIATE"),
        *(
            statement("ALTER TABLE {table} DISABLE TRIGGER {t}", table=table, t=name(trigger.name))
            for trigger in shape.triggers
            if trigger.enabled != "D"
        ),
        *(
            statement("ALTER TABLE {table} DISABLE RULE {r}", table=table, r=name(rule.name))
            for rule in shape.rules
            if rule.enabled != "D"
        ),
    ]


def heard_again(shape: TableShape, table: Statement) -> list[Statement]:
    """Undo ``unheard``."""
    return [
        *(trigger_state(trigger, table) for trigger in shape.triggers if trigger.enabled != "D"),
        *(
            statement(
                "ALTER TABLE {table} {state} RULE {r}",
                table=table,
                state=sql.SQL(_STATES[rule.enabled]),
                r=name(rule.name),
            )
            for rule in shape.rules
            if rule.enabled != "D"
        ),
    ]


def _roles(roles: Sequence[str | None]) -> Statement:
    return joined([name(role) if role else sql.SQL("PUBLIC") for role in roles])


def grant_statements(shape: TableShape, table: Statement) -> list[Statement]:
    """The old table's privileges, the owner's own included, and no other, on ``table``."""
    return _grants(shape, "TABLE", table, shape.grants)


def _grants(shape: TableShape, kind: str, what: Statement, grants: tuple[Grant, ...]) -> list[Statement]:
    """``grants`` on ``what``, a new object, in place of those that default privileges have put there."""
    leaked = shape.leaked.get(kind[0] if kind == "SEQUENCE" else "r", ())
    statements: list[Statement] = [
        statement(
            "REVOKE ALL ON {kind} {what} FROM {roles}",
            kind=sql.SQL(kind),
            what=what,
            roles=_roles(list(dict.fromkeys([shape.owner, *leaked]))),
        )
    ]
    for grant in grants:
        column = statement(" ({c})", c=name(grant.column)) if grant.column else sql.SQL("")
        query = statement(
            "GRANT {privileges} ON {kind} {what} TO {grantee}{option}",
            privileges=joined([statement("{p}{c}", p=sql.SQL(p), c=column) for p in grant.privileges]),
            kind=sql.SQL(kind),
            what=what,
            grantee=_roles([grant.grantee]),
            option=sql.SQL(" WITH GRANT OPTION" if grant.grantable else ""),
        )
        if grant.grantor == shape.owner:
            statements.append(query)
        else:
            statements += [
                statement("SET LOCAL ROLE {grantor}", grantor=name(grant.grantor)),
                query,
                statement("RESET ROLE"),
            ]
    return statements


def owner_only(shape: TableShape, table: Statement) -> list[Statement]:
    """Take away what default privileges have given on ``table``, a new one: it is its owner's alone.

    Partitions are read and written through their parent, whose privileges and policies count there; a
    right on a partition itself would be a way around the policies.
    """
    leaked = shape.leaked.get("r", ())
    if not leaked:
        return []
    return [
        statement("REVOKE ALL ON TABLE {table} FROM {roles}", table=table, roles=_roles(leaked)),
        statement("GRANT ALL ON TABLE {table} TO {owner}", table=table, owner=name(shape.owner)),
    ]


def _leaf_settings(shape: TableShape, leaf: Statement) -> list[Statement]:
    """What a partition does not get from its parent: owner, storage parameters, replica identity."""
    return [
        statement("ALTER TABLE {leaf} OWNER TO {owner}", leaf=leaf, owner=name(shape.owner)),
        *(
            [
                statement(
                    "ALTER TABLE {leaf} SET ({options})",
                    leaf=leaf,
                    options=joined([sql.SQL(option) for option in shape.options]),
                )
            ]
            if shape.options
            else []
        ),
        *_column_statements(shape, leaf),
        *_replica_identity(shape, leaf),
        *owner_only(shape, leaf),
    ]


def _create_leaf(shape: TableShape, leaf: Statement, *, indexes: bool) -> Statement:
    return statement(
        "CREATE TABLE {leaf} (LIKE {new} INCLUDING ALL EXCLUDING IDENTITY{excluding}){tablespace}",
        leaf=leaf,
        new=name(shape.schema, NEW_TABLE),
        excluding=sql.SQL("" if indexes else " EXCLUDING INDEXES"),
        tablespace=_tablespace(shape),
    )


def partition_statements(shape: TableShape, state: State) -> list[Statement]:
    """The partitions: today's and the future's attached, those of the past bare beside the table.

    Until a day of the past is filled and attached, the default partition takes what the application
    writes for it, and only that: a CHECK keeps everything else out, as no partition would.
    """
    new = name(shape.schema, NEW_TABLE)
    statements: list[Statement] = []
    for day in live_days(state):
        leaf = name(shape.schema, partition_name(day))
        statements.append(_create_leaf(shape, leaf, indexes=True))
        statements += _leaf_settings(shape, leaf)
        statements.append(
            statement(
                "ALTER TABLE {new} ATTACH PARTITION {leaf} {bounds}",
                leaf=leaf,
                new=new,
                bounds=bounds(shape, day),
            )
        )
    for day in history_days(state):
        leaf = name(shape.schema, partition_name(day))
        statements.append(_create_leaf(shape, leaf, indexes=False))
        statements.append(_bound_check(shape, partition_name(day), day, day + timedelta(days=1)))
        statements += _leaf_settings(shape, leaf)
    default = name(shape.schema, DEFAULT_PARTITION)
    statements.append(_create_leaf(shape, default, indexes=True))
    statements.append(_bound_check(shape, DEFAULT_PARTITION, state.first_day, state.today))
    statements += _leaf_settings(shape, default)
    statements.append(statement("ALTER TABLE {new} ATTACH PARTITION {leaf} DEFAULT", leaf=default, new=new))
    # Last, because they lock what they refer to. The parent gets its own when all is copied, and
    # adopts these: a foreign key on the parent now would lock that table once more for every day.
    for leaf_name in [DEFAULT_PARTITION, *map(partition_name, live_days(state))]:
        statements += foreign_key_statements(shape, name(shape.schema, leaf_name))
    return statements


def change_log_statements(shape: TableShape) -> list[Statement]:
    """The table, the functions and the triggers that remember which migrated rows were written again."""
    return [
        in_schema(shape.schema, script("change_log.sql")),
        statement(
            "ALTER TABLE {table} OWNER TO {owner}",
            table=name(shape.schema, CHANGES_TABLE),
            owner=name(shape.owner),
        ),
        statement(
            "ALTER TABLE {table} OWNER TO {owner}",
            table=name(shape.schema, LIVE_TABLE),
            owner=name(shape.owner),
        ),
        statement(
            "ALTER FUNCTION {function}() OWNER TO {owner}",
            function=name(shape.schema, CHANGES_FUNCTION),
            owner=name(shape.owner),
        ),
        statement(
            "ALTER FUNCTION {function}(bigint) OWNER TO {owner}",
            function=name(shape.schema, NOTED_FUNCTION),
            owner=name(shape.owner),
        ),
        *owner_only(shape, name(shape.schema, CHANGES_TABLE)),
        *owner_only(shape, name(shape.schema, LIVE_TABLE)),
        *_nobody_calls(shape, name(shape.schema, CHANGES_FUNCTION)),
        *_nobody_calls(shape, name(shape.schema, NOTED_FUNCTION), "bigint"),
        # Whoever writes webhook_log evaluates it in the triggers' conditions.
        statement(
            "GRANT EXECUTE ON FUNCTION {function}(bigint) TO PUBLIC",
            function=name(shape.schema, NOTED_FUNCTION),
        ),
    ]


def state_statements(shape: TableShape, state: State) -> list[Statement]:
    """The state row, once both tables are there."""
    table = name(shape.schema, STATE_TABLE)
    return [
        create_statement(shape.schema, state),
        statement(
            "UPDATE {state} SET new_oid = format('%I.%I', {schema}, {new})::regclass",
            state=table,
            schema=shape.schema,
            new=NEW_TABLE,
        ),
        *owner_only(shape, table),
    ]


def function_statements(shape: TableShape) -> list[Statement]:
    """The two functions that keep the partitions, in the hands of the table's owner."""
    return [
        in_schema(shape.schema, script("partition_functions.sql")),
        *(
            statement(
                "ALTER FUNCTION {function}(integer) OWNER TO {owner}",
                function=name(shape.schema, function),
                owner=name(shape.owner),
            )
            for function in FUNCTIONS
        ),
        *(
            query
            for function in FUNCTIONS
            for query in _nobody_calls(shape, name(shape.schema, function), "integer")
        ),
    ]


def _nobody_calls(shape: TableShape, function: Statement, arguments: str = "") -> list[Statement]:
    roles = [role for role in shape.leaked.get("f", ()) if role != shape.owner]
    if not roles:
        return []
    return [
        statement(
            "REVOKE ALL ON FUNCTION {function}({arguments}) FROM {roles}",
            function=function,
            arguments=sql.SQL(arguments),
            roles=_roles(roles),
        )
    ]


# The fence is known only under the lock, so the server puts it into the function itself.
_NOTE_IDS = """
DO $do$
BEGIN
    EXECUTE format('CREATE OR REPLACE FUNCTION %I.%I(id bigint) RETURNS boolean'
                   ' LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN %s', {schema}, {function}, {condition});
END
$do$"""


def note_up_to_the_fence(schema: str) -> Statement:
    """From now on, note the keys at or below the fence that are written in the new table."""
    fence = statement("format('id <= %s', (SELECT fence FROM {state}))", state=name(schema, STATE_TABLE))
    return statement(_NOTE_IDS, schema=schema, function=NOTED_FUNCTION, condition=fence)


def note_everything(schema: str) -> Statement:
    """From now on, note every key that is written in the new table."""
    return statement(_NOTE_IDS, schema=schema, function=NOTED_FUNCTION, condition="true")


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
            sequence=name(sequence.schema, derived_name(sequence.name, "_old")),
            sequence_schema=sequence.schema,
            sequence_name=derived_name(sequence.name, "_old"),
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


def swap_statements(shape: TableShape, state: State, followers: list[Follower]) -> list[Statement]:
    """What happens under the lock, once webhook_log is locked in ACCESS EXCLUSIVE mode."""
    schema = shape.schema
    table, old = name(schema, TABLE), name(schema, OLD_TABLE)
    return [
        rename(schema, "TABLE", TABLE, OLD_TABLE),
        *(rename(schema, kind, original, aside) for kind, original, aside, _ in state.renames),
        rename(schema, "TABLE", NEW_TABLE, TABLE),
        *(rename(schema, kind, built, original) for kind, original, _, built in state.renames),
        *sequence_statements(shape),
        *follow_statements(followers, table, old),
        *_rule_statements(shape, table),
        statement(
            "UPDATE {state} SET phase = {phase}, fence = coalesce((SELECT max(id) FROM {old}), 0)",
            state=name(schema, STATE_TABLE),
            phase=Phase.COPYING.value,
            old=old,
        ),
        note_up_to_the_fence(schema),
    ]


def _rule_statements(shape: TableShape, table: Statement) -> list[Statement]:
    statements: list[Statement] = []
    for rule in shape.rules:
        statements.append(sql.SQL(rule.definition.rstrip(";")))
        if rule.enabled != "O":
            statements.append(
                statement(
                    "ALTER TABLE {table} {state} RULE {rule}",
                    table=table,
                    state=sql.SQL(_STATES[rule.enabled]),
                    rule=name(rule.name),
                )
            )
        if rule.comment:
            statements.append(_comment("RULE", name(rule.name), rule.comment, table))
    return statements


_OID = "SELECT format('%I.%I', {schema}, {table})::regclass::oid::bigint"

_CATALOG_ROWS = """
SELECT c.xmin::text, (SELECT string_agg(a.xmin::text, ' ' ORDER BY a.attnum)
                      FROM pg_attribute a WHERE a.attrelid = c.oid)
FROM pg_class c WHERE c.oid = {oid}
"""


def swap_tables(conn: Connection, shape: TableShape, state: State, short: ShortTransactions) -> None:
    """The swap, in the transaction that is open: look, lock, rename, look again.

    SHARE UPDATE EXCLUSIVE on webhook_log while the two tables are compared, so that nobody changes
    them; the application reads and writes on. Then ACCESS EXCLUSIVE, to the end of the transaction.
    Raises ShapeError, and nothing has happened, when the table that was built differs from what
    webhook_log is by now in more than what the plan announces.
    """
    schema = shape.schema
    execute(conn, lock_table(schema, TABLE, "SHARE UPDATE EXCLUSIVE"))
    oid = execute(conn, statement(_OID, schema=schema, table=TABLE)).scalar_one()
    versions = execute(conn, statement(_CATALOG_ROWS, oid=oid)).one()
    was = read_shape(conn, schema, TABLE)
    built = read_shape(conn, schema, NEW_TABLE)
    names = [(temporary, original) for _, original, _, temporary in state.renames]

    def require_alike(was: TableShape) -> None:
        found = differences(was, replace(built, rules=was.rules), names, announced=True)
        found += partition_differences(conn, was, built.oid)
        if found:
            raise ShapeError(f"the new table is not what {TABLE} is now: {'; '.join(found)}")

    require_alike(was)
    before = followers(conn, was.oid)
    short.asks_now()
    execute(conn, lock_table(schema, TABLE, "ACCESS EXCLUSIVE"))
    # GRANT takes no lock on the table: one may have come while ours was waited for.
    if execute(conn, statement(_CATALOG_ROWS, oid=was.oid)).one() != versions:
        require_alike(read_shape(conn, schema, TABLE))
    execute(conn, joined(swap_statements(was, state, before), ";\n"))
    require_followers(conn, before, built.oid)


def require_followers(conn: Connection, before: list[Follower], oid: int) -> None:
    """Raise ShapeError unless the table ``oid`` is now followed by what was there ``before``, unchanged."""
    if not before:
        return
    after = followers(conn, oid)
    lost = [f"{f.kind} {f.name}" for f in before if f not in after]
    if lost:
        raise ShapeError(f"{', '.join(lost)} would not be as before on the other table")


# One look at all partitions: they are alike, or there is something to tell.
_PARTITIONS = r"""
SELECT format('partition %s: %s', c.relname, d.what)
FROM pg_inherits i
JOIN pg_class c ON c.oid = i.inhrelid
JOIN pg_class o ON o.oid = {old}
LEFT JOIN pg_class ct ON ct.oid = c.reltoastrelid
LEFT JOIN pg_class ot ON ot.oid = o.reltoastrelid
CROSS JOIN LATERAL (VALUES
    ('its owner differs', c.relowner = o.relowner),
    ('its storage parameters differ', c.reloptions IS NOT DISTINCT FROM o.reloptions
                                      AND ct.reloptions IS NOT DISTINCT FROM ot.reloptions),
    ('its tablespace differs', c.reltablespace = o.reltablespace),
    ('its replica identity differs', c.relreplident = o.relreplident),
    ('somebody but the owner has privileges on it',
     NOT EXISTS (SELECT FROM aclexplode(c.relacl) x WHERE x.grantee <> c.relowner)),
    ('a trigger is missing or in another state',
     NOT EXISTS (SELECT FROM pg_trigger p LEFT JOIN pg_trigger t ON t.tgparentid = p.oid AND t.tgrelid = c.oid
                 WHERE p.tgrelid = i.inhparent AND NOT p.tgisinternal AND p.tgtype & 1 <> 0
                   AND t.tgenabled IS DISTINCT FROM p.tgenabled)),
    ('a column is not as before',
     NOT EXISTS (SELECT FROM pg_attribute a LEFT JOIN pg_attribute b
                     ON b.attrelid = c.oid AND b.attname = a.attname AND NOT b.attisdropped
                 WHERE a.attrelid = i.inhparent AND a.attnum > 0
                   AND (a.attstorage, a.attcompression, a.attgenerated, a.attnotnull, a.attcollation,
                        coalesce(a.attstattarget, -1),
                        ARRAY(SELECT o FROM unnest(a.attoptions) o WHERE o LIKE 'n\_distinct%' ORDER BY 1))
                       IS DISTINCT FROM
                       (b.attstorage, b.attcompression, b.attgenerated, b.attnotnull, b.attcollation,
                        coalesce(b.attstattarget, -1),
                        ARRAY(SELECT o FROM unnest(b.attoptions) o WHERE o LIKE 'n\_distinct%' ORDER BY 1))))
) d (what, fine)
WHERE i.inhparent = {new} AND NOT d.fine
ORDER BY 1
LIMIT 5
"""


def partition_differences(conn: Connection, was: TableShape, parent: int) -> list[str]:
    """What the partitions of ``parent`` lack that the plain table had, a line each."""
    rows = execute(conn, statement(_PARTITIONS, old=was.oid, new=parent)).all()
    return [row[0] for row in rows]


def lock_table(schema: str, table: str, mode: str) -> Statement:
    """LOCK TABLE for this table alone, not for its partitions."""
    return statement("LOCK TABLE ONLY {table} IN {mode} MODE", table=name(schema, table), mode=sql.SQL(mode))
