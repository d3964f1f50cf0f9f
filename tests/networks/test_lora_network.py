"""A whole network on tiny models: parts, names, files, independence, and dropouts that are functions of the place."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.errors import UserError
from networks import lora

PROMPT = torch.arange(77).repeat(4, 1) * torch.arange(1, 5)[:, None]


def run(unet: nn.Module, text_encoder: nn.Module, rows: slice = slice(0, 4)) -> torch.Tensor:
    """One forward of both models on fixed inputs; `rows` takes samples of the batch of four."""
    noisy = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))[rows]
    times = torch.tensor([1, 300, 600, 999])[rows]
    return unet(noisy, times, text_encoder(PROMPT[rows])[0]).sample


def attached(unet: nn.Module, text_encoder: nn.Module, dim: int = 4, **args: Any) -> lora.LoraNetwork:
    """A network on both models whose up-factors are not zero."""
    network = lora.create_network(1.0, dim, 2.0, None, text_encoder, unet, **args)
    network.apply_to(text_encoder, unet, True, True)
    network.prepare_grad_etc(text_encoder, unet)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_up" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network


def grads(network: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients, taken out."""
    found = {name: parameter.grad for name, parameter in network.named_parameters()}
    network.zero_grad(set_to_none=True)
    return found


def test_a_new_network_changes_nothing_and_leaves_the_base_alone(unet: nn.Module, text_encoder: nn.Module) -> None:
    before, keys = run(unet, text_encoder), list(unet.state_dict())
    network = lora.create_network(1.0, 4, 1, None, text_encoder, unet)
    network.apply_to(text_encoder, unet, True, True)
    assert torch.equal(run(unet, text_encoder), before)
    assert list(unet.state_dict()) == keys
    assert len(network.layers) == 192 + 5 * 6


def test_multiplier_and_removal_give_the_base_back(unet: nn.Module, text_encoder: nn.Module) -> None:
    before = run(unet, text_encoder)
    network = attached(unet, text_encoder, conv_dim="2")
    full = run(unet, text_encoder)
    assert (full - before).abs().max() > 0.01
    network.set_multiplier(0.0)
    assert torch.equal(run(unet, text_encoder), before)
    network.set_multiplier(1.0)
    assert torch.equal(run(unet, text_encoder), full)
    network.remove()
    assert torch.equal(run(unet, text_encoder), before)
    assert not any("forward" in module.__dict__ for module in unet.modules())


def test_first_weights_depend_on_seed_and_name_alone(unet: nn.Module, text_encoder: nn.Module) -> None:
    def downs(seed: int, **args: Any) -> dict[str, torch.Tensor]:
        network = lora.create_network(1.0, 4, 1, None, text_encoder, unet, seed=seed, **args)
        network.apply_to(text_encoder, unet)
        return {key: tensor for key, tensor in network.state_dict().items() if "lora_down" in key}

    plain, again, other, conv = downs(1), downs(1), downs(2), downs(1, conv_dim="4")
    for key, tensor in plain.items():
        assert torch.equal(tensor, again[key])
        assert torch.equal(tensor, conv[key])
        assert not torch.equal(tensor, other[key])
        bound = tensor[0].numel() ** -0.5
        assert 0.5 * bound < tensor.abs().max() <= bound


@pytest.mark.parametrize(
    ("train_te", "train_unet", "prefixes"), [(0, 1, {"unet"}), (1, 0, {"te"}), (1, 1, {"te", "unet"})]
)
def test_a_part_that_is_not_trained_is_not_saved(
    unet: nn.Module, text_encoder: nn.Module, tmp_path: Path, train_te: int, train_unet: int, prefixes: set[str]
) -> None:
    network = lora.create_network(1.0, 4, 1, None, text_encoder, unet)
    network.apply_to(text_encoder, unet, bool(train_te), bool(train_unet))
    network.save_weights(tmp_path / "a.safetensors", None, {})
    assert {key.split("_")[1] for key in load_file(tmp_path / "a.safetensors")} == prefixes
    assert {key.split("_")[1] for key in network.state_dict()} == prefixes


def test_a_part_with_learning_rate_zero_is_detached(unet: nn.Module, text_encoder: nn.Module) -> None:
    network = attached(unet, text_encoder)
    groups, names = network.prepare_optimizer_params(None, 0.0, 1e-4)
    assert names == ["textencoder"]
    assert [group["lr"] for group in groups] == [1e-4]
    assert {key.split("_")[1] for key in network.state_dict()} == {"te"}
    assert len(network.get_trainable_params()) == len(groups[0]["params"])


