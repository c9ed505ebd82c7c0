"""Hulls, formation energies and MP2020 corrections against pymatgen and the Materials Project's own entries."""

import gzip
import json

import numpy as np
import pytest
import shared_data
from pymatgen.analysis.phase_diagram import PDEntry, PhaseDiagram
from pymatgen.core import Composition

from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.stability.corrections import check_schemes, mp2020_correction, resolve
from unimat_jax.stability.energies import Hull, composition_of, judge, total_energy
from unimat_jax.stability.engines import EnergyModel
from unimat_jax.stability.hull import Query, decompose, elemental_energies, formation_energy
from unimat_jax.stability.references import Phase, hash_of, read_phases, scheme_of
from unimat_jax.stability.relaxation import Relaxation

FORMATION_ENERGIES = {"mp-1960": ("Li2O", -2.062), "mp-19770": ("Fe2O3", -1.707),
                      "mp-2652": ("Y2O3", -3.971), "mp-19006": ("MnO", -1.979)}  # fmt: skip
"""eV/atom, MP2020-corrected: the Materials Project's."""
FILES = ("rn_Fe_Li_O_P_entries", "rn_Mn_O_Y_entries")


def phase(formula, energy_per_atom, uid=""):
    composition = {str(element): amount for element, amount in Composition(formula).items()}
    return Phase(uid or formula, composition, energy_per_atom * sum(composition.values()))


def answer(query_phase, phases, excluded=()):
    query = Query(query_phase.composition, query_phase.energy, frozenset(excluded))
    return decompose([query], phases, num_workers=0, progress="")[0]


SYSTEM = [phase("Ti", 0), phase("O", 0), phase("TiO2", -3.3, "rutile"), phase("TiO", -2.7), phase("TiO2", -3.29, "b")]


@pytest.fixture(scope="module")
def entries():
    """The Materials Project's entries as dicts, and as phases, by id."""
    folder = shared_data.data_dir() / "hull_refs"
    paths = [folder / f"{name}.json.gz" for name in FILES]
    raw = {}
    for path in paths:
        with gzip.open(path) as file:
            raw |= {entry["entry_id"]: entry for entry in json.load(file)}
    phases, failures = read_phases(paths)
    assert not failures and len(phases) == 943 + 132
    return raw, phases


def test_a_polymorph_is_as_far_above_the_hull_as_above_the_ground_state():
    found = answer(phase("TiO2", -3.2), SYSTEM)
    assert found.energy == pytest.approx(0.1, abs=1e-9) and found.products == {"rutile": pytest.approx(1)}
    assert answer(phase("Ti3O6", -3.2), SYSTEM).energy == pytest.approx(0.1, abs=1e-9), "the cell's size plays no part"


def test_a_ground_state_is_below_the_hull_without_it():
    rutile = SYSTEM[2]
    assert answer(rutile, SYSTEM).energy == pytest.approx(0, abs=1e-9)
    assert answer(rutile, SYSTEM, ["rutile"]).energy == pytest.approx(-0.01, abs=1e-9), "the other polymorph stays"
    found = answer(rutile, SYSTEM, ["rutile", "b"])
    assert found.energy == pytest.approx(-3.3 + 2.7 * 2 / 3, abs=1e-9), "TiO2 -> TiO + 1/2 O2"
    assert found.products == {"TiO": pytest.approx(2 / 3), "O": pytest.approx(1 / 3)}


def test_a_duplicate_that_lies_above_its_twin_is_left_out_too():
    twins = [*SYSTEM, phase("TiO2", -3.299, "twin")]
    assert answer(SYSTEM[2], twins, ["rutile", "twin"]).energy == pytest.approx(-0.01, abs=1e-9)


def test_a_missing_element_is_a_status():
    assert answer(phase("TiN", -1.0), SYSTEM).reason == "missing_terminal(N)"
    assert answer(phase("Ti", -0.1), SYSTEM, ["Ti"]).reason == "missing_terminal(Ti)"
    assert formation_energy({"Ti": 1, "N": 1}, -1.0, {"Ti": 0.0}) == (None, "missing_terminal(N)")
    assert formation_energy({"Ti": 1, "O": 2}, -9.9, {"Ti": -3, "O": -1}) == (pytest.approx(-4.9 / 3), "")


def test_all_systems_are_answered_in_order_and_each_by_its_own():
    phases = [*SYSTEM, phase("Cu", 0), phase("CuO", -1.0)]
    queries = [phase("CuO", -0.9), phase("TiO2", -3.2), phase("CuTiO3", -2.0), phase("CuO", -1.1)]
    found = decompose([Query(q.composition, q.energy) for q in queries], phases, num_workers=0, progress="")
    expected = [0.1, 0.1, -2.0 - (2 * -1.0 + 3 * -3.3) / 5, -0.1]
    assert [one.energy for one in found] == pytest.approx(expected, abs=1e-9)


