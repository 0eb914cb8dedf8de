"""Run the real command line in a process of its own, as an operator does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


def chronos_environment(url: str, **more: str) -> dict[str, str]:
    """The environment in which ``url`` is the database to work on."""
    return {**os.environ, "DATABASE_URL": url, "PYTHONUTF8": "1", **more}


def chronos(
    url: str, *arguments: str, answer: str = "", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``python -m chronos ARGUMENTS`` to its end, with ``answer`` as its standard input."""
    return subprocess.run(
        [sys.executable, "-m", "chronos", *arguments],
        input=answer,
        env={**chronos_environment(url), **(env or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@contextmanager
def started(url: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The same without waiting for its end; whatever still runs after the block is killed."""
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "chronos", *arguments],
        env=chronos_environment(url),
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
