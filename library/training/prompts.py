"""Prompts of previews: files (`--sample_prompts`) of .txt lines with `--` options, TOML or JSON, and such lines on the
command line (`--preview_prompts`). Imports no torch.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.errors import Problem, UserError, nearest
from library.models import samplers
from library.tokenizer import VOCABULARY_SIZE
from library.tokenizer.vocabulary import Vocabulary


@dataclass(frozen=True)
class Prompt:
    """One preview. None means: what fits the model (size), or the run (sampler, seed by prompt number)."""

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    sample_steps: int = 30
    scale: float = 7.5
    sample_sampler: str | None = None


_OPTIONS: dict[str, tuple[str, type]] = {
    "n": ("negative_prompt", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("sample_steps", int),
    "l": ("scale", float),
    "ss": ("sample_sampler", str),
}
_TYPES: dict[str, type] = dict(_OPTIONS.values()) | {"prompt": str}
_UNUSED = {
    "cn": "controlnet_image",
    "g": "guidance_scale",
    "ctr": "cfg_trunc_ratio",
    "rcfg": "renorm_cfg",
    "fs": "flow_shift",
}


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """The previews that a file asks for, in order.

    Raises:
        UserError: every line or entry that can't be used, with file and line (or number of the entry).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError.single(
            "--sample_prompts", f"{path} can't be read ({fault})", "give a UTF-8 text file"
        ) from fault
    readers = {".toml": _from_toml, ".json": _from_json, ".txt": _from_text}
    if path.suffix.lower() not in readers:
        raise UserError.single("--sample_prompts", f"{path} is of no known kind", "use a .txt, .toml or .json file")
    problems: list[Problem] = []
    prompts = readers[path.suffix.lower()](path, text, problems)
    if not prompts and not problems:
        problems.append(Problem(str(path), "holds no prompt", "write one prompt a line"))
    if problems:
        raise UserError(problems)
    return tuple(prompts)


def typed_prompts(lines: Sequence[str], where: str) -> tuple[Prompt, ...]:
    """The previews that lines, each as in a .txt file, ask for; `where` is the flag that holds them.

    Raises:
        UserError: every line that can't be used, with the flag and the number of the prompt.
    """
    problems: list[Problem] = []
    prompts = []
    for number, line in enumerate(lines, 1):
        place = f"{where}, prompt {number}"
        if line.strip():
            prompts.append(_from_line(line.strip(), place, problems))
        else:
            problems.append(Problem(place, "is empty", "write what is to be drawn"))
    if problems:
        raise UserError(problems)
    return tuple(prompts)


def prompt_notices(prompts: Sequence[Prompt], vocabulary: Vocabulary) -> Iterator[str]:
    """A line if no preview shows any of the tokens that are trained, which are those of `vocabulary`."""
    texts = [text for one in prompts for text in (one.prompt, one.negative_prompt)]
    if (
        texts
        and vocabulary.tokens
        and not any(max(ids, default=0) >= VOCABULARY_SIZE for ids in vocabulary.encode(texts))
    ):
        words = " or ".join(token.text for token in vocabulary.tokens)
        yield f"no prompt of the previews holds {words}: they won't show what the vectors learn"


def _from_text(path: Path, text: str, problems: list[Problem]) -> list[Prompt]:
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return [
        _from_line(line, f"{path}:{number}", problems) for number, line in lines if line and not line.startswith("#")
    ]


def _from_line(line: str, where: str, problems: list[Problem]) -> Prompt:
    """The first piece is the prompt whatever it looks like; each ` --x value` behind it is an option."""
    prompt, *options = re.split(r"\s--(?=[a-zA-Z]+(?:\s|$))", f" {line}")
    values: dict[str, Any] = {}
    for option in options:
        letter, _, value = option.strip().partition(" ")
        if letter.lower() in _UNUSED:
            problems.append(Problem(where, f"--{letter} is not for this kind of model", "leave it out"))
        elif letter.lower() not in _OPTIONS:
            known = ", ".join(f"--{name}" for name in _OPTIONS)
            problems.append(Problem(where, f"--{letter} is no prompt option", f"known ones: {known}"))
        else:
            values[_OPTIONS[letter.lower()][0]] = value.strip()
    return _build({"prompt": prompt.strip(), **values}, where, problems)


def _from_toml(path: Path, text: str, problems: list[Problem]) -> list[Prompt]:
    try:
        table = tomllib.loads(text).get("prompt", {})
    except tomllib.TOMLDecodeError as fault:
        problems.append(Problem(str(path), f"is no valid TOML: {fault}"))
        return []
    if not isinstance(table, dict):
        problems.append(Problem(str(path), "`prompt` must be a table", "write [prompt] and [[prompt.subset]]"))
        return []
    defaults = {key: value for key, value in table.items() if key != "subset"}
    subsets = table.get("subset", [defaults] if "prompt" in defaults else [])
    return [
        _build({**defaults, **subset}, f"{path} [[prompt.subset]] {number}", problems)
        for number, subset in enumerate(subsets, 1)
    ]


def _from_json(path: Path, text: str, problems: list[Problem]) -> list[Prompt]:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as fault:
        problems.append(Problem(f"{path}:{fault.lineno}", f"is no valid JSON: {fault.msg}"))
        return []
    if not isinstance(entries, list):
        problems.append(Problem(str(path), "must hold a list of objects or strings"))
        return []
    prompts = []
    for number, entry in enumerate(entries, 1):
        where = f"{path} entry {number}"
        if isinstance(entry, str):
            prompts.append(_from_line(entry, where, problems))
        elif isinstance(entry, dict):
            prompts.append(_build(entry, where, problems))
        else:
            problems.append(Problem(where, "must be an object or a string"))
    return prompts


def _build(values: dict[str, Any], where: str, problems: list[Problem]) -> Prompt:
    """A checked `Prompt`; what is wrong goes to `problems` and keeps its default."""
    prompt = Prompt("")
    for key, value in values.items():
        if key in _UNUSED.values():
            problems.append(Problem(where, f"{key} is not for this kind of model", "leave it out"))
            continue
        if key not in _TYPES:
            problems.append(Problem(where, f"{key} is no key of a prompt", nearest(key, _TYPES)))
            continue
        try:
            converted = _TYPES[key](value)
        except (TypeError, ValueError):
            problems.append(Problem(where, f"{key} is {value!r}", f"give a value of type {_TYPES[key].__name__}"))
            continue
        prompt = replace(prompt, **{key: converted})
    if prompt.sample_sampler is not None:
        try:
            samplers.check(prompt.sample_sampler, where)
        except UserError as error:
            problems += error.problems
    if not 1 <= prompt.sample_steps <= 1000:
        problems.append(Problem(where, f"{prompt.sample_steps} sampling steps", "use 1 to 1000"))
    if prompt.seed is not None and not 0 <= prompt.seed < 2**63:
        problems.append(Problem(where, f"seed {prompt.seed}", "use 0 to 2**63 - 1"))
    return prompt
