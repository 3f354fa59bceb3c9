"""Large memory pages for programs that run on a CPU.

XLA's CPU client takes the temporary memory of every call from malloc and gives it back
after the call, so each step pays for the same pages again. In pages of 4 KB that costs
more than what the step computes in them; transparent huge pages make it cheap, where
malloc asks for them. glibc reads that setting once, when a process starts.
"""

import os
import sys

_VARIABLE = "GLIBC_TUNABLES"
_SETTING = "glibc.malloc.hugetlb=1"


def restart_with_huge_pages() -> None:
    """Starts this very command again with huge pages; returns where it has them.

    For the first line of a program, before anything is loaded or allocated. Does
    nothing on other systems than Linux, or where the variable GLIBC_TUNABLES is set
    already, to whatever value.
    """
    if sys.platform != "linux" or _VARIABLE in os.environ:
        return
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, command, os.environ | {_VARIABLE: _SETTING})
