"""Caching goes wrong: bad pictures, kills, full disks, files that change. What was done stays, what is bad is named."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.caches import latent_files, npz
from library.data.caches.latents import LatentCache
from library.data.caches.slots import Recipe
from library.data.caches.text import TextStore
from library.data.caches.text_files import TextFiles
from library.data.caches.upkeep import look_at_latents
from library.data.plan import Plan
from library.data.sources import index
from library.errors import UserError
from library.options.specs import DatasetSpec
from tests.data.test_data_cache import Counting, build, encode, plan_for
from tests.data.test_data_text_cache import ONE, TOKENS, WIDTHS, Encoder
from tests.programs import ROOT, environment

MakePicture = Callable[..., Path]
MakeSpec = Callable[..., DatasetSpec]


@pytest.fixture
def folder(tmp_path: Path, make_picture: MakePicture) -> Path:
    """Sixteen pictures of one size."""
    for i in range(16):
        make_picture(tmp_path / "cats" / f"p{i:02d}.png", (64, 64))
    return tmp_path / "cats"


def break_pixels(path: Path) -> None:
    """Damage in the compressed data, which neither header nor end of the file tells."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(40)
    path.write_bytes(data)


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("count", [1, 12])
def test_bad_pictures_are_listed_together_at_the_end(
    folder: Path, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, to_disk: bool, count: int
) -> None:
    remembered: dict[Path, str] = {}

    def remember(found: dict[Path, str], *, before: dict[Path, index.State]) -> None:
        assert before == {path: index.state_of(path) for path in found}
        remembered.update(found)

    monkeypatch.setattr("library.data.caches.latents.remember_damages", remember)
    for i in range(count):
        break_pixels(folder / f"p{i:02d}.png")
    plan = plan_for(make_spec(folder))
    counting = Counting()
    with pytest.raises(UserError) as error:
        LatentCache.build(plan, counting, vae_id="v", to_disk=to_disk)
    lines = str(error.value).splitlines()
    assert len(lines) == min(count, 10) + (count > 10)
    assert all(re.search(rf"p{i:02d}\.png: can't be decoded", lines[i]) for i in range(min(count, 10)))
    assert count <= 10 or "2 more" in lines[-1]
    assert sum(counting.calls) == 16 - count
    assert len(list(folder.glob("*.npz"))) == (16 - count) * to_disk
    assert {path.name for path in remembered} == {f"p{i:02d}.png" for i in range(count)}


def test_the_index_is_told(folder: Path, make_spec: MakeSpec) -> None:
    break_pixels(folder / "p03.png")
    with pytest.raises(UserError):
        build(plan_for(make_spec(folder)))
    known = index.load(str(folder))
    assert "can't be decoded" in known.texts[known.names.index("p03.png")]


def test_a_picture_that_is_mended_meanwhile_is_not_remembered_as_damaged(
    folder: Path, make_spec: MakeSpec, make_picture: MakePicture
) -> None:
    for name in ("p00.png", "p15.png"):
        break_pixels(folder / name)

    def mending(pixels: torch.Tensor) -> torch.Tensor:
        make_picture(folder / "p00.png", (64, 64))
        return encode(pixels)

    with pytest.raises(UserError, match=r"p00\.png: can't be decoded"):
        LatentCache.build(plan_for(make_spec(folder)), mending, vae_id="v", to_disk=True, threads=0)
    known = index.load(str(folder))
    damaged = {name for name, text in zip(known.names, known.texts, strict=True) if "decoded" in text}
    assert damaged == {"p15.png"}


def test_pictures_that_went_away_or_changed_are_not_remembered_as_damaged(
    folder: Path, make_spec: MakeSpec, make_picture: MakePicture
) -> None:
    plan = plan_for(make_spec(folder))
    (folder / "p00.png").unlink()
    make_picture(folder / "p01.png", (70, 64))
    with pytest.raises(UserError) as error:
        build(plan)
    assert len(error.value.problems) == 2
    assert not any("decoded" in text for text in index.load(str(folder)).texts)


