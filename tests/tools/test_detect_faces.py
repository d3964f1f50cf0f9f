"""Pictures copied under names that tell where their faces are."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image

from library.data.faces import Face, face_of
from tests.programs import ROOT, environment
from tools import detect_faces

FACE = (224, 113)
"""Where the astronaut's face is, in pixels of a picture of 512x512."""


@pytest.fixture
def astronaut() -> np.ndarray:
    return np.asarray(skimage.data.astronaut())


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "src").mkdir()
    return tmp_path / "src", tmp_path / "dst"


def run(*arguments: object) -> int:
    return detect_faces.main([str(argument) for argument in arguments])


def faces_in(folder: Path) -> list[Face]:
    found = [face_of(path.name) for path in sorted(folder.rglob("*")) if path.suffix in (".png", ".jpg")]
    return [face for face in found if face is not None]


def near(face: Face, middle: tuple[int, int], size: int) -> bool:
    return (
        max(abs(face.cx - middle[0]), abs(face.cy - middle[1])) < size // 5
        and size * 0.7 < max(face.w, face.h) < size * 1.4
    )


def test_a_face_is_found_and_its_files_go_along(
    folders: tuple[Path, Path], astronaut: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    src, dst = folders
    Image.fromarray(astronaut).save(src / "a woman.png")
    (src / "a woman.txt").write_text("an astronaut", encoding="utf-8")
    (src / "a woman.caption").write_text("the astronaut", encoding="utf-8")
    (src / "a woman.npz").write_bytes(b"cached")
    (src / "a woman 2.txt").write_text("of another", encoding="utf-8")
    Image.fromarray(skimage.data.chelsea()).save(src / "cat.png")
    (src / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert run(src, dst) == 0
    names = sorted(path.name for path in dst.iterdir())
    (face,) = faces_in(dst)
    stem = f"a woman_{face.cx:04d}_{face.cy:04d}_{face.w:04d}_{face.h:04d}"
    assert names == [f"{stem}.caption", f"{stem}.png", f"{stem}.txt"]
    assert near(face, FACE, 95)
    assert (dst / f"{stem}.png").read_bytes() == (src / "a woman.png").read_bytes()
    assert (dst / f"{stem}.txt").read_text(encoding="utf-8") == "an astronaut"
    said = capsys.readouterr().err
    assert "3 pictures: 1 with one face, 0 with several, 1 without, 1 unreadable" in said
    assert "broken.png: the file is truncated" in said
    assert "3 files written" in said


@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_a_turned_picture_is_saved_upright(
    folders: tuple[Path, Path], astronaut: np.ndarray, orientation: int, ending: str
) -> None:
    src, dst = folders
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "a description"
    turned = np.rot90(astronaut, {3: 2, 6: 1, 8: 3}[orientation])
    Image.fromarray(np.ascontiguousarray(turned)).save(src / f"a{ending}", exif=exif, quality=95)
    assert run(src, dst) == 0
    (face,) = faces_in(dst)
    assert near(face, FACE, 95)
    with Image.open(next(dst.iterdir())) as image:
        assert image.getexif().get(0x0112, 1) == 1
        assert image.getexif()[0x010E] == "a description"
        assert np.abs(np.asarray(image).astype(int) - astronaut).mean() < (0.01 if ending == ".png" else 3)


def two_faces(astronaut: np.ndarray) -> Image.Image:
    """A large face at (224, 113), a smaller one at (512 + 112, 56)."""
    half = cv2.resize(astronaut, (256, 256), interpolation=cv2.INTER_AREA)
    canvas = np.full((512, 768, 3), 128, np.uint8)
    canvas[:, :512] = astronaut
    canvas[:256, 512:] = half
    return Image.fromarray(canvas)


def test_several_faces(folders: tuple[Path, Path], astronaut: np.ndarray) -> None:
    src, dst = folders
    two_faces(astronaut).save(src / "two.png")
    (src / "two.txt").write_text("two", encoding="utf-8")
    assert run(src, dst / "largest") == 0
    (largest,) = faces_in(dst / "largest")
    assert near(largest, FACE, 95)
    assert run(src, dst / "each", "--multiple_faces", "each") == 0
    first, second = faces_in(dst / "each")
    assert first == largest
    assert near(second, (624, 56), 48)
    assert [path.name[:7] for path in sorted((dst / "each").glob("*.txt"))] == ["two_01_", "two_02_"]
    assert run(src, dst / "skip", "--multiple_faces", "skip") == 0
    assert not (dst / "skip").exists()
    assert run(src, dst / "big", "--multiple_faces", "skip", "--min_size", 70) == 0
    assert faces_in(dst / "big") == [largest]


def test_padding_and_large_pictures(folders: tuple[Path, Path], astronaut: np.ndarray) -> None:
    src, dst = folders
    Image.fromarray(cv2.resize(astronaut, (2048, 2048))).save(src / "large.jpg")
    assert run(src, dst / "plain") == 0
    assert run(src, dst / "padded", "--padding", 0.25) == 0
    (plain,), (padded,) = faces_in(dst / "plain"), faces_in(dst / "padded")
    assert near(plain, (4 * FACE[0], 4 * FACE[1]), 4 * 95)
    assert abs(padded.w - 1.5 * plain.w) <= 3
    assert run(src, dst / "over", "--padding", 9) == 0
    assert faces_in(dst / "over") == [Face(1024, 1024, 2048, 2048)]


def test_folders_masks_and_pictures_without_a_face(folders: tuple[Path, Path], astronaut: np.ndarray) -> None:
    src, dst = folders
    (src / "inner").mkdir()
    masks = src.parent / "masks"
    (masks / "inner").mkdir(parents=True)
    Image.fromarray(astronaut).save(src / "inner" / "a.png")
    Image.new("L", (512, 512)).save(masks / "inner" / "a.jpg")
    Image.new("RGB", (64, 64)).save(src / "plain.png")
    how = ("--mask_dir", masks, "--mask_dst", dst / "m", "--without_face", "copy")
    assert run(src, dst / "flat", *how) == 0
    assert [path.name for path in (dst / "flat").rglob("*.png")] == ["plain.png"]
    assert run(src, dst / "all", "--recursive", *how) == 0
    (picture,) = (dst / "all" / "inner").iterdir()
    (mask,) = (dst / "m" / "inner").iterdir()
    assert mask.stem == picture.stem
    assert mask.read_bytes() == (masks / "inner" / "a.jpg").read_bytes()
    assert run(src, src / "inside", "--recursive") == 0
    assert run(src, src / "inside", "--recursive") == 0
    assert len(list(src.rglob("*.png"))) == 3


def test_nothing_is_overwritten_unasked(
    folders: tuple[Path, Path], astronaut: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    src, dst = folders
    Image.fromarray(astronaut).save(src / "a.png")
    assert run(src, dst) == 0
    (copied,) = dst.iterdir()
    copied.write_bytes(b"mine")
    assert run(src, dst) == 0
    assert copied.read_bytes() == b"mine"
    assert "1 files were there already" in capsys.readouterr().err
    assert run(src, dst, "--overwrite") == 0
    assert copied.read_bytes() == (src / "a.png").read_bytes()
    assert list(dst.iterdir()) == [copied]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gone", "dst"], "SRC: there is no folder"),
        (["src", "src"], "DST: is the same folder"),
        (["src", "dst"], "src: no pictures there"),
        (["src", "dst", "--model", "gone.onnx"], "--model: there is no file"),
        (["src", "dst", "--model", "bad.onnx"], "bad.onnx is no YuNet model that OpenCV can read"),
        (["src", "dst", "--mask_dir", "src"], "--mask_dir: goes together with --mask_dst"),
        (["src", "dst", "--padding", "-1"], "--padding: -1.0 isn't between 0 and 10"),
        (["src", "dst", "--threads", "0"], "--threads: 0 isn't 1 or more"),
    ],
)
def test_what_cant_be_done(
    folders: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(folders[0].parent)
    Path("bad.onnx").write_bytes(b"no model")
    assert run(*arguments) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not folders[1].exists()


def test_a_model_in_the_form_of_yunet(folders: tuple[Path, Path]) -> None:
    """`bright_blocks.onnx` has YuNet's input and outputs; its faces are the white blocks of 32 x 32 pixels."""
    src, dst = folders
    for stem, blocks in {"one": [(64, 32)], "two": [(0, 96), (96, 32)], "none": []}.items():
        pixels = np.zeros((150, 200, 3), np.uint8)
        for left, top in blocks:
            pixels[top : top + 32, left : left + 32] = 255
        Image.fromarray(pixels).save(src / f"{stem}.png")
    model = Path(__file__).parent / "bright_blocks.onnx"
    assert run(src, dst, "--model", model, "--multiple_faces", "each") == 0
    names = sorted(path.name for path in dst.iterdir())
    assert names == ["one_0064_0032_0032_0032.png", "two_01_0096_0032_0032_0032.png", "two_02_0008_0096_0016_0032.png"]


def test_an_opencv_without_cascades_says_what_to_do(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(cv2, "CascadeClassifier")
    assert run(*folders) == 2
    assert "--model: OpenCV" in capsys.readouterr().err


def test_the_script_runs_by_itself(folders: tuple[Path, Path], astronaut: np.ndarray) -> None:
    src, dst = folders
    Image.fromarray(astronaut).save(src / "a.png")
    command = [sys.executable, str(ROOT / "tools" / "detect_faces.py"), str(src), str(dst)]
    done = subprocess.run(command, env=environment(), cwd=src, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(faces_in(dst)) == 1
