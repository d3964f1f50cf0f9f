"""Flags of the network: which tensors a run trains, their shapes, what they start from and how far they may grow."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.flags.effects import Arrays, Ran, Runs, equal, observes, part, same

pytestmark = pytest.mark.xdist_group("flags of network")
STILL = ("--learning_rate", "1e-12")


def pairs(tensors: Arrays) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """Down (rank, in), up (out, rank) in float64 and alpha of each module."""
    for key, down in tensors.items():
        if key.endswith("lora_down.weight"):
            name = key.removesuffix("lora_down.weight")
            up, alpha = tensors[f"{name}lora_up.weight"], tensors[f"{name}alpha"]
            yield (
                down.astype(np.float64).reshape(len(down), -1),
                up.astype(np.float64).reshape(-1, len(down)),
                float(alpha),
            )


def norms(ran: Ran) -> list[float]:
    return [float(np.linalg.norm(up @ down) * alpha / len(down)) for down, up, alpha in pairs(ran.weights)]


@pytest.fixture(scope="module")
def trained(runs: Runs) -> Ran:
    """Weights that matter, to start from: rank 3, alpha 2."""
    return runs("--network_dim", "3", "--network_alpha", "2", "--learning_rate", "5e-2", "--network_train_unet_only")


@observes("network_module", "network_args", "network_dim")
def test_module_rank_and_settings_show_in_the_file(runs: Runs) -> None:
    plain = runs()
    assert {len(down) for down, _, _ in pairs(plain.weights)} == {2} and plain.metadata["ss_network_dim"] == "2"
    assert {len(down) for down, _, _ in pairs(runs("--network_dim", "5", *STILL).weights)} == {5}
    conv = runs(*STILL, "--network_args", "conv_dim=3", "conv_alpha=1.5")
    more = {key: tensor for key, tensor in conv.weights.items() if key not in plain.weights}
    downs = [tensor for key, tensor in more.items() if "lora_down" in key]
    assert {(len(tensor), tensor.shape[2:] == (3, 3)) for tensor in downs} == {(3, True), (2, False)}
    assert {float(tensor) for key, tensor in more.items() if key.endswith("alpha")} == {1.5, 1.0}
    oft = runs("--network_module", "networks.oft", "--max_train_steps", "1")
    assert oft.weights and not any("lora_down" in key for key in oft.weights)
    assert oft.metadata["ss_network_module"] == "networks.oft"
    wrong = runs("--network_args", "konv_dim=3", expect=2)
    assert "konv_dim" in wrong.err and not wrong.steps_were_made


@observes("network_alpha")
def test_alpha_scales_what_the_network_does(runs: Runs, trained: Ran) -> None:
    assert {alpha for _, _, alpha in pairs(trained.weights)} == {2.0}
    assert {alpha for _, _, alpha in pairs(runs().weights)} == {1.0}
    assert {alpha for _, _, alpha in pairs(runs("--network_alpha", "0", *STILL).weights)} == {2.0}
    once = ("--optimizer_type", "SGD", "--max_grad_norm", "0", "--max_train_steps", "1", "--network_train_unet_only")
    one, four = runs(*once), runs(*once, "--network_alpha", "4")
    for (_, up, _), (_, other, _) in zip(pairs(one.weights), pairs(four.weights), strict=True):
        assert np.allclose(4 * up, other, rtol=1e-3, atol=1e-9)


@observes("network_dropout")
def test_dropout_thins_gradients_but_not_the_first_prediction(runs: Runs) -> None:
    once = ("--optimizer_type", "SGD", "--max_grad_norm", "0", "--max_train_steps", "1", "--network_train_unet_only")
    whole, thin = runs(*once), runs(*once, "--network_dropout", "0.9")
    assert thin.losses == pytest.approx(whole.losses, rel=1e-6) and not same(whole, thin)
    assert equal(*({key: value for key, value in ran.weights.items() if "lora_down" in key} for ran in (whole, thin)))
    zeros = [np.mean([(up == 0).mean() for _, up, _ in pairs(ran.weights)]) for ran in (whole, thin)]
    assert zeros[1] > zeros[0] + 0.05
    assert (whole.metadata["ss_network_dropout"], thin.metadata["ss_network_dropout"]) == ("None", "0.9")


@observes("network_train_unet_only", "network_train_text_encoder_only")
def test_only_one_part_is_trained(runs: Runs) -> None:
    both = runs()
    assert part(both, "lora_unet") and part(both, "lora_te")
    unet, text = runs("--network_train_unet_only"), runs("--network_train_text_encoder_only")
    assert unet.weights and all(key.startswith("lora_unet") for key in unet.weights)
    assert text.weights and all(key.startswith("lora_te") for key in text.weights)
    assert "lr/textencoder" not in unet.steps[0] and "lr/unet" not in text.steps[0]


@observes("network_weights", "dim_from_weights")
def test_a_run_starts_from_weights_and_takes_their_rank(runs: Runs, trained: Ran) -> None:
    file = str(trained.file)
    only = (*STILL, "--network_train_unet_only", "--network_weights", file)
    same_rank = runs(*only, "--network_dim", "3")
    for key, tensor in trained.weights.items():
        assert np.allclose(same_rank.weights[key], tensor, atol=1e-9), key
    taken = runs(*only, "--dim_from_weights", without=("network_dim",))
    assert {(len(down), alpha) for down, _, alpha in pairs(taken.weights)} == {(3, 2.0)}
    assert taken.losses == same_rank.losses != runs(*STILL, "--network_train_unet_only").losses
    assert runs(*only, "--network_dim", "2", expect=2).steps_were_made is False


@observes("scale_weight_norms")
def test_no_module_grows_above_the_limit(runs: Runs) -> None:
    fast = ("--learning_rate", "0.1", "--network_train_unet_only")
    free, held = runs(*fast), runs(*fast, "--scale_weight_norms", "0.2")
    assert max(norms(free)) > 0.3 and max(norms(held)) <= 0.2 * (1 + 1e-5)
    assert held.logged("max_norm/keys_scaled")[-1] > 0 and "max_norm/keys_scaled" not in free.steps[0]
    assert held.logged("max_norm/max_key_norm")[-1] == pytest.approx(max(norms(held)), rel=1e-4)


@observes("base_weights", "base_weights_multiplier")
def test_a_model_with_merged_weights_predicts_as_with_them_attached(runs: Runs, trained: Ran, tmp_path: Path) -> None:
    still = (*STILL, "--network_train_unet_only")
    file = str(trained.file)
    plain, merged = runs(*still), runs(*still, "--base_weights", file)
    attached = runs(*still, "--network_weights", file, "--network_dim", "3")
    assert merged.losses == pytest.approx(attached.losses, rel=1e-4)
    assert plain.losses != pytest.approx(merged.losses, rel=1e-3)
    tensors = load_file(trained.file)
    halves = {key: tensor / 2 if key.endswith("alpha") else tensor for key, tensor in tensors.items()}
    save_file({key: np.ascontiguousarray(tensor) for key, tensor in halves.items()}, tmp_path / "half.safetensors")
    half = runs(*still, "--base_weights", file, "--base_weights_multiplier", "0.5")
    expected = runs(*still, "--network_weights", str(tmp_path / "half.safetensors"), "--network_dim", "3")
    assert half.losses == pytest.approx(expected.losses, rel=1e-4) != pytest.approx(merged.losses, rel=1e-4)
    assert {len(down) for down, _, _ in pairs(merged.weights)} == {2}
