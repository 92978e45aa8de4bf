"""Augmentation on one processor core: attar.Augment beside Albumentations, torchvision, Kornia, fuse-augmentations and OpenCV composed by hand.

    python benchmarks/augment.py [PHOTOS] [--peers-python PYTHON] [--torchvision-python PYTHON] [--parts full crop singles scaling]
        [--sides attar opencv …] [--batch 32] [--rounds 21] [--out FILE.json]

full: photo of 375 x 500, uint8 → random resized crop, flip, affine, brightness, contrast, saturation, hue → normalised float32, 3 x 224 x 224.
crop: the same with crop and flip alone. singles: each transform alone, 224 x 224 to 224 x 224, normalised. scaling: attar's full chain on two
threads, in four processes, and through four workers of a torch DataLoader. augment_peers.py says what each side does and where they differ.

Every side has a process and an interpreter of its own, pinned to one core, and they take turns; a turn is a batch of different photos, again and
again for at least 30 ms. Times are microseconds of processor time per photo (wall time in `scaling`), median and quartiles over the rounds, without
the first calls, whose seconds (compilation, imports) stand apart; ratios are taken within each round. `PHOTOS` is a folder of images, cut to size;
without it photos are made. A side that cannot be imported is no win: its lines say so.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import workloads
from augment_peers import SIDE, SINGLES
from environment import record
from PIL import Image, ImageOps
from runtimes import Runtime, take_turns

PEERS = Path(__file__).with_name("augment_peers.py")
SIDES = ("attar", "opencv", "albumentations", "fuse", "kornia", "torchvision")
GOALS = {
    "full": {"albumentations": 4.0, "torchvision": 15.0, "kornia": 15.0, "fuse": 2.0, "opencv": 1.4},
    "crop": {"the best peer": 1.2, "the best library": 1.2},
} | {name: {"the best peer": 0.9, "the best library": 0.9} for name in SINGLES}
SCALING_GOAL, WORKERS, SCALING_SECONDS = 1.8, 4, 0.3


class Library(Runtime):
    """A side of the comparison in its own process."""

    def __init__(self, name: str, python: str, threads: int = 1, cores: int = 1) -> None:
        self.name = name
        limits = {f"{kind}_NUM_THREADS": str(threads) for kind in ("OMP", "MKL", "OPENBLAS")}
        command = [python, "-W", "ignore", str(PEERS), name, str(threads), str(cores)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | limits)
        self.about: dict[str, Any] = {}

    def open(self) -> Library:
        self.about = self.ask(do="open")
        return self

    def first(self, workload: str, photos: Path) -> float:
        """Seconds of the first call."""
        return float(self.ask(do="load", workload=workload, photos=str(photos)))

    def seconds(self, workload: str, clock: str, times: int = 0) -> float:
        """Seconds per call in a turn."""
        return float(self.ask(do="turn", workload=workload, clock=clock, times=times))

    def check(self, workload: str, count: int, folder: Path) -> None:
        """Raises SystemExit when what comes out is not a batch of normalised views."""
        file = folder / "outputs.npy"
        self.ask(do="outputs", workload=workload, outputs=str(file))
        found = np.load(file)
        if (
            found.shape != (count, 3, SIDE, SIDE)
            or found.dtype != np.float32
            or not np.isfinite(found).all()
            or not 0.05 < found.std() < 1.5
        ):
            raise SystemExit(
                f"{self.name}, {workload}: {found.dtype} {found.shape}, deviation {found.std():.2f}; expected normalised views"
            )


def photos(folder: Path | None, count: int, seed: int) -> np.ndarray:
    """uint8 (count, 375, 500, 3): the first images of a folder, or made ones with structure at every scale."""
    if folder is None:
        rng = np.random.default_rng(seed)
        layers = [rng.integers(0, 256, (count, max(375 // size, 1), 500 // size, 3), np.uint8) for size in (128, 32, 8, 1)]
        grown = [
            [np.asarray(Image.fromarray(one).resize((500, 375), Image.Resampling.BICUBIC), np.float32) for one in layer] for layer in layers
        ]
        return np.stack([sum(w * p for w, p in zip((0.4, 0.3, 0.2, 0.1), parts)) for parts in zip(*grown)]).astype(np.uint8)  # type: ignore[misc]
    files = sorted(path for path in folder.iterdir() if path.is_file())[:count]
    if len(files) < count:
        raise SystemExit(f"{folder}: {len(files)} files; expected at least {count} photos, or a smaller --batch")
    return np.stack([np.asarray(ImageOps.fit(Image.open(file).convert("RGB"), (500, 375))) for file in files])


def write_photos(pixels: np.ndarray, folder: Path) -> dict[str, Path]:
    """The photos for `full` and `crop`, and as squares for every single transform: one .npy file each."""
    files = {"photos": folder / "photos.npy", "squares": folder / "squares.npy"}
    np.save(files["photos"], pixels)
    np.save(files["squares"], np.stack([np.asarray(ImageOps.fit(Image.fromarray(photo), (SIDE, SIDE))) for photo in pixels]))
    return files


def open_libraries(names: Sequence[str], pythons: Mapping[str, str]) -> tuple[list[Library], dict[str, str]]:
    """Those that can be imported, and why the others cannot; attar must."""
    found, missing = [], {}
    for name in names:
        try:
            found.append(Library(name, pythons[name]).open())
        except SystemExit as error:
            if name == "attar":
                raise
            missing[name] = str(error)
    return found, missing


def spread(values: np.ndarray) -> dict[str, float]:
    return dict(zip(("low", "median", "high"), np.quantile(values, (0.25, 0.5, 0.75)).tolist()))


def compare(libraries: Sequence[Library], workload: str, file: Path, rounds: int, folder: Path) -> dict[str, Any]:
    """Microseconds per photo of every side that has the workload, and attar's advantage over each; what failed, with its message."""
    count, first, failed = len(np.load(file, mmap_mode="r")), {}, {}
    turns: dict[str, Callable[[], float]] = {}
    for library in (one for one in libraries if workload in one.about["workloads"]):
        try:
            first[library.name] = library.first(workload, file)
            library.check(workload, count, folder)
        except SystemExit as error:
            if library.name == "attar":
                raise
            failed[library.name] = str(error)
            continue
        turns[library.name] = partial(library.seconds, workload, "processor")
    taken = {name: 1e6 / count * values for name, values in take_turns(turns, rounds).items()}
    row: dict[str, Any] = {"workload": workload, "first": first, "failed": failed}
    row["microseconds"] = {name: spread(values) for name, values in taken.items()}
    row["ratios"] = {name: spread(values / taken["attar"]) for name, values in taken.items() if name != "attar"}
    return row


