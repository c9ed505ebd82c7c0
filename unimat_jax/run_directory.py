"""May a run go on in its directory? With the config and the data that it began with, but for what changes no result."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimat_jax.checkpoint import CONFIG, FOLDER, MODEL, check_format
from unimat_jax.default_config import get_config
from unimat_jax.errors import UserError

# A run may go on with other values of these; every other field of the config must stay what it was.
FREE_ON_RESUME = (
    "train.num_steps", "train.log_every", "train.checkpoint_every", "train.eval_every", "train.eval_examples",
    "train.sample_every", "train.sample_examples", "train.keep_checkpoints", "train.fsdp", "train.microbatches",
    "train.compilation_cache", "train.max_loss_ratio", "train.max_rollbacks", "train.log_batches",
    "model.remat", "model.scan_blocks", "model.attention_kernel",
    "data.data_dir", "data.num_threads", "data.prefetch", "data.prepare", "sample",
    "optimizer.learning_rate", "optimizer.schedule", "optimizer.final_factor",
)  # fmt: skip


@contextlib.contextmanager
def only_run(workdir: Path) -> Iterator[None]:
    """While this lasts, no other program trains in `workdir`, which exists: each would delete the other's checkpoints.
    The lock goes with its program, however that ends. There is none on Windows and some network drives.

    Raises UserError where another program has it."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    directory = os.open(workdir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--workdir={workdir}: another program trains there at this moment; wait for its end, stop it, or name "
                "another"
            ) from error
        except OSError:  # this file system has no locks
            pass
        yield
    finally:
        os.close(directory)


def check_same_run(workdir: Path, config: Any) -> None:
    if not (workdir / CONFIG).exists() or not (workdir / FOLDER).exists():
        return
    # What an older version's config lacks is what the default still does.
    stored = json.loads((workdir / CONFIG).read_text())
    before = _flat(plain(get_config(stored["model"]["name"]))) | _flat(stored)
    now = _flat(plain(config))
    changed = [
        name
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not name.startswith(FREE_ON_RESUME)
    ]
    if changed:
        shown = ", ".join(f"{name} ({before.get(name)} there, {now.get(name)} now)" for name in changed)
        raise UserError(
            f"{workdir} holds a run with another config: {shown}; name another --workdir, or the same values"
        )


def check_same_data(workdir: Path, description: Mapping[str, Any]) -> None:
    """A data set that was made again under the same name may mean another tensor."""
    if not (workdir / MODEL).exists() or not (workdir / FOLDER).exists():
        return
    before, now = json.loads((workdir / MODEL).read_text()), json.loads(json.dumps(description))
    check_format(before, workdir)
    changed = [name for name in ("spec", "condition_schema", "dataset") if before[name] != now[name]]
    if changed:
        raise UserError(
            f"{workdir} holds a run on other data of the name {now['dataset']['name']!r} (its {' and '.join(changed)} "
            "in model.json differ): give that data set's --config.data.data_dir, or another --workdir"
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result = {}
    for name, value in tree.items():
        result |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return result


def plain(config: Any) -> dict[str, Any]:
    """The config as JSON will give it back: tuples as lists."""
    return json.loads(json.dumps(config.to_dict()))


def last_metrics(workdir: Path) -> dict[str, float]:
    merged: dict[str, float] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        merged |= json.loads(line)
    return merged
