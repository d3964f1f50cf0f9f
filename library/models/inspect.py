"""What stands at `--pretrained_model_name_or_path`, told from headers and JSON alone: torch-free, so a dry run can ask.

`inspect` raises for everything that a real run could not load; what it returns is all that `models.load` needs.
"""

from dataclasses import replace
from pathlib import Path

from library.errors import UserError
from library.models import evidence, hub
from library.models.bases import Base, open_base
from library.models.families import Part
from library.models.info import ModelInfo, PartInfo, Said
from library.models.integrity import check_hashes
from library.models.places import Place, locate
from library.models.single_configs import SIZES
from library.models.vaes import find_vae
from library.tokenizer import VOCABULARY_SIZE

FLAG = "--pretrained_model_name_or_path"
_READABLE = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_SCALES = ("scaled_fp8", ".scale_weight", ".weight_scale")
_NOTHING_SAID = Said()
_TEXT_FLAG = "--text_encoder"
_PLAIN = "use a file in fp32, fp16 or bf16"


def inspect(
    path: str | Path,
    *,
    said: Said = _NOTHING_SAID,
    vae: str | None = None,
    text_encoder: str | None = None,
    variant: str | None = None,
    check_hash: bool = True,
) -> ModelInfo:
    """Look at a base model: a checkpoint file in the original layout, a diffusers folder, or a model on the hub.

    Args:
        said: what flags say of it.
        vae: a file, folder or hub id whose VAE is used.
        text_encoder: a base model of the same family whose text encoders are used.
        variant: which of a folder's weights are read; None takes the plain ones, else fp16, else bf16.
        check_hash: check a file against the hash in its own metadata, which reads it to its end once.

    Raises:
        UserError: nothing there, damaged, not a base model of a known family, incomplete, or not what flags say.
    """
    skipped = {*(("vae",) if vae else ()), *(("text_encoder", "text_encoder_2") if text_encoder else ())}
    place = locate(str(path), FLAG, hub.base_files(variant, skipped))
    base = open_base(place, variant)
    family = base.family
    decision = evidence.decide(family, base.evidence(), said, place.name)
    texts = _text_encoders(base, text_encoder, variant)
    projection = max((_projection(texts[one.part]) for one in family.text_encoders if one.projects), default=0)
    vae_place, vae_part = find_vae(vae, family) if vae else (None, base.vae())
    if vae_part is None:
        wrong = f"{place.path} holds no VAE"
        raise UserError.single(FLAG, wrong, "name one with --vae, such as that of another model of its family")
    parts: dict[Part, PartInfo] = {"unet": base.unet(projection), "vae": vae_part, **texts}
    scheduler = base.scheduler_config() | {"rescale_betas_zero_snr": decision.zero_terminal_snr}
    if decision.prediction_type is not None:
        scheduler["prediction_type"] = decision.prediction_type
    info = ModelInfo(
        path=place.path,
        name=place.name,
        family_name=family.name,
        layout=base.layout,
        parts=parts,
        scheduler_config=scheduler,
        prediction_type=decision.prediction_type,
        zero_terminal_snr=decision.zero_terminal_snr,
        vae_factor=2 ** (len(vae_part.config.get("block_out_channels", (0,))) - 1),
        vae_path=vae_place.path if vae_place else None,
        vae_name=vae_place.name if vae_place else None,
    )
    _check(info)
    if check_hash:
        check_hashes((_named(part, header.path), header) for part in parts.values() for header in part.headers)
    findings = (
        _layout(base),
        *decision.findings,
        *(("its kind of VAE overflows in float16",) if info.vae_fragile else ()),
        *((f"VAE from --vae {vae}",) if vae else ()),
        *((f"text encoders from --text_encoder {text_encoder}",) if text_encoder else ()),
    )
    return replace(info, findings=findings)


def _layout(base: Base) -> str:
    if base.place.from_hub:
        return "from the hub"
    return "single file" if base.layout == "single_file" else "diffusers folder"


def _named(part: PartInfo, path: Path) -> str:
    """A file as messages name it, each path once."""
    return part.where if part.where.endswith(str(path)) else f"{part.where}: {path}"


