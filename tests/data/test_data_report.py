"""What a dry run shows, and how soon."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from library.data import report
from library.data.caption_plan import TextUse
from library.data.plan import Plan, build_plan
from library.data.records import ImageRecord
from library.data.sources import scan as sources
from library.data.token_counts import count_tokens
from library.options.specs import AspectBuckets, CaptionSpec, DatasetSpec, SubsetSpec
from library.tokenizer import END_ID, clip_tokenizer

MakePicture = Callable[..., Path]


@pytest.fixture
def scanned(tmp_path: Path, make_picture: Callable[..., Path], make_spec: Callable) -> Callable:
    """Pictures of two sizes, one with a long caption, one with markup in it."""
    long = "a cat, " + ", ".join(f"word{i}" for i in range(60))
    for i, text in enumerate(["a red cat", "[bold]brackets[/bold] cat", long, None]):
        make_picture(tmp_path / "5_cat" / f"p{i}.png", (300, 100) if i == 0 else (64, 64), caption=text)

    def make(**how: Any) -> tuple[sources.Scan, Plan]:
        specs = [make_spec(tmp_path / "5_cat", num_repeats=5, class_tokens="cat", **how)]
        found = sources.survey(specs)
        return found, build_plan(specs, found.records, 8, 1)

    return make


def test_tables(scanned: Callable[..., tuple[sources.Scan, Plan]], capsys: pytest.CaptureFixture[str]) -> None:
    found, plan = scanned()
    report.show_data(found, plan, seed=1, token_limit=75)
    report.steps_table(
        samples=20, batches=10, accumulation=2, updates_per_epoch=5, epochs=3, steps=15, global_batch="2 x 1"
    )
    report.saves_table([("weights", "every 2 epochs", "cat-000002.safetensors")])
    report.network_table(
        [report.NetworkRow("U-Net", 192, "8 (4.0)", 1234567, 2.5 * 2**20), report.NetworkRow("foreign")]
    )
    said = capsys.readouterr().out
    for piece in (
        "5_cat",
        "[bold]brackets[/bold] cat",
        "96x32",
        "64x64",
        "p0.png",
        "every 2 epochs",
        "1,234,567",
        "2.5 MiB",
    ):
        assert piece in said, piece
    cells = [[cell.strip() for cell in line.split("│")] for line in said.splitlines()]
    pictures = next(row for row in cells if len(row) > 2 and row[1].endswith("5_cat"))
    assert pictures[2:6] == ["4", "3", "0", "20"]
    wide = next(row for row in cells if "96x32" in row)
    assert wide[2:6] == ["1", "5", "3", "0"]
    assert wide[6] == f"{plan.fits[0].cropped:.1%}"


def test_unreadable_pictures_are_shown(
    scanned: Callable[..., tuple[sources.Scan, Plan]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "5_cat" / "bad.png").write_text("text")
    found, _ = scanned()
    report.pictures_table(found)
    said = capsys.readouterr().out
    assert "bad.png: not a picture" in said.replace("\n", "")
    assert "│     5 │         3 │          1 │" in said


def test_token_counts_and_cut_words(scanned: Callable[..., tuple[sources.Scan, Plan]]) -> None:
    _, plan = scanned()
    counts = count_tokens(plan, seed=1, limit=75)
    assert (counts.minimum, counts.median) == (1, 6.0)
    assert counts.maximum == len(clip_tokenizer().encode(plan.records[2].caption, add_special_tokens=False).ids) > 75
    assert counts.over_chunk == 1
    (cut,) = counts.cut
    assert cut.picture == "p2.png"
    assert cut.tokens == counts.maximum
    assert cut.cut.endswith("word58, word59")
    assert "word1," not in cut.cut
    assert count_tokens(plan, seed=1, limit=counts.maximum).cut == ()


def test_tokens_of_weighted_captions_are_those_of_their_pieces(
    scanned: Callable[..., tuple[sources.Scan, Plan]],
) -> None:
    """The signs of weights are no words, and a piece starts a word of its own."""

    def fragments(text: str) -> list[tuple[str, float]]:
        middle = len(text) // 2
        return [(text[:middle], 1.0), (text[middle:], 1.2)] if text else []

    def tokens(text: str) -> int:
        return sum(len(clip_tokenizer().encode(piece, add_special_tokens=False).ids) for piece, _ in fragments(text))

    _, plan = scanned()
    long = plan.records[2].caption
    counts = count_tokens(plan, seed=1, limit=75, fragments=fragments)
    assert counts.maximum == tokens(long)
    for limit in (0, 5, 75, tokens(long) - 1):
        cut = {one.picture: one for one in count_tokens(plan, seed=1, limit=limit, fragments=fragments).cut}
        assert cut["p2.png"].tokens == tokens(long)
        assert long.endswith(cut["p2.png"].cut)
        assert (
            0
            <= tokens(long) - limit - len(clip_tokenizer().encode(cut["p2.png"].cut, add_special_tokens=False).ids)
            <= 1
        )
    assert count_tokens(plan, seed=1, limit=75, fragments=lambda _: []).maximum == 0


@pytest.mark.parametrize(
    ("use", "row", "line"),
    [
        (TextUse(2**20, 2**22), ["4", "0", "4", "1.0 MiB", "4.0 MiB", "4.0 MiB", "yes"], "where all fit"),
        (TextUse(2**20, 2**20), ["4", "0", "4", "1.0 MiB", "4.0 MiB", "1.0 MiB", "no"], "some are encoded again"),
        (TextUse(2**20, 0, trains=True), ["4", "0", "0", "1.0 MiB", "-", "-", "-"], "or new tokens are trained"),
        (TextUse(2**20, 0, ahead=True), ["4", "4", "0", "1.0 MiB", "0 KiB", "0 KiB", "yes"], "are released"),
    ],
)
def test_text_of_an_epoch(
    scanned: Callable[..., tuple[sources.Scan, Plan]],
    capsys: pytest.CaptureFixture[str],
    use: TextUse,
    row: list[str],
    line: str,
) -> None:
    found, plan = scanned()
    report.show_data(found, plan, seed=1, token_limit=75, text=use)
    said = capsys.readouterr().out
    cells = [[cell.strip() for cell in text.split("│")[1:-1]] for text in said.splitlines()]
    assert row in cells, said
    assert line in said


def test_dropout_does_not_hide_tokens(scanned: Callable[..., tuple[sources.Scan, Plan]]) -> None:
    plain = count_tokens(scanned()[1], seed=1, limit=75)
    dropped = count_tokens(scanned(caption=CaptionSpec(dropout_rate=1.0))[1], seed=1, limit=75)
    assert plain == dropped


def table(said: str, title: str) -> list[list[str]]:
    """The rows of a table by its title, as cells; what was wrapped is put together again."""
    lines = said.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(title)) + 2
    end = next(i for i in range(start, len(lines)) if lines[i].startswith("└"))
    cells = [re.split("[│┃]", line)[1:-1] for line in lines[start:end] if line[0] in "│┃"]
    rows: list[list[str]] = []
    for row in cells:
        stripped = [cell.strip() for cell in row]
        if rows and stripped.count("") > len(row) / 2:
            rows[-1] = [above + below for above, below in zip(rows[-1], stripped, strict=True)]
        else:
            rows.append(stripped)
    return rows


def test_several_datasets_can_be_told_apart(
    tmp_path: Path, make_picture: MakePicture, make_spec: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    make_picture(tmp_path / "3_dog" / "a.png", (64, 64), caption="a dog")
    subset = SubsetSpec(tmp_path / "3_dog", 3, caption_extension=".txt", alpha_mask=True)
    aspects = AspectBuckets(96, 64, 128, 32)
    specs = [make_spec(subset), make_spec(subset, resolution=(128, 96)), make_spec(subset, aspect_buckets=aspects)]
    found = sources.survey(specs)
    report.show_data(found, build_plan(specs, found.records, 8, 1), seed=1, token_limit=75)
    said = capsys.readouterr().out
    names = ["1: 64x64", "2: 128x96", "3: 96x96"]
    pictures = table(said, "Pictures")
    assert pictures[0] == ["dataset", "folder", "found", "captioned", "unreadable", "samples/epoch", "note"]
    assert [row[0] for row in pictures[1:]] == [*names, "all"]
    assert pictures[1][-1] == "alpha channels are masks"
    assert [row[0] for row in table(said, "Caption examples")] == ["dataset", *names]
    assert [row[:3] for row in table(said, "Buckets")] == [
        ["dataset", "bucket", "pictures"],
        ["1: 64x64", "64x64", "1"],
        ["2: 128x96", "96x96", "1"],
        ["3: 96x96", "96x96", "1"],
    ]
    report.pictures_table(found)
    assert [row[0] for row in table(capsys.readouterr().out, "Pictures")] == ["dataset", "1", "2", "3", "all"]


def test_masks_and_held_out_pictures_are_counted(
    tmp_path: Path, make_picture: MakePicture, make_spec: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(8):
        make_picture(tmp_path / "1_x" / f"{i}.png", caption="x")
        make_picture(tmp_path / "masks" / f"{i}.png")
    spec = make_spec(
        SubsetSpec(tmp_path / "1_x", caption_extension=".txt", mask_dir=tmp_path / "masks", validation_split=0.25),
        SubsetSpec(make_picture(tmp_path / "1_y" / "y.png").parent, caption_extension=".txt", class_tokens="y"),
    )
    found = sources.survey([spec])
    assert len(found.held_out) == 2
    report.pictures_table(found, [spec])
    rows = table(capsys.readouterr().out, "Pictures")
    assert rows[0] == ["folder", "found", "captioned", "masks", "held out", "unreadable", "samples/epoch", "note"]
    assert [row[1:7] for row in rows[1:]] == [
        ["8", "8", "8", "2", "0", "6"],
        ["1", "0", "0", "0", "0", "1"],
        ["9", "8", "8", "2", "0", "7"],
    ]


def test_other_sources_are_named(
    tmp_path: Path, make_picture: MakePicture, make_spec: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    make_picture(tmp_path / "a.png")
    listing = tmp_path / "listing.jsonl"
    listing.write_text('{"image": "a.png", "text": "a cat"}\n')
    spec = make_spec(SubsetSpec(tmp_path, metadata_file=listing, source="jsonl"))
    found = sources.survey([spec])
    report.pictures_table(found, [spec])
    said = table(capsys.readouterr().out, "Pictures")[1][0]
    assert said.endswith("listing.jsonl")


def cropped_plan(folder: Path, make_spec: Callable, widths: list[int]) -> Plan:
    """Pictures 64 high of these widths, which all become 64x64."""
    spec = make_spec(folder, enable_bucket=False)
    sizes = {f"w{width:03d}.png": (width, 64) for width in widths}
    records = [ImageRecord(folder, key, size, 1, "x", True, 0, 0, 1, False) for key, size in sizes.items()]
    return build_plan([spec], records, 8, 1)


def test_pictures_that_lose_much_are_named(
    tmp_path: Path, make_spec: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = cropped_plan(tmp_path, make_spec, [64, 80, 128, 256])
    assert report.cropped_too_much(plan, 0.5) == [
        f"{tmp_path}/w256.png: 75.0% is cropped away (256x64 into 64x64), more than 0.5 (max_crop_loss)"
    ], "a picture that loses just the limit is none"
    assert [name[-8:] for name in (line.split(":")[0] for line in report.cropped_too_much(plan, 0))] == [
        "w256.png", "w128.png", "w080.png",
    ]  # fmt: skip
    assert report.cropped_too_much(plan, 0.75) == []
    report.crops_table(plan)
    rows = table(capsys.readouterr().out, "Most cropped pictures")
    assert rows[1:] == [
        ["w256.png", "256x64", "64x64", "75.0%"],
        ["w128.png", "128x64", "64x64", "50.0%"],
        ["w080.png", "80x64", "64x64", "20.0%"],
    ]
    report.crops_table(cropped_plan(tmp_path, make_spec, [64]))
    assert capsys.readouterr().out == ""


def test_no_more_than_ten_cropped_pictures_are_named(tmp_path: Path, make_spec: Callable) -> None:
    lines = report.cropped_too_much(cropped_plan(tmp_path, make_spec, list(range(80, 93))), 0.1)
    assert len(lines) == 11
    assert "w092.png" in lines[0]
    assert lines[-1] == "3 more pictures lose more than 0.1 (max_crop_loss)"


def test_captions_that_grow_with_the_steps(
    scanned: Callable[..., tuple[sources.Scan, Plan]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens and examples are those after the warmup; the captions of the first epoch go by its steps."""
    found, plan = scanned(caption=CaptionSpec(warmup_step=8.0, warmup_min=1))
    counts = count_tokens(plan, seed=1, limit=75)
    assert counts.maximum > 75
    report.show_data(found, plan, seed=1, token_limit=75, text=TextUse(2**10, 2**20), accumulation=1, total_steps=10)
    said = capsys.readouterr().out
    assert "Caption examples of epoch 1, token warmup aside" in said
    grown = int(table(said, "Text, epoch 1")[1][0])
    report.show_data(found, plan, seed=1, token_limit=75, text=TextUse(2**10, 2**20))
    assert grown > int(table(capsys.readouterr().out, "Text, epoch 1")[1][0]) == 4


