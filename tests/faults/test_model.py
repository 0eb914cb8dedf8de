"""A migration killed again and again, under an application that knows what each of its rows must be.

Each round has its own table, migrated by a randomly chosen strategy. The command is killed at random moments,
then resumed or rolled back at random, until it has been killed often enough; then it is brought to one of its
two ends, and the table is compared row by row with the model. The moments are statements, counted by the
proxy: half are drawn from all, half from the distinct ones, because a build, a replay, a comparison or a swap
sends few statements and the copy sends many.

``CHRONOS_MODEL_ROUNDS=100 pytest -m faults tests/faults/test_model.py -s`` runs more than the usual six
rounds; ``-s`` shows what was killed where.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

import pytest

from chronos.migration.state import Strategy
from tests.command import Run
from tests.conftest import MakeDatabase
from tests.faults.proxy import Proxy, Trace
from tests.live import Application, KeyType, Readers, TimestampType, load, oldest, phase
from tests.tables import query, relations, value
from tests.waiting import wait_until

pytestmark = pytest.mark.faults

ROUNDS = int(os.environ.get("CHRONOS_MODEL_ROUNDS", "6"))
ROWS = 1_500
DAYS = 17
KILLS = 8
# The most commands that a round may need, to catch one that never ends.
COMMANDS = 40

TABLES: list[tuple[KeyType, TimestampType]] = [
    ("serial", "timestamptz"),
    ("uuid", "timestamptz"),
    ("identity", "timestamp"),
]

MIGRATE = ("migrate", "--yes", "--batch-size", "50")
RESUME = (*MIGRATE, "--resume")
HOLD = (*MIGRATE, "--hold")
ROLLBACK = ("rollback", "--yes")

SESSIONS = """
SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'chronos%' AND datname = current_database()
"""

Command = tuple[str, ...]


@dataclass
class Outcome:
    """The outcome of one command: ``at`` is the last statement that it sent, if it was killed."""

    command: Command
    before: str | None
    after: str | None
    code: int
    at: str = ""

    def __str__(self) -> str:
        what = f"killed at {self.at[:80]!r}" if self.at else f"exit {self.code}"
        return f"{' '.join(self.command)}: {self.before} -> {self.after}, {what}"


Traces = dict[tuple[Command, str | None], Trace]
TracesOf = Callable[[Strategy], Traces]


_traces: dict[Strategy, Traces] = {}


@pytest.fixture
def traces_of(make_database: MakeDatabase) -> TracesOf:
    """The statements that undisturbed runs send, by command and phase before it; recorded once."""

    def find(strategy: Strategy) -> Traces:
        if strategy not in _traces:
            url = make_database()
            load(url, ROWS, days=DAYS)
            found: Traces = {}
            for command in (MIGRATE, ROLLBACK, HOLD, RESUME):
                before = phase(url)
                with Proxy(url) as proxy:
                    done = Run(proxy.url, *arguments(command, strategy)).finish()
                assert done.returncode == 0, done.stdout + done.stderr
                found[command, before] = proxy.trace
            _traces[strategy] = found
        return _traces[strategy]

    return find


def arguments(command: Command, strategy: Strategy) -> Command:
    """What is typed: only a new migration is given its strategy, which it keeps."""
    return (*command, "--strategy", strategy.value) if command in (MIGRATE, HOLD) else command


def moment(traces: Traces, command: Command, now: str | None, chance: random.Random) -> int:
    """The number of the statement to die at: any after the first change, or one of the rare ones."""
    # A resumed copy is like a new one; a rollback may have less to do than a complete one.
    like = {
        RESUME: (RESUME, "ready") if now == "returning" else (MIGRATE, None),
        ROLLBACK: (ROLLBACK, "migrated"),
    }
    found = traces[(command, now) if (command, now) in traces else like[command]]
    trace = found.statements
    first = next((n for n, point in enumerate(found.points) if point is not None), 0)
    numbers = range(max(first, 1), len(trace))
    if chance.random() < 0.5:
        return chance.choice(numbers) + 1
    # As in test_faults.py: a statement is identified by itself and the one before it.
    kind = chance.choice(sorted({(trace[n - 1], trace[n]) for n in numbers}))
    return chance.choice([n for n in numbers if (trace[n - 1], trace[n]) == kind]) + 1


def possible(now: str | None, chance: random.Random) -> Command:
    """A random command that an operator may type in this phase."""
    if now is None:
        return chance.choice((MIGRATE, MIGRATE, HOLD))
    if now == "migrated":
        return chance.choice((ROLLBACK, ROLLBACK, ROLLBACK, RESUME))
    if now == "undone":
        return ROLLBACK
    if now == "returning":
        return chance.choice((ROLLBACK, ROLLBACK, RESUME))
    return chance.choice((RESUME, RESUME, ROLLBACK))


def run(url: str, command: Command, strategy: Strategy, at: int, chance: random.Random) -> Outcome:
    """Run a command; unless ``at`` is 0, kill it before that statement or right after it was sent."""
    before = phase(url)
    delay = chance.choice((0.0, 0.0, chance.uniform(0, 0.01)))
    begun: Future[int] = Future()
    ended = threading.Event()

    def kill() -> None:
        pid = begun.result()
        if not ended.wait(delay):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def act(proxy: Proxy) -> None:
        if delay:
            threading.Thread(target=kill, daemon=True).start()
        else:
            kill()

    with Proxy(url, at, act) as proxy:
        running = Run(proxy.url, *arguments(command, strategy))
        begun.set_result(running.pid)
        done = running.finish()
        ended.set()
        killed = done.returncode == -signal.SIGKILL
        sent = proxy.statements[at - 1] if killed else ""
    # The server finishes a running statement, and its COMMIT, before it notices that the client is gone.
    wait_until(lambda: not query(url, SESSIONS), 60, "the sessions of the command are gone")
    if not killed:
        # A complete migration need not be resumed, and a rollback may be the only way.
        fine = (0, 2) if before in ("migrated", "returning") and command == RESUME else (0,)
        assert done.returncode in fine, done.stdout + done.stderr
    return Outcome(command, before, phase(url), done.returncode, sent)


def check(url: str, application: Application, readers: Readers) -> None:
    """All sessions carry on, and each row is what the model says."""
    application.go_on(3)
    readers.go_on(1)
    assert not application.errors, application.errors[:3]
    assert not readers.short, readers.short[:3]
    assert not readers.errors, readers.errors[:3]
    difference = application.compare(since=oldest(url))
    assert not difference, difference


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_killed_again_and_again_no_row_differs_from_the_model(
    make_database: MakeDatabase, traces_of: TracesOf, seed: int
) -> None:
    chance = random.Random(seed)
    strategy = chance.choice(list(Strategy))
    traces = traces_of(strategy)
    url = make_database()
    key_type, timestamp_type = TABLES[seed % len(TABLES)]
    loaded = load(url, ROWS, key_type=key_type, timestamp_type=timestamp_type, days=DAYS)
    plain = relations(url)
    history: list[Outcome] = []
    try:
        with (
            Application(url, loaded, threads=3, rate=150, seed=seed) as application,
            Readers(url, loaded, application, pause_s=0.02, seed=seed) as readers,
        ):
            while sum(bool(outcome.at) for outcome in history) < KILLS:
                assert len(history) < COMMANDS
                now = phase(url)
                command = possible(now, chance)
                history.append(run(url, command, strategy, moment(traces, command, now, chance), chance))
                check(url, application, readers)
            end = chance.choice(("migrated", None))
            while (now := phase(url)) != end:
                assert len(history) < COMMANDS
                history.append(run(url, to_the_end(now, end), strategy, 0, chance))
                check(url, application, readers)
    except BaseException as error:
        error.add_note("\n".join([f"seed {seed}, {strategy}", *map(str, history)]))
        raise
    kind = "p" if end else "r"
    assert value(url, "SELECT relkind::text FROM pg_class WHERE oid = 'webhook_log'::regclass") == kind
    if end is None:
        assert relations(url) == plain
    places = Counter(str(outcome.before) for outcome in history if outcome.at)
    print(f"\nseed {seed}, {strategy}, ends {end or 'plain'}, killed in {dict(places)}")
    print("\n".join(f"  {outcome}" for outcome in history))


def to_the_end(now: str | None, end: str | None) -> Command:
    """The command that leads from this phase towards the wanted end."""
    if now is None:
        return MIGRATE
    if end is None or now in ("migrated", "returning", "undone"):
        return ROLLBACK
    return RESUME
