"""The docs agree with the code: the API reference, the outputs of commands, the numbers of the FAQ, the diagram."""

import json
import re
import runpy
from pathlib import Path

import pytest

from chopgrad.__main__ import _parser
from report.docs import diagram, outputs, reference

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted(DOCS.glob("*.md"))


def test_the_reference_is_up_to_date(tmp_path, monkeypatch):
    reference.main(reference.Config(check=True))
    (tmp_path / "api.md").write_text(reference.page().replace("distance", "length", 1))
    monkeypatch.setattr(reference, "PAGE", tmp_path / "api.md")
    with pytest.raises(ValueError, match=r"differs from the docstrings: run python -m report.docs.reference"):
        reference.main(reference.Config(check=True))
    reference.main(reference.Config())
    reference.main(reference.Config(check=True))


def test_the_reference_has_every_public_name():
    import chopgrad

    text = (DOCS / "api.md").read_text()
    public = [name for name in chopgrad.__all__ if callable(getattr(chopgrad, name))]
    assert "frame_loss" in public
    assert [name for name in public if f"\n### {name}\n" not in text] == []


def test_a_docstring_becomes_markdown():
    doc = "A ``thing``.\n\nArgs:\n    a: first,\n        and more.\n    b, c: rest.\n\nCost: none.\n\nReturns:\n    It."
    assert reference.markdown(doc) == [
        "A `thing`.", "", "**Args**:", "", "- `a`: first,", "  and more.", "- `b, c`: rest.", "", "**Cost**: none.", "",
        "**Returns**:", "It.",
    ]  # fmt: skip


def commands():
    return [match["command"] for page in PAGES for match in outputs.BLOCK.finditer(page.read_text())]


def test_outputs_are_filled_in_and_nothing_else_changes():
    filled = outputs.filled
    text = "a\n<!-- output: chopgrad x -->\n\n```text\n```\n\nb\n\n<!-- output: python y -->\n\n```text\nold\n```\nc\n"
    text += "```\nd\n```\n"
    expected = text.replace("```text\n```", "```text\nnew x\n```").replace("old", "new y")
    assert filled(text, lambda command: f"new {command[-1]}") == expected
    assert filled(expected, lambda command: "newer", only="chopgrad x") == expected.replace("new x", "newer")
    with pytest.raises(ValueError, match="must begin with chopgrad or python"):
        outputs.run("rm -r docs")


def test_no_output_is_left_empty():
    found = [match["output"] for page in PAGES for match in outputs.BLOCK.finditer(page.read_text())]
    marked = sum(page.read_text().count("<!-- output: ") for page in PAGES)
    assert len(found) == marked > 3
    assert all(found)


def test_the_output_of_the_conformance_kit(monkeypatch, capsys):
    """Run here: another process would import torch and diffusers again."""

    def run(command):
        _, script = command.split()
        runpy.run_path(str(ROOT / script), run_name="__main__")
        return capsys.readouterr().out.rstrip()

    monkeypatch.setattr(outputs, "run", run)
    outputs.main(outputs.Config(check=True, only="examples/check_a_decoder.py"))


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands() if "check_a_decoder" not in c])
def test_other_outputs(command):
    outputs.main(outputs.Config(check=True, only=command))


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


def test_the_predictions_of_the_readme_are_those_of_the_planner():
    def rows(page):
        lines = [line.strip("| ").split("|") for line in page.read_text().splitlines() if line.startswith("| ")]
        return [[cell.strip() for cell in line] for line in lines]

    planned = {}
    for name, device, host, time, gradient, *_ in (row for row in rows(DOCS / "planner.md") if len(row) in (5, 6)):
        told = "exact" if gradient == "exact" else "truncated"
        planned.setdefault(name, (told, device, "" if host == "0.0" else host, time))  # 81 frames: first
    shown = {}
    for name, gradient, *numbers in (row for row in rows(README) if len(row) == 5 and row[0].startswith("`")):
        strategy, *inside = re.findall("`([^`]+)`", name)
        words = [strategy.replace("=True", "").replace("distance=", ""), *(x.split('"')[1] for x in inside)]
        shown[" + ".join(words)] = (gradient, *numbers)
    assert len(shown) == 4
    assert shown == {name: planned[name] for name in shown}


