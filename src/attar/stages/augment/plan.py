"""Sampling: dials per view → a Plan, arrays that say what happens to each view. Pure numpy; reference.py says what a plan means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64, Shaped, UInt8

from attar.records import Dial
from attar.stages.augment import mapping
from attar.stages.augment.catalogue import FAMILIES, GRID, NAMES, TRANSFORMS

__all__ = ["FAMILIES", "LUMA", "Plan", "sample"]

Border = Literal["reflect", "edge", "constant"]
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
TO_YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
FROM_YIQ, EYE, GREY = np.linalg.inv(TO_YIQ), np.eye(3), np.tile(LUMA, (3, 1))
ORDERS = np.array([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
_GATES = {name: column for column, name in enumerate(NAMES)}
_OWN = [_GATES[name] for name in TRANSFORMS]
_FAMILY = [_GATES[next((family for family, members in FAMILIES.items() if name in members), name)] for name in TRANSFORMS]
"""The gates of each transform and of its family, in the order of the catalogue."""
_FIRST = dict(zip(TRANSFORMS, np.cumsum([len(NAMES), *(transform.uniforms for transform in TRANSFORMS.values())]).tolist()))
_SEED = len(NAMES) + sum(transform.uniforms for transform in TRANSFORMS.values())
"""The columns of uniforms a view takes: one per name, those of each transform, one for the noise. None depends on what else is drawn."""


class Plan(NamedTuple):
    """What happens to each of n views, in this order: elastic, radial warp and matrix in one resampling → colour → clip to [0, 1] → equalise → table →
    blur → sharpen → noise → jpeg → clip → erase → normalise.

    Resampling is bilinear. Where the matrix shrinks by two or more (`steps`), means over k × k boxes of the source are taken first.
    """

    size: tuple[int, int]  # height and width of the views, pixels
    source: Int[np.ndarray, " n"]  # which of the given images
    matrix: Float[np.ndarray, "n 3 3"]  # view pixel (x + ½, y + ½, 1) → source pixel coordinates, centres at + ½
    warp: Float32[
        np.ndarray, "n 4"
    ]  # kind (0 none, 1 spherical, 2 cubic), amount, centre u, v: on [−1, 1] view coordinates, before the matrix
    elastic: Float32[np.ndarray, "n 2 5 5"]  # displacement du, dv at the nodes of a 5 × 5 grid over the view, added before the warp
    border: Border  # outside the source: mirrored at the pixel's edge, the edge's pixel, or `fill`
    fill: Float32[np.ndarray, " 3"]  # in [0, 1]
    colour: Float32[np.ndarray, "n 3 4"]  # RGB in [0, 1] → RGB: matrix and offset; clipped once, after
    table: Int[np.ndarray, " n"]  # index into `tables`, −1 for none
    tables: UInt8[np.ndarray, "t 3 256"]  # value → tables[…, ⌊255 value + ½⌋] / 255
    equalise: Bool[np.ndarray, " n"]
    blur: Float32[np.ndarray, " n"]  # Gaussian sigma, view pixels; reach ⌈2.5 sigma⌉, mirrored at the edge pixel's centre; 0 for none
    sharpen: Float32[np.ndarray, " n"]  # a of v + a (v − G₁(v)), G₁ the blur of sigma 1; 0 for none
    noise: Float32[np.ndarray, " n"]  # standard deviation; 0 for none
    seed: Int[np.ndarray, " n"]  # of the noise, uint32
    jpeg: Int[np.ndarray, " n"]  # quality 1 … 100; 0 for none
    erase: Float32[np.ndarray, "n 4"]  # box x0, y0, x1, y1 in [0, 1] of the view, made 0.5; zero area for none
    drawn: dict[str, np.ndarray]  # transform → its parameters (n, …), in the order of the catalogue, NaN where it was not drawn

    def steps(self) -> Int64[np.ndarray, " n"]:
        """Side k of the boxes of the source whose means each view samples; 1 for the pixels themselves."""
        return mapping.steps(self.matrix, self.size)

    def coordinates(self, view: int) -> tuple[Float64[np.ndarray, "height width"], Float64[np.ndarray, "height width"]]:
        """Source coordinates x and y, in pixels with centres at + ½, that each pixel of a view shows."""
        y, x = np.mgrid[: self.size[0], : self.size[1]] + 0.5
        return mapping.forward(x, y, self.size, self.matrix[view], self.warp[view], self.elastic[view])

    def points(self, points: Shaped[np.ndarray, "points 2"], view: int) -> Float64[np.ndarray, "points 2"]:
        """Points x, y of the source, in pixels, where a view shows them: in pixels of the view, outside of it where they are not seen."""
        at = np.asarray(points, np.float64)
        return np.stack(mapping.backward(at[:, 0], at[:, 1], self.size, self.matrix[view], self.warp[view], self.elastic[view]), 1)

    def boxes(self, boxes: Shaped[np.ndarray, "boxes 4"], view: int) -> Float64[np.ndarray, "boxes 4"]:
        """The boxes x0, y0, x1, y1 around what a view shows of boxes of the source, clipped to the view; zero area where nothing is seen.

        The edges are followed at 9 points each, so a box stays around what is turned or warped.
        """
        share = np.linspace(0, 1, 9)
        none, all_ = np.zeros(9), np.ones(9)
        right, down = np.concatenate([share, share, none, all_]), np.concatenate([none, all_, share, share])
        corners = np.asarray(boxes, np.float64)
        x = corners[:, :1] + (corners[:, 2:3] - corners[:, :1]) * right
        y = corners[:, 1:2] + (corners[:, 3:] - corners[:, 1:2]) * down
        seen = self.points(np.stack([x.ravel(), y.ravel()], 1), view).reshape(len(corners), 36, 2)
        edges = np.concatenate([seen.min(1), seen.max(1)], 1)
        return edges.clip(0, np.array([self.size[1], self.size[0]] * 2))

    def mask(self, mask: Shaped[np.ndarray, "rows columns"], view: int, outside: int = 0) -> Shaped[np.ndarray, "height width"]:
        """A label of each pixel of the source as the view shows it: the nearest pixel's; beyond the border as the plan says, `outside` for constant."""
        rows, columns = mask.shape
        x, y = (np.floor(part).astype(np.int64) for part in self.coordinates(view))
        shown = mask[mapping.border_index(y, rows, self.border), mapping.border_index(x, columns, self.border)]
        lost = (x < 0) | (x >= columns) | (y < 0) | (y >= rows) if self.border == "constant" else np.zeros(self.size, bool)
        return np.where(lost, np.asarray(outside, mask.dtype), shown)


