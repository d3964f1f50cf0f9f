"""Checkpoints written tensor by tensor: bytes, order, how far ahead tensors are made, and what goes wrong."""

import errno
import json
import math
import struct
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from library.models.headers import read_header
from library.models.parts import build, sources
from library.models.tensors import Reader, Source
from library.weights import files
from library.weights.checkpoints import stream
from library.weights.checkpoints.opened import open_model
from library.weights.checkpoints.stream import Planned, check_ending, write_stream
from tests.full_size import shapes
from tests.networks.tiny_families import FAMILIES, Finder


def planned(tensors: dict[str, Tensor], log: list[str] | None = None) -> list[Planned]:
    """Tensors that are there already; `log` gets the name of each when it is asked for."""

    def give(name: str) -> Tensor:
        if log is not None:
            log.append(name)
        return tensors[name]

    return [Planned(name, value.dtype, tuple(value.shape), partial(give, name)) for name, value in tensors.items()]


@pytest.mark.parametrize("threads", [1, 4])
def test_a_file_holds_what_was_planned(threads: int, tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 4),
        "a": torch.arange(5),
        "half": torch.randn(7).half(),
        "none": torch.zeros(0, 2),
        "one": torch.tensor(2.5, dtype=torch.bfloat16),
        "small": torch.randn(9).to(torch.float8_e4m3fn),
    }
    path = tmp_path / "new" / "file.safetensors"
    size = write_stream(planned(tensors), path, {"key": "value"}, "writing", threads=threads)
    found = load_file(path)
    assert size == sum(value.nbytes for value in tensors.values())
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert torch.equal(found[name].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))
    assert list(read_header(path).entries) == list(tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"key": "value"}


