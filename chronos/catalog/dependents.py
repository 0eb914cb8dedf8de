"""What refers to the table by OID, not by name: views, rules, functions, policies, publications.

A rename leaves them all with the old table. So each definition is read from the server while the table still
has its name, and run again once another table has that name.
"""

from __future__ import annotations

from dataclasses import dataclass

from psycopg2 import sql
from sqlalchemy.engine import Connection

from chronos.db import Statement, execute, name, statement
from chronos.errors import ShapeError


@dataclass(frozen=True)
class Dependent:
    """One such object. ``again`` makes it refer to the table that has the name at that time; ``traits`` is
    everything else about it, which must not change: grants, comments, triggers, defaults. ``schema`` is
    where recreating it needs CREATE, None where not.

    A publication has no ``again``: ``publication`` is its name, ``member`` what it publishes of the table.
    """

    kind: str
    name: str
    owner: str
    schema: str | None
    again: str
    traits: str
    publication: str | None = None
    member: str | None = None


# Rules come late: they may name the views before them.
_DEPENDENTS = r"""
WITH referring AS (
    SELECT DISTINCT classid, objid FROM pg_depend
    WHERE refclassid = 'pg_class'::regclass AND refobjid = {oid}
)
SELECT * FROM (
    SELECT DISTINCT 1, 'view', format('%I.%I', n.nspname, v.relname),
           pg_get_userbyid(v.relowner), n.nspname::text,
           format(E'CREATE OR REPLACE VIEW %I.%I%s AS\n%s', n.nspname, v.relname,
                  ' WITH (' || (SELECT string_agg(format('%I = %L', option_name, option_value), ', ')
                                FROM pg_options_to_table(v.reloptions)) || ')',
                  rtrim(pg_get_viewdef(v.oid), ';')),
           concat_ws(' ', v.relacl, obj_description(v.oid, 'pg_class'),
                     (SELECT jsonb_agg(jsonb_build_array(
                          a.attname, a.attacl, pg_get_expr(d.adbin, d.adrelid),
                          col_description(a.attrelid, a.attnum)) ORDER BY a.attnum)
                      FROM pg_attribute a
                      LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
                      WHERE a.attrelid = v.oid AND a.attnum > 0),
                     (SELECT jsonb_agg(jsonb_build_array(pg_get_triggerdef(oid), tgenabled,
                                                         obj_description(oid, 'pg_trigger')) ORDER BY tgname)
                      FROM pg_trigger WHERE tgrelid = v.oid)),
           NULL, NULL
    FROM referring r
    JOIN pg_rewrite w ON r.classid = 'pg_rewrite'::regclass AND w.oid = r.objid AND w.rulename = '_RETURN'
    JOIN pg_class v ON v.oid = w.ev_class AND v.relkind = 'v'
    JOIN pg_namespace n ON n.oid = v.relnamespace
    UNION ALL
    SELECT 2, 'function', p.oid::regprocedure::text, pg_get_userbyid(p.proowner), n.nspname::text,
           pg_get_functiondef(p.oid),
           concat_ws(' ', p.proacl, obj_description(p.oid, 'pg_proc')), NULL, NULL
    FROM referring r JOIN pg_proc p ON r.classid = 'pg_proc'::regclass AND p.oid = r.objid
    JOIN pg_namespace n ON n.oid = p.pronamespace
    UNION ALL
    SELECT 3, 'policy', format('%I on %s', p.polname, p.polrelid::regclass),
           pg_get_userbyid(c.relowner), NULL,
           format('ALTER POLICY %I ON %s%s%s', p.polname, p.polrelid::regclass,
                  ' USING (' || pg_get_expr(p.polqual, p.polrelid) || ')',
                  ' WITH CHECK (' || pg_get_expr(p.polwithcheck, p.polrelid) || ')'),
           concat_ws(' ', p.polcmd, p.polroles, obj_description(p.oid, 'pg_policy')), NULL, NULL
    FROM referring r JOIN pg_policy p ON r.classid = 'pg_policy'::regclass AND p.oid = r.objid
    JOIN pg_class c ON c.oid = p.polrelid
    WHERE p.polrelid <> {oid}
    UNION ALL
    SELECT 4, 'rule', format('%I on %s', w.rulename, w.ev_class::regclass), pg_get_userbyid(c.relowner), NULL,
           regexp_replace(rtrim(pg_get_ruledef(w.oid), ';'), '^CREATE RULE', 'CREATE OR REPLACE RULE'),
           concat_ws(' ', w.ev_enabled, obj_description(w.oid, 'pg_rewrite')), NULL, NULL
    FROM referring r
    JOIN pg_rewrite w ON r.classid = 'pg_rewrite'::regclass AND w.oid = r.objid AND w.rulename <> '_RETURN'
    JOIN pg_class c ON c.oid = w.ev_class
    WHERE w.ev_class <> {oid}
    UNION ALL
    SELECT 5, 'publication', quote_ident(p.pubname), pg_get_userbyid(p.pubowner), NULL, '',
           concat_ws(' ', p.pubviaroot, obj_description(p.oid, 'pg_publication')),
           p.pubname::text,
           concat(' (' || (SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attname)
                           FROM unnest(m.prattrs::int2[]) u (n)
                           JOIN pg_attribute a ON a.attrelid = m.prrelid AND a.attnum = u.n) || ')',
                  ' WHERE (' || pg_get_expr(m.prqual, m.prrelid) || ')')
    FROM pg_publication_rel m JOIN pg_publication p ON p.oid = m.prpubid
    WHERE m.prrelid = {oid}
) f (place, kind, name, owner, schema, again, traits, publication, member)
ORDER BY place, name
"""


def oid_of(conn: Connection, schema: str, table: str) -> int:
    """The OID of a table, by which its dependents refer to it."""
    oid: int = execute(
        conn,
        statement(
            "SELECT to_regclass(format('%I.%I', {schema}, {table}))::oid::bigint", schema=schema, table=table
        ),
    ).scalar_one()
    return oid


def dependents(conn: Connection, oid: int) -> list[Dependent]:
    """What refers to the table ``oid``, except its own indexes, constraints, triggers and rules."""
    rows = execute(conn, statement(_DEPENDENTS, oid=oid)).all()
    return [Dependent(*row[1:]) for row in rows]


def redirect_statements(found: list[Dependent], table: Statement, former: Statement) -> list[Statement]:
    """After the renames: make all of them refer to ``table`` instead of ``former``.

    ``former`` is the table they referred to before, by its current name. ACCESS EXCLUSIVE on each view, which
    nobody can be using: a query on it would be waiting for the lock on the table.
    """
    statements: list[Statement] = []
    for dependent in found:
        if dependent.publication is None:
            statements.append(sql.SQL(dependent.again))
        else:
            publication = name(dependent.publication)
            statements += [
                statement("ALTER PUBLICATION {p} DROP TABLE ONLY {former}", p=publication, former=former),
                statement(
                    "ALTER PUBLICATION {p} ADD TABLE ONLY {table}{member}",
                    p=publication,
                    table=table,
                    member=sql.SQL(dependent.member or ""),
                ),
            ]
    return statements


def require_dependents(conn: Connection, before: list[Dependent], oid: int) -> None:
    """Raise ShapeError unless everything in ``before`` now refers to the table ``oid``, unchanged."""
    if not before:
        return
    after = dependents(conn, oid)
    lost = [f"{d.kind} {d.name}" for d in before if d not in after]
    if lost:
        raise ShapeError(f"{', '.join(lost)} would not be the same on the other table")
