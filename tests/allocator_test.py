import json
import os
import subprocess
import sys

import pytest

from unimat_jax import allocator
from unimat_jax.allocator import CHOSEN_BY, restart_with_kept_memory

PROGRAM = """
import json, os, resource, sys
from unimat_jax.allocator import restart_with_kept_memory
restart_with_kept_memory()
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
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps({"faults": faults, "arguments": sys.argv[1:], "pid": os.getpid()}))
"""
glibc = pytest.mark.skipif(allocator._glibc_version() < (2, 35), reason="glibc 2.35 takes these settings")


def started(tmp_path, **environment):
    """What PROGRAM says, and the number of the process that was started."""
    (tmp_path / "program.py").write_text(PROGRAM)
    env = {k: v for k, v in os.environ.items() if not k.startswith(CHOSEN_BY)} | {"JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, str(tmp_path / "program.py"), "--a=b c", "d"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1]), process.pid


@glibc
def test_a_program_that_computes_again_gets_the_memory_it_had(tmp_path):
    kept, pid = started(tmp_path)
    assert kept["arguments"] == ["--a=b c", "d"] and kept["pid"] == pid  # the same process, to whoever started it
    returned, _ = started(tmp_path, MALLOC_ARENA_MAX="")  # who chose an allocator's ways keeps them
    assert returned["faults"] > 6 * 64 * 2**20 // os.sysconf("SC_PAGESIZE"), "XLA keeps them now: the module may go"
    assert kept["faults"] < returned["faults"] / 4  # seldom a last new place is taken


def no_restart(monkeypatch):
    """Any is an error, as under a user's own environment."""

    def restart(*_):
        raise AssertionError("started again")

    for name in [name for name in os.environ if name.startswith(CHOSEN_BY)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "execv", restart)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


@glibc
def test_it_starts_again_on_a_cpu(monkeypatch):
    no_restart(monkeypatch)
    with pytest.raises(AssertionError, match="started again"):
        restart_with_kept_memory()
    assert os.environ.pop("GLIBC_TUNABLES") == allocator.TUNABLES


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_who_chose_an_allocator_keeps_it(monkeypatch, name):
    no_restart(monkeypatch)
    monkeypatch.setenv(name, "")
    restart_with_kept_memory()


@pytest.mark.parametrize("version", [None, "musl 1.2", "glibc 2.34"])
def test_another_c_library_is_left_alone(monkeypatch, version):
    no_restart(monkeypatch)
    monkeypatch.setattr(os, "confstr", lambda name: version)
    restart_with_kept_memory()


@pytest.mark.parametrize("platforms", ["cuda", "tpu,cpu"])
def test_an_accelerator_is_left_alone(monkeypatch, platforms):
    no_restart(monkeypatch)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    restart_with_kept_memory()


def test_a_plugin_is_an_accelerator(monkeypatch, tmp_path):
    no_restart(monkeypatch)
    monkeypatch.delenv("JAX_PLATFORMS")
    (tmp_path / "jax_plugins" / "xla_cuda12").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    restart_with_kept_memory()
