"""The parts of the benchmarks that compute: what they count, judge, prune, draw and time."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import ablations
import augment
import certificate
import peers
import policies
import populations
import quantisers
import runtimes
import workloads


class Logits(nn.Module):
    """A network of the tests that gives its logits alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body = networks.made(kind).body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def test_macs_of_a_file_are_those_torch_counts(tmp_path: Path) -> None:
    for kind in networks.BODIES:
        module = Logits(kind).eval()
        file = workloads.write_onnx(module, networks.images(2), tmp_path / f"{kind}.onnx")
        unseen = 2 * 2 * 17 * 17 * 8 if kind == "transformer" else 0  # two products of two heads: torch's counter passes fused attention by
        assert workloads.onnx_macs(file, (1, 3, 32, 32)) == peers.macs(module, networks.images(1)) + unseen, kind


def test_a_file_decides_as_its_module(tmp_path: Path) -> None:
    module, inputs = Logits("residual").eval(), networks.images(130)
    file = workloads.write_onnx(module, inputs, tmp_path / "file.onnx")
    with torch.no_grad():
        assert np.array_equal(workloads.decide(file, inputs, 1), module(inputs).argmax(1).numpy())


def test_pictures_are_decoded_once_and_in_order(tmp_path: Path) -> None:
    from PIL import Image

    for number, name in enumerate(("b", "a")):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), 100 * number, np.uint8)).save(tmp_path / "data" / name / "0.jpg")
    first = workloads.pictures(tmp_path / "data", tmp_path / "cache")
    assert first.classes == ("a", "b")
    assert first.labels.tolist() == [0, 1]
    assert first.images[:, 0, 0, 0].tolist() == [100, 0]
    (tmp_path / "data" / "a" / "0.jpg").unlink()
    assert np.array_equal(workloads.pictures(tmp_path / "data", tmp_path / "cache").images, first.images)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"empty: no CLASS/\*\.jpg inside"):
        workloads.pictures(tmp_path / "empty", tmp_path / "cache")


