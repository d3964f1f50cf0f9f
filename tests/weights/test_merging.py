"""LoRA files joined into one: sums against the formula in float64, taking out again, and what can't be joined."""

import json
from collections.abc import Mapping
from datetime import datetime
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from library.errors import UserError
from library.models.families import SD1, SD2, SDXL
from library.weights.loras.lora import Lora, Module, family_of
from library.weights.loras.merged_metadata import merged_metadata
from library.weights.loras.merging import Weighted, check_families, merged

NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_mid_block_resnets_0_conv1"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"


def module(
    name: str = NAME,
    shape: tuple[int, ...] = (12, 10),
    rank: int = 3,
    alpha: float | None = 1.5,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> Module:
    """A module with random factors for a weight of this shape."""
    generator = torch.Generator().manual_seed(seed)
    ones = (1,) * len(shape[2:])
    down = torch.randn(rank, *shape[1:], generator=generator) * scale
    up = torch.randn(shape[0], rank, *ones, generator=generator) * scale
    return Module(name, {"lora_down.weight": down.to(dtype), "lora_up.weight": up.to(dtype)}, alpha)


def file(*modules: Module, name: str = "a", metadata: Mapping[str, str] | None = None, **rest: Tensor) -> Lora:
    """A file of these modules."""
    bundled = {f"bundle_emb.{token}.clip_l": tensor for token, tensor in rest.items()}
    return Lora(Path(f"{name}.safetensors"), "kohya", {one.name: one for one in modules}, metadata or {}, bundled)


def change(one: Module) -> Tensor:
    """What a module does to a weight: alpha / rank * up @ down, in float64; a lacking alpha counts as the rank."""
    down, up = (one.leaves[f"lora_{way}.weight"].double() for way in ("down", "up"))
    scale = 1.0 if one.alpha is None else one.alpha / down.shape[0]
    return torch.einsum("or...,r...->o...", up.flatten(1), down.flatten(1)).view(len(up), *down.shape[1:]) * scale


def off(found: Tensor, wanted: Tensor) -> float:
    """The relative difference in the Frobenius norm."""
    return float((found - wanted).norm() / wanted.norm())


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    alphas=st.lists(st.none() | st.floats(0.1, 20), min_size=4, max_size=4),
    ratios=st.lists(st.floats(-2, 2).filter(lambda x: abs(x) > 1e-2), min_size=4, max_size=4),
    shape=st.sampled_from([(12, 10), (40, 33), (8, 6, 3, 3), (9, 7, 1, 1)]),
)
def test_joined_files_are_the_sum(
    ranks: list[int], alphas: list[float | None], ratios: list[float], shape: tuple[int, ...]
) -> None:
    files = [file(module(shape=shape, rank=r, alpha=alphas[n], seed=n), name=str(n)) for n, r in enumerate(ranks)]
    done = merged([Weighted(one, ratios[n]) for n, one in enumerate(files)], dtype=torch.float64)
    found = done.lora.modules[NAME]
    wanted = [change(one.modules[NAME]) * ratios[n] for n, one in enumerate(files)]
    size = sum(float(part.norm()) for part in wanted)
    assert float((change(found) - sum(wanted)).norm()) <= 1e-12 * size
    assert found.alpha == found.leaves["lora_down.weight"].shape[0] == min(sum(ranks), shape[0], prod(shape[1:]))
    assert found.leaves["lora_up.weight"].shape[2:] == torch.Size([1] * len(shape[2:]))
    assert done.modules[0].before == sum(ranks)


def test_strengths_by_block_count_once() -> None:
    one = file(module(), module(TEXT, seed=1))
    done = merged([Weighted(one, 0.5, lambda name: 0.25 if name == TEXT else 1.0)])
    assert off(change(done.lora.modules[TEXT]), change(one.modules[TEXT]) / 8) < 1e-6
    assert off(change(done.lora.modules[NAME]), change(one.modules[NAME]) / 2) < 1e-6


def test_modules_of_one_file_only_and_blocks_of_weight_zero() -> None:
    one, other = file(module(), module(TEXT)), file(module(CONV, (8, 6, 3, 3)), name="b")
    done = merged([Weighted(one, 1.0, lambda name: float(name != TEXT)), Weighted(other)])
    assert list(done.lora.modules) == [NAME, CONV]


