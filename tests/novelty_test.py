"""Clusters, known structures and S.U.N. of crystals whose answer is known, or pymatgen's."""

import functools
import math

import numpy as np
import pytest
from crystal_cases import diamond, mirrored, perovskite, quartz
from pymatgen.analysis.structure_matcher import StructureMatcher
from shared_data import load

from unimat_jax.crystal import Crystal
from unimat_jax.evaluation import clusters, matching, novelty
from unimat_jax.evaluation.alignment import TOLERANCES, reduced
from unimat_jax.evaluation.clusters import content_order
from unimat_jax.evaluation.novelty import KnownStructures, match_known, novelty_metrics, unique_clusters

HERE = {"num_workers": 1, "progress": False}


def renamed(crystal: Crystal, uid: str, scale: float = 0.0, seed: int = 0) -> Crystal:
    """The crystal under another name, its atoms in another order and moved by `scale` (fractional)."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(crystal.num_atoms)
    frac = crystal.frac_coords[order] + scale * rng.normal(size=crystal.frac_coords.shape) + rng.uniform(size=3)
    return Crystal.create(crystal.atomic_numbers[order], frac, crystal.lattice, uid)


def swapped() -> Crystal:
    return Crystal.create([22, 38, 8, 8, 8], perovskite().frac_coords, perovskite().lattice, "TiSrO3")


GENERATED = [
    renamed(quartz(), "0"),
    renamed(perovskite(), "1"),
    None,
    renamed(mirrored(quartz()), "3", 0.002, 3),
    renamed(swapped(), "4"),
    renamed(perovskite(), "5", 0.002, 5),
    renamed(diamond(), "6"),
    renamed(quartz(), "7", 0.002, 7),
]


def groups(leaders) -> set[frozenset[int]]:
    found: dict[int, set[int]] = {}
    for i, leader in enumerate(leaders):
        if leader is not None:
            found.setdefault(leader, set()).add(i)
    return {frozenset(group) for group in found.values()}


def test_clusters():
    found = unique_clusters(GENERATED, **HERE)
    assert groups(found.leaders) == {frozenset(group) for group in [(0, 3, 7), (1, 5), (4,), (6,)]}
    assert sum(found.unique) == 4
    assert all(found.leaders[leader] == leader for leader in found.leaders if leader is not None)
    assert found.leaders[2] is None and found.reasons == ["", "", "no_crystal", *[""] * 5]
    assert unique_clusters([], **HERE).leaders == []


def test_order_of_contents():
    small, same = quartz(), renamed(quartz(), "other name")
    large = Crystal.create(small.atomic_numbers, small.frac_coords, small.lattice * (1 + 1e-6))
    assert content_order(small)[0] == pytest.approx(small.volume / 9) and content_order(small) < content_order(large)
    assert content_order(small) == content_order(Crystal.create(small.atomic_numbers, small.frac_coords, small.lattice))
    assert content_order(small) != content_order(same), "atoms in another order: a tie, but a lasting one"


@functools.cache
def carbon_of_6_atoms() -> list[Crystal]:
    return [c for c in load("carbon_24/val", 100, seed=1) if reduced(c).num_atoms == 6]


def matched_carbon(number: int) -> list[Crystal]:
    """Carbon-24 crystals of 6 atoms in the reduced cell, rattled copies among them: many `fit`, not transitively."""
    crystals = carbon_of_6_atoms()[:number]
    return crystals + [renamed(c, f"{c.uid} again", 0.03, i) for i, c in enumerate(crystals)]


@pytest.mark.parametrize("preset", ["cdvae", "lemat"])
def test_clusters_are_those_of_pymatgen_in_the_same_order(preset):
    crystals = matched_carbon(12)
    tolerances = TOLERANCES[preset]
    matcher = StructureMatcher(ltol=tolerances.ltol, stol=tolerances.stol, angle_tol=tolerances.angle_tol)
    number = {c.uid: i for i, c in enumerate(crystals)}
    structures = [c.to_pymatgen() for c in sorted(crystals, key=content_order)]
    expected = {frozenset(number[s.properties["uid"]] for s in group) for group in matcher.group_structures(structures)}
    found = unique_clusters(crystals, preset, **HERE)
    assert groups(found.leaders) == expected
    assert 1 < len(expected) < len(crystals)


def test_shuffled_files_give_the_same_clusters_and_metrics():
    crystals = [*matched_carbon(12), *GENERATED]
    known = [renamed(c, f"known {i}", 0.02, i) for i, c in enumerate(load("carbon_24/train", 60, seed=2))]
    energies = [*np.random.default_rng(0).uniform(-0.1, 0.2, len(crystals) - 4).tolist(), *[math.nan] * 4]
    reference, rows = novelty_metrics(crystals, KnownStructures(known), e_above_hull=energies, **HERE)
    assert 0 < reference["sun"].value < reference["msun"].value < reference["un"].value < reference["unique"].value
    by_uid = {c.uid: row for c, row in zip(crystals, rows, strict=True) if c is not None}
    for seed in range(2):
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(crystals))
        shuffled = [crystals[i] for i in order]
        mixed = KnownStructures([known[i] for i in rng.permutation(len(known))])
        metrics, found = novelty_metrics(shuffled, mixed, e_above_hull=[energies[i] for i in order], **HERE)
        assert metrics == reference
        for crystal, row in zip(shuffled, found, strict=True):
            if crystal is not None:
                same = by_uid[crystal.uid]
                assert {k: v for k, v in row.items() if k != "unique_cluster"} == {
                    k: v for k, v in same.items() if k != "unique_cluster"
                }


def test_processes_give_the_same(monkeypatch):
    monkeypatch.setattr(clusters, "workers_for", lambda items, num_workers: 2)
    crystals = matched_carbon(6)
    assert unique_clusters(crystals, progress=False) == unique_clusters(crystals, **HERE)


def test_known_structures_are_named():
    known = KnownStructures(
        [renamed(perovskite(), "far", 0.02, 1), perovskite(), quartz(), renamed(quartz(), "a", 0.001)]
    )
    found = match_known(GENERATED, known, **HERE)
    assert found.uids[2] is None and found.uids[4] is None and found.uids[6] is None
    assert found.uids[1] in ("SrTiO3", "far") and found.uids[0] in ("quartz", "a")
    assert found.novel == [False, False, False, False, True, False, True, False]
    assert found.reasons == ["", "", "no_crystal", *[""] * 5]
    assert found.rms_dist[0] == pytest.approx(0, abs=0.01) and found.rms_dist[6] is None


def test_the_known_structure_of_nearest_volume_is_named(monkeypatch):
    """Whatever the order; and what comes after the first round's candidates is still found."""
    monkeypatch.setattr(novelty, "_CANDIDATES", 2)
    sizes = [1.01, 1.04, 0.98, 1.03, 1.02]
    known = [
        Crystal.create(quartz().atomic_numbers, quartz().frac_coords, s * quartz().lattice, f"x{s}") for s in sizes
    ]
    generated = [Crystal.create(quartz().atomic_numbers, quartz().frac_coords, 1.033 * quartz().lattice)]
    other = [Crystal.create(quartz().atomic_numbers, np.random.default_rng(i).uniform(size=(9, 3)),
                            1.033 * quartz().lattice, f"random {i}") for i in range(5)]  # fmt: skip
    for structures in (known, known[::-1]):
        assert match_known(generated, KnownStructures(structures), **HERE).uids == ["x1.03"]
        assert match_known(generated, KnownStructures(other + structures), "lemat", **HERE).uids == ["x1.03"]
    assert match_known(generated, KnownStructures(other), "lemat", **HERE).novel == [True]
    twins = [renamed(quartz(), name) for name in "cab"]
    assert match_known([quartz()], KnownStructures(twins), **HERE).uids == ["a"]


