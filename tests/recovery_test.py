"""Nothing is lost: bad batches, kills, damaged and half-written checkpoints, a full disk, runs of older versions."""

import asyncio
import gc
import json
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import tiny_run
from tiny_run import BATCH_SIZE, NUM_STEPS
from train_test import assert_same_checkpoint, rows

from benchmarks.kills import arrays
from unimat_jax import data, train
from unimat_jax.checkpoint import Checkpoints, available_steps
from unimat_jax.errors import UserError

OLD_RUN = Path(__file__).parent / "old_runs" / "format_2.zip"
"""Trained to step 8 by commit 0766ccd on four devices, with its data set."""


def batches(workdir: Path) -> dict[int, int]:
    """The batch that each step used; the last line of a step counts."""
    lines = (workdir / "batches_0.jsonl").read_text().splitlines()
    return {row["step"]: row["batch"] for row in map(json.loads, lines)}


def broken(monkeypatch, *numbers: int, lattice: float = np.nan) -> None:
    """These batches hold a lattice that is no number, or another."""
    make = data.BatchMaker.__call__
    bad = {"lattice": np.full((BATCH_SIZE, 6), lattice, np.float32)}
    monkeypatch.setattr(data.BatchMaker, "__call__", lambda self, n: make(self, n) | (bad if n in numbers else {}))


@pytest.fixture(scope="module")
def straight(tiny_data, tmp_path_factory) -> Path:
    """The workdir of a run that nothing befell. Only to read."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    train.train(tiny_run.light_config(tiny_data), workdir)
    return workdir


@pytest.fixture(scope="module")
def at_step_6(tiny_data, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("at_step_6") / "run"
    train.train(tiny_run.light_config(tiny_data, train__num_steps=6, train__log_batches=True), workdir)
    return workdir


def test_a_bad_batch_is_left_out_and_its_ids_are_kept(at_step_6, tiny_data, tmp_path, monkeypatch, capfd):
    workdir = shutil.copytree(at_step_6, tmp_path / "run")
    broken(monkeypatch, 8)
    train.train(tiny_run.light_config(tiny_data, train__log_batches=True, train__log_every=100), workdir)
    told = capfd.readouterr().err
    assert "warning: step 9: " in told and "train/loss is nan" in told
    assert "back to step 6, without batches 6 to 8 (try 1 of 3" in told
    assert [batches(workdir)[step] for step in range(1, 13)] == [*range(6), *range(9, 15)]
    source = data.RecordSource(data.dataset_directory("starter", tiny_data), "train")
    used = {row["batch"]: row["index"] for row in map(json.loads, (workdir / "batches_0.jsonl").open())}
    (file,) = (workdir / "bad_batches").iterdir()
    kept = json.loads(file.read_text())
    assert kept["batches"] == [
        {"batch": n, "material_ids": [record["material_id"] for record in source.read(used[n])]} for n in (7, 8)
    ]
    assert available_steps(workdir)[-1] == NUM_STEPS
    assert all(np.isfinite(array).all() for array in arrays(workdir, NUM_STEPS).values())


def test_before_the_first_checkpoint_the_run_begins_anew(tiny_data, tmp_path, monkeypatch):
    """With the batch after the bad one, as a start that finds the window on disk would."""
    broken(monkeypatch, 2)
    few = {"train__num_steps": 4, "train__eval_every": 4}
    train.train(tiny_run.light_config(tiny_data, train__log_batches=True, **few), tmp_path / "run")
    assert [batches(tmp_path / "run")[step] for step in range(1, 5)] == [3, 4, 5, 6]


def test_a_loss_that_explodes_is_a_bad_step_too(tiny_data, tmp_path, monkeypatch, capfd):
    broken(monkeypatch, 18, lattice=1e3)
    few = {"train__num_steps": 20, "train__eval_every": 20, "train__checkpoint_every": 16}
    train.train(tiny_run.light_config(tiny_data, train__log_batches=True, **few), tmp_path / "run")
    told = capfd.readouterr().err
    assert "warning: step 19: train/loss is " in told and "over 10 times the usual" in told
    assert [batches(tmp_path / "run")[step] for step in range(16, 21)] == [15, 19, 20, 21, 22]
    assert max(row["train/loss"] for step, row in rows(tmp_path / "run").items() if step) < 10


def test_it_is_left_out_by_the_next_start_too(at_step_6, tiny_data, tmp_path, monkeypatch):
    """Killed after it went back, before the next checkpoint: the window is on disk."""
    workdir = shutil.copytree(at_step_6, tmp_path / "run")
    row = {"step": 9, "problem": "", "restored_step": 6, "first_batch": 6, "last_batch": 8, "ids": ""}
    (workdir / "rollbacks.jsonl").write_text(json.dumps(row) + "\n")
    broken(monkeypatch, 8)
    train.train(tiny_run.light_config(tiny_data, train__log_batches=True), workdir)
    assert [batches(workdir)[step] for step in range(7, 13)] == list(range(9, 15))
    assert len((workdir / "rollbacks.jsonl").read_text().splitlines()) == 1


def test_a_run_that_goes_wrong_again_and_again_stops(at_step_6, tiny_data, tmp_path, monkeypatch):
    workdir = shutil.copytree(at_step_6, tmp_path / "run")
    broken(monkeypatch, *range(7, 100))
    with pytest.raises(UserError, match=r"step 7: .*train/loss is nan.*It is the 3th time after step 6.*learning_rate"):
        train.train(tiny_run.light_config(tiny_data, train__max_rollbacks=2), workdir)
    assert available_steps(workdir)[-1] == 6 and len(list((workdir / "bad_batches").iterdir())) == 3
    assert all(np.isfinite(array).all() for array in arrays(workdir, 6).values())


def damage(folder: Path) -> None:
    """As a file system leaves it that lost its last writes."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_goes_on(straight, tiny_data, tmp_path, capfd):
    workdir = shutil.copytree(straight, tmp_path / "run")
    assert available_steps(workdir) == [6, 12]
    damage(workdir / "checkpoints" / "12" / "params")
    (workdir / "checkpoints" / "14.orbax-checkpoint-tmp-3").mkdir()
    train.train(tiny_run.light_config(tiny_data), workdir)
    told = capfd.readouterr().err
    assert "warning: the checkpoint of step 12 is damaged (" in told and "going on from 6" in told
    assert "warning: 14.orbax-checkpoint-tmp-3 was not written to its end and is not used" in told
    assert (workdir / "checkpoints" / "12.damaged").is_dir()
    assert_same_checkpoint(workdir, straight, NUM_STEPS)


