"""Which programs take which modules of a LoRA file, told from its keys alone by the rules that their loaders match
names with; and what its metadata lack.

What a program makes of the numbers is not looked at, except where it is known to compute something else.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from library.models.families import FAMILIES, Family
from library.weights.edit_metadata import content_hash
from library.weights.loras.alphas import otherwise_in_diffusers
from library.weights.loras.lora import Module
from library.weights.loras.lycoris import Kind
from library.weights.loras.spelled import OFT_PREFIX, Found, Keys, Place, is_last_layer, places, plain_name
from library.weights.metadata import MINIMUM

Takes = Literal["all", "some", "none"]
_QUARTET = re.compile(r"(.+_self_attn)_(q|k|v|out)_proj")
_HASHES = ("sshs_model_hash", "modelspec.hash_sha256")
_WRAPPED = "base_model.model."
_LATE_UPSAMPLER = "lora_unet_up_blocks_0_upsamplers_0_conv"
_DROPPED_SCALE = "dora_scale is left out, so that the file acts as another LoRA than it is"


@dataclass(frozen=True)
class Verdict:
    """What a program makes of a file.

    Attributes:
        refused: why it doesn't load the file at all; empty where it does.
        dropped: key and reason of each module that it leaves out.
        notes: what it computes otherwise than was trained.
    """

    program: str
    modules: int
    refused: str = ""
    dropped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def taken(self) -> int:
        """How many modules act."""
        return 0 if self.refused else self.modules - len(self.dropped)

    @property
    def takes(self) -> Takes:
        """In a word."""
        return "all" if self.taken == self.modules and self.modules else "some" if self.taken else "none"


def _has_two(family: Family) -> bool:
    return len(family.text_encoders) > 1


def verdicts(
    keys: Keys, family: Family, metadata: Mapping[str, str], modules: Mapping[str, Module] | None = None
) -> tuple[Verdict, ...]:
    """What each program makes of a file for a model of this family; with its `modules`, also what becomes of alphas
    that differ."""
    a1111, comfyui, invokeai = (judge(keys, family, metadata) for judge in (_a1111, _comfyui, _invokeai))
    found = _diffusers(keys, family, metadata)
    if not found.refused and keys.styles == {"kohya"} and (odd := otherwise_in_diffusers(modules or {})):
        found = replace(found, notes=(*found.notes, _other_strength(odd)))
    return a1111, comfyui, found, invokeai


def _other_strength(times: Mapping[str, float]) -> str:
    name, most = max(times.items(), key=lambda one: abs(math.log(abs(one[1]) or math.inf)))
    return (
        f"alphas differ, and {len(times)} modules of attention or text encoders get the commonest, not their own, "
        f"e.g. {name} {most:.3g} times its strength; convert_lora.py --one_alpha mends that"
    )


def _dropped(keys: Keys, family: Family, why: Callable[[Found, Place | None], str]) -> tuple[tuple[str, str], ...]:
    """Modules for which `why` gives a reason, or that the model doesn't have."""
    known = places(family)
    found = []
    for one in keys.modules:
        place = known.get(plain_name(one.name))
        if place is None and not is_last_layer(one, family):
            found.append((one.key, f"{family.title} has no such module"))
        elif reason := why(one, place):
            found.append((one.key, reason))
    return tuple(found)


def _unknown(keys: Keys, taken: Sequence[Kind]) -> str:
    """Why a program gives up: a kind of module that isn't among those that it takes; else an empty text."""
    found = next((one for one in keys.modules if one.made not in taken), None)
    return f"it knows no modules of the kind {found.made}, e.g. {found.key}" if found else ""


_A1111: tuple[Kind, ...] = ("lora", "tucker", "sparse", "loha", "lokr", "ia3", "full", "norm", "glora", "oft")