@pytest.mark.parametrize(("rank", "conv_rank"), [(2, None), (4, 1), (100, 3)])
def test_cut_to_a_rank_is_the_best_of_that_rank(rank: int, conv_rank: int | None) -> None:
    shapes = {NAME: (12, 10), CONV: (8, 6, 3, 3)}
    files = [
        file(*(module(name, shape, rank=r, seed=r) for name, shape in shapes.items()), name=str(r)) for r in (3, 4)
    ]
    done = merged([Weighted(files[0], 0.7), Weighted(files[1], -0.3)], rank=rank, conv_rank=conv_rank)
    for joined in done.modules:
        wanted_rank = min((conv_rank or rank) if joined.name == CONV else rank, 7)
        whole = change(files[0].modules[joined.name]) * 0.7 - change(files[1].modules[joined.name]) * 0.3
        u, s, vh = torch.linalg.svd(whole.flatten(1), full_matrices=False)
        best = (u[:, :wanted_rank] * s[:wanted_rank]) @ vh[:wanted_rank]
        assert joined.after == wanted_rank
        assert off(change(done.lora.modules[joined.name]).flatten(1), best) < 1e-6
        assert joined.retained == pytest.approx(float(best.norm() / whole.norm()), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_taking_out_undoes_joining(dtype: torch.dtype) -> None:
    sizes = {NAME: (64, 48), CONV: (16, 12, 3, 3), TEXT: (48, 64)}
    one = file(*(module(name, shape, rank=4, alpha=1.0, seed=1, dtype=dtype) for name, shape in sizes.items()))
    other = file(
        *(module(name, shape, rank=6, alpha=3.0, seed=2, dtype=dtype) for name, shape in sizes.items()),
        module("lora_unet_mid_block_attentions_0_proj_in", (32, 32), seed=3, dtype=dtype),
        name="b",
    )
    both = merged([Weighted(one, 0.8), Weighted(other, 0.5)], dtype=dtype)
    back = merged([Weighted(both.lora), Weighted(other, 0.5)], unmerge=True, dtype=torch.float32)
    assert list(back.lora.modules) == list(sizes)
    assert back.lost == ("lora_unet_mid_block_attentions_0_proj_in",)
    for name in sizes:
        kept = back.lora.modules[name]
        wanted = change(one.modules[name]) * 0.8
        assert kept.leaves["lora_down.weight"].shape[0] == 4
        bound = torch.finfo(dtype).eps * float(
            (wanted.norm() + change(other.modules[name]).norm() * 0.5) / wanted.norm()
        )
        assert off(change(kept), wanted) < bound


def test_what_is_taken_away_rounds_nothing_off() -> None:
    """The numbers of the file that is taken away are used as they are, whatever its dtype: what is left of a sum in
    float32 is small against a bfloat16's rounding, and stays."""
    faint = file(module(shape=(64, 48), rank=4, scale=0.02))
    other = file(module(shape=(64, 48), rank=6, seed=2, dtype=torch.bfloat16), name="b")
    both = merged([Weighted(faint), Weighted(other)])
    back = merged([Weighted(both.lora), Weighted(other)], unmerge=True)
    assert back.modules[0].after == 4
    assert off(change(back.lora.modules[NAME]), change(faint.modules[NAME])) < 1e-3


@pytest.mark.parametrize("more", [{"rank": 4}, {"unmerge": True}])
def test_a_and_minus_a_leave_nothing(more: dict[str, Any]) -> None:
    one = file(module(rank=4), module(CONV, (8, 6, 3, 3)))
    ratios = (0.3, 0.3) if "unmerge" in more else (0.3, -0.3)
    with pytest.raises(UserError, match="nothing is left"):
        merged([Weighted(one, ratio) for ratio in ratios], **more)


def test_a_and_minus_a_side_by_side_are_zero() -> None:
    one = file(module(rank=4))
    done = merged([Weighted(one, 0.3), Weighted(one, -0.3)], dtype=torch.float64)
    assert float(change(done.lora.modules[NAME]).norm()) < 1e-15 * float(change(one.modules[NAME]).norm())


def test_small_changes_keep_their_digits_in_float16() -> None:
    """Factors of 1e-2 with a scale of 1/128: up times scale would be 1e-4 and below what float16 holds fully."""
    one = file(module(shape=(64, 48), rank=8, alpha=0.0625, scale=2e-3))
    wanted = change(one.modules[NAME])
    for rank in (None, 8):
        done = merged([Weighted(one)], dtype=torch.float16, rank=rank)
        assert off(change(done.lora.modules[NAME]), wanted) < 5e-4


def test_a_linear_layer_and_a_1x1_convolution_are_one() -> None:
    linear, conv = file(module()), file(module(shape=(12, 10, 1, 1), seed=1), name="b")
    done = merged([Weighted(linear), Weighted(conv)])
    wanted = change(linear.modules[NAME]) + change(conv.modules[NAME]).flatten(1)
    assert done.lora.modules[NAME].leaves["lora_down.weight"].shape == (6, 10, 1, 1)
    assert off(change(done.lora.modules[NAME]).flatten(1), wanted) < 1e-6


def with_leaf(one: Module, leaf: str, tensor: Tensor) -> Module:
    return Module(one.name, {**one.leaves, leaf: tensor}, one.alpha)


@pytest.mark.parametrize(
    ("other", "wrong"),
    [
        (file(module(shape=(12, 11)), name="b"), "don't go together"),
        (file(with_leaf(module(), "dora_scale", torch.ones(12, 1)), name="b"), "b.safetensors: is a DoRA"),
        (file(Module(NAME, {"weight": torch.ones(12), "on_input": torch.ones(())}), name="b"), "no LoRA's"),
        (file(module(scale=float("nan")), name="b"), "not finite"),
        (file(module(), module("lora_te2_text_model_encoder_layers_0_mlp_fc1"), name="b"), "is made for SDXL"),
    ],
)
def test_what_cannot_be_joined(other: Lora, wrong: str) -> None:
    first = file(module(), metadata={"ss_base_model_version": "sd_v1"})
    with pytest.raises(UserError) as caught:
        merged([Weighted(first), Weighted(other)])
    (line,) = str(caught.value).splitlines()
    assert wrong in line
    assert "b.safetensors" in line


def test_what_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(UserError, match="too large for float16"):
        merged([Weighted(file(module(scale=1e5)))], dtype=torch.float16)


def test_embeddings_stay_as_they_are() -> None:
    cat, dog = torch.randn(2, 8), torch.randn(1, 8)
    first, second = file(module(), cat=cat), file(module(seed=1), name="b", dog=dog)
    both = merged([Weighted(first, 0.5), Weighted(second, 0.5)]).lora
    assert both.rest.keys() == {"bundle_emb.cat.clip_l", "bundle_emb.dog.clip_l"}
    assert both.rest["bundle_emb.cat.clip_l"] is cat
    back = merged([Weighted(both), Weighted(second, 0.5)], unmerge=True).lora
    assert back.rest.keys() == {"bundle_emb.cat.clip_l"}
    assert merged([Weighted(first), Weighted(file(module(seed=1), name="b", cat=cat.clone()))]).lora.rest.keys() == {
        "bundle_emb.cat.clip_l"
    }
    with pytest.raises(UserError, match=r"b.safetensors: has another embedding for cat than a.safetensors"):
        merged([Weighted(first), Weighted(file(module(seed=1), name="b", cat=cat + 1))])


def test_families_by_names_sizes_and_metadata() -> None:
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    assert family_of(file(module(key, (8, 768)))) is SD1
    assert family_of(file(module(key, (8, 1024)))) is SD2
    assert family_of(file(module("lora_unet_input_blocks_4_1_proj_in"))) is SDXL
    assert family_of(file(module(), metadata={"ss_base_model_version": "sd_v2_v"})) is SD2
    loha = {f"hada_w{n}_{way}": torch.ones(2, 1024) for n in (1, 2) for way in "ab"}
    assert family_of(file(Module(key, loha))) is SD2
    assert family_of(file(module())) is None
    assert check_families([Weighted(file(module())), Weighted(file(module(key, (8, 1024))))]) is SD2


DATE = datetime(2024, 5, 6, 7, 8, 9)


def test_metadata_of_a_merged_file() -> None:
    tags = {"2_cat": {"cat": 3}}
    told = {
        "ss_base_model_version": "sd_v2_v",
        "ss_learning_rate": "0.1",
        "sshs_model_hash": "1",
        "modelspec.title": "Cat",
        "modelspec.trigger_phrase": "a cat",
        "modelspec.resolution": "640x768",
        "modelspec.encoder_layer": "2",
        "ss_tag_frequency": json.dumps(tags),
    }
    others = told | {"modelspec.title": "", "ss_tag_frequency": json.dumps({"2_cat": {"dog": 1}, "1_x": {}})}
    files = [file(module(), metadata=told), file(module(CONV, (8, 6, 3, 3)), name="style", metadata=others)]
    done = merged([Weighted(one) for one in files])
    found = merged_metadata(files, done.lora.modules, SD2, title="both", date=DATE)
    assert {key: value for key, value in found.items() if key.startswith("ss_")} == {
        "ss_v2": "True",
        "ss_base_model_version": "sd_v2_v",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "3",
        "ss_network_alpha": "3.0",
        "ss_network_args": json.dumps({"conv_dim": "3", "conv_alpha": "3.0"}),
        "ss_tag_frequency": json.dumps({"2_cat": {"cat": 3}, "2_cat (2)": {"dog": 1}, "1_x": {}}),
    }
    assert found["modelspec.merged_from"] == "Cat, style"
    assert found["modelspec.title"] == "both"
    assert found["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert found["modelspec.prediction_type"] == "v"
    assert found["modelspec.resolution"] == "640x768"
    assert found["modelspec.trigger_phrase"] == "a cat"
    assert found["modelspec.encoder_layer"] == "2"
    assert not any(key.startswith("sshs_") for key in found)
    least = merged_metadata(files, done.lora.modules, SD2, title="both", date=DATE, minimum=True)
    assert least.keys() == {key for key in found if key.startswith("ss_")} - {"ss_tag_frequency"}


def test_different_ranks_are_dynamic() -> None:
    """Ranks differ; alpha is one for all, the commonest rank, and every change is what it was."""
    one = file(module(), module(TEXT, rank=5), module(CONV, (8, 6, 3, 3), rank=5))
    done = merged([Weighted(one)])
    assert {made.alpha for made in done.lora.modules.values()} == {5.0}
    assert all(off(change(made), change(one.modules[name])) < 1e-6 for name, made in done.lora.modules.items())
    found = merged_metadata([file(module())], done.lora.modules, None, title="x", date=DATE)
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("Dynamic", "5.0")
    assert found["ss_base_model_version"] == "sd_v1"
