"""Monitoring of a run: metrics by step, validation, reports to TensorBoard and Ray.

In: sums of a step, the model. Out: lines and figures. May import `lidit`, `trainer.data` and `trainer.engine`.
"""
