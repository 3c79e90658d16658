"""From a feature table to batches: the plan (which row when, a pure function), the tables, padded tensors.

In: a Lance table at a version, a seed, a step. Out: batches of one bucket each, the same at every start.
May import `lidit` and the trainer's config and storage.
"""
