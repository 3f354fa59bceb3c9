"""Programs whose collectives are known, compiled for eight devices, and handwritten."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sct_jax.training import collectives

AXES = ("data", "fsdp", "tensor")


@functools.cache
def mesh():
    return jax.make_mesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)


def compiled(function, shape, dtype, *, ins, outs):
    """Returns the text of a function of one array on each device."""
    on_devices = jax.shard_map(
        function, mesh=mesh(), in_specs=ins, out_specs=outs, check_vma=False
    )
    x = jax.ShapeDtypeStruct(shape, dtype)
    return jax.jit(on_devices).lower(x).compile().as_text()


WHOLE = P()


def read(function, *, dtype=jnp.float32, ins=WHOLE, outs=WHOLE):
    text = compiled(function, (16, 8), dtype, ins=ins, outs=outs)
    return collectives.read(text, mesh())


def bytes_of(found):
    return [(c.operand_bytes, c.result_bytes, c.wire_bytes) for c in found]


N = 16 * 8 * 4  # bytes of the array
KINDS = {
    # function, specs, kind, axes, devices, bytes in, out, and on the wire
    "one axis": (
        lambda x: jax.lax.psum(x, "fsdp"),
        (P(), P()),
        ("all-reduce", ("fsdp",), 2),
        (N, N, N),
    ),
    "two axes": (
        lambda x: jax.lax.psum(x, ("data", "tensor")),
        (P(), P()),
        ("all-reduce", ("data", "tensor"), 4),
        (N, N, 1.5 * N),
    ),
    "all axes": (
        lambda x: jax.lax.pmax(x, AXES),
        (P(), P()),
        ("all-reduce", AXES, 8),
        (N, N, 1.75 * N),
    ),
    "gather": (
        lambda x: jax.lax.all_gather(x, ("fsdp", "tensor"), tiled=True),
        (P(("fsdp", "tensor")), P()),
        ("all-gather", ("fsdp", "tensor"), 4),
        (N / 4, N, 0.75 * N),
    ),
    "scatter": (
        lambda x: jax.lax.psum_scatter(x, ("data", "fsdp"), tiled=True),
        (P(), P(("data", "fsdp"))),
        ("reduce-scatter", ("data", "fsdp"), 4),
        (N, N / 4, 0.75 * N),
    ),
    "all to all": (
        lambda x: jax.lax.all_to_all(x, ("data", "fsdp"), 0, 1, tiled=True),
        (P(), P()),
        ("all-to-all", ("data", "fsdp"), 4),
        (N, N, 0.75 * N),
    ),
    "permutation": (
        lambda x: jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)]),
        (P("tensor"), P("tensor")),
        ("collective-permute", ("tensor",), 2),
        (N / 2, N / 2, N / 2),
    ),
}


@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
def test_kind_axes_and_bytes(case):
    function, (ins, outs), expected, sizes = case
    (found,) = read(function, ins=ins, outs=outs)
    assert (found.kind, found.axes, found.group_size) == expected
    assert bytes_of([found]) == [sizes]
    assert found.payload_bytes == max(sizes[:2])
    assert (found.element_type, found.count, found.loops) == ("f32", 1, ())


def test_a_variadic_collective_counts_once():
    both = lambda x: jax.lax.psum((x, jnp.sum(x)), "data")
    (found,) = read(both, outs=(P(), P()))
    assert (found.kind, found.count, found.payload_bytes) == ("all-reduce", 1, N + 4)


def test_the_partitioner_adds_what_a_contraction_needs():
    place = lambda *names: NamedSharding(mesh(), P(*names))
    product = jax.jit(jnp.matmul, out_shardings=place("data", None))
    text = (
        product.lower(
            jax.ShapeDtypeStruct((16, 32), "float32", sharding=place("data", "tensor")),
            jax.ShapeDtypeStruct((32, 8), "float32", sharding=place("tensor", None)),
        )
        .compile()
        .as_text()
    )
    (found,) = collectives.read(text, mesh())
    assert (found.kind, found.axes, found.payload_bytes) == (
        "all-reduce",
        ("tensor",),
        8 * 8 * 4,
    )
    assert not found.is_sliced


def test_an_all_reduce_of_which_devices_keep_a_part_is_marked():
    place = lambda *names: NamedSharding(mesh(), P(*names))
    # As the gradient of a matrix whose rows are sharded: the batch is contracted.
    product = jax.jit(lambda x, y: x.T @ y, out_shardings=place("fsdp", None))
    x, y = (
        jax.ShapeDtypeStruct((64, n), "float32", sharding=place(AXES, None))
        for n in (32, 16)
    )
    found = collectives.read(product.lower(x, y).compile().as_text(), mesh())
    assert [(c.kind, c.axes, c.payload_bytes, c.is_sliced) for c in found] == [
        ("all-reduce", ("fsdp",), 32 * 16 * 4, True),
        ("all-reduce", ("data", "tensor"), 16 * 16 * 4, False),
    ]


# --- Types.


def test_arrays_widened_by_the_compiler_count_in_their_own_type():
    (found,) = read(lambda x: jax.lax.psum(x, "data"), dtype=jnp.bfloat16)
    assert (found.element_type, found.operand_bytes) == ("bf16", N / 2)
    assert found.compiled_bytes in (N / 2, N)


def test_a_sum_in_float32_counts_in_float32():
    def function(x):
        return jax.lax.psum(x.astype(jnp.float32), "data")

    (found,) = read(function, dtype=jnp.bfloat16)
    assert (found.element_type, found.operand_bytes) == ("f32", N)


def test_a_sum_in_int32_counts_in_int32():
    """The compiler widens no array of 8 bits, so the program did."""

    def function(x):
        return jax.lax.psum(x.astype(jnp.int32), "data").astype(jnp.int8)

    (found,) = read(function, dtype=jnp.int8)
    assert (found.element_type, found.operand_bytes) == ("s32", N)


def test_a_variadic_collective_may_have_several_types():
    def function(x):
        return jax.lax.psum((x, x.astype(jnp.float32) + 1), "data")

    found = read(function, dtype=jnp.bfloat16, outs=(P(), P()))
    assert sum(c.operand_bytes for c in found) == N / 2 + N
    assert {t for c in found for t in c.element_type.split("+")} == {"bf16", "f32"}


# --- Loops and branches.


def nested(x):
    def outer(c, _):
        inner = lambda c, _: (jax.lax.psum(c, "tensor") * 0.5, None)
        c, _ = jax.lax.scan(inner, c, None, length=3)
        return jax.lax.psum(c, "fsdp") * 0.5, None

    return jax.lax.psum(jax.lax.scan(outer, x, None, length=5)[0], "data")


def counts(found):
    return {c.axes: (c.count, len(c.loops)) for c in found}


def test_scans_multiply_the_count():
    expected = {("tensor",): (15, 0), ("fsdp",): (5, 0), ("data",): (1, 0)}
    found = read(nested)
    assert counts(found) == expected
    total = collectives.total(found)
    assert total == (21, 21 * N, 21 * N)
    assert collectives.totals(found)["all-reduce", ("tensor",)] == (15, 15 * N, 15 * N)


def test_trip_counts_are_read_from_conditions_too():
    text = compiled(nested, (16, 8), jnp.float32, ins=P(), outs=P())
    unsaid, changes = re.subn(r'"known_trip_count":\{"n":"\d+"\}', "", text)
    assert changes == 2
    expected = {("tensor",): (15, 0), ("fsdp",): (5, 0), ("data",): (1, 0)}
    assert counts(collectives.read(unsaid, mesh())) == expected
    # A condition that compares otherwise says nothing.
    unknown = re.sub("direction=LT", "direction=NE", unsaid)
    expected = {("tensor",): (1, 2), ("fsdp",): (1, 1), ("data",): (1, 0)}
    assert counts(collectives.read(unknown, mesh())) == expected


def test_loops_of_unknown_length_are_named_and_count_per_iteration():
    def function(x):
        ends = lambda c: jnp.sum(c) < 10
        x = jax.lax.psum(x, "data")
        return jax.lax.while_loop(ends, lambda c: jax.lax.psum(c, "tensor"), x)

    found = read(function)
    assert counts(found) == {("data",): (1, 0), ("tensor",): (1, 1)}
    (loop,) = next(c.loops for c in found if c.loops)
    assert loop.endswith("while")
    assert collectives.total(collectives.least(found)).count == 1
    assert collectives.total(collectives.most(found)).count == 2


def test_a_condition_runs_once_more_than_the_body():
    def function(x):
        ends = lambda c: (c[0] < 4) & (jnp.sum(jax.lax.psum(c[1], "fsdp")) >= 0)
        body = lambda c: (c[0] + 1, c[1] * 0.5)
        return jax.lax.while_loop(ends, body, (0, x))[1]

    text = compiled(function, (16, 8), jnp.float32, ins=P(), outs=P())
    text, changes = re.subn(
        r"( while\(.*)", r'\1, backend_config={"known_trip_count":{"n":"4"}}', text
    )
    assert changes == 1
    (found,) = collectives.read(text, mesh())
    assert (found.axes, found.count) == (("fsdp",), 5)


def test_one_branch_of_a_conditional_runs():
    def function(x):
        def costly(c):
            return jax.lax.psum(jax.lax.psum(c, "data") * 0.5, "fsdp")

        def cheap(c):
            return jax.lax.psum(c, "tensor")

        def rare(c):
            return jax.lax.cond(jnp.max(c) > 5, costly, cheap, c)

        return jax.lax.cond(jnp.sum(x) > 0, rare, lambda c: c * 2, x)

    found = read(function)
    assert {len(c.branches) for c in found} == {2}
    axes = lambda found: sorted(c.axes for c in found)
    assert axes(found) == [("data",), ("fsdp",), ("tensor",)]
    assert axes(collectives.most(found)) == [("data",), ("fsdp",)]
    assert collectives.least(found) == []


# --- Forms of the text that this backend does not write for programs as small.

MODULE = """HloModule test, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

