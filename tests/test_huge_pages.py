"""Programs restart with huge pages once, and only where that has an effect."""

import os
import subprocess
import sys

import pytest

from sct_jax.training import huge_pages

PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "import huge_pages; huge_pages.restart_with_huge_pages(); "
    "import os; print(os.environ['GLIBC_TUNABLES'], sys.argv[2:])"
)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
@pytest.mark.parametrize("given", [None, "glibc.malloc.check=0"])
def test_the_same_command_restarts_once(given):
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    if given:
        environment["GLIBC_TUNABLES"] = given
    # The module alone: its package would import JAX.
    folder = os.path.dirname(huge_pages.__file__)
    command = [sys.executable, "-c", PROGRAM, folder, "--flag=1", "two words"]
    child = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    wanted = given or "glibc.malloc.hugetlb=1"
    assert child.stdout.strip() == f"{wanted} ['--flag=1', 'two words']"


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started again"))
    huge_pages.restart_with_huge_pages()


PROGRAMS = [
    *("convert", "evaluate", "export", "generate", "pretrain", "step70b"),
    *(f"benchmarks.{name}" for name in ("decode", "optimizers", "train_step")),
    *("studies.compare", "studies.scaling_laws"),
]
RESTARTED = """
import os, runpy, sys
os.execve = lambda *_: sys.exit("jax" in sys.modules and "after JAX" or "at once")
runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
@pytest.mark.parametrize(
    "program",
    [
        *(f"experiments.{name}" for name in PROGRAMS),
        "sct_jax.interop.harness",
        "sct_jax.training",
    ],
)
def test_every_program_restarts_before_its_slow_imports(program):
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    ended = subprocess.run(
        [sys.executable, "-c", RESTARTED, program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.stderr.strip() == "at once"