def test_all_checkpoints_damaged(straight, tiny_data, tmp_path):
    workdir = shutil.copytree(straight, tmp_path / "run")
    for step in (6, 12):
        damage(workdir / "checkpoints" / str(step))
    with pytest.raises(
        UserError, match=r"no checkpoint can be read \(steps \[6, 12\]; that of 12: .*another --workdir"
    ):
        train.train(tiny_run.light_config(tiny_data), workdir)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["12", "6"]


def start(config: Path, workdir: Path, **settings) -> subprocess.Popen:
    command = [sys.executable, "-m", "unimat_jax.main", f"--config={config}", f"--workdir={workdir}"]
    command += ["--config.train.log_batches=True", "--config.train.checkpoint_every=2"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=tiny_run.environment(4), **settings)


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_whole(at_step_6, tiny_data, tmp_path):
    """Here files that may not grow: what is written fails in the same place."""
    workdir = shutil.copytree(at_step_6, tmp_path / "run")
    before = arrays(workdir, 6)
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))"
    process = start(tiny_run.config_file(tmp_path / "light.py", tiny_data, limit, "light_config"), workdir)
    told = process.communicate(timeout=240)[1]
    assert process.returncode == 2 and "Traceback" not in told, told
    last = told.strip().splitlines()[-1]
    assert last.startswith("error: the checkpoint cannot be written (") and "steps [6] are whole: make room" in last
    assert available_steps(workdir) == [6]
    assert all(np.array_equal(before[name], array) for name, array in arrays(workdir, 6).items())


