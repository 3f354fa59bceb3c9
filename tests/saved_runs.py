"""Runs on disk, as if they had been trained."""

import contextlib
import dataclasses

import jax
import samples

from sct_jax import data, sharding
from sct_jax.training import config as config_lib
from sct_jax.training import optimizer_config, trainer, workdir

TEXT = "kato mi ren lusha. Wörter über Bäume; 木 🌳 def f(x): return x\n"

DENSE = dataclasses.replace(
    samples.SMALL, vocab_size=300, spectral=(), tie_embeddings=False
)


def config(source, cache_dir, *, seq_len=16, shape=DENSE):
    return config_lib.ExperimentConfig(
        num_steps=3,
        model=shape,
        data=data.DataConfig(
            source=source,
            split="documents",
            cache_dir=str(cache_dir),
            batch_size=4,
            seq_len=seq_len,
        ),
        optimizer=optimizer_config.AdamW(warmup_steps=1),
    )


def state_at(run, step):
    """An initial state as if it had been trained for some steps."""
    at = lambda path, x: (
        jax.numpy.full_like(x, step)
        if sharding.path_name(path).endswith(".count") or path[0].name == "step"
        else x
    )
    state = run.init(jax.random.key(step))
    kept, state = state.guard, state.replace(guard=())
    return jax.tree_util.tree_map_with_path(at, state).replace(guard=kept)


def write(path, settings, *, corpus="0" * 64):
    """Writes a run with a checkpoint at step 3, whose logits are not flat."""
    run = trainer.Trainer(settings, sharding.MeshConfig().build(1))
    tokenizer = data.Tokenizer.train([TEXT] * 10, vocab_size=300)
    state = state_at(run, 3)
    params = state.params | {"final_norm": 3 * state.params["final_norm"]}
    state = state.replace(params=params)
    path.mkdir()
    workdir.write_json(path / "config.json", config_lib.to_dict(settings))
    tokenizer.save(str(path / "tokenizer.json"))
    identity = {"corpus": corpus, "tokenizer": tokenizer.hash}
    with (
        workdir.claim(path) as claimed,
        contextlib.closing(workdir.writing(claimed, keep=1)) as checkpoints,
    ):
        record = workdir.record(settings, 3, state, identity)
        checkpoints.save(3, state, record=record)
    return path
