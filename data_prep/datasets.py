"""What is known of each data set: where its splits are, what its columns mean, and who made it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from unimat_jax.errors import UserError
from unimat_jax.structure_files import RawStructure, scan


@dataclasses.dataclass(frozen=True)
class Column:
    """Meaning of a property column. functional and correction are for energies; "" where they do not apply."""

    unit: str = "unknown"
    functional: str = ""
    correction: str = ""

    def to_json(self) -> dict[str, str]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class DataSet:
    """columns: None keeps every numeric column of the source, else only these."""

    description: str
    citation: str = ""
    licence: str = ""
    columns: dict[str, Column] | None = None
    notes: tuple[str, ...] = ()


_MP_ENERGY = Column("eV/atom", "PBE, PBE+U for some oxides and fluorides", "Materials Project legacy (before MP2020)")
_MP_COLUMNS = {
    "formation_energy_per_atom": _MP_ENERGY,
    "e_above_hull": _MP_ENERGY,
    "energy_above_hull": _MP_ENERGY,
    "band_gap": Column("eV", "PBE, PBE+U for some oxides and fluorides"),
}
_MP_CITATION = """@article{jain2013materialsproject, title={Commentary: The Materials Project},
author={Jain, Anubhav and others}, journal={APL Materials}, volume={1}, pages={011002}, year={2013}}"""
_CDVAE_CITATION = """@inproceedings{xie2022crystal, title={Crystal Diffusion Variational Autoencoder for Periodic
Material Generation}, author={Xie, Tian and others}, booktitle={ICLR}, year={2022}}"""
_CASTELLI = "RPBE (GPAW)"
_CASTELLI_HULL = "relative to a pool of competing phases, oxygen from water vapour (Castelli et al. 2012)"

DATASETS = {
    "perov_5": DataSet(
        "Perov-5: perovskites ABX3 with 5 atoms in the cell (Castelli et al. 2012), in CDVAE's splits.",
        _CDVAE_CITATION,
        "data: Castelli et al., Energy Environ. Sci. 5, 9034 (2012), through CDVAE (MIT)",
        {
            "heat_all": Column("eV/atom", _CASTELLI, _CASTELLI_HULL),
            "heat_ref": Column("eV/atom", _CASTELLI, "relative to a pool of reference phases (Castelli et al. 2012)"),
            "e_form": Column("eV/atom", _CASTELLI, "matbench_perovskites: mostly heat_all, some nearer heat_ref"),
            "dir_gap": Column("eV", "GLLB-SC"),
            "ind_gap": Column("eV", "GLLB-SC"),
        },
    ),
    "carbon_24": DataSet(
        "Carbon-24: carbon crystals with 6 to 24 atoms from random search at 10 GPa (Pickard 2020), in CDVAE's splits.",
        _CDVAE_CITATION,
        "CC-BY 4.0: C. J. Pickard, AIRSS data for carbon at 10 GPa, Materials Cloud (2020)",
        {"energy_per_atom": Column("eV/atom", "unknown", "none (total energies)")},
    ),
    "mp_20": DataSet(
        "MP-20: Materials Project crystals with at most 20 atoms in the cell, in CDVAE's splits.",
        _CDVAE_CITATION,
        "CC-BY 4.0: the Materials Project",
        _MP_COLUMNS,
    ),
    "mpts_52": DataSet(
        "MPTS-52: Materials Project crystals with at most 52 atoms in the cell, split by the year of their report.",
        _MP_CITATION,
        "CC-BY 4.0: the Materials Project",
        _MP_COLUMNS,
    ),
    "starter": DataSet(
        "Starter: 3,420 Materials Project crystals with at most 20 atoms, in the package (matminer 0.4.0, flla_2015).",
        _MP_CITATION,
        "CC-BY 4.0: the Materials Project; compiled by matminer (BSD-3)",
        {
            "formation_energy_per_atom": Column(
                "eV/atom", "PBE, PBE+U for some oxides and fluorides", "Materials Project 2015"
            ),
            "e_above_hull": Column("eV/atom", "PBE, PBE+U for some oxides and fluorides", "Materials Project 2015"),
        },
    ),
    "crystals": DataSet("Crystals: structures given by the user."),
}

_SPLIT_FILES = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
_SUFFIXES = (".csv", ".csv.gz", ".npz", ".parquet")


def source_files(dataset: str, source: str | None) -> dict[str, Path]:
    """Split -> file or directory; the split is "" where a seed or a file of ids decides. Raises UserError."""
    if dataset not in DATASETS:
        raise UserError(f"--dataset={dataset}: choose one of {', '.join(DATASETS)} ('crystals' reads your own files)")
    if dataset == "starter":
        if source is not None:
            raise UserError(f"--source={source}: the starter data are in the package, leave --source out")
        import unimat_jax.starter

        return {"": Path(str(unimat_jax.starter.__file__)).parent / "starter.npz"}
    if source is None:
        raise UserError(f"--dataset={dataset} needs --source: the directory or file with the crystals")
    path = Path(source)
    if not path.exists():
        raise UserError(f"--source={source} does not exist")
    if dataset == "crystals":
        return {"": path}
    if not path.is_dir():
        raise UserError(
            f"--source={source} is a file: --dataset={dataset} needs the directory with train.csv, val.csv, test.csv"
        )
    found = {}
    for split, stems in _SPLIT_FILES.items():
        stems = (*stems, "train_partial") if split == "train" else stems
        choices = [path / f"{stem}{suffix}" for stem in stems for suffix in _SUFFIXES]
        file = next((choice for choice in choices if choice.exists()), None)
        if file:
            found[split] = file
    if not found:
        held = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise UserError(
            f"--source={source} holds {held}: --dataset={dataset} needs train / val / test as .csv, .npz or .parquet"
        )
    return found


def notes_of(dataset: str, files: dict[str, Path]) -> list[str]:
    notes = list(DATASETS[dataset].notes)
    notes += ["partial train: not the whole train split" for p in files.values() if "partial" in p.name]
    missing = [] if "" in files else [split for split in _SPLIT_FILES if split not in files]
    return notes + [f"no {split} split in the source" for split in missing]


def scan_all(files: dict[str, Path]) -> Iterator[tuple[str, RawStructure]]:
    """(split, raw structure) of every file, in order."""
    for split, path in files.items():
        for raw in scan(path):
            yield split, raw


def feature_name(column: str) -> str:
    """A column's name as TFDS allows it."""
    return re.sub(r"\W+", "_", column).strip("_") or "column"
