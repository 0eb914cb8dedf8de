"""What the catalogs say about a table, and how two tables differ."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any

from psycopg2 import sql
from sqlalchemy.engine import Connection

from chronos.db import Statement, execute, joined, name, statement
from chronos.table import TableSpec, in_quotes, quoted


@dataclass(frozen=True)
class Column:
    """A live column; ``hashable``: its type has a hash operator class.

    ``statistics`` is the statistics target, None for the server's default; ``options`` are n_distinct and the
    like, as written in the brackets of SET.
    """

    name: str
    type: str
    not_null: bool
    identity: str
    generated: str
    hashable: bool
    default: str | None
    collation: str | None
    storage: str
    compression: str
    statistics: int | None
    options: str | None
    comment: str | None


@dataclass(frozen=True)
class Index:
    """An index: ``body`` is its definition from USING on, ``constraint`` that of the constraint it backs.

    Both include the tablespace if it is not the database's default. ``statistics`` lists the statistics
    targets of its expressions as (position, target).
    """

    name: str
    body: str
    primary: bool
    unique: bool
    constraint: str | None
    valid: bool
    columns: list[str]
    comment: str | None
    constraint_comment: str | None
    deferrable: bool
    clustered: bool
    partial: bool
    statistics: list[list[int]]


@dataclass(frozen=True)
class ForeignKey:
    """A foreign key of the table; ``definition`` is what follows ADD CONSTRAINT name.

    ``passive``: no write to the referenced table changes a row of this one.
    """

    name: str
    columns: list[str]
    definition: str
    schema: str
    table: str
    validated: bool
    passive: bool
    comment: str | None


@dataclass(frozen=True)
class Check:
    """A CHECK, or (from PostgreSQL 18 on) a named NOT NULL; ``definition`` is without NOT VALID."""

    name: str
    kind: str
    definition: str
    expression: str | None
    validated: bool
    inherited: bool
    comment: str | None


@dataclass(frozen=True)
class OwnedSequence:
    """A sequence owned by a column: serial or identity."""

    schema: str
    name: str
    column: str
    identity: bool


@dataclass(frozen=True)
class Grant:
    """Privileges on a table, a sequence, or one column, granted by one role to another (None: PUBLIC)."""

    privileges: list[str]
    column: str | None
    grantee: str | None
    grantable: bool
    grantor: str

    def __str__(self) -> str:
        """`SELECT, INSERT to app by owner`, for messages."""
        what = ", ".join(f"{p} ({in_quotes(self.column)})" if self.column else p for p in self.privileges)
        whom = quoted(self.grantee) if self.grantee else "PUBLIC"
        return f"{what} to {whom}{' with grant option' if self.grantable else ''} by {quoted(self.grantor)}"

    def apart(self) -> Iterator[Grant]:
        """The same grant, split by privilege."""
        return (replace(self, privileges=[privilege]) for privilege in self.privileges)


@dataclass(frozen=True)
class Identity:
    """The sequence behind an identity column; ``options`` is what follows SEQUENCE NAME name."""

    grants: tuple[Grant, ...]
    name: str
    column: str
    always: bool
    options: str
    comment: str | None


@dataclass(frozen=True)
class Trigger:
    """A user trigger, split so that it can be created on another table.

    ``CREATE TRIGGER name events ON table scope WHEN (condition) call``. ``enabled`` is the catalog's
    letter: O, D, R (replica) or A (always).
    """

    name: str
    constraint: bool
    events: str
    scope: str
    condition: str | None
    call: str
    enabled: str
    comment: str | None
    by_row: bool
    on_copy: bool
    transition_tables: bool

    @property
    def fires_on_copy(self) -> bool:
        """Whether moving a row between partitions fires it: row triggers for INSERT and DELETE do."""
        return self.by_row and self.on_copy


@dataclass(frozen=True)
class Policy:
    """A row security policy: ``definition`` is what follows CREATE POLICY name ON table."""

    name: str
    definition: str
    comment: str | None


@dataclass(frozen=True)
class Rule:
    """A rule of the table itself, as one statement that uses the table's current name."""

    name: str
    definition: str
    enabled: str
    comment: str | None


@dataclass(frozen=True)
class Statistics:
    """Extended statistics: ``kinds`` between brackets or nothing, then ON ``columns``."""

    name: str
    schema: str
    kinds: str
    columns: str
    owner: str
    target: int | None
    comment: str | None


