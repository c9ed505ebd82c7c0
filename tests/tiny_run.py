"""The tiny data set and the tiny run that many tests share (fixtures `tiny_data`, `trained`, `generator`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from data_prep.prepare import prepare
from unimat_jax import default_config

PROPERTY = "formation_energy_per_atom"
ELEMENTS = ("Li", "Na", "K", "Rb", "Cs", "F", "Cl", "Br", "I", "Mg", "Ca", "Sr", "Ba", "O", "S", "Se", "Te")
NUM_STEPS, BATCH_SIZE, NUM_SAMPLES = 12, 8, 4
TINY_MODEL = {"base_channels": 4, "channel_multipliers": (1,), "num_res_blocks": 0, "attention_resolutions": (1,)}
TINY_MODEL |= {"head_dim": 4}


def prepare_data(data_dir: Path) -> Path:
    """36 crystals to train, 10 to validate: 5 x 4 places, L = 3, at most 5 atoms."""
    sizes: dict[str, Any] = {"max_atoms": 5, "max_atoms_per_element": 3, "elements": ELEMENTS}
    prepare(
        "starter", data_dir=data_dir, **sizes, niggli=False, split_fractions=(0.8, 0.2, 0), num_workers=0, quiet=True
    )
    return data_dir


def config(data_dir: Path | str, **changes: Any) -> Any:
    """The tiny run's config; `changes` by dotted name with "__" for the dot, as train__num_steps=3."""
    config = default_config.get_config()
    config.data.update(dataset="starter", data_dir=str(data_dir), table="data", properties=(PROPERTY,))
    config.model.update(TINY_MODEL)
    config.diffusion.update(prediction_type="v", null_weight=0.1)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=2, ema_decay=0.9)
    config.train.update(num_steps=NUM_STEPS, batch_size=BATCH_SIZE, log_every=1, checkpoint_every=6, eval_every=6)
    config.train.update(eval_examples=10, sample_every=NUM_STEPS, sample_examples=4)
    config.sample.update(num_steps=4, batch_size=NUM_SAMPLES)
    return changed(config, changes)


def slots_config(data_dir: Path | str, **changes: Any) -> Any:
    """The config of a tinier run of the slots model, without a model of compositions; `changes` as above."""
    config = default_config.get_config("slots")
    config.data.update(dataset="starter", data_dir=str(data_dir), table="data", random_shift=False)
    config.model.update(width=16, depth=1, heads=2, pair_width=8)
    config.composition.update(depth=1)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=2, ema_decay=0.9)
    config.train.update(num_steps=6, batch_size=8, log_every=1, checkpoint_every=3, eval_every=3, eval_examples=8)
    config.sample.update(num_steps=4, batch_size=4)
    return changed(config, changes)


def light_config(data_dir: Path | str, **changes: Any) -> Any:
    """As many steps as the tiny run, of slots, which start in half of its time: for what is the same for all models."""
    steps = {"train__num_steps": NUM_STEPS, "train__checkpoint_every": 6, "train__eval_every": 6}
    return slots_config(data_dir, **steps | changes)


def changed(config: Any, changes: dict[str, Any]) -> Any:
    for name, value in changes.items():
        section, field = name.split("__")
        config[section][field] = value
    return config.lock()


def config_file(path: Path, data_dir: Path, before: str = "", made_by: str = "config") -> Path:
    """Writes the config file of the same run, or of another function's here. `before`: statements that the program runs
    when it reads it."""
    here = str(Path(__file__).parent)
    path.write_text(
        f"import sys\n\nsys.path.insert(0, {here!r})\nimport tiny_run\n\n{before}\n\n"
        f"def get_config():\n    return tiny_run.{made_by}({str(data_dir)!r})\n"
    )
    return path


def environment(devices: int = 1, optimised: bool = False) -> dict[str, str]:
    """Of a program with so many CPU devices. `optimised`: compiled as users have it."""
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    if optimised:
        env.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
        env.pop("XLA_FLAGS", None)
    return env


def unimat(*arguments: Any, devices: int = 1, optimised: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs the installed console script to its end."""
    command = [str(Path(sys.executable).parent / "unimat"), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment(devices, optimised), check=False
    )
