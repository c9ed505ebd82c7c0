"""The later stages of `prepare`, on one machine: parsed structures -> choice, shards and what lies beside them.

Each stage is a task for every part or shard, with a file of its own: a killed build goes on where it stopped, and ends
with the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data_prep.atomic import UNFINISHED
from data_prep.choosing import Work, find_duplicates, merged_summary, write_hashes, write_summary
from data_prep.report import DROPPED, REPORT
from data_prep.selection import Summary
from data_prep.shards import SPLITS, VERSION, plan_shards, write_run, write_shard
from data_prep.tasks import Task
from unimat_jax.errors import UserError

if TYPE_CHECKING:
    from data_prep.builders import UniMatBuilder


class Pool(Protocol):
    """`tasks.Workers`, or what does the same elsewhere."""

    def run(self, function: Callable[..., None], tasks: Iterable[Task], *settings: Any, description: str) -> None: ...


def choose(work: Work, pool: Pool) -> Summary:
    """What is kept and dropped, by the filters, the splits and the ids that stand there twice."""
    parts = range(work.spool.num_parts)
    pool.run(write_hashes, [(work.file(part, "ids.npy"), part) for part in parts], description="choosing")
    if not work.duplicates.exists():
        find_duplicates(work)
    pool.run(write_summary, [(work.file(part, "summary.json"), part) for part in parts], description="counting")
    return merged_summary(work)


def write_shards(work: Work, pool: Pool, builder: UniMatBuilder, properties: list[str], num_shards: int | None) -> Path:
    """The directory with the shards and TFDS's own files. num_shards: of each split, None for a number by size."""
    parts, path = range(work.spool.num_parts), work.directory / VERSION
    pool.run(write_run, [(work.file(part, "run.npy"), part) for part in parts], properties, description="sorting")
    path.mkdir(exist_ok=True)
    splits, tasks = {}, []
    for index, split in enumerate(SPLITS):
        shards, size = plan_shards(work, index, num_shards)
        if shards:
            splits[split] = [shard.num_records for shard in shards], size
        for number, shard in enumerate(shards):
            file = path / f"{builder.name}-{split}.array_record-{number:05}-of-{len(shards):05}"
            tasks.append((file, (file, shard)))
    pool.run(write_shard, tasks, description="writing")
    builder.write_info(path, splits)
    for left_by_a_kill in path.glob(f"*{UNFINISHED}"):
        left_by_a_kill.unlink()
    return path


def write_dropped(work: Work, directory: Path) -> None:
    """dropped.jsonl, of the parts' own."""
    with (directory / DROPPED).open("wb") as whole:
        for part in range(work.spool.num_parts):
            with work.file(part, DROPPED).open("rb") as file:
                shutil.copyfileobj(file, whole)


def check_place(directory: Path) -> None:
    """UserError where something else than a data set lies there."""
    if any(directory.glob("*")) and not (directory / "dataset_info.json").exists():
        raise UserError(f"{directory} is there and is no data set: move it away, or choose another --data_dir")


def put_in_place(built: Path, directory: Path) -> None:
    """The finished data set, in place of one that is made again."""
    check_place(directory)
    for path in (*directory.parent.glob(f"incomplete.*_{directory.name}"), directory):
        shutil.rmtree(path, ignore_errors=True)
    assert (built / REPORT).exists()
    built.replace(directory)
