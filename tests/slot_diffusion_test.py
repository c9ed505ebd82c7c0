"""The diffusion of occupied slots: its cell, its loss and its samplers, with networks that are known exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from slot_networks import SETTINGS, SMALL, SPEC, network_with, places, slots_of

from unimat_jax import diffusion, torus
from unimat_jax.assembly import create_objective
from unimat_jax.errors import UserError
from unimat_jax.models.slots import shortest_distances
from unimat_jax.representation import UniMatSpec, decode, lattice_matrix, padded_atoms
from unimat_jax.requests import Request
from unimat_jax.slot_diffusion import SlotDiffusion, cell_metric
from unimat_jax.slot_sampler import METHODS


@pytest.mark.parametrize("form", ["parameters", "log_metric"])
def test_the_metric_is_that_of_the_decoded_cell(form):
    spec = UniMatSpec(
        3, 5, SPEC.table, lattice_form=form, lattice_mean=(1.0, 1.1, 1.2, 0, 0, 0), lattice_std=(0.3,) * 6
    )
    lattice = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    metric = np.asarray(cell_metric(jnp.asarray(lattice), jnp.full(8, 5), spec))
    cells = [lattice_matrix(vector, 5, spec) for vector in lattice]
    assert sum(cell is not None for cell in cells) >= 4
    for found, cell in zip(metric, cells, strict=True):
        if cell is not None:
            np.testing.assert_allclose(found, cell @ cell.T, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("form", ["parameters", "log_metric"])
def test_cells_that_are_none_have_a_finite_metric(form):
    spec = UniMatSpec(3, 5, SPEC.table, lattice_form=form, lattice_std=(9.0,) * 6)
    lattice = jnp.asarray(np.random.default_rng(0).normal(size=(64, 6)) * 5, jnp.float32)
    metric = cell_metric(lattice, jnp.full(64, 5), spec)
    assert np.isfinite(metric).all() and np.abs(metric).max() <= 1.01e4
    difference = jnp.asarray(np.random.default_rng(1).uniform(-0.5, 0.5, (64, 4, 4, 3)), jnp.float32)
    assert np.isfinite(shortest_distances(difference, metric)).all()


def answering(x_0, lattice_0):
    """An `apply` that knows the data."""

    def apply(variables, frac, lattice, t, metric, atoms, redraw, train=False, rngs=None):
        sigma = torus.sigma_of(t, 0.002, 0.5)[:, None, None]
        pulled = torus.pull(frac - x_0, sigma) / torus.pull_size(sigma)
        logsnr = diffusion.cosine_logsnr(t, -12.0, 12.0)
        alpha, scale = diffusion.alpha_sigma(logsnr, 2)
        return pulled, diffusion.target(lattice_0, (lattice - alpha * lattice_0) / scale, logsnr, "v")

    return apply


def test_the_loss_of_a_perfect_denoiser_is_zero():
    slot = jnp.concatenate([slots_of((1, 1, 3), 6), slots_of((2, 0, 4), 6)])
    rng = np.random.default_rng(0)
    frac, lattice = rng.random((2, 6, 3)).astype(np.float32), rng.normal(size=(2, 6)).astype(np.float32)
    batch = {"slot": slot, "coords": 2 * frac - 1, "lattice": lattice}
    for t in (0.1, 0.5, 0.9):
        objective = SlotDiffusion(answering(frac, lattice), SPEC, **SETTINGS)
        losses = objective.losses({}, batch, jax.random.key(0), jnp.full(2, t), train=False)
        assert max(np.abs(loss).max() for loss in losses) < 1e-4
    zeros = SlotDiffusion(lambda v, f, l, *a, **k: (jnp.zeros_like(f), jnp.zeros_like(l)), SPEC, **SETTINGS)
    x, _ = zeros.losses({}, batch, jax.random.key(0), jnp.full(2, 0.5), train=False)
    assert ((x > 0.2) & (x < 3)).all()  # unit size at every noise


def test_training_times_gather_in_the_focus():
    t = jnp.linspace(0.0, 1.0, 10_001)[:-1]
    objective = SlotDiffusion(answering(0, 0), SPEC, **SETTINGS, focus_share=0.4, focus_from=0.5, focus_to=0.9)
    drawn = np.asarray(objective._focused(t))
    share = [((drawn >= start) & (drawn < end)).mean() for start, end in ((0, 0.25), (0, 0.5), (0.5, 0.7), (0.5, 0.9))]
    np.testing.assert_allclose(share, [0.15, 0.3, 0.32, 0.64], atol=1e-3)
    np.testing.assert_array_equal(SlotDiffusion(answering(0, 0), SPEC, **SETTINGS)._focused(t), t)


def test_losses_are_in_focus_in_training_alone():
    slot, rng = slots_of((1, 1, 3), 6), np.random.default_rng(0)
    frac, lattice = rng.random((1, 6, 3)).astype(np.float32), rng.normal(size=(1, 6)).astype(np.float32)
    batch = {"slot": slot, "coords": 2 * frac - 1, "lattice": lattice}
    seen = []

    def apply(variables, frac, lattice, t, *arguments, **options):
        seen.append(float(t[0]))
        return jnp.zeros_like(frac), jnp.zeros_like(lattice)

    objective = SlotDiffusion(apply, SPEC, **SETTINGS, focus_share=0.5, focus_from=0.6, focus_to=0.8)
    for train in (True, False):
        objective.losses({}, batch, jax.random.key(0), jnp.full(1, 0.3), train=train)
    assert seen == pytest.approx([0.6, 0.3])


def sampled(objective, requests, method="ancestral", num_steps=40, start=0, **changes):
    nothing = np.zeros(0, np.float32)
    arrays = objective.conditions(requests, nothing, nothing)
    arrays["indices"] = np.arange(start, start + len(requests), dtype=np.int32)
    settings = {"log_variance_interpolation": 0.0, "guidance_weight": 0.0, "time_power": 1.0, **changes}
    return objective.sample({}, jax.random.key(0), arrays, num_steps=num_steps, method=method, **settings)


STO = Request("formula", "SrTiO3", {38: 1, 22: 1, 8: 3})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_at_the_data(method):
    frac = places((1, 1, 3))
    lattice = np.linspace(-1, 1, 6).astype(np.float32)
    clean = np.concatenate([frac, np.zeros((3, 3), np.float32)])
    objective = SlotDiffusion(answering(clean, lattice[None]), SPEC, **SETTINGS)
    x, cell = sampled(objective, [STO] * 3, method)
    np.testing.assert_allclose(cell, np.tile(lattice, (3, 1)), atol=2e-3)
    counts = np.zeros(SPEC.table.shape, int)
    for z, n in STO.counts.items():
        counts.ravel()[SPEC.table.place_of[z]] = n
    for i in range(3):
        crystal = decode(x[i], cell[i], SPEC, counts=counts)
        order = np.argsort([SPEC.table.place_of[z] for z in crystal.atomic_numbers], kind="stable")
        found = crystal.frac_coords[order]
        offset = found - frac - (found - frac)[0]
        assert np.abs(offset - np.round(offset)).max() < 5e-3
    assert (np.asarray(x).mean(-1) <= -2.9).sum() == 3 * (SPEC.num_slots - 5)


def pair_of(spread):
    """An `apply` that is exact for two atoms whose difference is 0.3, give or take a normal `spread`, on each axis."""

    def apply(variables, frac, lattice, t, metric, atoms, **options):
        sigma = torus.sigma_of(t, 0.002, 0.5)[:, None]
        difference = frac[:, 1] - frac[:, 0] - 0.3
        both = jnp.sqrt(spread**2 + 2 * sigma**2)
        half = 0.5 * 2 * sigma**2 / both**2 * torus.pull(difference, both)
        pulled = jnp.stack([-half, half, *[jnp.zeros_like(half)] * (frac.shape[1] - 2)], 1)
        return pulled / torus.pull_size(sigma)[..., None], jnp.zeros_like(lattice)

    return apply


@pytest.mark.parametrize(
    ("method", "num_steps", "corrector_steps"), [(m, 150, 0) for m in METHODS] + [("ancestral", 40, 3)]
)
def test_the_spread_of_the_data_is_that_of_the_samples(method, num_steps, corrector_steps):
    spread, objective = 0.06, SlotDiffusion(pair_of(0.06), SPEC, **SETTINGS)
    requests = [Request("formula", "SrTi", {38: 1, 22: 1})] * 1500
    x, _ = sampled(objective, requests, method, num_steps, corrector_steps=corrector_steps)
    sites = np.asarray(x).reshape(1500, -1, 3)
    first, second = (sites[:, SPEC.table.place_of[z]] for z in (38, 22))
    sign = 1 if SPEC.table.place_of[38] < SPEC.table.place_of[22] else -1
    difference = sign * (second - first) / 2 - 0.3
    deviation = (difference - np.round(difference)).ravel()
    assert np.abs(deviation.mean()) < 0.005
    if method == "mean":
        assert deviation.std() < 0.7 * spread
    else:
        assert deviation.std() == pytest.approx(spread, rel=0.06)
        assert stats.kstest(deviation / deviation.std(), "norm").pvalue > 1e-3


@pytest.mark.parametrize(("method", "corrector_steps"), [("ancestral", 0), ("ancestral", 3), ("ddim", 3)])
def test_the_spread_of_the_lattices_is_that_of_the_data(method, corrector_steps):
    """Of a network that is exact for lattices around 1, by a normal 0.3."""

    def apply(variables, frac, lattice, t, metric, atoms, **options):
        alpha, sigma = diffusion.alpha_sigma(diffusion.cosine_logsnr(t, -12, 12)[:, None])
        gain = alpha * 0.3**2 / ((alpha * 0.3) ** 2 + sigma**2)
        clean = 1.0 + gain * (lattice - alpha)
        return jnp.zeros_like(frac), (alpha * lattice - clean) / sigma  # v

    requests = [Request("formula", "SrTi", {38: 1, 22: 1})] * 1000
    objective = SlotDiffusion(apply, SPEC, **SETTINGS)
    lattice = np.asarray(sampled(objective, requests, method, 150, corrector_steps=corrector_steps)[1])
    assert lattice.mean() == pytest.approx(1.0, abs=0.02)
    assert lattice.std() == pytest.approx(0.3, rel=0.06)


def test_the_narrow_method_is_as_narrow_as_it_is_told():
    objective = SlotDiffusion(pair_of(0.06), SPEC, **SETTINGS)
    requests = [Request("formula", "SrTi", {38: 1, 22: 1})] * 500

    def width(**settings):
        sites = np.asarray(sampled(objective, requests, "mean", 100, **settings)[0]).reshape(500, -1, 3)
        first, second = (sites[:, SPEC.table.place_of[z]] for z in (38, 22))
        sign = 1 if SPEC.table.place_of[38] < SPEC.table.place_of[22] else -1
        difference = sign * (second - first) / 2 - 0.3
        return (difference - np.round(difference)).std()

    wide, narrow, narrower = width(mean_below=0.0), width(mean_below=0.05), width(mean_below=0.3)
    assert wide == pytest.approx(0.06, rel=0.1) and narrower < narrow < wide
    corrected = width(mean_below=0.3, corrector_steps=1)
    assert corrected < narrower == width(mean_below=0.3, corrector_steps=1, corrector_below=0.0)
    assert corrected < width(mean_below=0.3, corrector_steps=1, corrector_below=0.05) < narrower
    assert narrower < width(mean_below=0.3, noise_below=0.5) < wide
    assert width(mean_below=0.3, noise_below=1.0) == wide


@pytest.mark.parametrize("method", METHODS)
def test_atoms_that_a_network_puts_at_one_place_are_kept_apart(method):
    """By their radii's share, whatever the method; those that are apart do not feel it."""
    lattice = np.array([[1.5, 1.5, 1.5, 0, 0, 0]], np.float32)  # a cube with an edge of 5.6 Angstrom

    def nearest(offset, ratio):
        clean = np.zeros((padded_atoms(2, SPEC.max_atoms), 3), np.float32)
        clean[1] = offset
        objective = SlotDiffusion(answering(clean, lattice), SPEC, **SETTINGS)
        x, cell = sampled(objective, [Request("formula", "O2", {8: 2})] * 8, method, closest_ratio=ratio)
        metric = np.asarray(cell_metric(cell, jnp.full(8, 2), SPEC))
        sites = np.asarray(x).reshape(8, SPEC.max_atoms_per_element, -1, 3)[:, :2, SPEC.table.place_of[8]]
        difference = (sites[:, 0] - sites[:, 1]) / 2
        difference -= np.round(difference)
        return np.sqrt(np.einsum("bx,bxy,by->b", difference, metric, difference))

    assert nearest(0.0, 0.0).max() < 0.1
    np.testing.assert_allclose(nearest(0.0, 0.7), 0.7 * 2 * 0.66, rtol=0.02)
    np.testing.assert_array_equal(nearest(0.5, 0.7), nearest(0.5, 0.0))


