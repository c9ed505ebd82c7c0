"""Training from a config: python -m unimat_jax.main --config=configs/perov_5.py --workdir=runs/perov_5

--config takes a file or the name of a config that comes with the package; --config.SECTION.FIELD=VALUE changes a field.
The same --workdir goes on from its latest checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from unimat_jax.cli import run_program
from unimat_jax.errors import UserError


def config_directory() -> Path:
    """configs/ of the wheel or, in a clone, beside the package."""
    here = Path(__file__).parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def config_path(name: str) -> str:
    """The file of a config given by path or by name. Raises UserError that lists the names."""
    known = {path.stem: path for path in sorted(config_directory().glob("*.py")) if path.stem != "__init__"}
    if Path(name).is_file():
        return name
    if name in known:
        return str(known[name])
    raise UserError(f"--config={name}: no such file, and no config of that name; the names are {', '.join(known)}")


def load_config(arguments: Sequence[str]) -> tuple[Any, str, bool]:
    """(locked config, workdir, help asked) from command-line arguments. Raises UserError for what cannot be."""
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
    flags.DEFINE_boolean("help", False, "this text", flag_values=values, short_name="h")
    try:
        rest = values(words)[1:]
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, SyntaxError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{str(error).strip()} (fields and their meaning: unimat_jax/default_config.py)") from error
    if rest:
        raise UserError(f"{rest[0]!r} is no flag: write --config=NAME --workdir=DIR --config.SECTION.FIELD=VALUE")
    if values.help:
        return None, "", True
    for name in ("config", "workdir"):
        if values[name].value is None:
            raise UserError(f"--{name} is missing: unimat train --config=NAME --workdir=DIR")
    return values.config, values.workdir, False


def main(argv: Sequence[str] | None = None) -> int:
    config, workdir, help_asked = load_config(sys.argv[1:] if argv is None else argv)
    if help_asked:
        names = ", ".join(sorted(p.stem for p in config_directory().glob("*.py") if p.stem != "__init__"))
        print(f"{__doc__}\nflags:\n  --config=FILE or NAME   one of: {names}\n  --workdir=DIR")
        print("  --config.SECTION.FIELD=VALUE   all fields: unimat_jax/default_config.py")
        return 0
    from unimat_jax.train import train

    train(config, workdir)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
