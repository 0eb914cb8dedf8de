"""A shape as statements: the partitioned table and its partitions, built like the plain table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.resources import files

from psycopg2 import sql
from sqlalchemy.engine import Connection

from chronos.catalog.shape import ForeignKey, Grant, Index, OwnedSequence, TableShape, Trigger
from chronos.db import Statement, execute, joined, name, statement
from chronos.table import Period, TableSpec, derived_name, in_quotes

# How far the old table's own identity sequence is moved ahead. If somebody drops the new table by hand and
# renames the old one back, its next ids do not repeat any of the new table.
_IDENTITY_GAP = 1_000_000_000

_PLACEHOLDER = re.compile(r"@(#|')?([a-z_]+)'?@")


def script(file: str, spec: TableSpec, **more: str) -> Statement:
    """A file of ``chronos/sql`` for the table ``spec``, with its schema first in the search path.

    ``@table@`` becomes the quoted name of the table, ``@'table'@`` the name as a string literal, ``@#table@``
    the bare name; likewise old, new, state, changes, replayed, the functions, column, schema, every.
    ``more`` are further texts, for ``@#...@``.
    """
    known: dict[str, str] = {
        "table": spec.name,
        "column": spec.column,
        "schema": spec.home,
        "every": spec.every.value,
        **{
            what: getattr(spec, what)
            for what in (
                "old",
                "new",
                "state",
                "changes",
                "replayed",
                "note_function",
                "noted_function",
                "unlink_function",
                "snapshot_function",
                "create_function",
                "drop_function",
            )
        },
        **more,
    }

    def fill(found: re.Match[str]) -> str:
        kind, value = found[1], known[found[2]]
        if kind == "#":
            return value
        return literal(value) if kind == "'" else in_quotes(value)

    text = (files("chronos") / "sql" / file).read_text("utf-8")
    return statement(
        "SET LOCAL search_path = {schema}, pg_temp;\n{body}\n;SET LOCAL search_path = pg_catalog, pg_temp",
        schema=name(spec.home),
        body=sql.SQL(_PLACEHOLDER.sub(fill, text)),
    )


def literal(text: str) -> str:
    """A string as an SQL literal, for the body of a function."""
    return "'" + text.replace("'", "''") + "'"


def bounds(shape: TableShape, period: Period) -> Statement:
    """The FOR VALUES clause of ``period``."""
    return statement(
        "FOR VALUES FROM ({lower}) TO ({upper})",
        lower=shape.instant(period.start),
        upper=shape.instant(period.end),
    )


def bound_check(leaf: str) -> str:
    """The name of the CHECK that saves ATTACH a scan, dropped once the partition is attached."""
    return derived_name(leaf, "_bound")


def primary_key_name(shape: TableShape) -> str:
    """The name of the primary key: that of the index that identifies the plain table's rows."""
    return shape.key_index.name if shape.key_index else derived_name(shape.spec.name, "_pkey")


def primary_key_statement(shape: TableShape, table: Statement, as_name: str | None = None) -> Statement:
    """The primary key on ``table``: the plain table's key plus the time column."""
    return statement(
        "ALTER TABLE {table} ADD {named}{constraint}",
        table=table,
        named=_constraint_name(as_name),
        constraint=_primary_key(shape),
    )


def _primary_key(shape: TableShape) -> Statement:
    index = shape.key_index
    assert index is not None, f"{shape.name} has no key"
    if not index.primary:
        return statement("PRIMARY KEY ({columns})", columns=joined([name(c) for c in shape.new_key]))
    assert index.constraint is not None
    return _with_time_column(shape, index.constraint, "PRIMARY KEY")


def _with_time_column(shape: TableShape, definition: str, before: str) -> Statement:
    """A definition of the key with the time column added to the list of columns after ``before``."""
    assert shape.key_index is not None
    if shape.spec.column in shape.key_index.columns:
        return sql.SQL(definition)
    # A quoted name may contain the bracket that would end the list.
    listed = re.match(before + r' \((?:[^")]|"(?:[^"]|"")*")*', definition)
    assert listed is not None
    return statement(
        "{listed}, {column}{rest}",
        listed=sql.SQL(listed[0]),
        column=name(shape.spec.column),
        rest=sql.SQL(definition[listed.end() :]),
    )


