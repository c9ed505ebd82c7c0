"""Many crystals relaxed together: each by its own optimiser, the energies and forces of all in one call of the network.

Each crystal has a thread for its optimiser, on a calculator that asks here and waits. When all of them wait, what they
ask for goes to the worker processes in batches. A batch that raises, hangs or ends its process is asked for again in
halves, until what is to blame stands alone: it costs one crystal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from queue import SimpleQueue
from typing import Any

from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.pool import Failure, Pool, progress_bar
from unimat_jax.stability.engines import load
from unimat_jax.stability.relaxation import OnEngine, Relaxation, Relaxer, Stopped, reason_of, relax


@dataclasses.dataclass(frozen=True)
class Evaluator(OnEngine):
    """Many Atoms -> (the results of each, seconds, processor seconds), or a Failure."""

    def __call__(self, many: Sequence[Atoms]) -> tuple[list[dict[str, Any]], float, float] | Failure:
        begin, cpu = time.monotonic(), time.process_time()
        calculator: Any = load(self.model)
        try:
            results = calculator.calculate_batch(many)
        except Exception as error:
            return Failure(reason_of(error), f"{type(error).__name__}: {error}"[:500])
        return results, time.monotonic() - begin, time.process_time() - cpu


class _Asking(Calculator):
    """One crystal's calculator, in its thread. seconds, cpu_seconds: its share of the evaluations that it was in."""

    implemented_properties = ["energy", "free_energy", "forces", "stress", "magmoms"]  # noqa: RUF012

    def __init__(self, index: int, said: SimpleQueue[tuple[int, Atoms | Relaxation]]):
        super().__init__()
        self.index, self.said = index, said
        self.answers: SimpleQueue[dict[str, Any] | Failure] = SimpleQueue()
        self.seconds = self.cpu_seconds = 0.0

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        super().calculate(atoms, list(properties), list(system_changes))
        assert atoms is not None
        self.said.put((self.index, atoms.copy()))
        answer = self.answers.get()
        if isinstance(answer, Failure):
            raise Stopped(answer)
        self.results = {"free_energy": answer["energy"], **answer}

    def relax(self, crystal: Crystal, relaxer: Relaxer) -> None:
        """The life of the thread; its last word is a Relaxation."""
        found = relax(crystal, self, relaxer.protocol)
        own = time.thread_time()
        seconds, cpu = round(own + self.seconds, 3), round(own + self.cpu_seconds, 3)
        self.said.put((self.index, dataclasses.replace(found, seconds=seconds, cpu_seconds=cpu)))


class _Batches:
    """What crystals ask for, evaluated in batches that are as large as fits into memory."""

    def __init__(self, relaxer: Relaxer, pool: Pool):
        self.pool, self.size = pool, relaxer.batch_size
        self.evaluator = Evaluator(relaxer.model, memory_limit_gb=relaxer.memory_limit_gb)

    def answer(self, asked: Sequence[tuple[_Asking, Atoms]]) -> None:
        """Gives each its results, or the Failure that it met alone."""
        share = -(-len(asked) // max(1, self.pool.num_workers))
        waiting = _split(asked, min(share, self.size))
        while waiting:
            batches, waiting = waiting, []
            answers = self.pool.map(self.evaluator, [[atoms for _, atoms in batch] for batch in batches])
            for batch, found in zip(batches, answers, strict=True):
                if not isinstance(found, Failure):
                    results, seconds, cpu = found
                    for (asking, _), result in zip(batch, results, strict=True):
                        asking.seconds += seconds / len(batch)
                        asking.cpu_seconds += cpu / len(batch)
                        late = Failure("timeout", f"longer than {self.pool.timeout_s:g} s")
                        asking.answers.put(result if asking.seconds < self.pool.timeout_s else late)
                elif len(batch) == 1:
                    batch[0][0].answers.put(found)
                else:
                    half = (len(batch) + 1) // 2
                    if found.reason == "out_of_memory":
                        self.size = min(self.size, half)
                    waiting += _split(batch, half)


def _split(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def relax_together(
    crystals: Sequence[Crystal], relaxer: Relaxer, pool: Pool, *, progress: str = ""
) -> Generator[tuple[int, Relaxation]]:
    """(index of the crystal, its Relaxation) as soon as each is there: `relaxer.batch_size` crystals at a time for each
    worker of the pool, whose time limit is that of one evaluation and of each crystal's share of them."""
    batches = _Batches(relaxer, pool)
    said: SimpleQueue[Any] = SimpleQueue()
    running: dict[int, _Asking] = {}
    waiting = deque(enumerate(crystals))
    places = relaxer.batch_size * max(1, pool.num_workers)
    with progress_bar(len(crystals), progress) as bar, contextlib.ExitStack() as stack:
        stack.callback(_stop, running)
        while waiting or running:
            while waiting and len(running) < places:
                index, crystal = waiting.popleft()
                if refused := _attempt(relaxer.refusal, crystal):
                    bar.update()
                    yield index, refused
                    continue
                running[index] = _Asking(index, said)
                threading.Thread(target=running[index].relax, args=(crystal, relaxer), daemon=True).start()
            asked: dict[int, Atoms] = {}
            while len(asked) < len(running):
                index, words = said.get()
                if isinstance(words, Atoms):
                    asked[index] = words
                    continue
                del running[index]
                bar.update()
                yield index, _attempt(relaxer.finished, crystals[index], words)
            if asked:
                batches.answer([(running[index], asked[index]) for index in sorted(asked)])


def _attempt(step: Callable[..., Any], *args: Any) -> Any:
    """What the pool does for `Relaxer` as a whole: one crystal costs no other."""
    try:
        return step(*args)
    except Exception as error:
        return Relaxation("failed", "error", f"{type(error).__name__}: {error}")


def _stop(running: dict[int, _Asking]) -> None:
    """Lets the threads end, where what asked for the relaxations has left."""
    for asking in running.values():
        asking.answers.put(Failure("error", "stopped"))
