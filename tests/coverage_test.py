"""COV, AMSD and AMCD against CDVAE's values and a plain calculation."""

import json
from collections import Counter

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from shared_data import golden_dir

from unimat_jax.crystal import Crystal, lattice_from_parameters
from unimat_jax.evaluation import coverage as coverage_module
from unimat_jax.evaluation.coverage import CUTOFFS, coverage, nearest_rows
from unimat_jax.evaluation.crystalnn import features_of, surroundings
from unimat_jax.evaluation.magpie import composition_fingerprint, element_data, standardise

CDVAE_NAMES = {"struct_cutoff": "struc", "comp_cutoff": "comp"}
VALUES = ("cov_recall", "cov_precision", "amsd_recall", "amsd_precision", "amcd_recall", "amcd_precision")


@pytest.mark.parametrize("name", ["perov_5", "carbon_24"])
def test_equals_cdvae(name):
    golden = json.loads((golden_dir() / f"{name}_val.json").read_text())
    prints = []
    for key in ("generated", "reference"):
        crystals = []
        for values in golden[key]:
            lattice = lattice_from_parameters(np.array(values["lengths"]), np.array(values["angles"]))
            crystals.append(Crystal.create(values["atomic_numbers"], values["frac_coords"], lattice))
        prints.append([features.mean(0) for features in features_of([surroundings(crystal) for crystal in crystals])])
        prints.append(
            [composition_fingerprint(Counter(crystal.atomic_numbers.tolist()).items()) for crystal in crystals]
        )
    found = coverage(*prints, **CUTOFFS[name])
    for key in VALUES:
        assert getattr(found, key) == pytest.approx(golden["aggregate"][key], abs=1e-6), key
    assert {CDVAE_NAMES[key]: value for key, value in CUTOFFS[name].items()} == golden["aggregate"]["cutoffs"]


def random_prints(rng, number: int, missing: int) -> tuple[list, list]:
    struct = list(rng.uniform(0, 1, (number, 61)))
    means, deviations = (np.array(element_data()[f"cdvae_scaler_{x}"]) for x in ("means", "stds"))
    comp = list(means + deviations * rng.normal(size=(number, 132)))
    for row in rng.choice(number, missing, replace=False):
        (struct if row % 2 else comp)[row] = None
    return struct, comp


def plain(ours, theirs, cutoffs: tuple[float, float], denominator: int) -> list[float]:
    """[share within both cut-offs, mean structure distance, mean composition distance] of ours to theirs."""
    kept = [[(s, c) for s, c in zip(*part, strict=True) if s is not None and c is not None] for part in (ours, theirs)]
    struct = cdist(*(np.array([s for s, _ in part]) for part in kept)).min(1)
    comp = cdist(*(standardise(np.array([c for _, c in part])) for part in kept)).min(1)
    both = (struct <= cutoffs[0]) & (comp <= cutoffs[1])
    return [both.sum() / denominator, struct.mean(), comp.mean()]


@pytest.mark.parametrize("block", [7, 1024])
def test_equals_a_plain_calculation(block, monkeypatch):
    monkeypatch.setattr(coverage_module, "_BLOCK", block)
    rng = np.random.default_rng(0)
    ours, theirs = random_prints(rng, 60, 9), random_prints(rng, 40, 5)
    cutoffs = (2.7, 14.2)
    found = coverage(*ours, *theirs, struct_cutoff=cutoffs[0], comp_cutoff=cutoffs[1], num_generated=70)
    precision, recall = plain(ours, theirs, cutoffs, 70), plain(theirs, ours, cutoffs, 40)
    assert 0.1 < precision[0] < 0.6 and 0.1 < recall[0] < 0.9, "the cut-offs must cut"
    values = [getattr(found, key) for key in VALUES]
    assert values == pytest.approx(
        [recall[0], precision[0], recall[1], precision[1], recall[2], precision[2]], rel=1e-12
    )
    assert (found.num_generated_without_fingerprint, found.num_reference_without_fingerprint) == (19, 5)
    assert json.loads(json.dumps(found.to_json()))["num_generated"] == 70


def test_the_nearest_ones_are_named():
    rng = np.random.default_rng(1)
    ours, theirs = random_prints(rng, 30, 4), random_prints(rng, 20, 3)
    nearest = coverage(*ours, *theirs, struct_cutoff=1.0, comp_cutoff=1.0).generated
    for row, index in enumerate(nearest.struct_index):
        if ours[0][row] is None or ours[1][row] is None:
            assert index == nearest.comp_index[row] == -1
            assert np.isnan(nearest.struct_distance[row]) and np.isnan(nearest.comp_distance[row])
        else:
            assert theirs[0][index] is not None and theirs[1][index] is not None
            assert np.linalg.norm(ours[0][row] - theirs[0][index]) == pytest.approx(nearest.struct_distance[row])


def test_the_two_nearest_need_not_be_one_crystal_and_cutoffs_are_included():
    def prints(*pairs: tuple[float, float]) -> tuple[list, list]:
        """Crystals by one coordinate each of their two fingerprints, the latter in units of the scaler."""
        means, deviations = (np.array(element_data()[f"cdvae_scaler_{x}"]) for x in ("means", "stds"))
        struct = [np.array([s] + [0.0] * 60) for s, _ in pairs]
        return struct, [means + deviations * np.array([c] + [0.0] * 131) for _, c in pairs]

    generated, reference = prints((0.0, 0.0)), prints((0.25, 9.0), (9.0, 0.0))
    inside = coverage(*generated, *reference, struct_cutoff=0.25, comp_cutoff=1.0)
    assert (inside.cov_precision, inside.cov_recall) == (1.0, 0.0)
    assert coverage(*generated, *reference, struct_cutoff=0.2499999, comp_cutoff=1.0).cov_precision == 0.0


def test_nobody_has_a_fingerprint():
    rng = np.random.default_rng(2)
    theirs = random_prints(rng, 4, 0)
    found = coverage([None, None], [None, None], *theirs, struct_cutoff=1.0, comp_cutoff=1.0)
    assert (found.cov_precision, found.cov_recall, found.amsd_precision, found.amcd_recall) == (0.0, 0.0, None, None)
    nothing = coverage([], [], [], [], struct_cutoff=1.0, comp_cutoff=1.0)
    assert (nothing.cov_precision, nothing.cov_recall, nothing.num_generated) == (None, None, 0)
    assert coverage([], [], *theirs, struct_cutoff=1.0, comp_cutoff=1.0, num_generated=5).cov_precision == 0.0
    with pytest.raises(ValueError, match="num_generated = 3"):
        coverage(*theirs, *theirs, struct_cutoff=1.0, comp_cutoff=1.0, num_generated=3)


def test_nearest_rows_is_exact_among_near_ties():
    """Far from the origin and 1e-9 apart, where a matrix product alone tells nothing."""
    rng = np.random.default_rng(3)
    others = 1000 + rng.normal(size=(50, 20))
    others = np.concatenate([others, others + 1e-9 * rng.normal(size=others.shape), others[:5]])
    points = np.concatenate([others[::3], others[:40] + 1e-8 * rng.normal(size=(40, 20))])
    distance, index = nearest_rows(points, others)
    exact = cdist(points, others)
    np.testing.assert_allclose(distance, exact.min(1), rtol=0, atol=1e-15)
    assert (exact[np.arange(len(points)), index] == exact.min(1)).all()
    assert (index == exact.argmin(1)).all(), "the first of equals"
    assert nearest_rows(np.zeros((1, 1)), np.array([[3.0], [1.0], [-1.0]]))[1] == [1]
