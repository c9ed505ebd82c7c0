"""report.html in a real headless Chromium: needs playwright from PyPI, and Chromium (`apt-get install chromium`)."""

import contextlib
import dataclasses
import re
import shutil
import time

import numpy as np
import pytest
from crystal_cases import diamond, perovskite, quartz, random_crystal

from unimat_jax.crystal import Crystal
from unimat_jax.evaluation.report import MetricRow, ReportData, write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright to test report.html in a browser")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("apt-get install chromium to test report.html in a browser", allow_module_level=True)

FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
NUM_ROWS = 130
DASH = "\N{EN DASH}"
HOSTILE = "</script><script>hacked = 1</script><img src=x onerror='hacked = 2'>"
DRAWN = """canvas => {
  const flat = document.createElement("canvas");
  [flat.width, flat.height] = [canvas.width, canvas.height];
  const context = flat.getContext("2d");
  context.drawImage(canvas, 0, 0);
  const pixels = context.getImageData(0, 0, flat.width, flat.height).data;
  let [other, red] = [0, 0];
  for (let i = 0; i < pixels.length; i += 4) {
    other += pixels[i] !== pixels[0] || pixels[i + 1] !== pixels[1] || pixels[i + 2] !== pixels[2];
    red += pixels[i] > 150 && pixels[i + 1] < 60 && pixels[i + 2] < 60;
  }
  return [other / (pixels.length / 4), red / (pixels.length / 4), ...pixels.slice(0, 4)];
}"""
"""Shares of a view's pixels that differ from its corner, and that are red as oxygen; the corner's colour."""


def report() -> ReportData:
    """130 rows: known crystals first, a hostile uid, rows without a structure, numbers with gaps."""
    rng = np.random.default_rng(0)
    salt = Crystal.create([11, 17] * 4, _rocksalt(), 5.64 * np.eye(3), "NaCl")
    known = [perovskite(), quartz(), diamond(), salt]
    generated, rows, nearest = [], [], {}
    for i in range(NUM_ROWS):
        crystal = known[i] if i < len(known) else random_crystal(rng, 8, (3, 8, 14, 22, 26, 38, 57))
        uid = HOSTILE if i == 5 else f"s{i:03d}"
        crystal = None if i % 13 == 12 else dataclasses.replace(crystal, uid=uid)
        row = {"uid": uid, "formula": crystal.formula if crystal else "", "num_atoms": crystal and crystal.num_atoms}
        row["status"] = ("valid", "atoms_too_close", "not_neutral+atoms_too_close")[i % 3] if crystal else "no_atoms"
        row |= {"valid": i % 3 == 0 and crystal is not None, "novel": bool(i % 2), "unique_cluster": i // 2}
        row["density"] = crystal.density if crystal else None
        rows.append(row)
        generated.append(crystal)
        if i % 10 != 9:
            nearest[uid] = known[i % 4]
    metrics = [
        MetricRow(
            "struct_valid", 0.9731, (0.961, 0.981), "%", "no two atoms within 0.5 A", NUM_ROWS, 10, {"CDVAE": 1.0}
        ),
        MetricRow("wdist_density", 0.0764, None, "g/cm3", HOSTILE, 1000, 0, {"CDVAE": 0.1258, "training set": None}),
        MetricRow("undefined", None),
    ]
    numbers = {"generated": rng.normal(5, 1, 300), "reference": rng.normal(5, 1.2, 400)}
    return ReportData(
        title=f"Report of {HOSTILE}",
        protocol="cdvae",
        created="2024-05-06",
        headline=metrics,
        rows=rows,
        generated=generated,
        nearest=nearest,
        reference=known,
        histograms={
            "density (g/cm3)": numbers,
            "number of elements": {"generated": [2, 3, 3], "reference": [1, 3]},
            "space group": {"generated": [*range(100, 140)], "reference": [200]},  # the rarest are "other"
        },
        failures={"atoms_too_close": 43, HOSTILE: 1},
        files={"metrics.json": HOSTILE},
    )


def _rocksalt() -> np.ndarray:
    corners = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    return np.stack([corners, corners + np.array([0.5, 0, 0])], 1).reshape(-1, 3)


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, report(), max_structures=100)
    return path.as_uri()


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium


