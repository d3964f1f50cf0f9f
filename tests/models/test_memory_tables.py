"""The tables of memory against the modules themselves: weights to the last number, kept activations by tensor."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library.models import memory_tables as tables
from library.models.families import FAMILIES, FamilyName
from library.models.inspect import inspect
from library.models.parts import build
from library.models.single_configs import packaged

Finder = Callable[[str], Path]
NAMES: tuple[FamilyName, ...] = ("sd1", "sd2", "sdxl")
TOKENS = 77


def counted(module: nn.Module) -> tables.Weights:
    """What a module really holds."""
    layers = (one for one in module.modules() if isinstance(one, nn.Linear | nn.Conv2d))
    matrices = sum(layer.weight.numel() for layer in layers)
    return tables.Weights(matrices, sum(one.numel() for one in module.parameters()) - matrices)


@pytest.mark.parametrize("family", NAMES)
def test_weights_of_tiny_models(family: str, tiny_models: Finder) -> None:
    info = inspect(str(tiny_models(family)))
    assert tables.unet_weights(info.unet_config) == counted(build(info, "unet"))
    assert tables.vae_weights(info.vae_config) == counted(build(info, "vae"))
    for encoder, config in zip(info.family.text_encoders, info.text_encoder_configs, strict=True):
        told = tables.text_encoder_weights(config, projects=encoder.projects)
        assert told == counted(build(info, encoder.part))


@pytest.mark.slow
@pytest.mark.parametrize("family", NAMES)
def test_weights_of_full_size_models(family: FamilyName) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        unet, vae = new_unet(packaged(family, "unet")), AutoencoderKL.from_config(packaged(family, "vae"))
        assert tables.unet_weights(packaged(family, "unet")) == counted(unet)
        assert tables.vae_weights(packaged(family, "vae")) == counted(vae)
        for encoder in FAMILIES[family].text_encoders:
            config = packaged(family, encoder.part)
            kind = CLIPTextModelWithProjection if encoder.projects else CLIPTextModel
            told = tables.text_encoder_weights(config, projects=encoder.projects)
            assert told == counted(kind(CLIPTextConfig(**config)))


def test_bytes_of_weights() -> None:
    weights = tables.Weights(100, 10)
    assert (weights.size(4), weights.size(2), weights.size(2, 1)) == (440, 220, 120)


def new_unet(config: Any) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel.from_config(config)


@contextmanager
def keeping(weights: list[torch.Tensor]) -> Iterator[list[int]]:
    """Collects the bytes of every storage that autograd keeps within the block, `weights` left out."""
    known = {one.untyped_storage()._cdata: None for one in weights}
    alive: list[torch.Tensor] = []
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known[storage._cdata] = None
            alive.append(tensor)
            sizes.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def unet_keeps(
    unet: Any,
    config: Any,
    side: int,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    rank: int = 4,
    conv: int | None = None,
    text: bool = False,
    checkpointing: bool = False,
    dora: bool = False,
    pooled: bool = False,
) -> int:
    """Bytes that a forward pass of a frozen U-Net with a LoRA keeps; with rank 0 only the texts have gradients."""
    from networks import lora

    unet.requires_grad_(False)
    for layer in unet.modules():
        for name, weight in list(layer._parameters.items()):
            if weight is not None:
                plain = weight.detach().to(dtype)
                plain = plain.contiguous(memory_format=torch.channels_last) if plain.ndim == 4 else plain
                layer._parameters[name] = nn.Parameter(plain, requires_grad=False)
    held = list(unet.parameters())
    if rank:
        settings: dict[str, Any] = ({} if conv is None else {"conv_dim": conv}) | ({"dora": "true"} if dora else {})
        network = lora.create_network(1.0, rank, rank, None, [], unet, **settings)
        network.apply_to([], unet, False, True)
        held += list(network.parameters())
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    noisy = torch.randn(batch, 4, side, side, dtype=dtype).to(memory_format=torch.channels_last)
    width = config["cross_attention_dim"]
    states = torch.randn(batch, TOKENS, width, dtype=dtype).requires_grad_(text)
    added = {}
    if config.get("addition_embed_type") == "text_time":
        wide = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        projected = torch.randn(batch, wide, dtype=dtype).requires_grad_(pooled)
        told = {"text_embeds": projected, "time_ids": torch.zeros(batch, 6)}
        added = {"added_cond_kwargs": told}
    with keeping(held) as sizes:
        unet(noisy, torch.full((batch,), 500), states, **added)
    return sum(sizes)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch": {"batch": 3},
    "convolutions": {"conv": 4},
    "magnitudes": {"dora": True},
    "magnitudes of convolutions": {"dora": True, "conv": 4},
    "texts only": {"rank": 0, "text": True},
    "texts and what is pooled of them": {"rank": 0, "text": True, "pooled": True},
    "recomputed": {"checkpointing": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", NAMES)
def test_what_a_tiny_unet_keeps(family: str, case: str, tiny_models: Finder) -> None:
    """Real tensors, real kernels. Widths are so small that statistics, ranks and texts weigh as much as pictures."""
    tolerance = {"recomputed": 0.25, "magnitudes": 0.07, "magnitudes of convolutions": 0.07}.get(case, 0.04)
    from tests.networks.tiny_families import load_unet

    config, wanted = inspect(str(tiny_models(family))).unet_config, CASES[case]
    kept = unet_keeps(load_unet(tiny_models(family) / "unet"), config, 16, **wanted)
    assert told(config, 16, **wanted).size(4) == pytest.approx(kept, rel=tolerance)


def told(config: Any, side: int, **wanted: Any) -> tables.Saved:
    """The table's word on the same case."""
    return tables.unet_saved(
        config,
        batch=wanted.get("batch", 1),
        cells=(side, side),
        tokens=TOKENS,
        rank=wanted.get("rank", 4),
        conv_rank=wanted.get("conv", 0),
        checkpointing="all" if wanted.get("checkpointing") else "none",
        outputs=wanted.get("dora", False),
        pooled=wanted.get("pooled", False) and config.get("addition_embed_type") == "text_time",
    )


