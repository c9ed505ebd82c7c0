"""The benchmark's bookkeeping, on 20 crystals: a wrong denominator would flatter every model."""

import json
from pathlib import Path

import numpy as np
import pytest

from unimat_jax.cli import run_program
from unimat_jax.crystal import Crystal, lattice_from_parameters

ROOT = Path(__file__).parents[1]
FIXTURE = json.loads((ROOT / "tests" / "fixtures" / "cdvae_verdicts.json").read_text(encoding="utf-8"))
CASES = [case for case in FIXTURE["cases"] if case["data_set"] == "perov_5"]


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    pytest.importorskip("matplotlib")
    from benchmarks import perov_unet

    return perov_unet


@pytest.fixture
def references(tmp_path) -> list[Crystal]:
    """20 real crystals of Perov-5, also written to tmp_path/val.npz."""
    crystals = []
    for case in CASES:
        values = case["original"]
        cell = lattice_from_parameters(np.array(values["lengths"]), np.array(values["angles"]))
        crystals.append(Crystal.create(values["atomic_numbers"], values["frac_coords"], cell, f"ref-{case['index']}"))
    np.savez(
        tmp_path / "val.npz",
        material_id=[crystal.uid for crystal in crystals],
        n_atoms=np.array([crystal.num_atoms for crystal in crystals], np.uint8),
        numbers=np.concatenate([crystal.atomic_numbers for crystal in crystals]),
        frac_coords=np.concatenate([crystal.frac_coords for crystal in crystals]),
        lattice=np.stack([crystal.lattice for crystal in crystals]),
    )
    return crystals


def write_generated(directory: Path, references: list[Crystal], failures: int) -> Path:
    """What `unimat generate` would write for perfect copies, of which the first `failures` did not decode."""
    directory.mkdir()
    rows, frames = [], ""
    for i, reference in enumerate(references):
        failed = i < failures
        rows.append({"uid": f"s{i}", "status": "cell_degenerate" if failed else "ok", "reference_uid": reference.uid})
        if not failed:
            frac = reference.frac_coords + np.random.default_rng(i).random(3)
            frames += Crystal.create(reference.atomic_numbers, frac, reference.lattice, f"s{i}").to_extxyz()
    (directory / "generated_crystals.extxyz").write_text(frames)
    (directory / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_four_columns_with_failures_in_the_denominator(program, references, tmp_path, capsys):
    good = write_generated(tmp_path / "good", references, failures=5)
    bad = write_generated(tmp_path / "bad", references, failures=20)
    arguments = [f"--reference={tmp_path / 'val.npz'}", f"--generated={good}", f"--untrained={bad}"]
    arguments += ["--trained_loss=0.125", "--untrained_loss=1.0", f"--output_dir={tmp_path / 'out'}"]
    assert run_program(program.main, arguments) == 0
    report = json.loads((tmp_path / "out" / "perov_unet.json").read_text())
    columns = report["columns"]
    assert list(columns) == ["random coordinates", "untrained network", "trained network", "real data"]
    assert {column["num_samples"] for column in columns.values()} == {20}
    trained, untrained, real = columns["trained network"], columns["untrained network"], columns["real data"]
    assert trained["failures"] == {"cell_degenerate": 5} and trained["num_failures"] == 5
    for key in ("min_distance", "volume_per_atom", "match_rate", "struct_valid"):
        assert trained[key] == pytest.approx(15 / 20)
        assert untrained[key] == 0
        assert real[key] == 1
    assert trained["rms_dist"] == pytest.approx(0, abs=1e-5) and untrained["rms_dist"] is None
    assert columns["random coordinates"]["match_rate"] < 0.8
    assert columns["random coordinates"]["min_distance"] < 0.8
    assert (trained["loss"], untrained["loss"], real["loss"]) == (0.125, 1.0, None)
    assert {"seed", "git_commit", "versions", "machine"} <= set(report)
    assert "75.0 %" in capsys.readouterr().out
    assert (tmp_path / "out" / "perov_unet.png").read_bytes().startswith(b"\x89PNG")


def test_a_perfect_sampler_draws_among_the_real_crystals_of_a_composition(program, references):
    other = Crystal.create(
        references[0].atomic_numbers, references[0].frac_coords, 1.2 * references[0].lattice, "other"
    )
    drawn = [program.perfect_sampler(references, [*references, other], seed)[0] for seed in range(20)]
    assert {sample.crystal.uid for sample in drawn} == {"other", references[0].uid}
    assert {sample.reference.uid for sample in drawn} == {references[0].uid}
    assert program.perfect_sampler(references[1:2], references[1:2], 0) == []


def test_samples_for_other_compositions_are_refused(program, references, tmp_path, capsys):
    strangers = write_generated(tmp_path / "strangers", [references[0], references[1]], 0)
    whole = write_generated(tmp_path / "whole", references, 0)
    shared = [f"--reference={tmp_path / 'val.npz'}", f"--output_dir={tmp_path / 'out'}"]
    assert run_program(program.main, [*shared, f"--generated={whole}", f"--untrained={strangers}"]) == 2
    assert "--untrained" in capsys.readouterr().err
    manifest = strangers / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace(references[0].uid, "unknown-id"))
    assert run_program(program.main, [*shared, f"--generated={strangers}"]) == 2
    assert "unknown-id" in capsys.readouterr().err
    assert run_program(program.main, [*shared, f"--generated={tmp_path / 'nowhere'}"]) == 2
    assert "manifest.jsonl" in capsys.readouterr().err
    assert run_program(program.main, [f"--reference={tmp_path / 'no.npz'}", f"--output_dir={tmp_path / 'out'}"]) == 2
    assert "--reference" in capsys.readouterr().err


