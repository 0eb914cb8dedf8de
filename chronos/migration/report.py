"""The report of a run as JSON, for those who keep records."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chronos.migration.console import Summary
from chronos.migration.state import State


def write_report(path: Path, state: State, found: Summary) -> None:
    """Write what was done and measured to ``path``. Raises OSError."""
    report: dict[str, Any] = {
        "table": f"{state.table.home}.{state.table}",
        "strategy": state.plan.strategy,
        "cutoff": state.plan.cutoff.isoformat(),
        "fence": state.fence and state.fence.isoformat(),
        "steps": [
            {"step": number, "name": step, "seconds": round(seconds, 3)}
            for number, (step, seconds) in enumerate(found.steps, 1)
        ],
        "rows_copied": found.copied,
        "wal_bytes": found.wal_bytes,
        "longest_lock_wait_seconds": round(found.lock_s, 4),
        "periods": [
            {"start": period.start.isoformat(), "end": period.end.isoformat(), **asdict(result)}
            for period, result in sorted(found.periods.items())
        ],
    }
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
