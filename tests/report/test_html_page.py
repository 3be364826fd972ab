"""The report: one file that holds all it shows, and that a real browser shows without complaint on a narrow screen."""

import base64
import io
import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from bench.published import CASES, predictions
from report import html_page, notebooks
from report.figures import difference, draw, drawings, drawn_by
from report.html_page import Config, Page, notebook_page, render
from report.opening import opening
from suite.records import ROOT

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
NARROW, WIDE = 390, 1280
RESULTS = ROOT / "results"
NOTEBOOK_PACKAGES = ("nbformat", "nbclient", "ipykernel", "jupyter_client")


class Parts(HTMLParser):
    """Tags with their attributes, and which tags were left open."""

    VOID = ("meta", "link", "img", "br", "hr")

    def __init__(self):
        super().__init__()
        self.tags, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parts(text):
    parser = Parts()
    parser.feed(text)
    assert parser.open == []
    return parser.tags


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Made without the packages that read and execute notebooks."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        for package in NOTEBOOK_PACKAGES:
            patch.setitem(sys.modules, package, None)
        html_page.main(Config(out=path, execute=False))
    return path


@pytest.fixture(scope="module")
def tags(report):
    return parts(report.read_text())


@pytest.mark.parametrize("package", ["nbclient", "ipykernel"])
def test_a_package_that_is_missing_is_told_before_anything_is_drawn(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(html_page, "drawings", lambda _: pytest.fail("something is drawn"))
    with pytest.raises(ModuleNotFoundError, match=package):
        html_page.main(Config(out=tmp_path / "report.html"))


def test_every_picture_is_inside_and_is_one(tags):
    sources = [a["src"] for tag, a in tags if tag == "img"]
    assert len(sources) >= len(drawings(RESULTS))
    for source in sources:
        head, _, content = source.partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as picture:
            picture.load()
            assert picture.format == "PNG" and min(picture.size) > 100
    assert all(a["alt"] for tag, a in tags if tag == "img")


@pytest.mark.parametrize("name", sorted(drawings(RESULTS)))
def test_every_figure_of_the_results_is_shown_and_the_committed_one_is_what_its_records_give(report, tags, name):
    shown = [a["src"].partition(",")[2] for tag, a in tags if tag == "img"]
    committed, drawn = (RESULTS / name).read_bytes(), (report.parent / "figures" / name).read_bytes()
    assert base64.b64encode(drawn).decode() in shown
    if drawn_by(committed) != drawn_by(drawn):
        pytest.skip(f"drawn by {drawn_by(committed)}, and here by {drawn_by(drawn)}")
    assert difference(committed, drawn) < 1e-3, f"{name} was not drawn from the records: run python -m report.figures"


def test_nothing_is_asked_from_outside(tags):
    assert {tag for tag, _ in tags} & {
        "script",
        "iframe",
        "object",
        "embed",
        "video",
        "audio",
        "source",
        "base",
    } == set()
    for tag, attributes in tags:
        for name in ("src", "srcset", "data", "poster", "style", "background"):
            assert "http" not in (attributes.get(name) or "") and "url(" not in (attributes.get(name) or "")
        if tag == "link":
            assert attributes["href"].startswith("data:")
    assert "@import" not in html_page.STYLE and "url(" not in html_page.STYLE


def test_links_lead_somewhere(tags):
    anchors = [a["id"] for _, a in tags if "id" in a]
    assert len(anchors) == len(set(anchors))
    targets = [a["href"] for tag, a in tags if tag == "a"]
    assert [t for t in targets if not t.startswith("http") and t.removeprefix("#") not in anchors] == []
    assert sum(t.startswith("#") for t in targets) >= len(notebooks.paths())


def test_it_has_all_notebooks_tables_and_verdicts(report):
    text = report.read_text()
    assert text.count("<h1>") == 1
    for path in (*notebooks.paths(), *RESULTS.rglob("*.md")):
        assert f'<section id="{Page(path.relative_to(ROOT).as_posix(), "").anchor}">' in text, path.name
    for word in ("holds with correction", "fails", "changed since", "Not measured yet", "commit"):
        assert word in text
    assert text.count("<table>") == text.count('<div class="table"><table>') > 20


def test_a_missing_picture_is_told():
    with pytest.raises(ValueError, match=r"'results/a.md' shows 'none.png'"):
        render([Page("results/a.md", "# A\n\n![x](none.png)")], {})


def test_links_within_the_page_and_out_of_it():
    text = "# A\n\n[b](b.md#part) [record](x.json) [web](https://example.org) <script>alert(1)</script>\n"
    made = render([Page("results/a.md", text), Page("results/b.md", "# B")], {})
    assert '<a href="#results-b-md">b</a>' in made
    assert '<span title="results/x.json">record</span>' in made
    assert '<a href="https://example.org">web</a>' in made
    assert "<script>" not in made


def test_a_repeated_picture_is_shown_once():
    png = draw(RESULTS, "predicted_memory/curves.png")
    made = render([Page(f"results/{k}.md", f"# {k}\n\n![c](c{k}.png)", {f"c{k}.png": png}) for k in "ab"], {})
    assert made.count("<img") == 1 and '<a href="#figure-1">c</a> (above)' in made


def test_it_must_be_an_html_file(tmp_path):
    with pytest.raises(ValueError, match=r"--out must name an \.html file, got 'report'"):
        html_page.main(Config(out=tmp_path / "report"))


def test_a_notebook_page_has_texts_and_pictures_but_no_code():
    path = next(p for p in notebooks.paths() if p.stem == "fig7_spatial_locality")
    made = notebook_page(path, json.loads(path.read_text()))
    assert "import" not in made.text and "What we found" in made.text and len(made.pictures) == 2


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = os.environ.get("CHOPGRAD_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as driver:
        if path is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip(f"no browser is installed ({', '.join(BROWSERS)}, or playwright's own)")
        # --no-sandbox: containers that run tests as root have no other way; the page is our own.
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


def check(report, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 844})
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url[:60]))
    page.goto(report.as_uri(), wait_until="load")
    pictures = page.evaluate("Array.from(document.images, i => [i.id, i.complete, i.naturalWidth, i.clientWidth])")
    assert len(pictures) == len(re.findall("<img", report.read_text())) > 5
    assert [p for p in pictures if not p[1] or p[2] <= 100 or p[3] < 600] == []  # panels are not shrunk away
    assert complaints == []
    assert [r for r in requests if not r.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out of a narrow screen
    tall = "Array.from(document.querySelectorAll('p, li, td'), e => parseFloat(getComputedStyle(e).fontSize))"
    assert min(page.evaluate(tall)) >= 12  # pixels: readable without zooming
    page.close()


@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_a_real_browser_shows_it(report, browser, width):
    check(report, browser, width)


@pytest.mark.parametrize("damage", ["missing picture", "script error", "wide table"])
def test_the_browser_check_can_fail(report, browser, damage, tmp_path):
    text = report.read_text()
    broken = {
        "missing picture": re.sub(r"(data:image/png;base64,).{40}", r"\1", text, count=1),
        "script error": text.replace("</body>", "<script>nothing()</script></body>"),
        "wide table": text.replace(".table { overflow-x: auto;", ".table {"),
    }[damage]
    assert broken != text
    (tmp_path / "broken.html").write_text(broken)
    with pytest.raises(AssertionError):
        check(tmp_path / "broken.html", browser, NARROW)


def test_pages_are_in_a_useful_order(tags):
    found = [attributes["id"] for tag, attributes in tags if tag == "section"]
    first = [
        "opening.md", "results/bench-cpu.md", "results/bench-published.md", "results/theory.md",
        "results/predicted_memory/README.md", "notebooks/verdicts.ipynb",
    ]  # fmt: skip
    last, earlier = "results/tasks/README.md", "notebooks/fig3_temporal_locality.ipynb"
    wanted = {key: Page(key, "").anchor for key in (*first, earlier, last, "results/README.md")}
    assert found[:6] == [wanted[key] for key in first]
    assert found[-1] == wanted["results/README.md"] and len(set(found)) == len(found)
    assert found.index(wanted[last]) > found.index(wanted[earlier])


def test_the_page_opens_with_memory_then_costs_then_the_claims_of_the_paper(report):
    text = report.read_text()
    order = [
        "</nav>", "chopgrad.patch(pipe.vae)", "full back-propagation, GiB", "<img",
        "What each strategy costs</h3>", "The theory, put to the test</h2>", "the paper's claim</th>",
        "Does influence decay with temporal distance?</h3>",
    ]  # fmt: skip
    places, place = [], 0
    for part in order:  # each for the first time after the one before it
        place = text.index(part, place)
        places.append(place)
    body = places[0]
    assert text.index("<section", body) < places[1] < text.index("<section", text.index("<section", body) + 1)
    assert text.index("<img", body) == places[3]  # the first picture of all


def test_the_opening_says_what_the_planner_says(tmp_path):
    text = opening(RESULTS)
    rows = {x.split("|")[1].strip(): [c.strip() for c in x.split("|")[2:-1]] for x in text.splitlines() if "|" in x}
    least = predictions()["wan2.1", 480, 832][97]["Exact(strips=16, offload, pieces)"]
    shown = rows["wan2.1, 97 frames of 480x832"]
    assert shown[2] == f"{least['device_bytes'] / 2**30:.1f}" and len(rows) == len(CASES) + 2
    assert float(shown[2]) < float(shown[1]) < float(shown[0])
    assert "|" not in opening(tmp_path) and "```python" in opening(tmp_path)  # no records: the code alone
    (tmp_path / "README.md").write_text("```python\nchopgrad.decode(decoder, z)\n```\nchopgrad.patch(pipe.vae)\n")
    with pytest.raises(ValueError, match=r"'README.md' has no block of Python with 'chopgrad.patch"):
        opening(tmp_path, tmp_path / "README.md")


def test_links_lead_to_headings():
    a = "# A\n\n[in](#part-1) [out](b.md#is-b-really-it) [gone](#no)\n\n## Part\n\n## [Part](x.json)\n"
    made = render([Page("results/a.md", a), Page("results/b.md", "# B\n\n## Is `B` *really* it?\n")], {})
    assert '<a href="#results-a-md--part-1">in</a>' in made and '<h3 id="results-a-md--part-1">' in made
    assert (
        '<a href="#results-b-md--is-b-really-it">out</a>' in made and '<h3 id="results-b-md--is-b-really-it">' in made
    )
    assert '<a href="#results-a-md">gone</a>' in made  # at least to its page
