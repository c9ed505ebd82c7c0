"""Parsing in parallel: raw structures -> outcomes (a UniMat record, or the reason why there is none), in order.

A parse that crashes or hangs its process costs that one structure, not the run.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from multiprocessing import connection

import numpy as np

from data_prep.outcome import Outcome
from unimat_jax.crystal import CrystalError
from unimat_jax.representation import encode
from unimat_jax.structure_files import RawStructure, parse

CHUNK_SIZE = 32
SEND_EVERY = 0.1
"""Seconds after which a worker sends what it has; a message for each structure would cost as much as many a parse."""
START_LIMIT = 180.0
"""Seconds that a worker may take to start; a structure's own limit counts from then."""


@dataclasses.dataclass(frozen=True)
class CellOptions:
    """Which cell a crystal is given in. Tolerances in Angstrom, as spglib's `symprec` and `eps`."""

    primitive: bool = False
    niggli: bool = True
    primitive_tolerance: float = 0.01
    niggli_tolerance: float = 1e-5


Item = tuple[str, RawStructure]
"""(split or "", structure)."""


def prepare_one(item: Item, cell: CellOptions) -> Outcome:
    """Parses, brings into the asked cell and encodes one structure; every failure becomes an Outcome with a reason."""
    split, raw = item
    try:
        crystal, changes = parse(raw)
        if cell.primitive:
            found = crystal.primitive(cell.primitive_tolerance)
            if found.num_atoms != crystal.num_atoms:
                changes["made_primitive"] = 1
                crystal = found
        if cell.niggli:
            found = crystal.niggli(cell.niggli_tolerance)
            if not _same_cell(crystal.lattice, found.lattice):  # a cell that is reduced already keeps axes and origin
                changes["niggli_reduced"] = 1
                crystal = found
        record = encode(crystal)
    except CrystalError as error:
        return Outcome(split, raw.uid, raw.origin, error.reason, str(error))
    except Exception as error:  # one structure never ends a run
        message = f"{raw.origin}: {type(error).__name__}: {error}"
        return Outcome(split, raw.uid, raw.origin, "internal_error", message)
    return Outcome(split, raw.uid, raw.origin, "", "", record, raw.properties, raw.texts, tuple(sorted(changes)))


