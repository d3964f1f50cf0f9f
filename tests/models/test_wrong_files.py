"""Files that are no base model, or a damaged one: one line each that says what they are, before anything else."""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from library.errors import UserError
from library.models import integrity
from library.models.inspect import inspect
from tests.original_layout import Tensor, folder_as_single_file, write
from tests.pictures import make_pictures
from tests.programs import run_script

UNET = "model.diffusion_model."
CONTEXT = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
LABELS = {UNET + "label_emb.0.0.weight": (8, 8)}
SD1: dict[str, tuple[int, ...]] = {
    UNET + "input_blocks.0.0.weight": (8, 4, 3, 3),
    UNET + "input_blocks.1.0.out_layers.3.weight": (8, 8, 3, 3),
    UNET + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (8, 8),
    UNET + "middle_block.1.transformer_blocks.0.attn1.to_q.weight": (8, 8),
    CONTEXT: (8, 16),
    "first_stage_model.encoder.down.0.block.0.conv1.weight": (8, 8, 3, 3),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 16),
}
UNET_ONLY = {name: shape for name, shape in SD1.items() if name.startswith(UNET)}
REFINER = UNET_ONLY | LABELS | {CONTEXT: (8, 1280), "conditioner.embedders.0.model.ln_final.weight": (8,)}
SDXL_TEXT = {"conditioner.embedders.1.model.token_embedding.weight": (49408, 16)}
SD2_TEXT = {"cond_stage_model.model.token_embedding.weight": (49408, 16)}

