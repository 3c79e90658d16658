"""The demo's closed world: scenes, their captions in words and pixels, prompts, and a judge that reads pixels alone.

In: a seed. Out: a scene, its image, what is true of it. Imports nothing of lidit's jobs.
"""
