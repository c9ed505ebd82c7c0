"""`unimat vasp`: input against pymatgen's own sets, real vasprun.xml files of ASE's test data, every way to fail."""

import csv
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import ase.io
import ase.test
import numpy as np
import pymatgen.core
import pytest
import shared_data
from pymatgen.io.vasp import Incar
from stability_test import read, write

import unimat_jax.starter
from benchmarks.vasp_inputs import check_input
from unimat_jax.cli import run_program
from unimat_jax.crystal import Crystal
from unimat_jax.stability import outputs
from unimat_jax.stability.vasp import command
from unimat_jax.stability.vasp.inputs import FOLDERS, MANIFEST, folder_name
from unimat_jax.structure_files import read_structures

REAL = Path(ase.test.__file__).parent / "testdata" / "vasp" / "vasprun_dfpt.xml"
"""NaCl by VASP 6.3.2, PBE, potentials Na and Cl, 400 eV, at its experimental cell: part of ASE's wheel (LGPL)."""
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def run(*flags):
    return run_program(command.main, [str(flag) for flag in flags])


def manifest(directory):
    with (directory / MANIFEST).open(newline="") as file:
        return list(csv.DictReader(file))


def crystals(number):
    """Real ones: of Perov-5 where that is there, else of the package."""
    if os.environ.get("UNIMAT_DATA"):
        return shared_data.load("perov_5/val", number)
    return list(read_structures(Path(str(unimat_jax.starter.__file__)).parent / "starter.npz"))[:number]


@pytest.mark.parametrize(("symprec", "settings"), [(0, {}), (0.01, {"standardize": True, "sym_prec": 0.01})])
def test_input_is_pymatgens_field_by_field(tmp_path, symprec, settings):
    ours = list(read_structures(write(tmp_path / "raw.extxyz", crystals(4))))  # the format rounds
    flags = [f"--structures={tmp_path / 'raw.extxyz'}", f"--output_dir={tmp_path / 'out'}", "--num_workers=0"]
    assert run("inputs", *flags, f"--symprec={symprec}") == 0
    rows = manifest(tmp_path / "out")
    assert [row["uid"] for row in rows] == [crystal.uid for crystal in ours]
    assert (tmp_path / "out" / FOLDERS).read_text().split() == [row["folder"] for row in rows]
    for row, crystal in zip(rows, ours, strict=True):
        assert row["status"] == "written" and row["settings"] == "mp"
        assert check_input(tmp_path / "out" / row["folder"], crystal, **settings) > 40


def salt(uid="salt", **changes):
    frac = changes.pop("frac", [[0, 0, 0], [0.5, 0.5, 0.5]])
    return Crystal.create([11, 17], frac, 2.72739551 * (1 - np.eye(3)), uid, **changes)


