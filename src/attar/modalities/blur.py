"""How blurred a photo looks, whatever its contrast."""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE = 256  # pixels of the longer side that blur is judged at: about what models see
WIDTH = 9  # pixels of the filter that blurs again


def blur(image: Image.Image) -> float:
    """How blurred an RGB image looks at 256 to 511 pixels: 0 (sharp) … 1 (blurring again changes nothing), NaN where no pixel differs.

    Crete, Dolmiere, Ladret and Nicolas 2007: the share of the differences between neighbours that survives a mean filter of 9 pixels,
    along rows and along columns; the larger of both. Unlike the variance of the Laplacian it does not depend on contrast.
    """
    factor = max(1, max(image.size) // SIDE)
    grey = np.asarray((image.reduce(factor) if factor > 1 else image).convert("L")).astype(np.int16)
    shares = []
    for lines in (grey, grey.T):
        once = WIDTH * np.abs(np.diff(lines, axis=0))
        padded = np.pad(lines, ((WIDTH // 2, WIDTH // 2), (0, 0)), mode="edge")
        twice = np.abs(padded[WIDTH:] - padded[:-WIDTH])  # difference of neighbouring means of WIDTH, times WIDTH
        total = once.sum(dtype=np.int64)
        if total:
            shares.append(1 - float(np.maximum(once - twice, 0).sum(dtype=np.int64) / total))
    return max(shares, default=float("nan"))
