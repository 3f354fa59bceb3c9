"""A decoder-only transformer (SmolLM2 / Llama) as pure functions of plain pytrees.

Axes, here and everywhere: B batch, L query length, M key length, D d_model, F d_ff,
H heads, G kv heads, K head_dim, V vocab, R rank, I fan_in, O fan_out.

Parameters: {"embedding": (V, D), "layers": ..., "final_norm": (D,), "head": (D, V)}.
"layers" is one block whose leaves are stacked along a first axis of size num_layers,
or a tuple of blocks. Any matrix may be a factor tuple. Tied models have no "head".
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, Scalar

from sct_jax import attention, errors, losses, remat, sharding, spectral
from sct_jax import blocks as blocks_lib

Params = dict[str, Any]
Linear = Callable[[Array, spectral.Weight], Array]  # x (..., I), W to x @ W (..., O)

LAYERS = "layers"
"""Key of the layers in the parameters, and in every state that mirrors them."""

BLOCK_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
MATRICES = (*BLOCK_MATRICES, "embedding", "head")
MLP = ("gate", "up", "down")
FACTORS = ("spectral", "low_rank")
REMAT = ("none", "dots", "full")
"""What the backward pass recomputes: from nothing to all, from most to least memory."""

MLP_TOKENS = 2048
"""Tokens whose (..., F) activations exist at once under remat "full"."""

MAX_SIZES = {
    "d_model": 2**20,
    "d_ff": 2**22,
    "num_layers": 2**10,
    "num_heads": 2**16,
    "num_kv_heads": 2**16,
    "vocab_size": 2**24,
}
"""Beyond any model, yet small enough to be described in little time and memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixRanks:
    """Ranks of individual matrices; they override `model.rank`."""

    q: int | None = None
    k: int | None = None
    v: int | None = None
    o: int | None = None
    gate: int | None = None
    up: int | None = None
    down: int | None = None
    embedding: int | None = None
    head: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixRankRatios:
    """Ranks of individual matrices as fractions of fan_in, at most min(I, O) / B."""

    q: float | None = None
    k: float | None = None
    v: float | None = None
    o: float | None = None
    gate: float | None = None
    up: float | None = None
    down: float | None = None
    embedding: float | None = None
    head: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixBlocks:
    """Blocks of individual matrices; they override `model.num_blocks`."""

    q: int | None = None
    k: int | None = None
    v: int | None = None
    o: int | None = None
    gate: int | None = None
    up: int | None = None
    down: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies were stretched for windows longer than at first.

    Attributes:
      kind: "none", "linear" (all frequencies divided by `factor`; Chen et al., Position
        Interpolation, arXiv 2306.15595, 2023), or "llama3" (only wavelengths that are
        long against `original_length`, with a ramp between).
      factor: divides low frequencies, at least 1.
      low_freq_factor: "llama3" divides wavelengths above `original_length` over this.
      high_freq_factor: "llama3" keeps wavelengths below `original_length` over this.
      original_length: window of the training before, in tokens.
    """

    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def validate(self, prefix: str) -> None:
        """Raises UserError naming the first invalid field, after `prefix`."""
        errors.check_choice(f"{prefix}kind", self.kind, ("none", "linear", "llama3"))
        errors.check(
            f"{prefix}kind",
            self.kind != "none" or self == RopeScaling(),
            "'none' leaves the other fields without effect; set it, or unset them",
        )
        errors.check_bounds(prefix, self, "factor", least=1)
        errors.check_bounds(prefix, self, "low_freq_factor", above=0)
        errors.check(
            f"{prefix}high_freq_factor",
            self.low_freq_factor < self.high_freq_factor < math.inf,
            f"{self.high_freq_factor} must be above low_freq_factor = "
            f"{self.low_freq_factor}",
        )
        errors.check_bounds(prefix, self, "original_length", least=1, most=2**40)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of the model.

    Attributes:
      d_model: D, width of the residual stream.
      d_ff: F, width of the SwiGLU.
      num_layers: number of blocks.
      num_heads: H, number of query heads.
      num_kv_heads: G, number of key and value heads; divides num_heads.
      head_dim: K, size of a head; d_model / num_heads if None.
      vocab_size: V, number of token ids.
      rank: R of the factorised matrices. `ranks` and `rank_ratios` override it.
      spectral: names of the factorised matrices, from `MATRICES`.
      factors: kind of the factors: "spectral" (u, s, v) or "low_rank" (a, b).
      ranks: ranks of individual matrices.
      rank_ratios: ranks of individual matrices as fractions of fan_in.
      num_blocks: B of the factorised matrices of the layers; 1 for plain factors. With
        B blocks, a matrix has rank B R at the parameters and FLOPs of rank R (see
        `spectral.BlockSpectralFactors`), and R is at most min(I, O) / B. Each block of
        the output reads every block of the input alike only if B divides R.
      blocks: B of individual matrices.
      tie_embeddings: whether the head is the transposed embedding.
      rope_theta: base of the rotary embedding, at least 1.
      rope_scaling: how its frequencies are stretched for long windows.
      norm_eps: epsilon of RMSNorm.
      qk_norm: whether to normalise queries and keys over head_dim before the rotary
        embedding, with separate scales (Qwen3). Attention scores are then bounded for
        all singular values of q and k.
      rescale_init: whether to scale s to the Frobenius norm of the dense init.
      compute_dtype: dtype of activations, and of parameters in matrix products.
      scan_layers: True scans over stacked layers; False unrolls a tuple of layers.
      remat: what the backward pass recomputes: "none", "dots" (all but the results of
        matrix products and attention), "full" (each block from its input, and in it the
        SwiGLU of some tokens at a time) or "auto", with which a run takes the first of
        these that fits into the memory of its devices. The functions of this module
        take "auto" for "none".
      attention: what computes attention: "xla" (all scores of a sequence at once),
        "chunked" (blocks of them, so memory grows with the length and not with its
        square), a kernel of `attention_kernels` ("cudnn", "triton", "splash"), or
        "auto". In training "auto" takes what serves best on the devices, elsewhere
        "chunked".
    """

    d_model: int = 576
    d_ff: int = 1536
    num_layers: int = 30
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int | None = None
    vocab_size: int = 49152
    rank: int = 128
    spectral: tuple[str, ...] = MLP
    factors: str = "spectral"
    ranks: MatrixRanks = MatrixRanks()
    rank_ratios: MatrixRankRatios = MatrixRankRatios()
    num_blocks: int = 1
    blocks: MatrixBlocks = MatrixBlocks()
    tie_embeddings: bool = True
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    norm_eps: float = 1e-5
    qk_norm: bool = False
    rescale_init: bool = False
    compute_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "auto"
    attention: str = "auto"

    @property
    def head_size(self) -> int:
        """K, size of a head."""
        if self.head_dim is not None:
            return self.head_dim
        return self.d_model // self.num_heads

    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """Returns (fan_in, fan_out) of every matrix; tied models have no "head"."""
        d, f = self.d_model, self.d_ff
        h, g = (n * self.head_size for n in (self.num_heads, self.num_kv_heads))
        shapes = {
            "q": (d, h),
            "k": (d, g),
            "v": (d, g),
            "o": (h, d),
            "gate": (d, f),
            "up": (d, f),
            "down": (f, d),
            "embedding": (self.vocab_size, d),
        }
        return (
            shapes if self.tie_embeddings else shapes | {"head": (d, self.vocab_size)}
        )

    def matrix_rank(self, name: str) -> int | None:
        """Returns the rank of a matrix, or None if it is dense."""
        if name not in self.spectral:
            return None
        explicit = getattr(self.ranks, name)
        ratio = getattr(self.rank_ratios, name)
        if explicit is None and ratio is not None:
            shape = self.matrix_shapes()[name]
            most = min(shape) // self.matrix_blocks(name)
            return max(1, min(int(ratio * shape[0]), most))
        return self.rank if explicit is None else explicit

    def matrix_blocks(self, name: str) -> int:
        """Returns the number of blocks of a matrix, 1 if it is plain or dense."""
        if name not in self.spectral or name not in BLOCK_MATRICES:
            return 1
        explicit = getattr(self.blocks, name)
        return self.num_blocks if explicit is None else explicit

    def clamped_ratios(self) -> list[str]:
        """Returns a sentence for every rank ratio that was clamped."""
        notes = []
        for name in self.spectral:
            ratio, shape = getattr(self.rank_ratios, name), self.matrix_shapes()[name]
            explicit = getattr(self.ranks, name)
            if explicit is None and ratio is not None:
                wanted, rank = int(ratio * shape[0]), self.matrix_rank(name)
                if wanted != rank:
                    notes.append(
                        f"model.rank_ratios.{name}: {ratio} of fan_in {shape[0]} is "
                        f"rank {wanted}; clamped to {rank}"
                    )
        return notes

    def validate(self) -> None:
        """Raises UserError naming the first invalid field."""
        for name, most in MAX_SIZES.items():
            least = 2 if name == "vocab_size" else 1
            errors.check_bounds("model.", self, name, least=least, most=most)
        if self.head_dim is not None:
            errors.check_bounds("model.", self, "head_dim", least=2, most=2**16)
        errors.check(
            "model.num_heads",
            self.head_dim is not None or self.d_model % self.num_heads == 0,
            f"{self.num_heads} must divide model.d_model = {self.d_model}, or "
            "model.head_dim be set",
        )
        errors.check(
            "model.num_heads" if self.head_dim is None else "model.head_dim",
            self.head_size % 2 == 0,
            f"head_dim = {self.head_size} must be even for rotary embeddings",
        )
        errors.check(
            "model.num_kv_heads",
            self.num_heads % self.num_kv_heads == 0,
            f"{self.num_kv_heads} must divide model.num_heads = {self.num_heads}",
        )
        errors.check_bounds("model.", self, "rope_theta", least=1)
        self.rope_scaling.validate("model.rope_scaling.")
        errors.check_bounds("model.", self, "norm_eps", above=0)
        errors.check_choice("model.factors", self.factors, FACTORS)
        errors.check_choice("model.remat", self.remat, ("auto", *REMAT))
        errors.check_choice("model.attention", self.attention, attention.CHOICES)
        errors.check_choice(
            "model.compute_dtype", self.compute_dtype, ("float32", "bfloat16")
        )
        for name in self.spectral:
            errors.check_choice("model.spectral", name, MATRICES)
        errors.check(
            "model.spectral",
            "head" not in self.spectral or not self.tie_embeddings,
            "remove 'head': it is the transposed embedding, since "
            "model.tie_embeddings is true",
        )
        errors.check(
            "model.spectral",
            len(set(self.spectral)) == len(self.spectral),
            f"{self.spectral} lists a matrix twice",
        )
        errors.check_bounds("model.", self, "num_blocks", least=1)
        for name in BLOCK_MATRICES:
            self.validate_blocks(name)
        for name in MATRICES:
            self.validate_rank(name)

    def validate_blocks(self, name: str) -> None:
        """Raises UserError for a number of blocks that this matrix cannot have."""
        explicit, blocks = getattr(self.blocks, name), self.matrix_blocks(name)
        field = "model.num_blocks" if explicit is None else f"model.blocks.{name}"
        errors.check(
            field,
            explicit is None or name in self.spectral,
            f"has no effect: add {name!r} to model.spectral, or unset it",
        )
        (fan_in, fan_out), nearest = self.matrix_shapes()[name], ""
        common = math.gcd(fan_in, fan_out)
        fits = blocks >= 1 and common % blocks == 0
        if not fits:
            possible = [n for n in range(1, common + 1) if common % n == 0]
            below = [n for n in possible if n < blocks]
            above = [n for n in possible if n > blocks]
            nearest = " or ".join(map(str, below[-1:] + above[:1]))
        errors.check(
            field,
            fits,
            f"{blocks} must divide both sides of matrix {name!r}, {fan_in} x "
            f"{fan_out}: set {nearest}",
        )
        errors.check(
            field,
            blocks == 1 or self.factors == "spectral",
            f"{blocks} blocks need model.factors = 'spectral', got {self.factors!r}: "
            "change it, or set 1",
        )

    def rank_setting(self, name: str) -> str:
        """Returns the field that sets the rank of a matrix, for messages."""
        return next(iter(self._own_rank_settings(name)), "model.rank")

    def _own_rank_settings(self, name: str) -> list[str]:
        return [
            f"model.{field}.{name}"
            for field in ("ranks", "rank_ratios")
            if getattr(getattr(self, field), name) is not None
        ]

    def validate_rank(self, name: str) -> None:
        """Raises UserError for a rank of this matrix that is not possible."""
        ratio = getattr(self.rank_ratios, name)
        given = self._own_rank_settings(name)
        message = f"conflicts with {given[0]}: set only one of them" if given else ""
        errors.check(given[-1] if given else "", len(given) < 2, message)
        if name not in self.spectral:
            message = f"has no effect: add {name!r} to model.spectral, or unset it"
            errors.check(given[0] if given else "", not given, message)
            return
        if ratio is not None:
            errors.check(
                given[0], 0 < ratio <= 2**20, f"{ratio} must be > 0 and <= {2**20}"
            )
            return
        rank, shape = self.matrix_rank(name), self.matrix_shapes()[name]
        blocks = self.matrix_blocks(name)
        most = min(shape) // blocks
        in_blocks = f" in {blocks} blocks" if blocks > 1 else ""
        errors.check(
            self.rank_setting(name),
            rank is not None and 1 <= rank <= most,
            f"rank {rank} of matrix {name!r} must be in 1..{most}, for shape "
            f"{shape[0]} x {shape[1]}{in_blocks}",
        )


