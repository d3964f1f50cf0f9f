"""The argparse parser that is made from the flags, and reading a command line with it."""

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from library.errors import Problem, UserError, nearest
from library.options import values
from library.options.dataset_schema import KEYS
from library.options.flags import Flag
from library.options.foreign import FOREIGN
from library.options.registry import FLAGS, GROUPS

_USAGE = (
    "%(prog)s --pretrained_model_name_or_path PATH --train_data_dir DIR --output_dir DIR --network_module MODULE "
    "[options]\n       %(prog)s --config_file FILE.toml [options]"
)
_ABOUT = (
    "Train a LoRA or another network on a Stable Diffusion model. Unambiguous beginnings of flags do. "
    "A flag on the command line wins over the same key in --config_file."
)
_MANY_CHOICES = "NAME"
_AMBIGUOUS = re.compile(r"ambiguous option: (--[^\s=]+)\S* could match (.*)", re.DOTALL)
_ARGUMENT = re.compile(r"argument (--\w+): (.*)", re.DOTALL)


class _RaisingParser(argparse.ArgumentParser):
    """Raises `UserError` where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        if ambiguous := _AMBIGUOUS.fullmatch(message):
            raise UserError.single(ambiguous[1], "is ambiguous", f"it could be {ambiguous[2]}")
        found = _ARGUMENT.fullmatch(message)
        where, wrong = found.groups() if found else ("command line", message)
        if found and "ignored explicit argument" in wrong:
            advice = f"leave it out, or write {where[2:]} = false in a config file"
            raise UserError.single(where, "is a switch, which takes no value", advice)
        raise UserError.single(where, wrong)


def setup_parser() -> argparse.ArgumentParser:
    """The parser of all flags, with types and defaults, for programs that want to know them."""
    parser = argparse.ArgumentParser(usage=_USAGE, description=_ABOUT, formatter_class=_Formatter)
    _add_flags(parser, raw=False)
    return parser


def read_command_line(argv: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """The flags in `argv` with their texts (True for a switch, a list where there may be many), and what is wrong.

    Raises:
        SystemExit: `--help`, with code 0.
    """
    parser = _RaisingParser(usage=_USAGE, description=_ABOUT, formatter_class=_Formatter)
    _add_flags(parser, raw=True)
    words = list(argv)
    problems: list[Problem] = []
    while True:
        try:
            namespace, extras = parser.parse_known_args(words)
        except UserError as error:
            problems += error.problems
            if not _drop(words, error.problems[0]):
                return {}, problems
        else:
            return vars(namespace), problems + _unknown(extras, argv)


def _drop(words: list[str], problem: Problem) -> bool:
    """Take the flag that `problem` is about, and its values, out of `words`. False if it isn't found."""
    for position, word in enumerate(words):
        name = word.split("=", 1)[0]
        if len(name) > 2 and name.startswith("--") and problem.where.startswith(name):
            end = position + 1
            while end < len(words) and not words[end].startswith("--"):
                end += 1
            del words[position:end]
            return True
    return False


def _unknown(extras: Sequence[str], argv: Sequence[str]) -> list[Problem]:
    """One problem for each unknown flag, and for each word that belongs to no flag."""
    problems = []
    for word in extras:
        if word.startswith("--"):
            name = word.split("=", 1)[0]
            if name.lstrip("-") in FOREIGN:
                advice = f"it belongs to {FOREIGN[name.lstrip('-')]}"
            elif name.lstrip("-") in KEYS:
                advice = f"it is a key of the file of --dataset_config, in {KEYS[name.lstrip('-')].title()}"
            else:
                advice = nearest(name, [flag.option for flag in FLAGS.values()]) or "see --help"
            problems.append(Problem(name, "unknown option", advice))
            continue
        before = [other for other in argv[: list(argv).index(word)] if other.startswith("--")]
        last = before[-1] if before else ""
        flag = FLAGS.get(last.lstrip("-"))
        if flag is not None and flag.shape == "flag":
            problems.append(Problem(last, f"takes no value, but {word!r} follows", "a switch is on when it is written"))
        elif last not in extras:
            problems.append(Problem("command line", f"{word!r} belongs to no option", "quote values that hold spaces"))
    return problems


def _add_flags(parser: argparse.ArgumentParser, *, raw: bool) -> None:
    for name, model in GROUPS.items():
        honoured = [flag for flag in FLAGS.values() if flag.group == name and flag.kind == "honoured"]
        if honoured:
            section = parser.add_argument_group((model.__doc__ or name).splitlines()[0])
            for flag in honoured:
                _add(section, flag, _help(flag), raw)
    section = parser.add_argument_group("Accepted, with nothing to do")
    for flag in FLAGS.values():
        if flag.kind == "equivalent":
            _add(section, flag, flag.why, raw)
    section = parser.add_argument_group("Known from sd-scripts, but refused")
    for flag in FLAGS.values():
        if flag.kind == "refused":
            _add(section, flag, f"{flag.text}: {flag.why}", raw)


def _help(flag: Flag) -> str:
    listed = f": {flag.type_name()}" if flag.choices and metavar(flag) in (_MANY_CHOICES, flag.metavar) else ""
    if flag.default in (None, False, "", ()) or "(default" in flag.text:
        return flag.text + listed
    return f"{flag.text}{listed} (default: {flag.default})"


def _add(section: Any, flag: Flag, text: str, raw: bool) -> None:
    more: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS if raw else flag.default}
    if flag.shape == "flag":
        section.add_argument(flag.option, action="store_true", **more)
        return
    more["metavar"] = metavar(flag)
    if flag.many:
        more["nargs"] = "*"
    if not raw:
        more["type"] = _Typed(flag)
    section.add_argument(flag.option, **more)


def metavar(flag: Flag) -> str:
    """What stands for the value in `--help`."""
    if flag.metavar:
        return flag.metavar
    if flag.choices:
        allowed = [str(choice) for choice in flag.choices if str(choice) not in flag.refuse]
        joined = "|".join(allowed)
        return joined if len(joined) <= 24 else _MANY_CHOICES
    return {"int": "N", "float": "X", "path": "PATH", "steps": "N", "size": "W,H"}.get(flag.shape, "TEXT")


class _Typed:
    """Converts one word of a flag for argparse."""

    def __init__(self, flag: Flag) -> None:
        self.flag = flag

    def __call__(self, text: str) -> Any:
        try:
            value = values.read(self.flag, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if isinstance(value, values.Unset):
            return None
        return value[0] if self.flag.many else value


class _Formatter(argparse.HelpFormatter):
    """Wider than argparse's own, so that most flags and their texts share a line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=110)
