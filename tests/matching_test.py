"""Matching equals pymatgen's StructureMatcher: the answer, the RMS distance and `fit`, on real and on odd crystals."""

import functools
import itertools
from collections import Counter

import numpy as np
import pytest
from crystal_cases import diamond, mirrored, perovskite, quartz, random_crystal
from pymatgen.analysis.structure_matcher import StructureMatcher
from shared_data import load

from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluation import alignment, matching
from unimat_jax.evaluation.alignment import TOLERANCES, Reduced, fit_rms, fits, reduced, rms_dist
from unimat_jax.evaluation.matching import compare, match_pairs, match_rms, reduced_composition
from unimat_jax.evaluation.pool import Failure, Pool


@functools.cache
def pymatgen_matcher(preset: str) -> StructureMatcher:
    tolerances = TOLERANCES[preset]
    return StructureMatcher(ltol=tolerances.ltol, stol=tolerances.stol, angle_tol=tolerances.angle_tol)


def assert_equals_pymatgen(a: Crystal, b: Crystal, preset: str) -> tuple[float | None, bool]:
    """Compares RMS distance and `fit`, and returns them."""
    matcher, tolerances = pymatgen_matcher(preset), TOLERANCES[preset]
    expected = matcher.get_rms_dist(a.to_pymatgen(), b.to_pymatgen())
    expected_fit = matcher.fit(a.to_pymatgen(), b.to_pymatgen())
    cell_a, cell_b = reduced(a), reduced(b)
    rms, fit = rms_dist(cell_a, cell_b, tolerances), fits(cell_a, cell_b, tolerances)
    assert rms == (None if expected is None else pytest.approx(expected[0], abs=1e-9)), (a, b)
    assert fit == expected_fit, (a, b)
    assert fit_rms(cell_a, cell_b, tolerances) == (rms if fit else None)
    return rms, fit


def rattled(crystal: Crystal, scale: float, rng: np.random.Generator) -> Crystal:
    frac = crystal.frac_coords + scale * rng.normal(size=crystal.frac_coords.shape)
    return Crystal.create(
        crystal.atomic_numbers, frac, crystal.lattice @ (np.eye(3) + scale / 2 * rng.normal(size=(3, 3)))
    )


@pytest.mark.parametrize("preset", TOLERANCES)
@pytest.mark.parametrize("split", ["perov_5/val", "carbon_24/val", "mp_20/val"])
def test_real_crystals_and_rattled_ones(split, preset):
    rng = np.random.default_rng(1)
    crystals = load(split, 36, seed=5)
    found = [assert_equals_pymatgen(rattled(c, rng.choice([0, 0.01, 0.05, 0.2]), rng), c, preset) for c in crystals]
    assert {rms is None for rms, _ in found} == {True, False}
    assert {fit for _, fit in found} == {True, False}


def test_different_real_crystals_of_one_composition():
    """Carbon-24 is one composition: pairs of unlike crystals, some in cells of like size."""
    cells: dict[int, list[Crystal]] = {}
    for crystal in load("carbon_24/val", 250, seed=3):
        cells.setdefault(reduced(crystal).num_atoms, []).append(crystal)
    pairs = [(group[i], group[i - 1]) for group in cells.values() for i in range(1, min(5, len(group)))]
    found = [assert_equals_pymatgen(a, b, "cdvae") for a, b in pairs]
    assert len(found) > 30 and {fit for _, fit in found} == {True, False}
    assert any(rms is not None and not fit for rms, fit in found), "an RMS distance below stol is the looser criterion"


