"""What a user did that can't be done, as data. The scripts print it and exit with code 2; nothing else exits."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Problem:
    """One thing to mend: `where` (a flag, `file.toml:12 key`, or a path), what is wrong there, what to do instead."""

    where: str
    wrong: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.wrong}" + (f"; {self.advice}" if self.advice else "")


class UserError(Exception):
    """Raised with every problem found so far, so that a user mends them in one go. Exit code 2.

    `notices` are lines that were to be shown anyway.
    """

    def __init__(self, problems: Iterable[Problem], notices: Iterable[str] = ()) -> None:
        self.problems, self.notices = tuple(problems), tuple(notices)
        super().__init__("\n".join(map(str, self.problems)))

    @classmethod
    def single(cls, where: str, wrong: str, advice: str = "") -> "UserError":
        """A `UserError` of one problem."""
        return cls([Problem(where, wrong, advice)])


class DamagedPictureError(UserError):
    """A picture can't be decoded: `path` is its file."""

    def __init__(self, path: Path, why: object) -> None:
        self.path, self.why = path, f"can't be decoded ({why})"
        advice = "replace or remove it, or start again with --skip_bad_images"
        super().__init__([Problem(str(path), self.why, advice)])


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean X?` for the known name nearest to `name`, or an empty text if none is near."""
    import difflib

    listed = list(known)
    longer = sorted((one for one in listed if len(name) > 4 and one.startswith(name)), key=len)
    close = longer or difflib.get_close_matches(name, listed, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else ""
