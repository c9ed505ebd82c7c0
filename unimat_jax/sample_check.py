"""A few crystals sampled while a model trains: do they decode, are they valid?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from unimat_jax import sharding
from unimat_jax.assembly import Assembly, sampler_program
from unimat_jax.evaluation.validity import check
from unimat_jax.representation import DecodeFailure, UniMatSpec, decode
from unimat_jax.requests import Request, counts_of_table


def sample_check(
    run: Assembly, batch: Mapping[str, np.ndarray], config: Any, mesh: Any
) -> Callable[[Any], dict[str, float]]:
    """A function of parameters that samples crystals of the compositions of a validation batch, with always the same
    noise, over all devices, and gives the shares that decode and that are valid."""
    objective, number = run.objective, min(config.train.sample_examples, len(batch["slot"]))
    spec, size = objective.spec, number + -number % mesh.size
    asked = [_counts(batch["slot"][i % number], spec) for i in range(size)]
    requests = [Request("formula", counts=counts_of_table(counts, spec)) for counts in asked]
    nothing = np.zeros(batch["properties"].shape[1], np.float32)
    arrays = objective.conditions(requests, nothing, nothing) | {"indices": np.arange(size, dtype=np.int32)}
    settings = {**config.sample, "guidance_weight": 0.0}
    sample = sampler_program(objective, mesh, params_sharding=run.shardings.ema_params, **settings)
    placed = sharding.whole_to_devices(arrays, sharding.batch_sharding(mesh))

    def check_samples(params: Any) -> dict[str, float]:
        x, lattice = (sharding.to_host(a) for a in sample(params, jax.random.key(0), placed))
        decoded = [decode(x[i], lattice[i], spec, counts=asked[i]) for i in range(number)]
        crystals = [c for c in decoded if not isinstance(c, DecodeFailure)]
        return {
            "sample/decoded": len(crystals) / number,
            "sample/struct_valid": sum(check(c).struct_valid for c in crystals) / number,
            "sample/min_distance": float(np.median([c.min_distance for c in crystals])) if crystals else 0.0,
        }

    return check_samples


def _counts(slot: np.ndarray, spec: UniMatSpec) -> np.ndarray:
    """Atoms at each place [H, W] of a record's flat slots [A]."""
    h, w = spec.table.shape
    return np.bincount(slot[slot < spec.num_slots] % (h * w), minlength=h * w).reshape(h, w)
