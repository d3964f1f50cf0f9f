"""Weight files: written whole or not at all, the same bytes each time, and readable by the safetensors library."""

import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from library.errors import UserError
from library.weights.files import (
    atomic_write,
    read_metadata,
    read_tensors,
    safetensors_header,
    save_pickle,
    save_safetensors,
    tensor_bytes,
    tensor_order,
)

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def mixed() -> dict[str, torch.Tensor]:
    """Tensors of every dtype, a scalar, an empty one and one that is not contiguous."""
    tensors = {f"z.{dtype}": torch.arange(3).to(dtype) for dtype in DTYPES}
    return tensors | {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.arange(6.0).view(2, 3).t(),
    }


def test_the_file_is_the_librarys_byte_for_byte(tmp_path: Path) -> None:
    tensors = mixed()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    for metadata in ({"a": 'é\n\x01\x7f"\\'}, {}):
        save_safetensors(tensors, tmp_path / "ours.safetensors", metadata)
        assert (tmp_path / "ours.safetensors").read_bytes() == save(contiguous, metadata or None)


def test_metadata_and_tensors_come_back(tmp_path: Path) -> None:
    metadata = {f"key {number}": "ü" * number for number in range(20)}
    path = tmp_path / "new folder" / "a.safetensors"
    save_safetensors(mixed(), path, metadata)
    assert read_metadata(path) == metadata
    loaded = load_file(path)
    for name, tensor in mixed().items():
        assert loaded[name].dtype == tensor.dtype
        assert bytes(tensor_bytes(loaded[name])) == bytes(tensor_bytes(tensor))
        assert loaded[name].shape == tensor.shape
    assert read_tensors(path).keys() == loaded.keys()


def test_the_same_content_gives_the_same_bytes_whatever_the_order_of_tensors(tmp_path: Path) -> None:
    tensors = mixed()
    save_safetensors(tensors, tmp_path / "a.safetensors", {"b": "1", "a": "2"})
    save_safetensors(dict(reversed(tensors.items())), tmp_path / "b.safetensors", {"b": "1", "a": "2"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_header_and_parts_make_up_the_file(tmp_path: Path) -> None:
    tensors = mixed()
    save_safetensors(tensors, tmp_path / "a.safetensors", {"x": "y"})
    parts = [bytes(tensor_bytes(tensors[name])) for name in tensor_order(tensors)]
    assert (tmp_path / "a.safetensors").read_bytes() == safetensors_header(tensors, {"x": "y"}) + b"".join(parts)


@pytest.mark.parametrize("when", ["while writing", "while checking"])
def test_a_failure_midway_leaves_the_old_file_and_nothing_else(tmp_path: Path, when: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def refuse(written: Path) -> None:
        assert written.read_bytes() == b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), atomic_write(path, refuse) as file:
        file.write(b"half")
        if when == "while writing":
            raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder/real")
    for text in (b"new", b"newer"):
        with atomic_write(tmp_path / "link") as file:
            file.write(text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "folder/real").read_bytes() == text
    with pytest.raises(UserError, match="is a folder"):
        read_tensors(tmp_path / "folder")


def test_a_new_file_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    with atomic_write(tmp_path / "a") as file:
        file.write(b"x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_torch_files_are_read_without_running_code(tmp_path: Path) -> None:
    save_pickle({"a": torch.ones(2)}, tmp_path / "a.ckpt")
    assert torch.equal(read_tensors(tmp_path / "a.ckpt")["a"], torch.ones(2))
    torch.save(Path("x"), tmp_path / "object.pt")
    torch.save([1], tmp_path / "list.pt")
    for name in ("object.pt", "list.pt"):
        with pytest.raises(UserError, match=name):
            read_tensors(tmp_path / name)
