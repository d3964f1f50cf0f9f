"""`--network_args` of every module that we know: misspelt names and wrong values are told without torch."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from library.options.modules import LYCORIS_ARGS, MODULE_ARGS, check_network_args, own_modules


def said(module: str, *items: str) -> list[str]:
    return [str(problem) for problem in check_network_args(module, items, "--network_args")]


def test_every_module_of_ours_has_a_table() -> None:
    assert set(own_modules()) == set(MODULE_ARGS)


@pytest.mark.parametrize(
    ("module", "item", "expected"),
    [
        ("networks.lora", "up_lr_wieght=sine", "did you mean up_lr_weight?"),
        ("networks.lora", "up_lr_weight=sinus", "did you mean sine?"),
        ("networks.lora", "down_lr_weight=1,2,x", "'x' is not a number from 0 on"),
        ("networks.lora", "mid_lr_weight=cosine", "'cosine' is not a number"),
        ("networks.lora", "block_dims=4,,4", "'' is not a whole number"),
        ("networks.lora", "conv_block_alphas=1,1", "has no effect without conv_block_dims"),
        ("networks.lora", "block_lr_zero_threshold=0.1", "has no effect without weights"),
        ("networks.lora", "dora=maybe", "neither true nor false"),
        ("networks.lora", "unit=4", "networks.lora has no setting unit"),
        ("networks.lora", "algo=loha", "it belongs to --network_module lycoris.kohya"),
        ("networks.lora_fa", "dora=true", "networks.lora has it"),
        ("networks.lora_fa", "block_dims=a", "'a' is not a whole number"),
        ("networks.dylora", "unit=0", "must be at least 1"),
        ("networks.oft", "enable_con=1", "did you mean enable_conv?"),
        ("lycoris.kohya", "fator=4", "LyCORIS has no setting fator; did you mean factor?"),
    ],
)
def test_each_mistake_has_its_message(module: str, item: str, expected: str) -> None:
    (problem,) = said(module, item)
    assert expected in problem


def test_what_is_right_passes() -> None:
    lists = ["block_dims=4,8", "conv_block_dims=1,2", "block_alphas=1,.5", "down_lr_weight=sine+.25", "up_lr_weight=,1"]
    assert said("networks.lora", *lists, "block_lr_zero_threshold=.1", "dora=True", "loraplus_lr_ratio=16") == []
    assert said("somebody.elses", "any=thing") == []


def test_names_of_lycoris_are_those_that_it_reads() -> None:
    """`constrain` is one that it has renamed; two are for models that we don't train."""
    spec = importlib.util.find_spec("lycoris")
    assert spec is not None and spec.submodule_search_locations is not None
    source = (Path(spec.submodule_search_locations[0]) / "kohya.py").read_text(encoding="utf-8")
    made = source.partition("def create_network_from_weights")[0]
    read = set(re.findall(r'kwargs\.get\(\s*"(\w+)"', made)) - {"train_t5xxl", "train_llm_adapter"}
    assert read | {"constrain"} == set(LYCORIS_ARGS)


def test_torch_is_not_imported(repo_root: Path) -> None:
    code = "import sys; from library.options.modules import check_network_args as check; "
    code += "print(*check('networks.lora', ['block_dims=x'], '--network_args')); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True)
    assert "block_dims=x" in done.stdout
