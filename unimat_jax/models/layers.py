"""Products, norms and convolutions over the UniMat tensor [B, L, H, W, C].

Mixed precision: activations have the compute dtype (config.model.dtype); parameters, sums of products and statistics
are float32. Where a backend runs one form of the same maths much faster than another, `platform_dependent` picks.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

CONVOLUTIONS = ("axial", "full", "plane")
zeros_init = nn.initializers.zeros_init()

_SUM = {"preferred_element_type": jnp.float32}


def _centred_init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Initial convolution kernels [..., C, F] of which the centre holds half of the variance: an atom's neighbours on
    the table are mostly empty, and evenly drawn kernels would hand on a small part of its signal."""
    taps = math.prod(shape[:-2])
    share = jnp.full(taps, 0.5 / max(taps - 1, 1)).at[taps // 2].set(0.5 if taps > 1 else 1.0)
    return jax.random.normal(key, shape, dtype) * jnp.sqrt(share.reshape(*shape[:-2], 1, 1) / shape[-2]).astype(dtype)


def in_memory(x: jax.Array) -> jax.Array:
    """x. On CPU its values are kept for all who read them: XLA would compute them again in each, site by site in the
    transposed order that a kernel's gradient wants. It takes `assembly.compiler_options`; without them, and on other
    backends, nothing happens."""
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """x with each entry zero at the rate, to the nearest 1/256 of it, and the others larger for it. A byte of random
    bits an entry, where `flax.linen.Dropout` draws eight: on CPU that is most of its cost."""
    number = math.prod(x.shape)
    words = jax.random.bits(key, (-(-number // 4),), jnp.uint32)
    bytes_ = lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[:number].reshape(x.shape)
    dropped = min(max(round(256 * rate), 1), 255) if rate else 0
    return jnp.where(bytes_ < dropped, 0.0, x * (256 / (256 - dropped))).astype(x.dtype)


def _site_sum(weight: jax.Array, values: jax.Array) -> jax.Array:
    """Weighted sums [B, C] over the sites of values [B, S, C], weight [B, S], in float32. On CPU reductions along an
    axis that is not the last are several times slower than the same sums as products."""

    def by_product(weight, values):
        return jnp.einsum("bs,bsc->bc", weight.astype(values.dtype), values, **_SUM)

    def by_reduction(weight, values):
        return (weight[..., None] * values.astype(jnp.float32)).sum(1)

    return lax.platform_dependent(weight, values, cpu=by_product, default=by_reduction)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def each_site(x: jax.Array, number: int) -> jax.Array:
    """x [B, C] for each of so many sites [B, S, C]. Its gradient is a product: see `_site_sum`."""
    return jnp.broadcast_to(x[:, None], (len(x), number, x.shape[-1]))


each_site.defvjp(
    lambda x, number: (each_site(x, number), x),
    lambda number, x, g: (_site_sum(jnp.ones(g.shape[:2]), in_memory(g)).astype(x.dtype),),
)


def _row_sum(g: jax.Array) -> jax.Array:
    """The sum [F] of the rows of [..., F] in float32: a bias's gradient."""
    rows = g.reshape(len(g), -1, g.shape[-1])
    return _site_sum(jnp.ones(rows.shape[:2]), rows).sum(0)


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """x [..., C] times kernel [C, F], plus bias [F] if there is one, in the dtype of x with float32 sums; the gradients
    of kernel and bias stay float32."""
    y = jnp.matmul(x, kernel.astype(x.dtype), **_SUM)
    return (y if bias is None else y + bias).astype(x.dtype)


def _linear_backward(saved: tuple[Any, ...], g: jax.Array) -> tuple[Any, ...]:
    x, kernel, bias = saved
    dx = jnp.matmul(g, kernel.astype(x.dtype).T, **_SUM).astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    d_kernel = lax.dot_general(x, g, ((rows, rows), ((), ())), **_SUM)
    return dx, d_kernel, None if bias is None else _row_sum(g)


linear.defvjp(lambda x, kernel, bias: (linear(x, kernel, bias), (x, kernel, bias)), _linear_backward)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., F] plus bias [F], in the dtype of x."""
    return x + bias.astype(x.dtype)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), None), lambda _, g: (g, _row_sum(g)))


class Dense(nn.Module):
    """A linear layer of [..., C], in the dtype of its input."""

    features: int
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", zeros_init, (self.features,)) if self.use_bias else None
        return linear(x, kernel, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def site_norm(x: jax.Array, weight: jax.Array, scale: jax.Array, shift: jax.Array, groups: int) -> jax.Array:
    """Group normalisation of x [B, S, C] over the sites of weight [B, S] (1 or 0) alone, times scale [B, C] plus shift
    [B, C]; the other sites come out as zero. Statistics in float32."""
    return _site_norm_forward(x, weight, scale, shift, groups)[0]


def _by_group(values: jax.Array, groups: int) -> jax.Array:
    """Means over the channels of each group, [B, C] -> [B, C]."""
    b, c = values.shape
    means = values.reshape(b, groups, c // groups).mean(-1, keepdims=True)
    return jnp.broadcast_to(means, (b, groups, c // groups)).reshape(b, c)


def _site_norm_forward(x, weight, scale, shift, groups):
    wide = x.astype(jnp.float32)
    number = jnp.maximum(weight.sum(1, keepdims=True), 1.0)
    mean = _by_group(_site_sum(weight, wide) / number, groups)
    spread = _by_group(_site_sum(weight, jnp.square(wide)) / number, groups) - jnp.square(mean)
    inverse = lax.rsqrt(jnp.maximum(spread, 0.0) + 1e-5)
    slope = inverse * scale
    y = (wide * slope[:, None] + (shift - mean * slope)[:, None]) * weight[..., None]
    return y.astype(x.dtype), (x, weight, scale, shift, number, mean, inverse)


def _site_norm_backward(groups, saved, g):
    x, weight, scale, _, number, mean, inverse = saved
    g = in_memory(g)
    g, wide = g.astype(jnp.float32), x.astype(jnp.float32)
    d_shift = _site_sum(weight, g)
    d_scale = inverse * (_site_sum(weight, g * wide) - mean * d_shift)
    # d x = inverse (d y_hat - its mean - x_hat times the mean of d y_hat x_hat), means over the group's sites.
    centre = _by_group(scale * d_shift / number, groups)
    along = _by_group(scale * d_scale / number, groups)
    a, b = inverse * scale, -jnp.square(inverse) * along
    c = -inverse * centre - mean * b
    dx = (g * a[:, None] + wide * b[:, None] + c[:, None]) * weight[..., None]
    return dx.astype(x.dtype), jnp.zeros_like(weight), d_scale, d_shift


site_norm.defvjp(_site_norm_forward, _site_norm_backward)


class SiteNorm(nn.Module):
    """Group normalisation of [B, ..., C] over the sites of `mask` [B, ...] alone; the other sites come out as zero.

    Plain group normalisation would be ruled by the null sites, and a handful of atoms be lost among hundreds of them.
    About 4 channels a group, at most 32 groups, in a number that divides the channels. `film`: (scale, shift), both
    [B, C], that act on the result as (1 + scale) y + shift.
    """

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, film: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
        number, channels = len(x), x.shape[-1]
        most = max(1, min(channels // 4, 32))
        groups = next(g for g in range(most, 0, -1) if channels % g == 0)
        scale = jnp.broadcast_to(self.param("scale", nn.initializers.ones_init(), (channels,)), (number, channels))
        shift = jnp.broadcast_to(self.param("bias", zeros_init, (channels,)), (number, channels))
        if film is not None:
            more, offset = (a.astype(jnp.float32) for a in film)
            scale, shift = scale * (1 + more), shift * (1 + more) + offset
        weight = mask.reshape(number, -1).astype(jnp.float32)
        return jnp.reshape(site_norm(x.reshape(number, -1, channels), weight, scale, shift, groups), x.shape)


_CHUNK_ROWS = 4096
_MAX_CHUNKS = 16


def _conv2d(images: jax.Array, kernel: jax.Array) -> jax.Array:
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=dims, **_SUM)


@jax.custom_vjp
def plane_convolution(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution of [N, H, W, C] that keeps H and W, by [h, w, C, F] (h, w odd), in the dtype of the images with
    float32 sums."""
    return _conv2d(images, kernel.astype(images.dtype)).astype(images.dtype)


def _kernel_gradient(images: jax.Array, g: jax.Array, size: tuple[int, int]) -> jax.Array:
    """[h, w, C, F]: the images are what is convolved, their number is what is summed over."""
    h, w = (n // 2 for n in size)
    return lax.conv_general_dilated(
        images, g, (1, 1), ((h, h), (w, w)), dimension_numbers=("CHWN", "IHWO", "HWNC"), **_SUM
    )


def _kernel_gradient_in_chunks(images: jax.Array, g: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The same, added up over parts that fit a CPU's cache: twice as fast on large batches."""
    number = images.shape[0]
    wanted = max(1, math.prod(g.shape[:3]) // _CHUNK_ROWS)
    chunks = next(n for n in range(min(wanted, _MAX_CHUNKS), 0, -1) if number % n == 0)
    parts = zip(jnp.split(images, chunks), jnp.split(g, chunks), strict=True)
    return functools.reduce(jnp.add, (_kernel_gradient(x, y, size) for x, y in parts))


def _plane_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    images, kernel = saved
    g = in_memory(g)
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3).astype(g.dtype)
    size = (kernel.shape[0], kernel.shape[1])
    d_kernel = lax.platform_dependent(
        images,
        g,
        cpu=functools.partial(_kernel_gradient_in_chunks, size=size),
        default=functools.partial(_kernel_gradient, size=size),
    )
    return _conv2d(g, turned).astype(images.dtype), d_kernel


plane_convolution.defvjp(lambda x, kernel: (plane_convolution(x, kernel), (x, kernel)), _plane_backward)


def _moved(y: jax.Array, offset: Sequence[int]) -> jax.Array:
    """y [B, L, H, W, F] moved by -offset along L, H, W, zeros where nothing comes from."""
    inside = [slice(max(o, 0), n + min(o, 0)) for o, n in zip(offset, y.shape[1:4], strict=True)]
    borders = [(max(-o, 0), max(o, 0)) for o in offset]
    return jnp.pad(y[:, inside[0], inside[1], inside[2]], ((0, 0), *borders, (0, 0)))


def kernel_size(size: int) -> int:
    """Taps along an axis of a grid: three, or the one that can meet data where the axis has one place."""
    return min(3, 2 * size - 1)


class Conv(nn.Module):
    """Convolution over (L, H, W). "axial": a 1 x 3 x 3 kernel plus a 3 x 1 x 1 kernel; "full": 3 x 3 x 3; "plane":
    1 x 3 x 3, as in video diffusion (Ho et al. 2022), where only attention mixes along L.

    Taps that could only ever meet the border (an axis of one place) have no parameters.
    """

    features: int
    kind: str = "axial"
    kernel_init: nn.initializers.Initializer = _centred_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = in_memory(x)
        _, l, h, w, c = x.shape
        size = kernel_size(h), kernel_size(w)
        if self.kind == "full":
            full = self.param("full", self.kernel_init, (kernel_size(l), *size, c, self.features))
            middle = len(full) // 2
            y = _plane(x, full[middle])
            for offset in (-1, 1) if middle else ():
                y = y + _moved(_plane(x, full[middle + offset]), (offset, 0, 0))
        else:
            plane = self.param("plane", self.kernel_init, (*size, c, self.features))
            if l == 1 or self.kind == "plane":
                y = _plane(x, plane)
            else:
                levels = self.param("levels", self.kernel_init, (3, c, self.features))
                # Both kernels have a tap at the centre: one product for the two.
                plane = plane.at[size[0] // 2, size[1] // 2].add(levels[1])
                before, after = jnp.split(linear(x, jnp.concatenate([levels[0], levels[2]], 1), None), 2, -1)
                y = _plane(x, plane) + _moved(before, (-1, 0, 0)) + _moved(after, (1, 0, 0))
        return add_bias(y, self.param("bias", zeros_init, (self.features,)))


def _plane(x: jax.Array, plane: jax.Array) -> jax.Array:
    """The convolution of each level's plane of [B, L, H, W, C] by [h, w, C, F]. Grids of a few sites run tap by tap:
    backends are slow on convolutions that are almost all border."""
    b, l, h, w, c = x.shape
    if h * w > 4:
        return plane_convolution(x.reshape(b * l, h, w, c), plane).reshape(b, l, h, w, plane.shape[-1])
    middle = plane.shape[0] // 2, plane.shape[1] // 2
    y = linear(x, plane[middle], None)
    for i, j in itertools.product(*map(range, plane.shape[:2])):
        if (i, j) != middle:
            y = y + _moved(linear(x, plane[i, j], None), (0, i - middle[0], j - middle[1]))
    return y
