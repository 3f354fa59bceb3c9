"""Several processes that train one model: how they start, agree and end together.

`jax.distributed` connects them. What they tell each other beside the arrays goes
through its key-value store, in process 0. So no message needs the devices, and a thread
can wait for one while a step runs. A single process needs none of this: every function
here then answers at once.

If one process ends, every other one ends too:

- One that fails says so (`leave`). The others end with the same exit code in a second.
- One that is killed or stopped stops beating. After `timeout` seconds the others end
  with `ExitCode.PEER_LOST`.
- If process 0 is killed, the runtime of JAX aborts the others at once.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import pathlib
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from sct_jax import errors, files
from sct_jax.training import exit_codes

PEER_TIMEOUT = 60.0
"""Seconds without a sign of life after which a process counts as lost."""

CONNECT_TIMEOUT = 300.0
"""Seconds that processes wait for each other at the start."""

STALL_TIMEOUT = 1800.0
"""Seconds without a step after which several processes end, unless told otherwise."""

_PERIOD = 0.5  # seconds between two beats
_LINGER = 10.0  # seconds that process 0 serves the others once it has failed
_ROOT = "sct_jax"


class Address(NamedTuple):
    """Where process 0 listens, and which of how many processes this one is."""

    coordinator: str
    num_processes: int
    process_id: int


# --- What the rest of the program calls.

_peers: "Peers | None" = None
_held = contextlib.ExitStack()  # locks of this process


def index() -> int:
    """Returns the number of this process, from 0."""
    return _peers.index if _peers else 0


def count() -> int:
    """Returns the number of processes."""
    return _peers.count if _peers else 1


def is_first() -> bool:
    """Returns whether this process writes what the run has once, such as its log."""
    return index() == 0


def exchange(topic: str, value: Any = None) -> list[Any]:
    """Returns the values that all processes give, in order; waits for all of them.

    Args:
      topic: what it is about. Every process calls with the same topics in the same
        order; one topic may be used again and again, and by one thread only.
      value: JSON.
    """
    return _peers.exchange(topic, value) if _peers else [value]


def from_first(topic: str, make: Callable[[], Any]) -> Any:
    """Returns on every process what `make` returns on process 0.

    Args:
      topic: as in `exchange`.
      make: called on process 0 alone; returns JSON. Where it raises, the program ends,
        and with it the other processes.
    """
    if _peers is None:
        return make()
    return _peers.exchange(topic, make() if _peers.index == 0 else None)[0]


@contextlib.contextmanager
def first_goes_ahead(topic: str) -> Iterator[None]:
    """Lets process 0 run the body first, and then all others at once."""
    if is_first():
        yield
        exchange(topic)
    else:
        exchange(topic)
        yield


def check_same(name: str, values: Mapping[str, Any]) -> None:
    """Raises UserError on every process where one of them has other values.

    Args:
      name: of the error, such as a flag.
      values: what all must agree on: field -> JSON.
    """
    if _peers is None:
        return
    text = json.dumps(values, sort_keys=True)
    found = exchange("hash", hashlib.sha256(text.encode()).hexdigest())
    if len(set(found)) == 1:
        return
    wanted = from_first("values", lambda: dict(values))
    own = json.loads(text)
    differing = {
        key for key in own.keys() | wanted.keys() if own.get(key) != wanted.get(key)
    }
    lines = [
        f"  {k}: {wanted.get(k)!r} in process 0, {own.get(k)!r} in process {index()}"
        for k in sorted(differing)
    ]
    every = exchange("differences", lines)
    listed = "\n".join(line for lines in every for line in lines)
    raise errors.UserError(
        f"{name}: the processes do not agree; start all of them with the same command:"
        f"\n{listed}"
    )


def agreed_stop(step: int, signal: int | None) -> int | None:
    """Returns the signal at which the run ends after this step; None to go on.

    All processes end after the same step, the first one that none has begun yet when
    they learn of the signal. This is what the preemption sync point of JAX does for
    SIGTERM; here every signal counts, and a second one still ends a process at once.

    Args:
      step: that this process has completed. To be called after each one.
      signal: that this process has received.
    """
    return _peers.agreed_stop(step, signal) if _peers else signal


def start(
    address: Address | None,
    folder: pathlib.Path,
    *,
    connect_timeout: float = CONNECT_TIMEOUT,
    peer_timeout: float = PEER_TIMEOUT,
) -> None:
    """Connects the processes of a run. To be called before JAX looks for devices.

    Args:
      address: None asks the environment: SLURM, Cloud TPU, GKE, Open MPI.
      folder: of the run, which all processes share.
      connect_timeout: seconds that the processes wait for each other.
      peer_timeout: seconds without a sign of life after which a process is lost.

    Raises:
      UserError: for an address that makes no sense or cannot be reached, and where the
        environment has none.
    """
    # Ours: the runtime would answer SIGTERM alone, and replace our handler.
    jax.config.update("jax_enable_preemption_service", False)
    settings: dict[str, Any] = {}
    if address is not None:
        _check_address(address)
        _claim(address, folder)
        _reach(address, timeout=connect_timeout)
        settings = {**address._asdict(), "cluster_detection_method": "deactivate"}
        settings["coordinator_address"] = settings.pop("coordinator")
    try:
        jax.distributed.initialize(
            **settings,
            initialization_timeout=math.ceil(connect_timeout),
            # Later than ours, so that ours decides.
            heartbeat_timeout_seconds=math.ceil(max(100, 3 * peer_timeout)),
        )
    except (RuntimeError, ValueError, TypeError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())
        name, remedy = "--coordinator", "see that all processes can reach that address"
        if address is None:
            name = "--distributed"
            remedy = (
                "run under SLURM, Open MPI, GKE or on a Cloud TPU, or name the "
                "processes with --coordinator, --num-processes and --process-id"
            )
        raise errors.UserError(
            f"{name}: the processes cannot be connected ({reason}); {remedy}"
        ) from error
    attach(peer_timeout=peer_timeout)


def attach(*, peer_timeout: float = PEER_TIMEOUT) -> None:
    """Takes over the connection that `jax.distributed.initialize` has made, if any.

    Raises:
      UserError: if this process took it over before, and an earlier run has ended the
        connection or was interrupted.
    """
    global _peers
    if _peers is not None:
        errors.check(
            "processes",
            not _peers.has_left(),
            "an earlier run ended all other processes; start all of them again",
        )
        errors.check(
            "processes",
            not _peers.has_stopped(),
            "an earlier run was interrupted, in all processes; start all of them again",
        )
        return
    from jax._src import distributed  # orbax too has no other way to the store

    state = distributed.global_state
    if state.client is None or state.num_processes == 1:
        return
    _peers = Peers(state.client, state.process_id, state.num_processes, peer_timeout)


def connect_devices(mesh: Mesh) -> None:
    """Connects the devices of all processes, in every group that a mesh has.

    To be called by all at once. On CPU, the first collective of a group waits for 30
    seconds and no longer. Later ones wait until all processes come to them, such as one
    that compiles slowly between two of them.
    """
    if _peers is not None and mesh.devices.flat[0].platform == "cpu":
        jax.block_until_ready(gather_in_groups(mesh)(1.0))


def gather_in_groups(mesh: Mesh) -> Callable[[float], Any]:
    """Returns a function with a collective along all axes of a mesh, in every order.

    XLA (jaxlib 0.10.2) connects a group anew for another order of its devices.
    """
    axes = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    sizes = range(1, len(axes) + 1)
    orders = [order for n in sizes for order in itertools.permutations(axes, n)]
    gather = lambda x: sum(jnp.sum(jax.lax.all_gather(x, order)) for order in orders)
    whole = PartitionSpec()
    return jax.jit(
        jax.shard_map(
            gather, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False
        )
    )


def close() -> None:
    """Ends the connection once every process has come here.

    At once if there is none, or if this process has left the others.
    """
    global _peers
    if _peers is None or _peers.has_left():
        return
    _peers.exchange("close", None)
    _peers.close()
    _peers = None
    jax.distributed.shutdown()
    _held.close()


def leave(code: int, reason: str) -> None:
    """Tells the others that this process ends with a code, if there are any.

    Process 0 returns once they have ended, too, or after a few seconds.
    """
    if _peers is not None:
        _peers.leave(code, reason)


def await_loss() -> None:
    """Waits for as long as it takes to notice that another process is lost.

    Where one is, this process ends. For an error that may come from a broken
    connection.
    """
    if _peers is not None:
        time.sleep(_peers.timeout + 4 * _PERIOD)


# --- The connection.


class Peers:
    """The other processes, by way of the key-value store of process 0.

    One thread beats, and reads what the others say. A second one ends the process if
    the first hears nothing any more. Process 0 watches all others; these watch
    process 0.
    """

    def __init__(self, client: Any, index: int, count: int, timeout: float):
        """Starts the threads.

        Args:
          client: of the runtime of JAX.
          index: of this process.
          count: of processes.
          timeout: see `PEER_TIMEOUT`.
        """
        self.index, self.count, self.timeout = index, count, timeout
        self._client = client
        self._calls: Counter[str] = Counter()
        self._closed = threading.Event()
        self._lost: set[int] = set()
        self._contact = time.monotonic()
        self._agreeing = False
        self._lock = threading.Lock()  # of the three below
        self._step = 0
        self._signal: int | None = None
        self._stop: tuple[int, int] | None = None  # step and signal
        for target in (self._talk, self._listen):
            threading.Thread(target=target, daemon=True).start()

    def exchange(self, topic: str, value: Any) -> list[Any]:
        """Returns the values of all processes, see the function of this name."""
        number = self._calls[topic]
        self._calls[topic] += 1
        key = f"{topic}/{number}"
        self._set(f"{key}/of/{self.index}", json.dumps(value))
        if self.index == 0:
            values = [self._get(f"{key}/of/{i}") for i in range(self.count)]
            self._set(f"{key}/all", f"[{','.join(values)}]")
            if number > 1:  # which every process has read
                self._client.key_value_delete(f"{_ROOT}/{topic}/{number - 2}")
        return json.loads(self._get(f"{key}/all"))

    def agreed_stop(self, step: int, signal: int | None) -> int | None:
        """Returns the signal to stop for, see the function of this name."""
        with self._lock:
            self._step = step
            self._signal = self._signal or signal
            if self._stop is None or step < self._stop[0]:
                return None
            return self._stop[1]

    def leave(self, code: int, reason: str) -> None:
        """Says that this process ends; process 0 waits for the others to end too."""
        self._leave(code, f"process {self.index} has ended: {reason}")

    def _leave(self, code: int, reason: str) -> None:
        self._closed.set()
        # In a thread, as nothing returns if process 0 is stopped.
        teller = threading.Thread(
            target=self._say_end, args=(code, reason), daemon=True
        )
        teller.start()
        teller.join(_LINGER if self.index == 0 else 4 * _PERIOD)

    def has_left(self) -> bool:
        """Returns whether this process has told the others that it ends."""
        return self._closed.is_set()

    def has_stopped(self) -> bool:
        """Returns whether the processes agreed, or are about to agree, on a stop."""
        return self._agreeing or self._signal is not None

    def close(self) -> None:
        """Ends the threads."""
        self._closed.set()

    # --- Threads.

    def _talk(self) -> None:
        beats, begun = 0, time.monotonic()
        seen = {str(i): ("", begun) for i in range(self.count)}
        while not self._closed.wait(_PERIOD):
            beats += 1
            try:
                self._set(f"beat/{self.index}", str(beats), again=True)
                ended = self._list("end")
                heard = self._list("beat") if self.index == 0 else {}
                self._heed_signals()
            except Exception:  # the other thread ends the process if this lasts
                continue
            now = self._contact = time.monotonic()
            for i, text in ended.items():
                if int(i) != self.index:
                    self._end(*json.loads(text))
            for i, beat in heard.items():
                if seen[i][0] != beat:
                    seen[i] = beat, now
            watched = range(1, self.count) if self.index == 0 else ()
            for i in watched:
                if now - seen[str(i)][1] > self.timeout:
                    self._lost.add(i)
                    reason = f"process {i} has not answered for {self.timeout:g} s"
                    self._end(exit_codes.ExitCode.PEER_LOST, reason)

    def _listen(self) -> None:
        while not self._closed.wait(_PERIOD):
            if time.monotonic() - self._contact > self.timeout:
                reason = f"process 0 has not answered for {self.timeout:g} s"
                self._end(exit_codes.ExitCode.PEER_LOST, reason)

    def _end(self, code: int, reason: str) -> NoReturn:
        hint = "; the same commands resume from the newest checkpoint"
        hint = "" if code == exit_codes.ExitCode.BAD_INPUT else hint
        text = f"error: process {self.index} ends, as {reason}{hint}\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
        self._leave(code, reason)
        os._exit(code)

    def _heed_signals(self) -> None:
        """Passes on a signal, and begins to agree on a step if there was one."""
        if self._agreeing:
            return
        with self._lock:
            signal = self._signal
        if signal is not None:
            self._set("stop/signal", str(signal), again=True)
        if "signal" in self._list("stop"):
            self._agreeing = True
            threading.Thread(target=self._agree, daemon=True).start()

    def _agree(self) -> None:
        # While this holds the lock, no process begins a further step. What a process
        # waits for is the answer of a thread like this one, never a step.
        with self._lock, contextlib.suppress(Exception):
            self._set(f"stop/at/{self.index}", str(self._step))
            if self.index == 0:
                at = [int(self._get(f"stop/at/{i}")) for i in range(self.count)]
                signal = int(self._get("stop/signal"))
                self._set("stop/agreed", json.dumps([max(at) + 1, signal]))
            step, signal = json.loads(self._get("stop/agreed"))
            self._stop = step, signal

    # --- The store.

    def _say_end(self, code: int, reason: str) -> None:
        with contextlib.suppress(Exception):
            text = json.dumps([int(code), reason])
            self._set(f"end/{self.index}", text, again=True)
            while self.index == 0 and len(self._list("end")) < self.count - len(
                self._lost
            ):
                time.sleep(0.1)

    def _set(self, key: str, text: str, *, again: bool = False) -> None:
        self._client.key_value_set(f"{_ROOT}/{key}", text, allow_overwrite=again)

    def _get(self, key: str) -> str:
        """A value, once it is there; in short turns, so that signals are answered."""
        while True:
            try:
                return self._client.blocking_key_value_get(f"{_ROOT}/{key}", 1000)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def _list(self, key: str) -> dict[str, str]:
        """The values below a key, by the last part of theirs."""
        found = self._client.key_value_dir_get(f"{_ROOT}/{key}/")
        return {name.rpartition("/")[2]: text for name, text in found}


# --- Addresses.


def _check_address(address: Address) -> None:
    host, colon, port = address.coordinator.rpartition(":")
    errors.check(
        "--coordinator",
        bool(host and colon) and port.isdigit() and 0 < int(port) < 1 << 16,
        f"{address.coordinator!r} is no HOST:PORT, such as node1:12345",
    )
    errors.check(
        "--num-processes",
        address.num_processes >= 1,
        f"{address.num_processes} must be at least 1",
    )
    errors.check(
        "--process-id",
        0 <= address.process_id < address.num_processes,
        f"{address.process_id} must be in 0..{address.num_processes - 1}, as "
        f"--num-processes is {address.num_processes}",
    )


def _claim(address: Address, folder: pathlib.Path) -> None:
    """Takes the number of this process until it ends.

    The runtime of JAX would abort one of two processes with the same number.
    """
    path = folder / f".lock-{address.process_id}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state = _held.enter_context(files.lock(path, wait=False))
    except OSError:  # reported where more is written there
        return
    errors.check(
        "--process-id",
        state != "busy",
        f"another process of this run is number {address.process_id} already; give "
        f"each one its own, from 0 to {address.num_processes - 1}",
    )


def _reach(address: Address, *, timeout: float) -> None:
    """Returns once process 0 listens; the runtime would abort where it does not.

    Raises:
      UserError: it does not for `timeout` seconds, or its port is taken here.
    """
    host, _, port = address.coordinator.rpartition(":")
    host = host.strip("[]")
    if address.process_id == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:  # its own text repeats the address
            reason = os.strerror(error.errno) if error.errno else error
            raise errors.UserError(
                f"--coordinator: process 0 cannot listen on port {port}: {reason}; "
                "choose another port, in all processes"
            ) from error
        print(
            f"waiting for {address.num_processes} processes at {address.coordinator}",
            file=sys.stderr,
        )
        return
    deadline, told = time.monotonic() + timeout, False
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            errors.check(
                "--coordinator",
                time.monotonic() < deadline,
                f"process 0 does not answer at {address.coordinator} "
                f"({error.strerror or error}); start it, or correct the address",
            )
        if not told:
            print(f"waiting for process 0 at {address.coordinator}", file=sys.stderr)
            told = True
        time.sleep(1)
