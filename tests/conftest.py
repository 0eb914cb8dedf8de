"""What the tests run on: real servers, started for the run or named by the environment.

TEST_DATABASE_URL names a PostgreSQL server where the tests may create databases, REDIS_URL a Redis server on
which they take one empty database. Without them embedded servers are used (PG_BIN and REDIS_SERVER choose
their binaries). A missing server fails the tests: nothing is skipped.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest
import redis
from pydantic import SecretStr
from sqlalchemy import NullPool, create_engine
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import DBAPIError

from chronos.demo.binaries import find_postgres
from chronos.demo.embedded import EmbeddedPostgres, EmbeddedRedis, ServerSettings, create_database
from chronos.job_lock import connect
from chronos.jobs import JOBS
from chronos.settings import Settings

# Read before `environment` below hides them from the tests.
_TEST_DATABASE_URL = os.environ.get("TEST_DATABASE_URL")
_REDIS_URL = os.environ.get("REDIS_URL")

SERVER_SETTINGS: ServerSettings = {
    "fsync": "off",
    "max_connections": 100,
    "wal_level": "logical",
    "max_prepared_transactions": 5,
}

# Environment variables override a developer's .env, so these keep every test off a real database.
ENVIRONMENT = {
    "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
    "TEST_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
    "REDIS_URL": "redis://127.0.0.1:1/0",
    "TESTING": "false",
    "LOGFIRE_SEND_TO_LOGFIRE": "false",
    "WEBHOOK_LOG_RETENTION_DAYS": "15",
    "WEBHOOK_LOG_DAYS_AHEAD": "30",
    "BEAT_TIMEZONE": "UTC",
}


class MakeDatabase(Protocol):
    """Create an empty database and return its URL."""

    def __call__(self, timezone: str | None = None) -> str: ...


class OwnPostgres(Protocol):
    """Start a server that only this test uses and may stop."""

    def __call__(self, settings: ServerSettings | None = None) -> EmbeddedPostgres: ...


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def pg_bin() -> Path:
    """The folder with psql and pg_dump."""
    return find_postgres()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server where databases may be created."""
    if not _TEST_DATABASE_URL:
        with EmbeddedPostgres(SERVER_SETTINGS) as server:
            yield server.url
        return
    url = make_url(_TEST_DATABASE_URL).set(drivername="postgresql+psycopg2")
    server_url = url.render_as_string(hide_password=False)
    try:
        _engine(server_url).connect().close()
    except DBAPIError as error:
        raise _no_answer("TEST_DATABASE_URL", error.orig) from None
    yield server_url


@pytest.fixture
def make_database(postgres: str) -> Iterator[MakeDatabase]:
    """A factory of empty databases, which are dropped after the test even with sessions connected."""
    with _engine(postgres).connect() as server, ExitStack() as drops:

        def make(timezone: str | None = None) -> str:
            name = f"chronos_test_{uuid.uuid4().hex}"
            create_database(postgres, name)
            drops.callback(server.exec_driver_sql, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            if timezone:
                server.exec_driver_sql(f"ALTER DATABASE {name} SET timezone = '{timezone}'")
            return make_url(postgres).set(database=name).render_as_string(hide_password=False)

        yield make


@pytest.fixture
def database(make_database: MakeDatabase) -> str:
    """The URL of this test's own empty database."""
    return make_database()


@pytest.fixture
def own_postgres() -> Iterator[OwnPostgres]:
    """A factory of servers for tests that stop them: always embedded, whatever the environment."""
    with ExitStack() as servers:

        def start(settings: ServerSettings | None = None) -> EmbeddedPostgres:
            return servers.enter_context(EmbeddedPostgres({**SERVER_SETTINGS, **(settings or {})}))

        yield start


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """The URL of a Redis database that nothing else uses."""
    if not _REDIS_URL:
        with EmbeddedRedis() as server:
            yield server.url
        return
    for number in range(15, 0, -1):
        url = make_url(_REDIS_URL).set(database=str(number)).render_as_string(hide_password=False)
        with redis.Redis.from_url(url) as client:
            # The claim comes first, so that two concurrent runs never take the same database.
            try:
                claimed = client.set("chronos:tests", "claimed", nx=True)
            except redis.RedisError as error:
                raise _no_answer("REDIS_URL", error) from None
            if claimed and client.dbsize() == 1:
                yield url
                client.flushdb()
                return
            if claimed:
                client.delete("chronos:tests")
    pytest.fail("the Redis of REDIS_URL has no empty database among 1 to 15", pytrace=False)


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    """A client of that Redis database, in which no nightly job has run yet."""
    with connect(Settings(redis_url=SecretStr(redis_url))) as client:
        keys = [job.name for job in JOBS]
        client.delete(*keys)
        yield client
        client.delete(*keys)


def _engine(url: str) -> Engine:
    return create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)


def _no_answer(variable: str, error: object) -> BaseException:
    return pytest.fail.Exception(
        f"{variable} names no server that answers ({' '.join(str(error).split())}): start it, "
        f"or run `env -u {variable} make test` to have one started",
        pytrace=False,
    )
