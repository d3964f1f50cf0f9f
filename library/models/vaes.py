"""The VAE that `--vae` names: a file, a folder, or a model on the hub; torch-free."""

from library.errors import UserError
from library.models import folder, hub, single_configs
from library.models.families import Family
from library.models.info import PartInfo
from library.models.pickles import read_weights
from library.models.places import Place, locate
from library.models.recognise import VAE, kind_of_other

FLAG = "--vae"
_ADVICE = "give a VAE file, a model file that holds one, or a diffusers folder"
_CLASS = "AutoencoderKL"


def find_vae(given: str, family: Family) -> tuple[Place, PartInfo]:
    """Where it stands, and what it is.

    Raises:
        UserError: nothing there, or no VAE.
    """
    place = locate(given, FLAG, hub.vae_files)
    return place, _folder(place, family) if place.path.is_dir() else _file(place, family)


def _file(place: Place, family: Family) -> PartInfo:
    header = read_weights(place.path, place.where)
    for prefix, original in ((VAE, True), ("", True), ("", False)):
        config = single_configs.vae_config(header, family, prefix, original)
        if config["block_out_channels"]:
            return PartInfo(config, (header,), original, prefix, place.where)
    raise UserError.single(FLAG, f"{place.path} holds no VAE, it is {kind_of_other(header)}", _ADVICE)


def _folder(place: Place, family: Family) -> PartInfo:
    inside = place.path / "vae"
    path = inside if (inside / "config.json").is_file() else place.path
    config = folder.read_json(path / "config.json", FLAG)
    if not config or config.get("_class_name", _CLASS) != _CLASS:
        what = (
            f"a folder of {config['_class_name']}" if config.get("_class_name") else "a folder without a VAE's config"
        )
        raise UserError.single(FLAG, f"{path} is {what}", _ADVICE)
    headers = folder.weight_headers(path, "vae", None, FLAG)
    return PartInfo({"scaling_factor": family.latent_scale} | config, headers, False, "", place.where)
