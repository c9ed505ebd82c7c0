"""python -m unimat_jax.stability.vasp: as `unimat vasp`."""

import sys

from unimat_jax.cli import run_program
from unimat_jax.stability.vasp.command import main

if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
