"""The sampler, with denoisers that are known exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimat_jax import diffusion, sampler
from unimat_jax.conditioning import make_condition
from unimat_jax.representation import NULL_VALUE

GRID = (2, 1, 2)
MEAN = np.array([[-0.7, 0.1, 0.4], [0.3, -0.2, 0.8]])  # of each column's coordinates
LATTICE_MEAN = np.array([-2.0, 0.5, 3.0])
STD, LATTICE_STD = 0.15, 0.7


def condition(number, properties=0):
    grid = jnp.zeros((number, *GRID))
    ones, values = jnp.zeros(number), jnp.ones((number, properties))
    return make_condition(grid, ones, grid[:, 0], ones, values, values)


def posterior_mean(x_t, mean, std, logsnr):
    """E[x_0 | x_t] of data with this mean and standard deviation."""
    alpha, sigma = diffusion.alpha_sigma(logsnr, x_t.ndim)
    return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)


def exact(x, lattice, logsnr, cond, kind="x0"):
    """The best denoiser there is for Gaussian data."""
    answers = []
    for noisy, mean, std in ((x, jnp.asarray(MEAN), STD), (lattice, jnp.asarray(LATTICE_MEAN), LATTICE_STD)):
        x_0 = posterior_mean(noisy, mean, std, logsnr)
        alpha, sigma = diffusion.alpha_sigma(logsnr, noisy.ndim)
        answers.append(diffusion.target(x_0, (noisy - alpha * x_0) / sigma, logsnr, kind))
    return tuple(answers)


def sample(number=6, denoise=exact, key=0, indices=None, free=None, properties=0, **settings):
    indices = jnp.arange(number) if indices is None else jnp.asarray(indices)
    free = jnp.ones((number, *GRID), bool) if free is None else jnp.asarray(free)
    settings = {"num_steps": 8, "prediction_type": "x0"} | settings
    run = functools.partial(
        sampler.sample,
        denoise,
        shape=(number, *GRID, 3),
        lattice_size=3,
        cond=condition(number, properties),
        **settings,
    )
    return jax.device_get(jax.jit(lambda key, i, f: run(key, indices=i, free=f))(jax.random.key(key), indices, free))


@pytest.mark.parametrize(
    ("method", "kind", "num_steps", "interpolation"),
    [("ancestral", "x0", 128, 0.1), ("ancestral", "eps", 128, 0.0), ("ddim", "v", 64, 0.1)],
)
def test_gaussian_data_come_back_with_their_mean_and_variance(method, kind, num_steps, interpolation):
    """What is left is the error of so few steps; a wrong variance of a step shows at once."""
    x, lattice = sample(
        2000, functools.partial(exact, kind=kind), method=method, prediction_type=kind, num_steps=num_steps,
        log_variance_interpolation=interpolation,
    )  # fmt: skip
    np.testing.assert_allclose(x.mean((0, 1, 2)), MEAN, atol=0.02)
    np.testing.assert_allclose(x.std(0).mean(), STD, rtol=0.08)
    np.testing.assert_allclose(lattice.mean(0), LATTICE_MEAN, atol=0.06)
    np.testing.assert_allclose(lattice.std(0), LATTICE_STD, rtol=0.08)
    independent = np.corrcoef(np.concatenate([x.reshape(2000, -1), lattice], 1).T) - np.eye(15)
    assert np.abs(independent).max() < 0.12


def test_more_interpolation_is_more_noise():
    """The forward process's variance (1) is the larger of the two bounds."""
    spread = [
        float(sample(500, num_steps=8, log_variance_interpolation=v)[1].std(0).mean()) for v in (0.0, 1.0)
    ]  # fmt: skip
    assert spread[1] > 1.02 * spread[0]


