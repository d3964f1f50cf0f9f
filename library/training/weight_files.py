"""The weight files that a save writes, by name: the network's, and those of embeddings in each layout that is wanted.

What the layouts are is library.embedding_layouts' business; what stands in a file, and how it is written, is
library.training.products'. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from library.embedding_layouts import Layout, file_bases, layout_files
from library.options import Options
from library.tokenizer.vocabulary import NewToken
from library.training.embedding_plan import EmbeddingPlan

Holds = Layout | Literal["network"]
"""The network alone, or embeddings in a layout; a bundle has the network beside them where there is one."""
Extension = Literal[".safetensors", ".pt", ".ckpt"]

_EXTENSIONS: Mapping[str, Extension] = {"ckpt": ".ckpt", "pt": ".pt", "safetensors": ".safetensors"}


@dataclass(frozen=True)
class WeightFile:
    """One file.

    Attributes:
        name: relative to the output folder.
        holds: what, in which layout.
        tokens: whose vectors stand in it; of a bundle several.
        encoders: those for which text encoders, counted from 0.
    """

    name: str
    holds: Holds
    tokens: tuple[NewToken, ...] = ()
    encoders: tuple[int, ...] = ()


def weight_files(options: Options, plan: EmbeddingPlan | None, encoders: int, stem: str) -> tuple[WeightFile, ...]:
    """The files of a save, the main one first.

    Args:
        plan: of the run's embeddings; frozen ones are in no file.
        encoders: how many text encoders the model has.
        stem: of the save, such as `mycat-000002`.
    """
    alone = options.network.network_module is None
    tokens = tuple(one.token for one in plan.trained) if plan else ()
    ending = _EXTENSIONS[options.output.save_model_as or ("pt" if alone else "safetensors")]
    found = [] if alone else [WeightFile(f"{stem}{ending}", "network")]
    bases = file_bases(stem, [token.text for token in tokens], alone=alone)
    further = dict.fromkeys(options.embeddings.save_embedding_as or ())
    single: list[Layout] = ["kohya", *(one for one in further if one != "bundle")]
    for layout in single:
        for token, base in zip(tokens, bases, strict=True):
            named = layout_files(base, layout, encoders, ending if alone else ".safetensors")
            found += [WeightFile(name, layout, (token,), held) for name, held in named]
    if "bundle" in further and tokens:
        found += [WeightFile(name, "bundle", tokens, held) for name, held in layout_files(stem, "bundle", encoders)]
    return tuple(found)
