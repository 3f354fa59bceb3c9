"""Truncation where the inputs are, against closed forms in float64."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples

from sct_jax import blocks as blocks_lib
from sct_jax import compression, errors, model, spectral

DENSE = dataclasses.replace(samples.SMALL, spectral=(), remat="none")
LOW = dataclasses.replace(samples.SMALL, spectral=model.BLOCK_MATRICES, rank=4)


def inputs_of(seed: int, rows: int, fan_in: int) -> np.ndarray:
    """Rows whose directions differ in size a thousandfold, and are correlated."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(fan_in, fan_in)) / np.sqrt(fan_in)
    scales = np.logspace(0, -3, fan_in)
    return rng.normal(size=(rows, fan_in)) * scales @ mixed


def weight_of(seed: int, fan_in: int, fan_out: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(fan_in, fan_out))


def output_error(x: np.ndarray, w: np.ndarray, factors) -> float:
    approximation = np.asarray(spectral.to_dense(factors), np.float64)
    return float(np.sum(np.square(x @ (w - approximation))))


def least_error(x: np.ndarray, w: np.ndarray, rank: int) -> float:
    """The squared singular values of x W beyond a rank: Eckart and Young for x W."""
    return float(np.sum(np.square(np.linalg.svd(x @ w, compute_uv=False)[rank:])))


@pytest.mark.parametrize("rows", [400, 12], ids=["regular", "singular"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)], ids=str)
def test_outputs_are_as_close_as_the_rank_allows(shape, rows):
    x, w = inputs_of(0, rows, shape[0]), weight_of(1, *shape)
    moment = jnp.asarray(x.T @ x, jnp.float32)
    for rank in (1, 5, 11):
        factors = spectral.from_dense(
            jnp.asarray(w, jnp.float32), rank=rank, second_moment=moment
        )
        plain = spectral.from_dense(jnp.asarray(w, jnp.float32), rank=rank)
        found = output_error(x, w, factors)
        scale = np.sum(np.square(x @ w))
        assert found == pytest.approx(
            least_error(x, w, rank), rel=1e-3, abs=1e-5 * scale
        )
        assert found <= output_error(x, w, plain) * (1 + 1e-5)
        assert float(spectral.orthonormality_error(factors)) < 1e-5
        assert np.all(np.diff(factors.s) <= 0)


def test_no_information_about_inputs_is_the_plain_truncation():
    w = jnp.asarray(weight_of(2, 24, 16), jnp.float32)
    plain = spectral.to_dense(spectral.from_dense(w, rank=5))
    for moment in (jnp.eye(24), 1e-8 * jnp.eye(24), jnp.zeros((24, 24))):
        found = spectral.from_dense(w, rank=5, second_moment=moment)
        np.testing.assert_allclose(spectral.to_dense(found), plain, atol=1e-5)


def test_energy_counts_outputs():
    x, w = inputs_of(3, 300, 24), weight_of(4, 24, 16)
    moment = jnp.asarray(x.T @ x, jnp.float32)
    found = spectral.from_dense(
        jnp.asarray(w, jnp.float32), energy=0.9, second_moment=moment
    )
    squares = np.square(np.linalg.svd(x @ w, compute_uv=False))
    rank = int(np.argmax(np.cumsum(squares) >= 0.9 * squares.sum())) + 1
    assert found.s.shape == (rank,)
    values = spectral.singular_values(jnp.asarray(w, jnp.float32), second_moment=moment)
    np.testing.assert_allclose(
        np.square(values), squares, rtol=1e-3, atol=1e-6 * squares.sum()
    )


@pytest.mark.parametrize("kind", ["spectral", "low_rank"])
@pytest.mark.parametrize("whitened", [False, True])
def test_factors_are_truncated_like_their_matrix(kind, whitened):
    w = spectral.init(jax.random.key(0), 24, 40, 12)
    w = w._replace(
        s=w.s * jnp.where(jnp.arange(12) % 3, 1, -2)
    )  # neither sorted nor > 0
    dense = spectral.to_dense(w)
    if kind == "low_rank":
        w = spectral.to_low_rank(w)
    x = inputs_of(5, 200, 24)
    moment = jnp.asarray(x.T @ x, jnp.float32) if whitened else None
    found = spectral.truncate(w, 5, second_moment=moment)
    wanted = spectral.from_dense(dense, rank=5, second_moment=moment)
    np.testing.assert_allclose(found.s, wanted.s, rtol=1e-4)
    np.testing.assert_allclose(
        spectral.to_dense(found), spectral.to_dense(wanted), atol=2e-5
    )
    assert float(spectral.orthonormality_error(found)) < 1e-5
    np.testing.assert_allclose(
        spectral.singular_values(w, second_moment=moment),
        spectral.singular_values(dense, second_moment=moment)[:12],
        rtol=1e-4,
        atol=1e-5,
    )


