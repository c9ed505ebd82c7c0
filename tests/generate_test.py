"""A checkpoint -> crystals: what was asked comes out, every sample is accounted for, and a run can be interrupted."""

import json
import shutil
import zipfile
from collections import Counter

import ase.io
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import NUM_STEPS, PROPERTY

from unimat_jax import generate
from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.generate import CIF_ZIP, CONFIG, EXTXYZ, MANIFEST
from unimat_jax.periodic_table import SYMBOLS
from unimat_jax.requests import file_requests
from unimat_jax.structure_files import read_structures

ALKALI, ANIONS = ("Li", "Na", "K", "Rb", "Cs"), ("F", "Cl", "Br", "I", "O", "S")
WITHOUT_CRYSTAL = {"no_atoms", "cell_degenerate", "atoms_overlap", "not_finite", "no_element_there"}


def noisy(generator, seed, noise):
    """The generator's parameters with random numbers added, where the generator wants them."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: jax.device_put(a + (rng.normal(size=a.shape) * noise).astype(np.float32), a.sharding),
        generator.params,
    )


@pytest.fixture
def wild(generator, monkeypatch):
    """The generator with parameters that make no sense, none of them zero."""
    monkeypatch.setattr(generator, "params", noisy(generator, 0, 0.1))
    return generator


def rows(directory):
    return [json.loads(line) for line in (directory / MANIFEST).read_text().splitlines()]


def run(generator, directory, requests, condition=None, seed=0, **options):
    return generate.run(
        generator, requests, generator.settings(), condition or {}, seed=seed, output_dir=directory, **options
    )


def symbols(crystal):
    return Counter(crystal.symbols)


FORMULAS = st.dictionaries(st.sampled_from(ALKALI + ANIONS), st.integers(1, 3), min_size=1, max_size=4)


@given(st.lists(FORMULAS, min_size=1, max_size=4), st.integers(0, 2**31 - 1))
@settings(max_examples=15)
def test_the_atoms_are_those_asked_for_by_construction(generator, formulas, seed):
    """Whatever the weights: here random ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "params", noisy(generator, seed, 0.15))
        written = ["".join(f"{s}{n}" for s, n in atoms.items()) for atoms in formulas]
        samples = generator.generate(4, formula=written, seed=seed)
    assert [s.index for s in samples] == [0, 1, 2, 3]
    for sample in samples:
        if sample.crystal is None:
            assert sample.status in WITHOUT_CRYSTAL and sample.message
        else:
            assert sample.status in ("ok", "slot_at_null")
            assert symbols(sample.crystal) == formulas[sample.index % len(formulas)]


def test_atoms_at_the_null_place_are_told_and_stay(generator, monkeypatch):
    spec = generator.spec
    x = jnp.linspace(-3.2, -2.1, spec.num_slots).reshape(1, *spec.grid, 1) * jnp.ones((4, 1, 1, 1, 3))
    sodium = np.argwhere(spec.table.atomic_numbers == 11)[0]
    x = x.at[1, 0, sodium[0], sodium[1]].set(0.3)
    monkeypatch.setattr(generator, "_sampler", lambda settings, size: lambda *a: (x, jnp.zeros((4, 6))))
    all_there, all_but_one = generator.generate(2, formula="NaCl3")
    for sample, number in ((all_there, 4), (all_but_one, 3)):
        assert sample.status == "slot_at_null"
        assert sample.message == f"{number} of the asked atoms went to the null place"
        assert sample.crystal is not None and symbols(sample.crystal) == {"Na": 1, "Cl": 3}


def test_a_chemical_system_has_no_other_element_and_a_missing_one_is_a_status(wild):
    samples = wild.generate(12, chemical_system="Na-Cl-O", seed=3)
    made = [s for s in samples if s.crystal is not None]
    assert made and all(set(s.crystal.symbols) <= {"Na", "Cl", "O"} for s in made)
    for sample in made:
        missing = {"Na", "Cl", "O"} - set(sample.crystal.symbols)
        assert sample.status == ("element_missing" if missing else "ok")
        assert all(symbol in sample.message for symbol in missing)