def test_pictures_without_finite_latents_are_collected_with_the_others(folder: Path, make_spec: MakeSpec) -> None:
    def broken(pixels: torch.Tensor) -> torch.Tensor:
        made = encode(pixels)
        made[0, 0, 0, 0] = float("inf")
        return made

    break_pixels(folder / "p07.png")
    with pytest.raises(UserError) as error:
        LatentCache.build(plan_for(make_spec(folder)), broken, vae_id="v", to_disk=True, vae_batch_size=5)
    assert len(error.value.problems) == 4
    assert sum("NaN or infinite" in str(problem) for problem in error.value.problems) == 3
    assert len(list(folder.glob("*.npz"))) == 12


PROGRAM = """
import sys, time
from pathlib import Path
from library.data.caches.latents import LatentCache
from library.data.caches.slots import Recipe
from library.data.caches.upkeep import look_at_latents
from library.data.sources import scan as sources
from library.data.plan import build_plan
from library.options.specs import DatasetSpec, SubsetSpec
from tests.data.test_data_cache import encode

def slow(pixels):
    time.sleep(0.1)
    print("encoded", flush=True)
    return encode(pixels)

spec = DatasetSpec(1, (64, 64), (SubsetSpec(Path(sys.argv[1]), caption_extension=".txt"),))
plan = build_plan([spec], sources.scan([spec]).records, 8, 1)
LatentCache.build(plan, slow, vae_id="v", to_disk=True, threads=2)
"""


def plain_plan(make_spec: MakeSpec, folder: Path) -> Plan:
    return plan_for(make_spec(folder, enable_bucket=False, batch_size=1))


def test_after_a_kill_only_the_rest_is_made(folder: Path, make_spec: MakeSpec) -> None:
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout is not None
        for _ in range(6):
            assert process.stdout.readline() == "encoded\n"
        process.send_signal(signal.SIGKILL)
    done = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
    assert 2 <= len(done) < 16
    (folder / f".p15_0064x0064_sd.npz.{latent_files._host()}-{process.pid}.tmp").write_bytes(b"half")
    counting = Counting()
    store = LatentCache.build(plain_plan(make_spec, folder), counting, vae_id="v", to_disk=True)
    assert sum(counting.calls) == 16 - len(done)
    assert {name: (folder / name).stat().st_mtime_ns for name in done} == done
    assert all(np.isfinite(store.array(i, False)).all() for i in range(16))
    assert len(list(folder.glob("*.npz"))) == 16
    assert not list(folder.glob(".*.tmp"))


def test_temporary_files_of_others_stay(tmp_path: Path) -> None:
    names = {
        f".a.npz.{latent_files._host()}-{os.getpid()}.tmp": False,
        ".b.npz.00000000-99999999.tmp": False,
        f".c.npz.{latent_files._host()}-4194304.tmp": True,
        ".d.npz.4194304.tmp": False,
        ".old.npz.00000000-7.tmp": True,
        ".older.npz.7.tmp": True,
        "old.npz.7.tmp": False,
        ".old.txt.7.tmp": False,
    }
    for name in names:
        path = tmp_path / name
        path.write_bytes(b"x")
        if "old" in name:
            os.utime(path, (time.time() - 4000,) * 2)
    found = {path.name for path in latent_files.leftovers([tmp_path, tmp_path / "missing"])}
    assert found == {name for name, left in names.items() if left}


