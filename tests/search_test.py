"""`unimat search`: compositions, a real tiny comparison of a checkpoint with random search, and its arithmetic."""

import csv
import json
import math
from collections import Counter

import numpy as np
import pyarrow.parquet
import pytest

pytest.importorskip("pyxtal")
pytest.importorskip("ase_ga")

from unimat_jax import search
from unimat_jax.cli import run_program
from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluation.entries import read_entries
from unimat_jax.evaluation.outputs import CSV, PARQUET
from unimat_jax.periodic_table import atomic_number
from unimat_jax.search_compositions import compositions, reduced
from unimat_jax.stability.comparison import ENERGY
from unimat_jax.stability.search_results import best_metrics, curves, known_metrics, method_metrics
from unimat_jax.structure_files import MANIFEST

NOBLE = ["--energy_model=stability_calculators:Noble", "--energy_scale=own"]


def run(*flags):
    return run_program(search.main, [str(flag) for flag in flags])


def salt(symbols, uid, a=5.6):
    """Rock salt's cell of two atoms."""
    numbers = [atomic_number(symbol) for symbol in symbols]
    return Crystal.create(numbers, [[0, 0, 0], [0.5, 0.5, 0.5]], a / 2 * (np.ones((3, 3)) - np.eye(3)), uid)


@pytest.fixture
def files(tmp_path):
    known = [salt(["Na", "Cl"], "halite"), salt(["K", "Cl"], "sylvite"), salt(["Cl", "Na"], "again"),
             salt(["Li", "F"], "griceite", 4.0)]  # fmt: skip
    (tmp_path / "known.extxyz").write_text("".join(crystal.to_extxyz() for crystal in known))
    (tmp_path / "train.extxyz").write_text(salt(["K", "Cl"], "b1", 6.3).to_extxyz())
    return tmp_path


def test_each_composition_comes_once_and_not_those_of_the_training_set(files):
    found = compositions(None, str(files / "known.extxyz"), not_in=[str(files / "train.extxyz")])
    assert [(c.formula, c.uid, c.counts) for c in found] == [
        ("NaCl", "halite", {11: 1, 17: 1}), ("LiF", "griceite", {3: 1, 9: 1}),
    ]  # fmt: skip
    assert reduced({38: 2, 22: 2, 8: 6}) == reduced({8: 3, 22: 1, 38: 1}) != reduced({8: 2, 22: 1, 38: 1})
    cells = compositions("Sr2Ti2O6, Na2Cl2,SrTiO3", None)
    assert [c.formula for c in cells] == ["Sr2Ti2O6", "Na2Cl2"] and cells[0].reduced_formula == "SrTiO3"
    assert cells[0].counts == {38: 2, 22: 2, 8: 6}
    drawn = [[c.uid for c in compositions(None, str(files / "known.extxyz"), number=2, seed=seed)] for seed in range(9)]
    assert drawn[0] == [c.uid for c in compositions(None, str(files / "known.extxyz"), number=2)]
    assert len({tuple(uids) for uids in drawn}) > 1


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--candidates=2"], "give --formula or --compositions_from"),
        (["--formula=NaCl", "--candidates=0"], "--candidates=0: must be positive"),
        (["--formula=NaCl", "--checkpoint=run"], "--checkpoint and --energy_model go together"),
        (["--formula=NaCl", "--max_soft_calls=150"], "must be positive and below --max_force_calls=150"),
        (["--formula=NaCl", "--relax_known"], "--relax_known is for a comparison"),
        (["--compositions_from={files}/known.extxyz", "--num_compositions=4"], "there are 3 to draw from"),
        (["--compositions_from={files}/train.extxyz", "--not_in={files}/train.extxyz"], "are in it"),
    ],
)
def test_users_errors(files, flags, text, capsys):
    assert run(*(flag.format(files=files) for flag in flags), f"--output_dir={files / 'out'}") == 2
    assert text in capsys.readouterr().err