def judge(row: Mapping[str, Any], missing: Mapping[str, str]) -> list[dict[str, str]]:
    """Each goal of a workload beside what was measured: reached, missed or not measured.

    The best peer is the fastest of all, OpenCV composed by hand among them; the best library the fastest without that.
    """
    lines, ratios = [], row["ratios"]
    for name, goal in GOALS[row["workload"]].items():
        best = sorted(ratios, key=lambda peer: row["microseconds"][peer]["median"])
        best = [peer for peer in best if peer != "opencv" or name == "the best peer"] + [""]
        against = best[0] if name.startswith("the best") else name
        line = {
            "workload": row["workload"],
            "against": f"{name}, {against}" if against not in ("", name) else name,
            "ratio": "–",
            "goal": f"≥ {goal}",
        }
        if against in ratios:
            reached = "reached" if ratios[against]["median"] >= goal else "MISSED"
            line |= {"ratio": "{median:.2f} ({low:.2f} – {high:.2f})".format(**ratios[against]), "": reached}
        else:
            reason = row["failed"].get(name) or missing.get(name) or ("no peer has it" if name.startswith("the best") else "left out")
            line[""] = f"not measured: {reason.splitlines()[0][:100]}"
        lines.append(line)
    return lines


def times_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Microseconds of each side, median with half the distance of the quartiles; – where a side lacks a workload."""

    def cell(row: Mapping[str, Any], name: str) -> str:
        if name in row["failed"]:
            return "failed"
        found = row["microseconds"].get(name)
        return f"{found['median']:.0f} ± {(found['high'] - found['low']) / 2:.0f}" if found else "–"

    return workloads.table([{"workload": row["workload"]} | {name: cell(row, name) for name in names} for row in rows])


def scaling(file: Path, rounds: int) -> list[dict[str, Any]]:
    """attar's full chain in wall time per photo: one thread, two threads, four processes, four workers of a DataLoader, on two cores."""
    count = len(np.load(file, mmap_mode="r"))
    sides = {"one thread": (1, 1, 1, "full"), "two threads": (1, 2, 2, "full"), "four processes": (WORKERS, 1, 2, "full")}
    sides["four DataLoader workers"] = (1, 1, 2, "loader")
    opened = {name: [Library("attar", sys.executable, *how[1:3]).open() for _ in range(how[0])] for name, how in sides.items()}
    with ThreadPoolExecutor(WORKERS) as pool:

        def turn(name: str) -> float:
            workload, own = sides[name][3], opened[name]
            photos_of_call = count * (WORKERS if workload == "loader" else 1)
            asked = pool.map(lambda library: library.seconds(workload, "wall", times[name]), own)
            return 1e6 * max(asked) / photos_of_call / len(own)

        times: dict[str, int] = {}
        for name, own in opened.items():
            for library in own:
                library.first(sides[name][3], file)
            times[name] = max(2, math.ceil(SCALING_SECONDS / own[0].seconds(sides[name][3], "wall", 3)))
        taken = take_turns({name: partial(turn, name) for name in sides}, rounds)
    for library in (one for own in opened.values() for one in own):
        library.close()
    first = taken["one thread"]
    return [{"how": name, "microseconds": spread(values), "ratio": spread(first / values)} for name, values in taken.items()]