_TIME_TYPES = (
    (re.compile(r"timestamp(\(\d\))? with time zone"), "timestamptz"),
    (re.compile(r"timestamp(\(\d\))? without time zone"), "timestamp"),
    (re.compile(r"date"), "date"),
)


@dataclass(frozen=True)
class TableShape:
    """A table as the catalogs describe it, read in one transaction; ``spec`` says what it is to chronos.

    ``default_grantees`` are the roles that default privileges of the current user give anything on each new
    table ("r"), sequence ("S") or function ("f"); None among them is PUBLIC.
    """

    spec: TableSpec
    oid: int
    schema: str
    name: str
    owner: str
    columns: tuple[Column, ...]
    indexes: tuple[Index, ...]
    foreign_keys: tuple[ForeignKey, ...]
    checks: tuple[Check, ...]
    sequences: tuple[OwnedSequence, ...]
    identities: tuple[Identity, ...]
    grants: tuple[Grant, ...]
    triggers: tuple[Trigger, ...]
    policies: tuple[Policy, ...]
    rules: tuple[Rule, ...]
    statistics: tuple[Statistics, ...]
    comment: str | None
    options: tuple[str, ...]
    row_security: bool
    force_row_security: bool
    replica_identity: str
    tablespace: str | None
    default_grantees: Mapping[str, tuple[str | None, ...]]

    def copied_columns(self) -> list[Statement]:
        """The columns that an INSERT may name: all except generated ones."""
        return [name(c.name) for c in self.columns if not c.generated]

    @property
    def columns_by_name(self) -> dict[str, Column]:
        """The columns by name."""
        return {column.name: column for column in self.columns}

    @property
    def time_type(self) -> str:
        """The time column's type: ``timestamptz``, ``timestamp`` or ``date``, of any precision.

        Empty when there is no such column or it has another type.
        """
        column = self.columns_by_name.get(self.spec.column)
        return next((kind for known, kind in _TIME_TYPES if column and known.fullmatch(column.type)), "")

    @property
    def time_zoned(self) -> bool:
        """Whether the time column has a time zone."""
        return self.time_type == "timestamptz"

    @property
    def time_column(self) -> sql.Identifier:
        """The time column, quoted."""
        return name(self.spec.column)

    @property
    def key_index(self) -> Index | None:
        """The index that identifies a row of the plain table: its primary key, or a unique one.

        It must cover every row: NOT NULL columns, not partial, no expressions, not deferrable.
        """
        required = {c.name for c in self.columns if c.not_null}
        unique = [
            i
            for i in self.indexes
            if i.primary
            or (
                i.unique and i.valid and not i.partial and not i.deferrable and required.issuperset(i.columns)
            )
        ]
        unique.sort(key=lambda i: (not i.primary, self.spec.column in i.columns, len(i.columns), i.name))
        return unique[0] if unique else None

    @property
    def old_key(self) -> tuple[str, ...]:
        """The columns of ``key_index``; empty when there is none."""
        return tuple(self.key_index.columns) if self.key_index else ()

    @property
    def key(self) -> tuple[str, ...]:
        """``old_key`` without the time column."""
        return tuple(c for c in self.old_key if c != self.spec.column)

    @property
    def new_key(self) -> tuple[str, ...]:
        """The columns that identify a row of the partitioned table: ``key`` and the time column; empty
        without ``key_index``.
        """
        return (*self.key, self.spec.column) if self.old_key else ()

    def instant(self, value: datetime) -> Statement:
        """``value`` as a literal of the time column's own type, the same instant in UTC."""
        value = value.astimezone(UTC)
        if self.time_type == "timestamptz":
            return sql.Literal(value)
        plain = value.replace(tzinfo=None)
        return sql.Literal(plain if self.time_type == "timestamp" else plain.date())


