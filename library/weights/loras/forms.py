"""What a module of a LoRA file means: two factors, whatever program wrote it, or a whole matrix where it isn't of low
rank. LoCon with a Tucker core, LoHa and LoKr are products of small matrices, so they have exact factors too.
"""

import re
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from library.models.families import Family
from library.weights.loras.lora import Module
from library.weights.loras.lycoris import Kind, kind_of, made_of
from library.weights.loras.names import kernel_of

_PROJECTION = re.compile(r"lora_unet_.+_attentions_\d+_proj_(in|out)")


@dataclass(frozen=True)
class Factors:
    """A change of one weight: `scale * up @ down`, reshaped to `shape`.

    Attributes:
        up: (out, r); down: (r, in * kernel), both of one dtype; a scale is not in them.
        shape: of the weight: (out, in) or (out, in, k, k).
        scale: alpha / rank of the file's own module; its width may be greater than that rank (LoHa, LoKr).
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


def factors(
    module: Module,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
    family: Family | None = None,
) -> Factors | None:
    """The exact factors of a module in `dtype`; None where it has none (whole matrices, norms, IA3, OFT ...).

    Of a DoRA these are the factors of its direction; `dora_scale` is not in them. LoHa and LoKr don't say whether they
    are on a convolution: there the module's name does, and for `proj_in` and `proj_out` the family, without which they
    count as Linear.
    """
    made = made_of(module.leaves, dtype, device)
    if made is None:
        return None
    up, down, shape, rank = made
    kernel: tuple[int, ...] = ()
    if len(shape) == 2 and "lora_down.weight" not in module.leaves:
        projects = family is not None and family.conv_projections and _PROJECTION.fullmatch(module.name)
        kernel = (1, 1) if projects else kernel_of(module.name)
    if kernel and shape[1] % prod(kernel) == 0:
        shape = (shape[0], shape[1] // prod(kernel), *kernel)
    scale = 1.0 if module.alpha is None or rank is None else module.alpha / rank
    return Factors(up, down, shape, scale)


def delta(module: Module, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> Tensor | None:
    """What a module adds to the weight, in the weight's shape: of what has factors, of whole matrices (`diff`) and of
    norms (`w_norm`); None of what depends on the weight itself (DoRA, IA3, OFT, GLoRA). Biases are not in it.
    """
    match kind(module):
        case "full" | "norm":
            whole = module.leaves.get("diff", module.leaves.get("w_norm"))
            return None if whole is None else whole.to(device=device, dtype=dtype)
        case "dora":
            return None
    found = factors(module, dtype, device)
    return None if found is None else found.product()


def kind(module: Module) -> Kind:
    """What a module is, by its leaves.

    Raises:
        ValueError: they are no module's, which `lora.read` refuses.
    """
    found = kind_of(module.leaves)
    if found is None:
        raise ValueError(f"{module.name} has leaves of no known kind: {', '.join(module.leaves)}")
    return found


def as_leaves(found: Factors, dtype: torch.dtype) -> dict[str, Tensor]:
    """Factors as the leaves of a plain LoRA, on the CPU; the scale is left to alpha.

    Kernels lie in `lora_down.weight`, as all programs have it; `lora_up.weight` is (out, r, 1, 1) then.
    """
    rank, kernel = found.rank, found.shape[2:]
    down = found.down.to("cpu", dtype).reshape(rank, found.shape[1], *kernel).contiguous()
    up = found.up.to("cpu", dtype).reshape(found.shape[0], rank, *(1 for _ in kernel)).contiguous()
    return {"lora_down.weight": down, "lora_up.weight": up}


def even(found: Factors) -> Factors:
    """The same change, with columns and rows of about the same size, so that a dtype of few exponents keeps the digits
    of both; powers of 2 make it exact."""
    up, down = found.up.norm(dim=0), found.down.norm(dim=1)
    usable = (up > 0) & (down > 0) & up.isfinite() & down.isfinite()
    exponent = torch.where(usable, (down / up).log2() / 2, torch.zeros_like(up)).round()
    factor = torch.exp2(exponent)
    return Factors(found.up * factor, found.down / factor[:, None], found.shape, found.scale)
