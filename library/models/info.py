"""What is known of a base model before its weights are read: the record that `inspect` makes and `load` takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from library.errors import UserError
from library.models.families import FAMILIES, Family, FamilyName, Part, PredictionType
from library.models.headers import Header

Layout = Literal["folder", "single_file"]


@dataclass(frozen=True)
class Said:
    """What flags say of the base model; None where the user said nothing.

    `places` tells where: the name of a flag -> `run.toml:3 v2`. A flag that isn't in it was given as such.
    """

    v2: bool | None = None
    v_parameterization: bool | None = None
    zero_terminal_snr: bool | None = None
    places: Mapping[str, str] = field(default_factory=dict)

    def where(self, name: str) -> str:
        """How a message names a flag."""
        return self.places.get(name, f"--{name}")


@dataclass(frozen=True)
class PartInfo:
    """One part of a model: its config and where its weights stand.

    Attributes:
        config: of diffusers or transformers.
        headers: the files that hold it.
        original: its tensors have the original layout's names; otherwise diffusers' or transformers'.
        prefix: what precedes its names in the files, "" for a bare part.
        where: how a message names its source: `--vae path`.
    """

    config: dict[str, Any]
    headers: tuple[Header, ...] = field(repr=False)
    original: bool
    prefix: str
    where: str


@dataclass(frozen=True)
class ModelInfo:
    """A base model that can be loaded.

    Attributes:
        path: the file or folder of the base model; a hub id's is the folder in the hub's cache.
        name: what metadata call it: the last component of the path, or the hub id.
        prediction_type: None where neither evidence nor a flag tells it and it has to be probed.
        zero_terminal_snr: the noise schedule ends in pure noise; `scheduler_config` says the same.
        vae_factor: pixels per latent cell, along a side.
        findings: short phrases about what was found and where, for `line`.
        vae_path, vae_name: of `--vae`.
    """

    path: Path
    name: str
    family_name: FamilyName
    layout: Layout
    parts: Mapping[Part, PartInfo]
    scheduler_config: dict[str, Any]
    prediction_type: PredictionType | None
    zero_terminal_snr: bool
    vae_factor: int
    findings: tuple[str, ...] = ()
    vae_path: Path | None = None
    vae_name: str | None = None

    @property
    def family(self) -> Family:
        """The facts of its family."""
        return FAMILIES[self.family_name]

    @property
    def unet_config(self) -> dict[str, Any]:
        """The U-Net's config."""
        return self.parts["unet"].config

    @property
    def vae_config(self) -> dict[str, Any]:
        """The VAE's config."""
        return self.parts["vae"].config

    @property
    def text_encoder_configs(self) -> tuple[dict[str, Any], ...]:
        """The configs of all text encoders, first to last."""
        return tuple(self.parts[encoder.part].config for encoder in self.family.text_encoders)

    @property
    def text_widths(self) -> tuple[int, ...]:
        """The width of each text encoder's states, first to last."""
        return tuple(int(config.get("hidden_size", 512)) for config in self.text_encoder_configs)

    @property
    def pooled_width(self) -> int:
        """The width of the pooled text that the U-Net takes; 0 where it takes none."""
        projecting = [one.part for one in self.family.text_encoders if one.projects]
        return max((int(self.parts[part].config.get("projection_dim", 512)) for part in projecting), default=0)

    def check_clip_skip(self, skip: int | None, where: str = "--clip_skip") -> None:
        """Refuse a layer that one of the text encoders doesn't have.

        Raises:
            UserError: so.
        """
        layers = min(int(config.get("num_hidden_layers", 12)) for config in self.text_encoder_configs)
        if skip is not None and not 1 <= skip <= layers:
            wrong = f"{skip} is not within 1 and {layers}, the text encoder's layers"
            raise UserError.single(where, wrong, "1 and 2 are usual")

    @property
    def vae_fragile(self) -> bool:
        """Its VAE overflows in float16: that of its family does, and its config doesn't say that this one won't."""
        return self.family.fp16_fragile_vae and self.vae_config.get("force_upcast") is not False

    @property
    def line(self) -> str:
        """One line that tells what was found."""
        return f"base model {self.name}: {self.family.title}, {', '.join(self.findings)}"

    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights, each once, in the order of the parts."""
        return tuple(dict.fromkeys(header.path for part in self.parts.values() for header in part.headers))
