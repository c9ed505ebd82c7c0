"""report.html: one file that shows an evaluation, without network and without a server.

The page is a template with our style and scripts, 3Dmol.js (`report_assets/`) and the data as JSON. Its scripts write
values as text and never as HTML, and its Content-Security-Policy admits those scripts by their hash and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path

from unimat_jax.evaluation.report_data import MetricRow, ReportData, payload

__all__ = ["MetricRow", "ReportData", "write_report"]

MAX_STRUCTURES = 1000
ASSETS = Path(__file__).parent / "report_assets"
VIEWER = "3Dmol-min.js"
SCRIPTS = ("page.js", "headline.js", "histograms.js", "elements.js", "table.js", "geometry.js", "viewer.js", "main.js")
"""In this order in one script of the page."""


def write_report(path: Path, data: ReportData, *, max_structures: int = MAX_STRUCTURES) -> None:
    """Writes the page to `path` (its directory is made if absent), replacing what is there.

    The first `max_structures` rows with a crystal carry their atoms in the page (fewer, if cells are so large that they
    hold more than `report_data.MAX_ATOMS`); the other rows stand in its table only, and the page says so.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(data, max_structures), encoding="utf-8")


def render(data: ReportData, max_structures: int = MAX_STRUCTURES) -> str:
    """The page as HTML."""
    style = _asset("page.css")
    viewer, script = _asset(VIEWER), "\n".join(_asset(name) for name in SCRIPTS)
    policy = [
        "default-src 'none'",
        f"script-src {_digest(viewer)} {_digest(script)}",
        f"style-src {_digest(style)}",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    parts = {
        "policy": "; ".join(policy),
        "title": html.escape(data.title),
        "style": style,
        "data": as_json(payload(data, max_structures)),
        "viewer": viewer,
        "licences": html.escape(_asset("3Dmol-licences.txt")),
        "script": script,
    }
    # In one pass: a title that reads "{{data}}" stays what it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("page.html"))


def as_json(value: object) -> str:
    """JSON that can stand in a <script> element: no text in it can close the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """The source expression that admits this text in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
