"""Settings of the whole suite: four CPU devices, a compilation cache and no network."""

import os
import runpy
from pathlib import Path

# Before anything imports jax or matplotlib; the programs that tests start inherit them.
NO_NETWORK = Path(__file__).parent / "no_network"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(NO_NETWORK), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["MPLBACKEND"] = "Agg"
# Shared by this process and the programs that tests start: most of a tiny run's time is compilation.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Tiny programs run in no time whatever the compiler does, and compile in a third of it without its dearer passes, and
# some in a quarter of that with one kernel an operation. toolchain_test.py and end_to_end_test.py have all as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")  # a jaxlib without this flag ends at once
# Else each cached program complains at length that tuning hints (prefer-no-gather) are no features of this machine.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
runpy.run_path(str(NO_NETWORK / "sitecustomize.py"))

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

# Four, so that sharding is real. By config rather than XLA_FLAGS: programs that tests start see one, as users do.
jax.config.update("jax_num_cpu_devices", 4)

# Grain's worker processes read absl flags, which only absl.app parses.
flags.FLAGS.mark_as_parsed()

# No deadline: the first example may compile. The same examples every time in CI, new ones on a developer's machine.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A data_dir with 46 crystals of the embedded set (see tiny_run.py)."""
    import tiny_run

    return tiny_run.prepare_data(tmp_path_factory.mktemp("tiny_data"))


@pytest.fixture(scope="session")
def trained(tiny_data, tmp_path_factory) -> Path:
    """The workdir of a run of a few steps on `tiny_data`. Only to read."""
    import tiny_run

    from unimat_jax.train import train

    workdir = tmp_path_factory.mktemp("trained") / "run"
    train(tiny_run.config(tiny_data), workdir)
    return workdir


@pytest.fixture(scope="session")
def generator(trained):
    """The Generator of `trained`, with its compiled samplers."""
    from unimat_jax import Generator

    return Generator(trained)
