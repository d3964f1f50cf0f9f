"""What the flag table's tests share: real runs kept by their arguments, what they left, and who watches which flag.

A test says with `@observes("flag", ...)` whose effects it holds. test_every_flag.py asks that no honoured flag is left.
"""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from library.options.other_names import OTHER_NAMES
from library.options.registry import FLAGS
from tests.pictures import make_pictures

Test = TypeVar("Test", bound=Callable[..., None])
Arrays = dict[str, np.ndarray[Any, Any]]

OBSERVED: dict[str, str] = {}
"""Flag -> the test that holds an observed effect of it."""
OBSERVED_NAMES: dict[str, str] = {}
"""The same for flags of other programs that are known here."""


def observes(*flags: str) -> Callable[[Test], Test]:
    """A test that holds an effect of these flags.

    Raises:
        ValueError: one of them is no honoured flag.
    """
    wrong = [flag for flag in flags if flag not in FLAGS or FLAGS[flag].kind != "honoured"]
    if wrong:
        raise ValueError(f"no honoured flags: {wrong}")

    def note(test: Test) -> Test:
        OBSERVED.update(dict.fromkeys(flags, f"{test.__module__}::{test.__name__}"))
        return test

    return note


def observes_names(*names: str) -> Callable[[Test], Test]:
    """A test that holds an effect of these flags of other programs.

    Raises:
        ValueError: one of them is no such name, or is refused.
    """
    wrong = [name for name in names if name not in OTHER_NAMES or OTHER_NAMES[name].flag.kind == "refused"]
    if wrong:
        raise ValueError(f"no names of other programs that do something: {wrong}")

    def note(test: Test) -> Test:
        OBSERVED_NAMES.update(dict.fromkeys(names, f"{test.__module__}::{test.__name__}"))
        return test

    return note


@dataclass(frozen=True)
class Ran:
    """What a run left: its exit code, what it said, and its folder (`output/x.safetensors` and more)."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "x.safetensors"

    @property
    def steps_were_made(self) -> bool:
        """Whether anything was trained or written."""
        return self.file.exists() or bool((self.folder / "x.log.jsonl").exists() and self.steps)

    @cached_property
    def weights(self) -> Arrays:
        return load_file(self.file)

    @cached_property
    def metadata(self) -> dict[str, str]:
        with safe_open(str(self.file), "np") as file:
            return dict(file.metadata())

    @cached_property
    def lines(self) -> list[dict[str, float]]:
        """Every line of the machine-readable log."""
        return [json.loads(line) for line in (self.folder / "x.log.jsonl").read_text().splitlines()]

    @property
    def steps(self) -> list[dict[str, float]]:
        """The lines of optimizer steps."""
        return [line for line in self.lines if "loss/current" in line]

    def logged(self, name: str) -> list[float]:
        """A number of every step."""
        return [line[name] for line in self.steps]

    @property
    def losses(self) -> list[float]:
        return self.logged("loss/current")


def same(one: Ran, other: Ran) -> bool:
    """Whether two runs wrote the same tensors, bit for bit."""
    first, second = one.weights, other.weights
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def part(ran: Ran, start: str) -> Arrays:
    """The tensors of one part, such as `lora_te`."""
    return {key: tensor for key, tensor in ran.weights.items() if key.startswith(start)}


def equal(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


class Runs:
    """In-process runs of train_network.py on tiny models and four small pictures; equal arguments run once.

    Args:
        models: gives the folder (or file) of a tiny model by name.
        root: `@` in arguments stands for this folder. It holds `pictures` (folder `2_thing`).
    """

    def __init__(self, models: Callable[[str], Path], root: Path) -> None:
        self.models, self.root = models, root
        self._kept: dict[tuple[str, ...], Ran] = {}
        make_pictures(root / "pictures", count=4, sizes=((64, 64),))

    def usual(self, model: str) -> dict[str, list[str]]:
        """The usual line: words by flag."""
        return {
            "pretrained_model_name_or_path": [str(self.models(model))],
            "train_data_dir": [str(self.root / "pictures")],
            "caption_extension": [".txt"],
            "resolution": ["64"],
            "output_name": ["x"],
            "network_module": ["networks.lora"],
            "network_dim": ["2"],
            "learning_rate": ["1e-2"],
            "seed": ["3"],
            "max_train_steps": ["2"],
            "max_data_loader_n_workers": ["0"],
        }

    def main(self, line: list[str]) -> int:
        """Run the script."""
        from train_network import main

        return main(line)

    def arguments(self, *flags: str, model: str = "sd1", without: tuple[str, ...] = ()) -> list[str]:
        """The usual line, changed by `flags`. `without` names flags of the usual line to leave out."""
        usual = self.usual(model)
        given = {flag.removeprefix("--").partition("=")[0] for flag in flags if flag.startswith("--")} | {*without}
        line = [word for name, values in usual.items() if name not in given for word in (f"--{name}", *values)]
        return [*line, *(flag.replace("@", str(self.root)) for flag in flags)]

    def __call__(self, *flags: str, model: str = "sd1", without: tuple[str, ...] = (), expect: int = 0) -> Ran:
        """The run with these flags, from memory if there was one."""
        line = tuple(self.arguments(*flags, model=model, without=without))
        if line not in self._kept:
            self._kept[line] = self.fresh(*flags, model=model, without=without, expect=expect)
        return self._kept[line]

    def fresh(self, *flags: str, model: str = "sd1", without: tuple[str, ...] = (), expect: int = 0) -> Ran:
        """A run that is not remembered, for a test that watches from inside, or that needs a second one.

        Flags may set `--output_dir`; else each run has its own.
        """
        import torch

        from library import console

        line = self.arguments(*flags, model=model, without=without)
        if "--output_dir" not in line:
            place = self.root / f"output{len([*self.root.glob('output*')])}"
            place.mkdir()
            line += ["--output_dir", str(place)]
        folder = Path(line[line.index("--output_dir") + 1])
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    code = self.main(line)
                except SystemExit as end:
                    code = int(end.code or 0)
        finally:
            console.write_to(None)
            console.set_level("INFO")
            torch.use_deterministic_algorithms(False)
        assert code == expect, f"exit code {code}, not {expect}\n{line}\n{err.getvalue()}"
        return Ran(code, out.getvalue(), err.getvalue(), folder)


class WordRuns(Runs):
    """Runs of train_textual_inversion.py, of the word `blorp`, which the usual captions (in `pictures/2_blorp`) hold.

    `@/flat` has the same pictures without captions, as diffusers' scripts want them.
    """

    def __init__(self, models: Callable[[str], Path], root: Path) -> None:
        self.models, self.root = models, root
        self._kept = {}
        make_pictures(root / "pictures", count=4, name="blorp", sizes=((64, 64),))
        (root / "flat").mkdir()
        for path in sorted((root / "pictures" / "2_blorp").glob("*.[jp][pn]g")):
            shutil.copy(path, root / "flat")

    def usual(self, model: str) -> dict[str, list[str]]:
        network = ("network_module", "network_dim")
        kept = {name: words for name, words in super().usual(model).items() if name not in network}
        return {**kept, "token_string": ["blorp"]}

    def main(self, line: list[str]) -> int:
        from train_textual_inversion import main

        return main(line)
