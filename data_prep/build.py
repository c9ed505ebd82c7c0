"""The later stages of `prepare`, on one machine: parsed structures -> choice, shards and what lies beside them.

Each stage is a task for every part or shard, with a file of its own: a killed build goes on where it stopped, and ends
with the same bytes.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from data_prep.atomic import UNFINISHED, write_json
from data_prep.choosing import Work, find_duplicates, merged_summary, write_hashes, write_summary
from data_prep.report import DROPPED, REPORT, STATISTICS
from data_prep.selection import Selection, Summary
from data_prep.shards import SPLITS, VERSION, plan_shards, write_run, write_shard
from data_prep.tasks import Workers
from unimat_jax.errors import UserError


def choose(work: Work, pool: Workers) -> Summary:
    """What is kept and dropped, by the filters, the splits and the ids that stand there twice."""
    parts = range(work.spool.num_parts)
    pool.run(write_hashes, [(work.file(part, "ids.npy"), part) for part in parts], description="choosing")
    if not work.duplicates.exists():
        find_duplicates(work)
    pool.run(write_summary, [(work.file(part, "summary.json"), part) for part in parts], description="counting")
    return merged_summary(work)


@dataclasses.dataclass(frozen=True)
class Built:
    """A directory with shards. splits: name -> number of records in each shard, and bytes of all."""

    path: Path
    splits: dict[str, tuple[list[int], int]]


def write_shards(work: Work, pool: Workers, selection: Selection, dataset: str, num_shards: int | None) -> Built:
    parts, path = range(work.spool.num_parts), work.directory / VERSION
    tasks = [(work.file(part, "run.npy"), part) for part in parts]
    pool.run(write_run, tasks, sorted(selection.columns), description="sorting")
    path.mkdir(exist_ok=True)
    splits, tasks = {}, []
    for index, split in enumerate(SPLITS):
        shards, size = plan_shards(work, index, num_shards)
        if shards:
            splits[split] = [shard.num_records for shard in shards], size
        for number, shard in enumerate(shards):
            file = path / f"{dataset}-{split}.array_record-{number:05}-of-{len(shards):05}"
            tasks.append((file, (file, shard)))
    pool.run(write_shard, tasks, description="writing")
    return Built(path, splits)


def write_dropped(work: Work, directory: Path) -> None:
    """dropped.jsonl, of the parts' own."""
    with (directory / DROPPED).open("wb") as whole:
        for part in range(work.spool.num_parts):
            with work.file(part, DROPPED).open("rb") as file:
                shutil.copyfileobj(file, whole)


def write_beside(built: Built, selection: Selection, statistics: dict[str, Any], about: dict[str, Any]) -> None:
    """TFDS's own files and the statistics."""
    from data_prep.builders import BUILDERS  # imports TFDS, which takes a second

    metadata = {
        "notes": about["notes"],
        "properties": statistics["properties"],
        "cell": about["options"]["cell"],
    }
    builder = BUILDERS[about["dataset"]](
        properties=sorted(selection.columns), metadata=metadata, data_dir=str(built.path.parent)
    )
    builder.write_info(built.path, built.splits)
    write_json(built.path / STATISTICS, statistics)


def check_place(directory: Path) -> None:
    """UserError where something else than a data set lies there."""
    if any(directory.glob("*")) and not (directory / "dataset_info.json").exists():
        raise UserError(f"{directory} is there and is no data set: move it away, or choose another --data_dir")


def put_in_place(built: Built, directory: Path) -> None:
    """The finished data set, in place of one that is made again."""
    check_place(directory)
    for path in (*directory.parent.glob(f"incomplete.*_{directory.name}"), directory):
        shutil.rmtree(path, ignore_errors=True)
    assert (built.path / REPORT).exists()
    for left_by_a_kill in built.path.glob(f"*{UNFINISHED}"):
        left_by_a_kill.unlink()
    built.path.replace(directory)
