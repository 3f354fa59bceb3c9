"""Everything that runs on the devices for one configuration and mesh.

`loop.train` and the trials of `experiments.studies` drive the same `Trainer`: it owns
the shape and sharding of the state, the compiled step, evaluation, and changes of rank.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sct_jax import attention_kernels, data, errors, model, rank, sharding
from sct_jax.training import config as config_lib
from sct_jax.training import evaluation, hardware, layerwise, memory, metrics
from sct_jax.training import state as state_lib
from sct_jax.training import step as step_lib

HostBatch = dict[str, np.ndarray]


class Trainer:
    """Initialises, trains and evaluates the model of one configuration on one mesh.

    Attributes:
      config: the run, as it was given; what it leaves to "auto" stays so.
      mesh: the devices.
      model: shape of the model that is compiled: nothing in it is "auto".
      choices: what stands for "auto" in `config`, and why, to be shown.
      tx: the chain that updates the parameters.
      abstract_state: shapes, dtypes and shardings of the state before the first step.
      rows: those of a batch that the devices of this process take, in order.
      linear: multiplies by every matrix.
      placement: where arrays are on the mesh.
    """

    def __init__(
        self,
        config: config_lib.ExperimentConfig,
        mesh: Mesh,
        *,
        tx: optax.GradientTransformation | None = None,
        linear: model.Linear | None = None,
        linear_at: Callable[[Int[Array, ""]], model.Linear] | None = None,
        init_params: Callable[[PRNGKeyArray], model.Params] | None = None,
        diagnose: Callable[[Any, Any], step_lib.Metrics] = step_lib.diagnose,
    ):
        """Allocates nothing and compiles nothing.

        Args:
          config: a valid configuration.
          mesh: the devices; its axes `data` and `fsdp` divide the rows of a batch.
          tx: replaces the chain of the configuration.
          linear: multiplies by every matrix of the layers and the head;
            `spectral.linear` if None.
          linear_at: from the number of steps so far to the `linear` of a training
            step, for a forward pass that changes during training.
          init_params: from a key to the parameters; `model.init` if None.
          diagnose: from old and new parameters to scalars, see `step`.

        Raises:
          UserError: where the mesh does not divide the batch or the parameters, or
            cannot run what the configuration names.
          ValueError: for `linear`, `linear_at` or `diagnose` with the layerwise step,
            which has its own.
        """
        if config.step == "layerwise" and (
            linear or linear_at or diagnose is not step_lib.diagnose
        ):
            raise ValueError(
                'step = "layerwise" takes no linear, linear_at or diagnose: use "fused"'
            )
        self.config = config
        self.mesh = mesh
        self.tx = config.build_optimizer() if tx is None else tx
        placement = sharding.Placement(mesh, config.mesh.tensor_layout)
        linear = linear or model.linear_on(placement)
        self.linear, self.placement = linear, placement
        _check_batch(config.data, mesh)
        self.rows = _rows_of_process(config.data.batch_size, mesh)
        sharding.check_heads(
            mesh,
            num_heads=config.model.num_heads,
            num_kv_heads=config.model.num_kv_heads,
        )
        config.check_blocks(mesh)
        name, reason = _select_attention(config, mesh)
        self.choices = {"attention": f"{name} ({reason})"}
        # Without documents the ids are all alike, and cuDNN does not take them.
        self._unread = {"segment_ids"} if name == "cudnn" else set()
        place: Any = lambda function: function
        if mesh.size > 1 and name in attention_kernels.KERNELS:
            place = functools.partial(attention_kernels.on_mesh, mesh=mesh)
        self._init = functools.partial(
            state_lib.init,
            model_config=config.model,
            tx=self.tx,
            init_params=init_params,
        )
        abstract = state_lib.abstract(config.model, self.tx, init_params=init_params)
        self.abstract_state = self._with_shardings(abstract)
        attended = dataclasses.replace(config.model, attention=name)
        self._resolved, self._reasons = memory.resolve(
            dataclasses.replace(config, model=attended),
            mesh,
            self.abstract_state,
            available=hardware.memory_bytes(mesh.devices.flat),
            tx=tx,
        )
        self._custom_tx = tx
        self.model = self._resolved.model
        self._rank_budget = rank.num_parameters(abstract.params)
        self._compiled: dict[Any, jax.stages.Compiled] = {}
        self._evaluations: dict[Any, jax.stages.Compiled] = {}
        self._resizes: dict[Any, Callable[..., state_lib.TrainState]] = {}
        self._jitted_step: Any = None
        if config.step == "fused":
            step = step_lib.make_train_step(
                self.model,
                self.tx,
                num_microbatches=config.data.num_microbatches,
                linear_at=linear_at or (lambda _: linear),
                placement=placement,
                diagnose=diagnose,
                guard=config.optimizer.guard,
            )
            self._jitted_step = jax.jit(
                place(step),
                donate_argnums=0,
                out_shardings=(self.shardings(abstract), None),
            )
        else:
            stack = layerwise.stack_of(self.model, placement)
            self._layerwise_step = layerwise.make_train_step(
                stack._replace(block=place(stack.block)),
                self.tx,
                placement=placement,
                guard=config.optimizer.guard,
            )
        self._eval_step = jax.jit(
            place(
                step_lib.make_eval_step(
                    self.model,
                    num_microbatches=config.data.num_microbatches,
                    linear=linear,
                    placement=placement,
                )
            )
        )

    def plan(self) -> memory.Plan:
        """Returns what the run needs of each device's memory, and what was chosen."""
        return memory.plan(
            self._resolved,
            self.mesh,
            self.abstract_state,
            tx=self._custom_tx,
            reasons=self._reasons,
        )

    # --- State.

    def init(self, key: PRNGKeyArray) -> state_lib.TrainState:
        """Returns the state before the first step, drawn where its shards live."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        return jax.jit(self._init, out_shardings=shardings)(key)

    def start(self, params: model.Params) -> state_lib.TrainState:
        """Returns the state of given parameters before the first step.

        On one device it takes their memory.

        Args:
          params: arrays on the devices of the mesh, divided in any way.
        """
        placed = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        if self.mesh.size > 1:  # only arrays that stay where they are can be donated
            params = jax.jit(lambda x: x, out_shardings=placed.params)(params)
        begin = jax.jit(
            lambda params: state_lib.start(params, self.tx),
            out_shardings=placed,
            donate_argnums=0,
        )
        return begin(params)

    def abstract_at(self, record: dict[str, Any]) -> state_lib.TrainState:
        """Returns the abstract state of a checkpoint, whose ranks may have changed.

        Args:
          record: the JSON record of the checkpoint.
        """
        if self.config.adaptive_rank.energy is None:
            return self.abstract_state
        abstract = self.abstract_state
        return rank.with_ranks(abstract, record["ranks"], params=abstract.params)

    def place(self, batch: HostBatch) -> step_lib.Batch:
        """Returns a batch on the devices, its rows sharded over `data` and `fsdp`.

        Args:
          batch: has the rows `rows`, which are all of them for a single process.
        """
        rows = NamedSharding(self.mesh, sharding.BATCH)
        batch = {name: x for name, x in batch.items() if name not in self._unread}
        if rows.is_fully_addressable:
            return jax.device_put(batch, rows)

        def one(x: np.ndarray) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                wanted = range(self.config.data.batch_size)[index[0]]
                return x[np.searchsorted(self.rows, wanted)]

            shape = (self.config.data.batch_size, *x.shape[1:])
            return jax.make_array_from_callback(shape, rows, part)

        return jax.tree.map(one, batch)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes, dtypes and shardings of a batch."""
        shape = (self.config.data.batch_size, self.config.data.seq_len)
        rows = NamedSharding(self.mesh, sharding.BATCH)
        return {
            name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
            for name in ("inputs", "targets", "segment_ids")
            if name not in self._unread
        }

    # --- Training.

    def compile(self, state: state_lib.TrainState) -> float:
        """Compiles the step for a state of these shapes and returns the seconds taken.

        Does nothing if already compiled, or if `step` is "layerwise", which compiles on
        first use.
        """
        key = _shapes(state.params)
        if self._jitted_step is None or key in self._compiled:
            return 0.0
        began = time.monotonic()
        lowered = self._jitted_step.lower(
            self._with_shardings(state), self.abstract_batch(), jnp.array(True)
        )
        self._compiled[key] = lowered.compile()
        return time.monotonic() - began

    def compiled_memory(self, state: state_lib.TrainState) -> dict[str, int] | None:
        """Returns the bytes per device of the step that `compile` made for a state.

        None if the backend does not tell, or `step` is "layerwise", which is no single
        program. The total is an upper bound: outputs reuse the memory of the donated
        state, whose bytes count once.

        Args:
          state: abstract or not, of shapes that were compiled.
        """
        if self._jitted_step is None:
            return None
        found = self._compiled[_shapes(state.params)].memory_analysis()
        if found is None:
            return None
        sizes = {
            "argument_bytes": found.argument_size_in_bytes,
            "output_bytes": found.output_size_in_bytes - found.alias_size_in_bytes,
            "temporary_bytes": found.temp_size_in_bytes,
        }
        return sizes | {"total_bytes": sum(sizes.values())}

    def compiled_text(self, state: state_lib.TrainState) -> str | None:
        """Returns the HLO of the step that `compile` made for a state.

        `collectives.read` takes it. None if `step` is "layerwise".

        Args:
          state: abstract or not, of shapes that were compiled.
        """
        if self._jitted_step is None:
            return None
        return self._compiled[_shapes(state.params)].as_text()

    def step(
        self,
        state: state_lib.TrainState,
        batch: HostBatch,
        *,
        diagnose: bool,
        reject: bool = False,
    ) -> tuple[state_lib.TrainState, step_lib.Metrics]:
        """Returns the state after one step, and its metrics; consumes `state`.

        Metrics are scalars on the device: `loss` in nats per token, `grad_norm`, those
        of the guard, and the results of `diagnose`, which are 0 unless asked for.

        Args:
          state: donated; do not use it afterwards.
          batch: (B, L) arrays on the host, with the rows `rows`.
          diagnose: whether to compute the costly metrics.
          reject: do not apply this step, which was torn before.

        Raises:
          layerwise.TornStep: the layerwise step found a gradient that is not finite
            when the state before the step was already gone.
        """
        placed = self.place(batch)
        if self._jitted_step is None:
            return self._layerwise_step(state, placed, diagnose, reject=reject)
        shapes = _shapes(state.params)
        if shapes not in self._compiled:
            self.compile(state)
        # Of numpy: every process has it, and no device must be asked.
        return self._compiled[shapes](state, placed, np.asarray(diagnose))

    def change_ranks(
        self, state: state_lib.TrainState, step: int
    ) -> tuple[state_lib.TrainState, rank.Change | None]:
        """Returns the state at the ranks that `adaptive_rank` now asks for.

        If no rank changes, returns the same state object and None.

        Args:
          state: the current state.
          step: number of steps, which seeds new columns.
        """
        change = rank.next_change(
            state.params,
            state.opt_state,
            self.config.adaptive_rank,
            budget=self._rank_budget,
        )
        if change is None:
            return state, None

        key = jax.random.fold_in(jax.random.key(self.config.seed), step)
        resize = self._resize_to(change.ranks, jax.eval_shape(lambda x: x, state))
        return resize(state, change.active, key), change

    def _resize_to(
        self, ranks: Mapping[str, int], state: state_lib.TrainState
    ) -> Callable[..., state_lib.TrainState]:
        """A function of a state like this one, which compiles once."""
        known = _shapes(state.params), tuple(sorted(ranks.items()))
        if known not in self._resizes:

            def resize(state, active, key):
                params, opt_state = rank.resize(
                    state.params, state.opt_state, active=active, ranks=ranks, key=key
                )
                return state.replace(params=params, opt_state=opt_state)

            after = rank.with_ranks(state, ranks, params=state.params)
            self._resizes[known] = jax.jit(resize, out_shardings=self.shardings(after))
        return self._resizes[known]

    # --- Evaluation.

    def held_out(self, corpus: data.Corpus) -> evaluation.HeldOut:
        """Returns the held-out text of the run, on the devices."""
        place = lambda batch: self.place({n: x[self.rows] for n, x in batch.items()})
        return evaluation.held_out(self.config, corpus, place)

    def evaluate(self, params: model.Params, text: evaluation.HeldOut) -> metrics.Row:
        """Returns the figures of `evaluation.summarise` for these parameters."""
        self.compile_evaluation(params)
        loss = self._evaluations[_shapes(params)]
        return evaluation.summarise([loss(params, x) for x in text.batches], text)

    def compile_evaluation(self, params: model.Params) -> None:
        """Compiles what `evaluate` needs for parameters of these shapes, once."""
        key = _shapes(params)
        if key not in self._evaluations:
            lowered = self._eval_step.lower(
                self._with_shardings(params), self.abstract_batch()
            )
            self._evaluations[key] = lowered.compile()

    def shardings(self, tree: Any) -> Any:
        """Returns where the arrays of a state, or of parameters, are on the mesh."""
        if self.mesh.size == 1:  # custom parameters need no sharding rule
            whole = NamedSharding(self.mesh, PartitionSpec())
            return jax.tree.map(lambda _: whole, tree)
        return sharding.shardings(tree, self.mesh, self.config.mesh.tensor_layout)

    def _with_shardings(self, tree: Any) -> Any:
        return sharding.abstract(tree, self.shardings(tree))


