"""What must hold between the flags of embeddings, and between them and other flags; known without the base model.

Whether tokens, words and files fit the base model and its tokenizer is training.embedding_plan's business.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from library.errors import Problem
from library.options.registry import Options
from library.options.scripts import SCRIPTS, TRAIN_TEXTUAL_INVERSION

_STARTS = ("init_word", "initial_phrase", "weights")


def problems(options: Options) -> Iterator[Problem]:
    """What can't be trained as told."""
    yield from _base_files(options)
    if options.embeddings.token_string:
        for one in _CHECKS:
            yield from one(options)


def notices(options: Options) -> Iterator[str]:
    """What has no effect, or is likely not what was meant, in one line each."""
    flags = options.embeddings
    if not flags.token_string:
        return
    if not has_network(options):
        for name in ("full_fp16", "full_bf16"):
            if options.value(name):
                yield f"{options.where(name)}: has no effect, vectors of embeddings stay in float32"
        if flags.embedding_lr is not None and "learning_rate" in options.explicit:
            yield f"{options.where('learning_rate')}: has no effect, because embedding_lr counts"
    if options.dataset.dataset_class is not None:
        words = " and ".join(dict.fromkeys(flags.token_string))
        yield f"{options.where('dataset_class')}: its captions can't be looked at beforehand; they must hold {words}"
    if options.training.resume not in (None, "latest"):
        for name in _STARTS:
            if options.value(name):
                yield f"{options.where(name)}: has no effect with --resume, the vectors come from the state"
        return
    drawn = dict.fromkeys(token for place, token in enumerate(flags.token_string) if not starts(options, place))
    if drawn:
        yield (
            f"{options.where('token_string')}: the vectors of {' and '.join(drawn)} start at random; they learn sooner "
            "from a word for what the pictures show (--init_word)"
        )


def has_network(options: Options) -> bool:
    """Whether the script trains a network, too."""
    return "network" not in SCRIPTS[options.script].without


def embedding_rate(options: Options) -> float | None:
    """The learning rate of the vectors; None where none are trained."""
    flags = options.embeddings
    if not flags.token_string:
        return None
    return options.optimizer.learning_rate if flags.embedding_lr is None else flags.embedding_lr


def always_trains_vectors(options: Options) -> bool:
    """Whether vectors are trained from the first step to the last."""
    return bool(options.embeddings.token_string) and (options.embeddings.ti_train_steps_ratio or 1.0) >= 1


def starts(options: Options, place: int) -> dict[str, str | Path]:
    """What the vectors of the token at `place` start from, by flag: at most one in a run without problems. An empty
    value stands for none, so that tokens may start from different things."""
    given = ((name, options.value(name) or ()) for name in _STARTS)
    return {name: values[place] for name, values in given if place < len(values) and values[place] not in ("", Path())}


def base_pairs(options: Options) -> tuple[tuple[str, Path], ...]:
    """Tokens and files of `--base_embeddings`."""
    parts = (text.partition("=") for text in options.embeddings.base_embeddings or ())
    return tuple((token.strip(), Path(file.strip()).expanduser()) for token, _, file in parts)


def _base_files(options: Options) -> Iterator[Problem]:
    where = options.where("base_embeddings")
    for text, (token, file) in zip(options.embeddings.base_embeddings or (), base_pairs(options), strict=True):
        if "=" not in text:
            token = Path(text).stem
            advice = f"such as {token}={text}" if Path(text).is_file() else "such as mycat=mycat.safetensors"
            yield Problem(where, f"{text!r} is no TOKEN=FILE", advice)
        elif not token:
            yield Problem(where, f"{text!r} names no token", "write the token that captions use before the =")
        elif not file.is_file():
            yield Problem(where, f"there is no file {file}")


def _counts(options: Options) -> Iterator[Problem]:
    wanted = len(options.embeddings.token_string or ())
    for name in ("num_vectors_per_token", *_STARTS):
        given = options.value(name)
        allowed = (1, wanted) if name == "num_vectors_per_token" else (wanted,)
        if given is not None and len(given) not in allowed:
            tokens = "1 token" if wanted == 1 else f"{wanted} tokens"
            wrong = f"{len(given)} {'value' if len(given) == 1 else 'values'} for {tokens}"
            advice = "give one for each token, in the order of --token_string"
            if wanted == 1 and name in ("init_word", "initial_phrase"):
                advice = "words of one phrase stand in quotes: --initial_phrase 'a fluffy dog'"
            yield Problem(options.where(name), wrong, advice)


def _one_start(options: Options) -> Iterator[Problem]:
    for place, token in enumerate(options.embeddings.token_string or ()):
        given = starts(options, place)
        if len(given) > 1:
            places = ", ".join(options.where(name) for name in given)
            yield Problem(places, f"each says what the vectors of {token} start from", "give one of them")


def _start_files(options: Options) -> Iterator[Problem]:
    for path in options.embeddings.weights or ():
        if path != Path() and not path.is_file():
            yield Problem(options.where("weights"), f"there is no file {path}")


def _rate(options: Options) -> Iterator[Problem]:
    if embedding_rate(options):
        return
    name = "learning_rate" if options.embeddings.embedding_lr is None else "embedding_lr"
    wrong = "the learning rate of the vectors of --token_string is 0: they would not be trained"
    yield Problem(options.where(name), wrong, "raise it; embeddings that stay as they are go to --base_embeddings")


def _end(options: Options) -> Iterator[Problem]:
    if not has_network(options) and not always_trains_vectors(options):
        wrong = "nothing would be trained after it, because there is no network"
        yield Problem(options.where("ti_train_steps_ratio"), wrong, "end the run there: --max_train_steps")


def _precision(options: Options) -> Iterator[Problem]:
    for name in ("full_fp16", "full_bf16"):
        if has_network(options) and options.value(name):
            wrong = "can't be used with --token_string: vectors of embeddings stay in float32"
            yield Problem(
                options.where(name), wrong, f"leave it out, or train them apart: {TRAIN_TEXTUAL_INVERSION.file}"
            )


_CHECKS: tuple[Callable[[Options], Iterator[Problem]], ...] = (
    _counts,
    _one_start,
    _start_files,
    _rate,
    _end,
    _precision,
)
