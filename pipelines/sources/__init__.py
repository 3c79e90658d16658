"""Sources of rows: folders, tars, tables, prompt files; each a list of items or shards, each read as `Record`s.

In: `kind:argument`. Out: records as they came, not filtered, with a reason where one can be no good row.
May import `lidit` and `pipelines.engine`.
"""
