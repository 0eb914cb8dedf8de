"""Every check before a migration, in one list: what blocks it, what to know first, and what to type about it.

A check has an id, which is printed after its message and which the guide's troubleshooting is filed under.
It is a query that returns a message per row, or a function that yields messages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from enum import Enum
from functools import cached_property

from psycopg2 import errorcodes, sql
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from chronos import commands
from chronos.catalog import citus, ddl
from chronos.catalog.dependents import dependents
from chronos.catalog.shape import Index, TableShape
from chronos.catalog.shape import read as read_shape
from chronos.catalog.slots import Sender, senders, slots
from chronos.catalog.statements import scheduled_jobs
from chronos.db import Statement, execute, joined, name, sqlstate, statement
from chronos.functions import distrusted
from chronos.migration import idioms
from chronos.migration import state as states
from chronos.migration.attach import bound_after, check_name, heap_of, key_name
from chronos.migration.state import Phase, Plan, State, Strategy
from chronos.table import NAME_BYTES, Interval, Period, TableSpec, derived_name, in_quotes, midnight, quoted

_MOST_PARTITIONS = 10_000
_MANY_PARTITIONS = 1_000
_NAMES_SHOWN = 10
_TIME_TYPES = re.compile(r"date|timestamp(\(\d\))? with(out)? time zone")


@dataclass(frozen=True)
class Finding:
    """What a check found: ``text`` says what it is and what to do about it."""

    id: str
    text: str

    def __str__(self) -> str:
        return f"{self.text} [{self.id}]"


@dataclass(frozen=True)
class Survey:
    """What was found: the table, the server's clock, and everything that blocks a migration.

    ``now`` is the database's. ``oldest`` is the time of the oldest row, looked up only when every row is
    copied; ``newest`` that of the newest, looked up only when the table itself becomes a partition.
    ``shape`` is None when there is no plain table to migrate. ``accepted`` are the replication slots whose
    readers may get rows twice.
    """

    spec: TableSpec
    now: datetime
    rows_estimate: int
    bytes: int
    shape: TableShape | None
    blockers: tuple[Finding, ...]
    oldest: datetime | None = None
    strategy: Strategy = Strategy.COPY
    newest: datetime | None = None
    accepted: frozenset[str] = frozenset()

    @property
    def attaches(self) -> bool:
        """Whether the table itself becomes a partition."""
        return self.strategy is Strategy.ATTACH

    @property
    def today(self) -> date:
        """The UTC day of the server's clock."""
        return self.now.date()

    @property
    def cutoff(self) -> datetime:
        """Rows from this instant on are copied; the start of a day if the column is a date."""
        if self.attaches:
            return self.first
        if self.spec.retention_days is not None:
            if self.shape is not None and self.shape.time_type == "date":
                return midnight(self.today - timedelta(days=self.spec.retention_days))
            return self.now - timedelta(days=self.spec.retention_days)
        return self.spec.period(min(self.oldest or self.now, self.now)).start

    @property
    def first(self) -> datetime:
        """Where the first new partition begins."""
        if self.attaches:
            return bound_after(self.spec, self.now, self.newest)
        if self.spec.retention_days is None:
            return self.cutoff
        return self.spec.period(midnight(self.today) - timedelta(days=self.spec.retention_days)).start

    @property
    def end(self) -> datetime:
        """Where the last partition ends."""
        end = self.spec.wanted(self.now, back=False)[-1].end
        # There is always a partition beyond the bound of an attached table, however long the periods.
        return max(end, self.spec.period(self.first).end) if self.attaches else end

    @property
    def partitions(self) -> int:
        """About how many partitions it takes, without listing them."""
        lengths = {Interval.HOUR: 1 / 24, Interval.DAY: 1, Interval.WEEK: 7, Interval.MONTH: 30}
        return round((self.end - self.first) / timedelta(days=lengths[self.spec.every]))

    @property
    def periods(self) -> list[Period]:
        """Every period that gets a partition."""
        return self.spec.periods(self.first, self.end)


class Kind(Enum):
    """What a finding means. SITUATION runs first; each later kind only if nothing was found before."""

    SITUATION = "blocks it, whatever the table looks like"
    STRUCTURE = "blocks it; read from the catalogs"
    ROWS = "blocks it; read from the rows"
    WARNING = "does not block it"


@dataclass(frozen=True)
class Subject:
    """What a check may use; ``relkind`` and ``earlier``, a migration's state, only for a SITUATION."""

    conn: Connection
    survey: Survey
    relkind: str | None = None
    earlier: State | None = None

    @property
    def spec(self) -> TableSpec:
        """The table as configured."""
        return self.survey.spec

    @property
    def shape(self) -> TableShape:
        """The table as the catalogs have it; not available for a SITUATION."""
        assert self.survey.shape is not None
        return self.survey.shape

    @property
    def table(self) -> str:
        """The table as you type it: schema and name, quoted where needed."""
        return self.spec.typed

    @cached_property
    def texts(self) -> list[idioms.Text]:
        """The functions and statements of the application that mention the table."""
        return idioms.texts(self.conn, self.shape)

    @cached_property
    def senders(self) -> list[Sender]:
        """The slots that would send copied rows, except the accepted ones; none for an attach."""
        found = [] if self.survey.attaches else senders(self.conn, self.spec.home)
        return [sender for sender in found if sender.slot not in self.survey.accepted]

    def filled(self, query: str) -> Statement:
        """``query`` with its placeholders filled in, all as literals."""
        spec, shape = self.spec, self.survey.shape
        return statement(
            query,
            oid=shape.oid if shape else 0,
            schema=spec.home,
            name=spec.name,
            old=spec.old,
            new=spec.new,
            table=self.table,
            column=spec.column,
            new_key=", ".join(shape.new_key) if shape else "",
            deletes=_deletes_from(spec),
        )


@dataclass(frozen=True)
class Check:
    """One check. ``look`` is a query that returns a message per row, or a function that yields messages."""

    id: str
    kind: Kind
    look: str | Callable[[Subject], Iterable[str]]


def survey(
    conn: Connection,
    spec: TableSpec,
    strategy: Strategy = Strategy.COPY,
    accepted: frozenset[str] = frozenset(),
) -> Survey:
    """Examine the table inside a transaction that changes nothing.

    ACCESS SHARE on the table while its rows are read, which happens only if nothing else blocks the
    migration.
    """
    now, rows, size, relkind = execute(
        conn,
        statement(
            "SELECT now(), coalesce(max(greatest(c.reltuples, 0)), 0)::bigint,"
            " coalesce(max(pg_total_relation_size(c.oid)), 0)::bigint, max(c.relkind::text)"
            " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname = {schema} AND c.relname = {table}",
            schema=spec.home,
            table=spec.name,
        ),
    ).one()

    def found(
        *blockers: Finding,
        shape: TableShape | None = None,
        oldest: datetime | None = None,
        newest: datetime | None = None,
    ) -> Survey:
        return Survey(spec, now, rows, size, shape, blockers, oldest, strategy, newest, accepted)

    earlier = states.read(conn, spec)
    blockers = _findings(Subject(conn, found(), relkind, earlier), Kind.SITUATION)
    if blockers:
        return found(*blockers)
    shape = read_shape(conn, spec, spec.name)
    ends = {
        "oldest": _end_of_the_rows(conn, shape, "min") if spec.retention_days is None else None,
        "newest": _end_of_the_rows(conn, shape, "max") if strategy is Strategy.ATTACH else None,
    }
    subject = Subject(conn, found(shape=shape, **ends))
    blockers = _findings(subject, Kind.STRUCTURE) or _findings(subject, Kind.ROWS)
    return found(*blockers, shape=shape, **ends)


