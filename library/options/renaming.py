"""Turning names of other programs (options.other_names) into our flags, before anything else looks at them.

A name that only renames a flag is renamed within the place that holds it (`rename`), so that a command line wins over
files as ever. What follows from several of them is worked out when all places are put together (`combine`).
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.errors import Problem
from library.options import values
from library.options.other_names import ADAM, OTHER_NAMES
from library.options.registry import FLAGS
from library.options.scripts import TRAIN_TEXTUAL_INVERSION, Script

_TOKENS = ("placeholder_token", "trigger_term")
"""Names by which a command line of diffusers or invokeai-ti shows itself."""
_PICTURES = ("dataset_config", "in_json", "dataset_class")
_CAPTIONS = ("caption_preset", "caption_templates")
_SAVES = ("save_every_n_steps", "save_every_n_epochs", "save_n_epoch_ratio")
_MOMENTS = ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")


@dataclass
class Place:
    """What one place says: raw values by flag, where each stands, lines to show, and what is wrong."""

    values: dict[str, Any]
    places: dict[str, str]
    notices: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def take(self, name: str) -> tuple[Any, str]:
        """The value of `name` and its place, which are dropped. None: it isn't given, or makes no sense."""
        raw, where = self.values.pop(name, None), self.places.pop(name, f"--{name}")
        try:
            value = None if raw is None else values.read(OTHER_NAMES[name].flag, raw)
        except ValueError as error:
            self.problems.append(Problem(where, str(error)))
            return None, where
        return (None if isinstance(value, values.Unset) else value), where

    def put(self, name: str, value: Any, where: str) -> None:
        """Set a flag of ours."""
        self.values[name], self.places[name] = value, where

    def same(self, ours: str, where: str) -> None:
        """Complain that a flag is given under two names."""
        self.problems.append(Problem(where, f"says the same as {self.places[ours]}", "leave out one of the two"))


def rename(place: Place, above: Collection[str]) -> None:
    """Give flags their names of here. `above` are flags of places that win over this one, by our names."""
    for name, one in OTHER_NAMES.items():
        if not one.renames or name not in place.values:
            continue
        (ours,) = one.targets
        raw, where = place.values.pop(name), place.places.pop(name)
        if ours in place.values:
            place.same(ours, where)
        else:
            place.put(ours, raw, where)
    _epochs(place, above)
    _templates(place)
    _saves(place)
    _report(place)


def _epochs(place: Place, above: Collection[str]) -> None:
    """Epochs of diffusers count only where no steps are given; ours win over steps."""
    epochs, where = place.take("num_train_epochs")
    if epochs is None:
        return
    if "max_train_epochs" in place.values:
        place.same("max_train_epochs", where)
    elif "max_train_steps" in place.values or "max_train_steps" in above:
        place.notices.append(f"{where}: has no effect, because max_train_steps counts")
    else:
        place.put("max_train_epochs", epochs, where)


def combine(given: Place, theirs: Collection[str], script: Script, *, paced: bool) -> None:
    """Turn the rest of other programs' flags in `given`, all places put together, into ours.

    Args:
        theirs: other programs' flags that were given, before any was renamed.
        paced: a preset finds repeats that make epochs of its length.
    """
    _adam(given)
    _hub(given)
    folder = given.values.get("output_dir")
    if "report_to" in theirs and given.values.get("log_with") in ("tensorboard", "all") and isinstance(folder, str):
        given.values.setdefault("logging_dir", str(Path(folder) / "logs"))
        given.places.setdefault("logging_dir", given.places["log_with"])
    for name, one in OTHER_NAMES.items():
        if one.flag.kind == "honoured":
            continue
        value, where = given.take(name)
        if value is None or value is False:
            continue
        if one.flag.kind == "equivalent":
            given.notices.append(f"{where}: {'not done' if one.lost else 'nothing to do'}: {one.flag.why}")
        else:
            wrong, _, advice = one.flag.why.partition("; ")
            given.problems.append(Problem(where, wrong, advice))
    named = given.places.get("token_string", "")
    used = next((name for name in _TOKENS if named.endswith(name)), None)
    used = used if script == TRAIN_TEXTUAL_INVERSION else None
    if used is not None:
        _defaults(given, used, paced=paced, previews="validation_prompt" in theirs)
    _limit(given, saved=used is not None or "checkpointing_steps" in theirs)


def _templates(place: Place) -> None:
    """The two switches of sd-scripts are values of --caption_preset."""
    for preset in ("object", "style"):
        name = f"use_{preset}_template"
        where = place.places.get(name, f"--{name}")
        try:
            on = values.read(FLAGS[name], place.values.get(name))
        except ValueError:
            continue
        place.values.pop(name, None)
        place.places.pop(name, None)
        if on is True and place.values.get("caption_preset") not in (None, "", preset):
            problem = Problem(
                where, f"{place.places['caption_preset']} asks for other templates", "leave out one of the two"
            )
            place.problems.append(problem)
        elif on is True:
            place.put("caption_preset", preset, where)


def _saves(place: Place) -> None:
    """Files and states are saved together, at one interval."""
    saves, where_saves = place.take("save_steps")
    states, where_states = place.take("checkpointing_steps")
    steps = min((number for number in (saves, states) if number is not None), default=None)
    where = where_states if steps == states else where_saves
    if steps is not None and "save_every_n_steps" in place.values:
        place.same("save_every_n_steps", where)
        return
    if steps is not None:
        place.put("save_every_n_steps", steps, where)
    if states is not None:
        place.put("save_state", True, where_states)
    if saves is not None and states is not None and saves != states:
        place.notices.append(f"{where_states}, {where_saves}: files and states are saved together, every {steps} steps")