def plan_of(folder: Path, texts: list[str]) -> Plan:
    """A plan of one picture for each caption."""
    records = [ImageRecord(folder, f"{i}.png", (64, 64), 1, text, True, 0, 0, 1, False) for i, text in enumerate(texts)]
    return build_plan([DatasetSpec(1, (64, 64), (SubsetSpec(folder),))], records, 8, 1)


def test_many_captions_are_counted_as_few_are(tmp_path: Path) -> None:
    """Counts don't depend on how captions are shared out."""
    texts = [f"cat number {i % 2500}, on a moon" + ", and more" * (i % 2500 % 40) for i in range(3000)]
    lengths = [len(one.ids) for one in clip_tokenizer().encode_batch(texts, add_special_tokens=False)]
    counts = count_tokens(plan_of(tmp_path, texts), seed=1, limit=75)
    assert (counts.minimum, counts.maximum) == (min(lengths), max(lengths))
    assert counts.over_chunk == len(counts.cut) == sum(length > 75 for length in lengths)
    assert [cut.tokens for cut in counts.cut] == [length for length in lengths if length > 75]


letters = st.text("ab,!.'s  \t\u3000é\u0301中😀\x1c\x85<|>1", max_size=12)


@examples(deadline=None, max_examples=400)
@given(st.lists(st.one_of(letters, st.text(max_size=8), st.just("<|endoftext|>")), max_size=5), st.integers(1, 9))
@pytest.mark.parametrize("pad_id", [0, END_ID])
def test_tokens_are_those_of_the_whole_text(pad_id: int, pieces: list[str], limit: int) -> None:
    text = " ".join(pieces).split("\n")[0]
    encoding = clip_tokenizer(pad_id).encode(text, add_special_tokens=False)
    counts = count_tokens(plan_of(Path("x"), [text]), seed=1, limit=limit, pad_id=pad_id)
    assert counts.maximum == len(encoding.ids)
    assert [cut.cut for cut in counts.cut] == [text[start:] for start, _ in encoding.offsets[limit : limit + 1]]


