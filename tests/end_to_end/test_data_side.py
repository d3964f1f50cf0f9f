"""What dataset files ask for reaches the training: masks, strength, preserved outputs, validation, sampled latents."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.end_to_end.test_two_processes import arguments, assert_equal_weights, run, two
from tests.pictures import make_pictures
from tests.programs import SCRIPT

HEAD = "[[datasets]]\nresolution = 64\nbatch_size = 2\n{}\n[[datasets.subsets]]\nimage_dir = '{}'\n{}\n"


def train(model: Path, place: Path, name: str, *more: str, steps: int = 3) -> dict[str, np.ndarray]:
    """Train on the datasets that `place`/d.toml describes."""
    from train_network import main

    code = main(
        [
            *("--pretrained_model_name_or_path", str(model), "--dataset_config", str(place / "d.toml")),
            *("--output_dir", str(place / "output"), "--output_name", name, "--network_module", "networks.lora"),
            *("--caption_extension", ".txt", "--seed", "3", "--network_dim", "2", "--learning_rate", "1e-2"),
            *("--max_train_steps", str(steps), *more),
        ]
    )
    assert code == 0
    return load_file(place / f"output/{name}.safetensors")


def describe(place: Path, dataset: str = "", subset: str = "") -> Path:
    """Six pictures, and d.toml with lines for their dataset and subset."""
    folder = place / "pictures" / "2_thing"
    if not folder.is_dir():
        make_pictures(place / "pictures", count=6)
    (place / "d.toml").write_text(HEAD.format(dataset, folder, subset))
    return folder


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def ups(tensors: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [tensor for key, tensor in tensors.items() if "lora_up" in key]


def scalars(logs: Path) -> dict[str, list[tuple[int, float]]]:
    """Every logged number: (step, value) by tag."""
    (folder,) = {path.parent for path in logs.rglob("events.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_preserved_outputs_teach_nothing(tiny_sd1: Path, tmp_path: Path) -> None:
    describe(tmp_path, subset="custom_attributes = {diff_output_preservation = true}")
    assert all((tensor == 0).all() for tensor in ups(train(tiny_sd1, tmp_path, "kept")))
    describe(tmp_path, subset="custom_attributes = {diff_output_preservation = false}")
    assert any((tensor != 0).any() for tensor in ups(train(tiny_sd1, tmp_path, "plain")))


def test_a_network_of_strength_0_learns_nothing(tiny_sd1: Path, tmp_path: Path) -> None:
    describe(tmp_path, "network_multiplier = 0.0")
    assert all((tensor == 0).all() for tensor in ups(train(tiny_sd1, tmp_path, "none")))
    describe(tmp_path, "network_multiplier = 0.5")
    half = train(tiny_sd1, tmp_path, "half")
    describe(tmp_path)
    assert not same(half, train(tiny_sd1, tmp_path, "whole"))


@pytest.mark.parametrize("cached", [(), ("--cache_latents",), ("--cache_latents_to_disk",)], ids=str)
def test_nothing_is_learned_where_masks_are_black(tiny_sd1: Path, tmp_path: Path, cached: tuple[str, ...]) -> None:
    folder = describe(tmp_path, subset=f"conditioning_data_dir = '{tmp_path / 'masks'}'\nflip_aug = true")
    pictures = [path for path in folder.iterdir() if path.suffix in (".png", ".jpg")]
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in pictures:
        Image.new("L", Image.open(path).size, 0).save(masks / f"{path.stem}.png")
    black = train(tiny_sd1, tmp_path, "black", "--masked_loss", *cached)
    assert all((tensor == 0).all() for tensor in ups(black))
    for path in pictures:
        Image.new("L", Image.open(path).size, 255).save(masks / f"{path.stem}.png")
    white = train(tiny_sd1, tmp_path, "white", "--masked_loss", *cached)
    describe(tmp_path, subset="flip_aug = true")
    assert same(white, train(tiny_sd1, tmp_path, "plain", *cached))


def test_held_out_pictures_are_looked_at_and_change_nothing(
    tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    describe(tmp_path, "validation_split = 0.34")
    flags = ("--logging_dir", str(tmp_path / "logs"), "--validate_every_n_steps", "2", "--cache_latents")
    with_it = train(tiny_sd1, tmp_path, "with", *flags, steps=6)
    said = capsys.readouterr().err
    assert "validation at step 0: loss " in said and "validation at step 6: loss " in said
    logged = scalars(tmp_path / "logs")
    assert [step for step, _ in logged["loss/validation/step_average"]] == [0, 2, 4, 6]
    epochs = logged["loss/validation/epoch_average"]
    assert [step for step, _ in epochs] == [0, 1, 2, 3]
    assert len({value for _, value in epochs}) == 4
    last_loss = dict(logged["loss/average"])[6]
    assert logged["loss/validation/epoch_divergence"][-1][1] == pytest.approx(epochs[-1][1] - last_loss, abs=1e-6)
    seldom = train(tiny_sd1, tmp_path, "seldom", "--validate_every_n_epochs", "3", "--cache_latents", steps=6)
    assert same(with_it, seldom)
    describe(tmp_path)
    assert not same(with_it, train(tiny_sd1, tmp_path, "all", "--cache_latents", steps=6))


def test_the_first_validation_is_the_same_cached_or_not(
    tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    describe(tmp_path, "validation_split = 0.34")
    lines = []
    for name, flags in (("uncached", ()), ("ram", ("--cache_latents",)), ("disk", ("--cache_latents_to_disk",))):
        train(tiny_sd1, tmp_path, name, *flags, steps=1)
        lines += [line for line in capsys.readouterr().err.splitlines() if "validation at step 0" in line]
    assert len(lines) == 3
    assert len(set(lines)) == 1


@pytest.mark.parametrize("cached", [(), ("--cache_latents",), ("--cache_latents_to_disk",)], ids=str)
def test_sampled_latents_resume_to_the_same_bits(tiny_sd1: Path, tmp_path: Path, cached: tuple[str, ...]) -> None:
    describe(
        tmp_path,
        "validation_split = 0.34",
        "num_repeats = 2\nshuffle_caption = true\ntoken_warmup_step = 0.8\ncaption_preset = 'object'\n"
        "keep_original_captions = true\nflip_aug = true",
    )
    flags = ("--latent_sampling", "sample", "--gradient_accumulation_steps", "2", *cached)
    whole = train(tiny_sd1, tmp_path, "whole", *flags, steps=6)
    train(tiny_sd1, tmp_path, "part", *flags, "--save_state", "--save_every_n_steps", "3", steps=6)
    state = tmp_path / "output" / "part-step00000003-state"
    again = train(tiny_sd1, tmp_path, "part", *flags, "--resume", str(state), steps=6)
    assert same(whole, again)
    assert not same(whole, train(tiny_sd1, tmp_path, "mean", *cached, "--gradient_accumulation_steps", "2", steps=6))


def test_sampled_latents_are_the_same_cached_or_not(tiny_sd1: Path, tmp_path: Path) -> None:
    describe(tmp_path)
    runs = [
        train(tiny_sd1, tmp_path, f"n{number}", "--latent_sampling", "sample", *flags)
        for number, flags in enumerate(((), ("--cache_latents",), ("--cache_latents_to_disk",)))
    ]
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])


def test_two_processes_share_what_is_cached_in_memory(tiny_sd1: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", count=7)

    def line(name: str, batch_size: int) -> list[str]:
        given = [word for word in arguments(tiny_sd1, tmp_path, name, batch_size) if word != "--cache_latents_to_disk"]
        return [str(SCRIPT), *given, "--cache_latents", "--validation_split", "0.3", "--flip_aug"]

    both, one = run(two(*line("both", 2))), run([sys.executable, *line("one", 4)])
    assert both.returncode == one.returncode == 0, both.stderr + one.stderr
    assert_equal_weights(tmp_path / "output")
    said = [[text for text in run.stderr.splitlines() if "validation at step 0" in text] for run in (both, one)]
    assert said[0] == said[1]
    assert len(said[0]) == 1


def test_debug_dataset_writes_what_the_model_would_see(
    tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train_network import main

    describe(tmp_path, subset="flip_aug = true\nshuffle_caption = true")
    base = ["--pretrained_model_name_or_path", str(tiny_sd1), "--dataset_config", str(tmp_path / "d.toml")]
    code = main([*base, "--output_dir", str(tmp_path / "out"), "--network_module", "networks.lora", "--debug_dataset"])
    assert code == 0
    (sheet,) = (tmp_path / "out").iterdir()
    assert str(sheet) in capsys.readouterr().out.replace("\n", "")
    with Image.open(sheet) as image:
        assert image.width > 64


CUSTOM = """
import torch

