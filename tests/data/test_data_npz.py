"""The fast reader of .npz files gives what numpy gives, and nothing for files that numpy refuses."""

import os
import pickle
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from hypothesis.extra import numpy as some

from library.data.caches import npz

DTYPES = ["<f4", "<f2", "<f8", "|u1", "<i8", "|b1", "<U7", "|S3", ">f4", "<c8"]
NAMES = st.text("abcdefgh_12.", min_size=1, max_size=12).filter(
    lambda name: not name.endswith(".npy") and name != "file"
)
quick = examples(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def arrays() -> st.SearchStrategy[Any]:
    shapes = some.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
    return st.sampled_from(DTYPES).flatmap(lambda dtype: some.arrays(np.dtype(dtype), shapes))


def by_numpy(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == array.dtype
        and found[name].shape == array.shape
        and found[name].tobytes() == array.tobytes()
        for name, array in expected.items()
    )


@quick
@given(st.dictionaries(NAMES, arrays(), max_size=5), st.booleans(), st.booleans())
def test_as_numpy_reads_it(tmp_path: Path, held: dict[str, np.ndarray], fortran: bool, compressed: bool) -> None:
    path = tmp_path / "a.npz"
    given_arrays = {name: np.asfortranarray(array) if fortran else array for name, array in held.items()}
    if compressed:
        np.savez_compressed(path, allow_pickle=False, **given_arrays)
    else:
        npz.write(path, given_arrays)
    expected = by_numpy(path)
    assert expected.keys() == held.keys()
    assert same(npz.read(path), expected)
    assert same(npz.read(path, checked=True), expected)
    first = next(iter(held), "none")
    assert same(npz.read(path, first, "absent"), {name: expected[name] for name in expected if name == first})


@quick
@given(st.data())
def test_damage_never_gives_other_numbers_when_checked(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.npz"
    held = {"latents": np.arange(48, dtype=np.float32).reshape(3, 4, 4), "text": np.array("some words")}
    npz.write(path, held)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    try:
        found = npz.read(path, checked=True)
    except npz.UNREADABLE:
        return
    for name in found.keys() & held.keys():
        assert found[name].tobytes() == held[name].tobytes() or found[name].dtype != held[name].dtype


@pytest.mark.parametrize("checked", [True, False])
def test_a_damaged_kind_of_numbers_is_unreadable(tmp_path: Path, checked: bool) -> None:
    path = tmp_path / "a.npz"
    npz.write(path, {"latents": np.zeros((3, 4), np.float32)})
    whole = path.read_bytes()
    assert whole.count(b"<f4") == 1
    path.write_bytes(whole.replace(b"<f4", b"<f5"))
    with pytest.raises(npz.UNREADABLE):
        npz.read(path, checked=checked)


def test_what_is_read_may_be_changed(tmp_path: Path) -> None:
    npz.write(tmp_path / "a.npz", {"a": np.zeros(5, np.float32)})
    found = npz.read(tmp_path / "a.npz")["a"]
    found += 1
    assert found.flags.owndata
    assert found.flags.aligned


class Trap:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["object array", "pickle member", "plain pickle"])
def test_pickles_are_never_loaded(tmp_path: Path, kind: str) -> None:
    path, sprung = tmp_path / "a.npz", tmp_path / "sprung"
    if kind == "object array":
        np.savez(path, a=np.array([Trap(sprung)], dtype=object), b=np.zeros(2))
    elif kind == "pickle member":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a.npy", pickle.dumps(Trap(sprung)))
    else:
        path.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(npz.UNREADABLE):
        npz.read(path, "a")
    assert not sprung.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\5\6" + bytes(18), b"PK\3\4" + bytes(100)])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    try:
        expected = by_numpy(path)
    except npz.UNREADABLE:
        with pytest.raises(npz.UNREADABLE):
            npz.read(path)
        return
    assert npz.read(path) == expected


def test_the_last_entry_of_a_name_counts_and_others_are_let_be(tmp_path: Path) -> None:
    one, two, path = tmp_path / "one.npy", tmp_path / "two.npy", tmp_path / "a.npz"
    np.save(one, np.zeros(3))
    np.save(two, np.ones(3))
    with zipfile.ZipFile(path, "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.write(one, "a.npy")
        file.write(two, "a.npy")
    assert npz.read(path)["a"].tolist() == by_numpy(path)["a"].tolist() == [1, 1, 1]
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("notes.txt", "hello")
        file.writestr("ä.npy", two.read_bytes())
        file.comment = b"a remark"
    assert npz.read(path, "ä")["ä"].tolist() == [1, 1, 1]


def test_many_threads(tmp_path: Path) -> None:
    for i in range(8):
        npz.write(tmp_path / f"{i}.npz", {"a": np.full((4, 8, 8), i, np.float32), "b": np.array("x" * i)})
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: npz.read(tmp_path / f"{i % 8}.npz"), range(1000)))
    assert all((one["a"] == i % 8).all() and len(str(one["b"])) == i % 8 for i, one in enumerate(found))


def test_nothing_is_left_of_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        npz.write(tmp_path / "missing" / "a.npz", {"a": np.zeros(3)})
