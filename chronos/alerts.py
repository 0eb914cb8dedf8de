"""Alert people once when a problem appears and once when it is gone, through a command of their own.

/bin/sh runs CHRONOS_ALERT_COMMAND, as cron runs a crontab line, and it gets JSON on its standard input: what
is new, what is gone, and every current problem. None of this is part of the command, so nothing needs
quoting. After TIMEOUT_S seconds the command is killed, with every process it has started. If it fails, the
run that called it goes on, and the alert is sent again after the next run.

The last alert is stored with the reports (reports.py), one row for each table. A problem counts as the same
if only its numbers, dates, partition names and reasons change: "the runway is 5 days" is not sent again when
it is 4.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from chronos import reports
from chronos.db import connect_engine, execute, one_line, opened, statement, transaction
from chronos.errors import ChronosError
from chronos.settings import Settings
from chronos.table import TableSpec
from chronos.telemetry import this_process

logger = logging.getLogger(__name__)

TIMEOUT_S = 30.0

_JOB = "alert"
_RUN = "told"
_LOCK_TIMEOUT_MS = 500
# The command needs none of these, and we cannot control what it prints or sends.
_NOT_FOR_THE_COMMAND = {
    "DATABASE_URL",
    "TEST_DATABASE_URL",
    "PGPASSWORD",
    "REDIS_URL",
    "LOGFIRE_TOKEN",
    "CHRONOS_ALERT_COMMAND",
}

Problems = dict[str, str]  # the kind of a problem -> its text


@dataclass
class _Found:
    """The problems of a table, remembered in the schema of ``home``; None: not remembered."""

    name: str
    home: TableSpec | None
    make: bool
    problems: Problems
    told: Problems

    def listed(self, kinds: set[str]) -> list[dict[str, str]]:
        """These problems, as the command receives them."""
        known = {**self.told, **self.problems}
        return [{"table": self.name, "problem": known[kind]} for kind in sorted(kinds)]


def tell(settings: Settings, failed: str | None = None) -> None:
    """Check every table, and run the command if a problem has appeared or is gone. Never raises.

    ``failed`` says why the last run failed, in case the database cannot be reached. Takes an advisory lock,
    so that two runs do not send the same alert.
    """
    if settings.chronos_alert_command is None:
        return
    try:
        _tell(settings, failed)
    except Exception as error:  # an alert must not break upkeep
        logger.error("the alert could not be sent: %s: %s", type(error).__name__, one_line(error))


def _tell(settings: Settings, failed: str | None) -> None:
    from chronos.health import collect_all  # imported here: not needed without an alert command

    try:
        found = [
            _Found(
                one.table.typed,
                one.table if one.table.schema else None,
                getattr(one, "partitioned", False),
                {kind_of(problem): problem for problem in one.problems},
                {},
            )
            for one in collect_all(settings)
        ]
    except (DBAPIError, ChronosError) as error:
        problem = failed or f"the state of the tables is unknown: {one_line(error)}"
        _run(settings, [_Found("", None, False, {kind_of(problem): problem}, {})])
        return
    if failed and not any(one.problems for one in found):
        found.append(_Found("", None, False, {kind_of(failed): failed}, {}))
    home = next((one.home for one in found if one.home), None)
    for one in found:
        if one.home is None and home is not None:
            one.home = TableSpec(one.name, schema=home.schema)
    engine = connect_engine(settings.database, application_name="chronos alert")
    with opened(engine) as conn, transaction(conn, lock_timeout_ms=_LOCK_TIMEOUT_MS):
        lock = statement("SELECT pg_try_advisory_xact_lock(hashtextextended('chronos alert', 0))")
        if not execute(conn, lock).scalar_one():
            logger.info("another run is sending the alert")
            return
        for one in found:
            one.told = _told(conn, one.home)
        if not _run(settings, found):
            return
        for one in found:
            _remember(conn, one)


def kind_of(problem: str) -> str:
    """The text of a problem without its numbers, dates, partition names and reasons."""
    text = re.sub(r"\([^()]*(\([^()]*\)[^()]*)*\)", "()", problem)
    text = re.sub(r"\d(?:[\d,.:TZ+-]*\d)?", "#", text)
    text = re.sub(r"#(?: #)+", "#", text)
    one = r"[^\s,.:;]*#[^\s,.:;]*"
    return re.sub(rf"({one})(?:, {one})*(?: and # more)?", r"\1", text)


def _told(conn: Connection, home: TableSpec | None) -> Problems:
    if home is None:
        return {}
    try:
        return reports.find(conn, home, _JOB, _RUN).get("problems") or {}
    except reports.UntrustedError:
        return {}


def _remember(conn: Connection, one: _Found) -> None:
    if one.home is None or not (one.problems or one.told):
        return
    now = datetime.now(UTC)
    told = reports.Kept(
        job=_JOB,
        run=_RUN,
        night=now.date(),
        writer=f"alert {this_process()}",
        started=now,
        result="told",
        report={"problems": one.problems},
    )
    try:
        with conn.begin_nested():
            reports.keep(conn, one.home, told, make=one.make)
    except (DBAPIError, reports.UntrustedError) as error:
        logger.warning("the alert about %s could not be recorded: %s", one.name, one_line(error))


def _run(settings: Settings, found: list[_Found]) -> bool:
    """Whether every change was sent; True when nothing has changed."""
    appeared = [each for one in found for each in one.listed(one.problems.keys() - one.told.keys())]
    gone = [each for one in found for each in one.listed(one.told.keys() - one.problems.keys())]
    if not (appeared or gone):
        return True
    text = json.dumps(
        {
            "database": settings.database.database,
            "server": settings.database.host,
            "checked_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "healthy": not any(one.problems for one in found),
            "appeared": appeared,
            "gone": gone,
            "problems": [each for one in found for each in one.listed(set(one.problems))],
        },
        indent=2,
    )
    assert settings.chronos_alert_command is not None
    if fault := _call(settings.chronos_alert_command.get_secret_value(), text):
        logger.error("CHRONOS_ALERT_COMMAND %s; the alert is sent again after the next run", fault)
        return False
    return True


def _call(command: str, text: str) -> str | None:
    """What went wrong, or None. The command's output may hold secrets and is discarded."""
    try:
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            env={k: v for k, v in os.environ.items() if k.upper() not in _NOT_FOR_THE_COMMAND},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
    except OSError as error:
        return f"cannot be started: {error.strerror}"
    with process:
        try:
            process.communicate(text, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            return f"did not finish within {TIMEOUT_S:g} s and was killed"
    return f"ended with exit code {process.returncode}" if process.returncode else None
