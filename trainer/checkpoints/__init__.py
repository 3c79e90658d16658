"""Saving and resuming: files first, the manifest last, and no checkpoint is deleted but by the run that owns it.

In: the state of all ranks. Out: a folder that any number of ranks can go on from. May import `lidit` and `trainer.engine`.
"""
