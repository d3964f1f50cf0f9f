"""Where a run's text conditioning comes from: the text encoders while they train, else a store of their outputs."""

from collections.abc import Sequence

import torch

from library.conditioning import Conditioning
from library.console import say
from library.data.caches.text import TextStore
from library.data.caches.text_files import TextFiles
from library.data.caption_plan import CaptionPlan, plan_captions
from library.models.model import Model
from library.models.prompts import ROW
from library.tokenizer import WORDS
from library.training.denoising import Encode
from library.training.distributed import Processes
from library.training.prepare import Prepared
from library.training.text_use import text_use
from library.training.trainable import Trainable


def text_source(prepared: Prepared, model: Model, processes: Processes) -> tuple[Encode, bool]:
    """What gives captions and prompts their conditioning, and whether that needs no text encoders any more.

    With `--cache_text_encoder_outputs` every caption that never varies is encoded here, and previews' prompts too.

    Raises:
        UserError: a text encoder gave NaN, or a file can't be written.
    """
    use = text_use(prepared)
    if use.trains:
        return model.encode_prompts, False
    captions = plan_captions(prepared.data.everything, total_steps=prepared.clock.total_updates)
    files = None
    if use.ahead and use.to_disk:
        files = caption_files(captions, model)
    store = TextStore(model.encode_prompts, memo_bytes=use.memo_bytes, device=model.device, files=files)
    if not use.ahead:
        return store, False
    prompts = [text for prompt in prepared.prompts for text in (prompt.prompt, prompt.negative_prompt or "")]
    store.fill(
        [*captions.known, *prompts],
        threads=prepared.options.dataset.max_data_loader_n_workers,
        rank=processes.rank,
        world_size=processes.count,
        wait=processes.wait,
    )
    wanted = len(captions.known)
    counts = f"{wanted} that never vary ({store.encodings} texts encoded now, previews' prompts included)"
    if captions.varying:
        say(f"text: captions of {len(captions.varying)} pictures vary and go through the memo; kept are {counts}")
        return store, False
    say(f"text: captions kept are {counts}; the text encoders are released")
    return store, True


class FrozenText:
    """Conditioning from text encoders whose training has ended: each caption is encoded once, without dropout, for each
    strength of the network, and apart from that for looking at held-out pictures, where schedule-free optimizers show
    other weights. All of it shares one memo."""

    def __init__(self, encode: Encode, trainable: Trainable, memo_bytes: int, device: torch.device) -> None:
        self._encode, self._trainable = encode, trainable
        self._store = TextStore(self._alone, memo_bytes=memo_bytes, device=device)

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        """The conditioning of captions at the network's present strength."""
        state = f"{self._trainable.multiplier} {self._trainable.is_training}\0"
        return self._store([state + caption for caption in captions])

    def _alone(self, named: Sequence[str]) -> Conditioning:
        """Captions behind the state that the network is in. Draws of networks that aren't ours move nothing."""
        was_training = self._trainable.is_training
        self._trainable.train(False)
        try:
            with torch.random.fork_rng():
                return self._encode([name.partition("\0")[2] for name in named])
        finally:
            self._trainable.train(was_training)


def caption_files(captions: CaptionPlan, model: Model) -> TextFiles:
    """The files of the captions that are always the same, as this model encodes them."""
    return TextFiles(
        captions.fixed,
        encoder_id=model.text_encoder_id(),
        tokens=model.max_words + ROW - WORDS,
        widths=model.text_widths,
    )
