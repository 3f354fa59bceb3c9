"""A trial trains what it says: branches, rates, forward passes, spikes, spectra."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from samples import SHAPE

from experiments.studies import forward_variants, trial
from sct_jax import data, errors, model, optimizers, spectral
from sct_jax.training import accounting, config
from sct_jax.training import step as step_lib


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
        optimizer=optimizers.OptimizerConfig(
            schedule="wsd", warmup_steps=2, peak_learning_rate=0.01
        ),
        eval=config.EvalConfig(num_batches=2),
    )


@pytest.fixture(scope="module")
def corpus(experiment):
    return data.prepare(experiment.data, vocab_size=SHAPE.vocab_size, log=str)


def make(experiment, *, horizons=(("tokens 1", 10),), arm="arm", method="plain", **kw):
    fields = {"adam_rate": kw.pop("adam_rate", None)}
    for field, text in kw.items():
        experiment = config.override(experiment, field.replace("__", "."), text)
    longest = max(steps for _, steps in horizons)
    return trial.Trial(
        arm=arm,
        experiment=dataclasses.replace(experiment, num_steps=longest),
        horizons=horizons,
        method=method,
        **fields,
    )


def alone(item, corpus):
    """The same training by the ordinary step and schedule, without any branch."""
    experiment = item.experiment
    tx = experiment.optimizer.build(
        experiment.num_steps,
        decay_mask=model.decay_mask,
        matrix_mask=model.hidden_matrices,
    )
    params = model.init(jax.random.key(experiment.seed), experiment.model)
    state = trial.state_lib.TrainState(
        step=jnp.zeros([], jnp.int32), params=params, opt_state=tx.init(params)
    )
    step = jax.jit(step_lib.make_train_step(experiment.model, tx))
    batches = data.train_batches(corpus, experiment.data, seed=experiment.seed)
    losses = []
    for _ in range(experiment.num_steps):
        state, metrics = step(state, next(batches), jnp.array(False))
        losses.append(float(metrics["loss"]))
    evaluate = trial.evaluation.make_evaluation(
        experiment, corpus, trial.sharding.MeshConfig().build(1)
    )
    return losses, evaluate(state.params)["eval/loss"]


@pytest.fixture(scope="module")
def branched(experiment, corpus):
    item = make(experiment, horizons=(("tokens 1", 10), ("flops 1", 20)))
    return item, trial.run(item, corpus)


def test_a_branch_is_the_run_of_its_length(branched, corpus):
    item, row = branched
    for name, steps in item.horizons:
        shorter = dataclasses.replace(
            item,
            experiment=dataclasses.replace(item.experiment, num_steps=steps),
            horizons=((name, steps),),
        )
        losses, held_out = alone(shorter, corpus)
        assert row["results"][name]["loss"] == pytest.approx(held_out, rel=2e-4)
    kept = [mean for _, mean in row["train_loss"]]
    expected = [np.mean(losses[:10]), np.mean(losses[10:20])]
    np.testing.assert_allclose(kept, expected, rtol=2e-4)


def test_a_row_is_json_and_says_what_was_spent(branched):
    item, row = branched
    text = json.dumps(row, allow_nan=False)
    assert config.from_dict(json.loads(text)["definition"], trial.Trial) == item
    per_token = accounting.flops_per_token(SHAPE, seq_len=8)
    ends = row["results"]
    assert ends["tokens 1"]["tokens"] == 10 * 32
    assert ends["flops 1"]["flops"] == 20 * 32 * per_token
    blocks = 3 * 2 * accounting.block_flops(SHAPE, seq_len=8)
    assert ends["flops 1"]["block_flops"] == 20 * 32 * blocks
    assert row["parameters"] == accounting.parameters(SHAPE)
    assert [step for step, _ in row["update_norms"]] == [10, 20]
    assert all(norm > 0 for _, norm in row["update_norms"])
    assert set(row["effective_ranks"]) == set(model.BLOCK_MATRICES)
    assert [p[0] for p in row["effective_ranks"]["q"]] == [0, 5, 10, 15, 20]
    assert set(row["spectra"]) == {"down"}
    assert len(row["spectra"]["down"]) == SHAPE.matrix_rank("down")


def test_a_long_run_has_few_points_and_its_largest_norm(branched, corpus, monkeypatch):
    item, row = branched
    monkeypatch.setattr(trial, "CURVE_POINTS", 1)
    few = trial.run(item, corpus)
    means = [mean for _, mean in row["train_loss"]]
    ((step, mean),) = few["train_loss"]
    assert step == 20 and mean == pytest.approx(np.mean(means), rel=1e-4)
    assert few["update_norms"] == [[20, max(n for _, n in row["update_norms"])]]


def test_the_key_is_of_the_definition_alone(experiment):
    item = make(experiment)
    assert item.key == make(experiment).key
    for other in (
        make(experiment, arm="other"),
        make(experiment, seed="1"),
        make(experiment, optimizer__peak_learning_rate="0.02"),
        make(experiment, adam_rate=0.003),
        make(experiment, method="unit_spectrum"),
        make(experiment, horizons=(("tokens 1", 11),)),
    ):
        assert other.key != item.key
    # What changes nothing of a row does not make it another trial.
    for same in (
        make(experiment, data__cache_dir="elsewhere"),
        make(experiment, checkpoint__every="7"),
        make(experiment, eval__every="7"),
        make(experiment, log_every="7"),
    ):
        assert same != item and same.key == item.key
    assert make(experiment, eval__num_batches="1").key != item.key


def test_rates_change_without_compiling_again(experiment, corpus):
    first, second = (
        make(experiment, optimizer__peak_learning_rate=rate, seed=seed)
        for rate, seed in (("0.013", "3"), ("0.017", "4"))
    )
    trial.run(first, corpus)
    program = trial._program(trial._without_rates(first))
    compiled = program.step._cache_size()
    trial.run(second, corpus)
    assert trial._program(trial._without_rates(second)) is program
    assert program.step._cache_size() == compiled


@pytest.mark.parametrize(
    "fields",
    [
        {"model__spectral": "()", "optimizer__name": "muon"},
        {"model__factors": "low_rank", "optimizer__name": "spectron"},
        {"optimizer__name": "stiefel_muon"},
        {"optimizer__name": "sct"},
        {"model__spectral": "()", "optimizer__name": "adamw"},
        {"model__factors": "low_rank", "optimizer__name": "adamw"},
    ],
    ids=["muon", "spectron", "stiefel_muon", "sct", "adamw", "adamw, low rank"],
)
def test_the_other_leaves_have_a_rate_of_their_own(experiment, corpus, fields):
    """With a rate of 1e-9 for the matrices the embedding moves as at a rate of 1."""
    moved = {}
    for rate in (1e-9, 1e-3):
        item = make(
            experiment,
            optimizer__peak_learning_rate=str(rate),
            adam_rate=0.01,
            **fields,
        )
        program = trial._program(trial._without_rates(item))
        state = program.init(jax.random.key(0))
        before = np.asarray(state.params["embedding"])
        state = trial._advance(item, program, corpus, state, 0, 1, 10, None)
        moved[rate] = np.abs(np.asarray(state.params["embedding"]) - before).max()
    # Half of the peak in the first of two steps of warm-up; Adam's first step has the
    # size of its rate.
    assert moved[1e-9] == pytest.approx(0.005, rel=1e-3)
    assert moved[1e-3] == pytest.approx(0.005, rel=1e-3)


def test_a_step_is_timed_at_the_rate_of_its_trial(experiment, corpus, monkeypatch):
    item = make(experiment, adam_rate=0.003, optimizer__peak_learning_rate="0.02")
    seen, program = [], trial._program(trial._without_rates(item))

    def watch(state, batch, diagnose):
        rates = state.opt_state.hyperparams
        seen.append(float(rates["learning_rate"]))
        seen.append(float(rates["learning_rate"] * rates["dense_lr_multiplier"]))
        return program.step(state, batch, diagnose)

    watched = program._replace(step=watch, guided_step=watch)
    monkeypatch.setattr(trial, "_program", lambda _: watched)
    taken = trial.seconds_per_step({"a": item}, corpus, rounds=2)
    plain, guided = taken["a"]
    assert plain == guided > 0
    np.testing.assert_allclose(seen, [0.02, 0.003] * 3, rtol=1e-6)


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
        for block in trial._blocks(noise)
    )
    found = float(trial._dense_update_norm(old, new))
    assert expected * (1 - 1e-5) <= found < 1.01 * expected


def test_micro_batches_and_unstacked_layers_change_no_loss(branched, corpus):
    item, row = branched
    fields = {"data.num_microbatches": "2", "model.scan_layers": "false"}
    experiment = item.experiment
    for field, text in fields.items():
        experiment = config.override(experiment, field, text)
    other = dataclasses.replace(item, experiment=experiment)
    other.validate()
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        make_train_step = trial.step_lib.make_train_step

        def watch(*args, num_microbatches, **keywords):
            seen.append(num_microbatches)
            return make_train_step(*args, num_microbatches=num_microbatches, **keywords)

        patch.setattr(trial.train_step, "make_train_step", watch)
        found = trial.run(other, corpus)
    assert seen == [2]
    for name, result in found["results"].items():
        assert result["loss"] == pytest.approx(row["results"][name]["loss"], rel=1e-3)


def test_a_diverged_trial_is_a_row(experiment, corpus):
    item = make(
        experiment,
        horizons=(("tokens 1", 20), ("flops 1", 30)),
        model__factors="low_rank",
        optimizer__name="adamw",
        optimizer__peak_learning_rate="1e30",
    )
    row = trial.run(item, corpus)
    assert [r["loss"] for r in row["results"].values()] == [None, None]
    json.dumps(row, allow_nan=False)


@pytest.mark.slow
def test_factors_that_leave_the_manifold_have_a_norm_too(experiment, corpus):
    item = make(
        experiment, optimizer__name="tsvd", optimizer__retraction_every="1000000"
    )
    row = trial.run(item, corpus)
    ((step, norm),) = row["update_norms"]
    assert step == 10 and 0 < norm < 1
    assert row["results"]["tokens 1"]["loss"] < 6


@pytest.mark.slow
def test_ranks_change_within_a_trial(experiment, corpus):
    item = make(
        experiment,
        optimizer__name="tsvd",
        rank__energy="0.6",
        rank__every="5",
        rank__warmup_steps="0",
        rank__floor="2",
        rank__multiple="2",
        rank__headroom="0",
    )
    row = trial.run(item, corpus)
    assert row["effective_ranks"]["q"][-1][1] <= 2
    assert row["ranks"]
    _, ranks = row["ranks"][-1]
    assert ranks["layers/q"] == 2
    assert row["parameters"] < accounting.parameters(SHAPE)


def test_the_start_of_sct_has_all_singular_values_1():
    params = model.init(jax.random.key(0), SHAPE)
    started = forward_variants.METHODS["unit_spectrum"].prepare(params)
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
    dense = jnp.ones((6, 5))
    np.testing.assert_allclose(
        forward_variants.cola_linear(x, dense), x @ np.ones((6, 5)), atol=1e-5
    )


def test_the_guide_starts_as_the_dense_path_and_ends_as_the_factors():
    x = jax.random.normal(jax.random.key(1), (4, 6))
    w = forward_variants.Guided(jnp.ones((6, 5)), low_rank())
    shares = [
        float(forward_variants.guide_share(jnp.array(t), 10)) for t in (0, 5, 10, 99)
    ]
    np.testing.assert_allclose(shares, [1, 0.5, 0, 0], atol=1e-6)
    mixed = [
        forward_variants.guided_linear(jnp.array(share))(x, w)
        for share in (1.0, 0.5, 0.0)
    ]
    np.testing.assert_allclose(mixed[0], x @ w.dense, atol=1e-5)
    np.testing.assert_allclose(mixed[2], x @ spectral.to_dense(w.factors), atol=1e-5)
    np.testing.assert_allclose(mixed[1], (mixed[0] + mixed[2]) / 2, atol=1e-5)
    np.testing.assert_allclose(
        forward_variants.unguided_linear(x, w), mixed[2], atol=1e-5
    )


def test_a_guide_starts_at_the_product_and_costs_its_flops(experiment, corpus):
    item = make(
        experiment,
        method="self_guided",
        model__factors="low_rank",
        optimizer__name="adamw",
    )
    program = trial._program(trial._without_rates(item))
    layer = program.init(jax.random.key(0)).params["layers"]
    for name in SHAPE.spectral:
        w = layer[name]
        product = np.asarray(w.factors.a) @ np.swapaxes(np.asarray(w.factors.b), -1, -2)
        np.testing.assert_allclose(w.dense, product, atol=1e-6)
    assert item.fade_steps == 5
    matrices = (
        2
        * 3
        * 2
        * sum(math.prod(SHAPE.matrix_shapes()[name]) for name in SHAPE.spectral)
    )
    plain = make(experiment, model__factors="low_rank", optimizer__name="adamw")
    assert item.flops(10) - plain.flops(10) == 32 * 5 * matrices
    row = trial.run(item, corpus)
    assert row["parameters"] == accounting.parameters(SHAPE) - 2 * 4 * 2  # no s
    assert row["results"]["tokens 1"]["loss"] < 6


def test_spikes_are_counted_once_each():
    losses = list(np.random.default_rng(0).normal(3, 0.01, 300))
    assert trial.spikes(losses) == []
    losses[150] = losses[151] = 4.0
    losses[250] = math.nan
    assert trial.spikes(losses) == [151, 251]
    assert trial.spikes([3.0] * 49 + [9.0]) == []
    losses[20] = math.inf
    assert trial.spikes(losses) == [21, 151, 251]


def test_a_loss_that_falls_does_not_hide_its_spikes():
    steps = np.arange(1, 351)
    noise = np.random.default_rng(0).normal(0, 0.1, 350)
    losses = list(7 - 0.5 * np.log(steps) + noise)
    assert trial.spikes(losses) == []
    losses[99] += 0.8
    losses[299] += 0.8
    assert trial.spikes(losses) == [100, 300]


@pytest.mark.parametrize("kind", ["spectral", "off_manifold", "low_rank", "dense"])
def test_spectra_are_singular_values(kind):
    shape = dataclasses.replace(
        SHAPE,
        factors="low_rank" if kind == "low_rank" else "spectral",
        spectral=() if kind == "dense" else SHAPE.spectral,
    )
    params = model.init(jax.random.key(0), shape)
    if kind == "off_manifold":
        bent = lambda w: w._replace(u=w.u * jnp.arange(1.0, 1 + w.u.shape[-1]))
        params = jax.tree.map(
            lambda w: bent(w) if spectral.is_spectral(w) else w,
            params,
            is_leaf=spectral.is_factors,
        )
    found = trial.spectra(params)
    for name in model.BLOCK_MATRICES:
        dense = np.asarray(spectral.to_dense(params["layers"][name]))
        values = np.linalg.svd(dense, compute_uv=False).mean(0)[: len(found[name])]
        np.testing.assert_allclose(found[name], values, atol=2e-5)


def test_the_effective_rank_of_equal_values_is_their_number():
    assert trial.effective_rank(np.ones(5)) == pytest.approx(5)
    assert trial.effective_rank(np.array([1.0, 0, 0])) == pytest.approx(1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "colla"}, "did you mean 'cola'"),
        ({"method": "cola"}, "needs model.factors = 'low_rank'"),
        ({"optimizer__schedule": "cosine"}, 'need the schedule "wsd"'),
        ({"step": "layerwise", "model__scan_layers": "false"}, "arm: step: .*'whole'"),
        ({"mesh__tensor": "2"}, "arm: mesh: .*one device"),
        (
            {
                "method": "self_guided",
                "model__factors": "low_rank",
                "optimizer__name": "adamw",
                "horizons": (("tokens 10", 50), ("tokens 1", 5)),
            },
            "25 steps; the shortest has 5: name it first",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(experiment, fields, message):
    with pytest.raises(errors.UserError, match=message):
        make(experiment, **fields).validate()
