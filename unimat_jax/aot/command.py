"""`unimat train --mode=compile`: compiles, prints the report and saves it as JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimat_jax.aot.topology import parse_topology

DEFAULT_NAME = "compile_report.json"


def run(
    config: Any, *, topology: str | None, programs: Sequence[str], search: bool, output: str | None, workdir: str | None
) -> dict[str, Any]:
    """The report that is printed and saved. Raises UserError for what the user can change."""
    where = parse_topology(topology)
    path = Path(output) if output else Path(workdir) / DEFAULT_NAME if workdir else None
    # Shapes are all that is computed here: no accelerator of this machine is to be taken for it.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from unimat_jax.checkpoint import write_json

    def save(report: dict[str, Any]) -> None:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, report)

    if search:
        from unimat_jax.aot.search import as_text, find_best, read_saved

        report = find_best(config, where, saved=read_saved(path), save=save, say=_say)
        print(as_text(report))
    else:
        from unimat_jax.aot.program import compile_for
        from unimat_jax.aot.report import as_text

        report = compile_for(config, where, programs=programs, say=_say)
        print(as_text(report))
        save(report)
    if path:
        print(f"saved: {path}", file=sys.stderr)
    return report


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
