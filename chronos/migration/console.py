"""What the operator reads during a run: the six steps, the progress of the copy, and the summary."""

from __future__ import annotations

import os
import re
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from chronos.locks import LockConflict
from chronos.migration.record import Record
from chronos.migration.state import PeriodResult
from chronos.migration.throttle import Lag
from chronos.table import Period, TableSpec

_RULE = "=" * 80
_CALM = "cyan"
_RATE_S = 10.0  # the rate shown is that of the last 10 s


def in_bytes(size: float) -> str:
    """A number of bytes for people to read: ``in_bytes(2048)`` is ``2 kB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} TB"


def counted(number: int, what: str) -> str:
    """``1 row``, ``1,234 rows``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def ago(age: timedelta) -> str:
    """``3 minutes ago``, in the largest unit that fits."""
    for unit, seconds in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if age.total_seconds() >= seconds:
            return f"{counted(int(age.total_seconds() // seconds), unit)} ago"
    return "less than a minute ago"


def clock_time(seconds: float) -> str:
    """``0:13``, ``1:02:03``."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def short(number: float) -> str:
    """A number in little room: ``870``, ``9.2k``, ``56k``, ``1.2M``."""
    for unit in ("", "k"):
        if number < 999.5:
            return f"{number:.1f}{unit}" if unit and number < 9.95 else f"{number:.0f}{unit}"
        number /= 1000
    return f"{number:.1f}M"


# A word in shell quotes. A table is such a word, or an unquoted one that is valid in SQL.
_QUOTED = r"""'[^']*'(?:"'"'[^']*')*"""
_COMMAND = (
    r"(?:python -m chronos[\w.]*|\bchronos(?= (?:migrate|rollback|finalize|status|upgrade-functions)\b))"
    r"(?: (?:(?:migrate|rollback|finalize|status|upgrade-functions)"
    rf"(?: (?:{_QUOTED}|\w+\.\w+|webhook_log\b))?))?"
    rf"(?: --(?:column|every|retention-days|ahead-days|strategy|batch-size|workers|verify|rate-limit"
    rf"|max-replica-lag|max-lock-wait|report) (?:{_QUOTED}|[\w./-]*\w)| --[a-z-]+)*"
)
# From its first words to its semicolon. Quotes and brackets must close, and may contain anything; a comma, a
# colon or two lower-case words elsewhere mean that prose only mentions a statement.
_HELD = r"""(?:"[^"]*"|'[^']*'|[^"'()])*"""
_SQL = (
    r"\b(?:(?:CREATE|ALTER|DROP) (?:[A-Z]+ )*(?:TABLE|INDEX)\b|DELETE FROM\b|SELECT )"
    rf"""(?:"[^"]*"|'[^']*'|\({_HELD}(?:\({_HELD}\){_HELD})*\)|(?![a-z]+ [a-z])[^"'(),:;\[\]])*;"""
)
_TOML = r"\[\[tables\]\](?:\n\w+ = .*)*"
_TO_COPY = re.compile(f"({_COMMAND}|{_SQL}|{_TOML})")


