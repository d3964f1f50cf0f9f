"""Settings of `--network_args` that hold a value for each block of the U-Net: ranks, alphas and learning-rate weights.

Read here as text only. How many blocks there are is known with the base model (networks.blocks).
"""

import math
from dataclasses import dataclass

from library.errors import nearest

DIMS = ("block_dims", "conv_block_dims")
ALPHAS = ("block_alphas", "conv_block_alphas")
WEIGHTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
BLOCK_LISTS = (*DIMS, *ALPHAS, *WEIGHTS)
PRESETS = ("cosine", "sine", "linear", "reverse_linear", "zeros")


@dataclass(frozen=True)
class BlockWeights:
    """Learning-rate weights of one direction of the U-Net: `numbers`, or a `preset` with `base` added to each."""

    numbers: tuple[float, ...] = ()
    preset: str = ""
    base: float = 0.0

    def values(self, length: int) -> tuple[float, ...]:
        """One weight for each of `length` blocks. Numbers that are missing count as 1, too many are cut off."""
        if not self.preset:
            return (*self.numbers[:length], *(1.0,) * (length - len(self.numbers)))
        rising = [place / max(length - 1, 1) for place in range(length)]
        curves = {
            "linear": rising,
            "reverse_linear": rising[::-1],
            "sine": [math.sin(math.pi / 2 * part) for part in rising],
            "cosine": [math.sin(math.pi / 2 * part) for part in rising[::-1]],
            "zeros": [0.0] * length,
        }
        return tuple(value + self.base for value in curves[self.preset])


def read_block_list(name: str, text: str) -> tuple[int, ...] | tuple[float, ...] | BlockWeights:
    """The value of one of `BLOCK_LISTS`: whole numbers of `DIMS`, numbers of `ALPHAS`, `BlockWeights` of `WEIGHTS`.

    Raises:
        ValueError: the text holds something else; its message says what is allowed.
    """
    if name not in WEIGHTS:
        numbers = tuple(_number(part, whole=name in DIMS) for part in text.split(","))
        return tuple(int(number) for number in numbers) if name in DIMS else numbers
    if name == "mid_lr_weight" or "," in text:
        return BlockWeights(tuple(_number(part) if part.strip() else 0.0 for part in text.split(",")))
    preset, _, base = (part.strip() for part in text.partition("+"))
    if preset not in PRESETS:
        hint = nearest(preset, PRESETS) or f"write a number for each block, or {', '.join(PRESETS)}"
        raise ValueError(f"{text!r} is neither numbers with commas nor a preset; {hint}")
    return BlockWeights(preset=preset, base=_number(base) if base else 0.0)


def _number(text: str, whole: bool = False) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf or (whole and number != int(number)):
        raise ValueError(f"{text.strip()!r} is not a {'whole ' if whole else ''}number from 0 on")
    return number
