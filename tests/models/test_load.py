"""Loaded weights equal the files' weights, from both layouts, without network and without surprises."""

import dataclasses
import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.models import parts
from library.models.headers import Entry, Header
from library.models.inspect import ModelInfo, inspect
from library.models.load import load
from library.models.recognise import TEXT, UNET, VAE, foreign_kind
from library.models.sd1 import Model
from library.models.single_configs import packaged, text_encoder_config, unet_config, vae_config
from library.models.tensors import _DTYPES
from tests.original_layout import folder_as_single_file

WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach the network fails the test."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def modules(model: Model) -> dict[str, torch.nn.Module]:
    """A model's modules by part."""
    return {"unet": model.unet, "vae": model.reload_vae(), "text_encoder": model.text_encoders[0]}


def as_folder(single: ModelInfo, folder: Path) -> ModelInfo:
    """A tiny single file's info with what its tensors don't tell (heads, norm groups), from the folder it came from."""
    many = inspect(folder)
    return dataclasses.replace(
        single,
        unet_config=many.unet_config,
        vae_config=many.vae_config,
        text_encoder_config=many.text_encoder_config,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folder_weights_are_the_files(tiny_sd1: Path, dtype: torch.dtype) -> None:
    model = load(inspect(tiny_sd1), dtype=dtype)
    for part, module in modules(model).items():
        stored, state = load_file(tiny_sd1 / WEIGHTS[part]), module.state_dict()
        assert len(state) == len(stored) - (part == "text_encoder") * sum("position_ids" in name for name in stored)
        expected = torch.float32 if part == "vae" else dtype
        for name, value in stored.items():
            if "position_ids" not in name:
                assert torch.equal(state[name.removeprefix("text_model.")], value.to(expected)), name
        assert not module.training
        assert not any(value.requires_grad for value in module.parameters())
        assert not any(value.is_meta for value in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("text_model", [True, False])
def test_single_file_equals_its_folder(tiny_sd1: Path, tmp_path: Path, text_model: bool) -> None:
    file = tmp_path / "tiny.safetensors"
    folder_as_single_file(tiny_sd1, file, text_model=text_model)
    one, many = load(as_folder(inspect(file), tiny_sd1)), load(inspect(tiny_sd1))
    for part, module in modules(many).items():
        state = modules(one)[part].state_dict()
        assert state.keys() == module.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
    conditioning = many.encode_prompts(["a cat"])
    assert torch.equal(one.encode_prompts(["a cat"]), conditioning)
    noisy, time = torch.randn(1, 4, 8, 8), torch.tensor([7])
    assert torch.equal(one.predict(noisy, time, conditioning), many.predict(noisy, time, conditioning))
    assert one.vae_id() == many.vae_id()


def test_what_real_files_hold_besides_is_passed_over(tiny_sd1: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.safetensors"
    folder_as_single_file(tiny_sd1, file)
    extra = {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "alphas_cumprod": torch.ones(1000),
        "model_ema.decay": torch.tensor(0.99),
        "first_stage_model.loss.logvar": torch.zeros(()),
    }
    save_file(load_file(file) | extra, file)
    one, many = load(as_folder(inspect(file), tiny_sd1)), load(inspect(tiny_sd1))
    assert torch.equal(one.encode_prompts(["a cat"]), many.encode_prompts(["a cat"]))
    assert one.vae_id() == many.vae_id()


def test_fp16_variant_shards_and_old_vae_names(tiny_sd1: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd1, folder)
    unet, vae = folder / WEIGHTS["unet"], folder / WEIGHTS["vae"]
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
    model, plain = load(inspect(folder)), load(inspect(tiny_sd1))
    assert model.vae_id() == plain.vae_id()
    for name, value in plain.unet.state_dict().items():
        assert torch.equal(model.unet.state_dict()[name], value.half().float()), name


def test_missing_and_misshapen_tensors_are_told(tiny_sd1: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd1, folder)
    tensors = load_file(folder / WEIGHTS["unet"])
    bias = tensors.pop("conv_in.bias")
    save_file(tensors, folder / WEIGHTS["unet"])
    with pytest.raises(UserError, match=r"lacks 1 of 684 tensors .* first conv_in.bias"):
        load(inspect(folder))
    save_file(tensors | {"conv_in.bias": torch.cat([bias, bias])}, folder / WEIGHTS["unet"])
    with pytest.raises(UserError, match=r"conv_in.bias has the shape \(64,\), not \(32,\)"):
        load(inspect(folder))


def test_flags_that_contradict_the_model(tiny_sd1: Path) -> None:
    with pytest.raises(UserError, match="not v_prediction"):
        load(inspect(tiny_sd1), prediction_type="v_prediction")
    unknown = dataclasses.replace(inspect(tiny_sd1), prediction_known=False)
    assert load(unknown, prediction_type="v_prediction").prediction_type == "v_prediction"
    with pytest.raises(UserError, match="--clip_skip"):
        load(inspect(tiny_sd1), clip_skip=6)


def test_full_size_names_and_shapes() -> None:
    """Every tensor of SD1.5 has a source of its size in a full-size original file, and its configs are told right."""
    from tests.full_size import sd15_shapes

    size = {name: Entry("F16", shape, 0, 0) for name, shape in sd15_shapes().items()}
    header = Header(Path("full"), size, {})
    assert foreign_kind(header) is None
    counts = {p: sum(n.startswith(s) for n in size) for p, s in (("unet", UNET), ("vae", VAE), ("text_encoder", TEXT))}
    assert counts == {"unet": 686, "vae": 248, "text_encoder": 196}
    told = {"unet": unet_config(header), "vae": vae_config(header), "text_encoder": text_encoder_config(header)}
    assert told == {part: packaged("sd1", part) for part in told}
    info = ModelInfo(
        path=Path("full"),
        family="sd1",
        layout="single_file",
        prediction_type="epsilon",
        prediction_known=False,
        unet_config=told["unet"],
        vae_config=told["vae"],
        text_encoder_config=told["text_encoder"],
        scheduler_config=packaged("sd1", "scheduler"),
        vae_factor=8,
        headers=dict.fromkeys(parts.PARTS, (header,)),
    )
    for part in parts.PARTS:
        wanted = {name: value.numel() for name, value in parts.build(info, part).state_dict().items()}
        found = {s.target: torch.Size(s.entry.shape).numel() for s in parts.sources(info, part)}
        assert found == wanted


def test_every_float_type_of_a_file_is_read(tiny_sd1: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd1, folder)
    tensors = load_file(folder / WEIGHTS["text_encoder"])
    for kind in (torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        assert kind in _DTYPES.values()
        save_file(
            {n: v.to(kind) if v.is_floating_point() else v for n, v in tensors.items()},
            folder / WEIGHTS["text_encoder"],
        )
        state = load(inspect(folder)).text_encoders[0].state_dict()
        assert all(torch.equal(value, tensors[name].to(kind).float()) for name, value in state.items())
