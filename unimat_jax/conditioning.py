"""Conditions of a UniMat network: which elements, exact counts, properties; and which sites they leave free.

A condition is a dict of arrays: `counts` [B, L, H, W] (1 where an atom is asked), `elements` [B, H, W], `properties`
[B, P] (standardised), and for each a flag, 1 given or 0 dropped: `counts_given` [B], `elements_given` [B],
`properties_given` [B, P]. What is dropped is zero. The paper (section 2.2) concatenates the composition on the channel
axis and guides on properties; `free` [B, L, H, W] marks the sites that the condition leaves to the diffusion. All
others are held at the null value, in training and in sampling, and carry no loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from unimat_jax.densify import is_element, occupancy
from unimat_jax.representation import UniMatSpec

Condition = dict[str, jax.Array]


def make_condition(
    counts: jax.Array,
    counts_given: jax.Array,
    elements: jax.Array,
    elements_given: jax.Array,
    properties: jax.Array,
    properties_given: jax.Array,
) -> Condition:
    """A condition whose dropped parts are zero. `counts` [B, L, H, W], `elements` [B, H, W], `properties` [B, P]."""
    return {
        "counts": counts * counts_given[:, None, None, None],
        "counts_given": counts_given,
        "elements": elements * elements_given[:, None, None],
        "elements_given": elements_given,
        "properties": jnp.where(properties_given > 0, jnp.nan_to_num(properties), 0.0),
        "properties_given": properties_given,
    }


def possible_sites(cond: Condition) -> jax.Array:
    """Sites [B, L, H, W] at which the condition allows an atom."""
    elements = jnp.where(cond["elements_given"][:, None, None] > 0, cond["elements"], 1.0)[:, None]
    counts = jnp.where(cond["counts_given"][:, None, None, None] > 0, cond["counts"], 1.0)
    return elements * counts > 0


def free_sites(cond: Condition, spec: UniMatSpec) -> jax.Array:
    """Sites [B, L, H, W] that the condition leaves to the diffusion: never a place without an element."""
    return possible_sites(cond) & is_element(spec)


def training_condition(
    key: jax.Array,
    batch: Mapping[str, jax.Array],
    spec: UniMatSpec,
    *,
    counts_share: float,
    elements_share: float,
    property_drop_rate: float,
) -> Condition:
    """The condition of a training batch: exact counts for a share of the examples, only the elements for another,
    nothing for the rest; each property dropped at `property_drop_rate`, and where it is missing (NaN)."""
    number = batch["slot"].shape[0]
    mode_key, property_key = jax.random.split(key)
    mode = jax.random.uniform(mode_key, (number,))
    counts = occupancy(batch, spec).astype(jnp.float32)
    properties = batch["properties"]
    kept = jax.random.uniform(property_key, properties.shape) >= property_drop_rate
    return make_condition(
        counts,
        (mode < counts_share).astype(jnp.float32),
        counts.max(1),
        ((mode >= counts_share) & (mode < counts_share + elements_share)).astype(jnp.float32),
        properties,
        (kept & jnp.isfinite(properties)).astype(jnp.float32),
    )


def training_properties(key: jax.Array, properties: jax.Array, drop_rate: float) -> jax.Array:
    """What a network sees of standardised properties [B, P] in training, values and flags [B, 2 P]: each dropped at
    `drop_rate`, and where it is missing (NaN)."""
    kept = jax.random.uniform(key, properties.shape) >= drop_rate
    return seen_properties(properties, kept & jnp.isfinite(properties))


def seen_properties(properties: jax.Array, given: jax.Array) -> jax.Array:
    """Values, zero where not given, and flags: [B, 2 P]."""
    return jnp.concatenate([jnp.where(given > 0, properties, 0.0), given.astype(jnp.float32)], -1)


def drop_properties(cond: Condition) -> Condition:
    """The condition without its properties, the composition kept: the second branch of the paper's equation 2."""
    zeros = jnp.zeros_like(cond["properties"])
    return {**cond, "properties": zeros, "properties_given": zeros}