def init(key: PRNGKeyArray, config: ModelConfig) -> Params:
    """Returns random float32 parameters with orthonormal factors.

    Dense matrices are N(0, 1 / fan_in); factors follow its spectrum (`spectral.init`).
    o and down are divided by sqrt(2 num_layers). The embedding is N(0, 1 / d_model).
    Both layouts of the layers get the same numbers.
    """
    params = init_ends(key, config) | {
        LAYERS: jax.vmap(lambda key: init_block(key, config))(
            layer_keys(key, config.num_layers)
        )
    }
    params = orthonormalize(params, config)
    return params if config.scan_layers else unstack_layers(params)


def layer_keys(key: PRNGKeyArray, num_layers: int) -> Key[Array, " N"]:
    """Returns one key per layer from the key of a model."""
    return jax.random.split(jax.random.fold_in(key, 2), num_layers)


def init_ends(key: PRNGKeyArray, config: ModelConfig) -> Params:
    """Returns embedding, final norm and head, before `orthonormalize`."""
    ends: Params = {
        # Lookup reads single rows, so the scale of a row matters.
        "embedding": _init_matrix(
            jax.random.fold_in(key, 0),
            config,
            "embedding",
            scale=math.sqrt(config.vocab_size / config.d_model),
        ),
        "final_norm": jnp.ones(config.d_model, jnp.float32),
    }
    if not config.tie_embeddings:
        ends["head"] = _init_matrix(jax.random.fold_in(key, 1), config, "head")
    return ends


