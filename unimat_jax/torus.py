"""Diffusion of fractional coordinates on the torus: Gaussian noise modulo 1 (a wrapped normal), and its score.

Variance exploding: x_t = x_0 + sigma eps modulo 1, and sigma(t) rises geometrically from `sigma_min` at t = 0 (data) to
`sigma_max` at t = 1, where x_t is as good as uniform. What a network learns is the pull -sigma^2 grad log p(x_t), the
mean displacement from the clean coordinates, in units of its root mean square at that sigma. Where sigma is well below
1/2 that is the noise eps; beyond, noise that went around the cell has lost its direction, and the pull fades.

Nothing tells where the origin is, so a pull has no mean over the atoms: means are taken out of noise and predictions.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

_TURNS = np.arange(-4, 5)
"""Windings that count, for sigma up to 1."""
_TABLE_RANGE = (1e-4, 1.0)
_TABLE_SIZE = 512


def sigma_of(t: jax.Array, sigma_min: float, sigma_max: float) -> jax.Array:
    """Noise at times t in [0, 1]: evenly spaced in its logarithm."""
    return sigma_min * (sigma_max / sigma_min) ** t


def wrap(difference: jax.Array) -> jax.Array:
    """The nearest image, in [-1/2, 1/2]."""
    return difference - jnp.round(difference)


def pull(displacement: jax.Array, sigma: jax.Array) -> jax.Array:
    """-sigma^2 times the score of a wrapped normal at `displacement`: the mean of its images, each as likely as its
    length makes it. Shapes broadcast."""
    images = wrap(displacement)[..., None] + jnp.asarray(_TURNS, displacement.dtype)
    weights = jax.nn.softmax(-0.5 * jnp.square(images / sigma[..., None]), axis=-1)
    return (weights * images).sum(-1)


@functools.cache
def _root_mean_squares() -> tuple[np.ndarray, np.ndarray]:
    """(log sigma, log root mean square of the pull), by quadrature."""
    sigma = np.geomspace(*_TABLE_RANGE, _TABLE_SIZE)
    # Points that follow the width: the midpoint rule over one period.
    nodes = (np.arange(4096) + 0.5) / 4096 - 0.5
    half = np.minimum(0.5, 8 * sigma)[:, None]
    d = 2 * half * nodes
    images = d[..., None] + _TURNS
    exponent = -0.5 * np.square(images / sigma[:, None, None])
    density = np.exp(exponent).sum(-1)
    mean = (np.exp(exponent) * images).sum(-1) / density
    square = (density * mean**2).sum(1) / density.sum(1)
    return np.log(sigma), 0.5 * np.log(square)


def pull_size(sigma: jax.Array) -> jax.Array:
    """Root mean square of `pull` under its own wrapped normal: sigma where it is small."""
    log_sigma, log_size = _root_mean_squares()
    return jnp.exp(jnp.interp(jnp.log(sigma), jnp.asarray(log_sigma, jnp.float32), jnp.asarray(log_size, jnp.float32)))


def without_drift(vectors: jax.Array, mask: jax.Array) -> jax.Array:
    """Vectors [B, A, 3] less their mean over the atoms of mask [B, A]; zero elsewhere."""
    weight = mask[..., None].astype(vectors.dtype)
    mean = (vectors * weight).sum(1, keepdims=True) / jnp.maximum(weight.sum(1, keepdims=True), 1)
    return (vectors - mean) * weight
