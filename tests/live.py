"""A live table: an application that knows what the table must hold, and readers that rely on it.

    loaded = load(url, 4_000, key_type="uuid")
    with Application(url, loaded) as application, Readers(url, loaded, application) as readers:
        ...  # whatever is done to the table
    assert readers.short == [] and readers.errors == [] and application.errors == []
    assert not application.compare(url)

`load` creates a webhook_log, `fill` fills the table of any other `Schema`. Two thirds of the rows are never
touched again, so readers know how many there are; the others, and all rows that the application itself
inserts, belong to it.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

import psycopg2
from psycopg2.errorcodes import FEATURE_NOT_SUPPORTED
from psycopg2.extensions import connection, cursor
from psycopg2.extras import Json, execute_values
from sqlalchemy.engine import make_url

from tests.tables import query
from tests.waiting import wait_until

KeyType = Literal["serial", "identity", "identity always", "uuid"]
TimestampType = Literal["timestamptz", "timestamp"]
TimeType = Literal[TimestampType, "date"]
# One value, or one for each column of the key.
Key = Any
# What the application has written into a row, by column: every column its schema names. Times are aware, UTC.
Row = dict[str, Any]
# How to make a value.
Make = Callable[[random.Random], Any]
Kind = Literal["count", "key", "newest", "repeatable"]

KINDS: tuple[Kind, ...] = ("count", "key", "newest", "repeatable")

# The initial rows refer to one of this many.
PARENTS = 10
_SETTLE_S = 60.0
_RECONNECT_PAUSE_S = 0.02


class Days(NamedTuple):
    """Ages of rows, in days: those ``loaded`` first, those that readers count, those that the application
    owns, and how far ahead it writes, as some clocks do.

    No cutoff comes near a counted row, not even when midnight passes; there are partitions for the days
    ahead.
    """

    loaded: float = 20
    counted: float = 14
    owned: float = 12
    ahead: float = 2


DAYS = Days()


class Marks(NamedTuple):
    """The marks that distinguish rows, in one column that every row has.

    ``kept`` rows are inserted by the application and never touched again; its other rows have none of the
    three marks.
    """

    untouched: Any = "untouched"
    stock: Any = "stock"
    kept: Any = "kept"


MARKS = Marks()


class Parent(NamedTuple):
    """The table that a ``column`` of the rows references by foreign key.

    Its first rows, 1 to PARENTS, stay; ``insert`` adds one and returns its key. Some rows reference none,
    unless it is ``required``.
    """

    column: str
    table: str
    insert: str
    key: str = "id"
    required: bool = True


@dataclass(frozen=True)
class Schema:
    """A table as its application knows it: ``name`` is as you type it, with schema and quotes.

    ``makes`` says how to make the value of each column that the application writes, including those of the
    key and ``mark``, but not the ``time`` column and the parent's. ``given`` keys come from the server when
    an insert omits them. ``kind`` is the type of the time column, ``precision`` its decimals.
    """

    name: str
    key: tuple[str, ...]
    time: str
    mark: str
    makes: Mapping[str, Make]
    given: bool = False
    kind: TimeType = "timestamptz"
    precision: int = 6
    marks: Marks = MARKS
    parent: Parent | None = None
    days: Days = DAYS

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns of a row, without those that belong only to the key."""
        parent = (self.parent.column,) if self.parent else ()
        return (self.time, *(c for c in self.makes if c not in self.key), *parent)

    @property
    def dated_key(self) -> bool:
        """Whether the key includes the time column: a row with a new time is then another row."""
        return self.time in self.key

    @property
    def touched(self) -> tuple[str, ...]:
        """The columns that a short update sets: the mark, and the next one in ``makes``."""
        others = [column for column in self.makes if column not in (self.mark, *self.key)]
        return (self.mark, *others[:1])

    @property
    def listed(self) -> str:
        """The columns of a row, as SQL."""
        return ", ".join(map(_quoted, self.columns))

    @property
    def key_columns(self) -> str:
        """The columns of the key, as SQL."""
        return ", ".join(map(_quoted, self.key))

    @property
    def by_key(self) -> str:
        """The condition that finds one row; its placeholders take the values of ``key_values``."""
        return " AND ".join(f"{_quoted(column)} = %s" for column in self.key)

    def prepared_by_key(self, first: int = 1) -> str:
        """``by_key`` for PREPARE, with the parameters from ``first`` on."""
        return " AND ".join(f"{_quoted(column)} = ${n}" for n, column in enumerate(self.key, first))

    def key_values(self, key: Key) -> tuple[Any, ...]:
        """The values of a key, one for each column."""
        return key if len(self.key) > 1 else (key,)

    def key_of(self, values: Iterable[Any]) -> Key:
        """The reverse of ``key_values``."""
        found = tuple(map(_plain, values))
        return found if len(self.key) > 1 else found[0]

    def new_key(self, chance: random.Random, at: Any) -> Key:
        """An unused key, for a row at the time ``at``."""
        return self.key_of(at if column == self.time else self.makes[column](chance) for column in self.key)

    def redated(self, key: Key, at: Any) -> Key:
        """The key of the same row, once its time is ``at``."""
        values = zip(self.key, self.key_values(key), strict=True)
        return self.key_of(at if column == self.time else value for column, value in values)

    def value(self, at: datetime) -> datetime | date:
        """An instant as the time column stores it."""
        if self.kind == "date":
            return at.date()
        return at - timedelta(microseconds=at.microsecond % 10 ** (6 - self.precision))

    def instant(self, row: Row) -> datetime:
        """The reverse of ``value``, for a row."""
        found = row[self.time]
        if isinstance(found, datetime):
            return found
        return datetime(found.year, found.month, found.day, tzinfo=UTC)

    def row(self, values: Iterable[Any]) -> Row:
        """A row from what the server returns for ``columns``."""
        return dict(zip(self.columns, map(_plain, values), strict=True))

    def values(self, row: Row) -> tuple[Any, ...]:
        """The reverse of ``row``, for the parameters of a statement."""
        return tuple(_for_server(row[column]) for column in self.columns)