def orthonormalize(params: Params, config: ModelConfig) -> Params:
    """Retracts sampled factors, and converts them to the kind `config.factors`."""
    params = spectral.retract(params)
    if config.factors == "low_rank":
        params = jax.tree.map(
            lambda w: (
                spectral.to_low_rank(w)
                if isinstance(w, spectral.SpectralFactors)
                else w
            ),
            params,
            is_leaf=spectral.is_factors,
        )
    return params


def init_block(
    key: PRNGKeyArray, config: ModelConfig, *, layers: tuple[int, ...] = ()
) -> Params:
    """Returns the parameters of one block, or of a stack, before `orthonormalize`."""
    block: Params = {
        "attention_norm": jnp.ones((*layers, config.d_model), jnp.float32),
        "mlp_norm": jnp.ones((*layers, config.d_model), jnp.float32),
    }
    if config.qk_norm:
        block["q_norm"] = jnp.ones((*layers, config.head_size), jnp.float32)
        block["k_norm"] = jnp.ones((*layers, config.head_size), jnp.float32)
    for index, name in enumerate(BLOCK_MATRICES):
        scale = 1 / math.sqrt(2 * config.num_layers) if name in ("o", "down") else 1.0
        block[name] = _init_matrix(
            jax.random.fold_in(key, index), config, name, layers=layers, scale=scale
        )
    return block


