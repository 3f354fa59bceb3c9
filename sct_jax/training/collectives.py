"""The collectives of a compiled program, read from its text.

    compiled = jax.jit(step).lower(*arguments).compile()
    found = collectives.read(compiled.as_text(), mesh)
    totals = collectives.totals(collectives.least(found))

Bytes are those of one device. Of one execution,

- payload is the array that the operation is about: the larger one of what a device puts
  in and gets out. N bytes of gradients in an all-reduce, or the N gathered bytes of a
  parameter, are a payload of N.
- wire is what each device sends along a ring of the n devices of its group: 2 (n-1)/n
  of the payload for an all-reduce, (n-1)/n for an all-gather, a reduce-scatter or an
  all-to-all, all of it for a permutation.

The text does not say which branch of a conditional runs, nor how often a loop runs
whose end depends on data. `read` lists all of them and says where they are; `least` and
`most` bound what one call of the program executes.

The text is that of the backend that compiled it. XLA for CPUs has no collectives in 16
bits: it converts to float32 and back. Where both conversions are there, arrays count in
the type of the program, and `compiled_bytes` has the bytes after conversion. It also
has no pass that makes a reduce-scatter of an all-reduce whose result is sliced; see
`Collective.is_sliced`.

References:
  Thakur et al., Optimization of Collective Communication Operations in MPICH, 2005,
  section 4 (bytes on a ring)
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import AbstractMesh, Mesh

# kind -> wire bytes over payload, from the number of devices in a group.
_RING: Mapping[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}
KINDS = tuple(_RING)

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # others have them in their name
# The same numbers in another order, or some of them.
_VIEWS = frozenset("bitcast copy dynamic-slice reshape slice transpose".split())


class Branch(NamedTuple):
    """A branch of a conditional.

    Attributes:
      conditional: name of the instruction.
      index: which of its branches.
    """

    conditional: str
    index: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One instruction of a program; a variadic one counts once.

    Attributes:
      name: of the instruction.
      kind: one of `KINDS`, whether it is asynchronous or not.
      element_type: of its arrays in the program, as HLO names it; several are joined
        by "+".
      operand_bytes: what a device puts in.
      compiled_bytes: the same in the types of the compiled instruction.
      axes: mesh axes along which the devices of a group differ.
      group_size: devices in a group; of a permutation 2.
      count: executions in one call of the program, those in loops of unknown length
        per iteration.
      loops: where the loops of unknown length are that it is in, outermost first.
      branches: the branches that it is in, outermost first.
      is_sliced: whether it is an all-reduce of which every device reads a part by its
        own position. Compilers for accelerators make it a reduce-scatter, which sends
        half of the bytes.
      source: the operation of the program that it comes from.
    """

    name: str
    kind: str
    element_type: str
    operand_bytes: int
    compiled_bytes: int
    axes: tuple[str, ...]
    group_size: int
    count: int = 1
    loops: tuple[str, ...] = ()
    branches: tuple[Branch, ...] = ()
    is_sliced: bool = False
    source: str = ""

    @property
    def result_bytes(self) -> int:
        """What a device gets out."""
        if self.kind == "all-gather":
            return self.operand_bytes * self.group_size
        if self.kind == "reduce-scatter":
            return self.operand_bytes // self.group_size
        return self.operand_bytes

    @property
    def payload_bytes(self) -> int:
        """The larger one of what a device puts in and gets out, of one execution."""
        return max(self.operand_bytes, self.result_bytes)

    @property
    def wire_bytes(self) -> float:
        """What a device sends along a ring, of one execution."""
        return self.payload_bytes * _RING[self.kind](self.group_size)


class Total(NamedTuple):
    """Sums over collectives and their executions, per device.

    Attributes:
      count: executions.
      payload_bytes: see the module.
      wire_bytes: likewise.
    """

    count: int
    payload_bytes: int
    wire_bytes: float


