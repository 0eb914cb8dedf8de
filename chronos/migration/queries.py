"""Which statements will suffer from partitions: those in pg_stat_statements that cannot prune any.

They are read, parsed (pruning.py) and, if the partitioned table exists already, planned on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from psycopg2 import sql
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from chronos.catalog.statements import statistics_view
from chronos.db import Statement, application_path, execute, joined, name, one_line, our_path, statement
from chronos.errors import RefusedError
from chronos.migration import pruning
from chronos.migration.console import counted
from chronos.migration.pruning import Fact, Subject, Why, kind, nodes, words
from chronos.table import TableSpec

# Marks our own statements, which are not part of the workload.
OURS = "/* chronos */"

_HOW_TO_GET_IT = (
    "put pg_stat_statements into shared_preload_libraries, restart the server, and run:"
    " CREATE EXTENSION pg_stat_statements;"
)
# Only the statements that take the most time are planned.
_MOST_PLANNED = 100
_PLANNING = {
    "statement_timeout": "2s",
    "lock_timeout": "100ms",
    "plan_cache_mode": "force_generic_plan",
    # The plan needs neither, and both would cost time: evaluated constraints, compiled code.
    "constraint_exclusion": "off",
    "jit": "off",
}
_PREPARED = "chronos_plan"


@dataclass(frozen=True)
class Planned:
    """The plan of a statement on the partitioned table.

    ``scanned`` of ``partitions`` remain when it starts; ``jit``: its cost would trigger JIT compilation with
    this role's settings.
    """

    scanned: int
    partitions: int
    cost: float
    jit: bool


@dataclass(frozen=True)
class Statistic:
    """A statement of pg_stat_statements that touches the table, its times in milliseconds.

    ``share`` is its part of all time the database spent; ``why`` is None when it prunes partitions;
    ``planned`` is None if it could not be planned safely, or not at all.
    """

    text: str
    calls: int
    total_ms: float
    share: float
    why: Why | None
    facts: tuple[Fact, ...]
    planned: Planned | None = None

    @property
    def suffers(self) -> bool:
        """Whether it will touch every partition or trigger JIT."""
        return self.why is not None or (self.planned is not None and self.planned.jit)


@dataclass(frozen=True)
class Workload:
    """Every readable statement on the table, the one that takes the most time first.

    ``locks`` is how many relations a statement locks if it prunes no partition; ``notes`` say what could not
    be read or planned, and why, a line each.
    """

    subject: Subject
    statements: tuple[Statistic, ...]
    locks: int
    notes: tuple[str, ...]

    @property
    def suffering(self) -> list[Statistic]:
        """Those that will suffer."""
        return [found for found in self.statements if found.suffers]


# Views on the table, at any depth; statements on them are analyzed like statements on the table.
_VIEWS = """
WITH RECURSIVE found (oid) AS (
    SELECT {oid}::oid
    UNION
    SELECT w.ev_class
    FROM found f
    JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = f.oid
                    AND d.classid = 'pg_rewrite'::regclass
    JOIN pg_rewrite w ON w.oid = d.objid AND w.rulename = '_RETURN'
)
SELECT n.nspname, c.relname, pg_get_viewdef(c.oid)
FROM found f
JOIN pg_class c ON c.oid = f.oid AND c.relkind = 'v'
JOIN pg_namespace n ON n.oid = c.relnamespace
ORDER BY 1, 2
"""

_TABLE = """
SELECT c.oid::bigint,
       (SELECT array_agg(attname::text ORDER BY attnum) FROM pg_attribute
        WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped),
       (SELECT typname::text FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
        WHERE attrelid = c.oid AND attname = {column}),
       coalesce((SELECT array_agg(a.attname::text) FROM pg_index i
                 JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY(i.indkey)
                 WHERE i.indrelid = c.oid AND i.indisprimary), ARRAY[]::text[]),
       (SELECT count(*) FROM pg_index WHERE indrelid = c.oid),
       (SELECT count(*) FROM pg_class WHERE relname = c.relname AND relkind IN ('r', 'p', 'v', 'm', 'f'))
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = {schema} AND c.relname = {table}
"""

_STATISTICS = """
WITH found AS (
    SELECT s.query, s.calls, s.total_exec_time FROM {view} s
    WHERE s.dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
)
SELECT query, sum(calls)::bigint, sum(total_exec_time)::float8,
       coalesce(sum(total_exec_time) / nullif((SELECT sum(total_exec_time) FROM found), 0), 0)::float8
