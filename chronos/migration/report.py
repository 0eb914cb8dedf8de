"""The report of a run, for the change ticket: FILE.json for programs, FILE.html for people; the same facts.

A run that stops or fails also writes one, and its ``outcome`` says so. The facts, by their JSON keys (times
are ISO 8601 in UTC; what does not apply is null):

``report`` the version of this list, 1
``outcome`` ``complete``, ``held`` (ready to swap), ``stopped`` (half-way, can be resumed), ``failed`` (rolled
    back, database as before) or ``needs a person``; ``message`` the error shown to the operator; ``tables``
    one sentence that says what each table is now
``table``, ``strategy``, ``column``, ``every``, ``retention_days``, ``cutoff`` (rows from this instant on are
    copied), ``first`` and ``end`` (the bounds of the partitions), ``begun`` (of the migration), ``fence`` (of
    the swap)
``where`` ``host``, ``port``, ``database``, ``user``, ``postgresql``; ``who`` ``user`` and ``host`` that ran
    the command; ``chronos``, ``python`` versions; ``options`` as typed
``started``, ``ended``, ``seconds`` of this run; ``last_step`` the last one that it reached
``planned`` and ``happened`` ``rows`` copied, ``bytes`` (of the plain table with its indexes, of the
    partitions), ``seconds`` of the six steps (happened: in this run), ``wal_bytes`` (happened: of the whole
    server during this run), ``disk_bytes`` taken, ``partitions``
``steps`` ``step``, ``name``, ``seconds`` (0: an earlier run did it); ``statistics_seconds``
``notes_replayed`` (by this run), ``swap_milliseconds``, ``longest_lock_wait_seconds``
``periods`` ``start``, ``end``, ``old_rows``, ``new_rows``, ``alike`` (null: only counted)
``copy`` ``seconds`` since the run began, ``rows`` copied by then; ``lock_waits`` ``seconds``, ``what`` was
    waited for, ``who`` was in the way
``watch``, ``go_back`` what to do next, as ``command`` and ``why``
"""

from __future__ import annotations

import getpass
import json
import platform
import socket
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from chronos import __version__, commands
from chronos.catalog.partitions import attached
from chronos.db import transaction
from chronos.errors import ChronosError, InterruptedRunError, NeedsPersonError, RefusedError
from chronos.migration.console import Summary
from chronos.migration.context import Migration
from chronos.migration.report_page import html
from chronos.migration.state import Expected, Phase, describe

_KINDS = (".json", ".html")
_EXPECTED = [field.name for field in fields(Expected)]


@dataclass(frozen=True)
class Ended:
    """How a run ended: when it ``began``, the error that ended it if any, whether it was held before the
    swap, the last step that it reached, its options as typed.
    """

    began: datetime
    error: ChronosError | None
    held: bool
    last_step: int
    options: str

    @property
    def outcome(self) -> str:
        """The outcome, in one to three words."""
        match self.error:
            case None:
                return "held" if self.held else "complete"
            case InterruptedRunError():
                return "stopped"
            case NeedsPersonError():
                return "needs a person"
        return "failed"


