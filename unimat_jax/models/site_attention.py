"""Attention among the few sites that most likely hold an atom, told of the coordinate differences between them.

The grid's own attention sees an atom only through the coarse levels, or pays for every null site at the finest. Here a
fixed number of sites is picked, and their tokens live beside the grid: each block reads the grid at the sites, lets the
tokens attend to each other, and adds the result back.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unimat_jax.models.layers import Dense, zeros_init

PAIR_WIDTH = 64
PAIR_WAVES = 3


def pick_sites(x: jax.Array, possible: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
    """(sites, mask), both [B, K]: flat indices of the K = min(number, L H W) sites of x [B, L, H, W, 3] that most
    likely hold an atom, and which of them may hold one at all.

    First those that the condition allows (`possible` [B, L, H, W]), among them those farthest from the null value: an
    exact composition of at most K atoms is picked whole, at every noise level.
    """
    score = jnp.where(possible, x.mean(-1), -jnp.inf).reshape(len(x), -1)
    best, sites = jax.lax.top_k(score, min(number, score.shape[-1]))
    return sites, jnp.isfinite(best)


def gather(grid: jax.Array, sites: jax.Array) -> jax.Array:
    """Rows [B, K, C] of [B, L, H, W, C] at flat indices [B, K]."""
    return jnp.take_along_axis(grid.reshape(len(grid), -1, grid.shape[-1]), sites[..., None], axis=1)


def scatter_add(grid: jax.Array, sites: jax.Array, rows: jax.Array) -> jax.Array:
    """[B, L, H, W, C] with rows [B, K, C] added at flat indices [B, K]."""
    flat = grid.reshape(len(grid), -1, grid.shape[-1])
    return flat.at[jnp.arange(len(grid))[:, None], sites].add(rows).reshape(grid.shape)


def pair_features(coords: jax.Array) -> jax.Array:
    """[B, K, K, F] of coordinates [B, K, 3] in model units (period 2): differences, and 1, 2 and 4 waves of them."""
    difference = coords[:, :, None] - coords[:, None]
    waves = [f(jnp.pi * 2**k * difference) for k in range(PAIR_WAVES) for f in (jnp.sin, jnp.cos)]
    return jnp.concatenate([difference, *waves], -1)


class SiteAttention(nn.Module):
    """One block: (grid, tokens) -> (grid, tokens). tokens [B, K, D] of the picked `sites` [B, K].

    A function of `pairs` [B, K, K, F] and the embedding [B, E] is added to the attention's logits and, averaged with
    its weights, to its values; then a layer for each token.
    """

    head_dim: int

    @nn.compact
    def __call__(
        self,
        grid: jax.Array,
        tokens: jax.Array,
        sites: jax.Array,
        mask: jax.Array,
        pairs: jax.Array,
        embedding: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        number, k, width = tokens.shape
        heads = next(n for n in range(max(1, width // self.head_dim), 0, -1) if width % n == 0)
        tokens = tokens + Dense(width, name="read")(gather(grid, sites))
        scales = Dense(4 * width, kernel_init=zeros_init, name="film")(embedding)[:, None]
        scale_in, shift_in, scale_mid, shift_mid = jnp.split(scales, 4, -1)

        h = nn.LayerNorm(dtype=tokens.dtype, name="norm_in")(tokens) * (1 + scale_in) + shift_in
        q, key, v = (a.reshape(number, k, heads, -1) for a in jnp.split(Dense(3 * width, name="qkv")(h), 3, -1))
        pair = Dense(PAIR_WIDTH, name="pair_in")(pairs)
        pair = nn.silu(pair + Dense(PAIR_WIDTH, use_bias=False, name="pair_embedding")(embedding)[:, None, None])
        logits = jnp.einsum("bihd,bjhd->bijh", q, key) / jnp.sqrt(q.shape[-1]) + Dense(heads, name="pair_bias")(pair)
        logits = jnp.where(mask[:, None, :, None], logits.astype(jnp.float32), -1e9)
        weights = nn.softmax(logits, axis=2).astype(tokens.dtype)
        values = jnp.einsum("bijh,bjhd->bihd", weights, v).reshape(number, k, width)
        geometry = jnp.einsum("bijh,bijp->bihp", weights, pair).reshape(number, k, heads * PAIR_WIDTH)
        tokens = tokens + Dense(width, name="out")(jnp.concatenate([values, geometry], -1))

        h = nn.LayerNorm(dtype=tokens.dtype, name="norm_mid")(tokens) * (1 + scale_mid) + shift_mid
        tokens = tokens + Dense(width, name="mlp_out")(nn.silu(Dense(2 * width, name="mlp_in")(h)))
        written = Dense(grid.shape[-1], kernel_init=zeros_init, name="write")(tokens) * mask[..., None]
        return scatter_add(grid, sites, written), tokens
