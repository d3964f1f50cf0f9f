"""The kinds of module that LoRA and LyCORIS files have, told by their leaves, and the exact factors of those whose
change is made of small matrices: Tucker's LoCon, LoHa, LoKr.

With `scale` left out, a change W (out, in * kernel) is `up @ down`: Tucker's core goes into `down`; a Hadamard product
(A1 B1) o (A2 B2) has the row-wise Khatri-Rao product of A1 and A2 and the column-wise one of B1 and B2 as factors; a
Kronecker product (A1 B1) x (A2 B2) is (A1 x A2)(B1 x B2). Formulas of LyCORIS' paper and package (functional/*.py).
"""

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["lora", "tucker", "loha", "lokr", "dora", "full", "norm", "glora", "ia3", "oft", "sparse"]
"""`dora`: whatever has magnitudes beside its change; `tucker`: LoCon with a core; `full`: a whole matrix; `oft`: any
orthogonal one; `sparse`: a LoRA with a few numbers beside its factors, as old extractions have."""

_KINDS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("dora", re.compile(r"dora_scale")),
    ("sparse", re.compile(r"bias_(indices|values|size)")),
    ("tucker", re.compile(r"lora_mid\.weight")),
    ("lora", re.compile(r"lora_(down|up)\.weight")),
    ("loha", re.compile(r"hada_(w[12]_[ab]|t[12])")),
    ("lokr", re.compile(r"lokr_(w[12](_[ab])?|t[12])")),
    ("full", re.compile(r"diff(_b)?")),
    ("norm", re.compile(r"[wb]_norm")),
    ("glora", re.compile(r"([ab][12]|bm)\.weight")),
    ("oft", re.compile(r"oft_(blocks|diag)|rescale")),
    ("ia3", re.compile(r"weight|on_input")),
)
_NEEDED: Mapping[Kind, tuple[tuple[str, ...], ...]] = {
    "lora": (("lora_down.weight",), ("lora_up.weight",)),
    "tucker": (("lora_down.weight",), ("lora_up.weight",)),
    "sparse": (("lora_down.weight",), ("lora_up.weight",)),
    "loha": (("hada_w1_a",), ("hada_w1_b",), ("hada_w2_a",), ("hada_w2_b",)),
    "lokr": (("lokr_w1", "lokr_w1_a"), ("lokr_w1", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a"), ("lokr_w2", "lokr_w2_b")),
    "glora": (("a1.weight",), ("a2.weight",), ("b1.weight",), ("b2.weight",)),
    "ia3": (("weight",), ("on_input",)),
}

_SMALL = ("lora_", "hada_", "lokr_")
"""How leaves begin that are factors."""

Made = tuple[Tensor, Tensor, tuple[int, ...], int | None]
"""Factors `up`, `down`, the weight's shape, and the rank that alpha is divided by; None where alpha doesn't count."""
EXACT: tuple[Kind, ...] = ("tucker", "loha", "lokr")
"""Kinds besides a plain LoRA that have exact factors."""


def kind_of(leaves: Mapping[str, object]) -> Kind | None:
    """What a module with these leaves is; None if a leaf is no module's."""
    told = {next((kind for kind, known in _KINDS if known.fullmatch(leaf)), None) for leaf in leaves}
    return None if None in told else next((kind for kind, _ in _KINDS if kind in told), None)


def missing(leaves: Mapping[str, object]) -> str | None:
    """A leaf that a module with these can't do without; None if all are there."""
    told = direction(leaves)
    for alternatives in _NEEDED.get(told, ()) if told else (("lora_down.weight",),):
        if not any(leaf in leaves for leaf in alternatives):
            return alternatives[-1]
    return None


def misfit(leaves: Mapping[str, Tensor]) -> str | None:
    """What keeps the factors of a whole module from being multiplied, as messages say it; None if nothing does."""
    factors = {leaf: tensor for leaf, tensor in leaves.items() if leaf.startswith(_SMALL)}
    for leaf, tensor in factors.items():
        if not tensor.is_floating_point():
            return f"has a {leaf} of {str(tensor.dtype).removeprefix('torch.')}"
        if not tensor.numel():
            return f"has a {leaf} of shape {tuple(tensor.shape)}"
    match direction(leaves):
        case "lora" | "sparse":
            up, down = (leaves[f"lora_{way}.weight"] for way in ("up", "down"))
            fits = up.ndim > 1 < down.ndim and up[0].numel() == down.shape[0]
        case "loha":
            fits = _alike(factors) and _multiplies(factors)
        case "tucker" | "lokr":
            fits = _multiplies(factors)
        case _:
            return None
    shapes = " and ".join(str(tuple(tensor.shape)) for _, tensor in sorted(factors.items(), reverse=True))
    return None if fits else f"has factors that don't fit: {shapes}"


def _alike(hada: Mapping[str, Tensor]) -> bool:
    """Whether both sides of a Hadamard product have one size; torch would stretch a side of 1."""
    ends = set()
    for number in (1, 2):
        first, second = hada[f"hada_w{number}_a"], hada[f"hada_w{number}_b"]
        if first.ndim != 2 or second.ndim != 2:
            return False
        core = f"hada_t{number}" in hada
        if not core and first.shape[1] != second.shape[0]:
            return False
        ends.add((first.shape[1 if core else 0], second.shape[1]))
    return len(ends) == 1


def _multiplies(factors: Mapping[str, Tensor]) -> bool:
    try:
        made = made_of(factors, torch.float32, torch.device("meta"))
        if made is not None:
            (made[0] @ made[1]).view(made[2])
    except (RuntimeError, IndexError):
        return False
    return made is not None


def direction(leaves: Mapping[str, object]) -> Kind | None:
    """The kind without its magnitudes: what the change is made of."""
    return kind_of({leaf: None for leaf in leaves if leaf != "dora_scale"})


def made_of(leaves: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | None) -> Made | None:
    """The exact factors of a module, without its scale; None where it has none.

    Where they would be wider than the matrix is small, the matrix itself stands for one of them.
    """
    kind = direction(leaves)
    have = {leaf: tensor.to(device=device, dtype=dtype) for leaf, tensor in leaves.items()}
    match kind:
        case "lora":
            down, up = have["lora_down.weight"], have["lora_up.weight"]
            return up.flatten(1), down.flatten(1), (up.shape[0], *down.shape[1:]), down.shape[0]
        case "tucker":
            down, up, core = have["lora_down.weight"], have["lora_up.weight"], have["lora_mid.weight"]
            whole = torch.einsum("pq...,qi->pi...", core, down.flatten(1))
            return _narrow(up.flatten(1), whole.flatten(1), (up.shape[0], *whole.shape[1:]), down.shape[0])
        case "loha":
            return _loha(have)
        case "lokr":
            return _lokr(have)
    return None


def _loha(have: Mapping[str, Tensor]) -> Made:
    (a1, b1, kernel), (a2, b2, _) = (_hada(have, number) for number in (1, 2))
    rank = int(have["hada_w1_b"].shape[0])
    shape = (a1.shape[0], have["hada_w1_b"].shape[1], *kernel)
    if a1.shape[1] * a2.shape[1] > min(a1.shape[0], b1.shape[1]):
        return _whole((a1 @ b1) * (a2 @ b2), shape, rank)
    up = torch.einsum("oi,oj->oij", a1, a2).flatten(1)
    down = torch.einsum("in,jn->ijn", b1, b2).flatten(0, 1)
    return up, down, shape, rank


def _hada(have: Mapping[str, Tensor], number: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Two matrices of one side, and its kernel: linear layers' `w_a` is (out, r), of Tucker's it is (r, out)."""
    first, second, core = have[f"hada_w{number}_a"], have[f"hada_w{number}_b"], have.get(f"hada_t{number}")
    if core is None:
        return first, second, ()
    return first.T, torch.einsum("ij...,jr->ir...", core, second).flatten(1), tuple(core.shape[2:])


def _lokr(have: Mapping[str, Tensor]) -> Made:
    """LyCORIS divides alpha by the rank of whichever side is in two parts; with both whole, alpha doesn't count."""
    parted = [have[leaf].shape[1] for leaf in ("lokr_w1_a",) if leaf in have]
    parted += [have[leaf].shape[0 if "lokr_t2" in have else 1] for leaf in ("lokr_w2_a",) if leaf in have]
    (a1, b1, _), (a2, b2, kernel) = (_kron_side(have, number) for number in (1, 2))
    b2 = b2.view(b2.shape[0], -1, *kernel)
    shape = (a1.shape[0] * a2.shape[0], b1.shape[1] * b2.shape[1], *kernel)
    up = torch.einsum("ai,cj->acij", a1, a2).reshape(shape[0], -1)
    down = torch.einsum("ib,jd...->ijbd...", b1, b2).reshape(up.shape[1], -1)
    return _narrow(up, down, shape, parted[0] if parted else None)


def _kron_side(have: Mapping[str, Tensor], number: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    whole, core = have.get(f"lokr_w{number}"), have.get(f"lokr_t{number}")
    if whole is not None:
        flat = whole.flatten(1)
        one = torch.eye(min(flat.shape), dtype=flat.dtype, device=flat.device)
        kernel = tuple(whole.shape[2:])
        return (one, flat, kernel) if flat.shape[0] <= flat.shape[1] else (flat, one, kernel)
    first, second = have[f"lokr_w{number}_a"], have[f"lokr_w{number}_b"]
    if core is None:
        return first, second.flatten(1), tuple(second.shape[2:])
    return first.T, torch.einsum("ij...,jr->ir...", core, second).flatten(1), tuple(core.shape[2:])


def _narrow(up: Tensor, down: Tensor, shape: tuple[int, ...], rank: int | None) -> Made:
    if up.shape[1] > min(up.shape[0], down.shape[1]):
        return _whole(up @ down, shape, rank)
    return up, down, shape, rank


def _whole(matrix: Tensor, shape: tuple[int, ...], rank: int | None) -> Made:
    one = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
    return (one, matrix, shape, rank) if matrix.shape[0] <= matrix.shape[1] else (matrix, one, shape, rank)
