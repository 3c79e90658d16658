"""How the demo's tiny models were trained: LLMs, T5, autoencoder, VLM; each a script, all committed with their cards.

In: texts and images of `demo.world`. Out: `demo/encoders`, `demo/vae`, `demo/vlm`.
"""
