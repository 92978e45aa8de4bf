"""Whether generated items help a student follow its encoder, beside what would be known to help and what could not: one generator, four verdicts.

    python benchmarks/generated.py DATA [--items 2000] [--minutes 5 | --steps 1500] [--seeds 0 1 2]
        [--model self --self-steps N --self-width 16 --clusters 0] [--sheet FILE.png] [--out FILE.json]

For each seed so many items are drawn; the stages up to augment see them alone. The check of the product then judges, in the same student and on
the same held-out items: the generator's accepted samples; noise (must not help); training items again (cannot help); further real items that
nothing has seen (what as many good samples could bring). Verdicts of one seed are not independent of each other: they share items and encoder.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workloads
from environment import record

from attar import config
from attar.modalities.image import SUFFIXES, Loader, prepare
from attar.models import sources
from attar.stages.augment import benefit, generate
from attar.stages.augment.policy import starting_policy
from attar.stages.cluster.cluster import cluster
from attar.stages.curate.curate import curate
from attar.stages.embed import embed
from attar.stages.scan import scan
from attar.workspace import Job


def measure(files: list[Path], given: argparse.Namespace, seed: int, home: Path) -> list[dict[str, Any]]:
    """The rows of one seed: diversity, acceptance, and the check's verdict on each kind of samples."""
    order = np.random.default_rng(seed).permutation(len(files))
    chosen, unseen = np.split(order, [given.items])
    listed = home / "items.txt"
    listed.write_text("".join(f"{files[number].resolve()}\n" for number in np.sort(chosen)))

    def job(name: str) -> Job:
        return Job(name, home / name, seed=seed, workers=given.threads)

    settings = config.Generate(generate_minutes=given.minutes, generate_steps=given.steps, generate_count=given.count)
    items = scan(config.Data(data=str(listed)), job("scan"))
    vectors = embed(
        items,
        config.ModelChoice(model=given.model),
        config.Embed(self_steps=given.self_steps, self_width=given.self_width),
        settings,
        job("embed"),
    )
    clusters = cluster(items, vectors, config.Cluster(clusters=given.clusters), job("cluster"))
    selection = curate(items, vectors, clusters, config.Curate(), job("curate"))
    policy, start = starting_policy(items, settings, job("augment")), time.perf_counter()
    made = generate.generated(items, vectors, clusters, selection, policy, settings, job("augment"))
    assert made is not None, "asked for by minutes or steps"
    if given.sheet:
        shutil.copyfile(made.folder / "sheet.png", given.sheet)
    seconds = time.perf_counter() - start
    rows = [{"seed": seed, "samples": "generated", "seconds": seconds} | row for row in made.evidence]
    if len(made.evidence) == 3:
        count = len(list(made.folder.glob("[0-9]*.png")))
        network, preprocess, rng = sources.network(vectors.model), vectors.model.preprocess, np.random.default_rng(seed)
        learned = generate.material(items, clusters, selection, policy, job("augment"))
        with Loader(items, preprocess, workers=given.threads) as loader:
            further = [prepare(files[number].read_bytes(), preprocess, max_pixels=10**9) for number in unseen[:count]]
            kinds = {
                "noise": rng.integers(0, 256, (count, *preprocess.size, 3)).astype(np.uint8),
                "training items again": loader.batch(rng.choice(learned.ids, min(count, len(learned.ids)), replace=False)),
                "further real items": np.stack(further) if further else None,
            }
            held = loader.batch(learned.held)
            for kind, images in kinds.items():
                if images is None:
                    raise SystemExit(f"{given.items} of {len(files)} items leave none that nothing has seen; give fewer --items")
                lessons = generate.lessons(learned, network, preprocess, loader, images)
                steps = benefit.check_steps(settings, lessons, job("augment"))  # those of the generator's own check: kept in its folder
                rows.append({"seed": seed, "samples": kind} | benefit.check(lessons, held, steps, job(f"check {kind}")))
    return rows


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("data", type=Path, help="a folder of images")
    arguments.add_argument("--items", type=int, default=2000)
    arguments.add_argument("--minutes", type=float, default=None, help="for the generator and its check")
    arguments.add_argument("--steps", type=int, default=None, help="of the generator, instead")
    arguments.add_argument("--count", type=int, default=500, help="accepted samples wanted")
    arguments.add_argument("--model", default="self")
    arguments.add_argument("--self-steps", type=int, default=None)
    arguments.add_argument("--self-width", type=int, default=16)
    arguments.add_argument("--clusters", type=int, default=0)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--sheet", type=Path, help="where the contact sheet of the last seed goes")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    if given.minutes is None and given.steps is None:
        arguments.error("give --minutes or --steps")
    return given


def main() -> None:
    given = parse()
    torch.set_num_threads(given.threads)
    files = sorted(path for path in given.data.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(files) < given.items:
        raise SystemExit(f"{given.data}: {len(files)} images; expected at least --items {given.items}")
    rows: list[dict[str, Any]] = []
    for seed in given.seeds:
        with tempfile.TemporaryDirectory() as home:
            rows += measure(files, given, seed, Path(home))
    shown = [
        {
            "seed": row["seed"],
            "samples": row["samples"],
            "what": row["generated"],
            "value": f"{row['value']:.3f}",
            "95 % interval": f"{row['low']:.3f} to {row['high']:.3f}" if "low" in row else "",
            "verdict": row.get("verdict", ""),
        }
        for row in rows
    ]
    print(workloads.table(shown))
    record(given, rows=rows)


if __name__ == "__main__":
    main()
