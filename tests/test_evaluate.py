"""evaluate on real image files and real ONNX files, against figures counted by hand or by scikit-learn."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import re
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from sklearn import metrics

from attar import runtime, stats
from attar.config import Evaluate
from attar.errors import AttarError, DataError, UsageError
from attar.labels import fingerprint, read_labels
from attar.records import (
    CLUSTER_SCHEMA,
    ITEM_SCHEMA,
    QUARANTINE_SCHEMA,
    SELECTION_SCHEMA,
    Candidate,
    Clusters,
    Evidence,
    Front,
    Head,
    Items,
    Model,
    Preprocess,
    Selection,
)
from attar.stages.evaluate import evaluate
from attar.workspace import Job

stage = importlib.import_module("attar.stages.evaluate")
SIDE = 8
NAMES = ("red", "green", "blue")
PLAIN = Preprocess(size=(SIDE, SIDE), mean=(0.5,), std=(0.25,))
COUNT = 90


def colour_net(path: Path, *, noise: float, logits: bool = True, width: int = 6, seed: int = 0) -> Path:
    """A file that tells the dominant colour; noise on its weights makes it err."""
    rng = np.random.default_rng(seed)
    means = np.kron(np.eye(3), np.full((SIDE * SIDE, 1), 1 / SIDE**2))  # channel means of a flattened image
    embed = means @ rng.normal(size=(3, width))
    decide = np.linalg.pinv(embed) @ means + rng.normal(0, noise, (width, 3))
    weights = {"embed": embed, "decide": decide}
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "embed"], ["embedding"]),
        helper.make_node("MatMul", ["embedding", "decide"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["cluster_probabilities"]),
    ]
    names = {"embedding": width, "cluster_probabilities": 3, **({"logits": 3} if logits else {})}
    graph = helper.make_graph(
        nodes,
        "colour",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in names.items()],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@dataclasses.dataclass
class Case:
    """Everything evaluate reads: 90 images in folders red, green and blue, every third of them in the test split."""

    home: Path
    items: Items
    colours: np.ndarray
    clusters: Clusters
    selection: Selection
    model: Model
    front: Front

    def run(self, job: str = "job", labels: str | None = None, **changes: object) -> Evidence:
        records = {name: getattr(self, name) for name in ("items", "clusters", "selection", "model", "front")} | changes
        return evaluate(**records, settings=Evaluate(labels=labels), job=self.job(job))  # type: ignore[arg-type]

    def job(self, name: str) -> Job:
        return Job("evaluate", self.home / name, quiet=True)

    def outputs(self, of: str) -> dict[str, np.ndarray]:
        """Outputs of one file on every item, in the order of ids, by the plainest way."""
        images = np.stack([np.asarray(Image.open(Path(self.items.root) / path)) for path in self.items.column("path")])
        path = (self.front.original if of == "original" else self.front.student).onnx
        return runtime.outputs(runtime.open_session(path), runtime.normalise(images, PLAIN))

    def csv(self, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("path", "label")) -> str:
        path = self.home / "labels.csv"
        with path.open("w", newline="") as stream:
            csv.writer(stream).writerows([header, *rows])
        return str(path)

    def with_selection(self, **columns: dict[int, object]) -> Selection:
        table = self.selection.table.to_pydict()
        for name, changed in columns.items():
            for at, value in changed.items():
                table[name][at] = value
        return Selection(table=pa.table(table, SELECTION_SCHEMA), thresholds={})


def _items(root: Path) -> tuple[Items, np.ndarray]:
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 3, COUNT)
    rows = []
    for number, colour in enumerate(colours):
        pixels = rng.integers(60, 160, 3) + 60 * np.eye(3, dtype=int)[colour] + rng.integers(-20, 20, (SIDE, SIDE, 3))
        path = root / NAMES[colour] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
        rows.append((path.relative_to(root).as_posix(), path.stat().st_size))
    order = sorted(range(COUNT), key=lambda number: rows[number][0])
    table = {
        "id": range(COUNT),
        "path": [rows[number][0] for number in order],
        "modality": ["image"] * COUNT,
        "content": [f"{number:032x}" for number in order],
        "bytes": [rows[number][1] for number in order],
        "width": [SIDE] * COUNT,
        "height": [SIDE] * COUNT,
        "format": ["PNG"] * COUNT,
        "frame_time": [None] * COUNT,
        "split": ["train" if number % 3 else "test" for number in range(COUNT)],
        "note": [""] * COUNT,
        "thumb": [bytes(256)] * COUNT,
        "blur": [0.3] * COUNT,
    }
    return Items(root=str(root), table=pa.table(table, ITEM_SCHEMA), quarantine=QUARANTINE_SCHEMA.empty_table()), colours[order]


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(stage, "ROUNDS", 3)
    monkeypatch.setattr(stage, "SHARD", 12)  # so that 30 test items make three shards
    monkeypatch.setattr(stage, "REPEATS", 200)
    items, colours = _items(tmp_path / "photos")
    selection = {
        "id": range(COUNT),
        "keep": [True] * COUNT,
        "reason": [""] * COUNT,
        "witness": [-1] * COUNT,
        "similarity": [0.0] * COUNT,
        "weight": [1.0] * COUNT,
        "leak": [False] * COUNT,
        "flag": [""] * COUNT,
    }
    model = Model(source={}, state={}, preprocess=PLAIN, classes=NAMES)
    files = {name: colour_net(tmp_path / f"{name}.onnx", noise=noise) for name, noise in (("original", 0.0), ("cut", 0.6))}
    figures = {"original": {"parameters": 1000.0, "macs": 5000.0}, "cut": {"parameters": 250.0, "macs": 2000.0}}
    candidates = {
        name: Candidate(name=name, model=model, onnx=path, precision="float32", figures=figures[name]) for name, path in files.items()
    }
    head = Head(
        mean=np.zeros(6, np.float32), projection=np.eye(6, dtype=np.float32), centroids=np.zeros((3, 6), np.float32), temperature=1.0
    )
    return Case(
        home=tmp_path,
        items=items,
        colours=colours,
        clusters=Clusters(
            table=CLUSTER_SCHEMA.empty_table(), head=head, medoids=np.zeros(3, np.int64), curve=(), separation=0.5, method="given"
        ),
        selection=Selection(table=pa.table(selection, SELECTION_SCHEMA), thresholds={}),
        model=model,
        front=Front(
            original=candidates["original"], candidates=(candidates["cut"],), chosen="cut", budget="", met=True, reason="", threads=1
        ),
    )


def test_figures_are_those_counted_by_hand(case: Case) -> None:
    evidence = case.run()
    test = case.items.ids("test")
    before, after = ({name: value[test] for name, value in case.outputs(of).items()} for of in ("original", "student"))
    same = before["logits"].argmax(1) == after["logits"].argmax(1)
    assert 0.3 < same.mean() < 1  # the student errs: the figures below can tell right from wrong
    found = {(figure.name, figure.of): figure for figure in evidence.figures}

    agreement = found["agreement", "student"]
    assert agreement.value == same.mean()
    assert (agreement.low, agreement.high) == stats.share_interval(same.sum(), 30)
    assert (agreement.n, agreement.split, agreement.unit) == (30, "test", "share")
    assert agreement.method == "exact 95 %; same top-1 class as the original"
    overlap = stats.knn_overlap(before["embedding"], after["embedding"], 10)
    assert found["knn_overlap", "student"].value == pytest.approx(overlap.mean())
    cosines = [np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(before["embedding"], after["embedding"])]
    assert found["embedding_cosine", "student"].value == pytest.approx(np.mean(cosines), abs=1e-6)
    assert found["size", "original"].value == case.front.original.onnx.stat().st_size
    assert found["parameters_ratio", "student"].value == 0.25
    assert found["macs_ratio", "student"].value == 0.4
    assert found["macs", "student"][2:6] == (2000.0, 2000.0, 2000.0, 1)
    assert all(figure.low <= figure.value <= figure.high for figure in evidence.figures)

    clusters = before["cluster_probabilities"].argmax(1)
    by_hand = [(one, int((clusters == one).sum()), float(same[clusters == one].mean())) for one in np.unique(clusters)]
    assert [(row["cluster"], row["n"], row["value"]) for row in evidence.per_cluster] == by_hand
    worst = found["agreement_worst_cluster", "student"]
    assert worst.value == min(value for _, n, value in by_hand if n >= 5)
    assert "lowest of the 3 clusters with at least 5 test items" in worst.method


def test_latency_states_its_conditions_and_is_measured_once(case: Case) -> None:
    evidence = case.run()
    latency, ratio = evidence.get("latency_ms"), evidence.get("latency_ratio")
    assert latency is not None
    assert ratio is not None
    assert (latency.unit, latency.n, ratio.unit) == ("ms", 3, "ratio")
    assert "ONNX Runtime" in latency.method
    assert "1 thread, batch 1" in latency.method
    assert "paired by round" in ratio.method
    for path in Path(case.items.root).rglob("*.png"):
        path.unlink()  # a resumed stage neither reads the items nor measures again
    assert case.run() == evidence


def test_figures_of_openvino_name_it(case: Case) -> None:
    pytest.importorskip("openvino")
    plain = case.run("plain", labels="folders")
    student = dataclasses.replace(case.front.student, runtime="openvino")
    front = dataclasses.replace(case.front, candidates=(student,))
    evidence = case.run("there", labels="folders", front=front)
    for figure in evidence.figures:
        other = plain.get(figure.name, figure.of)
        assert other is not None
        if not figure.name.startswith("latency"):
            assert figure.value == pytest.approx(other.value, abs=1e-5)  # the file is in float32
        named = figure.of == "student" and figure.split == "test"
        assert figure.method.endswith(" (student in OpenVINO)") is named
    assert str(evidence.certificate).startswith("same top-1 class as the original (student in OpenVINO) on ")
    latency = evidence.get("latency_ms")
    assert latency is not None
    assert re.search(
        r"original in ONNX Runtime \S+, student in OpenVINO 20\S+, on the CPU, 1 thread, batch 1, .* of their own for each$", latency.method
    )
    (note,) = [note for note in evidence.notes if note not in plain.notes]
    assert re.fullmatch(r"In OpenVINO the original itself takes \S+ ms; in the same runtime the student has \d+\.\d\dx its latency\.", note)


def test_a_fresh_run_gives_the_same_figures(case: Case) -> None:
    first, second = ([f for f in case.run(job, labels="folders").figures if not f.name.startswith("latency")] for job in ("one", "other"))
    assert first == second


def test_leaks_and_duplicates_are_left_out_and_counted(case: Case) -> None:
    changed = case.with_selection(
        leak={0: True, 3: True},
        keep={3: False, 6: False, 9: False, 12: False},
        reason={3: "near duplicate", 6: "exact duplicate", 9: "near duplicate", 12: "outlier"},
    )
    evidence = case.run(selection=changed)
    agreement = evidence.get("agreement")
    assert agreement is not None
    assert agreement.n == 26  # 2 leaks and 2 duplicates fewer than 30; the outlier stays
    expected = (
        "The figures rest on 26 of 30 test items; 2 near duplicates of training items and 2 duplicates of other test items were left out."
    )
    assert evidence.notes[0] == expected


def test_nothing_left_to_measure_on_is_an_error(case: Case) -> None:
    with pytest.raises(DataError, match=r"none of the 30 test items can be measured on, with 30 near duplicates .* raise test_share"):
        case.run(selection=case.with_selection(leak=dict.fromkeys(range(COUNT), True)))


def test_one_test_item_is_enough(case: Case) -> None:
    evidence = case.run(selection=case.with_selection(leak=dict.fromkeys(range(1, COUNT), True)))
    agreement = evidence.get("agreement")
    assert agreement is not None
    assert agreement.n == 1
    assert evidence.get("knn_overlap") is None
    assert evidence.get("agreement_worst_cluster") is None
    assert "knn_overlap was not measured: it needs at least two test items." in evidence.notes


def test_an_encoder_agrees_by_clusters(case: Case) -> None:
    files = [colour_net(case.home / f"e{width}.onnx", noise=0.6, logits=False, width=width, seed=width) for width in (6, 4)]
    original, student = (dataclasses.replace(c, onnx=path) for c, path in zip((case.front.original, case.front.student), files))
    front = dataclasses.replace(case.front, original=original, candidates=(student,))
    evidence = case.run(labels="folders", front=front, model=dataclasses.replace(case.model, classes=()))
    agreement, clusters = evidence.get("agreement"), evidence.get("cluster_agreement")
    assert agreement is not None
    assert clusters is not None
    assert agreement.value == clusters.value
    assert agreement.method.endswith("same most probable cluster as the original")
    assert evidence.get("accuracy") is None
    assert "accuracy, precision, recall and F1 were not measured: the model has no classes." in evidence.notes
    assert any("embeddings of original and student have different widths (6 and 4)" in note for note in evidence.notes)
    assert evidence.get("nmi") is not None


def test_large_splits_compare_neighbours_on_a_fixed_sample(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "SAMPLE", 20)
    evidence = case.run(labels="folders")
    overlap, nearest, agreement = (evidence.get(name) for name in ("knn_overlap", "knn_accuracy", "agreement"))
    assert overlap is not None
    assert nearest is not None
    assert agreement is not None
    assert (overlap.n, nearest.n, agreement.n) == (20, 20, 30)
    assert "among 20 test items drawn from 30" in overlap.method
    test = case.items.ids("test")[np.sort(case.job("job").rng("neighbours").choice(30, 20, replace=False))]
    embeddings = [case.outputs(of)["embedding"][test] for of in ("original", "student")]
    assert overlap.value == pytest.approx(stats.knn_overlap(*embeddings, 10).mean())


def test_labels_judge_both_models_as_sklearn_does(case: Case) -> None:
    labels = case.csv([(path, NAMES[colour].upper()) for path, colour in zip(case.items.column("path"), case.colours)])
    evidence = case.run(labels=labels)
    test = case.items.ids("test")
    truth = case.colours[test]
    for of in ("original", "student"):
        found = {figure.name: figure for figure in evidence.figures if figure.of == of}
        values = {name: value[test] for name, value in case.outputs(of).items()}
        top, clusters = values["logits"].argmax(1), values["cluster_probabilities"].argmax(1)
        hits = top == truth
        assert (found["accuracy"].value, found["accuracy"].low) == (hits.mean(), stats.share_interval(hits.sum(), 30)[0])
        macro = metrics.precision_recall_fscore_support(truth, top, average="macro", zero_division=0)
        assert [found[name].value for name in ("precision", "recall", "f1")] == pytest.approx(macro[:3])
        each = metrics.f1_score(truth, top, average=None, zero_division=0)
        assert [found[f"f1[{name}]"].value for name in NAMES] == pytest.approx(each)
        assert [found[f"recall[{name}]"].n for name in NAMES] == np.bincount(truth).tolist()
        assert found["clustering_acc"].value == pytest.approx(stats.clustering_accuracy(truth, clusters))
        assert found["nmi"].value == pytest.approx(metrics.normalized_mutual_info_score(truth, clusters))
        assert found["ari"].value == pytest.approx(metrics.adjusted_rand_score(truth, clusters))
        voted = stats.knn_vote(truth, stats.neighbours(values["embedding"], 10))
        assert found["knn_accuracy"].value == pytest.approx((voted == truth).mean())
        assert all(figure.low <= figure.value <= figure.high for figure in found.values())
    gain = evidence.get("accuracy_difference")
    before, after = evidence.get("accuracy", "original"), evidence.get("accuracy")
    assert gain is not None
    assert before is not None
    assert after is not None
    assert gain.value == pytest.approx(after.value - before.value)
    assert before.value > after.value
    assert f"Labels from {labels}: 90 rows, 90 of 90 items matched." in evidence.notes


def test_labels_that_are_no_classes_are_said_so(case: Case) -> None:
    evidence = case.run(labels=case.csv([(path, f"mood {number % 2}") for number, path in enumerate(case.items.column("path"))]))
    assert evidence.get("accuracy") is None
    why = (
        "accuracy, precision, recall and F1 were not measured: only 0 of 2 labels are class names of the model "
        "(labels such as mood 0, mood 1; classes such as red, green, blue)."
    )
    assert why in evidence.notes
    assert evidence.get("ari", "original") is not None


def test_labels_outside_the_classes_are_left_out_of_accuracy_and_counted(case: Case) -> None:
    names = ["pink" if number == 0 else NAMES[colour] for number, colour in enumerate(case.colours)]
    evidence = case.run(labels=case.csv(list(zip(case.items.column("path"), names))))
    accuracy, clustering = evidence.get("accuracy"), evidence.get("clustering_acc")
    assert accuracy is not None
    assert clustering is not None
    assert (accuracy.n, clustering.n) == (29, 30)
    assert "1 labelled test items were not judged: pink … (1 labels) are no classes of the model." in evidence.notes


def test_a_single_label_says_nothing_about_clusters(case: Case) -> None:
    evidence = case.run(labels=case.csv([(path, "red") for path in case.items.column("path")]))
    assert evidence.get("nmi") is None
    assert "clustering and nearest-neighbour figures were not measured: every labelled test item is 'red'." in evidence.notes


def test_labels_on_training_items_alone_are_refused(case: Case) -> None:
    with pytest.raises(DataError, match=r"none of the 30 test items is labelled; label some of them, or drop --labels"):
        case.run(labels=case.csv([(case.items.column("path")[1], "red")]))
    assert not (case.home / "job").exists()  # told before any work


@pytest.mark.parametrize("name", [lambda root, path: path, lambda root, path: str(root / path), lambda root, path: Path(path).name])
def test_label_paths_may_be_relative_absolute_or_names(case: Case, name: object) -> None:
    rows = [(name(Path(case.items.root), path), NAMES[c]) for path, c in zip(case.items.column("path"), case.colours)]  # type: ignore[operator]
    labels, _ = read_labels(case.items, case.csv([*rows, ("elsewhere/none.png", "red")]))
    assert labels.tolist() == [NAMES[colour] for colour in case.colours]
    _, notes = read_labels(case.items, case.csv([*rows, ("elsewhere/none.png", "red")]))
    assert notes[1].startswith("1 rows of ")
    assert notes[1].endswith("for example elsewhere/none.png (line 92).")


def test_folder_names_are_labels(case: Case) -> None:
    labels, notes = read_labels(case.items, "folders")
    assert labels.tolist() == [NAMES[colour] for colour in case.colours]
    assert notes == ["Labels are the names of the items' folders: 90 of 90 items lie in one."]
    paths = pa.array([f"all.tar::{path}" if number else "all.tar::loose.png" for number, path in enumerate(case.items.column("path"))])
    packed = dataclasses.replace(case.items, table=case.items.table.set_column(1, "path", paths))
    assert read_labels(packed, "folders")[0].tolist() == ["", *labels[1:]]


def test_a_name_in_two_folders_matches_neither(case: Case) -> None:
    paths = [path.replace(Path(path).name, "same.png") if number < 2 else path for number, path in enumerate(case.items.column("path"))]
    paths[1] = "other/same.png"
    items = dataclasses.replace(case.items, table=case.items.table.set_column(1, "path", pa.array(paths)))
    labels, notes = read_labels(items, case.csv([("same.png", "red"), (paths[5], "blue")]))
    assert np.flatnonzero(labels).tolist() == [5]
    assert "or several of that name, for example same.png (line 2)" in notes[1]


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (None, UsageError, r"labels: .*labels\.csv: no such file; name a \.csv with the columns path,label, or write \"folders\""),
        ("file,class\na.png,red\n", DataError, r"labels\.csv, line 1: the columns are file,class; expected path,label"),
        ("", DataError, r"labels\.csv, line 1: the columns are none; expected path,label"),
        ("path,label\nred/1.png,red\nred/2.png\n", DataError, r"labels\.csv, line 3: no label; expected path,label; complete or delete"),
        ("path,label\n,red\n", DataError, r"labels\.csv, line 2: no path; expected path,label"),
        (
            "path,label\nx.png,red\n",
            DataError,
            r"none of its 1 rows matches an item; the first path is x\.png \(line 2\), an item's is \w+/\d",
        ),
        ("path,label\n", DataError, r"none of its 0 rows matches an item; the first path is missing"),
        (b"path,label\n\xff\xfe,red\n", DataError, r"labels\.csv: is not a readable UTF-8 \.csv"),
    ],
)
def test_label_files_that_cannot_be_used_are_explained(case: Case, text: str | bytes | None, kind: type[AttarError], message: str) -> None:
    path = case.home / "labels.csv"
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(kind, match=message):
        read_labels(case.items, str(path))


def test_two_labels_for_one_item_are_refused(case: Case) -> None:
    first = case.items.column("path")[0]
    with pytest.raises(DataError, match=rf"line 3: {Path(first).name} is 'blue', but line 2 calls it 'red'; keep one of them"):
        read_labels(case.items, case.csv([(first, "red"), (Path(first).name, "blue")]))


def test_the_labels_fingerprint_follows_the_file(case: Case) -> None:
    assert fingerprint(Evaluate()) is None
    prints = [fingerprint(Evaluate(labels=case.csv([("a.png", label)]))) for label in ("red", "red", "blue")]
    assert prints[0] == prints[1] != prints[2]