@pytest.fixture(scope="module")
def browser(chromium):
    with contextlib.closing(chromium.launch(executable_path=CHROMIUM, args=FLAGS)) as browser:
        yield browser


def until(page, condition: str) -> None:
    """Waits until a condition is true (Playwright's own wait_for_function needs `eval`, which the page forbids)."""
    deadline = time.monotonic() + 15
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(20)


@contextlib.contextmanager
def opened(browser, address: str, **options):
    """The drawn page in a window of its own. Nothing may be said on the console, and nothing else be loaded."""
    said, asked = [], []
    with contextlib.closing(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})) as context:
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        until(page, "performance.getEntriesByName('report-drawn').length")
        yield page
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [address]


@pytest.fixture(scope="module")
def shared_page(browser, address):
    with opened(browser, address) as page:
        yield page


@pytest.fixture
def page(shared_page):
    """One desktop window for all tests; the table shows all rows in their order, and the first is selected."""
    shared_page.get_by_role("button", name="clear").click()
    header = shared_page.locator(".rows th", has_text="unique_cluster")  # ascends with the rows
    while header.get_attribute("aria-sort") != "ascending":
        header.get_by_role("button").click()
    shared_page.locator(".rows tbody tr").first.click()
    shared_page.get_by_label("turn together").check()
    shared_page.get_by_label("bonded atoms beyond the cell").uncheck()
    shared_page.get_by_role("button", name="reset view").click()
    return shared_page


def column(page, name: str) -> list[str]:
    """A column's texts on the shown page of the table."""
    names = [text.replace("▲", "").replace("▼", "").strip() for text in page.locator(".rows th").all_inner_texts()]
    return page.locator(f".rows tbody td:nth-child({names.index(name) + 1})").all_inner_texts()


def picture(page, side: int) -> str:
    return page.locator(".view canvas").nth(side).evaluate("canvas => canvas.toDataURL()")


def test_metrics_stand_beside_published_ones(page):
    rows = page.locator("#headline tbody tr")
    assert rows.locator("th").first.inner_text() == "struct_valid %\nno two atoms within 0.5 A"
    cells = [rows.nth(i).locator("td").all_inner_texts() for i in range(3)]
    assert cells[0] == ["97.31", f"96.10 {DASH} 98.10", "", "100.00", DASH, "130", "10"]
    assert cells[1] == ["0.0764", "", "", "0.1258", DASH, "1,000", ""]
    assert cells[2] == [DASH, "", "", DASH, DASH, "0", ""]
    assert page.locator("#headline thead th").all_inner_texts()[4:6] == ["CDVAE", "training set"]
    assert "cdvae" in page.locator("#subtitle").inner_text()
    assert page.locator("#headline svg").count() == 2  # none for a value that is not there


def test_hostile_texts_are_shown_as_texts(page):
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.title() == page.locator("h1").inner_text() == f"Report of {HOSTILE}"
    assert page.locator("img").count() == 0 and page.locator("script").count() == 3
    for place in ("#headline", "#failures", "#footer", ".rows"):
        assert HOSTILE in page.locator(place).inner_text()
    page.locator(".rows td", has_text="<script>").first.click()
    assert HOSTILE in page.locator(".details").inner_text() and HOSTILE in page.locator(".caption").first.inner_text()


def test_both_views_draw(page):
    for side in range(2):
        other, red, *_ = page.locator(".view canvas").nth(side).evaluate(DRAWN)
        assert 0.03 < other < 0.9 and red > 0.002
    assert "SrTiO3" in page.locator(".caption").nth(0).inner_text()
    assert page.locator(".legend").inner_text().split() == ["O", "Ti", "Sr"]


