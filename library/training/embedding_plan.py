"""Which embeddings a run trains or uses, and what their vectors start from: from the options, the base model's configs
and the headers of embedding files. Imports no torch; the vectors themselves are training.embedding_vectors'.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.errors import Problem, UserError
from library.models.embedding_files import check_fits, read_embedding_header
from library.models.info import ModelInfo
from library.options import Options
from library.options.embedding_checks import base_pairs, starts
from library.tokenizer import WORDS
from library.tokenizer.vocabulary import NewToken, Vocabulary
from library.training.learning_rates import learning_rates
from library.training.token_checks import Reading, clashes, listed, pieces, same_in_bundles, token_problem, unread

NormRule = Literal["off", "clamp", "median"]


@dataclass(frozen=True)
class PlannedToken:
    """A token and where its vectors come from: rows of the vocabulary, one for each vector, or a file, or neither: then
    they are drawn.

    Attributes:
        where: the flag, or the file's line, that named it.
        ids: of CLIP's own vocabulary; empty where none are copied.
        source: the flag, or the file's line, that named `file`.
    """

    token: NewToken
    where: str
    ids: tuple[int, ...] = ()
    file: Path | None = None
    source: str = ""


@dataclass(frozen=True)
class EmbeddingPlan:
    """The embeddings of a run.

    Attributes:
        trained, base: tokens whose vectors are trained, and those whose vectors are frozen.
        rate: learning rate of the vectors.
        ratio: the share of all steps in which they are trained.
        norm: what each vector's norm is kept to after each step.
    """

    trained: tuple[PlannedToken, ...]
    base: tuple[PlannedToken, ...]
    rate: float
    ratio: float = 1.0
    norm: NormRule = "off"

    @property
    def vocabulary(self) -> Vocabulary:
        """CLIP's with these tokens: frozen ones first."""
        return Vocabulary(tuple(one.token for one in (*self.base, *self.trained)))

    @property
    def trains(self) -> bool:
        """Whether any vector is trained."""
        return bool(self.trained)

    def frozen_after(self, total: int) -> int | None:
        """After how many of `total` steps the vectors are frozen; None for never."""
        return None if self.ratio >= 1 else max(1, round(self.ratio * total))


def start_notices(plan: EmbeddingPlan, first: int, total: int, where: str) -> Iterator[str]:
    """A line about a run that starts behind the steps in which vectors are trained.

    Args:
        first: how many steps count as done (`--initial_step`, or those before `--initial_epoch`), which `where` says.
        total: steps of the whole run.
    """
    steps = plan.frozen_after(total) if plan.trains else None
    if steps is not None and first >= steps:
        yield f"{where}: the vectors are trained in the first {steps:,} of {total:,} steps, so that they never are"


def plan_embeddings(options: Options, model: ModelInfo) -> EmbeddingPlan | None:
    """The embeddings of a run; None where it has none. For options that passed their own checks.

    Raises:
        UserError: tokens that can't be new ones, words of several tokens, files that can't be read or don't fit the
            base model, counts of vectors that differ: all that was found.
    """
    flags = options.embeddings
    if not (flags.token_string or flags.base_embeddings):
        return None
    problems: list[Problem] = []
    base = tuple(_base(options, model, problems))
    trained = tuple(_trained(options, model, problems))
    problems += _token_problems((*base, *trained), options, model)
    if "bundle" in (options.embeddings.save_embedding_as or ()):
        problems += same_in_bundles([(one.token, one.where) for one in trained])
    if problems:
        raise UserError(dict.fromkeys(problems))
    rate = learning_rates(options, len(model.text_encoder_configs)).embeddings
    if not trained:
        return EmbeddingPlan(trained, base, rate)
    return EmbeddingPlan(trained, base, rate, flags.ti_train_steps_ratio or 1.0, flags.embedding_norm)


def _base(options: Options, model: ModelInfo, problems: list[Problem]) -> Iterator[PlannedToken]:
    where = options.where("base_embeddings")
    for text, file in base_pairs(options):
        vectors = _vectors_of(file, text, f"{where} {file}", model, problems)
        yield PlannedToken(NewToken(text, vectors or 1), where, file=file, source=where)


