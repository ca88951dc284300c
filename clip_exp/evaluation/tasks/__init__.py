"""Evaluation tasks, one package each. Its `__init__` has the configuration, finds the data without torch, and imports torch only to score.

Tasks implement `clip_exp.config.evaluation.TaskConfig` and `clip_exp.evaluation.task.Task`. No other module depends on a kind of task.
"""