def test_groups_have_their_own_learning_rates(unet: nn.Module, text_encoder: nn.Module) -> None:
    groups, names = attached(unet, text_encoder).prepare_optimizer_params(5e-5, None, 1e-4)
    assert [(name, group["lr"], len(group["params"])) for name, group in zip(names, groups, strict=True)] == [
        ("textencoder", 5e-5, 60),
        ("unet", 1e-4, 384),
    ]


@pytest.mark.parametrize(("alpha", "saved"), [(None, 4.0), (0, 4.0), (1, 1.0), ("0.3", 0.3)])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_alpha_is_saved_as_float32_without_dimensions(
    unet: nn.Module, text_encoder: nn.Module, tmp_path: Path, alpha: Any, saved: float, dtype: torch.dtype | None
) -> None:
    network = lora.create_network(1.0, 4, alpha, None, text_encoder, unet)
    network.apply_to(text_encoder, unet)
    network.save_weights(tmp_path / "a.safetensors", dtype, {})
    tensors = load_file(tmp_path / "a.safetensors")
    assert {(t.dtype, t.shape, t.item()) for key, t in tensors.items() if key.endswith("alpha")} == {
        (torch.float32, torch.Size([]), torch.tensor(saved).item())
    }
    assert {t.dtype for key, t in tensors.items() if key.endswith("weight")} == {dtype or torch.float32}


def test_saved_keys_are_the_targets_and_three_leaves(unet: nn.Module, text_encoder: nn.Module, tmp_path: Path) -> None:
    network = attached(unet, text_encoder, conv_dim="2", conv_alpha="1.5")
    network.save_weights(tmp_path / "a.safetensors", None, {})
    tensors = load_file(tmp_path / "a.safetensors")
    for layer in network.layers:
        down, up = layer.target.shapes(2 if layer.target.kernel == "3x3" else 4)
        assert tensors.pop(f"{layer.target.name}.lora_down.weight").shape == down
        assert tensors.pop(f"{layer.target.name}.lora_up.weight").shape == up
        assert tensors.pop(f"{layer.target.name}.alpha") == (1.5 if layer.target.kernel == "3x3" else 2.0)
    assert not tensors


def test_text_encoder_inside_a_wrapper_gets_the_same_names(unet: nn.Module, text_encoder: nn.Module) -> None:
    wrapper = nn.Module()
    wrapper.text_model = text_encoder
    network = lora.create_network(1.0, 4, 1, None, wrapper, unet)
    network.apply_to(wrapper, unet)
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in network.state_dict()


def test_two_networks_do_not_influence_each_other(unet: nn.Module, text_encoder: nn.Module) -> None:
    base = run(unet, text_encoder)
    conv = attached(unet, text_encoder, conv_dim="4", module_dropout="0.5")
    conv.eval()
    alone = run(unet, text_encoder)
    plain = lora.create_network(1.0, 4, 1, None, text_encoder, unet)
    assert len(plain._built) == 192 + 30
    plain.apply_to(text_encoder, unet)
    assert torch.allclose(run(unet, text_encoder), alone, atol=1e-5)
    with pytest.raises(ValueError, match="attached later"):
        conv.remove()
    plain.remove()
    conv.remove()
    assert torch.equal(run(unet, text_encoder), base)


def test_weights_come_back_with_the_alpha_of_the_file(unet: nn.Module, text_encoder: nn.Module, tmp_path: Path) -> None:
    first = attached(unet, text_encoder)
    expected = run(unet, text_encoder)
    first.save_weights(tmp_path / "a.safetensors", None, {})
    first.remove()
    second = lora.create_network(1.0, 4, 4.0, None, text_encoder, unet)
    second.apply_to(text_encoder, unet)
    assert "222 of 222" in second.load_weights(tmp_path / "a.safetensors")
    assert torch.equal(run(unet, text_encoder), expected)
    second.save_weights(tmp_path / "b.safetensors", None, {})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_state_dict_restores_the_scale_too(unet: nn.Module, text_encoder: nn.Module) -> None:
    first = attached(unet, text_encoder)
    expected, state = run(unet, text_encoder), {key: t.clone() for key, t in first.state_dict().items()}
    first.remove()
    second = lora.create_network(1.0, 4, 1.0, None, text_encoder, unet)
    second.apply_to(text_encoder, unet)
    second.load_state_dict(state)
    assert torch.equal(run(unet, text_encoder), expected)


