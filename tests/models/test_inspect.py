"""What `inspect` makes of every kind of path that users give, good and bad."""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from library.errors import UserError
from library.models.inspect import inspect
from tests.original_layout import Tensor, folder_as_single_file, write

UNET = "model.diffusion_model."
VAE = {"first_stage_model.encoder.down.0.block.0.conv1.weight": (8, 8, 3, 3)}
CLIP = {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 16)}
SD1 = {
    UNET + "input_blocks.0.0.weight": (8, 4, 3, 3),
    UNET + "input_blocks.1.0.out_layers.3.weight": (8, 8, 3, 3),
    UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 16),
    **VAE,
    **CLIP,
}


def write_shapes(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A valid file of zeros with these names and shapes."""
    write(path, [Tensor(n, "F16", s, partial(np.zeros, s, dtype="<f2")) for n, s in shapes.items()])
    return path


def refusal(path: Path | str) -> str:
    """The one message with which `inspect` refuses a path."""
    with pytest.raises(UserError) as raised:
        inspect(path)
    (problem,) = raised.value.problems
    return str(problem)


def copy(folder: Path, target: Path) -> Path:
    """A copy of a model folder that a test may damage; weights are links until replaced."""
    shutil.copytree(folder, target, copy_function=shutil.copy)
    return target


def edit(path: Path, **values: object) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_folder_is_described(tiny_sd1: Path) -> None:
    info = inspect(tiny_sd1)
    assert (info.family, info.layout, info.prediction_type, info.vae_factor) == ("sd1", "folder", "epsilon", 8)
    assert info.unet_config["block_out_channels"] == [32, 64, 64, 64]
    assert [path.parent.name for path in info.files()] == ["unet", "vae", "text_encoder"]


def test_single_file_configs_follow_its_tensors(tiny_sd1: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.safetensors"
    folder_as_single_file(tiny_sd1, file)
    one, many = inspect(file), inspect(tiny_sd1)
    assert one.layout == "single_file" and one.files() == (file,) and one.vae_factor == 8
    assert not one.prediction_known
    for key in ("block_out_channels", "cross_attention_dim", "layers_per_block", "down_block_types", "up_block_types"):
        assert one.unet_config[key] == many.unet_config[key], key
    for key in ("block_out_channels", "layers_per_block", "latent_channels", "scaling_factor"):
        assert one.vae_config[key] == many.vae_config[key], key
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "hidden_act"):
        assert one.text_encoder_config[key] == many.text_encoder_config[key], key


def test_v_prediction_is_told_by_marker_metadata_and_scheduler(tiny_sd1: Path, tmp_path: Path) -> None:
    marked = write_shapes(tmp_path / "marked.safetensors", SD1 | {"v_pred": (), "ztsnr": ()})
    info = inspect(marked)
    assert info.prediction_type == "v_prediction" and info.prediction_known
    assert info.scheduler_config["rescale_betas_zero_snr"]
    folder = copy(tiny_sd1, tmp_path / "v")
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert inspect(folder).prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 8, 1, 1)}, "a LoRA"),
        ({"unet.mid_block.attentions.0.to_q.lora_A.weight": (4, 8)}, "a LoRA"),
        ({"decoder.conv_in.weight": (8, 4, 3, 3), "encoder.down.0.block.0.conv1.weight": (8, 8, 3, 3)}, "a VAE alone"),
        ({"emb_params": (3, 768)}, "an embedding"),
        ({"control_model.input_hint_block.0.weight": (8, 3, 3, 3)}, "a ControlNet"),
        ({"text_model.encoder.layers.0.mlp.fc1.weight": (8, 8)}, "a text encoder alone"),
        ({"something.else": (2,)}, "no base model that is known here"),
        (SD1 | {UNET + "label_emb.0.0.weight": (8, 8), "conditioner.embedders.1.model.ln_final.weight": (8,)}, "SDXL"),
        (
            SD1
            | {UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 1280)}
            | {"conditioner.embedders.0.model.ln_final.weight": (8,)},
            "an SDXL refiner",
        ),
        (SD1 | {UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 1024)}, "an SD2 model"),
        (SD1 | {UNET + "input_blocks.0.0.weight": (8, 9, 3, 3)}, "an inpainting model"),
        (SD1 | {UNET + "input_blocks.0.0.weight": (8, 8, 3, 3)}, "an image-editing model"),
        ({UNET + "joint_blocks.0.x_block.attn.qkv.weight": (8, 8)}, "a Stable Diffusion 3 model"),
        ({UNET + "double_blocks.0.img_attn.qkv.weight": (8, 8)}, "a Flux model"),
        ({"double_blocks.0.img_attn.qkv.weight": (8, 8)}, "a Flux model"),
        ({k: v for k, v in SD1.items() if k not in VAE}, "a U-Net without VAE"),
        ({k: v for k, v in SD1.items() if k not in CLIP}, "a U-Net without text encoder"),
        ({}, "an empty file"),
    ],
)
def test_other_files_are_named(shapes: dict[str, tuple[int, ...]], said: str, tmp_path: Path) -> None:
    message = refusal(write_shapes(tmp_path / "file.safetensors", shapes))
    assert said in message and "SD1" in message


def _set_length(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 1 << 40) + raw[8:])


def _break_json(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[12:16] = b"\xff\xff\xff\xff"
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(b""), "empty or truncated"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "truncated"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "truncated"),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "damaged"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid 1\n"), "git-lfs"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(400)), "pickle"),
        (_set_length, "not a safetensors file"),
        (_break_json, "its header is damaged"),
    ],
)
def test_damaged_files(damage: Callable[[Path], object], said: str, tiny_sd1: Path, tmp_path: Path) -> None:
    single = write_shapes(tmp_path / "file.safetensors", SD1)
    folder = copy(tiny_sd1, tmp_path / "folder")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    for path, given in ((single, single), (weights, folder)):
        damage(path)
        message = refusal(given)
        assert said in message and path.name in message


def test_paths_that_are_no_models(tiny_sd1: Path, tmp_path: Path) -> None:
    assert "did you mean tiny_sd1?" in refusal(tiny_sd1.parent / "tiny_sd")
    assert "hub" in refusal("runwayml/stable-diffusion-v1-5")
    assert "not a diffusers model folder" in refusal(tmp_path)
    assert str(tiny_sd1) in refusal(tiny_sd1 / "unet")
    (tmp_path / "old.ckpt").write_bytes(b"\x80")
    assert "convert it to .safetensors" in refusal(tmp_path / "old.ckpt")


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("unet/config.json", {"in_channels": 9}, "an inpainting model"),
        ("unet/config.json", {"use_linear_projection": True}, "an SD2 model"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "an SDXL model"),
        ("unet/config.json", {"cross_attention_dim": 64}, "of different models"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "a Flux model"),
        ("text_encoder/config.json", {"vocab_size": 49410}, "49410 tokens"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "'sample'"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "'sigmoid'"),
    ],
)
def test_other_folders_are_named(
    file: str, values: dict[str, object], said: str, tiny_sd1: Path, tmp_path: Path
) -> None:
    folder = copy(tiny_sd1, tmp_path / "folder")
    edit(folder / file, **values)
    assert said in refusal(folder)


def test_incomplete_folders(tiny_sd1: Path, tmp_path: Path) -> None:
    folder = copy(tiny_sd1, tmp_path / "folder")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "pickle" in refusal(folder)
    weights.with_suffix(".bin").unlink()
    assert "holds no diffusion_pytorch_model.safetensors" in refusal(folder)
    (folder / "unet" / "config.json").write_text("{")
    assert "can't be read as JSON" in refusal(folder)


def test_no_torch_is_imported(tiny_sd1: Path, repo_root: Path) -> None:
    code = (
        "import sys; from library.models.inspect import inspect; from library.errors import UserError\n"
        "assert inspect(sys.argv[1]).family == 'sd1'\n"
        "try: inspect(sys.argv[1] + 'x')\n"
        "except UserError as error: print(error)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", code, str(tiny_sd1)]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "does not exist; did you mean" in done.stdout