@contextmanager
def fake_cpu() -> Iterator[None]:
    """Tensors without storage that behave as those of the CPU, whose attention kernel has to be named there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def flash(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, **more: Any) -> Any:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return attend(q, k, v, dropout_p, more.get("is_causal", False), attn_mask=attn_mask, scale=more.get("scale"))[0]

    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash)
        yield


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("family", NAMES)
def test_what_a_full_size_unet_keeps(family: FamilyName, side: int, case: str) -> None:
    """Rank 4 in float32 at 256 and 512 px: to 1 % where the U-Net is trained, to 8 % of the little that checkpointing
    leaves, to 3 % with texts alone (no gradient before the first block that looks at them), to 4 % with DoRA."""
    tolerance = {"recomputed": 0.08, "magnitudes": 0.04, "magnitudes of convolutions": 0.04}
    tolerance |= dict.fromkeys(("texts only", "texts and what is pooled of them"), 0.03)
    config, wanted = packaged(family, "unet"), CASES[case]
    with fake_cpu():
        kept = unet_keeps(new_unet(config), config, side, **wanted)
    assert told(config, side, **wanted).size(4) == pytest.approx(kept, rel=tolerance.get(case, 0.01))


@pytest.mark.parametrize("family", NAMES)
def test_what_text_encoders_keep(family: str, tiny_models: Finder) -> None:
    from networks import lora
    from tests.networks.tiny_families import load_text_encoder, load_unet

    folder = tiny_models(family)
    info = inspect(str(folder))
    loaded = load_text_encoder(folder)
    encoders = loaded if isinstance(loaded, list) else [loaded]
    network = lora.create_network(1.0, 1, 1, None, loaded, load_unet(folder / "unet"))
    network.apply_to(loaded, None, True, False)
    tokens = torch.arange(2 * TOKENS).view(2, TOKENS)
    for encoder, config in zip(encoders, info.text_encoder_configs, strict=True):
        with keeping([*encoder.parameters(), *network.parameters()]) as sizes:
            encoder(tokens)
        saved = tables.text_encoder_saved(config, rows=2, tokens=TOKENS)
        assert saved.size(4) == pytest.approx(sum(sizes), rel=0.05)


@pytest.mark.parametrize("family", NAMES)
def test_what_text_encoders_without_adapters_keep(family: str, tiny_models: Finder) -> None:
    from tests.networks.tiny_families import load_text_encoder

    folder = tiny_models(family)
    loaded = load_text_encoder(folder)
    encoders = loaded if isinstance(loaded, list) else [loaded]
    tokens = torch.arange(2 * TOKENS).view(2, TOKENS)
    for encoder, config in zip(encoders, inspect(str(folder)).text_encoder_configs, strict=True):
        encoder.requires_grad_(False)
        table = encoder.get_input_embeddings()
        handle = table.register_forward_hook(lambda module, ids, rows: rows.requires_grad_())
        with keeping(list(encoder.parameters())) as sizes:
            encoder(tokens)
        handle.remove()
        saved = tables.text_encoder_saved(config, rows=2, tokens=TOKENS, adapted=False)
        assert saved.size(4) == pytest.approx(sum(sizes), rel=0.05)


@pytest.mark.parametrize("family", NAMES)
def test_checkpointing_keeps_less_and_every_second_block_lies_between(family: FamilyName) -> None:
    config = packaged(family, "unet")
    modes: list[tuple[tables.Checkpointing, int]] = [("none", 1), ("all", 2), ("all", 1)]
    kept = [
        tables.unet_saved(config, batch=1, cells=(64, 64), tokens=TOKENS, rank=8, checkpointing=mode, every=every).kept
        for mode, every in modes
    ]
    attention = tables.unet_saved(
        config, batch=1, cells=(64, 64), tokens=TOKENS, rank=8, checkpointing="attention"
    ).kept
    assert kept[0] > kept[1] > kept[2]
    assert kept[2] < attention < kept[0]


def test_a_forward_without_gradients_keeps_the_skip_connections() -> None:
    """SD1: twelve of them, of one picture of 64 x 64 cells."""
    config = packaged("sd1", "unet")
    expected = (4 * 320 + 320 // 4 + 2 * 640 // 4 + 640 // 16 + 2 * 1280 // 16 + 3 * 1280 // 64) * 64 * 64
    found = tables.unet_forward(config, batch=1, cells=(64, 64)).kept
    assert found == pytest.approx(expected, rel=0.35)
