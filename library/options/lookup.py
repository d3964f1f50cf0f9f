"""Looking up a parameter of a dataset: in the subset, its dataset, [general], the flags and the default, in order."""

from dataclasses import dataclass
from typing import Any

from library.options.dataset_file import Table
from library.options.dataset_schema import KEYS
from library.options.registry import Options


@dataclass(frozen=True)
class Lookup:
    """Tables from the innermost to [general], then the flags."""

    options: Options
    tables: tuple[Table, ...]

    def find(self, name: str) -> tuple[Any, str]:
        """The value of a key and the place where it was set."""
        for table in self.tables:
            if name in table.values:
                return table.values[name], table.places[name]
        key = KEYS[name]
        if key.fallback is None:
            return key.value.default, name
        return self.options.value(key.fallback), self.options.where(key.fallback)

    def __getitem__(self, name: str) -> Any:
        return self.find(name)[0]

    def where(self, name: str) -> str:
        """The place where a key was set."""
        return self.find(name)[1]

    def inner(self, table: Table) -> "Lookup":
        """The same with one more table, which counts first."""
        return Lookup(self.options, (table, *self.tables))

    def is_bad(self, name: str) -> bool:
        """A value of this key was complained about already."""
        return any(name in table.bad for table in self.tables)

    def extension(self) -> tuple[str, bool]:
        """The extension of caption files with its dot, and whether the user named it."""
        in_file = any("caption_extension" in table.values for table in self.tables)
        old = self.options.dataset.caption_extention
        text = old if old is not None and not in_file else str(self["caption_extension"])
        named = in_file or bool(self.options.explicit & {"caption_extension", "caption_extention"})
        return text if text.startswith(".") else f".{text}", named
