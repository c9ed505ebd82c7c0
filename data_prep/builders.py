"""What TFDS has to know of the data sets, and the files in which it keeps that. No TensorFlow is imported.

Read them with `tfds.builder_from_directory(path).as_data_source(split)`; `data_prep.prepare` makes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.splits import SplitDict

from data_prep.choosing import Work, merged_summary
from data_prep.datasets import DATASETS, feature_name
from data_prep.shards import SPLITS, VERSION


class UniMatBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One record a crystal: `material_id`, `slots` uint8 [N, 3] (l, row, column), `frac_coords` float32 [N, 3],
    `lattice` float32 [6] (Angstrom, degrees) and float32 `properties`, NaN where missing."""

    VERSION = tfds.core.Version(VERSION)

    def __init__(self, *, work: Work, properties: Sequence[str], metadata: dict[str, Any], **kwargs):
        self._work = work
        self._properties = tuple(properties)
        self._about = metadata
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        known = DATASETS[self.name]
        scalar = tfds.features.Scalar(dtype=np.float32)
        features = {
            "material_id": tfds.features.Text(),
            "slots": tfds.features.Tensor(shape=(None, 3), dtype=np.uint8),
            "frac_coords": tfds.features.Tensor(shape=(None, 3), dtype=np.float32),
            "lattice": tfds.features.Tensor(shape=(6,), dtype=np.float32),
            "properties": tfds.features.FeaturesDict({name: scalar for name in self._properties}),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=known.description,
            features=tfds.features.FeaturesDict(features),
            citation=known.citation,
            license=known.licence,
            metadata=tfds.core.MetadataDict(self._about),
        )

    def _split_generators(self, dl_manager):
        """For Apache Beam; on one machine `data_prep.shards` writes the records."""
        kept = merged_summary(self._work).kept_of_split
        return {split: self._generate_examples(index) for index, split in enumerate(SPLITS) if kept[index]}

    def _generate_examples(self, split: int):
        import apache_beam as beam

        parts = beam.Create(range(self._work.spool.num_parts)) | beam.Reshuffle()
        return parts | beam.FlatMap(examples_of_part, self._work, split, self._properties)

    def write_info(self, directory: Path, splits: Mapping[str, tuple[Sequence[int], int]]) -> None:
        """dataset_info.json, features.json and metadata of the shards in `directory`. splits: name -> number of records
        in each shard, and bytes of all."""
        infos = [
            tfds.core.SplitInfo(
                name=name,
                shard_lengths=list(lengths),
                num_bytes=num_bytes,
                filename_template=self._get_filename_template(name),
            )
            for name, (lengths, num_bytes) in splits.items()
        ]
        self.info.set_splits(SplitDict(infos))
        self.info.write_to_directory(directory)


def examples_of_part(
    part: int, work: Work, split: int, properties: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, example) of each chosen structure, as TFDS takes them."""
    for outcome, found, _, _ in work.judged(part):
        if found == split and outcome.record is not None:
            values = {feature_name(name): value for name, value in outcome.properties.items()}
            chosen = {name: np.float32(values.get(name, math.nan)) for name in properties}
            yield outcome.uid, {"material_id": outcome.uid, **outcome.record, "properties": chosen}


class Perov5(UniMatBuilder):
    name = "perov_5"


class Carbon24(UniMatBuilder):
    name = "carbon_24"


class Mp20(UniMatBuilder):
    name = "mp_20"


class Mpts52(UniMatBuilder):
    name = "mpts_52"


class Starter(UniMatBuilder):
    name = "starter"


class Crystals(UniMatBuilder):
    name = "crystals"


BUILDERS = {builder.name: builder for builder in (Perov5, Carbon24, Mp20, Mpts52, Starter, Crystals)}
