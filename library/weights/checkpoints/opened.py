"""A base model on disk as a table of tensors: where each weight of its modules stands, in either layout.

Nothing is read but headers; values come one by one through `models.tensors.Reader`. Unlike `models.inspect`, which
wants all that a training needs, this takes a model without VAE or text encoders too.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from library.errors import UserError
from library.models import evidence, folder, hub
from library.models.bases import Base, open_base
from library.models.families import Family, Part, TextPart
from library.models.info import ModelInfo, PartInfo, Said
from library.models.lora_targets import LoraTarget, targets
from library.models.original_names import open_clip_names, originals, prefix, unet_names
from library.models.places import locate
from library.models.single_configs import packaged
from library.models.tensors import Source

_SCALED = ("scaled_fp8", ".scale_weight", ".weight_scale")
_DEPTH = re.compile(r"\.transformer_blocks\.(\d+)\.")
_NO_LAYERS = {"hidden_size": 0, "intermediate_size": 0, "num_hidden_layers": 0}


@dataclass(frozen=True)
class BaseModel:
    """A base model whose tensors are looked up by the module that they belong to.

    `info.parts` holds the parts that are there; only the U-Net always is.
    """

    info: ModelInfo

    @property
    def family(self) -> Family:
        """Its family."""
        return self.info.family

    @cached_property
    def targets(self) -> tuple[LoraTarget, ...]:
        """Every module that a LoRA may change, with the names that LoRA files have for it."""
        parts = self.info.parts
        configs = [parts[one.part].config if one.part in parts else _NO_LAYERS for one in self.family.text_encoders]
        return targets(self.info.unet_config, configs, conv=True, unet_key=self.family.unet_key)

    @cached_property
    def places(self) -> Mapping[tuple[Part, str], Source]:
        """(part, name in a state dict of diffusers or transformers, without `text_model.`) -> where it stands.

        A tensor of a file may hold several of them (OpenCLIP has q, k and v in one); `Source.rows` tells which rows.
        """
        return {(part, name): source for part in self.info.parts for name, source in self.places_of(part).items()}

    def places_of(self, part: Part) -> Mapping[str, Source]:
        """The same for one part, by name alone; the others aren't looked at."""
        if part not in self._by_part:
            found = self._original(part) if self.info.parts[part].original else self._named(part)
            self._by_part[part] = {source.target.removeprefix("text_model."): source for source in found}
        return self._by_part[part]

    def _original(self, part: Part) -> Iterable[Source]:
        """A part of a file in the original layout by the names of its module, which isn't made: that takes seconds."""
        if part == "vae":
            from library.models.parts import build, sources

            return sources(self.info, part, build(self.info, part))
        return _renamed(self.family, part, self.info.parts[part])

    def _named(self, part: Part) -> Iterable[Source]:
        """A part whose files have its module's names already, or had them once. No module is made for that."""
        held = self.info.parts[part]
        for header in held.headers:
            for name, entry in header.entries.items():
                if name.startswith(held.prefix):
                    target = folder.target_name(part, name.removeprefix(held.prefix))
                    yield Source(target, header.path, entry, name)

    @cached_property
    def _by_part(self) -> dict[Part, dict[str, Source]]:
        return {}

    def weight_of(self, target: LoraTarget) -> Source:
        """Where the weight of a module stands. Raises KeyError if the model lacks it."""
        part: Part = "unet" if target.part == "unet" else self.family.text_encoders[target.encoder].part
        return self.places_of(part)[f"{target.path}.weight"]


def open_model(path: str | Path, flag: str = "base model") -> BaseModel:
    """Look at a base model: a file in the original layout (pickles too), a diffusers folder, or a hub id.

    Args:
        flag: how messages name it.

    Raises:
        UserError: nothing there, damaged, not a base model of a known family, or in a quantized format.
    """
    place = locate(str(path), flag, hub.base_files(None, set()))
    base = open_base(place, None)
    family = base.family
    decision = evidence.decide(family, base.evidence(), Said(), place.name)
    found: dict[Part, PartInfo] = {}
    texts = {encoder.part: base.text_encoder(encoder) for encoder in family.text_encoders}
    found["unet"] = base.unet(_projection(base, texts))
    if (vae := base.vae()) is not None:
        found["vae"] = vae
    found |= {part: held for part, held in texts.items() if held is not None}
    _refuse_scaled(found)
    return BaseModel(
        ModelInfo(
            path=place.path,
            name=place.name,
            family_name=family.name,
            layout=base.layout,
            parts=found,
            scheduler_config=base.scheduler_config(),
            prediction_type=decision.prediction_type,
            zero_terminal_snr=decision.zero_terminal_snr,
            vae_factor=2 ** (len(vae.config.get("block_out_channels", (0,))) - 1) if vae else 8,
            findings=tuple(decision.findings),
        )
    )


def _renamed(family: Family, part: Part, held: PartInfo) -> Iterator[Source]:
    """Where the tensors of a U-Net or text encoder in the original layout stand, by the names of the part's module."""
    stored = {name: (header, entry) for header in held.headers for name, entry in header.entries.items()}
    encoder = next((one for one in family.text_encoders if one.part == part), None)
    if encoder is not None and not encoder.open_clip:
        for name, (header, entry) in stored.items():
            if name.startswith(held.prefix):
                yield Source(name.removeprefix(held.prefix).removeprefix("text_model."), header.path, entry, name)
        return
    if encoder is None:
        depth = 1 + max((int(found[1]) for name in stored if (found := _DEPTH.search(name))), default=0)
        names = unet_names(family, held.config, depth)
    else:
        names = open_clip_names(int(held.config["num_hidden_layers"]))
    for one in originals(family, part, held.config, names):
        name = held.prefix + one.name.removeprefix(prefix(family, part))
        turned = one.turned
        if turned and name not in stored:
            name, turned = f"{name}.weight", False
        if name in stored:
            header, entry = stored[name]
            rows = entry.shape[0] // len(one.targets)
            for place, target in enumerate(one.targets):
                which = (place * rows, (place + 1) * rows) if len(one.targets) > 1 else None
                yield Source(target, header.path, entry, name, which, turned)


def _projection(base: Base, texts: Mapping[TextPart, PartInfo | None]) -> int:
    """The width of the pooled text that the U-Net takes; of the family's own encoder where the model has none."""
    family = base.family
    widths = []
    for encoder in family.text_encoders:
        if encoder.projects:
            held = texts[encoder.part]
            config = packaged(family.name, encoder.part) if held is None else held.config
            widths.append(int(config.get("projection_dim", 512)))
    return max(widths, default=0)


def _refuse_scaled(parts: Mapping[Part, PartInfo]) -> None:
    """Weights with a scale beside them are not the weights that they stand for."""
    for name, part in parts.items():
        for header in part.headers:
            for tensor in header.entries:
                if tensor.endswith(_SCALED) and tensor.startswith((part.prefix, _SCALED[0])):
                    wrong = f"its {name} is in scaled fp8 (by its tensor {tensor}), whose values are not the weights"
                    raise UserError.single(part.where, wrong, "use a file in fp32, fp16 or bf16")
