"""`unimat doctor`: what this machine and installation can do, and what to do about what they cannot.

Works where next to nothing else does: it imports jax only in a process of its own, with a time limit (`probe.py`).
"""

from __future__ import annotations

import dataclasses

STATUSES = ("ok", "warning", "problem")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the doctor. fix: what to do, "" where nothing is to be done."""

    status: str
    check: str
    found: str
    fix: str = ""

    def __post_init__(self):
        assert self.status in STATUSES
