"""The model of occupied slots: its geometry, its invariances, its diffusion on the torus, and a run from end to end."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pymatgen.core import Lattice
from scipy import stats
from tiny_run import PROPERTY

from unimat_jax import default_config, diffusion, models, sharding, torus
from unimat_jax.assembly import create_objective, init_arguments, sampler_program
from unimat_jax.errors import UserError
from unimat_jax.flops import count_flops
from unimat_jax.generator import Generator
from unimat_jax.models.slots import mean_pairs, nearest, pair_features, shortest_distances
from unimat_jax.periodic_table import Table
from unimat_jax.representation import UniMatSpec, decode, lattice_matrix
from unimat_jax.requests import Request
from unimat_jax.slot_diffusion import SlotDiffusion, cell_metric
from unimat_jax.train import train

SPEC = UniMatSpec(
    max_atoms_per_element=24,
    max_atoms=24,
    table=Table.of_elements(["Sr", "Ti", "O"]),
    lattice_mean=(0.9,) * 3 + (0.0,) * 3,
    lattice_std=(0.2,) * 6,
)
SETTINGS = {"sigma_min": 0.002, "sigma_max": 0.5, "logsnr_min": -12.0, "logsnr_max": 12.0, "lattice_weight": 1.0}
SMALL = {"width": 16, "depth": 2, "heads": 2, "pair_width": 8}


# The torus


@pytest.mark.parametrize("sigma", [0.002, 0.05, 0.2, 0.5])
def test_the_pull_is_the_score_of_a_wrapped_normal(sigma):
    @jax.jit
    @jax.vmap
    @jax.grad
    def score(x):
        return jax.nn.logsumexp(-0.5 * jnp.square((x + jnp.arange(-9, 10)) / sigma))

    x = np.random.default_rng(0).uniform(-1.5, 1.5, 50).astype(np.float32)
    expected = -(sigma**2) * score(x)
    np.testing.assert_allclose(torus.pull(x, jnp.full(50, sigma)), expected, atol=2e-6)
    noise = sigma * np.random.default_rng(1).normal(size=400_000).astype(np.float32)
    found = np.sqrt(np.mean(np.square(torus.pull(noise, jnp.full(1, sigma)))))
    assert float(torus.pull_size(jnp.asarray(sigma))) == pytest.approx(found, rel=0.01)


def test_drift_is_taken_out_of_the_atoms_alone():
    vectors = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
    found = np.asarray(torus.without_drift(jnp.asarray(vectors), jnp.asarray(mask)))
    np.testing.assert_allclose(found[0, :3], vectors[0, :3] - vectors[0, :3].mean(0), rtol=1e-5, atol=1e-6)
    assert (found[0, 3] == 0).all() and (found[1] == 0).all()


# Geometry in the noisy cell


def test_distances_are_the_shortest_of_all_images_in_reduced_cells():
    rng = np.random.default_rng(0)
    for _ in range(5):
        matrix = Lattice(rng.normal(size=(3, 3)) * 2 + 4 * np.eye(3)).get_niggli_reduced_lattice()
        frac = rng.random((6, 3))
        difference = frac[:, None] - frac[None]
        metric = matrix.matrix @ matrix.matrix.T
        found = shortest_distances((difference - np.round(difference))[None].astype(np.float32), metric[None])
        np.testing.assert_allclose(found[0], matrix.get_all_distances(frac, frac), atol=2e-3)


def test_waves_are_the_sines_and_cosines_of_the_differences():
    frac = jax.random.uniform(jax.random.key(0), (2, 5, 3))
    found = pair_features(frac, frac[:, None], None, False)
    angle = 2 * np.pi * np.asarray(frac[:, :, None] - frac[:, None], np.float64)
    plain = np.concatenate([f(k * angle) for k in (1, 2, 3) for f in (np.sin, np.cos)], -1)
    np.testing.assert_allclose(found, plain, atol=3e-6)


def test_the_mean_of_pairs_and_its_gradient():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, 5, 3, 6), (2, 5, 6, 7), (2, 5, 3, 7)  # A = 5 atoms with N = 6 others, 3 heads, 7 features
    weights, pair, g = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))

    def loss(mean):
        return jax.value_and_grad(lambda *arrays: (g * mean(*arrays)).sum(), argnums=(0, 1))(weights, pair)

    plain = loss(lambda weights, pair: (weights[..., None] * pair[:, :, None]).sum(3))
    for a, b in zip(jax.tree.leaves(loss(mean_pairs)), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_nearest_atoms_in_a_reduced_cell_are_found_and_no_padded_one():
    rng = np.random.default_rng(0)
    for _ in range(5):
        matrix = Lattice(rng.normal(size=(3, 3)) + 4 * np.eye(3)).get_niggli_reduced_lattice()
        frac, mask = rng.random((12, 3)), np.arange(12) < 9
        metric = (matrix.matrix @ matrix.matrix.T)[None].astype(np.float32)
        found = np.asarray(nearest(jnp.asarray(frac, jnp.float32)[None], metric, jnp.asarray(mask)[None], 10))[0]
        distances = matrix.get_all_distances(frac, frac)
        order = np.argsort(np.where(mask, distances, np.inf), axis=1)
        assert (found[:9, 0] == np.arange(9)).all() and (found[:, :9] < 9).all() and (found[:, 9] >= 9).all()
        # In a cell with other angles than 90 the wrapped image is nearly always the nearest one.
        assert (found[:9, :2] == order[:9, :2]).mean() > 0.95 and (found[:9, :5] == order[:9, :5]).mean() > 0.8


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


# The network


def network_with(seed=0, **changes):
    """(network, parameters without zeros, so that each of them acts)."""
    network = models.create("slots", **SMALL | changes)
    arguments = init_arguments(SPEC, 0, "slots")
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), *arguments)["params"])
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / max(1, s.shape[0]) ** 0.5, s.dtype), shapes)
    return network, params


def slots_of(counts, size):
    """Flat slots [1, size] of so many atoms of Sr, Ti and O."""
    places, grid = SPEC.table.place_of[[38, 22, 8]], SPEC.num_slots // SPEC.max_atoms_per_element
    rows = [level * grid + place for place, n in zip(places, counts, strict=True) for level in range(n)]
    return jnp.asarray([rows + [SPEC.num_slots] * (size - len(rows))], jnp.int32)


CASES = [(1, 0, 0), (1, 1, 3), (4, 8, 12)]


@pytest.fixture(scope="module", params=[{}, {"neighbours": 4, "directions": True}], ids=["all pairs", "4 neighbours"])
def predict(request):
    """frac [A, 3], counts, size -> (pull [size, 3], lattice) of a wild network."""
    return predictor(**request.param)


def predictor(**changes):
    network, params = network_with(**changes)
    objective = SlotDiffusion(network.apply, SPEC, **SETTINGS)
    run = jax.jit(lambda frac, lattice, t, slot: objective._predict(params, frac, lattice, t, slot))

    def call(frac, counts, size=None, fill=0.0):
        number = sum(counts)
        size = size or number
        padded = np.full((1, size, 3), fill, np.float32)
        padded[0, :number] = frac
        lattice = jnp.asarray(np.random.default_rng(5).normal(size=(1, 6)), jnp.float32)
        x, cell = run(jnp.asarray(padded), lattice, jnp.full(1, 0.6), slots_of(counts, size))
        return np.asarray(x[0]), np.asarray(cell[0])

    return call


def places(counts, seed=0):
    return np.random.default_rng(seed).random((sum(counts), 3)).astype(np.float32)


def close(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("counts", CASES)
def test_shifts_and_images_change_nothing(predict, counts):
    frac, rng = places(counts), np.random.default_rng(1)
    before = predict(frac, counts)
    if sum(counts) > 1:
        assert np.abs(before[0]).max() > 0.1 and np.abs(before[0] - predict(places(counts, 9), counts)[0]).max() > 0.05
    close(predict((frac + rng.random(3)) % 1, counts), before)
    close(predict(frac + rng.integers(-2, 3, frac.shape), counts), before)


@pytest.mark.parametrize("counts", CASES)
def test_permuting_the_atoms_of_an_element_permutes_what_comes_out(predict, counts):
    frac, rng = places(counts), np.random.default_rng(1)
    ends = np.cumsum(counts)
    order = np.concatenate([rng.permutation(np.arange(end - n, end)) for n, end in zip(counts, ends, strict=True)])
    x, lattice = predict(frac, counts)
    close(predict(frac[order], counts), (x[order], lattice))


def test_elements_are_told_apart(predict):
    frac = places((1, 1, 3))
    assert np.abs(predict(frac, (1, 1, 3))[0] - predict(frac, (1, 3, 1))[0]).max() > 0.05


@pytest.mark.parametrize("counts", CASES)
def test_padding_changes_nothing_whatever_it_holds(predict, counts):
    frac, number = places(counts), sum(counts)
    x, lattice = predict(frac, counts)
    for fill in (0.0, 0.37):
        padded, cell = predict(frac, counts, number + 7, fill)
        close((padded[:number], cell), (x, lattice))
        assert (padded[number:] == 0).all()


def test_as_many_neighbours_as_atoms_are_all_pairs_and_fewer_still_see_the_far_ones():
    counts = (1, 8, 12)
    frac, every = places(counts), predictor(neighbours=0)
    expected = every(frac, counts)
    for x, y in zip(predictor(neighbours=21)(frac, counts), expected, strict=True):
        np.testing.assert_array_equal(x, y)
    close([predictor(neighbours=21)(frac, counts, 24)[0][:21]], expected[:1])  # padded: chosen among, and none unseen
    few = predictor(neighbours=4)
    assert np.abs(few(frac, counts)[0] - expected[0]).max() > 0.01
    # 2 of 20 alike are not among an atom's 4 nearest; whichever element they are, it notices.
    frac[:] = np.linspace(0, 0.4, 21)[:, None] ** 2
    first, second = few(frac, (1, 8, 12))[0], few(frac, (1, 10, 10))[0]
    assert np.abs(first[0] - second[0]).max() > 1e-3


def test_with_neighbours_operations_grow_with_the_atoms_alone():
    network, params = network_with(neighbours=4)
    objective = SlotDiffusion(network.apply, SPEC, **SETTINGS)

    def flops(size):
        arguments = jnp.zeros((1, size, 3)), jnp.zeros((1, 6)), jnp.zeros(1), jnp.zeros((1, size), jnp.int32)
        return count_flops(lambda *a: objective._predict(params, *a), *arguments)

    assert flops(80) - flops(40) == 2 * (flops(40) - flops(20)) > 0


NEAR = {"neighbours": 3, "remat": True, "dropout_rate": 0.1}


@pytest.mark.parametrize(
    "changes", [{}, {"distances": False}, {"directions": True}, {"remat": True, "dropout_rate": 0.1}, NEAR]
)
def test_gradients_are_finite_where_atoms_overlap_and_cells_are_none(changes):
    network, params = network_with(**changes)
    objective = SlotDiffusion(network.apply, SPEC, **SETTINGS)
    slot = jnp.concatenate([slots_of((1, 1, 3), 6), slots_of((1, 0, 0), 6), slots_of((2, 2, 2), 6)])
    batch = {"slot": slot, "coords": jnp.zeros((3, 6, 3)), "lattice": jnp.array([[0.0] * 6, [60.0] * 6, [-60.0] * 6])}

    def loss(params, t):
        x, lattice = objective.losses(params, batch, jax.random.key(0), t, train=True)
        return (x + lattice).sum(), x

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for t in (0.0, 1.0):
        (_, x), gradients = run(params, jnp.full(3, t))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
        assert x[1] == 0  # one atom has nowhere to go


def test_bfloat16_is_near_float32():
    outputs = []
    for dtype in ("float32", "bfloat16"):
        network, params = network_with(dtype=dtype)
        atoms = jax.nn.one_hot(slots_of((1, 1, 3), 5) % 9, 9).reshape(1, 5, *SPEC.table.shape)
        metric = 16 * jnp.eye(3)[None]
        frac, lattice = jnp.asarray(places((1, 1, 3)))[None], jnp.ones((1, 6))
        outputs.append(jax.jit(network.apply)({"params": params}, frac, lattice, jnp.full(1, 0.5), metric, atoms))
    for wide, narrow in zip(*outputs, strict=True):
        assert narrow.dtype == jnp.float32 and wide.shape == narrow.shape
        assert 0 < np.abs(wide - narrow).max() < 0.1 * np.abs(wide).max()


def test_choices_that_do_not_exist():
    for changes, said in (
        ({"dtype": "float16"}, "float16"),
        ({"heads": 3}, "multiple"),
        ({"depth": 0}, "above 0"),
        ({"neighbours": -1}, "neighbours = -1"),
    ):
        with pytest.raises(UserError, match=said):
            models.create("slots", **SMALL | changes)


# Learning and sampling, with networks that are known exactly


def answering(x_0, lattice_0):
    """An `apply` that knows the data."""

    def apply(variables, frac, lattice, t, metric, atoms, train=False, rngs=None):
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


def sampled(objective, requests, method="ancestral", num_steps=40, start=0, **changes):
    nothing = np.zeros(0, np.float32)
    arrays = objective.conditions(requests, nothing, nothing)
    arrays["indices"] = np.arange(start, start + len(requests), dtype=np.int32)
    settings = {"log_variance_interpolation": 0.0, "guidance_weight": 0.0, "time_power": 1.0, **changes}
    return objective.sample({}, jax.random.key(0), arrays, num_steps=num_steps, method=method, **settings)


STO = Request("formula", "SrTiO3", {38: 1, 22: 1, 8: 3})


@pytest.mark.parametrize("method", SlotDiffusion.METHODS)
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
    ("method", "num_steps", "corrector_steps"), [(m, 150, 0) for m in SlotDiffusion.METHODS] + [("ancestral", 40, 3)]
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
    assert width(mean_below=0.3, corrector_steps=1) < narrower
    assert narrower < width(mean_below=0.3, noise_below=0.5) < wide
    assert width(mean_below=0.3, noise_below=1.0) == wide


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
    with pytest.raises(UserError, match=r"config.diffusion.*null_weight"):
        make(SETTINGS | {"null_weight": 0.1}, SPEC)
    with pytest.raises(UserError, match=r"coordinates = 'cartesian'"):
        make(SETTINGS, UniMatSpec(3, 5, SPEC.table, "cartesian", "matrix", (0.0,) * 9, (1.0,) * 9))
    with pytest.raises(UserError, match=r"corrector_steps.*= -1"):
        make(SETTINGS, SPEC).check_sampler({"method": "ddim", "corrector_steps": -1})
    with pytest.raises(UserError, match=r"noise_below.*= 1.5: give a share"):
        make(SETTINGS, SPEC).check_sampler({"method": "mean", "noise_below": 1.5})


# A run


def config(data_dir, **changes):
    config = default_config.get_config("slots")
    config.data.update(dataset="starter", data_dir=str(data_dir), table="data", random_shift=False)
    config.model.update(SMALL | {"depth": 1})
    config.optimizer.update(learning_rate=3e-3, warmup_steps=2, ema_decay=0.9)
    config.train.update(num_steps=6, batch_size=8, log_every=1, checkpoint_every=3, eval_every=3, eval_examples=8)
    config.train.update(sample_every=6, sample_examples=3)
    config.sample.update(num_steps=4, batch_size=4)
    for name, value in changes.items():
        section, field = name.split("__")
        config[section][field] = value
    return config.lock()


@pytest.fixture(scope="module")
def slots_run(tiny_data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("slots") / "run"
    train(config(tiny_data), workdir)
    return workdir


def rows_of(workdir):
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["step"], {}).update(row)
    return found


def test_training_logs_what_the_u_net_logs(slots_run):
    rows = rows_of(slots_run)
    assert {"eval/loss", "eval/x_loss_t0.06", "train/loss", "sample/decoded"} <= set(rows[6])
    assert all(np.isfinite(row["train/loss"]) for step, row in rows.items() if step)
    assert json.loads((slots_run / "model.json").read_text())["model"]["name"] == "slots"


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_run_goes_on_bit_for_bit_and_on_another_mesh_to_rounding(
    slots_run, tiny_data, tmp_path, monkeypatch, optimizer
):
    def gone_on(name, **changes):
        workdir = shutil.copytree(run, tmp_path / name)
        shutil.rmtree(workdir / "checkpoints" / "6")
        train(config(tiny_data, train__sample_every=0, optimizer__name=optimizer, **changes), workdir)
        return Generator(workdir)

    run = slots_run
    if optimizer == "muon":
        run = tmp_path / "run"
        train(config(tiny_data, optimizer__name="muon"), run)
    before = Generator(run)
    assert gone_on("again").params_hash == before.params_hash
    monkeypatch.setattr(sharding, "MIN_SIZE_TO_SHARD", 32)
    other = gone_on("sharded", train__fsdp=2)
    for a, b in zip(*map(jax.tree.leaves, (other.params, before.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)


def test_crystals_of_a_formula(slots_run, tmp_path):
    generator = Generator(slots_run)
    samples = generator.generate(5, formula="NaCl,Li2O", num_formula_units="1", seed=3)
    made = [sample.crystal for sample in samples if sample.crystal is not None]
    assert made and all(sample.status in ("ok", "cell_degenerate", "atoms_overlap") for sample in samples)
    assert {crystal.formula for crystal in made} <= {"NaCl", "Li2O"}
    with pytest.raises(UserError, match="exact composition"):
        generator.generate(2, elements="Na,Cl")
    with pytest.raises(UserError, match=r"guidance_weight = 1|guidance_weight\) = 1"):
        generator.generate(2, formula="NaCl", guidance_weight=1.0)
    with pytest.raises(UserError, match=r"method.* = 'euler'.*'heun'"):
        generator.generate(2, formula="NaCl", method="euler")


def test_requests_of_all_sizes_come_in_their_order_whatever_is_sampled_together(slots_run):
    generator = Generator(slots_run)
    requests = [Request("formula", f"Li{n}", {3: n}) for n in (3, 1, 2, 2, 1, 3, 1, 2, 3, 3)]
    settings = generator.settings(batch_size=4)
    batches = list(generator.sample(requests, settings, {}, seed=0))
    assert [[s.index for s in batch] for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    samples = [sample for batch in batches for sample in batch]
    assert [sample.request for sample in samples] == requests
    (rest,) = generator.sample(requests, settings, {}, seed=0, start=9)
    assert [sample.index for sample in rest] == [9] and rest[0].status == samples[9].status
    if rest[0].crystal is not None:
        np.testing.assert_array_equal(rest[0].crystal.frac_coords, samples[9].crystal.frac_coords)


def test_crystals_of_like_sizes_are_trained_on_together(tiny_data, tmp_path):
    changes = {"train__num_steps": 4, "train__sample_every": 0}
    train(config(tiny_data, data__size_window=2, **changes), tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert all(np.isfinite(rows[step]["train/loss"]) for step in range(1, 5)) and np.isfinite(rows[3]["eval/loss"])
    with pytest.raises(UserError, match=r"data.size_window \(2 there, 0 now\)"):
        train(config(tiny_data, **changes), tmp_path / "run")
    with pytest.raises(UserError, match=r"config.data.size_window = -1"):
        train(config(tiny_data, data__size_window=-1), tmp_path / "other")


def test_a_run_with_neighbours(tiny_data, tmp_path):
    train(config(tiny_data, model__neighbours=2, model__remat=True, train__num_steps=3), tmp_path)
    assert all(np.isfinite(row["train/loss"]) for step, row in rows_of(tmp_path).items() if step)
    generator = Generator(tmp_path)
    assert generator.spec.max_atoms > 2
    samples = generator.generate(2, formula="Li2O", seed=3)
    assert {sample.crystal.formula for sample in samples if sample.crystal is not None} <= {"Li2O"}


def test_a_run_with_a_property(tiny_data, tmp_path):
    changes = {
        "data__properties": (PROPERTY,),
        "composition__width": 8,
        "train__num_steps": 3,
        "train__sample_every": 0,
    }
    train(config(tiny_data, **changes), tmp_path)
    assert all(np.isfinite(row["train/composition_loss"]) for step, row in rows_of(tmp_path).items() if step)
    generator = Generator(tmp_path)
    assert [p["name"] for p in generator.condition_schema] == [PROPERTY]
    free, low, again = (
        generator.generate(4, seed=3, condition=c, guidance_weight=1.0)
        for c in ({}, {PROPERTY: -9.0}, {PROPERTY: -9.0})
    )
    assert [s.request for s in low] == [s.request for s in again] and len(free) == 4
    of_one = (generator.generate(2, formula="Li2O", condition=c) for c in ({}, {PROPERTY: -9.0}))
    for a, b in zip(*of_one, strict=True):
        assert a.crystal is None or b.crystal is None or not np.array_equal(a.crystal.lengths, b.crystal.lengths)
    with pytest.raises(UserError, match="condition=density"):
        generator.generate(2, condition={"density": 1.0})


def test_an_export_gives_the_same_crystals(slots_run, tmp_path):
    from unimat_jax.export import export

    folder = export(slots_run, tmp_path / "model", licence="cc-by-4.0")
    card = (folder / "README.md").read_text()
    assert "slots" in card and "exact composition" in card
    ours, theirs = (Generator(path).generate(3, formula="NaCl", seed=1) for path in (slots_run, folder))
    for a, b in zip(ours, theirs, strict=True):
        assert a.status == b.status
        if a.crystal is not None:
            np.testing.assert_array_equal(a.crystal.frac_coords, b.crystal.frac_coords)


def test_compile_mode_has_its_shapes(slots_run):
    generator = Generator(slots_run)
    objective = generator._objective
    told = objective.abstract_conditions(0, 4)
    largest = Request("formula", "Li3O2", {3: 3, 8: 2})
    real = objective.conditions([largest] * 4, np.zeros(0), np.zeros(0)) | {"indices": np.arange(4, dtype=np.int32)}
    assert {k: (v.shape, v.dtype) for k, v in told.items()} == {k: (v.shape, v.dtype) for k, v in real.items()}
    program = sampler_program(objective, sharding.make_mesh(), **generator.config["sample"])
    x, lattice = jax.eval_shape(program, generator.params, jax.random.key(0), told)
    assert x.shape == (4, *generator.spec.grid, 3) and lattice.shape == (4, 6)
