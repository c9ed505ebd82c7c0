"""Compilation ahead of time: reading compiled modules, fitting, searching, and a real tiny compilation for TPUs."""

import contextlib
import copy
import functools
import importlib.util
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny_run import PROPERTY, TINY_MODEL

from unimat_jax import default_config, main
from unimat_jax.aot import program, search, topology
from unimat_jax.aot.cost import Cost, module_cost
from unimat_jax.aot.hlo import parse_module, parse_shape
from unimat_jax.aot.loops import trip_count
from unimat_jax.aot.report import as_text, memory_text
from unimat_jax.aot.topology import CHIPS, GIB, parse_topology
from unimat_jax.cli import run_program
from unimat_jax.errors import UserError
from unimat_jax.flops import count_flops

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install 'unimat-jax[tpu]'"
)
F32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


def cost_of(compiled, peak_flops: float = 1e12, hbm_bandwidth: float = 1e9) -> Cost:
    return module_cost(parse_module(compiled.as_text()), peak_flops=peak_flops, hbm_bandwidth=hbm_bandwidth)


def on_cpu(function, *arguments) -> Cost:
    return cost_of(jax.jit(function).lower(*arguments).compile())


# Loops.


def nested(x, w):
    """7 rounds of one product and 3 of another: 2 * 16 * 32 * 32 FLOPs each."""

    def outer(x, w_i):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w_i), None), jnp.sin(x @ w_i), None, length=3)[0], x.sum()

    return jax.lax.scan(outer, x, w)


NESTED = (F32((16, 32)), F32((7, 32, 32)))
NESTED_FLOPS = 7 * (1 + 3) * 2 * 16 * 32 * 32


def test_a_loops_body_counts_as_often_as_it_runs():
    cost = on_cpu(nested, *NESTED)
    assert cost.flops == NESTED_FLOPS == count_flops(nested, *NESTED)
    assert sorted(cost.loops) == [3, 7] and cost.unknown_loops == 0


@needs_libtpu
def test_a_loops_body_counts_as_often_as_it_runs_on_tpu():
    """Where the compiler notes no number of rounds."""
    compiled = for_tpu(nested, NESTED, [PartitionSpec("chips"), PartitionSpec()])
    assert "known_trip_count" not in compiled.as_text()
    cost = cost_of(compiled)
    assert cost.flops * 4 == NESTED_FLOPS
    assert sorted(cost.loops) == [3, 7] and cost.unknown_loops == 0
    # The parameters are read once, however the loop slices them, and all lies on the chip afterwards.
    assert cost.hbm_bytes < 2 * 4 * (16 * 32 + 7 * 32 * 32) * 128 // 32


def for_tpu(function, arguments, specs):
    mesh = Mesh(np.array(topology.make_devices(parse_topology("v4:2x2x1"))), ("chips",))
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    with program.no_compilation_cache():
        return jax.jit(function, in_shardings=tuple(shardings)).lower(*arguments).compile()


def test_a_loop_of_unknown_length_is_said():
    cost = on_cpu(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: jnp.sin(x @ x), x), F32((8, 8)))
    assert cost.unknown_loops == 1 and cost.loops == [] and cost.flops == 2 * 8**3


LOOP = """HloModule m, num_partitions=4

%body (p: (s32[], f32[4], s32[])) -> (s32[], f32[4], s32[]) {{
  %p = (s32[]{{:T(128)}}, f32[4]{{0:T(128)S(3)}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %c = s32[]{{:T(128)S(6)}} copy(%i)
  %x = f32[4] get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
  %step = s32[] constant({step})
  %next = s32[] add(%c, %step)
  ROOT %t = (s32[], f32[4], s32[]) tuple(%next, %x, {last})
}}

%compared (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt = pred[] compare({order}), direction={direction}
}}

%cond (q: (s32[], f32[4], s32[])) -> pred[] {{
  %q = (s32[], f32[4], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] get-tuple-element(%q), index=2
  ROOT %fused = pred[] fusion(%j, %limit), kind=kLoop, calls=%compared
}}

ENTRY %main (y: f32[4]) -> f32[4] {{
  %y = f32[4] parameter(0)
  %zero = s32[] constant({start})
  %start = s32[] copy(%zero)
  %end = s32[] constant({end})
  %init = (s32[], f32[4], s32[]) tuple(%start, %y, /*index=2*/%end)
  %w = (s32[], f32[4], s32[]) while(%init), condition=%cond, body=%body, metadata={{op_name="a(b"}}
  ROOT %out = f32[4] get-tuple-element(%w), index=1
}}
"""


