"""Taggers of the WD14 family: an ONNX network and a table of what its outputs stand for, in one folder.

Two kinds are known. With `selected_tags.csv` the network takes (n, h, w, 3), 0 to 255, and gives probabilities; with
`tag_mapping.json` it takes (n, 3, h, w), -1 to 1, and gives logits. Both want blue first, and the whole picture in a
white square. Which tags a caption gets is decided in data.captioning.tags.
"""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from library.data import pixels
from library.data.captioning.tagger_files import MAPPING, TaggerFiles
from library.data.captioning.tags import CATEGORIES, Category, Label
from library.data.pixels import Pixels
from library.errors import UserError

_NUMBERED: dict[str, Category] = {
    "0": "general",
    "1": "artist",
    "3": "copyright",
    "4": "character",
    "5": "meta",
    "9": "rating",
}
"""Danbooru's numbers of categories, and the taggers' own for ratings."""
_PROVIDERS = ("CUDAExecutionProvider", "ROCMExecutionProvider", "CPUExecutionProvider")
_USUAL_SIZE = 448
_LARGEST = 4096
"""Pixels; the longer side of a picture that is put into a square as it is."""


def require_runtime(flag: str) -> None:
    """Raises UserError where onnxruntime isn't installed."""
    if find_spec("onnxruntime") is None:
        raise UserError.single(flag, "taggers need onnxruntime", "install it with pip install 'lorasmith[tag]'")


def read_labels(table: Path) -> tuple[Label, ...]:
    """What the outputs stand for, in their order.

    Raises:
        UserError: the table can't be read, or isn't one.
    """
    try:
        text = table.read_bytes().decode("utf-8-sig")
        return _from_mapping(json.loads(text)) if table.name == MAPPING else _from_csv(text)
    except OSError as error:
        raise UserError.single(str(table), f"can't be read ({error.strerror or error})") from error
    except (ValueError, LookupError, TypeError, AttributeError, csv.Error) as error:
        wrong = f"isn't a tagger's table of tags ({error or type(error).__name__})"
        raise UserError.single(str(table), wrong, "download it again") from error


def _from_csv(text: str) -> tuple[Label, ...]:
    rows = csv.DictReader(io.StringIO(text))
    labels = tuple(Label(row["name"], _NUMBERED.get(row["category"], "general")) for row in rows)
    if not labels:
        raise ValueError("it has no rows")
    return labels


def _from_mapping(content: Any) -> tuple[Label, ...]:
    """`{"0": {"tag": ..., "category": ...}}`, or the same as the tables `idx_to_tag` and `tag_to_category`."""
    if "idx_to_tag" in content:
        kinds = content["tag_to_category"]
        content = {place: {"tag": tag, "category": kinds[tag]} for place, tag in content["idx_to_tag"].items()}
    found = {int(place): Label(str(entry["tag"]), _category(entry["category"])) for place, entry in content.items()}
    if sorted(found) != list(range(len(found))) or not found:
        raise ValueError("its places don't count up from 0")
    return tuple(found[place] for place in range(len(found)))


def _category(name: str) -> Category:
    return next((known for known in CATEGORIES if known == name.lower()), "general")


