"""Clusters mapped back to the items: names that stay, tables, folders of links."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from test_cluster import make_items, make_vectors, run
from test_cluster_methods import blobs

import attar
from attar import formats, records
from attar.errors import UsageError, WorkspaceError
from attar.stages.cluster import listing
from attar.stages.cluster.naming import carry_names, set_name
from attar.stages.cluster.space import head_probabilities


@pytest.fixture
def clustered(tmp_path: Path) -> tuple[Path, records.Items, np.ndarray, records.Clusters]:
    """A folder with a clusters record of four groups of 60, 50, 40 and 30, its items and their vectors."""
    values, _ = blobs([60, 50, 40, 30])
    items, home = make_items(180), tmp_path / "run"
    home.mkdir()
    formats.FORMATS[records.Clusters].save(home, run(values, tmp_path / "job", items, clusters=4))
    return home, items, values, load(home)


def load(home: Path) -> records.Clusters:
    return formats.FORMATS[records.Clusters].load(home)


def again(home: Path, items: records.Items, values: np.ndarray, k: int, folder: Path) -> records.Clusters:
    formats.FORMATS[records.Clusters].save(home, run(values, folder, items, clusters=k))
    return load(home)


def test_names_are_kept_with_the_clusters_and_taken_away(clustered: tuple) -> None:
    home, items, _, found = clustered
    assert found.names == {}
    assert set_name(home, items, found, 2, " shoes ") == {2: "shoes"}
    assert set_name(home, items, load(home), 0, "hats") == {0: "hats", 2: "shoes"}
    assert load(home).names == {0: "hats", 2: "shoes"}
    assert set_name(home, items, load(home), 2, "") == {0: "hats"}
    assert carry_names(home, items, load(home)) == []


@pytest.mark.parametrize(
    ("number", "name", "message"),
    [
        (4, "x", r"cluster 4: there is none; the clusters of .* are 0 to 3"),
        (-1, "x", r"cluster -1: there is none"),
        (1, "two\nlines", r"expected one line of at most 80 printable"),
        (1, "x" * 81, r"at most 80 printable"),
        (1, "hats", r"'hats' is the name of cluster 0 already"),
    ],
)
def test_names_that_cannot_be_given(clustered: tuple, number: int, name: str, message: str) -> None:
    home, items, _, found = clustered
    set_name(home, items, found, 0, "hats")
    with pytest.raises(UsageError, match=message):
        set_name(home, items, load(home), number, name)
    assert load(home).names == {0: "hats"}


def test_names_follow_their_items_when_numbers_change(clustered: tuple, tmp_path: Path) -> None:
    home, items, values, found = clustered
    set_name(home, items, found, 0, "large")
    set_name(home, items, load(home), 3, "small")
    old = load(home).column("cluster").copy()
    keep = (old != 0) | (np.arange(180) % 3 == 0)  # the largest group becomes the smallest, so all numbers change
    items = records.Items(root=items.root, table=items.table.filter(keep), quarantine=items.quarantine)
    items = records.Items(root=items.root, table=items.table.set_column(0, "id", [np.arange(keep.sum())]), quarantine=items.quarantine)
    now = again(home, items, values[keep], 4, tmp_path / "again")
    assert now.names == {}, "names of other clusters are not shown"
    told = carry_names(home, items, now)
    names = load(home).names
    assert sorted(names.values()) == ["small"], "a third of the members is not most of them"
    (number,) = names
    assert set(items.column("path")[now.column("cluster") == number]) == {f"photo {i}.png" for i in np.flatnonzero(old == 3)}
    assert any("'large' is dropped" in text for text in told)
    assert any("'small' moved from cluster 3 to" in text for text in told)
    assert carry_names(home, items, load(home)) == []


def test_margins_are_those_of_the_head(clustered: tuple) -> None:
    _, items, values, found = clustered
    other, margin = listing.margins(found, make_vectors(values, 50))
    shares, own = head_probabilities(values, found.head), found.column("cluster")
    for item in range(0, 180, 7):
        rest = np.delete(np.arange(4), own[item])
        assert other[item] == rest[shares[item, rest].argmax()]
        assert margin[item] == pytest.approx(shares[item, own[item]] - shares[item, other[item]], abs=1e-6)
    rows = listing.summary(items, found, margin)
    assert [row["items"] for row in rows] == np.bincount(own).tolist()
    paths = items.column("path").tolist()
    for row in rows:
        assert paths.index(row["medoid"]) == found.medoids[row["cluster"]]
        inside = np.flatnonzero(own == row["cluster"])
        assert paths.index(row["borders"][0]) == inside[margin[inside].argmin()]


def test_what_is_there_already_is_left_alone(clustered: tuple, tmp_path: Path) -> None:
    _, items, values, found = clustered
    other, margin = listing.margins(found, make_vectors(values))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file.csv").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    for taken in ("full", "file.csv", "link"):
        with pytest.raises(UsageError, match=r"exists already and is left as it is"):
            listing.write_links(tmp_path / taken, items, found)
    with pytest.raises(UsageError, match=r"file.csv: exists already and is left as it is"):
        listing.write_table(tmp_path / "file.csv", items, found, other, margin)
    with pytest.raises(UsageError, match=r"cannot be written .* folder you can write to"):
        listing.write_table(tmp_path / "nowhere" / "file.csv", items, found, other, margin)
    assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file.csv").read_text() == "mine"


def test_links_that_cannot_be_made_are_said_and_nothing_is_left(
    clustered: tuple, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, items, _, found = clustered
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(photos, "photos")
    packed = records.Items(root=str(tmp_path / "all.tar"), table=items.table, quarantine=items.quarantine)
    column = [f"all.tar::photos/{number}.png" for number in range(180)]
    packed = records.Items(root=packed.root, table=items.table.set_column(1, "path", [column]), quarantine=items.quarantine)
    with pytest.raises(UsageError, match=r"180 items lie inside a container .* all.tar::photos/0.png; write a table with --table"):
        listing.write_links(tmp_path / "links", packed, found)
    plain = records.Items(root=str(photos), table=items.table, quarantine=items.quarantine)

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")  # what FAT and some network disks say

    monkeypatch.setattr(os, "symlink", refused)
    with pytest.raises(WorkspaceError, match=r"links: symbolic links cannot be made there \(Operation not permitted\); .* --table"):
        listing.write_links(tmp_path / "links", plain, found)
    assert not (tmp_path / "links").exists()
    assert not list(tmp_path.glob(".attar-links-*"))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match=r"is not a run folder of attar"):
        attar.name(tmp_path / "none", 1, "x")
    assert not (tmp_path / "none").exists()
    with pytest.raises(WorkspaceError, match=r"the stage scan is not finished here"):
        attar.clusters(tmp_path / "none")
