"""Encoded images -> pixels, safe for whatever the web holds: one way to open, bounded before anything is decoded.

In: the bytes of a file. Out: uint8 pixels of a bucket's size, or an `ImageError` whose message fits a table.
May import `lidit.runtime` and `lidit.store`.
"""
