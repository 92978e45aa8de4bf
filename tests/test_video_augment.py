"""Video: frames as numbers, only those read that are shown; pictures changed alike through time."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch
from conftest import make_image
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import AttarError, DataError, UsageError
from attar.records import Dial, Policy
from attar.stages.augment import video as videos_module
from attar.stages.augment.engine import apply
from attar.stages.augment.plan import sample
from attar.stages.augment.video import TRANSFORMS, augment_clips, clip_frames, sample_clips, through_time

PICTURES = {"geometry": 1.0, "flip": (1.0, 0.5), "colour": 1.0, "gamma": 0.8, "noise": 1.0, "erase": 1.0}


def frames(counts: list[int], length: int, policy: object, seed: int = 0, **more: object) -> np.ndarray:
    return clip_frames(counts, length, policy, np.random.default_rng(seed), **more)


def film(count: int, height: int = 20, width: int = 24, seed: int = 0) -> np.ndarray:
    """Frames of one picture, each darker than the one before it."""
    picture = np.asarray(make_image("discs", seed, width, height)).astype(np.float64)
    return np.stack([np.rint(picture * (1 - 0.5 * place / count)) for place in range(count)]).astype(np.uint8)


class Recorder:
    """A video that remembers which frames were read."""

    def __init__(self, frames: np.ndarray) -> None:
        self.frames, self.shape, self.read = frames, frames.shape, []

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        self.read += places.tolist()
        return self.frames[places]


# time


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("off", [0.0, (1.0, 0.0)])
def test_strength_or_frequency_zero_is_the_middle_of_the_video_at_normal_speed(name: str, off: float) -> None:
    assert frames([12, 13, 4], 4, {name: off}).tolist() == [[4, 5, 6, 7], [5, 6, 7, 8], [0, 1, 2, 3]]
    assert frames([12], 12, {name: off}).tolist() == [list(range(12))]
    assert frames([12], 4, {name: off}, step=2).tolist() == [[3, 5, 7, 9]]
    assert frames([12], 4, {name: off}, step="spread").tolist() == [[1, 4, 7, 10]]
    assert frames([3, 1], 6, {name: off}).tolist() == [[0, 0, 1, 1, 2, 2], [0] * 6]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(1, 20), st.floats(0, 1), st.integers(0, 99))
def test_frames_are_of_the_video_in_order_and_follow_the_generator(counts: list[int], length: int, strength: float, seed: int) -> None:
    policy = {name: strength for name in TRANSFORMS if name != "reverse"}
    shown = frames(counts, length, policy, seed, step=1.5)
    assert shown.shape == (len(counts), length)
    assert (shown >= 0).all()
    assert (shown < np.array(counts)[:, None]).all()
    assert (np.diff(shown, axis=1) >= 0).all()
    assert np.array_equal(shown, frames(counts, length, policy, seed, step=1.5))


def test_a_crop_in_time_goes_anywhere_and_by_strength_less_far_from_the_middle() -> None:
    first = frames([100] * 500, 10, {"temporal_crop": 1.0})[:, 0]
    assert first.min() <= 2
    assert first.max() >= 88
    half = frames([100] * 500, 10, {"temporal_crop": 0.5})[:, 0]
    assert 22 <= half.min() <= 25
    assert 65 <= half.max() <= 68
    assert (np.diff(frames([100] * 50, 10, {"temporal_crop": 1.0}), axis=1) == 1).all()


def test_speed_is_half_to_double_and_what_fits() -> None:
    span = frames([1000] * 800, 100, {"speed": 1.0})
    pace = (span[:, -1] - span[:, 0]) / 99
    assert 0.49 < pace.min() < 0.53
    assert 1.9 < pace.max() < 2.02
    assert abs(np.log2(pace).mean()) < 0.05
    half = frames([1000] * 400, 100, {"speed": 0.5})
    assert ((half[:, -1] - half[:, 0]) / 99).max() < 2**0.5 + 0.02
    assert frames([20] * 50, 20, {"speed": 1.0}).max() == 19
    assert (np.diff(frames([20] * 50, 20, {"speed": 1.0}), axis=1) <= 1).all()  # no longer than the video: never faster


def test_reversed_clips_are_the_same_frames_backwards_as_often_as_asked() -> None:
    plain, turned = frames([30] * 400, 5, {}), frames([30] * 400, 5, {"reverse": (0.1, 0.4)})
    back = (turned == plain[:, ::-1]).all(1)
    assert ((turned == plain).all(1) ^ back).all()
    assert 0.33 < back.mean() < 0.47


def test_dropped_frames_show_the_last_one_that_is_there() -> None:
    shown = frames([64] * 400, 64, {"frame_drop": 1.0})
    lost = shown != np.arange(64)
    assert (shown[:, 0] == 0).all()
    assert (shown[:, 1:][lost[:, 1:]] == shown[:, :-1][lost[:, 1:]]).all()
    assert (shown[~lost] == np.tile(np.arange(64), (400, 1))[~lost]).all()
    assert 0.22 < lost.mean() < 0.28
    assert lost.mean(1).max() < 0.75


def test_clusters_have_their_dials() -> None:
    policy = Policy(families={}, clusters=({"reverse": Dial(1.0, 1.0)}, {"invert": Dial(1.0, 1.0)}))
    clips = sample_clips([9, 9, 9], [(4, 4)] * 3, 3, (4, 4), policy, np.random.default_rng(0), clusters=[0, 1, -1])
    assert clips.frames.tolist() == [[5, 4, 3], [3, 4, 5], [3, 4, 5]]
    assert (clips.plan.colour[3:6, :, 3] == 1).all()
    assert (clips.plan.colour[[0, 1, 2, 6, 7, 8], :, 3] == 0).all()


# pictures


def test_every_frame_of_a_clip_is_changed_alike_and_as_its_own_image_would_be() -> None:
    given = [film(9), film(7, seed=1)]
    made = augment_clips(given, 4, (16, 18), PICTURES, np.random.default_rng(3))
    clips = sample_clips([9, 7], [(20, 24)] * 2, 4, (16, 18), PICTURES, np.random.default_rng(3))
    assert made.shape == (2, 4, 3, 16, 18)
    for clip in range(2):
        own = {name: getattr(clips.plan, name)[clip * 4] for name in ("matrix", "colour", "erase", "seed", "noise", "table")}
        for place in range(4):
            at = clip * 4 + place
            assert all(np.array_equal(getattr(clips.plan, name)[at], value) for name, value in own.items())
            alone = clips.plan._replace(
                source=np.zeros(1, int),
                drawn={},
                **{
                    name: getattr(clips.plan, name)[at : at + 1]
                    for name in (
                        "matrix",
                        "warp",
                        "elastic",
                        "colour",
                        "table",
                        "equalise",
                        "blur",
                        "sharpen",
                        "noise",
                        "seed",
                        "jpeg",
                        "erase",
                    )
                },
            )
            assert torch.equal(apply([given[clip][clips.frames[clip, place]]], alone)[0], made[clip, place])
    assert not torch.equal(made[0], made[1])


def test_without_changes_a_clip_is_its_frames() -> None:
    made = augment_clips([film(8)], 3, (20, 24), {}, np.random.default_rng(0))
    assert torch.allclose(made[0].permute(0, 2, 3, 1) * 255, torch.from_numpy(film(8)[[3, 4, 5]]).float(), atol=1e-3)


def test_noise_and_erased_boxes_are_drawn_for_every_frame_where_asked() -> None:
    rng = np.random.default_rng(0)
    plan = sample([{"noise": Dial(1.0, 1.0), "erase": Dial(1.0, 1.0), "rotate": Dial(1.0, 1.0)}] * 3, rng, [(30, 30)] * 3, (30, 30))
    still, moving = through_time(plan, 5, rng), through_time(plan, 5, rng, fresh=("noise", "erase"))
    assert np.array_equal(still.erase, np.repeat(plan.erase, 5, 0))
    assert np.array_equal(still.source, np.arange(15))
    assert all(len(values) == 15 for values in still.drawn.values())
    assert len(np.unique(still.seed)) == 3
    assert len(np.unique(moving.seed)) == 15
    assert np.array_equal(moving.noise, still.noise)
    assert np.array_equal(moving.matrix, still.matrix)
    assert np.allclose(moving.erase[:, 2:] - moving.erase[:, :2], still.erase[:, 2:] - still.erase[:, :2], atol=1e-6)
    assert len(np.unique(moving.erase, axis=0)) == 15
    assert moving.erase.min() >= 0
    assert moving.erase.max() <= 1
    assert np.allclose(moving.drawn["erase"], moving.erase)
    assert np.array_equal(through_time(plan, 5, rng, fresh=["noise"]).erase, still.erase)


def test_only_the_frames_that_are_shown_are_read_and_each_once() -> None:
    video = Recorder(film(50))
    augment_clips([video], 8, (10, 10), {"speed": 1.0, "reverse": 1.0, "frame_drop": 1.0}, np.random.default_rng(0))
    assert video.read == np.unique(frames([50], 8, {"speed": 1.0, "reverse": 1.0, "frame_drop": 1.0})).tolist()
    assert len(video.read) <= 8


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ([9], 4, {"revers": 1.0}, {}),
            UsageError,
            "there is no transform 'revers' of videos. Did you mean 'reverse'? Known are: temporal_crop, speed",
        ),
        (([9], 4, {"speed": 1.2}, {}), UsageError, "speed: strength 1.2 is outside 0 … 1"),
        (([9], 0, {}, {}), UsageError, "length is 0; expected how many frames a clip has, from 1"),
        (([9], 4, {}, {"step": 0}), UsageError, "step is 0; expected a number of frames above 0, or 'spread'"),
        (([9, 0], 4, {}, {}), DataError, "frames is [9, 0]; expected how many frames each video has, whole numbers from 1"),
        (([9], 4, {}, {"clusters": [1, 2]}), DataError, "clusters of shape (2,) for 1 items"),
    ],
)
def test_what_does_not_fit_is_named(arguments: tuple, error: type[AttarError], message: str) -> None:
    counts, length, policy, more = arguments
    with pytest.raises(error) as caught:
        frames(counts, length, policy, **more)
    assert message in str(caught.value)


def test_videos_that_are_none_sizes_that_miss_and_unknown_fresh_parts_are_named() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match=r"video 1 has shape \(5, 4, 4\); expected \(frames, height, width, 3\) of uint8"):
        augment_clips([film(5), np.zeros((5, 4, 4), np.uint8)], 2, (4, 4), {}, rng)
    with pytest.raises(DataError, match=r"1 sizes for 2 videos; expected \(height, width\) of each"):
        sample_clips([5, 5], [(4, 4)], 2, (4, 4), {}, rng)
    with pytest.raises(UsageError, match="fresh holds 'blur'; expected any of noise, erase"):
        sample_clips([5], [(4, 4)], 2, (4, 4), {}, rng, fresh=["blur"])


def test_the_example_in_the_docs_runs() -> None:
    assert doctest.testmod(videos_module).failed == 0
    assert doctest.testmod(videos_module).attempted
