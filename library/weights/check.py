"""Reading a written LoRA file back, to see that what was saved can be used."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.weights.files import read_tensors

_PREFIXES = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_", "lora_te2_")}
_NAMES = {"unet": "U-Net", "text_encoder": "text encoder"}


class BadWeightsError(ValueError):
    """A weight file that must not be kept: wrong keys, wrong shapes, or numbers that are not finite."""


def check_file(
    path: Path,
    expected: Iterable[str] | Mapping[str, Collection[int]] | None,
    *,
    trained_parts: Iterable[str] = (),
    called: str | Path | None = None,
) -> list[str]:
    """Read a file back and return warnings: one for each of `trained_parts` whose up-factors are all still zero.

    `expected` are the keys, with shapes if it is a mapping, None if any will do; `trained_parts` are "unet" and
    "text_encoder" where they had updates; `called` is the name that messages give the file. Raises BadWeightsError if a
    key is missing, surplus or of another shape, or a number is not finite.
    """
    tensors, place = read_tensors(path), called or path
    keys = set(tensors if expected is None else expected)
    if missing := sorted(keys - tensors.keys()):
        raise BadWeightsError(f"{place}: {len(missing)} keys are missing, e.g. {missing[0]}")
    if surplus := sorted(tensors.keys() - keys):
        raise BadWeightsError(f"{place}: {len(surplus)} keys should not be there, e.g. {surplus[0]}")
    if isinstance(expected, Mapping):
        for key, tensor in tensors.items():
            if tuple(tensor.shape) != tuple(expected[key]):
                raise BadWeightsError(f"{place}: {key} has shape {tuple(tensor.shape)}, not {tuple(expected[key])}")
    bad = [key for key, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        raise BadWeightsError(f"{place}: {len(bad)} of {len(tensors)} tensors are not finite, e.g. {bad[0]}")
    return [
        f"{place}: the {_NAMES[part]} was trained, yet all its up-factors are still zero, so that the file changes "
        "nothing there"
        for part in trained_parts
        if _all_zero(tensors, part)
    ]


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are; those of 8 bits are looked at as wider ones, which torch can compute with."""
    wide = tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor
    return bool(torch.isfinite(wide).all())


def _all_zero(tensors: Mapping[str, Tensor], part: str) -> bool:
    ups = [
        tensor for key, tensor in tensors.items() if key.startswith(_PREFIXES[part]) and key.endswith(".lora_up.weight")
    ]
    return bool(ups) and not any(bool(tensor.any()) for tensor in ups)
