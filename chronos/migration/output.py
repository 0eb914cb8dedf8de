"""What the operator reads while it runs: the six steps, and how far the copy has come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from chronos.migration.pace import Lag

_RULE = "=" * 80


class Output:
    """Prints the migration's lines; a live bar on a terminal, at most a line a second elsewhere."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
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

    @contextmanager
    def copying(self, total: int, done: int = 0) -> Iterator[RowCount]:
        """Count rows while the block runs."""
        count = RowCount(self, total, done, self._clock)
        if not self.console.is_terminal or total == 0:
            yield count
            count.finish()
            return
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>5.1f}%  {task.fields[rate]}"),
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

    def __init__(self, output: Output, total: int, done: int, clock: Callable[[], float]) -> None:
        self._output = output
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

    def add(self, day: date, rows: int, lag: Lag | None = None) -> None:
        """Note a finished batch of ``day``, and how far the replicas are behind; any worker may call."""
        with self._turn:
            self.rows += rows
            now = self._clock()
            if self._progress is not None and self._task is not None:
                rate = (self.rows - self._at_start) / max(now - self._started, 1e-6)
                self._progress.update(
                    self._task,
                    completed=self.rows,
                    description=f"Migrated {self.rows:,} / {self._total:,} rows",
                    rate=f"{rate:,.0f} rows/s",
                    note=f"{day}" if lag is None else f"{day}  lag {lag.seconds:.0f} s",
                )
            elif now - self._last_line >= 1:
                self._last_line = now
                self._print()

    def pause(self, why: str | None) -> None:
        """Say why the copy stands still; None: it goes on."""
        with self._turn:
            if self._progress is not None and self._task is not None:
                self._progress.update(self._task, note=f"paused: {why}" if why else "")
            elif why is None:
                self._output.line("  going on")
            elif not self._paused:
                self._output.line(f"  paused: {why}")
            self._paused = why is not None

    def finish(self) -> None:
        """Print where the count ended."""
        self._print()

    def _print(self) -> None:
        percent = 100.0 * self.rows / self._total if self._total else 100.0
        self._output.line(f"Migrated {self.rows:,} / {self._total:,} rows ({percent:.1f}%)")