@jax.jit
def largest_magnitude(params: model.Params) -> Float[Array, ""]:
    """Returns the largest magnitude of all parameters; NaN if one is NaN."""
    return jnp.max(
        jnp.stack(
            [jnp.max(jnp.abs(p)).astype(jnp.float32) for p in jax.tree.leaves(params)]
        )
    )


def _shapes(params: model.Params) -> tuple[tuple[int, ...], ...]:
    return tuple(leaf.shape for leaf in jax.tree.leaves(params))


def _select_attention(
    config: config_lib.ExperimentConfig, mesh: Mesh
) -> tuple[str, str]:
    """The attention of a run on these devices, and why."""
    return hardware.select_attention(
        config.model,
        mesh.devices.flat[0],
        seq_len=config.data.seq_len,
        documents=not config.data.cross_document_attention,
        tensor=mesh.shape["tensor"],
    )


def _rows_of_process(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of a batch that devices of this process take, in order."""
    rows = NamedSharding(mesh, sharding.BATCH)
    taken = rows.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in taken]))


def _check_batch(config: data.DataConfig, mesh: Mesh) -> None:
    shards = sharding.row_shards(mesh)
    share = config.batch_size // config.num_microbatches
    errors.check(
        "data.batch_size",
        share % shards == 0,
        f"{config.batch_size} in {config.num_microbatches} micro-batches is not "
        f"divisible by mesh.data x mesh.fsdp = {shards}; set it to a multiple of "
        f"{config.num_microbatches * shards}",
    )
