"""The house keeps its shape: import directions, no torch where only planning happens, no long files."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import ROOT, environment

LEAVES = {
    f"library.{name}"
    for name in (
        *("errors", "rng", "console", "tokenizer", "conditioning", "known_files", "global_draws", "to_device"),
        "embedding_layouts",
    )
}
BELOW = {
    "options": set(),
    "data": {"options"},
    "models": {"options"},
    "weights": {"options", "models"},
    "training": {"options", "data", "models", "weights", "networks"},
    "networks": {"options", "data", "models", "weights"},
}
PLANNING = [
    "library.errors",
    "library.rng",
    "library.console",
    "library.tokenizer",
    "library.tokenizer.vocabulary",
    "library.options",
    "library.data.sources.scan",
    "library.data.captions",
    "library.data.buckets",
    "library.data.plan",
    "library.data.report",
    "library.data.caption_plan",
    "library.data.sizes",
    "library.data.caches.text_files",
    "library.data.caches.latent_files",
    "library.data.caches.slots",
    "library.data.caches.upkeep",
    "library.data.augment",
    "library.data.faces",
    "library.data.token_counts",
    "library.data.token_use",
    "library.data.custom",
    "library.data.sheet",
    "library.models.inspect",
    "library.embedding_layouts",
    "library.models.embedding_files",
    "library.models.lora_targets",
    "networks.planned",
    "networks.blocks",
    "library.weights.loras.header",
    "library.weights.model_hash",
    "library.training.prepare",
    "library.training.learning_rates",
    "library.training.run_settings",
    "library.training.same_run",
    "library.training.state",
    "library.training.uploads",
    "library.training.requests",
    "library.training.prepare_data",
    "library.training.dry_run",
    "library.training.expected",
    "library.training.text_use",
    "library.training.weight_files",
    "library.training.embedding_rows",
    "library.training.embedding_words",
    "library.training.network_words",
    "library.models.memory_tables",
    "library.training.memory_demand",
    "library.training.memory_plan",
    "library.training.out_of_memory",
    "library.training.phases",
    "library.training.schedules",
    "library.training.watch",
    "library.training.tracking",
    "library.training.json_log",
    "library.options.module_checks",
    "library.options.precision_checks",
    "networks.oft_targets",
    "library.training.embedding_plan",
    "library.training.token_checks",
    "train_network",
    "train_textual_inversion",
]


def modules() -> list[Path]:
    folders = ("library", "networks", "tools")
    return [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "library":
            found |= {f"library.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in found if name.split(".")[0] in ("library", "networks", "tools")}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "library" and len(parts) > 1 else parts[0]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    here = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for module in imported(path):
        leaf = module == "library" or any(f"{module}.".startswith(f"{name}.") for name in LEAVES)
        if here in BELOW:
            assert leaf or room(module) in {here, *BELOW[here]}, f"{path} imports {module}"
        elif f"library.{here}" in LEAVES:
            assert leaf, f"{path} imports {module}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_long(path: Path) -> None:
    limit = 120 if path.parent == ROOT else 500
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


def test_planning_imports_nothing_heavy() -> None:
    heavy = ("torch", "diffusers", "transformers", "accelerate", "cv2")
    imports = "; ".join(f"import {name}" for name in PLANNING)
    code = f"import sys; {imports}; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "[]"
