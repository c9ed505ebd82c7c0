"""Training from a config: python -m unimat_jax.main --config=configs/perov_5.py --workdir=runs/perov_5

--config takes a file or the name of a config that comes with the package, "unimat:small" one of its sizes;
--config.SECTION.FIELD=VALUE changes a field. The same --workdir goes on from its latest checkpoint.

--mode=compile --topology=v4:4x4x2 compiles the train step and the sampler for TPUs that need not be there, and tells
whether they fit and what a step costs; --search looks for the largest batch and the best mesh.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from unimat_jax import distributed
from unimat_jax.allocator import restart_with_kept_memory
from unimat_jax.cli import run_program
from unimat_jax.errors import UserError


def config_directory() -> Path:
    """configs/ of the wheel or, in a clone, beside the package."""
    here = Path(__file__).parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def config_path(name: str) -> str:
    """The file of a config given by path or by name. What follows a colon, as in "unimat:small", stays: it goes to the
    file's get_config. Raises UserError that lists the names."""
    known = {path.stem: path for path in sorted(config_directory().glob("*.py")) if path.stem != "__init__"}
    file, colon, choice = name.partition(":")
    if Path(file).is_file():
        return name
    if file in known:
        return f"{known[file]}{colon}{choice}"
    raise UserError(f"--config={name}: no such file, and no config of that name; the names are {', '.join(known)}")


def load_config(arguments: Sequence[str]) -> tuple[Any, str, bool]:
    """(locked config, workdir, help asked) from command-line arguments. Raises UserError for what cannot be."""
    values = parse_flags(arguments)
    return (None, "", True) if values.help else (values.config, values.workdir, False)


def parse_flags(arguments: Sequence[str]) -> flags.FlagValues:
    """All flags; the config is locked. Raises UserError for what cannot be."""
    values = flags.FlagValues()
    resolved = []
    arguments = list(arguments)
    for i, argument in enumerate(arguments):
        name, equals, value = argument.lstrip("-").partition("=")
        if name == "config" and argument.startswith("-") and equals:
            argument = f"--config={config_path(value)}"
        elif i and arguments[i - 1] in ("--config", "-config"):
            argument = config_path(argument)
        resolved.append(argument)
    words = ["unimat train", *resolved]
    # Without sys_argv it would look for the fields to change in the arguments of the process.
    config_flags.DEFINE_config_file("config", help_string="a file or name", flag_values=values, sys_argv=words)
    flags.DEFINE_string("workdir", None, "where checkpoints and metrics go", flag_values=values)
    flags.DEFINE_enum("mode", "train", ["train", "compile"], "what to do", flag_values=values)
    flags.DEFINE_string("topology", None, "TPU slice to compile for", flag_values=values)
    flags.DEFINE_list("programs", ["train_step", "sampler"], "what to compile", flag_values=values)
    flags.DEFINE_boolean("search", False, "compile for the largest batch and the best mesh", flag_values=values)
    flags.DEFINE_string("output", None, "JSON file of the compilation's report", flag_values=values)
    flags.DEFINE_boolean("help", False, "this text", flag_values=values, short_name="h")
    try:
        rest = values(words)[1:]
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, SyntaxError, ImportError) as error:
        cause: BaseException = error  # what a config file raises comes wrapped, with its traceback as text
        while cause.__context__ is not None:
            cause = cause.__context__
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from error
        lines = str(error).strip().splitlines() or [repr(error)]
        said = " ".join(dict.fromkeys((lines[0], lines[-1])))
        raise UserError(f"{said} (fields and their meaning: unimat_jax/default_config.py)") from error
    if rest:
        raise UserError(f"{rest[0]!r} is no flag: write --config=NAME --workdir=DIR --config.SECTION.FIELD=VALUE")
    for name in ("config", "workdir") if values.mode == "train" else ("config",):
        if values[name].value is None and not values.help:
            raise UserError(f"--{name} is missing: unimat train --config=NAME --workdir=DIR")
    if values.mode == "train" and (values.topology or values.search or values.output):
        raise UserError("--topology, --search and --output go with --mode=compile")
    return values


def main(argv: Sequence[str] | None = None) -> int:
    return distributed.launch("unimat_jax.main", sys.argv[1:] if argv is None else argv, _program)


def _program(argv: Sequence[str]) -> int:
    values = parse_flags(argv)
    if values.help:
        names = ", ".join(sorted(p.stem for p in config_directory().glob("*.py") if p.stem != "__init__"))
        print(f"{__doc__}\nflags:\n  --config=FILE or NAME   one of: {names}\n  --workdir=DIR")
        print("  --config.SECTION.FIELD=VALUE   all fields: unimat_jax/default_config.py")
        print("  --mode=compile --topology=SLICE [--programs=train_step,sampler] [--search] [--output=FILE.json]")
        print(distributed.FLAGS)
        return 0
    if values.mode == "compile":
        from unimat_jax.aot import command

        options = {"search": values.search, "output": values.output, "workdir": values.workdir}
        command.run(values.config, topology=values.topology, programs=values.programs, **options)
        return 0
    from unimat_jax.train import train

    train(values.config, values.workdir)
    return 0


if __name__ == "__main__":
    restart_with_kept_memory()
    sys.exit(run_program(main, sys.argv[1:]))
