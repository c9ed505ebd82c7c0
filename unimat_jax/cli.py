"""The console script `unimat`: the package's programs as verbs, and the way all of them end on an error."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO

from unimat_jax.allocator import restart_with_kept_memory
from unimat_jax.errors import UserError

VERBS = {
    "quickstart": ("unimat_jax.quickstart", "train on the crystals in the package, generate some: minutes on a laptop"),
    "prepare": ("data_prep.prepare", "crystal files or a known data set -> sharded UniMat records"),
    "train": ("unimat_jax.main", "a config and records -> checkpoints (the same --workdir resumes)"),
    "generate": ("unimat_jax.generate", "a checkpoint -> crystals as extxyz, CIF and a manifest"),
    "export": (
        "unimat_jax.export",
        "a checkpoint -> safetensors, JSON and a model card, to share and to generate from",
    ),
    "evaluate": ("unimat_jax.evaluate", "metrics of any crystals against real ones, a report to look at"),
    "stability": ("unimat_jax.stability.command", "relaxes crystals: formation energies, distances to the convex hull"),
    "vasp": ("unimat_jax.stability.vasp.command", "crystals -> VASP input sets; finished VASP runs -> the same table"),
    "search": ("unimat_jax.search", "random structures of any composition, alone or against a model's"),
    "check": ("unimat_jax.evaluation.validity", "structure and composition validity of any crystal files"),
    "doctor": ("unimat_jax.doctor.command", "looks at this machine and installation, and says what to do"),
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors, and which takes `-` and `_` in the names of flags alike."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help tells the flags)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        known = {name.replace("-", "_"): name for name in self._option_string_actions}
        words = []
        for word in argv:
            name, equals, value = word.partition("=")
            words.append(known.get(name.replace("-", "_"), name) + equals + value)
        return self.parse_args(words)


def run_program(program: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Runs program(argv) and returns its exit code: 2 with one line on standard error for what the user can fix, 141
    and none where nobody reads standard output any more, as behind `| head`."""
    try:
        code = program(argv) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _nobody_reads(sys.stdout):
            raise  # some other pipe
        # What is left is dropped: Python would try to write it at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _nobody_reads(stream: TextIO) -> bool:
    """Whether `stream` is a pipe whose other end is closed."""
    if not hasattr(select, "poll"):  # Windows
        return False
    ends = select.poll()
    ends.register(stream, 0)  # errors are told without being asked for
    return any(event & select.POLLERR for _, event in ends.poll(0))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `unimat VERB ...`."""
    if argv is None and sys.argv[1:2] == ["train"]:
        restart_with_kept_memory()
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