FROM found
WHERE query = '<insufficient privilege>' OR (lower(query) ~ {names} AND query !~ {ours})
GROUP BY query ORDER BY 3 DESC
"""


def workload(conn: Connection, spec: TableSpec, partitions: int, partitioned: str | None = None) -> Workload:
    """What pg_stat_statements has on the table ``spec``, which will have this many partitions.

    ``partitioned`` is the name of the partitioned table to plan statements on, None while there is none. Call
    it in a read-only transaction with our settings. ACCESS SHARE, and what each statement's plan locks, while
    it is planned. Raises only the server's error for a broken connection: what is unavailable is in the
    notes.
    """
    subject, indexes = _subject(conn, spec)
    locks = partitions * (1 + indexes)
    try:
        pruning.parser()
        rows = _statistics(conn, subject)
    except RefusedError as error:
        return Workload(subject, (), locks, (str(error),))
    return read_workload(conn, subject, rows, locks, partitioned)


def read_workload(
    conn: Connection,
    subject: Subject,
    rows: list[tuple[str, int, float, float]],
    locks: int,
    partitioned: str | None = None,
) -> Workload:
    """The same from ``rows`` of text, calls, milliseconds and share of the time."""
    statements: list[Statistic] = []
    hidden = unread = 0
    for text, calls, total_ms, share in rows:
        if text == "<insufficient privilege>":
            hidden += 1
            continue
        try:
            reading = pruning.read(text, subject)
        except pruning.UnreadableError:
            unread += 1
            continue
        if reading.touches or reading.facts:
            statements.append(Statistic(text, calls, total_ms, share, reading.why, reading.facts))
    notes: list[str] = []
    if hidden:
        notes.append(
            "statements of other roles are hidden from this one; for all of them:"
            " GRANT pg_read_all_stats TO CURRENT_USER;"
        )
    if unread:
        notes.append(
            f"{counted(unread, 'statement')} could not be read; pg_stat_statements may have truncated them"
        )
    if partitioned is not None and statements:
        planner = _Planner(conn, subject, partitioned)
        statements = [
            found if place >= _MOST_PLANNED else _with_plan(found, planner)
            for place, found in enumerate(statements)
        ]
        if planner.refused:
            notes.append(
                f"{counted(planner.refused, 'statement')} not planned, as planning could run a function or"
                " an operator that is not PostgreSQL's own"
            )
        if planner.failed:
            notes.append(f"{counted(planner.failed, 'statement')} could not be planned: {planner.failure}")
    return Workload(subject, tuple(statements), locks, tuple(notes))


def _subject(conn: Connection, spec: TableSpec) -> tuple[Subject, int]:
    """The table as statements may mention it, and how many indexes it has."""
    oid, columns, type_, key, indexes, namesakes = execute(
        conn, statement(_TABLE, schema=spec.home, table=spec.name, column=spec.column)
    ).one()
    views = {(row[0], row[1]): row[2] for row in execute(conn, statement(_VIEWS, oid=oid)).all()}
    visible = _visible(conn, [spec.name, *(view for _, view in views)])
    volatile = execute(
        conn, statement("SELECT DISTINCT proname::text FROM pg_proc WHERE provolatile = 'v'")
    ).scalars()
    return (
        Subject(
            spec.home,
            spec.name,
            spec.column,
            type_,
            tuple(columns),
            tuple(key),
            bare=namesakes == 1 or visible.get(spec.name) == spec.home,
            views=views,
            bare_views={view: text for (schema, view), text in views.items() if visible.get(view) == schema},
            volatile=frozenset(volatile),
        ),
        indexes,
    )


def _visible(conn: Connection, relations: list[str]) -> dict[str, str]:
    """The schemas in which the role's own search path finds these names."""
    execute(conn, application_path())
    found = execute(
        conn,
        statement(
            "SELECT r.name, n.nspname::text FROM pg_catalog.unnest({names}::text[]) AS r (name)"
            " JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=)"
            " pg_catalog.to_regclass(pg_catalog.quote_ident(r.name))::oid"
            " JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace",
            names=relations,
        ),
    ).all()
    execute(conn, our_path())
    return {row[0]: row[1] for row in found}


