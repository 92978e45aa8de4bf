"""Items that are hardly worth learning from: blank, blurred, dark, glaring, odd in size or shape; flagged with the reason.

Every flag needs a fault that anyone would see and that is rare in the set: where more than COMMON of the items share it, it is what the set is
like (night skies, scanned pages), and no item is flagged for it.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8

from attar.config import FLAGS
from attar.records import Items

COMMON = 0.1  # share of the items above which a fault is what the set is like
FLAT = 2.0  # grey levels of standard deviation over a thumbnail below which it is blank
DARKEST, LIGHTEST = 40, 225  # grey levels that nearly all of a thumbnail lies below or above
BLURRED = 0.55  # of modalities/blur.py: no sharp photo reaches it
FAR = 3.5  # robust standard deviations from the median (Iglewicz and Hoaglin 1993)
SMALL = 16  # times fewer pixels than the median item
LONG = 3  # times longer for its height, or higher for its length, than the median item


def _far(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Signed robust standard deviations from the median, 0 for NaN: (v − median) / (1.4826 MAD)."""
    if not np.isfinite(values).any():
        return np.zeros(len(values))
    away = values - np.nanmedian(values)
    return np.nan_to_num(away / max(1.4826 * float(np.nanmedian(np.abs(away))), 1e-3))


def flags(
    thumbs: UInt8[np.ndarray, "n t"], width: Int[np.ndarray, " n"], height: Int[np.ndarray, " n"], blurs: Float32[np.ndarray, " n"]
) -> dict[str, np.ndarray]:
    """Name of the flag → (n,) bool, from thumbnails, sizes in pixels and blur; `COMMON` faults flag nothing.

    A blank item has no other flag of what is to be seen: nothing is.
    """
    low, high = np.percentile(thumbs, (5, 95), axis=1) if len(thumbs) else (np.empty(0), np.empty(0))
    blank = thumbs.std(1, dtype=np.float32) < FLAT
    pixels, shape = width.astype(np.float64) * height, np.log(width / height)
    found = {
        "blank": blank,
        "blurred": ~blank & (blurs > BLURRED) & (_far(blurs) > FAR),
        "dark": ~blank & (high < DARKEST),
        "glaring": ~blank & (low > LIGHTEST),
        "odd size": pixels * SMALL < np.median(pixels) if len(pixels) else blank,
        "odd shape": np.abs(shape - np.median(shape)) > np.log(LONG) if len(shape) else blank,
    }
    return {name: rows & (rows.mean() <= COMMON) if len(rows) else rows for name, rows in found.items()}


def of_items(items: Items) -> dict[str, np.ndarray]:
    """The flags of a scan's items, name → (n,) bool."""
    thumbs = np.frombuffer(b"".join(items.table["thumb"].to_pylist()), np.uint8).reshape(len(items), -1)
    return flags(thumbs, *(items.column(name) for name in ("width", "height", "blur")))


def words(found: dict[str, np.ndarray], count: int) -> np.ndarray:
    """The flags of each item in words, "dark, odd size"; empty where there are none: (n,) object."""
    told = [[name for name in FLAGS if found[name][row]] for row in range(count)] if any(rows.any() for rows in found.values()) else []
    return np.array([", ".join(names) for names in told] or [""] * count, object)
