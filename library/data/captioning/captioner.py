"""Captioners: BLIP and GIT, by transformers, from a folder. A picture's caption is the same in any batch.

A draw belongs to a picture and a place in its caption, not to a batch: noise of Gumbel's distribution on the logits
makes the likeliest token a fair draw (Gumbel's trick; Maddison et al. 2014, "A* Sampling", section 2).
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from library.data.captioning import downloads
from library.data.pixels import Pixels
from library.errors import UserError
from library.rng import rng

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Kind = Literal["blip", "git"]
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_WORDS = ("tokenizer.json", "vocab.txt")
_SMALL = (
    "config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "processor_config.json",
)
_REPETITION = 1.1
"""Of tokens that were drawn already; what BLIP's authors draw captions with."""


@dataclass(frozen=True)
class Manner:
    """How captions are written.

    Attributes:
        max_length: tokens, those of the prompt among them; `min_length` likewise.
        beams: 1 takes the likeliest token each time.
        top_p: draw from the likeliest tokens that make up this probability; None draws nothing.
        prompt: how a caption begins; it isn't part of the text. BLIP only.
    """

    max_length: int
    min_length: int = 0
    beams: int = 1
    top_p: float | None = None
    prompt: str = ""
    seed: int = 42


def needed_files(names: Sequence[str]) -> list[str]:
    """Out of a model's files those that a captioner is loaded from; none where it isn't one."""
    there = set(names)
    weights = [name for name in _WEIGHTS if name in there][:1]
    words = [name for name in _WORDS if name in there]
    if not weights or not words or "config.json" not in there:
        return []
    return [name for name in _SMALL if name in there] + words + weights