def warnings(conn: Connection, found: Survey) -> list[Finding]:
    """What to know before a migration of the table that was found; none of it blocks the migration."""
    return _findings(Subject(conn, found), Kind.WARNING)


def first_plan(found: Survey) -> Plan:
    """What is fixed when a migration of the table that was found begins."""
    shape = found.shape
    assert shape is not None
    return Plan(
        table=found.spec,
        strategy=found.strategy,
        started_at=found.now,
        cutoff=found.cutoff,
        first=found.first,
        end=found.end,
        old_key=shape.old_key,
        new_key=shape.new_key,
        renames=tuple(ddl.renames(shape)),
        sequences=shape.sequences,
        foreign_keys=shape.foreign_keys,
        heap=heap_of(shape) if found.attaches else None,
    )


def _findings(subject: Subject, kind: Kind) -> list[Finding]:
    """What the checks of ``kind`` find, in list order; all queries in one round trip."""
    asked = [(place, check) for place, check in enumerate(CHECKS) if check.kind is kind]
    queries = [
        statement(
            "SELECT {place}, found.text FROM ({query}) AS found (text)",
            place=place,
            query=subject.filled(c.look),
        )
        for place, c in asked
        if isinstance(c.look, str)
    ]
    texts: dict[int, list[str]] = {place: [] for place, _ in asked}
    for place, text in execute(subject.conn, joined(queries, "\nUNION ALL\n")).all() if queries else ():
        texts[place].append(text)
    for place, check in asked:
        if callable(check.look):
            texts[place] = list(check.look(subject))
    return [Finding(check.id, text) for place, check in asked for text in texts[place]]


def _deletes_from(spec: TableSpec) -> str:
    """A PostgreSQL regular expression that matches DELETE statements on the table."""
    table = re.sub(r"(\W)", r"\\\1", spec.name)
    return rf'delete\s+from\s+(only\s+)?("?[\w$]+"?\.)?"?{table}"?(?![\w$])'


def _end_of_the_rows(conn: Connection, shape: TableShape, end: str) -> datetime | None:
    """The time of the oldest row (``min``) or the newest (``max``), by the index; None if unavailable."""
    if not _has_time_column(shape) or not _time_indexes(shape):
        return None
    readable = execute(
        conn,
        statement(
            "SELECT has_table_privilege({oid}::oid, 'SELECT') AND NOT row_security_active({oid}::oid)",
            oid=shape.oid,
        ),
    ).scalar_one()
    if not readable:
        return None
    found: datetime | None = execute(
        conn,
        statement(
            # Years outside the range of Python are clamped to it.
            "SELECT least(greatest({instant}, '0002-01-01 00:00:00+00'::timestamptz),"
            " '9000-01-01 00:00:00+00'::timestamptz)"
            " FROM (SELECT {end}({c}) FROM {table} WHERE {c} > '-infinity' AND {c} < 'infinity') AS o (at)"
            " WHERE at IS NOT NULL",
            end=sql.SQL(end),
            instant=sql.SQL("at" if shape.time_type == "timestamptz" else "timezone('UTC', at::timestamp)"),
            c=shape.time_column,
            table=name(shape.schema, shape.name),
        ),
    ).scalar()
    return found


def _has_time_column(shape: TableShape) -> bool:
    return any(c.name == shape.spec.column and _TIME_TYPES.fullmatch(c.type) for c in shape.columns)


def _time_indexes(shape: TableShape) -> list[Index]:
    """The indexes that return rows in time order."""
    return [
        i
        for i in shape.indexes
        if i.valid
        and i.columns[0] == shape.spec.column
        and i.body.startswith("USING btree")
        and not i.partial
    ]


# --- Where things stand, before the table is looked at ---


def _earlier(*phases: Phase, text: str) -> Callable[[Subject], Iterator[str]]:
    """A check that finds a migration in one of ``phases``."""

    def look(subject: Subject) -> Iterator[str]:
        found, spec = subject.earlier, subject.spec
        if found is not None and found.phase in phases:
            yield text.format(
                t=spec,
                phase=found.phase.value,
                begun=found.plan.started_at,
                status=commands.status(spec),
                migrate=commands.migrate(spec),
                rollback=commands.rollback(spec),
                finalize=commands.finalize(spec),
            )

    return look


def _old_table_exists(subject: Subject) -> Iterator[str]:
    old = subject.spec.old
    if subject.earlier is None and _taken(subject, relations=[old]):
        yield (
            f"Table {old} already exists, from an earlier migration or as somebody's copy. Look at it"
            f" (\\d {old}); if it is not needed, rename or drop it and start again"
        )


def _no_table(subject: Subject) -> Iterator[str]:
    if subject.relkind is None and subject.earlier is None:
        yield f"there is no table {subject.spec} in schema {subject.spec.home}"


def _already_partitioned(subject: Subject) -> Iterator[str]:
    if subject.relkind == "p" and subject.earlier is None:
        yield f"{subject.spec} is partitioned already; see {commands.status(subject.spec)}"


# --- Names ---


def _name_too_long(subject: Subject) -> Iterator[str]:
    spec = subject.spec
    names = [
        *(spec.old, spec.new, spec.state, spec.changes, spec.replayed),
        *(spec.note_function, spec.noted_function, spec.unlink_function, spec.snapshot_function),
        *spec.note_triggers,
        *spec.functions,
        spec.partition(spec.period(subject.survey.now)),
    ]
    longest = max(names, key=lambda n: len(n.encode()))
    size = len(longest.encode())
    if size > NAME_BYTES:
        room = NAME_BYTES - (size - len(spec.name.encode()))
        yield (
            f"the name {longest}, which the migration needs, has {size} bytes, and PostgreSQL allows"
            f" {NAME_BYTES}; rename the table, to at most {room} bytes"
        )


def _name_with_dollars(subject: Subject) -> Iterator[str]:
    names = [subject.spec.home, subject.spec.name, *subject.shape.new_key]
    for found in filter(re.compile(r"\$\w*\$").search, names):
        yield (
            f"the name {found} contains a dollar quote, which would end the body of the functions that use"
            " it; rename it"
        )


def _key_type(subject: Subject) -> Iterator[str]:
    """Keys are compared by an = in pg_catalog."""
    shape = subject.shape
    for column in shape.key:
        type_ = sql.SQL(shape.columns_by_name[column].type)
        try:
            with subject.conn.begin_nested():
                execute(subject.conn, statement("SELECT NULL::{t} = NULL::{t}", t=type_))
        except DBAPIError as error:
            if sqlstate(error) != errorcodes.UNDEFINED_FUNCTION:
                raise
            yield (
                f"the type {shape.columns_by_name[column].type} of the key column {column} has no = in"
                " pg_catalog, which is needed to find rows again; use a key of another type"
            )


def _names_taken(subject: Subject) -> Iterator[str]:
    spec, found = subject.spec, subject.survey
    # With more partitions than that another check blocks.
    periods = found.periods if found.partitions <= _MOST_PARTITIONS else []
    renames = ddl.renames(subject.shape)
    taken = _taken(
        subject,
        relations=[
            *(spec.new, spec.state, spec.changes, spec.replayed),
            *map(spec.partition, periods),
            *((spec.history, key_name(spec)) if found.attaches else ()),
            *(n for kind, _, *names in renames if kind != "STATISTICS" for n in names),
        ],
        statistics=[n for kind, _, *names in renames if kind == "STATISTICS" for n in names],
        functions=[
            spec.note_function,
            spec.noted_function,
            spec.unlink_function,
            spec.snapshot_function,
        ],
        triggers=list(spec.note_triggers),
    )
    if len(taken) == 1:
        yield f"the name {taken[0]} is taken and the migration needs it; rename or drop that object"
    elif taken:
        more = len(taken) - _NAMES_SHOWN
        yield (
            f"the names {', '.join(taken[:_NAMES_SHOWN])}{f' and {more} more' if more > 0 else ''} are taken"
            " and the migration needs them; rename or drop these objects"
        )


