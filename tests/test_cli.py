"""What becomes of every way a run can end."""

import errno
import pathlib
import signal

import jax
import pytest

from sct_jax import errors
from sct_jax.training import checkpoint, cli, exit_codes, loop, overrides
from sct_jax.training import workdir as workdir_lib

CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "smollm_r128.py"


def run(monkeypatch, tmp_path, end, *flags, step=0):
    """The exit code of a command whose run ends in a given way."""

    def train(*args, **options):
        if isinstance(end, Exception):
            raise end
        return end

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(workdir_lib, "steps_done", lambda path: step)
    arguments = [f"--config={CONFIG}:tiny", f"--workdir={tmp_path / 'run'}", *flags]
    return cli.main(arguments)


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (loop.Result("finished", 5), 0),
        (loop.Result("dry_run"), 0),
        (loop.Result("diverged", 5), 3),
        (loop.Result("interrupted", 5, signal.SIGHUP), 129),
        (loop.Result("interrupted", 5, signal.SIGINT), 130),
        (loop.Result("interrupted", 5, signal.SIGTERM), 143),
    ],
    ids=str,
)
def test_a_result_has_its_code(monkeypatch, tmp_path, end, code):
    assert run(monkeypatch, tmp_path, end) == code


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (checkpoint.SaveError("/x: 5 bytes needed"), 4, "/x: 5 bytes needed"),
        (OSError(errno.ENOSPC, "No space left", "/x/m.jsonl"), 4, "/x/m.jsonl"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 4, "/x"),
        (OSError(errno.EFBIG, "File too large", "/x/m.jsonl"), 4, "the limit"),
        (MemoryError(), 6, "data.batch_size"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 6, "data.num_microbatches"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory, 9 bytes."),
            6,
            "model.remat",
        ),
    ],
    ids=repr,
)
@pytest.mark.parametrize("step", [0, 30])
def test_what_the_machine_lacks_is_one_line(
    monkeypatch, tmp_path, capsys, error, code, says, step
):
    assert run(monkeypatch, tmp_path, error, step=step) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line and str(tmp_path) in line
    kept = "the checkpoint of step 30" if step else "nothing is saved"
    assert kept in line
    assert ("the same command resumes" in line) == bool(step)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("embedding"),
        AssertionError(),
        OSError(errno.EBADF, "Bad file descriptor"),
        jax.errors.JaxRuntimeError("INTERNAL: what\nis this"),
    ],
    ids=repr,
)
def test_a_bug_has_a_traceback_and_says_what_is_kept(
    monkeypatch, tmp_path, capsys, error
):
    assert run(monkeypatch, tmp_path, error, step=30) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("error: ") and type(error).__name__ in lines[-1]
    assert "bug in sct_jax" in lines[-1] and "the checkpoint of step 30" in lines[-1]


def test_bad_input_deep_in_a_run_is_one_line(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, tmp_path, errors.UserError("data.cache_dir: damaged"))
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: data.cache_dir: damaged\n"


def test_a_workdir_that_cannot_be_looked_at_hides_no_error(
    monkeypatch, tmp_path, capsys
):
    def fail(path):
        raise ValueError("damaged")

    code = run(monkeypatch, tmp_path, loop.Result("finished"))
    assert code == 0
    monkeypatch.setattr(loop, "train", lambda *_, **__: {}[5])
    monkeypatch.setattr(workdir_lib, "steps_done", fail)
    assert cli.main([f"--config={CONFIG}:tiny"]) == 1
    assert "KeyError: 5" in capsys.readouterr().err


