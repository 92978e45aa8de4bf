"""Where models come from: `self`, `hf:…`, `timm:…`, `FILE.py:BUILDER`, `FILE.onnx` and modules handed over in Python, each resolved to the same record.

Resolving gives the network, its weights and its preprocessing, or an error that names what is missing. The record holds
the recipe of the graph, so that `network(model)` builds it again, cuts included, in any later process.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attar.config import Compress, ModelChoice
from attar.errors import MissingExtra, ModelError, UsageError
from attar.models import frozen
from attar.models import weights as files
from attar.models.descriptors import Descriptors
from attar.models.network import Network, count_macs, count_parameters, end_with, find_classifier
from attar.models.preprocessing import from_flags, from_hub_config, per_channel
from attar.models.students import Encoder, input_side
from attar.records import Items, Model, Preprocess
from attar.workspace import Job, file_digest

KNOWN = '"self", "descriptors", "auto", "hf:FOLDER-OR-HUB-ID", "timm:NAME", "FILE.py:BUILDER" or "FILE.onnx"'
HELD: dict[str, nn.Module] = {}
"""Modules handed over in this process, by `module:…` source; what cannot be built from a recipe."""


def hold(module: nn.Module) -> str:
    """The source of a module handed over in Python, `module:HASH`: equal modules have the same one. A float32 copy on the CPU is kept.

    Raises ModelError for what cannot be copied.
    """
    try:
        body = copy.deepcopy(module).cpu().float().eval()
    except Exception as error:
        raise ModelError(f"{type(module).__name__}: the module cannot be copied ({type(error).__name__}: {error})") from error
    digest = hashlib.sha256(f"{type(module).__module__}.{type(module).__qualname__}\n{module}".encode())
    for name, value in body.state_dict().items():
        digest.update(name.encode() + value.contiguous().numpy().tobytes() if isinstance(value, Tensor) else name.encode())
    source = f"module:{digest.hexdigest()[:16]}"
    HELD[source] = body
    return source


def kind_of(source: str) -> str:
    """One of self, descriptors, auto, hf, timm, file, onnx, module; raises UsageError for anything else."""
    if source in HELD:
        return "module"
    if source.endswith(".onnx"):
        return "onnx"
    if source in ("self", "descriptors", "auto"):
        return source
    if source.startswith(("hf:", "timm:")) and source.split(":", 1)[1]:
        return source.split(":", 1)[0]
    if ".py:" in source and source.rsplit(":", 1)[1].isidentifier():
        return "file"
    raise UsageError(f"model: {source!r} is not a known source; expected {KNOWN}")


def fingerprint(choice: ModelChoice, *_: Any) -> list[str]:
    """Hashes of the local files a model is made from, so that changed weights or code are noticed."""
    kind, paths = kind_of(choice.model), []
    if kind == "file":
        paths = [Path(choice.model.rsplit(":", 1)[0])]
    elif kind == "onnx":
        paths = [Path(choice.model)]
    elif kind == "hf" and Path(choice.model[3:]).is_dir():
        paths = sorted(path for path in Path(choice.model[3:]).iterdir() if path.suffix in (".json", ".safetensors", ".bin", ".py"))
    paths += [Path(choice.weights)] if choice.weights else []
    return [file_digest(path) for path in paths if path.is_file()]


def student_fingerprint(settings: Compress) -> list[str]:
    """The same for the student's source."""
    return fingerprint(ModelChoice(model=settings.student)) if settings.student else []


def resolve(choice: ModelChoice, items: Items, self_width: int, job: Job) -> Model:
    """The model a source names, in evaluation mode, with its preprocessing; `self` comes untrained.

    Raises UsageError for an unknown source, MissingExtra, or ModelError when it cannot be built, loaded, run or fed.
    """
    kind = kind_of(choice.model)
    if choice.weights and kind not in ("file", "timm"):
        raise UsageError(f"weights: {choice.weights}: only FILE.py:BUILDER and timm: models take --weights; {choice.model} brings its own")
    if kind == "onnx":
        return frozen.resolve(choice)
    body, source, preprocess, classes = RESOLVERS[kind](choice, items, self_width, job)
    example = torch.rand((2, 3, *preprocess.size), generator=torch.Generator().manual_seed(0))
    model = Model(source=source, state={}, preprocess=preprocess, classes=classes)
    said = choice.model + (f" with weights {choice.weights}" if choice.weights else "")
    return describe(model, body, example, choice.output, said, job)


