"""`status --prometheus`: what the file says, and that the rules and the dashboard use nothing else."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

from chronos.jobs import DROP, JOBS
from tests.command import chronos
from tests.partitioned import add_partitions
from tests.tables import connected, holding, query, value
from tests.test_jobs import migrate, names

DEPLOY = Path(__file__).parents[1] / "deploy"
CRON = {"REDIS_URL": "", "WEBHOOK_LOG_DAYS_AHEAD": "3", "WEBHOOK_LOG_RETENTION_DAYS": "5"}
TABLE = (("table", "public.webhook_log"),)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(file: Path) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(file.read_text())
        for sample in family.samples
    }


def asked_for(text: str) -> set[str]:
    return set(re.findall(r"\bchronos_\w+", text))


def test_the_file_matches_status_and_the_deployed_rules_use_only_its_metrics(
    database: str, tmp_path: Path
) -> None:
    migrate(database, -6, 0)
    file = tmp_path / "chronos.prom"
    assert chronos(database, "upkeep", env=CRON).returncode == 0
    with connected(database, autocommit=False) as conn:
        add_partitions(conn.cursor(), -7, -6)
        conn.commit()
    with holding(database, f"SELECT FROM {names(database, -7, -7)[0]}"):
        assert chronos(database, "upkeep", "--retry-for", "0", env=CRON).returncode == 3
    query(database, f"DROP TABLE {names(database, 2, 2)[0]}")
    shown = chronos(database, "status", "--json", "--prometheus", str(file), env=CRON)
    assert shown.returncode == 1
    status = json.loads(shown.stdout)
    found = parsed(file)
    assert found["chronos_database_up", ()] == 1
    now = value(database, "SELECT extract(epoch FROM now())::float")
    assert abs(found["chronos_checked_timestamp_seconds", ()] - now) < 60
    assert found["chronos_healthy", TABLE] == 0
    assert found["chronos_problems", TABLE] == len(status["problems"]) > 0
    assert found["chronos_partitions", TABLE] == status["partitions"] == 9
    assert found["chronos_runway_days", TABLE] == status["runway_days"] == 1
    assert found["chronos_partitions_missing", TABLE] == 1
    size = value(
        database,
        "SELECT sum(pg_total_relation_size(inhrelid))::bigint FROM pg_inherits i"
        " JOIN pg_class c ON c.oid = inhrelid WHERE inhparent = 'webhook_log'::regclass",
    )
    assert found["chronos_partitions_bytes", TABLE] == size
    for job in JOBS:
        of_job = (("job_name", job.name), *TABLE)
        nights = found["chronos_job_contended_nights", of_job]
        assert nights == status["jobs"][job.name]["contended_nights"]
        assert abs(found["chronos_job_last_success_timestamp_seconds", of_job] - now) < 60
        assert abs(found["chronos_job_last_run_timestamp_seconds", of_job] - now) < 60
        assert found["chronos_job_last_run_failed", of_job] == 0

    written = {name for name, _ in found}
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    expressions = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    assert all(asked_for(expression) for expression in expressions)
    assert asked_for("".join(expressions)) <= written
    for name, bound in (
        ("chronos_runway_days", "< 7"),
        ("chronos_job_last_success_timestamp_seconds", r"> 26 \* 3600"),
        ("chronos_partitions_missing", "> 0"),
        (rf'chronos_job_contended_nights{{job_name="{DROP.name}"}}', ">= 3"),
    ):
        assert any(re.search(rf"{re.escape(name)} {bound}$", expression) for expression in expressions), name
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert asked_for(json.dumps(targets)) == written  # it shows every metric
    assert asked_for(json.dumps(dashboard["templating"])) <= written


def test_the_file_of_an_unreachable_database_says_only_that(
    tmp_path: Path,
) -> None:
    file = tmp_path / "chronos.prom"
    away = chronos("postgresql://u:hush@127.0.0.1:1/none", "status", "--prometheus", str(file), env=CRON)
    assert away.returncode == 2
    assert {name for name, _ in parsed(file)} == {"chronos_checked_timestamp_seconds", "chronos_database_up"}
    assert parsed(file)["chronos_database_up", ()] == 0


def test_the_file_is_replaced_atomically_and_readable_by_others(database: str, tmp_path: Path) -> None:
    """A reader that has the old file open can read it to the end."""
    migrate(database, 0, 3)
    file = tmp_path / "chronos.prom"
    file.write_text("chronos_of_old 1\n")
    with file.open() as reader:
        chronos(database, "status", "--prometheus", str(file), env=CRON)
        assert reader.read() == "chronos_of_old 1\n"
    assert "chronos_runway_days" in file.read_text()
    assert os.listdir(tmp_path) == ["chronos.prom"]
    assert stat.S_IMODE(file.stat().st_mode) & 0o044


def test_an_unwritable_file_is_refused_and_named(database: str, tmp_path: Path) -> None:
    migrate(database, 0, 3)
    file = tmp_path / "no such folder" / "chronos.prom"
    done = chronos(database, "status", "--prometheus", str(file), env=CRON)
    assert done.returncode == 2
    assert f"Error: {file} cannot be written: No such file or directory" in done.stderr
