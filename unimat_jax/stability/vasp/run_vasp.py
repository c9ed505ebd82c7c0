"""One structure as the Materials Project runs it: two relaxations, then a static point, watched over by custodian.

python run_vasp.py FOLDER --vasp_cmd="srun vasp_std"

Needs custodian and pymatgen (pip install 'unimat-jax[vasp]'), and nothing else of unimat-jax. Leaves
vasprun.xml.relax1, .relax2 and .static; run again, it goes on after the last of the three that is finished.
"""

import argparse
import shlex
import sys
from pathlib import Path

STAGES = ("relax1", "relax2", "static")


def finished(folder: Path, stage: str) -> bool:
    return any((folder / f"vasprun.xml.{stage}{end}").is_file() for end in ("", ".gz"))


def jobs(folder: Path, vasp_cmd: list[str]):
    """custodian's jobs that are left to do; each is made when the one before it is done."""
    from custodian.vasp.jobs import VaspJob  # pyright: ignore[reportMissingImports]
    from pymatgen.core import Structure
    from pymatgen.io.vasp.sets import MPStaticSet

    before = ""
    for stage in STAGES:
        if not finished(folder, stage):
            settings = []
            if before:  # from where the last stage ended
                settings.append({"file": f"CONTCAR.{before}", "action": {"_file_copy": {"dest": "POSCAR"}}})
            if stage == "static":
                relaxed = Structure.from_str((folder / f"CONTCAR.{before}").read_text(), fmt="poscar")
                (folder / "KPOINTS.static").write_text(f"{MPStaticSet(relaxed).kpoints}\n")
                for name in ("INCAR", "KPOINTS"):
                    settings.append({"file": f"{name}.static", "action": {"_file_copy": {"dest": name}}})
            yield VaspJob(vasp_cmd, suffix=f".{stage}", final=stage == "static", backup=not before,
                          settings_override=settings or None)  # fmt: skip
        before = stage


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vasp_cmd", required=True, help='as "srun vasp_std"')
    parser.add_argument("--max_errors", type=int, default=10)
    parser.add_argument("--gzip", action="store_true", help="everything, when all is done")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if finished(folder, STAGES[-1]):
        print(f"{folder}: done before")
        return 0
    if not (folder / "POTCAR").is_file():
        sys.exit(f"{folder} has no POTCAR: make one from POTCAR.spec with your licence: `pmg potcar -r {folder}`, or "
                 "`unimat vasp inputs` again where PMG_VASP_PSP_DIR is set")  # fmt: skip

    from custodian import Custodian  # pyright: ignore[reportMissingImports]
    from custodian.vasp import handlers, validators  # pyright: ignore[reportMissingImports]

    names = ("VaspErrorHandler", "MeshSymmetryErrorHandler", "UnconvergedErrorHandler", "NonConvergingErrorHandler",
             "PotimErrorHandler", "PositiveEnergyErrorHandler", "FrozenJobErrorHandler", "StdErrHandler",
             "LargeSigmaHandler", "IncorrectSmearingHandler")  # fmt: skip
    Custodian(
        [getattr(handlers, name)() for name in names],
        jobs(folder, shlex.split(arguments.vasp_cmd)),
        validators=[validators.VasprunXMLValidator(), validators.VaspFilesValidator()],
        max_errors=arguments.max_errors,
        polling_time_step=1,
        monitor_freq=300,
        directory=str(folder),
        gzipped_output=arguments.gzip,
    ).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
