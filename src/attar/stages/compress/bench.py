"""The bench: a model becomes a file in one precision or another, is measured beside the original, and is kept as a candidate."""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import rel_entr, softmax
from tqdm import tqdm

from attar import config, formats, runtime
from attar.errors import ModelError
from attar.models import frozen, sources
from attar.models.network import Network
from attar.records import Candidate, Model
from attar.stages.compress.feed import Feed
from attar.stages.compress.quantise import half, quantise
from attar.stages.export import write_onnx
from attar.stages.report import words
from attar.workspace import Job

PRECISIONS = ("float32", "float16", "int8")
"""Forms a model is delivered in."""
TINY = 1e-7
"""Probabilities are taken to be at least this: of a file's rounding error nothing should be infinite."""
HEADER = f"{'candidate':26} {'size':>18} {'MACs':>18} {'latency':>18} {'agreement':>18}"


class Bench:
    """Builds and measures candidates of one original; each is built once and kept in the job's folder."""

    def __init__(self, feed: Feed, model: Model, settings: config.Compress, job: Job) -> None:
        runtime.require(settings.runtime)
        self.feed, self.model, self.settings, self.job = feed, model, settings, job
        self.least: dict[str, float] = {}
        """Seconds that building and measuring took, at least, by precision."""
        self._before, self._started = job.recall("seconds.json") or 0.0, time.perf_counter()
        self._show(HEADER)
        self.original = self.candidate("original", lambda: model, "float32")

    @functools.cached_property
    def network(self) -> Network:
        return sources.network(self.model)

    def seconds(self) -> float:
        """Time spent on this search, interrupted attempts included."""
        return self._before + time.perf_counter() - self._started

    def candidate(self, name: str, model: Callable[[], Model], precision: str) -> Candidate:
        """A candidate, built and measured unless it is there already."""
        start, there = time.perf_counter(), (self.job.folder / name).exists()
        folder = self.job.build(name, lambda target: self._write(name, model(), precision, target))
        took = time.perf_counter() - start
        self.least[precision] = min(took, self.least.get(precision, took))
        made = formats.load_candidate(folder)
        self._show(row(made) + ("  kept" if there else ""))
        return made

    def _show(self, line: str) -> None:
        """A line of the live table: for people to follow; the figures themselves are in the record."""
        if not self.job.quiet:
            tqdm.write(f"{self.job.name}: {line}", file=sys.stderr)

    def _write(self, name: str, model: Model, precision: str, target: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "float32.onnx"
            write_onnx(model, file)
            if precision != "float32":
                exact, file = file, Path(folder) / f"{precision}.onnx"
                half(exact, file) if precision == "float16" else self._quantise(exact, file, name)
            chosen, figures = self._measure(file, model, name)
            made = Candidate(name=name, model=model, onnx=file, precision=precision, runtime=chosen, figures=figures)
            formats.save_candidate(target, made)

    def _quantise(self, exact: Path, file: Path, name: str) -> None:
        batches = [batch.numpy() for batch in self.feed.calibration(self.settings.calibration_items, 16)]
        try:
            quantise(exact, file, batches)
        except Exception as error:  # the quantiser's own, of any kind, for graphs it does not understand
            raise ModelError(f"{name} cannot be made ({type(error).__name__}: {error})") from error

    def _probabilities(self, file: Path, model: Model, place: str) -> np.ndarray:
        """Of the classes, or of the clusters where there are none, for each validation item as a file gives them in a runtime, (n, k)."""
        items = (batch.contiguous().numpy() for batch in self.feed.validation())
        made = frozen.answers(runtime.run_stacked(file, items, threads=torch.get_num_threads(), runtime=place), model.source, model.head)
        return softmax(made["logits"], axis=1) if model.classes else made["cluster_probabilities"]

    def _decided(self, file: Path, model: Model, name: str) -> dict[str, np.ndarray]:
        """Probabilities from a file in each runtime it may be for; where there is a choice, one that cannot run it is left out."""
        asked = runtime.DEFAULT if name == "original" else self.settings.runtime
        found: dict[str, np.ndarray] = {}
        for place in runtime.NAMES if asked == "auto" else (asked,):
            try:
                found[place] = self._probabilities(file, model, place)
            except ModelError as error:
                if not found:
                    raise
                self.job.say(f"{name} stays in ONNX Runtime: {str(error).replace(str(file), 'the file')}")
        return found

    def _measure(self, file: Path, model: Model, name: str) -> tuple[str, dict[str, float]]:
        """The runtime a file is for, and its figures there, absolute and as ratios to the original's in ONNX Runtime; the original is timed
        beside it, so that drift hits both."""
        original = None if name == "original" else self.original
        decided = self._decided(file, model, name)
        expected = self.job.once("expected.pt", lambda: torch.from_numpy(decided[runtime.DEFAULT])).numpy()
        files = ({"original": original.onnx} if original else {}) | dict.fromkeys(decided, file)
        times = runtime.measure_latency(files, runtimes={place: place for place in decided}, threads=self.settings.threads)
        agreement = {place: float((one.argmax(1) == expected.argmax(1)).mean()) for place, one in decided.items()}
        latency = {place: float(np.median(times[place])) for place in decided}
        place = quicker(agreement, latency)
        figures = {
            "size": float(file.stat().st_size),
            "parameters": float(model.parameters),
            "macs": float(model.macs),
            "latency": latency[place],
            "agreement": agreement[place],
            "divergence": divergence(decided[place], expected),
            "n": float(len(expected)),
        }
        ratio = float(np.median(times[place] / times["original"])) if original else 1.0
        return place, figures | ratios(figures, original.figures if original else figures) | {"latency_ratio": ratio}


def divergence(probabilities: Float[np.ndarray, "items kinds"], expected: Float[np.ndarray, "items kinds"]) -> float:
    """Mean Kullback–Leibler divergence from the expected probabilities, in nats; 0 where they are the same.

    >>> round(divergence(np.array([[0.5, 0.5]]), np.array([[1.0, 0.0]])), 4)
    0.6931
    """
    return max(0.0, float(rel_entr(expected, np.maximum(probabilities, TINY)).sum(1).mean()))  # rounding can make it less


def quicker(agreement: Mapping[str, float], latency: Mapping[str, float]) -> str:
    """The runtime of least latency among those in which a file agrees no less than in the first.

    >>> quicker({"onnxruntime": 0.97, "openvino": 0.96}, {"onnxruntime": 2.0, "openvino": 1.0})
    'onnxruntime'
    """
    least = next(iter(agreement.values()))
    return min((place for place, value in agreement.items() if value >= least), key=latency.__getitem__)


def ratios(figures: Mapping[str, float], whole: Mapping[str, float]) -> dict[str, float]:
    """Counted figures as ratios to the original's; 1 where the original's could not be counted."""
    return {f"{key}_ratio": figures[key] / whole[key] if whole[key] else 1.0 for key in ("size", "parameters", "macs") if key in figures}


def row(made: Candidate) -> str:
    """A candidate's line of the live table, under HEADER."""
    f = made.figures
    costs = (("size", words.size), ("macs", words.count), ("latency", words.milliseconds))
    cells = [f"{said(f[name]):>9} ({f[f'{name}_ratio']:5.2f}x)" for name, said in costs]
    return f"{made.name:26} {' '.join(cells)} {f['agreement']:7.1%} of {int(f['n']):7,}{runtime.where(made.runtime)}"
