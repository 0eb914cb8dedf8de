"""What the operator reads while it runs: the six steps, how far the copy has come, and what it was in all."""

from __future__ import annotations

import os
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from chronos.migration.state import PeriodResult
from chronos.migration.throttle import Lag
from chronos.table import Period

_RULE = "=" * 80


def in_bytes(size: float) -> str:
    """A number of bytes as a person reads it: ``in_bytes(2048)`` is ``2 kB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} TB"


def counted(number: int, what: str) -> str:
    """``1 row``, ``1,234 rows``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def ago(age: timedelta) -> str:
    """``3 minutes ago``, in the largest unit of which there is one."""
    for unit, seconds in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if age.total_seconds() >= seconds:
            return f"{counted(int(age.total_seconds() // seconds), unit)} ago"
    return "less than a minute ago"


# A word in the quotes of a shell. A table is such a word, or one without quotes that SQL would take.
_QUOTED = r"""'[^']*'(?:"'"'[^']*')*"""
_COMMAND = (
    r"(?:python -m chronos[\w.]*|\bchronos(?= (?:migrate|rollback|finalize|status|upgrade-functions)\b))"
    r"(?: (?:(?:migrate|rollback|finalize|status|upgrade-functions)"
    rf"(?: (?:{_QUOTED}|\w+\.\w+|webhook_log\b))?))?"
    rf"(?: --(?:column|every|retention-days|ahead-days|strategy|batch-size|workers|verify|rate-limit"
    rf"|max-replica-lag|max-lock-wait|report) (?:{_QUOTED}|[\w./-]*\w)| --[a-z-]+)*"
)
# From its first words to the semicolon that ends it. Quotes and brackets close in it, and may hold anything;
# a comma, a colon or two small words elsewhere tell that it is only spoken of.
_HELD = r"""(?:"[^"]*"|'[^']*'|[^"'()])*"""
_SQL = (
    r"\b(?:(?:CREATE|ALTER|DROP) (?:[A-Z]+ )*(?:TABLE|INDEX)\b|DELETE FROM\b|SELECT )"
    rf"""(?:"[^"]*"|'[^']*'|\({_HELD}(?:\({_HELD}\){_HELD})*\)|(?![a-z]+ [a-z])[^"'(),:;\[\]])*;"""
)
_TOML = r"\[\[tables\]\](?:\n\w+ = .*)*"
_TO_COPY = re.compile(f"({_COMMAND}|{_SQL}|{_TOML})")


def for_reading(text: str, width: int, indent: str = "") -> str:
    """``text`` in lines of ``width``, broken between words; what is to be copied on lines of its own.

    That is each command, each statement of SQL, and each block for chronos.toml, however long they are.
    ``indent`` stands before each line but the first.
    """
    lines: list[str] = []
    for number, piece in enumerate(_TO_COPY.split(text)):
        if number % 2:
            lines.append(textwrap.indent(piece, f"{indent}  "))
        else:
            prose = piece.lstrip(";,. \n") if number else piece
            lines += textwrap.wrap(
                prose,
                width,
                initial_indent=indent if number else "",
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines)


@dataclass(frozen=True)
class Summary:
    """What a run did: its steps with their seconds, the periods with what was found when they were compared.

    A step that an earlier run did has 0 seconds; ``copied`` is None when that was not the way. ``wal_bytes``
    is what the whole server wrote meanwhile, None if it did not say; ``lock_s`` the longest, in seconds,
    that anybody can have stood behind a lock of the migration.
    """

    steps: list[tuple[str, float]]
    periods: dict[Period, PeriodResult]
    copied: int | None
    wal_bytes: int | None
    lock_s: float


class _Terminal(Console):
    """A console that falls silent when its reader has gone, or its disk is full.

    That is no reason to end a migration.
    """

    def on_broken_pipe(self) -> None:
        """Called by Rich, which would end the process."""
        self.quiet = True
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:
            self.on_broken_pipe()