def test_one_thread_makes_them_in_order_and_not_too_far_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 tensors of 1 kB, at most 8 kB exist before the first is written."""
    monkeypatch.setattr(stream, "_AHEAD", 8192)
    made: list[str] = []
    tensors = {f"{number:02}": torch.full((256,), float(number)) for number in range(40)}
    most = 0

    def give(name: str) -> Tensor:
        made.append(name)
        time.sleep(0.001)
        return tensors[name]

    written: list[int] = []

    def count(tensor: Tensor) -> memoryview:
        nonlocal most
        written.append(1)
        most = max(most, len(made) - len(written))
        return plain(tensor)

    plain = files.tensor_bytes
    monkeypatch.setattr(stream, "tensor_bytes", count)
    given = [Planned(name, torch.float32, (256,), partial(give, name)) for name in tensors]
    write_stream(given, tmp_path / "file.safetensors", {}, "writing")
    assert made == sorted(tensors)
    assert most <= 8
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(tmp_path / "file.safetensors").items())


def test_threads_work_at_the_same_time(tmp_path: Path) -> None:
    """Four tensors wait for each other: with fewer threads they would wait for ever."""
    barrier = threading.Barrier(4, timeout=20)

    def give() -> Tensor:
        barrier.wait()
        return torch.ones(2)

    given = [Planned(str(number), torch.float32, (2,), give) for number in range(4)]
    write_stream(given, tmp_path / "file.safetensors", {}, "writing", threads=4)
    assert len(load_file(tmp_path / "file.safetensors")) == 4


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_leaves_the_old_file(threads: int, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"old": torch.ones(1)}, path)

    def fail() -> Tensor:
        raise UserError.single("x", "is damaged")

    given = [*planned({"a": torch.ones(4)}), Planned("b", torch.float32, (4,), fail), *planned({"c": torch.ones(4)})]
    with pytest.raises(UserError, match="is damaged"):
        write_stream(given, path, {}, "writing", threads=threads)
    assert list(load_file(path)) == ["old"] and list(tmp_path.iterdir()) == [path]
    wrong = [Planned("a", torch.float16, (4,), lambda: torch.ones(4))]
    with pytest.raises(ValueError, match="a is"):
        write_stream(wrong, path, {}, "writing")
    assert list(load_file(path)) == ["old"] and list(tmp_path.iterdir()) == [path]


def test_no_room_is_told_before_anything_is_made(tmp_path: Path) -> None:
    log: list[str] = []

    def give() -> Tensor:
        log.append("a")
        return torch.ones(1)

    given = [Planned("a", torch.float32, (1 << 50,), give)]
    with pytest.raises(UserError, match="GB left"):
        write_stream(given, tmp_path / "file.safetensors", {}, "writing")
    assert not log and not list(tmp_path.iterdir())


def test_a_disk_that_becomes_full_names_the_file(tmp_path: Path) -> None:
    def fail() -> Tensor:
        raise OSError(errno.EFBIG, "File too large")

    path = tmp_path / "file.safetensors"
    with pytest.raises(OSError, match="File too large") as caught:
        write_stream([Planned("a", torch.float32, (1,), fail)], path, {}, "writing")
    assert caught.value.filename == str(path) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "wrong"), [("x.ckpt", "ends in .ckpt"), ("x", "has no ending")])
def test_endings(name: str, wrong: str) -> None:
    check_ending(Path("x.safetensors"), "--save_to")
    with pytest.raises(UserError, match=wrong):
        check_ending(Path(name), "--save_to")


def test_many_threads_share_a_reader(tmp_path: Path) -> None:
    tensors = {str(number): torch.full((100,), float(number)) for number in range(64)}
    save_file(tensors, tmp_path / "file.safetensors")
    header = read_header(tmp_path / "file.safetensors")
    with Reader() as reader:
        given = [
            Planned(name, torch.float32, (100,), partial(reader.read, Source(name, header.path, entry, name)))
            for name, entry in header.entries.items()
        ]
        write_stream(given, tmp_path / "copy.safetensors", {}, "copying", threads=8)
    assert (tmp_path / "copy.safetensors").read_bytes() == (tmp_path / "file.safetensors").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_target_has_its_weight_in_file_and_folder(family: str, tiny_models: Finder) -> None:
    """The same values, wherever they stand; rows of joined tensors are cut out."""
    file, folder = open_model(tiny_models(f"{family}_file")), open_model(tiny_models(family))
    keys = [
        [(one.name, one.path, one.in_features, one.out_features) for one in held.targets] for held in (file, folder)
    ]
    assert keys[0] == keys[1] and file.family.name == family
    with Reader() as reader:
        for target in file.targets:
            one, other = reader.read(file.weight_of(target)), reader.read(folder.weight_of(target))
            assert torch.equal(one.flatten(), other.flatten()), target.name
            assert one.shape[0] == target.out_features


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("full", [False, True])
def test_tensors_stand_where_diffusers_converters_find_them(
    family: str, full: bool, tiny_models: Finder, tmp_path: Path
) -> None:
    """Names alone tell that; the converters need modules, which take seconds to import."""
    path = tmp_path / "model.safetensors"
    if full:
        _headers_of_full_size(family, path)
    opened = open_model(path if full else tiny_models(f"{family}_file"))
    for part in opened.info.parts:
        module = build(opened.info, part)
        expected = {one.target: one for one in sources(opened.info, part, module)}
        found = opened.places_of(part)
        for name in module.state_dict():
            assert found[name.removeprefix("text_model.")] == replace(
                expected[name], target=found[name.removeprefix("text_model.")].target
            ), name


def _headers_of_full_size(family: str, path: Path) -> None:
    """A file with the names and shapes of a whole model, and a hole where its values belong."""
    entries, place = {}, 0
    for name, shape in shapes(family).items():
        size = 2 * math.prod(shape)
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + place)


def test_what_is_no_base_model_is_told(tiny_models: Finder, tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="LoRA"):
        open_model(tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        open_model(tmp_path / "nothing.safetensors")
    tensors = load_file(tiny_models("sd1_file"))
    name = "model.diffusion_model.input_blocks.1.1.proj_in.scale_weight"
    save_file(tensors | {name: torch.ones(1)}, tmp_path / "scaled.safetensors")
    with pytest.raises(UserError, match="scaled fp8"):
        open_model(tmp_path / "scaled.safetensors")
