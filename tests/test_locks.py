"""Attempts at strong locks: how long each may wait, and what is said about the sessions in the way."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from sqlalchemy.engine import Connection, make_url

from chronos.db import connect_engine, execute, transaction
from chronos.errors import LockUnavailableError
from chronos.locks import Locks, Patience, lock_holders, lock_table
from tests.command import chronos
from tests.tables import connected, holding, query


def test_attempts_wait_longer_only_when_short_ones_fail_for_long() -> None:
    patience = Patience(shortest_s=0.1, longest_s=1.0, short_attempts=3)

    waits = [patience.wait_s(attempt) for attempt in range(1, 10)]

    assert waits == pytest.approx([0.1, 0.1, 0.1, 0.2, 0.4, 0.8, 1.05, 1.05, 1.05])
    assert patience.wait_s(1_000_000) == pytest.approx(1.05)


@pytest.mark.parametrize("longest_s", [0.05, 0.1])
def test_attempts_never_wait_longer_than_the_limit(longest_s: float) -> None:
    patience = Patience(longest_s=longest_s)
    assert {patience.wait_s(attempt) for attempt in range(1, 100)} == {longest_s}


def test_pauses_double_up_to_a_limit_and_are_jittered() -> None:
    patience = Patience(first_pause_s=0.1, longest_pause_s=5.0)
    for attempt, ceiling in [(1, 0.1), (2, 0.2), (3, 0.4), (6, 3.2), (7, 5.0), (1_000, 5.0)]:
        pauses = {patience.pause_s(attempt) for _ in range(50)}
        assert len(pauses) > 1
        assert min(pauses) >= ceiling / 2
        assert max(pauses) <= ceiling


HELD = "CREATE TABLE held (id int); CREATE TABLE other (id int)"


def lock_held(locks: Locks, conn: Connection) -> None:
    for attempt in locks.attempts(conn, [("public", "held"), ("public", "other")]):
        with attempt:
            execute(conn, lock_table("public", "held", "ACCESS EXCLUSIVE"))


def held_messages(url: str, attempts: int = 3) -> list[str]:
    """What is said when ``held`` cannot be locked; the last message is the error's."""
    messages: list[str] = []
    locks = Locks(
        Patience(shortest_s=0.02, attempts=attempts, sleep=lambda seconds: None),
        lambda obstacle, attempt: messages.append(str(obstacle)),
    )
    with connect_engine(make_url(url)).connect() as conn:
        with pytest.raises(LockUnavailableError) as raised:
            lock_held(locks, conn)
        # No lock is left behind, and the connection is usable.
        with transaction(conn):
            assert lock_holders(conn, [("public", "other")]) == []
    assert len(messages) == attempts - 1
    return [*messages, str(raised.value)]


def test_the_message_names_the_session_and_the_command_that_ends_it(database: str) -> None:
    query(database, HELD)
    with connected(database, autocommit=False) as reader, reader.cursor() as cursor:
        cursor.execute("SET application_name = 'nightly report'")
        cursor.execute("SELECT id,\n  'a customer''s secret' FROM held")
        pid = reader.get_backend_pid()
        messages = held_messages(database)
        reader.rollback()

    for message in messages:
        assert "waiting for a lock on held and other, held by" in message
        assert f"pid {pid} (nightly report), idle in transaction for " in message
        assert "query: SELECT id, '...'" in message
        assert "secret" not in message
        assert f"SELECT pg_terminate_backend({pid}) would end it" in message
    assert messages[-1].startswith("gave up waiting")
    assert messages[-1].endswith("(3 attempts)")


def test_control_characters_of_a_query_do_not_reach_the_terminal(database: str) -> None:
    query(database, HELD)
    with holding(database, "SELECT /* \x1b[2J\x07\r\x9b2J */ FROM held"):
        [message] = held_messages(database, attempts=1)
    assert "query: SELECT /* [2J 2J */ FROM held" in message
    assert message.isprintable()


def test_the_message_names_a_prepared_transaction(database: str) -> None:
    query(database, HELD)
    gid = f"transfer o'clock {make_url(database).database}"
    with connected(database, autocommit=False) as conn, conn.cursor() as cursor:
        cursor.execute("INSERT INTO held VALUES (1)")
        cursor.execute("PREPARE TRANSACTION %s", (gid,))
    remedy = "ROLLBACK PREPARED '" + gid.replace("'", "''") + "'"
    try:
        [message] = held_messages(database, attempts=1)
        assert f"prepared transaction '{gid}', open for " in message
        assert f"{remedy} would end it" in message
    finally:
        query(database, remedy)  # works as printed


def test_the_message_quotes_no_truncated_value(database: str) -> None:
    """The server keeps only the first kilobyte of a query."""
    query(database, HELD)
    with connected(database, autocommit=False) as reader, reader.cursor() as cursor:
        cursor.execute(f"SELECT FROM held WHERE 'secret {'x' * 2_000}' <> ''")
        [message] = held_messages(database, attempts=1)
        reader.rollback()
    assert "query: SELECT FROM held WHERE '...';" in message


def test_the_three_oldest_sessions_are_named(database: str) -> None:
    query(database, HELD)
    with ExitStack() as stack:
        pids = [
            stack.enter_context(holding(database, "SELECT FROM held")).get_backend_pid() for _ in range(4)
        ]
        [message] = held_messages(database, attempts=1)
    assert [f"pid {pid} " in message or f"pid {pid}," in message for pid in pids] == [True, True, True, False]


def test_the_prompt_names_the_longest_wait(database: str) -> None:
    query(
        database,
        "CREATE TABLE webhook_log (id bigserial PRIMARY KEY, timestamp timestamptz NOT NULL);"
        " CREATE INDEX ON webhook_log (timestamp)",
    )
    for options, said in [((), "at most 1 s"), (("--max-lock-wait", "0.25"), "at most 0.25 s")]:
        result = chronos(database, "migrate", *options, answer="no\n")
        assert result.returncode == 2
        assert f"wait for a lock {said} at a time (--max-lock-wait)" in result.stdout
    assert chronos(database, "migrate", "--max-lock-wait", "0").returncode == 2