class Colours(torch.utils.data.Dataset):
    def __init__(self, tokenizer, max_token_length, resolution, debug_dataset):
        assert len(tokenizer.encode("a cat", add_special_tokens=False).ids) == 2
        self.side = resolution[0]

    def __len__(self):
        return 4

    def __getitem__(self, index):
        images = torch.full((3, 3, self.side, self.side), index / 4)
        return {"images": images, "captions": [f"colour {index}"] * 3, "loss_weights": torch.ones(3)}
"""


def test_a_dataset_class_of_ones_own(tiny_sdxl: Path, tmp_path: Path) -> None:
    (tmp_path / "colours.py").write_text(CUSTOM)
    flags = [
        *("--pretrained_model_name_or_path", str(tiny_sdxl), "--output_dir", str(tmp_path / "output")),
        *("--network_module", "networks.lora", "--network_dim", "2", "--learning_rate", "1e-2", "--seed", "1"),
        *("--dataset_class", "colours.Colours", "--resolution", "64", "--max_train_epochs", "2"),
        *("--optimizer_args", "eps=1e-3"),
    ]
    paths = {"PYTHONPATH": f"{tmp_path}:{SCRIPT.parent}"}
    one = run([sys.executable, str(SCRIPT), *flags, "--output_name", "one"], **paths)
    assert one.returncode == 0, one.stderr
    both = run(two(str(SCRIPT), *flags, "--output_name", "both"), **paths)
    assert both.returncode == 0, both.stderr
    assert_equal_weights(tmp_path / "output")
    wrong = run([sys.executable, str(SCRIPT), *flags, "--dataset_class", "colours.Shapes"], **paths)
    assert wrong.returncode == 2
    assert "--dataset_class: colours.Shapes can't be made" in wrong.stderr


def test_a_strength_that_a_network_can_not_have_is_refused(
    tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train_network import main

    describe(tmp_path, "network_multiplier = 0.5")
    base = ["--pretrained_model_name_or_path", str(tiny_sd1), "--dataset_config", str(tmp_path / "d.toml")]
    flags = ["--network_module", "lycoris.kohya", "--network_args", "algo=lora", "dora_wd=True", "--dry_run"]
    assert main([*base, "--output_dir", str(tmp_path / "out"), *flags]) == 2
    assert "a network with dora_wd acts wholly or not at all" in capsys.readouterr().err


def test_the_split_stays_when_the_seed_is_drawn(tiny_sd1: Path, tmp_path: Path) -> None:
    describe(tmp_path, "validation_split = 0.34")
    save = ("--save_state", "--save_every_n_steps", "2")
    train(tiny_sd1, tmp_path, "first", *save, steps=3)
    state = str(tmp_path / "output" / "first-step00000002-state")
    from train_network import main

    base = ["--pretrained_model_name_or_path", str(tiny_sd1), "--dataset_config", str(tmp_path / "d.toml")]
    more = ["--output_dir", str(tmp_path / "output"), "--output_name", "first", "--network_module", "networks.lora"]
    rest = ["--caption_extension", ".txt", "--network_dim", "2", "--learning_rate", "1e-2", "--max_train_steps", "3"]
    assert main([*base, *more, *rest, "--resume", state]) == 0


def spoil(picture: Path) -> None:
    """Damage a PNG's compressed pixels; its header and its end stay whole."""
    data = bytearray(picture.read_bytes())
    start = data.index(b"IDAT") + 8
    data[start : start + 40] = bytes(40)
    picture.write_bytes(bytes(data))


def test_a_picture_that_only_decoding_shows_as_damaged(
    tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train_network import main

    folder = describe(tmp_path)
    base = ["--pretrained_model_name_or_path", str(tiny_sd1), "--dataset_config", str(tmp_path / "d.toml")]
    more = ["--output_dir", str(tmp_path / "output"), "--output_name", "x", "--network_module", "networks.lora"]
    flags = ["--caption_extension", ".txt", "--network_dim", "2", "--max_train_steps", "9", "--seed", "4"]
    line = [*base, *more, *flags, "--max_data_loader_n_workers", "0"]
    spoil(folder / "picture05.png")
    assert main(line) == 2
    said = capsys.readouterr().err
    assert "picture05.png: can't be decoded" in said
    assert "start again with --skip_bad_images" in said
    assert "the work up to step" in said and "start from its files (--network_weights, --weights)" in said
    assert len(list((tmp_path / "output").glob("x-step*.safetensors"))) == 1
    assert main([*line, "--dry_run"]) == 2
    assert "picture05.png" in capsys.readouterr().err
    assert main([*line, "--skip_bad_images"]) == 0
