"""What one call of a compiled module costs a chip: matrix FLOPs, HBM traffic, collectives; loops times their rounds."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator

from unimat_jax.aot.hlo import HBM, Array, Computation, Instruction, Module, operand_shapes
from unimat_jax.aot.loops import trip_count
from unimat_jax.flops import meetings

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "optimization-barrier", "add-dependency", "domain",
}  # fmt: skip
"""Opcodes that move nothing."""
SLICES = ("dynamic-slice", "slice", "gather")
"""Of a large operand they read only what comes out."""


@dataclasses.dataclass
class Collective:
    """count: calls. bytes: of the larger of what goes in and what comes out on one chip. sent: bytes that leave a chip
    in a ring, 2 (n-1)/n of `bytes` for an all-reduce among n chips, (n-1)/n for the others, all for a permutation."""

    count: int = 0
    bytes: int = 0
    sent: float = 0.0


@dataclasses.dataclass
class Cost:
    """flops: of matrix products and convolutions, 2 a multiply-add, padding not counted. hbm_bytes: read and written at
    the borders of fusions, as the arrays lie in memory. seconds: each instruction at the peak FLOP/s or the HBM
    bandwidth, whichever takes longer, one after another; collectives not included. custom_calls: by target, their
    FLOPs unknown; custom_call_sites: places in the program. loops: rounds of each; unknown_loops: counted as one round.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    seconds: float = 0.0
    collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
    custom_calls: Counter[str] = dataclasses.field(default_factory=Counter)
    custom_call_sites: int = 0
    loops: list[int] = dataclasses.field(default_factory=list)
    unknown_loops: int = 0


def module_cost(module: Module, *, peak_flops: float, hbm_bandwidth: float) -> Cost:
    cost = Cost()
    begun: set[tuple[str, int]] = set()
    for instruction, computation, times in _executed(module, module.entry, 1, cost):
        flops = instruction_flops(instruction, computation, module)
        moved = traffic(instruction, computation, module)
        cost.flops += times * flops
        cost.hbm_bytes += times * moved
        cost.seconds += times * max(flops / peak_flops, moved / hbm_bandwidth)
        for collective, place in _collectives(instruction, computation, module):
            # One that overlaps with work stands in three fusions, where it starts, beside the work and where it ends.
            same = {(computation.name, channel) for channel in collective.numbers("channel_id")}
            if place is not computation and same & begun:
                continue
            begun |= same
            _add_collective(cost.collectives, collective, place, module, times)
        if instruction.opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
            cost.custom_call_sites += 1
            cost.custom_calls[target[1] if target else "?"] += times
    return cost


def _executed(
    module: Module, computation: Computation, times: int, cost: Cost
) -> Iterator[tuple[Instruction, Computation, int]]:
    """The instructions that run as kernels of their own, with how often; loops are noted in `cost`."""
    for instruction in computation.instructions.values():
        opcode = instruction.opcode
        if opcode == "while":
            rounds = trip_count(module, computation, instruction)
            if rounds is None:
                cost.unknown_loops += 1
            else:
                cost.loops.append(rounds)
            for name in instruction.called("body", "condition"):
                yield from _executed(module, module.computations[name], times * (1 if rounds is None else rounds), cost)
        elif opcode in ("call", "async-start"):
            for name in instruction.called("calls", "to_apply", "called_computations"):
                yield from _executed(module, module.computations[name], times, cost)
        elif opcode == "conditional":
            names = instruction.called("branch_computations", "true_computation", "false_computation")
            branches = [list(_executed(module, module.computations[name], times, cost)) for name in names]
            yield from max(branches, key=lambda b: sum(t * instruction_flops(i, c, module) for i, c, t in b))
        elif opcode not in FREE and not opcode.endswith(("-done", "-update")):
            yield instruction, computation, times


def instruction_flops(instruction: Instruction, computation: Computation, module: Module) -> int:
    """Of a dot, a convolution, or a fusion of such."""
    if instruction.opcode == "fusion":
        called = module.computations[instruction.called("calls")[0]]
        return sum(instruction_flops(inner, called, module) for inner in called.instructions.values())
    if instruction.opcode == "dot":
        lhs = next(operand_shapes(instruction, computation))[0]
        contracted = math.prod(lhs.dims[i] for i in instruction.numbers("lhs_contracting_dims"))
        return 2 * math.prod(instruction.shape[0].dims) * contracted
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    return 0


def _convolution_flops(instruction: Instruction, computation: Computation) -> int:
    lhs, rhs = (shape[0].dims for shape in list(operand_shapes(instruction, computation))[:2])
    out = instruction.shape[0].dims
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels, instruction.attributes
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}

    def field(key: str, axis: int, default: int = 1) -> int:
        return int(fields[key].split("x")[axis].split("_")[0]) if key in fields else default

    # The kernel holds the channels of one group: groups of channels and of the batch need no more than this.
    products = out[labels[3].index("b")] * out[labels[3].index("f")] * rhs[labels[2].index("i")]
    for axis in range(len(lhs) - 2):
        size, kernel, length = (
            a[name.index(str(axis))] for a, name in zip((lhs, rhs, out), labels.groups(), strict=True)
        )
        stride, before, holes = field("stride", axis), field("pad", axis, 0), field("lhs_dilate", axis)
        products *= meetings(size, kernel, length, stride, before, holes, field("rhs_dilate", axis))
    return 2 * products


