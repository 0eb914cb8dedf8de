"""What can go wrong, each with the exit code that the command line returns for it.

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
    # Printed behind the message; docs/TROUBLESHOOTING.md has a paragraph for it.
    id: ClassVar[str | None] = None


class RefusedError(ChronosError):
    """Not confirmed, bad arguments or a blocker: nothing was changed."""

    exit_code = ExitCode.REFUSED


class UndescribedError(RefusedError):
    """Nobody has said which the time column of the table is: nothing was changed.

    The message ends with the command that says it.
    """


class CannotTellError(RefusedError):
    """How the tables are cannot be told, for the server does not answer; nothing was changed."""


class InterruptedRunError(ChronosError):
    """Cut off half-way: nothing is lost, and the message says how to resume and how to undo."""

    exit_code = ExitCode.INTERRUPTED


class NeedsPersonError(ChronosError):
    """The automatic rollback could not finish: the message says in which state the tables are."""

    exit_code = ExitCode.NEEDS_A_PERSON


class LockUnavailableError(ChronosError):
    """A lock could not be had within the patience given; the message names who holds it."""

    id = "lock-unavailable"


class CutShortError(ChronosError):
    """The server cancelled what we asked of it, again and again."""

    id = "copy-cancelled"


class SupersededError(ChronosError):
    """Another run has taken this migration over; this one must not write another row."""

    id = "taken-over"


class ShapeError(ChronosError):
    """A table that is to take another's place is not what that one was."""

    id = "table-changed"


class NotesLostError(ChronosError):
    """The note triggers were off for a time, so what was written then is not known."""

    id = "notes-disabled"


class StrayRowError(ChronosError):
    """A row was written during the migration for a time that no partition takes."""

    id = "rows-without-a-place"