def _quoted(identifier: str) -> str:
    return f'"{identifier}"'


def _plain(value: Any) -> Any:
    if isinstance(value, memoryview):
        return bytes(value)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC)
    return value


def _for_server(value: Any) -> Any:
    return Json(value) if isinstance(value, dict) else value


def _body(chance: random.Random) -> dict[str, Any] | None:
    """Small, absent, or large enough to be TOASTed."""
    which = chance.random()
    if which < 0.1:
        return None
    size = 4_000 if which < 0.2 else 20
    return {"text": chance.randbytes(size).hex()}


def any_uuid(chance: random.Random) -> str:
    """A version 4 uuid."""
    return str(uuid.UUID(int=chance.getrandbits(128), version=4))


def any_bigint(chance: random.Random) -> int:
    """A number far beyond any from a sequence, and practically unique."""
    return chance.randrange(10**9, 10**18)


_KEY_TYPES: dict[KeyType, str] = {
    "serial": "bigserial",
    "identity": "bigint GENERATED BY DEFAULT AS IDENTITY",
    "identity always": "bigint GENERATED ALWAYS AS IDENTITY",
    "uuid": "uuid DEFAULT gen_random_uuid()",
}

_TABLES = """
CREATE TABLE webhook_endpoint (id bigserial PRIMARY KEY, url text NOT NULL);
INSERT INTO webhook_endpoint (url) SELECT 'https://example.com/' || n FROM generate_series(1, {parents}) n;
CREATE TABLE webhook_log (
    id {key_type} NOT NULL,
    request_headers jsonb,
    request_body jsonb,
    response_headers jsonb,
    response_body jsonb,
    status text NOT NULL,
    status_code integer,
    "timestamp" {timestamp_type} NOT NULL,
    webhook_endpoint_id bigint
);
INSERT INTO webhook_log (request_body, status, status_code, "timestamp", webhook_endpoint_id)
SELECT jsonb_build_object('n', n, 'text', repeat(md5(n::text), {width})),
       CASE WHEN n % 3 = 0 AND age < {owned} THEN 'stock' ELSE 'untouched' END,
       200, now() - age * interval '1 day', 1 + n % {parents}
FROM generate_series(1, {rows}) n
CROSS JOIN LATERAL (SELECT ({rows} - n) * {days}::float8 / {rows} AS age) AS spread;
ALTER TABLE webhook_log ADD CONSTRAINT webhook_log_pkey PRIMARY KEY (id);
CREATE INDEX ix_webhook_log_timestamp ON webhook_log ("timestamp");
CREATE INDEX ix_webhook_log_webhook_endpoint_id ON webhook_log (webhook_endpoint_id);
ALTER TABLE webhook_log ADD CONSTRAINT webhook_log_webhook_endpoint_id_fkey
    FOREIGN KEY (webhook_endpoint_id) REFERENCES webhook_endpoint (id);
ANALYZE webhook_log;
"""


def webhook_log(key_type: KeyType = "serial", timestamp_type: TimestampType = "timestamptz") -> Schema:
    """The schema that `load` creates."""
    return Schema(
        name="webhook_log",
        key=("id",),
        time="timestamp",
        mark="status",
        makes={
            "id": any_uuid if key_type == "uuid" else any_bigint,
            "status": lambda chance: chance.choice(("open", "sent", "failed")),
            "status_code": lambda chance: chance.randint(200, 599),
            "request_body": _body,
        },
        given=True,
        kind=timestamp_type,
        parent=Parent(
            "webhook_endpoint_id",
            "webhook_endpoint",
            "INSERT INTO webhook_endpoint (url) VALUES ('https://example.com') RETURNING id",
            required=False,
        ),
    )


@dataclass(frozen=True)
class Loaded:
    """The initial rows: ``untouched`` ones stay as they are, ``stock`` belongs to the application.

    ``since`` is the instant from which untouched rows are counted.
    """

    schema: Schema
    since: datetime
    untouched: dict[Key, Row]
    stock: dict[Key, Row]

    def counted(self) -> list[Key]:
        """The keys of the untouched rows from ``since`` on."""
        return [key for key, row in self.untouched.items() if self.schema.instant(row) >= self.since]