%reduce (p: f32[16]) -> f32[4] {{
  %p = f32[16]{{0}} parameter(0)
  ROOT %scattered = f32[4]{{0}} reduce-scatter(%p), channel_id=3, \
replica_groups=[2,4]<=[8], dimensions={{0}}, to_apply=%add
}}

ENTRY %main (x: f32[16]) -> f32[16] {{
  %x = f32[16]{{0:T(256)}} parameter(0), metadata={{op_name="x[\\"(\\"]{{" line=2}}
{body}
}}
"""


def of_body(*lines):
    text = MODULE.format(body="\n".join(f"  {line}" for line in lines))
    return collectives.read(text, mesh())


GROUPS = {
    "{{0,1},{2,3},{4,5},{6,7}}": (("tensor",), 2),
    "{{0,4,2,6},{1,5,3,7}}": (("data", "fsdp"), 4),
    "{{0,1,2,3,4,5,6,7}}": (AXES, 8),
    "{}": (AXES, 8),
    "[1,8]<=[8]": (AXES, 8),
    "[2,4]<=[8]": (("fsdp", "tensor"), 4),
    "[4,2]<=[8]": (("tensor",), 2),
    "[4,2]<=[2,4]T(1,0)": (("data",), 2),
    "[4,2]<=[2,2,2]T(0,2,1)": (("fsdp",), 2),
    "[2,4]<=[2,2,2]T(1,0,2)": (("data", "tensor"), 4),
    "mesh['a'=2,'b'=4] {'a'}": (("data",), 2),
    "mesh['a'=2,'b'=4] {'b'}": (("fsdp", "tensor"), 4),
    "mesh['a'=2,'b'=4] {'a','b'}": (AXES, 8),
    "mesh['a'=2,'b'=4] {'b':(1)2}": (("fsdp",), 2),
    "mesh['a'=2,'b'=4] {'b':(2)2}": (("tensor",), 2),
    "mesh['a'=2,'b'=4] {'a','b':(2)2}": (("data", "tensor"), 4),
    "mesh['a'=8] {'a':(2)2}": (("fsdp",), 2),
    "mesh['a'=1,'b'=2,'c'=1,'d'=4], device_ids=([2,2,2]T(1,0,2)) {'b'}": (
        ("fsdp",),
        2,
    ),
    "mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a'}": (("fsdp",), 2),
    "mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'a'}": (("tensor",), 2),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_every_form_of_groups_is_read(groups):
    (found,) = of_body(
        f"ROOT %r = f32[16]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}"
        ", use_global_device_ids=true, to_apply=%add"
    )
    assert (found.axes, found.group_size) == GROUPS[groups]
    assert (found.payload_bytes, found.compiled_bytes) == (64, 64)


def test_groups_of_one_device_move_nothing():
    groups = ",".join(f"{{{device}}}" for device in range(8))
    assert not of_body(
        f"ROOT %r = f32[16]{{0}} all-reduce(%x), replica_groups={{{groups}}}, "
        "to_apply=%add"
    )


def test_asynchronous_collectives_count_once():
    found = of_body(
        "%s = f32[16]{0} all-reduce-start(%x), channel_id=1, "
        "replica_groups=[4,2]<=[8], to_apply=%add",
        "%r = f32[16]{0} all-reduce-done(%s)",
        "%gs = (f32[16]{0}, f32[32]{0}) all-gather-start(%x), channel_id=2, "
        "replica_groups=[4,2]<=[8], dimensions={0}",
        "%g = f32[32]{0} all-gather-done(%gs)",
        "%ps = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%x), "
        "channel_id=4, source_target_pairs={{0,4},{4,0}}",
        "%p = f32[16]{0} collective-permute-done(%ps)",
        "%as = ((f32[16]{0}), f32[4]{0}, u32[]) async-start(%x), calls=%reduce",
        "%a = f32[4]{0} async-done(%as), calls=%reduce",
        "ROOT %y = f32[16]{0} add(%r, %p)",
    )
    assert [(c.kind, c.axes, c.operand_bytes, c.result_bytes) for c in found] == [
        ("all-reduce", ("tensor",), 64, 64),
        ("all-gather", ("tensor",), 64, 128),
        ("collective-permute", ("data",), 64, 64),
        ("reduce-scatter", ("fsdp", "tensor"), 64, 16),
    ]


def test_the_axes_are_those_of_the_mesh():
    line = (
        "ROOT %r = f32[16]{0} all-reduce(%x), channel_id=1, "
        "replica_groups=[2,4]<=[8], to_apply=%add"
    )
    text = MODULE.format(body=f"  {line}")
    ring = AbstractMesh((2, 4), ("rows", "columns"))
    (found,) = collectives.read(text, ring)
    assert found.axes == ("columns",)
    half = AbstractMesh((8,), ("all",))
    (found,) = collectives.read(text, half)
    assert (found.axes, found.group_size) == (("all",), 4)


def test_other_texts_are_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        collectives.read("module @jit_f {}", AbstractMesh((1,), ("data",)))
    with pytest.raises(ValueError, match="for 8 devices, and the mesh has 4"):
        collectives.read(MODULE.format(body=""), AbstractMesh((4,), ("data",)))


LOOP = """HloModule loop, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%less (i: s32[], n: s32[]) -> pred[] {
  %i = s32[] parameter(0)
  %n = s32[] parameter(1)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%ends (state: (s32[], f32[16])) -> pred[] {
  %state = (s32[], f32[16]{0}) parameter(0)
  %counter = s32[] get-tuple-element(%state), index=0
  %limit = s32[] constant(11)
  ROOT %more = pred[] fusion(%counter, %limit), kind=kLoop, calls=%less
}

%body (old: (s32[], f32[16])) -> (s32[], f32[16]) {
  %old = (s32[], f32[16]{0}) parameter(0)
  %before = s32[] get-tuple-element(%old), index=0
  %array = f32[16]{0} get-tuple-element(%old), index=1
  %step = s32[] constant(3)
  %after = s32[] add(%before, %step)
  %reduced = f32[16]{0} all-reduce(%array), replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %new = (s32[], f32[16]{0}) tuple(%after, %reduced)
}

ENTRY %main (x: f32[16]) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  %begin = s32[] constant(1)
  %start = (s32[], f32[16]{0}) tuple(%begin, %x)
  %end = (s32[], f32[16]{0}) while(%start), condition=%ends, body=%body
  ROOT %result = f32[16]{0} get-tuple-element(%end), index=1
}
"""


@pytest.mark.parametrize(
    ("old", "new", "count"),
    [
        ("", "", 4),  # 1, 4, 7 and 10 are below 11
        ("constant(11)", "constant(10)", 3),
        ("constant(1)", "constant(11)", 0),
        ("tuple(%after,", "tuple(%before,", None),
        ("compare(%i, %n)", "compare(%n, %i)", None),
        ("constant(3)", "constant(-3)", None),
        ("fusion(%counter,", "fusion(%limit,", None),
    ],
)
def test_a_counter_may_be_compared_inside_a_fusion(old, new, count):
    assert old in LOOP
    (found,) = collectives.read(LOOP.replace(old, new), mesh())
    assert (found.count, bool(found.loops)) == (
        1 if count is None else count,
        count is None,
    )