def _init_matrix(key, config, name, *, layers=(), scale=1.0):
    fan_in, fan_out = config.matrix_shapes()[name]
    rank = config.matrix_rank(name)
    if rank is None:
        std = scale / math.sqrt(fan_in)
        return std * jax.random.normal(key, (*layers, fan_in, fan_out), jnp.float32)
    config.validate_rank(name)
    blocks = config.matrix_blocks(name)
    init_factors = spectral.init
    if blocks > 1:
        init_factors = functools.partial(blocks_lib.init, blocks=blocks)
    return init_factors(
        key,
        fan_in,
        fan_out,
        rank,
        layers=layers,
        scale=scale,
        rescale=config.rescale_init,
        orthonormal=False,
    )


def unstack_layers(tree: Any) -> Any:
    """Converts every stacked "layers" entry of a tree to a tuple of blocks.

    Works on parameters and on any state that mirrors them, such as Adam's moments.
    """

    def unstack(node):
        if not has_layers(node) or isinstance(node[LAYERS], tuple):
            return node
        leaves, treedef = jax.tree.flatten(node[LAYERS])
        if not leaves:  # a mask removed all layers
            return node
        blocks = tuple(
            jax.tree.unflatten(treedef, [leaf[i] for leaf in leaves])
            for i in range(leaves[0].shape[0])
        )
        return node | {LAYERS: blocks}

    return jax.tree.map(unstack, tree, is_leaf=has_layers)


