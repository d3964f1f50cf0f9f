"""lorasmith: teach Stable Diffusion a new character, object or style from a folder of pictures."""

__version__ = "0.1.0"
