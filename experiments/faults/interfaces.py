"""Calls that meet what they do not expect: odd dtypes, masks, split weights, NaN."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.faults import cases, matrices, runs
from sct_jax import flax_layers, losses, optimizers, rank, spectral, transforms


def _integers(context: cases.Context) -> cases.Outcome:
    seen, rng = cases.Seen(), matrices.generator(context)
    w = matrices.factors(rng, [2.0, -1.0, 0.5], (12, 9))
    layer = flax_layers.SpectralDense(9, rank=3)
    variables = layer.init(jax.random.key(0), jnp.ones((2, 12)))
    for dtype in (np.int32, np.uint8, np.bool_):
        x = rng.integers(0, 2 if dtype == np.bool_ else 50, size=(4, 12)).astype(dtype)
        real = x.astype(np.float32)
        for name, function in (
            ("linear", lambda x: spectral.linear(x, w)),
            ("SpectralDense", lambda x: layer.apply(variables, x)),
        ):
            found, wanted = (np.asarray(function(jnp.asarray(y))) for y in (x, real))
            seen.that(
                np.any(wanted) and np.array_equal(found, wanted),
                "the product of the same numbers as floats",
                f"{name}, {np.dtype(dtype)}",
            )
    return seen.outcome("int32, uint8 and bool through linear and SpectralDense")


def _losses(context: cases.Context) -> cases.Outcome:
    seen, rng = cases.Seen(), matrices.generator(context)
    logits = rng.normal(size=(4, 9, 11))
    targets = rng.integers(0, 11, size=(4, 9))
    ignored = rng.random(targets.shape) < 0.4
    shifted = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
    nats = -np.take_along_axis(shifted, targets[..., None], -1)[..., 0]
    wanted = float(np.mean(nats[~ignored]))
    loss = losses.next_token_cross_entropy
    given = jnp.asarray(logits, jnp.float32)
    found = float(loss(given, jnp.asarray(np.where(ignored, -100, targets))))
    seen.that(abs(found - wanted) < 1e-5, "targets of -100 are ignored", found)
    spoiled = jnp.where(ignored[..., None], jnp.nan, given)
    mask = jnp.asarray(~ignored, jnp.float32)
    value, gradient = jax.value_and_grad(
        lambda x: loss(x, jnp.asarray(targets), mask=mask)
    )(spoiled)
    seen.that(
        abs(float(value) - wanted) < 1e-5, "NaN where the mask is 0 is too", value
    )
    seen.that(matrices.is_finite(gradient), "with a finite gradient")
    ones = jnp.ones((1, 3001), jnp.bfloat16)
    even = float(loss(jnp.zeros((1, 3001, 4)), jnp.zeros((1, 3001), int), mask=ones))
    seen.that(abs(even - math.log(4)) < 1e-5, "sums of a bfloat16 mask", even)
    return seen.outcome(
        "targets of -100, NaN logits under a mask, a bfloat16 mask of 3,001 ones"
    )


def _resized_beside(context: cases.Context) -> cases.Outcome:
    seen, rng = cases.Seen(), matrices.generator(context)
    w = lambda: matrices.factors(rng, [2.0, -1.0, 0.5, 0.1], (12, 9))
    params = {"kernel": w(), "mu": {"kernel": w()}}
    tx = optimizers.tsvd(1e-2)
    grads = [
        matrices.as_float32(jax.tree.map(lambda x: rng.normal(size=x.shape), params))
        for _ in range(3)
    ]
    params, state = matrices.steps(tx, params, grads)
    new = rank.resize(
        params,
        state,
        active={"mu/kernel": 2},
        ranks={"mu/kernel": 3},
        key=jax.random.key(0),
    )
    before, after = (dict(_named(tree)) for tree in ((params, state), new))
    seen.that(before.keys() == after.keys(), "the same structure")
    resized = beside = 0
    for name, x in before.items():
        y = after.get(name)
        if "['mu']" in name and x.ndim:
            resized += 1
            seen.that(y is not None and y.shape[-1] == 3, "it is resized", name)
        else:
            beside += 1
            same = y is not None and np.array_equal(x, y)
            seen.that(same, "all else is unchanged", name)
    cases.injected(resized >= 9 and beside >= 9, f"{resized} and {beside} arrays")
    return seen.outcome('the weight "mu/kernel" resized beside one called "kernel"')


def _named(tree: Any) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path), np.asarray(leaf)


def _split_weights(context: cases.Context) -> cases.Outcome:
    seen, rng = cases.Seen(), matrices.generator(context)
    params = {"w": matrices.factors(rng, [2.0, -1.0, 0.5], (12, 9))}
    factors = spectral.SpectralFactors
    for name, chain in (
        ("sct", optimizers.sct(1e-2)),
        ("stiefel_muon", optimizers.stiefel_muon(1e-2)),
    ):
        parts: dict[Any, optax.GradientTransformation] = {
            "a": chain,
            "b": optax.sgd(1e-2),
        }
        split = optax.partition(parts, {"w": factors("a", "b", "a")})  # pyright: ignore
        seen.raises("split", lambda tx=split: tx.init(params))
        mask = {"w": factors(True, False, True)}  # pyright: ignore
        masked = optax.masked(chain, mask)
        seen.raises("split", lambda tx=masked: tx.init(params))
        flat = optax.flatten(chain)
        seen.raises("optax.flatten", lambda tx=flat: tx.init(params))
        whole = optax.partition(parts, {"w": "a"})
        new, _ = matrices.steps(whole, params, [params])
        error = matrices.orthonormality_error(new["w"].u)
        seen.that(error < 1e-5, "a whole weight is accepted", f"{name}: {error}")
    return seen.outcome("u, s and v of one weight in two partitions, masked, flattened")


def _impossible_numbers(context: cases.Context) -> cases.Outcome:
    seen = cases.Seen()
    clip = transforms.clip_by_composite_spectral_norm
    for value in (math.nan, -1.0, jnp.float32(math.nan), jnp.float32(-1), np.inf):
        seen.raises("max_norm", lambda value=value: clip(value))
        seen.raises(
            "max_update_norm",
            lambda value=value: optimizers.sct(1e-3, max_update_norm=value),
        )
    fractions: tuple[Any, ...] = (2.5, 0, -1)
    for value in fractions:
        seen.raises(
            "retraction_every",
            lambda value=value: optimizers.tsvd(1e-3, retraction_every=value),
        )
    fields = {
        "optimizer.peak_learning_rate": "1e300",
        "model.rope_theta": "1e-320",
        "optimizer.max_update_norm": "nan",
        "optimizer.weight_decay": "-1",
    }
    for name, value in fields.items():
        flags = context.space.flags(context.folder / "run", {name: value})
        seen.refused(runs.call(*flags, "--dry-run"), name)
    given = ", ".join(f"{name}={value}" for name, value in fields.items())
    return seen.outcome(
        f"bounds of NaN, -1 and inf, as numbers and arrays; retraction_every 2.5, 0 "
        f"and -1; {given}"
    )


CASES = (
    cases.Case(
        30,
        "a weight resized beside one whose name ends alike",
        "moments of the other one are unchanged",
        _resized_beside,
        group="numerics",
    ),
    cases.Case(
        31,
        "integers and booleans as input of a layer",
        "promoted as dense layers do",
        _integers,
        group="numerics",
        quick=True,
    ),
    cases.Case(
        33,
        "targets of -100, NaN under a mask, a bfloat16 mask",
        "ignored positions never matter; sums in float32",
        _losses,
        group="numerics",
        quick=True,
    ),
    cases.Case(
        35,
        "a weight split by partition, masked or flatten",
        "an error when the chain is initialised",
        _split_weights,
        group="numerics",
    ),
    cases.Case(
        36,
        "hyperparameters of NaN, below zero, fractional or beyond float32",
        "refused by name",
        _impossible_numbers,
        group="numerics",
        quick=True,
    ),
)
