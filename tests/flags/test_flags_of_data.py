"""Flags of caches, and those flags of the data that have no key in a dataset file: what is encoded, kept and read.

Keys of dataset files, most of which are flags, too: tests/data/test_dataset_options.py.
"""

import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library.conditioning import Conditioning
from library.data.loader import Batch, Loader
from library.data.pixels import decoded
from library.models.model import Model
from library.models.sd1 import SD1
from library.training.objective import Objective
from tests.flags.effects import Runs, observes, same

pytestmark = pytest.mark.xdist_group("flags of data")
STILL = ("--learning_rate", "1e-12", "--network_train_unet_only")
EPOCH = (*STILL, "--max_train_epochs", "1")


@dataclass
class Work:
    """What a model was asked to encode: pictures per call, texts per call; and the batches of the loader."""

    pictures: list[int] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    """Runs are watched while this is in use."""
    seen = Work()
    images, prompts, make = Model.encode_images, SD1.encode_prompts, Loader._make

    def watched_images(self: Model, pixels: torch.Tensor, *, moments: bool = False) -> torch.Tensor:
        seen.pictures.append(len(pixels))
        return images(self, pixels, moments=moments)

    def watched_prompts(self: SD1, captions: Sequence[str]) -> Conditioning:
        seen.texts.append(len(captions))
        return prompts(self, captions)

    def watched_make(self: Loader, *arguments: Any) -> Batch:
        seen.threads.add(threading.current_thread().name.partition("_")[0])
        batch = make(self, *arguments)
        seen.batches.append(batch)
        return batch

    monkeypatch.setattr(Model, "encode_images", watched_images)
    monkeypatch.setattr(SD1, "encode_prompts", watched_prompts)
    monkeypatch.setattr(Loader, "_make", watched_make)
    return seen


@pytest.fixture
def pictures(runs: Runs, tmp_path: Path) -> Path:
    """Copies of two of the usual pictures, to be written to: four steps an epoch."""
    folder = tmp_path / "data" / "2_thing"
    folder.mkdir(parents=True)
    for path in (runs.root / "pictures" / "2_thing").glob("picture0[01].*"):
        shutil.copy(path, folder)
    return folder


@observes("cache_latents", "vae_batch_size", "max_data_loader_n_workers")
def test_pictures_are_encoded_once_and_as_many_at_a_time_as_asked(runs: Runs, work: Work, pictures: Path) -> None:
    data = (*EPOCH, "--train_data_dir", str(pictures.parent))
    plain = runs.fresh(*data)
    assert work.pictures == [1] * 4 and work.threads == {"MainThread"}
    work.pictures.clear()
    cached = runs.fresh(*data, "--cache_latents")
    assert work.pictures == [1] * 2 and same(plain, cached)
    work.pictures.clear()
    work.threads.clear()
    many = runs.fresh(*data, "--cache_latents", "--vae_batch_size", "3", "--max_data_loader_n_workers", "2")
    assert work.pictures == [2] and same(plain, many) and work.threads == {"data"}


@observes("cache_latents_to_disk", "skip_cache_check")
def test_latents_on_disk_are_believed_only_if_told_so(runs: Runs, work: Work, pictures: Path) -> None:
    data = ("--train_data_dir", str(pictures.parent), "--cache_latents_to_disk")
    first = runs.fresh(*STILL, *data)
    assert len(list(pictures.glob("*_sd.npz"))) == 2 and sum(work.pictures) == 2
    picture = pictures / "picture01.png"
    times = picture.stat()
    Image.new("RGB", (64, 64), "red").save(picture)
    os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns))
    work.pictures.clear()
    believed = runs.fresh(*STILL, *data, "--skip_cache_check")
    assert not work.pictures and believed.losses == first.losses
    runs.fresh(*STILL, *data)
    assert sum(work.pictures) == 1


@observes("trust_foreign_caches")
def test_latents_of_sd_scripts_are_used_unless_told_otherwise(runs: Runs, work: Work, pictures: Path) -> None:
    for picture in pictures.glob("picture*.[jp][pn]g"):
        path = pictures / f"{picture.stem}_0064x0064_sd.npz"
        latents = np.full((4, 8, 8), 0.25, np.float32)
        np.savez(path, latents=latents, original_size=np.array([64, 64]), crop_ltrb=np.array([0, 0, 64, 64]))
        later = picture.stat().st_mtime + 10
        os.utime(path, (later, later))
    data = ("--train_data_dir", str(pictures.parent), "--cache_latents_to_disk")
    trusted = runs.fresh(*STILL, *data)
    assert not work.pictures and "2 cached latents of another program are used" in trusted.err
    anew = runs.fresh(*STILL, *data, "--trust_foreign_caches", "no")
    assert sum(work.pictures) == 2
    usual = runs.fresh(*STILL, "--train_data_dir", str(pictures.parent))
    assert anew.losses == pytest.approx(usual.losses, rel=1e-4) != pytest.approx(trusted.losses, rel=1e-3)