def test_the_ancestral_step_is_the_posterior():
    """x_s given x_t and x_0, worked out from the joint Gaussian of x_s and x_t (not from logsnr differences)."""
    logsnr_t, logsnr_s = jnp.array(-1.0), jnp.array(0.8)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = diffusion.alpha_sigma(logsnr_t), diffusion.alpha_sigma(logsnr_s)
    ratio = alpha_t / alpha_s
    variance_t_given_s = sigma_t**2 - ratio**2 * sigma_s**2
    x_t, x_0 = 0.7, -0.4
    gain = sigma_s**2 * ratio / sigma_t**2
    mean = alpha_s * x_0 + gain * (x_t - alpha_t * x_0)
    variance = sigma_s**2 - gain * ratio * sigma_s**2
    step = functools.partial(sampler.ancestral_step, x_t, x_0, logsnr_t, logsnr_s)
    assert step(0.0, 0.0) == pytest.approx(float(mean), abs=1e-6)
    small, large = float(step(1.0, 0.0) - mean), float(step(1.0, 1.0) - mean)
    assert small == pytest.approx(float(jnp.sqrt(variance)), rel=1e-5)
    assert large == pytest.approx(float(jnp.sqrt(variance_t_given_s)), rel=1e-5)
    assert step(1.0, 0.1) - mean == pytest.approx(small**0.9 * large**0.1, rel=1e-5)


def test_the_ddim_step_keeps_the_noise():
    x_0, eps = jnp.array([0.3, -0.2]), jnp.array([1.5, -0.6])
    x_t = diffusion.q_sample(x_0, eps, jnp.full(2, -1.0))
    expected = diffusion.q_sample(x_0, eps, jnp.full(2, 0.8))
    np.testing.assert_allclose(sampler.ddim_step(x_t, x_0, jnp.array(-1.0), jnp.array(0.8)), expected, atol=1e-6)


def test_the_times_go_from_noise_to_data():
    times = np.asarray(sampler.time_grid(5))
    np.testing.assert_allclose(times, [1.0, 0.8, 0.6, 0.4, 0.2, 0.0], atol=1e-6)


@pytest.mark.parametrize("method", sampler.METHODS)
def test_held_sites_are_null_at_every_step_and_at_the_end(method):
    free = np.ones((6, *GRID), bool)
    free[::2, 1, 0, 0] = free[3] = False
    seen = []

    def watch(x, lattice, logsnr, cond):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return exact(x, lattice, logsnr, cond)

    x, _ = sample(6, watch, free=free, method=method)
    jax.effects_barrier()
    assert len(seen) == 8
    for state in [*seen, x]:
        assert (state[~free] == NULL_VALUE).all() and (state[free] != NULL_VALUE).all()


def test_forbidden_sites_end_at_null_and_look_like_noisy_null_sites_on_the_way():
    number = 400
    forced = np.zeros((number, *GRID), bool)
    forced[:, :, 0, 1] = True
    seen = []

    def watch(x, lattice, logsnr, cond):
        jax.debug.callback(lambda x, s: seen.append((float(s[0]), np.asarray(x))), x, logsnr)
        return exact(x, lattice, logsnr, cond)

    x, _ = sample(number, watch, forced_null=jnp.asarray(forced), num_steps=6, logsnr_max=8.0)
    jax.effects_barrier()
    assert (x[forced] == NULL_VALUE).all() and (x[~forced] > -2).all()
    for logsnr, state in sorted(seen, key=lambda pair: pair[0]):
        alpha, sigma = (float(a) for a in diffusion.alpha_sigma(jnp.array(logsnr)))
        assert state[forced].mean() == pytest.approx(NULL_VALUE * alpha, abs=0.1)
        assert state[forced].std() == pytest.approx(sigma, rel=0.05)


@pytest.mark.parametrize("method", sampler.METHODS)
def test_a_sample_depends_on_its_number_alone(method):
    """Not on the batch, its size, or its neighbours; and numbers and keys give other samples."""
    whole, lattice = sample(12, method=method)
    some, some_lattice = sample(4, method=method, indices=[7, 2, 11, 2])
    np.testing.assert_allclose(some, whole[[7, 2, 11, 2]], atol=1e-5)
    np.testing.assert_allclose(some_lattice, lattice[[7, 2, 11, 2]], atol=1e-5)
    assert len({tuple(row.ravel().round(4)) for row in whole}) == len({tuple(row.round(4)) for row in lattice}) == 12
    other, _ = sample(4, method=method, indices=[7, 2, 11, 2], key=1)
    assert np.abs(other - some).max() > 0.05


