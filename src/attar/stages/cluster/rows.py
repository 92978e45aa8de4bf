"""Vectors that are read in blocks, wherever they lie: in memory, in a mapped file, or in shards."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from attar.errors import DataError
from attar.records import Vectors

BLOCK = 2048  # rows read at a time: with 384 dimensions 3 MB in float32


@dataclass(frozen=True)
class Rows:
    """(count, dim) vectors as blocks of rows; each call reads one, from any thread, in the type it is kept in."""

    count: int
    dim: int
    blocks: Sequence[Callable[[], np.ndarray]]

    def read(self, number: int) -> np.ndarray:
        """One block, (m, dim) float16 or float32; raises DataError for a block of another length of vectors."""
        block = self.blocks[number]()
        if block.ndim != 2 or block.shape[1] != self.dim:
            raise DataError(
                f"block {number} of the vectors has shape {block.shape}, expected (rows, {self.dim}) as the others have: "
                "vectors of two encoders cannot be clustered together; embed all items with one"
            )
        return block if block.dtype in (np.float16, np.float32) else block.astype(np.float32)

    def sample(self, most: int, rng: np.random.Generator) -> np.ndarray:
        """At most that many rows, drawn without replacement, in their order: (m, dim) in the type they are kept in."""
        chosen = np.sort(rng.choice(self.count, min(most, self.count), replace=False))
        parts, start = [], 0
        for number in range(len(self.blocks)):
            block = self.read(number)
            low, high = np.searchsorted(chosen, [start, start + len(block)])
            parts.append(block[chosen[low:high] - start])
            start += len(block)
        if start != self.count:
            raise DataError(f"the vectors have {start} rows, expected {self.count}: a shard is missing or cut; embed the items again")
        return np.concatenate(parts)


def _of_file(path: str, dtype: np.dtype, offset: int, dim: int, start: int, stop: int) -> np.ndarray:
    values = np.fromfile(path, dtype, (stop - start) * dim, offset=offset + start * dim * dtype.itemsize)
    return values.reshape(stop - start, dim)


def rows_of(source: np.ndarray | Vectors | Rows) -> Rows:
    """The rows of an (n, d) array, of a mapped file, or of a record's shards.

    A mapped file is read, not mapped: pages of a mapping stay in the process and count as its memory.
    """
    if isinstance(source, Rows):
        return source
    if isinstance(source, Vectors):
        return Rows(source.count, source.dim, [functools.partial(_values, shard) for shard in source.shards])
    (count, dim), starts = source.shape, range(0, len(source), BLOCK)
    if isinstance(source, np.memmap) and isinstance(source.base, mmap.mmap) and source.flags.c_contiguous and source.filename:
        read = functools.partial(_of_file, str(source.filename), source.dtype, source.offset, dim)
        return Rows(count, dim, [functools.partial(read, start, min(start + BLOCK, count)) for start in starts])
    return Rows(count, dim, [functools.partial(source.__getitem__, slice(start, start + BLOCK)) for start in starts])


def _values(shard: Callable) -> np.ndarray:
    return shard().values
