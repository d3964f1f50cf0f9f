"""Flags of the base model: which one, how its text is read, and in which precision it computes."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from library.models.model import Model
from library.training.objective import Objective
from tests.flags.effects import Runs, observes, part, same
from tests.original_layout import folder_as_single_file

pytestmark = pytest.mark.xdist_group("flags of model")
STILL = ("--learning_rate", "1e-12", "--network_train_unet_only")
BF16 = (*STILL, "--mixed_precision", "bf16")


@observes("pretrained_model_name_or_path")
def test_the_base_model_decides_what_is_trained(runs: Runs) -> None:
    sd1, sdxl, file = runs(*STILL), runs(*STILL, model="sdxl"), runs(*STILL, model="sd1_file")
    assert sd1.metadata["ss_base_model_version"] != sdxl.metadata["ss_base_model_version"]
    assert sd1.weights.keys() != sdxl.weights.keys() and file.losses == pytest.approx(sd1.losses, rel=1e-4)
    assert file.metadata["ss_sd_model_name"] == "tiny_sd1.safetensors"
    missing = runs("--pretrained_model_name_or_path", "@/nowhere", expect=2)
    assert "nowhere" in missing.err and not missing.steps_were_made


@observes("clip_skip")
def test_layers_that_are_skipped_learn_nothing(runs: Runs) -> None:
    last, skipped = runs(), runs("--clip_skip", "3")
    for number in range(5):
        key = f"lora_te_text_model_encoder_layers_{number}_mlp_fc1.lora_up.weight"
        assert last.weights[key].any() and bool(skipped.weights[key].any()) == (number < 3)
    assert skipped.losses[0] != pytest.approx(last.losses[0], rel=1e-6)


@observes("max_token_length")
def test_longer_captions_are_read_to_their_end(runs: Runs) -> None:
    for name, end in (("dog", "a dog"), ("cat", "a cat")):
        folder = runs.root / name / "1_thing"
        if not folder.is_dir():
            folder.mkdir(parents=True)
            Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(folder / "one.png")
            (folder / "one.txt").write_text("word " * 80 + end)
    for length, alike in (((), True), (("--max_token_length", "150"), False)):
        dog, cat = (runs(*STILL, "--train_data_dir", f"@/{name}", *length) for name in ("dog", "cat"))
        assert (dog.losses == cat.losses) == alike


@observes("mixed_precision", "full_bf16", "full_fp16")
def test_precision_shows_in_losses_and_in_what_is_kept(runs: Runs) -> None:
    learning = ("--network_train_unet_only", "--mixed_precision", "bf16")
    exact, mixed, full = runs("--network_train_unet_only"), runs(*learning), runs(*learning, "--full_bf16")
    assert exact.losses != mixed.losses == pytest.approx(exact.losses, rel=0.05)
    assert mixed.metadata["ss_mixed_precision"] == "bf16"

    for ran, dtype in ((full, torch.bfloat16), (mixed, torch.float32)):
        assert {tensor.dtype for key, tensor in load_file(ran.file).items() if "alpha" not in key} == {dtype}
    assert "--mixed_precision bf16" in runs("--full_bf16", expect=2).err
    refused = runs("--mixed_precision", "fp16", "--full_fp16", expect=2)
    assert "fp16 is hundreds of times slower on a CPU" in refused.err
    assert "--full_fp16: needs --mixed_precision fp16" in runs("--full_fp16", expect=2).err


@observes("fp8_base", "fp8_base_unet")
def test_frozen_weights_are_kept_in_8_bits(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[set[torch.dtype], set[torch.dtype]]] = []
    predict = Model.predict

    def watched(self: Model, *arguments: Any) -> torch.Tensor:
        kinds = tuple(
            {tensor.dtype for module in modules for tensor in module.state_dict().values()}
            for modules in ([self.unet], self.text_encoders)
        )
        found.append((kinds[0], kinds[1]))
        return predict(self, *arguments)

    monkeypatch.setattr(Model, "predict", watched)
    flags = (*BF16, "--max_train_steps", "1")
    plain, both, unet = (runs.fresh(*flags, *more) for more in ((), ("--fp8_base",), ("--fp8_base_unet",)))
    small = torch.float8_e4m3fn
    assert [(small in one, small in other) for one, other in found] == [(False, False), (True, True), (True, False)]
    assert plain.losses != both.losses == pytest.approx(plain.losses, rel=0.2)
    assert "fp8: the frozen weights take" in both.err and "fp8: the frozen weights take" in unet.err
    assert "--fp8_base: needs --mixed_precision" in runs("--fp8_base", expect=2).err


@observes("gradient_checkpointing", "gradient_checkpointing_every", "gradient_checkpointing_attention_only")
def test_checkpointing_computes_again_and_learns_the_same(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    real = checkpoint

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(*arguments, **options)

    monkeypatch.setattr("library.models.checkpointing.checkpoint", counted)
    flags = ("--network_train_unet_only", "--max_train_steps", "1")
    plain = runs.fresh(*flags)
    counts = [calls]
    for more in ((), ("--gradient_checkpointing_every", "2"), ("--gradient_checkpointing_attention_only",)):
        calls = 0
        ran = runs.fresh(*flags, "--gradient_checkpointing", *more)
        counts.append(calls)
        assert ran.losses == pytest.approx(plain.losses, rel=1e-5)
        assert all(np.allclose(ran.weights[key], plain.weights[key], atol=1e-5) for key in plain.weights)
    none, everything, half, attention = counts
    assert none == 0 and attention == 16 and everything > attention
    assert half == pytest.approx(everything / 2, abs=1)


@observes("deterministic")
def test_only_deterministic_kernels_are_used(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []
    losses = Objective.losses

    def watched(self: Objective, *arguments: torch.Tensor) -> torch.Tensor:
        found.append(torch.are_deterministic_algorithms_enabled())
        return losses(self, *arguments)

    monkeypatch.setattr(Objective, "losses", watched)
    runs.fresh(*STILL, "--max_train_steps", "1")
    runs.fresh(*STILL, "--max_train_steps", "1", "--deterministic")
    assert found == [False, True]


def other_model(runs: Runs) -> Path:
    """An SD1 folder with other weights than the tests' usual one."""
    from tests.tiny_models import save_tiny_sd1

    folder = runs.root / "other_model"
    if not folder.is_dir():
        save_tiny_sd1(folder, seed=9)
    return folder


