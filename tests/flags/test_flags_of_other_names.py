"""Flags that diffusers' and InvokeAI's scripts have under other names: their command lines as they stand, and for each
name what a real run does with it, against the same run in our words.
"""

import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from library.data.loader import Batch, Loader
from library.options.templates import OBJECT, STYLE
from tests.flags.effects import Ran, Runs, WordRuns, equal, observes_names, same
from tests.flags.test_flags_of_embeddings import rows, vectors
from tests.hub_stand_in import StandIn, hub_stand_in

pytestmark = pytest.mark.xdist_group("flags of other names")
CAT = ("--init_word", "cat")
TEMPLATES = {"object": OBJECT, "style": STYLE}
DIFFUSERS = (
    *("--learnable_property", "object", "--placeholder_token", "<cat-toy>", "--initializer_token", "toy"),
    *("--resolution", "64", "--train_batch_size", "1", "--gradient_accumulation_steps", "4", "--max_train_steps", "3"),
    *("--learning_rate", "5.0e-04", "--scale_lr", "--lr_scheduler", "constant", "--lr_warmup_steps", "0"),
)
INVOKE = (
    *("--resolution", "64", "--learnable_property", "style", "--trigger_term", "blorp", "--initializer_token", "art"),
    *("--repeats", "2", "--train_batch_size", "2", "--max_train_steps", "4", "--learning_rate", "0.005", "--seed", "7"),
    *("--only_save_embeds", "--save_steps", "1", "--checkpointing_steps", "1", "--num_vectors", "2"),
)


def bare(words: WordRuns, *line: str, data: str = "@/flat", model: str = "pretrained_model_name_or_path") -> Ran:
    """A run with these flags alone, beside the base model, pictures, and the folder for the results."""
    place = words.root / f"bare{len([*words.root.glob('bare*')])}"
    if "--output_dir" not in line:
        line = (*line, "--output_dir", str(place))
        place.mkdir()
    paths = (f"--{model}", str(words.models("sd1")), "--train_data_dir", data)
    return words.fresh(*paths, *line, without=tuple(words.usual("sd1")))


def steps(ran: Ran) -> list[dict[str, float]]:
    """The steps' lines without times."""
    return [{name: value for name, value in line.items() if name != "time"} for line in ran.steps]


def agree(words: Runs, theirs: Sequence[str], ours: Sequence[str], without: tuple[str, ...] = ()) -> Ran:
    """A run in their words, which is the same as one in ours."""
    one, other = words(*theirs, without=without), words(*ours, without=without)
    assert same(one, other) and steps(one) == steps(other)
    return one


@observes_names("placeholder_token", "initializer_token")
def test_the_command_line_of_diffusers_example_trains(words: WordRuns, captions: list[str]) -> None:
    ran = bare(words, *DIFFUSERS)
    lines = [json.loads(text) for text in (ran.folder / "last.log.jsonl").read_text().splitlines()]
    rates = [line["lr/embedding"] for line in lines if "lr/embedding" in line]
    assert rates == pytest.approx([2e-3] * 3)
    assert len(captions) == 12 and {*captions} <= {text.format("<cat-toy>") for text in OBJECT}
    moved = np.abs(vectors(ran, "last.safetensors").astype(np.float64) - rows(words, "toy"))
    assert moved.shape == (1, 32) and (moved > 1e-4).any() and (moved < 3.1 * 2e-3).all()
    kept = torch.load(ran.folder / "last.pt", weights_only=True)["emb_params"]
    assert np.array_equal(kept.numpy(), vectors(ran, "last.safetensors"))
    assert "each is shown 100 times in an epoch" in ran.err


@observes_names("trigger_term", "save_steps", "checkpointing_steps", "resume_from_checkpoint", "model")
def test_a_command_line_of_invokeai_ti_trains_and_resumes(words: WordRuns, captions: list[str], tmp_path: Path) -> None:
    whole = bare(words, *INVOKE, "--output_name", "x", model="model")
    assert {*captions} <= {text.format("blorp") for text in STYLE} and len(captions) == 8
    assert np.abs(vectors(whole).astype(np.float64) - rows(words, "art art")).max() > 1e-3
    found = {path.name for path in whole.folder.iterdir()}
    assert {f"x-step0000000{step}{end}" for step in (1, 2, 3) for end in (".pt", ".safetensors", "-state")} < found
    shutil.copytree(whole.folder / "x-step00000002-state", tmp_path / "out" / "x-step00000002-state")
    captions.clear()
    again = ("--output_name", "x", "--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", "latest")
    resumed = bare(words, *INVOKE, *again, model="model")
    assert len(captions) == 4 and [line["step"] for line in resumed.steps] == [3, 4]
    assert same(whole, resumed) and steps(resumed) == steps(whole)[2:]


