"""Measures: CLIP score, FID, linear probes of encoders' states, and the intervals that go with figures.

In: images and texts of a table. Out: columns and figures with confidence intervals. May import `lidit` and `pipelines.engine`.
"""