@pytest.mark.parametrize(
    ("changes", "rounds"),
    [
        ({}, 10),
        ({"direction": "LE"}, 11),
        ({"step": 3}, 4),
        ({"start": 4}, 6),
        ({"end": 0}, 0),
        ({"step": -1, "start": 9, "end": 0, "direction": "GT"}, 9),
        ({"step": -2, "start": 9, "end": 0, "direction": "GE"}, 5),
        ({"direction": "NE"}, 10),
        ({"order": "%b, %a", "direction": "GT"}, 10),
        ({"step": -1}, None),  # for ever
        ({"last": "%next"}, None),  # the limit moves
        ({"step": 0}, None),
    ],
)
def test_rounds_from_the_loops_condition(changes, rounds):
    """With a limit that is carried along unchanged and a comparison in a fusion, as the TPU compiler writes them."""
    fields = {"step": 1, "start": 0, "end": 10, "direction": "LT", "order": "%a, %b", "last": "%n"} | changes
    module = parse_module(LOOP.format(**fields))
    assert trip_count(module, module.entry, module.entry.instructions["w"]) == rounds


# FLOPs and bytes.


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "SAME"},
        {"padding": "VALID", "window_strides": (2, 3)},
        {"padding": [(2, 1), (0, 3)], "rhs_dilation": (2, 1)},
        {"padding": [(1, 1), (2, 2)], "lhs_dilation": (3, 2)},
        {"padding": "SAME", "feature_group_count": 4},
    ],
)
def test_flops_of_convolutions(options):
    settings = {"window_strides": (1, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC")} | options
    kernel = F32((3, 5, 8 // settings.get("feature_group_count", 1), 12))
    function = functools.partial(jax.lax.conv_general_dilated, **settings)
    expected = count_flops(function, F32((2, 9, 18, 8)), kernel)
    assert on_cpu(function, F32((2, 9, 18, 8)), kernel).flops == expected > 0


def test_flops_of_a_networks_gradient():
    def loss(w, x):
        h = jnp.einsum("bhc,cd->bhd", x, w)
        return jnp.square(jax.nn.softmax(jnp.einsum("bhd,bgd->bhg", h, h))).sum()

    arguments = (F32((8, 16)), F32((4, 5, 8)))
    assert on_cpu(jax.grad(loss), *arguments).flops == count_flops(jax.grad(loss), *arguments)


def test_shapes_with_tiles_and_memory_spaces():
    (array,) = parse_shape("f32[2,20,9,18,16]{1,4,3,2,0:T(8,128)S(3)}")
    assert array.bytes == 2 * 20 * 9 * 18 * 16 * 4 and array.memory_space == 3
    # 20 of the minor dimension lie in 128 lanes, 16 of the next in 2 x 8 sublanes.
    assert array.padded_bytes == 2 * 9 * 18 * 16 * 128 * 4
    (plain,) = parse_shape("bf16[3,5]{1,0}")
    assert plain.bytes == plain.padded_bytes == 30 and plain.memory_space == 0
    pair = parse_shape("((f32[3]{0:T(128)}, s32[]), pred[4,2]{1,0})")
    assert [a.bytes for a in pair] == [12, 4, 8] and pair[0].padded_bytes == 512
    assert [a.bytes for a in parse_shape("(f8e4m3fn[6], s4[6], u64[2], token[])")] == [6, 3, 16, 0]


TRAFFIC = """HloModule m

%sliced (a: f32[100,256], i: s32[]) -> f32[1,256] {
  %a = f32[100,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %s = f32[1,256]{1,0} dynamic-slice(%a, %i, %zero), dynamic_slice_sizes={1,256}
}

%updated (b: f32[100,256], u: f32[1,256], k: s32[]) -> f32[100,256] {
  %b = f32[100,256]{1,0} parameter(0)
  %u = f32[1,256]{1,0} parameter(1)
  %k = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %d = f32[100,256]{1,0} dynamic-update-slice(%b, %u, %k, %zero.1)
}

ENTRY %main (x: f32[100,256], n: s32[]) -> f32[100,256] {
  %x = f32[100,256]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %row = f32[1,256]{1,0} fusion(%x, %n), kind=kLoop, calls=%sliced
  %near = f32[1,256]{1,0:S(1)} copy(%row)
  %twice = f32[1,256]{1,0:S(1)} add(%near, %near)
  %start = (f32[1,256]{1,0}, f32[1,256]{1,0:S(1)}, u32[]) copy-start(%twice)
  %done = f32[1,256]{1,0} copy-done(%start)
  ROOT %new = f32[100,256]{1,0} fusion(%x, %done, %n), kind=kLoop, calls=%updated
}
"""


def test_slices_of_a_large_array_move_the_slice_and_on_chip_memory_nothing():
    row, index = 256 * 4, 4
    # Slice: the row, the index, the row written; copy: read; copy back: written; update: row and index read, row
    # written. The sum happens on the chip.
    moved = (2 * row + index) + row + row + (2 * row + index)
    cost = module_cost(parse_module(TRAFFIC), peak_flops=1.0, hbm_bandwidth=2.0)
    assert cost.hbm_bytes == moved and cost.seconds == moved / 2 and cost.flops == 0


def test_a_kernel_takes_what_is_slower_of_arithmetic_and_memory():
    compiled = jax.jit(jnp.matmul).lower(F32((64, 64)), F32((64, 64))).compile()
    flops, moved = 2 * 64**3, 3 * 64 * 64 * 4
    assert cost_of(compiled, 1e3, 1e9).seconds == pytest.approx(flops / 1e3)
    assert cost_of(compiled, 1e9, 1e3).seconds == pytest.approx(moved / 1e3)


# Collectives.


def collective_program(x):
    """On [2, 8, 16] floats a device: four kinds, in a loop of 5 rounds, in groups of 2 of 4."""

    def body(x, _):
        x = jax.lax.psum(x, "b")
        parts = jax.lax.psum_scatter(x, "b", scatter_dimension=1, tiled=True)
        x = jnp.tanh(jax.lax.all_gather(parts * 2, "b", axis=1, tiled=True))
        x = jax.lax.all_to_all(x, "b", split_axis=1, concat_axis=1, tiled=True)
        return jax.lax.ppermute(x, "a", [(0, 1), (1, 0)]), None

    return jax.lax.scan(body, x, None, length=5)[0]


def test_collectives_by_kind_with_bytes():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = PartitionSpec(("a", "b"))
    mapped = jax.jit(jax.shard_map(collective_program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    found = cost_of(mapped.lower(F32((8, 8, 16))).compile()).collectives
    size = 2 * 8 * 16 * 4
    assert {kind: (total.count, total.bytes) for kind, total in found.items()} == {
        kind: (5, 5 * size)
        for kind in ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
    }
    sent = {kind: total.sent / (5 * size) for kind, total in found.items()}
    assert sent.pop("all-reduce") == 1 and sent.pop("collective-permute") == 1 and set(sent.values()) == {0.5}


STARTED = """HloModule m, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

ENTRY %main (x: f32[256], y: bf16[64,8]) -> f32[256] {
  %x = f32[256]{0} parameter(0)
  %y = bf16[64,8]{1,0} parameter(1)
  %r = f32[256]{0} all-reduce-start(%x), channel_id=1, replica_groups=GROUPS, use_global_device_ids=true, to_apply=%sum
  %g = (bf16[64,8]{1,0}, bf16[256,8]{1,0}) all-gather-start(%y), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
  %gd = bf16[256,8]{1,0} all-gather-done(%g)
  ROOT %rd = f32[256]{0} all-reduce-done(%r)
}
"""


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['data'=2,'fsdp'=4] {'fsdp'}", 4),
        ("mesh['data'=2,'fsdp'=4] {'data','fsdp'}", 8),
        ("mesh['all'=8] {'all':(2)4}", 4),
        ("{}", 8),
    ],
)
def test_a_started_collective_counts_once_and_groups_are_read(groups, members):
    module = parse_module(STARTED.replace("GROUPS", groups))
    found = module_cost(module, peak_flops=1.0, hbm_bandwidth=1.0).collectives
    reduce, gather = found["all-reduce"], found["all-gather"]
    assert (reduce.count, reduce.bytes, gather.count, gather.bytes) == (1, 1024, 1, 4096)
    assert reduce.sent == pytest.approx(2 * 1024 * (members - 1) / members)
    assert gather.sent == pytest.approx(4096 * 3 / 4)


@needs_libtpu
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2"])
def test_collectives_of_sharded_parameters_on_tpu(name):
    """v5e overlaps one of them with work, where it stands in three fusions; both scatter sums by a fused slice."""
    mesh = Mesh(np.array(topology.make_devices(parse_topology(name))), ("fsdp",))
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(None, "fsdp"), PartitionSpec("fsdp")))

    def step(w, x):
        def loss(w):
            return jnp.square(jax.nn.silu(jax.nn.silu(x @ w[0]) @ w[1]) @ w[2]).sum()

        return jax.tree.map(lambda a, g: a - g, w, jax.grad(loss)(w))

    w, x = [F32((256, 512)), F32((512, 512)), F32((512, 256))], F32((1024, 256))
    shardings = [split] * 3
    with program.no_compilation_cache():
        compiled = jax.jit(step, in_shardings=(shardings, whole), out_shardings=shardings).lower(w, x).compile()
    cost = cost_of(compiled)
    assert cost.flops * 4 == count_flops(step, w, x)
    number = sum(math.prod(a.shape) for a in w)
    found = {kind: total.bytes for kind, total in cost.collectives.items()}
    assert found == {"all-gather": 2 * number, "reduce-scatter": 4 * number}  # products take bfloat16
    assert cost.collectives["all-gather"].count == 3


# Slices and chips.


def test_slices_by_name():
    slice_ = parse_topology("v4:4x4x2")
    assert (slice_.chip.name, slice_.shape, slice_.num_chips) == ("v4", (4, 4, 2), 32)
    assert parse_topology("v5e:16x16").num_chips == 256


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (None, "--topology is missing"),
        ("", "--topology is missing"),
        ("v4", "v4 is no slice"),
        ("v3:2x2", "v3:2x2 is no slice"),
        ("v4:4xx2", "is no slice"),
        ("v4:4x4", "3 axes"),
        ("v6e:4x4x4", "2 axes"),
        ("v5e:32x32", "at most 256 chips"),
        ("v4:0x2x2", "3 axes"),
    ],
)
def test_what_is_no_slice_is_told_what_is(name, said):
    with pytest.raises(UserError, match=said) as caught:
        parse_topology(name)
    assert "v4:" in str(caught.value) or "v5e:" in str(caught.value) or "v6e:" in str(caught.value)