def test_known_structures_are_read_late_and_reduced_once(monkeypatch):
    read, reductions = [], []

    def source():
        read.append(True)
        yield from (perovskite(), quartz(), diamond())

    def counting(crystal):
        reductions.append(crystal.uid)
        return reduced(crystal)

    monkeypatch.setattr(matching, "reduced", counting)
    known = KnownStructures(source())
    assert not read
    for _ in range(2):
        match_known([renamed(quartz(), "new"), None], known, **HERE)
    assert read == [True]
    assert sorted(reductions) == ["new", "new", "quartz"], "no known structure of other compositions"


def test_what_could_not_be_compared_is_neither_unique_nor_novel(monkeypatch):
    def timed_out(a, b, tolerances):
        class Slow(Exception):
            reason = "timeout"

        raise Slow

    monkeypatch.setattr(clusters, "fits", timed_out)
    monkeypatch.setattr(novelty, "fit_rms", timed_out)
    crystals = [quartz(), renamed(quartz(), "b"), diamond()]
    metrics, rows = novelty_metrics(crystals, KnownStructures([quartz()]), **HERE)
    assert sorted(row["unique_reason"] for row in rows) == ["", "", "timeout"]
    assert metrics["unique"].value == pytest.approx(2 / 3) and metrics["unique"].failures == 1
    assert [row["novel_reason"] for row in rows] == ["timeout", "timeout", ""]
    assert [row["novel"] for row in rows] == [False, False, True]
    assert metrics["novel"].value == metrics["un"].value == pytest.approx(1 / 3)
    assert metrics["novel"].failures == metrics["un"].failures == 2

    monkeypatch.undo()

    def fails(crystal):
        if crystal.uid == "b":
            raise ValueError("can't find niggli")
        return reduced(crystal)

    monkeypatch.setattr(matching, "reduced", fails)
    metrics, rows = novelty_metrics(crystals, None, **HERE)
    assert [row["unique_reason"] for row in rows] == ["", "error", ""]
    assert metrics["unique"].value == pytest.approx(2 / 3) and "novel" not in metrics
    found = match_known([quartz()], KnownStructures([renamed(quartz(), "b")]), **HERE)
    assert found.reasons == ["error"] and found.novel == [False], "a known structure that cannot be compared"
    both = match_known([quartz()], KnownStructures([renamed(quartz(), "b"), renamed(quartz(), "c")]), **HERE)
    assert both.uids == ["c"] and both.reasons == [""]


