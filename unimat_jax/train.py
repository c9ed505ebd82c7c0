"""The training loop: data, state, jitted steps, checkpoints, evaluators, one line of progress."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unimat_jax import compilation_cache, data, flops, sampler, sharding
from unimat_jax.assembly import Assembly, abstract_batch, assemble, compiler_options
from unimat_jax.checkpoint import CONFIG, FOLDER, MODEL, MODEL_FORMAT, Checkpoints, check_format, write_json
from unimat_jax.conditioning import free_sites, make_condition
from unimat_jax.default_config import get_config
from unimat_jax.densify import occupancy
from unimat_jax.diffusion import PREDICTION_TYPES
from unimat_jax.errors import UserError
from unimat_jax.evaluation.validity import check
from unimat_jax.metric_writer import MetricWriter, Progress
from unimat_jax.representation import DecodeFailure, UniMatSpec, decode
from unimat_jax.train_step import eval_metrics

# A run may go on with other values of these; every other field of the config must stay what it was.
FREE_ON_RESUME = (
    "train.num_steps", "train.log_every", "train.checkpoint_every", "train.eval_every", "train.eval_examples",
    "train.sample_every", "train.sample_examples", "train.keep_checkpoints", "train.fsdp", "train.microbatches",
    "train.compilation_cache", "model.remat", "model.scan_blocks", "model.attention_kernel",
    "data.data_dir", "data.num_threads", "data.prefetch", "data.prepare", "sample",
    "optimizer.learning_rate", "optimizer.schedule", "optimizer.final_factor",
)  # fmt: skip


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag, so that a run saves before it stops. A second SIGINT stops at once."""

    def __enter__(self) -> StopRequest:
        self.received: str | None = None
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _handle(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def train(config: Any, workdir: str | Path) -> dict[str, float]:
    """Trains to config.train.num_steps, from the latest checkpoint in `workdir` if there is one; the last metrics."""
    workdir = Path(workdir)
    mesh = sharding.make_mesh(config.train.fsdp)
    compilation_cache.enable(config.train.compilation_cache)
    _check(config)
    sharding.check_batch_size(config.train.batch_size, mesh, "config.train.batch_size")
    first = jax.process_index() == 0

    # Data.
    directory = data.dataset_directory(config.data.dataset, config.data.data_dir)
    statistics = data.read_statistics(directory)
    spec = data.make_spec(
        statistics,
        max_atoms_per_element=config.data.max_atoms_per_element or None,
        table=config.data.table,
        coordinates=config.data.coordinates,
        lattice_form=config.data.lattice_form,
    )
    schema = data.condition_schema(statistics, config.data.properties)
    source = data.RecordSource(directory, "train", config.data.max_train_examples)
    fixed = {"random_shift": False, "random_axes": False}
    augmentation = _pick(config.data, "shuffle_atoms", "random_shift", "origin_shift", "random_axes")
    batches = data.BatchMaker(
        source, spec, schema, batch_size=config.train.batch_size, seed=config.train.seed, augmentation=augmentation,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    eval_batches, eval_note = [], ""
    for split in ("validation", "train"):  # the training set itself where no validation crystal fits the model
        if split in statistics["num_examples"] and not eval_batches:
            eval_source = data.RecordSource(directory, split)
            eval_maker = data.BatchMaker(
                eval_source, spec, schema, batch_size=config.train.batch_size, seed=0,
                augmentation={**augmentation, **fixed},
            )  # fmt: skip
            eval_batches, left_out = data.evaluation_batches(
                eval_maker,
                eval_source,
                spec,
                num_examples=config.train.eval_examples,
                batch_size=config.train.batch_size,
            )
            number = min(config.train.eval_examples, len(eval_source))
            eval_note = f"eval loss: on {number - left_out} crystals of the {split} split"
            eval_note += f"; {left_out} do not fit the model's table or L" if left_out else ""

    # Model, state and steps.
    run = assemble(config, spec, schema, mesh)
    by_batch = sharding.batch_sharding(mesh)
    step_key, eval_key = (jax.random.fold_in(jax.random.key(config.train.seed), i) for i in (1, 2))

    workdir.mkdir(parents=True, exist_ok=True)
    _check_same_run(workdir, config)
    description = {
        "format": MODEL_FORMAT,
        "model": _plain(config.model),
        "diffusion": _plain(config.diffusion),
        "spec": spec.to_json(),
        "condition_schema": schema,
        "dataset": {
            "name": config.data.dataset,
            **{k: statistics.get(k) for k in ("num_examples", "elements", "notes", "source")},
        },
        "num_params": run.num_params,
    }
    _check_same_data(workdir, description)
    checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
    iterator = data.training_iterator(batches, num_threads=config.data.num_threads, prefetch=config.data.prefetch)
    if checkpoints.latest_step is None:
        state = run.init()
    else:
        state, position = checkpoints.restore(run.abstract_state)
        iterator.set_state(position)
    start_step = int(state.step)
    if first:
        write_json(workdir / CONFIG, _plain(config))
        write_json(workdir / MODEL, description)
        cost = _cost(run, spec, len(schema), config, by_batch, step_key)
        _announce(description, cost, len(source), mesh, start_step, config, eval_note)
    if start_step >= config.train.num_steps:
        print(f"{workdir} is done: step {start_step} of {config.train.num_steps}", file=sys.stderr)
        checkpoints.close()
        return _last_metrics(workdir)

    writer = MetricWriter(workdir, first)

    sampled = sample_check(run, eval_batches[0], config)

    def evaluate(step: int) -> dict[str, float]:
        jax.block_until_ready(state)  # the steps under way are training: their time counts
        begin = time.monotonic()
        batches_on_devices = (sharding.to_devices(batch, by_batch) for batch in eval_batches)
        sums = sum(np.asarray(run.eval_step(state.ema_params, batch, eval_key)) for batch in batches_on_devices)
        result = eval_metrics(sums, config.diffusion.lattice_weight)
        if config.train.sample_every and (step % config.train.sample_every == 0 or step == config.train.num_steps):
            result |= sampled(state.ema_params)
        writer.write(step, result)
        if first:
            shown = [f"{k} {v:.4f}" for k, v in result.items() if "_t0" not in k]
            print(f"step {step}  " + "  ".join(shown), file=sys.stderr, flush=True)
        progress.left_out(time.monotonic() - begin)
        return result

    progress = Progress(config.train.num_steps, config.train.batch_size, start_step, first)
    pending: tuple[int, Mapping[str, jax.Array]] | None = None
    # Whatever ends the loop, a checkpoint that is being written is finished first.
    with contextlib.closing(writer), contextlib.closing(checkpoints), StopRequest() as stop:
        metrics: dict[str, float] = evaluate(start_step) if start_step == 0 else {}
        for step in range(start_step, config.train.num_steps):
            begin = time.monotonic()
            batch = sharding.to_devices(next(iterator), by_batch)
            progress.waited(time.monotonic() - begin)
            begin = time.monotonic()
            state, step_metrics = run.train_step(state, batch, step_key)
            if step == start_step:
                progress.left_out(time.monotonic() - begin)  # compilation
            # The previous step's numbers are read only after the next step is under way: the device never idles.
            if pending is not None:
                metrics |= _log(pending, progress, writer, run.schedule, workdir)
                pending = None
            done = step + 1
            if done % config.train.log_every == 0 or done == config.train.num_steps:
                pending = (done, step_metrics)
            last = done == config.train.num_steps or stop.received is not None
            evaluated = None
            if done % config.train.eval_every == 0 or done == config.train.num_steps:
                evaluated = evaluate(done)
                metrics |= evaluated
            if done % config.train.checkpoint_every == 0 or last:
                if pending is not None:
                    metrics |= _log(pending, progress, writer, run.schedule, workdir)
                    pending = None
                _check_finite(done, step_metrics, workdir)  # of the state that is about to be kept
                jax.block_until_ready(state)
                begin = time.monotonic()
                checkpoints.save(state, iterator.get_state(), evaluated)
                progress.left_out(time.monotonic() - begin)
            if last:
                break
    if first:
        if stop.received:
            print(f"{stop.received}: saved step {done}; the same command goes on from there", file=sys.stderr)
        print(f"checkpoint: {workdir / FOLDER / str(done)}")
    return metrics


def _log(
    pending: tuple[int, Mapping[str, jax.Array]], progress: Progress, writer: MetricWriter, schedule: Any, workdir: Path
) -> dict[str, float]:
    step, arrays = pending
    _check_finite(step, arrays, workdir)
    values = {name: float(value) for name, value in arrays.items()}
    rates = progress.report(step, values)
    writer.write(step, {**values, **rates, "learning_rate": float(schedule(step - 1))})
    return values


def _check_finite(step: int, metrics: Mapping[str, jax.Array], workdir: Path) -> None:
    values = {name: float(value) for name, value in metrics.items()}
    bad = [f"{name} is {value}" for name, value in values.items() if not np.isfinite(value)]
    if bad:
        raise UserError(
            f"{', '.join(bad)} at step {step}: lower config.optimizer.learning_rate; the same --workdir goes on from "
            f"the last good checkpoint, if one was due, in {workdir / FOLDER}"
        )


def sample_check(run: Assembly, batch: Mapping[str, np.ndarray], config: Any) -> Callable[[Any], dict[str, float]]:
    """A function of parameters that samples crystals of the compositions of a validation batch, with always the same
    noise, and gives the shares that decode and that are valid."""
    objective = run.objective
    spec, number = objective.spec, min(config.train.sample_examples, len(batch["slot"]))
    part = {name: jnp.asarray(value[:number]) for name, value in batch.items()}
    counts = occupancy(part, spec).astype(jnp.float32)
    given, none = jnp.ones(number), jnp.zeros(number)
    cond = make_condition(counts, given, counts.max(1), none, part["properties"], jnp.zeros_like(part["properties"]))
    asked = np.asarray(counts.sum(1)).astype(int)

    @functools.partial(jax.jit, compiler_options=compiler_options(jax.default_backend()))
    def sample(params: Any) -> Any:
        return sampler.sample(
            functools.partial(run.network.apply, {"params": params}), jax.random.key(0), (number, *spec.grid, 3),
            lattice_size=spec.lattice_size, cond=cond, free=free_sites(cond, spec), indices=jnp.arange(number),
            prediction_type=objective.prediction_type, logsnr_min=objective.logsnr_min, logsnr_max=objective.logsnr_max,
            **_pick(config.sample, "num_steps", "method", "log_variance_interpolation"),
        )  # fmt: skip

    def check_samples(params: Any) -> dict[str, float]:
        x, lattice = (np.asarray(a) for a in sample(params))
        decoded = [decode(x[i], lattice[i], spec, counts=asked[i]) for i in range(number)]
        crystals = [c for c in decoded if not isinstance(c, DecodeFailure)]
        return {
            "sample/decoded": len(crystals) / number,
            "sample/struct_valid": sum(check(c).struct_valid for c in crystals) / number,
            "sample/min_distance": float(np.median([c.min_distance for c in crystals])) if crystals else 0.0,
        }

    return check_samples


def _check(config: Any) -> None:
    if config.diffusion.prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"config.diffusion.prediction_type = {config.diffusion.prediction_type!r}: choose from {PREDICTION_TYPES}"
        )
    if config.sample.method not in sampler.METHODS:
        raise UserError(f"config.sample.method = {config.sample.method!r}: choose from {sampler.METHODS}")
    for section, name in (("train", "num_steps"), ("train", "batch_size"), ("train", "log_every"),
                          ("train", "eval_examples"), ("train", "checkpoint_every"), ("train", "eval_every"),
                          ("sample", "num_steps")):  # fmt: skip
        if config[section][name] < 1:
            raise UserError(f"config.{section}.{name} = {config[section][name]}: give a whole number above 0")
    shares = (config.diffusion.counts_share, config.diffusion.elements_share)
    if min(shares) < 0 or sum(shares) > 1:
        raise UserError(
            f"config.diffusion.counts_share, elements_share = {shares}: give shares that add up to at most 1"
        )


def _check_same_run(workdir: Path, config: Any) -> None:
    if not (workdir / CONFIG).exists() or not (workdir / FOLDER).exists():
        return
    # What an older version's config lacks is what the default still does.
    before = _flat(_plain(get_config())) | _flat(json.loads((workdir / CONFIG).read_text()))
    now = _flat(_plain(config))
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


def _check_same_data(workdir: Path, description: Mapping[str, Any]) -> None:
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


def _plain(config: Any) -> dict[str, Any]:
    """The config as JSON will give it back: tuples as lists."""
    return json.loads(json.dumps(config.to_dict()))


def _pick(section: Any, *names: str) -> dict[str, Any]:
    return {name: section[name] for name in names}


def _last_metrics(workdir: Path) -> dict[str, float]:
    merged: dict[str, float] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        merged |= json.loads(line)
    return merged


def _cost(
    run: Assembly, spec: UniMatSpec, num_properties: int, config: Any, by_batch: Any, key: Any
) -> flops.ModelCost:
    """By the trace of the train step that its first call uses again."""
    batch = abstract_batch(spec, num_properties, config.train.batch_size)
    batch = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=by_batch) for name, a in batch.items()}
    return flops.step_cost(run.train_step, run.abstract_state, batch, key)


def _announce(
    description: Mapping[str, Any],
    cost: flops.ModelCost,
    number: int,
    mesh: Any,
    start: int,
    config: Any,
    eval_note: str,
) -> None:
    devices: Sequence[Any] = mesh.devices.ravel()
    grid = UniMatSpec.from_json(description["spec"]).grid
    lines = [
        f"devices: {len(devices)} x {devices[0].device_kind}, mesh {dict(mesh.shape)}, jax {jax.__version__}",
        f"data: {description['dataset']['name']}, {number:,} training crystals, tensor L x H x W = {grid}",
        f"model: {config.model.name}, {cost.num_params:,} parameters, "
        f"{cost.train_flops_per_crystal / 1e9:.3g} GFLOP a crystal and step; optax {optax.__version__}",
        eval_note,
        f"steps: {start} of {config.train.num_steps} done, batch {config.train.batch_size}; compiling ...",
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)
