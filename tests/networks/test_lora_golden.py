"""Every key, with its shape, that LoRA files of SD1, SD2 and SDXL hold: the published naming rules, written down here
apart from the program, against a list of what is in the field, real full-size models, our tables and our files."""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.models.families import unet_key_of
from library.models.lora_targets import targets
from networks import lora
from networks.facade import text_encoder_facade, unet_facade

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("sd1", "sd2_folder", "sd2_single_file", "sdxl")
COUNTS = {
    "sd1": {"unet": 192, "conv": 86, "te": 72},
    "sd2_folder": {"unet": 192, "conv": 86, "te": 138},
    "sd2_single_file": {"unet": 192, "conv": 86, "te": 138},
    "sdxl": {"unet": 722, "conv": 66, "te1": 72, "te2": 192},
}
CONTAINERS = {"Transformer2DModel"}
CONV_CONTAINERS = {"ResnetBlock2D", "Downsample2D", "Upsample2D"}


class Key(NamedTuple):
    """One module of a file; kernel as in the list: `-` Linear, `1x1`, `3x3`."""

    name: str
    size_in: int
    size_out: int
    kernel: str
    conv_only: bool = False


def attention(name: str, width: int, depth: int, context: int, projection: str) -> Iterator[Key]:
    for end in ("proj_in", "proj_out"):
        yield Key(f"{name}_{end}", width, width, projection)
    for block in range(depth):
        here = f"{name}_transformer_blocks_{block}"
        for which, keys in (("attn1", width), ("attn2", context)):
            yield Key(f"{here}_{which}_to_q", width, width, "-")
            yield Key(f"{here}_{which}_to_k", keys, width, "-")
            yield Key(f"{here}_{which}_to_v", keys, width, "-")
            yield Key(f"{here}_{which}_to_out_0", width, width, "-")
        yield Key(f"{here}_ff_net_0_proj", width, 8 * width, "-")
        yield Key(f"{here}_ff_net_2", 4 * width, width, "-")


def resnet(name: str, entering: int, width: int, inner: tuple[str, str, str, str]) -> Iterator[Key]:
    first, time, second, shortcut = inner
    yield Key(f"{name}_{first}", entering, width, "3x3", True)
    yield Key(f"{name}_{time}", 1280, width, "-", True)
    yield Key(f"{name}_{second}", width, width, "3x3", True)
    if entering != width:
        yield Key(f"{name}_{shortcut}", entering, width, "1x1", True)


def unet_of_sd(context: int, projection: str) -> Iterator[Key]:
    """Four levels, attention on all but the deepest; blocks as diffusers names them."""
    widths = (320, 640, 1280, 1280)
    inner = ("conv1", "time_emb_proj", "conv2", "conv_shortcut")
    skips, width = [320], 320
    for i in range(4):
        for j in range(2):
            yield from resnet(f"lora_unet_down_blocks_{i}_resnets_{j}", width, widths[i], inner)
            width = widths[i]
            skips.append(width)
            if i < 3:
                yield from attention(f"lora_unet_down_blocks_{i}_attentions_{j}", width, 1, context, projection)
        if i < 3:
            yield Key(f"lora_unet_down_blocks_{i}_downsamplers_0_conv", width, width, "3x3", True)
            skips.append(width)
    yield from attention("lora_unet_mid_block_attentions_0", width, 1, context, projection)
    for j in range(2):
        yield from resnet(f"lora_unet_mid_block_resnets_{j}", width, width, inner)
    for i in range(4):
        for j in range(3):
            yield from resnet(f"lora_unet_up_blocks_{i}_resnets_{j}", width + skips.pop(), widths[3 - i], inner)
            width = widths[3 - i]
            if i > 0:
                yield from attention(f"lora_unet_up_blocks_{i}_attentions_{j}", width, 1, context, projection)
        if i < 3:
            yield Key(f"lora_unet_up_blocks_{i}_upsamplers_0_conv", width, width, "3x3", True)


def unet_of_sdxl() -> Iterator[Key]:
    """Three levels, attention on the two deeper ones; blocks numbered as the original names them."""
    widths, depths = (320, 640, 1280), (0, 2, 10)
    inner = ("in_layers_2", "emb_layers_1", "out_layers_3", "skip_connection")
    skips, width, number = [320], 320, 1
    for level in range(3):
        for _ in range(2):
            yield from resnet(f"lora_unet_input_blocks_{number}_0", width, widths[level], inner)
            width = widths[level]
            skips.append(width)
            if depths[level]:
                yield from attention(f"lora_unet_input_blocks_{number}_1", width, depths[level], 2048, "-")
            number += 1
        if level < 2:
            yield Key(f"lora_unet_input_blocks_{number}_0_op", width, width, "3x3", True)
            skips.append(width)
            number += 1
    for place in (0, 2):
        yield from resnet(f"lora_unet_middle_block_{place}", width, width, inner)
    yield from attention("lora_unet_middle_block_1", width, 10, 2048, "-")
    for number in range(9):
        level = 2 - number // 3
        yield from resnet(f"lora_unet_output_blocks_{number}_0", width + skips.pop(), widths[level], inner)
        width = widths[level]
        if depths[level]:
            yield from attention(f"lora_unet_output_blocks_{number}_1", width, depths[level], 2048, "-")
        if number in (2, 5):
            yield Key(f"lora_unet_output_blocks_{number}_2_conv", width, width, "3x3", True)


def text_encoder(prefix: str, width: int, layers: int) -> Iterator[Key]:
    for layer in range(layers):
        here = f"{prefix}_text_model_encoder_layers_{layer}"
        for which in "qkv":
            yield Key(f"{here}_self_attn_{which}_proj", width, width, "-")
        yield Key(f"{here}_self_attn_out_proj", width, width, "-")
        yield Key(f"{here}_mlp_fc1", width, 4 * width, "-")
        yield Key(f"{here}_mlp_fc2", 4 * width, width, "-")


