"""How embedding files, and the tensors in them, are called in each layout; reads no file and needs no torch.

`kohya`: `emb_params`, or `clip_l` and `clip_g` where a model has two text encoders. `webui`: A1111's `string_to_param`
around one tensor. `diffusers`: the token is the tensor's name, one file for each text encoder. `bundle`: names that
begin with `bundle_emb.<token>.`, which can stand beside a LoRA's. Reading is models.embedding_files' business (headers)
and weights.embeddings' (values); both find their tensors here.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from library.errors import UserError

Layout = Literal["kohya", "webui", "diffusers", "bundle"]
TOKEN_KEY = "ss_token_string"
_ENCODERS = ("clip_l", "clip_g")
_SINGLE = "emb_params"
_PARAM = "string_to_param."
_BUNDLE = "bundle_emb."
_OTHER_ENCODERS = ("t5", "t5xxl", "clip_h", "llama", "gemma")
_PAIRS = (_ENCODERS, ("text_encoders_0", "text_encoders_1"))
_SINGLES = (_SINGLE, "emp_params")
_LORA = re.compile(r"(lora|lycoris)_\w+\.|.*\.(lora_[AB]|lora_down|lora_up|lora\.down|lora\.up)(\.|$)")
_OF_SAVES = re.compile(r"((step)?\d+|best)(-.*)?", re.IGNORECASE)
"""Names that begin like what saves put behind a run's name themselves."""
_ADVICE = "give an embedding as A1111, ComfyUI, diffusers, InvokeAI, OneTrainer or sd-scripts write it"

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Found:
    """One embedding of a file.

    Attributes:
        token: as the file tells it.
        places: for each text encoder the names of the tensors whose rows, one behind the other, are the vectors.
        shapes: for each text encoder (vectors, width).
    """

    layout: Layout
    token: str | None
    places: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Contents:
    """All embeddings of a file, and the names of its tensors that are of no use for them."""

    embeddings: tuple[Found, ...]
    unused: tuple[str, ...] = ()

    def choose(self, token: str | None, where: str) -> Found:
        """The embedding of a token; a file's only one may be called otherwise there.

        Raises:
            UserError: there are several, and none, or not just one, is called so.
        """
        if len(self.embeddings) == 1:
            return self.embeddings[0]
        wanted = token or ""
        alike = {wanted.casefold(), bundle_name(wanted).casefold()}
        exact = [one for one in self.embeddings if one.token == wanted]
        for found in (exact, [one for one in self.embeddings if one.token and one.token.casefold() in alike]):
            if len(found) == 1:
                return found[0]
        listed = ", ".join(str(one.token) for one in self.embeddings)
        wrong = f"holds the embeddings of several tokens ({listed})"
        wrong += f", none of which is {token!r}" if token else ""
        raise UserError.single(where, wrong, "name one of these tokens, or take the file apart")


def find(shapes: Shapes, metadata: Mapping[str, str], where: str) -> Contents:
    """What embeddings tensors of these names and shapes are.

    Args:
        shapes: of all tensors of numbers with a fraction; a tensor inside a table has both names with a dot between.
        metadata: texts of the file, of which the token's name is taken.

    Raises:
        UserError: they are none, or are damaged.
    """
    told = metadata.get(TOKEN_KEY) or metadata.get("name") or None
    bundled = [name for name in shapes if is_bundled(name)]
    if bundled:
        return _bundles(shapes, bundled, where)
    if holds_lora(shapes):
        raise UserError.single(where, "is a LoRA without embeddings in it", _ADVICE)
    unused = tuple(name for name in shapes if name.endswith("_out") and name.removesuffix("_out") in _known())
    shapes = {name: shape for name, shape in shapes.items() if name not in unused}
    if not shapes:
        raise UserError.single(where, "holds no vectors", _ADVICE)
    params = [name for name in shapes if name.startswith(_PARAM)]
    if params:
        single = len(params) == 1
        found = [_found("webui", told if single else _after(name), ((name,),), shapes, where) for name in params]
        return Contents(tuple(found), tuple(name for name in shapes if name not in params))
    for pair in _PAIRS:
        if pair[0] in shapes and pair[1] in shapes:
            _refuse_more(shapes, pair, where)
            places = tuple((name,) for name in pair)
            return Contents((_found("kohya", told, places, shapes, where),), unused)
    for name in _SINGLES:
        if name in shapes:
            _refuse_more(shapes, (name,), where)
            return Contents((_found("kohya", told, ((name,),), shapes, where),), unused)
    if len(shapes) == 1 and next(iter(shapes)) in ("", *_known()):
        (name,) = shapes
        layout: Layout = "kohya" if name else "diffusers"
        return Contents((_found(layout, told, ((name,),), shapes, where),), unused)
    return Contents(tuple(_by_token(shapes, where)), unused)