def traffic(instruction: Instruction, computation: Computation, module: Module) -> int:
    """Bytes of HBM that an instruction reads and writes. What lies in the chip's own memories moves none."""
    opcode = instruction.opcode
    operands = list(operand_shapes(instruction, computation))
    if opcode in SLICES:
        return 2 * _bytes(instruction.shape)
    if opcode == "dynamic-update-slice":  # in place
        return 2 * _bytes(operands[1]) if _bytes(operands[0]) else 0
    if opcode == "fusion":
        called = module.computations[instruction.called("calls")[0]]
        # What a collective under way writes passes through the fusions beside it.
        passed = re.search(r"output_to_operand_aliasing=\{(.*?)\)\}", instruction.attributes)
        pairs = re.findall(r"\{(\d*)\}: \((\d+),", passed[1]) if passed else []
        inputs, outputs = {int(i) for _, i in pairs}, {int(o or 0) for o, _ in pairs}
        read = [_read(called, called.parameters[i].name, module) for i in range(len(operands)) if i not in inputs]
        return sum(read) + _written(called, called.root, module, outputs)
    read = sum(map(_bytes, operands))
    if opcode == "copy-start":
        return read + _bytes(instruction.shape[:1])
    if opcode.endswith("-start") and opcode != "all-reduce-start":
        # (operands, results, flags)
        number = sum(map(len, operands))
        return read + _bytes(instruction.shape[number : 2 * number])
    return read + _bytes(instruction.shape)


def _bytes(arrays: tuple[Array, ...]) -> int:
    return sum(array.padded_bytes for array in arrays if array.memory_space == HBM)


def _read(computation: Computation, name: str, module: Module) -> int:
    """Bytes of a value that its users in a fused computation read: all, unless all of them take slices."""
    whole = _bytes(computation.instructions[name].shape)
    total = 0
    for user in computation.users.get(name, []) if whole else []:
        first = user.operands[0] == name
        if user.opcode in SLICES and first:
            # What comes out of a slice lives in the kernel, so its space says nothing.
            total += sum(array.padded_bytes for array in user.shape)
        elif user.opcode == "fusion":
            called = module.computations[user.called("calls")[0]]
            places = [i for i, operand in enumerate(user.operands) if operand == name]
            total += sum(_read(called, called.parameters[i].name, module) for i in places)
        elif user.opcode == "bitcast":
            total += _read(computation, user.name, module)
        elif not (user.opcode == "dynamic-update-slice" and first):
            return whole
    return min(whole, total)


def _written(computation: Computation, root: Instruction, module: Module, passed: Collection[int] = frozenset()) -> int:
    """Bytes that a fused computation writes: of an update in place, the update. passed: its outputs that are inputs."""
    operands = [computation.instructions[name] for name in root.operands]
    if root.opcode == "tuple":
        return sum(_written(computation, o, module) for i, o in enumerate(operands) if i not in passed)
    if passed:
        return 0
    whole = _bytes(root.shape)
    if root.opcode == "dynamic-update-slice" and whole:
        return min(whole, sum(array.padded_bytes for array in operands[1].shape))
    if root.opcode == "bitcast" and whole and operands[0].opcode in ("dynamic-update-slice", "fusion"):
        return min(whole, _written(computation, operands[0], module))
    if root.opcode == "fusion" and whole:
        called = module.computations[root.called("calls")[0]]
        return min(whole, _written(called, called.root, module))
    return whole


def _collectives(
    instruction: Instruction, computation: Computation, module: Module
) -> Iterator[tuple[Instruction, Computation]]:
    """The instruction if it is a collective, and those within a fusion."""
    if instruction.opcode.removesuffix("-start") in COLLECTIVES:
        yield instruction, computation
    elif instruction.opcode == "fusion":
        called = module.computations[instruction.called("calls")[0]]
        for inner in called.instructions.values():
            yield from _collectives(inner, called, module)


def _add_collective(
    found: dict[str, Collective], instruction: Instruction, computation: Computation, module: Module, times: int
) -> None:
    members = group_size(instruction, module.num_partitions)
    if members == 1:
        return
    operands = [array for shape in operand_shapes(instruction, computation) for array in shape]
    results = instruction.shape
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        results = results[len(operands) : 2 * len(operands)]
    kind = instruction.opcode.removesuffix("-start")
    if computation.name.startswith("all-reduce-scatter"):  # the TPU compiler's name for a fusion with a slice
        kind = "reduce-scatter"
    size = max(sum(array.bytes for array in operands), sum(array.bytes for array in results))
    share = (members - 1) / members
    factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
    total = found.setdefault(kind, Collective())
    total.count += times
    total.bytes += times * size
    total.sent += times * size * factor


def group_size(instruction: Instruction, num_partitions: int) -> int:
    """Chips that take part in one group of a collective: replica_groups={{0,1},{2,3}}, [4,2]<=[8], or by the axes of a
    mesh, mesh['a'=4,'b'=2] {'b'}. Without groups, all chips."""
    if instruction.opcode.startswith("collective-permute"):
        return num_partitions
    by_mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", instruction.attributes)
    if by_mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", by_mesh[1])}
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", by_mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", instruction.attributes)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", instruction.attributes)
    return len(listed[1].split(",")) if listed and listed[1] else num_partitions
