"""The same records from Apache Beam, on its runner for one machine, as from the stages without it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from build_test import numbers

from benchmarks.build_kills import contents, write_source
from data_prep.prepare import prepare
from data_prep.shards import SPLITS
from unimat_jax.data import RecordSource
from unimat_jax.errors import UserError

RUNNER = "runner=DirectRunner"
OPTIONS = {"part_size": 150, "num_shards": 3, "quiet": True}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "crystals", 300)


@pytest.fixture(scope="module")
def both(source, tmp_path_factory) -> tuple[Path, Path]:
    pytest.importorskip("apache_beam", reason="the extra 'beam' is not installed")
    folder = tmp_path_factory.mktemp("both")
    peace = prepare("crystals", source, folder / "here", num_workers=0, **OPTIONS)
    return prepare("crystals", source, folder / "beam", beam_pipeline_options=RUNNER, **OPTIONS), peace


def test_the_records_and_their_order_are_the_same(both):
    for split in SPLITS:
        ours, expected = (RecordSource(directory, split) for directory in both)
        assert len(ours) == len(expected) > 0
        for a, b in zip(ours.read(range(len(ours))), expected.read(range(len(expected))), strict=True):
            assert (a["material_id"], a["properties"]) == (b["material_id"], b["properties"])
            for name in ("slots", "frac_coords", "lattice"):
                np.testing.assert_array_equal(a[name], b[name])


def test_what_lies_beside_is_the_same(both):
    ours, expected = map(contents, both)
    for name in ("statistics.json", "dropped.jsonl", "features.json", "metadata.json", "LICENSE"):
        assert ours.get(name) == expected.get(name), name
    reports = [json.loads(found["data_report.json"]) for found in (ours, expected)]
    assert [(r["kept"], r["dropped"], r["changed"], r["options"]) for r in reports[:1]] == [
        (r["kept"], r["dropped"], r["changed"], r["options"]) for r in reports[1:]
    ]
    assert numbers(reports[0]["splits"]) and not (both[0].parent / "1.0.0.parsing").exists()


def test_a_beam_build_that_was_stopped_goes_on(both, source, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.prepare.build_with_tfds", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare("crystals", source, tmp_path, beam_pipeline_options=RUNNER, **OPTIONS)
    monkeypatch.setattr("data_prep.beam._parse_part", stop)  # nothing is parsed again
    again = prepare("crystals", source, tmp_path, beam_pipeline_options=RUNNER, **OPTIONS)
    assert contents(again) == contents(both[0])


def test_a_runner_that_does_not_exist():
    pytest.importorskip("apache_beam", reason="the extra 'beam' is not installed")
    with pytest.raises(UserError, match="runner=Nonsense"):
        prepare("starter", beam_pipeline_options="runner=Nonsense")


def test_without_beam_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"needs Apache Beam.*unimat-jax\[beam\]"):
        prepare("starter", beam_pipeline_options=RUNNER)
