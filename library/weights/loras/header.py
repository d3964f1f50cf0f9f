"""The modules that a LoRA file holds, told from its header alone. Imports no torch and reads no weights."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

from library.models.info import ModelInfo
from library.models.lora_targets import targets
from library.models.pickles import read_weights
from library.weights.loras.keys import modules_of, spellings
from library.weights.loras.modules import FileModule, lycoris_kind


@dataclass(frozen=True)
class _StandIn:
    """A tensor of a header: all that is asked of it is its shape; read as a number, as an alpha is, it is 1."""

    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def reshape(self, shape: tuple[int, ...]) -> "_StandIn":
        rest = prod(self.shape) // -prod(shape) if -1 in shape else -1
        return _StandIn(tuple(rest if side == -1 else side for side in shape))

    def __float__(self) -> float:
        return 1.0


def header_modules(path: Path, source: str, model: ModelInfo) -> dict[str, FileModule]:
    """The modules of a file under the names that we write, with tensors that have only a shape; alphas read as 1.

    Raises:
        UserError: not a LoRA, damaged, or made for another family.
    """
    header = read_weights(path, source)
    found = targets(model.unet_config, model.text_encoder_configs, conv=True, unet_key=model.family.unet_key)
    tensors = cast(dict[str, Any], {name: _StandIn(entry.shape) for name, entry in header.entries.items()})
    return modules_of(tensors, spellings(found, model.unet_config), source)


def lycoris_modules(path: Path, source: str) -> tuple[str, frozenset[str]] | None:
    """What kind of LyCORIS file it is, as messages name it, and the names of its modules; None of any other file.

    Raises:
        UserError: no weight file, or damaged.
    """
    keys = read_weights(path, source).entries
    kind = lycoris_kind(keys)
    return None if kind is None else (kind, frozenset(key.partition(".")[0] for key in keys))
