"""A base model on disk as a table of tensors: where each weight of its modules stands, in either layout.

Nothing is read but headers; values come one by one through `models.tensors.Reader`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from library.models.families import Family, Part
from library.models.info import ModelInfo
from library.models.inspect import inspect
from library.models.lora_targets import LoraTarget, targets
from library.models.tensors import Source


@dataclass(frozen=True)
class BaseModel:
    """A base model whose tensors are looked up by the module that they belong to."""

    info: ModelInfo

    @property
    def family(self) -> Family:
        """Its family."""
        return self.info.family

    @cached_property
    def targets(self) -> tuple[LoraTarget, ...]:
        """Every module that a LoRA may change, with the names that LoRA files have for it."""
        configs = self.info.text_encoder_configs
        return targets(self.info.unet_config, configs, conv=True, unet_key=self.family.unet_key)

    @cached_property
    def places(self) -> Mapping[tuple[Part, str], Source]:
        """(part, name in a state dict of diffusers or transformers, without `text_model.`) -> where it stands.

        A tensor of a file may hold several of them (OpenCLIP has q, k and v in one); `Source.rows` tells which rows.
        """
        from library.models.parts import build, sources

        found = {}
        for part in self.family.parts:
            module = build(self.info, part)
            for source in sources(self.info, part, module):
                found[part, source.target.removeprefix("text_model.")] = source
        return found

    def weight_of(self, target: LoraTarget) -> Source:
        """Where the weight of a module stands. Raises KeyError if the model lacks it."""
        part: Part = "unet" if target.part == "unet" else self.family.text_encoders[target.encoder].part
        return self.places[part, f"{target.path}.weight"]


def open_model(path: str | Path) -> BaseModel:
    """Look at a base model: a file in the original layout (pickles too), or a diffusers folder.

    Raises:
        UserError: as `models.inspect.inspect`.
    """
    return BaseModel(inspect(path))
