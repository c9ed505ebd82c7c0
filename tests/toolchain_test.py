"""What this package asks of its surroundings: a jax that computes right, no TensorFlow or torch, and no network."""

import importlib.metadata
import os
import pkgutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data_prep
import unimat_jax

ROOT = Path(__file__).parents[1]


def python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints; fails with its standard error."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def optimised():
    """As users have it: conftest.py switches most optimisations off."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.parametrize("size", [8_193, 32_769, 65_537, 300_001])
def test_jit_agrees_with_eager_on_a_vmapped_product_and_sum(size, optimised):
    """jax 0.10.2 on CPU fails this at 32,769 rows: 1,065,369,600 for 1,073,741,824 (jax-ml/jax#39103)."""

    def squared_lengths(rows):
        identity = jnp.eye(3, dtype=rows.dtype)
        return jax.vmap(lambda row: jnp.sum((identity @ row) ** 2))(rows)

    rows = np.zeros((size, 3), np.float32)
    rows[:, 0] = np.arange(size)
    expected = rows[:, 0] ** 2
    np.testing.assert_allclose(squared_lengths(jnp.asarray(rows)), expected, rtol=1e-6)
    for fused in (True, False):  # users have True, the other tests False
        jitted = jax.jit(squared_lengths, compiler_options={"xla_cpu_use_fusion_emitters": fused})
        np.testing.assert_allclose(jitted(rows), expected, rtol=1e-6)


def test_the_broken_jax_versions_are_excluded():
    requirements = importlib.metadata.requires("unimat-jax") or []
    jax_requirement = next(r for r in requirements if r.startswith("jax") and "extra" not in r)
    assert "!=0.10.2" in jax_requirement and "!=0.11.1" in jax_requirement
    assert jax.__version__ not in ("0.10.2", "0.11.1")


def all_modules() -> list[str]:
    packages = [(unimat_jax.__path__, "unimat_jax."), (data_prep.__path__, "data_prep.")]
    return [module.name for path, prefix in packages for module in pkgutil.walk_packages(path, prefix)]


def test_no_module_imports_or_tries_to_import_tensorflow_or_torch():
    """The finder sees attempts too, so this also fails where a guarded `import tensorflow` finds none installed."""
    code = """
        import importlib, sys
        tried = set()
        class Watch:
            def find_spec(self, name, path=None, target=None):
                tried.add(name.partition(".")[0])
        sys.meta_path.insert(0, Watch())
        for name in sys.argv[1:]:
            importlib.import_module(name)
        print(*sorted(tried & {"tensorflow", "torch", "clu", "keras", "numpy"}))
        """
    modules = all_modules()
    assert {"unimat_jax.representation", "unimat_jax.densify"} <= set(modules)
    assert python(code, *modules) == "numpy"  # numpy, to know that the finder sees what is imported


def test_four_devices_for_tests_and_one_for_programs():
    assert jax.device_count() == 4
    assert python("import jax; print(jax.device_count())") == "1"


def test_the_network_is_blocked_here_and_in_programs():
    with pytest.raises(OSError, match="without network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)  # an address that RFC 5737 gives to nobody
    assert "without network" in python(
        """
        import urllib.request
        try:
            urllib.request.urlopen("http://example.invalid", timeout=1)
        except OSError as error:
            print(error)
        """
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()


def test_python_and_package_version():
    assert sys.version_info >= (3, 11)
    assert importlib.metadata.version("unimat-jax") == unimat_jax.__version__
    assert f"version: {unimat_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_compilations_are_cached_across_processes():
    assert jax.config.jax_compilation_cache_dir == os.environ["JAX_COMPILATION_CACHE_DIR"]
