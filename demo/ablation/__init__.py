"""The ablation grid: settings of the paper, each trained for several seeds, and how well prompts are followed.

In: a setting and a seed. Out: one JSON a cell, and tables of them. May import `lidit`, `trainer`, `demo.world`.
"""