def _text_encoders(base: Base, given: str | None, variant: str | None) -> dict[Part, PartInfo]:
    """All text encoders, of the model itself or of the one that `--text_encoder` names."""
    family, source, flag = base.family, base, FLAG
    if given:
        wanted = hub.base_files(variant, ("unet", "vae"))
        other: Place = locate(given, _TEXT_FLAG, wanted)
        source, flag = open_base(other, variant), _TEXT_FLAG
        if source.family is not family:
            wrong = f"{given} is an {source.family.title} model, the base model an {family.title} one"
            raise UserError.single(flag, wrong, f"give an {family.title} model")
    found: dict[Part, PartInfo | None] = {
        encoder.part: source.text_encoder(encoder) for encoder in family.text_encoders
    }
    missing = [part for part, held in found.items() if held is None]
    if missing:
        what = "text encoder" if len(missing) == len(found) else f"{missing[0]}, one of its two text encoders"
        wrong = f"{source.place.path} holds no {what}"
        advice = f"name an {family.title} model that does with --text_encoder"
        raise UserError.single(flag, wrong, advice)
    return {part: held for part, held in found.items() if held is not None}


def _projection(part: PartInfo) -> int:
    return int(part.config.get("projection_dim", 512))


def _check(info: ModelInfo) -> None:
    """What all sources must keep, so that a run doesn't stop after minutes."""
    for encoder in info.family.text_encoders:
        part = info.parts[encoder.part]
        vocabulary = part.config.get("vocab_size", VOCABULARY_SIZE)
        if vocabulary != VOCABULARY_SIZE:
            wrong = f"it has a text encoder of {vocabulary} tokens, where CLIP has {VOCABULARY_SIZE}"
            raise UserError.single(part.where, wrong, "text encoders with added tokens are not supported")
    unet, vae = info.parts["unet"], info.parts["vae"]
    context = unet.config.get("cross_attention_dim")
    if context != (width := sum(info.text_widths)):
        wrong = f"its U-Net attends to {context} text channels, its text encoders give {width}"
        raise UserError.single(unet.where, wrong, "U-Net and text encoder are of different models")
    _check_sizes(info)
    latents, taken = int(vae.config.get("latent_channels", 4)), int(unet.config.get("in_channels", 4))
    if latents != taken:
        wrong = f"its latents have {latents} channels, the U-Net takes {taken}"
        raise UserError.single(vae.where, wrong, "the VAE is of another family")
    for name, part in info.parts.items():
        _check_dtypes(name, part)


def _check_sizes(info: ModelInfo) -> None:
    """A U-Net that takes pooled text and sizes: they make up the width of its inputs."""
    config = info.unet_config
    if not config.get("addition_embed_type"):
        return
    pooled = info.pooled_width
    inputs, each = config.get("projection_class_embeddings_input_dim"), int(config.get("addition_time_embed_dim") or 0)
    if each < 1 or inputs != pooled + SIZES * each:
        wrong = (
            f"its U-Net takes {inputs} numbers beside text, which can't be {pooled} of pooled text and {SIZES} sizes"
        )
        raise UserError.single(info.parts["unet"].where, wrong, "U-Net and text encoder are of different models")


def _check_dtypes(name: str, part: PartInfo) -> None:
    """Quantized weights can't be read."""
    for header in part.headers:
        mine = {tensor: entry for tensor, entry in header.entries.items() if tensor.startswith(part.prefix)}
        marks = [_SCALES[0]] if _SCALES[0] in header.entries and name != "vae" else []
        for mark in (*marks, *(tensor for tensor in mine if tensor.endswith(_SCALES))):
            wrong = f"its {name} is in scaled fp8 (by its tensor {mark}), whose values are not the weights"
            raise UserError.single(part.where, wrong, _PLAIN)
        for tensor, entry in mine.items():
            if entry.dtype not in _READABLE and not tensor.endswith("position_ids"):
                wrong = f"the tensor {tensor} of its {name} is of type {entry.dtype}"
                raise UserError.single(part.where, wrong, _PLAIN)
