"""Which files make up a tagger, and where they are: a folder, a folder of downloads, the hub's cache, the hub."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from library.console import say
from library.data.captioning import downloads
from library.errors import UserError

CSV, MAPPING = "selected_tags.csv", "tag_mapping.json"
_NETWORKS = ("model.onnx", "model_optimized.onnx")


@dataclass(frozen=True)
class TaggerFiles:
    """A tagger on the disk: its network, and the table of its tags, whose name tells the kind."""

    network: Path
    table: Path

    @property
    def mapped(self) -> bool:
        """Whether it is of the kind with `tag_mapping.json`."""
        return self.table.name == MAPPING


def find_files(folder: Path) -> TaggerFiles | None:
    """The tagger that lies in a folder, None if there is none."""
    networks = [folder / name for name in _NETWORKS if (folder / name).is_file()]
    tables = [folder / name for name in (CSV, MAPPING) if (folder / name).is_file()]
    if not networks:
        others = sorted(folder.glob("*.onnx"))
        networks = others if len(others) == 1 else []
    return TaggerFiles(networks[0], tables[0]) if networks and tables else None


def hub_files(names: Sequence[str], inner: str) -> list[str]:
    """Out of all files of a hub's model those of the tagger in its folder `inner`; none where there is no tagger."""
    place = f"{inner}/" if inner else ""
    here = [name for name in names if name.startswith(place) and "/" not in name[len(place) :]]
    networks = [place + name for name in _NETWORKS if place + name in here]
    networks = networks or [name for name in here if name.endswith(".onnx")]
    tables = [place + name for name in (CSV, MAPPING) if place + name in here]
    if not tables or not networks:
        return []
    beside = [name for name in here if name.startswith((f"{networks[0]}.", f"{networks[0]}_"))]
    return [tables[0], *beside, networks[0]]


def find_tagger(name: str, kept: Path, *, flag: str, force: bool = False) -> TaggerFiles:
    """The tagger that a name means.

    Args:
        name: a folder, or `owner/model` on the hub, with a folder inside it as a third piece.
        kept: the folder in which downloads lie, each in a folder of its own, as sd-scripts keeps them.
        force: download it anew.

    Raises:
        UserError: it isn't there and can't be had.
    """
    named = Path(name)
    if named.is_dir():
        if force:
            say(f"{flag} {name} is a folder: there is nothing to download")
        if found := find_files(named):
            return found
        advice = f"it needs model.onnx beside {CSV} or {MAPPING}"
        raise UserError.single(flag, f"{named} holds no tagger", advice)
    if not downloads.looks_like_id(name):
        raise UserError.single(flag, f"there is no folder {named}", "give a folder or a name like owner/model")
    owner, model, *inner = name.split("/")
    repo, place = f"{owner}/{model}", kept / name.replace("/", "_")
    if not force:
        cached = [downloads.cached(repo, "/".join([*inner, network])) for network in _NETWORKS]
        for folder in (place, place.joinpath(*inner), *(file.parent for file in cached if file is not None)):
            if found := find_files(folder):
                return found
    here = downloads.download(
        repo, lambda names: hub_files(names, "/".join(inner)), flag, folder=place, force=force
    ).joinpath(*inner)
    if found := find_files(here):
        return found
    raise UserError.single(flag, f"{here} holds no tagger after the download", "try again with --force_download")
