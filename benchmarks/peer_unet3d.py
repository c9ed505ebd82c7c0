"""A train step and sampling against imagen-pytorch's Unet3D, the network of the public PyTorch UniMat (Dismai-Bench).

python -m benchmarks.peer_unet3d --peer_python=PYTHON --output=benchmarks/peer_unet3d.json

PYTHON is the interpreter of an environment of its own, made by `pip install imagen-pytorch==1.26.2`. Each side is a
process that waits on a pipe while the other runs. Both get the same tensor of random atoms; the peer's is padded from
9 x 18 to 12 x 20, since it halves twice. Ratios are the peer's seconds over ours: above 1, ours is faster.
"""

from __future__ import annotations

import ast
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fingerprints import commit, machine
from benchmarks.peer_torch import GROUPS
from unimat_jax.cli import Parser, run_program
from unimat_jax.errors import UserError

BATCH, LEVELS, PEER_PLANE = 8, 3, (12, 20)
TABLE = (9, 18)
FULL_STEPS = 256
PARAMS_TOLERANCE = 0.1
"""By how much the numbers of parameters may differ for the comparison to be one."""
MATMUL_SIZES, MATMUL_REPEATS = (1024, 2048), 5
WARM_UP = 3
PAUSE_S = 0.3
"""Between turns, so that a thread pool that spins for a while after its work has gone to sleep."""
SIDES = ("ours", "peer")


