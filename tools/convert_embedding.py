"""Convert an embedding between the layouts of the programs that load it, or put it into a LoRA's file and out again.

    python tools/convert_embedding.py --to webui cat.safetensors cat.pt
    python tools/convert_embedding.py --to bundle --lora style.safetensors cat.safetensors style.bundle.safetensors
    python tools/convert_embedding.py --to separate style.bundle.safetensors folder

Any layout is read, and a file's own ending counts. `kohya` is what sd-scripts, ComfyUI and InvokeAI load, `webui` is
A1111's, `diffusers` has the token as the tensor's name and a file for each text encoder: `x.clip_l.safetensors` and
`x.clip_g.safetensors`, which are given together when they are to be read. `separate` writes the LoRA and each
embedding of a bundle into a folder, in the layout `kohya`. Nothing in a `.pt` or `.bin` file runs.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if TYPE_CHECKING:
    from torch import Tensor

    from library.embedding_layouts import Layout
    from library.weights.embeddings import Embedding

_PICKLES = (".pt", ".bin", ".ckpt")
_ENDINGS = {
    "kohya": (".safetensors", *_PICKLES),
    "webui": _PICKLES,
    "diffusers": (".safetensors", *_PICKLES),
    "bundle": (".safetensors",),
    "separate": ("",),
}
_TRIGGER = "modelspec.trigger_phrase"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--to", required=True, choices=tuple(_ENDINGS), help="layout of the new file")
    found.add_argument("--lora", type=Path, metavar="FILE", help="with --to bundle: the LoRA that the embeddings join")
    found.add_argument(
        "--token",
        action="append",
        metavar="TOKEN",
        help="name of the token, or which of a file's tokens (default: as the file tells, else the file's name); with "
        "--to bundle once for each embedding",
    )
    found.add_argument("input", type=Path, nargs="+", metavar="IN", help="embedding files")
    found.add_argument("output", type=Path, metavar="OUT", help="the new file; with --to separate a folder")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line that says what is wrong with the input."""
    given = parser().parse_args(argv)
    sys.path.insert(0, str(ROOT))
    from library.console import complain, say
    from library.errors import UserError

    try:
        _check(given)
        if given.to == "separate":
            written = separate(given.input[0], given.output)
        elif given.to == "bundle":
            written = bundle(given.input, given.output, given.token or (), given.lora)
        else:
            written = convert(given.input, given.output, given.to, (given.token or [None])[0])
        for path, what in written:
            say(f"{what}: {path}")
    except UserError as fault:
        return complain(fault)
    return 0


def _check(given: argparse.Namespace) -> None:
    from library.errors import UserError

    endings = _ENDINGS[given.to]
    if given.to == "separate" and given.output.is_file():
        raise UserError.single(str(given.output), "is a file", "with --to separate the last path is a folder")
    if given.to != "separate" and given.output.suffix not in endings:
        *first, last = endings
        listed = f"{', '.join(first)} or {last}" if first else last
        wrong = f"ends in {given.output.suffix}" if given.output.suffix else "has no ending"
        raise UserError.single(str(given.output), wrong, f"{given.to} files are {listed}")
    if given.lora is not None and given.to != "bundle":
        raise UserError.single("--lora", f"has no meaning with --to {given.to}", "use --to bundle")
    if given.token and given.to == "separate":
        raise UserError.single("--token", "has no meaning with --to separate", "all tokens are taken out")
    if given.token and len(given.token) > 1 and given.to != "bundle":
        raise UserError.single("--token", "stands twice", "only --to bundle takes several tokens")
    if len(given.input) > 1 and given.to == "separate":
        raise UserError.single(str(given.input[1]), "is one file too many", "--to separate takes one bundle")


def convert(inputs: Sequence[Path], output: Path, layout: "Layout", token: str | None) -> Iterator[tuple[Path, str]]:
    """Write one embedding in another layout; yields each file with a word on it.

    Raises:
        UserError: the input is no embedding, or more than one.
    """
    from library.errors import UserError
    from library.weights.embeddings import read_embedding

    for path in inputs:
        tokens = _tokens(path)
        if token is None and len(tokens) > 1:
            wrong = f"holds the embeddings of several tokens ({', '.join(tokens)})"
            raise UserError.single(str(path), wrong, f"name one, such as --token {tokens[0]}, or use --to separate")
    read = _joined([(path, read_embedding(path, str(path), token)) for path in inputs])
    if len(read) > 1:
        raise UserError.single(str(inputs[1]), "is another embedding", "convert one at a time, or use --to bundle")
    ((path, embedding),) = read
    yield from _write(output, embedding, layout, token or embedding.token or path.stem)


