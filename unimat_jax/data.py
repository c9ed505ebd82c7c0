"""Sharded UniMat records -> batches for the device: read, shuffled, augmented and padded on the host, through Grain.

The order of examples depends on (seed, epoch) alone, and a batch's augmentation on (seed, batch number) alone: the
position of the whole job is one number, the same for any number of processes, and process p reads its contiguous part
of each global batch.
"""

from __future__ import annotations

import functools
import itertools
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimat_jax.augmentation import augment, random_rotations
from unimat_jax.errors import UserError
from unimat_jax.periodic_table import ATOMIC_NUMBERS, SYMBOLS, Table, atomic_number
from unimat_jax.representation import LATTICE_FORMS, UniMatSpec, batch_records, model_inputs, padded_atoms

_PREFIX = "properties/"


def dataset_directory(dataset: str, data_dir: str | Path) -> Path:
    """Where `data_prep.prepare` put a data set. Raises UserError when it is not there, or not finished."""
    versions = sorted(Path(data_dir, dataset).glob("*/statistics.json"))
    if not versions:
        raise UserError(
            f"no data set {dataset!r} in data_dir {str(data_dir)!r}: make it with "
            f"'unimat prepare --dataset={dataset} --data_dir={data_dir}' (see 'unimat prepare --help')"
        )
    return versions[-1].parent


def read_statistics(directory: Path) -> dict[str, Any]:
    """The training split's statistics, written by `data_prep.prepare`."""
    return json.loads((directory / "statistics.json").read_text())