@needs_libtpu
def test_libtpu_makes_one_device_a_chip_for_each_example():
    for chip in CHIPS.values():
        for shape in chip.examples:
            slice_ = parse_topology(f"{chip.name}:{shape}")
            assert len(topology.make_devices(slice_)) == slice_.num_chips
    with pytest.raises(UserError, match=r"v4:3x5x7: the TPU compiler refuses it .*examples: v4:2x2x1"):
        topology.make_devices(parse_topology("v4:3x5x7"))


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_chips_are_of_the_right_order(chip):
    assert 0.9 < chip.usable_hbm / chip.hbm < 1.01
    # FLOPs a byte, and the links against the memory: a slip of a unit would show.
    assert 150 < chip.flops / chip.hbm_bandwidth < 600
    assert 4 < chip.hbm_bandwidth / chip.ici < 5
    assert chip.source.endswith(chip.name) and len(chip.examples) > 3


def test_no_libtpu_and_another_libtpu_are_named(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'unimat-jax\[tpu\]'"):
        topology.make_devices(parse_topology("v4:2x2x1"))
    monkeypatch.setattr(topology.importlib.metadata, "requires", lambda name: ["libtpu==0.0.41.* ; extra == 'tpu'"])
    for version, fits in (("0.0.41", True), ("0.0.41.1", True), ("0.0.4", False), ("0.0.52", False)):
        monkeypatch.setattr(topology.importlib.metadata, "version", lambda name, version=version: version)
        if fits:
            topology.check_versions()
        else:
            with pytest.raises(UserError, match=rf"libtpu {version} is not the one for jax .*, 0.0.41: pip install"):
                topology.check_versions()


# Memory.


def test_what_fits():
    stats = SimpleNamespace(
        argument_size_in_bytes=4 * GIB, output_size_in_bytes=3 * GIB, alias_size_in_bytes=2 * GIB,
        temp_size_in_bytes=5 * GIB, generated_code_size_in_bytes=GIB // 2, peak_memory_in_bytes=0,
    )  # fmt: skip
    memory = program.fitting(stats, 11 * GIB)
    assert memory["peak"] == 10.5 * GIB and memory["fits"]
    assert memory_text(memory).endswith("peak 10.50 of 11.00 GiB: fits, 0.50 GiB free")
    stats.peak_memory_in_bytes = 11 * GIB
    memory = program.fitting(stats, 11 * GIB)
    assert not memory["fits"] and memory_text(memory).endswith("does not fit, 0.50 GiB over")


TOO_LARGE = """RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of memory in \
memory space hbm. Used 34.00G of 30.75G hbm. Exceeded hbm capacity by 3.25G.

Total hbm usage >= 21.25G:
    reserved         1.25G
    program         17.00G
    arguments        3.00G

Output size 14.00G; shares 512.00M with arguments.

Program hbm requirement 17.00G:
    HLO temp         16.50G (100.0% utilization: Unpadded (2.00G) Padded (2.00G), 0.0% fragmentation (77.5K))
"""


def test_the_compilers_refusal_says_how_much_it_needs():
    memory = program.refused(TOO_LARGE, int(30.75 * GIB))
    assert memory is not None and not memory["fits"] and memory["refused"] and not memory["partial"]
    found = {name: memory[name] / GIB for name in ("peak", "arguments", "outputs", "aliased", "temporaries")}
    assert found == {"peak": 34, "arguments": 3, "outputs": 14, "aliased": 0.5, "temporaries": 16.5}
    assert memory_text(memory).endswith(
        "the compiler refuses it: it needs 34.00 of 30.75 GiB: does not fit, 3.25 GiB over"
    )
    one_array = "RESOURCE_EXHAUSTED: Allocation (size=64424509440) would exceed memory (size=34359738368) :: %s0"
    memory = program.refused(one_array, 10)
    assert memory is not None and memory["peak"] == 64424509440 and memory["partial"]
    assert "at least" in memory_text(memory)
    assert program.refused("INTERNAL: Used 34.00G of 30.75G hbm", 10) is None
    assert program.refused("RESOURCE_EXHAUSTED: no more threads", 10) is None


# What is compiled.


def small_config(**changes):
    config = default_config.get_config()
    config.data.max_atoms_per_element, config.data.table = 2, "Li,Na,K,F,Cl,O,S,Mg,Ca"
    config.model.update(TINY_MODEL)
    config.train.batch_size = config.sample.batch_size = 8
    config.sample.num_steps = 3
    for name, value in changes.items():
        part, field = name.split("__")
        config[part][field] = value
    return config.lock()


def test_the_tensor_without_data_and_with(tiny_data):
    spec, schema, source = program.tensor_of(small_config(data__properties=("band_gap",)))
    assert (
        spec.grid[0] == spec.max_atoms == 2 and len(schema) == 1 and source.startswith("of the config alone: no data")
    )
    assert spec.lattice_mean == (0.0,) * 6 and spec.lattice_std == (1.0,) * 6
    prepared = {"data__dataset": "starter", "data__data_dir": str(tiny_data), "data__properties": (PROPERTY,)}
    spec, schema, source = program.tensor_of(
        small_config(**prepared, data__table="data", data__max_atoms_per_element=0)
    )
    assert (spec.grid[0], spec.max_atoms) == (3, 5) and schema[0]["name"] == PROPERTY
    assert str(tiny_data) in source and spec.lattice_std != (1.0,) * 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__max_atoms_per_element": 0}, "config.data.max_atoms_per_element = 0: set it"),
        ({"data__table": "data"}, "config.data.table = 'data': write 'full' or"),
    ],
)
def test_a_tensor_that_the_config_does_not_give(changes, said):
    with pytest.raises(UserError, match=said):
        program.tensor_of(small_config(**changes))


