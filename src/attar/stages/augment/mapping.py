"""Where a view's pixels come from, and where the source's points go: elastic, radial warp and matrix, one view at a time, in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Float64, Int64, Shaped

NONE, SPHERICAL, CUBIC = 0, 1, 2
NEAREST = 1e-6
"""The smallest homogeneous coordinate that is divided by; what lies behind the horizon is sent far away."""


def forward(
    x: Shaped[np.ndarray, "*points"],
    y: Shaped[np.ndarray, "*points"],
    size: tuple[int, int],
    matrix: Float[np.ndarray, "3 3"],
    warp: Float[np.ndarray, " 4"],
    elastic: Float[np.ndarray, "2 5 5"],
) -> tuple[Float64[np.ndarray, "*points"], Float64[np.ndarray, "*points"]]:
    """Source coordinates of points of the view (pixels, centres at + ½): p' = matrix · radial(p + displacement(p))."""
    height, width = size
    half = max(height, width) / 2
    u, v = (x - width / 2) / half, (y - height / 2) / half
    if elastic.any():
        u, v = u + displacement(elastic[0], x, y, size), v + displacement(elastic[1], x, y, size)
    u, v = radial(u, v, warp)
    return project(np.asarray(matrix, np.float64), u * half + width / 2, v * half + height / 2)


