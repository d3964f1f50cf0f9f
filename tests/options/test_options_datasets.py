"""Dataset files and folders: what is looked up where, and what is said about mistakes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from library.errors import UserError
from library.options import DatasetSpec, Options, load_datasets, parse

Run = Callable[..., Options]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Parses flags on top of those of a run whose datasets are described by d.toml or by flags."""
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()

    def parse_with(*argv: str) -> Options:
        base = f"--pretrained_model_name_or_path m --output_dir {tmp_path}/out --network_module networks.lora"
        return parse([*base.split(), *argv])

    return parse_with


@pytest.fixture
def file(run: Run, tmp_path: Path) -> Callable[..., tuple[DatasetSpec, ...]]:
    """Reads a dataset TOML with further flags."""

    def read(text: str, *argv: str) -> tuple[DatasetSpec, ...]:
        (tmp_path / "d.toml").write_text(text.replace("@", str(tmp_path)), encoding="utf-8")
        return load_datasets(run("--dataset_config", str(tmp_path / "d.toml"), *argv))

    return read


def _problems(call: Callable[..., Any], *args: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        call(*args)
    return [str(problem) for problem in caught.value.problems]


LEVELS = """
[general]
{general}
resolution = 512
[[datasets]]
{dataset}
  [[datasets.subsets]]
  image_dir = "@/a"
  {subset}
"""


def test_subset_over_dataset_over_general_over_flag_over_default(file: Callable[..., tuple[DatasetSpec, ...]]) -> None:
    levels = {"subset": "keep_tokens = 3", "dataset": "keep_tokens = 2", "general": "keep_tokens = 1"}
    for expected in (3, 2, 1):
        (spec,) = file(LEVELS.format(**{"subset": "", "dataset": "", "general": "", **levels}), "--keep_tokens", "9")
        assert spec.subsets[0].caption.keep_tokens == expected
        levels.pop(next(iter(levels)))
    empty = LEVELS.format(general="", dataset="", subset="")
    assert file(empty, "--keep_tokens", "9")[0].subsets[0].caption.keep_tokens == 9
    assert file(empty)[0].subsets[0].caption.keep_tokens == 0


def test_every_key_arrives_in_its_field(file: Callable[..., tuple[DatasetSpec, ...]], tmp_path: Path) -> None:
    (one, two) = file("""
[general]
enable_bucket = true
caption_extension = "txt"
shuffle_caption = true
[[datasets]]
batch_size = 4
resolution = [768, 512]
min_bucket_reso = 320
max_bucket_reso = 1000
bucket_reso_steps = 64
bucket_no_upscale = false
  [[datasets.subsets]]
  image_dir = "@/a"
  num_repeats = 5
  class_tokens = "a cat"
  flip_aug = true
  resize_interpolation = "box"
  caption_prefix = "p"
  caption_suffix = "s"
  caption_dropout_rate = 0.5
  caption_dropout_every_n_epochs = 2
  caption_tag_dropout_rate = 1
  caption_separator = ";"
  keep_tokens_separator = "|||"
  secondary_separator = ";;;"
  enable_wildcard = true
  [[datasets.subsets]]
  image_dir = "@/b"
  is_reg = true
  shuffle_caption = false
[[datasets]]
resolution = 640
  [[datasets.subsets]]
  image_dir = "@/a"
""")
    assert (one.batch_size, one.resolution, one.enable_bucket, one.bucket_no_upscale) == (4, (768, 512), True, False)
    assert (one.min_bucket_reso, one.max_bucket_reso, one.bucket_reso_steps) == (320, 1024, 64)
    assert one.where == f"{tmp_path}/d.toml:6 [[datasets]]"
    cat, reg = one.subsets
    assert (cat.image_dir, cat.num_repeats, cat.is_reg, cat.class_tokens) == (tmp_path / "a", 5, False, "a cat")
    assert (cat.caption_extension, cat.caption_extension_named) == (".txt", True)
    assert (cat.flip_aug, cat.random_crop, cat.resize_interpolation) == (True, False, "box")
    caption = cat.caption
    assert (caption.prefix, caption.suffix, caption.separator) == ("p", "s", ";")
    assert (caption.dropout_rate, caption.dropout_every_n_epochs, caption.tag_dropout_rate) == (0.5, 2, 1.0)
    assert (caption.keep_tokens_separator, caption.secondary_separator) == ("|||", ";;;")
    assert caption.wildcards
    assert caption.shuffle
    assert (reg.is_reg, reg.caption.shuffle, reg.num_repeats) == (True, False, 1)
    assert reg.where == f"{tmp_path}/d.toml:29 image_dir"
    assert (two.resolution, two.batch_size) == ((640, 640), 1)


def test_batch_size_and_repeats_fall_back_to_their_flags(file: Callable[..., tuple[DatasetSpec, ...]]) -> None:
    (spec,) = file(
        LEVELS.format(general="", dataset="", subset=""), "--train_batch_size", "3", "--dataset_repeats", "7"
    )
    assert (spec.batch_size, spec.subsets[0].num_repeats) == (3, 7)
    assert not spec.subsets[0].caption_extension_named
    (spec,) = file(LEVELS.format(general="", dataset="", subset=""), "--caption_extention", ".cap")
    assert (spec.subsets[0].caption_extension, spec.subsets[0].caption_extension_named) == (".cap", True)


def test_json_means_the_same_and_names_lines(run: Run, tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "general": {"resolution": 512},
        "datasets": [{"batch_size": 2, "subsets": [{"image_dir": str(tmp_path / "a"), "num_repeats": 3}]}],
    }
    (tmp_path / "d.json").write_text(json.dumps(content, indent=2))
    (spec,) = load_datasets(run("--dataset_config", str(tmp_path / "d.json")))
    assert (spec.batch_size, spec.subsets[0].num_repeats) == (2, 3)
    content["datasets"][0]["subsets"][0]["flip_agu"] = True
    (tmp_path / "d.json").write_text(json.dumps(content, indent=2))
    assert _problems(run, "--dataset_config", str(tmp_path / "d.json")) == [
        f"{tmp_path}/d.json:12 flip_agu: unknown key in [[datasets.subsets]]; did you mean flip_aug?"
    ]
    (tmp_path / "d.json").write_text('{"datasets": [\n{]}')
    assert f"{tmp_path}/d.json:2: no valid JSON" in _problems(run, "--dataset_config", str(tmp_path / "d.json"))[0]


@pytest.mark.parametrize(
    ("level", "line", "message"),
    [
        ("subset", "num_repeat = 3", "unknown key in [[datasets.subsets]]; did you mean num_repeats?"),
        ("dataset", "flip_agu = true", "unknown key in [[datasets]]; did you mean flip_aug?"),
        ("subset", "batch_size = 3", "it belongs in [general] or [[datasets]]"),
        ("dataset", "image_dir = 'x'", "it belongs in [[datasets.subsets]]"),
        ("general", "is_reg = true", "it belongs in [[datasets.subsets]]"),
        ("dataset", "train_batch_size = 3", "it is called batch_size here"),
        ("general", "prior_loss_weight = 0.5", "it is no key of a dataset file; use the flag --prior_loss_weight"),
        ("subset", "num_repeats = 1.5", "num_repeats: 1.5 is not a whole number"),
        ("subset", "flip_aug = 'on'", "flip_aug: 'on' is neither true nor false"),
        ("dataset", "batch_size = 0", "batch_size: 0 is out of range: it must be at least 1"),
        ("subset", "caption_dropout_rate = 2", "caption_dropout_rate: 2.0 is out of range"),
        ("subset", "resize_interpolation = 'cubik'", "did you mean cubic?"),
        ("subset", "face_crop_aug_range = [2.0]", "is no range of two numbers above 0"),
        ("dataset", "face_crop_aug_range = [2.0, 1.0]", "the smaller one first; such as 2.0,4.0"),
        ("subset", "custom_attributes = 3", "custom_attributes: 3 is no"),
        ("dataset", "aspect_ratio_buckets = [512, 256]", "holds 2 numbers; wanted: target resolution"),
        ("dataset", "aspect_ratio_buckets = [512, 250, 768, 64]", "250 can't be divided by 64"),
        ("dataset", "aspect_ratio_buckets = [512, 576, 768, 64]", "the target 512 doesn't lie from 576 to 768"),
        ("dataset", "aspect_ratio_buckets = {target_resolution = 512}", "wanted: target_resolution, start_dim"),
        ("subset", "caption_templates = ['a cat']", "'a cat' doesn't hold {} once"),
        ("subset", "caption_templates = ['my.txt']", "once; templates are texts, not a file of them: such as 'a photo"),
        ("subset", "caption_templates = ['a/b']", "once; templates are texts, not a file of them: such as 'a photo"),
        ("subset", "caption_templates = ['a cat, or 1/2']", "once; such as 'a photo of {}'"),
        ("subset", "keep_original_captions = true", "has no effect without templates"),
        ("subset", "caption_separator = ''", "caption_separator: is empty"),
        ("subset", "conditioning_data_dir = 'x'", "mask pictures have no effect without --masked_loss"),
        ("general", "alpha_mask = true", "it belongs in [[datasets.subsets]]"),
        ("dataset", "metadata_file = 'm.json'", "it belongs in [[datasets.subsets]]"),
        ("subset", "validation_seed = 1", "it belongs in [general] or [[datasets]]"),
        ("subset", "validation_split = 1.5", "validation_split: 1.5 is out of range"),
        ("subset", "caption_from = 'name'", "'name' is not among"),
    ],
)
def test_a_wrong_key_is_named_with_its_line(
    file: Callable[..., tuple[DatasetSpec, ...]], tmp_path: Path, level: str, line: str, message: str
) -> None:
    text = LEVELS.format(**{"general": "", "dataset": "", "subset": "", level: line})
    (problem,) = _problems(file, text)
    number = {"general": 3, "dataset": 6, "subset": 9}[level]
    assert problem.startswith(f"{tmp_path}/d.toml:{number} {line.split(' ')[0]}: ")
    assert message in problem


SUBSET = "[[datasets]]\nresolution = 512\n[[datasets.subsets]]\n{}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no datasets"),
        ("datasets = 3", "datasets: is no list of tables; write [[datasets]]"),
        ("[datasets]\nx = 1", "is no list of tables; write [[datasets]]"),
        ("[[datasets]]\nresolution = 512", "a dataset without subsets"),
        (SUBSET.format("num_repeats = 2"), "d.toml:3 subsets: a subset without image_dir"),
        ("[[datasets]]\n[datasets.subsets]\nimage_dir = 'a'", "write [[datasets.subsets]]"),
        ("general = 3\n", "general: is no table; write [general]"),
        ("[[dataset]]\nx = 1", "dataset: unknown key; did you mean datasets?"),
        ("shuffle_caption = true\n", "it belongs in [general] or"),
        (SUBSET.format("image_dir = '@/none'"), "d.toml:4 image_dir: there is no folder"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = '@/a'", "the size of training pictures is missing"),
        (SUBSET.format("image_dir = '@/a'\nis_reg = true"), "only regularization"),
        (SUBSET.format("image_dir = '@/a'\nnum_repeats = 0"), "no subset left"),
        ("[general\n", "d.toml:1: no valid TOML"),
    ],
)
def test_a_wrong_structure_is_explained(file: Callable[..., tuple[DatasetSpec, ...]], text: str, message: str) -> None:
    assert any(message in problem for problem in _problems(file, text))