def holds_lora(names: Iterable[str]) -> bool:
    """Whether any of these tensors is a LoRA's, or of a network like it."""
    return any(_LORA.match(name) for name in names)


def is_bundled(name: str) -> bool:
    """Whether a tensor of this name is an embedding's in a bundle."""
    return name.startswith(_BUNDLE)


def tensor_names(layout: Layout, token: str, encoders: int) -> tuple[str, ...]:
    """What the tensor of each text encoder is called in a file with those of so many; in a webui file of one, the table
    `string_to_param` has it.

    Raises:
        ValueError: `diffusers` has one in a file.
    """
    own = _ENCODERS if encoders == 2 else (_SINGLE,)
    match layout:
        case "kohya":
            return own
        case "webui":
            return own if encoders == 2 else (f"{_PARAM}*",)
        case "bundle":
            parts = own if encoders == 2 else (f"{_PARAM}*",)
            return tuple(f"{_BUNDLE}{bundle_name(token)}.{part}" for part in parts)
        case "diffusers":
            if encoders != 1:
                raise ValueError("a file of diffusers holds the vectors of one text encoder")
            return (token,)


def bundle_name(token: str) -> str:
    """What a bundle calls a token, and prompts with it: without dots, at which A1111 splits names."""
    return token.replace(".", "_")