def require_writable(path: Path) -> None:
    """Check that the report can be written to ``path``; an existing file keeps its content.

    Raises RefusedError, also if the name ends in neither .json nor .html.
    """
    if path.suffix.lower() not in _KINDS:
        raise RefusedError(
            f"the report is written as JSON or HTML, and {path} does not end in"
            f" {' or '.join(_KINDS)}; nothing was changed"
        )
    try:
        existed = path.exists()
        with path.open("a", encoding="utf-8"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise RefusedError(
            f"the report cannot be written to {path}: {error.strerror}; nothing was changed."
            " Name a writable file with --report"
        ) from error


def write_report(path: Path, found: dict[str, Any]) -> None:
    """Write ``facts`` to ``path``, as JSON or as HTML by its name. Raises OSError."""
    text = html(found) if path.suffix.lower() == ".html" else json.dumps(found, indent=2) + "\n"
    path.write_text(text, encoding="utf-8")


def facts(migration: Migration, summary: Summary, ended: Ended) -> dict[str, Any]:
    """Everything the report says, by the keys at the top of this module."""
    state, plan, table = migration.state, migration.plan, migration.table
    url, record = migration.engine.url, migration.operator.output.record
    now = datetime.now(UTC)
    partitions, size = _partitions(migration.conn, migration)
    version = migration.engine.dialect.server_version_info or ()
    return {
        "report": 1,
        "outcome": ended.outcome,
        "message": ended.error and str(ended.error),
        "tables": _tables(migration, ended),
        "table": f"{table.home}.{table}",
        "strategy": plan.strategy.value,
        "column": table.column,
        "every": table.every.value,
        "retention_days": table.retention_days,
        "cutoff": plan.cutoff.isoformat(),
        "first": plan.first.isoformat(),
        "end": plan.end.isoformat(),
        "begun": plan.started_at.isoformat(),
        "fence": state.fence and state.fence.astimezone(UTC).isoformat(),
        "where": {
            "host": url.host or "local socket",
            "port": url.port or 5432,
            "database": url.database,
            "user": url.username,
            "postgresql": ".".join(map(str, version)),
        },
        "who": {"user": _user(), "host": socket.gethostname()},
        "chronos": __version__,
        "python": platform.python_version(),
        "options": ended.options,
        "started": ended.began.isoformat(timespec="seconds"),
        "ended": now.isoformat(timespec="seconds"),
        "seconds": round(record.seconds, 1),
        "last_step": ended.last_step,
        "planned": {
            **(asdict(plan.expected) if plan.expected else dict.fromkeys(_EXPECTED)),
            "partitions": len(plan.periods) + (1 if plan.attaches else 0),
        },
        "happened": {
            "rows": summary.copied,
            "bytes": size,
            "seconds": round(sum(seconds for _, seconds in summary.steps), 2),
            "wal_bytes": summary.wal_bytes,
            "disk_bytes": _disk(migration, size),
            "partitions": partitions,
        },
        "steps": [
            {"step": number, "name": step, "seconds": round(seconds, 3)}
            for number, (step, seconds) in enumerate(summary.steps, 1)
        ],
        "statistics_seconds": summary.statistics_s and round(summary.statistics_s, 2),
        "notes_replayed": None if plan.attaches else migration.notes_replayed,
        "swap_milliseconds": migration.swap_s and round(migration.swap_s * 1000, 1),
        "longest_lock_wait_seconds": round(summary.lock_s, 4),
        "periods": [
            {"start": period.start.isoformat(), "end": period.end.isoformat(), **asdict(result)}
            for period, result in sorted(summary.periods.items())
        ],
        "copy": [{"seconds": round(s.seconds, 2), "rows": s.rows} for s in record.samples],
        "lock_waits": [{"seconds": round(w.seconds, 2), "what": w.what, "who": w.who} for w in record.waits],
        "watch": _watch(migration, ended),
        "go_back": _go_back(migration, ended),
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a uid without a name, as in a container
        return "unknown"


def _partitions(conn: Connection, migration: Migration) -> tuple[int | None, int | None]:
    """How many partitions there are, and their bytes; None when the server does not say."""
    table = migration.table
    parent = table.name if migration.state.phase.swapped else table.new
    try:
        with transaction(conn):
            found = attached(conn, table, parent)
    except SQLAlchemyError:
        return None, None
    return len(found), sum(partition.bytes for partition in found)


def _disk(migration: Migration, size: int | None) -> int | None:
    """Bytes that the partitions have added; None when that is not known (yet)."""
    plan = migration.plan
    if size is None or not plan.attaches:
        return size
    return size - plan.expected.bytes if plan.expected and migration.state.phase.swapped else None


def _tables(migration: Migration, ended: Ended) -> str:
    if ended.outcome == "failed":
        return f"{migration.table} is the plain table it was before, with every row."
    return describe(migration.state)


def _watch(migration: Migration, ended: Ended) -> list[dict[str, str]]:
    """What the person who signs off should keep an eye on."""
    table, attaches = migration.table, migration.plan.attaches
    status = {"command": commands.status(table), "why": "partitions, gaps, runway, jobs; exit code 0 is well"}
    if ended.outcome == "failed":
        return []
    if ended.outcome != "complete":
        resume = {"command": f"{commands.migrate(table)} --resume", "why": "does the rest"}
        return [{**status, "why": "how far it is, and how many notes wait"}, resume]
    steps = [status]
    if attaches:
        steps.append(
            {
                "command": f"SELECT pg_size_pretty(pg_total_relation_size('{table.home}.{table.history}'));",
                "why": "the former table, one partition until its last row has expired",
            }
        )
    finalizing = "ends the way back" if attaches else f"drops {table.old}, and ends the way back"
    steps.append({"command": commands.finalize(table), "why": f"after some days: {finalizing}"})
    return steps


def _go_back(migration: Migration, ended: Ended) -> list[dict[str, str]]:
    table = migration.table
    if ended.outcome == "failed":
        return []
    why = "the plain table again, with every row that was written since; until finalize"
    if migration.state.phase not in (Phase.MIGRATED, Phase.RETURNING, Phase.FINALIZING):
        why = "drops what was built; the plain table has been in use all the time"
    steps = [{"command": commands.rollback(table), "why": why}]
    if migration.plan.attaches and migration.state.phase.swapped:
        steps.append(
            {
                "command": f"ALTER TABLE {table} DETACH PARTITION {table.history};",
                "why": f"do this first if you go back by hand: DROP TABLE {table} would drop every row",
            }
        )
    return steps
