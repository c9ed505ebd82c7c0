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


class RunningMoments:
    """Mean, standard deviation and range of vectors [..., D] added in batches (Chan's update; memory does not grow)."""

    def __init__(self, size: int):
        self.count = 0
        self.mean = np.zeros(size)
        self.squares = np.zeros(size)
        self.min = np.full(size, np.inf)
        self.max = np.full(size, -np.inf)

    def add(self, values: np.ndarray) -> None:
        number = len(values)
        if not number:
            return
        mean = values.mean(0)
        difference = mean - self.mean
        total = self.count + number
        self.squares += ((values - mean) ** 2).sum(0) + difference**2 * self.count * number / total
        self.mean += difference * number / total
        self.count = total
        self.min, self.max = np.minimum(self.min, values.min(0)), np.maximum(self.max, values.max(0))

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(self.squares / max(self.count, 1))


class Statistics:
    """Add records, then `to_json`."""

    def __init__(self) -> None:
        self.elements: Counter[int] = Counter()
        self.max_atoms = 0
        self.max_atoms_per_element = 0
        self.coordinate_radius = 0.0
        self.lattice = {form: RunningMoments(size) for form, size in LATTICE_FORMS.items()}
        self.properties: dict[str, RunningMoments] = {}
        self._cells: list[np.ndarray] = []
        self._sizes: list[int] = []

    def add(self, record: Mapping[str, np.ndarray], properties: Mapping[str, float]) -> None:
        """`record` as `representation.encode` gives it; `properties` without the missing ones."""
        slots = record["slots"]
        self.elements.update(ATOMIC_NUMBERS[slots[:, 1], slots[:, 2]].tolist())
        self.max_atoms = max(self.max_atoms, len(slots))
        self.max_atoms_per_element = max(self.max_atoms_per_element, int(slots[:, 0].max()) + 1)
        cell = np.asarray(record["lattice"], np.float64)
        positions = (record["frac_coords"] - 0.5) @ lattice_from_parameters(cell[:3], cell[3:])
        self.coordinate_radius = max(self.coordinate_radius, float(np.abs(positions).max()))
        for name, value in properties.items():
            if math.isfinite(value):
                self.properties.setdefault(name, RunningMoments(1)).add(np.array([[value]]))
        self._cells.append(cell)
        self._sizes.append(len(slots))
        if len(self._cells) == _BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._cells:
            for form, moments in self.lattice.items():
                vectors = lattice_vector(np.stack(self._cells), np.array(self._sizes), form)
                if form == "matrix":
                    # This form is trained on random rotations of the cell: each entry of row a then has mean 0 and
                    # variance |a|^2 / 3, which a pair of opposite vectors along (1, 1, 1) has too.
                    spread = np.repeat(np.linalg.norm(vectors.reshape(-1, 3, 3), axis=-1) / np.sqrt(3), 3, axis=-1)
                    vectors = np.concatenate([spread, -spread])
                moments.add(vectors)
        self._cells, self._sizes = [], []

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