def total(found: Collection[Collective]) -> Total:
    """Returns the sums over all collectives."""
    return Total(
        sum(c.count for c in found),
        sum(c.count * c.payload_bytes for c in found),
        sum(c.count * c.wire_bytes for c in found),
    )


def totals(
    found: Collection[Collective],
) -> dict[tuple[str, tuple[str, ...]], Total]:
    """Returns (kind, axes) -> sums; the most wire bytes come first."""
    groups = collections.defaultdict(list)
    for c in found:
        groups[c.kind, c.axes].append(c)
    sums = {key: total(group) for key, group in groups.items()}
    return dict(sorted(sums.items(), key=lambda item: -item[1].wire_bytes))


def most(found: Collection[Collective]) -> list[Collective]:
    """Returns the collectives of the costliest call.

    Of every conditional it keeps the branch with the most wire bytes. A loop of unknown
    length counts as one iteration, so this is an upper bound only without such loops.
    """
    return _choose(list(found), 0, max)


def least(found: Collection[Collective]) -> list[Collective]:
    """Returns the collectives of the cheapest call, which every call executes.

    Of every conditional it keeps the branch with the least wire bytes. Loops of unknown
    length are not entered.
    """
    return _choose([c for c in found if not c.loops], 0, min)


def _choose(
    found: list[Collective], depth: int, best: Callable[..., list[Collective]]
) -> list[Collective]:
    """The collectives, with one branch of each conditional at this depth or below."""
    kept = [c for c in found if len(c.branches) <= depth]
    deeper = collections.defaultdict(lambda: collections.defaultdict(list))
    for c in found:
        if len(c.branches) > depth:
            branch = c.branches[depth]
            deeper[branch.conditional][branch.index].append(c)
    for branches in deeper.values():
        options = [_choose(branch, depth + 1, best) for branch in branches.values()]
        if len(branches) < 2:  # the other branches have no collectives
            options.append([])
        kept += best(options, key=lambda branch: total(branch).wire_bytes)
    return kept


def read(text: str, mesh: Mesh | AbstractMesh) -> list[Collective]:
    """Returns all collectives of a compiled program that move data between devices.

    Walks fusions, calls, asynchronous computations, conditionals and loops from the
    entry on. A loop multiplies the count of its body by its trip count: the one that
    XLA found, or the one that its condition says if that compares a counter with a
    constant. The condition of a loop runs once more than the body.

    Args:
      text: `compiled.as_text()` of a program over all devices of the mesh. Device ids
        in it are positions in `mesh.devices.flat`, as in all that `jax.jit` compiles.
      mesh: names the axes.

    Raises:
      ValueError: if the text is no module of HLO, or of another number of devices.
    """
    return list(_Reader(text, mesh).walk())


# --- The text.


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: list[str]
    literal: str  # what is in the parentheses, for constants and parameters
    attributes: str
    source: str

    def called(self, *names: str) -> list[str]:
        """The computations that attributes of these names refer to."""
        found: list[str] = []
        for name in names:
            for listed in re.findall(
                rf"\b{name}=(%[\w.-]+|\{{[^}}]*\}})", self.attributes
            ):
                found += re.findall(r"%([\w.-]+)", listed)
        return found


class _Computation(NamedTuple):
    name: str
    instructions: dict[str, _Instruction]
    root: str
    users: dict[str, list[_Instruction]]

    def parameter(self, number: int) -> str:
        return next(
            i.name
            for i in self.instructions.values()
            if i.opcode == "parameter" and i.literal == str(number)
        )


class _Value(NamedTuple):
    """An instruction in a computation, and what the caller passes to that."""

    computation: _Computation
    instruction: _Instruction
    arguments: "tuple[_Value, ...]" = ()


_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")
_METADATA = re.compile(r'metadata=\{(?:[^{}"]|"(?:[^"\\]|\\.)*"|\{[^{}]*\})*\}')
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_ARRAY = re.compile(r"(\w+)\[([^\]]*)\]")


