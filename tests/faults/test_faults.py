"""Whatever dies, and whenever: no row is lost, none is there twice, and one command goes on or back.

Every statement that a command sends, over each of its connections, is a point at which its process may die.
The statements of an undisturbed run are enumerated; those that only repeat for another period what was done
for one before are taken for the first and for the last, and of several that read one after another the first.
Each point is then met for real, through the command line, with a live writer: once to resume, once to roll
back.
"""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

from chronos.demo.embedded import create_database
from chronos.demo.rows import create_webhook_log
from chronos.demo.writer import LiveWriter
from tests.command import Run
from tests.conftest import MakeDatabase, OwnPostgres
from tests.faults.proxy import Point, Proxy
from tests.tables import digest, query, relations, value
from tests.waiting import wait_until

pytestmark = pytest.mark.faults

CHUNKS = 8
ROWS = 300
# Few partitions, for each run makes them all. There are rows older than what is copied, several periods that
# are filled, and more than seven partitions: their foreign keys come in two transactions.
DAYS = 5
RETENTION_DAYS = 3
DAYS_AHEAD = 7
MIGRATE = ("migrate", "--yes", "--workers", "1", "--batch-size", "25")
ROLLBACK = ("rollback", "--yes")
FINALIZE = ("finalize", "--yes")

SHAPE = """
SELECT c.relname, 'index', pg_get_indexdef(i.indexrelid), i.indisvalid
FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
WHERE c.relname ~ '^webhook_log(_y.*)?$'
UNION ALL
SELECT c.relname, k.conname, pg_get_constraintdef(k.oid), k.convalidated
FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
WHERE c.relname ~ '^webhook_log(_y.*)?$'
UNION ALL
SELECT c.relname, a.attname,
       format('%s %s', format_type(a.atttypid, a.atttypmod), pg_get_expr(d.adbin, d.adrelid)), a.attnotnull
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
WHERE c.relname ~ '^webhook_log(_y.*)?$' AND c.relkind IN ('r', 'p') AND a.attnum > 0
ORDER BY 1, 2, 3
"""


class Runner:
    """Runs of the command line, one after another."""

    pid = 0

    def start(self, url: str, *arguments: str) -> int:
        """Begin a run; returns its pid."""
        self._run = Run(url, *arguments)
        self.pid = self._run.pid
        return self.pid

    def finish(self) -> tuple[int, str]:
        """Wait for the run's end: its exit code, negative for a signal, and all that it printed."""
        done = self._run.finish()
        return done.returncode, done.stdout + done.stderr

    def run(self, url: str, *arguments: str) -> tuple[int, str]:
        """A run from start to end."""
        self.start(url, *arguments)
        return self.finish()


@dataclass
class Stage:
    """A server with a filled, plain webhook_log to copy from, and what an undisturbed run does to it."""

    server: str
    template: str
    make_database: MakeDatabase
    runner: Runner = field(default_factory=Runner)
    plain: list[tuple[object, ...]] = field(default_factory=list)
    plain_relations: set[tuple[str, str]] = field(default_factory=set)
    migrated: list[tuple[object, ...]] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)

    def copy(self, source: str) -> str:
        """A new database with all that ``source`` holds; nobody may be connected to it."""
        url = self.make_database()
        query(self.server, f"DROP DATABASE {make_url(url).database}")
        database = make_url(source).database
        assert database is not None
        wait_until(
            lambda: not query(self.server, "SELECT 1 FROM pg_stat_activity WHERE datname = %s", database),
            30,
            f"nobody is connected to {database}",
        )
        create_database(self.server, make_url(url).database or "", template=database)
        return url


@pytest.fixture
def stage(postgres: str, make_database: MakeDatabase) -> Stage:
    found = Stage(postgres, make_database(), make_database)
    create_webhook_log(create_engine(found.template, poolclass=NullPool), ROWS, days=17)
    found.plain, found.plain_relations = query(found.template, SHAPE), relations(found.template)
    undisturbed = found.copy(found.template)
    with Proxy(undisturbed) as proxy:
        assert found.runner.run(proxy.url, *MIGRATE)[0] == 0
    found.trace = proxy.statements
    found.migrated = query(undisturbed, SHAPE)
    return found


