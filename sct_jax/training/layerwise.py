"""The training step that walks the layers backwards, one at a time.

For each layer in turn the step computes the gradient, runs the optimizer chain and
replaces the parameters. Gradients never exist all at once, and no part of the state is
copied. The memory of a step is parameters, optimizer state, one residual stream per
layer, and the gradients of one layer, or of two while dispatch runs ahead.

The loop runs on the host, over functions compiled once per kind of layer or matrix:
inside a `lax.fori_loop` XLA would copy the state.

Any chain of `optimizers` works whose rules are local: the update of a weight depends on
no other layer. `check_local` tells which chains are.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from sct_jax import errors, linalg, model, sharding, spectral
from sct_jax.training import guard as guard_lib
from sct_jax.training import optimizer_config
from sct_jax.training import state as state_lib
from sct_jax.training import step as step_lib

# Up to this many rows, recomputing a weight's gradient is cheaper than reading it.
_FEW_ROWS = 16


class Stack(NamedTuple):
    """A model in the pieces that the step handles one at a time.

    `block` and `head_loss` multiply by their matrices with `linear` (see
    `spectral.linear`), in the same order on every call.

    Attributes:
      num_layers: number of blocks.
      init_ends: key -> parameters outside the layers, a dict.
      init_layer: key -> parameters of one block.
      embed: (ends, batch) -> x, the stream before the first block.
      block: (layer, x, batch, linear) -> x.
      head_loss: (ends, x, batch, linear) -> loss.
      embed_keys: the ends that `embed` reads.
      head_keys: the ends that `head_loss` reads.
    """

    num_layers: int
    init_ends: Callable[[PRNGKeyArray], dict[str, Any]]
    init_layer: Callable[[PRNGKeyArray], Any]
    embed: Callable[[dict[str, Any], Any], Array]
    block: Callable[[Any, Array, Any, model.Linear], Array]
    head_loss: Callable[[dict[str, Any], Array, Any, model.Linear], Float[Array, ""]]
    embed_keys: tuple[str, ...]
    head_keys: tuple[str, ...]


def stack_of(
    config: model.ModelConfig, placement: sharding.Placement = sharding.UNPLACED
) -> Stack:
    """Returns the pieces of the transformer in `model`.

    Args:
      config: shape of the model.
      placement: where arrays are on a mesh, as in `model.forward`.
    """
    # The backward pass computes each layer again as a whole, never its MLP in parts.
    config = dataclasses.replace(config, remat="none")

    def embed(ends, batch):
        return model.embed(ends, batch["inputs"], config, placement=placement)

    def block(layer, x, batch, linear):
        rope = model.rotary_table(x.shape[1], config)
        segments = batch.get("segment_ids")
        return model.block(
            layer, x, rope, segments, config=config, linear=linear, placement=placement
        )

    def head_loss(ends, x, batch, linear):
        return model.head_loss(
            ends, x, batch["targets"], config, linear=linear, placement=placement
        )

    return Stack(
        num_layers=config.num_layers,
        init_ends=lambda key: model.orthonormalize(
            model.init_ends(key, config), config
        ),
        init_layer=lambda key: model.orthonormalize(
            model.init_block(key, config), config
        ),
        embed=embed,
        block=block,
        head_loss=head_loss,
        embed_keys=("embedding",),
        head_keys=model.head_keys(config),
    )


def check_local(config: optimizer_config.OptimizerConfig) -> None:
    """Raises UserError, naming the field, for a rule that needs all gradients."""
    for field, reason in (
        ("grad_clip", "the global norm needs all gradients at once"),
        ("retraction_tolerance", "it depends on the largest error of all factors"),
    ):
        errors.check(
            f"optimizer.{field}",
            getattr(config, field, None) is None,
            f'does not work with step = "layerwise": {reason}; set it to none',
        )


class TornStep(Exception):
    """A gradient was not finite after other weights had already been updated.

    The state of the step is lost.
    """

    def __init__(self, step: int):
        super().__init__(f"step {step}: the gradient of some layers is not finite")
        self.step = step


def make_train_step(
    stack: Stack,
    tx: optax.GradientTransformation,
    *,
    placement: sharding.Placement = sharding.UNPLACED,
    guard: guard_lib.Guard = guard_lib.DEFAULT,
) -> "LayerwiseStep":
    """Returns `step(state, batch, diagnose) -> (state, metrics)`; do not jit it.

    The step donates the state. It matches `step_lib.make_train_step` up
    to rounding. Metrics have the same names; `grad_norm` is summed over the layers.

    Requires chains that pass `check_local`, and separate layers (`scan_layers=False`)
    of any ranks.

    Args:
      stack: the model, see `stack_of`.
      tx: a chain with local rules.
      placement: where the state is on a mesh.
      guard: decides which steps are applied. It judges a spike by the loss alone.
    """
    return LayerwiseStep(stack, tx, guard, placement)


class LayerwiseStep:
    """The step of `make_train_step`: call it, or `forward` and then `backward`."""

    def __init__(
        self,
        stack: Stack,
        tx: optax.GradientTransformation,
        guard: guard_lib.Guard,
        placement: sharding.Placement,
    ):
        self._stack = stack
        self._tx = optax.with_extra_args_support(tx)
        self._guard = guard
        self._on_mesh = placement.mesh.size > 1
        self._linear = model.linear_on(placement)
        self._head_only = tuple(k for k in stack.head_keys if k not in stack.embed_keys)
        self._tied = tuple(k for k in stack.head_keys if k in stack.embed_keys)
        self._init_ends = jax.jit(
            lambda key: self._with_state(stack.init_ends(key) | {"layers": ()})
        )
        self._init_layer = jax.jit(
            lambda key: self._with_state({"layers": (stack.init_layer(key),)})
        )
        self._embed = jax.jit(stack.embed)
        self._forward = jax.jit(self._forward_fn)
        self._head_grads = jax.jit(self._head_grads_fn)
        # The gradient of a block's input replaces the gradient of its output.
        self._block_grads = jax.jit(self._block_grads_fn, donate_argnames="dx")
        self._embed_grads = jax.jit(self._embed_grads_fn)
        self._updates: dict[Any, Callable[..., Any]] = {}  # by `_places`
        self._accepts = jax.jit(guard.accepts)
        self._after = jax.jit(guard.after)
        self._summarise = jax.jit(_summarise)

    def init(
        self, key: PRNGKeyArray, *, num_layers: int | None = None
    ) -> state_lib.TrainState:
        """Returns the state before the first update, initialised layer by layer.

        Its numbers equal those of `state_lib.init` with separate layers, up to rounding
        where the retraction guards small matrices. Peak memory is the state and one
        more layer.

        Args:
          key: random key.
          num_layers: keep only so many layers, the first ones; None for all.
        """
        keys = model.layer_keys(key, self._stack.num_layers)[:num_layers]
        parts = [self._init_ends(key), *(self._init_layer(k) for k in keys)]
        whole = _join_parts(parts, _merge)
        *_, layout = _split_state(jax.eval_shape(self._tx.init, whole.params))
        return state_lib.TrainState(
            step=jnp.zeros([], jnp.int32),
            params=whole.params,
            opt_state=_join_state(whole.per_param_state, whole.shared, layout),
            guard=guard_lib.init(),
        )

    def __call__(
        self,
        state: state_lib.TrainState,
        batch: Any,
        diagnose: bool | Bool[Array, ""],
        *,
        reject: bool = False,
    ) -> tuple[state_lib.TrainState, step_lib.Metrics]:
        """Returns the state after one step, and its metrics; consumes `state`.

        Args:
          state: donated.
          batch: passed to the stack.
          diagnose: whether to compute the costly metrics.
          reject: do not apply the step, as its gradient is known not to be finite.

        Raises:
          TornStep: a gradient is not finite, and the state before the step is lost.
        """
        tape = self.forward(state.params, batch)
        return self.backward(state, tape, batch, bool(diagnose), reject=reject)

    def forward(self, params: model.Params, batch: Any) -> "Tape":
        """Runs the forward pass; returns what `backward` needs."""
        x = self._embed(_only(params, self._stack.embed_keys), batch)
        streams, bottlenecks = [x], []
        for layer in params["layers"]:
            x, block_bottlenecks = self._forward(layer, x, batch)
            streams.append(x)
            bottlenecks.append(block_bottlenecks)
        return Tape(streams, bottlenecks)

    def backward(
        self,
        state: state_lib.TrainState,
        tape: "Tape",
        batch: Any,
        diagnose: bool,
        *,
        reject: bool = False,
    ) -> tuple[state_lib.TrainState, step_lib.Metrics]:
        """Returns the updated state and metrics, see `__call__`; consumes `tape`."""
        params = state.params
        per_param_state, shared, layout = _split_state(state.opt_state)
        metrics, accepted = [], [jnp.array(True)]

        def update(grads: dict[str, Any], select: Callable[[Any], Any]) -> _Part:
            """Returns the part of the model that `select` selects, updated."""
            part = select(params), [select(node) for node in per_param_state], shared
            *part, part_metrics = self._update_in_place(part)(
                *part,
                grads,
                accepted[-1],
                layout=layout,
                diagnose=diagnose,
            )
            accepted.append(part_metrics.pop("accepted"))
            metrics.append(part_metrics)
            return _Part(*part)

        loss, grads, tied_grads, dx = self._head_grads(
            _only(params, self._head_only),
            _only(params, self._tied),
            tape.streams.pop(),
            batch,
        )
        if self._guard.rejects and (reject or not self._accepts(state.guard, loss)):
            return self._rejected(state, loss, diagnose, known=reject)
        head_only = self._head_only
        parts = [update(grads | {"layers": ()}, lambda node: _ends(node, head_only))]
        for index in reversed(range(len(params["layers"]))):
            # Dispatch allocates ahead of the device. Without this wait the gradients of
            # many layers would exist at once.
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
            parts.append(_join_parts(pieces, _merge_layer))
        embedded = self._stack.embed_keys
        grads = self._embed_grads(_only(params, embedded), tied_grads, dx, batch)
        parts.append(update(grads | {"layers": ()}, lambda node: _ends(node, embedded)))
        parts.reverse()  # the backward pass visits the last layer first

        whole = _join_parts(parts, _merge)
        first, last = accepted[1], accepted[-1]
        if self._guard.rejects and bool(first & ~last):
            raise TornStep(int(state.step) + 1)
        step, summary = self._summarise(state.step, loss, metrics)
        guard, of_guard = self._after(
            state.guard,
            loss,
            summary["grad_norm"],
            accepted=last,
            logged=jnp.array(diagnose),
        )
        new_state = state_lib.TrainState(
            step=step,
            params=whole.params,
            opt_state=_join_state(whole.per_param_state, whole.shared, layout),
            guard=guard,
        )
        return new_state, summary | of_guard

    def _rejected(self, state, loss, diagnose, *, known):
        grad_norm = jnp.full([], jnp.inf if known else jnp.nan, jnp.float32)
        guard, metrics = self._after(
            state.guard,
            loss,
            grad_norm if known else None,
            accepted=jnp.array(False),
            logged=jnp.array(diagnose),
        )
        metrics |= {"loss": loss, "grad_norm": grad_norm}
        if diagnose:
            metrics |= step_lib.diagnose(state.params, state.params)
        return state.replace(step=state.step + 1, guard=guard), metrics

    def _with_state(self, params):
        per_param_state, shared, _ = _split_state(self._tx.init(params))
        return _Part(params, per_param_state, shared)

    def _forward_fn(self, layer, x, batch):
        bottlenecks = []
        linear = _recording(bottlenecks, dense=self._linear)
        return self._stack.block(layer, x, batch, linear), bottlenecks

    def _head_grads_fn(self, head_only, tied, x, batch):
        def loss_fn(head_only, tied, x):
            return self._stack.head_loss(head_only | tied, x, batch, self._linear)

        loss, grads = jax.value_and_grad(loss_fn, (0, 1, 2))(head_only, tied, x)
        return loss, *grads

    def _block_grads_fn(self, layer, x, bottlenecks, dx, batch):
        def block(layer, x):
            linear = _replaying(bottlenecks, dense=self._linear)
            return self._stack.block(layer, x, batch, linear)

        _, pull_back = jax.vjp(block, layer, x)
        return pull_back(dx)

    def _embed_grads_fn(self, ends, tied_grads, dx, batch):
        _, pull_back = jax.vjp(lambda ends: self._stack.embed(ends, batch), ends)
        (grads,) = pull_back(dx)
        for name, of_head in tied_grads.items():
            grads[name] = jax.tree.map(jnp.add, grads[name], of_head)
        return grads

    def _update_fn(
        self, params, per_param_state, shared, grads, accepted, *, layout, diagnose
    ):
        before = _join_state(per_param_state, shared, layout)

        def update():
            updates, opt_state = self._tx.update(grads, before, params)
            return optax.apply_updates(params, updates), opt_state

        # Of no gradients, the norm is an integer.
        squared_norm = jnp.float32(optax.tree.norm(grads, squared=True))
        if self._guard.rejects:
            if self._guard.max_skipped is not None:
                accepted &= jnp.isfinite(squared_norm)
            new, opt_state = jax.lax.cond(accepted, update, lambda: (params, before))
        else:
            new, opt_state = update()
        metrics = {"squared_grad_norm": squared_norm, "accepted": accepted}
        if diagnose:
            metrics |= step_lib.diagnose(params, new)
        per_param_state, shared, _ = _split_state(opt_state)
        return new, per_param_state, shared, metrics

    def _update_in_place(self, part: Any) -> Callable[..., Any]:
        """`_update_fn`, compiled so that its results are where `part` is.

        Left to XLA, a result may have an equivalent sharding of another form, for which
        the functions that read it would compile once more.
        """
        places = jax.tree.map(lambda x: x.sharding, part) if self._on_mesh else None
        leaves, treedef = jax.tree.flatten(places)
        key = treedef, tuple(leaves)
        if key not in self._updates:
            self._updates[key] = jax.jit(
                self._update_fn,
                static_argnames=("layout", "diagnose"),
                donate_argnames=("params", "per_param_state"),
                out_shardings=places and (*places, None),
            )
        return self._updates[key]


class Tape(NamedTuple):
    """What the forward pass saves for the backward pass.

    Attributes:
      streams: (B, L, D) before every block, and after the last one.
      bottlenecks: per layer, (B L, R) of every factorised matrix in order of use, but
        of none in blocks. They are small, and save half of the products that the
        backward pass would repeat.
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


