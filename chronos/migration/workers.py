"""Several connections work through a list, each taking the next item when it finishes one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from sqlalchemy.engine import Connection, Engine

from chronos.db import opened
from chronos.migration.operator import StopRequestedError

T = TypeVar("T")
CheckStop = Callable[[], None]


def work_through(
    engine: Engine,
    items: Iterable[T],
    workers: int,
    work: Callable[[Connection, T, CheckStop], None],
    check_stop: CheckStop,
) -> None:
    """Run ``work`` on every item, in order, ``workers`` at a time, each over a connection of its own.

    ``work`` gets a ``check_stop`` that also raises when another worker has failed. The first failure stops
    every worker at its next check, and is raised when all have stopped.
    """
    queue = list(items)
    turn = threading.Lock()
    failed = threading.Event()

    def look() -> None:
        if failed.is_set():
            raise StopRequestedError
        check_stop()

    def run() -> None:
        try:
            with opened(engine) as conn:
                while not failed.is_set():
                    with turn:
                        if not queue:
                            return
                        item = queue.pop(0)
                    work(conn, item, look)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="chronos") as pool:
        futures = [pool.submit(run) for _ in range(max(1, workers))]
        try:
            wait(futures)
        except BaseException:  # Ctrl-C, if the program leaves it to Python: no worker may go on
            failed.set()
            raise
    # All have ended. The first real error is why the others stopped.
    errors = [error for future in futures if (error := future.exception())]
    errors.sort(key=lambda error: isinstance(error, StopRequestedError))
    if errors:
        raise errors[0]
