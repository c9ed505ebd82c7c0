"""Real relaxations with ASE's EMT, every end that a relaxation can have, and the journal of a killed run."""

import os
import subprocess
import sys
import time
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import pytest
from stability_calculators import EMT_PATH

from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluation.pool import Pool
from unimat_jax.stability.engines import ENGINES, energy_model
from unimat_jax.stability.journal import Journal, key_of, relax_all
from unimat_jax.stability.relaxation import OPTIMIZERS, Protocol, Relaxation, Relaxer, displacement

TESTS = Path(__file__).parent


def metal(symbols, structure="fcc", a=4.0, uid="", rattle=0.0):
    """A crystal of copper's elements; two share the sites of the cubic cell in turn."""
    atoms = ase.build.bulk("Cu", structure, a=a, cubic=len(symbols) > 1)
    atoms.symbols[:] = [symbols[i % len(symbols)] for i in range(len(atoms))]
    if rattle:
        atoms.rattle(rattle, seed=1)
    return Crystal.from_ase(atoms, uid or "".join(symbols))


def emt():
    return energy_model(EMT_PATH, scale="own")


@pytest.fixture(scope="module")
def relaxed():
    """Relaxes in a worker, as the program does: there BLAS has one thread, with which small matrices go best."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with Pool(1, timeout_s=100) as pool:
            yield lambda crystal, protocol: next(pool.map(Relaxer(emt(), protocol, with_correction=False), [crystal]))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_copper_comes_to_rest_at_emts_lattice_constant(relaxed, optimizer):
    found = relaxed(metal(["Cu"], a=3.9), Protocol(fmax=0.005, optimizer=optimizer))
    assert found.status == "converged" and found.max_force < 0.005
    volume = 4 * abs(np.linalg.det(found.lattice))
    assert volume ** (1 / 3) == pytest.approx(3.59, abs=0.02), "EMT's copper, Jacobsen et al. 1996"
    assert found.energy == pytest.approx(-0.007, abs=0.003), "EMT's zero is the crystal"
    assert found.max_stress < 1.0 and found.force_calls > 5


def test_pressure_shrinks_the_cell_and_the_stress_balances_it(relaxed):
    free, pressed = (relaxed(metal(["Cu"]), Protocol(pressure=p, fmax=0.002)) for p in (0.0, 30.0))
    volumes = [abs(np.linalg.det(found.lattice)) for found in (free, pressed)]
    # EMT's bulk modulus is some 134 GPa: 30 GPa take a good tenth.
    assert 0.8 < volumes[1] / volumes[0] < 0.92
    assert pressed.status == "converged" and pressed.max_stress < 0.5


def test_steps_are_limited_and_counted(relaxed):
    found = relaxed(metal(["Cu", "Au"], rattle=0.2), Protocol(max_steps=3, fmax=1e-6))
    assert found.status == "not_converged" and found.force_calls == 4
    assert found.crystal(metal(["Cu", "Au"])) is not None


def test_displacement_counts_neither_shifts_nor_the_cell():
    start = metal(["Cu", "Au"])
    moved = start.frac_coords + 0.3
    end = Relaxation("converged", lattice=(1.1 * start.lattice).tolist(), frac_coords=moved.tolist())
    assert displacement(start, end) == pytest.approx((0, 0), abs=1e-12)
    moved[0, 0] += 0.1  # one atom of four by 0.1 of the mean cell's 4.2 A, less the mean of a quarter
    end = Relaxation("converged", lattice=(1.1 * start.lattice).tolist(), frac_coords=moved.tolist())
    expected = 0.42 * np.sqrt((0.75**2 + 3 * 0.25**2) / 4)
    assert displacement(start, end) == pytest.approx((expected, expected / 4.2 * 4 ** (1 / 3)), rel=1e-6)


ODD = {
    "good": (metal(["Cu"]), "converged"),
    "hang": (metal(["Ag"]), "timeout"),
    "raise": (metal(["Pd"]), "failed(calculator_error)"),
    "memory": (metal(["Pt"]), "failed(out_of_memory)"),
    "exit": (metal(["Ni"]), "failed(worker_died)"),
    "nan": (metal(["Al"]), "exploded"),
    "unknown": (metal(["Fe"]), "failed(calculator_error)"),
    "overlap": (Crystal.create([29, 29], [[0, 0, 0], [0, 0, 0.01]], 4 * np.eye(3)), "failed(overlapping_atoms)"),
    "alone": (Crystal.create([29], [[0, 0, 0]], 30 * np.eye(3)), "failed(isolated_atom)"),
    "after": (metal(["Cu", "Au"], a=3.9), "converged"),
}


def test_each_trouble_costs_one_structure(tmp_path):
    model = energy_model("stability_calculators:Misbehaving", scale="own")
    relaxer = Relaxer(model, Protocol(), with_correction=False, memory_limit_gb=8)
    crystals = [crystal for crystal, _ in ODD.values()]
    found = relax_all(crystals, relaxer, Journal(tmp_path / "j"), timeout_s=6, num_workers=2, progress="")
    assert {name: one.label for name, one in zip(ODD, found, strict=True)} == {
        n: label for n, (_, label) in ODD.items()
    }
    assert all(one.message for one in found if one.status not in ("converged", "timeout"))
    assert "no palladium today" in found[2].message
    again = relax_all(crystals, relaxer, Journal(tmp_path / "j"), timeout_s=2, num_workers=0, progress="")
    assert again == found, "all of it from the journal: in this process, hanging or exiting would show"


def in_batches(log, **kwargs):
    return energy_model("stability_calculators:InBatches", scale="own", kwargs={"log": str(log), **kwargs})


def test_batches_find_what_single_relaxations_find(tmp_path):
    crystals = [metal(["Cu", "Au"], a=3.7 + 0.1 * i, rattle=0.1, uid=f"c{i}") for i in range(5)]
    crystals += [metal(["Cu", "Pd"]), metal(["Cu"], a=2.0)]
    for optimizer in OPTIMIZERS:
        single, together = (
            relax_all(crystals, Relaxer(in_batches(tmp_path / "log"), Protocol(optimizer=optimizer), False, size),
                      Journal(tmp_path / f"{optimizer}{size}"), timeout_s=60, num_workers=0, progress="")
            for size in (1, 3)
        )  # fmt: skip
        assert [one.label for one in single] == [one.label for one in together]
        for one, other in zip(single[:5], together[:5], strict=True):
            assert one.status == "converged" and one.force_calls == other.force_calls
            assert one.energy == pytest.approx(other.energy, abs=1e-8)
            assert one.lattice is not None and other.lattice is not None
            assert np.allclose(one.lattice, other.lattice, atol=1e-8)
    sizes = [int(line) for line in (tmp_path / "log").read_text().split()]
    assert max(sizes) == 3 and sizes.count(3) > len(sizes) / 4


def test_each_trouble_costs_one_structure_of_a_batch(tmp_path):
    relaxer = Relaxer(in_batches(tmp_path / "log"), Protocol(), False, batch_size=5, memory_limit_gb=8)
    crystals = [crystal for crystal, _ in ODD.values()]
    found = relax_all(crystals, relaxer, Journal(tmp_path / "j"), timeout_s=2, num_workers=2, progress="")
    expected = {name: label for name, (_, label) in ODD.items()}
    assert {name: one.label for name, one in zip(ODD, found, strict=True)} == expected
    assert "no palladium today" in found[2].message


def test_a_batch_that_takes_too_much_memory_is_halved_for_good(tmp_path):
    crystals = [metal(["Cu", "Au"], a=3.8 + 0.05 * i) for i in range(6)]
    relaxer = Relaxer(in_batches(tmp_path / "log", most=2), Protocol(), False, batch_size=6)
    found = relax_all(crystals, relaxer, Journal(tmp_path / "j"), timeout_s=60, num_workers=0, progress="")
    assert [one.status for one in found] == ["converged"] * 6
    sizes = [int(line) for line in (tmp_path / "log").read_text().split()]
    assert sizes[:2] == [6, 3] and max(sizes[4:]) == 2, "the size that did not fit is not tried again"


def test_an_engine_without_batches_says_so(tmp_path):
    relaxer = Relaxer(emt(), Protocol(), False, batch_size=2)
    with pytest.raises(UserError, match="evaluates one crystal at a time"):
        relax_all([metal(["Cu"])], relaxer, Journal(tmp_path / "j"), timeout_s=60, num_workers=0)


def test_a_cell_that_flies_apart_has_exploded(relaxed):
    found = relaxed(metal(["Cu"], a=2.0), Protocol(max_volume_ratio=1.5))
    assert found.status == "exploded" and "volume" in found.message and found.lattice is None


def test_the_same_crystal_is_relaxed_once_and_another_protocol_anew(tmp_path):
    relaxer = Relaxer(emt(), Protocol(), with_correction=False)
    crystals = [metal(["Cu"], uid="a"), metal(["Cu"], uid="b"), metal(["Au"], a=4.2, uid="c")]
    journal = Journal(tmp_path / "j")
    found = relax_all(crystals, relaxer, journal, timeout_s=60, num_workers=1, progress="")
    assert found[0] == found[1] != found[2] and len(journal.relaxations) == 2
    loose = Relaxer(emt(), Protocol(fmax=0.2), with_correction=False)
    others = [Relaxer(emt(), Protocol(optimizer=name), with_correction=False) for name in OPTIMIZERS]
    assert len({key_of(crystals[0], one) for one in [loose, *others]}) == 1 + len(OPTIMIZERS)
    with pytest.raises(UserError, match="optimizer = 'newton': choose from bfgs, fire"):
        Protocol(optimizer="newton")


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    frames = [metal(["Cu", "Au"], a=3.8 + 0.05 * i, uid=f"c{i}").to_ase() for i in range(6)]
    ase.io.write(tmp_path / "c.extxyz", frames)
    command = [
        sys.executable, "-m", "unimat_jax.stability", f"--structures={tmp_path / 'c.extxyz'}", "--energy_scale=own",
        "--energy_model=stability_calculators:Logged", f"--output_dir={tmp_path / 'out'}", "--num_workers=1",
        f'--energy_model_kwargs={{"log": "{tmp_path}", "seconds": 0.5}}',
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    journal = tmp_path / "out" / "relaxations.jsonl"
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 100
        while not journal.is_file() or len(journal.read_text().splitlines()) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
    time.sleep(1)  # the worker ends with the crystal that it is at
    before, done = (tmp_path / "log").read_text().splitlines(), len(Journal(journal).relaxations)
    with journal.open("a") as file:
        file.write('{"key": "torn')
    assert 2 <= done < 6
    again = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, check=True)
    after = (tmp_path / "log").read_text().splitlines()[len(before) :]
    assert "a line was cut off" in again.stderr and "6 structures: 6 converged" in again.stdout
    finished = {line.split()[-1] for line in before[:done]}
    assert len(set(after)) == 6 - done and not finished & {line.split()[-1] for line in after}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("magic", {}, "choose from sevennet, chgnet, gpaw, or give a calculator as package.module:Callable"),
        (EMT_PATH, {}, "needs --energy_scale"),
        ("nowhere.calc:Calc", {"scale": "own"}, "nowhere is not installed here"),
        (EMT_PATH, {"scale": "own", "kwargs": {"model_path": "no/such.nqx"}}, "is no file"),
    ],
)
def test_models_that_are_none(name, settings, message):
    with pytest.raises(UserError, match=message):
        energy_model(name, **settings)


@pytest.mark.parametrize(
    ("path", "kwargs", "message"),
    [
        ("ase.build:bulk", {"name": "Cu"}, "makes a Atoms, no ASE calculator"),
        ("ase.build:bulk", {"colour": "red"}, "cannot be made .*colour"),
        ("ase.build:no_such", {}, "cannot be made .*no_such"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(tmp_path, path, kwargs, message):
    relaxer = Relaxer(energy_model(path, scale="own", kwargs=kwargs), Protocol(), with_correction=False)
    with pytest.raises(UserError, match=message):
        relax_all([metal(["Cu"])], relaxer, Journal(tmp_path / "j"), timeout_s=60, num_workers=0)


def test_weights_are_told_by_their_hash(tmp_path):
    weights = tmp_path / "w.bin"
    weights.write_bytes(b"abc")
    model = energy_model(EMT_PATH, scale="own", kwargs={"model_path": str(weights)})
    assert model.weights["w.bin"].startswith("ba7816bf"), "SHA-256 of abc"
    weights.write_bytes(b"abd")
    other = energy_model(EMT_PATH, scale="own", kwargs={"model_path": str(weights)})
    assert other.identity != model.identity


def test_a_declared_scale_is_not_overruled():
    for name, engine in ENGINES.items():
        with pytest.raises(UserError, match=f"{name} declares {engine.scale}"):
            energy_model(name, scale="own")
