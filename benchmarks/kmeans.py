"""k-means of many vectors beside FAISS: seconds, peak memory and inertia, at equal threads.

    python benchmarks/kmeans.py [--count 1000000] [--dim 384] [--clusters 1000] [--iterations 25] [--threads 1] [--rounds 1]
                                [--data groups|noise|FILE.npy] [--sides attar faiss faiss-all …] [--out FILE.json]

Made float16 vectors in a file (`groups`: 5,000 groups of unequal size in directions of falling variance, scaled to length one, as
embeddings are; `noise`: no structure at all), or your own. Each side runs in a process of its own, which times reading and fitting
and reports the peak that the operating system counted:

    faiss       faiss.Kmeans as it comes: 256 vectors per centroid are drawn, 25 iterations; it needs all vectors in float32
    faiss-all   the same on all vectors
    attar       all vectors, read block by block; until its inertia is that of the FAISS side that runs before it, or `iterations`
    attar-full  the same, to the number of iterations that FAISS has over all vectors, whatever the inertia
    attar-plain the same without bounds: what they bring
    attar-mini  one pass in mini-batches

The inertia of every side is taken over all vectors by one program. Lower is better in every column. At 1,000,000 × 384, k = 1,000 and one
thread the sides attar and faiss take about a minute each, faiss-all and attar-plain five.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from environment import record

SIDES = ("faiss", "attar", "faiss-all", "attar", "attar-full", "attar-mini")
BLOCK = 4096


def make(path: Path, kind: str, count: int, dim: int) -> None:
    """Float16 vectors, written block by block."""
    rng = np.random.default_rng(0)
    spread = np.ones(dim) if kind == "noise" else np.arange(1, dim + 1) ** -0.5
    centres = rng.normal(size=(5000, dim)) * spread
    share = rng.dirichlet(np.full(5000, 0.5))
    out = np.lib.format.open_memmap(path, "w+", np.float16, (count, dim))
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        rows = rng.normal(size=(size, dim)) * spread
        if kind == "groups":
            rows = centres[rng.choice(5000, size, p=share)] + 0.8 * rows
        out[start : start + size] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    out.flush()


def inertia(path: Path, centroids: np.ndarray) -> float:
    """Σ‖x − c‖² over all vectors, by plain products."""
    vectors, half, total = np.load(path, mmap_mode="r"), 0.5 * (centroids.astype(np.float64) ** 2).sum(1).astype(np.float32), 0.0
    for start in range(0, len(vectors), BLOCK):
        rows = vectors[start : start + BLOCK].astype(np.float32)
        nearest = (half - rows @ centroids.T).argmin(1)
        total += float(((rows - centroids[nearest]).astype(np.float64) ** 2).sum())
    return total


def peak_mb() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def side(name: str, path: Path, clusters: int, iterations: int, threads: int, seed: int, target: float, out: Path) -> dict:
    """One fit in this process; the clock starts after the imports and, for attar, after a small fit that compiles."""
    if name.startswith("faiss"):
        import faiss

        faiss.omp_set_num_threads(threads)
        base, start = peak_mb(), time.perf_counter()
        vectors = np.load(path, mmap_mode="r").astype(np.float32)
        options = {"max_points_per_centroid": len(vectors)} if name == "faiss-all" else {}
        fit = faiss.Kmeans(vectors.shape[1], clusters, niter=iterations, seed=1 + seed, **options)
        fit.train(vectors)
        seconds, passes, centroids = time.perf_counter() - start, iterations, fit.centroids
    else:
        from attar.stages.cluster import kmeans as doors
        from attar.stages.cluster import lloyd

        small = np.random.default_rng(0).normal(size=(20_000, 8)).astype(np.float16)
        doors.kmeans(small, 200, np.random.default_rng(0), threads=threads)
        base, start, source = peak_mb(), time.perf_counter(), np.load(path, mmap_mode="r")
        rng = np.random.default_rng(seed)
        if name == "attar-mini":
            found = doors.minibatch(source, clusters, rng, threads=threads)
        else:
            if name == "attar-plain":
                doors.BOUNDS = lloyd.BOUNDS = 0  # type: ignore[misc]
            enough = target if name == "attar" else 0.0

            def watch(inertia: float) -> bool:
                print(f"    {name}: {time.perf_counter() - start:6.1f} s, inertia {inertia:.6g}", file=sys.stderr, flush=True)
                return inertia <= enough

            found = doors.kmeans(source, clusters, rng, iterations=iterations, tolerance=0, threads=threads, watch=watch)
        seconds, passes, centroids = time.perf_counter() - start, len(found.history), found.centroids
    np.save(out, centroids)
    return {"side": name, "seconds": seconds, "peak_mb": peak_mb(), "before_mb": base, "iterations": passes}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (("count", 1_000_000), ("dim", 384), ("clusters", 1000), ("iterations", 25), ("threads", 1), ("rounds", 1)):
        arguments.add_argument(f"--{flag}", type=int, default=default)
    arguments.add_argument("--data", default="groups")
    arguments.add_argument("--sides", nargs="+", default=SIDES)
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.one:
        name, path, seed, target, out = given.one
        print(json.dumps(side(name, Path(path), given.clusters, given.iterations, given.threads, int(seed), float(target), Path(out))))
        return
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(given.data)
        if given.data in ("groups", "noise"):
            path = Path(folder) / "vectors.npy"
            make(path, given.data, given.count, given.dim)
        flags = ["--clusters", given.clusters, "--iterations", given.iterations, "--threads", given.threads]
        for seed in range(given.rounds):
            target = 0.0
            for name in given.sides:
                out = Path(folder) / "centroids.npy"
                command = [sys.executable, __file__, *flags, "--one", name, path, seed, target, out]
                done = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True)
                row = json.loads(done.stdout.splitlines()[-1]) | {"seed": seed, "inertia": inertia(path, np.load(out)), "target": target}
                target = row["inertia"] if name.startswith("faiss") else target
                rows.append(row)
                print(
                    f"{name:12} seed {seed}: {row['seconds']:7.1f} s, {row['iterations']:3} iterations over all or drawn vectors, "
                    f"peak {row['peak_mb']:6.0f} MB (of it {row['before_mb']:.0f} libraries), inertia {row['inertia']:.6g}",
                    flush=True,
                )
    summary = {name: _median([row for row in rows if row["side"] == name]) for name in dict.fromkeys(given.sides)}
    record(given, rows=rows, summary=summary)


def _median(rows: list[dict]) -> dict[str, list[float]]:
    """Median, least and most of each figure."""
    figures = ("seconds", "peak_mb", "inertia")
    return {key: [round(f([row[key] for row in rows]), 2) for f in (statistics.median, min, max)] for key in figures}


if __name__ == "__main__":
    main()
