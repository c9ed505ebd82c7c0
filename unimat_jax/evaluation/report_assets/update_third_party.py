"""Remakes the third-party files of this folder from npm.

    python -m unimat_jax.evaluation.report_assets.update_third_party

Needs `npm` on PATH and network. For another version change VERSION and SHA256, run, and look at a report in a browser.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

VERSION = "2.5.5"
SHA256 = "f7cc78921ae72e7623e89cdd111434f58c2efddd2ffda1cd212644b406fb8016"
"""Of 3Dmol-min.js."""
HERE = Path(__file__).parent
SCRIPT, LICENCES = "3Dmol-min.js", "3Dmol-licences.txt"


def update(folder: Path) -> None:
    """Writes the minified script, and the licences of 3Dmol.js and of the packages that its build includes."""
    with tempfile.TemporaryDirectory() as scratch:
        npm = ["npm", "install", "--prefix", scratch, "--ignore-scripts", "--no-audit", "--no-fund"]
        subprocess.run([*npm, f"3dmol@{VERSION}"], check=True)
        packages = Path(scratch) / "node_modules"
        script = (packages / "3dmol" / "build" / SCRIPT).read_bytes()
        found = hashlib.sha256(script).hexdigest()
        if found != SHA256:
            sys.exit(f"{SCRIPT} of 3dmol {VERSION} has the SHA-256 {found}, not {SHA256}: find out why before using it")
        names = sorted(path.name for path in packages.iterdir() if not path.name.startswith("."))  # 3dmol is the first
        texts = [f"{name}\n\n{(packages / name / 'LICENSE').read_text(encoding='utf-8').strip()}\n" for name in names]
    (folder / SCRIPT).write_bytes(script)
    (folder / LICENCES).write_text("\n----\n\n".join(texts).expandtabs(4), encoding="utf-8")


if __name__ == "__main__":
    update(HERE)