def test_random_search_alone_writes_what_unimat_stability_reads(tmp_path, capsys):
    flags = ["--formula=NaCl,Xe", "--candidates=3", "--num_workers=0", f"--output_dir={tmp_path / 'out'}"]
    assert run(*flags) == 0
    assert "2 compositions, 3 candidates each: 3 ok, 3 no_volume" in capsys.readouterr().out
    entries = read_entries(tmp_path / "out", progress=False)
    assert [bool(entry.crystal) for entry in entries] == 3 * [True] + 3 * [False]
    before = (tmp_path / "out" / MANIFEST).read_bytes()
    assert run(*flags) == 2 and "add --resume or --overwrite" in capsys.readouterr().err
    assert run(*flags, "--resume", "--seed=1") == 2 and "begun with another seed" in capsys.readouterr().err
    assert run(*flags, "--resume") == 0 and (tmp_path / "out" / MANIFEST).read_bytes() == before
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.txt").write_text("mine")
    assert run(*flags[:-1], f"--output_dir={tmp_path / 'else'}", "--overwrite") == 2
    assert (tmp_path / "else" / "thesis.txt").read_text() == "mine"


@pytest.fixture(scope="module")
def compared(trained, tmp_path_factory):
    """A comparison in pieces of two compositions, killed after the first and gone on with."""
    folder = tmp_path_factory.mktemp("search")
    known = [salt(["Na", "Cl"], "halite"), salt(["K", "Cl"], "sylvite"), salt(["Li", "F"], "griceite", 4.0)]
    (folder / "known.extxyz").write_text("".join(crystal.to_extxyz() for crystal in known))
    flags = [f"--checkpoint={trained}", f"--compositions_from={folder / 'known.extxyz'}", *NOBLE, "--candidates=4",
             "--max_force_calls=40", "--max_soft_calls=10", "--relax_known", f"--output_dir={folder / 'out'}",
             "--num_workers=0"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "PIECE", 2)
        patch.setattr(search, "write_results", stop_after(1))
        with pytest.raises(InterruptedError):
            search.main(flags)
        patch.undo()
        patch.setattr(search, "PIECE", 2)
        begun = json.loads((folder / "out" / "search.json").read_text())
        journal = folder / "out" / "pieces" / "000" / "model" / "relaxations.jsonl"
        finished = journal.read_bytes()
        assert search.main([*flags, "--resume"]) == 0
        assert journal.read_bytes() == finished, "nothing is relaxed twice"
    return folder / "out", begun


def stop_after(number):
    """write_results, after which the program ends at the `number`th call."""
    calls = []
    original = search.write_results

    def write(*arguments):
        calls.append(original(*arguments))
        if len(calls) == number:
            raise InterruptedError
        return calls[-1]

    return write


def test_every_candidate_of_both_methods_is_in_the_table(compared):
    folder, begun = compared
    rows = pyarrow.parquet.read_table(folder / PARQUET).to_pylist()
    assert len(rows) == 2 * 3 * 4 == len(list(csv.DictReader((folder / CSV).open())))
    assert Counter(row["method"] for row in rows) == {"model": 12, "random": 12}
    assert Counter((row["composition"], row["formula"]) for row in rows) == {
        (0, "NaCl"): 8, (1, "KCl"): 8, (2, "LiF"): 8,
    }  # fmt: skip
    result = json.loads((folder / "search.json").read_text())
    for method in ("model", "random"):
        mine = [row for row in rows if row["method"] == method]
        assert [row["candidate"] for row in mine] == 3 * [0, 1, 2, 3]
        assert result["methods"][method]["status"] == dict(Counter(row["status"] for row in mine).most_common())
    assert begun["num_compositions"] == 2 and result["num_compositions"] == 3
    assert result["known"]["status"] == {"converged": 3}


def test_both_keep_the_same_budget_soft_spheres_included(compared):
    folder, _ = compared
    rows = pyarrow.parquet.read_table(folder / PARQUET).to_pylist()
    assert max(row["force_calls"] for row in rows) <= 40
    randoms = [row for row in rows if row["method"] == "random"]
    assert all(1 <= row["soft_calls"] <= 10 for row in randoms)
    assert all(row["force_calls"] >= row["soft_calls"] for row in randoms)
    assert sum(row["status"] == "converged" for row in randoms) > 6, "Lennard-Jones crystals come to rest"
    result = json.loads((folder / "search.json").read_text())
    assert "39 steps" in result["protocols"]["model"] and "29 steps" in result["protocols"]["random"]


