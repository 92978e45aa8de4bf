"""What a plan means: one view at a time, one operation after the other, float64 numpy. Slow and plain; the executors are tested against it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64, UInt8

from attar.stages.augment.mapping import border_index
from attar.stages.augment.plan import Border, Plan

View = Float64[np.ndarray, "3 height width"]

REACH = 2.5
"""Sigmas after which a Gaussian is cut off."""
MASK = 0xFFFFFFFF
LUMA_TABLE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)  # ITU-T T.81, table K.1
CHROMA_TABLE = np.array(
    [
        [17, 18, 24, 47, 99, 99, 99, 99],
        [18, 21, 26, 66, 99, 99, 99, 99],
        [24, 26, 56, 99, 99, 99, 99, 99],
        [47, 66, 99, 99, 99, 99, 99, 99],
        [99, 99, 99, 99, 99, 99, 99, 99],
        [99, 99, 99, 99, 99, 99, 99, 99],
        [99, 99, 99, 99, 99, 99, 99, 99],
        [99, 99, 99, 99, 99, 99, 99, 99],
    ]
)  # table K.2
TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])  # ITU-T T.871 (JFIF)
TO_RGB = np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]])


def render(
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]], plan: Plan, mean: Sequence[float], std: Sequence[float]
) -> Float64[np.ndarray, "n 3 height width"]:
    """Every view of a plan: (value − mean) / std per channel, values in [0, 1]."""
    views = np.stack([_view(images[int(source)], plan, view) for view, source in enumerate(plan.source)])
    return (views - np.asarray(mean, np.float64)[:, None, None]) / np.asarray(std, np.float64)[:, None, None]


def _view(image: UInt8[np.ndarray, "rows columns 3"], plan: Plan, view: int) -> View:
    box = int(plan.steps()[view])
    x, y = plan.coordinates(view)
    v = resample(box_mean(image / 255, box), x / box, y / box, plan.border, plan.fill)
    v = recolour(v, plan.colour[view])
    if plan.equalise[view]:
        v = equalise(v)
    if plan.table[view] >= 0:
        v = look_up(v, plan.tables[plan.table[view]])
    if plan.blur[view] > 0:
        v = gaussian(v, float(plan.blur[view]))
    if plan.sharpen[view] > 0:
        v = v + float(plan.sharpen[view]) * (v - gaussian(v, 1.0))
    if plan.noise[view] > 0:
        v = v + float(plan.noise[view]) * normals(int(plan.seed[view]), v.shape)
    if plan.jpeg[view] > 0:
        v = jpeg(v, int(plan.jpeg[view]))
    return erase(v.clip(0, 1), plan.erase[view])


def box_mean(image: Float64[np.ndarray, "rows columns 3"], side: int) -> Float64[np.ndarray, "_ _ 3"]:
    """Means over side × side boxes from the upper left; those at the right and lower edge are over what there is of them."""
    rows = [image[top : top + side] for top in range(0, image.shape[0], side)]
    return np.array([[row[:, left : left + side].mean((0, 1)) for left in range(0, image.shape[1], side)] for row in rows])


def resample(image: Float64[np.ndarray, "rows columns 3"], x: np.ndarray, y: np.ndarray, border: Border, fill: np.ndarray) -> View:
    """Bilinear interpolation at pixel coordinates whose centres are at + ½."""
    left, top = np.floor(x - 0.5).astype(np.int64), np.floor(y - 0.5).astype(np.int64)
    right, low = (x - 0.5 - left)[..., None], (y - 0.5 - top)[..., None]

    def pixel(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        rows, columns = image.shape[:2]
        values = image[border_index(row, rows, border), border_index(column, columns, border)]
        outside = (row < 0) | (row >= rows) | (column < 0) | (column >= columns)
        return np.where(outside[..., None] & (border == "constant"), fill, values)

    upper = pixel(top, left) * (1 - right) + pixel(top, left + 1) * right
    lower = pixel(top + 1, left) * (1 - right) + pixel(top + 1, left + 1) * right
    return (upper * (1 - low) + lower * low).transpose(2, 0, 1)


def recolour(v: View, matrix: Float[np.ndarray, "3 4"]) -> View:
    """The affine colour map, clipped to [0, 1]."""
    return (np.tensordot(matrix[:, :3].astype(np.float64), v, 1) + matrix[:, 3, None, None]).clip(0, 1)


def levels(v: View) -> np.ndarray:
    """Values in [0, 1] as levels 0 … 255."""
    return np.floor(255 * v + 0.5).astype(np.int64)


def equalise(v: View) -> View:
    """Level → ⌊255 (cdf − first) / (pixels − first) + ½⌋ per channel, first being how many have the lowest level; one level alone stays."""
    out = np.empty_like(v)
    for channel, level in enumerate(levels(v)):
        above = np.cumsum(np.bincount(level.ravel(), minlength=256))
        first = above[above > 0][0]
        rest = level.size - first
        table = (510 * (above - first) + rest) // (2 * rest) if rest else np.arange(256)
        out[channel] = table.clip(0, 255)[level] / 255
    return out


def look_up(v: View, table: UInt8[np.ndarray, "3 256"]) -> View:
    return np.stack([row[level] / 255 for row, level in zip(table, levels(v))])


def gaussian(v: View, sigma: float) -> View:
    """Separable Gaussian of reach ⌈2.5 sigma⌉, of sum 1, mirrored at the centre of the edge's pixel (… 2 1 | 0 1 2 …)."""
    reach = int(np.ceil(REACH * np.float32(sigma)))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (1, 2):
        wide = np.pad(v, [(reach, reach) if a == axis else (0, 0) for a in range(3)], mode="reflect")
        v = np.apply_along_axis(np.convolve, axis, wide, kernel, "valid")
    return v


