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

from library.errors import UserError
from library.options.modules import LYCORIS
from library.weights.files import read_tensors
from networks.facade import text_encoder_facade, unet_facade
from networks.lycoris_mended import mend
from networks.lycoris_presets import PRESETS


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


def merge_lycoris(file: str | Path, strength: float, text_encoder: Any, unet: Any) -> int:
    """Merge a file of LyCORIS into a model for good (`--base_weights`), in float32; returns how many modules.

    `text_encoder` and `unet` are the model's own; weights keep their dtype and device. LyCORIS' own call for a whole
    network leaves out the strength.

    Raises:
        UserError: the file holds modules that the model lacks, or kinds that LyCORIS doesn't know. Nothing is merged.
    """
    tensors = read_tensors(file)
    facades = text_encoder_facade(text_encoder), unet_facade(unet)
    make = load(LYCORIS).create_network_from_weights
    network, _ = make(strength, str(file), None, *facades, weights_sd=tensors, for_inference=True)
    layers = [*network.text_encoder_loras, *network.unet_loras]
    held = {key.partition(".")[0] for key in tensors}
    if strange := sorted(held - {layer.lora_name for layer in layers}):
        wrong = f"{len(strange)} of its {len(held)} modules are not in this base model, e.g. {strange[0]}"
        raise UserError.single(str(file), wrong, "use a LyCORIS file of the same model family")
    with torch.no_grad():
        for layer in layers:
            _merge(layer, strength)
    return len(layers)


def _merge(layer: Any, strength: float) -> None:
    """LyCORIS computes a merged weight in the dtype of the frozen one, which meanwhile is float32, laid out plainly."""
    module = layer.org_module[0]
    kept = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}
    for name, values in kept.items():
        module.get_parameter(name).data = values.float().contiguous()
    layer.merge_to(strength)
    for name, values in kept.items():
        parameter = module.get_parameter(name)
        parameter.data = values.copy_(parameter.data)


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
