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
CONFIG, CONFIGURED = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
"""Where peft's own saves have the settings instead: beside files of these names."""
_DEFAULT_ALPHA = 8.0
_KEY = re.compile(
    r"(?:(unet|text_encoder(?:_[12])?)\.(?:base_model\.model\.)?|(?:base_model\.model\.)?"
    r"(?=(?:down_blocks|mid_block|up_blocks|text_model|encoder\.layers)\.))(.+?)\."
    r"(?:((?:lora_A(?:\.default)?|lora\.down|lora_linear_layer\.down|lora_down)\.weight)"
    r"|((?:lora_B(?:\.default)?|lora\.up|lora_linear_layer\.up|lora_up)\.weight)"
    r"|((?:lora_magnitude_vector(?:\.default)?(?:\.weight)?)|dora_scale)|alpha)"
)
_PROCESSOR = re.compile(r"\.(attn[12])\.(?:processor\.)?to_(q|k|v|out)_lora\.")
_TEXT_ATTENTION = re.compile(r"\.self_attn\.to_(q|k|v|out)_lora\.")
_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_1": "lora_te1_"}
_PREFIXES["text_encoder_2"] = "lora_te2_"
_LEAVES = ("lora_down.weight", "lora_up.weight", "dora_scale")
_PARTS = ("unet", "text_encoder", "text_encoder_2")
_PROCESSOR_END = re.compile(r"_lora\.(down|up)\.weight$")
_OLDER = re.compile(r"_lora\.(down|up)\.|\.lora\.(down|up)\.|\.lora_linear_layer\.(down|up)\.")


@dataclass(frozen=True)
class Place:
    """Where a module stands in diffusers' model: `part` (`unet`, `text_encoder`, `text_encoder_2`) and dotted path."""

    part: str
    path: str


@dataclass(frozen=True)
class Dotted:
    """A key that peft or diffusers write.

    Attributes:
        own: of the module, as the key spells it.
        part, path: where it stands in diffusers' model; `text_encoder_1` is another name of the first.
        leaf: as other LoRA files call it.
        is_processor: it is one of diffusers' oldest spelling, by attention processors.
        is_magnitude: it holds the magnitudes in peft's shape.
    """

    own: str
    part: str
    path: str
    leaf: str
    is_processor: bool = False
    is_magnitude: bool = False

    @property
    def name(self) -> str:
        """The module's name in other LoRA files, blocks spelled as diffusers does."""
        return _PREFIXES[self.part] + diffusers_key(self.path)


def parsed(key: str) -> Dotted | None:
    """What a key says, if peft or diffusers write such."""
    plain = _plain(key)
    match = _KEY.fullmatch(plain)
    if match is None:
        return None
    told, path, down, up, magnitude = match.groups()
    part = told or ("text_encoder" if path.startswith(("text_model.", "encoder.")) else "unet")
    if part != "unet":
        path = "text_model." + path.removeprefix("text_model.")
    leaf = next((leaf for one, leaf in zip((down, up, magnitude), _LEAVES, strict=True) if one), "alpha")
    own = plain[: match.end(2)] if plain == key else _PROCESSOR_END.sub("", key)
    return Dotted(own, part, path, leaf, plain != key, bool(magnitude) and magnitude != "dora_scale")


def is_dotted(key: str) -> bool:
    """Whether a key is one that peft or diffusers write."""
    return _KEY.fullmatch(_plain(key)) is not None


def is_older(key: str) -> bool:
    """Whether it is one of diffusers' own spellings before it took over peft's."""
    return _OLDER.search(key) is not None


def settings_of(metadata: Mapping[str, str], source: str | Path) -> Mapping[str, Any]:
    """The adapters' settings that a file's metadata hold, or peft's `adapter_config.json` beside it; empty without.

    Raises:
        UserError: they can't be read.
    """
    beside = Path(source).with_name(CONFIG) if Path(source).name in CONFIGURED else None
    if beside is not None and SETTINGS not in metadata and beside.is_file():
        try:
            own = _checked(beside.read_text(encoding="utf-8"), str(beside), "its settings")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError.single(str(beside), f"can't be read ({error})", "save it again") from error
        return {f"{part}.{key}": value for part in _PARTS for key, value in own.items()}
    return _checked(metadata.get(SETTINGS, "{}"), str(source), f"its metadata {SETTINGS}")


def _checked(text: str, where: str, what: str) -> Mapping[str, Any]:
    """Settings as JSON has them, `what` in messages."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError.single(where, f"{what} are no JSON", "save it again") from error
    if not isinstance(found, dict):
        raise UserError.single(where, f"{what} are no JSON object", "save it again")
    for key, value in found.items():
        alphas: list[Any] = [value] if f".{key}".endswith(".lora_alpha") else []
        if f".{key}".endswith(".alpha_pattern") and value is not None:
            alphas = list(value.values()) if isinstance(value, dict) else [value]
        if not all(isinstance(one, int | float) or one is None for one in alphas):
            raise UserError.single(where, f"{what} have {key} = {value}", "save it again")
    return found


def underscored(tensors: "Mapping[str, Tensor]", settings: Mapping[str, Any]) -> "dict[str, Tensor]":
    """Keys of peft and diffusers as those of other LoRA files; other keys as they are.

    Blocks stay spelled as diffusers does, the first text encoder is `lora_te1_`. Alphas that `settings` tell are added,
    so that alpha / rank is what peft multiplies with; without settings the product of the factors counts as it is.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        one = parsed(key)
        if one is None:
            found[key] = tensor
            continue
        if one.is_magnitude:
            tensor = tensor.reshape((-1, *(1,) * max(tensor.ndim - 1, 1)))
        found[f"{one.name}.{one.leaf}"] = tensor
        part = one.part.removesuffix("_1")
        alpha = _alpha(settings, part, one.path) if one.leaf == "lora_down.weight" else None
        if alpha is not None:
            import torch

            root = tensor.shape[0] ** 0.5 if tensor.ndim and settings.get(f"{part}.use_rslora") else 1.0
            found.setdefault(f"{one.name}.alpha", torch.tensor(alpha * root, dtype=torch.float64))
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
