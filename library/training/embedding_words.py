"""What a run says of its new words: before it loads anything, what their vectors start from and how many captions hold
them; at the end, how to use what was saved. The rows of a dry run are embedding_rows'. Imports no torch.
"""

from collections.abc import Iterator
from pathlib import Path

from library.data.token_use import TokenUse
from library.options import Options
from library.options.embedding_checks import starts
from library.tokenizer.vocabulary import NewToken
from library.training.embedding_plan import EmbeddingPlan
from library.training.weight_files import WeightFile, weight_files
from library.weights.embedding_metadata import usage_line


def start_lines(options: Options, plan: EmbeddingPlan, use: TokenUse | None, *, resumed: bool) -> Iterator[str]:
    """One line for each new word, frozen ones first.

    Args:
        use: what captions hold; None where they can't be looked at.
        resumed: the run goes on from a state, which has the vectors.
    """
    for one in plan.base:
        yield f"{counted(one.token)}, frozen, from {one.file}{_held(one.token, use)}"
    for place, one in enumerate(plan.trained):
        start = start_text(options, place, resumed=resumed)
        yield f"{counted(one.token)}, {start}{_held(one.token, use)}"


def counted(token: NewToken) -> str:
    """A token and the number of its vectors."""
    return f"{token.text}: {token.vectors} vector{'s' if token.vectors > 1 else ''}"


def start_text(options: Options, place: int, *, resumed: bool) -> str:
    """What the vectors of the trained token at `place` are before the first step."""
    if resumed:
        return "going on from the state"
    start = next(iter(starts(options, place).values()), None)
    if start is None:
        return "starting from drawn numbers"
    return f"starting from {start if isinstance(start, Path) else repr(start)}"


def _held(token: NewToken, use: TokenUse | None) -> str:
    if use is None:
        return ""
    varying = " (as first shown, they vary)" if token in use.sometimes and not use.count(token) else ""
    return f", in {use.count(token):,} of {use.captions:,} captions{varying}"


def end_lines(options: Options, plan: EmbeddingPlan, encoders: int, stem: str) -> Iterator[str]:
    """How to use the embeddings of a save, a line for each; arguments as of `weight_files`."""
    files = weight_files(options, plan, encoders, stem)
    kept = [file for file in files if file.holds == "kohya" and file.name.endswith(".safetensors")]
    for file in kept:
        (token,) = file.tokens
        yield usage_line(_name(file), token.text)
    networks = [_name(file) for file in files if file.holds == "network"]
    if networks and kept:
        yield f"{' and '.join([*networks, *map(_name, kept)])} belong together: load the LoRA, and write its words"


def _name(file: WeightFile) -> str:
    return Path(file.name).name
