"""Products, norms and convolutions against the plain maths: outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimat_jax.assembly import compiler_options
from unimat_jax.models import layers

KEYS = [jax.random.key(i) for i in range(5)]


def assert_close(ours, plain, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=tolerance * float(jnp.abs(b).max()) + 1e-12)


def plain_norm(x, weight, scale, shift, groups):
    b, sites, c = x.shape
    grouped, w = x.reshape(b, sites, groups, -1), weight[:, :, None, None]
    number = jnp.maximum(weight.sum(1), 1)[:, None, None, None] * c / groups
    mean = (grouped * w).sum((1, 3), keepdims=True) / number
    variance = (jnp.square(grouped - mean) * w).sum((1, 3), keepdims=True) / number
    y = ((grouped - mean) / jnp.sqrt(variance + 1e-5)).reshape(x.shape)
    return (y * scale[:, None] + shift[:, None]) * weight[..., None]


def norm_case():
    x = 2 * jax.random.normal(KEYS[0], (4, 20, 8)) + 0.5
    weight = (jax.random.uniform(KEYS[1], (4, 20)) > 0.4).astype(jnp.float32).at[3].set(0.0)  # one without any site
    return x, weight, jax.random.normal(KEYS[2], (4, 8)), jax.random.normal(KEYS[3], (4, 8))


def test_norm():
    x, weight, scale, shift = norm_case()
    g = jax.random.normal(KEYS[4], x.shape)

    def loss(norm):
        return lambda x, scale, shift: (norm(x, weight, scale, shift, 2) * g).sum()

    assert_close(layers.site_norm(x, weight, scale, shift, 2), plain_norm(x, weight, scale, shift, 2))
    ours = jax.jit(jax.grad(loss(layers.site_norm), (0, 1, 2)))(x, scale, shift)
    assert_close(ours, jax.grad(loss(plain_norm), (0, 1, 2))(x, scale, shift))


def plain_convolution(params, x):
    """One 3 x 3 x 3 convolution by XLA with all the kernels in their places."""
    if "full" in params:
        kernel = params["full"]
    else:
        plane = params["plane"]
        kernel = jnp.zeros((3, *plane.shape)).at[1].set(plane)
        if "levels" in params:
            kernel = kernel.at[:, plane.shape[0] // 2, plane.shape[1] // 2].add(params["levels"])
    dims = ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", dimension_numbers=dims) + params["bias"]


@pytest.mark.parametrize("kind", layers.CONVOLUTIONS)
@pytest.mark.parametrize(
    "grid", [(2, 3, 5, 6), (2, 4, 1, 2), (2, 1, 3, 6), (2, 3, 1, 1), (2, 3, 2, 2), (3, 6, 1, 7), (64, 2, 9, 18)]
)
def test_convolutions(kind, grid):
    """(64, 2, 9, 18) is long enough for a kernel gradient in several chunks."""
    network = layers.Conv(5, kind)
    x, g = jax.random.normal(KEYS[0], (*grid, 4)), jax.random.normal(KEYS[1], (*grid, 5))
    params = network.init(KEYS[2], x)["params"]
    params = jax.tree.map(lambda a: a + 0.1, params)

    def loss(apply):
        return lambda params, x: (apply(params, x) * g).sum()

    def ours(params, x):
        return network.apply({"params": params}, x)

    assert_close(ours(params, x), plain_convolution(params, x))
    assert_close(jax.jit(jax.grad(loss(ours), (0, 1)))(params, x), jax.grad(loss(plain_convolution), (0, 1))(params, x))


def test_taps_that_could_only_meet_the_border_have_no_parameters():
    params = layers.Conv(5, "full").init(KEYS[0], jnp.zeros((1, 1, 1, 2, 4)))["params"]
    assert params["full"].shape == (1, 1, 3, 4, 5)


def test_half_of_a_kernels_variance_is_at_its_centre():
    kernel = layers._centred_init(KEYS[0], (3, 3, 64, 64))
    variance = np.square(np.asarray(kernel)).mean((2, 3)) * 64
    assert variance[1, 1] == pytest.approx(0.5, rel=0.1)
    assert variance.sum() == pytest.approx(1.0, rel=0.1)
    single = layers._centred_init(KEYS[0], (1, 1, 64, 64))
    assert np.square(np.asarray(single)).mean() * 64 == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("make", [lambda: layers.Dense(6), lambda: layers.Conv(6, "axial")], ids=["dense", "conv"])
def test_bfloat16_inside_float32_for_parameters(make):
    """Outputs are near the float32 ones, gradients of parameters come in float32 and are summed in float32."""
    network, x = make(), jax.random.normal(KEYS[0], (4, 3, 5, 6, 8))
    params = network.init(KEYS[1], x)["params"]

    def loss(params, x):
        return network.apply({"params": params}, x).astype(jnp.float32).sum()

    half = x.astype(jnp.bfloat16)
    assert network.apply({"params": params}, half).dtype == jnp.bfloat16
    gradients = jax.grad(loss)(params, half)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
    assert_close(gradients, jax.grad(loss)(params, x), tolerance=0.02)
    # 360 ones: a sum in bfloat16 would stop at 256.
    assert np.asarray(gradients["bias"]) == pytest.approx(np.full(6, 360.0))


def test_a_vector_for_each_site_has_the_gradient_of_a_broadcast():
    x, weight = jax.random.normal(KEYS[0], (4, 8)), jax.random.normal(KEYS[1], (4, 7, 8))

    def loss(spread):
        return jax.value_and_grad(lambda x: (weight * jnp.square(spread(x))).sum())

    plain = loss(lambda x: jnp.broadcast_to(x[:, None], weight.shape))(x)
    assert_close(loss(lambda x: layers.each_site(x, 7))(x), plain)


@pytest.mark.parametrize("shape", [(250, 400), (7, 11, 13, 101)])
def test_dropout_keeps_the_mean_and_drops_at_its_rate(shape):
    x = jnp.ones(shape)
    y = np.asarray(layers.dropout(x, 0.1, KEYS[0]))
    assert set(np.unique(y)) == {0.0, np.float32(256 / 230)}  # 26 of 256 are dropped
    spread = np.sqrt(0.1 * 0.9 / y.size)
    assert np.mean(y == 0) == pytest.approx(26 / 256, abs=4 * spread)
    assert y.mean() == pytest.approx(1.0, abs=5 * spread)
    # No two entries share their bits: neighbours along each axis are dropped independently.
    for axis in range(y.ndim):
        both = (y == 0) & np.roll(y == 0, 1, axis)
        assert both.mean() == pytest.approx((26 / 256) ** 2, abs=5 * np.sqrt(0.01 / y.size))
    assert np.any(y != np.asarray(layers.dropout(x, 0.1, KEYS[1])))
    assert np.array_equal(layers.dropout(x, 0.0, KEYS[0]), x)
    # Neither none nor all, however small or large the rate.
    assert 0 < np.mean(layers.dropout(x, 0.001, KEYS[0]) == 0) < 0.01 and np.any(layers.dropout(x, 0.999, KEYS[0]) > 0)


def test_what_a_convolution_reads_is_kept_in_memory_on_cpu_and_changes_nothing():
    """The option's pass has a new name if this fails: look it up, or the train step loses a fifth of its speed."""
    conv = layers.Conv(4, "axial")
    x = jax.random.normal(KEYS[0], (2, 3, 4, 5, 8))
    params = conv.init(KEYS[1], x)

    def loss(params, x):
        return jnp.square(conv.apply(params, jnp.sin(x))).sum()

    gradient = jax.grad(loss, argnums=(0, 1))
    options = compiler_options("cpu")
    kept = jax.jit(gradient, compiler_options=options).lower(params, x).compile()
    plain = jax.jit(gradient).lower(params, x).compile()
    assert "opt-barrier" in kept.as_text() and "opt-barrier" not in plain.as_text()
    assert_close(kept(params, x), plain(params, x), 1e-6)
    assert options and not compiler_options("tpu")
