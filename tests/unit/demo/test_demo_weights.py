"""The demo's weights: they belong to the encoders and the autoencoder beside them, and draw what a short prompt asks for."""

from pathlib import Path

import pytest

import lidit
from demo.world.sight import look_at

pytestmark = pytest.mark.unit

WEIGHTS = Path(__file__).parents[3] / "demo" / "weights"
COLOURS, SHAPES = ("red", "yellow", "green", "orange"), ("star", "square", "diamond", "triangle")


def test_single_objects_in_their_colours():
    """The card says 0.92 of such pictures over 24 prompts; of these 16, at least twelve. Other encoders would be refused."""
    pipe = lidit.TextToImage.from_pretrained(str(WEIGHTS), device="cpu")
    wanted = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    prompts = [f"a {colour} {shape}" for colour, shape in wanted]
    images = pipe(prompts, seed=0, guidance_scale=3.5, num_inference_steps=20)
    found = [{(seen.colour, seen.shape) for seen in look_at(image).objects} for image in images]
    right = sum(pair in pairs for pair, pairs in zip(wanted, found))
    assert len(images) == 16 and images[0].size == (48, 48)
    assert right >= 12, f"{right} of 16"
