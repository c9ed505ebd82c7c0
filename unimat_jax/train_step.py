"""The loss of a batch, one training step and one evaluation step: pure functions of arrays, to be jitted whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unimat_jax import diffusion
from unimat_jax.conditioning import free_sites, training_condition
from unimat_jax.densify import densify, occupancy
from unimat_jax.representation import NULL_VALUE, UniMatSpec
from unimat_jax.train_state import TrainState, apply_gradients

EVAL_TIMES = tuple((i + 0.5) / 8 for i in range(8))
"""Diffusion times at which the validation loss is measured."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised: the network's `apply` and the fields of config.diffusion."""

    apply: Callable[..., tuple[jax.Array, jax.Array]]
    spec: UniMatSpec
    prediction_type: str
    logsnr_min: float
    logsnr_max: float
    null_weight: float
    lattice_weight: float
    counts_share: float
    elements_share: float
    property_drop_rate: float

    def losses(
        self, params: Any, batch: Mapping[str, jax.Array], key: jax.Array, t: jax.Array, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Squared errors of the tensor and of the lattice, one of each an example [B], at times t [B].

        Sites that the condition fixes are held at null and carry no weight; free null sites carry `null_weight`.
        """
        cond_key, x_key, lattice_key, dropout_key = jax.random.split(key, 4)
        x_0, lattice_0 = densify(batch, self.spec), batch["lattice"]
        cond = training_condition(
            cond_key,
            batch,
            self.spec,
            counts_share=self.counts_share,
            elements_share=self.elements_share,
            property_drop_rate=self.property_drop_rate,
        )
        free = free_sites(cond, self.spec)
        logsnr = diffusion.cosine_logsnr(t, self.logsnr_min, self.logsnr_max)
        x_eps = jax.random.normal(x_key, x_0.shape)
        lattice_eps = jax.random.normal(lattice_key, lattice_0.shape)
        x_t = jnp.where(free[..., None], diffusion.q_sample(x_0, x_eps, logsnr), NULL_VALUE)
        lattice_t = diffusion.q_sample(lattice_0, lattice_eps, logsnr)
        rngs = {"dropout": dropout_key} if train else {}
        x_pred, lattice_pred = self.apply({"params": params}, x_t, lattice_t, logsnr, cond, train=train, rngs=rngs)
        weight = free * jnp.where(occupancy(batch, self.spec), 1.0, self.null_weight)
        x_error = x_pred - diffusion.target(x_0, x_eps, logsnr, self.prediction_type)
        lattice_error = lattice_pred - diffusion.target(lattice_0, lattice_eps, logsnr, self.prediction_type)
        return diffusion.weighted_mean_square(x_error, weight), jnp.mean(jnp.square(lattice_error), -1)


def train_step(
    state: TrainState,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    microbatches: int = 1,
    unroll: bool = False,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """(next state, metrics). All randomness comes from (key, step, number of the microbatch).

    microbatches: M > 1 runs the batch in M parts, one after another, and averages their gradients: the update of the
    whole batch in about an M-th of its memory. Part m holds examples m, m + M, ...: as many of each device's.
    unroll: without a loop (XLA's convolutions on CPU have gradients that are many times slower inside one).
    """
    time_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
    number = batch["slot"].shape[0]
    times = diffusion.antithetic_times(time_key, number)

    def loss_fn(params, batch, t, key):
        x_loss, lattice_loss = objective.losses(params, batch, key, t, train=True)
        x_loss, lattice_loss = x_loss.mean(), lattice_loss.mean()
        loss = x_loss + objective.lattice_weight * lattice_loss
        return loss, {"train/loss": loss, "train/x_loss": x_loss, "train/lattice_loss": lattice_loss}

    def gradients_and_metrics(batch, t, key):
        (_, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, t, key)
        return gradients, metrics

    if microbatches == 1:
        gradients, metrics = gradients_and_metrics(batch, times, loss_key)
    else:

        def split(a):
            return a.reshape(number // microbatches, microbatches, *a.shape[1:]).swapaxes(0, 1)

        def add(total, part):
            m, batch, t = part
            new = gradients_and_metrics(batch, t, jax.random.fold_in(loss_key, m))
            return jax.tree.map(jnp.add, total, new), None

        parts = (jnp.arange(microbatches), jax.tree.map(split, dict(batch)), split(times))
        one = jax.tree.map(lambda a: a[0], parts)
        like = jax.eval_shape(lambda m, b, t: gradients_and_metrics(b, t, loss_key), *one)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
        total, _ = jax.lax.scan(add, zeros, parts, unroll=unroll)
        gradients, metrics = jax.tree.map(lambda a: a / microbatches, total)
    if "stop" in batch:  # a process that was told to stop tells all: they must end after the same step
        metrics["stop"] = jnp.max(batch["stop"])
    metrics["train/grad_norm"] = optax.tree.norm(gradients)
    state = apply_gradients(state, gradients, optimizer, ema_decay)
    metrics["train/param_norm"] = optax.tree.norm(state.params)  # not finite where the update broke the parameters
    return state, metrics


def eval_step(params: Any, batch: Mapping[str, jax.Array], key: jax.Array, *, objective: Objective) -> jax.Array:
    """Summed losses [T + 1, 2] (tensor, lattice) at each of EVAL_TIMES, and in the last row the number of examples.

    The same key gives the same conditions and noise whatever the parameters.
    """
    weight = batch["weight"]

    def at(t):
        times = jnp.full(weight.shape, t)
        x_loss, lattice_loss = objective.losses(params, batch, key, times, train=False)
        return jnp.stack([(x_loss * weight).sum(), (lattice_loss * weight).sum()])

    sums = jax.lax.map(at, jnp.array(EVAL_TIMES))
    return jnp.concatenate([sums, jnp.full((1, 2), weight.sum())])


def eval_metrics(sums: Any, lattice_weight: float) -> dict[str, float]:
    """Metrics of the summed results of `eval_step` over all batches."""
    means = sums[:-1] / sums[-1, 0]
    metrics = {
        "eval/loss": float(means[:, 0].mean() + lattice_weight * means[:, 1].mean()),
        "eval/x_loss": float(means[:, 0].mean()),
        "eval/lattice_loss": float(means[:, 1].mean()),
    }
    for t, (x_loss, lattice_loss) in zip(EVAL_TIMES, means, strict=True):
        metrics[f"eval/x_loss_t{t:.2f}"] = float(x_loss)
        metrics[f"eval/lattice_loss_t{t:.2f}"] = float(lattice_loss)
    return metrics
