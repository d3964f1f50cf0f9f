"""Network modules of other projects, such as `lycoris.kohya`: importing them so that they fit this program, the values
they need for `--network_args`, and an exact state of a network whose `state_dict` is no such thing.
"""

import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from networks.facade import text_encoder_facade, unet_facade
from networks.lycoris_mended import mend
from networks.lycoris_presets import PRESETS

LYCORIS = "lycoris.kohya"


def load(name: str) -> ModuleType:
    """Import a network module by its dotted name.

    LyCORIS gets our presets under its own names, and says only what is an error: it tells dozens of lines on stdout.
    What of it is wrong here is mended (networks.lycoris_mended).
    """
    module = importlib.import_module(name)
    if name == LYCORIS:
        logging.getLogger("LyCORIS").setLevel(logging.ERROR)
        module.PRESET.update(PRESETS)
        module.LycorisNetworkKohya.apply_preset(PRESETS["full"])
        mend(module)
    return module


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


def merge_weights(name: str, file: str | Path, strength: float, text_encoder: Any, unet: Any) -> int:
    """Add a file of the module `name` to a model's weights for good (`--base_weights`), and say how many modules.

    `text_encoder` and `unet` are the model's own. LyCORIS' own call for a whole network leaves out the strength.
    """
    facades = text_encoder_facade(text_encoder), unet_facade(unet)
    network, tensors = load(name).create_network_from_weights(strength, str(file), None, *facades, for_inference=True)
    weight = next(unet.parameters())
    with torch.no_grad():
        if name != LYCORIS:
            network.merge_to(*facades, tensors, weight.dtype, weight.device)
            return len(tensors)
        layers = [*network.text_encoder_loras, *network.unet_loras]
        for layer in layers:
            layer.merge_to(strength)
    return len(layers)


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
