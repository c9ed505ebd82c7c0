"""The model of occupied slots: its geometry, its invariances, its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pymatgen.core import Lattice
from slot_networks import SETTINGS, SMALL, SPEC, assert_close, network_with, places, slots_of

from unimat_jax import models
from unimat_jax.errors import UserError
from unimat_jax.flops import count_flops
from unimat_jax.models.slots import mean_pairs, nearest, pair_features, shortest_distances
from unimat_jax.slot_diffusion import SlotDiffusion

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


# The network


CASES = [(1, 0, 0), (1, 1, 3), (4, 8, 12)]


NETWORKS = {
    "all pairs": {},
    "4 neighbours": {"neighbours": 4, "directions": True},
    "draft": {"draft_after": 1},
    "draft, 4 neighbours": {"draft_after": 1, "neighbours": 4},
}


@pytest.fixture(scope="module", params=list(NETWORKS.values()), ids=list(NETWORKS))
def predict(request):
    """frac [A, 3], counts, size -> (pull [size, 3], lattice) of a wild network."""
    return predictor(**request.param)


def predictor(**changes):
    network, params = network_with(**changes)
    objective = SlotDiffusion(network.apply, SPEC, **SETTINGS)
    run = jax.jit(lambda frac, lattice, t, slot: objective._predictions(params, frac, lattice, t, slot)[0])

    def call(frac, counts, size=None, fill=0.0):
        number = sum(counts)
        size = size or number
        padded = np.full((1, size, 3), fill, np.float32)
        padded[0, :number] = frac
        lattice = jnp.asarray(np.random.default_rng(5).normal(size=(1, 6)), jnp.float32)
        x, cell = run(jnp.asarray(padded), lattice, jnp.full(1, 0.6), slots_of(counts, size))
        return np.asarray(x[0]), np.asarray(cell[0])

    return call


@pytest.mark.parametrize("counts", CASES)
def test_shifts_and_images_change_nothing(predict, counts):
    frac, rng = places(counts), np.random.default_rng(1)
    before = predict(frac, counts)
    if sum(counts) > 1:
        assert np.abs(before[0]).max() > 0.1 and np.abs(before[0] - predict(places(counts, 9), counts)[0]).max() > 0.05
    assert_close(predict((frac + rng.random(3)) % 1, counts), before)
    assert_close(predict(frac + rng.integers(-2, 3, frac.shape), counts), before)


@pytest.mark.parametrize("counts", CASES)
def test_permuting_the_atoms_of_an_element_permutes_what_comes_out(predict, counts):
    frac, rng = places(counts), np.random.default_rng(1)
    ends = np.cumsum(counts)
    order = np.concatenate([rng.permutation(np.arange(end - n, end)) for n, end in zip(counts, ends, strict=True)])
    x, lattice = predict(frac, counts)
    assert_close(predict(frac[order], counts), (x[order], lattice))


def test_elements_are_told_apart(predict):
    frac = places((1, 1, 3))
    assert np.abs(predict(frac, (1, 1, 3))[0] - predict(frac, (1, 3, 1))[0]).max() > 0.05


@pytest.mark.parametrize("counts", CASES)
def test_padding_changes_nothing_whatever_it_holds(predict, counts):
    frac, number = places(counts), sum(counts)
    x, lattice = predict(frac, counts)
    for fill in (0.0, 0.37):
        padded, cell = predict(frac, counts, number + 7, fill)
        assert_close((padded[:number], cell), (x, lattice))
        assert (padded[number:] == 0).all()


def test_as_many_neighbours_as_atoms_are_all_pairs_and_fewer_still_see_the_far_ones():
    counts = (1, 8, 12)
    frac, every = places(counts), predictor(neighbours=0)
    expected = every(frac, counts)
    for x, y in zip(predictor(neighbours=21)(frac, counts), expected, strict=True):
        np.testing.assert_array_equal(x, y)
    padded = predictor(neighbours=21)(frac, counts, 24)[0]  # chosen among, and none unseen
    assert_close([padded[:21]], expected[:1])
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
        return count_flops(lambda *a: objective._predictions(params, *a)[0], *arguments)

    assert flops(80) - flops(40) == 2 * (flops(40) - flops(20)) > 0


DROPPING = {"remat": True, "dropout_rate": 0.1}
NEAR = {**DROPPING, "neighbours": 3}


@pytest.mark.parametrize(
    "changes", [{}, {"distances": False}, {"directions": True}, DROPPING, NEAR, {**NEAR, "draft_after": 1}]
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


def test_the_blocks_after_a_draft_see_its_geometry():
    network, params = network_with(depth=3, draft_after=2)
    atoms = jax.nn.one_hot(slots_of((1, 1, 3), 5) % 9, 9).reshape(1, 5, *SPEC.table.shape)
    frac, lattice = jnp.asarray(places((1, 1, 3)))[None], jnp.ones((1, 6))
    metric, elsewhere = 16 * jnp.eye(3)[None], jnp.asarray(places((1, 1, 3), 9))[None]

    def run(redraw):
        return network.apply({"params": params}, frac, lattice, jnp.full(1, 0.5), metric, atoms, redraw=redraw)

    plain, moved, grown = (
        run(lambda x, v, drawn=drawn: drawn) for drawn in ((frac, metric), (elsewhere, metric), (frac, 4 * metric))
    )
    for other in (moved, grown):
        assert_close(other[2:], plain[2:])  # the draft itself was before
        assert min(np.abs(a - b).max() for a, b in zip(other[:2], plain[:2], strict=True)) > 0.005
    seen = []
    run(lambda x, v: (seen.append((x, v)), (frac, metric))[1])
    assert_close(seen[0], plain[2:])


def test_a_draft_learns_by_its_own_losses_alone():
    network, params = network_with(draft_after=1)
    objective = SlotDiffusion(network.apply, SPEC, **SETTINGS)
    rng = np.random.default_rng(0)
    coords, lattice = (jnp.asarray(rng.uniform(-1, 1, shape), jnp.float32) for shape in ((2, 6, 3), (2, 6)))
    batch = {"slot": jnp.tile(slots_of((1, 1, 3), 6), (2, 1)), "coords": coords, "lattice": lattice}

    def loss(params, train):
        return sum(e.sum() for e in objective.losses(params, batch, jax.random.key(0), jnp.full(2, 0.5), train=train))

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (trained, gradients), (measured, without) = run(params, True), run(params, False)
    np.testing.assert_allclose(trained, measured, rtol=1e-5)
    heads = [name for name in params if name.endswith("_draft")]
    assert len(heads) == 4
    for name in heads:
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients[name])) > 1e-3
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(without[name]))
    for a, b in zip(*(jax.tree.leaves(g["block_1"]) for g in (gradients, without)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


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
        ({"draft_after": 2}, "below depth = 2"),
        ({"draft_after": -1}, "draft_after = -1"),
    ):
        with pytest.raises(UserError, match=said):
            models.create("slots", **SMALL | changes)
