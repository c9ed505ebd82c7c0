"""Checkpoints: orbax for the arrays, JSON for everything that gives them meaning. Nothing is ever pickled.

A run's directory holds `config.json` (the full config), `model.json` (network, spec, condition schema, data set) and
`checkpoints/<step>/` with the items `params`, `ema_params`, `optimizer` and `dataset` (the iterator's state). A model
that `unimat export` wrote (see `weights.py`) is read in a run's place, and so is a released one, by its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import shutil
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from unimat_jax import released, weights
from unimat_jax.errors import UserError
from unimat_jax.sharding import all_processes
from unimat_jax.train_state import TrainState

CONFIG, MODEL, FOLDER = "config.json", "model.json", "checkpoints"
BEST_METRIC = "eval/loss"
MODEL_FORMAT = 2
"""Of the parameters: 1 had convolution taps that could only meet the border."""


def write_json(path: Path, value: Any) -> None:
    """Atomic: a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def read_json(path: Path) -> Any:
    """Raises UserError for a file that is missing or no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def exported(directory: Path) -> dict[str, Any] | None:
    """The entry "export" of its model.json; None where it holds no exported model."""
    return read_json(directory / MODEL).get("export") if (directory / MODEL).exists() else None


def _loss(metrics: dict[str, float]) -> float:
    return metrics[BEST_METRIC]


def _is_no_error_of_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def _is_no_late_write(record: logging.LogRecord) -> bool:
    frames = traceback.walk_tb(record.exc_info[2]) if record.exc_info else ()
    return not any("orbax" in frame.f_code.co_filename for frame, _ in frames)


def _drop_late_writes() -> None:
    """Where one array of a checkpoint cannot be written, orbax ends the event loop of all, and each of the others that
    comes to its end writes a traceback to the standard error, by one of two ways. What failed is told by
    `Checkpoints._told`."""
    logging.getLogger("asyncio").addFilter(_is_no_late_write)
    before = sys.unraisablehook
    if getattr(before, "drops_late_writes", False):
        return

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            before(unraisable)

    hook.drops_late_writes = True  # pyright: ignore[reportFunctionMemberAccess]
    sys.unraisablehook = hook


class Checkpoints:
    """The checkpoints of one run: saved asynchronously; the last and the best by validation loss are kept."""

    def __init__(self, workdir: Path, keep: int = 2):
        if exported(workdir):
            raise UserError(
                f"--workdir={workdir} holds an exported model, which training cannot go on from: name another"
            )
        policies = [
            checkpoint_managers.LatestN(keep),
            # Ascending order keeps the largest: reversed, the smallest loss is kept.
            checkpoint_managers.BestN(get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False),
        ]
        # Its threads log pages of traceback for what `save` or `check` raises in a sentence.
        logging.getLogger("absl").addFilter(_is_no_error_of_orbax)
        _drop_late_writes()
        self._folder = workdir.absolute() / FOLDER
        for half in self._folder.glob("*.orbax-checkpoint-tmp*"):
            if jax.process_index() == 0:  # orbax takes it away
                print(f"warning: {half.name} was not written to its end and is not used", file=sys.stderr, flush=True)
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                best_fn=_loss,  # the policy alone decides, but without this orbax does not store metrics
                best_mode="min",
                cleanup_tmp_directories=True,
            ),
        )

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, dataset_state: dict[str, Any], metrics: dict[str, float] | None) -> None:
        """Begins to write a checkpoint. Raises UserError where it, or the one before, cannot be written."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        with self._told():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    ema_params=ocp.args.StandardSave(state.ema_params),
                    optimizer=ocp.args.StandardSave({"opt_state": state.opt_state}),
                    dataset=ocp.args.JsonSave(dataset_state),
                ),
                metrics={BEST_METRIC: (metrics or {}).get(BEST_METRIC, math.inf)},  # not evaluated is never the best
            )

    def restore_latest(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The latest state that can be read, in the shapes and shardings of `like` (jax.ShapeDtypeStruct), and the
        iterator's; None where there is no checkpoint. One that is damaged is renamed to STEP.damaged, with a warning.
        Raises UserError where all are damaged."""
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            found, why = None, "another process could not read it"
            try:
                found = self._restore(step, like)
            except Exception as error:  # orbax, tensorstore and json each have their own
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if not all_processes(found is not None):
                damaged[step] = why
                continue
            for number, why in damaged.items():
                self._set_aside(number, f"the checkpoint of step {number} is damaged ({why}); going on from {step}")
            return found
        if damaged:
            step, why = next(iter(damaged.items()))
            raise UserError(
                f"{self._folder}: no checkpoint can be read (steps {sorted(damaged)}; that of {step}: {why}): put back "
                "a copy, or name another --workdir"
            )
        return None

    def _restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(like.params),
                ema_params=ocp.args.StandardRestore(like.ema_params),
                optimizer=ocp.args.StandardRestore({"opt_state": like.opt_state}),
                dataset=ocp.args.JsonRestore(),
            ),
        )
        step_array = jax.device_put(jax.numpy.asarray(step, like.step.dtype), like.step.sharding)
        opt_state = restored["optimizer"]["opt_state"]
        return TrainState(step_array, restored["params"], restored["ema_params"], opt_state), dict(restored["dataset"])

    def _set_aside(self, step: int, why: str) -> None:
        multihost_utils.sync_global_devices(f"all have tried to read step {step}")
        if jax.process_index() == 0:
            print(f"warning: {why}", file=sys.stderr, flush=True)
            target = self._folder / f"{step}.damaged"
            shutil.rmtree(target, ignore_errors=True)
            (self._folder / str(step)).rename(target)
        multihost_utils.sync_global_devices(f"step {step} is set aside")
        self._manager.reload()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turns what orbax raises when a checkpoint cannot be written, a full disk for one, into a UserError."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            whole = sorted(int(p.name) for p in self._folder.iterdir() if p.name.isdigit())
            free = shutil.disk_usage(self._folder).free / 2**20
            raise UserError(
                f"the checkpoint cannot be written ({' '.join(str(error).split())[:300]}); {self._folder} has "
                f"{free:,.0f} MiB free. The checkpoints of steps {whole} are whole: make room, and the same command "
                "goes on from the last"
            ) from error

    def check(self) -> None:
        """Raises UserError, as `save`, where a checkpoint that is being written has failed."""
        with self._told():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Until all that was begun is written. Raises UserError as `save`."""
        with self._told():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._told():
            self._manager.close()


def read_run(directory: str | Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """(directory, config, model description) of a run, given it or its `checkpoints` folder, of an exported model, or
    of a released one, given its name. A path that exists wins over a name. Raises UserError where there is none."""
    path, models = Path(directory), released.models()
    model = models.get(str(directory))
    if model and not path.exists():
        path, model = model, None
    hidden = f"; the released model of that name is --checkpoint={model}" if model else ""
    if not path.is_dir():
        names = f", and no released model of that name (there are {', '.join(models)})" if models else ""
        what = "a file" if path.exists() else f"no such directory{names}"
        raise UserError(f"--checkpoint={directory}: {what}; give the --workdir of a training run{hidden}")
    root = path if (path / MODEL).exists() else path.parent
    if not exported(root) and not ((root / MODEL).exists() and (root / FOLDER).is_dir()):
        inside = sorted(str(found.parent) for found in path.glob(f"*/{MODEL}"))
        raise UserError(
            f"--checkpoint={directory}: no checkpoint there ({MODEL} and {FOLDER}/ are missing); "
            f"give the --workdir of a training run{', as ' + ' or '.join(inside[:3]) if inside else ''}{hidden}"
        )
    description = read_json(root / MODEL)
    check_format(description, root)
    return root, read_json(root / CONFIG), description


def check_format(description: Mapping[str, Any], root: Path) -> None:
    """Raises UserError where a run's parameters are those of another version's networks."""
    if description["format"] != MODEL_FORMAT:
        raise UserError(
            f"{root} was trained by a version of unimat-jax with other networks (format {description['format']} in "
            f"{MODEL}, {MODEL_FORMAT} here): train it again in another --workdir, or use that version"
        )


def available_steps(root: Path) -> list[int]:
    """Steps with a finished checkpoint, ascending. Raises UserError when there is none."""
    steps = sorted(int(p.name) for p in (root / FOLDER).iterdir() if p.name.isdigit())
    if not steps:
        raise UserError(f"--checkpoint={root}: no checkpoint is saved yet; train longer or lower checkpoint_every")
    return steps


def load_params(root: Path, like: Any, *, step: int | None = None, ema: bool = True) -> tuple[Any, int, str]:
    """(parameters, their step, a hash of them) of a run; the latest step unless `step` is given. Raises UserError for a
    step or a kind of parameters that is not there, and where an exported model is damaged."""
    if about := exported(root):
        return _exported_params(root, about, like, step=step, kind="ema" if ema else "raw")
    steps = available_steps(root)
    if step is not None and step not in steps:
        raise UserError(f"--step={step}: the run has checkpoints at steps {steps}")
    step = steps[-1] if step is None else step
    item = "ema_params" if ema else "params"
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore((root / FOLDER / str(step) / item).absolute(), like)
    return params, step, hash_of(params)


def _exported_params(
    root: Path, about: Mapping[str, Any], like: Any, *, step: int | None, kind: str
) -> tuple[Any, int, str]:
    if step not in (None, about["step"]):
        raise UserError(f"--step={step}: {root} is a model exported at step {about['step']}, and holds no other")
    if kind not in about["parameters_hash"]:
        raise UserError(
            f"--raw_params (ema=False): {root} was exported with the averaged parameters alone; leave it out, or "
            "export the run without --averaged_only"
        )
    path = root / weights.FILES[kind]
    params = weights.read(path, like)
    found, told = hash_of(params), about["parameters_hash"][kind]
    if found != told:
        raise UserError(
            f"{path}: its parameters have the hash {found}, and {MODEL} beside it says {told}: one of the two was "
            "changed or damaged; export or download the model again"
        )
    return params, about["step"], found


def hash_of(params: Any) -> str:
    """SHA-256 over names, shapes and values of all parameters, the first 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = jax.device_get(leaf)
        digest.update(f"{jax.tree_util.keystr(path)}{array.shape}{array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
