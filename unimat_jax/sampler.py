"""Sampling: time grid, step rules, guidance and one `lax.scan`. Knows a denoise_fn and nothing of training.

denoise_fn(x_t [B, L, H, W, 3], lattice_t [B, D], logsnr [B], cond) -> (x_pred, lattice_pred) of one prediction type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unimat_jax import diffusion
from unimat_jax.conditioning import Condition, drop_properties
from unimat_jax.representation import NULL_VALUE

METHODS = ("ancestral", "ddim")
X0_RANGE = (NULL_VALUE - 0.2, 1.2)
"""Predicted clean coordinates are clipped to this (model units): the data lie in [-3, 1]."""
LATTICE_RANGE = (-12.0, 12.0)
"""Predicted clean lattices are clipped to this (standard deviations of the training set)."""

DenoiseFn = Callable[[jax.Array, jax.Array, jax.Array, Condition], tuple[jax.Array, jax.Array]]


def time_grid(num_steps: int, power: float = 1.0) -> jax.Array:
    """Times [num_steps + 1] from 1 (noise) to 0 (data): even, to a `power`; above 1 closer near the data."""
    times = jnp.linspace(1.0, 0.0, num_steps + 1)
    return times if power == 1 else times**power


def guided(denoise_fn: DenoiseFn, guidance_weight: float) -> DenoiseFn:
    """The paper's equation 2: (1 + w) f(x, t | c, aux) - w f(x, t | c); both branches keep the composition c.

    w = 0 is plain conditional sampling and costs one evaluation. Others write the scale s = 1 + w.
    """
    if guidance_weight == 0:
        return denoise_fn

    def both(x, lattice, logsnr, cond):
        doubled = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, drop_properties(cond))
        twice = [jnp.concatenate([a, a]) for a in (x, lattice, logsnr)]
        outputs = denoise_fn(twice[0], twice[1], twice[2], doubled)
        with_aux, without = zip(*(jnp.split(a, 2) for a in outputs), strict=True)
        mixed = [(1 + guidance_weight) * a - guidance_weight * b for a, b in zip(with_aux, without, strict=True)]
        return mixed[0], mixed[1]

    return both


def ancestral_step(x_t, x_0, logsnr_t, logsnr_s, noise, interpolation: float):
    """x_s from x_t and the predicted x_0. The variance lies between the posterior's (interpolation 0) and the forward
    process's (1), interpolated in its logarithm (Ho et al. 2022, "Video diffusion models"; the paper's 0.1)."""
    alpha_t, sigma_t = diffusion.alpha_sigma(logsnr_t)
    alpha_s, sigma_s = diffusion.alpha_sigma(logsnr_s)
    kept = jnp.exp(logsnr_t - logsnr_s)
    removed = -jnp.expm1(logsnr_t - logsnr_s)
    mean = alpha_s * (x_t * kept / alpha_t + removed * x_0)
    log_std = (1 - interpolation) * jnp.log(sigma_s) + interpolation * jnp.log(sigma_t) + 0.5 * jnp.log(removed)
    return mean + jnp.exp(log_std) * noise


def ddim_step(x_t, x_0, logsnr_t, logsnr_s):
    """Deterministic x_s from x_t and the predicted x_0 (Song et al. 2021)."""
    alpha_t, sigma_t = diffusion.alpha_sigma(logsnr_t)
    alpha_s, sigma_s = diffusion.alpha_sigma(logsnr_s)
    return alpha_s * x_0 + sigma_s * (x_t - alpha_t * x_0) / sigma_t


def sample(
    denoise_fn: DenoiseFn,
    key: jax.Array,
    shape: tuple[int, ...],
    *,
    lattice_size: int,
    indices: jax.Array,
    cond: Condition,
    free: jax.Array,
    forced_null: jax.Array | None = None,
    num_steps: int,
    prediction_type: str,
    method: str = "ancestral",
    log_variance_interpolation: float = 0.1,
    guidance_weight: float = 0.0,
    logsnr_min: float = -20.0,
    logsnr_max: float = 20.0,
    time_power: float = 1.0,
    keep_trajectory: bool = False,
) -> Any:
    """Samples (x_0 [B, L, H, W, 3], lattice_0 [B, D]) in model units; with `keep_trajectory` also both after each step.

    indices [B]: numbers of the samples in the whole job; all noise of a sample comes from (key, its index), so it is
    the same whatever the batch. free [B, L, H, W]: all other sites are held at the null value, as in training.
    forced_null [B, L, H, W]: sites whose null value is imposed with the noise of each step, as the network sees null
    sites that no condition tells of; for unconditional samples without some elements.
    """
    if method not in METHODS:
        raise ValueError(f"method = {method!r}: choose from {METHODS}")
    times = time_grid(num_steps, time_power)
    logsnrs = diffusion.cosine_logsnr(times, logsnr_min, logsnr_max)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)
    network = guided(denoise_fn, guidance_weight)
    free = free[..., None]
    forced = jnp.zeros_like(free) if forced_null is None else forced_null[..., None]

    def noise(stream: int):
        def one(sample_key):
            x_key, lattice_key, null_key = jax.random.split(jax.random.fold_in(sample_key, stream), 3)
            return (
                jax.random.normal(x_key, shape[1:]),
                jax.random.normal(lattice_key, (lattice_size,)),
                jax.random.normal(null_key, shape[1:]),
            )

        return jax.vmap(one)(keys)

    def impose(x, null_noise, logsnr):
        noisy_null = diffusion.q_sample(jnp.full((), NULL_VALUE), null_noise, logsnr)
        return jnp.where(free, jnp.where(forced, noisy_null, x), NULL_VALUE)

    def step(carry, i):
        x, lattice = carry
        logsnr_t, logsnr_s = logsnrs[i], logsnrs[i + 1]
        batch_logsnr = jnp.full(shape[:1], logsnr_t)
        x_pred, lattice_pred = network(x, lattice, batch_logsnr, cond)
        x_0 = diffusion.predicted_x0(x_pred, x, batch_logsnr, prediction_type).clip(*X0_RANGE)
        lattice_0 = diffusion.predicted_x0(lattice_pred, lattice, batch_logsnr, prediction_type).clip(*LATTICE_RANGE)
        x_noise, lattice_noise, null_noise = noise(i + 1)
        if method == "ddim":
            next_x = ddim_step(x, x_0, logsnr_t, logsnr_s)
            next_lattice = ddim_step(lattice, lattice_0, logsnr_t, logsnr_s)
        else:
            rest = (logsnr_t, logsnr_s)
            next_x = ancestral_step(x, x_0, *rest, x_noise, log_variance_interpolation)
            next_lattice = ancestral_step(lattice, lattice_0, *rest, lattice_noise, log_variance_interpolation)
        last = i == num_steps - 1  # ends on the prediction itself, without noise
        x = impose(jnp.where(last, x_0, next_x), null_noise * (1 - last), logsnr_s)
        lattice = jnp.where(last, lattice_0, next_lattice)
        return (x, lattice), ((x, lattice) if keep_trajectory else None)

    x_noise, lattice_noise, null_noise = noise(0)
    start = (impose(x_noise, null_noise, logsnrs[0]), lattice_noise)
    (x, lattice), trajectory = jax.lax.scan(step, start, jnp.arange(num_steps))
    x = jnp.where(free & ~forced, x, NULL_VALUE)
    return (x, lattice, trajectory) if keep_trajectory else (x, lattice)
