"""The stage engine: units of work on Ray actors, committed to a Lance table exactly once, whatever is killed.

In: a table, a stage (columns in, columns out), a config. Out: columns, runs, summaries.
May import `lidit`; knows no particular job.
"""
