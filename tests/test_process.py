"""How programs start and end, in processes that load no array library."""

import io
import subprocess
import sys

import pytest

from sct_jax.training import streams

PRELUDE = "import sys, threading; from sct_jax.training import process; "
PRINT = "lambda: print('0123456789' * 20_000, flush=True)"


def shell(command, **environment):
    return subprocess.run(
        ["bash", "-c", command, sys.executable],
        capture_output=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", **environment},
    )


def program(main):
    return f'"$0" -c "{PRELUDE}process.run({main})"'


@pytest.mark.parametrize(
    "redirected",
    ["| head -c 5; exit ${PIPESTATUS[0]}", ">/dev/full", ">&-", "2>&1 >/dev/full"],
)
def test_output_that_cannot_be_written_changes_nothing(redirected):
    ended = shell(f"{program(PRINT)} {redirected}")
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize("redirected", [">/dev/full 2>/dev/full", ">&- 2>&-"])
@pytest.mark.parametrize("code", [0, 3])
def test_errors_that_cannot_be_written_change_nothing(redirected, code):
    main = f"lambda: print('x' * 9999, file=sys.stderr) or {code}"
    assert shell(f"{program(main)} {redirected}").returncode == code


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_cannot_be_encoded_is_escaped(encoding):
    main = r"lambda: print('a\u20ac\udcff')"
    ended = shell(program(main.replace("\\", "\\\\")), PYTHONIOENCODING=encoding)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout.startswith(b"a") and ended.stdout.endswith(b"\\udcff\n")
    assert (b"\\u20ac" in ended.stdout) == (encoding != "utf-8")


def test_threads_of_libraries_do_not_keep_a_failed_process():
    main = "lambda: threading.Thread(target=threading.Event().wait).start() or 3"
    assert shell(program(main)).returncode == 3


@pytest.mark.parametrize(
    ("main", "code"), [("lambda: sys.exit(2)", 2), ("lambda: sys.exit()", 0)]
)
def test_an_exit_keeps_its_code(main, code):
    ended = shell(program(main))
    assert (ended.returncode, ended.stderr) == (code, b"")


def test_an_error_is_a_bug_with_a_traceback():
    ended = shell(program("lambda: {}[5]"))
    assert ended.returncode == 1
    lines = ended.stderr.decode().splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("error: KeyError: 5. This is a bug")


def test_a_warning_for_the_user_is_one_line():
    ended = shell(program("lambda: __import__('warnings').warn('look out')"))
    assert ended.stderr == b"warning: look out\n"


def test_a_signal_that_nothing_answered_has_its_code():
    throw = "lambda: (_ for _ in ()).throw(process.signals.Interrupted(15))"
    ended = shell(program(throw))
    assert (ended.returncode, ended.stderr) == (143, b"")


def test_a_stream_is_wrapped_once():
    stream = io.StringIO()
    wrapped = streams.forgiving(stream)
    assert streams.forgiving(wrapped) is wrapped
    assert streams.forgiving(None) is None
    assert wrapped.write("abc") == 3
    assert wrapped.getvalue() == "abc"
    stream.close()
    assert wrapped.write("abc") == 3
    wrapped.flush()
