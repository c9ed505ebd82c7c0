"""A small run of benchmarks/fuzz.py, and the proof that it would notice a bug."""

import pytest

from benchmarks.fuzz import fuzz
from data_prep import parse_pool
from unimat_jax import structure_files

IN_THIS_PROCESS = {"num_workers": 0, "time_limit": 60.0}


def test_damaged_files_end_in_crystals_or_reasons():
    result = fuzz(270, 7, **IN_THIS_PROCESS)
    assert result["passed"], result["bugs"]
    for kind, files in result["files_by_format"].items():
        assert files["files"] == 30 and files["all rejected"] > 2, kind
        assert files.get("all accepted", 0) + files.get("both", 0) > 0, kind


def test_undamaged_files_are_all_accepted():
    result = fuzz(90, 8, **IN_THIS_PROCESS, damages=0)
    assert result["passed"], result["bugs"]
    assert all(files == {"files": 10, "all accepted": 10} for files in result["files_by_format"].values())


@pytest.mark.parametrize(
    ("module", "name", "bug"),
    [(parse_pool, "encode", "internal_error"), (structure_files, "_refuse_member", "scan_raised")],
)
def test_an_unexpected_exception_is_a_bug(module, name, bug, monkeypatch):
    def fails(*_):
        raise KeyError("unexpected")

    monkeypatch.setattr(module, name, fails)
    result = fuzz(9, 9, **IN_THIS_PROCESS, damages=0)
    assert not result["passed"] and result["bug_counts"][bug] >= 1
