"""Lines of keys in TOML and JSON texts, against a real parser's idea of which keys there are."""

import json
import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.options.lines import json_lines, place, toml_lines

TOML = '''\
# first = 1
top = "a # b"  # comment
"quoted key" = 'c'
"esc\\u0041ped" = 1
a.b.c = 2
multi = """
inside = 1
\\""" still
"""
literal = \'\'\'
[not.a.table]
\'\'\'
numbers = [
  1,  # one
  [2, "]"],
]

[section]  # its comment
key = {x = 1, y = [1, {z = 2}]}
[section."sub.table"]
deep = 1979-05-27T07:32:00Z

[[datasets]]
batch_size = 1
  [[datasets.subsets]]
  image_dir = "a"
  [[datasets.subsets]]
  image_dir = "b"
  [datasets.subsets.custom]
  k = 1
[[datasets]]
  [[datasets.subsets]]
  image_dir = "c"
'''


def _paths(value: Any, path: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    """Every path in a parsed value."""
    items: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return {path, *(found for key, item in items for found in _paths(item, (*path, key)))}


def test_every_toml_key_has_its_line() -> None:
    lines = toml_lines(TOML)
    assert set(lines) | {()} == _paths(tomllib.loads(TOML))
    expected = {
        ("top",): 2,
        ("quoted key",): 3,
        ("escAped",): 4,
        ("a", "b", "c"): 5,
        ("multi",): 6,
        ("literal",): 10,
        ("numbers",): 13,
        ("numbers", 1): 15,
        ("section",): 18,
        ("section", "key", "y", 1, "z"): 19,
        ("section", "sub.table", "deep"): 21,
        ("datasets", 0, "batch_size"): 24,
        ("datasets", 0, "subsets", 1): 27,
        ("datasets", 0, "subsets", 1, "image_dir"): 28,
        ("datasets", 0, "subsets", 1, "custom", "k"): 30,
        ("datasets", 1): 31,
        ("datasets", 1, "subsets", 0, "image_dir"): 33,
    }
    assert {path: lines[path] for path in expected} == expected


def test_windows_line_ends_count_once() -> None:
    assert toml_lines("a = 1\r\n\r\nb = '''x\r\ny'''\r\nc = 3\r\n") == {("a",): 1, ("b",): 3, ("c",): 5}


@pytest.mark.parametrize(
    "text", ["", "\n\n", "# only a comment", "a=1", "[t]\n", "x = [ ]", "x = { }", "s = ''", 's = ""']
)
def test_small_toml_texts(text: str) -> None:
    assert set(toml_lines(text)) | {()} == _paths(tomllib.loads(text))


def test_every_json_key_has_its_line() -> None:
    value = {
        "general": {"a": [1, {"b": 'quote " and }'}], "empty": {}, "none": None},
        "datasets": [{"subsets": [{"image_dir": "a\\b"}, {"image_dir": "b"}]}, {"batch_size": 2.5e3, "flag": True}],
    }
    for indent in (None, 1, 4):
        text = json.dumps(value, indent=indent)
        assert set(json_lines(text)) == _paths(value)
    lines = json_lines(json.dumps(value, indent=1))
    for path, line in lines.items():
        if path and isinstance(path[-1], str):
            assert f'"{path[-1]}":' in json.dumps(value, indent=1).splitlines()[line - 1]


def test_place_names_the_nearest_known_line() -> None:
    lines: dict[tuple[str | int, ...], int] = {("a",): 3, ("a", "b"): 4}
    assert place("f.toml", lines, ("a", "b")) == "f.toml:4 b"
    assert place("f.toml", lines, ("a", "c")) == "f.toml:3 c"
    assert place("f.toml", {}, ("x",)) == "f.toml x"


_TREES = st.recursive(
    st.one_of(st.integers(), st.booleans(), st.text(alphabet="a#'\"\\[]{},=.\n ", max_size=6)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(alphabet="ab.'\"# =", max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


def _toml(value: Any, gap: str) -> str:
    """`value` as an inline TOML value; `gap` stands where a list may hold line ends and comments."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item, gap)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + gap + ", ".join(_toml(item, gap) + gap for item in value) + "]"
    if isinstance(value, str) and gap and "'" not in value:
        return f"'''\n{value}'''"
    return json.dumps(value)


@settings(max_examples=100, deadline=None, database=None)
@given(st.dictionaries(st.text(alphabet="ab.'\"# =", max_size=3), _TREES, max_size=4))
def test_any_tree_of_keys_is_found(tree: dict[str, Any]) -> None:
    assert set(json_lines(json.dumps(tree))) == set(json_lines(json.dumps(tree, indent=2))) == _paths(tree)
    for gap in ("", "\n# ] } \" '''\n"):
        text = "".join(f"{json.dumps(key)} = {_toml(value, gap)}\n" for key, value in tree.items())
        lines = toml_lines(text)
        assert set(lines) | {()} == _paths(tomllib.loads(text))
        rows = text.split("\n")
        assert all(rows[lines[(key,)] - 1].startswith(json.dumps(key)) for key in tree)
