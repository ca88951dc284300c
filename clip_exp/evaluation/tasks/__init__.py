"""Evaluation tasks: a package each, whose `__init__` has its configuration, finds its data without torch, and imports torch to score a model on it.

`TaskConfig` of `clip_exp.config.evaluation` and `Task` of `clip_exp.evaluation.task` are the contract; no other module knows a kind of task.
"""
