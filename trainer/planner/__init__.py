"""Estimates of a run before it begins: memory per rank, steps, time.

In: a config and the table's sizes. Out: an estimate. May import `lidit`, `trainer.data` and `trainer.engine`.
"""
