"""Compiled programs are kept, and found again by another process."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from unimat_jax import compilation_cache
import jax, jax.numpy as jnp
print(compilation_cache.enable(sys.argv[1]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
counts = {}
jax.monitoring.register_event_listener(lambda name, **_: counts.update({name: counts.get(name, 0) + 1}))
jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((8, 8)))
print(counts.get("/jax/compilation_cache/cache_hits", 0))
"""


def run(setting, **environment):
    command = [sys.executable, "-c", PROGRAM, str(setting)]
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin", **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return done.stdout.split(), done.stderr


def test_the_second_process_compiles_nothing(tmp_path):
    (where, hits), _ = run(tmp_path / "cache")
    assert Path(where).parent == tmp_path / "cache" and hits == "0" and any(Path(where).iterdir())
    (_, hits), errors = run(tmp_path / "cache")
    assert int(hits) >= 1 and not errors


def test_auto_is_in_the_home_directory_and_off_where_that_cannot_be_written(tmp_path):
    assert run("auto", HOME=str(tmp_path))[0][0].startswith(str(tmp_path / ".cache" / "unimat_jax"))
    (tmp_path / "file").touch()
    assert run("auto", HOME=str(tmp_path / "file"))[0][0] == "None"


@pytest.mark.parametrize("setting", ["", "other"])
def test_the_users_own_cache_stays(tmp_path, setting):
    assert run("")[0][0] == "None"
    assert run(setting, JAX_COMPILATION_CACHE_DIR=str(tmp_path))[0][0] == str(tmp_path)


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    assert "config.train.compilation_cache" in run(tmp_path / "file" / "cache")[1]
