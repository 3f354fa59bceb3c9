"""Several processes that train one model: what they compute, and how they end.

Whole processes on one machine, each with two CPU devices; the agreement between them
also in threads, over a store in memory.
"""

import contextlib
import errno
import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest
import samples

from sct_jax import errors, files
from sct_jax.training import exit_codes, processes

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
ROOT = pathlib.Path(__file__).parents[1]
LIMIT = 120  # seconds for anything that should take a few
PEER_TIMEOUT = 4

CONFIG = """
from sct_jax import data, model
from sct_jax.training import config, optimizer_config

def get_config():
    return config.ExperimentConfig(
        num_steps={num_steps},
        log_every=1,
        model=model.ModelConfig(
            d_model=16, d_ff=32, num_layers=2, num_heads=2, num_kv_heads=2,
            vocab_size=304, rank=4, spectral=("q", "down"),
        ),
        data=data.DataConfig(
            source={source!r}, cache_dir={cache!r}, batch_size=8, seq_len=16,
        ),
        optimizer=optimizer_config.Sct(peak_learning_rate=1e-2, schedule="constant"),
        checkpoint=config.CheckpointConfig(every=4),
        eval=config.EvalConfig(every=4, num_batches=2),
    )
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    return {
        "source": samples.write_corpus(root / "corpus"),
        "cache": str(root / "cache"),
    }


@pytest.fixture(scope="module")
def write_config(text, tmp_path_factory):
    root = tmp_path_factory.mktemp("configs")

    def write(num_steps):
        path = root / f"steps_{num_steps}.py"
        path.write_text(CONFIG.format(num_steps=num_steps, **text))
        return path

    return write


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


class Group:
    """Processes that train one model; killed at the end of a `with` block."""

    def __init__(
        self,
        config,
        workdir,
        *flags,
        count=2,
        devices=2,
        own_flags=(),
        program=("-m", "experiments.pretrain"),
    ):
        self.workdir = workdir
        self.outputs = [workdir.parent / f"output.{i}.txt" for i in range(count)]
        options = os.environ["XLA_FLAGS"].split()
        options = [o for o in options if "device_count" not in o]
        options.append(f"--xla_force_host_platform_device_count={devices}")
        environment = {**os.environ, "XLA_FLAGS": " ".join(options)}
        command = [sys.executable, *program, f"--config={config}"]
        command += [f"--workdir={workdir}", *flags]
        if count > 1:
            command += [
                f"--coordinator=localhost:{free_port()}",
                f"--num-processes={count}",
                f"--peer-timeout={PEER_TIMEOUT}",
            ]
        own = [[] if count == 1 else [f"--process-id={i}"] for i in range(count)]
        own = [a + list(b) for a, b in zip(own, own_flags or [()] * count, strict=True)]
        self.processes = []
        for path, more in zip(self.outputs, own, strict=True):
            with path.open("w") as output:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *more],
                        cwd=ROOT,
                        env=environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()

    def output(self, index=0):
        return self.outputs[index].read_text()

    def codes(self, *, limit=LIMIT):
        """The exit codes of all processes."""
        deadline = time.monotonic() + limit
        try:
            return [p.wait(deadline - time.monotonic()) for p in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail("\n".join(path.read_text() for path in self.outputs))

    def code(self, index, *, limit):
        """The exit code of one process, and the seconds until then."""
        began = time.monotonic()
        return self.processes[index].wait(limit), time.monotonic() - began

    def reach(self, step):
        """Returns once a step is logged."""
        deadline = time.monotonic() + LIMIT
        while max(losses(self.workdir), default=0) < step:
            assert time.monotonic() < deadline, self.output()
            assert all(p.poll() is None for p in self.processes), self.output()
            time.sleep(0.1)


def losses(workdir):
    """Step -> loss, and 0.5 more for a held-out loss; a step is logged once."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    found = {}
    for row in map(json.loads, lines):
        for key, more in (("train/loss", 0), ("eval/loss", 0.5)):
            if key in row:
                assert row["step"] + more not in found
                found[row["step"] + more] = row[key]
    return found


