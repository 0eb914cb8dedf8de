"""Which statements suffer: a labelled workload, with each label checked against PostgreSQL's plans."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pglast
import psycopg2
import pytest
from sqlalchemy.engine import Connection

from chronos.db import connect_engine, execute, opened, statement, transaction
from chronos.demo.binaries import find_postgres
from chronos.migration import queries
from chronos.migration.pruning import Fact, Subject, Why, read
from chronos.migration.queries import read_workload, workload
from chronos.settings import postgres_url
from chronos.table import WEBHOOK_LOG
from tests.conftest import OwnPostgres
from tests.partitioned import add_partitions, create_tables
from tests.tables import connected, query

_PARTITIONS = 46
_LOG = WEBHOOK_LOG.located("public")


@dataclass(frozen=True)
class Labelled:
    """A statement as a client sends it, whether it prunes partitions, and how often it is called.

    ``prepared`` are the values of a statement with parameters, which is planned once for all of them.
    """

    text: str
    prunes: bool
    calls: int = 100
    prepared: str | None = None

    @property
    def normalized(self) -> str:
        """As pg_stat_statements shows it."""
        return f"PREPARE p AS {self.text}" if self.prepared else str(pglast.parser.normalize(self.text))


def prunes(text: str, calls: int = 100, prepared: str | None = None) -> Labelled:
    return Labelled(text, True, calls, prepared)


def scans_all(text: str, calls: int = 100, prepared: str | None = None) -> Labelled:
    return Labelled(text, False, calls, prepared)


WORKLOAD = [
    # Conditions on the column itself.
    prunes("SELECT * FROM webhook_log WHERE timestamp >= now() - interval '1 day'", 900),
    prunes("SELECT * FROM webhook_log l WHERE l.timestamp >= CURRENT_DATE AND l.status = 'failed'"),
    prunes('SELECT count(*) FROM public.webhook_log WHERE public.webhook_log."timestamp" < now()'),
    prunes("SELECT * FROM webhook_log WHERE timestamp BETWEEN now() - interval '2 days' AND now()"),
    prunes("SELECT * FROM webhook_log WHERE timestamp IN (CURRENT_DATE, CURRENT_DATE - 1)"),
    prunes("SELECT * FROM webhook_log WHERE timestamp = ANY(ARRAY[now(), now() - interval '1 day'])"),
    prunes("SELECT * FROM webhook_log WHERE NOT (timestamp < now() - interval '1 day')"),
    prunes("SELECT * FROM webhook_log WHERE now() - interval '1 day' <= timestamp"),
    prunes("SELECT * FROM webhook_log WHERE timestamp = now() OR timestamp > now() + interval '3 days'"),
    prunes("SELECT * FROM webhook_log WHERE (timestamp, id) = (now(), 5)"),
    prunes("SELECT * FROM webhook_log WHERE timestamp::timestamptz >= now()"),
    prunes("SELECT * FROM webhook_log WHERE (timestamp, id) > (now(), 5) AND timestamp >= now()", 400),
    scans_all("SELECT * FROM webhook_log WHERE id = 5", 5_000),
    scans_all("SELECT * FROM webhook_log WHERE status = 'failed' ORDER BY id LIMIT 10"),
    scans_all("SELECT * FROM webhook_log ORDER BY timestamp DESC LIMIT 50", 700),
    scans_all("SELECT count(*) FROM webhook_log"),
    scans_all("SELECT max(timestamp) FROM webhook_log"),
    scans_all("SELECT * FROM webhook_log WHERE date(timestamp) = CURRENT_DATE"),
    scans_all("SELECT * FROM webhook_log WHERE timestamp::date = CURRENT_DATE", 300),
    scans_all("SELECT * FROM webhook_log WHERE date_trunc('day', timestamp) = '2026-01-01'"),
    scans_all("SELECT * FROM webhook_log WHERE extract(hour FROM timestamp) = 3"),
    scans_all("SELECT * FROM webhook_log WHERE timestamp + interval '1 day' > now()"),
    scans_all("SELECT * FROM webhook_log WHERE (timestamp, id) > (now(), 5) ORDER BY timestamp, id LIMIT 9"),
    scans_all("SELECT * FROM webhook_log WHERE timestamp >= now() OR status = 'failed'"),
    scans_all("SELECT * FROM webhook_log WHERE timestamp >= clock_timestamp()"),
    scans_all("SELECT * FROM webhook_log WHERE timestamp <> now()"),
    # Prepared: partitions that a parameter rules out are pruned when the plan starts.
    prunes("SELECT * FROM webhook_log WHERE timestamp >= $1 AND timestamp < $2", 2_000, "now(), now()"),
    prunes("SELECT * FROM webhook_log WHERE id = $1 AND timestamp = $2", 3_000, "5, now()"),
    prunes("SELECT * FROM webhook_log WHERE timestamp IN ($1, $2)", 50, "now(), now()"),
    prunes("SELECT * FROM webhook_log WHERE timestamp > now() - $1::interval LIMIT $2", 50, "'1 day', 5"),
    scans_all("SELECT * FROM webhook_log WHERE id = ANY($1)", 800, "ARRAY[1, 2]"),
    scans_all("SELECT * FROM webhook_log WHERE $1::timestamptz IS NULL OR timestamp >= $1", 80, "now()"),
    # Joins.
    prunes(
        "SELECT e.url, count(*) FROM webhook_log AS l JOIN webhook_endpoint e ON e.id = l.webhook_endpoint_id"
        " WHERE l.timestamp >= CURRENT_DATE GROUP BY 1"
    ),
    prunes(
        "SELECT * FROM webhook_endpoint e LEFT JOIN webhook_log l"
        " ON l.webhook_endpoint_id = e.id AND l.timestamp > now()"
    ),
    prunes("SELECT * FROM webhook_log a JOIN webhook_log b USING (timestamp) WHERE a.timestamp = now()", 10),
    scans_all(
        "SELECT * FROM webhook_log l LEFT JOIN webhook_endpoint e"
        " ON l.webhook_endpoint_id = e.id AND l.timestamp > now()"
    ),
    scans_all(
        "SELECT * FROM webhook_endpoint e JOIN webhook_log l ON l.webhook_endpoint_id = e.id WHERE e.id = 1"
    ),
    scans_all("SELECT * FROM webhook_log a JOIN seen s ON a.timestamp >= s.at WHERE s.n = 1"),
    # Subqueries, CTEs and views.
    prunes("SELECT * FROM (SELECT id, timestamp AS at FROM webhook_log) s WHERE s.at >= now()"),
    prunes("WITH l AS (SELECT * FROM webhook_log) SELECT * FROM l WHERE timestamp >= now()"),
    prunes(
        "WITH l AS (SELECT * FROM webhook_log WHERE timestamp > now())"
        " SELECT * FROM l a, l b WHERE a.id = b.id"
    ),
    prunes(
        "SELECT * FROM seen s WHERE EXISTS (SELECT FROM webhook_log w WHERE w.id = s.n AND timestamp > now())"
    ),
    prunes("SELECT * FROM recent WHERE at BETWEEN now() - interval '3 days' AND now()"),
    prunes(
        "SELECT * FROM (SELECT timestamp, count(*) FROM webhook_log GROUP BY timestamp) c"
        " WHERE timestamp > now()"
    ),
    prunes(
        "SELECT * FROM (SELECT timestamp t, id FROM webhook_log UNION ALL SELECT at, n FROM seen) u"
        " WHERE t > now()"
    ),
    scans_all("SELECT * FROM (SELECT * FROM webhook_log ORDER BY id LIMIT 9) s WHERE timestamp >= now()"),
    scans_all("WITH l AS MATERIALIZED (SELECT * FROM webhook_log) SELECT * FROM l WHERE timestamp >= now()"),
    scans_all(
        "WITH l AS (SELECT * FROM webhook_log) SELECT * FROM l a, l b WHERE a.timestamp >= now() AND b.id = 1"
    ),
    scans_all("SELECT * FROM webhook_log WHERE timestamp >= (SELECT max(at) FROM seen)"),
    scans_all("SELECT * FROM webhook_log WHERE timestamp IN (SELECT at FROM seen)"),
    scans_all("SELECT * FROM recent WHERE id = 7", 250),
    scans_all(
        "SELECT * FROM (SELECT *, row_number() OVER (ORDER BY id) FROM webhook_log) s WHERE timestamp > now()"
    ),
    # Writes.
    prunes("UPDATE webhook_log SET status = 'sent' WHERE id = 1 AND timestamp = now()", 60),
    prunes("DELETE FROM webhook_log WHERE timestamp < now() - interval '10 days'"),
    prunes(
        "UPDATE webhook_log l SET status = e.url FROM webhook_endpoint e"
        " WHERE e.id = l.id AND timestamp > now()"
    ),
    scans_all("UPDATE webhook_log SET status = 'sent' WHERE id = 1", 1_500),
    scans_all(
        "DELETE FROM webhook_log USING webhook_endpoint e WHERE e.id = webhook_endpoint_id AND e.url = ''"
    ),
    scans_all("DELETE FROM webhook_log WHERE ctid IN (SELECT ctid FROM webhook_log WHERE id < 9 LIMIT 5)"),
]


@contextmanager
def partitioned(url: str) -> Iterator[None]:
    """A partitioned webhook_log, and the other objects that the workload names."""
    with connected(url, autocommit=False) as conn, conn.cursor() as cursor:
        create_tables(cursor)
        add_partitions(cursor, -15, 30)
        cursor.execute(
            "SET search_path = public; CREATE TABLE seen (n bigint, at timestamptz);"
            " CREATE VIEW recent AS SELECT id, timestamp AS at, status FROM webhook_log WHERE status <> ''"
        )
        conn.commit()
    yield


def nodes_of(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """A plan's nodes."""
    return [plan, *(node for part in plan.get("Plans", ()) for node in nodes_of(part))]


