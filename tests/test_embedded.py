"""The embedded servers answer, can be stopped, and never outlive their owner."""

from __future__ import annotations

import json
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from sqlalchemy import NullPool, create_engine
from sqlalchemy.exc import OperationalError

from chronos.demo import binaries
from chronos.demo.binaries import EmbeddedServerError
from chronos.demo.embedded import EmbeddedPostgres, EmbeddedRedis
from tests.conftest import MakeDatabase, OwnPostgres
from tests.waiting import wait_until

REPOSITORY = Path(__file__).parents[1]
IS_ROOT = os.geteuid() == 0
TIMEOUT = 60.0

# A program that starts both servers, says so, and runs until its stdin ends.
OWNER = """
import json, os, signal, sys
from chronos.demo.embedded import EmbeddedPostgres, EmbeddedRedis
mode = sys.argv[1]
with EmbeddedPostgres(keep=mode == "keep") as postgres, EmbeddedRedis() as redis:
    fork = os.fork() if mode == "fork" else None
    if fork == 0:
        signal.pause()
    try:
        print(json.dumps({
            "url": postgres.url,
            "pids": [postgres.pid, redis.pid],
            "directories": [str(postgres.directory), str(redis.directory)],
            "stop_command": postgres.stop_command,
            "uid": postgres.data_dir.stat().st_uid,
            "fork": fork,
        }), flush=True)
        if mode != "keep":
            sys.stdin.read()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.stdin.read()
"""


@dataclass
class Owner:
    """A process with two embedded servers."""

    process: subprocess.Popen[str]
    facts: dict[str, Any]

    def servers_are_gone(self) -> bool:
        return not any(map(is_alive, self.facts["pids"])) and not any(
            Path(directory).exists() for directory in self.facts["directories"]
        )


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start_owner(mode: str = "wait", **popen: Any) -> Owner:
    process = subprocess.Popen(
        [sys.executable, "-B", "-c", OWNER, mode],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **popen,
    )
    assert process.stdout
    return Owner(process, json.loads(process.stdout.readline()))


@pytest.fixture
def owner() -> Iterator[Owner]:
    owner = start_owner()
    with owner.process:
        yield owner
        owner.process.kill()


def fetch(url: str, query: str) -> Any:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        return connection.exec_driver_sql(query).scalar_one()


def execute(url: str, *statements: str) -> None:
    with create_engine(url, poolclass=NullPool).begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def test_settings_take_effect(own_postgres: OwnPostgres) -> None:
    server = own_postgres(
        {"timezone": "Asia/Kolkata", "max_connections": 42, "jit": False, "cluster_name": "it's"}
    )
    shown = {
        name: fetch(server.url, f"SHOW {name}")
        for name in ("timezone", "max_connections", "jit", "cluster_name", "server_encoding")
    }
    assert shown == {
        "timezone": "Asia/Kolkata",
        "max_connections": "42",
        "jit": "off",
        "cluster_name": "it's",
        "server_encoding": "UTF8",
    }
    assert fetch(server.url, "SHOW server_version").split()[0] == server.version
    assert Path(fetch(server.url, "SHOW data_directory")) == server.data_dir


def test_a_wrong_password_is_refused(own_postgres: OwnPostgres) -> None:
    url = re.sub(":[0-9a-f]+@", ":guessed@", own_postgres().url)
    with pytest.raises(OperationalError, match="password authentication failed"):
        fetch(url, "SELECT 1")


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_committed_rows_survive_a_stop(own_postgres: OwnPostgres, mode: Any) -> None:
    server = own_postgres()
    execute(server.url, "CREATE TABLE t (n int)", "INSERT INTO t VALUES (1), (2)")
    url, pid = server.url, server.pid
    server.stop(mode)
    with pytest.raises(OperationalError, match="refused"):
        fetch(url, "SELECT 1")
    server.start()
    assert server.url == url
    assert server.pid != pid
    assert fetch(url, "SELECT count(*) FROM t") == 2
    recovered = "automatic recovery in progress" in server.log.read_text()
    assert recovered == (mode == "immediate")


def test_starting_a_running_server_does_nothing(own_postgres: OwnPostgres) -> None:
    server = own_postgres()
    pid = server.pid
    server.start()
    assert server.pid == pid


def test_two_servers_run_at_once(own_postgres: OwnPostgres) -> None:
    one, other = own_postgres(), own_postgres()
    execute(one.url, "CREATE TABLE only_here (n int)")
    assert fetch(one.url, "SELECT to_regclass('only_here') IS NOT NULL")
    assert not fetch(other.url, "SELECT to_regclass('only_here') IS NOT NULL")


def test_a_database_is_created_from_a_template(own_postgres: OwnPostgres) -> None:
    server = own_postgres()
    execute(server.create_database("model"), "CREATE TABLE t AS SELECT 7 AS n")
    assert fetch(server.create_database("copy of it", template="model"), "SELECT n FROM t") == 7


