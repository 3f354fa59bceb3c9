"""Block-spectral weights, from a single product to trained and exported models."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import samples

from sct_jax import errors, model, optimizers, spectral, transforms

EPS = float(np.finfo(np.float32).eps)
ORTHONORMAL = 1e-5

# (blocks, fan_in, fan_out, rank); in the last two, blocks do not divide the rank.
SHAPES = [(1, 12, 9, 4), (2, 12, 8, 4), (4, 32, 48, 8), (3, 12, 15, 4), (4, 16, 20, 2)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
even_shape = pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
CONFIG = dataclasses.replace(samples.SMALL, num_blocks=4)


def draw(shape, *, seed=0, layers=(), **options):
    blocks, fan_in, fan_out, rank = shape
    return spectral.init_blocks(
        jax.random.key(seed),
        fan_in,
        fan_out,
        rank,
        blocks=blocks,
        layers=layers,
        **options,
    )


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_close(found, expected, tolerance):
    """Every array to `tolerance` of its largest entry."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        y = np.asarray(y, np.float64)
        size = np.max(np.abs(y), initial=EPS)
        np.testing.assert_allclose(np.asarray(x) / size, y / size, atol=tolerance)


def dense_difference(new, old):
    return np.linalg.norm(reference.block_dense(*new) - reference.block_dense(*old), 2)


# --- products --------------------------------------------------------------------


@each_shape
def test_w_is_that_of_the_definition(shape):
    w = draw(shape)
    assert_close(spectral.to_dense(w), reference.block_dense(*w), 8 * EPS)


def test_layers_are_separate():
    w = draw(SHAPES[2], layers=(2, 3))
    alone = jax.tree.map(lambda x: x[1, 2], w)
    assert_close(spectral.to_dense(w)[1, 2], reference.block_dense(*alone), 8 * EPS)


@each_shape
def test_linear_multiplies_by_w(shape):
    w, x = draw(shape), normal(2, 5, shape[1])
    expected = np.asarray(x, np.float64) @ reference.block_dense(*w)
    assert_close(spectral.linear(x, w), expected, 16 * EPS)
    assert_close(spectral.linear(x, w, flatten_rows=True), expected, 16 * EPS)
    assert_close(spectral.expand(spectral.contract(x, w), w), expected, 16 * EPS)


@each_shape
def test_gradients_are_those_of_the_dense_product(shape):
    w, x, dy = draw(shape), normal(7, shape[1]), normal(7, shape[2], seed=1)
    loss = lambda w, x: jnp.sum(spectral.linear(x, w) * dy)
    dw, dx = jax.grad(loss, (0, 1))(w, x)
    g = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
    assert_close(tuple(dw), reference.block_gradients(*w, g), 32 * EPS)
    dense = reference.block_dense(*w)
    assert_close(dx, np.asarray(dy, np.float64) @ dense.T, 16 * EPS)


def test_linear_computes_in_the_dtype_of_x():
    w, x = draw(SHAPES[2]), normal(5, 32)
    y = spectral.linear(x.astype(jnp.bfloat16), w)
    assert y.dtype == jnp.bfloat16
    assert_close(y.astype(jnp.float32), spectral.linear(x, w), 2**-5)


def test_linear_never_builds_w_nor_a_block_diagonal():
    w, x = draw((4, 40, 56, 6)), normal(13, 40)
    loss = lambda w, x: jnp.sum(spectral.linear(x, w) ** 2)
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(w, x)
    found = {
        tuple(getattr(variable.aval, "shape", ()))
        for equation in reference.equations(jaxpr)
        for variable in equation.outvars
    }
    for sides in ((40, 56), (40, 24), (56, 24)):
        assert not {sides, sides[::-1]} & found
    assert (10, 6) in found  # the walk sees products


@even_shape
def test_the_transpose_is_of_the_same_form(shape):
    w = draw(shape, layers=(2,))
    turned = spectral.transpose(w)
    assert spectral.is_blocks(turned)
    expected = np.swapaxes(spectral.to_dense(w), -1, -2)
    assert_close(spectral.to_dense(turned), expected, 8 * EPS)
    assert spectral.orthonormality_error(turned) < ORTHONORMAL
    jax.tree.map(np.testing.assert_array_equal, spectral.transpose(turned), w)


def test_an_uneven_shuffle_has_no_transpose():
    with pytest.raises(ValueError, match="rank 2 must be a multiple of the 4 blocks"):
        spectral.transpose(draw(SHAPES[4]))


def test_a_lookup_is_refused():
    with pytest.raises(TypeError, match="keep the embedding plain"):
        spectral.lookup(jnp.arange(3), draw(SHAPES[2]))