def scanned(url: str) -> dict[Labelled, int]:
    """How many partitions remain in the plan of each workload statement once it starts."""
    found: dict[Labelled, int] = {}
    with connected(url) as conn, conn.cursor() as cursor:
        cursor.execute("SET plan_cache_mode = force_generic_plan; SET TimeZone = 'UTC'")
        for labelled in WORKLOAD:
            run = labelled.text
            if labelled.prepared:
                cursor.execute(f"DEALLOCATE ALL; PREPARE p AS {labelled.text}")
                run = f"EXECUTE p({labelled.prepared})"
            cursor.execute(f"EXPLAIN (FORMAT JSON) {run}")
            [[explained]] = cursor.fetchall()
            scans = {node.get("Relation Name") for node in nodes_of(explained[0]["Plan"])}
            found[labelled] = len([name for name in scans if name and name.startswith("webhook_log_y")])
    return found


@contextmanager
def reading(url: str) -> Iterator[Connection]:
    """A connection like the one the plan uses."""
    with opened(connect_engine(postgres_url(url))) as conn, transaction(conn):
        execute(conn, statement("SET TRANSACTION READ ONLY"))
        yield conn


def rows_of(texts: list[str]) -> list[tuple[str, int, float, float]]:
    """What pg_stat_statements would show for these."""
    return [(text, 1, 1.0, 1 / len(texts)) for text in texts]


