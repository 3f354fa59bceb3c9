"""The host loop: from a configuration to a trained model in a folder."""

import contextlib
import fcntl
import json
import math
import os
import pathlib
import signal
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int, PRNGKeyArray

from sct_jax import data, errors, model, rank, sharding
from sct_jax.training import accounting, checkpoint, evaluation, layerwise, metrics
from sct_jax.training import config as config_lib
from sct_jax.training import state as state_lib
from sct_jax.training import step as step_lib

FINISHED = 0
DIVERGED = 1
INTERRUPTED = {signal.SIGINT: 130, signal.SIGTERM: 143}

# The closing sample: at most so long, and shorter for a model that is slow here.
_SAMPLE_TOKENS = 96
_SAMPLE_FLOPS = 1e12


class Interrupted(KeyboardInterrupt):
    """A signal arrived while there was no state to save.

    No `Exception`: a handler of errors must not take it for one.
    """

    def __init__(self, exit_code: int):
        super().__init__(f"interrupted before the first step, exit code {exit_code}")
        self.exit_code = exit_code


class LoadedRun(NamedTuple):
    """A run read back from its workdir."""

    config: config_lib.ExperimentConfig
    params: model.Params
    tokenizer: data.Tokenizer


class _Setup(NamedTuple):
    """What a run is made of before there is any state."""

    config: config_lib.ExperimentConfig
    mesh: Mesh
    tx: optax.GradientTransformation
    state: state_lib.TrainState  # abstract, with shardings


def train(
    config: config_lib.ExperimentConfig,
    workdir: str | os.PathLike[str],
    *,
    dry_run: bool = False,
    console: rich.console.Console | None = None,
) -> int:
    """Returns the exit code once the run in `workdir` is at its end, or interrupted.

    Resumes from the newest checkpoint of the workdir. SIGINT and SIGTERM save and
    return 130 and 143; a second signal ends the process at once. A loss that is not
    finite ends the run with 1, and is never saved.

    Args:
      config: the run.
      workdir: where checkpoints, metrics.jsonl, config.json, summary.json and the
        tokenizer go.
      dry_run: print the start table, write summary.json, and return 0. Allocates
        nothing and needs no corpus.
      console: where to print; standard output if None.

    Raises:
      UserError: naming the field, for whatever the user has to change; before
        anything is compiled.
    """
    console = console or rich.console.Console()
    workdir = pathlib.Path(workdir)
    setup = _set_up(config)
    _make_folder(workdir)
    summary = accounting.summary(config.model, setup.tx, seq_len=config.data.seq_len)
    _print_start(console, setup, summary)
    if dry_run:
        earlier = _earlier_config(workdir, _steps_done(workdir))
        if earlier and config_lib.differences(earlier, config):
            metrics.say(
                console,
                f"note: {workdir} holds another run, its summary.json stays as it is",
            )
        else:
            _write_json(workdir / "summary.json", summary)
        return FINISHED
    with _Signals() as signals, _claimed(workdir):
        try:
            done = _steps_done(workdir)
            if earlier := _earlier_config(workdir, done):
                _check_same_run(earlier, config, str(workdir))
            _write_json(workdir / "summary.json", summary)
            if done < config.num_steps or not _can_be_restored(setup, workdir, done):
                return _train(setup, workdir, console, signals)
            metrics.say(
                console, f"finished: {config.num_steps} steps are done, see {workdir}"
            )
            return FINISHED
        except Interrupted as interrupted:
            metrics.say(console, "interrupted before the first step; nothing to save")
            return interrupted.exit_code


