"""A store, shown to people: facts by column and stage, sample rows, charts, one HTML page.

In: a store. Out: text and HTML. May import `lidit` and `pipelines.engine`.
"""
