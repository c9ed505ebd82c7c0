"""python -m unimat_jax.stability: as `unimat stability`."""

import sys

from unimat_jax.cli import run_program
from unimat_jax.stability.command import main

if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
