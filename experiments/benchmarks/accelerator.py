"""Checks the kernels of one accelerator, and times training steps on it.

python -m experiments.benchmarks.accelerator
python -m experiments.benchmarks.accelerator --seconds=300 --json=accelerator.json

First the errors of every attention implementation and of the head's loss, against
float64 on the host. Then training steps of the 1.7B default and of its dense
equivalent, on synthetic tokens. Ends within --seconds, whatever happens: what is left
then is named and skipped. Uses the first device. On a CPU, a small model stands in.
Loads no library for data or checkpoints. The exit code is 0, or 2 for bad input.
"""

import argparse
import dataclasses
import functools
import gc
import os
import pathlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from experiments import json_file
from sct_jax import attention, attention_kernels, errors, losses, model, spectral
from sct_jax.training import accounting, hardware, optimizer_config
from sct_jax.training import state as state_lib
from sct_jax.training import step as step_lib

Row = dict[str, Any]

DTYPES = ("float32", "bfloat16")
LIMIT_S = 360.0  # of the whole run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What is measured.

    Attributes:
      shape: the spectral model.
      batch_size: sequences per step.
      seq_len: tokens per sequence.
      num_steps: timed steps.
      checked_len: length of the sequences whose errors are measured.
    """

    shape: model.ModelConfig
    batch_size: int
    seq_len: int
    num_steps: int
    checked_len: int


# The 1.7b of configs/smollm_r128.py, which itself would load the data libraries.
LARGE = Work(
    shape=model.ModelConfig(
        d_model=2048,
        d_ff=8192,
        num_layers=24,
        num_heads=32,
        num_kv_heads=32,
        vocab_size=49152,
        rank=128,
        rope_theta=130_000.0,
        compute_dtype="bfloat16",
        remat="full",
    ),
    batch_size=16,
    seq_len=2048,
    num_steps=20,
    checked_len=1024,
)
SMALL = Work(
    shape=model.ModelConfig(
        d_model=64,
        d_ff=96,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=256,
        rank=8,
        remat="full",
    ),
    batch_size=2,
    seq_len=64,
    num_steps=3,
    checked_len=300,
)
OPTIMIZER = optimizer_config.Sct(
    peak_learning_rate=3e-3,
    base_width=128,
    dense_lr_multiplier=1 / 3,
    schedule="wsd",
    warmup_steps=500,
    max_update_norm=0.5,
    grad_clip=1.0,
    weight_decay=0.01,
    b2=0.95,
)
DENSE_OPTIMIZER = optimizer_config.AdamW(
    peak_learning_rate=3e-4, grad_clip=1.0, weight_decay=0.01, b2=0.95
)


class Report:
    """Rows so far, printed part by part, and written once.

    Attributes:
      deadline: on the clock of `time.monotonic`.
    """

    def __init__(
        self, console: rich.console.Console, path: pathlib.Path | None, limit: float
    ):
        self.deadline = time.monotonic() + limit
        self._console = console
        self._path = path
        self._rows: dict[str, list[Row]] = {}
        self._waiting: list[str] = []
        self._finished = False
        self._lock = threading.RLock()

    def say(self, text: str) -> None:
        """Prints a line."""
        with self._lock:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def run(self, parts: Mapping[str, Callable[[], tuple[str, Row]]]) -> None:
        """Runs parts in order; each returns the name of its table, and a row."""
        self._waiting = list(parts)
        for name, part in parts.items():
            if time.monotonic() > self.deadline:
                self.say("the time is up")
                return
            table, row = part()
            with self._lock:
                self._rows.setdefault(table, []).append(row)
                self._waiting.remove(name)
                self.say("  ".join(_cell(key, value) for key, value in row.items()))

    def finish(self, device: Mapping[str, Any]) -> None:
        """Prints the tables and what was skipped, and writes the file; only once.

        Raises:
          UserError: the file can no longer be written.
        """
        with self._lock:
            if self._finished:  # by the timer or the parts, whichever came first
                return
            self._finished = True
            for title, rows in self._rows.items():
                self._console.print(_table(title, rows))
            if self._waiting:
                self.say(f"skipped, for lack of time: {', '.join(self._waiting)}")
            if self._path is not None:
                figures = {"device": device, "skipped": self._waiting, **self._rows}
                json_file.write(self._path, figures)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=LIMIT_S, help="at most")
    parser.add_argument("--batch_size", type=int, help="sequences per step")
    json_file.add_flag(parser)
    flags = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if not 0 < flags.seconds <= LIMIT_S:
        parser.error(f"--seconds: {flags.seconds} must be > 0 and <= {LIMIT_S:g}")
    if flags.batch_size is not None and flags.batch_size < 1:
        parser.error(f"--batch_size: {flags.batch_size} must be >= 1")
    console = rich.console.Console(file=sys.stdout, width=max(_terminal_width(), 100))
    report = Report(console, flags.json, flags.seconds)
    described: dict[str, Any] = {}
    watch = threading.Timer(flags.seconds, _give_up, (report, described))
    watch.daemon = True
    watch.start()  # before JAX looks for devices, which may hang
    try:
        hardware.check_backend()
        device = jax.devices()[0]
        work = SMALL if device.platform == "cpu" else LARGE
        if flags.batch_size is not None:
            work = dataclasses.replace(work, batch_size=flags.batch_size)
        described |= describe(device)
        report.say("  ".join(_cell(key, value) for key, value in described.items()))
        report.run(parts_of(work, device, report.deadline))
        watch.cancel()
        report.finish(described)
    except errors.UserError as error:
        watch.cancel()
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def describe(device: Any) -> Row:
    """Returns the device, its memory in bytes, and the versions of JAX and XLA."""
    return {
        "kind": device.device_kind,
        "platform": device.platform,
        "memory_bytes": _memory_stat(device, "bytes_limit"),
        "peak_flops": hardware.peak_flops([device]),
        "jax": jax.__version__,
        "backend": " ".join(device.client.platform_version.split()),
    }


def parts_of(
    work: Work, device: Any, deadline: float
) -> dict[str, Callable[[], tuple[str, Row]]]:
    """Returns everything to measure, by name, in order."""
    parts: dict[str, Callable[[], tuple[str, Row]]] = {}
    for dtype in DTYPES:
        for name in (*attention.IMPLEMENTATIONS, *attention_kernels.KERNELS):
            parts[f"attention {name}, {dtype}"] = functools.partial(
                attention_row, name, dtype, work, device
            )
        for name in ("plain", "chunked"):
            parts[f"head {name}, {dtype}"] = functools.partial(
                head_row, name, dtype, work
            )
    dense = accounting.dense_config(work.shape)
    for name, shape, optimizer in (
        ("spectral", work.shape, OPTIMIZER),
        ("dense", dense, DENSE_OPTIMIZER),  # last: its memory is the larger one
    ):
        parts[f"steps {name}"] = functools.partial(
            steps_row, name, shape, optimizer, work, device, deadline
        )
    return parts


# --- Errors against float64.

ATTENTION = "attention: largest error / largest value, against float64"
HEAD = "loss of the head: likewise"
ELSEWHERE = "not on this device"


def attention_row(name: str, dtype: str, work: Work, device: Any) -> tuple[str, Row]:
    """Returns the errors of an implementation: result, and gradients of q, k and v.

    Sequences hold several documents, except for cuDNN, and two query heads share a key.
    """
    batch, length, heads, groups = 2, work.checked_len, 4, 2
    shape = dataclasses.replace(
        work.shape,
        d_model=heads * work.shape.head_size,
        num_heads=heads,
        num_kv_heads=groups,
        compute_dtype=dtype,
        attention=name,
    )
    row: Row = {"attention": name, "dtype": dtype}
    documents = name != "cudnn"
    try:
        hardware.select_attention(shape, device, seq_len=length, documents=documents)
    except errors.UserError as error:
        reason = str(error).partition(": ")[2].partition(";")[0]
        return ELSEWHERE, row | {"note": reason}
    rng = np.random.default_rng(0)
    sizes = [(batch, length, count, shape.head_size) for count in (heads, groups)]
    q, k, v, d_out = (
        jnp.asarray(rng.normal(size=size), dtype)
        for size in (sizes[0], sizes[1], sizes[1], sizes[0])
    )
    ids = np.sort(rng.integers(4, size=(batch, length), dtype=np.int32), axis=1)
    segment_ids = jnp.asarray(ids) if documents else None

    def pulled(q, k, v, d_out, segment_ids):
        attend = functools.partial(
            attention.attend, segment_ids=segment_ids, implementation=name
        )
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(d_out)

    wanted = _attention_float64(q, k, v, d_out, ids if documents else None)
    return ATTENTION, row | _errors(
        "out dq dk dv", lambda: jax.jit(pulled)(q, k, v, d_out, segment_ids), wanted
    )


def head_row(name: str, dtype: str, work: Work) -> tuple[str, Row]:
    """Returns the errors of the head's loss: value, gradients of stream and head."""
    rng = np.random.default_rng(1)
    width, vocab = min(work.shape.d_model, 512), min(work.shape.vocab_size, 4096)
    x = jnp.asarray(rng.normal(size=(2, work.checked_len, width)), dtype)
    w = jnp.asarray(rng.normal(size=(width, vocab)) / np.sqrt(width), dtype)
    targets = jnp.asarray(rng.integers(vocab, size=x.shape[:2]), jnp.int32)
    head = lambda w, x: (x @ w).astype(jnp.float32)

    def loss(x, w):
        if name == "chunked":
            return losses.head_cross_entropy(
                head, w, x, targets, tokens_per_chunk=work.checked_len // 2
            )
        return losses.next_token_cross_entropy(head(w, x), targets)

    def found():
        value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w)
        return value, *gradients

    row = {"head": name, "dtype": dtype}
    wanted = _head_float64(x, w, targets)
    return HEAD, row | _errors("out dx dw", found, wanted)