# A server may keep internal options of its own on a column (15.20 does), so take n_distinct only.
_COLUMNS = r"""
SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated,
       EXISTS (SELECT FROM pg_opclass o JOIN pg_am m ON m.oid = o.opcmethod
               JOIN pg_amproc p ON p.amprocfamily = o.opcfamily
                               AND p.amproclefttype = o.opcintype AND p.amprocnum = 2
               WHERE m.amname = 'hash' AND o.opcdefault
                 AND o.opcintype IN (b.base, CASE WHEN t.typtype = 'e' THEN 'anyenum'::regtype END)),
       pg_get_expr(d.adbin, d.adrelid),
       CASE WHEN a.attcollation <> t.typcollation THEN a.attcollation::regcollation::text END,
       a.attstorage::text, a.attcompression::text, NULLIF(a.attstattarget, -1),
       (SELECT string_agg(format('%I = %L', option_name, option_value), ', ' ORDER BY option_name)
        FROM pg_options_to_table(a.attoptions) WHERE option_name LIKE 'n\_distinct%'),
       col_description(a.attrelid, a.attnum)
FROM pg_attribute a
JOIN pg_type t ON t.oid = a.atttypid
LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
CROSS JOIN LATERAL (SELECT CASE WHEN t.typtype = 'd' THEN t.typbasetype
                                WHEN a.atttypid = 'varchar'::regtype THEN 'text'::regtype
                                ELSE a.atttypid END AS base) b
WHERE a.attrelid = {oid} AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attnum
"""

# The tablespace belongs before WHERE in an index, and before DEFERRABLE in a constraint.
_INDEXES = """
SELECT c.relname,
       d.head || coalesce(' TABLESPACE ' || quote_ident(s.spcname), '') || d.predicate,
       i.indisprimary, i.indisunique,
       regexp_replace(d.constraint, '( DEFERRABLE)?( INITIALLY DEFERRED)?$', '')
           || coalesce(' WITH (' || array_to_string(c.reloptions, ', ') || ')', '')
           || coalesce(' USING INDEX TABLESPACE ' || quote_ident(s.spcname), '')
           || substring(d.constraint FROM '(?: DEFERRABLE)?(?: INITIALLY DEFERRED)?$'),
       i.indisvalid,
       ARRAY(SELECT coalesce(a.attname, '') FROM unnest(i.indkey::int2[]) WITH ORDINALITY u(attnum, n)
             LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = u.attnum
             WHERE u.n <= i.indnkeyatts ORDER BY u.n)::text[],
       obj_description(c.oid, 'pg_class'), obj_description(k.oid, 'pg_constraint'),
       coalesce(k.condeferrable, false), i.indisclustered, i.indpred IS NOT NULL,
       (SELECT coalesce(jsonb_agg(jsonb_build_array(attnum, attstattarget) ORDER BY attnum), '[]')
        FROM pg_attribute WHERE attrelid = c.oid AND attstattarget >= 0)
FROM pg_index i
JOIN pg_class c ON c.oid = i.indexrelid
JOIN pg_class t ON t.oid = i.indrelid
JOIN pg_namespace n ON n.oid = t.relnamespace
LEFT JOIN pg_tablespace s ON s.oid = c.reltablespace
LEFT JOIN pg_constraint k ON k.conindid = c.oid AND k.conrelid = i.indrelid AND k.contype IN ('p', 'u', 'x')
CROSS JOIN LATERAL (
    SELECT substr(pg_get_indexdef(c.oid), 2 + length(format('CREATE %sINDEX %I ON %s%I.%I',
               CASE WHEN i.indisunique THEN 'UNIQUE ' END, c.relname,
               CASE WHEN t.relkind = 'p' THEN 'ONLY ' END, n.nspname, t.relname))) AS whole,
           coalesce(' WHERE ' || pg_get_expr(i.indpred, i.indrelid), '') AS predicate,
           pg_get_constraintdef(k.oid) AS constraint) w
CROSS JOIN LATERAL (
    SELECT left(w.whole, length(w.whole) - length(w.predicate)) AS head, w.predicate, w.constraint) d
WHERE i.indrelid = {oid}
ORDER BY NOT i.indisprimary, c.relname
"""

_FOREIGN_KEYS = """
SELECT k.conname,
       ARRAY(SELECT a.attname FROM unnest(k.conkey) WITH ORDINALITY AS u (attnum, n)
             JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.attnum ORDER BY u.n)::text[],
       pg_get_constraintdef(k.oid), n.nspname, c.relname, k.convalidated,
       k.confupdtype IN ('a', 'r') AND k.confdeltype IN ('a', 'r'),
       obj_description(k.oid, 'pg_constraint')
FROM pg_constraint k
JOIN pg_class c ON c.oid = k.confrelid
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE k.conrelid = {oid} AND k.contype = 'f'
ORDER BY k.conname
"""

