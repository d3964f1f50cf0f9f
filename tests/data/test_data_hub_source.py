"""Hugging Face datasets as a source: every shape they come in, exported once, without the network and without torch."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.data.sources.hub_source import MANIFEST, list_hub
from library.data.sources.images import Header, probe
from library.data.sources.listing import Findings, Listed
from library.options import load_datasets, parse
from library.options.specs import CaptionSpec, Columns, HubDataset, SubsetSpec
from tests.data.conftest import MakePicture
from tests.programs import ROOT, environment

datasets = pytest.importorskip("datasets")
Source = Callable[..., Path]
SIZES = ((80, 64), (64, 80), (96, 64))


@pytest.fixture
def pictures(tmp_path: Path, make_picture: MakePicture) -> list[Path]:
    """A PNG, a JPEG and a WebP file."""
    names = ("a.png", "b.jpg", "c.webp")
    return [make_picture(tmp_path / "originals" / name, size) for name, size in zip(names, SIZES, strict=True)]


def rows_of(pictures: list[Path], *, embedded: bool = True, **columns: list[Any]) -> Any:
    """A dataset of pictures with captions; the pictures' bytes are in it, or only their paths."""
    values = [{"bytes": path.read_bytes(), "path": path.name} if embedded else str(path) for path in pictures]
    content = {"image": values, "text": [f"caption {path.stem}" for path in pictures], **columns}
    return datasets.Dataset.from_dict(content).cast_column("image", datasets.Image())


def spec_of(tmp_path: Path, name: object, config: str | None = None, **settings: Any) -> SubsetSpec:
    hub = HubDataset(str(name), config, tmp_path / "hf_cache")
    return SubsetSpec(image_dir=tmp_path / "exported", source="hub", hub=hub, **settings)


def good(spec: SubsetSpec) -> list[Listed]:
    findings = Findings()
    listed = list_hub(spec, findings)
    assert not findings.problems, findings.problems
    return listed


def wrong(spec: SubsetSpec) -> str:
    """The only problem."""
    findings = Findings()
    list_hub(spec, findings)
    assert len(findings.problems) == 1, findings.problems
    return str(findings.problems[0])


def of_saved(folder: Path, rows: Any, pictures: list[Path]) -> Path:
    rows.save_to_disk(str(folder))
    return folder


def of_saved_splits(folder: Path, rows: Any, pictures: list[Path]) -> Path:
    datasets.DatasetDict(test=rows.select([0]), train=rows).save_to_disk(str(folder))
    return folder


def of_parquet_folder(folder: Path, rows: Any, pictures: list[Path]) -> Path:
    rows.to_parquet(str(folder / "train.parquet"))
    return folder


def of_parquet_file(folder: Path, rows: Any, pictures: list[Path]) -> Path:
    rows.to_parquet(str(folder / "pictures.parquet"))
    return folder / "pictures.parquet"


def of_csv(folder: Path, rows: Any, pictures: list[Path]) -> Path:
    lines = "".join(f"../originals/{path.name},caption {path.stem}\n" for path in pictures)
    (folder / "train.csv").write_text("image,text\n" + lines)
    return folder


def of_jsonl_file(folder: Path, rows: Any, pictures: list[Path]) -> Path:
    lines = [json.dumps({"image": str(path), "text": f"caption {path.stem}"}) for path in pictures]
    (folder / "list.jsonl").write_text("\n".join(lines))
    return folder / "list.jsonl"


def of_image_folder(folder: Path, rows: Any, pictures: list[Path]) -> Path:
    for path in pictures:
        (folder / path.name).write_bytes(path.read_bytes())
    lines = [json.dumps({"file_name": path.name, "text": f"caption {path.stem}"}) for path in pictures]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