def load_run(workdir: str | os.PathLike[str]) -> LoadedRun:
    """Returns configuration, parameters and tokenizer of a run, for use elsewhere.

    Parameters come from the newest whole checkpoint, on the first device.

    Raises:
      UserError: where the workdir holds no run with a checkpoint.
    """
    workdir = pathlib.Path(workdir)
    config = _read_config(workdir)
    mesh = sharding.MeshConfig().build(1)
    abstract = state_lib.abstract(config.model, config.build_optimizer())
    with _reading(workdir) as checkpointer:
        restored = checkpointer.restore(abstract, mesh, adapt=_adapt(config))
    if restored is None:
        raise errors.UserError(f"workdir: {workdir} has no checkpoint yet")
    state, record = restored
    # A run that was made longer, or logged otherwise, is as of its checkpoint.
    config = config_lib.from_dict(record["config"])
    tokenizer = data.Tokenizer.load(str(workdir / "tokenizer.json"))
    return LoadedRun(config, state.params, tokenizer)


def generate(
    params: model.Params,
    config: model.ModelConfig,
    prompt: Int[Array, " P"],
    *,
    key: PRNGKeyArray,
    num_tokens: int = _SAMPLE_TOKENS,
    temperature: float = 0.8,
) -> Int[Array, " N"]:
    """Returns the prompt continued to `num_tokens` tokens, sampled one by one.

    A plain loop without a cache, for a look at a model: each token costs a forward pass
    over the whole buffer. A temperature of 0 takes the likeliest token.

    Raises:
      ValueError: for a prompt without tokens, or of more than `num_tokens`.
    """
    start = prompt.shape[0]
    if not 0 < start <= num_tokens:
        raise ValueError(
            f"the prompt has {start} tokens; 1 to num_tokens = {num_tokens} can be "
            "continued"
        )
    buffer = jnp.zeros(num_tokens, jnp.int32).at[:start].set(prompt)

    def extend(position, buffer):
        scores = model.forward(params, buffer[None], config)[0, position - 1]
        draw = jax.random.fold_in(key, position)
        warm = jax.random.categorical(draw, scores / jnp.maximum(temperature, 1e-6))
        token = jnp.where(temperature > 0, warm, jnp.argmax(scores))
        return buffer.at[position].set(token.astype(jnp.int32))

    return jax.lax.fori_loop(start, num_tokens, extend, buffer)


def _set_up(config: config_lib.ExperimentConfig) -> _Setup:
    config.validate()
    errors.check(
        "mesh",
        jax.process_count() == 1,
        f"{jax.process_count()} processes: one process drives all devices of one host, "
        "start one",
    )
    mesh = config.mesh.build()
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    share = config.data.batch_size // config.data.num_microbatches
    errors.check(
        "data.batch_size",
        share % shards == 0,
        f"{config.data.batch_size} in {config.data.num_microbatches} micro-batches is "
        f"not divisible by mesh.data x mesh.fsdp = {shards}",
    )
    tx = config.build_optimizer()
    state = state_lib.abstract(config.model, tx)
    state = sharding.abstract(state, sharding.shardings(state, mesh))
    return _Setup(config, mesh, tx, state)


def _adapt(config: config_lib.ExperimentConfig) -> checkpoint.Adapt | None:
    """How a checkpoint's record changes the abstract state, where ranks may change."""
    if config.rank.energy is None:
        return None
    return lambda abstract, record: rank.with_ranks(abstract, record["ranks"])


def _train(
    setup: _Setup,
    workdir: pathlib.Path,
    console: rich.console.Console,
    signals: "_Signals",
) -> int:
    config = setup.config
    corpus = data.prepare(
        config.data,
        vocab_size=config.model.vocab_size,
        log=lambda text: metrics.say(console, text),
    )
    tokens = config.num_steps * config.data.tokens_per_step
    metrics.say(
        console,
        f"data: {tokens:,} tokens in {config.num_steps:,} steps, "
        f"{tokens / len(corpus.train):.3g} passes over the training text",
    )
    evaluate = evaluation.make_evaluation(config, corpus, setup.mesh)
    checkpointer = checkpoint.Checkpointer(
        workdir / "checkpoints", keep=config.checkpoint.keep
    )
    with contextlib.closing(checkpointer):
        state, start_step = _start_state(setup, checkpointer, corpus, console)
        # Only a run that can go on claims the folder for its configuration.
        if not start_step or not (workdir / "config.json").exists():
            _write_json(workdir / "config.json", config_lib.to_dict(config))
        corpus.tokenizer.save(str(workdir / "tokenizer.json"))
        batches = data.train_batches(
            corpus,
            config.data,
            seed=config.seed,
            start_step=start_step,
        )
        run = _Run(
            setup,
            checkpointer,
            metrics.open_sinks(workdir, resume_step=start_step),
            metrics.Progress(
                console, start_step=start_step, num_steps=config.num_steps
            ),
            evaluate,
            _identity(corpus),
        )
        with contextlib.closing(run):
            state, exit_code = run.steps(state, start_step, batches, signals)
        if exit_code == FINISHED:
            _print_end(console, setup, workdir, state, corpus)
    return exit_code