@contextlib.contextmanager
def quick_compiler():
    """Two thirds of the time, for the same FLOPs and collectives."""
    before = jax.config.values["jax_optimization_level"]
    jax.config.update("jax_optimization_level", "O0")
    yield
    jax.config.update("jax_optimization_level", before)


COMPILE = ["--config=unimat", "--mode=compile"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*COMPILE], "--topology is missing: give"),
        ([*COMPILE, "--topology=v9:2x2"], "v9:2x2 is no slice of a TPU that is known here: give"),
        ([*COMPILE, "--topology=v4:2x2x1", "--programs=train"], "--programs = train: choose from train_step, sampler"),
        (["--mode=compile", "--topology=v4:2x2x1"], "--config is missing"),
        ([*COMPILE[:1], "--mode=fly"], "--mode"),
        ([*COMPILE[:1], "--workdir=w", "--topology=v4:2x2x1"], "go with --mode=compile"),
        pytest.param([*COMPILE, "--topology=v4:2x2x1", "--config.train.batch_size=6"], "batch_size = 6 does not",
                     marks=needs_libtpu),
        pytest.param([*COMPILE, "--topology=v4:2x2x1", "--config.train.fsdp=3"], "fsdp = 3 does not divide",
                     marks=needs_libtpu),
        pytest.param([*COMPILE, "--topology=v4:2x2x1", "--config.sample.batch_size=7", "--programs=sampler",
                      "--config.model.base_channels=4", "--config.model.num_res_blocks=0"],
                     "sample.batch_size = 7 does not divide", marks=needs_libtpu),
    ],
)  # fmt: skip
def test_what_cannot_be_compiled_is_one_line(arguments, said, capsys):
    assert run_program(main.main, arguments) == 2
    told = capsys.readouterr()
    assert len(told.err.splitlines()) == 1 and told.err.startswith("error: ") and said in told.err and not told.out


