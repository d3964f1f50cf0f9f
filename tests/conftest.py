"""What every test shares: one thread a process, no network, and tiny real models that are built once a session."""

import os
import sys
from pathlib import Path

os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of the SD1 architecture with random weights: 3.2 M U-Net, 64 px pictures."""
    from tests.tiny_models import save_tiny_sd1

    folder = tmp_path_factory.mktemp("models") / "tiny_sd1"
    save_tiny_sd1(folder)
    return folder