def _statistics(conn: Connection, subject: Subject) -> list[tuple[str, int, float, float]]:
    """Text, calls, milliseconds and share of all time. Raises RefusedError when they are unavailable."""
    view = statistics_view(conn)
    if view is None:
        raise RefusedError(f"pg_stat_statements is not installed; {_HOW_TO_GET_IT}")
    wanted = {subject.name, *(view_name for _, view_name in subject.views)}
    names = "|".join(_literally(one.lower()) for one in sorted(wanted))
    # Statements of a migration name its other tables, or are marked.
    ours = f"{_literally(OURS)}|{_literally(subject.name)}_(new|old|migration)"
    query = statement(_STATISTICS, view=view, names=names, ours=ours)
    try:
        with _undone(conn):
            return [(row[0], row[1], row[2], row[3]) for row in execute(conn, query).all()]
    except DBAPIError as error:
        raise RefusedError(
            f"pg_stat_statements cannot be read ({one_line(error)}); {_HOW_TO_GET_IT}"
        ) from error


def _literally(text: str) -> str:
    """A PostgreSQL regular expression that matches ``text`` literally."""
    return re.sub(r"(\W)", r"\\\1", text)


@contextmanager
def _undone(conn: Connection) -> Iterator[None]:
    """A savepoint: the block's settings and locks end with it, and an error does not abort the rest."""
    execute(conn, statement("SAVEPOINT chronos_queries"))
    try:
        yield
    finally:
        execute(conn, statement("ROLLBACK TO SAVEPOINT chronos_queries; RELEASE SAVEPOINT chronos_queries"))


# --- Plans ---


def _with_plan(found: Statistic, planner: _Planner) -> Statistic:
    planned = planner.plan(found.text)
    return found if planned is None else Statistic(**{**vars(found), "planned": planned})


class _RefusedStatementError(Exception):
    """A statement that is not planned, because planning could run somebody else's code."""


# Planning evaluates immutable functions of constants, and stable ones for its estimates. With our privileges
# only PostgreSQL's own may run, and of the stable ones only those that depend on nothing but their arguments.
_HARMLESS = """
SELECT proname::text FROM pg_proc p
WHERE pronamespace = 'pg_catalog'::regnamespace
GROUP BY proname
HAVING bool_and(provolatile = 'i' OR prokind IN ('a', 'w')
                OR (provolatile = 's' AND proname IN (
                    'now', 'transaction_timestamp', 'statement_timestamp', 'date_trunc', 'date_part',
                    'extract', 'timezone', 'to_char', 'to_timestamp', 'age', 'make_timestamptz',
                    'generate_series', 'timestamptz', 'timestamp', 'date', 'concat', 'concat_ws', 'format',
                    'to_json', 'to_jsonb', 'json_build_object', 'jsonb_build_object', 'array_to_string')))
"""

