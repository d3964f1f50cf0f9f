"""Several runs on one folder: each finds its own files, and none trains on those of another."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image

from library.data.caches import npz
from library.data.caches.latents import LatentCache, LatentStore
from library.data.caches.text import TextStore
from library.data.caches.text_files import TextFiles
from library.data.caches.verified import Verified
from library.data.plan import Plan
from library.errors import UserError
from library.options.specs import DatasetSpec, SubsetSpec
from tests.data.test_data_cache import build, encode, expected, plan_for, write_foreign
from tests.data.test_data_text_cache import ONE, TOKENS, WIDTHS, Encoder, same

MakePicture = Callable[..., Path]
MakeSpec = Callable[..., DatasetSpec]

REPLACED = r"_sd\.npz: another run has replaced it; start again, or use --cache_latents"


@pytest.fixture
def folder(tmp_path: Path, make_picture: MakePicture) -> Path:
    """Two pictures that get another bucket at 96 pixels."""
    for name in ("a.png", "b.png"):
        make_picture(tmp_path / "cats" / name, (120, 120))
    return tmp_path / "cats"


def sizes(make_spec: MakeSpec, folder: Path) -> tuple[DatasetSpec, DatasetSpec]:
    return make_spec(folder), make_spec(folder, resolution=(96, 96))


def test_runs_of_two_sizes_keep_their_files(folder: Path, make_spec: MakeSpec) -> None:
    calls = []
    for spec in sizes(make_spec, folder) * 2:
        plan = plan_for(spec)
        store, made = build(plan)
        calls.append(sum(made))
        assert all(torch.allclose(store.get(i, False), expected(plan, i, False), atol=1e-6) for i in range(2))
    assert calls == [2, 2, 0, 0]
    assert {path.name for path in folder.glob("*.npz")} == {
        f"{name}_{middle}_sd.npz" for name in "ab" for middle in ("0120x0120", "120x120_96x96")
    }


def test_another_vae_or_precision_takes_the_place_of_the_first(folder: Path, make_spec: MakeSpec) -> None:
    recipes: list[dict[str, Any]] = [{}, {"vae_id": "two"}, {"vae_id": "two", "dtype": "float16"}]
    for how in recipes:
        assert sum(build(plan_for(make_spec(folder)), **how)[1]) == 2
        assert len(list(folder.glob("*.npz"))) == 2


def test_a_damaged_file_of_another_size_is_replaced(folder: Path, make_spec: MakeSpec) -> None:
    small, large = sizes(make_spec, folder)
    build(plan_for(small))
    path = folder / "a_0120x0120_sd.npz"
    npz.write(path, {**npz.read(path), "latents": np.zeros(3, np.float32)})
    build(plan_for(large))
    assert sorted(found.name for found in folder.glob("a*.npz")) == ["a_0120x0120_sd.npz"]
    assert npz.read(path)["latents"].shape == (4, 12, 12)


def test_a_run_that_came_later_takes_no_name_that_was_free(folder: Path, make_spec: MakeSpec) -> None:
    small, large = (plan_for(spec) for spec in sizes(make_spec, folder))
    late = LatentCache(large, vae_id="vae one", to_disk=True)
    first, _ = build(small)
    second = late.fill(encode)
    for store, plan in ((first, small), (second, large)):
        assert all(torch.allclose(store.get(i, False), expected(plan, i, False), atol=1e-6) for i in range(2))


def by_ranks(plan: Plan, ranks: int) -> list[LatentStore]:
    """What each of several processes reads that start at the same time."""
    caches = [
        LatentCache(plan, vae_id="vae one", to_disk=True, rank=rank, world_size=ranks, threads=2)
        for rank in range(ranks)
    ]
    stores: list[LatentStore] = []

    def others() -> None:
        stores.extend(cache.fill(encode) for cache in caches[1:])

    return [caches[0].fill(encode, wait=others), *stores]


def test_a_file_that_another_run_replaced_is_not_read(folder: Path, make_spec: MakeSpec) -> None:
    """Also one that another process of this run made."""
    plan = plan_for(make_spec(folder), processes=2)
    stores = by_ranks(plan, 2)
    assert all(np.isfinite(store.array(record, False)).all() for store in stores for record in (0, 1))
    build(plan, vae_id="another")
    for store in stores:
        for record in (0, 1):
            with pytest.raises(UserError, match=REPLACED):
                store.array(record, False)


def test_no_process_takes_the_file_of_a_picture_that_shared_a_stem(folder: Path, make_spec: MakeSpec) -> None:
    Image.new("RGB", (120, 120), "red").save(folder / "b.jpg")
    build(plan_for(make_spec(folder)))
    (folder / "b.jpg").unlink()
    plan = plan_for(make_spec(folder), processes=2)
    for store in by_ranks(plan, 2):
        assert all(torch.allclose(store.get(i, False), expected(plan, i, False), atol=1e-6) for i in range(2))


def test_a_file_of_another_size_in_its_place_is_not_read(folder: Path, make_spec: MakeSpec) -> None:
    small, large = (plan_for(spec) for spec in sizes(make_spec, folder))
    store, _ = build(small)
    for path in folder.glob("*.npz"):
        path.unlink()
    build(large)
    with pytest.raises(UserError, match=r"a_0120x0120" + REPLACED):
        store.array(0, False)


def test_a_foreign_file_that_changed_is_not_read(folder: Path, make_spec: MakeSpec) -> None:
    plan = plan_for(make_spec(folder))
    write_foreign(plan, 0, folder / "a_0120x0120_sd.npz")
    store, calls = build(plan)
    assert sum(calls) == 1
    write_foreign(plan, 0, folder / "a_0120x0120_sd.npz")
    os.utime(folder / "a_0120x0120_sd.npz", (2e9, 2e9))
    with pytest.raises(UserError, match=REPLACED):
        store.array(0, False)


def test_a_file_that_was_made_anew_in_the_same_way_is_read(folder: Path, make_spec: MakeSpec) -> None:
    plan = plan_for(make_spec(folder))
    store, _ = build(plan)
    for path in folder.glob("*.npz"):
        path.unlink()
    build(plan)
    for _ in range(2):
        assert torch.allclose(store.get(0, False), expected(plan, 0, False), atol=1e-6)


def test_a_mask_is_not_put_into_a_file_that_another_run_replaced(folder: Path, make_spec: MakeSpec) -> None:
    build(plan_for(make_spec(folder)))
    plan = plan_for(make_spec(folder, alpha_mask=True))
    cache = LatentCache(plan, vae_id="vae one", to_disk=True)
    build(plan_for(make_spec(folder)), vae_id="another")
    with pytest.raises(UserError, match=r"a_0120x0120_sd\.npz: can't be read any more \(changed"):
        cache.fill(encode)


SETTINGS: tuple[tuple[dict[str, Any], ...], ...] = (
    ({},),
    ({"resolution": (96, 96)},),
    ({}, {"resolution": (96, 96)}),
    ({"resolution": (96, 96)}, {}),
    ({"resize_interpolation": "cubic"},),
    ({"resolution": (96, 96)}, {"resolution": (96, 96), "resize_interpolation": "cubic"}),
    ({"resolution": (96, 96), "resize_interpolation": "cubic"}, {"resize_interpolation": "cubic"}, {}),
)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    return lambda: tmp_path_factory.mktemp("cats")


@examples(deadline=None, max_examples=25)
@given(runs=st.lists(st.sampled_from(SETTINGS), min_size=2, max_size=5), ranks=st.integers(1, 2))
def test_whatever_ran_before_each_run_reads_its_own(
    places: Callable[[], Path], runs: list[tuple[dict[str, Any], ...]], ranks: int
) -> None:
    folder = places()
    for number, name in enumerate(("p.jpg", "p.png", "q.png", "p.png.png")):
        colours = np.random.default_rng(number).integers(0, 255, (120, 120, 3), np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 1 + number % 3
        Image.fromarray(colours).save(folder / name, exif=exif)
    for settings in runs:
        specs = []
        for change in settings:
            how = dict(change)
            size = how.pop("resolution", (64, 64))
            specs.append(DatasetSpec(1, size, (SubsetSpec(folder, caption_extension=".txt", **how),)))
        plan = plan_for(*specs, processes=ranks)
        for store in by_ranks(plan, ranks):
            for record in range(len(plan.records)):
                assert torch.allclose(store.get(record, False), expected(plan, record, False), atol=1e-6)
        assert build(plan)[1] == []


def filled(pairs: list[tuple[Path, str]], encoder_id: str = "id", **how: Any) -> tuple[TextStore, Encoder]:
    encoder = Encoder()
    files = TextFiles(pairs, encoder_id=encoder_id, tokens=TOKENS, widths=WIDTHS)
    store = TextStore(encoder, memo_bytes=ONE // 2, files=files)
    store.fill([caption for _, caption in pairs], **how)
    return store, encoder


def test_a_text_file_that_another_run_replaced_is_not_read(tmp_path: Path) -> None:
    pairs = [(tmp_path / "a.png", "a cat"), (tmp_path / "b.png", "a dog")]
    other, encoder = filled(pairs, rank=1, world_size=2)
    store, _ = filled(pairs, rank=0, world_size=2)
    for one in (store, other):
        assert all(same(one([caption]), encoder.expected(caption)) for _, caption in pairs)
    filled(pairs, encoder_id="another")
    wrong = r"_te_outputs\.npz: another run has replaced it; start again, or use --cache_text_encoder_outputs"
    for one in (store, other):
        one(["what the memo keeps"])
        for caption in ("a cat", "a dog"):
            with pytest.raises(UserError, match=wrong):
                one([caption])
    filled(pairs)
    for one in (store, other):
        assert all(same(one([caption]), encoder.expected(caption)) for _, caption in pairs)


def test_a_text_file_of_another_process_is_looked_at_before_it_is_used(tmp_path: Path) -> None:
    pairs = [(tmp_path / "a.png", "a cat"), (tmp_path / "b.png", "a dog")]
    store, _ = filled(pairs, rank=0, world_size=2)
    filled(pairs, encoder_id="another")
    with pytest.raises(UserError, match=r"b_te_outputs\.npz: another run has replaced it"):
        store(["a dog"])


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all files had been left alone for a while."""
    now = time.time_ns
    monkeypatch.setattr("library.data.caches.verified.time.time_ns", lambda: now() + 10**10)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("moment", ["while it is judged", "before it is saved", "never"])
def test_nothing_is_remembered_of_a_file_that_changes_meanwhile(tmp_path: Path, moment: str) -> None:
    path, picture = tmp_path / "a.npz", tmp_path / "a.png"
    for one in (path, picture):
        one.write_bytes(b"first")
    asked: list[str] = []

    def judge() -> str:
        asked.append("")
        if moment == "while it is judged" and len(asked) == 1:
            picture.write_bytes(b"other")
        return "ours"

    known = Verified(("ours",))
    assert known.verdict([path, picture], "claim", judge) == "ours"
    if moment == "before it is saved":
        path.write_bytes(b"other")
    known.save()
    assert Verified(("ours",)).verdict([path, picture], "claim", judge) == "ours"
    assert len(asked) == (1 if moment == "never" else 2)