def stack_layers(
    tree: Any, *, stack_arrays: Callable[[Sequence[Array]], Array] = jnp.stack
) -> Any:
    """Stacks every "layers" tuple of a tree; inverse of `unstack_layers`.

    Args:
      tree: parameters, or a state that mirrors them.
      stack_arrays: stacks the arrays of all layers along a new first axis.

    Raises:
      ValueError: if shapes differ between layers, for example by rank.
    """

    def stack(node):
        if not has_layers(node) or not isinstance(node[LAYERS], tuple):
            return node
        return node | {
            LAYERS: jax.tree.map(lambda *xs: stack_arrays(xs), *node[LAYERS])
        }

    return jax.tree.map(stack, tree, is_leaf=has_layers)


def has_layers(node: Any) -> bool:
    """Returns whether a node of a state mirrors the parameters of a model."""
    return isinstance(node, dict) and LAYERS in node


def decay_mask(params: Params) -> Any:
    """Returns a mask of the leaves with weight decay: s, a, b and dense matrices.

    Selects by name, because a stacked norm scale has two axes like a matrix.
    """

    # "v" is a matrix as a dictionary key, but a factor as an attribute.
    def decays(path, _):
        if isinstance(path[-1], jax.tree_util.GetAttrKey):
            return path[-1].name not in ("u", "v")
        return not str(path[-1].key).endswith("_norm")

    return jax.tree_util.tree_map_with_path(decays, params)


def hidden_matrices(params: Params) -> Any:
    """Returns a mask of the matrices inside layers, which Muon orthogonalises."""

    def hidden(path, _):
        keys = [str(getattr(key, "key", "")) for key in path]
        return LAYERS in keys and not keys[-1].endswith("_norm")

    return jax.tree_util.tree_map_with_path(hidden, params)


def forward(
    params: Params,
    tokens_BL: Int[Array, "B L"],
    config: ModelConfig,
    *,
    segment_ids: Int[Array, "B L"] | None = None,
    linear: Linear = spectral.linear,
    placement: sharding.Placement = sharding.UNPLACED,
) -> Float[Array, "B L V"]:
    """Returns the logits of the next token at every position, in float32.

    Args:
      params: parameters from `init`, in either layout.
      tokens_BL: token ids.
      config: architecture of the model.
      segment_ids: document id of each position. Attention does not cross documents.
      linear: multiplies by every matrix of the layers, and by the head. The embedding
        lookup does not use it.
      placement: where arrays are on a mesh; by default, XLA chooses.
    """
    x_BLD = hidden(
        params,
        tokens_BL,
        config,
        segment_ids=segment_ids,
        linear=linear,
        placement=placement,
    )
    return logits(params, x_BLD, config, linear=linear)