def resolve_module(source: str, example: Tensor, output: str, job: Job) -> Model:
    """The model of a module that `hold` keeps; `example` are two of its inputs (n, …), which come prepared as it takes them."""
    size = (int(example.shape[2]), int(example.shape[3])) if example.dim() == 4 else (1, 1)
    taken = Preprocess(size=size, mean=(0.0,) * 3, std=(1.0,) * 3, origin="inputs are taken as they come")
    shape, dtype = tuple(example.shape[1:]), str(example.dtype).removeprefix("torch.")
    model = Model(source={"kind": "module", "key": source}, state={}, preprocess=taken, shape=shape, dtype=dtype)
    return describe(model, copy.deepcopy(HELD[source]), example, output, type(HELD[source]).__name__, job)


def describe(model: Model, body: nn.Module, example: Tensor, output: str, said: str, job: Job) -> Model:
    """The record of a network, from the network itself: its classifier, classes, weights and costs.

    Raises ModelError when it does not run on the example, or its outputs and its classes contradict each other.
    """
    body.eval()
    classes = model.classes
    try:
        classifier = find_classifier(body, example)
        wants = output if output != "auto" else _output_kind(model.source["kind"], classes, classifier, job)
        if wants == "logits" and classifier is None:
            raise ModelError(f"{said}: no linear layer gives its output, so there are no logits; use --output embedding")
        built = Network(body, classifier if wants == "logits" else None).eval()
        with torch.no_grad():
            embedding, logits = built(example)
    except ModelError:
        raise
    except Exception as error:
        kind = "images" if not model.shape else f"{model.dtype} inputs"
        remedy = "check --input-size" if not model.shape else "inputs must come prepared as the module takes them"
        raise ModelError(f"{said}: does not run on {kind} {tuple(example.shape)}: {type(error).__name__}: {error}; {remedy}") from error
    made = embedding if logits is None else logits
    if made.dim() != 2 or len(made) != len(example) or made.shape[1] < 2:
        raise ModelError(
            f"{said}: returns {tuple(made.shape)} for {len(example)} items; expected a row of two numbers or more for each, so that there "
            "is a decision to agree on"
        )
    if logits is None:
        classes = ()
    elif classes and len(classes) != logits.shape[1]:
        raise ModelError(f"{said}: names {len(classes)} classes and returns {logits.shape[1]} logits; make them equal")
    elif not classes:
        classes = tuple(f"class {index}" for index in range(logits.shape[1]))
    return replace(
        model,
        source=dict(model.source) | {"classifier": built.classifier},
        state=built.state_dict(),
        classes=classes,
        parameters=count_parameters(built),
        macs=count_macs(built, example),
        lineage=(f"source {said}",),
    )


def _output_kind(kind: str, classes: tuple[str, ...], classifier: str | None, job: Job) -> str:
    if kind == "self" or not (classes or (kind in ("file", "module") and classifier)):
        return "embedding"
    if not classes:
        where = "the builder's file names no CLASSES" if kind == "file" else "a module names no classes"
        job.say(f"{where}; its last linear layer is taken as class logits (--output embedding if it is not)")
    return "logits"


def network(model: Model) -> Network:
    """The torch network of a record: graph from its source, cuts replayed, weights loaded; evaluation mode."""
    if model.source["kind"] == "onnx":
        return frozen.Frozen(model.source["path"], frozen.Ends(*model.source["ends"]))
    body = BUILDERS[model.source["kind"]](model.source).eval()
    if "ending" in model.source:
        body = end_with(body, **model.source["ending"])
    built = Network(body, model.source["classifier"])
    if model.cuts:
        from attar.stages.compress.prune import replay

        replay(built, model.cuts, example_input(model))
    for key, value in model.state.items():  # repair gives a bias to layers that had none
        owner, _, leaf = key.rpartition(".")
        if leaf == "bias" and built.get_submodule(owner).bias is None:
            built.get_submodule(owner).bias = nn.Parameter(value.clone())
    built.load_state_dict(dict(model.state))
    return built.to(memory_format=built.layout).eval()  # type: ignore[call-overload]


