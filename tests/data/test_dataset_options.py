"""Every key of a dataset file, at every level where it may stand, changes what a model would see.

`CASES` holds, for each key, a value and what must be observed in the batches of two epochs against the same run without
it. Real pictures, the real options, scan, plan and loader; no model.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.loader import Batch, Loader
from library.data.plan import Plan
from library.options import parse
from library.options.dataset_schema import KEYS, Level
from library.training.prepare_data import Collector, Data, find_data

EPOCHS = 2


@dataclass
class Seen:
    """What a model would see of a dataset file."""

    data: Data
    notices: list[str]
    batches: list[Batch] = field(default_factory=list)

    @property
    def plan(self) -> Plan:
        return self.data.plan

    def captions(self, epoch: int | None = None) -> dict[str, list[str]]:
        """Captions by the picture's file name, in the order in which they come."""
        found: dict[str, list[str]] = {}
        for batch in self.batches:
            if epoch in (None, batch.epoch):
                for name, caption in zip(batch.names, batch.captions, strict=True):
                    found.setdefault(Path(name).name, []).append(caption)
        return found

    def pixels(self, epoch: int | None = None) -> dict[str, list[torch.Tensor]]:
        """Pixels (3, H, W) by the picture's file name."""
        found: dict[str, list[torch.Tensor]] = {}
        for batch in self.batches:
            if epoch in (None, batch.epoch) and batch.pixels is not None:
                for name, pixels in zip(batch.names, batch.pixels, strict=True):
                    found.setdefault(Path(name).name, []).append(pixels)
        return found

    def counts(self) -> Counter[str]:
        """Samples of the first epoch by the picture's file name."""
        return Counter(Path(name).name for batch in self.batches if batch.epoch == 1 for name in batch.names)

    @property
    def buckets(self) -> set[tuple[int, int]]:
        return {batch.bucket for batch in self.batches}

    def bucket_of(self, key: str) -> tuple[int, int]:
        return next(
            fit.bucket for record, fit in zip(self.plan.records, self.plan.fits, strict=True) if record.key == key
        )

    @property
    def held_out(self) -> set[str]:
        return {record.key for record in self.data.held_out.records} if self.data.held_out else set()


@dataclass(frozen=True)
class Case:
    """A value of a key; what must hold of the run without and with it; what else both runs are told.

    `source` is what the first subset's pictures come from, `@` the folder of the fixture.
    """

    value: str
    holds: Callable[[Seen, Seen], bool]
    general: str = ""
    source: str = 'image_dir = "@/a"'
    argv: tuple[str, ...] = ()


