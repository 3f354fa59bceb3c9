"""The training step that walks the layers backwards, one at a time.

For each layer in turn it computes the gradient, runs the optimizer chain and replaces
the parameters, so that gradients never exist all at once and nothing of the state is
copied: the memory of a step is parameters, optimizer state, one residual stream per
layer, and the gradients of one layer, or two while work is dispatched ahead. The loop
runs on the host, over functions that are compiled once per shape of layer or matrix (as
a `lax.fori_loop` XLA would copy the state).

It takes the chains of `optimizers` as they are, where their rules are local: what a
weight does may depend on no other layer. `check_local` says which are.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from sct_jax import errors, losses, model, optimizers, sharding, spectral
from sct_jax.training import state as state_lib
from sct_jax.training import step as step_lib

# Up to so many rows a weight's gradient is cheaper to compute again than to read.
_FEW_ROWS = 16


class Stack(NamedTuple):
    """A model in the pieces that the step handles one at a time.

    Attributes:
      num_layers: how many blocks there are.
      init_ends: from a key to the parameters outside the layers, a dict.
      init_layer: from a key to the parameters of one block.
      enter: (ends, batch) -> x, the stream before the first block.
      block: (layer, x, batch, linear) -> x, which multiplies by its matrices with
        `linear`, see `spectral.linear`, in the same order every time.
      leave: (ends, x, batch) -> loss.
      enter_keys: which of the ends `enter` reads.
      leave_keys: which of the ends `leave` reads.
    """

    num_layers: int
    init_ends: Callable[[PRNGKeyArray], dict[str, Any]]
    init_layer: Callable[[PRNGKeyArray], Any]
    enter: Callable[[dict[str, Any], Any], Array]
    block: Callable[[Any, Array, Any, model.Linear], Array]
    leave: Callable[[dict[str, Any], Array, Any], Float[Array, ""]]
    enter_keys: tuple[str, ...]
    leave_keys: tuple[str, ...]


def stack_of(config: model.ModelConfig) -> Stack:
    """Returns the pieces of the transformer of `model`."""

    def block(layer, x, batch, linear):
        rope, mask = model.positions(batch["inputs"], config, batch.get("segment_ids"))
        return model.block(layer, x, rope, mask, config=config, linear=linear)

    def leave(ends, x, batch):
        scores = model.logits(ends, x, config)
        return losses.next_token_cross_entropy(scores, batch["targets"])

    return Stack(
        num_layers=config.num_layers,
        init_ends=lambda key: model.orthonormalize(
            model.init_ends(key, config), config
        ),
        init_layer=lambda key: model.orthonormalize(
            model.init_block(key, config), config
        ),
        enter=lambda ends, batch: model.embed(ends, batch["inputs"], config),
        block=block,
        leave=leave,
        enter_keys=("embedding",),
        leave_keys=(
            "final_norm",
            "embedding" if config.tie_embeddings else "head",
        ),
    )


def check_local(config: optimizers.OptimizerConfig) -> None:
    """Raises UserError, naming the field, for a rule that needs all gradients."""
    for field, reason in (
        ("grad_clip", "the norm of all gradients is known when all exist at once"),
        ("retraction_tolerance", "the largest error of all factors decides"),
    ):
        errors.check(
            f"optimizer.{field}",
            getattr(config, field) is None,
            f'not with step = "layerwise": {reason}; set it to none '
            "(max_update_norm is local, and bounds every weight)",
        )


def make_train_step(
    stack: Stack, tx: optax.GradientTransformation, *, mesh: Mesh | None = None
) -> "LayerwiseStep":
    """Returns `step(state, batch, diagnose) -> (state, metrics)`, not to be jitted.

    The same result as the step of `step_lib.make_train_step`, to rounding, for chains
    that `check_local` lets pass. The state is donated: what was passed is gone
    afterwards. Requires separate layers (`scan_layers=False`), of any ranks.

    Metrics are those of the ordinary step; `grad_norm` is summed up over the layers.

    Args:
      stack: the model, see `stack_of`.
      tx: a chain with local rules.
      mesh: devices over which the state is sharded; None for one device.
    """
    return LayerwiseStep(stack, tx, mesh)


class LayerwiseStep:
    """What `make_train_step` returns: `forward`, then `backward`, or both by a call."""

    def __init__(self, stack, tx, mesh):
        self._stack: Stack = stack
        self._tx = optax.with_extra_args_support(tx)
        self._mesh: Mesh | None = mesh
        self._own = tuple(k for k in stack.leave_keys if k not in stack.enter_keys)
        self._lent = tuple(k for k in stack.leave_keys if k in stack.enter_keys)
        self._draw_ends = jax.jit(
            lambda key: self._with_state(stack.init_ends(key) | {"layers": ()})
        )
        self._draw_layer = jax.jit(
            lambda key: self._with_state({"layers": (stack.init_layer(key),)})
        )
        self._enter = jax.jit(stack.enter)
        self._forward = jax.jit(self._forward_fn)
        self._leave_grads = jax.jit(self._leave_grads_fn)
        # The stream that comes out takes the place of the one that goes in.
        self._block_grads = jax.jit(self._block_grads_fn, donate_argnames="dx")
        self._enter_grads = jax.jit(self._enter_grads_fn)
        self._update = jax.jit(
            self._update_fn,
            static_argnames=("layout", "diagnose"),
            donate_argnames=("params", "mirrors"),
        )
        self._summarise = jax.jit(_summarise)

    def init(
        self, key: PRNGKeyArray, *, num_layers: int | None = None
    ) -> state_lib.TrainState:
        """Returns the state before the first update, drawn a layer at a time.

        The same numbers as `state_lib.init` draws, with separate layers; to rounding,
        where small matrices need the guard of the retraction. Beside the state itself
        it needs the memory of one layer. A smaller `num_layers` than the model's gives
        a model of the first layers, for a look at what a step does.
        """
        keys = model.layer_keys(key, self._stack.num_layers)[:num_layers]
        parts = [self._draw_ends(key), *(self._draw_layer(k) for k in keys)]
        whole = _join(parts, _merge)
        *_, layout = _take_apart(jax.eval_shape(self._tx.init, whole.params))
        return state_lib.TrainState(
            step=jnp.zeros([], jnp.int32),
            params=whole.params,
            opt_state=_put_together(whole.mirrors, whole.shared, layout),
        )

    def __call__(
        self,
        state: state_lib.TrainState,
        batch: Any,
        diagnose: bool | Bool[Array, ""],
    ) -> tuple[state_lib.TrainState, step_lib.Metrics]:
        """Returns the state after one update, and its metrics; consumes `state`."""
        tape = self.forward(state.params, batch)
        return self.backward(state, tape, batch, bool(diagnose))

    def forward(self, params: model.Params, batch: Any) -> "Tape":
        """Returns what the backward pass needs of the forward pass."""
        x = self._enter(_only(params, self._stack.enter_keys), batch)
        streams, bottlenecks = [x], []
        for layer in params["layers"]:
            x, narrow = self._forward(layer, x, batch)
            streams.append(x)
            bottlenecks.append(narrow)
        return Tape(streams, bottlenecks)

    def backward(
        self,
        state: state_lib.TrainState,
        tape: "Tape",
        batch: Any,
        diagnose: bool,
    ) -> tuple[state_lib.TrainState, step_lib.Metrics]:
        """Returns the updated state and metrics; consumes `state` and `tape`."""
        params = state.params
        mirrors, shared, layout = _take_apart(state.opt_state)
        metrics = []

        def update(grads: dict[str, Any], take: Callable[[Any], Any]) -> _Part:
            """The part that `take` takes of everything, after the chain."""
            *part, part_metrics = self._update(
                take(params),
                [take(node) for node in mirrors],
                shared,
                grads,
                layout=layout,
                diagnose=diagnose,
            )
            metrics.append(part_metrics)
            return _Part(*part)

        lent = _only(params, self._lent)
        loss, grads, lent_grads, dx = self._leave_grads(
            _only(params, self._own), lent, tape.streams.pop(), batch
        )
        parts = [update(grads | {"layers": ()}, lambda node: _ends(node, self._own))]
        for index in reversed(range(len(params["layers"]))):
            # Dispatch runs ahead of the device, and what it allocates with it: without
            # this wait the gradients of many layers would exist.
            jax.block_until_ready(parts[-2:][0].params)
            grads, dx = self._block_grads(
                params["layers"][index],
                tape.streams.pop(),
                tape.bottlenecks.pop(),
                dx,
                batch,
            )
            pieces = [
                update(
                    {"layers": (_only(grads, keys),)},
                    lambda node, index=index, keys=keys: {
                        "layers": (_only(node["layers"][index], keys),)
                    },
                )
                for keys in _weights_of(params["layers"][index])
            ]
            del grads
            parts.append(_join(pieces, _merge_layer))
        entering = self._stack.enter_keys
        grads = self._enter_grads(_only(params, entering), lent_grads, dx, batch)
        parts.append(update(grads | {"layers": ()}, lambda node: _ends(node, entering)))
        parts.reverse()  # the layers were met from the last to the first

        whole = _join(parts, _merge)
        step, summary = self._summarise(state.step, loss, metrics)
        new_state = state_lib.TrainState(
            step=step,
            params=whole.params,
            opt_state=_put_together(whole.mirrors, whole.shared, layout),
        )
        return new_state, summary

    def _with_state(self, part):
        mirrors, shared, _ = _take_apart(self._tx.init(part))
        return _Part(part, mirrors, shared)

    def _forward_fn(self, layer, x, batch):
        narrow = []
        x = self._stack.block(layer, x, batch, _recording(narrow))
        return x, narrow

    def _leave_grads_fn(self, own, lent, x, batch):
        def loss_fn(own, lent, x):
            return self._stack.leave(own | lent, x, batch)

        loss, grads = jax.value_and_grad(loss_fn, (0, 1, 2))(own, lent, x)
        return loss, *grads

    def _block_grads_fn(self, layer, x, narrow, dx, batch):
        def block(layer, x):
            return self._stack.block(layer, x, batch, _replaying(narrow))

        _, pull_back = jax.vjp(block, layer, x)
        return pull_back(dx)

    def _enter_grads_fn(self, ends, lent_grads, dx, batch):
        _, pull_back = jax.vjp(lambda ends: self._stack.enter(ends, batch), ends)
        (grads,) = pull_back(dx)
        for name, lent in lent_grads.items():
            grads[name] = jax.tree.map(jnp.add, grads[name], lent)
        return grads

    def _update_fn(self, params, mirrors, shared, grads, *, layout, diagnose):
        opt_state = _put_together(mirrors, shared, layout)
        updates, opt_state = self._tx.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates)
        metrics = {"squared_grad_norm": optax.tree.norm(grads, squared=True)}
        if diagnose:
            metrics |= step_lib.diagnose(params, new)
        mirrors, shared, _ = _take_apart(self._place(opt_state))
        return self._place(new), mirrors, shared, metrics

    def _place(self, tree):
        if self._mesh is None:
            return tree
        shardings = sharding.shardings(tree, self._mesh)
        return jax.lax.with_sharding_constraint(tree, shardings)


class Tape(NamedTuple):
    """What the forward pass leaves for the backward pass.

    Attributes:
      streams: (B, L, D) before every block, and after the last one.
      bottlenecks: per block, (B L, R) of every factorised matrix in order of use. They
        are small, and half of the products that the backward pass would repeat.
    """

    streams: list[Array]
    bottlenecks: list[list[Array]]


def _summarise(step, loss, parts: Sequence[step_lib.Metrics]):
    names = sorted({name for part in parts for name in part} - {"squared_grad_norm"})
    largest = {
        name: jnp.max(jnp.stack([part[name] for part in parts if name in part]))
        for name in names
    }
    squares = jnp.stack([part["squared_grad_norm"] for part in parts])
    return step + 1, {"loss": loss, "grad_norm": jnp.sqrt(jnp.sum(squares))} | largest


def _recording(narrow: list[Array]) -> model.Linear:
    """`spectral.linear` that leaves its bottlenecks in a list."""

    def expand(rows, w):
        narrow.append(spectral.contract(rows, w))
        return spectral.expand(narrow[-1], w)

    return _linear_by(expand)


def _replaying(narrow: Sequence[Array]) -> model.Linear:
    """`spectral.linear` that takes its bottlenecks from a list."""
    remaining = iter(narrow)
    return _linear_by(lambda rows, w: _expand_known(rows, w, next(remaining)))


def _linear_by(expand: Callable[[Array, Any], Array]) -> model.Linear:
    """`spectral.linear`, with another way from rows (N, I) and factors to (N, O)."""

    def linear(x, w):
        if not spectral.is_factors(w):
            return spectral.linear(x, w)
        y = expand(x.reshape(-1, x.shape[-1]), w)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    return linear


@jax.custom_vjp
def _expand_known(
    x: Float[Array, "N I"],
    w: spectral.SpectralFactors | spectral.LowRankFactors,
    h: Float[Array, "N R"],
) -> Float[Array, "N O"]:
    """`spectral.linear` for a known h = `contract(x, w)`, with its gradient."""
    del x
    return spectral.expand(h, w)


def _expand_known_forward(x, w, h):
    return spectral.expand(h, w), (x, w, h)


def _expand_known_backward(residuals, dy):
    x, w, h = residuals
    first, last = w[0].astype(x.dtype), w[-1].astype(x.dtype)
    dh, wide = dy @ last, h
    middle = {}
    if isinstance(w, spectral.SpectralFactors):
        s = w.s.astype(x.dtype)
        middle["s"] = jnp.sum(h * dh, axis=0).astype(w.s.dtype)
        dh, wide = dh * s, h * s
    grads = (_outer_sum(x, dh, w[0].dtype), _outer_sum(dy, wide, w[-1].dtype))
    ends = dict(zip((w._fields[0], w._fields[-1]), grads, strict=True))
    return dh @ first.T, w._replace(**ends, **middle), jnp.zeros_like(h)


_expand_known.defvjp(_expand_known_forward, _expand_known_backward)


def _outer_sum(x: Float[Array, "N I"], h: Float[Array, "N R"], dtype) -> Array:
    """x.T @ h; for few rows as a sum that fuses into what is done with each entry.

    A product would be written to memory and read again by every part of an update.
    """
    if x.shape[0] > _FEW_ROWS:
        return (x.T @ h).astype(dtype)
    total = sum(
        x[n][:, None].astype(dtype) * h[n][None, :].astype(dtype)
        for n in range(x.shape[0])
    )
    return jnp.asarray(total)


# A part of a model is a tree of the same form with some of its keys: what a chain does
# by path or by name it does to a part as to the whole.


class _Part(NamedTuple):
    """Parameters of a part, and the optimizer state that belongs to them."""

    params: dict[str, Any]
    mirrors: Sequence[dict[str, Any]]
    shared: Sequence[Any]


def _only(node: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: node[key] for key in keys}


def _ends(node: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return _only(node, keys) | {"layers": ()}


def _weights_of(layer: dict[str, Any]) -> list[tuple[str, ...]]:
    """Keys of a layer that are updated together: one matrix, the first with all norms.

    A matrix, its moments and all that an update makes of it then fit into a cache.
    """
    is_matrix = lambda key: spectral.is_factors(layer[key]) or layer[key].ndim >= 2
    matrices = [key for key in layer if is_matrix(key)]
    others = [key for key in layer if not is_matrix(key)]
    return [(*matrices[:1], *others), *((key,) for key in matrices[1:])]


def _join(parts: Sequence[_Part], merge: Callable[[Sequence[Any]], Any]) -> _Part:
    mirrors = zip(*(part.mirrors for part in parts), strict=True)
    return _Part(
        merge([part.params for part in parts]),
        [merge(nodes) for nodes in mirrors],
        parts[0].shared,
    )


def _merge(nodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ends and layers of several parts, in order, as one model."""
    merged: dict[str, Any] = {}
    for node in nodes:
        merged |= node
    return merged | {"layers": tuple(w for node in nodes for w in node["layers"])}


def _merge_layer(nodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Matrices of one layer, each in a part of its own, as a part with that layer."""
    layer: dict[str, Any] = {}
    for node in nodes:
        layer |= node["layers"][0]
    return {"layers": (layer,)}


_Layout = tuple[Any, tuple[bool, ...]]


def _take_apart(opt_state: Any) -> tuple[list[dict[str, Any]], list[Any], _Layout]:
    """What mirrors the parameters, what all parts share (counts), how they stood."""
    nodes, treedef = jax.tree.flatten(opt_state, is_leaf=model.has_layers)
    mirrored = tuple(map(model.has_layers, nodes))
    kinds = list(zip(nodes, mirrored, strict=True))
    mirrors = [node for node, is_mirror in kinds if is_mirror]
    shared = [node for node, is_mirror in kinds if not is_mirror]
    return mirrors, shared, (treedef, mirrored)


def _put_together(mirrors: Sequence[Any], shared: Sequence[Any], layout: _Layout):
    treedef, mirrored = layout
    of_kind = {True: iter(mirrors), False: iter(shared)}
    return jax.tree.unflatten(treedef, [next(of_kind[kind]) for kind in mirrored])
