"""LyCORIS on the tiny models of every family, by the calls of the trainer, through the facades."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.models.families import unet_key_of
from library.models.lora_targets import targets
from library.options.modules import LYCORIS_PRESETS, LYCORIS_UNBOUNDED
from networks import foreign, lora
from networks.facade import text_encoder_facade, unet_facade
from networks.lycoris_presets import PRESETS
from tests.networks.tiny_families import FAMILIES, Finder, fill, forward, load_text_encoder, load_unet

pytestmark = pytest.mark.xdist_group("lycoris")
NAME = "lycoris.kohya"
FACTORS = {"lora_down.weight", "lora_up.weight", "alpha"}
ALGOS: dict[str, tuple[dict[str, str], set[str]]] = {
    "locon": ({"algo": "locon", "conv_dim": "4", "conv_alpha": "1"}, FACTORS),
    "loha": ({"algo": "loha"}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"}),
    "lokr": (
        {"algo": "lokr", "factor": "4", "decompose_both": "True"},
        {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "alpha"},
    ),
    "ia3": ({"algo": "ia3"}, {"weight", "on_input"}),
    "dylora": ({"algo": "dylora", "block_size": "2"}, FACTORS),
    "diag-oft": ({"algo": "diag-oft", "constraint": "0.1"}, {"oft_blocks", "alpha"}),
    "boft": ({"algo": "boft"}, {"oft_blocks", "alpha"}),
    "glora": ({"algo": "glora"}, {"a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"}),
    "full": ({"algo": "full"}, {"diff", "diff_b"}),
    "dora": ({"algo": "locon", "dora_wd": "True"}, FACTORS | {"dora_scale"}),
}
BOUNDED = ("locon", "loha", "lokr", "boft", "dora")


class Attached:
    """A network on a tiny model of its own, attached as the trainer does it."""

    def __init__(self, folder: Path, args: dict[str, str], *, train_te: bool = True, train_unet: bool = True) -> None:
        self.unet, self.text_encoder = load_unet(folder), load_text_encoder(folder)
        unet, text_encoder = unet_facade(self.unet), text_encoder_facade(self.text_encoder)
        torch.manual_seed(0)
        options = {"dropout": None, **foreign.arguments(NAME, args)}
        self.network = foreign.load(NAME).create_network(
            1.0, 4, 1.0, None, text_encoder, unet, neuron_dropout=None, **options
        )
        self.network.apply_to(text_encoder, unet, train_te, train_unet)
        self.groups, self.names = self.network.prepare_optimizer_params(1e-4, 2e-4, 3e-4)
        self.network.to(dtype=torch.float32)
        self.network.prepare_grad_etc(text_encoder, unet)
        self.network.on_epoch_start(text_encoder, unet)

    def forward(self) -> torch.Tensor:
        """One prediction by the real models; the draws of dylora are the same each time."""
        torch.manual_seed(0)
        return forward(self.unet, self.text_encoder)

    @property
    def target_names(self) -> set[str]:
        """The names of files of this base model."""
        encoders = self.text_encoder if isinstance(self.text_encoder, list) else [self.text_encoder]
        configs = [encoder.config.to_dict() for encoder in encoders]
        key = unet_key_of(self.unet.config)
        return {target.name for target in targets(self.unet.config, configs, conv=True, unet_key=key)}


@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("family", FAMILIES)
def test_trains_and_saves_what_loaders_expect(
    family: str, algo: str, tiny_models: Finder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_models(family)
    before = forward(load_unet(folder), load_text_encoder(folder))
    capfd.readouterr()
    args, leaves = ALGOS[algo]
    attached = Attached(folder, args)
    assert attached.names == ["textencoder", "unet"]
    assert [group["lr"] for group in attached.groups] == [1e-4, 2e-4]
    torch.testing.assert_close(attached.forward(), before, rtol=0, atol=1e-4)
    attached.forward().square().mean().backward()
    parameters = list(attached.network.parameters())
    assert {id(one) for group in attached.groups for one in group["params"]} == {id(one) for one in parameters}
    gradients = [one.grad for one in parameters if one.grad is not None]
    assert len(gradients) >= len(parameters) // (2 if algo == "dylora" else 1), "dylora trains one block a step"
    assert all(bool(one.isfinite().all()) for one in gradients)
    assert any(bool(one.any()) for one in gradients)

    path = tmp_path / "lycoris.safetensors"
    attached.network.save_weights(str(path), torch.float16, {"ss_v2": "False"})
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        assert {"ss_v2", "sshs_model_hash"} == set(file.metadata())
    names = {key.partition(".")[0] for key in tensors}
    assert {key.partition(".")[2] for key in tensors} <= leaves
    assert {key.partition(".")[2] for key in tensors} >= leaves - ALGOS["lokr"][1]
    ends = ("to_k", "to_v", "ff_net_2", "k_proj", "v_proj", "mlp_fc2")
    assert names == {name for name in attached.target_names if algo != "ia3" or name.endswith(ends)}
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("algo", ["lokr", "dylora", "boft", "glora", "full", "dora"])
def test_an_exact_state_goes_on_where_it_was(algo: str, tiny_sd1: Path) -> None:
    first, second = (Attached(tiny_sd1, ALGOS[algo][0]) for _ in range(2))
    with torch.no_grad():
        for parameter in first.network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    assert not torch.equal(first.forward(), second.forward())
    foreign.load_exact_state(second.network, {k: t.clone() for k, t in foreign.exact_state(first.network).items()})
    assert torch.equal(first.forward(), second.forward())
    with pytest.raises(ValueError, match="another network"):
        foreign.load_exact_state(second.network, {})


@pytest.mark.parametrize("algo", ["lokr", "ia3", "boft", "glora", "full", "dora"])
def test_weights_load_again(algo: str, tiny_sd1: Path, tmp_path: Path) -> None:
    first, second = (Attached(tiny_sd1, ALGOS[algo][0]) for _ in range(2))
    with torch.no_grad():
        for parameter in first.network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    path = str(tmp_path / "lycoris.safetensors")
    first.network.save_weights(path, None, {})
    assert second.network.load_weights(path) == {}
    torch.testing.assert_close(first.forward(), second.forward(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("algo", ["locon", "loha", "lokr", "diag-oft", "boft", "glora", "full", "dora"])
def test_a_network_made_from_weights_holds_them(algo: str, tiny_sd1: Path, tmp_path: Path) -> None:
    first = Attached(tiny_sd1, ALGOS[algo][0])
    with torch.no_grad():
        for parameter in first.network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    path = str(tmp_path / "lycoris.safetensors")
    first.network.save_weights(path, None, {})
    unet, text_encoder = load_unet(tiny_sd1), load_text_encoder(tiny_sd1)
    facades = text_encoder_facade(text_encoder), unet_facade(unet)
    again, _ = foreign.load(NAME).create_network_from_weights(1.0, path, None, *facades)
    again.apply_to(*facades, True, True)
    torch.testing.assert_close(forward(unet, text_encoder), first.forward(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_own_network_reads_its_locon_files(family: str, tiny_models: Finder, tmp_path: Path) -> None:
    folder = tiny_models(family)
    theirs = Attached(folder, ALGOS["locon"][0])
    fill(theirs.network)
    path = tmp_path / "locon.safetensors"
    theirs.network.save_weights(str(path), None, {})
    unet, text_encoder = load_unet(folder), load_text_encoder(folder)
    ours, _ = lora.create_network_from_weights(1.0, path, None, text_encoder, unet)
    ours.apply_to(text_encoder, unet)
    ours.load_weights(path)
    torch.testing.assert_close(forward(unet, text_encoder), theirs.forward(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("train_te", "train_unet", "prefixes"), [(True, False, {"te1", "te2"}), (False, True, {"unet"})]
)
def test_a_part_that_is_not_trained_is_not_saved(
    train_te: bool, train_unet: bool, prefixes: set[str], tiny_sdxl: Path, tmp_path: Path
) -> None:
    attached = Attached(tiny_sdxl, {"algo": "loha"}, train_te=train_te, train_unet=train_unet)
    attached.network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    assert {key.split("_")[1] for key in load_file(tmp_path / "a.safetensors")} == prefixes
    assert attached.names == (["textencoder"] if train_te else ["unet"])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_finds_modules_of_files(preset: str, tiny_sd1: Path) -> None:
    attached = Attached(tiny_sd1, {"algo": "locon", "preset": preset}, train_unet=True)
    names = {key.partition(".")[0] for key in attached.network.state_dict()}
    assert names <= attached.target_names
    kinds = {name.split("_")[1] for name in names}
    assert kinds == ({"unet"} if preset.startswith("unet-") else {"unet", "te"})
    assert any("resnets" in name for name in names) == (
        preset in ("full", "full-lin", "unet-only", "unet-convblock-only")
    )


@pytest.mark.parametrize("algo", ["locon", "glora", "full", "dora"])
def test_a_base_in_bfloat16_works_under_autocast(algo: str, tiny_sd1: Path) -> None:
    attached = Attached(tiny_sd1, ALGOS[algo][0])
    dtype = torch.bfloat16
    for model in (attached.unet, attached.text_encoder):
        owned = {id(one) for one in attached.network.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in owned:
                parameter.data = parameter.data.to(dtype)
    with torch.autocast("cpu", dtype):
        out = attached.forward()
    out.float().square().mean().backward()
    gradients = [one.grad for one in attached.network.parameters() if one.grad is not None]
    assert {one.dtype for one in gradients} == {torch.float32}


def test_dylora_draws_nothing_where_nothing_is_trained(tiny_sd1: Path) -> None:
    attached = Attached(tiny_sd1, ALGOS["dylora"][0])
    fill(attached.network)
    attached.network.train(False)
    first = attached.forward()
    assert torch.equal(forward(attached.unet, attached.text_encoder), first)
    attached.network.train(True)
    assert not torch.equal(attached.forward(), first)


@pytest.mark.parametrize("args", [ALGOS["dylora"][0], {"algo": "locon", "dropout": "0.3", "module_dropout": "0.3"}])
def test_gradient_checkpointing_recomputes_the_same(args: dict[str, str], tiny_sdxl: Path) -> None:
    attached = Attached(tiny_sdxl, {"preset": "unet-only", **args})
    fill(attached.network)
    attached.unet.train()
    found = []
    for _ in range(2):
        attached.network.zero_grad()
        attached.forward().square().mean().backward()
        found.append({name: one.grad for name, one in attached.network.named_parameters() if one.grad is not None})
        attached.unet.enable_gradient_checkpointing()
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("algo", BOUNDED)
def test_norms_are_bounded_as_asked(algo: str, tiny_sd1: Path) -> None:
    """`--scale_weight_norms`: afterwards no module's change is above the bound, and the file holds what is left."""
    attached = Attached(tiny_sd1, ALGOS[algo][0])
    fill(attached.network, 0.5)
    with torch.no_grad():
        scaled, mean, greatest = attached.network.apply_max_norm_regularization(0.2, torch.device("cpu"))
        assert 0 < float(scaled) <= len(attached.network.loras)
        assert float(mean) * 0.999 <= float(greatest) <= 0.2 * 1.001
        scaled, *left = attached.network.apply_max_norm_regularization(0.21, torch.device("cpu"))
    assert int(scaled) == 0
    assert [float(norm) for norm in left] == pytest.approx([float(mean), float(greatest)], rel=1e-3)


