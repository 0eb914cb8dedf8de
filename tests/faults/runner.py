"""Runs the real command line in processes forked from one that has everything imported: quick to start.

Started as ``python -m tests.faults.runner``, it reads a JSON line per run (arguments, environment, a
file for the output), and answers with a line that has the pid, then one that has the exit status.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Self


class Runner:
    """The parent's side: starts runs of ``python -m chronos``, one after another."""

    def __init__(self, folder: Path) -> None:
        self._output = folder / "output.txt"
        self.pid = 0

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.runner"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=30)

    def start(self, url: str, *arguments: str) -> int:
        """Begin a run; returns its pid."""
        order = {"arguments": arguments, "url": url, "output": str(self._output)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        self.pid = self._answer()
        return self.pid

    def finish(self) -> tuple[int, str]:
        """Wait for the run's end: its exit code, negative for a signal, and all that it printed."""
        return self._answer(), self._output.read_text("utf-8")

    def run(self, url: str, *arguments: str) -> tuple[int, str]:
        """A run from start to end."""
        self.start(url, *arguments)
        return self.finish()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


def serve() -> None:
    """The child's side."""
    from chronos.cli import main

    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.environ["DATABASE_URL"] = order["url"]
            target = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(target, 1)
            os.dup2(target, 2)
            code = 1
            try:
                main(order["arguments"])
            except SystemExit as ending:
                code = int(ending.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