def test_network_from_weights_has_the_modules_and_ranks_of_the_file(
    unet: nn.Module, text_encoder: nn.Module, tmp_path: Path
) -> None:
    first = attached(unet, text_encoder, conv_dim="2", conv_alpha="0.5")
    expected = run(unet, text_encoder)
    first.save_weights(tmp_path / "whole.safetensors", None, {})
    first.remove()
    base = run(unet, text_encoder)
    again, tensors = lora.create_network_from_weights(1.0, tmp_path / "whole.safetensors", None, text_encoder, unet)
    again.apply_to(text_encoder, unet)
    again.load_weights(tmp_path / "whole.safetensors")
    assert torch.equal(run(unet, text_encoder), expected)
    again.remove()

    few = {key: tensor for key, tensor in tensors.items() if "down_blocks_0_attentions" in key}
    part, _ = lora.create_network_from_weights(1.0, None, None, text_encoder, unet, weights_sd=few)
    part.apply_to(text_encoder, unet)
    assert set(part.state_dict()) == set(few)
    part.remove()

    again.merge_to(text_encoder, unet, tensors)
    torch.testing.assert_close(run(unet, text_encoder), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(expected, base, atol=1e-2)


def bad_file(path: Path, change: str, network: lora.LoraNetwork) -> Path:
    """A saved file with one thing wrong."""
    tensors = network.file_tensors()
    key = next(iter(tensors)).partition(".")[0]
    if change == "other family":
        tensors = {
            name.replace("lora_unet_", "lora_unet_input_").replace("lora_te", "lora_te9"): t
            for name, t in tensors.items()
        }
    elif change == "other kind":
        tensors[f"{key}.hada_w1_a"] = torch.zeros(1)
    elif change == "no up":
        del tensors[f"{key}.lora_up.weight"]
    elif change == "shape":
        tensors[f"{key}.lora_up.weight"] = torch.zeros(7, 4)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("other family", "no key in it fits"),
        ("other kind", "LoHa"),
        ("no up", "lacks"),
        ("shape", "shape"),
        ("rank", "rank 4"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    unet: nn.Module, text_encoder: nn.Module, tmp_path: Path, change: str, says: str
) -> None:
    network = attached(unet, text_encoder)
    file = bad_file(tmp_path / "bad.safetensors", change, network)
    if change == "rank":
        network.remove()
        network = lora.create_network(1.0, 8, 1, None, text_encoder, unet)
        network.apply_to(text_encoder, unet)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match=says):
        network.load_weights(file)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


def test_from_weights_refuses_modules_it_has_no_place_for(
    unet: nn.Module, text_encoder: nn.Module, tmp_path: Path
) -> None:
    file = bad_file(tmp_path / "bad.safetensors", "other family", attached(unet, text_encoder))
    with pytest.raises(UserError, match="not in this base model"):
        lora.create_network_from_weights(1.0, file, None, text_encoder, unet)


def test_a_missing_or_damaged_file_is_said_so(unet: nn.Module, text_encoder: nn.Module, tmp_path: Path) -> None:
    network = attached(unet, text_encoder)
    with pytest.raises(UserError, match="no such weight file"):
        network.load_weights(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match="can't be read"):
        network.load_weights(tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"conv_dimm": "4"}, "did you mean conv_dim"),
        ({"conv_dim": "four"}, "'four' is no whole number"),
        ({"rank_dropout": "1.0"}, "must be below 1"),
        ({"preset": "full"}, "belongs to --network_module lycoris.kohya"),
        ({"dropout": "-0.1", "conv_alpha": "x"}, "conv_alpha"),
    ],
)
def test_bad_network_args_are_refused(
    unet: nn.Module, text_encoder: nn.Module, args: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says) as error:
        lora.create_network(1.0, 4, 1, None, text_encoder, unet, **args)
    assert len(error.value.problems) == len(args)