ENERGIES = [0.2, math.nan, -1.0, -0.01, 0.05, 0.3, 0.0, 0.2]
"""Of GENERATED. Clusters: quartz (0, 3, 7), perovskite (1, 5), swapped (4), diamond (6)."""


def test_sun_takes_the_lowest_member_of_a_cluster():
    known = KnownStructures([perovskite()])
    metrics, rows = novelty_metrics(GENERATED, known, e_above_hull=ENERGIES, **HERE)
    found = {name: round(8 * metric.value, 6) for name, metric in metrics.items()}
    assert found == {
        "unique": 4, "novel": 5, "un": 3, "stable": 3, "metastable": 4, "sun": 2, "msun": 3, "msun_without_sun": 1
    }  # fmt: skip
    assert [i for i, row in enumerate(rows) if row["sun"]] == [3, 6]
    assert [i for i, row in enumerate(rows) if row["msun_without_sun"]] == [4]
    assert metrics["sun"].failures == metrics["stable"].failures == 1, "energies unknown"
    strict = novelty_metrics(GENERATED, known, e_above_hull=ENERGIES, stable=0.1, metastable=0.1, **HERE)[0]
    assert 8 * strict["sun"].value == pytest.approx(3) and strict["msun_without_sun"].value == 0


def test_a_known_lowest_member_spoils_its_cluster():
    novel = [True, False, True, False]
    found = clusters.Clusters([0, 0, 0, 3], [""] * 4)
    assert novelty.lowest_members(found, novel, [0.1, 0.0, 0.2, -1]) == {1: False, 3: False}
    assert novelty.lowest_members(found, novel, [0.1, math.nan, 0.2, -1]) == {0: True, 3: False}
    assert novelty.lowest_members(found, novel, [0.0, 0.0, 0.2, math.nan]) == {0: False}, "a tie"


def test_without_energies_or_known_structures():
    metrics, rows = novelty_metrics(GENERATED, None, e_above_hull=[math.inf] * 8, **HERE)
    assert set(metrics) == {"unique", "stable", "metastable"} and "novel" not in rows[0]
    assert metrics["stable"].value == 0 and metrics["stable"].failures == 8
    assert set(novelty_metrics(GENERATED, KnownStructures([]), **HERE)[0]) == {"unique", "novel", "un"}
    with pytest.raises(ValueError, match="1 energies above the hull for 8 crystals"):
        novelty_metrics(GENERATED, None, e_above_hull=[0.0], **HERE)
    assert "ltol=0.1" in novelty_metrics(GENERATED, None, tolerances="lemat", **HERE)[0]["unique"].definition
