"""What a user names as a model -> a file or a folder here; torch-free."""

import re
from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError, nearest
from library.models import hub
from library.models.pickles import SUFFIXES

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Place:
    """A file or folder that is there.

    Attributes:
        name: what metadata call it: the last component of the path, or the hub id.
        flag: the flag that named it.
        from_hub: it was named by its hub id.
    """

    path: Path
    name: str
    flag: str
    from_hub: bool = False

    @property
    def where(self) -> str:
        """How a message names it."""
        return f"{self.flag} {self.path}"


def locate(given: str, flag: str, wanted: hub.Wanted) -> Place:
    """The place of what a flag names; a hub id is downloaded if it isn't in the hub's cache.

    Args:
        wanted: of a hub model, the files that are needed.

    Raises:
        UserError: nothing there.
    """
    path = Path(given).expanduser()
    if path.exists():
        return Place(path, path.name or path.resolve().name, flag)
    if is_hub_id(given):
        return Place(hub.fetch(given, wanted, flag), given, flag, from_hub=True)
    if not path.parent.is_dir():
        raise UserError.single(flag, f"{given} does not exist, nor does the folder {path.parent}")
    siblings = [entry.name for entry in path.parent.iterdir()]
    raise UserError.single(flag, f"{given} does not exist", nearest(path.name, siblings))


def is_hub_id(given: str) -> bool:
    """Whether a name of nothing that is here is taken for `owner/name` on the hub."""
    path = Path(given).expanduser()
    endings = (".safetensors", *SUFFIXES)
    return bool(_HUB_ID.fullmatch(given)) and not path.parent.is_dir() and path.suffix.lower() not in endings
