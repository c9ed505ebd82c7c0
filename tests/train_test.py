"""The training loop, on a real tiny run: it learns, stops and goes on exactly, and says what is wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from tiny_run import NUM_STEPS

from benchmarks.kills import arrays
from data_prep.prepare import prepare
from unimat_jax import data, train
from unimat_jax.checkpoint import available_steps, read_run
from unimat_jax.errors import UserError
from unimat_jax.run_directory import only_run

# loss and gradient norm of the first steps
GOLDEN = [(1.77037, 0.62335), (2.43748, 1.05933), (2.39791, 1.37678)]
TOLD = """The first steps of the tiny run have other numbers than they had. If you meant to change the model, the loss,
the data or the order of random draws, put the new numbers into GOLDEN of train_test.py and tell it in CHANGELOG.md (an
older run that goes on is then not what it was). If you did not, something changed that should not have:"""


def rows(workdir: Path) -> dict[int, dict]:
    """The metrics of each step; where a step stands twice the last line counts."""
    found: dict[int, dict] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found[row["step"]] = found.get(row["step"], {}) | row
    return found


def dataset_state(workdir: Path, step: int) -> dict:
    return json.loads((workdir / "checkpoints" / str(step) / "dataset" / "metadata").read_text())


def assert_same_checkpoint(a: Path, b: Path, step: int) -> None:
    ours, theirs = arrays(a, step), arrays(b, step)
    assert ours.keys() == theirs.keys() and len(ours) > 100
    different = [name for name in ours if not np.array_equal(ours[name], theirs[name])]
    assert not different, f"{len(different)} of {len(ours)} arrays differ, first {different[0]}"
    assert dataset_state(a, step) == dataset_state(b, step)


def test_two_programs_do_not_train_in_one_workdir(tiny_data, trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    with only_run(workdir):
        told = tiny_run.unimat("train", f"--config={tiny_run.config_file(tmp_path / 'c.py', tiny_data)}",
                               f"--workdir={workdir}")  # fmt: skip
        assert told.returncode == 2 and "another program trains there" in told.stderr, told.stderr
    assert train.train(tiny_run.config(tiny_data), workdir) == train.train(tiny_run.config(tiny_data), workdir)


def test_golden_metrics(trained):
    found = [(rows(trained)[step]["train/loss"], rows(trained)[step]["train/grad_norm"]) for step in (1, 2, 3)]
    np.testing.assert_allclose(found, GOLDEN, rtol=1e-3, err_msg=f"{TOLD}\n{np.round(found, 5).tolist()}")


def test_metrics_of_every_logged_step(trained):
    found = rows(trained)
    assert sorted(found) == list(range(NUM_STEPS + 1))
    assert {step for step in found if "eval/loss" in found[step]} == {0, 6, 12}
    by_time = [name for name in found[6] if name.startswith("eval/x_loss_t")]
    assert len(by_time) == 8
    assert np.mean([found[6][name] for name in by_time]) == pytest.approx(found[6]["eval/x_loss"], rel=1e-5)
    total = found[6]["eval/x_loss"] + found[6]["eval/lattice_loss"]
    assert found[6]["eval/loss"] == pytest.approx(total, rel=1e-5)
    assert [found[step]["learning_rate"] for step in (1, 2, 3)] == pytest.approx([0.0, 1.5e-3, 3e-3])
    assert all(found[step]["examples_per_sec"] > 0 and 0 <= found[step]["data_wait_share"] <= 1 for step in (1, 2, 12))


def test_the_sampled_check(trained):
    """Of four validation compositions, before the first step and after the last."""
    found = rows(trained)
    assert [step for step in found if "sample/decoded" in found[step]] == [0, NUM_STEPS]
    decoded, valid = found[NUM_STEPS]["sample/decoded"], found[NUM_STEPS]["sample/struct_valid"]
    assert {decoded, valid} <= {0.0, 0.25, 0.5, 0.75, 1.0} and valid <= decoded
    assert (found[NUM_STEPS]["sample/min_distance"] > 0.05) == (decoded > 0)


def test_what_a_run_leaves(trained, tiny_data):
    root, config, description = read_run(trained)
    assert root == trained and config == json.loads(json.dumps(tiny_run.config(tiny_data).to_dict()))
    assert description["spec"]["lattice_mean"] and description["condition_schema"][0]["unit"] == "eV/atom"
    params = {name: a for name, a in arrays(trained, NUM_STEPS).items() if name.startswith("['params']")}
    assert description["num_params"] == sum(a.size for a in params.values())
    assert available_steps(trained) in ([6, 12], [12])  # the last, and the best where that is another
    kinds = {path.suffix for path in trained.rglob("*") if path.is_file()}
    assert not kinds & {".pkl", ".pickle"}


@pytest.fixture(scope="module")
def terminated(tiny_data, tmp_path_factory):
    """(workdir, ended process) of the same run as `trained`, by the program, which a SIGTERM stopped in step 5."""
    folder = tmp_path_factory.mktemp("terminated")
    at_step_4 = (
        "import os, signal\nfrom unimat_jax.metric_writer import Progress\n\nreport = Progress.report\n\n"
        "def terminate(self, step, metrics):\n"
        "    if step == 4:  # told while step 5 is under way\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return report(self, step, metrics)\n\nProgress.report = terminate\n"
    )
    config = tiny_run.config_file(folder / "tiny.py", tiny_data, at_step_4)
    done = tiny_run.unimat("train", f"--config={config}", f"--workdir={folder / 'run'}", devices=4)
    return folder / "run", done


def test_a_terminated_run_saves_and_ends_well(terminated):
    workdir, done = terminated
    assert done.returncode == 0, done.stderr
    assert "SIGTERM: saved step 5; the same command goes on from there" in done.stderr
    assert available_steps(workdir) == [5] and sorted(rows(workdir)) == [0, 1, 2, 3, 4, 5]
    assert done.stdout == f"checkpoint: {workdir / 'checkpoints' / '5'}\n"


def test_going_on_is_the_straight_run_bit_for_bit(terminated, trained, tiny_data, tmp_path, capfd):
    workdir = shutil.copytree(terminated[0], tmp_path / "run")
    train.train(tiny_run.config(tiny_data), workdir)
    assert "steps: 5 of 12 done" in capfd.readouterr().err
    assert_same_checkpoint(workdir, trained, NUM_STEPS)
    ours, straight = rows(workdir), rows(trained)
    for step in range(NUM_STEPS + 1):
        for name in ("train/loss", "train/grad_norm", "eval/loss"):
            assert ours[step].get(name) == straight[step].get(name)


def test_a_finished_run_says_so_and_changes_nothing(trained, tiny_data, capfd):
    before = {path: path.stat().st_mtime_ns for path in (trained / "checkpoints").rglob("*")}
    metrics = train.train(tiny_run.config(tiny_data), trained)
    assert f"{trained} is done: step 12 of 12" in capfd.readouterr().err
    assert metrics["eval/loss"] == rows(trained)[NUM_STEPS]["eval/loss"]
    assert {path: path.stat().st_mtime_ns for path in (trained / "checkpoints").rglob("*")} == before


def test_the_training_set_is_evaluated_where_no_validation_crystal_fits(trained, tiny_data, monkeypatch, capfd):
    train.train(tiny_run.config(tiny_data), trained)
    assert "eval loss: on 10 crystals of the validation split\n" in capfd.readouterr().err
    source = data.RecordSource(data.dataset_directory("starter", tiny_data), "validation")
    validation = {record["material_id"] for record in source.read(range(len(source)))}
    monkeypatch.setattr(data, "fits", lambda record, spec: record["material_id"] not in sorted(validation)[:3])
    train.train(tiny_run.config(tiny_data), trained)
    assert (
        "eval loss: on 7 crystals of the validation split; 3 do not fit the model's table or L\n"
        in capfd.readouterr().err
    )
    monkeypatch.setattr(data, "fits", lambda record, spec: record["material_id"] not in validation)
    train.train(tiny_run.config(tiny_data), trained)
    assert "eval loss: on 10 crystals of the train split\n" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model__base_channels": 8}, r"model.base_channels \(4 there, 8 now\)"),
        ({"train__seed": 1, "train__batch_size": 16}, r"train.batch_size .*train.seed \(0 there, 1 now\)"),
        ({"diffusion__prediction_type": "eps"}, r"diffusion.prediction_type \(v there, eps now\)"),
        ({"optimizer__b2": 0.9}, "optimizer.b2"),
    ],
)
def test_another_config_in_the_same_workdir_names_the_field(trained, tiny_data, changes, named):
    before = (trained / "config.json").read_text()
    with pytest.raises(UserError, match=named):
        train.train(tiny_run.config(tiny_data, **changes), trained)
    assert (trained / "config.json").read_text() == before


def test_other_data_of_the_same_name_is_refused(trained, tmp_path):
    prepare("starter", data_dir=tmp_path, max_atoms=5, max_atoms_per_element=3, elements=tiny_run.ELEMENTS,
            niggli=True, split_fractions=(0.7, 0.3, 0), num_workers=0, quiet=True)  # fmt: skip
    with pytest.raises(UserError, match=r"other data of the name 'starter'.*spec.*--workdir"):
        train.train(tiny_run.config(tmp_path), trained)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diffusion__prediction_type": "score"}, r"config.diffusion.prediction_type = 'score'.*eps.*x0.*v"),
        ({"diffusion__counts_share": 0.9}, r"counts_share.*\(0.9, 0.25\).*at most 1"),
        ({"diffusion__counts_share": -0.1}, r"counts_share"),
        ({"train__batch_size": 6}, r"config.train.batch_size = 6 .* 4 devices"),
        ({"train__batch_size": 0}, r"config.train.batch_size = 0"),
        ({"train__num_steps": 0}, r"config.train.num_steps = 0"),
        ({"train__log_every": 0}, r"config.train.log_every = 0"),
        ({"train__eval_examples": 0}, r"config.train.eval_examples = 0"),
        ({"train__fsdp": 3}, r"train.fsdp = 3 .* 4 devices"),
        ({"sample__num_steps": 0}, r"config.sample.num_steps = 0"),
        ({"sample__composition_min_p": 1.0}, r"config.sample.composition_min_p = 1.0: give a share"),
        ({"sample__method": "euler"}, r"config.sample.method .* = 'euler'.*ancestral.*ddim"),
        ({"optimizer__schedule": "step"}, r"config.optimizer.schedule = 'step'"),
        ({"optimizer__name": "muon"}, r"config.optimizer.name = 'muon' with config.model.name = 'unet3d': take 'adam'"),
        ({"model__name": "transformer"}, r"config.model.name = 'transformer'.*unet3d"),
        ({"data__dataset": "mine"}, r"no data set 'mine'.*unimat prepare"),
        ({"data__properties": ("gap",)}, r"config.data.properties has 'gap'"),
        ({"data__table": "Li,O"}, r"config.data.table = 'Li,O' has no place for"),
    ],
)
def test_a_bad_value_is_named_before_anything_is_made(tiny_data, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train.train(tiny_run.config(tiny_data, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
