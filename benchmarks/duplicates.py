"""All pairs of vectors over a threshold: attar.stages.curate.pairs beside FAISS flat range search, at equal threads.

    python benchmarks/duplicates.py [--sizes 10000 100000 1000000] [--dim 384] [--threshold 0.95] [--kinds clustered even] [--threads 1]
                                    [--rounds 3] [--faiss-queries 10000] [--out FILE.json]

Made unit vectors in a float16 file: `clustered` (n / 100 groups, 100 directions or more, variances falling like those of embeddings) or `even`
(no structure at all), and 1 % of the rows replaced by near copies of others. Each side runs in a process of its own that maps the file; the time covers
everything after that, the peak is what the operating system counted, the mapped file included. FAISS (IndexFlatIP.range_search, float32) gets every row as a query
up to `--faiss-queries` of them; above that its search time is taken on evenly spaced queries and scaled by n / queries, which the table says. Recall is that
of the pairs brute force in float64 finds among all rows for up to 500 evenly spaced rows; a pair within 1e-12 of the threshold counts as over it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from environment import record

ATTAR = """
from attar.stages.curate.pairs import similar_pairs
list(similar_pairs(np.array(rows[:600]), threshold))  # compiled
start, left, right = time.perf_counter(), [], []
for found in similar_pairs(rows, threshold, workers=threads):
    left.append(found.left), right.append(found.right)
seconds, share = time.perf_counter() - start, 1.0
left, right = np.concatenate([*left, []]).astype(int), np.concatenate([*right, []]).astype(int)
"""
FAISS = """
import faiss
faiss.omp_set_num_threads(threads)
start, index = time.perf_counter(), faiss.IndexFlatIP(rows.shape[1])
for low in range(0, len(rows), 65536):
    index.add(rows[low:low + 65536].astype(np.float32))
built, left, right = time.perf_counter() - start, [], []
queries = np.arange(0, len(rows), max(1, -(-len(rows) // most)))
start = time.perf_counter()
for low in range(0, len(queries), 4096):
    some = queries[low:low + 4096]
    limits, _, labels = index.range_search(rows[some].astype(np.float32), threshold)
    left.append(np.repeat(some, np.diff(limits.astype(int)))), right.append(labels)
share = len(queries) / len(rows)
seconds = built + (time.perf_counter() - start) / share
left, right = np.concatenate(left), np.concatenate(right)
once = left < right
left, right = left[once], right[once]
"""
HEAD = """
import json, resource, sys, time
import numpy as np
path, threshold, threads, most, out = json.loads(sys.argv[1])
rows = np.load(path, mmap_mode="r")
"""
TAIL = """
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
np.save(out, np.stack([left, right]))
print(json.dumps({"seconds": seconds, "peak_mb": peak, "share": share, "pairs": len(left)}))
"""


def make(path: Path, kind: str, count: int, dim: int, seed: int) -> None:
    """Float16 unit vectors with 1 % near copies, written block by block."""
    rng = np.random.default_rng(seed)
    spread = np.arange(1, dim + 1) ** -0.5 if kind == "clustered" else np.ones(dim)
    centres = rng.normal(size=(max(10, count // 100), dim)) * spread
    out = np.lib.format.open_memmap(path, "w+", np.float16, (count, dim))
    for start in range(0, count, 16384):
        size = min(16384, count - start)
        rows = rng.normal(size=(size, dim)) * spread
        if kind == "clustered":
            rows = centres[rng.integers(0, len(centres), size)] + 0.7 * rows
        out[start : start + size] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    source, target = rng.integers(0, count, (2, count // 100))
    copies = out[source].astype(np.float64) + 0.005 * rng.normal(size=(len(source), dim))
    out[target] = copies / np.linalg.norm(copies, axis=1, keepdims=True)
    out.flush()


def truth(path: Path, threshold: float, most: int = 500) -> set[tuple[int, int]]:
    """Pairs of evenly spaced rows with any row, by brute force in float64."""
    rows = np.load(path, mmap_mode="r")
    queries = np.arange(0, len(rows), max(1, -(-len(rows) // most)))
    own = rows[queries].astype(np.float64)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    pairs = set()
    for start in range(0, len(rows), 8192):
        block = rows[start : start + 8192].astype(np.float64)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        i, j = np.nonzero(own @ block.T >= threshold - 1e-12)
        pairs |= {(min(a, b), max(a, b)) for a, b in zip(queries[i].tolist(), (j + start).tolist()) if a != b}
    return pairs


def measure(code: str, path: Path, given: argparse.Namespace, home: Path) -> dict[str, float]:
    out = home / "pairs.npy"
    variables = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(given.threads))
    words = json.dumps([str(path), given.threshold, given.threads, given.faiss_queries, str(out)])
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code + TAIL, words], capture_output=True, text=True, env={**os.environ, **variables}
    )
    if done.returncode:
        raise SystemExit(f"a side failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--threshold", type=float, default=0.95)
    parser.add_argument("--kinds", nargs="+", choices=("clustered", "even"), default=["clustered", "even"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--faiss-queries", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    print(f"{'kind':10} {'vectors':>9} {'side':6} {'seconds':>9} {'spread':>8} {'peak MB':>8} {'pairs':>9} {'recall':>7}  FAISS queries")
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "vectors.npy"
        for kind, count in ((kind, count) for kind in given.kinds for count in given.sizes):
            make(path, kind, count, given.dim, 0)
            expected = truth(path, given.threshold)
            for side, code in (("attar", ATTAR), ("faiss", FAISS)):
                runs = [measure(code, path, given, Path(home)) for _ in range(given.rounds)]
                found = set(map(tuple, np.load(Path(home) / "pairs.npy").T.tolist()))
                share = runs[0]["share"]
                recall = len(expected & found) / len(expected) if expected and share == 1 else None
                seconds = [run["seconds"] for run in runs]
                row = {"kind": kind, "count": count, "side": side, "seconds": statistics.median(seconds), "all_seconds": seconds}
                row |= {"peak_mb": max(run["peak_mb"] for run in runs), "pairs": runs[0]["pairs"], "recall": recall, "query_share": share}
                row |= {"checked_pairs": len(expected)}
                print(
                    f"{kind:10} {count:>9} {side:6} {row['seconds']:>9.2f} {max(seconds) - min(seconds):>8.2f} {row['peak_mb']:>8.0f} "
                    f"{row['pairs']:>9} {'–' if recall is None else f'{recall:.4f}':>7}  "
                    f"{'' if side == 'attar' else 'all' if share == 1 else f'{share:.2%}, time scaled'}"
                )
                rows.append(row)
    record(given, rows=rows)


if __name__ == "__main__":
    main()
