import jax
import jax.numpy as jnp
import numpy as np
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
