"""docs/networks.md has every network module and every one of its settings, and shows none that doesn't exist."""

import re

import pytest

from library.options.modules import (
    LYCORIS_ALGOS,
    LYCORIS_ARGS,
    LYCORIS_PRESETS,
    MODULE_ARGS,
    check_network_args,
    own_modules,
)
from library.options.registry import FLAGS
from tests.programs import ROOT
from tests.test_docs import commands

PAGE = ROOT / "docs" / "networks.md"
LYCORIS = "lycoris.kohya"


def sections() -> dict[str, str]:
    """The text under each heading of second order."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def named(text: str) -> set[str]:
    """What stands between backquotes."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return set(re.findall(r"`([^`\n]+)`", prose))


def test_every_module_has_a_section() -> None:
    assert set(own_modules()) == set(MODULE_ARGS)
    assert {*MODULE_ARGS, LYCORIS} <= set(sections())


@pytest.mark.parametrize("module", MODULE_ARGS)
def test_every_setting_of_a_module_is_in_its_section(module: str) -> None:
    assert set(MODULE_ARGS[module]) <= named(sections()[module])


def test_everything_of_lycoris_is_in_its_section() -> None:
    assert {*LYCORIS_ALGOS, *LYCORIS_PRESETS, *LYCORIS_ARGS} <= named(sections()[LYCORIS])


def test_no_section_tells_of_flags_that_do_not_exist() -> None:
    flags = {word.split()[0].removeprefix("--") for word in named(PAGE.read_text("utf-8")) if word.startswith("--")}
    assert flags - {"unit"} <= set(FLAGS)


def test_no_section_names_a_setting_of_another_module() -> None:
    """What a section of ours names in backquotes and is a setting at all, the module has."""
    every = {name for table in MODULE_ARGS.values() for name in table}
    for module, table in MODULE_ARGS.items():
        assert (named(sections()[module]) & every) - set(table) == set(), module


@pytest.mark.parametrize("words", commands(PAGE))
def test_settings_in_shown_commands_are_taken(words: list[str]) -> None:
    module = words[words.index("--network_module") + 1]
    given: list[str] = []
    if "--network_args" in words:
        behind = words[words.index("--network_args") + 1 :]
        given = behind[: next((at for at, word in enumerate(behind) if word.startswith("--")), len(behind))]
        assert given
    assert check_network_args(module, given, "--network_args") == []


def test_each_module_is_shown_in_a_command() -> None:
    shown = {words[words.index("--network_module") + 1] for words in commands(PAGE)}
    assert shown == {*MODULE_ARGS, LYCORIS}
