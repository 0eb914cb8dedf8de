"""What can go wrong, and the exit code that the command line returns for each.

A message is one line: what happened, what state the tables are in, what to type next.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """What a verb returns to the shell."""

    DONE = 0
    FAILED = 1
    REFUSED = 2
    INTERRUPTED = 3
    NEEDS_A_PERSON = 4


class ChronosError(Exception):
    """Something failed, and the database is as it was before."""

    exit_code = ExitCode.FAILED
    # Printed after the message; docs/TROUBLESHOOTING.md has a paragraph for it.
    id: ClassVar[str | None] = None


class RefusedError(ChronosError):
    """Not confirmed, bad arguments or a blocker: nothing was changed."""

    exit_code = ExitCode.REFUSED


class UndescribedError(RefusedError):
    """The table's time column is not known: nothing was changed.

    The message ends with the command that names it.
    """


class CannotTellError(RefusedError):
    """The server does not answer, so the state of the tables is unknown; nothing was changed."""


class InterruptedRunError(ChronosError):
    """Cut off half-way: nothing is lost, and the message says how to resume and how to undo."""

    exit_code = ExitCode.INTERRUPTED


class NeedsPersonError(ChronosError):
    """The automatic rollback could not finish: the message says what state the tables are in."""

    exit_code = ExitCode.NEEDS_A_PERSON


class LockUnavailableError(ChronosError):
    """A lock could not be taken in the time allowed; the message names the sessions that hold it."""

    id = "lock-unavailable"


class CutShortError(ChronosError):
    """The server repeatedly cancelled our statement."""

    id = "copy-cancelled"


class SupersededError(ChronosError):
    """Another run has taken over this migration; this one must not write another row."""

    id = "taken-over"


class ShapeError(ChronosError):
    """The replacement table no longer matches the one it replaces."""

    id = "table-changed"


class NotesLostError(ChronosError):
    """The note triggers were off for a while, so the writes made then are unknown."""

    id = "notes-disabled"


class StrayRowError(ChronosError):
    """A row written during the migration has a time that no partition accepts."""

    id = "rows-without-a-place"
