"""Processes in which each item fails alone: an exception, a hang or a crash costs that item, not its neighbours.

An item that takes too long is first stopped by an alarm inside of its process; where that is not heard, as in C code,
the parent kills the process and starts another. The items that the lost process had not begun are done by others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from unimat_jax.errors import UserError

if TYPE_CHECKING:
    from tqdm import tqdm

GRACE_S = 2.0
"""Seconds after the time limit at which a process that did not hear its alarm is killed."""
_CHUNK = 16
"""Items sent together at most: a message costs some 50 microseconds."""
_FAILED_STARTS = 3
"""Processes in a row that end before their first item, after which the pool gives up."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """In the place of a result. reason: `timeout`, `worker_died`, the `reason` of the exception, or `error`."""

    reason: str
    message: str = ""


class _TimedOut(BaseException):
    """Raised by the alarm; no Exception, so that a function that handles those does not take it for its own."""


def map_isolated(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    *,
    num_workers: int | None = None,
    timeout_s: float,
    progress: str = "",
    unit: str = "structure",
) -> Iterator[Any]:
    """function(item) of each item, or a Failure, in the order of the items and as they come.

    function must be one of a module (it is sent by name), items and results must pickle. num_workers: processes, all
    cores by default; 0: this process, where an item that crashes or hangs in C code does so for all. timeout_s: for
    each item. progress: the name of the bar, which counts failures; "": no bar. Raises UserError if no process starts.
    """
    with Pool(num_workers, timeout_s=timeout_s) as pool:
        yield from pool.map(function, items, progress=progress, unit=unit)


class Pool:
    """`map_isolated` for several maps with the same processes; they start when first needed (some seconds each)."""

    def __init__(self, num_workers: int | None = None, *, timeout_s: float):
        if num_workers is not None and num_workers < 0:
            raise UserError(f"num_workers = {num_workers}: give the number of processes, or 0 for this one")
        self.num_workers = available_cores() if num_workers is None else num_workers
        self.timeout_s = timeout_s
        self._workers: list[_Worker] = []
        self._failed_starts = 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers = []

    def map(
        self, function: Callable[[Any], Any], items: Iterable[Any], *, progress: str = "", unit: str = "structure"
    ) -> Iterator[Any]:
        """As `map_isolated`. One map at a time."""
        done: dict[int, Any] = {}
        position = 0
        with contextlib.closing(self.as_completed(function, items, progress=progress, unit=unit)) as results:
            for index, result in results:
                done[index] = result
                while position in done:
                    yield done.pop(position)
                    position += 1

    def as_completed(
        self, function: Callable[[Any], Any], items: Iterable[Any], *, progress: str = "", unit: str = "structure"
    ) -> Generator[tuple[int, Any]]:
        """(index of the item, result or Failure) as soon as each is there, whatever the order."""
        items = list(items)
        failures = 0
        with (
            progress_bar(len(items), progress, unit) as bar,
            contextlib.closing(self._results(function, items)) as results,
        ):
            for index, result in results:
                failures += isinstance(result, Failure)
                if failures:
                    bar.set_postfix(failed=failures, refresh=False)
                bar.update()
                yield index, result

    def _results(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Generator[tuple[int, Any]]:
        """(index, result) as they come."""
        if self.num_workers == 0:
            with _alarm_handler():
                for index, item in enumerate(items):
                    yield index, _attempt(function, item, self.timeout_s)
            return
        waiting = deque(range(len(items)))
        try:
            while waiting or any(worker.indices for worker in self._workers):
                self._hand_out(function, items, waiting)
                for worker in self._ready():
                    yield from worker.receive()
                for worker in list(self._workers):
                    yield from self._bury(worker, waiting)
        finally:  # also where the caller leaves early: what is still at work must not answer the next map
            for worker in [worker for worker in self._workers if worker.indices]:
                self._workers.remove(worker)
                worker.stop()

    def _hand_out(self, function: Callable[[Any], Any], items: Sequence[Any], waiting: deque[int]) -> None:
        self._workers = [worker for worker in self._workers if worker.indices or worker.process.is_alive()]
        wanted = min(self.num_workers, len(waiting) + sum(bool(worker.indices) for worker in self._workers))
        self._workers += [_Worker(self.timeout_s) for _ in range(wanted - len(self._workers))]
        for worker in self._workers:
            if waiting and not worker.indices:
                size = max(1, min(_CHUNK, len(waiting) // (4 * self.num_workers)))
                indices = [waiting.popleft() for _ in range(min(size, len(waiting)))]
                worker.send(function, indices, [items[index] for index in indices])

    def _ready(self) -> list[_Worker]:
        """The workers that have something to say, or end; waits for one until the first time limit."""
        busy = [worker for worker in self._workers if worker.indices]
        limit = min(worker.deadline for worker in busy) - time.monotonic()
        watched = [w.connection for w in busy] + [w.process.sentinel for w in busy]
        heard = set(wait(watched, timeout=min(max(0.0, limit), 60.0)))
        return [worker for worker in busy if worker.connection in heard or worker.process.sentinel in heard]

    def _bury(self, worker: _Worker, waiting: deque[int]) -> Iterator[tuple[int, Failure]]:
        """Takes a worker that died or hangs out of the pool, with a Failure for the item that it was at."""
        if worker.alive and time.monotonic() < worker.deadline:
            self._failed_starts = 0 if worker.started else self._failed_starts
            return
        died = not worker.alive
        self._workers.remove(worker)
        worker.stop()
        if not worker.started:
            self._failed_starts += 1
            if self._failed_starts >= _FAILED_STARTS:
                raise UserError(
                    f"{_FAILED_STARTS} worker processes ended before their first item (exit code "
                    f"{worker.process.exitcode}): run from a file, with its code under `if __name__ == '__main__':`, "
                    "or in this process with num_workers=0"
                )
        elif worker.indices:
            message = f"exit code {worker.process.exitcode}" if died else f"longer than {self.timeout_s:g} s, killed"
            yield worker.indices.popleft(), Failure("worker_died" if died else "timeout", message)
        waiting.extendleft(reversed(worker.indices))


class _Worker:
    """A process of the pool, seen from the parent. indices: of the items not yet answered, the first is at work."""

    def __init__(self, timeout_s: float):
        context = multiprocessing.get_context("spawn")  # not fork: the caller may hold threads, as jax does
        self.connection, remote = context.Pipe()
        self.process = context.Process(target=_work, args=(remote, timeout_s), daemon=True)
        self.process.start()
        remote.close()  # else its end would not be heard
        self.indices: deque[int] = deque()
        self.started = False
        self.alive = True
        self._limit = timeout_s + GRACE_S
        self.deadline = float("inf")

    def send(self, function: Callable[[Any], Any], indices: Sequence[int], items: Sequence[Any]) -> None:
        self.indices.extend(indices)
        with contextlib.suppress(OSError):  # dead: `receive` will tell
            self.connection.send((function, items))
        self._restart_clock()

    def receive(self) -> Iterator[tuple[int, Any]]:
        """The answers that have come."""
        try:
            while self.connection.poll():
                message = self.connection.recv()
                if self.started:
                    yield self.indices.popleft(), message
                self.started = True
                self._restart_clock()
        except (EOFError, OSError):
            self.alive = False
        self.alive = self.alive and self.process.exitcode is None

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def _restart_clock(self) -> None:
        if self.started:  # starting Python and importing the function takes as long as it takes
            self.deadline = time.monotonic() + self._limit if self.indices else float("inf")


def _work(connection: Connection, timeout_s: float) -> None:
    """The life of a worker process: chunks of items in, one result after the other out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    with _alarm_handler(), contextlib.suppress(EOFError, BrokenPipeError):
        started = False
        while True:
            function, items = connection.recv()
            if not started:  # now that the function is imported too, the clock of its first item may run
                connection.send("started")
                started = True
            for item in items:
                result = _attempt(function, item, timeout_s)
                try:
                    connection.send(result)
                except (TypeError, ValueError, AttributeError) as error:  # what pickle raises
                    connection.send(Failure("error", f"the result cannot be sent: {error}"))


@contextlib.contextmanager
def _alarm_handler() -> Iterator[None]:
    if not _can_alarm():
        yield
        return

    def ring(*_: object) -> None:
        raise _TimedOut

    before = signal.signal(signal.SIGALRM, ring)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


def _can_alarm() -> bool:
    """Not on Windows, nor outside of the main thread: there only the parent watches the time."""
    return hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()


def _attempt(function: Callable[[Any], Any], item: Any, timeout_s: float) -> Any:
    """function(item), or the Failure that it ended with."""
    alarm = _can_alarm()
    try:
        try:
            if alarm:
                signal.setitimer(signal.ITIMER_REAL, timeout_s)
            return function(item)
        finally:
            if alarm:
                signal.setitimer(signal.ITIMER_REAL, 0)
    except _TimedOut:
        return Failure("timeout", f"longer than {timeout_s:g} s")
    except Exception as error:
        return Failure(str(getattr(error, "reason", "") or "error"), f"{type(error).__name__}: {error}")


def progress_bar(total: int, name: str, unit: str = "structure") -> tqdm:
    """A bar on standard error with rate and time left; none where the name is empty."""
    from tqdm import tqdm

    return tqdm(total=total, desc=name, unit=unit, disable=not name, file=sys.stderr)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
