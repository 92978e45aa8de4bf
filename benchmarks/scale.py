"""How time and memory of the vector stages grow, and what the cost model of docs/scale.md says of sizes not yet measured.

    python benchmarks/scale.py [--sizes 30000 100000 300000 1000000] [--dim 384] [--clusters 30] [--stages cluster curate] [--out FILE.json]

Made float16 vectors (20,000 groups of unequal size, 2 % of the items near copies of others) in shards as `attar embed` writes them, and
a made table of items beside them. Each stage of each size runs in a process of its own on one thread, which reports its seconds, its bytes
written and the peak memory that the operating system counted. Growth is fitted to all sizes but the last, and what that
predicts for the last is printed beside what was measured there; then to all, for a hundred million. A hundred thousand items take half a minute, a
million about ten.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from environment import record
from scipy.optimize import nnls

SHARD, GROUPS, COPIES = 4096, 20_000, 0.02
STAGES = ("cluster", "curate")
GOAL = 100_000_000


def make(root: Path, count: int, dim: int) -> None:
    """The shards and the table of items of a made run."""
    from attar import formats
    from attar.records import ITEM_SCHEMA
    from attar.stages.scan import split_by_content

    rng = np.random.default_rng(0)
    spread = np.arange(1, dim + 1) ** -0.5
    centres, share = rng.normal(size=(GROUPS, dim)) * spread, rng.dirichlet(np.full(GROUPS, 0.5))
    (root / "vectors").mkdir(parents=True)
    writer = pq.ParquetWriter(root / "items.parquet", ITEM_SCHEMA)
    for number, start in enumerate(range(0, count, SHARD)):
        size = min(SHARD, count - start)
        rows = centres[rng.choice(GROUPS, size, p=share)] + 0.5 * rng.normal(size=(size, dim)) * spread
        thumbs = rng.integers(0, 256, (size, 256), np.uint8)
        copies = rng.choice(size, int(COPIES * size), replace=False)
        rows[copies], thumbs[copies] = rows[copies - 1] + 1e-3 * rng.normal(size=(len(copies), dim)), thumbs[copies - 1]
        ids = np.arange(start, start + size)
        formats.write_table(root / "vectors" / f"{number:05d}.parquet", formats.shard_table(ids, rows.astype(np.float16)))
        content = [f"{value:032x}" for value in rng.integers(0, 2**63, size) * 2]
        columns = {
            "id": ids,
            "path": [f"made/{value // 1000:06d}/{value:09d}.jpg" for value in ids],
            "modality": ["image"] * size,
            "content": [value[::-1] for value in content],
            "bytes": rng.integers(20_000, 90_000, size),
            "width": np.full(size, 640, np.int32),
            "height": np.full(size, 480, np.int32),
            "format": ["JPEG"] * size,
            "frame_time": pa.nulls(size, pa.float64()),
            "split": split_by_content([value[::-1] for value in content], 0.15, 0.1),
            "note": [""] * size,
            "thumb": [row.tobytes() for row in thumbs],
        }
        columns |= {field.name: pa.array(np.ones(size), field.type) for field in ITEM_SCHEMA if field.name not in columns}
        writer.write_table(pa.table(columns).select(ITEM_SCHEMA.names).cast(ITEM_SCHEMA))
    writer.close()


def stage(name: str, root: Path, dim: int, clusters: int) -> dict:
    """One stage in this process, resumed from nothing."""
    from attar import config, formats, records
    from attar.stages.cluster.cluster import cluster
    from attar.stages.curate.curate import curate
    from attar.workspace import Job

    table = pq.read_table(root / "items.parquet")
    items = records.Items(root="/made", table=table, quarantine=records.QUARANTINE_SCHEMA.empty_table())
    shards = [partial(formats.read_shard, path) for path in sorted((root / "vectors").glob("*.parquet"))]
    model = records.Model(source={}, state={}, preprocess=records.Preprocess(size=(8, 8)))
    vectors = records.Vectors(shards=shards, count=len(items), dim=dim, model=model)
    job = Job(name, root / name, quiet=True, workers=1)
    before, start, used = _peak_mb(), time.perf_counter(), time.process_time()
    if name == "cluster":
        made = cluster(items, vectors, config.Cluster(clusters=clusters), job)
        formats.FORMATS[records.Clusters].save(root, made)
        found = made.count
    else:
        clustered = formats.FORMATS[records.Clusters].load(root)
        made = curate(items, vectors, clustered, config.Curate(), job)
        found = int((~made.column("keep")).sum())
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    written = sum(path.stat().st_size for path in (root / name).rglob("*") if path.is_file())
    return {
        "stage": name,
        "items": len(items),
        "seconds": seconds,
        "cpu": cpu,
        "peak_mb": _peak_mb(),
        "tables_mb": before,
        "written_mb": written / 1e6,
        "found": found,
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fit(sizes: list[int], values: list[float]) -> np.ndarray:
    """(a, b, c) ≥ 0 of value = a + b · size + c · size², by least squares of the relative errors; as many of them as there are sizes."""
    n = np.asarray(sizes, float)
    terms = np.stack([n**0, n, n**2], 1)[:, : max(2, min(3, len(n)))]
    found, _ = nnls(terms / np.asarray(values)[:, None], np.ones(len(n)))
    return np.pad(found, (0, 3 - len(found)))


def summarise(rows: list[dict]) -> list[dict]:
    """Growth of each stage: processor time and memory as a + b · n + c · n², and what the smaller sizes said of the largest."""
    out = []
    for name in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == name]
        sizes, line = [row["items"] for row in own], {"stage": name}
        for figure in ("cpu", "peak_mb"):
            values = [row[figure] for row in own]
            terms = fit(sizes, values) if figure == "cpu" else np.pad(fit(sizes[-2:], values[-2:])[:2], (0, 1))
            goal = float(terms @ [1, GOAL, GOAL**2])
            line |= {
                f"{figure}_fixed": terms[0],
                f"{figure}_per_item": terms[1],
                f"{figure}_per_item_squared": terms[2],
                f"{figure}_at_goal": goal,
            }
            line[f"{figure}_measured"] = values[-1]
            if len(own) > 1:
                line[f"{figure}_exponent"] = float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
                line[f"{figure}_predicted"] = float(fit(sizes[:-1], values[:-1]) @ [1, sizes[-1], sizes[-1] ** 2])
        out.append(line)
    return out


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sizes", type=int, nargs="+", default=[30_000, 100_000, 300_000, 1_000_000])
    arguments.add_argument("--dim", type=int, default=384)
    arguments.add_argument("--clusters", type=int, default=30, help="as choosing the number looks at 10,000 items whatever the size")
    arguments.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.one:
        print(json.dumps(stage(given.one[0], Path(given.one[1]), given.dim, given.clusters)))
        return
    rows = []
    for size in sorted(given.sizes):
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), size, given.dim)
            for name in given.stages:
                flags = ["--dim", given.dim, "--clusters", given.clusters, "--one", name, folder]
                done = subprocess.run([sys.executable, __file__, *map(str, flags)], check=True, stdout=subprocess.PIPE, text=True)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print(
                    "{items:11,} {stage:8} {seconds:8.1f} s ({cpu:.1f} s processor), peak {peak_mb:6.0f} MB, wrote {written_mb:6.0f} MB, {found:,} found".format(
                        **rows[-1]
                    ),
                    flush=True,
                )
    summary = summarise(rows)
    for line in summary:
        print(*(f"{key} {value if isinstance(value, str) else format(value, ',.4g')}" for key, value in line.items()), sep=", ")
    record(given, rows=rows, summary=summary)


if __name__ == "__main__":
    main()
