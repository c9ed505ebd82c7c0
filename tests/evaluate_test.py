"""`unimat evaluate` end to end, on real crystals: files, numbers, comparisons, and what users get wrong."""

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from unimat_jax import evaluate
from unimat_jax.cli import run_program
from unimat_jax.crystal import Crystal
from unimat_jax.evaluation import outputs
from unimat_jax.structure_files import read_structures

NUMBER = 8
STARTER = Path(evaluate.__file__).parent / "starter" / "starter.npz"


def crystals():
    """Small crystals of the embedded set: a reference, the same rattled, and one that is broken."""
    small = (c for c in read_structures(STARTER) if isinstance(c, Crystal) and c.num_atoms <= 4)
    chosen = list(itertools.islice(small, 2 * NUMBER))
    rng = np.random.default_rng(0)
    rattled = [
        Crystal.create(c.atomic_numbers, c.frac_coords + 0.01 * rng.normal(size=(c.num_atoms, 3)), c.lattice, f"g{i}")
        for i, c in enumerate(chosen[:NUMBER])
    ]
    return chosen[:NUMBER], chosen[NUMBER:], rattled


def extxyz(path, structures, energies=None, references=None):
    texts = []
    for i, crystal in enumerate(structures):
        properties = {"e_above_hull": energies[i]} if energies else {}
        text = Crystal(
            crystal.atomic_numbers, crystal.frac_coords, crystal.lattice, crystal.uid, properties
        ).to_extxyz()
        if references:
            text = text.replace(f"uid={crystal.uid}", f"uid={crystal.uid} reference_uid={references[i]}")
        texts.append(text)
    path.write_text("".join(texts))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    reference, training, rattled = crystals()
    energies = [0.0, 0.05, 0.3, float("nan")] * (NUMBER // 4)
    return {
        "reference": extxyz(folder / "reference.extxyz", reference),
        "train": extxyz(folder / "train.extxyz", training + rattled[:2]),
        "generated": extxyz(folder / "generated.extxyz", rattled, energies, [c.uid for c in reference]),
        "folder": folder,
    }


@pytest.fixture(scope="module")
def cdvae(files):
    out = files["folder"] / "cdvae"
    arguments = [f"--structures={files['generated']}", f"--reference={files['reference']}", f"--train={files['train']}"]
    assert run_program(evaluate.main, [*arguments, f"--output_dir={out}", "--num_workers=0"]) == 0
    return out


def test_metrics_have_all_that_a_reader_needs(cdvae):
    values = json.loads((cdvae / outputs.METRICS).read_text())
    metrics = values["metrics"]
    assert metrics["struct_valid"]["value"] == 1.0 and metrics["struct_valid"]["n"] == NUMBER
    assert 0 < metrics["cov_recall"]["value"] <= 1 and metrics["cov_recall"]["definition"]
    assert metrics["wdist_density"]["value"] < 0.05 and "fewer than" in metrics["wdist_density"]["note"]
    assert metrics["unique"]["value"] <= 1 and metrics["novel"]["value"] == pytest.approx(1 - 2 / NUMBER)
    assert set(values["comparison"]) == {"training set", "random coordinates"}
    assert values["comparison"]["random coordinates"]["amsd_precision"]["value"] > metrics["amsd_precision"]["value"]
    assert values["comparison"]["training set"]["novel"]["value"] == 0.0
    assert "novel" not in values["comparison"]["random coordinates"]  # they cost an hour with carbon
    for name in ("spec", "tolerances", "cutoffs", "packages", "reference_hash", "structures_hash", "raw_or_relaxed"):
        assert values[name], name
    assert sum(values["status"].values()) == NUMBER


def test_a_row_a_structure_in_both_tables(cdvae):
    table = pyarrow.parquet.read_table(cdvae / outputs.PARQUET).to_pylist()
    with (cdvae / outputs.CSV).open(newline="") as file:
        texts = list(csv.DictReader(file))
    assert [row["uid"] for row in table] == [row["uid"] for row in texts] == [f"g{i}" for i in range(NUMBER)]
    for row in table:
        assert row["valid"] in (True, False) and row["nearest_uid"] and row["nearest_distance"] >= 0
        assert row["space_group_number_loose"] >= 1 and row["chemical_system"]
    assert [row["novel"] for row in table[:3]] == [False, False, True] and table[0]["known_uid"] == "g0"


def test_the_report_is_one_page_with_everything(cdvae):
    page = (cdvae / outputs.REPORT).read_text()
    assert "cov_recall" in page and "g7" in page and "random coordinates" in page
    assert "https://cdn" not in page


def test_order_changes_nothing(files, cdvae):
    text = files["generated"].read_text()
    frames, lines = [], text.splitlines(keepends=True)
    while lines:
        size = int(lines[0]) + 2
        frames.append("".join(lines[:size]))
        lines = lines[size:]
    shuffled = files["folder"] / "shuffled.extxyz"
    shuffled.write_text("".join(frames[i] for i in np.random.default_rng(1).permutation(len(frames))))
    out = files["folder"] / "again"
    scored = evaluate.evaluate(
        [shuffled], reference=[files["reference"]], train=[files["train"]], output_dir=out, num_workers=0
    )
    before = json.loads((cdvae / outputs.METRICS).read_text())
    after = json.loads((out / outputs.METRICS).read_text())
    assert before["structures_hash"] == after["structures_hash"]
    for name, metric in scored.metrics.items():
        expected = before["metrics"][name]["value"]
        assert metric.value == (expected if expected is None else pytest.approx(expected, abs=1e-9)), name


def odd_structures():
    """(uid, extxyz frame): every element, and shapes that no real crystal has."""
    rng = np.random.default_rng(0)
    cell = 4.0 * np.eye(3)
    crystals = [Crystal.create([z], [[0, 0, 0]], cell, f"element-{z}") for z in range(1, 119)]
    crystals += [
        Crystal.create([11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]], np.diag([0.5, 0.5, 300.0]), "needle"),
        Crystal.create([6, 8], [[0, 0, 0], [0, 0, 1e-7]], cell, "overlap"),
        Crystal.create([2, 10, 18], rng.random((3, 3)), cell, "noble gases"),
        Crystal.create([8, 86, 54], rng.random((3, 3)), cell, "no electronegativity"),
        Crystal.create(rng.integers(1, 95, 200), rng.random((200, 3)), 14 * np.eye(3), "two hundred atoms"),
        Crystal.create([6], [[0, 0, 0]], 0.4 * np.eye(3), "tiny"),
        Crystal.create([6, 6], [[0, 0, 0], [0.5, 0.5, 0.5]], 200 * np.eye(3), "vast"),
    ]
    frames = [(c.uid, c.to_extxyz()) for c in crystals]
    broken = frames[0][1].replace("element-1", "nan").replace("0.00000000", "nan", 1)
    return [*frames, ("nan", broken), ("cut", frames[1][1].replace("element-2", "cut").replace("1\n", "7\n", 1))]