def test_a_missing_element_is_told(generator, monkeypatch):
    spec = generator.spec
    sodium = np.argwhere(spec.table.atomic_numbers == 11)[0]
    x = jnp.full((4, *spec.grid, 3), -3.0).at[:, 0, sodium[0], sodium[1]].set(0.2)
    monkeypatch.setattr(generator, "_sampler", lambda settings, size: lambda *a: (x, jnp.zeros((4, 6))))
    sample, other = generator.generate(2, chemical_system="Na-Cl-O")[0], generator.generate(1, chemical_system="Na")[0]
    assert (sample.status, sample.message) == ("element_missing", "no O, Cl") and sample.crystal is not None
    assert other.status == "ok" and generator.generate(1, elements="Na,Cl")[0].status == "ok"


def test_elements_allow_any_subset_and_nothing_else(wild):
    samples = wild.generate(12, elements="Li,Br,Se", seed=1)
    made = [s for s in samples if s.crystal is not None]
    assert made and all(set(s.crystal.symbols) <= {"Li", "Br", "Se"} for s in made)
    assert {s.status for s in made} == {"ok"}
    anything = [s for s in wild.generate(12, seed=1) if s.crystal is not None]
    assert len({symbol for s in anything for symbol in s.crystal.symbols}) > 3


def test_the_python_api_gives_structures(generator):
    from unimat_jax import Generator

    assert isinstance(generator, Generator)
    samples = generator.generate(3, formula="NaCl", num_formula_units="2", seed=5, method="ddim", num_steps=2)
    assert [s.uid for s in samples] == ["gen_000000", "gen_000001", "gen_000002"]
    for sample in samples:
        assert sample.crystal is not None and sample.crystal.to_ase().info["uid"] == sample.uid
        assert sample.crystal.to_pymatgen().composition.as_dict() == {"Na": 2, "Cl": 2}
    with pytest.raises(TypeError, match="formulae"):
        generator.generate(1, formulae="NaCl")


def same_crystals(a, b):
    assert [(s.uid, s.status) for s in a] == [(s.uid, s.status) for s in b]
    for one, other in zip(a, b, strict=True):
        if one.crystal is not None:
            np.testing.assert_array_equal(one.crystal.atomic_numbers, other.crystal.atomic_numbers)
            np.testing.assert_allclose(one.crystal.lattice, other.crystal.lattice, rtol=1e-3)
            offset = one.crystal.frac_coords - other.crystal.frac_coords
            assert np.abs(offset - np.round(offset)).max() < 1e-3


def test_sample_i_depends_on_the_seed_and_i_alone(generator):
    asked = {"formula": "NaCl,K2O,LiF", "num_formula_units": "1", "seed": 7}
    whole = generator.generate(9, **asked)
    same_crystals(generator.generate(5, **asked), whole[:5])
    same_crystals(generator.generate(9, batch_size=8, **asked), whole)
    other = generator.generate(3, **{**asked, "seed": 8})
    assert any(a.crystal is not None and b.crystal is not None
               and not np.allclose(a.crystal.lattice, b.crystal.lattice, rtol=1e-3)
               for a, b in zip(other, whole, strict=False))  # fmt: skip


def test_a_property_moves_the_sample_and_its_condition_is_standardised(wild):
    low, high = (wild.generate(2, formula="NaCl", condition={PROPERTY: v}) for v in (-3.0, 0.0))
    lattices = [s.crystal.lattice for batch in (low, high) for s in batch if s.crystal is not None]
    assert len(lattices) == 4 and not np.allclose(lattices[0], lattices[2], rtol=1e-4)
    about = wild.condition_schema[0]
    values, given_flags = wild.properties({PROPERTY: about["mean"] + 2 * about["std"]})
    assert values[0] == pytest.approx(2.0) and given_flags.tolist() == [1.0]
    values, given_flags = wild.properties({})
    assert values.tolist() == [0.0] and given_flags.tolist() == [0.0]


