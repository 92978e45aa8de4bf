"""JPEG files to two augmented views each: AugmentingLoader beside the loaders of Albumentations and torchvision, and one composed by hand.

    python benchmarks/loading.py PHOTOS [--peers-python PYTHON] [--torchvision-python PYTHON] [--parts small large threads memory]
        [--sides attar opencv …] [--photos 128] [--large 16] [--rounds 9] [--out FILE.json]

small: the first photos of a folder as they are. large: the first of them enlarged to 12 megapixels, with the grain of a sensor (deviation 3 of 255),
JPEG of quality 92. Both with the full chain and with crop and flip alone, to 224 x 224 (loading_peers.py says what each side does). threads: attar on
one and on two cores. memory: 60,000 made files of 32 x 32 through a cache that holds a fraction of them.

Every side has a process and an interpreter of its own, pinned to one core (with its workers), and they take turns; a turn is a pass over all files.
Times are microseconds of processor time of the process and its workers per photo, two views each, wall time in `threads`; median and quartiles over
the rounds after a first pass that is not counted; ratios are taken within each round. "decoding" is the share of a pass that decoding the same files
alone takes, at the scale that side decodes at. "attar, kept" has what it decodes in memory since the first pass. A side that cannot be imported is no win: its lines say so.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import memory as made
import numpy as np
import workloads
from environment import record
from loading_peers import SIDES
from PIL import Image
from runtimes import Runtime, take_turns

PEERS = Path(__file__).with_name("loading_peers.py")
CHAINS = ("full", "crop")
GOAL, THREADS_GOAL = 2.5, 1.8
LOADERS = ("albumentations", "torchvision", "torchvision-pil")  # what people use; opencv is composed by hand
MEGAPIXELS, GRAIN = 12, 3
ITEMS, ITEM_SIDE, CACHE_BYTES, QUEUE_BYTES, DECODE_BYTES = 60_000, 32, 64 << 20, 32 << 20, 1 << 20


class Side(Runtime):
    """A loader in its own process, pinned to so many cores."""

    def __init__(self, name: str, python: str, cores: int = 1) -> None:
        self.name = name
        limits = {f"{kind}_NUM_THREADS": "1" for kind in ("OMP", "MKL", "OPENBLAS")}
        command = [python, "-W", "ignore", str(PEERS), name, str(cores)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | limits)
        self.version = self.ask(do="open")

    def seconds(self, do: str, files: Sequence[str], chain: str, clock: str = "processor", keep: bool = False) -> float:
        """Seconds of a pass over the files (do="pass"), or of decoding them alone (do="decode")."""
        wall, processor = self.ask(do=do, workload=chain, files=files, keep=keep)
        return wall if clock == "wall" else processor


def enlarge(files: Sequence[str], folder: Path) -> list[str]:
    """The photos at 12 megapixels."""
    rng, out = np.random.default_rng(0), []
    for file in files:
        photo = Image.open(file).convert("RGB")
        scale = (MEGAPIXELS * 1e6 / (photo.width * photo.height)) ** 0.5
        pixels = np.asarray(photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS))
        grain = GRAIN * rng.standard_normal(pixels.shape[:2], np.float32)[..., None]
        out.append(str(folder / Path(file).name))
        Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(out[-1], "JPEG", quality=92)
    return out


def spread(values: np.ndarray) -> dict[str, float]:
    return dict(zip(("low", "median", "high"), np.quantile(values, (0.25, 0.5, 0.75)).tolist()))


def compare(sides: Sequence[Side], files: Sequence[str], chain: str, rounds: int) -> dict[str, Any]:
    """Microseconds per photo of each side and of its decoding alone, and attar's advantage over each; what failed, with its message."""
    turns: dict[str, Any] = {}
    failed: dict[str, str] = {}

    def add(name: str, side: Side, do: str, keep: bool = False) -> None:
        def turn() -> float:
            return 1e6 * side.seconds(do, files, chain, keep=keep) / len(files)

        try:
            turn()
            turns[name] = turn
        except SystemExit as error:
            if side.name == "attar":
                raise
            failed[side.name] = str(error)

    for side in sides:
        add(side.name, side, "pass")
        add(f"{side.name}, decoding", side, "decode")
        if side.name == "attar":
            add("attar, kept", side, "pass", keep=True)
    taken = take_turns(turns, rounds)
    passes = [name for name in taken if not name.endswith("decoding")]
    return {
        "photos": len(files),
        "megabytes": sum(os.path.getsize(file) for file in files) / len(files) / 1e6,
        "chain": chain,
        "failed": failed,
        "microseconds": {name: spread(taken[name]) for name in passes},
        "decoding": {name: spread(taken[f"{name}, decoding"] / taken[name]) for name in passes if f"{name}, decoding" in taken},
        "ratios": {name: spread(taken[name] / taken["attar"]) for name in passes if name != "attar"},
    }


