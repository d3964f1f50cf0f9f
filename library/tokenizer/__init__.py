"""The CLIP tokenizer, offline: OpenAI's byte-pair merges come with the package.

Needs only the `tokenizers` package, so that a dry run can count tokens without importing transformers.
This is not where captions are split into rows of 77 (models.prompts) and not where they are made (data.captions).
"""

import gzip
import hashlib
from functools import lru_cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

MERGES_FILE = Path(__file__).parent / "clip_merges.txt.gz"
MERGES_SHA256 = "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02"
VOCABULARY_SIZE = 49408
START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"
START_ID, END_ID = 49406, 49407
WORDS = 75
"""Tokens of one row of a CLIP text encoder, without its start and end."""

_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _byte_characters() -> list[str]:
    """The 256 printable stand-ins for bytes, in the order in which CLIP's vocabulary numbers them (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]


@lru_cache(maxsize=1)
def clip_merges() -> tuple[tuple[str, str], ...]:
    """The 48,894 merges of CLIP's vocabulary, best first.

    Raises:
        ValueError: the packaged file is not the one that was shipped.
    """
    text = gzip.decompress(MERGES_FILE.read_bytes())
    if hashlib.sha256(text).hexdigest() != MERGES_SHA256:
        raise ValueError(f"{MERGES_FILE} is damaged; install the package again")
    pairs = (line.split(" ") for line in text.decode("utf-8").splitlines())
    return tuple((left, right) for left, right in pairs)


@lru_cache(maxsize=1)
def clip_vocabulary() -> dict[str, int]:
    """Token text to id, all 49,408 of them: bytes, bytes that end a word, merges, start and end."""
    characters = _byte_characters()
    tokens = [*characters, *(c + "</w>" for c in characters), *(a + b for a, b in clip_merges())]
    return {token: index for index, token in enumerate([*tokens, START_TOKEN, END_TOKEN])}


def build(vocabulary: dict[str, int], merges: list[tuple[str, str]], *more_special: str) -> Tokenizer:
    """A CLIP tokenizer of the `tokenizers` package; `encode(text).ids` holds no start and end tokens.

    `more_special` are tokens that are one wherever they stand in a text.
    """
    affixes = {"continuing_subword_prefix": "", "end_of_word_suffix": "</w>"}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=END_TOKEN, **affixes))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens([START_TOKEN, END_TOKEN, *more_special])
    return tokenizer


@lru_cache(maxsize=2)
def clip_tokenizer(pad_id: int = END_ID) -> Tokenizer:
    """The packaged CLIP tokenizer, built once a process (about 0.1 s).

    Where `pad_id` is 0, the token "!" fills rows up (SD2, SDXL's second encoder); as in transformers and diffusers each
    "!" in a text is that token then, whatever stands around it.
    """
    return build(clip_vocabulary(), list(clip_merges()), *special_padding(pad_id))


def special_padding(pad_id: int) -> tuple[str, ...]:
    """The token that fills rows up, where it is none of the special ones anyway."""
    return () if pad_id == END_ID else (_byte_characters()[pad_id],)


def write_folder(folder: Path) -> None:
    """Write `vocab.json`, `merges.txt` and `tokenizer_config.json`, the layout that diffusers folders hold."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = json.dumps(clip_vocabulary(), ensure_ascii=False, separators=(",", ":"))
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in clip_merges())
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": START_TOKEN,
        "eos_token": END_TOKEN,
        "unk_token": END_TOKEN,
        "pad_token": END_TOKEN,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
