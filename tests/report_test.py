import base64
import datetime
import hashlib
import html.parser
import json
from collections import Counter

import numpy as np
import pytest
from crystal_cases import diamond, perovskite, quartz, random_crystal

from unimat_jax.crystal import Crystal, lattice_from_parameters
from unimat_jax.evaluation import report_data
from unimat_jax.evaluation.report import ASSETS, MetricRow, ReportData, as_json, render, write_report
from unimat_jax.evaluation.report_assets import update_third_party
from unimat_jax.evaluation.report_data import payload
from unimat_jax.evaluation.report_histograms import MAX_CATEGORIES, NUM_BINS, histogram, plain

HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\"'&{{data}}"


class Parts(html.parser.HTMLParser):
    """The elements of a page with their attributes and the text up to the next tag, as a browser would find them."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), ""))
        self.inside = True

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            tag, attributes, text = self.found[-1]
            self.found[-1] = tag, attributes, text + data

    def all(self, name: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, text) for tag, attributes, text in self.found if tag == name]


def data(rows=(), **changes) -> ReportData:
    return ReportData(title="A run", protocol="cdvae", created="today", rows=rows, **changes)


def column(shown: dict, name: str) -> dict:
    return next(found for found in shown["columns"] if found["name"] == name)


def values(found: dict) -> list:
    if "values" in found:
        return found["values"]
    return [None if code < 0 else found["texts"][code] for code in found["codes"]]


def decoded(crystal: dict) -> Crystal:
    lattice = lattice_from_parameters(np.array(crystal["cell"][:3]), np.array(crystal["cell"][3:]))
    return Crystal.create(crystal["z"], np.reshape(crystal["frac"], (-1, 3)) / 10_000, lattice, crystal["uid"])


def test_only_its_own_scripts_and_style_may_run():
    parts = Parts(render(data([{"uid": "a"}])))
    (policy,) = [a["content"] or "" for a, _ in parts.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split(";")}

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    code = [text for attributes, text in parts.all("script") if attributes.get("type") != "application/json"]
    assert rules.pop("script-src") == [digest(text) for text in code] and len(code) == 2
    assert rules.pop("style-src") == [digest(text) for _, text in parts.all("style")]
    assert rules == {
        "default-src": ["'none'"],
        "img-src": ["data:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
    }


def test_the_page_names_no_other_file():
    for _, attributes, _ in Parts(render(data())).found:
        assert "src" not in attributes and "style" not in attributes
        assert attributes.get("href", "data:,") == "data:,"
        assert not [name for name in attributes if name.startswith("on")]


def test_hostile_texts_stay_data():
    metric = MetricRow(HOSTILE, 0.5, definition=HOSTILE, comparison={HOSTILE: 1.0})
    report = ReportData(
        title=HOSTILE,
        protocol=HOSTILE,
        created=HOSTILE,
        headline=[metric],
        rows=[{"uid": HOSTILE, HOSTILE: HOSTILE}],
        histograms={HOSTILE: {HOSTILE: [HOSTILE]}},
        failures={HOSTILE: 1},
        files={HOSTILE: HOSTILE},
    )
    parts, plain_parts = Parts(render(report)), Parts(render(data([{"uid": "a"}])))
    assert [tag for tag, _, _ in parts.found] == [tag for tag, _, _ in plain_parts.found]
    assert parts.all("title")[0][1] == parts.all("h1")[0][1] == HOSTILE
    shown = json.loads(parts.all("script")[0][1])
    assert values(column(shown, "uid")) == values(column(shown, HOSTILE)) == [HOSTILE]
    assert shown["headline"][0]["comparison"] == {HOSTILE: 1.0}
    assert shown["failures"] == [[HOSTILE, 1]] and shown["files"] == {HOSTILE: HOSTILE}


def test_every_key_becomes_a_column():
    rows = [
        {"uid": "a", "valid": True, "density": 1.23456789, "reasons": ["x", "y"], "odd": {"k": [1, 2]}},
        {"uid": "b", "valid": np.False_, "density": np.float32("nan"), "reasons": [], "late": np.int64(7)},
        {"uid": "c", "valid": None, "mixed": True, "density": 2},
        {"uid": "d", "mixed": 1, "odd": datetime.date(2024, 1, 2)},
    ]
    shown = payload(data(rows), 0)
    found = {c["name"]: (c["kind"], values(c)) for c in shown["columns"]}
    assert found == {
        "uid": ("text", ["a", "b", "c", "d"]),
        "valid": ("flag", [1, 0, None, None]),
        "density": ("number", [1.2346, None, 2, None]),
        "reasons": ("text", ["x, y", None, None, None]),
        "odd": ("text", ["k: 1, 2", None, None, "2024-01-02"]),
        "late": ("number", [None, 7, None, None]),
        "mixed": ("text", [None, None, "True", "1"]),
    }
    assert shown["num_rows"] == 4


def test_repeated_texts_are_written_once():
    rows = [{"uid": f"s{i}", "status": ("valid", "atoms_too_close", None)[i % 3]} for i in range(30)]
    found = column(payload(data(rows), 0), "status")
    assert found["texts"] == ["valid", "atoms_too_close"]
    assert values(found) == [row["status"] for row in rows]


def test_the_first_of_each_cluster_is_unique():
    rows = [{"uid": str(i), "unique_cluster": cluster} for i, cluster in enumerate([4, 2, 4, None, 2, 5, None])]
    assert values(column(payload(data(rows), 0), "unique")) == [1, 1, 0, 0, 0, 1, 0]
    own = [{**row, "unique": True} for row in rows]
    assert values(column(payload(data(own), 0), "unique")) == [1] * 7


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.123456789, 0.12346),
        (np.float64(123456.789), 123460.0),
        (float("inf"), None),
        (np.array(2.5), 2.5),
        (np.array([1.0, np.nan]), [1.0, None]),
        (10**6 + 1, 10**6 + 1),
        (b"x", "b'x'"),
    ],
)
def test_plain(value, expected):
    assert plain(value) == expected
    as_json(plain(value))


def test_floats_are_binned():
    generated = [*np.linspace(1.0, 2.0, 997), 50.0, -50.0, float("nan"), None]
    shown = histogram("density", {"generated": generated, "reference": [1.5, 1.5, 1.99]})
    first, second = shown["series"]
    assert (first["n"], first["left_out"], second["n"], second["left_out"]) == (999, 2, 3, 0)
    assert len(shown["edges"]) == NUM_BINS + 1 and shown["clipped"] == [True, True]
    assert 1.0 <= shown["edges"][0] < 1.02 and 1.98 < shown["edges"][-1] <= 2.0
    assert sum(first["shares"]) == pytest.approx(1, abs=1e-3)
    middle = np.searchsorted(shown["edges"], 1.5, side="right") - 1
    assert second["shares"][middle] == pytest.approx(2 / 3, abs=1e-5) and second["shares"][-1] > 0.3


def test_whole_numbers_are_counted_one_by_one():
    shown = histogram("elements", {"generated": [2, 2, 5, None], "reference": np.array([3.0, 3.0])})
    assert shown["categories"] == ["2", "3", "4", "5"]
    assert [series["shares"] for series in shown["series"]] == [[0.66667, 0, 0, 0.33333], [0, 1, 0, 0]]


def test_rare_categories_are_put_together():
    groups = [number for number in range(1, 231) for _ in range(1 + 5 * (number % 10 == 1))]
    shown = histogram("space group", {"generated": groups, "reference": [225, 226]})
    assert len(shown["categories"]) == MAX_CATEGORIES + 1 and shown["categories"][-1] == "other"
    assert {"1", "11", "225", "226"} <= set(shown["categories"])
    assert shown["categories"][:-1] == sorted(shown["categories"][:-1], key=int)
    assert sum(shown["series"][0]["shares"]) == pytest.approx(1, abs=1e-3)
    assert histogram("words", {"generated": ["b", "a", "b", 1.5]})["categories"] == ["1.5", "a", "b"]


@pytest.mark.parametrize("values", [[], [None], [2.5, 2.5], [0.1, 0.2], [float("inf")], [1e-9, 3e12, 0.5]])
def test_odd_histograms(values):
    shown = histogram("odd", {"generated": values, "reference": []})
    as_json(shown)
    bins = len(shown.get("categories", shown.get("edges", [0])[1:]))
    assert [len(series["shares"]) for series in shown["series"]] == [bins, bins]
    assert sum(shown["series"][0]["shares"]) == pytest.approx(1 if any(plain(v) for v in values) else 0)


def test_structures_are_carried_in_order_up_to_a_limit():
    crystals = [quartz(), None, perovskite(), diamond()]
    rows = [{"uid": f"s{i}"} for i in range(4)]
    reference = Crystal.create([38, 22, 8, 8, 8], perovskite().frac_coords + 1.25, 4 * np.eye(3), "mp-1")
    nearest = {"s0": reference, "s2": reference, "s3": diamond()}
    shown = payload(data(rows, generated=crystals, nearest=nearest), max_structures=2)
    assert shown["generated"] == [0, -1, 2, -2] and shown["nearest"] == [1, -1, 1, -1]
    assert [crystal["uid"] for crystal in shown["crystals"]] == ["quartz", "mp-1", "SrTiO3"]
    for found, crystal in zip(shown["crystals"], [quartz(), reference, perovskite()], strict=True):
        again = decoded(found)
        assert again.lattice == pytest.approx(crystal.lattice, abs=2e-3)
        difference = again.frac_coords - crystal.frac_coords
        assert np.abs(difference - np.round(difference)).max() <= 0.51e-4
    assert {z: atom["symbol"] for z, atom in shown["atoms"].items()} == {8: "O", 14: "Si", 22: "Ti", 38: "Sr"}
    assert shown["atoms"][8]["radius"] == pytest.approx(0.66) and shown["atoms"][8]["color"] == "#ff0d0d"


def test_large_cells_end_the_carried_structures(monkeypatch):
    monkeypatch.setattr(report_data, "MAX_ATOMS", 20)
    rows = [{"uid": f"s{i}"} for i in range(4)]
    shown = payload(data(rows, generated=[quartz(), quartz(), quartz(), diamond()]), 100)
    assert shown["generated"] == [0, 1, -2, -2]  # 9 + 9 atoms; the two of diamond would fit, but stand behind
    assert len(shown["crystals"]) == 2


def test_crystals_that_cannot_be_drawn_are_left_out():
    broken = [
        Crystal(np.array([1]), np.array([[np.nan, 0, 0]]), np.eye(3), "nan"),
        Crystal(np.array([1]), np.zeros((1, 3)), np.zeros((3, 3)), "flat"),
    ]
    rows = [{"uid": "nan"}, {"uid": "flat"}, {"uid": "ok"}]
    report = data(rows, generated=[*broken, diamond()], nearest={"ok": broken[0]}, reference=broken)
    shown = payload(report, 10)
    assert shown["generated"] == [-1, -1, 0] and shown["nearest"] == [-1, -1, -1]
    as_json(shown)


def test_all_elements_have_a_look_and_a_place():
    crystals = [Crystal.create([z], [[0, 0, 0]], 3 * np.eye(3), f"Z{z}") for z in range(1, 119)]
    rows = [{"uid": crystal.uid} for crystal in crystals]
    shown = payload(data(rows, generated=crystals, reference=[quartz(), perovskite(), diamond()]), 118)
    assert set(shown["atoms"]) == set(range(1, 119))
    assert all(atom["radius"] > 0 and len(atom["color"]) == 7 for atom in shown["atoms"].values())
    places = shown["elements"]["places"]
    assert len(places) == 118 and len({(row, column) for _, _, row, column in places}) == 118
    assert ["O", 8, 1, 15] in places and ["La", 57, 7, 2] in places
    assert shown["elements"]["generated"]["counts"] == [0] + [1] * 118
    reference = shown["elements"]["reference"]
    assert reference["n"] == 3 and reference["counts"][8] == 2 and reference["counts"][6] == 1


def test_failures_are_sorted_by_number():
    shown = payload(data(failures=Counter(a=1, b=5, c=2)), 0)
    assert shown["failures"] == [["b", 5], ["c", 2], ["a", 1]]


def test_generated_and_rows_must_fit():
    with pytest.raises(ValueError, match="1 generated crystals for 2 rows"):
        render(data([{"uid": "a"}, {"uid": "b"}], generated=[quartz()]))


def test_a_thousand_structures_stay_under_three_megabytes(tmp_path):
    rng = np.random.default_rng(0)
    rows, generated, nearest = [], [], {}
    for i in range(1000):
        found, other = (random_crystal(rng, 5) for _ in range(2))
        while found.num_atoms != 5:
            found = random_crystal(rng, 5)
        uid = f"sample-{i:05d}"
        numbers = {f"number_{k}": float(rng.normal()) for k in range(12)}
        texts = {"uid": uid, "formula": found.formula, "nearest_uid": f"mp-{i}", "status": "valid", "valid": i % 2 == 0}
        rows.append({**texts, **numbers})
        generated.append(found)
        nearest[uid] = other
    path = tmp_path / "new" / "report.html"
    write_report(path, data(rows, generated=generated, nearest=nearest))
    assert path.stat().st_size < 1.5e6
    shown = json.loads(Parts(path.read_text(encoding="utf-8")).all("script")[0][1])
    assert min(shown["generated"] + shown["nearest"]) == 0


def test_third_party_code_is_what_the_readme_says():
    script = (ASSETS / update_third_party.SCRIPT).read_bytes()
    assert hashlib.sha256(script).hexdigest() == update_third_party.SHA256
    assert f"| 3dmol | {update_third_party.VERSION} | BSD-3-Clause |" in (ASSETS / "README.md").read_text()
    licences = (ASSETS / update_third_party.LICENCES).read_text()
    for text in ("University of Pittsburgh", "three.js", "pako", "upng-js", "netcdfjs", "iobuffer"):
        assert text in licences
    assert "University of Pittsburgh" in render(data())