class Side:
    """A child process of `peer_torch.serve` and what it said."""

    def __init__(self, command: Sequence[str], remedy: str):
        self.remedy = remedy
        self.command = list(command)
        self.waiting_cpu_share = 0.0
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
            )
        except OSError as error:
            self.errors.close()
            raise UserError(f"{command[0]}: {error}; {remedy}") from error

    def ask(self, name: str, **arguments: Any) -> Any:
        """The answer to one request. Raises UserError with the child's last line where it has died."""
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps({"do": name, "with": arguments}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            self.errors.seek(0)
            said = self.errors.read().strip().splitlines() or ["no message"]
            raise UserError(f"{shlex.join(self.command)} ended at {name!r}: {said[-1]}; {self.remedy}")
        answer = json.loads(line)
        self.waiting_cpu_share = answer["waiting_cpu_share"]
        return answer["value"]

    def close(self) -> None:
        """Ends the child: its input ends."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.errors.close()


def warm_up(sides: Mapping[str, Side], name: str, **arguments: Any) -> None:
    """Rounds that are not counted: the first one compiles, the next ones grow the heap."""
    for side in SIDES:
        for _ in range(WARM_UP):
            sides[side].ask(name, **arguments)


def in_turn(sides: Mapping[str, Side], name: str, number: int, **arguments: Any) -> dict[str, Any]:
    """`number` pairs of seconds, ours then the peer's, their statistics, and the largest share of a processor that a
    side used while it waited for the other's turn to end."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    shares: list[float] = []
    for pair in range(number):
        for side in SIDES:
            time.sleep(PAUSE_S)
            seconds[side].append(sides[side].ask(name, **arguments))
            if pair or side == "peer":  # ours has not waited for a turn of the peer before its first
                shares.append(sides[side].waiting_cpu_share)
        ratio = seconds["peer"][-1] / seconds["ours"][-1]
        print(f"{name}: ours {seconds['ours'][-1]:8.3f} s   peer {seconds['peer'][-1]:8.3f} s   ratio {ratio:5.2f}")
    return {"seconds": seconds, **pair_statistics(seconds["ours"], seconds["peer"]), "waiting_cpu_share": max(shares)}


def pair_statistics(ours: Sequence[float], peer: Sequence[float]) -> dict[str, Any]:
    """Ratios peer / ours pair by pair: their median, least and largest, and each side's median seconds."""
    ratios = [b / a for a, b in zip(ours, peer, strict=True)]
    return {
        "median_seconds": {"ours": statistics.median(ours), "peer": statistics.median(peer)},
        "ratios": ratios,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }


def at_equal_flops(timing: Mapping[str, Any], flops: Mapping[str, float], peak: Mapping[str, float]) -> dict[str, Any]:
    """What the seconds mean in operations: FLOP/s of both, their shares of the matrix product's, and the ratio of
    FLOP/s (ours over the peer's), which is the ratio of times if both had as many operations to do. `unpadded`: the
    ratio of times if the peer's fell with the area of its table, from 12 x 20 to 9 x 18; computed, not run."""
    speed = {side: flops[side] / timing["median_seconds"][side] for side in SIDES}
    area = TABLE[0] * TABLE[1] / (PEER_PLANE[0] * PEER_PLANE[1])
    ratio = timing["ratio"]
    return {
        "flops": dict(flops),
        "flops_per_second": speed,
        "share_of_matmul_peak": {side: speed[side] / peak[side] for side in SIDES},
        "ratio_at_equal_flops": {name: value * flops["ours"] / flops["peer"] for name, value in ratio.items()},
        "ratio_if_peer_unpadded": {name: value * area for name, value in ratio.items()},
    }


def measure(sides: Mapping[str, Side], arguments: Any) -> dict[str, Any]:
    """Everything that the JSON file holds but where and when it was made."""
    settings = dict(parse_setting(text) for text in arguments.set)
    about = {"ours": sides["ours"].ask("setup", batch_size=BATCH, max_atoms_per_element=LEVELS, seed=arguments.seed,
                                       settings=settings)}  # fmt: skip
    about["peer"] = sides["peer"].ask(
        "setup", x_0=about["ours"].pop("x_0"), null=about["ours"].pop("null"), plane=PEER_PLANE,
        threads=about["ours"]["threads"], seed=arguments.seed,
    )  # fmt: skip
    flops = {side: sides[side].ask("flops") for side in SIDES}
    print(parts_table(about, flops))
    params_ratio = about["ours"]["num_params"] / about["peer"]["num_params"]
    if abs(params_ratio - 1) > PARAMS_TOLERANCE:
        print(f"note: ours has {params_ratio:.2f} times the peer's parameters, further off than {PARAMS_TOLERANCE:.0%}")
    peak = {
        side: {size: sides[side].ask("matmul", size=size, repeats=MATMUL_REPEATS) for size in MATMUL_SIZES}
        for side in SIDES
    }
    best = {side: max(peak[side].values()) for side in SIDES}
    print("matmul, GFLOP/s: " + ", ".join(f"{side} {best[side] / 1e9:.0f}" for side in SIDES))

    step_flops = {side: flops[side]["train_step"] for side in SIDES}
    forward = {side: sum(flops[side]["forward"].values()) for side in SIDES}
    k = arguments.sampling_steps
    warm_up(sides, "train")
    train = in_turn(sides, "train", arguments.pairs)
    warm_up(sides, "sample", num_steps=k)
    sample = in_turn(sides, "sample", arguments.pairs, num_steps=k)
    sampling = {
        "num_steps": k, **sample, **at_equal_flops(sample, {s: k * forward[s] for s in SIDES}, best),
        "seconds_of_256_steps": {s: FULL_STEPS / k * sample["median_seconds"][s] for s in SIDES},
        "extrapolated": k != FULL_STEPS,
    }  # fmt: skip
    if arguments.full and k != FULL_STEPS:
        sides["ours"].ask("sample", num_steps=FULL_STEPS)
        sampling["check_with_256_steps"] = in_turn(sides, "sample", 1, num_steps=FULL_STEPS)
    return {
        "work": {"batch_size": BATCH, "max_atoms_per_element": LEVELS, "table": TABLE, "peer_table": PEER_PLANE},
        "sides": about,
        "params_ratio": params_ratio,
        "flops": flops,
        "matmul_flops_per_second": peak,
        "train_step": {**train, **at_equal_flops(train, step_flops, best)},
        "sampling": sampling,
    }


def parse_setting(text: str) -> tuple[str, Any]:
    """("base_channels", 56) of "base_channels=56"."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set={text}: write --set=FIELD=VALUE, a field of config.model")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def parts_table(about: Mapping[str, Any], flops: Mapping[str, Any]) -> str:
    """Blocks, parameters and operations of both by part of the network, as a Markdown table."""
    columns = ("blocks, attentions", "M parameters", "forward, GFLOP")
    head = ["part", *(f"{side}: {column}" for side in SIDES for column in columns)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for title, parts in [*((part, (part,)) for part in GROUPS), ("all", GROUPS)]:
        cells = [title]
        for side in SIDES:
            one = about[side]
            amounts = (one["res_blocks"], one["attentions"], one["params"], flops[side]["forward"])
            blocks, attentions, params, forward = (sum(amount[part] for part in parts) for amount in amounts)
            cells += [f"{blocks}, {attentions}", f"{params / 1e6:.2f}", f"{forward / 1e9:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    steps = ", ".join(f"{side} {flops[side]['train_step'] / 1e9:.1f}" for side in SIDES)
    return "\n".join([*lines, "", f"Train step, GFLOP: {steps}."])


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.peer_unet3d", description=__doc__)
    p.add_argument("--peer_python", required=True, help="of an environment with imagen-pytorch 1.26.2")
    p.add_argument("--pairs", type=int, default=5, help="of each measurement, taken in turn")
    p.add_argument("--sampling_steps", type=int, default=16, help="timed a pair; 256 are told in proportion")
    p.add_argument("--full", type=ast.literal_eval, default=True, help="False leaves out the check with all 256 steps")
    p.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of our network; repeatable")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output", type=Path, default=Path("benchmarks/peer_unet3d.json"))
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = p.parse(words)
    if arguments.pairs < 1 or arguments.sampling_steps < 1:
        raise UserError(f"--pairs={arguments.pairs} --sampling_steps={arguments.sampling_steps}: give 1 or more")
    folder = Path(__file__).parent
    sides: dict[str, Side] = {}
    try:
        sides["peer"] = Side(
            [arguments.peer_python, str(folder / "peer_torch.py")],
            "--peer_python names the interpreter of an environment with `pip install imagen-pytorch==1.26.2`",
        )
        sides["ours"] = Side([sys.executable, "-m", "benchmarks.peer_jax"], "see --set, or report it")
        measured = measure(sides, arguments)
    finally:
        for side in sides.values():
            side.close()
    told = [word.replace(arguments.peer_python, "PYTHON") for word in words]  # where it lies is nobody's business
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.peer_unet3d", *told]),
        "commit": commit(), "seed": arguments.seed, "machine": machine(), **measured,
    }  # fmt: skip
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for title in ("train_step", "sampling"):
        one = result[title]
        ratio, equal, unpadded = (one[k]["median"] for k in ("ratio", "ratio_at_equal_flops", "ratio_if_peer_unpadded"))
        share, seconds = one["share_of_matmul_peak"], one["median_seconds"]
        print(
            f"{title}: {seconds['ours']:.3f} s against {seconds['peer']:.3f} s, {ratio:.2f} times the peer "
            f"({one['ratio']['min']:.2f} to {one['ratio']['max']:.2f}), "
            f"{equal:.2f} at equal FLOPs, {unpadded:.2f} if the peer's cost fell with the padding; "
            f"of the matmul peak: ours {share['ours']:.0%}, peer {share['peer']:.0%}"
        )
    print(f"written: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
