"""What runs say of their new words before anything is loaded and at the end, and what a network's file tells of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.options import parse
from library.training.network_words import network_word_notices
from library.training.requests import Requests
from library.weights.files import read_metadata
from tests.embedding_runs import LORA, arguments, pictures_of_tokens, train, train_both

pytestmark = pytest.mark.xdist_group("embedding_words")
Main = Callable[..., int]
TOGETHER = "run.safetensors and run-blorp.safetensors and run-zorbik.safetensors belong together"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures; the caption of one lacks the second word."""
    folder = pictures_of_tokens(tmp_path_factory.mktemp("words"))
    next(folder.rglob("*.txt")).write_text("a blorp, red\n")
    return folder


def usage(token: str) -> str:
    return (
        f'{token}: A1111 "run-{token}", ComfyUI "embedding:run-{token}", diffusers token="{token}"; '
        "A1111 and ComfyUI go by the file's name"
    )


@pytest.mark.parametrize(("main", "flags"), [(train, ()), (train_both, LORA)], ids=["alone", "pivotal"])
def test_words_are_told_before_anything_is_loaded_and_at_the_end(
    main: Main,
    flags: tuple[str, ...],
    tiny_sd1: Path,
    pictures: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(tiny_sd1, pictures, tmp_path / "out", "--max_train_steps", 1, *flags) == 0
    lines = capfd.readouterr().err.splitlines()
    before = lines[: next(place for place, line in enumerate(lines) if "loading libraries" in line)]
    assert "blorp: 2 vectors, starting from 'cat', in 6 of 6 captions" in before
    assert "zorbik: 1 vector, starting from 'dog', in 5 of 6 captions" in before
    told = [line for line in lines if "A1111" in line or "belong together" in line]
    assert told[:2] == [usage("blorp"), usage("zorbik")] and lines[-len(told) :] == told
    assert [line.startswith(TOGETHER) for line in told[2:]] == [True] * bool(flags)
    texts = read_metadata(tmp_path / "out/run-blorp.safetensors")
    assert "write run-blorp" in texts["usage_a1111"] and "write embedding:run-blorp" in texts["usage_comfyui"]


def test_previews_without_the_word_and_starts_behind_its_training_are_told(
    tiny_sd1: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ends = ("--dry_run", "--max_train_steps", 4, "--ti_train_steps_ratio", 0.5)
    looks = ("--sample_every_n_steps", 2, "--preview_prompts", "a cat")
    without = "no prompt of the previews holds blorp or zorbik: they won't show what the vectors learn"
    late = "--initial_step: the vectors are trained in the first 2 of 4 steps, so that they never are"
    for more, expected in (
        ((*looks, "--initial_step", 2), {without, late}),
        ((*looks, "a Blorp", "--initial_step", 1), set()),
    ):
        assert train_both(tiny_sd1, pictures, tmp_path / "out", *LORA, *ends, *more) == 0
        assert set(capfd.readouterr().err.splitlines()) & {without, late} == expected


def test_a_run_that_was_stopped_says_how_to_go_on_alone_and_its_state_has_the_vectors(
    tiny_sd1: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Requests, "poll", lambda self: "stop")
        assert train(tiny_sd1, pictures, tmp_path / "out", "--max_train_steps", 3) == 0
    said = capfd.readouterr().err
    assert "to go on:" in said and "A1111" not in said
    (state,) = (tmp_path / "out").glob("*-state")
    assert train(tiny_sd1, pictures, tmp_path / "out", "--max_train_steps", 3, "--resume", state) == 0
    said = capfd.readouterr().err
    assert "blorp: 2 vectors, going on from the state, in 6 of 6 captions" in said and usage("blorp") in said


def test_frozen_and_drawn_words_and_files(
    tiny_sd1: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_file({"emb_params": torch.ones(3, 32)}, tmp_path / "word.safetensors")
    known = ("--init_word", "", "", "--weights", "", tmp_path / "word.safetensors", "--num_vectors_per_token", 1, 3)
    assert train(tiny_sd1, pictures, tmp_path / "out", "--max_train_steps", 1, *known) == 0
    said = capfd.readouterr().err.splitlines()
    assert "blorp: 1 vector, starting from drawn numbers, in 6 of 6 captions" in said
    assert f"zorbik: 3 vectors, starting from {tmp_path}/word.safetensors, in 5 of 6 captions" in said
    frozen = ("--base_embeddings", f"qued={tmp_path}/word.safetensors")
    assert train(tiny_sd1, pictures, tmp_path / "out", "--max_train_steps", 1, *frozen) == 0
    said = capfd.readouterr().err.splitlines()
    assert f"qued: 3 vectors, frozen, from {tmp_path}/word.safetensors, in 0 of 6 captions" in said


@pytest.fixture(scope="module")
def network(tiny_sd1: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a network with two words left."""
    folder = tmp_path_factory.mktemp("network")
    every = ("--save_embedding_as", "bundle", "--metadata_author", "me")
    assert train_both(tiny_sd1, pictures, folder, "--max_train_steps", 1, *LORA, *every) == 0
    return folder


def test_a_network_tells_its_words_and_their_files(network: Path) -> None:
    told = read_metadata(network / "run.safetensors")
    assert told["ss_token_string"] == "blorp zorbik" and told["modelspec.trigger_phrase"] == "blorp, zorbik"
    assert told["modelspec.author"] == "me" and told["modelspec.architecture"].endswith("/lora")
    start, first, second = told["usage_embeddings"].replace(": put", "; put").split("; ")
    assert start == "trained together with run-blorp.safetensors and run-zorbik.safetensors"
    assert first.startswith("put run-blorp.safetensors into") and "write run-blorp (" in first
    assert "ComfyUI: embedding:run-zorbik" in second
    bundle = read_metadata(network / "run.bundle.safetensors")
    assert bundle["ss_token_string"] == "blorp zorbik" and "usage_embeddings" not in bundle


def test_what_the_user_calls_its_phrase_stands_and_no_metadata_is_none(
    tiny_sd1: Path, pictures: Path, tmp_path: Path
) -> None:
    own = ("--metadata_trigger_phrase", "a photo of blorp", "--no_metadata")
    assert train_both(tiny_sd1, pictures, tmp_path, "--max_train_steps", 1, *LORA, *own) == 0
    told = read_metadata(tmp_path / "run.safetensors")
    assert told["modelspec.trigger_phrase"] == "a photo of blorp"
    assert not {"ss_token_string", "usage_embeddings"} & told.keys()


def test_a_network_without_its_words_is_told_of(
    network: Path, tiny_sd1: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = network / "run.safetensors"
    plain = arguments(tiny_sd1, pictures, tmp_path)
    at = plain.index("--token_string")
    none = [*plain[:at], *plain[at + 9 :], *LORA]

    def notices(*flags: object, resumed: bool = False) -> list[str]:
        return list(network_word_notices(parse([*none, *map(str, flags)]), resumed=resumed))

    both = "was trained with the words blorp and zorbik; give their embeddings with --weights"
    (line,) = notices("--network_weights", file)
    assert line.startswith(f"--network_weights {file}: {both}") and "blorp=FILE zorbik=FILE" in line
    (line,) = notices("--base_weights", file)
    assert line.startswith(f"--base_weights {file}: {both}")
    assert notices("--network_weights", file, resumed=True) == notices() == []
    blorp, zorbik = (network / f"run-{one}.safetensors" for one in ("blorp", "zorbik"))
    frozen = ("--base_embeddings", f"Blorp={blorp}")
    (line,) = notices("--network_weights", file, *frozen)
    assert "the word zorbik; give its embedding" in line
    assert notices("--network_weights", file, *frozen, "--token_string", "zorbik", "--weights", zorbik) == []
    (line,) = notices("--network_weights", file, *frozen, "--token_string", "zorbik", "--init_word", "dog")
    assert "the word zorbik" in line
    (tmp_path / "bad.safetensors").write_bytes(b"{")
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    assert notices("--base_weights", tmp_path / "bad.safetensors", tmp_path / "other.safetensors") == []
    start = (*LORA, "--network_weights", file)
    assert train_both(tiny_sd1, pictures, tmp_path / "out", "--max_train_steps", 1, *start) == 0
    assert both in capfd.readouterr().err