def metrics(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text())["metrics"]


def test_the_numbers_of_the_readme_are_those_of_the_findings():
    """Its five findings say no number that the page of findings, whose numbers come from records, does not."""
    held = README.read_text().split("## What held, and what did not")[1].split("\n## ")[0]
    number = re.compile(r"(?<![\w.])\d+(?:\.\d+)?")
    told = set(number.findall(re.sub(r"\]\([^)]*\)|D = \d", "", held)))
    assert len(told) >= 8
    assert told - set(number.findall((DOCS / "findings.md").read_text())) == set()


def test_the_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 120
    prose = [line for line in lines if not line.startswith(("|", "![", "    "))]
    assert max(map(len, prose)) <= 120


def test_the_findings_say_what_the_records_say():
    """README and findings; but for the end tasks, whose sentences are many numbers of many records."""
    text = " ".join((DOCS / "findings.md").read_text().split())
    bias = {
        (vae, row["loss"], row["block"]): row
        for vae in ("wan2.1", "cogvideox")
        for row in metrics(f"gradient_bias/{vae}")["summary"]
        if row["distance"] == 1
    }
    wan, other = (
        [f"{bias[v, x, 1]['relative_error'][0]:.2f}" for x in ("mse", "l1", "lpips")] for v in ("wan2.1", "cogvideox")
    )
    assert f"{wan[0]} (MSE), {wan[1]} (L1), {wan[2]} (LPIPS) for tiny-wan2.1" in text
    assert f"{', '.join(other)} for tiny-cogvideox" in text
    assert f"relative error {bias['wan2.1', 'mse', 4]['relative_error'][0]:.2f} instead of {wan[0]}" in text

    rules = [metrics(f"theory/error_bound-{vae}")["summary_of_bounds"] for vae in ("wan2.1", "cogvideox")]
    safe = [f"{100 * r['rules']['paper, loss as a sum']['share_safe'][0]:.0f} %" for r in rules]
    assert f"was enough in {' and '.join(safe)} of cases" in text
    assert all(r["rules"]["corrected"]["share_safe"][0] == 1 for r in rules)
    assert all(r["rules"]["paper, loss as a mean"]["share_whole_video"][0] == 1 for r in rules)
    wan, other = (f"{100 * r['rules']['corrected']['share_whole_video'][0]:.0f}" for r in rules)
    assert f"no truncation at all in {wan} and {other} % of them" in text
    wan, other = (f"{100 * r['rules']['measured elsewhere']['share_whole_video'][0]:.0f}" for r in rules)
    assert f"still asks for none in {wan} and {other} %" in text
    tail = [r["bounds"]["geometric_tail"] for r in rules]
    assert all(r["share_held"] == 1 for r in tail)
    factors = [f"{r['bound_over_error_geometric_mean'][0]:.0f}" for r in tail]
    assert f"the tail is {' and '.join(factors)} times the error" in text

    kinds = [metrics(f"theory/residuals-{vae}")["summary"] for vae in ("wan2.1", "cogvideox")]
    for kind, told in (
        ("film", "against the film"), ("blurred, film", "for a restoration"), ("random", "with a random adjoint"),
        ("noisy, own", "against the decoder's own frames"),
    ):  # fmt: skip
        of_kind = [k[kind]["errors"]["adjoint" if kind == "random" else "mse"][1] for k in kinds]
        assert f"{' and '.join(format(r['relative_error'][0], '.2f') for r in of_kind)} {told}" in text
        if kind in ("film", "noisy, own"):
            assert f"{' and '.join(format(r['cosine'][0], '.2f') for r in of_kind)} {told}" in text

    cases = [metrics(f"theory/{p.stem}") for p in (ROOT / "results" / "theory").glob("backbone_gradient-*.json")]
    one = [next(r for r in case["rows"] if (r["block"], r["distance"]) == (1, 1)) for case in cases]
    removed = [100 * r["removed_by_one_scale"][0] for r in one]
    assert f"rescaling removes {min(removed):.0f} to {max(removed):.0f} % of the squared error" in text
    held_out = metrics("theory/backbone_gradient-held-out-mse")
    r = next(r for r in held_out["rows"] if (r["block"], r["distance"]) == (1, 1))
    pairs = [(f"{r[f'adam_own_{name}'][0]:.2f}", f"{r[name][0]:.2f}") for name in ("normalised_mae", "cosine")]
    told = "normalised MAE {} of the update, {} of the gradient; cosine {} and {}".format(*pairs[0], *pairs[1])
    mae = sorted(r["normalised_mae"][0] for r in one)[1:]
    told += f"; in three harder cases the gradient's normalised MAE is {mae[0]:.2f} to {mae[-1]:.2f}"
    assert told in text
    growth = [held_out["by_clips"][k]["1/1"]["relative_error"] for k in (0, -1)]
    assert "({:.2f} for one held-out clip, {:.2f} for 32)".format(*growth) in text
    shares = {
        vae: f"{100 * metrics(f'theory/temporal_locality-{vae}')['fits']['share_beyond']['1'][0]:.0f} %"
        for vae in ("wan2.1-untrained", "wan2.1", "cogvideox-untrained", "cogvideox")
    }
    told = "Wan's decoder {} lies beyond D = 1 with random weights and {} after training, in CogVideoX's {} and {}."
    assert told.format(*shares.values()) in text
    reach = {r["decoder"]: r["receptive_field_groups"] for r in metrics("theory/receptive_field")["decoders"]}
    embedded, published = (
        [reach[f"{vae}, {which}"] for vae in ("wan2.1", "cogvideox")]
        for which in ("embedded, trained", "published blocks, random weights")
    )
    assert "look back {} and {} groups".format(*embedded) in text
    assert f"({published[0]} with both published architectures)" in text
    assert published[0] == published[1]
    rows = metrics("theory/estimators-sampled")["rows"]
    (sampled,) = (r["variance_times_time"] for r in rows if (r["strategy"], r["count"]) == ("Chop(1)", 2))
    assert "variance times time is {:.2f} [{:.2f}, {:.2f}]".format(*sampled) in text


def test_the_findings_say_what_exact_gradients_cost():
    """The opening table of the benchmark's page: time of the exact gradient and of ``Chop(1)``, both decoders."""
    lines = (ROOT / "results" / "bench-cpu.md").read_text().splitlines()
    rows = {
        line.split("|")[1].strip(): line for line in lines[: lines.index("![Curves](bench-cpu.png)")] if "|" in line
    }
    exact, paper = (
        sorted(float(x) for x in re.findall(r"(\d\.\d+) \[", rows[name]))
        for name in ("Exact(offload=False)", "Chop(1) (the paper's)")
    )
    text = " ".join((DOCS / "findings.md").read_text().split())
    assert (
        f"`Exact(offload=False)` took {exact[0]:.1f} to {exact[1]:.1f} times the time of full back-propagation" in text
    )
    assert f"{paper[0]:.1f}" == f"{paper[1]:.1f}"
    assert f"the paper's D = 1 {paper[0]:.1f} times" in text


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
    monkeypatch.setattr(diagram, "PATH", tmp_path / "concepts.png")
    diagram.main(diagram.Config())
    assert (tmp_path / "concepts.png").stat().st_size > 10_000
    assert (DOCS / "concepts.png").stat().st_size > 10_000
