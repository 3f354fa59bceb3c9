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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from sct_jax.training import hlo

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

_BRANCHES = ("branch_computations", "true_computation", "false_computation")
_CALLS = frozenset("async-start call custom-call fusion".split())
_WIDENED = frozenset("bf16 f16 s16 u16".split())  # by XLA for CPUs, in collectives


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
    module = hlo.Module.parse(text)
    if module.num_devices != mesh.size:
        raise ValueError(
            f"the program is for {module.num_devices} devices, and the mesh has "
            f"{mesh.size}"
        )
    return list(_walk(module, module.entry, mesh))


def _walk(
    module: hlo.Module,
    computation: hlo.Computation,
    mesh: Mesh | AbstractMesh,
    *,
    count: int = 1,
    loops: tuple[str, ...] = (),
    branches: tuple[Branch, ...] = (),
) -> Iterator[Collective]:
    """Yields what a computation executes, which itself runs `count` times."""

    def enter(name: str, *, times: int = 1, **changes: Any) -> Iterator[Collective]:
        where = {"loops": loops, "branches": branches} | changes
        inner = module.computations[name]
        return _walk(module, inner, mesh, count=count * times, **where)

    for instruction in computation.instructions.values():
        opcode = instruction.opcode
        if opcode.removesuffix("-start") in _RING:
            found = _collective(module, computation, instruction, mesh)
            if found is not None:
                yield dataclasses.replace(
                    found, count=count, loops=loops, branches=branches
                )
        elif opcode == "while":
            (body,) = instruction.called("body")
            (condition,) = instruction.called("condition")
            trips = module.trip_count(computation, instruction)
            if trips is None:
                unknown = (*loops, instruction.source or instruction.name)
                yield from enter(body, loops=unknown)
                yield from enter(condition, loops=unknown)
            else:
                yield from enter(body, times=trips)
                yield from enter(condition, times=trips + 1)
        elif opcode == "conditional":
            for index, name in enumerate(instruction.called(*_BRANCHES)):
                branch = Branch(instruction.name, index)
                yield from enter(name, branches=(*branches, branch))
        elif opcode in _CALLS:
            for name in instruction.called("calls", "to_apply", "called_computations"):
                yield from enter(name)


def _collective(
    module: hlo.Module,
    computation: hlo.Computation,
    instruction: hlo.Instruction,
    mesh: Mesh | AbstractMesh,
) -> Collective | None:
    """One execution of a collective; None if every device is by itself."""
    kind = instruction.opcode.removesuffix("-start")
    groups = hlo.device_groups(instruction.attributes, mesh.size)
    axes = _axes(groups, mesh)
    if not axes:
        return None
    types: dict[str, None] = {}
    operand_bytes = compiled_bytes = 0
    for index, operand in enumerate(instruction.operands):
        for compiled, size in hlo.arrays(computation.instructions[operand].shape):
            element = _program_type(module, computation, instruction, index, compiled)
            types[element] = None
            operand_bytes += hlo.num_bytes(element, size)
            compiled_bytes += hlo.num_bytes(compiled, size)
    return Collective(
        name=instruction.name,
        kind=kind,
        element_type="+".join(types),
        operand_bytes=operand_bytes,
        compiled_bytes=compiled_bytes,
        axes=axes,
        group_size=max(map(len, groups)),
        is_sliced=kind == "all-reduce" and _is_sliced(module, computation, instruction),
        source=instruction.source,
    )


def _axes(
    groups: Sequence[Sequence[int]], mesh: Mesh | AbstractMesh
) -> tuple[str, ...]:
    """The axes along which the devices of some group differ."""
    sizes = tuple(mesh.shape[name] for name in mesh.axis_names)
    spans = [
        np.ptp(np.unravel_index(np.array(group), sizes), axis=-1)
        for group in groups
        if group
    ]
    differs = np.any(spans, axis=0)
    return tuple(itertools.compress(mesh.axis_names, differs))


def _program_type(
    module: hlo.Module,
    computation: hlo.Computation,
    instruction: hlo.Instruction,
    index: int,
    compiled: str,
) -> str:
    """The element type of an operand before the compiler widened it.

    That is the type which the operand is converted from, if all that reads the result
    converts it to the same.
    """
    operand = instruction.operands[index]
    value = module.define(computation, operand, through=hlo.VIEWS)
    if value.instruction.opcode != "convert":
        return compiled
    (source,) = value.instruction.operands
    ((narrow, _),) = hlo.arrays(value.computation.instructions[source].shape)
    if narrow not in _WIDENED:
        return compiled
    element = index if len(instruction.operands) > 1 else None
    read_as = _read_as(module, computation, instruction, element)
    return narrow if read_as == {narrow} else compiled


def _read_as(
    module: hlo.Module,
    computation: hlo.Computation,
    value: hlo.Instruction,
    element: int | None,
) -> set[str]:
    """The types to which all that reads a value converts it; "" for other uses.

    Args:
      module: the program.
      computation: where the value is.
      value: an instruction.
      element: which element of it, if it is a tuple.
    """
    found: set[str] = set()
    if value.name == computation.root:
        found.add("")
    for user in computation.users[value.name]:
        if user.opcode == "get-tuple-element" and element is not None:
            if user.index == element:
                found |= _read_as(module, computation, user, None)
        elif user.opcode in hlo.VIEWS or user.opcode.endswith("-done"):
            found |= _read_as(module, computation, user, element)
        elif user.opcode == "convert":
            found.add(hlo.arrays(user.shape)[0][0])
        elif user.opcode == "fusion":
            for inner, parameter in _parameters(module, user, value.name):
                found |= _read_as(module, inner, parameter, element)
        else:
            found.add("")
    return found


def _is_sliced(
    module: hlo.Module, computation: hlo.Computation, value: hlo.Instruction
) -> bool:
    """Whether all that reads a value takes a part of it that varies by device."""
    users = computation.users[value.name]
    if not users or value.name == computation.root:
        return False

    def takes_a_part(user: hlo.Instruction) -> bool:
        if user.opcode == "dynamic-slice":
            return user.operands[0] == value.name
        if user.opcode == "fusion":
            return all(
                _is_sliced(module, inner, parameter)
                for inner, parameter in _parameters(module, user, value.name)
            )
        views = user.opcode in hlo.VIEWS or user.opcode.endswith("-done")
        if views or user.opcode in ("get-tuple-element", "convert"):
            return _is_sliced(module, computation, user)
        return False

    return all(map(takes_a_part, users))


def _parameters(
    module: hlo.Module, fusion: hlo.Instruction, operand: str
) -> list[tuple[hlo.Computation, hlo.Instruction]]:
    """The parameters of a fusion's computation that stand for an operand."""
    (callee,) = fusion.called("calls")
    inner = module.computations[callee]
    return [
        (inner, inner.parameter(number))
        for number, name in enumerate(fusion.operands)
        if name == operand
    ]