def _a1111(keys: Keys, family: Family, metadata: Mapping[str, str]) -> Verdict:
    """Names are turned into those of the original layout; text encoders of OpenCLIP's kind are fused by layer."""
    if reason := _unknown(keys, _A1111):
        return Verdict("A1111", len(keys.modules), reason)
    names = {one.name for one in keys.modules}

    def why(one: Found, place: Place | None) -> str:
        if one.style != "kohya":
            return "it doesn't read dotted names"
        if one.name.startswith("lycoris_"):
            return "it doesn't know the prefix lycoris_"
        if one.name.startswith(OFT_PREFIX):
            return "" if place is not None and place.spelling == "original" else "it asks for original names of OFT"
        if one.name == _LATE_UPSAMPLER and place is not None and place.spelling == "diffusers":
            return "it looks for it in another place (output_blocks_2_1_conv)"
        if "add_embedding" in one.name:
            return "it knows it by its original name only"
        if one.name.startswith("lora_te_") and _has_two(family):
            return f"{family.title}'s text encoders are lora_te1_ and lora_te2_"
        if one.name.startswith("lora_te1_") and family.text_encoders[0].open_clip:
            return f"{family.title}'s text encoder is lora_te_"
        open_clip = family.text_encoders[1 if "_te2_" in one.name else 0].open_clip
        if open_clip and (layer := _QUARTET.fullmatch(one.name)):
            lacking = [way for way in ("q", "k", "v", "out") if f"{layer[1]}_{way}_proj" not in names]
            if lacking:
                return f"it needs q, k, v and out of a layer together; {lacking[0]}_proj is missing"
        return ""

    notes = []
    if any(one.kind == "dora" for one in keys.modules):
        notes.append("DoRA: norms are taken over the other axis, which scales weights wrongly")
    return Verdict("A1111", len(keys.modules), "", _dropped(keys, family, why), tuple(notes))


def listed_as(metadata: Mapping[str, str]) -> str | None:
    """The family that A1111 takes a file for, by its metadata alone; None where it has none."""
    sized = metadata.get("ss_base_model_version", "").startswith("sdxl_")
    v2 = metadata.get("ss_v2") == "True" and not sized
    found = next(family for family in FAMILIES.values() if family.takes_sizes == sized and family.v2 == v2)
    return found.title if metadata else None


_COMFYUI: tuple[Kind, ...] = ("lora", "tucker", "sparse", "loha", "lokr", "glora", "full", "norm", "oft")


def _comfyui(keys: Keys, family: Family, metadata: Mapping[str, str]) -> Verdict:
    """Names are looked up in a table of both spellings; what isn't there is logged and left out."""

    def why(one: Found, place: Place | None) -> str:
        if one.made not in _COMFYUI:
            return f"it knows no modules of the kind {one.made}"
        if one.name.startswith(OFT_PREFIX):
            return "it asks for other names of OFT"
        if one.key.startswith(_WRAPPED):
            return f"it doesn't know the prefix {_WRAPPED}"
        if one.style == "peft" and ".to_" in one.key:
            return "it doesn't read peft's names of attention layers"
        if one.style == "peft" and one.key.startswith("text_encoder") and ".text_model." not in one.key:
            return "it asks for text_model. in the name"
        if one.name.startswith("lycoris_") and place is not None and place.spelling == "original":
            return "it asks for diffusers' blocks behind lycoris_"
        return ""

    notes = []
    if any(one.kind == "dora" for one in keys.modules):
        peft = "peft" in keys.styles
        notes.append(
            f"DoRA: {_DROPPED_SCALE}" if peft else "DoRA: divides by the norm of W, not of W + D: nearly right"
        )
    if "lora_adapter_metadata" in metadata and "peft" in keys.styles:
        notes.append("alphas that stand in the metadata alone are not read: the strength can be another")
    return Verdict("ComfyUI", len(keys.modules), "", _dropped(keys, family, why), tuple(notes))