def for_reading(text: str, width: int, indent: str = "") -> str:
    """``text`` in lines of ``width``, broken between words; what the reader copies is on lines of its own.

    That is each command, SQL statement and block for chronos.toml, however long. ``indent`` precedes every
    line but the first.
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
    """What a run did: its steps with their seconds, its periods with the results of their comparison.

    A step done by an earlier run has 0 seconds; ``copied`` is None if the strategy copies nothing.
    ``wal_bytes`` is what the whole server wrote during the run, None if unknown; ``lock_s`` the longest, in
    seconds, that any session can have waited behind a lock of the migration; ``statistics_s`` how long
    gathering statistics took, None if that was not done.
    """

    steps: list[tuple[str, float]]
    periods: dict[Period, PeriodResult]
    copied: int | None
    wal_bytes: int | None
    lock_s: float
    statistics_s: float | None = None


class _Terminal(Console):
    """A console that goes quiet when its reader is gone or its disk is full: no reason to end a migration."""

    def on_broken_pipe(self) -> None:
        """Called by Rich, whose own version ends the process."""
        self.quiet = True
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:
            self.on_broken_pipe()


@dataclass
class _Wait:
    """A wait for a lock since ``since``, on the line that is rewritten."""

    line: Live
    since: float
    conflict: LockConflict
    attempts: int = 0


class Output:
    """Prints the migration's lines: a live bar on a terminal, at most a line a second elsewhere.

    ``record`` keeps measurements for the run's report.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or _Terminal(highlight=False, soft_wrap=True)
        self.record = Record(clock)
        self._clock = clock
        encoding = (self.console.encoding or "ascii").lower().replace("-", "")
        self._tick = "✓" if encoding.startswith("utf") else "OK"
        self._wait: _Wait | None = None

    @property
    def rewrites(self) -> bool:
        """Whether lines can be overwritten: on a terminal, unless it is a dumb one."""
        return self.console.is_terminal and not self.console.is_dumb_terminal

    def line(self, text: str = "") -> None:
        """One line of plain text."""
        self.close()
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

    def partitions(self, table: TableSpec, periods: list[Period]) -> None:
        """The partitions that now exist: a line for each, on a terminal one line for all."""
        if not self.rewrites or len(periods) < 3:
            for period in periods:
                self.line(f"Created partition: {table.partition(period)} ({period} to {_day_after(period)})")
            return
        first, last = periods[0], periods[-1]
        self.line(f"Created {len(periods):,} partitions, one per {table.every}: {first} to {last}")

    def waiting(self, conflict: LockConflict, attempt: int) -> None:
        """A failed attempt at a lock; on a terminal the line is overwritten until the wait ends."""
        self.record.waited(conflict.what, conflict.who)
        if not self.rewrites:
            self.line(f"  {conflict} (attempt {attempt}, retrying)")
            return
        if self._wait is None:
            live = Live(
                console=self.console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            live.start()
            self._wait = _Wait(live, self._clock(), conflict)
        self._wait.conflict = conflict
        self._wait.attempts += 1
        text = _shown(conflict, self._clock() - self._wait.since, self.console.width - 1)
        self._wait.line.update(Text(text, _CALM, no_wrap=True, overflow="ellipsis"), refresh=True)

    def close(self) -> None:
        """End the overwritten line, if there is one, with how long the wait was."""
        if self._wait is None:
            return
        wait, self._wait = self._wait, None
        wait.line.stop()
        waited = clock_time(self._clock() - wait.since)
        self.console.print(f"  waited {waited} for {wait.conflict.who}", markup=False)

    @contextmanager
    def timed(self, doing: str, done: str) -> Iterator[None]:
        """Say what is being done and, after the block, that it is done and in how many seconds."""
        self.line()
        self.line(f"{doing}...")
        began = self._clock()
        yield
        self.ok(f"{done} in {self._clock() - began:.1f} s")

    def summary(self, found: Summary) -> None:
        """Rows of each period, seconds of each step, and what it cost the server.

        A terminal gets one line for all periods, so that the summary fits on the screen.
        """
        self.line()
        if found.periods and self.rewrites:
            self.line(_in_a_line(found.periods))
            self.line()
        elif found.periods:
            periods = Table("Period", "Rows", "Compared", box=None, pad_edge=False)
            periods.columns[1].justify = "right"
            for period, result in sorted(found.periods.items()):
                periods.add_row(f"{period}", f"{result.new_rows:,}", "equal" if result.alike else "counted")
            self.console.print(periods)
            self.line()
        steps = Table("Step", "Seconds", box=None, pad_edge=False)
        steps.columns[1].justify = "right"
        for number, (step, seconds) in enumerate(found.steps, 1):
            steps.add_row(f"{number} {step}", f"{seconds:.2f}" if seconds else "earlier")
        if found.statistics_s is not None:
            steps.add_row("  Gathering statistics", f"{found.statistics_s:.2f}")
        self.console.print(steps)
        self.line()
        self.cost(found)

    def cost(self, found: Summary) -> None:
        """The last line of the summary."""
        wal = "" if found.wal_bytes is None else f"{in_bytes(found.wal_bytes)} of WAL on the whole server; "
        copied = "nothing" if found.copied is None else f"{found.copied:,} rows"
        self.line(f"{copied} copied; {wal}longest lock {found.lock_s * 1000:.0f} ms")

    @contextmanager
    def copying(
        self,
        total: int,
        done: int = 0,
        did: str = "Migrated",
        *,
        periods: int = 0,
        begun: Iterable[Period] = (),
    ) -> Iterator[RowCount]:
        """Count rows while the block runs; ``did`` is the verb shown.

        They lie in ``periods`` periods, of which those in ``begun`` already have copied rows.
        """
        count = RowCount(self, total, done, self._clock, did, periods, begun)
        if not self.rewrites or total == 0:
            try:
                yield count
            finally:
                self.record.copied_all(count.rows)
            count.finish()
            return
        with Progress(
            TextColumn(did.lower() if did != "Migrated" else "copying"),
            BarColumn(bar_width=None, complete_style=_CALM, finished_style=_CALM),
            TextColumn("{task.fields[shown]}"),
            console=self.console,
            refresh_per_second=4,
            transient=True,  # the line that ends the count stays
        ) as progress:
            count.show_on(progress)
            try:
                yield count
            finally:
                self.record.copied_all(count.rows)
            count.finish()


def _day_after(period: Period) -> Period:
    """The instant at which a period ends, named like the next period."""
    return Period(period.end, period.end)


def _in_a_line(periods: dict[Period, PeriodResult]) -> str:
    first, last = min(periods), max(periods)
    rows = sum(result.new_rows for result in periods.values())
    how = "each compared, equal" if all(r.alike for r in periods.values()) else "each counted, equal"
    return f"{rows:,} rows from {first} to {_day_after(last)}: {counted(len(periods), 'partition')}, {how}"


def _shown(conflict: LockConflict, seconds: float, width: int) -> str:
    """The wait in one line: in full if it fits, else who is in the way and what would end that."""
    head = f"  {clock_time(seconds)} "
    if len(head) + len(conflict.text) <= width:
        return f"{head}{conflict}"
    tail = f": {conflict.remedy};" if conflict.remedy else ""
    head += "waiting for "
    room = max(8, width - len(head) - len(tail))
    who = conflict.who if len(conflict.who) <= room else f"{conflict.who[: room - 3]}..."
    return f"{head}{who}{tail}"


class RowCount:
    """Rows copied so far, added up over all workers."""

    def __init__(
        self,
        output: Output,
        total: int,
        done: int,
        clock: Callable[[], float],
        did: str = "Migrated",
        periods: int = 0,
        begun: Iterable[Period] = (),
    ) -> None:
        self._output = output
        self._did = did
        self._said = ""
        self._total = total
        self.rows = done
        self._clock = clock
        self._periods = periods
        self._begun = set(begun)
        self._recent: deque[tuple[float, int]] = deque([(clock(), done)])
        self._last_line = float("-inf")
        self._turn = threading.Lock()
        self._paused: str | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        output.record.copied_all(done)

    def show_on(self, progress: Progress) -> None:
        """Draw on a live bar from now on."""
        self._progress = progress
        self._task = progress.add_task("", total=self._total, completed=self.rows, shown="")

    def add(self, period: Period, rows: int, lag: Lag | None = None) -> None:
        """Record a finished batch of ``period`` and the replica lag; any worker may call it."""
        with self._turn:
            self.rows += rows
            if rows:
                self._begun.add(period)
            now = self._clock()
            self._output.record.copied(self.rows)
            self._recent.append((now, self.rows))
            while now - self._recent[0][0] > _RATE_S and len(self._recent) > 2:
                self._recent.popleft()
            if self._progress is not None:
                self._draw(period, None if lag is None else f"lag {lag.seconds:.0f} s")
            elif now - self._last_line >= 1:
                self._last_line = now
                self._print()

    def pause(self, why: str | None) -> None:
        """Say why the copy is paused; None: it continues. On a terminal the bar says so too."""
        with self._turn:
            if self._progress is not None:
                self._draw(None, None if why is None else "paused")
            if why is None:
                self._output.line("  continuing")
            elif self._paused is None:
                self._output.line(f"  paused: {why}")
            self._paused = why

    def finish(self) -> None:
        """Print where the count ended; the total then includes rows that came or went meanwhile."""
        self._total = self.rows
        self._print()

    def _draw(self, period: Period | None, note: str | None) -> None:
        """The fields beside the bar: how much, how fast, how long to go, and where."""
        assert self._progress is not None
        assert self._task is not None
        (then, before), (now, rows) = self._recent[0], self._recent[-1]
        rate = (rows - before) / max(now - then, 1e-6)
        # The total includes rows that have come meanwhile.
        total = max(self._total, self.rows)
        fields = [f"{100 * self.rows // max(total, 1):>3}%", f"{self.rows:,}/{total:,}", f"{short(rate)}/s"]
        if rate > 0:
            fields.append(f"left {clock_time((total - self.rows) / rate)}")
        if self._periods and period is not None:
            number = len(self._begun)
            fields.append(f"{_unit(period)} {number}/{max(self._periods, number)}")
        if note is not None:
            fields.append(note)
        self._progress.update(self._task, total=total, completed=self.rows, shown="  ".join(fields))

    def _print(self) -> None:
        percent = 100.0 * self.rows / self._total if self._total else 100.0
        text = f"{self._did} {self.rows:,} / {self._total:,} rows ({percent:.1f}%)"
        if text != self._said:
            self._said = text
            self._output.line(text)


def _unit(period: Period) -> str:
    """What a period is called by its length."""
    days = (period.end - period.start).total_seconds() / 86_400
    return "hour" if days < 1 else "day" if days < 2 else "week" if days < 8 else "month"