def test_all_mistakes_of_a_file_come_together(file: Callable[..., tuple[DatasetSpec, ...]]) -> None:
    text = LEVELS.format(general="keep_tokenz = 1", dataset="batch_size = 'x'", subset="flip_aug = 3")
    assert len(_problems(file, text, "--max_train_steps", "0")) == 4


def test_a_folder_twice_in_a_dataset_counts_once(run: Run, tmp_path: Path) -> None:
    subset = f"[[datasets.subsets]]\nimage_dir = '{tmp_path}/a'\n"
    (tmp_path / "d.toml").write_text(f"[[datasets]]\nresolution = 512\n{subset}{subset}")
    options = run("--dataset_config", f"{tmp_path}/d.toml", "--train_data_dir", f"{tmp_path}/zzz")
    assert len(load_datasets(options)[0].subsets) == 1
    assert any("already has" in line for line in options.notices)
    assert any(line.startswith("--train_data_dir: ignored") for line in options.notices)


def test_dataset_file_that_is_missing_or_of_another_kind(run: Run, tmp_path: Path) -> None:
    assert "there is no such file" in _problems(run, "--dataset_config", f"{tmp_path}/no.toml")[0]
    (tmp_path / "d.yaml").write_text("")
    assert "neither .toml nor .json" in _problems(run, "--dataset_config", f"{tmp_path}/d.yaml")[0]


