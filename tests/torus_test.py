"""Noise on the torus: its score, and its drift."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimat_jax import torus


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
