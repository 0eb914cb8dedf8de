"""Own one server and its temporary directory, and remove both as soon as the parent is gone.

embedded.py runs this file as a program, with only the standard library. A request is one line of JSON on
stdin, `[method, argument, ...]`, and its answer one line on stdout. EOF on stdin means that the parent is
gone, even after `kill -9`. This process creates the directory, and the server and initdb are its children, so
they always have an owner.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

PATIENCE = 30.0  # seconds for a server to obey a signal before a harsher one follows


class Keeper:
    """The public methods are the requests."""

    def __init__(self, directory: Path, account: dict[str, Any], last_signal: int) -> None:
        self._directory = directory
        self._account = account  # Popen's arguments that drop root, or none
        self._last_signal = last_signal
        self._server: subprocess.Popen[bytes] | None = None
        self.outlives_parent = False

    def run(self, command: list[str]) -> tuple[int, str]:
        """Run a command to the end; returns its exit status and output."""
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                cwd=self._directory,
                **self._account,
            )
        except OSError as error:
            return 126, str(error)
        return done.returncode, done.stdout

    def start(self, command: list[str]) -> int:
        """Start the server and return its pid."""
        with (self._directory / "log").open("ab") as log:
            self._server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                start_new_session=True,
                **self._account,
            )
        return self._server.pid

    def running(self) -> bool:
        return self._server is not None and self._server.poll() is None

    def stop(self, first_signal: int) -> None:
        """Stop the server; wait for it to exit."""
        for number in (first_signal, self._last_signal, signal.SIGKILL):
            if self._server is not None and self.running():
                self._server.send_signal(number)
                try:
                    self._server.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    continue

    def keep(self) -> None:
        """Outlive the parent; from now on SIGTERM to the pid in keeper.pid ends it."""
        (self._directory / "keeper.pid").write_text(f"{os.getpid()}\n")
        self.outlives_parent = True

    def close(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.stop(self._last_signal)
        deadline = time.monotonic() + PATIENCE
        while self._directory.exists() and time.monotonic() < deadline:
            # A child that is still writing can make the first attempt fail.
            shutil.rmtree(self._directory, ignore_errors=True)

    def wait(self) -> None:
        if self._server is not None:
            self._server.wait()


def requests(parent: int) -> Iterator[list[Any]]:
    """Requests until the parent is gone."""
    # A process that the parent forked may hold the pipe open, so look at the parent itself too.
    while os.getppid() == parent:
        if select.select([sys.stdin], [], [], 1.0)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            yield json.loads(line)


def main() -> None:
    parent = os.getppid()
    prefix, root, account, last_signal = json.loads(sys.argv[1])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
    keeper = Keeper(directory, account, last_signal)
    try:
        if account:
            os.chown(directory, account["user"], account["group"])
        print(json.dumps(str(directory)), flush=True)
        with suppress(BrokenPipeError):
            for method, *arguments in requests(parent):
                print(json.dumps(getattr(keeper, method)(*arguments)), flush=True)
        if keeper.outlives_parent:
            keeper.wait()
    finally:
        keeper.close()


if __name__ == "__main__":
    main()
