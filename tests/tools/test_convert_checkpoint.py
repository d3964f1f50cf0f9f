"""tools/convert_checkpoint.py as a user runs it: diffusers loads what it writes, and wrong input ends in one line."""

import json
import shutil
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.full_size import write_single_file
from tests.memory import run_measured
from tests.original_layout import folder_as_single_file
from tests.programs import ROOT, environment, tool

FAMILIES = ["sd1", "sd2", "sdxl"]
PROMPT = "a photo of a cat, 4k!"
Find = Callable[[str], Path]
Convert = Callable[..., int]


@pytest.fixture(scope="module")
def convert() -> Convert:
    main = tool("convert_checkpoint")
    return lambda *arguments: main([str(argument) for argument in arguments])


def kind(family: str) -> Any:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline


@pytest.fixture(scope="module")
def loaded(tiny_models: Find) -> Callable[[str], Any]:
    """A tiny model as diffusers loads its folder, once."""
    return lru_cache(lambda family: kind(family).from_pretrained(tiny_models(family), local_files_only=True))


def tokenizers(pipeline: Any) -> dict[str, Any]:
    return {name: one for name, one in pipeline.components.items() if name.startswith("tokenizer")}


def drawn(pipeline: Any) -> np.ndarray:
    """What a pipeline draws in two steps."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    more = {"num_inference_steps": 2, "width": 64, "height": 64, "output_type": "np", "generator": generator}
    return np.asarray(pipeline(PROMPT, negative_prompt="blurry!", **more).images[0])


def states(pipeline: Any) -> dict[str, dict[str, torch.Tensor]]:
    modules = {name: one for name, one in pipeline.components.items() if isinstance(one, torch.nn.Module)}
    return {name: module.state_dict() for name, module in modules.items()}


def assert_same(first: Any, second: Any) -> None:
    """The same modules with the same tensors."""
    ours, theirs = states(first), states(second)
    assert ours.keys() == theirs.keys()
    for part, tensors in ours.items():
        assert tensors.keys() == theirs[part].keys()
        for name, tensor in tensors.items():
            assert tensor.reshape(-1).equal(theirs[part][name].reshape(-1)), (part, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_a_new_folder_and_draws_the_same(
    family: str, convert: Convert, tiny_models: Find, loaded: Callable[[str], Any], tmp_path: Path
) -> None:
    more = ("--prediction_type", "v_prediction") if family == "sd2" else ()
    assert convert(tiny_models(f"{family}_file"), tmp_path / "model", *more) == 0
    theirs = loaded(family)
    ours = kind(family).from_pretrained(tmp_path / "model", local_files_only=True)
    assert_same(ours, theirs)
    assert ours.scheduler.config.prediction_type == theirs.scheduler.config.prediction_type
    for name, tokenizer in tokenizers(theirs).items():
        texts = [one(PROMPT, padding="max_length").input_ids for one in (tokenizer, getattr(ours, name))]
        assert texts[0] == texts[1]
    np.testing.assert_allclose(drawn(ours), drawn(theirs), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_a_new_file(
    family: str, convert: Convert, tiny_models: Find, loaded: Callable[[str], Any], tmp_path: Path
) -> None:
    file, folder, theirs = tmp_path / "model.safetensors", str(tiny_models(family)), loaded(family)
    assert convert(folder, file) == 0
    ours = kind(family).from_single_file(file, config=folder, local_files_only=True, **tokenizers(theirs))
    assert_same(ours, theirs)


def test_a_command_for_the_older_script_works(convert: Convert, tiny_models: Find, tmp_path: Path) -> None:
    command = (tiny_models("sd1"), tmp_path / "model.safetensors", "--v1", "--fp16", "--use_safetensors")
    metadata = "{'author': 'me', 'steps': 3, 'modelspec.title': 'Mine'}"
    assert convert(*command, "--epoch", 2, "--global_step", 70, "--metadata", metadata) == 0
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        found = file.metadata()
        assert {file.get_tensor(name).dtype for name in list(file.keys())} == {torch.float16}
    expected = {"author": "me", "steps": "3", "modelspec.title": "Mine", "ss_epoch": "2", "ss_steps": "70"}
    assert expected.items() <= found.items()


def test_halves_load_into_one_pipeline(
    convert: Convert, tiny_models: Find, loaded: Callable[[str], Any], tmp_path: Path
) -> None:
    arguments = ("--save_precision_as", "bf16", "--variant", "bf16")
    assert convert(tiny_models("sdxl_file"), tmp_path / "model", *arguments) == 0
    assert (tmp_path / "model/unet/diffusion_pytorch_model.bf16.safetensors").is_file()
    assert (tmp_path / "model/text_encoder_2/model.bf16.safetensors").is_file()
    pipeline = kind("sdxl").from_pretrained(
        tmp_path / "model", variant="bf16", local_files_only=True, **tokenizers(loaded("sdxl"))
    )
    assert {module.dtype for module in (pipeline.unet, pipeline.text_encoder, pipeline.vae)} == {torch.float32}
    assert np.isfinite(drawn(pipeline)).all()
    assert convert(tmp_path / "model", tmp_path / "back.safetensors", "--variant", "bf16") == 0
    assert {one.dtype for one in load_file(tmp_path / "back.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("source", ["safetensors", "ckpt"])
def test_a_file_into_a_file_keeps_all_of_it(
    source: str, convert: Convert, tiny_models: Find, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first.safetensors"
    folder_as_single_file(tiny_models("sd2"), first, extra={"model_ema.decay": np.ones(1), "betas": np.ones(4)})
    before = load_file(first)
    if source == "ckpt":
        torch.save({"state_dict": before, "global_step": 7}, tmp_path / "first.ckpt")
    assert convert(tmp_path / f"first.{source}", tmp_path / "new.safetensors", "--prediction_type", "epsilon") == 0
    after = load_file(tmp_path / "new.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.equal(after[name]), name
    assert "as they stand in the file" in capsys.readouterr().err


def test_a_pickle_into_a_folder(convert: Convert, tiny_models: Find, tmp_path: Path) -> None:
    torch.save({"state_dict": load_file(tiny_models("sd1_file"))}, tmp_path / "model.ckpt")
    assert convert(tmp_path / "model.ckpt", tmp_path / "sd1.5") == 0
    for file in ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        ours, theirs = load_file(tmp_path / "sd1.5" / file), load_file(tiny_models("sd1") / file)
        assert ours.keys() == theirs.keys()
        assert all(one.equal(theirs[name]) for name, one in ours.items())


def test_what_is_left_out_and_what_is_put_in_is_listed(
    convert: Convert, tiny_models: Find, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_models("sd2_file")
    assert convert(source, tmp_path / "model", "--prediction_type", "v_prediction") == 0
    told = capsys.readouterr().err
    assert "left out, as it has no place in a folder:" in told
    assert "cond_stage_model.model.transformer.resblocks.5.attn.in_proj_weight" in told
    assert "and 9 more" in told
    assert convert(tmp_path / "model", tmp_path / "model.safetensors") == 0
    told = capsys.readouterr().err
    assert "put into the file beside the model:" in told
    assert "ones for the text_encoder's projection" in told


def test_a_reference_gives_tokenizers_and_scheduler(convert: Convert, tiny_models: Find, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    shutil.copytree(tiny_models("sd1"), reference)
    file = reference / "scheduler/scheduler_config.json"
    changed = json.loads(file.read_text()) | {"_class_name": "PNDMScheduler", "prediction_type": "v_prediction"}
    file.write_text(json.dumps(changed))
    (reference / "tokenizer/own.txt").write_text("mine")
    assert convert(tiny_models("sd1_file"), tmp_path / "model", "--reference_model", reference) == 0
    assert (tmp_path / "model/tokenizer/own.txt").read_text() == "mine"
    pipeline = kind("sd1").from_pretrained(tmp_path / "model", local_files_only=True)
    assert type(pipeline.scheduler).__name__ == "PNDMScheduler"
    assert pipeline.scheduler.config.prediction_type == "epsilon"


def test_another_vae_is_taken(convert: Convert, tiny_models: Find, tmp_path: Path) -> None:
    other = tmp_path / "vae.safetensors"
    tensors = load_file(tiny_models("sd1") / "vae/diffusion_pytorch_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other)
    source = tmp_path / "without.safetensors"
    folder_as_single_file(tiny_models("sd1"), source, parts=("unet", "text_encoder"))
    assert convert(source, tmp_path / "model", "--vae", other) == 0
    found = load_file(tmp_path / "model/vae/diffusion_pytorch_model.safetensors")
    assert all(found[name].equal(tensor + 1) for name, tensor in tensors.items())


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_a_guess_does_not_become_evidence(convert: Convert, tiny_models: Find, tmp_path: Path) -> None:
    key = "modelspec.prediction_type"
    folder_as_single_file(tiny_models("sdxl"), tmp_path / "v.safetensors", metadata={key: "v"})
    bare = Path(shutil.copytree(tiny_models("sd1"), tmp_path / "bare"))
    config = bare / "scheduler/scheduler_config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps({name: value for name, value in told.items() if name != "prediction_type"}))
    for source, more, expected in (
        (tiny_models("sd1_file"), (), None),
        (bare, (), None),
        (tiny_models("sd1_file"), ("--prediction_type", "epsilon"), "epsilon"),
        (tiny_models("sd1"), (), "epsilon"),
        (tmp_path / "v.safetensors", (), "v"),
    ):
        assert convert(source, tmp_path / "new.safetensors", *more) == 0
        found = metadata_of(tmp_path / "new.safetensors")
        assert found.get(key) == expected
        assert "modelspec.architecture" in found


def test_what_happens_to_the_file_is_told(
    convert: Convert, tiny_models: Find, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copies in another precision than the weights, values that are no numbers, and a file that replaces itself."""
    file, name = tmp_path / "model.safetensors", "first_stage_model.decoder.conv_in.bias"
    endless = np.full(2, np.inf, np.float32)
    extra = {"model_ema.x": np.ones(1, np.float32), "sqrt_recip_alphas_cumprod": endless}
    folder_as_single_file(tiny_models("sd1"), file, extra=extra)
    assert convert(file, file, "--fp16") == 0
    told = capsys.readouterr().err
    assert "another precision is asked for:\n  EMA copies: model_ema.x" in told
    assert f"{file} is one of the files that are read: it is replaced" in told
    assert "warning" not in told
    tensors = load_file(file)
    assert "model_ema.x" not in tensors and tensors["sqrt_recip_alphas_cumprod"].dtype == torch.float32
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, file)
    assert convert(file, tmp_path / "new") == 0
    assert f"values that are no finite numbers are in {name}: " in " ".join(capsys.readouterr().err.split())