def load(
    url: str,
    rows: int,
    *,
    key_type: KeyType = "serial",
    timestamp_type: TimestampType = "timestamptz",
    days: float = 20,
    width: int = 8,
) -> Loaded:
    """Create webhook_endpoint and webhook_log: ``rows`` rows of ``width`` x 32 bytes over ``days`` days."""
    schema = webhook_log(key_type, timestamp_type)
    script = _TABLES.format(
        key_type=_KEY_TYPES[key_type],
        timestamp_type=timestamp_type,
        rows=rows,
        days=days,
        width=width,
        owned=schema.days.owned,
        parents=PARENTS,
    )
    with _connect(url) as session, session.cursor() as cur:
        cur.execute(script)
        loaded = _loaded(cur, schema)
    session.close()
    return loaded


def fill(url: str, schema: Schema, rows: int, *, seed: int = 1) -> Loaded:
    """Write ``rows`` rows, over the days that the schema says, into its existing, empty table."""
    chance = random.Random(seed)
    now = datetime.now(UTC)
    keys = () if schema.given else tuple(column for column in schema.key if column != schema.time)
    made = []
    for n in range(1, rows + 1):
        age = (rows - n) * schema.days.loaded / rows
        row = {column: schema.makes[column](chance) for column in schema.columns if column in schema.makes}
        row[schema.time] = schema.value(now - timedelta(days=age))
        row[schema.mark] = (
            schema.marks.stock if n % 3 == 0 and age < schema.days.owned else schema.marks.untouched
        )
        if schema.parent:
            row[schema.parent.column] = 1 + n % PARENTS
        made.append((*(_for_server(schema.makes[column](chance)) for column in keys), *schema.values(row)))
    with _connect(url) as session, session.cursor() as cur:
        listed = ", ".join(map(_quoted, (*keys, *schema.columns)))
        execute_values(cur, f"INSERT INTO {schema.name} ({listed}) VALUES %s", made, page_size=500)
        cur.execute(f"ANALYZE {schema.name}")
        loaded = _loaded(cur, schema)
    session.close()
    return loaded


def _loaded(cur: cursor, schema: Schema) -> Loaded:
    found = _rows(cur, schema)
    return Loaded(
        schema=schema,
        since=datetime.now(UTC) - timedelta(days=schema.days.counted),
        untouched={key: row for key, row in found if row[schema.mark] == schema.marks.untouched},
        stock={key: row for key, row in found if row[schema.mark] == schema.marks.stock},
    )


def _connect(url: str, application_name: str = "webhook application") -> connection:
    parsed = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    session: connection = psycopg2.connect(parsed, application_name=application_name, connect_timeout=10)
    with session, session.cursor() as cur:
        # Values of a `timestamp` column are UTC, whatever the server's time zone.
        cur.execute("SET TIME ZONE 'UTC'")
    return session


def _rows(cur: cursor, schema: Schema) -> list[tuple[Key, Row]]:
    cur.execute(f"SELECT {schema.key_columns}, {schema.listed} FROM {schema.name}")
    parts = len(schema.key)
    return [(schema.key_of(values[:parts]), schema.row(values[parts:])) for values in cur.fetchall()]


class Trouble(NamedTuple):
    """Something that must not happen to an application; ``sqlstate`` is None if no error was raised."""

    at: datetime
    what: str
    sqlstate: str | None
    message: str


@dataclass
class Difference:
    """How the table differs from the model; false if it does not.

    ``different`` has, by key and column, the expected value and the actual one.
    """

    missing: list[Key] = field(default_factory=list)
    extra: list[Key] = field(default_factory=list)
    twice: list[Key] = field(default_factory=list)
    different: dict[Key, dict[str, tuple[Any, Any]]] = field(default_factory=dict)
    parents_missing: list[int] = field(default_factory=list)
    parents_extra: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(vars(self).values())


@dataclass
class _Ledger:
    """What one connection's rows must be. ``kept`` ones are written once and never touched again.

    ``gone`` are deleted keys, which may be reused; ``parents`` are its own, with whether they still exist.
    """

    rows: dict[Key, Row] = field(default_factory=dict)
    kept: dict[Key, Row] = field(default_factory=dict)
    gone: list[Key] = field(default_factory=list)
    parents: dict[int, bool] = field(default_factory=dict)

    def copy(self) -> _Ledger:
        return _Ledger(dict(self.rows), dict(self.kept), list(self.gone), dict(self.parents))


class _MissedError(Exception):
    """A statement missed rows that exist."""