class _Shards:
    """The raw records of ArrayRecord files by their number, for threads too. An open file takes some 22 bytes a record
    of memory."""

    def __init__(self, paths: Sequence[str], lengths: Sequence[int]):
        self._paths, self._lengths = list(paths), list(lengths)
        self._starts = np.cumsum([0, *lengths])
        self._readers: list[Any] = [None] * len(self._paths)
        self._lock = threading.Lock()

    def read(self, indices: np.ndarray) -> list[bytes]:
        """Raises UserError for a file that is damaged."""
        shards = np.searchsorted(self._starts, indices, "right") - 1
        messages = []
        with self._lock:  # a reader has one place
            for shard, place in zip(shards.tolist(), (indices - self._starts[shards]).tolist(), strict=True):
                try:
                    reader = self._readers[shard] or self._open(shard)
                    # read([place]) would take a time that grows with the file, as would several threads.
                    reader.seek(place)
                    messages.append(reader.read())
                except RuntimeError as error:
                    raise UserError(f"{self._paths[shard]} is damaged ({error}): make the data set again") from error
        return messages

    def _open(self, shard: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        path = self._paths[shard]
        options = "readahead_buffer_size:0,max_parallelism:0"
        reader = ArrayRecordReader(path, options=options, file_reader_buffer_size=4096)
        if reader.num_records() != self._lengths[shard]:
            raise UserError(
                f"{path} holds {reader.num_records()} records, dataset_info.json says {self._lengths[shard]}: make the "
                "data set again"
            )
        self._readers[shard] = reader
        return reader


class RecordSource:
    """Random access to the records of one split; `read` takes many indices at once and parses them without TFDS's
    one-by-one decoder, which is many times slower. limit: only the first so many records (0: all); records lie in
    the order of a hash of their ids, so that smaller parts are random and nested."""

    def __init__(self, directory: Path, split: str, limit: int = 0):
        import tensorflow_datasets as tfds

        info = tfds.builder_from_directory(str(directory)).info
        if split not in info.splits:
            raise UserError(f"{directory} has no split {split!r}, only {sorted(info.splits)}")
        available = int(info.splits[split].num_examples)
        if not 0 <= limit <= available:
            raise UserError(
                f"config.data.max_train_examples = {limit}: {directory} has {available} in {split!r}; 0: all"
            )
        self.num_examples = limit or available
        self._shards = _Shards([str(path) for path in info.splits[split].filepaths], info.splits[split].shard_lengths)

    def __len__(self) -> int:
        return self.num_examples

    def read(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Records (see `representation.encode`) with `material_id` and `properties`: floats by name, NaN if missing."""
        return parse_records(self._shards.read(np.asarray(indices, np.int64)))

    @functools.cached_property
    def num_atoms(self) -> np.ndarray:
        """Of each record: uint16 [N]. Reads them all, some 60,000 a second."""
        parts = (self.read(np.arange(i, min(i + 4096, len(self)))) for i in range(0, len(self), 4096))
        return np.array([len(record["slots"]) for part in parts for record in part], np.uint16)


def parse_records(messages: Sequence[bytes]) -> list[dict[str, Any]]:
    """The records that serialised tf.Examples hold. The numbers of all become arrays together, of which each record has
    views: an array for each is what would take most of the time."""
    from tensorflow_datasets.proto import tf_example_pb2

    parse: Any = tf_example_pb2.Example.FromString  # pyright: ignore[reportAttributeAccessIssue]
    slots: list[int] = []
    coords: list[float] = []
    lattices: list[float] = []
    stops, rest = [0], []
    for message in messages:
        feature = parse(message).features.feature
        slots.extend(feature["slots"].int64_list.value)
        coords.extend(feature["frac_coords"].float_list.value)
        lattices.extend(feature["lattice"].float_list.value)
        stops.append(len(slots) // 3)
        properties = {
            name.removeprefix(_PREFIX): value.float_list.value[0]
            for name, value in feature.items()
            if name.startswith(_PREFIX)
        }
        rest.append({"material_id": feature["material_id"].bytes_list.value[0].decode(), "properties": properties})
    all_slots = np.array(slots, np.uint8).reshape(-1, 3)
    all_coords = np.array(coords, np.float32).reshape(-1, 3)
    all_lattices = np.array(lattices, np.float32).reshape(-1, 6)
    return [
        {"slots": all_slots[start:stop], "frac_coords": all_coords[start:stop], "lattice": lattice, **others}
        for (start, stop), lattice, others in zip(itertools.pairwise(stops), all_lattices, rest, strict=True)
    ]


def make_spec(
    statistics: Mapping[str, Any],
    *,
    max_atoms_per_element: int | None = None,
    table: str = "full",
    coordinates: str = "fractional",
    lattice_form: str = "parameters",
) -> UniMatSpec:
    """The spec for a data set: L from its largest count unless given, the lattice standardised by its statistics.

    table: "full" (9 x 18), "data" (the rows and columns in which the training set has elements), or symbols "C" or
    "Li,O". Raises UserError for values that do not exist.
    """
    if table == "full":
        kept = Table()
    else:
        symbols = statistics["elements"] if table == "data" else [s.strip() for s in table.split(",")]
        try:
            kept = Table.of_elements([atomic_number(symbol) for symbol in symbols])
        except ValueError as error:
            raise UserError(f"config.data.table = {table!r}: {error}; or write 'full' or 'data'") from error
    outside = [symbol for symbol in statistics["elements"] if kept.place_of[atomic_number(symbol)] < 0]
    if outside:
        raise UserError(
            f"config.data.table = {table!r} has no place for {', '.join(outside)} of the training set: write 'data', "
            "or prepare the data set with --elements"
        )
    if lattice_form not in LATTICE_FORMS:
        raise UserError(f"config.data.lattice_form = {lattice_form!r}: choose from {sorted(LATTICE_FORMS)}")
    limit = max_atoms_per_element or statistics["max_atoms_per_element"]
    if limit < statistics["max_atoms_per_element"]:
        raise UserError(
            f"config.data.max_atoms_per_element = {limit}, but the training set has crystals with "
            f"{statistics['max_atoms_per_element']} atoms of one element: raise it, or prepare the data set with "
            f"--max_atoms_per_element={limit}"
        )
    moments = statistics["lattice"][lattice_form]
    try:
        return UniMatSpec(
            max_atoms_per_element=limit,
            max_atoms=statistics["max_atoms"],
            table=kept,
            coordinates=coordinates,
            lattice_form=lattice_form,
            lattice_mean=tuple(moments["mean"]),
            lattice_std=tuple(moments["std"]),
            coordinate_radius=statistics["coordinate_radius"] if coordinates == "cartesian" else 1.0,
        )
    except ValueError as error:
        raise UserError(f"config.data: {error}") from error


def condition_schema(statistics: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Name, unit, range and standardisation of each property that the model is conditioned on. Raises UserError for a
    property that the data set does not have, or that never varies."""
    schema = []
    for name in names:
        known = statistics["properties"]
        if name not in known or not known[name].get("count"):
            raise UserError(f"config.data.properties has {name!r}; the data set's properties are {sorted(known)}")
        schema.append({"name": name, **known[name], "std": max(known[name]["std"], 1e-6)})
    return schema


@functools.lru_cache(maxsize=2)
def _epoch_order(number: int, seed: int, epoch: int) -> np.ndarray:
    """4 bytes an example, of two epochs: a batch may hold the end of one and the start of the next."""
    return np.random.default_rng([seed, epoch]).permutation(np.arange(number, dtype=np.uint32))


class BatchMaker:
    """batch number -> this process's part of that global batch, as numpy arrays ready for the device.

    Batches hold `slot`, `coords`, `lattice`, `num_atoms` (see `representation.model_inputs`), `properties` [B, P]
    (standardised, NaN where missing) and `index` [B], the example's number in its split.

    size_window: 0, all batches are padded to the spec's max_atoms; K > 0, each to its own largest crystal
    (`representation.padded_atoms`), K batches at a time sharing out their crystals by size, in a random order.
    """

    def __init__(
        self,
        source: RecordSource,
        spec: UniMatSpec,
        schema: Sequence[Mapping[str, Any]] = (),
        *,
        batch_size: int,
        seed: int,
        augmentation: Mapping[str, Any],
        size_window: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if batch_size % process_count:
            raise UserError(f"train.batch_size = {batch_size} does not divide by {process_count} processes")
        self._source, self._spec, self._schema = source, spec, list(schema)
        self._batch_size, self._seed, self._augmentation = batch_size, seed, dict(augmentation)
        share = batch_size // process_count
        self._part = slice(process_index * share, (process_index + 1) * share)
        if size_window < 0:
            raise UserError(f"config.data.size_window = {size_window}: give a number of batches, or 0")
        self._size_window = size_window
        self.by_size = size_window > 0
        self._window = functools.lru_cache(maxsize=4)(self._sorted_window)  # read by a few threads at once

    def indices(self, number: int) -> np.ndarray:
        """Examples of global batch `number`; an epoch's end may fall inside a batch."""
        if self._size_window:
            window, place = divmod(number, self._size_window)
            return self._window(window)[place]
        return self._shuffled(number * self._batch_size, self._batch_size)

    def _shuffled(self, first: int, count: int) -> np.ndarray:
        positions = first + np.arange(count)
        epochs, offsets = np.divmod(positions, len(self._source))
        return np.concatenate(
            [_epoch_order(len(self._source), self._seed, int(e))[offsets[epochs == e]] for e in np.unique(epochs)]
        )

    def _sorted_window(self, number: int) -> np.ndarray:
        """Examples of `size_window` batches [K, B]."""
        count = self._size_window * self._batch_size
        examples = self._shuffled(number * count, count)
        by_size = examples[np.argsort(self._source.num_atoms[examples], kind="stable")]
        batches = by_size.reshape(self._size_window, self._batch_size)
        return np.random.default_rng([self._seed, 2, number]).permutation(batches)

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        indices = self.indices(number)
        size = int(self._source.num_atoms[indices].max()) if self._size_window else 0  # the same for all processes
        return self.batch_of(indices[self._part], np.random.default_rng([self._seed, 1, number]), size)

    def batch_of(self, indices: np.ndarray, rng: np.random.Generator, num_atoms: int = 0) -> dict[str, np.ndarray]:
        """The batch of the given examples, padded for crystals of `num_atoms`; 0: the spec's max_atoms. `rng` draws for
        the whole global batch; each process keeps its part."""
        records = self._source.read(indices)
        batch = augment(
            batch_records(records, padded_atoms(num_atoms or self._spec.max_atoms, self._spec.max_atoms)),
            rng,
            draw_for=self._batch_size,
            part=self._part,
            **self._augmentation,
        )
        rotations = None
        if self._spec.coordinates == "cartesian":
            rotations = random_rotations(rng, self._batch_size)[self._part]
        inputs = model_inputs(batch, self._spec, rotations)
        values = [
            [(record["properties"][p["name"]] - p["mean"]) / p["std"] for p in self._schema] for record in records
        ]
        inputs["properties"] = np.array(values, np.float32).reshape(len(records), len(self._schema))
        inputs["index"] = indices.astype(np.int32)
        return inputs


def training_iterator(batch_maker: BatchMaker, *, num_threads: int = 2, prefetch: int = 8) -> Any:
    """Endless checkpointable Grain iterator over global batches, made ahead by background threads.

    `get_state()` holds one number, the next batch; `set_state` moves to it.
    """
    import grain

    dataset = grain.MapDataset.range(2**48).map(batch_maker)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)))