def bundle(
    inputs: Sequence[Path], output: Path, tokens: Sequence[str], lora: Path | None
) -> Iterator[tuple[Path, str]]:
    """Write embeddings, with a LoRA or without, as one file; yields it with a word on it.

    Raises:
        UserError: tokens are doubled or as many as not needed, or the LoRA is none, has one of them, or is for another
            family.
    """
    from library.errors import UserError
    from library.weights.embeddings import bundle_tensors, read_embeddings

    for path in inputs:
        _tokens(path)
    read = _joined([(path, one) for path in inputs for one in read_embeddings(path, str(path))])
    if tokens and len(tokens) != len(read):
        wrong = f"{len(tokens)} tokens for {len(read)} embeddings"
        raise UserError.single("--token", wrong, "give one for each, or leave it out")
    names = list(tokens) or [embedding.token or path.stem for path, embedding in read]
    bundled: dict[str, Tensor] = {}
    for name, (path, embedding) in zip(names, read, strict=True):
        tensors = bundle_tensors({name: embedding.vectors})
        if tensors.keys() & bundled.keys():
            raise UserError.single(str(path), f"a second embedding of {name}", "name them with --token")
        if len(embedding.vectors) != len(read[0][1].vectors):
            raise UserError.single(str(path), "is for another family than the first", "bundle those of one family")
        bundled |= tensors
    yield from _save_bundle(output, bundled, names, read[0][1], lora)


def separate(path: Path, folder: Path) -> Iterator[tuple[Path, str]]:
    """Write the LoRA of a bundle, if it has one, and each embedding; yields each file with a word on it.

    Raises:
        UserError: the file is no bundle.
    """
    from library.embedding_layouts import file_bases, holds_lora, is_bundled
    from library.errors import UserError
    from library.weights.embeddings import read_embeddings
    from library.weights.files import read_tensors
    from library.weights.save import save_lora

    _tokens(path)
    found = read_embeddings(path, str(path))
    if found[0].layout != "bundle":
        raise UserError.single(str(path), f"is no bundle but one embedding ({found[0].layout})", "use another --to")
    rest = {name: tensor for name, tensor in read_tensors(path).items() if not is_bundled(name)}
    stem = path.stem.removesuffix(".bundle")
    if holds_lora(rest):
        target = folder / f"{stem}.safetensors"
        if target.resolve() == path.resolve():
            raise UserError.single(str(folder), f"{target} is the bundle itself", "choose another folder")
        save_lora(rest, target, _carried(found[0].metadata))
        yield target, "LoRA"
    tokens = [str(one.token) for one in found]
    for base, token, embedding in zip(file_bases(stem, tokens, alone=False), tokens, found, strict=True):
        yield from _write(folder / f"{base}.safetensors", embedding, "kohya", token)


def _tokens(path: Path) -> tuple[str, ...]:
    """Of the embeddings in a file, as far as it tells them.

    Raises:
        UserError: the file is missing, damaged, no embedding or an unsound pickle, as the training scripts say it.
    """
    from library.models.embedding_files import tokens_of

    return tokens_of(path, str(path))


def _joined(read: "Sequence[tuple[Path, Embedding]]") -> "list[tuple[Path, Embedding]]":
    """The same, with two files for one text encoder each of the same token as one embedding, the narrower first.

    Raises:
        UserError: one is a half whose other half isn't there.
    """
    from dataclasses import replace

    found: list[tuple[Path, Embedding]] = []
    for path, one in read:
        before = next((place for place, (_, other) in enumerate(found) if _pair(one, other)), None)
        if before is None or (one.token is None and len(read) > 2):
            found.append((path, one))
            continue
        narrow, wide = sorted((found[before], (path, one)), key=lambda pair: pair[1].vectors[0].shape[1])
        found[before] = (narrow[0], replace(narrow[1], vectors=(*narrow[1].vectors, *wide[1].vectors)))
    for path, one in found:
        _refuse_half(path, one, [path for path, _ in read])
    return found


def _pair(one: "Embedding", other: "Embedding") -> bool:
    """Whether they are the vectors of one token for two text encoders."""
    if len(one.vectors) != 1 or len(other.vectors) != 1 or one.token != other.token:
        return False
    (count, width), (others, wider) = one.vectors[0].shape, other.vectors[0].shape
    return bool(count == others and width != wider)


