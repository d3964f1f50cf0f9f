"""The families of base models as plain facts; torch-free. Code that differs by family reads it here or is a method of
the family's `Model` (models.sd1, models.sd2, models.sdxl); nowhere else is a family asked for by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from library.models.sgm_names import sgm_key
from library.tokenizer import END_ID

FamilyName = Literal["sd1", "sd2", "sdxl"]
PredictionType = Literal["epsilon", "v_prediction"]
TextPart = Literal["text_encoder", "text_encoder_2"]
Part = Literal["unet", "vae", "text_encoder", "text_encoder_2"]


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder of a family.

    `prefix` is that of the original layout; `open_clip` encoders have OpenCLIP's names there. `pad_id` fills a row
    behind the end token. `projects`: it has a text projection, whose pooled output the U-Net takes.
    """

    part: TextPart
    prefix: str
    open_clip: bool
    pad_id: int
    projects: bool = False


@dataclass(frozen=True)
class UnetBlocks:
    """How lists of settings for each block count the blocks of a U-Net: `down`, `mid` and `up`, and `ends` more before
    and after them, which no LoRA trains."""

    down: int
    mid: int
    up: int
    ends: int = 0

    @property
    def length(self) -> int:
        """The entries of a list for all blocks."""
        return self.down + self.mid + self.up + 2 * self.ends


@dataclass(frozen=True)
class Family:
    """A family of base models.

    Attributes:
        title: how messages name it.
        versions: `ss_base_model_version` by prediction type.
        sides: the side in pixels that it was made for, by prediction type.
        latents_kind: how sd-scripts ends the names of cached latents.
        latent_scale: what latents are multiplied by where a config names nothing.
        unet_key: a diffusers module path -> how the keys of LoRA files spell it.
        v2: it is what `--v2` means.
        probes_prediction: files of this family predict noise or velocity and often don't say which.
        blocks: how its U-Net's blocks are counted.
        usual_clip_skips: what its models are made for, the default first.
        takes_sizes: its U-Net is told the picture's size and the crop's place.
        fp16_fragile_vae: its usual VAE overflows in float16.
        conv_projections: `proj_in` and `proj_out` of its U-Net are 1x1 convolutions; else they are Linear.
    """

    name: FamilyName
    title: str
    text_encoders: tuple[TextEncoder, ...]
    versions: Mapping[PredictionType, str]
    sides: Mapping[PredictionType, int]
    latents_kind: str
    latent_scale: float
    unet_key: Callable[[str], str]
    blocks: UnetBlocks
    usual_clip_skips: tuple[int, ...]
    v2: bool = False
    probes_prediction: bool = False
    takes_sizes: bool = False
    fp16_fragile_vae: bool = False
    conv_projections: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that a base model of this family consists of."""
        return ("unet", "vae", *(encoder.part for encoder in self.text_encoders))


_SD_BLOCKS = UnetBlocks(down=12, mid=1, up=12)


def diffusers_key(path: str) -> str:
    """The U-Net spelling of SD1 and SD2 files: the diffusers path itself."""
    return path.replace(".", "_")


SD1 = Family(
    name="sd1",
    title="SD1",
    text_encoders=(TextEncoder("text_encoder", "cond_stage_model.transformer.", False, END_ID),),
    versions={"epsilon": "sd_v1", "v_prediction": "sd_v1_v"},
    sides={"epsilon": 512, "v_prediction": 512},
    latents_kind="sd",
    latent_scale=0.18215,
    unet_key=diffusers_key,
    blocks=_SD_BLOCKS,
    usual_clip_skips=(1, 2),
    conv_projections=True,
)
SD2 = Family(
    name="sd2",
    title="SD2",
    text_encoders=(TextEncoder("text_encoder", "cond_stage_model.model.", True, 0),),
    versions={"epsilon": "sd_v2", "v_prediction": "sd_v2_v"},
    sides={"epsilon": 512, "v_prediction": 768},
    latents_kind="sd",
    latent_scale=0.18215,
    unet_key=diffusers_key,
    blocks=_SD_BLOCKS,
    usual_clip_skips=(1,),
    v2=True,
    probes_prediction=True,
)
SDXL = Family(
    name="sdxl",
    title="SDXL",
    text_encoders=(
        TextEncoder("text_encoder", "conditioner.embedders.0.transformer.", False, END_ID),
        TextEncoder("text_encoder_2", "conditioner.embedders.1.model.", True, 0, projects=True),
    ),
    versions={"epsilon": "sdxl_base_v1-0", "v_prediction": "sdxl_base_v1-0"},
    sides={"epsilon": 1024, "v_prediction": 1024},
    latents_kind="sdxl",
    latent_scale=0.13025,
    unet_key=sgm_key,
    blocks=UnetBlocks(down=9, mid=3, up=9, ends=1),
    usual_clip_skips=(2,),
    takes_sizes=True,
    fp16_fragile_vae=True,
)
FAMILIES: Mapping[FamilyName, Family] = MappingProxyType({"sd1": SD1, "sd2": SD2, "sdxl": SDXL})


def unet_key_of(config: Mapping[str, Any]) -> Callable[[str], str]:
    """How LoRA files spell the modules of a U-Net with this diffusers config: only SDXL's takes sizes beside text."""
    return sgm_key if _takes_sizes(config) else diffusers_key


def unet_blocks_of(config: Mapping[str, Any]) -> UnetBlocks:
    """How the blocks of a U-Net with this diffusers config are counted."""
    return SDXL.blocks if _takes_sizes(config) else _SD_BLOCKS


def _takes_sizes(config: Mapping[str, Any]) -> bool:
    return config.get("addition_embed_type") == "text_time"
