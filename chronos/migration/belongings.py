"""What hangs on the table: what of it cannot come along, by name, and what to type about it."""

from __future__ import annotations

import re
from datetime import datetime

from psycopg2 import sql
from sqlalchemy.engine import Connection

from chronos.db import execute, name, statement
from chronos.migration.followers import followers
from chronos.migration.table_shape import Index, TableShape
from chronos.partitions import TABLE


def columns_and_keys(shape: TableShape) -> list[str]:
    """What the columns, indexes and foreign keys lack for a table in daily partitions, by name."""
    blockers = []
    types = {column.name: column.type for column in shape.columns}
    if types.get("id") not in ("smallint", "integer", "bigint"):
        blockers.append(f"{TABLE} needs a column id of an integer type")
    if not types.get("timestamp", "").startswith("timestamp"):
        blockers.append(f"{TABLE} needs a column timestamp of type timestamp or timestamptz")
    if blockers:
        return blockers
    valid = [index for index in shape.indexes if index.valid]
    for column, why in (("timestamp", "takes the batches"), ("id", "finds the highest id")):
        if not any(i.columns[0] == column and _finds_rows(i) for i in valid):
            blockers.append(
                f"no index begins with {column}, by which the migration {why};"
                f' CREATE INDEX CONCURRENTLY ON {shape.schema}.{TABLE} ("{column}")'
            )
    for index in shape.indexes:
        blockers += _index_blockers(index)
    for foreign in shape.foreign_keys:
        if foreign.definition.endswith("NOT ENFORCED"):
            blockers.append(f"the foreign key {foreign.name} is NOT ENFORCED; drop it, or have it enforced")
        elif not foreign.validated:
            blockers.append(
                f"the foreign key {foreign.name} is not validated;"
                f' ALTER TABLE {shape.schema}.{TABLE} VALIDATE CONSTRAINT "{foreign.name}"'
            )
    return blockers


def _finds_rows(index: Index) -> bool:
    """Whether rows can be fetched by it in order, whichever they are."""
    return index.body.startswith("USING btree") and " WHERE " not in index.body


def _index_blockers(index: Index) -> list[str]:
    blockers = []
    key = set(index.columns)
    if index.primary and key not in ({"id"}, {"id", "timestamp"}):
        blockers.append(f"the primary key {index.name} is neither (id) nor (id, timestamp)")
    elif index.primary and index.deferrable:
        blockers.append(
            f"the primary key {index.name} is deferrable, and rows could not be copied beside the"
            " application's; make it NOT DEFERRABLE"
        )
    elif not index.primary and index.unique and "timestamp" not in key:
        blockers.append(
            f"the unique index {index.name} does not hold the timestamp,"
            " and a partitioned table cannot keep it; drop it, or make it not unique"
        )
    if not index.valid:
        blockers.append(f"index {index.name} is invalid; drop it or REINDEX it")
    if index.constraint and index.constraint.startswith("EXCLUDE"):
        blockers.append(f"the exclusion constraint of {index.name} cannot be partitioned")
    return blockers


