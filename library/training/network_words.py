"""Whether a network that a run starts from, or merges, was trained with new words whose embeddings the run lacks; told
from its file's texts. Whether its tensors fit is start_weights' business. Imports no torch.
"""

from collections.abc import Iterator
from pathlib import Path

from library.embedding_layouts import TOKEN_KEY
from library.errors import UserError
from library.models.pickles import read_weights
from library.options import Options
from library.options.embedding_checks import base_pairs, starts


def network_word_notices(options: Options, *, resumed: bool) -> Iterator[str]:
    """A line for each file of `--network_weights` and `--base_weights` that was trained with such words.

    Args:
        resumed: the run goes on from a state, which has the network and the vectors.
    """
    network, embeddings = options.network, options.embeddings
    files = [] if resumed or network.network_weights is None else [("network_weights", network.network_weights)]
    files += [("base_weights", Path(file)) for file in network.base_weights or ()]
    there = {token.casefold() for token, _ in base_pairs(options)}
    for place, token in enumerate(embeddings.token_string or ()):
        if resumed or "weights" in starts(options, place):
            there.add(token.casefold())
    for name, file in files:
        where = f"{options.where(name)} {file}"
        words = [word for word in _words(file, where) if word.casefold() not in there]
        if words:
            named, its = ("words", "their embeddings") if len(words) > 1 else ("word", "its embedding")
            files_of = " ".join(f"{word}=FILE" for word in words)
            yield (
                f"{where}: was trained with the {named} {' and '.join(words)}; give {its} with --weights (and "
                f"--token_string), or as --base_embeddings {files_of}"
            )


def _words(file: Path, where: str) -> list[str]:
    """The new words that a file tells; none of one that can't be read, which is refused elsewhere."""
    try:
        return read_weights(file, where).metadata.get(TOKEN_KEY, "").split()
    except (UserError, OSError):
        return []
