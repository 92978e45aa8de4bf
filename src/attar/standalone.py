"""Compression alone: a torch module and tensors in, a small module, its file and its certificate out. Nothing else of attar is needed.

The tensors are what the module takes. They are split by content; the module's own vectors of them are clustered, for balance and for the
worst case of the certificate; then come the same loop, the same figures and the same export as in a run folder.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from attar import records as r
from attar.config import Compress, Config, Evaluate, build_config, flatten
from attar.errors import DataError, UsageError
from attar.formats import read_shard, shard_table
from attar.models import sources
from attar.models.network import tensor_of
from attar.stages.cluster.cluster import cluster
from attar.stages.compress.feed import TensorFeed
from attar.stages.compress.search import compress as search
from attar.stages.evaluate import Findings, measure
from attar.stages.export import CHECKED, deliver
from attar.stages.scan import FEWEST, split_by_content
from attar.workspace import Job, Stage, Workspace

BATCH = 32
NOT_TAKEN = {"model", "weights", "input_size", "mean", "std", "labels", "workers", "out"}


class Plain(nn.Module):
    """A module whose output is the tensor in what it returns."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return tensor_of(self.body(x))


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What `attar.compress(module, inputs, …)` returns."""

    module: nn.Module
    """The small model, in evaluation mode: what the module took → the tensor it returned. In float32, also where the delivered file is int8 or float16."""
    onnx: Path
    """The delivered file."""
    met: bool
    reason: str
    """What was delivered and why; what binds when the budget was not met."""
    certificate: r.Certificate
    """Agreement with the module on test items that nothing has seen, of what kind, overall and in the worst cluster."""
    front: r.Front
    """Every candidate with its figures."""
    evidence: r.Evidence
    folder: Path
    """Where all of it lies; a temporary one lives as long as this object."""
    _alive: Any = field(default=None, repr=False)

    def __str__(self) -> str:
        student, missed = self.front.student, "" if self.met else f"Budget {self.front.budget!r} not met: {self.reason}. "
        figures = student.figures
        return (
            f"{missed}{student.name}: {figures['size_ratio']:.2f}x the size, {figures['macs_ratio']:.2f}x the MACs, "
            f"{figures['latency_ratio']:.2f}x the latency; {self.certificate}"
        )


def compress_module(
    module: nn.Module, inputs: Iterable[Tensor], *, out: str | Path | None = None, quiet: bool = False, **settings: Any
) -> Compressed:
    """Compresses a module to a budget on unlabelled inputs; see attar.compress.

    Raises DataError for inputs that cannot be used, ModelError for a module that does not take them, UsageError for settings.
    """
    alive = None if out is not None else tempfile.TemporaryDirectory(prefix="attar-")
    folder = Path(out) if out is not None else Path(alive.name)  # type: ignore[union-attr]
    config = _config(settings, folder)
    if not isinstance(module, nn.Module):
        raise UsageError(f"the module is a {type(module).__name__}; expected a torch.nn.Module, or the path of a run folder")
    source = sources.hold(module)
    tensors = stack(inputs, sources.HELD[source])
    stages = _stages(tensors, source)
    with Workspace(folder, stages) as space:
        space.claim(f"tensors {_digest(tensors)}", flatten(config))
        made = {name: space.run(name, config, quiet=quiet) for name in stages}
    front, evidence = made["compress"], made["evaluate"]
    network = sources.network(front.student.model)
    return Compressed(
        module=Plain(network.body).eval(),
        onnx=made["export"].onnx,
        met=front.met,
        reason=front.reason,
        certificate=evidence.certificate,
        front=front,
        evidence=evidence,
        folder=folder,
        _alive=alive,
    )


def _config(settings: Mapping[str, Any], folder: Path) -> Config:
    """The validated settings; a student may be a module as well."""
    taken = [name for name in NOT_TAKEN if name in settings]
    if taken:
        raise UsageError(
            f"{', '.join(sorted(taken))}: not a setting of attar.compress(module, …): its inputs come as the module takes them"
        )
    given = dict(settings)
    if isinstance(given.get("student"), nn.Module):
        given["student"] = sources.hold(given["student"])
    return build_config({"data": "tensors"} | given | {"out": str(folder)})


# inputs


def stack(inputs: Iterable[Tensor], body: nn.Module) -> Tensor:
    """All inputs as one tensor (n, …), float32 or int64; raises DataError for what cannot be used.

    One tensor is (items, …). Of several, each is a batch if the module takes it as one (as many rows out as in), else an item.
    """
    if isinstance(inputs, Tensor | np.ndarray):
        parts = [_checked(inputs, 0)]
    elif isinstance(inputs, str | Path | Mapping) or not isinstance(inputs, Iterable):
        raise DataError(f"the inputs are a {type(inputs).__name__}; expected a tensor (items, …) or an iterable of tensors")
    else:
        parts = [_checked(one, number) for number, one in enumerate(inputs)]
    if not parts:
        raise DataError(f"the inputs are empty; expected a tensor (items, …) or an iterable of tensors, {FEWEST} items or more")
    if not isinstance(inputs, Tensor | np.ndarray) and not _takes(body, parts[0]):
        parts = [one[None] for one in parts]
    for number, one in enumerate(parts):
        if one.shape[1:] != parts[0].shape[1:] or one.dtype != parts[0].dtype:
            raise DataError(
                f"input {number} has items of {_kind(one)}, the first ones are {_kind(parts[0])}; all must be alike: resize, pad or convert them"
            )
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    if whole.dim() < 2:
        raise DataError(f"the inputs are one tensor of shape {tuple(whole.shape)}; expected (items, …), the items along the first axis")
    return whole


def _kind(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape[1:])} and type {str(tensor.dtype).removeprefix('torch.')}"


def _checked(one: Any, number: int) -> Tensor:
    """An input as a tensor on the CPU, floats as float32 and whole numbers as int64."""
    if not isinstance(one, Tensor | np.ndarray):
        remedy = " (of pairs such as a data set's, pass the inputs alone: (x for x, _ in loader))" if isinstance(one, tuple | list) else ""
        raise DataError(f"input {number} is a {type(one).__name__}; expected a tensor{remedy}")
    tensor = torch.as_tensor(one).detach().cpu()
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise DataError(f"input {number} has type {tensor.dtype}; expected floats or whole numbers")
    if not tensor.is_floating_point():
        return tensor.long()
    if not torch.isfinite(tensor).all():
        raise DataError(f"input {number} holds NaN or infinite values; take it out or repair it")
    return tensor.float()


def _takes(body: nn.Module, one: Tensor) -> bool:
    """Whether a module takes a tensor as a batch: it runs, and gives a row for each of its items."""
    try:
        with torch.no_grad():
            output = tensor_of(body(one))
    except Exception:  # whatever a module raises for an input of another shape
        return False
    return one.dim() > 1 and output.dim() > 1 and len(output) == len(one)


def _contents(tensors: Tensor) -> list[str]:
    """A hash of each item's values: equal items have equal ones."""
    return [hashlib.blake2b(one.contiguous().numpy().tobytes(), digest_size=16).hexdigest() for one in tensors]


