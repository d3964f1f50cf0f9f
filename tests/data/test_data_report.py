"""What a dry run shows, and how soon."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from library.data import report, sources
from library.data.caption_plan import TextUse
from library.data.plan import Plan, build_plan
from library.options.specs import CaptionSpec
from library.tokenizer import clip_tokenizer

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
    counts = report.count_tokens(plan, seed=1, limit=75)
    assert (counts.minimum, counts.median) == (1, 6.0)
    assert counts.maximum == len(clip_tokenizer().encode(plan.records[2].caption, add_special_tokens=False).ids) > 75
    assert counts.over_chunk == 1
    (cut,) = counts.cut
    assert cut.picture == "p2.png"
    assert cut.tokens == counts.maximum
    assert cut.cut.endswith("word58, word59")
    assert "word1," not in cut.cut
    assert report.count_tokens(plan, seed=1, limit=counts.maximum).cut == ()


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
    counts = report.count_tokens(plan, seed=1, limit=75, fragments=fragments)
    assert counts.maximum == tokens(long)
    for limit in (0, 5, 75, tokens(long) - 1):
        cut = {one.picture: one for one in report.count_tokens(plan, seed=1, limit=limit, fragments=fragments).cut}
        assert cut["p2.png"].tokens == tokens(long)
        assert long.endswith(cut["p2.png"].cut)
        assert (
            0
            <= tokens(long) - limit - len(clip_tokenizer().encode(cut["p2.png"].cut, add_special_tokens=False).ids)
            <= 1
        )
    assert report.count_tokens(plan, seed=1, limit=75, fragments=lambda _: []).maximum == 0


@pytest.mark.parametrize(
    ("use", "row", "line"),
    [
        (TextUse(2**20, 2**22), ["4", "0", "4", "1.0 MiB", "4.0 MiB", "4.0 MiB", "yes"], "where all fit"),
        (TextUse(2**20, 2**20), ["4", "0", "4", "1.0 MiB", "4.0 MiB", "1.0 MiB", "no"], "some are encoded again"),
        (TextUse(2**20, 0, trains=True), ["4", "0", "0", "1.0 MiB", "-", "-", "-"], "an encoder is trained"),
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
    plain = report.count_tokens(scanned()[1], seed=1, limit=75)
    dropped = report.count_tokens(scanned(caption=CaptionSpec(dropout_rate=1.0))[1], seed=1, limit=75)
    assert plain == dropped


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
from library.data import report, sources
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