# A table creates a type of its name; array types are renamed out of the way by the server.
_TAKEN = """
SELECT relname::text FROM pg_class
WHERE relnamespace = {schema}::regnamespace AND relname::text = ANY ({relations})
UNION SELECT typname::text FROM pg_type t
WHERE typnamespace = {schema}::regnamespace AND typname::text = ANY ({relations})
  AND NOT EXISTS (SELECT FROM pg_type e WHERE e.typarray = t.oid)
UNION SELECT stxname::text FROM pg_statistic_ext
WHERE stxnamespace = {schema}::regnamespace AND stxname::text = ANY ({statistics})
UNION SELECT proname::text FROM pg_proc
WHERE pronamespace = {schema}::regnamespace AND proname::text = ANY ({functions})
UNION SELECT tgname::text FROM pg_trigger WHERE tgrelid = {oid} AND tgname::text = ANY ({triggers})
ORDER BY 1
"""


def _taken(
    subject: Subject,
    relations: list[str],
    statistics: list[str] | None = None,
    functions: list[str] | None = None,
    triggers: list[str] | None = None,
) -> list[str]:
    """Which of the names are taken in the table's schema (triggers: on the table)."""
    shape = subject.survey.shape

    def names(wanted: list[str] | None) -> Statement:
        return statement("{names}::text[]", names=wanted or [])

    rows = execute(
        subject.conn,
        statement(
            _TAKEN,
            schema=in_quotes(subject.spec.home),
            oid=shape.oid if shape else 0,
            relations=names(relations),
            statistics=names(statistics),
            functions=names(functions),
            triggers=names(triggers),
        ),
    ).all()
    return [row[0] for row in rows]


# --- Columns, keys, indexes, constraints ---


def _no_time_column(subject: Subject) -> Iterator[str]:
    spec = subject.spec
    if all(column.name != spec.column for column in subject.shape.columns):
        yield f"{spec} has no column {spec.column}; set the time column in the configuration or with --column"


def _time_column_type(subject: Subject) -> Iterator[str]:
    spec = subject.spec
    for column in subject.shape.columns:
        if column.name != spec.column:
            continue
        if not _TIME_TYPES.fullmatch(column.type):
            yield f"the column {spec.column} is {column.type}; it must be timestamptz, timestamp or date"
        elif column.generated:
            yield f"the column {spec.column} is generated, and a table cannot be partitioned by such a column"
        elif column.type == "date" and spec.every is Interval.HOUR:
            yield f"the column {spec.column} is a date, without hours; use partitions of a day or longer"


def _no_key(subject: Subject) -> Iterator[str]:
    shape = subject.shape
    if not shape.old_key:
        index = quoted(derived_name(subject.spec.name, "_key"))
        column = "id" if "id" in shape.columns_by_name else "..."
        yield (
            f"{subject.spec} has no key to find a changed row by: no primary key, and no unique index on NOT"
            " NULL columns; create one on the columns that identify a row:"
            f" CREATE UNIQUE INDEX CONCURRENTLY {index} ON {subject.table} ({column});"
            f" ALTER TABLE {subject.table} ADD PRIMARY KEY USING INDEX {index};"
        )


def _no_time_index(subject: Subject) -> Iterator[str]:
    if _has_time_column(subject.shape) and not _time_indexes(subject.shape):
        column = subject.spec.column
        yield (
            f"no index begins with {column}, and the migration needs one to find the rows of a period;"
            f" CREATE INDEX CONCURRENTLY ON {subject.table} ({in_quotes(column)});"
        )


_LOOKUP = "a lookup table, a plain table of these keys that a trigger fills"


def _unique_without_time(subject: Subject) -> Iterator[str]:
    shape, column, key = subject.shape, subject.spec.column, subject.shape.key_index
    if not _has_time_column(shape):
        return
    for index in shape.indexes:
        if index.primary or not index.unique or index == key or column in index.columns:
            continue
        known = quoted(index.name)
        drop = f"DROP INDEX CONCURRENTLY {quoted(subject.spec.home)}.{known}"
        if index.constraint:
            drop = f"ALTER TABLE {subject.table} DROP CONSTRAINT {known}"
        columns = ", ".join([in_quotes(c) if c else "..." for c in index.columns] + [in_quotes(column)])
        yield (
            f"the unique index {index.name} does not include {column}, so a partitioned table cannot keep it;"
            f" drop it: {drop}; if (..., {column}) may be unique instead, first CREATE UNIQUE INDEX"
            f" CONCURRENTLY ON {subject.table} ({columns}); if not, keep {_LOOKUP}"
        )


def _inbound_fk(subject: Subject) -> Iterator[str]:
    spec = subject.spec
    for child, constraint, local, columns in execute(subject.conn, subject.filled(_INBOUND)).all():
        key = f"table {child} has a foreign key ({constraint}) to {spec}"
        drop = f"drop it first: ALTER TABLE {child} DROP CONSTRAINT {constraint}"
        if spec.column in columns:
            yield f"{key}, and would keep referring to {spec.old}; {drop}; and add it again afterwards"
            continue
        own = ", ".join([*map(in_quotes, local), "..."])
        referred = ", ".join(map(in_quotes, [*columns, spec.column]))
        dropping = "" if spec.retention_days is None else ", which stops retention from dropping partitions"
        yield (
            f"{key}, where ({', '.join(columns)}) alone will not be unique; {drop}; afterwards refer to"
            f" {_LOOKUP}; or make it composite{dropping}: ALTER TABLE {child} ADD FOREIGN KEY ({own})"
            f" REFERENCES {subject.table} ({referred});"
        )


_INBOUND = """
SELECT k.conrelid::regclass::text, quote_ident(k.conname), l.names, a.names
FROM pg_constraint k
CROSS JOIN LATERAL (SELECT array_agg(attname::text ORDER BY n)
                    FROM unnest(k.conkey) WITH ORDINALITY AS u (attnum, n)
                    JOIN pg_attribute USING (attnum) WHERE attrelid = k.conrelid) AS l (names)
CROSS JOIN LATERAL (SELECT array_agg(attname::text ORDER BY n)
                    FROM unnest(k.confkey) WITH ORDINALITY AS u (attnum, n)
                    JOIN pg_attribute USING (attnum) WHERE attrelid = k.confrelid) AS a (names)
WHERE k.confrelid = {oid} AND k.contype = 'f' AND k.conrelid <> {oid} AND k.conparentid = 0
ORDER BY 1, 2
"""


def _invalid_index(subject: Subject) -> Iterator[str]:
    for index in subject.shape.indexes:
        if not index.valid:
            yield f"index {index.name} is invalid; drop it or REINDEX it"


def _exclusion_constraint(subject: Subject) -> Iterator[str]:
    for index in subject.shape.indexes:
        if index.constraint and index.constraint.startswith("EXCLUDE"):
            yield f"the exclusion constraint of {index.name} cannot be partitioned; drop it"