def _gradient(size: tuple[int, int], seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    width, height = size
    noise = np.random.default_rng(seed).uniform(0, 60, (height, width, 3))
    across = np.linspace(0, 190, width)[None, :, None].repeat(height, 0).repeat(3, 2)
    return (across + noise).astype(np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of many sizes with two kinds of caption files, masks, metadata and a Hugging Face dataset."""
    root = tmp_path_factory.mktemp("options")
    folder = root / "a"
    (folder / "deep").mkdir(parents=True)
    (root / "masks").mkdir()
    pictures = {
        "one": (64, 64), "two": (128, 64), "three": (64, 128), "tiny": (40, 40), "wide": (200, 90), "odd": (118, 90),
    }  # fmt: skip
    for seed, (name, size) in enumerate(pictures.items()):
        Image.fromarray(_gradient(size, seed)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{name}, b, c;;;d, e", encoding="utf-8")
        mask = np.zeros((size[1], size[0]), np.uint8)
        mask[:, : size[0] // 2] = 255
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    (folder / "one.cap").write_text("from cap", encoding="utf-8")
    (folder / "two.txt").write_text("two, {red|blue} b, c\nsecond line {x|y}", encoding="utf-8")
    (folder / "three.txt").write_text("three, k ||| b, c, d", encoding="utf-8")
    clear = np.dstack([_gradient((64, 64), 9), np.full((64, 64), 128, np.uint8)])
    Image.fromarray(clear).save(folder / "clear.png")
    mask = np.full((64, 64), 255, np.uint8)
    Image.fromarray(mask).save(root / "masks" / "clear.png")
    Image.fromarray(_gradient((160, 160), 11)).save(folder / "face_100_100_50_50.png")
    Image.fromarray(np.full((160, 160), 255, np.uint8)).save(root / "masks" / "face_100_100_50_50.png")
    Image.fromarray(_gradient((64, 64), 12)).save(folder / "deep" / "below.png")
    Image.fromarray(_gradient((64, 64), 13)).save(root / "reg.png")
    (root / "r").mkdir()
    (root / "reg.png").rename(root / "r" / "reg.png")
    (root / "meta.json").write_text(json.dumps({"a/one": {"caption": "from metadata", "tags": "t"}}), encoding="utf-8")
    for name in ("one", "two"):
        Image.fromarray(np.full(pictures[name][::-1], 51, np.uint8)).save(root / "masks" / f"grey_{name}.png")
    rows = [
        {"image": f"a/{name}.png", "picture": f"a/{other}.png", "text": f"row {name}", "words": f"other {name}",
         "mask": f"masks/{name}.png", "shade": f"masks/grey_{name}.png"}
        for name, other in (("one", "two"), ("two", "one"))
    ]  # fmt: skip
    (root / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    _save_hub_dataset(root, [folder / "one.png", folder / "two.png"])
    return root


def _save_hub_dataset(root: Path, pictures: list[Path]) -> None:
    """A Hugging Face dataset in two configurations, as parquet files in a folder."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    for name in ("plain", "loud"):
        rows = {"image": [str(path) for path in pictures], "text": [f"{name} {path.stem}" for path in pictures]}
        features = Features({"image": ImageFeature(), "text": Value("string")})
        (root / "hub" / name).mkdir(parents=True)
        Dataset.from_dict(rows, features=features).to_parquet(root / "hub" / name / "train.parquet")
    configs = [{"config_name": n, "data_files": f"{n}/train.parquet"} for n in ("plain", "loud")]
    configs[0]["default"] = "true"
    lines = "\n".join("- " + "\n  ".join(f"{key}: {value}" for key, value in one.items()) for one in configs)
    (root / "hub" / "README.md").write_text(f"---\nconfigs:\n{lines}\n---\n", encoding="utf-8")


def _toml(place: Path, key: str, level: Level | None, case: Case) -> str:
    """A dataset file with the case's key at `level`, or without it."""
    lines = {name: f"{key} = {case.value}" if level == name else "" for name in ("general", "dataset", "subset")}
    general = case.general
    for usual in ("resolution = 64", 'caption_extension = ".txt"'):
        if level is None or not usual.startswith(key):
            general += f"\n{usual}"
    source = "" if level is not None and key in SOURCE_KEYS else case.source
    other = '[[datasets.subsets]]\nimage_dir = "@/r"' if key == "is_reg" else ""
    text = f"""
[general]
{general}
{lines["general"]}
[[datasets]]
{lines["dataset"]}
[[datasets.subsets]]
{source}
{lines["subset"]}
{other}
"""
    return text.replace("@", str(place))


def _see(place: Path, tmp_path: Path, text: str, argv: tuple[str, ...]) -> Seen:
    file = tmp_path / "d.toml"
    file.write_text(text, encoding="utf-8")
    needed = ["--pretrained_model_name_or_path", "m", "--output_dir", str(tmp_path / "out")]
    more = [word.replace("@", str(place)) for word in argv]
    options = parse([*needed, "--network_module", "networks.lora", "--dataset_config", str(file), *more])
    collect, notices = Collector(), list(options.notices)
    data = find_data(options, collect, 8, notices)
    assert not collect.problems, collect.problems
    assert data is not None
    seen = Seen(data, notices)
    steps = EPOCHS * data.plan.batches_per_epoch
    loader = Loader(data.plan, seed=5, prior_loss_weight=0.25, total_steps=steps)
    for epoch in range(1, EPOCHS + 1):
        seen.batches += list(loader.epoch(epoch))
    return seen


def _tags(caption: str, separator: str = ",") -> list[str]:
    return [tag.strip() for tag in caption.split(separator)]


def _same_pixels(one: Seen, other: Seen, name: str) -> bool:
    return torch.equal(one.pixels()[name][0], other.pixels()[name][0])


def _shuffled(seen: Seen, name: str, separator: str = ",") -> bool:
    texts = seen.captions()[name]
    return len(set(texts)) > 1 and len({tuple(sorted(_tags(text, separator))) for text in texts}) == 1


SOURCE_KEYS = ("image_dir", "metadata_file", "jsonl_path", "dataset_name")
_ROWS = 'jsonl_path = "@/rows.jsonl"'
_HUB = 'dataset_name = "@/hub"'
_MANY = "num_repeats = 6"
_SHUFFLED = f"shuffle_caption = true\n{_MANY}"

CASES: Mapping[str, Case] = {
    "batch_size": Case("3", lambda _, w: max(len(batch.names) for batch in w.batches) == 3, _MANY),
    "resolution": Case("[96, 64]", lambda _, w: w.buckets == {(96, 64)}),
    "more_resolutions": Case("[96]", lambda b, w: w.buckets == b.buckets | {(96, 96)}),
    "enable_bucket": Case(
        "true", lambda b, w: len(w.buckets) > len(b.buckets) == 1, "min_bucket_reso = 32\nbucket_reso_steps = 32"
    ),
    "min_bucket_reso": Case(
        "64",
        lambda b, w: min(map(min, w.buckets)) >= 64 > min(map(min, b.buckets)),
        "enable_bucket = true\nbucket_reso_steps = 32",
        argv=("--min_bucket_reso", "32"),
    ),
    "max_bucket_reso": Case(
        "64",
        lambda b, w: max(map(max, w.buckets)) <= 64 < max(map(max, b.buckets)),
        "enable_bucket = true\nbucket_reso_steps = 32\nmin_bucket_reso = 32",
    ),
    "bucket_reso_steps": Case(
        "8",
        lambda b, w: (
            any(side % 32 for size in w.buckets for side in size)
            and not any(side % 32 for size in b.buckets for side in size)
        ),
        "enable_bucket = true\nmin_bucket_reso = 32",
        argv=("--bucket_reso_steps", "32"),
    ),
    "bucket_no_upscale": Case(
        "true",
        lambda b, w: (40, 40) in w.buckets and (40, 40) not in b.buckets,
        "enable_bucket = true\nmin_bucket_reso = 32\nbucket_reso_steps = 8",
    ),
    "bucket_choice": Case(
        '"log_ratio"',
        lambda b, w: (b.bucket_of("odd.png"), w.bucket_of("odd.png")) == ((64, 64), (80, 48)),
        "enable_bucket = true\nmin_bucket_reso = 16\nbucket_reso_steps = 16",
    ),
    "aspect_ratio_buckets": Case(
        "{target_resolution = 64, start_dim = 32, end_dim = 128, divisible_by = 32}",
        lambda b, w: (96, 32) in w.buckets <= {(64, 64), (96, 32), (32, 96), (128, 32), (32, 128)} != b.buckets,
    ),
    "validation_split": Case("0.5", lambda b, w: len(w.held_out) == 4 and not w.held_out & {*w.counts()}),
    "validation_seed": Case(
        "77",
        lambda b, w: len(w.held_out) == len(b.held_out) == 4 and w.held_out != b.held_out,
        "validation_split = 0.5",
    ),
    "network_multiplier": Case("0.5", lambda b, w: {batch.multiplier for batch in w.batches} == {0.5}),
    "resize_interpolation": Case('"nearest"', lambda b, w: not _same_pixels(b, w, "wide.png")),
    "num_repeats": Case("4", lambda b, w: (b.counts()["one.png"], w.counts()["one.png"]) == (1, 4)),
    "shuffle_caption": Case("true", lambda b, w: _shuffled(w, "one.png") and not _shuffled(b, "one.png"), _MANY),
    "caption_separator": Case(
        '";;;"', lambda b, w: _shuffled(w, "one.png", ";;;") and not _shuffled(b, "one.png", ";;;"), _SHUFFLED
    ),
    "caption_extension": Case('".cap"', lambda b, w: w.captions()["one.png"][0] == "from cap"),
    "keep_tokens": Case(
        "1",
        lambda b, w: (
            {_tags(text)[0] for text in w.captions()["one.png"]} == {"one"}
            and {_tags(text)[0] for text in b.captions()["one.png"]} != {"one"}
        ),
        _SHUFFLED,
    ),
    "keep_tokens_separator": Case(
        '"|||"',
        lambda b, w: (
            all("|||" not in text and text.startswith("three, k, ") for text in w.captions()["three.png"])
            and "|||" in b.captions()["three.png"][0]
        ),
        _SHUFFLED,
    ),
    "secondary_separator": Case('";;;"', lambda b, w: w.captions()["one.png"][0] == "one, b, c,d, e"),
    "enable_wildcard": Case(
        "true",
        lambda b, w: (
            {"two, red b, c", "two, blue b, c", "second line x", "second line y"} >= set(w.captions()["two.png"])
            and len(set(w.captions()["two.png"])) > 1
        ),
        _MANY,
    ),
    "caption_prefix": Case('"before"', lambda b, w: w.captions()["odd.png"][0] == "before odd, b, c;;;d, e"),
    "caption_suffix": Case('"after"', lambda b, w: w.captions()["odd.png"][0] == "odd, b, c;;;d, e after"),
    "caption_dropout_rate": Case("1", lambda b, w: w.captions()["one.png"] == ["", ""]),
    "caption_dropout_every_n_epochs": Case(
        "2", lambda b, w: w.captions(1)["one.png"] == b.captions(1)["one.png"] and w.captions(2)["one.png"] == [""]
    ),
    "caption_tag_dropout_rate": Case("1", lambda b, w: w.captions()["one.png"][0] == ""),
    "flip_aug": Case(
        "true",
        lambda b, w: any(torch.equal(pixels.flip(-1), b.pixels()["one.png"][0]) for pixels in w.pixels()["one.png"]),
        _MANY,
    ),
    "random_crop": Case("true", lambda b, w: len({p.sum().item() for p in w.pixels()["wide.png"]}) > 1, _MANY),
    "cache_info": Case("true", lambda b, w: any("nothing to do" in line for line in w.notices)),
    "color_aug": Case(
        "true",
        lambda b, w: (
            len({p.sum().item() for p in w.pixels()["one.png"]}) > 1
            and len({p.sum().item() for p in b.pixels()["one.png"]}) == 1
        ),
        _MANY,
    ),
    "token_warmup_min": Case(
        "3",
        lambda b, w: (
            min(len(_tags(c[0])) for c in (w.captions(1)["one.png"],)) >= 3
            and min(len(_tags(text)) for text in b.captions(1)["one.png"]) < 3
        ),
        f"token_warmup_step = 1000\n{_MANY}",
    ),
    "token_warmup_step": Case(
        "1000",
        lambda b, w: max(map(len, map(_tags, w.captions(1)["one.png"]))) < len(_tags(b.captions()["one.png"][0])),
    ),
    "recursive": Case("true", lambda b, w: set(w.counts()) - set(b.counts()) == {"below.png"}),
    "caption_from": Case('"filename"', lambda b, w: w.captions()["one.png"][0] == "one"),
    "shuffle_caption_delimiter": Case('";;;"', lambda b, w: _shuffled(w, "one.png", ";;;"), _MANY),
    "caption_preset": Case('"style"', lambda b, w: len(set(w.captions()["one.png"])) > 3, _MANY),
    "caption_templates": Case(
        '["a {} here"]', lambda b, w: w.captions()["one.png"][0] == "a cat here", 'class_tokens = "cat"'
    ),
    "keep_original_captions": Case(
        "true",
        lambda b, w: w.captions()["one.png"][0] == "a cat here, one, b, c;;;d, e",
        'class_tokens = "cat"\ncaption_templates = ["a {} here"]',
    ),
    "face_crop_aug_range": Case("[1.0, 1.5]", lambda b, w: not _same_pixels(b, w, "face_100_100_50_50.png")),
    "custom_attributes": Case(
        "{diff_output_preservation = true, note = 'x'}",
        lambda b, w: all(
            attributes == {"diff_output_preservation": True, "note": "x"}
            for batch in w.batches
            for name, attributes in zip(batch.names, batch.custom_attributes, strict=True)
            if Path(name).name == "one.png"
        ),
    ),
    "class_tokens": Case('"a dog"', lambda b, w: w.captions()["clear.png"][0] == "a dog"),
    "image_dir": Case('"@/a/deep"', lambda b, w: {*w.counts()} == {"below.png"}),
    "is_reg": Case(
        "true",
        lambda b, w: {float(x) for batch in w.batches for x in batch.loss_weights} == {1.0, 0.25},
    ),
    "alpha_mask": Case(
        "true",
        lambda b, w: not _has_masks(b) and bool(((_mask(w, "clear.png") - 128 / 255).abs() < 1e-6).all()),
    ),
    "conditioning_data_dir": Case(
        '"@/masks"',
        lambda b, w: not _has_masks(b) and _mask(w, "one.png").mean().item() == 0.5,
        argv=("--masked_loss",),
    ),
    "metadata_file": Case('"@/meta.json"', lambda b, w: w.captions()["one.png"][0] == "from metadata,t"),
    "jsonl_path": Case('"@/rows.jsonl"', lambda b, w: w.captions()["one.png"][0] == "row one"),
    "image_column": Case('"picture"', lambda b, w: w.captions()["two.png"][0] == "row one", source=_ROWS),
    "caption_column": Case('"words"', lambda b, w: w.captions()["one.png"][0] == "other one", source=_ROWS),
    "mask_column": Case(
        '"shade"',
        lambda b, w: (
            _mask(b, "one.png").mean().item() == 0.5 and bool(((_mask(w, "one.png") - 51 / 255).abs() < 1e-6).all())
        ),
        source=_ROWS,
        argv=("--masked_loss",),
    ),
    "dataset_name": Case('"@/hub"', lambda b, w: {c[0] for c in w.captions().values()} == {"plain one", "plain two"}),
    "dataset_config_name": Case(
        '"loud"', lambda b, w: {c[0] for c in w.captions().values()} == {"loud one", "loud two"}, source=_HUB
    ),
    "hf_cache_dir": Case('"@/downloads"', lambda b, w: any(_downloads(w).rglob("*.arrow")), source=_HUB),
}


def _has_masks(seen: Seen) -> bool:
    return any(batch.masks is not None for batch in seen.batches)


def _mask(seen: Seen, name: str) -> torch.Tensor:
    """The mask (h, w) of a picture, in latent cells."""
    for batch in seen.batches:
        for i, path in enumerate(batch.names):
            if Path(path).name == name and batch.masks is not None:
                return batch.masks[i, 0]
    raise AssertionError(f"{name} has no mask")


def _downloads(seen: Seen) -> Path:
    hub = seen.data.specs[0].subsets[0].hub
    assert hub is not None and hub.cache_dir is not None
    return hub.cache_dir


def test_the_table_holds_every_key() -> None:
    assert set(CASES) | {"keep_in_memory"} == set(KEYS)


@pytest.mark.parametrize(
    ("key", "level"), [(key, level) for key in CASES for level in KEYS[key].levels], ids=lambda value: str(value)
)
def test_a_key_does_what_it_says(place: Path, tmp_path: Path, key: str, level: Level) -> None:
    case = CASES[key]
    without = _see(place, tmp_path, _toml(place, key, None, case), case.argv)
    with_it = _see(place, tmp_path, _toml(place, key, level, case), case.argv)
    assert case.holds(without, with_it), (without.captions(), with_it.captions(), with_it.notices)


@pytest.mark.parametrize("level", KEYS["keep_in_memory"].levels)
def test_pictures_kept_in_memory_are_read_once(place: Path, tmp_path: Path, level: Level) -> None:
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "one.png").write_bytes((place / "a" / "one.png").read_bytes())
    case = Case("true", lambda b, w: True, source=f'image_dir = "{folder}"')
    data = _see(place, tmp_path, _toml(place, "keep_in_memory", level, case), ()).data
    loader = Loader(data.plan, seed=5)
    (first,) = loader.epoch(1)
    (folder / "one.png").unlink()
    (second,) = loader.epoch(2)
    assert first.pixels is not None and second.pixels is not None
    assert torch.equal(first.pixels, second.pixels)
