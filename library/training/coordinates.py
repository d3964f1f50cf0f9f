"""Where a micro-batch stands in a run, which is what its random draws are keyed by. Imports no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Coordinates:
    """Epochs count from 1, `index` counts an epoch's global micro-batches from 0, `positions` are places in that one.

    `noise` is the random stream that its noise comes from.
    """

    seed: int
    epoch: int
    index: int
    positions: tuple[int, ...]
    noise: Literal["noise", "validation"] = "noise"
