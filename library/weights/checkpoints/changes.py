"""What a module of a LoRA file makes of a weight of a base model, for every kind of module that can be merged.

With W the weight, t the strength and D = alpha / rank * up @ down (or what LyCORIS has for it):

- LoRA, LoCon, LoHa, LoKr, whole differences: W + t D
- DoRA: W + t (m (W + D) / ||W + D|| - W), the norm over all axes but that of m (Liu et al., arXiv 2402.09353)
- norms and biases: w + t d
- IA3: W (1 + t v), v for each output, or for each input where `on_input` is set (LyCORIS)
- OFT of networks.oft: (I + t (R - I))^T W block by block, R = (I + Q) (I - Q)^-1, Q = B - B^T with ||Q|| <= alpha * out
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from library.errors import UserError
from library.weights.loras.forms import factors
from library.weights.loras.lora import Module
from library.weights.loras.lycoris import Kind, direction

Leaf = Literal["weight", "bias"]
OFT_PREFIX = "oft_unet_"
_TINY_NORM, _TINY_TURN = 1e-12, 1e-8
_MERGED: tuple[Kind, ...] = ("lora", "tucker", "loha", "lokr", "full", "norm", "ia3")
_OF_BIAS = ("diff_b", "b_norm")
_IA3 = {"weight", "on_input"}
_ADVICE = "merge_lora.py merges LoRA, DoRA, LoCon, LoHa, LoKr, full, norms, IA3 and the OFT of networks.oft"


def leaves_of(module: Module, source: object, *, undo: bool = False) -> tuple[Leaf, ...]:
    """Which tensors of the base model's module this one changes.

    Args:
        source: the file, as messages name it.
        undo: they are to be taken out again.

    Raises:
        UserError: it is of a kind that can't be merged, or whose merge can't be undone, or its alpha is not finite.
    """
    names = set(module.leaves)
    kind = direction(module.leaves)
    ours = names == {"oft_blocks"} and module.name.startswith(OFT_PREFIX)
    if kind not in _MERGED and not ours:
        wrong = f"{module.name} is of a kind that can't be merged ({kind or 'unknown'}: {', '.join(sorted(names))})"
        raise UserError.single(str(source), wrong, _ADVICE)
    if module.alpha is not None and not math.isfinite(module.alpha):
        raise UserError.single(str(source), f"{module.name}.alpha is no finite number", "the file is damaged")
    if undo and "dora_scale" in names:
        wrong = "is a DoRA, which can't be taken out of a checkpoint: the lengths of the old weights are in it no more"
        raise UserError.single(str(source), wrong, "keep the checkpoint that it was merged into")
    found: list[Leaf] = []
    if names - set(_OF_BIAS):
        found.append("weight")
    if names & set(_OF_BIAS):
        found.append("bias")
    return tuple(found)


def changed(weight: Tensor, module: Module, strength: float, *, leaf: Leaf = "weight", undo: bool = False) -> Tensor:
    """A weight (out, in[, k, k]), or a bias or norm (n,), with a module's change in it, in the weight's own dtype.

    Computed in that dtype on the weight's device, where the result may take the weight's place in memory.

    Args:
        undo: take out what the same call put in.

    Raises:
        UserError: the shapes don't fit, or an IA3 or OFT can't be undone.
    """
    try:
        if leaf == "bias":
            found = _plain_difference(module, _OF_BIAS, weight)
        elif "oft_blocks" in module.leaves:
            return _turned(weight, module, strength, undo=undo)
        elif module.leaves.keys() <= _IA3:
            return _scaled(weight, module, strength, undo=undo)
        elif "dora_scale" in module.leaves:
            return _decomposed(weight, module, strength)
        else:
            found = _plain_difference(module, ("diff", "w_norm"), weight)
        signed = -strength if undo else strength
        return _added(weight, module, signed) if found is None else weight.add_(found, alpha=signed)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        wrong = f"doesn't fit the model's {leaf} of shape {tuple(weight.shape)} ({str(error).partition(chr(10))[0]})"
        raise UserError.single(module.name, wrong, "use a LoRA of the same model family") from error


def _plain_difference(module: Module, names: tuple[str, ...], like: Tensor) -> Tensor | None:
    found = next((module.leaves[name] for name in names if name in module.leaves), None)
    return None if found is None else found.to(like.device, like.dtype).reshape(like.shape)


def _added(weight: Tensor, module: Module, strength: float) -> Tensor:
    """W + strength * D; the product goes straight into the weight."""
    found = factors(module, weight.dtype, weight.device)
    if found is None:
        raise UserError.single(module.name, f"has only {', '.join(sorted(module.leaves))}", _ADVICE)
    rows, scale = weight.view(found.up.shape[0], found.down.shape[1]), found.scale * strength
    if _is_one(found.up):
        rows.add_(found.down, alpha=scale)
    elif _is_one(found.down):
        rows.add_(found.up, alpha=scale)
    else:
        rows.addmm_(found.up, found.down, alpha=scale)
    return weight


def _is_one(matrix: Tensor) -> bool:
    """Is it the matrix that products stay the same with? LyCORIS kinds that are no narrower have it as a factor."""
    size = matrix.shape[0]
    return size == matrix.shape[1] and bool(matrix.diagonal().eq(1).all()) and int(matrix.count_nonzero()) == size


def _decomposed(weight: Tensor, module: Module, strength: float) -> Tensor:
    rest = replace(module, leaves={name: value for name, value in module.leaves.items() if name != "dora_scale"})
    both = _added(weight.clone(), rest, 1.0)
    magnitudes = module.leaves["dora_scale"].to(weight.device, weight.dtype)
    axis = 0 if magnitudes.shape[0] == weight.shape[0] else 1
    others = tuple(number for number in range(weight.dim()) if number != axis)
    gains = torch.linalg.vector_norm(both, dim=others, keepdim=True).clamp_(min=_TINY_NORM).reciprocal_()
    gains *= magnitudes.reshape(gains.shape)
    return torch.lerp(weight, both.mul_(gains), strength)


def _scaled(weight: Tensor, module: Module, strength: float, *, undo: bool) -> Tensor:
    on_input = bool(module.leaves.get("on_input", torch.zeros(())).item())
    shape = [1] * weight.dim()
    shape[1 if on_input else 0] = weight.shape[1 if on_input else 0]
    gains = module.leaves["weight"].to(weight.device, weight.dtype).reshape(shape) * strength + 1
    if not undo:
        return weight.mul_(gains)
    if not gains.all():
        wrong = f"scales weights to 0 at strength {strength:g}, which can't be undone"
        raise UserError.single(module.name, wrong, "keep the checkpoint that it was merged into")
    return weight.div_(gains)


def _turned(weight: Tensor, module: Module, strength: float, *, undo: bool) -> Tensor:
    blocks = module.leaves["oft_blocks"].to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    alpha = 0.0 if module.alpha is None else module.alpha
    skew = blocks - blocks.mT
    norm = torch.linalg.vector_norm(skew)
    skew = skew * ((norm.clamp(max=alpha * weight.shape[0]) + _TINY_TURN) / (norm + _TINY_TURN))
    one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    turn = torch.lerp(one.expand_as(skew), torch.linalg.solve(one - skew, one + skew), strength)
    rows = weight.to(turn.dtype).reshape(turn.shape[0], turn.shape[1], -1)
    done = torch.linalg.solve(turn.mT, rows) if undo else torch.bmm(turn.mT, rows)
    return done.reshape(weight.shape).to(weight.dtype)
