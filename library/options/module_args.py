"""The settings (`--network_args`) of our network modules beside networks.lora, for a dry run to check without torch.

What they mean is written in the modules themselves. A setting of networks.lora that isn't here has no sense there: the
module says so instead of ignoring it.
"""

from collections.abc import Iterable, Mapping

from library.options.flags import Flag


def _table(flags: Iterable[Flag]) -> Mapping[str, Flag]:
    return {flag.name: flag for flag in flags}


_CONV = (
    Flag("conv_dim", "int", limits=(("ge", 0),), synonyms={"None": None}),
    Flag("conv_alpha", "float", limits=(("ge", 0),), synonyms={"None": None}),
)
_DROPOUTS = tuple(
    Flag(name, "float", limits=(("ge", 0), ("lt", 1))) for name in ("dropout", "rank_dropout", "module_dropout")
)
_BLOCKS = tuple(
    Flag(name, "str")
    for name in (
        *("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"),
        *("down_lr_weight", "mid_lr_weight", "up_lr_weight"),
    )
)
_RATIOS = tuple(
    Flag(name, "float", limits=(("gt", 0),))
    for name in ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
)
LORA_FA_ARGS = _table((*_CONV, *_DROPOUTS, *_BLOCKS, Flag("block_lr_zero_threshold", "float", limits=(("ge", 0),))))
DYLORA_ARGS = _table((Flag("unit", "int", default=1, limits=(("ge", 1),)), *_CONV, *_DROPOUTS, *_RATIOS))
OFT_ARGS = _table((Flag("enable_all_linear", "flag", default=False), Flag("enable_conv", "flag", default=False)))
UNET_ONLY = frozenset({"networks.oft"})
"""Modules of ours that leave text encoders as they are."""
