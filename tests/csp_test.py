"""Match rates, METRe and cRMSE of predictions whose outcome is known."""

import json

import numpy as np
import pytest
from crystal_cases import diamond, perovskite, quartz

from unimat_jax.crystal import Crystal
from unimat_jax.errors import UserError
from unimat_jax.evaluation import csp
from unimat_jax.evaluation.csp import csp_metrics
from unimat_jax.evaluation.matching import compare, match_rms


def shifted(crystal: Crystal, by: float) -> Crystal:
    """The crystal with its first atom moved along a by a fraction of the cell."""
    frac = crystal.frac_coords.copy()
    frac[0, 0] += by
    return Crystal.create(crystal.atomic_numbers, frac, crystal.lattice)


def swapped_perovskite() -> Crystal:
    """SrTiO3 with Sr and Ti exchanged: the same composition, another structure."""
    return Crystal.create([22, 38, 8, 8, 8], perovskite().frac_coords, perovskite().lattice, "TiSrO3")


REFERENCES = {"p": perovskite(), "s": swapped_perovskite(), "q": quartz(), "d": diamond()}
SAMPLES = [
    ("q", shifted(quartz(), 0.05), True),
    ("p", None, False),
    ("q", shifted(quartz(), 0.02), False),
    ("p", shifted(perovskite(), 0.1), True),
    ("q", None, False),
    ("s", perovskite(), True),
    ("d", Crystal.create([32, 32], diamond().frac_coords, diamond().lattice), True),
]
NEAR, NEARER = (match_rms(shifted(quartz(), by), quartz()) for by in (0.05, 0.02))
MOVED = match_rms(shifted(perovskite(), 0.1), perovskite())


def score(samples=SAMPLES, **settings):
    uids, crystals, valid = zip(*samples, strict=True)
    settings = {"sample_valid": valid, "num_workers": 1, "progress": False, **settings}
    return csp_metrics(REFERENCES, crystals, uids, **settings)


def values(result) -> dict[str, float | None]:
    return {name: metric.value for name, metric in result.metrics.items()}


def test_one_and_several_samples():
    assert NEAR and NEARER and MOVED and NEARER < NEAR
    assert match_rms(perovskite(), swapped_perovskite()) is None
    result = score(reference_valid=dict.fromkeys(REFERENCES, True))
    found = values(result)
    # The first samples: q near, p none, s a polymorph, d another composition.
    assert found["match_rate"] == 1 / 4
    assert found["rms_dist"] == pytest.approx(NEAR)
    assert found["match_rate_3"] == 2 / 4
    assert found["rms_dist_3"] == pytest.approx((NEARER + MOVED) / 2)
    # q's best sample is not valid.
    assert found["match_rate_3_valid"] == 2 / 4
    assert found["rms_dist_3_valid"] == pytest.approx((NEAR + MOVED) / 2)
    assert result.metrics["match_rate"].n == 4 and result.metrics["match_rate"].failures == 1
    assert result.metrics["match_rate_3"].failures == 0


def test_validity_of_references_counts_for_one_sample_only():
    found = values(score(reference_valid={"p": True, "s": True, "q": False, "d": True}))
    assert found["match_rate"] == 1 / 4
    assert found["match_rate_valid"] == 0 and found["rms_dist_valid"] is None
    assert found["match_rate_3_valid"] == 2 / 4


def test_metre_counts_samples_of_the_composition(monkeypatch):
    found = values(score())
    # p is matched exactly by the sample made for s.
    assert found["metre"] == found["metre_valid"] == 2 / 4
    assert found["crmse"] == pytest.approx(np.mean([0, 0.5, NEARER, 0.5]), abs=1e-5)
    assert found["crmse_valid"] == pytest.approx(np.mean([0, 0.5, NEAR, 0.5]), abs=1e-5)
    only_own = values(score([sample for sample in SAMPLES if sample[0] != "s"]))
    assert only_own["crmse"] == pytest.approx(np.mean([MOVED, 0.5, NEARER, 0.5]), abs=1e-5)
    asked = []
    monkeypatch.setattr(
        csp,
        "compare",
        lambda pool, function, pairs, *rest: asked.extend(pairs) or compare(pool, function, pairs, *rest),
    )
    without = score(with_metre=False)
    assert len(asked) == 4, "each sample with its own reference alone, where the composition is the same"
    assert "metre" not in without.metrics
    assert {name: value for name, value in found.items() if "metre" not in name and "crmse" not in name} == values(
        without
    )


def test_rows():
    result = score()
    assert [row["match_reason"] for row in result.rows] == ["", "no_crystal", "", "", "no_crystal", *["no_match"] * 2]
    assert [row["match"] for row in result.rows] == [True, False, True, True, False, False, False]
    assert result.rows[2]["rms_dist"] == pytest.approx(NEARER) and result.rows[6]["rms_dist"] is None
    rows = {row["uid"]: row for row in result.reference_rows}
    assert rows["q"]["num_samples"] == 3 and rows["q"]["num_valid_samples"] == 1
    assert (rows["q"]["first_rms_dist"], rows["q"]["best_rms_dist"]) == pytest.approx((NEAR, NEARER))
    assert rows["p"]["first_rms_dist"] is None and rows["p"]["best_rms_dist"] == pytest.approx(MOVED)
    assert rows["p"]["any_rms_dist"] == pytest.approx(0, abs=1e-5)
    assert rows["d"]["any_rms_dist"] is None
    text = json.loads(json.dumps(result.to_json()))
    assert text["tolerances"] == {"ltol": 0.3, "stol": 0.5, "angle_tol": 10.0}
    assert text["metrics"]["metre"]["value"] == 0.5


def test_all_references_are_the_denominator():
    only = [sample for sample in SAMPLES if sample[0] == "q"]
    found = score(only, reference_valid={**dict.fromkeys(REFERENCES, True), "no crystal": False})
    assert values(found)["match_rate"] == values(found)["metre"] == 1 / 5
    assert found.metrics["match_rate"].failures == 4, "references without a first sample"
    nothing = csp_metrics(REFERENCES, [], [], num_workers=1, progress=False)
    assert values(nothing) == {"match_rate": 0, "rms_dist": None, "metre": 0, "crmse": 0.5}


def test_order_matters_only_within_a_reference():
    order = [5, 0, 6, 2, 1, 3, 4]
    assert values(score([SAMPLES[i] for i in order])) == pytest.approx(values(score()))
    swapped = [SAMPLES[i] for i in [2, 1, 0, 3, 4, 5, 6]]
    assert values(score(swapped))["rms_dist"] == pytest.approx(NEARER)


def test_unknown_references():
    with pytest.raises(UserError, match="predicts 'x'"):
        csp_metrics(REFERENCES, [quartz()], ["x"], num_workers=1, progress=False)
    with pytest.raises(ValueError, match="one length"):
        csp_metrics(REFERENCES, [quartz()], [], num_workers=1, progress=False)