def test_real_entries_give_pymatgens_values(entries):
    _, phases = entries
    inside = [p for p in phases if set(p.composition) <= {"Fe", "Li", "O", "P"}]
    assert len(inside) >= 943
    own = [PDEntry(Composition(p.composition), p.energy, name=p.uid) for p in inside]
    diagram = PhaseDiagram(own)
    found = decompose([Query(p.composition, p.energy) for p in inside], inside, num_workers=0, progress="")
    expected = [diagram.get_e_above_hull(entry) for entry in own]
    assert max(abs(max(a.energy, 0) - e) for a, e in zip(found, expected, strict=True)) < 1e-6
    assert sum(e > 0 for e in expected) > 800
    # LiFePO4, taken out with all phases of its composition, falls apart as pymatgen says.
    olivine = min((p for p in inside if p.formula == "LiFePO4"), key=lambda p: p.energy_per_atom)
    same = [p.uid for p in inside if p.formula == "LiFePO4"]
    (entry,) = (e for e in own if e.name == olivine.uid)
    expected = diagram.get_phase_separation_energy(entry)
    assert expected < 0 and answer(olivine, inside, same).energy == pytest.approx(expected, abs=1e-6)


def test_formation_energies_of_the_materials_project(entries):
    _, phases = entries
    elements = elemental_energies(phases)
    for uid, (formula, expected) in FORMATION_ENERGIES.items():
        found = next(p for p in phases if p.uid == uid)
        assert found.formula == formula
        energy, _ = formation_energy(found.composition, found.energy, elements)
        assert energy == pytest.approx(expected, abs=0.001), formula


def test_corrections_are_those_that_the_materials_project_added(entries):
    """Every tenth entry of up to 30 atoms, from its structure alone."""
    raw, phases = entries
    small = [p for p in phases if p.crystal is not None and p.num_atoms <= 30][::10]
    assert len(small) > 40
    wrong = []
    for one in small:
        entry = raw[one.uid.partition("#")[0]]  # the elements are in both files
        expected = sum(a["adj_per_atom"] * a["n_atoms"] for a in entry["energy_adjustments"])
        assert one.energy == pytest.approx(entry["energy"] + expected, abs=1e-9)
        if (found := mp2020_correction(one.crystal)) != pytest.approx(expected, abs=1e-6):
            wrong.append((one.uid, found, expected))
    assert not wrong


