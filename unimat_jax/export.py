"""A checkpoint -> a folder to share: unimat export --checkpoint=runs/perov_5 --output_dir=perov_5_model

Writes model.safetensors (the averaged parameters, which generation uses), raw_params.safetensors, config.json,
model.json and README.md, the model card: all of it or nothing. --averaged_only leaves out raw_params.safetensors: half
of the size, and no `unimat generate --raw_params`. Whatever takes a run's directory as --checkpoint takes this folder,
`unimat export` too. The same run gives the same bytes, on any machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimat_jax import released
from unimat_jax.cli import Parser, run_program
from unimat_jax.errors import UserError
from unimat_jax.model_card import model_card

CARD = "README.md"
OF_THE_MACHINE = (("data", "data_dir"), ("train", "compilation_cache"))
"""Paths in the config that mean nothing elsewhere: the export has the defaults."""
LICENCES = {"CC-BY 4.0": "cc-by-4.0"}
"""How a known data set's licence begins -> its name on model hubs."""


def export(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    step: int | None = None,
    licence: str | None = None,
    data_licence: str | None = None,
    averaged_only: bool = False,
    overwrite: bool = False,
) -> Path:
    """Exports a run's checkpoint (the latest, or `step`), or an exported model again; its folder.

    licence: of the parameters, as model hubs name it ("cc-by-4.0"); data_licence: of the training data, in words. By
    default what is known of the data set. averaged_only: without the raw parameters, which are also left out where an
    exported model has none. Raises UserError, and then nothing is left in `output_dir`.
    """
    from unimat_jax import weights
    from unimat_jax.checkpoint import CONFIG, MODEL, read_run, write_json
    from unimat_jax.generator import Generator

    output = Path(output_dir).resolve()
    _check_free(output, overwrite)
    there = read_run(checkpoint)[2].get("export", {}).get("parameters_hash", weights.FILES)
    kinds = [kind for kind in weights.FILES if kind in there and not (averaged_only and kind == "raw")]
    partial, before = (output.with_name(f".{output.name}.{end}") for end in ("partial", "replaced"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        hashes, generator = {}, None
        for kind in kinds:  # one after the other: no two copies in memory
            step = step if generator is None else generator.step
            generator = None
            generator = Generator(checkpoint, step=step, ema=kind == "ema")
            hashes[kind] = generator.params_hash
            about = {"parameters": kind, "step": generator.step, "parameters_hash": generator.params_hash}
            weights.write(
                partial / weights.FILES[kind], generator.params, {**about, "format": generator.description["format"]}
            )
        assert generator is not None
        description = _describe(generator, hashes, licence, data_licence)
        config = _config(generator.config)
        write_json(partial / CONFIG, config)
        write_json(partial / MODEL, description)
        (partial / CARD).write_text(model_card(config, description, generator.spec))
        if output.exists():
            shutil.rmtree(before, ignore_errors=True)
            output.replace(before)
        partial.replace(output)
        shutil.rmtree(before, ignore_errors=True)
    except OSError as error:
        raise UserError(f"--output_dir={output}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def _check_free(output: Path, overwrite: bool) -> None:
    """Raises UserError unless the folder is not there, empty, or an exported model that may go."""
    from unimat_jax import weights
    from unimat_jax.checkpoint import CONFIG, MODEL, exported

    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir={output} is a file: name a directory")
    there = {path.name for path in output.iterdir()} if output.is_dir() else set()
    others = there - {CONFIG, MODEL, CARD, *weights.FILES.values()}
    if others or (there and not exported(output)):
        what = f"{min(others)}, which is of no export" if others else "something else than an exported model"
        raise UserError(f"--output_dir={output} holds {what}: name another, or an empty one")
    if there and not overwrite:
        raise UserError(f"--output_dir={output} holds an exported model: add --overwrite, or name another")


def _config(config: Mapping[str, Any]) -> dict[str, Any]:
    from unimat_jax.default_config import get_config

    changed, default = copy.deepcopy(dict(config)), get_config()
    for section, field in OF_THE_MACHINE:
        if field in changed[section]:
            changed[section][field] = default[section][field]
    return changed


def _describe(
    generator: Any, hashes: Mapping[str, str], licence: str | None, data_licence: str | None
) -> dict[str, Any]:
    """model.json of the export: the run's, and in "export" what only the run's folder and this program know."""
    from data_prep.datasets import DATASETS

    about = generator.description.get("export")
    if about is None:
        known = DATASETS.get(generator.description["dataset"]["name"], DATASETS["crystals"])
        names = [name for begin, name in LICENCES.items() if known.licence.startswith(begin)]
        about = {
            "step": generator.step,
            "evaluation": _evaluation(generator.directory, generator.step),
            "license": names[0] if names else "unknown",
            "dataset": {
                "description": known.description,
                "license": known.licence.removeprefix("data: "),
                "citation": known.citation,
            },
        }
    about["parameters_hash"] = dict(hashes)
    about["license"] = licence or about["license"]
    about["dataset"]["license"] = data_licence or about["dataset"]["license"]
    return {**generator.description, "export": about}


def _evaluation(root: Path, step: int) -> dict[str, float]:
    """The metrics of the last evaluation up to `step`, without those by noise level; {} where there is none."""
    path, found = root / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # cut off
            continue
        if "eval/loss" in row and row["step"] <= step:
            found = row
    return {k: v for k, v in found.items() if k == "step" or (k.startswith(("eval/", "sample/")) and "_t0" not in k)}


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="unimat export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", required=True, help=released.checkpoint_help())
    p.add_argument("--output_dir", required=True, type=Path)
    p.add_argument("--step", type=int, help="of the checkpoint; default: the latest")
    p.add_argument(
        "--license", help="of the parameters, for the card, as cc-by-4.0; default: that of the data if known"
    )
    p.add_argument("--data_license", help="of the training data, in words; default: what is known of the data set")
    p.add_argument("--averaged_only", action="store_true", help="leave the raw parameters out: half the size")
    p.add_argument("--overwrite", action="store_true", help="replace the exported model in --output_dir")
    a = p.parse(sys.argv[1:] if argv is None else argv)
    output = export(
        a.checkpoint, a.output_dir, step=a.step, licence=a.license, data_licence=a.data_license,
        averaged_only=a.averaged_only, overwrite=a.overwrite,
    )  # fmt: skip
    from unimat_jax.checkpoint import MODEL, read_json

    about = read_json(output / MODEL)["export"]
    print(f"exported step {about['step']}, parameters {about['parameters_hash']['ema']}, license {about['license']}")
    for path in sorted(output.iterdir()):
        print(f"  {path}   {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
