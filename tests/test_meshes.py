"""Rows sharded over eight devices: the results of one device, no factor gathered."""

import functools
import re
import types

import jax
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sct_jax import optimizers, spectral, transforms
from sct_jax.training import collectives

EPS = float(np.finfo(np.float32).eps)
ORTHONORMAL = 4e-6
RATE, MAX_NORM = 1e-2, 0.05
DEVICES = 8

# Layers, fan_in, fan_out. No other axis, sharded or not, is as long as a fan.
SHAPES = {"stack": ((2,), 64, 48), "single": ((), 40, 88)}
FANS = {fan for _, *fans in SHAPES.values() for fan in fans}
RANK = 4  # one rank: every further one compiles the small products again
MODES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}

CHAINS = {
    "sct": lambda: optimizers.sct(RATE, max_update_norm=MAX_NORM),
    "sct, polar": lambda: optimizers.sct(
        RATE, max_update_norm=MAX_NORM, retraction="polar"
    ),
    "sct, bfloat16": lambda: optimizers.sct(
        RATE, moment_dtype="bfloat16", retraction="none"
    ),
    "sct, svd": lambda: optimizers.sct(RATE, retraction="svd"),
    "tsvd": lambda: optimizers.tsvd(RATE, retraction_tolerance=ORTHONORMAL / 4),
    "stiefel_muon": lambda: optimizers.stiefel_muon(RATE, retraction="none"),
    "spectron": lambda: optimizers.spectron(RATE),
    # By itself, its guard runs in the third step.
    "retraction": transforms.retract_to_stiefel,
}
FREE = ("sct, bfloat16", "stiefel_muon", "spectron")  # nothing to keep orthonormal
CASES = [(mode, name) for mode in MODES for name in CHAINS]


@functools.cache
def draw_params():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    drawn = {
        name: spectral.init(
            key, fan_in, fan_out, RANK, layers=layers, orthonormal=False
        )
        for key, (name, (layers, fan_in, fan_out)) in zip(
            keys, SHAPES.items(), strict=True
        )
    }
    return jax.device_get(spectral.retract(drawn))


def start(name):
    """Returns params, and the gradients of three steps."""
    params = draw_params()
    if name == "spectron":
        params = jax.tree.map(
            spectral.to_low_rank, params, is_leaf=spectral.is_spectral
        )
        params = jax.device_get(params)
    rng = np.random.default_rng(0)

    def noise(x):
        return np.asarray(0.02 * rng.normal(size=x.shape), np.float32)

    def beyond_the_guard(x):
        """One long column: the squared condition is 100, and 30 is allowed."""
        column = rng.normal(size=x.shape[:-1])
        x = np.zeros_like(x)
        if FANS & set(x.shape):
            x[..., 0] = 10 * column / np.linalg.norm(column, axis=-1, keepdims=True)
        return x

    gradients = [jax.tree.map(noise, params) for _ in range(2)]
    return params, [*gradients, jax.tree.map(beyond_the_guard, params)]


def place(tree, mesh):
    """Shards the rows of factors over all devices, and replicates other arrays."""

    def sharding(x):
        axes = [None] * x.ndim
        if FANS & set(x.shape):
            axes[-2] = "fsdp"
        return NamedSharding(mesh, P(*axes))

    return jax.device_put(tree, jax.tree.map(sharding, tree))


def make_step(tx):
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(lambda p, u: p + u, params, updates), state

    return jax.jit(step)


@functools.cache
def on_one_device(name):
    """The params after each step."""
    tx = CHAINS[name]()
    params, gradients = start(name)
    state, step, history = tx.init(params), make_step(tx), []
    for grads in gradients:
        params, state = step(grads, state, params)
        history.append(jax.device_get(params))
    return history


@pytest.fixture(
    scope="module", params=CASES, ids=[f"{mode}, {name}" for mode, name in CASES]
)
def on_eight_devices(request):
    """Three steps on a mesh, and the text of the compiled step."""
    mode, name = request.param
    tx = CHAINS[name]()
    params, gradients = start(name)
    mesh = jax.make_mesh((DEVICES,), ("fsdp",), axis_types=(MODES[mode],))
    with jax.set_mesh(mesh):
        params = place(params, mesh)
        state, step, history = tx.init(params), make_step(tx), []
        compiled = step.lower(place(gradients[0], mesh), state, params).compile()
        for grads in gradients:
            # Raises if a step changes the sharding of its state.
            params, state = compiled(place(grads, mesh), state, params)
            history.append(params)
    return types.SimpleNamespace(
        mode=mode, name=name, history=history, state=state, text=compiled.as_text()
    )


def test_steps_match_one_device(on_eight_devices):
    name, found = on_eight_devices.name, on_eight_devices.history
    expected = on_one_device(name)
    for step, (x, y) in enumerate(zip(found, expected, strict=True), start=1):
        # Gram matrices are sums in another order; entries are at most 1 in size.
        atol = 4 * EPS * np.sqrt(RANK) * step
        same = lambda a, b, atol=atol: np.testing.assert_allclose(a, b, atol=atol)
        # Rounding decides singular vectors of nearly equal values, but not W.
        if name == "sct, svd":
            x, y = ({k: reference.dense(*w) for k, w in t.items()} for t in (x, y))
        jax.tree.map(same, x, y)
        for w in found[step - 1].values():
            if name not in FREE:
                assert reference.orthonormality_error(w.u) < ORTHONORMAL
                assert reference.orthonormality_error(w.v) < ORTHONORMAL


