"""Weights by block for merging: a list with a number for each of some blocks, as A1111's "LoRA block weight" and
sd-scripts' `--lbws` have it. Imports no torch.

All lists speak of the same 26 slots: BASE (text encoders and what is no U-Net), IN00 to IN11, MID, OUT00 to OUT11. A
list of 26 names them all; shorter ones name those in which a family has attention, or those that it has at all. A slot
that a list doesn't name has weight 1.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from library.errors import UserError
from library.models.families import Family

_IN, _MID, _OUT = 1, 13, 14
SLOTS = ("BASE", *(f"IN{n:02}" for n in range(12)), "MID", *(f"OUT{n:02}" for n in range(12)))
"""The names of all slots in their order."""
_NAMED: Mapping[int, tuple[int, ...]] = {
    12: (0, *(_IN + n for n in (4, 5, 7, 8)), _MID, *(_OUT + n for n in range(6))),
    17: (0, *(_IN + n for n in (1, 2, 4, 5, 7, 8)), _MID, *(_OUT + n for n in range(3, 12))),
    20: (0, *(_IN + n for n in range(9)), _MID, *(_OUT + n for n in range(9))),
    26: tuple(range(26)),
}
_LENGTHS: Mapping[int, tuple[int, int]] = {9: (12, 20), 12: (17, 26)}
"""Blocks on a U-Net's way down -> the lists that fit it: of those with attention, and of all."""
_UNET = re.compile(r"(?:lora_unet|oft_unet|model_diffusion_model|unet)_(.+)")
_LEVEL = re.compile(r"(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)(?:_|$)")
_NUMBERED = re.compile(r"(input|output)_blocks_(\d+)(?:_|$)")
_STARTS = ("time_embed", "label_emb", "add_embedding", "conv_in")
_ENDS = ("out_", "conv_out", "conv_norm_out")


def slot_of(name: str, family: Family) -> int:
    """The place in `SLOTS` of a LoRA's module or of a checkpoint's tensor.

    Args:
        name: `lora_unet_...`, `model.diffusion_model....` or `unet....`, with blocks in diffusers' or the original
            spelling; every other name is BASE. Embeddings of time and size count as IN00, the last layers as the last
            block of the way up.
    """
    found = _slot(name)
    return _OUT + family.blocks.up - 1 if found is None else found


@lru_cache(maxsize=16384)
def _slot(name: str) -> int | None:
    """The same; None of the last layers, whose place is the family's."""
    found = _UNET.match(name.replace(".", "_"))
    if found is None:
        return 0
    path = found[1]
    if block := _LEVEL.match(path):
        level, kind, layer = int(block[2]), block[3], int(block[4])
        within = 2 if kind.endswith("samplers") else layer
        return 3 * level + within + (_IN + 1 if block[1] == "down" else _OUT)
    if numbered := _NUMBERED.match(path):
        return int(numbered[2]) + (_IN if numbered[1] == "input" else _OUT)
    if path.startswith(("mid_block_", "middle_block_")):
        return _MID
    if path.startswith(_STARTS):
        return _IN
    return None if path.startswith(_ENDS) else 0


def lengths(family: Family) -> tuple[int, int]:
    """The lengths of the lists that fit a family: of its blocks with attention, and of all its blocks."""
    return _LENGTHS[family.blocks.down]


def read_numbers(text: str, where: str) -> tuple[float, ...]:
    """A list as a user writes it: JSON such as `[1,0,0.5,...]`, or the same without brackets.

    Args:
        where: names the flag in messages.

    Raises:
        UserError: it is no list of finite numbers, or of a length that no family has.
    """
    advice = f"write a JSON list of {', '.join(map(str, sorted(_NAMED)))} numbers, such as [1,0,...]"
    plain = text.strip()
    try:
        found = json.loads(plain if plain.startswith("[") else f"[{plain}]")
    except ValueError as fault:
        raise UserError.single(where, f"{text!r} is no list ({fault})", advice) from fault
    for one in found:
        if isinstance(one, bool) or not isinstance(one, int | float) or not math.isfinite(one):
            raise UserError.single(where, f"{json.dumps(one)} in it is no finite number", advice)
    if len(found) not in _NAMED:
        raise UserError.single(where, f"has {len(found)} numbers", advice)
    return tuple(float(one) for one in found)


@dataclass(frozen=True)
class BlockList:
    """The weights of a list, to be called with a name as `slot_of` takes it.

    Attributes:
        values: one for each of `SLOTS`; 1 where the list names none.
        named: the places in `SLOTS` that the list names.
    """

    family: Family
    values: tuple[float, ...]
    named: frozenset[int]

    def __call__(self, name: str) -> float:
        """The weight of what a module or tensor belongs to."""
        return self.values[slot_of(name, self.family)]

    def names(self, name: str) -> bool:
        """Whether the list says something about the module's or tensor's block."""
        return slot_of(name, self.family) in self.named


def block_list(numbers: tuple[float, ...], family: Family, where: str) -> BlockList:
    """A list that `read_numbers` read, for models of a family.

    Raises:
        UserError: lists of this length are for another family.
    """
    if len(numbers) not in lengths(family):
        attention, every = lengths(family)
        advice = f"give {attention} (blocks with attention) or {every} (all blocks)"
        raise UserError.single(where, f"has {len(numbers)} numbers, but the file is made for {family.title}", advice)
    values = [1.0] * len(SLOTS)
    places = _NAMED[len(numbers)]
    for place, number in zip(places, numbers, strict=True):
        values[place] = number
    return BlockList(family, tuple(values), frozenset(places))
