"""The target tables against key lists and sizes written down from files in the field."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from library.models.lora_targets import LoraTarget, parameter_count, targets

UNET = {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2}
FAMILIES = {
    "sd1": (UNET | {"cross_attention_dim": 768}, (768, 3072, 12)),
    "sd2_folder": (UNET | {"cross_attention_dim": 1024, "use_linear_projection": True}, (1024, 4096, 23)),
}


def family_targets(family: str, conv: bool) -> tuple[LoraTarget, ...]:
    """Targets of a full-size model."""
    unet, (width, inner, layers) = FAMILIES[family]
    text = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    return targets(unet, [text], conv=conv)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_sizes_are_the_golden_list(family: str, repo_root: Path) -> None:
    with (repo_root / "tests/data/lora_modules.tsv").open() as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["family"] == family]
    golden = {
        (row["module"], int(row["in"]), int(row["out"]), row["kernel"].replace("-", "linear"), row["needs"] == "C3Lier")
        for row in rows
    }
    found = family_targets(family, conv=True)
    assert len(found) == len(rows)
    assert {(t.name, t.in_features, t.out_features, t.kernel, t.conv_only) for t in found} == golden
    assert family_targets(family, conv=False) == tuple(t for t in found if not t.conv_only)


def test_counts_are_those_of_sd1() -> None:
    found = family_targets("sd1", conv=True)
    assert sum(t.part == "unet" and not t.conv_only for t in found) == 192
    assert sum(t.conv_only for t in found) == 86
    assert sum(t.part == "text_encoder" for t in found) == 72


def test_parameter_count_needs_a_conv_rank_for_conv_modules() -> None:
    everything, plain = family_targets("sd1", conv=True), family_targets("sd1", conv=False)
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
