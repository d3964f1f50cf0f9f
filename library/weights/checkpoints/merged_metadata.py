"""What a checkpoint file says of itself once LoRAs are merged into it: its own text, with what isn't true any more
mended."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import library
from library.models import evidence
from library.weights.checkpoints.opened import BaseModel
from library.weights.loras.amended import amended
from library.weights.loras.lora import Lora
from library.weights.metadata import ModelSpec, modelspec

_KIND = "checkpoint"
_TITLE, _FROM = "modelspec.title", "modelspec.merged_from"
_PREDICTION, _ARCHITECTURE = "modelspec.prediction_type", "modelspec.architecture"
_BY_PREDICTION = (_PREDICTION, _ARCHITECTURE, "modelspec.resolution")
_NEW = (_TITLE, _FROM, "modelspec.date", "modelspec.implementation_version")


def merged_metadata(model: BaseModel, loras: Sequence[Lora], save_to: Path) -> dict[str, str]:
    """The metadata of a single file: hashes of the old one dropped, `modelspec.*` completed, the title that of the new
    file, `modelspec.merged_from` the titles of all that is in it."""
    header = model.info.parts["unet"].headers[0]
    own = header.metadata
    titles = [own.get(_TITLE) or model.info.path.stem]
    titles += [lora.metadata.get(_TITLE) or lora.path.stem for lora in loras]
    predicted = model.info.prediction_type
    spec = modelspec(
        ModelSpec(
            base_model_version=model.family.versions[predicted or "epsilon"],
            date=datetime.now(),
            implementation_version=f"lorasmith/{library.__version__}",
            title=save_to.stem,
            v_prediction=predicted == "v_prediction",
            texts={"merged_from": ", ".join(titles)},
            kind=_KIND,
        )
    )
    spec["modelspec.architecture"] = spec["modelspec.architecture"].removesuffix(f"/{_KIND}")
    if predicted is None:
        for key in _BY_PREDICTION:
            del spec[key]
    elif evidence.of_header(header, str(header.path)).prediction is None:
        del spec[_PREDICTION]  # a guess, which must not look like evidence to the next reader
    return spec | amended(own) | {key: spec[key] for key in _NEW}


def needed_metadata(model: BaseModel) -> dict[str, str]:
    """As little of the metadata of a single file as loaders need: what tells what the model predicts."""
    own = model.info.parts["unet"].headers[0].metadata
    return {key: own[key] for key in (_PREDICTION, _ARCHITECTURE) if key in own}