def _start_state(
    setup: _Setup,
    checkpointer: checkpoint.Checkpointer,
    corpus: data.Corpus,
    console: rich.console.Console,
) -> tuple[state_lib.TrainState, int]:
    """The newest checkpoint, or a new state."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        restored = checkpointer.restore(
            setup.state, setup.mesh, adapt=_adapt(setup.config)
        )
    for warning in caught:
        metrics.say(console, f"warning: {warning.message}")
    if restored is None:
        shardings = jax.tree.map(lambda x: x.sharding, setup.state)
        initialise = jax.jit(
            lambda key: state_lib.init(key, setup.config.model, setup.tx),
            out_shardings=shardings,
        )
        return initialise(jax.random.key(setup.config.seed)), 0
    state, record = restored
    before, step = config_lib.from_dict(record["config"]), record["step"]
    _check_same_run(before, setup.config, "checkpoints")
    for name, now in _identity(corpus).items():
        then = record.get(name, now)  # the first checkpoints name no tokenizer
        errors.check(
            "data",
            then == now,
            f"the run was trained with a {name} with hash {then[:16]}, "
            f"{setup.config.data.source!r} now has {now[:16]}",
        )
    metrics.say(console, f"resumed at step {step}")
    # The schedule is one of the whole run: a longer one has other rates.
    was, now = (
        float(jnp.asarray(config.optimizer.learning_rate(config.num_steps)(step)))
        for config in (before, setup.config)
    )
    if was != now:
        metrics.say(
            console,
            f"num_steps: {setup.config.num_steps} in the place of {before.num_steps}: "
            f"the learning rate goes on at {now:.2e}, it was at {was:.2e}",
        )
    return state, step


@jax.jit
def _largest(params: model.Params) -> Array:
    """The largest magnitude of all parameters; NaN where one is."""
    return jnp.max(
        jnp.stack(
            [jnp.max(jnp.abs(p)).astype(jnp.float32) for p in jax.tree.leaves(params)]
        )
    )


def _identity(corpus: data.Corpus) -> dict[str, str]:
    """What may not change between the steps of a run, as hashes."""
    return {"corpus": corpus.hash, "tokenizer": corpus.tokenizer.hash}


class _Run:
    """The steps of one process, and what each leaves behind.

    A logged step is fetched from the device only after the next one is dispatched, so
    the device never waits for the host; a checkpoint or an evaluation fetches first.
    """

    def __init__(self, setup, checkpointer, sinks, progress, evaluate, identity):
        self._setup: _Setup = setup
        self._checkpointer: checkpoint.Checkpointer = checkpointer
        self._sinks: metrics.Sinks = sinks
        self._progress: metrics.Progress = progress
        self._evaluate: Callable[[model.Params], metrics.Row] = evaluate
        self._identity: dict[str, str] = identity
        config = setup.config
        self._learning_rate = config.optimizer.learning_rate(config.num_steps)
        self._rank_budget = rank.num_parameters(setup.state.params)
        self._tokens_per_step = config.data.tokens_per_step
        self._pending: tuple[int, step_lib.Metrics] | None = None
        self._diverged = False
        self._logged_step = 0
        self._logged_time = 0.0

    def close(self) -> None:
        self._progress.close()
        self._sinks.close()

    def steps(
        self,
        state: state_lib.TrainState,
        start_step: int,
        batches: Iterator[dict[str, np.ndarray]],
        signals: "_Signals",
    ) -> tuple[state_lib.TrainState, int]:
        """The state after the last step, or that at which it ended early, and why."""
        config, mesh = self._setup.config, self._setup.mesh
        compiled = self._compile(state)
        signals.defer()
        self._progress.begin()
        self._logged_step, self._logged_time = start_step, time.monotonic()
        for step in range(start_step + 1, config.num_steps + 1):
            last = step == config.num_steps
            logged = last or step == 1 or step % config.log_every == 0
            batch = evaluation.to_devices(next(batches), mesh)
            state, values = compiled(state, batch, jnp.asarray(logged))
            self._log_pending()
            self._progress.advance(step)
            if logged:
                self._pending = (step, values)
            interrupted = signals.exit_code
            saved = last or interrupted or step % config.checkpoint.every == 0
            evaluated = last or step % config.eval.every == 0
            decided = config.rank.decides_at(step) and not last
            # All but the last take time that is none of a step; it returns once it is
            # done, so that to wait would count the next one too.
            if saved or evaluated or decided or config.step == "layerwise":
                self._log_pending()
            if saved:
                self._check_finite(step, values["loss"])
                # That loss is of the parameters before the step, these are saved.
                self._check_finite(step, _largest(state.params), "largest parameter")
            if self._diverged:
                return state, DIVERGED
            if decided:
                resized = self._decide_ranks(step, state)
                before, after = map(rank.stored_ranks, (state.params, resized.params))
                state = resized
                if before != after:
                    compiled = self._compile(state)
            if evaluated:
                self._log_evaluation(step, state.params)
            if saved:
                self._save(step, state)
            if interrupted and not last:
                self._checkpointer.wait()
                self._progress.print(
                    f"interrupted: saved at step {step}; the same command goes on"
                )
                return state, interrupted
        self._checkpointer.wait()
        return state, FINISHED

    def _check_finite(
        self, step: int, value: Array | float, name: str = "loss"
    ) -> None:
        """Ends the run where its loss, say, has become infinite or no number."""
        if self._diverged or math.isfinite(float(value)):
            return
        self._diverged = True
        kept = self._checkpointer.latest_step()
        last = f"the checkpoint of step {kept} is kept" if kept else "nothing is saved"
        self._progress.print(
            f"diverged: the {name} of step {step} is {float(value)}; {last}. "
            "Lower optimizer.peak_learning_rate, or bound the update by "
            "optimizer.max_update_norm, in another --workdir"
        )

    def _decide_ranks(
        self, step: int, state: state_lib.TrainState
    ) -> state_lib.TrainState:
        """The state with the ranks of this step; itself where all stay as they are."""
        config, mesh = self._setup.config, self._setup.mesh
        change = rank.next_change(
            state.params, state.opt_state, config.rank, budget=self._rank_budget
        )
        if change is None:
            return state
        before = rank.stored_ranks(state.params)
        active, ranks = change.active, change.ranks
        began = time.monotonic()
        after = rank.with_ranks(jax.eval_shape(lambda x: x, state), ranks)

        def resize(state, active, key):
            params, opt_state = rank.resize(
                state.params, state.opt_state, active=active, ranks=ranks, key=key
            )
            return state.replace(params=params, opt_state=opt_state)

        key = jax.random.fold_in(jax.random.key(config.seed), step)
        resized = jax.jit(resize, out_shardings=sharding.shardings(after, mesh))(
            state, active, key
        )
        self._sinks.write(
            {"step": step}
            | {f"rank/{name}": stored for name, stored in ranks.items()}
            | {f"active_rank/{n}": float(np.mean(a)) for n, a in active.items()}
        )
        changed = [
            f"{name} {before[name]} -> {stored}"
            for name, stored in ranks.items()
            if before[name] != stored
        ]
        self._progress.print(
            f"step {step}: stored ranks {', '.join(changed) or 'as before'}; in use "
            + ", ".join(f"{name} {np.mean(a):.1f}" for name, a in active.items())
        )
        self._logged_time += time.monotonic() - began
        return resized

    def _compile(self, state: state_lib.TrainState) -> Any:
        """The step for a state of these shapes; a layerwise one compiles as it goes."""
        setup = self._setup
        if setup.config.step == "layerwise":
            return layerwise.make_train_step(
                layerwise.stack_of(setup.config.model), setup.tx, mesh=setup.mesh
            )
        shardings = sharding.shardings(state, setup.mesh)
        config = setup.config
        shape = (config.data.batch_size, config.data.seq_len)
        rows = NamedSharding(setup.mesh, sharding.BATCH)
        batch = {
            name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
            for name in ("inputs", "targets", "segment_ids")
        }
        step = jax.jit(
            step_lib.make_train_step(
                config.model, setup.tx, num_microbatches=config.data.num_microbatches
            ),
            donate_argnums=0,
            out_shardings=(shardings, None),
        )
        began = time.monotonic()
        abstract = sharding.abstract(state, shardings)
        compiled = step.lower(abstract, batch, jnp.array(True)).compile()
        elapsed = time.monotonic() - began
        self._progress.print(f"compiled in {elapsed:.1f} s")
        self._logged_time += elapsed  # no time of training
        return compiled

    def _log_pending(self) -> None:
        if self._pending is None:
            return
        step, values = self._pending
        self._pending = None
        values = {name: float(value) for name, value in values.items()}
        now = time.monotonic()
        count = self._tokens_per_step * (step - self._logged_step)
        row = {
            "step": step,
            "train/loss": values.pop("loss"),
            "learning_rate": float(self._learning_rate(step - 1)),
            "tokens": self._tokens_per_step * step,
            "tokens_per_second": count / max(now - self._logged_time, 1e-9),
            **values,
        }
        self._logged_step, self._logged_time = step, now
        self._sinks.write(row)
        self._progress.show(row)
        self._check_finite(step, row["train/loss"])

    def _log_evaluation(self, step: int, params: model.Params) -> None:
        began = time.monotonic()
        row = self._evaluate(params)
        self._sinks.write({"step": step, **row})
        self._progress.print(
            f"step {step}: held-out loss {row['eval/loss']:.4f} nats per token, "
            f"perplexity {row['eval/perplexity']:.2f}, "
            f"{row['eval/bits_per_byte']:.4f} bits per byte"
        )
        # Evaluation is not training time.
        self._logged_time += time.monotonic() - began

    def _save(self, step: int, state: state_lib.TrainState) -> None:
        began = time.monotonic()
        self._sinks.flush()
        self._checkpointer.save(
            step,
            state,
            record={
                "config": config_lib.to_dict(self._setup.config),
                "data_position": step * self._setup.config.data.batch_size,
                "ranks": rank.stored_ranks(state.params),
                **self._identity,
            },
        )
        self._logged_time += time.monotonic() - began


class _Signals:
    """SIGINT and SIGTERM as a request that the loop answers between two steps.

    Before `defer`, when there is nothing to save, a signal raises Interrupted. A second
    one always ends the process at once.
    """

    def __init__(self):
        self.exit_code = 0
        self._deferred = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            for number in INTERRUPTED:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From here on a signal waits for the end of the step."""
        self._deferred = True

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        code = INTERRUPTED[signal.Signals(number)]
        if self.exit_code:
            os._exit(code)
        self.exit_code = code
        if not self._deferred:
            raise Interrupted(code)