def _unenforced_foreign_key(subject: Subject) -> Iterator[str]:
    for foreign in subject.shape.foreign_keys:
        if foreign.definition.endswith("NOT ENFORCED"):
            yield f"the foreign key {foreign.name} is NOT ENFORCED; drop it, or make it ENFORCED"


def _unvalidated_foreign_key(subject: Subject) -> Iterator[str]:
    for foreign in subject.shape.foreign_keys:
        if not foreign.validated and not foreign.definition.endswith("NOT ENFORCED"):
            yield (
                f"the foreign key {foreign.name} is not validated;"
                f" ALTER TABLE {subject.table} VALIDATE CONSTRAINT {in_quotes(foreign.name)};"
            )


def _no_inherit(subject: Subject) -> Iterator[str]:
    for check in subject.shape.checks:
        if not check.inherited:
            yield (
                f"the {'check' if check.kind == 'c' else 'NOT NULL'} constraint {check.name} is NO INHERIT,"
                " which a partitioned table cannot have; drop it and add it again without NO INHERIT"
            )


def _unvalidated_check(subject: Subject) -> Iterator[str]:
    """Copied rows are checked again; the rows of a table that becomes a partition are not."""
    for check in subject.shape.checks if subject.survey.attaches else ():
        if check.kind == "c" and not check.validated and not check.definition.endswith("NOT ENFORCED"):
            yield (
                f"the check constraint {check.name} is not validated, so the table cannot become a partition;"
                f" ALTER TABLE {subject.table} VALIDATE CONSTRAINT {quoted(check.name)};"
            )
        if check.name == check_name(subject.spec):
            yield f"the migration needs the name of the check constraint {check.name}; rename it"


def _unvalidated_not_null(subject: Subject) -> Iterator[str]:
    for check in subject.shape.checks:
        if check.kind == "n" and check.inherited and not check.validated:
            yield (
                f"the NOT NULL constraint {check.name} is not validated;"
                f" ALTER TABLE {subject.table} VALIDATE CONSTRAINT {in_quotes(check.name)};"
            )


def _policy_reads_table(subject: Subject) -> Iterator[str]:
    # The server prints the tables that it reads with their schema, as only pg_catalog is on the search path.
    schema, table = (re.escape(part.replace('"', '""')) for part in (subject.spec.home, subject.spec.name))
    found = re.compile(rf'(?<![\w$."])"?{schema}"?\."?{table}"?(?![\w$"])')
    for policy in subject.shape.policies:
        if found.search(policy.definition):
            yield (
                f"policy {policy.name} reads {subject.spec} itself, and would keep reading"
                f" {subject.spec.old}; drop it first"
            )


def _too_many_partitions(subject: Subject) -> Iterator[str]:
    found = subject.survey
    if found.partitions > _MOST_PARTITIONS:
        yield (
            f"about {found.partitions:,} partitions are needed from {found.first:%Y-%m-%d} on, and the limit"
            f" is {_MOST_PARTITIONS:,}; keep fewer days, or use partitions longer than the {found.spec.every}"
        )


def _many_partitions(subject: Subject) -> Iterator[str]:
    found, spec = subject.survey, subject.spec
    if found.partitions > _MANY_PARTITIONS:
        if spec.every is Interval.MONTH:
            instead = "keep fewer days, if you can"
        else:
            wider = list(Interval)[list(Interval).index(spec.every) + 1]
            number = replace(found, spec=replace(spec, every=wider)).partitions
            instead = f"with one per {wider} there would be {number:,}"
        yield (
            f"about {found.partitions:,} partitions, one per {spec.every}, and a query without a condition on"
            f" the time scans all of them; {instead}"
        )


_LOCKS = """
SELECT current_setting('max_locks_per_transaction')::bigint
       * (current_setting('max_connections')::bigint + current_setting('max_prepared_transactions')::bigint)
"""


def _lock_table(subject: Subject) -> tuple[int, int]:
    """How many locks it takes to drop or read all partitions, and how many the server has room for."""
    available = execute(subject.conn, sql.SQL(_LOCKS)).scalar_one()
    # A table, its TOAST table and the TOAST index; the parent counts as one more partition.
    return (subject.survey.partitions + 1) * (len(subject.shape.indexes) + 3), available


def _lock_table_too_small(subject: Subject) -> Iterator[str]:
    needed, available = _lock_table(subject)
    if needed > available and subject.survey.partitions <= _MOST_PARTITIONS:
        yield (
            f"{subject.survey.partitions:,} partitions and their indexes need about {needed:,} locks at once,"
            f" and the server has room for {available:,}; raise max_locks_per_transaction"
        )


# --- Rights ---

_DEPENDENT_NOT_OWNED = """
SELECT kind, name, owner FROM (VALUES {dependents}) AS d (kind, name, owner, schema)
WHERE NOT pg_has_role(owner::name, 'USAGE')
"""

_DEPENDENT_SCHEMA = """
SELECT kind, name, schema FROM (VALUES {dependents}) AS d (kind, name, owner, schema)
WHERE NOT has_schema_privilege(schema, 'CREATE') AND schema !~ '^pg_temp'
"""


def _of_the_dependents(subject: Subject, query: str) -> list[tuple[str, str, str]]:
    found = dependents(subject.conn, subject.shape.oid)
    if not found:
        return []
    values = joined(
        [statement("({k}, {n}, {o}, {s}::text)", k=d.kind, n=d.name, o=d.owner, s=d.schema) for d in found]
    )
    rows = execute(subject.conn, statement(query, dependents=values)).all()
    return [(row[0], row[1], row[2]) for row in rows]


def _dependent_not_owned(subject: Subject) -> Iterator[str]:
    for kind, dependent, owner in _of_the_dependents(subject, _DEPENDENT_NOT_OWNED):
        yield (
            f"{kind} {dependent} reads {subject.spec} and belongs to {owner};"
            " connect as a member of that role, so that it can be switched to the new table"
        )


def _dependent_schema(subject: Subject) -> Iterator[str]:
    for kind, dependent, schema in _of_the_dependents(subject, _DEPENDENT_SCHEMA):
        yield (
            f"{kind} {dependent} must be switched to the new table;"
            f" GRANT CREATE ON SCHEMA {in_quotes(schema)} to the role you connect as"
        )


def citus_table(conn: Connection, spec: TableSpec) -> list[Finding]:
    """What Citus manages of the table, if anything: such a table cannot be swapped, in either direction."""
    found = citus.obstacles(conn, spec.home, spec.name, spec.old, spec.new)
    return [Finding("citus-table", text) for text in found]


def _citus_table(subject: Subject) -> Iterator[str]:
    return (finding.text for finding in citus_table(subject.conn, subject.spec))


def _shared_functions(subject: Subject) -> Iterator[str]:
    if reason := distrusted(subject.conn, subject.shape):
        yield reason


_NOT_TO_BECOME = """
SELECT role FROM unnest({roles}::text[]) AS r (role), pg_roles AS me
WHERE me.rolname = current_user AND NOT me.rolsuper
  AND NOT pg_has_role(role::name, CASE WHEN current_setting('server_version_num')::int >= 160000
                                       THEN 'SET' ELSE 'MEMBER' END)
ORDER BY 1
"""


def _other_roles(subject: Subject) -> Iterator[str]:
    shape = subject.shape
    roles = {grant.grantor for grant in shape.grants}
    roles |= {grant.grantor for identity in shape.identities for grant in identity.grants}
    roles |= {shape.owner} | {s.owner for s in shape.statistics}
    for [role] in execute(subject.conn, statement(_NOT_TO_BECOME, roles=sorted(roles))).all():
        yield (
            f"{role} owns objects of {subject.spec} or has granted privileges on them;"
            " connect as a superuser or as a member of that role"
        )


