"""The modules of a LoRA file as it spells them, and which of them the models of a family have: told from keys and
shapes alone, by the lists of modules that full-size models have.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from library.embedding_layouts import is_bundled
from library.models.families import FAMILIES, Family, FamilyName, diffusers_key
from library.models.lora_targets import LoraTarget, targets
from library.models.single_configs import packaged
from library.weights.loras.lycoris import Kind, direction, kind_of
from library.weights.loras.peft import parsed

Style = Literal["kohya", "peft", "processor"]
"""`kohya`: underscored names; `peft`: dotted paths; `processor`: the oldest dotted ones of diffusers."""
_OPEN_CLIP_LAYER = re.compile(r"lora_te1?_text_model_encoder_layers_23_")
OFT_PREFIX = "oft_unet_"
_ARCHITECTURES: Mapping[str, FamilyName] = {
    "stable-diffusion-xl": "sdxl",
    "stable-diffusion-v2": "sd2",
    "stable-diffusion-v1": "sd1",
}


@dataclass(frozen=True)
class Found:
    """A module of a file.

    Attributes:
        key: as the file spells it, without leaves.
        name: the same with underscores, prefix and blocks as the file has them; peft's first text encoder is
            `lora_te1_`.
        kind: what it is, and `made`: the same without magnitudes; None of leaves that no program writes.
        sizes: (out, in) of the weight that it changes, where its leaves tell.
        width: of what it takes, if it is on a Linear, where its leaves tell.
        ndim: of the weight that it changes, where it is a plain LoRA's.
    """

    key: str
    name: str
    style: Style
    kind: Kind | None
    made: Kind | None
    sizes: tuple[int, int] | None
    width: int | None = None
    ndim: int | None = None


@dataclass(frozen=True)
class Keys:
    """A file's keys, sorted out. `bundled` are those of embeddings."""

    modules: tuple[Found, ...]
    bundled: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def styles(self) -> frozenset[Style]:
        """How its modules are spelled."""
        return frozenset(one.style for one in self.modules)


def sort_keys(shapes: Mapping[str, tuple[int, ...]]) -> Keys:
    """The modules of a file from the shapes of its tensors."""
    found: dict[tuple[str, str, Style], dict[str, tuple[int, ...]]] = {}
    bundled = tuple(key for key in shapes if is_bundled(key))
    for key, shape in shapes.items():
        if key not in bundled:
            own, name, style, leaf = _split(key)
            group = found.setdefault((own, name, style), {})
            if leaf != "alpha":
                group[leaf] = shape
    modules = tuple(
        Found(
            own,
            name,
            style,
            kind_of(leaves),
            direction(leaves),
            _sizes(leaves),
            _width(leaves),
            len(leaves.get("lora_down.weight", ())) or None,
        )
        for (own, name, style), leaves in found.items()
    )
    return Keys(modules, bundled, dict(shapes))


def _split(key: str) -> tuple[str, str, Style, str]:
    """Key of the module, its name with underscores, style and leaf."""
    if one := parsed(key):
        return one.own, one.name, "processor" if one.is_processor else "peft", one.leaf
    own, _, leaf = key.partition(".")
    return own, own, "kohya", leaf


