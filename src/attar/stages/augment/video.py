"""Video: which frames a clip shows is drawn as numbers, before anything is decoded; its pictures are changed as images are, alike through time.

What the transforms of time do at strength 1 (frequency: for how many clips they are drawn); all others are those of images:

| name | at strength 1 |
|---|---|
| temporal_crop | the clip lies anywhere in the video; at strength 0 in the middle. Where it spans the whole video there is nothing to choose |
| speed | × 1/2 … × 2 (evenly in its logarithm), as far as the video is long enough: frames are left out or shown again |
| reverse | backwards (there or not: any strength above 0) |
| frame_drop | each frame is lost with a probability of up to 1/2, drawn evenly for the clip; the one before it is shown in its place |

>>> frames = clip_frames([100, 40], 4, {"reverse": 1.0}, np.random.default_rng(0), step=2)
>>> frames.tolist()
[[53, 51, 49, 47], [23, 21, 19, 17]]
>>> wanted, place = np.unique(frames[0], return_inverse=True)  # read `wanted` only; decoded[place] is the clip
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from attar.errors import DataError, UsageError
from attar.records import Dial, Policy
from attar.stages.augment import dials
from attar.stages.augment.catalogue import NAMES
from attar.stages.augment.engine import apply
from attar.stages.augment.plan import Plan, sample

TRANSFORMS = ("temporal_crop", "speed", "reverse", "frame_drop")
FRESH = ("noise", "erase")


class Clips(NamedTuple):
    """What n clips show."""

    frames: Int[np.ndarray, "clips length"]  # numbers of the frames, of the clip's own video
    plan: Plan  # a view for each frame: of clip 0 all, then of clip 1 …; source: its place in that order


def clip_frames(
    frames: Sequence[int] | Int[np.ndarray, " videos"],
    length: int,
    policy: Policy | Mapping[str, Any],
    rng: np.random.Generator,
    *,
    step: int | float | Literal["spread"] = 1,
    clusters: Any = None,
) -> Int[np.ndarray, "videos length"]:
    """Numbers of the frames that a clip of `length` frames of each video shows; `frames` holds how many each video has.

    At normal speed two frames of the clip are `step` frames of the video apart; "spread": so far that the clip spans the video. A clip that would be
    longer than its video spans the video: frames are shown again. Transforms of images in the policy are passed over here. Raises UsageError for
    unknown transforms, dials, lengths and steps, DataError for a video without frames.
    """
    wanted, counts = dials.read(policy, (*TRANSFORMS, *NAMES), "videos"), np.asarray(frames)
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or (counts < 1).any():
        raise DataError(f"frames is {counts.tolist()}; expected how many frames each video has, whole numbers from 1")
    if length < 1:
        raise UsageError(f"length is {length}; expected how many frames a clip has, from 1")
    if step != "spread" and not (isinstance(step, int | float) and step > 0):
        raise UsageError(f"step is {step!r}; expected a number of frames above 0, or 'spread'")
    strength = dict(zip(TRANSFORMS, dials.strengths(_of_time(wanted), TRANSFORMS, len(counts), clusters, rng).T))
    apart = counts / length if step == "spread" else np.full(len(counts), float(step))
    apart = np.minimum(apart * 2 ** (strength["speed"] * rng.uniform(-1, 1, len(counts))), counts / length)
    slack = counts - apart * length
    start = slack * (0.5 + strength["temporal_crop"] * rng.uniform(-0.5, 0.5, len(counts)))
    shown = np.floor(start[:, None] + (np.arange(length) + 0.5) * apart[:, None]).astype(np.int64)
    shown = np.clip(shown, 0, counts[:, None] - 1)
    shown = np.where((strength["reverse"] > 0)[:, None], shown[:, ::-1], shown)
    return _held(shown, 0.5 * strength["frame_drop"] * rng.random(len(counts)), rng)


def _held(shown: Int[np.ndarray, "clips length"], rate: Float[np.ndarray, " clips"], rng: np.random.Generator) -> np.ndarray:
    """Clips in which frames are lost at a rate and the last one that is not is shown instead; the first is never lost."""
    kept = rng.random(shown.shape) >= rate[:, None]
    kept[:, 0] = True
    last = np.maximum.accumulate(np.where(kept, np.arange(shown.shape[1]), 0), 1)
    return np.take_along_axis(shown, last, 1)


def through_time(plan: Plan, length: int, rng: np.random.Generator, *, fresh: Collection[str] = ()) -> Plan:
    """A plan of one view per clip as a plan of `length` views each, all alike, of frames that come one clip after the other.

    `fresh` says what is drawn anew for every frame: "noise" (its pattern, not its strength), "erase" (the place of the box, not its size).
    Raises UsageError for anything else.
    """
    if unknown := set(fresh) - set(FRESH):
        raise UsageError(f"fresh holds {min(unknown)!r}; expected any of {', '.join(FRESH)}")
    clips = len(plan.source)
    alike = plan._asdict() | {"drawn": {name: np.repeat(values, length, 0) for name, values in plan.drawn.items()}}
    for name in ("matrix", "warp", "elastic", "colour", "table", "equalise", "blur", "sharpen", "noise", "seed", "jpeg", "erase"):
        alike[name] = np.repeat(alike[name], length, 0)
    if "noise" in fresh:
        alike["seed"] = rng.integers(2**32, size=clips * length, dtype=np.uint32)
    if "erase" in fresh:
        sides = alike["erase"][:, 2:] - alike["erase"][:, :2]
        first = ((1 - sides) * rng.random(sides.shape)).astype(np.float32)
        alike["erase"] = np.concatenate([first, np.minimum(first + sides, 1)], 1)
        if "erase" in alike["drawn"]:
            alike["drawn"]["erase"] = np.where(np.isnan(alike["drawn"]["erase"]), np.nan, alike["erase"])
    return Plan(**alike | {"source": np.arange(clips * length)})


def sample_clips(
    frames: Sequence[int] | Int[np.ndarray, " videos"],
    sizes: Sequence[tuple[int, int]] | Int[np.ndarray, "videos 2"],
    length: int,
    size: tuple[int, int],
    policy: Policy | Mapping[str, Any],
    rng: np.random.Generator,
    *,
    step: int | float | Literal["spread"] = 1,
    clusters: Any = None,
    fresh: Collection[str] = (),
) -> Clips:
    """A clip of each video: which frames (see clip_frames), and the plan (see through_time) that engine.apply takes with those frames.

    `sizes` are height and width of the videos, `size` of the clips. Where the policy picks k, it picks k of time and k of pictures.
    """
    shown = clip_frames(frames, length, policy, rng, step=step, clusters=clusters)
    if len(sizes) != len(shown):
        raise DataError(f"{len(sizes)} sizes for {len(shown)} videos; expected (height, width) of each")
    wanted = dials.read(policy, (*TRANSFORMS, *NAMES), "videos")
    numbers = dials.of_clusters(clusters, len(shown))
    pictures = [_of_pictures(families) for families in (wanted.families, *wanted.clusters)]
    own = [pictures[number + 1 if clusters is not None and 0 <= number < len(wanted.clusters) else 0] for number in numbers]
    return Clips(shown, through_time(sample(own, rng, sizes, size, pick=wanted.pick), length, rng, fresh=fresh))


def augment_clips(
    videos: Sequence[Any],
    length: int,
    size: tuple[int, int],
    policy: Policy | Mapping[str, Any],
    rng: np.random.Generator,
    *,
    step: int | float | Literal["spread"] = 1,
    clusters: Any = None,
    fresh: Collection[str] = (),
) -> Float[Tensor, "videos length 3 height width"]:
    """A clip of each video, in [0, 1]; videos are arrays (frames, height, width, 3) of uint8, or what gives such an array for an array of frame numbers.

    Each needs `shape` and indexing by numbers that rise (numpy, memory-mapped or h5py arrays, a decoder behind the same two): a frame is read once.
    """
    for place, video in enumerate(videos):
        if len(getattr(video, "shape", ())) != 4 or video.shape[3] != 3:
            raise DataError(f"video {place} has shape {tuple(getattr(video, 'shape', ()))}; expected (frames, height, width, 3) of uint8")
    counts, sizes = [video.shape[0] for video in videos], [tuple(video.shape[1:3]) for video in videos]
    clips = sample_clips(counts, sizes, length, size, policy, rng, step=step, clusters=clusters, fresh=fresh)
    images: list[np.ndarray] = []
    for video, shown in zip(videos, clips.frames):
        read, places = np.unique(shown, return_inverse=True)
        decoded = np.asarray(video[read])
        images += [decoded[at] for at in places]
    return apply(images, clips.plan).reshape(len(videos), length, 3, *size)


def _of_time(policy: Policy) -> Policy:
    def only(families: Mapping[str, Dial]) -> dict[str, Dial]:
        return {name: found for name, found in families.items() if name in TRANSFORMS}

    return Policy(families=only(policy.families), clusters=tuple(map(only, policy.clusters)), pick=policy.pick)


def _of_pictures(families: Mapping[str, Dial]) -> dict[str, Dial]:
    return {name: found for name, found in families.items() if name not in TRANSFORMS}
