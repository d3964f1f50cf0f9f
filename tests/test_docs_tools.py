"""Every command on the page about tools runs as it is shown, one after the other, and every tool is shown."""

import itertools
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.captioning_models import LABELS, write_blip, write_tagger
from tests.lora_files import kohya_metadata, write_kohya
from tests.original_layout import folder_as_single_file
from tests.pictures import make_pictures
from tests.programs import ROOT, tool
from tests.tiny_models import save_tiny_sd1

PAGE = ROOT / "docs" / "tools.md"
FOR_DEVELOPERS = {"write_docs", "readme_command"}
OUTPUTS = ("--save_to", "--output")


def commands() -> list[list[str]]:
    """The words of every command of a tool, its name first."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [[Path(words[1]).stem, *words[2:]] for words in lines]


def test_every_tool_is_shown_and_each_command_is_one() -> None:
    there = {path.stem for path in (ROOT / "tools").glob("*.py")} - FOR_DEVELOPERS
    assert {words[0] for words in commands()} == there


def test_the_readme_leads_to_the_page() -> None:
    assert "docs/tools.md" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page speaks of, tiny: base models, LoRAs, a word, pictures, a tagger, a captioner."""
    model = tiny_models("sd1")
    (tmp_path / "sd15.safetensors").write_bytes(tiny_models("sd1_file").read_bytes())
    save_tiny_sd1(tmp_path / "tuned", seed=1)
    folder_as_single_file(tmp_path / "tuned", tmp_path / "tuned.safetensors")
    write_kohya(tmp_path / "style.safetensors", model, rank=8, seed=1)
    write_kohya(tmp_path / "mycat.safetensors", model, rank=4, seed=2)
    metadata = kohya_metadata(model, 4) | {"ss_network_module": "networks.dylora", "ss_network_args": '{"unit": "2"}'}
    write_kohya(tmp_path / "dylora.safetensors", model, rank=4, metadata=metadata)
    save_file({"emb_params": torch.randn(2, 768)}, tmp_path / "word.safetensors")
    made = make_pictures(tmp_path / "made", count=2, name="mycat", sizes=((64, 64),))
    (made / "2_mycat").rename(tmp_path / "pictures")
    for path in (tmp_path / "pictures").glob("*.txt"):
        path.unlink()
    write_tagger(tmp_path / "wd-tagger", np.ones((3, len(LABELS))) / 765, np.zeros(len(LABELS)))
    write_blip(tmp_path / "blip")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_runs(folder: Path) -> None:
    for name, *words in commands():
        shown = shlex.join([name, *words])
        assert tool(name)(words) == 0, shown
        for flag, value in itertools.pairwise(words):
            if flag in OUTPUTS and name != "extract_lora_from_dylora":
                assert (folder / value).exists(), shown
    assert (folder / "mycat.toml").is_file() and list((folder / "pictures").glob("*.npz"))
