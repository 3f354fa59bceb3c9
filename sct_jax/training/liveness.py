"""The peak memory of a traced function, from the lifetimes of its arrays.

A traced function says in which order arrays are computed, and when each is read last.
`peak_bytes` walks it with the rules of XLA's buffer assignment:

- A result of an elementwise operation exists in memory only if a reader other than an
  elementwise operation or a reduction needs it, or if several readers would have to
  compute it again from more than it takes.
- An elementwise operation overwrites an operand of its size that nobody reads later,
  and so does an update of a slice.
- A loop holds its carry once. What it stacks is zeroed ahead, before all else. It reads
  its slices when they are needed.
- A gradient of a product is two products. Compilers order them either way, so operands
  count until after the next operation.
"""

import collections
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax.extend.core

# The same bytes under another shape.
_VIEWS = frozenset(
    "reshape squeeze expand_dims transpose copy copy_p optimization_barrier "
    "stop_gradient sharding_constraint name".split()
)
_COSTLY = frozenset(
    "atan2 cos div erf erf_inv exp exp2 expm1 log log1p logistic pow rem rsqrt sin "
    "sqrt tanh".split()
)
_ELEMENTWISE = _COSTLY | frozenset(
    "abs add add_any and bitcast_convert_type broadcast_in_dim ceil clamp concatenate "
    "convert_element_type dynamic_slice eq floor ge gt integer_pow iota is_finite le "
    "lt max min mul ne neg not or pad population_count random_bits rev round select_n "
    "shift_left shift_right_arithmetic shift_right_logical sign slice split square "
    "sub xor".split()
)
_REDUCTIONS = frozenset(
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod "
    "reduce_sum".split()
)
# Change their first operand where it stands.
_IN_PLACE = frozenset(("dynamic_update_slice", "scatter", "scatter-add"))
_CONTROL = frozenset(("scan", "while", "cond"))
_LITERAL = -1


class _Op(NamedTuple):
    name: str
    ins: list[int]
    outs: list[int]
    params: dict[str, Any]


class _Flat(NamedTuple):
    """A jaxpr with its calls inlined: values are numbers, and views share one."""

    ops: list[_Op]
    ins: list[int]
    outs: list[int]
    sizes: list[int]
    widen: bool


def peak_bytes(
    jaxpr: jax.extend.core.ClosedJaxpr, *, donated: int = 0, widen: bool = False
) -> int:
    """Returns the most bytes that exist at once beside the arguments.

    Args:
      jaxpr: the traced function.
      donated: the number of arguments, the first ones, whose memory is used anew.
      widen: whether bfloat16 takes the bytes of float32, as in XLA on CPU.
    """
    flat = _flatten(jaxpr.jaxpr, widen)
    return max(0, _peak(flat, flat.ins[:donated]))


def _flatten(jaxpr: Any, widen: bool) -> _Flat:
    ops: list[_Op] = []
    sizes: list[int] = []

    def new(aval) -> int:
        sizes.append(_bytes(aval, widen))
        return len(sizes) - 1

    def inline(jaxpr, ins: Sequence[int]) -> list[int]:
        env = dict(zip(jaxpr.invars, ins, strict=True))
        env |= {var: new(var.aval) for var in jaxpr.constvars}

        def read(atom) -> int:
            return env[atom] if isinstance(atom, jax.extend.core.Var) else _LITERAL

        for eqn in jaxpr.eqns:
            name, values = eqn.primitive.name, [read(atom) for atom in eqn.invars]
            called = None if name in _CONTROL else _called(eqn)
            if called is not None:
                outs = inline(called, values[len(values) - len(called.invars) :])
            elif name in _VIEWS and len(values) >= len(eqn.outvars):
                outs = values[: len(eqn.outvars)]
            else:
                outs = [new(var.aval) for var in eqn.outvars]
                ops.append(_Op(name, values, outs, _params(eqn)))
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    ins = [new(var.aval) for var in jaxpr.invars]
    outs = inline(jaxpr, ins)
    return _Flat(_without_dead(ops, outs), ins, outs, sizes, widen)


def _params(eqn: Any) -> dict[str, Any]:
    """Parameters of an equation; a scan gets the counts that JAX up to 0.11 gives.

    Constants and carries have the shapes that they have in the body. What is scanned
    over, and what is stacked, has one axis more.
    """
    if eqn.primitive.name != "scan":
        return eqn.params
    body = eqn.params["jaxpr"].jaxpr
    same = lambda inner, outer: [
        len(a.aval.shape) == len(b.aval.shape)
        for a, b in zip(inner, outer, strict=True)
    ]
    num_carry = sum(same(body.outvars, eqn.outvars))
    num_kept = sum(same(body.invars, eqn.invars))
    return eqn.params | {"num_carry": num_carry, "num_consts": num_kept - num_carry}


