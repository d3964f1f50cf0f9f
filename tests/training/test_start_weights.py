"""`--network_weights` that don't fit are refused from their header, before torch is imported."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from library.models.inspect import inspect
from library.options import Options
from library.options.network import Network
from library.training.start_weights import check_base_weights
from tests.pictures import make_pictures
from tests.programs import ROOT, environment

KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
UNET = ("--network_dim", "2", "--network_train_unet_only")


def lora(path: Path, names: dict[str, tuple[int, ...]]) -> Path:
    save_file({name: np.zeros(shape, np.float32) for name, shape in names.items()}, path)
    return path


def factors(name: str, rank: int, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.lora_down.weight": (rank, inputs), f"{name}.lora_up.weight": (outputs, rank), f"{name}.alpha": ()}


def refusal(model: Path, weights: Path, place: Path, *more: str) -> str:
    """What a dry run says of these weights; torch must not be imported for it."""
    if not (place / "pictures").is_dir():
        make_pictures(place / "pictures", count=1)
    line = [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(place / "pictures"), "--dry_run"),
        *("--output_dir", str(place / "output"), "--network_module", "networks.lora", "--resolution", "64"),
        *("--caption_extension", ".txt", "--network_weights", str(weights), *more),
    ]
    code = f"import sys; from train_network import main; code = main({line!r}); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", f"{code}; sys.exit(code)"]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return ""
    assert result.returncode == 2, result.stderr
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert str(weights) in said and "--network_weights" in said
    return said


CASES: dict[str, tuple[dict[str, tuple[int, ...]], tuple[str, ...], str]] = {
    "fits": (factors(KEY, 2, 32, 32), UNET, ""),
    "rank": (factors(KEY, 4, 32, 32), UNET, "has rank 4, the network 2"),
    "rank of the file": (factors(KEY, 4, 32, 32), ("--dim_from_weights", "--network_train_unet_only"), ""),
    "size": (factors(KEY, 2, 48, 32), UNET, "use a LoRA of the same model family"),
    "family": (factors(KEY, 2, 2048, 32), UNET, "use a LoRA of the same model family"),
    "no module": (factors("lora_unet_nowhere", 2, 8, 8), UNET, "1 of its 1 modules are not in this base model"),
    "lokr": ({f"{KEY}.lokr_w1": (2, 2), f"{KEY}.lokr_w2": (2, 2), f"{KEY}.alpha": ()}, UNET, "a LyCORIS file (LoKr)"),
    "base model": ({"model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3)}, UNET, "is a base model"),
    "empty": ({}, UNET, "holds no LoRA"),
    "rank of what is not trained": (
        {**factors(KEY, 2, 32, 32), **factors("lora_te_text_model_encoder_layers_0_mlp_fc1", 4, 32, 64)},
        UNET,
        "",
    ),
    "only what is not trained": (
        factors("lora_te_text_model_encoder_layers_0_mlp_fc1", 2, 32, 64),
        UNET,
        "none of its 1 modules is in this network",
    ),
    "only convolutions": (
        dict(
            zip(
                (f"lora_unet_down_blocks_0_resnets_0_conv1.lora_{way}.weight" for way in ("down", "up")),
                ((2, 32, 3, 3), (32, 2, 1, 1)),
                strict=True,
            )
        ),
        UNET,
        "see --network_args for convolutions",
    ),
    "embedding": ({"emb_params": (2, 32)}, UNET, "is an embedding, not a network; give it as --weights"),
    "embedding of SDXL": ({"clip_l": (2, 32), "clip_g": (2, 64)}, UNET, "is an embedding, not a network"),
    "embedding of diffusers": ({"<cat>": (32,)}, UNET, "is an embedding, not a network"),
    "bundle without a network": ({"bundle_emb.cat.emb_params": (2, 32)}, UNET, "is an embedding, not a network"),
    "bundle": (
        {"bundle_emb.cat.emb_params": (2, 32), **factors(KEY, 2, 32, 32)},
        UNET,
        "has embeddings bundled with the LoRA",
    ),
    "neither": ({"some.weight": (2, 32)}, UNET, "some.weight is not a key of a LoRA"),
    "embedding for another module": (
        {"emb_params": (2, 32)},
        ("--network_module", "networks.oft", "--network_dim", "2"),
        "is an embedding, not",
    ),
    "half": ({f"{KEY}.lora_down.weight": (2, 32)}, UNET, "lacks lora_down or lora_up"),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_judged_by_their_header(case: str, tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    names, more, said = CASES[case]
    found = refusal(tiny_models("sd1"), lora(tmp_path / "some.safetensors", names), tmp_path, *more)
    assert said in found and bool(found) == bool(said)


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_an_embedding_is_no_network_to_merge_either(
    ending: str, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file as save_tensors

    path, vectors = tmp_path / f"cat{ending}", torch.ones(2, 32)
    if ending == ".pt":
        torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "cat"}, path)
    else:
        save_tensors({"emb_params": vectors}, path)
    (problem,) = check_base_weights(parse_base(path), inspect(str(tiny_models("sd1"))))
    assert (problem.where, problem.wrong) == (f"--base_weights {path}", "is an embedding, not a network")
    assert "--weights" in problem.advice and "--token_string" in problem.advice


def parse_base(path: Path) -> Options:
    """Options with this one of `--base_weights`."""
    network = Network(network_module="networks.lora", base_weights=(str(path),))
    return Options(network=network)


def test_what_passes_the_header_loads(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    """The same file in the diffusers spelling is taken for SDXL as well, by the check and by the run."""
    from train_network import main

    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    weights = lora(tmp_path / "some.safetensors", factors(name, 2, 96, 64))
    assert refusal(tiny_models("sdxl"), weights, tmp_path, *UNET) == ""
    line = [
        *("--pretrained_model_name_or_path", str(tiny_models("sdxl")), "--train_data_dir", str(tmp_path / "pictures")),
        *("--output_dir", str(tmp_path / "output"), "--network_module", "networks.lora", "--resolution", "64"),
        *("--caption_extension", ".txt", "--network_weights", str(weights), "--max_train_steps", "1", *UNET),
    ]
    assert main(line) == 0
