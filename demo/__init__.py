"""A small closed world (rendered scenes, tiny language models) that runs the whole path on a laptop."""
