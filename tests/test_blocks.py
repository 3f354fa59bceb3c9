"""Block-spectral weights, from a single product to trained and exported models."""

import dataclasses
import functools
import io
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import rich.console
import samples
import saved_runs

from experiments.studies import measure
from sct_jax import blocks as blocks_lib
from sct_jax import (
    data,
    decode,
    errors,
    model,
    optimizers,
    sampling,
    sharding,
    spectral,
    transforms,
)
from sct_jax import rank as rank_lib
from sct_jax.training import (
    accounting,
    loop,
    optimizer_config,
    overrides,
    trainer,
    workdir,
)
from sct_jax.training import config as config_lib
from sct_jax.training import state as state_lib
from sct_jax.training import step as step_lib

EPS = float(np.finfo(np.float32).eps)
ORTHONORMAL = 1e-5

# (blocks, fan_in, fan_out, rank). Blocks do not divide the rank of UNEVEN and THIN.
EVEN, ONE, UNEVEN, THIN = (4, 32, 48, 8), (1, 12, 9, 4), (3, 12, 15, 4), (4, 16, 20, 2)
each_shape = pytest.mark.parametrize("shape", [EVEN, UNEVEN, THIN], ids=str)
even_shape = pytest.mark.parametrize("shape", [EVEN, ONE], ids=str)
each_chain_and_shape = pytest.mark.parametrize(
    ("name", "shape"), [("sct", EVEN), ("stiefel_muon", EVEN), ("sct", UNEVEN)]
)
CONFIG = dataclasses.replace(samples.SMALL, num_blocks=4)


@functools.cache
def draw(shape, *, layers=(), **options):
    """Random blocks; compiled, as are the functions below, to compile only once."""
    blocks, fan_in, fan_out, rank = shape
    init = functools.partial(
        blocks_lib.init,
        fan_in=fan_in,
        fan_out=fan_out,
        rank=rank,
        blocks=blocks,
        layers=layers,
        **options,
    )
    return jax.jit(init)(jax.random.key(0))


to_dense = jax.jit(spectral.to_dense)
linear = jax.jit(spectral.linear, static_argnames="flatten_rows")
update_norm = jax.jit(spectral.composite_update_norm)
retract = jax.jit(spectral.retract)
orthonormality_error = jax.jit(spectral.orthonormality_error)


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
    assert_close(to_dense(w), reference.block_dense(*w), 8 * EPS)


def test_layers_are_separate():
    w = draw(EVEN, layers=(2, 3))
    alone = jax.tree.map(lambda x: x[1, 2], w)
    assert_close(to_dense(w)[1, 2], reference.block_dense(*alone), 8 * EPS)


@each_shape
def test_linear_multiplies_by_w(shape):
    w, x = draw(shape), normal(2, 5, shape[1])
    expected = np.asarray(x, np.float64) @ reference.block_dense(*w)
    assert_close(linear(x, w), expected, 16 * EPS)
    assert_close(linear(x, w, flatten_rows=True), expected, 16 * EPS)
    assert_close(spectral.expand(spectral.contract(x, w), w), expected, 16 * EPS)


@each_shape
def test_gradients_are_those_of_the_dense_product(shape):
    w, x, dy = draw(shape), normal(7, shape[1]), normal(7, shape[2], seed=1)
    loss = lambda w, x: jnp.sum(linear(x, w) * dy)
    dw, dx = jax.grad(loss, (0, 1))(w, x)
    g = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
    assert_close(tuple(dw), reference.block_gradients(*w, g), 32 * EPS)
    dense = reference.block_dense(*w)
    assert_close(dx, np.asarray(dy, np.float64) @ dense.T, 16 * EPS)


def test_linear_computes_in_the_dtype_of_x():
    w, x = draw(EVEN), normal(5, 32)
    y = linear(x.astype(jnp.bfloat16), w)
    assert y.dtype == jnp.bfloat16
    assert_close(y.astype(jnp.float32), linear(x, w), 2**-5)


def test_linear_never_builds_w_nor_a_block_diagonal():
    w, x = draw((4, 40, 56, 6)), normal(13, 40)
    loss = lambda w, x: jnp.sum(linear(x, w) ** 2)
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
    expected = np.swapaxes(to_dense(w), -1, -2)
    assert_close(to_dense(turned), expected, 8 * EPS)
    assert orthonormality_error(turned) < ORTHONORMAL
    jax.tree.map(np.testing.assert_array_equal, spectral.transpose(turned), w)


