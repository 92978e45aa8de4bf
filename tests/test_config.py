"""Three doors, one Config; and every fault of the settings at once, with its remedy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import attar
from attar.cli import SEARCHED, _parse, _settings, make_parser, make_search_parser
from attar.config import SECTIONS, Config, Objects, Search, build_config, flatten, options, read_toml, template, tomllib
from attar.errors import UsageError

BESIDE = ("search", "objects")
"""Sections of verbs beside the spine."""

EVERYTHING: dict[str, Any] = {
    "out": "runs/x",
    "seed": 7,
    "workers": 3,
    "tensorboard": "boards",
    "engine": "ray",
    "ray_address": "auto",
    "data": "shots/**/*.png",
    "test_share": 0.2,
    "validation_share": 0.15,
    "max_megapixels": 40.0,
    "model": "net.py:build",
    "pretrained": "hf:dino",
    "weights": "net.safetensors",
    "output": "logits",
    "input_size": 96,
    "mean": (0.1, 0.2, 0.3),
    "std": (0.5,),
    "policy": "simclr",
    "strength": 0.4,
    "frequency": 0.25,
    "dials": "held",
    "generate_minutes": 3.5,
    "generate_steps": 50,
    "generate_side": 64,
    "generate_count": 20,
    "objective": "vicreg, cluster",
    "self_steps": 20,
    "self_kinds": 40,
    "adapt_steps": 30,
    "relearn_share": 0.25,
    "self_width": 8,
    "batch_size": 32,
    "temperature": 0.1,
    "cluster_method": "ward",
    "clusters": 4,
    "max_clusters": 9,
    "components": 16,
    "min_subcluster": 5,
    "keep_share": 0.5,
    "keep_items": 900,
    "core_method": "density",
    "near_duplicate": 0.9,
    "outlier_cut": 0.95,
    "drop_flagged": "blank, odd size",
    "train_steps": 0,
    "budget": "size<=0.5x, agreement>=0.9",
    "minutes": 2.5,
    "student": "self",
    "distil_steps": 5,
    "distil_batch": 16,
    "calibration_items": 64,
    "threads": 2,
    "runtime": "auto",
    "labels": "folders",
    "neighbours": 3,
    "search_steps": 4000,
    "search_minutes": 7.5,
    "objects_side": 320,
    "objects_layer": "encoder",
    "objects_method": "words",
    "objects_most": 9,
    "objects_least": 0.01,
    "objects_neck": 0.5,
    "object_kinds": 4,
}


def fault(**given: Any) -> str:
    """What is said of these settings beside good data."""
    with pytest.raises(UsageError) as caught:
        build_config({"data": "photos", **given})
    assert caught.value.exit_code == 2
    return str(caught.value)


def from_flags(*words: str) -> Config:
    flags, file = _settings(make_parser().parse_args(["run", "--quiet", *words]))
    return build_config(flags, file)


def flags_of(settings: dict[str, Any]) -> list[str]:
    words = []
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


def toml_of(settings: dict[str, Any]) -> str:
    lines: list[str] = []
    for section in SECTIONS:
        lines.append(f"[{section}]")
        for name, value in settings.items():
            if options()[name].section == section:
                text = f'"{value}"' if isinstance(value, str) else list(value) if isinstance(value, tuple) else value
                lines.append(f"{name} = {text}")
    return "\n".join(lines)


def test_three_doors_build_the_same_config(tmp_path: Path) -> None:
    assert set(EVERYTHING) == set(options()), "the test above all sets every option"
    by_keyword = build_config(EVERYTHING)
    of_run = {name: value for name, value in EVERYTHING.items() if name != "data" and options()[name].section not in BESIDE}
    words = [EVERYTHING["data"], *flags_of(of_run)]
    file = tmp_path / "attar.toml"
    file.write_text(toml_of(EVERYTHING))
    assert by_keyword == build_config({}, file) == from_flags("--config", str(file))
    assert from_flags(*words) == dataclasses.replace(by_keyword, search=Search(), objects=Objects())
    searched = {name: value for name, value in EVERYTHING.items() if name != "out" and options()[name].section in SEARCHED}
    given, _ = _settings(_parse(["augment", "search", EVERYTHING["out"], "--quiet", *flags_of(searched)]))
    assert build_config(given | {"out": EVERYTHING["out"]}).search == by_keyword.search
    looked = {name: value for name, value in EVERYTHING.items() if options()[name].section == "objects"}
    given, _ = _settings(make_parser().parse_args(["objects", EVERYTHING["out"], "--quiet", *flags_of(looked)]))
    assert build_config(given | {"data": "photos"}).objects == by_keyword.objects
    assert flatten(by_keyword) == EVERYTHING
    defaults = flatten(build_config({"data": "photos"}))
    assert [name for name in EVERYTHING if defaults[name] == EVERYTHING[name]] == [], "a default would pass this test unread"


def test_flatten_and_build_are_inverse() -> None:
    config = build_config({"data": "photos", "mean": [0.5, 0.5, 0.5]})
    assert build_config(flatten(config)) == config


def test_given_settings_win_over_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "attar.toml"
    file.write_text("[data]\ndata = 'a'\n[cluster]\nclusters = 3\nmax_clusters = 7\n")
    config = build_config({"clusters": 5}, file)
    assert (config.data.data, config.cluster.clusters, config.cluster.max_clusters, config.cluster.components) == ("a", 5, 7, 32)


def test_a_file_in_this_folder_is_picked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("attar.toml").write_text("[cluster]\nclusters = 3\n")
    assert from_flags("photos").cluster.clusters == 3
    assert from_flags("photos", "--clusters", "4").cluster.clusters == 4


def test_numbers_of_a_tuple_are_read_however_they_are_written() -> None:
    wanted = (0.1, 0.2, 0.3)
    given: list[Any] = ["0.1,0.2,0.3", "0.1 0.2 0.3", [0.1, 0.2, 0.3], wanted, ["0.1,", "0.2,", "0.3"], ["0.1,0.2,0.3"]]
    assert {build_config({"data": "x", "mean": mean}).model.mean for mean in given} == {wanted}
    assert build_config({"data": "x", "mean": 0.5}).model.mean == (0.5,)


def test_paths_are_text_and_none_is_the_default() -> None:
    config = build_config({"data": Path("photos"), "weights": None, "minutes": None})
    assert (config.data.data, config.model.weights, config.compress.minutes) == ("photos", None, None)


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    file = tmp_path / "attar.toml"
    file.write_text("[cluster]\nclutsers = 3\n[nonsense]\na = 1\n[curate]\nkeep_share = 2\n")
    with pytest.raises(UsageError) as caught:
        build_config({"self_stepps": 3, "clusters": "many", "temperature": 9, "budget": "beauty>=1", "test_share": 0}, file)
    lines = str(caught.value).splitlines()
    assert lines[0] == "9 settings cannot be used:"
    assert len(lines) == 10
    for text in (
        "clutsers",
        "[nonsense]",
        "keep_share: 2",
        "'self_stepps'",
        "clusters: 'many'",
        "temperature: 9",
        "'beauty>=1'",
        "test_share",
        "data: nothing to read",
    ):
        assert sum(text in line for line in lines) == 1, text


@pytest.mark.parametrize(
    ("name", "meant"),
    [("self_step", "self_steps"), ("cluster", "clusters"), ("seeds", "seed"), ("keepshare", "keep_share"), ("labels_file", "labels")],
)
def test_an_unknown_setting_gets_a_suggestion(name: str, meant: str) -> None:
    said = fault(**{name: 1})
    assert f"unknown setting {name!r}; did you mean " in said
    assert meant in said


def test_a_setting_like_no_other_gets_the_list() -> None:
    said = fault(qqqq=1)
    assert all(name in said for name in options())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"clusters": "many"}, "clusters: 'many'; expected a whole number"),
        ({"clusters": 2.5}, "clusters: 2.5; expected a whole number"),
        ({"clusters": "2.5"}, "clusters: '2.5'; expected a whole number"),
        ({"clusters": True}, "clusters: True; expected a whole number"),
        ({"clusters": [3]}, "clusters: [3]; expected a whole number"),
        ({"clusters": float("inf")}, "clusters: inf; expected a whole number"),
        ({"seed": None}, "seed: None; a value is required"),
        ({"keep_share": "half"}, "keep_share: 'half'; expected a number"),
        ({"keep_share": {}}, "keep_share: {}; expected a number"),
        ({"max_megapixels": float("nan")}, "max_megapixels: nan; expected a number"),
        ({"max_megapixels": "inf"}, "max_megapixels: 'inf'; expected a number"),
        ({"minutes": float("inf")}, "minutes: inf; expected a number"),
        ({"mean": "a b c"}, "mean: 'a b c'; expected numbers"),
        ({"mean": [[0.5]]}, "mean: [[0.5]]; expected numbers"),
        ({"mean": float("nan")}, "mean: nan; expected numbers"),
        ({"labels": 3}, "labels: 3; expected text"),
        ({"out": ["a"]}, "out: ['a']; expected text"),
    ],
)
def test_wrong_types(given: dict[str, Any], expected: str) -> None:
    assert fault(**given) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"data": ""}, "data: nothing to read; name a folder, glob, list file, archive or Parquet file"),
        ({"test_share": 0.6, "validation_share": 0.4}, "each must be above 0 and their sum below 0.9"),
        ({"validation_share": 0}, "each must be above 0 and their sum below 0.9"),
        ({"max_megapixels": 0}, "must be above 0"),
        ({"output": "both"}, "output: 'both'; expected auto, logits or embedding"),
        ({"input_size": 4}, "expected 8 to 1024 pixels"),
        ({"mean": [1, 2]}, "expected one or three numbers"),
        ({"mean": []}, "expected one or three numbers"),
        ({"std": [1, 0, 1]}, "every number must be above 0"),
        ({"strength": 1.1}, "expected 0 to 1"),
        ({"frequency": -0.1}, "expected 0 to 1"),
        ({"policy": "bold"}, "There is no policy 'bold'"),
        ({"search_steps": 0}, "expected at least 1"),
        ({"search_minutes": 0}, "expected above 0"),
        ({"objects_side": 16}, "expected 32 to 4096 pixels"),
        ({"objects_method": "best"}, "objects_method: 'best'; expected cut, words or lost"),
        ({"objects_most": 0}, "expected at least 1"),
        ({"objects_least": 1}, "expected 0 to below 1"),
        ({"objects_neck": 1}, "expected 0 (never cut) to below 1"),
        ({"object_kinds": -1}, "expected 0 (choose) to 1000"),
        ({"self_steps": 0}, "expected at least 1"),
        ({"self_width": 7}, "expected 8 to 256"),
        ({"batch_size": 3}, "expected at least 4"),
        ({"temperature": 0}, "expected 0.01 to 2"),
        ({"clusters": 1}, "expected 0 (choose) or at least 2"),
        ({"clusters": -1}, "expected 0 (choose) or at least 2"),
        ({"max_clusters": 1}, "expected at least 2"),
        ({"components": 1}, "expected at least 2"),
        ({"min_subcluster": 1}, "expected at least 2"),
        ({"keep_share": 0}, "expected above 0, at most 1"),
        ({"keep_share": 1.01}, "expected above 0, at most 1"),
        ({"near_duplicate": 0.4}, "expected 0.5 to 1"),
        ({"outlier_cut": 2}, "expected 0 to 1"),
        ({"drop_flagged": "hazy"}, "expected some of blank, blurred"),
        ({"relearn_share": 2}, "expected 0 to 1"),
        ({"train_steps": -1}, "expected 0 or more"),
        ({"budget": "size>=3MB"}, "budget: 'size>=3MB': size is bounded with <="),
        ({"minutes": 0}, "expected above 0"),
        ({"distil_steps": -1}, "expected 0 or more"),
        ({"distil_batch": 1}, "expected at least 2"),
        ({"calibration_items": 7}, "expected at least 8"),
        ({"threads": 0}, "expected 1 to 256"),
        ({"threads": 10**9}, "expected 1 to 256"),
        ({"neighbours": 0}, "expected at least 1"),
        ({"seed": -1}, "expected 0 to 4294967295"),
        ({"seed": 2**32}, "expected 0 to 4294967295"),
        ({"workers": 0}, "expected 1 to 256"),
    ],
)
def test_ranges(given: dict[str, Any], expected: str) -> None:
    said = fault(**given)
    assert expected in said
    assert next(iter(given)) in said, "the setting is named"
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[cluster\n", r"not valid TOML \(.*`attar init` writes a valid one"),
        ("[clusters]\nclusters = 3\n", r"unknown section \[clusters\]; the sections are setup, data"),
        ("clusters = 3\n", r"unknown section \[clusters\]; the sections are"),
        ("[curate]\nclusters = 3\n", r"unknown setting 'clusters' in \[curate\]; it belongs in \[cluster\]"),
        ("[curate]\nkeep_shar = 0.3\n", r"unknown setting 'keep_shar' in \[curate\]; did you mean keep_share"),
    ],
)
def test_faults_of_a_file_name_it(text: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "attar.toml"
    file.write_text(text)
    for read in (read_toml, lambda path: build_config({"data": "photos"}, path)):
        with pytest.raises(UsageError, match=expected) as caught:
            read(file)
        assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize("kind", ["missing", "folder", "binary"])
def test_a_file_that_cannot_be_read(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "attar.toml"
    if kind == "folder":
        file.mkdir()
    elif kind == "binary":
        file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="attar init"):
        build_config({"data": "photos"}, file)


def test_the_template_un_commented_is_the_defaults(tmp_path: Path) -> None:
    assert all(body == {} for body in tomllib.loads(template()).values()), "as written it changes nothing"
    assert set(tomllib.loads(template())) == set(SECTIONS)
    live = []
    for line in template().splitlines():
        name, equals, value = line.removeprefix("# ").partition(" =")
        live.append(f"{name} = {value}" if equals and name in options() and value.strip(' "') else line)
    file = tmp_path / "attar.toml"
    file.write_text("\n".join(live))
    read = read_toml(file)
    assert read == {name: option.default for name, option in options().items() if option.default not in (None, "")}
    assert build_config({"data": "photos"}, file) == build_config({"data": "photos"})
    assert all(f"# {name} =" in template() for name in options()), "every setting is in it"


def test_init_never_overwrites(tmp_path: Path) -> None:
    file = tmp_path / "attar.toml"
    assert attar.init(file) == file
    assert file.read_text() == template()
    file.write_text("mine")
    with pytest.raises(UsageError, match="exists already and is left as it is; name another file"):
        attar.init(file)
    assert file.read_text() == "mine"
    with pytest.raises(UsageError, match="cannot be written"):
        attar.init(tmp_path / "missing" / "attar.toml")


def test_every_option_has_a_text_a_home_and_a_flag() -> None:
    help_of_run = " ".join(next(a for a in make_parser()._actions if a.choices).choices["run"].format_help().split())
    help_of_search = " ".join(make_search_parser().format_help().split())
    help_of_objects = " ".join(next(a for a in make_parser()._actions if a.choices).choices["objects"].format_help().split())
    for name, option in options().items():
        assert len(option.text) > 15, name
        assert option.text[0].isupper(), name
        assert option.text.endswith("."), name
        shown = {"search": help_of_search, "objects": help_of_objects}.get(option.section, help_of_run)
        assert name == "data" or f"--{name.replace('_', '-')} " in shown, name
    assert {option.section for option in options().values()} == {item.name for item in dataclasses.fields(Config)}


@pytest.mark.parametrize(
    ("data", "name"),
    [("photos", "photos"), ("a/b/photos/", "photos"), ("shots/**/*.png", "shots"), ("x/pack.tar", "pack"), ("a.parquet", "a")],
)
def test_the_run_folder_is_named_after_the_data(data: str, name: str) -> None:
    assert build_config({"data": data}).out == Path("attar-runs") / name
    assert build_config({"data": data, "out": "here"}).out == Path("here")


def test_config_is_frozen() -> None:
    config = build_config({"data": "photos"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.setup.seed = 3  # type: ignore[misc]