def test_help_lists_the_codes(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    assert exit_codes.table() in capsys.readouterr().out


def test_the_codes_are_the_documented_ones():
    assert {code.name: code.value for code in exit_codes.ExitCode} == {
        "FINISHED": 0,
        "INTERNAL_ERROR": 1,
        "BAD_INPUT": 2,
        "DIVERGED": 3,
        "SAVE_FAILED": 4,
        "STALLED": 5,
        "OUT_OF_MEMORY": 6,
        "PEER_LOST": 7,
        "ABORTED": 134,
        "HANGUP": 129,
        "INTERRUPTED": 130,
        "TERMINATED": 143,
    }


# --- Flags of a run.


def passed(monkeypatch, tmp_path, *flags):
    """The options that `train` receives."""
    given = {}

    def train(experiment, workdir, **options):
        given.update(options, workdir=workdir)
        return loop.Result("finished")

    monkeypatch.setattr(loop, "train", train)
    cli.main([f"--config={CONFIG}:tiny", f"--workdir={tmp_path}", *flags])
    return given


def test_allowed_changes_and_the_timeout_reach_the_run(monkeypatch, tmp_path):
    given = passed(monkeypatch, tmp_path)
    assert given["allow_change"] == () and given["stall_timeout"] is None
    assert given["profile"] is None and given["compile_step"] is False
    given = passed(
        monkeypatch,
        tmp_path,
        "--allow-change=data.batch_size, seed",
        "--allow-change",
        "optimizer.dense_rate",  # an earlier name
        "--stall-timeout=90",
    )
    assert given["allow_change"] == (
        "data.batch_size",
        "seed",
        "optimizer.dense_lr_multiplier",
    )
    assert given["stall_timeout"] == 90


def test_a_profile_and_a_compilation_reach_the_run(monkeypatch, tmp_path):
    given = passed(monkeypatch, tmp_path, "--profile=5:650")
    assert given["profile"] == (5, 650) and not given["dry_run"]
    given = passed(monkeypatch, tmp_path, "--dry-run", "--compile")
    assert given["compile_step"] is given["dry_run"] is True


def test_a_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = passed(monkeypatch, tmp_path, "--workdir=~/run")
    assert given["workdir"] == tmp_path / "run"


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        ("--allow-change=data.batchsize", ["--allow_change", "'data.batch_size'"]),
        ("--allow-change=lr", ["'optimizer.peak_learning_rate'"]),
        ("--allow-change=xyzzy", ["'xyzzy'"]),
        ("--allow-change=data", ["'data'"]),
        ("--stall-timeout=0", ["--stall_timeout", "0"]),
        ("--stall-timeout=nan", ["--stall_timeout", "nan"]),
        ("--stall-timeout=soon", ["--stall_timeout", "soon"]),
        ("--profile=5", ["--profile: '5'", "START:STOP", "10:12"]),
        ("--profile=", ["--profile: ''", "START:STOP"]),
        ("--profile=a:b", ["--profile: 'a:b'", "START:STOP"]),
        ("--profile=7:3", ["--profile: 7:3", "before it starts", "3:7"]),
        ("--profile=0:2", ["--profile: 0:2", "START >= 1"]),
        ("--profile=651:660", ["--profile: 651:660", "START <= num_steps = 650"]),
        ("--profile=5:7 --dry_run", ["--profile: --dry_run", "leave one"]),
        ("--compile", ["--compile: ", "add --dry_run"]),
        ("--workdir=", ["--workdir"]),
        ("--workdir=~nobody-of-this-name/x", ["--workdir", "home"]),
    ],
)
def test_bad_flags_are_named(monkeypatch, tmp_path, capsys, flag, parts):
    with pytest.raises(SystemExit) as caught:
        passed(monkeypatch, tmp_path, *flag.split(" "))
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and all(part in said for part in parts)


def test_no_device_is_one_line(monkeypatch, tmp_path, capsys):
    def fail():
        raise AssertionError  # as JAX does without a backend

    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(SystemExit) as caught:
        passed(monkeypatch, tmp_path)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: JAX_PLATFORMS: no device of ")


def test_help_needs_no_device(monkeypatch, capsys):
    monkeypatch.setattr(jax, "devices", lambda: {}[5])
    with pytest.raises(SystemExit) as caught:
        overrides.parse_command(["--help"], "")
    assert caught.value.code == 0
