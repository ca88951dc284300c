"""Evaluation tasks, one package each, with configuration, data and score. Torch is imported only to score a model.

Tasks implement `clip_exp.config.evaluation.TaskConfig` and `clip_exp.evaluation.task.Task`. No other module depends on a task.
"""
