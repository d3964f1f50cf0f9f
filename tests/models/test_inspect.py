"""What `inspect` makes of every kind of base model that users give."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from library.errors import UserError
from library.models.info import ModelInfo
from library.models.inspect import inspect
from library.models.single_configs import packaged
from tests.original_layout import folder_as_single_file, original_tensors

FAMILY_NAMES = ("sd1", "sd2", "sdxl")
Models = Callable[[str], Path]
UNET_KEYS = (
    *("block_out_channels", "cross_attention_dim", "layers_per_block", "down_block_types", "up_block_types"),
    *("in_channels", "out_channels", "attention_head_dim", "norm_num_groups", "transformer_layers_per_block"),
    *("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
)
VAE_KEYS = ("block_out_channels", "layers_per_block", "latent_channels", "scaling_factor", "norm_num_groups")
TEXT_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "hidden_act"),
    *("eos_token_id", "projection_dim", "max_position_embeddings"),
)


def refusal(path: Path | str, **options: Any) -> str:
    """The one message with which `inspect` refuses a path."""
    with pytest.raises(UserError) as raised:
        inspect(path, **options)
    (problem,) = raised.value.problems
    assert "\n" not in str(problem)
    return str(problem)


def copy(folder: Path, target: Path) -> Path:
    """A copy of a model folder that a test may damage."""
    shutil.copytree(folder, target, copy_function=shutil.copy)
    return target


def edit(path: Path, **values: object) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def save_pickle(folder: Path, path: Path, *, zipped: bool = True, nested: bool = True) -> Path:
    """A tiny model as a `.ckpt` in the original layout."""
    import torch

    tensors = {name: torch.from_numpy(array.copy()) for name, array in original_tensors(folder).items()}
    torch.save({"state_dict": tensors} if nested else tensors, path, _use_new_zipfile_serialization=zipped)
    return path


def same(one: ModelInfo, other: ModelInfo) -> None:
    """Both have configs of the same sizes."""
    assert one.family_name == other.family_name and one.vae_factor == other.vae_factor
    for key in UNET_KEYS:
        assert (one.unet_config.get(key) or 1) == (other.unet_config.get(key) or 1), key
    for key in VAE_KEYS:
        assert one.vae_config[key] == other.vae_config[key], key
    for mine, its in zip(one.text_encoder_configs, other.text_encoder_configs, strict=True):
        for key in TEXT_KEYS:
            assert mine[key] == its[key], key


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_folders_are_described(family: str, tiny_models: Models) -> None:
    info = inspect(str(tiny_models(family)))
    assert (info.family_name, info.layout, info.vae_factor) == (family, "folder", 8)
    assert info.prediction_type == ("v_prediction" if family == "sd2" else "epsilon")
    assert list(info.parts) == list(info.family.parts)
    assert [path.parent.name for path in info.files()] == list(info.family.parts)
    assert info.name == f"tiny_{family}" and info.vae_path is None
    assert all(not part.original and part.prefix == "" for part in info.parts.values())
    assert f"{info.family.title}, diffusers folder, predicts" in info.line


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_single_file_configs_follow_its_tensors(family: str, tiny_models: Models) -> None:
    file = tiny_models(f"{family}_file")
    one, many = inspect(str(file)), inspect(str(tiny_models(family)))
    same(one, many)
    assert one.layout == "single_file" and one.files() == (file,)
    assert one.prediction_type == (None if family == "sd2" else "epsilon")
    prefixes: dict[str, str] = {encoder.part: encoder.prefix for encoder in one.family.text_encoders}
    prefixes |= {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
    for name, part in one.parts.items():
        assert part.original and part.prefix == prefixes[name]
    assert not one.unet_config.get("use_linear_projection") or family == "sdxl"
    assert one.scheduler_config["beta_schedule"] == "scaled_linear" and not one.zero_terminal_snr
    assert ("float16" in one.line) == (family == "sdxl") and ("will be probed" in one.line) == (family == "sd2")


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_described_alike(family: str, zipped: bool, tiny_models: Models, tmp_path: Path) -> None:
    path = save_pickle(tiny_models(family), tmp_path / "model.ckpt", zipped=zipped, nested=zipped)
    same(inspect(path), inspect(tiny_models(f"{family}_file")))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_without_text_model_in_16_bits_with_ema(family: str, dtype: str, tiny_models: Models, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    copies = list(original_tensors(tiny_models(family), parts=["unet"]))[:200]
    extra = {"model_ema." + name.removeprefix("model.").replace(".", ""): np.zeros(1) for name in copies}
    extra |= {
        "model_ema.decay": np.zeros(()),
        "cond_stage_model.logit_scale" if family == "sd1" else "alphas": np.ones(1),
    }
    folder_as_single_file(tiny_models(family), path, text_model=False, dtype=dtype, extra=extra)
    same(inspect(path), inspect(tiny_models(f"{family}_file")))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_full_size_files_have_the_packaged_configs_at_once(family: str, tmp_path: Path) -> None:
    from tests.full_size import shapes

    path = tmp_path / "model.safetensors"
    write_sparse(path, shapes(family))
    start = time.perf_counter()
    info = inspect(path)
    assert time.perf_counter() - start < 1
    for name, part in info.parts.items():
        assert part.config == packaged(family, name), name
    assert info.unet_config["block_out_channels"][:3] == [320, 640, 1280]
    assert [config["num_hidden_layers"] for config in info.text_encoder_configs] == (
        {"sd1": [12], "sd2": [23], "sdxl": [12, 32]}[family]
    )


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A file of zeros that takes no room on the disk."""
    import struct

    table, place = {}, 0
    for name, shape in shapes.items():
        end = place + 2 * int(np.prod(shape, dtype=np.int64))
        table[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [place, end]}
        place = end
    head = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + place)


