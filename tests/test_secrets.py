"""No password is shown in output, logs, spans, reports or tracebacks, whatever goes wrong.

The URLs of PostgreSQL and Redis have passwords, spans go to our own collector, and tracebacks that the
program hides are printed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

from chronos import cli
from chronos.db import connect_engine
from chronos.demo.embedded import EmbeddedRedis
from chronos.demo.rows import create_webhook_log
from chronos.errors import RefusedError
from chronos.jobs import CREATE
from chronos.settings import Settings, get_settings, postgres_url
from tests.tables import holding, query, waiting_pid
from tests.waiting import wait_until

ROOT = Path(__file__).parents[1]
# With characters that must be percent-encoded in a URL: neither form may show.
PASSWORD = "Tr0ub4dor&3/corn@se"
ENCODED = "Tr0ub4dor%263%2Fcorn%40se"
REDIS_PASSWORD = "c0rrect-h0rse"
SECRETS = (PASSWORD, ENCODED, "Tr0ub4dor", "corn@se", REDIS_PASSWORD)
# A command line that prints each exception in full before it turns it into one line.
NOISY = """
import runpy, sys
from tests import test_secrets

test_secrets.show_tracebacks()
sys.argv = ["chronos", *sys.argv[1:]]
runpy.run_module("chronos", run_name="__main__", alter_sys=True)
"""


def run_module(words: list[str], env: dict[str, str], here: Path) -> tuple[int, str]:
    """Run ``python -m WORDS`` in this process, with tracebacks shown: exit code, and what it printed."""
    screen = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(here):
        for variable in [one for one in os.environ if one.lower() in Settings.model_fields]:
            patch.delenv(variable)
        for variable, text in env.items():
            patch.setenv(variable, text)
        patch.setattr(sys, "argv", words)
        patch.setattr(sys, "stdin", io.StringIO())
        patch.setattr(sys, "stdout", screen)
        patch.setattr(sys, "stderr", screen)
        get_settings.cache_clear()
        try:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return int(end.code or 0), screen.getvalue()
        finally:
            get_settings.cache_clear()
    return 0, screen.getvalue()


def show_tracebacks() -> Callable[[], AbstractContextManager[None]]:
    """Make the command line print them; returns the handler it replaced."""
    hide = cli._errors_as_lines

    @contextmanager
    def show() -> Iterator[None]:
        with hide():
            try:
                yield
            except Exception:
                traceback.print_exc()
                raise

    cli._errors_as_lines = show
    return hide


@pytest.fixture
def tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_errors_as_lines", cli._errors_as_lines)
    show_tracebacks()


class Collector(ThreadingHTTPServer):
    """An OpenTelemetry backend that keeps everything it is sent."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        super().__init__(("127.0.0.1", 0), _Keep)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Keep(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        self.server.received.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Be quiet."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def url(database: str) -> Iterator[str]:
    """A small webhook_log, owned by a role with a password."""
    create_webhook_log(create_engine(database, poolclass=NullPool), 300)
    role = f"chronos_secret_{os.getpid()}"
    query(database, f"CREATE ROLE {role} LOGIN SUPERUSER PASSWORD '{PASSWORD}'")
    parsed = make_url(database)
    yield f"postgresql://{role}:{ENCODED}@{parsed.host}:{parsed.port}/{parsed.database}"
    query(database, f"REASSIGN OWNED BY {role} TO CURRENT_USER; DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.fixture(scope="module")
def guarded_redis() -> Iterator[str]:
    """Our own Redis, with a password we chose."""
    with EmbeddedRedis() as server:
        with redis.Redis.from_url(server.url) as client:
            client.config_set("requirepass", REDIS_PASSWORD)
        yield f"redis://:{REDIS_PASSWORD}@127.0.0.1:{server.port}/0"


def environment(url: str, redis_url: str, collector: Collector | None = None) -> dict[str, str]:
    env = {
        **os.environ,
        "DATABASE_URL": url,
        "REDIS_URL": redis_url,
        "PYTHONUTF8": "1",
        "PYTHONPATH": str(ROOT),
    }
    if collector:
        env["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector.url
    return env


def run(env: Mapping[str, str], *arguments: str) -> tuple[int, str]:
    """Run a verb in its own process: exit code, and everything it printed."""
    done = subprocess.run(
        [sys.executable, "-c", NOISY, *arguments],
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout


def assert_secret(*texts: str | bytes) -> None:
    for text in texts:
        found = [s for s in SECRETS if (s.encode() if isinstance(text, bytes) else s) in text]  # type: ignore[operator]
        assert not found, f"{found} in {text!r}"


def test_migrate_and_rollback_reveal_no_password(
    url: str, guarded_redis: str, collector: Collector, tmp_path: Path, tracebacks: None
) -> None:
    env = environment(url, guarded_redis)
    report = tmp_path / "report.json"
    shown = []

    def here(code: int, *arguments: str) -> None:
        result, text = run_module(["chronos", *arguments], env, tmp_path)
        assert result == code, text
        shown.append(text)

    here(1, "status")
    here(0, "migrate", "--dry-run")
    code, text = run(environment(url, guarded_redis, collector), "migrate", "--yes", "--report", str(report))
    assert code == 0, text
    assert f"Host: {make_url(url).host} " in text
    assert json.loads(report.read_text())["periods"]
    assert any(b"migration step" in body for body in collector.received)
    here(0, "status", "--json")
    here(2, "migrate", "--yes")
    here(0, "rollback", "--yes")
    assert "Traceback" in "".join(shown)
    assert_secret(*shown, text, report.read_text(), *collector.received)


def test_a_failing_migration_reveals_no_password(url: str, guarded_redis: str, collector: Collector) -> None:
    query(
        url,
        "CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS"
        " 'BEGIN RAISE EXCEPTION ''no index today''; END';"
        " CREATE EVENT TRIGGER refuse ON ddl_command_end WHEN TAG IN ('CREATE INDEX')"
        " EXECUTE FUNCTION refuse()",
    )
    code, shown = run(environment(url, guarded_redis, collector), "migrate", "--yes")
    assert code == 1, shown
    assert "no index today; rolled back" in shown
    assert_secret(shown, *collector.received)


def test_a_killed_backend_reveals_no_password(url: str, guarded_redis: str, collector: Collector) -> None:
    """In the middle, while it waits for a lock to add foreign keys to the partitions."""
    with subprocess.Popen(
        [sys.executable, "-c", NOISY, "migrate", "--yes"],
        env=environment(url, guarded_redis, collector),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            with holding(url, "LOCK TABLE webhook_endpoint IN ROW EXCLUSIVE MODE"):
                query(url, "SELECT pg_terminate_backend(%s)", waiting_pid(url, "webhook_endpoint"))
            shown, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 3
    assert "in step 3; nothing is lost" in shown
    assert "Traceback" in shown
    assert_secret(shown, *collector.received)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"password": "wrong-" + PASSWORD}, "authentication failed"),
        ({"port": 1}, "refused"),
        ({"host": "nowhere.invalid"}, "translate host name"),
        ({"database": "no_such_database"}, "does not exist"),
        ({"query": {"sslmode": "require"}}, "SSL"),
        ({"query": {"sslmode": "nonsense"}}, "sslmode"),
    ],
)
@pytest.mark.parametrize("arguments", ["migrate --yes", "migrate --dry-run", "rollback --yes", "status"])
def test_a_failing_connection_reveals_no_password(
    url: str,
    guarded_redis: str,
    tmp_path: Path,
    tracebacks: None,
    arguments: str,
    change: dict[str, Any],
    said: str,
) -> None:
    wrong = make_url(url).set(**change).render_as_string(hide_password=False)
    words = ["chronos", *arguments.split()]
    code, shown = run_module(words, environment(wrong, guarded_redis), tmp_path)
    assert code == (2 if arguments == "status" else 1), shown
    assert said in shown
    assert "Traceback" in shown
    assert_secret(shown)


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql://me:{ENCODED}@host:not-a-port/db",
        f"mysql://me:{ENCODED}@host/db",
        f"me:{ENCODED}@host",
        f"postgresql://me:an@{ENCODED}@host/db",
        f"postgresql://me:an@{ENCODED}?unencoded@host/db",
    ],
)
def test_an_unreadable_url_reveals_no_password(
    guarded_redis: str, tmp_path: Path, tracebacks: None, text: str
) -> None:
    code, shown = run_module(["chronos", "migrate"], environment(text, guarded_redis), tmp_path)
    assert code == 2
    assert "Traceback" in shown
    assert_secret(shown)


