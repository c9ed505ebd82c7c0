"""The console script `unimat`: the package's programs as verbs, and the way all of them end on an error."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

VERBS = {
    "quickstart": ("unimat_jax.quickstart", "train on the crystals in the package, then generate some: minutes on a laptop"),
    "prepare": ("data_prep.prepare", "crystal files or a known data set -> sharded UniMat records"),
    "train": ("unimat_jax.main", "a config and records -> checkpoints (the same --workdir resumes)"),
    "generate": ("unimat_jax.generate", "a checkpoint -> crystals as extxyz, CIF and a manifest"),
    "check": ("unimat_jax.evaluation.validity", "structure and composition validity of any crystal files"),
}


def run_program(program: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Runs program(argv) and returns its exit code: 2 with one line on standard error for what the user can fix."""
    from unimat_jax.errors import UserError

    try:
        return program(argv) or 0
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `unimat VERB ...`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--version"]:
        from unimat_jax import __version__

        print(f"unimat-jax {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("usage: unimat VERB [flags]   (unimat VERB --help tells the flags)\n")
        for verb, (_, summary) in VERBS.items():
            print(f"  {verb:<12}{summary}")
        return 0
    if argv[0] not in VERBS:
        print(f"error: {argv[0]!r} is no verb of unimat: choose from {', '.join(VERBS)}", file=sys.stderr)
        return 2
    program = importlib.import_module(VERBS[argv[0]][0]).main
    return run_program(program, argv[1:])


if __name__ == "__main__":
    sys.exit(main())
