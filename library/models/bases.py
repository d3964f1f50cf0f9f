"""A base model as it stands in one file or one folder, part by part; torch-free.

What it lacks is None here: `inspect` takes it from elsewhere, or says what to do.
"""

from typing import Any, Protocol

from library.errors import UserError
from library.models import evidence, folder, single_configs
from library.models.evidence import Evidence
from library.models.families import Family, TextEncoder
from library.models.headers import Header
from library.models.info import Layout, PartInfo
from library.models.pickles import read_weights
from library.models.places import Place
from library.models.recognise import SUPPORTED, UNET, VAE, family_or_kind


class Base(Protocol):
    """What both kinds of base models tell."""

    place: Place
    family: Family
    layout: Layout

    def evidence(self) -> Evidence:
        """What it tells of prediction type and noise schedule."""

    def scheduler_config(self) -> dict[str, Any]:
        """Its noise schedule."""

    def unet(self, projection: int) -> PartInfo:
        """Its U-Net; `projection` is the width of the pooled text."""

    def vae(self) -> PartInfo | None:
        """Its VAE, if it has one."""

    def text_encoder(self, encoder: TextEncoder) -> PartInfo | None:
        """One of its text encoders, if it has it."""


def open_base(place: Place, variant: str | None) -> Base:
    """The base model at a place, its family known.

    Raises:
        UserError: damaged, or not a base model of a known family.
    """
    return Folder(place, variant) if place.path.is_dir() else SingleFile(place)


class SingleFile:
    """A base model in one file, in the original layout."""

    layout: Layout = "single_file"

    def __init__(self, place: Place) -> None:
        self.place = place
        self.header: Header = read_weights(place.path, place.where)
        family = family_or_kind(self.header)
        if isinstance(family, str):
            raise UserError.single(place.flag, f"{place.path} is {family}", SUPPORTED)
        self.family: Family = family

    def _part(self, config: dict[str, Any], prefix: str) -> PartInfo:
        return PartInfo(config, (self.header,), True, prefix, self.place.where)

    def evidence(self) -> Evidence:
        """Marker tensors and metadata."""
        return evidence.of_header(self.header, self.place.where)

    def scheduler_config(self) -> dict[str, Any]:
        """The family's; a file holds none."""
        return single_configs.packaged(self.family.name, "scheduler")

    def unet(self, projection: int) -> PartInfo:
        """The U-Net, EMA copies left aside."""
        config = single_configs.unet_config(self.header, self.family, projection, self.place.where)
        return self._part(config, UNET)

    def vae(self) -> PartInfo | None:
        """The VAE, if the file has one."""
        if not self.header.shape(f"{VAE}encoder.down.0.block.0.conv1.weight"):
            return None
        return self._part(single_configs.vae_config(self.header, self.family, VAE, True), VAE)

    def text_encoder(self, encoder: TextEncoder) -> PartInfo | None:
        """A text encoder, if the file has it."""
        if not single_configs.holds_text_encoder(self.header, encoder):
            return None
        return self._part(single_configs.text_encoder_config(self.header, self.family, encoder), encoder.prefix)


class Folder:
    """A base model in a diffusers folder."""

    layout: Layout = "folder"

    def __init__(self, place: Place, variant: str | None) -> None:
        self.place, self._variant = place, variant
        self._configs = folder.read_configs(place.path, place.flag)
        family = folder.family_or_kind(self._configs)
        if isinstance(family, str):
            raise UserError.single(place.flag, f"{place.path} is {family}", SUPPORTED)
        self.family: Family = family

    def evidence(self) -> Evidence:
        """What the scheduler's config says."""
        return evidence.of_scheduler(self.scheduler_config(), self.place.where)

    def scheduler_config(self) -> dict[str, Any]:
        """The folder's own, else the family's."""
        return self._configs["scheduler"] or single_configs.packaged(self.family.name, "scheduler")

    def unet(self, projection: int) -> PartInfo:
        """The U-Net, with the config that stands beside it."""
        headers = folder.weight_headers(self.place.path / "unet", "unet", self._variant, self.place.flag)
        return PartInfo(self._configs["unet"], headers, False, "", self.place.where)

    def vae(self) -> PartInfo | None:
        """The VAE, if the folder has one."""
        config = self._configs["vae"]
        if not config:
            return None
        headers = folder.weight_headers(self.place.path / "vae", "vae", self._variant, self.place.flag)
        return PartInfo({"scaling_factor": self.family.latent_scale} | config, headers, False, "", self.place.where)

    def text_encoder(self, encoder: TextEncoder) -> PartInfo | None:
        """A text encoder, if the folder has it."""
        config = self._configs[encoder.part]
        if not config:
            return None
        headers = folder.weight_headers(self.place.path / encoder.part, encoder.part, self._variant, self.place.flag)
        return PartInfo(config, headers, False, "", self.place.where)
