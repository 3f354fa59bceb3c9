import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from sct_jax import losses

EPS = float(np.finfo(np.float32).eps)
loss = jax.jit(losses.next_token_cross_entropy, static_argnames="z_loss")


def example(shape, vocab_size=11, scale=3.0):
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=scale, size=(*shape, vocab_size)).astype(np.float32)
    targets = rng.integers(vocab_size, size=shape).astype(np.int32)
    mask = rng.integers(1, 3, size=shape).astype(np.float32)
    mask[..., 0] = 0
    return logits, targets, mask


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_matches_float64(shape, masked, z_loss):
    logits, targets, mask = example(shape)
    mask = mask if masked else None
    found = loss(logits, targets, mask=mask, z_loss=z_loss)
    expected = reference.next_token_cross_entropy(logits, targets, mask, z_loss)
    np.testing.assert_allclose(found, expected, rtol=16 * EPS)


def test_only_the_proportions_of_the_weights_count():
    logits, targets, mask = example((2, 5))
    found = loss(logits, targets, mask=mask * np.float32(0.01))
    expected = reference.next_token_cross_entropy(logits, targets, mask)
    np.testing.assert_allclose(found, expected, rtol=16 * EPS)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    found = loss(jnp.zeros((2, 3, 7)), jnp.ones((2, 3), jnp.int32))
    np.testing.assert_allclose(found, np.log(7), rtol=2 * EPS)


def test_an_all_zero_mask_gives_zero_and_a_finite_gradient():
    logits, targets, mask = example((2, 5))
    value, grad = jax.value_and_grad(loss)(logits, targets, mask=0 * mask)
    assert value == 0
    np.testing.assert_array_equal(grad, np.zeros_like(logits))


def test_masked_positions_have_no_gradient():
    logits, targets, mask = example((2, 5))
    grad = jax.grad(loss)(logits, targets, mask=mask)
    np.testing.assert_array_equal(grad[:, 0], np.zeros_like(logits[:, 0]))
    assert np.all(np.max(np.abs(grad[:, 1:]), axis=-1) > 0)


def test_huge_logits_stay_finite():
    logits, targets, _ = example((2, 5))
    found = loss(logits * np.float32(1e30), targets)
    expected = reference.next_token_cross_entropy(logits * np.float32(1e30), targets)
    np.testing.assert_allclose(found, expected, rtol=16 * EPS)


def test_low_precision_logits_are_summed_in_float32():
    logits, targets, _ = example((2, 5))
    low = jnp.asarray(logits, jnp.bfloat16)
    found = loss(low, targets)
    assert found.dtype == jnp.float32
    expected = reference.next_token_cross_entropy(low.astype(jnp.float32), targets)
    np.testing.assert_allclose(found, expected, rtol=16 * EPS)


# --- positions that do not count -------------------------------------------------


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ignored", [-100, -1, np.iinfo(np.int32).min])
def test_a_negative_target_is_a_zero_of_the_mask(ignored, masked, z_loss):
    logits, targets, mask = example((2, 5))
    mask = mask if masked else np.ones_like(mask)
    out = np.zeros_like(targets, bool)
    out[0, 2] = out[1, 4] = True
    grad = jax.value_and_grad(loss)
    found = grad(
        logits,
        np.where(out, ignored, targets),
        mask=mask if masked else None,
        z_loss=z_loss,
    )
    expected = grad(logits, targets, mask=np.where(out, 0, mask), z_loss=z_loss)
    np.testing.assert_allclose(found[0], expected[0], rtol=4 * EPS)
    np.testing.assert_allclose(found[1], expected[1], rtol=8 * EPS, atol=EPS / 100)
    np.testing.assert_array_equal(found[1][out], 0)


def test_no_target_at_all_gives_zero():
    logits, targets, _ = example((2, 5))
    value, grad = jax.value_and_grad(loss)(logits, np.full_like(targets, -100))
    assert value == 0
    np.testing.assert_array_equal(grad, np.zeros_like(logits))


@pytest.mark.parametrize("spoilt", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("by", ["mask", "target"])
def test_logits_of_other_positions_do_not_matter(by, z_loss, spoilt):
    logits, targets, mask = example((2, 5))
    out = mask == 0
    bad_logits = np.where(out[..., None], np.float32(spoilt), logits)
    if by == "target":
        targets, mask = np.where(out, -100, targets), None
    grad = jax.value_and_grad(loss)
    found = grad(bad_logits, targets, mask=mask, z_loss=z_loss)
    expected = grad(logits, targets, mask=mask, z_loss=z_loss)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.all(np.isfinite(found[1]))
    # Forward mode too, and in bfloat16.
    low = jnp.asarray(bad_logits, jnp.bfloat16)
    of_low = lambda x: loss(x, targets, mask=mask, z_loss=z_loss)
    value, slope = jax.jvp(of_low, (low,), (low,))
    assert np.isfinite(value)
    assert np.isfinite(slope)


def test_targets_of_masked_positions_do_not_matter():
    logits, targets, mask = example((2, 5))
    beyond = np.where(mask == 0, 11, targets)
    grad = jax.value_and_grad(loss)
    jax.tree.map(
        np.testing.assert_array_equal,
        grad(logits, beyond, mask=mask),
        grad(logits, targets, mask=mask),
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("beyond", [11, 12, 2**31 - 1])
def test_a_target_beyond_the_vocabulary_never_passes(beyond, masked):
    logits, targets, mask = example((2, 5))
    targets[1, 3] = beyond
    mask = mask if masked else None
    value, grad = jax.value_and_grad(loss)(logits, targets, mask=mask)
    assert np.isnan(value)
    assert np.all(np.isnan(grad[1, 3]))


@pytest.mark.parametrize("weight", [-1.0, np.nan])
def test_a_weight_without_a_meaning_never_passes(weight):
    logits, targets, mask = example((2, 5))
    mask[0, 2] = weight
    value, grad = jax.value_and_grad(loss)(logits, targets, mask=mask)
    assert np.isnan(value)
    assert np.all(np.isnan(grad[0, 2]))


@pytest.mark.parametrize("z_loss", [-1e-4, np.nan, np.inf])
def test_a_z_loss_without_a_meaning_is_refused(z_loss):
    with pytest.raises(ValueError, match="z_loss must be"):
        loss(*example((5,))[:2], z_loss=z_loss)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8, jnp.bool_])
