"""The report: one page that is whole, safe and the same every time."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from report_records import COUNT, HOSTILE, LONG, Reader, records

from attar import records as r
from attar.stages.report import result
from attar.stages.report.page import report


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return records(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def html(whole: dict[str, Any]) -> str:
    return report(**whole).html


def test_sentence_of_a_classifier(whole: dict[str, Any]) -> None:
    assert report(**whole).sentence == (
        "A 0.42 MB int8 model, 6.2× smaller and 3.4× faster than the original (1 thread, batch 1), "
        "that agrees with it on 97.8 % of 268 unseen items (95 % interval 95.2–99.0)."
    )


def test_sentence_says_what_an_encoder_keeps_and_that_a_budget_was_missed(whole: dict[str, Any]) -> None:
    front = dataclasses.replace(whole["front"], met=False, budget="latency<=0.2x, agreement>=0.95", reason="latency<=0.2x binds")
    assert result.sentence(front, whole["evidence"], classes=False) == (
        "The budget was not met (latency 0.29×, asked ≤ 0.2×). The best found is a 0.42 MB int8 model, 6.2× smaller and 3.4× faster "
        "than the original (1 thread, batch 1), that puts 97.8 % of 268 unseen items in the same cluster as the original does "
        "(95 % interval 95.2–99.0)."
    )


def test_sentence_when_nothing_smaller_was_found(whole: dict[str, Any]) -> None:
    front = dataclasses.replace(whole["front"], candidates=(), chosen="original")
    assert result.sentence(front, r.Evidence(figures=()), classes=True) == (
        "No smaller model was good enough: what you get is the original, a 2.60 MB float32 model."
    )


def test_slower_and_larger_are_said(whole: dict[str, Any]) -> None:
    swapped = [
        f._replace(of={"original": "student", "student": "original"}[f.of]) for f in whole["evidence"].figures if "ratio" not in f.name
    ]
    assert "6.2× larger and 3.4× slower than" in result.sentence(whole["front"], r.Evidence(figures=tuple(swapped)), classes=True)


def test_page_is_whole_and_loads_nothing(html: str) -> None:
    page = Reader(html)
    assert [text for text in page.of("h2")] == [
        "What was in the folder",
        "What the augmentation looks like",
        "What the model costs and keeps",
        "How to use it",
        "How it came to be",
    ]
    for tag, attributes in page.elements:
        for name in ("src", "href", "data", "action", "poster", "srcset"):
            target = attributes.get(name) or ""
            assert target.startswith(("data:image/jpeg;base64,", "#")) or not target, f"<{tag} {name}={target[:60]}>"
    assert tag_count(page, "link") == 0
    assert not re.search(r"url\(|@import", "".join(page.of("style")))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {attributes["href"][1:] for tag, attributes in page.elements if tag == "a" and attributes["href"]}
    assert links <= set(ids)


def tag_count(page: Reader, name: str) -> int:
    return sum(tag == name for tag, _ in page.elements)


def test_hostile_names_stay_text(html: str) -> None:
    page = Reader(html)
    assert tag_count(page, "script") == 1
    assert not [(tag, name) for tag, attributes in page.elements for name in attributes if name.startswith("on")]
    assert {attributes.get("src", "")[:22] for tag, attributes in page.elements if tag == "img"} <= {"data:image/jpeg;base64", ""}
    titles = {attributes.get("title") for _, attributes in page.elements}
    assert HOSTILE in titles  # whole and unchanged, as text
    assert LONG in titles
    assert all(LONG not in text for kind, text in page.texts if kind not in ("code", "pre"))  # truncated where it is shown
    assert "<b>note</b>" in page.of("li")
    assert "made <here>" in page.of("li")


def test_figures_carry_interval_and_n(html: str) -> None:
    text = " ".join(" ".join(part for _, part in Reader(html).texts).split())
    assert "97.8 % 95.2–99.0 %" in text
    assert "n = 268; test split; exact 95 %" in text
    assert "1.00 ms 0.98–1.10 ms 3.4× faster 3.1–3.6×" in text
    assert "89.0 % 84.0–93.0 % −1.0 points −3.0 to +0.4" in text
    assert "F1, <dog>" in text
    assert "cosine of the embeddings 0.99987" in text


def test_funnel_adds_up(html: str) -> None:
    shown = re.search(r'<div class="funnel">(.*?)</div>', html, re.DOTALL)
    assert shown
    numbers = [int(part.replace("−", "-")) for part in re.findall(r"<span>(?:<b>)?(−?\d+)", shown[1])]
    assert numbers == [38, -2, -1, -1, -1, -1, 32]
    assert sum(numbers[:-1]) == numbers[-1]


def test_a_cluster_that_broke_is_marked(whole: dict[str, Any]) -> None:
    rows = result.per_cluster(whole["evidence"])["rows"]
    assert [row["broken"] for row in rows] == [False, False, True]
    assert all(0 <= row["low"] <= row["at"] <= row["low"] + row["span"] + 1e-6 <= 100.01 for row in rows)


def test_same_records_give_the_same_bytes(whole: dict[str, Any], html: str) -> None:
    assert report(**whole).html == html


def test_pictures_are_shown_once_read_and_page_is_small(html: str) -> None:
    page = Reader(html)
    assert tag_count(page, "image") >= 3  # at least the medoids are on the map
    assert "cannot be" not in html
    assert len(html) < 1_000_000


def test_absent_things_leave_no_trace(whole: dict[str, Any]) -> None:
    table = whole["selection"].table
    plain = table.set_column(2, "reason", pa.array([""] * COUNT)).set_column(1, "keep", pa.array([True] * COUNT))
    plain = plain.set_column(3, "witness", pa.array([-1] * COUNT, pa.int64())).set_column(6, "leak", pa.array([False] * COUNT))
    front = dataclasses.replace(whole["front"], candidates=whole["front"].candidates[:1])
    bare = whole | {
        "items": dataclasses.replace(whole["items"], quarantine=r.QUARANTINE_SCHEMA.empty_table()),
        "vectors": dataclasses.replace(whole["vectors"], signals=()),
        "clusters": dataclasses.replace(whole["clusters"], curve=()),
        "selection": r.Selection(table=plain, thresholds={}),
        "policy": r.Policy(families=whole["policy"].families),
        "model": dataclasses.replace(whole["model"], classes=()),
        "front": front,
        "evidence": r.Evidence(figures=whole["evidence"].figures[:1]),
        "export": dataclasses.replace(whole["export"], checks={}),
        "history": [],
    }
    page = Reader(report(**bare).html)
    headings = set(page.of("h3"))
    assert not {"How many clusters", "How the encoder learned", "Agreement in each cluster", "What to know about these figures"} & headings
    text = " ".join(part for _, part in page.texts)
    assert "No duplicates were found." in text
    assert "Every file could be read." in text
    assert "None was dropped as an outlier." in text


def test_live_dials_are_shown_as_they_moved(whole: dict[str, Any]) -> None:
    def curve(stage: float) -> tuple[dict[str, float], ...]:
        rows = [
            {"step": float(step), "loss": 2.0, "validation_loss": 3.0, "effective_rank": 4.0, "gap": 0.1, "retrieval": 0.7}
            | {"strength": stage, "frequency": 0.5, "strength[blur]": stage, "frequency[blur]": 0.25 + step / 100}
            for step in range(0, 50, 10)
        ]
        ends = {f"{dial}[blur, cluster {number}]": stage for dial in ("strength", "frequency") for number in (0, 1)}
        return (*rows[:-1], rows[-1] | ends)

    vectors = dataclasses.replace(whole["vectors"], signals=curve(0.75))
    first = Reader(report(**whole | {"vectors": vectors}).html)
    assert "How the dials moved in training" in first.of("h3")
    assert first.of("td").count("0.75, 75 %") == 2
    captions = first.of("figcaption")
    assert "blur" in captions
    assert not {"strength", "frequency", "strength, blur"} & set(captions), "dials are drawn once, in their own place"
    assert {"gap", "retrieval"} <= set(captions)
    model = dataclasses.replace(whole["model"], signals=curve(0.25))
    later = Reader(report(**whole | {"vectors": vectors, "model": model}).html)
    assert later.of("td").count("0.25, 25 %") == 2, "the stage that came later"
    assert "How the dials moved in training" not in Reader(report(**whole).html).of("h3")


def test_many_clusters_fold(whole: dict[str, Any], tmp_path: Path) -> None:
    clusters = whole["clusters"]
    numbers = np.arange(COUNT, dtype=np.int32) % 30
    head = dataclasses.replace(clusters.head, centroids=np.zeros((30, 4), np.float32))
    table = clusters.table.set_column(1, "cluster", pa.array(numbers))
    many = dataclasses.replace(clusters, table=table, head=head, medoids=np.arange(30))
    policy = r.Policy(families=whole["policy"].families)
    page = report(**whole | {"clusters": many, "policy": policy, "evidence": r.Evidence(figures=whole["evidence"].figures)}).html
    assert "18 further clusters" in page
    assert len({attributes["id"] for tag, attributes in Reader(page).elements if tag == "article"}) == 30


def test_files_that_vanished_leave_a_placeholder(tmp_path: Path) -> None:
    made = records(tmp_path)
    root = Path(made["items"].root)
    (root / "002.png").unlink()  # a medoid
    (root / LONG).write_bytes(b"not what was scanned")
    page = report(**made).html
    assert page.count("cannot be<br>read now") >= 2
    assert "2 items could not be read again" in page
    for path in root.iterdir():
        path.unlink()
    root.rmdir()
    gone = Reader(report(**made).html)
    assert not any((attributes.get("src") or "").startswith("data:") for _, attributes in gone.elements)
