"""The device half of the representation: sparse batch -> UniMat tensor, and occupancy masks."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from unimat_jax.representation import NULL_VALUE, UniMatSpec


def densify(batch: Mapping[str, jax.Array], spec: UniMatSpec) -> jax.Array:
    """UniMat tensors x [B, L, H, W, 3] (model units) of a batch from `representation.model_inputs`; null elsewhere."""
    number = batch["slot"].shape[0]
    flat = jnp.full((number, spec.num_slots, 3), NULL_VALUE, jnp.float32)
    flat = flat.at[jnp.arange(number)[:, None], batch["slot"]].set(batch["coords"], mode="drop")
    return flat.reshape(number, *spec.grid, 3)


def occupancy(batch: Mapping[str, jax.Array], spec: UniMatSpec) -> jax.Array:
    """True [B, L, H, W] where a slot holds an atom."""
    number = batch["slot"].shape[0]
    flat = jnp.zeros((number, spec.num_slots), bool)
    flat = flat.at[jnp.arange(number)[:, None], batch["slot"]].set(True, mode="drop")
    return flat.reshape(number, *spec.grid)


def is_element(spec: UniMatSpec) -> jax.Array:
    """True [H, W] where the table has an element."""
    return jnp.asarray(spec.table.atomic_numbers > 0)
