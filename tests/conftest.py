"""What every test shares: one thread a process, no network, and tiny real models that are built once a session."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What programs remember in the user's cache folder stays out of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Diffusers folders of tiny models with random weights by name, made once: `sd1`, `sd2` (velocity), `sdxl`.

    With `_file` behind the name: the same model as one `.safetensors` file in the original layout.
    """
    from tests.original_layout import folder_as_single_file
    from tests.tiny_models import save_tiny_sd1, save_tiny_sd2, save_tiny_sdxl

    place = tmp_path_factory.mktemp("models")
    savers: dict[str, Callable[[Path], None]] = {"sd1": save_tiny_sd1, "sd2": save_tiny_sd2, "sdxl": save_tiny_sdxl}

    def find(name: str) -> Path:
        family, _, file = name.partition("_")
        folder = place / f"tiny_{family}"
        if not folder.is_dir():
            savers[family](folder)
        if not file:
            return folder
        single = place / f"tiny_{family}.safetensors"
        if not single.is_file():
            folder_as_single_file(folder, single)
        return single

    return find


@pytest.fixture(scope="session")
def tiny_sd1(tiny_models: Callable[[str], Path]) -> Path:
    """A diffusers folder of the SD1 architecture with random weights: 3.2 M U-Net, 64 px pictures."""
    return tiny_models("sd1")


@pytest.fixture(scope="session")
def tiny_sd2(tiny_models: Callable[[str], Path]) -> Path:
    """A diffusers folder of the SD2 architecture, which predicts velocity."""
    return tiny_models("sd2")


@pytest.fixture(scope="session")
def tiny_sdxl(tiny_models: Callable[[str], Path]) -> Path:
    """A diffusers folder of the SDXL architecture, whose text encoders have different widths."""
    return tiny_models("sdxl")


@pytest.fixture(scope="session")
def tiny_sd1_file(tiny_models: Callable[[str], Path]) -> Path:
    """The tiny SD1 model as one file in the original layout."""
    return tiny_models("sd1_file")


@pytest.fixture(scope="session")
def tiny_sd2_file(tiny_models: Callable[[str], Path]) -> Path:
    """The tiny SD2 model as one file in the original layout."""
    return tiny_models("sd2_file")


@pytest.fixture(scope="session")
def tiny_sdxl_file(tiny_models: Callable[[str], Path]) -> Path:
    """The tiny SDXL model as one file in the original layout."""
    return tiny_models("sdxl_file")
