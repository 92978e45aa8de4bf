"""When items are added to a finished run: its encoder and its vectors are used again where they still hold.

Decisions are made once and kept with the half-done work, so that a run that was killed goes on with the same ones.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from attar import __version__, config, formats
from attar.models import sources
from attar.records import Items, Model, Shard, Vectors
from attar.stages.augment.policy import policy_fingerprint
from attar.workspace import Job

Learned = tuple[Model, tuple[dict[str, float], ...]]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _recipe(choice: config.ModelChoice, settings: config.Embed, augmentation: config.Augment, job: Job) -> str:
    """Everything a learned encoder depends on besides the items."""
    sections = [dataclasses.asdict(one) for one in (choice, dataclasses.replace(settings, relearn_share=0.0), augmentation)]
    return _digest([sections, sources.fingerprint(choice), policy_fingerprint(augmentation), job.seed, __version__])


def learned(
    items: Items, choice: config.ModelChoice, settings: config.Embed, augmentation: config.Augment, job: Job, learn: Callable[[], Learned]
) -> Learned:
    """The encoder that is in the run folder, where it was learned by the same recipe from mostly the same items; else a new one.

    It is not used again where more than `relearn_share` of the training items have come since, or where one of the items it was learned
    from would now be held out.
    """
    recipe, content, train = (
        _recipe(choice, settings, augmentation, job),
        items.column("content").astype(str),
        items.column("split") == "train",
    )

    def write(folder: Path) -> None:
        folder.mkdir()
        table, before = job.kept("learned.parquet"), job.before()
        if table is None or before is None or not table.num_rows or table["recipe"][0].as_py() != recipe:
            return
        known = np.isin(content, table["content"].to_numpy(zero_copy_only=False).astype(str))
        if known[~train].any() or (~known[train]).mean() > settings.relearn_share:
            return
        formats.save_model(folder, before.model, "encoder")
        formats.write_json(folder / "signals.json", before.signals)
        formats.write_table(folder / "learned.parquet", table)

    folder = job.build("encoder", write)
    if not (folder / "learned.parquet").exists():
        made = learn()
        of = sorted(set(content[train].tolist()))
        job.keep("learned.parquet", pa.table({"content": of, "recipe": [recipe] * len(of)}))
        return made
    table = pq.read_table(folder / "learned.parquet")
    job.keep("learned.parquet", table)
    new = int((~np.isin(content[train], table["content"].to_numpy(zero_copy_only=False).astype(str))).sum())
    job.say(
        f"the encoder is the one learned here before, from {table.num_rows:,} distinct items; {new:,} training items have come since "
        f"(--relearn-share 0 learns anew)"
    )
    return formats.load_model(folder, "encoder"), tuple(formats.read_json(folder / "signals.json"))


def _identities(items: Items) -> np.ndarray:
    """What an item's vector depends on: pixels, and how and at what size they are stored (JPEG is decoded at a reduced scale)."""
    columns = (items.column(name).astype(str) for name in ("content", "format", "bytes"))
    return functools.reduce(lambda a, b: np.char.add(np.char.add(a, " "), b), columns)


def _encoder_digest(model: Model, choice: config.ModelChoice) -> str:
    digest = hashlib.sha256(
        _digest([model.source, dataclasses.asdict(model.preprocess), model.cuts, sources.fingerprint(choice), __version__]).encode()
    )
    for name in sorted(model.state):
        digest.update(name.encode() + model.state[name].detach().contiguous().cpu().view(-1).numpy().tobytes())
    return digest.hexdigest()


def vectors(
    items: Items,
    model: Model,
    choice: config.ModelChoice,
    dim: int,
    size: int,
    job: Job,
    encode: Callable[[Sequence[np.ndarray]], list[Path]],
) -> list[Callable[[], Shard]]:
    """Shards of `size` vectors of all items: those the same encoder made before are read, the others encoded.

    `encode` takes the ids of each shard that is missing and returns the files of their vectors.
    """
    identity, encoder, ids = _identities(items), _encoder_digest(model, choice), items.ids()

    def write(folder: Path) -> None:
        folder.mkdir()
        place = np.full(len(ids), -1)
        table, before = job.kept("vectors.parquet"), job.before()
        if table is not None and before is not None and table.num_rows and table["encoder"][0].as_py() == encoder and before.dim == dim:
            names = table["identity"].to_numpy(zero_copy_only=False).astype(str)
            order = np.argsort(names)
            at = order[np.searchsorted(names, identity, sorter=order).clip(0, len(names) - 1)]
            place = np.where(names[at] == identity, at, -1)
            _copy(before, place, dim, folder / "vectors.f16")
        np.save(folder / "place.npy", place)

    folder = job.build("before", write)
    place = np.load(folder / "place.npy")
    job.keep("vectors.parquet", pa.table({"identity": identity.tolist(), "encoder": [encoder] * len(identity)}))
    missing = ids[place < 0]
    files = encode([missing[start : start + size] for start in range(0, len(missing), size)])
    if len(missing) == len(ids):
        return [functools.partial(formats.read_shard, file) for file in files]
    job.say(f"{len(ids) - len(missing):,} vectors are those the same encoder made before; {len(missing):,} items were encoded")
    whole = folder / "vectors.f16"
    target = np.memmap(whole, np.float16, "r+", shape=(len(ids), dim))
    for file in files:
        shard = formats.read_shard(file)
        target[np.searchsorted(ids, shard.ids)] = shard.values
    target.flush()
    return [functools.partial(_shard, whole, dim, ids, start, min(start + size, len(ids))) for start in range(0, len(ids), size)]


def _copy(before: Vectors, place: np.ndarray, dim: int, path: Path) -> None:
    """A table (n, dim) float16 with the vectors whose row in `before` is known; the others are zero."""
    target = np.memmap(path, np.float16, "w+", shape=(len(place), dim))
    order, start = np.argsort(place, kind="stable"), 0
    for shard in before.batches():
        low, high = np.searchsorted(place, [start, start + len(shard.ids)], sorter=order)
        rows = order[low:high]
        target[rows] = shard.values[place[rows] - start]
        start += len(shard.ids)
    target.flush()


def _shard(path: Path, dim: int, ids: np.ndarray, start: int, stop: int) -> Shard:
    return Shard(ids[start:stop], np.array(np.memmap(path, np.float16, "r").reshape(-1, dim)[start:stop]))
