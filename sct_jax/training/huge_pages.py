"""Large memory pages for programs that run on a CPU.

XLA's CPU client allocates the temporary memory of every call with malloc and frees it
afterwards, so each step pays for the same pages again. With pages of 4 KB that costs
more than the arithmetic of a small step. Transparent huge pages make it cheap, if
malloc asks for them. glibc reads that setting once, when a process starts.
"""

import os
import sys

_VARIABLE = "GLIBC_TUNABLES"
_SETTING = "glibc.malloc.hugetlb=1"


def restart_with_huge_pages() -> None:
    """Restarts this process with huge pages, unless it already has them.

    Call it before anything large is allocated: all work so far is repeated. Does
    nothing on systems other than Linux, or if GLIBC_TUNABLES is set.
    """
    if sys.platform != "linux" or _VARIABLE in os.environ:
        return
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, command, os.environ | {_VARIABLE: _SETTING})