def test_names_of_the_token_bring_the_defaults_of_their_scripts(words: WordRuns, captions: list[str]) -> None:
    more = (*CAT, "--max_train_steps", "1", "--seed", "3", "--output_name", "x")
    one, other = (bare(words, f"--{name}", "blorp", *more) for name in ("placeholder_token", "trigger_term"))
    assert same(one, other) and one.logged("lr/embedding") == [1e-4]
    assert one.metadata["ss_resolution"] == "(512, 512)" and one.metadata["ss_num_train_images"] == "400"
    assert len(captions) == 2 and {*captions} <= {text.format("blorp") for text in OBJECT}
    ours = bare(words, "--token_string", "blorp", *more, "--resolution", "64", "--dataset_repeats", "2")
    assert ours.logged("lr/embedding") != [1e-4] and ours.metadata["ss_num_train_images"] == "8"
    assert captions[2:] == ["blorp"]


@observes_names("num_vectors", "initial_embedding_file", "textual_inversion_learning_rate", "lr_num_cycles")
def test_renamed_flags_do_what_ours_do(words: WordRuns) -> None:
    plain = words(*CAT)
    two = agree(words, (*CAT, "--num_vectors", "2"), (*CAT, "--num_vectors_per_token", "2"))
    assert len(vectors(two)) == 2
    file = str(two.file)
    agree(words, ("--initial_embedding_file", file), ("--weights", file))
    rate = agree(words, (*CAT, "--textual_inversion_learning_rate", "0.125"), (*CAT, "--embedding_lr", "0.125"))
    assert rate.logged("lr/embedding") == [0.125] * 2 and not same(rate, plain)
    curve = (*CAT, "--lr_scheduler", "cosine_with_restarts", "--max_train_steps", "4")
    waves = agree(words, (*curve, "--lr_num_cycles", "2"), (*curve, "--lr_scheduler_num_cycles", "2"))
    assert waves.logged("lr/embedding") == pytest.approx([1e-2, 5e-3, 1e-2, 5e-3], rel=0.01)


@observes_names("learnable_property")
@pytest.mark.parametrize("kind", ["object", "style"])
def test_the_learnable_property_chooses_templates(words: WordRuns, captions: list[str], kind: str) -> None:
    words.fresh(*CAT, "--learnable_property", kind, "--max_train_steps", "4")
    assert captions and {*captions} <= {text.format("blorp") for text in TEMPLATES[kind]}


@observes_names("repeats", "num_train_epochs")
def test_repeats_and_epochs_make_the_length_of_a_run(words: WordRuns) -> None:
    flat = (*CAT, "--train_data_dir", "@/flat", "--use_object_template", "--num_train_epochs")
    three, two = (words(*flat, "1", "--repeats", number, without=("max_train_steps",)) for number in "32")
    assert (len(three.steps), len(two.steps)) == (12, 8)
    double = words(*flat, "2", "--repeats", "2", without=("max_train_steps",))
    assert [line["step"] for line in double.steps] == [*range(1, 17)] and double.metadata["ss_num_epochs"] == "2"
    assert len(words(*flat, "2", "--repeats", "2", "--max_train_steps", "1").steps) == 1


@observes_names("unet_learning_rate", "text_encoder_learning_rate")
def test_rates_of_a_networks_parts(runs: Runs) -> None:
    ran = runs("--unet_learning_rate", "0.25", "--text_encoder_learning_rate", "0.125")
    assert ran.logged("lr/unet") == [0.25] * 2 and ran.logged("lr/textencoder") == [0.125] * 2
    assert same(ran, runs("--unet_lr", "0.25", "--text_encoder_lr", "0.125"))