def perovskite(numbers, displaced: float, uid: str) -> Crystal:
    places = [[0, 0, displaced], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    return Crystal.create(numbers, places, 4.0 * np.eye(3), uid)


def test_the_rmse_is_shared_out_by_arrangement_and_displacement(program):
    from benchmarks.perov_rmse import decomposition, known_arrangements, laid_on_ideal, perfect_sampler

    ideal, displaced = perovskite([56, 22, 8, 8, 8], 0.0, "a"), perovskite([56, 22, 8, 8, 8], 0.15, "b")
    swapped = perovskite([22, 56, 8, 8, 8], 0.0, "c")
    order = [3, 1, 0, 4, 2]
    shifted = Crystal.create(
        ideal.atomic_numbers[order], (ideal.frac_coords[order] + [0.3, 0.9, 0.45]) % 1, ideal.lattice, "d"
    )
    assert laid_on_ideal(ideal) == laid_on_ideal(shifted) == ((56, 22), False)
    assert laid_on_ideal(displaced) == ((56, 22), True) and laid_on_ideal(swapped) == ((22, 56), False)
    report = decomposition([(ideal, displaced), (shifted, ideal), (swapped, ideal), (None, ideal)])
    rows = report["kinds"]
    assert {name: row["pairs"] for name, row in rows.items()} == {
        "ideal for displaced": 1, "ideal for ideal": 1, "other arrangement": 1, "failure": 1
    }  # fmt: skip
    assert report["match_rate"] == pytest.approx(0.5)  # another arrangement of an ideal crystal is another crystal
    assert report["rmse"] == pytest.approx(sum(row["of_the_rmse"] for row in rows.values()))
    # One atom of five is 0.6 A away; without the shift of all that leaves sqrt(4) / 5 of it as the root mean square.
    wide = (64 / 5) ** (1 / 3)
    assert rows["ideal for displaced"]["mean_rms"] == pytest.approx(0.6 * 2 / 5 / wide, rel=0.01)
    far = perovskite([8, 22, 56, 8, 8], 0.45, "e")  # O at A, Ba at X: no crystal that is known
    wrong = [(swapped, ideal), (far, ideal), (perovskite([8, 22, 56, 8, 8], 0.0, "f"), ideal)]
    told = decomposition([*wrong, (ideal, ideal)], known_arrangements([ideal, swapped]))["kinds"]
    others = {f"other arrangement, {kind}" for kind in ("real", "of no crystal, far", "of no crystal, near")}
    assert set(told) == others | {"ideal for ideal"}
    alone = decomposition([*wrong[:1], (ideal, ideal)], known_arrangements([ideal]))
    assert set(alone["kinds"]) == {"other arrangement, perhaps real", "ideal for ideal"}
    assert perfect_sampler([ideal], [ideal, swapped]) | {"rmse": None} == {
        "references": 1, "other_matches": 0.0, "match_rate": 0.5, "rmse": None
    }  # fmt: skip


def test_what_can_be_had_without_a_model(program):
    from benchmarks.floors import split_distances, template, template_scores

    ideal, swapped = perovskite([56, 22, 8, 8, 8], 0.0, "a"), perovskite([22, 56, 8, 7, 9], 0.0, "b")
    assert [guess.atomic_numbers.tolist() for guess in template(swapped)] == [[22, 56, 8, 7, 9], [56, 22, 8, 7, 9]]
    with pytest.raises(ValueError, match="Ba2O4 is no ABX3"):
        template(Crystal.create([56, 56, 8, 8, 8, 8], np.eye(6, 3), 4.0 * np.eye(3)))
    scores = template_scores([ideal, swapped])
    assert scores["one sample"]["match_rate"] == 0.5 and scores["20 samples"]["match_rate"] == 1.0
    assert scores["20 samples"]["rmse"] == pytest.approx(0, abs=1e-6)
    same = split_distances([ideal, swapped], [ideal, swapped], [1, 4000], 50, 0)["number of elements"]
    assert same["all"] == 0 and same["1"]["mean"] == pytest.approx(1.0) and same["4000"]["95 %"] < 0.1