def test_an_uneven_shuffle_has_no_transpose():
    with pytest.raises(ValueError, match="rank 2 must be a multiple of the 4 blocks"):
        spectral.transpose(draw(THIN))


def test_a_lookup_is_refused():
    with pytest.raises(TypeError, match="keep the embedding plain"):
        spectral.lookup(jnp.arange(3), draw(EVEN))


def test_a_truncation_is_refused():
    with pytest.raises(TypeError, match="cannot be truncated"):
        spectral.truncate(draw(EVEN), 2)


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
    assert orthonormality_error(w) < ORTHONORMAL


def test_singular_values_start_equal():
    w = draw((4, 64, 64, 16), layers=(2,), scale=0.5)
    np.testing.assert_array_equal(w.s, np.full_like(w.s, w.s[0, 0, 0]))


@pytest.mark.parametrize(
    ("shape", "rescale"), [((4, 64, 96, 16), False), ((4, 64, 96, 5), True)]
)
def test_outputs_have_the_mean_square_of_the_dense_layer(shape, rescale):
    w = draw(shape, scale=0.5, rescale=rescale)
    squares = np.sum(np.square(reference.block_dense(*w)))
    np.testing.assert_allclose(squares, 0.25 * shape[2], rtol=5e-3)


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
    dense = to_dense(draw(shape, layers=(2,)))
    found = blocks_lib.from_dense(dense, blocks=blocks, rank=rank)
    assert orthonormality_error(found) < ORTHONORMAL
    assert_close(to_dense(found), dense, 128 * EPS)


def test_the_projection_never_gets_worse_by_more_sweeps():
    dense = normal(32, 48)
    error = lambda sweeps: float(
        jnp.linalg.norm(
            dense
            - to_dense(blocks_lib.from_dense(dense, blocks=4, rank=8, sweeps=sweeps))
        )
    )
    errors_found = [error(sweeps) for sweeps in (0, 1, 2, 8)]
    assert errors_found[0] < np.linalg.norm(dense)
    assert all(y < x for x, y in itertools.pairwise(errors_found))


@pytest.mark.parametrize("part", ["u", "s", "v"])
def test_no_part_of_the_projection_can_be_improved_alone(part):
    dense = normal(32, 48)
    found = blocks_lib.from_dense(dense, blocks=4, rank=8, sweeps=200)
    error = lambda w: float(jnp.linalg.norm(dense - to_dense(w)))
    least = min(error(moved(found, 1e-2, parts=part, seed=i)) for i in range(8))
    assert error(found) < least


def test_the_projection_takes_a_matrix_of_lower_rank():
    dense = jnp.zeros((16, 16)).at[0, 0].set(2.0)
    found = blocks_lib.from_dense(dense, blocks=4, rank=4)
    assert orthonormality_error(found) < ORTHONORMAL
    assert_close(to_dense(found), dense, 64 * EPS)


# --- the norm of a change ---------------------------------------------------------


def moved(w, size, *, parts="usv", seed=1):
    new = {
        name: getattr(w, name) + size * normal(*getattr(w, name).shape, seed=seed + i)
        for i, name in enumerate(parts)
    }
    return retract(w._replace(**new))


@each_shape
@pytest.mark.parametrize("size", [1e-3, 0.1, 100.0])
def test_the_norm_is_a_bound_within_a_factor_of_two(shape, size):
    w = draw(shape)
    new = moved(w, size)
    exact = dense_difference(new, w)
    bound = update_norm(w, new)
    assert exact * (1 - 1e-4) <= bound <= 2 * exact


@each_shape
@pytest.mark.parametrize("parts", ["us", "v"])
def test_the_norm_is_exact_where_one_side_changes(shape, parts):
    w = draw(shape)
    new = w._replace(**{p: getattr(moved(w, 0.1, parts=parts), p) for p in parts})
    bound = update_norm(w, new)
    np.testing.assert_allclose(bound, dense_difference(new, w), rtol=1e-4)


