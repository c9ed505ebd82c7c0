"""What a DFT calculation is made with, held against pymatgen; and small real calculations where GPAW is installed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import spglib
from pymatgen.io.vasp.sets import MPRelaxSet
from stability_engines_test import oxides
from stability_test import read, run, write

from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.stability.dft import DftSettings, has_moments, hubbard_u, kpoint_mesh, starting_moments, symmetrised

O, H = 0.0, 0.5
NIO = Crystal.create([28, 8], [[O, O, O], [H, H, H]], 4.17 * np.array([[O, H, H], [H, O, H], [H, H, O]]), "NiO")
SILICON = Crystal.create([14, 14], [[O, O, O], [0.25] * 3], 5.5 * np.array([[O, H, H], [H, O, H], [H, H, O]]), "Si")
FEW = {"cutoff": 200, "kpoint_density": 8, "static_kpoint_density": 8}
"""Too little for any result, and enough to see that it is computed."""


def two(first: int, second: int, apart: float, length: float) -> Crystal:
    return Crystal.create([first, second], [[O, O, O], [O, O, apart / length]], length * np.eye(3), "two")


def test_hubbard_u_as_the_materials_project():
    fluoride = Crystal.create([26, 9, 9], [[O, O, O], [H, H, O], [H, O, H]], 4.0 * np.eye(3))
    nitride = Crystal.create([28, 7], [[O, O, O], [H, H, H]], 4.1 * np.eye(3))
    assert hubbard_u(NIO) == {"Ni": 6.2} and hubbard_u(fluoride) == {"Fe": 5.3}
    assert hubbard_u(nitride) == {} and hubbard_u(oxides()[0]) == {}


def test_magnetic_starts_only_where_there_are_moments():
    titanate = oxides()[0]
    assert not has_moments(titanate) and starting_moments(titanate, "auto") is None
    assert starting_moments(NIO, "auto") == [5.0, 0.6] and starting_moments(NIO, "never") is None
    assert starting_moments(titanate, "always") == [0.6] * 5
    assert starting_moments(two(8, 8, 1.22, 6.0), "auto") == [0.6, 0.6], "molecular oxygen"
    assert starting_moments(two(8, 8, 1.5, 6.0), "auto") is None, "a peroxide"
    unsorted = Crystal.create([8, 28, 8, 25], np.eye(4)[:, :3] / 2, 4.2 * np.eye(3))
    assert starting_moments(unsorted, "auto") == [0.6, 5.0, 0.6, 5.0], "in the order of the atoms"
    expected = MPRelaxSet(unsorted.to_pymatgen(), sort_structure=False).incar["MAGMOM"]
    assert starting_moments(unsorted, "auto") == expected
    assert has_moments(Crystal.create([64], [[O, O, O]], 4 * np.eye(3))), "gadolinium: only its ion is named"


def test_kpoints_by_density_with_gamma():
    titanate = oxides()[0]
    assert kpoint_mesh(titanate, 64) == (6, 6, 6), "what the Materials Project takes for it"
    doubled = Crystal.create([6], [[O, O, O]], np.diag([3.0, 3.0, 6.0]))
    first, second, third = kpoint_mesh(doubled, 64)
    assert first == second and third == pytest.approx(first / 2, abs=0.5)
    assert kpoint_mesh(titanate, 8) < kpoint_mesh(titanate, 64)


def with_fixed_origin(crystal: Crystal) -> int:
    """Symmetry operations without a translation."""
    found = spglib.get_symmetry((crystal.lattice, crystal.frac_coords, crystal.atomic_numbers), symprec=1e-5)
    return int((np.abs(found["translations"] - found["translations"].round()).max(1) < 1e-5).sum())


def test_a_rattled_cell_is_made_symmetric_where_it_is():
    titanate = oxides()[0]
    rng = np.random.default_rng(0)
    lattice = titanate.lattice + rng.uniform(-0.002, 0.002, (3, 3))
    rattled = Crystal.create(titanate.atomic_numbers, titanate.frac_coords + rng.uniform(-5e-4, 5e-4, (5, 3)), lattice)
    assert rattled.to_pymatgen().get_space_group_info(1e-5)[1] == 1
    found = symmetrised(rattled, 0.01)
    assert found.to_pymatgen().get_space_group_info(1e-5)[1] == 221
    assert np.abs(found.lattice - lattice).max() < 0.01 and found.atomic_numbers.tolist() == [38, 22, 8, 8, 8]
    shift = found.frac_coords - rattled.frac_coords
    assert np.abs((shift - shift.mean(0)) @ lattice).max() < 0.01, "and no atom in another's place"
    assert symmetrised(rattled, 0.0) is rattled
    polar = dataclasses.replace(titanate, frac_coords=titanate.frac_coords + [[0.2, 0.3, z] for z in (0, 0.1, 0, 0, 0)])
    assert with_fixed_origin(polar) < with_fixed_origin(symmetrised(polar, 0.01)) == 8, "all of P4mm"
    distorted = symmetrised(dataclasses.replace(rattled, lattice=np.diag([3.9, 4.0, 4.1])), 0.01)
    assert distorted.lengths == pytest.approx([3.9, 4.0, 4.1], abs=0.01), "what is not symmetric stays so"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cut_off": 500}, "no setting 'cut_off'; choose from cutoff, kpoint_density"),
        ({"cutoff": -1}, "cutoff = -1: give a number above 0"),
        ({"cutoff": True}, "cutoff = True: give a number above 0"),
        ({"smearing": "much"}, "smearing = 'much': give a number"),
        ({"num_relaxations": 1.5}, "num_relaxations = 1.5: give a whole number of at least 0"),
        ({"hubbard_u": 1}, "hubbard_u = 1: give true or false"),
        ({"spin": "up"}, "spin = 'up': give one of auto, always, never"),
    ],
)
def test_settings_that_there_are_not(values, message):
    with pytest.raises(UserError, match=message):
        DftSettings.of(values)


def test_settings_have_defaults():
    settings = DftSettings.of({"cutoff": 900, "num_relaxations": 0})
    assert settings == DftSettings(cutoff=900.0, num_relaxations=0) and isinstance(settings.cutoff, float)


@pytest.fixture
def gpaw():
    return pytest.importorskip("gpaw", reason="bash docs/install_gpaw.sh")


def command(tmp_path, out, *flags, **settings):
    return [f"--structures={tmp_path / 'structures.extxyz'}", "--energy_model=gpaw", "--num_workers=1",
            f"--energy_model_kwargs={json.dumps(FEW | settings)}", f"--output_dir={out}", *flags]  # fmt: skip


def test_silicon_by_gpaw(gpaw, tmp_path):
    """Relaxed twice, then the static point; the energy is that of GPAW called by hand."""
    from ase.build import bulk

    write(tmp_path / "structures.extxyz", [SILICON])
    write(tmp_path / "hull.extxyz", [dataclasses.replace(SILICON, uid="reference")])
    out = tmp_path / "out"
    assert run(*command(tmp_path, out, f"--hull_structures={tmp_path / 'hull.extxyz'}")) == 0
    rows, about = read(out)
    row = rows["Si"]
    assert row["status"] == "converged" and row["formation_energy_per_atom"] == pytest.approx(0, abs=1e-6)
    assert about["energy_model"] == "gpaw" and about["correction"] == "own: gpaw" and not about["mp2020_added"]
    assert json.loads(about["energy_model_kwargs"])["cutoff"] == 200 and "gpaw-data" in about["package"]
    (log,) = (out / "dft").glob("Si2-*/gpaw.txt")
    text = log.read_text()
    assert text.count("Input parameters") == 3 and "ecut=200" in text
    atoms = bulk("Si", a=4 ** (1 / 3) * (2 * row["volume_per_atom"]) ** (1 / 3))
    atoms.calc = gpaw.GPAW(mode=gpaw.PW(200), xc="PBE", kpts={"size": kpoint_mesh(SILICON, 8), "gamma": True},
                           occupations=gpaw.FermiDirac(0.05), convergence={"energy": 1e-5}, txt=None)  # fmt: skip
    assert row["energy_per_atom"] == pytest.approx(atoms.get_potential_energy() / 2, abs=1e-3)


def test_hubbard_u_and_spin_by_gpaw(gpaw, tmp_path):
    write(tmp_path / "structures.extxyz", [NIO])
    out = tmp_path / "out"
    assert run(*command(tmp_path, out, num_relaxations=0, kpoint_density=2, static_kpoint_density=2, cutoff=300)) == 0
    rows, _ = read(out)
    assert rows["NiO"]["status"] == "converged" and rows["NiO"]["magnetic_moment"] == pytest.approx(2, abs=0.1)
    (log,) = (out / "dft").glob("NiO-*/gpaw.txt")
    text = log.read_text()
    assert "U: 6.2" in text and "scale: False" in text, "VASP's occupations are not normalised"


def test_odd_crystals_have_a_status(gpaw, tmp_path):
    cell = 4.0 * np.eye(3)
    odd = [
        Crystal.create([84, 8], [[O, O, O], [H, H, H]], cell, "polonium"),
        Crystal.create([14], [[O, O, O]], 20 * np.eye(3), "atom"),
        Crystal.create([14, 14], [[O, O, O], [O, O, 0.01]], cell, "overlap"),
        dataclasses.replace(SILICON, uid="good"),
    ]
    write(tmp_path / "structures.extxyz", odd)
    out = tmp_path / "out"
    assert run(*command(tmp_path, out, max_scf_steps=2, num_relaxations=0)) == 0
    rows, _ = read(out)
    assert {uid: row["status"] for uid, row in rows.items()} == {
        "polonium": "failed(unsupported_element)", "atom": "failed(isolated_atom)",
        "overlap": "failed(overlapping_atoms)", "good": "failed(scf_not_converged)",
    }  # fmt: skip


def test_gpaw_energies_meet_only_their_own(gpaw, tmp_path, capsys):
    import shared_data

    write(tmp_path / "structures.extxyz", [SILICON])
    elements = shared_data.data_dir() / "hull_refs" / "mp-elemental-reference-entries.json.gz"
    assert run(*command(tmp_path, tmp_path / "out", f"--elements={elements}")) == 2
    assert "energies on a scale of their own (own: gpaw)" in capsys.readouterr().err
    assert run(*command(tmp_path, tmp_path / "out", "--correction=mp2020")) == 2
    assert run(*command(tmp_path, tmp_path / "out", "--energy_scale=pbe")) == 2


def test_a_killed_relaxation_goes_on_where_it_was(gpaw, tmp_path):
    """SIGKILL to the process and its workers in the middle of the first relaxation."""
    start = Crystal.create(SILICON.atomic_numbers, SILICON.frac_coords, SILICON.lattice * 1.06, "Si")
    write(tmp_path / "structures.extxyz", [start])
    out = tmp_path / "out"
    flags = command(tmp_path, out, "--fmax=0.005", cutoff=300)
    program = [sys.executable, "-m", "unimat_jax.stability", *flags]
    process = subprocess.Popen(program, start_new_session=True, stderr=subprocess.DEVNULL)
    states = []
    while process.poll() is None and not states:
        time.sleep(0.02)
        states = [s for s in (json.loads(p.read_text()) for p in out.glob("dft/*/state.json")) if s["force_calls"] > 1]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert states, "it ended before it could be killed"
    (path,) = out.glob("dft/*/state.json")
    before = json.loads(path.read_text())
    assert before["stage"] == 0 and before["force_calls"] >= 2
    assert run(*flags, "--resume") == 0
    rows, _ = read(out)
    assert run(*command(tmp_path, tmp_path / "whole", "--fmax=0.005", cutoff=300)) == 0
    whole, _ = read(tmp_path / "whole")
    assert rows["Si"]["status"] == whole["Si"]["status"] == "converged"
    assert rows["Si"]["energy_per_atom"] == pytest.approx(whole["Si"]["energy_per_atom"], abs=2e-4)
    assert rows["Si"]["seconds"] > before["seconds"]
    heads = [line for line in (path.parent / "gpaw.txt").read_text().splitlines() if line.startswith("# Si")]
    assert heads[0].endswith("stage 0, 0 steps done") and heads[1].endswith(f"{before['force_calls']} steps done")
    again = time.monotonic()
    assert run(*flags, "--resume") == 0 and time.monotonic() - again < 30
