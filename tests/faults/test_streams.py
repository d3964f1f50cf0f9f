"""Streams that nobody reads any more cost no work: a run that is told to stop still saves."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pictures import make_pictures
from tests.programs import SCRIPT, environment


@pytest.mark.parametrize("after", ["2>&-", "2>&1 | head -c 10", ">&- 2>&-"])
def test_a_stop_saves_although_nobody_listens(after: str, tiny_sd1: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", count=2)
    words = [
        *(
            sys.executable,
            SCRIPT,
            "--pretrained_model_name_or_path",
            tiny_sd1,
            "--train_data_dir",
            tmp_path / "pictures",
        ),
        *("--output_dir", tmp_path / "output", "--output_name", "x", "--network_module", "tests.signalling_lora"),
        *("--resolution", 64, "--caption_extension", ".txt", "--max_train_steps", 6, "--seed", 1),
    ]
    line = f"set -o pipefail; {shlex.join(map(str, words))} {after}"
    variables = environment(LORASMITH_TEST_SIGNAL="self:TERM@3")
    done = subprocess.run(["bash", "-c", line], env=variables, capture_output=True, timeout=200, check=False)
    assert done.returncode == 143, done
    assert (tmp_path / "output/x-step00000003.safetensors").is_file()
    assert (tmp_path / "output/x-step00000003-state/manifest.json").is_file()