def test_factors_off_the_manifold_are_truncated_like_their_matrix():
    """As a chain without a retraction leaves them."""
    w = spectral.init(jax.random.key(0), 24, 40, 12)
    w = w._replace(v=w.v + 0.3 * jax.random.normal(jax.random.key(1), w.v.shape))
    found = spectral.truncate(w, 5)
    wanted = spectral.from_dense(spectral.to_dense(w), rank=5)
    np.testing.assert_allclose(
        spectral.to_dense(found), spectral.to_dense(wanted), atol=3e-5
    )
    assert float(spectral.orthonormality_error(found)) < 1e-5


def test_stacks_are_truncated_layer_by_layer():
    w = jnp.asarray([weight_of(i, 16, 24) for i in range(3)], jnp.float32)
    x = [inputs_of(i, 100, 16) for i in range(3)]
    moments = jnp.asarray([y.T @ y for y in x], jnp.float32)
    found = spectral.from_dense(w, rank=4, second_moment=moments)
    for i in range(3):
        single = spectral.from_dense(w[i], rank=4, second_moment=moments[i])
        np.testing.assert_allclose(
            spectral.to_dense(found)[i], spectral.to_dense(single), atol=1e-5
        )


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        (np.eye(23), r"\(\.\.\., 24, 24\).*got \(23, 23\)"),
        (np.full((24, 24), np.nan), "NaN"),
        (np.full((24, 24), np.inf), "NaN or an infinity"),
    ],
)
def test_unusable_moments_are_refused(moment, message):
    with pytest.raises(ValueError, match=message):
        spectral.from_dense(
            jnp.ones((24, 16)), rank=2, second_moment=jnp.asarray(moment, jnp.float32)
        )


# --- Blocks.


def blocks_error(x, w, factors) -> float:
    return output_error(x, w, factors) / float(np.sum(np.square(x @ w)))


def test_blocks_are_closest_where_their_inputs_are():
    x, w = inputs_of(6, 300, 32), weight_of(7, 32, 48)
    moment = jnp.asarray(x.T @ x, jnp.float32)
    dense = jnp.asarray(w, jnp.float32)
    at = lambda sweeps, moment: blocks_error(
        x,
        w,
        blocks_lib.from_dense(
            dense, blocks=4, rank=8, second_moment=moment, sweeps=sweeps
        ),
    )
    whitened = [at(sweeps, moment) for sweeps in (0, 1, 5, 20, 100)]
    assert all(b <= a * (1 + 1e-4) for a, b in itertools.pairwise(whitened)), whitened
    assert whitened[-1] < 0.5 * at(100, None)
    found = blocks_lib.from_dense(
        dense, blocks=4, rank=8, second_moment=moment, sweeps=5
    )
    assert float(spectral.orthonormality_error(found)) < 1e-5


def test_blocks_without_information_about_inputs_are_the_plain_ones():
    w = jnp.asarray(weight_of(8, 24, 24), jnp.float32)
    plain = blocks_lib.from_dense(w, blocks=3, rank=6)
    found = blocks_lib.from_dense(w, blocks=3, rank=6, second_moment=4 * jnp.eye(24))
    np.testing.assert_allclose(
        spectral.to_dense(found), spectral.to_dense(plain), atol=1e-4
    )


def test_exact_blocks_stay_exact_for_any_inputs():
    w = spectral.to_dense(blocks_lib.init(jax.random.key(0), 24, 36, 6, blocks=3))
    x = inputs_of(9, 200, 24)
    moment = jnp.asarray(x.T @ x, jnp.float32)
    found = blocks_lib.from_dense(w, blocks=3, rank=6, second_moment=moment)
    assert blocks_error(x, np.asarray(w, np.float64), found) < 1e-6


# --- Whole models.


def params_and_text(config=DENSE):
    params = model.init(jax.random.key(0), config)
    # Norms that differ by channel make inputs that differ by direction.
    scale = lambda path, x: (
        x * jnp.logspace(0, -2, x.shape[-1]) if "_norm" in str(path[-1]) else x
    )
    params = jax.tree_util.tree_map_with_path(scale, params)
    tokens = [
        jax.random.randint(jax.random.key(i), (4, 16), 0, config.vocab_size)
        for i in range(2)
    ]
    segments = [jnp.cumsum(t % 7 == 0, axis=1) for t in tokens]
    return params, compression.Text(tokens, segments)


