"""Loading a user's weights, safely, with every mismatch named."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from attar.errors import ModelError

CONVERT = (
    "In an environment you trust, convert it once: import torch; from safetensors.torch import save_file; "
    "save_file(torch.load('{name}', weights_only=False).state_dict(), 'weights.safetensors')"
)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name from .safetensors or a PyTorch checkpoint; pickled code is refused, never executed.

    A checkpoint may hold the tensors under "state_dict" or "model", and with a "module." prefix. Raises ModelError.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such weights file; check --weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        body: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        remedy = CONVERT.format(name=path.name)
        raise ModelError(f"{path}: refused: it holds pickled objects whose loading could run code, not only tensors. {remedy}") from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ModelError(f"{path}: is not a readable weights file ({error}); expected .safetensors or a PyTorch checkpoint") from error
    for key in ("state_dict", "model"):
        if isinstance(body, Mapping) and isinstance(body.get(key), Mapping):
            body = body[key]
    tensors = {key: value for key, value in body.items() if isinstance(value, Tensor)} if isinstance(body, Mapping) else {}
    if not tensors:
        raise ModelError(f"{path}: holds no tensors by name; expected a state dict")
    if all(key.startswith("module.") for key in tensors):  # what DataParallel adds
        tensors = {key[len("module.") :]: value for key, value in tensors.items()}
    return tensors


def load_into(body: nn.Module, path: Path) -> None:
    """Loads a weights file into a module; raises ModelError listing missing, unexpected and misshapen tensors."""
    tensors, wanted = read_weights(path), body.state_dict()
    missing = [key for key in wanted if key not in tensors and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in tensors if key not in wanted]
    shapes = [
        f"{key} is {tuple(tensors[key].shape)} in the file, {tuple(wanted[key].shape)} in the model"
        for key in wanted
        if key in tensors and tensors[key].shape != wanted[key].shape
    ]
    faults = [
        f"{len(names)} {label}: {', '.join(names[:10])}{' …' if len(names) > 10 else ''}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if faults:
        raise ModelError(f"{path}: the weights do not fit the model; " + "; ".join(faults) + ". Use the builder they were saved from")
    body.load_state_dict(tensors, strict=False)
