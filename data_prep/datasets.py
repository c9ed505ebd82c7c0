"""What is known of each data set: where its splits are, what its columns mean, and who made it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.gnome import ARCHIVE, SUMMARY, scan_gnome
from data_prep.gnome import COLUMNS as GNOME_COLUMNS
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
    """columns: None keeps every numeric column of the source, else only these. download: where the source is got from.
    files: a regular expression for the names of the source's files; "" for those of one split each."""

    description: str
    citation: str = ""
    licence: str = ""
    columns: dict[str, Column] | None = None
    notes: tuple[str, ...] = ()
    download: str = ""
    files: str = ""


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
_CASTELLI_CITATION = """@article{castelli2012new, title={New cubic perovskites for one- and two-photon water splitting
using the computational materials repository}, author={Castelli, Ivano E. and Landis, David D. and Thygesen, Kristian S.
and Dahl, S{\\o}ren and Chorkendorff, Ib and Jaramillo, Thomas F. and Jacobsen, Karsten W.}, journal={Energy \\&
Environmental Science}, volume={5}, pages={9034--9043}, year={2012}, doi={10.1039/C2EE22341D}}"""
_PICKARD_CITATION = """@misc{pickard2020airss, title={AIRSS data for carbon at 10GPa and the C+N+H+O system at 1GPa},
author={Pickard, Chris J.}, howpublished={Materials Cloud Archive 2020.0026/v1}, year={2020},
doi={10.24435/materialscloud:2020.0026/v1}}"""
_GNOME_ENERGY = Column("eV/atom", "PBE", "MP2020")
_GNOME_CITATION = """@article{merchant2023scaling, title={Scaling deep learning for materials discovery},
author={Merchant, Amil and Batzner, Simon and Schoenholz, Samuel S. and Aykol, Muratahan and Cheon, Gowoon and
Cubuk, Ekin Dogus}, journal={Nature}, year={2023}, doi={10.1038/s41586-023-06735-9}}"""
_MATTERGEN_CITATION = """@article{zeni2025generative, title={A generative model for inorganic materials design},
author={Zeni, Claudio and others}, journal={Nature}, year={2025}, doi={10.1038/s41586-025-08628-5}}"""
_ALEXANDRIA_CITATION = """@article{schmidt2023machine, title={Machine-Learning-Assisted Determination of the Global
Zero-Temperature Phase Diagram of Materials}, author={Schmidt, Jonathan and others}, journal={Advanced Materials},
year={2023}, doi={10.1002/adma.202210788}}"""
_MATTERGEN_COLUMNS = {
    "energy_above_hull": Column("eV/atom", "PBE", "unknown"),
    "formation_energy_per_atom": Column("eV/atom", "PBE", "unknown"),
    "dft_band_gap": Column("eV", "PBE"),
    "dft_mag_density": Column("1/A^3", "PBE"),
    "dft_bulk_modulus": Column("GPa", "PBE"),
    "dft_shear_modulus": Column("GPa", "PBE"),
    "ml_bulk_modulus": Column("GPa"),
    "hhi_score": Column("1"),
}
_CDVAE_DOWNLOAD = "the folder of the same name in data/ of https://github.com/txie-93/cdvae"


def _alexandria(functional: str, folder: str, infix: str) -> DataSet:
    energy = Column("eV/atom", functional, "unknown: see correction and energy_corrected of each entry")
    return DataSet(
        f"Alexandria: relaxed crystals, {functional}, as entries of pymatgen.",
        _ALEXANDRIA_CITATION,
        "CC-BY 4.0: the Alexandria database (Schmidt, Marques, Botti et al.)",
        {
            "e_form": energy,
            "e_above_hull": energy,
            "e_phase_separation": energy,
            "band_gap_ind": Column("eV", functional),
            "band_gap_dir": Column("eV", functional),
            "total_mag": Column("Bohr magnetons in the cell", functional),
            "dos_ef": Column("states/eV in the cell", functional),
        },
        download=f"alexandria{infix}_*.json.bz2 from https://alexandria.icams.rub.de/data/{folder}/",
        files=rf"alexandria{infix}_\d+\.json(\.bz2|\.gz)?",
    )


_CASTELLI = "RPBE (GPAW)"
_CASTELLI_HULL = "relative to a pool of competing phases, oxygen from water vapour (Castelli et al. 2012)"

