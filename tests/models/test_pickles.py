"""PyTorch pickles are read without torch and without running what is in them."""

import builtins
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from library.errors import UserError
from library.models.headers import Header
from library.models.pickles import read_weights

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn}
DTYPES |= {"U16": torch.uint16}


def read(header: Header, name: str) -> torch.Tensor:
    """A tensor by its place in the file, as the loader takes it."""
    entry = header.entries[name]
    with header.path.open("rb") as file:
        file.seek(entry.start)
        raw = bytearray(file.read(entry.end - entry.start))
    if not raw:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    values = torch.frombuffer(raw, dtype=torch.uint8).view(DTYPES[entry.dtype])
    return values.view(entry.shape) if entry.stride is None else values.as_strided(entry.shape, entry.stride)


def samples() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    base = torch.randn(6, 8)
    return {
        "plain": torch.randn(3, 4, 1, 1),
        "half": torch.randn(5, 7).half(),
        "brain": torch.randn(5).bfloat16(),
        "double": torch.randn(2, 2).double(),
        "number": torch.tensor(3.0),
        "ids": torch.arange(77)[None],
        "flags": torch.tensor([True, False]),
        "turned": base.T,
        "rows": base[2:5],
        "columns": base[:, 1:4],
        "whole": base,
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "none": torch.empty(0, 4),
    }


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        read_weights(path, str(path))
    (problem,) = raised.value.problems
    return str(problem)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_the_tensors_are_those_that_torch_loads(zipped: bool, nested: bool, tmp_path: Path) -> None:
    tensors = samples()
    if zipped:
        tensors["short"] = torch.arange(5).to(torch.uint16)
        tensors["eighth"] = torch.randn(4).to(torch.float8_e4m3fn)
    path = tmp_path / "model.ckpt"
    state = torch.nn.ParameterDict({"weight": torch.nn.Parameter(torch.randn(2, 3))}).state_dict()
    tensors |= state
    content: Any = type(state)(tensors)
    content._metadata = {"": {"version": 1}}
    if nested:
        content = {"epoch": 3, "lr": 1e-4, "note": "é", "state_dict": content, "optimizer_states": [{"step": 1}]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    loaded = torch.load(path, weights_only=True)
    expected = loaded["state_dict"] if nested else loaded
    header = read_weights(path, "here")
    assert list(header.entries) == list(expected)
    for name, value in expected.items():
        found = read(header, name)
        assert found.dtype == value.dtype and found.shape == value.shape, name
        assert torch.equal(found.float(), value.float()), name
    assert header.entries["rows"].stride is None and header.entries["turned"].stride == (1, 8)


class Evil:
    """Would write a file when unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.made = (call, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.made


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("call", [os.system, builtins.eval, builtins.getattr, builtins.open])
def test_code_never_runs(zipped: bool, call: Callable[..., Any], tmp_path: Path) -> None:
    target = tmp_path / "written"
    arguments: dict[Any, tuple[Any, ...]] = {
        os.system: (f"touch {target}",),
        builtins.eval: (f"open({str(target)!r}, 'w')",),
        builtins.open: (str(target), "w"),
        builtins.getattr: ({}, "pop"),
    }
    path = tmp_path / "evil.ckpt"
    content = {"weight": torch.zeros(2), "x": Evil(call, *arguments[call])}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refusal(path)
    assert f".{call.__name__}, which could run code" in message and ".safetensors" in message
    assert not target.exists()


def test_the_stand_ins_cannot_be_changed(tmp_path: Path) -> None:
    """A pickle that gives a function's stand-in a new state, in each of the forms that pickles have for it."""
    good = tmp_path / "good.pt"
    torch.save({"weight": torch.ones(3)}, good)
    name = b"ctorch._utils\n_rebuild_tensor_v2\n"
    states = [b"}U\x04callNs", b"N}U\x04callNs\x86", b"]Na", b"}U\x08__call__Ns"]
    for state in states:
        path = tmp_path / "bad.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", b"\x80\x02" + name + state + b"b.")
        assert "damaged" in refusal(path)
    assert torch.equal(read(read_weights(good, ""), "weight"), torch.ones(3))


def test_unknown_classes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "lightning.ckpt"
    names = b"\x80\x02}U\x09callbackscpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n)\x81s."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", names)
    assert "needs pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint, which could run code" in refusal(path)


