"""What PostgreSQL knows of the plain table, and the statements that give the same to the partitioned one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from psycopg2 import sql
from sqlalchemy.engine import Connection

from chronos.db import Statement, execute, joined, name, statement

_NAME_BYTES = 63


def derived_name(base: str, suffix: str) -> str:
    """``base`` + ``suffix`` within PostgreSQL's 63 bytes; a shortened base keeps a hash, to stay unique."""
    whole = base + suffix
    if len(whole.encode()) <= _NAME_BYTES:
        return whole
    tag = "_" + hashlib.sha256(base.encode()).hexdigest()[:8] + suffix
    kept = base.encode()[: _NAME_BYTES - len(tag.encode())].decode(errors="ignore")
    return kept + tag


@dataclass(frozen=True)
class Column:
    """A live column; ``hashable`` tells whether its type can be compared by hash as it is."""

    name: str
    type: str
    not_null: bool
    identity: str
    generated: str
    hashable: bool


@dataclass(frozen=True)
class Index:
    """An index: ``body`` is its definition from USING on, ``constraint`` that of the constraint it backs."""

    name: str
    body: str
    primary: bool
    unique: bool
    constraint: str | None
    valid: bool
    columns: list[str]
    comment: str | None


@dataclass(frozen=True)
class ForeignKey:
    """A foreign key of the table; ``definition`` is what follows ADD CONSTRAINT name."""

    name: str
    definition: str
    schema: str
    table: str
    validated: bool
    passive: bool
    comment: str | None


@dataclass(frozen=True)
class OwnedSequence:
    """A sequence that lives and dies with a column: serial, or identity."""

    schema: str
    name: str
    column: str
    identity: bool


@dataclass(frozen=True)
class Grant:
    """One privilege on the table, or on one column of it."""

    privilege: str
    column: str | None
    grantee: str | None
    grantable: bool


@dataclass(frozen=True)
class TableShape:
    """The plain table as it stands, read from the catalogs in one transaction."""

    oid: int
    schema: str
    name: str
    owner: str
    time_zoned: bool
    columns: tuple[Column, ...]
    indexes: tuple[Index, ...]
    foreign_keys: tuple[ForeignKey, ...]
    sequences: tuple[OwnedSequence, ...]
    grants: tuple[Grant, ...]
    comment: str | None
    options: tuple[str, ...]

    def copied_columns(self) -> list[Statement]:
        """The columns that an INSERT may name: all but the generated ones."""
        return [name(c.name) for c in self.columns if not c.generated]

    def instant(self, value: datetime) -> Statement:
        """``value`` as a literal of the timestamp column's own type, the same instant in UTC."""
        value = value.astimezone(UTC)
        return sql.Literal(value if self.time_zoned else value.replace(tzinfo=None))

    def content_hash(self, alias: str) -> Statement:
        """An order-free 64-bit hash of the rows of ``alias``, equal where the rows are equal."""
        fields = [
            statement("{a}.{c}" if c.hashable else "{a}.{c}::text", a=name(alias), c=name(c.name))
            for c in self.columns
        ]
        return statement(
            "coalesce(bit_xor(hash_record_extended(ROW({fields}), 0)), 0)", fields=joined(fields)
        )


_COLUMNS = """
SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated,
       EXISTS (SELECT FROM pg_opclass o JOIN pg_am m ON m.oid = o.opcmethod
               JOIN pg_amproc p ON p.amprocfamily = o.opcfamily
                               AND p.amproclefttype = o.opcintype AND p.amprocnum = 2
               WHERE m.amname = 'hash' AND o.opcdefault
                 AND o.opcintype IN (b.base, CASE WHEN t.typtype = 'e' THEN 'anyenum'::regtype END))
FROM pg_attribute a
JOIN pg_type t ON t.oid = a.atttypid
CROSS JOIN LATERAL (SELECT CASE WHEN t.typtype = 'd' THEN t.typbasetype
                                WHEN a.atttypid = 'varchar'::regtype THEN 'text'::regtype
                                ELSE a.atttypid END AS base) b
WHERE a.attrelid = {oid} AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attnum
"""

