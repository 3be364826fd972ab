"""``Exact()``: in any form the gradient is exact; the chosen one fits, and nothing faster would have."""

import logging
import warnings
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan

import chopgrad
from chopgrad import Chop, Exact, Full, Sampled, automatic, engine
from chopgrad.automatic import Choice, Form
from chopgrad.memory import PeakMemory
from chopgrad.pieces.plain import predicted_under
from chopgrad.strategies import RECOMMENDED, Plan
from tests.brute_force import relative_error
from tests.models import QWEN_SLOWLY, build

MIB = 2**20


def made(name="wan2.1", count=5):
    decoder = chopgrad.decoder_for(build(name).requires_grad_(True))
    generator = torch.Generator().manual_seed(1)
    z = torch.randn((1, decoder.latent_channels, count, 4, 4), generator=generator, dtype=torch.float64)
    return decoder, z.requires_grad_()


def gradient(decoder, z, strategy, whole=False):
    target = torch.zeros((1, 3, decoder.frame_count(z.shape[2]), 1, 1), dtype=z.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if whole:
            loss = chopgrad.decode(decoder, z, strategy).square().mean()
        else:
            loss = chopgrad.frame_loss(decoder, z, target, lambda x, y: (x - y).square().mean(), strategy)
    return torch.autograd.grad(loss, [z, *decoder.parameters()])


def same(found, expected):
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-11


def test_it_is_what_is_done_where_nothing_is_said():
    assert Exact() == RECOMMENDED
    assert Exact().is_automatic
    assert Exact(within="20GiB").within_bytes == 20 * 2**30
    assert Exact(within=5).within_bytes == 5


@pytest.mark.parametrize("form", ["offload", "pieces", "every", "strips"])
def test_a_setting_is_obeyed(form):
    settings = {"pieces": True} if form == "strips" else {}
    assert not Exact(**settings, **{form: 2 if form in ("every", "strips") else True}).is_automatic
    with pytest.raises(ValueError, match="within chooses"):
        Exact(within=100, offload=True)


@pytest.mark.parametrize("within", ["20 apples", "", 0, -1, True, 2.5, "0GiB"])
def test_bad_budgets(within):
    with pytest.raises((TypeError, ValueError), match="within"):
        Exact(within=within)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", QWEN_SLOWLY)
def test_every_form_is_exact(name, whole, monkeypatch):
    decoder, z = made(name)
    expected = gradient(decoder, z, Full(), whole)
    forms = list(automatic._forms(decoder, len(decoder.frame_groups(z.shape[2])), moves=True))
    some = [*forms[:: max(1, len(forms) // 4)], forms[-1]]
    for form in some:
        assert same(gradient(decoder, z, form, whole), expected), str(form)


def test_small_videos_keep_their_graphs():
    """Nothing is asked where anything would fit."""
    decoder, z = made()
    assert same(gradient(decoder, z, Exact()), gradient(decoder, z, Full()))
    (choice,) = decoder.chosen.values()
    assert choice.form.plan().graphs == 5


def test_without_a_gradient_nothing_is_kept():
    decoder, z = made()
    with torch.no_grad():
        chopgrad.decode(decoder, z)
    assert next(iter(decoder.chosen.values())).form.plan().pieces


def test_what_was_chosen_is_kept_by_shape(monkeypatch):
    decoder, z = made()
    asked = []
    own = automatic.choose
    monkeypatch.setattr(automatic, "choose", lambda *args: asked.append(1) or own(*args))
    for _ in range(2):
        gradient(decoder, z, Exact())
    assert len(asked) == 1
    gradient(decoder, z.detach()[:, :, :3].requires_grad_(), Exact())
    gradient(decoder, z, Exact(), whole=True)
    gradient(decoder, z, Exact(within="3GiB"))
    assert len(asked) == 4
    other = chopgrad.decoder_for(decoder.vae)
    gradient(other, z, Exact())
    assert len(asked) == 5


@pytest.fixture(scope="module")
def video():
    """Of the embedded architecture's kind, where sizes tell."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, z_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1).requires_grad_(False)
    decoder = chopgrad.decoder_for(vae)
    return decoder, torch.randn(1, 8, 5, 10, 6)


def measured(decoder, z, strategy, whole):
    z = z.clone().requires_grad_()
    with PeakMemory("cpu") as memory:
        if whole:
            loss = chopgrad.decode(decoder, z, strategy).square().mean()
        else:
            loss = chopgrad.frame_loss(decoder, z, None, lambda x, _: x.square().mean(), strategy)
        torch.autograd.grad(loss, z)
    return memory.peak_bytes


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_fits_and_nothing_faster_would_have(video, whole, monkeypatch):
    """Planted budgets, from what full back-propagation takes down to little more than the least."""
    monkeypatch.setattr(automatic, "STRIPS", (2, 4, 8))
    decoder, z = video
    groups = decoder.frame_groups(z.shape[2])
    z.requires_grad_()
    price = automatic._prices(decoder, z, groups, not whole)
    forms = automatic._forms(decoder, len(groups), moves=False)
    costs = sorted((price(form, True) for form in forms), key=lambda c: (c.seconds, c.device_bytes))
    least, most = (f(c.device_bytes for c in costs) for f in (min, max))
    taken = set()
    for share in (0.0, 0.3, 1.0) if whole else (0.0, 0.1, 0.6):
        budget = int(1.1 * least + share * (1.05 * most - 1.1 * least))
        peak = measured(decoder, z, Exact(within=budget), whole)
        assert peak <= budget
        form = list(decoder.chosen.values())[-1].form
        taken.add(str(form))
        faster = [c for c in costs if c.seconds < next(x for x in costs if x.form.settings == form.settings).seconds]
        if faster:
            best = min(faster, key=lambda c: c.device_bytes)
            assert measured(decoder, z, best.form, whole) > 0.8 * budget
    assert len(taken) == 3


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("strategy", "whole"),
    [
        (Exact(pieces=True, strips="auto"), False),
        slow(Chop(1, block=2, recompute=True, pieces=True, strips="auto"), True),
    ],
)
def test_the_fewest_strips_that_fit(video, strategy, whole, monkeypatch):
    """Planted memory; the number is the planner's, and the gradient that of the strategy without strips."""
    monkeypatch.setattr(automatic, "STRIPS", (2, 4, 8))
    decoder, z = video
    groups = decoder.frame_groups(z.shape[2])
    z.requires_grad_()
    forms = automatic._in_strips(strategy)
    price = automatic._prices(decoder, z, groups, not whole)
    costs = [price(form, True) for form in forms]
    assert [c.seconds for c in costs] == sorted(c.seconds for c in costs)
    for index in (0, 2):
        budget = costs[index].device_bytes + 1
        expected = next(c.form.settings.strips for c in costs if c.device_bytes <= budget)
        monkeypatch.setattr(automatic, "_budget", lambda *args, b=budget: automatic._Budget(b, 2**62))
        decoder.chosen.clear()
        assert measured(decoder, z, strategy, whole) <= 1.01 * budget
        assert [choice.form.settings.strips for choice in decoder.chosen.values()] == [expected]
    small, z = made()
    assert same(gradient(small, z, strategy, whole), gradient(small, z, replace(strategy, strips=None), whole))


def test_strips_within_a_budget(video, monkeypatch):
    monkeypatch.setattr(automatic, "STRIPS", (2, 4, 8))
    decoder, z = video
    decoder.chosen.clear()
    peak = measured(decoder, z, Exact(pieces=True, strips=4), False)
    assert measured(decoder, z, Exact(pieces=True, strips="auto", within=peak), False) <= peak
    with pytest.raises(ValueError, match="need pieces=True"):
        Exact(strips="auto")
    with pytest.raises(TypeError, match="strips must be an int"):
        Exact(pieces=True, strips="many")
    with pytest.raises(ValueError, match="needs a number of strips"):
        Chop(1, recompute=True, pieces=True, strips="auto", space=1)


def test_where_nothing_fits_it_says_so(video, caplog):
    decoder, z = made()
    with caplog.at_level(logging.INFO, "chopgrad"):
        gradient(decoder, z, Exact(within=1000))
    assert "nothing fits" in caplog.text
    assert "predicted to take" in caplog.text


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("on_the_way_back", [False, True])
def test_out_of_memory_goes_one_step_down(whole, on_the_way_back, monkeypatch, caplog):
    decoder, z = made()
    expected = gradient(decoder, z, Full(), whole)
    first, second = (Form(settings=s) for s in (Plan(None, 0, True, False), Plan(None, 0, True, False, pieces=True)))
    monkeypatch.setattr(automatic, "choose", lambda *args: Choice((first, second), 0, 0))
    own = engine.Sweep._reverse if on_the_way_back else engine.Sweep._advance

    def failing(self, *args, **kwargs):
        if not self.plan.pieces:
            raise torch.OutOfMemoryError("planted")
        return own(self, *args, **kwargs)

    monkeypatch.setattr(engine.Sweep, own.__name__, failing)
    with caplog.at_level(logging.WARNING, "chopgrad"):
        assert same(gradient(decoder, z, Exact(), whole), expected)
        assert same(gradient(decoder, z, Exact(), whole), expected)  # and it stays there
    assert caplog.text.count("out of memory") == 1
    (choice,) = decoder.chosen.values()
    assert choice.form.settings == second.settings


def planted(monkeypatch, where, call):
    """Out of memory at that call of a sweep's method, but by pieces."""
    own, calls = getattr(engine.Sweep, where), []

    def failing(self, *args, **kwargs):
        if not self.plan.pieces:
            calls.append(1)
            if len(calls) == call:
                raise torch.OutOfMemoryError("planted")
        return own(self, *args, **kwargs)

    monkeypatch.setattr(engine.Sweep, where, failing)
    forms = [Form(settings=Plan(None, 0, True, False)), Form(settings=Plan(None, 0, True, False, pieces=True))]
    monkeypatch.setattr(automatic, "choose", lambda *args: Choice(tuple(forms), 0, 0))


@pytest.mark.parametrize(("where", "call"), [("_advance", 3), ("_reverse", 1)])
def test_no_loss_is_called_twice(where, call, monkeypatch):
    """Its draws, its buffers and a target that is read once are those of a run that had the memory."""

    def run():
        torch.manual_seed(3)
        decoder, z = made()
        norm, seen = torch.nn.BatchNorm3d(3).double(), []
        targets = iter([torch.full((1, 3, n, 1, 1), float(n), dtype=z.dtype) for n in (1, 2, 2, 2, 2)])

        def loss_fn(frames, target):
            seen.append(frames.shape[2])
            return (norm(frames) + torch.randn_like(frames) - target).pow(3).mean()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = chopgrad.frame_loss(decoder, z, lambda frames: next(targets), loss_fn, Exact())
        sources = [z, *decoder.parameters(), *norm.parameters()]
        return [loss, *torch.autograd.grad(loss, sources), norm.running_mean, torch.rand(1)], seen

    expected, once = run()
    planted(monkeypatch, where, call)
    found, seen = run()
    assert seen == once == [1, 2, 2, 2, 2]
    assert same(found, expected)


def test_a_loss_that_runs_out_of_memory_is_not_called_again(monkeypatch):
    planted(monkeypatch, "_advance", 1000)
    decoder, z = made()
    target = torch.zeros((1, 3, 9, 1, 1), dtype=z.dtype)

    def loss_fn(frames, target):
        raise torch.OutOfMemoryError("of the loss")

    with pytest.raises(torch.OutOfMemoryError, match="of the loss") as raised:
        chopgrad.frame_loss(decoder, z.detach(), target, loss_fn, Exact())
    assert "The next call will be with pieces" in "".join(raised.value.__notes__)
    (choice,) = decoder.chosen.values()
    assert choice.form.settings.pieces


def test_out_of_memory_at_the_end_of_the_ladder(monkeypatch):
    decoder, z = made()
    only = Form(settings=Plan(None, 0, True, False))
    monkeypatch.setattr(automatic, "choose", lambda *args: Choice((only,), 0, 0))

    def failing(self, *args, **kwargs):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(engine.Sweep, "_reverse", failing)
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        gradient(decoder, z, Exact())


class Trainer:
    """Holds a model, which hooks reach."""

    def __init__(self):
        self.model = torch.nn.Linear(2, 2)
        self.kinds = []

    def __deepcopy__(self, memo):
        raise AssertionError("copied")

    def hook(self, module, args, y=None):
        self.kinds.append(args[0].device.type)


def test_what_is_around_modules_is_neither_copied_nor_called(monkeypatch):
    """When memory is predicted. What a module does with it is as large, because it is called as it is."""
    hooks = pytest.importorskip("accelerate.hooks")
    monkeypatch.setattr(automatic, "SMALL", 2**60)
    decoder, z = made()
    trainer, waiting = Trainer(), torch.nn.Linear(2, 2)
    hooks.add_hook_to_module(waiting, hooks.CpuOffload("cpu"), append=True)
    waiting.__dict__["trainer"] = trainer
    before = hooks.CpuOffload("cpu", prev_module_hook=hooks.UserCpuOffloadHook(waiting, waiting._hf_hook))
    hooks.add_hook_to_module(decoder.vae.decoder.conv_out, before, append=True)
    decoder.vae.decoder.conv_in.register_forward_hook(trainer.hook)
    decoder = chopgrad.decoder_for(decoder.vae, check=False)
    trainer.kinds.clear()
    price = automatic._prices(decoder, z, decoder.frame_groups(5), True)
    assert price(Form(settings=Plan(None, 0, True, False, pieces=True)), True).device_bytes > 0
    assert not trainer.kinds
    assert same(gradient(decoder, z, Exact(within="1GiB")), gradient(decoder, z, Full()))
    assert set(trainer.kinds) == {"cpu"}


def test_what_a_choice_depends_on(monkeypatch):
    decoder, z = made("cogvideox", 6)

    def count():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chopgrad.decode(decoder, z, Exact(within="1GiB"))
        return len(decoder.chosen)

    assert count() == 1
    chopgrad.decode(decoder, z, Exact(within="1GiB"), groups=slice(0, 1))
    assert count() == 2
    norm = next(m for m in decoder.vae.decoder.modules() if isinstance(m, torch.nn.GroupNorm))
    handle = norm.register_forward_hook(lambda *args: None)
    assert count() == 3
    handle.remove()
    parameters = [p for p in decoder.parameters() if p.shape == norm.weight.shape]
    parameters[0].requires_grad_(False)
    assert count() == 4
    parameters[0].requires_grad_(True), parameters[1].requires_grad_(False)
    assert count() == 5
    decoder, z = chopgrad.decoder_for(build("cogvideox").float()), z.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        count()
    assert count() == 2


def test_autocast_is_predicted():
    """Under which the group norms are called as they are."""
    decoder, z = made("cogvideox", 6)
    prices = automatic._prices(decoder, z, decoder.frame_groups(6), True)
    form = Form(settings=Plan(None, 0, True, False))
    with predicted_under(autocast=True):
        within = automatic._prices(decoder, z, decoder.frame_groups(6), True)(form, True)
    assert within.device_bytes > 1.2 * prices(form, True).device_bytes


@pytest.mark.parametrize("told", ["", "x", "0", "2"])
def test_processes_beside_this_one(told, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", told)
    _, z = made()
    assert automatic._budget(Exact(), z, True).device_bytes > 0


def test_nobody_knows_what_is_free_on_meta():
    decoder, z = made()
    for strategy in (Exact(), Exact(pieces=True, strips="auto")):
        choice = automatic.choose(strategy, decoder, z.to("meta"), decoder.frame_groups(5), True)
        assert not choice.form.settings.offload
        assert choice.form.settings.strips == (64 if strategy.strips else None)


def test_a_model_that_cannot_be_followed_takes_least(monkeypatch, caplog):
    decoder, z = made()
    monkeypatch.setattr(automatic, "SMALL", 2**60)
    monkeypatch.setattr(automatic, "_prices", lambda *args: (_ for _ in ()).throw(RuntimeError("no copy")))
    with caplog.at_level(logging.WARNING, "chopgrad"):
        assert same(gradient(decoder, z, Exact()), gradient(decoder, z, Full()))
    assert "could not be predicted" in caplog.text


def test_drawn_losses_take_a_form_too():
    decoder, z = made()
    torch.manual_seed(0)
    found = gradient(decoder, z, Sampled(2, Exact()))
    torch.manual_seed(0)
    assert same(found, gradient(decoder, z, Sampled(2, Full())))


def test_it_is_refused_where_a_form_must_be_named():
    for strategy in (Exact(), Chop(1, recompute=True, pieces=True, strips="auto")):
        with pytest.raises(ValueError, match="depends on the memory"):
            chopgrad.planner.plan("wan2.1", 5, 64, 64, strategies=[strategy])
