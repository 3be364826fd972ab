"""What ``chopgrad plan`` prints, what it says where nothing fits, and what it imports before it must."""

import json
import pickle
import subprocess
import sys

import pytest

import chopgrad
from chopgrad.__main__ import main
from chopgrad.planner import Prediction, frontier
from chopgrad.planner.architectures import config_of
from chopgrad.strategies import Chop, Exact, Full
from tests.models import VAES


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    VAES["wan2.1"]().save_config(folder)
    return ["plan", "--vae", str(folder), "--frames", "33", "--size", "64x64"]


def table(text):
    rows = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in row] for row in rows]


def test_the_table_is_a_frontier(arguments, capsys):
    assert main([*arguments, "--budget", "1GiB"]) == 0
    text = capsys.readouterr().out
    rows = table(text)
    assert 5 <= len(rows) <= 8
    assert max(map(len, text.splitlines()[1:])) <= 100  # the first has a folder in it
    assert all(row[-1] == "yes" for row in rows)
    *_, peak, empty, first, second = text.splitlines()
    assert not empty
    assert peak.startswith("Its peak on the device is in ")
    scope = {"chopgrad": chopgrad, "vae": VAES["wan2.1"]()}
    exec(f"{first}\n{second}", scope)
    assert isinstance(scope["decoder"], chopgrad.CausalDecoder)
    assert isinstance(scope["strategy"], Full | Exact | Chop)
    assert main([*arguments, "--budget", "1GiB", "--all"]) == 0
    assert len(table(capsys.readouterr().out)) == 17


def test_json_has_every_row_and_fields(arguments, capsys):
    assert main([*arguments, "--json", "--budget", "1GiB", "--host-budget", "1GiB", "--rates", "100,1000,20"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["predictions"]) == 17
    assert 5 <= sum(row["frontier"] for row in found["predictions"]) <= 8
    assert {row["fits"] for row in found["predictions"]} == {True}
    assert all(
        row["relative_seconds"] > 0 and row["moment"] and len(row["python"]) == 2 for row in found["predictions"]
    )
    assert found["would_fit"] == []
    assert found["python"][1].startswith("strategy = chopgrad.")


def test_more_strips_are_looked_for(arguments, capsys):
    """Than the table has, before anything is said not to fit."""
    taller = [*arguments[:-1], "512x32", "--checkpoint", "none", "--json"]
    assert main(taller) == 0
    least = min(row["device_bytes"] for row in json.loads(capsys.readouterr().out)["predictions"])
    assert main([*taller, "--budget", f"{least / 2**20:.2f}MiB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "strips=32" in found["recommended"]
    assert "strips=32" in found["python"][1]
    assert found["would_fit"] == []


def test_it_says_what_would_fit(arguments, capsys):
    settings = [*arguments, "--dtype", "float32", "--checkpoint", "none"]
    assert main([*settings, "--json"]) == 0
    needs = [row["device_bytes"] for row in json.loads(capsys.readouterr().out)["predictions"]]
    budget = f"{0.6 * min(needs) / 2**20:.2f}MiB"
    assert main([*settings, "--json", "--budget", budget]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recommended"] is None
    changes = {row["change"].split()[0]: row for row in found["would_fit"]}
    assert {"--checkpoint", "--frames", "--size"} & set(changes) >= {"--size"}
    for row in found["would_fit"]:
        assert row["device_bytes"] <= 0.95 * 0.6 * min(needs) + 2**13
    assert main([*settings[:-4], *changes["--size"]["change"].split(), "--budget", budget, "--dtype", "float32"]) == 0
    text = capsys.readouterr().out
    assert f"For {budget}: " in text  # what it said does fit
    assert main([*settings, "--budget", "1KiB"]) == 0
    assert "Nor does it with fewer frames, a quarter of the size or another dtype." in capsys.readouterr().out


def test_the_frontier_drops_what_another_is_better_than():
    def row(device, host, time, distance=None):
        return Prediction(Full(), device << 30, host << 30, 1.0, distance, None, time)

    best = [row(100, 0, 1.0), row(50, 0, 1.3), row(10, 50, 1.6), row(40, 0, 1.2, 0), row(5, 60, 1.9)]
    worse = [row(101, 0, 1.1), row(10, 51, 1.6), row(41, 0, 1.2, 0)]
    assert frontier([*best, *worse]) == best
    assert len(frontier(best[:2] + worse)) == 5  # fewer are filled up
    assert len(frontier([row(100 - 5 * k, 3 * k, 1 + k / 10) for k in range(15)])) == 8


LIGHT = """
import contextlib, sys
from chopgrad.__main__ import main
with contextlib.suppress(SystemExit):
    main(sys.argv[1:])
import chopgrad
assert chopgrad.__version__ and "decode" in dir(chopgrad)
assert not {"torch", "diffusers"} & set(sys.modules), "imported"
"""


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["plan", "--help"], ["audit", "--help"], ["plan", "--vae", "wan2.1"], ["nothing"],
     ["plan", "--vae", "nowhere", "--frames", "9", "--size", "8x8"],
     ["plan", "--vae", "wan2.1", "--frames", "9", "--size", "big"],
     ["plan", "--vae", "wan2.1", "--frames", "9", "--size", "8x8", "--rates", "1"]],
)  # fmt: skip
def test_a_wrong_argument_does_not_wait_for_torch(words):
    done = subprocess.run([sys.executable, "-c", LIGHT, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout or done.stderr


LAZY = """
import chopgrad.decode
import chopgrad.patch
from chopgrad import decode, patch, encode
import chopgrad.encode
assert all(callable(x) for x in (decode, patch, encode, chopgrad.decode, chopgrad.patch, chopgrad.encode))
assert sys.modules["chopgrad.decode"].decode is decode
from chopgrad import *
assert frame_loss is chopgrad.frame_loss
"""


def test_names_are_those_of_functions_whatever_is_imported_first():
    done = subprocess.run([sys.executable, "-c", "import sys\n" + LAZY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(chopgrad.__all__) <= set(dir(chopgrad))
    assert pickle.loads(pickle.dumps(chopgrad.Exact(offload=True))) == chopgrad.Exact(offload=True)
    with pytest.raises(AttributeError, match="module 'chopgrad' has no attribute 'nothing'"):
        chopgrad.nothing  # noqa: B018


def test_the_hub_is_asked_once(monkeypatch):
    import huggingface_hub

    asked = []

    def look(request, timeout):
        asked.append(request.full_url)
        raise OSError("no way")

    monkeypatch.setattr("urllib.request.urlopen", look)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **settings: asked.append("again"))
    with pytest.raises(ValueError, match="No config was found for 'nobody/nothing'"):
        config_of("nobody/nothing", None)
    assert len(asked) == 1
    with pytest.raises(ValueError, match="No config was found for 'nothing'"):
        config_of("nothing", None)
    assert len(asked) == 1  # not a hub id
