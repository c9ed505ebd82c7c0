"""From a config to the jitted programs of a run: train step, evaluation step and sampler, with their shardings.

Training, generation and ahead-of-time compilation all take them from here: what is compiled for a pod that is not there
is what would run on it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from unimat_jax import models, sharding
from unimat_jax.composition_model import CompositionModel
from unimat_jax.errors import UserError
from unimat_jax.representation import UniMatSpec
from unimat_jax.slot_diffusion import SlotDiffusion
from unimat_jax.tensor_diffusion import TensorDiffusion
from unimat_jax.train_state import create_state, make_optimizer, make_schedule
from unimat_jax.train_step import COMPOSITION, Objective, eval_step, train_step

FAMILIES: dict[str, Any] = {"unet3d": TensorDiffusion, "slots": SlotDiffusion}
"""What the networks of each name learn (`train_step.Objective`): the one place where model families differ."""


def create_network(settings: Mapping[str, Any]) -> Any:
    """The network of the fields of config.model. Raises UserError for what does not exist."""
    return models.create(settings["name"], **{k: v for k, v in settings.items() if k != "name"})


def create_objective(model: Mapping[str, Any], diffusion: Mapping[str, Any], spec: UniMatSpec) -> Objective:
    """What the network of config.model learns, by config.diffusion. Raises UserError for fields that cannot be."""
    network = create_network(model)
    try:
        return FAMILIES[model["name"]](network.apply, spec, **diffusion)
    except TypeError as error:
        raise UserError(f"config.diffusion: {error}") from error


def create_composition(
    settings: Mapping[str, Any], spec: UniMatSpec, num_properties: int = 0, property_drop_rate: float = 0.2
) -> CompositionModel | None:
    """The model of compositions of the fields of config.composition; None where its width is 0, or without fields.
    Raises UserError for fields that cannot be."""
    if not settings.get("width"):
        return None
    network = models.create_composition(spec.max_atoms_per_element, spec.max_atoms, **settings)
    return CompositionModel(network, spec, num_properties, property_drop_rate)


def init_params(
    key: jax.Array, network: Any, arguments: tuple[Any, ...], composition: CompositionModel | None = None
) -> Any:
    """Initial parameters: the network's, and in the entry COMPOSITION those of the model of compositions."""
    params = network.init(key, *arguments)["params"]
    if composition is None:
        return params
    extra = composition.network.init(jax.random.fold_in(key, 1), *composition.init_arguments())
    return {**params, COMPOSITION: extra["params"]}


def init_arguments(spec: UniMatSpec, num_properties: int, name: str = "unet3d") -> tuple[Any, ...]:
    """Arguments of the network of a name (batch of 1) to initialise it or to trace its shapes."""
    return FAMILIES[name].init_arguments(spec, num_properties)


def abstract_batch(spec: UniMatSpec, num_properties: int, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a training batch, as `data.BatchMaker` makes it."""

    def array(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype)

    return {
        "slot": array(spec.max_atoms, dtype=np.int32),
        "coords": array(spec.max_atoms, 3),
        "lattice": array(spec.lattice_size),
        "num_atoms": array(dtype=np.int32),
        "properties": array(num_properties),
        "index": array(dtype=np.int32),
    }


def compiler_options(platform: str) -> dict[str, Any]:
    """Options of jax.jit for programs with a network. On CPU they switch off XLA's pass that drops `layers.in_memory`
    before operations are fused: the paper's small model trains in a fifth less time and samples in a tenth less."""
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if platform == "cpu" else {}


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A run's network and jitted programs. `shapes` and `shardings` are those of the TrainState that `init()` makes."""

    network: Any
    objective: Objective
    composition: CompositionModel | None
    schedule: optax.Schedule
    init: Callable[[], Any]
    shapes: Any
    shardings: Any
    train_step: Any
    """(state, batch, key) -> (state, metrics); the state is donated."""
    eval_step: Any
    """(params, batch, key) -> summed losses."""

    @property
    def abstract_state(self) -> Any:
        """The TrainState's shapes with their shardings."""
        return jax.tree.map(
            lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), self.shapes, self.shardings
        )

    @property
    def num_params(self) -> int:
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.shapes.params))


