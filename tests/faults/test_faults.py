"""Whatever dies, and whenever: no row is lost or duplicated, and one command resumes or rolls back.

Every statement that a command sends, over any of its connections, is a point at which its process may die.
The statements of an undisturbed run are listed; of those that repeat the same work for each period only the
first and last count, and of consecutive reads only the first. Each point is then tried for real, through the
command line, with a live writer: once to resume, once to roll back.
"""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
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
from tests.faults.proxy import Point, Proxy, Trace
from tests.tables import digest, query, relations, value
from tests.waiting import wait_until

pytestmark = pytest.mark.faults

CHUNKS = 8
ROWS = 300
# Few partitions, as each run creates them all. There are rows older than what is copied, several periods to
# fill, and more than seven partitions, so that their foreign keys take two transactions.
DAYS = 5
RETENTION_DAYS = 3
DAYS_AHEAD = 7
# A table that becomes a partition covers a whole week of them.
DAYS_AHEAD_OF_ATTACH = 15
MIGRATE = ("migrate", "--yes", "--workers", "1", "--batch-size", "25")
ATTACH = ("migrate", "--yes", "--strategy", "attach")
ROLLBACK = ("rollback", "--yes")
FINALIZE = ("finalize", "--yes")

SHAPE = """
SELECT c.relname, 'index', pg_get_indexdef(i.indexrelid), i.indisvalid
FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
WHERE c.relname ~ '^webhook_log(_y.*|_history)?$'
UNION ALL
SELECT c.relname, k.conname, pg_get_constraintdef(k.oid), k.convalidated
FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
WHERE c.relname ~ '^webhook_log(_y.*|_history)?$'
UNION ALL
SELECT c.relname, a.attname,
       format('%s %s', format_type(a.atttypid, a.atttypmod), pg_get_expr(d.adbin, d.adrelid)), a.attnotnull
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
WHERE c.relname ~ '^webhook_log(_y.*|_history)?$' AND c.relkind IN ('r', 'p') AND a.attnum > 0
ORDER BY 1, 2, 3
"""


class Runner:
    """Runs of the command line, one after another."""

    pid = 0

    def start(self, url: str, *arguments: str) -> int:
        """Start a run; returns its pid."""
        self._run = Run(url, *arguments)
        self.pid = self._run.pid
        return self.pid

    def finish(self) -> tuple[int, str]:
        """Wait for the run to end; returns its exit code, negative for a signal, and its output."""
        done = self._run.finish()
        return done.returncode, done.stdout + done.stderr

    def run(self, url: str, *arguments: str) -> tuple[int, str]:
        """Run from start to end."""
        self.start(url, *arguments)
        return self.finish()


@dataclass
class Stage:
    """A server with a filled, plain webhook_log to copy from, and what an undisturbed run does to it."""

    server: str
    template: str
    make_database: MakeDatabase
    migrate: tuple[str, ...] = MIGRATE
    runner: Runner = field(default_factory=Runner)
    plain: list[tuple[object, ...]] = field(default_factory=list)
    plain_relations: set[tuple[str, str]] = field(default_factory=set)
    migrated: list[tuple[object, ...]] = field(default_factory=list)
    trace: Trace = field(default_factory=Trace)

    def copy(self, source: str) -> str:
        """A new copy of ``source``, which must have no sessions connected."""
        url = self.make_database()
        query(self.server, f"DROP DATABASE {make_url(url).database}")
        database = make_url(source).database
        assert database is not None
        wait_until(
            lambda: not query(self.server, "SELECT 1 FROM pg_stat_activity WHERE datname = %s", database),
            30,
            f"no session is connected to {database}",
        )
        create_database(self.server, make_url(url).database or "", template=database)
        return url


