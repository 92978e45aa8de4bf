"""Photos to vectors in a process of its own, asked in JSON lines (runtimes.py has the asking side); benchmarks/embedding.py compares them.

    python embedding_peers.py model|model-torch|model-alone|attar|decoding|pipeline|dataloader CORES MODEL

MODEL is a transformers folder. Every side has CORES cores and as many threads or workers, and gives the pooled embedding of every photo of a folder.

- model: attar's network alone, compiled as attar compiles it, on input that lies ready in memory, a batch on each core: what loading is to keep up with.
- model-torch: the same by torch. model-alone: by torch, one batch after the other, on its own threads.
- attar: its stage embed, from files to vectors. decoding: the reading and decoding of it alone.
- pipeline: transformers' image-feature-extraction pipeline with Pillow's processor, on files.
- dataloader: what is written by hand: Pillow in a torch DataLoader with a worker per core, the same transformers model.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

kept: list[Any] = []
"""What lasts as long as the process."""
READY, BATCH = 8, 16  # batches that lie ready; photos of a batch for those who do not choose it themselves

Pass = Callable[[Path], int]
"""Embeds every photo of a folder, and says how many there were."""


def attar_passes(model: str, cores: int) -> dict[str, Pass]:
    import numpy as np
    import torch

    from attar import scan
    from attar.modalities.image import Loader
    from attar.models import sources
    from attar.stages import encode
    from attar.workspace import Job

    torch.set_num_threads(cores)
    scratch = tempfile.TemporaryDirectory()
    home = Path(scratch.name)
    known: dict[Path, Any] = {}

    def items_of(folder: Path) -> tuple[Any, Any, Any]:
        from attar import config

        if folder not in known:
            items = scan(home / folder.name, data=str(folder), workers=cores, quiet=True)
            found = sources.resolve(config.ModelChoice(model=f"hf:{model}"), items, 16, Job("embed", home / "job", quiet=True))
            known[folder] = items, found.preprocess, sources.network(found)
        return known[folder]

    @functools.cache
    def compiled(folder: Path) -> Any:
        _, preprocess, network = items_of(folder)
        return encode.compiled(network, preprocess, encode.WORTH)  # the few photos stand for many

    def attar(folder: Path) -> int:
        items, preprocess, _ = items_of(folder)
        network = compiled(folder)
        with Loader(items, preprocess, workers=cores) as loader:
            made = encode.encode(network, preprocess, loader, items.ids(), lambda count: None)
        assert np.isfinite(made).all()
        return len(made)

    def decoding(folder: Path) -> int:
        items, preprocess, _ = items_of(folder)
        with Loader(items, preprocess, workers=cores) as loader:
            return sum(len(ids) for ids, _ in loader.stream(np.array_split(items.ids(), -(-len(items) // encode.batch_size(preprocess)))))

    def ready(folder: Path) -> tuple[Any, list[Any], int]:
        items, preprocess, network = items_of(folder)
        size = encode.batch_size(preprocess)
        with Loader(items, preprocess, workers=cores) as loader:
            made = [encode.as_input(loader.batch(items.ids()[start : start + size]), preprocess) for start in range(0, READY * size, size)]
        return network, [batch for batch in made if len(batch)], len(items)

    def model_pass(folder: Path, network: Any = None) -> int:
        plain, made, count = inputs(folder)
        network, done = network or plain, 0
        with encode.streams(network) as (pool, free):

            def compute(batch: Any) -> int:
                own = free.pop()
                with torch.inference_mode():
                    own(batch)
                free.append(own)
                return len(batch)

            waiting = []
            while done < count:
                waiting.append(pool.submit(compute, made[len(waiting) % len(made)]))
                done += len(made[(len(waiting) - 1) % len(made)])
            return sum(one.result() for one in waiting)

    def alone(folder: Path) -> int:
        network, made, count = inputs(folder)
        done = turn = 0
        with torch.inference_mode():
            while done < count:
                done += len(network(made[turn % len(made)])[0])
                turn += 1
        return done

    lying: dict[Path, Any] = {}
    kept.append(scratch)

    def inputs(folder: Path) -> Any:
        if folder not in lying:
            lying[folder] = ready(folder)
        return lying[folder]

    return {
        "attar": attar,
        "decoding": decoding,
        "model": lambda folder: model_pass(folder, compiled(folder)),
        "model-torch": model_pass,
        "model-alone": alone,
    }


def files_of(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.iterdir())


def pipeline_pass(model: str, cores: int) -> Pass:
    import torch
    from transformers import pipeline
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(cores)
    extract = pipeline("image-feature-extraction", model=model, device="cpu", pool=True)

    def run(folder: Path) -> int:
        with torch.inference_mode():
            return len(extract(files_of(folder), batch_size=BATCH))

    return run


class Files:
    """A map-style data set for torch's DataLoader."""

    def __init__(self, files: list[str]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Any:
        import numpy as np
        import torch
        from PIL import Image

        image = Image.open(self.files[number]).convert("RGB")
        short = min(image.size)
        image = image.resize([256 * side // short for side in image.size], Image.Resampling.BILINEAR)
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        pixels = np.array(image.crop((left, top, left + 224, top + 224)))
        return (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - 0.5) / 0.5


def dataloader_pass(model: str, cores: int) -> Pass:
    import torch
    from torch.utils.data import DataLoader
    from transformers import AutoModel

    torch.set_num_threads(cores)
    network = AutoModel.from_pretrained(model).eval()

    def run(folder: Path) -> int:
        loader: DataLoader[Any] = DataLoader(Files(files_of(folder)), BATCH, num_workers=cores)  # type: ignore[arg-type]
        with torch.inference_mode():
            return sum(len(network(batch).pooler_output) for batch in loader)

    return run


def serve(side: str, cores: int, model: str) -> None:
    """Answers requests until there are no more; what a library prints goes to stderr."""
    replies, sys.stdout = sys.stdout, sys.stderr
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])
    made: dict[str, Pass] = {}

    def pass_of() -> Pass:
        if side not in made:
            makers = {"pipeline": pipeline_pass, "dataloader": dataloader_pass}
            made.update({side: makers[side](model, cores)} if side in makers else attar_passes(model, cores))
        return made[side]

    def answer(do: str, folder: str = "") -> Any:
        run = pass_of()
        if do == "open":
            return None
        start = time.perf_counter()
        count = run(Path(folder))
        return count, time.perf_counter() - start

    for line in sys.stdin:
        reply: dict[str, Any]
        try:
            with contextlib.redirect_stdout(sys.stderr):
                reply = {"value": answer(**json.loads(line))}
        except Exception as error:  # whatever it is, the asking side must hear of it
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
