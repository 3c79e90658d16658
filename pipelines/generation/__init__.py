"""Prompt sets that the generate job reads, and the folders that benchmarks expect of it.

In: prompt files. Out: rows to draw, pictures as files. May import `lidit`, and pipelines' families for tables and sources.
"""