def _digest(tensors: Tensor) -> str:
    return hashlib.sha256(f"{tensors.dtype} {tuple(tensors.shape)}".encode() + tensors.contiguous().numpy().tobytes()).hexdigest()[:16]


# stages: the same as of a run folder, with tensors in the place of files


def _stages(tensors: Tensor, source: str) -> dict[str, Stage]:
    def bound(make: Any) -> Any:
        return functools.partial(make, tensors)

    return {
        "scan": Stage(make=bound(_scan), record=r.Items, settings=("data",)),
        "embed": Stage(
            make=functools.partial(_embed, tensors, source),
            record=r.Vectors,
            needs=("scan",),
            settings=("model",),
            fingerprint=lambda _: source,
        ),
        "cluster": Stage(make=cluster, record=r.Clusters, needs=("scan", "embed"), settings=("cluster",)),
        "compress": Stage(make=bound(_compress), record=r.Front, needs=("scan", "embed", "cluster"), settings=("compress",)),
        "evaluate": Stage(make=bound(_evaluate), record=r.Evidence, needs=("scan", "cluster", "compress"), settings=("evaluate",)),
        "export": Stage(make=bound(_export), record=r.Export, needs=("scan", "embed", "cluster", "compress", "evaluate")),
    }


def _scan(tensors: Tensor, data: Any, job: Job) -> r.Items:
    """Every input with its content hash and split."""
    contents, count = _contents(tensors), len(tensors)
    if len(set(contents)) < FEWEST:
        raise DataError(
            f"the inputs are {count} items, {len(set(contents))} of them distinct; at least {FEWEST} distinct ones are needed: add some"
        )
    job.say(f"{count:,} inputs of {_kind(tensors)}, {count - len(set(contents)):,} of them exact duplicates")
    columns = {
        "id": np.arange(count),
        "path": [f"input {number}" for number in range(count)],
        "modality": ["tensor"] * count,
        "content": contents,
        "bytes": [tensors[0].numel() * tensors.element_size()] * count,
        "format": [str(tensors.dtype).removeprefix("torch.")] * count,
        "split": split_by_content(contents, data.test_share, data.validation_share),
    }
    table = pa.table(
        [pa.array(columns[one.name], one.type) if one.name in columns else pa.nulls(count, one.type) for one in r.ITEM_SCHEMA],
        r.ITEM_SCHEMA,
    )
    return r.Items(root="tensors", table=table, quarantine=r.QUARANTINE_SCHEMA.empty_table())