def test_moments_are_of_the_inputs_of_every_matrix():
    params, text = params_and_text()
    seen = []

    def linear(x, w):
        seen.append(np.asarray(x, np.float64).reshape(-1, x.shape[-1]))
        return spectral.linear(x, w)

    separate = model.unstack_layers(params)
    for tokens, segments in zip(*text, strict=True):
        model.hidden(separate, tokens, DENSE, segment_ids=segments, linear=linear)
    inputs = compression.Inputs(params["embedding"], text, DENSE)
    for index, layer in enumerate(separate["layers"]):
        moments = inputs.second_moments(layer)
        for place, name in enumerate(model.BLOCK_MATRICES):
            calls = [seen[batch * 14 + index * 7 + place] for batch in range(2)]
            wanted = sum(x.T @ x for x in calls)
            np.testing.assert_allclose(
                moments[name], wanted, rtol=1e-4, atol=1e-5 * wanted.max()
            )
        inputs.advance(layer)


@pytest.mark.parametrize("stacked", [True, False])
def test_each_output_is_closer_than_plain_truncation_makes_it(stacked):
    params, text = params_and_text()
    separate = model.unstack_layers(params)
    given = params if stacked else separate
    whitened = compression.truncate(given, DENSE, LOW, text=text, sequential=False)
    plain = compression.truncate(given, DENSE, LOW)
    assert isinstance(whitened["layers"], dict) == stacked
    scanned = dataclasses.replace(LOW, scan_layers=stacked)
    abstract = jax.eval_shape(lambda: model.init(jax.random.key(0), scanned))
    assert jax.tree.map(jnp.shape, whitened) == jax.tree.map(jnp.shape, abstract)
    inputs = compression.Inputs(params["embedding"], text, DENSE)
    found, alike = (model.unstack_layers(p)["layers"] for p in (whitened, plain))
    for index, layer in enumerate(separate["layers"]):
        moments = inputs.second_moments(layer)
        for name in model.BLOCK_MATRICES:
            root = np.linalg.cholesky(
                np.asarray(moments[name], np.float64)
                + 1e-6 * np.eye(len(moments[name]))
            )
            lost = [
                output_error(
                    root.T, np.asarray(layer[name], np.float64), p[index][name]
                )
                for p in (found, alike)
            ]
            assert lost[0] <= lost[1] * (1 + 1e-4), (index, name)
        inputs.advance(layer)
    lost = [
        output_error(
            np.eye(len(layer["down"])), np.asarray(layer["down"]), p[-1]["down"]
        )
        for p in (found, alike)
    ]
    assert lost[0] > lost[1]  # it is no plain truncation


def inputs_and_outputs(params, layers, text):
    """Inputs of every matrix in the order of computation, (rows, I) in float64."""
    seen = []

    def linear(x, w):
        seen.append(np.asarray(x, np.float64).reshape(-1, x.shape[-1]))
        return spectral.linear(x, w)

    together = {**params, "layers": tuple(layers)}
    for tokens, segments in zip(*text, strict=True):
        model.hidden(together, tokens, DENSE, segment_ids=segments, linear=linear)
    half = len(seen) // 2
    return [np.concatenate(pair) for pair in zip(seen[:half], seen[half:], strict=True)]