DATASETS = {
    "perov_5": DataSet(
        "Perov-5: perovskites ABX3 with 5 atoms in the cell (Castelli et al. 2012), in CDVAE's splits.",
        f"{_CASTELLI_CITATION}\n{_CDVAE_CITATION}",
        "data: Castelli et al., Energy Environ. Sci. 5, 9034 (2012), doi:10.1039/C2EE22341D, through CDVAE (MIT)",
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
        f"{_PICKARD_CITATION}\n{_CDVAE_CITATION}",
        "CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/): C. J. Pickard, AIRSS data for carbon at 10GPa and "
        "the C+N+H+O system at 1GPa, Materials Cloud Archive 2020.0026/v1 (2020), "
        "doi:10.24435/materialscloud:2020.0026/v1, of which CDVAE (MIT) chose a tenth",
        {"energy_per_atom": Column("eV/atom", "unknown", "none (total energies)")},
    ),
    "mp_20": DataSet(
        "MP-20: Materials Project crystals with at most 20 atoms in the cell, in CDVAE's splits.",
        _CDVAE_CITATION,
        "CC-BY 4.0: the Materials Project",
        _MATTERGEN_COLUMNS | _MP_COLUMNS,
        download=_CDVAE_DOWNLOAD,
    ),
    "alex_mp_20": DataSet(
        "Alex-MP-20: Alexandria and MP-20, at most 20 atoms, at most 0.1 eV/atom above the hull (MatterGen).",
        _MATTERGEN_CITATION,
        "CC-BY 4.0: Schmidt et al., Materials Cloud 2022.126, and the Materials Project; through MatterGen (MIT)",
        _MATTERGEN_COLUMNS,
        download="data-release/alex-mp/alex_mp_20.zip of https://github.com/microsoft/mattergen (git-lfs), unzipped",
    ),
    "gnome": DataSet(
        "GNoME: crystals at most 1 meV/atom above the hull of the Materials Project and others (Merchant et al. 2023).",
        _GNOME_CITATION,
        "CC BY-NC 4.0 (no commercial use): Graph Networks for Materials Exploration Database, Google LLC (2023)",
        {name: Column("eV", "PBE") if name == "band_gap" else _GNOME_ENERGY for name in GNOME_COLUMNS.values()},
        download=f"{SUMMARY} and {ARCHIVE} of https://storage.googleapis.com/gdm_materials_discovery/gnome_data/",
    ),
    "alexandria": _alexandria("PBE", "pbe", ""),
    "alexandria_pbesol": _alexandria("PBEsol", "pbesol", "_ps"),
    "alexandria_scan": _alexandria("SCAN", "scan", "_scan"),
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
    known = DATASETS[dataset]
    where = f": get {known.download}" if known.download else ""
    if not path.exists():
        raise UserError(f"--source={source} does not exist{where}")
    if dataset == "crystals":
        return {"": path}
    if dataset == "gnome":
        missing = [name for name in (SUMMARY, ARCHIVE) if not (path / name).is_file()]
        if missing:
            raise UserError(f"--source={source} lacks {' and '.join(missing)}{where}")
        return {"": path}
    if known.files:
        return {"": _of_one_kind(dataset, path, where)}
    if not path.is_dir():
        unzip = ": unzip it first" if path.suffix == ".zip" else ""
        raise UserError(
            f"--source={source} is a file{unzip}: --dataset={dataset} needs the directory with train.csv, val.csv, "
            f"test.csv{where}"
        )
    found = {}
    for split, stems in _SPLIT_FILES.items():
        stems = (*stems, "train_partial") if split == "train" else stems
        choices = [path / f"{stem}{suffix}" for stem in stems for suffix in _SUFFIXES]
        file = next((choice for choice in choices if choice.exists()), None)
        if file:
            found[split] = file
    if not found:
        raise UserError(
            f"--source={source} holds {_held(path)}: --dataset={dataset} needs train / val / test as .csv, .npz or "
            f".parquet{where}"
        )
    return found


def _of_one_kind(dataset: str, path: Path, where: str) -> Path:
    """The path, where all that it holds of Alexandria is of this data set: other functionals are other energies."""
    names = [path.name] if path.is_file() else [p.name for p in path.iterdir()]
    if not any(re.fullmatch(DATASETS[dataset].files, name) for name in names):
        held = path.name if path.is_file() else _held(path)
        raise UserError(f"--source={path} holds {held}: --dataset={dataset} needs other files{where}")
    others = [n for n in names if n.startswith("alexandria") and not re.fullmatch(DATASETS[dataset].files, n)]
    if others:
        raise UserError(
            f"--source={path} holds {others[0]} too, which is not of --dataset={dataset}: put it in another directory"
        )
    return path


def _held(path: Path) -> str:
    return ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"


def notes_of(dataset: str, files: dict[str, Path]) -> list[str]:
    notes = list(DATASETS[dataset].notes)
    notes += ["partial train: not the whole train split" for p in files.values() if "partial" in p.name]
    missing = [] if "" in files else [split for split in _SPLIT_FILES if split not in files]
    return notes + [f"no {split} split in the source" for split in missing]


def scan_all(files: dict[str, Path]) -> Iterator[tuple[str, RawStructure]]:
    """(split, raw structure) of every file, in order."""
    for split, path in files.items():
        for raw in scan_gnome(path) if (path / SUMMARY).is_file() else scan(path):
            yield split, raw


def feature_name(column: str) -> str:
    """A column's name as TFDS allows it."""
    return re.sub(r"\W+", "_", column).strip("_") or "column"
