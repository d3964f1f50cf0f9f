"""What a file holds is what an optimizer would show; what a state holds is what it trains."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.training.test_readings import train


@pytest.mark.parametrize(("optimizer", "alike"), [("AdamW", True), ("AdamWScheduleFree", False)])
def test_a_file_has_the_weights_to_look_at_and_a_state_those_that_train(
    tiny_sd1: Path, tmp_path: Path, optimizer: str, alike: bool
) -> None:
    flags = ("--network_module", "networks.lora", "--optimizer_type", optimizer, "--save_state", "--output_name", "x")
    assert train(tiny_sd1, tmp_path, *flags) == 0
    shown = load_file(tmp_path / "output/x.safetensors")
    trained = load_file(tmp_path / "output/x-state/trained.safetensors")
    factors = [name for name in shown if not name.endswith("alpha")]
    assert factors and all(np.array_equal(shown[name], trained[name]) for name in factors) == alike
