"""The caption templates that come with lorasmith."""

import pytest

from library.options.templates import OBJECT, STYLE


def test_how_many_there_are() -> None:
    assert len(OBJECT) == 27
    assert len(STYLE) >= 19


@pytest.mark.parametrize("template", [*OBJECT, *STYLE])
def test_each_has_one_place_for_the_subject(template: str) -> None:
    assert template.count("{}") == 1
    assert template.count("{") == template.count("}") == 1
    assert template == " ".join(template.split())


def test_none_is_there_twice() -> None:
    every = [template.lower() for template in (*OBJECT, *STYLE)]
    assert len(every) == len(set(every))
    assert len({template.replace("{}", "").strip() for template in every}) == len(every)
