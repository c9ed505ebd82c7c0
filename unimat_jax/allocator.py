"""The C library's memory in programs that compute on a CPU."""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_LARGEST = 2**31 - 1
CHOSEN_BY = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""How variables of the environment begin by which a user chooses an allocator or its ways."""


def keep_freed_memory() -> bool:
    """Asks glibc to keep what a program frees for what it allocates next; whether it was asked.

    XLA allocates the buffer of a program's temporaries anew for each run of it. One above 32 MiB comes from the kernel
    every time and goes back, so that each of its pages is faulted in and cleared again: a sixth of the time of a train
    step of the slots models (benchmarks/README.md). Only one arena can hold such buffers, hence one for all threads.
    Does nothing where the environment says how to allocate, or where there is no glibc.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(CHOSEN_BY) for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(_M_ARENA_MAX, 1), mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, _LARGEST)])
