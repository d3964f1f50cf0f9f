"""Odd and bad data: what is bad ends with exit code 2 and one clear line before torch is imported; what is odd trains.

Every bad command line runs through `train_network.main` in one process of its own, and is judged one by one.
"""

import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import train_network
from tests.faults import test_bad_input
from tests.programs import environment

pytestmark = pytest.mark.xdist_group("data_faults")
RUN = """
import io, json, sys, traceback
import train_network
for line in open(sys.argv[1]):
    name, arguments = json.loads(line)
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    try:
        code = train_network.main(arguments)
    except BaseException:
        code = traceback.format_exc()
    told = sys.stderr.getvalue()
    sys.__stdout__.write(json.dumps([name, code, told, "torch" in sys.modules]) + "\\n")
"""


@dataclass
class Job(test_bad_input.Job):
    """The same with pictures of one size, in `things`."""

    sizes: Sequence[tuple[int, int]] = ((80, 64),)

    @property
    def things(self) -> Path:
        return self.folder / "pictures" / "2_thing"

    def config(self, *subsets: str, dataset: str = "", more: str = "") -> None:
        """A dataset file in place of the folder: line 1 is [[datasets]], line 3 the first [[datasets.subsets]]."""
        tables = "".join(f"[[datasets.subsets]]\n{subset}\n" for subset in subsets)
        self.options.pop("--train_data_dir", None)
        self.options["--dataset_config"] = str(self.write("data.toml", f"[[datasets]]\n{dataset}\n{tables}{more}"))

    def mask(self, name: str, size: tuple[int, int] = (80, 64)) -> Path:
        path = self.folder / "masks" / name
        path.parent.mkdir(exist_ok=True)
        Image.new("L", size, 200).save(path)
        self.options |= {"--masked_loss": "", "--conditioning_data_dir": str(path.parent)}
        return path

    @property
    def image_dir(self) -> str:
        return f'image_dir = "{self.things}"'

    def arguments(self) -> list[str]:
        return [part for pair in self.options.items() for part in pair if part]


Case = Callable[[Job], list[str]]


def mixed_kinds(job: Job) -> list[str]:
    job.config(job.image_dir, f'metadata_file = "{job.write("meta.json", "{}")}"\n{job.image_dir}')
    return ["different kinds", "data.toml:1", "[[datasets]] of its own"]


def two_sources(job: Job) -> list[str]:
    path = job.write("list.jsonl", "{}")
    job.config(f'metadata_file = "{path}"\njsonl_path = "{path}"', job.image_dir)
    return ["data.toml:4", "data.toml:5", "one source"]


def wrong_type(job: Job) -> list[str]:
    job.config(f'{job.image_dir}\nnum_repeats = "many"')
    return ["data.toml:5", "num_repeats", "many"]


def wrong_level(job: Job) -> list[str]:
    job.config(f"{job.image_dir}\nbatch_size = 2")
    return ["data.toml:5", "batch_size", "it belongs in", "[[datasets]]"]


def image_dir_too_far_out(job: Job) -> list[str]:
    job.config(job.image_dir, dataset=job.image_dir)
    return ["data.toml:2", "image_dir", "it belongs in", "[[datasets.subsets]]"]


def no_such_folder(job: Job) -> list[str]:
    job.config(f'image_dir = "{job.folder}/nowhere"', job.image_dir)
    return ["data.toml:4", "nowhere"]


def trained_and_held_out(job: Job) -> list[str]:
    job.config(job.image_dir, more=f"[[datasets]]\nvalidation_split = 1.0\n[[datasets.subsets]]\n{job.image_dir}\n")
    return ["data.toml:8", "pictures would be held out for validation here, and trained on", "picture00.jpg"]


def everything_held_out(job: Job) -> list[str]:
    job.options["--validation_split"] = "1.0"
    return ["validation_split", "none is left to train on"]


def caption_not_utf8(job: Job) -> list[str]:
    (job.things / "picture01.txt").write_bytes(b"caf\xe9")
    return ["picture01.txt", "UTF-8", "0xe9"]


def empty_picture(job: Job) -> list[str]:
    (job.things / "picture01.png").write_bytes(b"")
    return ["picture01.png", "empty"]


def huge_header(job: Job) -> list[str]:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    end = b"\0\0\0\0IEND\xaeB`\x82"
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + end
    (job.things / "picture01.png").write_bytes(data)
    return ["picture01.png", "pixels"]


def symlink_loop(job: Job) -> list[str]:
    (job.things / "round.png").symlink_to("round.png")
    return ["round.png", "can't be read"]


def dangling_link(job: Job) -> list[str]:
    (job.things / "gone.png").symlink_to(job.folder / "nowhere.png")
    return ["gone.png", "can't be read"]


def folder_named_png_in_metadata(job: Job) -> list[str]:
    (job.things / "album.png").mkdir()
    job.config(f'metadata_file = "{job.write("meta.json", json.dumps({"album.png": {}}))}"\n{job.image_dir}')
    return ["meta.json", "album.png", "aren't there"]


