"""The VAE that `--vae` names: a file, a folder, or a model on the hub; torch-free.

A VAE of another family makes latents that mean something else to the U-Net, though their shapes fit. It is refused
where that can be told: by the whole model that it is part of, or by its config.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.models import folder, hub, single_configs
from library.models.families import FAMILIES, Family
from library.models.info import PartInfo
from library.models.pickles import read_weights
from library.models.places import Place, locate
from library.models.recognise import VAE, family_of_latents, kind_of_other

FLAG = "--vae"
_ADVICE = "give a VAE file, a model file that holds one, or a diffusers folder"
_CLASS = "AutoencoderKL"
_FOLDERS_FILE = "diffusion_pytorch_model"
_INSIDE = "vae"
_NEAR = 1e-3


def find_vae(given: str, family: Family) -> tuple[Place, PartInfo]:
    """Where it stands, and what it is.

    Raises:
        UserError: nothing there, no VAE, or one of a family with other latents.
    """
    place = locate(given, FLAG, hub.vae_files)
    return place, _folder(place, family) if place.path.is_dir() else _file(place, family)


def _file(place: Place, family: Family) -> PartInfo:
    header = read_weights(place.path, place.where)
    for prefix, original in ((VAE, True), ("", True), ("", False)):
        config = single_configs.vae_config(header, family, prefix, original)
        if config["block_out_channels"]:
            _check_family(place.path, family_of_latents(header), family)
            return PartInfo(config | _beside(place.path, family), (header,), original, prefix, place.where)
    raise UserError.single(FLAG, f"{place.path} holds no VAE, it is {kind_of_other(header)}", _ADVICE)


def _folder(place: Place, family: Family) -> PartInfo:
    inside = place.path / _INSIDE
    path = inside if (inside / "config.json").is_file() else place.path
    config = folder.read_json(path / "config.json", FLAG)
    kind = config.get("_class_name", _CLASS)
    if not config or kind != _CLASS:
        what = f"a folder of {kind}" if config else "a folder without a VAE's config"
        raise UserError.single(FLAG, f"{path} is {what}", _ADVICE)
    _check_folder(path, config, family)
    headers = folder.weight_headers(path, "vae", None, FLAG)
    return PartInfo({"scaling_factor": family.latent_scale} | config, headers, False, "", place.where)


def _beside(path: Path, family: Family) -> dict[str, Any]:
    """The config beside a file that was taken out of a VAE's folder; {} where there is none."""
    config = folder.read_json(path.parent / "config.json", FLAG) if path.name.startswith(_FOLDERS_FILE) else {}
    if config.get("_class_name") != _CLASS:
        return {}
    _check_folder(path.parent, config, family)
    return config


def _check_folder(path: Path, config: Mapping[str, Any], family: Family) -> None:
    """A VAE's folder, and the whole model around it."""
    whole = path.parent
    if path.name == _INSIDE and (whole / "unet" / "config.json").is_file():
        _check_family(whole, folder.family_of_latents(folder.read_configs(whole, FLAG)), family)
    _check_scale(path, config, family)


def _check_family(path: Path, found: Family | None, family: Family) -> None:
    if found and found.latents_kind != family.latents_kind:
        wrong = f"{path} is an {found.title} model, whose VAE makes other latents"
        raise UserError.single(FLAG, wrong, _needed(family))


def _check_scale(path: Path, config: Mapping[str, Any], family: Family) -> None:
    """A scaling factor that is another family's; one that is nobody's is fine."""
    told = config.get("scaling_factor")
    if not isinstance(told, int | float) or math.isclose(told, family.latent_scale, rel_tol=_NEAR):
        return
    for other in FAMILIES.values():
        if other.latents_kind != family.latents_kind and math.isclose(told, other.latent_scale, rel_tol=_NEAR):
            wrong = f"{path} is a VAE of {other.title} models, its config.json has the scaling_factor {told}"
            raise UserError.single(FLAG, wrong, _needed(family))


def _needed(family: Family) -> str:
    titles = [one.title for one in FAMILIES.values() if one.latents_kind == family.latents_kind]
    return f"this base model needs a VAE of {' or '.join(titles)} models"