def _errors(
    names: str, call: Callable[[], Sequence[Any]], wanted: Sequence[np.ndarray]
) -> Row:
    try:
        found = [_float64(x) for x in call()]
    except Exception as error:  # a compiler's: say it, and go on
        return {"note": _first_line(error)}
    return {
        name: float(np.max(np.abs(got - expected)) / np.max(np.abs(expected)))
        for name, got, expected in zip(names.split(), found, wanted, strict=True)
    }


def _float64(x: Any) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


def _attention_float64(q, k, v, d_out, segment_ids) -> tuple[np.ndarray, ...]:
    q, k, v, d_out = map(_float64, (q, k, v, d_out))
    length, repeats = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, repeats, axis=2) for x in (k, v))
    scale = 1 / np.sqrt(q.shape[-1])
    seen = np.tril(np.ones((length, length), bool))[None]
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
    multiply = functools.partial(np.einsum, optimize=True)
    scores = multiply("blhk,bmhk->bhlm", q, k) * scale
    scores = np.where(seen[:, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = multiply("blhk,bmhk->bhlm", d_out, v)
    ds = p * (dp - np.sum(p * dp, -1, keepdims=True)) * scale
    group = lambda x: x.reshape(*x.shape[:2], -1, repeats, x.shape[-1]).sum(3)
    return (
        multiply("bhlm,bmhk->blhk", p, v),
        multiply("bhlm,bmhk->blhk", ds, k),
        group(multiply("bhlm,blhk->bmhk", ds, q)),
        group(multiply("bhlm,blhk->bmhk", p, d_out)),
    )


def _head_float64(x, w, targets) -> tuple[np.ndarray, ...]:
    x, w = _float64(x), _float64(w)
    rows, chosen = x.reshape(-1, x.shape[-1]), np.asarray(targets).ravel()
    logits = rows @ w
    logits -= logits.max(-1, keepdims=True)
    p = np.exp(logits)
    p /= p.sum(-1, keepdims=True)
    index = np.arange(chosen.size)
    value = -np.mean(np.log(p[index, chosen]))
    p[index, chosen] -= 1
    p /= chosen.size
    return value, (p @ w.T).reshape(x.shape), rows.T @ p


# --- Training steps.

STEPS = "training steps, median"


def steps_row(
    name: str,
    shape: model.ModelConfig,
    optimizer: optimizer_config.OptimizerConfig,
    work: Work,
    device: Any,
    deadline: float,
) -> tuple[str, Row]:
    """Returns the figures of a model's training step, or why it does not run."""
    chosen, reason = hardware.select_attention(
        shape, device, seq_len=work.seq_len, documents=True
    )
    row: Row = {"model": name, "attention": f"{chosen} ({reason})"}
    shape = dataclasses.replace(shape, attention=chosen)
    row["parameters"] = accounting.parameters(shape)
    tx = optimizer.build(
        1000, decay_mask=model.decay_mask, matrix_mask=model.hidden_matrices
    )
    needed = accounting.step_bytes(shape, tx)["total"]
    available = _memory_stat(device, "bytes_limit")
    if available is not None and needed > available:
        note = f"does not fit: {needed:,} bytes without activations, of {available:,}"
        return STEPS, row | {"note": note}
    try:
        return STEPS, row | _measure_steps(shape, tx, work, device, deadline)
    except Exception as error:  # of the device or a compiler: say it, and go on
        full = "RESOURCE_EXHAUSTED" in str(error)
        note = "does not fit: " * full + _first_line(error)
        return STEPS, row | {"note": note}
    finally:
        gc.collect()


def _measure_steps(shape, tx, work, device, deadline) -> Row:
    linear = functools.partial(spectral.linear, flatten_rows=True)
    step = jax.jit(
        step_lib.make_train_step(shape, tx, linear_at=lambda _: linear),
        donate_argnums=0,
    )
    init = jax.jit(functools.partial(state_lib.init, model_config=shape, tx=tx))
    loss = functools.partial(step_lib.loss_fn, config=shape, linear=linear)
    gradient = jax.jit(jax.value_and_grad(loss))
    batch = _tokens(work, shape.vocab_size)
    before = _memory_stat(device, "peak_bytes_in_use")

    began = time.monotonic()
    state = init(jax.random.key(0))
    unwatched = jnp.array(False)
    compiled = step.lower(state, batch, unwatched).compile()
    state, metrics = compiled(state, batch, unwatched)
    first = float(metrics["loss"])
    compile_s = time.monotonic() - began

    def take_step():
        nonlocal state, metrics
        state, metrics = compiled(state, batch, unwatched)
        return metrics

    step_s = _timed(take_step, work.num_steps, deadline)
    peak = _memory_stat(device, "peak_bytes_in_use")
    jax.block_until_ready(gradient(state.params, batch))
    gradient_s = _timed(
        lambda: gradient(state.params, batch), max(3, work.num_steps // 4), deadline
    )
    seconds = statistics.median(step_s)
    tokens_per_s = work.batch_size * work.seq_len / seconds
    flops = accounting.flops_per_token(shape, seq_len=work.seq_len)
    ceiling = hardware.peak_flops([device])
    return {
        "steps": len(step_s),
        "step_s": seconds,
        "tokens_per_second": tokens_per_s,
        "utilisation": tokens_per_s * flops / ceiling if ceiling else None,
        "peak_bytes": peak,
        # The peak of the device only rises: otherwise an earlier part set it.
        "peak_is_own": peak is not None and (before is None or peak > before),
        "chain_share": max(0.0, 1 - statistics.median(gradient_s) / seconds),
        "start_s": compile_s,
        "first_loss": first,
        "last_loss": float(metrics["loss"]),
    }


def _timed(call: Callable[[], Any], rounds: int, deadline: float) -> list[float]:
    """Seconds of up to `rounds` calls: one at least, and none begun after the end."""
    seconds = []
    while len(seconds) < rounds and (not seconds or time.monotonic() < deadline):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return seconds


def _tokens(work: Work, vocab_size: int) -> step_lib.Batch:
    """Random tokens, about four documents per sequence."""
    rng = np.random.default_rng(0)
    shape = (work.batch_size, work.seq_len)
    ids = rng.integers(vocab_size, size=(2, *shape), dtype=np.int32)
    documents = np.sort(rng.integers(4, size=shape, dtype=np.int32), axis=1)
    return {
        "inputs": jnp.asarray(ids[0]),
        "targets": jnp.asarray(ids[1]),
        "segment_ids": jnp.asarray(documents),
    }


def _memory_stat(device: Any, name: str) -> int | None:
    return (device.memory_stats() or {}).get(name)


# --- Output.


def _give_up(report: Report, described: Mapping[str, Any]) -> None:
    """Ends the process: a compiler or a device cannot be interrupted otherwise."""
    code = 0
    try:
        report.say("the time is up")
        report.finish(described)
        sys.stdout.flush()
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    finally:
        os._exit(code)


def _terminal_width() -> int:
    return rich.console.Console().width


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _cell(key: str, value: Any) -> str:
    return f"{key} {_text(key, value)}"


def _text(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key in ("utilisation", "chain_share"):
        return f"{value:.1%}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"


def _table(title: str, rows: Sequence[Row]) -> rich.table.Table:
    """The rows; side by side, as columns, where they have many figures."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table = rich.table.Table(title=title, title_justify="left")
    if len(keys) <= 8:
        for key in keys:
            table.add_column(key, overflow="fold")
        for row in rows:
            table.add_row(*(_text(key, row.get(key, "")) for key in keys))
        return table
    table.add_column("")
    for _ in rows:
        table.add_column(overflow="fold")
    for key in keys:
        table.add_row(key, *(_text(key, row.get(key, "")) for row in rows))
    return table


if __name__ == "__main__":
    sys.exit(main())