def test_kohya_folders_are_sorted_and_others_are_mentioned(run: Run, tmp_path: Path) -> None:
    for name in (
        "train/2_b cat",
        "train/10_a_dog",
        "train/3",
        "train/notes",
        "train/0_none",
        "train/.cache",
        "reg/1_dog",
    ):
        (tmp_path / name).mkdir(parents=True)
    argv = ["--train_data_dir", f"{tmp_path}/train", "--reg_data_dir", f"{tmp_path}/reg", "--resolution", "512,768"]
    options = run(*argv, "--train_batch_size", "2", "--flip_aug", "--caption_extension", "txt")
    (spec,) = load_datasets(options)
    assert (spec.batch_size, spec.resolution) == (2, (512, 768))
    found = [(s.image_dir.name, s.num_repeats, s.class_tokens, s.is_reg) for s in spec.subsets]
    assert found == [
        ("10_a_dog", 10, "a_dog", False),
        ("2_b cat", 2, "b cat", False),
        ("3", 3, None, False),
        ("1_dog", 1, "dog", True),
    ]
    assert all(subset.flip_aug and subset.caption_extension == ".txt" for subset in spec.subsets)
    nothing, notice = options.notices
    assert "0_none" in nothing and "0 repeats" in nothing
    assert "notes" in notice


