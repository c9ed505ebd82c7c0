"""The training loop: data, state, jitted steps, checkpoints, evaluations, one line of progress."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from unimat_jax import compilation_cache, data, distributed, flops, sharding
from unimat_jax.assembly import abstract_batch, assemble
from unimat_jax.checkpoint import CONFIG, FOLDER, MODEL, MODEL_FORMAT, Checkpoints, write_json
from unimat_jax.errors import UserError
from unimat_jax.metric_writer import MetricWriter, Progress, append_lines
from unimat_jax.rollback import LossWatch, Rollbacks
from unimat_jax.run_directory import check_same_data, check_same_run, last_metrics, only_run, plain
from unimat_jax.sample_check import sample_check
from unimat_jax.train_step import eval_metrics


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
    with StopRequest() as stop, contextlib.ExitStack() as until_the_end:
        training = _Training(config, Path(workdir), until_the_end)
        if training.step >= config.train.num_steps:
            if training.first:
                print(f"{workdir} is done: step {training.step} of {config.train.num_steps}", file=sys.stderr)
            training.checkpoints.close()
            return last_metrics(Path(workdir))
        return training.go(stop)


@dataclasses.dataclass(frozen=True)
class _Step:
    """A step under way. metrics: arrays on the devices, which are there when it is done."""

    number: int
    batch: int
    metrics: Mapping[str, jax.Array]


class _Training:
    """A run from its set-up to its end. `step` counts the finished updates of `state`."""

    def __init__(self, config: Any, workdir: Path, until_the_end: contextlib.ExitStack):
        """Raises UserError for what cannot be, before anything is written."""
        self.config, self.workdir = config, workdir
        self.mesh = sharding.make_mesh(config.train.fsdp)
        self.first = jax.process_index() == 0
        if self.first:
            print(sharding.device_table(distributed.hosts()), file=sys.stderr, flush=True)
        compilation_cache.enable(config.train.compilation_cache)
        _check(config)
        sharding.check_batch_size(config.train.batch_size, self.mesh, "config.train.batch_size")
        self._open_data()

        self.run = assemble(config, self.spec, self.schema, self.mesh)
        self.run.objective.check_sampler(config.sample)
        self.by_batch = sharding.batch_sharding(self.mesh)
        self.step_key, self.eval_key = (jax.random.fold_in(jax.random.key(config.train.seed), i) for i in (1, 2))

        description = {
            "format": MODEL_FORMAT,
            "model": plain(config.model),
            "diffusion": plain(config.diffusion),
            "composition": plain(config.composition),
            "spec": self.spec.to_json(),
            "condition_schema": self.schema,
            "dataset": {
                "name": config.data.dataset,
                **{k: self.statistics.get(k) for k in ("num_examples", "elements", "notes", "source")},
            },
            "num_params": self.run.num_params,
        }
        check_same_run(workdir, config)
        check_same_data(workdir, description)
        workdir.mkdir(parents=True, exist_ok=True)
        if self.first:
            until_the_end.enter_context(only_run(workdir))
        self.checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
        self.rollbacks = Rollbacks(workdir, config.train.max_rollbacks, self.first)
        self.loss_watch = LossWatch(config.train.max_loss_ratio)
        self.iterator = data.training_iterator(
            self.batches, num_threads=config.data.num_threads, prefetch=config.data.prefetch
        )
        self.beginning = self.iterator.get_state()
        self._restore()
        if self.first:
            write_json(workdir / CONFIG, plain(config))
            write_json(workdir / MODEL, description)
            self._announce(description)

    def _open_data(self) -> None:
        config = self.config
        directory = data.dataset_directory(config.data.dataset, config.data.data_dir)
        self.statistics = data.read_statistics(directory)
        self.spec = data.make_spec(
            self.statistics,
            max_atoms_per_element=config.data.max_atoms_per_element or None,
            table=config.data.table,
            coordinates=config.data.coordinates,
            lattice_form=config.data.lattice_form,
        )
        self.schema = data.condition_schema(self.statistics, config.data.properties)
        self.source = data.RecordSource(directory, "train", config.data.max_train_examples)
        switches = ("shuffle_atoms", "random_shift", "origin_shift", "random_axes", "half_turned")
        augmentation = {name: config.data[name] for name in switches}
        self.batches = data.BatchMaker(
            self.source, self.spec, self.schema, batch_size=config.train.batch_size, seed=config.train.seed,
            augmentation=augmentation, size_window=config.data.size_window,
            process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip
        self.eval_batches, self.eval_note = [], ""
        for split in ("validation", "train"):  # the training set itself where no validation crystal fits the model
            if split in self.statistics["num_examples"] and not self.eval_batches:
                source = data.RecordSource(directory, split)
                maker = data.BatchMaker(
                    source, self.spec, self.schema, batch_size=config.train.batch_size, seed=0,
                    augmentation={**augmentation, "random_shift": False, "random_axes": False},
                    size_window=config.data.size_window,
                )  # fmt: skip
                self.eval_batches, left_out = data.evaluation_batches(
                    maker, source, self.spec, num_examples=config.train.eval_examples,
                    batch_size=config.train.batch_size,
                )  # fmt: skip
                number = min(config.train.eval_examples, len(source)) - left_out
                self.eval_note = f"eval loss: on {number} crystals of the {split} split"
                self.eval_note += f"; {left_out} do not fit the model's table or L" if left_out else ""

    def _restore(self) -> None:
        """To the latest checkpoint that is whole, or to the beginning. Sets state, step and the next batch."""
        found = self.checkpoints.restore_latest(self.run.abstract_state)
        if found is None:
            self.state, position = self.run.init(), self.beginning
        else:
            self.state, position = found
        self.step = int(self.state.step)
        self.good_until = self.rollbacks.skip(position["next_index"])  # the batch after the last good checkpoint
        self.iterator.set_state({**position, "next_index": self.good_until})

    def go(self, stop: StopRequest) -> dict[str, float]:
        c = self.config.train
        self.writer = MetricWriter(self.workdir, self.first)
        self.progress = Progress(c.num_steps, c.batch_size, self.step, self.first)
        self.sampled = sample_check(self.run, self.eval_batches[len(self.eval_batches) // 2], self.config, self.mesh)
        # Whatever ends the loop, a checkpoint that is being written is finished first.
        with contextlib.ExitStack() as closing:
            closing.enter_context(contextlib.closing(self.checkpoints))
            closing.enter_context(contextlib.closing(self.writer))
            self.batch_log = None
            if c.log_batches:
                path = self.workdir / f"batches_{jax.process_index()}.jsonl"
                self.batch_log = closing.enter_context(append_lines(path))
            metrics = self._loop(stop)
        if self.first:
            if stop.received or self.step < c.num_steps:
                told = stop.received or "another process was told to stop"
                print(f"{told}: saved step {self.step}; the same command goes on from there", file=sys.stderr)
            print(f"checkpoint: {self.workdir / FOLDER / str(self.step)}")
        return metrics

    def _loop(self, stop: StopRequest) -> dict[str, float]:
        c = self.config.train
        self.metrics: dict[str, float] = {}
        if self.step == 0:
            self._evaluate()
        compiled, previous = set(), None
        while self.step < c.num_steps:
            begin = time.monotonic()
            number, batch = self._next_batch(stop)
            self.progress.waited(time.monotonic() - begin)
            begin = time.monotonic()
            self.state, step_metrics = self.run.train_step(self.state, batch, self.step_key)
            if batch["slot"].shape not in compiled:
                self.progress.left_out(time.monotonic() - begin)
            compiled.add(batch["slot"].shape)
            self.step += 1
            # A step's numbers are read only after the next step is under way: the device never idles.
            if previous is not None and not self._accept(previous):
                previous = None
                continue
            stopping = stop.received is not None
            if "stop" in step_metrics:  # all processes must decide alike, so on what all have seen
                stopping = previous is not None and float(previous.metrics["stop"]) > 0
            previous = _Step(self.step, number, step_metrics)
            last = stopping or self.step == c.num_steps
            evaluate = self.step % c.eval_every == 0 or self.step == c.num_steps
            if evaluate or last or self.step % c.checkpoint_every == 0:
                accepted, previous = self._accept(previous), None
                if not accepted:
                    continue
                evaluated = self._evaluate() if evaluate else None
                if last or self.step % c.checkpoint_every == 0:
                    begin = time.monotonic()
                    position = self.iterator.get_state()
                    self.checkpoints.save(self.state, position, evaluated)
                    self.good_until = position["next_index"]
                    self.progress.left_out(time.monotonic() - begin)
                if last:
                    break
        return self.metrics

    def _next_batch(self, stop: StopRequest) -> tuple[int, dict[str, jax.Array]]:
        number = self.iterator.get_state()["next_index"]
        batch = next(self.iterator)
        if self.batch_log is not None:
            row = {"step": self.step + 1, "batch": number, "index": batch["index"].tolist()}
            self.batch_log.write(json.dumps(row) + "\n")
            self.batch_log.flush()
        if jax.process_count() > 1:
            batch["stop"] = np.full(len(batch["index"]), stop.received is not None, np.float32)
        return number, sharding.to_devices(batch, self.by_batch)

    def _accept(self, step: _Step) -> bool:
        """Looks at a step's metrics and logs them where they are due. False: it went wrong, and the run is back at the
        last good checkpoint."""
        values = {name: float(value) for name, value in jax.device_get(step.metrics).items() if name != "stop"}
        problem = self.loss_watch.problem(values)
        if problem:
            self._roll_back(step, problem)
            return False
        self.checkpoints.check()
        if step.number % self.config.train.log_every == 0 or step.number == self.config.train.num_steps:
            self.metrics |= values
            rates = self.progress.report(step.number, values)
            learning_rate: Any = self.run.schedule(step.number - 1)
            self.writer.write(step.number, {**values, **rates, "learning_rate": float(learning_rate)})
        return True

    def _roll_back(self, step: _Step, problem: str) -> None:
        self.checkpoints.wait()
        restored = self.checkpoints.latest_step or 0
        # The step before may have broken the parameters, and so this one's loss.
        suspects = [n for n in (step.batch - 1, step.batch) if n >= 0]
        ids = {n: [r["material_id"] for r in self.source.read(self.batches.indices(n))] for n in suspects}
        told = self.rollbacks.add(
            problem=problem, step=step.number, restored_step=restored, first=self.good_until, last=step.batch, ids=ids
        )
        if self.first:
            print(f"warning: {told}", file=sys.stderr, flush=True)
        self._restore()
        self.progress.restart(self.step)

    def _evaluate(self) -> dict[str, float]:
        c = self.config.train
        jax.block_until_ready(self.state)  # the steps under way are training: their time counts
        begin = time.monotonic()
        params = self.state.ema_params
        batches = (sharding.whole_to_devices(batch, self.by_batch) for batch in self.eval_batches)
        sums = sum(np.asarray(self.run.eval_step(params, batch, self.eval_key)) for batch in batches)
        result = eval_metrics(sums, self.config.diffusion.lattice_weight)
        if c.sample_every and (self.step % c.sample_every == 0 or self.step == c.num_steps):
            result |= self.sampled(params)
        self.writer.write(self.step, result)
        if self.first:
            shown = [f"{k} {v:.4f}" for k, v in result.items() if "_t0" not in k]
            print(f"step {self.step}  " + "  ".join(shown), file=sys.stderr, flush=True)
        self.progress.left_out(time.monotonic() - begin)
        self.metrics |= result
        return result

    def _announce(self, description: Mapping[str, Any]) -> None:
        config, grid = self.config, self.spec.grid
        cost = self._cost()
        lines = [
            f"mesh: {dict(self.mesh.shape)}",
            f"data: {description['dataset']['name']}, {len(self.source):,} training crystals, "
            f"tensor L x H x W = {grid}",
            f"model: {config.model.name}, {cost.num_params:,} parameters, "
            f"{cost.train_flops_per_crystal / 1e9:.3g} GFLOP a crystal and step; optax {optax.__version__}",
            self.eval_note,
            f"steps: {self.step} of {config.train.num_steps} done, batch {config.train.batch_size}; compiling ...",
        ]
        print("\n".join(lines), file=sys.stderr, flush=True)

    def _cost(self) -> flops.ModelCost:
        """By the trace of the train step that its first call uses again."""
        size = self.config.train.batch_size
        batch = abstract_batch(self.spec, len(self.schema), size)
        if jax.process_count() > 1:
            batch["stop"] = jax.ShapeDtypeStruct((size,), np.float32)
        batch = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self.by_batch) for name, a in batch.items()}
        return flops.step_cost(self.run.train_step, self.run.abstract_state, batch, self.step_key)


def _check(config: Any) -> None:
    for section, name in (("train", "num_steps"), ("train", "batch_size"), ("train", "log_every"),
                          ("train", "eval_examples"), ("train", "checkpoint_every"), ("train", "eval_every"),
                          ("sample", "num_steps")):  # fmt: skip
        if config[section][name] < 1:
            raise UserError(f"config.{section}.{name} = {config[section][name]}: give a whole number above 0")
    if not 0 <= config.sample.composition_min_p < 1:
        min_p = config.sample.composition_min_p
        raise UserError(f"config.sample.composition_min_p = {min_p}: give a share, from 0 to below 1")