def test_a_hub_model_as_reference(
    convert: Convert,
    tiny_models: Find,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its tokenizer and scheduler out of the hub's cache; one that can't be had is replaced by what is packaged."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    kept = tmp_path / "models--me--it/snapshots/1"
    for name in ("scheduler", "tokenizer"):
        shutil.copytree(tiny_models("sd1") / name, kept / name)
    shutil.copy(tiny_models("sd1") / "model_index.json", kept)
    (tmp_path / "models--me--it/refs").mkdir()
    (tmp_path / "models--me--it/refs/main").write_text("1")
    scheduler = json.loads((kept / "scheduler/scheduler_config.json").read_text()) | {"beta_end": 0.0123}
    (kept / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    for name, beta, warned in (("me/it", 0.0123, False), ("you/that", 0.012, True)):
        new = tmp_path / name.replace("/", "_")
        assert convert(tiny_models("sd1_file"), new, "--reference_model", name) == 0
        assert json.loads((new / "scheduler/scheduler_config.json").read_text())["beta_end"] == beta
        assert (new / "tokenizer/vocab.json").is_file()
        told = " ".join(capsys.readouterr().err.split())
        assert ("the usual tokenizers and scheduler are taken" in told) == warned


WRONG = {
    "two precisions": (("{sd1}", "{new}.safetensors", "--fp16", "--bf16"), "contradict each other"),
    "a pickle to write": (("{sd1}", "{new}.ckpt"), "use .safetensors"),
    "metadata of a folder": (("{sd1_file}", "{new}", "--metadata", "{{}}", "--epoch", "3"), "has no place in a folder"),
    "metadata that would run": (("{sd1}", "{new}.safetensors", "--metadata", "__import__('os')"), "is no JSON object"),
    "the wrong version": (("{sd1_file}", "{new}", "--v2"), "is an SD1 model"),
    "the other one": (("{sdxl_file}", "{new}", "--v1"), "is an SDXL model"),
    "nothing there": (("{new}.safetensors", "{new}"), "src: "),
    "a place within a file": (("{sd1}", "{lora}/x.safetensors"), "is no folder"),
    "a folder in itself": (("{sd1}", "{sd1}/inner"), "lies within"),
    "a hub model as a file's reference": (("{sd1}", "{new}.safetensors", "--reference_model", "me/it"), "from a file"),
    "a folder that is full": (("{sd1_file}", "{sd1}"), "isn't empty"),
    "a LoRA": (("{lora}", "{new}"), "a LoRA (or another adapter)"),
    "an embedding": (("{embedding}", "{new}"), "an embedding"),
    "a truncated file": (("{truncated}", "{new}"), "is truncated"),
    "a file as reference": (("{sd1_file}", "{new}", "--reference_model", "{sd1_file}"), "is no diffusers folder"),
    "a folder as reference": (("{sd1}", "{new}.safetensors", "--reference_model", "{sd1}"), "is a folder"),
    "another family as reference": (("{sd1}", "{new}.safetensors", "--reference_model", "{sdxl_file}"), "not SD1"),
    "no such variant": (("{sd1}", "{new}.safetensors", "--variant", "fp16"), "of the variant fp16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_line(
    case: str, convert: Convert, tiny_models: Find, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1, 1)}, given / "lora.safetensors")
    save_file({"emb_params": torch.zeros(1, 768)}, given / "embedding.safetensors")
    whole = tiny_models("sd1_file").read_bytes()
    (given / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    files = {one.stem: one for one in given.iterdir()}
    models = {name: tiny_models(name) for name in ("sd1", "sd1_file", "sdxl_file")}
    new = tmp_path / "new" / "model"
    arguments, told = WRONG[case]
    assert convert(*(one.format(new=new, **files, **models) for one in arguments)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert any(told in line for line in lines)
    assert len(lines) == (2 if case == "metadata of a folder" else 1)
    assert "--pretrained_model_name_or_path" not in "".join(lines)
    assert not new.parent.exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_size_models_go_both_ways_in_little_memory(family: str, tmp_path: Path) -> None:
    """A float16 file into a folder and back: the same bits, never more than 2 GB; what it takes is printed."""
    source, back = tmp_path / "model.safetensors", tmp_path / "back.safetensors"
    write_single_file(family, source, dtype="F16")
    script = [sys.executable, str(ROOT / "tools/convert_checkpoint.py")]
    told = ["--prediction_type", "epsilon"]
    for arguments in ([source, tmp_path / "new", *told], [tmp_path / "new", back, "--reference_model", source]):
        done = run_measured([*script, *map(str, arguments)], environment(), tmp_path / "log")
        assert done.returncode == 0, done.stderr
        print(f"{family}: {done.seconds:.0f} s, peak {done.anonymous / 1e6:.0f} MB")
        assert done.anonymous < 2e9
    with safe_open(source, "pt") as first, safe_open(back, "pt") as second:
        names = set(first.keys())
        assert names == set(second.keys())
        for name in names:
            one, other = first.get_tensor(name), second.get_tensor(name)
            assert one.squeeze().equal(other.squeeze()), name  # SD2's kernels of 1x1 become matrices
