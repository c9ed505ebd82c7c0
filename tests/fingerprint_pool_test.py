"""Fingerprints of many crystals: order, failures, time limit, and the cache on disk."""

import time

import numpy as np
import pytest
from crystal_cases import diamond, perovskite, quartz, random_crystal

from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluation import fingerprint_pool
from unimat_jax.evaluation.crystalnn import structure_fingerprint
from unimat_jax.evaluation.fingerprint_pool import content_key, fingerprints
from unimat_jax.evaluation.magpie import composition_fingerprint

BERKELIUM = Crystal.create([97], [[0, 0, 0]], 3.5 * np.eye(3), "Bk")


def some(number: int) -> list[Crystal]:
    rng = np.random.default_rng(0)
    return [random_crystal(rng, 8, tuple(range(1, 90))) for _ in range(number)]


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """The uids of crystals whose fingerprints are computed in this process."""
    done = []
    original = fingerprint_pool.surroundings
    monkeypatch.setattr(fingerprint_pool, "surroundings", lambda c: (done.append(c.uid), original(c))[1])
    return done


def test_in_order_over_processes():
    crystals = [*some(130), BERKELIUM, quartz()]
    found = fingerprints(crystals, num_workers=2, progress=False)
    assert len(found) == len(crystals)
    for crystal, result in list(zip(crystals, found, strict=True))[1::10]:
        np.testing.assert_allclose(result.struct, structure_fingerprint(crystal), atol=1e-9)
        assert result.reason == ""
    assert (found[130].struct, found[130].reason) == (None, "no_radius")
    np.testing.assert_array_equal(found[130].comp, composition_fingerprint([(97, 1)]))
    np.testing.assert_array_equal(found[131].comp, composition_fingerprint([(14, 3), (8, 6)]))


def test_nothing_to_do():
    assert fingerprints([], num_workers=2) == []


def test_found_again_by_content(tmp_path, counted):
    first = fingerprints([quartz(), BERKELIUM, diamond(), quartz()], num_workers=0, cache_dir=tmp_path / "new")
    assert sorted(counted) == ["Bk", "diamond", "quartz"], "one crystal twice is done once"
    moved = Crystal.create(quartz().atomic_numbers, quartz().frac_coords + 1e-10, quartz().lattice, "another name")
    again = fingerprints([diamond(), moved, BERKELIUM, perovskite()], num_workers=0, cache_dir=tmp_path / "new")
    assert counted[3:] == ["SrTiO3"]
    np.testing.assert_array_equal(again[1].struct, first[0].struct)
    np.testing.assert_array_equal(again[0].struct, first[2].struct)
    assert (again[2].struct, again[2].reason) == (None, "no_radius")
    assert not list((tmp_path / "new").glob("*.tmp"))


def test_content_is_elements_coordinates_and_lattice():
    crystal = perovskite()
    key = content_key(crystal)
    negative_zero = np.where(crystal.frac_coords == 0, -0.0, crystal.frac_coords)
    assert key == content_key(Crystal.create(crystal.atomic_numbers, negative_zero, crystal.lattice))
    assert key != content_key(Crystal.create(crystal.atomic_numbers, crystal.frac_coords + 1e-6, crystal.lattice))
    assert key != content_key(Crystal.create(crystal.atomic_numbers, crystal.frac_coords, crystal.lattice + 1e-6))
    assert key != content_key(Crystal.create(crystal.atomic_numbers[::-1], crystal.frac_coords, crystal.lattice))


def test_too_long_costs_itself_and_is_tried_again(tmp_path, monkeypatch, capsys):
    original = fingerprint_pool.surroundings
    monkeypatch.setattr(
        fingerprint_pool, "surroundings", lambda c: time.sleep(60) if c.uid == "quartz" else original(c)
    )
    crystals = [diamond(), quartz(), perovskite()]
    found = fingerprints(crystals, num_workers=0, cache_dir=tmp_path, timeout_s=0.5, progress=False)
    assert [result.reason for result in found] == ["", "timeout", ""]
    assert "no fingerprint of quartz: timeout" in capsys.readouterr().err
    monkeypatch.setattr(fingerprint_pool, "surroundings", original)
    again = fingerprints(crystals, num_workers=0, cache_dir=tmp_path, progress=False)
    assert [result.reason for result in again] == ["", "", ""]


def test_what_fails_unforeseen_costs_itself(monkeypatch):
    def fails(crystal):
        if crystal.uid == "quartz":
            raise ZeroDivisionError
        return original(crystal)

    original = fingerprint_pool.surroundings
    monkeypatch.setattr(fingerprint_pool, "surroundings", fails)
    found = fingerprints([diamond(), quartz(), perovskite()], num_workers=0, progress=False)
    assert [result.reason for result in found] == ["", "error", ""]


def test_a_run_that_is_stopped_keeps_what_it_has(tmp_path, monkeypatch, counted):
    original = fingerprint_pool._outcomes

    def stopped(*arguments):
        for number, found in enumerate(original(*arguments)):
            if number == 2:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(fingerprint_pool, "_outcomes", stopped)
    crystals = [diamond(), quartz(), perovskite()]
    with pytest.raises(KeyboardInterrupt):
        fingerprints(crystals, num_workers=0, cache_dir=tmp_path, progress=False)
    monkeypatch.setattr(fingerprint_pool, "_outcomes", original)
    counted.clear()
    assert all(result.reason == "" for result in fingerprints(crystals, num_workers=0, cache_dir=tmp_path))
    assert counted == ["SrTiO3"]


def test_parts_go_to_disk_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint_pool, "_PART_SIZE", 2)
    fingerprints([diamond(), quartz(), perovskite()], num_workers=0, cache_dir=tmp_path, progress=False)
    assert len(list(tmp_path.glob("fingerprints-*.npz"))) == 2


def test_a_broken_part_is_left_alone(tmp_path, capsys, counted):
    fingerprints([diamond()], num_workers=0, cache_dir=tmp_path, progress=False)
    (tmp_path / "fingerprints-0.npz").write_bytes(b"PK half a file")
    np.savez(tmp_path / "fingerprints-1.npz", key=np.zeros((1, 32), np.uint8), struct=np.zeros((1, 7)), reason=[""])
    fingerprints([diamond()], num_workers=0, cache_dir=tmp_path, progress=False)
    assert counted == ["diamond"]
    assert capsys.readouterr().err.count("no cache of fingerprints") == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        fingerprints([diamond()], cache_dir=tmp_path / "file")