def missing_mask(job: Job) -> list[str]:
    for name in ("picture00.png", "picture02.png"):
        job.mask(name)
    return ["without a mask", "picture01.png"]


def mask_of_another_size(job: Job) -> list[str]:
    for number in range(3):
        job.mask(f"picture0{number}.png", (80, 64) if number else (64, 80))
    return ["picture00.png", "64x80", "80x64", "picture00.jpg"]


def truncated_mask(job: Job) -> list[str]:
    for number in range(3):
        path = job.mask(f"picture0{number}.png")
    path.write_bytes(path.read_bytes()[:-20])
    return ["masks/picture02.png", "truncated"]


def masks_without_masked_loss(job: Job) -> list[str]:
    job.mask("picture00.png")
    del job.options["--masked_loss"]
    return ["conditioning_data_dir", "--masked_loss"]


def metadata(job: Job, content: str | bytes, name: str = "meta.json") -> None:
    job.options["--in_json"] = str(job.write(name, content))
    job.options["--train_data_dir"] = str(job.things)


def metadata_names_missing_pictures(job: Job) -> list[str]:
    metadata(job, json.dumps({f"gone{number:02}": {"caption": "x"} for number in range(12)}))
    return ["meta.json", "12 of 12", "gone09 and 2 more"]


def broken_metadata(job: Job) -> list[str]:
    metadata(job, '{\n "picture00": {"caption": "x"},\n "picture01": {"caption": x}\n}')
    return ["meta.json:3", "valid JSON", "column"]


def metadata_not_utf8(job: Job) -> list[str]:
    metadata(job, b'{"picture00":\n{"caption": "\xff"}}')
    return ["meta.json:2", "UTF-8"]


def metadata_of_one_picture_twice(job: Job) -> list[str]:
    metadata(job, '{"image_path": "picture00"}\n{"image_path": "picture00.jpg"}', "meta.jsonl")
    return ["meta.jsonl:2", "picture00.jpg stands twice", "meta.jsonl:1"]


def metadata_stem_of_two_pictures(job: Job) -> list[str]:
    Image.new("RGB", (64, 64)).save(job.things / "picture00.webp")
    metadata(job, json.dumps({"picture00": {"caption": "x"}}))
    return ["meta.json:1", "picture00.jpg, picture00.webp"]


def empty_metadata(job: Job) -> list[str]:
    metadata(job, "")
    return ["meta.json", "empty"]


def metadata_caption_is_a_list(job: Job) -> list[str]:
    metadata(job, '{\n"picture00": {\n"caption": ["x"]}}')
    return ["meta.json:2", "caption of picture00", "a list"]


def jsonl_without_the_column(job: Job) -> list[str]:
    path = job.write("list.jsonl", '{"image": "pictures/2_thing/picture00", "prompt": "x"}')
    job.config(f'jsonl_path = "{path}"')
    return ["list.jsonl:1", "no column text", "image, prompt", "caption_column"]


def jsonl_mask_is_missing(job: Job) -> list[str]:
    row = {"image": "pictures/2_thing/picture00", "text": "x", "mask": "no.png"}
    job.config(f'jsonl_path = "{job.write("list.jsonl", json.dumps(row))}"')
    job.options["--masked_loss"] = ""
    return ["list.jsonl", "masks", "no.png (line 1)"]


def no_such_dataset(job: Job) -> list[str]:
    job.config(f'dataset_name = "{job.folder}/nothing"')
    return ["nothing", "no such file or folder"]


def dataset_without_the_column(job: Job) -> list[str]:
    job.config(f'dataset_name = "{saved_dataset(job)}"\nimage_column = "img"')
    return ["no column img", "image, text"]


def small_pictures(job: Job) -> list[str]:
    Image.new("RGB", (1, 300)).save(job.things / "picture01.png")
    job.options |= {"--enable_bucket": "", "--bucket_no_upscale": "", "--bucket_reso_steps": "8"}
    return ["picture01.png", "1x300"]


def saved_dataset(job: Job) -> Path:
    datasets = pytest.importorskip("datasets")
    names = sorted(path for path in job.things.iterdir() if path.suffix != ".txt")
    rows = {"image": [str(path) for path in names], "text": [f"caption {path.stem}" for path in names]}
    path = job.folder / "saved"
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(str(path))
    return path


BAD: list[Case] = [
    mixed_kinds,
    two_sources,
    wrong_type,
    wrong_level,
    image_dir_too_far_out,
    no_such_folder,
    trained_and_held_out,
    everything_held_out,
    caption_not_utf8,
    empty_picture,
    huge_header,
    symlink_loop,
    dangling_link,
    folder_named_png_in_metadata,
    missing_mask,
    mask_of_another_size,
    truncated_mask,
    masks_without_masked_loss,
    metadata_names_missing_pictures,
    broken_metadata,
    metadata_not_utf8,
    metadata_of_one_picture_twice,
    metadata_stem_of_two_pictures,
    empty_metadata,
    metadata_caption_is_a_list,
    jsonl_without_the_column,
    jsonl_mask_is_missing,
    no_such_dataset,
    dataset_without_the_column,
    small_pictures,
]


