"""Models that come with the package: found by their name, and each that is really there is whole and generates."""

import json
from collections import Counter
from pathlib import Path

import pytest
from tiny_run import NUM_STEPS

from unimat_jax import Generator, generate, released
from unimat_jax.checkpoint import CONFIG, MODEL, read_json, read_run
from unimat_jax.cli import run_program
from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluation.validity import check
from unimat_jax.export import CARD, export, main
from unimat_jax.model_card import composes
from unimat_jax.structure_files import read_structures
from unimat_jax.weights import FILES

MOST_BYTES = 10_000_000
ASKED = {
    "carbon_24": ("C8", {"C": 8}),
    "mp_20": ("NaCl", {"Na": 1, "Cl": 1}),
    "perov_5": ("SrTiO3", {"Sr": 1, "Ti": 1, "O": 3}),
}
"""Of each released model: a composition that it has to make crystals of."""


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    """A folder with one released model, "tiny". Only to read."""
    folder = tmp_path_factory.mktemp("package") / "released"
    export(trained, folder / "tiny", averaged_only=True)
    return folder


@pytest.fixture
def tiny(exported, tmp_path, monkeypatch) -> Path:
    """The package has one model, "tiny", and the working directory is empty."""
    monkeypatch.setattr(released, "FOLDER", exported)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return exported / "tiny"


def test_a_name_is_a_checkpoint(tiny):
    assert released.models() == {"tiny": tiny}
    for name in ("tiny", Path("tiny")):
        assert read_run(name) == read_run(tiny) and read_run(name)[0] == tiny
    assert Generator("tiny").params_hash == Generator(tiny).params_hash


def test_the_program_takes_a_name(tiny, capsys):
    flags = ["--checkpoint=tiny", "--formula=NaCl", "--num_samples=3", "--output_dir=out"]
    assert run_program(generate.main, flags) == 0, capsys.readouterr().err
    made = list(read_structures("out"))
    assert made and all(isinstance(c, Crystal) and Counter(c.symbols) == {"Na": 1, "Cl": 1} for c in made)
    assert json.loads(Path("out", "config.json").read_text())["parameters_hash"] == Generator(tiny).params_hash


def test_export_takes_a_name_and_gives_the_same(tiny, capsys):
    assert run_program(main, ["--checkpoint=tiny", "--output_dir=again"]) == 0, capsys.readouterr().err
    files = {path.name: path.read_bytes() for path in Path("again").iterdir()}
    assert files == {path.name: path.read_bytes() for path in tiny.iterdir()}


def test_a_path_wins_over_a_name(tiny, trained):
    Path("tiny").symlink_to(trained)
    assert read_run("tiny")[0] == Path("tiny") and "export" not in read_run("tiny")[2]


@pytest.mark.parametrize(("make", "what"), [("mkdir", "no checkpoint there"), ("touch", "a file")])
def test_a_path_that_is_no_run_tells_of_the_model_that_it_hides(tiny, make, what):
    getattr(Path("tiny"), make)()
    with pytest.raises(UserError, match=rf"--checkpoint=tiny: {what}.*that name is --checkpoint={tiny}$") as caught:
        read_run("tiny")
    assert Generator(str(caught.value).rpartition("=")[2]).step == NUM_STEPS


def test_an_unknown_name_is_told_the_known_ones(tiny, capsys):
    wanted = (
        r"--checkpoint=tinny: no such directory, and no released model of that name \(there are tiny\); give the --work"
    )
    with pytest.raises(UserError, match=wanted):
        Generator("tinny")
    for name in ("./tiny", "tiny/", "../released/tiny", ".tiny.partial"):  # paths
        with pytest.raises(UserError, match="no such directory"):
            read_run(name)
    assert run_program(generate.main, ["--checkpoint=tinny", "--output_dir=out"]) == 2
    assert "(there are tiny)" in capsys.readouterr().err and not Path("out").exists()


def test_without_released_models_no_name_is_told(tiny, monkeypatch):
    monkeypatch.setattr(released, "FOLDER", Path.cwd())
    with pytest.raises(UserError, match=r"no such directory; give the --workdir of a training run$"):
        read_run("tiny")
    assert released.checkpoint_help() == "the --workdir of a training run, or an exported model"


def test_half_written_models_and_other_folders_are_none(tiny, tmp_path, monkeypatch):
    for name in (".half.partial", "__pycache__", "whole"):
        (tmp_path / name).mkdir()
    for name in (".half.partial", "whole"):
        (tmp_path / name / MODEL).touch()
    monkeypatch.setattr(released, "FOLDER", tmp_path)
    assert list(released.models()) == ["whole"]


def test_help_names_them(tiny):
    assert "or the name of a released one: tiny" in " ".join(generate.parser().format_help().split())


# Those that are really there


@pytest.fixture(scope="module", params=sorted(released.models()))
def model(request) -> Path:
    return released.models()[request.param]


def test_it_is_small_and_whole(model):
    files = {path.name: path.stat().st_size for path in model.iterdir()}
    assert set(files) == {CARD, CONFIG, MODEL, FILES["ema"]}, "export it with --averaged_only"
    assert sum(files.values()) < MOST_BYTES


def test_nothing_in_it_names_a_machine(model):
    def texts(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for inside in value.values() if isinstance(value, dict) else value:
                yield from texts(inside)

    found = [text for name in (CONFIG, MODEL) for text in texts(read_json(model / name))]
    assert found and not [text for text in found if text.startswith(("/", "~"))]


def test_its_card_names_the_licences(model):
    about, card = read_json(model / MODEL)["export"], (model / CARD).read_text(encoding="utf-8")
    assert about["license"] != "unknown", "export it with --license"
    assert f"license: {json.dumps(about['license'])}\n" in card
    assert about["dataset"]["license"] and about["dataset"]["license"] in card
    assert about["dataset"]["citation"] and about["dataset"]["citation"] in card


def test_it_generates(model):
    """With its own sampler. That the parameters are those of which model.json tells the hash, `Generator` checks."""
    formula, atoms = ASKED[model.name]
    generator = Generator(model.name)
    assert generator.directory == model
    assert {"ema": generator.params_hash} == generator.description["export"]["parameters_hash"]
    made = generator.generate(2, formula=formula, batch_size=2)
    assert [Counter(s.crystal.symbols) for s in made if s.crystal] == [atoms, atoms], [s.message for s in made]
    assert any(check(s.crystal).struct_valid for s in made), "atoms lie on each other"
    if composes(generator.description):
        assert all(s.crystal for s in generator.generate(2, batch_size=2))
