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
from library.options.other_names import OTHER_NAMES, names_of_script
from library.options.registry import FLAGS, GROUPS, flags_of_script
from library.options.scripts import SCRIPTS, TRAIN_NETWORK, Script

_ABOUT = "Unambiguous beginnings of flags do. A flag on the command line wins over the same key in --config_file."
_MANY_CHOICES = "NAME"
_AMBIGUOUS = re.compile(r"ambiguous option: (--[^\s=]+)\S* could match (.*)", re.DOTALL)
_ARGUMENT = re.compile(r"argument (--\w+): (.*)", re.DOTALL)


class _RaisingParser(argparse.ArgumentParser):
    """Raises `UserError` where argparse would print its usage and exit. Other programs' names have no short forms."""

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        found: list[Any] = super()._get_option_tuples(option_string)
        return [one for one in found if one[0].dest not in OTHER_NAMES]

    def error(self, message: str) -> NoReturn:
        if ambiguous := _AMBIGUOUS.fullmatch(message):
            raise UserError.single(ambiguous[1], "is ambiguous", f"it could be {ambiguous[2]}")
        found = _ARGUMENT.fullmatch(message)
        where, wrong = found.groups() if found else ("command line", message)
        if found and "ignored explicit argument" in wrong:
            advice = f"leave it out, or write {where[2:]} = false in a config file"
            raise UserError.single(where, "is a switch, which takes no value", advice)
        raise UserError.single(where, wrong)


def setup_parser(script: Script = TRAIN_NETWORK) -> argparse.ArgumentParser:
    """The parser of all flags of a script, with types and defaults, for programs that want to know them."""
    parser = argparse.ArgumentParser(usage=_usage(script), description=_about(script), formatter_class=_Formatter)
    _add_flags(parser, script, raw=False)
    return parser


def read_command_line(argv: Sequence[str], script: Script) -> tuple[dict[str, Any], list[Problem]]:
    """The flags in `argv` with their texts (True for a switch, a list where there may be many), and what is wrong.

    Raises:
        SystemExit: `--help`, with code 0.
    """
    parser = _RaisingParser(usage=_usage(script), description=_about(script), formatter_class=_Formatter)
    _add_flags(parser, script, raw=True)
    _add_other_names(parser, script)
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
            return vars(namespace), problems + _unknown(extras, argv, script)


def _usage(script: Script) -> str:
    needed = " ".join(f"{FLAGS[name].option} {metavar(FLAGS[name])}" for name in (*script.needs, "train_data_dir"))
    return f"%(prog)s {needed} [options]\n       %(prog)s --config_file FILE.toml [options]"


def _about(script: Script) -> str:
    return f"{script.about}. {_ABOUT}"


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


def _unknown(extras: Sequence[str], argv: Sequence[str], script: Script) -> list[Problem]:
    """One problem for each unknown flag, and for each word that belongs to no flag."""
    problems = []
    known = [f"--{name}" for name in (*flags_of_script(script.name), *names_of_script(script))]
    place = -1
    for word in extras:
        place = _place_of(word, argv, place + 1)
        if word.startswith("--"):
            name = word.split("=", 1)[0]
            if owners := scripts_with(name.lstrip("-")):
                advice = f"it belongs to {owners}"
            elif name.lstrip("-") in FOREIGN:
                advice = f"it belongs to {FOREIGN[name.lstrip('-')]}"
            elif name.lstrip("-") in KEYS:
                advice = f"it is a key of the file of --dataset_config, in {KEYS[name.lstrip('-')].title()}"
            else:
                advice = nearest(name, known) or "see --help"
            problems.append(Problem(name, "unknown option", advice))
            continue
        last = _flag_before(place, argv)
        flag = _flag(last)
        if flag is not None and flag.shape == "flag":
            problems.append(Problem(last, f"takes no value, but {word!r} follows", "a switch is on when it is written"))
        elif last not in extras:
            problems.append(Problem("command line", f"{word!r} belongs to no option", "quote values that hold spaces"))
    return problems


def _place_of(word: str, argv: Sequence[str], start: int) -> int:
    """Where a word of `argv` that no flag took stands, from `start` on; it may be the value of another flag, too."""
    places = [place for place in range(start, len(argv)) if argv[place] == word]
    free = (place for place in places if not _is_taken(place, argv))
    return next(free, places[0])


def _is_taken(place: int, argv: Sequence[str]) -> bool:
    """Whether a word is the value of the flag before it."""
    last = _flag_before(place, argv)
    flag = _flag(last)
    return flag is not None and flag.shape != "flag" and (flag.many or argv[place - 1] == last)


def _flag_before(place: int, argv: Sequence[str]) -> str:
    return next((word for word in reversed(argv[:place]) if word.startswith("--")), "")


def _flag(word: str) -> Flag | None:
    """The flag that a word of the command line is the name of."""
    other = OTHER_NAMES.get(word.lstrip("-"))
    return other.flag if other else FLAGS.get(word.lstrip("-"))


def scripts_with(name: str) -> str:
    """The scripts that have a flag of this name, or another program's name for one; empty if none has."""
    found = [one for one in SCRIPTS.values() if name in flags_of_script(one.name) or name in names_of_script(one)]
    return " and ".join(one.file for one in found)


def _add_flags(parser: argparse.ArgumentParser, script: Script, *, raw: bool) -> None:
    flags = flags_of_script(script.name).values()
    for name, model in GROUPS.items():
        honoured = [flag for flag in flags if flag.group == name and flag.kind == "honoured"]
        if honoured:
            section = parser.add_argument_group((model.__doc__ or name).splitlines()[0])
            for flag in honoured:
                _add(section, flag, _help(flag), raw)
    section = parser.add_argument_group("Accepted, with nothing to do")
    for flag in flags:
        if flag.kind == "equivalent":
            _add(section, flag, flag.why, raw)
    section = parser.add_argument_group("Known from sd-scripts, but refused")
    for flag in flags:
        if flag.kind == "refused":
            _add(section, flag, f"{flag.text}: {flag.why}", raw)


def _add_other_names(parser: argparse.ArgumentParser, script: Script) -> None:
    section = parser.add_argument_group("Names of other programs")
    for one in names_of_script(script).values():
        _add(section, one.flag, one.meaning(), raw=True)


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