def test_a_redis_that_refuses_reveals_no_password(
    url: str, guarded_redis: str, tmp_path: Path, tracebacks: None
) -> None:
    wrong = guarded_redis.replace(REDIS_PASSWORD, f"wrong-{REDIS_PASSWORD}")
    code, shown = run_module(["chronos", "status"], environment(url, wrong), tmp_path)
    assert code == 1
    assert "Celery cannot run the nightly jobs: Redis does not answer" in shown
    assert_secret(shown)


def test_url_parameters_reach_libpq(url: str) -> None:
    wanted = {"application_name": "chronos", "sslmode": "prefer", "options": "-c work_mem=5MB"}
    spelled = f"{url}?sslmode=prefer&options=-c%20work_mem%3D5MB"
    with connect_engine(postgres_url(spelled)).connect() as conn:
        assert conn.exec_driver_sql("SHOW work_mem").scalar() == "5MB"
        driver: Any = conn.connection.dbapi_connection
        found = driver.get_dsn_parameters()
    assert {name: found[name] for name in wanted} == wanted


# The worker


@contextmanager
def worker(env: Mapping[str, str], log: Path) -> Iterator[Callable[[str], bool]]:
    """A running worker; the function tells whether it has printed something."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "chronos.worker", "worker", "--pool=solo"],
            env=dict(env),
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            yield lambda text: text in log.read_text() or process.poll() is not None
        finally:
            process.kill()
            process.wait()


def test_a_worker_whose_job_fails_reveals_no_password(
    url: str, guarded_redis: str, collector: Collector, tmp_path: Path
) -> None:
    wrong = make_url(url).set(password=f"wrong-{PASSWORD}").render_as_string(hide_password=False)
    log = tmp_path / "log"
    with worker(environment(wrong, guarded_redis, collector), log) as has_said:
        with Celery(broker=guarded_redis) as client:
            client.send_task(CREATE.name, queue="chronos", kwargs={"pauses": []})
        wait_until(lambda: has_said("authentication failed"), 60, "the job has failed")
        wait_until(lambda: any(CREATE.name.encode() in body for body in collector.received), 60, "spans")
    said = log.read_text()
    assert f"{CREATE.name} failed" in said
    assert_secret(said, *collector.received)


def test_a_worker_that_redis_refuses_reveals_no_password(
    url: str, guarded_redis: str, tmp_path: Path
) -> None:
    wrong = guarded_redis.replace(REDIS_PASSWORD, f"wrong-{REDIS_PASSWORD}")
    log = tmp_path / "log"
    with worker(environment(url, wrong), log) as has_said:
        wait_until(lambda: has_said("Cannot connect to redis"), 60, "the worker is refused")
    assert_secret(log.read_text())


def test_a_worker_with_an_unreadable_url_reveals_no_password(url: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    wrong = f"redis://:{REDIS_PASSWORD}@127.0.0.1:not-a-port/0"
    with worker(environment(url, wrong), log) as has_said:
        wait_until(lambda: has_said("REDIS_URL cannot be read"), 60, "the worker gives up")
    assert_secret(log.read_text())


@pytest.mark.parametrize("password", ["s3cr@et", "s3cr@et?x", "s3cr@et/x?y", "s3@cr@et"])
def test_a_password_with_an_unencoded_at_is_refused_and_no_part_of_it_is_shown(password: str) -> None:
    with pytest.raises(RefusedError, match=r"DATABASE_URL has more than one @.*Write %40") as refused:
        postgres_url(f"postgresql://app:{password}@127.0.0.1:5432/chronos")
    assert "cr" not in str(refused.value).replace("password", "")
    assert "et" not in str(refused.value).split("DATABASE_URL")[1].split()