# Ordinary tables with columns of PostgreSQL's own types and no user-defined function, operator or rule: none
# in an index, a check, a default, statistics, a policy, or a table below them.
_PLAIN = """
WITH RECURSIVE wanted (oid) AS (
    SELECT unnest({relations}) UNION SELECT i.inhrelid FROM wanted w JOIN pg_inherits i ON i.inhparent = w.oid
), parts (classid, objid) AS (
    SELECT 'pg_class'::regclass::oid, w.oid FROM wanted w
    UNION ALL SELECT 'pg_class'::regclass, i.indexrelid
    FROM wanted w JOIN pg_index i ON i.indrelid = w.oid
    UNION ALL SELECT 'pg_constraint'::regclass, k.oid
    FROM wanted w JOIN pg_constraint k ON k.conrelid = w.oid
    UNION ALL SELECT 'pg_attrdef'::regclass, f.oid
    FROM wanted w JOIN pg_attrdef f ON f.adrelid = w.oid
    UNION ALL SELECT 'pg_statistic_ext'::regclass, e.oid
    FROM wanted w JOIN pg_statistic_ext e ON e.stxrelid = w.oid
)
SELECT NOT EXISTS (
    SELECT FROM wanted w JOIN pg_class c ON c.oid = w.oid
    WHERE c.relkind NOT IN ('r', 'p') OR c.relhasrules OR c.relrowsecurity
) AND NOT EXISTS (
    SELECT FROM wanted w JOIN pg_attribute a ON a.attrelid = w.oid AND a.attnum > 0 AND NOT a.attisdropped
    JOIN pg_type t ON t.oid = a.atttypid
    WHERE t.oid >= 16384 AND NOT (t.typtype = 'e' AND NOT EXISTS (
        SELECT FROM pg_cast k WHERE t.oid IN (k.castsource, k.casttarget)))
) AND NOT EXISTS (
    SELECT FROM parts p JOIN pg_depend d ON d.classid = p.classid AND d.objid = p.objid
    WHERE d.refclassid IN ('pg_proc'::regclass, 'pg_operator'::regclass)
)
"""

_KNOWN_TYPES = {"timestamp with time zone", "timestamp without time zone", "date"}


