"""The model card of an exported model: README.md as model hubs read it, made of its config.json and model.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from unimat_jax.periodic_table import SYMBOLS
from unimat_jax.representation import UniMatSpec

RARE = 50
"""Atoms of an element in the training set under which the card warns of it."""

TEXT = """---
license: {license_yaml}
library_name: unimat-jax
tags:
- unimat
- crystal-generation
- materials-science
- diffusion
- jax
---

# UniMat crystal generator, data set `{dataset}`

A diffusion model that generates crystals: cell, atoms and their places, for a composition, a set of elements, or freely.
It was trained with unimat-jax, an open implementation of UniMat ("Scalable Diffusion for Materials Generation",
[arXiv 2311.09235](https://arxiv.org/abs/2311.09235)), written from the paper by others than its authors. A crystal is a
tensor over the periodic table, {l} atoms of an element x {h} rows x {w} columns, with its cell's lengths and angles.

| | |
|---|---|
| tensor L x H x W | {l} x {h} x {w}, {coordinates} coordinates |
| elements with a place | {num_elements}: {elements} |
| network | {network}, {num_params:,} parameters, float32 |
| trained | {step:,} steps of {batch_size} crystals, predicts {prediction_type} |
| conditions | {conditions} |
| sampler by default | {method}, {num_steps} steps |
| parameters' hash | {hashes} |

## Generate

With unimat-jax installed, and FOLDER the folder of this file:

```bash
{generate}
structures = [sample.crystal.to_pymatgen() for sample in samples if sample.crystal]
```

{files} No file holds code.

## Training data

{description}{splits} Source: {source}.{notes}

Licence and origin of the data: {data_license}

Licence of these parameters: {license}
{citation}
## Validation

{validation}

## What not to trust it for

- Samples are not relaxed, and the model knows no energies: none is shown to be stable, synthesizable or new. Relax them,
  compute energies, and compare with known structures before you claim anything (`unimat check`, `unimat evaluate`).
- Training crystals had at most {max_atoms} atoms in the cell and {l} of one element. More of an element cannot be asked
  for; larger cells than those can, and nothing is known of their quality.
- {rare}
- A generated cell says nothing of disorder, magnetism, charge states, temperature or pressure.
- Samples print space group P1 at tight tolerances, as those of every diffusion model do.

## Citation

```bibtex
@inproceedings{{yang2024scalable,
  title = {{Scalable Diffusion for Materials Generation}},
  author = {{Yang, Mengjiao and Cho, KwangHwan and Merchant, Amil and Abbeel, Pieter and Schuurmans, Dale and Mordatch, Igor and Cubuk, Ekin Dogus}},
  booktitle = {{International Conference on Learning Representations}},
  year = {{2024}},
  note = {{arXiv:2311.09235}}
}}
```
"""  # noqa: E501 - rows of tables and of BibTeX

_OF_FORMULA = "unimat generate --checkpoint=FOLDER --formula=FORMULA --num_samples=16 --output_dir=crystals_of_formula"
_PYTHON = '```\n```python\nfrom unimat_jax import Generator\n\nsamples = Generator("FOLDER").generate(16'
GENERATE = {
    True: "unimat generate --checkpoint=FOLDER --num_samples=16 --output_dir=crystals\n"
    f"{_OF_FORMULA}\n{_PYTHON}, seed=0)",
    False: f'{_OF_FORMULA}\n{_PYTHON}, formula="FORMULA", seed=0)',
}
"""Commands, whether or not the model can do without a composition."""

KINDS = {"ema": "averaged", "raw": "raw"}
_AVERAGED = "`model.safetensors` holds the moving average of the parameters, which generation uses"
FILES = {
    True: f"{_AVERAGED}; `raw_params.safetensors` the raw\nones (`--raw_params`). `config.json` and `model.json` say "
    "what the numbers mean.",
    False: f"{_AVERAGED}; the raw ones are not here.\n`config.json` and `model.json` say what the numbers mean.",
}
"""What is in the folder, with and without raw parameters."""


def model_card(config: Mapping[str, Any], description: Mapping[str, Any], spec: UniMatSpec) -> str:
    """The card's text. description: model.json of the export, with its entry "export"."""
    data, about, diffusion = description["dataset"], description["export"], description["diffusion"]
    (l, h, w), known = spec.grid, about["dataset"]
    symbols = [SYMBOLS[z] for z in sorted(spec.table.atomic_numbers.ravel().tolist()) if z]
    splits = ", ".join(f"{number:,} {split}" for split, number in data["num_examples"].items())
    limit = config["data"].get("max_train_examples")
    kinds = {kind: word for kind, word in KINDS.items() if kind in about["parameters_hash"]}
    properties = (f"{p['name']} ({p.get('unit') or 'unit unknown'})" for p in description["condition_schema"])
    return TEXT.format(
        license_yaml=json.dumps(about["license"]),
        dataset=data["name"],
        network=description["model"]["name"],
        l=l,
        h=h,
        w=w,
        coordinates=spec.coordinates,
        num_elements=len(symbols),
        elements=" ".join(symbols),
        num_params=description["num_params"],
        step=about["step"],
        batch_size=config["train"]["batch_size"],
        prediction_type=diffusion.get("prediction_type", "the score of coordinates on the torus and v of the cell"),
        conditions=_conditions(description, ", ".join(properties) or "none"),
        generate=GENERATE["elements_share" in diffusion or composes(description)],
        method=config["sample"]["method"],
        num_steps=config["sample"]["num_steps"],
        hashes=", ".join(f"`{about['parameters_hash'][kind]}` {word}" for kind, word in kinds.items()),
        files=FILES["raw" in kinds],
        description=known["description"],
        splits=f" Crystals: {splits}{f', of which {limit:,} were trained on' if limit else ''}.",
        source=_source(data.get("source") or {}),
        notes="".join(f" Note: {note}." for note in data.get("notes") or ()),
        data_license=f"{known['license']}." if known["license"] else "**unknown**: ask whoever made the data.",
        license=_license(about["license"], bool(known["license"])),
        citation=f"\n```bibtex\n{known['citation']}\n```\n" if known["citation"] else "",
        validation=_validation(about["evaluation"]),
        max_atoms=spec.max_atoms,
        rare=_rare(symbols, data.get("elements") or {}),
    )


def composes(description: Mapping[str, Any]) -> bool:
    """Whether a model of compositions lies beside the network."""
    return bool(description.get("composition", {}).get("width"))


def _conditions(description: Mapping[str, Any], properties: str) -> str:
    diffusion = description["diffusion"]
    if composes(description):
        return "exact composition, or what its model of compositions draws: elements, number of atoms, nothing"
    if "elements_share" not in diffusion:
        return "exact composition, always"
    return (
        f"exact composition ({diffusion['counts_share']:.0%} of the training examples), elements only "
        f"({diffusion['elements_share']:.0%}), none (the rest); properties: {properties}"
    )


def _source(source: Mapping[str, Any]) -> str:
    name = source.get("name") or "not recorded"
    number = source.get("num_files", 1)
    files = "its file's name" if number == 1 else f"the names of its {number:,} files"
    return f"{name} (SHA-256 over {files} and content: {source['sha256']})" if "sha256" in source else name


def _license(name: str, data_known: bool) -> str:
    if name != "unknown":
        return f"{name}."
    why = "" if data_known else ", and that of its training data is unknown"
    return f"**unknown**: whoever exported the model named none{why}. Do not assume that you may use or share it."


def _validation(found: Mapping[str, Any]) -> str:
    if not found:
        return "No validation was recorded. Score samples with `unimat evaluate`."
    rows = [f"| {name} | {value:.4g} |" for name, value in found.items() if name != "step" and value is not None]
    head = (
        f"At step {found['step']:,}, as training recorded it (averaged parameters):\n\n| metric | value |\n|---|---|\n"
    )
    tail = "\n\nA loss says little about crystals: score samples with `unimat evaluate`."
    return head + "\n".join(rows) + tail


def _rare(symbols: list[str], atoms: Mapping[str, int]) -> str:
    """atoms: of each element in the training set."""
    never = [s for s in symbols if not atoms.get(s)]
    rare = [f"{s} ({atoms[s]})" for s in symbols if 0 < atoms.get(s, 0) < RARE]
    told = f"Never seen in training, though the table has places for them: {', '.join(never)}. " if never else ""
    told += f"Fewer than {RARE} atoms in the training set: {', '.join(rare)}. " if rare else ""
    return (told or "Every element of the table was seen in training. ") + "Expect little of what was rarely seen."
