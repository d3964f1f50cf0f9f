"""Files of every family and spelling are read by what they mean, and files of another family are named."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.models.families import diffusers_key
from networks import lora
from tests.networks.tiny_families import Finder, fill, forward, load_text_encoder, load_unet

Tensors = dict[str, torch.Tensor]
Respell = Callable[[lora.LoraNetwork, Tensors], Tensors]


def trained(folder: Path, **args: Any) -> tuple[lora.LoraNetwork, torch.Tensor, torch.Tensor]:
    """A network with weights that do something, the base's prediction and its own."""
    unet, text_encoder = load_unet(folder), load_text_encoder(folder)
    base = forward(unet, text_encoder)
    network = lora.create_network(1.0, 4, 2.0, None, text_encoder, unet, conv_dim="2", **args)
    network.apply_to(text_encoder, unet)
    fill(network)
    return network, base, forward(unet, text_encoder)


def diffusers_blocks(network: lora.LoraNetwork, tensors: Tensors) -> Tensors:
    """The U-Net's blocks as diffusers names them."""
    names = {layer.target.name: f"lora_unet_{diffusers_key(layer.target.path)}" for layer in network.layers}
    is_unet = {layer.target.name for layer in network.layers if layer.target.part == "unet"}
    return {
        key.replace(name, names[name], 1) if (name := key.partition(".")[0]) in is_unet else key: tensor
        for key, tensor in tensors.items()
    }


def first_encoder_numbered(network: lora.LoraNetwork, tensors: Tensors) -> Tensors:
    """`lora_te1_` also where there is one text encoder."""
    return {key.replace("lora_te_", "lora_te1_"): tensor for key, tensor in tensors.items()}


