"""Which captions are known before a run starts, and what becomes of the rest."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from library.data.caption_plan import TextUse, forecast, plan_captions
from library.data.captions import Progress, possible, process
from library.data.loader import Loader
from library.data.plan import Plan, build_plan
from library.data.sources import scan as sources
from library.options.specs import CaptionSpec, DatasetSpec, SubsetSpec

MakePicture = Callable[..., Path]
MakeSpec = Callable[..., DatasetSpec]
KIB = 2**10

texts = st.lists(
    st.sampled_from(["a", "b", "cat", ",", ", ", " ", "|||", ";", "{a|b}", "{a|a}", "{{a|b}}", "{c}", "\n"]), max_size=7
).map("".join)
specs = st.builds(
    CaptionSpec,
    prefix=st.sampled_from([None, "pre", "{x|y},"]),
    suffix=st.sampled_from([None, "end"]),
    dropout_rate=st.sampled_from([0.0, 0.0, 0.5, 1.0]),
    dropout_every_n_epochs=st.sampled_from([0, 0, 1, 2]),
    tag_dropout_rate=st.sampled_from([0.0, 0.0, 0.5, 1.0]),
    keep_tokens=st.integers(0, 2),
    keep_tokens_separator=st.sampled_from(["", "|||"]),
    secondary_separator=st.sampled_from([None, ";"]),
    wildcards=st.booleans(),
    shuffle=st.booleans(),
    warmup_min=st.integers(0, 2),
    warmup_step=st.sampled_from([0.0, 0.0, 0.1, 0.5, 3.0]),
    templates=st.sampled_from([(), (), ("a {}",), ("a {}", "a {}"), ("a {}", "{} b")]),
    subject=st.sampled_from(["", "sks"]),
    keep_original=st.booleans(),
)


@examples(deadline=None, max_examples=300)
@given(texts, specs, st.sampled_from([None, 0, 4, 20]))
def test_what_is_known_ahead_is_exactly_what_is_made(text: str, spec: CaptionSpec, total: int | None) -> None:
    made = {
        process(text, spec, seed=seed, epoch=epoch, key="k", repeat=repeat, progress=progress)
        for seed in range(6)
        for epoch in (1, 2)
        for repeat in range(4)
        for progress in ([Progress(step, total) for step in (0, total - 1)] if total else [None])
    }
    known = possible(text, spec, total=total)
    if known is None:
        warms = spec.warmup_step and total != 0
        assert spec.shuffle or spec.wildcards or spec.tag_dropout_rate or warms or len(spec.templates) > 1
    else:
        assert made == set(known)
        assert len(known) == len(set(known)) <= 2


@pytest.mark.parametrize(
    ("text", "spec", "known"),
    [
        ("a, b", CaptionSpec(), ("a, b",)),
        ("a, b", CaptionSpec(prefix="x", suffix="y"), ("x a, b y",)),
        ("a, b", CaptionSpec(dropout_rate=0.1), ("a, b", "")),
        ("a, b", CaptionSpec(dropout_every_n_epochs=3, shuffle=True, keep_tokens=1), ("a, b", "")),
        ("a, b", CaptionSpec(dropout_rate=1.0), ("",)),
        ("a, b", CaptionSpec(shuffle=True), None),
        ("a", CaptionSpec(shuffle=True), ("a",)),
        ("a, b", CaptionSpec(tag_dropout_rate=0.1, keep_tokens=2), ("a, b",)),
        ("a, b", CaptionSpec(tag_dropout_rate=0.1), None),
        ("a {b|c}", CaptionSpec(wildcards=True), None),
        ("a {b|c}", CaptionSpec(), ("a {b|c}",)),
        ("a {{b|c}}", CaptionSpec(wildcards=True), ("a {b|c}",)),
        ("a\nb", CaptionSpec(wildcards=True), None),
        ("a\nb", CaptionSpec(), ("a",)),
        ("a, b", CaptionSpec(templates=("x {}",)), ("x a, b",)),
        ("a, b", CaptionSpec(templates=("x {}", "x {}")), ("x a, b",)),
        ("a, b", CaptionSpec(templates=("x {}", "y {}")), None),
        ("", CaptionSpec(templates=("x {}", "y {}")), ("",)),
        ("a, b", CaptionSpec(templates=("x {}",), subject="s", shuffle=True), ("x s",)),
        ("a, b", CaptionSpec(templates=("x {}",), subject="s", shuffle=True, keep_original=True), None),
        ("a, b", CaptionSpec(templates=("x {}",), subject="s", dropout_rate=0.1), ("x s", "")),
        ("a, b", CaptionSpec(templates=("x {}", "y {}"), dropout_rate=1.0), ("",)),
        ("a,b", CaptionSpec(warmup_step=10), None),
        ("a,b", CaptionSpec(warmup_step=10, warmup_min=2), ("a, b",)),
        ("a,b", CaptionSpec(warmup_step=10, keep_tokens=1), ("a, b",)),
        ("a,b", CaptionSpec(warmup_step=10, tag_dropout_rate=1.0), ("",)),
    ],
)
def test_captions_that_vary_and_those_that_do_not(text: str, spec: CaptionSpec, known: tuple[str, ...] | None) -> None:
    assert possible(text, spec) == known


@pytest.mark.parametrize(("total", "known"), [(None, None), (0, ("a, b",)), (9, ("a, b",)), (10, None)])
def test_a_warmup_that_is_over_at_the_start_varies_nothing(total: int | None, known: tuple[str, ...] | None) -> None:
    assert possible("a, b", CaptionSpec(warmup_step=0.1), total=total) == known
    assert possible("a, b", CaptionSpec(warmup_step=10), total=0) == ("a, b",), "steps that aren't counted"


@pytest.fixture
def plan(tmp_path: Path, make_picture: Callable[..., Path], make_spec: Callable[..., DatasetSpec]) -> Plan:
    """Six pictures whose tags are shuffled, three (two captions) that may be dropped, one that never changes."""
    for i in range(6):
        make_picture(tmp_path / "shuffled" / f"p{i}.png", caption=f"cat, {i}, red, blue")
    for i, text in enumerate(["a dog", "a dog", "a wolf"]):
        make_picture(tmp_path / "dropped" / f"d{i}.png", caption=text)
    make_picture(tmp_path / "plain" / "p.png", caption="an animal")
    folders = {"shuffled": CaptionSpec(shuffle=True), "dropped": CaptionSpec(dropout_rate=0.3), "plain": CaptionSpec()}
    subsets = [
        SubsetSpec(tmp_path / name, num_repeats=3, caption_extension=".txt", caption=caption)
        for name, caption in folders.items()
    ]
    spec = make_spec(*subsets)
    return build_plan([spec], sources.scan([spec]).records, 8, 1)


def test_a_plan_is_sorted_into_known_and_varying(plan: Plan) -> None:
    captions = plan_captions(plan)
    assert captions.known == ("a dog", "a wolf", "an animal", "")
    assert [path.name for path, _ in captions.fixed] == ["d0.png", "d1.png", "d2.png", "p.png"]
    assert len(captions.varying) == 6


@pytest.mark.parametrize("epoch", [1, 2, 5])
def test_an_epoch_s_captions_are_those_of_the_loader(plan: Plan, epoch: int) -> None:
    loaded = {caption for batch in Loader(plan, seed=4).epoch(epoch) for caption in batch.captions}
    found = plan_captions(plan).of_epoch(4, epoch)
    assert len(found) == len(set(found))
    assert set(found) == loaded


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_an_epoch_s_captions_go_by_the_step(
    tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec, epoch: int
) -> None:
    for i in range(5):
        make_picture(tmp_path / f"{i}.png", caption=f"{i}, a, b, c, d")
    spec = make_spec(
        tmp_path, num_repeats=3, batch_size=2, caption=CaptionSpec(warmup_step=0.6, warmup_min=0, keep_tokens=1)
    )
    plan = build_plan([spec], sources.scan([spec]).records, 8, 1)
    assert plan.batches_per_epoch == 8
    loader = Loader(plan, seed=4, accumulation=3, total_steps=9)
    loaded = {caption for batch in loader.epoch(epoch) for caption in batch.captions}
    captions = plan_captions(plan, total_steps=9)
    found = captions.of_epoch(4, epoch, accumulation=3, total_steps=9)
    assert set(found) == loaded
    assert len(captions.varying) == 5
    lengths = {len(caption.split(", ")) for caption in found}
    assert lengths == {1: {1, 2}, 2: {3, 4, 5}, 3: {5}}[epoch]
    after = plan_captions(plan, total_steps=1)
    assert (len(after.varying), set(after.known)) == (0, {f"{i}, a, b, c, d" for i in range(5)})
    use = TextUse(KIB, 0, ahead=True)
    assert not forecast(captions, use, seed=4, accumulation=3, total_steps=9).frees_encoders
    assert forecast(after, use, seed=4, total_steps=1).frees_encoders


def test_templates_go_through_the_memo(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    make_picture(tmp_path / "a.png", caption="one")
    two = make_spec(tmp_path, num_repeats=40, caption=CaptionSpec(templates=("{} here", "{} there")))
    found = forecast(plan_captions(build_plan([two], sources.scan([two]).records, 8, 1)), TextUse(KIB, KIB), seed=1)
    assert set(found.memo) == {"one here", "one there"}
    assert not found.all_known
    one = make_spec(tmp_path, num_repeats=40, caption=CaptionSpec(templates=("{} here",), subject="s", shuffle=True))
    captions = plan_captions(build_plan([one], sources.scan([one]).records, 8, 1))
    assert captions.known == ("s here",)
    assert forecast(captions, TextUse(KIB, 0, ahead=True), seed=1).line().endswith("the text encoders are released")


def test_what_becomes_of_captions(plan: Plan) -> None:
    captions = plan_captions(plan)
    everything = set(captions.of_epoch(4, 1))
    memo = forecast(captions, TextUse(4 * KIB, 4 * KIB * len(everything)), seed=4)
    assert (set(memo.memo), memo.kept, memo.fits, memo.frees_encoders) == (everything, (), True, False)
    assert f"{len(everything)} captions of epoch 1 encoded when first needed" in memo.line()
    assert "where all fit" in memo.line()
    small = forecast(captions, TextUse(4 * KIB, 4 * KIB * len(everything) - 1), seed=4)
    assert not small.fits
    assert f"need {4 * len(everything)} KiB, more than the memo" in small.line()
    ahead = forecast(captions, TextUse(4 * KIB, 2**20, ahead=True), seed=4)
    assert ahead.kept == captions.known
    assert set(ahead.memo) == everything - set(captions.known)
    assert not ahead.frees_encoders
    assert ahead.line().startswith("text: 4 captions encoded before training, kept in memory; ")
    assert "that vary encoded when first needed" in ahead.line()
    trained = forecast(captions, TextUse(4 * KIB, 2**20, trains=True), seed=4)
    assert (trained.memo, trained.kept) == ((), ())
    assert "every step" in trained.line()


def test_text_encoders_go_when_nothing_varies(tmp_path: Path, make_picture: MakePicture, make_spec: MakeSpec) -> None:
    make_picture(tmp_path / "a.png", caption="one")
    make_picture(tmp_path / "b.png", caption="two")
    spec = make_spec(tmp_path, caption=CaptionSpec(dropout_every_n_epochs=2))
    captions = plan_captions(build_plan([spec], sources.scan([spec]).records, 8, 1))
    found = forecast(captions, TextUse(KIB, 0, ahead=True, to_disk=True), seed=1)
    assert found.frees_encoders
    assert found.line() == (
        "text: 3 captions encoded before training, kept in files beside the pictures; "
        "then the text encoders are released"
    )
    assert not forecast(captions, TextUse(KIB, 0), seed=1).frees_encoders