def test_only_statements_that_prune_no_partition_are_named(database: str) -> None:
    with partitioned(database), reading(database) as conn:
        subject, _ = queries._subject(conn, _LOG)
        for labelled, partitions in scanned(database).items():
            assert (partitions < _PARTITIONS) == labelled.prunes, labelled.text
        named = {labelled: read(labelled.normalized, subject).why is not None for labelled in WORKLOAD}
    suffering = [labelled for labelled in WORKLOAD if not labelled.prunes]
    fine = [labelled for labelled in WORKLOAD if labelled.prunes]
    assert len(suffering) >= 15
    assert len(fine) >= 15
    found = sum(labelled.calls for labelled in suffering if named[labelled])
    assert found >= 0.95 * sum(labelled.calls for labelled in suffering), [
        s for s in suffering if not named[s]
    ]
    wrong = [labelled.text for labelled in fine if named[labelled]]
    assert len(wrong) * 20 <= len(fine), wrong


def test_the_planner_agrees_on_the_partitioned_table(database: str) -> None:
    with partitioned(database), reading(database) as conn:
        subject, _ = queries._subject(conn, _LOG)
        found = read_workload(
            conn, subject, rows_of([labelled.normalized for labelled in WORKLOAD]), 92, "webhook_log"
        )
        planned = {one.text: one.planned for one in found.statements if one.planned}
    checked = [labelled for labelled in WORKLOAD if labelled.normalized in planned]
    assert len(checked) >= 40, found.notes
    for labelled in checked:
        one = planned[labelled.normalized]
        assert one is not None
        assert one.partitions == _PARTITIONS
        assert (one.scanned < _PARTITIONS) == labelled.prunes, labelled.text


