"""Remakes unimat_jax/evaluation/magpie_data/elements.json from the wheel of matminer 0.10.1 on PyPI and pymatgen.

python -m data_prep.make_magpie [--wheel=matminer-0.10.1-py3-none-any.whl] [--output=elements.json]
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimat_jax.cli import Parser, run_program
from unimat_jax.errors import UserError
from unimat_jax.periodic_table import MAX_ATOMIC_NUMBER, SYMBOLS

WHEEL_SHA256 = "eb66571c2a961b996855fa2a4cc90a67bdc7a12fa24e254e02681910c3f2e31f"
TABLES = "matminer/utils/data_files/magpie_elementdata"
OUTPUT = Path(__file__).parents[1] / "unimat_jax" / "evaluation" / "magpie_data" / "elements.json"
PROPERTIES = (
    *("Number", "MendeleevNumber", "AtomicWeight", "MeltingT", "Column", "Row", "CovalentRadius", "Electronegativity"),
    *("NsValence", "NpValence", "NdValence", "NfValence", "NValence"),
    *("NsUnfilled", "NpUnfilled", "NdUnfilled", "NfUnfilled", "NUnfilled"),
    *("GSvolume_pa", "GSbandgap", "GSmagmom", "SpaceGroupNumber"),
)
"""Of matminer's preset "magpie", in its order."""


def download(directory: Path) -> Path:
    """The wheel, fetched by pip. Raises UserError with pip's last line."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "matminer==0.10.1"]
    done = subprocess.run([*command, "--dest", str(directory)], capture_output=True, text=True, check=False)
    wheel = directory / "matminer-0.10.1-py3-none-any.whl"
    if not wheel.exists():
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise UserError(f"pip could not fetch matminer 0.10.1 ({last}): fetch it elsewhere and give --wheel=PATH")
    return wheel


def read_wheel(wheel: Path) -> dict[str, list[float | None]]:
    """Each property's values for Z = 1..118, None where the table has none. Raises UserError for another wheel."""
    if not wheel.is_file():
        raise UserError(f"--wheel={wheel} does not exist")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise UserError(f"--wheel={wheel} has SHA-256 {digest}, the wheel of matminer 0.10.1 has {WHEEL_SHA256}")
    values = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in PROPERTIES:
            lines = archive.read(f"{TABLES}/{name}.table").decode().splitlines()
            values[name] = [_number(lines[z]) if z < len(lines) else None for z in range(MAX_ATOMIC_NUMBER)]
    return values


def _number(line: str) -> float | None:
    try:
        value = float(line)
    except ValueError:  # "Missing", "NA"
        return None
    return None if math.isnan(value) else int(value) if value == int(value) else value


def read_pymatgen() -> dict[str, list[float | None]]:
    """Pauling's electronegativities, and CrystalNN's radii (Angstrom) of atoms without an oxidation state."""
    from pymatgen.analysis.molecule_structure_comparator import CovalentRadius
    from pymatgen.core import Element

    pauling, radii = [], []
    for symbol in SYMBOLS[1:]:
        element = Element(symbol)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the elements without a value, which are written as null
            pauling.append(None if math.isnan(element.X) else float(element.X))
            radius = CovalentRadius.radius.get(symbol, element.atomic_radius)
        radii.append(None if radius is None else float(radius))
    return {"pauling_electronegativity": pauling, "crystalnn_radius": radii}


def write(path: Path, values: dict[str, Any]) -> None:
    """One list a line, so that a change shows."""
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes elements.json. The constants of CDVAE's scaler, which no package holds, come from the file as it is."""
    parser = Parser(prog="python -m data_prep.make_magpie", description=main.__doc__)
    parser.add_argument("--wheel", type=Path, help="matminer-0.10.1-py3-none-any.whl (default: pip fetches it)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse(sys.argv[1:] if argv is None else argv)
    old = json.loads(OUTPUT.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as directory:
        tables = read_wheel(arguments.wheel or download(Path(directory)))
    scaler = {name: old[name] for name in ("cdvae_scaler_means", "cdvae_scaler_stds")}
    write(arguments.output, {**tables, **read_pymatgen(), **scaler})
    print(f"written: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
