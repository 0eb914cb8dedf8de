"""The status as a text file for the textfile collector of Prometheus' node_exporter."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

from chronos.errors import RefusedError
from chronos.health import Status, Unknown


def write(file: Path, found: Sequence[Status | Unknown] | None) -> None:
    """Replace ``file``, whole or not at all; ``found`` None: the database cannot be reached.

    Times are seconds since 1970, sizes bytes. Raises RefusedError when the file cannot be written.
    """
    registry = CollectorRegistry()

    def gauge(name: str, what: str, *labels: str) -> Gauge:
        return Gauge(f"chronos_{name}", what, labels, registry=registry)

    gauge("checked_timestamp_seconds", "When status last ran.").set(time.time())
    gauge("database_up", "1 if the database answered, else 0.").set(found is not None)
    healthy = gauge("healthy", "1 if the table has no problem, else 0.", "table")
    problems = gauge("problems", "Problems that status reports for the table.", "table")
    partitions = gauge("partitions", "Attached partitions.", "table")
    size = gauge("partitions_bytes", "Size of all partitions with indexes and TOAST.", "table")
    runway = gauge("runway_days", "Days after today for which inserts find a partition.", "table")
    missing = gauge("partitions_missing", "Periods without a partition.", "table")
    last_run = gauge("job_last_run_timestamp_seconds", "When the job last began.", "table", "job_name")
    succeeded = gauge("job_last_success_timestamp_seconds", "Last success of the job.", "table", "job_name")
    failed = gauge("job_last_run_failed", "1 if the job failed in its last run, else 0.", "table", "job_name")
    nights = gauge(
        "job_contended_nights",
        "Nights since the last success in which readers kept the job from finishing.",
        "table",
        "job_name",
    )
    for one in found or ():
        table = one.table.typed
        healthy.labels(table).set(one.healthy)
        problems.labels(table).set(len(one.problems))
        if isinstance(one, Unknown):
            continue
        if one.partitioned:
            partitions.labels(table).set(len(one.partitions))
            size.labels(table).set(sum(p.bytes for p in one.partitions))
            runway.labels(table).set(one.runway_days)
            missing.labels(table).set(len(one.missing))
        for name, job in (one.jobs or {}).items():
            # Before the first success: the swap, or 0. So an alert on its age needs no second rule.
            begun = one.migration.fence if one.migration else None
            since = job.succeeded or begun
            succeeded.labels(table, name).set(since.timestamp() if since else 0)
            if started := job.report.get("started"):
                last_run.labels(table, name).set(datetime.fromisoformat(started).timestamp())
            failed.labels(table, name).set(job.report.get("status") == "failed")
            nights.labels(table, name).set(job.history.contended_nights)
    try:
        write_to_textfile(str(file), registry)
    except OSError as error:
        raise RefusedError(f"{file} cannot be written: {error.strerror}; the file is as it was") from error
