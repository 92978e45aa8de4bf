"""Peak memory of a run as the folder grows.

    python benchmarks/memory.py [--sizes 2000 20000 60000] [--out FILE.json] [-- FLAGS OF attar run]

Makes JPEG files of 32 × 32 (three kinds of shapes, all different), takes them through the whole spine with few training steps, and prints the
largest resident set of the process as the operating system counted it. The images alone, decoded, would be 3 kB each.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from environment import record
from PIL import Image

FLAGS = ["--self-steps", "20", "--train-steps", "5", "--distil-steps", "5"]


def make(folder: Path, count: int) -> None:
    y, x = np.mgrid[:32, :32]
    for number in range(count):
        rng = np.random.default_rng(number)
        shape = [(x * rng.uniform(0.3, 1) + y * rng.uniform(-1, 1)) // 5 % 2, np.hypot(x - rng.uniform(8, 24), y - rng.uniform(8, 24)) < 9]
        colours = rng.integers(0, 256, (2, 3))
        pixels = np.where((shape[number % 2] > 0)[..., None], colours[0], colours[1]) + rng.integers(-20, 20, (32, 32, 3))
        home = folder / f"{number // 1000:03d}"
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(home / f"{number:06d}.jpg", quality=85)


def measure(data: Path, out: Path, flags: list[str]) -> tuple[float, float]:
    """Peak resident memory (MB) and seconds of a whole run, in a process of its own."""
    program = (
        "import sys, resource, attar.cli; code = attar.cli.main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(code)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, "run", str(data), "--out", str(out), "--quiet", *flags], capture_output=True, text=True
    )
    if done.returncode not in (0, 3):
        raise SystemExit(f"the run failed with {done.returncode}: {done.stderr[-2000:]}")
    return int(done.stderr.strip().splitlines()[-1]) / 1024, time.perf_counter() - start


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sizes", type=int, nargs="+", default=[2000, 20000, 60000])
    arguments.add_argument("--out", type=Path)
    given, flags = arguments.parse_known_args()
    rows = []
    for size in given.sizes:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder) / "data", size)
            peak, seconds = measure(Path(folder) / "data", Path(folder) / "run", flags or FLAGS)
        rows.append({"items": size, "peak_mb": peak, "seconds": seconds})
        print(f"{size:7,} items: peak {peak:6.0f} MB, {seconds:5.0f} s", flush=True)
    record(given, flags=flags or FLAGS, rows=rows)


if __name__ == "__main__":
    main()
