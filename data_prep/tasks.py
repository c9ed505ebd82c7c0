"""The same function for many parts or shards, in parallel processes: each call writes its own file, and a file that is
there is not made again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

Task = tuple[Path, Any]
"""The file that shows that the task is done, and what the function is told."""


class Workers:
    """`num_workers` processes that hold `work`, started when there is more than one task to do."""

    def __init__(self, work: Any, num_workers: int, quiet: bool):
        self._work, self._num_workers, self._quiet = work, num_workers, quiet
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def run(self, function: Callable[..., None], tasks: Iterable[Task], *settings: Any, description: str) -> None:
        """function(work, told, *settings) for each task that is not done. An exception in one ends all."""
        tasks = list(tasks)
        open_tasks = [task for task in tasks if not task[0].exists()]
        done = len(tasks) - len(open_tasks)
        with progress_bar(description, "part", len(tasks), done, self._quiet, leave=False) as bar:
            if self._num_workers > 1 and len(open_tasks) > 1:
                try:
                    for future in as_completed(self._submit(function, open_tasks, settings)):
                        future.result()
                        bar.update()
                    return
                except BrokenProcessPool:
                    print("going on in one process, as the others died", file=sys.stderr)
                    self._num_workers = 0
            for file, told in open_tasks:
                if not file.exists():
                    function(self._work, told, *settings)
                    bar.update()

    def _submit(
        self, function: Callable[..., None], tasks: list[Task], settings: tuple[Any, ...]
    ) -> list[Future[None]]:
        if self._pool is None:
            # "spawn", since a fork of a process with threads (jax, grain) can deadlock.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self._num_workers, mp_context=context, initializer=_start, initargs=(self._work,)
            )
        return [self._pool.submit(_call, function, told, settings) for _, told in tasks]


def progress_bar(description: str, unit: str, total: int | None, done: int, quiet: bool, leave: bool = True) -> tqdm:
    interval = 0.2 if sys.stderr.isatty() else 10.0  # a log file wants few lines
    settings: dict[str, Any] = {"unit": unit, "file": sys.stderr, "mininterval": interval, "disable": quiet}
    return tqdm(desc=description, total=total, initial=done, leave=leave, **settings)


_held: Any = None


def _start(work: Any) -> None:
    global _held
    _held = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's worker would wait for ever for a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _call(function: Callable[..., None], told: Any, settings: tuple[Any, ...]) -> None:
    function(_held, told, *settings)