@needs_libtpu
def test_the_real_programs_compile_for_four_chips(capsys, tmp_path):
    """The report's numbers are what is known of them: parameters, all-reduced gradients, FLOPs of the mathematics."""
    from unimat_jax.aot import command

    options = {"topology": "v4:2x2x1", "programs": program.PROGRAMS, "search": False}
    with quick_compiler():
        command.run(small_config(model__attention_resolutions=()), **options, output=None, workdir=str(tmp_path / "r"))
    report = json.loads((tmp_path / "r" / command.DEFAULT_NAME).read_text())
    number = report["model"]["num_params"]
    train, sampler = report["programs"]["train_step"], report["programs"]["sampler"]
    assert report["num_chips"] == 4 and report["mesh"] == {"data": 4, "fsdp": 1} and report["tensor"]["grid"][0] == 2
    for found in (train, sampler):
        assert found["memory"]["fits"] and found["memory"]["peak"] < GIB and found["unknown_loops"] == 0
        assert 0.95 < found["flops_ratio"] < 1.05 and found["compile_seconds"] > 0 and found["custom_calls"] is not None
        assert 0 < found["mfu_nothing_hidden"] <= found["mfu"] <= 1
    # Parameters, two moments and the moving average lie on each chip; the state that comes in is the one that goes out.
    assert (
        train["memory"]["arguments"] > 4 * 4 * number and train["memory"]["aliased"] > 0.9 * train["memory"]["outputs"]
    )
    # Every gradient that is not always zero, and three losses, once.
    assert 3.8 * number <= train["collectives"]["all-reduce"]["bytes"] <= 4 * number + 12
    assert sampler["collectives"] == {} and sampler["loops"] == [3]
    told = capsys.readouterr().out
    assert "does not fit" not in told and told.count(": fits, ") == 2 and f"{number:,} parameters" in told
    assert as_text(report) == told.strip()


