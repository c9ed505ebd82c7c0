"""The text of a compiled XLA module (`compiled.as_text()`) as computations, instructions and shapes.

Read are the parts that costs need; the format is that of XLA's HLO printer (https://openxla.org/xla/hlo_dumps).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
"""Types whose name does not say their size; others end in or contain their number of bits, as f32, f8e4m3fn, u16."""
HBM = 0
"""The memory space of a layout without S(n)."""

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([\w\-]+)\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape. `tile`: the layout's first tile, to whose multiples the minor dimensions are padded."""

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...]
    tile: tuple[int, ...]
    memory_space: int

    @property
    def bytes(self) -> int:
        """Without padding."""
        return math.prod(self.dims) * bits(self.dtype) // 8

    @property
    def padded_bytes(self) -> int:
        """As it lies in memory."""
        major_to_minor = [self.dims[i] for i in reversed(self.minor_to_major)] or list(self.dims)
        if not self.tile:
            return self.bytes
        missing = max(0, len(self.tile) - len(major_to_minor))
        padded = [1] * missing + major_to_minor
        for i, tile in enumerate(reversed(self.tile), start=1):
            padded[-i] = -(-padded[-i] // tile) * tile
        return math.prod(padded) * bits(self.dtype) // 8


def bits(dtype: str) -> int:
    if dtype in BITS:
        return BITS[dtype]
    match = re.match(r"[a-z]+(\d+)", dtype)
    return int(match[1]) if match else 0


@functools.lru_cache(maxsize=100_000)
def parse_shape(text: str) -> tuple[Array, ...]:
    """The arrays of a shape, those of a tuple in order, nested ones too."""
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(text):
        order, _, rest = layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", rest)
        space = re.search(r"S\((\d+)\)", rest)
        arrays.append(
            Array(
                dtype=dtype,
                dims=tuple(int(n.strip(" <=")) for n in dims.split(",") if n.strip(" <=")),
                minor_to_major=tuple(int(n) for n in order.split(",") if n),
                tile=tuple(map(int, tile[1].split(","))) if tile else (),
                memory_space=int(space[1]) if space else HBM,
            )
        )
    return tuple(arrays)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. `inside`: what stands between the brackets after the opcode; `rest`: all that follows them."""

    name: str
    shape_text: str
    opcode: str
    inside: str
    rest: str
    is_root: bool

    @property
    def shape(self) -> tuple[Array, ...]:
        return parse_shape(self.shape_text)

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions that it reads."""
        return tuple(_OPERAND.findall(self.inside))

    @functools.cached_property
    def attributes(self) -> str:
        """`rest` without the names of source lines and the compiler's notes."""
        return self.rest.partition(", metadata=")[0].partition(", backend_config=")[0]

    def called(self, *keys: str) -> list[str]:
        """Names of the computations that it calls under attributes as `calls=%a` or `branch_computations={%a, %b}`."""
        found = []
        for key in keys:
            match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
            if match:
                found += re.findall(r"%?([\w.\-]+)", match[1].strip("{}"))
        return found

    def numbers(self, key: str) -> tuple[int, ...]:
        """The numbers of an attribute `key={1,2}` or `key=1`; empty without it."""
        match = re.search(rf"\b{key}=(?:\{{([\d,]*)\}}|(\d+))", self.attributes)
        return tuple(int(n) for n in (match[1] or match[2] or "").split(",") if n) if match else ()


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next((i for i in self.instructions.values() if i.is_root), list(self.instructions.values())[-1])

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.inside): i for i in self.instructions.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions by the names of their operands."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in set(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: Computation
    num_partitions: int


def parse_module(text: str) -> Module:
    """Raises ValueError for a text without an ENTRY computation."""
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = Computation(header[2], {})
                computations[current.name] = current
                entry = current if header[1] else entry
        elif line.startswith("}"):
            current = None
        else:
            instruction = parse_instruction(line)
            if instruction:
                current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("no ENTRY computation: not the text of an HLO module")
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def parse_instruction(line: str) -> Instruction | None:
    start = _NAME.match(line)
    if not start:
        return None
    line = _COMMENT.sub("", line)
    at = start.end()
    shape_end = _closing(line, at) if line[at] == "(" else line.index(" ", at)
    opcode = _OPCODE.match(line, shape_end)
    if not opcode:
        return None
    end = _closing(line, opcode.end() - 1)
    return Instruction(
        name=start[2],
        shape_text=line[at:shape_end],
        opcode=opcode[1],
        inside=line[opcode.end() : end - 1],
        rest=line[end:],
        is_root=bool(start[1]),
    )


def _closing(line: str, start: int) -> int:
    """Where the bracket that opens at `start` has been closed."""
    depth = 0
    for match in re.compile(r"[()]").finditer(line, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"unbalanced brackets: {line[:200]}")


def operand_shapes(instruction: Instruction, computation: Computation) -> Iterator[tuple[Array, ...]]:
    for name in instruction.operands:
        if name in computation.instructions:
            yield computation.instructions[name].shape
