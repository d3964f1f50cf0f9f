"""All that can be told of a LoRA file without a base model: its modules, numbers, names and metadata put together."""

from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from library.console import track
from library.errors import UserError
from library.models.families import Family
from library.models.pickles import read_weights
from library.weights.loras.conformance import Verdict, metadata_gaps, verdicts
from library.weights.loras.lora import Lora, read
from library.weights.loras.spelled import Keys, family_for, other_sizes, sort_keys, strangers
from library.weights.loras.statistics import ModuleFacts, by_block, facts_of


@dataclass(frozen=True)
class Checked:
    """What was found in a file.

    Attributes:
        dtypes: of its factors, as safetensors names them.
        strange: keys of modules that the family lacks.
        sized: keys of modules of another size than its full-size models have.
        gaps: what its metadata lack, a line each.
    """

    lora: Lora
    family: Family
    keys: Keys
    dtypes: tuple[str, ...]
    modules: tuple[ModuleFacts, ...]
    verdicts: tuple[Verdict, ...]
    strange: tuple[str, ...]
    sized: tuple[str, ...]
    gaps: tuple[str, ...]

    @property
    def broken(self) -> bool:
        """It can't be used as it is."""
        return any(one.not_finite for one in self.modules) or not any(one.taken for one in self.verdicts)


def check(path: Path) -> Checked:
    """Look a file over, with a progress bar.

    Raises:
        UserError: it is missing, damaged, no LoRA, or for none of our families.
    """
    lora = read(path)
    entries = read_weights(path, str(path)).entries
    keys = sort_keys({key: entry.shape for key, entry in entries.items()})
    family = family_for(keys, lora.metadata)
    if family is None:
        raise UserError.single(str(path), "none of its modules is one of SD1, SD2 or SDXL", "give a LoRA of these")
    modules = tuple(map(facts_of, track(lora.modules.values(), f"measuring {path.name}", len(lora.modules))))
    ranks = {one.rank for one in modules if one.rank is not None}
    return Checked(
        lora,
        family,
        keys,
        tuple(sorted({entry.dtype for key, entry in entries.items() if not key.endswith(".alpha")})),
        modules,
        verdicts(keys, family, lora.metadata, lora.modules),
        tuple(strangers(keys, family)),
        tuple(other_sizes(keys, family)),
        tuple(metadata_gaps(lora.metadata, family, ranks, path)),
    )


def as_json(found: Checked) -> dict[str, Any]:
    """Everything of a file as plain values for json.dumps."""
    programs = {
        one.program: {
            "takes": one.takes,
            "taken": one.taken,
            "refused": one.refused,
            "dropped": dict(one.dropped),
            "notes": list(one.notes),
        }
        for one in found.verdicts
    }
    return {
        "path": str(found.lora.path),
        "family": found.family.name,
        "layout": found.lora.layout,
        "dtypes": list(found.dtypes),
        "broken": found.broken,
        "blocks": [asdict(one) for one in by_block(found.modules)],
        "modules": [
            asdict(one) | {"alpha": one.alpha if one.alpha is None or isfinite(one.alpha) else None}
            for one in found.modules
        ],
        "no_such_module": list(found.strange),
        "other_size": list(found.sized),
        "bundled": list(found.keys.bundled),
        "metadata": list(found.gaps),
        "programs": programs,
    }