def key_body(shape: TableShape) -> Statement:
    """The definition of the primary key's index with the time column, from USING on."""
    index = shape.key_index
    assert index is not None, f"{shape.name} has no key"
    if not index.primary:
        return statement("USING btree ({columns})", columns=joined([name(c) for c in shape.new_key]))
    return _with_time_column(shape, index.body, "USING btree")


def _constraint_name(as_name: str | None) -> Statement:
    return statement("CONSTRAINT {n} ", n=name(as_name)) if as_name else sql.SQL("")


def secondary_indexes(shape: TableShape) -> list[Index]:
    """Every index but the key's."""
    key = shape.key_index
    return [index for index in shape.indexes if key is None or index.name != key.name]


def index_statement(index: Index, table: Statement, as_name: str | None = None) -> Statement:
    """``index`` created on ``table``; PostgreSQL picks the name when none is given."""
    if index.constraint:
        return statement(
            "ALTER TABLE {table} ADD {named}{constraint}",
            table=table,
            named=_constraint_name(as_name),
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
    keys: Sequence[ForeignKey], table: Statement, *, not_valid: bool = False
) -> list[Statement]:
    """Foreign keys on ``table``: SHARE ROW EXCLUSIVE on it and on what they refer to."""
    statements = [
        statement(
            "ALTER TABLE {table} ADD CONSTRAINT {key} {definition}{not_valid}",
            table=table,
            key=name(key.name),
            definition=sql.SQL(key.definition),
            not_valid=sql.SQL(" NOT VALID" if not_valid else ""),
        )
        for key in keys
    ]
    return statements + [
        _comment("CONSTRAINT", name(key.name), key.comment, table) for key in keys if key.comment
    ]


def validate_statement(table: Statement, key: ForeignKey) -> Statement:
    """Check the rows of a filled table against a foreign key. ROW SHARE on what it refers to."""
    return statement("ALTER TABLE {table} VALIDATE CONSTRAINT {key}", table=table, key=name(key.name))


def _comment(kind: str, what: Statement, text: str, table: Statement | None = None) -> Statement:
    return statement(
        "COMMENT ON {kind} {what}{on_table} IS {text}",
        kind=sql.SQL(kind),
        what=what,
        on_table=statement(" ON {table}", table=table) if table else sql.SQL(""),
        text=text,
    )


def renames(shape: TableShape) -> list[tuple[str, str, str, str]]:
    """The names that move from the plain table's objects to the new one's: (kind, name, aside, built as)."""
    names = [
        *(("INDEX", index.name) for index in (shape.key_index,) if index),
        *(("INDEX", i.name) for i in secondary_indexes(shape)),
        *(("SEQUENCE", i.name) for i in shape.identities),
        *(("STATISTICS", s.name) for s in shape.statistics),
    ]
    return [(kind, n, derived_name(n, "_old"), derived_name(n, "_new")) for kind, n in names]


def _ordinary_settings() -> list[Statement]:
    """For this transaction: no session setting decides a new table's tablespace or access method."""
    return [
        statement(
            "SELECT set_config('default_tablespace', '', true),"
            " set_config('default_table_access_method', 'heap', true)"
        )
    ]


def parent_statements(shape: TableShape, renames: Iterable[tuple[str, str, str, str]]) -> list[Statement]:
    """The partitioned table under its temporary name, without partitions.

    The application's triggers and row security are disabled; the swap enables both.
    """
    new = name(shape.schema, shape.spec.new)
    built_as = {original: temporary for _, original, _, temporary in renames}
    statements: list[Statement] = [
        *_ordinary_settings(),
        statement(
            "CREATE TABLE {new} (LIKE {old} INCLUDING ALL"
            " EXCLUDING INDEXES EXCLUDING STATISTICS EXCLUDING IDENTITY)"
            " PARTITION BY RANGE ({column}){tablespace}",
            new=new,
            column=shape.time_column,
            old=name(shape.schema, shape.spec.name),
            tablespace=_tablespace(shape),
        ),
        statement("ALTER TABLE {new} OWNER TO {owner}", new=new, owner=name(shape.owner)),
        *_not_null_statements(shape, new),
        primary_key_statement(shape, new, built_as[primary_key_name(shape)]),
    ]
    statements += _column_statements(shape, new)
    statements += identity_statements(shape, new, built_as)
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
    statements += _policy_statements(shape, new)
    for trigger in shape.triggers:
        statements += trigger_statements(trigger, new)
    return statements + grant_statements(shape, new)