_INDEXES = """
SELECT c.relname,
       substr(pg_get_indexdef(c.oid), 2 + length(format('CREATE %sINDEX %I ON %s%I.%I',
           CASE WHEN i.indisunique THEN 'UNIQUE ' END, c.relname,
           CASE WHEN t.relkind = 'p' THEN 'ONLY ' END, n.nspname, t.relname))),
       i.indisprimary, i.indisunique, pg_get_constraintdef(k.oid), i.indisvalid,
       ARRAY(SELECT coalesce(a.attname, '') FROM unnest(i.indkey::int2[]) WITH ORDINALITY u(attnum, n)
             LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = u.attnum
             WHERE u.n <= i.indnkeyatts ORDER BY u.n)::text[],
       obj_description(c.oid, 'pg_class')
FROM pg_index i
JOIN pg_class c ON c.oid = i.indexrelid
JOIN pg_class t ON t.oid = i.indrelid
JOIN pg_namespace n ON n.oid = t.relnamespace
LEFT JOIN pg_constraint k ON k.conindid = c.oid AND k.conrelid = i.indrelid AND k.contype IN ('p', 'u', 'x')
WHERE i.indrelid = {oid}
ORDER BY NOT i.indisprimary, c.relname
"""

_FOREIGN_KEYS = """
SELECT k.conname, pg_get_constraintdef(k.oid), n.nspname, c.relname, k.convalidated,
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

_GRANTS = """
SELECT x.privilege_type, g.column_name,
       CASE WHEN x.grantee <> 0 THEN pg_get_userbyid(x.grantee) END, x.is_grantable
FROM (SELECT NULL::text AS column_name, coalesce(relacl, acldefault('r', relowner)) AS acl
      FROM pg_class WHERE oid = {oid}
      UNION ALL
      SELECT attname::text, attacl FROM pg_attribute
      WHERE attrelid = {oid} AND attnum > 0 AND NOT attisdropped AND attacl IS NOT NULL) g
CROSS JOIN LATERAL aclexplode(g.acl) x
ORDER BY g.column_name NULLS FIRST, x.grantee, x.privilege_type
"""


def read(conn: Connection, schema: str, table: str) -> TableShape:
    """The shape of ``schema.table``, a table that exists; no lock beyond the catalog's own."""
    oid, owner, comment, options = execute(
        conn,
        statement(
            "SELECT c.oid, pg_get_userbyid(c.relowner), obj_description(c.oid, 'pg_class'),"
            " ARRAY(SELECT format('%I = %L', option_name, option_value)"
            "       FROM pg_options_to_table(c.reloptions)"
            "       UNION ALL"
            "       SELECT format('toast.%I = %L', o.option_name, o.option_value)"
            "       FROM pg_class t, pg_options_to_table(t.reloptions) o WHERE t.oid = c.reltoastrelid)"
            " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname = {schema} AND c.relname = {table}",
            schema=schema,
            table=table,
        ),
    ).one()

    def rows(query: str) -> list[Any]:
        return list(execute(conn, statement(query, oid=oid)).all())

    columns = tuple(Column(*row) for row in rows(_COLUMNS))
    return TableShape(
        oid=oid,
        schema=schema,
        name=table,
        owner=owner,
        time_zoned=any(c.name == "timestamp" and "with time zone" in c.type for c in columns),
        columns=columns,
        indexes=tuple(Index(*row) for row in rows(_INDEXES)),
        foreign_keys=tuple(ForeignKey(*row) for row in rows(_FOREIGN_KEYS)),
        sequences=tuple(OwnedSequence(*row) for row in rows(_SEQUENCES)),
        grants=tuple(Grant(*row) for row in rows(_GRANTS)),
        comment=comment,
        options=tuple(options),
    )
