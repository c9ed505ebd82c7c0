"""The other side of benchmarks/fingerprints.py: CDVAE's fingerprints by matminer, run by an environment that has it.

python with_matminer.py CRYSTALS.json RESULT.json NUM_PROCESSES   (started by the benchmark)

What CDVAE's `compute_metrics.py` does for each crystal to fingerprint it, spread by a pool of processes as it does.
"""

import json
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
from matminer.featurizers.composition.composite import ElementProperty  # pyright: ignore[reportMissingImports]
from matminer.featurizers.site.fingerprint import CrystalNNFingerprint  # pyright: ignore[reportMissingImports]
from pymatgen.core import Composition, Lattice, Structure

STRUCTURE = CrystalNNFingerprint.from_preset("ops")
COMPOSITION = ElementProperty.from_preset("magpie")


def fingerprint(crystal: dict) -> tuple[list | None, list]:
    """(structure fingerprint or None, composition fingerprint)."""
    warnings.simplefilter("ignore")
    numbers = crystal["atomic_numbers"]
    structure = Structure(Lattice(crystal["lattice"]), numbers, crystal["frac_coords"])
    composition = [float(x) for x in COMPOSITION.featurize(Composition(Counter(numbers)))]
    try:
        sites = [STRUCTURE.featurize(structure, site) for site in range(len(structure))]
    except Exception:  # CDVAE counts such a crystal as invalid
        return None, composition
    return np.array(sites).mean(axis=0).tolist(), composition


def main(source: str, target: str, num_processes: str) -> None:
    crystals = json.loads(Path(source).read_text(encoding="utf-8"))
    begin = time.perf_counter()
    with multiprocessing.get_context("fork").Pool(int(num_processes)) as pool:  # imports are done: they do not count
        found = pool.map(fingerprint, crystals, chunksize=1)
    seconds = time.perf_counter() - begin
    versions = {name: version(name) for name in ("matminer", "pymatgen", "numpy", "scipy")}
    result = {
        "seconds": seconds,
        "struct": [struct for struct, _ in found],
        "comp": [comp for _, comp in found],
        "versions": versions,
    }
    Path(target).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
