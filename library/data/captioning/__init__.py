"""Captions and tags made by models: pictures in, texts out, and where the texts are kept."""