# What hangs on the table and cannot come along. Each row is a sentence to print.
_REFUSED = """
SELECT format('table %s has a foreign key (%s) to webhook_log, whose id alone will not be unique;'
              ' drop it first', conrelid::regclass, conname)
FROM pg_constraint WHERE confrelid = {oid} AND contype = 'f' AND conrelid <> {oid} AND conparentid = 0
UNION ALL
SELECT format('the foreign key %s of webhook_log refers to webhook_log itself; drop it first', conname)
FROM pg_constraint WHERE confrelid = {oid} AND contype = 'f' AND conrelid = {oid}
UNION ALL
SELECT DISTINCT format('materialized view %s reads webhook_log and would go on reading the old table;'
              ' drop it, and create it again after the migration', c.oid::regclass)
FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid JOIN pg_class c ON c.oid = r.ev_class
WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass
  AND d.refobjid = {oid} AND c.relkind = 'm'
UNION ALL
SELECT DISTINCT format('%s groups by the primary key of webhook_log alone, which will be (id, timestamp);'
              ' let it group by each column that it shows',
              pg_describe_object('pg_class'::regclass, r.ev_class, 0))
FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid
JOIN pg_constraint k ON k.oid = d.refobjid AND k.conrelid = {oid}
WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_constraint'::regclass
UNION ALL
SELECT DISTINCT format('%s uses the row type of webhook_log, which would stay with the old table; drop it,'
              ' and create it again after the migration', pg_describe_object(d.classid, d.objid, d.objsubid))
FROM pg_depend d JOIN pg_type t ON t.typrelid = {oid}
WHERE d.refclassid = 'pg_type'::regclass AND d.refobjid IN (t.oid, t.typarray) AND d.deptype <> 'i'
UNION ALL
SELECT format('subscription %s writes into webhook_log, and would not find the new table;'
              ' drop the subscription first', s.subname)
FROM pg_subscription_rel r JOIN pg_subscription s ON s.oid = r.srsubid WHERE r.srrelid = {oid}
UNION ALL
SELECT format('trigger %s has transition tables for each row, which partitions do not know;'
              ' make it a statement trigger, or drop it', tgname)
FROM pg_trigger
WHERE tgrelid = {oid} AND NOT tgisinternal AND tgtype & 1 <> 0
  AND (tgoldtable IS NOT NULL OR tgnewtable IS NOT NULL)
UNION ALL
SELECT format('publication %s publishes some columns or rows of webhook_log, which for a partitioned table it'
              ' can only do through the root; ALTER PUBLICATION %I SET (publish_via_partition_root = true)',
              p.pubname, p.pubname)
FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
WHERE r.prrelid = {oid} AND NOT p.pubviaroot AND (r.prattrs IS NOT NULL OR r.prqual IS NOT NULL)
UNION ALL
SELECT format('replication slot %s may be sending publication %s, which has webhook_log in it, to a'
              ' subscriber: copied rows would reach it a second time; take the table out of the'
              ' publication (or drop the slot), and put it back, with the subscriber refreshed, after the'
              ' migration', s.slot_name, p.pubname)
FROM pg_publication_tables p, pg_replication_slots s
WHERE p.schemaname = {schema} AND p.tablename = {table}
  AND s.slot_type = 'logical' AND s.plugin = 'pgoutput' AND s.database = current_database()
UNION ALL
SELECT 'the replica identity of webhook_log is an index of its own, which partitions do not share;'
       ' ALTER TABLE webhook_log REPLICA IDENTITY FULL, or DEFAULT to use the primary key'
FROM pg_class WHERE oid = {oid} AND relreplident = 'i'
UNION ALL
SELECT format('webhook_log is a table of the composite type %s; ALTER TABLE webhook_log NOT OF first',
              reloftype::regtype)
FROM pg_class WHERE oid = {oid} AND reloftype <> 0
UNION ALL
SELECT format('webhook_log is kept by the access method %s; only heap is known', a.amname)
FROM pg_class c JOIN pg_am a ON a.oid = c.relam WHERE c.oid = {oid} AND a.amname <> 'heap'
UNION ALL
SELECT format('%s belongs to or depends on an extension; ALTER EXTENSION ... DROP, or NO DEPENDS ON EXTENSION'
              ' first', pg_describe_object(d.classid, d.objid, 0))
FROM pg_depend d
WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype IN ('e', 'x')
  AND (d.classid = 'pg_class'::regclass
       AND d.objid IN (SELECT {oid}::oid UNION SELECT indexrelid FROM pg_index WHERE indrelid = {oid})
       OR d.classid = 'pg_trigger'::regclass
          AND d.objid IN (SELECT oid FROM pg_trigger WHERE tgrelid = {oid}))
UNION ALL
SELECT format('%s bears a security label (%s); take it off first',
              pg_describe_object(classoid, objoid, objsubid), provider)
FROM pg_seclabel WHERE classoid = 'pg_class'::regclass AND objoid = {oid}
UNION ALL
SELECT format('extended statistics %s stand in another schema; ALTER STATISTICS %s SET SCHEMA %I',
              s.stxname, s.stxnamespace::regnamespace || '.' || quote_ident(s.stxname), {schema})
FROM pg_statistic_ext s JOIN pg_class c ON c.oid = s.stxrelid
WHERE s.stxrelid = {oid} AND s.stxnamespace <> c.relnamespace
UNION ALL
SELECT format('role %s may not call %s, the function of a trigger; GRANT EXECUTE ON FUNCTION %s TO %I',
              current_user, t.tgfoid::regprocedure, t.tgfoid::regprocedure, current_user)
FROM pg_trigger t
WHERE t.tgrelid = {oid} AND NOT t.tgisinternal AND NOT has_function_privilege(t.tgfoid, 'EXECUTE')
UNION ALL
SELECT format('role %s is bound by row security (it is forced on webhook_log) and would not see every row;'
              ' connect as a superuser, or ALTER ROLE %I BYPASSRLS', current_user, current_user)
FROM pg_class c, pg_roles r
WHERE c.oid = {oid} AND c.relrowsecurity AND c.relforcerowsecurity
  AND r.rolname = current_user AND NOT r.rolsuper AND NOT r.rolbypassrls
UNION ALL
SELECT DISTINCT format('%s depends on webhook_log in a way that the migration does not know; drop it first',
                       pg_describe_object(d.classid, d.objid, d.objsubid))
FROM pg_depend d
WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = {oid}
  AND d.classid NOT IN ('pg_rewrite'::regclass, 'pg_policy'::regclass, 'pg_constraint'::regclass,
                        'pg_publication_rel'::regclass, 'pg_statistic_ext'::regclass, 'pg_type'::regclass)
  AND NOT (d.classid = 'pg_attrdef'::regclass
           AND EXISTS (SELECT FROM pg_attrdef WHERE oid = d.objid AND adrelid = {oid}))
  AND NOT (d.classid = 'pg_trigger'::regclass
           AND EXISTS (SELECT FROM pg_trigger WHERE oid = d.objid AND tgrelid = {oid}))
  AND NOT (d.classid = 'pg_proc'::regclass
           AND EXISTS (SELECT FROM pg_proc WHERE oid = d.objid AND prosqlbody IS NOT NULL))
  AND NOT (d.classid = 'pg_class'::regclass
           AND EXISTS (SELECT FROM pg_class WHERE oid = d.objid AND relkind IN ('i', 'S', 't')))
"""


