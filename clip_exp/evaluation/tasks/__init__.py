"""Evaluation tasks: a package each, whose `__init__` has its configuration and finds its data without torch, and `score` (or `__init__` too, where that is short) scores a model on it.

`TaskConfig` of `clip_exp.config.evaluation` and `Task` of `clip_exp.evaluation.task` are the contract; no other module knows a kind of task.
"""