# Search.


def fake_chip(state: float, each: float):
    """(attempt, log): peak = state / fsdp + 2 + each * batch a chip, in GiB; larger batches and meshes are slower."""
    log = []

    def attempt(config, slice_):
        fsdp, batch = config.train.fsdp, config.train.batch_size
        log.append((fsdp, batch))
        peak = state / fsdp + 2 + each * batch / slice_.num_chips
        found = {"fits": peak < 30.75, "peak": peak * GIB, "capacity": slice_.chip.usable_hbm, "partial": False}
        seconds = 1 + batch / slice_.num_chips + fsdp / 8
        return found | {search.RATE: batch / seconds / 32, "optimal_seconds": seconds, "collective_seconds": 0.0}

    return attempt, log


@pytest.fixture
def searched(monkeypatch):
    """find_best of fake chips, with the same state on every mesh but for its share."""

    def run(state, each, **options):
        monkeypatch.setattr(search, "state_bytes", lambda config, slice_, fsdp: int(state / fsdp * GIB))
        attempt, log = fake_chip(state, each)
        return search.find_best(small_config(), parse_topology("v4:4x4x2"), attempt=attempt, **options), log

    return run


def largest(state: float, each: float, fsdp: int) -> int:
    return 32 * 2 ** math.floor(math.log2((30.75 - 2 - state / fsdp) / each))


