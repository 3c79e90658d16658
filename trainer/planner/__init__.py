"""What a run will take before it begins: memory by rank, steps, time.

In: a config and the table's sizes. Out: an estimate. May import `lidit`, `trainer.data` and `trainer.engine`.
"""
