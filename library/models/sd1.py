"""The SD1 family: one text encoder, of whose layers any may give the states, normed."""

from collections.abc import Sequence

from library.conditioning import Conditioning
from library.models.model import Model


class SD1(Model):
    """Stable Diffusion 1.x."""

    def encode_prompts(self, captions: Sequence[str]) -> Conditioning:
        """States (b, n * 75 + 2, d) of the `clip_skip`-th layer from the end, with the final norm."""
        text, _ = self._text_states(0, captions, self.clip_skip or 1, norm=True)
        return Conditioning(text.states)
