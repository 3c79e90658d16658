"""lidit: text-to-image diffusion transformers prompted through several decoder-only LLMs.

The model and its maths. This package needs torch and transformers only; it knows nothing of ray, lance or deepspeed.
"""
