"""What a run is predicted to need: how it follows from the settings, and what is checked before anything is loaded."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from library.errors import UserError
from library.options.optimizer_names import OPTIMIZERS, TORCH_NAMES
from library.options.parse import parse
from library.training import memory_plan
from library.training.memory_demand import STATE_BYTES, assumed_device
from library.training.memory_plan import (
    MIB,
    Prediction,
    available_memory,
    check_available,
    predict,
    predict_memory,
)
from library.training.prepare import prepare
from tests.pictures import make_pictures
from tests.programs import ROOT, environment

Predict = Callable[..., Prediction]


@pytest.fixture
def predicted(tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Predict:
    """The prediction for a run on four pictures of 64 px, each shown twice, with these flags."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    make_pictures(tmp_path / "pictures", count=4)

    def find(*flags: object, family: str = "sd1") -> Prediction:
        line = [
            *("--pretrained_model_name_or_path", tiny_models(family), "--train_data_dir", tmp_path / "pictures"),
            *("--output_dir", tmp_path / "output", "--network_module", "networks.lora", "--network_dim", 4),
            *("--resolution", 64, "--caption_extension", ".txt", "--seed", 1, *flags),
        ]
        return predict_memory(prepare(parse([str(one) for one in line])))

    return find


def part(prediction: Prediction, name: str) -> int:
    return dict(prediction.parts).get(name, 0)


def test_the_parts_make_the_total_and_the_total_is_the_highest_moment(predicted: Predict) -> None:
    found = predicted("--cache_latents")
    assert found.device == "cpu"
    assert found.total == found.host == sum(size for _, size in found.parts) == max(found.moments.values())
    assert set(found.moments) == {"model", "latents", "steps"}
    assert found.moment in found.moments


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_weights_are_those_of_the_files(family: str, predicted: Predict, tiny_models: Callable[[str], Path]) -> None:
    """Tiny models are written in float32."""
    from safetensors import safe_open

    found = predicted(family=family)
    size = 0
    for file in (tiny_models(family) / "unet").glob("*.safetensors"):
        with safe_open(file, "np") as weights:
            size += sum(one.nbytes for one in map(weights.get_tensor, weights.keys()))
    assert part(found, "U-Net") == size


def test_trained_numbers_are_those_of_the_network(predicted: Predict, tiny_models: Callable[[str], Path]) -> None:
    from networks import lora
    from tests.networks.tiny_families import load_text_encoder, load_unet

    folder = tiny_models("sdxl")
    unet, text = load_unet(folder / "unet"), load_text_encoder(folder)
    for flags, settings in (((), {}), (("--network_args", "conv_dim=2"), {"conv_dim": 2})):
        network = lora.create_network(1.0, 4, 1, None, text, unet, **settings)
        network.apply_to(text, unet, True, True)
        count = sum(one.numel() for one in network.parameters())
        assert predicted(*flags, family="sdxl").demand.parameters == count
        network.remove()


def test_settings_move_the_prediction_as_they_should(predicted: Predict) -> None:
    """On a stretched demand, since a tiny model's own memory drowns in that of the libraries."""
    plain = replace(predicted().demand, bucket=(1024, 1024), batch=2)

    def total(**changes: Any) -> int:
        return predict(replace(plain, **changes)).total

    assert total(batch=4) > total() > total(batch=1)
    assert total(checkpointing="all") < total(checkpointing="attention") < total()
    assert total(checkpointing="all") < total(checkpointing="all", every=2) < total()
    assert total(item=2, vae_item=2) < total()
    assert total(item=2, vae_item=2, fp8_unet=True, fp8_text=True) < total(item=2, vae_item=2)
    assert total(bucket=(768, 768)) < total()
    assert total(trains_text=False) < total()
    assert total(releases_text=True, trains_text=False) < total(trains_text=False)
    assert total(state_bytes=2) < total(state_bytes=8)
    assert total(latents_bytes=50 * MIB) == total() + 50 * MIB
    assert total(whole_weights=10 * MIB) > total()