def test_odd_structures_have_a_status_and_cost_nothing_else(tmp_path, capsys):
    iron = Crystal.create([26, 8], [[0, 0, 0], [0.5, 0.5, 0.5]], 4.3 * np.eye(3), "FeO / ../é")
    odd = [salt(), iron, salt("near", frac=[[0, 0, 0], [0.05, 0, 0]]),
           Crystal.create([87], [[0, 0, 0]], 6 * np.eye(3), "francium")]  # fmt: skip
    source = write(tmp_path / "raw.extxyz", odd)
    source.write_text(source.read_text() + source.read_text().splitlines()[1].join(["1\n", "\nX 0 0 0\n"]))
    out = tmp_path / "out"
    flags = [f"--structures={source}", f"--output_dir={out}", "--num_workers=0"]
    assert run("inputs", *flags, "--settings=unimat") == 0
    assert "5 structures: 2 written" in capsys.readouterr().out
    rows = manifest(out)
    assert [row["status"] for row in rows] == [
        "written", "written", "failed(overlapping_atoms)", "failed(no_potential)", "failed(bad_element)",
    ]  # fmt: skip
    assert "Fr" in rows[3]["message"] and rows[2]["folder"] == ""
    assert rows[0]["potentials"] == "Na_pv (PBE_54) Cl (PBE)"
    assert rows[1]["folder"] == "runs/00002-FeO" and (out / rows[1]["folder"] / "INCAR").is_file()
    incar = Incar.from_file(out / rows[1]["folder"] / "INCAR")
    assert incar["LDAUU"] == [5.3, 0] and incar["ENCUT"] == 520 and incar["MAGMOM"] == [5.0, 0.6]
    for name in ("run_vasp.py", "submit.sh"):
        assert (out / name).is_file()

    kept = (out / rows[0]["folder"] / "INCAR").read_text() + "# mine\n"
    (out / rows[0]["folder"] / "INCAR").write_text(kept)
    assert run("inputs", *flags, "--settings=unimat") == 2 and "--resume or --overwrite" in capsys.readouterr().err
    assert run("inputs", *flags, "--resume") == 2 and "give the same flags" in capsys.readouterr().err
    assert run("inputs", *flags, "--settings=unimat", "--resume") == 0
    assert manifest(out) == rows and (out / rows[0]["folder"] / "INCAR").read_text() == kept
    write(tmp_path / "other.extxyz", odd[::-1])
    other = [f"--structures={tmp_path / 'other.extxyz'}", *flags[1:], "--settings=unimat"]
    assert run("inputs", *other, "--resume") == 2 and "is of other structures" in capsys.readouterr().err
    (out / rows[0]["folder"] / "vasprun.xml").write_text("")
    assert run("inputs", *flags, "--overwrite") == 2 and "would delete results" in capsys.readouterr().err
    (out / rows[0]["folder"] / "vasprun.xml").unlink()
    assert run("inputs", *other, "--overwrite") == 0
    assert [row["uid"] for row in manifest(out)] == [crystal.uid for crystal in odd[::-1]]


def potential(symbol, release):
    """The form of a POTCAR, without its numbers, which are VASP's."""
    text = (
        f"  PAW_PBE {symbol} {release}\n  1.0\nparameters from PSCTR are:\n   VRHFIN ={symbol.partition('_')[0]}: s\n"
    )
    text += f"   LEXCH  = PE\n   TITEL  = PAW_PBE {symbol} {release}\n   ENMAX  = 300.0\n"
    return text + "END of PSCTR-controll parameters\n 1.0 2.0\nEnd of Dataset\n"


def test_real_potentials_are_taken_where_the_user_has_them(tmp_path, monkeypatch):
    """Of another release for each element that the paper took a newer one for; added to what had none."""
    for release, symbol in (("POT_GGA_PAW_PBE_54", "Na_pv"), ("POT_GGA_PAW_PBE", "Cl"), ("POT_GGA_PAW_PBE", "K_sv")):
        (tmp_path / release).mkdir(exist_ok=True)
        (tmp_path / release / f"POTCAR.{symbol}").write_text(potential(symbol, release))
    bromide = Crystal.create([19, 35], [[0, 0, 0], [0.5, 0.5, 0.5]], 3.3 * (1 - np.eye(3)), "bromide")
    write(tmp_path / "raw.extxyz", [salt(), bromide])
    flags = [f"--structures={tmp_path / 'raw.extxyz'}", f"--output_dir={tmp_path / 'out'}", "--num_workers=0"]
    flags += ["--settings=unimat"]
    monkeypatch.setitem(pymatgen.core.SETTINGS, "PMG_VASP_PSP_DIR", str(tmp_path))
    assert run("inputs", *flags, "--potcar_spec") == 0
    folder = tmp_path / "out" / manifest(tmp_path / "out")[0]["folder"]
    assert not (folder / "POTCAR").exists() and (folder / "POTCAR.spec").read_text() == "Na_pv\nCl\n"
    assert run("inputs", *flags, "--resume") == 0
    assert re.findall(r"TITEL.* (\S+ \S+)\n", (folder / "POTCAR").read_text()) == [
        "Na_pv POT_GGA_PAW_PBE_54", "Cl POT_GGA_PAW_PBE"]  # fmt: skip
    rows = manifest(tmp_path / "out")
    assert [row["status"] for row in rows] == ["written", "failed(no_potcar)"] and "Br of PBE" in rows[1]["message"]
    assert rows[1]["folder"] and (tmp_path / "out" / FOLDERS).read_text() == f"{rows[0]['folder']}\n"