# --- Replication ---


def _anyway(slot: str) -> str:
    return f"; to migrate anyway, if its reader may get rows twice: --accept-duplicates {slot}"


def _slot_sends_all_tables(subject: Subject) -> Iterator[str]:
    home = subject.spec.home
    for sender in subject.senders:
        if sender.publication is None:
            continue
        schema, instead = "", "create the publication again, FOR TABLE and the names of its tables"
        if not sender.all_tables:
            schema = f" of schema {home}"
            instead = (
                f"ALTER PUBLICATION {quoted(sender.publication)} DROP TABLES IN SCHEMA {quoted(home)}, and"
                " ADD TABLE the tables by their names"
            )
        yield (
            f"replication slot {sender.slot} (pgoutput) may be sending publication {sender.publication},"
            f" which publishes all tables{schema}: copied rows would be sent a second time, as rows of"
            f" {subject.spec.new}; {instead}, or drop the slot if nobody needs it: SELECT"
            f" pg_drop_replication_slot('{sender.slot}'){_anyway(sender.slot)}"
        )


def _slot_sends_everything(subject: Subject) -> Iterator[str]:
    for sender in subject.senders:
        if sender.publication is None:
            yield (
                f"replication slot {sender.slot} sends everything written in this database (plugin"
                f" {sender.plugin}): copied rows would be sent a second time, as rows of"
                f" {subject.spec.new}; drop it with SELECT pg_drop_replication_slot('{sender.slot}'), and"
                f" create it again after the migration{_anyway(sender.slot)}"
            )


def sent_again(conn: Connection, spec: TableSpec, now: datetime, accepted: frozenset[str]) -> list[Finding]:
    """The slots that would send what a half-done copy still has to write, except the accepted ones."""
    subject = Subject(conn, Survey(spec, now, 0, 0, None, (), accepted=accepted))
    return [
        *(Finding("slot-sends-all-tables", text) for text in _slot_sends_all_tables(subject)),
        *(Finding("slot-sends-everything", text) for text in _slot_sends_everything(subject)),
    ]


def _no_such_slot(subject: Subject) -> Iterator[str]:
    if accepted := subject.survey.accepted:
        for slot in accepted - slots(subject.conn):
            yield f"there is no logical replication slot {slot} in this database; correct --accept-duplicates"


def _publication_of_partitions(subject: Subject) -> Iterator[str]:
    """A subscriber stops when it gets rows for partitions, which it does not have."""
    for [publication] in execute(subject.conn, subject.filled(_PUBLICATIONS_OF_PARTITIONS)).all():
        yield (
            f"publication {publication} does not publish through the root: after the swap its subscribers"
            f" would get rows of partitions that they do not have, and stop; ALTER PUBLICATION"
            f" {quoted(publication)} SET (publish_via_partition_root = true); it has no effect until then"
        )


_PUBLICATIONS_OF_PARTITIONS = """
SELECT p.pubname::text
FROM pg_publication p
WHERE NOT p.pubviaroot
  AND (p.puballtables
       OR EXISTS (SELECT FROM pg_publication_rel r WHERE r.prpubid = p.oid AND r.prrelid = {oid})
       OR EXISTS (SELECT FROM pg_publication_namespace m JOIN pg_namespace n ON n.oid = m.pnnspid
                  WHERE m.pnpubid = p.oid AND n.nspname = {schema}))
  AND EXISTS (SELECT FROM pg_replication_slots s
              WHERE s.slot_type = 'logical' AND s.plugin = 'pgoutput' AND s.database = current_database()
                AND s.wal_status IS DISTINCT FROM 'lost')
ORDER BY 1
"""

# --- Rows ---


def _example(subject: Subject, condition: Statement, *, with_time: bool) -> str:
    """One of the rows that meet ``condition``: its key, and its time."""
    shape = subject.shape
    keys = [name(c) for c in shape.key]
    shown = execute(
        subject.conn,
        statement(
            # Without OFFSET 0 the server might scan the whole key for the first such row.
            "SELECT {shown} FROM (SELECT * FROM {table} WHERE {condition} OFFSET 0) AS r"
            " ORDER BY {order} LIMIT 1",
            shown=joined([statement("r.{c}::text", c=c) for c in [*keys, shape.time_column]]),
            table=name(shape.schema, shape.name),
            condition=condition,
            order=joined(keys or [shape.time_column]),
        ),
    ).one()
    *key, time = shown
    parts = [f"{column} {value}" for column, value in zip(shape.key, key, strict=True)]
    if (with_time and time is not None) or not parts:
        parts.append(str(time))
    return ", ".join(parts)


def _count(subject: Subject, condition: Statement) -> int:
    table = name(subject.shape.schema, subject.shape.name)
    query = statement("SELECT count(*) FROM {table} WHERE {condition}", table=table, condition=condition)
    return int(execute(subject.conn, query).scalar_one())


def _rows_without_a_place(subject: Subject) -> Iterator[str]:
    """Rows whose time fits no partition, except those that are merely too old to be copied."""
    column, end = subject.shape.time_column, subject.survey.end
    last_day = end - timedelta(days=1)
    for what, condition in (
        ("is NULL", statement("{c} IS NULL", c=column)),
        ("is infinite", statement("{c} IN ('infinity', '-infinity')", c=column)),
        (
            f"lies after {last_day:%Y-%m-%d}, the last day with a partition",
            statement("{c} >= {end} AND {c} <> 'infinity'", c=column, end=subject.shape.instant(end)),
        ),
    ):
        if rows := _count(subject, condition):
            example = _example(subject, condition, with_time=True)
            yield (
                f"the {subject.spec.column} of {_rows(rows)} {what}"
                f" (for example {example}); correct or delete them"
            )


def _rows_against_checks(subject: Subject) -> Iterator[str]:
    """A check that was never validated has ignored old rows, but applies to each one that is copied."""
    shape = subject.shape
    for check in shape.checks:
        if check.validated or check.kind != "c" or check.definition.endswith("NOT ENFORCED"):
            continue
        condition = statement(
            "{c} >= {cutoff} AND NOT ({check})",
            c=shape.time_column,
            cutoff=shape.instant(subject.survey.cutoff),
            check=sql.SQL(check.expression or "true"),
        )
        if rows := _count(subject, condition):
            example = _example(subject, condition, with_time=False)
            yield (
                f"{_rows(rows)} to be copied (for example {example}) would fail the check constraint"
                f" {check.name}, which was never validated; correct them, or drop it"
            )


def _rows(rows: int) -> str:
    return f"{rows:,} row{'s' if rows > 1 else ''}"


# --- Warnings ---


def _lock_table_nearly_full(subject: Subject) -> Iterator[str]:
    needed, available = _lock_table(subject)
    if available // 2 < needed <= available:
        yield (
            f"a query over all partitions locks about {needed:,} objects, and there is room for"
            f" {available:,}; raise max_locks_per_transaction"
        )


def _ctid_idiom(subject: Subject) -> Iterator[str]:
    shape = subject.shape
    for text in subject.texts:
        if idioms.uses_ctid(text, shape):
            yield (
                f"{text.where} finds rows of {subject.spec} by ctid, and ctids repeat across partitions:"
                " DELETE or UPDATE WHERE ctid IN (SELECT ctid ...) would hit the wrong rows; use the"
                f" key: ({', '.join(shape.new_key)}) IN (SELECT {', '.join(shape.new_key)} ...)"
            )


