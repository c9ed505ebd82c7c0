"""The C library's memory in programs that train on a CPU."""

from __future__ import annotations

import importlib.util
import os
import sys

TUNABLES = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"hugetlb": 1, "arena_max": 1, "mmap_max": 0, "trim_threshold": 2**34}.items()
)
CHOSEN_BY = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""How variables of the environment begin by which a user chooses an allocator or its ways."""


def restart_with_kept_memory() -> None:
    """Starts this process's command again, in its place, so that glibc keeps what it frees, in huge pages, for what is
    allocated next. Returns in the program that was started so, and where there is nothing to win: where the environment
    says how to allocate, the C library is another or older than 2.35, or JAX has an accelerator's plugin.

    XLA allocates the buffer of a program's temporaries anew for each run of it, and the kernel clears it page by page:
    up to a quarter of a training step's time (benchmarks/README.md, `malloc.py`). glibc is told as a process starts, or
    not at all. For a process's main program alone, before it does anything.
    """
    chosen = any(name.startswith(CHOSEN_BY) for name in os.environ)
    if chosen or _glibc_version() < (2, 35) or not _computes_on_cpu() or not sys.executable:
        return
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _glibc_version() -> tuple[int, ...]:
    """(2, 36), or () for another C library."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (AttributeError, ValueError, OSError):  # Windows has no confstr, other libraries not this name
        return ()
    return tuple(int(part) for part in version.split(".") if part.isdigit()) if name == "glibc" else ()


def _computes_on_cpu() -> bool:
    """As JAX will find, told without it: it takes a second to import."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not any(importlib.util.find_spec(plugin) for plugin in ("jax_plugins", "libtpu"))