@pytest.mark.parametrize("chosen", [(), ("embedding",)])
@pytest.mark.parametrize("tied", [True, False])
def test_every_matrix_makes_up_for_those_before_it(chosen, tied):
    """It maps the inputs that it now has to the original outputs."""
    dense = dataclasses.replace(DENSE, tie_embeddings=tied)
    low = dataclasses.replace(
        LOW, spectral=(*model.BLOCK_MATRICES, *chosen), tie_embeddings=tied
    )
    params, text = params_and_text(dense)
    found = compression.truncate(params, dense, low, text=text)
    assert spectral.is_factors(found["embedding"]) == bool(chosen)
    layers, new = (list(compression.layers_of(p)) for p in (params, found))
    before, after = (
        inputs_and_outputs(p, x, text) for p, x in ((params, layers), (found, new))
    )
    for place, name in enumerate(model.BLOCK_MATRICES * 2):
        layer = place // 7
        first = next(g for g in compression.GROUPS if name in g)[0]
        place = 7 * layer + model.BLOCK_MATRICES.index(first)
        x, y = after[place], before[place]
        w = np.asarray(layers[layer][name], np.float64)
        moment = x.T @ x
        damping = 0.01 * np.mean(np.diag(moment)) * np.eye(len(moment))
        target = w + np.linalg.solve(moment + damping, (x.T @ y - moment) @ w)
        wanted = spectral.from_dense(
            jnp.asarray(target, jnp.float32),
            rank=4,
            second_moment=jnp.asarray(moment, jnp.float32),
        )
        np.testing.assert_allclose(
            spectral.to_dense(new[layer][name]), spectral.to_dense(wanted), atol=2e-3
        )
        # Closer to the old outputs than the same rank without the correction.
        plain = spectral.from_dense(
            layers[layer][name],
            rank=4,
            second_moment=jnp.asarray(moment, jnp.float32),
        )
        lost = [
            np.linalg.norm(x @ np.asarray(spectral.to_dense(f), np.float64) - y @ w)
            for f in (new[layer][name], plain)
        ]
        assert lost[0] <= lost[1] * 1.01


@pytest.mark.parametrize("chosen", [(), ("embedding",)])
def test_all_at_once_every_matrix_sees_the_original_inputs(chosen):
    params, text = params_and_text()
    low = dataclasses.replace(LOW, spectral=(*model.BLOCK_MATRICES, *chosen))
    found = compression.truncate(params, DENSE, low, text=text, sequential=False)
    inputs = compression.Inputs(params["embedding"], text, DENSE)
    for layer, new in zip(
        compression.layers_of(params), compression.layers_of(found), strict=True
    ):
        for name, moment in inputs.second_moments(layer).items():
            wanted = spectral.from_dense(layer[name], rank=4, second_moment=moment)
            np.testing.assert_allclose(
                spectral.to_dense(new[name]), spectral.to_dense(wanted), atol=1e-5
            )
        inputs.advance(layer)


@pytest.mark.parametrize("sequential", [True, False])
def test_inputs_that_are_not_finite_are_refused(sequential):
    params, text = params_and_text()
    params["layers"]["mlp_norm"] = params["layers"]["mlp_norm"].at[1].set(jnp.inf)
    with pytest.raises(errors.UserError, match=r"^'gate' of layer 2: its inputs on"):
        compression.truncate(params, DENSE, LOW, text=text, sequential=sequential)


def test_memory_holds_two_residual_streams_of_the_text():
    """And one micro-batch more, whatever their number."""
    params, _ = params_and_text()
    shape = (3, 20)  # of no other array
    tokens = [jnp.full(shape, i) for i in range(8)]
    inputs = compression.Inputs(params["embedding"], compression.Text(tokens), DENSE)
    most = 0

    def counted(*args):
        nonlocal most
        out = advance(*args)
        streams = [x for x in jax.live_arrays() if x.shape == (*shape, DENSE.d_model)]
        most = max(most, len(streams))
        return out

    inputs._layer, advance = counted, inputs._layer
    replace = lambda name, w, moments: spectral.truncate(w, 4)
    layers = list(compression.layers_of(params))
    for layer in (*layers, *layers):
        compression.truncate_layer(layer, model.BLOCK_MATRICES, replace, inputs=inputs)
    assert most == 2 * len(tokens) + 1


def test_factors_are_corrected_like_their_matrix():
    params, text = params_and_text()
    wider = dataclasses.replace(LOW, rank=8)
    factors = compression.truncate(params, DENSE, wider)
    dense = jax.tree.map(
        lambda w: spectral.to_dense(w) if spectral.is_factors(w) else w,
        factors,
        is_leaf=spectral.is_factors,
    )
    found = compression.truncate(factors, wider, LOW, text=text)
    wanted = compression.truncate(dense, DENSE, LOW, text=text)
    for name in model.BLOCK_MATRICES:
        np.testing.assert_allclose(
            spectral.to_dense(found["layers"][name]),
            spectral.to_dense(wanted["layers"][name]),
            atol=2e-3,
        )


