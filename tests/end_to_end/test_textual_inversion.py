"""train_textual_inversion.py in whole runs: resuming to the same bits, files that diffusers loads, and what it leaves
alone."""

import json
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
from safetensors.torch import load_file

from tests.embedding_runs import (
    COUNTS,
    TI_SCRIPT,
    TOKENS,
    Watched,
    arguments,
    assert_same_end,
    launch,
    metadata,
    names,
    optimizer,
    pictures_of_tokens,
    start,
    tensors,
    train,
    vectors,
    watched_models,
)
from tests.programs import environment, without_network

Finder = Callable[[str], Path]
FILES = tuple(f"run-{token}.safetensors" for token in TOKENS)
STATES = ("--save_state", "--save_every_n_steps", "2")
LENGTH = ("--max_train_steps", "4")
VARIED = ("--shuffle_caption", "--flip_aug", "--caption_dropout_rate", "0.2", "--lr_scheduler", "cosine")
BUCKETS = ("--enable_bucket", "--min_bucket_reso", "32", "--bucket_reso_steps", "16")
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "sd1": ("sd1", ()),
    "sd2": ("sd2", ("--gradient_accumulation_steps", "2")),
    "sdxl": ("sdxl", ("--embedding_norm", "clamp", "--learning_rate", "0.3")),
    "file": ("sd1_file", BUCKETS),
    "prodigy": ("sd1", ("--optimizer_type", "Prodigy", "--learning_rate", "1", "--optimizer_args", "d0=1e-3")),
    "schedule-free": ("sd1", ("--optimizer_type", "AdamWScheduleFree")),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures_of_tokens(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def wholes(
    tiny_models: Finder, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Watched]]:
    """Runs of `CASES` in one go, made once: where each wrote, and its model."""
    made: dict[str, tuple[Path, Watched]] = {}

    def find(case: str) -> tuple[Path, Watched]:
        if case not in made:
            family, flags = CASES[case]
            output = tmp_path_factory.mktemp(case)
            with watched_models() as found:
                assert train(tiny_models(family), pictures, output, *LENGTH, *STATES, *VARIED, *flags) == 0
            made[case] = output, found[0]
        return made[case]

    return find


Wholes = Callable[[str], tuple[Path, Watched]]


@pytest.mark.parametrize("case", CASES)
def test_resumed_in_the_middle_equals_one_go(
    case: str, wholes: Wholes, tiny_models: Finder, pictures: Path, tmp_path: Path
) -> None:
    whole, _ = wholes(case)
    family, flags = CASES[case]
    state = whole / "run-step00000002-state"
    more = (*LENGTH, *STATES, *VARIED, *flags)
    assert train(tiny_models(family), pictures, tmp_path, *more, "--resume", state) == 0
    assert_same_end(whole, tmp_path, *FILES)
    assert vectors(whole) != vectors(whole, "run-step00000002")
    for token in TOKENS:
        pickled = torch.load(whole / f"run-{token}.pt", weights_only=True)
        held = load_file(whole / f"run-{token}.safetensors")
        assert pickled.keys() == held.keys()
        assert all(torch.equal(pickled[name], held[name]) for name in held)


@pytest.mark.parametrize("case", ["sd1", "sd2", "sdxl"])
def test_only_the_vectors_are_trained(case: str, wholes: Wholes) -> None:
    output, seen = wholes(case)
    for place, table in enumerate(seen.tables):
        after = seen.model.embedding_table(place)
        assert after.shape == (49408, seen.model.text_widths[place])
        assert torch.equal(after.view(torch.uint8), table.view(torch.uint8))
        assert after.grad is None and not after.requires_grad
    widths = seen.model.text_widths
    held = load_file(output / "run-state/trained.safetensors")
    parts = [encoder.part for encoder in seen.model.family.text_encoders]
    expected = {
        f"embedding.{part}.{token}": (count, width)
        for part, width in zip(parts, widths, strict=True)
        for token, count in zip(TOKENS, COUNTS, strict=True)
    }
    assert {name: tuple(tensor.shape) for name, tensor in held.items()} == expected
    assert all(tensor.dtype == torch.float32 for tensor in held.values())
    stored = torch.load(output / "run-state/optimizer.pt", weights_only=True)["optimizer"]["optimizer"]
    moments = [part[name] for part in stored["state"].values() for name in ("exp_avg", "exp_avg_sq")]
    assert sum(moment.nbytes for moment in moments) == sum(COUNTS) * sum(widths) * 8
    others = {name for part in stored["state"].values() for name in part} - {"exp_avg", "exp_avg_sq", "step"}
    assert not others
    assert (output / "run-state/optimizer.pt").stat().st_size < 64 * 2**10