def test_folder_names_are_safe_and_distinct():
    names = [folder_name(i, uid) for i, uid in enumerate(["a/b", "../..", "", "A" * 300, "é*?", "con", "a b"], 1)]
    assert len({name.lower() for name in names}) == 7
    assert all(re.fullmatch(r"\d{5}(-[A-Za-z0-9][A-Za-z0-9._+-]{0,59})?", name) for name in names), names


def real_run(*changes):
    """The real NaCl run as it is, or with changes (old, new) of its text that must be there."""
    if not REAL.is_file():
        pytest.skip(f"this ASE has no {REAL.name}")
    text = REAL.read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


CUTOFF = (">    400.00000000<", ">    520.00000000<")
POTENTIAL = ("PAW_PBE Na 08Apr2002   ", "PAW_PBE Na_pv 19Sep2006")
NO_RESPONSE = ('<i type="logical" name="LEPSILON"> T  </i>', "")
CHANGES = {
    "as-the-materials-project": (CUTOFF, POTENTIAL),
    "as-it-is": (),
    "potential": (CUTOFF,),
    "functional": (CUTOFF, POTENTIAL, ('name="GGA">PE', 'name="GGA">PS')),
    "hubbard": (CUTOFF, POTENTIAL, (" </incar>", '<i type="logical" name="LDAU"> T </i><v name="LDAUU"> 3.0 0.0 </v>'
                                    '<v name="LDAUJ"> 0.0 0.0 </v></incar>')),
    "pressed": (CUTOFF, POTENTIAL, ('name="PSTRESS">      0.0', 'name="PSTRESS">     50.0')),
    "electrons": (CUTOFF, POTENTIAL, NO_RESPONSE, ('name="NELM">   100', 'name="NELM">    10')),
    "ions": (CUTOFF, POTENTIAL, NO_RESPONSE, ('name="NSW">     0', 'name="NSW">     2'),
             ('name="IBRION">     0', 'name="IBRION">     2'), ('name="IBRION">    -1', 'name="IBRION">     2')),
}  # fmt: skip
EXPECTED = {
    "as-it-is": ("failed(incompatible_settings)", "ENCUT = 400 eV"),
    "as-the-materials-project": ("converged", ""),
    "electrons": ("not_converged", "the electronic steps of the run reached NELM = 10"),
    "functional": ("failed(incompatible_settings)", "invalid run type PBEsol"),
    "hubbard": ("failed(incompatible_settings)", "Invalid U value of 3.0 on Na"),
    "ions": ("not_converged", "the ionic steps of the run reached NSW = 2"),
    "potential": ("failed(incompatible_settings)", "Incompatible POTCAR"),
    "pressed": ("failed(incompatible_settings)", "PSTRESS = 50.0 kB"),
    "truncated": ("failed(unreadable_vasprun)", "vasprun.xml cannot be read"),
}


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collect")
    for name, changes in CHANGES.items():
        text = real_run(*changes)
        if name == "ions":  # a second step
            step = re.search(r" <calculation>.*</calculation>", text, re.S)
            assert step
            text = text.replace(step[0], step[0] * 2)
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "vasprun.xml").write_text(text)
    (folder / "runs" / "truncated").mkdir()
    (folder / "runs" / "truncated" / "vasprun.xml").write_text(real_run()[:40000])
    elements = shared_data.data_dir() / "hull_refs" / "mp-elemental-reference-entries.json.gz"
    flags = [f"--runs={folder / 'runs'}", f"--elements={elements}", f"--output_dir={folder / 'out'}"]
    assert run("collect", *flags, "--num_workers=0") == 0
    return folder