class _Planner:
    """Plans statements on the partitioned table, each in a savepoint: nothing remains, not even a lock."""

    def __init__(self, conn: Connection, subject: Subject, partitioned: str) -> None:
        self._conn = conn
        self._subject = subject
        self._partitioned = partitioned
        self._harmless = set(execute(conn, statement(_HARMLESS)).scalars())
        self._leaves = set(
            execute(
                conn,
                statement(
                    "SELECT c.relname::text FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
                    " WHERE i.inhparent = to_regclass(format('%I.%I', {schema}, {table}))",
                    schema=subject.schema,
                    table=partitioned,
                ),
            ).scalars()
        )
        self._jit_above: float | None = execute(
            conn,
            statement(
                "SELECT CASE WHEN current_setting('jit')::boolean AND pg_jit_available()"
                " AND current_setting('jit_above_cost')::float8 >= 0"
                " THEN current_setting('jit_above_cost')::float8 END"
            ),
        ).scalar_one()
        self.refused = self.failed = 0
        self.failure = ""

    def plan(self, text: str) -> Planned | None:
        """The plan; None when it was refused or failed, which is counted."""
        try:
            rewritten = self._rewritten(text)
            if rewritten is None:
                return None
            found = self._explain(*rewritten)
        except (_RefusedStatementError, pruning.UnreadableError, RecursionError):
            self.refused += 1
            return None
        except DBAPIError as error:
            self.failed += 1
            self.failure = self.failure or one_line(error)
            return None
        scanned = {
            node["Relation Name"] for node in _plan_nodes(found) if node.get("Relation Name") in self._leaves
        }
        cost = float(found["Total Cost"])
        jit = self._jit_above is not None and cost > self._jit_above
        return Planned(len(scanned), len(self._leaves), cost, jit)

    def _explain(self, query: str, relations: list[str]) -> dict[str, Any]:
        """The generic plan after pruning at executor start: time parameters are now(), others unknown.

        PREPARE locks the relations and plans nothing yet, so what is found harmless then stays harmless.
        """
        conn = self._conn
        prepared = False
        try:
            with _undone(conn):
                for setting, value in _PLANNING.items():
                    execute(conn, statement("SELECT set_config({s}, {v}, true)", s=setting, v=value))
                # The text was deparsed from the tree that was checked, and is one statement.
                execute(conn, statement("PREPARE {p} AS {query}", p=name(_PREPARED), query=sql.SQL(query)))
                prepared = True
                if not self._are_plain(relations):
                    raise _RefusedStatementError
                types = execute(
                    conn,
                    statement(
                        "SELECT format_type(t, NULL) FROM pg_prepared_statements,"
                        " unnest(parameter_types::oid[]) WITH ORDINALITY AS u (t, place)"
                        " WHERE name = {p} ORDER BY place",
                        p=_PREPARED,
                    ),
                ).scalars()
                values = [_value(type_) for type_ in types]
                arguments = statement("({values})", values=joined(values)) if values else sql.SQL("")
                explained = execute(
                    conn,
                    statement(
                        "EXPLAIN (FORMAT JSON) EXECUTE {p} {arguments}",
                        p=name(_PREPARED),
                        arguments=arguments,
                    ),
                ).scalar_one()
        finally:
            if prepared:
                execute(conn, statement("DEALLOCATE {p}", p=name(_PREPARED)))
        plan: dict[str, Any] = explained[0]["Plan"]
        return plan

    def _rewritten(self, text: str) -> tuple[str, list[str]] | None:
        """The statement with the partitioned table in place of the plain one, and the relations in it.

        None for a statement without a plan. Raises _RefusedStatementError if it must not be planned.
        """
        trees = pruning.parse(text)
        tree: Any = trees[0] if len(trees) == 1 else None
        while kind(tree) in ("PrepareStmt", "DeclareCursorStmt", "ExplainStmt", "CreateTableAsStmt"):
            tree = tree.query
        if kind(tree) not in ("SelectStmt", "UpdateStmt", "DeleteStmt", "MergeStmt"):
            return None
        self._require_harmless(tree)
        relations = self._qualify(tree)
        from pglast.stream import RawStream

        query = str(RawStream()(tree))
        again = pruning.parse(query)
        if len(again) != 1 or kind(again[0]) != kind(tree):
            raise _RefusedStatementError
        # The text is what gets planned, so the check must hold for the text as parsed again.
        self._require_harmless(again[0])
        return query, relations

    def _require_harmless(self, tree: Any) -> None:
        for node in nodes(tree):
            what = kind(node)
            if what in ("FuncCall", "A_Expr", "TypeName", "CollateClause", "SubLink", "SortBy"):
                member = {
                    "FuncCall": "funcname",
                    "A_Expr": "name",
                    "TypeName": "names",
                    "CollateClause": "collname",
                    "SubLink": "operName",
                    "SortBy": "useOp",
                }[what]
                *schema, own = words(getattr(node, member)) or ("",)
                if schema not in ([], ["pg_catalog"]) or (what == "FuncCall" and own not in self._harmless):
                    raise _RefusedStatementError
            elif what in ("InsertStmt", "IntoClause", "CurrentOfExpr", "RangeTableFunc", "XmlExpr"):
                raise _RefusedStatementError

    def _qualify(self, tree: Any) -> list[str]:
        """Qualify every relation with its schema; return them all."""
        subject = self._subject
        ctes = {node.ctename for node in nodes(tree) if kind(node) == "CommonTableExpr"}
        relations = [
            n
            for n in nodes(tree)
            if kind(n) == "RangeVar" and not (n.schemaname is None and n.relname in ctes)
        ]
        schemas = _visible(self._conn, [n.relname for n in relations if n.schemaname is None])
        from pglast import ast

        for node in relations:
            if subject.is_named(node.schemaname, node.relname):
                node.alias = node.alias or ast.Alias(aliasname=node.relname)
                node.schemaname, node.relname = subject.schema, self._partitioned
            elif node.schemaname is None:
                if node.relname not in schemas:
                    raise _RefusedStatementError
                node.schemaname = schemas[node.relname]
        for node in nodes(tree):
            if kind(node) == "ColumnRef" and words(node.fields)[:2] == (subject.schema, subject.name):
                node.fields = node.fields[1:]
        return [f"{_quoted(node.schemaname)}.{_quoted(node.relname)}" for node in relations]

    def _are_plain(self, relations: list[str]) -> bool:
        found: bool = execute(
            self._conn,
            statement(
                _PLAIN,
                relations=statement(
                    "(SELECT coalesce(array_agg(to_regclass(r)::oid), '{{}}')"
                    " FROM unnest({names}::text[]) AS r)",
                    names=relations,
                ),
            ),
        ).scalar_one()
        return found


def _value(type_: str) -> Statement:
    if type_ in _KNOWN_TYPES:
        return statement("now()::{type}", type=sql.SQL(type_))
    return statement("'1 day'::interval") if type_ == "interval" else sql.SQL("NULL")


def _quoted(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'


def _plan_nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from _plan_nodes(part)
