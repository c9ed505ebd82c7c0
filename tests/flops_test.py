"""Counted operations against closed forms, against XLA's own count, and against what the docs say of each config."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from jax.sharding import AxisType, PartitionSpec

from unimat_jax import models, sharding
from unimat_jax.assembly import abstract_batch, assemble, init_arguments
from unimat_jax.flops import ModelCost, count_flops, count_flops_by_scope, model_cost, step_cost
from unimat_jax.periodic_table import Table
from unimat_jax.representation import UniMatSpec

SPEC = UniMatSpec(3, 5, Table(tuple(range(5)), tuple(range(4))))
SMALL = {"base_channels": 32, "channel_multipliers": (1, 2), "num_res_blocks": 0, "attention_resolutions": (1, 3)}


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def convolve(x, kernel, **settings):
    settings = {"window_strides": (1, 1), "padding": "SAME", **settings}
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings)


def dense(x, w):
    return x @ w


def attend(q, k, v):
    return jax.nn.dot_product_attention(q, k, v)


def xla_count(fn, *args):
    said = jax.jit(fn).lower(*args).cost_analysis()
    assert said
    return said["flops"]


def square_sum(fn):
    return lambda *args: jnp.sum(jnp.square(fn(*args)))


def test_closed_forms():
    assert count_flops(dense, array(7, 5), array(5, 3)) == 2 * 7 * 5 * 3
    assert (
        count_flops(lambda a, b: jnp.einsum("bik,bkj->bij", a, b), array(4, 7, 5), array(4, 5, 3)) == 2 * 4 * 7 * 5 * 3
    )
    # 3 taps each way, one less at either border.
    assert count_flops(convolve, array(2, 5, 7, 4), array(3, 3, 4, 6)) == 2 * 2 * (3 * 5 - 2) * (3 * 7 - 2) * 4 * 6
    # B N heads of width D, T queries and S keys: logits and values.
    q, kv = array(2, 6, 3, 8), array(2, 9, 3, 8)
    assert count_flops(attend, q, kv, kv) == 2 * (2 * 2 * 3 * 6 * 9 * 8)
    assert count_flops(lambda x: jnp.tanh(x) * x + x.sum(), array(9, 9)) == 0
    assert count_flops(lambda x: jnp.tensordot(x, x, 2) + jnp.einsum("ij,ij->i", x, x), array(9, 9)) == 0  # sums
    assert count_flops(jnp.matmul, array(9, 9), array(9)) == 2 * 9 * 9


def test_gradients():
    x, w = array(7, 5), array(5, 3)
    once = 2 * 7 * 5 * 3
    assert count_flops(jax.grad(square_sum(dense), 1), x, w) == 2 * once  # none for the input's gradient
    assert count_flops(jax.grad(square_sum(dense), (0, 1)), x, w) == 3 * once
    image, kernel = array(2, 5, 7, 4), array(3, 3, 4, 6)
    once = count_flops(convolve, image, kernel)
    assert count_flops(jax.grad(square_sum(convolve), (0, 1)), image, kernel) == 3 * once


@pytest.mark.parametrize(
    ("shape", "kernel", "settings"),
    [
        ((2, 9, 18, 4), (3, 3, 4, 6), {}),
        ((2, 9, 18, 4), (3, 3, 4, 6), {"padding": "VALID", "window_strides": (3, 2)}),
        ((1, 8, 7, 6), (3, 5, 2, 9), {"feature_group_count": 3}),
        ((6, 8, 7, 4), (3, 3, 4, 9), {"batch_group_count": 3}),
        ((2, 6, 8, 4), (3, 2, 4, 6), {"padding": ((2, 0), (1, 2)), "window_strides": (2, 2)}),
        ((2, 9, 8, 4), (3, 2, 4, 6), {"padding": ((2, 1), (0, 3)), "rhs_dilation": (2, 3)}),
        ((2, 5, 4, 4), (3, 3, 4, 6), {"padding": ((2, 1), (1, 3)), "lhs_dilation": (3, 2), "window_strides": (2, 1)}),
    ],
)
def test_convolutions_count_as_xla_counts_them(shape, kernel, settings):
    fn = functools.partial(convolve, **settings)
    arguments = array(*shape), array(*kernel)
    assert count_flops(fn, *arguments) == xla_count(fn, *arguments) > 0


def repeated(length, body):
    return lambda x, w: jax.lax.scan(lambda x, _: (body(x, w), None), x, None, length=length)[0]


def test_a_scan_counts_every_round_where_xla_counts_one():
    x, w = array(4, 4), array(4, 4)
    once = 2 * 4**3
    five = repeated(5, lambda x, w: jnp.tanh(x @ w))
    assert count_flops(five, x, w) == 5 * once
    assert count_flops(repeated(3, five), x, w) == 15 * once
    assert count_flops(jax.grad(square_sum(five), 1), x, w) == 3 * 5 * once
    assert once <= xla_count(five, x, w) < 2 * once


def test_a_checkpoint_counts_what_its_gradient_recomputes():
    def two(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    x, w = array(4, 4), array(4, 4)
    once = 2 * 4**3
    assert count_flops(jax.checkpoint(two), x, w) == 2 * once
    assert count_flops(jax.grad(square_sum(two), (0, 1)), x, w) == 6 * once
    # Both products again: of the second the tanh needs its value.
    assert count_flops(jax.grad(square_sum(jax.checkpoint(two)), (0, 1)), x, w) == 8 * once


def test_branches_loops_calls_and_shards():
    x, w = array(4, 4), array(4, 4)
    once = 2 * 4**3

    def branches(p, x, w):
        return jax.lax.cond(p > 0, lambda x, w: x @ w @ w, lambda x, w: x @ w, x, w)

    assert count_flops(branches, array(), x, w) == 2 * once
    assert count_flops(lambda p, x, w: branches(-p, x, w), array(), x, w) == 2 * once

    def forms(x, w):
        return jax.lax.platform_dependent(x, w, cpu=lambda x, w: x @ w @ w, default=lambda x, w: x @ w)

    assert count_flops(forms, x, w) == once  # whatever runs here

    def loop(x, w):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ w, x)

    with pytest.raises(ValueError, match="while"):
        count_flops(loop, x, w)
    assert count_flops(lambda x: jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x / 2, x), x) == 0

    with pytest.raises(ValueError, match="ragged_dot"):
        count_flops(jax.lax.ragged_dot, x, array(2, 4, 4), jax.ShapeDtypeStruct((2,), jnp.int32))

    @jax.custom_vjp
    def custom(x, w):
        return x @ w

    custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda xw, g: (g @ xw[1].T, xw[0].T @ g))
    assert count_flops(custom, x, w) == once
    assert count_flops(jax.grad(square_sum(custom), (0, 1)), x, w) == 3 * once
    assert count_flops(jax.grad(square_sum(custom)), x, w) == 2 * once  # the other gradient is in the jaxpr, for nobody
    assert count_flops(jax.jit(jax.jit(dense)), x, w) == once
    assert count_flops(jax.vmap(dense, (0, None)), array(5, 4, 4), w) == 5 * once

    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    parts = PartitionSpec("a", None)
    sharded = jax.shard_map(dense, mesh=mesh, in_specs=(parts, PartitionSpec()), out_specs=parts)
    assert count_flops(sharded, x, w) == 2 * once  # the axis "b" does all again
    sharded = jax.shard_map(dense, mesh=mesh, in_specs=(parts, PartitionSpec()), out_specs=parts, axis_names={"a"})
    assert count_flops(sharded, x, w) == once  # the compiler may split it over "b"
    assert count_flops(lambda x, w: jax.debug.callback(list().append, x @ w), x, w) == once


def small_network(**changes):
    network = models.create("unet3d", **{**SMALL, "head_dim": 16, **changes})
    arguments = init_arguments(SPEC, 1)
    params = jax.eval_shape(lambda: network.init(jax.random.key(0), *arguments)["params"])
    return network, arguments, params


def loss_of(network, arguments):
    def loss(params):
        x, lattice = network.apply({"params": params}, *arguments)
        return jnp.sum(x**2) + jnp.sum(lattice**2)

    return loss


def test_the_networks_forward_pass_agrees_with_xla():
    network, arguments, params = small_network()
    loss = loss_of(network, arguments)
    counted, said = count_flops(loss, params), xla_count(loss, params)
    assert 0.95 * said < counted < said  # XLA's count has the element-wise operations too


def test_scopes_are_the_names_of_modules_and_add_up():
    network, arguments, params = small_network(attended_sites=4)
    loss = loss_of(network, arguments)
    forward, both = count_flops_by_scope(loss, params), count_flops_by_scope(jax.grad(loss), params)
    assert sum(forward.values()) == count_flops(loss, params)
    assert set(forward) == set(params) - {"place_embedding", "norm_out", "tokens_out"}  # parameters without products
    assert forward["up0_0_block"] > forward["time"] > 0
    assert set(both) == set(forward)
    for name in ("up0_0_block", "up1_0_attention"):
        assert both[name] == 3 * forward[name]
    assert both["sites_in"] == 2 * forward["sites_in"]  # the data need no gradient
    again = count_flops_by_scope(jax.value_and_grad(jax.checkpoint(loss)), params)
    assert set(again) == set(forward) and again["up0_0_block"] == 4 * forward["up0_0_block"]
    assert count_flops_by_scope(dense, array(7, 5), array(5, 3)) == {"": 2 * 7 * 5 * 3}


def test_scopes_of_checkpointed_modules():
    def block(name, x, w):
        with jax.named_scope(name):
            return jnp.tanh(jnp.tanh(x @ w) @ w)

    def loss(w, x):
        with jax.named_scope("Root"):
            for name in ("first", "second"):
                x = jax.checkpoint(functools.partial(block, name))(x, w)
        return jnp.sum(jnp.square(x))

    once = 2 * 4**3  # of four products forward, four again, and seven gradients: the data need none
    counted = count_flops_by_scope(jax.value_and_grad(loss), array(4, 4), array(4, 4))
    assert counted == {"first": 7 * once, "second": 8 * once}


def test_the_cost_of_a_model():
    network, arguments, params = small_network(dropout_rate=0.1)
    cost = model_cost(network, arguments)
    assert cost.num_params == sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
    assert cost.forward_flops_per_crystal == count_flops(loss_of(network, arguments), params)
    assert 2.9 < cost.train_flops_per_crystal / cost.forward_flops_per_crystal < 3
    three = jax.tree.map(lambda a: array(3, *a.shape[1:]), arguments)
    assert model_cost(network, three) == cost


@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_cost_of_a_training_step_is_its_models_and_traces_it_once(monkeypatch, microbatches):
    config = tiny_run.config("", data__properties=(), train__microbatches=microbatches)
    mesh = sharding.make_mesh(1)
    run = assemble(config, SPEC, [], mesh)
    traced = []
    object.__setattr__(run.objective, "apply", lambda *a, **k: traced.append(1) or run.network.apply(*a, **k))
    by_batch = sharding.batch_sharding(mesh)
    state = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), run.shapes, run.shardings)
    shapes = abstract_batch(SPEC, 0, config.train.batch_size)
    batch = {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=by_batch) for n, a in shapes.items()}
    key = jax.random.key(0)
    assert step_cost(run.train_step, state, batch, key) == model_cost(run.network, init_arguments(SPEC, 0))
    number = len(traced)
    zeros = sharding.to_devices({n: np.zeros(a.shape, a.dtype) for n, a in shapes.items()}, by_batch)
    run.train_step.trace(run.init(), zeros, key)
    assert len(traced) == number > 0
    assert isinstance(step_cost(run.train_step, state, batch, key), ModelCost)
