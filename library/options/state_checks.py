"""Checks of flags about saving, going on and the Hugging Face hub; the hub is asked later (training.uploads)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from library.errors import Problem, nearest
from library.options.embedding_checks import has_network
from library.options.registry import Options

RepoKind = Literal["model", "dataset", "space"]
VISIBILITIES = ("public", "private")
_REPO = re.compile(r"(?!.*(--|\.\.))\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)
_STATE_FORM = "user/repo/path, such as me/my-lora/my-lora-state, then :revision and :type if needed"


@dataclass(frozen=True)
class HubState:
    """Where on the hub a state lies. `revision` is a branch, a tag or a commit; None is the main branch."""

    repo: str
    path: str
    revision: str | None
    kind: RepoKind

    @classmethod
    def parse(cls, text: str) -> "HubState":
        """Read `user/repo/path[:revision[:type]]`, as sd-scripts writes it.

        Raises:
            ValueError: with what is wrong.
        """
        place, _, rest = text.partition(":")
        revision, _, kind = rest.partition(":")
        owner, _, inside = place.partition("/")
        name, _, path = inside.partition("/")
        if not is_repo(f"{owner}/{name}") or not _is_inside(path):
            raise ValueError(f"{text!r} is no state on the hub; give {_STATE_FORM}")
        return cls(f"{owner}/{name}", path.strip("/"), revision or None, repo_kind(kind))


def is_repo(text: str) -> bool:
    """Whether a text has the form of a repository's name, `user/name`."""
    return len(text) <= 96 and _REPO.fullmatch(text) is not None


def repo_kind(text: str | None) -> RepoKind:
    """The kind of a repository; None and the empty text mean a model.

    Raises:
        ValueError: there is no such kind.
    """
    for kind in get_args(RepoKind):
        if (text or "model").lower() in (kind, f"{kind}s"):
            return kind
    raise ValueError(f"there is no repository type {text}; it is {', '.join(get_args(RepoKind))}")


def _is_inside(path: str) -> bool:
    """Whether a path names something inside of a repository."""
    parts = path.strip("/").split("/")
    return all(part not in ("", ".", "..") and "\\" not in part for part in parts)


def problems(options: Options) -> Iterator[Problem]:
    """What is wrong with these flags."""
    yield from _hub(options)
    yield from _resume(options)
    training = options.training
    if training.max_train_epochs is None and (training.initial_step or 0) >= training.max_train_steps:
        wrong = f"the run would start at step {training.initial_step} of {training.max_train_steps}: nothing is left"
        yield Problem(options.where("initial_step"), wrong, "raise --max_train_steps, which counts from step 0")


def _hub(options: Options) -> Iterator[Problem]:
    hub = options.hub
    if hub.huggingface_repo_id is None:
        return
    named = hub.huggingface_repo_id
    if not is_repo(named if "/" in named else f"me/{named}"):
        advice = "give user/name, such as me/my-lora, or the name of one of your own"
        yield Problem(options.where("huggingface_repo_id"), f"{named!r} is no name of a repository", advice)
    try:
        repo_kind(hub.huggingface_repo_type)
    except ValueError as fault:
        yield Problem(options.where("huggingface_repo_type"), str(fault))
    visibility = hub.huggingface_repo_visibility
    if visibility is not None and visibility.lower() not in VISIBILITIES:
        advice = nearest(visibility.lower(), VISIBILITIES) or f"it is {' or '.join(VISIBILITIES)}"
        yield Problem(options.where("huggingface_repo_visibility"), f"there is no visibility {visibility}", advice)
    folder = hub.huggingface_path_in_repo
    if folder and not _is_inside(folder):
        wrong = f"{folder!r} is no folder in a repository"
        yield Problem(options.where("huggingface_path_in_repo"), wrong, "give names with / between them")


def _resume(options: Options) -> Iterator[Problem]:
    resume = options.training.resume
    if not options.hub.resume_from_huggingface or resume is None:
        return
    where = options.where("resume")
    if resume == "latest":
        yield Problem(where, "`latest` is looked for in --output_dir, not on the hub", f"give {_STATE_FORM}")
        return
    try:
        HubState.parse(resume)
    except ValueError as fault:
        yield Problem(where, str(fault))


def notices(options: Options) -> Iterator[str]:
    """Lines about flags that do nothing here, and about a secret where others can read it."""
    yield from _idle(options)
    given, hub = options.explicit, options.hub
    if hub.huggingface_token is not None and options.where("huggingface_token").startswith("--"):
        yield (
            "--huggingface_token: whoever may list this machine's processes can read it; "
            "the variable HF_TOKEN or `hf auth login` keep it to yourself"
        )
    if has_network(options) and options.output.save_model_as in ("pt", "ckpt"):
        lost = sorted(name for name in given if name.startswith("metadata_") or name == "training_comment")
        more = f", so that {', '.join(f'--{name}' for name in lost)} will be lost" if lost else ""
        yield f"{options.where('save_model_as')} {options.output.save_model_as}: this format holds no metadata{more}"


def _idle(options: Options) -> Iterator[str]:
    output, hub = options.output, options.hub
    by_epoch = output.save_every_n_epochs or output.save_n_epoch_ratio
    rolling = {"epochs": (by_epoch, "save_every_n_epochs"), "steps": (output.save_every_n_steps, "save_every_n_steps")}
    for unit, (saves, needed) in rolling.items():
        for name in (f"save_last_n_{unit}", f"save_last_n_{unit}_state"):
            if options.value(name) is None:
                continue
            if not saves:
                yield f"{options.where(name)}: has no effect without --{needed}"
            elif name.endswith("_state") and not output.save_state:
                yield f"{options.where(name)}: has no effect without --save_state"
    keeps_states = output.save_state or output.save_state_on_train_end
    if hub.save_state_to_huggingface and hub.huggingface_repo_id and not keeps_states:
        yield f"{options.where('save_state_to_huggingface')}: without --save_state, only a stopped run has a state"
    if hub.huggingface_token is not None and not (hub.huggingface_repo_id or hub.resume_from_huggingface):
        yield f"{options.where('huggingface_token')}: has no effect without --huggingface_repo_id"