@pytest.fixture(scope="module")
def finished(generator, tmp_path_factory):
    """(output directory, requests, statuses, parameters) of ten samples in three batches of four, of all sorts."""
    directory = tmp_path_factory.mktemp("finished") / "out"
    params = noisy(generator, 1, 0.15)
    requests = generator.requests(10, formula="NaCl,Cs3Cl3O2Br2,KF,Rb2S", seed=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "params", params)
        statuses = run(generator, directory, requests, {PROPERTY: -1.5}, seed=4)
    return directory, requests, statuses, params


def test_every_sample_is_accounted_for(finished):
    directory, requests, statuses, _ = finished
    found = rows(directory)
    assert [row["index"] for row in found] == list(range(10)) == [int(row["uid"][4:]) for row in found]
    assert sum(statuses.values()) == 10 and statuses == Counter(row["status"] for row in found)
    for row, request in zip(found, requests, strict=True):
        assert row["seed"] == 4 and row["condition"] == {**request.to_json(), PROPERTY: -1.5}
        if "formula" in row:
            assert row["status"] in ("ok", "slot_at_null")
            for name in ("density", "volume_per_atom", "min_distance", "space_group_number"):
                assert name in row
        else:
            assert row["status"] in WITHOUT_CRYSTAL and row["message"]


def test_the_uid_names_the_same_crystal_in_all_files(finished):
    directory, requests, _, _ = finished
    made = {row["uid"]: row for row in rows(directory) if "formula" in row}
    assert made
    frames = {atoms.info["uid"]: atoms for atoms in ase.io.read(directory / EXTXYZ, ":")}
    with zipfile.ZipFile(directory / CIF_ZIP) as archive:
        names = archive.namelist()
        assert all(f"data_{name.removesuffix('.cif')}\n" in archive.read(name).decode() for name in names)
    cifs = {c.uid.split("/")[-1].split(":")[-1].removesuffix(".cif"): c for c in read_structures(directory / CIF_ZIP)}
    assert list(frames) == [name.removesuffix(".cif") for name in names] == list(made) == list(cifs)
    for uid, atoms in frames.items():
        asked = {SYMBOLS[z]: n for z, n in requests[int(uid[4:])].counts.items()}
        assert Counter(atoms.get_chemical_symbols()) == asked
        cif = cifs[uid]
        assert isinstance(cif, Crystal) and symbols(cif) == asked
        np.testing.assert_allclose(cif.lengths, atoms.cell.lengths(), rtol=1e-6)


def test_config_tells_how_they_were_made(finished, generator, trained):
    config = json.loads((finished[0] / CONFIG).read_text())
    assert config["checkpoint"] == str(trained) and config["checkpoint_step"] == NUM_STEPS
    assert config["parameters"] == "ema" and config["parameters_hash"] == generator.params_hash
    assert config["sampler"]["num_steps"] == 4 and config["condition"] == {PROPERTY: -1.5}
    assert config["num_samples"] == 10 and config["packages"]["jax"] == jax.__version__
    assert config["requests"] == {"formula NaCl": 3, "formula Cs3Cl3O2Br2": 3, "formula KF": 2, "formula Rb2S": 2}


def test_check_reads_the_directory(finished, capsys):
    from unimat_jax.evaluation.validity import main

    assert main([str(finished[0])]) == 0
    assert "10 structures" in capsys.readouterr().out