def _refuse_half(path: Path, embedding: "Embedding", given: Sequence[Path]) -> None:
    from library.errors import UserError
    from library.models.embedding_files import half_of

    half = half_of(path, embedding.metadata, tuple(int(one.shape[1]) for one in embedding.vectors))
    if half is not None and half.other in given:
        wrong = f"is {half}, but {half.other} has another token, or another number of vectors"
        raise UserError.single(str(path), wrong, "give two halves of one embedding")
    if half is not None:
        raise UserError.single(str(path), f"is {half}", f"give {half.other or 'the file of the other half'}, too")


def _write(output: Path, embedding: "Embedding", layout: "Layout", token: str) -> Iterator[tuple[Path, str]]:
    """The files of one embedding: two of them for two text encoders in the layout of diffusers."""
    from library.embedding_layouts import TOKEN_KEY, layout_files
    from library.weights.embedding_metadata import VECTORS_KEY, usage_metadata
    from library.weights.embeddings import write_embedding

    encoders = len(embedding.vectors)
    files: tuple[tuple[Path, tuple[int, ...]], ...] = ((output, tuple(range(encoders))),)
    if layout == "diffusers":
        named = layout_files(output.stem, layout, encoders)
        files = tuple((output.with_name(Path(name).name).with_suffix(output.suffix), some) for name, some in named)
    count = int(embedding.vectors[0].shape[0])
    for path, some in files:
        text = _carried(embedding.metadata, embedding=True) | {TOKEN_KEY: token, VECTORS_KEY: str(count)}
        if embedding.token and text.get(_TRIGGER) == embedding.token:
            text[_TRIGGER] = token
        text |= usage_metadata(layout, path.name, token, encoders)
        write_embedding(path, [embedding.vectors[one] for one in some], layout, token, None, text)
        yield path, f"{token}, {count} vector{'s' if count > 1 else ''}, layout {layout}"


def _save_bundle(
    output: Path, bundled: "Mapping[str, Tensor]", tokens: Sequence[str], first: "Embedding", lora: Path | None
) -> Iterator[tuple[Path, str]]:
    from library.embedding_layouts import holds_lora
    from library.errors import UserError
    from library.weights.embedding_metadata import bundle_usage_metadata
    from library.weights.files import read_metadata, read_tensors, save_safetensors
    from library.weights.save import save_lora

    usage = bundle_usage_metadata(output.name, tokens)
    if lora is None:
        save_safetensors(bundled, output, _carried(first.metadata, embedding=True) | usage)
        yield output, f"bundle of {', '.join(tokens)}"
        return
    tensors = read_tensors(lora)
    if not holds_lora(tensors):
        raise UserError.single(f"--lora {lora}", "is no LoRA", "give the LoRA that was trained with the embeddings")
    if double := sorted(tensors.keys() & bundled.keys()):
        raise UserError.single(f"--lora {lora}", f"has {double[0]} already", "take it apart with --to separate first")
    width = sum(one.shape[1] for one in first.vectors)
    taken = {int(t.shape[1]) for name, t in tensors.items() if name.endswith("attn2_to_k.lora_down.weight")}
    if taken and taken != {width}:
        wrong = f"is on a U-Net that takes text of {min(taken)} numbers, the embeddings make {width}"
        raise UserError.single(f"--lora {lora}", wrong, "bundle a LoRA and embeddings of one family")
    metadata = read_metadata(lora) if lora.suffix == ".safetensors" else {}
    save_lora(tensors | dict(bundled), output, _carried(metadata) | usage)
    yield output, f"{lora.name} with {', '.join(tokens)}"


def _carried(metadata: Mapping[str, str], *, embedding: bool = False) -> dict[str, str]:
    """What of a file's text is still true in another layout, in the order of its names: readers give it in any.
    `embedding`: for a file without a network."""
    from library.weights.embedding_metadata import KIND, NETWORK, USAGE
    from library.weights.loras.amended import STALE

    found = {name: text for name, text in sorted(metadata.items()) if name not in STALE and not name.startswith(USAGE)}
    if embedding:
        kept = [name for name in found if name.startswith(("ss_", "modelspec.")) and not name.startswith(NETWORK)]
        found = {name: found[name] for name in kept}
        if architecture := found.get("modelspec.architecture"):
            found["modelspec.architecture"] = f"{architecture.rpartition('/')[0]}/{KIND}"
    return found


if __name__ == "__main__":
    sys.exit(main())
