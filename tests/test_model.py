import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import samples

from sct_jax import errors, losses, model, spectral

EPS = float(np.finfo(np.float32).eps)
ALL = model.BLOCK_MATRICES
SMALL = dataclasses.replace(samples.SMALL, spectral=ALL)
DENSE = model.ModelConfig(
    d_model=128,
    d_ff=320,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=512,
    spectral=(),
    tie_embeddings=False,
)
BATCH, LENGTH = 2, 12

# One compilation per config, for the whole module.
forward = jax.jit(model.forward, static_argnames="config")


@functools.cache
def model_init(config: model.ModelConfig) -> model.Params:
    return model.init(jax.random.key(0), config)


def vary(**changes) -> model.ModelConfig:
    config = dataclasses.replace(SMALL, **changes)
    config.validate()
    return config


mixed = functools.partial(vary, spectral=("q", "down"))
MIXED = mixed()


@functools.cache
def abstract_init(config: model.ModelConfig) -> model.Params:
    """Shapes as of `model.init`, without the retraction, which takes long to trace."""

    def draw(key):
        block = model.init_block(key, config, layers=(config.num_layers,))
        params = model.init_ends(key, config) | {"layers": block}
        return params if config.scan_layers else model.unstack_layers(params)

    return jax.eval_shape(draw, jax.random.key(0))