def test_what_is_not_compared_would_not_match():
    """Pairs of other numbers of atoms by element in the reduced cell, and of other compositions, never match."""
    carbon, others = load("carbon_24/val", 120, seed=0), load("perov_5/val", 130, seed=0)
    matcher = pymatgen_matcher("cdvae")
    unlike = [(a, b) for a, b in itertools.pairwise(carbon) if reduced(a).counts != reduced(b).counts]
    unlike += list(itertools.pairwise(others))
    assert len(unlike) > 200
    for a, b in unlike:
        if a.num_atoms == b.num_atoms and reduced_composition(a) == reduced_composition(b):
            continue
        assert matcher.get_rms_dist(a.to_pymatgen(), b.to_pymatgen()) is None
        assert rms_dist(reduced(a), reduced(b), TOLERANCES["cdvae"]) is None


def odd_pairs() -> list[tuple[Crystal, Crystal]]:
    rng = np.random.default_rng(0)
    pairs = []
    for kind in range(6):
        for max_atoms in (1, 2, 6, 12):
            a = random_crystal(rng, max_atoms)
            numbers, frac, cell = a.atomic_numbers, a.frac_coords, a.lattice
            if kind == 0:
                b = a
            elif kind == 1:  # turned, shifted, larger, atoms in another order
                turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
                b = Crystal.create(numbers[::-1], frac[::-1] + rng.uniform(size=3), 1.3 * cell @ turn)
            elif kind == 2:  # a supercell
                twice = np.concatenate([frac, frac + np.array([1, 0, 0])]) / [2, 1, 1]
                noise = 0.003 * rng.normal(size=twice.shape)
                b = Crystal.create(np.tile(numbers, 2), twice + noise, cell * [[2], [1], [1]])
            elif kind == 3:  # needles
                a = Crystal.create(numbers, frac, cell * [[1], [1], [10]])
                b = rattled(a, 0.003, rng)
            elif kind == 4:  # two atoms on one place
                frac = frac.copy()
                frac[-1] = frac[0] + 1e-4
                b = Crystal.create(numbers, frac, cell)
            else:
                b = mirrored(a)
            pairs.append((a, b))
    one = Crystal.create([118], [[0, 0, 0]], np.eye(3) * 4)
    big = random_crystal(rng, 12, (6,))
    big = Crystal.create([6, 7] * 12, rng.uniform(size=(24, 3)), big.lattice)
    return [*pairs, (one, one), (diamond(), rattled(diamond(), 0.02, rng)), (big, rattled(big, 0.001, rng))]


@pytest.mark.parametrize("preset", ["cdvae", "lemat"])
def test_odd_crystals(preset):
    found = [assert_equals_pymatgen(a, b, preset) for a, b in odd_pairs()]
    assert sum(fit for _, fit in found) > 15


def test_a_coarser_lattice_is_no_match():
    """Every second point of a body-centred lattice makes a cubic one, longer by 26 %, which ltol = 0.3 would allow."""
    centred = Crystal.create([26], [[0, 0, 0]], 1.4 * np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]]))
    simple = Crystal.create([26], [[0, 0, 0]], 2.2 * np.eye(3))
    assert assert_equals_pymatgen(centred, simple, "cdvae") == (None, False)
    assert assert_equals_pymatgen(simple, centred, "cdvae") == (None, False)


def test_trials_in_small_arrays_give_the_same(monkeypatch):
    rng = np.random.default_rng(2)
    pairs = [(reduced(rattled(quartz(), 0.02, rng)), reduced(quartz())), (reduced(diamond()), reduced(diamond()))]
    whole = [rms_dist(a, b, TOLERANCES["cdvae"]) for a, b in pairs]
    monkeypatch.setattr(alignment, "_FIRST_TRIALS", 1)
    monkeypatch.setattr(alignment, "_MAX_ATOM_PAIRS", 100)
    assert [rms_dist(a, b, TOLERANCES["cdvae"]) for a, b in pairs] == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("shape", [(1e-3, 1, 50), (0.01, 0.01, 60), (0.02, 60, 60), (1, 1, 1e5)])