def test_a_click_on_a_row_shows_its_structures(page):
    before = [picture(page, side) for side in range(2)]
    page.locator(".rows tbody tr").nth(1).click()
    assert page.locator("[aria-current] td").first.inner_text() == "s001"
    assert all(picture(page, side) != before[side] for side in range(2))
    assert "Si3O6" in page.locator(".caption").nth(0).inner_text()
    assert "4.91" in page.locator(".caption").nth(1).inner_text()
    assert "density\n2.6" in page.locator(".details").inner_text()
    page.locator(".rows tbody tr").nth(9).click()  # has no reference
    assert "No reference" in page.locator(".caption").nth(1).inner_text()
    assert page.locator(".view canvas").nth(1).evaluate(DRAWN)[0] == 0
    page.locator(".rows tbody tr").nth(12).click()
    assert "no structure to draw" in page.locator(".caption").nth(0).inner_text()
    assert page.locator(".view canvas").nth(0).evaluate(DRAWN)[0] == 0


def test_rows_beyond_the_limit_say_so(page):
    page.locator("[aria-label='Last page']").click()
    page.locator(".rows tbody tr", has_text="s128").click()
    assert "does not carry" in page.locator(".caption").nth(0).inner_text()
    assert "130 rows; the page carries the atoms of 100" in page.locator("#structures").inner_text()


def test_views_turn_together_or_alone(page):
    angles = "(side) => document.querySelectorAll('.view canvas')[side]._3dmol_viewer.getView().slice(4)"
    before = page.evaluate(angles, 0)
    assert before == page.evaluate(angles, 1)
    page.locator(".view").nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate(angles, 0) == page.evaluate(angles, 1) != before
    page.get_by_label("turn together").uncheck()
    box = page.locator(".view").nth(1).bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 120, box["y"] + 90)
    page.mouse.up()
    assert page.evaluate(angles, 0) != page.evaluate(angles, 1)
    page.get_by_role("button", name="reset view").click()
    assert page.evaluate(angles, 0) == page.evaluate(angles, 1) == before


def test_the_wheel_scrolls_the_page_until_a_view_is_clicked(page):
    distance = "document.querySelector('.view canvas')._3dmol_viewer.getView()[3]"
    view = page.locator(".view").first
    view.scroll_into_view_if_needed()
    before, top = page.evaluate(distance), page.evaluate("scrollY")
    view.hover()
    page.mouse.wheel(0, -100)
    until(page, f"scrollY < {top}")
    assert page.evaluate(distance) == before
    view.click(position={"x": 5, "y": 5})
    page.mouse.wheel(0, -100)
    until(page, f"{distance} !== {before}")
    page.keyboard.press("0")
    assert page.evaluate(distance) == pytest.approx(before, abs=1e-6)


def atoms_of(page, row: int, beyond: bool = False) -> list[dict]:
    return page.evaluate(f"picture(DATA.crystals[DATA.generated[{row}]], {str(beyond).lower()}).atoms")


def test_border_atoms_are_repeated_and_bonds_are_first_shells(page):
    def numbers(atoms):
        return sorted((atom["z"], len(atom["bonds"])) for atom in atoms)

    cubic = atoms_of(page, 0)
    assert [sum(atom["z"] == z for atom in cubic) for z in (38, 22, 8)] == [8, 1, 6]
    assert next(len(atom["bonds"]) for atom in cubic if atom["z"] == 22) == 6
    assert {len(atom["bonds"]) for atom in cubic if atom["z"] == 38} == {3}  # three faces meet in a corner
    salt = atoms_of(page, 3)
    assert [sum(atom["z"] == z for atom in salt) for z in (11, 17)] == [14, 13]
    assert max(len(atom["bonds"]) for atom in salt) == 6
    for atom in salt:
        lengths = [np.linalg.norm(np.subtract(atom["at"], salt[other]["at"])) for other in atom["bonds"]]
        assert np.allclose(lengths, 2.82)
    assert numbers(atoms_of(page, 2)) == [(6, 1)] * 7 + [(6, 3)] + [(6, 4)] or len(atoms_of(page, 2)) == 9
    carbon = atoms_of(page, 2, beyond=True)
    assert len([atom for atom in carbon if len(atom["bonds"]) == 4]) >= 9
    silicon = [atom for atom in atoms_of(page, 1, beyond=True) if atom["z"] == 14]
    assert silicon and max(len(atom["bonds"]) for atom in silicon) == 4


