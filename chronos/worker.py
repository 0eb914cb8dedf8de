"""The Celery app: when the two nightly jobs run, and their tasks.

    celery -A chronos.worker worker
    celery -A chronos.worker beat

Messages are acknowledged once a job has ended (`acks_late`): one whose worker was killed is delivered
again, after an hour, and runs then or finds that the night is done. There is no result backend: what a
job did is in the worker's log and, for `python -m chronos status`, in the database.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from celery import Celery, Task
from celery.schedules import crontab

from chronos import alerts, jobs, telemetry
from chronos.job_lock import TTL_S, connect
from chronos.settings import get_settings

_settings = get_settings()
connect(_settings)  # refuses a URL that Celery would quote in full

app = Celery("chronos", broker=_settings.redis_url.get_secret_value())
app.conf.update(
    timezone=_settings.beat_timezone,
    beat_schedule={
        job.name: {
            "task": job.name,
            "schedule": crontab(hour=str(job.hour), minute="0"),
            "kwargs": {"nightly": True},
        }
        for job in jobs.JOBS
    },
    accept_content=["json"],
    task_serializer="json",
    result_serializer="json",
    # A queue of our own: another application's worker on the same Redis would discard our messages.
    task_default_queue="chronos",
    task_acks_late=True,
    worker_prefetch_multiplier=1,
    # A process for each run: what it measures is sent once, not repeated for days by an idle process.
    worker_max_tasks_per_child=1,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
)

_OPTIONS: dict[str, Any] = {
    "bind": True,
    "throws": (jobs.JobFailedError,),
    "max_retries": len(jobs.PAUSES_S) + 3,
    # A run that hangs is ended, and its lease with it, before the next night.
    "time_limit": 1800,
    # A process that was killed leaves its lease behind; the next attempt comes once it has expired.
    "retry_on_worker_lost": True,
    "default_retry_delay": TTL_S + 5,
}


@app.task(name=jobs.CREATE.name, **_OPTIONS)
def create_future_partitions_job(
    self: Task[Any, Any],
    nightly: bool = False,
    pauses: Sequence[float] = jobs.PAUSES_S,
    earlier: jobs.Report | None = None,
) -> jobs.Report:
    """Create the partitions for the days ahead, for every table."""
    return _attempt(self, jobs.CREATE, nightly, pauses, earlier)


@app.task(name=jobs.DROP.name, **_OPTIONS)
def drop_old_partitions_job(
    self: Task[Any, Any],
    nightly: bool = False,
    pauses: Sequence[float] = jobs.PAUSES_S,
    earlier: jobs.Report | None = None,
) -> jobs.Report:
    """Drop the partitions that are past retention, for every table."""
    return _attempt(self, jobs.DROP, nightly, pauses, earlier)


def _attempt(
    task: Task[Any, Any], job: jobs.Job, nightly: bool, pauses: Sequence[float], earlier: jobs.Report | None
) -> jobs.Report:
    """One attempt and, after a pause (``pauses``, in seconds, minus up to 20%), the next."""
    settings = get_settings()
    telemetry.configure(settings, service_name="chronos-worker")
    retries = task.request.retries
    pause = pauses[retries] * random.uniform(0.8, 1.0) if retries < len(pauses) else None
    message = jobs.Message(str(task.request.id), nightly, retries + 1, earlier)
    try:
        report = jobs.attempt(job, settings, message, pause)
    except jobs.TryAgainError as error:
        options = {"nightly": nightly, "pauses": list(pauses), "earlier": error.report}
        raise task.retry(kwargs=options, countdown=pause, exc=jobs.JobFailedError(str(error))) from None
    except jobs.JobFailedError as error:
        alerts.tell(settings, str(error))
        raise
    finally:
        telemetry.flush()
    if report["status"] != "skipped":
        alerts.tell(settings)
    return report
