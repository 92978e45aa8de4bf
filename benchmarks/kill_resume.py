"""kill -9 at random moments, then the same command: does the run end as an uninterrupted one does?

    python benchmarks/kill_resume.py DATA [--points 10] [--seed 0] [--out FILE.json] [-- FLAGS OF attar run]

Each point is a fresh run that is killed, with its children, at a random share of the time the uninterrupted run took, and then finished by
the same command. Tables (Parquet, policy) must be equal byte for byte; weights are compared by their largest difference.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from environment import record
from safetensors.numpy import load_file

TABLES = ("items.parquet", "quarantine.parquet", "clusters.parquet", "selection.parquet", "policy.json")
WEIGHTS = ("vectors/encoder.safetensors", "original/original.safetensors")


def command(data: Path, out: Path, flags: list[str]) -> list[str]:
    return [sys.executable, "-m", "attar.cli", "run", str(data), "--out", str(out), "--quiet", *flags]


def finish(data: Path, out: Path, flags: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command(data, out, flags), capture_output=True, text=True)
    if done.returncode not in (0, 3):
        raise SystemExit(f"the run failed with {done.returncode}: {done.stderr[-2000:]}")
    return time.perf_counter() - start


def compare(one: Path, other: Path) -> tuple[list[str], float]:
    """Names of tables that differ, and the largest difference of any weight, delivered candidates included."""
    vectors = [str(path.relative_to(one)) for path in sorted((one / "vectors").glob("*.parquet"))]
    different = [name for name in (*TABLES, *vectors) if (one / name).read_bytes() != (other / name).read_bytes()]
    candidates = [str(path.relative_to(one)) for path in sorted((one / "candidates").glob("*/weights.safetensors"))]
    largest = 0.0
    for name in (*WEIGHTS, *candidates):
        mine, theirs = load_file(one / name), load_file(other / name)
        if mine.keys() != theirs.keys() or any(mine[key].shape != theirs[key].shape for key in mine):
            different.append(name)
            continue
        largest = max([largest, *(float(np.abs(mine[key].astype(np.float64) - theirs[key]).max(initial=0)) for key in mine)])
    return different, largest


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--points", type=int, default=10)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path)
    given, flags = arguments.parse_known_args()
    draw, rows = random.Random(given.seed), []
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        seconds = finish(given.data, whole, flags)
        print(f"uninterrupted: {seconds:.0f} s")
        for point in range(given.points):
            out, wait = Path(folder) / f"killed-{point}", draw.uniform(0.05, 0.95) * seconds
            process = subprocess.Popen(
                command(given.data, out, flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            time.sleep(wait)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            done = sorted(path.stem for path in (out / "stages").glob("*.json")) if out.exists() else []
            again = finish(given.data, out, flags)
            different, largest = compare(whole, out)
            rows.append({"killed_at": wait, "stages_done": len(done), "finished_in": again, "different": different, "largest": largest})
            print(f"killed at {wait:5.1f} s with {len(done):2} stages done, finished in {again:5.1f} s: ", end="")
            print(f"{'tables equal' if not different else 'DIFFERENT ' + ', '.join(different)}, weights within {largest:.1e}", flush=True)
            shutil.rmtree(out)
    record(given, uninterrupted_seconds=seconds, points=rows, flags=flags)
    return int(any(row["different"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