@each_shape
@pytest.mark.parametrize("size", [1e-3, 0.1])
def test_the_norm_of_free_blocks_is_bounded(shape, size):
    """As without a retraction, which lets columns grow."""
    w = draw(shape)
    w = w._replace(u=3 * w.u, v=w.v * jnp.linspace(0.5, 2, w.v.shape[-1]))
    change = lambda x: x + size * normal(*x.shape, seed=x.shape[-1])
    new = jax.tree.map(change, w)
    exact = dense_difference(new, w)
    bound = update_norm(w, new)
    assert exact * (1 - 1e-3) <= bound <= 8 * exact


def test_norms_of_layers_and_trees():
    stack = draw(EVEN, layers=(3,))
    new = jax.vmap(lambda w: moved(w, 0.1))(stack)
    norms = update_norm(stack, new)
    alone = [
        update_norm(*jax.tree.map(lambda x, i=i: x[i], (stack, new))) for i in range(3)
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


@each_chain_and_shape
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
        assert orthonormality_error(found) < ORTHONORMAL


@each_chain_and_shape
def test_the_clip_keeps_the_bound_and_uses_it(name, shape):
    bound, w = 0.05, draw(shape)
    previous = [w, *run(CHAINS[name](max_update_norm=bound), w, shape)]
    for old, new in itertools.pairwise(previous):
        assert dense_difference(new, old) <= 1.01 * bound
        assert orthonormality_error(new) < ORTHONORMAL
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
    w, bound = draw(EVEN), 0.05
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
    w = draw(EVEN)
    d = type(w)(*(1e-5 * normal(*x.shape, seed=i) for i, x in enumerate(w)))
    clip = transforms.clip_by_composite_spectral_norm(0.1)
    clipped, _ = clip.update(d, clip.init(w), w)
    jax.tree.map(np.testing.assert_array_equal, clipped, d)


@pytest.mark.parametrize("size", [1.0, 1e4, 1e20])
@pytest.mark.parametrize("retraction", ["cholesky_qr", "polar"])
def test_the_bound_holds_for_huge_updates(size, retraction):
    bound, w = 0.05, draw(EVEN)
    tx = optax.chain(
        transforms.clip_by_composite_spectral_norm(bound, retraction=retraction),
        transforms.retract_to_stiefel(retraction),
    )
    d = type(w)(*(size * normal(*x.shape, seed=i) for i, x in enumerate(w)))
    updates, _ = tx.update(d, tx.init(w), w)
    new = optax.apply_updates(w, updates)
    assert 0 < dense_difference(new, w) <= 1.01 * bound
    assert orthonormality_error(new) < ORTHONORMAL


def test_rotations_are_limited_and_tangents_projected_per_block():
    w = draw(EVEN)
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
    mask = optimizers.decays_by_axes({"w": draw(EVEN)})
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
        tx.init({"w": draw(EVEN)})


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


def test_a_configuration_is_kept_as_json_and_changed_by_flags():
    base = config_lib.ExperimentConfig(model=CONFIG)
    found = overrides.apply(base, [("model.blocks.q", "2"), ("model.num_blocks", "1")])
    assert found.model.blocks == model.MatrixBlocks(q=2)
    found.validate()
    assert config_lib.from_dict(config_lib.to_dict(found)) == found


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (
            {
                "optimizer": optimizer_config.Tsvd(),
                "adaptive_rank": rank_lib.AdaptiveRankConfig(energy=0.9),
            },
            "adaptive_rank.energy",
        ),
        ({"optimizer": optimizer_config.Sct(retraction="svd")}, "optimizer.retraction"),
        (
            {"optimizer": optimizer_config.StiefelMuon(coordinates="svd")},
            "optimizer.coordinates",
        ),
    ],
)
def test_rules_that_do_not_fit_are_refused_by_the_configuration(changes, field):
    settings = config_lib.ExperimentConfig(model=CONFIG, **changes)
    with pytest.raises(errors.UserError, match=rf"^{field}: .* split q, k, v, o"):
        settings.validate()
    plain = dataclasses.replace(CONFIG, num_blocks=1)
    dataclasses.replace(settings, model=plain).validate()


def test_tensor_devices_are_refused():
    settings = config_lib.ExperimentConfig(
        model=CONFIG, data=data.DataConfig(batch_size=8, seq_len=8)
    )
    mesh = sharding.MeshConfig(tensor=2, data=1).build(2)
    with pytest.raises(errors.UserError, match=r"^mesh.tensor: blocks are divided by"):
        trainer.Trainer(settings, mesh)


