import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sct_jax import errors, sampling

LOGITS = np.log([0.4, 0.25, 0.15, 0.1, 0.06, 0.04]).astype(np.float32)
DRAWS = 20_000


def formula(config: sampling.SamplingConfig, seen=()) -> np.ndarray:
    """The distribution in float64, written as a loop."""
    logits = LOGITS.astype(np.float64)
    for token in seen:
        penalty = config.repetition_penalty
        logits[token] = (
            logits[token] * penalty if logits[token] < 0 else (logits[token] / penalty)
        )
    p = np.exp(logits / config.temperature)
    p /= p.sum()
    if config.top_k is not None:
        p[np.argsort(-p)[config.top_k :]] = 0
        p /= p.sum()
    if config.top_p < 1:
        total, kept = 0.0, []
        for token in np.argsort(-p):
            if total >= config.top_p:
                break
            kept.append(token)
            total += p[token]
        p = np.where(np.isin(np.arange(len(p)), kept), p, 0)
        p /= p.sum()
    p[p < config.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"top_k": 100},
        {"top_p": 0.6},
        {"top_p": 0.65},
        {"min_p": 0.3},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "min_p": 0.2},
        {"repetition_penalty": 2.0},
    ],
    ids=str,
)
def test_draws_follow_the_formula(changes):
    config = dataclasses.replace(sampling.SamplingConfig(), **changes)
    seen = (0, 3)
    logits = jnp.tile(LOGITS, (DRAWS, 1))
    mask = jnp.zeros(logits.shape, bool).at[:, jnp.array(seen)].set(True)
    drawn = sampling.draw(jax.random.key(0), logits, mask, config)
    counts = np.bincount(np.asarray(drawn), minlength=len(LOGITS))
    wanted = formula(config, seen) * DRAWS
    assert np.all(counts[wanted == 0] == 0)
    likely = wanted > 0
    chi_square = np.sum((counts - wanted)[likely] ** 2 / wanted[likely])
    # The .9999 quantile of five degrees of freedom.
    assert chi_square < 25.8


def test_temperature_zero_takes_the_likeliest():
    config = sampling.SamplingConfig(temperature=0.0, top_p=0.1)
    seen = jnp.zeros((1, len(LOGITS)), bool)
    assert sampling.draw(jax.random.key(0), jnp.array([LOGITS]), seen, config)[0] == 0


@pytest.mark.parametrize("temperature", [1e-3, 1e-37, 2.0**-126])
def test_the_least_temperatures_take_the_likeliest_too(temperature):
    config = sampling.SamplingConfig(temperature=temperature, top_p=0.9)
    config.validate()
    logits = jnp.array([[100.0, 150.0, 200.0, -50.0]])
    seen = jnp.zeros(logits.shape, bool)
    drawn = sampling.draw(jax.random.key(0), logits, seen, config)
    assert drawn.tolist() == [2]


def test_a_penalty_lowers_logits_of_both_signs():
    logits = jnp.array([[2.0, -2.0, 1.0]])
    seen = jnp.array([[True, True, False]])
    assert sampling.penalise(logits, seen, 4.0).tolist() == [[0.5, -8.0, 1.0]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", 1e-40),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
    ],
)
def test_invalid_settings_are_named(field, value):
    with pytest.raises(errors.UserError, match=f"--{field}"):
        sampling.SamplingConfig(**{field: value}).validate("--")
