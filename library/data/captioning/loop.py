"""Goes through the pictures of a folder with whatever makes texts of them, keeps each text, and counts.

The same for taggers and captioners: what can't be read is named and left out, what is done stays when work is stopped.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from library import console
from library.data.captioning.pictures import Loaded, Prepare, Work, batches
from library.data.captioning.store import Store
from library.data.sources.picture_files import SHOWN
from library.errors import Problem, UserError

Describe = Callable[[Sequence[Loaded]], Sequence[str | Problem]]
"""Makes a text of each picture of a batch, or says what is wrong with it."""


@dataclass
class Outcome:
    """How many pictures got a text, how many of these an empty one, and what was wrong with the others."""

    written: int = 0
    empty: int = 0
    bad: list[Problem] = field(default_factory=list)

    def leave_out(self, problem: Problem) -> None:
        """Name a picture that gets no text; of many only the first."""
        self.bad.append(problem)
        if len(self.bad) <= SHOWN:
            console.warn(f"{problem}; left out")


def describe_all(
    work: Work,
    store: Store,
    prepare: Prepare,
    describe: Describe,
    *,
    what: str,
    batch_size: int,
    threads: int,
    aloud: bool = False,
) -> Outcome:
    """Keep a text of every picture that has none yet, with a progress bar called `what`; `aloud` says each text.

    What is done is kept, also when this is interrupted.

    Raises:
        UserError: a text can't be written, or no picture can be used and none has a text from before.
    """
    outcome = Outcome()
    try:
        with ExitStack() as stack, console.bar(what, len(work.todo)) as progress:

            def bad(one: Loaded) -> None:
                outcome.leave_out(Problem(str(one.path), one.wrong))
                progress.update()

            given = stack.enter_context(closing(batches(work.todo, prepare, batch_size, threads=threads, bad=bad)))
            for batch in given:
                for one, text in zip(batch, describe(batch), strict=True):
                    if isinstance(text, Problem):
                        outcome.leave_out(text)
                    else:
                        store.write(one.path, text, one.size)
                        outcome.written += 1
                        outcome.empty += not text
                        if aloud:
                            console.say(f"{one.path}: {text}")
                    progress.update()
    finally:
        store.close()
    if outcome.bad and not outcome.written and not work.done:
        wrong = f"none of the {counted(len(outcome.bad))} could be used"
        raise UserError.single(str(work.folder), wrong, "replace them")
    return outcome


def report(work: Work, outcome: Outcome, what: str) -> None:
    """One line on what was done, one on what wasn't."""
    console.say(f"{counted(outcome.written)} got {what}" + (f"; {work.done} had them before" if work.done else ""))
    if outcome.empty:
        console.warn(f"{outcome.empty} of them are empty")
    if outcome.bad:
        console.warn(f"{counted(len(outcome.bad))} left out because of what is wrong with them")


def counted(pictures: int) -> str:
    """A number of pictures in words."""
    return f"{pictures} picture{'' if pictures == 1 else 's'}"


def problems_with_places(pictures: Sequence[Path]) -> list[Problem]:
    """The folders of pictures into which no text can be written."""
    folders = dict.fromkeys(path.parent for path in pictures)
    closed = [folder for folder in folders if not os.access(folder, os.W_OK)]
    advice = "change its permissions, or collect them in one file with --output_path"
    return [Problem(str(folder), "nothing can be written into this folder", advice) for folder in closed[:SHOWN]]