def points(trace: list[str]) -> list[int]:
    """The statements to die before, by number: each kind, in each neighbourhood, first and last."""
    seen: dict[tuple[str, ...], list[int]] = {}
    for number in range(len(trace)):
        seen.setdefault(tuple(trace[max(0, number - 1) : number + 1]), []).append(number + 1)
    chosen = {n for numbers in seen.values() for n in (numbers[0], numbers[-1])}
    return sorted(n for n in chosen if n >= first_change(trace))


def first_change(trace: list[str]) -> int:
    """The number of the first statement of the first transaction that changes anything."""
    change = next(n for n, text in enumerate(trace) if text.startswith(("CREATE", "UPDATE", "LOCK")))
    return max(n for n in range(change) if trace[n] == "BEGIN") + 1


def once_a_step(trace: list[str]) -> list[int]:
    """One statement in each stretch of the work: build, swap, a day's fill, its indexes, ... to the end."""
    landmarks = (
        "CREATE TABLE",
        "ALTER TABLE {} RENAME",
        "WITH batch",
        "ADD PRIMARY KEY",
        "VALIDATE CONSTRAINT",
        "ATTACH PARTITION",
        "DROP TABLE",
        "CREATE OR REPLACE FUNCTION",
        "record_image_eq",
        "phase",
    )
    found = []
    for landmark in landmarks:
        parts = landmark.split("{}")
        numbers = [n for n, text in enumerate(trace, 1) if all(part in text for part in parts)]
        found.append(numbers[len(numbers) // 2])
    return sorted(set(found))


def state_of(url: str) -> str | None:
    """The phase in the database, None without a state."""
    if value(url, "SELECT to_regclass('webhook_log_migration') IS NULL"):
        return None
    phase: str = value(url, "SELECT phase FROM webhook_log_migration")
    return phase


def assert_rows(url: str, writers: list[LiveWriter]) -> None:
    """Each commit that a writer was told of is there, once; nothing that it was not told of is."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as conn:
        for writer in writers:
            presence = writer.check(conn)
            assert (presence.lost, presence.twice, presence.repeated_ids) == ([], [], [])
            assert writer.errors == []
    engine.dispose()


def assert_migrated(url: str, stage: Stage, writers: list[LiveWriter]) -> None:
    assert state_of(url) == "migrated"
    assert query(url, SHAPE) == stage.migrated
    cutoff, fence = query(url, "SELECT cutoff, fence FROM webhook_log_migration")[0]
    old = digest(url, "webhook_log_old", f"timestamp >= '{cutoff}'")
    new = digest(url, "webhook_log", f"id <= {fence}")
    assert old == new
    days = query(
        url, "SELECT timestamp::date, count(*) FROM webhook_log_old WHERE timestamp >= %s GROUP BY 1", cutoff
    )
    compared = dict(
        query(url, "SELECT key::date, (value->>'new_rows')::int FROM webhook_log_migration, jsonb_each(days)")
    )
    assert all(compared[day] == count for day, count in days)
    assert_rows(url, writers)


def assert_plain(url: str, stage: Stage, writers: list[LiveWriter]) -> None:
    assert state_of(url) is None
    assert relations(url) == stage.plain_relations
    assert query(url, SHAPE) == stage.plain
    rows, ids, _ = digest(url)
    assert rows == ids == ROWS + sum(len(writer.commits) for writer in writers)
    assert_rows(url, writers)


def go_on(url: str, stage: Stage, writers: list[LiveWriter]) -> None:
    """Resume, or start again where nothing was begun, with the application writing."""
    phase = state_of(url)
    with LiveWriter(url, threads=1, rate=150, past_share=0.2, seed=2) as writer:
        wait_until(lambda: writer.commits, 20, "the writer writes")
        code, output = stage.runner.run(url, *MIGRATE, *(["--resume"] if phase else []))
    assert code == (2 if phase == "migrated" else 0), output
    assert_migrated(url, stage, [*writers, writer])


def go_back(url: str, stage: Stage, writers: list[LiveWriter]) -> None:
    """Roll back, with the application writing."""
    phase = state_of(url)
    with LiveWriter(url, threads=1, rate=150, past_share=0.2, seed=3) as writer:
        wait_until(lambda: writer.commits, 20, "the writer writes")
        code, output = stage.runner.run(url, "rollback", "--yes")
    assert code == (0 if phase else 2), output
    assert_plain(url, stage, [*writers, writer])


def disturb(
    stage: Stage, source: str, command: tuple[str, ...], at: int, act: Callable[[Proxy], None]
) -> tuple[str, LiveWriter, int, str]:
    """Run ``command`` on a copy of ``source`` with a writer, and ``act`` before statement ``at``."""
    url = stage.copy(source)
    with (
        Proxy(url, at, act) as proxy,
        LiveWriter(url, threads=1, rate=150, past_share=0.2) as writer,
    ):
        wait_until(lambda: writer.commits, 20, "the writer writes")
        stage.runner.start(proxy.url, *command)
        code, output = stage.runner.finish()
        assert proxy.acted.is_set()
    return url, writer, code, output


def kill(stage: Stage) -> Callable[[Proxy], None]:
    return lambda proxy: os.kill(stage.runner.pid, signal.SIGKILL)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_killed_before_any_statement(stage: Stage, chunk: int) -> None:
    """kill -9, then resume; and again, then roll back."""
    for point in points(stage.trace)[chunk::CHUNKS]:
        url, writer, code, output = disturb(stage, stage.template, MIGRATE, point, kill(stage))
        assert code == -signal.SIGKILL, output
        other = stage.copy(url)
        try:
            go_on(url, stage, [writer])
            go_back(other, stage, [writer])
        except AssertionError as error:
            raise AssertionError(
                f"killed before statement {point}: {stage.trace[point - 1][:300]}"
            ) from error
        for database in (url, other):
            query(stage.server, f"DROP DATABASE {make_url(database).database} WITH (FORCE)")


@pytest.mark.parametrize("chunk", range(2))
def test_rollback_killed_before_any_statement(stage: Stage, chunk: int) -> None:
    """The way back is cut off as well, and taken again."""
    migrated = stage.copy(stage.template)
    with LiveWriter(migrated, threads=1, rate=300, past_share=0.2) as first:
        assert stage.runner.run(migrated, *MIGRATE)[0] == 0
        wait_until(lambda: len(first.commits) > 50, 20, "the writer writes")
    query(migrated, "UPDATE webhook_log SET status = 'seen again' WHERE id <= 300")
    query(migrated, "DELETE FROM webhook_log WHERE id BETWEEN 301 AND 310")
    rehearsal = stage.copy(migrated)
    with Proxy(rehearsal) as proxy:
        assert stage.runner.run(proxy.url, "rollback", "--yes")[0] == 0
    expected = digest(rehearsal, where="id <= 400")
    assert value(rehearsal, "SELECT count(*) FROM webhook_log WHERE id BETWEEN 301 AND 310") == 0
    for point in points(proxy.statements)[chunk::2]:
        url, writer, code, output = disturb(stage, migrated, ("rollback", "--yes"), point, kill(stage))
        assert code == -signal.SIGKILL, output
        try:
            phase = state_of(url)
            code, output = stage.runner.run(url, "rollback", "--yes")
            assert code == (0 if phase else 2), output
            assert state_of(url) is None
            assert query(url, SHAPE) == stage.plain
            assert relations(url) == stage.plain_relations
            assert digest(url, where="id <= 400") == expected
            assert_rows(url, [first, writer])
        except AssertionError as error:
            raise AssertionError(f"killed before {point}: {proxy.statements[point - 1][:300]}") from error
        query(stage.server, f"DROP DATABASE {make_url(url).database} WITH (FORCE)")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_asked_to_stop(stage: Stage, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM, twice, in each step: exit 3 with both commands, or the end if it was near."""

    def stop_twice(proxy: Proxy) -> None:
        for _ in range(2):
            os.kill(stage.runner.pid, number)

    for point in once_a_step(stage.trace):
        url, writer, code, output = disturb(stage, stage.template, MIGRATE, point, stop_twice)
        if code == 0:
            assert_migrated(url, stage, [writer])
            continue
        assert code == 3, output
        assert "--resume" in output
        assert "python -m chronos rollback" in output
        other = stage.copy(url)
        go_on(url, stage, [writer])
        go_back(other, stage, [writer])


@pytest.mark.parametrize("fault", ["cut", "terminated"])
def test_connections_lost(stage: Stage, fault: str) -> None:
    """The network fails, or an administrator ends the sessions: rolled back, or exit 3 and resumable."""

    def cut(proxy: Proxy) -> None:
        proxy.cut()

    def terminate(proxy: Proxy) -> None:
        query(
            stage.server,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'chronos migrate' AND datname = %s",
            make_url(proxy.url).database,
        )

    for point in once_a_step(stage.trace):
        act = cut if fault == "cut" else terminate
        url, writer, code, output = disturb(stage, stage.template, MIGRATE, point, act)
        assert code in (1, 3) or (code == 0 and "MIGRATION COMPLETED" in output), output
        if code == 1:
            assert "rolled back" in output
            assert_plain(url, stage, [writer])
        elif code == 3:
            go_on(url, stage, [writer])
        else:
            assert_migrated(url, stage, [writer])


def test_server_stopped(own_postgres: OwnPostgres) -> None:
    """pg_ctl stop -m immediate in each step: once it is back, one command goes on."""
    server = own_postgres({"fsync": "on", "full_page_writes": "on"})
    runner = Runner()
    template = server.create_database("filled")
    create_webhook_log(create_engine(template, poolclass=NullPool), ROWS, days=17)

    def fresh(name: str) -> str:
        return server.create_database(name, template="filled")

    with Proxy(fresh("rehearsal")) as rehearsal:
        assert runner.run(rehearsal.url, *MIGRATE)[0] == 0
    for number, point in enumerate(once_a_step(rehearsal.statements)):
        url = fresh(f"stopped_{number}")
        with (
            Proxy(url, point, lambda proxy: server.stop("immediate")) as proxy,
            LiveWriter(url, threads=1, rate=150, past_share=0.2, reconnect=True) as writer,
        ):
            wait_until(lambda: writer.commits, 20, "the writer writes")
            pid = runner.start(proxy.url, *MIGRATE)
            assert proxy.acted.wait(60)
            # The operator's terminal goes with the server, so nobody is left to roll back.
            os.kill(pid, signal.SIGKILL)
            runner.finish()
            server.start()
            writer.catch_up()
            phase = state_of(url)
            again = ["--resume"] if phase else []
            code, output = runner.run(url, *MIGRATE, *again)
            assert code == (2 if phase == "migrated" else 0), output
        engine = create_engine(url, poolclass=NullPool)
        with engine.connect() as conn:
            presence = writer.check(conn)
        assert (presence.lost, presence.twice, presence.repeated_ids) == ([], [], [])
        assert writer.errors == []
        cutoff, fence = query(url, "SELECT cutoff, fence FROM webhook_log_migration")[0]
        assert digest(url, "webhook_log_old", f"timestamp >= '{cutoff}'") == digest(
            url, "webhook_log", f"id <= {fence}"
        )


def test_server_back_in_time_is_rolled_back_by_itself(own_postgres: OwnPostgres) -> None:
    """A server that restarts while the migration runs: it waits for it, and rolls back, exit 1."""
    server = own_postgres()
    runner = Runner()
    url = server.create_database("restarted")
    create_webhook_log(create_engine(url, poolclass=NullPool), ROWS, days=17)
    before = query(url, SHAPE), relations(url)

    def restart(proxy: Proxy) -> None:
        server.stop("immediate")
        server.start()

    with (
        Proxy(url, 400, restart) as proxy,
        LiveWriter(url, threads=1, rate=150, past_share=0.2, reconnect=True) as writer,
    ):
        code, output = runner.run(proxy.url, *MIGRATE)
        assert proxy.acted.is_set()
    assert code == 1, output
    assert (query(url, SHAPE), relations(url)) == before
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as conn:
        presence = writer.check(conn)
    assert (presence.lost, presence.twice, presence.repeated_ids) == ([], [], [])