def loss(
    params: Params,
    batch: Mapping[str, Int[Array, "B L"]],
    config: ModelConfig,
    *,
    linear: Linear = spectral.linear,
    placement: sharding.Placement = sharding.UNPLACED,
) -> Scalar:
    """Returns the mean next-token loss of a batch, in nats per token.

    The same as `losses.next_token_cross_entropy` of `forward`, but the logits of all
    tokens never exist together.

    Args:
      params: parameters from `init`, in either layout.
      batch: `inputs`, `targets` and, where documents are packed, `segment_ids`.
      config: architecture of the model.
      linear: as in `forward`. Derivatives do not reach what it closes over in the head.
      placement: as in `forward`.
    """
    tokens_BL, targets_BL = batch["inputs"], batch["targets"]
    table = _ends(params, ("embedding",), jnp.float32, placement)
    x_BLD = _embed(table, tokens_BL, config, placement)
    x_BLD = _apply_layers(
        params[LAYERS], x_BLD, config, batch.get("segment_ids"), linear, placement
    )
    others = [name for name in head_keys(config) if name not in table]
    head = _ends(params, others, x_BLD.dtype, placement)
    if config.tie_embeddings:
        head |= table  # the gradients of both uses meet in one copy
    return _head_loss(head, x_BLD, targets_BL, config, linear, placement)


def head_loss(
    params: Params,
    x_BLD: Float[Array, "B L D"],
    targets_BL: Int[Array, "B L"],
    config: ModelConfig,
    *,
    linear: Linear = spectral.linear,
    placement: sharding.Placement = sharding.UNPLACED,
) -> Scalar:
    """Returns the mean loss, in nats per token, from the result of `hidden`."""
    ends = _ends(params, head_keys(config), x_BLD.dtype, placement)
    return _head_loss(ends, x_BLD, targets_BL, config, linear, placement)


def _head_loss(ends, x_BLD, targets_BL, config, linear, placement):
    return losses.head_cross_entropy(
        lambda ends, x: logits(ends, x, config, linear=linear),
        ends,
        x_BLD,
        targets_BL,
        row_shards=placement.row_shards,
    )


def _ends(
    params: Params,
    keys: Sequence[str],
    dtype: jax.typing.DTypeLike,
    placement: sharding.Placement,
) -> Params:
    """Some of embedding, final norm and head, a copy for each part of the batch."""
    return placement.copies({name: params[name] for name in keys}, dtype)


def linear_on(placement: sharding.Placement) -> Linear:
    """Returns `spectral.linear` for activations on a mesh, or on one device."""
    return functools.partial(
        spectral.linear,
        flatten_rows=placement.mesh.size == 1,
        constrain=placement.bottleneck,
    )


def head_keys(config: ModelConfig) -> tuple[str, str]:
    """Returns the keys of the parameters that `logits` reads."""
    return "final_norm", "embedding" if config.tie_embeddings else "head"


def hidden(
    params: Params,
    tokens_BL: Int[Array, "B L"],
    config: ModelConfig,
    *,
    segment_ids: Int[Array, "B L"] | None = None,
    linear: Linear = spectral.linear,
    placement: sharding.Placement = sharding.UNPLACED,
) -> Float[Array, "B L D"]:
    """Returns the residual stream after the last layer; arguments as in `forward`."""
    x_BLD = embed(params, tokens_BL, config, placement=placement)
    return _apply_layers(params[LAYERS], x_BLD, config, segment_ids, linear, placement)


def _apply_layers(layers, x_BLD, config, segment_ids, linear, placement):
    rope = rotary_table(x_BLD.shape[1], config)
    plain = functools.partial(block, config=config, linear=linear, placement=placement)
    apply = _rematerialised(plain, config.remat, placement)
    if isinstance(layers, tuple):
        for layer in layers:
            x_BLD = apply(layer, x_BLD, rope, segment_ids)
        return x_BLD
    if config.remat == "full":
        return remat.scan_layers(plain, layers, x_BLD, rope, segment_ids)
    step = lambda x, layer: (apply(layer, x, rope, segment_ids), None)
    return jax.lax.scan(step, x_BLD, layers)[0]


