"""The paper's 3D U-Net over the UniMat tensor (section 2.2, appendix 6), in Flax Linen.

Periods and groups take the place of a video's image plane, the atom index L that of its time. H x W shrinks by 3 a
level, L never. Tensors are [B, L, H, W, C] throughout; convolutions run as 2D ones over B * L images, which backends do
best. What the paper leaves open and we chose is in the README under "Deviations".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unimat_jax.conditioning import possible_sites

SCALE = 3
"""Down-sampling factor of H and W per level: attention resolutions 1, 3, 9 (paper, appendix 6)."""
CONVOLUTIONS, ATTENTIONS = ("axial", "full", "plane"), ("factorised", "full")
_zeros = nn.initializers.zeros_init()


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
        shift = self.param("bias", _zeros, (channels,)) - center * scale
        shape = (len(x), *[1] * len(axes), channels)
        return (x * scale.reshape(shape) + shift.reshape(shape)) * weight


def sinusoidal_embedding(logsnr: jax.Array, size: int) -> jax.Array:
    """Sines and cosines [B, size] of logsnr [B] (about -20 to 20), wavelengths from 0.6 to 300."""
    frequencies = jnp.exp(jnp.linspace(jnp.log(10.0), jnp.log(0.02), size // 2))
    angles = logsnr[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


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
        return y + self.param("bias", _zeros, (self.features,))


class ResBlock(nn.Module):
    """Two convolutions; the embedding scales and shifts between them."""

    features: int
    dropout_rate: float
    convolution: str

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        h = nn.silu(SiteNorm(name="norm_in")(x, mask))
        h = Conv(self.features, self.convolution, name="conv_in")(h)
        scale, shift = jnp.split(nn.Dense(2 * self.features, kernel_init=_zeros, name="film")(embedding), 2, -1)
        h = SiteNorm(name="norm_out")(h, mask)
        h = nn.silu(h * (1 + scale[:, None, None, None]) + shift[:, None, None, None]) * mask[..., None]
        h = nn.Dropout(self.dropout_rate, deterministic=not train)(h)
        h = Conv(self.features, self.convolution, _zeros, name="conv_out")(h)
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, name="skip")(x)
        return (x + h) * mask[..., None]


class Attention(nn.Module):
    """Multi-head self-attention over axis 1 of [N, T, C], residual. Only tokens with `mask` [N, T] are attended to."""

    head_dim: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        number, tokens, channels = x.shape
        heads = next(n for n in range(max(1, channels // self.head_dim), 0, -1) if channels % n == 0)
        qkv = nn.Dense(3 * channels, use_bias=False, name="qkv")(SiteNorm(name="norm")(x, mask))
        q, k, v = (a.reshape(number, tokens, heads, -1) for a in jnp.split(qkv, 3, -1))
        y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :]).reshape(x.shape)
        return x + nn.Dense(channels, kernel_init=_zeros, name="out")(y)


class GridAttention(nn.Module):
    """Attention over the tensor: "factorised" (H W within each l, then L within each place) or "full" (all sites).

    `mask` [B, L, H, W]: sites that may hold an atom; the others have nothing to tell.
    """

    head_dim: int
    kind: str

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        b, l, h, w, c = x.shape
        if self.kind == "full":
            sites = x.reshape(b, l * h * w, c)
            return Attention(self.head_dim, name="sites")(sites, mask.reshape(b, -1)).reshape(x.shape)
        if h * w > 1:
            places = x.reshape(b * l, h * w, c)
            x = Attention(self.head_dim, name="places")(places, mask.reshape(b * l, -1)).reshape(x.shape)
        if l > 1:
            y = x.reshape(b, l, h * w, c).swapaxes(1, 2).reshape(b * h * w, l, c)
            y = Attention(self.head_dim, name="levels")(y, mask.reshape(b, l, -1).swapaxes(1, 2).reshape(-1, l))
            x = y.reshape(b, h * w, l, c).swapaxes(1, 2).reshape(x.shape)
        return x


def _factor(size: int) -> int:
    return SCALE if size > 1 else 1


def _coarser(mask: jax.Array) -> jax.Array:
    """True [B, L, ceil(H / 3), ceil(W / 3)] where any site of the patch is."""
    b, l, h, w = mask.shape
    fh, fw = _factor(h), _factor(w)
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, -h % fh), (0, -w % fw)))
    return mask.reshape(b, l, mask.shape[2] // fh, fh, mask.shape[3] // fw, fw).any((3, 5))


class Downsample(nn.Module):
    """H, W -> ceil(H / 3), ceil(W / 3): patches to channels, padded with zeros at the end. An axis of 1 stays 1."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, l, h, w, c = x.shape
        fh, fw = _factor(h), _factor(w)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -h % fh), (0, -w % fw), (0, 0)))
        h, w = x.shape[2] // fh, x.shape[3] // fw
        x = x.reshape(b, l, h, fh, w, fw, c).transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, l, h, w, fh * fw * c)
        return nn.Dense(self.features, name="patch")(x)