def assemble(config: Any, spec: UniMatSpec, schema: Sequence[Mapping[str, Any]], mesh: Any) -> Assembly:
    """The programs of a config for one tensor shape and one mesh. Raises UserError for fields that cannot be."""
    check_microbatches(config.train.batch_size, config.train.microbatches, mesh)
    network = create_network(config.model)
    arguments = init_arguments(spec, len(schema), config.model.name)
    o = config.optimizer
    schedule = make_schedule(
        num_steps=config.train.num_steps,
        learning_rate=o.learning_rate,
        schedule=o.schedule,
        warmup_steps=o.warmup_steps,
        final_factor=o.final_factor,
    )
    composition = create_composition(config.composition, spec, len(schema), config.diffusion.property_drop_rate)
    if o.name == "muon" and config.model.name != "slots":
        raise UserError(
            f"config.optimizer.name = 'muon' with config.model.name = {config.model.name!r}: take 'adam', Muon is for "
            "the matrices of 'slots'"
        )
    settings = {"b1": o.b1, "b2": o.b2, "weight_decay": o.weight_decay, "grad_clip": o.grad_clip}
    optimizer = make_optimizer(schedule, name=o.name, **settings)
    if composition is not None:  # each with its own clip: neither feels the other
        parts: dict[Any, Any] = {"network": optimizer, COMPOSITION: make_optimizer(schedule, **settings)}
        optimizer = optax.partition(parts, lambda tree: {k: k if k == COMPOSITION else "network" for k in tree})
    init_key = jax.random.fold_in(jax.random.key(config.train.seed), 0)

    def init():
        return create_state(lambda: init_params(init_key, network, arguments, composition), optimizer)

    shapes = jax.eval_shape(init)
    shardings = sharding.fsdp_sharding(mesh, shapes)
    by_batch, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    objective = create_objective(config.model, config.diffusion, spec)
    platform = mesh.devices.flat[0].platform
    step = functools.partial(
        train_step,
        objective=objective,
        optimizer=optimizer,
        ema_decay=o.ema_decay,
        microbatches=config.train.microbatches,
        unroll=platform == "cpu",
        composition=composition,
    )
    return Assembly(
        network=network,
        objective=objective,
        composition=composition,
        schedule=schedule,
        init=jax.jit(init, out_shardings=shardings),
        shapes=shapes,
        shardings=shardings,
        train_step=jax.jit(
            step,
            in_shardings=(shardings, by_batch, everywhere),
            out_shardings=(shardings, everywhere),
            donate_argnums=0,
            compiler_options=compiler_options(platform),
        ),
        eval_step=jax.jit(
            functools.partial(eval_step, objective=objective, composition=composition),
            in_shardings=(shardings.ema_params, by_batch, everywhere),
            out_shardings=everywhere,
            compiler_options=compiler_options(platform),
        ),
    )


def check_microbatches(batch_size: int, microbatches: int, mesh: Any) -> None:
    """Raises UserError unless each device gets a whole number of examples of each microbatch."""
    if microbatches < 1 or batch_size % (microbatches * mesh.size):
        raise UserError(
            f"train.batch_size = {batch_size} does not divide by train.microbatches = {microbatches} times "
            f"{mesh.size} devices: choose a multiple"
        )


def sampler_program(objective: Objective, mesh: Any, *, params_sharding: Any = None, **settings: Any) -> Any:
    """Jitted (params, key, arrays of `objective.conditions` and `indices`) -> (x_0 [B, L, H, W, 3], lattice_0 [B, D]),
    the batch over all devices of the mesh, the parameters on each unless they have another `params_sharding`. settings:
    the fields of config.sample; `batch_size` is that of the arrays, and may be left out, `composition_min_p` is
    `composition_program`'s."""
    for other in ("batch_size", "composition_min_p"):
        settings.pop(other, None)

    def run(params, key, arrays):
        return objective.sample(params, key, arrays, **settings)

    everywhere, by_batch = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    params_sharding = everywhere if params_sharding is None else params_sharding
    shardings = {"in_shardings": (params_sharding, everywhere, by_batch), "out_shardings": by_batch}
    return jax.jit(run, **shardings, compiler_options=compiler_options(mesh.devices.flat[0].platform))


def composition_program(composition: CompositionModel, mesh: Any, **settings: Any) -> Any:
    """Jitted (parameters of COMPOSITION, key, arrays of `composition.conditions` and `indices`) -> counts [B, H, W],
    the batch over all devices of the mesh. settings: of `composition.sample`."""
    everywhere, by_batch = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    run = functools.partial(composition.sample, **settings)
    return jax.jit(run, in_shardings=(everywhere, everywhere, by_batch), out_shardings=by_batch)
