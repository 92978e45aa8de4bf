"""The torch executor: a plan on whole batches, on any torch device, equal to reference.py within float32.

Views are grouped by what they need, so that an operation nobody drew costs nothing, and go through in chunks, so that the working memory does not
grow with the batch. Everything that decides is read from the plan on the host: the device is never waited for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from attar.errors import DataError
from attar.stages.augment.gpu_filters import levels, neighbourhood
from attar.stages.augment.mapping import CUBIC, NEAREST, NONE
from attar.stages.augment.plan import Plan

Planes = list[Tensor]
"""Red, green and blue, each (k, height · width): apart, and along one axis, so that a compiler makes one loop of all that is done to a pixel."""
AT_ONCE = {"cpu": 2**18, "other": 2**22}
"""Pixels of views in work at a time; each takes up to about 160 bytes while it is."""
FAR = 2.0**30
"""Coordinates beyond this are brought to it, before they become integers."""


class Pixels(NamedTuple):
    """Images of any sizes in one run of memory: no padding, and one gather whatever the sizes."""

    flat: Shaped[Tensor, " values"]
    unit: float  # the value of white: 255 or 1
    place: Int[np.ndarray, "images 6"]  # first value, height, width; values from a row, a column and a channel to the next


class How(NamedTuple):
    """What is done to a chunk of views; there is a compiled kernel for each of these that occurs."""

    size: tuple[int, int]
    border: str
    bent: bool  # elastic, radial warp or perspective
    coloured: bool
    tabled: bool
    erased: bool


class Views(NamedTuple):
    """What the kernels need to know of k views, on the device."""

    row: Int[Tensor, " k"]  # in the result
    place: Int[Tensor, "k 6"]
    origin: Int[Tensor, "k 2"]  # the source pixel x, y that `matrix` counts from: float32 then holds for sources of any size
    hole: Int[Tensor, "k 4"]  # erased pixels: from x0, y0 up to but without x1, y1
    table: Int[Tensor, " k"]
    matrix: Float[Tensor, "k 3 3"]  # view pixels from the view's centre → source pixels, or boxes, from `origin`
    warp: Float[Tensor, "k 4"]
    elastic: Float[Tensor, "k 2 5 5"]
    colour: Float[Tensor, "k 3 4"]  # from 0 … unit to 0 … 1
    fill: Float[Tensor, "k 3"]  # in 0 … unit


def render(
    images: Shaped[Tensor, "images _ _ _"] | Sequence[np.ndarray] | Sequence[Tensor],
    plan: Plan,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    device: str | torch.device = "cpu",
    *,
    compiled: bool = False,
    at_once: int | None = None,
) -> Float[Tensor, "n 3 height width"]:
    """Every view of a plan: (value − mean) / std per channel, values in [0, 1], on `device`.

    `images` are one batch (m, 3, h, w) or (m, h, w, 3), uint8 or floating in [0, 1], or a list of uint8 images (h, w, 3) of any sizes. `compiled` makes
    one kernel of resampling, colour, table, erasing and normalising with torch.compile, which takes seconds at the first call. Memory beyond images and
    result: up to about 160 bytes for each of `at_once` pixels of views, and the box means (at most 3 bytes per source pixel) of a chunk's sources.

    Against the reference: below 0.1 / 255 where a view is continuous in its pixels; equalise, tables and jpeg round, and where float32 rounds
    to the other side a value is off by one step of theirs. Raises DataError for a batch that is neither of these.
    """
    device = torch.device(device)
    pixels = _packed(images, device)
    height, width = plan.size
    tables = torch.as_tensor(plan.tables, device=device).flatten()
    sigma = np.asarray(std, np.float64)
    last = _sent([np.stack([1 / sigma, -np.asarray(mean, np.float64) / sigma])], np.float32, device)[0]
    # A compiled kernel stores into the three planes at once where it can see that they do not overlap: not where they are interleaved.
    layout = torch.channels_last if channels_last and not compiled else torch.contiguous_format
    out = torch.empty((len(plan.source), 3, height, width), dtype=dtype, device=device, memory_format=layout)
    limit = at_once or AT_ONCE["cpu" if device.type == "cpu" else "other"]
    planes = [out[:, c].view(len(out), height * width) for c in range(3)]
    for rows, apart in _chunks(plan, max(1, limit // (height * width)), fused=compiled):
        _chunk(pixels, _taken(plan, rows), rows, apart, tables, last, planes, compiled)
    return out.contiguous(memory_format=torch.channels_last) if channels_last else out


def _chunk(
    pixels: Pixels,
    plan: Plan,
    rows: Int[np.ndarray, " k"],
    apart: bool,
    tables: Tensor,
    last: Tensor,
    out: Planes,
    compiled: bool,
) -> None:
    """A part of a plan into its rows of the result."""
    whole, look, finish = _kernels(compiled)
    flat, views, how = _views(pixels, plan, rows, tables.device)
    if compiled:  # fewer kernels to compile; both cost nothing in one that waits for memory
        how = how._replace(coloured=True, erased=True)
    if apart:
        values = torch.stack(look(flat, views, tables, how._replace(tabled=False)), 1).unflatten(2, how.size)
        finish(neighbourhood(values, plan, views.table, tables).flatten(2).unbind(1), views, last, out, how)
    else:
        whole(flat, views, tables, last, out, how)


def _packed(images: Tensor | Sequence[np.ndarray] | Sequence[Tensor], device: torch.device) -> Pixels:
    """Images as one run of values; a batch that is on the device and dense is not copied."""
    if isinstance(images, Tensor):
        return _batch(images.to(device))
    for image in images:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype not in (np.uint8, torch.uint8):
            raise DataError(
                f"An image of the list has shape {tuple(image.shape)} and type {image.dtype}. Expected uint8 (height, width, 3)."
            )
    sizes = np.array([image.shape[:2] for image in images], np.int64).reshape(-1, 2)
    sides = sizes.prod(1) * 3
    first = np.cumsum(sides) - sides
    place = np.stack([first, *sizes.T, 3 * sizes[:, 1], np.full_like(first, 3), np.ones_like(first)], 1)
    if all(isinstance(image, np.ndarray) for image in images):
        run = np.concatenate([np.empty(0, np.uint8), *(image.reshape(-1) for image in images)])
        return Pixels(torch.from_numpy(run).to(device), 255.0, place)
    return Pixels(torch.cat([torch.as_tensor(image, device=device).reshape(-1) for image in images]), 255.0, place)


def _batch(images: Tensor) -> Pixels:
    """A batch of one size; (m, 3, h, 3) is read as channels first."""
    if images.ndim != 4 or 3 not in (images.shape[1], images.shape[3]) or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise DataError(
            f"A batch of shape {tuple(images.shape)} and type {images.dtype} is not understood. "
            "Expected (images, 3, height, width) or (images, height, width, 3), uint8 or floating in [0, 1]."
        )
    last = images if images.shape[1] != 3 else images.permute(0, 2, 3, 1)  # (m, h, w, 3), whatever lies how in memory
    dense = last if images.is_contiguous() or last.is_contiguous() else last.contiguous()
    count, height, width, _ = dense.shape
    steps = dense.stride()
    place = np.tile(np.array([0, height, width, *steps[1:]], np.int64), (count, 1))
    place[:, 0] = np.arange(count) * steps[0]
    flat = dense.as_strided((dense.numel(),), (1,))
    return Pixels(flat if images.dtype == torch.uint8 else flat.float(), 255.0 if images.dtype == torch.uint8 else 1.0, place)


def _taken(plan: Plan, rows: np.ndarray) -> Plan:
    """These views of a plan."""
    fields = [name for name in plan._fields if name not in ("size", "border", "fill", "tables", "drawn")]
    return plan._replace(drawn={}, **{name: getattr(plan, name)[rows] for name in fields})


def _chunks(plan: Plan, most: int, fused: bool) -> Iterator[tuple[np.ndarray, bool]]:
    """Rows of views that need the same, and whether some of it takes more than a pixel at a time; `most` at once where that takes working memory."""
    boxed, bent, tabled = plan.steps() > 1, _bent(plan), plan.table >= 0
    apart = plan.equalise | (plan.blur > 0) | (plan.sharpen > 0) | (plan.noise > 0) | (plan.jpeg > 0)
    kinds = boxed * 8 + bent * 4 + (tabled & ~apart) * 2 + apart
    for kind in np.unique(kinds):
        rows = np.flatnonzero(kinds == kind)
        step = len(rows) if fused and kind in (0, 2, 4, 6) else most  # these take none: a fused kernel of them keeps all in registers
        for start in range(0, len(rows), step):
            yield rows[start : start + step], bool(kind & 1)


def _bent(plan: Plan) -> np.ndarray:
    return (plan.warp[:, 0] != NONE) | plan.elastic.any((1, 2, 3)) | (plan.matrix[:, 2] != [0, 0, 1]).any(1)


def _views(pixels: Pixels, plan: Plan, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Views, How]:
    """What a chunk is made from, in two transfers: the values to gather from, the views, and what is done to them."""
    boxes = plan.steps()
    flat, place = (pixels.flat, pixels.place[plan.source]) if boxes.max() == 1 else _boxed(pixels, plan.source, boxes)
    height, width = plan.size
    matrix = plan.matrix / np.stack([boxes, boxes, np.ones_like(boxes)], 1)[:, :, None]
    matrix = matrix @ np.array([[1, 0, width / 2], [0, 1, height / 2], [0, 0, 1]])
    affine = (matrix[:, 2] == [0, 0, 1]).all(1)  # behind a horizon the origin would change which side is far away
    origin = np.where(affine[:, None], np.floor(matrix[:, :2, 2]), 0)
    matrix[:, :2, 2] -= origin
    sides = np.array([width, height, width, height])
    hole = plan.erase.astype(np.float64) * sides - 0.5
    hole = np.concatenate([np.floor(hole[:, :2]) + 1, np.ceil(hole[:, 2:])], 1)
    colour = plan.colour / np.array([pixels.unit] * 3 + [1.0])
    fill = np.broadcast_to(plan.fill * pixels.unit, (len(boxes), 3))
    how = How(
        size=plan.size,
        border=plan.border,
        bent=bool(_bent(plan).any()),
        coloured=bool((plan.colour != np.eye(3, 4)).any()),
        tabled=bool((plan.table >= 0).any()),
        erased=bool(((hole[:, 2] > hole[:, 0]) & (hole[:, 3] > hole[:, 1])).any()),
    )
    row, place_, origin_, hole_, table = _sent([rows[:, None], place, origin, hole, plan.table[:, None]], np.int64, device)
    parts = [matrix.reshape(-1, 9), plan.warp, plan.elastic.reshape(-1, 50), colour.reshape(-1, 12), fill]
    move, warp, elastic, mix, outside = _sent(parts, np.float32, device)
    views = Views(
        row=row[:, 0],
        place=place_,
        origin=origin_,
        hole=hole_,
        table=table[:, 0],
        matrix=move.unflatten(1, (3, 3)),
        warp=warp,
        elastic=elastic.unflatten(1, (2, 5, 5)),
        colour=mix.unflatten(1, (3, 4)),
        fill=outside,
    )
    return flat, views, how


def _sent(columns: list[np.ndarray], dtype: type, device: torch.device) -> tuple[Tensor, ...]:
    """Arrays (k, …) on the device by one transfer."""
    joined = torch.from_numpy(np.concatenate([column.astype(dtype) for column in columns], 1)).to(device)
    return joined.split([column.shape[1] for column in columns], 1)


def _boxed(pixels: Pixels, source: np.ndarray, boxes: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Means over k × k boxes of each view's source, for images of one size together, and where each view finds its own."""
    kinds = np.concatenate([pixels.place[source, 1:], boxes[:, None], source[:, None]], 1)
    wanted, which = np.unique(kinds, axis=0, return_inverse=True)
    runs, place, first = [], np.zeros((len(wanted), 6), np.int64), 0
    for size in np.unique(wanted[:, :6], axis=0):
        rows = np.flatnonzero((wanted[:, :6] == size).all(1))
        height, width, *steps, box = (int(part) for part in size)
        for some in np.array_split(rows, min(len(rows), -(-len(rows) * height * width * 3 // 2**26))):
            starts = pixels.place[wanted[some, 6], 0].tolist()
            images = torch.stack([pixels.flat.as_strided((height, width, 3), steps, start) for start in starts])
            runs.append(_box_mean(images, box))
            _, high, wide, _ = runs[-1].shape
            place[some] = [0, high, wide, 3 * wide, 3, 1]
            place[some, 0] = first + np.arange(len(some)) * high * wide * 3
            first += runs[-1].numel()
    return torch.cat([run.flatten() for run in runs]), place[which.ravel()]


def _box_mean(images: Shaped[Tensor, "m h w 3"], box: int) -> Float[Tensor, "m _ _ 3"]:
    """Means over boxes from the upper left; at the right and lower edge over what there is of them."""
    _, height, width, _ = images.shape
    high, wide = -(-height // box), -(-width // box)
    padded = F.pad(images, (0, 0, 0, wide * box - width, 0, high * box - height))
    sums = padded.unflatten(2, (wide, box)).unflatten(1, (high, box)).sum((2, 4), dtype=torch.float32)
    sides = [(total - box * torch.arange(count, device=images.device)).clamp_max(box) for total, count in ((height, high), (width, wide))]
    return sums / (sides[0][:, None] * sides[1])[:, :, None]


@functools.cache
def _kernels(compiled: bool) -> tuple[Callable, Callable, Callable]:
    """All that is done to a pixel by itself: in one go, up to the neighbourhood operations, and after them."""
    kernels = _whole, _look, _finish
    return tuple(torch.compile(kernel) for kernel in kernels) if compiled else kernels  # type: ignore[return-value]


def _whole(flat: Tensor, views: Views, tables: Tensor, last: Tensor, out: Planes, how: How) -> None:
    _finish(_look(flat, views, tables, how), views, last, out, how)


def _look(flat: Shaped[Tensor, " values"], views: Views, tables: Tensor, how: How) -> Planes:
    """Resampling, colour, clip and table."""
    planes = _resampled(flat, *_coordinates(views, how), views, how.border)
    colour = views.colour[..., None]
    if how.coloured:
        red, green, blue = planes
        planes = [colour[:, c, 0] * red + colour[:, c, 1] * green + colour[:, c, 2] * blue + colour[:, c, 3] for c in range(3)]
    else:
        planes = [plane * colour[:, 0, 0] for plane in planes]
    planes = [plane.clamp(0, 1) for plane in planes]
    if how.tabled:
        first = views.table[:, None] * 768
        planes = [tables[levels(plane) + (first + 256 * c)] / 255 for c, plane in enumerate(planes)]
    return planes


def _finish(planes: Sequence[Tensor], views: Views, last: Float[Tensor, "2 3"], out: Planes, how: How) -> None:
    """Clip, erase, normalise (value · last[0] + last[1]), cast, and store."""
    planes = [plane.clamp(0, 1) for plane in planes]
    if how.erased:
        x, y = _places(how.size, last.device)
        x0, y0, x1, y1 = views.hole[:, :, None].unbind(1)
        hole = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
        planes = [torch.where(hole, 0.5, plane) for plane in planes]
    for c, plane in enumerate(planes):
        out[c][views.row] = (plane * last[0, c] + last[1, c]).to(out[c].dtype)


def _places(size: tuple[int, int], device: torch.device) -> tuple[Int[Tensor, " pixels"], Int[Tensor, " pixels"]]:
    """Column and row of every pixel of a view."""
    place = torch.arange(size[0] * size[1], device=device)
    return place % size[1], torch.div(place, size[1], rounding_mode="floor")


def _coordinates(views: Views, how: How) -> tuple[Tensor, Tensor]:
    """Source coordinates x, y (k, pixels) from each view's origin, of the pixel whose centre is at + ½ less that half."""
    height, width = how.size
    x, y = _places(how.size, views.place.device)
    x, y = x + (0.5 - width / 2), y + (0.5 - height / 2)
    if how.bent:
        half = max(height, width) / 2
        across, down = _displaced(views.elastic, how.size)
        x, y = (part * half for part in _radial(x / half + across, y / half + down, views.warp[:, :, None]))
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(1) for row in views.matrix[..., None].unbind(1))
    across, down = a * x + (b * y + c), d * x + (e * y + f)
    if how.bent:
        bottom = (g * x + (h * y + i)).clamp_min(NEAREST)
        across, down = across / bottom, down / bottom
    return across - 0.5, down - 0.5


def _displaced(grid: Float[Tensor, "k 2 5 5"], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The displacements du and dv (k, pixels) between the nodes of the grid, the outer ones of which lie on the edges of the view."""
    side = grid.shape[3]
    (left, right), (top, low) = (_between(place, count, side - 1) for place, count in zip(_places(size, grid.device), size[::-1]))
    first, found = top * side + left, []
    for nodes in grid.flatten(2).unbind(1):
        upper, lower = ((1 - right) * nodes[:, at] + right * nodes[:, at + 1] for at in (first, first + side))
        found.append((1 - low) * upper + low * lower)
    return found[0], found[1]


def _between(place: Int[Tensor, " pixels"], count: int, last: int) -> tuple[Int[Tensor, " pixels"], Float[Tensor, " pixels"]]:
    """The node of the grid before each pixel's centre, and how far beyond it, in steps of the grid, that lies."""
    at = (place + 0.5) * (last / count)
    node = at.floor()
    return node.long(), at - node


def _radial(u: Tensor, v: Tensor, warp: Tensor) -> tuple[Tensor, Tensor]:
    """mapping.radial of every view by its own kind."""
    kind, amount, centre_u, centre_v = warp.unbind(1)
    du, dv = u - centre_u, v - centre_v
    r = torch.sqrt(du * du + dv * dv).clamp_min(1e-6)
    cubic = 1 + amount * r * r
    inside = r.clamp_max(1)
    curve = torch.where(amount > 0, 2 / torch.pi * torch.asin(inside), torch.sin(torch.pi / 2 * inside))
    spherical = torch.where(r < 1, 1 - amount.abs() + amount.abs() * curve / r, 1.0)
    factor = torch.where(kind == CUBIC, cubic, spherical)
    plain = kind == NONE
    return torch.where(plain, u, centre_u + du * factor), torch.where(plain, v, centre_v + dv * factor)


def _resampled(flat: Tensor, x: Tensor, y: Tensor, views: Views, border: str) -> Planes:
    """Bilinear interpolation between the four pixels around each coordinate."""
    start, rows, columns, down, across, channel = views.place[:, :, None].unbind(1)
    origin_x, origin_y = views.origin[:, :, None].unbind(1)
    lines, over, low = _along(y, origin_y, rows, down, border)
    places, aside, right = _along(x, origin_x, columns, across, border)
    index = [start + line + place for line in lines for place in places]
    outside = [one | other for one in over for other in aside]
    planes = []
    for c in range(3):
        taps = [flat[at + channel * c].float() for at in index]
        if outside:
            taps = [torch.where(out, views.fill[:, c, None], tap) for out, tap in zip(outside, taps)]
        upper, lower = (taps[at] + (taps[at + 1] - taps[at]) * right for at in (0, 2))
        planes.append(upper + (lower - upper) * low)
    return planes


def _along(at: Tensor, origin: Tensor, count: Tensor, step: Tensor, border: str) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Of the two pixels next to each coordinate on one axis: where they lie in memory, whether they are `fill`; and the share of the second."""
    at = at.clamp(-FAR, FAR)
    first = at.floor()
    index = first.long() + origin
    pair = index, index + 1
    outside = [(one < 0) | (one >= count) for one in pair] if border == "constant" else []
    return [_bordered(one, count, border) * step for one in pair], outside, at - first


def _bordered(index: Tensor, count: Tensor, border: str) -> Tensor:
    """mapping.border_index, each view with its own count."""
    if border != "reflect":
        return torch.minimum(index.clamp_min(0), count - 1)
    folded = torch.remainder(index, 2 * count)
    return torch.minimum(folded, 2 * count - 1 - folded)