MAKERS = [of_saved, of_saved_splits, of_parquet_folder, of_parquet_file, of_csv, of_jsonl_file, of_image_folder]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_pictures_and_captions(
    make: Callable[[Path, Any, list[Path]], Path], tmp_path: Path, pictures: list[Path]
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    spec = spec_of(tmp_path, make(folder, rows_of(pictures), pictures))
    listed = good(spec)
    assert [one.caption for one in listed] == ["caption a", "caption b", "caption c"]
    for one, path in zip(listed, pictures, strict=True):
        assert (spec.image_dir / one.key).read_bytes() == path.read_bytes()
        assert isinstance(header := probe(spec.image_dir / one.key), Header)
        assert header.size in SIZES


def test_nothing_is_exported_again(tmp_path: Path, pictures: list[Path]) -> None:
    spec = spec_of(tmp_path, of_saved(tmp_path / "source", rows_of(pictures), pictures))
    first = good(spec)
    assert [one.key for one in first] == ["000000.png", "000001.jpg", "000002.webp"]
    before = {path.name: path.stat().st_mtime_ns for path in spec.image_dir.iterdir()}
    assert set(before) == {"000000.png", "000001.jpg", "000002.webp", MANIFEST}
    assert good(spec) == first
    assert {path.name: path.stat().st_mtime_ns for path in spec.image_dir.iterdir()} == before


def test_interrupted_export_goes_on(tmp_path: Path, pictures: list[Path]) -> None:
    """Without a manifest, or with a picture gone or cut short, only what is missing is written."""
    spec = spec_of(tmp_path, of_saved(tmp_path / "source", rows_of(pictures), pictures))
    first = good(spec)
    kept = (spec.image_dir / "000000.png").stat()
    (spec.image_dir / MANIFEST).unlink()
    (spec.image_dir / "000001.jpg").unlink()
    (spec.image_dir / "000002.webp").write_bytes(b"RIFF")
    assert good(spec) == first
    assert (spec.image_dir / "000002.webp").read_bytes() == pictures[2].read_bytes()
    assert (spec.image_dir / "000000.png").stat().st_ino == kept.st_ino
    (spec.image_dir / "000001.jpg").unlink()
    assert good(spec) == first
    assert (spec.image_dir / "000001.jpg").is_file()


def test_other_rows_are_exported(tmp_path: Path, pictures: list[Path], make_picture: MakePicture) -> None:
    source = tmp_path / "source"
    spec = spec_of(tmp_path, of_saved(source, rows_of(pictures), pictures))
    good(spec)
    kept = (spec.image_dir / "000000.png").stat().st_ino
    (spec.image_dir / "mine.png").write_bytes(b"not ours")
    other = [pictures[0], make_picture(tmp_path / "d.png")]
    rows_of(other).save_to_disk(str(tmp_path / "other"))
    listed = good(spec_of(tmp_path, tmp_path / "other"))
    assert [one.key for one in listed] == ["000000.png", "000001.png"]
    assert (spec.image_dir / "000000.png").stat().st_ino == kept
    assert {path.name for path in spec.image_dir.iterdir()} == {"000000.png", "000001.png", "mine.png", MANIFEST}


def test_local_paths_are_used_where_they_are(tmp_path: Path, pictures: list[Path]) -> None:
    rows_of(pictures, embedded=False).to_parquet(str(tmp_path / "rows.parquet"))
    lists = [json.dumps({"image": str(path), "text": "x"}) for path in pictures]
    (tmp_path / "rows.jsonl").write_text("\n".join(lists))
    listed = good(spec_of(tmp_path, tmp_path / "rows.jsonl"))
    assert [one.key for one in listed] == [str(path) for path in pictures]


def test_bytes_and_pixels(tmp_path: Path, pictures: list[Path]) -> None:
    content = {"bytes": [path.read_bytes() for path in pictures], "text": ["x"] * 3}
    of_saved(tmp_path / "bytes", datasets.Dataset.from_dict(content), pictures)
    listed = good(spec_of(tmp_path, tmp_path / "bytes", columns=Columns(image="bytes")))
    assert [one.key for one in listed] == ["000000.png", "000001.jpg", "000002.webp"]
    pixels = datasets.Array3D((4, 5, 3), "uint8")
    features = datasets.Features({"image": pixels, "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": [[[[1, 2, 3]] * 5] * 4], "text": ["x"]}, features=features)
    spec = spec_of(tmp_path, of_saved(tmp_path / "pixels", rows, pictures))
    (one,) = good(spec)
    with Image.open(spec.image_dir / one.key) as image:
        assert (image.format, image.size, image.getpixel((4, 3))) == ("PNG", (5, 4), (1, 2, 3))


def test_mask_column(tmp_path: Path, pictures: list[Path]) -> None:
    stream = io.BytesIO()
    Image.new("L", (80, 64), 255).save(stream, "PNG")
    masks = [{"bytes": stream.getvalue(), "path": None}, None, None]
    rows = rows_of(pictures, mask=masks).cast_column("mask", datasets.Image())
    source = of_saved(tmp_path / "source", rows, pictures)
    spec = spec_of(tmp_path, source, masks=True)
    listed = good(spec)
    assert [one.mask for one in listed] == [str(spec.image_dir / "000000-mask.png"), None, None]
    assert (spec.image_dir / "000000-mask.png").read_bytes() == stream.getvalue()
    findings = Findings()
    assert {one.mask for one in list_hub(spec_of(tmp_path, source), findings)} == {None}
    assert any("--masked_loss" in line for line in findings.notices)


def test_no_captions(tmp_path: Path, pictures: list[Path]) -> None:
    source = of_saved(tmp_path / "source", rows_of(pictures).remove_columns("text"), pictures)
    findings = Findings()
    listed = list_hub(spec_of(tmp_path, source), findings)
    assert [one.caption for one in listed] == ["", "", ""]
    assert not findings.problems
    assert "no column text" in findings.notices[0]
    listed = good(spec_of(tmp_path, source, class_tokens="a dog"))
    assert [one.caption for one in listed] == [None] * 3


def test_null_captions_are_empty(tmp_path: Path, pictures: list[Path]) -> None:
    source = of_saved(tmp_path / "source", rows_of(pictures, other=["x", None, ""]), pictures)
    findings = Findings()
    listed = list_hub(spec_of(tmp_path, source, columns=Columns(caption="other")), findings)
    assert [one.caption for one in listed] == ["x", "", ""]
    assert "2 of 3 captions are empty" in findings.notices[0]
    about, aside = CaptionSpec(templates=("a {}",), subject="mycat"), Findings()
    for columns in (Columns(caption="other"), Columns()):
        list_hub(replace(spec_of(tmp_path, source, columns=columns), caption=about), aside)
    assert not aside.notices and not aside.problems


def test_wrong_columns(tmp_path: Path, pictures: list[Path]) -> None:
    source = of_saved(tmp_path / "source", rows_of(pictures, number=[1, 2, 3], tags=[["x"]] * 3), pictures)

    def told(**columns: str) -> str:
        return wrong(spec_of(tmp_path, source, columns=Columns(**columns), masks="mask" in columns))

    assert "there is no column imag, but image, text, number, tags" in told(image="imag")
    assert "did you mean image?" in told(image="imag")
    assert "there is no column prompt" in told(caption="prompt")
    assert "there is no column alpha" in told(mask="alpha")
    assert "column number holds values of type int64" in told(image="number")
    assert "column tags holds lists, not texts" in told(caption="tags")
    assert "column image holds picture" in told(caption="image")


def test_no_split_of_that_name(tmp_path: Path, pictures: list[Path]) -> None:
    rows = rows_of(pictures)
    datasets.DatasetDict(test=rows, validation=rows).save_to_disk(str(tmp_path / "saved"))
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("test", "validation"):
        rows.to_parquet(str(folder / f"{name}.parquet"))
    for source in (tmp_path / "saved", folder):
        message = wrong(spec_of(tmp_path, source))
        assert "no split train" in message
        assert "test" in message
        assert "validation" in message


def test_rows_that_cannot_be_used(tmp_path: Path, pictures: list[Path]) -> None:
    images = [str(pictures[0]), "", "https://example.com/a.png", str(pictures[0]), "/gone/b.png", str(pictures[1])]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"image": x, "text": "t"}) for x in images))
    findings = Findings()
    listed = list_hub(spec_of(tmp_path, tmp_path / "rows.jsonl"), findings)
    assert [one.key for one in listed] == [str(pictures[0]), str(pictures[1])]
    told = "\n".join(map(str, findings.problems))
    assert "rows without a picture: 1" in told
    assert "https://example.com/a.png (row 2)" in told
    assert "(row 3)" in told
    assert "/gone/b.png" in told


