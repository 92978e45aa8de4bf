"""The transforms that are known: what each does at full strength, how its parameters are drawn; and the policies that have a name."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attar.errors import UsageError
from attar.records import Dial, Policy
from attar.stages.augment.dials import read

Draw = Callable[[np.ndarray, np.ndarray], tuple[Any, ...]]
"""Uniforms (views, k) in [0, 1) and strengths (views,) in (0, 1] → one array (views,) per parameter."""


class Transform(NamedTuple):
    kind: str  # geometry, warp, colour, table, neighbourhood or erase: where in the order of a plan it stands
    full: str  # what strength 1 means; every range shrinks with the strength down to the identity at 0
    parameters: Mapping[str, float]  # name → the value that changes nothing
    uniforms: int  # how many uniforms `draw` takes
    draw: Draw


def _on(u: np.ndarray, s: np.ndarray) -> tuple[Any, ...]:
    return (np.ones_like(s),)


def _factor(u: np.ndarray, s: np.ndarray) -> tuple[Any, ...]:
    return (1 + 0.8 * s * (2 * u[:, 0] - 1),)


def _signed(reach: float, count: int = 1) -> Draw:
    return lambda u, s: tuple(reach * s * (2 * u[:, k] - 1) for k in range(count))


def _power(base: float) -> Draw:
    return lambda u, s: (np.exp(math.log(base) * s * (2 * u[:, 0] - 1)),)


def _up_to(top: float) -> Draw:
    return lambda u, s: (top * s * u[:, 0],)


def _resized_crop(u: np.ndarray, s: np.ndarray) -> tuple[Any, ...]:
    return 1 - 0.92 * s * u[:, 0], np.exp(math.log(4 / 3) * s * (2 * u[:, 1] - 1)), 1 - s, u[:, 2], u[:, 3]


def _spherical(u: np.ndarray, s: np.ndarray) -> tuple[Any, ...]:
    return s * (2 * u[:, 0] - 1), 0.2 * s * (2 * u[:, 1] - 1), 0.2 * s * (2 * u[:, 2] - 1)


def _barrel(u: np.ndarray, s: np.ndarray) -> tuple[Any, ...]:
    signed = s * (2 * u[:, 0] - 1)  # below -0.13 the corners would fold over
    return np.where(signed < 0, 0.12, 0.3) * signed, 0.1 * s * (2 * u[:, 1] - 1), 0.1 * s * (2 * u[:, 2] - 1)


def _erase(u: np.ndarray, s: np.ndarray) -> tuple[Any, ...]:
    share, aspect = 0.25 * s * u[:, 0], np.exp(1.4 * u[:, 1] - 0.7)
    width, height = np.minimum(np.sqrt(share * aspect), 1), np.minimum(np.sqrt(share / aspect), 1)
    x, y = (1 - width) * u[:, 2], (1 - height) * u[:, 3]
    return x, y, x + width, y + height


GRID = 5
"""Nodes of the elastic grid along each axis."""
_NODES = {f"{axis}_{row}_{column}": 0.0 for axis in "uv" for row in range(GRID) for column in range(GRID)}
_CORNERS = {f"{axis}_{corner}": 0.0 for corner in range(4) for axis in "xy"}

TRANSFORMS: dict[str, Transform] = {
    "horizontal_flip": Transform("geometry", "mirrored left to right (any strength above 0)", {"on": 0}, 0, _on),
    "vertical_flip": Transform("geometry", "mirrored upside down (any strength above 0)", {"on": 0}, 0, _on),
    "quarter_turn": Transform(
        "geometry", "1, 2 or 3 quarter turns (any strength above 0)", {"turns": 0}, 1, lambda u, s: (1 + np.floor(3 * u[:, 0]),)
    ),
    "rotate": Transform("geometry", "by -30 to 30 degrees, counter-clockwise", {"degrees": 0}, 1, _signed(30.0)),
    "scale": Transform("geometry", "by a factor of 1/2 to 2", {"factor": 1}, 1, _power(2.0)),
    "shear": Transform("geometry", "by -30 to 30 degrees along x and along y", {"x": 0, "y": 0}, 2, _signed(30.0, 2)),
    "translate": Transform("geometry", "by up to 0.3 of the width and of the height", {"x": 0, "y": 0}, 2, _signed(0.3, 2)),
    "resized_crop": Transform(
        "geometry",
        "8 to 100 % of the area, 3:4 to 4:3 of the view's aspect ratio, anywhere in the image",
        {"area": 1, "aspect": 1, "own_aspect": 1, "x": 0.5, "y": 0.5},
        4,
        _resized_crop,
    ),
    "perspective": Transform("geometry", "corners moved by up to 0.3 of the half side in x and in y", _CORNERS, 8, _signed(0.3, 8)),
    "spherical": Transform("warp", "amount -1 (pinched) to 1 (bulged)", {"amount": 0, "u": 0, "v": 0}, 3, _spherical),
    "barrel": Transform("warp", "cubic term -0.12 (pincushion) to 0.3 (barrel)", {"amount": 0, "u": 0, "v": 0}, 3, _barrel),
    "elastic": Transform(
        "warp", "nodes of a 5 x 5 grid moved by up to 0.12 of the half side", _NODES, len(_NODES), _signed(0.12, len(_NODES))
    ),
    "brightness": Transform("colour", "times 0.2 to 1.8", {"factor": 1}, 1, _factor),
    "contrast": Transform("colour", "times 0.2 to 1.8, about mid grey", {"factor": 1}, 1, _factor),
    "saturation": Transform("colour", "times 0.2 to 1.8", {"factor": 1}, 1, _factor),
    "hue": Transform("colour", "turned by -0.2 to 0.2 of the circle, in YIQ", {"turns": 0}, 1, _signed(0.2)),
    "grey": Transform("colour", "all colour taken away; a share of it at lower strengths", {"share": 0}, 0, lambda u, s: (s,)),
    "channel_shuffle": Transform(
        "colour",
        "one of the five other orders of the channels (any strength above 0)",
        {"order": 0},
        1,
        lambda u, s: (1 + np.floor(5 * u[:, 0]),),
    ),
    "invert": Transform("colour", "negative (any strength above 0)", {"on": 0}, 0, _on),
    "gamma": Transform("table", "power of 0.4 to 2.5", {"power": 1}, 1, _power(2.5)),
    "posterise": Transform("table", "2 to 8 bits per channel", {"bits": 8}, 1, lambda u, s: (8 - np.floor(u[:, 0] * (6 * s + 1)),)),
    "solarise": Transform("table", "levels from a threshold of 0 to 1 on inverted", {"threshold": 1}, 1, lambda u, s: (1 - s * u[:, 0],)),
    "equalise": Transform("table", "histogram of each channel equalised (any strength above 0)", {"on": 0}, 0, _on),
    "blur": Transform("neighbourhood", "Gaussian of sigma up to 3 % of the shorter side", {"sigma_share": 0}, 1, _up_to(0.03)),
    "sharpen": Transform("neighbourhood", "up to twice what a Gaussian of 1 pixel takes away, added", {"amount": 0}, 1, _up_to(2.0)),
    "noise": Transform("neighbourhood", "Gaussian of standard deviation up to 0.1", {"std": 0}, 1, _up_to(0.1)),
    "jpeg": Transform("neighbourhood", "quality 100 down to 10", {"quality": 0}, 1, lambda u, s: (100 - np.round(90 * s * u[:, 0]),)),
    "erase": Transform("erase", "a box of up to 25 % of the area made mid grey", {"x0": 0, "y0": 0, "x1": 0, "y1": 0}, 4, _erase),
}

FAMILIES: dict[str, tuple[str, ...]] = {
    "geometry": ("resized_crop", "rotate"),
    "flip": ("horizontal_flip",),
    "colour": ("brightness", "contrast", "saturation", "hue"),
    "blur": ("blur",),
    "erase": ("erase",),
}
"""What is drawn together, by one dial. A transform that is named by itself as well follows its own dial instead."""
NAMES = tuple(dict.fromkeys([*FAMILIES, *TRANSFORMS]))
"""Everything a policy may name."""

DEFAULTS = {
    "geometry": Dial(0.8, 0.9),
    "flip": Dial(1.0, 0.5),
    "colour": Dial(0.5, 0.8),
    "blur": Dial(0.5, 0.2),
    "erase": Dial(0.5, 0.1),
}
_TRIVIAL = (
    "rotate", "shear", "translate", "brightness", "contrast", "saturation", "hue", "grey",
    "posterise", "solarise", "equalise", "gamma", "sharpen", "blur",
)  # fmt: skip

POLICIES: dict[str, Policy] = {
    "none": Policy(families={}, method="nothing is changed"),
    "default": Policy(families=DEFAULTS, method="the defaults of the stages"),
    "light": Policy(
        families={"geometry": Dial(0.4, 0.9), "flip": Dial(1.0, 0.5), "colour": Dial(0.25, 0.5)}, method="small crops and little colour"
    ),
    "strong": Policy(
        families={
            "geometry": Dial(1.0, 1.0),
            "flip": Dial(1.0, 0.5),
            "colour": Dial(1.0, 0.9),
            "shear": Dial(0.5, 0.3),
            "perspective": Dial(0.5, 0.3),
            "grey": Dial(1.0, 0.2),
            "solarise": Dial(0.5, 0.1),
            "blur": Dial(1.0, 0.3),
            "noise": Dial(0.5, 0.2),
            "erase": Dial(1.0, 0.3),
        },
        method="everything photographs usually bear",
    ),
    "simclr": Policy(
        families={
            "resized_crop": Dial(1.0, 1.0),
            "flip": Dial(1.0, 0.5),
            "colour": Dial(1.0, 0.8),
            "grey": Dial(1.0, 0.2),
            "blur": Dial(0.3, 0.5),
        },
        method="after Chen et al. 2020",
    ),
    "trivial": Policy(
        families=dict.fromkeys(_TRIVIAL, Dial(1.0, 1.0)), pick=1, method="one transform at random, after Müller & Hutter 2021"
    ),
}


def as_policy(policy: Any) -> Policy:
    """A checked policy from a Policy, the name of one, a mapping {name: strength or (strength, frequency)}, or the path of a policy.json.

    A file is parsed as JSON and checked, nothing in it is executed. Raises UsageError, saying what was wrong and what is known.
    """
    if isinstance(policy, str) and policy in POLICIES:
        return POLICIES[policy]
    if isinstance(policy, str | Path):
        return read_policy(Path(policy))
    if isinstance(policy, Policy | Mapping):
        return read(policy, NAMES, "images")
    raise UsageError(
        f"A policy of type {type(policy).__name__} is not understood. Give a Policy, one of {', '.join(POLICIES)}, "
        "a mapping {name: strength or (strength, frequency)}, or the path of a policy.json."
    )


def read_policy(path: Path) -> Policy:
    """A policy from a JSON file as attar writes it: {"families": {name: [strength, frequency]}, "clusters": […], "pick": …}."""
    if not path.is_file():
        close = difflib.get_close_matches(str(path), POLICIES, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UsageError(f"There is no policy {str(path)!r}: neither a file nor one of {', '.join(POLICIES)}.{hint}")
    try:
        body = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise UsageError(f"The policy file {path} is not JSON ({error}). Expected what attar writes as policy.json.") from None
    if not isinstance(body, dict) or not isinstance(body.get("families"), dict):
        raise UsageError(f'The policy file {path} has no object "families" of the form {{name: [strength, frequency]}}.')
    clusters, evidence, method = body.get("clusters", []), body.get("evidence", []), body.get("method", "")
    lists = isinstance(clusters, list) and all(
        isinstance(row, dict) for row in [*clusters, *(evidence if isinstance(evidence, list) else [None])]
    )
    if not lists or not isinstance(method, str):
        raise UsageError(f'The policy file {path}: "clusters" and "evidence" must be lists of objects, "method" a text.')
    found = Policy(families=body["families"], clusters=tuple(clusters), pick=body.get("pick"), method=method, evidence=tuple(evidence))
    return read(found, NAMES, "images", str(path))
