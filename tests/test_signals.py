"""Signals in processes of their own, which load no array library."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sct_jax.training import signals

# A call of a library that lasts, releases the interpreter's lock, and is not
# interrupted: as a compilation is.
LONG_CALL = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"


def child(*lines):
    """A process that runs the lines after importing `signals`."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", "\n".join(lines)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


def end(process, *numbers):
    """Sends signals; exit code, standard output, standard error."""
    try:
        for number in numbers:
            process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err


RUN = (
    "import signal, sys, time",
    "from sct_jax.training import exit_codes, process, signals",
    "signals.Signals._grace = .05",
)


@pytest.mark.parametrize("number", signals.HANDLED)
def test_a_program_with_nothing_to_save_ends_at_once(number):
    process = child(
        *RUN,
        "def main():",
        "  print('ready')",
        f"  {LONG_CALL}",
        "process.run(main)",
    )
    code, _, err = end(process, number)
    assert code == 128 + number
    assert "Traceback" not in err


@pytest.mark.parametrize("call", [2, 3])  # of the run's start, and of its end
@pytest.mark.parametrize("when", ["before", "after"])
def test_no_signal_is_lost_between_two_handlers(call, when):
    process = child(
        *RUN,
        "original, calls = signal.set_wakeup_fd, []",
        "def watched(*args, **options):",
        "  calls.append(1)",
        f"  hit = len(calls) == {call}",
        f"  if hit and {when == 'before'}: signal.raise_signal(signal.SIGTERM)",
        "  found = original(*args, **options)",
        f"  if hit and {when == 'after'}: signal.raise_signal(signal.SIGTERM)",
        "  return found",
        "signal.set_wakeup_fd = watched",
        "def main():",
        "  print('ready')",
        "  with signals.Signals():",
        "    time.sleep(.5)",
        "  time.sleep(60)",
        "process.run(main)",
    )
    code, _, err = end(process)
    assert code == 143
    assert "Traceback" not in err


def test_a_run_has_a_moment_to_clean_up():
    process = child(
        *RUN,
        "signals.Signals._grace = 30",
        "def main():",
        "  try:",
        "    with signals.Signals():",
        "      try:",
        "        print('ready')",
        "        time.sleep(60)",
        "      finally:",
        "        print('clean')",
        "  except signals.Interrupted as interrupted:",
        "    return exit_codes.of_signal(interrupted.number)",
        "process.run(main)",
    )
    code, out, _ = end(process, signal.SIGTERM)
    assert (code, out) == (143, "clean\n")


@pytest.mark.parametrize("number", signals.HANDLED)
def test_native_code_without_a_state_is_not_unwound(number):
    process = child(
        *RUN,
        "signals.Signals._grace = 30",
        "def main():",
        "  with signals.Signals() as interrupts:",
        "    interrupts.end_at_once()",
        "    try:",
        "      print('ready')",
        "      time.sleep(60)",
        "    finally:",
        "      print('unwound')",
        "process.run(main)",
    )
    code, out, err = end(process, number)
    assert (code, out) == (128 + number, "")
    assert "Traceback" not in err


@pytest.mark.parametrize("number", signals.HANDLED)
def test_a_run_without_a_state_ends_during_a_long_call(number):
    process = child(
        *RUN,
        "def main():",
        "  with signals.Signals():",
        "    print('ready')",
        f"    {LONG_CALL}",
        "signals.Signals._receive = lambda *_: None",  # the call never returns to it
        "process.run(main)",
    )
    assert end(process, number)[0] == 128 + number


def test_the_second_signal_ends_a_long_call():
    # Two numbers, as the kernel may join two signals of one number.
    process = child(
        *RUN,
        "signals._ECHO = 0",
        "with signals.Signals() as interrupts:",
        "  interrupts.defer()",
        "  print('ready')",
        f"  {LONG_CALL}",
    )
    assert end(process, signal.SIGTERM, signal.SIGINT)[0] in (130, 143)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_echo_of_a_signal_is_not_a_second_one(second):
    # `timeout` signals a process and its group, a terminal hangs up everyone.
    process = child(
        *RUN,
        "signals._ECHO = signals._HANGUP_ECHO = 60",
        "def main():",
        "  with signals.Signals() as interrupts:",
        "    interrupts.defer()",
        "    print('ready')",
        "    while interrupts.received is None: time.sleep(.01)",
        "    print('saved')",
        "    return exit_codes.of_signal(interrupts.received)",
        "process.run(main)",
    )
    process.send_signal(signal.SIGTERM)
    code, out, _ = end(process, second)
    assert code in (128 + signal.SIGTERM, 128 + second)
    assert out == "saved\n"


def test_what_was_ignored_stays_ignored():
    # As `nohup` starts a program, and a shell without job control a background one.
    process = child(
        *RUN,
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)",
        "signal.signal(signal.SIGINT, signal.SIG_IGN)",
        "def main():",
        "  with signals.Signals():",
        "    print('ready')",
        "    sys.stdin.read()",  # until the signals are sent
        "  return 7",
        "process.run(main)",
    )
    assert end(process, signal.SIGHUP, signal.SIGINT)[0] == 7


# --- In a process that others use too.


@pytest.fixture
def as_before():
    handlers = {number: signal.getsignal(number) for number in signals.HANDLED}
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    yield
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert signal.set_wakeup_fd(wakeup) == wakeup


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("number", signals.HANDLED)
def test_a_signal_before_a_state_raises_what_a_notebook_expects(number):
    with pytest.raises(KeyboardInterrupt) as caught, signals.Signals() as interrupts:
        signal.raise_signal(number)
    assert isinstance(caught.value, signals.Interrupted)
    assert interrupts.received == interrupts.raised == number


@pytest.mark.usefixtures("as_before")
def test_a_notebook_is_never_ended():
    with pytest.raises(signals.Interrupted), signals.Signals() as interrupts:
        interrupts.end_at_once()
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("as_before")
def test_a_deferred_signal_is_a_request():
    with signals.Signals() as interrupts:
        interrupts.defer()
        signal.raise_signal(signal.SIGHUP)
        assert interrupts.received == signal.SIGHUP
    assert interrupts.raised is None


@pytest.mark.usefixtures("as_before")
def test_a_signal_after_the_last_save_raises_again():
    with pytest.raises(signals.Interrupted), signals.Signals() as interrupts:
        interrupts.defer()
        interrupts.stop_deferring()
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.usefixtures("as_before")
def test_contexts_nest():
    with signals.Signals() as outer:
        with signals.Signals() as inner:
            inner.defer()
            signal.raise_signal(signal.SIGTERM)
        assert inner.received == signal.SIGTERM
        outer.defer()
        signal.raise_signal(signal.SIGINT)
    assert outer.received == signal.SIGINT


@pytest.mark.usefixtures("as_before")
def test_another_thread_handles_no_signals():
    def use():
        with signals.Signals() as interrupts:
            found.append(interrupts.received)

    found = []
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [None]


def test_nothing_is_left_open():
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with signals.Signals():
            pass
    while len(os.listdir("/proc/self/fd")) > len(before):
        time.sleep(0.01)  # the threads close their ends
