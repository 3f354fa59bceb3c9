"""Attention against float64, forward and backward, whatever computes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from sct_jax import attention

DOCUMENTS = ("none", "one each", "some")


def example(length, *, heads=(6, 2), size=8, batch=2, dtype=jnp.float32):
    rng = np.random.default_rng(length)
    shapes = [(batch, length, count, size) for count in (heads[0], heads[1], heads[1])]
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def segments(length, kind, batch=2):
    if kind == "none":
        return None
    rng = np.random.default_rng(length)
    ids = np.sort(rng.integers(5, size=(batch, length)), axis=1)
    if kind == "one each":
        ids = np.tile(np.arange(length), (batch, 1))
    return jnp.asarray(ids, jnp.int32)


def exact(q, k, v, segment_ids):
    """Attention, and the function that pulls its gradient back, in float64."""
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    length, repeats = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, repeats, axis=2) for x in (k, v))
    scores = np.einsum("blhk,bmhk->bhlm", q, k) / np.sqrt(q.shape[-1])
    seen = np.tril(np.ones((length, length), bool))[None]
    if segment_ids is not None:
        ids = np.asarray(segment_ids)
        seen = seen & (ids[:, :, None] == ids[:, None, :])
    scores = np.where(seen[:, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)

    def pull_back(d_out):
        d_out = np.asarray(d_out, np.float64)
        dv = np.einsum("bhlm,blhk->bmhk", p, d_out)
        dp = np.einsum("blhk,bmhk->bhlm", d_out, v)
        ds = p * (dp - np.sum(p * dp, -1, keepdims=True)) / np.sqrt(q.shape[-1])
        dq = np.einsum("bhlm,bmhk->blhk", ds, k)
        dk = np.einsum("bhlm,blhk->bmhk", ds, q)
        group = lambda x: x.reshape(*x.shape[:2], -1, repeats, x.shape[-1]).sum(3)
        return dq, group(dk), group(dv)

    return np.einsum("bhlm,bmhk->blhk", p, v), pull_back


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 16)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("implementation", attention.IMPLEMENTATIONS)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("length", [1, 7, 16, 17, 61])
def test_matches_float64_forward_and_backward(length, documents, implementation):
    operands, ids = example(length), segments(length, documents)
    wanted, pull_back = exact(*operands, ids)
    found, vjp = jax.vjp(
        lambda *x: attention.attend(*x, segment_ids=ids, implementation=implementation),
        *operands,
    )
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    d_out = jnp.asarray(np.random.default_rng(1).normal(size=found.shape), jnp.float32)
    for got, expected in zip(vjp(d_out), pull_back(d_out), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (1, 1), (8, 2)])
def test_groups_of_every_size(heads):
    operands = example(40, heads=heads)
    found = attention.attend(*operands)
    np.testing.assert_allclose(found, exact(*operands, None)[0], atol=2e-6)


@pytest.mark.usefixtures("small_blocks")
def test_bfloat16_stays_bfloat16_and_rounds_once():
    operands = example(50, dtype=jnp.bfloat16)
    found, vjp = jax.vjp(attention.attend, *operands)
    wanted, pull_back = exact(*operands, None)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=0.02)
    d_out = jnp.ones(found.shape, jnp.bfloat16)
    for got, expected in zip(vjp(d_out), pull_back(np.ones(found.shape)), strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=0.1)


@pytest.mark.usefixtures("small_blocks")
def test_scores_of_any_size_stay_finite():
    q, k, v = example(40)
    found, vjp = jax.vjp(attention.attend, q * 1e4, k * 1e4, v)
    assert np.isfinite(found).all()
    assert all(np.isfinite(x).all() for x in vjp(jnp.ones_like(found)))


def largest_array(function, *operands):
    """The most elements that an array of the jaxpr has, inner ones included."""
    jaxpr = jax.make_jaxpr(function)(*operands)
    return max(v.aval.size for e in reference.equations(jaxpr) for v in e.outvars)


def test_no_array_grows_with_the_square_of_the_length():
    operands = example(2048, heads=(2, 1), size=4, batch=1)
    gradient = lambda implementation: jax.grad(
        lambda x: jnp.sum(attention.attend(*x, implementation=implementation))
    )
    assert largest_array(gradient("xla"), operands) >= 2 * 2048**2
    assert largest_array(gradient("chunked"), operands) < 2048**2 / 8


def test_another_implementation_is_refused():
    with pytest.raises(ValueError, match="attention must be one of"):
        attention.attend(*example(4), implementation="flash")