def test_the_results_are_those_of_the_rows(compared):
    folder, _ = compared
    rows = pyarrow.parquet.read_table(folder / PARQUET).to_pylist()
    result = json.loads((folder / "search.json").read_text())
    for method in ("model", "random"):
        for i, composition in enumerate(result["compositions"]):
            energies = [row[ENERGY] for row in rows
                        if (row["method"], row["composition"], row["status"]) == (method, i, "converged")]  # fmt: skip
            assert composition[method] == (min(energies) if energies else None)
        last = result["curves"][method][-1]
        mine = [row for row in rows if row["method"] == method]
        assert last["candidates"] == 4 and last["force_calls"] == pytest.approx(sum(r["force_calls"] for r in mine) / 3)
    assert result["generation"]["random"]["made"] == 12 and result["generation"]["model"]["candidates"] == 12
    assert all(composition["known"] < 0 for composition in result["compositions"])


def row(method, composition, candidate, energy):
    status = "not_converged" if energy is None else "converged"
    seconds = {"cpu_seconds": 1.0, "generation_cpu_seconds": 0.5, "soft_cpu_seconds": None}
    return {"method": method, "composition": composition, "candidate": candidate, "status": status, ENERGY: energy,
            "force_calls": 10, "volume_change": 0.1, **seconds}  # fmt: skip


MODEL_ENERGIES = [(-1.0, -2.0), (-1.0005, None), (None, None), (-3.0, -3.0)]
RANDOM_ENERGIES = [(-1.5, None), (None, -1.0), (-1.0, -1.0), (-3.2, -3.3)]
MODEL, RANDOM = (
    [row(method, i, j, energy) for i, pair in enumerate(energies) for j, energy in enumerate(pair)]
    for method, energies in (("model", MODEL_ENERGIES), ("random", RANDOM_ENERGIES))
)


def test_who_wins():
    found = best_metrics(MODEL, RANDOM, 4)
    values = {name: metric.value for name, metric in found.items()}
    differences = [-0.5, -0.0005, 0.3]
    assert values["best_difference_mean"] == pytest.approx(np.mean(differences))
    assert values["best_difference_median"] == pytest.approx(-0.0005)
    assert found["best_difference_mean"].n == 3 and found["best_difference_mean"].failures == 1
    assert [values[name] for name in ("model_wins", "tie", "random_wins")] == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert values["only_model"] == 0 and values["only_random"] == 0.25


def test_convergence_and_known_crystals():
    metrics = method_metrics(MODEL, 4)
    assert metrics["composition_converged"].value == 0.75 and metrics["converged"].value == 5 / 8
    known = {i: {"status": "converged", ENERGY: energy} for i, energy in enumerate((-1.5, -1.0, -1.0))}
    known[3] = {"status": "exploded", ENERGY: None}
    found = known_metrics(MODEL, known)
    assert found["above_known_mean"].value == pytest.approx((-0.5 - 0.0005) / 2)
    assert found["as_low_as_known"].value == pytest.approx(2 / 3), "the third has none, and counts"
    assert found["below_known"].value == pytest.approx(1 / 3)


def test_curves_of_the_first_candidates():
    found = curves({"model": MODEL, "random": RANDOM}, 4, 2)
    first, second = found["model"]
    assert (first["force_calls"], second["force_calls"]) == (10, 20)
    assert (first["cpu_seconds"], second["cpu_seconds"]) == (1.5, 3.0)
    assert (first["found"], second["found"]) == (0.75, 0.75)
    assert second["above_lowest_mean"] == pytest.approx((0 + 0 + 0.3) / 3)
    assert first["above_lowest_mean"] == pytest.approx((1.0 + 0 + 0.3) / 3)
    assert (first["solved"], second["solved"]) == (0.25, 0.5)
    assert found["random"][1]["solved"] == 0.75 and math.isclose(found["random"][1]["found"], 1.0)


def test_compositions_of_a_file_without_crystals(tmp_path):
    (tmp_path / "broken.extxyz").write_text("1\nuid=a\nX 0 0 0\n")
    with pytest.raises(UserError, match="no structure could be read"):
        compositions(None, str(tmp_path / "broken.extxyz"))
