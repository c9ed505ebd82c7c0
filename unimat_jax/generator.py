"""A checkpoint -> crystals in Python: `Generator`. The program that writes files is `generate.py`.

>>> from unimat_jax import Generator
>>> samples = Generator("runs/perov_5").generate(8, formula="SrTiO3", seed=0)
>>> structures = [sample.crystal.to_pymatgen() for sample in samples if sample.crystal]
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from unimat_jax import assembly, compilation_cache, sharding
from unimat_jax.checkpoint import load_params, read_run
from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.periodic_table import SYMBOLS
from unimat_jax.representation import DecodeFailure, UniMatSpec, count_slots_at_null, decode
from unimat_jax.requests import (
    Request,
    count_table,
    counts_of_table,
    element_requests,
    formula_requests,
    parse_range,
)
from unimat_jax.train_step import COMPOSITION

SORTED_BATCHES = 8
"""Batches that are sorted by size together, and told together."""
AHEAD = 2
"""Batches that the devices work at while the host decodes, checks and writes what is done."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One generated crystal or the reason why there is none.

    status: "ok"; "slot_at_null" (an asked atom went to the null place; the crystal has it where it went) or
    "element_missing" (of a chemical system), both with a crystal; or a failure of `representation.decode` without one.
    """

    uid: str
    index: int
    status: str
    message: str
    request: Request
    crystal: Crystal | None


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """How to sample; `Generator.settings` takes the checkpoint's config.sample. The defaults are what versions did that
    had no such field: checkpoints and runs of theirs lack it."""

    num_steps: int
    method: str
    log_variance_interpolation: float
    guidance_weight: float
    batch_size: int
    time_power: float = 1.0
    mean_below: float = 0.2
    noise_below: float = 0.0
    corrector_steps: int = 0
    corrector_below: float = 1.0
    closest_ratio: float = 0.0
    composition_min_p: float = 0.0

    def __post_init__(self):
        if self.num_steps < 1 or self.batch_size < 1:
            raise UserError(f"num_steps = {self.num_steps}, batch_size = {self.batch_size}: both must be above 0")
        if self.time_power <= 0:
            raise UserError(f"time_power = {self.time_power}: give a number above 0")
        if not 0 <= self.composition_min_p < 1:
            raise UserError(f"composition_min_p = {self.composition_min_p}: give a share, from 0 to below 1")

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Of the fields that have one."""
        return {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}