@each_shape
def test_s_by_block_of_the_input_and_back(shape):
    w = draw(shape, layers=(2,))
    by_input = spectral.feeding_s(w.s)
    blocks, rank = shape[0], shape[3]
    for i in range(blocks):
        for r in range(rank):
            j, q = divmod(r * blocks + i, rank)
            np.testing.assert_array_equal(by_input[:, i, r], w.s[:, j, q])
    np.testing.assert_array_equal(spectral.fed_s(by_input), w.s)


# --- initial values and projection -----------------------------------------------


@each_shape
def test_singular_values_are_s(shape):
    w = draw(shape)
    found = np.linalg.svd(reference.block_dense(*w), compute_uv=False)
    expected = np.sort(np.abs(np.asarray(w.s)).ravel())[::-1]
    assert_close(found[: expected.size], expected, 16 * EPS)
    assert spectral.orthonormality_error(w) < ORTHONORMAL


def test_the_spectrum_is_that_of_a_gaussian():
    w = draw((4, 64, 64, 16), scale=0.5)
    expected = 0.5 * reference.gaussian_singular_values(64, 64, draws=20)
    found = np.sort(np.asarray(w.s).ravel())[::-1]
    # Quantiles omit fluctuations of O(1 / 64), most of them at the edges.
    np.testing.assert_allclose(found, expected, atol=0.02)


@pytest.mark.parametrize(
    ("shape", "rescale"), [((4, 64, 96, 16), False), ((4, 64, 96, 5), True)]
)
def test_outputs_have_the_mean_square_of_the_dense_layer(shape, rescale):
    w = draw(shape, scale=0.5, rescale=rescale)
    squares = np.sum(np.square(reference.block_dense(*w)))
    np.testing.assert_allclose(squares, 0.25 * shape[2], rtol=5e-3)


def test_every_block_gets_values_from_the_whole_spectrum():
    w = draw((4, 64, 64, 16))
    for s in (w.s, spectral.feeding_s(w.s)):
        sizes = np.sqrt(np.mean(np.square(s), axis=-1))
        np.testing.assert_allclose(sizes, np.mean(sizes), rtol=0.05)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 32, 48, 4), "blocks must divide fan_in 32 and fan_out 48, got 3"),
        ((0, 32, 48, 4), "blocks must divide"),
        ((4, 32, 48, 9), "rank must be in 1..8 for shape .32, 48. in 4 blocks, got 9"),
        ((4, 32, 48, 0), "rank must be in 1..8"),
    ],
)
def test_impossible_blocks_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        draw(shape)


@even_shape
def test_the_projection_recovers_a_block_spectral_matrix(shape):
    blocks, _, _, rank = shape
    dense = spectral.to_dense(draw(shape, layers=(2,)))
    found = spectral.blocks_from_dense(dense, blocks=blocks, rank=rank)
    assert spectral.orthonormality_error(found) < ORTHONORMAL
    assert_close(spectral.to_dense(found), dense, 128 * EPS)


def test_the_projection_never_gets_worse_by_more_sweeps():
    dense = normal(32, 48)
    error = lambda sweeps: float(
        jnp.linalg.norm(
            dense
            - spectral.to_dense(
                spectral.blocks_from_dense(dense, blocks=4, rank=8, sweeps=sweeps)
            )
        )
    )
    errors_found = [error(sweeps) for sweeps in (0, 1, 2, 8)]
    assert errors_found[0] < np.linalg.norm(dense)
    assert all(y < x for x, y in itertools.pairwise(errors_found))


def test_the_projection_takes_a_matrix_of_lower_rank():
    dense = jnp.zeros((16, 16)).at[0, 0].set(2.0)
    found = spectral.blocks_from_dense(dense, blocks=4, rank=4)
    assert spectral.orthonormality_error(found) < ORTHONORMAL
    assert_close(spectral.to_dense(found), dense, 64 * EPS)


# --- the norm of a change ---------------------------------------------------------


def moved(w, size, *, parts="usv", seed=1):
    new = {
        name: getattr(w, name) + size * normal(*getattr(w, name).shape, seed=seed + i)
        for i, name in enumerate(parts)
    }
    return spectral.retract(w._replace(**new))


@each_shape
@pytest.mark.parametrize("size", [1e-3, 0.1, 100.0])
def test_the_norm_is_a_bound_within_a_factor_of_two(shape, size):
    w = draw(shape)
    new = moved(w, size)
    exact = dense_difference(new, w)
    bound = spectral.composite_update_norm(w, new)
    assert exact * (1 - 1e-4) <= bound <= 2 * exact