def check_tokens(tokens: Sequence[int], config: ModelConfig) -> None:
    """Raises ValueError for a token outside the vocabulary; tokens are on the host."""
    smallest, largest = min(tokens), max(tokens)
    if smallest < 0 or largest >= config.vocab_size:
        raise ValueError(
            f"tokens must be in 0..{config.vocab_size - 1}, as the vocabulary has; got "
            f"{smallest if smallest < 0 else largest}"
        )


def embed(
    params: Params,
    tokens_BL: Int[Array, "B L"],
    config: ModelConfig,
    *,
    placement: sharding.Placement = sharding.UNPLACED,
) -> Float[Array, "B L D"]:
    """Returns the residual stream before the first layer, in the compute dtype."""
    # In float32: the gradient of a row is a sum over all tokens that read it.
    ends = _ends(params, ("embedding",), jnp.float32, placement)
    return _embed(ends, tokens_BL, config, placement)


def _embed(ends, tokens_BL, config, placement):
    x_BLD = remat.map_parts(
        spectral.lookup,
        remat.in_parts(tokens_BL, placement.row_shards),
        ends["embedding"],
        parts=placement.row_shards,
        join=lambda x: x.reshape(*tokens_BL.shape, -1),
    )
    x_BLD = x_BLD.astype(jnp.dtype(config.compute_dtype))
    return placement.stream(x_BLD)


def logits(
    params: Params,
    x_BLD: Float[Array, "B L D"],
    config: ModelConfig,
    *,
    linear: Linear = spectral.linear,
) -> Float[Array, "B L V"]:
    """Returns float32 logits from the residual stream after the last layer.

    The product with the head uses the compute dtype, so bfloat16 logits have 8 bits.
    """
    x_BLD = rms_norm(x_BLD, params["final_norm"], config.norm_eps)
    head = params.get("head")
    if head is None:
        head = spectral.transpose(params["embedding"])
    return linear(x_BLD, head).astype(jnp.float32)


def block(
    params: Params,
    x_BLD: Float[Array, "B L D"],
    rope: tuple[Float[Array, "L K2"], Float[Array, "L K2"]],
    segment_ids: Int[Array, "B L"] | None,
    *,
    config: ModelConfig,
    linear: Linear = spectral.linear,
    placement: sharding.Placement = sharding.UNPLACED,
) -> Float[Array, "B L D"]:
    """Returns the residual stream after one layer: causal attention, then SwiGLU.

    `linear` multiplies by the seven matrices, in the order q, k, v, o, gate, up, down.
    """
    params = placement.weights(params, x_BLD.dtype)
    batch, length, _ = x_BLD.shape
    q_BLHK, k_BMGK, v_BMGK = attention_inputs(
        params, x_BLD, config=config, linear=linear
    )
    attended_BLHK = attention.attend(
        rotate(q_BLHK, rope),
        rotate(k_BMGK, rope),
        v_BMGK,
        segment_ids=segment_ids,
        implementation=config.attention,
    )
    x_BLD = x_BLD + linear(attended_BLHK.reshape(batch, length, -1), params["o"])
    x_BLD = placement.stream(x_BLD)
    mlp = functools.partial(add_mlp, config=config, linear=linear)
    if config.remat != "full":
        x_BLD = mlp(params, x_BLD)
    else:
        matrices = {name: params[name] for name in ("mlp_norm", *MLP)}
        x_BLD = remat.by_chunks(
            mlp,
            matrices,
            x_BLD,
            tokens_per_chunk=MLP_TOKENS,
            row_shards=placement.row_shards,
        )
    return placement.stream(x_BLD)