def test_nothing_there(tmp_path: Path) -> None:
    assert "there is no such file or folder" in wrong(spec_of(tmp_path, tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    assert "can't be read" in wrong(spec_of(tmp_path, tmp_path / "empty"))
    (tmp_path / "data.xlsx").write_text("x")
    assert ".parquet" in wrong(spec_of(tmp_path, tmp_path / "data.xlsx"))
    (tmp_path / "data.csv").write_bytes(b"\xff\xfe\x00\x01")
    assert "can't be read" in wrong(spec_of(tmp_path, tmp_path / "data.csv"))


def test_hub_id_offline(tmp_path: Path) -> None:
    """The tests run with HF_HUB_OFFLINE=1."""
    message = wrong(spec_of(tmp_path, "somebody/pictures"))
    assert "isn't in the cache" in message
    assert "HF_HUB_OFFLINE" in message


def test_hub_id_from_the_cache(tmp_path: Path, pictures: list[Path]) -> None:
    """What was fetched once is found again without the network; here a cache as `datasets` leaves it."""
    folder = tmp_path / "somebody___pictures"
    folder.mkdir()
    of_parquet_folder(folder, rows_of(pictures), pictures)
    datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "hf_cache"))
    (made,) = (tmp_path / "hf_cache").glob("somebody___pictures/default/0.0.0/*/*.arrow")
    made.rename(made.with_name("pictures-train.arrow"))
    assert len(good(spec_of(tmp_path, "somebody/pictures"))) == 3


