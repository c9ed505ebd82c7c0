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
    """train.csv, val.csv and test.csv of data/perov_5 in https://github.com/txie-93/cdvae.

    Checksums: none is published; data_report.json keeps the SHA-256 of what was read (options.source.sha256).
    """

    name = "perov_5"


class Carbon24(UniMatBuilder):
    """train.csv, val.csv and test.csv of data/carbon_24 in https://github.com/txie-93/cdvae; CC-BY 4.0 (Pickard 2020).

    Checksums: none is published; data_report.json keeps the SHA-256 of what was read (options.source.sha256).
    """

    name = "carbon_24"


class Mp20(UniMatBuilder):
    """train.csv, val.csv and test.csv of data/mp_20 in https://github.com/txie-93/cdvae, DiffCSP's copy of them, or
    MatterGen's with other columns: data-release/mp-20/mp_20.zip of https://github.com/microsoft/mattergen, unzipped.
    CC-BY 4.0 (the Materials Project).

    Checksums: MatterGen's git-lfs pointer states 12,254,159 bytes, SHA-256
    5f44d6ad75299b6c08a3679ebcbd166def45c6d7733baacdce3972c2ec452e3a for its mp_20.zip; for CDVAE's files none is
    published: data_report.json keeps that of what was read (options.source.sha256).
    """

    name = "mp_20"


class AlexMp20(UniMatBuilder):
    """train.csv and val.csv of MatterGen (some 600,000 crystals), CC-BY 4.0.

    git clone https://github.com/microsoft/mattergen && cd mattergen
    git lfs pull -I data-release/alex-mp/alex_mp_20.zip --exclude=""
    sha256sum data-release/alex-mp/alex_mp_20.zip
    unzip data-release/alex-mp/alex_mp_20.zip -d datasets
    unimat prepare --dataset=alex_mp_20 --source=datasets/alex_mp_20 --data_dir=data

    Checksum: the git-lfs pointer states 186,506,244 bytes, SHA-256
    6688e652e45fac4ac8b016dbc4a3280afde9ba687bdacfd8c676775ed19b6228.
    """

    name = "alex_mp_20"


class Gnome(UniMatBuilder):
    """stable_materials_summary.csv (some 150 MB) and by_id.zip (some 450 MB), CC BY-NC 4.0: no commercial use.

    for f in stable_materials_summary.csv by_id.zip; do
      curl -O https://storage.googleapis.com/gdm_materials_discovery/gnome_data/$f; done
    unimat prepare --dataset=gnome --source=. --data_dir=data

    The rows of the CSV are joined with the CIFs by MaterialId; its other columns (composition, symmetry, total
    energies) are left out. The set has grown from 381,000 to more than 520,000 crystals (August 2024).
    Checksums: none is published; data_report.json keeps the SHA-256 of what was read (options.source.sha256).
    """

    name = "gnome"


class Alexandria(UniMatBuilder):
    """alexandria_*.json.bz2, PBE, three-dimensional crystals: {"entries": [ComputedStructureEntry, ...]}, CC-BY 4.0.

    wget -r -np -nd -A 'alexandria_*.json.bz2' https://alexandria.icams.rub.de/data/pbe/2025.07.02/ -P alexandria
    unimat prepare --dataset=alexandria --source=alexandria --data_dir=data

    A directory for a date is one version of the database; they are read one entry at a time. Ids are `mat_id`.
    Checksums: none is published; data_report.json keeps the SHA-256 of what was read (options.source.sha256).
    """

    name = "alexandria"


class AlexandriaPbesol(UniMatBuilder):
    """alexandria_ps_*.json.bz2 from https://alexandria.icams.rub.de/data/pbesol/: as Alexandria, in PBEsol."""

    name = "alexandria_pbesol"


class AlexandriaScan(UniMatBuilder):
    """alexandria_scan_*.json.bz2 from https://alexandria.icams.rub.de/data/scan/: as Alexandria, SCAN at the geometries
    of PBEsol."""

    name = "alexandria_scan"


class Mpts52(UniMatBuilder):
    """train.csv, val.csv and test.csv of data/mpts_52 in https://github.com/jiaor17/DiffCSP; CC-BY 4.0 (the Materials
    Project).

    Checksums: none is published; data_report.json keeps the SHA-256 of what was read (options.source.sha256).
    """

    name = "mpts_52"


class Starter(UniMatBuilder):
    """Comes with the package."""

    name = "starter"


class Crystals(UniMatBuilder):
    """Any files of the user."""

    name = "crystals"


_ALL = (
    Perov5,
    Carbon24,
    Mp20,
    AlexMp20,
    Gnome,
    Alexandria,
    AlexandriaPbesol,
    AlexandriaScan,
    Mpts52,
    Starter,
    Crystals,
)
BUILDERS = {builder.name: builder for builder in _ALL}
