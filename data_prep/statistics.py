"""Statistics of the train split, gathered one record at a time: what a model needs to know before it sees the data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from unimat_jax.crystal import lattice_from_parameters
from unimat_jax.periodic_table import ATOMIC_NUMBERS, SYMBOLS
from unimat_jax.representation import LATTICE_FORMS, lattice_vector

MIN_STD = 0.01
"""Floor of the lattice's standard deviations: angles that are all 90 degrees must not be divided by 0."""
_BATCH = 1024
_MAXIMA = ("max_atoms", "max_atoms_per_element", "coordinate_radius")


class RunningMoments:
    """Mean, standard deviation and range of vectors [..., D] added in batches (Chan's update; memory does not grow)."""

    def __init__(self, size: int):
        self.count = 0
        self.mean = np.zeros(size)
        self.squares = np.zeros(size)
        self.min = np.full(size, np.inf)
        self.max = np.full(size, -np.inf)

    def add(self, values: np.ndarray) -> None:
        if len(values):
            added = RunningMoments(values.shape[-1])
            added.count, added.mean = len(values), values.mean(0)
            added.squares = ((values - added.mean) ** 2).sum(0)
            added.min, added.max = values.min(0), values.max(0)
            self.merge(added)

    def merge(self, other: RunningMoments) -> None:
        """As if the other's values had been added after these."""
        if not other.count:
            return
        difference = other.mean - self.mean
        total = self.count + other.count
        self.squares += other.squares + difference**2 * self.count * other.count / total
        self.mean += difference * other.count / total
        self.count = total
        self.min, self.max = np.minimum(self.min, other.min), np.maximum(self.max, other.max)

    def state(self) -> dict[str, Any]:
        """For JSON, exact."""
        return {name: np.asarray(value).tolist() for name, value in vars(self).items()}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> RunningMoments:
        moments = cls(len(state["mean"]))
        moments.count = int(state["count"])
        for name in ("mean", "squares", "min", "max"):
            setattr(moments, name, np.array(state[name], np.float64))
        return moments

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(self.squares / max(self.count, 1))


class Statistics:
    """Add records, then `to_json`. Statistics of parts can be merged."""

    def __init__(self) -> None:
        self.elements: Counter[int] = Counter()
        self.max_atoms = 0
        self.max_atoms_per_element = 0
        self.coordinate_radius = 0.0
        self.lattice = {form: RunningMoments(size) for form, size in LATTICE_FORMS.items()}
        self.properties: dict[str, RunningMoments] = {}
        self._records: list[Mapping[str, np.ndarray]] = []
        self._values: list[Mapping[str, float]] = []

    def add(self, record: Mapping[str, np.ndarray], properties: Mapping[str, float]) -> None:
        """`record` as `representation.encode` gives it; `properties` without the missing ones."""
        self._records.append(record)
        self._values.append(properties)
        if len(self._records) == _BATCH:
            self._flush()

    def _flush(self) -> None:
        if not self._records:
            return
        slots = np.concatenate([r["slots"] for r in self._records])
        sizes = np.array([len(r["slots"]) for r in self._records])
        cells = np.stack([r["lattice"] for r in self._records]).astype(np.float64)
        numbers, counts = np.unique(ATOMIC_NUMBERS[slots[:, 1], slots[:, 2]], return_counts=True)
        self.elements.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
        self.max_atoms = max(self.max_atoms, int(sizes.max()))
        self.max_atoms_per_element = max(self.max_atoms_per_element, int(slots[:, 0].max()) + 1)
        vectors = np.repeat(lattice_from_parameters(cells[:, :3], cells[:, 3:]), sizes, axis=0)
        centred = np.concatenate([r["frac_coords"] for r in self._records]) - 0.5
        positions = np.einsum("ni,nij->nj", centred, vectors)
        self.coordinate_radius = max(self.coordinate_radius, float(np.abs(positions).max()))
        for name in sorted(set().union(*self._values)):
            values = np.array([v[name] for v in self._values if math.isfinite(v.get(name, math.nan))])
            self.properties.setdefault(name, RunningMoments(1)).add(values[:, None])
        for form, moments in self.lattice.items():
            vectors = lattice_vector(cells, sizes, form)
            if form == "matrix":
                # This form is trained on random rotations of the cell: each entry of row a then has mean 0 and
                # variance |a|^2 / 3, which a pair of opposite vectors along (1, 1, 1) has too.
                spread = np.repeat(np.linalg.norm(vectors.reshape(-1, 3, 3), axis=-1) / np.sqrt(3), 3, axis=-1)
                vectors = np.concatenate([spread, -spread])
            moments.add(vectors)
        self._records, self._values = [], []

    def merge(self, other: Statistics) -> None:
        """As if the other's records had been added after these."""
        self._flush()
        other._flush()
        self.elements.update(other.elements)
        for name in _MAXIMA:
            setattr(self, name, max(getattr(self, name), getattr(other, name)))
        for form, moments in other.lattice.items():
            self.lattice[form].merge(moments)
        for name, moments in other.properties.items():
            self.properties.setdefault(name, RunningMoments(1)).merge(moments)

    def state(self) -> dict[str, Any]:
        """For JSON, exact."""
        self._flush()
        return {
            **{name: getattr(self, name) for name in _MAXIMA},
            "elements": {str(z): count for z, count in sorted(self.elements.items())},
            "lattice": {form: moments.state() for form, moments in self.lattice.items()},
            "properties": {name: moments.state() for name, moments in sorted(self.properties.items())},
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Statistics:
        statistics = cls()
        for name in _MAXIMA:
            setattr(statistics, name, state[name])
        statistics.elements = Counter({int(z): count for z, count in state["elements"].items()})
        statistics.lattice = {form: RunningMoments.of_state(m) for form, m in state["lattice"].items()}
        statistics.properties = {name: RunningMoments.of_state(m) for name, m in state["properties"].items()}
        return statistics

    def to_json(self, properties: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
        """`properties`: unit, functional and correction of each column."""
        self._flush()
        described = {}
        for name, about in properties.items():
            moments = self.properties.get(name, RunningMoments(1))
            values = {
                k: float(getattr(moments, k)[0]) if moments.count else None for k in ("min", "max", "mean", "std")
            }
            described[name] = {**about, **values, "count": moments.count}
        return {
            "elements": {SYMBOLS[z]: self.elements[z] for z in sorted(self.elements)},
            "max_atoms": self.max_atoms,
            "max_atoms_per_element": self.max_atoms_per_element,
            "lattice": {
                form: {"mean": m.mean.tolist(), "std": np.maximum(m.std, MIN_STD).tolist()}
                for form, m in self.lattice.items()
            },
            "coordinate_radius": self.coordinate_radius,
            "properties": described,
        }
