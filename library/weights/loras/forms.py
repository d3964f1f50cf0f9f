"""What a module of a LoRA file means: two factors, whatever program wrote it, or a whole matrix where it isn't of low
rank. LoCon with a Tucker core, LoHa and LoKr are products of small matrices, so they have exact factors too.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from library.weights.loras.lora import Module


@dataclass(frozen=True)
class Factors:
    """A change of one weight: `scale * up @ down`, reshaped to `shape`.

    Attributes:
        up: (out, r); down: (r, in * kernel), both of one dtype; a scale is not in them.
        shape: of the weight: (out, in) or (out, in, k, k).
        scale: alpha / rank of the file's own module.
    """

    up: Tensor
    down: Tensor
    shape: tuple[int, ...]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The width of the factors."""
        return int(self.down.shape[0])

    def product(self) -> Tensor:
        """The change itself, in `shape`."""
        return (self.up @ self.down).mul_(self.scale).view(self.shape)


def factors(module: Module, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> Factors | None:
    """The exact factors of a module in `dtype`; None where it has none (whole matrices, norms, IA3, OFT ...).

    Of a DoRA these are the factors of its direction; `dora_scale` is not in them.
    """
    down, up = module.leaves.get("lora_down.weight"), module.leaves.get("lora_up.weight")
    if down is None or up is None:
        return None
    rank = down.shape[0]
    scale = 1.0 if module.alpha is None else module.alpha / rank
    flat = [tensor.to(device=device, dtype=dtype).flatten(1) for tensor in (up, down)]
    return Factors(flat[0], flat[1], (up.shape[0], *down.shape[1:]), scale)


def as_leaves(found: Factors, dtype: torch.dtype) -> dict[str, Tensor]:
    """Factors as the leaves of a plain LoRA, on the CPU; the scale is left to alpha.

    Kernels lie in `lora_down.weight`, as all programs have it; `lora_up.weight` is (out, r, 1, 1) then.
    """
    rank, kernel = found.rank, found.shape[2:]
    down = found.down.to("cpu", dtype).reshape(rank, found.shape[1], *kernel).contiguous()
    up = found.up.to("cpu", dtype).reshape(found.shape[0], rank, *(1 for _ in kernel)).contiguous()
    return {"lora_down.weight": down, "lora_up.weight": up}