SUBJECT = Subject(
    "public", "webhook_log", "timestamp", "timestamptz", ("id", "timestamp", "status"), ("id", "timestamp")
)


def test_each_statement_gets_advice_that_names_what_is_wrong() -> None:
    found = {
        text: read(text, SUBJECT).why
        for text in (
            "SELECT FROM webhook_log WHERE id = $1",
            "SELECT FROM webhook_log WHERE timestamp::date = $1",
            "SELECT FROM webhook_log WHERE (timestamp, id) < ($1, $2)",
            "SELECT FROM webhook_log ORDER BY timestamp LIMIT $1",
            "SELECT FROM webhook_log WHERE timestamp > $1 OR id = $2",
            "SELECT FROM webhook_log WHERE timestamp > $1",
        )
    }
    assert list(found.values()) == [Why.KEY, Why.FUNCTION, Why.ROW, Why.LIMIT, Why.OR, None]
    assert Why.FUNCTION.advice("at") == (
        "at is inside an expression: compare the bare column, at >= ... AND at < ..."
    )


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("SELECT count(*) FROM ONLY webhook_log WHERE timestamp > $1", [Fact.ONLY]),
        ("COPY webhook_log TO STDOUT", [Fact.COPY_TO]),
        ("COPY webhook_log FROM STDIN", []),
    ],
)
def test_statements_that_fail_or_change_meaning_on_partitions_are_found(text: str, facts: list[Fact]) -> None:
    assert sorted(read(text, SUBJECT).facts, key=str) == facts


def test_a_table_with_the_same_name_elsewhere_is_ignored(database: str) -> None:
    query(database, 'CREATE SCHEMA shop; CREATE TABLE shop.webhook_log (id int, "timestamp" timestamptz)')
    with partitioned(database), reading(database) as conn:
        subject, _ = queries._subject(conn, _LOG)
    assert not read("SELECT FROM shop.webhook_log", subject).touches
    assert not read("WITH webhook_log AS (SELECT 1) SELECT * FROM webhook_log", subject).touches
    assert read("SELECT FROM webhook_log", subject).touches, "public comes first on the search path"


