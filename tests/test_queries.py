"""Which statements suffer: a labelled workload, each label checked against what PostgreSQL plans."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pglast
from sqlalchemy.engine import Connection

from chronos.db import connect_engine, execute, opened, statement, transaction
from chronos.migration import queries
from chronos.migration.pruning import read
from chronos.migration.queries import read_workload
from chronos.settings import postgres_url
from chronos.table import WEBHOOK_LOG
from tests.partitioned import add_partitions, create_tables
from tests.tables import connected

_PARTITIONS = 46
_LOG = WEBHOOK_LOG.located("public")


@dataclass(frozen=True)
class Labelled:
    """A statement as a client sends it, whether it leaves partitions out, and how often it is called.

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
    # Prepared: what a parameter leaves out, is left out when the plan starts.
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
    """A partitioned webhook_log and what the workload names beside it."""
    with connected(url, autocommit=False) as conn, conn.cursor() as cursor:
        create_tables(cursor)
        add_partitions(cursor, -15, 30)
        cursor.execute(
            "SET search_path = public; CREATE TABLE seen (n bigint, at timestamptz);"
            " CREATE VIEW recent AS SELECT id, timestamp AS at, status FROM webhook_log WHERE status <> ''"
        )
        conn.commit()
    yield


def scanned(url: str) -> dict[Labelled, int]:
    """How many partitions the plan of each statement of the workload has once it starts."""
    found: dict[Labelled, int] = {}
    with connected(url) as conn, conn.cursor() as cursor:
        cursor.execute("SET plan_cache_mode = force_generic_plan; SET TimeZone = 'UTC'")
        for labelled in WORKLOAD:
            run = labelled.text
            if labelled.prepared:
                cursor.execute(f"DEALLOCATE ALL; PREPARE p AS {labelled.text}")
                run = f"EXECUTE p({labelled.prepared})"
            cursor.execute(f"EXPLAIN (FORMAT JSON) {run}")
            words = json.dumps(cursor.fetchall()).split('"')
            found[labelled] = len({word for word in words if word.startswith("webhook_log_y")})
    return found


@contextmanager
def reading(url: str) -> Iterator[Connection]:
    """A connection as the plan has it."""
    with opened(connect_engine(postgres_url(url))) as conn, transaction(conn):
        execute(conn, statement("SET TRANSACTION READ ONLY"))
        yield conn


def rows_of(texts: list[str]) -> list[tuple[str, int, float, float]]:
    """What pg_stat_statements would have of these."""
    return [(text, 1, 1.0, 1 / len(texts)) for text in texts]


def test_statements_that_leave_no_partition_out_are_named_and_others_are_not(database: str) -> None:
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
