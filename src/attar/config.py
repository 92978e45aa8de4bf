"""All settings, one tree. The Python call, the command line and attar.toml build the same validated Config.

The text under each field is its documentation: the command line's help, `attar init` and docs/cli.md are made from it.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import os
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

from attar.errors import UsageError
from attar.stages.compress.budget import parse_budget

OBJECTIVES = ("nt-xent", "vicreg", "autoencoder", "cluster")
"""What an encoder can learn from; see models.learners."""


METHODS = ("auto", "learned", "kmeans", "spherical", "ward", "agglomerative", "dbscan", "hdbscan")
"""How clusters can be found; see stages.cluster.methods."""


def _between(value: float | None, low: float, high: float) -> bool:
    return value is None or low <= value <= high


@dataclass(frozen=True, kw_only=True)
class Data:
    data: str = ""
    """What to read: a folder, a quoted glob ("shots/**/*.png"), a list file (.txt, one path per line), a .tar/.zip archive or webdataset shard, or a .parquet file with image bytes."""
    test_share: float = 0.15
    """Share of the items kept untouched for the final figures (chosen by content, so duplicates never straddle it)."""
    validation_share: float = 0.1
    """Share of the items that choices inside the run are made on (chosen by content)."""
    max_megapixels: float = 100.0
    """Larger images are quarantined unread: the guard against decompression bombs."""

    def faults(self) -> Iterable[str]:
        if not self.data:
            yield "data: nothing to read; name a folder, glob, list file, archive or Parquet file"
        if not (0 < self.test_share < 1 and 0 < self.validation_share < 1 and self.test_share + self.validation_share < 0.9):
            yield f"test_share, validation_share: {self.test_share}, {self.validation_share}; each must be above 0 and their sum below 0.9, so that items to learn from remain"
        if self.max_megapixels <= 0:
            yield f"max_megapixels: {self.max_megapixels}; must be above 0"


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    model: str = "self"
    """The model: "self" (learn one from the data), "descriptors" (texture and colour, nothing is learned), "auto" (one of these by the data, and says why), "hf:FOLDER-OR-HUB-ID" (transformers), "timm:NAME", "FILE.py:BUILDER" (your own), or "FILE.onnx" (frozen: it is followed by a student, never cut)."""
    pretrained: str = ""
    """A pretrained model that --model auto may take, in any of these forms but "auto"; by default it looks for a known one among those transformers has downloaded before."""
    weights: str | None = None
    """Weights for FILE.py:BUILDER: .safetensors, or a PyTorch checkpoint that loads with weights_only."""
    output: str = "auto"
    """What the model returns: "logits" (a classifier), "embedding", or "auto" (asks the model's own description)."""
    input_size: int | None = None
    """Side of the square input in pixels; overrides the model's own description, and is required where it has none and the images differ in size."""
    mean: tuple[float, ...] | None = None
    """Per-channel mean in units of [0, 1]; overrides the model's own description."""
    std: tuple[float, ...] | None = None
    """Per-channel standard deviation in units of [0, 1]; overrides the model's own description."""

    def faults(self) -> Iterable[str]:
        if self.output not in ("auto", "logits", "embedding"):
            yield f"output: {self.output!r}; expected auto, logits or embedding"
        if not _between(self.input_size, 8, 1024):
            yield f"input_size: {self.input_size}; expected 8 to 1024 pixels"
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None and len(value) not in (1, 3):
                yield f"{name}: {value}; expected one or three numbers"
        if self.std is not None and min(self.std, default=0) <= 0:
            yield f"std: {self.std}; every number must be above 0"


@dataclass(frozen=True, kw_only=True)
class Augment:
    policy: str = ""
    """The policy to take instead of finding strengths per cluster: the name of a known one ("none", "default", "light", "strong", "simclr", "trivial") or a policy file; `attar augment search` writes one."""
    strength: float | None = None
    """Pins the strength of every family of transforms, 0 (none) to 1 (full range); by default found per cluster without labels."""
    frequency: float | None = None
    """Pins how often each family is applied to a view, 0 to 1; by default the family's own."""
    dials: str = "live"
    """Whether strength and frequency move while an encoder learns, by what is seen of held-out items ("live"), or stay as they were found or pinned ("held")."""

    def faults(self) -> Iterable[str]:
        for name in ("strength", "frequency"):
            if not _between(getattr(self, name), 0, 1):
                yield f"{name}: {getattr(self, name)}; expected 0 to 1"
        if self.dials not in ("live", "held"):
            yield f"dials: {self.dials!r}; expected live or held"
        if self.policy:
            from attar.stages.augment.catalogue import as_policy  # numpy: not for printing help

            try:
                as_policy(self.policy)
            except UsageError as error:
                yield f"policy: {error}"


@dataclass(frozen=True, kw_only=True)
class Generate:
    generate_minutes: float | None = None
    """Time for a small generative network (GAN) on the kept training items and the check whether its samples help a student; by default there is none. The step counts that fit are fixed once, from a measured pace."""
    generate_steps: int | None = None
    """Training steps of the generative network; overrides what `generate_minutes` would give."""
    generate_side: int | None = None
    """Side of the generated images in pixels: 32, 64 or 128; by default what the items and the encoder's input ask for."""
    generate_count: int = 500
    """Accepted samples wanted; at most four times as many are drawn."""

    def faults(self) -> Iterable[str]:
        if self.generate_minutes is not None and self.generate_minutes <= 0:
            yield f"generate_minutes: {self.generate_minutes}; expected above 0"
        if not _between(self.generate_steps, 1, 10**9):
            yield f"generate_steps: {self.generate_steps}; expected at least 1"
        if self.generate_side not in (None, 32, 64, 128):
            yield f"generate_side: {self.generate_side}; expected 32, 64 or 128"
        if not _between(self.generate_count, 1, 10_000):
            yield f"generate_count: {self.generate_count}; expected 1 to 10000"


@dataclass(frozen=True, kw_only=True)
class Embed:
    objective: str = "nt-xent"
    """What the encoder learns from: "nt-xent" (two views of an item alike, different items apart), "vicreg" (alike without negatives), "autoencoder" (an item from what is left of it), "cluster" (pseudo-labels of its own clusters, again and again). Several, comma-separated, one after the other."""
    self_steps: int | None = None
    """Training steps of the `self` encoder, per objective; by default set from the number of items. Training stops earlier on a plateau."""
    self_width: int = 16
    """Channels of the `self` encoder's first stage; doubles at each of its stages."""
    batch_size: int = 256
    """Items in a batch (each seen in two views)."""
    temperature: float = 0.2
    """Temperature of the NT-Xent loss."""
    self_kinds: int = 0
    """Pseudo-classes of the objective "cluster"; 0 takes the square root of the number of items."""
    relearn_share: float = 0.5
    """When items were added to a run folder, the encoder learned there before is kept while at most this share of the training items is new; 0 learns it anew whenever there are new ones."""
    adapt_steps: int = 0
    """Steps by which a given encoder learns on from the training items by the objective, at a small rate; kept only where it then tells held-out items apart better. 0 leaves it as it is."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """The names in `objective`, in order."""
        return tuple(name.strip() for name in self.objective.split(","))

    def faults(self) -> Iterable[str]:
        for name in self.objectives:
            if name not in OBJECTIVES:
                yield f"objective: {name!r}; expected one or several of {', '.join(OBJECTIVES)}"
        if len(set(self.objectives)) < len(self.objectives):
            yield f"objective: {self.objective}; every objective can be named once"
        if not (self.self_kinds == 0 or self.self_kinds >= 2):
            yield f"self_kinds: {self.self_kinds}; expected 0 (by the objective) or at least 2"
        if not (0 <= self.relearn_share <= 1):
            yield f"relearn_share: {self.relearn_share}; expected 0 to 1"
        if not _between(self.adapt_steps, 0, 10**9):
            yield f"adapt_steps: {self.adapt_steps}; expected 0 or more"
        if not _between(self.self_steps, 1, 10**9):
            yield f"self_steps: {self.self_steps}; expected at least 1"
        if not (8 <= self.self_width <= 256):
            yield f"self_width: {self.self_width}; expected 8 to 256"
        if self.batch_size < 4:
            yield f"batch_size: {self.batch_size}; expected at least 4"
        if not (0.01 <= self.temperature <= 2):
            yield f"temperature: {self.temperature}; expected 0.01 to 2"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    cluster_method: str = "auto"
    """How clusters are found: "auto" (the learned head where near items agree on it more than on k-means), "learned" (a head trained on what many fits agree on), "kmeans", "spherical", "ward", "agglomerative", or "dbscan" and "hdbscan" (any shape; a part may be noise)."""
    clusters: int = 0
    """Number of clusters; 0 chooses it without labels."""
    max_clusters: int = 30
    """Largest number of clusters tried when choosing."""
    components: int = 32
    """Dimensions of the space the clustering runs in (principal components of the normalised vectors)."""
    min_subcluster: int = 10
    """Smallest density cluster (HDBSCAN) reported inside a k-means cluster."""

    def faults(self) -> Iterable[str]:
        if self.cluster_method not in METHODS:
            yield f"cluster_method: {self.cluster_method!r}; expected one of {', '.join(METHODS)}"
        if self.clusters < 0 or self.clusters == 1:
            yield f"clusters: {self.clusters}; expected 0 (choose) or at least 2"
        if self.max_clusters < 2:
            yield f"max_clusters: {self.max_clusters}; expected at least 2"
        if self.components < 2:
            yield f"components: {self.components}; expected at least 2"
        if self.min_subcluster < 2:
            yield f"min_subcluster: {self.min_subcluster}; expected at least 2"


FLAGS = ("blank", "blurred", "dark", "glaring", "odd size", "odd shape")
"""What may be wrong with an item, in the order it is told; see stages/curate/quality.py."""


@dataclass(frozen=True, kw_only=True)
class Curate:
    keep_share: float = 1.0
    """Share of the training items, after duplicates and outliers, that the core set keeps."""
    keep_items: int | None = None
    """Number of training items that the core set keeps, at least one of every cluster; overrides `keep_share`."""
    core_method: str = "stratified"
    """How the core set is drawn from each cluster: "stratified" (the same share of every small group, copies last), "hierarchical" (k-means of k-means, evenly), "k-centre" (greedy cover), "density" (dense places thinned) or "random" (in proportion to size, for comparison)."""
    near_duplicate: float = 0.97
    """Two items are near duplicates when both the cosine similarity of their vectors and the correlation of their 16 × 16 thumbnails reach this."""
    outlier_cut: float = 0.98
    """Items with an outlier score above this are dropped."""
    drop_flagged: str = ""
    """Flagged training items to drop as well, comma-separated: "blank", "blurred", "dark", "glaring", "odd size", "odd shape"; by default they are only flagged, in selection.parquet and the report."""

    def faults(self) -> Iterable[str]:
        if not (0 < self.keep_share <= 1):
            yield f"keep_share: {self.keep_share}; expected above 0, at most 1"
        if not _between(self.keep_items, 1, 10**9):
            yield f"keep_items: {self.keep_items}; expected at least 1"
        if self.core_method not in ("stratified", "hierarchical", "k-centre", "density", "random"):
            yield f"core_method: {self.core_method!r}; expected stratified, hierarchical, k-centre, density or random"
        if not (0.5 <= self.near_duplicate <= 1):
            yield f"near_duplicate: {self.near_duplicate}; expected 0.5 to 1"
        if not (0 <= self.outlier_cut <= 1):
            yield f"outlier_cut: {self.outlier_cut}; expected 0 to 1"
        if unknown := set(self.dropped_flags) - set(FLAGS):
            yield f"drop_flagged: {', '.join(sorted(unknown))}; expected some of {', '.join(FLAGS)}"

    @property
    def dropped_flags(self) -> tuple[str, ...]:
        """The flags of `drop_flagged`."""
        return tuple(name for part in self.drop_flagged.split(",") if (name := part.strip()))


@dataclass(frozen=True, kw_only=True)
class Train:
    train_steps: int | None = None
    """Further training steps of the `self` encoder on the curated items with the found policy; by default half of self_steps, 0 skips. Given models are never changed here."""

    def faults(self) -> Iterable[str]:
        if not _between(self.train_steps, 0, 10**9):
            yield f"train_steps: {self.train_steps}; expected 0 or more"


@dataclass(frozen=True, kw_only=True)
class Compress:
    budget: str = "agreement>=0.95"
    """What the small model must meet, comma-separated: size, latency, macs, parameters (<=, absolute like 3MB or 2ms, or relative like 0.5x) and agreement (>=, with the original)."""
    minutes: float | None = None
    """Time for the compression loop; the steps that fit follow the measured speed, to the end. By default they follow from the model's and the data's size alone, the same on every machine."""
    student: str | None = None
    """Another architecture to distil the original into, instead of cutting it: "self" (a small encoder), "FILE.py:BUILDER", "hf:FOLDER" (with weights, or a bare config.json for random ones) or "timm:NAME". It sees the same inputs as the original, and gets as many logits. For an original from FILE.onnx, which is never cut, "self" where none is named."""
    distil_steps: int | None = None
    """Distillation steps per candidate; overrides what `minutes` or the default would give."""
    distil_batch: int = 64
    """Items in a distillation batch."""
    calibration_items: int = 256
    """Training items that repair and quantisation look at."""
    threads: int = 1
    """Threads for measuring latency (batch 1)."""
    runtime: str = "onnxruntime"
    """What runs the small model: "onnxruntime", "openvino" (needs the extra attar[openvino]), or "auto", for each candidate the faster of the two as measured here, if the candidate agrees no less in it. A candidate is judged in the runtime it is for. The original always runs in ONNX Runtime."""

    def faults(self) -> Iterable[str]:
        try:
            parse_budget(self.budget)
        except UsageError as error:
            yield f"budget: {error}"
        if self.minutes is not None and self.minutes <= 0:
            yield f"minutes: {self.minutes}; expected above 0"
        if not _between(self.distil_steps, 0, 10**9):
            yield f"distil_steps: {self.distil_steps}; expected 0 or more"
        for name, low in (("distil_batch", 2), ("calibration_items", 8)):
            if getattr(self, name) < low:
                yield f"{name}: {getattr(self, name)}; expected at least {low}"
        if not (1 <= self.threads <= 256):
            yield f"threads: {self.threads}; expected 1 to 256"
        if self.runtime not in ("onnxruntime", "openvino", "auto"):
            yield f"runtime: {self.runtime!r}; expected onnxruntime, openvino or auto"


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    labels: str | None = None
    """Labels to judge with (never to learn from): a .csv with the columns path,label, or "folders" for the names of the items' folders."""
    neighbours: int = 10
    """Neighbours compared by the k-nearest-neighbour overlap."""

    def faults(self) -> Iterable[str]:
        if self.neighbours < 1:
            yield f"neighbours: {self.neighbours}; expected at least 1"


@dataclass(frozen=True, kw_only=True)
class Search:
    search_steps: int | None = None
    """Training steps of a search for a policy, over all its encoders; overrides what `search_minutes` or the default, 150 for each, would give."""
    search_minutes: float | None = None
    """Time for a search; the steps that fit are fixed once, from a measured pace, and kept in the run folder."""

    def faults(self) -> Iterable[str]:
        if not _between(self.search_steps, 1, 10**9):
            yield f"search_steps: {self.search_steps}; expected at least 1"
        if self.search_minutes is not None and self.search_minutes <= 0:
            yield f"search_minutes: {self.search_minutes}; expected above 0"


@dataclass(frozen=True, kw_only=True)
class Objects:
    objects_side: int = 448
    """Side in pixels at which images are looked at for objects (the aspect ratio is kept); the model's own where it takes no other."""
    objects_layer: str = ""
    """Layer whose output over the image objects are told apart by; by default the last one with at least 24 places across."""
    objects_method: str = "cut"
    """How objects are told from the rest: "cut" (a normalised cut of each image), "words" (k-means of the places of all images: faster, coarser) or "lost" (one object, around the rarest place)."""
    objects_most: int = 40
    """Most objects of an image; the best are kept."""
    objects_least: float = 0.002
    """Share of the image below which a part is no object."""
    objects_neck: float = 0.7
    """Parts of a mask are objects of their own where the neck between them is narrower than this share of the narrower one's width; 0 never cuts what hangs together."""
    object_kinds: int = 0
    """Kinds the objects are sorted into; 0 chooses them without labels."""

    def faults(self) -> Iterable[str]:
        if not (32 <= self.objects_side <= 4096):
            yield f"objects_side: {self.objects_side}; expected 32 to 4096 pixels"
        if self.objects_method not in ("cut", "words", "lost"):
            yield f"objects_method: {self.objects_method!r}; expected cut, words or lost"
        if self.objects_most < 1:
            yield f"objects_most: {self.objects_most}; expected at least 1"
        if not (0 <= self.objects_least < 1):
            yield f"objects_least: {self.objects_least}; expected 0 to below 1"
        if not (0 <= self.objects_neck < 1):
            yield f"objects_neck: {self.objects_neck}; expected 0 (never cut) to below 1"
        if not (0 <= self.object_kinds <= 1000):
            yield f"object_kinds: {self.object_kinds}; expected 0 (choose) to 1000"


@dataclass(frozen=True, kw_only=True)
class Setup:
    out: str = ""
    """The run folder; by default attar-runs/NAME-OF-THE-DATA. The same command again resumes it."""
    seed: int = 0
    """Seed of every random choice."""
    workers: int = 2
    """Threads that read and decode items; of a Ray that is started on this machine, the processes."""
    engine: str = "local"
    """Where scan, embed, the search for near duplicates and k-means work: "local" (this process), or "ray" (needs the extra attar[ray])."""
    ray_address: str | None = None
    """The cluster for the engine ray: "ray://HOST:10001", "HOST:6379" or "auto" (the one this machine belongs to); by default one is started on this machine. Its nodes read the data under the paths it has here."""
    tensorboard: str = ""
    """Folder for TensorBoard event files of every training curve (needs the extra attar[tensorboard]); by default none are written."""

    def faults(self) -> Iterable[str]:
        if not (0 <= self.seed < 2**32):
            yield f"seed: {self.seed}; expected 0 to {2**32 - 1}"
        if not (1 <= self.workers <= 256):
            yield f"workers: {self.workers}; expected 1 to 256"
        if self.engine not in ("local", "ray"):
            yield f"engine: {self.engine!r}; expected local or ray"
        if self.ray_address is not None and self.engine != "ray":
            yield f"ray_address: {self.ray_address!r} with the engine {self.engine!r}; it is for --engine ray"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting of a run; the field names are the sections of attar.toml."""

    setup: Setup = field(default_factory=Setup)
    data: Data = field(default_factory=Data)
    model: ModelChoice = field(default_factory=ModelChoice)
    augment: Augment = field(default_factory=Augment)
    embed: Embed = field(default_factory=Embed)
    cluster: Cluster = field(default_factory=Cluster)
    curate: Curate = field(default_factory=Curate)
    generate: Generate = field(default_factory=Generate)
    train: Train = field(default_factory=Train)
    compress: Compress = field(default_factory=Compress)
    evaluate: Evaluate = field(default_factory=Evaluate)
    search: Search = field(default_factory=Search)
    objects: Objects = field(default_factory=Objects)

    @property
    def out(self) -> Path:
        """The run folder; its default name comes from the data's."""
        if self.setup.out:
            return Path(self.setup.out)
        stem = Path(self.data.data.split("*")[0] or ".").resolve()
        return Path("attar-runs") / (stem.stem or "data")


SECTIONS: dict[str, type[Any]] = typing.get_type_hints(Config)
"""The dataclass of each section."""


class Option(NamedTuple):
    section: str
    name: str
    type: Any  # the annotation, resolved
    default: Any
    text: str


def _field_texts(section: type) -> dict[str, str]:
    """The string written under each field of a dataclass."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for before, after in itertools.pairwise(definition.body):
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and isinstance(after, ast.Expr):
            texts[before.target.id] = ast.literal_eval(after.value)
    return texts


@functools.cache
def options() -> dict[str, Option]:
    """Every setting by name. Names are unique across sections, so that a flag or keyword needs no prefix."""
    found: dict[str, Option] = {}
    for section, kind in SECTIONS.items():
        texts, hints = _field_texts(kind), typing.get_type_hints(kind)
        for item in dataclasses.fields(kind):
            assert item.name not in found, f"two settings named {item.name}"
            found[item.name] = Option(section, item.name, hints[item.name], item.default, texts[item.name])
    return found


def _parse(option: Option, value: Any) -> Any:
    """A value from the command line, attar.toml or Python as the option's type; raises ValueError with what was expected."""
    kinds = [kind for kind in (typing.get_args(option.type) or (option.type,)) if kind is not type(None)]
    kind = kinds[0] if isinstance(option.type, types.UnionType) or len(kinds) == 1 else option.type
    if value is None:
        if type(None) in typing.get_args(option.type):
            return None
        raise ValueError("a value is required")
    if typing.get_origin(kind) is tuple:
        parts = value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
        words = [word for part in parts for word in (part.replace(",", " ").split() if isinstance(part, str) else [part])]
        return tuple(_number(word, float, "numbers") for word in words)
    if kind is str:
        if not isinstance(value, str | os.PathLike):
            raise ValueError("expected text")
        return os.fspath(value)
    return _number(value, kind, "a whole number" if kind is int else "a number")


def _number(value: Any, kind: type, expected: str) -> Any:
    try:
        number = kind(value)
        if isinstance(value, bool) or not math.isfinite(number) or (isinstance(value, float) and number != value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"expected {expected}") from None
    return number


def read_toml(path: Path) -> dict[str, Any]:
    """Settings by name from a TOML file; raises UsageError listing every unknown section and setting."""
    flat, faults = _scan_toml(path)
    if faults:
        raise UsageError("\n".join(faults))
    return flat


def _scan_toml(path: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); name an existing file, or make one with: attar init") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid TOML ({error}); `attar init` writes a valid one to start from") from None
    flat: dict[str, Any] = {}
    faults = []
    for section, body in tree.items():
        if section not in SECTIONS or not isinstance(body, dict):
            faults.append(f"{path}: unknown section [{section}]; the sections are {', '.join(SECTIONS)}")
            continue
        for name, value in body.items():
            option = options().get(name)
            if option is None or option.section != section:
                where = f"it belongs in [{option.section}]" if option else _closest(name)
                faults.append(f"{path}: unknown setting {name!r} in [{section}]; {where}")
            else:
                flat[name] = value
    return flat, faults