def _parse(text: str) -> tuple[dict[str, _Computation], _Computation]:
    """The computations of a module by name, and its entry."""
    computations: dict[str, _Computation] = {}
    entry = current = None
    is_entry = False
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = _Computation(header[2], {}, "", collections.defaultdict(list))
            is_entry = bool(header[1])
        elif line.startswith("}") and current:
            computations[current.name] = current
            entry = current if is_entry else entry
            current = None
        elif current and (start := _NAME.match(line)):
            instruction = _parse_instruction(start[2], line[start.end() :])
            current.instructions[instruction.name] = instruction
            for operand in set(instruction.operands):
                current.users[operand].append(instruction)
            if start[1]:
                current = current._replace(root=instruction.name)
    if entry is None:
        raise ValueError("not the text of an HLO module: it has no ENTRY computation")
    return computations, entry


def _parse_instruction(name: str, line: str) -> _Instruction:
    end = _closing(line, 0) + 1 if line.startswith("(") else line.index(" ")
    shape, rest = line[:end], line[end:].lstrip()
    begin = rest.index("(")
    close = _closing(rest, begin)
    inside, attributes = rest[begin + 1 : close], rest[close + 1 :]
    metadata = _METADATA.search(attributes)
    source = _OP_NAME.search(metadata[0]) if metadata else None
    return _Instruction(
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


def _arrays(shape: str) -> list[tuple[str, int]]:
    """Element type and number of elements of every array of a shape."""
    return [
        (kind, math.prod(int(size) for size in re.findall(r"\d+", sizes)))
        for kind, sizes in _ARRAY.findall(shape)
    ]


def _num_bytes(kind: str, size: int) -> int:
    if kind in _BITS:
        bits = _BITS[kind]
    else:
        digits = re.search(r"\d+", kind)
        if digits is None:
            raise ValueError(f"unknown element type {kind!r}")
        bits = int(digits[0])
    return -(-bits * size // 8)


# --- The groups.


def _groups(attributes: str, num_devices: int) -> list[list[int]]:
    """The devices of every group that exchanges data."""
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


# --- The walk.


class _Reader:
    """Collectives of one module."""

    def __init__(self, text: str, mesh: Mesh | AbstractMesh):
        self._computations, self._entry = _parse(text)
        self._axes = tuple(mesh.axis_names)
        self._sizes = tuple(mesh.shape[name] for name in self._axes)
        header = re.match(r"HloModule .*\bnum_partitions=(\d+)", text)
        num_devices = int(header[1]) if header else 1
        if num_devices != math.prod(self._sizes):
            raise ValueError(
                f"the program is for {num_devices} devices, and the mesh has "
                f"{math.prod(self._sizes)}"
            )

    def walk(self) -> Iterator[Collective]:
        """Yields the collectives of the module."""
        yield from self._walk(self._entry, 1, (), ())

    def _walk(
        self,
        computation: _Computation,
        count: int,
        loops: tuple[str, ...],
        branches: tuple[Branch, ...],
    ) -> Iterator[Collective]:
        for instruction in computation.instructions.values():
            opcode = instruction.opcode
            kind = opcode.removesuffix("-start")
            if kind in _RING:
                found = self._collective(computation, instruction, kind)
                if found is not None:
                    yield dataclasses.replace(
                        found, count=count, loops=loops, branches=branches
                    )
            elif opcode == "while":
                (body,) = instruction.called("body")
                trips = self._trip_count(computation, instruction)
                unknown = () if trips is not None else (instruction.source or "while",)
                (condition,) = instruction.called("condition")
                for name, extra in ((body, 0), (condition, 1)):
                    yield from self._walk(
                        self._computations[name],
                        count * (1 if trips is None else trips + extra),
                        loops + unknown,
                        branches,
                    )
            elif opcode == "conditional":
                called = instruction.called(
                    "branch_computations", "true_computation", "false_computation"
                )
                for index, name in enumerate(called):
                    branch = Branch(instruction.name, index)
                    yield from self._walk(
                        self._computations[name], count, loops, (*branches, branch)
                    )
            elif opcode in ("call", "fusion", "async-start", "custom-call"):
                for name in instruction.called(
                    "calls", "to_apply", "called_computations"
                ):
                    yield from self._walk(
                        self._computations[name], count, loops, branches
                    )

    def _collective(
        self, computation: _Computation, instruction: _Instruction, kind: str
    ) -> Collective | None:
        groups = _groups(instruction.attributes, math.prod(self._sizes))
        positions = np.stack(
            np.unravel_index(np.concatenate(groups), self._sizes), axis=-1
        )
        bounds = list(itertools.accumulate(map(len, groups), initial=0))
        axes = tuple(
            name
            for index, name in enumerate(self._axes)
            if any(
                np.ptp(positions[begin:end, index])
                for begin, end in itertools.pairwise(bounds)
            )
        )
        if not axes:  # every device by itself
            return None
        kinds: dict[str, None] = {}
        operand_bytes = compiled_bytes = 0
        for index, operand in enumerate(instruction.operands):
            for compiled, size in _arrays(computation.instructions[operand].shape):
                element = self._program_type(computation, instruction, index, compiled)
                kinds[element] = None
                operand_bytes += _num_bytes(element, size)
                compiled_bytes += _num_bytes(compiled, size)
        return Collective(
            name=instruction.name,
            kind=kind,
            element_type="+".join(kinds),
            operand_bytes=operand_bytes,
            compiled_bytes=compiled_bytes,
            axes=axes,
            group_size=max(map(len, groups)),
            is_sliced=kind == "all-reduce"
            and self._is_sliced(computation, instruction),
            source=instruction.source,
        )

    # --- Loops.

    def _trip_count(self, computation: _Computation, loop: _Instruction) -> int | None:
        """How often the body of a loop runs; None if the text does not say."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known[1])
        (condition,), (body,) = loop.called("condition"), loop.called("body")
        ends = self._root(self._computations[condition])
        if (
            ends.instruction.opcode != "compare"
            or "direction=LT" not in ends.instruction.attributes
        ):
            return None
        counter, limit = self._operands(ends)
        index = self._index_in_state(counter)
        if index is None:
            return None
        before = self._element(self._define(computation, loop.operands[0]), index)
        after = self._element(self._root(self._computations[body]), index)
        if before is None or after is None or after.instruction.opcode != "add":
            return None
        changes = self._operands(after)
        steps = [_constant(v) for v in changes if _constant(v) is not None]
        carried = [self._index_in_state(v) for v in changes]
        begin, end = _constant(before), _constant(limit)
        if index not in carried or len(steps) != 1 or begin is None or end is None:
            return None
        (step,) = steps
        return max(0, -(-(end - begin) // step)) if step and step > 0 else None

    def _root(self, computation: _Computation) -> _Value:
        return self._define(computation, computation.root)

    def _define(
        self,
        computation: _Computation,
        name: str,
        arguments: tuple[_Value, ...] = (),
        *,
        through: frozenset[str] = frozenset(("bitcast", "copy")),
    ) -> _Value:
        """The instruction that computes a value, inside fusions and through views."""
        instruction = computation.instructions[name]
        value = _Value(computation, instruction, arguments)
        if instruction.opcode in through:
            return self._define(
                computation, instruction.operands[0], arguments, through=through
            )
        if instruction.opcode == "fusion":
            (callee,) = instruction.called("calls")
            passed = tuple(
                self._define(computation, operand, arguments, through=through)
                for operand in instruction.operands
            )
            inner = self._computations[callee]
            return self._define(inner, inner.root, passed, through=through)
        if instruction.opcode == "parameter" and arguments:
            return arguments[int(instruction.literal)]
        if instruction.opcode == "get-tuple-element":
            (source,) = instruction.operands
            whole = self._define(computation, source, arguments, through=through)
            return self._element(whole, _tuple_index(instruction)) or value
        return value

    def _operands(self, value: _Value) -> list[_Value]:
        return [
            self._define(value.computation, name, value.arguments)
            for name in value.instruction.operands
        ]

    def _element(self, whole: _Value, index: int) -> _Value | None:
        if whole.instruction.opcode != "tuple":
            return None
        name = whole.instruction.operands[index]
        return self._define(whole.computation, name, whole.arguments)

    @staticmethod
    def _index_in_state(value: _Value) -> int | None:
        """Which element of a loop's state a value is."""
        if value.instruction.opcode != "get-tuple-element":
            return None
        (source,) = value.instruction.operands
        if value.computation.instructions[source].opcode != "parameter":
            return None
        return _tuple_index(value.instruction)

    # --- Types.

    def _program_type(
        self,
        computation: _Computation,
        instruction: _Instruction,
        index: int,
        compiled: str,
    ) -> str:
        """The element type of an operand before the compiler widened it.

        That is the type which the operand is converted from, if all that reads the
        result converts it to the same.
        """
        value = self._define(computation, instruction.operands[index], through=_VIEWS)
        if value.instruction.opcode != "convert":
            return compiled
        (source,) = value.instruction.operands
        ((narrow, _),) = _arrays(value.computation.instructions[source].shape)
        if _num_bytes(narrow, 8) >= _num_bytes(compiled, 8):
            return compiled
        element = index if len(instruction.operands) > 1 else None
        read_as = self._read_as(computation, instruction, element)
        return narrow if read_as == {narrow} else compiled

    def _read_as(
        self, computation: _Computation, value: _Instruction, element: int | None
    ) -> set[str]:
        """The types to which all that reads a value converts it; "" for other uses.

        Args:
          computation: where the value is.
          value: an instruction.
          element: which element of it, if it is a tuple.
        """
        found: set[str] = set()
        if value.name == computation.root:
            found.add("")
        for user in computation.users[value.name]:
            if user.opcode == "get-tuple-element" and element is not None:
                if _tuple_index(user) == element:
                    found |= self._read_as(computation, user, None)
            elif user.opcode.endswith("-done"):
                found |= self._read_as(computation, user, element)
            elif user.opcode in _VIEWS:
                found |= self._read_as(computation, user, element)
            elif user.opcode == "convert":
                found.add(_arrays(user.shape)[0][0])
            elif user.opcode == "fusion":
                (callee,) = user.called("calls")
                inner = self._computations[callee]
                for number, operand in enumerate(user.operands):
                    if operand == value.name:
                        parameter = inner.instructions[inner.parameter(number)]
                        found |= self._read_as(inner, parameter, element)
            else:
                found.add("")
        return found

    def _is_sliced(self, computation: _Computation, value: _Instruction) -> bool:
        """Whether all that reads an all-reduce takes a part of it."""
        users = computation.users[value.name]
        if not users or value.name == computation.root:
            return False
        return all(self._takes_a_part(computation, value, user) for user in users)

    def _takes_a_part(
        self, computation: _Computation, value: _Instruction, user: _Instruction
    ) -> bool:
        if user.opcode == "dynamic-slice":
            return user.operands[0] == value.name
        if user.opcode in ("get-tuple-element", "convert") or user.opcode in _VIEWS:
            return self._is_sliced(computation, user)
        if user.opcode.endswith("-done"):
            return self._is_sliced(computation, user)
        if user.opcode != "fusion":
            return False
        (callee,) = user.called("calls")
        inner = self._computations[callee]
        return all(
            self._is_sliced(inner, inner.instructions[inner.parameter(number)])
            for number, operand in enumerate(user.operands)
            if operand == value.name
        )


def _tuple_index(instruction: _Instruction) -> int:
    found = re.search(r"\bindex=(\d+)", instruction.attributes)
    assert found is not None
    return int(found[1])


def _constant(value: _Value) -> int | None:
    literal = value.instruction.literal
    if value.instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", literal):
        return None
    return int(literal)
