"""A tiny Stable Diffusion 1 model of our own, its little world, and two things to teach it: the main job, offline.

`model/` is the base model in diffusers layout, `images/` the twelve pictures of a new thing for a LoRA,
`embedding_images/` the twelve of a new look for an embedding. The rest makes all of them and measures what was learned;
nothing of lorasmith's own code depends on this folder.
"""
