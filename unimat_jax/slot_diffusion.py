"""Diffusion over the occupied slots alone: where the atoms of an exact composition sit, and in which cell.

The UniMat tensor is which slots are occupied and where the atoms in them are: p(tensor) = p(counts) p(coordinates,
lattice | counts). This is the second factor. Fractional coordinates diffuse on the torus (torus.py), the lattice as in
the U-Net's diffusion (variance preserving, `v`), both by the same time t. What comes out is the same tensor, null where
no atom was asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from unimat_jax import diffusion, exclusion, torus
from unimat_jax.conditioning import training_properties
from unimat_jax.densify import densify
from unimat_jax.errors import UserError
from unimat_jax.periodic_table import covalent_radii
from unimat_jax.representation import UniMatSpec, padded_atoms
from unimat_jax.requests import Request, count_table
from unimat_jax.sampler import LATTICE_RANGE, time_grid
from unimat_jax.slot_sampler import METHODS, Noise, ReverseProcess

DRAFT_WEIGHT = 0.5
"""Weight of a draft's losses against the prediction's."""


@dataclasses.dataclass(frozen=True)
class SlotDiffusion:
    """What `slots` networks learn and how they are sampled: their `apply` and the fields of config.diffusion. See
    `train_step.Objective`.

    focus_share of the times that it is trained at lie between focus_from and focus_to, the others anywhere: where the
    noise is 0.05 to 0.3 of the cell it is decided which crystal comes out, and that is the hardest to learn.
    """

    apply: Callable[..., tuple[jax.Array, ...]]
    spec: UniMatSpec
    sigma_min: float
    sigma_max: float
    logsnr_min: float
    logsnr_max: float
    lattice_weight: float
    property_drop_rate: float = 0.2
    focus_share: float = 0.0
    focus_from: float = 0.5
    focus_to: float = 0.9

    padded: ClassVar[bool] = True

    def __post_init__(self):
        if self.spec.coordinates != "fractional":
            raise UserError(
                f"config.data.coordinates = {self.spec.coordinates!r}: the slots model takes 'fractional' ones"
            )
        if not 0 < self.sigma_min < self.sigma_max <= 1:
            raise UserError(
                f"config.diffusion.sigma_min, sigma_max = {self.sigma_min}, {self.sigma_max}: give rising fractions of "
                "the cell, the largest at most 1"
            )
        if not (0 <= self.focus_share < 1 and 0 <= self.focus_from < self.focus_to <= 1):
            raise UserError(
                f"config.diffusion.focus_share, focus_from, focus_to = {self.focus_share}, {self.focus_from}, "
                f"{self.focus_to}: give a share below 1 and two times, rising, from 0 to 1"
            )

    @staticmethod
    def init_arguments(spec: UniMatSpec, num_properties: int) -> tuple[Any, ...]:
        """Arguments of the network (batch of 1) to initialise it or to trace its shapes."""
        a = spec.max_atoms
        shapes = [(1, a, 3), (1, spec.lattice_size), (1,), (1, 3, 3), (1, a, *spec.table.shape)]
        shapes += [(1, 2 * num_properties)] if num_properties else []
        return tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)

    def losses(
        self, params: Any, batch: Mapping[str, jax.Array], key: jax.Array, t: jax.Array, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Squared errors of the coordinates' pull, a mean over atoms and axes, and of the lattice; one of each an
        example [B], at times t [B]. In training at times of which more are in the focus; a draft's errors, if there is
        one, then add to the gradient, not to the value."""
        t = self._focused(t) if train else t
        x_key, lattice_key, dropout_key = jax.random.split(key, 3)
        slot, lattice_0 = batch["slot"], batch["lattice"]
        mask = slot < self.spec.num_slots
        sigma = self._sigma(t)[:, None, None]
        noise = sigma * jax.random.normal(x_key, batch["coords"].shape)
        frac_t = (batch["coords"] + 1.0) / 2.0 + noise
        x_target = torus.without_drift(torus.pull(noise, sigma) / torus.pull_size(sigma), mask)
        options: dict[str, Any] = {"train": train, "rngs": {"dropout": dropout_key} if train else {}}
        logsnr = self._logsnr(t)
        eps = jax.random.normal(lattice_key, lattice_0.shape)
        lattice_t = diffusion.q_sample(lattice_0, eps, logsnr)
        properties = batch.get("properties")
        if properties is not None and properties.shape[1]:
            key = jax.random.fold_in(key, 3)
            options["properties"] = training_properties(key, properties, self.property_drop_rate)
        lattice_target = diffusion.target(lattice_0, eps, logsnr, "v")

        def errors(x_pred: jax.Array, lattice_pred: jax.Array) -> tuple[jax.Array, jax.Array]:
            x_loss = diffusion.weighted_mean_square(x_pred - x_target, mask.astype(jnp.float32))
            return x_loss, jnp.mean(jnp.square(lattice_pred - lattice_target), -1)

        prediction, *drafts = self._predictions(params, frac_t, lattice_t, t, slot, **options)
        losses = errors(*prediction)
        for draft in drafts if train else ():
            more = jax.tree.map(lambda e: DRAFT_WEIGHT * (e - jax.lax.stop_gradient(e)), errors(*draft))
            losses = jax.tree.map(jnp.add, losses, more)
        return losses

    def check_sampler(self, settings: Mapping[str, Any]) -> None:
        """Raises UserError for fields of config.sample that cannot be."""
        if settings["method"] not in METHODS:
            raise UserError(f"config.sample.method (--method) = {settings['method']!r}: choose from {METHODS}")
        for name in ("mean_below", "noise_below", "corrector_steps", "corrector_below", "closest_ratio"):
            if settings.get(name, 0) < 0:
                raise UserError(f"config.sample.{name} (--{name}) = {settings[name]}: give a number, or 0")
        for name in ("noise_below", "closest_ratio"):
            if settings.get(name, 0) > 1:
                raise UserError(f"config.sample.{name} (--{name}) = {settings[name]}: give a share, 0 to 1")

    def conditions(self, requests: Sequence[Request], values: np.ndarray, given: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays of a batch of requests and of a condition's standardised properties (`values`, `given` [P]): `slot`
        [B, A], flat in [L, H, W], L H W where padded, and `properties` [B, 2 P]. Raises UserError for requests without
        an exact composition."""
        for request in requests:
            if not request.counts:
                raise UserError(
                    f"{request.asked or 'no composition'}: this checkpoint's model (slots) places the atoms of an "
                    "exact composition, and no model of compositions (config.composition.width) lies beside it: give "
                    "--formula or --compositions_from, or take a checkpoint with one, or one of unet3d"
                )
        places = self.spec.num_slots // self.spec.max_atoms_per_element
        rows = []
        for request in requests:
            counts = count_table(request, self.spec).ravel()
            place = np.repeat(np.arange(places), counts)
            level = np.concatenate([np.arange(n) for n in counts[counts > 0]])
            rows.append(level * places + place)
        size = padded_atoms(max(map(len, rows)), self.spec.max_atoms)
        slot = np.full((len(rows), size), self.spec.num_slots, np.int32)
        for target, row in zip(slot, rows, strict=True):
            target[: len(row)] = row
        seen = np.concatenate([values * given, given]).astype(np.float32)
        return {"slot": slot, "properties": np.tile(seen, (len(rows), 1))}

    def abstract_conditions(self, num_properties: int, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of `conditions` with the indices, for the data set's largest crystals."""
        return {
            "slot": jax.ShapeDtypeStruct((batch_size, self.spec.max_atoms), np.int32),
            "properties": jax.ShapeDtypeStruct((batch_size, 2 * num_properties), np.float32),
            "indices": jax.ShapeDtypeStruct((batch_size,), np.int32),
        }

    def sample(
        self,
        params: Any,
        key: jax.Array,
        arrays: Mapping[str, jax.Array],
        *,
        num_steps: int,
        method: str,
        log_variance_interpolation: float,
        guidance_weight: float,
        time_power: float,
        mean_below: float = 0.2,
        noise_below: float = 0.0,
        corrector_steps: int = 0,
        corrector_below: float = 1.0,
        closest_ratio: float = 0.0,
    ) -> tuple[jax.Array, jax.Array]:
        """Samples (x_0 [B, L, H, W, 3], lattice_0 [B, D]) in model units. arrays: of `conditions`, and `indices` [B].

        All noise of a sample comes from (key, its index), the same for an atom whatever the padding. Of the methods and
        of what their settings mean: `slot_sampler.ReverseProcess`. guidance_weight: the paper's w (its equation 2) on
        the properties, of which coordinates and lattice know; a second evaluation each time. closest_ratio: atoms
        of each predicted clean crystal are kept this share of the sum of their covalent radii apart (`exclusion`); with
        0 they are where the network has them.
        """
        slot, seen = arrays["slot"], arrays["properties"]
        mask = slot < self.spec.num_slots
        times = time_grid(num_steps, time_power)
        if guidance_weight and not seen.shape[1]:
            raise UserError(
                f"config.sample.guidance_weight (--guidance_weight) = {guidance_weight}: the model was trained without "
                "properties to guide: give 0"
            )

        def predict(frac: jax.Array, lattice: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array]:
            if not seen.shape[1]:
                return self._predictions(params, frac, lattice, time, slot)[0]
            told = self._predictions(params, frac, lattice, time, slot, properties=seen)[0]
            if not guidance_weight:
                return told
            untold = self._predictions(params, frac, lattice, time, slot, properties=jnp.zeros_like(seen))[0]
            return jax.tree.map(lambda a, b: (1 + guidance_weight) * a - guidance_weight * b, told, untold)

        def evaluate(frac: jax.Array, lattice: jax.Array, i: Any) -> tuple[jax.Array, jax.Array]:
            time = jnp.full(len(slot), times[i])
            x_pred, lattice_pred = predict(frac, lattice, time)
            clean = diffusion.predicted_x0(lattice_pred, lattice, self._logsnr(time), "v").clip(*LATTICE_RANGE)
            sigma = self._sigma(times[i])
            pulled = x_pred * torus.pull_size(sigma)
            if closest_ratio:
                metric = cell_metric(clean, mask.sum(1), self.spec)
                short_of_it = frac - 0.999 * pulled  # atoms predicted at exactly one place part to where they come from
                pulled -= exclusion.push_apart(short_of_it, metric, keep, sigma)
            return pulled, clean

        keep = exclusion.distances_to_keep(self._radii(slot), mask, closest_ratio)
        process = ReverseProcess(
            evaluate,
            Noise(key, arrays["indices"], slot.shape[1], self.spec.lattice_size),
            self._sigma(times).at[-1].set(0.0),  # the last step leaves the smallest noise for none
            self._logsnr(times),
            method=method,
            log_variance_interpolation=log_variance_interpolation,
            mean_below=mean_below,
            noise_below=noise_below,
            corrector_steps=corrector_steps,
            corrector_below=corrector_below,
        )
        frac, lattice = process.run()
        coords = 2.0 * jnp.where(mask[..., None], frac - jnp.floor(frac), 0.0) - 1.0
        return densify({"slot": slot, "coords": coords}, self.spec), lattice

    def _radii(self, slot: jax.Array) -> jax.Array:
        """Covalent radii [B, A], Angstrom, of the elements of slots."""
        of_places = jnp.asarray(covalent_radii(self.spec.table.atomic_numbers).ravel(), jnp.float32)
        return of_places[slot % of_places.size]

    def _sigma(self, t: jax.Array) -> jax.Array:
        return torus.sigma_of(t, self.sigma_min, self.sigma_max)

    def _logsnr(self, t: jax.Array) -> jax.Array:
        return diffusion.cosine_logsnr(t, self.logsnr_min, self.logsnr_max)

    def _focused(self, t: jax.Array) -> jax.Array:
        """Uniform times as they are drawn in training: the inverse of their distribution function."""
        ends = jnp.array([0.0, self.focus_from, self.focus_to, 1.0])
        before = (1 - self.focus_share) * ends + self.focus_share * jnp.array([0.0, 0.0, 1.0, 1.0])
        return jnp.interp(t, before, ends) if self.focus_share else t

    def _predictions(
        self, params: Any, frac: jax.Array, lattice: jax.Array, t: jax.Array, slot: jax.Array, **options: Any
    ) -> list[tuple[jax.Array, jax.Array]]:
        """The network's (pull in units of its size, without drift, and `v` of the lattice), and those of its draft."""
        h, w = self.spec.table.shape
        mask = slot < self.spec.num_slots
        num_atoms = mask.sum(1)
        atoms = (jax.nn.one_hot(slot % (h * w), h * w) * mask[..., None]).reshape(*slot.shape, h, w)
        size = torus.pull_size(self._sigma(t))[:, None, None]

        def redraw(x_pred: jax.Array, lattice_pred: jax.Array) -> tuple[jax.Array, jax.Array]:
            clean = diffusion.predicted_x0(lattice_pred, lattice, self._logsnr(t), "v").clip(*LATTICE_RANGE)
            return frac - size * torus.without_drift(x_pred, mask), cell_metric(clean, num_atoms, self.spec)

        metric = cell_metric(lattice, num_atoms, self.spec)
        out = self.apply({"params": params}, frac, lattice, t, metric, atoms, redraw=redraw, **options)
        return [(torus.without_drift(x, mask), v) for x, v in zip(out[::2], out[1::2], strict=True)]


def cell_metric(lattice: jax.Array, num_atoms: jax.Array, spec: UniMatSpec) -> jax.Array:
    """Metric tensors [B, 3, 3] (Angstrom^2) of noisy standardised lattices [B, 6]. Lengths are kept within 1 and 100
    Angstrom, cosines within 0.95, eigenvalues of a logarithm within 0.01 and 10,000: what noise makes of a cell may be
    none."""
    raw = lattice * jnp.asarray(spec.lattice_std, jnp.float32) + jnp.asarray(spec.lattice_mean, jnp.float32)
    size = jnp.cbrt(jnp.maximum(num_atoms, 1).astype(jnp.float32))[:, None]
    rows, columns = np.triu_indices(3)
    if spec.lattice_form == "log_metric":
        half = jnp.zeros((len(lattice), 3, 3)).at[:, rows, columns].set(raw)
        values, vectors = jnp.linalg.eigh(half + jnp.triu(half, 1).mT)
        values = jnp.exp(values) * size**2
        return jnp.einsum("bij,bj,bkj->bik", vectors, values.clip(0.01, 1e4), vectors)
    lengths = (jnp.exp(raw[:, :3].clip(-20.0, 20.0)) * size).clip(1.0, 100.0)
    alpha, beta, gamma = jnp.moveaxis(raw[:, 3:].clip(-0.95, 0.95), -1, 0)
    one = jnp.ones_like(alpha)
    cosines = jnp.stack([one, gamma, beta, gamma, one, alpha, beta, alpha, one], -1).reshape(-1, 3, 3)
    return cosines * lengths[:, :, None] * lengths[:, None, :]