def window_toggled(network: lora.LoraNetwork, tensors: Tensors) -> Tensors:
    """Projections of transformers of the other kind: Linear where there were 1x1 convolutions, and back."""

    def toggled(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flatten(1) if tensor.dim() == 4 else tensor[..., None, None]

    ends = re.compile(r"_proj_(in|out)\.lora_(down|up)\.weight$")
    return {key: toggled(tensor) if ends.search(key) else tensor for key, tensor in tensors.items()}


def peft(network: lora.LoraNetwork, tensors: Tensors, down: str = "lora_A", up: str = "lora_B") -> Tensors:
    """Dotted paths; alphas are not in such tensors, so they are taken into the factor."""
    found = {}
    for layer in network.layers:
        name, target = layer.target.name, layer.target
        number = "" if target.encoder == 0 else f"_{target.encoder + 1}"
        owner = "unet" if target.part == "unet" else f"text_encoder{number}.text_model"
        found[f"{owner}.{target.path}.{down}.weight"] = tensors[f"{name}.lora_down.weight"].clone()
        found[f"{owner}.{target.path}.{up}.weight"] = tensors[f"{name}.lora_up.weight"] * layer.scale
    return found


def older_diffusers(network: lora.LoraNetwork, tensors: Tensors) -> Tensors:
    return peft(network, tensors, "lora.down", "lora.up")


@pytest.mark.parametrize(
    "respell",
    [diffusers_blocks, first_encoder_numbered, window_toggled, peft, older_diffusers],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_all_spellings_mean_the_same(family: str, respell: Respell, tiny_models: Finder, tmp_path: Path) -> None:
    folder = tiny_models(family)
    network, base, expected = trained(folder)
    file = tmp_path / "other.safetensors"
    save_file(respell(network, network.file_tensors()), file)

    unet, text_encoder = load_unet(folder), load_text_encoder(folder)
    again, tensors = lora.create_network_from_weights(1.0, file, None, text_encoder, unet)
    again.apply_to(text_encoder, unet)
    again.load_weights(file)
    torch.testing.assert_close(forward(unet, text_encoder), expected, rtol=1e-4, atol=1e-5)
    assert set(again.file_tensors()) == set(network.file_tensors())
    again.remove()
    again.merge_to(text_encoder, unet, tensors)
    torch.testing.assert_close(forward(unet, text_encoder), expected, rtol=1e-3, atol=1e-4)

    unet, text_encoder = load_unet(folder), load_text_encoder(folder)
    new = lora.create_network(1.0, 4, 1.0, None, text_encoder, unet, conv_dim="2")
    new.apply_to(text_encoder, unet)
    assert f"{len(network.layers)} of {len(network.layers)} modules" in new.load_weights(file)
    torch.testing.assert_close(forward(unet, text_encoder), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, base, atol=1e-2)


def test_alphas_of_peft_files_stand_in_their_metadata(tiny_sd1: Path, tmp_path: Path) -> None:
    network, _, _ = trained(tiny_sd1)
    settings = {
        "unet.lora_alpha": 3,
        "unet.alpha_pattern": {"down_blocks.0.attentions.0.proj_in": 7},
        "text_encoder.lora_alpha": 5,
        "text_encoder.use_rslora": True,
    }
    file = tmp_path / "peft.safetensors"
    save_file(peft(network, network.file_tensors()), file, {"lora_adapter_metadata": json.dumps(settings)})
    again, _ = lora.create_network_from_weights(1.0, file, None, load_text_encoder(tiny_sd1), load_unet(tiny_sd1))
    alphas = {layer.target.name: layer.alpha_value for layer in again._built}
    assert alphas.pop("lora_unet_down_blocks_0_attentions_0_proj_in") == 7
    assert {name.split("_")[1]: alpha for name, alpha in alphas.items()} == {"unet": 3, "te": 10}


def full_size(*names_and_widths: tuple[str, int]) -> Tensors:
    """A file of a full-size model, as far as its family shows."""
    tensors: Tensors = {}
    for name, width in names_and_widths:
        tensors |= {f"{name}.lora_down.weight": torch.ones(1, width), f"{name}.lora_up.weight": torch.ones(640, 1)}
    return tensors


SD1_KEY = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
SDXL_KEY = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
FLUX_KEY = "lora_unet_double_blocks_0_img_attn_proj"


@pytest.mark.parametrize(
    ("base", "tensors", "says"),
    [
        ("sdxl", full_size((SD1_KEY, 768)), "made for SD1; this base model is SDXL"),
        ("sdxl", full_size((SD1_KEY, 1024)), "made for SD2; this base model is SDXL"),
        ("sdxl", full_size(("lora_te_text_model_encoder_layers_0_self_attn_k_proj", 768)), "made for SD1"),
        ("sd1", full_size((SDXL_KEY, 2048)), "made for SDXL; this base model is SD1"),
        ("sd1", full_size((SD1_KEY, 2048)), "made for SDXL; this base model is SD1"),
        ("sd1", full_size((SD1_KEY, 1024)), "made for SD2; this base model is SD1"),
        ("sd2", full_size((SD1_KEY, 768)), "made for SD1; this base model is SD2"),
        ("sd1", full_size(("lora_te2_text_model_encoder_layers_0_mlp_fc1", 1280)), "made for SDXL; this base model"),
        ("sd1", full_size((FLUX_KEY, 3072)), "made for Flux; this base model is SD1"),
        (
            "sdxl",
            {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(1, 1)},
            "made for Flux",
        ),
        ("sd1", {"diffusion_model.joint_blocks.0.x.lora_A.weight": torch.ones(1, 1)}, "made for SD3"),
        ("sdxl", full_size((SDXL_KEY, 2048), (SD1_KEY, 2048)), "blocks in two ways"),
        ("sd1", {"unet.a.processor.to_q_lora.down.weight": torch.ones(1, 1)}, "is not a key of a LoRA"),
    ],
)
def test_files_of_other_kinds_are_named(
    base: str, tensors: Tensors, says: str, tiny_models: Finder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiny models have widths of their own, so the base's family is told from its width as a full-size one has it."""
    folder = tiny_models(base)
    unet, text_encoder = load_unet(folder), load_text_encoder(folder)
    network = lora.create_network(1.0, 1, 1, None, text_encoder, unet)
    known = network._known
    monkeypatch.setattr(network, "_known", type(known)(known.aliases, base.upper(), known.text_encoders))
    network.apply_to(text_encoder, unet)
    file = tmp_path / "other.safetensors"
    save_file(tensors, file)
    with pytest.raises(UserError, match=re.escape(says)) as error:
        network.load_weights(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("width", "title"), [(768, "SD1"), (1024, "SD2"), (32, "")])
def test_the_familys_name_comes_from_the_config(width: int, title: str) -> None:
    from library.weights.loras.keys import spellings

    assert spellings([], {"cross_attention_dim": width}).title == title
    assert spellings([], {"cross_attention_dim": width, "addition_embed_type": "text_time"}).title == "SDXL"


def test_a_module_under_two_names_is_refused(tiny_sd1: Path, tmp_path: Path) -> None:
    network, _, _ = trained(tiny_sd1)
    tensors = network.file_tensors()
    twice = tensors | {key: t.clone() for key, t in first_encoder_numbered(network, tensors).items()}
    save_file(twice, tmp_path / "twice.safetensors")
    with pytest.raises(UserError, match="twice"):
        network.load_weights(tmp_path / "twice.safetensors")


@pytest.mark.parametrize(
    ("rates", "unet_rate", "found"),
    [
        ([1e-5, 2e-5], None, {"textencoder1": 1e-5, "textencoder2": 2e-5, "unet": 1e-4}),
        ([1e-5], 3e-5, {"textencoder1": 1e-5, "textencoder2": 1e-5, "unet": 3e-5}),
        ([], None, {"textencoder1": 1e-4, "textencoder2": 1e-4, "unet": 1e-4}),
        ([0, 2e-5], None, {"textencoder2": 2e-5, "unet": 1e-4}),
        ([None, 0], 0, {"textencoder1": 1e-4}),
        ([0, 0], None, {"unet": 1e-4}),
    ],
)
def test_each_text_encoder_has_its_rate(
    rates: list[float | None], unet_rate: float | None, found: dict[str, float], tiny_sdxl: Path
) -> None:
    unet, text_encoder = load_unet(tiny_sdxl), load_text_encoder(tiny_sdxl)
    network = lora.create_network(1.0, 2, 1, None, text_encoder, unet)
    network.apply_to(text_encoder, unet)
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs(rates, unet_rate, 1e-4)
    assert dict(zip(names, [group["lr"] for group in groups], strict=True)) == found
    assert names == sorted(names)
    kept = {key.split("_")[1] for key in network.file_tensors()}
    assert kept == {name.replace("textencoder", "te") for name in found}
    parameters = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(parameters) == sorted(id(parameter) for parameter in network.parameters())
    assert len(groups[-1]["params"]) == 2 * sum(
        key.startswith(f"lora_{names[-1].replace('textencoder', 'te')}_") and key.endswith("alpha")
        for key in network.file_tensors()
    )


def test_more_rates_than_text_encoders_are_refused(tiny_sd1: Path) -> None:
    network, _, _ = trained(tiny_sd1)
    with pytest.raises(UserError, match="2 rates, 1 text encoders"):
        network.prepare_optimizer_params_with_multiple_te_lrs([1e-4, 1e-5], None, 1e-4)
