"""From looked-up values to the spec of one subset, with what is wrong about them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from library.errors import Problem, nearest
from library.options.lookup import Lookup
from library.options.specs import PRESERVE, CaptionSpec, SubsetSpec
from library.options.templates import PRESETS

_NOT_CACHED = ("random_crop", "color_aug", "face_crop_aug_range")


def subset_spec(lookup: Lookup, *, subject: str | None, **source: Any) -> SubsetSpec:
    """The spec of a subset; `subject` is its class tokens, `source` what it is made of and where that was said."""
    extension, named = lookup.extension()
    return SubsetSpec(
        class_tokens=subject or None,
        caption_extension=extension,
        caption_extension_named=named,
        caption=_caption_spec(lookup, subject or ""),
        flip_aug=lookup["flip_aug"],
        random_crop=lookup["random_crop"],
        resize_interpolation=lookup["resize_interpolation"],
        recursive=lookup["recursive"],
        caption_from=lookup["caption_from"],
        alpha_mask=lookup["alpha_mask"],
        mask_dir=lookup["conditioning_data_dir"],
        masks=lookup.options.dataset.masked_loss,
        color_aug=lookup["color_aug"],
        face_crop_aug_range=_face_range(lookup["face_crop_aug_range"]),
        keep_in_memory=lookup["keep_in_memory"],
        validation_split=lookup["validation_split"],
        custom_attributes=_attributes(lookup),
        **source,
    )


def _attributes(lookup: Lookup) -> dict[str, Any]:
    return dict(lookup["custom_attributes"] or {})


def _caption_spec(lookup: Lookup, subject: str) -> CaptionSpec:
    delimiter = lookup["shuffle_caption_delimiter"]
    return CaptionSpec(
        prefix=lookup["caption_prefix"],
        suffix=lookup["caption_suffix"],
        dropout_rate=lookup["caption_dropout_rate"],
        dropout_every_n_epochs=lookup["caption_dropout_every_n_epochs"],
        tag_dropout_rate=lookup["caption_tag_dropout_rate"],
        separator=delimiter or lookup["caption_separator"],
        keep_tokens=lookup["keep_tokens"],
        keep_tokens_separator=lookup["keep_tokens_separator"],
        secondary_separator=lookup["secondary_separator"],
        wildcards=lookup["enable_wildcard"],
        shuffle=lookup["shuffle_caption"] or bool(delimiter),
        warmup_min=lookup["token_warmup_min"],
        warmup_step=lookup["token_warmup_step"],
        templates=lookup["caption_templates"] or PRESETS.get(lookup["caption_preset"], ()),
        subject=subject,
        keep_original=lookup["keep_original_captions"],
    )


def problems(lookup: Lookup, where: str) -> Iterator[Problem]:
    """What can't be done with the values of one subset, which `where` names."""
    caching = lookup.options.caching
    if caching.cache_latents:
        for name in _NOT_CACHED:
            if lookup[name]:
                wrong = f"{name} can't be used with cached latents"
                yield Problem(lookup.where(name), wrong, "leave out one of the two")
    kept = _attributes(lookup).get(PRESERVE)
    if not isinstance(kept, bool | None):
        yield Problem(lookup.where("custom_attributes"), f"{PRESERVE} is {kept!r}", "write true or false")
    if lookup["caption_separator"] == "":
        yield Problem(lookup.where("caption_separator"), "is empty", 'tags need something between them, such as ","')
    yield from _templates(lookup)
    if lookup["face_crop_aug_range"] and _face_range(lookup["face_crop_aug_range"]) is None:
        wrong = "is no range of two numbers above 0, the smaller one first"
        yield Problem(lookup.where("face_crop_aug_range"), wrong, "such as 2.0,4.0")
    masks: Path | None = lookup["conditioning_data_dir"]
    if masks is None:
        return
    if not lookup.options.dataset.masked_loss:
        wrong = "mask pictures have no effect without --masked_loss"
        yield Problem(lookup.where("conditioning_data_dir"), wrong, "add --masked_loss, or leave them out")
    elif not masks.is_dir():
        yield Problem(lookup.where("conditioning_data_dir"), f"there is no folder {masks}")


def notices(lookup: Lookup) -> Iterator[str]:
    """Lines about values that may not be what the user meant."""
    for name in _attributes(lookup):
        if name != PRESERVE and nearest(name, [PRESERVE]):
            yield f"{lookup.where('custom_attributes')}: {name} is handed on, but means nothing here; {PRESERVE} would"


def _templates(lookup: Lookup) -> Iterator[Problem]:
    templates, where = lookup.find("caption_templates")
    if templates and lookup["caption_preset"]:
        places = f"{where}, {lookup.where('caption_preset')}"
        yield Problem(places, "both give templates", "leave out one of the two")
    for template in templates or ():
        if template.count("{}") != 1:
            yield Problem(where, f"{template!r} doesn't hold {{}} once", "such as 'a photo of {}'")
    if lookup["keep_original_captions"] and not templates and not lookup["caption_preset"]:
        wrong = "has no effect without templates"
        yield Problem(lookup.where("keep_original_captions"), wrong, "add caption_preset or caption_templates")


def _face_range(given: str | tuple[float, ...] | None) -> tuple[float, float] | None:
    """`"2.0,4.0"` or two numbers; None for anything else."""
    try:
        numbers = [float(part) for part in (given.split(",") if isinstance(given, str) else given or ())]
    except ValueError:
        return None
    if len(numbers) != 2 or not 0 < numbers[0] <= numbers[1]:
        return None
    return numbers[0], numbers[1]