_TRAPS = """
CREATE FUNCTION trap(x timestamptz) RETURNS timestamptz IMMUTABLE LANGUAGE plpgsql AS
    $$ BEGIN RETURN x; END $$;
CREATE FUNCTION trap(x timestamptz, y timestamptz) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS
    $$ BEGIN RETURN true; END $$;
CREATE FUNCTION trapped(x int) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN RETURN true; END $$;
CREATE OPERATOR <<< (FUNCTION = trap, LEFTARG = timestamptz, RIGHTARG = timestamptz);
CREATE DOMAIN nasty AS timestamptz CHECK (trap(VALUE) IS NOT NULL);
CREATE VIEW trapping AS SELECT * FROM webhook_log WHERE timestamp > trap('2026-01-01');
CREATE TABLE indexed (id bigint, at timestamptz);
CREATE INDEX ON indexed ((trapped(1)));
CREATE TABLE ruled (id bigint);
CREATE RULE r AS ON UPDATE TO ruled DO ALSO DELETE FROM webhook_log WHERE timestamp > trap('2026-01-01');
CREATE TABLE guarded (id bigint);
ALTER TABLE guarded ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY p ON guarded USING (trapped(1));
CREATE TABLE defaulting (id bigint, f boolean DEFAULT trapped(1));
CREATE TABLE counted (id bigint, at timestamptz);
CREATE STATISTICS trapped_statistics ON (trapped(id::int)), (id + 1) FROM counted;
"""
# The traps are set only once everything depends on them.
_SET = """
CREATE OR REPLACE FUNCTION trap(x timestamptz) RETURNS timestamptz IMMUTABLE LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'a trap was run'; END $$;
CREATE OR REPLACE FUNCTION trap(x timestamptz, y timestamptz) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'a trap was run'; END $$;
CREATE OR REPLACE FUNCTION trapped(x int) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'a trap was run'; END $$;
"""


_TRAPPED = [
    "SELECT * FROM webhook_log WHERE timestamp > trap('2026-01-01')",
    "SELECT * FROM webhook_log WHERE timestamp > public.trap('2026-01-01')",
    "SELECT * FROM webhook_log WHERE timestamp > now() AND '2026-01-01'::timestamptz <<< '2026-01-01'",
    "SELECT * FROM webhook_log WHERE '2026-01-01' OPERATOR(public.<<<) '2026-01-01'::timestamptz",
    "SELECT * FROM webhook_log WHERE timestamp > '2026-01-01'::nasty",
    "SELECT * FROM webhook_log WHERE timestamp > '2026-01-01'::public.nasty",
    "SELECT * FROM trapping WHERE timestamp > now()",
    "SELECT * FROM webhook_log l JOIN trapping t USING (id)",
    "SELECT * FROM webhook_log l JOIN indexed i USING (id)",
    "SELECT * FROM webhook_log l JOIN guarded g USING (id)",
    "WITH l AS (SELECT * FROM webhook_log) UPDATE ruled SET id = l.id FROM l",
    "UPDATE defaulting SET f = DEFAULT FROM webhook_log l WHERE l.id = defaulting.id",
    "SELECT * FROM webhook_log l JOIN counted c USING (id)",
    "SELECT table_to_xml('webhook_log', true, true, '') FROM webhook_log",
    "SELECT * FROM webhook_log; SELECT trap(now())",
]
# Those that spring a trap as soon as they are planned; the others would when they run.
_SPRUNG = [_TRAPPED[0], _TRAPPED[6], _TRAPPED[8]]


def test_planning_runs_no_user_function(database: str) -> None:
    with partitioned(database):
        query(database, _TRAPS + _SET)
        for text in _SPRUNG:
            with pytest.raises(psycopg2.Error, match="a trap was run"):
                query(database, f"EXPLAIN {text}")
        with reading(database) as conn:
            subject, _ = queries._subject(conn, _LOG)
            found = read_workload(conn, subject, rows_of(_TRAPPED), 92, "webhook_log")
    assert [one.text for one in found.statements] == _TRAPPED
    assert not [one.text for one in found.statements if one.planned]
    assert "a trap was run" not in " ".join(found.notes)


