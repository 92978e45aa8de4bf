"""Masks: from a coarse grid to pixels, into separate objects, and as run lengths."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.ndimage import binary_erosion, binary_fill_holes, distance_transform_edt, label, uniform_filter

EIGHT = np.ones((3, 3), int)
LEVELS = 24
HOLE = 0.2
"""Share of a part's area up to which a hole in it is filled."""


def enlarge(grid: Float[np.ndarray, "rows columns"], size: tuple[int, int]) -> Float[np.ndarray, "height width"]:
    """A grid at another size, bilinear between the centres of its cells, constant beyond the outermost ones."""
    for axis, (have, want) in enumerate(zip(grid.shape, size)):
        at = ((np.arange(want) + 0.5) * have / want - 0.5).clip(0, have - 1)
        low = np.minimum(at.astype(np.int64), max(have - 2, 0))
        share = np.expand_dims(at - low, 1 - axis)
        grid = np.take(grid, low, axis) * (1 - share) + np.take(grid, np.minimum(low + 1, have - 1), axis) * share
    return grid


def guided(
    guide: Float[np.ndarray, "height width 3"], values: Float[np.ndarray, "height width"], radius: int, floor: float
) -> Float[np.ndarray, "height width"]:
    """Guided filter (He, Sun & Tang 2013): in every window of side 2 radius + 1 the values as a linear function of the colours, averaged over windows.

    q = mean(a)·I + mean(b), a = (Σ + floor · 1)⁻¹ cov(I, p), b = mean(p) − a · mean(I). `guide` in [0, 1], `floor` in its squared units.
    """

    def mean(x: np.ndarray) -> np.ndarray:
        return uniform_filter(x, size=(2 * radius + 1, 2 * radius + 1, *(1,) * (x.ndim - 2)), mode="reflect")

    centre, level = mean(guide), mean(values)
    products = mean((guide[..., :, None] * guide[..., None, :]).reshape(*values.shape, 9)).reshape(*values.shape, 3, 3)
    spread = products - centre[..., :, None] * centre[..., None, :] + floor * np.eye(3)
    along = np.linalg.solve(spread, (mean(guide * values[..., None]) - centre * level[..., None])[..., None])[..., 0]
    rest = level - (along * centre).sum(-1)
    return (mean(along) * guide).sum(-1) + mean(rest)


def separate(inside: Bool[np.ndarray, "height width"], least: int, neck: float) -> list[Bool[np.ndarray, "height width"]]:
    """The objects of a mask, largest first: its connected parts of at least `least` pixels, cut where they are narrower than `neck` times
    the width of the narrower side, then without small holes."""
    found: list[np.ndarray] = []
    pieces, count = label(inside)
    for number in range(1, count + 1):
        piece = pieces == number
        if piece.sum() >= least:
            found += [_filled(part) for part in _cut_necks(piece, neck) if part.sum() >= least]
    return sorted(found, key=lambda part: -int(part.sum()))


def _filled(piece: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "height width"]:
    """A connected piece without its small holes, those up to HOLE of its area."""
    holes, count = label(binary_fill_holes(piece) & ~piece)
    sizes = np.bincount(holes.ravel(), minlength=count + 1)
    return piece | ((sizes <= HOLE * piece.sum())[holes] & (holes > 0))


def contact(mask: Bool[np.ndarray, "height width"]) -> float:
    """The share of a mask's outline, in pixels, that lies on the border of the image: how much it is cut off."""
    outline = mask & ~binary_erosion(mask)
    frame = np.ones(mask.shape, bool)
    frame[1:-1, 1:-1] = False
    return float((outline & frame).sum() / max(outline.sum(), 1))


def _cut_necks(piece: Bool[np.ndarray, "height width"], neck: float) -> list[np.ndarray]:
    """A connected piece, in several where it is narrow between them: every pixel goes with the nearest core."""
    rows, columns = (slice(at.min(), at.max() + 1) for at in np.nonzero(piece))
    window = np.pad(piece[rows, columns], 1)
    depth = distance_transform_edt(window)
    cores, count = _cores(depth, neck) if neck else (window, 1)
    if count < 2:
        return [piece]
    nearest = distance_transform_edt(cores == 0, return_distances=False, return_indices=True)
    owner = np.where(window, cores[tuple(nearest)], 0)[1:-1, 1:-1]
    made = []
    for number in range(1, count + 1):
        part = np.zeros_like(piece)
        part[rows, columns] = owner == number
        made.append(part)
    return made


def _cores(depth: Float[np.ndarray, "height width"], neck: float) -> tuple[Int[np.ndarray, "height width"], int]:
    """Middles of the parts of a mask, numbered from 1, by the depth of its pixels (distance to the outside).

    Eroded step by step, a part falls apart; it counts as two where both remainders are still 1 / neck times as deep as the neck was.
    """
    top, cores, count = depth.max(), np.zeros(depth.shape, np.int64), 0
    stack = [(depth > 0, 0.0)]
    while stack:
        part, start = stack.pop()
        peak = depth[part].max()
        for level in np.linspace(start, peak * neck, LEVELS)[1:]:
            left, pieces = label(part & (depth > level), EIGHT)
            deep = [n for n in range(1, pieces + 1) if depth[left == n].max() * neck >= level] if pieces > 1 else []
            if len(deep) > 1 and level >= 0.02 * top:
                stack += [(left == n, level) for n in deep]
                break
        else:
            count += 1
            cores[part & (depth > peak * neck)] = count
    return cores, count


def counts_of(mask: Bool[np.ndarray, "height width"]) -> Int[np.ndarray, " runs"]:
    """Run lengths of a mask column by column, zeros first: COCO's uncompressed RLE."""
    flat = np.concatenate([[False], mask.reshape(-1, order="F")])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], edges, [mask.size]]))


def mask_of(counts: Int[np.ndarray, " runs"], size: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    """The mask of run lengths; the inverse of counts_of."""
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(size, order="F")


def resize(mask: Bool[np.ndarray, "height width"], size: tuple[int, int]) -> Bool[np.ndarray, "rows columns"]:
    """A mask at another size, by the nearest pixel: none is lost in enlarging."""
    rows, columns = (np.minimum(((np.arange(want) + 0.5) * have / want).astype(np.int64), have - 1) for have, want in zip(mask.shape, size))
    return mask[np.ix_(rows, columns)]


def box_of(mask: Bool[np.ndarray, "height width"]) -> tuple[int, int, int, int]:
    """x, y, width, height of the smallest box around a mask, pixels."""
    down, across = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(across[0]), int(down[0]), int(across[-1] - across[0] + 1), int(down[-1] - down[0] + 1)


def shares(mask: Bool[np.ndarray, "height width"], grid: tuple[int, int]) -> Float[np.ndarray, "rows columns"]:
    """The share of each cell of a grid over the image that lies in a mask."""
    down, across = (_overlaps(have, want) for have, want in zip(mask.shape, grid))
    return down @ mask @ across.T


def _overlaps(have: int, want: int) -> Float[np.ndarray, "want have"]:
    """The share of each of `want` cells of a line that each of `have` pixels covers."""
    edges, ends = np.arange(have + 1) / have, np.arange(want + 1) / want
    over = np.minimum(edges[None, 1:], ends[1:, None]) - np.maximum(edges[None, :-1], ends[:-1, None])
    return over.clip(0) * want
