"""Every relative link and picture of every committed Markdown file points to a file, and a heading, that exist."""

import re
import subprocess
from collections import Counter
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!\\)\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
DEFINITION = re.compile(r"^ {0,3}\[[^\]]+\]:\s*<?(\S+?)>?\s*$", re.MULTILINE)
HTML = re.compile(r"<(?:img|a|source)\b[^>]*?\b(?:src|href)\s*=\s*[\"']([^\"']+)[\"']")
FENCE = re.compile(r"^ {0,3}(```+|~~~+).*?^ {0,3}\1[`~]*\s*$", re.MULTILINE | re.DOTALL)
ANCHOR = re.compile(r"<a\b[^>]*?\b(?:id|name)\s*=\s*[\"']([^\"']+)[\"']")


def pages():
    """Markdown files that are committed or about to be; without git, all that are not in a hidden folder."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    try:
        names = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        found = (p.relative_to(ROOT) for p in ROOT.rglob("*.md"))
        names = [str(p) for p in found if not any(part.startswith(".") for part in p.parts)]
    return sorted(name for name in names if (ROOT / name).is_file())


def without_code(text):
    return re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", FENCE.sub("", text), flags=re.DOTALL)


def links(text):
    text = without_code(text)
    # A linked picture, [![alt](picture)](page), holds two links.
    inner = re.sub(r"!\[[^\]]*\]\(([^)\s]+)[^)]*\)", "picture", text)
    pictures = re.findall(r"!\[[^\]]*\]\(<?([^)\s>]+)", text)
    return [*pictures, *LINK.findall(inner), *DEFINITION.findall(text), *HTML.findall(text)]


def slug(heading):
    """The anchor that GitHub gives a heading."""
    heading = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip())
    heading = re.sub(r"[`*]|<[^>]+>", "", heading)
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(text):
    """Anchors of a page; a heading that comes again gets a number."""
    seen: Counter = Counter()
    found = set(ANCHOR.findall(text))
    for heading in re.findall(r"^ {0,3}#{1,6}\s+(.*?)\s*#*\s*$", FENCE.sub("", text), re.MULTILINE):
        name = slug(heading)
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


@lru_cache
def anchors_of(path):
    return anchors(path.read_text())


def broken(page, text):
    """Each link of a page that leads nowhere, and why."""
    reasons = []
    for link in links(text):
        if re.match(r"[a-z][a-z0-9+.-]*:|//", link, re.IGNORECASE):
            continue  # another site
        name, _, anchor = link.partition("#")
        target = (page.parent / unquote(name)).resolve() if name else page
        if name.startswith("/") or not target.is_relative_to(ROOT):
            reasons.append(f"{link}: outside the project")
        elif not target.exists():
            reasons.append(f"{link}: no such file")
        elif anchor and target.suffix == ".md" and anchor not in (anchors(text) if not name else anchors_of(target)):
            reasons.append(f"{link}: no such heading")
    return reasons


@pytest.mark.parametrize("name", pages())
def test_links_lead_somewhere(name):
    assert not broken(ROOT / name, (ROOT / name).read_text())


def test_there_are_pages():
    assert {"README.md", "CONTRIBUTING.md", "docs/README.md", "docs/faq.md"} <= set(pages())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[a](nowhere.md)", "no such file"),
        ("![a](nowhere.png)", "no such file"),
        ("[![a](nowhere.png)](README.md)", "no such file"),
        ("[![a](LICENSE)](nowhere.md)", "no such file"),
        ('[a `b` [c]](nowhere.md "title")', "no such file"),
        ("[a]: nowhere.md", "no such file"),
        ('<img width="3" src="nowhere.png">', "no such file"),
        ("[a](README.md#no-such-heading)", "no such heading"),
        ("# One\n\n[a](#two)", "no such heading"),
        ("# One\n\n[a](#one-1)", "no such heading"),
        ("[a](../elsewhere.md)", "outside the project"),
        ("[a](/README.md)", "outside the project"),
    ],
)
def test_a_broken_link_is_found(text, reason):
    (found,) = broken(ROOT / "README.md", text)
    assert found.endswith(reason)


@pytest.mark.parametrize(
    "text",
    [
        "[a](README.md) [b](docs/faq.md#is-d--1-enough) ![c](docs/concepts.png) [d](docs)",
        "```\n[a](nowhere.md)\n```\n`[b](nowhere.md)` \\[c](nowhere.md)",
        "# Can I use `a_b` (now)?\n\n[a](#can-i-use-a_b-now)",
        "# One\n\n# One\n\n[a](#one) [b](#one-1)",
        "[a](https://example.org/nowhere.md#x) [b](mailto:a@example.org)",
    ],
)
def test_a_good_link_is_left_alone(text):
    assert not broken(ROOT / "README.md", text)
