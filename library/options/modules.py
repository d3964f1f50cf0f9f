"""Whether a network module exists, found without importing it or its packages, and the settings of our own one."""

import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.errors import Problem, nearest
from library.options import values
from library.options.block_lists import BLOCK_LISTS, WEIGHTS, read_block_list
from library.options.flags import Flag
from library.options.module_args import DYLORA_ARGS, LORA_FA_ARGS, OFT_ARGS

ROOT = Path(__file__).resolve().parents[2]
_OWN = "networks.lora"
_UNSET = (None, "", "None")
_RATE = (("gt", 0),)
LORA_ARGS: Mapping[str, Flag] = {
    flag.name: flag
    for flag in (
        Flag("conv_dim", "int", limits=(("ge", 0),), synonyms={"None": None}),
        Flag("conv_alpha", "float", limits=(("ge", 0),), synonyms={"None": None}),
        Flag("dropout", "float", limits=(("ge", 0), ("lt", 1))),
        Flag("rank_dropout", "float", limits=(("ge", 0), ("lt", 1))),
        Flag("module_dropout", "float", limits=(("ge", 0), ("lt", 1))),
        *(Flag(name, "str") for name in BLOCK_LISTS),
        Flag("block_lr_zero_threshold", "float", limits=(("ge", 0),)),
        Flag("loraplus_lr_ratio", "float", limits=_RATE),
        Flag("loraplus_unet_lr_ratio", "float", limits=_RATE),
        Flag("loraplus_text_encoder_lr_ratio", "float", limits=_RATE),
        Flag("dora", "flag"),
        Flag("dora_wd", "flag"),
    )
}
"""What networks.lora knows; a block list is text with commas (options.block_lists), `dora_wd` is LyCORIS' `dora`."""
MODULE_ARGS: Mapping[str, Mapping[str, Flag]] = {
    _OWN: LORA_ARGS,
    "networks.lora_fa": LORA_FA_ARGS,
    "networks.dylora": DYLORA_ARGS,
    "networks.oft": OFT_ARGS,
}
LYCORIS = "lycoris.kohya"
LYCORIS_ALGOS = ("locon", "lora", "loha", "lokr", "ia3", "dylora", "diag-oft", "boft", "glora", "full")
LYCORIS_UNBOUNDED = ("ia3", "dylora", "glora", "full")
"""Algorithms whose layers have no norm that `--scale_weight_norms` could bound."""
LYCORIS_PRESETS = (
    *("full", "full-lin", "attn-mlp", "attn-only", "unet-only", "unet-transformer-only", "unet-convblock-only", "ia3"),
)
LYCORIS_ARGS = (
    *("algo", "preset", "conv_dim", "conv_alpha", "dropout", "rank_dropout", "module_dropout", "block_size", "factor"),
    *("use_tucker", "use_cp", "use_conv_cp", "disable_conv_cp", "use_scalar", "train_norm", "constraint", "constrain"),
    *("rescaled", "dora_wd", "wd_on_output", "full_matrix", "bypass_mode", "rs_lora", "unbalanced_factorization"),
    *("decompose_both", "loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"),
)
_OF_LYCORIS = f"it belongs to --network_module {LYCORIS}"
LORA_REFUSED: Mapping[str, str] = {"algo": _OF_LYCORIS, "preset": _OF_LYCORIS}


@dataclass
class Settings:
    """`--network_args` as values by name, and what is wrong with the rest."""

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


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


def read_settings(module: str, given: Mapping[str, Any], name_place: Callable[[str], str]) -> Settings:
    """The settings of one of `MODULE_ARGS`' modules, whoever gave them: values may be text.

    A value that means "not given" is left out. `name_place` says how a message names a setting.
    """
    table, found = MODULE_ARGS[module], Settings()
    for key, raw in given.items():
        flag = table.get(key)
        if flag is None:
            advice = LORA_REFUSED.get(key, "") or (f"{_OWN} has it" if key in LORA_ARGS else "")
            advice = advice or nearest(key, table) or f"known are {', '.join(table)}"
            found.problems.append(Problem(name_place(key), f"{module} has no setting {key}", advice))
            continue
        try:
            value = values.read(flag, None if raw in _UNSET else raw)
            if value is not values.UNSET:
                found.values[key] = read_block_list(key, value) if key in BLOCK_LISTS else value
        except ValueError as error:
            found.problems.append(Problem(name_place(key), f"{key}={raw}: {error}"))
    return found


def check_network_args(module: str | None, items: Sequence[str], where: str) -> list[Problem]:
    """Problems of --network_args: what our own modules don't have or can't read, and LyCORIS' names and choices."""
    found, problems = pairs(items, where)
    if module == LYCORIS:
        return problems + list(_lycoris_problems(found, where))
    if module is None or module not in MODULE_ARGS:
        return problems
    problems += read_settings(module, found, lambda _: where).problems
    return problems + list(_without_effect(found, where))


def _without_effect(found: Mapping[str, str], where: str) -> Iterator[Problem]:
    """Settings that need another one."""
    convolutions = ("conv_dim", "conv_block_dims")
    if "conv_alpha" in found and not found.keys() & set(convolutions):
        yield Problem(where, "conv_alpha has no effect without conv_dim", "add conv_dim")
    if "conv_block_alphas" in found and not found.keys() & set(convolutions):
        yield Problem(where, "conv_block_alphas has no effect without conv_block_dims", "add conv_block_dims")
    if "block_lr_zero_threshold" in found and not found.keys() & set(WEIGHTS):
        wrong = "block_lr_zero_threshold has no effect without weights"
        yield Problem(where, wrong, f"add {', '.join(WEIGHTS)} or one of them")


def _lycoris_problems(found: Mapping[str, str], where: str) -> Iterator[Problem]:
    if found.get("algo", "lora").lower() not in LYCORIS_ALGOS:
        hint = nearest(found["algo"].lower(), LYCORIS_ALGOS) or f"known are {', '.join(LYCORIS_ALGOS)}"
        yield Problem(where, f"LyCORIS has no algo {found['algo']}", hint)
    for key in found.keys() - set(LYCORIS_ARGS):
        hint = nearest(key, LYCORIS_ARGS) or f"known are {', '.join(LYCORIS_ARGS)}"
        yield Problem(where, f"LyCORIS has no setting {key}", hint)
    preset = found.get("preset", "full")
    if preset not in LYCORIS_PRESETS and not Path(preset).is_file():
        hint = nearest(preset, LYCORIS_PRESETS) or f"known are {', '.join(LYCORIS_PRESETS)}, or a TOML file"
        yield Problem(where, f"LyCORIS has no preset {preset}", hint)
