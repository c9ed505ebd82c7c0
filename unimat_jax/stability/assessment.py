"""Crystals in files -> relaxed by an energy model -> held against a hull -> the files of a run."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.entries import Entry, read_entries
from unimat_jax.stability import outputs
from unimat_jax.stability.corrections import resolve
from unimat_jax.stability.engines import GPAW, EnergyModel
from unimat_jax.stability.journal import Journal, relax_all
from unimat_jax.stability.judgement import (
    Assessed,
    References,
    Scale,
    inside_systems,
    judge_all,
    read_standards,
    with_own_hull,
    write,
)
from unimat_jax.stability.relaxation import Protocol, Relaxation, Relaxer


def assess(
    structures: Sequence[str | Path],
    model: EnergyModel,
    *,
    output_dir: str | Path,
    hull: Sequence[str | Path] = (),
    elements: Sequence[str | Path] = (),
    hull_structures: Sequence[str | Path] = (),
    known: Sequence[str | Path] = (),
    against: Sequence[str | Path] = (),
    correction: str = "auto",
    mixed_schemes: bool = False,
    tolerances: str = "mattergen",
    protocol: Protocol | None = None,
    timeout_s: float = 600.0,
    memory_limit_gb: float = 0.0,
    num_workers: int | None = None,
    batch_size: int = 1,
    retry: bool = False,
) -> Assessed:
    """Relaxes the structures in files, puts their energies on the scale of the hull, writes everything into
    `output_dir`, which may hold a part of it from before, and returns it.

    Raises UserError for inputs that are missing, cannot be read or must not meet. Structures that fail have a status.
    """
    begin = time.monotonic()
    os.environ.setdefault("SPGLIB_WARNING", "OFF")
    output_dir, protocol = Path(output_dir), protocol or Protocol()
    references = References(hull, elements, hull_structures, known, against, mixed_schemes, tolerances)
    scale = Scale(*resolve(model, correction), protocol.pressure)
    about = about_model(model, protocol, scale)
    relax = functools.partial(
        relax_all, relaxer=relaxer_of(model, protocol, scale.corrected, batch_size=batch_size,
                                      memory_limit_gb=memory_limit_gb, output_dir=output_dir),
        journal=Journal(output_dir / outputs.JOURNAL, retry=retry), timeout_s=timeout_s, num_workers=num_workers,
    )  # fmt: skip

    entries = read_entries(structures)
    standards = read_standards(references, scale, about, entries)
    inside, left_out = inside_systems(read_entries(hull_structures), entries) if hull_structures else ([], Counter())

    relaxations = relax_entries(entries, functools.partial(relax, progress="relaxing"))
    if hull_structures:
        found = relax_entries(inside, functools.partial(relax, progress="relaxing the hull"))
        standards = with_own_hull(standards, inside, found, left_out)

    assessed = judge_all(entries, relaxations, standards, about, num_workers=num_workers)
    assessed.about.update(
        structures=[str(path) for path in structures], timeout_s=timeout_s, memory_limit_gb=memory_limit_gb,
        batch_size=batch_size, seconds=round(time.monotonic() - begin, 1),
    )  # fmt: skip
    write(assessed, output_dir)
    return assessed


def relaxer_of(
    model: EnergyModel,
    protocol: Protocol,
    corrected: bool,
    *,
    output_dir: Path,
    batch_size: int = 1,
    memory_limit_gb: float = 0.0,
) -> Relaxer:
    """What relaxes by this model; DFT has its folders in `output_dir`."""
    if model.name != GPAW:
        return Relaxer(model, protocol, corrected, batch_size, memory_limit_gb=memory_limit_gb)
    from unimat_jax.stability.gpaw_engine import GpawRelaxer

    work_dir = str(output_dir / outputs.DFT)
    return GpawRelaxer(model, protocol, corrected, batch_size, work_dir, memory_limit_gb=memory_limit_gb)


def about_model(model: EnergyModel, protocol: Protocol, scale: Scale) -> dict[str, Any]:
    """What relaxes, and how, as stability.json has it."""
    return {
        "energy_model": model.name, "energy_model_kwargs": model.kwargs, "weights": model.weights,
        "package": model.package, "energy_scale": model.scale, "functional": model.functional,
        "correction": scale.scheme, "mp2020_added": scale.corrected,
        "protocol": dataclasses.asdict(protocol), "protocol_text": protocol.text,
    }  # fmt: skip


def relax_entries(entries: Sequence[Entry], relax: Callable[[list[Crystal]], Sequence[Relaxation]]) -> list[Relaxation]:
    """One Relaxation an entry: those of `relax`, and why there is none where the entry has no crystal."""
    found = iter(relax([entry.crystal for entry in entries if entry.crystal is not None]))
    return [
        next(found) if entry.crystal is not None else Relaxation("failed", entry.reason, entry.message)
        for entry in entries
    ]
