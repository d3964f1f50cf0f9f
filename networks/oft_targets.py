"""Which modules networks.oft turns, under which names, and whether its number of blocks fits them. Imports no torch."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from library.errors import Problem
from library.models.lora_targets import LoraTarget

PREFIX = "oft_unet_"
_ATTENTION = (".attn1.", ".attn2.")


def oft_targets(found: Iterable[LoraTarget], *, every_linear: bool, conv: bool) -> Iterator[LoraTarget]:
    """Those of a base model's LoRA targets that OFT trains, with OFT's names: the U-Net's attention projections.

    `every_linear` adds the rest of its transformers (Linear and 1x1), `conv` what LoRA-C3Lier adds.
    """
    for target in found:
        attention = any(part in target.path for part in _ATTENTION)
        if target.part == "unet" and (conv if target.conv_only else every_linear or attention):
            yield replace(target, name=PREFIX + target.name.removeprefix("lora_unet_"))


def problems(chosen: Iterable[LoraTarget], blocks: int) -> list[Problem]:
    """What is wrong with so many blocks (`--network_dim`) for these modules."""
    bad = [target for target in chosen if target.out_features % blocks]
    if not bad:
        return []
    wrong = f"{blocks} blocks don't divide the {bad[0].out_features} outputs of {bad[0].name}"
    return [Problem("--network_dim", wrong, "OFT's dim is a number of blocks: use a power of two such as 4 or 8")]