def scramble(x: np.ndarray | np.uint64) -> np.ndarray | np.uint64:
    """lowbias32 (Wellons 2018): an invertible hash of 32 bits."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def normals(seed: int, shape: tuple[int, ...]) -> View:
    """Standard normals (3, height, width), a function of the seed and the place alone.

    i = (channel · height + y) · width + x;  a = hash(i xor hash(seed));  b = hash(a + 0x9E3779B9), all of 32 bits;
    √(−2 ln((⌊a / 2⁸⌋ + ½) / 2²⁴)) · cos(2π ⌊b / 2⁸⌋ / 2²⁴)   (Box & Muller 1958).
    """
    i = np.arange(np.prod(shape), dtype=np.uint64).reshape(shape) & np.uint64(MASK)
    a = scramble(i ^ scramble(np.uint64(seed)))
    b = scramble((a + np.uint64(0x9E3779B9)) & np.uint64(MASK))
    return np.sqrt(-2 * np.log(((a >> 8) + 0.5) / 2**24)) * np.cos(2 * np.pi * (b >> 8) / 2**24)


def quantisers(quality: int) -> np.ndarray:
    """Steps (3, 8, 8) for Y, Cb, Cr, scaled by quality 1 … 100 as libjpeg does."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return np.stack([((table * scale + 50) // 100).clip(1, 255) for table in (LUMA_TABLE, CHROMA_TABLE, CHROMA_TABLE)])


def dct_matrix() -> Float64[np.ndarray, "8 8"]:
    """Orthonormal DCT-II: row k is √(2/8) cos(π k (2 x + 1) / 16), row 0 divided by √2."""
    k, x = np.mgrid[:8, :8]
    return np.cos(np.pi * k * (2 * x + 1) / 16) * np.where(k == 0, np.sqrt(1 / 8), np.sqrt(2 / 8))


def jpeg(v: View, quality: int) -> View:
    """What JPEG of a quality keeps: 8 × 8 DCT in YCbCr without subsampling, rounded (⌊c / step + ½⌋) to steps. Edges are continued to whole blocks."""
    _, height, width = v.shape
    wide = np.pad(v, [(0, 0), (0, -height % 8), (0, -width % 8)], mode="edge")
    ycc = np.tensordot(TO_YCC, 255 * wide, 1) - np.array([128, 0, 0])[:, None, None]
    dct, steps = dct_matrix(), quantisers(quality)
    for channel in range(3):
        for top in range(0, wide.shape[1], 8):
            for left in range(0, wide.shape[2], 8):
                block = ycc[channel, top : top + 8, left : left + 8]
                coefficients = np.floor(dct @ block @ dct.T / steps[channel] + 0.5) * steps[channel]
                ycc[channel, top : top + 8, left : left + 8] = dct.T @ coefficients @ dct
    rgb = np.tensordot(TO_RGB, ycc + np.array([128, 0, 0])[:, None, None], 1) / 255
    return rgb[:, :height, :width]


def erase(v: View, box: Float[np.ndarray, " 4"]) -> View:
    """Pixels whose centre lies within the box become 0.5."""
    _, height, width = v.shape
    y, x = np.mgrid[:height, :width] + 0.5
    x0, y0, x1, y1 = box.astype(np.float64)
    inside = (x > x0 * width) & (x < x1 * width) & (y > y0 * height) & (y < y1 * height)
    return np.where(inside, 0.5, v)