def threads(python: str, files: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Wall time per photo of attar's full chain on one core with one thread and on two with two."""
    sides = {cores: Side("attar", python, cores) for cores in (1, 2)}

    def turn(cores: int) -> float:
        return 1e6 * sides[cores].seconds("pass", files, "full", "wall") / len(files)

    for cores in sides:
        turn(cores)
    taken = take_turns({str(cores): lambda cores=cores: turn(cores) for cores in sides}, rounds)
    for side in sides.values():
        side.close()
    return [
        {"threads": int(cores), "microseconds": spread(values), "ratio": spread(taken["1"] / values)} for cores, values in taken.items()
    ]


def resident(key: str) -> int:
    """VmRSS (now) or VmHWM (most so far) of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def bounded(folder: Path) -> dict[str, Any]:
    """Two shuffled passes over many items: bytes stated, bytes counted, and what the process grew by, from after its first batches on."""
    from attar.stages.augment.engine import Augment
    from attar.stages.augment.loading import AugmentingLoader

    made.make(folder, ITEMS)
    files = sorted(str(path) for path in folder.rglob("*.jpg"))
    augment = Augment("default", ITEM_SIDE)
    limits = {"cache_bytes": CACHE_BYTES, "queue_bytes": QUEUE_BYTES, "decode_bytes": DECODE_BYTES}
    rng = np.random.default_rng(0)
    with AugmentingLoader(files, augment, cache_bytes=0, threads=2) as warm:  # compiles, and imports what is imported late
        for _ in warm.stream(np.arange(640).reshape(-1, 64)):
            pass
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before, start = resident("VmRSS"), time.perf_counter()
    with AugmentingLoader(files, augment, threads=2, **limits) as loader:
        for _ in range(2):
            for _ in loader.stream(np.array_split(rng.permutation(ITEMS), ITEMS // 64)):
                pass
        seconds, grown, found = time.perf_counter() - start, resident("VmHWM") - before, loader.memory()
    counted = found.cache.peak + found.queue + found.decoding
    return {
        "items": ITEMS,
        "decoded": ITEMS * ITEM_SIDE**2 * 3,
        "stated": found.stated,
        "counted": counted,
        "grown": grown,
        "kept": found.cache.items,
        "hits": found.cache.hits,
        "seconds": seconds,
        "peaks": {"cache": found.cache.peak, "queue": found.queue, "decoding": found.decoding},
    }


def cell(found: Mapping[str, float], digits: int = 0) -> str:
    return f"{found['median']:.{digits}f} ({found['low']:.{digits}f} – {found['high']:.{digits}f})"


def report(
    rows: Sequence[Mapping[str, Any]], scaled: Sequence[Mapping[str, Any]], memory: Mapping[str, Any], missing: Mapping[str, str]
) -> str:
    parts = []
    for row in rows:
        lines = []
        for name, found in row["microseconds"].items():
            share = f"{row['decoding'][name]['median']:.0%}" if name in row["decoding"] else "–"
            ratio = row["ratios"].get(name)
            lines.append(
                {"loader": name, "µs a photo": cell(found), "decoding": share, "attar is faster by": cell(ratio, 2) if ratio else "–"}
            )
        lines += [
            {"loader": name, "µs a photo": f"failed: {why[:80]}", "decoding": "–", "attar is faster by": "–"}
            for name, why in row["failed"].items()
        ]
        best = min((name for name in LOADERS if name in row["ratios"]), key=lambda name: row["microseconds"][name]["median"], default="")
        reached = row["ratios"][best]["median"] >= GOAL if best else None
        goal = (
            f"goal ≥ {GOAL} of the best loader ({best}): {'reached' if reached else 'MISSED'}"
            if best
            else "goal: not measured, no loader to compare with"
        )
        parts.append(f"{row['photos']} photos of {row['megabytes']:.2f} MB, {row['chain']}; {goal}\n\n{workloads.table(lines)}")
    if scaled:
        lines = [
            {"threads": str(row["threads"]), "µs a photo (wall)": cell(row["microseconds"]), "faster by": cell(row["ratio"], 2)}
            for row in scaled
        ]
        verdict = "reached" if scaled[-1]["ratio"]["median"] >= THREADS_GOAL else "MISSED"
        parts.append(f"threads; goal ≥ {THREADS_GOAL}: {verdict}\n\n{workloads.table(lines)}")
    if memory:
        mb = {name: f"{memory[name] / 2**20:.1f} MiB" for name in ("decoded", "stated", "counted", "grown")}
        within = memory["counted"] <= memory["stated"] and memory["grown"] <= memory["stated"]
        parts.append(
            f"memory: {memory['items']:,} items, {mb['decoded']} decoded; stated {mb['stated']}, counted {mb['counted']}, the process grew by {mb['grown']} "
            f"({memory['kept']:,} items kept, {memory['hits']:,} found again): {'within' if within else 'ABOVE'} what is stated"
        )
    parts += [f"{name} was not measured: {why}" for name, why in missing.items()]
    return "\n\n".join(parts)


def open_sides(names: Sequence[str], pythons: Mapping[str, str]) -> tuple[list[Side], dict[str, str]]:
    """Those that can be imported, and why the others cannot; attar must."""
    found, missing = [], {}
    for name in names:
        try:
            found.append(Side(name, pythons[name]))
        except SystemExit as error:
            if name == "attar":
                raise
            missing[name] = str(error)
    return found, missing


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path, help="a folder of JPEG photos")
    arguments.add_argument("--peers-python", default=sys.executable, help="a Python with albumentations, opencv, simplejpeg, torch")
    arguments.add_argument("--torchvision-python", help="a Python with torchvision, when that is another")
    arguments.add_argument(
        "--parts", nargs="+", choices=["small", "large", "threads", "memory"], default=["small", "large", "threads", "memory"]
    )
    arguments.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    arguments.add_argument("--photos", type=int, default=128)
    arguments.add_argument("--large", type=int, default=16)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    files = sorted(str(path) for path in given.folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))[: given.photos]
    if not files:
        raise SystemExit(f"{given.folder}: no .jpg files")
    pythons = dict.fromkeys(SIDES, given.peers_python) | {"attar": sys.executable}
    pythons |= dict.fromkeys(("torchvision", "torchvision-pil"), given.torchvision_python or given.peers_python)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        data = {"small": files, "large": enlarge(files[: given.large], Path(place)) if "large" in given.parts else []}
        wanted = [name for name in ("small", "large") if name in given.parts]
        sides, missing = open_sides(dict.fromkeys(["attar", *given.sides]), pythons) if wanted else ([], {})  # type: ignore[arg-type]
        for name in wanted:
            for chain in CHAINS:
                workloads.say(f"{name}, {chain}")
                rows.append(compare(sides, data[name], chain, given.rounds))
        for side in sides:
            side.close()
    enough = len(os.sched_getaffinity(0)) >= 2
    scaled = threads(sys.executable, files, given.rounds) if "threads" in given.parts and enough else []
    with tempfile.TemporaryDirectory() as place:
        memory = bounded(Path(place)) if "memory" in given.parts else {}
    print(report(rows, scaled, memory, missing))
    record(given, versions={side.name: side.version for side in sides}, missing=missing, rows=rows, threads=scaled, memory=memory)


if __name__ == "__main__":
    main()
