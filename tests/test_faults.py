"""The fault suite: its flags, its rows, and that a fault that does harm is seen."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments.faults import __main__ as program
from experiments.faults import cases, runs, suite, workspace
from sct_jax.training import exit_codes

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """What the suite leaves behind, if anything, is left here."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield
    assert not list(tmp_path.glob("faults-*"))


def case(outcome, number=1, **changes):
    """A case with a given outcome, or that raises it."""

    def check(context):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome(context) if callable(outcome) else outcome

    return cases.Case(number, f"fault {number}", "no harm", check, **changes)


GOOD = case(cases.Outcome("nothing", "nothing", True))


def run(*flags, known):
    return program.main(flags, known=known)


# --- Outcomes.


def test_every_number_is_there_once():
    assert [case.number for case in suite.CASES] == list(range(1, 61))
    quick = [case for case in suite.CASES if case.quick]
    assert 20 <= len(quick) < 60
    assert 2 <= sum(not case.group for case in quick) <= 4
    for field in ("fault", "required"):
        texts = [getattr(case, field) for case in suite.CASES]
        assert all(texts)
        assert all(len(text) < 200 for text in texts)


def raises(error):
    def check(context):
        seen = cases.Seen()
        cases.injected(False, str(error))
        return seen.outcome("never")

    return check


@pytest.mark.parametrize(
    "bad",
    [
        cases.Outcome("it", "harm", False),
        KeyError("harm"),
        raises("harm"),
        lambda context: cases.Seen().outcome("harm"),
    ],
    ids=["a failure", "an error", "no fault", "no judgement"],
)
def test_a_fault_that_fails_is_exit_code_1(bad, capsys, tmp_path):
    file = tmp_path / "rows.json"
    assert run(f"--json={file}", "--seed=7", known=[GOOD, case(bad, 2)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("seed 7; faults 1, 2 of 2\n")
    assert "1 pass, 1 fail, 0 skipped; seed 7" in out
    rows = json.loads(file.read_text())
    assert [(row["number"], row["result"]) for row in rows] == [
        (1, "pass"),
        (2, "FAIL"),
    ]
    assert "harm" in rows[1]["seen"]
    assert {row["seed"] for row in rows} == {7}


def test_a_skip_is_no_pass(capsys):
    assert run(known=[GOOD, case(cases.skip("a disk"), 2)]) == 0
    out = capsys.readouterr().out
    assert "1 pass, 0 fail, 1 skipped" in out
    assert "not run: needs a disk" in out


def test_the_table_is_markdown(capsys):
    odd = cases.Outcome("`a | b`", "[red]\x1b[31m\nline two", True)
    assert run(known=[case(odd)]) == 0
    (row,) = [
        line for line in capsys.readouterr().out.splitlines() if "fault 1" in line
    ][1:]
    assert row.startswith("| 1 ") and r"`a \| b`" in row and "[red]" in row
    assert r"\x1b" in row and r"\nline two" in row


def test_facts_and_failures_are_told_apart():
    seen = cases.Seen()
    assert seen.equal("steps", 3, 3)
    assert seen.outcome("it") == cases.Outcome("it", "steps 3", True)
    assert not seen.equal("steps", 4, 3)
    assert seen.outcome("it") == cases.Outcome("it", "not so: steps 3 (it is 4)", False)


def ended(code=2, out="", err="error: model.rank: 0\n"):
    return runs.Ended(code, out, err, 1.0)


@pytest.mark.parametrize(
    "other",
    [
        {"code": 1},
        {"code": None},
        {"err": ""},
        {"err": "error: seed: 0\n"},
        {"err": "error: model.rank: 0\n" * 2},
        {"err": "error: model.rank: 0\nnoise of a library\n"},
        {"err": "Traceback (most recent call last)\nerror: model.rank: 0\n"},
    ],
    ids=str,
)
def test_a_refusal_is_one_line_with_its_words(other):
    assert cases.Seen().refused(ended(), "model.rank")
    assert cases.Seen().refused(ended(err="error: model.rank: 0\n  more\n"), "more")
    assert not cases.Seen().refused(ended(**other), "model.rank")


# --- Flags.


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--quik", ["'--quik'", "'--quick'"]),
        ("--ony=3", ["'--only'"]),
        ("--only=99", ["--only", "'99'", "1 to 1"]),
        ("--only=x", ["--only", "'x'"]),
        ("--only=", ["--only"]),
        ("--seed=x", ["--seed", "'x'"]),
        ("--json=nowhere/rows.json", ["--json", "'nowhere/rows.json'"]),
        ("--json=", ["--json"]),
        ("--config.seed=1", ["--config"]),
    ],
)
def test_bad_flags_are_named(flag, words, capsys):
    with pytest.raises(SystemExit) as caught:
        run(flag, known=[GOOD])
    assert caught.value.code == exit_codes.ExitCode.BAD_INPUT
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and not printed.out
    assert all(word in printed.err for word in words)


