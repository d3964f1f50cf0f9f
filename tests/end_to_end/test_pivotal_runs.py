"""train_network.py --token_string in whole runs: a network and the vectors of new tokens together, resumed before and
after the vectors are frozen, gone on with from files, and with frozen embeddings in captions."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.embedding_runs import (
    COUNTS,
    LORA,
    TOKENS,
    Watched,
    arguments,
    assert_same_end,
    launch,
    names,
    pictures_of_tokens,
    start,
    tensors,
    train_both,
    vectors,
    watched_models,
)
from tests.programs import SCRIPT, without_network

Finder = Callable[[str], Path]
FILES = ("run.safetensors", *(f"run-{token}.safetensors" for token in TOKENS))
LENGTH = ("--max_train_steps", "4", "--ti_train_steps_ratio", "0.5", "--save_state_on_train_end")
STATES = ("--save_state", "--save_every_n_steps", "1")
VARIED = ("--shuffle_caption", "--flip_aug", "--lr_scheduler", "cosine", "--optimizer_args", "weight_decay=0.3")
UNET = ("--network_train_unet_only",)
LOKR = ("--network_module", "lycoris.kohya", "--network_dim", "2", "--network_args", "algo=lokr", "factor=4")
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "sd1, U-Net": ("sd1", (*LORA, *UNET, "--network_dropout", "0.1", "--embedding_norm", "median")),
    "sd2, accumulated": ("sd2", (*LORA, "--gradient_accumulation_steps", "2", "--embedding_norm", "clamp")),
    "sdxl": ("sdxl", (*LORA, "--embedding_lr", "3e-2", "--save_embedding_as", "bundle")),
    "sdxl, U-Net": ("sdxl", (*LORA, *UNET, "--optimizer_type", "AdamWScheduleFree")),
    "lycoris": ("sd1", (*LOKR, "--stop_text_encoder_training", "3")),
    "prodigy": ("sd1", (*LORA, "--optimizer_type", "Prodigy", "--learning_rate", "1")),
}
SLOW = ("sdxl, U-Net", "prodigy")
Wholes = Callable[[str], tuple[Path, Watched]]


def line(case: str) -> tuple[str, ...]:
    return (*LENGTH, *VARIED, *CASES[case][1])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures_of_tokens(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def wholes(tiny_models: Finder, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Wholes:
    """Runs of `CASES` in one go, made once: where each wrote, and its model."""
    made: dict[str, tuple[Path, Watched]] = {}

    def find(case: str) -> tuple[Path, Watched]:
        if case not in made:
            output = tmp_path_factory.mktemp("whole")
            with watched_models() as found:
                assert train_both(tiny_models(CASES[case][0]), pictures, output, *line(case), *STATES) == 0
            made[case] = output, found[0]
        return made[case]

    return find


@pytest.mark.parametrize("case", [pytest.param(one, marks=pytest.mark.slow if one in SLOW else ()) for one in CASES])
def test_vectors_are_frozen_for_good_and_the_network_goes_on(case: str, wholes: Wholes) -> None:
    output, seen = wholes(case)
    stems = [f"run-step{step:08d}" for step in (1, 2, 3, 4)]
    held = [vectors(output, stem) for stem in stems]
    assert held[0] != held[1] and held[1] == held[2] == held[3] == vectors(output)
    states = [tensors(output / f"{stem}-state/trained.safetensors") for stem in stems]
    ours = {name for name in states[0] if name.startswith("embedding.")}
    assert len(ours) == len(TOKENS) * len(seen.tables)
    for name in ours:
        assert states[0][name] != states[1][name]
        assert states[2][name] == states[3][name]
        assert states[1][name] == states[2][name] or "AdamWScheduleFree" in CASES[case][1]
    assert {states[3][name] for name in ours} == {bits for held in held[3].values() for bits in held.values()}
    others = states[0].keys() - ours
    assert any(states[2][name] != states[3][name] for name in others)
    for place, table in enumerate(seen.tables):
        assert torch.equal(seen.model.embedding_table(place), table)
    rates = [json.loads(text) for text in (output / "run.log.jsonl").read_text().splitlines()]
    logged = [one["lr/embedding"] for one in rates if "lr/embedding" in one]
    assert [rate > 0 for rate in logged] == [True, True, False, False]


@pytest.mark.parametrize("case", [pytest.param(one, marks=pytest.mark.slow if one in SLOW else ()) for one in CASES])
def test_resumed_before_and_after_the_vectors_are_frozen(
    case: str, wholes: Wholes, tiny_models: Finder, pictures: Path, tmp_path: Path
) -> None:
    whole, _ = wholes(case)
    for step in (1, 2, 3) if case.endswith("U-Net") else (1, 3):
        state, output = whole / f"run-step{step:08d}-state", tmp_path / str(step)
        assert train_both(tiny_models(CASES[case][0]), pictures, output, *line(case), "--resume", state) == 0
        assert_same_end(whole, output, *FILES)


def test_frozen_vectors_stay_so_in_longer_runs(tiny_sd1: Path, pictures: Path, tmp_path: Path) -> None:
    """Also of optimizers that train other weights than those that files hold, whose norms are kept in files, too."""
    rules = ("--optimizer_type", "AdamWScheduleFree", "--embedding_norm", "median", "--ti_train_steps_ratio", "0.5")
    flags = (*LORA, *UNET, *rules, *STATES)
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    with watched_models() as found:
        assert train_both(tiny_sd1, pictures, first, *flags, "--max_train_steps", "4") == 0
    median = found[0].tables[0].double().norm(dim=1).median().item()
    norms = load_file(first / "run-blorp.safetensors")["emb_params"].double().norm(dim=1)
    assert norms.tolist() == pytest.approx([median] * COUNTS[0], rel=1e-5)
    for before, step, output, total in ((first, 3, second, 7), (second, 5, third, 9)):
        longer = ("--max_train_steps", total, "--resume_schedule", "keep")
        state = before / f"run-step{step:08d}-state"
        assert train_both(tiny_sd1, pictures, output, *flags, *longer, "--resume", state) == 0
        assert vectors(output) == vectors(first, "run-step00000002")
        trained = tensors(output / f"run-step{total:08d}-state/trained.safetensors")
        seen = {bits for name, bits in trained.items() if name.startswith("embedding.")}
        assert seen == {bits for held in vectors(output).values() for bits in held.values()}
    assert tensors(third / "run.safetensors") != tensors(second / "run.safetensors")


def test_another_ratio_freezes_no_earlier_and_thaws_if_it_says_so(
    wholes: Wholes, tiny_sd1: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    case = "sd1, U-Net"
    whole, _ = wholes(case)
    for ratio, same in (("0.25", True), ("1", False)):
        output, state = tmp_path / ratio, whole / "run-step00000003-state"
        more = ("--ti_train_steps_ratio", ratio, "--resume", state)
        assert train_both(tiny_sd1, pictures, output, *line(case), *more) == 0
        assert (vectors(output) == vectors(whole)) == same
        told = capfd.readouterr().err
        assert ("the new tokens' vectors are trained no more, after step 2" in told) == same
        manifest = json.loads((output / "run-state/manifest.json").read_text())
        assert manifest["frozen"] == ({"ti_train_steps_ratio": 2} if same else {})


def test_rates_of_their_own_and_a_bundle_of_both(wholes: Wholes) -> None:
    output, _ = wholes("sdxl")
    first = json.loads((output / "run.log.jsonl").read_text().splitlines()[0])
    assert first["lr/embedding"] == pytest.approx(3 * first["lr/unet"])
    bundle, lora = tensors(output / "run.bundle.safetensors"), tensors(output / "run.safetensors")
    expected = {
        f"bundle_emb.{token}.{name}": bits for token, held in vectors(output).items() for name, bits in held.items()
    }
    assert bundle == lora | expected and len(expected) == 4


@pytest.mark.slow
def test_a_real_launch_without_network(tiny_sd1: Path, pictures: Path, tmp_path: Path) -> None:
    words = arguments(tiny_sd1, pictures, tmp_path, *LORA, "--max_train_steps", "2")
    done = launch(SCRIPT, words, without_network())
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == set(FILES)


def loose(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in load_file(path).items()}


def test_goes_on_from_what_a_run_left(tiny_sdxl: Path, pictures: Path, wholes: Wholes, tmp_path: Path) -> None:
    first, _ = wholes("sdxl")
    flags = ("--max_train_steps", "1", "--network_weights", first / "run.safetensors", "--weights")
    for name, files in {
        "files": [first / f"run-{token}.safetensors" for token in TOKENS],
        "bundle": [first / "run.bundle.safetensors"] * 2,
    }.items():
        output = tmp_path / name
        words = arguments(tiny_sdxl, pictures, output, *LORA, *flags, *files, "--learning_rate", "1e-20")
        start_at, stop_at = words.index("--num_vectors_per_token"), words.index("--learning_rate")
        from train_network import main

        assert main([*words[:start_at], *words[stop_at:]]) == 0
        assert vectors(output) == vectors(first)
        assert tensors(output / "run.safetensors") == tensors(first / "run.safetensors")


def with_base(model: Path, pictures: Path, output: Path, *more: object) -> dict[str, bytes]:
    """A LoRA of the U-Net, without tokens of its own."""
    from train_network import main

    words = arguments(model, pictures, output, *LORA, *UNET, "--max_train_steps", "2", *more)
    start_at, stop_at = words.index("--token_string"), words.index("--learning_rate")
    assert main([*words[:start_at], *words[stop_at:]]) == 0
    return tensors(output / "run.safetensors")


def cached(pictures: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in pictures.rglob("*_te_outputs.npz")}


def test_base_embeddings_are_in_what_captions_say(tiny_sdxl: Path, tmp_path: Path) -> None:
    pictures = pictures_of_tokens(tmp_path / "pictures", count=2)
    generator = torch.Generator().manual_seed(1)
    for number in (1, 2):
        rows = {
            "clip_l": torch.randn(2, 32, generator=generator),
            "clip_g": torch.randn(2, 64, generator=generator),
        }
        save_file(rows, tmp_path / f"{number}.safetensors")
    disk = "--cache_text_encoder_outputs_to_disk"
    base = [("--base_embeddings", f"blorp={tmp_path}/{number}.safetensors") for number in (1, 2)]
    without = with_base(tiny_sdxl, pictures, tmp_path / "without")
    one = with_base(tiny_sdxl, pictures, tmp_path / "one", *base[0])
    assert names(tmp_path / "one") == {"run.safetensors"}
    assert without.keys() == one.keys() and without != one
    assert one != with_base(tiny_sdxl, pictures, tmp_path / "other", *base[1])

    assert with_base(tiny_sdxl, pictures, tmp_path / "cached", *base[0], disk) == one
    times = [cached(pictures)]
    assert with_base(tiny_sdxl, pictures, tmp_path / "again", *base[0], disk) == one
    times.append(cached(pictures))
    assert len(times[0]) == 2 and times[0] == times[1]
    assert with_base(tiny_sdxl, pictures, tmp_path / "plain", disk) == without
    times.append(cached(pictures))
    assert all(times[2][name] != times[1][name] for name in times[1])
    with_base(tiny_sdxl, pictures, tmp_path / "third", *base[1], disk)
    assert all(cached(pictures)[name] != times[2][name] for name in times[2])


def test_base_embeddings_beside_trained_tokens_stay_as_they_are(tiny_sd1: Path, pictures: Path, tmp_path: Path) -> None:
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)) * 0.1
    save_file({"emb_params": rows}, tmp_path / "red.safetensors")
    base = ("--base_embeddings", f"redish={tmp_path / 'red.safetensors'}", "--max_train_steps", "3")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a redish blorp --w 64 --h 64 --s 1 --d 1\na redish dog --w 64 --h 64 --s 1 --d 1\n")
    looks = ("--sample_prompts", prompts, "--sample_every_n_steps", "3")
    with watched_models() as found:
        assert train_both(tiny_sd1, pictures, tmp_path / "output", *LORA, *UNET, *base, *looks) == 0
    (seen,) = found
    assert [token.text for token in seen.model.vocabulary.tokens] == ["redish", *TOKENS]
    assert names(tmp_path / "output") == set(FILES)
    held = load_file(tmp_path / "output/run-blorp.safetensors")["emb_params"]
    assert held.shape == (COUNTS[0], 32) and not torch.equal(held[0], held[1])
    assert len(list((tmp_path / "output/sample").glob("run_0*.png"))) == 2


RATE = 1e-3
ROUNDING = 5e-6
"""Of sums in float32 in another order, relative to a gradient's norm; samples that count otherwise make 1e-2."""