def test_a_real_run_gives_what_the_file_says(collected):
    rows, about = read(collected / "out")
    atoms = ase.io.read(REAL, format="vasp-xml")  # a parser of others
    row = rows["as-the-materials-project"]
    assert row["energy_per_atom"] * 2 == pytest.approx(atoms.get_potential_energy(), abs=1e-7)
    assert row["energy_per_atom"] * 2 == pytest.approx(-6.74587304, abs=1e-8), "e_0_energy, read by eye"
    assert row["max_force"] == pytest.approx(np.linalg.norm(atoms.get_forces(), axis=1).max())
    assert row["max_stress"] == pytest.approx(np.abs(atoms.get_stress()).max() / ase.units.GPa, rel=1e-5)
    assert row["formula"] == "NaCl" and row["volume_per_atom"] == pytest.approx(atoms.get_volume() / 2)
    assert row["magnetic_moment"] is None and row["relax_rmsd"] == 0 and row["space_group_number"] == 225
    # Wang et al. 2021, table 1: -0.614 eV for each Cl; the Materials Project has -2.107 eV/atom for NaCl (mp-22862).
    assert row["correction_per_atom"] == pytest.approx(-0.614 / 2)
    assert row["formation_energy_per_atom"] == pytest.approx(-2.107, abs=0.03)
    assert row["run_type"] == "PBE" and row["encut"] == 520
    assert about["energy_model"] == "vasp" and about["vasp_versions"] == ["6.3.2"] and about["correction"] == "MP2020"
    frames = ase.io.read(collected / "out" / outputs.RELAXED, ":")
    assert {frame.info["uid"] for frame in frames} == set(CHANGES)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_run_has_a_status_and_none_is_mixed_in(collected, name):
    rows, about = read(collected / "out")
    assert set(rows) == set(EXPECTED) and sum(about["status"].values()) == len(EXPECTED)
    status, message = EXPECTED[name]
    assert rows[name]["status"] == status and message in rows[name]["message"]
    assert (rows[name]["formation_energy_per_atom"] is not None) == (status == "converged")


def test_without_corrections_any_settings_are_taken(collected, tmp_path, capsys):
    flags = [f"--runs={collected / 'runs'}", f"--output_dir={tmp_path / 'out'}", "--num_workers=0"]
    assert run("collect", *flags, "--correction=none") == 0
    rows, about = read(tmp_path / "out")
    assert rows["potential"]["status"] == rows["hubbard"]["status"] == "converged"
    assert rows["potential"]["scaled_energy_per_atom"] == pytest.approx(-6.74587304 / 2)
    assert about["correction"] == "none" and about["functional"] == "PBE, PBE+U, PBEsol"
    assert run("collect", *flags) == 2 and "add" in capsys.readouterr().err


def test_runs_of_our_input_come_back_under_their_uids(tmp_path):
    """The static point's energy, the relaxation's way, and a row for each structure that was asked for."""
    names = ("done", "killed", "waiting")
    write(tmp_path / "raw.extxyz", [*map(salt, names), salt("near", frac=[[0, 0, 0], [0.05, 0, 0]])])
    out = tmp_path / "dft"
    flags = [f"--structures={tmp_path / 'raw.extxyz'}", f"--output_dir={out}", "--num_workers=0", "--symprec=0"]
    assert run("inputs", *flags) == 0
    folders = {row["uid"]: out / row["folder"] for row in manifest(out)}
    lower = ("-6.74587304", "-6.84587304")
    good = real_run(*CHANGES["as-the-materials-project"])
    for name, text in (("relax1", good), ("relax2", good), ("static", good.replace(*lower))):
        (folders["done"] / f"vasprun.xml.{name}").write_text(text)
    (folders["killed"] / "vasprun.xml.relax1").write_text(good)
    (folders["killed"] / "vasprun.xml").write_text(good[:1000])
    assert run("collect", f"--runs={out}", f"--output_dir={tmp_path / 'out'}", "--num_workers=0") == 0
    rows, _ = read(tmp_path / "out")
    assert {uid: row["status"] for uid, row in rows.items()} == {
        "done": "converged", "killed": "converged", "waiting": "failed(no_vasprun)",
        "near": "failed(overlapping_atoms)",
    }  # fmt: skip
    assert rows["done"]["energy_per_atom"] == pytest.approx(-6.84587304 / 2) and rows["done"]["force_calls"] == 3
    assert rows["killed"]["stage"] == "relax1" and rows["done"]["stage"] == "static"
    assert rows["killed"]["force_calls"] == 1 and rows["waiting"]["reduced_formula"] == "NaCl"


