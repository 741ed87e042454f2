"""The pages in a real browser: from disk, without a network, by mouse and by keyboard."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from flatcal_dist.calibration.comparison.writing import write_comparison
from flatcal_dist.calibration.records.records import Records
from flatcal_dist.calibration.report.writing import write_report
from tests.calibration.test_compare import write_run
from tests.calibration.test_report import ABOUT
from tests.support.report_inputs import TRAINING, encoded_digit, write_some_shift

playwright = pytest.importorskip("playwright.sync_api", reason="the dev extra brings playwright")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on this machine: apt-get install chromium"
)
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
NAMED = {
    "button",
    "link",
    "image",
    "img",
    "table",
    "region",
    "navigation",
    "heading",
    "columnheader",
}


# Tables wider than their room, by their names.
CUT_OFF = """Array.from(document.querySelectorAll('.scroll'))
    .filter(box => box.scrollWidth > box.clientWidth + 1)
    .map(box => box.getAttribute('aria-label'))"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, records: Records) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("pages")
    write_some_shift(records, base / "report")
    write_report(
        records, base / "report", ABOUT, image_of=encoded_digit, training=TRAINING, resamples=20
    )
    runs = [write_run(base / f"{m}_{s}", m, s) for m in ("sgd", "csam") for s in range(2)]
    write_comparison(runs, base / "comparison", resamples=20)
    return {name: base / name / "index.html" for name in ("report", "comparison")}


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=QUIET)
        yield browser
        browser.close()


class Visit:
    """An open page, and all that it asked for or complained of."""

    def __init__(self, browser, path: Path, width: int = 1280) -> None:
        self.context = browser.new_context(
            offline=True, viewport={"width": width, "height": 900}, color_scheme="light"
        )
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.on("console", lambda m: self.complaints.append(m.text))
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.goto(path.as_uri())


@pytest.fixture(params=["report", "comparison"])
def visit(request, browser, pages) -> Iterator[Visit]:
    visit = Visit(browser, pages[request.param])
    yield visit
    assert visit.complaints == []
    asked = [url for url in visit.requests if not url.startswith("data:")]
    assert asked == [pages[request.param].as_uri()]  # the file itself, and nothing else
    visit.context.close()


def column(page, table: int, place: int) -> list:
    """What a column sorts by, from top to bottom; None where a cell has no value."""
    return page.evaluate(
        """([table, place]) => Array.from(
            document.querySelectorAll('table.sortable')[table].tBodies[0].rows,
            row => { const cell = row.cells[place], given = cell.dataset.value;
                     if (given === undefined) return cell.textContent.trim();
                     return given === '' ? null : Number(given); })""",
        [table, place],
    )


def in_order(values: list, descending: bool) -> bool:
    known = [v for v in values if v is not None]
    if not all(isinstance(v, (int, float)) for v in known):
        return True  # text goes by the browser's collation
    return values[len(known) :] == [None] * (len(values) - len(known)) and known == sorted(
        known, reverse=descending
    )


def test_tables_sort_by_click_and_by_key(visit: Visit) -> None:
    page = visit.page
    tables = page.locator("table.sortable")
    assert tables.count() >= 2
    moved = 0
    for t in range(tables.count()):
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        buttons = tables.nth(t).locator("thead button.sort")
        for c in range(buttons.count()):
            head = tables.nth(t).locator("thead th").nth(c)
            before = column(page, t, c)
            if c % 2:
                buttons.nth(c).click()
            else:
                buttons.nth(c).focus()
                page.keyboard.press("Enter")
            first = head.get_attribute("aria-sort")
            assert first in ("ascending", "descending")
            assert in_order(column(page, t, c), first == "descending")
            page.keyboard.press("Space")  # the button still has the focus
            assert {first, head.get_attribute("aria-sort")} == {"ascending", "descending"}
            after = column(page, t, c)
            assert in_order(after, first == "ascending")
            assert sorted(map(str, after)) == sorted(map(str, before))
            assert tables.nth(t).locator("[aria-sort]").count() == 1
            moved += after != before
    assert moved > 3


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`; WCAG 2.2."""
    parts = [float(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_figures_in_both_themes(visit: Visit) -> None:
    page, shots = visit.page, []
    for theme in ("light", "dark"):
        assert page.evaluate("document.documentElement.dataset.theme || 'light'") == theme
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        texts = page.evaluate(
            """Array.from(document.querySelectorAll('main p, main td, main small, svg text'),
                          t => t instanceof SVGElement ? getComputedStyle(t).fill
                                                       : getComputedStyle(t).color)"""
        )
        assert len(texts) > 100
        assert min(contrast(colour, paper) for colour in set(texts)) >= 4.5
        figures = page.locator("figure svg")
        assert figures.count() >= 4
        for i in range(figures.count()):
            box = figures.nth(i).bounding_box()
            assert box["width"] > 100
            assert box["height"] > 100
        shots.append(figures.first.screenshot())
        page.locator("#theme").click()
    assert shots[0] != shots[1]


def test_names_for_a_screen_reader(visit: Visit) -> None:
    page = visit.page
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    session = visit.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    seen: dict[str, int] = {}
    for node in nodes:
        role = node.get("role", {}).get("value")
        if role in NAMED and not node["ignored"]:
            assert node.get("name", {}).get("value", "").strip(), node
            seen[role] = seen.get(role, 0) + 1
    for role in ("button", "link", "table", "region", "navigation", "heading"):
        assert seen.get(role), role
    # What a figure shows is told, not only what it is.
    described = page.evaluate(
        "Array.from(document.querySelectorAll('svg[role=img] > desc'), d => d.textContent)"
    )
    assert len(described) == page.locator("figure svg").count()
    assert all((len(text) > 40 and any(c.isdigit() for c in text)) or "tables" in text
               for text in described)  # fmt: skip


def test_keyboard_begins_with_the_skip_link(visit: Visit) -> None:
    visit.page.keyboard.press("Tab")
    assert visit.page.evaluate("document.activeElement.className") == "skip"
    visit.page.keyboard.press("Enter")
    assert visit.page.url.endswith("#content")


@pytest.mark.parametrize("width", [420, 1280])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_nothing_is_wider_than_the_page(browser, pages, name: str, width: int) -> None:
    visit = Visit(browser, pages[name], width)
    visit.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    visit.context.close()


def test_long_names_of_methods_wrap(browser, tmp_path) -> None:
    long = "a_method_with_a_name_of_more_than_forty_letters"
    runs = [write_run(tmp_path / f"{m}_{s}", m, s) for m in ("sgd", long) for s in range(2)]
    write_comparison(runs, tmp_path / "comparison", resamples=20)
    for width in (400, 1400):
        visit = Visit(browser, tmp_path / "comparison/index.html", width)
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
        if width == 1400:
            assert visit.page.evaluate(CUT_OFF) == []
        visit.context.close()


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_no_column_is_cut_off_on_a_desktop(browser, pages, name: str) -> None:
    visit = Visit(browser, pages[name], 1400)
    visit.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert visit.page.evaluate(CUT_OFF) == []
    visit.context.close()


def test_prints(browser, pages) -> None:
    visit = Visit(browser, pages["report"])
    assert visit.page.pdf().count(b"/Type /Page") > 3
    visit.context.close()
