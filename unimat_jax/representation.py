"""The UniMat representation (paper, section 2.1): Crystal <-> sparse record, batches of records, tensor -> Crystal.

A crystal is a tensor [L, H, W, 3]: slot l of the element at (row, column) holds the coordinates of that element's l-th
atom, or the null value. A record holds only the occupied slots; `densify.py` scatters them on the device.

Model units: fractional coordinates f in [0, 1) become 2 f - 1, and the paper's null value -1 becomes -3; "occupied" is
a mean of x, y, z above -2 (the paper's units: above -0.5). Cartesian coordinates, measured from the cell's centre, are
divided by the largest such distance in the training set, and share the null value and the threshold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unimat_jax.crystal import Crystal, CrystalError, angles_of, lattice_from_parameters, min_distance
from unimat_jax.periodic_table import ATOMIC_NUMBERS, COLUMN, ROW, SYMBOLS, Table

NULL_VALUE = -3.0
OCCUPIED_THRESHOLD = -2.0
LATTICE_FORMS = {"parameters": 6, "log_metric": 6, "matrix": 9}
"""Numbers per crystal of each way to give the cell to the network."""
MAX_CELL_LENGTH = 1000.0
"""Angstrom; a decoded cell with a longer edge is `cell_degenerate`."""
OVERLAP_DISTANCE = 0.05
"""Angstrom; decoded atoms nearer than this are `atoms_overlap`: file readers would merge or refuse them."""


@dataclasses.dataclass(frozen=True)
class UniMatSpec:
    """Everything that fixes the meaning of a tensor's numbers; a checkpoint carries it as JSON.

    max_atoms_per_element: L. max_atoms: the padded number of atoms in a batch of records. table: the kept rows and
    columns. coordinates: "fractional" or "cartesian". lattice_form: "parameters" (log(length / n^(1/3)) and cosines),
    "log_metric" (logarithm of the metric tensor over n^(2/3): every value is a cell) or, for Cartesian coordinates,
    "matrix" (cell vectors / n^(1/3)). lattice_mean, lattice_std: standardisation from the training set.
    coordinate_radius: Angstrom, Cartesian only.
    """

    max_atoms_per_element: int
    max_atoms: int
    table: Table = dataclasses.field(default_factory=Table)
    coordinates: str = "fractional"
    lattice_form: str = "parameters"
    lattice_mean: tuple[float, ...] = (0.0,) * 6
    lattice_std: tuple[float, ...] = (1.0,) * 6
    coordinate_radius: float = 1.0

    def __post_init__(self):
        if self.coordinates not in ("fractional", "cartesian"):
            raise ValueError(f"coordinates = {self.coordinates!r}: choose 'fractional' or 'cartesian'")
        cartesian = self.coordinates == "cartesian"
        if self.lattice_form not in LATTICE_FORMS or (self.lattice_form == "matrix") != cartesian:
            raise ValueError(
                f"lattice_form = {self.lattice_form!r} with {self.coordinates} coordinates: fractional ones take "
                "'parameters' or 'log_metric'; Cartesian ones rotate with their cell and take 'matrix'"
            )
        if len(self.lattice_mean) != self.lattice_size or len(self.lattice_std) != self.lattice_size:
            raise ValueError(f"lattice_mean and lattice_std need {self.lattice_size} numbers for {self.lattice_form!r}")

    @property
    def lattice_size(self) -> int:
        return LATTICE_FORMS[self.lattice_form]

    @property
    def grid(self) -> tuple[int, int, int]:
        """(L, H, W)."""
        return (self.max_atoms_per_element, *self.table.shape)

    @property
    def num_slots(self) -> int:
        return int(np.prod(self.grid))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> UniMatSpec:
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        table = values.pop("table")
        return cls(table=Table(tuple(table["rows"]), tuple(table["columns"])), **values)


@dataclasses.dataclass(frozen=True)
class DecodeFailure:
    """Why a tensor is no crystal: a code to count by and a sentence."""

    reason: str
    message: str


def encode(crystal: Crystal, spec: UniMatSpec | None = None) -> dict[str, np.ndarray]:
    """Sparse record of a crystal: `slots` uint8 [N, 3] as (l, row, column) of the full 9 x 18 table, `frac_coords`
    float32 [N, 3] in [0, 1), `lattice` float32 [6] as lengths (Angstrom) and angles (degrees).

    Raises CrystalError (`too_many_of_element`, `too_many_atoms`, `element_outside_table`) for what `spec` cannot hold.
    """
    numbers = crystal.atomic_numbers
    order = np.argsort(numbers, kind="stable")
    numbers = numbers[order]
    first = np.searchsorted(numbers, numbers)  # index of the first atom of the same element
    slot = np.arange(len(numbers)) - first
    limit = 255 if spec is None else spec.max_atoms_per_element
    name = crystal.uid or "structure"
    if slot.max() >= limit:
        symbol, count = SYMBOLS[numbers[slot.argmax()]], slot.max() + 1
        raise CrystalError("too_many_of_element", f"{name}: {count} atoms of {symbol}, max_atoms_per_element = {limit}")
    if spec is not None:
        if len(numbers) > spec.max_atoms:
            raise CrystalError("too_many_atoms", f"{name}: {len(numbers)} atoms, max_atoms = {spec.max_atoms}")
        outside = sorted({SYMBOLS[z] for z in numbers[spec.table.place_of[numbers] < 0]})
        if outside:
            raise CrystalError("element_outside_table", f"{name}: {outside} have no place in the model's table")
    return {
        "slots": np.stack([slot, ROW[numbers], COLUMN[numbers]], -1).astype(np.uint8),
        "frac_coords": wrap(crystal.frac_coords[order]).astype(np.float32),
        "lattice": np.concatenate([crystal.lengths, crystal.angles]).astype(np.float32),
    }


def crystal_of_record(record: Mapping[str, np.ndarray], uid: str = "", properties=None) -> Crystal:
    """The crystal that a record holds."""
    slots, cell = np.asarray(record["slots"]), np.asarray(record["lattice"], np.float64)
    lattice = lattice_from_parameters(cell[:3], cell[3:])
    return Crystal.create(ATOMIC_NUMBERS[slots[:, 1], slots[:, 2]], record["frac_coords"], lattice, uid, properties)


def wrap(frac_coords: np.ndarray) -> np.ndarray:
    """Coordinates modulo 1, in [0, 1) also after rounding to float32."""
    wrapped = np.mod(frac_coords, 1.0)
    return np.where(wrapped.astype(np.float32) >= 1.0, 0.0, wrapped)


def batch_records(records: Sequence[Mapping[str, np.ndarray]], max_atoms: int) -> dict[str, np.ndarray]:
    """Padded batch: `slots` int32 [B, A, 3] (-1 where padded), `frac_coords` float32 [B, A, 3], `lattice` float32
    [B, 6], `num_atoms` int32 [B]. Raises CrystalError (`too_many_atoms`)."""
    num_atoms = np.array([len(r["slots"]) for r in records], np.int32)
    if num_atoms.max(initial=0) > max_atoms:
        raise CrystalError("too_many_atoms", f"a record has {num_atoms.max()} atoms, max_atoms = {max_atoms}")
    slots = np.full((len(records), max_atoms, 3), -1, np.int32)
    frac = np.zeros((len(records), max_atoms, 3), np.float32)
    real = np.arange(max_atoms) < num_atoms[:, None]
    slots[real] = np.concatenate([r["slots"] for r in records])
    frac[real] = np.concatenate([r["frac_coords"] for r in records])
    return {
        "slots": slots,
        "frac_coords": frac,
        "lattice": np.stack([r["lattice"] for r in records]).astype(np.float32),
        "num_atoms": num_atoms,
    }


def padded_atoms(num_atoms: int, max_atoms: int) -> int:
    """To how many atoms a batch is padded whose largest crystal has `num_atoms`: multiples of 4 to 32, of 8 to 64, and
    so on, or `max_atoms`, so that a few compiled programs serve all sizes and each wastes less than a quarter."""
    step = max(4, 2 ** (max(num_atoms - 1, 1).bit_length() - 3))
    return max(num_atoms, min(num_atoms + -num_atoms % step, max_atoms))


def model_inputs(
    batch: Mapping[str, np.ndarray], spec: UniMatSpec, rotations: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """What goes to the device: `slot` int32 [B, A] flat in [L, H, W] (L H W where padded: a scatter drops it), `coords`
    float32 [B, A, 3] and `lattice` float32 [B, D] in model units, `num_atoms`.

    `rotations` [B, 3, 3], proper, apply to Cartesian coordinates and cell. Raises CrystalError
    (`element_outside_table`, `too_many_of_element`).
    """
    level, row, column = np.moveaxis(batch["slots"], -1, 0)
    real = level >= 0
    place = spec.table.place_of[ATOMIC_NUMBERS[row, column]]
    if (place[real] < 0).any():
        bad = sorted({SYMBOLS[z] for z in ATOMIC_NUMBERS[row, column][real & (place < 0)]})
        raise CrystalError("element_outside_table", f"{bad} have no place in the table of config.data.table: widen it")
    if level.max() >= spec.max_atoms_per_element:
        limit = f"max_atoms_per_element = {spec.max_atoms_per_element}"
        raise CrystalError("too_many_of_element", f"a record has {level.max() + 1} atoms of one element, {limit}")
    slot = np.where(real, level * int(np.prod(spec.table.shape)) + place, spec.num_slots)
    coords = batch["frac_coords"]
    cells = None
    if spec.coordinates == "cartesian":
        cells = lattice_from_parameters(batch["lattice"][:, :3], batch["lattice"][:, 3:])
        if rotations is not None:
            cells = cells @ np.swapaxes(rotations, -1, -2)
        coords = (coords - 0.5) @ cells / spec.coordinate_radius
    else:
        coords = 2.0 * coords - 1.0
    lattice = lattice_vector(batch["lattice"], batch["num_atoms"], spec.lattice_form, cells)
    lattice = (lattice - np.array(spec.lattice_mean)) / np.array(spec.lattice_std)
    return {
        "slot": slot.astype(np.int32),
        "coords": coords.astype(np.float32),
        "lattice": lattice.astype(np.float32),
        "num_atoms": batch["num_atoms"],
    }


def lattice_vector(
    parameters: np.ndarray, num_atoms: np.ndarray, form: str, cells: np.ndarray | None = None
) -> np.ndarray:
    """Unstandardised lattice numbers [B, D] of cells given as lengths and angles [B, 6]; `cells` [B, 3, 3] fixes the
    orientation for "matrix"."""
    parameters = np.asarray(parameters, np.float64)
    size = np.cbrt(np.asarray(num_atoms, np.float64))[:, None]
    if form == "parameters":
        return np.concatenate([np.log(parameters[:, :3] / size), np.cos(np.radians(parameters[:, 3:]))], -1)
    if cells is None:
        cells = lattice_from_parameters(parameters[:, :3], parameters[:, 3:])
    scaled = cells / size[..., None]
    if form == "matrix":
        return scaled.reshape(-1, 9)
    values, vectors = np.linalg.eigh(scaled @ np.swapaxes(scaled, -1, -2))
    logarithm = (vectors * np.log(values)[:, None, :]) @ np.swapaxes(vectors, -1, -2)
    return logarithm[:, *np.triu_indices(3)]


def lattice_matrix(vector: np.ndarray, num_atoms: int, spec: UniMatSpec) -> np.ndarray | None:
    """The cell [3, 3] (Angstrom, rows, right-handed) of a standardised lattice vector [D]; None where it spans none."""
    raw = np.asarray(vector, np.float64) * np.array(spec.lattice_std) + np.array(spec.lattice_mean)
    size = np.cbrt(num_atoms)
    with np.errstate(all="ignore"):
        if spec.lattice_form == "matrix":
            cell = raw.reshape(3, 3) * size
        else:
            if spec.lattice_form == "parameters":
                lengths, cosines = np.exp(raw[:3]) * size, raw[3:]
                if np.abs(cosines).max() >= 1:
                    return None
                angles = np.degrees(np.arccos(cosines))
            else:
                logarithm = np.zeros((3, 3))
                logarithm[np.triu_indices(3)] = raw
                logarithm = logarithm + np.triu(logarithm, 1).T
                if not np.isfinite(logarithm).all():
                    return None
                values, vectors = np.linalg.eigh(logarithm)
                root = (vectors * np.exp(values / 2)) @ vectors.T * size  # symmetric, root @ root.T is the metric
                lengths, angles = np.linalg.norm(root, axis=1), angles_of(root)
            cell = lattice_from_parameters(lengths, angles)
        lengths = np.linalg.norm(cell, axis=1)
        if not np.isfinite(cell).all() or lengths.max() > MAX_CELL_LENGTH or lengths.min() < 1e-2:
            return None
        if np.linalg.det(cell) < 1e-4 * np.prod(lengths):  # also the left-handed cells that "matrix" can give
            return None
    return cell


def decode(
    x: np.ndarray, lattice: np.ndarray, spec: UniMatSpec, *, counts: np.ndarray | None = None, uid: str = ""
) -> Crystal | DecodeFailure:
    """The crystal that a tensor [L, H, W, 3] and a lattice vector [D] (model units) stand for, or why there is none.

    With exact `counts` [H, W] the first counts[h, w] slots of each element are its atoms, wherever they are; without,
    a slot is occupied where the mean of x, y, z is above the threshold. Failures: `not_finite`, `no_atoms`,
    `no_element_there`, `cell_degenerate`, `atoms_overlap`.
    """
    x, lattice = np.asarray(x, np.float64), np.asarray(lattice, np.float64)
    if x.shape != (*spec.grid, 3) or lattice.shape != (spec.lattice_size,):
        expected = f"{(*spec.grid, 3)} and {(spec.lattice_size,)}"
        raise ValueError(f"decode got x {x.shape} and lattice {lattice.shape}, the spec says {expected}")
    if counts is not None:
        occupied = np.arange(spec.max_atoms_per_element)[:, None, None] < counts
    else:
        with np.errstate(all="ignore"):
            occupied = x.mean(-1) > OCCUPIED_THRESHOLD
    level, row, column = np.nonzero(occupied)
    if not (np.isfinite(lattice).all() and np.isfinite(x).all()):
        return DecodeFailure("not_finite", "the tensor or the lattice holds NaN or infinity")
    if not len(level):
        return DecodeFailure("no_atoms", "no slot is occupied")
    numbers = spec.table.atomic_numbers[row, column]
    if (numbers == 0).any():
        return DecodeFailure("no_element_there", f"{(numbers == 0).sum()} atoms stand where the table has no element")
    cell = lattice_matrix(lattice, len(numbers), spec)
    if cell is None:
        return DecodeFailure("cell_degenerate", "the lattice parameters span no cell")
    coords = x[level, row, column]
    if spec.coordinates == "cartesian":
        frac = coords * spec.coordinate_radius @ np.linalg.inv(cell) + 0.5
    else:
        frac = (coords + 1.0) / 2.0
    try:
        crystal = Crystal.create(numbers, wrap(frac), cell, uid)
    except CrystalError as error:
        return DecodeFailure(error.reason, str(error))
    distance = min_distance(crystal.frac_coords, crystal.lattice)
    if distance < OVERLAP_DISTANCE:
        return DecodeFailure("atoms_overlap", f"two atoms are {distance:.4f} A apart")
    return crystal


def count_slots_at_null(x: np.ndarray, counts: np.ndarray) -> int:
    """How many of the asked atoms (exact `counts` [H, W]) a tensor [L, H, W, 3] (model units) has at the null place."""
    asked = np.arange(x.shape[0])[:, None, None] < counts
    return int((asked & (x.mean(-1) <= OCCUPIED_THRESHOLD)).sum())
