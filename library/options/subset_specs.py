"""From looked-up values to the spec of one subset, with what is wrong about them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from library.errors import Problem, nearest
from library.options.lookup import Lookup
from library.options.specs import PRESERVE, CaptionSpec, SubsetSpec
from library.options.templates import PRESETS
from library.tokenizer import VOCABULARY_SIZE
from library.tokenizer.vocabulary import NewToken, Vocabulary

_SUCH = "such as 'a photo of {}'"
_TEXT_FILES = (".txt", ".toml", ".json", ".jsonl", ".csv", ".yaml", ".yml", ".caption")
_NOT_CACHED = ("random_crop", "color_aug", "face_crop_aug_range")


def subset_spec(lookup: Lookup, *, class_tokens: str | None, is_reg: bool = False, **source: Any) -> SubsetSpec:
    """The spec of a subset; `source` is what it is made of and where that was said."""
    extension, named = lookup.extension()
    return SubsetSpec(
        is_reg=is_reg,
        class_tokens=class_tokens or None,
        caption_extension=extension,
        caption_extension_named=named,
        caption=_caption_spec(lookup, _subject(lookup, class_tokens or "", is_reg) or ""),
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
        templates=_template_texts(lookup),
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


def subject_problems(lookup: Lookup, where: str, class_tokens: str | None, is_reg: bool) -> Iterator[Problem]:
    """Templates that can't be filled in, because nothing says which of several new tokens a subset shows."""
    if _subject(lookup, class_tokens or "", is_reg) is None:
        names = [text for text in lookup.options.embeddings.token_string or () if text.strip()]
        wrong = f"templates need a subject, and nothing says which token these pictures show ({', '.join(names)})"
        told = f'write class_tokens = "{names[0]}" in a --dataset_config'
        yield Problem(where, wrong, f"name the folder 10_{names[0]}, or {told}" if can_name(names[0]) else told)


def can_name(token: str) -> bool:
    """Whether a folder can be called like a token, on any system."""
    return token.isprintable() and not set(token) & set('<>:"/\\|?*') and not token.endswith((".", " "))


def only_token(lookup: Lookup) -> str | None:
    """The new token that is trained, where it is the only one."""
    tokens = {text.lower(): text for text in lookup.options.embeddings.token_string or ()}
    return next(iter(tokens.values())) if len(tokens) == 1 else None


def _subject(lookup: Lookup, class_tokens: str, is_reg: bool) -> str | None:
    """What templates are about: the class tokens; where new tokens are trained, the class tokens that hold one, else
    the only token. None: there are several.

    Regularization pictures, and those for which the network is to change nothing, show no new token.
    """
    tokens = lookup.options.embeddings.token_string
    if not tokens or not _template_texts(lookup) or is_reg or _attributes(lookup).get(PRESERVE):
        return class_tokens
    vocabulary = Vocabulary(tuple(map(NewToken, dict.fromkeys(tokens))))
    (ids,) = vocabulary.encode([class_tokens])
    return class_tokens if max(ids, default=0) >= VOCABULARY_SIZE else only_token(lookup)


def _template_texts(lookup: Lookup) -> tuple[str, ...]:
    return lookup["caption_templates"] or PRESETS.get(lookup["caption_preset"], ())


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
            texts = f"templates are texts, not a file of them: {_SUCH}" if _is_path(template) else _SUCH
            yield Problem(where, f"{template!r} doesn't hold {{}} once", texts)
    if lookup["keep_original_captions"] and not templates and not lookup["caption_preset"]:
        wrong = "has no effect without templates"
        yield Problem(lookup.where("keep_original_captions"), wrong, "add caption_preset or caption_templates")


def _is_path(text: str) -> bool:
    """Whether a text was likely meant as the name of a file."""
    return ("/" in text and " " not in text) or Path(text).suffix.lower() in _TEXT_FILES


def _face_range(given: str | tuple[float, ...] | None) -> tuple[float, float] | None:
    """`"2.0,4.0"` or two numbers; None for anything else."""
    try:
        numbers = [float(part) for part in (given.split(",") if isinstance(given, str) else given or ())]
    except ValueError:
        return None
    if len(numbers) != 2 or not 0 < numbers[0] <= numbers[1]:
        return None
    return numbers[0], numbers[1]