def test_a_test_database_is_empty_and_has_the_requested_time_zone(
    make_database: MakeDatabase, database: str
) -> None:
    assert fetch(make_database(timezone="Asia/Kolkata"), "SHOW timezone") == "Asia/Kolkata"
    assert fetch(database, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0


def test_redis_locks_exclude_each_other(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        lock, other = (client.lock("embedded-test", timeout=60) for _ in range(2))
        assert lock.acquire(blocking=False)
        assert not other.acquire(blocking=False)
        lock.release()
        assert other.acquire(blocking=False)
        other.release()


@pytest.mark.parametrize("kill", [False, True])
def test_redis_is_empty_after_a_restart(kill: bool) -> None:
    with EmbeddedRedis() as server, redis.Redis.from_url(server.url) as client:
        client.set("key", "value")
        server.stop(kill=kill)
        with pytest.raises(redis.ConnectionError):
            client.ping()
        server.start()
        assert client.get("key") is None


@pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedRedis])
def test_a_port_in_use_is_avoided(
    kind: type[EmbeddedPostgres | EmbeddedRedis], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as rival:
        taken = rival.getsockname()[1]
        sample = random.Random.sample
        monkeypatch.setattr("random.Random.sample", lambda *args: [*sample(*args), taken])
        with kind() as server:
            assert server.port != taken
            assert "Address already in use" in server.log.read_text()


def test_a_server_that_cannot_start_leaves_nothing() -> None:
    server = EmbeddedPostgres({"max_connections": "many"})
    with pytest.raises(EmbeddedServerError, match="max_connections") as failure, server:
        pass
    assert "\n" not in str(failure.value)
    assert not server.directory.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_the_servers_end_with_their_owner(owner: Owner, number: signal.Signals) -> None:
    owner.process.send_signal(number)
    owner.process.communicate(timeout=TIMEOUT)
    wait_until(owner.servers_are_gone, TIMEOUT, "the servers and their directories are gone")


def test_nothing_is_left_after_a_normal_exit(owner: Owner) -> None:
    owner.process.communicate(timeout=TIMEOUT)
    assert owner.process.returncode == 0
    assert owner.servers_are_gone()


def test_a_surviving_fork_does_not_keep_the_servers_running() -> None:
    owner = start_owner("fork")
    fork = psutil.Process(owner.facts["fork"])
    try:
        owner.process.kill()
        wait_until(owner.servers_are_gone, TIMEOUT, "the servers and their directories are gone")
        assert fork.is_running()
    finally:
        fork.kill()
        owner.process.communicate(timeout=TIMEOUT)


def test_ctrl_c_is_left_to_the_owner(owner: Owner) -> None:
    os.killpg(owner.process.pid, signal.SIGINT)
    assert owner.process.stdout
    assert owner.process.stdout.readline() == "interrupted\n"
    assert fetch(owner.facts["url"], "SELECT 1") == 1


def test_a_kept_server_runs_until_it_is_stopped() -> None:
    owner = start_owner("keep")
    # It returns: the server that keeps running does not hold our stdout open.
    owner.process.communicate(timeout=TIMEOUT)
    try:
        assert fetch(owner.facts["url"], "SELECT 1") == 1
    finally:
        subprocess.run(owner.facts["stop_command"], shell=True, check=True)
    wait_until(owner.servers_are_gone, TIMEOUT, "the server and its directory are gone")


@pytest.mark.skipif(not IS_ROOT, reason="only root can drop its rights")
def test_as_root_the_server_runs_as_nobody(own_postgres: OwnPostgres) -> None:
    nobody = pwd.getpwnam("nobody").pw_uid
    assert psutil.Process(own_postgres().pid).uids().real == nobody


@pytest.mark.skipif(not IS_ROOT, reason="the whole run is that of an ordinary user")
def test_an_ordinary_user_runs_the_server_under_their_own_account() -> None:
    nobody = pwd.getpwnam("nobody")
    account: Any = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    try:
        trial = [sys.executable, "-c", "import tests.conftest"]
        subprocess.run(trial, check=True, cwd=REPOSITORY, capture_output=True, **account)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this interpreter or checkout is closed to other users than root")
    owner = start_owner(**account)
    assert owner.facts["uid"] == nobody.pw_uid
    owner.process.communicate(timeout=TIMEOUT)
    assert owner.servers_are_gone()


def test_binaries_in_an_inaccessible_folder_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    folder = binaries.copy_postgres(binaries.find_postgres(), closed)
    monkeypatch.setenv("PG_BIN", str(folder))
    monkeypatch.setenv("REDIS_SERVER", shutil.copy2(binaries.find_redis(), f"{closed}/server"))
    with EmbeddedPostgres() as server, EmbeddedRedis() as valkey:
        assert server.bin == folder
        assert fetch(server.url, "SELECT 1") == 1
        with redis.Redis.from_url(valkey.url) as client:
            assert client.ping()


def test_a_long_temporary_path_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (long := tmp_path / ("x" * 80)).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with EmbeddedPostgres() as server:
        socket_folder = fetch(server.url, "SHOW unix_socket_directories")
        assert Path(socket_folder) == server.directory


def test_without_binaries_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PG_BIN", raising=False)
    monkeypatch.delenv("REDIS_SERVER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(binaries, "_POSTGRES_FOLDERS", ())
    monkeypatch.setattr(binaries, "_package_folder", lambda _: tmp_path)
    with pytest.raises(EmbeddedServerError, match=r"requirements-dev\.txt.*PG_BIN"):
        binaries.find_postgres()
    with pytest.raises(EmbeddedServerError, match=r"requirements-dev\.txt.*REDIS_SERVER"):
        binaries.find_redis()


def test_a_wrong_choice_of_binaries_is_named_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PG_BIN", str(tmp_path))
    monkeypatch.setenv("REDIS_SERVER", str(tmp_path))
    with pytest.raises(EmbeddedServerError, match=f"PG_BIN={tmp_path}"):
        binaries.find_postgres()
    with pytest.raises(EmbeddedServerError, match=f"REDIS_SERVER={tmp_path}"):
        binaries.find_redis()
