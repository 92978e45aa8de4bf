"""predict: cluster, and class where there are classes, of any image files, with the delivered ONNX file and the runtime it is for alone."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from attar.data import Reader, Unreadable, listing
from attar.errors import DataError, ModelError, UsageError
from attar.modalities.image import SUFFIXES, prepare
from attar.records import Preprocess
from attar.runtime import DEFAULT, NAMES, Session, input_size, normalise, open_session, outputs

BATCH = 32
MAX_PIXELS = 100_000_000  # as scan's default: the guard against decompression bombs


class Shipped(NamedTuple):
    """A delivered file, ready to run."""

    session: Session
    preprocess: Preprocess
    classes: tuple[str, ...]
    cluster_names: tuple[str, ...]


class _Found(NamedTuple):
    shown: str  # the path as a person would write it
    path: str = ""  # the path as the reader takes it
    reader: Reader | None = None
    error: str = ""


def predict(
    model: str | Path, files: Sequence[str | Path], *, threads: int = 1, workers: int = 2, quiet: bool = False
) -> list[dict[str, Any]]:
    """One dict per image, in the order of the files (sorted within a folder): path, cluster, cluster_probability, and cluster_name,
    label and probability where the model has them; or path and error for what cannot be read.

    `model` is a run folder, its model folder or an .onnx file; `files` are images, folders, or anything attar scans.
    Raises UsageError or ModelError when the model cannot be found or used; a bad file never stops the rest.
    """
    if not (1 <= threads <= 256):
        raise UsageError(f"threads: {threads}; expected 1 to 256")
    shipped = load(find_model(model), threads)
    done: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        found = _list(files, stack)
        pool = stack.enter_context(ThreadPoolExecutor(workers, "attar-predict"))
        bar = stack.enter_context(tqdm(total=len(found), desc="predict", unit=" items", delay=2, disable=quiet, file=sys.stderr))
        for start in range(0, len(found), BATCH):
            part = found[start : start + BATCH]
            images = list(pool.map(_read, part, itertools.repeat(shipped.preprocess)))
            done += _answers(shipped, part, images)
            bar.update(len(part))
    return done


def find_model(model: str | Path) -> Path:
    """The .onnx file a run folder, model folder or path stands for; raises UsageError when there is none."""
    path = Path(model).expanduser()
    for candidate in (path, path / "student.onnx", path / "model" / "student.onnx"):
        if candidate.is_file():
            return candidate
    state = "holds no student.onnx; the run may not be finished: attar status tells" if path.is_dir() else "no such file or folder"
    raise UsageError(f"{model}: {state}; expected a run folder, its model folder or an .onnx file made by attar export")


def load(path: Path, threads: int = 1) -> Shipped:
    """A delivered file, in the runtime it was judged in, with the preprocessing and names its metadata carries.

    Raises ModelError when it carries none, MissingExtra when that runtime is not installed.
    """
    session: Any = open_session(path, threads)
    text = session.get_modelmeta().custom_metadata_map.get("attar")
    if text is None:
        raise ModelError(
            f"{path}: has no attar metadata, so how to prepare images for it is unknown; use the student.onnx of a run's model folder"
        )
    try:
        body = json.loads(text)
        if "preprocess" not in body:
            raise ModelError(
                f"{path}: was made from tensors, so how to prepare images for it is unknown; give its input what the original module took"
            )
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in body["preprocess"].items()}
        preprocess = Preprocess(**fields)
        place = str(body.get("runtime", DEFAULT))
        classes, cluster_names = (tuple(body.get(key) or ()) for key in ("classes", "cluster_names"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{path}: its attar metadata cannot be understood ({type(error).__name__}: {error}); export the run again"
        ) from None
    if input_size(session) != preprocess.size:
        taken, said = input_size(session), preprocess.size
        raise ModelError(f"{path}: takes images of {taken} pixels but its metadata says {said}; export the run again")
    if place not in NAMES:
        raise ModelError(f"{path}: is for the runtime {place!r}; expected {' or '.join(NAMES)}: a newer attar may know it")
    return Shipped(session if place == DEFAULT else open_session(path, threads, place), preprocess, classes, cluster_names)


def _list(files: Sequence[str | Path], stack: contextlib.ExitStack) -> list[_Found]:
    """Every image the files stand for; their readers stay open as long as the stack."""
    found: list[_Found] = []
    for file in map(str, files):
        try:
            entries, problems = listing(file, SUFFIXES)
            reader = stack.enter_context(Reader(file))
        except DataError as error:
            found.append(_Found(file, error=str(error)))
            continue
        base = file if os.path.isdir(file) else os.path.dirname(file if os.path.exists(file) else re.split(r"[*?[]", file)[0])
        found += [_Found(os.path.join(base, entry.path), entry.path, reader) for entry in entries]
        found += [_Found(os.path.join(base, problem.path), error=f"{problem.reason}; {problem.remedy}") for problem in problems]
    return found


def _read(found: _Found, preprocess: Preprocess) -> np.ndarray | str:
    """The image as uint8 (H, W, 3), or why there is none."""
    if found.reader is None:
        return found.error
    try:
        return prepare(found.reader.read(found.path), preprocess, max_pixels=MAX_PIXELS)
    except Unreadable as error:
        return str(error)


def _answers(shipped: Shipped, part: Sequence[_Found], images: Sequence[np.ndarray | str]) -> Iterator[dict[str, Any]]:
    """What the model says of each readable image, and the error of each other one, in their order."""
    readable = [image for image in images if not isinstance(image, str)]
    values = outputs(shipped.session, normalise(np.stack(readable), shipped.preprocess)) if readable else {}
    rows = iter(range(len(readable)))
    for found, image in zip(part, images):
        if isinstance(image, str):
            yield {"path": found.shown, "error": image}
        else:
            row = next(rows)
            yield {"path": found.shown, **_answer(shipped, {name: value[row] for name, value in values.items()})}


def _answer(shipped: Shipped, values: dict[str, np.ndarray]) -> dict[str, Any]:
    """Cluster and class of one image from its outputs."""
    clusters = values["cluster_probabilities"]
    cluster = int(clusters.argmax())
    answer: dict[str, Any] = {"cluster": cluster}
    if shipped.cluster_names:
        answer["cluster_name"] = shipped.cluster_names[cluster]
    answer["cluster_probability"] = float(clusters[cluster])
    if shipped.classes:
        shares = np.exp(values["logits"] - values["logits"].max())
        best = int(shares.argmax())
        answer |= {"label": shipped.classes[best], "probability": float(shares[best] / shares.sum())}
    return answer
