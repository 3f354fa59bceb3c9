"""Recomputing gives the values and gradients of keeping everything, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sct_jax import remat

EPS = np.finfo(np.float32).eps


def layers(num_layers=3, width=5):
    keys = jax.random.split(jax.random.key(0))
    return {
        "w": jax.random.normal(keys[0], (num_layers, width, width)) / 2,
        "b": jax.random.normal(keys[1], (num_layers, width)),
    }


def block(layer, x, shift, ids):
    h = jnp.tanh(x @ layer["w"].astype(x.dtype) + layer["b"].astype(x.dtype) + shift)
    return x + h if ids is None else x + h * ids[:, None].astype(x.dtype)


def x_of(dtype, rows=4, width=5):
    return jax.random.normal(jax.random.key(1), (rows, width)).astype(dtype)


@pytest.mark.parametrize("ids", [None, np.arange(4)], ids=["no ids", "ids"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layers_have_the_value_and_gradient_of_a_scan(dtype, ids):
    shift = jnp.full((5,), 0.5, dtype)
    ids = None if ids is None else jnp.asarray(ids)

    def plain(params, x):
        step = lambda x, layer: (block(layer, x, shift, ids), None)
        out = jax.lax.scan(step, x, params)[0]
        return jnp.sum(out.astype(jnp.float32) ** 2)

    def lean(params, x):
        out = remat.scan_layers(block, params, x, shift, ids)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    arguments = layers(), x_of(dtype)
    wanted = jax.jit(jax.value_and_grad(plain, (0, 1)))(*arguments)
    found = jax.jit(jax.value_and_grad(lean, (0, 1)))(*arguments)
    rtol = 32 * EPS if dtype == jnp.float32 else 0.02
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())
    np.testing.assert_allclose(lean(*arguments), wanted[0], rtol=rtol)


def test_layers_keep_their_inputs_alone():
    params, x = layers(7), x_of(jnp.bfloat16, rows=11)
    shift = jnp.zeros((5,), jnp.bfloat16)
    pull_back = jax.eval_shape(
        lambda *a: jax.vjp(
            lambda p, x: remat.scan_layers(block, p, x, shift, None), *a
        )[1],
        params,
        x,
    )
    kept = [leaf.shape for leaf in jax.tree.leaves(pull_back) if leaf.ndim == 3]
    assert sorted(kept) == [(7, 5, 5), (7, 11, 5)]


@pytest.mark.parametrize(
    ("tokens", "shards"),
    [(1, 1), (6, 1), (7, 1), (20, 1), (33, 1), (100, 1), (1, 3), (2, 3), (20, 3)],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_chunks_have_the_value_and_gradient_of_the_whole(dtype, tokens, shards):
    params = {"up": jnp.ones((5, 9)) / 3, "down": jnp.ones((9, 5)) / 3}
    x = x_of(dtype, rows=33).reshape(3, 11, 5)

    def fn(params, x):
        w = {name: p.astype(x.dtype) for name, p in params.items()}
        return x + jnp.tanh(x @ w["up"]) @ w["down"]

    def total(out):
        weight = jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape)
        return jnp.mean(out.astype(jnp.float32) * weight)

    plain = lambda params, x: total(fn(params, x))
    lean = lambda params, x: total(
        remat.by_chunks(fn, params, x, tokens_per_chunk=tokens, row_shards=shards)
    )
    wanted = jax.jit(jax.value_and_grad(plain, (0, 1)))(params, x)
    found = jax.jit(jax.value_and_grad(lean, (0, 1)))(params, x)
    rtol = 32 * EPS if dtype == jnp.float32 else 0.02
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


def test_gradients_of_many_chunks_are_summed_in_float32():
    """Where the parameters are of lower precision, as under fsdp."""
    x = x_of(jnp.bfloat16, rows=512).reshape(1, 512, 5)
    w = jnp.asarray(np.random.default_rng(1).normal(size=(5, 5)), jnp.bfloat16)
    fn = lambda w, x: jnp.tanh(x @ w)

    def total(w, x):
        out = remat.by_chunks(fn, w, x, tokens_per_chunk=2)
        return jnp.sum(out.astype(jnp.float32))

    gradient = jax.jit(jax.grad(total))
    parts = [gradient(w, x[:, i : i + 2]) for i in range(0, 512, 2)]
    wanted = sum(np.asarray(part, np.float64) for part in parts)
    found = gradient(w, x)
    assert found.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(found, np.float64) - wanted)
    assert error < 1e-2 * np.linalg.norm(wanted)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_packing_changes_no_bit(dtype):
    x = jnp.asarray([0.0, -0.0, 1.5, -3e4, jnp.inf]).astype(dtype)
    again = remat.unpack(remat.pack(x), dtype)
    assert again.dtype == dtype
    np.testing.assert_array_equal(
        np.asarray(again).view(np.uint8), np.asarray(x).view(np.uint8)
    )
