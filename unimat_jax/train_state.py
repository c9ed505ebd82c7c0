"""Training state: parameters, their moving average, optimizer state and step; and the optimizer from its settings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from unimat_jax.errors import UserError

SCHEDULES = ("constant", "cosine", "linear")
OPTIMIZERS = ("adam", "muon")
MUON_FACTOR = 3.0
"""Learning rate of Muon in those of Adam, where both change a matrix by as much. benchmarks/README.md, "Muon"."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "params", "ema_params", "opt_state"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """`step` counts finished updates."""

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any


def make_schedule(
    *, learning_rate: float, schedule: str, warmup_steps: int, num_steps: int, final_factor: float
) -> optax.Schedule:
    """Linear warm-up, then constant (the paper), or a cosine or line down to `final_factor` of the learning rate."""
    if schedule not in SCHEDULES:
        raise UserError(f"config.optimizer.schedule = {schedule!r}: choose from {SCHEDULES}")
    rest = max(num_steps - warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, rest, final_factor),
        "linear": lambda: optax.linear_schedule(learning_rate, learning_rate * final_factor, rest),
    }[schedule]()
    warmup = optax.linear_schedule(0.0, learning_rate, max(warmup_steps, 1))
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
    schedule: optax.Schedule, *, b1: float, b2: float, weight_decay: float, grad_clip: float, name: str = "adam"
) -> optax.GradientTransformation:
    """Adam as the paper has it (0.9, 0.99, no decay), behind a clip of the global gradient norm (0 switches it off).
    name "muon": the matrices of a transformer's blocks by Muon (Jordan 2024; the update's size as in Liu et al.,
    2502.16982), with Nesterov's momentum, and so the rest by Adam without decay. Raises UserError for another name."""
    if name not in OPTIMIZERS:
        raise UserError(f"config.optimizer.name = {name!r}: choose from {OPTIMIZERS}")
    clip = optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity()
    if name == "adam":
        return optax.chain(clip, optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay))
    by_muon = muon(
        lambda step: MUON_FACTOR * schedule(step),
        weight_decay=weight_decay,
        adam_learning_rate=schedule,
        adam_b1=b1,
        adam_b2=b2,
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=0.2,  # an update of Adam's size
    )
    return optax.chain(clip, by_muon)


def _matrices(params: Any) -> Any:
    """A MuonDimensionNumbers for each weight matrix of a transformer's blocks, None for all else: embeddings, outputs,
    biases and what the noise level scales (Muon is for what turns features into features)."""

    def one(path: tuple[Any, ...], array: Any) -> MuonDimensionNumbers | None:
        names = [entry.key for entry in path if hasattr(entry, "key")]
        inside = any(name.startswith("block_") for name in names) and not {"film", "pair_bias"} & set(names)
        return MuonDimensionNumbers() if inside and array.ndim == 2 else None

    return jax.tree_util.tree_map_with_path(one, params)


def create_state(init: Callable[[], Any], optimizer: optax.GradientTransformation) -> TrainState:
    params = init()
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def apply_gradients(
    state: TrainState, gradients: Any, optimizer: optax.GradientTransformation, ema_decay: float
) -> TrainState:
    """One update. The average's decay warms up as min(ema_decay, (1 + n) / (10 + n)) with n finished updates: with a
    fixed one a short run's average would still be its initial weights."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
    ema_params = jax.tree.map(lambda a, b: decay * a + (1.0 - decay) * b, state.ema_params, params)
    return TrainState(state.step + 1, params, ema_params, opt_state)