_SEQUENCES = """
SELECT n.nspname, c.relname, a.attname, d.deptype = 'i'
FROM pg_depend d
JOIN pg_class c ON c.oid = d.objid AND c.relkind = 'S'
JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass
  AND d.refobjid = {oid} AND d.deptype IN ('a', 'i')
ORDER BY c.relname
"""

_CHECKS = """
SELECT k.conname, k.contype::text, regexp_replace(pg_get_constraintdef(k.oid), ' NOT VALID$', ''),
       pg_get_expr(k.conbin, k.conrelid), k.convalidated, NOT k.connoinherit,
       obj_description(k.oid, 'pg_constraint')
FROM pg_constraint k
WHERE k.conrelid = {oid} AND k.contype IN ('c', 'n')
ORDER BY k.conname
"""

_IDENTITIES = """
SELECT c.oid::bigint, c.relname, a.attname, a.attidentity = 'a',
       format('START WITH %s INCREMENT BY %s MINVALUE %s MAXVALUE %s CACHE %s%s', q.seqstart,
              q.seqincrement, q.seqmin, q.seqmax, q.seqcache, CASE WHEN q.seqcycle THEN ' CYCLE' END),
       obj_description(c.oid, 'pg_class')
FROM pg_depend d
JOIN pg_class c ON c.oid = d.objid
JOIN pg_sequence q ON q.seqrelid = c.oid
JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass
  AND d.refobjid = {oid} AND d.deptype = 'i'
ORDER BY a.attnum
"""

# In the order of the grants: a role must have a privilege before it can grant it.
_GRANTS = """
SELECT array_agg(x.privilege_type ORDER BY x.n), g.column_name,
       CASE WHEN x.grantee <> 0 THEN pg_get_userbyid(x.grantee) END, x.is_grantable,
       pg_get_userbyid(x.grantor)
FROM (SELECT 0, NULL::text,
             coalesce(relacl, acldefault((CASE relkind WHEN 'S' THEN 's' ELSE 'r' END)::"char", relowner))
      FROM pg_class WHERE oid = {oid}
      UNION ALL
      SELECT attnum, attname::text, attacl FROM pg_attribute
      WHERE attrelid = {oid} AND attnum > 0 AND NOT attisdropped AND attacl IS NOT NULL
     ) g (attnum, column_name, acl)
CROSS JOIN LATERAL aclexplode(g.acl) WITH ORDINALITY x (grantor, grantee, privilege_type, is_grantable, n)
GROUP BY g.attnum, g.column_name, x.grantee, x.is_grantable, x.grantor
ORDER BY g.attnum, min(x.n)
"""

_TRIGGERS = """
SELECT t.tgname, t.tgconstraint <> 0,
       substr(pg_get_triggerdef(t.oid), 2 + length(format('CREATE %sTRIGGER %I',
           CASE WHEN t.tgconstraint <> 0 THEN 'CONSTRAINT ' END, t.tgname))),
       format(' ON %I.%I ', n.nspname, c.relname), t.tgqual IS NOT NULL, t.tgenabled::text,
       obj_description(t.oid, 'pg_trigger'), t.tgtype & 1 <> 0, t.tgtype & 12 <> 0,
       t.tgoldtable IS NOT NULL OR t.tgnewtable IS NOT NULL
FROM pg_trigger t
JOIN pg_class c ON c.oid = t.tgrelid
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE t.tgrelid = {oid} AND NOT t.tgisinternal AND t.tgname::text NOT IN ({change_triggers})
ORDER BY t.tgname
"""

_POLICIES = """
SELECT p.polname,
       format('AS %s FOR %s TO %s%s%s',
              CASE WHEN p.polpermissive THEN 'PERMISSIVE' ELSE 'RESTRICTIVE' END,
              CASE p.polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE'
                            WHEN 'd' THEN 'DELETE' ELSE 'ALL' END,
              (SELECT string_agg(CASE r WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(r)) END, ', '
                                 ORDER BY n) FROM unnest(p.polroles) WITH ORDINALITY u (r, n)),
              ' USING (' || pg_get_expr(p.polqual, p.polrelid) || ')',
              ' WITH CHECK (' || pg_get_expr(p.polwithcheck, p.polrelid) || ')'),
       obj_description(p.oid, 'pg_policy')
FROM pg_policy p
WHERE p.polrelid = {oid}
ORDER BY p.polname
"""

_RULES = """
SELECT rulename, pg_get_ruledef(oid), ev_enabled::text, obj_description(oid, 'pg_rewrite')
FROM pg_rewrite
WHERE ev_class = {oid}
ORDER BY rulename
"""