def test_atoms_beyond_the_cell_are_drawn_on_demand(page):
    before = picture(page, 0)
    page.get_by_label("bonded atoms beyond the cell").check()
    assert picture(page, 0) != before


def test_sorting(page):
    expected = sorted(row["density"] for row in report().rows if row["density"] is not None)
    button = page.locator(".rows th button", has_text="density")
    button.click()
    assert column(page, "density")[:50] == [f"{value:.2f}" for value in expected[:50]]
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("density")
    button.click()
    assert column(page, "density")[0] == f"{expected[-1]:.2f}"
    page.locator("[aria-label='Last page']").click()
    assert column(page, "density")[-10:] == [DASH] * 10  # without a value last, both ways
    page.locator(".rows th button", has_text="uid").first.click()
    assert column(page, "uid")[:2] == [HOSTILE, "s000"]


def test_filters(page):
    def shown() -> int:
        return int(page.locator(".filters > .muted").inner_text().split()[0])

    rows = report().rows
    assert shown() == 130
    page.get_by_label("Find text").fill("SiO3")
    page.get_by_label("Find text").fill("si3o6")
    assert shown() == 1 and column(page, "uid") == ["s001"]
    page.get_by_role("button", name="clear").click()
    page.get_by_label("status", exact=True).select_option("atoms_too_close")
    assert shown() == sum(row["status"] == "atoms_too_close" for row in rows)
    page.get_by_label("novel", exact=True).select_option("yes")
    assert shown() == sum(row["status"] == "atoms_too_close" and row["novel"] for row in rows) > 0
    page.get_by_role("button", name="clear").click()
    page.get_by_label("valid", exact=True).select_option("no")
    assert shown() == sum(not row["valid"] for row in rows)
    page.get_by_role("button", name="clear").click()
    page.get_by_label("unique", exact=True).select_option("yes")
    assert shown() == 65
    page.get_by_role("button", name="clear").click()
    page.get_by_label("3D", exact=True).select_option("yes")
    assert shown() == 100
    page.get_by_label("Find text").fill("no such text")
    assert shown() == 0 and page.locator(".rows tbody tr").count() == 0
    page.get_by_role("button", name="atoms_too_close").click()  # a reason of failure
    assert shown() == sum("atoms_too_close" in row["status"] for row in rows)


def test_pages_and_keys(page):
    assert len(column(page, "uid")) == 50
    page.locator("[aria-label='Next page']").click()
    assert column(page, "uid")[0] == "s050" and f"51{DASH}100" in page.locator(".pages").inner_text()
    page.locator("[aria-label='Next page']").click()
    assert len(column(page, "uid")) == 30 and page.locator("[aria-label='Next page']").is_disabled()
    page.locator(".rows tbody tr").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("[aria-current] td").first.inner_text() == "s100"
    page.keyboard.press("ArrowUp")
    assert page.locator("[aria-current] td").first.inner_text() == "s099"
    assert column(page, "uid")[0] == "s050"
    assert page.evaluate("document.activeElement.getAttribute('aria-current')") == "true"


def test_histograms_and_elements_read_out_their_numbers(page):
    chart = page.locator("#histograms figure").nth(1)
    assert "3 generated, 2 reference" in chart.locator(".readout").inner_text()
    chart.locator("svg").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert chart.locator(".readout").inner_text() == "3 generated 66.7 %, reference 50.0 %"
    chart.locator("svg").hover(position={"x": 45, "y": 40})
    assert chart.locator(".readout").inner_text() == "1 generated 0.0 %, reference 50.0 %"
    readout = page.locator("#elements .readout")
    assert "largest differences" in readout.inner_text()
    page.locator(".periodic").nth(1).locator("span", has_text=re.compile("^O$")).hover()
    assert re.fullmatch(r"O 8 generated [\d.]+ % \(\d+ of 120\), reference 50\.0 % \(2 of 4\)", readout.inner_text())
    page.locator(".periodic").first.focus()
    page.keyboard.press("ArrowRight")
    assert readout.inner_text().startswith("F 9")