def scaling_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        line = {"attar, full": row["how"], "µs": "{median:.0f} ({low:.0f} – {high:.0f})".format(**row["microseconds"])}
        line["of one thread"] = "{median:.2f} ({low:.2f} – {high:.2f})".format(**row["ratio"])
        line[f"goal ≥ {SCALING_GOAL}"] = (
            "–" if row["how"] == "one thread" else ("reached" if row["ratio"]["median"] >= SCALING_GOAL else "MISSED")
        )
        lines.append(line)
    return workloads.table(lines)


def report(
    rows: Sequence[Mapping[str, Any]], scaled: Sequence[Mapping[str, Any]], libraries: Sequence[Library], missing: Mapping[str, str]
) -> str:
    """The tables, wins and losses alike."""
    names = [library.name for library in libraries]
    parts = ["; ".join(f"{library.name} {library.about['version']}" for library in libraries)]
    parts += [f"{name} is not measured: {reason}" for name, reason in missing.items()]
    if rows:
        parts += [times_table(rows, names), workloads.table([line for row in rows for line in judge(row, missing)])]
        firsts = (f"{row['workload']}: " + ", ".join(f"{name} {value:.2f} s" for name, value in row["first"].items()) for row in rows[:2])
        parts.append("\n".join(["First calls", *firsts]))
    if scaled:
        parts.append(scaling_table(scaled))
    elif os.cpu_count() and len(os.sched_getaffinity(0)) < 2:
        parts.append("Two threads and four processes are not measured: one core is allowed to this process, two are needed.")
    return "\n\n".join(parts)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("photos", type=Path, nargs="?", help="a folder of images; without it they are made")
    arguments.add_argument(
        "--peers-python", default=sys.executable, help="a Python with albumentations, kornia, fuse-augmentations, opencv"
    )
    arguments.add_argument("--torchvision-python", help="a Python with torchvision, when that is another")
    arguments.add_argument(
        "--parts", nargs="+", choices=["full", "crop", "singles", "scaling"], default=["full", "crop", "singles", "scaling"]
    )
    arguments.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    arguments.add_argument("--batch", type=int, default=32)
    arguments.add_argument("--rounds", type=int, default=21)
    arguments.add_argument("--seed", type=int, default=0, help="of made photos")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    pythons = dict.fromkeys(SIDES, given.peers_python) | {"attar": sys.executable}
    pythons["torchvision"] = given.torchvision_python or given.peers_python
    names = [name for part in given.parts if part != "scaling" for name in (SINGLES if part == "singles" else [part])]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files = write_photos(photos(given.photos, given.batch, given.seed), folder)
        libraries, missing = open_libraries(dict.fromkeys(["attar", *given.sides]), pythons) if names else ([], {})  # type: ignore[arg-type]
        rows = []
        for name in names:
            workloads.say(name)
            rows.append(compare(libraries, name, files["photos" if name in ("full", "crop") else "squares"], given.rounds, folder))
        for library in libraries:
            library.close()
        enough = len(os.sched_getaffinity(0)) >= 2
        scaled = scaling(files["photos"], given.rounds) if "scaling" in given.parts and enough else []
    print(report(rows, scaled, libraries, missing))
    record(given, versions={library.name: library.about["version"] for library in libraries}, missing=missing, rows=rows, scaling=scaled)


if __name__ == "__main__":
    main()
