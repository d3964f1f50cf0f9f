"""What stands at `--pretrained_model_name_or_path`, told from headers and JSON alone: torch-free, so a dry run can ask.

`inspect` raises for everything that a real run could not load; what it returns is all that `models.load` needs.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from library.errors import UserError, nearest
from library.models import folder, single_configs
from library.models.headers import Header, read_header
from library.models.recognise import SUPPORTED, foreign_kind
from library.tokenizer import VOCABULARY_SIZE

FLAG = "--pretrained_model_name_or_path"
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")

Layout = Literal["folder", "single_file"]
PredictionType = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class ModelInfo:
    """A base model that can be loaded.

    Attributes:
        prediction_known: the model itself tells its prediction type; otherwise `epsilon` is assumed and a flag may
            say another.
        headers: per part (`unet`, `vae`, `text_encoder`), the headers of the files that hold its weights. A single
            file stands under each part.
        vae_factor: pixels per latent cell, along a side.
    """

    path: Path
    family: Literal["sd1"]
    layout: Layout
    prediction_type: PredictionType
    prediction_known: bool
    unet_config: dict[str, Any]
    text_encoder_config: dict[str, Any]
    vae_config: dict[str, Any]
    scheduler_config: dict[str, Any]
    vae_factor: int
    headers: dict[str, tuple[Header, ...]] = field(repr=False)

    @property
    def text_encoder_configs(self) -> tuple[dict[str, Any], ...]:
        """The configs of all text encoders, first to last."""
        return (self.text_encoder_config,)

    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights, each once: U-Net, VAE, text encoder."""
        return tuple(dict.fromkeys(header.path for part in self.headers.values() for header in part))


def inspect(path: str | Path) -> ModelInfo:
    """Look at a diffusers folder or a single `.safetensors` file in the original layout.

    Raises:
        UserError: nothing there, damaged, or not a base model of a supported family.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        info = _folder(place)
    elif place.is_file():
        info = _single_file(place)
    else:
        raise _missing(str(path), place)
    _check(info)
    return info


def _missing(given: str, place: Path) -> UserError:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", given) and not place.parent.is_dir() and place.suffix != ".safetensors":
        return UserError.single(
            FLAG,
            f"{given} is neither a file nor a folder here; it looks like the name of a model on the hub",
            "nothing is fetched from the network: download the model and give its folder or .safetensors file",
        )
    if not place.parent.is_dir():
        return UserError.single(FLAG, f"{given} does not exist, nor does the folder {place.parent}")
    siblings = [entry.name for entry in place.parent.iterdir()]
    return UserError.single(FLAG, f"{given} does not exist", nearest(place.name, siblings))


def _single_file(path: Path) -> ModelInfo:
    if path.suffix.lower() in _PICKLES:
        raise UserError.single(FLAG, f"{path} is a PyTorch pickle, which can hold code", "convert it to .safetensors")
    header = read_header(path, f"{FLAG} {path}")
    kind = foreign_kind(header)
    if kind:
        raise UserError.single(FLAG, f"{path} is {kind}", SUPPORTED)
    scheduler, known = single_configs.scheduler_config(header)
    vae = single_configs.vae_config(header)
    return ModelInfo(
        path=path,
        family="sd1",
        layout="single_file",
        prediction_type=scheduler["prediction_type"],
        prediction_known=known,
        unet_config=single_configs.unet_config(header),
        text_encoder_config=single_configs.text_encoder_config(header),
        vae_config=vae,
        scheduler_config=scheduler,
        vae_factor=2 ** (len(vae["block_out_channels"]) - 1),
        headers=dict.fromkeys(("unet", "vae", "text_encoder"), (header,)),
    )


def _folder(path: Path) -> ModelInfo:
    configs = folder.read_configs(path, FLAG)
    kind = folder.foreign_kind(configs)
    if kind:
        raise UserError.single(FLAG, f"{path} is {kind}", SUPPORTED)
    headers = {part: folder.weight_headers(path, part, FLAG) for part in ("unet", "vae", "text_encoder")}
    scheduler = configs["scheduler"] or single_configs.packaged("sd1", "scheduler")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError.single(FLAG, f"{path} predicts {prediction!r}", "epsilon and v_prediction can be trained")
    vae = configs["vae"]
    return ModelInfo(
        path=path,
        family="sd1",
        layout="folder",
        prediction_type=prediction,
        prediction_known="prediction_type" in scheduler,
        unet_config=configs["unet"],
        text_encoder_config=configs["text_encoder"],
        vae_config=vae,
        scheduler_config=scheduler,
        vae_factor=2 ** (len(vae.get("block_out_channels", (0,))) - 1),
        headers=headers,
    )


def _check(info: ModelInfo) -> None:
    """What both layouts must keep, so that a run doesn't stop after minutes."""
    vocabulary = info.text_encoder_config.get("vocab_size", VOCABULARY_SIZE)
    if vocabulary != VOCABULARY_SIZE:
        wrong = f"{info.path} has a text encoder of {vocabulary} tokens, where CLIP has {VOCABULARY_SIZE}"
        raise UserError.single(FLAG, wrong, "text encoders with added tokens are not supported")
    width = info.text_encoder_config.get("hidden_size", 512)
    context = info.unet_config.get("cross_attention_dim")
    if context != width:
        wrong = f"{info.path}: its U-Net attends to {context} text channels, its text encoder gives {width}"
        raise UserError.single(FLAG, wrong, "U-Net and text encoder are of different models")
    schedule = info.scheduler_config.get("beta_schedule", "linear")
    if schedule not in _SCHEDULES and info.scheduler_config.get("trained_betas") is None:
        raise UserError.single(FLAG, f"{info.path} has the unknown noise schedule {schedule!r}", "")
