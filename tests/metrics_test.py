import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from unimat_jax.evaluation.metrics import distribution_distance, mean, share, wasserstein


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_wasserstein_is_scipy_s(seed, n, m, whole_numbers):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=n), rng.normal(1, 2, size=m)
    if whole_numbers:
        a, b = np.round(a), np.round(b)
    assert wasserstein(a, b) == pytest.approx(wasserstein_distance(a, b), abs=1e-12)


def test_a_share_counts_what_failed():
    metric = share([True, False, True, True], "defined", failures=1)
    assert (metric.value, metric.n, metric.failures) == (0.75, 4, 1)
    assert metric.interval and metric.interval[0] < 0.75 < metric.interval[1] <= 1
    assert share([], "defined").value is None
    assert share([True] * 50, "defined").interval == (1.0, 1.0)
    wide, narrow = (share([True, False] * n, "defined").interval for n in (20, 2000))
    assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0])
    assert narrow[1] - narrow[0] == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(4000), rel=0.1)


def test_a_mean_leaves_out_missing_values_and_says_how_many_it_has():
    metric = mean([1.0, np.nan, 3.0], "defined", unit="A")
    assert (metric.value, metric.n, metric.unit) == (2.0, 2, "A")
    assert mean([np.nan], "defined").value is None
    assert mean([1.0], "defined").interval is None


def test_distances_of_subsets_are_seeded_means_of_draws():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=400), rng.normal(0.5, 1, size=300)
    drawn = distribution_distance(a, b, "defined", subset=100)
    again = distribution_distance(a, b, "defined", subset=100)
    assert drawn == again and drawn.n == 100 and drawn.interval[0] < drawn.value < drawn.interval[1]
    whole = distribution_distance(a, b, "defined")
    assert whole.value == pytest.approx(wasserstein_distance(a, b), abs=1e-12)
    assert abs(drawn.value - whole.value) < 0.1 and drawn.value != whole.value
    few = distribution_distance(a, b, "defined", subset=1000)
    assert few.value == whole.value and "fewer than" in few.note and few.n == 400
    assert distribution_distance([np.nan], b, "defined").value is None


def test_json_has_what_matters_and_nothing_empty():
    values = share([True, False], "what it is").to_json()
    assert values["value"] == 0.5 and values["definition"] == "what it is" and "note" not in values
    assert share([], "what it is").to_json()["value"] is None