@observes("vae", "text_encoder")
def test_parts_come_from_elsewhere(runs: Runs) -> None:
    other = other_model(runs)
    usual = runs(*STILL)
    vae, text = runs(*STILL, "--vae", str(other)), runs(*STILL, "--text_encoder", str(other))
    assert len({tuple(ran.losses) for ran in (usual, vae, text)}) == 3
    assert vae.metadata["ss_vae_name"] == "other_model" and "ss_vae_name" not in usual.metadata
    mixed = runs.root / "mixed"
    if not mixed.is_dir():
        shutil.copytree(runs.models("sd1"), mixed)
        shutil.rmtree(mixed / "text_encoder")
        shutil.copytree(other / "text_encoder", mixed / "text_encoder")
    assert runs(*STILL, "--pretrained_model_name_or_path", str(mixed)).losses == text.losses


@observes("variant")
def test_a_variant_of_the_weights_is_read(runs: Runs) -> None:
    folder = runs.root / "with_variant"
    if not folder.is_dir():
        shutil.copytree(runs.models("sd1"), folder)
        for path in other_model(runs).rglob("*.safetensors"):
            place = folder / path.parent.name / f"{path.stem}.fp16.safetensors"
            shutil.copy(path, place)
    model = ("--pretrained_model_name_or_path", str(folder))
    assert runs(*STILL, *model).losses == runs(*STILL).losses
    other = runs(*STILL, "--pretrained_model_name_or_path", str(other_model(runs)))
    assert runs(*STILL, *model, "--variant", "fp16").losses == other.losses
    assert "--variant" in runs(*STILL, *model, "--variant", "int4", expect=2).err


