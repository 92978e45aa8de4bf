"""Generated items: augmentation against a slow reference, exact resumption, the filter, collapse, and a check that can say no."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import t as student_t

from attar import stats
from attar.config import Augment, Cluster, Curate, Embed, Generate, ModelChoice, build_config
from attar.errors import DataError, ModelError, UsageError
from attar.models.network import Network
from attar.models.objectives import distillation
from attar.models.students import Encoder
from attar.records import Clusters, Head, Items, Policy, Preprocess, Selection, Vectors
from attar.stages.augment import benefit, generator, samples
from attar.stages.augment import generate as stage
from attar.stages.augment.policy import DEFAULTS
from attar.stages.cluster.cluster import cluster
from attar.stages.cluster.space import unit
from attar.stages.curate.curate import curate
from attar.stages.embed import embed
from attar.stages.encode import as_input
from attar.workspace import Job

Make = Callable[..., Job]
PLAIN = Preprocess(size=(16, 16))


def _images(count: int, side: int = 16, kinds: tuple[str, ...] = ("stripes", "discs"), first: int = 0) -> np.ndarray:
    return np.stack([np.asarray(make_image(kinds[i % len(kinds)], first + i, side, side)) for i in range(count)])


# the networks and their augmentation


def _slowly_augmented(image: np.ndarray, plan: generator.Draw, row: int) -> np.ndarray:
    """One image (3, s, s), pixel by pixel, as Zhao et al. describe it."""
    side, out = image.shape[1], image.copy()
    if plan.drawn[row, 0]:
        out = out + float(plan.brightness[row])
        grey = out.mean(0)
        out = np.stack([grey + float(plan.saturation[row]) * (channel - grey) for channel in out])
        out = out.mean() + float(plan.contrast[row]) * (out - out.mean())
    down, right = plan.move[row].tolist() if plan.drawn[row, 1] else (0, 0)
    moved = np.zeros_like(out)
    for y in range(side):
        for x in range(side):
            if 0 <= y - down < side and 0 <= x - right < side:
                moved[:, y, x] = out[:, y - down, x - right]
    if plan.drawn[row, 2]:
        y, x = plan.hole[row].tolist()
        moved[:, max(0, y - side // 4) : y + side // 4, max(0, x - side // 4) : x + side // 4] = 0
    return moved


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([8, 16]), st.sampled_from([0.3, 1.0]))
def test_augmentation_is_its_operations_one_by_one(seed: int, side: int, strength: float) -> None:
    rng = np.random.default_rng(seed)
    images, plan = rng.uniform(-1, 1, (4, 3, side, side)), generator.draw(4, side, strength, rng)
    found = generator.augmented(torch.from_numpy(images), plan).numpy()
    np.testing.assert_allclose(found, [_slowly_augmented(image, plan, row) for row, image in enumerate(images)], atol=1e-6)


def test_augmentation_is_differentiable_and_nothing_at_strength_zero() -> None:
    images = torch.rand(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plan = generator.draw(1, 8, 1.0, np.random.default_rng(0))
    plan = plan._replace(**{name: getattr(plan, name).double() for name in ("brightness", "saturation", "contrast")})
    assert torch.autograd.gradcheck(lambda x: generator.augmented(x, plan), images)
    assert torch.equal(generator.augmented(images, generator.draw(1, 8, 0.0, np.random.default_rng(0))), images)


@pytest.mark.parametrize("strength", [0.2, 0.7])
def test_each_kind_is_drawn_as_often_as_the_strength_says(strength: float) -> None:
    drawn = generator.draw(4000, 16, strength, np.random.default_rng(0)).drawn.float()
    assert (drawn.mean(0) - strength).abs().max() < 4 * (strength * (1 - strength) / 4000) ** 0.5
    assert (torch.corrcoef(drawn.T) - torch.eye(3)).abs().max() < 4 / 4000**0.5


@pytest.mark.parametrize("side", [8, 16, 32, 64, 128])
def test_networks_make_and_judge_images_of_their_side(side: int) -> None:
    gan = generator.Gan(side)
    made = gan.generator(generator.latents(2, np.random.default_rng(0)))
    assert made.shape == (2, 3, side, side)
    assert float(made.detach().abs().max()) <= 1
    assert gan.discriminator(made).shape == (2,)
    assert sum(parameter.numel() for parameter in gan.parameters()) < 1.5e6


def test_a_side_that_is_none_is_refused() -> None:
    for side in (4, 48, 256):
        with pytest.raises(ValueError, match=f"side: {side}; expected one of 8, 16, 32, 64, 128"):
            generator.Gan(side)


@given(st.floats(0, generator.MOST), st.floats(-2, 2), st.floats(0, 1))
def test_the_strength_moves_against_the_signal_within_its_range(strength: float, signal: float, by: float) -> None:
    found = generator.adapted(strength, signal, by)
    assert 0 <= found <= generator.MOST
    assert (found >= strength) if signal > generator.OVERFIT else (found <= strength)


def test_a_discriminator_that_knows_its_images_by_heart_is_seen_to_overfit() -> None:
    torch.manual_seed(0)
    gan, rng = generator.Gan(8), np.random.default_rng(0)
    real, held, made = (torch.from_numpy(rng.uniform(-1, 1, (16, 3, 8, 8)).astype(np.float32)) for _ in range(3))
    assert generator.overfitting(gan, real, real, 0.0, rng) == 0
    before = abs(generator.overfitting(gan, real, held, 0.0, rng))
    optimiser = gan.optimisers()["discriminator"]
    for _ in range(30):
        optimiser.zero_grad()
        (torch.relu(1 - gan.discriminator(real)).mean() + torch.relu(1 + gan.discriminator(made)).mean()).backward()
        optimiser.step()
    signal = generator.overfitting(gan, real, held, 0.0, rng)
    assert signal > 0.5 > generator.OVERFIT
    assert signal > before


def test_a_settled_generator_gives_each_sample_by_itself() -> None:
    torch.manual_seed(0)
    model = generator.Gan(16).average
    generator.settle(model, np.random.default_rng(0))
    many, few, other = (generator.generate(model, count, np.random.default_rng(seed)) for count, seed in ((70, 1), (3, 1), (3, 2)))
    assert many.dtype == np.uint8
    assert many.shape == (70, 16, 16, 3)
    assert np.abs(many[:3].astype(int) - few).max() <= 1  # a batch of another size may round differently
    assert not np.array_equal(few, other)


# training


class Stopped(Exception):
    """A kill, as the loop sees it."""


def _fit(job: Job, steps: int = 6, count: int = 40, held: np.ndarray | None = None) -> tuple[generator.Gan, list[dict[str, Any]]]:
    images = _images(count)
    return stage.fit(images, _images(8, first=500) if held is None else held, np.full(count, 1 / count), True, steps, job)


def test_training_that_was_interrupted_goes_on_to_the_same_bits(job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "BATCH", 8)
    whole, curve = _fit(job("whole"))
    monkeypatch.setattr(stage, "CHECKPOINT_SECONDS", -1.0)  # a checkpoint after every step
    step_of = stage.take_step

    def stopping(gan: Any, optimisers: Any, real: Any, strength: float, step: int, rng: Any) -> Any:
        if step == 4:
            raise Stopped
        return step_of(gan, optimisers, real, strength, step, rng)

    monkeypatch.setattr(stage, "take_step", stopping)
    broken = Job("whole", job("elsewhere").folder, quiet=True)
    with pytest.raises(Stopped):
        _fit(broken)
    assert broken.recall("generator.pt")["step"] == 4
    monkeypatch.setattr(stage, "take_step", step_of)
    resumed, again = _fit(broken)
    assert again == curve
    assert [row["step"] for row in curve] == list(range(1, 7))
    states = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other, _ = _fit(Job("whole", job("third").folder, quiet=True, seed=1))
    assert not torch.equal(other.state_dict()["generator.start.weight"], states[0]["generator.start.weight"])


def test_training_that_diverges_says_so(job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "take_step", lambda *_: {"discriminator_loss": 1.0, "generator_loss": float("nan")})
    with pytest.raises(ModelError, match=r"generator: .*'generator_loss': nan.* at step 0; its training diverged: take another --seed"):
        _fit(job())


@pytest.mark.slow
def test_the_strength_rises_with_few_images_and_not_without_overfitting(job: Make) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    even = np.full(8, 1 / 8)
    other = np.random.default_rng(1).integers(0, 256, (64, 16, 16, 3)).astype(np.uint8)
    _, by_heart = stage.fit(noise, other, even, False, 300, job("few"))
    _, known = stage.fit(noise, noise, even, False, 300, job("known"))
    assert max(row["strength"] for row in by_heart) > max(row["strength"] for row in known) + 0.1


# the filter


def _known(count: int = 600, seed: int = 0) -> tuple[samples.Known, Callable[[int, int], np.ndarray]]:
    """Three groups of directions on a sphere of twelve dimensions, what is known of them, and a source of more."""
    centres = np.random.default_rng(seed).normal(size=(3, 12)) * 3

    def drawn(number: int, which: int) -> np.ndarray:
        rng = np.random.default_rng([seed, which])
        return (centres[rng.integers(0, 3, number)] + rng.normal(size=(number, 12))).astype(np.float32)

    values = drawn(count, 0)
    mean = unit(values).mean(0)
    points = unit(centres) - mean
    head = Head(mean=mean, projection=np.eye(12, dtype=np.float32), centroids=points, temperature=0.1)
    return samples.known(values, head, np.random.default_rng(0)), drawn


@given(st.integers(0, 100), st.booleans())
def test_nearest_is_the_smallest_of_all_distances(seed: int, within: bool) -> None:
    rng = np.random.default_rng(seed)
    known = unit(rng.normal(size=(30, 5)))
    queries, own = (known[:9], np.arange(9)) if within else (unit(rng.normal(size=(9, 5))), None)
    distance, row = samples.nearest(queries, known, own)
    for i, query in enumerate(queries.astype(np.float64)):
        others = [1 - query @ value if not within or j != i else np.inf for j, value in enumerate(known)]
        assert distance[i] == pytest.approx(min(others), abs=1e-6)
        assert others[row[i]] == pytest.approx(min(others), abs=1e-6)


def test_the_filter_passes_what_real_items_are_to_each_other() -> None:
    known, drawn = _known()
    fresh = samples.accepted(drawn(400, 1), known)
    assert fresh.mask.mean() > 0.75  # of real ones each bound leaves 2 to 10 % outside
    assert set(fresh.verdict) <= {samples.ACCEPTED, *samples.REASONS}
    assert (fresh.confidence[fresh.mask] >= known.confidence[fresh.cluster[fresh.mask]]).all()
    assert (fresh.distance[fresh.mask] <= known.reach[fresh.cluster[fresh.mask]]).all()
    assert known.near <= fresh.novelty[fresh.mask].min()
    assert fresh.novelty[fresh.mask].max() <= known.far


def test_the_filter_refuses_copies_strangers_and_nothings() -> None:
    known, drawn = _known()
    copies = samples.accepted(drawn(600, 0), known)
    assert not copies.mask.any()
    assert (copies.verdict == "copy of a training item").mean() > 0.8
    strangers = np.random.default_rng(5).normal(size=(300, 12)).astype(np.float32)
    assert samples.accepted(strangers, known).mask.mean() < 0.05
    assert not samples.accepted(np.zeros((2, 12), np.float32), known).mask.any()
    good = drawn(400, 1)[samples.accepted(drawn(400, 1), known).mask]
    twice = samples.accepted(np.concatenate([good, good * 2]), known)
    assert twice.mask[: len(good)].all()
    assert (twice.verdict[len(good) :] == "copy of another sample").all()


def test_a_cluster_without_items_accepts_nothing() -> None:
    known, drawn = _known()
    head = known.head
    lonely = Head(
        mean=head.mean,
        projection=head.projection,
        centroids=np.vstack([head.centroids, np.full((1, 12), 0.9, np.float32)]),
        temperature=0.1,
    )
    bounds = samples.known(drawn(600, 0), lonely, np.random.default_rng(0))
    assert bounds.confidence[3] == np.inf
    assert not samples.accepted((lonely.centroids[3:] + head.mean) * np.ones((1, 1), np.float32), bounds).mask.any()


def test_samples_that_are_all_alike_are_seen_to_have_collapsed() -> None:
    known, drawn = _known()
    rng = np.random.default_rng(0)
    assert samples.diversity(drawn(300, 1), known, rng) > 0.9
    one = drawn(1, 1) + 0.02 * np.random.default_rng(1).normal(size=(300, 12)).astype(np.float32)
    assert samples.diversity(one, known, rng) < samples.COLLAPSED
    assert samples.diversity(np.zeros((300, 12), np.float32), known, rng) < samples.COLLAPSED


def test_a_batch_with_samples_keeps_its_first_items() -> None:
    real, made = _images(16), _images(5, first=100)
    mixed = samples.with_samples(real, made, np.random.default_rng(0))
    assert np.array_equal(mixed[:12], real[:12])
    assert all(any(np.array_equal(image, one) for one in made) for image in mixed[12:])
    assert len(mixed) == 16


def test_a_contact_sheet_shows_every_cluster_beside_its_real_items() -> None:
    made, real = np.full((3, 16, 16, 3), 200, np.uint8), {0: np.zeros((2, 20, 24, 3), np.uint8), 4: np.zeros((1, 20, 24, 3), np.uint8)}
    sheet = np.asarray(samples.contact_sheet(made, np.array([0, 0, 4]), real))
    first, second = (18 + row * samples.CELL + samples.CELL // 2 for row in range(2))
    beside = 70 + samples.SHOWN * samples.CELL + 12
    assert sheet[first, 70 + samples.CELL + 10].tolist() == [200] * 3
    assert sheet[second, 70 + samples.CELL + 10].tolist() == [255] * 3
    assert sheet[first, beside + 10].tolist() == sheet[second, beside + 10].tolist() == [0] * 3


# the check


def _lessons(images: np.ndarray, made: np.ndarray) -> benefit.Lessons:
    torch.manual_seed(3)
    teacher = Network(Encoder(16, 8)).train()
    with torch.no_grad():
        for _ in range(20):
            teacher(as_input(_images(64), PLAIN))
    return benefit.Lessons(teacher.eval(), PLAIN, lambda rows: images[rows], np.full(len(images), 1 / len(images)), made, False)


def test_losses_are_those_of_distillation() -> None:
    answer, target = torch.randn(9, 5), torch.randn(9, 5)
    # the square of all targets there, of each here: equal where the targets have one length
    target = torch.nn.functional.normalize(target)
    expected = float(distillation((answer, None), (target, None)))
    assert float(benefit.item_losses(answer, target).mean()) == pytest.approx(expected, rel=1e-5)
    assert float(benefit.item_losses(target, target).abs().max()) < 1e-6


def test_the_interval_covers_and_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    gains = rng.normal(size=(5, 20))
    mean, low, high = stats.crossed(gains)
    error = np.sqrt(np.var(gains.mean(1), ddof=1) / 5 + np.var(gains.mean(0), ddof=1) / 20)
    assert mean == pytest.approx(gains.mean())
    assert (high - low) / 2 == pytest.approx(student_t.ppf(0.975, 4) * error)
    covered = 0
    for _ in range(600):
        drawn = 0.3 + rng.normal(size=(5, 1)) + rng.normal(size=(1, 20)) + rng.normal(size=(5, 20))
        _, low, high = stats.crossed(drawn)
        covered += low <= 0.3 <= high
    assert covered / 600 > 0.93


def test_noise_is_not_said_to_help(job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benefit, "SEEDS", 3)
    noise = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3)).astype(np.uint8)
    lessons, held, made = _lessons(_images(200), noise), _images(20, first=900), job()
    found = benefit.check(lessons, held, 12, made)
    assert found["verdict"] in ("no measurable difference", "worse")
    assert found["low"] <= found["value"] <= found["high"]
    assert found["n"] == 3
    (made.folder / "check-1.json").unlink()  # interrupted after two seeds of three, the third before the second
    assert benefit.check(lessons, held, 12, made) == found


@pytest.mark.slow
def test_the_check_can_say_each_of_its_words(job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten images and four hundred further real ones as samples: they help. Two hundred and themselves: neither. Batches mostly of noise: worse."""
    held = _images(80, first=900)
    assert benefit.check(_lessons(_images(10), _images(400, first=100)), held, 150, job("few"))["verdict"] == "helps"
    assert benefit.check(_lessons(_images(200), _images(200)), held, 60, job("same"))["verdict"] == "no measurable difference"
    monkeypatch.setattr(samples, "SHARE", 0.95)
    noise = np.random.default_rng(0).integers(0, 256, (200, 16, 16, 3)).astype(np.uint8)
    assert benefit.check(_lessons(_images(200), noise), held, 60, job("noise"))["verdict"] == "worse"