class _Client:
    """One connection of the application, and the rows it owns."""

    def __init__(self, owner: Application, number: int, stock: dict[Key, Row]) -> None:
        self.name = f"application {number}"
        self.thread = threading.Thread(target=self._work, name=self.name, daemon=True)
        self.ledger = _Ledger(rows=stock)
        self.published: list[Key] = []
        self.commits = 0
        self.longest_s = 0.0
        self.slowest = ""
        # While it is held, the ledger and the table agree.
        self.turn = threading.Lock()
        self._owner = owner
        self._schema = owner.loaded.schema
        self._number = number
        self._chance = random.Random(owner.seed * 1_000 + number)
        self._session: connection | None = self._connect()
        self._doing = ""
        self._dwelt = 0.0
        self._acts: list[tuple[float, Callable[[cursor, _Ledger], None]]] = [
            (4, self._insert),
            (4, self._update),
            (3, self._redate),
            (2, self._delete),
            (3, self._upsert),
        ]
        if self._schema.parent:
            self._acts += [(0.5, self._add_parent), (0.7, self._delete_parent)]

    def _work(self) -> None:
        due = time.monotonic() + self._owner.pause_s * self._chance.random()
        while not self._owner.stopping.wait(max(0.0, due - time.monotonic())):
            due = max(due + self._owner.pause_s, time.monotonic())
            with self.turn:
                if self._session is None or self._session.closed:
                    self._session = self._connect_again()
                if self._session is None:
                    return
                self._transact(self._session)
        if self._session is not None:
            self._session.close()

    def _connect(self) -> connection:
        session = _connect(self._owner.url)
        if self._prepares:
            schema = self._schema
            touched = ", ".join(f"{_quoted(column)} = ${n}" for n, column in enumerate(schema.touched, 1))
            with session, session.cursor() as cur:
                cur.execute(
                    f"PREPARE touch AS UPDATE {schema.name} SET {touched}"
                    f" WHERE {schema.prepared_by_key(len(schema.touched) + 1)};"
                    f" PREPARE remove AS DELETE FROM {schema.name} WHERE {schema.prepared_by_key()}"
                )
        return session

    @property
    def _prepares(self) -> bool:
        """Every other connection prepares its statements, as some drivers do automatically."""
        return self._number % 2 == 1

    def _connect_again(self) -> connection | None:
        deadline = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline:
            try:
                return self._connect()
            except psycopg2.OperationalError:
                time.sleep(_RECONNECT_PAUSE_S)  # not up yet
        self._note("connects", None, f"no server for {_SETTLE_S:.0f} s")
        return None

    def _transact(self, session: connection) -> None:
        """One transaction of one to three acts; afterwards the ledger matches what is stored."""
        draft = self.ledger.copy()
        xid = None
        self._dwelt = 0.0
        began = time.monotonic()
        try:
            with session.cursor() as cur:
                weights = [weight for weight, _ in self._acts]
                for _, act in self._chance.choices(
                    self._acts, weights, k=self._chance.choice((1, 1, 1, 2, 3))
                ):
                    self._doing = act.__name__.strip("_")
                    act(cur, draft)
                if self._chance.random() < 0.1:
                    self._dwell(0.02)
                if self._chance.random() < 0.05:
                    session.rollback()
                    return
                cur.execute("SELECT pg_current_xact_id()::text")
                [(xid,)] = cur.fetchall()
            session.commit()
        except _MissedError as error:
            session.rollback()
            self._note(self._doing, None, str(error))
            return
        except psycopg2.Error as error:
            if _roll_back(session):
                self._note(self._doing, error.pgcode, str(error).strip())
                return
            if not self._owner.reconnect:
                self._note(self._doing, error.pgcode, f"cut off: {str(error).strip()}")
            if xid is None or not self._was_committed(xid):
                return
        self._settle(draft, time.monotonic() - began - self._dwelt)

    def _settle(self, draft: _Ledger, seconds: float) -> None:
        """Make the draft the ledger."""
        new = [key for key in draft.kept if key not in self.ledger.kept]
        self.ledger = draft
        self.published += new
        self.commits += 1
        if seconds > self.longest_s:
            self.longest_s, self.slowest = seconds, self._doing

    def _was_committed(self, xid: str) -> bool:
        """Whether a transaction cut off during COMMIT was committed, according to the server."""
        deadline = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline:
            self._session = self._connect_again()
            if self._session is None:
                break
            try:
                with self._session, self._session.cursor() as cur:
                    cur.execute("SELECT pg_xact_status(%s::xid8)", (xid,))
                    [(status,)] = cur.fetchall()
            except psycopg2.Error:
                continue
            if status in ("committed", "aborted"):
                return bool(status == "committed")
            self._session.close()
        self._note("commit", None, f"the outcome of transaction {xid} is unknown")
        return False

    def _dwell(self, seconds: float) -> None:
        """Pause like an application that thinks between its statements."""
        pause = self._chance.uniform(0, seconds)
        time.sleep(pause)
        self._dwelt += pause

    def _note(self, what: str, sqlstate: str | None, message: str) -> None:
        self._owner.errors.append(Trouble(datetime.now(UTC), f"{self.name}: {what}", sqlstate, message))

    # The acts: each runs its statements and writes into the draft what the table holds once they commit.

    def _insert(self, cur: cursor, draft: _Ledger) -> None:
        schema = self._schema
        row = self._new_row(draft)
        kept = self._chance.random() < 0.4
        if kept:
            row[schema.mark] = schema.marks.kept
            if schema.parent:
                # One that stays, so that nothing removes the row again.
                row[schema.parent.column] = self._chance.randint(1, PARENTS)
        if schema.given:
            cur.execute(
                f"INSERT INTO {schema.name} ({schema.listed}) VALUES %s RETURNING {schema.key_columns}",
                (schema.values(row),),
            )
            [found] = cur.fetchall()
            key = schema.key_of(found)
        else:
            key = schema.new_key(self._chance, row[schema.time])
            self._write_new(cur, key, row)
        (draft.kept if kept else draft.rows)[key] = row

    def _update(self, cur: cursor, draft: _Ledger) -> None:
        key = self._any(draft.rows)
        if key is None:
            return
        schema = self._schema
        touched = {column: schema.makes[column](self._chance) for column in schema.touched}
        row = draft.rows[key] | touched
        values = (*map(_for_server, touched.values()), *schema.key_values(key))
        if self._prepares:
            cur.execute(f"EXECUTE touch ({', '.join(['%s'] * len(values))})", values)
        elif self._chance.random() < 0.5:
            columns = ", ".join(f"{_quoted(column)} = %s" for column in touched)
            cur.execute(f"UPDATE {schema.name} SET {columns} WHERE {schema.by_key}", values)
        else:
            row = row | {
                column: schema.makes[column](self._chance) for column in row if column in schema.makes
            }
            self._write(cur, key, row)
        _hit(cur, key)
        draft.rows[key] = row

    def _redate(self, cur: cursor, draft: _Ledger) -> None:
        key = self._any(draft.rows)
        if key is None:
            return
        schema = self._schema
        at = self._time()
        cur.execute(
            f"UPDATE {schema.name} SET {_quoted(schema.time)} = %s WHERE {schema.by_key}",
            (at, *schema.key_values(key)),
        )
        _hit(cur, key)
        row = draft.rows.pop(key) | {schema.time: at}
        draft.rows[schema.redated(key, at)] = row

    def _delete(self, cur: cursor, draft: _Ledger) -> None:
        key = self._any(draft.rows)
        if key is None:
            return
        values = self._schema.key_values(key)
        if self._prepares:
            cur.execute(f"EXECUTE remove ({', '.join(['%s'] * len(values))})", values)
        else:
            cur.execute(f"DELETE FROM {self._schema.name} WHERE {self._schema.by_key}", values)
        _hit(cur, key)
        del draft.rows[key]
        draft.gone.append(key)

    def _upsert(self, cur: cursor, draft: _Ledger) -> None:
        """By key and in two statements: ON CONFLICT needs different columns before and after the swap.

        Only a key that includes the time stays the same, and then one statement is enough.
        """
        schema = self._schema
        row = self._new_row(draft)
        which = self._chance.random()
        key = self._any(draft.rows)
        if key is None or which < 0.3:
            key = schema.new_key(self._chance, row[schema.time])
        elif which < 0.6 and draft.gone:
            key = draft.gone.pop(self._chance.randrange(len(draft.gone)))
        if schema.dated_key:
            row[schema.time] = schema.key_values(key)[schema.key.index(schema.time)]
            columns = [_quoted(column) for column in schema.columns if column not in schema.key]
            changes = ", ".join(f"{column} = excluded.{column}" for column in columns)
            self._write_new(cur, key, row, f"ON CONFLICT ({schema.key_columns}) DO UPDATE SET {changes}")
            _hit(cur, key)
        else:
            self._write(cur, key, row)
            _hit(cur, key, 1 if key in draft.rows else 0)
            if not cur.rowcount:
                self._dwell(0.002)
                self._write_new(cur, key, row)
        draft.rows[key] = row

    def _add_parent(self, cur: cursor, draft: _Ledger) -> None:
        assert self._schema.parent
        cur.execute(self._schema.parent.insert)
        [(parent,)] = cur.fetchall()
        draft.parents[parent] = True

    def _delete_parent(self, cur: cursor, draft: _Ledger) -> None:
        """Delete one together with its rows, in one transaction."""
        schema, above = self._schema, self._schema.parent
        assert above
        parent = self._any([p for p, there in draft.parents.items() if there])
        if parent is None:
            self._add_parent(cur, draft)
            return
        keys = [key for key, row in draft.rows.items() if row[above.column] == parent]
        cur.execute(f"DELETE FROM {schema.name} WHERE {_quoted(above.column)} = %s", (parent,))
        if cur.rowcount != len(keys):
            raise _MissedError(f"{above.table} {parent} had {cur.rowcount} rows to delete, not {len(keys)}")
        cur.execute(f"DELETE FROM {above.table} WHERE {_quoted(above.key)} = %s", (parent,))
        _hit(cur, parent)
        for key in keys:
            del draft.rows[key]
        draft.gone += keys
        draft.parents[parent] = False

    def _write(self, cur: cursor, key: Key, row: Row) -> None:
        schema = self._schema
        cur.execute(
            f"UPDATE {schema.name} SET ({schema.listed}) = ROW %s WHERE {schema.by_key}",
            (schema.values(row), *schema.key_values(key)),
        )

    def _write_new(self, cur: cursor, key: Key, row: Row, conflict: str = "") -> None:
        """Insert a row with its own key; ``conflict`` says what to do if it already exists."""
        schema = self._schema
        values = dict(zip(schema.key, schema.key_values(key), strict=True)) | dict(
            zip(schema.columns, schema.values(row), strict=True)
        )
        listed = ", ".join(map(_quoted, values))
        cur.execute(
            f"INSERT INTO {schema.name} ({listed}) OVERRIDING SYSTEM VALUE VALUES %s {conflict}",
            (tuple(values.values()),),
        )

    def _any(self, found: Iterable[Any]) -> Any:
        keys = list(found)
        return self._chance.choice(keys) if keys else None

    def _new_row(self, draft: _Ledger) -> Row:
        schema = self._schema
        row = {
            column: schema.makes[column](self._chance) for column in schema.columns if column in schema.makes
        }
        row[schema.time] = self._time()
        if schema.parent:
            mine = [parent for parent, there in draft.parents.items() if there]
            none = [] if schema.parent.required else [None]
            row[schema.parent.column] = self._chance.choice([*none, *range(1, PARENTS + 1), *mine * 3])
        return row

    def _time(self) -> datetime | date:
        """Mostly now, often late, sometimes at a midnight or from a clock that is ahead."""
        now = datetime.now(UTC)
        days = self._schema.days
        which = self._chance.random()
        if which < 0.5:
            at = now
        elif which < 0.9:
            at = now - timedelta(days=self._chance.uniform(0, days.owned))
        elif which < 0.95:
            at = now - timedelta(days=self._chance.uniform(0, days.owned - 1))
            at = at.replace(hour=0, minute=0, second=0, microsecond=0)
        else:
            at = now + timedelta(days=self._chance.uniform(0, days.ahead))
        return self._schema.value(at)