def test_matrices_that_stay_are_not_changed():
    params, _ = params_and_text()
    wanted = dataclasses.replace(DENSE, spectral=("down",), rank=4)
    found = compression.truncate(params, DENSE, wanted)
    for name in ("q", "gate", "mlp_norm"):
        np.testing.assert_array_equal(found["layers"][name], params["layers"][name])
    again = compression.truncate(
        found, wanted, dataclasses.replace(wanted, rank=2, spectral=("down", "up"))
    )
    assert again["layers"]["down"].s.shape == (DENSE.num_layers, 2)
    assert again["layers"]["up"].s.shape == (DENSE.num_layers, 2)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"rank": 4}, {"rank": 5}, r"model\.rank: 5 is above the rank 4 that 'q'"),
        ({}, {"spectral": ("q",)}, r"model\.spectral: 'k' has factors of rank 4"),
        ({}, {"factors": "low_rank"}, r"model\.factors: 'low_rank' differs"),
        ({}, {"num_blocks": 2}, r"model\.blocks\.q: 'q' has rank 4 in 1 blocks"),
        (
            {"spectral": ()},
            {"spectral": ("q",), "num_blocks": 4, "rank": 6},
            r"^model\.rank: rank 6 of 'q' is no multiple .* choose 4 or 8$",
        ),
        (
            {"spectral": ()},
            {
                "spectral": ("q",),
                "num_blocks": 4,
                "rank_ratios": model.MatrixRankRatios(q=0.2),
            },
            r"^model\.rank_ratios\.q: rank 6 of 'q' is no multiple .* choose 4 or 8$",
        ),
    ],
)
def test_ranks_only_fall(before, after, message):
    before = dataclasses.replace(LOW, **before)
    with pytest.raises(errors.UserError, match=message):
        compression.check(before, dataclasses.replace(before, **after))


# --- Ranks under a budget.


def test_ranks_keep_the_most_that_a_budget_allows():
    rng = np.random.default_rng(0)
    spectra = {}
    for name, cost, size in (("a", 3, 4), ("b", 3, 5), ("c", 3, 3)):
        squares = -np.sort(-rng.random((2, size)), axis=1)
        spectra[name] = compression.Spectrum(
            squares / squares.sum(1, keepdims=True), cost
        )

    def kept(ranks):
        return sum(spectra[n].squares[:, :r].sum() for n, r in ranks.items())

    for budget in (9, 14, 21, 30, 99):
        found = compression.allocate(spectra, budget=budget)
        assert sum(3 * r for r in found.values()) <= budget
        best = max(
            kept(dict(zip("abc", ranks, strict=True)))
            for ranks in itertools.product(range(1, 5), range(1, 6), range(1, 4))
            if 3 * sum(ranks) <= budget
        )
        assert kept(found) == pytest.approx(best)


def test_ranks_under_a_budget_are_multiples():
    flat = compression.Spectrum(np.full((2, 20), 1 / 20), 10)
    steep = compression.Spectrum(2.0 ** -np.arange(1, 21)[None], 10)
    found = compression.allocate({"flat": flat, "steep": steep}, budget=240, multiple=4)
    assert found == {"flat": 20, "steep": 4}
    with pytest.raises(errors.UserError, match=r"budget: 79 parameters are too few"):
        compression.allocate({"flat": flat, "steep": steep}, budget=79, multiple=4)


def test_spectra_are_shares_of_the_outputs():
    params, text = params_and_text()
    spectra = lambda *names, **options: compression.spectra(
        compression.matrices_of(compression.layers_of(params), names, **options), DENSE
    )
    inputs = compression.Inputs(params["embedding"], text, DENSE)
    found = spectra("down", "q", inputs=inputs)
    most = DENSE.d_model * DENSE.d_ff // (DENSE.d_model + DENSE.d_ff + 1)
    assert found["down"].squares.shape == (DENSE.num_layers, most)
    assert np.all(np.diff(found["down"].squares) <= 0)
    plain = spectra("q")
    first = model.unstack_layers(params)["layers"][0]["q"]
    s = np.square(np.linalg.svd(np.asarray(first), compute_uv=False))
    np.testing.assert_allclose(
        plain["q"].squares[0], (s / s.sum())[: len(plain["q"].squares[0])], rtol=1e-4
    )
    # What is kept agrees with the truncation itself.
    inputs = compression.Inputs(params["embedding"], text, DENSE)
    layer = next(compression.layers_of(params))
    moment, w = inputs.second_moments(layer)["down"], layer["down"]
    factors = spectral.from_dense(w, rank=6, second_moment=moment)
    root = np.linalg.cholesky(
        np.asarray(moment, np.float64) + 1e-7 * np.eye(len(moment))
    )
    total = np.sum(np.square(root.T @ np.asarray(w)))
    lost = output_error(root.T, np.asarray(w, np.float64), factors) / total
    assert found["down"].squares[0, :6].sum() == pytest.approx(1 - lost, abs=1e-3)