def test_one_device_and_four_give_the_same():
    from unimat_jax.sharding import batch_sharding, make_mesh, replicated

    results = []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = make_mesh(devices=devices)
        run = functools.partial(
            sampler.sample, exact, shape=(8, *GRID, 3), lattice_size=3, num_steps=8, prediction_type="x0"
        )
        arrays = jax.device_put((jnp.arange(8), condition(8), jnp.ones((8, *GRID), bool)), batch_sharding(mesh))
        jitted = jax.jit(
            lambda k, a, r=run: r(k, indices=a[0], cond=a[1], free=a[2]), out_shardings=batch_sharding(mesh)
        )
        results.append(jax.device_get(jitted(jax.device_put(jax.random.key(0), replicated(mesh)), arrays)))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("weight", [-0.3, 0.0, 1.0, 2.5])
def test_guidance_is_equation_2_and_keeps_the_composition_in_both_branches(weight):
    """eps = (1 + w) eps(x, t | c, aux) - w eps(x, t | c)."""

    def network(x, lattice, logsnr, cond):
        aux = cond["properties"].sum(-1) + 10 * cond["properties_given"].sum(-1)
        c = cond["counts"].sum((1, 2, 3)) + 100 * cond["counts_given"] + cond["elements"].sum((1, 2))
        value = aux + c + logsnr
        return x + value[:, None, None, None, None], lattice * value[:, None]

    number = 3
    cond = make_condition(
        jnp.ones((number, *GRID)), jnp.ones(number), jnp.ones((number, *GRID[1:])), jnp.ones(number),
        jnp.array([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]]), jnp.ones((number, 2)),
    )  # fmt: skip
    dropped = {**cond, "properties": 0 * cond["properties"], "properties_given": 0 * cond["properties_given"]}
    arguments = jnp.full((number, *GRID, 3), 0.3), jnp.ones((number, 3)), jnp.array([1.0, 2.0, 3.0])
    found = sampler.guided(network, weight)(*arguments, cond)
    for ours, a, b in zip(found, network(*arguments, cond), network(*arguments, dropped), strict=True):
        np.testing.assert_allclose(ours, (1 + weight) * a - weight * b, rtol=1e-5)


def test_without_guidance_the_network_is_called_once_with_the_batch_as_it_is():
    def network(x, lattice, logsnr, cond):
        assert len(x) == len(logsnr) == 3
        return x, lattice

    assert sampler.guided(network, 0.0) is network


def test_guidance_is_used_while_sampling():
    """A denoiser whose prediction moves with the property: w = 1 moves the result twice as far."""

    def network(x, lattice, logsnr, cond):
        moved = cond["properties"].sum(-1) * 0.1
        return jnp.zeros_like(x) + moved[:, None, None, None, None], jnp.zeros_like(lattice) + moved[:, None]

    for weight, expected in ((0.0, 0.1), (1.0, 0.2), (3.0, 0.4)):
        x, lattice = sample(4, network, properties=1, guidance_weight=weight)
        np.testing.assert_allclose(x, expected, atol=1e-5)
        np.testing.assert_allclose(lattice, expected, atol=1e-5)


def test_wild_predictions_are_clipped():
    def network(x, lattice, logsnr, cond):
        return jnp.full_like(x, 1e6), jnp.full_like(lattice, -1e6)

    x, lattice = sample(2, network)
    assert (x == np.float32(sampler.X0_RANGE[1])).all() and (lattice == sampler.LATTICE_RANGE[0]).all()


def test_the_trajectory_is_kept_only_where_asked():
    x, lattice, (xs, lattices) = sample(keep_trajectory=True)
    assert xs.shape == (8, 6, *GRID, 3) and lattices.shape == (8, 6, 3)
    np.testing.assert_array_equal(xs[-1], x)
    np.testing.assert_array_equal(lattices[-1], lattice)
    assert np.abs(xs[0] - x).max() > 0.1
    assert len(sample()) == 2


def test_one_step_is_the_prediction_itself():
    x, lattice = sample(num_steps=1)
    np.testing.assert_allclose(x, np.broadcast_to(MEAN, x.shape), atol=1e-3)
    np.testing.assert_allclose(lattice, np.broadcast_to(LATTICE_MEAN, lattice.shape), atol=1e-3)


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match=r"method = 'euler': choose from .*ancestral.*ddim"):
        sample(method="euler")
