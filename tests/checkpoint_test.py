"""Checkpoints on disk: which are kept, what comes back, and what is said where there is none."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest
from tiny_run import NUM_STEPS, config

from unimat_jax.checkpoint import MODEL_FORMAT, Checkpoints, available_steps, hash_of, load_params, read_run, write_json
from unimat_jax.errors import UserError
from unimat_jax.train import train
from unimat_jax.train_state import TrainState


def state(step: int) -> TrainState:
    params = {"w": jax.numpy.full(3, float(step))}
    return TrainState(jax.numpy.asarray(step), params, params, optax.sgd(1.0).init(params))


def like(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


@pytest.mark.parametrize(
    ("keep", "losses", "kept"),
    [
        (1, {1: 3.0, 2: 1.0, 3: 2.0, 4: None}, [2, 4]),  # best and last
        (1, {1: 3.0, 2: 2.0, 3: 1.0}, [3]),
        (1, {1: None, 2: None}, [2]),
        (2, {1: 0.5, 2: 2.0, 3: None, 4: 1.0}, [1, 3, 4]),
    ],
)
def test_the_last_and_the_best_checkpoints_are_kept(tmp_path, keep, losses, kept):
    """Also by runs that were stopped and went on after every step."""
    for step, loss in losses.items():
        checkpoints = Checkpoints(tmp_path, keep)
        checkpoints.save(state(step), {"next_index": step}, None if loss is None else {"eval/loss": loss, "other": 0.0})
        checkpoints.save(state(step), {"next_index": -1}, None)  # a second time: nothing happens
        checkpoints.close()
    assert available_steps(tmp_path) == kept
    again = Checkpoints(tmp_path, keep)
    assert again.latest_step == max(losses)
    restored, position = again.restore_latest(like(state(0)))
    assert int(restored.step) == max(losses) and position == {"next_index": max(losses)}
    np.testing.assert_array_equal(restored.ema_params["w"], state(max(losses)).params["w"])
    again.close()


def test_params_of_a_step_averaged_or_raw(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=5)
    for step in (1, 2):
        raw = state(step)
        average = {"w": raw.params["w"] + 0.5}
        checkpoints.save(TrainState(raw.step, raw.params, average, raw.opt_state), {}, None)
    checkpoints.close()
    shapes = like(state(0).params)
    found, step, of_average = load_params(tmp_path, shapes)
    assert step == 2 and (found["w"] == 2.5).all()
    found, step, of_raw = load_params(tmp_path, shapes, step=1, ema=False)
    assert step == 1 and (found["w"] == 1.0).all()
    assert of_average != of_raw
    with pytest.raises(UserError, match=r"--step=3: the run has checkpoints at steps \[1, 2\]"):
        load_params(tmp_path, shapes, step=3)


def test_the_hash_tells_values_names_and_shapes():
    a = {"w": np.arange(4.0), "b": np.zeros(2)}
    same = {"b": np.zeros(2), "w": np.arange(4.0)}
    others = [{**a, "w": np.arange(4.0) + 1e-12}, {**a, "w": np.arange(4.0).reshape(2, 2)}, {"w": a["w"], "c": a["b"]}]
    others.append({**a, "w": np.arange(4.0, dtype=np.float32)})
    hashes = [hash_of(tree) for tree in (a, *others)]
    assert hash_of(same) == hashes[0] and len(set(hashes)) == 5 and all(len(h) == 16 for h in hashes)


def test_a_run_is_found_by_its_directory_or_its_checkpoints(trained):
    assert read_run(trained)[0] == read_run(str(trained / "checkpoints"))[0] == trained
    assert available_steps(trained)[-1] == NUM_STEPS


def test_a_folder_of_runs_is_no_run_but_they_are_named(tmp_path):
    (tmp_path / "all" / "model").mkdir(parents=True)
    write_json(tmp_path / "all" / "model" / "model.json", {"format": MODEL_FORMAT})
    with pytest.raises(UserError, match=r"give the --workdir of a training run, as .*/all/model$"):
        read_run(tmp_path / "all")


def test_no_checkpoint_there(tmp_path):
    with pytest.raises(
        UserError, match=r"--checkpoint=.*nothing: no such directory, and no released .*; give the --workdir"
    ):
        read_run(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no checkpoint there \(model.json and checkpoints/ are missing\)"):
        read_run(tmp_path)
    write_json(tmp_path / "model.json", {"format": MODEL_FORMAT})
    with pytest.raises(UserError, match="no checkpoint there"):
        read_run(tmp_path)
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)  # a save that was cut off
    write_json(tmp_path / "config.json", {})
    with pytest.raises(UserError, match="no checkpoint is saved yet"):
        available_steps(read_run(tmp_path)[0])


def test_a_run_of_another_versions_networks_is_refused(trained, tiny_data, tmp_path):
    """By whoever reads it, and by a training that would go on with it."""
    run = shutil.copytree(trained, tmp_path / "run")
    description = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(description | {"format": 1}))
    with pytest.raises(UserError, match=r"other networks \(format 1 in model.json"):
        read_run(run)
    with pytest.raises(UserError, match="other networks"):
        train(config(tiny_data), run)


def test_json_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, 2]})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1, 2]}
