"""Diffusion of the whole UniMat tensor, null sites and all (the paper, section 2.2): how U-Nets learn and sample."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from unimat_jax import diffusion, sampler
from unimat_jax.conditioning import free_sites, make_condition, training_condition
from unimat_jax.densify import densify, occupancy
from unimat_jax.errors import UserError
from unimat_jax.representation import NULL_VALUE, UniMatSpec
from unimat_jax.requests import Request, count_table, element_table

CONDITION = ("counts", "counts_given", "elements", "elements_given", "properties", "properties_given")


SLOTS_ALONE = ("mean_below", "noise_below", "corrector_steps", "corrector_below", "closest_ratio")
"""Fields of config.sample that mean nothing here."""


@dataclasses.dataclass(frozen=True)
class TensorDiffusion:
    """What U-Nets learn and how they are sampled: their `apply` and the fields of config.diffusion. See
    `train_step.Objective`."""

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

    padded: ClassVar[bool] = False

    def __post_init__(self):
        if self.prediction_type not in diffusion.PREDICTION_TYPES:
            raise UserError(
                f"config.diffusion.prediction_type = {self.prediction_type!r}: choose from {diffusion.PREDICTION_TYPES}"
            )
        shares = (self.counts_share, self.elements_share)
        if min(shares) < 0 or sum(shares) > 1:
            raise UserError(
                f"config.diffusion.counts_share, elements_share = {shares}: give shares that add up to at most 1"
            )

    @staticmethod
    def init_arguments(spec: UniMatSpec, num_properties: int) -> tuple[Any, ...]:
        """Arguments of the network (batch of 1) to initialise it or to trace its shapes."""
        lhw, zeros = spec.grid, functools.partial(jnp.zeros, dtype=jnp.float32)
        properties = zeros((1, num_properties))
        cond = make_condition(zeros((1, *lhw)), zeros(1), zeros((1, *lhw[1:])), zeros(1), properties, properties)
        return zeros((1, *lhw, 3)), zeros((1, spec.lattice_size)), zeros(1), cond

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

    def check_sampler(self, settings: Mapping[str, Any]) -> None:
        """Raises UserError for fields of config.sample that cannot be."""
        if settings["method"] not in sampler.METHODS:
            raise UserError(f"config.sample.method (--method) = {settings['method']!r}: choose from {sampler.METHODS}")
        if settings.get("corrector_steps"):
            raise UserError(
                f"config.sample.corrector_steps (--corrector_steps) = {settings['corrector_steps']}: the U-Net's "
                "samplers have none: give 0"
            )

    def conditions(self, requests: Sequence[Request], values: np.ndarray, given: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays of a batch of requests and of a condition's standardised properties (`values`, `given` [P]): those of
        `conditioning.make_condition` and the `forbidden` places [B, H, W]."""
        counts = np.stack([count_table(r, self.spec) for r in requests])
        elements = np.stack([element_table(r, self.spec) for r in requests])
        levels = np.arange(self.spec.max_atoms_per_element)[:, None, None]
        for request in requests:
            if not request.counts and (request.kind == "contains" or request.num_atoms):
                raise UserError(
                    f"{request.asked}: this takes a checkpoint that has a model of compositions "
                    "(config.composition.width): give --formula, --chemical_system or --elements"
                )
        kinds = np.array(["formula" if r.counts else r.kind for r in requests])
        subset = kinds == "elements"
        return {
            "counts": (levels < counts[:, None]).astype(np.float32),
            "counts_given": (kinds == "formula").astype(np.float32),
            "elements": elements.astype(np.float32),
            "elements_given": (kinds == "chemical_system").astype(np.float32),
            "properties": np.tile(values, (len(requests), 1)),
            "properties_given": np.tile(given, (len(requests), 1)),
            "forbidden": subset[:, None, None] & (elements == 0),
        }

    def abstract_conditions(self, num_properties: int, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of `conditions` with the indices."""

        def array(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((batch_size, *shape), dtype)

        return {
            "counts": array(*self.spec.grid),
            "counts_given": array(),
            "elements": array(*self.spec.table.shape),
            "elements_given": array(),
            "properties": array(num_properties),
            "properties_given": array(num_properties),
            "forbidden": array(*self.spec.table.shape, dtype=np.bool_),
            "indices": array(dtype=np.int32),
        }

    def sample(
        self, params: Any, key: jax.Array, arrays: Mapping[str, jax.Array], **settings: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Samples (x_0 [B, L, H, W, 3], lattice_0 [B, D]) in model units. arrays: of `conditions`, and `indices` [B];
        settings: of `sampler.sample`, and those of slots alone."""
        settings = {name: value for name, value in settings.items() if name not in SLOTS_ALONE}
        cond = make_condition(*(arrays[name] for name in CONDITION))
        free = free_sites(cond, self.spec)
        return sampler.sample(
            functools.partial(self.apply, {"params": params}),
            key,
            (*arrays["counts"].shape, 3),
            lattice_size=self.spec.lattice_size,
            indices=arrays["indices"],
            cond=cond,
            free=free,
            forced_null=arrays["forbidden"][:, None] & free,
            prediction_type=self.prediction_type,
            logsnr_min=self.logsnr_min,
            logsnr_max=self.logsnr_max,
            **settings,
        )