def test_cells_too_uneven_to_match_are_refused_at_once(shape, capsys):
    crystal = Crystal.create([6, 6], [[0, 0, 0], [0.3, 0.2, 0.4]], np.diag(shape), "needle")
    assert match_rms(crystal, crystal) is None
    assert "needle" in capsys.readouterr().err
    assert match_pairs([(crystal, crystal)], num_workers=1, progress=False).reasons == ["needle_cell"]


def test_unknown_tolerances():
    with pytest.raises(UserError, match="'cdave': choose from cdvae"):
        match_rms(quartz(), quartz(), "cdave")
    assert match_rms(quartz(), quartz(), TOLERANCES["lemat"]) == pytest.approx(0, abs=1e-6)


def test_match_is_blind_to_cell_choice_order_and_mirror():
    crystal = quartz()
    assert match_rms(crystal, crystal) == pytest.approx(0, abs=1e-6)
    order = np.random.default_rng(0).permutation(9)
    shuffled = Crystal.create(crystal.atomic_numbers[order], crystal.frac_coords[order] + 0.3, 1.05 * crystal.lattice)
    assert match_rms(shuffled, crystal) == pytest.approx(0, abs=1e-5)
    mirror = Crystal.create(crystal.atomic_numbers, -crystal.frac_coords, crystal.lattice)
    assert match_rms(mirror, crystal) == pytest.approx(0, abs=1e-5)


def test_other_compositions_do_not_match():
    assert match_rms(perovskite(), quartz()) is None
    other = Crystal.create([38, 40, 8, 8, 8], perovskite().frac_coords, perovskite().lattice)
    assert match_rms(other, perovskite()) is None
    assert reduced_composition(perovskite()) == ((8, 3), (22, 1), (38, 1))


def test_failed_predictions_count_as_unmatched():
    matches = match_pairs([(quartz(), quartz()), (None, quartz()), (perovskite(), quartz())], progress=False)
    assert matches.rms_dist[1:] == [None, None]
    assert matches.reasons == ["", "no_crystal", "no_match"]
    assert matches.match_rate == pytest.approx(1 / 3)
    assert matches.rmse == pytest.approx(0, abs=1e-6)
    nothing = match_pairs([], progress=False)
    assert nothing.match_rate is None and nothing.rmse is None
    assert match_pairs([(None, quartz())], progress=False).to_json() == {
        "num_pairs": 1,
        "match_rate": 0.0,
        "rms_dist": None,
    }


def test_processes_give_the_same_in_the_same_order():
    rng = np.random.default_rng(0)
    pairs = []
    for i in range(60):
        frac = perovskite().frac_coords + (0.01 + 0.002 * i) * rng.normal(size=(5, 3))
        pairs.append((Crystal.create(perovskite().atomic_numbers, frac, perovskite().lattice), perovskite()))
    alone = match_pairs(pairs, num_workers=1, progress=False)
    together = match_pairs(pairs, num_workers=2, progress=False)
    assert alone.rms_dist == together.rms_dist
    assert Counter(value is None for value in alone.rms_dist)[False] > 30


def test_failures_are_told_apart_from_no_match(monkeypatch):
    cell = reduced(quartz())
    broken = Failure("timeout", "longer than 60 s")
    with Pool(0, timeout_s=60) as pool:
        found = compare(pool, rms_dist, [(cell, broken), (cell, cell), (cell, reduced(diamond()))], TOLERANCES["cdvae"])
        assert found == [broken, pytest.approx(0, abs=1e-6), None]

        def stuck(crystal: Crystal) -> Reduced:
            if crystal.uid == "stuck":
                raise ValueError("can't find niggli")
            return reduced(crystal)

        monkeypatch.setattr(matching, "reduced", stuck)
        bad = Crystal.create(quartz().atomic_numbers, quartz().frac_coords, quartz().lattice, "stuck")
        matches = match_pairs([(bad, quartz()), (quartz(), quartz())], num_workers=1, progress=False)
        assert matches.reasons == ["error", ""] and matches.match_rate == 0.5
        assert match_rms(bad, quartz()) is None
