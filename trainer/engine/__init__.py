"""DeepSpeed on every rank: the engine, the optimizer, ZeRO's parts and their EMA, what ranks tell each other.

In: a model and a config. Out: steps. May import `lidit` and the trainer's config and storage.
"""
