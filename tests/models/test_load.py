"""Loaded weights equal the files' weights, in every family and layout, without network and without surprises."""

import dataclasses
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models.headers import Entry, Header
from library.models.inspect import inspect
from library.models.load import load
from library.models.model import Model
from library.models.tensors import WEIGHT_DTYPES, Source, fill
from tests.original_layout import folder_as_single_file, original_tensors

WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
}
FAMILIES = ["sd1", "sd2", "sdxl"]
Find = Callable[[str], Path]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach the network fails the test."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture
def copied(tiny_sd1: Path, tmp_path: Path) -> Path:
    """A copy of the tiny SD1 folder that a test may spoil."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd1, folder)
    return folder


def modules(model: Model) -> dict[str, torch.nn.Module]:
    """A model's modules by part."""
    texts = dict(zip(("text_encoder", "text_encoder_2"), model.reload_text_encoders(), strict=False))
    return {"unet": model.unet, "vae": model.reload_vae(), **texts}


def flat(name: str) -> str:
    """A stored tensor's name without the level that only some files have."""
    return name.removeprefix("text_model.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_folder_weights_are_the_files(tiny_models: Find, family: str, dtype: torch.dtype) -> None:
    folder = tiny_models(family)
    model = load(inspect(str(folder)), dtype=dtype)
    for part, module in modules(model).items():
        stored = {flat(n): v for n, v in load_file(folder / WEIGHTS[part]).items() if "position_ids" not in n}
        state = {flat(name): value for name, value in module.state_dict().items()}
        assert state.keys() == stored.keys()
        expected = torch.float32 if part == "vae" else dtype
        for name, value in stored.items():
            assert torch.equal(state[name], value.to(expected)), name
        assert not module.training
        assert not any(value.requires_grad for value in module.parameters())
        assert not any(value.is_meta for value in (*module.parameters(), *module.buffers()))


def same_values(one: Model, other: Model) -> None:
    """Both hold the same bits, and give the same results."""
    for part, module in modules(other).items():
        state = modules(one)[part].state_dict()
        assert state.keys() == module.state_dict().keys()
        for name, value in module.state_dict().items():
            assert torch.equal(state[name].reshape(value.shape), value), name
    conditioning = other.encode_prompts(["a cat"])
    assert torch.equal(one.encode_prompts(["a cat"]).states, conditioning.states)
    noisy, time = torch.randn(1, 4, 8, 8), torch.tensor([7])
    predicted = one.predict(noisy, time, conditioning)
    assert torch.allclose(predicted, other.predict(noisy, time, conditioning), atol=1e-5)
    assert one.vae_id() == other.vae_id()


@pytest.mark.parametrize("text_model", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_single_file_equals_its_folder(tiny_models: Find, tmp_path: Path, family: str, text_model: bool) -> None:
    folder, file = tiny_models(family), tmp_path / "tiny.safetensors"
    folder_as_single_file(folder, file, text_model=text_model)
    many = load(dataclasses.replace(inspect(str(folder)), prediction_type="epsilon"))
    one = load(dataclasses.replace(inspect(str(file)), prediction_type="epsilon"))
    same_values(one, many)


def test_projections_of_sd2_are_kernels_in_files_and_matrices_in_folders(tiny_sd2: Path, tiny_sd2_file: Path) -> None:
    ranks = {}
    for path in (tiny_sd2, tiny_sd2_file):
        info = dataclasses.replace(inspect(str(path)), prediction_type="epsilon")
        ranks[path] = load(info, with_vae=False).unet.mid_block.attentions[0].proj_in.weight.ndim
    assert ranks == {tiny_sd2: 2, tiny_sd2_file: 4}


def test_open_clip_s_tensors_are_cut_and_turned(tiny_sdxl_file: Path) -> None:
    stored = load_file(tiny_sdxl_file)
    prefix = "conditioner.embedders.1.model."
    joint = stored[f"{prefix}transformer.resblocks.3.attn.in_proj_weight"]
    bias = stored[f"{prefix}transformer.resblocks.3.attn.in_proj_bias"]
    encoder = load(inspect(str(tiny_sdxl_file)), with_vae=False).text_encoders[1]
    attention = encoder.text_model.encoder.layers[3].self_attn
    for index, letter in enumerate("qkv"):
        projection = getattr(attention, f"{letter}_proj")
        assert torch.equal(projection.weight, joint[64 * index : 64 * (index + 1)])
        assert torch.equal(projection.bias, bias[64 * index : 64 * (index + 1)])
    assert stored[f"{prefix}text_projection"].shape == (64, 48)
    assert torch.equal(encoder.text_projection.weight, stored[f"{prefix}text_projection"].T)


def test_what_real_files_hold_besides_is_passed_over(tiny_sd1: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.safetensors"
    folder_as_single_file(tiny_sd1, file)
    stored = load_file(file)
    extra = {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "alphas_cumprod": torch.ones(1000),
        "model_ema.decay": torch.tensor(0.99),
        "first_stage_model.loss.logvar": torch.zeros(()),
    }
    for name, value in stored.items():
        if name.startswith("model.diffusion_model."):
            flat_name = "model_ema." + name.removeprefix("model.").replace(".", "")
            extra[flat_name] = torch.full_like(value, 9.0)
    save_file(stored | extra, file)
    same_values(load(inspect(str(file))), load(inspect(str(tiny_sd1))))


def test_fp16_variant_shards_and_old_vae_names(tiny_sd1: Path, copied: Path) -> None:
    unet, vae = copied / WEIGHTS["unet"], copied / WEIGHTS["vae"]
    tensors = load_file(unet)
    unet.unlink()
    save_file({n: t.half() for n, t in tensors.items()}, unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in load_file(vae).items():
        for new, ancient in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{ancient}.")
        renamed[name] = value
    first = dict(list(renamed.items())[::2])
    second = {name: value for name, value in renamed.items() if name not in first}
    vae.unlink()
    save_file(first, vae.with_name("a.safetensors"))
    save_file(second, vae.with_name("b.safetensors"))
    names = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    index = vae.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": names}))
    model, plain = load(inspect(str(copied))), load(inspect(str(tiny_sd1)))
    assert model.vae_id() == plain.vae_id()
    for name, value in plain.unet.state_dict().items():
        assert torch.equal(model.unet.state_dict()[name], value.half().float()), name


def test_missing_and_misshapen_tensors_are_told(copied: Path) -> None:
    tensors = load_file(copied / WEIGHTS["unet"])
    bias = tensors.pop("conv_in.bias")
    save_file(tensors, copied / WEIGHTS["unet"])
    with pytest.raises(UserError, match=r"lacks 1 of \d+ tensors .* first conv_in.bias"):
        load(inspect(str(copied)))
    save_file(tensors | {"conv_in.bias": torch.cat([bias, bias])}, copied / WEIGHTS["unet"])
    with pytest.raises(UserError, match=r"conv_in.bias has the shape \(64,\), not \(32,\)"):
        load(inspect(str(copied)))
    name = "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"
    turned = tensors | {"conv_in.bias": bias, name: tensors[name].T.contiguous()}
    save_file(turned, copied / WEIGHTS["unet"])
    with pytest.raises(UserError, match=r"ff.net.2.weight has the shape"):
        load(inspect(str(copied)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("part", "name"), [("unet", "conv_in.weight"), ("vae", "quant_conv.bias")])
def test_values_that_are_no_numbers_are_told(copied: Path, part: str, name: str, value: float) -> None:
    tensors = load_file(copied / WEIGHTS[part])
    tensors[name].view(-1)[3] = value
    save_file(tensors, copied / WEIGHTS[part])
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(UserError, match=rf"its tensor {name} holds values that are no finite numbers"):
            load(inspect(str(copied)), dtype=dtype, vae_dtype=dtype)


def test_values_that_float16_can_t_hold_are_told(copied: Path) -> None:
    tensors = load_file(copied / WEIGHTS["unet"])
    tensors["conv_in.weight"][0, 0, 0, 0] = 1e6
    save_file(tensors, copied / WEIGHTS["unet"])
    with pytest.raises(UserError, match=r"conv_in.weight holds values that are too large for float16; .*bf16"):
        load(inspect(str(copied)), dtype=torch.float16)
    assert load(inspect(str(copied)), dtype=torch.bfloat16).unet.conv_in.weight.max() > 9e5


def test_the_name_in_the_file_is_told(tiny_sdxl: Path, tmp_path: Path) -> None:
    file = tmp_path / "spoiled.safetensors"
    folder_as_single_file(tiny_sdxl, file)
    tensors = load_file(file)
    name = "conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_weight"
    tensors[name][100, 5] = float("nan")
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"its tensor {name} holds"):
        load(inspect(str(file)))


def test_clip_skip_within_the_layers(tiny_sd1: Path, tiny_sdxl: Path) -> None:
    for folder in (tiny_sd1, tiny_sdxl):
        with pytest.raises(UserError, match="--clip_skip: 6 is not within 1 and 5"):
            load(inspect(str(folder)), clip_skip=6)
        assert load(inspect(str(folder)), clip_skip=5, with_vae=False).clip_skip == 5


def test_every_float_type_of_a_file_is_read(copied: Path) -> None:
    tensors = load_file(copied / WEIGHTS["text_encoder"])
    for kind in (torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        assert kind in WEIGHT_DTYPES.values()
        save_file(
            {n: v.to(kind) if v.is_floating_point() else v for n, v in tensors.items()},
            copied / WEIGHTS["text_encoder"],
        )
        state = load(inspect(str(copied)), with_vae=False).text_encoders[0].state_dict()
        assert all(torch.equal(value, tensors[name].to(kind).float()) for name, value in state.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [None, (1, 3)])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_a_tensor_is_cut_turned_and_reordered(
    tmp_path: Path, dtype: torch.dtype, rows: tuple[int, int] | None, transpose: bool, strided: bool
) -> None:
    values = np.arange(20, dtype="<f4").reshape(4, 5)
    path = tmp_path / "values"
    path.write_bytes(b"some header" + (values.T if strided else values).tobytes())
    entry = Entry("F32", (4, 5), 11, 11 + 80, (1, 4) if strided else None)
    source = Source("weight", path, entry, "stored", rows, transpose)
    expected = torch.from_numpy(values)[slice(*rows) if rows else slice(None)]
    expected = expected.T if transpose else expected
    with torch.device("meta"):
        module = torch.nn.Linear(expected.shape[1], expected.shape[0], bias=False)
    fill(module, [source], what="test", device=torch.device("cpu"), dtype=dtype)
    assert torch.equal(module.weight, expected.to(dtype)) and module.weight.is_contiguous()


def test_a_file_that_shrinks_while_it_is_read_is_told(copied: Path) -> None:
    info = inspect(str(copied))
    path = copied / WEIGHTS["unet"]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="became shorter"):
        load(info)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pickle_equals_its_folder(tiny_models: Find, tmp_path: Path, family: str) -> None:
    """Also with tensors that share a storage, or stand in another order there."""
    tensors = load_file(tiny_models(f"{family}_file"))
    name = next(name for name in tensors if name.endswith("attn2.to_k.weight"))
    tensors[name] = tensors[name].T.contiguous().T
    bias = "model.diffusion_model.input_blocks.0.0.bias"
    tensors[bias] = torch.cat([torch.zeros(5), tensors[bias], torch.zeros(3)])[5:-3]
    file = tmp_path / "tiny.ckpt"
    torch.save({"state_dict": tensors, "global_step": 7}, file)
    many = load(dataclasses.replace(inspect(str(tiny_models(family))), prediction_type="epsilon"))
    one = load(dataclasses.replace(inspect(str(file)), prediction_type="epsilon"))
    same_values(one, many)


def test_a_bare_original_vae_takes_the_place_of_the_model_s(
    tiny_sd1: Path, tiny_sd1_file: Path, tmp_path: Path
) -> None:
    prefix = "first_stage_model."
    bare = {n.removeprefix(prefix): v + 1 for n, v in load_file(tiny_sd1_file).items() if n.startswith(prefix)}
    save_file(bare, tmp_path / "vae.safetensors")
    expected = load(inspect(str(tiny_sd1))).reload_vae().state_dict()
    for model in (tiny_sd1, tiny_sd1_file):
        other = load(inspect(str(model), vae=str(tmp_path / "vae.safetensors"))).reload_vae()
        for name, value in other.state_dict().items():
            assert torch.equal(value, expected[name] + 1), name


@pytest.mark.parametrize("family", FAMILIES)
def test_text_encoders_of_another_model(tiny_models: Find, tmp_path: Path, family: str) -> None:
    """A file without text encoders, and those of a folder, give the whole model."""
    folder, file = tiny_models(family), tmp_path / "headless.safetensors"
    folder_as_single_file(folder, file, parts=("unet", "vae"))
    headless = inspect(str(file), text_encoder=str(folder))
    one = load(dataclasses.replace(headless, prediction_type="epsilon"))
    many = load(dataclasses.replace(inspect(str(folder)), prediction_type="epsilon"))
    same_values(one, many)


def test_an_original_file_without_what_the_converters_need(tiny_sdxl_file: Path) -> None:
    info = inspect(str(tiny_sdxl_file))
    (header,) = info.parts["unet"].headers
    fewer = {name: entry for name, entry in header.entries.items() if "label_emb" not in name}
    part = dataclasses.replace(info.parts["unet"], headers=(Header(header.path, fewer, {}),))
    with pytest.raises(UserError, match="lacks the tensor label_emb"):
        load(dataclasses.replace(info, parts={**info.parts, "unet": part}))


@pytest.mark.parametrize("upcast", [False, True])
def test_a_folder_s_attention_in_float32_is_kept(tiny_sd2: Path, tmp_path: Path, upcast: bool) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd2, folder)
    config = folder / "unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"upcast_attention": upcast, "dropout": 0.5}))
    block = load(inspect(str(folder)), with_vae=False).unet.mid_block.attentions[0].transformer_blocks[0]
    assert block.attn1.upcast_attention is upcast
    assert all(module.p == 0 for module in block.modules() if isinstance(module, torch.nn.Dropout))


def test_a_text_projection_that_is_stored_straight(tiny_sdxl: Path, tmp_path: Path) -> None:
    """Some programs write OpenCLIP's projection as a Linear's weight, not turned."""
    tensors = original_tensors(tiny_sdxl)
    name = "conditioner.embedders.1.model.text_projection"
    straight = {key: array for key, array in tensors.items() if key != name}
    straight[f"{name}.weight"] = tensors[name].T
    path = tmp_path / "straight.safetensors"
    save_file({key: torch.tensor(array).contiguous() for key, array in straight.items()}, path)
    ours = load(inspect(path), with_vae=False).text_encoders[1].state_dict()["text_projection.weight"]
    theirs = load(inspect(tiny_sdxl), with_vae=False).text_encoders[1].state_dict()["text_projection.weight"]
    assert torch.equal(ours, theirs)
