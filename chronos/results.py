"""What the functions of the library return: frozen values, times in UTC, durations in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chronos.errors import ExitCode
from chronos.migration.state import PeriodResult, Phase, Strategy
from chronos.table import Period, TableSpec

if TYPE_CHECKING:
    from chronos.reports import Report


@dataclass(frozen=True)
class MigrationResult:
    """What a run of ``migrate`` did. It is only returned when everything was compared and nothing differs.

    ``phase`` is ``migrated``, or ``ready`` after ``hold``; ``former`` is the current name of the plain table,
    None while it has its own. ``rows_copied`` counts the rows of all runs of this migration, None where
    nothing is copied; ``notes_replayed`` counts the notes that this run replayed. ``periods`` maps each
    period to the result of its comparison. ``seconds`` is how long this run took, ``steps`` each step with
    its seconds (0: an earlier run did it). ``swap_seconds`` is the longest that writers can have waited in
    the swap (None: an earlier run did it, or none yet), ``longest_lock_seconds`` the longest that anybody can
    have waited behind one of our locks. ``wal_bytes`` is what the whole server wrote meanwhile, None if that
    is unknown. ``report`` is the file that was written, None without one. ``listed`` says whether a
    configuration lists the table, so that the nightly jobs maintain it.
    """

    table: TableSpec
    strategy: Strategy
    phase: Phase
    former: str | None
    rows_copied: int | None
    notes_replayed: int
    periods: Mapping[Period, PeriodResult]
    seconds: float
    steps: tuple[tuple[str, float], ...]
    swap_seconds: float | None
    longest_lock_seconds: float
    wal_bytes: int | None
    report: Path | None
    listed: bool = True


@dataclass(frozen=True)
class RollbackResult:
    """What ``rollback`` did: the table is the plain one again.

    ``rows_carried`` counts the rows written since the swap that were carried over, excluding those noted and
    replayed; ``by_hand`` says that somebody had already put the plain table back, and only what was left of
    the migration was dropped.
    """

    table: TableSpec
    rows_carried: int
    by_hand: bool
    seconds: float


@dataclass(frozen=True)
class FinalizeResult:
    """What ``finalize`` did: there is no way back.

    ``dropped`` is the old table, None if it was gone already, or became a partition and stays.
    """

    table: TableSpec
    dropped: str | None
    seconds: float
    listed: bool = True


@dataclass(frozen=True)
class JobResult:
    """The outcome of ``create_future_partitions_job`` or ``drop_old_partitions_job`` for all tables.

    ``status`` is ``done``, ``skipped`` (no table is migrated yet), ``incomplete`` (something is in use, and
    left to the next run) or ``failed``. ``names`` are the partitions that were created or dropped, ``left``
    those still to do; ``error`` says why. ``reports`` maps each table to its own report, as stored in the
    database.
    """

    job: str
    status: str
    names: tuple[str, ...]
    left: tuple[str, ...]
    error: str | None
    reports: Mapping[str, Report]


@dataclass(frozen=True)
class UpkeepResult:
    """What ``upkeep`` did: both jobs, in their order."""

    jobs: tuple[JobResult, ...]

    @property
    def exit_code(self) -> ExitCode:
        """What ``chronos upkeep`` returns to the shell: 0 all is done; 1 something failed; 2 nothing was
        begun; 3 something is in use and left to the next run.
        """
        tables = [report for job in self.jobs for report in job.reports.values()]
        results = {job.status for job in self.jobs}
        if tables and all(report.get("refused") for report in tables):
            return ExitCode.REFUSED
        if "failed" in results:
            return ExitCode.FAILED
        return ExitCode.INTERRUPTED if "incomplete" in results else ExitCode.DONE

    @property
    def ok(self) -> bool:
        """Whether everything is done."""
        return self.exit_code is ExitCode.DONE