def _split(items: r.Items) -> np.ndarray:
    """The split of every item, "" for a copy of an earlier one."""
    split, content = items.column("split").astype(str), items.column("content").astype(str)
    first = np.zeros(len(items), bool)
    first[np.unique(content, return_index=True)[1]] = True
    return np.where(first, split, "")


def _embed(tensors: Tensor, source: str, items: r.Items, choice: Any, job: Job) -> r.Vectors:
    """The module's own vectors of all inputs."""
    model = sources.resolve_module(source, tensors[:2], choice.output, job)
    network, ids = sources.network(model), items.ids()

    def encode() -> pa.Table:
        with torch.no_grad():
            made = [network(tensors[start : start + BATCH])[0].numpy() for start in range(0, len(ids), BATCH)]
        return shard_table(ids, np.concatenate(made))

    job.shard(0, encode)
    shard = functools.partial(read_shard, job.folder / "shard-00000.parquet")
    return r.Vectors(shards=[shard], count=len(ids), dim=shard().values.shape[1], model=model)


def _original(vectors: r.Vectors, clusters: r.Clusters) -> r.Model:
    return replace(vectors.model, head=clusters.head)


def _compress(tensors: Tensor, items: r.Items, vectors: r.Vectors, clusters: r.Clusters, settings: Compress, job: Job) -> r.Front:
    feed = TensorFeed(tensors, _split(items), clusters.column("cluster"), job)
    return search(feed, _original(vectors, clusters), settings, job)


def _evaluate(tensors: Tensor, items: r.Items, clusters: r.Clusters, front: r.Front, settings: Evaluate, job: Job) -> r.Evidence:
    ids = np.flatnonzero(_split(items) == "test")
    copies = int((items.column("split") == "test").sum()) - len(ids)
    note = f"The figures rest on {len(ids)} test inputs; {copies} copies of one another were left out. Near duplicates were not looked for."

    def inputs(part: np.ndarray) -> Iterator[np.ndarray]:
        return (tensors[torch.from_numpy(part[low : low + BATCH])].numpy() for low in range(0, len(part), BATCH))

    def judge(_: Any) -> list[Findings]:
        return []

    return measure(ids, inputs, clusters.count, front, settings, [note], judge, job)


def _export(
    tensors: Tensor, items: r.Items, vectors: r.Vectors, clusters: r.Clusters, front: r.Front, evidence: r.Evidence, job: Job
) -> r.Export:
    ids = np.flatnonzero(_split(items) == "test")[:CHECKED]
    batches = [tensors[torch.from_numpy(part)] for part in np.array_split(ids, -(-len(ids) // BATCH))]
    return deliver(_original(vectors, clusters), front, evidence, batches, job)