def kind_of(folder: Path, flag: str) -> Kind:
    """Which kind of captioner a folder holds.

    Raises:
        UserError: none that is known, or files are missing.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    config = folder / "config.json"
    try:
        content = json.loads(config.read_bytes()) if "config.json" in names else {}
    except (OSError, ValueError) as error:
        raise UserError.single(str(config), f"can't be read ({error})", "download it again") from error
    told = content.get("model_type") if isinstance(content, dict) else None
    for kind in get_args(Kind):
        if told == kind and needed_files(names):
            return kind
    listed = f"model_type is {told}" if told else "there is no config.json that names a model_type"
    wrong = f"{folder} is no captioner that is known ({listed})"
    if told in get_args(Kind):
        wrong = f"{folder} lacks {' or '.join(_WEIGHTS)}, or {' or '.join(_WORDS)}"
    raise UserError.single(flag, wrong, "give the folder of a BLIP or GIT model as transformers saves them")


def find_model(name: str, flag: str) -> Path:
    """The folder of a captioner: the one that is named, or a hub's model in the hub's cache, downloaded if need be.

    Raises:
        UserError: it isn't there and can't be had.
    """
    if Path(name).is_dir():
        return Path(name)
    if not downloads.looks_like_id(name):
        raise UserError.single(flag, f"there is no folder {name}", "give a folder or a name like owner/model")
    if (config := downloads.cached(name, "config.json")) is not None:
        there = [path.name for path in config.parent.iterdir()]
        if needed_files(there):
            return config.parent
    return downloads.download(name, needed_files, flag)


class Captioner:
    """A captioner that is ready to work."""

    def __init__(self, folder: Path, kind: Kind, manner: Manner, device: "torch.device") -> None:
        """Raises UserError if transformers can't load the model, or its files lack weights."""
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        classes = {"blip": transformers.BlipForConditionalGeneration, "git": transformers.GitForCausalLM}
        try:
            processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
            model, told = classes[kind].from_pretrained(folder, local_files_only=True, output_loading_info=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError.single(str(folder), f"can't be loaded ({reason})", "download it again") from error
        if missing := _never_read(model, told["missing_keys"]):
            wrong = f"its weights lack {len(missing)} tensors, such as {missing[0]}"
            raise UserError.single(str(folder), wrong, "download it again")
        self._kind, self._manner, self._device = kind, manner, device
        self._images, self._tokenizer = processor.image_processor, processor.tokenizer
        self._check_lengths(folder, model.config)
        self._model = model.to(device).float().eval()

    def _check_lengths(self, folder: Path, config: Any) -> None:
        """Refuse captions that are longer than the model's texts, or as short as what they begin with."""
        longest = int(getattr(config, "text_config", config).max_position_embeddings)
        manner = self._manner
        if manner.max_length > longest:
            wrong = f"{manner.max_length} tokens are more than {folder} writes"
            raise UserError.single("--max_length", wrong, f"give up to {longest}")
        begun = len(self._tokenizer(manner.prompt)["input_ids"]) if self._kind == "blip" else 1
        if manner.max_length <= begun:
            wrong = f"{manner.max_length} tokens leave none behind the {begun} that a caption begins with"
            raise UserError.single("--max_length", wrong, "give more, or a shorter --prompt")

    def prepare(self, picture: Pixels) -> NDArray[np.float32]:
        """uint8 (h, w, 3) RGB -> float32 (3, side, side), by the model's own image processor."""
        given = self._images(images=picture, return_tensors="pt", input_data_format="channels_last")
        return np.asarray(given["pixel_values"][0], np.float32)

    def __call__(self, prepared: Sequence[NDArray[np.float32]], names: Sequence[str]) -> list[str]:
        """Captions of pictures that went through `prepare`; `names` tell which draws are theirs.

        Raises:
            UserError: the device's memory is too small for so many pictures.
        """
        import torch

        try:
            with torch.inference_mode():
                return self._captions(prepared, names)
        except torch.OutOfMemoryError as error:
            wrong = f"{len(prepared)} pictures are more than the memory of {self._device} takes"
            raise UserError.single("--batch_size", wrong, "use a smaller one") from error

    def _captions(self, prepared: Sequence[NDArray[np.float32]], names: Sequence[str]) -> list[str]:
        import torch

        manner = self._manner
        given: dict[str, Any] = {"pixel_values": torch.from_numpy(np.stack(prepared)).to(self._device)}
        begun = 0
        if self._kind == "blip":
            words = self._tokenizer(manner.prompt)["input_ids"]
            given["input_ids"] = torch.tensor([words] * len(prepared), device=self._device)
            begun = len(words) - 1
        given |= {"max_length": manner.max_length, "min_length": manner.min_length, "num_beams": manner.beams}
        if manner.top_p is not None:
            drawing = _Drawing(manner.seed, names, manner.top_p)
            given |= {"logits_processor": [drawing], "repetition_penalty": _REPETITION}
        tokens = self._model.generate(do_sample=False, **given)
        texts = self._tokenizer.batch_decode(tokens[:, begun:], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def _never_read(model: "torch.nn.Module", missing: Collection[str]) -> list[str]:
    """Parameters that the weights lack, but for those that are one with a parameter that was read."""
    named = list(model.named_parameters(remove_duplicate=False))
    read = {id(parameter) for name, parameter in named if name not in missing}
    return sorted(name for name, parameter in named if name in missing and id(parameter) not in read)


class _Drawing:
    """Makes the likeliest token of each row a draw from the likeliest tokens that make up `top_p`."""

    def __init__(self, seed: int, names: Sequence[str], top_p: float) -> None:
        from transformers import TopPLogitsWarper

        self._seed, self._names = seed, names
        self._cut = TopPLogitsWarper(top_p)

    def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":
        """Logits (rows, vocabulary) of the token that follows `input_ids` (rows, tokens)."""
        import torch

        kept = self._cut(input_ids, scores.float())
        place, width = input_ids.shape[1], scores.shape[1]
        noise = [rng(self._seed, "caption", name, place).gumbel(size=width) for name in self._names]
        return kept + torch.from_numpy(np.stack(noise)).to(kept)


_QUOTED = r"""(?:"[^"]*"?|'(?:[^']|\b'\b)*'?|\w+)"""
_NOUN = r"(?:(?:the|an?|it's|its|his|her|their) )?\w+"
_WHERE = rf"(?: (?:is |are )?(?:written )?(?:on|in) {_NOUN}(?: of {_NOUN})?)?"
_WRITING = (
    rf"\b(?:and|has|have|with) the (?:words?|letters?|names?|numbers?|text) ?{_QUOTED}{_WHERE}",
    rf"(?:\bwith a sign )?\bthat says ?(?:the words? )?{_QUOTED}{_WHERE}",
    rf"(?:\b(?:with|and) )?(?:\bthe )?\bwords? {_QUOTED} on it\b",
)


def without_writing(caption: str) -> str:
    """A caption without what GIT tells, mostly wrongly, of words that stand in a picture."""
    for pattern in _WRITING:
        caption = re.sub(pattern, " ", caption)
    caption = re.sub(r"\s+([,.])", r"\1", " ".join(caption.split()))
    return caption.strip(" ,")
