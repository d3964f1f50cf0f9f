"""The stop advisor: the best validation, patience, and what is said of real curves (see curves/record.py)."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.training.curve_shape import judge, noise_of, smooth, thinned, value_at
from library.training.watch import Verdict, Watch

CURVES = Path(__file__).with_name("curves")
SAVES = [(step, f"cat-{step // 160:06d}.safetensors") for step in range(160, 1601, 160)]
LOSSES = st.floats(1e-4, 10)


def replay(name: str, patience: int | None = None, *, validated: bool = True, until: int | None = None) -> Watch:
    """A watch that followed a recorded training."""
    curve = json.loads((CURVES / f"{name}.json").read_text(encoding="utf-8"))
    watch, held_out = Watch(patience), dict(curve["validation"]) if validated else {}
    if 0 in held_out:
        watch.validated(0, held_out[0])
    for step, loss in enumerate(curve["training"][:until], 1):
        watch.trained(step, loss)
        if step in held_out and watch.validated(step, held_out[step]).stop:
            break
    return watch


def test_a_plateau() -> None:
    said = replay("plateau").advice(SAVES)
    assert said[0].startswith("validation loss: from 0.2925 to its lowest, 0.20")
    assert "it has been flat since about step 680: more steps bring little" in said[1]
    assert "try first: cat-000009.safetensors (step 1440" in said[2] and "cat-000004.safetensors (step 640" in said[2]
    assert len(said) == 3


def test_the_lowest_loss_is_the_measured_one_wherever_it_is_told() -> None:
    watch = replay("plateau")
    assert watch.best is not None
    step, loss = watch.best
    told, *_, tries = watch.advice([(step, "cat-best.safetensors"), (step + 1, "cat.safetensors")])
    assert told.endswith(f" to its lowest, {loss:.4f}, at step {step}")
    assert tries.startswith(f"try first: cat-best.safetensors (step {step}, {loss:.4f}), cat.safetensors (")
    assert f"(step {step + 1}, about " in tries


def test_pictures_learned_by_heart() -> None:
    said = " / ".join(replay("overfit").advice(SAVES))
    assert "it went flat at about step 120" in said
    assert "it began to rise at about step 400 and ended at 0.3" in said and "learned by heart" in said
    assert "try first: cat-000001.safetensors (step 160" in said
    assert "learning rate is probably too high" not in said


def test_a_run_that_diverged() -> None:
    said = replay("diverged").advice(SAVES)
    assert said[0].startswith("the loss was no number at step 1228: the run diverged; the learning rate is")
    assert "it rose suddenly after step 880" in said[2] and "half or a third" in said[2]
    assert said[3] == "before that it had begun to rise at about step 320"
    assert "try first: cat-000002.safetensors (step 320" in said[4]
    before = " / ".join(replay("diverged", until=1200).advice(SAVES))
    assert "rose suddenly" in before and "no number" not in before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("plateau", "the training loss seems to have been flat since about step 800"),
        ("overfit", "the training loss seems to have been flat since about step 720"),
        ("diverged", "the training loss rose suddenly after step 1088"),
    ],
)
def test_without_held_out_pictures_less_is_claimed(name: str, words: str) -> None:
    said = replay(name, validated=False).advice(SAVES)
    assert any(line.startswith(words) for line in said)
    assert said[-1] == "only held-out pictures show where learning by heart begins: see --validation_split"
    assert not any("try first: " in line or "began to rise" in line for line in said)


def test_noise_of_single_steps_is_no_verdict_on_a_few_vectors() -> None:
    watch = Watch(None)
    for step, loss in enumerate(np.random.default_rng(4).normal(0.1, 0.05, 400), 1):
        watch.trained(step, float(loss))
    assert "shows no trend beyond its noise" in watch.advice(SAVES)[0]
    (line,) = watch.advice(SAVES, only_vectors=True)
    assert "says little about a few vectors: compare previews" in line and "--validation_split" in line
    for name in ("plateau", "diverged"):
        seen = replay(name, validated=False)
        assert seen.advice(SAVES, only_vectors=True) == seen.advice(SAVES)


def test_patience_stops_the_recorded_runs() -> None:
    overfit = replay("overfit", patience=5)
    assert overfit.best is not None and overfit.state()["validations"][-1][0] == overfit.best[0] + 5 * 40
    assert overfit.state()["validations"][-1][0] < 800
    diverged = replay("diverged", patience=5)
    assert diverged.state()["broken"] is None


def test_still_falling_and_no_change() -> None:
    watch = Watch(None)
    for step in range(0, 1001, 50):
        watch.validated(step, 0.2 - step / 10000)
    assert watch.advice([])[-1] == "it was still falling at the end: more steps may help"
    watch = Watch(None)
    for step in range(0, 1001, 50):
        watch.validated(step, 0.2 + (step % 100) / 1e6)
    said = watch.advice([])
    assert "never noticeably lower than that of the base model, 0.2000" in said[0] and "higher learning rate" in said[1]


def test_few_validations_are_no_curve() -> None:
    watch = Watch(2)
    assert watch.advice([]) == []
    for step, loss in ((0, 0.3), (10, 0.2), (20, 0.25)):
        watch.validated(step, loss)
        watch.trained(step + 1, loss)
    assert watch.advice(SAVES) == ["2 validations are too few for a curve; the lowest loss was 0.2000, at step 10"]


def test_the_untrained_model_is_compared_with_but_never_the_best() -> None:
    watch = Watch(2)
    assert watch.validated(0, 0.1) == Verdict(False, False)
    assert [watch.validated(step, loss) for step, loss in ((1, 0.3), (2, 0.3), (3, 0.2), (4, 0.4), (5, 0.2))] == [
        Verdict(True, False),
        Verdict(False, False),
        Verdict(True, False),
        Verdict(False, False),
        Verdict(False, True),
    ]
    assert watch.best == (3, 0.2)


def test_a_step_counts_once_though_it_is_looked_at_again() -> None:
    watch = Watch(1)
    assert not watch.knows(0)
    watch.validated(0, math.nan)
    assert watch.knows(0) and not watch.knows(5)
    assert [watch.validated(step, loss) for step, loss in ((5, 0.3), (6, math.nan))] == [
        Verdict(True, False),
        Verdict(False, True),
    ]
    state = watch.state()
    assert Watch(1, state).knows(6) and not Watch(1, state).knows(7)
    assert watch.validated(5, 0.3) == Verdict(True, True)
    assert watch.validated(6, 0.4) == Verdict(False, True)
    assert watch.state() == state


@given(losses=st.lists(LOSSES | st.just(math.nan) | st.just(math.inf), max_size=30), patience=st.integers(1, 5))
def test_patience_counts_validations_since_the_best(losses: list[float], patience: int) -> None:
    watch, best, since = Watch(patience), math.inf, 0
    for step, loss in enumerate(losses, 1):
        better = loss < best
        best, since = (loss, 0) if better else (best, since + 1)
        assert watch.validated(step, loss) == Verdict(better, since >= patience)
    Watch(None, json.loads(json.dumps(watch.state(), allow_nan=False)))


@given(losses=st.lists(LOSSES, min_size=1, max_size=300))
def test_the_smoothed_loss_is_a_weighted_mean(losses: list[float]) -> None:
    watch = Watch(None)
    assert math.isnan(watch.smoothed)
    for step, loss in enumerate(losses, 1):
        watch.trained(step, loss)
    weights = np.float64(0.98) ** np.arange(len(losses))[::-1]
    assert watch.smoothed == pytest.approx(np.average(losses, weights=weights), rel=1e-9)


@pytest.mark.parametrize("name", ["plateau", "overfit", "diverged"])
@pytest.mark.parametrize("cut", [1, 599, 1100, 1300])
def test_a_restored_watch_goes_on_as_if_nothing_had_happened(name: str, cut: int) -> None:
    curve = json.loads((CURVES / f"{name}.json").read_text(encoding="utf-8"))
    held_out = dict(curve["validation"])
    whole, parts = Watch(7), Watch(7)
    for step, loss in enumerate(curve["training"], 1):
        for watch in (whole, parts):
            watch.trained(step, loss)
        if step in held_out:
            assert whole.validated(step, held_out[step]) == parts.validated(step, held_out[step])
        if step == cut:
            parts = Watch(7, json.loads(json.dumps(parts.state(), allow_nan=False)))
    assert whole.state() == parts.state()
    assert whole.smoothed == parts.smoothed
    assert whole.advice(SAVES) == parts.advice(SAVES)


def test_a_long_run_is_kept_in_little_room() -> None:
    watch = Watch(None)
    for step in range(1, 40_001):
        watch.trained(step, 0.1 + 0.1 * math.exp(-step / 4000) + 0.01 * math.sin(step))
    assert len(json.dumps(watch.state())) < 30_000
    (flat,) = [line for line in watch.advice([(40_000, "last")]) if "flat" in line]
    at = int(flat.split("since about step ")[1].split(",")[0])
    assert 6_000 < at < 20_000


Curve = Sequence[tuple[int, float]]


def noisy(shape: Sequence[float], noise: float, seed: int) -> Curve:
    draws = np.random.default_rng(seed).standard_normal(len(shape))
    return [(10 * i, float(value + noise * draw)) for i, (value, draw) in enumerate(zip(shape, draws, strict=True))]


def falling(count: int) -> list[float]:
    return [0.1 + 0.03 * math.exp(-10 * i / count) for i in range(count)]


@pytest.mark.parametrize("count", [8, 20, 45])
def test_known_shapes_are_seen_through_noise(count: int) -> None:
    """Of 100 draws of the noise, nearly all are judged right."""
    over = [loss + 0.05 * max(0.0, i / count - 0.4) for i, loss in enumerate(falling(count))]
    jump = [loss + 0.08 * (i >= 0.6 * count) for i, loss in enumerate(falling(count))]
    flats = [judge(noisy(falling(count), 0.002, seed)) for seed in range(100)]
    overs = [judge(noisy(over, 0.001, seed)) for seed in range(100)]
    jumps = [judge(noisy(jump, 0.002, seed)) for seed in range(100)]
    assert sum(one.flat_from is not None and one.rises_from is None and one.jumps_at is None for one in flats) >= 90
    rises = [one.rises_from for one in overs if one.rises_from is not None and one.jumps_at is None]
    assert len(rises) >= 90
    assert 0.2 < float(np.median(rises)) / (10 * count) < 0.6
    edge = 10 * (math.ceil(0.6 * count) - 1)
    assert sum(one.jumps_at == edge and one.ends_above_start for one in jumps) >= 90


@given(
    losses=st.lists(LOSSES, min_size=1, max_size=60),
    factor=st.sampled_from([0.25, 2.0, 8.0]),
    shift=st.integers(0, 10**6),
)
def test_units_and_places_do_not_matter(losses: list[float], factor: float, shift: int) -> None:
    plain = judge(list(enumerate(losses)))
    other = judge([(step + shift, loss * factor) for step, loss in enumerate(losses)])
    assert other.best == plain.best * factor
    for name in ("flat_from", "rises_from", "jumps_at"):
        here, there = getattr(plain, name), getattr(other, name)
        assert there == (None if here is None else here + shift)
    assert plain.jumps_at is None or plain.rises_from is None


@given(start=LOSSES, steps=st.lists(st.floats(0, 1), min_size=4, max_size=60))
def test_a_curve_that_never_rises_is_never_said_to_rise(start: float, steps: list[float]) -> None:
    losses = [start + sum(steps[i:]) for i in range(len(steps))]
    shape = judge(list(enumerate(losses)))
    assert shape.rises_from is None and shape.jumps_at is None


def test_the_parts_of_judging() -> None:
    assert smooth([0.0, 0.0, 4.0, 0.0, 0.0], 1) == [0.0, 1.0, 2.0, 1.0, 0.0]
    noise = np.random.default_rng(1).normal(0, 0.3, 4000) + np.linspace(0, 50, 4000)
    assert noise_of(noise.tolist()) == pytest.approx(0.3, rel=0.05)
    points = [(10, 1.0), (20, 3.0), (40, 2.0)]
    assert [value_at(points, step) for step in (0, 10, 15, 30, 40, 99)] == [1.0, 1.0, 2.0, 2.5, 2.0, 2.0]
    assert thinned([(step, float(step)) for step in range(1, 8)], 3) == [(3, 2.0), (6, 5.0), (7, 7.0)]
