"""Files of peft and diffusers, whose keys are dotted paths: reading them under the names that other LoRA files have,
and writing modules as they have them, with the adapters' settings in the metadata.

One reading for networks and tools alike. Imports no torch by itself: of a header's stand-ins only shapes are asked.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import Problem, UserError
from library.models.families import diffusers_key
from library.weights.loras.names import diffusers_path, dotted

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS = "lora_adapter_metadata"
"""The metadata's key of the adapters' settings, one JSON object with a prefix for each part."""
_DEFAULT_ALPHA = 8.0
_KEY = re.compile(
    r"(?:(unet|text_encoder(?:_[12])?)\.(?:base_model\.model\.)?|(?:base_model\.model\.)?"
    r"(?=(?:down_blocks|mid_block|up_blocks|text_model)\.))(.+?)\."
    r"(?:((?:lora_A(?:\.default)?|lora\.down|lora_linear_layer\.down|lora_down)\.weight)"
    r"|((?:lora_B(?:\.default)?|lora\.up|lora_linear_layer\.up|lora_up)\.weight)"
    r"|((?:lora_magnitude_vector(?:\.default)?(?:\.weight)?)|dora_scale)|alpha)"
)
_PROCESSOR = re.compile(r"\.(attn[12])\.(?:processor\.)?to_(q|k|v|out)_lora\.")
_TEXT_ATTENTION = re.compile(r"\.self_attn\.to_(q|k|v|out)_lora\.")
_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_1": "lora_te1_"}
_PREFIXES["text_encoder_2"] = "lora_te2_"
_LEAVES = ("lora_down.weight", "lora_up.weight", "dora_scale")
_OLDER = re.compile(r"_lora\.(down|up)\.|\.lora\.(down|up)\.|\.lora_linear_layer\.(down|up)\.")


@dataclass(frozen=True)
class Place:
    """Where a module stands in diffusers' model: `part` (`unet`, `text_encoder`, `text_encoder_2`) and dotted path."""

    part: str
    path: str


def is_dotted(key: str) -> bool:
    """Whether a key is one that peft or diffusers write."""
    return _KEY.fullmatch(_plain(key)) is not None


def is_older(key: str) -> bool:
    """Whether it is one of diffusers' own spellings before it took over peft's."""
    return _OLDER.search(key) is not None


def settings_of(metadata: Mapping[str, str], source: str | Path) -> Mapping[str, Any]:
    """The adapters' settings that a file's metadata hold; empty without.

    Raises:
        UserError: they can't be read.
    """
    try:
        found = json.loads(metadata.get(SETTINGS, "{}"))
    except ValueError as error:
        raise UserError.single(str(source), f"its metadata {SETTINGS} are no JSON", "save it again") from error
    if not isinstance(found, dict):
        raise UserError.single(str(source), f"its metadata {SETTINGS} are no JSON object", "save it again")
    for key, value in found.items():
        alphas: list[Any] = [value] if key.endswith(".lora_alpha") else []
        if key.endswith(".alpha_pattern") and value is not None:
            alphas = list(value.values()) if isinstance(value, dict) else [value]
        if not all(isinstance(one, int | float) or one is None for one in alphas):
            raise UserError.single(str(source), f"its metadata {SETTINGS} have {key} = {value}", "save it again")
    return found


def underscored(tensors: "Mapping[str, Tensor]", settings: Mapping[str, Any]) -> "dict[str, Tensor]":
    """Keys of peft and diffusers as those of other LoRA files; other keys as they are.

    Blocks stay spelled as diffusers does, the first text encoder is `lora_te1_`. Alphas that `settings` tell are added,
    so that alpha / rank is what peft multiplies with; without settings the product of the factors counts as it is.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(_plain(key))
        if match is None:
            found[key] = tensor
            continue
        told, path, down, up, magnitude = match.groups()
        part = told or ("text_encoder" if path.startswith("text_model.") else "unet")
        if part != "unet":
            path = "text_model." + path.removeprefix("text_model.")
        name = _PREFIXES[part] + diffusers_key(path)
        leaf = next((leaf for one, leaf in zip((down, up, magnitude), _LEAVES, strict=True) if one), "alpha")
        if magnitude and magnitude != "dora_scale":
            tensor = tensor.reshape((-1, *(1,) * max(tensor.ndim - 1, 1)))
        found[f"{name}.{leaf}"] = tensor
        alpha = _alpha(settings, part, path) if down else None
        if alpha is not None:
            import torch

            root = tensor.shape[0] ** 0.5 if settings.get(f"{part}.use_rslora") else 1.0
            found.setdefault(f"{name}.alpha", torch.tensor(alpha * root, dtype=torch.float64))
    return found


def _plain(key: str) -> str:
    """A key without the attention processors through which diffusers once reached its layers."""
    key = _TEXT_ATTENTION.sub(r".self_attn.\1_proj.lora.", key)
    return _PROCESSOR.sub(lambda f: f".{f[1]}.to_{'out.0' if f[2] == 'out' else f[2]}.lora.", key)


def _alpha(settings: Mapping[str, Any], part: str, path: str) -> float | None:
    """As peft looks it up: the first pattern that matches the path's end, else `lora_alpha`."""
    paths = {path, path.removeprefix("text_model.")}
    for pattern, alpha in (settings.get(f"{part}.alpha_pattern") or {}).items():
        if any(_matches(pattern, one) for one in paths):
            return float(alpha)
    alpha = settings.get(f"{part}.lora_alpha")
    if alpha is None and any(key.startswith(f"{part}.") for key in settings):
        return _DEFAULT_ALPHA
    return None if alpha is None else float(alpha)


