"""TFDS builders: parsed crystals -> sharded ArrayRecord files of sparse UniMat records. No TensorFlow is imported.

Read them with `tfds.builder_from_directory(path).as_data_source(split)`; `data_prep.prepare` makes them.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from data_prep.datasets import DATASETS, feature_name
from data_prep.spool import Spool

VERSION = "1.0.0"
SPLITS = ("train", "validation", "test")


class UniMatBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One record a crystal: `material_id`, `slots` uint8 [N, 3] (l, row, column), `frac_coords` float32 [N, 3],
    `lattice` float32 [6] (Angstrom, degrees) and float32 `properties`, NaN where missing."""

    VERSION = tfds.core.Version(VERSION)

    def __init__(
        self, *, spool: Spool, split_of: bytearray, properties: Sequence[str], metadata: dict[str, Any], **kwargs
    ):
        """split_of: for each entry of the spool the index in SPLITS, 255 where it is dropped."""
        self._spool = spool
        self._split_of = split_of
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
        return {SPLITS[index]: self._generate_examples(index) for index in range(3) if index in self._split_of}

    def _generate_examples(self, split: int) -> Iterator[tuple[str, dict[str, Any]]]:
        for outcome, code in zip(self._spool, self._split_of, strict=True):
            if code == split and outcome.record is not None:
                values = {feature_name(name): value for name, value in outcome.properties.items()}
                properties = {name: np.float32(values.get(name, math.nan)) for name in self._properties}
                yield outcome.uid, {"material_id": outcome.uid, **outcome.record, "properties": properties}


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


def build(builder: UniMatBuilder, scratch: Path, num_shards: int | None = None) -> Path:
    """Writes the shards and returns their directory; TFDS wants a `scratch` directory for downloads, of which there are
    none."""
    tfds.disable_progress_bar()
    settings = tfds.download.DownloadConfig(
        try_download_gcs=False, compute_stats=tfds.download.ComputeStatsMode.SKIP, num_shards=num_shards
    )
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS tells of downloads that are none
        builder.download_and_prepare(download_dir=str(scratch), download_config=settings)
    return Path(builder.data_dir)