def layout_files(
    base: str, layout: Layout, encoders: int, ending: str = ".safetensors"
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The files of one embedding in a layout: (name relative to the output folder, whose vectors it holds).

    Args:
        base: of the names, without ending.
        encoders: how many text encoders there are; the numbers in the answer count them from 0.
        ending: of the main file in the layout `kohya`; a `.safetensors` file is always written beside it.
    """
    everyone = tuple(range(encoders))
    match layout:
        case "kohya":
            return tuple((f"{base}{one}", everyone) for one in dict.fromkeys((ending, ".safetensors")))
        case "webui":
            return ((f"webui/{base}.pt", everyone),)
        case "bundle":
            return ((f"{base}.bundle.safetensors", everyone),)
        case "diffusers":
            if encoders == 1:
                return ((f"diffusers/{base}.safetensors", everyone),)
            return tuple((f"diffusers/{base}.{_ENCODERS[one]}.safetensors", (one,)) for one in everyone)


def file_bases(stem: str, tokens: Sequence[str], *, alone: bool) -> tuple[str, ...]:
    """The names, without ending, of each token's files: the stem itself for an only token that is trained `alone`,
    else `<stem>-<token>` without what file names can't hold; names that would be the same get a number."""
    if alone and len(tokens) == 1:
        return (stem,)
    found: list[str] = []
    taken: set[str] = set()
    for token in tokens:
        plain = re.sub(r'[\x00-\x20<>:"/\\|?*\x7f]+', "_", token).strip("_. ") or "token"
        plain = f"token-{plain}" if _OF_SAVES.fullmatch(plain) else plain
        name, number = f"{stem}-{plain}", 2
        while name.casefold() in taken:
            name, number = f"{stem}-{plain}-{number}", number + 1
        taken.add(name.casefold())
        found.append(name)
    return tuple(found)


def _known() -> tuple[str, ...]:
    return (*_ENCODERS, *_PAIRS[1], *_SINGLES, *_OTHER_ENCODERS)


def _after(name: str) -> str:
    return name.removeprefix(_PARAM)


def _refuse_more(shapes: Shapes, mine: Sequence[str], where: str) -> None:
    """The file has tensors beside these: of a text encoder that our families don't have, or strange ones."""
    more = [name for name in shapes if name not in mine]
    if more:
        wrong = f"has the tensor {more[0]} beside {' and '.join(mine)}, so it is for a model of another family"
        raise UserError.single(where, wrong, "an embedding for SD1, SD2 or SDXL is needed")


def _bundles(shapes: Shapes, names: Sequence[str], where: str) -> Contents:
    places: dict[str, dict[str, str]] = {}
    unused = []
    behind = tuple(f"{one}_out" for one in _ENCODERS)
    suffixes = (f"{_PARAM}*", *_ENCODERS, _SINGLE, *behind)
    for name in names:
        rest = name.removeprefix(_BUNDLE)
        part = next((one for one in suffixes if rest.endswith(f".{one}")), rest.partition(".")[2])
        if part in _OTHER_ENCODERS or not part:
            raise UserError.single(where, f"has a bundled tensor of an unknown kind, {name}", _ADVICE)
        if part in behind:
            unused.append(name)
        else:
            places.setdefault(rest.removesuffix(f".{part}"), {})[part] = name
    found = []
    for token, parts in places.items():
        if len(parts) > 1 and set(parts) != set(_ENCODERS):
            wrong = f"its embedding of {token} has the parts {', '.join(parts)}, which don't go together"
            raise UserError.single(where, wrong, _ADVICE)
        ordered = [parts[one] for one in _ENCODERS if one in parts] or list(parts.values())
        found.append(_found("bundle", token, tuple((name,) for name in ordered), shapes, where))
    return Contents(tuple(found), tuple(unused))


def _by_token(shapes: Shapes, where: str) -> Iterator[Found]:
    """The layout of diffusers: each name is a token, or with `_1`, `_2` ... behind it its further vectors."""
    if any(other in shapes for other in _known()):
        mixed = " and ".join(sorted(shapes))
        raise UserError.single(where, f"holds {mixed}, which no model of ours takes together", _ADVICE)
    odd = next((name for name, shape in shapes.items() if len(shape) not in (1, 2)), None)
    widths = {shape[-1] for shape in shapes.values() if shape}
    if odd is not None or len(widths) > 1:
        name = odd or next(iter(shapes))
        wrong = f"is no embedding: it holds {len(shapes)} tensors such as {name or 'one without a name'}"
        raise UserError.single(where, f"{wrong}, of the shape {list(shapes[name])}", _ADVICE)
    later: set[str] = set()
    for token, shape in shapes.items():
        if _rows(shape) == 1:
            later |= set(_series(token, shapes))
    for token, shape in shapes.items():
        if token not in later:
            places = (token, *(_series(token, shapes) if _rows(shape) == 1 else ()))
            yield _found("diffusers", token, (places,), shapes, where)


def _series(token: str, shapes: Shapes) -> Iterator[str]:
    """`tok_1`, `tok_2` ... as far as they are there, one vector each."""
    number = 1
    while (name := f"{token}_{number}") in shapes and _rows(shapes[name]) == 1:
        yield name
        number += 1


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 2 else 1


def _found(layout: Layout, token: str | None, places: tuple[tuple[str, ...], ...], shapes: Shapes, where: str) -> Found:
    for name in (name for one in places for name in one):
        shape = shapes[name]
        if len(shape) not in (1, 2) or 0 in shape:
            wrong = f"its tensor {name or 'without a name'} has the shape {list(shape)}, not (vectors, width)"
            raise UserError.single(where, wrong, _ADVICE)
    sizes = tuple((sum(_rows(shapes[name]) for name in one), shapes[one[0]][-1]) for one in places)
    if len({rows for rows, _ in sizes}) > 1:
        told = " and ".join(f"{rows} for {one[0]}" for one, (rows, _) in zip(places, sizes, strict=True))
        raise UserError.single(where, f"has different numbers of vectors for its text encoders: {told}", _ADVICE)
    return Found(layout, token, places, sizes)