def test_the_mask_may_have_any_dtype(dtype):
    """3,001 ones: no format of few bits can count them."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3001, 4)).astype(np.float32)
    targets = rng.integers(4, size=3001).astype(np.int32)
    wide = logits.astype(np.float64)
    nats = np.log(np.sum(np.exp(wide), -1)) - wide[np.arange(3001), targets]
    for mask in (np.ones(3001), np.arange(3001) % 2):
        found = loss(logits, targets, mask=jnp.asarray(mask, dtype))
        np.testing.assert_allclose(found, nats[mask == 1].mean(), rtol=16 * EPS)


def test_the_plain_loss_is_the_mean_of_optax():
    logits, targets, _ = example((2, 3, 5))

    def mean(logits):
        return jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        )

    found = jax.value_and_grad(loss)(logits, targets)
    expected = jax.jit(jax.value_and_grad(mean))(logits)
    np.testing.assert_allclose(found[0], expected[0], rtol=4 * EPS)
    np.testing.assert_allclose(found[1], expected[1], rtol=8 * EPS, atol=EPS / 100)


def test_no_axis_is_added_by_itself():
    logits, targets, mask = example((2, 5))
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(jax.grad(loss), logits, targets, mask=mask)


# --- From the hidden state, by chunks.


def head(params, x):
    return (x @ params["w"] + params["b"]).astype(jnp.float32)


def hidden_example(shape=(3, 10), width=5, vocab_size=11):
    rng = np.random.default_rng(3)
    normal = lambda *size: jnp.asarray(rng.normal(size=size), jnp.float32)
    params = {"w": normal(width, vocab_size), "b": normal(vocab_size)}
    targets = rng.integers(-3, vocab_size, size=shape).astype(np.int32)
    mask = rng.integers(0, 3, size=shape).astype(np.float32)
    return params, normal(*shape, width), jnp.asarray(targets), jnp.asarray(mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [1, 6, 7, 12, 30, 1000])
def test_chunks_give_the_loss_and_gradient_of_all_logits(masked, z_loss, tokens):
    params, x, targets, mask = hidden_example()
    options = {"mask": mask if masked else None, "z_loss": z_loss}

    def plain(params, x):
        return losses.next_token_cross_entropy(head(params, x), targets, **options)

    def chunked(params, x):
        return losses.head_cross_entropy(
            head, params, x, targets, tokens_per_chunk=tokens, **options
        )

    wanted, expected = jax.value_and_grad(plain, (0, 1))(params, x)
    found, got = jax.jit(jax.value_and_grad(chunked, (0, 1)))(params, x)
    np.testing.assert_allclose(found, wanted, rtol=16 * EPS)
    np.testing.assert_allclose(chunked(params, x), wanted, rtol=16 * EPS)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=32 * EPS)


@pytest.mark.parametrize("tokens", [1, 4, 1000])
def test_shards_give_the_loss_and_gradient_of_the_whole(tokens):
    params, x, targets, mask = hidden_example((6, 10))

    def whole(params, x):
        return losses.next_token_cross_entropy(head(params, x), targets, mask=mask)

    def by_shards(params, x):
        copies = jax.tree.map(lambda p: jnp.broadcast_to(p, (3, *p.shape)), params)
        return losses.head_cross_entropy(
            head, copies, x, targets, mask=mask, tokens_per_chunk=tokens, row_shards=3
        )

    found = jax.jit(jax.value_and_grad(by_shards, (0, 1)))(params, x)
    expected = jax.jit(jax.value_and_grad(whole, (0, 1)))(params, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=64 * EPS, atol=64 * EPS)


@pytest.mark.parametrize("shards", [0, 2])
def test_shards_that_do_not_divide_the_batch_are_refused(shards):
    params, x, targets, _ = hidden_example()
    with pytest.raises(ValueError, match=f"^{shards} row shards must divide .* 3"):
        losses.head_cross_entropy(head, params, x, targets, row_shards=shards)


def test_chunks_ignore_nan_where_nothing_counts():
    params, x, targets, _ = hidden_example()
    x = jnp.where((targets < 0)[..., None], jnp.nan, x)
    loss_of = lambda p, x: losses.head_cross_entropy(head, p, x, targets)
    value, grads = jax.value_and_grad(loss_of, (0, 1))(params, x)
    assert np.isfinite(value)
    assert not np.isnan(np.asarray(grads[1])[targets < 0]).any()


def test_a_chunk_keeps_the_dtypes():
    params, x, targets, _ = hidden_example()
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    loss_of = lambda p, x: losses.head_cross_entropy(head, p, x, targets)
    grads = jax.grad(loss_of, (0, 1))(low, x)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, (low, x))
    assert {g.dtype for g in jax.tree.leaves(grads[0])} == {jnp.dtype(jnp.bfloat16)}
    assert grads[1].dtype == x.dtype


def test_sizes_of_chunks_without_a_meaning_are_refused():
    params, x, targets, _ = hidden_example()
    with pytest.raises(ValueError, match="tokens_per_chunk must be"):
        losses.head_cross_entropy(head, params, x, targets, tokens_per_chunk=0)
