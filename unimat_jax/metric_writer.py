"""Metrics of a run: JSON lines always, TensorBoard where tensorboardX is installed, one line of progress for people."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO


def append_lines(path: Path) -> TextIO:
    """Opens a file of lines to go on with; half a line that a killed run left at its end is cut off."""
    if path.exists():
        with path.open("r+b") as file:
            start = max(file.seek(0, os.SEEK_END) - 2**20, 0)
            file.seek(start)
            file.truncate(start + file.read().rfind(b"\n") + 1)
    return path.open("a")


class MetricWriter:
    """Appends to `metrics.jsonl`; only the first process writes. A rerun goes on in the same file: where a step stands
    twice the last line counts."""

    def __init__(self, workdir: Path, active: bool = True):
        self._file = append_lines(workdir / "metrics.jsonl") if active else None
        self._board = None
        if active:
            try:
                from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

                self._board = SummaryWriter(str(workdir / "tensorboard"))
            except ImportError:
                pass

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._file is None:
            return
        values = {k: (float(v) if math.isfinite(v) else None) for k, v in metrics.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 1), **values}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if self._board is not None:
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


class Progress:
    """Rates since the last call of `report`, and the time that the run will still take."""

    def __init__(self, num_steps: int, batch_size: int, start_step: int, active: bool = True):
        self._num_steps, self._batch_size, self._active = num_steps, batch_size, active
        self._last, self._last_step = time.monotonic(), start_step
        self._waited = 0.0

    def waited(self, seconds: float) -> None:
        """Counts time that the device had to wait for data."""
        self._waited += seconds

    def left_out(self, seconds: float) -> None:
        """Leaves time that was no training (compilation, an evaluation, a checkpoint) out of the rates."""
        self._last += seconds

    def restart(self, step: int) -> None:
        """The run went back to `step`."""
        self._last, self._last_step, self._waited = time.monotonic(), step, 0.0

    def report(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Prints the progress line and returns examples per second and the share of time spent waiting for data."""
        now = time.monotonic()
        elapsed = max(now - self._last, 1e-9)
        rate = max(step - self._last_step, 1) / elapsed
        rates = {
            "examples_per_sec": rate * self._batch_size,
            "data_wait_share": min(self._waited / elapsed, 1.0),
        }
        remaining = (self._num_steps - step) / rate
        if self._active:
            shown = "  ".join(f"{name.split('/')[-1]} {value:.4f}" for name, value in metrics.items())
            line = f"step {step}/{self._num_steps}  {shown}  {rates['examples_per_sec']:.0f} examples/s"
            line += f"  data wait {rates['data_wait_share']:.1%}  ETA {format_seconds(remaining)}"
            print(line, file=sys.stderr, flush=True)
        self._last, self._last_step, self._waited = now, step, 0.0
        return rates


def format_seconds(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