@pytest.mark.parametrize("cut", ["between files", "in a frame", "in a number", "in a row", "all", "archive"])
def test_an_interrupted_run_goes_on_to_the_same_files(finished, generator, tmp_path, monkeypatch, cut):
    """As if it was killed while the second batch was written."""
    directory, requests, _, params = finished
    monkeypatch.setattr(generator, "params", params)
    again = shutil.copytree(directory, tmp_path / "out")
    manifest, extxyz = (again / MANIFEST).read_text(), (again / EXTXYZ).read_text()
    lines = manifest.splitlines(keepends=True)
    made = [row["uid"] for row in rows(directory) if "formula" in row]
    (again / CIF_ZIP).unlink()
    if cut == "between files":
        (again / MANIFEST).write_text("".join(lines[:4]))
    elif cut == "in a frame":
        (again / MANIFEST).write_text("".join(lines[:4]))
        (again / EXTXYZ).write_text(extxyz[: extxyz.index(f"uid={made[-1]}") + 90])
    elif cut == "in a row":
        (again / MANIFEST).write_text("".join(lines[:6]) + lines[6][:40])
    elif cut == "all":
        (again / MANIFEST).unlink()
        (again / EXTXYZ).unlink()
    elif cut == "in a number":  # the system lost what was written last, and the rows are on disk
        (again / EXTXYZ).write_text(extxyz[:-4])
    run(generator, again, requests, {PROPERTY: -1.5}, seed=4, resume=True)
    for name in (MANIFEST, EXTXYZ, CIF_ZIP):
        assert (again / name).read_bytes() == (directory / name).read_bytes(), name


@pytest.mark.parametrize("before", [3, 4])  # of batches of four
def test_a_run_of_fewer_samples_goes_on_to_more(finished, generator, tmp_path, monkeypatch, before):
    directory, requests, _, params = finished
    monkeypatch.setattr(generator, "params", params)
    again = tmp_path / "out"
    run(generator, again, requests[:before], {PROPERTY: -1.5}, seed=4)
    assert json.loads((again / CONFIG).read_text())["num_samples"] == len(rows(again)) == before
    with pytest.raises(UserError, match=r"made otherwise: .*requests_hash was "):
        run(generator, again, requests[1:], {PROPERTY: -1.5}, seed=4, resume=True)
    run(generator, again, requests, {PROPERTY: -1.5}, seed=4, resume=True)
    for name in (MANIFEST, EXTXYZ, CIF_ZIP):
        assert (again / name).read_bytes() == (directory / name).read_bytes(), name
    one, other = (json.loads((path / CONFIG).read_text()) for path in (again, directory))
    assert {**one, "created": 0} == {**other, "created": 0}


def test_a_run_of_a_version_without_a_setting_goes_on_where_it_is_off(finished, generator, tmp_path):
    directory, requests, _, _ = finished
    again = shutil.copytree(directory, tmp_path / "out")
    config = json.loads((again / CONFIG).read_text())
    (again / CONFIG).write_text(
        json.dumps({**config, "sampler": {k: v for k, v in config["sampler"].items() if k != "closest_ratio"}})
    )
    with pytest.raises(UserError, match=r"made otherwise: sampler.closest_ratio was 0.0, now 0.65: use the same"):
        run(generator, again, requests, {PROPERTY: -1.5}, seed=4, resume=True)
    settings = generator.settings(closest_ratio=0.0)
    generate.run(generator, requests, settings, {PROPERTY: -1.5}, seed=4, output_dir=again, resume=True)


def test_a_batch_that_was_begun_is_sampled_whole_again(generator, monkeypatch):
    """The last bits of a sample depend on its place in the batch."""
    sampled = []

    def sampler(settings, size):
        def run(params, key, arrays):
            sampled.append(np.asarray(arrays["indices"]).tolist())
            return jnp.full((size, *generator.spec.grid, 3), 0.3), jnp.zeros((size, 6))

        return run

    monkeypatch.setattr(generator, "_sampler", sampler)
    requests = generator.requests(10)
    told = []
    batches = list(generator.sample(requests, generator.settings(), {}, seed=0, start=6, arrived=told.append))
    assert told == [2, 2] == [len(batch) for batch in batches]
    assert sampled == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert [[sample.index for sample in batch] for batch in batches] == [[6, 7], [8, 9]]
    assert list(generator.sample(requests, generator.settings(), {}, seed=0, start=10)) == []


