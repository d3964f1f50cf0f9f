"""Which parts of a U-Net and of text encoders are computed again in the backward pass instead of being kept.

A unit is what diffusers and transformers can recompute by itself: a residual block or a transformer block of the
U-Net, a layer of a text encoder. All are, or every n-th, or only those with attention.
"""

from typing import Any, cast

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

_NEVER = "mid_block.resnets.0"


def checkpoint_unet(unet: nn.Module, every: int = 1, attention_only: bool = False) -> int:
    """Recompute the first of every `every` residual blocks and of every `every` transformer blocks, or with
    `attention_only` of the latter only. The U-Net goes into train mode, which nothing in it acts on but this.

    Returns:
        How many units are recomputed.
    """
    kinds = (BasicTransformerBlock,) if attention_only else (BasicTransformerBlock, ResnetBlock2D)
    chosen: set[int] = set()
    for kind in kinds:
        units = [id(one) for name, one in unet.named_modules() if isinstance(one, kind) and name != _NEVER]
        chosen.update(units[::every])

    def run(module: nn.Module, *arguments: Any) -> Any:
        if id(module) not in chosen:
            return module(*arguments)
        return checkpoint(module.__call__, *arguments, use_reentrant=False)

    cast(Any, unet).enable_gradient_checkpointing(run)
    unet.train()
    return len(chosen)


def checkpoint_text_encoder(text_encoder: nn.Module, every: int = 1) -> int:
    """Recompute the first of every `every` layers, all of which have attention; the encoder goes into train mode.

    Returns:
        How many layers are recomputed.
    """
    module = cast(Any, text_encoder)
    newer = getattr(module, "activation_checkpointing_enable", None)
    (newer or module.gradient_checkpointing_enable)({"use_reentrant": False})
    module.train()
    layers = [one for one in module.modules() if isinstance(one, GradientCheckpointingLayer)]
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number % every == 0
    return len(layers[::every])
