"""Network modules of other projects, such as `lycoris.kohya`: importing them so that they fit this program, the values
they need for `--network_args`, and an exact state of a network whose `state_dict` is no such thing.
"""

import importlib
import logging
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from networks.lycoris_presets import PRESETS

LYCORIS = "lycoris.kohya"


def load(name: str) -> ModuleType:
    """Import a network module by its dotted name.

    LyCORIS gets our presets under its own names, and says only what is an error: it tells dozens of lines on stdout.
    Its `dylora` draws from torch's generator instead of Python's, which gradient checkpointing does not wind back.
    """
    module = importlib.import_module(name)
    if name == LYCORIS:
        logging.getLogger("LyCORIS").setLevel(logging.ERROR)
        module.PRESET.update(PRESETS)
        module.LycorisNetworkKohya.apply_preset(PRESETS["full"])
        module.DyLoraModule.get_random_rank_weight = _random_block
    return module


def _random_block(layer: Any) -> Any:
    """What a `dylora` layer uses in this forward: the ranks up to a random block, which alone has gradients."""
    return layer.get_weight(int(torch.randint(layer.block_count, ())) * layer.block_size)


def arguments(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """`--network_args` as the module `name` reads them.

    LyCORIS takes any text for true where it doesn't convert it, and its algorithm ia3 is meant for its preset ia3.
    """
    found = dict(given)
    if name == LYCORIS:
        if "decompose_both" in found:
            found["decompose_both"] = str(found["decompose_both"]).lower() != "false"
        if str(found.get("algo")).lower() == "ia3":
            found.setdefault("preset", "ia3")
    return found


def exact_state(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by its path, as it is.

    What a network writes into files may be less: LyCORIS' `dylora` joins its parts, `full` subtracts the base's weight.
    """
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def load_exact_state(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `exact_state` gave. Raises ValueError if names or shapes differ."""
    own = exact_state(network)
    if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ValueError("the state is of another network")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