_STATISTICS = r"""
SELECT s.stxname, n.nspname,
       coalesce(substring(substr(pg_get_statisticsobjdef(s.oid), 1 + length(format(
           'CREATE STATISTICS %I.%I ', n.nspname, s.stxname))) FROM '^\([a-z, ]+\) '), ''),
       pg_get_statisticsobjdef_columns(s.oid), pg_get_userbyid(s.stxowner),
       NULLIF(s.stxstattarget, -1), obj_description(s.oid, 'pg_statistic_ext')
FROM pg_statistic_ext s
JOIN pg_namespace n ON n.oid = s.stxnamespace
WHERE s.stxrelid = {oid}
ORDER BY s.stxname
"""

_DEFAULT_GRANTEES = """
SELECT a.defaclobjtype::text,
       array_agg(DISTINCT CASE WHEN x.grantee <> 0 THEN pg_get_userbyid(x.grantee) END)
FROM pg_default_acl a CROSS JOIN LATERAL aclexplode(a.defaclacl) x
WHERE a.defaclrole = current_user::regrole AND a.defaclobjtype IN ('r', 'S', 'f')
  AND x.grantee <> a.defaclrole
  AND (a.defaclnamespace = 0 OR a.defaclnamespace = quote_ident({schema})::regnamespace)
GROUP BY 1
"""

_TABLE = """
SELECT c.oid::bigint, pg_get_userbyid(c.relowner), obj_description(c.oid, 'pg_class'),
       ARRAY(SELECT format('%I = %L', option_name, option_value)
             FROM pg_options_to_table(c.reloptions)
             UNION ALL
             SELECT format('toast.%I = %L', o.option_name, o.option_value)
             FROM pg_class t, pg_options_to_table(t.reloptions) o WHERE t.oid = c.reltoastrelid),
       c.relrowsecurity, c.relforcerowsecurity, c.relreplident::text, s.spcname
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_tablespace s ON s.oid = c.reltablespace
WHERE n.nspname = {schema} AND c.relname = {table}
"""


def read(conn: Connection, spec: TableSpec, table: str) -> TableShape:
    """The shape of ``table``, which exists in the schema of ``spec``; only catalog locks."""
    schema = spec.home
    oid, owner, comment, options, row_security, forced, replica_identity, tablespace = execute(
        conn, statement(_TABLE, schema=schema, table=table)
    ).one()

    change_triggers = joined([sql.Literal(trigger) for trigger in spec.note_triggers])

    def rows(query: str, of: int = oid) -> list[Any]:
        return list(execute(conn, statement(query, oid=of, change_triggers=change_triggers)).all())

    def grants(of: int) -> tuple[Grant, ...]:
        return tuple(Grant(*row) for row in rows(_GRANTS, of))

    columns = tuple(Column(*row) for row in rows(_COLUMNS))
    return TableShape(
        spec=spec,
        oid=oid,
        schema=schema,
        name=table,
        owner=owner,
        columns=columns,
        indexes=tuple(Index(*row) for row in rows(_INDEXES)),
        foreign_keys=tuple(ForeignKey(*row) for row in rows(_FOREIGN_KEYS)),
        checks=tuple(Check(*row) for row in rows(_CHECKS)),
        sequences=tuple(OwnedSequence(*row) for row in rows(_SEQUENCES)),
        identities=tuple(Identity(grants(row[0]), *row[1:]) for row in rows(_IDENTITIES)),
        grants=grants(oid),
        triggers=tuple(_trigger(*row) for row in rows(_TRIGGERS)),
        policies=tuple(Policy(*row) for row in rows(_POLICIES)),
        rules=tuple(Rule(*row) for row in rows(_RULES)),
        statistics=tuple(Statistics(*row) for row in rows(_STATISTICS)),
        comment=comment,
        options=tuple(options),
        row_security=row_security,
        force_row_security=forced,
        replica_identity=replica_identity,
        tablespace=tablespace,
        default_grantees={
            kind: tuple(roles)
            for kind, roles in execute(conn, statement(_DEFAULT_GRANTEES, schema=schema)).all()
        },
    )


