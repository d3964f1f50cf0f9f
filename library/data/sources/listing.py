"""What the sources of pictures hand to the scan: pictures that were listed, and what was found wrong on the way.

Nothing is opened here: folders are listed by data.sources.folders, metadata and hub data sets by modules of their own,
headers are read by data.sources.images.
"""

from dataclasses import dataclass, field

from library.errors import Problem


@dataclass(frozen=True, slots=True)
class Listed:
    """One picture as its source names it, before its header is read.

    Attributes:
        key: its posix path relative to the subset's `image_dir`, or an absolute path.
        caption: the text that the source gives; None: look for a caption file, else the class tokens.
        mask: the absolute path of a mask picture that the source names.
        where: the place in the listing file, such as `meta.jsonl:12`, for messages.
    """

    key: str
    caption: str | None = None
    mask: str | None = None
    where: str = ""


@dataclass
class Findings:
    """What the reading of all sources collects besides records.

    Attributes:
        problems: what would stop a real run.
        unreadable: pictures that can't be used; they stop a run too, unless bad pictures are skipped.
        captions: caption files that can't be read, each once; they stop a run.
        notices: one line each.
        ignored: why a subset isn't used, by (dataset, subset).
    """

    problems: list[Problem] = field(default_factory=list)
    unreadable: list[Problem] = field(default_factory=list)
    captions: dict[Problem, None] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    ignored: dict[tuple[int, int], str] = field(default_factory=dict)


def lines_of(text: str) -> list[str]:
    """The lines of a caption that aren't blank, stripped. They end where those of text files do: LF, CR LF or CR."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return [line for raw in text.split("\n") if (line := raw.strip())]


def caption_of(text: str, all_lines: bool) -> str:
    """What trains of a caption as it was written: its first line, or all of them for wildcards, joined by newlines."""
    lines = lines_of(text)
    return "\n".join(lines) if all_lines else "".join(lines[:1])
