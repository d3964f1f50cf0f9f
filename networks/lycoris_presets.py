"""Which modules `--network_args preset=...` of LyCORIS trains on SD models, under LyCORIS' own names.

LyCORIS' tables aim at dozens of models: on SD1 and SD2 some of them name a layer twice and end in an error, `ia3` and
`attn-only` find nothing in the U-Net, and the first and last layers that others add are in no loader's list. These
train what files in the field hold, and say everything, for LyCORIS keeps what a preset leaves out from the last one.
"""

from collections.abc import Sequence
from typing import Any

_TRANSFORMERS = ("Transformer2DModel",)
_CONVOLUTIONS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
_TEXT = ("CLIPAttention", "CLIPMLP")
_ON_INPUT = {"train_on_input": True}


def _preset(
    unet: Sequence[str] = (), text: Sequence[str] = (), *, conv: bool = False, **others: dict[str, Any] | list[str]
) -> dict[str, Any]:
    """A preset of these module classes; `conv` trains 3x3 convolutions too."""
    everything: dict[str, Any] = {
        "enable_conv": conv,
        "unet_target_module": list(unet),
        "unet_target_name": [],
        "text_encoder_target_module": list(text),
        "text_encoder_target_name": [],
        "module_algo_map": {},
        "name_algo_map": {},
        "use_fnmatch": False,
        "exclude_name": [],
    }
    return everything | others


PRESETS = {
    "full": _preset((*_TRANSFORMERS, *_CONVOLUTIONS), _TEXT, conv=True),
    "full-lin": _preset((*_TRANSFORMERS, "ResnetBlock2D"), _TEXT),
    "attn-mlp": _preset(_TRANSFORMERS, _TEXT),
    "attn-only": _preset(("Attention",), ("CLIPAttention",)),
    "unet-only": _preset((*_TRANSFORMERS, *_CONVOLUTIONS), conv=True),
    "unet-transformer-only": _preset(_TRANSFORMERS),
    "unet-convblock-only": _preset(_CONVOLUTIONS, conv=True),
    "ia3": _preset(
        unet_target_name=[r".*\.to_k$", r".*\.to_v$", r".*\.ff\.net\.2$"],
        text_encoder_target_name=[r".*\.k_proj$", r".*\.v_proj$", r".*\.mlp\.fc2$"],
        name_algo_map={r".*\.ff\.net\.2$": _ON_INPUT, r".*\.mlp\.fc2$": _ON_INPUT},
    ),
}