def test_the_labels_of_histograms_are_within_the_picture(page):
    assert page.locator("#histograms text", has_text="other").count() == 1
    outside = """picture => [...picture.querySelectorAll("text")].filter(text => {
      const box = text.getBBox();
      return box.x < 0 || box.x + box.width > picture.viewBox.baseVal.width + 0.1;
    }).map(text => text.textContent)"""
    charts = page.locator("#histograms svg")
    assert [charts.nth(i).evaluate(outside) for i in range(charts.count())] == [[], [], []]


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1280, "dark")])
def test_layouts(browser, address, width, scheme):
    phone = {"has_touch": True, "is_mobile": True} if width < 500 else {}
    window = {"width": width, "height": 844}
    with opened(browser, address, viewport=window, color_scheme=scheme, **phone) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        luminance = (
            "element => getComputedStyle(element).{}.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0)"
        )
        page_light = page.locator("body").evaluate(luminance.format("backgroundColor"))
        text_light = page.locator("body").evaluate(luminance.format("color"))
        assert (page_light < 120 and text_light > 600) if scheme == "dark" else (page_light > 700 and text_light < 150)
        other, _, *corner = page.locator(".view canvas").first.evaluate(DRAWN)
        assert other > 0.03 and (sum(corner[:3]) < 150 if scheme == "dark" else sum(corner[:3]) == 765)
        if phone:
            page.locator(".rows tbody tr").nth(8).tap()
            assert page.locator(".view").first.is_visible()
            assert page.evaluate("document.querySelector('.view').getBoundingClientRect().bottom > 0")
            cell = page.locator(".periodic").first.locator("span", has_text=re.compile("^Ti$"))
            cell.tap()
            assert page.locator("#elements .readout").inner_text().startswith("Ti 22")


def test_the_views_follow_the_colour_scheme(page):
    corner = f'({DRAWN})(document.querySelector(".view canvas")).slice(2, 5).reduce((a, b) => a + b)'
    for scheme, condition in (("dark", f"{corner} < 150"), ("light", f"{corner} > 600")):
        page.emulate_media(color_scheme=scheme)
        until(page, condition)


def test_one_view_where_there_are_no_references(browser, tmp_path):
    rows = [{"uid": "a"}, {"uid": "b"}]
    write_report(
        tmp_path / "one.html", ReportData("One", "dng", "today", rows=rows, generated=[perovskite(), diamond()])
    )
    with opened(browser, (tmp_path / "one.html").as_uri()) as page:
        assert page.locator(".view").count() == 1 and page.get_by_label("turn together").count() == 0
        assert page.locator(".view canvas").evaluate(DRAWN)[0] > 0.03
        before = picture(page, 0)
        page.locator(".rows tbody tr").nth(1).click()
        assert picture(page, 0) != before
        assert "C2" in page.locator(".caption").inner_text()


@pytest.fixture(scope="module")
def empty_address(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("empty") / "report.html"
    write_report(path, ReportData("Nothing", "csp", "today"))
    return path.as_uri()


def test_an_empty_report(browser, empty_address):
    with opened(browser, empty_address) as page:
        assert "0 structures" in page.locator("#subtitle").inner_text()
        assert page.locator("#structures").is_hidden()


def test_the_policy_stops_foreign_scripts(browser, empty_address):
    with contextlib.closing(browser.new_context()) as context:
        page, said = context.new_page(), []
        page.on("console", lambda message: said.append(message.text))
        page.goto(empty_address)
        page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'hacked = 3'}))")
        assert page.evaluate("typeof hacked") == "undefined"
        assert len(said) == 1 and "Content Security Policy" in said[0]


def test_without_webgl_the_rest_works(chromium, address):
    flags = ["--no-sandbox", "--disable-3d-apis"]
    with contextlib.closing(chromium.launch(executable_path=CHROMIUM, args=flags)) as browser:
        page = browser.new_page()
        page.goto(address)
        assert "no WebGL" in page.locator(".view").first.inner_text()
        page.locator(".rows tbody tr").nth(1).click()
        assert "Si3O6" in page.locator(".details").inner_text()