def rewrite(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """A zip archive again, with other members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size if size < 0 else size)


@pytest.mark.parametrize(
    ("damage", "zipped", "said"),
    [
        (lambda path: rewrite(path, lambda _, c: c, zipfile.ZIP_DEFLATED), True, "is compressed"),
        (lambda path: rewrite(path, lambda n, c: b"big" if n.endswith("byteorder") else c), True, "big-endian"),
        (lambda path: rewrite(path, lambda n, c: c[:-1] if "/data/" in n else c), True, "damaged"),
        (lambda path: rewrite(path, lambda n, c: c[:40] if n.endswith(".pkl") else c), True, "damaged"),
        (lambda path: cut(path, -30), True, "truncated"),
        (lambda path: cut(path, 2000), True, "truncated"),
        (lambda path: cut(path, -30), False, "is truncated"),
        (lambda path: cut(path, 60), False, "damaged"),
        (lambda path: cut(path, 5), True, "truncated"),
        (lambda path: path.write_bytes(b"<html>not found</html>"), True, "neither a PyTorch pickle"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1})), True, "not one that torch.save wrote"),
        (lambda path: torch.save([1, 2], path), True, "holds no named tensors"),
        (lambda path: torch.save(torch.zeros(2), path), True, "holds no named tensors"),
        (lambda path: zipfile.ZipFile(path, "w").writestr("readme.txt", "hello"), True, "a zip archive, but not"),
    ],
)
def test_damaged_pickles(damage: Callable[[Path], object], zipped: bool, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"weight": torch.randn(300, 3)}, path, _use_new_zipfile_serialization=zipped)
    damage(path)
    assert said in refusal(path)


def encrypt(path: Path, member: str) -> None:
    """Mark a member as encrypted, in its own header and in the archive's list."""
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith(member))
        places = [info.header_offset + 6, raw.index(info.filename.encode(), archive.start_dir) - 46 + 8]
    for place in places:
        raw[place] |= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("member", ["data.pkl", "byteorder", "data/0"])
def test_encrypted_members_are_named(member: str, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"weight": torch.zeros(4)}, path)
    encrypt(path, member)
    message = refusal(path)
    assert f"/{member} is compressed or encrypted; convert it" in message


@pytest.mark.parametrize("member", ["data.pkl", "byteorder"])
def test_compressed_members_are_named(member: str, tmp_path: Path) -> None:
    """A broken stream of a member that PyTorch never compresses isn't even opened."""
    path = tmp_path / "model.ckpt"
    names = {"a/data.pkl": b"\x80\x02}.", "a/byteorder": b"little"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in names.items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if name.endswith(member) else zipfile.ZIP_STORED)
        start = next(info.header_offset + 30 + len(info.filename) for info in archive.infolist()
                     if info.filename.endswith(member))  # fmt: skip
    raw = bytearray(path.read_bytes())
    raw[start : start + 2] = b"\xff\xff"
    path.write_bytes(bytes(raw))
    assert f"a/{member} is compressed or encrypted" in refusal(path)


def test_a_byteorder_of_any_length_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"weight": torch.zeros(4)}, path)
    rewrite(path, lambda name, content: b"little" * 1000 if name.endswith("byteorder") else content)
    assert "damaged zip archive" in refusal(path)


def test_a_storage_that_is_too_short_is_refused(tmp_path: Path) -> None:
    """A tensor that reaches behind its storage would show other bytes of the file."""
    path = tmp_path / "model.ckpt"
    torch.save({"weight": torch.zeros(4)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert content.count(b"K\x04\x85") == 1
    path.write_bytes(content.replace(b"K\x04\x85", b"K\x44\x85"))
    assert "larger than its storage" in refusal(path)


def test_a_safetensors_file_with_a_pickles_ending_is_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "model.bin")
    assert torch.equal(read(read_weights(tmp_path / "model.bin", ""), "weight"), torch.ones(2))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_model_out_of_a_pickle_is_the_same(family: str, tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    """Also where its tensors are stored in another order than row after row."""
    from library.models.inspect import inspect
    from library.models.load import load
    from tests.original_layout import original_tensors

    tensors = {name: torch.from_numpy(array.copy()) for name, array in original_tensors(tiny_models(family)).items()}
    turned = {2: lambda value: value.T.contiguous().T, 4: lambda v: v.contiguous(memory_format=torch.channels_last)}
    torch.save({"state_dict": tensors}, tmp_path / "plain.ckpt")
    torch.save(tensors, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    strided = {name: turned.get(value.ndim, lambda v: v)(value) for name, value in tensors.items()}
    torch.save(strided, tmp_path / "strided.ckpt")
    expected = load(inspect(tiny_models(family)))
    for name in ("plain.ckpt", "legacy.pt", "strided.ckpt"):
        found = load(inspect(tmp_path / name))
        for mine, its in zip(
            (found.unet, found.vae, *found.text_encoders),
            (expected.unet, expected.vae, *expected.text_encoders),
            strict=True,
        ):
            assert mine is not None and its is not None
            state = its.state_dict()
            assert all(torch.equal(value, state[key]) for key, value in mine.state_dict().items())


def test_torch_is_not_needed(tmp_path: Path, repo_root: Path) -> None:
    torch.save({"weight": torch.ones(2, 2).T}, tmp_path / "model.pt")
    code = (
        "import sys; from pathlib import Path; from library.models.pickles import read_weights\n"
        "print(list(read_weights(Path(sys.argv[1]), '').entries)); assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "['weight']", done.stderr
