"""The ingest job's work on a source: units, deduplication, filters, comparison with the table, updates.

In: records of `pipelines.sources`. Out: new rows, each once. May import `lidit`, `pipelines.engine` and `pipelines.sources`.
"""
