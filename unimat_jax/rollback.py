"""What to do when a loss is no number or explodes: back to the last good checkpoint, past the batches that led there.

The windows of batches that are skipped are kept in `rollbacks.jsonl`, so that a run that is killed and started again
skips them too. PaLM (arXiv 2204.02311, section 5.1) got past its loss spikes in this way.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unimat_jax.errors import UserError
from unimat_jax.metric_writer import append_lines

FILE, FOLDER = "rollbacks.jsonl", "bad_batches"


class LossWatch:
    """Says what is wrong with a step's metrics. ratio: a loss above that many times the median of the last ones counts
    as exploded; 0 switches that off."""

    def __init__(self, ratio: float, memory: int = 64, needed: int = 16):
        self._ratio, self._needed = ratio, needed
        self._losses: deque[float] = deque(maxlen=memory)

    def problem(self, metrics: Mapping[str, float]) -> str:
        """ "" where all is well; else what is wrong."""
        bad = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            return ", ".join(bad)
        loss = metrics["train/loss"]
        if self._ratio and len(self._losses) >= self._needed:
            usual = statistics.median(self._losses)
            if loss > self._ratio * usual:
                return f"train/loss is {loss:.4g}, over {self._ratio:g} times the usual {usual:.4g}"
        self._losses.append(loss)
        return ""


class Rollbacks:
    """The rollbacks of a run, those of earlier starts too. A window [first, last] of batch numbers is never used again.

    active: whether this process writes; all processes decide alike, since they see the same metrics.
    """

    def __init__(self, workdir: Path, limit: int, active: bool):
        self._workdir, self._limit, self._active = workdir, limit, active
        path = workdir / FILE
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        self._rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith("\n")]

    def skip(self, position: int) -> int:
        """The first batch number from `position` on that is in no window."""
        for row in sorted(self._rows, key=lambda row: row["first_batch"]):
            if row["first_batch"] <= position <= row["last_batch"]:
                position = row["last_batch"] + 1
        return position

    def add(
        self, *, problem: str, step: int, restored_step: int, first: int, last: int, ids: Mapping[int, Sequence[str]]
    ) -> str:
        """Notes that `step`, on batch `last`, went wrong and the run goes back to `restored_step`, whose next batch was
        `first`; the sentence that tells it. ids: material ids of the suspected batches by number, kept for inspection.
        Raises UserError when that step was restored too often."""
        file = self._workdir / FOLDER / f"step_{step}_batch_{last}.json"
        row = {
            **{"step": step, "problem": problem, "restored_step": restored_step},
            **{"first_batch": first, "last_batch": last, "ids": str(file.relative_to(self._workdir))},
        }
        self._rows.append(row)
        if self._active:
            file.parent.mkdir(exist_ok=True)
            content = {**row, "batches": [{"batch": n, "material_ids": list(i)} for n, i in ids.items()]}
            file.write_text(json.dumps(content, indent=1) + "\n")
            with append_lines(self._workdir / FILE) as rows:
                rows.write(json.dumps(row) + "\n")
        tries = sum(r["restored_step"] == restored_step for r in self._rows)
        if tries > self._limit:
            raise UserError(
                f"step {step}: {problem}. It is the {tries}th time after step {restored_step} "
                f"(config.train.max_rollbacks = {self._limit}): lower config.optimizer.learning_rate, or look at the "
                f"crystals of the batches in {self._workdir / FOLDER}; the checkpoint of step {restored_step} is "
                f"whole, and without {self._workdir / FILE} the run tries all batches again"
            )
        return (
            f"step {step}: {problem}; back to step {restored_step}, without batches {first} to {last} (try {tries} of "
            f"{self._limit}; their ids: {file})"
        )