def test_only_and_quick_choose(capsys):
    known = [case(cases.Outcome("", "", True), n, quick=n == 2) for n in (1, 2, 3)]
    assert run("--only=3,1", known=known) == 0
    assert "faults 1, 3 of 3" in capsys.readouterr().out
    assert run("--quick", known=known) == 0
    assert "faults 2 of 3" in capsys.readouterr().out


def test_draws_follow_from_seed_and_number():
    drawn = []

    def draw(number):
        def check(context):
            drawn.append((number, context.rng.random()))
            return cases.Outcome("", "", True)

        return case(check, number)

    known = [draw(1), draw(2)]
    for seed in ("--seed=1", "--seed=1", "--seed=2"):
        run(seed, known=known)
    assert sorted(drawn[:2]) == sorted(drawn[2:4])
    assert len(set(drawn)) == 4


# --- Processes.


def started(tmp_path, *lines):
    return runs.Process(
        [sys.executable, "-c", "\n".join(lines)], folder=tmp_path, environment={}
    )


def test_a_process_is_watched_signalled_and_measured(tmp_path):
    mine = b"a" * 300_000_000  # a new process starts as a copy of this one
    lines = (
        "held = b'a' * 100_000_000",
        "print('a', flush=True)",
        "import time; time.sleep(99)",
    )
    with started(tmp_path, *lines) as p:
        assert p.until(lambda: p.out == "a\n", limit=60)
        assert p.signal(signal.SIGKILL)
        end = p.wait(limit=60)
        assert not p.signal(signal.SIGKILL)
    assert (end.code, end.out, end.err) == (-signal.SIGKILL, "a\n", "")
    assert 95 < end.megabytes < 130
    assert len(mine) == 300_000_000


def test_a_process_beyond_its_limit_is_killed_with_its_session(tmp_path):
    lines = (
        "import subprocess, sys, time",
        "code = 'import time; time.sleep(99)'",
        "child = subprocess.Popen([sys.executable, '-c', code])",
        "print(child.pid, flush=True)",
        "time.sleep(99)",
    )
    with started(tmp_path, *lines) as p:
        assert p.until(lambda: p.out.endswith("\n"), limit=60)
        child = int(p.out)
        assert p.wait(limit=0).code is None
    with contextlib.suppress(ProcessLookupError):
        for _ in range(1000):  # until init has reaped it
            os.kill(child, 0)
            if pathlib.Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
                break
            time.sleep(0.01)
        else:
            pytest.fail("a process of the session runs on")


def test_deadlines_nest():
    with pytest.raises(runs.TooLate), runs.Deadline(0.2):
        with runs.Deadline(60):
            pass
        time.sleep(60)


def test_a_group_that_dies_costs_its_own_cases_alone(tmp_path, monkeypatch):
    """Case 2 of the group ends its process; 1 and 3 have outcomes all the same."""
    members = [case(None, n, group="g") for n in (1, 2, 3)]
    code = (
        "import json, os, sys\n"
        "rows = [a for a in sys.argv if a.startswith('--rows=')][0][7:]\n"
        "for n in map(int, sys.argv[-1].split(',')):\n"
        "    if n == 2: os._exit(9)\n"
        "    row = dict(number=n, fault='', done='', required='', seen='',\n"
        "               result='pass', seconds=0)\n"
        "    open(rows, 'a').write(json.dumps(row) + '\\n')\n"
    )
    original = runs.Process

    def process(command, **options):
        return original([sys.executable, "-c", code, *command[3:]], **options)

    monkeypatch.setattr(suite.runs, "Process", process)
    (tmp_path / "suite").mkdir()
    space = workspace.Workspace(tmp_path / "suite", 0)
    rows = list(suite.run(members, space))
    assert [(row.number, row.result) for row in rows] == [
        (1, "pass"),
        (2, "FAIL"),
        (3, "pass"),
    ]
    assert "code 9" in rows[1].seen


def test_a_fault_is_injected_in_a_process_of_its_own(capsys):
    """Of the real suite: what takes seconds."""
    assert program.main(["--only=31,33"]) == 0
    assert "2 pass, 0 fail, 0 skipped; seed 0" in capsys.readouterr().out


def test_the_quick_suite_passes(tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "experiments.faults", "--quick", f"--json={file}"]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    rows = json.loads(file.read_text())
    assert ended.returncode == 0, [row for row in rows if row["result"] != "pass"]
    assert {row["number"] for row in rows} == {c.number for c in suite.CASES if c.quick}


# --- Its README.


def test_the_readme_has_the_exit_codes_and_the_promise():
    text = (ROOT / "experiments" / "faults" / "README.md").read_text()
    for code in exit_codes.ExitCode:
        assert f"| {code.value} | {code.meaning} |" in text
    promise = (
        "the same config, software, device kind and count give bitwise equal "
        "parameters, optimizer state and data order after any kill and resume; another "
        "topology gives the same data order and a loss equal to rounding"
    )
    assert promise in " ".join(text.split())
