"""A tiny Stable Diffusion 1 model of our own, its little world, and a thing to teach it: the main job, offline.

`model/` is the base model in diffusers layout, `images/` the twelve pictures of the new thing. The rest makes both and
measures them; nothing of lorasmith's own code depends on this folder.
"""
