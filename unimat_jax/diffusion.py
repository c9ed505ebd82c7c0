"""Gaussian diffusion on arrays: schedule, forward process, the three prediction types and a per-example loss.

Variance preserving: x_t = alpha x_0 + sigma eps, alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr), and logsnr(t)
falls from `logsnr_max` at t = 0 (data) to `logsnr_min` at t = 1 (noise). The network predicts `eps` (the paper's
choice), `x0`, or `v` = alpha eps - sigma x_0; any of them gives the others (paper, section 2.2 and appendix 6).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

PREDICTION_TYPES = ("eps", "x0", "v")


def cosine_logsnr(t: jax.Array, logsnr_min: float = -20.0, logsnr_max: float = 20.0) -> jax.Array:
    """The paper's cosine schedule: logsnr = -2 log tan(a t + b), a and b set by the range."""
    b = jnp.arctan(jnp.exp(-0.5 * logsnr_max))
    a = jnp.arctan(jnp.exp(-0.5 * logsnr_min)) - b
    return -2.0 * jnp.log(jnp.tan(a * t + b))


def time_of_logsnr(logsnr: jax.Array, logsnr_min: float = -20.0, logsnr_max: float = 20.0) -> jax.Array:
    """The inverse of `cosine_logsnr`."""
    b = jnp.arctan(jnp.exp(-0.5 * logsnr_max))
    a = jnp.arctan(jnp.exp(-0.5 * logsnr_min)) - b
    return (jnp.arctan(jnp.exp(-0.5 * logsnr)) - b) / a


def alpha_sigma(logsnr: jax.Array, ndim: int = 1) -> tuple[jax.Array, jax.Array]:
    """alpha and sigma of `logsnr` [B], shaped [B, 1, ...] to go with an array of `ndim` axes; scalars of a scalar."""
    if logsnr.ndim:
        logsnr = logsnr.reshape(logsnr.shape + (1,) * (ndim - logsnr.ndim))
    return jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))


def q_sample(x_0: jax.Array, eps: jax.Array, logsnr: jax.Array) -> jax.Array:
    """x_t [B, ...] of clean data, noise and logsnr [B]."""
    alpha, sigma = alpha_sigma(logsnr, x_0.ndim)
    return alpha * x_0 + sigma * eps


def target(x_0: jax.Array, eps: jax.Array, logsnr: jax.Array, prediction_type: str) -> jax.Array:
    """What a network of this prediction type should return for x_t = q_sample(x_0, eps, logsnr)."""
    if prediction_type == "eps":
        return eps
    if prediction_type == "x0":
        return x_0
    if prediction_type == "v":
        alpha, sigma = alpha_sigma(logsnr, x_0.ndim)
        return alpha * eps - sigma * x_0
    raise ValueError(f"prediction_type = {prediction_type!r}: choose from {PREDICTION_TYPES}")


def predicted_x0(prediction: jax.Array, x_t: jax.Array, logsnr: jax.Array, prediction_type: str) -> jax.Array:
    """x_0 that a prediction stands for."""
    alpha, sigma = alpha_sigma(logsnr, x_t.ndim)
    if prediction_type == "eps":
        return (x_t - sigma * prediction) / alpha
    if prediction_type == "x0":
        return prediction
    if prediction_type == "v":
        return alpha * x_t - sigma * prediction
    raise ValueError(f"prediction_type = {prediction_type!r}: choose from {PREDICTION_TYPES}")


def predicted_eps(prediction: jax.Array, x_t: jax.Array, logsnr: jax.Array, prediction_type: str) -> jax.Array:
    """Noise that a prediction stands for."""
    alpha, sigma = alpha_sigma(logsnr, x_t.ndim)
    if prediction_type == "eps":
        return prediction
    if prediction_type == "x0":
        return (x_t - alpha * prediction) / sigma
    if prediction_type == "v":
        return sigma * x_t + alpha * prediction
    raise ValueError(f"prediction_type = {prediction_type!r}: choose from {PREDICTION_TYPES}")


def antithetic_times(key: jax.Array, number: int) -> jax.Array:
    """Times [number] that are uniform in [0, 1) one by one and evenly spread together (VDM): a lower-variance loss."""
    return jnp.mod(jax.random.uniform(key) + jnp.arange(number) / number, 1.0)


def weighted_mean_square(error: jax.Array, weight: jax.Array) -> jax.Array:
    """Mean over sites of the squared error [B, L, H, W, 3] with site weights [B, L, H, W]; one number an example [B].

    An example whose weights are all zero gives 0.
    """
    axes = tuple(range(1, weight.ndim))
    square = jnp.mean(jnp.square(error), -1)
    return jnp.sum(square * weight, axes) / jnp.maximum(jnp.sum(weight, axes), 1e-8)
