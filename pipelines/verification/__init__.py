"""Checks of the verify job: files against their checksums, latents against an autoencoder, and how much was looked at.

In: a store. Out: problems, named by fragment and row. May import `lidit` and `pipelines.engine`.
"""
