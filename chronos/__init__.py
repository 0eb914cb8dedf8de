"""chronos: turn a big live PostgreSQL table into native partitions, in place, and keep it partitioned.

For programs: ``from chronos import migrate, rollback, status``; see docs/API.md. The modules behind these
names are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from chronos.api import finalize, migrate, overview, rollback, status, upgrade_functions, upkeep
    from chronos.errors import (
        CannotTellError,
        ChronosError,
        ExitCode,
        InterruptedRunError,
        NeedsPersonError,
        RefusedError,
    )
    from chronos.health import Overview, Status, Unknown
    from chronos.results import FinalizeResult, JobResult, MigrationResult, RollbackResult, UpkeepResult
else:

    def __getattr__(name: str) -> object:
        if name in __all__:
            for home in ("errors", "results", "health", "api"):
                module = import_module(f"chronos.{home}")
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "CannotTellError",
    "ChronosError",
    "ExitCode",
    "FinalizeResult",
    "InterruptedRunError",
    "JobResult",
    "MigrationResult",
    "NeedsPersonError",
    "Overview",
    "RefusedError",
    "RollbackResult",
    "Status",
    "Unknown",
    "UpkeepResult",
    "finalize",
    "migrate",
    "overview",
    "rollback",
    "status",
    "upgrade_functions",
    "upkeep",
]