@contextlib.contextmanager
def _claimed(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the workdir for this process.

    The lock dies with the process, so a killed run leaves none behind.
    """
    with (workdir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise errors.UserError(
                f"workdir: another process is training in {workdir}"
            ) from error
        except OSError as error:  # file systems that have no locks
            warnings.warn(
                f"{workdir} cannot be locked ({error.strerror}): make sure that no "
                "other process trains there",
                stacklevel=2,
            )
        yield


def _read_config(workdir: pathlib.Path) -> config_lib.ExperimentConfig:
    path = workdir / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise errors.UserError(
            f"workdir: {workdir} holds no run (no config.json)"
        ) from error
    except (OSError, ValueError) as error:
        raise errors.UserError(f"workdir: {path} cannot be read: {error}") from error
    errors.check("workdir", isinstance(values, dict), f"{path} is not a configuration")
    return config_lib.from_dict(values)


def _check_same_run(
    old: config_lib.ExperimentConfig, new: config_lib.ExperimentConfig, where: str
) -> None:
    found = config_lib.differences(old, new)
    errors.check(
        "workdir",
        not found,
        f"{where}: a run with another configuration; use another --workdir, or undo:"
        "\n  " + "\n  ".join(found),
    )


def _earlier_config(
    workdir: pathlib.Path, done: int
) -> config_lib.ExperimentConfig | None:
    """That of the run in the workdir, which a run after it must have too.

    None without a checkpoint: such a run may yet change, as it may not have fitted into
    memory.
    """
    begun = done and (workdir / "config.json").exists()
    return _read_config(workdir) if begun else None


def _steps_done(workdir: pathlib.Path) -> int:
    """The newest step on disk, 0 for a new run."""
    if not (workdir / "checkpoints").is_dir():
        return 0
    with _reading(workdir) as checkpointer:
        return checkpointer.latest_step() or 0


def _can_be_restored(setup: _Setup, workdir: pathlib.Path, step: int) -> bool:
    """Whether the checkpoint of a step is whole, which takes reading all of it."""
    with _reading(workdir) as checkpointer, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said when the run goes on
        restored = checkpointer.restore(
            setup.state, setup.mesh, adapt=_adapt(setup.config)
        )
    return restored is not None and restored[1]["step"] == step


def _reading(
    workdir: pathlib.Path,
) -> contextlib.closing[checkpoint.Checkpointer]:
    """The checkpoints of a run, which may be in progress: nothing of it is touched."""
    return contextlib.closing(
        checkpoint.Checkpointer(workdir / "checkpoints", keep=1, read_only=True)
    )


def _make_folder(workdir: pathlib.Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise errors.UserError(
            f"workdir: cannot write to {workdir}: {error.strerror}"
        ) from error


def _write_json(path: pathlib.Path, value: Any) -> None:
    metrics.replace_text(path, json.dumps(value, indent=2) + "\n")


def _print_start(
    console: rich.console.Console, setup: _Setup, summary: dict[str, Any]
) -> None:
    config = setup.config
    devices = jax.devices()
    console.print(
        metrics.start_table(
            summary,
            devices=f"{len(devices)} x {devices[0].device_kind}",
            mesh=setup.mesh.shape,
            tokens_per_step=config.data.tokens_per_step,
            num_steps=config.num_steps,
        )
    )
    notes = [
        *config.model.clamped_ratios(),
        *config.optimizer.without_effect(),
        *config.rank.without_effect(),
    ]
    warmup = config.optimizer.warmup_steps
    if warmup >= config.num_steps:
        notes.append(
            f"optimizer.warmup_steps: {warmup} of {config.num_steps} steps, the rate "
            "never reaches its peak"
        )
    for note in notes:
        metrics.say(console, f"note: {note}")


def _print_end(
    console: rich.console.Console,
    setup: _Setup,
    workdir: pathlib.Path,
    state: state_lib.TrainState,
    corpus: data.Corpus,
) -> None:
    config = setup.config.model
    per_token = accounting.flops_per_token(config, seq_len=_SAMPLE_TOKENS) / 3
    length = max(16, min(_SAMPLE_TOKENS, int((_SAMPLE_FLOPS / per_token) ** 0.5)))
    sample = jax.jit(generate, static_argnums=1, static_argnames="num_tokens")(
        state.params,
        config,
        jnp.array([corpus.tokenizer.document_mark], jnp.int32),
        key=jax.random.key(setup.config.seed),
        num_tokens=length,
    )
    text = corpus.tokenizer.decode(np.asarray(sample).tolist())
    metrics.say(console, f"sample:\n{text}")
    metrics.say(
        console, f"finished: {setup.config.num_steps} steps; all of it is in {workdir}"
    )