def _on_conflict(subject: Subject) -> Iterator[str]:
    shape = subject.shape
    for text in subject.texts:
        if target := idioms.conflict_target(text, shape):
            yield (
                f"{text.where} says ON CONFLICT {target}, and only ({', '.join(shape.new_key)}) will be"
                f" unique: it will fail, or miss a row with another {subject.spec.column}; name all columns"
            )


def _serial_sequence(subject: Subject) -> Iterator[str]:
    shape = subject.shape
    if not any(not sequence.identity for sequence in shape.sequences):
        return
    for text in subject.texts:
        if idioms.asks_for_sequence(text, shape):
            names = " or ".join(f"'{s.schema}.{s.name}'" for s in shape.sequences if not s.identity)
            yield (
                f"{text.where} calls pg_get_serial_sequence, which returns NULL from the swap until finalize,"
                f" while both tables use the sequence; use INSERT ... RETURNING, or currval({names})"
            )


def _repeatable_read(subject: Subject) -> Iterator[str]:
    for whose in idioms.repeatable_read(subject.conn):
        yield (
            f"{whose} defaults to REPEATABLE READ or SERIALIZABLE transactions: one that is open at the swap"
            " makes it wait, and one that waits for the swap may fail with 40001 and must be retried"
        )


def _scheduled_delete(subject: Subject) -> Iterator[str]:
    """pg_cron jobs that delete from the table, if pg_cron is installed and shows them."""
    jobs = scheduled_jobs(subject.conn)
    if jobs is None:
        return
    query = statement(
        "SELECT jobid, command FROM {job} WHERE command ~* {deletes} ORDER BY 1",
        job=jobs,
        deletes=_deletes_from(subject.spec),
    )
    for job, command in execute(subject.conn, query).all():
        yield f"pg_cron's job {job} deletes from {subject.spec} ({command}); unschedule it"


# A role that may not see the queries of others gets fewer warnings.
_SESSION = "coalesce(nullif(application_name, ''), usename, 'unknown')"

