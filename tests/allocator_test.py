import os
import platform
import subprocess
import sys

import pytest

from unimat_jax.allocator import CHOSEN_BY, keep_freed_memory

PROGRAM = """
import resource, sys
from unimat_jax.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
import jax, jax.numpy as jnp

@jax.jit
def run(x):  # 64 MiB of temporaries
    return jax.lax.fori_loop(0, 2, lambda i, y: 0.5 * y, x[:, None] * x[None, :]).sum(0)

x = jnp.ones(4096)
for i in range(12):
    run(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for i in range(6):
    run(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")


def page_faults(how: str) -> int:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(CHOSEN_BY)} | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout.split()[-1])


@glibc
def test_a_program_that_runs_again_gets_the_memory_it_had():
    returned, kept = page_faults("returned"), page_faults("kept")
    assert returned > 6 * 64 * 2**20 // os.sysconf("SC_PAGESIZE"), "XLA keeps its temporaries now: the module may go"
    assert kept < returned / 4  # seldom a last new place is taken


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_who_chose_an_allocator_keeps_it(monkeypatch, name):
    monkeypatch.setenv(name, "")
    assert not keep_freed_memory()


def test_without_glibc_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
