"""The frozen models that make features: decoder-only LLMs for prompts, autoencoders for images.

In: texts and pixels. Out: prompt embeddings with their lengths, and latents. Nothing here is trained.
May import `lidit.runtime` and `lidit.store`; all of transformers is loaded through `loading.py`.
"""