EPSILON = ("--optimizer_args", "eps=1e-6")
"""Without it AdamW makes whole steps of gradients that are nothing but rounding."""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_one_process_of_4_equals_two_of_2(family: str, tiny_models: Finder, pictures: Path, tmp_path: Path) -> None:
    """Vectors are frozen in the middle; first gradients are those of network and vectors."""
    ended = []
    for processes, batch in ((1, 4), (2, 2)):
        flags = ("--train_batch_size", batch, "--ti_train_steps_ratio", "0.5", "--max_train_steps", "4", "--save_state")
        rest = (
            "--save_every_n_steps",
            "1",
            "--learning_rate",
            RATE,
            "--max_grad_norm",
            "0",
            "--shuffle_caption",
            *EPSILON,
        )
        output = tmp_path / str(processes)
        done = start(SCRIPT, arguments(tiny_models(family), pictures, output, *LORA, *flags, *rest), processes)
        assert done.returncode == 0, done.stderr
        assert vectors(output) == vectors(output, "run-step00000002")
        ended.append(output)
    for name in FILES:
        one, both = (loose(folder / name) for folder in ended)
        assert one.keys() == both.keys()
        assert max(float((one[key] - both[key]).abs().max()) for key in one) < 0.01 * RATE
    first, second = (first_gradient(folder) for folder in ended)
    assert float(np.linalg.norm(first)) > 0
    assert float(np.linalg.norm(first - second) / np.linalg.norm(first)) < ROUNDING


def first_gradient(folder: Path) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """All gradients of the first step, which AdamW's first moments hold a tenth of."""
    stored = torch.load(folder / "run-step00000001-state/optimizer.pt", weights_only=True)["optimizer"]["optimizer"]
    return np.concatenate([part["exp_avg"].double().numpy().ravel() for part in stored["state"].values()]) * 10