def test_no_heavy_import_and_soon(tmp_path: Path, make_picture: MakePicture, repo_root: Path) -> None:
    """A thousand pictures, planned and shown, without torch, cv2, diffusers or transformers."""
    data = make_picture(tmp_path / "seed.jpg", (1024, 768)).read_bytes()
    png = make_picture(tmp_path / "seed.png", (512, 400)).read_bytes()
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(500):
        (folder / f"{i:04d}.jpg").write_bytes(data)
        (folder / f"{i:04d}p.png").write_bytes(png)
        (folder / f"{i:04d}.caption").write_text(f"a photo of cat number {i}, sitting on a moon")
    program = f"""
import sys
from pathlib import Path
from library.data import report
from library.data.sources import scan as sources
from library.data.caption_plan import TextUse
from library.data.plan import build_plan
from library.options.specs import DatasetSpec, SubsetSpec
specs = [DatasetSpec(4, (512, 512), (SubsetSpec(Path({str(folder)!r}), 10),), enable_bucket=True)]
found = sources.survey(specs)
plan = build_plan(specs, found.records, 8, 1)
report.show_data(found, plan, seed=1, token_limit=75)
assert len(found.records) == 1000
heavy = {{"torch", "cv2", "diffusers", "transformers", "accelerate"}}
print(sorted(heavy & {{name.split(".")[0] for name in sys.modules}}))
"""
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    after = os.times()
    assert done.stdout.splitlines()[-1] == "[]"
    assert after.children_user + after.children_system - before.children_user - before.children_system < 3
