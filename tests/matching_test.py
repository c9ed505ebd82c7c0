from collections import Counter

import numpy as np
import pytest
from crystal_cases import perovskite, quartz

from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.matching import match_pairs, match_rms, reduced_composition


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
