"""Norms and convolutions over the UniMat tensor [B, L, H, W, C]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

CONVOLUTIONS = ("axial", "full", "plane")
zeros_init = nn.initializers.zeros_init()


def _centred_init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Initial convolution kernels [3, ..., C, F] of which the centre holds half of the variance: an atom's neighbours
    on the table are mostly empty, and evenly drawn kernels would hand on a small part of its signal."""
    taps = math.prod(shape[:-2])
    share = jnp.full(taps, 0.5 / (taps - 1)).at[taps // 2].set(0.5).reshape(*shape[:-2], 1, 1)
    return jax.random.normal(key, shape, dtype) * jnp.sqrt(share / shape[-2]).astype(dtype)


class SiteNorm(nn.Module):
    """Group normalisation of [B, ..., C] over the sites of `mask` [B, ...] alone; the other sites come out as zero.

    Plain group normalisation would be ruled by the null sites, and a handful of atoms be lost among hundreds of them.
    About 4 channels a group, at most 32 groups, in a number that divides the channels.
    """

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        most = max(1, min(channels // 4, 32))
        groups = next(g for g in range(most, 0, -1) if channels % g == 0)
        weight = mask.astype(x.dtype)[..., None]
        axes = tuple(range(1, x.ndim - 1))
        number = jnp.maximum(weight.sum(axes), 1.0)  # [B, 1]

        def mean(values: jax.Array) -> jax.Array:
            by_channel = (values * weight).sum(axes) / number
            by_group = by_channel.reshape(-1, groups, channels // groups).mean(-1, keepdims=True)
            return jnp.broadcast_to(by_group, (len(x), groups, channels // groups)).reshape(len(x), channels)

        center = mean(x)
        spread = jnp.maximum(mean(jnp.square(x)) - jnp.square(center), 0.0)
        scale = jax.lax.rsqrt(spread + 1e-5) * self.param("scale", nn.initializers.ones_init(), (channels,))
        shift = self.param("bias", zeros_init, (channels,)) - center * scale
        shape = (len(x), *[1] * len(axes), channels)
        return (x * scale.reshape(shape) + shift.reshape(shape)) * weight


def _plane_convolution(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """3 x 3 "same" convolution of [N, H, W, C] by [3, 3, C, F]. Grids of a few sites run as one matrix product:
    backends are an order of magnitude slower on convolutions that are almost all border."""
    n, h, w, _ = images.shape
    if h * w > 4:
        return jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    places = [(i, j) for i in range(h) for j in range(w)]
    zero = jnp.zeros_like(kernel[0, 0])
    rows = [
        [kernel[a - i + 1, b - j + 1] if abs(a - i) <= 1 and abs(b - j) <= 1 else zero for i, j in places]
        for a, b in places
    ]
    return (images.reshape(n, -1) @ jnp.block(rows)).reshape(n, h, w, kernel.shape[-1])


def _level_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Width-3 "same" convolution over L of [B, L, H, W, C] by [3, C, F]. A short axis runs as one banded matrix product
    (half the time of three shifted ones at L = 3 on CPU, and worse from about L = 6)."""
    b, l, h, w, c = x.shape
    if l > 5:
        border = jnp.zeros_like(x[:, :1])
        padded = jnp.concatenate([border, x, border], 1)
        return padded[:, :l] @ kernel[0] + x @ kernel[1] + padded[:, 2:] @ kernel[2]
    zero = jnp.zeros_like(kernel[0])
    rows = [[kernel[i - o + 1] if abs(i - o) <= 1 else zero for o in range(l)] for i in range(l)]
    y = x.transpose(0, 2, 3, 1, 4).reshape(b * h * w, l * c) @ jnp.block(rows)
    return y.reshape(b, h, w, l, kernel.shape[-1]).transpose(0, 3, 1, 2, 4)


class Conv(nn.Module):
    """Convolution over (L, H, W). "axial": a 1 x 3 x 3 kernel plus a 3 x 1 x 1 kernel; "full": 3 x 3 x 3; "plane":
    1 x 3 x 3, as in video diffusion (Ho et al. 2022), where only attention mixes along L."""

    features: int
    kind: str = "axial"
    kernel_init: nn.initializers.Initializer = _centred_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, l, h, w, c = x.shape
        if self.kind == "full":
            return nn.Conv(self.features, (3, 3, 3), kernel_init=self.kernel_init, name="full")(x)
        plane = self.param("plane", self.kernel_init, (3, 3, c, self.features))
        y = _plane_convolution(x.reshape(b * l, h, w, c), plane).reshape(b, l, h, w, self.features)
        if l > 1 and self.kind == "axial":
            y = y + _level_convolution(x, self.param("levels", self.kernel_init, (3, c, self.features)))
        return y + self.param("bias", zeros_init, (self.features,))
