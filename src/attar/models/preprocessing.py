"""How images enter a model: read from the model's own description, its file, or the flags; never guessed."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

from attar.config import ModelChoice
from attar.errors import ModelError
from attar.records import Preprocess

FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box"}  # PIL's numbers, as the hub's files hold them


def from_hub_config(name: str, choice: ModelChoice) -> Preprocess:
    """Preprocessing of a transformers model from its preprocessor_config.json; flags override it.

    Raises ModelError when the file is missing (naming the flags that replace it) or asks for something that cannot be done faithfully.
    """
    path = _hub_file(name)
    if path is None:
        if choice.input_size and choice.mean and choice.std:
            side = choice.input_size
            return Preprocess(
                size=(side, side), resize_shortest=side, mean=per_channel(choice.mean), std=per_channel(choice.std), origin="flags"
            )
        raise ModelError(f"hf:{name}: has no preprocessor_config.json; add it, or give --input-size, --mean and --std")
    return _override(parse_hub_config(json.loads(path.read_text("utf-8")), str(path)), choice)


def _hub_file(name: str) -> Path | None:
    folder = Path(name)
    if folder.is_dir():
        return path if (path := folder / "preprocessor_config.json").is_file() else None
    from transformers.utils import cached_file

    found = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


def parse_hub_config(body: dict[str, Any], origin: str) -> Preprocess:
    """The hub's preprocessor settings as a Preprocess; raises ModelError for those that cannot be reproduced."""
    if body.get("do_flip_channel_order"):
        raise ModelError(f"{origin}: do_flip_channel_order (BGR input) is not supported; re-save the model for RGB input")
    if body.get("do_rescale", True) and abs(body.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise ModelError(f"{origin}: rescale_factor {body['rescale_factor']} is not 1/255; give --mean and --std for inputs in [0, 1]")
    size = body.get("size", {})
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = body.get("crop_size") if body.get("do_center_crop") else None
    crop = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"]) if crop else None
    shortest = size.get("shortest_edge")
    if shortest and not crop and body.get("crop_pct") and shortest < 384:  # ConvNeXt's rule: enlarge by 1/crop_pct, then crop
        crop, shortest = (shortest, shortest), int(shortest / body["crop_pct"])
    exact = (size["height"], size["width"]) if "height" in size else None
    target = crop or exact or ((shortest, shortest) if shortest else None)
    if target is None:
        raise ModelError(f"{origin}: names no input size ({size or 'no size'}); give --input-size")
    normalise = body.get("do_normalize", True)
    if normalise and not (body.get("image_mean") and body.get("image_std")):
        raise ModelError(f"{origin}: asks for normalisation without image_mean and image_std; give --mean and --std")
    if exact and crop and exact != crop:
        raise ModelError(f"{origin}: scales to {exact} and crops {crop}; give --input-size")
    return Preprocess(
        size=tuple(target),  # type: ignore[arg-type]
        resize_shortest=shortest,
        mean=per_channel(body["image_mean"]) if normalise else (0.0,) * 3,
        std=per_channel(body["image_std"]) if normalise else (1.0,) * 3,
        resample=FILTERS[body.get("resample", 2)],
        origin=origin,
    )


def from_flags(choice: ModelChoice, module: ModuleType, sizes: Counter) -> tuple[Preprocess, str]:
    """Preprocessing of a user's own model: flags, then SIZE, MEAN and STD in its file; and what to tell the user.

    The size may also be that of the images when all have the same (`sizes` counts (height, width)); that is said, not silent.
    """
    said, size = "", choice.input_size or getattr(module, "SIZE", None)
    if size is None:
        if len(sizes) != 1:
            raise ModelError(
                f"{module.__file__}: names no SIZE and the images have {len(sizes)} different sizes; give --input-size, or SIZE = … in the file"
            )
        size = next(iter(sizes))
        said = f"input size {size[0]} × {size[1]} taken from the images, which all have it (--input-size to change)"
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    found = {"mean": choice.mean or getattr(module, "MEAN", None), "std": choice.std or getattr(module, "STD", None)}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        asked = " and ".join(f"--{name}" for name in missing)
        raise ModelError(
            f"{module.__file__}: names no {' or '.join(name.upper() for name in missing)}; give {asked}, or set it in the file"
        )
    mean, std = per_channel(found["mean"]), per_channel(found["std"])
    shortest = height if height == width else None
    origin = "flags" if choice.mean and choice.std and choice.input_size else f"{module.__file__} and flags"
    return Preprocess(size=(height, width), resize_shortest=shortest, mean=mean, std=std, origin=origin), said


def _override(preprocess: Preprocess, choice: ModelChoice) -> Preprocess:
    if choice.input_size:
        scale = choice.input_size / preprocess.size[0]
        shortest = preprocess.resize_shortest and round(preprocess.resize_shortest * scale)
        preprocess = dataclasses.replace(preprocess, size=(choice.input_size,) * 2, resize_shortest=shortest)
    mean, std = choice.mean or preprocess.mean, choice.std or preprocess.std
    return dataclasses.replace(preprocess, mean=per_channel(mean), std=per_channel(std))


def per_channel(values: Any) -> tuple[float, ...]:
    """Three floats from one or three numbers."""
    values = tuple(float(value) for value in values)
    return values * 3 if len(values) == 1 else values
