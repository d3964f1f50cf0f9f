"""On a CUDA device: mixed precision in every family, fp16 with loss scaling, and what saves memory or time there."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from library.models.attention import choose_attention
from library.models.inspect import inspect
from library.models.load import load
from library.models.offload import KeptInRam, optimizer_tensors, set_aside
from tests.embedding_runs import (
    COUNTS,
    LORA,
    pictures_of_tokens,
    train,
    train_both,
    vectors,
    watched_models,
)
from tests.pictures import make_pictures

GPU = torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_trains_finite_weights(
    tiny_models: Callable[[str], Path], tmp_path: Path, precision: str, family: str
) -> None:
    from train_network import main

    make_pictures(tmp_path / "pictures", count=4)
    code = main(
        [
            *(
                "--pretrained_model_name_or_path",
                str(tiny_models(family)),
                "--train_data_dir",
                str(tmp_path / "pictures"),
            ),
            *("--output_dir", str(tmp_path / "output"), "--output_name", "x", "--network_module", "networks.lora"),
            *("--resolution", "64", "--caption_extension", ".txt", "--max_train_steps", "8", "--seed", "1"),
            *("--mixed_precision", precision, "--save_state", "--cache_latents", "--train_batch_size", "2"),
            *("--learning_rate", "1e-3"),
        ]
    )
    assert code == 0
    tensors = load_file(tmp_path / "output/x.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    assert any(tensor.any() for key, tensor in tensors.items() if key.endswith("lora_up.weight"))
    manifest = json.loads((tmp_path / "output/x-state/manifest.json").read_text())
    assert manifest["settings"]["precision"] == precision


def bits(module: torch.nn.Module) -> list[torch.Tensor]:
    return [tensor.detach().cpu().clone() for tensor in module.state_dict().values()]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["xformers", "mem_eff"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attention_kernels_give_what_torch_s_choice_gives(
    tiny_models: Callable[[str], Path], kind: str, dtype: torch.dtype
) -> None:
    if kind == "xformers":
        pytest.importorskip("xformers")
    model = load(inspect(str(tiny_models("sd1"))), device=GPU, dtype=dtype, vae_dtype=dtype)
    noisy, times = torch.randn(2, 4, 8, 8), torch.tensor([3, 900])
    text = model.encode_prompts(["a cat", "a dog"])
    gradients, outputs = [], []
    for wanted in (False, True):
        flags = {"xformers": False, "mem_eff": False} | ({kind: True} if wanted else {})
        chosen = choose_attention(model.unet, **flags, device=GPU, dtype=dtype)
        assert chosen == ({"xformers": "xformers", "mem_eff": "memory-saving"}[kind] if wanted else "torch")
        weight = model.unet.conv_in.weight.requires_grad_(True)
        weight.grad = None
        out = model.predict(noisy, times, text)
        out.square().mean().backward()
        outputs.append(out.detach())
        gradients.append(weight.grad.float())
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    for one, two in (outputs, gradients):
        assert float((one - two).norm()) <= tolerance * float(two.norm())


@pytest.mark.gpu
def test_what_is_set_aside_leaves_the_gpu_and_comes_back_bit_for_bit(tiny_models: Callable[[str], Path]) -> None:
    model = load(inspect(str(tiny_models("sdxl"))), device=GPU, dtype=torch.bfloat16, vae_dtype=torch.bfloat16)
    parameter = torch.nn.Parameter(torch.randn(1000, device=GPU))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    states, unet = [tensor.clone() for tensor in optimizer_tensors(optimizer)], bits(model.unet)
    before = torch.cuda.memory_allocated()
    with set_aside([model.unet, *model.text_encoders, *optimizer_tensors(optimizer)], GPU):
        assert {one.device.type for one in model.unet.parameters()} == {"cpu"}
        assert before - torch.cuda.memory_allocated() > 7_000_000
    assert {one.device.type for one in model.unet.parameters()} == {"cuda"}
    assert all(torch.equal(one, two) for one, two in zip(bits(model.unet), unet, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(optimizer_tensors(optimizer), states, strict=True))


@pytest.mark.gpu
def test_text_encoders_in_ram_give_the_same_and_take_no_gpu_memory(tiny_models: Callable[[str], Path]) -> None:
    info = inspect(str(tiny_models("sdxl")))
    expected = load(info, device=GPU, dtype=torch.bfloat16, with_vae=False).encode_prompts(["a cat"])
    model = load(info, device=GPU, dtype=torch.bfloat16, with_vae=False, text_encoders_in_ram=True)
    text = model.encode_prompts(["a cat"])
    assert torch.equal(text.states, expected.states) and isinstance(model._kept_text, KeptInRam)
    assert {one.device.type for encoder in model.text_encoders for one in encoder.parameters()} == {"cuda"}
    model.predict(torch.randn(1, 4, 8, 8), torch.tensor([3]), text)
    assert {one.device.type for encoder in model.text_encoders for one in encoder.parameters()} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "flags",
    [
        ("--mixed_precision", "bf16", "--fp8_base", "--gradient_checkpointing", "--gradient_checkpointing_every", "2"),
        ("--mixed_precision", "bf16", "--torch_compile"),
        ("--mixed_precision", "bf16", "--full_bf16", "--mem_eff_attn"),
        ("--mixed_precision", "fp16", "--full_fp16", "--xformers"),
        (
            *("--mixed_precision", "bf16", "--network_train_unet_only", "--offload_text_encoders"),
            *("--offload_during_sampling", "--sample_every_n_steps", "2", "--sample_images_per_prompt", "2"),
        ),
    ],
)
def test_what_saves_memory_or_time_trains(
    tiny_models: Callable[[str], Path], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    from train_network import main

    make_pictures(tmp_path / "pictures", count=2)
    (tmp_path / "prompts.txt").write_text("a red shape --s 2 --w 64 --h 64 --d 1\n")
    line = [
        *("--pretrained_model_name_or_path", str(tiny_models("sdxl")), "--train_data_dir", str(tmp_path / "pictures")),
        *("--output_dir", str(tmp_path / "output"), "--output_name", "x", "--network_module", "networks.lora"),
        *("--resolution", "64", "--caption_extension", ".txt", "--max_train_steps", "3", "--seed", "1"),
        *("--sample_prompts", str(tmp_path / "prompts.txt"), "--cache_latents", "--learning_rate", "1e-3", *flags),
    ]
    assert main(line) == 0
    tensors = load_file(tmp_path / "output/x.safetensors")
    assert all(np.isfinite(tensor.astype(np.float32)).all() for tensor in tensors.values())
    assert any(tensor.any() for key, tensor in tensors.items() if key.endswith("lora_up.weight"))
    drawn = [path for path in (tmp_path / "output").glob("sample/x_0*.png") if not path.stem.endswith("sheet")]
    assert len(drawn) == (2 if "--sample_images_per_prompt" in flags else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("flags", [("fp16",), ("bf16", "--gradient_checkpointing"), ("bf16", "--fp8_base")])
def test_vectors_of_new_tokens_train_and_the_table_stays(
    tiny_models: Callable[[str], Path], tmp_path: Path, family: str, flags: tuple[str, ...]
) -> None:
    pictures = pictures_of_tokens(tmp_path / "pictures")
    length = ("--max_train_steps", "4", "--mixed_precision", *flags)
    for name, trains, more in (("alone", train, ()), ("both", train_both, (*LORA, "--ti_train_steps_ratio", "0.5"))):
        output = tmp_path / name
        states = ("--save_state", "--save_every_n_steps", "2")
        with watched_models() as found:
            assert trains(tiny_models(family), pictures, output, *more, *length, *states) == 0
        (seen,) = found
        for place, table in enumerate(seen.tables):
            assert torch.equal(seen.model.embedding_table(place), table)
        held = [vectors(output, stem) for stem in ("run-step00000002", "run")]
        assert (held[0] == held[1]) == bool(more)
        file = load_file(output / "run-blorp.safetensors")
        assert all(np.isfinite(rows).all() and len(rows) == COUNTS[0] for rows in file.values())
        assert len(file) == len(seen.tables)
        resumed = tmp_path / f"{name}-resumed"
        state = output / "run-step00000002-state"
        assert trains(tiny_models(family), pictures, resumed, *more, *length, "--resume", state) == 0
        for token, rows in vectors(resumed).items():
            assert rows.keys() == held[1][token].keys()
