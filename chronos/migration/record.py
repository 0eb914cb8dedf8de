"""What a run measures: how fast it copied, and who kept it waiting for a lock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_MOST = 240  # samples kept: as many as a chart can show


@dataclass(frozen=True)
class Sample:
    """How many ``rows`` were copied, by this run and those before, ``seconds`` after the run began."""

    seconds: float
    rows: int


@dataclass(frozen=True)
class LockWait:
    """A failed attempt at a lock, ``seconds`` after the run began: ``what`` was waited for, and ``who`` was
    in the way.
    """

    seconds: float
    what: str
    who: str


@dataclass
class Record:
    """Filled during a run; any worker may call it. ``clock`` gives the time in seconds."""

    clock: Callable[[], float] = time.monotonic
    samples: list[Sample] = field(default_factory=list)
    waits: list[LockWait] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began = self.clock()
        self._every_s = 0.25
        self._turn = threading.Lock()

    @property
    def seconds(self) -> float:
        """How long ago the run began."""
        return self.clock() - self._began

    def copied(self, rows: int) -> None:
        """Record that ``rows`` are copied by now; samples stay few, however long it takes."""
        with self._turn:
            now = self.seconds
            if self.samples and now - self.samples[-1].seconds < self._every_s:
                return
            self.samples.append(Sample(now, rows))
            if len(self.samples) > _MOST:
                self.samples = self.samples[::2]
                self._every_s *= 2

    def copied_all(self, rows: int) -> None:
        """Record how many rows there were when the copy ended or stopped."""
        with self._turn:
            self.samples.append(Sample(self.seconds, rows))

    def waited(self, what: str, who: str) -> None:
        """Record a failed attempt at a lock."""
        with self._turn:
            self.waits.append(LockWait(self.seconds, what, who))
