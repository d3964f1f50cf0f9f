"""The text of docs/options.md, made from the declarations of flags and dataset keys."""

from collections.abc import Iterable

from library.options.dataset_schema import KEYS, TITLES
from library.options.flags import Flag
from library.options.foreign import FOREIGN
from library.options.other_names import OTHER_NAMES
from library.options.registry import FLAGS, GROUPS
from library.options.scripts import SCRIPTS, Script
from library.options.values import written

_HEAD = """# Options

Generated from `library/options` by `python tools/write_docs.py`; change it there.

Every flag is also a key of `--config_file` (TOML, sections are ignored); a flag on the command line wins over the file,
the file wins over the default. Unambiguous beginnings of flags do. Numbers may be written as text and whole numbers as
`32.0` where nothing is lost; a switch may be `true`, `false`, `1` or `0` in a file.

- **honoured**: does what it says.
- **equivalent**: accepted with one line, because the result is the same without it.
- **refused**: ends the run with exit code 2 when it is set to something other than its default or off. A setting of
  another refused flag, such as `--zero_stage` of `--deepspeed`, ends it only together with that flag; alone it is said
  to have no effect.
"""
_SCRIPTS = """## Scripts

Both training scripts read the same flags, with these differences. A flag that a script doesn't have is an error on its
command line; in a config file and in a preset it is ignored, with one line, so that files and presets work in both.

| script | must be given, besides pictures | doesn't have | defaults of its own |
|---|---|---|---|
"""
_OTHERS = """## Names of other programs

diffusers' textual inversion scripts, InvokeAI's `invokeai-ti` and invoke-training name some flags otherwise. These
names are taken too, on a command line and in a config file. They become our flags before anything else looks at them,
and say so in `--print_command`; a flag under two names at once is an error. They can't be shortened.

With `--placeholder_token` or `--trigger_term`, `train_textual_inversion.py` also takes what those programs take for
granted where nothing else is said: `--learning_rate 1e-4`, and for pictures of `--train_data_dir` `--resolution 512`,
`--dataset_repeats 100` (not with a preset that has a length of its own) and `--caption_preset object`. Saves are like
theirs, too: every 500 steps (where no interval is given) with `--save_state`, so that `--resume_from_checkpoint latest`
finds something, and with `--save_embedding_as diffusers`. It says so in one line; `--token_string` goes without them.
`invokeai-ti` always multiplied learning rates; here only `--scale_lr` does.

| name | kind | becomes |
|---|---|---|
"""
_DATASETS = """## Dataset file

The keys of `--dataset_config`, TOML or JSON: `[general]`, `[[datasets]]` and in each dataset `[[datasets.subsets]]`.
A key is looked up in the subset, its dataset, `[general]`, the flag beside it, and its default, in this order.

| key | type | levels | flag | kind | meaning |
|---|---|---|---|---|---|
"""
_FOREIGN = """## Keys of other programs

A config file may hold these keys, which other programs write. They are named in one line and ignored. `epoch` is one of
them: `max_train_steps` or `max_train_epochs` says how long a run is.
"""


def options_page() -> str:
    """The whole text of docs/options.md."""
    parts = [_HEAD, _SCRIPTS + "\n".join(map(_script_row, SCRIPTS.values())) + "\n"]
    for name, model in GROUPS.items():
        parts.append(f"## {(model.__doc__ or name).splitlines()[0]}\n")
        parts.append("| flag | type | default | kind | meaning |\n|---|---|---|---|---|")
        parts.extend(_flag_row(flag) for flag in FLAGS.values() if flag.group == name)
        parts.append("")
    parts.append(_DATASETS + "\n".join(_key_row(name) for name in KEYS) + "\n")
    parts.append(_OTHERS + "\n".join(map(_other_row, OTHER_NAMES)) + "\n")
    parts.append(_FOREIGN)
    for program in dict.fromkeys(FOREIGN.values()):
        names = sorted(name for name, owner in FOREIGN.items() if owner == program)
        parts.append(f"- From {program}: {', '.join(f'`{name}`' for name in names)}.")
    return "\n".join(parts) + "\n"


def _script_row(script: Script) -> str:
    groups = [f"the flags under {(GROUPS[name].__doc__ or name).splitlines()[0]}" for name in script.without]
    lacking = [*groups, *(f"`--{name}`" for name in script.lacks)]
    defaults = [f"`--{name} {value}`" for name, value in script.defaults.items()]
    cells = (f"`{script.file}`", _listed(f"`--{name}`" for name in script.needs), _listed(lacking), _listed(defaults))
    return f"| {' | '.join(cells)} |"


def _listed(items: Iterable[str]) -> str:
    return ", ".join(items) or "none"


def _other_row(name: str) -> str:
    return f"| `--{name}` | {OTHER_NAMES[name].flag.kind} | {_cell(OTHER_NAMES[name].meaning())} |"


def _flag_row(flag: Flag) -> str:
    return f"| `{flag.option}` | {_type(flag)} | {_default(flag)} | {flag.kind} | {_meaning(flag)} |"


def _key_row(name: str) -> str:
    key = KEYS[name]
    levels = ", ".join(f"`{TITLES[level]}`" for level in key.levels)
    fallback = f"`--{key.fallback}`" if key.fallback else ""
    return f"| `{name}` | {_type(key.value)} | {levels} | {fallback} | {key.value.kind} | {_meaning(key.value)} |"


def _type(flag: Flag) -> str:
    return _cell(flag.type_name())


def _default(flag: Flag) -> str:
    if flag.default is None:
        return "none"
    return (
        "off" if flag.default is False else f"`{_cell(str(written(flag.default)))}`" if flag.default != "" else "empty"
    )


def _meaning(flag: Flag) -> str:
    text = flag.text if flag.kind == "honoured" else f"{flag.text}: {flag.why}"
    for why in dict.fromkeys(flag.refuse.values()):
        values = ", ".join(f"`{value}`" for value, reason in flag.refuse.items() if reason == why)
        text += f"; refused are {values}: {why}"
    return _cell(text)


def _cell(text: str) -> str:
    pieces = text.replace("|", "\\|").split("`")
    return "`".join(piece if number % 2 else piece.replace("<", "&lt;") for number, piece in enumerate(pieces))
