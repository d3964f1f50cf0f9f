"""What a weight file is, told from the names and shapes of its tensors; torch-free.

Names come first, shapes second. Only what is positively recognised as a base model of a known family passes; everything
else is named as well as the names allow, so that an error can say "this is a LoRA" and not "key not found".
"""

from library.models.families import FAMILIES, SD1, SD2, SDXL, Family
from library.models.headers import Header

UNET, VAE = "model.diffusion_model.", "first_stage_model."
ADAPTER = (
    "a LoRA (or another adapter), not a base model; training takes those with --network_weights, "
    "merge_lora.py with --models"
)
CONTROLNET = "a ControlNet, not a base model"
UNET_ALONE = "only the U-Net of a diffusers folder; give the folder that holds model_index.json"
VAE_ALONE = "a VAE alone, not a base model"
TEXT_ALONE = "a text encoder alone, not a base model"
SUPPORTED = f"give a text-to-image model of {', '.join(family.title for family in FAMILIES.values())}"

_FIRST = f"{UNET}input_blocks.0.0.weight"
_ADAPTER_ENDS = (
    ".lora_down.weight",
    ".lora_up.weight",
    ".lora_A.weight",
    ".lora_B.weight",
    "lora.down.weight",
    "lora.up.weight",
    ".lora_linear_layer.down.weight",
    ".lora_linear_layer.up.weight",
    ".hada_w1_a",
    ".lokr_w1",
    ".lokr_w1_a",
    ".oft_blocks",
    ".oft_diag",
    ".on_input",
    ".a1.weight",
)


def family_or_kind(header: Header) -> Family | str:
    """The family of a base model in the original layout, with or without VAE and text encoder; else what it is
    (`a LoRA, not a base model`)."""
    return _adapter(header) or (_without_unet(header) if not header.any(UNET) else _with_unet(header))


def kind_of_other(header: Header) -> str:
    """What a file is that was to hold a VAE and holds none."""
    known = _adapter(header)
    if known:
        return known
    if header.any(UNET):
        return "a base model without a VAE"
    return _without_unet(header)


def family_of_latents(header: Header) -> Family | None:
    """The family whose latents the VAE of a whole model makes, also of one that can't be trained on, such as a refiner;
    None of a file without a U-Net, and where it isn't known."""
    if not header.any(f"{UNET}input_blocks."):
        return None
    family = _family(header)
    if not isinstance(family, str):
        return family
    if header.any("cond_stage_model."):
        return SD2
    return SDXL if header.any("conditioner.", f"{UNET}label_emb.") else None


def _adapter(header: Header) -> str | None:
    if not header.entries:
        return "an empty file: it holds no tensors"
    if header.any("lora_unet_", "lora_te", "lycoris_") or any(n.endswith(_ADAPTER_ENDS) for n in header.entries):
        return ADAPTER
    if header.any("control_model.", "controlnet_cond_embedding.", "input_hint_block.", "controlnet_blocks."):
        return CONTROLNET
    return None


def _without_unet(header: Header) -> str:
    names = header.entries
    if header.any("string_to_") or (len(names) <= 4 and ("emb_params" in names or header.any("clip_l", "clip_g", "<"))):
        return "an embedding (Textual Inversion), not a base model"
    if header.any("double_blocks.", "single_transformer_blocks."):
        return "a Flux model"
    if header.any("joint_blocks.", "transformer_blocks.0.norm1_context."):
        return "a Stable Diffusion 3 model"
    if header.any("down_blocks.", "conv_in.") and header.any("mid_block.", "up_blocks."):
        return UNET_ALONE
    if header.any(VAE, "encoder.down.", "encoder.down_blocks.", "decoder.up."):
        return VAE_ALONE
    if header.any("text_model.", "encoder.layers.", "cond_stage_model.", "conditioner.", "transformer.resblocks."):
        return TEXT_ALONE
    if header.any("input_blocks."):
        return "only a U-Net, without VAE and text encoder"
    return f"no base model that is known here (its first tensor is {next(iter(names))})"


def _with_unet(header: Header) -> Family | str:
    first = header.shape(_FIRST)
    if header.any(UNET + "double_blocks."):
        return "a Flux model"
    if header.any(UNET + "joint_blocks."):
        return "a Stable Diffusion 3 model"
    if header.any(UNET + "down_blocks."):
        return "a model in another layout than the original one"
    if len(first) != 4:
        return "a model of an unknown family"
    family = _family(header)
    if isinstance(family, str):
        return family
    if strange := strange_channels(first[1]):
        return strange
    if not header.shape(UNET + "input_blocks.1.0.out_layers.3.weight") or not context_width(header):
        return "a base model with a U-Net of another kind"
    return family


def strange_channels(channels: int) -> str | None:
    """What a U-Net is that takes this many channels; None for the four of latents."""
    kinds = {
        9: "an inpainting model (its U-Net takes 9 channels)",
        8: "an image-editing model (its U-Net takes 8 channels, as InstructPix2Pix does)",
        7: "an upscaler (its U-Net takes 7 channels)",
        5: "a depth model (its U-Net takes 5 channels)",
    }
    if channels == 4:
        return None
    return kinds.get(channels, f"a model of an unknown family (its U-Net takes {channels} channels)")


def _family(header: Header) -> Family | str:
    """By the text encoders' names; by the U-Net where the file holds none."""
    if "edm_mean" in header.entries:
        return "a Playground v2.5 model, which predicts neither noise nor velocity"
    if header.any("conditioner.embedders.1.", "conditioner.embedders.0.transformer."):
        return _fitting(header, SDXL, labels=True)
    if header.any("conditioner."):
        return "an SDXL refiner"
    if header.any("cond_stage_model.model."):
        return _fitting(header, SD2)
    if header.any("cond_stage_model.transformer."):
        return _fitting(header, SD1)
    if header.any("cond_stage_model."):
        return "a base model with a text encoder of another kind"
    if header.any(UNET + "label_emb."):
        levels_of_three = not header.any(UNET + "input_blocks.9.")
        return SDXL if levels_of_three else "an SDXL refiner"
    linear = len(header.shape(f"{UNET}input_blocks.1.1.proj_in.weight")) == 2
    return SD2 if linear or context_width(header) == 1024 else SD1


def _fitting(header: Header, family: Family, *, labels: bool = False) -> Family | str:
    """The family, if its U-Net has the inputs that it should have: only SDXL's takes more than noise, time and text."""
    if header.any(UNET + "label_emb.") == labels:
        return family
    return f"a model of an unknown family (like {family.title}, but its U-Net takes other inputs)"


def context_width(header: Header) -> int:
    """The width of the text states that the U-Net attends to; 0 if it attends to none."""
    for name, entry in header.entries.items():
        if name.startswith(UNET) and name.endswith(".attn2.to_k.weight") and len(entry.shape) == 2:
            return entry.shape[1]
    return 0