@pytest.mark.parametrize(("guidance_weight", "expected"), [(0.0, 0.2), (1.0, 0.4), (2.0, 0.6)])
def test_guidance_is_the_papers_on_the_properties(guidance_weight, expected):
    """The lattice goes where the value says, the further the larger w; where no value is given, where none leads."""

    def apply(variables, frac, lattice, t, metric, atoms, properties=None, **options):
        alpha, sigma = diffusion.alpha_sigma(diffusion.cosine_logsnr(t, -12, 12)[:, None])
        clean = 0.1 * properties[:, :1] + 0.0 * lattice
        return jnp.zeros_like(frac), (alpha * lattice - clean) / sigma  # v

    objective = SlotDiffusion(apply, SPEC, **SETTINGS)
    for given, wanted in ((1.0, expected), (0.0, 0.0)):
        arrays = objective.conditions([STO], np.array([2.0]), np.array([given]))
        assert arrays["properties"].tolist() == [[2.0 * given, given]]
        arrays["indices"] = np.zeros(1, np.int32)
        settings = {"log_variance_interpolation": 0.0, "time_power": 1.0, "guidance_weight": guidance_weight}
        _, cell = objective.sample({}, jax.random.key(0), arrays, num_steps=40, method="ddim", **settings)
        np.testing.assert_allclose(cell, wanted, atol=1e-2)


