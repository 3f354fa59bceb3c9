"""The training step that walks the layers backwards, one at a time.

For each layer in turn it computes the gradient, runs the optimizer chain and replaces
the parameters, so that the gradients of two layers never exist together and nothing of
the state is copied: the memory of a step is parameters, optimizer state, one residual
stream per layer, and one layer's gradients. The loop runs on the host, over two
compiled functions per shape of layer (as a `lax.fori_loop` XLA would copy the state).

It takes the chains of `optimizers` as they are, where their rules are local: what a
weight does may depend on no other layer. `check_local` says which are.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from sct_jax import errors, losses, model, optimizers, sharding, train_state, train_step


class Stack(NamedTuple):
    """A model in the pieces that the step handles one at a time.

    Attributes:
      num_layers: how many blocks there are.
      draw_ends: from a key to the parameters outside the layers, a dict.
      draw_layer: from a key to the parameters of one block.
      enter: (ends, batch) -> x, the stream before the first block.
      block: (layer, x, batch) -> x.
      leave: (ends, x, batch) -> loss.
      enter_keys: which of the ends `enter` reads.
      leave_keys: which of the ends `leave` reads.
    """

    num_layers: int
    draw_ends: Callable[[PRNGKeyArray], dict[str, Any]]
    draw_layer: Callable[[PRNGKeyArray], Any]
    enter: Callable[[dict[str, Any], Any], Array]
    block: Callable[[Any, Array, Any], Array]
    leave: Callable[[dict[str, Any], Array, Any], Float[Array, ""]]
    enter_keys: tuple[str, ...]
    leave_keys: tuple[str, ...]


def stack_of(config: model.ModelConfig) -> Stack:
    """Returns the pieces of the transformer of `model`."""

    def block(layer, x, batch):
        rope, mask = model.positions(batch["inputs"], config, batch.get("segment_ids"))
        return model.block(layer, x, rope, mask, config=config)

    def leave(ends, x, batch):
        scores = model.logits(ends, x, config)
        return losses.next_token_cross_entropy(scores, batch["targets"])

    return Stack(
        num_layers=config.num_layers,
        draw_ends=lambda key: model.on_manifold(model.draw_ends(key, config), config),
        draw_layer=lambda key: model.on_manifold(model.draw_block(key, config), config),
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
    """Raises ConfigError, naming the field, for a rule that needs all gradients."""
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


def init(
    key: PRNGKeyArray, stack: Stack, tx: optax.GradientTransformation
) -> train_state.TrainState:
    """Returns the state before the first update, drawn a layer at a time.

    The same numbers as `train_state.init` draws, with separate layers; to rounding,
    where the small matrices need the guard of the retraction. Beside the state itself
    it needs the memory of one layer.
    """
    with_state = lambda part: (part, tx.init(part))
    draw_layer = jax.jit(lambda key: with_state({"layers": (stack.draw_layer(key),)}))
    draw_ends = jax.jit(lambda key: with_state(stack.draw_ends(key) | {"layers": ()}))
    keys = model.layer_keys(key, stack.num_layers)
    parts = [draw_ends(key), *(draw_layer(k) for k in keys)]
    params = _join([part for part, _ in parts])
    opt_states = [_take_apart(state) for _, state in parts]
    mirrors = [_join(nodes) for nodes in zip(*(m for m, *_ in opt_states), strict=True)]
    _, shared, layout = opt_states[0]
    return train_state.TrainState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        opt_state=_put_together(mirrors, shared, layout),
    )


def make_train_step(
    stack: Stack, tx: optax.GradientTransformation, *, mesh: Mesh | None = None
) -> "LayerwiseStep":
    """Returns `step(state, batch, diagnose) -> (state, metrics)`, not to be jitted.

    The same result as the step of `train_step.make_train_step`, to rounding, for chains
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
        self._enter = jax.jit(stack.enter)
        self._forward = jax.jit(stack.block)
        jit = functools.partial(jax.jit, static_argnames=("layout", "diagnose"))
        donated = ("params", "mirrors")
        self._leave = jit(self._leave_fn, donate_argnames=donated)
        # One stream goes in beside it, one comes out: a second has no use.
        self._backward = jit(self._backward_fn, donate_argnames=(*donated, "dx"))
        self._finish = jit(self._finish_fn, donate_argnames=donated)
        self._summarise = jax.jit(_summarise)

    def __call__(
        self,
        state: train_state.TrainState,
        batch: Any,
        diagnose: bool | Bool[Array, ""],
    ) -> tuple[train_state.TrainState, train_step.Metrics]:
        """Returns the state after one update, and its metrics; consumes `state`."""
        streams = self.forward(state.params, batch)
        return self.backward(state, streams, batch, bool(diagnose))

    def forward(self, params: model.Params, batch: Any) -> list[Array]:
        """Returns the stream before every block, and after the last one."""
        streams = [self._enter(_only(params, self._stack.enter_keys), batch)]
        for layer in params["layers"]:
            streams.append(self._forward(layer, streams[-1], batch))
        return streams

    def backward(
        self,
        state: train_state.TrainState,
        streams: list[Array],
        batch: Any,
        diagnose: bool,
    ) -> tuple[train_state.TrainState, train_step.Metrics]:
        """Returns the updated state and metrics; consumes `state` and `streams`."""
        params, layers = state.params, state.params["layers"]
        mirrors, shared, layout = _take_apart(state.opt_state)

        def run(step, *inputs, **part):
            """One part of the model through its step: donated, then replaced."""
            return step(
                _part(params, **part),
                [_part(node, **part) for node in mirrors],
                shared,
                *inputs,
                batch,
                layout=layout,
                diagnose=diagnose,
            )

        lent = _only(params, self._lent)
        (loss, dx, lent_grads), updated = run(
            self._leave, streams.pop(), lent, keys=self._own
        )
        parts = [updated]
        for index in reversed(range(len(layers))):
            dx, updated = run(self._backward, streams.pop(), dx, index=index)
            parts.append(updated)
        updated = run(self._finish, dx, lent_grads, keys=self._stack.enter_keys)
        parts.append(updated)
        parts.reverse()  # the layers were met from the last to the first

        step, metrics = self._summarise(state.step, loss, [p.metrics for p in parts])
        new_mirrors = [
            _join(nodes) for nodes in zip(*(p.mirrors for p in parts), strict=True)
        ]
        new_state = train_state.TrainState(
            step=step,
            params=_join([part.params for part in parts]),
            opt_state=_put_together(new_mirrors, parts[0].shared, layout),
        )
        return new_state, metrics

    def _leave_fn(self, params, mirrors, shared, x, lent, batch, *, layout, diagnose):
        def loss_fn(own, lent, x):
            return self._stack.leave(own | lent, x, batch)

        loss, (grads, lent_grads, dx) = jax.value_and_grad(loss_fn, (0, 1, 2))(
            params, lent, x
        )
        updated = self._update(params, mirrors, shared, grads, layout, diagnose)
        return (loss, dx, lent_grads), updated

    def _backward_fn(self, params, mirrors, shared, x, dx, batch, *, layout, diagnose):
        _, pull_back = jax.vjp(
            lambda layer, x: self._stack.block(layer, x, batch), params["layers"][0], x
        )
        grads, dx = pull_back(dx)
        grads = {"layers": (grads,)}
        return dx, self._update(params, mirrors, shared, grads, layout, diagnose)

    def _finish_fn(
        self, params, mirrors, shared, dx, lent_grads, batch, *, layout, diagnose
    ):
        _, pull_back = jax.vjp(lambda ends: self._stack.enter(ends, batch), params)
        (grads,) = pull_back(dx)
        for name, lent in lent_grads.items():
            grads[name] = jax.tree.map(jnp.add, grads[name], lent)
        return self._update(params, mirrors, shared, grads, layout, diagnose)

    def _update(self, params, mirrors, shared, grads, layout, diagnose) -> "_Updated":
        opt_state = _put_together(mirrors, shared, layout)
        updates, opt_state = self._tx.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates)
        metrics = {"squared_grad_norm": optax.tree.norm(grads, squared=True)}
        if diagnose:
            metrics |= train_step.diagnose(params, new)
        mirrors, shared, _ = _take_apart(self._place(opt_state))
        return _Updated(self._place(new), mirrors, shared, metrics)

    def _place(self, tree):
        if self._mesh is None:
            return tree
        shardings = sharding.shardings(tree, self._mesh)
        return jax.lax.with_sharding_constraint(tree, shardings)


class _Updated(NamedTuple):
    """One part of a model after the chain, and what it adds to the metrics."""

    params: dict[str, Any]
    mirrors: list[dict[str, Any]]
    shared: list[Any]
    metrics: train_step.Metrics


def _summarise(step, loss, parts: Sequence[train_step.Metrics]):
    names = sorted({name for part in parts for name in part} - {"squared_grad_norm"})
    largest = {
        name: jnp.max(jnp.stack([part[name] for part in parts if name in part]))
        for name in names
    }
    squares = jnp.stack([part["squared_grad_norm"] for part in parts])
    return step + 1, {"loss": loss, "grad_norm": jnp.sqrt(jnp.sum(squares))} | largest


# A part of a model is a tree of the same form with some of its keys, and with one layer
# or none: what a chain does by path or by name it does to a part as to the whole.


def _only(node: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: node[key] for key in keys}


def _part(
    node: dict[str, Any], *, keys: Sequence[str] = (), index: int | None = None
) -> dict[str, Any]:
    layers = () if index is None else (node["layers"][index],)
    return _only(node, keys) | {"layers": layers}


def _join(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for part in parts:
        joined |= part
    return joined | {"layers": tuple(w for part in parts for w in part["layers"])}


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
