"""Captions by a vision-language model: what is asked, who answers (transformers or an OpenAI server), what is let through.

In: encoded images. Out: captions with a status. May import `lidit` and `pipelines.engine`; used by the recaption job.
"""