def evaluation_batches(
    batch_maker: BatchMaker, source: RecordSource, spec: UniMatSpec, *, num_examples: int, batch_size: int
) -> tuple[list[dict[str, np.ndarray]], int]:
    """Fixed batches of at most `num_examples` examples of a split, the last one padded, and how many were left out
    since the model's table or L cannot hold them. `weight` [B] is 0 where padded."""
    indices = np.arange(len(source))
    if len(source) > num_examples:
        indices = np.sort(_epoch_order(len(source), 0, 0)[:num_examples])
    records = source.read(indices)
    kept = np.array([fits(record, spec) for record in records], bool)
    indices, left_out = indices[kept], int((~kept).sum())
    sizes = np.array([len(record["slots"]) for record in records], int)[kept]
    if batch_maker.by_size:
        order = np.argsort(sizes, kind="stable")
        indices, sizes = indices[order], sizes[order]
    batches = []
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        padded = np.resize(part, batch_size)
        largest = int(sizes[start : start + batch_size].max()) if batch_maker.by_size else 0
        batch = batch_maker.batch_of(padded, np.random.default_rng([2, start]), largest)
        batch["weight"] = (np.arange(batch_size) < len(part)).astype(np.float32)
        batches.append(batch)
    return batches, left_out


def fits(record: Mapping[str, np.ndarray], spec: UniMatSpec) -> bool:
    """Whether the spec can hold a record."""
    slots = record["slots"]
    inside = spec.table.place_of[ATOMIC_NUMBERS[slots[:, 1], slots[:, 2]]] >= 0
    return bool(inside.all() and len(slots) <= spec.max_atoms and slots[:, 0].max() < spec.max_atoms_per_element)


def element_symbols(spec: UniMatSpec) -> list[str]:
    """Symbols of the elements that the spec's table can hold."""
    return [SYMBOLS[z] for z in spec.table.atomic_numbers.ravel() if z]
