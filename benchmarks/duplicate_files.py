"""Planted duplicates among image files: attar, imagededup and fastdup on the same folder.

    python benchmarks/duplicate_files.py IMAGES [--limit N] [--planted 500] [--threads 2] [--peers PYTHON] [--out FILE.json]

N images of a folder are copied to a temporary one (default: all), and of some of them, drawn by a seed, changed ones are added: a crop of 0.7 to 0.95 of the
sides, scaled back; JPEG of quality 50; a mirror image; brightness 0.6 to 1.4. Every tool gets the folder and its defaults, runs in a process of its own, and returns
pairs. Recall counts planted pairs found; precision counts pairs found that join one original with its planted ones or two planted ones of one original. The
images' own duplicates (CIFAR has some) count as wrong for all tools alike. `--peers` is the Python that has imagededup and fastdup; what is not installed there is said.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from environment import record
from PIL import Image

KINDS = ("crop", "re-encoded", "mirrored", "brightness")
ATTAR = """
import attar
rows = attar.duplicates(folder, parts={parts}, workers=threads, quiet=True)
pairs = [(row["path"], row["of"]) for row in rows]
"""
IMAGEDEDUP = """
from imagededup.methods import {method}
tool = {method}(verbose=False)
codes = tool.encode_images(image_dir=folder, num_enc_workers={workers})
found = tool.find_duplicates(encoding_map=codes{options})
pairs = [(name, other) for name, others in found.items() for other in others]
"""
FASTDUP = """
import fastdup
tool = fastdup.create(work_dir=folder + "-fastdup", input_dir=folder)
tool.run(num_threads=threads, overwrite=True, print_summary=False)
table = tool.similarity()
table = table[table["distance"] >= 0.9]
pairs = [(a.rpartition("/")[2], b.rpartition("/")[2]) for a, b in zip(table["filename_from"], table["filename_to"])]
"""
TAIL = """
import json, resource, sys
open(out, "w").write(json.dumps(pairs))
peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print("PEAK", peak)
"""


def change(picture: Image.Image, kind: str, rng: np.random.Generator) -> Image.Image:
    if kind == "crop":
        scale, (width, height) = rng.uniform(0.7, 0.95), picture.size
        left, top = rng.uniform(0, 1 - scale, 2) * picture.size
        return picture.resize(picture.size, Image.Resampling.BICUBIC, box=(left, top, left + scale * width, top + scale * height))
    if kind == "re-encoded":
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=50)
        return Image.open(io.BytesIO(stream.getvalue())).convert("RGB")
    if kind == "mirrored":
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    factor = rng.uniform(0.6, 1.4)
    return picture.point([min(255, round(level * factor)) for level in range(256)] * 3)


def plant(source: Path, folder: Path, limit: int, planted: int, seed: int) -> dict[str, str]:
    """Fills a flat folder; returns planted name → original name."""
    rng = np.random.default_rng(seed)
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    files = [files[i] for i in sorted(rng.permutation(len(files))[: limit or len(files)])]
    folder.mkdir()
    names = [f"{number:06d}{path.suffix.lower()}" for number, path in enumerate(files)]
    for name, path in zip(names, files):
        shutil.copyfile(path, folder / name)
    truth, drawn = {}, rng.permutation(len(files))
    for which, kind in enumerate(KINDS):
        for number in drawn[which * planted : (which + 1) * planted]:
            name = f"planted-{kind}-{number:06d}.jpg"
            change(Image.open(files[number]).convert("RGB"), kind, rng).save(folder / name, quality=90)
            truth[name] = names[number]
    return truth


def judge(pairs: list[tuple[str, str]], truth: dict[str, str]) -> dict[str, object]:
    found = {tuple(sorted((Path(a).name, Path(b).name))) for a, b in pairs if a != b}
    right = {tuple(sorted(pair)) for pair in truth.items()}
    true = sum(truth.get(a, a) == truth.get(b, b) for a, b in found)
    recall = {kind: [pair in found for pair in right if any(kind in name for name in pair)] for kind in KINDS}
    row: dict[str, object] = {kind: round(float(np.mean(hits)), 4) if hits else None for kind, hits in recall.items()}
    return row | {"recall": len(right & found) / len(right), "precision": true / max(1, len(found)), "pairs": len(found)}


def measure(python: str, code: str, folder: Path, threads: int, home: Path) -> dict[str, object]:
    """Seconds, peak memory of the process or its largest child (MB) and pairs; or why it failed."""
    head = f"folder, threads, out = {str(folder)!r}, {threads}, {str(home / 'pairs.json')!r}\n"
    variables = {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"}
    start = time.perf_counter()
    done = subprocess.run(
        [python, "-c", head + code + TAIL], capture_output=True, text=True, env={**os.environ, **dict.fromkeys(variables, str(threads))}
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][-200:]}
    peak = int(next(line for line in done.stdout.splitlines() if line.startswith("PEAK")).split()[1]) / 1024
    return {"seconds": round(seconds, 2), "peak_mb": round(peak), "found": json.loads((home / "pairs.json").read_text())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--planted", type=int, default=500, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", help="Python with imagededup and fastdup")
    parser.add_argument("--only", nargs="+", metavar="TOOL", help='"attar", "attar, parts", "imagededup PHash", …; default: all')
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    peer = given.peers or sys.executable
    workers = given.threads if given.threads > 1 else 0
    tools = {
        "attar": (sys.executable, ATTAR.format(parts=False)),
        "attar, parts": (sys.executable, ATTAR.format(parts=True)),
        "imagededup PHash": (peer, IMAGEDEDUP.format(method="PHash", workers=workers, options="")),
        "imagededup DHash": (peer, IMAGEDEDUP.format(method="DHash", workers=workers, options="")),
        "imagededup CNN": (peer, IMAGEDEDUP.format(method="CNN", workers=0, options="")),
        "fastdup": (peer, FASTDUP),
    }
    if unknown := set(given.only or ()) - set(tools):
        parser.error(f"--only: {', '.join(sorted(unknown))}: not among {', '.join(tools)}")
    rows = []
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "images"
        truth = plant(given.images, folder, given.limit, given.planted, given.seed)
        count = len(list(folder.iterdir()))
        print(f"{count} files, {len(truth)} of them planted, {given.threads} threads")
        print(f"{'':18} {'seconds':>8} {'peak MB':>8} " + " ".join(f"{kind:>11}" for kind in KINDS) + f" {'recall':>7} {'precision':>9}")
        for name, (python, code) in tools.items():
            if given.only and name not in given.only:
                continue
            row = measure(python, code, folder, given.threads, Path(home))
            if "failed" in row:
                print(f"{name:18} failed: {row['failed']}", flush=True)
            else:
                row |= judge(row.pop("found"), truth)
                kinds = " ".join(f"{row[kind]:>11.3f}" for kind in KINDS)
                print(
                    f"{name:18} {row['seconds']:>8} {row['peak_mb']:>8} {kinds} {row['recall']:>7.3f} {row['precision']:>9.3f}", flush=True
                )
            rows.append({"tool": name, **row})
    record(given, files=count, rows=rows)


if __name__ == "__main__":
    main()
