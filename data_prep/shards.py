"""Chosen structures -> ArrayRecord shards, in the order and of the sizes that TFDS itself would give them.

Each part is serialised into a run, sorted by the hash of the ids; a shard takes its range of hashes from every run.
Nothing is held of more than one part or one shard, and both can be made in any order and in parallel.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.atomic import write_array, written_whole
from data_prep.choosing import Work, halves_of_hash
from data_prep.datasets import feature_name
from data_prep.outcome import Outcome
from unimat_jax.errors import UserError

VERSION = "1.0.0"
SPLITS = ("train", "validation", "test")
RECORDS_AT_ONCE = 2**16
"""Records of a shard that are gathered at a time: some 25 MB."""
_BINS = 16
"""Bits of the hash by which records are counted to find where shards begin."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a split: the records whose hash begins with low to high - 1."""

    split: int
    low: int
    high: int
    num_records: int


def serialize(outcome: Outcome, properties: Sequence[str]) -> bytes:
    """A tf.Example with the features that `builders.UniMatBuilder` declares."""
    from tensorflow_datasets.proto import tf_example_pb2

    assert outcome.record is not None
    example: Any = tf_example_pb2.Example()  # pyright: ignore[reportAttributeAccessIssue]
    feature = example.features.feature
    feature["material_id"].bytes_list.value.append(outcome.uid.encode("utf-8", "backslashreplace"))
    feature["slots"].int64_list.value.extend(outcome.record["slots"].ravel().tolist())
    feature["frac_coords"].float_list.value.extend(outcome.record["frac_coords"].ravel().tolist())
    feature["lattice"].float_list.value.extend(outcome.record["lattice"].tolist())
    values = {feature_name(name): value for name, value in outcome.properties.items()}
    for name in properties:
        feature[f"properties/{name}"].float_list.value.append(float(np.float32(values.get(name, math.nan))))
    return example.SerializeToString(deterministic=True)


def write_run(work: Work, part: int, properties: Sequence[str]) -> None:
    """PART.records, and PART.run.npy [5, n]: split, two halves of the hash, start and stop in PART.records."""
    rows, messages = [], []
    for outcome, split, _, _ in work.judged(part):
        if split is not None:
            rows.append((split, *halves_of_hash(outcome.uid, salt=SPLITS[split])))
            messages.append(serialize(outcome, properties))
    keys = np.array(rows, np.uint64).reshape(-1, 3).T
    order = np.lexsort(keys[::-1])
    stops = np.cumsum([len(messages[i]) for i in order], dtype=np.uint64)
    with written_whole(work.file(part, "records")) as beside:
        beside.write_bytes(b"".join([messages[i] for i in order]))
    write_array(work.file(part, "run.npy"), np.stack([*keys[:, order], np.append(np.uint64(0), stops)[:-1], stops]))


def plan_shards(work: Work, split: int, num_shards: int | None) -> tuple[list[Shard], int]:
    """The shards of a split, by TFDS's rule for their number and limits, and the bytes of all its records. num_shards:
    None for a number by size."""
    from tensorflow_datasets.core.utils import shard_utils

    counts, size = np.zeros(2**_BINS, np.int64), 0
    for part in range(work.spool.num_parts):
        rows = _rows(work, part, split)
        counts += np.bincount((rows[1] >> np.uint64(64 - _BINS)).astype(np.int64), minlength=len(counts))
        size += int((rows[4] - rows[3]).sum())
    ends = np.cumsum(counts)
    total = int(ends[-1])
    if not total:
        return [], 0
    number = min(num_shards, total) if num_shards else shard_utils.ShardConfig().get_number_shards(size, total)
    ranks = [0, *shard_utils.get_shard_boundaries(total, number)]
    first = np.array(ranks[1:-1], np.int64)  # rank of the first record of each shard but the first
    bins = np.searchsorted(ends, first, "right")
    keys = [np.empty(0, np.uint64)]
    for part in range(work.spool.num_parts if number > 1 else 0):
        high = _rows(work, part, split)[1]
        keys.append(high[np.isin(high >> np.uint64(64 - _BINS), bins.astype(np.uint64))])
    near = np.sort(np.concatenate(keys))  # all hashes of the bins in which a shard begins
    in_bin = np.searchsorted(near, bins.astype(np.uint64) << np.uint64(64 - _BINS)) + first - (ends - counts)[bins]
    limits = [0, *near[in_bin].tolist(), 2**64]
    lengths = np.diff(ranks).tolist()
    ranges = zip(itertools.pairwise(limits), lengths, strict=True)
    return [Shard(split, low, high, length) for (low, high), length in ranges], size


def _rows(work: Work, part: int, split: int) -> np.ndarray:
    rows = np.load(work.file(part, "run.npy"), mmap_mode="r")
    start, stop = np.searchsorted(rows[0], np.array([split, split + 1], np.uint64))
    return rows[:, start:stop]


def write_shard(work: Work, told: tuple[Path, Shard]) -> None:
    """One ArrayRecord file. Raises OSError where the disk is full."""
    from array_record.python.array_record_module import ArrayRecordWriter

    path, shard = told
    pieces = 1 + shard.num_records // RECORDS_AT_ONCE
    bounds = [shard.low + (shard.high - shard.low) * i // pieces for i in range(pieces + 1)]
    number = 0
    with written_whole(path) as beside:
        try:
            writer = ArrayRecordWriter(str(beside), "group_size:1")
            for low, high in itertools.pairwise(bounds):
                for message in _in_order(work, shard.split, low, high):
                    writer.write(message)
                    number += 1
            writer.close()
        except RuntimeError as error:
            raise OSError(errno.ENOSPC, str(error), str(path)) from error  # it says which
        assert number == shard.num_records


def _in_order(work: Work, split: int, low: int, high: int) -> Iterator[bytes]:
    """The records of a range of hashes, by their hash."""
    runs = range(work.spool.num_parts)
    slices = [_between(_rows(work, part, split), low, high) for part in runs]
    highs, lows, sizes = np.concatenate([[rows[1], rows[2], rows[4] - rows[3]] for rows in slices], axis=1)
    stops = np.cumsum(sizes).astype(np.int64)
    starts = stops - sizes.astype(np.int64)
    content = memoryview(bytearray(sum(sizes.tolist())))
    place = 0
    for part, rows in zip(runs, slices, strict=True):
        if rows.shape[1]:
            size = int(rows[4, -1] - rows[3, 0])
            with work.file(part, "records").open("rb", buffering=0) as file:
                file.seek(int(rows[3, 0]))
                if file.readinto(content[place : place + size]) != size:
                    raise UserError(f"{file.name} is damaged: delete {work.directory}")
            place += size
    for i in np.lexsort((lows, highs)):
        yield bytes(content[starts[i] : stops[i]])


def _between(rows: np.ndarray, low: int, high: int) -> np.ndarray:
    start = np.searchsorted(rows[1], np.uint64(low))
    stop = np.searchsorted(rows[1], np.uint64(high - 1), "right")
    return np.array(rows[:, start:stop])