def _not_null_statements(shape: TableShape, table: Statement) -> list[Statement]:
    """From PostgreSQL 18 on, NOT NULL has a name: set a good one before the primary key invents one."""
    named = any(check.kind == "n" for check in shape.checks)
    nullable = any(column.name == shape.spec.column and not column.not_null for column in shape.columns)
    if not (named and nullable):
        return []
    return [
        statement(
            "ALTER TABLE {table} ADD CONSTRAINT {constraint} NOT NULL {column}",
            table=table,
            constraint=name(derived_name(shape.spec.name, f"_{shape.spec.column}_not_null")),
            column=shape.time_column,
        )
    ]


def _tablespace(shape: TableShape) -> Statement:
    return statement(" TABLESPACE {t}", t=name(shape.tablespace)) if shape.tablespace else sql.SQL("")


def _column_statements(shape: TableShape, table: Statement) -> list[Statement]:
    """What LIKE does not copy for a column: its statistics target and options."""
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


def identity_statements(shape: TableShape, table: Statement, built_as: dict[str, str]) -> list[Statement]:
    """The identities of ``shape`` on ``table``, each with its sequence named by ``built_as``."""
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


def _policy_statements(shape: TableShape, table: Statement) -> list[Statement]:
    statements: list[Statement] = []
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


def trigger_statements(trigger: Trigger, table: Statement) -> list[Statement]:
    """``trigger`` created on ``table``, with its comment, and disabled."""
    trigger_name = name(trigger.name)
    statements = [
        statement(
            "CREATE {constraint}TRIGGER {trigger} {events} ON {table} {scope}{when} {call}",
            constraint=sql.SQL("CONSTRAINT " if trigger.constraint else ""),
            trigger=trigger_name,
            events=sql.SQL(trigger.events),
            table=table,
            scope=sql.SQL(trigger.scope),
            when=sql.SQL(f" WHEN ({trigger.condition})" if trigger.condition else ""),
            call=sql.SQL(trigger.call),
        ),
        trigger_state(trigger.name, table, "D"),
    ]
    if trigger.comment:
        statements.append(_comment("TRIGGER", trigger_name, trigger.comment, table))
    return statements


_STATES = {"O": "ENABLE", "D": "DISABLE", "R": "ENABLE REPLICA", "A": "ENABLE ALWAYS"}


def trigger_state(trigger: str, table: Statement, state: str) -> Statement:
    """Set the state of the trigger of this name on ``table`` and its partitions."""
    return statement(
        "ALTER TABLE {table} {state} TRIGGER {trigger}",
        table=table,
        state=sql.SQL(_STATES[state]),
        trigger=name(trigger),
    )


def enable_statements(shape: TableShape, table: Statement) -> list[Statement]:
    """In the swap: enable the application's triggers and row security as in ``shape``."""
    statements = [trigger_state(t.name, table, t.enabled) for t in shape.triggers if t.enabled != "D"]
    if shape.row_security:
        statements.append(statement("ALTER TABLE {table} ENABLE ROW LEVEL SECURITY", table=table))
    if shape.force_row_security:
        statements.append(statement("ALTER TABLE {table} FORCE ROW LEVEL SECURITY", table=table))
    return statements


def force_statements(shape: TableShape, table: Statement, *, off: bool = False) -> list[Statement]:
    """Force row security on the table's owner as before; ``off``: let the owner delete copies freely."""
    if not shape.force_row_security:
        return []
    change = sql.SQL("NO FORCE" if off else "FORCE")
    return [statement("ALTER TABLE {table} {change} ROW LEVEL SECURITY", table=table, change=change)]


def disable_statements(shape: TableShape, table: Statement) -> list[Statement]:
    """Disable triggers and rules of the plain ``table``, which is not in use, to move rows into it."""
    return [
        *(trigger_state(t.name, table, "D") for t in shape.triggers if t.enabled != "D"),
        *(_rule_state(r.name, table, "D") for r in shape.rules if r.enabled != "D"),
    ]


