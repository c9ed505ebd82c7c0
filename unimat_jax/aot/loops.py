"""How often a compiled loop runs: XLA's own cost analysis counts a body once, whatever its number of rounds."""

from __future__ import annotations

import re
from typing import Any

from unimat_jax.aot.hlo import Computation, Instruction, Module

PASS_ON = ("copy", "bitcast", "reshape", "convert", "copy-done", "copy-start", "optimization-barrier")
"""Opcodes of one operand that leave a counter what it is."""


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Rounds of a `while` of `computation`, or None where they cannot be read.

    From the `known_trip_count` that XLA notes on CPU and GPU; else, as on TPU, from a counter in the carried tuple: a
    constant at the start, a constant added in the body, compared with a constant in the condition.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition, body = (module.computations[loop.called(key)[0]] for key in ("condition", "body"))
    first = computation.instructions[loop.operands[0]]

    def at_start(i: int) -> Any:
        return _trace(module, computation, first.operands[i]) if first.opcode == "tuple" else None

    def after_round(i: int) -> Any:
        return _trace(module, body, body.root.operands[i]) if body.root.opcode == "tuple" else None

    def constant(value: Any) -> int | None:
        """Of a constant, or of a carried element that starts as one and that no round changes."""
        match value:
            case ("constant", number):
                return number
            case ("carried", i) if after_round(i) == value:
                return constant(at_start(i))
        return None

    match _trace(module, condition, condition.root.name):
        case ("compare", direction, left, right):
            pass
        case _:
            return None
    mirrored = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}.get(direction, "")
    for order, counter, limit in ((direction, left, right), (mirrored, right, left)):
        match counter, after_round(counter[1]) if counter and counter[0] == "carried" else None:
            case ("carried", i), ("add", ("carried", j), step) | ("add", step, ("carried", j)) if i == j:
                return _rounds(constant(at_start(i)), constant(limit), constant(step), order)
    return None


def _rounds(begin: int | None, end: int | None, step: int | None, direction: str) -> int | None:
    """Of `i = begin; while i DIRECTION end: i += step`; None where it would not end or is not known."""
    if begin is None or end is None or not step:
        return None
    if direction == "NE":
        return (end - begin) // step if (end - begin) % step == 0 and (end - begin) // step >= 0 else None
    if (direction in ("LT", "LE")) != (step > 0) or direction not in ("LT", "LE", "GT", "GE"):
        return None
    end += (direction == "LE") - (direction == "GE")
    return max(0, -(-(end - begin) // step))


def _trace(module: Module, computation: Computation, name: str, given: tuple[Any, ...] | None = None) -> Any:
    """What a value is: ("constant", n), ("carried", i) of the loop's tuple, ("add" | "compare", ...) of such, or None.

    given: what the parameters of a fused or called computation are; None for a loop's own, whose parameter is the
    carried tuple.
    """
    instruction = computation.instructions.get(name)
    if instruction is None:
        return None
    opcode, operands = instruction.opcode, instruction.operands

    def inner(i: int) -> Any:
        return _trace(module, computation, operands[i], given)

    if opcode == "constant" and re.fullmatch(r"-?\d+", instruction.inside):
        return "constant", int(instruction.inside)
    if opcode == "parameter" and given is not None:
        return given[int(instruction.inside)]
    if opcode == "get-tuple-element":
        source = computation.instructions[operands[0]]
        if source.opcode == "parameter" and given is None:
            return "carried", instruction.numbers("index")[0]
    if opcode in PASS_ON and operands:
        return inner(0)
    if opcode == "add":
        return "add", inner(0), inner(1)
    if opcode == "compare":
        direction = re.search(r"direction=(\w+)", instruction.attributes)
        return "compare", direction[1] if direction else "", inner(0), inner(1)
    if opcode in ("fusion", "call"):
        called = module.computations[instruction.called("calls", "to_apply")[0]]
        return _trace(module, called, called.root.name, tuple(inner(i) for i in range(len(operands))))
    return None