class Tagger:
    """A tagger that is ready to work.

    Attributes:
        labels: what its outputs stand for.
        sorts: whether its tags are usually listed by their probability.
    """

    def __init__(self, files: TaggerFiles) -> None:
        """Raises UserError if the files are no tagger, or onnxruntime can't load the network."""
        self.labels = read_labels(files.table)
        self.sorts = files.mapped
        self._files = files
        self._session = _session(files.network)
        given = self._session.get_inputs()
        if len(given) != 1 or len(given[0].shape) != 4:
            raise self._not_a_tagger(f"it takes {[one.shape for one in given]}, not pictures")
        self._name, shape = given[0].name, list(given[0].shape)
        self._planes_first = shape[1] == 3 if 3 in (shape[1], shape[3]) else files.mapped
        across = shape[2:] if self._planes_first else shape[1:3]
        fixed = {one for one in across if isinstance(one, int)}
        if len(fixed) > 1 or (isinstance(shape[1 if self._planes_first else 3], int) and 3 not in (shape[1], shape[3])):
            raise self._not_a_tagger(f"it takes {shape}, not square pictures of three colours")
        self._size = fixed.pop() if fixed else _USUAL_SIZE
        self._batch: int | None = shape[0] if isinstance(shape[0], int) else None
        last = self._session.get_outputs()[0].shape[-1:]
        if last and isinstance(last[0], int):
            self._check_count(last[0])

    @property
    def provider(self) -> str:
        """What computes: onnxruntime's name of it."""
        return str(self._session.get_providers()[0])

    def prepare(self, picture: Pixels) -> NDArray[np.float32]:
        """uint8 (h, w, 3) RGB -> float32 (size, size, 3) or (3, size, size), as the network takes it in."""
        square = squared(narrowed(picture, self._size))
        values = pixels.resize(square, (self._size, self._size))[:, :, ::-1].astype(np.float32)
        if self._files.mapped:
            values = values / np.float32(127.5) - np.float32(1)
        return np.ascontiguousarray(values.transpose(2, 0, 1) if self._planes_first else values)

    def __call__(self, prepared: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Probabilities, float32 (pictures, labels), of pictures that went through `prepare`.

        A network whose batch size is fixed gets that many at a time, the last batch filled up with zeros.

        Raises:
            UserError: the network fails, or gives something else.
        """
        step = self._batch or len(prepared)
        found = [self._run(prepared[start : start + step], step) for start in range(0, len(prepared), step)]
        return np.concatenate(found)

    def _run(self, prepared: Sequence[NDArray[np.float32]], size: int) -> NDArray[np.float32]:
        values = np.zeros((size, *prepared[0].shape), np.float32)
        values[: len(prepared)] = prepared
        try:
            given = np.asarray(self._session.run(None, {self._name: values})[0], np.float32)
        except Exception as error:
            raise self._not_a_tagger(_first_line(error)) from error
        given = given.reshape(size, -1)[: len(prepared)]
        self._check_count(given.shape[1])
        if self._files.mapped:
            given = (0.5 * (1 + np.tanh(0.5 * given.astype(np.float64)))).astype(np.float32)
        if not np.isfinite(given).all():
            raise self._not_a_tagger("it gives values that are no numbers")
        return given

    def _check_count(self, outputs: int) -> None:
        if outputs != len(self.labels):
            wrong = f"it has {outputs} outputs, but {self._files.table.name} has {len(self.labels)} tags"
            raise self._not_a_tagger(wrong)

    def _not_a_tagger(self, why: str) -> UserError:
        return UserError.single(str(self._files.network), f"can't be used as a tagger: {why}", "download it again")


def narrowed(picture: Pixels, size: int) -> Pixels:
    """uint8 (h, w, 3), shrunk so that its square takes little memory; pictures of an ordinary size stay as they are.

    The longer side becomes a multiple of `size`, so that the next step averages whole pixels.
    """
    height, width = picture.shape[:2]
    longer, limit = max(height, width), _LARGEST // size * size
    if longer <= _LARGEST or not limit:
        return picture
    small = (max(1, round(width * limit / longer)), max(1, round(height * limit / longer)))
    return pixels.resize(picture, small)


def squared(picture: Pixels) -> Pixels:
    """uint8 (h, w, 3) in the middle of a white square; of an odd rest the greater part is right and below."""
    height, width = picture.shape[:2]
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    square = np.full((side, side, 3), 255, np.uint8)
    square[top : top + height, left : left + width] = picture
    return square


def _session(network: Path) -> Any:
    """The network on the best device that the installed onnxruntime has.

    Raises:
        UserError: it can't be loaded.
    """
    require_runtime(str(network))
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    if (threads := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
        options.intra_op_num_threads = int(threads)
    there = [name for name in _PROVIDERS if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(str(network), options, providers=there)
    except Exception as error:
        wrong = f"onnxruntime can't load it ({_first_line(error)})"
        raise UserError.single(str(network), wrong, "download it again") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__


def thresholds(common: float, single: Mapping[Category, float | None]) -> dict[Category, float]:
    """The threshold of every category: its own where one is given."""
    own = {category: single.get(category) for category in CATEGORIES}
    return {category: common if value is None else value for category, value in own.items()}