def _trigger(
    trigger: str,
    constraint: bool,
    definition: str,
    on_table: str,
    conditional: bool,
    enabled: str,
    comment: str | None,
    by_row: bool,
    on_copy: bool,
    transition_tables: bool,
) -> Trigger:
    """A trigger from the server's definition of it, split into parts."""
    events, _, rest = definition.partition(on_table)
    condition: str | None = None
    if conditional:
        parts = re.fullmatch(
            r"(.*?FOR EACH (?:ROW|STATEMENT)) WHEN \((.*)\) (EXECUTE FUNCTION .*)", rest, re.DOTALL
        )
        assert parts is not None
        scope, condition, call = parts.groups()
    else:
        scope, _, call = rest.partition(" EXECUTE FUNCTION ")
        call = f"EXECUTE FUNCTION {call}"
    return Trigger(
        name=trigger,
        constraint=constraint,
        events=events,
        scope=scope,
        condition=condition,
        call=call,
        enabled=enabled,
        comment=comment,
        by_row=by_row,
        on_copy=on_copy,
        transition_tables=transition_tables,
    )


_ANNOUNCED = ("options", "sequences", "row_security", "force_row_security")


def differences(
    was: TableShape, now: TableShape, names: Iterable[tuple[str, str]] = (), *, announced: bool = False
) -> list[str]:
    """The differences between ``was`` and ``now``, a line each; none when only the oid differs.

    ``names`` are pairs (name in ``now``, name in ``was``) of names that have yet to change. ``announced``
    leaves out the inherent differences of a partitioned table, which the plan shows: the time column in the
    primary key and NOT NULL, no storage parameters of its own, validated checks, no own sequence except an
    identity's; and what the swap enables: triggers, row security.
    """
    renamed = dict(names)
    found: list[str] = []
    for field in fields(TableShape):
        what = field.name.replace("_", " ")
        if field.name in ("spec", "oid", "schema", "name", "default_grantees"):
            continue
        if announced and field.name in _ANNOUNCED:
            continue
        one, other = getattr(was, field.name), getattr(now, field.name)
        if field.name == "grants":
            before, after = (
                {str(part) for grant in grants for part in grant.apart()} for grants in (one, other)
            )
            found += [f"grants: {grant} is missing" for grant in sorted(before - after)]
            found += [f"grants: {grant} is new" for grant in sorted(after - before)]
            continue
        if not isinstance(one, tuple) or field.name == "options":
            if one != other:
                found.append(f"{what}: {_shown(one)} became {_shown(other)}")
            continue
        befores = {part.name: _comparable(part, was, announced) for part in one}
        afters = {
            key: _comparable(replace(part, name=key), was, announced)
            for part in other
            for key in (renamed.get(part.name, part.name),)
        }
        found += [f"{what}: {key} is missing" for key in befores.keys() - afters.keys()]
        found += [
            f"{what}: {key} is new"
            for key in afters.keys() - befores.keys()
            if not (announced and _comes_with_the_key(afters[key], was.spec))
        ]
        for key in befores.keys() & afters.keys():
            found += [
                f"{what}: {part.name} of {key}: {_shown(before)} became {_shown(after)}"
                for part in fields(befores[key])
                if (before := getattr(befores[key], part.name)) != (after := getattr(afters[key], part.name))
            ]
        in_both = [key for key in befores if key in afters]
        if in_both != [key for key in afters if key in befores] and field.name == "columns":
            found.append("the columns are in another order")
    return sorted(found)


def _comparable(part: Any, was: TableShape, announced: bool) -> Any:
    """``part``, under the name that it has in ``was``, without announced differences."""
    if not announced:
        return part
    if isinstance(part, Column) and part.name == was.spec.column:
        return replace(part, not_null=True)
    if isinstance(part, Check):
        return replace(part, validated=True)
    if isinstance(part, Trigger):
        return replace(part, enabled="")
    if isinstance(part, Index):
        part = replace(part, clustered=False, statistics=[])
        if was.key_index and part.name == was.key_index.name:
            return replace(part, body="", constraint="", columns=[], primary=True)
    return part


def _comes_with_the_key(part: Any, spec: TableSpec) -> bool:
    """Whether it comes with the primary key that includes the time column."""
    if isinstance(part, Index):
        return part.primary
    if not isinstance(part, Check) or part.kind != "n":
        return False
    column = part.definition.strip().removeprefix("NOT NULL ")
    return column in (spec.column, '"' + spec.column.replace('"', '""') + '"')


def _shown(value: object) -> str:
    return "nothing" if value is None or value in ((), "", []) else str(value)
