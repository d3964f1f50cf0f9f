"""What the target tables count and how they number; the names themselves are in test_lora_golden."""

import subprocess
import sys
from pathlib import Path

from library.models.lora_targets import LoraTarget, parameter_count, targets

UNET = {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}


def sd1_targets(conv: bool) -> tuple[LoraTarget, ...]:
    """Targets of a full-size SD1 model."""
    return targets(UNET | {"cross_attention_dim": 768}, [TEXT], conv=conv)


def test_counts_are_those_of_sd1() -> None:
    found = sd1_targets(conv=True)
    assert sum(t.part == "unet" and not t.conv_only for t in found) == 192
    assert sum(t.conv_only for t in found) == 86
    assert sum(t.part == "text_encoder" for t in found) == 72


def test_parameter_count_needs_a_conv_rank_for_conv_modules() -> None:
    everything, plain = sd1_targets(conv=True), sd1_targets(conv=False)
    assert parameter_count(everything, 8) == parameter_count(plain, 8) == 4_718_592
    assert parameter_count(everything, 8, 4) > parameter_count(plain, 8)


def test_two_text_encoders_are_numbered() -> None:
    text = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    found = targets(None, [text, text], conv=False)
    assert {t.name.split("_")[1] for t in found} == {"te1", "te2"}
    assert {t.encoder for t in found} == {0, 1}


def test_a_family_may_spell_the_unet_otherwise() -> None:
    found = targets(UNET, [], conv=False, unet_key=lambda path: "x_" + path.split(".")[-1])
    assert found[0].name == "lora_unet_x_proj_in"


def test_targets_need_no_torch(repo_root: Path) -> None:
    code = "import sys, library.models.lora_targets, networks.lora_args; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repo_root, check=False).returncode == 0
