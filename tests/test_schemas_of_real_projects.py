"""Tables of real projects, there and back beside their applications, or refused by name: tests/real_schemas.py."""

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
from tests.live import Application, Readers, fill
from tests.real_schemas import MIGRATED, REFUSED, Real, Refused
from tests.tables import dump, query, value

ROWS = 2_000


def operator() -> Operator:
    return Operator(Output(Console(file=io.StringIO(), soft_wrap=True)))


def untouched(url: str, table: Real) -> list[str]:
    """The rows that nobody touches, with all their columns."""
    schema = table.live
    rows = query(
        url, f'SELECT t::text FROM {schema.name} t WHERE "{schema.mark}" = %s', schema.marks.untouched
    )
    return sorted(row[0] for row in rows)


def check(application: Application, readers: Readers, since: datetime | None = None) -> None:
    """All go on, nobody has missed anything, and each row is what the application has made of it."""
    application.go_on(5)
    readers.go_on(2)
    assert not application.errors, application.errors[:3]
    assert not readers.short, readers.short[:3]
    assert not readers.errors, readers.errors[:3]
    difference = application.compare(since=since)
    assert not difference, difference


@pytest.mark.parametrize("table", MIGRATED, ids=str)
def test_there_and_back_beside_its_application(database: str, pg_bin: Path, table: Real) -> None:
    query(database, table.ddl)
    for statement in table.way_out:
        query(database, statement)
    loaded = fill(database, table.live, ROWS)
    before, rows = dump(database, pg_bin), untouched(database, table)
    engine = connect_engine(make_url(database))
    spec, name = table.spec, table.live.name
    with (
        Application(database, loaded) as application,
        Readers(database, loaded, application, pause_s=0.01) as readers,
    ):
        migrate(engine, spec, Options(), operator(), lambda found: None)
        assert value(database, "SELECT relkind::text FROM pg_class WHERE oid = %s::regclass", name) == "p"
        state = f'"{spec.schema or "public"}"."{spec.state}"'
        check(application, readers, value(database, f"SELECT (plan ->> 'cutoff')::timestamptz FROM {state}"))

        undo(engine, spec, operator(), lambda found: None)
        check(application, readers)
        assert readers.replanned <= 2
    assert not application.compare()
    assert untouched(database, table) == rows
    assert dump(database, pg_bin) == before


@pytest.mark.parametrize("table", REFUSED, ids=str)
def test_refused_by_name_before_anything_changes(database: str, pg_bin: Path, table: Real | Refused) -> None:
    query(database, table.ddl)
    before = dump(database, pg_bin)
    engine = connect_engine(make_url(database))

    with pytest.raises(RefusedError) as refused:
        migrate(engine, table.spec, Options(), operator(), lambda found: None)

    assert set(re.findall(r"\[([a-z-]+)\]", str(refused.value))) == set(table.refused)
    assert dump(database, pg_bin) == before