@pytest.mark.parametrize("algo", LYCORIS_UNBOUNDED)
def test_norms_that_are_not_bounded_leave_all_as_it_is(algo: str, tiny_sd1: Path) -> None:
    attached = Attached(tiny_sd1, ALGOS[algo][0])
    fill(attached.network, 0.5)
    before = {name: one.clone() for name, one in attached.network.state_dict().items()}
    assert attached.network.apply_max_norm_regularization(0.2, torch.device("cpu")) == (0, 0.0, 0.0)
    assert all(torch.equal(one, before[name]) for name, one in attached.network.state_dict().items())


@pytest.mark.parametrize("algo", ["locon", "loha", "lokr", "boft", "full", "dora"])
def test_strength_zero_gives_the_base(algo: str, tiny_sd1: Path) -> None:
    base = forward(load_unet(tiny_sd1), load_text_encoder(tiny_sd1))
    attached = Attached(tiny_sd1, ALGOS[algo][0])
    fill(attached.network, 0.5 if algo == "loha" else 0.05)
    attached.network.eval()
    full = attached.forward()
    assert (full - base).abs().max() > 1e-3
    attached.network.set_multiplier(0.0)
    torch.testing.assert_close(attached.forward(), base, rtol=0, atol=1e-4)
    attached.network.set_multiplier(1.0)
    assert torch.equal(attached.forward(), full)