def student_body(source: str, shape: tuple[int, ...], width: int) -> tuple[nn.Module, dict[str, Any]]:
    """A fresh module of a source for inputs of a shape (channels, height, width), and the recipe that builds its graph again.

    A transformers folder without weights is taken as a recipe, random; one with weights comes with them. Raises UsageError or ModelError.
    """
    kind = kind_of(source)
    if kind == "self":
        if len(shape) != 3 or shape[0] != 3:
            raise UsageError(f"student: self is an encoder of RGB images; the inputs are {shape}: name FILE.py:BUILDER")
        recipe: dict[str, Any] = {"kind": "self", "side": max(shape[1:]), "width": width}
    elif kind == "hf":
        return _student_hf(source)
    elif kind == "timm":
        recipe = {"kind": "timm", "name": source[5:]}
    elif kind == "file":
        path, name = source.rsplit(":", 1)
        recipe = {"kind": "file", "path": str(Path(path).resolve()), "builder": name}
    else:
        recipe = {"kind": kind, "key": source}
    try:
        return BUILDERS[kind](recipe), recipe
    except ImportError:
        raise MissingExtra(kind, kind, f"a {kind}: model") from None


Resolved = tuple[nn.Module, dict[str, Any], Preprocess, tuple[str, ...]]


def _resolve_self(choice: ModelChoice, items: Items, self_width: int, job: Job) -> Resolved:
    short = int(np.median(np.minimum(items.column("width"), items.column("height"))))
    side = choice.input_size or input_side(short)
    torch.manual_seed(job.seed)
    source = {"kind": "self", "side": side, "width": self_width}
    origin = "--input-size" if choice.input_size else f"sized to the images (median shorter side {short} px)"
    mean, std = per_channel(choice.mean or (0.5,)), per_channel(choice.std or (0.25,))
    return _build_self(source), source, Preprocess(size=(side, side), resize_shortest=side, mean=mean, std=std, origin=origin), ()


def _build_self(source: Mapping[str, Any]) -> nn.Module:
    return Encoder(source["side"], source["width"])


