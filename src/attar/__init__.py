"""attar: unlabelled data in, a small fast model out, with proof.

run = attar.run("photos/")                       # scan … report; the same call again resumes or does nothing
run.sentence, run["cluster"], run["compress"]    # the result, and the record of any stage
attar.cluster(run.root, clusters=8)              # one stage again, with other settings
attar.predict(run.root / "model", ["new.jpg"])   # the small model, without torch
small = attar.compress(module, tensors, budget="macs<=0.5x", minutes=15)   # any torch module on its own inputs, without a run
batch = attar.Augment("default", 224)(images)    # augmented views in any training script, without a run
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "Augment",
    "augment",
    "cluster",
    "compress",
    "curate",
    "embed",
    "evaluate",
    "export",
    "init",
    "predict",
    "report",
    "run",
    "scan",
    "status",
    "train",
]


def run(data: str | Path, *, config: str | Path | None = None, quiet: bool = False, until: str = "report", **settings: Any) -> Any:
    """Takes data through the whole spine and returns the Run; settings are those of `attar run --help`, by name."""
    from attar import config as tree
    from attar.pipeline import run_config

    return run_config(tree.build_config({"data": str(data), **settings}, config), until=until, quiet=quiet)


def _stage(name: str) -> Callable[..., Any]:
    def verb(run: str | Path, *, config: str | Path | None = None, quiet: bool = False, **settings: Any) -> Any:
        from attar.pipeline import continue_config, run_config

        return run_config(continue_config(run, settings, config), until=name, quiet=quiet)[name]

    verb.__name__ = verb.__qualname__ = name
    verb.__doc__ = (
        f"Takes a run folder to the stage {name}, with its earlier settings where none are given, and returns that stage's record."
    )
    return verb


scan, embed, cluster, curate, augment = map(_stage, ("scan", "embed", "cluster", "curate", "augment"))
train, evaluate, export, report = map(_stage, ("train", "evaluate", "export", "report"))


def compress(run: Any, inputs: Any = None, *, out: str | Path | None = None, quiet: bool = False, **settings: Any) -> Any:
    """Takes a run folder to the stage compress; or compresses a torch module on unlabelled inputs, a tensor (items, …) or an iterable of them.

    A module's inputs are taken as they come: images, rows of a table, tokens. The result has `module` (the small torch module), `onnx` (its
    file), `met` and `reason` (the budget), `certificate` (agreement on untouched items) and `front` (every candidate). `out` is where the files
    go: the same call resumes there. Settings are those of `attar compress --help`, by name; `student` may be a module too.
    """
    if isinstance(run, str | Path):
        return _stage("compress")(run, quiet=quiet, **settings)
    from attar.standalone import compress_module

    return compress_module(run, inputs, out=out, quiet=quiet, **settings)


def predict(model: str | Path, files: Sequence[str], *, threads: int = 1, workers: int = 2) -> list[dict[str, Any]]:
    """Cluster, and class where there are classes, of images or folders, by a RUN/model folder or an .onnx file of attar."""
    from attar.inference import predict as predict_files

    return predict_files(model, files, threads=threads, workers=workers)


def status(run: str | Path) -> dict[str, Any]:
    """What is done in a run folder."""
    from attar.pipeline import status as status_of

    return status_of(run)


def init(path: str | Path = "attar.toml") -> Path:
    """Writes a commented settings file with every default; never over an existing file."""
    from attar.config import write_template

    return write_template(Path(path))


def __getattr__(name: str) -> Any:
    """Augment, a class: imported when it is asked for, since it needs torch."""
    if name == "Augment":
        from attar.stages.augment.engine import Augment

        return Augment
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
