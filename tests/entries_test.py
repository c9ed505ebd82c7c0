import json
import sys
import types

import numpy as np
import pytest
from crystal_cases import diamond, perovskite, quartz

from unimat_jax.errors import UserError
from unimat_jax.evaluation.entries import read_entries
from unimat_jax.structure_files import GENERATED, MANIFEST


def generated(directory, manifest=True):
    directory.mkdir()
    (directory / GENERATED).write_text(quartz().to_extxyz() + perovskite().to_extxyz())
    (directory / "generated_crystals_cif.zip").write_bytes(b"the same crystals once more")
    if manifest:
        rows = [
            {"uid": "quartz", "formula": "Si3O6", "status": "ok", "reference_uid": "ref-1"},
            {"uid": "lost", "status": "atoms_overlap", "message": "two atoms", "reference_uid": "ref-2"},
            {"uid": "SrTiO3", "formula": "SrTiO3", "status": "ok"},
        ]
        (directory / MANIFEST).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_a_generate_directory_gives_failures_and_references(tmp_path):
    entries = {e.uid: e for e in read_entries(generated(tmp_path / "out"), progress=False)}
    assert set(entries) == {"quartz", "SrTiO3", "lost"}
    assert entries["quartz"].reference_uid == "ref-1" and entries["SrTiO3"].reference_uid == ""
    lost = entries["lost"]
    assert lost.crystal is None and lost.reason == "atoms_overlap" and lost.reference_uid == "ref-2"


def test_every_frame_of_a_mattergen_directory_once(tmp_path):
    entries = read_entries(generated(tmp_path / "out", manifest=False), progress=False)
    assert [e.uid for e in entries] == ["quartz", "SrTiO3"]


def test_several_paths_repeated_names_and_files_that_are_no_structures(tmp_path, capsys):
    folder = tmp_path / "cifs"
    folder.mkdir()
    (folder / "a.cif").write_text(quartz().to_cif())
    (folder / "broken.cif").write_text("data_broken\n_cell_length_a 3.0\n")
    (folder / "README.txt").write_text("what this is")
    (tmp_path / "a.cif").write_text(diamond().to_cif())
    entries = read_entries([folder, tmp_path / "a.cif"], progress=False)
    assert [e.uid for e in entries] == ["a", "broken", "a#2"]
    assert [e.crystal is None for e in entries] == [False, True, False] and entries[1].reason
    assert "README.txt" in capsys.readouterr().err


def test_references_named_in_extxyz_comments(tmp_path):
    for name, expected in (("mp-12", "mp-12"), ("12", "12")):
        atoms = quartz().to_extxyz().replace("uid=quartz", f"uid=quartz reference_uid={name}")
        (tmp_path / "frames.extxyz").write_text(atoms)
        assert read_entries(tmp_path / "frames.extxyz", progress=False)[0].reference_uid == expected


def test_nothing_at_all_is_an_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_entries(tmp_path / "nowhere", progress=False)
    (tmp_path / "README.txt").write_text("nothing")
    with pytest.raises(UserError, match="no structures in"):
        read_entries(tmp_path, progress=False)


def samples():
    """Two evaluations of quartz and SrTiO3, as arrays of DiffCSP's eval_diff.pt."""
    crystals = [quartz(), perovskite()]
    arrays = {
        "frac_coords": np.concatenate([c.frac_coords for c in crystals]),
        "atom_types": np.concatenate([c.atomic_numbers for c in crystals]),
        "lengths": np.stack([c.lengths for c in crystals]),
        "angles": np.stack([c.angles for c in crystals]),
        "num_atoms": np.array([c.num_atoms for c in crystals]),
    }
    return {name: np.stack([value, value]) for name, value in arrays.items()}


def fake_torch(load):
    """Stands in for torch where it is not installed: only what `torch_files` calls."""
    import contextlib

    module = types.ModuleType("torch")
    module.serialization = types.SimpleNamespace(safe_globals=lambda classes: contextlib.nullcontext())
    module.load = load
    return module


def test_samples_saved_with_torch(tmp_path, monkeypatch):
    path = tmp_path / "eval_diff.pt"
    path.write_bytes(b"")
    asked = {}

    def load(path, **settings):
        asked.update(settings)
        return samples()

    monkeypatch.setitem(sys.modules, "torch", fake_torch(load))
    entries = read_entries(path, progress=False)
    assert asked["weights_only"] is True
    assert [e.uid for e in entries] == ["0/0", "0/1", "1/0", "1/1"]
    assert [e.reference_uid for e in entries] == ["0", "1", "0", "1"]
    assert entries[3].crystal.formula == "SrTiO3" and entries[2].crystal.num_atoms == 9
    np.testing.assert_allclose(entries[0].crystal.lengths, quartz().lengths, atol=1e-6)

    monkeypatch.setitem(sys.modules, "torch", fake_torch(lambda path, **settings: {"weights": 1}))
    with pytest.raises(UserError, match="has no frac_coords, atom_types"):
        read_entries(path, progress=False)

    def refuse(path, **settings):
        raise RuntimeError("Unsupported global: GLOBAL os.system")

    monkeypatch.setitem(sys.modules, "torch", fake_torch(refuse))
    with pytest.raises(UserError, match="holds more than tensors"):
        read_entries(path, progress=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"unimat-jax\[torch\]"):
        read_entries(path, progress=False)


def test_real_torch_files_run_no_code(tmp_path):
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    path = tmp_path / "eval_gen.pt"
    torch.save({name: torch.tensor(value) for name, value in samples().items()}, path)
    assert [e.crystal.num_atoms for e in read_entries(path, progress=False)] == [9, 5, 9, 5]
    marker = tmp_path / "was_run"

    class Bomb:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"frac_coords": Bomb()}, path)
    with pytest.raises(UserError, match="holds more than tensors"):
        read_entries(path, progress=False)
    assert not marker.exists()
