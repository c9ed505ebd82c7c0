"""The loss of a batch, the training step and the evaluation step, with networks whose answers are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from crystal_cases import perovskite, quartz

from unimat_jax import diffusion
from unimat_jax.densify import densify, occupancy
from unimat_jax.periodic_table import Table
from unimat_jax.representation import NULL_VALUE, UniMatSpec, batch_records, encode, model_inputs
from unimat_jax.tensor_diffusion import TensorDiffusion
from unimat_jax.train_state import create_state
from unimat_jax.train_step import EVAL_TIMES, eval_metrics, eval_step, train_step

SPEC = UniMatSpec(max_atoms_per_element=6, max_atoms=10, table=Table.of_elements(["Sr", "Ti", "O", "Si"]))
NUMBER = 8


@pytest.fixture(scope="module")
def batch():
    records = batch_records([encode((perovskite, quartz)[i % 2](), SPEC) for i in range(NUMBER)], SPEC.max_atoms)
    properties = np.linspace(-1, 1, NUMBER, dtype=np.float32)[:, None]
    return {**model_inputs(records, SPEC), "properties": properties, "weight": np.ones(NUMBER, np.float32)}


def objective(apply, **changes):
    settings = {"prediction_type": "x0", "logsnr_min": -20.0, "logsnr_max": 20.0, "null_weight": 0.1}
    settings |= {"lattice_weight": 2.0, "counts_share": 0.4, "elements_share": 0.3, "property_drop_rate": 0.5}
    return TensorDiffusion(apply, SPEC, **settings | changes)


@pytest.mark.parametrize("kind", diffusion.PREDICTION_TYPES)
def test_the_loss_of_a_perfect_denoiser_is_zero(batch, kind):
    """It knows the data, and finds the noise in what it gets."""
    x_0, lattice_0 = densify(batch, SPEC), batch["lattice"]

    def perfect(variables, x, lattice, logsnr, cond, train, rngs):
        answers = []
        for clean, noisy in ((x_0, x), (lattice_0, lattice)):
            alpha, sigma = diffusion.alpha_sigma(logsnr, clean.ndim)
            answers.append(diffusion.target(clean, (noisy - alpha * clean) / sigma, logsnr, kind))
        return tuple(answers)

    t = jnp.linspace(0.15, 0.95, NUMBER)
    x_loss, lattice_loss = objective(perfect, prediction_type=kind).losses({}, batch, jax.random.key(0), t, train=True)
    assert x_loss.shape == lattice_loss.shape == (NUMBER,)
    assert np.abs(x_loss).max() < 1e-6 and np.abs(lattice_loss).max() < 1e-6


def zeros(variables, x, lattice, logsnr, cond, train=False, rngs=None):
    return jnp.zeros_like(x), jnp.zeros_like(lattice)


@pytest.mark.parametrize("null_weight", [0.0, 0.1, 1.0])
def test_occupied_and_free_null_sites_have_their_weights(batch, null_weight):
    t = jnp.full(NUMBER, 0.5)
    shares = {"counts_share": 0.0, "elements_share": 0.0}
    run = objective(zeros, null_weight=null_weight, **shares)
    x_loss, lattice_loss = run.losses({}, batch, jax.random.key(0), t, train=False)
    x_0, occupied = np.asarray(densify(batch, SPEC)), np.asarray(occupancy(batch, SPEC))
    real = np.broadcast_to(SPEC.table.atomic_numbers > 0, SPEC.grid)
    for i in range(NUMBER):
        weight = real * np.where(occupied[i], 1.0, null_weight)
        assert x_loss[i] == pytest.approx(((x_0[i] ** 2).mean(-1) * weight).sum() / weight.sum(), rel=1e-5)
    np.testing.assert_allclose(lattice_loss, (batch["lattice"] ** 2).mean(-1), rtol=1e-5)


def test_with_exact_counts_only_the_atoms_carry_loss(batch):
    run = objective(zeros, counts_share=1.0, elements_share=0.0, null_weight=1.0)
    x_loss, _ = run.losses({}, batch, jax.random.key(0), jnp.full(NUMBER, 0.5), train=False)
    x_0, occupied = np.asarray(densify(batch, SPEC)), np.asarray(occupancy(batch, SPEC))
    expected = [(x_0[i][occupied[i]] ** 2).mean() for i in range(NUMBER)]
    np.testing.assert_allclose(x_loss, expected, rtol=1e-5)


def test_the_network_sees_null_where_the_condition_fixes_it_and_noise_elsewhere(batch):
    seen = {}

    def watch(variables, x, lattice, logsnr, cond, train, rngs):
        seen.update(x=x, cond=cond, logsnr=logsnr, train=train, rngs=rngs)
        return jnp.zeros_like(x), jnp.zeros_like(lattice)

    t = jnp.full(NUMBER, 0.99)
    objective(watch, counts_share=1.0, elements_share=0.0).losses({}, batch, jax.random.key(0), t, train=True)
    occupied = np.asarray(occupancy(batch, SPEC))
    x = np.asarray(seen["x"])
    assert (x[~occupied] == NULL_VALUE).all()
    assert np.abs(x[occupied]).max() < 6 and x[occupied].std() == pytest.approx(1.0, abs=0.2)  # almost all noise
    np.testing.assert_array_equal(seen["cond"]["counts"], occupied)
    assert seen["train"] is True and set(seen["rngs"]) == {"dropout"}
    objective(watch).losses({}, batch, jax.random.key(0), t, train=False)
    assert seen["train"] is False and seen["rngs"] == {}


def linear(variables, x, lattice, logsnr, cond, train=False, rngs=None):
    p = variables["params"]
    return p["a"] * x, lattice @ p["b"]


@pytest.fixture(scope="module")
def step():
    optimizer = optax.sgd(0.1)
    state = create_state(lambda: {"a": jnp.array(0.5), "b": jnp.eye(6)}, optimizer)
    run = functools.partial(train_step, objective=objective(linear), optimizer=optimizer, ema_decay=0.9)
    return state, jax.jit(run)


def test_a_step_follows_the_gradient_of_its_loss(batch, step):
    state, run = step
    new, metrics = run(state, batch, jax.random.key(0))
    total = metrics["train/x_loss"] + 2.0 * metrics["train/lattice_loss"]
    assert metrics["train/loss"] == pytest.approx(float(total), rel=1e-6)
    moved = jax.tree.map(lambda a, b: (a - b) / 0.1, state.params, new.params)
    assert metrics["train/grad_norm"] == pytest.approx(float(optax.tree.norm(moved)), rel=1e-4)
    assert metrics["train/param_norm"] == pytest.approx(float(optax.tree.norm(new.params)), rel=1e-6)
    assert int(new.step) == 1
    for _ in range(60):
        new, later = run(new, batch, jax.random.key(0))
    assert later["train/loss"] < 0.8 * metrics["train/loss"]


def test_all_randomness_comes_from_the_key_and_the_step(batch, step):
    state, run = step
    loss = float(run(state, batch, jax.random.key(0))[1]["train/loss"])
    assert float(run(state, batch, jax.random.key(0))[1]["train/loss"]) == loss
    assert float(run(state, batch, jax.random.key(1))[1]["train/loss"]) != loss
    later = type(state)(state.step + 1, state.params, state.ema_params, state.opt_state)
    assert float(run(later, batch, jax.random.key(0))[1]["train/loss"]) != loss


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_average_the_gradients_of_their_parts(batch, step, microbatches):
    """Part m holds examples m, m + M, ..., their times of the whole batch, and has the key of its number."""
    state, _ = step
    target = objective(linear)
    run = functools.partial(train_step, objective=target, optimizer=optax.sgd(0.1), ema_decay=0.9)
    new, metrics = jax.jit(functools.partial(run, microbatches=microbatches))(state, batch, jax.random.key(3))
    time_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.key(3), state.step))
    times = diffusion.antithetic_times(time_key, NUMBER)

    def loss(params):
        total = 0.0
        for m in range(microbatches):
            part = {name: value[m::microbatches] for name, value in batch.items()}
            key = jax.random.fold_in(loss_key, m)
            x_loss, lattice_loss = target.losses(params, part, key, times[m::microbatches], train=True)
            total = total + (x_loss.mean() + 2.0 * lattice_loss.mean()) / microbatches
        return total

    value, gradients = jax.value_and_grad(loss)(state.params)
    assert metrics["train/loss"] == pytest.approx(float(value), rel=1e-5)
    for old, now, gradient in zip(*map(jax.tree.leaves, (state.params, new.params, gradients)), strict=True):
        np.testing.assert_allclose(now, old - 0.1 * gradient, rtol=1e-4, atol=1e-6)


def test_parameters_that_an_update_broke_show_in_the_same_step(batch):
    """Its loss is that of the parameters before it: still finite."""
    optimizer = optax.sgd(1e30)
    state = create_state(lambda: {"a": jnp.array(0.5), "b": jnp.eye(6)}, optimizer)
    run = functools.partial(train_step, objective=objective(linear), optimizer=optimizer, ema_decay=0.9)
    _, metrics = jax.jit(run)(state, batch, jax.random.key(0))
    assert np.isfinite(metrics["train/loss"]) and not np.isfinite(metrics["train/param_norm"])


def test_evaluation_counts_each_real_example_once(batch):
    run = jax.jit(functools.partial(eval_step, objective=objective(linear)))
    params = {"a": jnp.array(0.5), "b": 0.3 * jnp.eye(6)}
    whole = np.asarray(run(params, batch, jax.random.key(0)))
    assert whole.shape == (len(EVAL_TIMES) + 1, 2) and whole[-1, 0] == NUMBER
    halves = []
    for part in (np.arange(NUMBER) < 3, np.arange(NUMBER) >= 3):
        halves.append(np.asarray(run(params, {**batch, "weight": part.astype(np.float32)}, jax.random.key(0))))
    assert halves[0][-1, 0] == 3
    np.testing.assert_allclose(halves[0] + halves[1], whole, rtol=1e-5)
    metrics = eval_metrics(whole, 2.0)
    assert metrics["eval/x_loss"] == pytest.approx(whole[:-1, 0].mean() / NUMBER)
    assert metrics["eval/loss"] == pytest.approx(metrics["eval/x_loss"] + 2.0 * metrics["eval/lattice_loss"])
    assert metrics["eval/x_loss_t0.06"] == pytest.approx(whole[0, 0] / NUMBER)
    assert [name for name in metrics if name.startswith("eval/lattice_loss_t")][-1] == "eval/lattice_loss_t0.94"
