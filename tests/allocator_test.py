import importlib.util
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


@pytest.fixture
def restarts(monkeypatch):
    """Commands by which the process would have been started again; all that can forbid it is out of the way."""
    commands = []
    for name in [name for name in os.environ if name.startswith(CHOSEN_BY)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36")

    def execv(program, words):
        commands.append([program, *words])
        assert os.environ.pop("GLIBC_TUNABLES") == allocator.TUNABLES

    monkeypatch.setattr(os, "execv", execv)
    return commands


def restarted(restarts):
    before = len(restarts)
    restart_with_kept_memory()
    return len(restarts) > before


def test_it_starts_the_same_command(restarts):
    assert restarted(restarts)
    assert restarts == [[sys.executable, sys.executable, *sys.orig_argv[1:]]]


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_who_chose_an_allocator_keeps_it(restarts, monkeypatch, name):
    assert restarted(restarts)
    monkeypatch.setenv(name, "")
    assert not restarted(restarts)


@pytest.mark.parametrize("version", [None, "musl 1.2", "glibc 2.34"])
def test_another_c_library_is_left_alone(restarts, monkeypatch, version):
    assert restarted(restarts)
    monkeypatch.setattr(os, "confstr", lambda name: version)
    assert not restarted(restarts)


@pytest.mark.parametrize("platforms", ["cuda", "tpu,cpu"])
def test_an_accelerator_is_left_alone(restarts, monkeypatch, platforms):
    assert restarted(restarts)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert not restarted(restarts)


@pytest.mark.parametrize("plugin", ["jax_plugins", "libtpu"])
def test_a_plugin_is_an_accelerator(restarts, monkeypatch, plugin):
    installed = set()
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert restarted(restarts)
    installed.add(plugin)
    assert not restarted(restarts)
