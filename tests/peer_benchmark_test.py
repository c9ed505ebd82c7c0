"""The benchmark against the peer: its statistics, its bookkeeping by level and its two processes, without torch.

The whole of it runs where UNIMAT_PEER_PYTHON names the interpreter of an environment with imagen-pytorch 1.26.2.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from unimat_jax import models
from unimat_jax.cli import run_program

ROOT = Path(__file__).parents[1]
PEER_PYTHON = os.environ.get("UNIMAT_PEER_PYTHON")


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        from benchmarks import peer_jax, peer_torch, peer_unet3d

        yield {"main": peer_unet3d, "ours": peer_jax, "peer": peer_torch}


def test_the_ratio_is_the_median_of_the_pairs(benchmark):
    """Not the ratio of the medians: the machine may be slow in one pair and fast in the next."""
    found = benchmark["main"].pair_statistics([1.0, 2.0, 4.0], [4.0, 20.0, 4.0])
    assert found["ratios"] == [4.0, 10.0, 1.0]
    assert found["ratio"] == {"median": 4.0, "min": 1.0, "max": 10.0}
    assert found["median_seconds"] == {"ours": 2.0, "peer": 4.0}


def test_the_ratio_at_equal_flops(benchmark):
    """Ours does half of the operations in a quarter of the time: twice as many a second."""
    timing = benchmark["main"].pair_statistics([1.0], [4.0])
    found = benchmark["main"].at_equal_flops(timing, {"ours": 50.0, "peer": 100.0}, {"ours": 100.0, "peer": 50.0})
    assert found["flops_per_second"] == {"ours": 50.0, "peer": 25.0}
    assert found["share_of_matmul_peak"] == {"ours": 0.5, "peer": 0.5}
    assert found["ratio_at_equal_flops"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert found["ratio_if_peer_unpadded"]["median"] == pytest.approx(4.0 * (9 * 18) / (12 * 20))


def test_our_parameters_and_operations_by_level_add_up(benchmark):
    ours = benchmark["ours"].Ours()
    settings = {"base_channels": 4, "head_dim": 4, "num_res_blocks": 1}
    about = ours.setup(2, 2, seed=0, settings=settings)
    net = models.create("unet3d", **{**benchmark["ours"].SETTINGS, **settings})
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), *ours.arguments))
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert about["num_params"] == sum(about["params"].values()) == size
    assert all(about["params"].values()) and list(about["params"]) == list(benchmark["peer"].GROUPS)
    levels = {"down 0": 1, "down 1": 1, "down 2": 1, "up 2": 2, "up 1": 2, "up 0": 2}
    assert about["res_blocks"] == {**levels, "middle": 2, "other": 0}
    attentions = {**levels, "down 0": 0, "up 0": 0, "middle": 1, "other": 0}
    assert about["attentions"] == {name: 2 * number for name, number in attentions.items()}  # places, then levels
    assert about["settings"]["dtype"] == "f32"
    flops = ours.flops()
    forward = flops["forward"]
    assert all(forward.values()) and list(forward) == list(about["params"])
    assert 2.5 < flops["train_step"] / sum(forward.values()) <= 3.01  # the gradients of a product are two products
    assert np.shape(about["x_0"]) == (2, 2, 9, 18, 3) and (np.array(about["x_0"]) == about["null"]).mean() > 0.9


def test_our_train_step_and_sampler_run(benchmark):
    ours = benchmark["ours"].Ours()
    settings = {"base_channels": 4, "head_dim": 4, "num_res_blocks": 1, "channel_multipliers": (1,)}
    ours.setup(2, 2, seed=0, settings=settings)
    assert ours.train() > ours.train() > 0  # the first one compiles
    assert int(ours.state.step) == 2
    assert ours.sample(num_steps=2) > ours.sample(num_steps=2) > 0
    assert ours.matmul(size=64, repeats=2) > 0


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("downs.0.1.block1.project.spatial_conv.weight", "down 0"),
        ("downs.2.2.0.gca.net.0.weight", "down 2"),
        ("ups.0.0.block1", "up 2"),
        ("ups.2.1.3", "up 0"),
        ("mid_temporal_attn.fn.fn.to_q.weight", "middle"),
        ("final_res_block.block1", "other"),
        ("init_conv.convs.0.weight", "other"),
        ("upsample_combiner", "other"),
    ],
)
def test_parts_of_the_peer(benchmark, name, group):
    """As imagen-pytorch 1.26.2 names them; its `ups` start at the coarsest level."""
    assert benchmark["peer"].group_of(name) == group


def test_operations_of_the_peer_are_summed_once(benchmark):
    """A module's count holds its children's, and what is done outside of the levels is "other"."""
    counts = {
        "Global": {"mm": 60, "conv": 40},
        "Unet3D": {"mm": 60, "conv": 40},
        "Unet3D.downs.0.1": {"mm": 20, "conv": 10},
        "Unet3D.downs.0.1.block1": {"mm": 20},
        "Unet3D.downs.0.10": {"mm": 1},
        "Unet3D.ups.0.0": {"conv": 25},
        "Unet3D.final_conv": {"conv": 5},
    }
    found = benchmark["peer"].by_group(counts)
    assert {name: value for name, value in found.items() if value} == {"down 0": 31, "up 2": 25, "other": 44}


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation"),
    [
        ((5, 4), (3, 3), (1, 1), (1, 1), (1, 1)),
        ((7,), (3,), (2,), (2,), (2,)),
        ((6, 3), (1, 1), (1, 1), (0, 0), (1, 1)),
    ],
)
def test_operations_on_padding_are_not_counted(benchmark, size, kernel, stride, padding, dilation):
    """Against a walk over every pair of a result and a tap."""
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    out = [(n + 2 * p - r) // s + 1 for n, p, r, s in zip(size, padding, reach, stride, strict=True)]
    pairs = 0
    for place in itertools.product(*map(range, out)):
        for tap in itertools.product(*map(range, kernel)):
            at = [i * s + k * d - p for i, s, k, d, p in zip(place, stride, tap, dilation, padding, strict=True)]
            pairs += all(0 <= a < n for a, n in zip(at, size, strict=True))
    x, w, y = (2, 3, *size), (8, 3, *kernel), (2, 8, *out)
    how = (None, stride, padding, dilation, False)
    assert benchmark["peer"].convolution_flops(x, w, *how, (0,), 1, out_shape=y) == 2 * 2 * 8 * 3 * pairs
    once = benchmark["peer"].convolution_backward_flops(y, x, w, *how, (0,), 1, [True, False, True])
    both = benchmark["peer"].convolution_backward_flops(y, x, w, *how, (0,), 1, [True, True, True])
    assert (once, both) == (2 * 2 * 8 * 3 * pairs, 2 * 2 * 2 * 8 * 3 * pairs)


CHILD = """
import time
from benchmarks.peer_torch import serve

