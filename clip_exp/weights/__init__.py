"""Weights of clip_exp and of other libraries: found by name, fetched, read, and turned into ours and back."""
