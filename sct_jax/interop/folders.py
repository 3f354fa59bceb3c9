"""The folder of a checkpoint as a run: its tokenizer, and its configuration."""

import dataclasses
import os
import pathlib

from sct_jax import data, errors, model, paths
from sct_jax.interop import importing
from sct_jax.interop import source as source_lib
from sct_jax.training import config as config_lib
from sct_jax.training import workdir


def load(
    path: str | os.PathLike[str], tokenizer: str | None = None
) -> workdir.LoadedRun:
    """Returns the dense model in a folder, as `workdir.load_run` does for a run.

    Args:
      path: the folder, or a name of the hub.
      tokenizer: path of a tokenizer.json; None takes the one in the folder.

    Raises:
      UserError: see `source.open_folder`, `Source.read` and `load_tokenizer`.
    """
    source = source_lib.open_folder(path, flag="--hf")
    loaded = load_tokenizer(source, tokenizer)
    imported = importing.load(source, {})
    file = source.folder / "tokenizer.json"
    if tokenizer is not None:
        file = pathlib.Path(paths.expand("--tokenizer", tokenizer))
    config = run_config(imported.config, source.max_length, file)
    return workdir.LoadedRun(config, imported.params, loaded)


def load_tokenizer(source: source_lib.Source, given: str | None) -> data.Tokenizer:
    """Returns the tokenizer of a checkpoint, or the one that is given.

    Raises:
      UserError: there is none that keeps text as it is, or it has more tokens than the
        model.
    """
    own = source.folder / "tokenizer.json"
    errors.check(
        source.flag,
        given is not None or own.exists(),
        f"{source.folder} has no tokenizer.json"
        + " (tokenizer.model is of another kind)"
        * (source.folder / "tokenizer.model").exists()
        + "; name one with --tokenizer=FILE",
    )
    path = str(own) if given is None else paths.expand("--tokenizer", given)
    try:
        tokenizer = data.Tokenizer.load(path)
    except errors.UserError as error:
        raise errors.UserError(
            f"{error}; give another one of the same ids with --tokenizer=FILE"
        ) from error
    size = source.config.vocab_size
    errors.check(
        "--tokenizer",
        tokenizer.vocab_size <= size,
        f"{path} has ids up to {tokenizer.vocab_size - 1}, but the model has "
        f"{size} tokens; give its own tokenizer with --tokenizer=FILE",
    )
    return tokenizer


def run_config(
    config: model.ModelConfig, max_length: int, tokenizer: pathlib.Path
) -> config_lib.ExperimentConfig:
    """Returns the configuration of a run with the context of a checkpoint.

    Args:
      config: of the model.
      max_length: longest context, in tokens.
      tokenizer: file of its tokenizer.
    """
    settings = data.DataConfig(
        batch_size=1,
        seq_len=max_length,
        tokenizer=str(tokenizer.absolute()),
    )
    settings = dataclasses.replace(settings, split=settings.kinds_of_split[0])
    experiment = config_lib.ExperimentConfig(num_steps=1, model=config, data=settings)
    experiment.validate()
    return experiment