def test_variants_shards_and_pickles_in_folders(tiny_sdxl: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = copy(tiny_sdxl, tmp_path / "model")
    text = folder / "text_encoder_2" / "model.safetensors"
    shutil.copy(text, text.with_name("model.fp16.safetensors"))
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    unet.rename(unet.with_name("diffusion_pytorch_model.fp16-00001-of-00001.safetensors"))
    index = unet.with_name("diffusion_pytorch_model.safetensors.index.fp16.json")
    index.write_text(json.dumps({"weight_map": {"x": "diffusion_pytorch_model.fp16-00001-of-00001.safetensors"}}))
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(vae), vae.with_name("diffusion_pytorch_model.fp16.bin"))
    vae.unlink()
    first = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(first), first.with_name("pytorch_model.bin"))
    first.unlink()
    names = [path.name for path in inspect(folder).files()]
    assert names == [
        "diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
        "diffusion_pytorch_model.fp16.bin",
        "pytorch_model.bin",
        "model.safetensors",
    ]
    message = refusal(folder, variant="fp16")
    assert message.startswith("--variant: ") and "text_encoder" in message and "pytorch_model.bin" in message
    (folder / "text_encoder" / "pytorch_model.bin").rename(folder / "text_encoder" / "pytorch_model.fp16.bin")
    assert inspect(folder, variant="fp16").files()[-1].name == "model.fp16.safetensors"
    index.write_text(json.dumps({"weight_map": {"x": "lost.safetensors"}}))
    assert "lacks lost.safetensors" in refusal(folder)
    index.write_text(json.dumps({"weight_map": {"x": "../../elsewhere.safetensors"}}))
    assert "names no files of weights" in refusal(folder)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_parts_that_a_file_lacks_come_from_elsewhere(family: str, tiny_models: Models, tmp_path: Path) -> None:
    bare = tmp_path / "unet.safetensors"
    folder_as_single_file(tiny_models(family), bare, parts=["unet"])
    whole, folder = str(tiny_models(f"{family}_file")), str(tiny_models(family))
    assert "holds no text encoder; name an" in refusal(bare) and "--text_encoder" in refusal(bare)
    assert "holds no VAE; name one with --vae" in refusal(bare, text_encoder=whole)
    assert "holds no text encoder" in refusal(bare, vae=whole)
    for source in (whole, folder):
        info = inspect(bare, vae=source, text_encoder=source)
        same(info, inspect(whole))
        assert info.vae_name == Path(source).name and info.vae_path == Path(source)
        assert f"VAE from --vae {source}" in info.line and f"--text_encoder {source}" in info.line
        assert {part.where.split()[0] for part in info.parts.values()} == {
            *("--pretrained_model_name_or_path", "--vae", "--text_encoder")
        }
    other = str(tiny_models("sd1" if family != "sd1" else "sd2"))
    message = refusal(bare, vae=whole, text_encoder=other)
    assert message.startswith("--text_encoder: ") and "model, the base model an" in message


