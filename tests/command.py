"""Run the real command line in its own process, as an operator does.

Most runs are forked from a process that has everything imported: starting Python hundreds of times would take
longer than the runs themselves. Runs for which the start itself matters start Python.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from chronos.cli import main
from tests.tables import holding
from tests.waiting import wait_until

TIMEOUT_S = 120.0

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.command", "chronos.health"])


def chronos_environment(url: str, **more: str) -> dict[str, str]:
    """An environment in which ``url`` is the database to work on."""
    return {**os.environ, "DATABASE_URL": url, "PYTHONUTF8": "1", **more}


class Run:
    """A started run of ``python -m chronos ARGUMENTS``, with ``answer`` as its standard input."""

    def __init__(
        self, url: str, *arguments: str, answer: str = "", env: Mapping[str, str] | None = None
    ) -> None:
        self.arguments = arguments
        self._folder = tempfile.TemporaryDirectory()
        here = Path(self._folder.name)
        self._stdout, self._stderr = here / "stdout", here / "stderr"
        (here / "stdin").write_text(answer, "utf-8")
        environment = {**chronos_environment(url), **(env or {})}
        self._process = _FORKS.Process(target=_work, args=(here, arguments, environment), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        """The id of the process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def printed(self) -> str:
        """What it has printed so far."""
        return self._stdout.read_text("utf-8") if self._stdout.exists() else ""

    def finish(self) -> subprocess.CompletedProcess[str]:
        """Wait until it ends; the exit code is negative for a signal."""
        self._process.join(TIMEOUT_S)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            self._process.join()
        stdout, stderr = self._stdout.read_text("utf-8"), self._stderr.read_text("utf-8")
        self._folder.cleanup()
        if code is None:
            raise subprocess.TimeoutExpired(self.arguments, TIMEOUT_S, stdout, stderr)
        return subprocess.CompletedProcess(self.arguments, code, stdout, stderr)

    def kill_when(self, condition: Callable[[], object], what: str) -> None:
        """SIGKILL it as soon as ``condition`` holds; it never outlives the call."""
        try:
            wait_until(condition, 30, what)
        finally:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            killed = self.finish()
        assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr


def _work(here: Path, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    flags = os.O_WRONLY | os.O_CREAT
    for number, target in enumerate(
        [
            os.open(here / "stdin", os.O_RDONLY),
            os.open(here / "stdout", flags),
            os.open(here / "stderr", flags),
        ]
    ):
        os.dup2(target, number)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    main(list(arguments))


def chronos(
    url: str, *arguments: str, answer: str = "", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m chronos ARGUMENTS`` to its end, with ``answer`` as its standard input."""
    return Run(url, *arguments, answer=answer, env=env).finish()


@contextmanager
def started(
    url: str, *arguments: str, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Start the same in a new Python, without waiting; killed after the block if still running."""
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "chronos", *arguments],
        env={**chronos_environment(url), **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def stop_a_rollback(url: str) -> str:
    """Leave behind a rollback that was stopped while waiting for its swap; returns what it said."""
    reader = holding(url, "SELECT FROM webhook_log LIMIT 1")
    with reader, started(url, "rollback", "--yes") as process:
        assert process.stdout is not None
        next(line for line in process.stdout if "waiting for a lock on webhook_log" in line)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    return errors