def _recording(bottlenecks: list[Array], *, dense: model.Linear) -> model.Linear:
    """`spectral.linear` that appends its bottlenecks to a list."""

    def expand(rows, w):
        bottlenecks.append(spectral.contract(rows, w))
        return spectral.expand(bottlenecks[-1], w)

    return _with_factors(expand, dense)


def _replaying(bottlenecks: Sequence[Array], *, dense: model.Linear) -> model.Linear:
    """`spectral.linear` that takes its bottlenecks from a list, in order."""
    remaining = iter(bottlenecks)
    expand = lambda rows, w: _expand_known(rows, w, next(remaining))
    return _with_factors(expand, dense)


def _with_factors(
    expand: Callable[[Array, Any], Array], dense: model.Linear
) -> model.Linear:
    """`dense` for arrays; for factors `expand`: rows (N, I) and factors -> (N, O).

    `dense` is for blocks too, whose bottlenecks are about as large as activations.
    """

    def linear(x, w):
        if not spectral.is_factors(w) or spectral.is_blocks(w):
            return dense(x, w)
        y = expand(x.reshape(-1, x.shape[-1]), w)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    return linear


@jax.custom_vjp
def _expand_known(
    x: Float[Array, "N I"],
    w: spectral.SpectralFactors | spectral.LowRankFactors,
    h: Float[Array, "N R"],
) -> Float[Array, "N O"]:
    """`spectral.linear(x, w)`, given h = `spectral.contract(x, w)`."""
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
    """x.T @ h; for few rows, a sum that fuses into the update of each entry.

    XLA would write a product to memory, and every part of the update would read it.
    """
    if x.shape[0] > _FEW_ROWS:
        return linalg.sum_of_outer_products(x, h).astype(dtype)
    total = sum(
        x[n][:, None].astype(dtype) * h[n][None, :].astype(dtype)
        for n in range(x.shape[0])
    )
    return jnp.asarray(total)


