"""What pip installs, and what make does to the environment that a worker runs from."""

from __future__ import annotations

import os
import re
import shutil
import signal
import site
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from celery import Celery
from packaging.requirements import Requirement

from chronos import __version__
from chronos.jobs import CREATE
from tests.command import chronos_environment
from tests.tables import exists, query, value
from tests.test_jobs import migrate
from tests.waiting import wait_until

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def pinned(file: str) -> dict[str, str]:
    """The distributions that a requirements file pins, each with its version."""
    lines = (ROOT / file).read_text("utf-8").splitlines()
    return dict(line.lower().split("==") for line in lines if "==" in line)


def ranges(requirements: list[str]) -> dict[str, Requirement]:
    return {found.name.lower(): found for found in map(Requirement, requirements)}


# Requirements


def test_the_pins_are_the_base_dependencies_and_satisfy_their_ranges() -> None:
    wanted, pins = ranges(PROJECT["dependencies"]), pinned("requirements.txt")
    assert set(wanted) == set(pins)
    for name, requirement in wanted.items():
        assert requirement.specifier.contains(pins[name]), requirement


@pytest.mark.parametrize("extra", ["demo", "plan", "alembic"])
def test_the_test_pins_satisfy_each_extra(extra: str) -> None:
    pins = pinned("requirements-dev.txt")
    for name, requirement in ranges(PROJECT["optional-dependencies"][extra]).items():
        assert requirement.specifier.contains(pins[name]), requirement


# Wheel and sdist


