"""Made data that tests share."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# The networks of these tests are so small that threads cost more than they bring; also for the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from jaxtyping import install_import_hook
from PIL import Image

# Before attar is imported: the shapes in signatures are checked while testing, in the modules that state them
# (attar.stats is wrapped by its own tests, which must also reach the messages it gives for unequal lengths).
SHAPED = ["attar.models.objectives", "attar.stages.augment", "attar.stages.compress.repair", "attar.stages.objects"]
install_import_hook(SHAPED, "beartype.beartype")

from attar.config import Data  # noqa: E402
from attar.records import Items  # noqa: E402
from attar.stages.scan import scan  # noqa: E402
from attar.workspace import Job  # noqa: E402

KINDS = ("stripes", "discs", "noise")


def make_image(kind: str, seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """A small RGB image of one of three kinds that differ to the eye; images of one kind differ by seed."""
    rng = np.random.default_rng([KINDS.index(kind), seed])
    y, x = np.mgrid[:height, :width]
    if kind == "stripes":
        shape = (x * rng.uniform(0.5, 1) + y * rng.uniform(-0.2, 0.2)) // rng.integers(3, 6) % 2
    elif kind == "discs":
        shape = np.hypot(x - rng.uniform(0.3, 0.7) * width, y - rng.uniform(0.3, 0.7) * height) < rng.uniform(6, 14)
    else:
        shape = rng.random((height, width)) < rng.uniform(0.2, 0.8)
    dark, light = rng.integers(0, 90, 3), rng.integers(150, 256, 3)
    pixels = np.where(shape[..., None] > 0, light, dark) + rng.integers(-8, 9, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_folder(folder: Path, per_kind: int = 20, suffix: str = ".png") -> Path:
    """A folder KIND/NUMBER.png for each kind."""
    for kind in KINDS:
        (folder / kind).mkdir(parents=True)
        for seed in range(per_kind):
            make_image(kind, seed).save(folder / kind / f"{seed:03d}{suffix}")
    return folder


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 distinct PNG images of three kinds in three subfolders; not to be changed."""
    return make_folder(tmp_path_factory.mktemp("made") / "photos")


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Job]:
    """Makes a quiet Job with a folder of its own for a stage's name."""
    return lambda name="stage", **options: Job(name, tmp_path / "jobs" / name, **{"quiet": True, **options})


@pytest.fixture(scope="session")
def items(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Items:
    """The scan of `photos`."""
    return scan(Data(data=str(photos)), Job("scan", tmp_path_factory.mktemp("scan"), quiet=True))


class Finished(NamedTuple):
    """A small whole run, made once by the command line in a process of its own; not to be changed."""

    data: Path
    root: Path
    settings: dict[str, Any]
    stdout: str
    stderr: str
    data_before: dict[str, tuple[str, int]]


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """SHA-256 and time of change of every file below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def attar_command(*words: object) -> list[str]:
    return [sys.executable, "-m", "attar.cli", *map(str, words)]


@pytest.fixture(scope="session")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """60 made photos and a broken one, taken through the whole spine with tiny step counts."""
    home = tmp_path_factory.mktemp("finished")
    data, root = home / "photos", home / "run"
    shutil.copytree(photos, data)
    (data / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    before = contents(data)
    steps = {"self_steps": 12, "train_steps": 6, "distil_steps": 6, "self_width": 8}
    settings = {"data": str(data), **steps, "budget": "macs<=0.5x", "labels": "folders"}
    flags = [word for name, value in settings.items() if name != "data" for word in (f"--{name.replace('_', '-')}", value)]
    done = subprocess.run(attar_command("run", data, "--out", root, *flags, "--json"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return Finished(data, root, settings, done.stdout, done.stderr, before)
