"""One step on one device, on four, and with sharded parameters gives the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from tiny_run import BATCH_SIZE, PROPERTY, TINY_MODEL

from unimat_jax import data, models, sharding
from unimat_jax.assembly import init_arguments
from unimat_jax.errors import UserError
from unimat_jax.tensor_diffusion import TensorDiffusion
from unimat_jax.train_state import create_state
from unimat_jax.train_step import train_step


def test_meshes():
    assert dict(sharding.make_mesh().shape) == {"data": 4, "fsdp": 1}
    assert dict(sharding.make_mesh(2).shape) == {"data": 2, "fsdp": 2}
    assert dict(sharding.make_mesh(devices=jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1}


@pytest.mark.parametrize("fsdp", [0, -1, 3, 8])
def test_a_bad_fsdp_is_named(fsdp):
    with pytest.raises(UserError, match=rf"train.fsdp = {fsdp} does not divide the 4 devices"):
        sharding.make_mesh(fsdp)


def test_a_batch_size_that_the_devices_do_not_divide():
    sharding.check_batch_size(8, sharding.make_mesh(2), "a.b")
    with pytest.raises(UserError, match=r"a\.b = 6 does not divide by the 4 devices"):
        sharding.check_batch_size(6, sharding.make_mesh(2), "a.b")


def test_large_arrays_are_split_along_their_largest_axis_that_divides():
    tree = {"matrix": (512, 1024), "tall": (2048, 512), "odd": (1023, 1024), "never": (1023, 1025), "small": (64, 64)}
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in tree.items()} | {
        "number": jax.ShapeDtypeStruct((), jnp.int32)
    }
    specs = {name: s.spec for name, s in sharding.fsdp_sharding(sharding.make_mesh(2), shapes).items()}
    assert specs == {
        "matrix": PartitionSpec(None, "fsdp"),
        "tall": PartitionSpec("fsdp"),
        "odd": PartitionSpec(None, "fsdp"),
        "never": PartitionSpec(),
        "small": PartitionSpec(),
        "number": PartitionSpec(),
    }
    without = sharding.fsdp_sharding(sharding.make_mesh(1), shapes)
    assert {s.spec for s in without.values()} == {PartitionSpec()}


def test_a_batch_lies_in_equal_parts_on_all_devices():
    batch = {"a": np.arange(8 * 3.0).reshape(8, 3)}
    placed = sharding.to_devices(batch, sharding.batch_sharding(sharding.make_mesh(2)))["a"]
    np.testing.assert_array_equal(placed, batch["a"])
    assert [shard.data.shape for shard in placed.addressable_shards] == [(2, 3)] * 4
    assert len({shard.device for shard in placed.addressable_shards}) == 4


@pytest.fixture(scope="module")
def parts(tiny_data):
    """Initial state, the step to be jitted, its batch."""
    directory = data.dataset_directory("starter", tiny_data)
    statistics = data.read_statistics(directory)
    spec, schema = data.make_spec(statistics, table="data"), data.condition_schema(statistics, [PROPERTY])
    augmentation = {"shuffle_atoms": True, "random_shift": True, "random_axes": True}
    source = data.RecordSource(directory, "train")
    batch = data.BatchMaker(source, spec, schema, batch_size=BATCH_SIZE, seed=0, augmentation=augmentation)(0)
    network = models.create("unet3d", **TINY_MODEL | {"attention_resolutions": ()})
    arguments = init_arguments(spec, 1)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), *arguments)["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) / 5, shapes)
    diffusion = {"prediction_type": "v", "logsnr_min": -20.0, "logsnr_max": 20.0, "null_weight": 0.1}
    diffusion |= {"lattice_weight": 1.0, "counts_share": 0.5, "elements_share": 0.25, "property_drop_rate": 0.2}
    optimizer = optax.sgd(0.1, momentum=0.9)  # Adam's first step is the sign of a gradient: rounding would show
    objective = TensorDiffusion(network.apply, spec, **diffusion)
    step = functools.partial(train_step, objective=objective, optimizer=optimizer, ema_decay=0.9)
    return lambda: create_state(lambda: jax.tree.map(jnp.asarray, params), optimizer), step, batch


def run(parts, mesh):
    """Two steps as train.py places them: (state on the host, metrics of the second, devices of each parameter)."""
    init, step, batch = parts
    state = jax.device_get(init())
    shardings = sharding.fsdp_sharding(mesh, state)
    by_batch, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    jitted = jax.jit(step, in_shardings=(shardings, by_batch, everywhere), out_shardings=(shardings, everywhere))
    state = jax.device_put(state, shardings)
    placed, key = sharding.to_devices(batch, by_batch), jax.device_put(jax.random.key(3), everywhere)
    for _ in range(2):
        state, metrics = jitted(state, placed, key)
    split = [not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params)]
    return jax.device_get(state), {name: float(value) for name, value in metrics.items()}, split


@pytest.fixture(scope="module")
def on_one_device(parts):
    return run(parts, sharding.make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize("fsdp", [1, 2], ids=["4 devices", "4 devices, fsdp 2"])
def test_the_step_is_the_same_on_one_device_and_on_four(parts, on_one_device, fsdp, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SIZE_TO_SHARD", 32)  # else the tiny network would stay whole
    state, metrics, split = run(parts, sharding.make_mesh(fsdp))
    expected_state, expected, _ = on_one_device
    assert sum(split) > 20 if fsdp > 1 else not any(split)
    assert metrics == pytest.approx(expected, rel=1e-4)
    assert int(state.step) == 2
    for name in ("params", "ema_params", "opt_state"):
        ours, theirs = jax.tree.leaves(getattr(state, name)), jax.tree.leaves(getattr(expected_state, name))
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4 * max(1.0, np.abs(b).max()))