def attention_inputs(
    params: Params,
    x_BLD: Float[Array, "B L D"],
    *,
    config: ModelConfig,
    linear: Linear = spectral.linear,
) -> tuple[Float[Array, "B L H K"], Float[Array, "B L G K"], Float[Array, "B L G K"]]:
    """Returns queries, keys and values of one layer, before the rotary embedding."""
    h_BLD = rms_norm(x_BLD, params["attention_norm"], config.norm_eps)
    heads = lambda y, n: y.reshape(*y.shape[:-1], n, config.head_size)
    q_BLHK = heads(linear(h_BLD, params["q"]), config.num_heads)
    k_BLGK = heads(linear(h_BLD, params["k"]), config.num_kv_heads)
    v_BLGK = heads(linear(h_BLD, params["v"]), config.num_kv_heads)
    if config.qk_norm:
        q_BLHK = rms_norm(q_BLHK, params["q_norm"], config.norm_eps)
        k_BLGK = rms_norm(k_BLGK, params["k_norm"], config.norm_eps)
    return q_BLHK, k_BLGK, v_BLGK


def add_mlp(
    params: Params,
    x_BLD: Float[Array, "B L D"],
    *,
    config: ModelConfig,
    linear: Linear = spectral.linear,
) -> Float[Array, "B L D"]:
    """Returns the residual stream plus the SwiGLU of one layer."""
    h_BLD = rms_norm(x_BLD, params["mlp_norm"], config.norm_eps)
    gate_BLF = jax.nn.silu(linear(h_BLD, params["gate"]))
    up_BLF = linear(h_BLD, params["up"])
    return x_BLD + linear(gate_BLF * up_BLF, params["down"])


def rms_norm(
    x: Float[Array, "... D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "... D"]:
    """Returns x / rms(x) * scale in the dtype of x, computed in float32."""
    # XLA on CPU takes up to 50 times longer to sum products over an array that has an
    # axis of size 1, and the gradient has such sums.
    long = [n for n in x.shape[:-1] if n > 1]
    x32 = x.reshape(*long, x.shape[-1]).astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    scale = jnp.expand_dims(scale, tuple(range(x32.ndim - 1)))
    normal = x32 * jax.lax.rsqrt(mean_square + eps) * scale
    return normal.astype(x.dtype).reshape(x.shape)


def rotary_table(
    length: int, config: ModelConfig
) -> tuple[Float[Array, "L K2"], Float[Array, "L K2"]]:
    """Returns cosine and sine of every position times every frequency.

    References:
      Su et al., RoFormer, arXiv 2104.09864, 2021, eq. 15
    """
    positions = jnp.arange(length, dtype=jnp.float32)
    angles = positions[:, None] * rotary_frequencies(config)[None]
    return jnp.cos(angles), jnp.sin(angles)


def rotary_frequencies(config: ModelConfig) -> Float[Array, " K2"]:
    """Returns the angle per position of every pair, in radians.

    References:
      Grattafiori et al., The Llama 3 herd of models, arXiv 2407.21783, 2024, 3.4.1; the
      ramp of "llama3" is that of its published code
    """
    half = config.head_size // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = config.rope_scaling
    if scaling.kind == "none":
        return frequencies
    slow = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slow
    turns = scaling.original_length * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return kept * frequencies + (1 - kept) * slow


def rotate(
    x_BLHK: Float[Array, "B L H K"],
    rope: tuple[Array, Array],
) -> Float[Array, "B L H K"]:
    """Rotates each pair (x_i, x_{i + K/2}), the pairing of Llama checkpoints.

    Args:
      x_BLHK: queries or keys.
      rope: cosine and sine of the angles, (L, K/2), or (B, L, K/2) where rows are at
        different positions.
    """
    cos, sin = (
        jnp.expand_dims(table, (0, 2) if table.ndim == 2 else 2) for table in rope
    )
    first, second = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x_BLHK.dtype)


_CHEAP = ("convert_element_type", "sharding_constraint", "transpose")


def _rematerialised(apply, remat: str, placement: sharding.Placement):
    if remat == "full":
        return jax.checkpoint(apply)
    if remat == "dots":
        policies = jax.checkpoint_policies
        policy = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable,
            policies.save_only_these_names(attention.SAVED),
        )
        return jax.checkpoint(apply, policy=policy)
    if placement.gathers_weights:
        # Gather again in the backward pass: kept, all layers would be the whole model.
        policy = lambda primitive, *_, **__: primitive.name not in _CHEAP
        return jax.checkpoint(apply, policy=policy)
    return apply