def run(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def borrow_packages(environment: Path) -> None:
    """Let an environment see what is installed here, so that nothing has to be downloaded."""
    [folder] = environment.glob("lib/python*/site-packages")
    (folder / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n", "utf-8")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    return folder


@pytest.fixture(params=["*.whl", "*.tar.gz"], ids=["wheel", "sdist"])
def installed(request: pytest.FixtureRequest, built: Path, tmp_path: Path) -> Path:
    """The bin folder of an environment in which chronos is installed."""
    [file] = built.glob(request.param)
    return install(file, tmp_path)


def install(file: Path, tmp_path: Path) -> Path:
    """The bin folder of a new environment in which ``file`` is installed."""
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    borrow_packages(environment)
    pip = (sys.executable, "-m", "pip", "--python", environment / "bin" / "python")
    run(*pip, "install", "--quiet", "--no-deps", "--no-build-isolation", file, cwd=tmp_path)
    return environment / "bin"


def test_the_installed_package_works_from_any_directory(
    installed: Path, database: str, tmp_path: Path
) -> None:
    env = chronos_environment(database)
    assert run(installed / "chronos", "--version", cwd=tmp_path, env=env) == f"chronos {__version__}\n"
    python = installed / "python"
    where = "import chronos; print(chronos.__file__)"
    assert Path(run(python, "-c", where, cwd=tmp_path).strip()).is_relative_to(tmp_path)
    run(python, "-c", _CREATE_TABLE, cwd=tmp_path, env=env)
    # The functions come from the package's SQL files.
    said = run(installed / "chronos", "migrate", "--yes", cwd=tmp_path, env=env)
    assert "\n  chronos finalize " in said
    for command in ([installed / "chronos"], [python, "-m", "chronos"]):
        done = subprocess.run(
            [*command, "status"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1, done.stdout + done.stderr  # Redis is not there
        assert "migrated" in done.stdout


_CREATE_TABLE = """
import os, psycopg2
conn = psycopg2.connect(os.environ["DATABASE_URL"].replace("+psycopg2", ""))
conn.cursor().execute('CREATE TABLE webhook_log (id bigserial PRIMARY KEY, "timestamp" timestamptz NOT NULL);'
                      ' CREATE INDEX ON webhook_log ("timestamp")')
conn.commit()
"""


# What a program that uses chronos may look like.
_PROGRAM = """
from __future__ import annotations

import os
import threading

import chronos
from chronos import InterruptedRunError, MigrationResult, RefusedError, Status, migrate, rollback, status

URL = os.environ["THEIRS"]


def night(stop: threading.Event) -> MigrationResult:
    try:
        return migrate("events", url=URL, column="at", every="week", hold=True, rate_limit=50_000, stop=stop)
    except InterruptedRunError:
        return migrate("events", url=URL, resume=True)


def healthy(found: Status) -> bool:
    return found.healthy and not found.missing and found.runway_days > 7


def main() -> None:
    try:
        migrate("events", url=URL)
    except RefusedError as error:
        assert error.exit_code is chronos.ExitCode.REFUSED, error
        assert "--column is missing" in str(error), error
    else:
        raise AssertionError("it was not refused")
    held = night(threading.Event())
    copied: int | None = held.rows_copied
    assert copied == 300, held
    assert status("events", url=URL).state == "ready"
    done = migrate("events", url=URL, resume=True)
    assert done.phase == "migrated", done
    assert not healthy(status("events", url=URL))  # no file lists it
    assert rollback("events", url=URL).rows_carried == 0
    assert status("webhook_log", url=URL).state == "plain"


main()
"""
_EVENTS = """
CREATE TABLE events (id bigserial PRIMARY KEY, at timestamptz NOT NULL);
CREATE INDEX ON events (at);
INSERT INTO events (at) SELECT now() - n * interval '1 hour' FROM generate_series(1, 300) n;
CREATE TABLE webhook_log (id bigserial PRIMARY KEY, "timestamp" timestamptz NOT NULL);
"""


def test_another_program_gets_the_types_and_no_output(built: Path, database: str, tmp_path: Path) -> None:
    [wheel] = built.glob("*.whl")
    python = install(wheel, tmp_path) / "python"
    (tmp_path / "night.py").write_text(_PROGRAM, "utf-8")
    mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable", python)
    run(*mypy, "--cache-dir", tmp_path / "cache", "night.py", cwd=tmp_path)
    wrong = _PROGRAM.replace('every="week"', 'every="year"').replace(": int | None = held", ": str = held")
    (tmp_path / "wrong.py").write_text(wrong, "utf-8")
    checked = subprocess.run(
        [*mypy, "--cache-dir", tmp_path / "cache", "wrong.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = {*re.findall(r"error: .*\[([a-z-]+)\]$", checked.stdout, re.M)}
    assert {"arg-type", "assignment"} <= found, checked
    query(database, _EVENTS)
    env = {**chronos_environment("postgresql://nobody@127.0.0.1:1/none"), "THEIRS": database}
    done = subprocess.run(
        [python, "night.py"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_message_names_the_command_that_was_typed(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "chronos.toml").write_text(
        '[[tables]]\nname = "a"\ncolumn = "at"\n[[tables]]\nname = "b"\ncolumn = "at"\n', "utf-8"
    )
    for command, typed in (
        ([installed / "chronos"], "For example: chronos rollback a"),
        ([installed / "python", "-m", "chronos"], "For example: python -m chronos rollback a"),
    ):
        done = subprocess.run(
            [*command, "rollback"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert typed in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_gets_completion(tmp_path: Path, shell: str) -> None:
    """As documented: the script for the shell, and what it asks for when TAB is pressed."""
    command = tmp_path / "chronos"
    command.write_text(f"#!{sys.executable}\nfrom chronos.__main__ import run\nrun()\n", "utf-8")
    command.chmod(0o755)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = run(command, cwd=tmp_path, env={**env, "_CHRONOS_COMPLETE": f"{shell}_source"})
    assert "chronos" in script
    asked = {**env, "_CHRONOS_COMPLETE": f"{shell}_complete", "COMP_WORDS": "chronos fin", "COMP_CWORD": "1"}
    if shell == "fish":
        asked["COMP_CWORD"] = "fin"
    assert "finalize" in run(command, cwd=tmp_path, env=asked)


# make


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files that make needs."""
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "chronos", tmp_path / "chronos", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def make(checkout: Path, *arguments: str) -> str:
    return run("make", f"PYTHON={sys.executable}", *arguments, cwd=checkout)


@contextmanager
def made_worker(checkout: Path, database: str, broker: str) -> Iterator[Callable[[], int]]:
    """A worker from ``make run-worker``; the function returns its pid, once it takes messages."""
    log = checkout / "worker.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [
                "make",
                "run-worker",
                "ARGS=--concurrency=1 --without-gossip --without-mingle --hostname=made@%h",
            ],
            cwd=checkout,
            env={**chronos_environment(database), "REDIS_URL": broker, "PYTHONWARNINGS": "ignore"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def pid() -> int:
        assert process.poll() is None, log.read_text("utf-8")
        return int((checkout / ".run" / "worker.pid").read_text("utf-8"))

    try:
        wait_until(
            lambda: process.poll() is not None or " ready." in log.read_text("utf-8"), 60, "a worker is ready"
        )
        yield pid
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def test_running_setup_again_does_not_stop_a_worker(
    checkout: Path, database: str, redis_url: str, client: redis.Redis
) -> None:
    migrate(database, -2, 0)
    make(checkout, ".venv/bin/pip")
    borrow_packages(checkout / ".venv")
    make(checkout, "setup")
    with made_worker(checkout, database, redis_url) as pid:
        before = pid()
        [installed_first] = checkout.glob(".venv/lib/python*/site-packages/borrowed.pth")
        for target in ("setup", "setup", "setup-runtime", "clean"):
            for file in ("requirements.txt", "requirements-dev.txt"):
                (checkout / file).touch()
            make(checkout, target)
            assert installed_first.exists(), target
        assert pid() == before
        with Celery(broker=redis_url, set_as_current=False) as app:
            app.send_task(CREATE.name, queue="chronos", kwargs={"pauses": []})
        # The child that runs the job is forked now, and imports what it needs from the environment.
        wait_until(
            lambda: (
                exists(database, "chronos_reports")
                and value(database, "SELECT count(*) FROM chronos_reports WHERE job = %s", CREATE.name)
            ),
            60,
            "the worker has run the job",
        )


def test_a_newer_requirements_file_is_installed_in_place(checkout: Path) -> None:
    for name in ("bin/pip", ".runtime", ".ready"):
        (checkout / ".venv" / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / ".venv" / name).touch()
    os.utime(checkout / ".venv" / ".runtime", (0, 0))  # older than the file, so it must be installed
    for target in ("run-worker", "run-beat", "setup-runtime", "setup", "test", "demo", "clean"):
        recipe = make(checkout, "--dry-run", target)
        assert not re.search(r"--clear|\brm\b[^;\n]*\.venv|-m venv", recipe), recipe
        assert (target == "clean") or "pip install" in recipe
    runtime = make(checkout, "--dry-run", "setup-runtime", "run-worker", "run-beat")
    assert "requirements-dev.txt" not in runtime
