"""Learning rate, clipping, Adam and the moving average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unimat_jax.errors import UserError
from unimat_jax.train_state import MUON_FACTOR, apply_gradients, create_state, make_optimizer, make_schedule

ADAM = {"b1": 0.9, "b2": 0.99, "weight_decay": 0.0}


def schedule(kind, **changes):
    settings = {"learning_rate": 1e-3, "schedule": kind, "warmup_steps": 10, "num_steps": 110, "final_factor": 0.1}
    return make_schedule(**settings | changes)


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear"])
def test_warm_up_is_linear_and_ends_at_the_learning_rate(kind):
    rates = [float(schedule(kind)(step)) for step in range(11)]
    np.testing.assert_allclose(rates, np.arange(11) * 1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "halfway", "end"), [("constant", 1e-3, 1e-3), ("cosine", 5.5e-4, 1e-4), ("linear", 5.5e-4, 1e-4)]
)
def test_after_the_warm_up(kind, halfway, end):
    rate = schedule(kind)
    assert float(rate(60)) == pytest.approx(halfway) and float(rate(110)) == pytest.approx(end)
    quarter = {"constant": 1e-3, "linear": 1e-3 - 9e-4 / 4, "cosine": 1e-4 + 9e-4 * (1 + np.cos(np.pi / 4)) / 2}
    assert float(rate(35)) == pytest.approx(quarter[kind], rel=1e-5)


def test_no_warm_up_starts_at_the_learning_rate():
    assert float(schedule("constant", warmup_steps=0)(0)) == pytest.approx(1e-3)


def test_an_unknown_schedule_is_named():
    with pytest.raises(UserError, match=r"config.optimizer.schedule = 'step'.*constant.*cosine"):
        schedule("step")


def test_the_clip_bounds_the_global_norm():
    gradients = {"a": jnp.array([30.0, 0.0]), "b": jnp.array([40.0])}
    clip = make_optimizer(optax.constant_schedule(1.0), grad_clip=5.0, **ADAM)
    plain = make_optimizer(optax.constant_schedule(1.0), grad_clip=0.0, **ADAM)
    for optimizer, factor in ((clip, 0.1), (plain, 1.0)):
        _, state = optimizer.update(gradients, optimizer.init(gradients), gradients)
        moments = optax.tree_utils.tree_get(state, "mu")
        np.testing.assert_allclose(moments["a"], 0.1 * factor * gradients["a"], rtol=1e-5)  # 1 - b1 times the gradient
        np.testing.assert_allclose(optax.tree_utils.tree_get(state, "nu")["b"], 0.01 * (40 * factor) ** 2, rtol=1e-5)


def test_muon_changes_matrices_of_blocks_in_all_directions_alike_and_the_rest_as_nadam():
    """Its first update is -MUON_FACTOR x learning rate x 0.2 sqrt(max(n, m)) times the nearest orthogonal matrix, which
    five Newton-Schulz iterations have to within a factor of 0.6 to 1.3 in each singular value."""
    rng = np.random.default_rng(0)
    kernel = {"kernel": jnp.asarray(rng.normal(size=(6, 16)), jnp.float32), "bias": jnp.ones(16)}
    params = {"block_0": {"qkv": kernel, "film": kernel, "pair_bias": kernel}, "elements": kernel}
    gradients = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    rate, settings = optax.constant_schedule(0.1), {"grad_clip": 0.0, **ADAM}
    by_adam, by_muon = optax.nadam(rate, 0.9, 0.99), make_optimizer(rate, name="muon", **settings)
    adam, _ = by_adam.update(gradients, by_adam.init(params), params)
    update, _ = by_muon.update(gradients, by_muon.init(params), params)
    found, wanted = (tree["block_0"]["qkv"].pop("kernel") for tree in (update, gradients))
    adam["block_0"]["qkv"].pop("kernel")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), update, adam)
    left, values, right = np.linalg.svd(wanted, full_matrices=False)
    assert values[0] / values[-1] > 1.8, "the gradient itself is not alike in all directions"
    along = np.einsum("ik,ij,kj->k", left, found, right) / (MUON_FACTOR * 0.1 * 0.2 * np.sqrt(16))
    assert ((along > -1.3) & (along < -0.6)).all()


def test_an_unknown_optimizer_is_named():
    with pytest.raises(UserError, match=r"config.optimizer.name = 'sgd'.*adam.*muon"):
        make_optimizer(optax.constant_schedule(0.1), name="sgd", grad_clip=0.0, **ADAM)


def test_two_updates_by_hand():
    """Adam's two updates of a parameter, and its average with decays (1 + n) / (10 + n) = 1/10 and 2/11."""
    optimizer = make_optimizer(optax.constant_schedule(0.1), grad_clip=0.0, **ADAM)
    state = create_state(lambda: {"w": jnp.array([1.0, -2.0])}, optimizer)
    gradients = [np.array([0.5, 3.0]), np.array([-1.5, 3.0])]
    w = average = np.array([1.0, -2.0])
    m = v = np.zeros(2)
    for n, g in enumerate(gradients):
        state = apply_gradients(state, {"w": jnp.asarray(g)}, optimizer, 0.999)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        w = w - 0.1 * (m / (1 - 0.9 ** (n + 1))) / (np.sqrt(v / (1 - 0.99 ** (n + 1))) + 1e-8)
        decay = (1 + n) / (10 + n)
        average = decay * average + (1 - decay) * w
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
        np.testing.assert_allclose(state.ema_params["w"], average, rtol=1e-5)
    assert int(state.step) == 2


def test_the_average_warms_up_to_its_decay():
    """After n updates of constant steps, the average forgets the initial weights although 0.999^n has not."""
    optimizer = optax.sgd(1.0)
    update = jax.jit(lambda s: apply_gradients(s, {"w": jnp.array(0.0)}, optimizer, 0.9))
    state = create_state(lambda: {"w": jnp.array(1.0)}, optimizer)
    decays = []
    for _ in range(100):
        state = state.__class__(state.step, {"w": jnp.array(0.0)}, {"w": jnp.array(1.0)}, state.opt_state)
        state = update(state)
        decays.append(float(state.ema_params["w"]))  # the weight that the average's old value keeps
    np.testing.assert_allclose(decays, np.minimum(0.9, (1 + np.arange(100)) / (10 + np.arange(100))), rtol=1e-5)


def test_the_average_starts_as_a_copy():
    """Donated buffers may not be shared between the parameters and their average."""
    optimizer = optax.sgd(1.0)
    state = create_state(lambda: {"w": jnp.array([1.0])}, optimizer)
    assert state.ema_params["w"].unsafe_buffer_pointer() != state.params["w"].unsafe_buffer_pointer()
    np.testing.assert_array_equal(state.ema_params["w"], state.params["w"])