def _closest(name: str) -> str:
    near = difflib.get_close_matches(name, options(), 3, 0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known settings: {', '.join(options())}"


def build_config(given: Mapping[str, Any], file: str | Path | None = None) -> Config:
    """The validated Config from settings given by name (they win) over those of a TOML file, over the defaults.

    Raises UsageError listing every fault at once: unknown settings, values of the wrong type, values out of range.
    """
    flat, faults = _scan_toml(Path(file)) if file else ({}, [])
    flat |= given
    sections: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        option = options().get(name)
        if option is None:
            faults.append(f"unknown setting {name!r}; {_closest(name)}")
            continue
        try:
            sections.setdefault(option.section, {})[name] = _parse(option, value)
        except ValueError as error:
            faults.append(f"{name}: {value!r}; {error}")
    built: dict[str, Any] = {section: kind(**sections.get(section, {})) for section, kind in SECTIONS.items()}
    for section in built.values():
        faults.extend(section.faults())
    if faults:
        raise UsageError(
            "\n".join(faults)
            if len(faults) == 1
            else f"{len(faults)} settings cannot be used:\n" + "\n".join(f"  - {fault}" for fault in faults)
        )
    return Config(**built)


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by name, as build_config takes them."""
    return {name: getattr(getattr(config, option.section), name) for name, option in options().items()}


def template() -> str:
    """A commented attar.toml with every setting at its default."""
    lines = ["# Settings of attar; a flag or keyword of the same name wins over this file. Lines with # keep the default."]
    section = ""
    for option in options().values():
        if option.section != section:
            section = option.section
            lines += ["", f"[{section}]"]
        lines += [f"# {line}" for line in textwrap.wrap(option.text, 116)]
        default = "" if option.default is None else f'"{option.default}"' if isinstance(option.default, str) else option.default
        lines.append(f"# {option.name} = {default}".rstrip())
    return "\n".join(lines) + "\n"


def write_template(path: Path) -> Path:
    """Writes the commented settings file; raises UsageError when something is there already."""
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(template())
    except FileExistsError:
        raise UsageError(f"{path}: exists already and is left as it is; name another file: attar init other.toml") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); name a file in a folder you can write to") from None
    return path
