"""A few crystals sampled while a model trains: do they decode, are they valid?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unimat_jax import sharding
from unimat_jax.assembly import Assembly, sampler_program
from unimat_jax.densify import occupancy
from unimat_jax.evaluation.validity import check
from unimat_jax.representation import DecodeFailure, decode


def sample_check(
    run: Assembly, batch: Mapping[str, np.ndarray], config: Any, mesh: Any
) -> Callable[[Any], dict[str, float]]:
    """A function of parameters that samples crystals of the compositions of a validation batch, with always the same
    noise, over all devices, and gives the shares that decode and that are valid."""
    spec, number = run.objective.spec, min(config.train.sample_examples, len(batch["slot"]))
    size = number + -number % mesh.size
    part = {name: np.resize(value[:number], (size, *value.shape[1:])) for name, value in batch.items()}
    counts = np.asarray(occupancy({name: jnp.asarray(value) for name, value in part.items()}, spec), np.float32)
    arrays = {
        "counts": counts,
        "counts_given": np.ones(size, np.float32),
        "elements": counts.max(1),
        "elements_given": np.zeros(size, np.float32),
        "properties": part["properties"],
        "properties_given": np.zeros_like(part["properties"]),
        "forbidden": np.zeros((size, *spec.table.shape), np.bool_),
        "indices": np.arange(size, dtype=np.int32),
    }
    sample = sampler_program(
        run.network.apply, spec, mesh, diffusion=config.diffusion, batch_size=size, guidance_weight=0.0,
        params_sharding=run.shardings.ema_params,
        **{name: config.sample[name] for name in ("num_steps", "method", "log_variance_interpolation")},
    )  # fmt: skip
    placed = sharding.whole_to_devices(arrays, sharding.batch_sharding(mesh))
    asked = counts.sum(1).astype(int)

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