def test_a_sample_depends_on_its_index_and_not_on_its_neighbours_or_padding():
    network, params = network_with()
    apply = functools.partial(lambda v, *a, **k: network.apply({"params": params}, *a, **k))
    objective = SlotDiffusion(apply, SPEC, **SETTINGS)
    big = Request("formula", "SrO11", {38: 1, 8: 11})
    x, lattice = sampled(objective, [STO, big, STO], num_steps=4)
    alone, cell = sampled(objective, [STO], num_steps=4, start=2)
    np.testing.assert_allclose(alone[0], x[2], atol=1e-3)
    np.testing.assert_allclose(cell[0], lattice[2], atol=1e-3)
    assert np.abs(np.asarray(x[0]) - np.asarray(x[2])).max() > 0.01


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request("none"), "no composition.*--formula"),
        (Request("chemical_system", "Sr-O", elements=(8, 38)), "--chemical_system=Sr-O.*config.composition.width"),
        (Request("elements", "Sr,O", elements=(8, 38)), "--elements=Sr,O.*--compositions_from"),
    ],
)
def test_what_it_cannot_be_asked(request_, said):
    objective = SlotDiffusion(pair_of(0.1), SPEC, **SETTINGS)
    with pytest.raises(UserError, match=said):
        objective.conditions([STO, request_], np.zeros(0), np.zeros(0))