def test_tables_show_spread() -> None:
    assert workloads.shown([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert workloads.shown([1.0], 1) == "1.0"
    assert workloads.table([{"a": 1, "bb": "x"}, {"a": 222, "bb": "y"}]).splitlines()[2:] == ["| 1   | x  |", "| 222 | y  |"]


@pytest.mark.parametrize("name", ["magnitude", "magnitude-inner", "taylor", "hessian"])
def test_pruning_meets_the_share_and_keeps_the_classifier(name: str) -> None:
    module, images = Logits("residual").eval(), networks.images(32)
    before = [parameter.clone() for parameter in module.parameters()]
    cut = peers.prune(module, images, 0.6, peers.METHODS[name])
    share = peers.macs(cut, images) / peers.macs(module, images)
    assert 0.4 < share <= 0.6
    assert cut(images).shape == (32, networks.CLASSES)
    assert all(torch.equal(old, new) for old, new in zip(before, module.parameters()))
    if not peers.METHODS[name].streams:
        assert [getattr(cut.body, layer).out_channels for layer in ("conv", "a2", "b2", "short")] == [8, 8, 16, 16]


def test_norms_are_estimated_from_the_images_alone() -> None:
    module, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), networks.images(256)
    fresh = peers.estimate_norms(module, images)
    with torch.no_grad():
        outputs = module[0](images)
    assert torch.allclose(fresh[1].running_mean, outputs.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(fresh[1].running_var, outputs.var((0, 2, 3)), rtol=1e-3)
    assert not fresh.training
    assert torch.equal(module[1].running_mean, torch.zeros(4))


def test_jitter_shifts_and_mirrors() -> None:
    images, generator = torch.arange(2 * 3 * 5 * 6.0).reshape(2, 3, 5, 6) + 1, torch.Generator().manual_seed(0)
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for _ in range(60):
        for index, view in enumerate(peers.jitter(images, generator, 2)):
            found = [
                (top, left, flipped)
                for top in range(5)
                for left in range(5)
                for flipped in (False, True)
                if torch.equal(view.flip(2) if flipped else view, padded[index, :, top : top + 5, left : left + 6])
            ]
            assert len(found) == 1
            seen.add(found[0])
    assert len(seen) > 40  # of 50


@pytest.mark.parametrize("loss", [peers.kl, peers.mse])
def test_distillation_comes_nearer_to_the_teacher(loss: Any) -> None:
    teacher, images = Logits("residual").eval(), networks.images(128)
    students = []
    for _ in range(2):
        student = peers.estimate_norms(peers.prune(teacher, images, 0.6, peers.METHODS["magnitude-inner"]), images)
        with torch.no_grad():
            before = float(loss(student(images), teacher(images)))
        assert peers.distil(student, teacher, images, lambda steps: steps / 20, 0, 3e-3, loss) == 20
        with torch.no_grad():
            assert float(loss(student(images), teacher(images))) < before
        students.append(student)
    assert all(torch.equal(one, other) for one, other in zip(students[0].parameters(), students[1].parameters()))


def _level(agreement: np.ndarray, n: int, seed: int) -> certificate.Level:
    """A population in which clusters agree to given degrees; every disagreement is an error."""
    rng = np.random.default_rng(seed)
    cluster, labels = rng.integers(len(agreement), size=n), rng.integers(10, size=n)
    student = np.where(rng.random(n) < agreement[cluster], labels, (labels + 1) % 10)
    return certificate.Level("made", str(seed), labels, student, cluster, labels)


def test_certificates_are_judged_by_what_they_did_not_see() -> None:
    level = _level(np.array([0.99] * 7 + [0.5]), 20_000, 0)
    sample = np.arange(500)
    row = certificate.judge(level, sample)
    equal = level.original == level.student
    assert row["agreement"] == equal[:500].mean()
    assert row["truth"] == equal[500:].mean()
    assert row["worst_truth"] == equal[500:][level.cluster[500:] == 7].mean()
    assert row["clusters"] == 8
    assert row["accuracy_drop"] == pytest.approx(1 - row["truth"])
    wrong = level._replace(student=np.where(np.arange(20_000) < 500, level.original, level.student))
    assert not certificate.judge(wrong, sample)["covered"]


def test_coverage_of_made_populations_is_near_nominal() -> None:
    levels = [_level(np.full(8, share), 20_000, seed) for seed, share in enumerate((0.7, 0.8, 0.9, 0.97))]
    rng = np.random.default_rng(0)
    rows = [certificate.judge(level, rng.choice(20_000, 500, replace=False)) for level in levels for _ in range(60)]
    assert 0.9 < np.mean([row["covered"] for row in rows]) < 0.99
    found = certificate.summary(rows[:4], rows)
    assert found["agreement, further samples"].endswith(")")
    assert " % of 240 (" in found["agreement, further samples"]
    assert certificate.correlation(rows)["all"] < -0.8


def test_tables_of_words_and_numbers_become_populations(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(5, 3, 5000)
    lines = [f"{value:.4f}, {'red' if value > 5 else 'blue'}, {'yes' if value > 4 else 'no'}" for value in values]
    (tmp_path / "made.csv").write_text("\n".join(lines) + "\n\n")
    found = populations.rows(tmp_path / "made.csv", 300, 0)
    assert found.items.shape == (300, 3)
    assert found.population.shape == (1000, 3)
    assert found.population[:, 1:].sum(1).unique().tolist() == [1.0]
    assert abs(float(found.population[:, 0].mean())) < 0.2
    with torch.no_grad():
        assert (found.module(found.population).argmax(1).numpy() == found.labels).mean() > 0.9
    together = torch.cat([found.items, found.population])[:, 0]
    assert len(together.unique()) > 1250  # no row of one is in the other


def test_a_runtime_answers_from_its_own_process(tmp_path: Path) -> None:
    module, inputs = Logits("residual").eval(), networks.images(5)
    file = workloads.write_onnx(module, inputs, tmp_path / "file.onnx")
    np.save(tmp_path / "inputs.npy", inputs.numpy())
    runtime = runtimes.Runtime("onnxruntime", 1)
    runtime.load("one", file, (1, 3, 32, 32))
    with torch.no_grad():
        expected = module(inputs).numpy()
    assert np.allclose(runtime.outputs("one", tmp_path / "inputs.npy", tmp_path / "outputs.npy"), expected, atol=1e-4)
    assert runtime.turn("one") > 0
    with pytest.raises(SystemExit, match=r"onnxruntime: .*'name': 'other'.*KeyError"):
        runtime.turn("other")
    runtime.close()
    assert runtime.process.returncode == 0


def test_files_take_turns() -> None:
    asked: list[str] = []
    turns = {name: lambda name=name: float(len(asked)) if asked.append(name) is None else 0.0 for name in "ab"}
    assert {name: values.tolist() for name, values in runtimes.take_turns(turns, 2).items()} == {"a": [1.0, 3.0], "b": [2.0, 4.0]}
    assert asked == ["a", "b", "a", "b"]


def test_defaults_of_the_quantiser_make_a_file_that_runs(tmp_path: Path) -> None:
    inputs = networks.images(8)
    file = workloads.write_onnx(Logits("residual").eval(), inputs, tmp_path / "file.onnx")
    quantisers.onnxruntime_defaults(file, tmp_path / "int8.onnx", inputs.numpy())
    session = ort.InferenceSession(tmp_path / "int8.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"input": inputs.numpy()})[0].shape == (8, networks.CLASSES)


def test_a_variant_whose_part_has_gone_fails() -> None:
    with pytest.raises(AttributeError, match="gone"), ablations.replacing((ablations, "gone", 0)):
        pass


def _timed(attar: float, **peers: float) -> dict[str, Any]:
    """A row of the augmentation benchmark in which nothing varies."""
    times = {"attar": attar, **peers}
    spreads = {name: dict.fromkeys(("low", "median", "high"), value) for name, value in times.items()}
    ratios = {name: dict.fromkeys(("low", "median", "high"), value / attar) for name, value in peers.items()}
    return {"workload": "crop", "first": {}, "failed": {}, "microseconds": spreads, "ratios": ratios}


def test_goals_of_augmentation_are_judged_and_what_is_missing_is_no_win() -> None:
    line = augment.judge(_timed(100, opencv=119, kornia=900), {})[0]
    assert line == {"workload": "crop", "against": "the best peer, opencv", "ratio": "1.19 (1.19 – 1.19)", "goal": "≥ 1.2", "": "MISSED"}
    assert augment.judge(_timed(100, opencv=121), {})[0][""] == "reached"
    assert [line["against"] for line in augment.judge(_timed(100, opencv=119, kornia=900), {})][1] == "the best library, kornia"
    assert augment.judge(_timed(100), {})[0][""] == "not measured: no peer has it"
    full = _timed(100, opencv=200) | {"workload": "full", "failed": {"kornia": "kornia: out of memory"}}
    verdicts = {line["against"]: line[""] for line in augment.judge(full, {"torchvision": "torchvision: ModuleNotFoundError"})}
    assert verdicts == {
        "albumentations": "not measured: left out",
        "torchvision": "not measured: torchvision: ModuleNotFoundError",
        "kornia": "not measured: kornia: out of memory",
        "fuse": "not measured: left out",
        "opencv": "reached",
    }


def test_photos_are_cut_to_size(tmp_path: Path) -> None:
    from PIL import Image

    made = augment.photos(None, 2, 0)
    assert made.shape == (2, 375, 500, 3)
    assert np.array_equal(made, augment.photos(None, 2, 0))
    assert made.std() > 20
    for name, size in (("a", (40, 90)), ("b", (1000, 750))):
        Image.new("RGB", size, (10, 20, 30)).save(tmp_path / f"{name}.png")
    assert np.array_equal(augment.photos(tmp_path, 2, 0), np.broadcast_to(np.uint8([10, 20, 30]), (2, 375, 500, 3)))
    with pytest.raises(SystemExit, match="2 files; expected at least 3 photos"):
        augment.photos(tmp_path, 3, 0)


def test_augmentation_is_timed_end_to_end(tmp_path: Path) -> None:
    script, out = Path(augment.__file__), tmp_path / "out.json"
    settings = ["--parts", "full", "crop", "--sides", "attar", "--batch", "2", "--rounds", "3", "--out", str(out)]
    done = subprocess.run([sys.executable, str(script), *settings], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not measured: left out" in done.stdout
    rows = {row["workload"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"full", "crop"}
    for row in rows.values():
        assert 0 < row["microseconds"]["attar"]["low"] <= row["microseconds"]["attar"]["high"]
        assert row["first"]["attar"] > 0


def test_a_library_that_cannot_be_opened_is_named() -> None:
    modules = {"opencv": "cv2", "albumentations": "albumentations", "fuse": "fuse_augmentations", "kornia": "kornia"}
    absent = [name for name, module in modules.items() if importlib.util.find_spec(module) is None]
    if not absent:
        pytest.skip("every peer is installed here")
    found, missing = augment.open_libraries(absent, dict.fromkeys(absent, sys.executable))
    assert found == []
    assert list(missing) == absent
    assert all("ModuleNotFoundError" in reason for reason in missing.values())


def test_the_ceiling_is_what_knowing_the_policies_would_reach() -> None:
    rng, reached, told = np.random.default_rng(0), [], []
    for _ in range(40):
        worth = rng.normal(size=60)
        truths = worth[:, None] + rng.normal(size=(60, 4))
        reached.append(np.corrcoef(worth.argsort().argsort(), truths.mean(1).argsort().argsort())[0, 1])
        told.append(policies.ceiling(truths))
    assert abs(np.mean(reached) - np.mean(told)) < 0.02
    assert np.isnan(policies.ceiling(truths[:, :1]))
