"""The store's contract: names of columns, codecs, buckets, checksums, fingerprints, and what is stale.

In: Lance columns and their metadata. Out: arrays, and whether they are what they claim to be.
May import `lidit.runtime`; no Ray. Whoever writes or reads a table, in whatever job, does it by these rules.
"""
