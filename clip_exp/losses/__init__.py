"""Losses: a package each, whose `__init__` has its configuration without torch, and `loss` the loss. `LossConfig` of `clip_exp.config.training` is the contract."""
