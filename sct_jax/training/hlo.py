"""The text of a module of HLO, as XLA prints it: what computes a value, and how often.

`Module.parse` reads `compiled.as_text()`. Only what other modules need is understood.
"""

import collections
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# The same numbers in another order, or some of them.
VIEWS = frozenset("bitcast copy dynamic-slice reshape slice transpose".split())

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # other types have them in their name
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")
_METADATA = re.compile(r'metadata=\{(?:[^{}"]|"(?:[^"\\]|\\.)*"|\{[^{}]*\})*\}')
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_PARTITIONS = re.compile(r"HloModule .*\bnum_partitions=(\d+)")
_ARRAY = re.compile(r"(\w+)\[([^\]]*)\]")


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: unique in the module.
      shape: of the result.
      opcode: what it does.
      operands: names of the instructions that it reads.
      literal: what the parentheses hold: a constant, or the number of a parameter.
      attributes: what follows the parentheses, without `metadata`.
      source: the operation of the program that it comes from.
    """

    name: str
    shape: str
    opcode: str
    operands: list[str]
    literal: str
    attributes: str
    source: str

    def called(self, *names: str) -> list[str]:
        """Returns the computations that attributes of these names refer to."""
        found: list[str] = []
        for name in names:
            for listed in re.findall(
                rf"\b{name}=(%[\w.-]+|\{{[^}}]*\}})", self.attributes
            ):
                found += re.findall(r"%([\w.-]+)", listed)
        return found

    @property
    def index(self) -> int:
        """Which element of a tuple a get-tuple-element reads."""
        return int(re.findall(r"\bindex=(\d+)", self.attributes)[0])

    @property
    def constant(self) -> int | None:
        """The value of an integer constant; None for all else."""
        is_integer = re.fullmatch(r"-?\d+", self.literal)
        return int(self.literal) if self.opcode == "constant" and is_integer else None


class Computation(NamedTuple):
    """A function of a module.

    Attributes:
      name: unique in the module.
      instructions: by name, in the order of execution.
      root: name of the instruction that it returns.
      users: name of an instruction -> those that read it.
    """

    name: str
    instructions: dict[str, Instruction]
    root: str
    users: dict[str, list[Instruction]]

    def parameter(self, number: int) -> Instruction:
        """Returns a parameter."""
        return next(
            i
            for i in self.instructions.values()
            if i.opcode == "parameter" and i.literal == str(number)
        )


class Value(NamedTuple):
    """An instruction in a computation, and what a fusion passes to that computation."""

    computation: Computation
    instruction: Instruction
    arguments: "tuple[Value, ...]" = ()


class Module(NamedTuple):
    """A program.

    Attributes:
      computations: by name.
      entry: where it begins.
      num_devices: devices that run it together.
    """

    computations: dict[str, Computation]
    entry: Computation
    num_devices: int

    @classmethod
    def parse(cls, text: str) -> "Module":
        """Returns the module of a text.

        Raises:
          ValueError: if the text is no module of HLO.
        """
        computations: dict[str, Computation] = {}
        entry = current = None
        is_entry = False
        for line in text.splitlines():
            if header := _HEADER.match(line):
                users = collections.defaultdict(list)
                current = Computation(header[2], {}, "", users)
                is_entry = bool(header[1])
            elif line.startswith("}") and current:
                computations[current.name] = current
                entry = current if is_entry else entry
                current = None
            elif current and (start := _NAME.match(line)):
                instruction = _instruction(start[2], line[start.end() :])
                current.instructions[instruction.name] = instruction
                for operand in set(instruction.operands):
                    current.users[operand].append(instruction)
                if start[1]:
                    current = current._replace(root=instruction.name)
        if entry is None:
            raise ValueError("not a module of HLO: it has no ENTRY computation")
        partitions = _PARTITIONS.match(text)
        return cls(computations, entry, int(partitions[1]) if partitions else 1)

    def define(
        self,
        computation: Computation,
        name: str,
        arguments: tuple[Value, ...] = (),
        *,
        through: frozenset[str] = frozenset(("bitcast", "copy")),
    ) -> Value:
        """Returns what computes a value, inside fusions and behind views.

        Args:
          computation: where the value is.
          name: of its instruction.
          arguments: what the computation is called with, if that is known.
          through: operations to look behind.
        """
        instruction = computation.instructions[name]
        value = Value(computation, instruction, arguments)
        again = lambda name: self.define(computation, name, arguments, through=through)
        if instruction.opcode in through:
            return again(instruction.operands[0])
        if instruction.opcode == "fusion":
            (callee,) = instruction.called("calls")
            inner = self.computations[callee]
            passed = tuple(again(operand) for operand in instruction.operands)
            return self.define(inner, inner.root, passed, through=through)
        if instruction.opcode == "parameter" and arguments:
            return arguments[int(instruction.literal)]
        if instruction.opcode == "get-tuple-element":
            (source,) = instruction.operands
            return self._element(again(source), instruction.index) or value
        return value

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """Returns how often the body of a loop runs; None if the text does not say.

        It is the number that XLA found, or else the one by a condition that compares a
        counter with a constant.

        Args:
          computation: where the loop is.
          loop: a "while".
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known[1])
        (condition,), (body,) = loop.called("condition"), loop.called("body")
        ends = self._root(condition)
        if (
            ends.instruction.opcode != "compare"
            or "direction=LT" not in ends.instruction.attributes
        ):
            return None
        counter, limit = self._operands(ends)
        index = _index_in_state(counter)
        if index is None:
            return None
        before = self._element(self.define(computation, loop.operands[0]), index)
        after = self._element(self._root(body), index)
        if before is None or after is None or after.instruction.opcode != "add":
            return None
        changes = self._operands(after)
        steps = [v.instruction.constant for v in changes]
        step = next((s for s in steps if s is not None and s > 0), None)
        begin, end = before.instruction.constant, limit.instruction.constant
        counts = index in [_index_in_state(v) for v in changes]
        if not counts or step is None or begin is None or end is None:
            return None
        return max(0, -(-(end - begin) // step))

    def _root(self, name: str) -> Value:
        computation = self.computations[name]
        return self.define(computation, computation.root)

    def _operands(self, value: Value) -> list[Value]:
        return [
            self.define(value.computation, name, value.arguments)
            for name in value.instruction.operands
        ]

    def _element(self, whole: Value, index: int) -> Value | None:
        if whole.instruction.opcode != "tuple":
            return None
        name = whole.instruction.operands[index]
        return self.define(whole.computation, name, whole.arguments)


def _index_in_state(value: Value) -> int | None:
    """Which element of a loop's state a value is."""
    if value.instruction.opcode != "get-tuple-element":
        return None
    (source,) = value.instruction.operands
    is_state = value.computation.instructions[source].opcode == "parameter"
    return value.instruction.index if is_state else None


def _instruction(name: str, line: str) -> Instruction:
    end = _closing(line, 0) + 1 if line.startswith("(") else line.index(" ")
    shape, rest = line[:end], line[end:].lstrip()
    begin = rest.index("(")
    close = _closing(rest, begin)
    inside, attributes = rest[begin + 1 : close], rest[close + 1 :]
    metadata = _METADATA.search(attributes)
    source = _OP_NAME.search(metadata[0]) if metadata else None
    return Instruction(
        name=name,
        shape=shape,
        opcode=rest[:begin],
        operands=re.findall(r"%([\w.-]+)", inside),
        literal=inside,
        attributes=_METADATA.sub("", attributes),
        source=source[1] if source else "",
    )


def _closing(text: str, begin: int) -> int:
    """Where the parenthesis closes that opens at `begin`."""
    depth = 0
    for found in re.finditer(r'[()]|"(?:[^"\\]|\\.)*"', text[begin:]):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if not depth:
            return begin + found.start()
    raise ValueError(f"not an instruction of HLO: {text[:80]!r}")


def arrays(shape: str) -> list[tuple[str, int]]:
    """Returns element type and number of elements of every array of a shape."""
    return [
        (kind, math.prod(int(size) for size in re.findall(r"\d+", sizes)))
        for kind, sizes in _ARRAY.findall(shape)
    ]


def num_bytes(kind: str, size: int) -> int:
    """Returns the bytes of `size` elements of a type."""
    if kind in _BITS:
        bits = _BITS[kind]
    else:
        digits = re.search(r"\d+", kind)
        if digits is None:
            raise ValueError(f"unknown element type {kind!r}")
        bits = int(digits[0])
    return -(-bits * size // 8)


# --- The groups.


def device_groups(attributes: str, num_devices: int) -> list[list[int]]:
    """Returns the devices of every group that exchanges data.

    Args:
      attributes: of a collective.
      num_devices: of the program; all of them are one group where none is named.
    """
    pairs = re.search(r"source_target_pairs=\{([^=]*)\}", attributes)
    if pairs:
        return _listed(pairs[1])
    found = re.search(r"replica_groups=(\{|mesh|\[)", attributes)
    if found is None:
        return [list(range(num_devices))]
    text = attributes[found.start(1) :]
    if text.startswith("mesh"):
        return _of_mesh_axes(text)
    if text.startswith("["):
        return _iota(text).tolist()
    return _listed(text[1 : text.index("}}") + 1] if text[1] == "{" else "") or [
        list(range(num_devices))
    ]


def _listed(text: str) -> list[list[int]]:
    """{0,1},{2,3}."""
    return [
        [int(device) for device in re.findall(r"\d+", group)]
        for group in re.findall(r"\{([^{}]*)\}", text)
    ]


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _iota(text: str) -> np.ndarray:
    """[4,2]<=[2,4]T(1,0): devices 0..7 as (2, 4), transposed, as (4, 2)."""
    found = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        raise ValueError(f"unknown replica groups {text[:80]!r}")
    shape, sizes = _integers(found[1]), _integers(found[2])
    return _transposed_iota(sizes, found[3]).reshape(shape)


def _transposed_iota(sizes: Sequence[int], order: str | None) -> np.ndarray:
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    return devices.transpose(_integers(order)) if order else devices


def _of_mesh_axes(text: str) -> list[list[int]]:
    """mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a','b':(2)2}: groups along axes.

    The mesh is one of the compiler. Its devices are in order unless `device_ids` says
    otherwise. 'b':(2)2 is the part of size 2 of axis b that has 2 before it.
    """
    found = re.match(
        r"mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))? \{([^}]*)\}", text
    )
    if found is None:
        raise ValueError(f"unknown replica groups {text[:80]!r}")
    sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", found[1])}
    order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", found[2] or "")
    if order:
        devices = _transposed_iota(_integers(order[1]), order[2])
    elif found[2]:
        devices = np.array(_integers(found[2]))
    else:
        devices = np.arange(math.prod(sizes.values()))
    wanted = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(
            r"'?(\w+)'?(?::\((\d+)\)(\d+))?'?", found[3]
        )
    }
    split: list[int] = []
    grouped: list[int] = []
    for name, size in sizes.items():
        before, inner = wanted.get(name, (size, 1))
        grouped.append(len(split) + 1)
        split += [before, inner, size // before // inner]
    others = [i for i in range(len(split)) if i not in grouped]
    group_size = math.prod(split[i] for i in grouped)
    devices = devices.reshape(split).transpose(others + grouped)
    return devices.reshape(-1, group_size).tolist()
