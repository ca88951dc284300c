"""Weights of clip_exp and other libraries: finding, downloading, reading, and converting between layouts."""
