"""`--base_weights`: files of LoRA, DoRA and LyCORIS merged into the frozen model, before whatever network module trains
on it.

Whether the files fit is told from their headers before a model is loaded (library.training.start_weights).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from library.weights.loras.keys import read_lora
from library.weights.loras.modules import lycoris_kind
from networks import foreign
from networks.lora import create_network_from_weights


def merge_base_weights(
    unet: Any, text_encoder: Any, files: Sequence[str | Path], strengths: Sequence[float] = ()
) -> list[str]:
    """Merge such files into these models, one after the other, in float32; weights keep their dtype and device.

    Call it before a network is made: DoRA takes the weights as they are then, and outputs that were cached of other
    text encoders don't fit any more.

    Args:
        text_encoder: a CLIP text model, the list of both of SDXL, or None.
        strengths: of each file; 1 for those that have none.

    Returns:
        One line for each file.

    Raises:
        UserError: a file is none of these, or not one of this model.
    """
    lines = []
    for number, file in enumerate(files):
        strength = strengths[number] if number < len(strengths) else 1.0
        tensors = read_lora(file)
        if lycoris_kind(tensors):
            merged = foreign.merge_lycoris(file, strength, text_encoder, unet)
        else:
            make = create_network_from_weights
            network, _ = make(strength, file, None, text_encoder, unet, weights_sd=tensors, for_inference=True)
            network.merge_to(text_encoder, unet, tensors)
            merged = len(network.modules_built)
        lines.append(f"merged {file} into the base model at {strength:g}: {merged} modules")
    return lines
