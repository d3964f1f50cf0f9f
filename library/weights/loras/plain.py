"""Modules of LyCORIS' kinds made plain LoRA modules, which is exact where they have factors, and what a file says of
itself after that."""

import json
from collections.abc import Iterable, Mapping
from math import prod

from library.console import track, warn
from library.weights.loras.alphas import commonest, leaves_with, own_alpha
from library.weights.loras.amended import amended
from library.weights.loras.forms import factors, kind
from library.weights.loras.lora import Lora, Module, family_of, ranks_and_alphas

_LYCORIS = "lycoris."


def as_lora(lora: Lora) -> Lora:
    """The same changes with plain LoRA modules, as far as they have exact factors; those that are plain already stay
    as they are, and the new ones have their alpha, or the commonest of their own.

    Raises:
        UserError: a new number is too large for the dtype of the file.
    """
    family = family_of(lora)
    found = {
        name: factors(module, family=family)
        for name, module in track(lora.modules.items(), "factors", len(lora.modules))
        if not module.is_plain
    }
    kept = [name for name, made in found.items() if made is None]
    if kept:
        first = f"{kept[0]} ({kind(lora.modules[kept[0]])})"
        warn(f"{len(kept)} modules have no exact factors and stay as they are, e.g. {first}")
    if len(kept) == len(found):
        return lora
    told = [one.alpha for one in lora.modules.values() if one.is_plain and one.alpha is not None]
    alpha = commonest(told or [own_alpha(made) for made in found.values() if made is not None])
    modules = dict(lora.modules)
    for name, made in found.items():
        if made is not None:
            old = lora.modules[name].leaves
            leaves = leaves_with(made, alpha, next(iter(old.values())).dtype, f"{lora.path}: {name}")
            more = {leaf: tensor for leaf, tensor in old.items() if leaf == "dora_scale"}
            modules[name] = Module(name, leaves | more, alpha)
    plain = [module for module in modules.values() if module.is_plain]
    dim, whole = ranks_and_alphas(plain)
    metadata = amended(lora.metadata, dim=dim, alpha=whole, comment="made a plain LoRA of LyCORIS modules")
    return lora.with_modules(modules, plain_metadata(metadata, modules.values()))


def plain_metadata(metadata: Mapping[str, str], modules: Iterable[Module]) -> dict[str, str]:
    """What a file says of its network, where that was one of LyCORIS and all modules are plain now."""
    modules = list(modules)
    if not metadata.get("ss_network_module", "").startswith(_LYCORIS) or not all(module.is_plain for module in modules):
        return dict(metadata)
    convs = [module for module in modules if prod(module.leaves["lora_down.weight"].shape[2:]) > 1]
    rank, alpha = ranks_and_alphas(convs)
    arguments = {"conv_dim": rank, "conv_alpha": alpha} if convs else {}
    return {**metadata, "ss_network_module": "networks.lora", "ss_network_args": json.dumps(arguments)}
