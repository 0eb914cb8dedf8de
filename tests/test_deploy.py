"""The files in deploy/ do what they say: their own commands, with their own environment, on real servers.

Only what depends on the machine is replaced: folders, paths of programs, addresses of servers. The syntax of
the files is checked by `make check-deploy`.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from celery.beat import PersistentScheduler
from celery.schedules import crontab
from sqlalchemy.engine import make_url

from chronos import __version__
from chronos.db import connect_engine
from chronos.demo.binaries import find_redis
from chronos.demo.embedded import EmbeddedRedis
from chronos.demo.rows import create_webhook_log
from chronos.errors import ExitCode
from chronos.jobs import JOBS
from chronos.settings import Settings
from tests.tables import relations
from tests.test_jobs import migrate, names, partitions
from tests.test_worker import PATIENCE, Process, app, in_zone
from tests.waiting import wait_until

__all__ = ["app"]  # a fixture of test_worker.py

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNITS = {path.name: path for path in sorted((DEPLOY / "systemd").glob("chronos-*"))}
SERVICES = [name for name in UNITS if name.endswith(".service")]
PASSWORD = "0123abcd"
# The command that every scheduler runs for upkeep.
UPKEEP = ["chronos", "upkeep"]


# The files, read


@cache
def compose() -> dict[str, Any]:
    """The services of compose.yaml, with POSTGRES_PASSWORD set."""
    text = re.sub(r"\$\{POSTGRES_PASSWORD:\?[^}]*\}", PASSWORD, (DEPLOY / "compose.yaml").read_text("utf-8"))
    assert "${" not in text
    services = yaml.safe_load(text)["services"]
    assert isinstance(services, dict)
    return services


@cache
def cron_job() -> dict[str, Any]:
    """The specification of the CronJob."""
    read = yaml.safe_load((DEPLOY / "kubernetes" / "cronjob.yaml").read_text("utf-8"))["spec"]
    assert isinstance(read, dict)
    return read


def pod() -> dict[str, Any]:
    """The specification of the CronJob's pod."""
    found = cron_job()["jobTemplate"]["spec"]["template"]["spec"]
    assert isinstance(found, dict)
    return found


@cache
def unit(name: str) -> dict[str, list[str]]:
    """The settings of a unit, each with all its values; sections do not matter, as no key is in two."""
    found: dict[str, list[str]] = {}
    for line in UNITS[name].read_text("utf-8").splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@cache
