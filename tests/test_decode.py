import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples

from sct_jax import decode, model, sampling

GREEDY = sampling.SamplingConfig(temperature=0.0)
ALL = model.BLOCK_MATRICES
BASE = dataclasses.replace(
    samples.SMALL, num_kv_heads=samples.SMALL.num_heads // 2, spectral=ALL
)
CONFIGS = {
    "spectral": BASE,
    "dense": dataclasses.replace(BASE, spectral=()),
    "low rank, normalised keys, heads of another size": dataclasses.replace(
        BASE, factors="low_rank", qk_norm=True, head_dim=6, tie_embeddings=False
    ),
    "layers apart, stretched rotation": dataclasses.replace(
        BASE,
        scan_layers=False,
        spectral=("k", "down"),
        rope_scaling=model.RopeScaling(kind="llama3", factor=8.0, original_length=16),
    ),
}
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]]

forward = jax.jit(model.forward, static_argnames="config")


@functools.cache
def params_of(name):
    params = model.init(jax.random.key(0), CONFIGS[name])
    # Large enough logits for the likeliest token to be clear.
    return params | {"final_norm": 20 * params["final_norm"]}


def greedy_without_cache(name, prompt, count):
    ids = list(prompt)
    width = len(prompt) + count
    for _ in range(count):
        padded = jnp.array([ids + [0] * (width - len(ids))])
        logits = forward(params_of(name), padded, CONFIGS[name])[0, len(ids) - 1]
        ids.append(int(jnp.argmax(logits)))
    return ids[len(prompt) :]


def generate(name, prompts, **options):
    options = {"num_tokens": 8, "key": jax.random.key(1), "sampler": GREEDY} | options
    return decode.generate(params_of(name), CONFIGS[name], prompts, **options)


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_gives_what_a_pass_over_all_tokens_gives(name, latent):
    wanted = [greedy_without_cache(name, prompt, 8) for prompt in PROMPTS]
    assert generate(name, PROMPTS, latent=latent) == wanted
    assert [generate(name, [p], latent=latent)[0] for p in PROMPTS] == wanted


@pytest.mark.parametrize("name", CONFIGS)
def test_the_latent_cache_gives_the_logits_of_the_ordinary_one(name):
    config = CONFIGS[name]
    params = decode.prepare(params_of(name), config)
    tokens = jnp.array(PROMPTS[2])[None]
    found = []
    for latent in (False, True):
        cache = decode.init_cache(params, config, batch=1, slots=16, latent=latent)
        lengths = jnp.array([tokens.shape[1]])
        first, cache = decode.prefill(params, tokens, lengths, cache, config)
        second, cache = decode.advance(params, jnp.array([7]), cache, config)
        assert cache.lengths == tokens.shape[1] + 1
        found.append((first, second))
    plain, latent = found
    whole = forward(params, jnp.append(tokens, jnp.array([[7]]), axis=1), config)
    for ours, other, direct in zip(plain, latent, whole[0, -2:], strict=True):
        scale = float(jnp.max(jnp.abs(ours)))
        np.testing.assert_allclose(ours, other, atol=1e-5 * scale)
        np.testing.assert_allclose(ours[0], direct, atol=1e-5 * scale)


def test_the_latent_cache_holds_the_rank_per_factorised_matrix():
    config = dataclasses.replace(BASE, spectral=("k",), rank=3)
    params = decode.prepare(model.init(jax.random.key(0), config), config)
    sizes = [
        decode.bytes_per_token(params, config, latent=latent)
        for latent in (False, True)
    ]
    width = config.num_kv_heads * config.head_size
    layers = 4 * config.num_layers
    assert sizes == [layers * 2 * width, layers * (3 + width)]


def test_a_stop_token_ends_its_row_and_is_not_returned():
    plain = generate("spectral", PROMPTS)
    stop = plain[0][3]
    stopped = generate("spectral", PROMPTS, stop=[stop])
    for row, whole in zip(stopped, plain, strict=True):
        end = whole.index(stop) if stop in whole else len(whole)
        assert row == whole[:end]
    assert generate("spectral", [PROMPTS[0]], stop=[plain[0][0]]) == [[]]


def test_a_stream_gives_a_token_per_prompt_at_a_time():
    rows = list(
        decode.stream(
            params_of("spectral"),
            BASE,
            PROMPTS,
            num_tokens=4,
            key=jax.random.key(1),
            sampler=GREEDY,
        )
    )
    assert [list(column) for column in zip(*rows, strict=True)] == [
        row[:4] for row in generate("spectral", PROMPTS)
    ]


def test_draws_repeat_with_their_key_and_change_with_it():
    warm = sampling.SamplingConfig(temperature=5.0)
    first, second, other = (
        generate("spectral", PROMPTS, sampler=warm, key=jax.random.key(seed))
        for seed in (0, 0, 1)
    )
    assert first == second != other


def test_penalised_tokens_do_not_come_back():
    sampler = sampling.SamplingConfig(temperature=0.0, repetition_penalty=1e5)
    (found,) = generate("spectral", [PROMPTS[0]], sampler=sampler)
    assert len({*found, *PROMPTS[0]}) == len(found) + len({*PROMPTS[0]})


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one token"),
        ([[1], []], {}, "at least one token"),
        ([[BASE.vocab_size]], {}, "tokens must be in"),
        ([[-1]], {}, "tokens must be in"),
        ([[1]], {"num_tokens": 0}, "num_tokens"),
        ([[1]], {"sampler": sampling.SamplingConfig(top_p=0.0)}, "top_p"),
    ],
)
def test_what_cannot_be_generated_is_refused(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate("spectral", prompts, **options)


def test_rows_of_one_length_compile_once():
    before = decode._continue._cache_size()
    for seed in range(3):
        generate("dense", [[seed + 1] * 3], num_tokens=3 + seed)
    assert decode._continue._cache_size() <= before + 1
