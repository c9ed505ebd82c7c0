"""SevenNet-0 and CHGNet on known crystals; each is skipped where its extra is not installed."""

import gzip
import importlib
import importlib.util
import json
from typing import Any

import numpy as np
import pytest
import shared_data
from stability_test import read, run, write

from unimat_jax.crystal import Crystal
from unimat_jax.stability.engines import ENGINES, energy_model, load
from unimat_jax.stability.journal import Journal, relax_all
from unimat_jax.stability.relaxation import Protocol, Relaxer

KNOWN = {"mp-1960": ("Li2O", -2.062), "mp-19770": ("Fe2O3", -1.707), "mp-19006": ("MnO", -1.979),
         "mp-2652": ("Y2O3", -3.971)}  # fmt: skip
"""Formation energies in eV/atom, MP2020-corrected: the Materials Project's."""
NEAR = {"Fe2O3": 0.15}
"""eV/atom from the Materials Project's elements on, 0.10 for the others and with the model's own elements. The entry is
antiferromagnetic, and the models, which know no order of spins, put it 0.12 and 0.15 too high; they put iron 0.10 and
0.11 too high, too, of which two fifths an atom cancel where both are the model's."""


def oxides() -> list[Crystal]:
    """SrTiO3, and what it falls apart into, SrO and rutile; cells from experiment."""
    o, h = 0.0, 0.5
    perovskite = Crystal.create([38, 22, 8, 8, 8], [[o, o, o], [h, h, h], [h, h, o], [h, o, h], [o, h, h]],
                                3.905 * np.eye(3), "SrTiO3")  # fmt: skip
    salt = Crystal.create([38, 8], [[o, o, o], [h, h, h]], 5.16 * np.array([[o, h, h], [h, o, h], [h, h, o]]), "SrO")
    u = 0.305
    rutile = Crystal.create([22, 22, 8, 8, 8, 8], [[o, o, o], [h, h, h], [u, u, o], [-u, -u, o],
                            [h + u, h - u, h], [h - u, h + u, h]], np.diag([4.594, 4.594, 2.959]),
                            "rutile")  # fmt: skip
    return [perovskite, salt, rutile]


@pytest.fixture(params=list(ENGINES))
def engine(request):
    if importlib.util.find_spec(ENGINES[request.param].distribution) is None:
        pytest.skip(f"{request.param} is not installed: pip install 'unimat-jax[{request.param}]'")
    return request.param


def elements():
    return shared_data.data_dir() / "hull_refs" / "mp-elemental-reference-entries.json.gz"


@pytest.mark.parametrize("references", ["materials_project", "own"])
def test_formation_energies_of_oxides(engine, references, tmp_path):
    """Near the Materials Project's, which neither no correction nor two would be."""
    structures = {}
    for name in ("Fe_Li_O_P", "Mn_O_Y"):
        with gzip.open(shared_data.data_dir() / "hull_refs" / f"rn_{name}_entries.json.gz") as file:
            structures |= {e["entry_id"]: e["structure"] for e in json.load(file) if e["entry_id"] in KNOWN}
    (tmp_path / "known.json").write_text(json.dumps(structures))
    write(tmp_path / "oxides.extxyz", oxides()[:1])
    (tmp_path / "elements.json").write_text(json.dumps(element_structures(["Li", "Mn", "Y", "Fe", "O", "Sr", "Ti"], 8)))
    own = [f"--hull_structures={tmp_path / 'elements.json'}"]
    flags = [f"--elements={elements()}"] if references == "materials_project" else own
    flags += [f"--structures={tmp_path / 'known.json'}", f"--structures={tmp_path / 'oxides.extxyz'}"]
    out = tmp_path / "out"
    assert run(*flags, f"--energy_model={engine}", f"--output_dir={out}") == 0
    rows, about = read(out)
    print(engine, {uid: (row["formation_energy_per_atom"], row["force_calls"]) for uid, row in rows.items()})
    assert all(row["status"] == "converged" for row in rows.values())
    assert about["correction"] == "MP2020" and len(next(iter(about["weights"].values()))) == 64
    for uid, (formula, expected) in KNOWN.items():
        found = rows[uid]["formation_energy_per_atom"]
        near = NEAR.get(formula, 0.10) if references == "materials_project" else 0.10
        assert abs(found - expected) < near, formula
        if engine == "sevennet":
            correction = rows[uid]["correction_per_atom"]
            off, twice = found - correction, found + correction
            assert abs(off - expected) > near and abs(twice - expected) > near, formula
    assert abs(rows["SrTiO3"]["formation_energy_per_atom"] + 3.55) < 0.05