def test_one_text_encoder_of_two_is_missed(tiny_sdxl: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    folder_as_single_file(tiny_sdxl, path, parts=["unet", "vae", "text_encoder_2"])
    assert "holds no text_encoder, one of its two text encoders" in refusal(path)
    folder_as_single_file(tiny_sdxl, path, parts=["unet", "vae", "text_encoder"])
    assert "holds no text_encoder_2, one of its two" in refusal(path)


def test_other_vaes(tiny_models: Models, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    base, folder = tiny_models("sd1_file"), tiny_models("sd2")
    stem = "first_stage_model."
    bare = {name.removeprefix(stem): torch.from_numpy(array.copy()) for name, array in
            original_tensors(folder, parts=["vae"]).items()}  # fmt: skip
    save_file(bare, tmp_path / "bare.safetensors")
    torch.save({"state_dict": bare}, tmp_path / "bare.ckpt")
    diffusers = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(diffusers), tmp_path / "diffusers.bin")
    alone = copy(folder / "vae", tmp_path / "alone")
    edit(alone / "config.json", scaling_factor=0.5)
    own = tiny_models("sd2_file")
    for path, original, prefix, scale in (
        (tmp_path / "bare.safetensors", True, "", 0.18215),
        (tmp_path / "bare.ckpt", True, "", 0.18215),
        (tmp_path / "diffusers.bin", False, "", 0.18215),
        (diffusers, False, "", 0.18215),
        (own, True, stem, 0.18215),
        (alone, False, "", 0.5),
        (alone / "diffusion_pytorch_model.safetensors", False, "", 0.5),
        (folder, False, "", 0.18215),
    ):
        info = inspect(base, vae=str(path))
        part = info.parts["vae"]
        assert (part.original, part.prefix, part.config["scaling_factor"]) == (original, prefix, scale), path
        assert part.config["block_out_channels"] == [32] * 4 and info.vae_factor == 8
        assert part.config["layers_per_block"] == 2 and part.config["latent_channels"] == 4
        assert info.vae_name == path.name
    edit(alone / "config.json", _class_name="AutoencoderTiny")
    assert "a folder of AutoencoderTiny" in refusal(base, vae=str(alone))
    edit(alone / "config.json", _class_name="AutoencoderKL", latent_channels=16)
    message = refusal(base, vae=str(alone))
    assert message.startswith("--vae") and "16 channels, the U-Net takes 4" in message
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    assert "holds no VAE, it is a LoRA" in refusal(base, vae=str(tmp_path / "lora.safetensors"))
    assert "does not exist" in refusal(base, vae=str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize(
    ("family", "other", "needed"),
    [("sd1", "sdxl", "SD1 or SD2"), ("sd2", "sdxl", "SD1 or SD2"), ("sdxl", "sd2", "SDXL")],
)
def test_vaes_of_another_family_are_refused(
    family: str, other: str, needed: str, tiny_models: Models, tmp_path: Path
) -> None:
    base, folder = tiny_models(f"{family}_file"), tiny_models(other)
    title = inspect(folder).family.title
    for whole in (folder, tiny_models(f"{other}_file"), save_pickle(folder, tmp_path / "model.ckpt")):
        message = refusal(base, vae=str(whole))
        assert message.startswith(f"--vae: {whole} is an {title} model, whose VAE makes other latents; "), message
        assert message.endswith(f"needs a VAE of {needed} models")
    silent = copy(folder, tmp_path / "silent")
    config = json.loads((silent / "vae" / "config.json").read_text())
    scale = config.pop("scaling_factor")
    (silent / "vae" / "config.json").write_text(json.dumps(config))
    weights = "diffusion_pytorch_model.safetensors"
    for whole in (silent, silent / "vae", silent / "vae" / weights):
        assert f"{silent} is an {title} model" in refusal(base, vae=str(whole))
    alone = copy(folder / "vae", tmp_path / "alone")
    for path in (alone, alone / weights):
        message = refusal(base, vae=str(path))
        assert message.startswith(f"--vae: {alone} is a VAE of ") and f"has the scaling_factor {scale}" in message
    (alone / "config.json").unlink()
    assert inspect(base, vae=str(alone / weights)).vae_config["scaling_factor"] == inspect(base).family.latent_scale


@pytest.mark.parametrize("kind", ["refiner", "inpainting"])
def test_vaes_of_models_that_can_not_be_trained_have_a_family_too(
    kind: str, tiny_models: Models, tmp_path: Path
) -> None:
    file, folder = tmp_path / "model.safetensors", copy(tiny_models("sdxl"), tmp_path / "model")
    shapes = {name: array.shape for name, array in original_tensors(folder).items()}
    if kind == "refiner":
        shapes = {name: shape for name, shape in shapes.items() if ".embedders.1." not in name}
        shapes = {name.replace("embedders.0.transformer", "embedders.0.model"): s for name, s in shapes.items()}
        edit(folder / "model_index.json", text_encoder=[None, None])
    else:
        shapes["model.diffusion_model.input_blocks.0.0.weight"] = (32, 9, 3, 3)
        edit(folder / "unet" / "config.json", in_channels=9)
    write_sparse(file, shapes)
    for path in (file, folder):
        assert f"is an {'SDXL refiner' if kind == 'refiner' else 'inpainting model'}" in refusal(path)
        assert f"{path} is an SDXL model, whose VAE" in refusal(tiny_models("sd1"), vae=str(path))
        assert inspect(tiny_models("sdxl"), vae=str(path)).vae_path == path


def test_a_vae_that_was_mended_for_float16_is_known_by_its_config(tiny_models: Models, tmp_path: Path) -> None:
    fixed = copy(tiny_models("sdxl") / "vae", tmp_path / "fixed")
    edit(fixed / "config.json", force_upcast=False)
    whole = copy(tiny_models("sdxl"), tmp_path / "whole")
    edit(whole / "vae" / "config.json", force_upcast=False)
    for info in (
        inspect(tiny_models("sdxl_file"), vae=str(fixed)),
        inspect(tiny_models("sdxl"), vae=str(fixed / "diffusion_pytorch_model.safetensors")),
        inspect(whole),
        inspect(tiny_models("sd1")),
    ):
        assert not info.vae_fragile and "float16" not in info.line
    silent = json.loads((fixed / "config.json").read_text())
    del silent["force_upcast"]
    (fixed / "config.json").write_text(json.dumps(silent))
    for info in (inspect(whole, vae=str(fixed)), inspect(whole, vae=str(tiny_models("sdxl_file")))):
        assert info.vae_fragile and "its kind of VAE overflows in float16" in info.line


def test_sd2_files_have_a_layer_that_their_unet_does_not_know(tiny_sd2: Path, tmp_path: Path) -> None:
    layers = {name for name in original_tensors(tiny_sd2) if ".resblocks." in name}
    assert max(int(name.split(".resblocks.")[1].split(".")[0]) for name in layers) == 5
    folder_as_single_file(tiny_sd2, tmp_path / "model.safetensors")
    assert inspect(tmp_path / "model.safetensors").text_encoder_configs[0]["num_hidden_layers"] == 5


@pytest.mark.parametrize("layers", [23, 24, 25])
def test_full_size_sd2_encoders_have_23_layers_whatever_the_file_holds(layers: int, tmp_path: Path) -> None:
    from tests.full_size import shapes

    whole = shapes("sd2")
    block = "cond_stage_model.model.transformer.resblocks."
    changed = {name: shape for name, shape in whole.items() if not name.startswith(block)}
    for name, shape in whole.items():
        if name.startswith(f"{block}0."):
            changed |= {name.replace(f"{block}0.", f"{block}{layer}."): shape for layer in range(layers)}
    write_sparse(tmp_path / "model.safetensors", changed)
    assert inspect(tmp_path / "model.safetensors").text_encoder_configs[0]["num_hidden_layers"] == 23


def test_a_text_projection_that_is_not_transposed(tiny_sdxl: Path, tmp_path: Path) -> None:
    tensors = original_tensors(tiny_sdxl)
    stored = tensors.pop("conditioner.embedders.1.model.text_projection")
    assert stored.shape == (64, 48)
    tensors["conditioner.embedders.1.model.text_projection.weight"] = stored.T
    write_sparse(tmp_path / "model.safetensors", {name: array.shape for name, array in tensors.items()})
    info = inspect(tmp_path / "model.safetensors")
    assert info.text_encoder_configs[1]["projection_dim"] == 48
    assert info.unet_config["addition_time_embed_dim"] == 8


def test_no_torch_is_imported(tiny_sd1: Path, tiny_sdxl_file: Path, repo_root: Path) -> None:
    code = (
        "import sys; from library.models.inspect import inspect; from library.errors import UserError\n"
        "assert inspect(sys.argv[1]).family_name == 'sd1'\n"
        "assert inspect(sys.argv[2], vae=sys.argv[2]).family_name == 'sdxl'\n"
        "try: inspect(sys.argv[1] + 'x')\n"
        "except UserError as error: print(error)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", code, str(tiny_sd1), str(tiny_sdxl_file)]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "does not exist; did you mean" in done.stdout
