"""Files that are there whole or not at all, whenever the program is killed: written beside, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

UNFINISHED = ".unfinished"


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` on success and is taken away on an error."""
    beside = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented, keys in their order."""
    with written_whole(path) as beside:
        beside.write_text(json.dumps(content, indent=1, sort_keys=False) + "\n", encoding="utf-8")


def write_array(path: Path, array: np.ndarray) -> None:
    """As .npy."""
    with written_whole(path) as beside, beside.open("wb") as file:
        np.save(file, array, allow_pickle=False)