def test_resuming_with_other_flags_names_them(finished, generator, tmp_path, monkeypatch):
    again = shutil.copytree(finished[0], tmp_path / "out")
    with pytest.raises(UserError, match=r"made otherwise: seed was 4, now 5: use the same"):
        run(generator, again, finished[1], {PROPERTY: -1.5}, seed=5, resume=True)
    with pytest.raises(UserError, match=rf"made otherwise: condition.{PROPERTY} was -1.5, now None:"):
        run(generator, again, finished[1], {}, seed=4, resume=True)
    with pytest.raises(UserError, match=r"holds a run of \d+ samples and \d+ are asked for"):
        run(generator, again, finished[1][:-1], {PROPERTY: -1.5}, seed=4, resume=True)
    monkeypatch.setattr(generator, "params_hash", "0" * 16)
    with pytest.raises(UserError, match=r"made otherwise: parameters_hash was \w+, now 0{16}:"):
        run(generator, again, finished[1], {PROPERTY: -1.5}, seed=4, resume=True)
    assert (again / MANIFEST).read_bytes() == (finished[0] / MANIFEST).read_bytes()


def test_resuming_with_the_same_checkpoint_elsewhere(finished, generator, tmp_path, monkeypatch):
    again = shutil.copytree(finished[0], tmp_path / "out")
    monkeypatch.setattr(generator, "directory", tmp_path / "moved")
    run(generator, again, finished[1], {PROPERTY: -1.5}, seed=4, resume=True)
    assert (again / MANIFEST).read_bytes() == (finished[0] / MANIFEST).read_bytes()


def test_an_output_directory_with_something_in_it_is_refused(finished, generator, trained, tmp_path):
    directory, requests = finished[0], finished[1]
    before = {path: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(UserError, match=r"is not empty: add --resume or --overwrite"):
        run(generator, directory, requests)
    assert {path: path.read_bytes() for path in directory.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        run(generator, tmp_path / "file", requests)
    for option in ("resume", "overwrite"):  # neither a folder of other things nor a training run is ours to touch
        with pytest.raises(UserError, match=r"holds (something else|no interrupted run)"):
            run(generator, tmp_path, requests, **{option: True})
        with pytest.raises(UserError, match=r"holds (something else|no interrupted run)"):
            run(generator, trained, requests, **{option: True})
    assert (tmp_path / "file").read_text() == "mine" and (trained / "checkpoints").is_dir()


def test_overwriting_leaves_what_others_put_there(finished, generator, tmp_path):
    again = shutil.copytree(finished[0], tmp_path / "out")
    (again / "notes.txt").write_text("mine")
    run(generator, again, generator.requests(2, formula="LiF"), overwrite=True)
    assert (again / "notes.txt").read_text() == "mine"
    assert [row["condition"]["formula"] for row in rows(again)] == ["LiF", "LiF"]
    assert len(ase.io.read(again / EXTXYZ, ":")) == sum("formula" in row for row in rows(again))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formula": "NaCl", "elements": "Na"}, "--formula and --elements together"),
        ({"formula": "SrTiO3"}, r"SrTiO3 x 1: Ti is outside the model's table"),
        ({"formula": "Na4Cl4"}, r"Na4Cl4 x 1: 4 atoms of Na, but the model holds at most L = 3"),
        ({"formula": "NaCl", "num_formula_units": "1-4"}, r"NaCl x 4: 4 atoms"),
        ({"formula": ""}, r"--formula=: empty, perhaps by a comma too many"),
        ({"formula": "NaCl,"}, r"--formula=: "),
        ({"chemical_system": "Na-Ti"}, r"Na-Ti: Ti is outside"),
        ({"elements": "Na,Yy"}, r"--elements=Na,Yy: 'Yy' is not a chemical element"),
        ({"num_formula_units": "2"}, r"--num_formula_units=2: units of which --formula"),
        ({"condition": {"gap": 1.0}}, rf"--condition=gap=...: the checkpoint knows \['{PROPERTY}'\]"),
        ({"num_steps": 0}, r"num_steps = 0"),
        ({"batch_size": 0}, r"batch_size = 0"),
        ({"method": "euler"}, r"\(--method\) = 'euler'"),
    ],
)
def test_what_cannot_be_asked(generator, options, message):
    with pytest.raises(UserError, match=message):
        generator.generate(2, **options)