@pytest.mark.parametrize(
    ("algo", "strength"), [("locon", 0.5), ("loha", 0.5), ("lokr", 0.5), ("glora", 1.0), ("full", 1.0)]
)
def test_a_merged_file_acts_as_the_network_does(algo: str, strength: float, tiny_sd1: Path, tmp_path: Path) -> None:
    attached = Attached(tiny_sd1, ALGOS[algo][0])
    with torch.no_grad():
        for parameter in attached.network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    path = tmp_path / "lycoris.safetensors"
    attached.network.save_weights(str(path), None, {})
    attached.network.set_multiplier(strength)
    unet, text_encoder = load_unet(tiny_sd1), load_text_encoder(tiny_sd1)
    before = forward(unet, text_encoder)
    assert foreign.merge_lycoris(path, strength, text_encoder, unet) == len(attached.network.loras)
    merged = forward(unet, text_encoder)
    assert (merged - before).abs().max() > 1e-3
    torch.testing.assert_close(merged, attached.forward(), rtol=1e-3, atol=1e-4)


def test_trained_norms_survive_a_model_with_channels_last(tiny_sd1: Path, tmp_path: Path) -> None:
    """Whose first norm's input asks for no gradient: there a kernel of torch ends the process."""
    attached = Attached(tiny_sd1, {"algo": "locon", "train_norm": "True"})
    attached.unet.to(memory_format=torch.channels_last)
    attached.forward().square().mean().backward()
    norms = {name: one for name, one in attached.network.named_parameters() if name.endswith("_norm")}
    assert any("down_blocks_0_resnets_0_norm1" in name for name in norms)
    assert all(one.grad is not None and bool(one.grad.any()) for one in norms.values())
    plain = Attached(tiny_sd1, {"algo": "locon", "train_norm": "True"})
    plain.forward().square().mean().backward()
    for name, one in plain.network.named_parameters():
        if name in norms:
            torch.testing.assert_close(norms[name].grad, one.grad, rtol=1e-3, atol=1e-5)
    fill(attached.network)
    expected = attached.forward()
    attached.network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    assert {key.partition(".")[2] for key in load_file(tmp_path / "a.safetensors")} == {*FACTORS, "w_norm", "b_norm"}
    assert plain.network.load_weights(str(tmp_path / "a.safetensors")) == {}
    torch.testing.assert_close(plain.forward(), expected, rtol=1e-3, atol=1e-4)


def test_text_is_made_what_lycoris_reads() -> None:
    given: dict[str, Any] = {"decompose_both": "False", "algo": "IA3"}
    assert foreign.arguments(NAME, given) == {"decompose_both": False, "algo": "IA3", "preset": "ia3"}
    assert foreign.arguments(NAME, {"algo": "ia3", "preset": "mine.toml"})["preset"] == "mine.toml"
    assert foreign.arguments("some.module", given) == given


def test_the_options_know_the_presets() -> None:
    assert set(LYCORIS_PRESETS) == set(PRESETS)
