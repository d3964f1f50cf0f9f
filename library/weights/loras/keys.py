"""The spellings that LoRA files have for one and the same module, and what a file's keys tell about its base model.

U-Net blocks are spelled as diffusers or as the original layout spells them, the only text encoder is `lora_te` or
`lora_te1`, and files of peft and diffusers hold dotted paths. Everything is read as the spelling that we write.
Imports no torch.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.models.families import SD1, SD2, SDXL, diffusers_key, unet_key_of
from library.models.lora_targets import LoraTarget
from library.weights.loras.modules import FileModule, group
from library.weights.loras.peft import settings_of, underscored

if TYPE_CHECKING:
    from torch import Tensor

_BY_CONTEXT: Mapping[Any, str] = {768: SD1.title, 1024: SD2.title, 2048: SDXL.title}
_ORIGINAL = re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks)_")
_DIFFUSERS = re.compile(r"lora_unet_(down_blocks|mid_block|up_blocks)_")
_STRANGERS = {
    "Flux": re.compile(r"(lora_unet_|diffusion_model\.|transformer\.)(double_blocks|single_blocks|single_transformer)"),
    "SD3": re.compile(r"(lora_unet_|diffusion_model\.)joint_blocks"),
    "a transformer model such as Flux or SD3": re.compile(r"(transformer|diffusion_model|lora_transformer)[._]"),
}


@dataclass(frozen=True)
class Spellings:
    """What files may call the modules of one base model.

    Attributes:
        aliases: each name in a file -> the name that we write.
        title: the base model's family, as messages name it; empty if its U-Net's width doesn't tell.
        text_encoders: how many there are.
    """

    aliases: Mapping[str, str]
    title: str
    text_encoders: int


def spellings(found: Iterable[LoraTarget], unet_config: Mapping[str, Any] | None) -> Spellings:
    """The names of all targets of a base model."""
    aliases: dict[str, str] = {}
    encoders = set()
    for target in found:
        aliases[target.name] = target.name
        if target.part == "unet":
            aliases[f"lora_unet_{diffusers_key(target.path)}"] = target.name
            continue
        encoders.add(target.encoder)
        if target.name.startswith("lora_te_"):
            aliases[target.name.replace("lora_te_", "lora_te1_", 1)] = target.name
    config = unet_config or {}
    original = unet_key_of(config) is not diffusers_key
    title = SDXL.title if original else _BY_CONTEXT.get(config.get("cross_attention_dim"), "")
    return Spellings(aliases, title, len(encoders))


def read_lora(file: str | Path) -> "dict[str, Tensor]":
    """A LoRA file's tensors; those of a file of peft or diffusers under the names that other LoRA files have.

    Raises UserError if the file can't be read.
    """
    from library.weights.files import read_metadata, read_tensors

    path = Path(file)
    tensors = read_tensors(path)
    metadata = read_metadata(path) if path.suffix == ".safetensors" else {}
    return underscored(tensors, settings_of(metadata, path))


def stranger(keys: Iterable[str]) -> str | None:
    """The model that a file with these keys is made for, if it is none of ours; None of any other."""
    names = list(keys)
    return next((title for title, found in _STRANGERS.items() if any(map(found.match, names))), None)


def modules_of(tensors: "Mapping[str, Tensor]", known: Spellings, source: str | Path) -> dict[str, FileModule]:
    """The modules of a file, under the names that we write; names that this base model doesn't have stay as they are.

    Raises UserError if the file is no LoRA, is of another family, spells blocks in both ways or holds a module twice.
    """
    tensors = underscored(tensors, {})
    if title := stranger(tensors):
        raise _other_family(title, known, source)
    original, diffusers = (next(filter(kind.match, tensors), None) for kind in (_ORIGINAL, _DIFFUSERS))
    if original and diffusers:
        raise UserError.single(
            str(source),
            f"it spells the U-Net's blocks in two ways, e.g. {original} and {diffusers}",
            "convert the whole file to one spelling",
        )
    modules = group(tensors, source)
    family = _made_for(modules)
    if family and known.title and family != known.title:
        raise _other_family(family, known, source)
    found: dict[str, FileModule] = {}
    for name, module in modules.items():
        ours = known.aliases.get(name, name)
        if ours in found:
            raise UserError.single(str(source), f"it holds {ours} twice, also as {name}", "the file is damaged")
        found[ours] = module
    return found


def _other_family(title: str, known: Spellings, source: str | Path) -> UserError:
    here = f"; this base model is {known.title}" if known.title else ", and this base model is not"
    return UserError.single(str(source), f"is made for {title}{here}", "use a LoRA of the same model family")


def _made_for(modules: Mapping[str, FileModule]) -> str | None:
    """The family that a file's names and sizes speak of; None if they don't tell."""
    if any(name.startswith("lora_te2_") or _ORIGINAL.match(name) for name in modules):
        return SDXL.title
    contexts = {module.down.shape[1] for name, module in modules.items() if name.endswith("attn2_to_k")}
    if not any(name.startswith(("lora_unet_", "lora_te1_")) for name in modules):
        contexts = {module.down.shape[1] for name, module in modules.items() if name.endswith("self_attn_k_proj")}
    return _BY_CONTEXT.get(contexts.pop()) if len(contexts) == 1 else None