def test_clamped_norms_are_those_of_the_vocabulary(wholes: Wholes) -> None:
    output, seen = wholes("sdxl")
    at_a_bound = 0
    for token in TOKENS:
        held = load_file(output / f"run-{token}.safetensors")
        for place, name in enumerate(("clip_l", "clip_g")):
            rows = seen.tables[place].double().norm(dim=1)
            low, high = torch.quantile(rows, torch.tensor([0.01, 0.99], dtype=torch.float64)).tolist()
            norms = held[name].double().norm(dim=1)
            assert bool((norms > low * (1 - 1e-6)).all()) and bool((norms < high * (1 + 1e-6)).all())
            at_a_bound += int((norms > high * (1 - 1e-6)).sum())
    assert at_a_bound


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_diffusers_gives_what_the_trained_model_gives(family: str, wholes: Wholes, tiny_models: Finder) -> None:
    from tests.interop.test_embeddings_load import compare, pipeline

    output, seen = wholes(family)
    pipe = pipeline(tiny_models(family))
    for token in TOKENS:
        held = load_file(output / f"run-{token}.safetensors")
        if family == "sdxl":
            for name, suffix in (("clip_l", ""), ("clip_g", "_2")):
                encoder, tokenizer = getattr(pipe, f"text_encoder{suffix}"), getattr(pipe, f"tokenizer{suffix}")
                pipe.load_textual_inversion(held[name], token=token, text_encoder=encoder, tokenizer=tokenizer)
        else:
            pipe.load_textual_inversion(str(output / f"run-{token}.safetensors"), token=token)
    prompts = ["a photo of blorp, red", "zorbik and blorp"]
    with torch.no_grad():
        ours, other = seen.model.encode_prompts(prompts), seen.model.encode_prompts(["a photo of cat, red", "a dog"])
    compare(pipe, ours, prompts)
    assert float((ours.states - other.states).abs().max()) > 1e-3


def test_previews_show_the_token_and_start_as_its_word(tiny_sd1: Path, pictures: Path, tmp_path: Path) -> None:
    tail = "--w 64 --h 64 --s 2 --d 1 --l 3\n"
    (tmp_path / "prompts.txt").write_text(f"a zorbik {tail}a dog {tail}")
    looks = ("--sample_prompts", tmp_path / "prompts.txt", "--sample_at_first", "--sample_every_n_steps", "3")
    assert train(tiny_sd1, pictures, tmp_path, "--max_train_steps", "3", "--learning_rate", "0.3", *looks) == 0
    drawn = sorted((tmp_path / "sample").glob("run_0*.png"))
    assert len(drawn) == 4
    shown = {tuple(path.name.split("_")[1:3]): np.asarray(Image.open(path)).astype(int) for path in drawn}
    first, last = (step for step, _ in sorted(shown)[::2])
    assert np.array_equal(shown[first, "00"], shown[first, "01"])
    assert np.array_equal(shown[first, "01"], shown[last, "01"])
    assert not np.array_equal(shown[last, "00"], shown[last, "01"])


def test_a_real_launch_without_network(tiny_sdxl: Path, pictures: Path, tmp_path: Path) -> None:
    words = arguments(tiny_sdxl, pictures, tmp_path, "--max_train_steps", "2")
    done = launch(TI_SCRIPT, words, without_network())
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == {f"run-{token}{ending}" for token in TOKENS for ending in (".pt", ".safetensors")}
    for token, count in zip(TOKENS, COUNTS, strict=True):
        shapes = {
            name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / f"run-{token}.safetensors").items()
        }
        assert shapes == {"clip_l": (count, 32), "clip_g": (count, 64)}


