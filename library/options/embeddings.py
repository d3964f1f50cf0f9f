"""Flags of embeddings: new tokens whose vectors are trained, alone (textual inversion) or with a network."""

from pathlib import Path
from typing import Literal

from library.options.flags import Group, honoured


class Embeddings(Group):
    """Embeddings (textual inversion)"""

    token_string: tuple[str, ...] | None = honoured(
        None, "new tokens to train, words that the tokenizer doesn't know", metavar="TOKEN"
    )
    num_vectors_per_token: tuple[int, ...] | None = honoured(
        None,
        "vectors of each token (default: 1, or those of --weights or --initial_phrase); one number counts for all",
        metavar="N",
        each_ge=1,
        needs="token_string",
    )
    init_word: tuple[str, ...] | None = honoured(
        None,
        "word, of one token, that each token's vectors start from; '' for none (default: drawn like the vocabulary)",
        metavar="WORD",
        needs="token_string",
    )
    initial_phrase: tuple[str, ...] | None = honoured(
        None,
        "phrase that each token's vectors start from, one vector for each token of it; '' for none",
        metavar="TEXT",
        needs="token_string",
    )
    weights: tuple[Path, ...] | None = honoured(
        None, "embedding files that each token's vectors start from; '' for none", metavar="FILE", needs="token_string"
    )
    base_embeddings: tuple[str, ...] | None = honoured(
        None, "frozen embeddings that captions and prompts use", metavar="TOKEN=FILE"
    )
    embedding_lr: float | None = honoured(
        None, "learning rate of the vectors (default: --learning_rate)", ge=0, needs="token_string"
    )
    ti_train_steps_ratio: float | None = honoured(
        None, "train the vectors only in this share of all steps, from the start", gt=0, le=1, needs="token_string"
    )
    embedding_norm: Literal["off", "clamp", "median"] = honoured(
        "off",
        "after each step, keep each vector's norm within those of the vocabulary, or at their median",
        needs="token_string",
    )
    use_object_template: bool = honoured(False, "the same as --caption_preset object", needs="token_string")
    use_style_template: bool = honoured(False, "the same as --caption_preset style", needs="token_string")
    save_embedding_as: tuple[Literal["webui", "diffusers", "bundle"], ...] | None = honoured(
        None,
        "further files: in the layouts of A1111 and diffusers, or bundled with the network in one file",
        metavar="LAYOUT",
        needs="token_string",
    )
