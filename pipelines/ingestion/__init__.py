"""What the ingest job does with a source: units, deduplication, filters, comparison with the table, updates.

In: records of `pipelines.sources`. Out: new rows, each once. May import `lidit`, `pipelines.engine` and `pipelines.sources`.
"""