def test_arrays_that_are_written_after_another_failed_say_nothing(tmp_path, monkeypatch):
    """They come to their end in an event loop that is closed: a race of the full disk above, made to happen here."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_value))
    for _ in range(2):  # two runs in one process are no two hooks
        Checkpoints(tmp_path).close()
    promise, future = tensorstore.Promise.new()
    loop = asyncio.new_event_loop()

    async def write() -> None:
        await future

    async def begin() -> asyncio.Task:
        task = asyncio.ensure_future(write())
        await asyncio.sleep(0)
        return task

    task = loop.run_until_complete(begin())
    loop.close()
    promise.set_result(None)
    future.result()
    assert not told
    task._log_destroy_pending = False
    sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError("another")))
    assert [str(error) for error in told] == ["another"]


@pytest.mark.parametrize(("written_by", "heard"), [("orbax/checkpoint/_src/serialization.py", 0), ("another.py", 1)])
def test_arrays_that_fail_after_another_failed_say_nothing(tmp_path, caplog, written_by, heard):
    """The other way to come to an end too late: nobody asks the task any more what became of it."""
    Checkpoints(tmp_path).close()
    scope: dict = {}
    exec(compile("async def write(): raise ValueError('disk full')", written_by, "exec"), scope)

    async def begin() -> None:
        task = asyncio.ensure_future(scope["write"]())
        await asyncio.sleep(0)
        assert task.done()

    asyncio.run(begin())
    gc.collect()
    assert [record.message.splitlines()[0] for record in caplog.records if record.name == "asyncio"] == [
        "Task exception was never retrieved"
    ] * heard


def test_killed_again_and_again_it_ends_as_if_it_had_not_been(straight, tiny_data, tmp_path):
    """By SIGKILL while a checkpoint is written and by Ctrl-C; thirty times: benchmarks/kills.py."""
    slow = (
        "import time\nfrom unimat_jax.data import BatchMaker\n\nmake = BatchMaker.__call__\n\n"
        "def slowly(self, number):\n    time.sleep(0.2)\n    return make(self, number)\n\n"
        "BatchMaker.__call__ = slowly\n"
    )
    config, workdir = tiny_run.config_file(tmp_path / "slow.py", tiny_data, slow, "light_config"), tmp_path / "run"
    folder = workdir / "checkpoints"

    def a_checkpoint_half_written() -> bool:
        return any(int(p.name.split(".")[0]) >= 4 for p in folder.glob("*.orbax-checkpoint-tmp*"))

    def a_late_step() -> bool:
        try:
            return max(rows(workdir)) >= 8
        except json.JSONDecodeError:  # its last line is being written
            return False

    for moment, how in ((a_checkpoint_half_written, signal.SIGKILL), (a_late_step, signal.SIGINT)):
        process = start(config, workdir)
        end = time.monotonic() + 240
        while not moment():
            assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
            time.sleep(0.001)
        process.send_signal(how)
        told = process.communicate()[1]
        assert process.returncode == (0 if how == signal.SIGINT else -how)
    assert "SIGINT: saved step " in told
    process = start(config, workdir)
    assert "steps: 0 of" not in process.communicate(timeout=240)[1] and process.returncode == 0
    assert_same_checkpoint(workdir, straight, NUM_STEPS)
    assert [batches(workdir)[step] for step in range(1, 13)] == list(range(12))
    ours, theirs = rows(workdir), rows(straight)
    assert all(ours[step]["train/loss"] == theirs[step]["train/loss"] for step in range(1, 13))


def test_a_run_of_an_older_version_goes_on(tmp_path, monkeypatch, capfd):
    with zipfile.ZipFile(OLD_RUN) as archive:
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = rows(tmp_path / "run")
    assert max(before) == 8
    train.train(tiny_run.config("data", train__num_steps=10, train__checkpoint_every=4), tmp_path / "run")
    assert "steps: 8 of 10 done" in capfd.readouterr().err
    # The straight run's, by that version.
    now = rows(tmp_path / "run")
    assert now[9]["train/loss"] == pytest.approx(2.4038, rel=1e-3)
    assert now[10]["train/loss"] == pytest.approx(2.5814, rel=1e-3)