def restore_statements(shape: TableShape, table: Statement) -> list[Statement]:
    """Undo ``disable_statements``."""
    return [
        *(trigger_state(t.name, table, t.enabled) for t in shape.triggers if t.enabled != "D"),
        *(_rule_state(r.name, table, r.enabled) for r in shape.rules if r.enabled != "D"),
    ]


def _rule_state(rule: str, table: Statement, state: str) -> Statement:
    return statement(
        "ALTER TABLE {table} {state} RULE {rule}", table=table, state=sql.SQL(_STATES[state]), rule=name(rule)
    )


def rule_statements(shape: TableShape, table: Statement) -> list[Statement]:
    """In the swap: the rules, which use the table's name at that time."""
    statements: list[Statement] = []
    for rule in shape.rules:
        statements.append(sql.SQL(rule.definition.rstrip(";")))
        if rule.enabled != "O":
            statements.append(_rule_state(rule.name, table, rule.enabled))
        if rule.comment:
            statements.append(_comment("RULE", name(rule.name), rule.comment, table))
    return statements


def _roles(roles: Sequence[str | None]) -> Statement:
    return joined([name(role) if role else sql.SQL("PUBLIC") for role in roles])


def grant_statements(shape: TableShape, table: Statement) -> list[Statement]:
    """Exactly the old table's privileges, including the owner's, on ``table``."""
    return _grants(shape, "TABLE", table, shape.grants)