def published(family: str) -> list[Key]:
    """What the rules say that a C3Lier file with all parts holds."""
    if family == "sdxl":
        return [*unet_of_sdxl(), *text_encoder("lora_te1", 768, 12), *text_encoder("lora_te2", 1280, 32)]
    if family == "sd1":
        return [*unet_of_sd(768, "1x1"), *text_encoder("lora_te", 768, 12)]
    projection = "-" if family == "sd2_folder" else "1x1"
    return [*unet_of_sd(1024, projection), *text_encoder("lora_te", 1024, 23)]


def shapes(key: Key, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    window = {"-": (), "1x1": (1, 1), "3x3": (3, 3)}[key.kernel]
    return (rank, key.size_in, *window), (key.size_out, rank, *(1 for _ in window))


def configs(family: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The packaged configs of the U-Net and the text encoders."""
    folder = ROOT / "library/models/configs" / family.split("_")[0]
    texts = [path for name in ("", "_2") if (path := folder / f"text_encoder{name}.json").is_file()]
    unet = json.loads((folder / "unet.json").read_text(encoding="utf-8"))
    if family == "sd2_folder":
        unet["use_linear_projection"] = True
    return unet, [json.loads(path.read_text(encoding="utf-8")) for path in texts]


@lru_cache(maxsize=1)
def models(family: str) -> tuple[nn.Module, list[nn.Module]]:
    """Full-size models without storage."""
    unet_config, text_configs = configs(family)
    classes = (CLIPTextModel, CLIPTextModelWithProjection)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config)
        texts = [make(CLIPTextConfig(**config)) for make, config in zip(classes, text_configs, strict=False)]
    return unet.requires_grad_(False), [text.requires_grad_(False) for text in texts]


def kernel_of(module: nn.Module) -> str:
    return "-" if isinstance(module, nn.Linear) else "x".join(map(str, module.kernel_size))


def contained(root: nn.Module, prefix: str, containers: set[str], conv_only: bool = False) -> Iterator[Key]:
    """Every Linear and Conv2d below modules of these classes, as their paths name them."""
    for path, container in root.named_modules():
        if type(container).__name__ in containers:
            for inside, leaf in container.named_modules(prefix=path):
                if isinstance(leaf, nn.Linear | nn.Conv2d):
                    name = f"{prefix}_{inside.replace('.', '_')}"
                    yield Key(name, leaf.weight.shape[1], leaf.weight.shape[0], kernel_of(leaf), conv_only)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rules_give_the_list_from_files_in_the_field(family: str) -> None:
    with (ROOT / "tests/data/lora_modules.tsv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["family"] == family]
    listed = {
        Key(row["module"], int(row["in"]), int(row["out"]), row["kernel"], row["needs"] == "C3Lier") for row in rows
    }
    found = published(family)
    assert set(found) == listed
    assert len(found) == len(listed) == len(rows)
    assert Counter("conv" if key.conv_only else key.name.split("_")[1] for key in found) == COUNTS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_our_tables_are_the_rules(family: str) -> None:
    unet_config, text_configs = configs(family)
    golden = published(family)
    for conv in (True, False):
        found = targets(unet_config, text_configs, conv=conv, unet_key=unet_key_of(unet_config))
        keys = {Key(t.name, t.in_features, t.out_features, t.kernel.replace("linear", "-"), t.conv_only) for t in found}
        assert keys == {key for key in golden if conv or not key.conv_only}
        assert len(found) == len(keys)


@pytest.mark.xdist_group("full_size_on_meta")
@pytest.mark.parametrize("family", FAMILIES)
def test_real_models_have_these_modules_under_the_paths_of_their_facades(family: str) -> None:
    unet, texts = models(family)
    found = [
        *contained(unet_facade(unet), "lora_unet", CONTAINERS),
        *contained(unet_facade(unet), "lora_unet", CONV_CONTAINERS, conv_only=True),
    ]
    for number, text in enumerate(texts, 1):
        prefix = "lora_te" if len(texts) == 1 else f"lora_te{number}"
        found += contained(text_encoder_facade(text), prefix, {"CLIPAttention", "CLIPMLP"})
    assert len(found) == len(published(family))
    assert set(found) == set(published(family))


@pytest.mark.xdist_group("full_size_on_meta")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("kind", "train_te", "train_unet"),
    [("LierLa", True, True), ("C3Lier", True, True), ("C3Lier", False, True), ("LierLa", True, False)],
)
def test_a_file_holds_these_keys_with_these_shapes(family: str, kind: str, train_te: bool, train_unet: bool) -> None:
    unet, texts = models(family)
    args: dict[str, Any] = {"conv_dim": "1"} if kind == "C3Lier" else {}
    network = lora.create_network(1.0, 2, 1, None, texts if len(texts) > 1 else texts[0], unet, **args)
    network.apply_to(texts, unet, train_te, train_unet)
    expected: dict[str, tuple[int, ...]] = {}
    for key in published(family):
        trained = train_unet if key.name.startswith("lora_unet_") else train_te
        if trained and (kind == "C3Lier" or not key.conv_only):
            down, up = shapes(key, 1 if key.kernel == "3x3" else 2)
            expected |= {f"{key.name}.lora_down.weight": down, f"{key.name}.lora_up.weight": up}
            expected[f"{key.name}.alpha"] = ()
    found = {name: tuple(tensor.shape) for name, tensor in network.file_tensors().items()}
    network.remove()
    assert found == expected