def test_planning_leaves_no_lock_and_no_prepared_statement(database: str) -> None:
    with partitioned(database), reading(database) as conn:
        subject, _ = queries._subject(conn, _LOG)
        texts = ["UPDATE webhook_log SET status = $1 WHERE id = $2", "SELECT nothing FROM webhook_log"]
        found = read_workload(conn, subject, rows_of(texts), 92, "webhook_log")
        locked = execute(
            conn,
            statement(
                "SELECT count(*) FROM pg_locks l JOIN pg_class c ON c.oid = l.relation"
                " WHERE l.pid = pg_backend_pid() AND (c.relname ~ '^webhook_log_y' OR mode ~ 'Exclusive')"
            ),
        ).scalar_one()
        prepared = execute(conn, statement("SELECT count(*) FROM pg_prepared_statements")).scalar_one()
        timeout = execute(conn, statement("SHOW statement_timeout")).scalar_one()
    assert timeout == "0"
    assert [one.planned is not None for one in found.statements] == [True, False]
    assert 'column "nothing" does not exist' in found.notes[0]
    assert (locked, prepared) == (0, 0)


def test_statements_that_are_hidden_or_cut_off_are_counted(database: str) -> None:
    with partitioned(database), reading(database) as conn:
        subject, _ = queries._subject(conn, _LOG)
        texts = ["<insufficient privilege>", "SELECT * FROM webhook_log WHERE id IN ($1,"]
        found = read_workload(conn, subject, rows_of(texts), 92)
    assert found.statements == ()
    assert "GRANT pg_read_all_stats" in found.notes[0]
    assert "1 statement could not be read" in found.notes[1]


def test_a_statement_nested_too_deep_is_counted_as_unread(database: str) -> None:
    with partitioned(database), reading(database) as conn:
        subject, _ = queries._subject(conn, _LOG)
        deep = " UNION ALL ".join(["SELECT id FROM webhook_log"] * 2_000)
        found = read_workload(conn, subject, rows_of([deep, "SELECT id FROM webhook_log"]), 92, "webhook_log")
    assert [one.text for one in found.statements] == ["SELECT id FROM webhook_log"]
    assert "1 statement could not be read" in found.notes[0]


def test_the_extension_is_read_or_the_plan_says_how_to_get_it(own_postgres: OwnPostgres) -> None:
    there = {"shared_preload_libraries": "pg_stat_statements"}
    has_it = (find_postgres().parent / "lib" / "pg_stat_statements.so").exists()
    url = own_postgres(there if has_it else {}).url
    with partitioned(url):
        if has_it:
            query(url, "CREATE SCHEMA elsewhere; CREATE EXTENSION pg_stat_statements SCHEMA elsewhere")
            for _ in range(3):
                query(url, "SELECT count(*) FROM webhook_log WHERE id = 5")
                query(url, "SELECT count(*) FROM webhook_log WHERE timestamp > now()")
        with reading(url) as conn:
            found = workload(conn, _LOG, _PARTITIONS, "webhook_log")
    assert found.locks == _PARTITIONS * 3
    if has_it:
        calls = {one.text: (one.calls, one.suffers) for one in found.statements}
        assert calls["SELECT count(*) FROM webhook_log WHERE id = $1"] == (3, True)
        assert calls["SELECT count(*) FROM webhook_log WHERE timestamp > now()"] == (3, False)
        assert 0 < found.suffering[0].share < 1
    else:
        assert found.statements == ()
        assert "CREATE EXTENSION pg_stat_statements" in found.notes[0]


def test_without_the_parser_one_line_says_how_to_install_it(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pglast", None)
    with partitioned(database), reading(database) as conn:
        found = workload(conn, _LOG, _PARTITIONS)
    assert found.statements == ()
    assert found.notes == (
        "reading the statements needs the package pglast: pip install pglast (the extra plan)",
    )