def _same_cell(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two lattices [3, 3] have the same lengths and angles, in this order, to 1e-5 relative."""
    metric = a @ a.T
    scale = np.sqrt(np.outer(np.diag(metric), np.diag(metric)))
    return bool((np.abs(b @ b.T - metric) < 1e-5 * scale).all())


def parse_all(
    items: Iterable[Item], cell: CellOptions, *, num_workers: int, time_limit: float = 60.0
) -> Iterator[bytes]:
    """One outcome per item (`Outcome.to_bytes`), in the items' order whatever the number of workers.

    num_workers 0 parses in this process, without protection from crashes and hangs; time_limit: seconds a structure.
    """
    if num_workers == 0:
        for item in items:
            yield prepare_one(item, cell).to_bytes()
        return
    yield from _Pool(items, cell, num_workers, time_limit).run()


class _Worker:
    def __init__(self, cell: CellOptions):
        # "spawn", since a fork of a process with threads (jax, grain) can deadlock.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, cell), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False
        self.chunk_index = -1
        self.items: list[Item] = []
        self.outcomes: list[bytes] = []
        self.one_by_one = False
        self.deadline = time.monotonic() + START_LIMIT

    @property
    def busy(self) -> bool:
        return len(self.outcomes) < len(self.items)

    def send(self, time_limit: float) -> None:
        self.deadline = time.monotonic() + time_limit
        self.pipe.send((self.items[len(self.outcomes) :], self.one_by_one))

    def stop(self) -> None:
        self.pipe.close()
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


class _Pool:
    def __init__(self, items: Iterable[Item], cell: CellOptions, num_workers: int, time_limit: float):
        self.items = iter(items)
        self.cell = cell
        self.time_limit = time_limit
        self.next_chunk = 0
        self.max_ahead = 8 * num_workers
        self.done: dict[int, list[bytes]] = {}
        self.workers = [_Worker(cell) for _ in range(num_workers)]

    def run(self) -> Iterator[bytes]:
        emitted = 0
        try:
            while True:
                for worker in self.workers:
                    if worker.ready and not worker.busy and self.next_chunk < emitted + self.max_ahead:
                        self._assign(worker)
                busy = [w for w in self.workers if w.busy or not w.ready]
                if not any(w.busy for w in self.workers) and all(w.ready for w in self.workers) and not self.done:
                    return
                now = time.monotonic()
                wait = max(0.0, min((w.deadline for w in busy), default=now) - now)
                ready = set(connection.wait([w.pipe for w in busy], wait)) if busy else set()
                for index, worker in enumerate(self.workers):
                    if worker.pipe in ready:
                        self._receive(index)
                    elif (worker.busy or not worker.ready) and time.monotonic() > worker.deadline:
                        self._replace(index, "timeout", f"no result within {self.time_limit:g} s: it was given up")
                while emitted in self.done:
                    yield from self.done.pop(emitted)
                    emitted += 1
        finally:
            for worker in self.workers:
                worker.stop()

    def _assign(self, worker: _Worker) -> None:
        chunk = [item for _, item in zip(range(CHUNK_SIZE), self.items, strict=False)]
        if not chunk:
            return
        worker.chunk_index, worker.items, worker.outcomes = self.next_chunk, chunk, []
        worker.one_by_one = False
        self.next_chunk += 1
        self._send(worker)

    def _send(self, worker: _Worker) -> None:
        try:
            worker.send(self.time_limit)
        except OSError:  # it died just now: the next wait sees the closed pipe
            return

    def _receive(self, index: int) -> None:
        worker = self.workers[index]
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            self._replace(index, "crashed", "reading it crashed the process")
            return
        if not worker.ready:
            worker.ready = True
            if worker.items:
                self._send(worker)
            return
        worker.outcomes += message
        worker.deadline = time.monotonic() + self.time_limit
        self._finish(worker)

    def _finish(self, worker: _Worker) -> None:
        if not worker.busy:
            self.done[worker.chunk_index] = worker.outcomes
            worker.items, worker.outcomes = [], []

    def _replace(self, index: int, reason: str, message: str) -> None:
        """A new worker goes on after the structure that the old one did not survive. Which one that was is known only
        where outcomes come one by one: else the new worker does so with what is left of the chunk."""
        old = self.workers[index]
        old.stop()
        if not old.ready:
            raise WorkersDoNotStart
        new = _Worker(self.cell)
        new.chunk_index, new.items, new.outcomes = old.chunk_index, old.items, old.outcomes
        new.one_by_one = True
        if old.busy and (old.one_by_one or len(old.items) - len(old.outcomes) == 1):
            split, raw = old.items[len(old.outcomes)]
            outcome = Outcome(split, raw.uid, raw.origin, reason, f"{raw.origin}: {message}")
            new.outcomes.append(outcome.to_bytes())
            self._finish(new)
        self.workers[index] = new


class WorkersDoNotStart(RuntimeError):
    """A script without `if __name__ == "__main__":` cannot be imported by its workers."""


def _serve(pipe: connection.Connection, cell: CellOptions) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    import spglib  # noqa: F401  what takes long to import is imported before "ready"
    from pymatgen.io.cif import CifParser  # noqa: F401

    try:
        pipe.send("ready")
        while True:
            items, one_by_one = pipe.recv()
            ready, since = [], time.monotonic()
            for number, item in enumerate(items, 1):
                ready.append(prepare_one(item, cell).to_bytes())
                now = time.monotonic()
                if one_by_one or number == len(items) or now - since > SEND_EVERY:
                    pipe.send(ready)
                    ready, since = [], now
    except (EOFError, OSError):  # the parent is gone
        sys.exit(0)