def test_a_correction_is_added_once_and_never_twice():
    def model(scale):
        return EnergyModel("m", "m:m", "{}", scale, "", {}, "")

    assert resolve(model("pbe"), "auto") == resolve(model("pbe"), "mp2020") == (True, "MP2020")
    assert resolve(model("pbe"), "none") == (False, "none")
    assert resolve(model("mp2020"), "auto") == (False, "MP2020")
    assert resolve(model("own"), "auto") == (False, "own: m")
    for scale, correction, message in (("mp2020", "mp2020", "twice"), ("own", "mp2020", "scale 'own'"),
                                       ("mp2020", "none", "predicts corrected")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            resolve(model(scale), correction)


def test_schemes_meet_only_when_asked(entries):
    _, phases = entries
    assert scheme_of(phases) == "MP2020"
    assert scheme_of([p for p in phases if len(p.composition) == 1]) == "any"
    assert scheme_of(SYSTEM) == "none"
    check_schemes("none", "any", False)
    check_schemes("none", "MP2020", True)
    with pytest.raises(UserError, match="'none', the reference's in 'MP2020'"):
        check_schemes("none", "MP2020", False)


def test_under_pressure_the_enthalpy_counts_and_a_correction_is_added_once():
    found = Relaxation("converged", energy=-10.0, correction=-0.5)
    assert total_energy(found, 100.0, corrected=False, pressure=0.0) == (-10.0, "")
    assert total_energy(found, 100.0, corrected=True, pressure=0.0) == (-10.5, "")
    # 1 eV/A3 is 160.2177 GPa
    assert total_energy(found, 100.0, corrected=True, pressure=1.602177)[0] == pytest.approx(-9.5, abs=1e-5)
    none = Relaxation("converged", energy=-10.0)
    assert total_energy(none, 100.0, corrected=True, pressure=0.0) == (None, "no_correction")
    assert total_energy(Relaxation("timeout"), 100.0, corrected=True, pressure=0.0) == (None, "not_relaxed")


def rock_salt(symbols, a, uid=""):
    sites = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    frac = np.concatenate([sites, sites + np.array([0.5, 0, 0])])
    numbers = [{"Mg": 12, "O": 8, "Ca": 20}[symbol] for symbol in symbols for _ in range(4)]
    return Crystal.create(numbers, frac, a * np.eye(3), uid)


def caesium_chloride(a, uid=""):
    return Crystal.create([12, 8], [[0, 0, 0], [0.5, 0.5, 0.5]], a * np.eye(3), uid)


def as_phase(crystal, energy_per_atom):
    return Phase(crystal.uid, composition_of(crystal), energy_per_atom * crystal.num_atoms, crystal)


def test_a_known_structure_is_held_against_all_others_but_itself():
    elements = [phase("Mg", 0), phase("O", 0)]
    known = as_phase(rock_salt(["Mg", "O"], 4.21, "known"), -3.0)
    other = as_phase(caesium_chloride(2.6, "other"), -2.5)
    hull = Hull("reference", [*elements, known, other], "none")
    candidates = [
        as_phase(rock_salt(["Mg", "O"], 4.25, "again"), -3.001),
        None,
        as_phase(caesium_chloride(2.65, "high"), -2.6),
        as_phase(rock_salt(["Mg", "O"], 4.30, "twin"), -3.002),
    ]
    rows = judge(candidates, hull, "mattergen", num_workers=0, progress=False)
    assert rows[1] == {}
    assert rows[0]["same_as"] == "known" == rows[3]["same_as"] and rows[2]["same_as"] == "other"
    assert rows[0]["decomposition_energy"] == pytest.approx(-0.501), "against the other polymorph"
    assert rows[2]["decomposition_energy"] == pytest.approx(0.4) == rows[2]["e_above_hull"]
    assert rows[0]["e_above_hull"] == 0 and rows[0]["formation_energy_per_atom"] == pytest.approx(-3.001)
    # Among the candidates the twin is no rival, being the same structure.
    assert rows[0]["decomposition_energy_among_candidates"] == pytest.approx(-0.401)
    assert rows[2]["decomposition_energy_among_candidates"] == pytest.approx(0.402)
    assert rows[2]["decomposition"] == "1.000 MgO (known)" and rows[2]["nearest_known"] == "other"


def test_entries_are_read_from_json_lines_and_parquet_alike(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    adjustment = {"@module": "os", "@class": "CompositionEnergyAdjustment", "name": "MP2020 anion correction (oxide)",
                  "adj_per_atom": -0.687, "n_atoms": 1, "uncertainty_per_atom": 0.0, "description": "",
                  "cls": {}}  # fmt: skip
    rows = [
        {"entry_id": "a", "energy": -10.0, "composition": {"Mg": 1, "O": 1}, "energy_adjustments": [adjustment]},
        {"entry_id": "b", "energy": -2.0, "composition": {"Mg": 2}, "energy_adjustments": []},
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "object.json").write_text(json.dumps({row["entry_id"]: row for row in rows}))
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    texts = [{k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in row.items()} for row in rows]
    pyarrow.parquet.write_table(pa.Table.from_pylist(texts), tmp_path / "table.parquet")
    read = [read_phases([tmp_path / n])[0] for n in ("list.json", "object.json", "lines.jsonl", "table.parquet")]
    assert read[0] == read[1] == read[2] == read[3]
    assert [(p.uid, p.energy_per_atom, p.scheme) for p in read[0]] == [("a", -5.3435, "MP2020"), ("b", -1.0, "")]
    twice, _ = read_phases([tmp_path / "list.json", tmp_path / "lines.jsonl"])
    assert [p.uid for p in twice] == ["a", "b", "a#2", "b#2"] and hash_of(twice) != hash_of(read[0])
    assert hash_of(read[0][::-1]) == hash_of(read[0])


def test_entries_that_are_none_are_counted(tmp_path):
    good = {"energy": -1.0, "composition": {"Mg": 1}}
    odd = [{"energy": -1.0}, {**good, "energy_adjustments": [{"@class": "Popen", "args": "true"}]}, good, 3]
    (tmp_path / "e.json").write_text(json.dumps(odd))
    phases, failures = read_phases([tmp_path / "e.json"])
    assert len(phases) == 1 and failures.total() == 3 and failures["unknown_adjustment"] == 1
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "cut.json").write_text('[{"energy":')
    for name, message in (("none", "holds no ComputedEntry"), ("cut", "cannot be read as JSON"), ("no", "not exist")):
        with pytest.raises(UserError, match=message):
            read_phases([tmp_path / f"{name}.json"])