def backward(
    x: Shaped[np.ndarray, " points"],
    y: Shaped[np.ndarray, " points"],
    size: tuple[int, int],
    matrix: Float[np.ndarray, "3 3"],
    warp: Float[np.ndarray, " 4"],
    elastic: Float[np.ndarray, "2 5 5"],
) -> tuple[Float64[np.ndarray, " points"], Float64[np.ndarray, " points"]]:
    """View coordinates of points of the source: the inverse of `forward`, to 1e-5 pixels wherever the warp does not fold."""
    height, width = size
    half = max(height, width) / 2
    x, y = project(np.linalg.inv(np.asarray(matrix, np.float64)), np.asarray(x, np.float64), np.asarray(y, np.float64))
    goal_u, goal_v = _unradial((x - width / 2) / half, (y - height / 2) / half, warp)
    if not elastic.any():
        return goal_u * half + width / 2, goal_v * half + height / 2

    def bent(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = u * half + width / 2, v * half + height / 2
        return u + displacement(elastic[0], *at, size), v + displacement(elastic[1], *at, size)

    u, v = _newton(bent, goal_u, goal_v)
    return u * half + width / 2, v * half + height / 2


def _newton(
    function: Callable[..., tuple[np.ndarray, np.ndarray]], goal_u: np.ndarray, goal_v: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The points that a function of points, not far from the identity, takes to the goal; slopes by differences."""
    u, v, step = goal_u, goal_v, 1e-6
    for _ in range(30):
        (at_u, at_v), (right_u, right_v), (low_u, low_v) = function(u, v), function(u + step, v), function(u, v + step)
        a, b, c, d = (right_u - at_u) / step, (low_u - at_u) / step, (right_v - at_v) / step, (low_v - at_v) / step
        area, off_u, off_v = np.maximum(a * d - b * c, 0.05), goal_u - at_u, goal_v - at_v
        u, v = u + (d * off_u - b * off_v) / area, v + (a * off_v - c * off_u) / area
    return u, v


def project(matrix: Float64[np.ndarray, "3 3"], x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Homogeneous product of (x, y, 1), divided by its last coordinate."""
    (a, b, c), (d, e, f), (g, h, i) = matrix
    bottom = np.maximum(g * x + h * y + i, NEAREST)
    return (a * x + b * y + c) / bottom, (d * x + e * y + f) / bottom


def displacement(grid: Float[np.ndarray, "5 5"], x: np.ndarray, y: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The grid bilinearly interpolated at pixels x, y of the view, whose edges its outer nodes lie on; constant beyond them."""
    last = len(grid) - 1
    column, row = np.clip(x / size[1] * last, 0, last), np.clip(y / size[0] * last, 0, last)
    left, top = np.minimum(column.astype(int), last - 1), np.minimum(row.astype(int), last - 1)
    right, low = column - left, row - top
    upper = grid[top, left] * (1 - right) + grid[top, left + 1] * right
    lower = grid[top + 1, left] * (1 - right) + grid[top + 1, left + 1] * right
    return upper * (1 - low) + lower * low


def radial(u: np.ndarray, v: np.ndarray, warp: Float[np.ndarray, " 4"]) -> tuple[np.ndarray, np.ndarray]:
    """Points moved along the ray from the centre: r → `_reach(r)`."""
    kind, amount, centre_u, centre_v = (float(part) for part in warp)
    if kind == NONE:
        return u, v
    u, v = u - centre_u, v - centre_v
    r = np.maximum(np.hypot(u, v), 1e-6)
    factor = _reach(r, kind, amount) / r
    return centre_u + u * factor, centre_v + v * factor


def _reach(r: np.ndarray, kind: float, amount: float) -> np.ndarray:
    """Distance from the centre at which a view shows what lies at r, for one warp.

    cubic: r (1 + a r²). spherical, within r < 1: (1 − a) r + a 2/π asin r (bulged) where a > 0, (1 + a) r − a sin(π/2 r) (pinched) where a < 0.
    """
    if kind == CUBIC:
        return r * (1 + amount * r * r)
    inside = np.minimum(r, 1)
    curve = 2 / np.pi * np.arcsin(inside) if amount > 0 else np.sin(np.pi / 2 * inside)
    return np.where(r < 1, (1 - abs(amount)) * r + abs(amount) * curve, r)


def _unradial(u: np.ndarray, v: np.ndarray, warp: Float[np.ndarray, " 4"]) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `radial` by bisection of the radius, which `_reach` does not shrink beyond 1.9."""
    kind, amount, centre_u, centre_v = (float(part) for part in warp)
    if kind == NONE:
        return u, v
    u, v = u - centre_u, v - centre_v
    goal = np.maximum(np.hypot(u, v), 1e-12)
    top = 1 / np.sqrt(-3 * amount) if kind == CUBIC and amount < 0 else 2 * goal.max(initial=1.0)  # where the cubic folds over
    low, high = np.zeros_like(goal), np.full_like(goal, top)
    for _ in range(60):
        middle = (low + high) / 2
        below = _reach(middle, kind, amount) < goal
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return centre_u + u * low / goal, centre_v + v * low / goal


def steps(matrix: Float[np.ndarray, "n 3 3"], size: tuple[int, int]) -> Int64[np.ndarray, " n"]:
    """k of the k × k boxes whose means are sampled: the whole part of the smaller shrink of the two axes, at the view's centre; at least 1."""
    centre = np.array([size[1] / 2, size[0] / 2, 1])
    image = matrix @ centre
    bottom = np.maximum(image[:, 2], NEAREST)[:, None, None]
    slope = (matrix[:, :2, :2] - (image[:, :2, None] / bottom) * matrix[:, 2:, :2]) / bottom
    shrink = np.sqrt((slope * slope).sum(1)).min(1)
    return np.maximum(np.floor(np.minimum(shrink, 2**20) + 1e-6), 1).astype(np.int64)


def quad_matrix(corners: Float[np.ndarray, "n 4 2"]) -> Float64[np.ndarray, "n 3 3"]:
    """The homography from the square [−1, 1]² to corners (−1, −1), (1, −1), (1, 1), (−1, 1) moved to these points (Heckbert 1989, section 2.2.3)."""
    p0, p1, p2, p3 = np.moveaxis(np.asarray(corners, np.float64), 1, 0)
    d1, d2, bend = p1 - p2, p3 - p2, p0 - p1 + p2 - p3
    area = d1[:, 0] * d2[:, 1] - d1[:, 1] * d2[:, 0]
    g = (bend[:, 0] * d2[:, 1] - bend[:, 1] * d2[:, 0]) / area
    h = (d1[:, 0] * bend[:, 1] - d1[:, 1] * bend[:, 0]) / area
    matrix = np.empty((len(p0), 3, 3))
    matrix[:, :2, 0], matrix[:, :2, 1], matrix[:, :2, 2] = p1 - p0 + g[:, None] * p1, p3 - p0 + h[:, None] * p3, p0
    matrix[:, 2] = np.stack([g, h, np.ones_like(g)], 1)
    return matrix @ np.array([[0.5, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1]])  # from [−1, 1] to the unit square


def border_index(index: Int64[np.ndarray, "*pixels"], count: int, border: str) -> Int64[np.ndarray, "*pixels"]:
    """Indices of any size as indices 0 … count − 1: mirrored at the pixel's edge (… 1 0 | 0 1 …) for "reflect", else the nearest."""
    if border != "reflect":
        return np.clip(index, 0, count - 1)
    folded = index % (2 * count)
    return np.minimum(folded, 2 * count - 1 - folded)