def _sizes(leaves: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
    up, down = leaves.get("lora_up.weight"), leaves.get("lora_down.weight")
    if up and down and len(down) > 1:
        return up[0], down[1]
    whole = leaves.get("diff")
    return (whole[0], whole[1]) if whole and len(whole) > 1 else None


def _width(leaves: Mapping[str, tuple[int, ...]]) -> int | None:
    if sizes := _sizes(leaves):
        return sizes[1]
    if (hada := leaves.get("hada_w1_b", ())) and len(hada) > 1:
        return hada[1]
    sides = [leaves.get(f"lokr_w{one}", leaves.get(f"lokr_w{one}_b", ())) for one in (1, 2)]
    return sides[0][1] * sides[1][1] if min(map(len, sides)) > 1 else None


@dataclass(frozen=True)
class Place:
    """A module of a family's models.

    Attributes:
        spelling: `original` of a block in the original spelling, `diffusers` in the other; `both` where they're one.
        size: (out, in) of those that LoRAs are trained on.
    """

    spelling: Literal["text", "both", "original", "diffusers"]
    size: tuple[int, int] | None = None

    @property
    def size_in(self) -> int | None:
        """What it takes."""
        return self.size and self.size[1]


def places(family: Family) -> Mapping[str, Place]:
    """Every name that a file may have for a module of the family's full-size models."""
    return _places(family.name)


@lru_cache
def _places(name: FamilyName) -> Mapping[str, Place]:
    family = FAMILIES[name]
    texts = [packaged(family.name, encoder.part) for encoder in family.text_encoders]
    found: dict[str, Place] = {}
    for target in targets(packaged(family.name, "unet"), texts, conv=True):
        size = (target.out_features, target.in_features)
        for path, own in ((target.path, size), *((path, None) for path in _beside(target.path, family))):
            if target.part == "text_encoder":
                stem = diffusers_key(f"text_model.{path}")
                for prefix in _text_prefixes(family, target):
                    found.setdefault(f"{prefix}{stem}", Place("text", own))
                continue
            plain, ours = diffusers_key(path), family.unet_key(path)
            found.setdefault(f"lora_unet_{ours}", Place("both" if plain == ours else "original", own))
            found.setdefault(f"lora_unet_{plain}", Place("diffusers", own))
    return found


def _text_prefixes(family: Family, target: LoraTarget) -> tuple[str, ...]:
    return ("lora_te_", "lora_te1_") if target.encoder == 0 else (f"lora_te{target.encoder + 1}_",)


_NEXT_TO = (
    (".conv1", (".norm1", ".norm2")),
    (".proj_in", (".norm",)),
    (".ff.net.2", (".norm1", ".norm2", ".norm3")),
    (".mlp.fc1", (".layer_norm1", ".layer_norm2")),
)
_ENDS = ("conv_in", "conv_out", "conv_norm_out", "time_embedding.linear_1", "time_embedding.linear_2")
_POOLED = ("add_embedding.linear_1", "add_embedding.linear_2")


def _beside(path: str, family: Family) -> list[str]:
    """Modules that no LoRA of ours trains but LyCORIS can, told from one that it does."""
    found = [path.removesuffix(end) + more for end, names in _NEXT_TO if path.endswith(end) for more in names]
    if path == "mid_block.attentions.0.proj_in":
        found += [*_ENDS, *(_POOLED if family.takes_sizes else ())]
    if path == "encoder.layers.0.mlp.fc1":
        found += ["final_layer_norm", "embeddings.token_embedding", "embeddings.position_embedding"]
    return found


def family_for(keys: Keys, metadata: Mapping[str, str]) -> Family | None:
    """The family whose models have these modules, the first of those that `possible` leaves; None where none has any.
    Whatever works on a file asks this, or `lora.family_of`, which doesn't choose."""
    return next(iter(possible(keys, metadata)), None)


def possible(keys: Keys, metadata: Mapping[str, str]) -> list[Family]:
    """The families whose models have the most of these modules. Names and sizes count for more than the metadata,
    which may be wrong, and of metadata only values that are known.

    Where names fit several, as those of SD1 and SD2 do: the widths of texts tell, else the metadata, else whether
    projections are linear, or how text encoders are called in a file that has nothing else.
    """
    names = {plain_name(one.name) for one in keys.modules}
    counts = {family.name: len(names & places(family).keys()) for family in FAMILIES.values()}
    most = max(counts.values())
    left = [family for family in FAMILIES.values() if counts[family.name] == most and most]
    widths = {
        (plain_name(one.name), one.width)
        for one in keys.modules
        if one.width and one.name.endswith(("attn2_to_k", "attn2_to_v", "self_attn_k_proj"))
    }
    told = family_by_metadata(metadata)
    windows = {one.ndim for one in keys.modules if one.ndim and one.name.endswith(("_proj_in", "_proj_out"))}
    first = _only_encoder(keys)
    tests: tuple[Callable[[Family], bool], ...] = (
        lambda family: any((place := places(family).get(name)) and place.size_in == size for name, size in widths),
        lambda family: family is told,
        lambda family: told is None and metadata.get("ss_v2") == "True" and family.v2,
        lambda family: _linear_projections(family) == (windows == {2}) and len(windows) == 1,
        lambda family: first is not None and len(family.text_encoders) == first,
    )
    for test in tests:
        left = [family for family in left if test(family)] or left
    return left


def family_by_metadata(metadata: Mapping[str, str]) -> Family | None:
    """The family that metadata name by a value that we know."""
    version = metadata.get("ss_base_model_version", "")
    found = next((family for family in FAMILIES.values() if version in family.versions.values()), None)
    if found is None:
        model = metadata.get("modelspec.architecture", "")
        found = next((FAMILIES[name] for start, name in _ARCHITECTURES.items() if model.startswith(start)), None)
    return found


def _linear_projections(family: Family) -> bool:
    """Whether U-Nets of a family have Linear projections, as diffusers' folders of SD2 have; SD1's are 1x1 kernels."""
    return family.v2 or bool(packaged(family.name, "unet").get("use_linear_projection"))


def _only_encoder(keys: Keys) -> int | None:
    """In a file of the first text encoder alone, how many its family has: those of two have numbers in their names.
    None of other files."""
    starts = {one.name.partition("_text_model")[0] for one in keys.modules}
    if keys.styles != {"kohya"} or len(starts) != 1:
        return None
    return {"lora_te": 1, "lora_te1": 2}.get(starts.pop())


def plain_name(name: str) -> str:
    """The name without a prefix that only some programs write."""
    for prefix in (OFT_PREFIX, "lycoris_"):
        if name.startswith(prefix):
            return f"lora_unet_{name.removeprefix(prefix)}"
    return name


def strangers(keys: Keys, family: Family) -> list[str]:
    """Keys of modules that the family's models don't have."""
    known = places(family)
    return [one.key for one in keys.modules if plain_name(one.name) not in known and not is_last_layer(one, family)]


def is_last_layer(one: Found, family: Family) -> bool:
    """The 24th layer of SD2's text encoder, which transformers' model of it lacks."""
    return family.text_encoders[0].open_clip and _OPEN_CLIP_LAYER.match(one.name) is not None


def other_sizes(keys: Keys, family: Family) -> list[str]:
    """Keys of modules whose sizes aren't those of the family's full-size models."""
    known = places(family)
    found = []
    for one in keys.modules:
        place = known.get(plain_name(one.name))
        if place is not None and place.size is not None and one.sizes is not None and one.sizes != place.size:
            found.append(one.key)
    return found
