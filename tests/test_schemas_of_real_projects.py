"""Tables of real projects: migrated and rolled back under their applications, or refused by id."""

from __future__ import annotations

import io
import re
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console
from sqlalchemy.engine import make_url

from chronos.db import connect_engine
from chronos.errors import RefusedError
from chronos.migration.console import Output
from chronos.migration.operator import Operator
from chronos.migration.rollback import undo
from chronos.migration.run import Options, migrate
from tests.live import KINDS, Application, Readers, Schema, fill
from tests.real_schemas import ALL, DISCOURSE, OPENFGA, TIMESCALE, Real
from tests.tables import dump, query, value
from tests.waiting import wait_until

ROWS = 2_000


def operator() -> Operator:
    return Operator(Output(Console(file=io.StringIO(), soft_wrap=True)))


def create(url: str, table: Real) -> Schema:
    """Create it, and fix what it is refused for."""
    assert table.live
    for statements in (table.ddl, *table.way_out):
        query(url, statements)
    return table.live


def untouched(url: str, schema: Schema) -> list[str]:
    """The untouched rows, with all their columns."""
    mark = schema.marks.untouched
    rows = query(url, f'SELECT t::text FROM {schema.name} t WHERE "{schema.mark}" = %s', mark)
    return sorted(row[0] for row in rows)


def check(application: Application, readers: Readers, since: datetime | None = None) -> None:
    """All sessions carry on, none has missed anything, and each row is as the application left it."""
    application.go_on(5)
    readers.go_on(2)
    assert not application.errors, application.errors[:3]
    assert not readers.short, readers.short[:3]
    assert not readers.errors, readers.errors[:3]
    difference = application.compare(since=since)
    assert not difference, difference


@pytest.mark.parametrize("table", [table for table in ALL if table.live], ids=str)
def test_migrate_and_rollback_under_its_application_lose_no_row(
    database: str, pg_bin: Path, table: Real
) -> None:
    schema, spec = create(database, table), table.spec
    loaded = fill(database, schema, ROWS)
    before, rows = dump(database, pg_bin), untouched(database, schema)
    engine = connect_engine(make_url(database))
    state = f'"{spec.schema or "public"}"."{spec.state}"'
    with (
        Application(database, loaded, threads=2, rate=80) as application,
        Readers(database, loaded, application, pause_s=0.02) as readers,
    ):
        migrate(engine, spec, Options(), operator(), lambda found: None)
        kind = value(database, "SELECT relkind::text FROM pg_class WHERE oid = %s::regclass", schema.name)
        assert kind == "p"
        cutoff = value(database, f"SELECT (plan ->> 'cutoff')::timestamptz FROM {state}")
        check(application, readers, since=cutoff)

        undo(engine, spec, operator(), lambda found, by_hand: None)
        check(application, readers)
        assert readers.replanned <= 2
    assert not application.compare()
    assert untouched(database, schema) == rows
    assert dump(database, pg_bin) == before


@pytest.mark.parametrize("table", [table for table in ALL if table.refused], ids=str)
def test_an_obstacle_is_refused_by_id_before_anything_changes(
    database: str, pg_bin: Path, table: Real
) -> None:
    query(database, table.ddl)
    before = dump(database, pg_bin)
    engine = connect_engine(make_url(database))

    with pytest.raises(RefusedError) as refused:
        migrate(engine, table.spec, Options(), operator(), lambda found: None)

    message = str(refused.value)
    assert set(re.findall(r"\[([a-z-]+)\]", message)) == set(table.refused)
    assert dump(database, pg_bin) == before
    # What it says to type works as written.
    for statement in re.findall(r"CREATE INDEX CONCURRENTLY ON \S+ \([^)]*\)", message):
        query(database, statement)


@pytest.mark.parametrize("table", [OPENFGA, TIMESCALE, DISCOURSE], ids=str)
def test_a_missing_or_changed_row_is_noticed(database: str, table: Real) -> None:
    """With a key of several columns, with the time in it, with a date: the tests above rely on this."""
    schema = create(database, table)
    loaded = fill(database, schema, ROWS)
    with (
        Application(database, loaded, threads=2, rate=80) as application,
        Readers(database, loaded, application, pause_s=0.02) as readers,
    ):
        wait_until(lambda: len(application.newest()) > 5, 20, "there are new rows")
        changed = loaded.counted()[1]
        gone = [*loaded.counted()[2::2], *application.newest()]
        find = f"({schema.key_columns}) IN %s"
        query(database, f"DELETE FROM {schema.name} WHERE {find}", tuple(gone))
        query(
            database,
            f'UPDATE {schema.name} SET "{schema.mark}" = %s WHERE {find}',
            schema.marks.stock,
            (changed,),
        )
        wait_until(lambda: {short.kind for short in readers.short} == {*KINDS}, 20, "all miss rows")
        difference = application.compare()
        assert set(difference.missing) == {*gone}
        assert difference.different == {changed: {schema.mark: (schema.marks.untouched, schema.marks.stock)}}
        assert not application.errors, application.errors[:3]
        query(database, f"DELETE FROM {schema.name}")
        wait_until(lambda: application.errors, 20, "the application misses its rows")