# the stage


@pytest.fixture(scope="module")
def made(items: Items, tmp_path_factory: pytest.TempPathFactory) -> tuple[Items, Vectors, Clusters, Selection]:
    def job(name: str) -> Job:
        return Job(name, tmp_path_factory.mktemp(name), quiet=True)

    vectors = embed(items, ModelChoice(), Embed(self_steps=5, self_width=8), Augment(), job("embed"))
    clusters = cluster(items, vectors, Cluster(clusters=3), job("cluster"))
    return items, vectors, clusters, curate(items, vectors, clusters, Curate(), job("curate"))


POLICY = Policy(families=DEFAULTS)
SMALL = Generate(generate_steps=3, generate_side=32, generate_count=8)


def test_nothing_is_generated_unless_asked(made: Any, job: Make) -> None:
    assert stage.generated(*made, POLICY, Generate(), job()) is None
    assert not job().folder.exists()


def test_the_stage_writes_what_was_drawn_and_says_what_it_is_worth(made: Any, job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "check_steps", lambda *_: 2)
    monkeypatch.setattr(benefit, "SEEDS", 2)
    monkeypatch.setattr(stage, "COLLAPSED", -1.0)  # three steps make nothing worth keeping: let it through, to see all of the stage
    monkeypatch.setattr(stage, "accepted", _lenient)
    own = job("augment")
    found = stage.generated(*made, POLICY, SMALL, own)
    assert found is not None
    table = pq.read_table(found.folder / samples.TABLE)
    assert table.schema.equals(samples.SAMPLE_SCHEMA)
    verdicts = np.array(table["verdict"].to_pylist())
    files = sorted(path.stem for path in found.folder.glob("[0-9]*.png"))
    assert files == [f"{number:06d}" for number in np.flatnonzero(verdicts == samples.ACCEPTED)]
    assert len(files) == 32  # all that were drawn
    items: Items = made[0]
    assert set(table["neighbour"].to_pylist()) <= set(items.ids("train").tolist())
    read = samples.read_samples(found.folder, Preprocess(size=(24, 20)))
    assert read.shape == (len(files), 24, 20, 3)
    again = np.asarray(Image.open(found.folder / f"{files[0]}.png").resize((20, 24), Image.Resampling.BILINEAR))
    assert np.array_equal(read[0], again)
    assert Image.open(found.folder / "sheet.png").width > 500
    assert found.evidence[2]["verdict"] in ("helps", "worse", "no measurable difference")
    assert samples.help_shown(found.evidence) == (found.evidence[2]["verdict"] == "helps")
    assert any("95 % interval" in note for note in own.notes)
    second = stage.generated(*made, POLICY, SMALL, Job("augment", own.folder / "again", quiet=True))
    assert second is not None
    assert second.evidence == found.evidence
    assert _bytes(second.folder) == _bytes(found.folder)