def test_network_args_answer_without_torch(repo_root: Path) -> None:
    code = (
        "import sys\nfrom networks.lora_args import parse\n"
        "try:\n    parse(4, 1, {'conv_dimm': '2'})\nexcept Exception as error:\n    print(error)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, check=True, capture_output=True, text=True)
    assert "conv_dimm" in done.stdout


ALL_DROPOUTS: dict[str, Any] = {"dropout": 0.2, "rank_dropout": "0.2", "module_dropout": "0.2"}


def test_masks_depend_on_the_place_in_the_run_alone(unet: nn.Module, text_encoder: nn.Module) -> None:
    network = attached(unet, text_encoder, conv_dim="2", **ALL_DROPOUTS)
    network.on_epoch_start(text_encoder, unet)

    def at(epoch: int, index: int, positions: tuple[int, ...], rows: slice = slice(0, 4)) -> torch.Tensor:
        network.set_random_context(7, epoch, index, positions)
        return run(unet, text_encoder, rows).detach()

    first = at(1, 2, (0, 1, 2, 3))
    assert torch.equal(at(1, 2, (0, 1, 2, 3)), first)
    assert not torch.allclose(at(1, 3, (0, 1, 2, 3)), first, atol=1e-4)
    assert not torch.allclose(at(2, 2, (0, 1, 2, 3)), first, atol=1e-4)
    ranks = torch.cat([at(1, 2, (0, 2), slice(0, 4, 2)), at(1, 2, (1, 3), slice(1, 4, 2))])[[0, 2, 1, 3]]
    torch.testing.assert_close(ranks, first, rtol=1e-4, atol=1e-5)
    network.eval()
    assert torch.equal(at(1, 2, ()), at(5, 6, (9,)))


def test_dropout_keeps_the_expected_size(unet: nn.Module, text_encoder: nn.Module) -> None:
    network = attached(unet, text_encoder, dropout="0.5", rank_dropout="0.25")
    network.train()
    layer = network.layers[0]
    network.set_random_context(0, 0, 0, range(64))
    mask, kept = layer._mask((64, layer.rank, 8, 8), torch.device("cpu"))
    assert mask is not None
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.mean() / kept == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("kind", "same"), [("dropout", ()), ("rank_dropout", (2, 3)), ("module_dropout", (1, 2, 3))])
def test_each_dropout_drops_its_own_unit(
    unet: nn.Module, text_encoder: nn.Module, kind: str, same: tuple[int, ...]
) -> None:
    args: dict[str, Any] = {kind: "0.5"}
    network = lora.create_network(1.0, 16, 1, None, text_encoder, unet, **args)
    layer = network._built[0].train()
    network.set_random_context(3, 1, 1, range(32))
    mask, kept = layer._mask((32, 16, 4, 4), torch.device("cpu"))
    assert mask is not None
    whole = mask.expand(32, 16, 4, 4)
    for dimension in range(4):
        varies = bool((whole != whole.narrow(dimension, 0, 1)).any())
        assert varies == (dimension not in same)
    assert kept == (1 if kind == "module_dropout" else 0.5)
    halves = layer._mask((64, 16, 4, 4), torch.device("cpu"))[0]
    assert halves is not None and len(halves) == 64


def test_training_with_dropout_without_a_place_is_an_error(unet: nn.Module, text_encoder: nn.Module) -> None:
    attached(unet, text_encoder, dropout="0.5").train()
    with pytest.raises(RuntimeError, match="set_random_context"):
        run(unet, text_encoder)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_gradients(unet: nn.Module, text_encoder: nn.Module, reentrant: bool) -> None:
    network = attached(unet, text_encoder, conv_dim="2", dropout="0.3", rank_dropout="0.2", module_dropout="0.2")
    network.train()
    network.set_random_context(1, 1, 1, (0, 1, 2, 3))
    run(unet, text_encoder).square().mean().backward()
    expected = grads(network)
    network.enable_gradient_checkpointing()

    def whole(times: torch.Tensor) -> torch.Tensor:
        return run(unet, text_encoder)

    checkpoint(whole, torch.zeros(1, requires_grad=True), use_reentrant=reentrant).square().mean().backward()
    found = grads(network)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_models_own_checkpointing_gives_the_same_gradients(unet: nn.Module, text_encoder: nn.Module) -> None:
    network = attached(unet, text_encoder, dropout="0.3")
    network.train()
    unet.train()
    network.set_random_context(1, 1, 1, (0, 1, 2, 3))
    run(unet, text_encoder).square().mean().backward()
    expected = grads(network)
    unet.enable_gradient_checkpointing()
    run(unet, text_encoder).square().mean().backward()
    found = grads(network)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("by", ["flag", "rate"])
def test_a_frozen_text_encoder_is_let_go(unet: nn.Module, text_encoder: nn.Module, by: str) -> None:
    watched = weakref.ref(text_encoder.get_submodule("encoder.layers.0.mlp.fc1"))
    network = lora.create_network(1.0, 4, 1, None, text_encoder, unet)
    network.apply_to(text_encoder, unet, by == "rate", True)
    network.prepare_optimizer_params(0, 1e-4, 1e-4)
    for layer in text_encoder.encoder.layers:
        layer.mlp.fc1 = nn.Identity()
    gc.collect()
    assert watched() is None
    network.set_multiplier(0.5)
