"""`unimat prepare` on Apache Beam (extra `beam`): its engines run the stages and TFDS's own Beam writer the shards.

The source and the data directory have to lie where every worker sees them, under the same path. Workers write parts
there as the stages on one machine do, so that a run that was stopped goes on; the records and their order are the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.atomic import written_whole
from data_prep.datasets import scan_all
from data_prep.parse_pool import CellOptions, Item, WorkersDoNotStart, parse_all
from data_prep.spool import Spool
from data_prep.tasks import Task
from unimat_jax.errors import UserError

if TYPE_CHECKING:
    from data_prep.builders import UniMatBuilder


def pipeline_options(text: str) -> Any:
    """Beam's PipelineOptions of "runner=FlinkRunner,flink_master=host:8081,...". Raises UserError."""
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            f"--beam_pipeline_options={text} needs Apache Beam ({error}): pip install 'unimat-jax[beam]'"
        ) from error
    options = PipelineOptions([f"--{option}" for option in text.split(",")])
    try:
        apache_beam.Pipeline(options=options)
    except ValueError as error:
        raise UserError(f"--beam_pipeline_options={text}: {error}") from error
    return options


def parse_on_beam(options: Any, spool: Spool, files: dict[str, Path], cell: CellOptions, time_limit: float) -> None:
    """Every structure of the source parsed into the spool: one worker cuts it into parts, all parse them."""
    import apache_beam as beam

    if spool.size is not None:
        return
    spool.directory.mkdir(exist_ok=True)
    with beam.Pipeline(options=options) as pipeline:
        _ = (
            pipeline
            | beam.Create([files])
            | "cut" >> beam.FlatMap(_open_parts, spool)
            | beam.Reshuffle()
            | "parse" >> beam.Map(_parse_part, spool, cell, time_limit)
        )
    spool.finish(spool.resume())


def _open_parts(files: dict[str, Path], spool: Spool) -> Iterator[tuple[int, list[Item]]]:
    items = scan_all(files)
    for number in itertools.count():
        part = list(itertools.islice(items, spool.part_size))
        if not part:
            return
        if not spool.part(number).exists():
            yield number, part


def _parse_part(numbered: tuple[int, list[Item]], spool: Spool, cell: CellOptions, time_limit: float) -> None:
    number, items = numbered
    try:
        outcomes = list(parse_all(items, cell, num_workers=1, time_limit=time_limit))
    except WorkersDoNotStart:
        outcomes = list(parse_all(items, cell, num_workers=0))
    with written_whole(spool.part(number)) as beside:
        beside.write_bytes(b"".join(outcomes))


@dataclasses.dataclass
class BeamWorkers:
    """In place of `tasks.Workers`."""

    work: Any
    options: Any

    def run(self, function: Callable[..., None], tasks: Iterable[Task], *settings: Any, description: str) -> None:
        import apache_beam as beam

        open_tasks = [told for done, told in tasks if not done.exists()]
        if open_tasks:
            with beam.Pipeline(options=self.options) as pipeline:
                spread = pipeline | beam.Create(open_tasks) | beam.Reshuffle()
                _ = spread | description >> beam.Map(_call, function, self.work, settings)


def _call(told: Any, function: Callable[..., None], work: Any, settings: Sequence[Any]) -> None:
    function(work, told, *settings)


def build_with_tfds(builder: UniMatBuilder, options: Any, num_shards: int | None) -> Path:
    """The records, shuffled and written by TFDS on Beam."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    settings = tfds.download.DownloadConfig(
        try_download_gcs=False,
        compute_stats=tfds.download.ComputeStatsMode.SKIP,
        num_shards=num_shards,
        beam_options=options,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS tells of downloads that are none
        builder.download_and_prepare(download_dir=str(Path(builder.data_dir).parent / "none"), download_config=settings)
    return Path(builder.data_dir)