def test_stopped_by_a_key_and_resumed_equals_one_go(tiny_sd1: Path, pictures: Path, tmp_path: Path) -> None:
    steps, output = 30, tmp_path / "parts"
    flags = ("--max_train_steps", steps, *VARIED, "--cache_latents", "--save_state_on_train_end")
    words = arguments(tiny_sd1, pictures, output, *flags)
    command = [sys.executable, str(TI_SCRIPT), *words]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        log, deadline = output / "run.log.jsonl", time.monotonic() + 120
        while not (log.is_file() and len(log.read_text().splitlines()) > 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    (state,) = output.glob("run-step*-state")
    step = json.loads((state / "manifest.json").read_text())["updates_done"]
    assert 2 < step < steps
    stem = f"run-step{step:08d}"
    assert names(output) == {f"{stem}-{token}{ending}" for token in TOKENS for ending in (".pt", ".safetensors")}
    assert f"stopped after step {step} of {steps}; to go on:" in said and str(TI_SCRIPT) in said

    assert train(tiny_sd1, pictures, output, *flags, "--resume", "latest") == 0
    assert train(tiny_sd1, pictures, tmp_path / "whole", *flags) == 0
    assert_same_end(tmp_path / "whole", output, *FILES)


RATE = 1e-3
ROUNDING = 5e-6
"""Of sums in float32 in another order, relative to a gradient's norm; samples that count otherwise make 1e-2."""


def in_parts(model: Path, pictures: Path, folder: Path, *more: str) -> list[torch.Tensor]:
    """First gradients with one process and with two of half its batch, whose vectors end the same."""
    ended = []
    for processes, batch in ((1, 4), (2, 2)):
        flags = ("--train_batch_size", batch, "--max_train_steps", "4", "--save_every_n_steps", "1", "--save_state")
        rest = ("--learning_rate", RATE, "--max_grad_norm", "0", "--shuffle_caption", *BUCKETS, *more)
        words = arguments(model, pictures, folder / str(processes), *flags, *rest)
        done = start(TI_SCRIPT, words, processes)
        assert done.returncode == 0, done.stderr
        ended.append(folder / str(processes))
    for name in FILES:
        one, both = (load_file(folder / name) for folder in ended)
        assert one.keys() == both.keys()
        assert all(float((one[key] - both[key]).abs().max()) < 0.01 * RATE for key in one)
    return [first_gradient(folder) for folder in ended]


def first_gradient(folder: Path) -> torch.Tensor:
    """All gradients of the first step, which AdamW's first moments hold a tenth of."""
    stored = torch.load(folder / "run-step00000001-state/optimizer.pt", weights_only=True)["optimizer"]["optimizer"]
    return torch.cat([part["exp_avg"].double().reshape(-1) for part in stored["state"].values()]) * 10


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_one_process_of_4_equals_two_of_2(family: str, tiny_models: Finder, pictures: Path, tmp_path: Path) -> None:
    one, both = in_parts(tiny_models(family), pictures, tmp_path)
    assert float(one.norm()) > 0
    assert float((one - both).norm() / one.norm()) < ROUNDING


EPOCH = 4


def files_of(stem: str) -> set[str]:
    """Names of all files of a save of one token in every layout."""
    return {f"{stem}{ending}" for ending in (".pt", ".safetensors", ".bundle.safetensors")} | {
        f"webui/{stem}.pt",
        f"diffusers/{stem}.safetensors",
    }


def test_everything_at_once(tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A preset, held-out pictures, an early stop, masks, buckets, cached latents, previews, and files that expire."""
    from train_textual_inversion import main

    folder = pictures_of_tokens(tmp_path / "pictures", count=6) / "1_blorp"
    (tmp_path / "masks").mkdir()
    for path in (*folder.glob("*.png"), *folder.glob("*.jpg")):
        with Image.open(path) as image:
            Image.new("L", image.size, 128).save(tmp_path / f"masks/{path.stem}.png")
    (tmp_path / "d.toml").write_text(
        f"[[datasets]]\nresolution = 64\nbatch_size = 2\nvalidation_split = 0.34\n[[datasets.subsets]]\n"
        f"image_dir = '{folder}'\nconditioning_data_dir = '{tmp_path / 'masks'}'\nnum_repeats = 2\n"
    )
    (tmp_path / "prompts.txt").write_text("a photo of blorp --w 64 --h 64 --s 1 --d 1\n")
    output = tmp_path / "output"
    given = [
        *("--preset", "embedding-object", "--token_string", "blorp", "--init_word", "cat", "--masked_loss"),
        *("--pretrained_model_name_or_path", tiny_sd1, "--dataset_config", tmp_path / "d.toml", *BUCKETS),
        *("--output_dir", output, "--output_name", "run", "--max_train_steps", "12", "--seed", "1"),
        *("--save_every_n_steps", "1", "--save_last_n_steps", "2", "--save_state", "--save_last_n_steps_state", "2"),
        *("--save_every_n_epochs", "1", "--save_last_n_epochs", "1", "--save_embedding_as", "webui", "diffusers"),
        *("bundle", "--validate_every_n_steps", "2", "--early_stopping_patience", "2", "--mixed_precision", "no"),
        *("--sample_prompts", tmp_path / "prompts.txt", "--sample_every_n_steps", "4"),
        *("--lr_scheduler", "piecewise_constant", "--lr_scheduler_args", "step_rules=1:4,0"),
        *("--lr_warmup_steps", "0", "--max_data_loader_n_workers", "2", "--embedding_norm", "off"),
    ]
    assert main(list(map(str, given))) == 0
    said = capsys.readouterr().err
    best = int(metadata(output / "run-best.safetensors")["ss_steps"])
    last = best + 4
    assert best in (2, 4) and f"stopping early at step {last} of 12" in said
    stems = ["run", "run-best", *(f"run-step{step:08d}" for step in range(last - 2, last + 1))]
    stems.append(f"run-{last // EPOCH:06d}")
    assert names(output) == {name for stem in stems for name in files_of(stem)}
    states = {path.name for path in output.glob("*-state")}
    assert states == {
        "run-state",
        f"run-{last // EPOCH:06d}-state",
        *(f"run-step{step:08d}-state" for step in range(last - 2, last + 1)),
    }
    if best == 4:
        assert tensors(output / "run-best.safetensors") == tensors(output / "run.safetensors")
    assert len(list((output / "sample").glob("run_0*.png"))) == 2
    held = torch.load(output / "webui/run.pt", weights_only=True)["string_to_param"]["*"]
    assert torch.equal(held, load_file(output / "run.safetensors")["emb_params"]) and held.shape == (2, 32)


def continued(model: Path, pictures: Path, output: Path, file: Path) -> bytes:
    """The vectors of a run of one token that starts from a file, and that learns nothing; all of them in one."""
    from train_textual_inversion import main

    line = arguments(model, pictures, output, "--max_train_steps", "1", "--learning_rate", "1e-20", "--save_model_as")
    at = line.index("--token_string")
    given = [*line[:at], "--token_string", "blorp", "--weights", str(file), *line[line.index("--learning_rate") :]]
    assert main([*given, "safetensors"]) == 0
    return b"".join(tensors(output / "run.safetensors")[name] for name in sorted(tensors(output / "run.safetensors")))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_goes_on_from_every_layout(family: str, tiny_models: Finder, pictures: Path, tmp_path: Path) -> None:
    model, output = tiny_models(family), tmp_path / "first"
    layouts = ("--save_embedding_as", "webui", "diffusers", "bundle", "--max_train_steps", "2")
    assert train(model, pictures, output, *layouts) == 0
    learned = load_file(output / "run-blorp.safetensors")
    expected = b"".join(learned[name].numpy().tobytes() for name in sorted(learned))
    files = {name for name in names(output) if "blorp" in name or "bundle" in name}
    if family == "sdxl":
        halves = {f"diffusers/run-blorp.{part}.safetensors" for part in ("clip_l", "clip_g")}
        assert halves < files
        files -= halves
    assert len(files) == (5 if family == "sd1" else 4)
    for name in sorted(files):
        assert continued(model, pictures, tmp_path / "again", output / name) == expected, name


def test_nothing_of_the_tables_is_in_files_of_optimizers(wholes: Wholes) -> None:
    """Those that keep copies of what they train keep no more than that."""
    for case in ("prodigy", "schedule-free"):
        output, seen = wholes(case)
        size = sum(COUNTS) * sum(seen.model.text_widths)
        assert all(count <= size for count in sizes(optimizer(output / "run-state")))
        for place, table in enumerate(seen.tables):
            assert torch.equal(seen.model.embedding_table(place), table)


def sizes(value: Any) -> list[int]:
    """How many numbers each tensor of something `plain` holds."""
    if isinstance(value, tuple) and len(value) == 3 and isinstance(value[2], bytes):
        return [int(np.prod(value[1]))]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [size for one in inner for size in sizes(one)]