def saved(workdir):
    """Steps with a checkpoint."""
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


# --- The same model, whatever the number of processes.


@pytest.fixture(scope="module")
def alone(write_config, tmp_path_factory):
    """Losses of twelve steps of a single process with a single device."""
    path = tmp_path_factory.mktemp("alone") / "run"
    with Group(write_config(12), path, count=1, devices=1) as group:
        assert group.codes() == [0], group.output()
    return losses(path)


def test_processes_come_and_go_and_train_the_same_model(write_config, alone, tmp_path):
    path = tmp_path / "run"
    for num_steps, count, devices, flags in (
        (4, 2, 2, ()),
        (8, 1, 4, ("--config.mesh.data=1", "--config.mesh.fsdp=4")),
        (12, 2, 2, ("--config.mesh.data=2", "--config.mesh.tensor=2")),
    ):
        config = write_config(num_steps)
        with Group(config, path, *flags, count=count, devices=devices) as group:
            assert group.codes() == [0] * count, group.output()
        assert f"finished: {num_steps} steps" in group.output()
        if count > 1:
            assert "step" not in group.output(1).replace("steps", "")
        assert num_steps in saved(path)
    found = losses(path)
    assert found.keys() == alone.keys()
    for step, loss in found.items():
        assert loss == pytest.approx(alone[step], rel=1e-5), step


@pytest.mark.slow
def test_processes_truncate_the_same_model(write_config, tmp_path):
    """From dense weights."""
    phases = ("--config.phases.switch_at=4", "--config.truncation.num_batches=2")
    found = {}
    for name, count, devices, flags in (
        ("one", 1, 1, ()),
        ("two", 2, 2, ("--config.mesh.data=2", "--config.mesh.fsdp=2")),
    ):
        path = tmp_path / name
        with Group(
            write_config(8), path, *phases, *flags, count=count, devices=devices
        ) as group:
            assert group.codes() == [0] * count, group.output()
        assert "step 4: truncated to rank 4" in group.output()
        found[name] = losses(path)
    assert found["two"] == pytest.approx(found["one"], rel=1e-4)


# --- How they end.


@pytest.fixture(scope="module")
def endless(write_config):
    return write_config(1_000_000)


@pytest.mark.parametrize("asked", [[1], slow([0]), slow([0, 1])], ids=str)
def test_a_signal_stops_all_after_the_same_step(endless, tmp_path, asked):
    path = tmp_path / "run"
    with Group(endless, path) as group:
        group.reach(3)
        for index in asked:
            group.processes[index].send_signal(signal.SIGTERM)
        assert group.codes() == [143, 143], group.output()
    last = saved(path)[-1]
    assert int(max(losses(path))) == last
    assert f"interrupted: saved at step {last}" in group.output()


@pytest.mark.parametrize(
    ("lost", "end"),
    [
        (1, signal.SIGKILL),
        (0, signal.SIGSTOP),
        slow(0, signal.SIGKILL),
        slow(1, signal.SIGSTOP),
    ],
)
def test_a_lost_process_ends_the_other(endless, tmp_path, lost, end):
    path = tmp_path / "run"
    with Group(endless, path) as group:
        group.reach(5)
        group.processes[lost].send_signal(end)
        code, seconds = group.code(1 - lost, limit=LIMIT)
    expected = {int(exit_codes.ExitCode.PEER_LOST)}
    if end == signal.SIGKILL and lost == 0:
        expected.add(-signal.SIGABRT)  # by JAX, unless ours is faster
    assert code in expected, group.output(1 - lost)
    assert seconds < PEER_TIMEOUT + 30  # on a busy machine
    if code == exit_codes.ExitCode.PEER_LOST:
        assert f"process {lost} has not answered" in group.output(1 - lost)
    assert all(step % 4 == 0 for step in saved(path))


def test_an_error_of_one_process_ends_the_other(endless, tmp_path):
    path = tmp_path / "run"
    with Group(endless, path) as group:
        group.reach(3)
        (path / "checkpoints").rename(path / "elsewhere")
        codes = group.codes()
    assert codes == [exit_codes.ExitCode.SAVE_FAILED] * 2, group.output(1)
    assert "was removed, renamed or replaced" in group.output()


