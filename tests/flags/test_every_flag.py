"""No honoured flag is without an observed effect, and every flag of sd-scripts' trainers is of one of three kinds."""

import csv
import importlib
from pathlib import Path

import pytest

from library.options.other_names import OTHER_NAMES
from library.options.registry import FLAGS
from tests.data.test_dataset_options import CASES
from tests.flags.effects import OBSERVED, OBSERVED_NAMES

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def tests_of_flags() -> None:
    """All of them are imported, so that they have said what they observe."""
    for path in sorted(HERE.glob("test_flags_of_*.py")):
        importlib.import_module(f"tests.flags.{path.stem}")


def test_every_honoured_flag_has_an_observed_effect() -> None:
    keys = {name for name in CASES if name in FLAGS and FLAGS[name].group == "dataset"}
    honoured = {name for name, flag in FLAGS.items() if flag.kind == "honoured"}
    assert not honoured - {*OBSERVED} - keys
    assert not {*OBSERVED} - honoured


def test_every_name_of_other_programs_that_is_taken_has_an_observed_effect() -> None:
    taken = {name for name, one in OTHER_NAMES.items() if one.flag.kind != "refused"}
    assert len(taken) > 20 and {*OBSERVED_NAMES} == taken


def test_every_flag_of_the_trainers_is_of_one_of_three_kinds(repo_root: Path) -> None:
    with (repo_root / "tests/options/flags.tsv").open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    names = {row[0].removeprefix("--") for row in rows if {"network", "sdxl_network"} & {*row[3].split(",")}}
    assert len(names) > 150
    kinds = {name: FLAGS[name].kind for name in names}
    assert {*kinds.values()} == {"honoured", "equivalent", "refused"}
    assert all(FLAGS[name].why for name, kind in kinds.items() if kind != "honoured")