class Upsample(nn.Module):
    """The way back to `size` (H, W): channels to patches, the padding cut off."""

    features: int
    size: tuple[int, int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        fh, fw = _factor(self.size[0]), _factor(self.size[1])
        b, l, h, w, _ = x.shape
        x = nn.Dense(self.features * fh * fw, name="patch")(x).reshape(b, l, h, w, fh, fw, self.features)
        x = x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, l, h * fh, w * fw, self.features)
        return x[:, :, : self.size[0], : self.size[1]]


class SitePool(nn.Module):
    """Weighted means over the sites of `mask`, one a head, softmax weights: [B, L, H, W, C] -> [B, heads * C]."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        sites = x.reshape(x.shape[0], -1, x.shape[-1])
        logits = nn.Dense(self.heads, name="weights")(sites)
        weights = nn.softmax(jnp.where(mask.reshape(*sites.shape[:2], 1), logits, -1e9), axis=1)
        return jnp.einsum("bsh,bsc->bhc", weights, sites).reshape(x.shape[0], -1)


class UNet3D(nn.Module):
    """denoise_fn(x_t [B, L, H, W, 3], lattice_t [B, D], logsnr [B], cond) -> (x_pred, lattice_pred), same shapes.

    attention_resolutions: down-sampling factors (1, 3, 9) at which attention runs. coordinate_frequencies: K > 0 adds
    sin and cos of each fractional coordinate, 1, 2, 4, ... 2^(K-1) waves in the cell, to the input. place_embedding: a
    learned vector for each (row, column), since a convolution alone cannot know which element a place is. Raises
    ValueError for a choice that does not exist.
    """

    base_channels: int = 256
    channel_multipliers: Sequence[int] = (1, 2, 4)
    num_res_blocks: int = 3
    attention_resolutions: Sequence[int] = (1, 3, 9)
    head_dim: int = 64
    dropout_rate: float = 0.1
    place_embedding: bool = True
    convolution: str = "axial"
    attention: str = "factorised"
    coordinate_frequencies: int = 0

    def __post_init__(self):
        levels = [SCALE**level for level in range(9)]
        for name, value, choices in (
            ("convolution", [self.convolution], CONVOLUTIONS),
            ("attention", [self.attention], ATTENTIONS),
            ("attention_resolutions", self.attention_resolutions, levels),
        ):
            if not set(value) <= set(choices):
                raise ValueError(f"{name} = {getattr(self, name)!r}: choose from {', '.join(map(str, choices))}")
        super().__post_init__()

    def _embedding(self, lattice: jax.Array, logsnr: jax.Array, cond: dict[str, jax.Array]) -> jax.Array:
        size = 4 * self.base_channels
        h = nn.Dense(size, name="time")(sinusoidal_embedding(logsnr, 2 * self.base_channels))
        h = h + nn.Dense(size, name="lattice_embedding")(lattice)
        flags = [cond["counts_given"][:, None], cond["elements_given"][:, None]]
        h = h + nn.Dense(size, use_bias=False, name="condition_flags")(jnp.concatenate(flags, -1))
        if cond["properties"].shape[-1]:
            values = jnp.concatenate([cond["properties"], cond["properties_given"]], -1)
            h = h + nn.Dense(size, name="property_out")(nn.silu(nn.Dense(size, name="property_in")(values)))
        return nn.silu(nn.Dense(size, name="embedding")(nn.silu(h)))

    def _input(self, x: jax.Array, lattice: jax.Array, cond: dict[str, jax.Array]) -> jax.Array:
        b, l, h, w, _ = x.shape
        parts = [x]
        for k in range(self.coordinate_frequencies):  # model units have period 2
            parts += [jnp.sin(jnp.pi * 2**k * x), jnp.cos(jnp.pi * 2**k * x)]
        per_example = jnp.concatenate([lattice, cond["counts_given"][:, None], cond["elements_given"][:, None]], -1)
        parts += [
            cond["counts"][..., None],
            jnp.broadcast_to(cond["elements"][:, None, ..., None], (b, l, h, w, 1)),
            jnp.broadcast_to(per_example[:, None, None, None], (b, l, h, w, per_example.shape[-1])),
        ]
        # Not a 3 x 3 convolution: its initial weights, set for nine full sites, would hand on a lone atom's coordinates
        # ten times smaller than the embedding of its place.
        y = nn.Dense(self.base_channels, name="sites_in")(jnp.concatenate(parts, -1))
        if self.place_embedding:
            shape = (h, w, self.base_channels)
            y = y + self.param("place_embedding", nn.initializers.normal(0.5), shape)
        return y

    @nn.compact
    def __call__(
        self, x: jax.Array, lattice: jax.Array, logsnr: jax.Array, cond: dict[str, jax.Array], train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        embedding = self._embedding(lattice, logsnr, cond)
        h = self._input(x, lattice, cond)

        masks = [possible_sites(cond)]
        for _ in self.channel_multipliers[1:]:
            masks.append(_coarser(masks[-1]))

        def blocks(h, name, features, level):
            h = ResBlock(features, self.dropout_rate, self.convolution, name=f"{name}_block")(
                h, masks[level], embedding, train
            )
            if SCALE**level in self.attention_resolutions:
                h = GridAttention(self.head_dim, self.attention, name=f"{name}_attention")(h, masks[level])
            return h

        h = h * masks[0][..., None]
        skips, last = [h], len(self.channel_multipliers) - 1
        for level, multiplier in enumerate(self.channel_multipliers):
            features = self.base_channels * multiplier
            for i in range(self.num_res_blocks):
                h = blocks(h, f"down{level}_{i}", features, level)
                skips.append(h)
            if level < last:
                h = Downsample(features, name=f"down{level}")(h)
                skips.append(h)
        h = blocks(h, "middle_0", h.shape[-1], last)
        h = ResBlock(h.shape[-1], self.dropout_rate, self.convolution, name="middle_1_block")(
            h, masks[last], embedding, train
        )
        pooled = [SitePool(4, name="pool_middle")(h, masks[last])]
        for level in reversed(range(last + 1)):
            features = self.base_channels * self.channel_multipliers[level]
            for i in range(self.num_res_blocks + 1):
                h = blocks(jnp.concatenate([h, skips.pop()], -1), f"up{level}_{i}", features, level)
            if level:
                h = Upsample(features, (skips[-1].shape[2], skips[-1].shape[3]), name=f"up{level}")(h)
        h = nn.silu(SiteNorm(name="norm_out")(h, masks[0]))
        pooled.append(SitePool(8, name="pool_out")(h, masks[0]))
        x_pred = Conv(x.shape[-1], self.convolution, _zeros, name="conv_out")(h)
        pooled = jnp.concatenate([*pooled, embedding, lattice], -1)
        hidden = nn.Dense(4 * self.base_channels, name="lattice_hidden")(pooled)
        lattice_pred = nn.Dense(lattice.shape[-1], kernel_init=_zeros, name="lattice_out")(nn.silu(hidden))
        return x_pred.astype(jnp.float32), lattice_pred.astype(jnp.float32)
