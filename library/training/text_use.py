"""How a run gets its text conditioning, known from its options and the model's configs alone. Imports no torch."""

from library.data.caption_plan import TextUse
from library.tokenizer import WORDS
from library.training.prepare import Prepared

BYTES = {"no": 4, "fp16": 2, "bf16": 2}


def text_use(prepared: Prepared) -> TextUse:
    """Whether text encoders, or vectors of new tokens that go through them, train; what is kept of their outputs, and
    the size of one caption's."""
    options, model, embeddings = prepared.options, prepared.model, prepared.embeddings
    tokens = (options.model.max_token_length or WORDS) + 2
    numbers = tokens * sum(model.text_widths) + model.pooled_width
    return TextUse(
        caption_bytes=numbers * BYTES[options.model.mixed_precision],
        memo_bytes=options.caching.text_memo_mb * 2**20,
        trains=any(prepared.rates.text_encoders) or (embeddings is not None and embeddings.trains),
        ahead=options.caching.cache_text_encoder_outputs,
        to_disk=options.caching.cache_text_encoder_outputs_to_disk,
    )