def _resolve_descriptors(choice: ModelChoice, items: Items, self_width: int, job: Job) -> Resolved:
    short = int(np.median(np.minimum(items.column("width"), items.column("height"))))
    side = choice.input_size or min(128, max(32, -(-short // 8) * 8))
    origin = "--input-size" if choice.input_size else f"sized to the images (median shorter side {short} px)"
    preprocess = Preprocess(size=(side, side), resize_shortest=side, mean=(0.0,) * 3, std=(1.0,) * 3, origin=origin)
    return Descriptors(), {"kind": "descriptors"}, preprocess, ()


def _build_descriptors(source: Mapping[str, Any]) -> nn.Module:
    return Descriptors()


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", "hf", "an hf: model") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _resolve_hf(choice: ModelChoice, items: Items, self_width: int, job: Job) -> Resolved:
    transformers, name = _transformers(), choice.model[3:]
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        classifies = any("ForImageClassification" in architecture for architecture in config.architectures or [])
        classifies = classifies and choice.output != "embedding"
        kind = transformers.AutoModelForImageClassification if classifies else transformers.AutoModel
        body = kind.from_pretrained(name, dtype=torch.float32)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"hf:{name}: cannot be loaded ({reason}); expected a folder with config.json and model.safetensors as save_pretrained "
            "writes it, or a hub id that this machine can reach"
        ) from error
    labels = config.id2label if classifies else {}
    classes = tuple(str(labels[index]) for index in sorted(labels))
    source = {"kind": "hf", "classifies": classifies, "config": config.to_dict()}
    return body, source, from_hub_config(name, choice), classes


def _build_hf(source: Mapping[str, Any]) -> nn.Module:
    transformers = _transformers()
    config = transformers.AutoConfig.for_model(**source["config"])
    kind = transformers.AutoModelForImageClassification if source["classifies"] else transformers.AutoModel
    return kind.from_config(config)


def _student_hf(source: str) -> tuple[nn.Module, dict[str, Any]]:
    transformers, name = _transformers(), source[3:]
    folder = Path(name)
    bare = folder.is_dir() and not any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir())
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        classifies = any("ForImageClassification" in architecture for architecture in config.architectures or [])
        kind = transformers.AutoModelForImageClassification if classifies else transformers.AutoModel
        body = kind.from_config(config) if bare else kind.from_pretrained(name, dtype=torch.float32)
    except Exception as error:
        raise ModelError(f"student: {source}: cannot be built ({error}); expected a folder with config.json, weights or none") from error
    return body, {"kind": "hf", "classifies": classifies, "config": config.to_dict(), "pretrained": not bare}


def _resolve_timm(choice: ModelChoice, items: Items, self_width: int, job: Job) -> Resolved:
    name = choice.model[5:]
    source = {"kind": "timm", "name": name}
    try:
        import timm
    except (ImportError, RuntimeError):  # a torchvision that does not match torch fails with RuntimeError
        raise MissingExtra("timm", "timm", "a timm: model") from None
    try:
        body = timm.create_model(name, pretrained=choice.weights is None)
    except Exception as error:
        raise ModelError(f"timm:{name}: cannot be built ({error}); timm.list_models() names the known ones") from error
    if choice.weights:
        files.load_into(body, Path(choice.weights))
    data = timm.data.resolve_model_data_config(body)
    side = choice.input_size or data["input_size"][1]
    preprocess = Preprocess(
        size=(side, side),
        resize_shortest=int(side / data["crop_pct"]),
        mean=per_channel(choice.mean or data["mean"]),
        std=per_channel(choice.std or data["std"]),
        resample=data["interpolation"],
        origin=f"timm's data config of {name}",
    )
    labels = (body.pretrained_cfg or {}).get("label_names") or ()
    count = getattr(body, "num_classes", 0)
    return body, source, preprocess, tuple(labels) or tuple(f"class {index}" for index in range(count))


def _build_timm(source: Mapping[str, Any]) -> nn.Module:
    import timm

    return timm.create_model(source["name"], pretrained=False)


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ModelError(f"{path}: no such file; the model source is FILE.py:BUILDER")
    sys.path.insert(0, str(path.resolve().parent))  # the file may import its neighbours
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None  # noqa: PT018
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        raise ModelError(f"{path}: raised {type(error).__name__} when imported: {error}") from error
    finally:
        sys.path.pop(0)
    return module


def _call_builder(path: Path, name: str) -> tuple[nn.Module, ModuleType]:
    module = _load_file(path)
    builder = getattr(module, name, None)
    if not callable(builder):
        near = [key for key, value in vars(module).items() if callable(value) and getattr(value, "__module__", None) == module.__name__]
        raise ModelError(f"{path}: has no builder {name!r}; it defines {', '.join(near) or 'no functions'}")
    try:
        body = builder()
    except Exception as error:
        raise ModelError(
            f"{path}:{name}: the builder raised {type(error).__name__}: {error}; it must return the model when called without arguments"
        ) from error
    if not isinstance(body, nn.Module):
        raise ModelError(f"{path}:{name}: the builder returned {type(body).__name__}; expected a torch.nn.Module")
    return body, module


def _resolve_file(choice: ModelChoice, items: Items, self_width: int, job: Job) -> Resolved:
    path, name = choice.model.rsplit(":", 1)
    torch.manual_seed(job.seed)
    body, module = _call_builder(Path(path), name)
    if choice.weights:
        files.load_into(body, Path(choice.weights))
    else:
        job.say(f"no --weights given: {name} keeps the values its builder gives it")
    sizes = Counter(zip(items.column("height").tolist(), items.column("width").tolist()))
    preprocess, said = from_flags(choice, module, sizes)
    if said:
        job.say(said)
    source = {"kind": "file", "path": str(Path(path).resolve()), "builder": name}
    return body, source, preprocess, tuple(str(label) for label in getattr(module, "CLASSES", ()))


def _build_file(source: Mapping[str, Any]) -> nn.Module:
    return _call_builder(Path(source["path"]), source["builder"])[0]


def _build_module(source: Mapping[str, Any]) -> nn.Module:
    if source["key"] not in HELD:
        raise ModelError(f"{source['key']}: the module was handed over in another process; hand it over again: attar.compress(module, …)")
    return copy.deepcopy(HELD[source["key"]])


RESOLVERS: dict[str, Callable[..., Resolved]] = {
    "self": _resolve_self,
    "descriptors": _resolve_descriptors,
    "hf": _resolve_hf,
    "timm": _resolve_timm,
    "file": _resolve_file,
}
BUILDERS: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "self": _build_self,
    "descriptors": _build_descriptors,
    "hf": _build_hf,
    "timm": _build_timm,
    "file": _build_file,
    "module": _build_module,
}


def example_input(model: Model, count: int = 1) -> Tensor:
    """Zeros in the shape and type of a model's input: (count, 3, height, width) for images."""
    return torch.zeros(count, *(model.shape or (3, *model.preprocess.size)), dtype=getattr(torch, model.dtype))
