"""The loss of a batch, one training step and one evaluation step: pure functions of arrays, to be jitted whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unimat_jax import diffusion
from unimat_jax.composition_model import CompositionModel
from unimat_jax.representation import UniMatSpec
from unimat_jax.requests import Request
from unimat_jax.train_state import TrainState, apply_gradients

EVAL_TIMES = tuple((i + 0.5) / 8 for i in range(8))
"""Diffusion times at which the validation loss is measured."""
COMPOSITION = "composition"
"""Where the parameters of the model of compositions lie, beside those of the diffusion's network."""


class Objective(Protocol):
    """What a family of models learns and how it is sampled: the seam between networks and all that trains, samples,
    exports and compiles them. Made of a network's `apply`, the spec and the fields of config.diffusion; raises
    UserError for fields that cannot be. `init_arguments(spec, num_properties)` gives the network's arguments.
    """

    padded: ClassVar[bool]
    """Whether a batch is as large as its largest crystal, so that crystals of like sizes belong together."""

    @property
    def apply(self) -> Callable[..., tuple[jax.Array, ...]]: ...
    @property
    def spec(self) -> UniMatSpec: ...
    @property
    def lattice_weight(self) -> float: ...
    def losses(
        self, params: Any, batch: Mapping[str, jax.Array], key: jax.Array, t: jax.Array, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Squared errors of the atoms' places and of the lattice, one of each an example [B], at times t [B]."""
        ...

    def check_sampler(self, settings: Mapping[str, Any]) -> None:
        """Raises UserError for fields of config.sample that cannot be."""
        ...

    def conditions(self, requests: Sequence[Request], values: np.ndarray, given: np.ndarray) -> dict[str, np.ndarray]:
        """What `sample` takes for a batch of requests and of properties [P]. Raises UserError for what the model cannot
        be asked."""
        ...

    def abstract_conditions(self, num_properties: int, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of `conditions`, and of `indices`."""
        ...

    def sample(
        self, params: Any, key: jax.Array, arrays: Mapping[str, jax.Array], **settings: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Tensors x_0 [B, L, H, W, 3] and lattices [B, D]. settings: config.sample without its batch_size."""
        ...


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
    composition: CompositionModel | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """(next state, metrics). All randomness comes from (key, step, number of the microbatch).

    composition: a model of compositions that learns in the same step. It shares no weights with the diffusion's
    network, so that "train/loss" and what that one learns are as without it.

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
        metrics = {"train/loss": loss, "train/x_loss": x_loss, "train/lattice_loss": lattice_loss}
        if composition is None:
            return loss, metrics
        nats = composition.losses(params[COMPOSITION], batch, jax.random.fold_in(key, 1), train=True).mean()
        return loss + nats, {**metrics, "train/composition_loss": nats}

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


def eval_step(
    params: Any,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    *,
    objective: Objective,
    composition: CompositionModel | None = None,
) -> jax.Array:
    """Summed losses [T + 1, 2] (tensor, lattice) at each of EVAL_TIMES, and in the last row the number of examples; a
    third column is the composition's, where there is a model of it: T draws of the orders that it averages over.

    The same key gives the same conditions and noise whatever the parameters.
    """
    weight = batch["weight"]

    def at(t):
        times = jnp.full(weight.shape, t)
        losses = objective.losses(params, batch, key, times, train=False)
        return jnp.stack([(loss * weight).sum() for loss in losses])

    sums = jax.lax.map(at, jnp.array(EVAL_TIMES))
    if composition is not None:
        keys = jax.random.split(key, len(EVAL_TIMES))
        nats = jax.lax.map(lambda k: composition.losses(params[COMPOSITION], batch, k, train=False), keys)
        sums = jnp.concatenate([sums, (nats * weight).sum(1, keepdims=True)], 1)
    return jnp.concatenate([sums, jnp.full((1, sums.shape[1]), weight.sum())])


def eval_metrics(sums: Any, lattice_weight: float) -> dict[str, float]:
    """Metrics of the summed results of `eval_step` over all batches."""
    means = sums[:-1] / sums[-1, 0]
    metrics = {
        "eval/loss": float(means[:, 0].mean() + lattice_weight * means[:, 1].mean()),
        "eval/x_loss": float(means[:, 0].mean()),
        "eval/lattice_loss": float(means[:, 1].mean()),
    }
    if means.shape[1] == 3:
        metrics["eval/composition_loss"] = float(means[:, 2].mean())
    for t, (x_loss, lattice_loss) in zip(EVAL_TIMES, means[:, :2], strict=True):
        metrics[f"eval/x_loss_t{t:.2f}"] = float(x_loss)
        metrics[f"eval/lattice_loss_t{t:.2f}"] = float(lattice_loss)
    return metrics
