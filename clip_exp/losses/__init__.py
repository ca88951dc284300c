"""Contrastive losses, one package each: `__init__` contains the configuration (no torch), and `loss` the loss.

The interface is `LossConfig` in `clip_exp.config.training`.
"""
