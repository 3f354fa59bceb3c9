import jax
import jax.numpy as jnp
import pytest

from sct_jax.training import liveness

SIZE = 4 * 64 * 64  # bytes of a matrix


def peak(function, *args, **options):
    return liveness.peak_bytes(jax.make_jaxpr(function)(*args), **options)


X = jax.ShapeDtypeStruct((64, 64), jnp.float32)


@pytest.mark.parametrize(
    ("function", "matrices"),
    [
        (lambda x: x @ x, 1),
        (lambda x: (x @ x) @ (x @ x), 3),
        (lambda x: jnp.sum(x * 2 + 1), 0),
        (lambda x: jnp.sum(jnp.exp(x @ x)), 1),
        (lambda x: (x + 1) @ x, 2),
        (lambda x: jnp.sin(x @ x) + 1, 1),  # overwrites the product
        (lambda x: (x.T @ x).reshape(-1), 1),
        (lambda x: jax.jit(lambda y: y @ y)(x), 1),
        (lambda x: (x @ x, x @ (x + 1))[0], 1),  # the second is dead
        (lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, length=9)[0], 2),
        (lambda x: jax.lax.scan(lambda c, _: (c, c @ x), x, length=9)[1], 10),
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: x), 1),
        (lambda x: jax.lax.fori_loop(0, 5, lambda _, c: c @ x, x), 2),
    ],
)
def test_the_most_that_exists_at_once(function, matrices):
    few = 16  # scalars
    assert matrices * SIZE <= peak(function, X) <= matrices * SIZE + few


def test_a_donated_argument_makes_room():
    step = lambda x, g: x - 0.1 * g
    assert peak(step, X, X) == SIZE
    assert peak(step, X, X, donated=1) == 0


def test_bfloat16_can_take_the_bytes_of_float32():
    half = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    assert peak(lambda x: x @ x, half) == SIZE // 2
    assert peak(lambda x: x @ x, half, widen=True) == SIZE


@pytest.mark.parametrize("length", [3, 30])
def test_what_a_loop_keeps_for_its_backward_pass(length):
    def loss(w, x):
        body = lambda c, _: (jnp.tanh(c @ w), None)
        return jnp.sum(jax.lax.scan(body, x, length=length)[0])

    # JAX keeps the carry and the result of tanh, and before 0.12 also 1 minus it.
    arrays = 3 if jax.__version_info__ < (0, 12) else 2
    kept = peak(jax.grad(loss), X, X) / SIZE
    assert arrays * length <= kept <= arrays * length + 6