def test_the_moment_is_the_difference_of_the_spins(tmp_path):
    text = real_run(*CHANGES["as-the-materials-project"], ('name="ISPIN">     1', 'name="ISPIN">     2'))
    up = re.search(r'<set comment="spin 1">.*?</set>\s*</set>(?=\s*</set>\s*</array>\s*</eigenvalues>)', text, re.S)
    assert up
    down = up[0].replace("spin 1", "spin 2").replace("0.1414    1.0000", "0.1414    0.5000")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "vasprun.xml").write_text(text.replace(up[0], up[0] + down))
    assert run("collect", f"--runs={tmp_path / 'runs'}", f"--output_dir={tmp_path / 'out'}", "--num_workers=0") == 0
    rows, _ = read(tmp_path / "out")
    part = re.search(r'name="weights".*?</varray>', text, re.S)
    assert part
    weights = [float(x) for x in re.findall(r"<v>\s*([\d.]+) </v>", part[0])]
    gamma = up[0].count("0.1414    1.0000") * 0.5
    assert rows["a"]["magnetic_moment"] == pytest.approx(gamma * weights[0] / sum(weights)), "three bands at Gamma"


VASP = '''#!{python}
"""Not VASP: leaves a finished real run's files where VASP would, and says what it was asked."""
import pathlib, shutil
here = pathlib.Path.cwd()
with open("{log}", "a") as file:
    incar = (here / "INCAR").read_text()
    file.write("static " if "NSW = 0" in incar else "relax ")
shutil.copy("{run}", "vasprun.xml")
shutil.copy("POSCAR", "CONTCAR")
for name in ("OSZICAR", "OUTCAR"):
    pathlib.Path(name).write_text("")
'''


def test_the_run_script_relaxes_twice_and_ends_with_a_static_point(tmp_path):
    if importlib.util.find_spec("custodian") is None:
        pytest.skip("custodian is not installed: pip install 'unimat-jax[vasp]'")
    write(tmp_path / "raw.extxyz", [salt()])
    out = tmp_path / "dft"
    assert run("inputs", f"--structures={tmp_path / 'raw.extxyz'}", f"--output_dir={out}", "--num_workers=0") == 0
    (tmp_path / "run.xml").write_text(real_run(*CHANGES["as-the-materials-project"]))
    program = tmp_path / "vasp_std"
    program.write_text(VASP.format(python=sys.executable, log=tmp_path / "log", run=tmp_path / "run.xml"))
    program.chmod(0o755)
    folder = (out / FOLDERS).read_text().strip()
    command = [sys.executable, "run_vasp.py", folder, f"--vasp_cmd={program}", "--gzip"]

    def submit():
        return subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)

    done = submit()
    assert done.returncode != 0 and "has no POTCAR" in done.stderr
    (out / folder / "POTCAR").write_text(potential("Na_pv", "1") + potential("Cl", "1"))
    done = submit()
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log").read_text() == "relax relax static "
    assert submit().returncode == 0 and (tmp_path / "log").read_text() == "relax relax static ", "done is done"
    assert run("collect", f"--runs={out}", f"--output_dir={tmp_path / 'out'}", "--num_workers=0") == 0
    rows, _ = read(tmp_path / "out")
    assert rows["salt"]["status"] == "converged" and rows["salt"]["force_calls"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "choose from inputs, collect"),
        (["collect", "--runs=nowhere", "--output_dir=x"], "nowhere is no directory"),
        (["inputs", "--structures=nowhere.cif", "--output_dir=x"], "nowhere.cif does not exist"),
        (["inputs", "--structures=x.cif", "--output_dir=x", "--symprec=-1"], "--symprec=-1.0: give a length"),
        (["collect", "--runs=.", "--output_dir=x", "--correction=mp"], "invalid choice"),
    ],
)
def test_what_a_user_can_mend_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error and not (tmp_path / "x").exists()


def test_a_directory_without_runs_and_a_foreign_manifest(tmp_path, capsys):
    assert run("collect", f"--runs={tmp_path}", f"--output_dir={tmp_path / 'out'}") == 2
    assert "no vasprun.xml below" in capsys.readouterr().err
    (tmp_path / MANIFEST).write_text("name\na\n")
    assert run("collect", f"--runs={tmp_path}", f"--output_dir={tmp_path / 'out'}") == 2
    assert "is no manifest" in capsys.readouterr().err