@each_shape
@pytest.mark.parametrize("parts", ["us", "v"])
def test_the_norm_is_exact_where_one_side_changes(shape, parts):
    w = draw(shape)
    new = w._replace(**{p: getattr(moved(w, 0.1, parts=parts), p) for p in parts})
    bound = spectral.composite_update_norm(w, new)
    np.testing.assert_allclose(bound, dense_difference(new, w), rtol=1e-4)


def test_norms_of_layers_and_trees():
    stack = draw(SHAPES[2], layers=(3,))
    new = jax.vmap(lambda w: moved(w, 0.1))(stack)
    norms = spectral.composite_update_norm(stack, new)
    alone = [
        spectral.composite_update_norm(*jax.tree.map(lambda x, i=i: x[i], (stack, new)))
        for i in range(3)
    ]
    np.testing.assert_allclose(norms, alone, rtol=1e-4)
    plain = spectral.init(jax.random.key(0), 6, 5, 2)
    largest = spectral.max_composite_update_norm(
        {"a": plain, "b": stack}, {"a": plain, "b": new}
    )
    np.testing.assert_allclose(largest, jnp.max(norms), rtol=1e-4)


# --- chains -----------------------------------------------------------------------

CHAINS = {
    "sct": lambda **options: optimizers.sct(0.05, eps=1e-4, **options),
    "stiefel_muon": lambda **options: optimizers.stiefel_muon(
        0.05, eps=1e-4, **options
    ),
}


def gradients_of(step, shape):
    return np.asarray(normal(*shape[1:3], seed=10 + step), np.float64)


def run(tx, w, shape, steps=10):
    """The factors after each step."""
    update = jax.jit(tx.update)
    state, history = tx.init(w), []
    for step in range(steps):
        grads = reference.block_gradients(*w, gradients_of(step, shape))
        grads = type(w)(*(jnp.asarray(g, jnp.float32) for g in grads))
        updates, state = update(grads, state, w)
        w = optax.apply_updates(w, updates)
        history.append(w)
    return history


