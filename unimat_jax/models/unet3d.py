"""The paper's 3D U-Net over the UniMat tensor (section 2.2, appendix 6), in Flax Linen.

Periods and groups take the place of a video's image plane, the atom index L that of its time. H x W shrinks by 3 a
level, L never. Tensors are [B, L, H, W, C] throughout; convolutions run as 2D ones over B * L images, which backends do
best. What the paper leaves open and we chose is in docs/deviations.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unimat_jax.conditioning import possible_sites
from unimat_jax.models.attention import ATTENTIONS, KERNELS, GridAttention, SitePool
from unimat_jax.models.layers import CONVOLUTIONS, Conv, Dense, SiteNorm, zeros_init
from unimat_jax.models.site_attention import SiteAttention, gather, pair_features, pick_sites

SCALE = 3
"""Down-sampling factor of H and W per level: attention resolutions 1, 3, 9 (paper, appendix 6)."""

DTYPES = ("float32", "bfloat16")


def sinusoidal_embedding(logsnr: jax.Array, size: int) -> jax.Array:
    """Sines and cosines [B, size] of logsnr [B] (about -20 to 20), wavelengths from 0.6 to 300."""
    frequencies = jnp.exp(jnp.linspace(jnp.log(10.0), jnp.log(0.02), size // 2))
    angles = logsnr[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


class ResBlock(nn.Module):
    """Two convolutions; the embedding scales and shifts between them."""

    features: int
    dropout_rate: float
    convolution: str

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        h = nn.silu(SiteNorm(name="norm_in")(x, mask))
        h = Conv(self.features, self.convolution, name="conv_in")(h)
        scale, shift = jnp.split(Dense(2 * self.features, kernel_init=zeros_init, name="film")(embedding), 2, -1)
        h = nn.silu(SiteNorm(name="norm_out")(h, mask, (scale, shift)))
        h = nn.Dropout(self.dropout_rate, deterministic=not train)(h)
        h = Conv(self.features, self.convolution, zeros_init, name="conv_out")(h)
        if x.shape[-1] != self.features:
            x = Dense(self.features, name="skip")(x)
        return (x + h) * mask[..., None]


def _factor(size: int) -> int:
    return SCALE if size > 1 else 1


def _coarser(mask: jax.Array) -> jax.Array:
    """True [B, L, ceil(H / 3), ceil(W / 3)] where any site of the patch is."""
    b, l, h, w = mask.shape
    fh, fw = _factor(h), _factor(w)
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, -h % fh), (0, -w % fw)))
    return mask.reshape(b, l, mask.shape[2] // fh, fh, mask.shape[3] // fw, fw).any((3, 5))


def _alike(h: jax.Array, skips: Sequence[jax.Array | None], features: int) -> int:
    """How many of the next blocks, from the first on, have equal shapes of input, output and parameters."""
    kinds = [None if skip is None else skip.shape for skip in skips]
    if h.shape[-1] != features:
        return 1
    return next((i for i, kind in enumerate(kinds) if kind != kinds[0]), len(kinds))


_PARTS = ("block", "attention", "sites")


def _named(name: str, part: str, module: Callable[..., nn.Module], *arguments: Any) -> Any:
    return module(name=f"{name}_{part}")(*arguments)


def _of_block(params: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {part: params[f"{name}_{part}"] for part in _PARTS if f"{name}_{part}" in params}


def _applied(params: Any, rngs: Any, part: str, module: Callable[..., nn.Module], *arguments: Any) -> Any:
    return module(parent=None).apply({"params": params[part]}, *arguments, rngs=rngs)


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
        return Dense(self.features, name="patch")(x)


class Upsample(nn.Module):
    """The way back to `size` (H, W): channels to patches, the padding cut off."""

    features: int
    size: tuple[int, int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        fh, fw = _factor(self.size[0]), _factor(self.size[1])
        b, l, h, w, _ = x.shape
        x = Dense(self.features * fh * fw, name="patch")(x).reshape(b, l, h, w, fh, fw, self.features)
        x = x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, l, h * fh, w * fw, self.features)
        return x[:, :, : self.size[0], : self.size[1]]


class UNet3D(nn.Module):
    """denoise_fn(x_t [B, L, H, W, 3], lattice_t [B, D], logsnr [B], cond) -> (x_pred, lattice_pred), same shapes.

    attention_resolutions: down-sampling factors (1, 3, 9) at which attention runs. coordinate_frequencies: K > 0 adds
    sin and cos of each fractional coordinate, 1, 2, 4, ... 2^(K-1) waves in the cell, to the input. place_embedding: a
    learned vector for each (row, column), since a convolution alone cannot know which element a place is.
    attended_sites: K > 0 adds attention among the K likeliest sites, `site_width` wide, to each block of the finest
    level (site_attention.py). dtype: of activations and products ("bfloat16" halves their memory; parameters, sums,
    norms and softmax stay float32, as do the input and output layers). attention_kernel: "xla" or "cudnn" (NVIDIA GPUs,
    bfloat16 only), of the grid's attention. remat: keep only what enters a block and compute
    the rest again for the gradient. scan_blocks: equal blocks of a level run in a loop: the same parameters and outputs
    (but other dropout), and less to compile. Raises ValueError for a choice that does not exist.
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
    attention_kernel: str = "xla"
    coordinate_frequencies: int = 0
    attended_sites: int = 0
    site_width: int = 128
    dtype: str = "float32"
    remat: bool = False
    scan_blocks: bool = False

    def __post_init__(self):
        levels = [SCALE**level for level in range(9)]
        for name, value, choices in (
            ("convolution", [self.convolution], CONVOLUTIONS),
            ("attention", [self.attention], ATTENTIONS),
            ("attention_kernel", [self.attention_kernel], KERNELS),
            ("attention_resolutions", self.attention_resolutions, levels),
            ("dtype", [self.dtype], DTYPES),
        ):
            if not set(value) <= set(choices):
                raise ValueError(f"{name} = {getattr(self, name)!r}: choose from {', '.join(map(str, choices))}")
        if self.attention_kernel == "cudnn" and self.dtype == "float32":
            raise ValueError("attention_kernel = 'cudnn' computes in bfloat16: set dtype = 'bfloat16', or write 'xla'")
        if self.attended_sites < 0 or self.site_width < 1:
            raise ValueError(f"attended_sites = {self.attended_sites}: give 0 (off) or more; site_width: 1 or more")
        super().__post_init__()

    def _embedding(self, lattice: jax.Array, logsnr: jax.Array, cond: dict[str, jax.Array]) -> jax.Array:
        size = 4 * self.base_channels
        h = Dense(size, name="time")(sinusoidal_embedding(logsnr, 2 * self.base_channels))
        h = h + Dense(size, name="lattice_embedding")(lattice)
        flags = [cond["counts_given"][:, None], cond["elements_given"][:, None]]
        h = h + Dense(size, use_bias=False, name="condition_flags")(jnp.concatenate(flags, -1))
        if cond["properties"].shape[-1]:
            values = jnp.concatenate([cond["properties"], cond["properties_given"]], -1)
            h = h + Dense(size, name="property_out")(nn.silu(Dense(size, name="property_in")(values)))
        return nn.silu(Dense(size, name="embedding")(nn.silu(h)))

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
        y = Dense(self.base_channels, name="sites_in")(jnp.concatenate(parts, -1))
        if self.place_embedding:
            shape = (h, w, self.base_channels)
            y = y + self.param("place_embedding", nn.initializers.normal(0.5), shape)
        return y

    @nn.compact
    def __call__(
        self, x: jax.Array, lattice: jax.Array, logsnr: jax.Array, cond: dict[str, jax.Array], train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        time_and_cell = self._embedding(lattice, logsnr, cond)
        embedding = time_and_cell.astype(self.dtype)
        h = self._input(x, lattice, cond).astype(self.dtype)
        res_block, grid_attention = ResBlock, GridAttention
        if self.remat:
            res_block, grid_attention = nn.remat(ResBlock, static_argnums=(4,)), nn.remat(GridAttention)
        res_block = functools.partial(res_block, dropout_rate=self.dropout_rate, convolution=self.convolution)
        grid_attention = functools.partial(grid_attention, self.head_dim, self.attention, self.attention_kernel)

        masks = [possible_sites(cond)]
        for _ in self.channel_multipliers[1:]:
            masks.append(_coarser(masks[-1]))

        h = h * masks[0][..., None]
        tokens = None
        if self.attended_sites:
            sites, site_mask = pick_sites(x, masks[0], self.attended_sites)
            picked = sites, site_mask, pair_features(gather(x, sites)).astype(self.dtype)
            tokens = Dense(self.site_width, name="tokens_in")(gather(h, sites))

        def block(call, carry, skip, features, level):
            """One block by `call(part, module class, arguments)`; (h, tokens), and h."""
            h, tokens = carry
            h = h if skip is None else jnp.concatenate([h, skip], -1)
            h = call("block", functools.partial(res_block, features), h, masks[level], embedding, train)
            if SCALE**level in self.attention_resolutions:
                h = call("attention", grid_attention, h, masks[level])
            if level == 0 and tokens is not None:
                attention = functools.partial(SiteAttention, self.head_dim)
                h, tokens = call("sites", attention, h, tokens, *picked, embedding)
            return (h, tokens), h

        def blocks(carry, name, skips, features, level):
            """A level's blocks, one for each of `skips` (arrays to concatenate, or None); (h, tokens), and each h."""
            outputs, i = [], 0
            while i < len(skips):
                alike = _alike(carry[0], skips[i:], features) if self.scan_blocks and not self.is_initializing() else 1
                if alike == 1:
                    carry, out = block(functools.partial(_named, f"{name}_{i}"), carry, skips[i], features, level)
                    outputs.append(out)
                else:
                    key = self.make_rng("dropout") if train and self.dropout_rate else None
                    params = [_of_block(self.variables["params"], f"{name}_{k}") for k in range(i, i + alike)]
                    stack = functools.partial(jax.tree.map, lambda *a: jnp.stack(a))
                    skip = None if skips[i] is None else jnp.stack(skips[i : i + alike])

                    def body(carry, part, key=key):
                        params, skip, number = part
                        rngs = {} if key is None else {"dropout": jax.random.fold_in(key, number)}
                        return block(functools.partial(_applied, params, rngs), carry, skip, features, level)

                    carry, out = jax.lax.scan(body, carry, (stack(*params), skip, jnp.arange(alike)))
                    outputs += list(out)
                i += alike
            return carry, outputs

        skips, last = [h], len(self.channel_multipliers) - 1
        for level, multiplier in enumerate(self.channel_multipliers):
            features = self.base_channels * multiplier
            (h, tokens), outputs = blocks((h, tokens), f"down{level}", [None] * self.num_res_blocks, features, level)
            skips += outputs
            if level < last:
                h = Downsample(features, name=f"down{level}")(h)
                skips.append(h)
        (h, tokens), _ = blocks((h, tokens), "middle", [None], features, last)
        h = res_block(features, name="middle_1_block")(h, masks[last], embedding, train)
        pooled = [SitePool(4, name="pool_middle")(h.astype(jnp.float32), masks[last])]
        for level in reversed(range(last + 1)):
            features = self.base_channels * self.channel_multipliers[level]
            back = [skips.pop() for _ in range(self.num_res_blocks + 1)]
            (h, tokens), _ = blocks((h, tokens), f"up{level}", back, features, level)
            if level:
                h = Upsample(features, (skips[-1].shape[2], skips[-1].shape[3]), name=f"up{level}")(h)
        h = nn.silu(SiteNorm(name="norm_out")(h.astype(jnp.float32), masks[0]))
        pooled.append(SitePool(8, name="pool_out")(h, masks[0]))
        if tokens is not None:
            weight = site_mask[..., None] / jnp.maximum(site_mask.sum(1), 1)[:, None, None]
            pooled.append((nn.LayerNorm(name="tokens_out")(tokens.astype(jnp.float32)) * weight).sum(1))
        x_pred = Conv(x.shape[-1], self.convolution, zeros_init, name="conv_out")(h)
        pooled = jnp.concatenate([*pooled, time_and_cell, lattice], -1)
        hidden = Dense(4 * self.base_channels, name="lattice_hidden")(pooled)
        lattice_pred = Dense(lattice.shape[-1], kernel_init=zeros_init, name="lattice_out")(nn.silu(hidden))
        return x_pred.astype(jnp.float32), lattice_pred.astype(jnp.float32)
