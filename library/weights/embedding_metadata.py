"""The text that stands in an embedding's file: whose vectors, how they were trained, what they are, and one line for
each program that tells how to use them. No torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from library.embedding_layouts import TOKEN_KEY, Layout, bundle_name
from library.weights.metadata import ModelSpec, Progress, lora_metadata

PROGRAMS = ("a1111", "comfyui", "invokeai", "diffusers")
_LOADERS_NEED = ("ss_v2", "ss_base_model_version", TOKEN_KEY)
NETWORK = "ss_network_"
USAGE = "usage_"
VECTORS_KEY = "ss_num_vectors_per_token"
KIND = "textual-inversion"


@dataclass(frozen=True)
class EmbeddingFacts:
    """What a file's text tells of the embedding.

    Attributes:
        vectors: of the token, for each text encoder.
        encoders: how many text encoders the model has.
        file_name: of the file, with its ending but without folders.
        rate: the vectors' learning rate.
    """

    token: str
    vectors: int
    encoders: int
    file_name: str
    layout: Layout
    rate: float


def embedding_metadata(
    facts: EmbeddingFacts,
    training: Mapping[str, str],
    progress: Progress,
    spec: ModelSpec,
    *,
    no_metadata: bool = False,
) -> dict[str, str]:
    """All text of one embedding file.

    Args:
        training: the run's, from `training_metadata`; what it says of a network is left out.
        spec: the run's; its kind becomes `textual-inversion`, and where it has none, the token is its trigger phrase.
        no_metadata: leave out all but the base model's family, the token and `modelspec.*`.
    """
    texts = {"trigger_phrase": facts.token} | {name: text for name, text in spec.texts.items() if text is not None}
    own = replace(spec, kind=KIND, texts=texts)
    plain = {name: text for name, text in training.items() if not name.startswith(NETWORK)}
    found = lora_metadata(plain, progress, own)
    found |= {
        TOKEN_KEY: facts.token,
        VECTORS_KEY: str(facts.vectors),
        "ss_embedding_lr": str(facts.rate),
        **usage_metadata(facts.layout, facts.file_name, facts.token, facts.encoders),
    }
    if no_metadata:
        found = {name: text for name, text in found.items() if name in _LOADERS_NEED or name.startswith("modelspec.")}
    return found


def usage_line(file_name: str, token: str) -> str:
    """What to write in each program's prompts to use an embedding's file, in one line to read."""
    a1111, comfyui = _prompt_words(file_name)
    line = f'{token}: A1111 "{a1111}", ComfyUI "{comfyui}", diffusers token="{token}"'
    return line if a1111 == token else f"{line}; A1111 and ComfyUI go by the file's name"


def network_metadata(tokens: Sequence[str], files: Sequence[str]) -> dict[str, str]:
    """What a network's file tells of new tokens that were trained with it: their texts, and how to use the embeddings'
    files, by name, without which it is only half of what was trained."""
    found = {TOKEN_KEY: " ".join(tokens)}
    if files:
        names = map(_prompt_words, files)
        how = "; ".join(
            f"put {file} into embeddings/ (ComfyUI: models/embeddings/) and write {a1111} (ComfyUI: {comfyui})"
            for file, (a1111, comfyui) in zip(files, names, strict=True)
        )
        found[f"{USAGE}embeddings"] = f"trained together with {' and '.join(files)}: {how}"
    return found


def usage_metadata(layout: Layout, file_name: str, token: str, encoders: int) -> dict[str, str]:
    """The keys `usage_<program>`: where to put a file of this name and layout, and what to write in a prompt."""
    if layout == "bundle":
        return bundle_usage_metadata(file_name, (token,))
    return _by_program(_usage(layout, file_name, token, encoders))


def bundle_usage_metadata(file_name: str, tokens: Sequence[str]) -> dict[str, str]:
    """The keys `usage_<program>` of a LoRA's file in which all these tokens are bundled."""
    stem = file_name.rpartition(".")[0]
    apart = f"no, take it apart first: python tools/convert_embedding.py --to separate {file_name} FOLDER"
    names = " ".join(map(bundle_name, tokens))
    return _by_program(
        (
            f"put the file into models/Lora/ and write <lora:{stem}:1> {names}",
            f"put the file into models/loras/ and into models/embeddings/, load the LoRA and write embedding:{stem}",
            apart,
            apart,
        )
    )


def _by_program(lines: Sequence[str]) -> dict[str, str]:
    return {f"{USAGE}{program}": line for program, line in zip(PROGRAMS, lines, strict=True)}


def _usage(layout: Layout, file_name: str, token: str, encoders: int) -> tuple[str, str, str, str]:
    stem = file_name.rpartition(".")[0]
    if encoders == 1:
        diffusers = f"pipe.load_textual_inversion({file_name!r}, token={token!r})"
    elif layout == "diffusers":
        other = "no, use the file without .clip_l or .clip_g in its name, which holds the vectors of both text encoders"
        call = _diffusers_call(repr(file_name), token, "_2" if stem.endswith(".clip_g") else "")
        return other, other, other, f"{call}; write {token}"
    else:
        calls = (_diffusers_call(f't["{name}"]', token, number) for name, number in (("clip_l", ""), ("clip_g", "_2")))
        diffusers = "; ".join((f"t = safetensors.torch.load_file({file_name!r})", *calls))
    a1111, comfyui = _prompt_words(file_name)
    return (
        f"put the file into embeddings/ and write {a1111}",
        f"put the file into models/embeddings/ and write {comfyui}",
        f"install the file as a model and write <{stem}>",
        f"{diffusers}; write {token}",
    )


def _prompt_words(file_name: str) -> tuple[str, str]:
    """What A1111 and ComfyUI call an embedding in prompts: its file's name."""
    stem = file_name.rpartition(".")[0]
    return stem, f"embedding:{stem}"


def _diffusers_call(what: str, token: str, number: str) -> str:
    place = f"text_encoder=pipe.text_encoder{number}, tokenizer=pipe.tokenizer{number}"
    return f"pipe.load_textual_inversion({what}, token={token!r}, {place})"