def test_ranks_do_not_change():
    params = {"w": draw(EVEN)}
    tx = optimizers.tsvd(0.1)
    with pytest.raises(errors.UserError, match=r"^ranks.w: cannot change"):
        rank_lib.resize(
            params,
            tx.init(params),
            active={"w": np.full(4, 4)},
            ranks={"w": 4},
            key=jax.random.key(0),
        )


def test_counts():
    config = dataclasses.replace(CONFIG, blocks=model.MatrixBlocks(up=2))
    plain = dataclasses.replace(CONFIG, num_blocks=1)
    # As many entries in u and v; s has B R.
    more_s = config.num_layers * 4 * (6 * 3 + 1)
    assert accounting.parameters(config) == accounting.parameters(plain) + more_s
    lengths = {"seq_len": 16}
    flops = accounting.flops_per_token(config, **lengths)
    assert flops == accounting.flops_per_token(plain, **lengths)
    assert accounting.dense_config(config) == accounting.dense_config(plain)
    tx = optimizer_config.Sct().build(10)
    more = {
        name: size - accounting.step_bytes(plain, tx)[name]
        for name, size in accounting.step_bytes(config, tx).items()
    }
    assert more == {
        "parameters": 4 * more_s,
        "gradients": 4 * more_s,
        "optimizer": 8 * more_s,
        "total": 16 * more_s,
    }


def tokens_of(config, rows=8, length=8):
    ids = np.random.default_rng(0).integers(config.vocab_size, size=(rows, length + 1))
    ids = jnp.asarray(ids, jnp.int32)
    ones = jnp.ones((rows, length), jnp.int32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:], "segment_ids": ones}


def trained(config, mesh_config, num_devices, *, steps=3, **changes):
    """The state and the losses of a trainer."""
    settings = config_lib.ExperimentConfig(
        model=config,
        data=data.DataConfig(batch_size=8, seq_len=8),
        optimizer=optimizer_config.Sct(
            peak_learning_rate=0.01, schedule="constant", eps=1e-3, max_update_norm=0.05
        ),
        **changes,
    )
    settings.validate()
    run = trainer.Trainer(settings, mesh_config.build(num_devices))
    state, losses = run.init(jax.random.key(0)), []
    for _ in range(steps):
        batch = jax.tree.map(np.asarray, tokens_of(config))
        state, metrics = run.step(state, batch, diagnose=True)
        losses.append(float(metrics["loss"]))
        assert metrics["orthonormality_error"] < ORTHONORMAL
        assert 0 < metrics["composite_update_norm"] <= 1.01 * 0.05
    return state, losses


ONE_LAYER = dataclasses.replace(
    samples.SMALL, num_blocks=2, num_layers=1, spectral=("q", "down")
)


@pytest.fixture(scope="module")
def on_one_device():
    return trained(ONE_LAYER, sharding.MeshConfig(), 1)


def test_a_model_trains(on_one_device):
    _, losses = on_one_device
    assert losses == sorted(losses, reverse=True)