def sample(
    dials: Sequence[Mapping[str, Dial]],
    rng: np.random.Generator,
    sizes: Sequence[tuple[int, int]] | Int[np.ndarray, "n 2"],
    size: tuple[int, int],
    *,
    pick: int | None = None,
    source: Int[np.ndarray, " n"] | None = None,
    border: Border = "reflect",
    fill: float | Sequence[float] = 0.5,
    boxes: Shaped[np.ndarray, "n 4"] | None = None,
    box_share: float = 0.5,
) -> Plan:
    """A plan for as many views as there are dials; `sizes` are height and width of each view's source, `size` those of the views.

    Every name is drawn with its frequency and its range scaled by its strength (catalogue.TRANSFORMS says what is full); with `pick` each view gets
    so many of its names, drawn evenly. The plain view is the whole source, stretched. View i depends on the generator, i, its dials and sizes alone.

    With `boxes` x0, y0, x1, y1 (pixels of each view's source, NaN for none) a resized crop is placed where it overlaps its box by at least
    `box_share` of the most that a crop of its sides can; the draw is spread evenly over such places, and `drawn` tells the place taken.
    """
    count = len(dials)
    uniforms = rng.random((count, _SEED + 1))
    strength = _strengths(dials, uniforms, pick)
    both = {name: _parameters(name, uniforms, strength[name]) for name in TRANSFORMS if name in strength}
    whole = np.asarray(sizes, np.float64).reshape(count, 2)
    if boxes is not None and "resized_crop" in both:
        both["resized_crop"] = _around(*both["resized_crop"], boxes, box_share, whole, size)
    drawn, full = ({name: pair[part] for name, pair in both.items()} for part in (0, 1))
    table, tables = _tables(full, count)
    return Plan(
        size=size,
        source=np.arange(count) if source is None else source,
        matrix=_matrix(full, whole, size),
        warp=_warp(full, count),
        elastic=full["elastic"].reshape(count, 2, GRID, GRID).astype(np.float32)
        if "elastic" in full
        else np.zeros((count, 2, GRID, GRID), np.float32),
        border=border,
        fill=np.broadcast_to(np.asarray(fill, np.float32), (3,)),
        colour=_colour(full, count),
        table=table,
        tables=tables,
        equalise=_column(full, "equalise", count) > 0,
        blur=(_column(full, "blur", count) * min(size)).astype(np.float32),
        sharpen=_column(full, "sharpen", count).astype(np.float32),
        noise=_column(full, "noise", count).astype(np.float32),
        seed=(uniforms[:, _SEED] * 2**32).astype(np.uint32),
        jpeg=_column(full, "jpeg", count).astype(np.int16),
        erase=full["erase"].astype(np.float32) if "erase" in full else np.zeros((count, 4), np.float32),
        drawn=drawn,
    )


