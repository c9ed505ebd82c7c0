"""Room for every atom: no two atoms of a predicted crystal nearer than a share of the sum of their covalent radii.

Atoms of one element are alike, and a network that sees two of them near one site tells each to go there: no crystal
that it was trained on has two at one place, so nothing taught it what to do. What holds for all crystals tells it here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unimat_jax import torus

NOISE_SHARE = 0.5
"""A pair is kept apart where the noise is below this share of its distance. With more, what a network predicts, the
mean of what is possible, may lie on another atom and be right."""
_ROUNDS = 3
_LEAST = 1e-10
"""Angstrom^2, for the direction between atoms at one place."""

State = tuple[jax.Array, jax.Array, jax.Array]
"""Rounds so far, fractional coordinates, and what would move them next."""


def distances_to_keep(radii: jax.Array, mask: jax.Array, ratio: float) -> jax.Array:
    """Angstrom [B, A, A]: `ratio` times the sum of the radii [B, A] of each pair of atoms of mask [B, A], else zero."""
    pairs = mask[:, :, None] & mask[:, None] & ~jnp.eye(mask.shape[1], dtype=bool)
    return jnp.where(pairs, ratio * (radii[:, :, None] + radii[:, None]), 0.0)


def push_apart(frac: jax.Array, metric: jax.Array, keep: jax.Array, sigma: jax.Array) -> jax.Array:
    """What parts those atoms of crystals at fractional coordinates [B, A, 3] that are nearer than `keep` [B, A, A]
    (Angstrom): displacements [B, A, 3] along the line between two atoms, half of what lacks for each. Zero for
    pairs for which the noise, `sigma` of the cell's size, is too large (NOISE_SHARE).

    metric [B, 3, 3]: of the cells, Angstrom^2. By the wrapped difference: in a skewed cell another image may be nearer.
    In at most three rounds, in each of which an atom with several too near moves by the mean of what parts it from
    each: some may still be too near then, until the next step of the sampler.
    """
    edge = jnp.maximum(jnp.linalg.det(metric), _LEAST) ** (1 / 6)
    keep = jnp.where(sigma * edge[:, None, None] < NOISE_SHARE * keep, keep, 0.0)

    def push(frac: jax.Array) -> jax.Array:
        difference = torus.wrap(frac[:, :, None] - frac[:, None])
        # Sums of products, not a matrix product: `flops.count_flops` takes none in a loop of unknown length.
        projected = (metric[:, None, None] * difference[..., None, :]).sum(-1)
        distance = jnp.sqrt(jnp.maximum((projected * difference).sum(-1), _LEAST))
        lack = jnp.maximum(keep - distance, 0.0) / (2 * distance)
        number = (lack > 0).sum(2)
        lack /= jnp.maximum(jnp.maximum(number[:, :, None], number[:, None]), 1)
        return (lack[..., None] * difference).sum(2)

    def round_(state: State) -> State:
        number, moved, wanted = state
        return number + 1, moved + wanted, push(moved + wanted)

    def pushed(frac: jax.Array) -> jax.Array:
        start = (jnp.int32(0), frac, push(frac))
        return jax.lax.while_loop(lambda s: (s[0] < _ROUNDS) & s[2].any(), round_, start)[1] - frac

    return jax.lax.cond(keep.any(), pushed, jnp.zeros_like, frac)
