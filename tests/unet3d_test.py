"""The network: shapes and gradients at every size, its convolutions against plain ones, and what it listens to."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimat_jax import models
from unimat_jax.conditioning import make_condition, possible_sites
from unimat_jax.errors import UserError
from unimat_jax.models import unet3d

TINY = {"base_channels": 4, "channel_multipliers": (1, 2), "num_res_blocks": 1, "head_dim": 4}
BATCH, PROPERTIES = 2, 2


def inputs(grid, seed=0, lattice_size=6):
    rng = np.random.default_rng(seed)
    normal = functools.partial(rng.normal, size=None)
    cond = make_condition(
        jnp.asarray(rng.integers(0, 2, (BATCH, *grid)), jnp.float32),
        jnp.array([1.0, 0.0]),
        jnp.asarray(rng.integers(0, 2, (BATCH, *grid[1:])), jnp.float32),
        jnp.array([0.0, 1.0]),
        jnp.asarray(normal(size=(BATCH, PROPERTIES)), jnp.float32),
        jnp.array([[1.0, 0.0], [1.0, 1.0]]),
    )
    x, lattice = normal(size=(BATCH, *grid, 3)), normal(size=(BATCH, lattice_size))
    return jnp.asarray(x, jnp.float32), jnp.asarray(lattice, jnp.float32), jnp.array([-3.0, 5.0]), cond


def network(**settings):
    return models.create("unet3d", **TINY | settings)


def shapes_of(net, arguments):
    return jax.eval_shape(lambda: net.init(jax.random.key(0), *arguments)["params"])


def random_params(shapes, seed=0):
    """Nothing is zero, as it would be at initialisation: every parameter matters. No compilation either."""
    rng = np.random.default_rng(seed)

    def one(leaf):
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in) + (leaf.ndim == 1), jnp.float32)

    return jax.tree.map(one, shapes)


CASES = {
    "9x18": ((3, 9, 18), {"channel_multipliers": (1, 1, 2), "attention_resolutions": (9,)}),
    "6x18": ((1, 6, 18), {"attention": "full", "attention_resolutions": (3,), "base_channels": 6, "head_dim": 5}),
    "7x17": ((3, 7, 17), {"convolution": "full", "attention_resolutions": (3,), "coordinate_frequencies": 2}),
    "2x5, sites": ((2, 2, 5), {"channel_multipliers": (1,), "attended_sites": 6, "site_width": 8, "base_channels": 6}),
    "1x1": ((3, 1, 1), {"convolution": "plane", "num_res_blocks": 2, "channel_multipliers": (1,)}),
    "1x1, L = 1": ((1, 1, 1), {"attention": "full", "channel_multipliers": (1,), "place_embedding": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_shapes_and_a_finite_gradient_for_every_parameter(case):
    grid, settings = CASES[case]
    net, arguments = network(**settings), inputs(grid)
    params = random_params(shapes_of(net, arguments))
    weights = inputs(grid, seed=1)[:2]

    @jax.jit
    def run(params):
        def loss(params):
            outputs = net.apply({"params": params}, *arguments)
            return sum(jnp.sum(w * o) for w, o in zip(weights, outputs, strict=True)), outputs

        return jax.grad(loss, has_aux=True)(params)

    gradients, (x, lattice) = run(params)
    assert x.shape == (BATCH, *grid, 3) and lattice.shape == (BATCH, 6)
    assert x.dtype == lattice.dtype == jnp.float32
    assert np.isfinite(x).all() and np.isfinite(lattice).all()
    silent = []
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), jax.tree_util.keystr(path)
        if not np.any(gradient):
            silent.append(jax.tree_util.keystr(path))
    # The weights of a mean over one site are always 1.
    assert all("pool" in name and "weights" in name for name in silent) and (not silent or grid == (1, 1, 1))


@pytest.mark.parametrize(
    ("grid", "planes"),
    [
        ((3, 9, 18), {(9, 18), (3, 6), (1, 2)}),
        ((2, 7, 17), {(7, 17), (3, 6), (1, 2)}),
        ((4, 1, 1), {(1, 1)}),
        ((5, 1, 18), {(1, 18), (1, 6), (1, 2)}),
    ],
)
def test_periods_and_groups_shrink_by_three_and_the_atom_axis_never(grid, planes):
    net, arguments = network(channel_multipliers=(1, 1, 1)), inputs(grid)

    def layers():
        params = net.init(jax.random.key(0), *arguments)
        return net.apply(params, *arguments, capture_intermediates=True, mutable=["intermediates"])[1]

    outputs = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(layers)) if leaf.ndim == 5]
    assert len(outputs) > 20
    assert {shape[1] for shape in outputs} == {grid[0]}
    assert {shape[2:4] for shape in outputs} == planes


def test_the_paper_sized_network():
    """Appendix 6: 256 channels, multipliers 1, 2, 4, three blocks a resolution, attention at 1, 3 and 9."""
    arguments = inputs((2, 9, 18))
    shapes = shapes_of(models.create("unet3d"), arguments)
    attention = [name for name in shapes if name.endswith("attention")]
    assert len(attention) == 3 * 3 + 1 + 3 * 4
    assert shapes["down0_0_block"]["conv_in"]["plane"].shape == (3, 3, 256, 256)
    assert shapes["down2_2_block"]["conv_out"]["plane"].shape == (1, 3, 1024, 1024)  # on a grid of 1 x 2
    widths = [leaf.shape[-1] for leaf in jax.tree.leaves(shapes)]
    assert max(widths) >= 3 * 1024


def outputs_and_gradients(net, params, arguments, train=False):
    rngs = {"dropout": jax.random.key(1)} if train else {}
    weights = [jax.random.normal(jax.random.key(i), a.shape) for i, a in enumerate(arguments[:2])]

    def loss(params):
        outputs = net.apply({"params": params}, *arguments, train=train, rngs=rngs)
        return sum(jnp.sum(w * o) for w, o in zip(weights, outputs, strict=True)), outputs

    return jax.jit(jax.grad(loss, has_aux=True))(params)


def assert_same_network(plain, other, arguments):
    """Equal parameters, outputs and gradients; the random parameters that it was tried with."""
    params = random_params(shapes_of(plain, arguments))
    assert jax.tree.structure(shapes_of(other, arguments)) == jax.tree.structure(params)
    run = functools.partial(outputs_and_gradients, params=params, arguments=arguments, train=True)
    first, second = jax.tree.leaves(run(plain)), jax.tree.leaves(run(other))
    largest = max(float(jnp.abs(a).max()) for a in first)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest)
    return params


def test_rematerialisation_changes_memory_and_nothing_else():
    settings = {"channel_multipliers": (1,), "attention_resolutions": (1,), "dropout_rate": 0.3}
    arguments = inputs((2, 2, 3))
    plain, remat = network(**settings), network(**settings, remat=True)
    params = assert_same_network(plain, remat, arguments)
    text = str(jax.make_jaxpr(lambda p: remat.apply({"params": p}, *arguments))(params))
    assert "checkpoint" in text or "remat" in text


@pytest.mark.parametrize("remat", [False, True])
def test_equal_blocks_in_a_loop_are_the_same_network(remat):
    settings = {"num_res_blocks": 3, "channel_multipliers": (1,), "attention_resolutions": (1,), "dropout_rate": 0.0}
    settings |= {"attended_sites": 4, "site_width": 8}
    arguments = inputs((2, 2, 3))
    plain, scanned = network(**settings), network(**settings, scan_blocks=True, remat=remat)
    params = assert_same_network(plain, scanned, arguments)
    text = [
        str(jax.make_jaxpr(lambda p, net=net: net.apply({"params": p}, *arguments))(params)) for net in (plain, scanned)
    ]
    # Three blocks down and the four up, of which the first has the middle's output: all alike on one level.
    assert [t.count("scan[") for t in text] == [0, 2] and len(text[1]) < 0.6 * len(text[0])


def test_dropout_in_a_loop_differs_from_block_to_block():
    net = network(
        num_res_blocks=2, channel_multipliers=(1,), attention_resolutions=(), dropout_rate=0.5, scan_blocks=True
    )
    arguments = inputs((2, 2, 3))
    params = random_params(shapes_of(net, arguments))

    def run(seed):
        return net.apply({"params": params}, *arguments, train=True, rngs={"dropout": jax.random.key(seed)})[0]

    assert jnp.array_equal(run(0), run(0)) and not jnp.allclose(run(0), run(1))


def test_bfloat16_stays_near_float32_and_its_parameters_are_float32():
    settings = {"channel_multipliers": (1,), "attention_resolutions": (1,), "attended_sites": 4, "site_width": 8}
    arguments = inputs((2, 2, 3))
    full, half = network(**settings), network(**settings, dtype="bfloat16")
    params = random_params(shapes_of(full, arguments))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes_of(half, arguments))} == {jnp.dtype(jnp.float32)}
    text = str(jax.make_jaxpr(lambda p: half.apply({"params": p}, *arguments))(params))
    assert text.count("bf16") > 200
    (gradients, outputs), (near, near_outputs) = (outputs_and_gradients(n, params, arguments) for n in (full, half))
    for a, b in zip(outputs, near_outputs, strict=True):
        assert b.dtype == jnp.float32
        assert float(jnp.abs(a - b).max()) < 0.05 * float(jnp.abs(a).max())
    flat = [jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(g)]) for g in (gradients, near)]
    cosine = flat[0] @ flat[1] / jnp.linalg.norm(flat[0]) / jnp.linalg.norm(flat[1])
    assert float(cosine) > 0.995


def test_what_the_network_listens_to():
    """Each input changes both outputs of its own example and of no other."""
    grid = (2, 2, 3)
    net, arguments = network(attention_resolutions=(1,)), inputs(grid)
    params = random_params(shapes_of(net, arguments))
    run = jax.jit(lambda *arguments: net.apply({"params": params}, *arguments))
    x, lattice = run(*arguments)
    a_x, a_lattice, logsnr, cond = arguments
    possible = np.asarray(possible_sites(cond)[0])
    site, elsewhere = np.argwhere(possible)[0], np.argwhere(~possible)
    if len(elsewhere):  # what stands where the condition allows no atom is not looked at
        unseen = run(a_x.at[0, *elsewhere[0], 1].add(0.5), a_lattice, logsnr, cond)
        np.testing.assert_allclose(unseen[0][0][possible], x[0][possible], atol=1e-5)
    changed = {
        "x": (a_x.at[0, *site, 1].add(0.5), a_lattice, logsnr, cond),
        "lattice": (a_x, a_lattice.at[0, 3].add(0.5), logsnr, cond),
        "logsnr": (a_x, a_lattice, logsnr.at[0].add(0.5), cond),
    }
    for name, value in cond.items():
        changed[name] = (a_x, a_lattice, logsnr, {**cond, name: value.at[0].add(0.5)})
    assert len(changed) == 9
    for name, others in changed.items():
        new_x, new_lattice = run(*others)
        assert np.abs(new_x[0] - x[0]).max() > 1e-4 and np.abs(new_lattice[0] - lattice[0]).max() > 1e-4, name
        np.testing.assert_allclose(new_x[1], x[1], atol=1e-5, err_msg=name)
        np.testing.assert_allclose(new_lattice[1], lattice[1], atol=1e-5, err_msg=name)


def inputs_of(net, name, params, *arguments):
    """What the block of that name gets."""
    found = []

    def watch(next_function, args, kwargs, context):
        if context.module.name == f"{name}_block" and context.method_name == "__call__":
            found.append(args[0])
        return next_function(*args, **kwargs)

    with nn.intercept_methods(watch):
        net.apply({"params": params}, *arguments)
    return found[0]


def test_only_the_place_embedding_tells_two_places_apart():
    """Without it, what stands three columns on comes out three columns on, far from the border."""
    difference = {}
    for embedding in (True, False):
        net = network(channel_multipliers=(1,), attention_resolutions=(), place_embedding=embedding)
        x, lattice, logsnr, cond = inputs((1, 1, 24))
        cond = {name: 0 * value for name, value in cond.items()}  # nothing given: every site may hold an atom
        params = random_params(shapes_of(net, (x, lattice, logsnr, cond)))
        x = jnp.zeros_like(x).at[:, :, :, 10].set(1.0)
        rest = (params, lattice, logsnr, cond)
        embedded = jax.jit(lambda x, n=net, r=rest: inputs_of(n, "down0_0", r[0], x, *r[1:]))
        here, there = embedded(x), embedded(jnp.roll(x, 3, 3))
        difference[embedding] = float(jnp.abs(there[:, :, :, 13] - here[:, :, :, 10]).max())
    assert difference[False] < 1e-5 and difference[True] > 0.1


def test_lattice_and_condition_enter_at_every_site():
    """As channels of the input, besides the embedding of the whole."""
    net, arguments = network(channel_multipliers=(1,), attention_resolutions=()), inputs((1, 1, 3))
    params = random_params(shapes_of(net, arguments))
    x, lattice, logsnr, cond = arguments
    embedded = jax.jit(lambda lattice, cond: inputs_of(net, "down0_0", params, x, lattice, logsnr, cond))
    before = embedded(lattice, cond)
    changed = {"lattice": embedded(lattice.at[:, 3].add(0.5), cond)}
    for name in ("counts", "counts_given", "elements", "elements_given"):
        changed[name] = embedded(lattice, {**cond, name: cond[name] + 0.5})
    for name, after in changed.items():
        assert np.abs(after - before).max(-1).min() > 1e-3, name


def test_every_block_of_the_network_gets_the_train_flag():
    arguments, net = inputs((1, 1, 2)), network(dropout_rate=0.3)
    params = shapes_of(net, arguments)

    def dropouts(train):
        found = []

        def watch(next_function, args, kwargs, context):
            if isinstance(context.module, nn.Dropout):
                found.append((context.module.rate, context.module.deterministic))
            return next_function(*args, **kwargs)

        with nn.intercept_methods(watch):
            rngs = {"dropout": jax.random.key(0)}
            jax.eval_shape(lambda p: net.apply({"params": p}, *arguments, train=train, rngs=rngs), params)
        return found

    number = sum(name.endswith("block") for name in params)
    assert dropouts(True) == [(0.3, False)] * number and dropouts(False) == [(0.3, True)] * number and number == 8


def test_the_time_embedding_tells_all_noise_levels_apart():
    embedding = np.asarray(unet3d.sinusoidal_embedding(jnp.linspace(-20, 20, 401), 64))
    assert embedding.shape == (401, 64) and np.abs(embedding).max() <= 1
    distances = np.linalg.norm(embedding[:, None] - embedding[None], axis=-1) + 9 * np.eye(401)
    assert distances.min() > 0.1


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("transformer", {}, r"config.model.name = 'transformer': choose from \['slots', 'unet3d'\]"),
        ("unet3d", {"base_chanels": 8}, r"config.model: .*base_chanels"),
        ("unet3d", {"convolution": "2d"}, r"config.model: convolution = '2d': choose from axial, full, plane"),
        ("unet3d", {"attention_kernel": "fast"}, "attention_kernel = 'fast': choose from xla, cudnn"),
        ("unet3d", {"attention_kernel": "cudnn"}, "set dtype = 'bfloat16'"),
        ("unet3d", {"attention": "none"}, r"config.model: attention = 'none': choose from factorised, full"),
        (
            "unet3d",
            {"attention_resolutions": (2, 3)},
            r"config.model: attention_resolutions = \(2, 3\): .* 1, 3",
        ),
    ],
)
def test_what_does_not_exist_is_named(name, settings, message):
    with pytest.raises(UserError, match=message):
        models.create(name, **settings)
