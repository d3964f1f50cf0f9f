"""What holds for every script in tools/: its help comes at once, without the libraries that take seconds to load."""

import subprocess
import sys

import pytest

from library.weights.loras.lora import LAYOUTS
from tests.programs import ROOT, environment

TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))
HEAVY = ("torch", "diffusers", "transformers", "onnxruntime")
pytestmark = pytest.mark.xdist_group("every_tool")


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """The help of every tool, made in a process of its own; it ends with the heavy modules that were loaded."""
    running, found = {}, {}
    for name in TOOLS:
        run = f"runpy.run_path({str(ROOT / 'tools' / f'{name}.py')!r}, run_name='__main__')"
        code = f"import runpy, sys\nsys.argv = ['tool', '--help']\ntry:\n    {run}\n"
        code += f"except SystemExit as end:\n    print(end.code, *(set({HEAVY}) & sys.modules.keys()))"
        command = [sys.executable, "-c", code]
        running[name] = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    for name, process in running.items():
        found[name] = process.communicate(timeout=120)[0]
    return found


@pytest.mark.parametrize("name", TOOLS)
def test_help_needs_nothing_heavy(name: str, helps: dict[str, str]) -> None:
    text, _, last = helps[name].strip().rpartition("\n")
    assert text.startswith("usage:")
    assert last == "0"


@pytest.mark.parametrize("name", ["merge_lora", "convert_lora"])
def test_layouts_to_choose_from_are_those_that_can_be_written(name: str, helps: dict[str, str]) -> None:
    assert "{" + ",".join(LAYOUTS) + "}" in helps[name].replace("\n", "").replace(" ", "")
