"""The Celery side of the nightly jobs, with real workers, real beats and a real broker."""

from __future__ import annotations

import ast
import gzip
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol
from zoneinfo import ZoneInfo

import pytest
import redis
from celery import Celery
from celery.beat import PersistentScheduler
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from pydantic import SecretStr
from sqlalchemy.engine import make_url

from chronos.demo.embedded import EmbeddedRedis
from chronos.demo.writer import LiveWriter
from chronos.job_lock import TTL_S, connect
from chronos.jobs import CREATE, DROP, JOBS, Job, Report, last_due
from chronos.settings import Settings, get_settings
from chronos.table import WEBHOOK_LOG
from tests.conftest import OwnPostgres
from tests.tables import exists, holding, query
from tests.test_jobs import ASLEEP, GATE, add_days, last, migrate, names, partitions
from tests.waiting import wait_until

REPOSITORY = Path(__file__).parents[1]
PATIENCE = 180.0
CELERY = [sys.executable, "-W", "ignore", "-m", "celery", "-A", "chronos.worker"]


class StartCelery(Protocol):
    """Start ``celery -A chronos.worker COMMAND`` and return the process; it ends with the test."""

    def __call__(self, command: str, *options: str, **environment: str) -> Process: ...


@dataclass
class Process:
    """A worker or a beat, and what it has printed."""

    popen: subprocess.Popen[bytes]
    log: Path

    def printed(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str) -> str:
        """Wait for a line that matches ``text`` and return it."""
        found = wait_until(
            lambda: self.popen.poll() is not None or re.search(rf"^.*{text}.*$", self.printed(), re.M),
            PATIENCE,
            f"{text!r} in {self.log.name}",
        )
        assert isinstance(found, re.Match), self.printed()
        return found[0]

    def result(self, task_id: str) -> Report:
        """What the task returned, according to the log."""
        line = self.wait_for(rf"\[{task_id}\] succeeded in")
        report = ast.literal_eval(line.partition("s: ")[2])
        assert isinstance(report, dict)
        return report

    def stop(self) -> None:
        """Stop it with SIGTERM, and check that it exits."""
        self.popen.terminate()
        self.popen.wait(PATIENCE)

    def kill(self) -> None:
        """Kill it and its pool without warning."""
        os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(PATIENCE)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartCelery]:
    processes: list[Process] = []

    def start(command: str, *options: str, **environment: str) -> Process:
        log = tmp_path / f"{command}{len(processes)}.log"
        with log.open("wb") as file:
            popen = subprocess.Popen(
                [*CELERY, command, "--loglevel=INFO", *options],
                cwd=REPOSITORY,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        processes.append(Process(popen, log))
        return processes[-1]

    yield start
    for process in processes:
        process.popen.terminate()
    for process in processes:
        try:
            process.popen.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


@pytest.fixture
def broker() -> Iterator[EmbeddedRedis]:
    """The test's own Redis: what a killed worker leaves in it affects no other test."""
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def client(broker: EmbeddedRedis) -> Iterator[redis.Redis]:
    with connect(Settings(redis_url=SecretStr(broker.url))) as client:
        yield client


def start_worker(
    start: StartCelery, name: str, url: str, broker: EmbeddedRedis, *options: str, **more: str
) -> Process:
    return start(
        "worker",
        *("--concurrency=1", "--without-gossip", "--without-mingle", f"--hostname={name}@%h", *options),
        DATABASE_URL=url,
        REDIS_URL=broker.url,
        WEBHOOK_LOG_DAYS_AHEAD="3",
        WEBHOOK_LOG_RETENTION_DAYS="5",
        **more,
    )


def send(broker: EmbeddedRedis, job: Job, **options: Any) -> str:
    """Ask for a job, as any client that knows its name can; returns the id of the task."""
    with Celery(broker=broker.url, set_as_current=False) as app:
        return str(app.send_task(job.name, kwargs=options, queue="chronos").id)


# The schedule


@pytest.fixture
def app() -> Iterator[Celery]:
    """The app itself, imported in the tests' environment."""
    get_settings.cache_clear()
    yield importlib.import_module("chronos.worker").app
    get_settings.cache_clear()


def in_zone(app: Celery, zone: str) -> Celery:
    """The app's schedule with BEAT_TIMEZONE applied."""
    other = Celery(set_as_current=False)
    other.conf.update(beat_schedule=app.conf.beat_schedule, timezone=zone)
    return other


def test_messages_are_json_and_acknowledged_late(app: Celery) -> None:
    conf = app.conf
    assert (conf.accept_content, conf.task_serializer, conf.result_serializer) == (["json"], "json", "json")
    assert set(conf.beat_schedule) == {job.name for job in JOBS}
    for job in JOBS:
        assert app.tasks[job.name].acks_late
        assert app.tasks[job.name].max_retries


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(
    ("zone", "skipped_hour"),
    [
        ("UTC", {}),
        ("Europe/Madrid", {(3, 29): 2}),
        ("Europe/London", {(3, 29): 1}),
        ("America/New_York", {(3, 8): 2}),
        ("Asia/Kolkata", {}),
    ],
)
def test_jobs_are_due_once_a_night_at_their_hour_across_clock_changes(
    app: Celery, job: Job, zone: str, skipped_hour: dict[tuple[int, int], int]
) -> None:
    """A year of beat's own arithmetic: at 01:00 and 02:00, or an hour later if that hour does not exist."""
    settings = Settings(beat_timezone=zone)
    here = ZoneInfo(zone)
    now = datetime(2026, 1, 1, 12, tzinfo=UTC)
    end = datetime(2027, 1, 1, 12, tzinfo=UTC)
    schedule = copy(app.conf.beat_schedule[job.name]["schedule"])
    schedule.app = in_zone(app, zone)
    schedule.nowfun = lambda: now.astimezone(here)
    last_run = now.astimezone(here)
    nights = []
    while now < end:
        is_due, seconds = schedule.is_due(last_run)
        if is_due:
            assert last_due(job, settings, now) == now
            last_run = now.astimezone(here)
            later = skipped_hour.get((last_run.month, last_run.day)) == job.hour
            assert (last_run.hour, last_run.minute, last_run.second) == (job.hour + later, 0, 0)
            nights.append(last_run.date())
        now += timedelta(seconds=min(max(seconds, 1.0), 6 * 3600.0))
    assert len(nights) == len(set(nights)) == 365


def test_two_workers_and_two_beats_do_each_job_once(
    start: StartCelery,
    broker: EmbeddedRedis,
    client: redis.Redis,
    database: str,
    app: Celery,
    tmp_path: Path,
) -> None:
    """Both beats find the jobs due; the first message is held until the other beat's has come."""
    migrate(database, -7, 0)
    query(database, GATE.format(function=CREATE.function(WEBHOOK_LOG)))
    beats = []
    for number in range(2):
        file = tmp_path / f"schedule{number}"
        scheduler = PersistentScheduler(app=in_zone(app, "Asia/Kolkata"), schedule_filename=str(file))
        for job in JOBS:
            scheduler.schedule[job.name].last_run_at = datetime.now(UTC) - timedelta(days=2)
        scheduler.close()
        where = {"REDIS_URL": broker.url, "BEAT_TIMEZONE": "Asia/Kolkata"}
        beats.append(start("beat", f"--schedule={file}", f"--pidfile={file}.pid", **where))
    workers = [start_worker(start, f"w{number}", database, broker) for number in range(2)]
    for beat in beats:
        for job in JOBS:
            beat.wait_for(f"Sending due task {job.name}")
        assert "Timezone changed" not in beat.printed()

    wait_until(lambda: "host=" in str(client.get(CREATE.name)), PATIENCE, "one worker has the job")
    wait_until(
        lambda: any("running already: host=" in worker.printed() for worker in workers),
        PATIENCE,
        "the other finds it taken",
    )
    query(database, "INSERT INTO gate VALUES (true)")

    def results() -> list[tuple[str, Report]]:
        found = re.findall(r"Task (\w+)\[.*\] succeeded in .*?s: (.*)", "".join(w.printed() for w in workers))
        return [(job, ast.literal_eval(result)) for job, result in found]

    wait_until(lambda: len(results()) == 4, PATIENCE, "all four messages are answered")
    assert Counter((job, result["status"]) for job, result in results()) == {
        (job.name, status): 1 for job in JOBS for status in ("done", "skipped")
    }
    assert last(database, CREATE)["created"] == names(database, 1, 3)
    assert last(database, DROP)["dropped"] == names(database, -7, -6)
    assert client.get(CREATE.name) is client.get(DROP.name) is None
    assert client.llen("chronos") == 0


# One worker, one long night


@dataclass
class Collector:
    """An OpenTelemetry backend: what it was sent."""

    url: str
    metrics: dict[str, list[float]]
    spans: list[str]


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector("", {}, [])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path.endswith("/metrics"):
                for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                    for metric in (m for scope in resource.scope_metrics for m in scope.metrics):
                        values = [point.as_int or point.as_double for point in metric.gauge.data_points]
                        collector.metrics.setdefault(metric.name, []).extend(values)
            elif self.path.endswith("/traces"):
                for trace in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for span in (span for scope in trace.scope_spans for span in scope.spans):
                        attributes = {a.key: a.value.string_value for a in span.attributes}
                        collector.spans.append(attributes["logfire.msg"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        collector.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


def test_a_worker_recovers_from_every_obstacle_of_a_night(
    start: StartCelery,
    own_postgres: OwnPostgres,
    client: redis.Redis,
    broker: EmbeddedRedis,
    tmp_path: Path,
) -> None:
    """Everything that can go wrong for a worker, in sequence; none of it needs a restart."""
    server = own_postgres()
    url = server.create_database("night")
    broker.stop()
    with collecting() as collector:
        # One process for all of it: starting a new one can take five seconds.
        one = ("w", url, broker, "--max-tasks-per-child=100")
        alert = tmp_path / "alert"
        worker = start_worker(
            start,
            *one,
            OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
            CHRONOS_ALERT_COMMAND=f"cat > {alert}",
        )
        worker.wait_for("consumer: Cannot connect to redis")
        broker.start()
        worker.wait_for("ready")

        # Not migrated yet.
        skipped = worker.result(send(broker, CREATE))
        assert skipped["status"] == "skipped"
        assert "there is no table webhook_log" in skipped["reason"]
        migrate(url, -9, 0)
        query(url, f"DROP FUNCTION {DROP.function(WEBHOOK_LOG)}(int)")
        skipped = worker.result(send(broker, DROP, nightly=True))
        assert f"the function {DROP.function(WEBHOOK_LOG)} is not installed" in skipped["reason"]
        assert worker.printed().count("is not installed") == 3  # the warning, and twice the result
        assert collector.metrics == {}

        # A reader in a long transaction, while the application writes.
        query(url, "DROP TABLE webhook_log, webhook_endpoint")
        migrate(url, -9, 0)
        with LiveWriter(url, threads=2, rate=100) as writer:
            with holding(url, "SELECT count(*) FROM webhook_log"):
                task = send(broker, DROP, nightly=True, pauses=[0.1] * 100)
                wait_until(lambda: last(url, DROP).get("attempts", 0) >= 3, PATIENCE, "it is retried")
                assert last(url, DROP)["status"] == "retrying"
                assert last(url, DROP)["contended"] == names(url, -9, -6)
                assert client.get(DROP.name) is None or "host=" in str(client.get(DROP.name))
            report = worker.result(task)
        assert report["status"] == "done"
        assert report["dropped"] == names(url, -9, -6)
        assert report["attempts"] >= 3
        assert writer.errors == []
        assert max(commit.seconds for commit in writer.commits) < 1

        # The reader never ends.
        add_days(url, -9, -8)
        with holding(url, "SELECT count(*) FROM webhook_log"):
            report = worker.result(send(broker, DROP, pauses=[0.1]))
            assert report["status"] == "incomplete"
            assert report["contended"] == names(url, -9, -8)
            assert "(2 attempts)" in report["error"]
        worker.wait_for(rf"{DROP.name} gave up, undone: {names(url, -9, -9)[0]}")

        # The server stops, and is back too late for one task, but in time for the next.
        server.stop()
        task = send(broker, CREATE, nightly=True, pauses=[0.1, 0.1])
        line = worker.wait_for(rf"\[{task}\] raised expected: JobFailedError")
        assert re.search(r"PostgreSQL does not answer: connection to .* \(3 attempts\)", line)
        assert "PostgreSQL does not answer" in json.loads(alert.read_text())["problems"][0]["problem"]
        task = send(broker, CREATE, nightly=True, pauses=[0.2] * 100)
        worker.wait_for(rf"\[{task}\] retry: Retry in")
        server.start()
        report = worker.result(task)
        assert report["created"] == names(url, 1, 3) == partitions(url)[-3:]

        printed = worker.printed()
        assert "Traceback" not in printed
        for secret in (make_url(url).password, make_url(broker.url).password):
            assert secret
            assert secret not in printed
        assert f"redis://:**@127.0.0.1:{broker.port}" in printed
        worker.stop()
    assert collector.metrics["chronos.partitions.ahead"][-1] == 3
    assert collector.metrics["chronos.partitions.missing"][-1] == 0
    assert collector.metrics["chronos.partitions.oldest_age"][0] == 9
    assert f"{CREATE.name}: done" in collector.spans


# A worker is killed


@pytest.mark.faults
def test_a_job_killed_in_the_middle_is_done_later(
    start: StartCelery, broker: EmbeddedRedis, client: redis.Redis, database: str
) -> None:
    """Kill a worker, and a process of another worker's pool, each with a running job.

    Both leave a lease that expires. The pool's job is retried as soon as it has, the other when the broker
    delivers its message again, after an hour; any run in between would do it too.
    """
    migrate(database, -7, 0)
    for job in JOBS:
        query(database, GATE.format(function=job.function(WEBHOOK_LOG)))
    dies, lives = (start_worker(start, name, database, broker) for name in ("dies", "lives"))
    dies.wait_for("ready")
    create, pid = begin(client, broker, CREATE, database)
    victim, other = (dies, lives) if "Task" in dies.printed() else (lives, dies)
    victim.kill()
    query(database, f"SELECT pg_terminate_backend({pid})")
    other.wait_for("ready")
    drop, pid = begin(client, broker, DROP, database)
    process = re.search(r"pid=(\d+)", str(client.get(DROP.name)))
    assert process
    os.kill(int(process[1]), signal.SIGKILL)
    query(database, f"SELECT pg_terminate_backend({pid})")
    query(database, "INSERT INTO gate VALUES (true)")

    for job in JOBS:
        assert 0 < int(client.pttl(job.name)) <= TTL_S * 1000
    held = other.result(send(broker, CREATE, nightly=True))
    assert held["status"] == "skipped"
    assert "running already" in held["reason"]
    wait_until(lambda: client.get(CREATE.name) is None, TTL_S + 5, "the lease expires")

    [tag] = (tag for tag in client.hkeys("unacked") if create in str(client.hget("unacked", tag)))
    client.zadd("unacked_index", {str(tag): 0})  # an hour later
    another = start_worker(start, "another", database, broker)
    wait_until(lambda: done_by(database, CREATE, create), PATIENCE, "the message is delivered again")
    assert last(database, CREATE)["created"] == names(database, 1, 3)
    wait_until(lambda: done_by(database, DROP, drop), PATIENCE, "the job is retried")
    assert last(database, DROP)["dropped"] == names(database, -7, -6)
    assert another.popen.poll() is other.popen.poll() is None


def done_by(url: str, job: Job, task: str) -> bool:
    """Whether this task has reported that the job is done."""
    asked = "SELECT 1 FROM chronos_reports WHERE job = %s AND run = %s AND result = 'done'"
    return exists(url, "chronos_reports") and bool(query(url, asked, job.name, task))


def begin(client: redis.Redis, broker: EmbeddedRedis, job: Job, url: str) -> tuple[str, int]:
    """Send the nightly message and wait until the job is in the middle of its call: task and backend."""
    task = send(broker, job, nightly=True)
    wait_until(lambda: client.get(job.name), PATIENCE, "a worker has the lease")
    [[pid]] = wait_until(lambda: query(url, ASLEEP), PATIENCE, "the job is in the middle of its call")
    return task, pid