def test_no_kohya_folder_says_what_is_there(run: Run, tmp_path: Path) -> None:
    (tmp_path / "train" / "cats").mkdir(parents=True)
    (tmp_path / "train" / "x.JPG").touch()
    flags = ["--resolution", "512", "--train_data_dir"]
    (problem,) = _problems(run, *flags, f"{tmp_path}/train")[:1]
    assert "10_name" in problem
    assert "the folders cats" in problem
    assert "1 pictures" in problem
    assert "there is no such folder" in _problems(run, *flags, f"{tmp_path}/nowhere")[0]
    assert "that is no folder" in _problems(run, *flags, f"{tmp_path}/train/x.JPG")[0]


BUCKETS = "[[datasets]]\nenable_bucket = true\n{}\n[[datasets.subsets]]\nimage_dir = '@/a'"


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("128", "d.toml:3 resolution: 128x128 has a side shorter than min_bucket_reso 256; set min_bucket_reso to 128"),
        ("[512, 1152]", "512x1152 has a side longer than max_bucket_reso 1024; set max_bucket_reso to 1152 or more"),
    ],
)
def test_resolution_out_of_the_bucket_limits(
    file: Callable[..., tuple[DatasetSpec, ...]], size: str, message: str
) -> None:
    (problem,) = _problems(file, BUCKETS.format(f"resolution = {size}"))
    assert message in problem


def test_limits_count_only_for_buckets_that_enlarge(file: Callable[..., tuple[DatasetSpec, ...]]) -> None:
    assert file(BUCKETS.format("resolution = 128\nbucket_no_upscale = true"))[0].resolution == (128, 128)
    assert file(BUCKETS.format("resolution = 128").replace("= true", "= false"))[0].resolution == (128, 128)


def test_steps_that_are_no_multiple_of_64_are_mentioned(run: Run, tmp_path: Path) -> None:
    (tmp_path / "d.toml").write_text(
        BUCKETS.format("resolution = 512\nbucket_reso_steps = 24").replace("@", str(tmp_path))
    )
    options = run("--dataset_config", f"{tmp_path}/d.toml")
    (spec,) = load_datasets(options)
    assert (spec.min_bucket_reso, spec.max_bucket_reso) == (240, 1032)
    assert any("no multiple of 64" in line for line in options.notices)
    assert any("256 becomes 240" in line for line in options.notices)


@pytest.mark.parametrize("line", ["random_crop = true", "color_aug = true", "face_crop_aug_range = [1.0, 2.0]"])
def test_what_changes_pixels_can_not_be_cached(file: Callable[..., tuple[DatasetSpec, ...]], line: str) -> None:
    text = LEVELS.format(general="", dataset="", subset=line)
    name = line.split(" ")[0]
    assert getattr(file(text)[0].subsets[0], name)
    (problem,) = _problems(file, text, "--cache_latents_to_disk")
    assert f"{name} can't be used with cached latents" in problem


def test_every_new_key_arrives_in_its_field(file: Callable[..., tuple[DatasetSpec, ...]], tmp_path: Path) -> None:
    (spec, larger) = file(
        """
[[datasets]]
resolution = 512
more_resolutions = ["768,640"]
network_multiplier = 1
validation_seed = 5
bucket_choice = "log_ratio"
  [[datasets.subsets]]
  image_dir = "@/a"
  class_tokens = "cat"
  recursive = true
  caption_from = "filename"
  shuffle_caption_delimiter = "; "
  caption_preset = "object"
  keep_original_captions = true
  token_warmup_min = 2
  token_warmup_step = 0.5
  keep_in_memory = true
  alpha_mask = true
  conditioning_data_dir = "@/b"
  validation_split = 1
  custom_attributes = {note = "x"}
""",
        "--masked_loss",
    )
    assert (spec.resolution, larger.resolution, spec.network_multiplier) == ((512, 512), (768, 640), 1.0)
    assert larger.where.endswith("[[datasets]] at 768x640")
    assert (spec.split_seed, spec.bucket_choice) == (5, "log_ratio")
    (subset,) = spec.subsets
    assert subset == larger.subsets[0]
    assert (subset.recursive, subset.caption_from, subset.keep_in_memory) == (True, "filename", True)
    assert (subset.alpha_mask, subset.mask_dir, subset.masks) == (True, tmp_path / "b", True)
    assert (subset.validation_split, subset.custom_attributes) == (1.0, {"note": "x"})
    caption = subset.caption
    assert (caption.separator, caption.shuffle, caption.warmup_min, caption.warmup_step) == ("; ", True, 2, 0.5)
    assert (len(caption.templates) > 1, caption.subject, caption.keep_original) == (True, "cat", True)


