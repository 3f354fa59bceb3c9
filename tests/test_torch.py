"""SCT against PyTorch: the AdamW of torch, then QR with signs folded into Q."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sct_jax import optimizers, spectral

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # more would compete with the threads of XLA

NUM_STEPS = 20
SHAPES = {"wide": (24, 40, 6), "tall": (33, 17, 4)}


def start():
    rng = np.random.default_rng(0)
    params = {}
    for name, (fan_in, fan_out, rank) in SHAPES.items():
        u, _ = np.linalg.qr(rng.normal(size=(fan_in, rank)))
        v, _ = np.linalg.qr(rng.normal(size=(fan_out, rank)))
        s = np.geomspace(1.5, 0.2, rank)
        params[name] = tuple(x.astype(np.float32) for x in (u, s, v))
    x = rng.normal(size=(50, 24)).astype(np.float32)
    y = rng.normal(size=(50, 40)).astype(np.float32)
    x2 = rng.normal(size=(50, 33)).astype(np.float32)
    y2 = rng.normal(size=(50, 17)).astype(np.float32)
    return params, {"wide": (x, y), "tall": (x2, y2)}


@functools.cache
def by_torch(learning_rate, weight_decay):
    """The reference loop: forward, AdamW, sign-corrected QR."""
    params, batches = start()
    tensors = {
        name: [torch.tensor(x, requires_grad=True) for x in factors]
        for name, factors in params.items()
    }
    decayed = [s for _, s, _ in tensors.values()]
    free = [x for u, _, v in tensors.values() for x in (u, v)]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": free, "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    history = []
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        loss = torch.zeros(())
        for name, (u, s, v) in tensors.items():
            x, y = (torch.tensor(a) for a in batches[name])
            loss = loss + torch.mean((((x @ u) * s) @ v.T - y) ** 2)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for u, _, v in tensors.values():
                for x in (u, v):
                    q, r = torch.linalg.qr(x)
                    x.copy_(q * torch.sign(torch.diagonal(r)))
        history.append(
            {
                name: [x.detach().numpy().copy() for x in factors]
                for name, factors in tensors.items()
            }
        )
    return history


def by_sct_jax(learning_rate, weight_decay, retraction):
    params, batches = start()
    batches = jax.tree.map(jnp.asarray, batches)
    params = {
        name: spectral.SpectralFactors(*map(jnp.asarray, factors))
        for name, factors in params.items()
    }
    tx = optimizers.sct(learning_rate, weight_decay=weight_decay, retraction=retraction)

    def loss_fn(params):
        return sum(
            jnp.mean(
                jnp.square(spectral.linear(batches[name][0], w) - batches[name][1])
            )
            for name, w in params.items()
        )

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, history = tx.init(params), []
    for _ in range(NUM_STEPS):
        params, state = step(params, state)
        history.append(params)
    return history


@pytest.mark.parametrize("retraction", ["qr", "cholesky_qr"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_twenty_steps_match_the_pytorch_reference(weight_decay, retraction):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # raised inside torch
        expected = by_torch(1e-2, weight_decay)
    found = by_sct_jax(1e-2, weight_decay, retraction)
    assert not np.allclose(expected[0]["wide"][0], expected[-1]["wide"][0], atol=1e-2)
    for ours, theirs in zip(found, expected, strict=True):
        for name, w in ours.items():
            for x, y in zip(w, theirs[name], strict=True):
                np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
