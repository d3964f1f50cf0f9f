"""Runs that all tests of flags share."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from library.conditioning import Conditioning
from library.models.sd1 import SD1
from tests.flags.effects import Runs, WordRuns


@pytest.fixture(scope="session")
def runs(tiny_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Real runs by their arguments."""
    return Runs(tiny_models, tmp_path_factory.mktemp("flags"))


@pytest.fixture(scope="session")
def words(tiny_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> WordRuns:
    """Real runs of textual inversion by their arguments."""
    return WordRuns(tiny_models, tmp_path_factory.mktemp("words"))


@pytest.fixture
def captions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The captions that a run under watch encodes, one after the other."""
    seen: list[str] = []
    encode = SD1.encode_prompts

    def watched(self: SD1, texts: Sequence[str]) -> Conditioning:
        seen.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(SD1, "encode_prompts", watched)
    return seen
