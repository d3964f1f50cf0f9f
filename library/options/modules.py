"""Whether a network module exists, found without importing it or its packages, and the settings of our own one."""

import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from library.errors import Problem, nearest
from library.options import values
from library.options.flags import Flag

ROOT = Path(__file__).resolve().parents[2]
_LATER = "not supported yet; leave it out"
LORA_ARGS: Mapping[str, Flag] = {
    flag.name: flag
    for flag in (
        Flag("conv_dim", "int", limits=(("ge", 0),), synonyms={"None": None}),
        Flag("conv_alpha", "float", limits=(("ge", 0),), synonyms={"None": None}),
        Flag("dropout", "float", limits=(("ge", 0), ("lt", 1))),
        Flag("rank_dropout", "float", limits=(("ge", 0), ("lt", 1))),
        Flag("module_dropout", "float", limits=(("ge", 0), ("lt", 1))),
    )
}
LYCORIS_ALGOS = ("locon", "lora", "loha", "lokr", "ia3", "dylora", "diag-oft", "boft", "glora", "full")
LYCORIS_PRESETS = (
    *("full", "full-lin", "attn-mlp", "attn-only", "unet-only", "unet-transformer-only", "unet-convblock-only", "ia3"),
)
LORA_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        [
            "block_dims",
            "block_alphas",
            "conv_block_dims",
            "conv_block_alphas",
            "down_lr_weight",
            "mid_lr_weight",
            "up_lr_weight",
            "block_lr_zero_threshold",
            "loraplus_lr_ratio",
            "loraplus_unet_lr_ratio",
            "loraplus_text_encoder_lr_ratio",
        ],
        _LATER,
    ),
    "algo": "it belongs to --network_module lycoris.kohya",
    "preset": "it belongs to --network_module lycoris.kohya",
}


def find_module(name: str) -> str | None:
    """None if the dotted `name` can be imported, else what is missing. No code of a package is run.

    The repository's own folder is searched last, so that `networks.lora` is found from anywhere.
    """
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        return f"{name!r} is no dotted name of a module"
    search: Sequence[str] | None = [*sys.path, str(ROOT)]
    for position, part in enumerate(parts):
        spec = importlib.machinery.PathFinder.find_spec(part, search)
        if spec is None and position == 0:
            spec = _elsewhere(part)
        if spec is None:
            return f"there is no module {'.'.join(parts[: position + 1])}"
        locations = spec.submodule_search_locations
        if locations is None and position < len(parts) - 1:
            return f"{'.'.join(parts[: position + 1])} is no package"
        search = None if locations is None else list(locations)
    return None


def _elsewhere(name: str) -> importlib.machinery.ModuleSpec | None:
    """A top-level module that only an installed finder knows, as editable installs have them."""
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def own_modules() -> list[str]:
    """The network modules of this repository: files in `networks` that define `create_network`."""
    return sorted(f"networks.{path.stem}" for path in (ROOT / "networks").glob("*.py") if _builds(path))


def _builds(path: Path) -> bool:
    return re.search(r"^def create_network\(", path.read_text(encoding="utf-8"), re.MULTILINE) is not None


def check_module(name: str, where: str) -> Iterator[Problem]:
    """A problem if the network module `name` can't be found."""
    missing = find_module(name)
    helper = ROOT / "networks" / f"{name.removeprefix('networks.')}.py"
    if missing is None and name.startswith("networks.") and helper.is_file() and not _builds(helper):
        missing = f"{name} builds no network"
    if missing is None:
        return
    if name.split(".")[0] == "lycoris":
        advice = "LyCORIS isn't installed: pip install 'lorasmith[lycoris]'"
    else:
        advice = nearest(name, own_modules()) or f"known are {', '.join(own_modules())}"
    yield Problem(where, missing, advice)


def pairs(items: Sequence[str], where: str) -> tuple[dict[str, str], list[Problem]]:
    """`key=value` items as a dictionary, and a problem for each that is none or repeats a key."""
    found: dict[str, str] = {}
    problems = []
    for item in items:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key or not value:
            problems.append(Problem(where, f"{item!r} is no key=value", "write it without spaces around ="))
        elif key in found:
            problems.append(Problem(where, f"{key} is given twice"))
        else:
            found[key] = value
    return found, problems


def check_network_args(module: str | None, items: Sequence[str], where: str) -> list[Problem]:
    """Problems of --network_args; what the keys mean is known for `networks.lora` only (0 or None: no conv layers), and
    of LyCORIS' settings its algorithm and preset."""
    found, problems = pairs(items, where)
    if module == "lycoris.kohya" and found.get("algo", "lora").lower() not in LYCORIS_ALGOS:
        hint = nearest(found["algo"].lower(), LYCORIS_ALGOS) or f"known are {', '.join(LYCORIS_ALGOS)}"
        problems.append(Problem(where, f"LyCORIS has no algo {found['algo']}", hint))
    preset = found.get("preset", "full")
    if module == "lycoris.kohya" and preset not in LYCORIS_PRESETS and not Path(preset).is_file():
        hint = nearest(preset, LYCORIS_PRESETS) or f"known are {', '.join(LYCORIS_PRESETS)}, or a TOML file"
        problems.append(Problem(where, f"LyCORIS has no preset {preset}", hint))
    if module != "networks.lora":
        return problems
    for key, value in found.items():
        if key in LORA_REFUSED:
            problems.append(Problem(where, f"{key} is no setting that networks.lora has", LORA_REFUSED[key]))
        elif key not in LORA_ARGS:
            hint = nearest(key, [*LORA_ARGS, *LORA_REFUSED]) or f"known are {', '.join(LORA_ARGS)}"
            problems.append(Problem(where, f"networks.lora has no setting {key}", hint))
        else:
            try:
                values.read(LORA_ARGS[key], value)
            except ValueError as error:
                problems.append(Problem(where, f"{key}={value}: {error}"))
    if "conv_alpha" in found and "conv_dim" not in found:
        problems.append(Problem(where, "conv_alpha has no effect without conv_dim", "add conv_dim"))
    return problems