def test_no_samples_are_no_request(generator):
    with pytest.raises(UserError, match="--num_samples=0"):
        generator.generate(0)


@pytest.mark.parametrize("text", ["gap", "gap=", "=", "gap=high", "gap=nan", "gap=inf"])
def test_a_condition_that_is_no_number(text):
    with pytest.raises(UserError, match=rf"--condition={text}: write NAME=NUMBER"):
        generate.conditions([text])
    assert generate.conditions(["gap=1.5", "e=-2"]) == {"gap": 1.5, "e": -2.0}


def test_compositions_from_files(generator, tmp_path, capsys):
    structures = [c for c in read_structures(tiny_structures(tmp_path)) if isinstance(c, Crystal)]
    requests = file_requests(str(tmp_path / "references"), 2, None, generator.spec)
    assert len(requests) == 2 * len(structures) == 6
    assert "skipped" in capsys.readouterr().err  # the broken file
    for request, crystal in zip(requests[::2], structures, strict=True):
        assert request.reference_uid == crystal.uid
        assert {SYMBOLS[z]: n for z, n in request.counts.items()} == symbols(crystal)
    assert len(file_requests(str(tmp_path / "references"), 2, 3, generator.spec)) == 3
    run(generator, tmp_path / "out", requests)
    assert [row["reference_uid"] for row in rows(tmp_path / "out")] == [r.reference_uid for r in requests]
    with pytest.raises(UserError, match=r"--compositions_from=.*empty: no structure .* of 1 left out: bad: "):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "bad.cif").write_text("nothing")
        file_requests(str(tmp_path / "empty"), 1, None, generator.spec)


def tiny_structures(folder):
    references = folder / "references"
    references.mkdir()
    for i, pair in enumerate(((11, 17), (19, 9), (3, 35))):
        crystal = Crystal.create(pair, [[0, 0, 0], [0.5, 0.5, 0.5]], 3.5 * np.eye(3), f"ref-{i}")
        (references / f"ref-{i}.cif").write_text(crystal.to_cif())
    (references / "x-broken.cif").write_text("data_x\n_cell_length_a 3\n")
    return references


def test_references_that_do_not_fit_are_named_and_left_out(generator, tmp_path, capsys):
    references = tiny_structures(tmp_path)
    crystal = Crystal.create([11] * 4 + [22], np.random.default_rng(0).random((5, 3)), 9 * np.eye(3), "big")
    (tmp_path / "big.cif").write_text(crystal.to_cif())
    with pytest.raises(UserError, match=r"--compositions_from=.*big.cif: .*: Ti is outside the model's table"):
        file_requests(str(tmp_path / "big.cif"), 1, None, generator.spec)
    (tmp_path / "big.cif").rename(references / "big.cif")
    many = Crystal.create([11] * 4, np.random.default_rng(0).random((4, 3)), 9 * np.eye(3), "many")
    (references / "many.cif").write_text(many.to_cif())
    requests = file_requests(str(references), 1, None, generator.spec)
    assert [r.reference_uid for r in requests] == ["ref-0", "ref-1", "ref-2"]
    told = capsys.readouterr().err
    assert "skipped big: Ti is outside" in told and "skipped many: 4 atoms of Na, but" in told
    assert "3 structures skipped" in told