def _hit(cur: cursor, key: Key, expected: int = 1) -> None:
    if cur.rowcount != expected:
        raise _MissedError(f"key {key} was hit {cur.rowcount} times, not {expected}")


def _roll_back(session: connection) -> bool:
    """End a failed transaction; returns whether the connection is still open."""
    try:
        session.rollback()
    except psycopg2.Error:
        return False
    return not session.closed


class Application:
    """Connections that insert, update, re-date, delete and upsert rows of their own while a block runs.

    ``rate`` is the number of transactions a second, over all ``threads``. Each connection knows its rows: a
    statement by key that misses its row is an error, like every error from the server. A lost connection is
    reopened; unless ``reconnect`` says that this is expected, it is an error too. A transaction cut off
    during its COMMIT is looked up.
    """

    def __init__(
        self,
        url: str,
        loaded: Loaded,
        *,
        threads: int = 3,
        rate: float = 120.0,
        reconnect: bool = False,
        seed: int = 1,
    ) -> None:
        self.url = url
        self.loaded = loaded
        self.reconnect = reconnect
        self.seed = seed
        self.pause_s = threads / rate
        self.errors: list[Trouble] = []
        self.stopping = threading.Event()
        stock = list(loaded.stock.items())
        self._clients = [_Client(self, n, dict(stock[n::threads])) for n in range(threads)]

    def __enter__(self) -> Self:
        for client in self._clients:
            client.thread.start()
        self.go_on(2)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let each connection end its transaction; a second call does nothing."""
        self.stopping.set()
        for client in self._clients:
            client.thread.join()

    @property
    def commits(self) -> int:
        """Transactions so far."""
        return sum(client.commits for client in self._clients)

    @property
    def longest_s(self) -> float:
        """The longest that a transaction had to wait, not counting its own pauses."""
        return max(client.longest_s for client in self._clients)

    @property
    def slowest(self) -> str:
        """What the application was doing when it waited longest."""
        return max(self._clients, key=lambda client: client.longest_s).slowest

    def go_on(self, transactions: int = 10) -> None:
        """Return once each connection has committed that many more; raises TimeoutError."""
        for client, wanted in [(client, client.commits + transactions) for client in self._clients]:
            wait_until(
                lambda client=client, wanted=wanted: client.commits >= wanted or not client.thread.is_alive(),  # type: ignore[misc]
                30,
                f"{client.name} keeps committing; errors: {self.errors[:3]}",
            )

    def kept(self) -> int:
        """How many committed rows will not be touched again."""
        return sum(len(client.published) for client in self._clients)

    def newest(self, each: int = 10) -> list[Key]:
        """Keys of each connection's last ``each`` of those rows."""
        return [key for client in self._clients for key in client.published[-each:]]

    def rows(self) -> dict[Key, Row]:
        """The model: every row that belongs to the application."""
        return {
            key: row
            for client in self._clients
            for part in (client.ledger.rows, client.ledger.kept)
            for key, row in part.items()
        }

    def compare(self, url: str | None = None, *, since: datetime | None = None) -> Difference:
        """Compare the table, row by row, with the model and with the untouched rows.

        With ``since``, only from this instant on: after a migration older rows are elsewhere. The application
        pauses meanwhile.
        """
        with ExitStack() as turns:
            for client in self._clients:
                turns.enter_context(client.turn)
            return self._compare(url or self.url, since or datetime.min.replace(tzinfo=UTC))

    def _compare(self, url: str, since: datetime) -> Difference:
        schema = self.loaded.schema
        untouched = self.loaded.untouched.items()
        expected = {key: row for key, row in untouched if schema.instant(row) >= since} | self.rows()
        with _connect(url, "compare") as session, session.cursor() as cur:
            found = [(key, row) for key, row in _rows(cur, schema) if schema.instant(row) >= since]
            parents: set[Any] = set()
            if schema.parent:
                parent_key = _quoted(schema.parent.key)
                cur.execute(
                    f"SELECT {parent_key} FROM {schema.parent.table} WHERE {parent_key} > %s", (PARENTS,)
                )
                parents = {row[0] for row in cur.fetchall()}
        session.close()
        there = dict(found)
        times = Counter(key for key, _ in found)
        own = {p for client in self._clients for p, exists in client.ledger.parents.items() if exists}
        return Difference(
            missing=[key for key in expected if key not in there],
            extra=[key for key in there if key not in expected],
            twice=[key for key, number in times.items() if number > 1],
            different={
                key: {
                    column: (wanted, row[column])
                    for column, wanted in expected[key].items()
                    if wanted != row[column]
                }
                for key, row in there.items()
                if expected.get(key, row) != row
            },
            parents_missing=sorted(own - parents),
            parents_extra=sorted(parents - own),
        )


