"""Policies that are known, plans against operations done one by one, and labels that follow a view."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import UsageError
from attar.records import Dial, Policy
from attar.stages.augment import mapping
from attar.stages.augment.catalogue import DEFAULTS, FAMILIES, NAMES, POLICIES, TRANSFORMS, as_policy
from attar.stages.augment.plan import LUMA, ORDERS, Plan, sample

SIZES = [(375, 500), (64, 64), (40, 90), (1, 1), (7, 3)]
FULL = Dial(1.0, 1.0)
WARPS = ("geometry", "flip", "shear", "perspective", "spherical", "elastic")


def _plan(dials: Mapping[str, Dial], count: int = 40, seed: int = 0, size: tuple[int, int] = (32, 48), **options: Any) -> Plan:
    sizes = [SIZES[i % len(SIZES)] for i in range(count)]
    return sample([dials] * count, np.random.default_rng(seed), sizes, size, **options)


def _same(first: Plan, second: Plan) -> bool:
    drawn = first.drawn.keys() == second.drawn.keys() and all(
        np.array_equal(first.drawn[k], second.drawn[k], equal_nan=True) for k in first.drawn
    )
    return drawn and all(np.array_equal(a, b) for a, b in zip(first[:-1], second[:-1]))


# sampling


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dial", [Dial(0.0, 1.0), Dial(1.0, 0.0)])
def test_a_dial_at_zero_changes_nothing(name: str, dial: Dial) -> None:
    assert _same(_plan({name: dial}), _plan({}))


def test_the_plain_view_is_the_whole_source_stretched_and_otherwise_untouched() -> None:
    plan = _plan({}, 5)
    for (rows, columns), matrix in zip(SIZES, plan.matrix):
        assert np.array_equal(matrix, np.diag([columns / 48, rows / 32, 1]))
    assert np.array_equal(plan.colour, np.broadcast_to(np.eye(3, 4, dtype=np.float32), (5, 3, 4)))
    assert not any(
        part.any() for part in (plan.warp, plan.elastic, plan.equalise, plan.blur, plan.sharpen, plan.noise, plan.jpeg, plan.erase)
    )
    assert (plan.table == -1).all()
    assert len(plan.tables) == 0
    assert plan.drawn == {}
    assert plan.steps().tolist() == [10, 1, 1, 1, 1]


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_every_transform_changes_something_and_is_written_down(name: str, strength: float) -> None:
    plan = _plan({name: Dial(strength, 1.0)})
    assert not _same(plan._replace(drawn={}), _plan({}))
    assert list(plan.drawn) == [name]
    assert plan.drawn[name].shape == (40, len(TRANSFORMS[name].parameters))
    assert np.isfinite(plan.drawn[name]).all()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_no_strength_reaches_further_than_full(name: str) -> None:
    """How far parameters lie from what changes nothing, in the units each is drawn evenly in, grows with the strength."""

    def far(strength: float) -> np.ndarray:
        values = _plan({name: Dial(strength, 1.0)}, 300).drawn[name]
        still = np.array(list(TRANSFORMS[name].parameters.values()))
        ratio = {"scale", "gamma"} & {name}
        return np.abs(np.log(values) if ratio else values - still).max(0)

    weak, half, full = far(0.1), far(0.5), far(1.0)
    switches = {"horizontal_flip", "vertical_flip", "quarter_turn", "channel_shuffle", "invert", "equalise"}
    if name in switches:
        assert np.array_equal(weak, full)
    elif name not in ("erase", "jpeg", "posterise", "resized_crop"):  # a place is drawn as well, or whole numbers
        np.testing.assert_allclose(weak / full, 0.1, rtol=1e-6)
        np.testing.assert_allclose(half / full, 0.5, rtol=1e-6)
    else:
        assert (weak <= half + 1e-12).all() or name in ("resized_crop", "erase", "jpeg")


def test_full_strength_is_what_the_catalogue_says() -> None:
    drawn = _plan(dict.fromkeys(TRANSFORMS, FULL), 3000).drawn
    ranges = {
        "rotate": (-30, 30), "scale": (0.5, 2), "shear": (-30, 30), "translate": (-0.3, 0.3), "perspective": (-0.3, 0.3), "elastic": (-0.12, 0.12),
        "brightness": (0.2, 1.8), "contrast": (0.2, 1.8), "saturation": (0.2, 1.8), "hue": (-0.2, 0.2), "gamma": (0.4, 2.5), "solarise": (0, 1),
        "posterise": (2, 8), "blur": (0, 0.03), "sharpen": (0, 2), "noise": (0, 0.1), "jpeg": (10, 100), "quarter_turn": (1, 3),
        "channel_shuffle": (1, 5), "grey": (1, 1),
    }  # fmt: skip
    for name, (low, high) in ranges.items():
        assert drawn[name].min() >= low - 1e-9, name
        assert drawn[name].max() <= high + 1e-9, name
        assert drawn[name].min() <= low + 0.05 * (high - low), name
        assert drawn[name].max() >= high - 0.05 * (high - low), name
    assert (drawn["spherical"][:, 0].min() < -0.95, drawn["spherical"][:, 0].max() > 0.95) == (True, True)
    assert -0.12 <= drawn["barrel"][:, 0].min() < -0.11
    assert 0.28 < drawn["barrel"][:, 0].max() <= 0.3
    assert 0.08 <= drawn["resized_crop"][:, 0].min() < 0.1
    boxes = drawn["erase"]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert 0.24 < area.max() <= 0.25 + 1e-9
    assert (boxes.min() >= 0, boxes.max() <= 1 + 1e-9) == (True, True)


@pytest.mark.parametrize("frequency", [0.1, 0.5, 0.9])
def test_families_are_drawn_with_their_frequency_and_apart_from_each_other(frequency: float) -> None:
    count = 4000
    drawn = _plan(dict.fromkeys(FAMILIES, Dial(1.0, frequency)), count).drawn
    present = np.stack([np.isfinite(drawn[members[0]][:, 0]) for members in FAMILIES.values()])
    for members, rows in zip(FAMILIES.values(), present):  # a family is drawn as one
        assert all(np.array_equal(np.isfinite(drawn[name][:, 0]), rows) for name in members)
    error = 4 * np.sqrt(frequency * (1 - frequency) / count)
    np.testing.assert_allclose(present.mean(1), frequency, atol=error)
    assert np.abs(np.corrcoef(present) - np.eye(len(FAMILIES))).max() < 4 / np.sqrt(count)


@pytest.mark.parametrize("pick", [1, 2, 50])
def test_pick_gives_each_view_so_many_of_the_names_evenly(pick: int) -> None:
    names = ("rotate", "colour", "solarise", "noise", "blur")
    dials = dict.fromkeys(names, Dial(1.0, 0.3)) | {"invert": Dial(0.0, 1.0), "jpeg": Dial(1.0, 0.0)}
    drawn = _plan(dials, 3000, pick=pick).drawn
    present = np.stack([np.isfinite(drawn["brightness" if name == "colour" else name][:, 0]) for name in names])
    assert (present.sum(0) == min(pick, len(names))).all()
    np.testing.assert_allclose(present.mean(1), min(pick / len(names), 1), atol=0.05)
    assert not {"invert", "jpeg"} & set(drawn)


def test_a_transform_named_by_itself_follows_its_own_dial() -> None:
    drawn = _plan({"geometry": Dial(1.0, 1.0), "rotate": Dial(0.1, 1.0), "colour": FULL, "hue": Dial(0.0, 0.0)}, 400).drawn
    assert 2 < np.abs(drawn["rotate"]).max() <= 3
    assert drawn["resized_crop"][:, 0].min() < 0.1
    assert "hue" not in drawn
    assert "contrast" in drawn


def test_a_view_depends_on_its_own_row_alone() -> None:
    everything = dict.fromkeys(NAMES, Dial(0.7, 0.5))
    assert _same(_plan(everything, 20, 1), _plan(everything, 20, 1))
    assert not _same(_plan(everything, 20, 1), _plan(everything, 20, 2))
    few, many = _plan(everything, 5, 1), _plan(everything, 20, 1)
    assert np.array_equal(few.matrix, many.matrix[:5])
    assert np.array_equal(few.colour, many.colour[:5])
    assert np.array_equal(few.seed, many.seed[:5])
    without = {name: dial for name, dial in everything.items() if name not in ("elastic", "noise", "geometry")}
    others = _plan(without, 20, 1)  # what else is drawn moves nothing
    assert np.array_equal(others.colour, many.colour)
    assert np.array_equal(others.erase, many.erase)


@pytest.mark.parametrize("size", [(30, 30), (24, 40)])
def test_full_crops_have_the_aspect_ratio_of_the_view(size: tuple[int, int]) -> None:
    sizes = [(375, 500), (500, 375), (200, 200)] * 50
    plan = sample([{"resized_crop": FULL}] * 150, np.random.default_rng(0), sizes, size)
    step_x, step_y = plan.matrix[:, 0, 0], plan.matrix[:, 1, 1]  # source pixels per view pixel
    left, top = plan.matrix[:, 0, 2], plan.matrix[:, 1, 2]
    width, height = step_x * size[1], step_y * size[0]
    assert (left >= -1e-9).all()
    assert (top >= -1e-9).all()
    assert (left + width <= np.array(sizes)[:, 1] + 1e-9).all()
    assert (top + height <= np.array(sizes)[:, 0] + 1e-9).all()
    free = (width < np.array(sizes)[:, 1] - 1e-6) & (height < np.array(sizes)[:, 0] - 1e-6)  # not cut by an edge of the source
    stretch = (step_x / step_y)[free]
    assert free.sum() > 90
    assert stretch.min() >= 3 / 4 - 1e-9
    assert stretch.max() <= 4 / 3 + 1e-9
    assert stretch.std() > 0.1


@pytest.mark.parametrize("seed", range(5))
def test_the_matrix_is_its_operations_done_to_points_one_by_one(seed: int) -> None:
    names = ("scale", "shear", "rotate", "translate", "quarter_turn", "horizontal_flip", "vertical_flip")
    height, width = 32, 48
    plan = _plan(dict.fromkeys(names, FULL), 5, seed)
    points = np.random.default_rng(seed).random((20, 2)) * [width, height]
    for view, (rows, columns) in enumerate(SIZES):
        drawn = {name: values[view] for name, values in plan.drawn.items()}
        x, y = points[:, 0] - width / 2, points[:, 1] - height / 2
        x, y = -x, -y  # both flips
        for _ in range(int(drawn["quarter_turn"][0])):
            x, y = -y * width / height, x * height / width
        x, y = x - drawn["translate"][0] * width, y - drawn["translate"][1] * height
        angle = np.deg2rad(drawn["rotate"][0])
        x, y = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
        slope = np.tan(np.deg2rad(drawn["shear"]))
        x, y = x + slope[0] * y, slope[1] * x + y
        x, y = x / drawn["scale"][0], y / drawn["scale"][0]
        expected = (x + width / 2) / width * columns, (y + height / 2) / height * rows
        found = mapping.project(plan.matrix[view], points[:, 0], points[:, 1])
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_perspective_moves_the_corners_by_what_was_drawn() -> None:
    plan = _plan({"perspective": FULL}, 20)
    corners = np.array([[0, 0], [48, 0], [48, 32], [0, 32]], float)
    for view in range(20):
        rows, columns = SIZES[view % len(SIZES)]
        moved = corners + plan.drawn["perspective"][view].reshape(2, 4).T * [24, 16]
        x, y = mapping.project(plan.matrix[view], corners[:, 0], corners[:, 1])
        np.testing.assert_allclose(np.stack([x, y], 1), moved / [48, 32] * [columns, rows], atol=1e-9)


def test_colour_is_its_operations_one_by_one() -> None:
    names = ("hue", "saturation", "contrast", "brightness", "grey", "channel_shuffle", "invert")
    plan = _plan(dict.fromkeys(names, Dial(0.6, 0.7)), 60)
    pixels = np.random.default_rng(9).random((50, 3))
    for view in range(60):
        drawn = {name: values[view, 0] for name, values in plan.drawn.items() if np.isfinite(values[view, 0])}
        rgb = pixels
        if "hue" in drawn:
            y, i, q = pixels @ LUMA, pixels @ [0.596, -0.274, -0.322], pixels @ [0.211, -0.523, 0.312]
            angle = 2 * np.pi * drawn["hue"]
            i, q = i * np.cos(angle) - q * np.sin(angle), i * np.sin(angle) + q * np.cos(angle)
            rgb = np.stack([y + 0.956 * i + 0.621 * q, y - 0.272 * i - 0.647 * q, y - 1.106 * i + 1.703 * q], 1)
        grey = (rgb @ LUMA)[:, None]
        rgb = grey + drawn.get("saturation", 1) * (rgb - grey)
        rgb = 0.5 + drawn.get("contrast", 1) * (rgb - 0.5)
        rgb = rgb * drawn.get("brightness", 1)
        rgb = rgb + drawn.get("grey", 0) * ((rgb @ LUMA)[:, None] - rgb)
        rgb = rgb[:, ORDERS[int(drawn.get("channel_shuffle", 0))]]
        rgb = 1 - rgb if "invert" in drawn else rgb
        ours = pixels @ plan.colour[view, :, :3].T + plan.colour[view, :, 3]
        np.testing.assert_allclose(ours, rgb, atol=0.02)  # the printed YIQ inverse has three digits, and gains follow it


def test_tables_are_gamma_posterise_and_solarise_in_that_order() -> None:
    plan = _plan(dict.fromkeys(("gamma", "posterise", "solarise"), Dial(1.0, 0.5)), 60)
    seen = 0
    for view in range(60):
        drawn = {name: values[view, 0] for name, values in plan.drawn.items() if np.isfinite(values[view, 0])}
        expected = []
        for level in range(256):
            level = int(255 * (level / 255) ** drawn.get("gamma", 1) + 0.5)
            level -= level % 2 ** (8 - int(drawn.get("posterise", 8)))
            expected.append(255 - level if level >= 256 * drawn.get("solarise", 1) else level)
        if plan.table[view] < 0:
            assert expected == list(range(256))
        else:
            seen += 1
            assert (plan.tables[plan.table[view]] == expected).all()
    assert seen == len(plan.tables) > 40


# labels


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([("geometry",), ("elastic",), ("spherical",), ("barrel",), ("perspective",), WARPS]))
def test_points_are_where_the_view_shows_them(seed: int, names: tuple[str, ...]) -> None:
    plan = _plan(dict.fromkeys(names, FULL), 5, seed)
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(0, 48, 30), rng.uniform(0, 32, 30)
    for view in range(5):
        shown = mapping.forward(x, y, plan.size, plan.matrix[view], plan.warp[view], plan.elastic[view])
        np.testing.assert_allclose(plan.points(np.stack(shown, 1), view), np.stack([x, y], 1), atol=1e-5)


def test_coordinates_are_of_the_pixels_centres() -> None:
    x, y = _plan({"horizontal_flip": FULL}, 2).coordinates(1)  # 64 × 64 → 32 × 48
    assert x.shape == y.shape == (32, 48)
    np.testing.assert_allclose(x[5], (48 - np.arange(48) - 0.5) * 64 / 48)
    np.testing.assert_allclose(y[:, 7], (np.arange(32) + 0.5) * 2)


def test_boxes_follow_and_are_clipped() -> None:
    plan = sample([{"horizontal_flip": FULL}], np.random.default_rng(0), [(100, 200)], (50, 50))
    boxes = np.array([[0, 0, 200, 100], [20, 10, 60, 50], [-40, -40, 20, 20], [300, 10, 400, 20]], float)
    expected = [[0, 0, 50, 50], [35, 5, 45, 25], [45, 0, 50, 10], [0, 5, 0, 10]]
    np.testing.assert_allclose(plan.boxes(boxes, 0), expected, atol=1e-9)
    assert plan.boxes(np.zeros((0, 4)), 0).shape == (0, 4)


def test_a_box_stays_around_what_is_turned_and_warped() -> None:
    plan = _plan(dict.fromkeys(WARPS, FULL), 20)
    rng = np.random.default_rng(0)
    for view in range(20):
        rows, columns = SIZES[view % len(SIZES)]
        box = np.array([0.3 * columns, 0.2 * rows, 0.7 * columns, 0.6 * rows])
        inside = box[:2] + rng.random((200, 2)) * (box[2:] - box[:2])
        seen = plan.points(inside, view)
        seen = seen[((seen > 0) & (seen < [48, 32])).all(1)]
        x0, y0, x1, y1 = plan.boxes(box[None], view)[0]
        slack = 0.5  # the edges are followed at nine points
        assert ((seen > [x0 - slack, y0 - slack]) & (seen < [x1 + slack, y1 + slack])).all()


@pytest.mark.parametrize(("border", "outside"), [("constant", 9), ("edge", 3), ("reflect", 3)])
def test_masks_show_the_label_of_the_nearest_pixel(border: Any, outside: int) -> None:
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    flipped = sample([{"horizontal_flip": FULL}], np.random.default_rng(0), [(3, 4)], (6, 8), border=border)
    assert np.array_equal(flipped.mask(labels, 0), labels[:, ::-1].repeat(2, 0).repeat(2, 1))
    moved = sample([{}], np.random.default_rng(0), [(3, 4)], (3, 4), border=border)
    moved = moved._replace(matrix=np.array([[[1, 0, 1.0], [0, 1, 0], [0, 0, 1]]]))
    found = moved.mask(labels, 0, outside=9)
    assert np.array_equal(found[:, :3], labels[:, 1:])
    assert found[0, 3] == outside
    assert found.dtype == labels.dtype


def test_steps_are_the_whole_shrink_of_the_axis_that_shrinks_less() -> None:
    sizes = [(64, 64), (128, 64), (128, 128), (191, 200), (192, 300)]
    plan = sample([{}] * 5, np.random.default_rng(0), sizes, (64, 64))
    assert plan.steps().tolist() == [1, 1, 2, 2, 3]
    turned = sample([{"rotate": FULL}] * 50, np.random.default_rng(0), [(210, 210)] * 50, (64, 64))
    assert (turned.steps() == 3).all()  # however it is turned


# policies


@pytest.mark.parametrize("name", POLICIES)
def test_policies_with_a_name_are_valid(name: str) -> None:
    policy = as_policy(name)
    assert policy is POLICIES[name]
    assert as_policy(policy) == policy
    _plan(policy.families, pick=policy.pick)


def test_the_default_is_that_of_the_stages_and_trivial_picks_one() -> None:
    assert POLICIES["default"].families == DEFAULTS
    assert set(DEFAULTS) == set(FAMILIES)
    assert POLICIES["trivial"].pick == 1
    assert POLICIES["none"].families == {}


def test_a_policy_is_made_of_strengths_or_pairs(tmp_path: Path) -> None:
    expected = {"blur": Dial(0.5, 1.0), "rotate": Dial(1.0, 0.25)}
    assert as_policy({"blur": 0.5, "rotate": (1, 0.25)}).families == expected
    body = {
        "families": {"blur": [0.5, 1], "rotate": [1, 0.25]},
        "clusters": [{"blur": [0.1, 0.2]}],
        "pick": 2,
        "method": "m",
        "evidence": [{"a": 1}],
    }
    (tmp_path / "policy.json").write_text(json.dumps(body))
    found = as_policy(tmp_path / "policy.json")
    assert found == as_policy(str(tmp_path / "policy.json"))
    assert found.families == expected
    assert found.clusters == ({"blur": Dial(0.1, 0.2)},)
    assert (found.pick, found.method, found.evidence) == (2, "m", ({"a": 1},))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"rotat": 1.0}, r"no transform 'rotat' of images\. Did you mean 'rotate'\? Known are: geometry, .*, erase"),
        ({"xyzzy": 1.0}, r"no transform 'xyzzy' of images\. Known are: geometry"),
        ({"rotate": 1.2}, r"rotate: strength 1\.2 is outside 0 … 1"),
        ({"rotate": -0.1}, "rotate: strength -0.1 is outside"),
        ({"rotate": (0.5, 7)}, "rotate: frequency 7 is outside"),
        ({"rotate": float("nan")}, "rotate: strength nan is outside"),
        ({"rotate": "strong"}, "rotate: 'strong' is no dial; give a strength, or strength and frequency, each between 0 and 1"),
        ({"rotate": (1, 1, 1)}, r"rotate: \(1, 1, 1\) is no dial"),
        ({"rotate": True}, "rotate: True is no dial"),
        ({"rotate": ("0.5", 1)}, "is no dial"),
        ({"rotate": 10**400}, "rotate: strength 1000000000"),
        (Policy(families={"rotate": Dial(float("inf"), 1.0)}), "rotate: strength inf is outside"),
        (Policy(families={}, clusters=({"shaer": Dial(1.0, 1.0)},)), "Did you mean 'shear'"),
        (Policy(families={}, pick=0), "pick is 0; expected how many"),
        (Policy(families={}, pick=1.5), "pick is 1.5"),  # type: ignore[arg-type]
        ("defualt", r"no policy 'defualt': neither a file nor one of none, default, .*Did you mean 'default'"),
        (7, "A policy of type int is not understood. Give a Policy, one of none"),
    ],
)
def test_policies_that_are_wrong_are_refused(policy: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        as_policy(policy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os').system('true')", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", 'no object "families"'),
        ('{"families": []}', 'no object "families"'),
        ('{"families": {}, "clusters": {}}', "must be lists of objects"),
        ('{"families": {}, "evidence": [1]}', "must be lists of objects"),
        ('{"families": {}, "method": 3}', "must be lists of objects"),
        ('{"families": {"blur": {"strength": 1}}}', "blur: {'strength': 1} is no dial"),
        ('{"families": {"blur": [NaN, 1]}}', "blur: strength nan is outside"),
        ('{"families": {}, "pick": "all"}', "pick is 'all'"),
        ('{"families": {"blurr": [1, 1]}}', "Did you mean 'blur'"),
    ],
)
def test_a_policy_file_from_elsewhere_is_parsed_and_checked(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "policy.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        as_policy(path)
    assert str(path) in str(caught.value)
