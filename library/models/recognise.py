"""What a `.safetensors` file is, told from the names and shapes of its tensors; torch-free.

Only what is positively recognised as a base model of the SD1 architecture passes; everything else is named as well as
the names allow, so that an error can say "this is a LoRA" and not "key not found".
"""

from library.models.headers import Header

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
SUPPORTED = "this version trains on base models of the SD1 architecture (Stable Diffusion 1.x) only"

_ADAPTER_ENDS = (
    ".lora_down.weight",
    ".lora_up.weight",
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora.down.weight",
    ".hada_w1_a",
    ".lokr_w1",
    ".lokr_w1_a",
    ".oft_blocks",
    ".oft_diag",
    ".on_input",
    ".a1.weight",
)


def foreign_kind(header: Header) -> str | None:
    """What this file is, if it is anything but an SD1 base model in the original layout (`a LoRA`); else None."""
    if not header.entries:
        return "an empty file: it holds no tensors"
    if header.any("lora_unet_", "lora_te", "lycoris_") or any(n.endswith(_ADAPTER_ENDS) for n in header.entries):
        return "a LoRA (or another adapter), not a base model; --network_weights takes those"
    if header.any("control_model.", "controlnet_cond_embedding.", "input_hint_block.", "controlnet_blocks."):
        return "a ControlNet, not a base model"
    if not header.any(UNET):
        return _without_unet(header)
    return _other_family(header) or _incomplete(header)


def _without_unet(header: Header) -> str:
    names = header.entries
    if len(names) <= 4 and ("emb_params" in names or header.any("string_to_", "clip_l", "clip_g", "<")):
        return "an embedding (Textual Inversion), not a base model"
    if header.any("double_blocks.", "transformer_blocks.0.attn.norm_added"):
        return "a Flux model"
    if header.any("joint_blocks."):
        return "a Stable Diffusion 3 model"
    if header.any("down_blocks.", "conv_in.") and header.any("mid_block.", "up_blocks."):
        return "only the U-Net of a diffusers folder; give the folder that holds model_index.json"
    if header.any(VAE, "encoder.down.", "encoder.down_blocks.", "decoder.up."):
        return "a VAE alone, not a base model"
    if header.any("text_model.", "encoder.layers.", "cond_stage_model.", "conditioner."):
        return "a text encoder alone, not a base model"
    if header.any("input_blocks."):
        return "only a U-Net, without VAE and text encoder"
    return f"no base model that is known here (its first tensor is {next(iter(names))})"


def _other_family(header: Header) -> str | None:
    first = header.shape(UNET + "input_blocks.0.0.weight")
    context = context_width(header)
    if header.any(UNET + "double_blocks."):
        return "a Flux model"
    if header.any(UNET + "joint_blocks."):
        return "a Stable Diffusion 3 model"
    if header.any(UNET + "down_blocks.") and header.any("text_encoder."):
        return "a model in another layout than the original one"
    if not first:
        return "a model of an unknown family"
    if header.any("conditioner.embedders.1.") or context == 2048:
        return "an SDXL model"
    if header.any("conditioner.") or context == 1280:
        return "an SDXL refiner"
    if header.any(UNET + "label_emb."):
        return "a model of an unknown family (its U-Net takes class labels)"
    if header.any("cond_stage_model.model.") or context == 1024:
        return "an SD2 model (Stable Diffusion 2.x)"
    if len(first) == 4 and first[1] == 9:
        return "an inpainting model (its U-Net takes 9 channels)"
    if len(first) == 4 and first[1] == 8:
        return "an image-editing model (its U-Net takes 8 channels, as InstructPix2Pix does)"
    if first[1:2] != (4,):
        return f"a model of an unknown family (its U-Net takes {first[1]} channels)"
    proj = header.shape(UNET + "input_blocks.1.1.proj_in.weight")
    if len(proj) == 2:
        return "an SD2 model (its U-Net has linear projections)"
    return None


def _incomplete(header: Header) -> str | None:
    parts = {
        "VAE": header.shape(VAE + "encoder.down.0.block.0.conv1.weight"),
        "text encoder": header.any("cond_stage_model."),
    }
    missing = [part for part, found in parts.items() if not found]
    if missing:
        return f"a U-Net without {' and '.join(missing)}; a base model holds U-Net, VAE and text encoder"
    if len(header.shape(text_key(header, "embeddings.token_embedding.weight"))) != 2:
        return "a base model with a text encoder of another kind"
    if not header.shape(UNET + "input_blocks.1.0.out_layers.3.weight"):
        return "a base model with a U-Net of another kind"
    return None


def context_width(header: Header) -> int:
    """The width of the text states that the U-Net attends to; 0 if it attends to none."""
    for name, entry in header.entries.items():
        if name.startswith(UNET) and name.endswith(".attn2.to_k.weight") and len(entry.shape) == 2:
            return entry.shape[1]
    return 0


def text_key(header: Header, name: str) -> str:
    """A text encoder's tensor as this file calls it, with or without `text_model.`."""
    full = f"{TEXT}text_model.{name}"
    return full if full in header.entries else TEXT + name