def _trained(options: Options, model: ModelInfo, problems: list[Problem]) -> Iterator[PlannedToken]:
    where = options.where("token_string")
    for place, text in enumerate(options.embeddings.token_string or ()):
        wanted, start = _wanted(options, place), starts(options, place)
        if "init_word" in start:
            ids = _word(str(start["init_word"]), options.where("init_word"), problems) * (wanted or 1)
            yield PlannedToken(NewToken(text, wanted or 1), where, ids)
        elif "initial_phrase" in start:
            ids = _phrase(str(start["initial_phrase"]), options.where("initial_phrase"), problems)
            vectors = _agreed(wanted, len(ids), text, "--initial_phrase", options, problems)
            yield PlannedToken(NewToken(text, vectors), where, ids)
        elif "weights" in start:
            file = Path(start["weights"])
            held = _vectors_of(file, text, f"{options.where('weights')} {file}", model, problems)
            vectors = _agreed(wanted, held, text, str(file), options, problems)
            yield PlannedToken(NewToken(text, vectors), where, file=file, source=options.where("weights"))
        else:
            yield PlannedToken(NewToken(text, wanted or 1), where)


def _wanted(options: Options, place: int) -> int | None:
    """`--num_vectors_per_token` for the token at `place`."""
    given = options.embeddings.num_vectors_per_token
    return given[0 if len(given) == 1 else place] if given else None


def _agreed(wanted: int | None, held: int, text: str, source: str, options: Options, problems: list[Problem]) -> int:
    """How many vectors a token has whose start tells it; `held` is 0 where that is wrong and told already."""
    if held and wanted not in (None, held):
        wrong = f"{wanted} for {text!r}, but {source} has {held}"
        problems.append(Problem(options.where("num_vectors_per_token"), wrong, "leave it out: the start tells it"))
    return held or wanted or 1


def _word(text: str, where: str, problems: list[Problem]) -> tuple[int, ...]:
    """The id of a word of one token; nothing, and a problem, for any other."""
    found = pieces(text)
    if len(found) == 1:
        return (found[0][0],)
    if found:
        parts = listed([part for _, part in found])
        wrong = f"{text!r} is {len(found)} tokens: {parts}"
        advice = f"use a word of one token, or --initial_phrase {shlex.quote(text)} for a vector of each"
        problems.append(Problem(where, wrong, advice))
    else:
        problems.append(Problem(where, f"{text!r} is no word", "give one such as cat"))
    return ()


def _phrase(text: str, where: str, problems: list[Problem]) -> tuple[int, ...]:
    found = pieces(text)
    if not found:
        problems.append(Problem(where, f"{text!r} holds no word", "give a phrase such as 'a fluffy dog'"))
    return tuple(one for one, _ in found)


def _vectors_of(file: Path, token: str, where: str, model: ModelInfo, problems: list[Problem]) -> int:
    """How many vectors a file holds for each text encoder; 0, and problems, if it can't be used."""
    try:
        header = read_embedding_header(file, where, token)
    except UserError as error:
        problems += error.problems
        return 0
    wrong = list(check_fits(header, where, model))
    problems += wrong
    return 0 if wrong else header.vectors


def _token_problems(planned: Sequence[PlannedToken], options: Options, model: ModelInfo) -> Iterator[Problem]:
    data = options.dataset
    pad_ids = dict.fromkeys(encoder.pad_id for encoder in model.family.text_encoders)
    reading = Reading(tuple(pad_ids), data.weighted_captions, data.enable_wildcard)
    limit = options.model.max_token_length or WORDS
    good: list[PlannedToken] = []
    for one in planned:
        problem = token_problem(one.token.text, one.where, reading)
        if problem:
            yield problem
        elif one.token.vectors > limit:
            wrong = f"{one.token.text!r} has {one.token.vectors} vectors, and captions are cut at {limit}"
            yield Problem(one.where, wrong, "use fewer" if limit > WORDS else "use fewer, or --max_token_length 225")
        else:
            good.append(one)
    named = [(one.token, one.where) for one in good]
    clashing = list(clashes(named))
    yield from clashing
    if not clashing:
        yield from unread(Vocabulary(tuple(token for token, _ in named)), [where for _, where in named], reading)
