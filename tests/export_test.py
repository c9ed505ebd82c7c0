"""Exported models: the same bytes for the same run, the same crystals from them, and what is said of damaged ones."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_run import NUM_SAMPLES, NUM_STEPS, config, unimat

from unimat_jax import Generator
from unimat_jax.checkpoint import MODEL
from unimat_jax.cli import run_program
from unimat_jax.errors import UserError
from unimat_jax.export import export, main
from unimat_jax.train import train

FILES = {"README.md", "config.json", "model.json", "model.safetensors", "raw_params.safetensors"}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    """Only to read."""
    return export(trained, tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    return shutil.copytree(exported, tmp_path / "copy")


def test_the_same_run_gives_the_same_bytes(trained, exported, tmp_path):
    """Twice, by a program with another number of devices, and from an export again."""
    assert set(content(exported)) == FILES
    assert content(export(trained, tmp_path / "again")) == content(exported)
    for devices in (1, 4):
        output = tmp_path / f"by_{devices}"
        done = unimat("export", f"--checkpoint={trained}", f"--output_dir={output}", devices=devices)
        assert done.returncode == 0, done.stderr
        assert content(output) == content(exported)
    assert content(export(exported, tmp_path / "second_hand")) == content(exported)


def test_nothing_of_the_machine_is_in_any_file(trained, exported, tmp_path):
    moved = shutil.copytree(trained, tmp_path / "elsewhere")
    changed = json.loads((moved / "config.json").read_text())
    changed["data"]["data_dir"], changed["train"]["compilation_cache"] = "/home/somebody/data", "/home/somebody/cache"
    (moved / "config.json").write_text(json.dumps(changed))
    output = export(moved, tmp_path / "model")
    assert content(output) == content(exported)
    assert not any(b"somebody" in data or str(trained).encode() in data for data in content(output).values())


def test_the_arrays_are_those_of_the_checkpoint_by_dotted_names(exported, generator):
    arrays = load_file(exported / "model.safetensors")
    wanted = {".".join(path): leaf for path, leaf in flat(generator.params)}
    assert arrays.keys() == wanted.keys() and len(arrays) > 20
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, wanted[name])
    raw = load_file(exported / "raw_params.safetensors")
    assert any((raw[name] != array).any() for name, array in arrays.items())
    with safe_open(exported / "model.safetensors", framework="numpy") as file:
        about = json.loads(file.metadata()["unimat"])
    assert about == {"format": 2, "parameters": "ema", "step": NUM_STEPS, "parameters_hash": generator.params_hash}
    modes = {path.stat().st_mode & 0o777 for path in exported.iterdir()}
    assert len(modes) == 1, "some files cannot be read by whom others can"


def flat(tree, path=()):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, (*path, name))
        else:
            yield (*path, name), value


def crystals(samples) -> list:
    """All that a sample is, to the last bit."""
    return [
        (
            s.status,
            s.crystal and [a.tobytes() for a in (s.crystal.atomic_numbers, s.crystal.frac_coords, s.crystal.lattice)],
        )
        for s in samples
    ]


@pytest.mark.parametrize("ema", [True, False])
def test_the_same_crystals_come_out(trained, exported, ema):
    made = [
        crystals(Generator(where, ema=ema).generate(NUM_SAMPLES, formula="NaCl,MgO")) for where in (trained, exported)
    ]
    assert made[0] == made[1] and any(crystal for _, crystal in made[0])


def test_there_is_one_step(exported):
    assert Generator(exported, step=NUM_STEPS).step == NUM_STEPS
    with pytest.raises(UserError, match=f"--step=3: .* is a model exported at step {NUM_STEPS}, and holds no other"):
        Generator(exported, step=3)


def test_a_step_of_the_run(trained, tmp_path):
    with pytest.raises(UserError, match="--step=5: the run has checkpoints at steps"):
        export(trained, tmp_path / "model", step=5)
    assert list(tmp_path.iterdir()) == []


def rewrite(path: Path, change) -> None:
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path)


def test_a_damaged_file_names_file_and_tensor(copy):
    path = copy / "model.safetensors"
    whole, name = path.read_bytes(), min(load_file(path))

    def problem() -> str:
        with pytest.raises(UserError) as caught:
            Generator(copy)
        path.write_bytes(whole)
        assert str(path) in str(caught.value)
        return str(caught.value)

    path.write_bytes(whole[:-100])
    assert "damaged or cut off" in problem()
    path.write_bytes(whole[:20])
    assert "damaged or cut off" in problem()
    path.write_bytes(b"\xff" * 8 + whole[8:])  # a header of 2^64 bytes
    assert "damaged or cut off" in problem()
    path.write_bytes(b"")
    assert "damaged or cut off" in problem()
    path.unlink()
    assert "is missing" in problem()
    rewrite(path, lambda arrays: arrays.pop(name))
    assert f"lacks tensor {name}:" in problem()
    rewrite(path, lambda arrays: arrays.update(extra=np.zeros(3)))
    assert "has the unknown tensor extra:" in problem()
    rewrite(path, lambda arrays: arrays.update({name: np.zeros((7, 7), np.float32)}))
    assert f"tensor {name} is F32 (7, 7), the network in model.json has F32" in problem()
    rewrite(path, lambda arrays: arrays.update({name: arrays[name].astype(np.float64)}))
    assert f"tensor {name} is F64" in problem()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    assert "its parameters have the hash" in problem()
    path.write_bytes((copy / "raw_params.safetensors").read_bytes())
    assert "its parameters have the hash" in problem()
    Generator(copy)


def test_without_the_raw_parameters_the_averaged_ones_still_generate(copy):
    (copy / "raw_params.safetensors").unlink()
    Generator(copy)
    with pytest.raises(UserError, match=r"raw_params.safetensors is missing"):
        Generator(copy, ema=False)


def test_the_averaged_parameters_alone(trained, exported, tmp_path, capsys):
    """The same from a run and from an exported model with both, and given on as it is."""
    alone = tmp_path / "alone"
    assert run_program(main, [f"--checkpoint={trained}", f"--output_dir={alone}", "--averaged_only"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    files, both = content(alone), content(exported)
    assert set(files) == FILES - {"raw_params.safetensors"}
    assert all(files[name] == both[name] for name in ("model.safetensors", "config.json"))
    hashes, hashes_of_both = (json.loads(f[MODEL])["export"]["parameters_hash"] for f in (files, both))
    assert hashes == {"ema": hashes_of_both["ema"]} and set(hashes_of_both) == {"ema", "raw"}
    card = files["README.md"].decode()
    assert "raw_params" not in card and hashes_of_both["raw"] not in card and hashes["ema"] in card
    assert "the raw ones are not here" in card
    assert content(export(exported, tmp_path / "from_both", averaged_only=True)) == files
    assert content(export(alone, tmp_path / "given_on")) == files
    with pytest.raises(
        UserError, match=r"--raw_params \(ema=False\): .*alone was exported with the averaged parameters"
    ):
        Generator(alone, ema=False)


def test_a_shared_model_does_not_say_where_compiled_programs_come_from(trained, copy, monkeypatch):
    """They are machine code."""
    seen = []
    monkeypatch.setattr("unimat_jax.compilation_cache.enable", seen.append)
    text = json.loads((copy / "config.json").read_text())
    text["train"]["compilation_cache"] = "somewhere"
    (copy / "config.json").write_text(json.dumps(text))
    Generator(copy)
    own = shutil.copytree(trained, copy.with_name("own"))
    (own / "config.json").write_text(json.dumps(text))
    Generator(own)
    assert seen == ["auto", "somewhere"]


def test_damaged_json_is_named(copy):
    (copy / MODEL).write_text("{")
    with pytest.raises(UserError, match=r"model.json cannot be read"):
        Generator(copy)


def test_training_does_not_go_on_in_an_exported_model(copy, tiny_data):
    before = content(copy)
    with pytest.raises(UserError, match=r"--workdir=.*copy holds an exported model"):
        train(config(tiny_data), copy)
    assert content(copy) == before


def test_what_is_there_stays(trained, exported, copy, tmp_path):
    with pytest.raises(UserError, match="add --overwrite"):
        export(trained, copy)
    (copy / "README.md").write_text("by hand")
    assert content(export(trained, copy, overwrite=True)) == content(exported)
    (copy / ".git").mkdir()
    with pytest.raises(UserError, match=r"holds \.git, which is of no export"):
        export(trained, copy, overwrite=True)
    with pytest.raises(UserError, match="holds checkpoints, which is of no export"):
        export(trained, trained, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        export(trained, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    export(trained, tmp_path / "empty")
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "file", "empty"}


def test_whole_or_not_at_all(trained, exported, copy, monkeypatch):
    """The card is written last."""
    before = content(copy)
    monkeypatch.setattr("unimat_jax.export.model_card", lambda *_: 1 / 0)
    for output in (copy, copy.with_name("new")):
        with pytest.raises(ZeroDivisionError):
            export(trained, output, overwrite=True)
    assert [path.name for path in copy.parent.iterdir()] == ["copy"] and content(copy) == before


def test_the_card_tells_the_run(trained, exported, tiny_data):
    card = (exported / "README.md").read_text()
    description = json.loads((trained / MODEL).read_text())
    head = card.split("---\n")[1]
    assert 'license: "cc-by-4.0"\n' in head and "library_name: unimat-jax\n" in head and "- unimat\n" in head
    l, h, w = 3, 5, 4
    assert f"| tensor L x H x W | {l} x {h} x {w}, fractional coordinates |" in card
    assert f"{description['num_params']:,} parameters" in card and f"{NUM_STEPS} steps of 8 crystals" in card
    assert "36 train, 10 validation" in card
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "eval/loss" in row][-1]
    assert f"| eval/loss | {last['eval/loss']:.4g} |" in card and "_t0" not in card
    assert "CC-BY 4.0: the Materials Project" in card and "formation_energy_per_atom (eV/atom)" in card
    assert "{" not in card.replace("{Scal", "").split("```bibtex")[0], "a field was not filled in"


def test_a_licence_that_nobody_knows_is_called_unknown(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    description = json.loads((run / MODEL).read_text())
    description["dataset"]["name"] = "crystals"
    (run / MODEL).write_text(json.dumps(description))
    card = (export(run, tmp_path / "a") / "README.md").read_text()
    assert 'license: "unknown"' in card
    assert "Licence and origin of the data: **unknown**" in card and "and that of its training data is unknown" in card
    told = export(run, tmp_path / "b", licence="mit", data_licence="CC0, our own calculations")
    card = (told / "README.md").read_text()
    assert 'license: "mit"' in card and "CC0, our own calculations." in card and "unknown" not in card.split("##")[3]
    assert content(export(told, tmp_path / "c")) == content(told)