def _limit(given: Place, *, saved: bool) -> None:
    """The last states that are kept, which are counted in steps here. `saved`: states are saved every so many steps."""
    limit, where = given.take("checkpoints_total_limit")
    if limit is None:
        return
    ours = given.places.get("save_last_n_steps_state") if "save_last_n_steps_state" in given.values else None
    try:
        steps = values.read(FLAGS["save_every_n_steps"], given.values.get("save_every_n_steps"))
    except ValueError:
        return
    if not saved or not isinstance(steps, int):
        given.notices.append(f"{where}: has no effect without --checkpointing_steps")
    elif limit == 1 and steps == 1:
        wrong = "of states that are saved after every step, the last two are kept"
        given.problems.append(Problem(where, wrong, "give 2, or save less often: --checkpointing_steps"))
    elif ours is None or _rank(where) > _rank(ours):
        given.put("save_last_n_steps_state", max(1, (limit - 1) * steps), where)
    elif _rank(where) == _rank(ours):
        given.same("save_last_n_steps_state", where)


def _report(place: Place) -> None:
    """Trackers; `none` is none."""
    tracker, where = place.take("report_to")
    if tracker is None or tracker == "none":
        return
    if "log_with" in place.values:
        place.same("log_with", where)
    else:
        place.put("log_with", tracker, where)


def _rank(where: str) -> int:
    """A command line ranks above a file, which ranks above a preset."""
    return 2 if where.startswith("--") else 0 if where.startswith("preset ") else 1


def _adam(given: Place) -> None:
    """Settings of diffusers' AdamW, as those of any optimizer."""
    first, second, decay, eps = (given.take(name) for name in ADAM)
    betas = None
    if first[0] is not None or second[0] is not None:
        betas = f"{0.9 if first[0] is None else first[0]!r},{0.999 if second[0] is None else second[0]!r}"
    raw = given.values.get("optimizer_args") or []
    texts = [raw] if isinstance(raw, str) else list(raw)
    place = given.places.get("optimizer_args")
    for key, value, where in (
        ("betas", betas, second[1] if first[0] is None else first[1]),
        ("weight_decay", *decay),
        ("eps", *eps),
    ):
        if value is None:
            continue
        others = [text for text in texts if str(text).partition("=")[0].strip() != key]
        if len(others) < len(texts) and place is not None and _rank(place) >= _rank(where):
            if _rank(place) == _rank(where):
                given.problems.append(Problem(where, f"{place} says {key}, too", "leave out one of the two"))
            continue
        texts = [*others, f"{key}={value}"]
        given.put("optimizer_args", texts, place or where)


def _hub(given: Place) -> None:
    """A repository is uploaded to only where that is asked for."""
    push, where = given.take("push_to_hub")
    repository, named = given.take("hub_model_id")
    ours = given.places.get("huggingface_repo_id") if "huggingface_repo_id" in given.values else None
    if not push:
        if repository is not None:
            given.notices.append(f"{named}: has no effect without --push_to_hub")
    elif repository is None:
        folder = given.values.get("output_dir")
        if ours is None and isinstance(folder, str):
            given.put("huggingface_repo_id", Path(folder).absolute().name, where)
        elif ours is None:
            given.problems.append(Problem(where, "names no repository", "add --hub_model_id USER/NAME"))
    elif ours is None or _rank(named) > _rank(ours):
        given.put("huggingface_repo_id", repository, named)
    elif _rank(named) == _rank(ours):
        given.same("huggingface_repo_id", named)


def _defaults(given: Place, used: str, *, paced: bool, previews: bool) -> None:
    """What diffusers' and InvokeAI's scripts take for granted, where nothing else is said.

    Args:
        previews: there is a prompt of diffusers, so that its pace and its number of pictures count.
    """
    wanted: dict[str, Any] = {} if "embedding_lr" in given.values else {"learning_rate": 1e-4}
    if not any(name in given.values for name in _PICTURES):
        wanted |= {"resolution": 512} if paced else {"resolution": 512, "dataset_repeats": 100}
        if not any(name in given.values for name in _CAPTIONS):
            wanted["caption_preset"] = "object"
    if previews:
        wanted |= {"sample_images_per_prompt": 4}
        wanted |= {} if any(name in given.values for name in _MOMENTS) else {"sample_every_n_steps": 100}
    wanted |= {"save_embedding_as": ["diffusers"], "save_state": True}
    wanted |= {} if any(name in given.values for name in _SAVES) else {"save_every_n_steps": 500}
    added = {name: value for name, value in wanted.items() if name not in given.values}
    for name, value in added.items():
        given.put(name, value, f"--{used}")
    if added:
        listed = ", ".join(_typed(name, value) for name, value in added.items())
        given.notices.append(f"--{used}: taken for granted with this name: {listed}; --token_string goes without")


def _typed(name: str, value: Any) -> str:
    """A flag as it would stand on a command line."""
    words = value if isinstance(value, list) else [] if value is True else [value]
    return " ".join((f"--{name}", *map(str, words)))
