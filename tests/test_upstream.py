"""Defects of diffusers that docs/upstream.md lists: each script of tests/upstream raises as long as it is so."""

import ast
import inspect
import re
import runpy
from pathlib import Path

import diffusers
import pytest
import torch
from torch.utils.checkpoint import CheckpointError

from tests.models import build

ROOT = Path(__file__).parents[1]
SCRIPTS = {path.stem: path for path in (ROOT / "tests/upstream").glob("*.py")}
PAGE = (ROOT / "docs/upstream.md").read_text()

RAISES = {
    "allegro_batch": RuntimeError,
    "ltx2_narrow_tile": RuntimeError,
    "ltx2_sliced_timesteps": ValueError,
    "ltx_sliced_timesteps": ValueError,
    "magvit_checkpointing": CheckpointError,
    "magvit_sliced_batch": RuntimeError,
    "minimax_image": (RuntimeError, ValueError),  # torch.cat of nothing: PyTorch 2.6 and later ones
    "mochi_framewise": RuntimeError,
    "vidtok_indices_bfloat16": RuntimeError,
}
"""What is no wrong value in silence, which the script's own assertion finds."""


def expected(name):
    reason = (
        "a defect of diffusers; where it passes it is mended upstream: take it off docs/upstream.md, and look whether "
        "our adapter must follow"
    )
    return pytest.mark.xfail(raises=RAISES.get(name, AssertionError), strict=True, reason=reason)


def classes(path):
    """What a script imports from diffusers."""
    tree = ast.walk(ast.parse(path.read_text()))
    found = [node for node in tree if isinstance(node, ast.ImportFrom) and node.module == "diffusers"]
    return [alias.name for node in found for alias in node.names]


@pytest.mark.parametrize("name", [pytest.param(name, marks=expected(name)) for name in sorted(SCRIPTS)])
def test_it_is_still_so(name):
    (cls,) = classes(SCRIPTS[name])
    if not hasattr(diffusers, cls):
        pytest.skip(f"diffusers {diffusers.__version__} has no {cls}")
    with torch.random.fork_rng():
        runpy.run_path(str(SCRIPTS[name]), run_name="__main__")


def test_every_script_is_on_the_page_and_none_besides():
    assert len(SCRIPTS) > 20
    assert sorted(re.findall(r"\(\.\./tests/upstream/(\w+)\.py\)", PAGE)) == sorted(SCRIPTS)
    assert set(RAISES) <= set(SCRIPTS)


@pytest.mark.parametrize("path", SCRIPTS.values(), ids=SCRIPTS)
def test_a_script_stands_alone_and_is_short(path):
    source = path.read_text()
    tree = ast.parse(source)
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported == {"torch", "diffusers"}
    assert classes(path)[0] in ast.get_docstring(tree)
    assert "\nRight: " in ast.get_docstring(tree)
    assert isinstance(tree.body[-1], ast.Assert)
    assert len(source.splitlines()) <= 25


def test_the_page_names_the_version_that_is_pinned():
    (pinned,) = re.findall(r"^diffusers==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f"diffusers {pinned}" in PAGE


@pytest.mark.parametrize("name", ["wan2.1", "qwen"])
def test_wan_and_qwen_image_have_no_checkpointing(name):
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        build(name, torch.float32).enable_gradient_checkpointing()


@pytest.mark.parametrize("name", ["AutoencoderKLCosmos", "AutoencoderKLKVAEVideo"])
def test_tiling_is_a_flag_that_nothing_reads(name):
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    source = Path(inspect.getsourcefile(getattr(diffusers, name))).read_text()
    flags = ("use_tiling", "use_framewise_decoding")
    found = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute) and n.attr in flags]
    assert found
    assert all(isinstance(node.ctx, ast.Store) for node in found)
