"""metrics.jsonl and the line of progress."""

import json
import math

import pytest

from unimat_jax import metric_writer
from unimat_jax.metric_writer import MetricWriter, Progress, format_seconds


def test_lines_are_appended_and_are_json(tmp_path):
    for step in (1, 2):  # a rerun goes on in the same file
        writer = MetricWriter(tmp_path)
        writer.write(step, {"train/loss": 0.5 * step, "bad": math.nan, "worse": -math.inf})
        writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in lines]
    assert [row["step"] for row in rows] == [1, 2] and [row["train/loss"] for row in rows] == [0.5, 1.0]
    assert all(row["bad"] is None and row["worse"] is None and row["time"] > 1e9 for row in rows)


def test_a_line_is_on_disk_at_once(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(3, {"loss": 1})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 1.0
    writer.close()


def test_only_the_first_process_writes(tmp_path):
    writer = MetricWriter(tmp_path, active=False)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599.7, "1:00:00"),
        (3723, "1:02:03"),
        (90000, "25:00:00"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

        def time(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(metric_writer, "time", clock)
    return clock


def test_progress_tells_rate_wait_and_the_time_left(clock, capsys):
    progress = Progress(num_steps=110, batch_size=32, start_step=10)
    progress.waited(1.0)
    clock.now += 4.0
    rates = progress.report(30, {"train/loss": 0.25, "train/grad_norm": 2.0})
    assert rates == {"examples_per_sec": pytest.approx(20 * 32 / 4), "data_wait_share": pytest.approx(0.25)}
    line = capsys.readouterr().err
    assert "step 30/110" in line and "loss 0.2500" in line and "grad_norm 2.0000" in line
    assert "160 examples/s" in line and "data wait 25.0%" in line and "ETA 0:16" in line
    clock.now += 1.0
    rates = progress.report(40, {})  # the second window alone: nothing was waited for in it
    assert rates == {"examples_per_sec": pytest.approx(320.0), "data_wait_share": 0.0}


def test_progress_leaves_out_what_is_no_training(clock, capsys):
    progress = Progress(num_steps=100, batch_size=10, start_step=0)
    clock.now += 2.0
    progress.left_out(50.0)  # an evaluation, a compilation
    clock.now += 50.0
    assert progress.report(4, {})["examples_per_sec"] == pytest.approx(20.0)
    clock.now += 2.0
    assert progress.report(8, {})["examples_per_sec"] == pytest.approx(20.0)


def test_progress_of_another_process_is_silent(clock, capsys):
    clock.now += 1
    Progress(10, 1, 0, active=False).report(5, {"loss": 1.0})
    assert capsys.readouterr().err == ""
