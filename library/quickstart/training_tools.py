"""What the two halves of the base model's training share: learning rate, checkpoints, pictures as tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from library.quickstart.scenes import BUCKETS
from library.rng import rng

SEED = 20
SQUARE_SHARE = 0.6


def learning_rate(step: int, total: int, peak: float, *, warm_up: int = 100, cool_down: float = 0.3) -> float:
    """A straight rise, then flat, then a straight fall to a fiftieth over the last `cool_down` of the steps."""
    rise = min(1.0, (step + 1) / warm_up)
    fall = min(1.0, (total - step) / (total * cool_down))
    return peak * rise * max(fall, 0.02)


def bucket_of(stream: str, step: int) -> tuple[int, int]:
    """Width and height of a step's batch: square mostly, else one of the other shapes."""
    draw, which = rng(SEED, "order", stream, "bucket", step).random(2)
    return BUCKETS[0] if draw < SQUARE_SHARE else BUCKETS[1 + int(which * (len(BUCKETS) - 1))]


def to_tensor(pictures: list[NDArray[np.uint8]]) -> Tensor:
    """uint8 RGB pictures of one size -> float32 (n, 3, height, width) in -1 ... 1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def gaussian(generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32."""
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write to a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    torch.save(dict(state), temporary)
    temporary.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The state that `save_checkpoint` wrote, or None."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state
