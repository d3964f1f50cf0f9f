"""Runs that all tests of flags share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flags.effects import Runs, WordRuns


@pytest.fixture(scope="session")
def runs(tiny_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Real runs by their arguments."""
    return Runs(tiny_models, tmp_path_factory.mktemp("flags"))


@pytest.fixture(scope="session")
def words(tiny_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> WordRuns:
    """Real runs of textual inversion by their arguments."""
    return WordRuns(tiny_models, tmp_path_factory.mktemp("words"))