LIMITED = (
    """
import resource
from library.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
try:
    exec(PROGRAM)
except UserError as error:
    print("problem:", error)
"""
).replace("PROGRAM", repr(PROGRAM))


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs limits of file sizes")
def test_a_disk_that_takes_no_more_is_one_line(folder: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", LIMITED, str(folder)],
        env=environment(XDG_CACHE_HOME=str(folder)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    told = [line for line in process.stdout.splitlines() if line != "encoded"]
    assert len(told) == 1, process.stdout + process.stderr
    assert re.search(
        r"problem: .*p\d\d_0064x0064_sd\.npz: can't be written \(File too large\); .*--cache_latents", told[0]
    )
    assert "Traceback" not in process.stderr
    assert "Exception ignored" not in process.stderr
    assert not list(folder.glob("*.npz")) + list(folder.glob(".*.tmp"))


class Reads:
    """Counts what is read while files are judged."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hashed: list[str] = []
        self.opened: list[str] = []
        hash_file, read = latent_files.hash_file, npz.read

        def counted_hash(path: Path) -> str:
            self.hashed.append(path.name)
            return hash_file(path)

        def counted_read(path: Path, *names: str, **how: Any) -> Any:
            self.opened.append(path.name)
            return read(path, *names, **how)

        monkeypatch.setattr(latent_files, "hash_file", counted_hash)
        monkeypatch.setattr(npz, "read", counted_read)

    def clear(self) -> None:
        self.hashed.clear()
        self.opened.clear()


def settle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all files had been left alone for a while."""
    now = time.time_ns
    monkeypatch.setattr("library.data.caches.verified.time.time_ns", lambda: now() + 10**10)


def test_what_was_verified_and_is_unchanged_is_not_read_again(
    folder: Path, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(make_spec(folder))
    build(plan)
    reads = Reads(monkeypatch)
    assert build(plan)[1] == []
    assert (len(reads.hashed), len(reads.opened)) == (16, 16)
    reads.clear()
    assert build(plan)[1] == []
    assert len(reads.hashed) == 16, "files that were just written are not trusted"
    settle(folder, monkeypatch)
    assert build(plan)[1] == []
    reads.clear()
    assert build(plan)[1] == []
    assert (reads.hashed, reads.opened) == ([], [])
    os.utime(folder / "p03.png")
    assert build(plan)[1] == []
    assert reads.hashed == ["p03.png"]
    reads.clear()
    assert sum(build(plan, vae_id="other")[1]) == 16


def test_verifying_reads_everything_all_the_same(
    folder: Path, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(make_spec(folder))
    build(plan)
    settle(folder, monkeypatch)
    build(plan)
    reads = Reads(monkeypatch)
    for afresh in (False, True):
        findings = look_at_latents(plan, Recipe("vae one"), afresh=afresh)
        assert [finding.verdict for finding in findings] == ["ours"] * 16
        assert len(reads.hashed) == 16 * afresh


@pytest.mark.parametrize("change", ["picture", "arrays", "entry", "other file"])
def test_a_change_that_hides_its_size_and_time_is_found(
    folder: Path, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    plan = plan_for(make_spec(folder))
    build(plan)
    settle(folder, monkeypatch)
    build(plan)
    path = folder / ("p05.png" if change == "picture" else "p05_0064x0064_sd.npz")
    before = path.stat()
    if change == "picture":
        Image.new("RGB", (64, 64), "red").save(path)
        path.write_bytes(path.read_bytes() + bytes(before.st_size - path.stat().st_size))
    elif change == "other file":
        path.write_bytes((folder / "p06_0064x0064_sd.npz").read_bytes())
    else:
        held = npz.read(path)
        if change == "arrays":
            held["latents"] += 1
        else:
            held["lorasmith"] = np.array(str(held["lorasmith"]).replace('"vae": "vae one"', '"vae": "vae two"'))
        npz.write(path, held)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert sum(build(plan)[1]) == 1


def test_a_memory_that_cannot_be_used_is_no_harm(
    folder: Path, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = plan_for(make_spec(folder))
    build(plan)
    settle(folder, monkeypatch)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build(plan)[1] == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "good"))
    assert build(plan)[1] == []
    (stored,) = (tmp_path / "good" / "lorasmith" / "verified").iterdir()
    for content in ("", "[]", '{"p00_0064x0064_sd.npz": 3}', "\0"):
        stored.write_text(content)
        assert build(plan)[1] == []


def test_pictures_that_vanish_while_files_are_judged(
    folder: Path, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(make_spec(folder))
    build(plan)
    (folder / "p00.png").unlink()
    with pytest.raises(UserError, match=r"p00\.png: can't be") as error:
        build(plan)
    assert len(error.value.problems) == 1


def test_text_files_are_not_read_again_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(tmp_path / f"{i}.png", f"a cat {i}") for i in range(5)]

    def filled() -> int:
        files = TextFiles(pairs, encoder_id="id", tokens=TOKENS, widths=WIDTHS)
        store = TextStore(Encoder(), memo_bytes=10 * ONE, files=files)
        store.fill([caption for _, caption in pairs])
        return store.encodings

    assert filled() == 5
    settle(tmp_path, monkeypatch)
    reads = Reads(monkeypatch)
    assert filled() == 0
    assert len(reads.opened) == 5
    reads.clear()
    assert filled() == 0
    assert reads.opened == []
    pairs[2] = (pairs[2][0], "another cat")
    assert filled() == 1
