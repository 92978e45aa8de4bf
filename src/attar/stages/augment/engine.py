"""Augmentation for any training script (Augment), and the same for the stages: a policy is sampled into a plan, an executor renders it."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from attar.errors import UsageError
from attar.records import Policy
from attar.stages.augment import cpu, gpu
from attar.stages.augment.catalogue import as_policy
from attar.stages.augment.images import as_arrays, as_batch
from attar.stages.augment.plan import Border, Plan, sample

LARGEST = 2**15
"""Side of a view, pixels, above which a size is taken for a mistake."""


class Augment:
    """Augmented, normalised batches of images of any sizes.

    aug = attar.Augment("default", 224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    batch = aug(images)                             # (n, 3, 224, 224) float32, from uint8 arrays (height, width, channels)
    pairs, plan = aug(images, views=2, return_plan=True)        # views 2 i and 2 i + 1 are of image i
    plan.boxes(boxes, view=0), plan.drawn["rotate"]             # labels follow, and what was done is known

    `policy` is the name of one (catalogue.POLICIES), a mapping {name: strength or (strength, frequency)}, a Policy, or the path of a policy.json,
    which is checked and never executed. View i of call `step` depends on (seed, step, i), its image and cluster alone, so threads and workers
    change nothing; without `step` calls are counted from 0 (give it in worker processes, which would each count for themselves).
    """

    def __init__(
        self,
        policy: Any = "default",
        size: Any = 224,
        *,
        mean: Any = (0.5, 0.5, 0.5),
        std: Any = (0.5, 0.5, 0.5),
        dtype: str = "float32",
        layout: str = "contiguous",
        border: str = "reflect",
        fill: Any = 0.5,
        seed: Any = 0,
        threads: Any = 1,
        device: Any = "cpu",
        box_share: Any = 0.5,
    ) -> None:
        """`size` is a side or (height, width) of the views, pixels; `mean`, `std` and `fill` are in units of [0, 1], one number or one per channel.

        `dtype` is float32, float16 or bfloat16, `layout` contiguous or channels_last; `border` says what lies outside an image: reflect (mirrored),
        edge (its nearest pixel) or constant (`fill`). `device` is what torch.device takes. `box_share` is how much of a box a crop keeps (see __call__).

        Raises UsageError for a setting that is not understood; all are checked here.
        """
        self.policy = as_policy(policy)
        self.size = _size(size)
        self.mean, self.std, self._fill = _three(mean, "mean"), _three(std, "std"), _three(fill, "fill")
        if min(self.std) <= 0:
            raise UsageError(f"std is {self.std}. Expected positive numbers: the values are divided by them.")
        if not all(0 <= part <= 1 for part in self._fill):
            raise UsageError(f"fill is {self._fill}. Expected numbers in [0, 1].")
        self.dtype: cpu.Type = _choice(dtype, "dtype", tuple(cpu.TYPES))
        self.layout: cpu.Layout = _choice(layout, "layout", get_args(cpu.Layout))
        self.border: Border = _choice(border, "border", get_args(Border))
        self.seed, self.threads = _whole(seed, "seed", 0), _whole(threads, "threads", 1)
        try:
            self.device = torch.device(device)
        except RuntimeError as error:
            raise UsageError(f"device is {device!r}. Expected what torch.device takes, as cpu or cuda:0 ({error}).") from None
        if isinstance(box_share, bool) or not isinstance(box_share, int | float) or not 0 <= box_share <= 1:
            raise UsageError(f"box_share is {box_share!r}. Expected a share from 0 to 1 of the box (or of the crop, where it is smaller).")
        self.box_share = float(box_share)
        self._calls = itertools.count()

    def __call__(
        self,
        images: Any,
        *,
        clusters: Any = None,
        step: Any = None,
        views: Any = 1,
        boxes: Any = None,
        return_plan: bool = False,
    ) -> Any:
        """`views` views of each image, (n · views, 3, height, width), on the device; with `return_plan` also the Plan.

        `images` are a list of uint8 arrays or tensors (height, width, 1, 3 or 4) or PIL images of any sizes, or one batch: a tensor
        (n, channels, height, width), an array (n, height, width, channels), of bytes or of floats in [0, 1], which are rounded to 255 levels.
        Of four channels the last is left out; grey becomes three equal channels. `clusters` (n,) choose the dials of a policy per cluster.
        `boxes` (n, 4) x0, y0, x1, y1 in pixels, NaN for none, say where the foreground of each image is (as attar.objects(RUN).foreground() does):
        a resized crop is then placed where it overlaps the box by at least `box_share` of the most that a crop of its sides can.
        Raises DataError for images that are none of these, UsageError for the rest.
        """
        on_device = self.device.type != "cpu"
        batch = as_batch(images) if on_device and isinstance(images, Tensor) and images.ndim == 4 else None
        arrays = [] if batch is not None else as_arrays(images)
        sizes = [(batch.shape[2], batch.shape[3])] * len(batch) if batch is not None else [image.shape[:2] for image in arrays]
        plan = self.plan(sizes, clusters=clusters, step=step, views=views, boxes=boxes)
        if on_device:
            given = (
                _colours(batch)
                if batch is not None
                else [_colours(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0) for image in arrays]
            )
            last = self.layout == "channels_last"
            made = gpu.render(given, plan, self.mean, self.std, cpu.TYPES[self.dtype], last, self.device)
        else:
            made = cpu.execute(arrays, plan, self.mean, self.std, dtype=self.dtype, layout=self.layout, threads=self.threads)
        return (made, plan) if return_plan else made

    def plan(
        self,
        sizes: Any,
        *,
        clusters: Any = None,
        step: Any = None,
        views: Any = 1,
        boxes: Any = None,
    ) -> Plan:
        """What a call would do with images of these heights and widths, without their pixels: for loaders that decode what is shown."""
        views, count = _whole(views, "views", 1), len(sizes)
        step = next(self._calls) if step is None else _whole(step, "step", 0)
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, step])))
        source = np.repeat(np.arange(count), views)
        dials = [self.policy.of(cluster) for cluster in self._clusters(clusters, count)]
        return sample(
            [dials[number] for number in source],
            rng,
            np.asarray(sizes).reshape(count, 2)[source],
            self.size,
            pick=self.policy.pick,
            source=source,
            border=self.border,
            fill=self._fill,
            boxes=None if boxes is None else checked_boxes(boxes, count)[source],
            box_share=self.box_share,
        )

    def room(self, views: int) -> int:
        """Bytes that so many views take."""
        return cpu.room(views, self.size, self.dtype)

    def _clusters(self, clusters: Any, count: int) -> list[int | None]:
        if clusters is None or not self.policy.clusters:
            return [None] * count
        numbers = np.asarray(clusters)
        known = len(self.policy.clusters)
        if numbers.shape != (count,) or numbers.dtype.kind not in "iu":
            raise UsageError(
                f"clusters have shape {numbers.shape} and type {numbers.dtype}. Expected one whole number for each of {count} images."
            )
        if count and not 0 <= numbers.min() <= numbers.max() < known:
            raise UsageError(
                f"clusters go from {numbers.min()} to {numbers.max()}. Expected 0 to {known - 1}: the policy has dials for {known}."
            )
        return numbers.tolist()


def _colours(images: Tensor) -> Tensor:
    """(…, channels, height, width) with three channels: grey three times, alpha left out."""
    channels = images.shape[-3]
    if channels == 1:
        return images.expand(*images.shape[:-3], 3, *images.shape[-2:])
    return images[..., :3, :, :]


def checked_boxes(boxes: Any, count: int) -> np.ndarray:
    """Boxes x0, y0, x1, y1 of `count` images as float64; raises UsageError for what are none. NaN stands for none."""
    try:
        found = np.asarray(boxes, np.float64)
    except (TypeError, ValueError):
        raise UsageError(f"boxes are {type(boxes).__name__}. Expected numbers x0, y0, x1, y1 for each of {count} images.") from None
    if found.shape != (count, 4):
        raise UsageError(f"boxes have shape {found.shape}. Expected ({count}, 4): x0, y0, x1, y1 in pixels of each image, NaN for none.")
    known = np.isfinite(found).all(1)
    turned = known & (found[:, :2] >= found[:, 2:]).any(1)
    if turned.any():
        row = int(turned.argmax())
        raise UsageError(f"boxes[{row}] is {found[row].tolist()}. Expected x0 < x1 and y0 < y1, in pixels.")
    return found


def _size(size: Any) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(side, int) and 1 <= side <= LARGEST for side in pair):
        raise UsageError(f"size is {size!r}. Expected a side, or (height, width), in pixels from 1 to {LARGEST}.")
    return int(pair[0]), int(pair[1])


def _three(value: Any, name: str) -> tuple[float, float, float]:
    try:
        red, green, blue = np.broadcast_to(np.asarray(value, np.float64), (3,)).tolist()
    except (TypeError, ValueError):
        raise UsageError(f"{name} is {value!r}. Expected three numbers, one per channel.") from None
    if not np.isfinite([red, green, blue]).all():
        raise UsageError(f"{name} is {value!r}. Expected three finite numbers, one per channel.")
    return red, green, blue


def _whole(value: Any, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise UsageError(f"{name} is {value!r}. Expected a whole number from {least}.")
    return int(value)


def _choice(value: Any, name: str, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise UsageError(f"{name} is {value!r}. Expected one of {', '.join(known)}.")
    return value


def apply(
    images: UInt8[np.ndarray, "items height width 3"] | UInt8[Tensor, "items height width 3"] | list[np.ndarray],
    plan: Plan,
    device: str = "cpu",
) -> Float[Tensor, "views 3 rows columns"]:
    """The views of a plan in [0, 1], float32."""
    if torch.device(device).type != "cpu":
        given = torch.as_tensor(images).permute(0, 3, 1, 2) if not isinstance(images, list) else images
        return gpu.render(given, plan, (0, 0, 0), (1, 1, 1), device=device)
    return cpu.execute(as_arrays(list(images.numpy() if isinstance(images, Tensor) else images)), plan)


def augment(
    images: UInt8[np.ndarray, "items height width 3"],
    policy: Policy,
    clusters: np.ndarray | None,
    rng: np.random.Generator,
    device: str = "cpu",
) -> Float[Tensor, "items 3 height width"]:
    """One view of each image in its own size, in [0, 1], under a policy, with the dials of each item's cluster where the policy has them."""
    count, height, width, _ = images.shape
    dials = [policy.of(None if clusters is None else int(cluster)) for cluster in (clusters if clusters is not None else [0] * count)]
    return apply(images, sample(dials, rng, [(height, width)] * count, (height, width), pick=policy.pick), device)


def preview(
    images: UInt8[np.ndarray, "items height width 3"], policy: Policy, clusters: np.ndarray, rng: np.random.Generator, views: int
) -> UInt8[np.ndarray, "items views height width 3"]:
    """Several views of each image, as bytes to show to a person."""
    made = [augment(images, policy, clusters, rng).permute(0, 2, 3, 1) for _ in range(views)]
    return (torch.stack(made, 1) * 255).round().byte().numpy()


def normalise(views: Float[Tensor, "items 3 height width"], mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(views − mean) / std per channel."""
    shape = (1, 3, 1, 1)
    return (views - views.new_tensor(mean).view(shape)) / views.new_tensor(std).view(shape)
