"""Many crystals relaxed: over all cores, each within a time limit, and each written down as soon as it is done."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluation.fingerprint_pool import content_key
from unimat_jax.evaluation.pool import Failure, Pool
from unimat_jax.stability.relaxation import Probe, Relaxation, Relaxer

PASSING = ("timeout", "out_of_memory", "worker_died")


class Journal:
    """Relaxations by key in a file of JSON lines, only ever added to: what a killed run finished is there.

    retry: those that may be the machine's fault (PASSING) do not count as finished. Raises UserError for another file.
    """

    def __init__(self, path: Path, *, retry: bool = False):
        self.path = path
        self.relaxations: dict[str, Relaxation] = {}
        self._torn = False
        if not path.is_file():
            return
        with path.open(encoding="utf-8") as file:
            for line in file:
                self._torn = not line.endswith("\n")
                try:
                    values = json.loads(line)
                except ValueError:
                    text = "a line was cut off by a kill; its crystal is relaxed again"
                    print(f"{path}: {text}", file=sys.stderr)
                    continue
                try:
                    key = values.pop("key")
                    found = Relaxation(**values)
                except (TypeError, KeyError, AttributeError) as error:
                    raise UserError(
                        f"{path} was written by another version ({error}): begin anew with --overwrite"
                    ) from error
                if retry and (found.reason or found.status) in PASSING:
                    self.relaxations.pop(key, None)
                else:
                    self.relaxations[key] = found

    def add(self, key: str, relaxation: Relaxation) -> None:
        line = json.dumps({"key": key, **dataclasses.asdict(relaxation)})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if self._torn else "") + line + "\n")
        self._torn = False
        self.relaxations[key] = relaxation


def key_of(crystal: Crystal, relaxer: Relaxer) -> str:
    """Names what is relaxed and how: the same crystal under the same model and protocol is done once."""
    protocol = [relaxer.protocol.text, dataclasses.asdict(relaxer.protocol)]
    how = json.dumps([relaxer.model.identity, *protocol, relaxer.with_correction])
    return hashlib.sha256(content_key(crystal) + how.encode()).hexdigest()[:32]


def relax_all(
    crystals: Sequence[Crystal],
    relaxer: Relaxer,
    journal: Journal,
    *,
    timeout_s: float,
    num_workers: int | None = None,
    progress: str = "relaxing",
) -> list[Relaxation]:
    """One Relaxation a crystal, in order; those in the journal are taken from it, and new ones are added.

    timeout_s: for one crystal. num_workers: processes, all cores by default; 0: this one, which a crash then ends.
    Raises UserError where the engine cannot be loaded.
    """
    keys = [key_of(crystal, relaxer) for crystal in crystals]
    todo = {key: crystal for key, crystal in zip(keys, crystals, strict=True) if key not in journal.relaxations}
    if todo:
        if progress and len(todo) < len(keys):
            print(f"{len(keys) - len(todo)} of {len(keys)} are done or repeated", file=sys.stderr)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")  # one thread for each process: the workers inherit this
        with Pool(num_workers, timeout_s=timeout_s) as pool:
            problem = next(pool.map(Probe(relaxer.model, batches=relaxer.batch_size > 1), [None]))
            if problem:
                raise UserError(problem.message if isinstance(problem, Failure) else problem)
            journal.path.parent.mkdir(parents=True, exist_ok=True)
            journal.path.touch()  # by which --resume knows a run that was killed at its first crystal
            names, waiting = list(todo), list(todo.values())
            if relaxer.batch_size > 1:
                from unimat_jax.stability.batched import relax_together

                results = relax_together(waiting, relaxer, pool, progress=progress)
            else:
                results = pool.as_completed(relaxer, waiting, progress=progress)
            with contextlib.closing(results):
                for index, found in results:
                    journal.add(names[index], Relaxation.of_failure(found) if isinstance(found, Failure) else found)
    return [journal.relaxations[key] for key in keys]