def test_elements_that_training_never_saw_are_told(generator, tmp_path, capsys):
    seen = generator.description["dataset"]["elements"]
    assert "Na" in seen and "Be" not in seen and generator.spec.table.place_of[4] >= 0
    requests = generator.requests(4, formula="NaCl,BeO")
    assert generator.never_seen(requests) == {"Be": 2}
    assert generator.never_seen(generator.requests(3, elements="Be,Na")) == {"Be": 3}
    assert not generator.never_seen(generator.requests(4, formula="NaCl"))
    generate.run(generator, requests, generator.settings(), {}, seed=0, output_dir=tmp_path / "out")
    assert "no training crystal has Be, which 2 of 4 samples ask for" in capsys.readouterr().err


def test_the_program_on_one_device_gives_what_the_api_gives_on_four(generator, trained, tmp_path):
    flags = ["--num_samples=5", "--formula=NaCl,K2O", "--seed=9", f"--condition={PROPERTY}=-2"]
    done = tiny_run.unimat("generate", f"--checkpoint={trained}", f"--output_dir={tmp_path / 'out'}", *flags)
    assert done.returncode == 0, done.stderr
    assert "generated 5: " in done.stdout and "5 structures" in done.stdout
    assert all(str(tmp_path / "out" / name) in done.stdout for name in (EXTXYZ, CIF_ZIP, MANIFEST, CONFIG))
    condition = {PROPERTY: -2.0}
    samples = generator.generate(5, formula="NaCl,K2O", seed=9, condition=condition)
    assert [row["status"] for row in rows(tmp_path / "out")] == [s.status for s in samples]
    frames = {f.info["uid"]: Crystal.from_ase(f) for f in ase.io.read(tmp_path / "out" / EXTXYZ, ":")}
    made = [s for s in samples if s.crystal is not None]
    assert list(frames) == [s.uid for s in made] and len(made) > 0
    for sample in made:
        found = frames[sample.uid]
        np.testing.assert_allclose(found.lattice, sample.crystal.lattice, atol=2e-3)
        offset = found.frac_coords - sample.crystal.frac_coords
        assert np.abs(offset - np.round(offset)).max() < 2e-3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint={tmp}/nothing"], "nothing: no such directory"),
        (["--checkpoint={tmp}"], "no checkpoint there"),
        (["--checkpoint={run}", "--step=7"], r"--step=7: the run has checkpoints at steps"),
        (["--checkpoint={run}", "--formula=Sr(Ti"], "--formula=Sr(Ti: not understood"),
        (["--checkpoint={run}", "--condition=gap=1"], "--condition=gap=...: the checkpoint knows"),
        (["--checkpoint={run}", "--condition=gap"], "--condition=gap: write NAME=NUMBER"),
        (["--checkpoint={run}", "--num_samples=-1"], "--num_samples=-1"),
        (["--checkpoint={run}", "--num_samples=many"], "--num_samples"),
        (["--checkpoint={run}", "--method=euler"], "--method"),
        (["--checkpoint={run}", "--resume", "--overwrite"], "--overwrite"),
        (["--checkpoint={run}", "--samples_per_composition=0"], "--samples_per_composition=0"),
        (["--checkpoint={run}", "--samples_per_composition=2"], "--samples_per_composition goes with"),
        (["--checkpoint={run}", "--compositions_from={tmp}/x.cif"], "x.cif does not exist"),
        (
            ["--checkpoint={run}", "--compositions_from={tmp}/x.cif", "--formula=NaCl"],
            "--compositions_from and --formula",
        ),
    ],
)
def test_the_program_says_what_is_wrong_in_one_line(trained, tmp_path, capsys, flags, message):
    from unimat_jax.cli import run_program

    flags = [flag.format(tmp=tmp_path, run=trained) for flag in flags]
    assert run_program(generate.main, [*flags, f"--output_dir={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr()
    assert message in said.err and len(said.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_raw_parameters_are_other_ones(trained, generator):
    from unimat_jax import Generator

    raw = Generator(trained / "checkpoints", ema=False, step=NUM_STEPS)
    assert not raw.ema and raw.params_hash != generator.params_hash and raw.step == generator.step
