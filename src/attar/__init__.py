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
    "clusters",
    "compress",
    "curate",
    "duplicates",
    "embed",
    "evaluate",
    "export",
    "init",
    "leaks",
    "name",
    "objects",
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


def objects(run: str | Path, *, config: str | Path | None = None, quiet: bool = False, **settings: Any) -> Any:
    """Finds objects in the images of a run folder: boxes, masks and kinds, also as COCO JSON in RUN/objects; what it needs is done first."""
    from attar.pipeline import continue_config
    from attar.stages.objects.objects import objects_config

    return objects_config(continue_config(run, settings, config), quiet=quiet)


def predict(model: str | Path, files: Sequence[str], *, threads: int = 1, workers: int = 2) -> list[dict[str, Any]]:
    """Cluster, and class where there are classes, of images or folders, by a RUN/model folder or an .onnx file of attar."""
    from attar.inference import predict as predict_files

    return predict_files(model, files, threads=threads, workers=workers)


def clusters(run: str | Path, *, links: str | Path | None = None, table: str | Path | None = None) -> list[dict[str, Any]]:
    """The clusters of a run folder: number, name, items, medoid and border items of each.

    With `links`, a folder that does not exist yet, every item gets a symbolic link in its cluster's folder; with `table`, a line of a CSV file.
    """
    from attar.pipeline import list_clusters

    return list_clusters(run, links=links, table=table)


def duplicates(
    data: str | Path,
    *,
    likeness: float = 0.85,
    mirrored: bool = True,
    parts: bool = False,
    table: str | Path | None = None,
    workers: int = 2,
    max_megapixels: float = 100.0,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Groups of pictures that are the same, in data or a run folder: equal, encoded again, brighter, mirrored, and with `parts` cut out.

    One row per picture of a group: group, path, keep, kind, of (the closest other), likeness, width, height, bytes; `table` is a CSV file to write.
    """
    from attar.stages.curate import duplicates as stage

    search = stage.Search(likeness=likeness, mirrored=mirrored, parts=parts)
    return stage.duplicates(data, search, table=table, workers=workers, max_megapixels=max_megapixels, quiet=quiet)


def leaks(
    data: str | Path,
    against: str | Path,
    *,
    likeness: float = 0.85,
    mirrored: bool = True,
    parts: bool = False,
    table: str | Path | None = None,
    workers: int = 2,
    max_megapixels: float = 100.0,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Pictures of some data (a test folder) that are in other data (the training folder) as well; either may be a run folder.

    One row per picture: path, kind, of (the closest picture there), likeness; `table` is a CSV file to write.
    """
    from attar.stages.curate import duplicates as stage

    search = stage.Search(likeness=likeness, mirrored=mirrored, parts=parts)
    return stage.leaks(data, against, search, table=table, workers=workers, max_megapixels=max_megapixels, quiet=quiet)


def name(run: str | Path, cluster: int, name: str, *, quiet: bool = False) -> dict[int, str]:
    """Names a cluster; the name is kept in the run folder and follows its items when clusters are made again. "" takes it away."""
    from attar.pipeline import name_cluster

    return name_cluster(run, cluster, name, quiet=quiet)


def status(run: str | Path) -> dict[str, Any]:
    """What is done in a run folder."""
    from attar.workspace import status as status_of

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