@observes_names("dataloader_num_workers", "enable_xformers_memory_efficient_attention")
def test_how_a_run_works_leaves_its_result(words: WordRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    make = Loader._make

    def watched(self: Loader, *arguments: Any) -> Batch:
        seen.add(threading.current_thread().name.partition("_")[0])
        return make(self, *arguments)

    monkeypatch.setattr(Loader, "_make", watched)
    plain = words.fresh(*CAT)
    assert seen == {"MainThread"}
    seen.clear()
    threads = words.fresh(*CAT, "--dataloader_num_workers", "2", without=("max_data_loader_n_workers",))
    assert seen == {"data"} and same(plain, threads)
    attention = words.fresh(*CAT, "--enable_xformers_memory_efficient_attention")
    assert "xformers" in attention.err and "xformers" not in plain.err
    assert attention.losses == pytest.approx(plain.losses, rel=1e-5)


@observes_names("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon")
def test_settings_of_diffusers_optimizer(words: WordRuns) -> None:
    usual = words(*CAT, "--max_train_steps", "3")
    for theirs, value, ours in (
        ("adam_beta1", "0.5", "betas=0.5,0.999"),
        ("adam_beta2", "0.5", "betas=0.9,0.5"),
        ("adam_weight_decay", "0.5", "weight_decay=0.5"),
        ("adam_epsilon", "0.5", "eps=0.5"),
    ):
        flags = (*CAT, "--max_train_steps", "3")
        ran = agree(words, (*flags, f"--{theirs}", value), (*flags, "--optimizer_args", ours))
        assert not same(ran, usual), theirs


@observes_names("center_crop", "allow_tf32", "only_save_embeds", "local_rank", "no_safe_serialization")
def test_what_needs_nothing_to_be_done_is_said_and_changes_nothing(words: WordRuns) -> None:
    names = ("center_crop", "allow_tf32", "only_save_embeds", "no_safe_serialization")
    ran = words(*CAT, *(f"--{name}" for name in names), "--local_rank", "0")
    assert same(ran, words(*CAT)) and ran.losses == words(*CAT).losses
    for name in (*names, "local_rank"):
        said = f"--{name}: nothing to do: "
        assert said in ran.err and said not in words(*CAT).err, name


@observes_names("save_as_full_pipeline", "root_dir")
def test_what_is_not_done_is_said_and_changes_nothing(words: WordRuns) -> None:
    ran = words(*CAT, "--save_as_full_pipeline", "--root_dir", "invokeai")
    assert same(ran, words(*CAT)) and ran.losses == words(*CAT).losses
    for name in ("save_as_full_pipeline", "root_dir"):
        assert f"--{name}: not done: " in ran.err and f"--{name}: " not in words(*CAT).err, name


@observes_names("checkpoints_total_limit")
def test_only_so_many_states_are_kept(words: WordRuns) -> None:
    for limit, left in (("2", [4, 6]), ("1", [6])):
        every = ("--checkpointing_steps", "2", "--max_train_steps", "7", "--checkpoints_total_limit", limit)
        ran = words(*CAT, *every)
        states = {path.name for path in ran.folder.glob("*-state")}
        assert states == {"x-state", *(f"x-step0000000{step}-state" for step in left)}


@observes_names("report_to")
def test_trackers_write_beside_the_results(words: WordRuns) -> None:
    ran = words.fresh(*CAT, "--report_to", "tensorboard")
    assert [*(ran.folder / "logs").rglob("events.out.tfevents.*")]
    assert not [*words(*CAT).folder.rglob("events.*")]


@observes_names("validation_prompt", "validation_steps", "validation_epochs", "num_validation_images")
def test_the_new_word_is_drawn_while_it_is_learned(words: WordRuns, captions: list[str]) -> None:
    prompt = (*CAT, "--validation_prompt", "a blorp --w 64 --h 64 --s 2 --d 5", "--num_validation_images", "2")
    by_steps = words.fresh(*prompt, "--validation_steps", "2", "--max_train_steps", "4")
    assert drawn(by_steps) == {("000002", "5"), ("000002", "6"), ("000004", "5"), ("000004", "6")}
    assert "a blorp" in captions
    epochs = ("--validation_epochs", "1", "--train_batch_size", "4", "--max_train_steps", "4")
    assert drawn(words.fresh(*prompt, *epochs)) == {(f"e00000{one}", seed) for one in (1, 2) for seed in "56"}
    pictures = {path.read_bytes() for path in (by_steps.folder / "sample").glob("x_0*.png")}
    assert len(pictures) == 4


def drawn(ran: Ran) -> set[tuple[str, str]]:
    """When, and the seed, of each preview."""
    found = (path.stem.split("_") for path in (ran.folder / "sample").glob("x_*_*.png"))
    return {(parts[1], parts[-1]) for parts in found}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with hub_stand_in() as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.address)
        yield made


@observes_names("push_to_hub", "hub_model_id", "hub_token")
def test_files_are_pushed_where_that_is_asked_for(words: WordRuns, hub: StandIn) -> None:
    named = ("--hub_model_id", "me/blorp", "--hub_token", "hf_mine")
    words.fresh(*CAT, *named)
    assert not hub.files
    ran = words.fresh(*CAT, *named, "--push_to_hub")
    files = {path.name: path.read_bytes() for path in ran.folder.iterdir() if path.suffix in (".pt", ".safetensors")}
    assert hub.files["models/me/blorp"] == files and {*files} == {"x.pt", "x.safetensors"}
    assert hub.tokens == {"Bearer hf_mine"}
    assert equal(load_file(ran.file), words(*CAT).weights)