LIBRARY_USER = """
import os, sys
import jax
from sct_jax.training import loop, overrides, trainer

flags, pairs = overrides.parse_command(sys.argv[1:], "")
address = flags.address
jax.distributed.initialize(
    address.coordinator, address.num_processes, address.process_id
)
if address.process_id == 1:
    trainer.Trainer.evaluate = lambda *_: {}["a bug"]
try:
    loop.train(*overrides.load_command(flags, pairs))
except KeyError:
    os._exit(9)
"""


def test_an_exception_of_a_library_user_ends_the_other_process(endless, tmp_path):
    """In a second, not when it is missed."""
    path = tmp_path / "run"
    with Group(endless, path, program=("-c", LIBRARY_USER)) as group:
        assert group.codes() == [exit_codes.ExitCode.INTERNAL_ERROR, 9]
    assert "process 1 has ended: an unexpected error" in group.output()


def test_processes_with_other_configurations_are_refused(endless, tmp_path):
    other = [("--config.seed=1",), ("--config.seed=2",)]
    with Group(endless, tmp_path / "run", own_flags=other) as group:
        assert group.codes() == [2, 2]
    for index in range(2):
        said = group.output(index)
        assert "seed: 1 in process 0, 2 in process 1" in said
        assert said.count("in process 0") == 1


# --- Addresses.


@pytest.mark.parametrize(
    ("address", "flag"),
    [
        (("localhost", 2, 0), "--coordinator"),
        (("localhost:", 2, 0), "--coordinator"),
        ((":123", 2, 0), "--coordinator"),
        (("localhost:70000", 2, 0), "--coordinator"),
        (("localhost:123", 0, 0), "--num-processes"),
        (("localhost:123", 2, 2), "--process-id"),
        (("localhost:123", 2, -1), "--process-id"),
    ],
    ids=str,
)
def test_an_address_that_makes_no_sense_is_refused(tmp_path, address, flag):
    with pytest.raises(errors.UserError, match=f"^{flag}: "):
        processes.start(processes.Address(*address), tmp_path)


def test_a_coordinator_that_does_not_answer_is_named(tmp_path, capsys):
    address = processes.Address(f"localhost:{free_port()}", 2, 1)
    with pytest.raises(errors.UserError, match=f"^--coordinator: .*{address[0]}"):
        processes.start(address, tmp_path, connect_timeout=0.1)
    assert address.coordinator in capsys.readouterr().err


def test_a_number_in_use_is_named(tmp_path):
    address = processes.Address(f"localhost:{free_port()}", 2, 1)
    (tmp_path / "run").mkdir()
    with (
        files.lock(tmp_path / "run" / ".lock-1", wait=False),
        pytest.raises(errors.UserError, match=r"^--process-id: .*number 1 already"),
    ):
        processes.start(address, tmp_path / "run", connect_timeout=0.1)


def test_a_port_in_use_is_named(tmp_path):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        reason = os.strerror(errno.EADDRINUSE)
        with pytest.raises(errors.UserError, match=f"port {port}: {reason}; choose"):
            processes.start(processes.Address(f"localhost:{port}", 2, 0), tmp_path)


# --- What they tell each other, in threads.


class Store:
    """The key-value store, in memory."""

    def __init__(self):
        self._values, self._changed = {}, threading.Condition()

    def key_value_set(self, key, text, allow_overwrite=False):
        with self._changed:
            assert allow_overwrite or key not in self._values
            self._values[key] = text
            self._changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self._changed:
            if not self._changed.wait_for(
                lambda: key in self._values, milliseconds / 1000
            ):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            return self._values[key]

    def key_value_dir_get(self, folder):
        with self._changed:
            return [(k, v) for k, v in self._values.items() if k.startswith(folder)]

    def key_value_delete(self, folder):
        with self._changed:
            for key in [k for k in self._values if k.startswith(f"{folder}/")]:
                del self._values[key]


class Peers(processes.Peers):
    """Says how it ends, and does not."""

    ended = None

    def _end(self, code, reason):
        self._leave(code, reason)
        self.ended = code, reason


