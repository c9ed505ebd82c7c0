"""Schedule, forward process, conversions and loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimat_jax import diffusion
from unimat_jax.diffusion import PREDICTION_TYPES

X_0 = jax.random.normal(jax.random.key(0), (7, 2, 3, 4, 3))
EPS = jax.random.normal(jax.random.key(1), X_0.shape)
LOGSNR = jnp.linspace(-8.0, 8.0, 7)
X_T = diffusion.q_sample(X_0, EPS, LOGSNR)


@pytest.mark.parametrize("ends", [(-20.0, 20.0), (-15.0, 15.0), (-10.0, 18.0)])
def test_the_schedule_falls_from_one_end_to_the_other(ends):
    logsnr = np.asarray(diffusion.cosine_logsnr(jnp.linspace(0, 1, 1001), *ends))
    np.testing.assert_allclose(logsnr[[0, -1]], ends[::-1], atol=2e-2)
    assert (np.diff(logsnr) < 0).all()


def test_the_schedule_is_the_cosine_one():
    """Nichol and Dhariwal's alpha = cos(pi t / 2), up to the cut at both ends: logsnr = -2 log tan(pi t / 2)."""
    t = np.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(diffusion.cosine_logsnr(t), -2 * np.log(np.tan(np.pi * t / 2)), atol=2e-3)
    assert diffusion.cosine_logsnr(jnp.array(0.5)) == pytest.approx(0.0, abs=1e-5)


def test_the_times_are_the_inverse_of_the_schedule():
    t = jnp.linspace(0.01, 0.99, 99)
    np.testing.assert_allclose(diffusion.time_of_logsnr(diffusion.cosine_logsnr(t)), t, atol=1e-5)
    uneven = (-5.0, 12.0)
    np.testing.assert_allclose(
        diffusion.time_of_logsnr(diffusion.cosine_logsnr(t, *uneven), *uneven), t, atol=1e-5
    )  # fmt: skip


def test_variance_is_preserved_and_logsnr_is_what_it_says():
    logsnr = jnp.linspace(-20, 20, 41)
    alpha, sigma = diffusion.alpha_sigma(logsnr)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, atol=1e-6)
    np.testing.assert_allclose(2 * jnp.log(alpha / sigma), logsnr, atol=1e-4)
    assert diffusion.alpha_sigma(logsnr, 5)[0].shape == (41, 1, 1, 1, 1)
    assert diffusion.alpha_sigma(logsnr[0], 5)[0].shape == ()


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_perfect_prediction_gives_back_data_and_noise(kind):
    prediction = diffusion.target(X_0, EPS, LOGSNR, kind)
    np.testing.assert_allclose(diffusion.predicted_x0(prediction, X_T, LOGSNR, kind), X_0, atol=2e-3)
    np.testing.assert_allclose(diffusion.predicted_eps(prediction, X_T, LOGSNR, kind), EPS, atol=2e-3)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_conversions_go_round_in_a_circle(kind):
    """Any prediction, perfect or not -> the x_0 and noise that it stands for -> the same prediction and x_t."""
    prediction = jax.random.normal(jax.random.key(2), X_0.shape)
    x_0 = diffusion.predicted_x0(prediction, X_T, LOGSNR, kind)
    eps = diffusion.predicted_eps(prediction, X_T, LOGSNR, kind)
    scale = 1e-5 * (1 + np.abs(x_0) + np.abs(eps))
    assert (np.abs(diffusion.target(x_0, eps, LOGSNR, kind) - prediction) < 20 * scale).all()
    assert (np.abs(diffusion.q_sample(x_0, eps, LOGSNR) - X_T) < 20 * scale).all()


def test_v_is_the_velocity():
    """v = alpha eps - sigma x_0 is the derivative of x_t along the angle phi of alpha = cos phi, sigma = sin phi."""
    phi = jnp.linspace(0.1, 1.4, 7)
    logsnr = -2 * jnp.log(jnp.tan(phi))
    _, velocity = jax.jvp(
        lambda p: diffusion.q_sample(X_0, EPS, -2 * jnp.log(jnp.tan(p))), (phi,), (jnp.ones_like(phi),)
    )
    np.testing.assert_allclose(diffusion.target(X_0, EPS, logsnr, "v"), velocity, atol=1e-4)


@pytest.mark.parametrize("function", [diffusion.target, diffusion.predicted_x0, diffusion.predicted_eps])
def test_an_unknown_prediction_type_is_named(function):
    with pytest.raises(ValueError, match=r"'score'.*eps.*x0.*v"):
        function(X_0, X_0, LOGSNR, "score")


def test_the_loss_is_a_weighted_mean_over_sites():
    error = np.asarray(EPS)
    weight = np.zeros(error.shape[:-1], np.float32)
    weight[:, 0, 1, 2], weight[:, 1, 0, 0] = 1.0, 0.5
    expected = ((error[:, 0, 1, 2] ** 2).mean(-1) + 0.5 * (error[:, 1, 0, 0] ** 2).mean(-1)) / 1.5
    np.testing.assert_allclose(diffusion.weighted_mean_square(error, weight), expected, rtol=1e-6)
    np.testing.assert_allclose(diffusion.weighted_mean_square(2 * error, 7 * weight), 4 * expected, rtol=1e-6)


def test_an_example_without_weights_has_no_loss_and_no_gradient():
    weight = jnp.ones(EPS.shape[:-1]).at[3].set(0.0)
    loss, gradient = jax.value_and_grad(lambda e: diffusion.weighted_mean_square(e, weight).sum())(EPS)
    assert diffusion.weighted_mean_square(EPS, weight)[3] == 0.0
    assert np.isfinite(loss) and (gradient[3] == 0).all() and (gradient[2] != 0).all()


def test_antithetic_times_cover_every_part_of_the_interval():
    times = np.stack([diffusion.antithetic_times(jax.random.key(seed), 64) for seed in range(20)])
    assert times.min() >= 0 and times.max() < 1
    assert ((times * 64).astype(int).max() == 63) and all(len(set(row)) == 64 for row in (times * 64).astype(int))
    assert len(set(times[:, 0].round(6))) == 20  # a new start for each key


def test_each_antithetic_time_alone_is_uniform():
    first = np.array([diffusion.antithetic_times(jax.random.key(seed), 8)[5] for seed in range(200)])
    counts, _ = np.histogram(first, bins=4, range=(0, 1))
    assert counts.min() > 25  # 50 expected; fewer than 26 of 200 has a chance of 1e-5
