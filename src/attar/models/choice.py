"""--model auto: which source fits the data, and why. The rule is in `choose`, from top to bottom; the first line that holds decides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from attar.config import ModelChoice
from attar.errors import UsageError
from attar.records import Items

KNOWN = (
    "facebook/dinov2-small",
    "facebook/dinov2-base",
    "facebook/dino-vits16",
    "facebook/convnextv2-tiny-1k-224",
    "microsoft/resnet-50",
    "microsoft/resnet-18",
    "google/mobilenet_v2_1.0_224",
)
"""Image encoders that are taken from the cache of transformers where they are, best first."""
SMALL = 48
"""Median shorter side, pixels, under which pictures are not what models pretrained on photos have seen."""
FEW = 200
"""Training items under which there are too few to learn an encoder from."""


def choose(choice: ModelChoice, items: Items) -> tuple[ModelChoice, str]:
    """The choice with a source in place of "auto", and why in a sentence (empty where the source was named).

    A pretrained model at hand (the one named by `pretrained`, else a known one that was downloaded before) where the items are photos of
    at least SMALL pixels; descriptors where fewer than FEW items could be learned from; else `self`. Nothing is downloaded.
    """
    if choice.model != "auto":
        return choice, ""
    if choice.pretrained == "auto":
        raise UsageError('pretrained: "auto" names no model; give what --model auto may take, such as hf:FOLDER')
    short = int(np.median(np.minimum(items.column("width"), items.column("height"))))
    learnable = len(items.ids("train"))
    found = choice.pretrained or _downloaded()
    seen = f"{len(items)} images of about {short} px, {learnable} to learn from"
    if found and short >= SMALL:
        return replace(choice, model=found), f"--model auto took {found}: {seen}, and a pretrained model is at hand"
    absent = f"the pretrained {found} has seen larger photos" if found else "no pretrained model is at hand (--pretrained names one)"
    if learnable < FEW:
        why = f"--model auto took descriptors of texture and colour: {seen}, fewer than the {FEW} an encoder needs; {absent}"
        return replace(choice, model="descriptors"), why
    return replace(choice, model="self"), f"--model auto took self, an encoder learned from the items: {seen}; {absent}"


def _downloaded() -> str:
    """The folder, as a source, of the best known encoder in the cache of transformers; empty where there is none."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return ""
    for name in KNOWN:
        paths = [try_to_load_from_cache(name, file) for file in ("config.json", "model.safetensors", "preprocessor_config.json")]
        if all(isinstance(path, str) for path in paths):
            return f"hf:{Path(str(paths[0])).parent}"
    return ""