def test_flags_reach_the_demand(predicted: Predict, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 128 --h 192\na dog --w 64 --h 64\n")
    plain = predicted().demand
    assert (plain.item, plain.vae_item, plain.batch, plain.tokens, plain.rank, plain.conv_rank) == (4, 4, 1, 77, 4, 0)
    assert plain.trains_text and not plain.releases_text and not plain.cached_latents and plain.preview is None
    flags: dict[tuple[object, ...], dict[str, object]] = {
        ("--mixed_precision", "bf16"): {"item": 2, "vae_item": 2},
        ("--mixed_precision", "bf16", "--no_half_vae"): {"item": 2, "vae_item": 4},
        ("--train_batch_size", 3): {"batch": 3},
        ("--train_batch_size", 300): {"batch": 8},
        ("--max_token_length", 225): {"tokens": 227},
        ("--gradient_checkpointing", "--gradient_checkpointing_every", 2): {"checkpointing": "all", "every": 2},
        ("--gradient_checkpointing", "--gradient_checkpointing_attention_only"): {"checkpointing": "attention"},
        ("--network_train_unet_only", "--cache_text_encoder_outputs"): {"trains_text": False, "releases_text": True},
        ("--network_train_text_encoder_only",): {"rank": 0, "trains_text": True},
        ("--network_args", "conv_dim=2"): {"conv_rank": 2, "outputs": False},
        ("--network_args", "dora=true"): {"conv_rank": 0, "outputs": True},
        ("--optimizer_type", "Lion"): {"state_bytes": 4},
        ("--cache_latents",): {"cached_latents": True, "latents_bytes": 4 * 8 * 8 * 4 * 4},
        ("--cache_latents", "--flip_aug"): {"latents_bytes": 2 * 4 * 8 * 8 * 4 * 4},
        ("--cache_latents", "--latent_sampling", "sample"): {"latents_bytes": 2 * 4 * 8 * 8 * 4 * 4},
        ("--cache_latents_to_disk",): {"cached_latents": True, "latents_bytes": 0},
        ("--sample_prompts", prompts, "--sample_every_n_steps", 1): {"preview": (128, 192)},
        ("--network_train_unet_only", "--network_module", "lycoris.kohya"): {"rank": 4},
        ("--mixed_precision", "bf16", "--full_bf16"): {"halves": True},
        ("--mixed_precision", "bf16", "--fp8_base"): {"fp8_unet": True, "fp8_text": True},
        ("--mixed_precision", "bf16", "--fp8_base_unet"): {"fp8_unet": True, "fp8_text": False},
    }
    for given, expected in flags.items():
        demand = predicted(*given).demand
        assert {name: getattr(demand, name) for name in expected} == expected, given


def test_captions_that_vary_keep_the_text_encoders(predicted: Predict) -> None:
    frozen = ("--network_train_unet_only", "--cache_text_encoder_outputs")
    assert predicted(*frozen).demand.releases_text
    assert not predicted(*frozen, "--caption_prefix", "x", "--caption_tag_dropout_rate", 0.5).demand.releases_text


def test_what_a_dry_run_says(predicted: Predict) -> None:
    found = predicted("--train_batch_size", 2)
    first, shares, others, *rest = found.lines()
    assert memory_plan.gib(found.total) in first and "largest batch 2 of 64x64" in first
    assert "libraries" in shares and "model" in others and not rest
    on_gpu = predict(replace(found.demand, device="cuda", processes=2)).lines()
    assert "GPU" in on_gpu[0] and "main memory" in on_gpu[3] and "2 processes" in on_gpu[4]


def test_another_projects_network_counts_with_whole_weights(predicted: Predict) -> None:
    ours, theirs = predicted(), predicted("--network_module", "lycoris.kohya")
    assert theirs.demand.whole_weights > 0 == ours.demand.whole_weights


def test_no_more_than_there_is(predicted: Predict) -> None:
    found = predicted()
    check_available(found, available=found.total)
    with pytest.raises(UserError) as caught:
        check_available(found, "run.toml:3 ignore_memory_check", available=found.total - 1)
    told = str(caught.value)
    assert memory_plan.gib(found.total) in told and "run.toml:3 ignore_memory_check" in told
    both = predict(replace(found.demand, processes=2))
    with pytest.raises(UserError):
        check_available(both, available=found.total * 2 - 1)
    check_available(both, available=found.total * 2)


def test_the_check_knows_this_machine(predicted: Predict) -> None:
    there = available_memory()
    assert there is not None and there > 0
    too_much = replace(predicted().demand, latents_bytes=2 * there)
    with pytest.raises(UserError, match="--cache_latents_to_disk"):
        check_available(predict(too_much))


def test_available_memory_is_the_least_of_what_is_told(tmp_path: Path) -> None:
    proc, group = tmp_path / "proc", tmp_path / "cgroup"
    proc.mkdir()
    group.mkdir()
    assert available_memory(proc, group) is None
    (proc / "meminfo").write_text("MemTotal: 4000000 kB\nMemAvailable:    1000 kB\n")
    assert available_memory(proc, group) == 1000 * 1024
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000\n")
    assert available_memory(proc, group) == 1000 * 1024
    (group / "memory.max").write_text("500000\n")
    (group / "memory.current").write_text("300000\n")
    assert available_memory(proc, group) == 200000
    (group / "memory.stat").write_text("anon 200000\ninactive_file 50000\n")
    assert available_memory(proc, group) == 250000
    (group / "memory.stat").write_text("inactive_file 50000\nactive_file 60000\nslab 9000\nslab_reclaimable 7000\n")
    assert available_memory(proc, group) == 317000
    older = tmp_path / "older"
    (older / "memory").mkdir(parents=True)
    (older / "memory/memory.limit_in_bytes").write_text("400000")
    (older / "memory/memory.usage_in_bytes").write_text("390000")
    assert available_memory(proc, older) == 10000
    own, all_together = "inactive_file 1\nactive_file 2\n", "total_inactive_file 3000\ntotal_active_file 4000\n"
    (older / "memory/memory.stat").write_text(own + all_together)
    assert available_memory(proc, older) == 17000


def test_the_device_is_seen_without_torch(tmp_path: Path) -> None:
    gpus = tmp_path / "gpus"
    assert assumed_device({}, gpus) == "cpu"
    (gpus / "0000:01:00.0").mkdir(parents=True)
    assert assumed_device({}, gpus) == "cuda"
    assert assumed_device({"CUDA_VISIBLE_DEVICES": ""}, gpus) == "cpu"
    assert assumed_device({"CUDA_VISIBLE_DEVICES": "1"}, gpus) == "cuda"
    assert assumed_device({"ACCELERATE_USE_CPU": "true"}, gpus) == "cpu"


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, library.training.memory_plan as m; print([n for n in ('torch', 'diffusers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_optimizer_has_its_state() -> None:
    assert set(STATE_BYTES) == {info.name for info in OPTIMIZERS} | set(TORCH_NAMES)


@pytest.mark.parametrize("name", sorted(STATE_BYTES))
def test_state_is_as_large_as_the_optimizer_makes_it(name: str) -> None:
    import torch

    from library.options.optimizer_names import optimizer_info
    from library.training.optimizers import build_optimizer

    info = optimizer_info(name)
    assert info is not None
    pytest.importorskip(info.module.partition(".")[0])
    weights = [torch.nn.Parameter(torch.full((128, 256), 0.1)) for _ in range(2)]
    built = build_optimizer(name, [{"params": weights, "lr": 1e-3}], {}, device=torch.device("cpu"))
    for weight in weights:
        weight.grad = torch.full_like(weight, 0.01)
    if info.schedule_free:
        built.optimizer.train()
    built.optimizer.step()
    tensors = [value for state in built.optimizer.state.values() for value in state.values()]
    size = sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))
    assert size / (2 * 128 * 256) == pytest.approx(STATE_BYTES[name], abs=0.6)