def image() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile: (name, arguments)."""
    text = (DEPLOY / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def said_last(instruction: str) -> str:
    """The arguments of the last ``instruction`` in the Dockerfile."""
    return [rest for name, rest in image() if name == instruction][-1]


# Running their commands


@dataclass
class Machine:
    """Stands in for the machine that a file expects: its folders and its servers."""

    folder: Path
    url: str
    processes: list[Process] = field(default_factory=list)

    @property
    def etc(self) -> Path:
        """Stands in for /etc/chronos, the working directory everywhere."""
        return self._folder("etc")

    @property
    def state(self) -> Path:
        """Stands in for /var/lib/chronos."""
        return self._folder("state")

    def _folder(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(exist_ok=True)
        return path

    def words(self, words: Sequence[str]) -> list[str]:
        """A command as it runs here: the module instead of the installed program, our folders."""
        program, *rest = words
        module = program.removeprefix("/opt/chronos/bin/")
        assert module in ("chronos", "celery"), program
        return [
            sys.executable,
            "-m",
            module,
            *(word.replace("/var/lib/chronos", str(self.state)) for word in rest),
        ]

    def environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """``given`` and what any process has, but nothing of the tests' environment."""
        return {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **given}

    def start(self, words: Sequence[str], given: Mapping[str, str]) -> Process:
        """Start a program that keeps running; it ends with the test."""
        log = self.folder / f"{len(self.processes)}.log"
        with log.open("wb") as file:
            popen = subprocess.Popen(
                self.words(words),
                cwd=self.etc,
                env=self.environment(given),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(Process(popen, log))
        return self.processes[-1]

    def run(
        self, words: Sequence[str], given: Mapping[str, str], answer: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end."""
        return subprocess.run(
            self.words(words),
            cwd=self.etc,
            env=self.environment(given),
            input=answer,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )


@pytest.fixture
def machine(tmp_path: Path, database: str) -> Iterator[Machine]:
    machine = Machine(tmp_path, database)
    yield machine
    for process in machine.processes:
        if process.popen.poll() is None:
            process.kill()


def of_compose(service: str, machine: Machine, broker: str) -> tuple[list[str], dict[str, str]]:
    """The command of a service in compose.yaml, and its environment, with our servers."""
    services = compose()
    given = dict(services[service]["environment"])
    server = services["postgres"]["environment"]
    url = make_url(given["DATABASE_URL"])
    assert (url.host, url.port, url.password) == ("postgres", 5432, PASSWORD)
    assert (url.username, url.database) == (server["POSTGRES_USER"], server["POSTGRES_DB"])
    assert given["REDIS_URL"] == "redis://valkey:6379/0"
    given |= {"DATABASE_URL": machine.url, "REDIS_URL": broker}
    return [*services[service]["entrypoint"], *services[service].get("command", [])], given


def of_systemd(service: str, machine: Machine, broker: str) -> tuple[list[str], dict[str, str]]:
    """The command of a unit; its settings are in .env, in its working directory."""
    found = unit(f"chronos-{service}.service")
    assert found["WorkingDirectory"] == ["/etc/chronos"]
    (machine.etc / ".env").write_text(f"DATABASE_URL={machine.url}\nREDIS_URL={broker}\n", "utf-8")
    return shlex.split(found["ExecStart"][0]), {}


@pytest.fixture
def broker() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.mark.parametrize("taken_from", [of_compose, of_systemd], ids=["compose", "systemd"])
def test_deployed_worker_and_beat_catch_up_on_a_missed_night(
    taken_from: Any, machine: Machine, broker: EmbeddedRedis, app: Any
) -> None:
    migrate(machine.url, -17, 0)
    # Beat remembers that it sent the jobs the day before yesterday.
    file = machine.state / "beat-schedule"
    scheduler = PersistentScheduler(app=in_zone(app, "UTC"), schedule_filename=str(file))
    for job in JOBS:
        scheduler.schedule[job.name].last_run_at = datetime.now(UTC) - timedelta(days=2)
    scheduler.close()

    worker = machine.start(*taken_from("worker", machine, broker.url))
    beat = machine.start(*taken_from("beat", machine, broker.url))
    for job in JOBS:
        beat.wait_for(f"Sending due task {job.name}")
        worker.wait_for(rf"Task {job.name}\[.*\] succeeded in .*'status': 'done'")

    assert partitions(machine.url) == names(machine.url, -15, 30)
    for process in (beat, worker):
        process.stop()
        assert process.popen.returncode == 0, process.printed()


def test_migrate_in_compose_asks_and_migrates(machine: Machine, redis_url: str) -> None:
    create_webhook_log(connect_engine(make_url(machine.url)), 300)
    command, given = of_compose("migrate", machine, redis_url)
    plain = relations(machine.url)

    refused = machine.run(command, given, "no\n")
    assert refused.returncode == ExitCode.REFUSED, refused.stderr
    assert relations(machine.url) == plain

    done = machine.run(command, given, "MIGRATE\n")
    assert done.returncode == ExitCode.DONE, done.stderr
    assert "MIGRATION COMPLETED SUCCESSFULLY!" in done.stdout

    assert compose()["migrate"]["profiles"] == ["migrate"]
    assert compose()["migrate"]["stdin_open"] is compose()["migrate"]["tty"] is True


@pytest.mark.usefixtures("client")
def test_the_health_check_follows_status_and_never_returns_dockers_reserved_code(
    machine: Machine, redis_url: str
) -> None:
    options, _, check = said_last("HEALTHCHECK").partition(" CMD ")
    assert "--timeout=60s" in options
    shell, flag, script = yaml.safe_load(check)
    assert (shell, flag) == ("sh", "-c")
    assert script.split(maxsplit=2)[:2] == ["chronos", "status"]
    here = script.replace("chronos status", shlex.join(machine.words(["chronos", "status"])), 1)

    def health(url: str) -> int:
        given = machine.environment({"DATABASE_URL": url, "REDIS_URL": redis_url})
        return subprocess.run(
            ["sh", "-c", here], cwd=machine.etc, env=given, capture_output=True, timeout=PATIENCE
        ).returncode

    create_webhook_log(connect_engine(make_url(machine.url)), 300)
    assert health(machine.url) == 1  # a plain table
    command, given = of_compose("migrate", machine, redis_url)
    assert machine.run([*command, "--yes"], given).returncode == ExitCode.DONE
    assert health(machine.url) == 0
    assert health("postgresql://nobody@127.0.0.1:1/none") == 1


def test_the_servers_in_compose_have_working_health_checks(postgres: str, pg_bin: Path) -> None:
    url = make_url(postgres)
    how, program, *options = compose()["postgres"]["healthcheck"]["test"]
    assert (how, program) == ("CMD", "pg_isready")
    command = [pg_bin / program, *options, f"--port={url.port}"]
    assert subprocess.run(command).returncode == 0
    assert subprocess.run([*command[:-1], "--port=1"]).returncode != 0
    assert compose()["valkey"]["healthcheck"]["test"] == ["CMD", "valkey-cli", "ping"]
    for service in ("worker", "beat", "migrate"):
        needs = compose()[service]["depends_on"]
        assert needs == {server: {"condition": "service_healthy"} for server in ("postgres", "valkey")}


def test_valkey_in_compose_keeps_its_data_over_a_restart(tmp_path: Path) -> None:
    program, *options = compose()["valkey"]["command"]
    assert program == "valkey-server"
    options = [str(tmp_path) if option == "/data" else option for option in options]
    for expected in (None, "a message"):
        with _redis(options) as client:
            assert client.get("key") == expected
            client.set("key", "a message")


@contextmanager
def _redis(options: list[str]) -> Iterator[redis.Redis]:
    """The server with ``options`` and its own port; it is shut down cleanly."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    with (
        subprocess.Popen(
            [find_redis(), *options, "--bind", "127.0.0.1", "--port", str(port)], stdout=subprocess.DEVNULL
        ) as server,
        redis.Redis(port=port, decode_responses=True) as client,
    ):

        def answers() -> bool:
            with suppress(redis.RedisError):
                return bool(client.ping())
            return False

        try:
            wait_until(answers, PATIENCE, "Valkey answers")
            yield client
        finally:
            server.terminate()


# Upkeep without Celery


def test_every_scheduler_runs_upkeep_at_one_every_night() -> None:
    [command] = unit("chronos-upkeep.service")["ExecStart"]
    assert command == f"/opt/chronos/bin/{shlex.join(UPKEEP)}"
    assert unit("chronos-upkeep.timer")["OnCalendar"] == ["*-*-* 01:00:00 UTC"]

    [container] = pod()["containers"]
    assert (container["command"], container.get("args")) == (UPKEEP, None)
    assert hour_of(cron_job()["schedule"].split()) == 1
    assert cron_job()["timeZone"] == "Etc/UTC"

    lines = (DEPLOY / "cron.d" / "chronos").read_text("utf-8").splitlines()
    [line] = [line for line in lines if not line.startswith(("#", "MAILTO="))]
    *fields, user, command = line.split(maxsplit=6)
    assert hour_of(fields) == 1
    assert user == "chronos"
    assert command == f"cd /etc/chronos && /opt/chronos/bin/{shlex.join(UPKEEP)} >/dev/null"


def hour_of(fields: Sequence[str]) -> int:
    """The one hour at which the five crontab fields are due, every day, on the hour."""
    read: Any = crontab(*fields)  # its types lack its fields
    assert (read.minute, len(read.day_of_month), len(read.month_of_year)) == ({0}, 31, 12)
    assert len(read.day_of_week) == 7
    [hour] = read.hour
    return int(hour)


def test_the_pod_has_no_privilege_that_upkeep_does_not_need() -> None:
    found, [container] = pod(), pod()["containers"]
    account = int(said_last("USER").partition(":")[0])
    assert account > 0
    assert found["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": account,
        "runAsGroup": account,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert found["automountServiceAccountToken"] is False
    assert all(mount["readOnly"] for mount in container["volumeMounts"])
    assert container["resources"].keys() == {"requests", "limits"}
    assert cron_job()["concurrencyPolicy"] == "Forbid"


def test_the_pod_gets_its_database_url_from_a_secret_and_is_not_retried_when_refused() -> None:
    [container] = pod()["containers"]
    given = {one["name"]: one for one in container["env"]}
    assert given["DATABASE_URL"].keys() == {"name", "valueFrom"}
    assert given["DATABASE_URL"]["valueFrom"]["secretKeyRef"]["key"] == "DATABASE_URL"
    assert {name.lower() for name in given} <= Settings.model_fields.keys()

    [rule] = cron_job()["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [ExitCode.REFUSED],
    }


# Their contents


@pytest.mark.parametrize("service", SERVICES)
def test_each_unit_is_as_hardened_as_the_others(service: str) -> None:
    other = unit(SERVICES[0])
    hardening = {
        key for key in other if re.match("Protect|Private|Restrict|System|Capab|NoNew|Memory|UMask", key)
    }
    assert {"NoNewPrivileges", "ProtectSystem", "PrivateTmp", "CapabilityBoundingSet"} <= hardening
    assert {key: unit(service)[key] for key in hardening} == {key: other[key] for key in hardening}
    assert unit(service)["User"] == unit(service)["Group"] == ["chronos"]
    # Only beat writes a file.
    assert ("StateDirectory" in unit(service)) == (service == "chronos-beat.service")


def test_the_build_context_is_what_the_image_copies_and_no_settings() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    copied = {
        source
        for name, rest in image()
        if name == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_runs_unprivileged_with_its_programs_on_path() -> None:
    stages = [rest for name, rest in image() if name == "FROM"]
    assert len(stages) == 2
    assert all("-slim" in stage for stage in stages)
    assert said_last("USER") == "10001:10001"
    assert yaml.safe_load(said_last("ENTRYPOINT")) == UPKEEP[:1]
    assert said_last("WORKDIR") == pod()["containers"][0]["workingDir"] == "/etc/chronos"
    assert "/opt/chronos/bin" in said_last("ENV")


def test_every_file_names_the_image_of_this_version() -> None:
    text = "".join(path.read_text("utf-8") for path in DEPLOY.rglob("*") if path.is_file())
    assert set(re.findall(r"\bchronos:(\d[\w.]*)", text)) == {__version__}


def test_containers_in_compose_can_write_only_their_state() -> None:
    for service in ("worker", "beat", "migrate"):
        found = compose()[service]
        assert found["read_only"] is True
        assert found["cap_drop"] == ["ALL"]
        assert found["security_opt"] == ["no-new-privileges:true"]
        assert found["volumes"] == ["state:/var/lib/chronos"]
        assert found["tmpfs"] == ["/tmp"]  # Celery's process pool does not start without it
    for service in compose().values():
        assert "ports" not in service
        assert "privileged" not in service


@pytest.mark.parametrize("caller", ["systemd", "kubernetes"])
def test_deployed_upkeep_creates_and_drops_without_redis(caller: str, machine: Machine) -> None:
    migrate(machine.url, -17, 0)
    if caller == "systemd":
        command, given = of_systemd("upkeep", machine, "")
    else:
        [container] = pod()["containers"]
        command = container["command"]
        given = {one["name"]: one.get("value", machine.url) for one in container["env"]}
    done = machine.run(command, given)
    assert done.returncode == ExitCode.DONE, done.stderr
    assert not done.stderr
    assert partitions(machine.url) == names(machine.url, -15, 30)