@pytest.fixture
def connect(monkeypatch):
    monkeypatch.setattr(processes, "_PERIOD", 0.02)
    connected = []

    def make(count, *, timeout=30.0):
        store = Store()
        connected.extend(Peers(store, i, count, timeout) for i in range(count))
        return connected

    yield make
    for peer in connected:
        peer.close()


def together(peers, call):
    """The results of a call by all peers at once."""
    results = {}
    threads = [
        threading.Thread(target=lambda p=peer: results.update({p.index: call(p)}))
        for peer in peers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return [results[peer.index] for peer in peers]


def test_all_values_reach_all_in_order(connect):
    peers = connect(3)
    for number in range(4):
        found = together(peers, lambda p, n=number: p.exchange("x", [p.index, n]))
        assert found == [[[0, number], [1, number], [2, number]]] * 3


def test_topics_do_not_mix(connect):
    peers = connect(2)

    def call(peer):
        order = ["a", "b"] if peer.index else ["a", "a"]
        return [peer.exchange(topic, topic)[0] for topic in order[:1]]

    assert together(peers, call) == [["a"], ["a"]]


def test_all_stop_after_the_same_step_that_none_has_passed(connect):
    peers = connect(3)
    ahead = {0: 7, 1: 4, 2: 9}
    stops = {}

    def run(peer):
        step = ahead[peer.index]
        assert peer.agreed_stop(step, signal.SIGTERM if peer.index == 1 else None) is (
            None
        )
        while True:
            time.sleep(0.005)
            step += 1
            if number := peer.agreed_stop(step, None):
                stops[peer.index] = step, number
                return None

    together(peers, run)
    assert len(set(stops.values())) == 1
    (step, number), *_ = stops.values()
    assert step >= 10 and number == signal.SIGTERM


def test_an_end_reaches_the_others_with_its_code(connect):
    peers = connect(3)
    peers[1].leave(4, "the disk is full")
    wait_until(lambda: peers[0].ended and peers[2].ended)
    for peer in (peers[0], peers[2]):
        assert peer.ended == (4, "process 1 has ended: the disk is full")


def test_who_has_left_does_not_wait_for_the_others(connect, monkeypatch):
    peers = connect(2)
    peers[1].leave(1, "")
    monkeypatch.setattr(processes, "_peers", peers[1])
    processes.close()
    with pytest.raises(errors.UserError, match=r"^processes: .*start all of them"):
        processes.attach()


def test_a_connection_is_for_one_run_that_is_interrupted(connect, monkeypatch):
    peers = connect(2)
    monkeypatch.setattr(processes, "_peers", peers[0])
    processes.attach()  # a run that finished leaves it as it was
    peers[1].agreed_stop(3, signal.SIGTERM)
    wait_until(lambda: all(peer.has_stopped() for peer in peers))
    for peer in peers:
        monkeypatch.setattr(processes, "_peers", peer)
        with pytest.raises(errors.UserError, match=r"^processes: .*was interrupted"):
            processes.attach()


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_silence_is_noticed(connect, lost):
    peers = connect(3, timeout=0.5)
    peers[lost].close()  # beats no more
    if lost == 0:
        for peer in peers[1:]:
            peer._talk = None
            peer._client = None  # as nothing answers
    wait_until(lambda: all(p.ended for p in peers if p.index != lost))
    code = exit_codes.ExitCode.PEER_LOST
    for peer in peers:
        if peer.index != lost:
            assert peer.ended and peer.ended[0] == code
            assert f"process {lost}" in peer.ended[1]


def wait_until(holds):
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_single_process_needs_no_connection():
    assert (processes.index(), processes.count()) == (0, 1)
    assert processes.exchange("x", 5) == [5]
    assert processes.from_first("x", lambda: 7) == 7
    processes.check_same("x", {"a": 1})
    with processes.first_goes_ahead("x"):
        pass
    assert processes.agreed_stop(3, None) is None
    assert processes.agreed_stop(3, 15) == 15
    processes.leave(1, "")
    processes.await_loss()
    processes.close()