@pytest.mark.parametrize("shape", SHAPES[2:4], ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_ten_steps_are_those_of_the_reference(name, shape):
    w = draw(shape)
    if name == "sct":
        expected = reference.sct(
            {"w": w._asdict()},
            lambda step, params: {
                "w": dict(
                    zip(
                        "usv",
                        reference.block_gradients(
                            **params["w"], g=gradients_of(step, shape)
                        ),
                        strict=True,
                    )
                )
            },
            [0.05] * 10,
            eps=1e-4,
        )
        expected = [tuple(params["w"][name] for name in "usv") for params in expected]
    else:
        expected = reference.stiefel_muon(
            *w,
            lambda step, *usv: reference.block_gradients(
                *usv, gradients_of(step, shape)
            ),
            [0.05] * 10,
            eps=1e-4,
        )
    for found, wanted in zip(run(CHAINS[name](), w, shape), expected, strict=True):
        assert isinstance(found, spectral.BlockSpectralFactors)
        # Adam and Newton-Schulz amplify rounding of small gradients, step by step.
        assert_close(tuple(found), wanted, 2e-4)
        assert spectral.orthonormality_error(found) < ORTHONORMAL


@pytest.mark.parametrize("shape", SHAPES[2:4], ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_the_clip_keeps_the_bound_and_uses_it(name, shape):
    bound, w = 0.05, draw(shape)
    previous = [w, *run(CHAINS[name](max_update_norm=bound), w, shape)]
    for old, new in itertools.pairwise(previous):
        assert dense_difference(new, old) <= 1.01 * bound
        assert spectral.orthonormality_error(new) < ORTHONORMAL
        in_change = reference.spectral_norm(
            np.asarray(new.u * spectral.feeding_s(new.s)[:, None])
            - np.asarray(old.u * spectral.feeding_s(old.s)[:, None])
        )
        out_change = reference.spectral_norm(
            np.asarray((new.v - old.v) * old.s[:, None])
        )
        for change in (in_change, out_change):
            np.testing.assert_array_less(change, 1.01 * bound / 2)
            np.testing.assert_array_less(0.85 * bound / 2, change)


def test_the_clip_scales_each_half_of_a_block_alike():
    w, bound = draw(SHAPES[2]), 0.05
    d = type(w)(*(0.1 * normal(*x.shape, seed=i) for i, x in enumerate(w)))
    clip = transforms.clip_by_composite_spectral_norm(bound)
    clipped, _ = clip.update(d, clip.init(w), w)
    ratio_u, ratio_v = clipped.u / d.u, clipped.v / d.v
    ratio_s = spectral.feeding_s(clipped.s) / spectral.feeding_s(d.s)
    for block in range(4):
        c = ratio_u[block, 0, 0]
        assert 0 < c < 1
        np.testing.assert_allclose(ratio_u[block], c, rtol=8 * EPS)
        np.testing.assert_allclose(ratio_s[block], c, rtol=8 * EPS)
        np.testing.assert_allclose(ratio_v[block], ratio_v[block, 0, 0], rtol=8 * EPS)


def test_a_small_update_is_not_clipped():
    w = draw(SHAPES[2])
    d = type(w)(*(1e-5 * normal(*x.shape, seed=i) for i, x in enumerate(w)))
    clip = transforms.clip_by_composite_spectral_norm(0.1)
    clipped, _ = clip.update(d, clip.init(w), w)
    jax.tree.map(np.testing.assert_array_equal, clipped, d)


@pytest.mark.parametrize("size", [1.0, 1e4, 1e20])
@pytest.mark.parametrize("retraction", ["cholesky_qr", "polar"])
def test_the_bound_holds_for_huge_updates(size, retraction):
    bound, w = 0.05, draw(SHAPES[2])
    tx = optax.chain(
        transforms.clip_by_composite_spectral_norm(bound, retraction=retraction),
        transforms.retract_to_stiefel(retraction),
    )
    d = type(w)(*(size * normal(*x.shape, seed=i) for i, x in enumerate(w)))
    updates, _ = tx.update(d, tx.init(w), w)
    new = optax.apply_updates(w, updates)
    assert 0 < dense_difference(new, w) <= 1.01 * bound
    assert spectral.orthonormality_error(new) < ORTHONORMAL


def test_rotations_are_limited_and_tangents_projected_per_block():
    w = draw(SHAPES[2])
    d = type(w)(*(normal(*x.shape, seed=i) for i, x in enumerate(w)))
    limit = transforms.limit_rotation(0.1)
    limited, _ = limit.update(d, limit.init(w), w)
    np.testing.assert_allclose(jnp.linalg.norm(limited.u, axis=-2), 0.1, rtol=1e-5)
    project = transforms.project_to_tangent()
    tangent, _ = project.update(d, project.init(w), w)
    for x, dx in ((w.u, tangent.u), (w.v, tangent.v)):
        inner = np.swapaxes(x, -1, -2) @ dx
        np.testing.assert_allclose(inner + np.swapaxes(inner, -1, -2), 0, atol=1e-5)


def test_s_alone_decays():
    mask = optimizers.decays_by_axes({"w": draw(SHAPES[2])})
    assert mask == {"w": spectral.BlockSpectralFactors(False, True, False)}  # pyright: ignore


@pytest.mark.parametrize(
    ("tx", "rule"),
    [
        (optimizers.sct(1e-2, retraction="svd"), "the retraction 'svd'"),
        (optimizers.stiefel_muon(1e-2, coordinates="svd"), "the coordinates 'svd'"),
    ],
)
def test_rules_on_the_svd_are_refused(tx, rule):
    with pytest.raises(ValueError, match=f"w is in blocks, to which {rule} does not"):
        tx.init({"w": draw(SHAPES[2])})


# --- models -----------------------------------------------------------------------


def test_a_model_has_blocks_where_its_configuration_says_so():
    config = dataclasses.replace(
        CONFIG, blocks=model.MatrixBlocks(q=2, down=1), spectral=("q", "up", "down")
    )
    config.validate()
    layer = jax.eval_shape(lambda key: model.init(key, config), jax.random.key(0))[
        "layers"
    ]
    assert [config.matrix_blocks(n) for n in ("q", "k", "up", "down")] == [2, 1, 4, 1]
    assert layer["q"].u.shape == (2, 2, 16, 4)
    assert layer["up"].v.shape == (2, 4, 12, 4)
    assert isinstance(layer["down"], spectral.SpectralFactors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_blocks": 5},
            "model.num_blocks: 5 must divide both sides of matrix 'q', 32 x 32: set 4 "
            "or 8",
        ),
        ({"num_blocks": 0}, "model.num_blocks: 0 must be >= 1"),
        (
            {"blocks": model.MatrixBlocks(up=3)},
            "model.blocks.up: 3 must divide both sides of matrix 'up', 32 x 48: set 2 "
            "or 4",
        ),
        (
            {"blocks": model.MatrixBlocks(q=2), "spectral": ("up",)},
            "model.blocks.q: has no effect: add 'q' to model.spectral",
        ),
        (
            {"num_blocks": 8},
            "model.rank: rank 4 of matrix 'k' must be in 1..2, for shape 32 x 16 in 8 "
            "blocks",
        ),
        ({"factors": "low_rank"}, "model.num_blocks: 4 blocks need model.factors"),
    ],
)
def test_what_cannot_be_is_told(changes, message):
    with pytest.raises(errors.UserError) as raised:
        dataclasses.replace(CONFIG, **changes).validate()
    assert str(raised.value).startswith(message)