def test_sources_other_than_folders(file: Callable[..., tuple[DatasetSpec, ...]], tmp_path: Path) -> None:
    for name in ("m.json", "rows.jsonl"):
        (tmp_path / name).write_text("{}")
    template = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n{}\n"
    (meta, rows, hub) = file(
        template.format('metadata_file = "@/m.json"\nimage_dir = "@/a"')
        + template.format('jsonl_path = "@/rows.jsonl"\ncaption_column = "words"')
        + template.format('dataset_name = "user/set"\ndataset_config_name = "c"\nhf_cache_dir = "@/hf"')
    )
    (one,), (two,), (three,) = meta.subsets, rows.subsets, hub.subsets
    assert (one.source, one.image_dir, one.metadata_file) == ("metadata", tmp_path / "a", tmp_path / "m.json")
    assert (two.source, two.image_dir, two.columns.caption) == ("jsonl", tmp_path, "words")
    assert three.hub is not None
    assert (three.source, three.hub.name, three.hub.config) == ("hub", "user/set", "c")
    assert three.hub.cache_dir == tmp_path / "hf"
    assert [subset.name for subset in (one, two, three)] == ["m.json", "rows.jsonl", "set"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('image_dir = "@/a"\n[[datasets.subsets]]\nmetadata_file = "@/m.json"', "are of different kinds: a folder"),
        ('metadata_file = "@/m.json"\njsonl_path = "@/m.json"', "a subset has one source of pictures"),
        ('metadata_file = "@/none.json"', "there is no file"),
        ('metadata_file = "@/m.txt"', "is no .json or .jsonl file"),
        ('jsonl_path = "@/m.json"', "is no .jsonl file"),
        ('conditioning_data_dir = "@/none"\nimage_dir = "@/a"', "there is no folder"),
    ],
)
def test_a_wrong_source_is_explained(
    file: Callable[..., tuple[DatasetSpec, ...]], tmp_path: Path, lines: str, message: str
) -> None:
    for name in ("m.json", "m.txt"):
        (tmp_path / name).write_text("{}")
    text = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n{lines}"
    assert message in _problems(file, text, "--masked_loss")[0]


def test_a_metadata_file_by_flag(run: Run, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("")
    argv = ["--in_json", f"{tmp_path}/m.jsonl", "--resolution", "64", "--dataset_repeats", "3"]
    (spec,) = load_datasets(run(*argv, "--train_data_dir", f"{tmp_path}/a"))
    (subset,) = spec.subsets
    assert (subset.source, subset.image_dir, subset.num_repeats) == ("metadata", tmp_path / "a", 3)
    assert load_datasets(run(*argv))[0].subsets[0].image_dir == tmp_path
    assert "there is no file" in _problems(run, "--in_json", f"{tmp_path}/no.json", "--resolution", "64")[0]


def test_the_split_has_a_seed_of_its_own(run: Run, tmp_path: Path) -> None:
    (tmp_path / "train" / "1_cat").mkdir(parents=True)
    flags = ["--train_data_dir", f"{tmp_path}/train", "--resolution", "64"]
    assert [
        load_datasets(run(*flags, *more.split()))[0].split_seed
        for more in ("", "--seed 4", "--seed 4 --validation_seed 9")
    ] == [0, 0, 9]


def test_masks_by_flag_are_not_asked_of_regularization_pictures(run: Run, tmp_path: Path) -> None:
    for name in ("train/1_cat", "reg/1_animal"):
        (tmp_path / name).mkdir(parents=True)
    flags = ["--train_data_dir", f"{tmp_path}/train", "--reg_data_dir", f"{tmp_path}/reg", "--resolution", "64"]
    (spec,) = load_datasets(run(*flags, "--masked_loss", "--conditioning_data_dir", f"{tmp_path}/a"))
    assert [subset.mask_dir for subset in spec.subsets] == [tmp_path / "a", None]
