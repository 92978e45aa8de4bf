"""Does loading keep up with the model? Photos to vectors by attar, beside the model alone and what people write.

    python benchmarks/embedding.py PHOTOS MODEL [--photos 1600] [--large 160] [--cores 2] [--rounds 3] [--parts small large grainy]
        [--sides attar pipeline …] [--cache FOLDER] [--out FILE.json]

PHOTOS is a folder of JPEG files, MODEL a transformers folder. small: the photos as they are. large: the first of them enlarged to 12 megapixels (made once,
in the cache; all of them would be the same workload for longer). grainy: with the grain of a sensor as well (deviation 3 of 255), which takes an entropy
decoder several times as long. JPEG of quality 92.

embedding_peers.py says what the sides do. Each has a process of its own, pinned to the same cores, and they take turns; a turn is a pass over all
photos. Figures are photos per second, medians and quartiles over the rounds after a pass that is not counted; ratios are taken within each round.
Goal: attar at 0.9 of the model alone, whichever way of running it is the faster. Bound: 1 / (1 + decoding / model), what the same cores can give when they do both and nothing
else. Wall time with the defaults: about 12 minutes on two cores, the large photos not counted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import workloads
from environment import record
from PIL import Image
from runtimes import Runtime, take_turns

PEERS = Path(__file__).with_name("embedding_peers.py")
SIDES = ("model", "model-torch", "model-alone", "attar", "decoding", "pipeline", "dataloader")
PARTS = {"small": None, "large": 0.0, "grainy": 3.0}
GOAL, MEGAPIXELS = 0.9, 12


class Side(Runtime):
    """A way from photos to vectors, in its own process, pinned to so many cores."""

    def __init__(self, name: str, cores: int, model: Path) -> None:
        self.name = name
        command = [sys.executable, "-W", "ignore", str(PEERS), name, str(cores), str(model)]
        limits = {f"{kind}_NUM_THREADS": str(cores) for kind in ("OMP", "MKL")}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | limits)
        self.ask(do="open")

    def rate(self, folder: Path) -> float:
        """Photos per second of a pass."""
        count, seconds = self.ask(do="pass", folder=str(folder))
        return float(count / seconds)


def photos_of(part: str, given: argparse.Namespace) -> Path:
    """A folder with the photos of a part, made when it is not in the cache."""
    grain, count = PARTS[part], given.photos if part == "small" else given.large
    folder = given.cache / f"embedding-{part}-{count}"
    if folder.exists():
        return folder
    files = sorted(path for path in given.folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))[:count]
    if not files:
        raise SystemExit(f"{given.folder}: no .jpg files")
    workloads.say(f"making {folder}")
    partial, rng = folder.with_suffix(".part"), np.random.default_rng(0)
    partial.mkdir(parents=True, exist_ok=True)
    for file in files:
        if grain is None:
            (partial / file.name).unlink(missing_ok=True)
            (partial / file.name).symlink_to(file.resolve())
            continue
        photo = Image.open(file).convert("RGB")
        scale = (MEGAPIXELS * 1e6 / (photo.width * photo.height)) ** 0.5
        photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS)
        if grain:
            noise = grain * rng.standard_normal(np.asarray(photo).shape[:2], np.float32)[..., None]
            photo = Image.fromarray((np.asarray(photo) + noise).clip(0, 255).astype(np.uint8))
        photo.save(partial / file.name, "JPEG", quality=92)
    partial.rename(folder)
    return folder


def compare(part: str, sides: Sequence[Side], folder: Path, rounds: int) -> dict[str, Any]:
    """Photos per second of each side, and attar's ratio to each; what failed, with its message."""
    failed: dict[str, str] = {}
    turns = {}
    for side in sides:
        try:
            side.rate(folder)
            turns[side.name] = lambda side=side: side.rate(folder)
        except SystemExit as error:
            if side.name in ("attar", "model"):
                raise
            failed[side.name] = str(error)
    taken = take_turns(turns, rounds)
    files = list(folder.iterdir())
    row: dict[str, Any] = {"part": part, "photos": len(files), "megabytes": sum(file.stat().st_size for file in files) / len(files) / 1e6}
    row["rates"] = {name: spread(values) for name, values in taken.items()}
    row["failed"] = failed
    if "attar" in taken:
        row["ratios"] = {name: spread(taken["attar"] / values) for name, values in taken.items() if name != "attar"}
        models = [values for name, values in taken.items() if name.startswith("model")]
        if models:
            best = np.max(models, axis=0)
            row["of the model"] = spread(taken["attar"] / best)
            if "decoding" in taken:
                row["bound"] = spread(1 / (1 + best / taken["decoding"]))
    return row


def spread(values: np.ndarray) -> dict[str, float]:
    return dict(zip(("low", "median", "high"), np.quantile(values, (0.25, 0.5, 0.75)).tolist()))


def cell(found: Mapping[str, float] | None, digits: int) -> str:
    return f"{found['median']:.{digits}f} ({found['low']:.{digits}f} – {found['high']:.{digits}f})" if found else "–"


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for row in rows:
        lines = [
            {"side": name, "photos/s": cell(found, 1), "attar against it": cell(row.get("ratios", {}).get(name), 2)}
            for name, found in row["rates"].items()
        ]
        lines += [{"side": name, "photos/s": f"failed: {why[:80]}", "attar against it": "–"} for name, why in row["failed"].items()]
        head = f"{row['part']}: {row['photos']} photos of {row['megabytes']:.2f} MB"
        if "of the model" in row:
            verdict = "reached" if row["of the model"]["median"] >= GOAL else "MISSED"
            head += f"; of the model alone {cell(row['of the model'], 2)}, goal {GOAL}: {verdict}; bound {cell(row.get('bound'), 2)}"
        parts.append(f"{head}\n\n{workloads.table(lines)}")
    return "\n\n".join(parts)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path, help="a folder of JPEG photos")
    arguments.add_argument("model", type=Path, help="a transformers folder")
    arguments.add_argument("--photos", type=int, default=1600)
    arguments.add_argument("--large", type=int, default=160)
    arguments.add_argument("--cores", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    arguments.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    arguments.add_argument("--cache", type=Path, default=workloads.CACHE)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    rows = []
    for part in given.parts:
        folder = photos_of(part, given)
        sides = [Side(name, given.cores, given.model) for name in given.sides]
        rows.append(compare(part, sides, folder, given.rounds))
        for side in sides:
            side.close()
        workloads.say(report(rows[-1:]))
    print(report(rows))
    record(given, rows=rows)


if __name__ == "__main__":
    main()