@dataclass(frozen=True)
class Result:
    """What one command line did, and what its only message should hold."""

    words: list[str]
    code: Any
    told: str
    torch: bool
    wrote: bool


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, tiny_sd1: Path) -> dict[str, Result]:
    """Every bad command line, run."""
    place = tmp_path_factory.mktemp("faults")
    jobs, words = {}, {}
    for case in BAD:
        job = jobs[case.__name__] = Job(place / case.__name__, tiny_sd1)
        words[case.__name__] = case(job)
    commands = place / "commands.jsonl"
    commands.write_text("".join(json.dumps([name, job.arguments()]) + "\n" for name, job in jobs.items()))
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(commands)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == len(BAD), result.stderr
    return {
        name: Result(words[name], code, told, torch, (jobs[name].folder / "output").exists())
        for name, code, told, torch in found
    }


@pytest.mark.parametrize("name", [case.__name__ for case in BAD])
def test_one_clear_message(name: str, results: dict[str, Result]) -> None:
    result = results[name]
    assert result.code == 2, result
    errors = [line for line in result.told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.told
    assert all(word in errors[0] for word in result.words), (result.words, errors[0])
    assert "Traceback" not in result.told
    assert not result.torch
    assert not result.wrote


def odd_modes(job: Job) -> None:
    """Colours that aren't RGB, more than one frame, turned by EXIF."""
    colours = Image.effect_noise((90, 70), 60).convert("RGB")
    for path in job.things.iterdir():
        path.unlink()
    colours.convert("CMYK").save(job.things / "cmyk.jpg")
    colours.quantize(16).save(job.things / "palette.png")
    colours.quantize(16).save(job.things / "transparent.png", transparency=3)
    colours.convert("LA").save(job.things / "grey_alpha.png")
    colours.convert("1").save(job.things / "one_bit.png")
    Image.fromarray((np.arange(90 * 70) * 10).astype(np.uint16).reshape(70, 90)).save(job.things / "sixteen.png")
    frames = [colours, colours.rotate(90)]
    frames[0].save(job.things / "animated.webp", save_all=True, append_images=frames[1:])
    frames[0].save(job.things / "animated.png", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    colours.save(job.things / "turned.jpg", exif=exif)


def odd_names(job: Job) -> None:
    for number, name in enumerate(
        ("with space.png", "ü 猫.png", "two\nlines.png", "a.b.c.png", "'quote\".png", "%41.png")
    ):
        path = job.things / name
        Image.new("RGB", (64, 64), (number * 40, 90, 120)).save(path)
        path.with_suffix(".txt").write_text("a thing", encoding="utf-8")


def empty_captions(job: Job) -> None:
    (job.things / "picture00.txt").write_text("")
    (job.things / "picture01.txt").write_text("\n \n")
    (job.things / "picture02.txt").unlink()


def duplicate_subsets(job: Job) -> None:
    job.config(job.image_dir, f'image_dir = "{job.things}/."')


def good_metadata(job: Job) -> None:
    metadata(job, json.dumps({f"picture{number:02}": {"caption": "x", "tags": "y, z"} for number in range(3)}))


def good_jsonl_with_masks(job: Job) -> None:
    lines = [{"image": f"pictures/2_thing/picture0{number}", "text": "x"} for number in range(3)]
    for number in range(2):
        lines[number]["mask"] = str(job.mask(f"m{number}.png"))
    job.config(f'jsonl_path = "{job.write("list.jsonl", chr(10).join(map(json.dumps, lines)))}"')
    del job.options["--conditioning_data_dir"]


def good_masks(job: Job) -> None:
    for number in range(3):
        job.mask(f"picture0{number}.PNG")


def good_dataset(job: Job) -> None:
    job.config(f'dataset_name = "{saved_dataset(job)}"')


GOOD: dict[Callable[[Job], None], list[str]] = {
    odd_modes: [],
    odd_names: [],
    empty_captions: ["captions are empty", "1 of 3 pictures have no .txt file"],
    duplicate_subsets: ["ignored, because this dataset already has"],
    good_metadata: [],
    good_jsonl_with_masks: [],
    good_masks: [],
    good_dataset: [],
}


@pytest.mark.parametrize("make", GOOD, ids=lambda make: make.__name__)
def test_odd_data_trains(
    make: Callable[[Job], None], tmp_path: Path, tiny_sd1: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(tmp_path, tiny_sd1)
    make(job)
    job.options |= {
        "--max_train_epochs": "1",
        "--train_batch_size": "4",
        "--network_train_unet_only": "",
        "--seed": "1",
    }
    del job.options["--max_train_steps"]
    code = train_network.main(job.arguments())
    told = capsys.readouterr().err
    assert code == 0, told
    assert all(words in told for words in GOOD[make]), told
    assert all(np.isfinite(tensor).all() for tensor in load_file(tmp_path / "output/x.safetensors").values())
