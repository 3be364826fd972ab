"""One page with everything: ``python -m report.html_page`` (``tox -e report``) writes ``runs/report/report.html``.

Memory comes first: what one line does, then what each strategy costs, then what became of the paper's claims. The
notebooks, the other tables of ``results/`` and where each number comes from follow. Every figure is drawn again from
the records. Pictures are inside the page, which asks for nothing from outside, runs no script and can be sent as one
file.
"""

from __future__ import annotations

import base64
import html
import importlib
import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

from analysis.theory.questions import anchor
from report.figures import drawings, drawn
from report.freshness import History
from report.notebooks import PICTURE, executed, paths, read
from report.opening import opening
from report.results_index import page as index_page
from report.results_index import rows as index_rows
from suite.command_line import run_main
from suite.progress import track
from suite.records import ROOT

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 0 1rem 4rem; }
h1, h2, h3, h4 { line-height: 1.25; overflow-wrap: anywhere; }
section { border-top: 1px solid #8886; margin-top: 3rem; }
p, li { overflow-wrap: anywhere; }
code { font-size: .85em; background: #8882; padding: 0 .2em; border-radius: 3px; }
pre { overflow-x: auto; background: #8882; padding: .6rem; }
img { max-width: 100%; height: auto; background: white; }
.table { overflow-x: auto; margin: 1rem 0; }
.figure { overflow-x: auto; }
@media (max-width: 44rem) { .figure img { max-width: none; width: 42rem; } }
table { border-collapse: collapse; font-size: .85rem; }
th, td { border: 1px solid #8886; padding: .25rem .5rem; vertical-align: top; min-width: 4rem; max-width: 32rem; }
nav li { margin: .1rem 0; }
"""
FIRST = ("bench-full-cuda.md", "bench-cpu.md", "bench-published.md", "theory.md", "predicted_memory/README.md")
"""Pages of ``results/`` that a reader wants before the notebooks: what memory costs, and the paper's claims."""
FIRST_NOTEBOOKS = ("verdicts", "tables_1_to_4_end_tasks", "frontier")
"""And those wanted before the others."""


@dataclass
class Config:
    """Settings of the report."""

    out: Path = ROOT / "runs" / "report" / "report.html"
    """The page; figures are written to the folder figures/ beside it."""
    results: Path = ROOT / "results"
    """Folder of the records."""
    execute: bool = True
    """Execute the notebooks; else what is committed with them is shown."""


@dataclass
class Page:
    """A Markdown text with a name and a place in the project; links lead from one to another."""

    key: str
    """Path within the project, such as ``results/theory.md``."""
    text: str
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """What its picture links mean, where that is no file of the project."""

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.key.lower()).strip("-")

    @property
    def title(self) -> str:
        found = re.search(r"^# (.+)$", self.text, flags=re.M)
        return found[1] if found else self.key


def notebook_page(path: Path, notebook: Mapping[str, Any]) -> Page:
    """A notebook's texts, results and pictures; its code stays where it is.

    Args:
        notebook: as JSON has it, in which a text is a string or a list of lines.
    """
    lines: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            lines += ["".join(cell["source"]), ""]
            continue
        for output in cell["outputs"]:
            data = output.get("data", {})
            if PICTURE in data:
                name = f"{path.stem}-{len(pictures)}.png"
                pictures[name] = base64.b64decode("".join(data[PICTURE]))
                lines += [f"![{path.stem.replace('_', ' ')}]({name})", ""]
            elif "text/markdown" in data:
                lines += ["".join(data["text/markdown"]), ""]
            elif output["output_type"] == "stream":
                lines += ["```text", "".join(output["text"]).rstrip(), "```", ""]
    return Page(f"notebooks/{path.name}", "\n".join(lines), pictures)


def pages(config: Config) -> Iterator[Page]:
    """Memory, what it costs and the paper's claims; then notebooks, other tables, and where the numbers come from."""
    yield Page("opening.md", opening(config.results))
    tables = sorted(config.results.rglob("*.md"), key=lambda p: (len(p.relative_to(config.results).parts), p))
    at = {p.relative_to(config.results).as_posix(): p for p in tables if p != config.results / "README.md"}
    yield from (Page(f"results/{name}", at.pop(name).read_text()) for name in FIRST if name in at)
    found = sorted(paths(), key=lambda p: ((*FIRST_NOTEBOOKS, p.stem).index(p.stem), p.stem))
    for path in track(found, description="notebooks"):
        yield notebook_page(path, executed(read(path), path.stem) if config.execute else json.loads(path.read_text()))
    yield from (Page(f"results/{name}", path.read_text()) for name, path in at.items())
    # Written now, not read: marks of freshness must be those of this working tree.
    yield Page("results/README.md", index_page(config.results, index_rows(config.results, History())))


def render(found: list[Page], figures: Mapping[str, bytes]) -> str:
    """The whole page.

    Args:
        figures: path within the project -> PNG, for pictures that were drawn again.

    Raises:
        ValueError: a page shows a picture that there is not.
    """
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    parsed = [(page, reader.parse(page.text)) for page in found]
    places: dict[str, str] = {}
    for page, tokens in parsed:
        places[page.key] = page.anchor
        places |= {f"{page.key}#{name}": str(token.attrs["id"]) for name, token in _headings(page, tokens)}
    sections: list[str] = []
    shown: dict[str, str] = {}
    for page, tokens in parsed:
        body = _body(page, tokens, places, figures, shown, reader)
        sections.append(f'<section id="{page.anchor}">\n{body}</section>\n')
    titles = [page.title for page in found]
    names = [p.title if titles.count(p.title) == 1 else f"{p.title} ({Path(p.key).stem})" for p in found]
    pairs = zip(found, names, strict=True)
    links = "".join(f'<li><a href="#{p.anchor}">{html.escape(name)}</a></li>\n' for p, name in pairs)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>ChopGrad: what was measured</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        "<h1>ChopGrad: what was measured</h1>\n"
        "<p>Pixel losses for latent video diffusion by truncated back-propagation through the decoder "
        '(<a href="https://arxiv.org/abs/2603.17812">arXiv 2603.17812</a>): figures, tables and verdicts, made from '
        "the records of this project and nothing else.</p>\n"
        f"<nav>\n<ul>\n{links}</ul>\n</nav>\n{''.join(sections)}</body>\n</html>\n"
    )


def _headings(page: Page, tokens: list[Token]) -> Iterator[tuple[str, Token]]:
    """Each heading by the name that links have for it, with an id that no other page has."""
    seen: Counter[str] = Counter()
    for token, inline in pairwise(tokens):
        if token.type == "heading_open":
            text = anchor("".join(child.content for child in inline.children or ()))
            name = f"{text}-{seen[text]}" if seen[text] else text
            seen[text] += 1
            token.attrs["id"] = f"{page.anchor}--{name}"
            yield name, token


def _body(
    page: Page,
    tokens: list[Token],
    places: Mapping[str, str],
    figures: Mapping[str, bytes],
    shown: dict[str, str],
    reader: MarkdownIt,
) -> str:
    """One page's HTML; ``shown`` holds the pictures of the pages before it, which are led back to, not repeated."""
    open_links: list[bool] = []
    for token in _all(tokens):
        if token.type in ("heading_open", "heading_close"):  # the page itself has the first level
            token.tag = f"h{min(6, int(token.tag[1]) + 1)}"
        elif token.type == "image":
            source = _picture(page, str(token.attrs["src"]), figures)
            if source in shown:
                token.type = "html_inline"
                token.content = f'<a href="#{shown[source]}">{html.escape(token.content)}</a> (above)'
            else:
                shown[source] = f"figure-{len(shown) + 1}"
                token.attrs |= {"src": source, "alt": token.content, "id": shown[source]}
        elif token.type == "link_open":
            open_links.append(_lead(token, page, places))
        elif token.type == "link_close" and not open_links.pop():
            token.tag, token.type = "span", "span_close"
    return (
        str(reader.renderer.render(tokens, reader.options, {}))
        .replace("<table>", '<div class="table"><table>')
        .replace("</table>", "</table></div>")
        .replace("<p><img", '<p class="figure"><img')  # scrolls on a narrow screen, where panels would be too small
    )


def _all(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from token.children or ()


def _lead(token: Token, page: Page, places: Mapping[str, str]) -> bool:
    """Let a link lead somewhere within the page or to the web; what lies in a file is named, not linked."""
    target = str(token.attrs["href"])
    if re.match(r"https?://", target):
        return True
    name, _, heading = target.partition("#")
    inside = posixpath.normpath(posixpath.join(posixpath.dirname(page.key), name)) if name else page.key
    token.attrs.clear()
    if inside in places:
        token.attrs["href"] = f"#{places.get(f'{inside}#{heading}', places[inside])}"
        return True
    token.tag, token.type = "span", "span_open"
    token.attrs["title"] = inside
    return False


def _picture(page: Page, source: str, figures: Mapping[str, bytes]) -> str:
    inside = posixpath.normpath(posixpath.join(posixpath.dirname(page.key), source))
    content = page.pictures.get(source) or figures.get(inside)
    if content is None and (ROOT / inside).is_file():
        content = (ROOT / inside).read_bytes()
    if content is None:
        raise ValueError(f"'{page.key}' shows '{source}', which is neither drawn from records nor a file.")
    return "data:image/png;base64," + base64.b64encode(content).decode()


def main(config: Config) -> None:
    if config.out.suffix != ".html":
        raise ValueError(f"--out must name an .html file, got '{config.out.name}'.")
    if config.execute:
        for package in ("nbclient", "ipykernel"):  # told now, and not after a minute of drawing
            importlib.import_module(package)
    figures = {}
    known = drawings(config.results)
    for name, drawing in track(known.items(), description="figures"):
        figures[f"results/{name}"] = drawn(drawing, config.out.parent / "figures" / name)
    text = render(list(pages(config)), figures)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(text)
    print(f"Written: {config.out.name}, {len(text) / 2**20:.1f} MiB, and {len(figures)} figures in figures/ beside it.")


if __name__ == "__main__":
    wanted = "; install what executes notebooks (pip install nbclient ipykernel), or pass --no-execute"
    run_main(main, Config, __doc__, {ModuleNotFoundError: wanted, AssertionError: ""})