def _strengths(dials: Sequence[Mapping[str, Dial]], uniforms: np.ndarray, pick: int | None) -> dict[str, np.ndarray]:
    """Strength (n,) of each transform that some view drew, 0 for the others; by its own dial where it has one, else by its family's."""
    kinds = {id(dial): dial for dial in dials}  # a batch has few different dials
    rows = {key: row for row, key in enumerate(kinds)}
    which = [rows[id(dial)] for dial in dials]
    strength, frequency = np.zeros((2, len(kinds), len(NAMES)))
    named = np.zeros((len(kinds), len(NAMES)), bool)
    for row, dial in enumerate(kinds.values()):
        for name, (strong, often) in dial.items():
            column = _GATES[name]
            strength[row, column], frequency[row, column], named[row, column] = strong, often if strong > 0 else 0, True
    gates, share = uniforms[:, : len(NAMES)], frequency[which]
    if pick is not None:
        order = np.where(share > 0, gates, 2.0)
        last = np.sort(order, 1)[:, min(pick, len(NAMES)) - 1, None]
        share = np.where((order <= last) & (share > 0), 1.0, 0.0)
    amount = np.where(gates < share, strength[which], 0.0)
    found = np.where(named[which][:, _OWN], amount[:, _OWN], amount[:, _FAMILY])
    drawn = np.flatnonzero(found.any(0)).tolist()
    return {name: found[:, column] for column, name in enumerate(TRANSFORMS) if column in drawn}


