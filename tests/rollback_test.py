"""Bad steps: what counts as one, and which batches are left out."""

import json
import math

import pytest

from unimat_jax.errors import UserError
from unimat_jax.rollback import LossWatch, Rollbacks


def metrics(loss: float, norm: float = 1.0) -> dict[str, float]:
    return {"train/loss": loss, "train/param_norm": norm}


def test_no_number_is_a_problem_at_once():
    watch = LossWatch(10.0)
    assert watch.problem(metrics(1.0)) == ""
    assert watch.problem(metrics(math.nan)) == "train/loss is nan"
    assert watch.problem(metrics(1.0, math.inf)) == "train/param_norm is inf"


def test_a_loss_far_above_the_usual_is_a_problem():
    watch = LossWatch(10.0)
    assert watch.problem(metrics(50.0)) == ""  # nothing is usual yet
    for _ in range(20):
        assert watch.problem(metrics(2.0)) == ""
    assert watch.problem(metrics(19.9)) == ""
    assert watch.problem(metrics(20.1)) == "train/loss is 20.1, over 10 times the usual 2"
    for _ in range(40):  # slowly, a loss may go anywhere
        assert watch.problem(metrics(15.0)) == ""
    assert watch.problem(metrics(100.0)) == ""
    assert LossWatch(0.0, needed=0).problem(metrics(1e30)) == ""


def add(rollbacks: Rollbacks, first: int, last: int, restored_step: int = 4) -> str:
    ids = {last: ["a", "b"]}
    return rollbacks.add(problem="bad", step=last + 1, restored_step=restored_step, first=first, last=last, ids=ids)


def test_windows_are_skipped_also_after_another_start(tmp_path):
    rollbacks = Rollbacks(tmp_path, 3, True)
    assert rollbacks.skip(4) == 4
    told = add(rollbacks, 4, 9)
    assert told.startswith("step 10: bad; back to step 4, without batches 4 to 9 (try 1 of 3; their ids: ")
    add(rollbacks, 10, 12)
    assert json.loads((tmp_path / "bad_batches" / "step_10_batch_9.json").read_text())["batches"] == [
        {"batch": 9, "material_ids": ["a", "b"]}
    ]
    with (tmp_path / "rollbacks.jsonl").open("a") as file:
        file.write('{"step": 14, "pro')  # a run that was killed while it wrote
    for again in (rollbacks, Rollbacks(tmp_path, 3, True)):
        assert [again.skip(n) for n in (3, 4, 9, 10, 12, 13)] == [3, 13, 13, 13, 13, 13]
    add(Rollbacks(tmp_path, 3, True), 13, 13)
    assert Rollbacks(tmp_path, 3, True).skip(4) == 14


def test_the_same_checkpoint_is_not_tried_for_ever(tmp_path):
    for last in (4, 5, 6):
        add(Rollbacks(tmp_path, 3, True), 4, last)
    assert add(Rollbacks(tmp_path, 3, True), 9, 9, restored_step=8)
    with pytest.raises(UserError, match=r"step 8: bad. It is the 4th time after step 4 \(config.train.max_rollbacks"):
        add(Rollbacks(tmp_path, 3, True), 7, 7)


def test_only_the_first_process_writes(tmp_path):
    rollbacks = Rollbacks(tmp_path, 3, False)
    add(rollbacks, 4, 9)
    assert rollbacks.skip(4) == 10 and not list(tmp_path.iterdir())
