"""The policy a user names or a search finds: the door of the settings, the search on real files, resuming, and the command line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_image
from PIL import Image

from attar.cli import main
from attar.config import Augment, Data, Search, build_config
from attar.data import absolute
from attar.errors import DataError, UsageError
from attar.records import Clusters, Dial, Head, Items, Model, Policy, Preprocess, Selection, Vectors
from attar.stages.augment import policy as policies
from attar.stages.augment import ranking, search
from attar.stages.augment.catalogue import DEFAULTS, POLICIES, read_policy
from attar.stages.scan import scan
from attar.workspace import Job

Make = Callable[..., Job]
FEW = {name: POLICIES[name] for name in ("none", "default", "trivial")} | {
    "crops": Policy(families={"resized_crop": Dial(0.8, 1.0)}, method="crops"),
    "colour": Policy(families={"colour": Dial(0.8, 0.8)}, method="colour"),
}
"""Enough to drop some, few enough to train."""


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "contenders", lambda flips=True: FEW)
    monkeypatch.setattr(ranking, "SEEDS", (2, 1))
    monkeypatch.setattr(ranking, "FINALISTS", 2)
    monkeypatch.setattr(search, "LEAST", 2)


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Items:
    """The scan of 150 small images of two kinds."""
    folder = tmp_path_factory.mktemp("more")
    for place in range(150):
        make_image(("stripes", "discs")[place % 2], place, 20, 16).save(folder / f"{place:03d}.png")
    return scan(Data(data=str(folder)), Job("scan", tmp_path_factory.mktemp("scanned"), quiet=True))


# naming a policy


def test_a_named_policy_is_taken_as_it_is(items: Items, job: Make) -> None:
    assert policies.starting_policy(items, Augment(policy="simclr"), job()) is POLICIES["simclr"]
    pinned = policies.starting_policy(items, Augment(policy="trivial", strength=0.5), job("two"))
    assert {dial.strength for dial in pinned.families.values()} == {0.5}
    assert pinned.pick == 1
    assert pinned.evidence == ({"pinned": "strength", "value": 0.5},)


def test_a_policy_file_is_taken(items: Items, job: Make, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"families": {"rotate": [0.3, 0.7]}, "pick": None, "method": "mine"}))
    settings = Augment(policy=str(file))
    assert policies.starting_policy(items, settings, job()).families == {"rotate": Dial(0.3, 0.7)}
    before = policies.policy_fingerprint(settings)
    file.write_text(file.read_text().replace("0.3", "0.4"))
    assert policies.policy_fingerprint(settings) != before, "a changed file is another policy"
    assert policies.policy_fingerprint(Augment()) == policies.policy_fingerprint(Augment(policy="simclr")) == []


def test_what_is_no_policy_is_said_with_the_other_faults(tmp_path: Path) -> None:
    file = tmp_path / "code.json"
    file.write_text('{"families": {"rotat": [0.3, 0.7]}}')
    for given, said in (("nothing", "none, default, light, strong, simclr, trivial"), (str(file), "rotate")):
        with pytest.raises(UsageError, match="2 settings cannot be used") as caught:
            build_config({"data": "photos", "policy": given, "clusters": 1})
        assert "policy: " in str(caught.value)
        assert said in str(caught.value)


def given_to_augment(items: Items, macs: int = 0) -> tuple[Items, Vectors, Clusters, Selection]:
    """What the stage is given where neither pictures nor weights matter."""
    head = Head(
        mean=np.zeros(2, np.float32), projection=np.eye(2, dtype=np.float32), centroids=np.eye(2, dtype=np.float32), temperature=1.0
    )
    clusters = Clusters(table=items.table, head=head, medoids=np.arange(2), curve=(), separation=0.0, method="")
    model = Model(source={"kind": "self"}, state={}, preprocess=Preprocess(size=(8, 8)), macs=macs)
    return items, Vectors(shards=(), count=0, dim=2, model=model), clusters, Selection(table=items.table, thresholds={})


def test_dials_for_another_number_of_clusters_are_refused(items: Items, job: Make, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"families": {"blur": [0.5, 0.5]}, "clusters": [{"blur": [0.5, 0.5]}] * 4}))
    with pytest.raises(
        UsageError, match=r"mine.json: has dials for 4 clusters, the items fall into 2; leave out its \"clusters\", or .* --clusters 4"
    ):
        policies.augment(*given_to_augment(items), Augment(policy=str(file)), job())


def test_nobody_waits_for_the_strengths_of_a_large_model(items: Items, job: Make) -> None:
    own = job()
    found = policies.augment(*given_to_augment(items, 4_100_000_000), Augment(), own)
    assert found.families["colour"] == DEFAULTS["colour"]
    assert found.clusters == ()
    assert "strengths not tried" in found.method
    assert own.notes[-1].endswith("too large (4.1 G multiply-accumulates an item): the defaults stay")


# the search


def test_pictures_are_never_learned_from_and_judged_on(more: Items, job: Make) -> None:
    train, held = search.pictures(more, job())
    assert train.shape[1:] == held.shape[1:] == (16, 16, 3)
    assert len(held) == 30, "a fifth, though the validation split is smaller"
    seen = {image.tobytes() for image in train}
    assert not seen & {image.tobytes() for image in held}
    assert len(train) + len(held) <= len(more) - len(more.ids("test"))


def test_halves_that_probes_compare_are_of_the_same_kinds(tmp_path: Path, job: Make) -> None:
    """Also where a kind is a folder, so that by path one comes after the other: probes are fitted to one half and ask the other."""
    for number in range(240):
        kind, value = ("dark", 20) if number < 120 else ("light", 230)
        file = tmp_path / kind / f"{number:03d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), value + number % 20, np.uint8)).save(file)
    found = scan(Data(data=str(tmp_path)), job("scan"))
    _, held = search.pictures(found, job("pictures"))
    thumbs = search._thumbs(found, np.random.default_rng(0))
    for drawn in (held, thumbs):
        half = len(drawn) // 2
        for part in (drawn[:half], drawn[half:]):
            assert 0.2 < (part.reshape(len(part), -1).mean(1) > 128).mean() < 0.8


def test_too_few_images_are_refused(items: Items, job: Make) -> None:
    with pytest.raises(
        DataError, match=r"images to learn from and 12 to judge on; ranking policies needs 48 and 24: name a folder with more images"
    ):
        search.pictures(items, job())


def _fitted(policy: Policy, seed: int, steps: int = 3) -> list[torch.Tensor]:
    images = np.stack([np.asarray(make_image("discs", place, 16, 16)) for place in range(24)])
    return list(search.fit(images, policy, seed, steps).state_dict().values())


def test_trials_of_one_seed_start_alike_and_repeat() -> None:
    untrained = [_fitted(POLICIES[name], 3, 0) for name in ("none", "default")]
    assert all(torch.equal(a, b) for a, b in zip(*untrained))
    once, again, other = _fitted(POLICIES["default"], 3), _fitted(POLICIES["default"], 3), _fitted(POLICIES["default"], 4)
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    assert not all(torch.equal(a, b) for a, b in zip(once, other))
    assert not all(torch.equal(a, b) for a, b in zip(once, _fitted(POLICIES["none"], 3)))


@pytest.mark.usefixtures("few")
def test_a_search_that_was_interrupted_ends_with_the_same_table(
    more: Items, job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Search(search_steps=3 * ranking.trials(len(FEW)))
    first = Job("search", tmp_path / "kept", quiet=True)
    first.remember("costs.json", {name: 1.0 + place for place, name in enumerate(FEW)})  # times are never equal
    whole = search.search(more, settings, first)
    trained = search._trained
    calls: list[int] = []

    def counted(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return trained(*given)

    monkeypatch.setattr(search, "_trained", counted)
    second = Job("search", tmp_path / "broken", quiet=True)
    second.remember("costs.json", first.recall("costs.json"))
    with pytest.raises(KeyboardInterrupt):
        search.search(more, settings, second)
    assert search.search(more, settings, second) == whole
    assert len(calls) == ranking.trials(len(FEW)) + 1, "what was done is not done again"

    rows = {row["policy"]: row for row in whole.rows}
    assert set(rows) == set(FEW)
    assert [row["rank"] for row in whole.rows] == list(range(1, len(FEW) + 1))
    out = [row for row in whole.rows if row["eliminated"]]
    assert [row["seeds"] for row in out] == [2] * len(out)
    assert {row["seeds"] for row in whole.rows if not row["eliminated"]} == {3}
    assert whole.rows[0]["eliminated"] == ""
    assert whole.rows[0]["policy"] in whole.policy.method
    assert whole.policy.families == FEW[whole.rows[0]["policy"]].families
    for row in whole.rows:
        for name in ("score", "learnability", "retrieval", "agreement", "effective_rank"):
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    assert whole.rows[0]["policy"] in whole.verdict


@pytest.mark.usefixtures("few")
def test_a_budget_that_tells_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "LEAST", 20)
    images, count = np.zeros((32, 16, 16, 3), np.uint8), len(FEW)
    assert search.steps_of(Search(search_steps=20 * ranking.trials(count)), images, count) == 20
    assert search.steps_of(Search(), images, count) == search.STEPS
    with pytest.raises(
        UsageError, match=r"search_steps: 50: 3 steps for each of 13 encoders; at least 20 are needed: give 7 times as much"
    ):
        search.steps_of(Search(search_steps=50), images, count)
    with pytest.raises(UsageError, match=r"search_minutes: 0.0001: 0 steps for each of 13 encoders"):
        search.steps_of(Search(search_minutes=0.0001), images, count)


def test_costs_are_multiples_of_the_cheapest() -> None:
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3)).astype(np.uint8)
    found = search.costs(images, {name: FEW[name] for name in ("none", "default")})
    assert set(found) == {"none", "default"}
    assert min(found.values()) == 1.0


# the command line


@pytest.mark.usefixtures("few")
def test_the_command_searches_once_and_its_policy_is_taken_up(
    more: Items, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = str(2 * ranking.trials(len(FEW)))
    assert main(["augment", "search", "run", "--data", more.root, "--search-steps", steps, "--json", "--quiet"]) == 0
    said, err = capsys.readouterr()
    body = json.loads(said)
    assert err == ""
    assert body["policy"] == "run/search/policy.json"
    found = read_policy(Path(body["policy"]))
    assert {name: list(dial) for name, dial in found.families.items()} == body["families"]
    with open("run/search/table.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["policy"] for row in rows] == [row["policy"] for row in body["table"]]
    monkeypatch.setattr(search, "fit", lambda *_: pytest.fail("a finished search was done again"))
    assert main(["augment", "search", "run", "--quiet"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:3] == ["rank", "policy", "eliminated"]
    assert out[-2] == body["verdict"]
    assert out[-1] == "Policy: run/search/policy.json"
    config = build_config({"data": more.root, "policy": body["policy"]})
    assert policies.starting_policy(more, config.augment, Job("embed", tmp_path / "job", quiet=True)).families == found.families


def test_one_word_is_the_folder_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["augment", "search"]) == 2
    assert "search: is not a run folder (no settings.json)" in capsys.readouterr().err
    assert main(["augment", "search", "search"]) == 2
    assert "search: is not a run folder (no settings.json)" in capsys.readouterr().err
    for words, usage in (
        (["augment", "search", "--help"], "usage: attar augment search"),
        (["augment", "--help"], "usage: attar augment ["),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert capsys.readouterr().out.startswith(usage)


def test_the_newer_budget_takes_the_place_of_the_older(more: Items, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["augment", "search", "run", "--data", absolute(more.root), "--search-steps", "5", "--quiet"]) == 2
    assert "search_steps: 5: " in capsys.readouterr().err
    assert main(["augment", "search", "run", "--minutes", "0.00001", "--quiet"]) == 2
    assert "search_minutes: 1e-05: " in capsys.readouterr().err
    assert main(["augment", "search", "run", "--minutes", "1", "--search-steps", "5", "--quiet"]) == 2
    assert "search_steps: 5: " in capsys.readouterr().err, "steps are the firmer budget"


def test_settings_of_a_search_are_checked() -> None:
    assert replace(Search(), search_steps=3).search_steps == 3
    with pytest.raises(UsageError, match="search_steps: 0; expected at least 1"):
        build_config({"data": "x", "search_steps": 0})
    with pytest.raises(UsageError, match=r"search_minutes: -1.0; expected above 0"):
        build_config({"data": "x", "search_minutes": -1})
