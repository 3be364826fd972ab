"""The gentle task: what each part of its degradation does, and where its clips come from."""

import dataclasses

import pytest
import torch

from bench.tasks.deblurring import Deblurring, degrade
from suite.clips import HELD_OUT_CLIPS, packaged_clip

NONE = Deblurring(blur=0, shrink=1, noise=0)


def generator():
    return torch.Generator().manual_seed(0)


def test_every_part_of_the_degradation_degrades():
    video = torch.rand(3, 4, 16, 16, generator=generator()) * 2 - 1
    assert torch.equal(degrade(video, NONE, generator()), video)
    blurred = degrade(video, dataclasses.replace(NONE, blur=1.0), generator())
    shrunk = degrade(video, dataclasses.replace(NONE, shrink=4), generator())
    noisy = degrade(video * 0.3, dataclasses.replace(NONE, noise=0.1), generator())
    for smooth in (blurred, shrunk):
        assert smooth.shape == video.shape
        for axis in (-1, -2):
            assert smooth.diff(dim=axis).square().mean() < 0.3 * video.diff(dim=axis).square().mean()
    assert (noisy - 0.3 * video).std().item() == pytest.approx(0.1, rel=0.05)
    # Frames are degraded one by one: a constant frame stays what it is, whatever its neighbours.
    video[:, 1] = 0.5
    both = degrade(video, dataclasses.replace(NONE, blur=2.0, shrink=2), generator())
    assert torch.allclose(both[:, 1], video[:, 1], atol=1e-5)


def test_where_a_clip_comes_from():
    film = packaged_clip(HELD_OUT_CLIPS[0])
    mixed, films = Deblurring(films=(film,), mixed=True), Deblurring(films=(film, film.with_name("b.mp4")))
    assert [mixed.film(n) for n in range(4)] == [None, film, None, film]
    assert [films.film(n).name for n in range(3)] == [film.name, "b.mp4", film.name]
    clips = [task.clip(1, 5, 16, 16) for task in (Deblurring(), mixed)]
    assert [c.source for c in clips] == ["generated 1", film.name]
    assert not torch.equal(clips[0].target, clips[1].target)


@pytest.mark.parametrize("change", [{"shrink": 0}, {"blur": -1.0}, {"noise": -0.1}])
def test_bad_settings(change):
    with pytest.raises(ValueError, match="shrink of at least 1, and blur and noise of at least 0"):
        Deblurring(**change).clip(0, 5, 16, 16)
