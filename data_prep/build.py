"""The later stages of `prepare`, on one machine: parsed structures -> choice, shards and what lies beside them.

Each stage is a task for every part or shard, with a file of its own: a killed build goes on where it stopped, and ends
with the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data_prep.atomic import UNFINISHED, write_json
from data_prep.choosing import Work, find_duplicates, merged_summary, write_hashes, write_summary
from data_prep.report import DROPPED, REPORT
from data_prep.selection import Selection, Summary, counts
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


def check_something_is_left(
    work: Work, summary: Summary, files: dict[str, Path], directory: Path, about: dict[str, Any]
) -> None:
    """Raises UserError where no crystal is kept, or none to train on; the reasons lie in `directory`."""
    number = counts(summary)
    reasons = ", ".join(f"{count} {reason}" for reason, count in number["dropped"].items()) or "the source is empty"
    if not number["kept"]:
        write_json(directory / REPORT, {**about, **number, "dropped_structures": summary.first_dropped})
        write_dropped(work, directory)
        raise UserError(
            f"no crystal is left of {number['read']} read ({reasons}): {directory / REPORT} tells, {DROPPED} beside it "
            "names each"
        )
    if "" in files and not summary.kept_of_split[0]:
        raise UserError(
            f"none of the {number['kept']} crystals kept falls in the train split: "
            "give --split_fractions=1,0,0 or --split_ids"
        )


def make_builder(work: Work, selection: Selection, statistics: dict[str, Any], about: dict[str, Any]) -> UniMatBuilder:
    from data_prep.builders import BUILDERS  # imports TFDS, which takes a second

    metadata = {"notes": about["notes"], "properties": statistics["properties"], "cell": about["options"]["cell"]}
    properties = sorted(selection.columns)
    return BUILDERS[about["dataset"]](work=work, properties=properties, metadata=metadata, data_dir=str(work.directory))


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