class Output:
    """Prints the migration's lines; a live bar on a terminal, at most a line a second elsewhere."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or _Terminal(highlight=False, soft_wrap=True)
        self._clock = clock
        encoding = (self.console.encoding or "ascii").lower().replace("-", "")
        self._tick = "✓" if encoding.startswith("utf") else "OK"

    def line(self, text: str = "") -> None:
        """One line of plain text."""
        self.console.print(text, markup=False)

    def banner(self, text: str) -> None:
        """A heading between two rules."""
        self.line(_RULE)
        self.line(text)
        self.line(_RULE)

    def step(self, number: int, text: str) -> None:
        """The line that opens a step."""
        self.line()
        self.line(f"[Step {number}/6] {text}...")

    def ok(self, text: str) -> None:
        """The line that closes a step."""
        self.line(f"{self._tick} {text}")

    def partition(self, leaf: str, period: Period) -> None:
        """The line for a partition that is there now."""
        self.line(f"Created partition: {leaf} ({period} to {Period(period.end, period.end)})")

    def waiting(self, why: str, attempt: int) -> None:
        """What an attempt at a lock came to."""
        self.line(f"  {why} (attempt {attempt}, trying again)")

    def summary(self, found: Summary) -> None:
        """Rows of each period, seconds of each step, and what it cost the server."""
        periods = Table("Period", "Rows", "Compared", box=None, pad_edge=False)
        periods.columns[1].justify = "right"
        for period, result in sorted(found.periods.items()):
            periods.add_row(f"{period}", f"{result.new_rows:,}", "equal" if result.alike else "counted")
        steps = Table("Step", "Seconds", box=None, pad_edge=False)
        steps.columns[1].justify = "right"
        for number, (step, seconds) in enumerate(found.steps, 1):
            steps.add_row(f"{number} {step}", f"{seconds:.2f}" if seconds else "earlier")
        for table in (periods, steps) if found.periods else (steps,):
            self.line()
            self.console.print(table)
        self.line()
        wal = "" if found.wal_bytes is None else f"{in_bytes(found.wal_bytes)} of WAL on the whole server; "
        copied = "nothing" if found.copied is None else f"{found.copied:,} rows"
        self.line(f"{copied} copied; {wal}longest lock {found.lock_s * 1000:.0f} ms")

    @contextmanager
    def copying(self, total: int, done: int = 0, did: str = "Migrated") -> Iterator[RowCount]:
        """Count rows while the block runs; ``did`` is what is done to them."""
        count = RowCount(self, total, done, self._clock, did)
        if not self.console.is_terminal or total == 0:
            yield count
            count.finish()
            return
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>5.1f}% {task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            refresh_per_second=4,
            transient=True,  # the line that ends the count says it all
        ) as progress:
            count.show_on(progress)
            yield count
            count.finish()


class RowCount:
    """Rows copied so far, added up over all workers."""

    def __init__(
        self, output: Output, total: int, done: int, clock: Callable[[], float], did: str = "Migrated"
    ) -> None:
        self._output = output
        self._did = did
        self._said = ""
        self._total = total
        self.rows = done
        self._at_start = done
        self._clock = clock
        self._started = clock()
        self._last_line = float("-inf")
        self._turn = threading.Lock()
        self._paused = False
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def show_on(self, progress: Progress) -> None:
        """Draw on a live bar from now on."""
        self._progress = progress
        self._task = progress.add_task("", total=self._total, completed=self.rows, rate="", note="")

    def add(self, period: Period, rows: int, lag: Lag | None = None) -> None:
        """Note a finished batch of ``period``, and how far the replicas are behind; any worker may call."""
        with self._turn:
            self.rows += rows
            now = self._clock()
            if self._progress is not None and self._task is not None:
                rate = (self.rows - self._at_start) / max(now - self._started, 1e-6)
                self._progress.update(
                    self._task,
                    completed=self.rows,
                    description=f"{self.rows:,} / {self._total:,} rows",
                    rate=f"{rate:,.0f}/s",
                    note=f"{period}" if lag is None else f"{period} lag {lag.seconds:.0f} s",
                )
            elif now - self._last_line >= 1:
                self._last_line = now
                self._print()

    def pause(self, why: str | None) -> None:
        """Say why the copy stands still; None: it goes on."""
        with self._turn:
            if why is None:
                self._output.line("  going on")
            elif not self._paused:
                self._output.line(f"  paused: {why}")
            if self._progress is not None and self._task is not None:
                self._progress.update(self._task, note="paused" if why else "")
            self._paused = why is not None

    def finish(self) -> None:
        """Print where the count ended; rows that came or went meanwhile are part of the whole."""
        self._total = self.rows
        self._print()

    def _print(self) -> None:
        percent = 100.0 * self.rows / self._total if self._total else 100.0
        text = f"{self._did} {self.rows:,} / {self._total:,} rows ({percent:.1f}%)"
        if text != self._said:
            self._said = text
            self._output.line(text)
