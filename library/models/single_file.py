"""Names of the original layout -> names of diffusers' and transformers' modules.

The only place that calls diffusers' converters. They get stand-ins for tensors, so that a conversion is a table of
names, and of which rows of a tensor are meant; nothing is read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.loaders import single_file_utils

from library.errors import UserError
from library.models.families import Family, Part
from library.models.headers import Entry, Header
from library.models.info import PartInfo
from library.models.tensors import Source

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."


@dataclass(frozen=True)
class _StandIn:
    """A tensor of a file as the converters see it: they move it, take rows of it, cut 1x1 kernels off, or turn it."""

    name: str
    header: Header
    entry: Entry
    rows: tuple[int, int] | None = None
    turned: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def ndim(self) -> int:
        return len(self.entry.shape)

    def __getitem__(self, index: Any) -> "_StandIn":
        rows = index[0] if isinstance(index, tuple) else index
        first, last, _ = rows.indices(self.shape[0])
        return self if (first, last) == (0, self.shape[0]) else replace(self, rows=(first, last))

    def _turn(self) -> "_StandIn":
        return replace(self, turned=True)

    T = property(_turn)

    def contiguous(self) -> "_StandIn":
        return self

    clone = detach = contiguous


def sources(family: Family, part: Part, info: PartInfo, module: torch.nn.Module) -> Iterator[Source]:
    """Where each tensor of a part stands in its files, by the module's names, text encoders without `text_model.`.

    Raises:
        UserError: a tensor is missing that the converters can't do without.
    """
    prefix = _usual_prefix(family, part)
    inside = {
        prefix + name.removeprefix(info.prefix): _StandIn(name, header, entry)
        for header in info.headers
        for name, entry in header.entries.items()
        if name.startswith(info.prefix)
    }
    try:
        converted = _convert(family, part, info, module, inside)
    except KeyError as missing:
        wrong = f"lacks the tensor {missing.args[0]}"
        raise UserError.single(info.where, wrong, "the file is incomplete or of another family") from missing
    for target, found in converted.items():
        if found is not None:
            yield Source(target, found.header.path, found.entry, found.name, found.rows, found.turned)


def _usual_prefix(family: Family, part: Part) -> str:
    """What the converters expect before a part's names."""
    usual = {"unet": _UNET, "vae": _VAE}
    return usual.get(part) or next(encoder.prefix for encoder in family.text_encoders if encoder.part == part)


def _convert(
    family: Family, part: Part, info: PartInfo, module: torch.nn.Module, inside: Mapping[str, _StandIn]
) -> dict[str, _StandIn | None]:
    if part == "unet":
        return single_file_utils.convert_ldm_unet_checkpoint(inside, info.config)
    if part == "vae":
        return single_file_utils.convert_ldm_vae_checkpoint(inside, info.config)
    encoder = next(encoder for encoder in family.text_encoders if encoder.part == part)
    if encoder.open_clip:
        converted = single_file_utils.convert_open_clip_checkpoint(module, inside, prefix=encoder.prefix)
        straight = "text_projection.weight"
        if encoder.prefix + straight in inside:
            converted.setdefault(straight, inside[encoder.prefix + straight])
    else:
        converted = single_file_utils.convert_ldm_clip_checkpoint(inside)
    return {name.removeprefix("text_model."): value for name, value in converted.items()}
