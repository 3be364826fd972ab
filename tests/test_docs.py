"""The docs agree with the code: the API reference, the outputs of commands, the numbers of the FAQ, the diagram."""

import importlib.util
import re
from pathlib import Path

import pytest

from chopgrad.__main__ import _parser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def script(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date(tmp_path, monkeypatch, capsys):
    make_api = script("make_api")
    assert make_api.main(["--check"]) == 0, "run python docs/make_api.py"
    (tmp_path / "api.md").write_text(make_api.page().replace("distance", "length", 1))
    monkeypatch.setattr(make_api, "PAGE", tmp_path / "api.md")
    assert make_api.main(["--check"]) == 1
    assert "run python docs/make_api.py" in capsys.readouterr().err
    assert make_api.main([]) == 0
    assert make_api.main(["--check"]) == 0


def test_the_reference_has_every_public_name():
    import chopgrad

    text = (DOCS / "api.md").read_text()
    public = [name for name in chopgrad.__all__ if callable(getattr(chopgrad, name))]
    assert "frame_loss" in public
    assert [name for name in public if f"\n### {name}\n" not in text] == []


def test_a_docstring_becomes_markdown():
    doc = "A ``thing``.\n\nArgs:\n    a: first,\n        and more.\n    b, c: rest.\n\nCost: none.\n\nReturns:\n    It."
    assert script("make_api").markdown(doc) == [
        "A `thing`.", "", "**Args**:", "", "- `a`: first,", "  and more.", "- `b, c`: rest.", "", "**Cost**: none.", "",
        "**Returns**:", "It.",
    ]  # fmt: skip


def commands():
    return [match["command"] for page in PAGES for match in script("make_outputs").BLOCK.finditer(page.read_text())]


def test_outputs_are_filled_in_and_nothing_else_changes():
    filled = script("make_outputs").filled
    text = "a\n<!-- output: chopgrad x -->\n\n```text\n```\n\nb\n\n<!-- output: python y -->\n\n```text\nold\n```\nc\n"
    text += "```\nd\n```\n"
    expected = text.replace("```text\n```", "```text\nnew x\n```").replace("old", "new y")
    assert filled(text, lambda command: f"new {command[-1]}") == expected
    assert filled(expected, lambda command: "newer", only="chopgrad x") == expected.replace("new x", "newer")
    with pytest.raises(ValueError, match="must begin with chopgrad or python"):
        script("make_outputs").run("rm -r docs")


def test_no_output_is_left_empty():
    found = [match["output"] for page in PAGES for match in script("make_outputs").BLOCK.finditer(page.read_text())]
    marked = sum(page.read_text().count("<!-- output: ") for page in PAGES)
    assert len(found) == marked > 3
    assert all(found)


def test_the_output_of_the_conformance_kit():
    assert script("make_outputs").main(["--check", "docs/check_a_decoder.py"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands() if "check_a_decoder" not in c])
def test_other_outputs(command):
    assert script("make_outputs").main(["--check", command]) == 0, "run python docs/make_outputs.py"


def test_numbers_of_the_faq_come_from_somewhere():
    """Every measured or predicted number of the FAQ stands on one of the pages that it links to."""
    text = (DOCS / "faq.md").read_text()
    sources = [
        DOCS / "planner.md",
        *(ROOT / "results").glob("*.md"),
        *(ROOT / "results" / "gradient_bias").glob("*.md"),
    ]
    known = " ".join(path.read_text() for path in sources)
    numbers = set(re.findall(r"(?<![\w.-])\d+\.\d+(?![\w.])", text)) - {"2.1", "2.2"}  # versions of Wan
    assert len(numbers) > 10
    given = set(re.findall(r"\d+\.\d+", known))  # where there may be more digits
    assert {n for n in numbers if all(f"{float(g):.{len(n.partition('.')[2])}f}" != n for g in given)} == set()


def test_every_option_of_the_planner_is_explained():
    (commands,) = (action for action in _parser()._actions if action.choices)
    options = {word for action in commands.choices["plan"]._actions for word in action.option_strings}
    text = (DOCS / "planner.md").read_text()
    assert {word for word in options - {"-h", "--help"} if word not in text} == set()


def test_the_table_of_decoders_has_every_class():
    import chopgrad

    text = (DOCS / "decoders.md").read_text()
    assert {name for name in chopgrad.DECODERS if f"`{name}`" not in text} == set()


def test_the_table_of_groups_is_right():
    from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan

    from chopgrad import decoder_for
    from chopgrad.planner import ARCHITECTURES

    counts = {"AutoencoderKLWan": ([1, 4, 4], 3), "AutoencoderKLCogVideoX": ([9, 8], 5)}
    for cls in (AutoencoderKLWan, AutoencoderKLCogVideoX):
        narrow = (
            {"base_dim": 4} if cls is AutoencoderKLWan else {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 2}
        )
        frames, latents = counts[cls.__name__]
        decoder = decoder_for(cls(**{"num_res_blocks": 1} | narrow if cls is AutoencoderKLWan else narrow))
        assert [group.frame_count for group in decoder.frame_groups(latents)] == frames
    assert {"wan2.1", "wan2.2", "qwen-image", "cogvideox"} == set(ARCHITECTURES)


def test_the_diagram_can_be_drawn(tmp_path, monkeypatch):
    draw = script("draw_concepts")
    monkeypatch.setattr(draw, "PATH", tmp_path / "concepts.png")
    draw.main()
    assert (tmp_path / "concepts.png").stat().st_size > 10_000
    assert (DOCS / "concepts.png").stat().st_size > 10_000
