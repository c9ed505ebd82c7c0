"""The whole way, by the commands that users type: a folder of CIF files -> new, checked crystals.

Compiled with every optimisation, on one device, unlike the other tests.
"""

import json
from collections import Counter

import numpy as np
import pytest
from tiny_run import ELEMENTS, unimat

from data_prep.datasets import source_files
from unimat_jax.crystal import Crystal
from unimat_jax.structure_files import read_structures

CONFIG = """
from unimat_jax import default_config


def get_config():
    config = default_config.get_config()
    config.data.update(dataset="crystals", table="data", properties=("formation_energy_per_atom",))
    config.model.update(base_channels=4, channel_multipliers=(1,), num_res_blocks=0, attention_resolutions=())
    config.diffusion.update(prediction_type="v", null_weight=0.1)
    config.train.update(num_steps=4, batch_size=4, log_every=2, checkpoint_every=4, eval_every=4, eval_examples=8)
    config.sample.update(num_steps=3, batch_size=4)
    return config
"""
TRUNCATED = "data_broken\n_cell_length_a 4.0\n_cell_length_b 4.0\n_cell_"
DISORDERED = """data_mixed
_cell_length_a 4.0
_cell_length_b 4.0
_cell_length_c 4.0
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'P 1'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
Na1 Na 0 0 0 0.5
K1 K 0 0 0 0.5
Cl1 Cl 0.5 0.5 0.5 1
"""


def run(*arguments):
    done = unimat(*arguments, optimised=True)
    assert done.returncode == 0, f"{arguments[0]}: {done.stderr}"
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder: twenty good CIF files, a table of their energies, a truncated file and a disordered crystal."""
    folder = tmp_path_factory.mktemp("end_to_end")
    (folder / "cifs").mkdir()
    rows = ["material_id,formation_energy_per_atom"]
    for crystal in read_structures(source_files("starter", None)[""]):
        assert isinstance(crystal, Crystal)
        if crystal.num_atoms <= 4 and set(crystal.symbols) <= set(ELEMENTS) and len(rows) <= 20:
            (folder / "cifs" / f"{crystal.uid}.cif").write_text(crystal.to_cif())
            rows.append(f"{crystal.uid},{crystal.properties['formation_energy_per_atom']}")
    (folder / "energies.csv").write_text("\n".join(rows) + "\n")
    (folder / "cifs" / "broken.cif").write_text(TRUNCATED)
    (folder / "cifs" / "mixed.cif").write_text(DISORDERED)
    (folder / "tiny.py").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def prepared(folder):
    done = run(
        "prepare", "--dataset=crystals", f"--source={folder / 'cifs'}", f"--data_dir={folder / 'data'}",
        f"--property_table={folder / 'energies.csv'}", "--property=formation_energy_per_atom:eV/atom:PBE:none",
        "--split_fractions=0.7,0.3,0", "--num_workers=1",
    )  # fmt: skip
    return done.stdout


@pytest.fixture(scope="module")
def run_directory(folder, prepared):
    workdir = folder / "run"
    done = run(
        "train", f"--config={folder / 'tiny.py'}", f"--workdir={workdir}", f"--config.data.data_dir={folder / 'data'}"
    )
    assert done.stdout.splitlines()[-1] == f"checkpoint: {workdir / 'checkpoints' / '4'}"
    return workdir


def test_the_report_tells_what_was_dropped_and_why(folder, prepared):
    report = json.loads((folder / "data" / "crystals" / "1.0.0" / "data_report.json").read_text())
    assert (report["read"], report["kept"]) == (22, 20)
    dropped = {item["id"]: reason for reason, items in report["dropped_structures"].items() for item in items}
    assert len(dropped) == 2
    reasons = {uid.split("/")[-1].removesuffix(".cif"): reason for uid, reason in dropped.items()}
    assert reasons["mixed"] == "disordered" and set(reasons) == {"mixed", "broken"}
    assert "22 read, 20 kept, 2 dropped" in prepared and "disordered" in prepared


def test_training_wrote_metrics(run_directory):
    rows = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    merged = {name: value for row in rows for name, value in row.items()}
    assert {"train/loss", "eval/loss", "examples_per_sec"} <= set(merged)
    assert all(np.isfinite(row["train/loss"]) for row in rows if "train/loss" in row)


def test_crystals_of_a_formula_come_out_and_are_checked(folder, run_directory):
    out = folder / "out"
    done = run(
        "generate", f"--checkpoint={run_directory}", f"--output_dir={out}", "--formula=NaCl", "--num_formula_units=1",
        "--num_samples=6", "--condition=formation_energy_per_atom=-2", "--guidance_weight=0.5",
    )  # fmt: skip
    assert "generated 6" in done.stdout
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    made = [row for row in rows if "formula" in row]
    assert len(rows) == 6 and made and {row["formula"] for row in made} == {"NaCl"}
    checked = run("check", out, f"--output_dir={folder / 'checked'}")
    assert "6 structures" in checked.stdout
    summary = json.loads((folder / "checked" / "validity.json").read_text())
    assert summary["num_structures"] == 6 == sum(summary["status"].values())
    verdicts = Counter(row["validity"] for row in made)
    for status, number in verdicts.items():  # those that the manifest gives
        assert summary["status"][status] == number


def test_a_second_generate_does_not_touch_the_first(folder, run_directory):
    done = unimat("generate", f"--checkpoint={run_directory}", f"--output_dir={folder / 'cifs'}", "--formula=NaCl")
    assert done.returncode == 2 and "is not empty" in done.stderr and len(done.stderr.splitlines()) == 1