def test_bad_settings_are_named():
    make = functools.partial(create_objective, {"name": "slots", **SMALL})
    with pytest.raises(UserError, match=r"sigma_max = 0.5, 0.1"):
        make(SETTINGS | {"sigma_min": 0.5, "sigma_max": 0.1}, SPEC)
    for changes in ({"focus_share": 1.0}, {"focus_from": 0.9, "focus_to": 0.5}, {"focus_to": 1.5}):
        with pytest.raises(UserError, match=r"focus_share, focus_from, focus_to = .*rising"):
            make(SETTINGS | changes, SPEC)
    with pytest.raises(UserError, match=r"config.diffusion.*null_weight"):
        make(SETTINGS | {"null_weight": 0.1}, SPEC)
    with pytest.raises(UserError, match=r"coordinates = 'cartesian'"):
        make(SETTINGS, UniMatSpec(3, 5, SPEC.table, "cartesian", "matrix", (0.0,) * 9, (1.0,) * 9))
    with pytest.raises(UserError, match=r"corrector_steps.*= -1"):
        make(SETTINGS, SPEC).check_sampler({"method": "ddim", "corrector_steps": -1})
    with pytest.raises(UserError, match=r"corrector_below.*= -0.1"):
        make(SETTINGS, SPEC).check_sampler({"method": "ddim", "corrector_below": -0.1})
    with pytest.raises(UserError, match=r"closest_ratio.*= 2: give a share"):
        make(SETTINGS, SPEC).check_sampler({"method": "mean", "closest_ratio": 2})
    with pytest.raises(UserError, match=r"noise_below.*= 1.5: give a share"):
        make(SETTINGS, SPEC).check_sampler({"method": "mean", "noise_below": 1.5})
