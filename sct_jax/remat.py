"""Computing again what is too large to keep.

`jax.checkpoint` recomputes too, but what it keeps of a loop is stacked in the dtype of
the activations. XLA's CPU compiler turns slices of a bfloat16 array in a loop into
slices of a float32 copy of all of it. The loops here stack bits.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

T = TypeVar("T")  # a tree of arrays
Block = Callable[..., Array]  # parameters of one layer, x, *args -> x


def scan_layers(
    block: Block, layers: Any, x: Float[Array, "..."], *args: Any
) -> Float[Array, "..."]:
    """Applies a stack of layers; the backward pass keeps the input of each alone.

    Reverse-mode differentiable in `layers` and `x`. Derivatives reach neither `args`
    nor what `block` closes over.

    Args:
      block: (parameters of a layer, x, *args) -> x of the same shape and dtype.
      layers: parameters, stacked along the first axis of every leaf.
      x: input of the first layer.
      *args: arrays or None, the same for every layer.
    """
    return _scan_layers(block, layers, x, args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan_layers(block, layers, x, args):
    apply = lambda x, layer: (block(layer, x, *args), None)
    return jax.lax.scan(apply, x, layers)[0]


def _scan_fwd(block, layers, x, args):
    apply = lambda x, layer: (block(layer, x, *args), pack(x))
    out, inputs = jax.lax.scan(apply, x, layers)
    return out, (layers, inputs, args)


def _scan_bwd(block, residuals, d_out):
    layers, inputs, args = residuals

    def pull_back(d_x, given):
        layer, packed = given
        x = unpack(packed, d_x.dtype)
        d_layer, d_x = jax.vjp(lambda layer, x: block(layer, x, *args), layer, x)[1](
            d_x
        )
        return d_x, d_layer

    d_x, d_layers = jax.lax.scan(pull_back, d_out, (layers, inputs), reverse=True)
    return d_layers, d_x, jax.tree.map(_no_gradient, args)


_scan_layers.defvjp(_scan_fwd, _scan_bwd)


def by_chunks(
    fn: Callable[[Any, Array], Array],
    params: Any,
    x: Float[Array, "B L D"],
    *,
    tokens_per_chunk: int,
    row_shards: int = 1,
) -> Float[Array, "B L D"]:
    """Returns fn(params, x) of a function of each position, computed piece by piece.

    The backward pass keeps `x` alone, and computes each piece again. Reverse-mode
    differentiable in `params` and `x`, not in what `fn` closes over.

    Args:
      fn: (params, x (B, C, D)) -> (B, C, D), independent for every position.
      params: all parameters of the function.
      x: its input.
      tokens_per_chunk: rounded up to a whole number of positions of every sequence; on
        a mesh, of each shard.
      row_shards: number of parts of the batch that lie on different devices; divides B.
        Each sums the gradient of `params` over its own chunks, and the parts are added
        once, instead of once per chunk. `fn` then gets the rows of one part.
    """
    batch, length, _ = x.shape
    size = chunk_size(tokens_per_chunk, batch, row_shards)
    if size >= length:
        return fn(params, x)

    def of_rows(x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        chunks: Array = _by_chunks(fn, params, in_chunks(x, size))  # pyright: ignore
        return chunks.swapaxes(0, 1).reshape(x.shape[0], -1, x.shape[-1])[:, :length]

    whole = lambda parts: parts.reshape(x.shape)
    return map_parts(of_rows, in_parts(x, row_shards), parts=row_shards, join=whole)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_chunks(
    fn: Callable[[Any, Array], Array], params: Any, x: Float[Array, "N B C D"]
) -> Float[Array, "N B C D"]:
    apply = lambda packed: pack(fn(params, unpack(packed, x.dtype)))
    return unpack(jax.lax.map(apply, pack(x)), x.dtype)


def _by_chunks_fwd(fn, params, x):
    return _by_chunks(fn, params, x), (params, pack(x))


def _by_chunks_bwd(fn, residuals, d_out):
    params, inputs = residuals

    def pull_back(total, given):
        x, d_out_of_chunk = (unpack(packed, d_out.dtype) for packed in given)
        d_params, d_x = jax.vjp(fn, params, x)[1](d_out_of_chunk)
        return jax.tree.map(jnp.add, total, d_params), pack(d_x)

    d_params, d_x = jax.lax.scan(
        pull_back, zeros_to_add_to(params), (inputs, pack(d_out))
    )
    d_params = jax.tree.map(lambda g, p: g.astype(p.dtype), d_params, params)
    return d_params, unpack(d_x, d_out.dtype)


_by_chunks.defvjp(_by_chunks_fwd, _by_chunks_bwd)


def zeros_to_add_to(tree: T) -> T:
    """Returns zeros like the arrays of a tree, in float32 at least, for long sums."""
    return jax.tree.map(
        lambda x: jnp.zeros_like(x, dtype=jnp.promote_types(x.dtype, jnp.float32)), tree
    )


def in_parts(x: Shaped[Array, "B ..."], parts: int) -> Shaped[Array, "..."]:
    """Returns x with a leading axis of parts, each with its rows; x itself for one.

    Raises:
      ValueError: if the parts do not divide the rows.
    """
    if parts < 1 or len(x) % parts:
        raise ValueError(f"{parts} row shards must divide the batch of {len(x)}")
    return x if parts == 1 else x.reshape(parts, -1, *x.shape[1:])


def map_parts(
    fn: Callable[..., Array],
    *arguments: Any,
    parts: int,
    join: Callable[[Array], Array],
) -> Array:
    """Returns `join` of what `fn` makes of each part; fn(*arguments) for one part.

    What `fn` closes over has the sum of the gradients of all parts.

    Args:
      fn: a function of one part.
      *arguments: trees of arrays with a leading axis of parts if there are several.
      parts: how many there are, which lie on different devices.
      join: of an array with a leading axis of parts.
    """
    if parts == 1:
        return fn(*arguments)
    return join(jax.vmap(fn)(*arguments))


def chunk_size(tokens: int, batch: int, row_shards: int) -> int:
    """Returns how many positions of all rows of a shard have at least `tokens`."""
    return -(-tokens * row_shards // batch)


def in_chunks(x: Array, size: int) -> Array:
    """Returns (B, L, ...) as (N, B, size, ...), with zeros at the end."""
    missing = -x.shape[1] % size
    x = jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)


def pack(x: Array) -> Array:
    """Returns the bits of a bfloat16 array as integers; other arrays as they are."""
    if x.dtype != jnp.bfloat16:
        return x
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


def unpack(packed: Array, dtype: jax.typing.DTypeLike) -> Array:
    """Returns the array of this dtype that `pack` was given."""
    if packed.dtype == dtype:
        return packed
    return jax.lax.bitcast_convert_type(packed, dtype)


def _no_gradient(x: Array) -> Any:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return None