def belongings(conn: Connection, shape: TableShape, cutoff: datetime) -> list[str]:
    """What hangs on the table and cannot come along, or that this role cannot take along."""
    query = statement(_REFUSED, oid=shape.oid, schema=shape.schema, table=TABLE)
    blockers = [row[0] for row in execute(conn, query).all()]
    for check in shape.checks:
        kind = "check" if check.kind == "c" else "NOT NULL"
        if not check.inherited:
            blockers.append(
                f"the {kind} constraint {check.name} is NO INHERIT, which a partitioned table cannot have;"
                " drop it, and add it again without"
            )
        elif check.kind == "n" and not check.validated:
            blockers.append(
                f"the NOT NULL constraint {check.name} is not validated;"
                f' ALTER TABLE {shape.schema}.{TABLE} VALIDATE CONSTRAINT "{check.name}"'
            )
    blockers += [
        f"policy {policy.name} reads {TABLE} itself, whose old self it would go on reading; drop it first"
        for policy in shape.policies
        if re.search(rf"\b{TABLE}\b", policy.definition)
    ]
    blockers += _followers_rights(conn, shape)
    if not blockers:
        blockers += _rows_against_checks(conn, shape, cutoff)
    return blockers


def _followers_rights(conn: Connection, shape: TableShape) -> list[str]:
    """Whom else this role has to act for: the owners of views, and those who passed privileges on."""
    blockers = []
    for follower in followers(conn, shape.oid):
        owns, creates = execute(
            conn,
            statement(
                "SELECT pg_has_role({owner}, 'USAGE'), {schema}::text IS NULL"
                " OR has_schema_privilege({schema}, 'CREATE')",
                owner=follower.owner,
                schema=follower.schema,
            ),
        ).one()
        if not owns:
            blockers.append(
                f"{follower.kind} {follower.name} reads {TABLE} and belongs to {follower.owner};"
                f" connect as a member of that role, so that it can be made to read the new table"
            )
        elif not creates:
            blockers.append(
                f"{follower.kind} {follower.name} is to be made to read the new table;"
                f" GRANT CREATE ON SCHEMA {follower.schema} to the role that you connect as"
            )
    version, superuser = execute(
        conn,
        statement(
            "SELECT current_setting('server_version_num')::int, rolsuper FROM pg_roles"
            " WHERE rolname = current_user"
        ),
    ).one()
    become = "SET" if version >= 160000 else "MEMBER"
    others = {grant.grantor for grant in shape.grants} - {shape.owner}
    others |= {grant.grantor for i in shape.identities for grant in i.grants} - {shape.owner}
    others |= {shape.owner} | {s.owner for s in shape.statistics}
    for role in sorted(others) if not superuser else ():
        may = execute(
            conn, statement("SELECT pg_has_role({role}, {become})", role=role, become=become)
        ).scalar_one()
        if not may:
            blockers.append(
                f"{role} owns or has passed on privileges on what belongs to {TABLE};"
                f" connect as a superuser or as a member of that role"
            )
    may = execute(
        conn,
        statement(
            "SELECT has_schema_privilege({owner}, {schema}, 'CREATE')", owner=shape.owner, schema=shape.schema
        ),
    ).scalar_one()
    if not may and not superuser:
        blockers.append(
            f"{shape.owner}, who owns {TABLE} and is to own its partitions, may not create tables in its"
            f' schema; GRANT CREATE ON SCHEMA "{shape.schema}" TO "{shape.owner}"'
        )
    return blockers


def _rows_against_checks(conn: Connection, shape: TableShape, cutoff: datetime) -> list[str]:
    """A check that was never validated has let old rows be, but it is asked about each that is copied."""
    blockers = []
    for check in shape.checks:
        if check.validated or check.kind != "c" or check.definition.endswith("NOT ENFORCED"):
            continue
        rows, example = execute(
            conn,
            statement(
                'SELECT count(*), min(id) FROM {table} WHERE "timestamp" >= {cutoff} AND NOT ({check})',
                table=name(shape.schema, TABLE),
                cutoff=shape.instant(cutoff),
                check=sql.SQL(check.expression or "true"),
            ),
        ).one()
        if rows:
            blockers.append(
                f"{rows:,} row{'s' if rows > 1 else ''} to be copied (for example id {example}) would fail"
                f" the check constraint {check.name}, which was never validated; correct them, or drop it"
            )
    return blockers