def test_odd_structures_have_a_status_each_and_stay_in_the_denominator(tmp_path, files):
    frames = odd_structures()
    path = tmp_path / "odd.extxyz"
    path.write_text("".join(text for _, text in frames))
    scored = evaluate.evaluate(
        [path], reference=[files["reference"]], output_dir=tmp_path / "out", baseline_samples=0, num_workers=0
    )
    rows = {m.row["uid"]: m.row for m in scored.measured}
    assert len(rows) == len(frames) and all(row["status"] for row in rows.values())
    assert scored.metrics["struct_valid"].n == scored.metrics["comp_valid"].n == len(frames)
    assert rows["overlap"]["struct_reason"] == "atoms_too_close" and rows["tiny"]["struct_reason"] == "volume_too_small"
    assert not rows["needle"]["struct_valid_strict"] and rows["vast"]["strict_reason"] == "density_out_of_range"
    assert rows["no electronegativity"]["comp_valid"] is False
    assert sum(m.crystal is None for m in scored.measured) == 2
    assert json.loads((tmp_path / "out" / outputs.METRICS).read_text())["num_failures"] == 2


def test_csp_pairs_by_reference_uid(files):
    out = files["folder"] / "csp"
    scored = evaluate.evaluate(
        [files["generated"]], reference=[files["reference"]], spec="csp", output_dir=out, num_workers=0
    )
    assert scored.metrics["match_rate"].value == 1.0
    assert 0 < scored.metrics["rms_dist"].value < 0.2
    assert {m.row["reference_uid"] for m in scored.measured} == {c.uid for c in crystals()[0]}


def test_references_without_a_prediction_count_unless_left_out(files, capsys):
    lines = files["generated"].read_text().splitlines(keepends=True)
    half, total = [], 0
    while total < NUMBER // 2:
        size = int(lines[0]) + 2
        half, lines, total = half + lines[:size], lines[size:], total + 1
    path = files["folder"] / "half.extxyz"
    path.write_text("".join(half))
    rates = {}
    for only in (False, True):
        scored = evaluate.evaluate(
            [path], reference=[files["reference"]], spec="csp", output_dir=files["folder"] / f"half-{only}",
            only_predicted=only, with_metre=not only, baseline_samples=0, num_workers=0,
        )  # fmt: skip
        rates[only] = scored.metrics["match_rate"].value
        assert ("metre" in scored.metrics) == ("crmse" in scored.metrics) == (not only)
    assert rates == {False: 0.5, True: 1.0}
    assert f"{NUMBER // 2} of {NUMBER} references have no prediction" in capsys.readouterr().err


def test_energies_give_sun(files):
    out = files["folder"] / "sun"
    scored = evaluate.evaluate(
        [files["generated"]], train=[files["train"]], spec="lemat", e_above_hull="e_above_hull", output_dir=out,
        num_workers=0,
    )  # fmt: skip
    assert scored.metrics["sun"].value is not None
    assert scored.metrics["sun"].value < scored.metrics["un"].value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--spec=cdvae"], "--spec=cdvae needs --reference"),
        (["--spec=dng"], "--spec=dng needs --train=PATH or --known=PATH"),
        (["--spec=magic"], "magic"),
        (["--reference=nowhere.cif"], "nowhere.cif does not exist"),
        (["--reference={reference}", "--cutoffs=1"], "--cutoffs=1: write two numbers"),
        (
            ["--train={train}", "--spec=dng", "--e_above_hull=ehull"],
            "--e_above_hull=ehull: no structure has that column",
        ),
        (["--reference={train}", "--spec=csp"], "which --reference does not hold"),
    ],
)
def test_what_a_user_can_mend_is_one_line(files, tmp_path, capsys, arguments, message):
    arguments = [a.format(**files) for a in arguments]
    flags = [f"--structures={files['generated']}", f"--output_dir={tmp_path / 'out'}", "--num_workers=0"]
    assert run_program(evaluate.main, [*flags, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_what_is_there_is_not_touched_unasked(files, cdvae, tmp_path, capsys):
    flags = [f"--structures={files['generated']}", f"--reference={files['reference']}", "--num_workers=0"]
    assert run_program(evaluate.main, [*flags, f"--output_dir={cdvae}"]) == 2
    assert "not empty" in capsys.readouterr().err
    (tmp_path / "mine").write_text("dear diary")
    assert run_program(evaluate.main, [*flags, f"--output_dir={tmp_path}", "--overwrite"]) == 2
    assert (tmp_path / "mine").read_text() == "dear diary"