def test_eight_devices_are_as_one(on_one_device):
    wanted, losses = on_one_device
    found, others = trained(ONE_LAYER, sharding.MeshConfig(data=2, fsdp=4), 8)
    np.testing.assert_allclose(others, losses, rtol=1e-5)
    w = found.params["layers"]["down"]
    assert w.u.sharding.shard_shape(w.u.shape) == (1, 2, 24 // 4, 4)
    assert_close(found.params, wanted.params, 1e-4)


def test_the_layerwise_step_is_the_fused_one(on_one_device):
    wanted, losses = on_one_device
    apart = dataclasses.replace(ONE_LAYER, scan_layers=False)
    found, others = trained(apart, sharding.MeshConfig(), 1, step="layerwise")
    np.testing.assert_allclose(others, losses, rtol=1e-5)
    assert_close(model.stack_layers(found.params), wanted.params, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("remat", model.REMAT)
def test_every_layout_has_the_same_gradients(remat):
    config = dataclasses.replace(CONFIG, remat=remat)
    params = model.init(jax.random.key(0), config)
    loss = lambda p, config: model.loss(p, tokens_of(config), config)
    wanted = jax.grad(loss)(params, CONFIG)
    apart = dataclasses.replace(config, scan_layers=False)
    assert_close(jax.grad(loss)(params, config), wanted, 1e-5)
    found = jax.grad(loss)(model.unstack_layers(params), apart)
    assert_close(model.stack_layers(found), wanted, 1e-5)


def test_a_step_never_builds_a_matrix():
    config = model.ModelConfig(
        d_model=40,
        d_ff=56,
        num_layers=2,
        num_heads=10,
        num_kv_heads=5,
        vocab_size=97,
        rank=3,
        num_blocks=4,
        spectral=model.BLOCK_MATRICES,
    )
    tx = optimizer_config.Sct(max_update_norm=0.1, weight_decay=0.1).build(10)
    state = jax.eval_shape(
        lambda key: state_lib.init(key, config, tx), jax.random.key(0)
    )
    step = step_lib.make_train_step(config, tx)
    jaxpr = jax.make_jaxpr(step)(state, tokens_of(config, 3, 7), jnp.array(True))
    shapes = {
        tuple(getattr(variable.aval, "shape", ()))[-2:]
        for equation in reference.equations(jaxpr)
        for variable in equation.outvars
    }
    for name in model.BLOCK_MATRICES:
        sides = config.matrix_shapes()[name]
        assert not {sides, sides[::-1]} & shapes
    assert (14, 3) in shapes  # the walk sees u of down


def test_generation_is_that_of_the_forward_pass():
    params = model.init(jax.random.key(1), ONE_LAYER)
    prompt = [1, 2, 3]
    found = decode.generate(
        params,
        ONE_LAYER,
        [prompt],
        num_tokens=4,
        key=jax.random.key(0),
        sampler=sampling.SamplingConfig(temperature=0.0),
    )[0]
    logits = model.forward(params, jnp.array([[*prompt, *found]]), ONE_LAYER)[0]
    assert found == jnp.argmax(logits[len(prompt) - 1 : -1], axis=-1).tolist()


def test_a_latent_cache_is_refused():
    params = model.init(jax.random.key(1), CONFIG)
    with pytest.raises(errors.UserError, match=r"^latent_cache: matrix 'k' is in"):
        decode.generate(
            params, CONFIG, [[1]], num_tokens=1, key=jax.random.key(0), latent=True
        )


def test_a_checkpoint_restores_bitwise(tmp_path):
    settings = saved_runs.config(
        samples.write_corpus(tmp_path / "corpus"),
        tmp_path / "cache",
        shape=dataclasses.replace(ONE_LAYER, vocab_size=300),
    )
    settings = dataclasses.replace(settings, optimizer=optimizer_config.Sct())
    path = saved_runs.write(tmp_path / "run", settings)
    loaded = workdir.load_run(path)
    assert loaded.config == settings
    run = trainer.Trainer(settings, sharding.MeshConfig().build(1))
    state = run.init(jax.random.key(3))
    for name in ("q", "down"):
        found = loaded.params["layers"][name]
        assert isinstance(found, spectral.BlockSpectralFactors)
        jax.tree.map(np.testing.assert_array_equal, found, state.params["layers"][name])


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    settings = saved_runs.config(
        samples.write_corpus(tmp_path / "corpus"),
        tmp_path / "cache",
        shape=dataclasses.replace(ONE_LAYER, vocab_size=300),
    )
    settings = dataclasses.replace(
        settings,
        num_steps=4,
        data=dataclasses.replace(settings.data, batch_size=8),
        optimizer=optimizer_config.StiefelMuon(max_update_norm=0.05),
        checkpoint=config_lib.CheckpointConfig(every=2),
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    console = rich.console.Console(file=io.StringIO())
    train = lambda folder: loop.train(settings, folder, output=console).status
    assert train(whole) == train(parts) == "finished"
    shutil.rmtree(parts / "checkpoints" / "4")
    assert train(parts) == "finished"
    assert "resumed at step 2" in console.file.getvalue()
    jax.tree.map(
        np.testing.assert_array_equal,
        workdir.load_run(parts).params,
        workdir.load_run(whole).params,
    )


def test_studies_measure_the_spectrum():
    config = dataclasses.replace(ONE_LAYER, spectral=model.BLOCK_MATRICES)
    params = model.init(jax.random.key(1), config)
    found = measure.spectra(params)["down"][: 2 * config.rank]
    expected = np.sort(np.abs(params["layers"]["down"].s).ravel())[::-1]
    assert_close(found, expected, 16 * EPS)