def _grants(shape: TableShape, kind: str, what: Statement, grants: tuple[Grant, ...]) -> list[Statement]:
    """``grants`` on ``what``, a new object, in place of those from default privileges."""
    grantees = shape.default_grantees.get(kind[0] if kind == "SEQUENCE" else "r", ())
    statements: list[Statement] = [
        statement(
            "REVOKE ALL ON {kind} {what} FROM {roles}",
            kind=sql.SQL(kind),
            what=what,
            roles=_roles(list(dict.fromkeys([shape.owner, *grantees]))),
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
    """Revoke what default privileges granted on ``table``, a new one: only its owner keeps privileges.

    Partitions are read and written through their parent, whose privileges and policies apply; a privilege on
    a partition itself would bypass the policies.
    """
    grantees = shape.default_grantees.get("r", ())
    if not grantees:
        return []
    return [
        statement("REVOKE ALL ON TABLE {table} FROM {roles}", table=table, roles=_roles(grantees)),
        statement("GRANT ALL ON TABLE {table} TO {owner}", table=table, owner=name(shape.owner)),
    ]


def state_grants(shape: TableShape) -> list[Statement]:
    """The state's table belongs to the operator, whose runs execute what it holds. The table's owner may read
    it, because the note functions run as the owner.
    """
    state = name(shape.schema, shape.spec.state)
    grantees = shape.default_grantees.get("r", ())
    return [
        *(
            [statement("REVOKE ALL ON TABLE {state} FROM {roles}", state=state, roles=_roles(grantees))]
            if grantees
            else []
        ),
        statement("GRANT SELECT ON TABLE {state} TO {owner}", state=state, owner=name(shape.owner)),
    ]


def revoke_execute(shape: TableShape, function: Statement, arguments: str = "") -> list[Statement]:
    """Revoke what default privileges granted on a new function."""
    roles = [role for role in shape.default_grantees.get("f", ()) if role != shape.owner]
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


def leaf_statements(shape: TableShape, period: Period, *, indexes: bool) -> list[Statement]:
    """A detached partition: with ``indexes``, ready to be attached; or bare, to be filled.

    A bare one has a CHECK that saves ATTACH a scan, and autovacuum is off for it.
    """
    spec = shape.spec
    leaf_name = spec.partition(period)
    leaf = name(spec.home, leaf_name)
    statements: list[Statement] = [
        *_ordinary_settings(),
        statement(
            "CREATE TABLE {leaf} (LIKE {new} INCLUDING ALL EXCLUDING IDENTITY{excluding}){tablespace}",
            leaf=leaf,
            new=name(spec.home, spec.new),
            excluding=sql.SQL("" if indexes else " EXCLUDING INDEXES"),
            tablespace=_tablespace(shape),
        ),
        *_leaf_settings(shape, leaf),
    ]
    if not indexes:
        statements += [
            statement(
                "ALTER TABLE {leaf} ADD CONSTRAINT {check} CHECK ({c} >= {lower} AND {c} < {upper})",
                leaf=leaf,
                check=name(bound_check(leaf_name)),
                c=shape.time_column,
                lower=shape.instant(period.start),
                upper=shape.instant(period.end),
            ),
            statement("ALTER TABLE {leaf} SET (autovacuum_enabled = off)", leaf=leaf),
        ]
    return statements


def _leaf_settings(shape: TableShape, leaf: Statement) -> list[Statement]:
    """What a partition does not inherit from its parent: owner, storage parameters, replica identity."""
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


def attach_statements(shape: TableShape, period: Period, *, checked: bool) -> list[Statement]:
    """Attach a partition to the new table; ``checked``: then drop its CHECK, which has done its work.

    SHARE UPDATE EXCLUSIVE on the partitioned table, ACCESS EXCLUSIVE on the partition.
    """
    spec = shape.spec
    leaf = name(spec.home, spec.partition(period))
    statements: list[Statement] = [
        statement(
            "ALTER TABLE {new} ATTACH PARTITION {leaf} {bounds}",
            new=name(spec.home, spec.new),
            leaf=leaf,
            bounds=bounds(shape, period),
        )
    ]
    if checked:
        check = name(bound_check(spec.partition(period)))
        statements.append(statement("ALTER TABLE {leaf} DROP CONSTRAINT {check}", leaf=leaf, check=check))
    return statements


def index_statements(shape: TableShape, leaf: Statement) -> list[Statement]:
    """Primary key and indexes of a filled partition."""
    return [
        *_ordinary_settings(),
        primary_key_statement(shape, leaf),
        *(index_statement(index, leaf) for index in secondary_indexes(shape)),
    ]


def statistics_statement(shape: TableShape, leaf: Statement) -> Statement:
    """Statistics of the indexed columns, so that queries on an attached partition are planned well at once.

    Those of the other columns, above all large documents, would cost as much as copying 100,000 rows; all are
    gathered later, from larger samples, when everything is in place.
    """
    indexed = {column for index in shape.indexes for column in index.columns} | set(shape.new_key)
    columns = [name(column.name) for column in shape.columns if column.name in indexed]
    return statement(
        "SET LOCAL default_statistics_target = 10; ANALYZE {leaf} ({columns})",
        leaf=leaf,
        columns=joined(columns),
    )


def final_statistics(conn: Connection, shape: TableShape, periods: Iterable[Period]) -> Statement:
    """Statistics of the table as a whole, which autovacuum never gathers, and of some ``periods``.

    The other partitions have some, and autovacuum will improve on them, unless it is off for the table; but
    only PostgreSQL 18 or later can leave them out in one statement.
    """
    spec = shape.spec
    table = name(spec.home, spec.name)
    if not can_analyze_only(conn) or own_autovacuum(shape):
        return statement("ANALYZE {table}", table=table)
    leaves = [name(spec.home, spec.partition(period)) for period in periods]
    return statement("ANALYZE ONLY {tables}", tables=joined([table, *leaves]))


def autovacuum_as_before_statements(shape: TableShape, periods: Iterable[Period]) -> list[Statement]:
    """Give the partitions the plain table's autovacuum setting again; SHARE UPDATE EXCLUSIVE."""
    change: Statement = sql.SQL("RESET (autovacuum_enabled)")
    if own_autovacuum(shape):
        # All of them, so that they also keep their order.
        options = joined([sql.SQL(option) for option in shape.options])
        change = statement("SET ({options})", options=options)
    return [
        statement("ALTER TABLE IF EXISTS {leaf} {change}", leaf=leaf, change=change)
        for leaf in (name(shape.spec.home, shape.spec.partition(period)) for period in periods)
    ]


def can_analyze_only(conn: Connection) -> bool:
    """Whether the server has ANALYZE ONLY, which leaves the partitions out."""
    return (conn.dialect.server_version_info or (0,)) >= (18,)


def own_autovacuum(shape: TableShape) -> bool:
    """Whether the table has a setting of its own for autovacuum, which may be off."""
    return any(option.startswith("autovacuum_enabled ") for option in shape.options)


# Halve before subtracting: the difference may exceed a bigint.
_CONTINUE_SEQUENCE = """
DO $do$
DECLARE
    ahead bigint;
    leap bigint;
BEGIN
    SELECT q.last_value + CASE WHEN q.is_called THEN s.seqincrement ELSE 0 END,
           CASE WHEN s.seqincrement > 0 THEN least({gap}, greatest(s.seqmax / 2 - q.last_value / 2 - 1, 0))
                ELSE greatest(-{gap}, least(s.seqmin / 2 - q.last_value / 2 + 1, 0)) END
    INTO ahead, leap
    FROM {sequence} q, pg_sequence s
    WHERE s.seqrelid = format('%I.%I', {sequence_schema}, {sequence_name})::regclass;
    EXECUTE format('ALTER TABLE %I.%I ALTER COLUMN %I RESTART WITH %s', {schema}, {new}, {column}, ahead);
    EXECUTE format('ALTER TABLE %I.%I ALTER COLUMN %I RESTART WITH %s', {schema}, {old}, {column},
                   ahead + leap);
END
$do$"""


def sequence_statements(shape: TableShape) -> list[Statement]:
    """Keep ids counting up, whichever of the two tables is dropped later, and by whom.

    A serial's sequence serves both tables and is owned by neither. An identity's cannot be shared: the new
    table's continues from the old one's value, and the old one's jumps ahead.
    """
    return [
        statement(
            _CONTINUE_SEQUENCE,
            sequence=name(sequence.schema, derived_name(sequence.name, "_old")),
            sequence_schema=sequence.schema,
            sequence_name=derived_name(sequence.name, "_old"),
            schema=shape.schema,
            new=shape.spec.name,
            old=shape.spec.old,
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


_CONTINUE_IDENTITY = """
DO $do$
DECLARE
    ahead bigint;
BEGIN
    EXECUTE format('SELECT q.last_value + CASE WHEN q.is_called THEN s.seqincrement ELSE 0 END'
                   ' FROM %s q, pg_sequence s WHERE s.seqrelid = %L::regclass',
                   pg_get_serial_sequence(format('%I.%I', {schema}, {one}), {column}),
                   pg_get_serial_sequence(format('%I.%I', {schema}, {one}), {column}))
    INTO ahead;
    EXECUTE format('ALTER TABLE %I.%I ALTER COLUMN %I RESTART WITH %s', {schema}, {other}, {column}, ahead);
END
$do$"""


def continue_identity(schema: str, one: str, other: str, column: str) -> Statement:
    """Let the identity of the table ``other`` continue from the value of that of ``one``."""
    return statement(_CONTINUE_IDENTITY, schema=schema, one=one, other=other, column=column)


def sequences_back_statements(spec: TableSpec, sequences: Iterable[OwnedSequence]) -> list[Statement]:
    """After the renames: the plain table's ids continue from the new one's, and it owns its sequences."""
    return [
        continue_identity(spec.home, spec.new, spec.name, sequence.column)
        if sequence.identity
        else statement(
            "ALTER SEQUENCE {sequence} OWNED BY {column}",
            sequence=name(sequence.schema, sequence.name),
            column=name(spec.home, spec.name, sequence.column),
        )
        for sequence in sequences
    ]


def rename(schema: str, kind: str, old: str, new: str) -> Statement:
    """ALTER TABLE or ALTER INDEX ... RENAME; renaming an index renames its constraint too."""
    return statement(
        "ALTER {kind} {old} RENAME TO {new}",
        kind=sql.SQL(kind),
        old=name(schema, old),
        new=name(new),
    )


# All partitions at once: each must match, or the difference is reported.
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
    ('a role other than the owner has privileges on it',
     NOT EXISTS (SELECT FROM aclexplode(c.relacl) x WHERE x.grantee <> c.relowner)),
    ('a trigger is missing or in another state',
     NOT EXISTS (SELECT FROM pg_trigger p LEFT JOIN pg_trigger t ON t.tgparentid = p.oid AND t.tgrelid = c.oid
                 WHERE p.tgrelid = i.inhparent AND NOT p.tgisinternal AND p.tgtype & 1 <> 0
                   AND t.tgenabled IS DISTINCT FROM p.tgenabled)),
    ('a column differs',
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
    """How the partitions of ``parent`` differ from the plain table, a line each."""
    rows = execute(conn, statement(_PARTITIONS, old=was.oid, new=parent)).all()
    return [row[0] for row in rows]