FOREIGN: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "refiner": (REFINER, "is an SDXL refiner"),
    "refiner's U-Net": (UNET_ONLY | LABELS | {UNET + "input_blocks.9.0.op.weight": (8, 8, 3, 3)}, "is an SDXL refiner"),
    "inpainting": (SD1 | {UNET + "input_blocks.0.0.weight": (8, 9, 3, 3)}, "is an inpainting model"),
    "SDXL inpainting": (
        UNET_ONLY | LABELS | SDXL_TEXT | {UNET + "input_blocks.0.0.weight": (8, 9, 3, 3)},
        "is an inpainting model",
    ),
    "editing": (SD1 | {UNET + "input_blocks.0.0.weight": (8, 8, 3, 3)}, "is an image-editing model"),
    "depth": (UNET_ONLY | SD2_TEXT | {UNET + "input_blocks.0.0.weight": (8, 5, 3, 3)}, "is a depth model"),
    "SD3": ({UNET + "joint_blocks.0.x_block.attn.qkv.weight": (8, 8)}, "is a Stable Diffusion 3 model"),
    "Flux": ({UNET + "double_blocks.0.img_attn.qkv.weight": (8, 8)}, "is a Flux model"),
    "bare Flux": ({"double_blocks.0.img_attn.qkv.weight": (8, 8)}, "is a Flux model"),
    "LoRA": ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 8, 1, 1)}, "is a LoRA"),
    "peft LoRA": ({"unet.mid_block.attentions.0.to_q.lora_A.weight": (4, 8)}, "is a LoRA"),
    "LoRA of attention processors": (
        {"mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight": (4, 8)},
        "is a LoRA",
    ),
    "LoRA of linear layers": ({"unet.mid_block.attentions.0.to_q.lora_linear_layer.down.weight": (4, 8)}, "is a LoRA"),
    "scaled fp8": (
        SD1 | {UNET + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.scale_weight": (1,)},
        "its unet is in scaled fp8 (by its tensor model.diffusion_model.input_blocks.1.1.",
    ),
    "marked as scaled fp8": (SD1 | {"scaled_fp8": (0,)}, "is in scaled fp8 (by its tensor scaled_fp8)"),
    "scaled fp8 text encoder": (
        SD1 | {"cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.scale_weight": (1,)},
        "its text_encoder is in scaled fp8",
    ),
    "embedding": ({"emb_params": (3, 768)}, "is an embedding (Textual Inversion)"),
    "SDXL embedding": ({"clip_l": (3, 768), "clip_g": (3, 1280)}, "is an embedding (Textual Inversion)"),
    "ControlNet": ({"control_model.input_hint_block.0.weight": (8, 3, 3, 3)}, "is a ControlNet"),
    "VAE": ({"encoder.down.0.block.0.conv1.weight": (8, 8, 3, 3)}, "is a VAE alone"),
    "prefixed VAE": ({"first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3)}, "is a VAE alone"),
    "diffusers VAE": ({"encoder.down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3)}, "is a VAE alone"),
    "text encoder": ({"text_model.encoder.layers.0.mlp.fc1.weight": (8, 8)}, "is a text encoder alone"),
    "U-Net of a folder": ({"down_blocks.0.x": (1,), "mid_block.x": (1,)}, "is only the U-Net of a diffusers folder"),
    "Playground": (UNET_ONLY | LABELS | SDXL_TEXT | {"edm_mean": (4,)}, "is a Playground v2.5 model"),
    "unCLIP": (UNET_ONLY | LABELS | SD2_TEXT, "is a model of an unknown family (like SD2"),
    "something": ({"something.else": (2,)}, "is no base model that is known here (its first tensor is something.else)"),
    "nothing": ({}, "is an empty file"),
    "other text": (SD1 | {CONTEXT: (8, 32)}, "attends to 32 text channels, its text encoders give 16"),
    "more tokens": (
        SD1 | {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49410, 16)},
        "a text encoder of 49410 tokens",
    ),
    "pruned": (
        SD1 | {UNET + "input_blocks.1.1.transformer_blocks.1.attn1.to_q.weight": (8, 8)},
        "other attention layers, as pruned models have",
    ),
}


def write_shapes(path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Path:
    """A valid file of zeros with these names and shapes."""
    write(path, [Tensor(n, "F16", s, partial(np.zeros, s, dtype="<f2")) for n, s in shapes.items()], metadata)
    return path


def refusal(path: Path | str, **options: Any) -> str:
    with pytest.raises(UserError) as raised:
        inspect(path, **options)
    (problem,) = raised.value.problems
    assert "\n" not in str(problem)
    return str(problem)


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_files_are_named(kind: str, tmp_path: Path) -> None:
    shapes, said = FOREIGN[kind]
    message = refusal(write_shapes(tmp_path / "file.safetensors", shapes))
    assert said in message and "file.safetensors" in message


@pytest.mark.parametrize("kind", ["LoRA", "embedding", "VAE", "inpainting"])
def test_other_pickles_are_named(kind: str, tmp_path: Path) -> None:
    import torch

    shapes, said = FOREIGN[kind]
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "file.pt")
    assert said in refusal(tmp_path / "file.pt")


def test_an_embedding_of_the_webui_is_named(tmp_path: Path) -> None:
    import torch

    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(3, 768)}, "name": "x", "step": 9}
    torch.save(content, tmp_path / "file.pt")
    assert "is an embedding (Textual Inversion)" in refusal(tmp_path / "file.pt")


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A damage that rewrites the header of a file."""

    def damage(path: Path) -> None:
        table, data = header_of(path)
        change(table)
        head = json.dumps(table).encode()
        path.write_bytes(struct.pack("<Q", len(head)) + head + data)

    return damage


def _set_length(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])


def _break_json(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[9:12] = b"\xff\xfe\xfd"
    path.write_bytes(bytes(raw))


def _names(table: dict[str, Any]) -> list[str]:
    return [name for name in table if name != "__metadata__"]


def _same_place(table: dict[str, Any]) -> None:
    one, two = (table[name] for name in _names(table) if table[name]["shape"] == [8, 8])
    one["data_offsets"] = two["data_offsets"]


def _shift(table: dict[str, Any]) -> None:
    entry = table[_names(table)[0]]
    entry["data_offsets"] = [offset + 2 for offset in entry["data_offsets"]]


def _first(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda table: table[_names(table)[0]].update(values)


def _twice(path: Path) -> None:
    raw = path.read_bytes()
    first, second = list(header_of(path)[0])[2:4]
    assert len(first) != len(second)
    text = raw.replace(first.encode(), second.encode())
    (length,) = struct.unpack("<Q", raw[:8])
    path.write_bytes(struct.pack("<Q", length + len(second) - len(first)) + text[8:])


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
        (_twice, "its header is damaged"),
        (with_header(_same_place), "is damaged: by its header, the tensor"),
        (with_header(_shift), "is damaged"),
        (with_header(_first(shape=[8, 4, 3, 4])), "its header is damaged"),
        (with_header(_first(shape=[-8, -4, 3, 3])), "its header is damaged"),
        (with_header(_first(data_offsets=[0.0, 576.0])), "its header is damaged"),
        (with_header(_first(data_offsets=[-2, 574])), "its header is damaged"),
        (with_header(_first(data_offsets=[1 << 62, (1 << 62) + 576])), "truncated"),
        (with_header(_first(dtype="I16")), "is of type I16; use a file in fp32, fp16 or bf16"),
        (with_header(_first(dtype="Q4_0")), "is of type Q4_0"),
    ],
)
def test_damaged_files(damage: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    path = write_shapes(tmp_path / "file.safetensors", SD1)
    assert inspect(path).family_name == "sd1"
    damage(path)
    message = refusal(path)
    assert said in message and path.name in message


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def with_hash(path: Path, key: str, *, right: bool = True, form: str = "0x{}") -> Path:
    """A file that carries a hash of its own content, or one of another."""
    write_shapes(path, SD1)
    digest = hashlib.sha256(header_of(path)[1]).hexdigest()
    return write_shapes(path, SD1, {key: form.format(digest if right else digest[::-1])})


@pytest.mark.parametrize(("key", "form"), [("modelspec.hash_sha256", "0x{}"), ("sshs_model_hash", "{}")])
def test_a_file_that_is_not_what_its_hash_says(key: str, form: str, cache: Path, tmp_path: Path) -> None:
    path = with_hash(tmp_path / "file.safetensors", key, form=form)
    inspect(path)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))
    message = refusal(path)
    assert key in message and "--ignore_model_hash" in message and path.name in message
    inspect(path, check_hash=False)
    inspect(with_hash(tmp_path / "other.safetensors", key, right=False, form="none"))


def test_a_vae_is_checked_too(cache: Path, tmp_path: Path) -> None:
    model = write_shapes(tmp_path / "file.safetensors", SD1)
    vae = with_hash(tmp_path / "vae.safetensors", "sshs_model_hash", right=False)
    assert refusal(model, vae=str(vae)).startswith(f"--vae {vae}: its metadata")


def test_a_check_is_remembered_until_the_file_changes(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_hash(tmp_path / "file.safetensors", "modelspec.hash_sha256")
    os.utime(path, ns=(2, 2))
    real, reads = integrity._hash, list[Path]()

    def counted(file: Path) -> str:
        reads.append(file)
        return real(file)

    monkeypatch.setattr(integrity, "_hash", counted)
    inspect(path)
    assert "against its own hash" in capsys.readouterr().err
    inspect(path)
    assert reads == [path] and list((cache / "lorasmith").iterdir()) == [cache / "lorasmith" / "content_sha256.json"]
    os.utime(path, ns=(1, 1))
    inspect(path)
    assert len(reads) == 2
    (cache / "lorasmith" / "content_sha256.json").write_text("[1")
    inspect(path)
    assert len(reads) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    inspect(path)
    assert len(reads) == 4


def test_paths_that_are_no_models(tiny_sd1: Path, tmp_path: Path) -> None:
    assert "did you mean tiny_sd1?" in refusal(tiny_sd1.parent / "tiny_sdd1")
    assert "nor does the folder" in refusal("somewhere/else/model")
    assert "nor does the folder" in refusal("somewhere/model.safetensors")
    assert "not a diffusers model folder" in refusal(tmp_path)
    assert str(tiny_sd1) in refusal(tiny_sd1 / "unet")
    write_shapes(tmp_path / "file.safetensors", SD1)
    assert f"did you mean {tmp_path / 'file.safetensors'}?" in refusal(tmp_path)


def lone_part(folder: Path, part: str, target: Path) -> Path:
    import shutil

    shutil.copytree(folder / part, target)
    return target


def test_folders_of_one_part_are_named(tiny_sdxl: Path, tmp_path: Path) -> None:
    vae, text = lone_part(tiny_sdxl, "vae", tmp_path / "v"), lone_part(tiny_sdxl, "text_encoder_2", tmp_path / "t")
    assert f"{vae} is a VAE alone, not a base model" in refusal(vae)
    assert f"{text} is a text encoder alone, not a base model" in refusal(text)
    assert "is only the U-Net of a diffusers folder" in refusal(lone_part(tiny_sdxl, "unet", tmp_path / "u"))
    assert "did you mean" not in refusal(vae) + refusal(text)
    inside = refusal(tiny_sdxl / "vae")
    assert "is a VAE alone" in inside and inside.endswith(f"did you mean {tiny_sdxl}?")
    (vae / "config.json").unlink()
    message = refusal(vae)
    assert "diffusion_pytorch_model.safetensors in it is a VAE alone" in message and "did you mean" not in message


def test_folders_of_loras_are_named(tmp_path: Path) -> None:
    file = write_shapes(tmp_path / "pytorch_lora_weights.safetensors", FOREIGN["peft LoRA"][0])
    message = refusal(tmp_path)
    assert f"{file.name} in it is a LoRA" in message and "did you mean" not in message
    file.rename(file.with_suffix(".bin"))
    assert f"{tmp_path} is a LoRA (or another adapter), not a base model; training takes" in refusal(tmp_path)


def test_only_a_file_that_is_a_base_model_is_offered(tmp_path: Path) -> None:
    write_shapes(tmp_path / "a.safetensors", FOREIGN["LoRA"][0])
    (tmp_path / "b.safetensors").write_bytes(b"damaged")
    write_shapes(tmp_path / "c.safetensors", SD1)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "architectures": [None]}))
    assert refusal(tmp_path).endswith(f"did you mean {tmp_path / 'c.safetensors'}?")


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("unet/config.json", {"in_channels": 9}, "an inpainting model"),
        ("unet/config.json", {"cross_attention_dim": 64}, "of different models"),
        ("unet/config.json", {"addition_embed_type": "text"}, "takes more than noise, time and text"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "a Flux model"),
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "a Stable Diffusion 3 model"),
        ("text_encoder/config.json", {"vocab_size": 49410}, "49410 tokens"),
        ("vae/config.json", {"latent_channels": 16}, "16 channels"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "'sample'"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "'sigmoid'"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
    ],
)
def test_other_folders_are_named(
    file: str, values: dict[str, object], said: str, tiny_sd1: Path, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "folder"
    shutil.copytree(tiny_sd1, folder)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))
    assert said in refusal(folder)


def test_a_refiners_folder_is_named(tiny_sdxl: Path, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_bytes((tiny_sdxl / "unet" / "config.json").read_bytes())
    index = json.loads((tiny_sdxl / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"text_encoder": [None, None]}))
    assert "is an SDXL refiner" in refusal(tmp_path)


def test_incomplete_folders(tiny_sd1: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "folder"
    shutil.copytree(tiny_sd1, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".msgpack"))
    assert "holds no diffusion_pytorch_model.safetensors, only diffusion_pytorch_model.msgpack" in refusal(folder)
    (folder / "unet" / "config.json").write_text("{")
    assert "can't be read as JSON" in refusal(folder)
    (folder / "unet" / "config.json").unlink()
    assert "without unet/config.json" in refusal(folder)


@pytest.mark.parametrize("kind", ["inpainting", "evil pickle", "wrong hash", "LoRA"])
def test_the_script_says_it_in_one_line(kind: str, tmp_path: Path, tiny_sd1: Path) -> None:
    make_pictures(tmp_path / "pictures", count=2)
    path = tmp_path / "file.safetensors"
    if kind == "evil pickle":
        path = tmp_path / "file.ckpt"
        path.write_bytes(b"\x80\x02cposix\nsystem\nU\x0btouch owned\x85R.")
        said = "posix.system, which could run code"
    elif kind == "wrong hash":
        folder_as_single_file(tiny_sd1, path, metadata={"modelspec.hash_sha256": "0x" + "0" * 64})
        said = "--ignore_model_hash"
    else:
        shapes, said = FOREIGN[kind]
        write_shapes(path, shapes)
    done = run_script(
        *("--pretrained_model_name_or_path", path, "--train_data_dir", tmp_path / "pictures"),
        *("--output_dir", tmp_path / "output", "--output_name", "x", "--network_module", "networks.lora"),
        *("--resolution", "64", "--caption_extension", ".txt", "--max_train_steps", "1"),
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0] and path.name in errors[0], done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "output").exists()
    assert not Path("owned").exists()
