"""A trial trains its branches through the Trainer, and records what it should."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from samples import SHAPE

from experiments.studies import forward_variants, measure, methods, rows, train
from experiments.studies import trial as trial_lib
from sct_jax import data, errors, model, sharding, spectral
from sct_jax.training import accounting, config, optimizer_config, trainer
from sct_jax.training import state as state_lib

TOKENS, FLOPS = trial_lib.Budget("tokens", 1.0), trial_lib.Budget("flops", 1.0)
LOW_RANK_ADAMW = methods.compose(methods.LOW_RANK, methods.ADAMW)


@pytest.fixture(scope="module")
def experiment(text_files, tmp_path_factory):
    return config.ExperimentConfig(
        model=SHAPE,
        data=data.DataConfig(
            source=text_files,
            batch_size=4,
            seq_len=8,
            cache_dir=str(tmp_path_factory.mktemp("cache")),
        ),
        optimizer=optimizer_config.Sct(
            schedule="wsd", warmup_steps=2, peak_learning_rate=0.01
        ),
        eval=config.EvalConfig(num_batches=2),
    )


@pytest.fixture(scope="module")
def corpus(experiment):
    return data.prepare(experiment.data, vocab_size=SHAPE.vocab_size, log=str)


def make(experiment, *changes, steps=(10,), method="method", **fields):
    """A trial with a branch per length, on the experiment with some changes."""
    changed = methods.compose(*changes)(experiment)
    branches = zip((TOKENS, FLOPS), steps, strict=False)
    return trial_lib.Trial(
        method=method,
        experiment=dataclasses.replace(changed, num_steps=max(steps)),
        branches=tuple(trial_lib.Branch(*branch) for branch in branches),
        **fields,
    )


def with_fields(**fields):
    """A change of fields of the experiment itself, or of one of its groups."""

    def change(experiment):
        new = {
            name: dataclasses.replace(getattr(experiment, name), **value)
            if isinstance(value, dict)
            else value
            for name, value in fields.items()
        }
        return dataclasses.replace(experiment, **new)

    return change


@pytest.fixture(scope="module")
def branched(experiment, corpus):
    """A trial of two branches, its row, and its calls of Trainer.step."""
    trial = make(experiment, steps=(10, 20))
    calls, step = [], trainer.Trainer.step

    def counted(self, state, batch, *, diagnose):
        calls.append(diagnose)
        return step(self, state, batch, diagnose=diagnose)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "step", counted)
        row = train.run(trial, corpus)
    return trial, row, calls


def test_a_trial_goes_through_the_trainer(branched):
    _, _, calls = branched
    # The trunk to step 16, and decays of 2 and 4 steps.
    assert len(calls) == 16 + 2 + 4
    assert sum(calls) == 3  # at steps 10, of both, and 20


def test_the_longest_branch_is_an_ordinary_run(branched, corpus):
    """With the schedule compiled in, not injected, and without a fork."""
    trial, row, _ = branched
    experiment = trial.experiment
    ordinary = trainer.Trainer(experiment, sharding.MeshConfig().build(1))
    state = ordinary.init(jax.random.key(experiment.seed))
    batches = data.train_batches(corpus, experiment.data, seed=experiment.seed)
    losses = []
    for _ in range(experiment.num_steps):
        state, metrics = ordinary.step(state, next(batches), diagnose=False)
        losses.append(float(metrics["loss"]))
    found = ordinary.evaluate(state.params, ordinary.held_out(corpus))
    assert row.loss(FLOPS) == pytest.approx(found["eval/loss"], rel=2e-4)
    kept = [sample.value for sample in row.train_loss]
    expected = [np.mean(losses[:10]), np.mean(losses[10:])]
    np.testing.assert_allclose(kept, expected, rtol=2e-4)


def test_a_shorter_branch_is_a_trial_of_its_own(branched, corpus):
    trial, row, _ = branched
    alone = train.run(make(trial.experiment, steps=(10,)), corpus)
    assert alone.results[TOKENS] == row.results[TOKENS]


def test_a_row_has_what_was_spent_and_recorded(branched):
    trial, row, _ = branched
    text = json.dumps(rows.to_dict(row), allow_nan=False)
    again = rows.from_dict(json.loads(text))
    assert again.trial == row.trial == trial
    per_token = accounting.flops_per_token(SHAPE, seq_len=8)
    assert again.results[TOKENS].tokens == 10 * 32
    assert again.results[FLOPS].flops == 20 * 32 * per_token
    layers = 3 * 2 * accounting.block_flops(SHAPE, seq_len=8)
    assert again.results[FLOPS].layer_flops == 20 * 32 * layers
    assert row.parameters == accounting.parameters(SHAPE)
    assert [sample.step for sample in row.update_norms] == [10, 20]
    assert all(sample.value > 0 for sample in row.update_norms)
    assert set(row.effective_ranks) == set(model.BLOCK_MATRICES)
    measured = [sample.step for sample in row.effective_ranks["q"]]
    assert measured == [0, 5, 10, 15, 20]
    assert set(row.spectra) == {"down"}
    assert len(row.spectra["down"]) == SHAPE.matrix_rank("down")


def test_a_long_run_has_few_samples_and_its_largest_norm(monkeypatch):
    record = measure.Record(20, is_linear=True)
    record.losses = [5.0, 3.0] * 10
    record.update_norms = [rows.Sample(10, 0.2), rows.Sample(20, 0.1)]
    assert len(record.fields()["train_loss"]) == 2
    monkeypatch.setattr(measure, "CURVE_SAMPLES", 1)
    assert record.fields()["train_loss"] == [(20, 4.0)]
    assert record.fields()["update_norms"] == [(20, 0.2)]


def test_fields_without_effect_make_no_other_trial(experiment):
    trial = make(experiment)
    assert trial.identity == make(experiment).identity
    assert {trial.identity: 1}[make(experiment).identity] == 1
    for other in (
        make(experiment, method="other"),
        make(experiment, with_fields(seed=1)),
        make(experiment, methods.optimizer(peak_learning_rate=0.02)),
        make(experiment, non_matrix_lr=0.003),
        make(experiment, forward="unit_spectrum"),
        make(experiment, steps=(11,)),
        make(experiment, with_fields(eval={"num_batches": 1})),
    ):
        assert other.identity != trial.identity
        assert other.digest != trial.digest
    for same in (
        make(experiment, with_fields(data={"cache_dir": "elsewhere"})),
        make(experiment, with_fields(checkpoint={"every": 7})),
        make(experiment, with_fields(eval={"every": 7}, log_every=7)),
        make(experiment, variation_of="another"),
    ):
        assert same != trial
        assert same.identity == trial.identity and same.digest == trial.digest


def test_trials_with_other_rates_and_seeds_share_a_compiled_trainer(
    branched, corpus, monkeypatch
):
    """And a step is timed at the peak learning rate of its trial."""
    trial, _, _ = branched
    other = make(
        trial.experiment,
        methods.optimizer(peak_learning_rate=0.02),
        with_fields(seed=3),
        non_matrix_lr=0.003,
    )
    shared = train.trainer_of(other)
    assert shared is train.trainer_of(trial)
    assert shared.compile(shared.init(jax.random.key(0))) == 0.0  # it is compiled
    seen, step = [], trainer.Trainer.step

    def watched(self, state, batch, *, diagnose):
        rates = state.opt_state.hyperparams
        seen.append(float(rates["learning_rate"]))
        seen.append(float(rates["learning_rate"] * rates["dense_lr_multiplier"]))
        return step(self, state, batch, diagnose=diagnose)

    monkeypatch.setattr(trainer.Trainer, "step", watched)
    plain, guided = train.seconds_per_step({"a": other}, corpus, rounds=2)["a"]
    assert plain == guided > 0
    np.testing.assert_allclose(seen, [0.02, 0.003] * 3, rtol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        methods.compose(methods.DENSE, methods.MUON),
        methods.compose(methods.LOW_RANK, methods.SPECTRON()),
        methods.STIEFEL_MUON(),
        methods.compose(),
        methods.compose(methods.DENSE, methods.ADAMW),
        LOW_RANK_ADAMW,
    ],
    ids=["muon", "spectron", "stiefel_muon", "sct", "adamw", "adamw, low rank"],
)
def test_other_parameters_have_their_own_rate(experiment, change):
    """Whatever the rate of the matrices, at half of the peak."""
    trial = make(
        experiment,
        change,
        methods.optimizer(peak_learning_rate=1e-9),
        non_matrix_lr=0.01,
    )
    tx = train.trainer_of(trial).tx
    params = model.init(jax.random.key(0), trial.experiment.model)
    state = state_lib.start(params, tx)
    state = train.at_rate(state, trial, 0.5e-9)
    updates, _ = jax.jit(tx.update)(params, state.opt_state, params)
    # Adam's first step has the size of its rate.
    moved = np.abs(updates["embedding"]).max()
    assert moved == pytest.approx(0.005, rel=1e-3)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_the_norm_of_a_dense_update_is_its_spectral_norm(scan_layers):
    shape = accounting.dense_config(SHAPE)
    shape = dataclasses.replace(shape, scan_layers=scan_layers)
    old = model.init(jax.random.key(0), shape)
    noise = optax.tree.random_like(jax.random.key(1), old, sampler=jax.random.normal)
    new = jax.tree.map(jnp.add, old, noise)
    expected = max(
        np.max(np.linalg.norm(np.asarray(block[name]), 2, axis=(-2, -1)))
        for name in model.BLOCK_MATRICES
        for block in measure.blocks(noise)
    )
    found = float(measure.diagnose(old, new)["composite_update_norm"])
    assert expected * (1 - 1e-5) <= found < 1.01 * expected


def test_a_diverged_trial_has_a_row(experiment, corpus):
    change = methods.optimizer(peak_learning_rate=1e30)
    row = train.run(make(experiment, change, steps=(20, 30)), corpus)
    assert [result.loss for result in row.results.values()] == [math.inf, math.inf]
    found = rows.to_dict(row)
    assert [result["loss"] for result in found["results"]] == [None, None]
    json.dumps(found, allow_nan=False)


@pytest.mark.slow
def test_factors_that_leave_the_manifold_have_a_norm_too(experiment, corpus):
    row = train.run(make(experiment, methods.optimizer(retraction="none")), corpus)
    ((step, norm),) = row.update_norms
    assert step == 10 and 0 < norm < 1
    assert row.loss(TOKENS) < 6


@pytest.mark.slow
def test_ranks_change_within_a_trial(experiment, corpus):
    changes = (
        methods.optimizer(optimizer_config.Tsvd),
        methods.adaptive_rank(
            energy=0.45, every=5, warmup_steps=0, floor=2, multiple=2, headroom=0.0
        ),
    )
    row = train.run(make(experiment, *changes), corpus)
    assert row.effective_ranks["q"][-1].value <= 2
    _, ranks = row.ranks[-1]
    assert ranks["layers/q"] == 2
    assert row.parameters < accounting.parameters(SHAPE)


@pytest.mark.slow
def test_a_guide_trains_and_leaves_its_factors(experiment, corpus):
    trial = make(experiment, LOW_RANK_ADAMW, forward="self_guided")
    row = train.run(trial, corpus)
    assert row.parameters == accounting.parameters(SHAPE) - 2 * 4 * 2  # no s
    assert row.loss(TOKENS) < 6


# --- Forward variants.


def test_the_unit_spectrum_has_all_singular_values_1():
    params = model.init(jax.random.key(0), SHAPE)
    started = forward_variants.unit_spectrum(params)
    for name in SHAPE.spectral:
        old, new = params["layers"][name], started["layers"][name]
        assert np.all(new.s == 1)
        np.testing.assert_array_equal(old.u, new.u)


def low_rank(key=0):
    return spectral.to_low_rank(spectral.init(jax.random.key(key), 6, 5, 3))


def test_cola_puts_silu_between_the_factors():
    w, x = low_rank(), jax.random.normal(jax.random.key(1), (2, 4, 6))
    h = np.asarray(x) @ np.asarray(w.a)
    expected = (h / (1 + np.exp(-h))) @ np.asarray(w.b).T
    np.testing.assert_allclose(forward_variants.cola_linear(x, w), expected, atol=1e-6)
    dense = forward_variants.cola_linear(x, jnp.ones((6, 5)))
    np.testing.assert_allclose(dense, x @ np.ones((6, 5)), atol=1e-5)


def test_a_guide_starts_as_its_dense_path_and_ends_as_its_factors():
    x = jax.random.normal(jax.random.key(1), (4, 6))
    w = forward_variants.Guided(jnp.ones((6, 5)), low_rank())
    shares = [
        float(forward_variants.guide_share(jnp.array(t), 10)) for t in (0, 5, 10, 99)
    ]
    np.testing.assert_allclose(shares, [1, 0.5, 0, 0], atol=1e-6)
    first, half, last = (
        forward_variants.guided_linear(jnp.array(share))(x, w)
        for share in (1.0, 0.5, 0.0)
    )
    np.testing.assert_allclose(first, x @ w.dense, atol=1e-5)
    np.testing.assert_allclose(last, x @ spectral.to_dense(w.factors), atol=1e-5)
    np.testing.assert_allclose(half, (first + last) / 2, atol=1e-5)
    unguided = forward_variants.unguided_linear(x, w)
    np.testing.assert_allclose(unguided, last, atol=1e-5)


def test_a_guide_starts_at_the_product_and_costs_its_flops(experiment):
    trial = make(experiment, LOW_RANK_ADAMW, forward="self_guided")
    params = model.init(jax.random.key(0), trial.experiment.model)
    for name in SHAPE.spectral:
        w = forward_variants.guide(params)["layers"][name]
        product = np.asarray(w.factors.a) @ np.swapaxes(np.asarray(w.factors.b), -1, -2)
        np.testing.assert_allclose(w.dense, product, atol=1e-6)
    assert trial.fade_steps == 5
    shapes = SHAPE.matrix_shapes()
    matrices = 2 * 3 * 2 * sum(math.prod(shapes[name]) for name in SHAPE.spectral)
    plain = make(experiment, LOW_RANK_ADAMW)
    assert trial.flops(10) - plain.flops(10) == 32 * 5 * matrices


# --- Measurements.


def test_spikes_are_counted_once_each():
    losses = list(np.random.default_rng(0).normal(3, 0.01, 300))
    assert measure.spikes(losses) == []
    losses[150] = losses[151] = 4.0
    losses[250] = math.nan
    assert measure.spikes(losses) == [151, 251]
    assert measure.spikes([3.0] * 49 + [9.0]) == []
    losses[20] = math.inf
    assert measure.spikes(losses) == [21, 151, 251]


def test_a_falling_loss_does_not_hide_its_spikes():
    steps = np.arange(1, 351)
    noise = np.random.default_rng(0).normal(0, 0.1, 350)
    losses = list(7 - 0.5 * np.log(steps) + noise)
    assert measure.spikes(losses) == []
    losses[99] += 0.8
    losses[299] += 0.8
    assert measure.spikes(losses) == [100, 300]


@pytest.mark.parametrize(
    ("kind", "scan_layers"),
    [
        ("spectral", True),
        ("spectral", False),
        ("off_manifold", True),
        ("low_rank", True),
        ("dense", True),
    ],
)
def test_spectra_are_singular_values(kind, scan_layers):
    shape = dataclasses.replace(
        SHAPE,
        factors="low_rank" if kind == "low_rank" else "spectral",
        spectral=() if kind == "dense" else SHAPE.spectral,
        scan_layers=scan_layers,
    )
    params = model.init(jax.random.key(0), shape)
    if kind == "off_manifold":
        bent = lambda w: w._replace(u=w.u * jnp.arange(1.0, 1 + w.u.shape[-1]))
        params = jax.tree.map(
            lambda w: bent(w) if spectral.is_spectral(w) else w,
            params,
            is_leaf=spectral.is_factors,
        )
    found = measure.spectra(params)
    for name in model.BLOCK_MATRICES:
        weights = [block[name] for block in measure.blocks(params)]
        values = [
            np.atleast_2d(
                np.linalg.svd(np.asarray(spectral.to_dense(w)), compute_uv=False)
            )
            for w in weights
        ]
        expected = np.concatenate(values).mean(0)[: len(found[name])]
        np.testing.assert_allclose(found[name], expected, atol=2e-5)


def test_the_effective_rank_of_equal_values_is_their_number():
    assert measure.effective_rank(np.ones(5)) == pytest.approx(5)
    assert measure.effective_rank(np.array([1.0, 0, 0])) == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ((), {"forward": "colla"}, "did you mean 'cola'"),
        ((), {"forward": "cola"}, "needs model.factors = 'low_rank'"),
        (
            (LOW_RANK_ADAMW, methods.model(spectral=("q", "embedding"))),
            {"forward": "cola"},
            "needs a dense embedding and head",
        ),
        ((methods.optimizer(schedule="cosine"),), {}, 'need the schedule "wsd"'),
        (
            (with_fields(step="layerwise", model={"scan_layers": False}),),
            {},
            "method: step: .*'fused'",
        ),
        ((with_fields(mesh={"tensor": 2}),), {}, "method: mesh: .*one device"),
        (
            (LOW_RANK_ADAMW,),
            {"forward": "self_guided", "steps": (50, 5)},
            "25 steps; the shortest has 5, so name it first",
        ),
    ],
)
def test_an_invalid_trial_is_refused(experiment, changes, fields, message):
    with pytest.raises(errors.UserError, match=message):
        make(experiment, *changes, **fields).validate()
