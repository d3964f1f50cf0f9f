"""Names of a single file in the original layout -> names of diffusers' and transformers' modules.

The only place that calls diffusers' converters. They get stand-ins for tensors, so that a conversion is a table of
names and nothing is read.
"""

from collections.abc import Iterator
from typing import Any

from diffusers.loaders import single_file_utils

from library.models.headers import Header
from library.models.recognise import TEXT, UNET, VAE
from library.models.tensors import Source


class _StandIn:
    """A tensor of the file as the converters see it. They only move it, or cut 1x1 kernels off with an index."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape, self.ndim = name, shape, len(shape)

    def __getitem__(self, index: object) -> "_StandIn":
        return self


def sources(part: str, header: Header, config: dict[str, Any]) -> Iterator[Source]:
    """Where each tensor of a part (`unet`, `vae`, `text_encoder`) stands in the file."""
    prefix = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}[part]
    inside = {n: _StandIn(n, entry.shape) for n, entry in header.entries.items() if n.startswith(prefix)}
    if part == "unet":
        converted = single_file_utils.convert_ldm_unet_checkpoint(inside, config)
    elif part == "vae":
        converted = single_file_utils.convert_ldm_vae_checkpoint(inside, config)
    else:
        converted = single_file_utils.convert_ldm_clip_checkpoint(inside)
        converted = {name.removeprefix("text_model."): value for name, value in converted.items()}
    for target, stand_in in converted.items():
        yield Source(target, header.path, header.entries[stand_in.name])