def test_a_full_disk_is_one_line(tmp_path: Path, pictures: list[Path]) -> None:
    (tmp_path / "exported").write_text("a file where the folder should be")
    message = wrong(spec_of(tmp_path, of_saved(tmp_path / "source", rows_of(pictures), pictures)))
    assert "can't be written" in message


GUARDED = """
import sys
from pathlib import Path
from library.data.sources.hub_source import list_hub
from library.data.sources.listing import Findings
from library.options.specs import HubDataset, SubsetSpec
assert "datasets" not in sys.modules
found = Findings()
folder = Path(sys.argv[1])
spec = SubsetSpec(image_dir=folder / "exported", source="hub", hub=HubDataset(sys.argv[2], None, folder / "cache"))
print(len(list_hub(spec, found)), found.problems, [name for name in ("torch", "cv2") if name in sys.modules])
"""


@pytest.mark.parametrize("make", [of_saved, of_parquet_folder, of_image_folder], ids=lambda make: make.__name__)
def test_local_needs_no_network_and_no_torch(
    make: Callable[[Path, Any, list[Path]], Path], tmp_path: Path, pictures: list[Path]
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    path = make(folder, rows_of(pictures), pictures)
    guard = f"{ROOT / 'tests' / 'no_network'}:{ROOT}"
    result = subprocess.run(
        [sys.executable, "-c", GUARDED, str(tmp_path), str(path)],
        env=environment(PYTHONPATH=guard, HF_HUB_OFFLINE="0"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.stdout.strip() == "3 [] []", result.stderr
    assert "no network" not in result.stderr


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = wrong(spec_of(tmp_path, "somebody/pictures"))
    assert "pip install -e '.[hub]'" in message


def test_either_switch_keeps_it_offline(tmp_path: Path) -> None:
    """HF_DATASETS_OFFLINE alone is enough: there is one message, and nothing is asked of the network."""
    guard = f"{ROOT / 'tests' / 'no_network'}:{ROOT}"
    result = subprocess.run(
        [sys.executable, "-c", GUARDED, str(tmp_path), "somebody/pictures"],
        env=environment(PYTHONPATH=guard, HF_HUB_OFFLINE="0", HF_DATASETS_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "forbids to fetch it" in result.stdout, result.stderr
    assert "no network" not in result.stderr


def test_a_local_folder_is_never_taken_for_another(tmp_path: Path, pictures: list[Path]) -> None:
    """`datasets` itself knows a folder with configurations by its name and theirs alone."""
    captions = []
    for place in ("here", "there"):
        folder = tmp_path / place / "set"
        (folder / "one").mkdir(parents=True)
        rows = rows_of(pictures).remove_columns("text").add_column("text", [f"from {place}"] * len(pictures))
        rows.to_parquet(str(folder / "one" / "train.parquet"))
        (folder / "README.md").write_text("---\nconfigs:\n- config_name: one\n  data_files: one/train.parquet\n---\n")
        hub = HubDataset(str(folder), None, tmp_path / "hf_cache")
        captions.append({one.caption for one in good(SubsetSpec(tmp_path / f"of {place}", source="hub", hub=hub))})
    assert captions == [{"from here"}, {"from there"}]


@pytest.mark.parametrize("wildcards", [False, True])
def test_captions_are_cut_like_caption_files(tmp_path: Path, pictures: list[Path], wildcards: bool) -> None:
    texts = [" \n  one\u2028line \r\nsecond\n", " \n ", "plain"]
    source = of_saved(tmp_path / "source", rows_of(pictures, other=texts), pictures)
    findings = Findings()
    spec = spec_of(tmp_path, source, columns=Columns(caption="other"), caption=CaptionSpec(wildcards=wildcards))
    listed = list_hub(spec, findings)
    assert [one.caption for one in listed] == ["one\u2028line\nsecond" if wildcards else "one\u2028line", "", "plain"]
    assert "1 of 3 captions are empty" in findings.notices[0]


def test_each_choice_of_columns_has_files_of_its_own(tmp_path: Path, pictures: list[Path]) -> None:
    """One dataset four times: by another picture column, with masks, by another mask column."""
    columns: dict[str, Any] = {
        name: [{"bytes": path.read_bytes(), "path": None} for path in pictures[turn:] + pictures[:turn]]
        for name, turn in (("other", 1), ("mask", 0), ("shade", 2))
    }
    rows = rows_of(pictures, **columns)
    source = of_saved(tmp_path / "source", rows, pictures)
    kinds = ("", 'image_column = "other"', 'mask_column = "shade"')
    tables = "".join(
        f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\ndataset_name = "{source}"\n{kind}\n' for kind in kinds
    )
    (tmp_path / "data.toml").write_text(tables)
    argv = f"--pretrained_model_name_or_path m --output_dir {tmp_path} --network_module networks.lora"
    plain, masked = (
        load_datasets(parse([*argv.split(), "--dataset_config", str(tmp_path / "data.toml"), *more]))
        for more in ([], ["--masked_loss"])
    )
    subsets = [spec.subsets[0] for spec in (*plain, *masked)]
    assert len({subset.image_dir for subset in subsets}) == 5, "without masks, their column makes no difference"
    found = [(subset, good(subset)) for subset in subsets]
    for subset, listed in found:
        turn = 1 if subset.columns.image == "other" else 0
        wanted = [path.read_bytes() for path in pictures[turn:] + pictures[:turn]]
        assert [(subset.image_dir / one.key).read_bytes() for one in listed] == wanted
        if subset.masks:
            turn = 2 if subset.columns.mask == "shade" else 0
            wanted = [path.read_bytes() for path in pictures[turn:] + pictures[:turn]]
            assert [Path(one.mask or "").read_bytes() for one in listed] == wanted


def test_files_that_nobody_here_made_stay(tmp_path: Path, pictures: list[Path]) -> None:
    """Also where they are named like ours: only what the folder's own list names is cleared away."""
    source = tmp_path / "source"
    spec = spec_of(tmp_path, of_saved(source, rows_of(pictures), pictures))
    spec.image_dir.mkdir()
    (spec.image_dir / "000007.png").write_bytes(b"another's")
    good(spec)
    rows_of(pictures[:1]).save_to_disk(str(tmp_path / "shorter"))
    good(spec_of(tmp_path, tmp_path / "shorter"))
    assert {path.name for path in spec.image_dir.iterdir()} == {"000000.png", "000007.png", MANIFEST}


def test_a_name_that_is_nothing_at_all(tmp_path: Path) -> None:
    """No half minute of attempts at the hub, and one message that names both things it could have been."""
    guard = f"{ROOT / 'tests' / 'no_network'}:{ROOT}"
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, str(tmp_path), "hf_nope"],
        env=environment(PYTHONPATH=guard, HF_HUB_OFFLINE="0"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "there is no such path here, it isn't in the cache, and the hub has none or can't be reached" in done.stdout
    assert "Retrying" not in done.stderr + done.stdout