def work(seconds):
    print("a library's chatter on standard output")
    time.sleep(seconds)
    return [seconds, "done"]

def fail():
    raise ValueError("no such luck")

serve({"work": work, "fail": fail})
"""


def test_a_child_answers_is_idle_and_says_why_it_died(benchmark, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    side = benchmark["main"].Side([sys.executable, "-c", CHILD], "the remedy")
    try:
        assert side.ask("work", seconds=0.2) == [0.2, "done"]
        time.sleep(0.5)  # asked at once, writing the answer alone would be half of the wait
        assert side.ask("work", seconds=0.01) == [0.01, "done"]
        assert side.waiting_cpu_share < 0.5 and side.waiting_cpu_share >= 0
        with pytest.raises(Exception, match=r"ended at 'fail': ValueError: no such luck; the remedy"):
            side.ask("fail")
    finally:
        side.close()


def test_pairs_run_in_turn(benchmark, monkeypatch):
    order = []

    class Fake:
        waiting_cpu_share = 0.0

        def __init__(self, name, seconds):
            self.name, self.seconds = name, seconds

        def ask(self, request, **arguments):
            order.append((self.name, request, arguments))
            return self.seconds

    monkeypatch.setattr(benchmark["main"], "PAUSE_S", 0.0)
    sides = {"ours": Fake("ours", 0.5), "peer": Fake("peer", 2.0)}
    found = benchmark["main"].in_turn(sides, "sample", 2, num_steps=3)
    assert order == [(name, "sample", {"num_steps": 3}) for name in ("ours", "peer")] * 2
    assert found["ratio"]["median"] == 4.0 and found["seconds"] == {"ours": [0.5] * 2, "peer": [2.0] * 2}


def test_errors_name_the_flag(benchmark, tmp_path, capsys):
    def error(*flags):
        assert run_program(benchmark["main"].main, [f"--output={tmp_path / 'out.json'}", *flags]) == 2
        return capsys.readouterr().err

    assert "--peer_python" in error("--peer_python=no-such-python")
    assert "--pairs=0" in error("--peer_python=python", "--pairs=0")
    assert not (tmp_path / "out.json").exists()
    with pytest.raises(Exception, match="--set=base_channels: write --set=FIELD=VALUE"):
        benchmark["main"].parse_setting("base_channels")
    assert benchmark["main"].parse_setting("convolution=axial") == ("convolution", "axial")
    assert benchmark["main"].parse_setting("channel_multipliers=(1, 2)") == ("channel_multipliers", (1, 2))


@pytest.mark.skipif(not PEER_PYTHON, reason="UNIMAT_PEER_PYTHON names no interpreter with imagen-pytorch 1.26.2")
def test_the_whole_benchmark(tmp_path):
    """A minute: the peer in full size against a small network of ours."""
    path = tmp_path / "out.json"
    flags = [f"--peer_python={PEER_PYTHON}", f"--output={path}", "--pairs=1", "--sampling_steps=1", "--full=False"]
    flags += ["--set=base_channels=4", "--set=head_dim=4", "--set=num_res_blocks=1"]
    subprocess.run([sys.executable, "-m", "benchmarks.peer_unet3d", *flags], cwd=ROOT, check=True)
    report = json.loads(path.read_text())
    peer = report["sides"]["peer"]
    assert peer["num_params"] == sum(peer["params"].values()) == 23_480_966
    assert peer["res_blocks"] == {name: {"middle": 2, "other": 1}.get(name, 4) for name in peer["res_blocks"]}
    assert peer["settings"]["input"] == [8, 3, 3, 12, 20]
    flops = report["flops"]["peer"]
    forward = sum(flops["forward"].values())
    assert all(flops["forward"].values())
    assert 0.85 < forward / sum(flops["forward_with_padding"].values()) < 1
    assert 2.5 < flops["train_step"] / forward < 3.01
    assert {"commit", "seed", "machine", "command"} <= set(report)
