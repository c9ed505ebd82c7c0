"""Attention over the UniMat tensor [B, L, H, W, C]: over its grid, and among the sites that hold atoms."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from unimat_jax.models.layers import Dense, SiteNorm, zeros_init

ATTENTIONS = ("factorised", "full")
KERNELS = ("xla", "cudnn")


def _product_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, kernel: str) -> jax.Array:
    """Attention of [N, T, heads, D] to tokens of mask [N, T]. Where the machine lacks the kernel, XLA's: what was
    trained on a GPU is sampled on a laptop."""
    number, tokens = mask.shape
    if kernel == "cudnn" and jax.default_backend() == "gpu":  # it takes no mask to be repeated along the queries
        pairs = jnp.broadcast_to(mask[:, None, None, :], (number, 1, tokens, tokens))
        return jax.nn.dot_product_attention(q, k, v, mask=pairs, implementation="cudnn")
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :], implementation="xla")


class Attention(nn.Module):
    """Multi-head self-attention over axis 1 of [N, T, C], residual. Only tokens with `mask` [N, T] are attended to."""

    head_dim: int
    kernel: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        number, tokens, channels = x.shape
        heads = next(n for n in range(max(1, channels // self.head_dim), 0, -1) if channels % n == 0)
        qkv = Dense(3 * channels, use_bias=False, name="qkv")(SiteNorm(name="norm")(x, mask))
        q, k, v = (a.reshape(number, tokens, heads, -1) for a in jnp.split(qkv, 3, -1))
        y = _product_attention(q, k, v, mask, self.kernel).reshape(x.shape)
        return x + Dense(channels, kernel_init=zeros_init, name="out")(y)


class GridAttention(nn.Module):
    """Attention over the tensor: "factorised" (H W within each l, then L within each place) or "full" (all sites).

    `mask` [B, L, H, W]: sites that may hold an atom; the others have nothing to tell.
    """

    head_dim: int
    kind: str
    kernel: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        b, l, h, w, c = x.shape
        if self.kind == "full":
            sites = x.reshape(b, l * h * w, c)
            return Attention(self.head_dim, self.kernel, name="sites")(sites, mask.reshape(b, -1)).reshape(x.shape)
        if h * w > 1:
            places = x.reshape(b * l, h * w, c)
            x = Attention(self.head_dim, self.kernel, name="places")(places, mask.reshape(b * l, -1)).reshape(x.shape)
        if l > 1:
            y = x.reshape(b, l, h * w, c).swapaxes(1, 2).reshape(b * h * w, l, c)
            y = Attention(self.head_dim, self.kernel, name="levels")(
                y, mask.reshape(b, l, -1).swapaxes(1, 2).reshape(-1, l)
            )
            x = y.reshape(b, h * w, l, c).swapaxes(1, 2).reshape(x.shape)
        return x


class SitePool(nn.Module):
    """Weighted means over the sites of `mask`, one a head, softmax weights: [B, L, H, W, C] -> [B, heads * C]."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        sites = x.reshape(x.shape[0], -1, x.shape[-1])
        logits = Dense(self.heads, name="weights")(sites)
        weights = nn.softmax(jnp.where(mask.reshape(*sites.shape[:2], 1), logits, -1e9), axis=1)
        return jnp.einsum("bsh,bsc->bhc", weights, sites).reshape(x.shape[0], -1)