def _parameters(name: str, uniforms: np.ndarray, strength: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The parameters (n, p) of one transform: NaN where its strength is 0, and what changes nothing there."""
    transform, rows = TRANSFORMS[name], np.flatnonzero(strength)
    first = _FIRST[name]
    values = np.array(transform.draw(uniforms[rows, first : first + transform.uniforms], strength[rows])).T
    if len(rows) == len(strength):
        return values, values
    drawn = np.full((len(strength), len(transform.parameters)), np.nan)
    drawn[rows] = values
    full = np.tile(list(transform.parameters.values()), (len(strength), 1)).astype(np.float64)
    full[rows] = values
    return drawn, full


def _column(full: Mapping[str, np.ndarray], name: str, count: int) -> np.ndarray:
    return full[name][:, 0] if name in full else np.zeros(count)


def _eye(count: int) -> np.ndarray:
    return EYE[None].repeat(count, 0)


def _matrix(full: Mapping[str, np.ndarray], sizes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """View → source: flips, quarter turns, perspective, translation, rotation, shear, scale about the view's centre, then the crop, in that order."""
    count, (height, width) = len(sizes), size
    centred = _centred(full, count, size)
    share = np.tile([0.0, 0.0, 1.0, 1.0], (count, 1))
    if "resized_crop" in full:
        share = _crop(full["resized_crop"], sizes, size)
    scale_x, scale_y = sizes[:, 1] * share[:, 2] / width, sizes[:, 0] * share[:, 3] / height
    whole = _eye(count)
    whole[:, 0, 0], whole[:, 1, 1] = scale_x, scale_y
    whole[:, 0, 2], whole[:, 1, 2] = sizes[:, 1] * share[:, 0], sizes[:, 0] * share[:, 1]
    if centred is None:
        return whole
    there, back = EYE.copy(), EYE.copy()
    there[:2, 2], back[:2, 2] = (width / 2, height / 2), (-width / 2, -height / 2)
    return whole @ (there @ centred @ back)


def _crop(parameters: np.ndarray, sizes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes x, y, width, height (n, 4) in shares of the source. Full strength leaves the aspect ratio of the source for that of the view."""
    area, aspect, own_aspect, x, y = parameters.T
    own = sizes[:, 1] / sizes[:, 0] * (size[0] / size[1])  # aspect ratio of the whole source, relative to the view's
    goal = aspect * own**own_aspect
    width, height = np.minimum(np.sqrt(area * goal / own), 1), np.minimum(np.sqrt(area * own / goal), 1)
    return np.stack([(1 - width) * x, (1 - height) * y, width, height], 1)


def _around(
    drawn: np.ndarray, full: np.ndarray, boxes: np.ndarray, share: float, sizes: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Parameters of resized crops (n, 5), as drawn and in full, with x and y moved so that every crop overlaps its box.

    Along each axis at least √share of the shorter of crop and box overlap. The places that do so are an interval, onto which the uniform x or y is
    stretched.
    """
    crops, held = _crop(full, sizes, size), np.isfinite(boxes).all(1) & np.isfinite(drawn).all(1)
    edges = np.where(held[:, None], boxes, 0.0) / sizes[:, [1, 0, 1, 0]]
    drawn, full = drawn.copy(), full.copy()
    for axis, column in ((0, 3), (1, 4)):
        start, end, side = edges[:, axis].clip(0, 1), edges[:, axis + 2].clip(0, 1), crops[:, axis + 2]
        need = np.sqrt(share) * np.minimum(side, end - start)
        low, high = np.maximum(start + need - side, 0), np.minimum(end - need, 1 - side)
        free = 1 - side
        moved = np.where(free > 0, (low + full[:, column] * (high - low)) / np.where(free > 0, free, 1), full[:, column]).clip(0, 1)
        full[held, column] = drawn[held, column] = moved[held]
    return drawn, full


def _centred(full: Mapping[str, np.ndarray], count: int, size: tuple[int, int]) -> np.ndarray | None:
    """All but the crop as a matrix (n, 3, 3) on pixels from the view's centre; None for no change."""
    height, width = size
    steps = []
    if "scale" in full:
        steps.append(_linear(1 / full["scale"][:, 0], 0.0, 0.0, 1 / full["scale"][:, 0]))
    if "shear" in full:
        slope = np.tan(np.deg2rad(full["shear"]))
        steps.append(_linear(np.ones(count), slope[:, 0], slope[:, 1], 1.0))
    if "rotate" in full:
        angle = np.deg2rad(full["rotate"][:, 0])
        steps.append(_linear(np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)))
    if "translate" in full:
        move = _eye(count)
        move[:, :2, 2] = -full["translate"] * [width, height]
        steps.append(move)
    if "perspective" in full:
        square = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
        corners = square + full["perspective"].reshape(count, 2, 4).transpose(0, 2, 1)
        half = np.diag([width / 2, height / 2, 1])
        steps.append(half @ mapping.quad_matrix(corners) @ np.linalg.inv(half))
    if "quarter_turn" in full:
        turns = full["quarter_turn"][:, 0]
        cos, sin = np.round(np.cos(turns * np.pi / 2)), np.round(np.sin(turns * np.pi / 2))
        steps.append(_linear(cos, -sin * width / height, sin * height / width, cos))  # the sides change places
    if "horizontal_flip" in full:
        steps.append(_linear(1 - 2 * full["horizontal_flip"][:, 0], 0.0, 0.0, 1.0))
    if "vertical_flip" in full:
        steps.append(_linear(np.ones(count), 0.0, 0.0, 1 - 2 * full["vertical_flip"][:, 0]))
    if not steps:
        return None
    matrix = steps[0]
    for step in steps[1:]:
        matrix = matrix @ step
    return matrix


def _linear(a: np.ndarray, b: np.ndarray | float, c: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
    matrix = _eye(len(a))
    matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 1, 0], matrix[:, 1, 1] = a, b, c, d
    return matrix


def _warp(full: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    """Kind, amount and centre (n, 4); where both are drawn the spherical one."""
    warp = np.zeros((count, 4), np.float32)
    for kind, name in ((mapping.CUBIC, "barrel"), (mapping.SPHERICAL, "spherical")):
        if name in full:
            rows = full[name][:, 0] != 0
            warp[rows, 0], warp[rows, 1:] = kind, full[name][rows]
    return warp


def _colour(full: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    """Hue, saturation, contrast about mid grey, brightness, grey, order of the channels and negative, in that order, as one affine map (n, 3, 4)."""
    matrix, offset = _eye(count), np.zeros((count, 3))
    if "hue" in full:
        turn = 2 * np.pi * full["hue"][:, 0]
        cos, sin = np.cos(turn), np.sin(turn)
        turned = _eye(count)
        turned[:, 1, 1], turned[:, 1, 2], turned[:, 2, 1], turned[:, 2, 2] = cos, -sin, sin, cos
        matrix = FROM_YIQ @ turned @ TO_YIQ
        matrix[turn == 0] = EYE
    if "saturation" in full:
        kept = full["saturation"][:, :, None]
        matrix = (kept * EYE + (1 - kept) * GREY) @ matrix
    if "contrast" in full:
        factor = full["contrast"]
        matrix, offset = factor[:, :, None] * matrix, factor * offset + 0.5 * (1 - factor)
    if "brightness" in full:
        factor = full["brightness"]
        matrix, offset = factor[:, :, None] * matrix, factor * offset
    if "grey" in full:
        share = full["grey"]
        mix = (1 - share)[:, :, None] * EYE + share[:, :, None] * GREY
        matrix, offset = mix @ matrix, (mix @ offset[:, :, None])[:, :, 0]
    if "channel_shuffle" in full:
        order = ORDERS[full["channel_shuffle"][:, 0].astype(int)]
        rows = np.arange(count)[:, None]
        matrix, offset = matrix[rows, order], offset[rows, order]
    if "invert" in full:
        sign = 1 - 2 * full["invert"]
        matrix, offset = sign[:, :, None] * matrix, sign * offset + full["invert"]
    return np.concatenate([matrix, offset[:, :, None]], 2).astype(np.float32)


def _tables(full: Mapping[str, np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Gamma, posterise, solarise, in that order, of the views that have any, as tables on 256 levels: which (n,), −1 for none, and the tables (t, 3, 256)."""
    changed = np.zeros(count, bool)
    values = np.tile(np.arange(256.0), (count, 1))
    if "gamma" in full:
        power = full["gamma"]
        changed |= power[:, 0] != 1
        values = np.floor(255 * (values / 255) ** power + 0.5)
    if "posterise" in full:
        step = 2.0 ** (8 - full["posterise"])
        changed |= step[:, 0] > 1
        values = np.floor(values / step) * step
    if "solarise" in full:
        threshold = full["solarise"]
        changed |= threshold[:, 0] < 1
        values = np.where(values >= 256 * threshold, 255 - values, values)
    rows = np.flatnonzero(changed)
    which = np.full(count, -1, np.int32)
    which[rows] = np.arange(len(rows))
    return which, np.repeat(values[rows].astype(np.uint8)[:, None], 3, 1)