CHECKS: tuple[Check, ...] = (
    # --- Where things stand ---
    Check(
        "old-server",
        Kind.SITUATION,
        """
SELECT format('PostgreSQL 15 or later is needed, and this server is %s', version / 10000)
FROM (SELECT current_setting('server_version_num')::int) AS s (version) WHERE version < 150000""",
    ),
    Check(
        "standby",
        Kind.SITUATION,
        "SELECT 'this server is a standby; connect to the primary' WHERE pg_is_in_recovery()",
    ),
    Check(
        "already-migrated",
        Kind.SITUATION,
        _earlier(Phase.MIGRATED, text="{t} is migrated already; see {status}"),
    ),
    Check(
        "being-finalized",
        Kind.SITUATION,
        _earlier(
            Phase.FINALIZING,
            text="{t} is migrated, and finalize was interrupted; finish with: {finalize}",
        ),
    ),
    Check(
        "being-undone",
        Kind.SITUATION,
        _earlier(
            Phase.RETURNING,
            Phase.UNDONE,
            text="a migration begun at {begun:%Y-%m-%d %H:%M} UTC is being undone; finish with: {rollback}",
        ),
    ),
    Check(
        "half-done",
        Kind.SITUATION,
        _earlier(
            Phase.BUILT,
            Phase.COPYING,
            Phase.READY,
            text="a migration begun at {begun:%Y-%m-%d %H:%M} UTC is half done ({phase});"
            " carry on with: {migrate} --resume; or undo it with: {rollback}",
        ),
    ),
    Check("old-table-exists", Kind.SITUATION, _old_table_exists),
    Check("no-table", Kind.SITUATION, _no_table),
    Check("already-partitioned", Kind.SITUATION, _already_partitioned),
    Check(
        "not-ordinary-table",
        Kind.SITUATION,
        """
SELECT format('%s is not an ordinary table (it is unlogged, temporary, a view, or uses inheritance)', {name})
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = {schema} AND c.relname = {name} AND c.relkind <> 'p'
  AND (c.relkind <> 'r' OR c.relpersistence <> 'p'
       OR EXISTS (SELECT FROM pg_inherits WHERE inhparent = c.oid OR inhrelid = c.oid))""",
    ),
    # --- Names ---
    Check("name-too-long", Kind.STRUCTURE, _name_too_long),
    Check("names-taken", Kind.STRUCTURE, _names_taken),
    Check("name-with-dollars", Kind.STRUCTURE, _name_with_dollars),
    Check("key-type", Kind.STRUCTURE, _key_type),
    # --- Rights ---
    Check(
        "not-owner",
        Kind.STRUCTURE,
        """
SELECT format('role %s does not own %s; connect as its owner %s or a member of it', current_user, {name},
              pg_get_userbyid(relowner))
FROM pg_class WHERE oid = {oid} AND NOT pg_has_role(relowner, 'USAGE')""",
    ),
    Check(
        "no-create-on-schema",
        Kind.STRUCTURE,
        """
SELECT format('role %s may not create tables in schema %s; GRANT CREATE ON SCHEMA %I TO %I', current_user,
              {schema}, {schema}, current_user)
FROM pg_class WHERE oid = {oid} AND NOT has_schema_privilege(relnamespace, 'CREATE')""",
    ),
    Check(
        "owner-cannot-create",
        Kind.STRUCTURE,
        """
SELECT format('%s, who owns %s and will own its partitions, may not create tables in its schema;'
              ' GRANT CREATE ON SCHEMA %I TO %I', pg_get_userbyid(relowner), {name}, {schema},
              pg_get_userbyid(relowner))
FROM pg_class c, pg_roles me
WHERE c.oid = {oid} AND me.rolname = current_user AND NOT me.rolsuper
  AND NOT has_schema_privilege(c.relowner, c.relnamespace, 'CREATE')""",
    ),
    Check(
        "owner-without-usage",
        Kind.STRUCTURE,
        """
SELECT format('%s, who owns %s, may not use its schema, and the note triggers run as the owner;'
              ' GRANT USAGE ON SCHEMA %I TO %I', pg_get_userbyid(relowner), {name}, {schema},
              pg_get_userbyid(relowner))
FROM pg_class WHERE oid = {oid} AND NOT has_schema_privilege(relowner, relnamespace, 'USAGE')""",
    ),
    Check(
        "no-references",
        Kind.STRUCTURE,
        """
SELECT format('role %s may not refer to %s; GRANT REFERENCES ON %s TO %I', current_user,
              confrelid::regclass, confrelid::regclass, current_user)
FROM (SELECT DISTINCT confrelid FROM pg_constraint WHERE conrelid = {oid} AND contype = 'f') AS k
WHERE NOT has_any_column_privilege(confrelid, 'REFERENCES')""",
    ),
    Check(
        "owner-without-delete",
        Kind.STRUCTURE,
        """
SELECT format('%s, who owns %s, may not delete its rows, and copies of rows are deleted as the owner;'
              ' GRANT DELETE ON %s TO %I', pg_get_userbyid(relowner), {name}, {table},
              pg_get_userbyid(relowner))
FROM pg_class c
WHERE oid = {oid} AND NOT has_table_privilege(relowner, oid, 'DELETE')
  AND EXISTS (SELECT FROM pg_constraint WHERE conrelid = c.oid AND contype = 'f')""",
    ),
    Check("other-roles", Kind.STRUCTURE, _other_roles),
    Check("citus-table", Kind.STRUCTURE, _citus_table),
    Check("shared-functions", Kind.STRUCTURE, _shared_functions),
    Check("dependent-not-owned", Kind.STRUCTURE, _dependent_not_owned),
    Check("dependent-schema", Kind.STRUCTURE, _dependent_schema),
    Check(
        "trigger-function",
        Kind.STRUCTURE,
        """
SELECT DISTINCT format('role %s may not call %s, the function of a trigger;'
              ' GRANT EXECUTE ON FUNCTION %s TO %I', current_user, t.tgfoid::regprocedure,
              t.tgfoid::regprocedure, current_user)
FROM pg_trigger t
WHERE t.tgrelid = {oid} AND NOT t.tgisinternal AND NOT has_function_privilege(t.tgfoid, 'EXECUTE')""",
    ),
    Check(
        "forced-row-security",
        Kind.STRUCTURE,
        """
SELECT format('role %s is bound by row security (it is forced on %s) and would not see every row;'
              ' connect as a superuser, or ALTER ROLE %I BYPASSRLS', current_user, {name}, current_user)
FROM pg_class c, pg_roles r
WHERE c.oid = {oid} AND c.relrowsecurity AND c.relforcerowsecurity
  AND r.rolname = current_user AND NOT r.rolsuper AND NOT r.rolbypassrls""",
    ),
    # --- Columns, keys, indexes, constraints ---
    Check("no-time-column", Kind.STRUCTURE, _no_time_column),
    Check("time-column-type", Kind.STRUCTURE, _time_column_type),
    Check("no-key", Kind.STRUCTURE, _no_key),
    Check("no-time-index", Kind.STRUCTURE, _no_time_index),
    Check("unique-without-time", Kind.STRUCTURE, _unique_without_time),
    Check("invalid-index", Kind.STRUCTURE, _invalid_index),
    Check("exclusion-constraint", Kind.STRUCTURE, _exclusion_constraint),
    Check("foreign-key-not-enforced", Kind.STRUCTURE, _unenforced_foreign_key),
    Check("foreign-key-not-validated", Kind.STRUCTURE, _unvalidated_foreign_key),
    Check("no-inherit", Kind.STRUCTURE, _no_inherit),
    Check("not-null-not-validated", Kind.STRUCTURE, _unvalidated_not_null),
    Check("check-not-validated", Kind.STRUCTURE, _unvalidated_check),
    Check("too-many-partitions", Kind.STRUCTURE, _too_many_partitions),
    Check("lock-table-too-small", Kind.STRUCTURE, _lock_table_too_small),
    # --- What refers to the table ---
    Check("inbound-fk", Kind.STRUCTURE, _inbound_fk),
    Check(
        "self-fk",
        Kind.STRUCTURE,
        """
SELECT format('the foreign key %s of %s refers to %s itself; drop it first: ALTER TABLE %s'
              ' DROP CONSTRAINT %I', conname, {name}, {name}, {table}, conname)
FROM pg_constraint WHERE confrelid = {oid} AND contype = 'f' AND conrelid = {oid}""",
    ),
    Check(
        "materialized-view",
        Kind.STRUCTURE,
        """
SELECT DISTINCT format('materialized view %s reads %s and would keep reading %s;'
              ' drop it, and create it again after the migration', c.oid::regclass, {name}, {old})
FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid JOIN pg_class c ON c.oid = r.ev_class
WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass
  AND d.refobjid = {oid} AND c.relkind = 'm'""",
    ),
    Check(
        # From PostgreSQL 16 on, statistics map the number in the schema's name to a pid. Before that, locks
        # identify a session with an open transaction; otherwise all sessions of the view's owner qualify.
        "temp-view",
        Kind.STRUCTURE,
        r"""
SELECT format('temporary view %I.%I of another session reads %s, and cannot be switched to the new table;'
              ' have that session drop it, or %s', v.nspname, v.relname, {name},
              CASE cardinality(p.pids)
              WHEN 1 THEN format('end the session: SELECT pg_terminate_backend(%s)', p.pids[1])
              ELSE coalesce(format('end the session, which is one of the pids %s',
                                   array_to_string(p.pids, ', ')),
                            format('DROP VIEW %I.%I, as that session has crashed', v.nspname, v.relname)) END)
FROM (SELECT DISTINCT n.nspname, c.relname, c.relowner
      FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid JOIN pg_class c ON c.oid = r.ev_class
      JOIN pg_namespace n ON n.oid = c.relnamespace
      WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass
        AND d.refobjid = {oid} AND c.relpersistence = 't') AS v
CROSS JOIN LATERAL (SELECT CASE WHEN current_setting('server_version_num')::int >= 160000 THEN
    (SELECT array_agg(pg_stat_get_backend_pid(i)) FROM pg_stat_get_backend_idset() AS i
     WHERE i::text = substring(v.nspname FROM '\d+$'))
    ELSE coalesce(
        (SELECT array_agg(DISTINCT pid) FROM pg_locks
         WHERE split_part(virtualtransaction, '/', 1) = substring(v.nspname FROM '\d+$') AND pid IS NOT NULL),
        (SELECT array_agg(pid ORDER BY pid) FROM pg_stat_activity
         WHERE usesysid = v.relowner AND datname = current_database() AND backend_type = 'client backend'
           AND pid <> pg_backend_pid()))
    END) AS p (pids)""",
    ),
    Check(
        "groups-by-key",
        Kind.STRUCTURE,
        """
SELECT DISTINCT format('%s groups by the primary key of %s alone, which will be (%s); make it group by each'
              ' column that it returns', pg_describe_object('pg_class'::regclass, r.ev_class, 0), {name},
              {new_key})
FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid
JOIN pg_constraint k ON k.oid = d.refobjid AND k.conrelid = {oid}
WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_constraint'::regclass
  AND NOT EXISTS (SELECT FROM pg_attribute a
                  WHERE a.attrelid = {oid} AND a.attnum = ANY (k.conkey) AND a.attname = {column})""",
    ),
    Check(
        "row-type",
        Kind.STRUCTURE,
        """
SELECT DISTINCT format('%s uses the row type of %s, which would stay with %s; drop it,'
              ' and create it again after the migration', pg_describe_object(d.classid, d.objid, d.objsubid),
              {name}, {old})
FROM pg_depend d JOIN pg_type t ON t.typrelid = {oid}
WHERE d.refclassid = 'pg_type'::regclass AND d.refobjid IN (t.oid, t.typarray) AND d.deptype <> 'i'""",
    ),
    Check("policy-reads-table", Kind.STRUCTURE, _policy_reads_table),
    Check(
        "transition-tables",
        Kind.STRUCTURE,
        """
SELECT format('row trigger %s has transition tables, which partitions do not support;'
              ' make it a statement trigger, or drop it', tgname)
FROM pg_trigger
WHERE tgrelid = {oid} AND NOT tgisinternal AND tgtype & 1 <> 0
  AND (tgoldtable IS NOT NULL OR tgnewtable IS NOT NULL)""",
    ),
    Check(
        "unknown-dependent",
        Kind.STRUCTURE,
        """
SELECT DISTINCT format('%s depends on %s in a way that the migration cannot handle; drop it first',
                       pg_describe_object(d.classid, d.objid, d.objsubid), {name})
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
           AND EXISTS (SELECT FROM pg_class WHERE oid = d.objid AND relkind IN ('i', 'S', 't')))""",
    ),
    # --- Replication ---
    Check(
        "subscription",
        Kind.STRUCTURE,
        """
SELECT format('subscription %s writes into %s, and would not find the new table; drop the subscription first',
              s.subname, {name})
FROM pg_subscription_rel r JOIN pg_subscription s ON s.oid = r.srsubid WHERE r.srrelid = {oid}""",
    ),
    Check(
        "publication-of-a-part",
        Kind.STRUCTURE,
        """
SELECT format('publication %s publishes some columns or rows of %s, which it can do for a'
              ' partitioned table only through the root;'
              ' ALTER PUBLICATION %I SET (publish_via_partition_root = true)',
              p.pubname, {name}, p.pubname)
FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
WHERE r.prrelid = {oid} AND NOT p.pubviaroot AND (r.prattrs IS NOT NULL OR r.prqual IS NOT NULL)""",
    ),
    Check("slot-sends-all-tables", Kind.STRUCTURE, _slot_sends_all_tables),
    Check("slot-sends-everything", Kind.STRUCTURE, _slot_sends_everything),
    Check("no-such-slot", Kind.STRUCTURE, _no_such_slot),
    Check("publication-of-partitions", Kind.STRUCTURE, _publication_of_partitions),
    Check(
        "replica-identity-index",
        Kind.STRUCTURE,
        """
SELECT format('the replica identity of %s is an index, which its partitions do not inherit;'
              ' ALTER TABLE %s REPLICA IDENTITY FULL, or DEFAULT to use the primary key', {name}, {table})
FROM pg_class WHERE oid = {oid} AND relreplident = 'i'""",
    ),
    # --- What a partitioned table cannot be, or chronos does not support ---
    Check(
        "typed-table",
        Kind.STRUCTURE,
        """
SELECT format('%s is a table of the composite type %s; ALTER TABLE %s NOT OF first', {name},
              reloftype::regtype, {table})
FROM pg_class WHERE oid = {oid} AND reloftype <> 0""",
    ),
    Check(
        "access-method",
        Kind.STRUCTURE,
        """
SELECT format('%s uses the access method %s; only heap is supported', {name}, a.amname)
FROM pg_class c JOIN pg_am a ON a.oid = c.relam WHERE c.oid = {oid} AND a.amname <> 'heap'""",
    ),
    Check(
        "extension-member",
        Kind.STRUCTURE,
        """
SELECT format('%s belongs to or depends on an extension; ALTER EXTENSION ... DROP, or NO DEPENDS ON EXTENSION'
              ' first', pg_describe_object(d.classid, d.objid, 0))
FROM pg_depend d
WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype IN ('e', 'x')
  AND (d.classid = 'pg_class'::regclass
       AND d.objid IN (SELECT {oid}::oid UNION SELECT indexrelid FROM pg_index WHERE indrelid = {oid})
       OR d.classid = 'pg_trigger'::regclass
          AND d.objid IN (SELECT oid FROM pg_trigger WHERE tgrelid = {oid}))""",
    ),
    Check(
        "security-label",
        Kind.STRUCTURE,
        """
SELECT format('%s has a security label (%s); remove it first',
              pg_describe_object(classoid, objoid, objsubid), provider)
FROM pg_seclabel WHERE classoid = 'pg_class'::regclass AND objoid = {oid}""",
    ),
    Check(
        "statistics-elsewhere",
        Kind.STRUCTURE,
        """
SELECT format('extended statistics %s are in another schema; ALTER STATISTICS %s SET SCHEMA %I',
              s.stxname, s.stxnamespace::regnamespace || '.' || quote_ident(s.stxname), {schema})
FROM pg_statistic_ext s JOIN pg_class c ON c.oid = s.stxrelid
WHERE s.stxrelid = {oid} AND s.stxnamespace <> c.relnamespace""",
    ),
    # --- Rows ---
    Check("rows-without-a-place", Kind.ROWS, _rows_without_a_place),
    Check("rows-against-check", Kind.ROWS, _rows_against_checks),
    # --- Warnings ---
    Check(
        "long-transaction",
        Kind.WARNING,
        f"""
SELECT format('pid %s (%s) has had a transaction open for %s s; the swap may have to wait until it ends', pid,
              {_SESSION}, extract(epoch FROM now() - xact_start)::int)
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
  AND xact_start < now() - '30 seconds'::interval""",
    ),
    Check(
        "prepared-transaction",
        Kind.WARNING,
        """
SELECT format('a prepared transaction (%s) has been open since %s UTC; the swap may have to wait for it', gid,
              to_char(prepared, 'YYYY-MM-DD HH24:MI'))
FROM pg_prepared_xacts WHERE database = current_database()""",
    ),
    Check(
        "replica-lag",
        Kind.WARNING,
        """
SELECT format('replica %s is %s behind; the copy adds to that',
              coalesce(nullif(application_name, ''), 'unknown'),
              pg_size_pretty(pg_wal_lsn_diff(pg_current_wal_lsn(), replay_lsn)))
FROM pg_stat_replication""",
    ),
    Check(
        "slot-keeps-wal",
        Kind.WARNING,
        """
SELECT format('replication slot %s is %s and keeps %s of WAL; it would also keep what the copy writes',
              slot_name, CASE WHEN active THEN 'active' ELSE 'inactive' END,
              pg_size_pretty(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)))
FROM pg_replication_slots WHERE restart_lsn IS NOT NULL""",
    ),
    Check(
        "archive-mode",
        Kind.WARNING,
        """
SELECT 'archive_mode is on: all WAL of the copy goes to the archive'
WHERE current_setting('archive_mode') <> 'off'""",
    ),
    Check(
        "vacuum-running",
        Kind.WARNING,
        """
SELECT format('pid %s is vacuuming %s; the swap has to wait for it', pid, {name})
FROM pg_stat_progress_vacuum WHERE relid = {oid}""",
    ),
    Check(
        "rows-deleted",
        Kind.WARNING,
        """
SELECT format('%s rows were deleted from %s since its statistics were last reset: stop the job that deletes'
              ' before the migration; retention drops whole partitions afterwards', n_tup_del, {name})
FROM pg_stat_user_tables WHERE relid = {oid} AND n_tup_del > 0""",
    ),
    Check(
        "delete-running",
        Kind.WARNING,
        f"""
SELECT format('pid %s (%s) is deleting from %s now', pid, {_SESSION}, {{name}})
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND state <> 'idle'
  AND query ~* {{deletes}}""",
    ),
    Check("scheduled-delete", Kind.WARNING, _scheduled_delete),
    Check(
        "trigger-sees-partition",
        Kind.WARNING,
        r"""
SELECT DISTINCT format('the function %s of row trigger %s uses the name or OID of its table, which will be'
              ' that of a partition', t.tgfoid::regprocedure, t.tgname)
FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
WHERE t.tgrelid = {oid} AND NOT t.tgisinternal AND t.tgtype & 1 <> 0
  AND p.prosrc ~* '\m(tg_table_name|tg_relname|tg_relid)\M'""",
    ),
    Check("ctid-idiom", Kind.WARNING, _ctid_idiom),
    Check("on-conflict", Kind.WARNING, _on_conflict),
    Check("serial-sequence", Kind.WARNING, _serial_sequence),
    Check("repeatable-read", Kind.WARNING, _repeatable_read),
    Check(
        "publication-of-all-tables",
        Kind.WARNING,
        """
SELECT format('publication %s publishes all tables%s, including %s, the partitions and the tables that'
              ' chronos keeps', pubname, CASE WHEN puballtables THEN '' ELSE ' of this schema' END, {old})
FROM pg_publication p
WHERE puballtables OR EXISTS (SELECT FROM pg_publication_namespace n
                              WHERE n.pnpubid = p.oid AND n.pnnspid = quote_ident({schema})::regnamespace)""",
    ),
    Check("many-partitions", Kind.WARNING, _many_partitions),
    Check("lock-table-nearly-full", Kind.WARNING, _lock_table_nearly_full),
)
