"""Trained models that come with the package: `--checkpoint=NAME`, or `Generator("NAME")`, where no path has that name.

Each is a folder here, as `unimat export --averaged_only --output_dir=unimat_jax/released/NAME` writes it; its README.md
is the model card, with the licence of the data.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def models() -> dict[str, Path]:
    """Folder of each by name, sorted; {} where none is there."""
    folders = sorted(path.parent for path in FOLDER.glob("*/model.json"))
    return {folder.name: folder for folder in folders if not folder.name.startswith(".")}  # export's own, half written


def checkpoint_help() -> str:
    """What a program's --checkpoint takes."""
    names = ", ".join(models())
    a_run = "the --workdir of a training run"
    return (
        f"{a_run}, an exported model, or the name of a released one: {names}"
        if names
        else f"{a_run}, or an exported model"
    )