@functools.cache
def init(config: model.ModelConfig) -> model.Params:
    """Parameters of the shapes of `model.init`."""
    shapes = abstract_init(config)
    rng = np.random.default_rng(1)

    def draw(path, x):
        name = str(getattr(path[-1], "name", None) or path[-1].key)
        if name.endswith("_norm"):  # ones would hide a missing scale
            value = np.broadcast_to(np.linspace(0.5, 1.5, x.shape[-1]), x.shape)
        elif name == "s":
            value = np.broadcast_to(np.linspace(1.5, -0.5, x.shape[-1]), x.shape)
        elif isinstance(path[-1], jax.tree_util.GetAttrKey):
            value = np.linalg.qr(rng.normal(size=x.shape)).Q
        else:
            value = rng.normal(size=x.shape) / np.sqrt(x.shape[-2])
        return jnp.asarray(value, x.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def draw_tokens(config=SMALL) -> jax.Array:
    rng = np.random.default_rng(0)
    return jnp.asarray(
        rng.integers(config.vocab_size, size=(BATCH, LENGTH), dtype=np.int32)
    )


def draw_segments() -> jax.Array:
    return jnp.array([[1] * 5 + [2] * 7, [1] * 1 + [2] * 3 + [3] * 8], jnp.int32)


def assert_close(actual, expected, *, tolerance: float) -> None:
    """Every leaf agrees to `tolerance` times the largest entry of the expected one."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        want = np.asarray(want, np.float64)
        scale = max(np.abs(want).max(), 1e-30)
        np.testing.assert_array_less(np.abs(got - want).max(), tolerance * scale)


# --- The Llama decoder in float64, written from its formulas.


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def dense(w) -> np.ndarray:
    """W in float64, without the rounding of `spectral.to_dense`."""
    if spectral.is_factors(w):
        u, s, v = float64(w)
        return u @ np.diag(s) @ v.T
    return np.asarray(w, np.float64)


def reference_rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * np.asarray(scale)


def reference_rotate(x, position, theta):
    """Each pair (x_i, x_{i + K/2}) as a complex number, turned by an angle."""
    half = len(x) // 2
    angle = position * theta ** (-2.0 * np.arange(half) / len(x))
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag])


def reference_attention(q, k, v, config, segments):
    """Attention of one sequence: q (L, H, K), k and v (L, G, K), head by head."""
    length, heads, size = q.shape
    out = np.zeros_like(q)
    for head in range(heads):
        shared = head // (heads // config.num_kv_heads)
        keys = [
            reference_rotate(k[m, shared], m, config.rope_theta) for m in range(length)
        ]
        for t in range(length):
            query = reference_rotate(q[t, head], t, config.rope_theta)
            seen = [m for m in range(t + 1) if segments[m] == segments[t]]
            scores = np.array([query @ keys[m] for m in seen]) / np.sqrt(size)
            weights = np.exp(scores - scores.max())
            out[t, head] = weights / weights.sum() @ v[seen, shared]
    return out


def reference_forward(params, tokens, config, segment_ids=None):
    embedding = dense(params["embedding"])
    head = dense(params["head"]) if "head" in params else embedding.T
    tokens = np.asarray(tokens)
    if segment_ids is None:
        segment_ids = np.ones_like(tokens)
    results = []
    for ids, segments in zip(tokens, segment_ids, strict=True):
        x = embedding[ids]
        for layer in model.unstack_layers(params)["layers"]:
            h = reference_rms_norm(x, layer["attention_norm"], config.norm_eps)
            q, k, v = (
                (h @ dense(layer[name])).reshape(len(ids), -1, config.head_size)
                for name in "qkv"
            )
            if config.qk_norm:
                q = reference_rms_norm(q, layer["q_norm"], config.norm_eps)
                k = reference_rms_norm(k, layer["k_norm"], config.norm_eps)
            attended = reference_attention(q, k, v, config, segments)
            x = x + attended.reshape(len(ids), -1) @ dense(layer["o"])
            h = reference_rms_norm(x, layer["mlp_norm"], config.norm_eps)
            gate = h @ dense(layer["gate"])
            silu = gate / (1 + np.exp(-gate))
            x = x + (silu * (h @ dense(layer["up"]))) @ dense(layer["down"])
        x = reference_rms_norm(x, params["final_norm"], config.norm_eps)
        results.append(x @ head)
    return np.stack(results)


DECODERS = {
    "spectral, grouped heads, tied": vary(),
    "dense, all heads, untied, unrolled": vary(
        spectral=(), num_kv_heads=4, tie_embeddings=False, scan_layers=False
    ),
    "spectral embedding, one kv head, tied": vary(
        spectral=("embedding", "v", "up"), num_kv_heads=1, rope_theta=100.0
    ),
    "spectral embedding and head": vary(
        spectral=("embedding", "head", "q"),
        tie_embeddings=False,
        norm_eps=0.1,
        ranks=model.MatrixRanks(head=7),
    ),
    "normalised queries and keys": vary(qk_norm=True),
}


@pytest.mark.parametrize(
    ("name", "segmented"),
    [
        *((name, False) for name in DECODERS),
        ("spectral, grouped heads, tied", True),
        ("dense, all heads, untied, unrolled", True),
    ],
)
def test_forward_is_the_llama_decoder(name, segmented):
    config = DECODERS[name]
    params, tokens = init(config), draw_tokens()
    segments = draw_segments() if segmented else None
    logits = forward(params, tokens, config, segment_ids=segments)
    expected = reference_forward(params, tokens, config, segments)
    assert logits.dtype == jnp.float32
    # A few roundings per matrix product of a sum over at most d_ff terms.
    tolerance = 4 * EPS * np.sqrt(config.d_ff) * config.num_layers
    assert_close(logits, expected, tolerance=tolerance)


@pytest.mark.parametrize("tie_embeddings", [True, False], ids=["tied", "untied"])
def test_linear_multiplies_by_every_matrix_of_the_layers_and_by_the_head(
    tie_embeddings,
):
    config = vary(tie_embeddings=tie_embeddings, scan_layers=False)
    params, used = init(config), []

    def linear(x, w):
        used.append(w)
        return spectral.linear(x, w)

    jax.make_jaxpr(lambda ids: model.forward(params, ids, config, linear=linear))(
        draw_tokens()
    )
    *of_layers, head = used
    # In the order that `block` documents.
    expected = [layer[name] for layer in params["layers"] for name in ALL]
    assert all(x is y for x, y in zip(of_layers, expected, strict=True))
    if tie_embeddings:
        assert head.shape == params["embedding"].T.shape
    else:
        assert head is params["head"]


def test_linear_decides_on_the_logits():
    linear = lambda x, w: 2 * spectral.linear(x, w)
    params, config = init(SMALL), SMALL
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 32)), jnp.float32)
    found = model.logits(params, x, config, linear=linear)
    np.testing.assert_array_equal(found, 2 * model.logits(params, x, config))


def test_normalised_queries_and_keys_do_not_feel_their_singular_values():
    config = vary(spectral=("q", "k"), qk_norm=True, norm_eps=1e-12)
    params, tokens = init(config), draw_tokens()
    grown = dict(params["layers"])
    for name in ("q", "k"):
        grown[name] = grown[name]._replace(s=1e3 * grown[name].s)
    grown = params | {"layers": grown}
    expected = forward(params, tokens, config)
    assert_close(forward(grown, tokens, config), expected, tolerance=1e-4)
    # Without the norms they do.
    bare = dataclasses.replace(config, qk_norm=False)
    change = forward(grown, tokens, bare) - forward(params, tokens, bare)
    assert jnp.max(jnp.abs(change)) > 0.1


def test_rms_norm_computes_in_float32():
    # The square of 300 overflows float16's range and loses bits in bfloat16.
    x = (jnp.arange(1, 33) * 10.0).astype(jnp.bfloat16)
    scale = jnp.linspace(0.5, 2, 32)
    expected = reference_rms_norm(np.asarray(x, np.float64), scale, 1e-5)
    actual = model.rms_norm(x, scale, 1e-5)
    assert actual.dtype == jnp.bfloat16
    # Nothing but the last rounding to 8 bits.
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, rtol=2**-8, atol=0
    )


def test_rotation_depends_on_distance_alone():
    config = vary(d_model=64, num_heads=1, num_kv_heads=1)
    rope = model.rotary_table(40, config)
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 64)).astype(np.float32)
    everywhere = lambda x: jnp.broadcast_to(x, (1, 40, 1, 64))
    turned_q = np.asarray(model.rotate(everywhere(q), rope))[0, :, 0]
    turned_k = np.asarray(model.rotate(everywhere(k), rope))[0, :, 0]
    scores = turned_q.astype(np.float64) @ turned_k.T
    # Angles of up to 40 radians are exact to 40 eps; 32 pairs of them add up.
    tolerance = 40 * EPS * np.linalg.norm(q) * np.linalg.norm(k)
    for distance in (0, 1, 7):
        same = np.diagonal(scores, offset=-distance)
        assert np.ptp(same) < tolerance
    assert abs(scores[1, 0] - scores[0, 0]) > 100 * tolerance


# --- Causality.


@pytest.mark.parametrize("segmented", [False, True], ids=["whole", "documents"])
def test_no_gradient_from_the_future_or_from_other_documents(segmented):
    config = mixed(tie_embeddings=False)
    params = init(config)
    # Position j reads row j of the embedding and nothing else does.
    tokens = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    segments = draw_segments()[1:] if segmented else None
    weights = np.random.default_rng(0).normal(size=config.vocab_size)

    def scores(embedding):
        logits = model.forward(
            params | {"embedding": embedding}, tokens, config, segment_ids=segments
        )
        return logits[0] @ weights.astype(np.float32)

    jacobian = jax.jit(jax.jacrev(scores))(params["embedding"])
    flow = np.abs(jacobian).max(-1)[:, :LENGTH]  # (position of logits, of the input)
    sees = np.tril(np.ones((LENGTH, LENGTH), bool))
    if segmented:
        sees &= segments[0][:, None] == segments[0][None, :]
    assert (flow[~sees] == 0).all()
    assert (flow[sees] > 0).all()


# --- Layouts, rematerialisation, precision.


@functools.cache
def value_and_grads(config: model.ModelConfig):
    params = init(MIXED)
    if not config.scan_layers:
        params = model.unstack_layers(params)
    weights = np.random.default_rng(3).normal(
        size=(BATCH, LENGTH, config.vocab_size)
    ) / np.sqrt(config.vocab_size)

    def scalar(params):
        logits = model.forward(params, draw_tokens(), config)
        return jnp.sum(jnp.square(logits) * weights.astype(np.float32)), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(scalar, has_aux=True))(params)
    return logits, grads


# Two orders of the same sums; gradients sum over tokens and d_ff.
ROUNDING = 16 * EPS * np.sqrt(BATCH * LENGTH * SMALL.d_ff)


def test_scanned_layers_equal_unrolled_ones():
    logits, grads = value_and_grads(MIXED)
    unrolled_logits, unrolled_grads = value_and_grads(mixed(scan_layers=False))
    assert_close(unrolled_logits, logits, tolerance=ROUNDING)
    assert_close(unrolled_grads, model.unstack_layers(grads), tolerance=ROUNDING)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_gradient(remat):
    _, grads = value_and_grads(MIXED)
    _, recomputed = value_and_grads(mixed(remat=remat))
    assert_close(recomputed, grads, tolerance=ROUNDING)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_rematerialisation_saves_less(scan_layers):
    def saved(remat):
        config = vary(remat=remat, scan_layers=scan_layers)
        loss = lambda params: model.forward(params, draw_tokens(), config).sum()
        params = abstract_init(config)
        _, backward = jax.eval_shape(lambda p: jax.vjp(loss, p), params)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    assert saved("full") < saved("dots") < saved("none")


def test_bfloat16_compute_keeps_float32_parameters():
    config = mixed(compute_dtype="bfloat16")
    params = init(config)
    logits, grads = value_and_grads(config)
    exact_logits, exact_grads = value_and_grads(MIXED)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert logits.dtype == jnp.float32
    # 8 bits of mantissa, and as many roundings as in float32.
    assert_close(logits, exact_logits, tolerance=4 * 2**-8 * np.sqrt(SMALL.num_layers))
    difference = np.abs(logits - exact_logits).max() / np.abs(exact_logits).max()
    assert difference > 2**-12
    assert jax.tree.structure(grads) == jax.tree.structure(exact_grads)


def dots(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(value, "eqns"):
                yield from dots(getattr(value, "jaxpr", value))


def test_products_of_bfloat16_compute_read_bfloat16():
    config = vary(compute_dtype="bfloat16")
    params = abstract_init(config)
    jaxpr = jax.make_jaxpr(lambda p: model.forward(p, draw_tokens(), config))(params)
    found = [eqn.invars[1].aval for eqn in dots(jaxpr.jaxpr)]
    # Seven factor pairs, the scores, the weighted values and the head.
    assert len(found) == 17
    weights = [aval for aval in found if aval.ndim == 2]
    assert len(weights) == 15
    assert {aval.dtype for aval in weights} == {jnp.dtype("bfloat16")}


# --- Layouts of the tree.


def test_unstacking_and_stacking_are_inverse():
    params = init(SMALL)
    state = optax.adam(1e-3).init(params)
    for tree in (params, state):
        apart = model.unstack_layers(tree)
        together = model.stack_layers(apart)
        assert jax.tree.structure(together) == jax.tree.structure(tree)
        jax.tree.map(np.testing.assert_array_equal, together, tree)
    blocks = model.unstack_layers(params)["layers"]
    assert isinstance(blocks, tuple) and len(blocks) == SMALL.num_layers
    for i, block in enumerate(blocks):
        assert block["q"].u.shape == (SMALL.d_model, SMALL.rank)
        np.testing.assert_array_equal(block["down"].v, params["layers"]["down"].v[i])
    moments = optax.tree.get(model.unstack_layers(state), "mu")
    assert jax.tree.structure(moments) == jax.tree.structure(
        model.unstack_layers(params)
    )
    # Both are idempotent.
    assert model.stack_layers(params)["layers"] is params["layers"]
    apart = model.unstack_layers(params)
    assert model.unstack_layers(apart)["layers"] is apart["layers"]


def test_layers_of_different_rank_cannot_be_stacked():
    params = model.unstack_layers(init(SMALL))
    first, second = params["layers"]
    second = second | {"q": jax.tree.map(lambda x: x[..., :2], second["q"])}
    with pytest.raises(ValueError):
        model.stack_layers(params | {"layers": (first, second)})


def test_both_layouts_start_from_the_same_numbers():
    # Dense ones: the retraction of factors comes before the layers are taken apart.
    stacked = model_init(DENSE)
    apart = model_init(dataclasses.replace(DENSE, scan_layers=False))
    jax.tree.map(np.testing.assert_array_equal, model.unstack_layers(stacked), apart)


@pytest.mark.parametrize("scan_layers", [True, False], ids=["stacked", "apart"])
def test_decay_acts_on_singular_values_and_dense_matrices(scan_layers):
    config = vary(
        spectral=("q", "gate", "head"),
        tie_embeddings=False,
        scan_layers=scan_layers,
        qk_norm=True,
    )
    mask = model.decay_mask(init(config))
    factors = spectral.SpectralFactors(u=False, s=True, v=False)
    block = {
        "attention_norm": False,
        "mlp_norm": False,
        "q_norm": False,
        "k_norm": False,
        "q": factors,
        "k": True,
        "v": True,
        "o": True,
        "gate": factors,
        "up": True,
        "down": True,
    }
    assert mask == {
        "embedding": True,
        "final_norm": False,
        "head": factors,
        "layers": block if scan_layers else (block, block),
    }


def test_decay_acts_on_both_free_factors():
    params = model.unstack_layers(init(SMALL))
    weights = spectral.LowRankFactors(a=jnp.ones((4, 2)), b=jnp.ones((3, 2)))
    mask = model.decay_mask(
        {"layers": ({"q": weights, "v": params["layers"][0]["v"]},)}
    )
    assert mask["layers"][0]["q"] == spectral.LowRankFactors(a=True, b=True)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_hidden_matrices_are_those_of_the_layers(scan_layers):
    config = vary(
        spectral=("q",), factors="low_rank", scan_layers=scan_layers, qk_norm=True
    )
    key = jax.random.key(0)
    mask = model.hidden_matrices(jax.eval_shape(lambda: model.init(key, config)))
    block = dict.fromkeys(model.BLOCK_MATRICES, True) | {
        "q": spectral.LowRankFactors(a=True, b=True),
        "attention_norm": False,
        "mlp_norm": False,
        "q_norm": False,
        "k_norm": False,
    }
    assert mask == {
        "embedding": False,
        "final_norm": False,
        "layers": block if scan_layers else (block, block),
    }


# --- Initialisation.


def test_low_rank_factors_start_with_the_product_of_the_spectral_ones():
    names = ("q", "down", "embedding")
    factors = model_init(vary(spectral=names))
    free = model_init(vary(spectral=names, factors="low_rank"))
    for one, other in (
        (factors["embedding"], free["embedding"]),
        (factors["layers"]["q"], free["layers"]["q"]),
        (factors["layers"]["down"], free["layers"]["down"]),
    ):
        assert isinstance(other, spectral.LowRankFactors)
        w = spectral.to_dense(one)
        atol = 8 * float(jnp.finfo(jnp.float32).eps) * float(jnp.max(jnp.abs(one.s)))
        np.testing.assert_allclose(spectral.to_dense(other), w, rtol=0, atol=atol)
        norms = [jnp.sum(jnp.square(x), axis=-2) for x in other]
        np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)


def test_dense_initialisation_has_the_scale_of_its_fan_in():
    config, params = DENSE, model_init(DENSE)
    residual = 1 / np.sqrt(2 * config.num_layers)
    expected = {
        "q": 1 / np.sqrt(128),
        "k": 1 / np.sqrt(128),
        "v": 1 / np.sqrt(128),
        "o": residual / np.sqrt(128),
        "gate": 1 / np.sqrt(128),
        "up": 1 / np.sqrt(128),
        "down": residual / np.sqrt(320),
    }
    layers = params["layers"]
    for name, std in expected.items():
        for layer in layers[name]:
            # Six standard errors of a standard deviation.
            assert abs(np.std(layer) / std - 1) < 6 / np.sqrt(2 * layer.size), name
            assert abs(np.mean(layer)) < 6 * std / np.sqrt(layer.size), name
    for weight, std in (("embedding", 128**-0.5), ("head", 128**-0.5)):
        size = params[weight].size
        assert abs(np.std(params[weight]) / std - 1) < 6 / np.sqrt(2 * size)
    for scale in (
        params["final_norm"],
        layers["attention_norm"],
        layers["mlp_norm"],
    ):
        assert (scale == 1).all()


def test_spectral_initialisation_has_the_spectrum_of_the_dense_one():
    config = model.ModelConfig(
        d_model=128,
        d_ff=320,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        vocab_size=256,
        rank=32,
        spectral=(*ALL, "embedding"),
    )
    key, rng = jax.random.key(0), np.random.default_rng(0)
    factors = model.init_ends(key, config) | model.init_block(key, config, layers=(2,))
    residual = 1 / np.sqrt(2 * config.num_layers)
    for name, (fan_in, fan_out) in config.matrix_shapes().items():
        # A row of the embedding has d_model entries, and is what is looked up.
        std = 1 / np.sqrt(128 if name == "embedding" else fan_in)
        std *= residual if name in ("o", "down") else 1
        draw = std * rng.normal(size=(fan_in, fan_out))
        values = np.linalg.svd(draw, compute_uv=False)[:32]
        for s in np.atleast_2d(factors[name].s):
            # Values of one draw fluctuate by O(1 / min(I, O)).
            np.testing.assert_allclose(s, values, rtol=0.05, err_msg=name)


def test_initial_factors_are_orthonormal_and_independent():
    params = model_init(vary(spectral=("q", "down", "embedding")))
    assert spectral.orthonormality_error(params) < 4e-6
    # Random subspaces of dimension 4 in 32 meet at cosines of about 1 / sqrt(32).
    layers = params["layers"]
    first, second, other = layers["q"].u[0], layers["q"].u[1], layers["down"].v[0]
    for x, y in ((first, second), (first, other)):
        assert np.abs(x.T @ y).max() < 5 / np.sqrt(32)


def test_rescaled_initialisation_has_the_norm_of_the_dense_one():
    config = vary(rescale_init=True)
    block = model.init_block(jax.random.key(0), config, layers=(2,))
    # ||W||_F^2 of an (I, O) matrix of N(0, 1 / I) is O; o and down over 2 num_layers.
    for name in ALL:
        fan_out = config.matrix_shapes()[name][1]
        squares = np.sum(np.square(block[name].s, dtype=np.float64), -1)
        shrunk = 2 * config.num_layers if name in ("o", "down") else 1
        np.testing.assert_allclose(squares, fan_out / shrunk, rtol=16 * EPS)


# --- Ranks and checks.


def test_ranks_of_single_matrices():
    config = vary(
        rank=5,
        ranks=model.MatrixRanks(q=3),
        rank_ratios=model.MatrixRankRatios(down=0.25, gate=100.0, k=0.001),
    )
    ranks = {name: config.matrix_rank(name) for name in model.MATRICES}
    assert ranks == {
        "q": 3,
        "k": 1,
        "v": 5,
        "o": 5,
        "gate": 32,  # clamped to min(32, 48)
        "up": 5,
        "down": 12,  # a quarter of fan_in 48
        "embedding": None,
        "head": None,
    }
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), config))
    assert params == abstract_init(config)
    assert params["layers"]["q"].s.shape == (2, 3)
    assert params["layers"]["down"].u.shape == (2, 48, 12)
    notes = config.clamped_ratios()
    assert len(notes) == 2
    assert any("model.rank_ratios.gate" in note and "32" in note for note in notes)
    assert any("model.rank_ratios.k" in note for note in notes)


def test_parameters_are_float32_where_float64_is_allowed():
    shape = dataclasses.replace(SMALL, qk_norm=True, tie_embeddings=False)
    with jax.enable_x64(True):
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), shape))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def loss_and_gradients(config):
    """Abstract, of a batch with two documents."""
    tokens = jnp.zeros((2, 8), jnp.int32)

    def loss_fn(params):
        logits = model.forward(params, tokens, config, segment_ids=tokens)
        return losses.next_token_cross_entropy(logits, tokens)

    return jax.eval_shape(jax.value_and_grad(loss_fn), abstract_init(config))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True, "tie_embeddings": False, "scan_layers": False},
        {"factors": "low_rank", "compute_dtype": "bfloat16"},
        {"spectral": ("q", "embedding")},
    ],
    ids=str,
)
def test_no_axis_is_added_and_no_dtype_changes_by_itself(changes):
    config = vary(**changes)
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        loss, grads = loss_and_gradients(config)
    assert loss.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"d_model": 0}, "model.d_model"),
        ({"d_ff": -1}, "model.d_ff"),
        ({"num_layers": 0}, "model.num_layers"),
        ({"num_heads": 0}, "model.num_heads"),
        ({"num_kv_heads": 0}, "model.num_kv_heads"),
        ({"vocab_size": 1}, "model.vocab_size"),
        ({"num_heads": 5}, "model.num_heads"),
        ({"num_heads": 32, "num_kv_heads": 1}, "model.num_heads"),
        ({"num_kv_heads": 3}, "model.num_kv_heads"),
        ({"num_kv_heads": 8}, "model.num_kv_heads"),
        ({"remat": "all"}, "model.remat"),
        ({"compute_dtype": "float16"}, "model.compute_dtype"),
        ({"spectral": ("q", "mlp")}, "model.spectral"),
        ({"spectral": ("q", "q")}, "model.spectral"),
        ({"spectral": ("head",)}, "model.spectral"),
        ({"rank": 0}, "model.rank"),
        ({"rank": 33}, "model.rank"),
        ({"rank": -4}, "model.rank"),
        ({"ranks": model.MatrixRanks(k=17)}, "model.ranks.k"),
        ({"ranks": model.MatrixRanks(q=0)}, "model.ranks.q"),
        ({"ranks": model.MatrixRanks(embedding=4)}, "model.ranks.embedding"),
        ({"rank_ratios": model.MatrixRankRatios(q=0.0)}, "model.rank_ratios.q"),
        ({"rank_ratios": model.MatrixRankRatios(head=0.5)}, "model.rank_ratios.head"),
        (
            {
                "ranks": model.MatrixRanks(up=2),
                "rank_ratios": model.MatrixRankRatios(up=0.5),
            },
            "model.rank_ratios.up",
        ),
        ({"norm_eps": -1.0}, "model.norm_eps"),
        ({"rope_theta": 0.0}, "model.rope_theta"),
    ],
    ids=str,
)
def test_a_shape_that_is_no_model_is_refused_by_field(changes, field):
    with pytest.raises(errors.UserError, match=f"^{field}: "):
        dataclasses.replace(SMALL, **changes).validate()


def test_a_rank_beyond_the_matrix_names_matrix_and_shape():
    with pytest.raises(errors.UserError, match=r"'k'.*1\.\.16.*32 x 16"):
        dataclasses.replace(SMALL, rank=17).validate()


@pytest.mark.parametrize("rank", [0, 17])
def test_a_rank_that_cannot_be_is_refused_at_init_too(rank):
    config = dataclasses.replace(SMALL, rank=16, ranks=model.MatrixRanks(v=rank))
    with pytest.raises(errors.UserError, match=r"^model\.ranks\.v: .*'v'.*1\.\.16"):
        abstract_init(config)