class Short(NamedTuple):
    """A read that found fewer rows than there are; it took ``seconds``."""

    kind: Kind
    at: datetime
    expected: int
    found: int
    seconds: float
    what: str


class Readers:
    """Threads, one of each kind, that read what must be there and record each read that misses a row.

    - ``count`` counts the untouched rows of the whole window.
    - ``key`` reads untouched rows with prepared statements. The one that names its columns never fails; the
      one that reads a whole row may fail once per swap, as its result type has changed: ``replanned``.
    - ``newest`` looks for what the application has just committed.
    - ``repeatable`` counts twice in a REPEATABLE READ transaction, some time after it took its snapshot, with
      or without having touched the table before.
    """

    def __init__(
        self,
        url: str,
        loaded: Loaded,
        application: Application,
        *,
        kinds: tuple[Kind, ...] = KINDS,
        pause_s: float = 0.002,
        seed: int = 1,
    ) -> None:
        self.reads: dict[Kind, int] = dict.fromkeys(kinds, 0)
        self.short: list[Short] = []
        self.errors: list[Trouble] = []
        self.replanned = 0
        self.longest_s = 0.0
        self._url = url
        self._loaded = loaded
        self._schema = loaded.schema
        self._keys = loaded.counted()
        self._application = application
        self._pause_s = pause_s
        self._stopping = threading.Event()
        self._seed = seed
        self._threads = [threading.Thread(target=self._work, args=(k,), name=k, daemon=True) for k in kinds]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.go_on(1)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let each end its read; a second call does nothing."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def go_on(self, reads: int = 3) -> None:
        """Return once each has read that many more times; raises TimeoutError."""
        wanted = {kind: done + reads for kind, done in self.reads.items()}
        wait_until(
            lambda: all(self.reads[kind] >= number for kind, number in wanted.items()),
            30,
            f"the readers keep reading; errors: {self.errors[:3]}",
        )

    def _work(self, kind: Kind) -> None:
        chance = random.Random(self._seed * 1_000 + KINDS.index(kind))
        read: Callable[[connection, random.Random], None] = {
            "count": self._count,
            "key": self._by_key,
            "newest": self._newest,
            "repeatable": self._repeatable,
        }[kind]
        session = self._connect(kind)
        while not self._stopping.wait(self._pause_s):
            try:
                read(session, chance)
            except psycopg2.Error as error:
                self.errors.append(Trouble(datetime.now(UTC), kind, error.pgcode, str(error).strip()))
                if session.closed or not _roll_back(session):
                    session = self._connect(kind)
            self.reads[kind] += 1
        session.close()

    def _connect(self, kind: Kind) -> connection:
        session = _connect(self._url, f"reader {kind}")
        if kind == "repeatable":
            session.set_session(isolation_level="REPEATABLE READ")
        else:
            session.autocommit = True
        if kind == "key":
            schema = self._schema
            with session.cursor() as cur:
                cur.execute(
                    f"PREPARE by_key AS SELECT {schema.listed} FROM {schema.name}"
                    f" WHERE {schema.prepared_by_key()}"
                )
                cur.execute(self._prepare_whole)
        return session

    @property
    def _prepare_whole(self) -> str:
        schema = self._schema
        return f"PREPARE whole AS SELECT w FROM {schema.name} w WHERE {schema.prepared_by_key()}"

    @property
    def _counted(self) -> str:
        """The condition of the untouched rows that are counted; takes the mark and the instant."""
        return f"{_quoted(self._schema.mark)} = %s AND {_quoted(self._schema.time)} >= %s"

    def _read(self, session: connection, text: str, *values: Any) -> tuple[list[tuple[Any, ...]], float]:
        """The rows of a query, and the seconds it took."""
        began = time.monotonic()
        with session.cursor() as cur:
            cur.execute(text, values or None)
            rows = cur.fetchall()
        seconds = time.monotonic() - began
        self.longest_s = max(self.longest_s, seconds)
        return rows, seconds

    def _expect(self, kind: Kind, expected: int, found: int, seconds: float, what: str) -> None:
        now = datetime.now(UTC)
        if found < expected:
            self.short.append(Short(kind, now, expected, found, seconds, what))

    def _exactly(self, kind: Kind, expected: int, found: int, seconds: float, what: str) -> None:
        """Expect exactly this many rows: extra ones count as wrong too."""
        self._expect(kind, expected, found, seconds, what)
        if found > expected:
            self.errors.append(Trouble(datetime.now(UTC), kind, None, f"{what}: {found}, not {expected}"))

    def _count(self, session: connection, chance: random.Random) -> None:
        rows, seconds = self._read(
            session,
            f"SELECT count(*) FROM {self._schema.name} WHERE {self._counted}",
            self._schema.marks.untouched,
            self._loaded.since,
        )
        self._exactly("count", len(self._keys), rows[0][0], seconds, "untouched rows")

    def _by_key(self, session: connection, chance: random.Random) -> None:
        key = chance.choice(self._keys)
        values = self._schema.key_values(key)
        holders = ", ".join(["%s"] * len(values))
        rows, seconds = self._read(session, f"EXECUTE by_key ({holders})", *values)
        self._exactly("key", 1, len(rows), seconds, f"key {key}")
        if rows and self._schema.row(rows[0]) != self._loaded.untouched[key]:
            self.errors.append(Trouble(datetime.now(UTC), "key", None, f"key {key} has changed: {rows[0]}"))
        try:
            rows, seconds = self._read(session, f"EXECUTE whole ({holders})", *values)
        except psycopg2.Error as error:
            if error.pgcode != FEATURE_NOT_SUPPORTED or "cached plan" not in str(error):
                raise
            self.replanned += 1
            with session.cursor() as cur:
                cur.execute(f"DEALLOCATE whole; {self._prepare_whole}")
            rows, seconds = self._read(session, f"EXECUTE whole ({holders})", *values)
        self._exactly("key", 1, len(rows), seconds, f"key {key}, whole row")

    def _newest(self, session: connection, chance: random.Random) -> None:
        keys = self._application.newest()
        if not keys:
            return
        schema = self._schema
        rows, seconds = self._read(
            session, f"SELECT count(*) FROM {schema.name} WHERE ({schema.key_columns}) IN %s", tuple(keys)
        )
        self._exactly("newest", len(keys), rows[0][0], seconds, f"the newest rows, {keys[-3:]} among them")

    def _repeatable(self, session: connection, chance: random.Random) -> None:
        kept = self._application.kept()
        counts: list[tuple[int, int]] = []
        began = time.monotonic()
        # The first statement takes the snapshot, with or without a lock on the table.
        if chance.random() < 0.6:
            self._read(session, "SELECT 1")
        else:
            counts.append(self._counts(session))
        self._stopping.wait(chance.uniform(0, 0.08))
        counts.append(self._counts(session))
        self._stopping.wait(chance.uniform(0, 0.04))
        counts.append(self._counts(session))
        session.commit()
        seconds = time.monotonic() - began
        for number, (untouched, found) in enumerate(counts, 1):
            self._exactly("repeatable", len(self._keys), untouched, seconds, f"untouched rows, read {number}")
            self._expect("repeatable", kept, found, seconds, f"newest rows, read {number}")
            self._exactly(
                "repeatable", counts[0][1], found, seconds, f"rows of the first read, read {number}"
            )

    def _counts(self, session: connection) -> tuple[int, int]:
        rows, _ = self._read(
            session,
            f"SELECT count(*) FILTER (WHERE {self._counted}),"
            f" count(*) FILTER (WHERE {_quoted(self._schema.mark)} = %s) FROM {self._schema.name}",
            self._schema.marks.untouched,
            self._loaded.since,
            self._schema.marks.kept,
        )
        return rows[0][0], rows[0][1]


def phase(url: str) -> str | None:
    """The phase of the migration, None if there is none."""
    [[exists]] = query(url, "SELECT to_regclass('webhook_log_migration') IS NOT NULL")
    if not exists:
        return None
    rows = query(url, "SELECT phase FROM webhook_log_migration")
    return str(rows[0][0]) if rows else None


def oldest(url: str) -> datetime | None:
    """The instant from which rows are in the webhook_log in use; None: all of them are."""
    if phase(url) not in ("migrated", "returning", "finalizing"):
        return None
    [[strategy, cutoff]] = query(
        url, "SELECT plan ->> 'strategy', (plan ->> 'cutoff')::timestamptz FROM webhook_log_migration"
    )
    assert isinstance(cutoff, datetime)
    return cutoff if strategy == "copy" else None