def _matches(pattern: str, path: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", path) is not None
    except re.error:
        return path == pattern or path.endswith(f".{pattern}")


def place_of(name: str) -> Place | None:
    """Where the module of a canonical name stands in diffusers' model; None if it is no LoRA's on a known part."""
    for prefix, part in (
        ("lora_unet_", "unet"),
        ("lora_te_", "text_encoder"),
        ("lora_te1_", "text_encoder"),
        ("lora_te2_", "text_encoder_2"),
    ):
        if name.startswith(prefix):
            path = dotted(name.removeprefix(prefix))
            return Place(part, diffusers_path(path) if part == "unet" else path)
    return None


@dataclass(frozen=True)
class Plain:
    """A module with two factors and perhaps magnitudes, to be written as peft or diffusers have it.

    `down` (r, in[, k, k]), `up` (out, r[, 1, 1]), `magnitude` (out, 1[, 1, 1]); the change is alpha / r * up @ down.
    """

    name: str
    down: "Tensor"
    up: "Tensor"
    alpha: float
    magnitude: "Tensor | None" = None


def as_peft(modules: Iterable[Plain], source: Path) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """Tensors by peft's keys, as they are, and the settings with which peft scales them as alpha / rank does.

    Text encoders' paths have the level `text_model`, as all versions of diffusers take them.

    Raises:
        UserError: only some modules of a part are DoRA, which peft has for all or none.
    """
    modules = list(modules)
    settings: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    by_part: dict[str, list[tuple[str, Plain]]] = {}
    for module, place in _placed(modules, source):
        by_part.setdefault(place.part, []).append((place.path, module))
    for part, found in by_part.items():
        doras = {module.magnitude is not None for _, module in found}
        if len(doras) == 2:
            wrong = f"only some of its modules on {part} are DoRA, peft has it for all or none"
            raise UserError.single(str(source), wrong, "keep it in the layout kohya")
        for path, module in found:
            tensors[f"{part}.{path}.lora_A.weight"] = module.down
            tensors[f"{part}.{path}.lora_B.weight"] = module.up
            if (size := module.magnitude) is not None:
                ending = "" if part == "unet" else ".weight"
                flat = size.flatten() if size.ndim == 2 else size.reshape(1, -1, 1, 1)
                tensors[f"{part}.{path}.lora_magnitude_vector{ending}"] = flat
        own = {f"{part}.{key}": value for key, value in _settings(part, found).items()}
        settings |= own | {f"{part}.use_dora": True in doras}
    return tensors, settings


def _settings(part: str, found: list[tuple[str, Plain]]) -> dict[str, Any]:
    def short(path: str) -> str:
        return path if part == "unet" else path.removeprefix("text_model.")

    ranks = {short(path): int(module.down.shape[0]) for path, module in found}
    alphas = {short(path): int(m.alpha) if m.alpha == int(m.alpha) else m.alpha for path, m in found}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: own for path, own in ranks.items() if own != rank},
        "alpha_pattern": {path: own for path, own in alphas.items() if own != alpha},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
    }


def as_older_diffusers(
    modules: Iterable[Plain], source: Path, scaled: "Callable[[Tensor, float], Tensor]"
) -> "dict[str, Tensor]":
    """Tensors by the keys that diffusers wrote before peft's; such files have no alphas, so `scaled(up, alpha / rank)`
    goes into the up-factors.

    Raises:
        UserError: a module is a DoRA.
    """
    modules = list(modules)
    if any(module.magnitude is not None for module in modules):
        wrong = "is a DoRA, which the older layout of diffusers has no keys for"
        raise UserError.single(str(source), wrong, "use the layout peft or kohya")
    tensors: dict[str, Tensor] = {}
    for module, place in _placed(modules, source):
        way = "lora" if place.part == "unet" else "lora_linear_layer"
        key, scale = f"{place.part}.{place.path}.{way}", module.alpha / int(module.down.shape[0])
        tensors[f"{key}.down.weight"] = module.down
        tensors[f"{key}.up.weight"] = module.up if scale == 1 else scaled(module.up, scale)
    return tensors


def _placed(modules: Iterable[Plain], source: Path) -> list[tuple[Plain, Place]]:
    placed = [(module, place_of(module.name)) for module in modules]
    if strange := [module.name for module, place in placed if place is None]:
        wrong = f"{strange[0]} is on no part of a model that diffusers names"
        raise UserError([Problem(str(source), wrong, "keep it in the layout kohya")])
    return [(module, place) for module, place in placed if place is not None]