def test_the_search_finds_the_largest_batch_of_each_mesh_in_few_tries(searched):
    report, log = searched(20.0, 0.45)
    for fsdp in (1, 2, 4, 8, 16, 32):
        assert max(t["batch_size"] for t in report["tries"] if t["fsdp"] == fsdp and t["fits"]) == largest(
            20, 0.45, fsdp
        )
    assert len(log) == len(set(log)) <= 2 + 6 + 1  # the line, and what it predicts
    assert report["best"]["fsdp"] == 2  # the largest batch that fits, on the mesh with the fewest messages
    assert report["best"]["batch_size"] == largest(20, 0.45, 2) > largest(20, 0.45, 1)
    told = search.as_text(report)
    assert told.endswith(f"best: --config.train.batch_size={report['best']['batch_size']} --config.train.fsdp=2")
    assert len(told.splitlines()) == len(log) + 2


def test_a_state_that_needs_sharding(searched):
    report, _ = searched(100.0, 1.0)
    assert {t["fsdp"] for t in report["tries"] if t["fits"]} == {4, 8, 16, 32}
    assert searched(2000.0, 1.0)[0]["best"] is None
    assert "nothing fits" in search.as_text(searched(2000.0, 1.0)[0])


def test_a_search_goes_on_where_it_was_stopped(searched):
    reports = []
    whole, log = searched(20.0, 0.45, save=lambda report: reports.append(json.loads(json.dumps(report))))
    assert [len(report["tries"]) for report in reports] == [*range(1, len(log) + 1), len(log)]
    again, rest = searched(20.0, 0.45, saved=reports[2])
    assert rest == log[3:] and again["best"] == whole["best"]
    other = copy.deepcopy(reports[2])
    other["search"]["config"]["model"]["base_channels"] = 5
    with pytest.raises(UserError, match="of another search or program: name another file"):
        searched(20.0, 0.45, saved=other)


def test_a_file_that_is_no_search_is_not_overwritten(tmp_path):
    assert search.read_saved(None) is None and search.read_saved(tmp_path / "none.json") is None
    (tmp_path / "a.json").write_text('{"programs": {}}')
    with pytest.raises(UserError, match=r"a\.json: the file there is no search's report"):
        search.read_saved(tmp_path / "a.json")


@needs_libtpu
def test_the_state_on_a_chip_shrinks_with_fsdp(monkeypatch):
    from unimat_jax import sharding

    monkeypatch.setattr(sharding, "MIN_SIZE_TO_SHARD", 64)
    slice_ = parse_topology("v4:2x2x1")
    one, four = (search.state_bytes(small_config(), slice_, fsdp) for fsdp in (1, 4))
    assert one / 4 < four < one / 2