def _ahead(items: Iterable[Any]) -> Iterator[Any]:
    """The same items, AHEAD of them made before the first is handed out."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > AHEAD:
            yield waiting.popleft()
    yield from waiting


class Generator:
    """Samples from a training run's checkpoint, an exported model or a released one. Holds parameters and a jitted
    sampler, and no other state.

    checkpoint: a directory, or the name of a released model (see `unimat_jax.released`); step: a checkpoint's step, the
    latest by default; ema: averaged parameters (default) or raw ones. Raises UserError where there is no checkpoint, or
    it lacks that step or those parameters.
    """

    def __init__(self, checkpoint: str | Path, *, step: int | None = None, ema: bool = True):
        self.directory, self.config, self.description = read_run(checkpoint)
        self.spec = UniMatSpec.from_json(self.description["spec"])
        self.condition_schema: list[dict[str, Any]] = self.description["condition_schema"]
        model = self.description["model"]
        network = assembly.create_network(model)
        self._objective = assembly.create_objective(model, self.description["diffusion"], self.spec)
        known = len(self.condition_schema)
        self.composition = assembly.create_composition(self.description.get("composition", {}), self.spec, known)
        self._mesh = sharding.make_mesh()
        # Compiled programs are run: not from where the config of a model that somebody shared says.
        own = "export" not in self.description
        compilation_cache.enable(self.config["train"].get("compilation_cache", "auto") if own else "auto")
        arguments = assembly.init_arguments(self.spec, len(self.condition_schema), model["name"])
        shapes = jax.eval_shape(lambda: assembly.init_params(jax.random.key(0), network, arguments, self.composition))
        everywhere = sharding.replicated(self._mesh)
        like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=everywhere), shapes)
        self.params, self.step, self.params_hash = load_params(self.directory, like, step=step, ema=ema)
        self.ema = ema

    def settings(self, **changes: Any) -> SamplerSettings:
        """The checkpoint's sampler settings with `changes`, where they are not None."""
        settings = SamplerSettings(**{**self.config["sample"], **{k: v for k, v in changes.items() if v is not None}})
        self._objective.check_sampler(dataclasses.asdict(settings))
        return settings

    def requests(
        self,
        num_samples: int,
        *,
        formula: str | Sequence[str] | None = None,
        num_formula_units: str = "1",
        chemical_system: str | None = None,
        elements: str | None = None,
        contains: str | None = None,
        num_atoms: str | None = None,
        seed: int = 0,
    ) -> list[Request]:
        """One request a sample. Raises UserError for what the model cannot hold, and for two compositions at once."""
        texts = {"chemical_system": chemical_system, "elements": elements, "contains": contains}
        given = [name for name, value in {"formula": formula, **texts}.items() if value is not None]
        if len(given) > 1:
            raise UserError(f"--{given[0]} and --{given[1]} together: give one of them")
        if num_samples < 1:
            raise UserError(f"--num_samples={num_samples}: give a number above 0")
        if formula is None and num_formula_units != "1":
            raise UserError(f"--num_formula_units={num_formula_units}: units of which --formula?")
        if formula is not None:
            if num_atoms is not None:
                raise UserError(
                    f"--formula and --num_atoms={num_atoms} together: give --num_formula_units in its place"
                )
            formulas = [f.strip() for f in formula.split(",")] if isinstance(formula, str) else list(formula)
            units = parse_range(num_formula_units, "num_formula_units")
            return formula_requests(formulas, units, num_samples, seed, self.spec)
        sizes = None if num_atoms is None else parse_range(num_atoms, "num_atoms")
        requests = [Request("none", num_atoms=sizes)] * num_samples
        for kind, text in texts.items():
            if text is not None:
                requests = element_requests(kind, text, num_samples, self.spec, sizes)
        if self.composition is None:  # what the model cannot be asked ends here
            self._objective.conditions(requests[:1], *self.properties({}))
        else:
            self.composition.conditions(requests[:1])
        return requests

    def properties(self, condition: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
        """Standardised values [P] and flags [P] of a condition. Raises UserError for an unknown name."""
        names = [p["name"] for p in self.condition_schema]
        unknown = sorted(set(condition) - set(names))
        if unknown:
            raise UserError(f"--condition={unknown[0]}=...: the checkpoint knows {names or 'no properties'}")
        values = [(condition.get(p["name"], p["mean"]) - p["mean"]) / p["std"] for p in self.condition_schema]
        return np.array(values, np.float32), np.array([name in condition for name in names], np.float32)

    def never_seen(self, requests: Sequence[Request]) -> Counter[str]:
        """Elements that requests name and no training crystal has, though the table has a place for them: how many
        requests name each. Empty for runs that did not record their training set's elements."""
        seen = self.description["dataset"].get("elements") or dict.fromkeys(SYMBOLS, 1)
        named = Counter(SYMBOLS[z] for request in requests for z in {*request.counts, *request.elements})
        return Counter({symbol: number for symbol, number in named.items() if not seen.get(symbol)})

    def generate(
        self, num_samples: int, *, condition: Mapping[str, float] | None = None, seed: int = 0, **options: Any
    ) -> list[Sample]:
        """`num_samples` samples; options of `requests` (formula="SrTiO3") and of `settings` (num_steps=50)."""
        names = {f.name for f in dataclasses.fields(SamplerSettings)}
        settings = self.settings(**{k: v for k, v in options.items() if k in names})
        requests = self.requests(num_samples, seed=seed, **{k: v for k, v in options.items() if k not in names})
        return [s for batch in self.sample(requests, settings, condition or {}, seed=seed) for s in batch]

    def sample(
        self,
        requests: Sequence[Request],
        settings: SamplerSettings,
        condition: Mapping[str, float],
        *,
        seed: int,
        start: int = 0,
        arrived: Callable[[int], object] = lambda number: None,
    ) -> Iterator[list[Sample]]:
        """Batches of samples start, start + 1, ... of the requests. Sample i depends on seed, i and its request; to the
        last bit also on its place in its batch, so that a batch that was begun is sampled whole again. Where
        the cost follows a batch's largest crystal, SORTED_BATCHES at a time share out their requests by size.

        Where the checkpoint has a model of compositions, it decides first what requests without an exact one become.

        arrived: told how many samples of the batches to come are made, as they are.
        """
        if start >= len(requests):
            return
        size = min(settings.batch_size, len(requests))
        size += -size % self._mesh.size
        properties = self.properties(condition)
        run = functools.partial(self._begun, self._sampler(settings, size), properties, seed)
        window = size * (SORTED_BATCHES if self._objective.padded else 1)

        def begun(first: int) -> Iterator[tuple[Callable[[], list[Sample]], bool]]:
            """The batches of the window from sample `first` on, each as it is begun, and whether it is the last."""
            last = min(first + window, len(requests))
            indices = np.arange(first, last + (first - last) % size, dtype=np.int32)
            asked = [requests[min(i, len(requests) - 1)] for i in indices.tolist()]
            parts = [slice(i, i + size) for i in range(0, len(asked), size)]
            asked = [
                request
                for part in parts
                for request in self._composed(asked[part], indices[part], properties, seed, settings.composition_min_p)
            ]
            order = list(range(len(asked)))
            if self._objective.padded:
                order.sort(key=lambda i: sum(asked[i].counts.values()))
            for part in parts:
                chosen = order[part]
                yield run([asked[i] for i in chosen], indices[np.array(chosen)]), part is parts[-1]

        found: dict[int, Sample] = {}
        windows = range(start - start % window, len(requests), window)
        for samples, ends in _ahead(batch for first in windows for batch in begun(first)):
            new = {sample.index: sample for sample in samples() if start <= sample.index < len(requests)}
            arrived(len(new))
            found |= new
            if ends:
                for _, batch in itertools.groupby(sorted(found), lambda index: index // size):
                    yield [found[index] for index in batch]
                found = {}

    def _begun(
        self, run: Any, properties: Any, seed: int, requests: Sequence[Request], indices: np.ndarray
    ) -> Callable[[], list[Sample]]:
        """One batch, which the devices work at; its samples when called. properties: values and flags."""
        arrays = self._objective.conditions(requests, *properties) | {"indices": indices}
        placed = sharding.whole_to_devices(arrays, sharding.batch_sharding(self._mesh))
        there = run(self.params, jax.random.fold_in(jax.random.key(seed), 1), placed)

        def samples() -> list[Sample]:
            x, lattice = (sharding.to_host(a) for a in there)
            return [self._sample_of(int(i), requests[n], x[n], lattice[n]) for n, i in enumerate(indices)]

        return samples

    def _composed(
        self, requests: list[Request], indices: np.ndarray, properties: Any, seed: int, min_p: float
    ) -> list[Request]:
        """The requests with exact counts, where the checkpoint has a model of compositions."""
        if self.composition is None or all(request.counts for request in requests):
            return requests
        arrays = self.composition.conditions(requests, *properties) | {"indices": indices}
        placed = sharding.whole_to_devices(arrays, sharding.batch_sharding(self._mesh))
        program = self._composition_program(all(request.kind == "none" for request in requests), min_p)
        key = jax.random.fold_in(jax.random.key(seed), 2)
        tables = sharding.to_host(program(self.params[COMPOSITION], key, placed))
        return [
            request if request.counts else dataclasses.replace(request, counts=counts_of_table(table, self.spec))
            for request, table in zip(requests, tables, strict=True)
        ]

    @functools.lru_cache(maxsize=2)  # noqa: B019 - as below
    def _composition_program(self, free: bool, min_p: float) -> Any:
        settings = {"proposals": 1} if free else {}
        assert self.composition is not None
        return assembly.composition_program(self.composition, self._mesh, min_p=min_p, **settings)

    @functools.lru_cache(maxsize=4)  # noqa: B019 - a generator lives as long as its compiled samplers
    def _sampler(self, settings: SamplerSettings, size: int) -> Any:
        return assembly.sampler_program(
            self._objective, self._mesh, **{**dataclasses.asdict(settings), "batch_size": size}
        )

    def _sample_of(self, index: int, request: Request, x: np.ndarray, lattice: np.ndarray) -> Sample:
        uid = f"gen_{index:06d}"
        counts = count_table(request, self.spec) if request.counts else None
        decoded = decode(x, lattice, self.spec, counts=counts, uid=uid)
        if isinstance(decoded, DecodeFailure):
            return Sample(uid, index, decoded.reason, decoded.message, request, None)
        status, message = "ok", ""
        if counts is not None and (lost := count_slots_at_null(x, counts)):
            status, message = "slot_at_null", f"{lost} of the asked atoms went to the null place"
        missing = set(request.elements) - set(decoded.atomic_numbers.tolist())
        if request.kind == "chemical_system" and missing:
            status, message = "element_missing", f"no {', '.join(SYMBOLS[z] for z in sorted(missing))}"
        return Sample(uid, index, status, message, request, decoded)