# A part of a model is a tree of the same form with only some of the keys. A chain that
# selects leaves by path or name therefore treats a part like the whole.


class _Part(NamedTuple):
    """Parameters of a part, and their optimizer state."""

    params: dict[str, Any]
    per_param_state: Sequence[dict[str, Any]]
    shared: Sequence[Any]


def _only(node: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: node[key] for key in keys}


def _ends(node: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return _only(node, keys) | {"layers": ()}


def _weights_of(layer: dict[str, Any]) -> list[tuple[str, ...]]:
    """Groups of keys to update together: each matrix alone, the first with all norms.

    A matrix, its moments and the temporaries of its update then fit into a cache.
    """
    is_matrix = lambda key: spectral.is_factors(layer[key]) or layer[key].ndim >= 2
    matrices = [key for key in layer if is_matrix(key)]
    others = [key for key in layer if not is_matrix(key)]
    return [(*matrices[:1], *others), *((key,) for key in matrices[1:])]


def _join_parts(parts: Sequence[_Part], merge: Callable[[Sequence[Any]], Any]) -> _Part:
    per_param_state = zip(*(part.per_param_state for part in parts), strict=True)
    return _Part(
        merge([part.params for part in parts]),
        [merge(nodes) for nodes in per_param_state],
        parts[0].shared,
    )


def _merge(nodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Joins the ends and layers of several parts, in order, into one model."""
    merged: dict[str, Any] = {}
    for node in nodes:
        merged |= node
    return merged | {"layers": tuple(w for node in nodes for w in node["layers"])}


def _merge_layer(nodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Joins parts with some keys of one layer into a part with all of them."""
    layer: dict[str, Any] = {}
    for node in nodes:
        layer |= node["layers"][0]
    return {"layers": (layer,)}


_Layout = tuple[Any, tuple[bool, ...]]


def _split_state(opt_state: Any) -> tuple[list[dict[str, Any]], list[Any], _Layout]:
    """Splits a state into trees shaped like the parameters, and shared leaves (counts).

    The layout is what `_join_state` needs to undo this.
    """
    nodes, treedef = jax.tree.flatten(opt_state, is_leaf=model.has_layers)
    is_per_param = tuple(map(model.has_layers, nodes))
    kinds = list(zip(nodes, is_per_param, strict=True))
    per_param_state = [node for node, per_param in kinds if per_param]
    shared = [node for node, per_param in kinds if not per_param]
    return per_param_state, shared, (treedef, is_per_param)


def _join_state(per_param_state: Sequence[Any], shared: Sequence[Any], layout: _Layout):
    treedef, is_per_param = layout
    of_kind = {True: iter(per_param_state), False: iter(shared)}
    return jax.tree.unflatten(treedef, [next(of_kind[kind]) for kind in is_per_param])
