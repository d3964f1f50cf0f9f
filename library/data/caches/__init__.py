"""Latents and text outputs that are made once: in memory and in files, how they are judged, kept and pruned."""
