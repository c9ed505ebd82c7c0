"""From noise to coordinates on the torus and a lattice: the steps of the slots' samplers, whatever the network.

`sampler.py` is the same for whole tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unimat_jax import diffusion, torus
from unimat_jax.sampler import ancestral_step, ddim_step

METHODS = ("ancestral", "mean", "ddim", "heun")
CORRECTION = 0.2
"""Share of the way to the predicted clean crystal that a corrector step takes, with the noise that keeps the
distribution (Langevin)."""

Pair = tuple[jax.Array, jax.Array]
"""Fractional coordinates [B, A, 3] and standardised lattices [B, D], or what moves them."""


@dataclasses.dataclass(frozen=True)
class Noise:
    """Random numbers of samples `indices` [B] of a key: the same for an atom whatever is sampled with it."""

    key: jax.Array
    indices: jax.Array
    num_atoms: int
    lattice_size: int

    def draw(self, stream: Any, of: Callable[..., jax.Array] = jax.random.normal) -> Pair:
        """Those of number `stream`, coordinates by `of`, lattice normal."""

        def one(index: jax.Array) -> Pair:
            sample_key = jax.random.fold_in(self.key, index)
            x_key, lattice_key = jax.random.split(jax.random.fold_in(sample_key, stream))
            by_atom = jax.vmap(lambda i: of(jax.random.fold_in(x_key, i), (3,)))(jnp.arange(self.num_atoms))
            return by_atom, jax.random.normal(lattice_key, (self.lattice_size,))

        return jax.vmap(one)(self.indices)


@dataclasses.dataclass(frozen=True)
class ReverseProcess:
    """evaluate(frac, lattice, i): the predicted pull of the coordinates at noise sigmas[i], and the clean lattice.
    sigmas, logsnrs [T + 1]: noise of coordinates and lattice, down to the data's.

    method: "ancestral", "mean" (ancestral, with the share `noise_below` of its noise where that is below `mean_below`
    of the cell: narrower than the learned distribution; with none at all, two atoms of an element that meet stay
    together, since nothing tells them apart), "ddim" (the probability flow) or "heun" (the same, of second order, with
    two evaluations a step). After each step but the last that leaves less noise than `corrector_below` (of the cell),
    `corrector_steps` Langevin steps of coordinates and lattice at that noise (Song et al. 2021, algorithm 4), an
    evaluation each. Of the coordinates with as little noise as "mean" has there; without any (noise_below = 0) the
    lattice is left to the steps.
    """

    evaluate: Callable[[jax.Array, jax.Array, Any], Pair]
    noise: Noise
    sigmas: jax.Array
    logsnrs: jax.Array
    method: str
    log_variance_interpolation: float
    mean_below: float
    noise_below: float
    corrector_steps: int
    corrector_below: float

    def run(self) -> Pair:
        """Samples: all steps in one loop, on the device."""
        start = self.noise.draw(0, jax.random.uniform)
        return jax.lax.scan(lambda carry, i: (self._step(*carry, i), None), start, jnp.arange(self._num_steps))[0]

    @property
    def _num_steps(self) -> int:
        return len(self.sigmas) - 1

    def _is_quiet(self, i: jax.Array) -> jax.Array:
        """Whether "mean" leaves out noise at step i."""
        return (self.method == "mean") & (self.sigmas[i] < self.mean_below)

    def _step(self, frac: jax.Array, lattice: jax.Array, i: jax.Array) -> Pair:
        last = i == self._num_steps - 1
        pulled, lattice_0 = self.evaluate(frac, lattice, i)
        move = self._random_step if self.method in ("ancestral", "mean") else self._flow_step
        next_frac, next_lattice = move(frac, lattice, pulled, lattice_0, i)

        def correct(n: jax.Array, carry: Pair) -> Pair:
            moved, turned = self._correction(*carry, i, self._num_steps * (n + 1) + i + 1)
            return carry[0] + moved, carry[1] + turned

        if self.corrector_steps:  # in a loop: the network is compiled once more, however many there are
            next_frac, next_lattice = jax.lax.cond(
                (self.sigmas[i + 1] < self.corrector_below) & ~last,
                lambda pair: jax.lax.fori_loop(0, self.corrector_steps, correct, pair),
                lambda pair: pair,
                (next_frac, next_lattice),
            )
        return torus.wrap(next_frac), jnp.where(last, lattice_0, next_lattice)

    def _random_step(
        self, frac: jax.Array, lattice: jax.Array, pulled: jax.Array, lattice_0: jax.Array, i: jax.Array
    ) -> Pair:
        last, quiet = i == self._num_steps - 1, self._is_quiet(i)
        sigma, ratio = self.sigmas[i], self.sigmas[i + 1] / self.sigmas[i]
        logsnr, interpolation = (self.logsnrs[i], self.logsnrs[i + 1]), self.log_variance_interpolation
        x_noise, lattice_noise = self.noise.draw(i + 1)
        # Between the posterior's variance and the forward process's, as `sampler.ancestral_step` has it.
        std = self.sigmas[i + 1] ** (1 - interpolation) * sigma**interpolation * jnp.sqrt(1 - ratio**2)
        share = jnp.where(quiet, self.noise_below, 1.0)
        next_frac = frac - (1 - ratio**2) * pulled + jnp.where(last, 0.0, share * std) * x_noise
        noisy = ancestral_step(lattice, lattice_0, *logsnr, lattice_noise, interpolation)
        return next_frac, jnp.where(last | quiet, ddim_step(lattice, lattice_0, *logsnr), noisy)

    def _flow_step(
        self, frac: jax.Array, lattice: jax.Array, pulled: jax.Array, lattice_0: jax.Array, i: jax.Array
    ) -> Pair:
        last, ratio = i == self._num_steps - 1, self.sigmas[i + 1] / self.sigmas[i]
        logsnr = self.logsnrs[i], self.logsnrs[i + 1]
        next_frac = frac - (1 - ratio) * pulled
        next_lattice = ddim_step(lattice, lattice_0, *logsnr)
        if self.method == "ddim":
            return next_frac, next_lattice
        again, lattice_1 = self.evaluate(next_frac, next_lattice, i + 1)
        # Along sigma the slope is the pull over sigma; at the last step there is no second one.
        slope = 0.5 * (pulled + again / jnp.where(last, 1.0, ratio))
        next_frac = jnp.where(last, next_frac, frac - (1 - ratio) * slope)
        return next_frac, ddim_step(lattice, 0.5 * (lattice_0 + lattice_1), *logsnr)

    def _correction(self, frac: jax.Array, lattice: jax.Array, i: jax.Array, stream: jax.Array) -> Pair:
        """What a Langevin step at the noise after step i adds."""
        x_noise, lattice_noise = self.noise.draw(stream)
        pulled, clean = self.evaluate(frac, lattice, i + 1)
        alpha, deviation = diffusion.alpha_sigma(self.logsnrs[i + 1])
        share = jnp.where(self._is_quiet(i), self.noise_below, 1.0)
        size = math.sqrt(2 * CORRECTION)
        moved = -CORRECTION * pulled + share * size * self.sigmas[i + 1] * x_noise
        turned = CORRECTION * (alpha * clean - lattice) + size * deviation * lattice_noise
        return moved, turned * (self.method != "mean" or self.noise_below > 0)