def test_strontium_titanate_against_its_oxides(engine, tmp_path):
    """The self-consistent hull: errors of a model cancel, so that both are near the -0.240 eV/atom of PBE."""
    titanate, *others = oxides()
    write(tmp_path / "candidates.extxyz", [titanate])
    write(tmp_path / "hull.extxyz", others)
    (tmp_path / "elements.json").write_text(json.dumps(element_structures(["Sr", "Ti", "O"], 2)))
    out = tmp_path / "out"
    flags = [f"--structures={tmp_path / 'candidates.extxyz'}", "--hull_structures"]
    flags += [tmp_path / "hull.extxyz", tmp_path / "elements.json"]
    assert run(*flags, f"--energy_model={engine}", f"--output_dir={out}") == 0
    rows, about = read(out)
    print(engine, rows["SrTiO3"]["decomposition_energy"], rows["SrTiO3"]["decomposition"])
    assert about["num_reference_phases"] == 5
    assert "SrO" in rows["SrTiO3"]["decomposition"] and "TiO2" in rows["SrTiO3"]["decomposition"]
    assert rows["SrTiO3"]["decomposition_energy"] == pytest.approx(-0.247, abs=0.0075)


def element_structures(symbols: list[str], max_atoms: int) -> dict[str, Any]:
    """The Materials Project's lowest structure of up to so many atoms of each: the hull's corners."""
    with gzip.open(shared_data.data_dir() / "hull_refs" / "MP-PBE-Element-Refs.json.gz") as file:
        content = json.load(file)
    result = {}
    for symbol in symbols:
        pairs = zip(content[symbol]["energy_per_atom"], content[symbol]["structure"], strict=True)
        result[symbol] = min((p for p in pairs if len(p[1]["sites"]) <= max_atoms), key=lambda p: p[0])[1]
    return result


def test_batches_find_what_single_relaxations_find(engine, tmp_path):
    """Perovskites off their sites, three at a time and one at a time; and the package's own calculator."""
    perovskite = oxides()[0]
    rng = np.random.default_rng(0)
    start = [
        Crystal.create([38, metal, 8, 8, 8], perovskite.frac_coords + rng.normal(scale=0.01, size=(5, 3)),
                       a * np.eye(3), str(metal))
        for metal, a in ((22, 4.0), (40, 4.1), (50, 4.1))
    ]  # fmt: skip
    model, protocol = energy_model(engine), Protocol(max_steps=40)
    single, together = (
        relax_all(start, Relaxer(model, protocol, False, size), Journal(tmp_path / str(size)), timeout_s=300,
                  num_workers=1, progress="")
        for size in (1, 3)
    )  # fmt: skip
    assert [one.label for one in single] == [one.label for one in together] == ["converged"] * 3
    for one, other in zip(single, together, strict=True):
        assert one.energy is not None and other.energy is not None
        assert abs(one.energy - other.energy) / 5 < 1e-4
    ours, theirs = (atoms.copy() for atoms in [start[0].to_ase()] * 2)
    ours.calc = load(model)
    if engine == "sevennet":
        theirs.calc = importlib.import_module("sevenn.calculator").SevenNetCalculator("7net-0", device="cpu")
    else:
        theirs.calc = importlib.import_module("chgnet.model.dynamics").CHGNetCalculator(use_device="cpu")
    assert ours.get_potential_energy() == pytest.approx(theirs.get_potential_energy(), abs=1e-4)
    assert np.allclose(ours.get_forces(), theirs.get_forces(), atol=1e-3)
    assert np.allclose(ours.get_stress(), theirs.get_stress(), atol=1e-4)


def test_odd_crystals_have_a_status(engine, tmp_path):
    cell = 4.0 * np.eye(3)
    odd = [
        Crystal.create([84, 8], [[0, 0, 0], [0.5, 0.5, 0.5]], cell, "polonium"),
        Crystal.create([95], [[0, 0, 0]], cell, "americium"),
        Crystal.create([8], [[0, 0, 0]], 50 * np.eye(3), "atom"),
        Crystal.create([11, 17], [[0, 0, 0], [0.03, 0, 0]], cell, "close"),
        Crystal.create([11, 17], [[0, 0, 0], [0, 0, 0.001]], cell, "overlap"),
        Crystal.create([11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]], cell, "good"),
    ]
    write(tmp_path / "odd.extxyz", odd)
    out = tmp_path / "out"
    flags = [f"--structures={tmp_path / 'odd.extxyz'}", f"--energy_model={engine}", f"--output_dir={out}"]
    assert run(*flags, "--num_workers=1", "--max_steps=60") == 0
    rows, _ = read(out)
    statuses = {uid: row["status"] for uid, row in rows.items()}
    print(engine, statuses)
    assert statuses["polonium"] == statuses["americium"] == "failed(unsupported_element)"
    assert statuses["atom"] == "failed(isolated_atom)" and statuses["overlap"] == "failed(overlapping_atoms)"
    assert statuses["good"] == "converged" and len(rows) == len(odd)
