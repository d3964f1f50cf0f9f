"""The SD2 family. Its text encoder leaves OpenCLIP's last layer out, so that the states are SD1's in every way; what
differs, padding and names, are facts in `families`."""

from library.models.sd1 import SD1


class SD2(SD1):
    """Stable Diffusion 2.x, 512 and 768-v."""