@pytest.fixture(autouse=True)
def few_partitions(environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEBHOOK_LOG_RETENTION_DAYS", str(RETENTION_DAYS))
    monkeypatch.setenv("WEBHOOK_LOG_DAYS_AHEAD", str(DAYS_AHEAD))


@pytest.fixture
def stage(
    request: pytest.FixtureRequest,
    postgres: str,
    make_database: MakeDatabase,
    few_partitions: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Stage:
    """The stage for MIGRATE by default, or for ATTACH."""
    found = Stage(postgres, make_database(), make_database, getattr(request, "param", MIGRATE))
    if found.migrate == ATTACH:
        monkeypatch.setenv("WEBHOOK_LOG_DAYS_AHEAD", str(DAYS_AHEAD_OF_ATTACH))
    create_webhook_log(create_engine(found.template, poolclass=NullPool), ROWS, days=DAYS)
    found.plain, found.plain_relations = query(found.template, SHAPE), relations(found.template)
    undisturbed = found.copy(found.template)
    with writing(undisturbed) as writer, Proxy(undisturbed, hold=until_noted(writer)) as proxy:
        code, output = found.runner.run(proxy.url, *found.migrate)
        assert code == 0, output
    found.trace = proxy.trace
    found.migrated = query(undisturbed, SHAPE)
    return found


Moment = tuple[Point, int]


def moments(trace: Trace) -> list[Moment]:
    """When to die: at the first and last occurrence of each kind of point, in the order of the run.

    Right after a commit and before the next change count as one moment: only queries are sent in between.
    """
    seen: Counter[Point] = Counter()
    passed = [point for point in trace.points if point]
    times = Counter(passed)
    found = []
    committed = False
    for point in passed:
        seen[point] += 1
        if seen[point] in (1, times[point]) and not committed:
            found.append((point, seen[point]))
        committed = point.next == ""
    return found


# What each stage of the work does, from first to last.
LANDMARKS = (
    r"CREATE TABLE \S+_new",
    r"CREATE TRIGGER \S+_note_insert\S* AFTER INSERT ON \S+webhook_log\"",
    r"CREATE TABLE \S+_\?\"",
    r"<<copying>>",
    r"ADD PRIMARY KEY",
    r"ATTACH PARTITION",
    r"NOT VALID",
    r"VALIDATE CONSTRAINT",
    r"CREATE OR REPLACE FUNCTION \S*drop_old",
    r"phase = 'ready'",
    r"WITH notes",
    r"^LOCK TABLE ONLY \S+\.\"webhook_log\" IN SHARE ROW EXCLUSIVE MODE$",
    r"RENAME TO \S+_old",
    r"verified = true",
)


def once_a_step(trace: Trace) -> list[Moment]:
    """One moment in each stage of the work, and the one right after the swap."""
    found = {}
    for landmark in LANDMARKS:
        numbers = [n for n, point in enumerate(trace.points) if point and re.search(landmark, point.next)]
        assert numbers, f"{landmark} is not among the statements"
        found[numbers[len(numbers) // 2]] = True
    renamed = next(
        n for n, point in enumerate(trace.points) if point and point.next == "" and RENAMED in point.done
    )
    found[renamed] = True
    return [(point, trace.points[: n + 1].count(point)) for n in sorted(found) if (point := trace.points[n])]


RENAMED = 'RENAME TO "webhook_log_old"'


def state_of(url: str) -> str | None:
    """The phase in the database, None without a state, "verified" when nothing is left to do."""
    if value(url, "SELECT to_regclass('webhook_log_migration') IS NULL"):
        return None
    phase, verified = query(url, "SELECT phase, verified FROM webhook_log_migration")[0]
    return "verified" if phase == "migrated" and verified else str(phase)


def writing(url: str, *, seed: int = 1, rate: float = 150, reconnect: bool = False) -> LiveWriter:
    """An application that also writes late rows, all of them recent enough to be kept."""
    return LiveWriter(
        url,
        threads=1,
        rate=rate,
        past_share=0.2,
        past_days=RETENTION_DAYS - 0.5,
        seed=seed,
        reconnect=reconnect,
    )


def until_noted(writer: LiveWriter) -> Callable[[str], None]:
    """Hold back queries for notes until there are some, so that every run sends the same statements."""

    def hold(text: str) -> None:
        if LOOKS_FOR_NOTES.search(text) or STOPS_WRITERS.fullmatch(text):
            writer.catch_up()

    return hold


LOOKS_FOR_NOTES = re.compile(r"NOT chronos_truncated LIMIT 1\)")
STOPS_WRITERS = re.compile(r'LOCK TABLE( ONLY)? \S+\."webhook_log" IN SHARE ROW EXCLUSIVE MODE')


def assert_rows(url: str, writers: list[LiveWriter]) -> None:
    """Each acknowledged commit is there once, and nothing else."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as conn:
        for writer in writers:
            presence = writer.check(conn)
            assert (presence.lost, presence.twice, presence.repeated_ids) == ([], [], [])
            assert writer.errors == []
    engine.dispose()


def assert_copied(url: str) -> None:
    """Each row of the window not written since the swap is in both tables, and all were compared."""
    [(cutoff, fence)] = query(
        url, "SELECT (plan ->> 'cutoff')::timestamptz, fence FROM webhook_log_migration"
    )
    copied = (
        f"timestamp BETWEEN '{cutoff}' AND '{fence}' AND NOT EXISTS ("
        "SELECT FROM webhook_log_migration_changes AS c"
        " WHERE (c.id, c.timestamp) = (t.id, t.timestamp) AND c.chronos_origin = 'n')"
    )
    assert digest(url, "webhook_log_old", copied) == digest(url, "webhook_log", copied)
    unequal = (
        "SELECT key FROM webhook_log_migration, jsonb_each(compared)"
        " WHERE value->'old_rows' <> value->'new_rows' OR NOT (value->'alike')::boolean"
    )
    assert query(url, unequal) == []
    lacking = (
        "SELECT DISTINCT timestamp::date FROM webhook_log_old WHERE timestamp >= %s AND id <= %s EXCEPT"
        " SELECT key::timestamptz::date FROM webhook_log_migration, jsonb_each(compared)"
    )
    assert query(url, lacking, cutoff, ROWS) == []


def assert_migrated(url: str, stage: Stage, writers: list[LiveWriter]) -> None:
    assert state_of(url) == "verified"
    assert query(url, SHAPE) == stage.migrated
    if stage.migrate == MIGRATE:
        assert_copied(url)
    assert_rows(url, writers)


def assert_plain(url: str, stage: Stage, writers: list[LiveWriter]) -> None:
    assert state_of(url) is None
    assert relations(url) == stage.plain_relations
    assert query(url, SHAPE) == stage.plain
    rows, ids, _ = digest(url)
    assert rows == ids == ROWS + sum(len(writer.commits) for writer in writers)
    assert_rows(url, writers)


def go_on(url: str, stage: Stage, writers: list[LiveWriter]) -> None:
    """Resume, or start again if nothing had begun, while the application writes."""
    state = state_of(url)
    with writing(url, seed=2) as writer:
        writer.catch_up()
        code, output = stage.runner.run(url, *stage.migrate, *(["--resume"] if state else []))
    assert code == (2 if state == "verified" else 0), output
    assert_migrated(url, stage, [*writers, writer])


def go_back(url: str, stage: Stage, writers: list[LiveWriter]) -> None:
    """Roll back while the application writes."""
    state = state_of(url)
    with writing(url, seed=3) as writer:
        writer.catch_up()
        code, output = stage.runner.run(url, *ROLLBACK)
    assert code == (0 if state else 2), output
    assert_plain(url, stage, [*writers, writer])


def disturb(
    stage: Stage, source: str, command: tuple[str, ...], at: Moment, act: Callable[[Proxy], None]
) -> tuple[str, LiveWriter, int, str]:
    """Run ``command`` on a copy of ``source`` with a writer, and call ``act`` at the moment ``at``."""
    url = stage.copy(source)
    with writing(url) as writer, Proxy(url, at, act, until_noted(writer)) as proxy:
        writer.catch_up()
        stage.runner.start(proxy.url, *command)
        code, output = stage.runner.finish()
        # A run that ends with its connection may finish before the act has returned.
        assert proxy.acted.wait(60), f"never reached {shown(at)}\n{output}"
    return url, writer, code, output


def shown(at: Moment) -> str:
    """A moment, for a failure message."""
    (done, coming), times = at
    return f"{times}. time between\n{done[:300]}\nand\n{coming[:300] or 'what comes after its commit'}"


def kill(stage: Stage) -> Callable[[Proxy], None]:
    return lambda proxy: os.kill(stage.runner.pid, signal.SIGKILL)


def drop(stage: Stage, *urls: str) -> None:
    for url in urls:
        query(stage.server, f"DROP DATABASE {make_url(url).database} WITH (FORCE)")


def in_chunks(copy: int, attach: int) -> list[object]:
    """Parameters: stage, chunk and number of chunks, for each strategy."""
    return [
        pytest.param(migrate, chunk, chunks, id=f"{what}-{chunk}")
        for what, migrate, chunks in (("copy", MIGRATE, copy), ("attach", ATTACH, attach))
        for chunk in range(chunks)
    ]


@pytest.mark.parametrize(("stage", "chunk", "chunks"), in_chunks(CHUNKS, 2), indirect=["stage"])
def test_a_migration_killed_before_any_statement_resumes_or_rolls_back(
    stage: Stage, chunk: int, chunks: int
) -> None:
    """kill -9, then resume; kill -9 again, then roll back."""
    for moment in moments(stage.trace)[chunk::chunks]:
        url, writer, code, output = disturb(stage, stage.template, stage.migrate, moment, kill(stage))
        assert code == -signal.SIGKILL, output
        other = stage.copy(url)
        try:
            go_on(url, stage, [writer])
            go_back(other, stage, [writer])
        except AssertionError as error:
            error.add_note(f"killed for the {shown(moment)}")
            raise
        drop(stage, url, other)


@pytest.mark.parametrize(("stage", "chunk", "chunks"), in_chunks(2, 1), indirect=["stage"])
def test_a_rollback_killed_before_any_statement_can_be_repeated(
    stage: Stage, chunk: int, chunks: int
) -> None:
    """The rollback is killed too, and run again."""
    migrated = stage.copy(stage.template)
    with writing(migrated, rate=300) as first:
        code, output = stage.runner.run(migrated, *stage.migrate)
        assert code == 0, output
        wait_until(lambda: len(first.commits) > 50, 20, "the writer writes")
    # The newest of the initial rows, which were copied.
    query(migrated, "UPDATE webhook_log SET status = 'seen again' WHERE id BETWEEN 201 AND 250")
    query(migrated, "DELETE FROM webhook_log WHERE id BETWEEN 251 AND 260")
    # From a clock that is ahead: with a table that has become a partition, beyond its bound.
    ahead = 9 if stage.migrate == ATTACH else 2
    query(
        migrated,
        "UPDATE webhook_log SET timestamp = now() + %s * interval '1 day' WHERE id BETWEEN 261 AND 270",
        ahead,
    )
    rehearsal = stage.copy(migrated)
    with writing(rehearsal) as other, Proxy(rehearsal, hold=until_noted(other)) as proxy:
        code, output = stage.runner.run(proxy.url, *ROLLBACK)
        assert code == 0, output
    expected = digest(rehearsal, where=f"id <= {ROWS}")
    assert expected[0] == ROWS - 10
    assert value(rehearsal, "SELECT count(*) FROM webhook_log WHERE status = 'seen again'") == 50
    for moment in moments(proxy.trace)[chunk::chunks]:
        url, writer, code, output = disturb(stage, migrated, ROLLBACK, moment, kill(stage))
        assert code == -signal.SIGKILL, output
        try:
            state = state_of(url)
            code, output = stage.runner.run(url, *ROLLBACK)
            assert code == (0 if state else 2), output
            assert state_of(url) is None
            assert query(url, SHAPE) == stage.plain
            assert relations(url) == stage.plain_relations
            assert digest(url, where=f"id <= {ROWS}") == expected
            assert_rows(url, [first, writer])
        except AssertionError as error:
            error.add_note(f"killed for the {shown(moment)}")
            raise
        drop(stage, url)


def test_finalize_killed_before_any_statement_can_be_repeated(stage: Stage) -> None:
    """The next call drops the rest; the application never notices."""
    migrated = stage.copy(stage.template)
    code, output = stage.runner.run(migrated, *MIGRATE)
    assert code == 0, output
    rehearsal = stage.copy(migrated)
    with Proxy(rehearsal) as proxy:
        code, output = stage.runner.run(proxy.url, *FINALIZE)
        assert code == 0, output
    finalized = relations(rehearsal)
    assert ("r", "public.webhook_log_old") not in finalized
    for moment in moments(proxy.trace):
        url, writer, code, output = disturb(stage, migrated, FINALIZE, moment, kill(stage))
        assert code == -signal.SIGKILL, output
        try:
            state = state_of(url)
            with writing(url, seed=2) as other:
                other.catch_up()
                code, output = stage.runner.run(url, *FINALIZE)
            assert code == (0 if state else 2), output
            assert state_of(url) is None
            assert relations(url) == finalized
            assert query(url, SHAPE) == stage.migrated
            assert_rows(url, [writer, other])
        except AssertionError as error:
            error.add_note(f"killed for the {shown(moment)}")
            raise
        drop(stage, url)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_stop_in_any_step_is_resumable_or_finishes(stage: Stage, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM, twice, in each step: exit 3 with both commands, or it finishes if nearly done."""

    def stop_twice(proxy: Proxy) -> None:
        for _ in range(2):
            os.kill(stage.runner.pid, number)

    for moment in once_a_step(stage.trace):
        url, writer, code, output = disturb(stage, stage.template, MIGRATE, moment, stop_twice)
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
def test_lost_connections_roll_back_or_leave_it_resumable(stage: Stage, fault: str) -> None:
    """The network fails or an administrator ends the sessions: rolled back, or exit 3 and resumable."""

    def cut(proxy: Proxy) -> None:
        proxy.cut()

    def terminate(proxy: Proxy) -> None:
        query(
            stage.server,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'chronos migrate' AND datname = %s",
            make_url(proxy.url).database,
        )

    for moment in once_a_step(stage.trace):
        act = cut if fault == "cut" else terminate
        url, writer, code, output = disturb(stage, stage.template, MIGRATE, moment, act)
        assert code in (1, 3) or (code == 0 and "MIGRATION COMPLETED" in output), output
        # Before the swap it rolls back by itself, afterwards it does not.
        assert code != 1 or RENAMED not in moment[0].done
        if code == 1:
            assert "rolled back" in output
            assert_plain(url, stage, [writer])
        elif code == 3:
            go_on(url, stage, [writer])
        else:
            assert_migrated(url, stage, [writer])


def test_a_server_stopped_in_any_step_leaves_it_resumable(own_postgres: OwnPostgres) -> None:
    """pg_ctl stop -m immediate in each step: once the server is back, one command resumes."""
    server = own_postgres({"fsync": "on", "full_page_writes": "on"})
    runner = Runner()
    template = server.create_database("filled")
    create_webhook_log(create_engine(template, poolclass=NullPool), ROWS, days=DAYS)

    def fresh(name: str) -> str:
        return server.create_database(name, template="filled")

    url = fresh("rehearsal")
    with writing(url) as writer, Proxy(url, hold=until_noted(writer)) as rehearsal:
        code, output = runner.run(rehearsal.url, *MIGRATE)
        assert code == 0, output
    for number, moment in enumerate(once_a_step(rehearsal.trace)):
        url = fresh(f"stopped_{number}")
        with (
            writing(url, reconnect=True) as writer,
            Proxy(url, moment, lambda proxy: server.stop("immediate"), until_noted(writer)) as proxy,
        ):
            writer.catch_up()
            pid = runner.start(proxy.url, *MIGRATE)
            assert proxy.acted.wait(60), shown(moment)
            # The operator's terminal dies with the server, so nothing is left to roll back. A run that has
            # only the swap left to do may have ended by itself.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            runner.finish()
            server.start()
            writer.catch_up()
            state = state_of(url)
            code, output = runner.run(url, *MIGRATE, *(["--resume"] if state else []))
            assert code == (2 if state == "verified" else 0), output
        assert_rows(url, [writer])
        assert_copied(url)


def test_a_server_restart_during_the_copy_keeps_what_is_copied(own_postgres: OwnPostgres) -> None:
    """A lost connection means exit 3, whether or not the server is back, and one command resumes."""
    server = own_postgres()
    runner = Runner()
    template = server.create_database("filled")
    create_webhook_log(create_engine(template, poolclass=NullPool), ROWS, days=DAYS)
    url = server.create_database("rehearsal", template="filled")
    with writing(url) as writer, Proxy(url, hold=until_noted(writer)) as rehearsal:
        code, output = runner.run(rehearsal.url, *MIGRATE)
        assert code == 0, output
    url = server.create_database("restarted", template="filled")
    [copying] = [at for at in once_a_step(rehearsal.trace) if "<<copying>>" in at[0].next]

    def restart(proxy: Proxy) -> None:
        server.stop("immediate")
        server.start()

    with Proxy(url, copying, restart) as proxy, writing(url, reconnect=True) as writer:
        code, output = runner.run(proxy.url, *MIGRATE)
        assert proxy.acted.wait(60)
        assert code == 3, output
        code, output = runner.run(url, *MIGRATE, "--resume")
        assert code == 0, output
    assert_rows(url, [writer])
    assert_copied(url)