@observes("v2", "v_parameterization", "ignore_model_hash")
def test_what_is_said_of_a_model_is_believed_only_where_it_shows_nothing_else(runs: Runs) -> None:
    assert "--v2" in runs("--v2", expect=2).err and runs(*STILL, "--v2", model="sd2").code == 0
    assert "--v_parameterization" in runs("--v_parameterization", expect=2).err
    velocity, folder = runs(*STILL, "--v_parameterization", model="sd2_file"), runs(*STILL, model="sd2")
    assert velocity.losses == pytest.approx(folder.losses, rel=1e-4)
    path = runs.root / "wrong_hash.safetensors"
    if not path.exists():
        folder_as_single_file(runs.models("sd1"), path, metadata={"modelspec.hash_sha256": "0x" + "0" * 64})
    flags = (*STILL, "--pretrained_model_name_or_path", str(path))
    assert "--ignore_model_hash" in runs(*flags, expect=2).err
    assert runs(*flags, "--ignore_model_hash").losses == runs(*STILL, model="sd1_file").losses


@observes("no_half_vae")
def test_the_vae_may_stay_in_float32(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[torch.Tensor] = []
    add = Objective.add_noise

    def watched(self: Objective, latents: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        found.append(latents)
        return add(self, latents, *others)

    monkeypatch.setattr(Objective, "add_noise", watched)
    once = ("--max_train_steps", "1")
    for flags in (STILL, (*BF16, "--no_half_vae"), BF16):
        runs.fresh(*flags, *once)
    exact, kept, half = found
    assert torch.equal(exact, kept) and not torch.equal(exact, half) and torch.allclose(exact, half, atol=0.05)


@observes("xformers", "mem_eff_attn", "offload_text_encoders", "offload_during_sampling")
def test_what_needs_cuda_says_so_and_changes_nothing(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = runs("--network_train_unet_only")
    for flag in ("--xformers", "--mem_eff_attn"):
        ran = runs("--network_train_unet_only", flag)
        assert f"{flag} is for CUDA, not for cpu: torch's attention is used" in ran.err and same(ran, usual)
    assert "text encoders that are trained stay where they compute" in runs("--offload_text_encoders").err
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    told = runs.fresh("--network_train_unet_only", "--offload_text_encoders", "--offload_during_sampling")
    for flag in ("--offload_text_encoders", "--offload_during_sampling"):
        assert f"{flag}: has no effect on a CPU" in told.err
    assert same(told, usual)


@observes("torch_compile", "dynamo_backend")
def test_blocks_are_compiled_by_the_named_compiler(runs: Runs) -> None:
    flags = ("--network_train_unet_only", "--max_train_steps", "1", "--network_dim", "1")
    usual, ran = runs(*flags), runs(*flags, "--torch_compile", "--dynamo_backend", "eager")
    assert "blocks are compiled by eager" in ran.err and "compiled" not in usual.err
    assert ran.weights.keys() == usual.weights.keys() and part(ran, "lora_unet")
    assert ran.losses == pytest.approx(usual.losses, rel=1e-4)
    assert "--dynamo_backend" in runs(*flags, "--torch_compile", "--dynamo_backend", "ofi", expect=2).err


@observes("offload_during_sampling")
def test_what_a_preview_does_not_need_is_set_aside(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    from library.models import offload

    aside: list[list[str]] = []
    real = offload.set_aside

    def watched(what: Any, device: torch.device) -> Any:
        things = list(what)
        aside.append(sorted({type(one).__name__ for one in things}))
        return real(things, device)

    monkeypatch.setattr("library.models.preview.set_aside", watched)
    monkeypatch.setattr("library.training.assemble.set_aside", watched)
    prompts = runs.root / "one_prompt.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 1 --d 1")
    once = ("--network_train_unet_only", "--max_train_steps", "1", "--network_dim", "1")
    flags = (*once, "--sample_prompts", str(prompts), "--sample_every_n_steps", "1")
    pictures = []
    for more, moved in (
        ((), set()),
        (("--offload_during_sampling",), {"AutoencoderKL", "UNet2DConditionModel", "Tensor"}),
    ):
        aside.clear()
        ran = runs.fresh(*flags, *more)
        (picture,) = (ran.folder / "sample").glob("x_0*.png")
        pictures.append(np.asarray(Image.open(picture)))
        assert moved <= {name for names in aside for name in names} and (bool(moved) or not any(aside))
    assert np.array_equal(pictures[0], pictures[1])
