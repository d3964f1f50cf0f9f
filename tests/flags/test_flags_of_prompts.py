"""What prompts on the command line do to a real run: the pictures that are drawn, and what is said of bad ones."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from tests.flags.effects import Ran, Runs, observes, same

SMALL = "--w 64 --h 64 --s 3"
ONE_STEP = ("--max_train_steps", "1", "--sample_every_n_steps", "1")


def drawn(ran: Ran) -> dict[tuple[int, int], np.ndarray]:
    """Previews by (number of the prompt, seed)."""
    found = {}
    for path in (ran.folder / "sample").glob("x_*.png"):
        if match := re.fullmatch(r"x_000001_(\d\d)_\d{14}_(\d+)\.png", path.name):
            found[int(match[1]), int(match[2])] = pixels(path)
    return found


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def in_file(runs: Runs, name: str, *lines: str) -> tuple[str, str]:
    (runs.root / name).write_text("\n".join(lines), encoding="utf-8")
    return "--sample_prompts", f"@/{name}"


@observes("preview_prompts")
def test_typed_prompts_are_drawn_after_those_of_a_file(runs: Runs) -> None:
    """The pictures of a line are the same wherever it stands, and the training has none of it."""
    lines = (
        f"a thing {SMALL} --d 7",
        f"a place --n a thing {SMALL} --d 9",
        f"a thing {SMALL} --l 1 --ss euler_a --d 11",
    )
    all_of_file = runs(*ONE_STEP, *in_file(runs, "all.txt", *lines))
    both = runs(*ONE_STEP, *in_file(runs, "first.txt", lines[0]), "--preview_prompts", *lines[1:])
    expected = drawn(all_of_file)
    assert expected.keys() == {(0, 7), (1, 9), (2, 11)}
    assert len({picture.tobytes() for picture in expected.values()}) == 3
    found = drawn(both)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in found)
    assert same(both, runs("--max_train_steps", "1"))


def test_the_prompt_of_diffusers_draws_its_number_of_pictures(runs: Runs) -> None:
    line = ("--validation_prompt", f"a thing {SMALL} --d 7", "--num_validation_images", "2", "--validation_steps", "1")
    found = drawn(runs("--max_train_steps", "1", *line))
    assert found.keys() == {(0, 7), (0, 8)}
    alone = drawn(runs(*ONE_STEP, *in_file(runs, "one.txt", f"a thing {SMALL} --d 7")))
    assert np.array_equal(found[0, 7], alone[0, 7])


def test_bad_prompts_end_the_run_before_it_starts(runs: Runs) -> None:
    file = in_file(runs, "bad.txt", "a thing --q 1")
    ran = runs(*ONE_STEP, *file, "--preview_prompts", "a thing", "a place --w wide", expect=2)
    said = " ".join(ran.err.split())
    assert "bad.txt:1: --q is no prompt option" in said
    assert "--preview_prompts, prompt 2: width is 'wide'" in said
    assert not ran.steps_were_made