def _diffusers(keys: Keys, family: Family, metadata: Mapping[str, str]) -> Verdict:
    """Converts to peft's names and is strict: one key that it can't place, and nothing is loaded."""
    count = len(keys.modules)
    if keys.bundled:
        return Verdict("diffusers", count, f"one stray key is too many ({keys.bundled[0]})")
    if reason := _unknown(keys, ("lora",)):
        return Verdict("diffusers", count, reason)
    kohya = [one for one in keys.modules if one.style == "kohya"]
    if len(keys.styles) > 1:
        return Verdict("diffusers", count, "dotted and underscored names are mixed")
    stray = next((one.key for one in kohya if not one.name.startswith(("lora_unet_", "lora_te"))), None)
    if stray is not None:
        return Verdict("diffusers", count, f"one stray key is too many ({stray})")
    mixed = _is_mixed(keys, family)

    def why(one: Found, place: Place | None) -> str:
        if one.style != "kohya" and not one.key.startswith(("unet.", "text_encoder.", "text_encoder_2.")):
            return "dotted names must begin with unet. or text_encoder. there"
        if mixed and place is not None and place.spelling == "original":
            return "beside blocks in diffusers' spelling those in the original one are left out"
        return "its model has 23 layers" if place is None else ""

    dora = any(one.kind == "dora" for one in kohya)
    return Verdict("diffusers", count, "", _dropped(keys, family, why), (f"DoRA: {_DROPPED_SCALE}",) if dora else ())


def _is_mixed(keys: Keys, family: Family) -> bool:
    known = places(family)
    found = {place.spelling for one in keys.modules if (place := known.get(one.name)) is not None}
    return {"original", "diffusers"} <= found


_INVOKEAI: tuple[Kind, ...] = ("lora", "tucker", "loha", "lokr", "ia3", "full", "norm")


def _invokeai(keys: Keys, family: Family, metadata: Mapping[str, str]) -> Verdict:
    """Groups keys at the first dot; of SDXL it turns original names into diffusers', all or none."""
    count = len(keys.modules)
    if keys.styles - {"kohya"}:
        return Verdict("InvokeAI", count, "it doesn't read dotted names")
    if reason := _unknown(keys, _INVOKEAI):
        return Verdict("InvokeAI", count, reason)
    prefixes = ("lora_unet_", "lora_te1_", "lora_te2_") if _has_two(family) else ("lora_unet_", "lora_te")
    stray = next((one.key for one in keys.modules if not one.name.startswith(prefixes)), None)
    if stray is not None or keys.bundled:
        return Verdict("InvokeAI", count, f"one stray key is too many ({stray or keys.bundled[0]})")
    if _is_mixed(keys, family):
        return Verdict("InvokeAI", count, "blocks are spelled in two ways")

    def why(one: Found, place: Place | None) -> str:
        if not _has_two(family) and one.name.startswith("lora_te1_"):
            return f"{family.title}'s text encoder is lora_te_"
        return "its model has 23 layers" if place is None else ""

    notes = ("DoRA: not checked",) if any(one.kind == "dora" for one in keys.modules) else ()
    return Verdict("InvokeAI", count, "", _dropped(keys, family, why), notes)


def metadata_gaps(metadata: Mapping[str, str], family: Family, ranks: Collection[int], path: Path) -> list[str]:
    """What a file's metadata lack, or say otherwise than its tensors; one line for each.

    Args:
        ranks: that its modules have.
        path: of the file, whose tensors are read again where a hash of them is told.
    """
    if not metadata:
        return ["there are none: A1111 lists the file under every model, and galleries can't tell what it is"]
    found = []
    if missing := [key for key in MINIMUM if key not in metadata]:
        found.append(f"missing: {', '.join(missing)}")
    version = metadata.get("ss_base_model_version")
    if version is not None and version not in family.versions.values():
        found.append(f"ss_base_model_version is {version}, but the tensors are {family.title}'s")
    listed = listed_as(metadata)
    if listed != family.title:
        found.append(f"A1111 lists the file as {listed} and hides it under {family.title}")
    dim = metadata.get("ss_network_dim", "")
    if dim.isdecimal() and ranks and int(dim) not in ranks:
        found.append(f"ss_network_dim is {dim}, but no module has that rank")
    if not metadata.get("ss_output_name"):
        found.append("ss_output_name is missing, by which A1111's prompts can name the file")
    told = metadata.get("sshs_model_hash")
    if told is None:
        found.append("sshs_model_hash is missing, by which galleries find the file")
    hashes = {key: metadata[key].lower().removeprefix("0x") for key in _HASHES if key in metadata}
    own = content_hash(path) if hashes else ""
    wrong = [key for key, digits in hashes.items() if digits != own]
    if wrong:
        found.append(f"not the tensors' hash: {', '.join(wrong)}; the file is damaged, or a tool kept old ones")
    return found