def _lenient(embeddings: np.ndarray, known: samples.Known) -> samples.Verdicts:
    return samples.accepted(embeddings, known)._replace(verdict=np.full(len(embeddings), samples.ACCEPTED, object))


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_generator_that_learned_nothing_is_not_used(made: Any, job: Make) -> None:
    own = job("augment")
    found = stage.generated(*made, POLICY, SMALL, own)
    assert found is not None
    assert not list(found.folder.glob("[0-9]*.png"))
    assert len(found.evidence) == 2
    assert found.evidence[1]["verdict"] in ("collapsed", "too few to use")
    assert any("none are used" in note or "they are not used" in note for note in own.notes)


def test_minutes_become_steps_once(made: Any, job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    own, settings = job("augment"), Generate(generate_minutes=0.02, generate_side=32)
    steps = stage._training_steps(settings, 32, 40, own)
    assert steps >= 1
    monkeypatch.setattr(stage, "TRAINING", 1000.0)
    assert stage._training_steps(settings, 32, 40, own) == steps
    assert stage._training_steps(Generate(generate_minutes=5.0, generate_steps=3), 32, 40, own) == 3


def test_too_few_items_are_refused_with_the_remedy(made: Any, job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "FEWEST", 1000)
    with pytest.raises(
        DataError, match=r"generate: \d+ kept training items .* at least 1000 and 1; add items, or leave out --generate-minutes"
    ):
        stage.generated(*made, POLICY, SMALL, job())


def test_settings_out_of_range_are_all_named() -> None:
    given = {"data": "x", "generate_minutes": 0, "generate_steps": 0, "generate_side": 48, "generate_count": 0}
    with pytest.raises(UsageError) as raised:
        build_config(given)
    for text in (
        "generate_minutes: 0.0; expected above 0",
        "generate_steps: 0; expected at least 1",
        "generate_side: 48; expected 32, 64 or 128",
        "generate_count: 0; expected 1 to 10000",
    ):
        assert text in str(raised.value)


@pytest.mark.parametrize(("shorter", "size", "side"), [(28, (32, 32), 32), (40, (40, 40), 64), (500, (224, 224), 128), (16, (16, 16), 32)])
def test_the_side_is_what_items_and_encoder_have(items: Items, shorter: int, size: tuple[int, int], side: int) -> None:
    width = items.table.column_names.index("width")
    table = items.table.set_column(width, "width", [np.full(len(items), shorter, np.int32)])
    height = table.column_names.index("height")
    table = table.set_column(height, "height", [np.full(len(items), shorter + 10, np.int32)])
    assert stage.fitting_side(Items(root="", table=table, quarantine=items.quarantine), Preprocess(size=size)) == side


def test_steps_of_the_check_follow_from_its_compute(monkeypatch: pytest.MonkeyPatch, job: Make) -> None:
    lessons = _lessons(_images(8), _images(4))
    steps = benefit.check_steps(Generate(generate_steps=5), lessons, job())
    assert 20 <= steps <= 400
    monkeypatch.setattr(benefit, "COMPUTE", 1.0)
    assert benefit.check_steps(Generate(generate_steps=5), lessons, job()) == 20
    asked = Generate(generate_minutes=0.01)
    fitting = benefit.check_steps(asked, lessons, job())
    assert fitting >= 20
    monkeypatch.setattr(benefit, "CHECKING", 1e9)
    assert benefit.check_steps(asked, lessons, job()) == fitting  # fixed once
