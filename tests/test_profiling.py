import dataclasses

import jax
import jax.numpy as jnp
import pytest

from sct_jax import errors
from sct_jax.training import profiling


@dataclasses.dataclass
class Recorder:
    """A profiler that only notes what is asked of it."""

    calls: list

    def start_trace(self, folder):
        self.calls.append(("start", folder))

    def stop_trace(self):
        self.calls.append(("stop",))


@pytest.fixture
def calls(monkeypatch):
    recorder = Recorder([])
    monkeypatch.setattr(jax.profiler, "start_trace", recorder.start_trace)
    monkeypatch.setattr(jax.profiler, "stop_trace", recorder.stop_trace)
    return recorder.calls


def take(profile, steps, calls):
    """Steps under a profile, which note themselves among its calls."""
    for step in steps:
        with profile.step(step, jnp.zeros(2)):
            calls.append(step)
        profile.after(step, jnp.zeros(2), {"loss": jnp.zeros(())})


def trace(steps, folder, said):
    return profiling.Profile(steps, folder, say=said.append)


@pytest.mark.parametrize("text", ["1:1", "7:9", "3:2000000000"])
def test_a_range_is_first_and_last_step(text):
    first, last = map(int, text.split(":"))
    assert profiling.parse_range(text) == (first, last)
    profiling.check_range((first, last), num_steps=7)


@pytest.mark.parametrize(
    "text", ["", "5", "5:", ":5", "a:b", "1:2:3", "-1:2", "1.5:2", "1:2 ", "9" * 5000]
)
def test_what_is_no_range_is_refused(text):
    with pytest.raises(errors.UserError, match=r"^--profile: .* is not START:STOP"):
        profiling.parse_range(text)


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ((0, 2), "count from 1; give START >= 1"),
        ((7, 3), "ends before it starts; give START <= STOP, such as 3:7"),
        ((11, 12), "after the last step; give START <= num_steps = 10"),
    ],
)
def test_a_range_that_no_run_takes_is_refused(steps, says):
    with pytest.raises(errors.UserError, match=f"^--profile: {steps[0]}:") as caught:
        profiling.check_range(steps, num_steps=10)
    assert says in str(caught.value)


def test_both_ends_of_the_range_are_traced(calls, tmp_path):
    said = []
    with trace((2, 3), tmp_path, said) as profile:
        profile.resume(0)
        take(profile, range(1, 6), calls)
    assert calls == [1, ("start", tmp_path), 2, 3, ("stop",), 4, 5]
    (line,) = said
    assert "steps 2 to 3" in line and str(tmp_path) in line


def test_no_range_traces_nothing(calls, tmp_path):
    said = []
    with trace(None, tmp_path, said) as profile:
        profile.resume(3)
        take(profile, range(4, 6), calls)
    assert calls == [4, 5] and said == []


def test_the_end_of_a_run_ends_the_trace(calls, tmp_path):
    said = []
    with trace((2, 9), tmp_path, said) as profile:
        take(profile, range(1, 4), calls)
    assert calls == [1, ("start", tmp_path), 2, 3, ("stop",)]
    assert "steps 2 to 3" in said[0]


def test_an_error_in_the_range_ends_the_trace_and_is_raised(calls, tmp_path):
    with pytest.raises(KeyboardInterrupt), trace((1, 9), tmp_path, []) as profile:
        take(profile, [1], calls)
        raise KeyboardInterrupt
    assert calls[-1] == ("stop",)


def test_values_that_failed_still_end_the_trace(calls, tmp_path, monkeypatch):
    def fail(tree):
        raise jax.errors.JaxRuntimeError("INTERNAL: x")

    profile = trace((1, 9), tmp_path, [])
    take(profile, [1], calls)
    monkeypatch.setattr(jax, "block_until_ready", fail)
    with pytest.raises(jax.errors.JaxRuntimeError), profile:
        pass
    assert calls[-1] == ("stop",)


def test_the_devices_are_waited_for_at_both_ends(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(
        jax, "block_until_ready", lambda tree: calls.append(("wait", tree))
    )
    profile = trace((2, 3), tmp_path, [])
    for step in range(1, 5):
        with profile.step(step, f"state {step - 1}"):
            calls.append(step)
        profile.after(step, f"state {step}", step)
    assert calls == [
        1,
        ("wait", "state 1"),
        ("start", tmp_path),
        2,
        3,
        ("wait", ("state 3", 3)),
        ("stop",),
        4,
    ]


@pytest.mark.parametrize(
    ("done", "note", "traced"),
    [
        (1, [], [2, 3]),
        (2, ["--profile=2:3 traces steps 3 to 3: step 2 is done already"], [3]),
        (3, ["--profile=2:3 traces nothing: step 3 is done already"], []),
        (4, ["--profile=2:3 traces nothing: step 4 is done already"], []),
    ],
)
def test_a_resumed_run_says_what_is_past(calls, tmp_path, done, note, traced):
    said = []
    with trace((2, 3), tmp_path, said) as profile:
        profile.resume(done)
        assert said == [f"note: {line}" for line in note]
        take(profile, range(done + 1, 7), calls)
    start, stop = ("start", tmp_path), ("stop",)
    rest = [step for step in range(done + 1, 7) if step > 3]
    before = [step for step in range(done + 1, 7) if step < 2]
    middle = [start, *traced, stop] if traced else []
    assert calls == before + middle + rest


@pytest.mark.parametrize("which", ["start_trace", "stop_trace"])
def test_a_trace_that_fails_costs_a_warning(calls, tmp_path, monkeypatch, which):
    def fail(*arguments):
        calls.append(which)
        raise RuntimeError("no space left")

    monkeypatch.setattr(jax.profiler, which, fail)
    said = []
    with trace((2, 3), tmp_path, said) as profile:
        take(profile, range(1, 5), calls)
    assert [step for step in calls if isinstance(step, int)] == [1, 2, 3, 4]
    assert calls.count(which) == 1 and ("stop",) not in calls
    (line,) = said
    assert line.startswith("warning: --profile: ") and "no space left" in line


def test_a_trace_of_jax_is_a_file(tmp_path):
    said = []
    with trace((1, 1), tmp_path / "profile", said) as profile:
        take(profile, [1, 2], [])
    assert list(tmp_path.rglob("*.xplane.pb"))
    jax.profiler.start_trace(tmp_path / "other")  # raises where one is in progress
    jax.profiler.stop_trace()