@observes("latent_sampling")
def test_latents_may_be_drawn_anew_each_time(runs: Runs, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (*EPOCH, "--train_data_dir", str(pictures.parent))
    found: list[torch.Tensor] = []
    add = Objective.add_noise

    def watched(self: Objective, latents: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        found.append(latents)
        return add(self, latents, *others)

    monkeypatch.setattr(Objective, "add_noise", watched)
    runs.fresh(*data)
    means = {tensor.numpy().tobytes() for tensor in found}
    found.clear()
    runs.fresh(*data, "--latent_sampling", "sample")
    assert len(means) == 2 and len({tensor.numpy().tobytes() for tensor in found}) == 4


@observes("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "text_memo_mb")
def test_texts_are_encoded_once_and_kept_where_asked(runs: Runs, work: Work, pictures: Path) -> None:
    data = (*EPOCH, "--train_data_dir", str(pictures.parent))
    usual = runs.fresh(*data)
    assert sum(work.texts) == 2
    work.texts.clear()
    assert same(usual, runs.fresh(*data, "--text_memo_mb", "0")) and 2 < sum(work.texts) <= 4
    work.texts.clear()
    kept = runs.fresh(*data, "--cache_text_encoder_outputs")
    assert sum(work.texts) == 2 and "the text encoders are released" in kept.err and same(kept, usual)
    assert not list(pictures.glob("*_te_outputs.npz"))
    runs.fresh(*data, "--cache_text_encoder_outputs", "--cache_text_encoder_outputs_to_disk")
    assert len(list(pictures.glob("*_te_outputs.npz"))) == 2
    work.texts.clear()
    again = runs.fresh(*data, "--cache_text_encoder_outputs", "--cache_text_encoder_outputs_to_disk")
    assert not work.texts and same(again, usual)
    trains = runs("--cache_text_encoder_outputs", expect=2)
    assert "--cache_text_encoder_outputs" in trains.err


@observes("dataset_config")
def test_a_dataset_file_takes_the_place_of_flags(runs: Runs, work: Work, tmp_path: Path) -> None:
    folder = runs.root / "pictures" / "2_thing"
    subset = f"[[datasets.subsets]]\nnum_repeats = 3\nimage_dir = '{folder}'\n"
    (tmp_path / "d.toml").write_text(f"[[datasets]]\nresolution = 64\nbatch_size = 3\n{subset}")
    flags = ("--dataset_config", str(tmp_path / "d.toml"))
    ran = runs.fresh(*EPOCH, *flags, without=("train_data_dir", "resolution"))
    assert sum(len(batch.positions) for batch in work.batches) == 12 and len(ran.steps) == 4


@observes("caption_extention")
def test_the_misspelt_name_of_the_extension_works(runs: Runs, work: Work, pictures: Path) -> None:
    for path in pictures.glob("*.txt"):
        path.with_suffix(".words").write_text("other words")
    data = ("--train_data_dir", str(pictures.parent), "--caption_extention", ".words")
    runs.fresh(*STILL, *data, without=("caption_extension",))
    assert {caption for batch in work.batches for caption in batch.captions} == {"other words"}


@observes("weighted_captions")
def test_weights_in_captions_count_if_asked(runs: Runs, pictures: Path) -> None:
    data = (*STILL, "--train_data_dir", str(pictures.parent))
    results = []
    for text in ("a red square", "a (red:1.7) square"):
        for path in pictures.glob("*.txt"):
            path.write_text(text)
        results.append(runs.fresh(*data, "--weighted_captions").losses)
        results.append(runs.fresh(*data).losses)
    weightless, plain, weighted, literal = results
    assert weightless == pytest.approx(plain, rel=1e-6) and weighted != pytest.approx(plain, rel=1e-7)
    assert len({tuple(one) for one in (weighted, literal, plain)}) == 3


def small_and_wide(place: Path) -> Path:
    """A folder with a picture of the usual size, a small one and one that loses half to a square."""
    folder = place / "sizes" / "1_thing"
    folder.mkdir(parents=True)
    for name, size in (("good", (64, 64)), ("small", (40, 40)), ("wide", (160, 64))):
        Image.linear_gradient("L").resize(size).convert("RGB").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    return folder


@observes("skip_small_images", "max_crop_loss", "exact_crop_conditioning")
def test_sizes_of_pictures_are_minded(runs: Runs, work: Work, tmp_path: Path) -> None:
    folder = small_and_wide(tmp_path)
    data = (*STILL, "--max_train_epochs", "1", "--train_data_dir", str(folder.parent))
    cropped = runs.fresh(*data, "--max_crop_loss", "0.3")
    assert {batch.captions[0] for batch in work.batches} == {"good", "small", "wide"}
    assert "more than 0.3 (max_crop_loss)" in cropped.err and "wide" in cropped.err
    buckets = ("--enable_bucket", "--bucket_no_upscale", "--min_bucket_reso", "64", "--max_bucket_reso", "128")
    assert "small.png" in runs(*data, *buckets, expect=2).err
    work.batches.clear()
    skipped = runs.fresh(*data, *buckets, "--skip_small_images")
    assert {batch.captions[0] for batch in work.batches} == {"good"} and "max_crop_loss" not in skipped.err
    sizes = {}
    for name, more in (("legacy", ()), ("exact", ("--exact_crop_conditioning",))):
        work.batches.clear()
        runs.fresh(*data, *more, model="sdxl")
        sizes[name] = {batch.captions[0]: batch.sizes[0].tolist() for batch in work.batches}
    assert sizes["legacy"]["good"] == sizes["exact"]["good"] and sizes["legacy"]["wide"] != sizes["exact"]["wide"]
    left_edge = sizes["exact"]["wide"][3]
    assert left_edge == pytest.approx(48, abs=1)


@observes("skip_bad_images", "verify_images")
def test_damaged_pictures_end_a_run_at_once_or_are_left_out(runs: Runs, work: Work, pictures: Path) -> None:
    picture = pictures / "picture01.png"
    data = bytearray(picture.read_bytes())
    start = data.index(b"IDAT") + 8
    data[start : start + 20] = bytes(20)
    picture.write_bytes(bytes(data))
    place = ("--train_data_dir", str(pictures.parent))
    late = runs.fresh(*EPOCH, *place, expect=2)
    assert "picture01.png: can't be decoded" in late.err and "loading libraries" in late.err
    early = runs.fresh(*EPOCH, *place, "--verify_images", expect=2)
    assert "picture01.png" in early.err and "loading libraries" not in early.err
    work.batches.clear()
    runs.fresh(*EPOCH, *place, "--verify_images", "--skip_bad_images")
    assert len({name for batch in work.batches for name in batch.names}) == 1


@observes("keep_in_memory")
def test_pictures_in_memory_are_read_once(runs: Runs, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    real = decoded

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(*arguments, **options)

    for module in ("pixels", "samples"):
        monkeypatch.setattr(f"library.data.{module}.decoded", counted)
    counts = []
    for flags in ((), ("--keep_in_memory",)):
        calls = 0
        runs.fresh(*EPOCH, "--train_data_dir", str(pictures.parent), *flags)
        counts.append(calls)
    assert counts == [4, 2]


@observes("debug_dataset")
def test_samples_are_shown_and_nothing_is_trained(runs: Runs) -> None:
    ran = runs("--debug_dataset")
    (sheet,) = [path for path in ran.folder.iterdir() if path.suffix in (".png", ".jpg")]
    assert Image.open(sheet).width > 64 and not ran.steps_were_made


CUSTOM = """
import torch

class Shades(torch.utils.data.Dataset):
    def __init__(self, tokenizer, max_token_length, resolution, debug_dataset):
        self.side = resolution[0]

    def __len__(self):
        return 3

    def __getitem__(self, index):
        images = torch.full((1, 3, self.side, self.side), index / 3)
        return {"images": images, "captions": [f"shade {index}"], "loss_weights": torch.ones(1)}
"""


@observes("dataset_class")
def test_batches_come_from_a_class_of_ones_own(
    runs: Runs, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shades_of_a_test.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = ("--dataset_class", "shades_of_a_test.Shades", "--max_train_epochs", "1")
    ran = runs.fresh(*STILL, *flags, without=("train_data_dir", "caption_extension"))
    assert len(ran.steps) == 3 and work.pictures == [1, 1, 1] and ran.losses != runs(*STILL).losses
    wrong = runs.fresh(*STILL, "--dataset_class", "shades_of_a_test.Lights", without=("train_data_dir",), expect=2)
    assert "--dataset_class" in wrong.err and not wrong.steps_were_made
