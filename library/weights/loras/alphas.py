"""One alpha for all modules of a file, and what becomes of files that have several.

A module's change is alpha / rank * up @ down, and where ranks differ alphas may, too. diffusers (0.42) then misses
those of attention layers and of all of the first text encoder: its table of alphas names them otherwise than the
modules, so they get the commonest alpha of their part. So what we make anew shares one alpha, and the rest of a scale
is in the up-factors.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import isfinite

import torch
from torch import Tensor

from library.errors import UserError
from library.weights.check import is_finite
from library.weights.loras.forms import Factors, as_leaves, even, factors
from library.weights.loras.lora import Lora, Module, alpha_text

_MISSED = re.compile(r"lora_unet_.+_attn[12]_to_(q|k|v|out_0)|lora_te1?_.+|lora_te2_.+_self_attn_.+")
_PART = re.compile(r"lora_(unet|te[12]?)_")


def own_alpha(found: Factors) -> float:
    """The alpha with which the factors can be stored as they are."""
    return found.scale * found.rank


def commonest(alphas: Iterable[float]) -> float:
    """The alpha that most of them are, as files store it; 0 doesn't count, and without any other it is 1."""
    stored = (float(torch.tensor(alpha, dtype=torch.float32)) for alpha in alphas)
    counts = Counter(alpha for alpha in stored if alpha and isfinite(alpha))
    return counts.most_common(1)[0][0] if counts else 1.0


def leaves_with(found: Factors, alpha: float, dtype: torch.dtype, here: str) -> dict[str, Tensor]:
    """Factors as the leaves of a plain LoRA of this alpha, on the CPU: `forms.as_leaves`, but for the up-factor, which
    takes up what the scale is more than alpha / rank. In float16 both factors get about the same size.

    Args:
        here: how messages call the module.

    Raises:
        UserError: a number is too large for `dtype`.
    """
    scaled = replace(found, up=found.up * (own_alpha(found) / alpha), scale=1.0)
    leaves = as_leaves(even(scaled) if dtype == torch.float16 else scaled, dtype)
    if not all(map(is_finite, leaves.values())):
        advice = "use --save_precision float or bf16" if dtype == torch.float16 else "look at it with check_lora.py"
        raise UserError.single(here, f"has numbers that are too large for {str(dtype)[6:]}", advice)
    return leaves


def with_one_alpha(lora: Lora) -> Lora:
    """The same changes with the commonest alpha in all plain modules. Those that have it stay as they are, bit for bit;
    in the others the up-factors are multiplied: exactly by powers of 2, else within the rounding of their dtype.

    Raises:
        UserError: a number gets too large for its dtype.
    """
    alphas = {name: _alpha(module) for name, module in lora.modules.items() if module.is_plain}
    alpha = commonest(alphas.values())
    found = dict(lora.modules)
    for name, own in alphas.items():
        module = lora.modules[name]
        made = None if own == alpha else factors(module, torch.float64)
        if made is not None:
            leaves = leaves_with(made, alpha, module.leaves["lora_up.weight"].dtype, f"{lora.path}: {name}")
            module = replace(module, leaves={**module.leaves, **leaves})
        found[name] = replace(module, alpha=alpha)
    return lora.with_modules(found, telling(lora.metadata, alpha) if alphas else lora.metadata)


def telling(metadata: Mapping[str, str], alpha: float, conv_dim: str | None = None) -> dict[str, str]:
    """Metadata with the alpha of all modules, also of 3x3 convolutions where these are spoken of; there the rank, too,
    if it is given."""
    found = {**metadata, "ss_network_alpha": alpha_text(alpha)}
    try:
        told = json.loads(metadata.get("ss_network_args", "{}"))
    except ValueError:
        return found
    if isinstance(told, dict) and "conv_dim" in told:
        found["ss_network_args"] = json.dumps(
            {**told, "conv_dim": conv_dim or told["conv_dim"], "conv_alpha": alpha_text(alpha)}
        )
    return found


def otherwise_in_diffusers(modules: Mapping[str, Module]) -> dict[str, float]:
    """The plain modules of a file with underscored names that diffusers gives another strength than they have, and how
    many times theirs that is; 0 stands for one that has none itself."""
    parts: dict[str, list[Module]] = {}
    for module in modules.values():
        if module.is_plain and (part := _PART.match(module.name)):
            parts.setdefault(part[1], []).append(module)
    found: dict[str, float] = {}
    for here in parts.values():
        counts = Counter(module.alpha for module in here if module.alpha is not None)
        if not counts:
            continue
        taken = counts.most_common(1)[0][0]
        for module in here:
            own = _alpha(module)
            if own != taken and (module.alpha is None or _MISSED.fullmatch(module.name)):
                found[module.name] = taken / own if own else 0.0
    return found


def _alpha(module: Module) -> float:
    return float(module.leaves["lora_down.weight"].shape[0]) if module.alpha is None else module.alpha