def test_rows_stay_sharded(on_eight_devices):
    placed = jax.tree.leaves((on_eight_devices.history, on_eight_devices.state))
    by_rows = [x for x in placed if FANS & set(x.shape)]
    assert by_rows
    for x in by_rows:
        axes = [None] * x.ndim
        axes[-2] = "fsdp"
        wanted = NamedSharding(x.sharding.mesh, P(*axes))
        assert x.sharding.is_equivalent_to(wanted, x.ndim)
        assert x.addressable_shards[0].data.size * DEVICES == x.size


def instructions(text):
    """Operation and axis lengths of its result, for every line of an HLO module."""
    found = re.findall(
        r"^\s*(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(", text, re.M
    )
    return [
        (
            operation,
            {
                int(size)
                for axes in re.findall(r"\[([\d,]+)\]", result)
                for size in axes.split(",")
            },
        )
        for result, operation in found
    ]


def gathered(text):
    """The collectives whose result has all rows of a factor."""
    moving = ("all-gather", "all-reduce", "all-to-all", "collective", "ragged")
    return [
        operation
        for operation, sizes in instructions(text)
        if operation.startswith(moving) and sizes & FANS
    ]


def test_no_factor_is_gathered(on_eight_devices):
    """Only R x R products couple rows, so devices exchange R^2 numbers per factor.

    A gather would move (fan_in + fan_out) R numbers per weight and step to every
    device, and store them there. All branches count, also the guard of the retraction
    and the search of the clip: memory is reserved for branches that do not run.
    """
    text, name = on_eight_devices.text, on_eight_devices.name
    operations = {operation for operation, _ in instructions(text)}
    # Adam by itself needs no communication.
    assert "all-reduce" in operations or name == "sct, bfloat16"
    assert "conditional" in operations or name in FREE
    assert not gathered(text)
    # No other operation makes a whole factor on a device either.
    assert not [found for found in instructions(text) if found[1] & FANS]


@pytest.mark.parametrize("mode", MODES)
def test_gram_matrices_are_summed_at_once(mode):
    """One all-reduce per stage, whatever the number of factors and of their ranks."""
    mesh = jax.make_mesh((DEVICES,), ("fsdp",), axis_types=(MODES[mode],))
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        str(i): spectral.init(key, 64, 48, RANK + i % 2) for i, key in enumerate(keys)
    }
    tx = optimizers.sct(RATE, max_update_norm=MAX_NORM)
    with jax.set_mesh(mesh):
        params = place(jax.device_get(params), mesh)
        lowered = make_step(tx).lower(params, tx.init(params), params)
    found = collectives.read(lowered.compile().as_text(), mesh)
    found = collectives.most([c for c in found if not c.loops])  # without the guard
    assert {c.kind for c in found} == {"all-reduce"}
    grams = 2 * 2 * (RANK**2 + (RANK + 1) ** 2) * 4  # bytes of u.T u and v.T v of all
    sizes = sorted(c.payload_bytes for c in found)
    # Clipping first needs norms and largest entries, then u.T du, then E.T E.
    assert sizes[2:] == [grams] * 3
    assert sum(sizes[:2]) < grams


def test_a_gather_would_be_found():
    mesh = jax.make_mesh((DEVICES,), ("fsdp",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, P())

    def step(grads, state, params):
        params = jax.lax.with_sharding_constraint(params, whole)
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(lambda p, u: p + u, params, updates), state

    tx = transforms.scale_components()
    params = place(draw_params(), mesh)
    text = jax.jit(step).lower(params, tx.init(params), params).compile().as_text()
    assert set(gathered(text)) == {"all-gather"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", [P(None, "seq", None), P("data", "seq", None)])
def test_linear_moves_no_activations(mode, spec):
    """Sequences may be sharded, as for long contexts."""
    mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(MODES[mode],) * 2)
    with jax.set_mesh(mesh):
        x = jax.device_put(np.ones((4, 8, 16), np.float32), NamedSharding(mesh, spec))
        w = spectral.init(jax.random.key(0), 16, 24, 4)
        w = jax.device_put(w, NamedSharding(mesh, P()))
        compiled = jax.jit(spectral.linear).lower(x, w).compile()
        y = compiled(x, w)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, spec), y.ndim)
    moving = ("all-gather", "all-reduce", "all-to-all", "collective")
    assert not [
        op for op, _ in instructions(compiled.as_text()) if op.startswith(moving)
    ]


LAYERWISE_CHAINS = {
    "sct": lambda: optimizers.sct(RATE, max_update_norm=MAX_NORM, retraction="qr"),
    "sct, polar": lambda: optimizers.sct(RATE, retraction="polar"),
    "sct, svd": lambda: optimizers.sct(RATE, retraction="svd"),
    "tsvd": lambda: optimizers.tsvd(RATE, retraction="none"),
    "stiefel_muon": lambda: optimizers.stiefel_muon(RATE, retraction="none"),
    "spectron": lambda: optimizers.spectron(RATE),
}


@pytest.mark.parametrize("name", LAYERWISE_CHAINS)
def test_layers_may_be_divided_by_shard_map(name):
    """As in a pipeline: each device updates its own layers."""
    tx = LAYERWISE_CHAINS[name]()
    params, (grads, *_) = start(name)
    params, grads = params["stack"], grads["stack"]
    expected = make_step(tx)(grads, tx.init(params), params)[0]
    mesh = jax.make_mesh(
        (2,), ("pipe",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
    )

    def step(grads, params):
        updates, _ = tx.update(grads, tx.init(params), params)
        return jax.tree.map(lambda p, u: p + u, params, updates)

    divided = jax.shard_map(
        step, mesh=mesh, in_specs=(P("pipe"), P("pipe")), out_specs=P("pipe")
    )
    found = jax.jit(divided)(grads, params)
    # Compare W: rounding decides singular vectors of nearly equal values.
    found, expected = map(spectral.to_dense, (found, expected))
    np.testing.assert_allclose(found, expected, atol=16 * EPS)