def _called(eqn: Any) -> Any:
    """The function that an equation calls; None if it computes something itself."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = getattr(eqn.params.get(key), "jaxpr", eqn.params.get(key))
        if hasattr(inner, "eqns") and len(inner.invars) <= len(eqn.invars):
            return inner
    return None


def _bytes(aval: Any, widen: bool) -> int:
    dtype = getattr(aval, "dtype", None)
    if dtype is None:  # a token
        return 0
    itemsize = 4 if widen and dtype == "bfloat16" else getattr(dtype, "itemsize", 4)
    return math.prod(aval.shape) * itemsize


def _without_dead(ops: list[_Op], outs: Collection[int]) -> list[_Op]:
    """The operations that some output depends on."""
    needed, kept = set(outs), []
    for op in reversed(ops):
        if needed.intersection(op.outs):
            kept.append(op)
            needed.update(op.ins)
    return kept[::-1]


class _Placement(NamedTuple):
    """Where the values of a function are.

    Attributes:
      sources: value -> the values in memory that it is computed from.
      fused: values that never exist in memory.
      lazy: values that exist from their first read on.
    """

    sources: dict[int, set[int]]
    fused: set[int]
    lazy: set[int]

    def read(self, values: Collection[int]) -> set[int]:
        return set().union(*(self.sources.get(v, {v}) for v in values))


def _place(flat: _Flat, kept: set[int], slices: Collection[int]) -> _Placement:
    readers = collections.defaultdict(list)
    for op in flat.ops:
        for value in set(op.ins):
            readers[value].append(op.name)
    absorbed = lambda value: all(
        name in _ELEMENTWISE or name in _REDUCTIONS for name in readers[value]
    )
    where = _Placement({_LITERAL: set()}, set(), set())
    where.sources.update((value, {value}) for value in flat.ins)
    for value in slices:
        if len(readers[value]) <= 1 and absorbed(value):
            where.fused.add(value)
            where.sources[value] = set()
        else:
            where.lazy.add(value)
    for op in flat.ops:
        elementwise, read = op.name in _ELEMENTWISE, where.read(op.ins)
        bytes_read = sum(flat.sizes[v] for v in read)
        for value in op.outs:
            bound = 8 if op.name == "broadcast_in_dim" else max(8, flat.sizes[value])
            computed_again = op.name not in _COSTLY and bytes_read <= bound
            where.sources[value] = {value}
            if not elementwise or value in kept:
                continue
            if absorbed(value) and (len(readers[value]) <= 1 or computed_again):
                where.fused.add(value)
                where.sources[value] = read
            elif not read:
                where.lazy.add(value)
    return where


def _peak(
    flat: _Flat,
    donated: Collection[int],
    *,
    slices: Collection[int] = (),
    stacked: Collection[int] = (),
) -> int:
    """The peak bytes, less those of the inputs; memory of donated inputs is reused.

    Args:
      flat: the function.
      donated: inputs whose memory is free after their last read.
      slices: inputs that are read from a larger array as they are needed.
      stacked: outputs that are written to a larger array as soon as they exist.
    """
    ops, sizes = flat.ops, flat.sizes
    kept = set(flat.outs) - set(stacked)
    where = _place(flat, kept, slices)
    computes = [
        [v for v in op.outs if v not in where.fused and v not in where.lazy]
        for op in ops
    ]
    reads = [where.read(op.ins) for op in ops]
    last: dict[int, int] = {}
    for i, op in enumerate(ops):
        if computes[i]:
            last.update(dict.fromkeys(reads[i], i))
        for value in set(stacked).intersection(op.outs):  # written at once
            for source in where.sources[value]:
                last[source] = max(last.get(source, -1), i)
    last.update(dict.fromkeys(where.read(kept), len(ops)))
    lasting = set(flat.ins) - set(donated) - set(slices)
    early = {
        v for op in ops if op.name == "scan" for v in op.outs[op.params["num_carry"] :]
    }
    existing = set(flat.ins) - set(slices)
    live = peak = sum(sizes[v] for v in early)
    late = 0  # bytes that nobody reads any more, but that still count
    for i, op in enumerate(ops):
        if not computes[i]:
            continue
        begun = where.lazy.intersection(reads[i]) - existing
        existing |= begun
        live += sum(sizes[v] for v in begun)
        dying = {v for v in reads[i] if last[v] == i and v not in lasting}
        reused = sorted(dying.intersection(where.read(_overwritten(op))))
        added = 0
        for value in set(computes[i]) - early:
            match = next((v for v in reused if sizes[v] == sizes[value]), None)
            if match is None:
                added += sizes[value]
            else:
                reused.remove(match)
                dying.remove(match)
        inner = _inner_peak(op, dying, flat.widen)
        if op.name == "cond":  # the branch allocates what the operation returns
            peak = max(peak, live + inner)
        else:
            peak = max(peak, live + added + inner)
        unread = [v for v in computes[i] if last.get(v, -1) <= i and v not in kept]
        freed = sum(sizes[v] for v in dying)
        live += added - late - sum(sizes[v] for v in unread)
        late = freed if op.name == "dot_general" else 0
        live -= freed - late
    return peak


def _overwritten(op: _Op) -> list[int]:
    """The operands whose memory may hold the results."""
    if op.name in _ELEMENTWISE:
        return op.ins
    if op.name in _IN_PLACE:
        return op.ins[:1]
    if op.name == "scan":
        first = op.params["num_consts"]
        return op.ins[first : first + op.params["num_carry"]]
    if op.name == "while":
        return op.ins[op.params["cond_nconsts"] + op.params["body_nconsts"] :]
    return []


def _inner_peak(op: _Op, dying: Collection[int], widen: bool) -> int:
    """The most bytes that exist inside of a loop or branch beside its arguments."""
    if op.name == "scan":
        body = _flatten(op.params["jaxpr"].jaxpr, widen)
        first, carry = op.params["num_consts"], op.params["num_carry"]
        peak = _peak(
            body,
            body.ins[first : first + carry],
            slices=body.ins[first + carry :],
            stacked=body.outs[carry:],
        )
        return max(0, peak)
    if op.name == "while":
        body = _flatten(op.params["body_jaxpr"].jaxpr, widen)
        return max(0, _peak(body, body.ins[op.params["body_nconsts"] :]))
    if op.name == "cond":
        branches = [_flatten(b.jaxpr, widen) for b in op.params["branches"]]
        return max(
            _peak(
                branch,
                [
                    v
                    for v, outer in zip(branch.ins, op.ins[1:], strict=True)
                    if outer in dying
                ],
            )
            for branch in branches
        )
    return 0
