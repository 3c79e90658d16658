"""What the generate job reads and leaves: prompt sets, and the folders that benchmarks expect.

In: prompt files. Out: rows to draw, pictures as files. May import `lidit`, and pipelines' families for tables and sources.
"""
